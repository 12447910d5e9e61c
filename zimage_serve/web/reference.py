"""The page of all interfaces, from the OpenAPI description. It needs no script and no network."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from zimage_ref.formats.json_file import JsonObject

STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, dt { font-family: ui-monospace, monospace; }
section { border-top: 1px solid; padding-block: .5rem; }
h3 { overflow-wrap: anywhere; }
dd { margin: 0 0 .3rem 1.5rem; }
"""


def page(description: JsonObject) -> str:
    """An HTML page of `description`, an OpenAPI object."""
    info = description["info"]
    parts = [f"<h1>{_text(info['title'])} {_text(info['version'])}</h1>", "<p>All interfaces of this server. "
             'Programs read <a href="/openapi.json">/openapi.json</a>.</p>']  # fmt: skip
    groups: dict[str, list[str]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append("".join(_operation(path, method, operation)))
    for tag, operations in groups.items():
        parts.append(f"<h2>{_text(tag)}</h2>{''.join(operations)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{_text(info["title"])}</title><link rel="stylesheet" href="/docs/style.css"></head>'
        f"<body><main>{''.join(parts)}</main></body></html>"
    )


def _operation(path: str, method: str, operation: JsonObject) -> Iterator[str]:
    yield f"<section><h3><code>{_text(method.upper())} {_text(path)}</code></h3>"
    yield f"<p>{_text(operation.get('description', ''))}</p><dl>"
    for parameter in operation.get("parameters", []):
        yield _field(parameter["name"], f"in {parameter['in']}", parameter.get("description", ""))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        for name, schema in content["schema"].get("properties", {}).items():
            yield _field(name, f"{schema.get('type', '')} in {kind}", schema.get("description", ""))
    yield "</dl></section>"


def _field(name: str, kind: str, help: str) -> str:
    return f"<dt>{_text(name)}</dt><dd>{_text(kind)}. {_text(help)}</dd>"


def _text(text: object) -> str:
    return escape(str(text))
