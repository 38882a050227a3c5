"""Client libraries and agents' frameworks against the demo model: chat, stream, a round trip with a tool, a form.

Their libraries live in an environment of their own (`make clients`), so each runs as a script of tests/clients.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "tests" / "clients"
PYTHON = ROOT / "out" / "clients" / "bin" / "python"
ABOUT = "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
# Some libraries take or treat models by known names only: the server gives the model such aliases.
ALIASES = {"gpt-4o": "glm4-tiny", "claude-sonnet-4-5": "glm4-tiny"}
OWN, GPT, CLAUDE = "glm4-tiny", *ALIASES
CLIENTS = [
    ("langchain", "chat", OWN),
    ("langchain", "responses", OWN),
    ("langchain", "messages", OWN),
    ("llama_index", "chat", OWN),
    ("llama_index", "responses", GPT),
    ("llama_index", "messages", CLAUDE),
    ("pydantic_ai", "chat", OWN),
    ("pydantic_ai", "responses", OWN),
    ("pydantic_ai", "messages", CLAUDE),
    ("instructor", "chat", OWN),
    ("instructor", "responses", OWN),
    ("instructor", "messages", OWN),
    ("openai_agents", "chat", OWN),
    ("openai_agents", "responses", OWN),
    ("litellm", "chat", OWN),
    ("litellm", "responses", OWN),
    ("litellm", "messages", OWN),
]
# Nothing but loopback can be reached, and no client tries to.
ENVIRONMENT = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
}


@pytest.fixture(scope="module")
def named(demo_bundle):
    """A server of the demo bundle that has other names too."""
    aliases = tuple(f"{alias}={name}" for alias, name in ALIASES.items())
    with serving(Session.open(demo_bundle), ServerOptions(port=0, aliases=aliases)) as server:
        yield server


@pytest.mark.more
@pytest.mark.parametrize(("client", "api", "model"), CLIENTS)
def test_a_client_does_all_four(named, client, api, model):
    if not PYTHON.exists():
        pytest.skip("no client libraries: make clients")
    asked = [PYTHON, SCRIPTS / f"with_{client}.py", named.url, model, api]
    ran = subprocess.run(asked, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    given = json.loads(ran.stdout.splitlines()[-1])
    assert [name for name in given if "error" in given[name]] == [], given
    assert given["chat"] == ABOUT
    assert len(given["stream"]) > 10
    assert given["stream"][-1] == "raven" if client == "instructor" else "".join(given["stream"]) == ABOUT
    cities, text = given["tools"]
    assert cities == ["Oslo"]
    assert "18 degrees" in text
    form = given["structured"]
    assert set(form) == {"kind", "sure", "age", "rival", "mark"}
    assert form["rival"]["kind"] in ("bear", "wolf")


def test_the_documents_name_the_versions_that_are_tried():
    pinned = dict(
        re.findall(
            r"^([\w-]+)==(\S+)", (SCRIPTS / "requirements.txt").read_text().partition("\n# what")[0], re.M
        )
    )
    table = (ROOT / "docs" / "serving.md").read_text().partition("## Clients\n")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w-]+)` (\d[\w.]*)", table)
    assert set(named) == set(pinned.items())


def test_every_script_is_tried():
    found = {path.stem.removeprefix("with_") for path in SCRIPTS.glob("with_*.py")}
    assert found == {client for client, _, _ in CLIENTS}
