"""Real servers on free ports, and clients of them."""

import contextlib
import shutil
from pathlib import Path

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
