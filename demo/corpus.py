"""Make the demo checkpoint's training, held-out and calibration text from books that Debian packages ship.

    apt-get install bible-kjv golang-github-jdkato-prose-dev \\
        golang-github-colinmarc-hdfs-dev liblingua-stem-perl
    bible -f gen1:1-rev22:21 > kjv.txt
    python demo/corpus.py kjv.txt train.txt heldout.txt calibration.jsonl

All four are in the public domain; what editors and distributors put around them is removed. A document
(a chapter, a tale) ends with a form feed on a line of its own, a paragraph is one line.
"""

import argparse
import json
import re
from itertools import groupby
from pathlib import Path

GO = Path("/usr/share/gocode/src/github.com")
SHERLOCK = GO / "jdkato/prose/testdata/sherlock.txt"
MOBY_DICK = GO / "colinmarc/hdfs/testdata/mobydick.txt"
POE = Path("/usr/share/doc/liblingua-stem-perl/examples/collected_works_poe.txt")

# Whole documents by how they begin, one kind of prose each; no other part of the pipeline sees them.
HELD_OUT = (
    "XII. THE ADVENTURE OF THE COPPER BEECHES",
    "CHAPTER 1. Loomings.",
    "Now it came to pass in the days when the judges ruled",  # Ruth 1
    "And Naomi had a kinsman",
    "Then Naomi her mother in law",
    "Then went Boaz up to the gate",
    "Now the word of the LORD came unto Jonah",  # Jonah 1
    "Then Jonah prayed",
    "And the word of the LORD came unto Jonah",
    "But it displeased Jonah",
)
DOCUMENT_END = "\n\f\n"
CALIBRATION = 64, 1500  # documents of the training text, evenly spaced, and characters of each
# What editors and distributors added; and a word that a demo should not repeat.
UNWANTED = re.compile(r"end of text|gutenberg|e-?text|redactor|^produced by|\bnigger", re.IGNORECASE)


def paragraphs_of(text: str) -> list[str]:
    """Unwrapped paragraphs, without italics' underscores, note marks and stray control characters."""
    text = re.sub(r"_|\{\*?\d+\}|[\x7f-\x9f\xad]", "", text)
    joined = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in joined if re.search(r"[A-Za-z]{2}", block) and not UNWANTED.search(block)]


def documents_of(text: str, border: str) -> list[str]:
    """The parts that begin at matches of ``border``, as long as they are worth reading."""
    parts = re.split(f"(?m)^(?={border})", text)
    documents = ("\n\n".join(paragraphs_of(part)) for part in parts)
    return [document for document in documents if len(document) >= 400]


def book(path: Path) -> str:
    """The text between a Project Gutenberg file's start and end marks."""
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    return text.split("*** START OF", 1)[1].split("***", 1)[1].split("*** END OF")[0].split("\nEnd of ")[0]


def sherlock() -> list[str]:
    return documents_of(book(SHERLOCK), r"(?:ADVENTURE )?[IVX]+\. [A-Z' -]{8,}$")[1:]  # first: contents


def moby_dick() -> list[str]:
    return documents_of(book(MOBY_DICK), r"CHAPTER \d+\. |Epilogue")[1:]  # first: title, etymology


def poe() -> list[str]:
    text = POE.read_text(encoding="latin-1").replace("\r\n", "\n")
    volumes = re.findall(r"\*END\*THE SMALL PRINT.*?\n(.*?)\nEnd of The Project Gutenberg", text, re.DOTALL)
    # Titles stand in capitals between blank lines; tales end with lines of ~ and =.
    border = r"~~~.*\n\s*=+|\[Redactor|CHAPTER |Contents|[ \t]*[A-Z][A-Z' .-]{8,}\n\s*\n"
    tales = (tale for volume in volumes for tale in documents_of(volume, border))
    return [tale for tale in tales if not re.match(r"[\[{]|Contents|VOLUME|N(OTES|otes)", tale)]


def king_james(path: Path) -> list[str]:
    """One document per chapter, from lines such as ``Ge1:1 In the beginning ...``."""
    verses = [line.split(" ", 1) for line in path.read_text().splitlines() if line]
    chapters = groupby(verses, key=lambda verse: verse[0].split(":")[0])
    return ["\n".join(" ".join(text.split()) for _, text in chapter) for _, chapter in chapters]


def excerpts(documents: list[str]) -> list[str]:
    """Beginnings of training documents that are long enough, cut after a word."""
    count, length = CALIBRATION
    long = [document for document in documents if len(document) > length]
    chosen = (long[(2 * i + 1) * len(long) // (2 * count)] for i in range(count))
    return [document[:length].rsplit(" ", 1)[0] for document in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's training and held-out text.")
    parser.add_argument("kjv", type=Path, help="output of: bible -f gen1:1-rev22:21")
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("calibration", type=Path, help="a document per line, as JSON")
    arguments = parser.parse_args()
    sources = {
        "sherlock": sherlock(),
        "moby dick": moby_dick(),
        "poe": poe(),
        "king james": king_james(arguments.kjv),
    }
    for name, documents in sources.items():
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")
    documents = [document for source in sources.values() for document in source]
    held_out = [d for d in documents if d.startswith(HELD_OUT)]
    if len(held_out) < len(HELD_OUT):
        raise SystemExit(f"{len(held_out)} held-out documents found, {len(HELD_OUT)} wanted")
    kept = [d for d in documents if not d.startswith(HELD_OUT)]
    arguments.train.write_text(DOCUMENT_END.join(kept) + "\n", encoding="utf-8")
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in excerpts(kept))
    arguments.calibration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments.heldout.write_text(DOCUMENT_END.join(held_out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
