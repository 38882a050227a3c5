"""The documents name files, links and commands that exist."""

import functools
import re
from pathlib import Path

import pytest

from glm4_deploy.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Documents name a file by its whole path, or by the end of the path where the text says the folder.
FOLDERS = ("", "benchmarks", "demo", "docs", "exporters", "glm4_deploy", "plugins", "runtime", "tests")
FILE = re.compile(
    r"[\w.-]+\.(?:py|md|cpp|h|sh)|(?:\.\./|[a-z][\w.-]*/)[\w./-]*\w\.(?:py|md|toml|json|jsonl|svg|txt)"
)
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
