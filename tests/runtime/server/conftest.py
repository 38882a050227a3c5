"""Real servers on free ports, and clients of them."""

import contextlib
import shutil
from pathlib import Path

import chat_page
import openai
import pytest
from bundles import rehash
from checkpoints import tiny_config, write_checkpoint
from scripted import ScriptedScheduler

from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

MODEL = "glm4-tiny"
DEMO = Path(__file__).parents[3] / "demo" / "glm4-tiny"


def client_of(server, **options):
    return openai.OpenAI(
        base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
    )


@pytest.fixture(scope="session")
def server(demo_bundle):
    """The demo bundle on the real scheduler."""
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        yield server


@pytest.fixture
def server_of():
    """A function that serves a bundle on the real scheduler with options of its own."""
    return lambda bundle, **options: serving(Session.open(bundle), ServerOptions(**{"port": 0} | options))


@pytest.fixture(scope="session")
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="session")
def strict_client(server):
    """A client that holds answers to the types that it knows."""
    with client_of(server, _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="session")
def thinking_bundle(demo_bundle, tmp_path_factory):
    """The demo bundle with a template that opens a thought, as Z1's does."""
    folder = tmp_path_factory.mktemp("thinking") / MODEL
    shutil.copytree(demo_bundle, folder)
    template = folder / "chat_template.jinja"
    head, _, _ = template.read_text().rpartition("{{- '<|assistant|>' -}}")
    template.write_text(head + "{{- '<|assistant|>\\n<think>' -}}\n{%- endif -%}\n")
    return rehash(folder)


@pytest.fixture
def scripted(demo_bundle):
    """A function that serves scripted replies; returns the scheduler, the server and a client."""
    with contextlib.ExitStack() as stack:

        def serve(*replies, bundle=demo_bundle, token_ids=None, **options):
            scheduler = ScriptedScheduler(*replies, token_ids=token_ids)
            chosen = ServerOptions(**{"port": 0} | options)
            running = stack.enter_context(serving(Session.open(bundle), chosen, scheduler))
            client = stack.enter_context(client_of(running, api_key=(*chosen.api_keys, "none")[0]))
            return scheduler, running, client

        yield serve


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """A function: the bundle of a random checkpoint for a task, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("pooled")

    def make(task):
        if not (folder / task).exists():
            config = tiny_config(vocab_size=2048, pad_token_id=2038, eos_token_id=[2038, 2045, 2047])
            checkpoint = write_checkpoint(folder / f"{task}-checkpoint", config, task=task)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(DEMO / name, checkpoint)
            export(checkpoint, folder / task, ExportOptions(precision="fp32", task=task, parity=False))
        return folder / task

    return make


@pytest.fixture(scope="module")  # its event loop would stop asyncio.run in the files that follow
def browser():
    if chat_page.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chat_page.CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    """What the browser complained of; empty it where a test expects complaints."""
    return []


@pytest.fixture
def opened(browser, complaints):
    """A function that opens a server's page; complaints of the browser fail the test."""
    contexts = []

    def open_page(server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
