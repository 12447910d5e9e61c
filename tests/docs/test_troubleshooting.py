"""Each message that the program prints is found in docs/troubleshooting.md by its words."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.messages import FILES, messages, plain
from support.pages import ROOT, identify, read

PAGE = ROOT / "docs" / "troubleshooting.md"


@pytest.fixture(scope="module")
def page() -> str:
    return plain(read(PAGE))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_every_message_is_on_the_page(path: Path, page: str) -> None:
    missing = [f"line {line}: {text}" for line, text in messages(read(path)) if text not in page]
    assert missing == []


def test_messages_are_found_in_source() -> None:
    source = (
        'raise ConfigError(f"{path}: `init_image` is far too small: {fact}")\nnote("a short one" + f"{x} and more")'
    )
    assert [text for _, text in messages(source)] == ["--init-image is far too small", "a short one"]
