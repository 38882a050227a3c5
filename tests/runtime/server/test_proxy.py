"""Behind a reverse proxy, and used by web pages of other origins."""

import httpx
import pytest

from glm4_runtime.errors import RequestError
from glm4_runtime.server import ServerOptions

MODEL = "glm4-tiny"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
CHAT = "/v1/chat/completions"
PAGE = "https://chat.example"


def cors(response):
    return {name: value for name, value in response.headers.items() if name.startswith("access-control")}


def preflight(server, origin, path=CHAT):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    return httpx.options(server.url + path, headers=headers)


def test_pages_of_named_origins_may_use_the_server(scripted):
    _, server, _ = scripted(["yes"], allow_origins=(PAGE, "http://localhost:3000"), api_keys=("key",))
    for origin in (PAGE, "http://localhost:3000"):
        asked = preflight(server, origin)
        assert asked.status_code == 200
        assert cors(asked)["access-control-allow-origin"] == origin
        assert "POST" in cors(asked)["access-control-allow-methods"]
        assert "x-stainless-os" in cors(asked)["access-control-allow-headers"]
        assert cors(asked)["access-control-allow-private-network"] == "true"
    headers = {"Origin": PAGE, "Authorization": "Bearer key"}
    answer = httpx.post(server.url + CHAT, json=ASKED, headers=headers)
    assert answer.status_code == 200
    assert cors(answer)["access-control-allow-origin"] == PAGE
    assert "x-request-id" in cors(answer)["access-control-expose-headers"]
    # also by Anthropic's clients, and to delete what was stored
    asked = httpx.options(
        f"{server.url}/v1/responses/x",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "DELETE",
            "Access-Control-Request-Headers": "x-api-key, anthropic-version",
        },
    )
    assert asked.status_code == 200
    assert "DELETE" in cors(asked)["access-control-allow-methods"]
    assert "x-api-key" in cors(asked)["access-control-allow-headers"]
    assert "request-id" in cors(answer)["access-control-expose-headers"]
    # a page can read why it was refused
    refused = httpx.post(server.url + CHAT, json=ASKED, headers={"Origin": PAGE})
    assert (refused.status_code, cors(refused)["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://chat.example.evil.example", "http://chat.example"]
)
def test_pages_of_other_origins_may_not(scripted, origin):
    _, server, _ = scripted(["yes"], allow_origins=(PAGE,))
    asked = preflight(server, origin)
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_without_the_option_no_page_may(scripted):
    _, server, _ = scripted()
    assert cors(preflight(server, PAGE)) == {}
    assert preflight(server, PAGE).status_code == 405


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "https://chat.example/", "https://Chat.example", "https://a b", ""]
)
def test_an_origin_is_written_as_browsers_send_it(origin):
    with pytest.raises(RequestError, match="is no origin"):
        ServerOptions(allow_origins=(origin,))


@pytest.mark.parametrize("prefix", ["/llm", "/a/b-1"])
def test_a_server_under_a_path(scripted, prefix):
    """Whether the proxy hands the prefix on or strips it."""
    _, server, _ = scripted(["one"], ["two"], path_prefix=prefix, api_keys=("key",))
    headers = {"Authorization": "Bearer key"}
    for start, text in (("", "one"), (prefix, "two")):
        answer = httpx.post(server.url + start + CHAT, json=ASKED, headers=headers)
        assert answer.json()["choices"][0]["message"]["content"] == text
        assert httpx.get(f"{server.url}{start}/v1/models/{MODEL}", headers=headers).json()["id"] == MODEL
        # the same routes are open as without a prefix, and no others
        assert httpx.get(f"{server.url}{start}/health").status_code == 200
        assert httpx.get(f"{server.url}{start}/").headers["content-type"].startswith("text/html")
        assert httpx.get(f"{server.url}{start}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}{start}/metrics").status_code == 401
    assert httpx.get(server.url + prefix).headers["location"] == f"{prefix}/"
    described = httpx.get(f"{server.url}{prefix}/openapi.json", headers=headers).json()
    assert described["servers"] == [{"url": prefix}]
    metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
    assert f'glm4_http_requests_total{{route="{CHAT}",status="200"}} 2.0' in metrics
    for start in ("", prefix):
        refused = httpx.post(f"{server.url}{start}/v1/messages", json={}, headers={"x-api-key": "key"})
        assert (refused.status_code, refused.json()["type"]) == (400, "error")
        unknown = httpx.get(f"{server.url}{start}/v1/responses/resp_1", headers=headers)
        assert "there is no response 'resp_1'" in unknown.json()["error"]["message"]
    for other in (f"{prefix}x/health", f"/x{prefix}/health", f"{prefix}{prefix}/health"):
        assert httpx.get(server.url + other, headers=headers).status_code == 404


@pytest.mark.parametrize("prefix", ["llm", "/", "/llm/", "//x", "/a b", "/a?b", "/../x/"])
def test_a_prefix_is_a_plain_path(prefix):
    with pytest.raises(RequestError, match="path_prefix"):
        ServerOptions(path_prefix=prefix)


def test_a_proxy_may_call_the_server_by_its_own_name(scripted):
    _, server, _ = scripted(allow_hosts=("LLM.example",))
    for name, status in {
        "llm.example": 200,
        "llm.example:443": 200,
        "localhost": 200,
        "evil.example": 421,
    }.items():
        assert httpx.get(f"{server.url}/health", headers={"Host": name}).status_code == status


def test_named_hosts_hold_beyond_this_machine_too():
    options = {"host": "0.0.0.0", "allow_anonymous": True}
    assert ServerOptions(**options).host_names is None
    assert "llm.example" in ServerOptions(**options, allow_hosts=("llm.example",)).host_names
    with pytest.raises(RequestError, match="no host name"):
        ServerOptions(allow_hosts=("https://llm.example",))


def test_a_model_is_found_by_a_name_with_slashes(scripted):
    name = "THUDM/GLM-4-9B-0414"
    _, server, client = scripted(served_name=name)
    assert client.models.retrieve(name).id == name
    for path in (name, name.replace("/", "%2F")):
        assert httpx.get(f"{server.url}/v1/models/{path}").json()["id"] == name
    refused = httpx.get(f"{server.url}/v1/models/other/model")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
