"""glm4-deploy cache, and --cache of generate and chat."""

import json

import pytest
from click.testing import CliRunner

from glm4_deploy.cli import cli, main
from glm4_deploy.prefix_cache import ByteCount

TEXT = " ".join(f"The {n}th cat sat on a mat." for n in range(40))


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def generated(bundle, *options):
    report = json.loads(
        run("generate", bundle, TEXT, "--max-tokens", 8, "--temperature", 0, "--json", *options)
    )
    return report["token_ids"], report["prompt_tokens"]


def test_generate_fills_the_cache_and_cache_lists_and_clears_it(demo_cpu, tmp_path):
    folder = tmp_path / "prefixes"
    cold, tokens = generated(demo_cpu)
    for _ in range(2):
        assert generated(demo_cpu, "--cache", folder)[0] == cold
    (entry,) = json.loads(run("cache", folder, "--json"))["entries"]
    assert (entry["bundle"], entry["tokens"], entry["adapter"]) == (demo_cpu.name, tokens // 64 * 64, "")
    files = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert entry["bytes"] == files
    lines = run("cache", folder).splitlines()
    assert len(lines) == 2
    assert f"{entry['tokens']} tokens  {demo_cpu.name}, used " in lines[0]
    assert run("cache", folder, "--clear").startswith("removed ")
    assert not list(folder.iterdir())
    assert json.loads(run("cache", folder, "--json")) == {"entries": []}


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["cache", str(tmp_path / "none")])
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("20G", 20 * 10**9), ("512Mi", 2**29), ("1.5GB", 15 * 10**8), ("2gib", 2**31), ("1000000", 10**6)],
)
def test_sizes_have_units(text, size):
    assert ByteCount().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "20X", "1e9", "nan", "999", "9" * 30 + "T"])
def test_other_sizes_are_refused(text, demo_cpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", str(demo_cpu), "a", "--cache", str(tmp_path), f"--cache-bytes={text}"])
    assert end.value.code == 2
    assert "--cache-bytes" in capsys.readouterr().err
