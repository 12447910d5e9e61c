"""report.html: an overview of a run in one file that every browser opens."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from zimage_ref.errors import ZImageError
from zimage_ref.pictures.images import thumbnail

from .chart import Curve, Line, Point, chart
from .config import auto_options
from .metrics_lines import HeldOutLine, MetricsLine, PreviewLine, StepLine
from .preview_sheet import Row, preview_rows
from .run_folder import RunFolder

_THUMBNAIL = 192  # pixels
_RECENT = 50  # steps that speed is measured over
_CURVES = ("loss", "smoothed", "lr", "grad_norm")  # fields of a step that are drawn
_AGAIN = '<meta http-equiv=refresh content="30">'  # a browser reloads the page every 30 s during the run


class _Measured:
    """What the page shows of metrics. Its memory does not grow with the number of steps."""

    def __init__(self, lines: Iterable[MetricsLine]) -> None:
        self.last = self.peak_memory = self.skipped = 0
        self.recent: deque[StepLine] = deque(maxlen=_RECENT)
        self.held_out: list[HeldOutLine] = []
        self.previews: list[PreviewLine] = []
        self.curves = {name: Curve() for name in _CURVES}
        for line in lines:
            self.last = max(self.last, line["step"])
            if "loss" in line:
                self._add(line)
            elif "validation" in line:
                self.held_out.append(line)
            else:
                self.previews.append(line)

    def _add(self, line: StepLine) -> None:
        self.recent.append(line)
        self.peak_memory = max(self.peak_memory, line["peak_memory"])
        self.skipped += line["skipped"]
        for name, value in zip(_CURVES, (line["loss"], line["smoothed"], line["lr"], line["grad_norm"]), strict=True):
            if value is not None:
                self.curves[name].add(line["step"], value)

    @property
    def levels(self) -> list[str]:
        """The noise levels of the held-out loss."""
        return list(self.held_out[0]["validation"]) if self.held_out else []

    def held_out_at(self, level: str) -> list[Point]:
        """Steps, and the finite held-out losses of a noise level at them."""
        losses = ((line["step"], line["validation"].get(level)) for line in self.held_out)
        return [(step, loss) for step, loss in losses if loss is not None]


def page(
    run: RunFolder, lines: Iterable[MetricsLine], config: Mapping[str, object], environment: Mapping[str, str]
) -> str:
    """The whole page of a run with `lines` of metrics."""
    measured = _Measured(lines)
    ended = bool(measured.recent) and measured.recent[-1]["step"] == measured.recent[-1]["total"]
    title = escape(run.output.name)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>{'' if ended else _AGAIN}"
        f'<meta name=viewport content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{_tiles(measured)}<div class=charts>{_charts(measured)}</div>"
        f"{_previews(preview_rows(run, measured.previews))}"
        f"<div class=tables>{_table('Options', config)}{_table('Environment', environment)}</div></body></html>\n"
    )


def _tiles(measured: _Measured) -> str:
    recent = measured.recent
    if not recent:
        return "<p class=muted>no step made yet</p>"
    latest = recent[-1]
    seconds = sum(line["seconds"] for line in recent)
    facts = {
        "step": f"{latest['step']:,} of {latest['total']:,}",
        "epoch": f"{latest['epoch']:,}",
        "smoothed loss": _text(latest["smoothed"]),
        "seconds a step": f"{seconds / len(recent):.3g}",
        "pictures a second": f"{sum(line['pictures'] for line in recent) / max(seconds, 1e-9):.3g}",
        "peak memory": f"{measured.peak_memory / 1e9:.3g} GB",
    }
    if measured.held_out:
        losses = [loss for loss in measured.held_out[-1]["validation"].values() if loss is not None]
        facts["held-out loss"] = _text(sum(losses) / len(losses)) if losses else "not finite"
    if measured.skipped:
        facts["steps skipped"] = str(measured.skipped)
    tiles = (
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts.items()
    )
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _charts(measured: _Measured) -> str:
    held_out = [Line(f"σ {level}", f"c{i}", measured.held_out_at(level)) for i, level in enumerate(measured.levels)]
    loss = [
        Line("each step", "c0 faint", measured.curves["loss"].points),
        Line("smoothed", "c0", measured.curves["smoothed"].points),
    ]
    figures = [chart("Training loss", loss, measured.last)]
    if held_out:
        figures.append(chart("Held-out loss by noise level σ", held_out, measured.last))
    rate, norm = (
        Line("learning rate", "c1", measured.curves["lr"].points),
        Line("norm", "c2", measured.curves["grad_norm"].points),
    )
    figures.append(chart("Learning rate", [rate], measured.last))
    figures.append(chart("Gradient norm, before clipping", [norm], measured.last))
    return "".join(figures)


def _previews(rows: Sequence[Row]) -> str:
    strips = []
    for row in rows:
        figures = "".join(_shot(label, path) for label, path in row.pictures.items())
        strips.append(f"<h3>{escape(row.prompt)}</h3><div class=strip>{figures}</div>")
    return f"<h2>Previews</h2>{''.join(strips)}" if strips else ""


def _shot(label: str, path: Path) -> str:
    """A preview. A damaged file has a caption only: it must not end the run."""
    try:
        data = base64.b64encode(thumbnail(path, _THUMBNAIL)).decode()
    except ZImageError:
        data = ""
    shown = f'<img alt="{label}" src="data:image/jpeg;base64,{data}">' if data else ""
    return f"<figure class=shot>{shown}<figcaption>{label}</figcaption></figure>"


def _table(title: str, facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(k.replace('_', '-'))}</th><td>{escape(_cell(k, v))}</td></tr>" for k, v in facts.items()
    )
    return f"<section><h2>{escape(title)}</h2><table>{rows}</table></section>"


def _cell(name: str, value: object) -> str:
    if value is None and name in auto_options():
        return "auto"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


_STYLE = """
:root{color-scheme:light dark;--fg:#1d2330;--muted:#68718a;--line:#e3e6ee;--bg:#fff;--card:#f7f8fb;
--c0:#2f6fde;--c1:#d9662b;--c2:#2a9461;--c3:#9a4fc4}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9f2;--muted:#98a1b8;--line:#2c3242;--bg:#12151d;--card:#1a1f2b;
--c0:#6fa3ff;--c1:#ff9a66;--c2:#5fcb96;--c3:#c88bf0}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);
max-width:1200px;margin:32px auto;padding:0 24px}h1{font-size:24px;margin:0 0 16px}h2{font-size:17px;margin:28px 0 8px}
h3{font-size:14px;font-weight:600;margin:16px 0 6px}.muted{color:var(--muted)}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-bottom:20px}.tile{background:var(--card);border-radius:8px;
padding:10px 16px;min-width:120px}.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px}.charts{display:grid;grid-template-columns:
repeat(auto-fit,minmax(420px,1fr));gap:16px}figure{margin:0;background:var(--card);border-radius:8px;padding:12px}
figcaption{font-size:14px;font-weight:600;display:flex;justify-content:space-between;gap:12px;flex-wrap:wrap}
.legend{font-weight:400;color:var(--muted);font-size:13px}.key{margin-left:12px}.key::before{content:"";display:inline-block;
width:14px;height:3px;border-radius:2px;background:currentColor;margin-right:5px;vertical-align:middle}
.key.c0::before{background:var(--c0)}.key.c1::before{background:var(--c1)}.key.c2::before{background:var(--c2)}
.key.c3::before{background:var(--c3)}svg{width:100%;height:auto;display:block;margin-top:6px}
svg text{fill:var(--muted);font-size:11px;font-variant-numeric:tabular-nums}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}polyline.c0{stroke:var(--c0)}polyline.c1{stroke:var(--c1)}
polyline.c2{stroke:var(--c2)}polyline.c3{stroke:var(--c3)}circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}
circle.c2{fill:var(--c2)}circle.c3{fill:var(--c3)}.faint{opacity:.3;stroke-width:1}
.strip{display:flex;gap:10px;overflow-x:auto;padding-bottom:6px}.shot{padding:6px;flex:none}.shot img{display:block;
border-radius:4px;max-width:160px}.shot figcaption{font-weight:400;font-size:12px;color:var(--muted);margin-top:4px}
.tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px;align-items:start}
table{border-collapse:collapse;width:100%;font-size:13px}th{text-align:left;font-weight:400;color:var(--muted);
white-space:nowrap;padding:3px 16px 3px 0;vertical-align:top}td{padding:3px 0;word-break:break-word}
tr{border-bottom:1px solid var(--line)}
"""
