"""A server with a prefix cache on disk: who shares prefixes, and what its metrics say."""

import re

import httpx
import pytest
from remote_stages import remote

from glm4_runtime.errors import RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

PROMPT = " ".join(f"The {n}th cat sat on a mat." for n in range(40))


@pytest.fixture
def serve(demo_cpu, tmp_path):
    """Serve the demo bundle with a cache in one folder."""

    def start(**options):
        cache = {"cache": tmp_path / "cache", "api_keys": ("anna", "otto")} | options
        return serving(Session.open(demo_cpu), ServerOptions(port=0, **cache))

    return start


def ask(server, key):
    """The answer's text, and the number of cached tokens."""
    body = {"model": "glm4-tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    reply = httpx.post(
        f"{server.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60
    ).json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def disk_tokens(server):
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer anna"}, timeout=60).text
    return float(re.search(r"^glm4_disk_cached_prompt_tokens_total (.*)$", text, re.MULTILINE)[1])


def test_a_second_server_starts_warm_for_the_same_key_only(serve):
    with serve() as server:
        text, cached = ask(server, "anna")
        assert cached == 0
    with serve() as server:
        assert ask(server, "otto") == (text, 0)
        assert disk_tokens(server) == 0
        again, cached = ask(server, "anna")
        assert again == text
        assert disk_tokens(server) == cached >= 256


@pytest.mark.parametrize("change", [lambda session: session, remote], ids=["here", "remote"])
def test_stages_start_warm_too(demo_staged, demo_cpu, tmp_path, change):
    """From what the bundle without stages answers, and from their own first run."""
    with serving(Session.open(demo_cpu), ServerOptions(port=0, served_name="glm4-tiny")) as server:
        wanted, _ = ask(server, "anna")
    options = ServerOptions(port=0, cache=tmp_path / "cache", served_name="glm4-tiny")
    for fewest in (0, 256):
        with serving(change(Session.open(demo_staged)), options) as server:
            text, cached = ask(server, "anna")
        assert (text, cached >= fewest) == (wanted, True)


def test_prefixes_in_memory_are_separate_too(serve):
    with serve(cache=None) as server:
        text, _ = ask(server, "anna")
        assert ask(server, "otto") == (text, 0)
        assert ask(server, "anna")[1] > 256


def test_all_keys_share_prefixes_if_told_so(serve):
    with serve(cache_shared=True) as server:
        text, _ = ask(server, "anna")
        again, cached = ask(server, "otto")
        assert (again, cached > 256) == (text, True)
    with serve(cache_shared=True) as server:
        assert ask(server, "otto")[1] >= 256


def test_a_folder_that_cannot_be_used_is_told_at_the_start(serve, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="choose another --cache"), serve(cache=tmp_path / "file"):
        pass
