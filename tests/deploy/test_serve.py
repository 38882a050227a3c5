"""serve, chat and bench-serve on the command line."""

import io
import json
import os
import re
import select
import subprocess
import sys
from dataclasses import replace

import pytest

from glm4_deploy.load import Load, Sample, measure_load, plot, spread, summary
from glm4_runtime.bundle import read_manifest
from glm4_runtime.cluster.scaling import ReplicaCount
from glm4_runtime.errors import RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session


@pytest.fixture(scope="module")
def url(demo_bundle):
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        yield server.url


def test_serve_passes_its_options_on(run, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "glm4_runtime.server.run.open_and_serve",
        lambda bundle, options, **session: seen.update(bundle=bundle, options=options, session=session),
    )
    monkeypatch.setenv("GLM4_API_KEYS", "one")
    (tmp_path / "keys").write_text("two\n")
    (tmp_path / "manifest.json").touch()
    arguments = ["--host", "0.0.0.0", "--port", 81, "--api-key-file", tmp_path / "keys", "--max-queue", 5]
    arguments += [
        "--max-prompt-tokens",
        9,
        "--max-choices",
        2,
        "--max-body-bytes",
        77,
        "--request-timeout",
        1.5,
    ]
    arguments += ["--body-timeout", 2.5, "--drain-timeout", 3.5, "--log-prompts", "--served-name", "glm"]
    arguments += ["--max-stored", 7]
    arguments += [
        "--header-timeout",
        4.5,
        "--send-timeout",
        5.5,
        "--idle-timeout",
        6.5,
        "--log-level",
        "debug",
    ]
    arguments += ["--allow-host", "a.example", "--allow-host", "b.example", "--path-prefix", "/llm"]
    arguments += ["--allow-origin", "https://a.example", "--alias", "claude-x=glm", "--alias", "gpt-y=glm"]
    arguments += ["--lora", f"poet={tmp_path}", "--lora", f"clerk={tmp_path}", "--allow-lora-loading"]
    arguments += ["--threads", 1, "--max-batch-size", 2, "--verify"]
    assert run("serve", tmp_path, *arguments)[0] == 0
    assert seen["options"] == ServerOptions(
        host="0.0.0.0",
        port=81,
        api_keys=("one", "two"),
        served_name="glm",
        aliases=("claude-x=glm", "gpt-y=glm"),
        adapters=(f"poet={tmp_path}", f"clerk={tmp_path}"),
        allow_lora_loading=True,
        max_body_bytes=77,
        max_prompt_tokens=9,
        max_choices=2,
        max_queue=5,
        max_stored=7,
        request_timeout=1.5,
        body_timeout=2.5,
        header_timeout=4.5,
        send_timeout=5.5,
        idle_timeout=6.5,
        drain_timeout=3.5,
        allow_hosts=("a.example", "b.example"),
        allow_origins=("https://a.example",),
        path_prefix="/llm",
        log_level="debug",
        log_prompts=True,
    )
    assert seen["session"]["verify"] is True
    assert (seen["session"]["threads"], seen["session"]["max_batch_size"]) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-anonymous"),
        (["--request-timeout", "0"], "request_timeout is 0"),
        (["--api-key-file", "no such file"], "cannot be read"),
        (["--allow-origin", "*"], "is no origin"),
        (["--path-prefix", "llm/"], "path_prefix"),
        (["--allow-host", "http://a.example"], "no host name"),
        (["--lora", "poet"], "--lora 'poet' must be NAME=DIR"),
        (["--alias", "claude-x"], "must be ALIAS=NAME, and the model's name is 'nothing'"),
        (["--alias", "claude-x=glm-9b"], "must be ALIAS=NAME, and the model's name is 'nothing'"),
        (["--alias", "=nothing"], "must be ALIAS=NAME"),
        (["--alias", "x=nothing", "--alias", "x=nothing"], "has already"),
        ([], "not a bundle"),
    ],
)
def test_serve_refuses_in_one_line(run, tmp_path, arguments, words):
    code, out, err = run("serve", tmp_path / "nothing", "--port", 0, *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_replicas_without_ray_say_what_to_install(run, demo_bundle, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.ray_module.find_spec", lambda _: None)
    code, out, err = run("serve", demo_bundle, "--port", 0, "--replicas", 2)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(r"needs? Ray; run .*pip install .*\[ray\]", err)


def test_replicas_are_for_bundles_that_generate(run, demo_bundle, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.ray_module.find_spec", lambda _: True)
    encoder = replace(read_manifest(demo_bundle), task="encoder")
    monkeypatch.setattr("glm4_runtime.cluster.described.read_manifest", lambda _: encoder)
    code, _, err = run("serve", demo_bundle, "--port", 0, "--replicas", 2)
    assert (code, err.count("\n")) == (1, 1)
    assert "replicas need causal-lm" in err


@pytest.mark.parametrize("count", ["0", "3:2", "1:2:3", "many"])
def test_a_wrong_number_of_replicas_is_refused(run, demo_bundle, count):
    code, _, err = run("serve", demo_bundle, "--replicas", count)
    assert code == 2
    assert f"--replicas is {count}; give a number such as 4" in err


@pytest.mark.parametrize(
    ("option", "value"), [("--ray-address", "auto"), ("--step-timeout", 9), ("--shrink-after", 5)]
)
def test_options_of_replicas_need_replicas(run, demo_bundle, option, value):
    code, _, err = run("serve", demo_bundle, option, value)
    assert code == 2
    assert f"{option} goes with --replicas" in err


@pytest.mark.parametrize("command", [("serve",), ("generate", "Hi"), ("chat",)])
def test_stages_on_ray_need_stages_and_an_address_needs_ray(run, demo_bundle, command):
    name, *prompt = command
    code, _, err = run(name, demo_bundle, *prompt, "--ray-address", "auto")
    assert code == 2
    assert re.search(r"--ray-address goes with (--replicas or with )?--stages-on ray", err)
    code, _, err = run(name, demo_bundle, *prompt, "--stages-on", "ray")
    assert (code, err.count("\n")) == (1, 1)
    assert "has no stages to run on Ray; export it with --stages 2" in err


def test_stages_on_ray_without_ray_say_what_to_install(run, demo_staged, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.ray_module.find_spec", lambda _: None)
    code, out, err = run("generate", demo_staged, "Hi", "--stages-on", "ray")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(r"--stages-on ray need Ray; run .*pip install .*\[ray\]", err)


def test_serve_passes_the_options_of_replicas_on(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("glm4_runtime.cluster.serve.serve_replicas", lambda *given: seen.append(given))
    (tmp_path / "manifest.json").touch()
    more = [
        "--replicas",
        "1:3",
        "--ray-address",
        "auto",
        "--step-timeout",
        9,
        "--threads",
        2,
        "--max-queue",
        5,
    ]
    more += ["--shrink-after", 7]
    assert run("serve", tmp_path, *more)[0] == 0
    ((bundle, options, cluster),) = seen
    assert (bundle, options.max_queue) == (tmp_path, 5)
    assert cluster.replicas == ReplicaCount(1, 3, shrink_after=7)
    assert (cluster.address, cluster.step_timeout) == ("auto", 9)
    assert cluster.session["threads"] == 2


def test_a_fixed_number_of_replicas_never_shrinks(run, demo_bundle):
    code, _, err = run("serve", demo_bundle, "--replicas", 2, "--shrink-after", 7)
    assert code == 2
    assert "--shrink-after goes with a range such as --replicas 1:8, not 2" in err


def test_serve_refuses_a_bundle_without_a_tokenizer(run, tiny_bundles):
    code, _, err = run("serve", tiny_bundles["ort"], "--port", 0)
    assert code == 1
    assert "no tokenizer.json" in err


@pytest.mark.parametrize(
    ("command", "module", "extra"), [("serve", "fastapi", "serve"), ("bench-serve", "httpx", "bench")]
)
def test_what_is_not_installed_is_named(run, monkeypatch, command, module, extra):
    for name in list(sys.modules):
        if name.startswith(("glm4_runtime.server", "glm4_deploy.load", f"{module}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(command, "x")
    assert code == 1
    assert f"needs {module}" in err
    assert re.search(rf"pip install .*\[{extra}", err)


def test_chat_answers_line_by_line(run, demo_bundle, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Who are you?\n\nWhat is your name?\n/new\nHello\n/exit\nnever\n")
    )
    code, out, err = run("chat", demo_bundle, "--max-tokens", 60)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
    assert len(lines) == 3
    assert lines[2].startswith("Hello!")


def test_chat_answers_commands_that_it_does_not_know(run, demo_bundle, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/quit\n/etc/hosts is a file\n /new\n"))
    code, out, err = run("chat", demo_bundle, "--max-tokens", 4)
    assert code == 0
    assert err.startswith("/new starts over, /help shows this line, /exit or Ctrl-D ends.")
    assert "there is no command /quit; there are /new, /help and /exit" in err
    assert err.count("there is no command") == 1
    assert len(out.splitlines()) >= 2  # the path and the word with a space in front are messages


def test_chat_takes_pasted_lines_as_one_message(demo_bundle):
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "glm4_deploy", "chat", str(demo_bundle), "--max-tokens", "5"]
    environment = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = _shown_until(ours, b"\x1b[?2004h")  # bracketed paste is on: the prompt is ready
        os.write(ours, b"\x1b[200~first line\rsecond line\x1b[201~\r/exit\r")
        shown += _shown_until(ours, None)
        assert process.wait(60) == 0
    os.close(ours)
    assert shown.count(b"first after") == 1  # the figures of one answer


def _shown_until(terminal, mark):
    """What a terminal shows until ``mark``, or until its program has ended."""
    shown = b""
    while (mark is None or mark not in shown) and select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the program closed its end
            break
    return shown


def test_chat_goes_on_after_a_refusal(run, demo_bundle, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'word ' * 3000}\nHello\n"))
    code, out, err = run("chat", demo_bundle)
    assert code == 0
    assert "leaves none to generate" in err
    assert out.startswith("Hello!")


def test_bench_serve_measures_closed_loops(run, url, tmp_path):
    arguments = [
        "--clients",
        "1,3",
        "--requests",
        6,
        "--max-tokens",
        8,
        "--prompt-words",
        20,
        "--shared-words",
        15,
    ]
    files = {name: tmp_path / name for name in ("figures.json", "plot.svg")}
    code, out, _ = run(
        "bench-serve",
        url,
        *arguments,
        "--output",
        files["figures.json"],
        "--plot",
        files["plot.svg"],
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert report == json.loads(files["figures.json"].read_text())
    assert "<svg" in files["plot.svg"].read_text()
    assert [run["clients"] for run in report["runs"]] == [1, 3]
    for load in report["runs"]:
        assert (load["loop"], load["requests"], load["failed"]) == ("closed", 6, 0)
        assert load["generated_tokens"] == 48
        assert load["cached_tokens"] > 0
        assert load["tokens_per_second"] == pytest.approx(48 / load["seconds"], rel=0.05)
        first, whole = load["first_token_seconds"], load["request_seconds"]
        assert 0 < first["p50"] <= first["p99"] <= first["max"] <= whole["max"] <= load["seconds"]
        assert load["per_token_seconds"]["mean"] > 0


def test_bench_serve_measures_open_loops(run, url):
    code, out, _ = run(
        "bench-serve", url, "--rate", "40", "--requests", 8, "--max-tokens", 4, "--prompt-words", 5
    )
    assert code == 0
    assert out.startswith("40 requests/s\n")
    assert "8, 0 failed" in out
    (load,) = measure_load(url, [Load(rate=20.0, requests=10, warmup=0, prompt_words=5, max_tokens=2)])[
        "runs"
    ]
    assert (load["loop"], load["rate"], load["clients"]) == ("open", 20.0, None)
    assert (
        load["seconds"] > 0.1
    )  # ten arrivals at that rate take about half a second, however fast the answers


def test_failed_requests_fail_the_command(run, demo_bundle):
    with serving(Session.open(demo_bundle), ServerOptions(port=0, max_prompt_tokens=5)) as server:
        code, out, err = run("bench-serve", server.url, "--clients", "1", "--requests", 2)
    assert code == 1
    assert "2, 2 failed" in out
    assert "this server takes 5" in out
    assert "some requests failed" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--clients", "0"], 2, "above 0"),
        (["--clients", ""], 2, "not a list of numbers"),
        (["--rate", "fast"], 2, "not a list of numbers"),
        (["--clients", "1", "--rate", "2"], 2, "exclude each other"),
        (["--prompt-words", "5", "--shared-words", "5"], 1, "must be below"),
        ([], 1, "does not list its models"),
    ],
)
def test_bench_serve_refuses(run, arguments, code, words):
    found, _, err = run("bench-serve", "http://127.0.0.1:9", *arguments)
    assert found == code
    assert words in err


def test_a_load_is_closed_or_open():
    for wrong in ({}, {"clients": 1, "rate": 1.0}):
        with pytest.raises(RequestError, match="either"):
            Load(**wrong)


def test_percentiles_are_those_of_the_nearest_rank():
    found = spread([float(value) for value in range(1, 101)][::-1])
    assert found == {"mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert spread([2.0]) == dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), 2.0)
    assert spread([]) is None


def test_a_summary_counts_what_succeeded():
    good = Sample(sent=1.0, arrivals=[1.5, 1.6, 1.9], end=2.0, prompt_tokens=7, cached_tokens=2, tokens=5)
    failed = Sample(sent=1.0, end=1.1, error="429: full")
    silent = Sample(sent=1.0, end=1.1)
    found = summary(Load(clients=2), [good, failed, silent], 4.0)
    assert (found["requests"], found["failed"], found["errors"]) == (3, 2, ["429: full", "no text came"])
    assert (found["generated_tokens"], found["prompt_tokens"], found["cached_tokens"]) == (5, 7, 2)
    assert (found["tokens_per_second"], found["requests_per_second"]) == (1.25, 0.25)
    assert found["first_token_seconds"]["max"] == 0.5
    assert found["inter_token_seconds"]["mean"] == pytest.approx(0.2)
    assert found["per_token_seconds"]["mean"] == pytest.approx(0.1)
    assert found["request_seconds"]["max"] == 1.0


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    report = {"model": "x", "runs": [summary(Load(clients=1), [Sample(0.0, [1.0, 2.0], 3.0, 1, 0, 2)], 3.0)]}
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "plot.nothing", tmp_path / "missing" / "plot.svg"):
        with pytest.raises(RequestError, match="cannot be written"):
            plot(report, wrong)
