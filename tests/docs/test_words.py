"""Patterns that make English hard to read have no place in what people read first. CONTRIBUTING.md says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, identify, prose, read

TEXTS = [*PAGES, *sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())]
_START = r"(?:^|(?<=[.!?:] ))"  # of a sentence
BANNED = {  # pattern -> what to write instead
    r"\bbut by\b": "except by",
    r"\bbut for\b": "except for, apart from",
    r"\bon (?:its|their|the) way\b": "while",
    r"\bat the door\b": "at the beginning, where it is called",
    r"\bfray(?:s|ed|ing)?\b": "say what becomes worse",
    r"\bwears?\b|\bwore\b|\bworn\b": "say what becomes worse",
    r"\bis nothing\b": "does not matter, is zero, has no effect",
    r"\bwhat is made of\b": "say what becomes of it",
    r"\bwhere (?:there|it|that|they|this|none|no|nothing|one|only|what|the \w+ (?:is|are|has|have|does|do))\b": "if",
    rf"{_START}Where [^.?!]*, ": "if",
    rf"{_START}What [^.?!]*\b(?:is|are|was|were|has|does|cannot|can)\b[^?!]*?[.:](?: |$)": "name the thing",
    r"[^.!?]*;[^.!?]*;[^.!?]*;": "three sentences",
}


def faults(text: str) -> list[str]:
    """Every place of `text` that one of the patterns fits."""
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*#]|\d+\. ))|\|", text)  # paragraphs, items, cells
    sentences = [" ".join(piece.split()) for piece in pieces]
    return [
        f"{found[0].strip()!r}: rather {better!r}"
        for pattern, better in BANNED.items()
        for sentence in sentences
        for found in re.finditer(
            pattern, sentence, re.IGNORECASE if "[A-Z]" not in pattern and _START not in pattern else 0
        )
    ]


@pytest.mark.parametrize("path", TEXTS, ids=identify)
def test_no_banned_pattern_is_used(path: Path) -> None:
    text = read(path)
    assert faults(prose(text) if path.suffix == ".md" else text) == []


@pytest.mark.parametrize(
    "text",
    [
        "Nothing is written over, but by `demo`.", "All of it but for the norms.", "It frays at the edges.",
        "It wears away.",
        "The order is nothing.", "An error where it would do nothing.", "Where a picture is small, it is kept.",
        "What cannot fit is refused.", "It reads.\nWhat is wrong is one line.", "One; two; three; four.",
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_are_for(text: str) -> None:
    assert faults(text)


def test_plain_sentences_pass() -> None:
    plain = "What fits which Mac? See [where a model can be]. It writes the file where you want it; give a path."
    assert faults(plain) == []
