"""Links between pages lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, anchors, identify, links, read


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_link_to_a_file_or_a_heading_leads_there(page: Path) -> None:
    broken = []
    for link in links(read(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(read(target))):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    reached = {(index.parent / link.partition("#")[0]).resolve() for link in links(read(index))}
    missing = {page for page in PAGES if page.parent != ROOT} - reached - {index}
    assert sorted(map(identify, missing)) == []


def test_the_check_finds_what_it_is_for() -> None:
    text = "# A heading, with `code`\n\n[one](a.md#b) ![two](c.png)\n\n```\n[three](d.md)\n# no heading\n```\n"
    assert links(text) == ["a.md#b", "c.png"]
    assert list(anchors(text)) == ["a-heading-with-code"]
