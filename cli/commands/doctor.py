"""zimage doctor: its options, and what it shows of this machine: facts, verdicts, rates, predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

from zimage_mlx import blas
from zimage_ref.doctor import machine
from zimage_ref.doctor.findings import Findings, Machine, Problem, Progress, Verdict
from zimage_ref.doctor.prediction import MODES, SIDES
from zimage_ref.doctor.remembered import cache_file, remember
from zimage_ref.errors import BackendError, reason
from zimage_ref.formats.files import check_writable
from zimage_ref.formats.json_file import JsonObject, write_json

from ..terminal.backends import require_mlx
from ..terminal.console import Bars, Console
from ..terminal.duration import duration
from ..terminal.parser import CommandParser

_SECTIONS = {
    "machine": "machine", "right": "right: checks", "whole": "right: whole", "rates": "fast: rates",
    "parts": "fast: parts",
}  # fmt: skip
_BEST = " *"


def add_options(parser: CommandParser) -> None:
    """The options of `zimage doctor`."""
    parser.examples = (
        ("Check this machine, and see what pictures and training will take:", "zimage doctor"),
        ("Write a report to send with a question:", "zimage doctor --quick --json report.json"),
    )
    parser.option("--quick", "Check fewer precisions and measure fewer parts. It ends sooner.", action="store_true")
    parser.option("--json", "Write everything to this file, as JSON without personal data.", type=Path, metavar="FILE")


def run(args: argparse.Namespace, console: Console) -> int:
    """Examines this machine. Returns 1 if something is wrong."""
    if args.json:
        check_writable(args.json)
    try:
        mlx = require_mlx("zimage doctor")
    except BackendError as error:
        findings = Findings(args.quick, machine.describe() + Machine({}, [Problem(str(error), "", grave=True)]))
    else:
        with console.progress() as bars:
            findings = mlx.diagnose(args.quick, _follow(bars))
    show(findings, console)
    try:
        remember(findings)
    except OSError as error:
        console.warn(f"{cache_file()}: the figures cannot be kept: {reason(error)}")
    if args.json:
        write_json(args.json, findings.to_json())
        console.wrote(args.json)
    return 0 if findings.healthy else 1


def _follow(bars: Bars) -> Progress:
    return lambda section, done, total, detail: bars.update(_SECTIONS[section], done, total, detail)


def show(findings: Findings, console: Console) -> None:
    """Prints all findings as tables."""
    console.table(("machine", ""), [(name, _amount(name, value)) for name, value in findings.machine.facts.items()])
    if findings.verdicts:
        rows = [_row(verdict) for verdict in findings.verdicts]
        console.table(("computation", "dtype", "size", "error", "limit", "verdict"), rows, title="Right?")
    for remark in dict.fromkeys(verdict.remark for verdict in findings.verdicts if verdict.remark):
        console.note(remark)
    if smaller := [verdict for verdict in findings.verdicts if verdict.note]:
        dtypes = ", ".join(dict.fromkeys(verdict.dtype for verdict in smaller))
        console.note(
            f"this device is slow in {dtypes}: {len(smaller)} checks ran at smaller sizes than the real model's"
        )
    if findings.rates:
        rates = [(r.name, r.dtype, r.size, _rate(r.per_second, r.unit)) for r in findings.rates]
        console.table(("work", "dtype", "size", "speed"), rates, title="Fast?")
    if findings.predicted:
        _show_predictions(findings.predicted, console)
    _show_faults(findings, console)


def _row(verdict: Verdict) -> tuple[str, ...]:
    said = "right" if verdict.right else "WRONG"
    error, limit = max(
        (verdict.error, verdict.limit), (verdict.worst, verdict.worst_limit), key=lambda pair: pair[0] - pair[1]
    )
    return verdict.name, verdict.dtype, verdict.size, f"{error:.1e}", f"{limit:.1e}", said


def _show_predictions(predicted: JsonObject, console: Console) -> None:
    rows = []
    for precision in predicted["forward_seconds"]:
        for mode in MODES:
            cells = [_choice(predicted, work, precision, mode, side) for work in ("picture", "step") for side in SIDES]
            rows.append((precision, mode, *cells))
    heads = [f"{work} {side}" for work in ("picture", "step") for side in SIDES]
    title = "What it will take: a picture in 8 steps, a training step; and memory"
    console.table(("dtype", "memory", *heads), rows, title=title)
    console.note("* the best choice here; - does not fit into memory. Reading the weights is not in these times")
    needed = ", ".join(
        f"{precision} {_few_digits(by_side[str(SIDES[-1])] / 1e9)}"
        for precision, by_side in predicted["stream_bytes_per_second"].items()
    )
    console.note(f"stream takes as long as lean at {SIDES[-1]} pixels if the disk reads as many GB/s as here: {needed}")


def _choice(predicted: JsonObject, work: str, precision: str, mode: str, side: int) -> str:
    """Seconds and GB, marked if it is the best choice; a dash if it does not fit."""
    seconds = predicted[f"{work}_seconds"][precision][mode][str(side)]
    nbytes = predicted[f"{work}_bytes"][precision][mode][str(side)]
    limit = predicted["memory_limit"]
    if limit and nbytes > limit:
        return f"- {nbytes / 1e9:.0f} GB"
    best = predicted["best"][work][str(side)] == {"precision": precision, "mode": mode}
    return f"{duration(seconds)}, {nbytes / 1e9:.0f} GB{_BEST if best else ''}"


def _show_faults(findings: Findings, console: Console) -> None:
    """Prints each problem with its remedy, and one line with the verdict."""
    for problem in findings.machine.problems:
        say = console.error if problem.grave else console.warn
        say(f"{problem.fact}: {problem.remedy}" if problem.remedy else problem.fact)
    for verdict in findings.wrong:
        console.error(f"{verdict.name} in {verdict.dtype} is wrong: {verdict.remedy}")
    if findings.verdicts and (note := blas.advice()):
        console.note(note)
    checks, wrong = len(findings.verdicts), len(findings.wrong)
    if findings.healthy:
        console.print(f"healthy: all {checks} checks are right, in {findings.seconds:.0f} s")
    else:
        console.print(f"not healthy: {wrong} of {checks} checks are wrong; see the errors above")


def _amount(name: str, value: str | int | float) -> str:
    """A fact as people read it: large numbers as GB."""
    if isinstance(value, str) or value < 1e6:
        return str(value)
    return f"{value / 1e9:.1f} GB{' a second' if name == 'disk read' else ''}"


def _few_digits(number: float) -> str:
    """A number of any size: 24.1, 0.37, 0.019."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:.1f} GB/s" if unit == "byte" else f"{per_second / 1e12:.3g} TFLOP/s"
