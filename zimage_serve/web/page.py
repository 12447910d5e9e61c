"""The page for people: its files, which hold no data. They ask the server's own interface for everything."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import FileResponse, Response

_FOLDER = Path(__file__).parents[1] / "page"
_MEDIA = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
}  # fmt: skip
_HOME = "index.html"
# The path of each file. A request is looked up here, so it cannot reach another file
PATHS = {"/": _FOLDER / _HOME} | {
    f"/page/{path.name}": path for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA and path.name != _HOME
}


def answer(path: str) -> Response:
    """The file at `path`, one of PATHS. A browser asks each time whether it has changed."""
    file = PATHS[path]
    return FileResponse(file, media_type=_MEDIA[file.suffix], headers={"cache-control": "no-cache"})
