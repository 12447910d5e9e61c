"""Each message that the program prints is found in docs/troubleshooting.md by its words."""

from __future__ import annotations

from support.messages import FILES, messages, plain
from support.pages import ROOT, identify, read

PAGE = ROOT / "docs" / "troubleshooting.md"


def test_every_message_is_on_the_page() -> None:
    page = plain(read(PAGE))
    missing = [
        f"{identify(path)}, line {line}: {text}"
        for path in FILES
        for line, text in messages(read(path))
        if text not in page
    ]
    assert missing == []


def test_messages_are_found_in_source() -> None:
    source = (
        'raise ConfigError(f"{path}: `init_image` is far too small: {fact}")\nnote("a short one" + f"{x} and more")'
    )
    assert [text for _, text in messages(source)] == ["--init-image is far too small", "a short one"]
