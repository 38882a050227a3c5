"""Standard streams that are closed or full, and text in the encodings of this model's users."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cpu_operators import CAN_BE_BUILT

from glm4_deploy import streams
from glm4_deploy.cli import COMMANDS
from glm4_runtime.bundle.ascii_path import ascii_path

ROOT = Path(__file__).parents[2]
GREETING = "你好，世界吗"
# What each command prints without a model, or how it refuses where it prints nothing.
PRINTS = [["--help"], ["--version"], ["doctor"], ["inspect", "demo/glm4-tiny"], ["inspect", "demo/glm4-tiny", "--json"],
          ["export", "demo/glm4-tiny", "--print-key"], *([name, "--help"] for name in COMMANDS)]  # fmt: skip
REFUSED = [["inspect", "nowhere"], ["export", "nowhere", "bundle"], ["generate", "nowhere", "x"], ["chat", "nowhere"],
           ["serve", "nowhere"], ["bench", "nowhere"]]  # fmt: skip


def shell(arguments, redirection, **environment):
    words = " ".join([sys.executable, "-m", "glm4_deploy", *arguments, redirection])
    return subprocess.Popen(
        ["sh", "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip


def ended(*processes):
    """Exit code, output and messages of each."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        results.append((process.returncode, out, err))
    return results


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
def test_a_result_that_cannot_be_written_is_one_line(redirection, reason):
    line = f"glm4-deploy: standard output cannot be written: {reason}; give it a file with room\n"
    processes = [shell(each, redirection, PYTHONUNBUFFERED="1") for each in PRINTS]
    processes += [shell(each, redirection, PYTHONUNBUFFERED="") for each in PRINTS[:5]]
    for each in ended(*processes):
        assert each == (1, "", line)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_message_that_cannot_be_written_changes_no_exit_code(redirection):
    cases = [*((each, 0) for each in PRINTS[:5]), *((each, 1) for each in REFUSED), (["x"], 2)]
    results = ended(*(shell(arguments, redirection) for arguments, _ in cases))
    for (_, expected), (code, out, err) in zip(cases, results, strict=True):
        assert (code, bool(out), err) == (expected, expected == 0, "")


def test_a_refusal_keeps_its_code_and_line_without_an_output():
    for redirection in (">&-", ">/dev/full", ">&- <&-"):
        for code, _, err in ended(*(shell(each, redirection) for each in REFUSED)):
            assert code == 1
            assert err.startswith("glm4-deploy: ")
            assert err.count("\n") == 1
            assert "nowhere" in err


def test_nothing_is_written_into_a_file_that_took_the_place_of_a_closed_stream(tmp_path):
    """The next file that a process opens gets the number of a closed stream."""
    (tmp_path / "program.py").write_text("""
import sys
from glm4_deploy import cli, streams
streams.prepare_streams()
with open(sys.argv[1], "wb") as file:
    assert file.fileno() > 2
    print("a message", file=sys.stderr)
    try:
        print("for the output", flush=True)
    except streams.OutputError:
        streams.discard_output()
""")
    command = f"{sys.executable} {tmp_path / 'program.py'} {tmp_path / 'data'} >&- 2>&- <&-"
    subprocess.run(["sh", "-c", command], check=True, cwd=ROOT)
    assert (tmp_path / "data").read_bytes() == b""


def test_no_standard_input_is_an_empty_one(demo_quantized):
    bundle = str(demo_quantized["int8"])
    chat, generate = ended(shell(["chat", bundle], "<&-"), shell(["generate", bundle, "-"], "<&-"))
    assert chat == (0, "", "")
    assert (generate[0], generate[2]) == (0, "")  # what follows the tokens that every prompt begins with


# Encodings ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gb18030(tmp_path_factory):
    """The environment of a Chinese user whose locale is installed."""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/zh_CN").exists():
        pytest.skip("no localedef, or no sources of locales")
    folder = tmp_path_factory.mktemp("locales")
    subprocess.run(["localedef", "-i", "zh_CN", "-f", "GB18030", folder / "zh_CN.GB18030"], check=True)
    return {"LOCPATH": str(folder), "LANG": "zh_CN.GB18030"}


def run(environment, *arguments, stdin=b""):
    kept = {
        k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING")
    }
    command = [sys.executable, "-m", "glm4_deploy", *arguments]
    done = subprocess.run(command, env=kept | environment, input=stdin, capture_output=True, cwd=ROOT)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def answer(environment, bundle, *arguments, stdin=b""):
    done = run(environment, "generate", bundle, *arguments, "--json", "--max-tokens", "8", stdin=stdin)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["prompt_tokens"], result["token_ids"]


def test_chinese_prompts_in_every_locale(demo_quantized, gb18030):
    bundle = demo_quantized["int8"]
    expected = answer({"LANG": "C.UTF-8"}, bundle, GREETING.encode())
    gb = GREETING.encode("gb18030")
    for environment, raw in (
        (gb18030, gb),
        ({"LANG": "zh_CN.GB18030"}, gb),  # not installed, as in a small container
        ({"LANG": "zh_CN.GB18030"}, GREETING.encode()),
        ({"LC_ALL": "POSIX"}, GREETING.encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, GREETING.encode()),
        ({"PYTHONIOENCODING": "ascii"}, GREETING.encode()),
    ):
        assert answer(environment, bundle, raw) == expected
        assert answer(environment, bundle, "-", stdin=raw) == expected


EXPORTED = """
import sys
from pathlib import Path
from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime import SamplingParams, Session

assert sys.getfilesystemencoding() == "gb18030"
folder = Path(sys.argv[1])
for target in sys.argv[2:]:
    export(folder / "检查点", folder / "包" / target, ExportOptions(target=target))
    if not target.startswith("tensorrt"):
        with Session.open(folder / "包" / target, verify=True) as session:
            ids = session.tokenizer.encode("你好")
            assert len(list(session.generate(ids, SamplingParams(max_tokens=4, ignore_eos=True)))) == 4
"""


def test_folders_with_chinese_names_where_names_are_not_utf8(tmp_path, gb18030):
    """On disk the names are bytes in GB18030. Libraries in C++ and Rust would look for names in UTF-8."""
    targets = ["ort", *["cpu"] * CAN_BE_BUILT, *["tensorrt-rtx"] * (find_spec("tensorrt_rtx") is not None)]
    folder = bytes(tmp_path) + "/模型".encode("gb18030")
    Path(os.fsdecode(folder)).mkdir()
    shutil.copytree(bytes(ROOT / "demo" / "glm4-tiny"), folder + "/检查点".encode("gb18030"))
    kept = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LC_CTYPE")}
    command = [sys.executable, "-c", EXPORTED.encode("gb18030"), folder, *targets]
    done = subprocess.run(command, env=kept | gb18030, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode("gb18030", "replace")
    made = Path(os.fsdecode(folder + "/包".encode("gb18030"))).iterdir()
    assert sorted(path.name for path in made) == sorted(targets)


def test_a_folder_is_named_by_its_descriptor_only_where_names_differ(tmp_path, monkeypatch):
    file = tmp_path / "你好" / "model.onnx"
    file.parent.mkdir()
    file.write_text("graph")
    with ascii_path(file) as path:
        assert path == str(file)
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("gb18030"))
    with ascii_path(file) as path:
        assert path.isascii()
        assert Path(path).read_text() == "graph"
    assert not Path(path).exists()


def test_bytes_that_are_no_text_are_refused_in_one_line(demo_quantized):
    bundle, raw = demo_quantized["int8"], b"\xff\xfe half"
    for done, code in (
        (run({"LANG": "C.UTF-8"}, "generate", bundle, raw), 2),
        (run({"LANG": "C.UTF-8"}, "generate", bundle, "x", "--stop", raw), 2),
        (run({"LANG": "C.UTF-8"}, "generate", bundle, "-", stdin=raw), 1),
        (run({"PYTHONIOENCODING": "ascii"}, "generate", bundle, "-", stdin=raw), 1),
    ):
        assert done.returncode == code
        assert b"is not text in utf-8" in done.stderr
    chat = run({"LANG": "C.UTF-8"}, "chat", bundle, "--max-tokens", "4", stdin=raw + b"\nHello\n")
    assert chat.returncode == 0  # it goes on with the next line
    assert b"the line is not text" in chat.stderr
    assert chat.stdout.startswith(b"Hello")


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path, gb18030):
    folder = tmp_path / GREETING
    folder.mkdir()
    for encoding, environment in (("ascii", {"PYTHONIOENCODING": "ascii"}), ("utf-8", {"LC_ALL": "POSIX"})):
        done = run(environment, "inspect", bytes(folder))
        shown = GREETING.encode(encoding, "backslashreplace")
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1
        assert shown in done.stderr
    (tmp_path.joinpath(os.fsdecode(b"\xff"))).mkdir()
    for environment in (gb18030, {"LANG": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"}):
        done = run(environment, "inspect", bytes(tmp_path) + b"/\xff")
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)


def test_json_is_json_in_every_encoding(tmp_path, gb18030):
    """The labels of a classifier may be in any language; an escape of one half of a pair is JSON, too."""
    program = "from glm4_deploy import show, streams; streams.prepare_streams(); show.print_json('\\u4f60\\U00020bb7\\ud800')"
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LANG": "C.UTF-8"}, gb18030, {"LC_ALL": "POSIX"}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            check=True,
            cwd=ROOT,
        )
        assert json.loads(done.stdout) == "你𠮷\ud800"


def test_text_from_bytes(monkeypatch):
    monkeypatch.setenv("LC_ALL", "")
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")
    monkeypatch.setenv("LANG", "zh_CN.GB18030@stroke")
    for text in ("", "plain", GREETING, "𠮷"):
        assert streams.text(text) == text
        assert streams.text(text.encode("gb18030").decode("ascii", "surrogateescape"), "ascii") == text
    for lost in ("\ud83d", "\udcff\ud83d"):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            streams.text(lost, "utf-8")
    monkeypatch.setenv("LANG", "nonsense.NO-SUCH-CODE")
    with pytest.raises(ValueError, match=r"is not text in utf-8$"):
        streams.text("\udcff")
