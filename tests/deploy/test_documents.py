"""The documents name files, links and commands that exist."""

import functools
import re
from pathlib import Path

import click
import pytest

from glm4_deploy.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Documents name a file by its whole path, or by the end of the path where the text says the folder.
FOLDERS = (
    "",
    "benchmarks",
    "demo",
    "deploy",
    "docs",
    "exporters",
    "glm4_deploy",
    "plugins",
    "runtime",
    "tests",
)
FILE = re.compile(
    r"[\w.-]+\.(?:py|md|cpp|h|sh)|(?:\.\./|[a-z][\w.-]*/)[\w./-]*\w\.(?:py|md|toml|json|jsonl|svg|txt)"
)
NO_FOLDERS = re.compile(r"(bundle|out)/.*")  # names that a user chooses
NO_FILES = re.compile(r"OUT\.md|llama\.cpp")  # a name that a user chooses, and a peer's


@functools.cache
def files() -> list[str]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).glob("**/*" if folder else "*"))
    return [f"/{path.relative_to(ROOT)}" for path in found]


def exists(name: str) -> bool:
    return any(path.endswith(f"/{name.removeprefix('../')}") for path in files())


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    code = re.findall(r"`([^`\n]+)`", document.read_text("utf-8"))
    named = {word for part in code for word in part.split() if FILE.fullmatch(word)}
    missing = {name for name in named if not NO_FILES.fullmatch(name) and not exists(name)}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), target


def test_the_documents_name_every_command_and_none_else():
    texts = "\n".join(path.read_text("utf-8") for path in DOCUMENTS if path.name != "CHANGELOG.md")
    named = re.findall(r"^    glm4-deploy ([a-z-]+)|`glm4-deploy ([a-z-]+)", texts, re.MULTILINE)
    assert {a or b for a, b in named} == COMMANDS.keys()


def test_options_beside_a_command_are_options_of_the_command():
    """In a line that runs a command, up to the comment; \\ continues a line."""
    context = click.Context(cli)
    known = {
        name: {
            option for p in cli.get_command(context, name).params for option in (*p.opts, *p.secondary_opts)
        }
        for name in COMMANDS
    }
    seen = 0
    for path in DOCUMENTS:
        text = path.read_text("utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line.startswith("    ")]
        for line in lines + re.findall(r"`([^`\n]+)`", text):
            run = re.match(r"\s*(?:\S*/)?glm4-deploy ([a-z-]+)([^#]*)", line)
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", run[2]) if run else ():
                assert option in known[run[1]] | {"--help"}, f"{path.name}: {run[0]}"
                seen += 1
    assert seen > 30


def test_make_has_every_named_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        named = set(re.findall(r"^    make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE))
        assert {a or b for a, b in named} <= targets, path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_folders_exist(document):
    code = re.findall(r"`([^`\n]+)`", document.read_text("utf-8"))
    named = {name for part in code for name in part.split() if re.fullmatch(r"[a-z][\w.]*(/[\w.]+)*/", name)}
    missing = {name for name in named if not any(f"/{name}" in file for file in files())}
    assert not {name for name in missing if not NO_FOLDERS.fullmatch(name)}


def test_symbols_that_the_guide_to_additions_names_are_in_the_files_beside_them():
    """Each row: files in the first column, names in the last; a name in capitals, or a class, is in one of them."""
    rows = re.findall(
        r"^\| (`.*?) \| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 25
    for files, example in rows:
        paths = [ROOT / name for name in re.findall(r"`([\w./]+)`", files)]
        sources = [p for path in paths for p in (path.rglob("*.py") if path.is_dir() else [path])]
        text = "\n".join(path.read_text("utf-8") for path in sources)
        for symbol in re.findall(r"`([A-Z_]{4,}|[A-Z][a-z]\w+)`", example):
            assert re.search(rf"\b{symbol}\b", text), f"{symbol} is not in {files}"
