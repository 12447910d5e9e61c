"""Patterns that make English hard to read have no place in pages, help, messages and code. See CONTRIBUTING.md."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.messages import FILES, sentences
from support.pages import PAGES, ROOT, identify, prose, read
from support.sources import nodes

from zimage_cli.commands import root_parser

TEXTS = [*PAGES, *sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())]
_START = r"(?:^|(?<=[.!?:] ))"  # of a sentence
ROOT_PARSER = root_parser()
BANNED = {  # pattern -> what to write instead
    r"\bbut by\b": "except by",
    r"\bbut for\b": "except for, apart from",
    r"\bon (?:its|their|the) way\b": "while",
    r"\bat the door\b": "at the beginning, where it is called",
    r"\bfray(?:s|ed|ing)?\b": "say what becomes worse",
    r"\bwears?\b|\bwore\b|\bworn\b": "say what becomes worse",
    r"\bis nothing\b": "does not matter, is zero, has no effect",
    r"\bof which\b": "another sentence",
    r"\bas of\b": "as in, see",
    r"\bso much as\b": "even",
    r"\b(?-i:none) is\b": "0 means no ...",
    r"\bmade of \w+ that\b": "say what becomes of it",
    r"\b(?:that|those) of [^.;:]*\b(?:that|those) of\b": "repeat the noun",
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


def notes(source: str) -> Iterator[str]:
    """The comments of a file, those of lines in a row as one text, and its docstrings."""
    lines: list[str] = []
    below = 0  # the line in which a comment would go on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            if not alone or token.start[0] != below:
                yield " ".join(lines)
                lines = []
            lines.append(token.string.lstrip("#: "))
            below = token.start[0] + 1 if alone else 0
    yield " ".join(lines)
    for node in nodes(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", TEXTS, ids=identify)
def test_no_banned_pattern_is_used(path: Path) -> None:
    text = read(path)
    assert faults(prose(text) if path.suffix == ".md" else text) == []


def test_the_program_says_no_banned_pattern() -> None:
    """In messages and in all else that it prints."""
    found = [
        f"{identify(path)}, line {line}: {fault}"
        for path in FILES
        for line, text in sentences(read(path))
        for fault in faults(text)
    ]
    assert found == []


@pytest.mark.parametrize("command", ROOT_PARSER.commands)
def test_help_has_no_banned_pattern(command: str) -> None:
    parser = ROOT_PARSER.commands[command]
    texts = [parser.description or "", parser.notes, *(what for what, _ in parser.examples)]
    assert [fault for text in texts for fault in faults(text)] == []
    for info in map(parser.info, parser.arguments):
        assert faults(info.meaning) == [], info.flag
        assert re.fullmatch(r"([A-Z0-9]|lean |tokenizer|- ).*\.", info.help, re.DOTALL), info.flag  # sentences


def test_texts_are_found_in_source() -> None:
    source = '''
"""A docstring of the module."""
NOTE = """two words"""
def f(path, fact):
    """Another docstring."""
    raise ConfigError(f"{path}: what {fact} is" + " not", 3)
x = option(3, "a help text", help={"one": "of a table"}, style="<p>no sentence</p>")
'''
    found = [text for _, text in sentences(source)]
    assert sorted(found) == ["X: what X isX not", "a help text", "of a table", "two words"]


def test_comments_and_docstrings_have_no_banned_pattern() -> None:
    found = [f"{identify(path)}: {fault}" for path in FILES for text in notes(read(path)) for fault in faults(text)]
    assert found == []


def test_comments_and_docstrings_are_found() -> None:
    source = (
        '"""It wears."""\n# one\n# two\nx = 1  # three\ny = 2  # four\n'
        'def f():\n    """It frays."""\n    return "no note"\n'
    )
    assert [text for text in notes(source) if text] == [
        "one two", "three", "four", "It wears.", "It frays.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "Nothing is written over, but by `demo`.", "All of it but for the norms.", "It frays at the edges.",
        "It wears away.",
        "The order is nothing.", "An error where it would do nothing.", "Where a picture is small, it is kept.",
        "What cannot fit is refused.", "It reads.\nWhat is wrong is one line.", "One; two; three; four.",
        "A file of which a part is read.", "Bytes as of the table.", "Not so much as a line.", "0 is none, none is 0.",
        "It is made of parts that fit.", "Its name, that of the file, those of parts.",
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_are_for(text: str) -> None:
    assert faults(text)


def test_plain_sentences_pass() -> None:
    plain = "What fits which Mac? See [where a model can be]. It writes the file where you want it; give a path."
    assert faults(plain) == []
