"""The findings as data: facts, problems, verdicts, rates, predictions; and their JSON, without personal data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zimage_ref.formats.json_file import JsonObject
from zimage_ref.version import __version__

Progress = Callable[[str, int, int, str], None]  # section, how many are done, of how many, which one is next
FORMAT = 1  # of the JSON; it changes if a key changes its meaning


@dataclass(frozen=True)
class Problem:
    """Something about the machine that will disturb."""

    fact: str
    remedy: str
    grave: bool = False  # nothing can work so, or results cannot be trusted


@dataclass(frozen=True)
class Machine:
    """Facts about the machine, texts and numbers by name, and its problems."""

    facts: dict[str, str | int | float]
    problems: list[Problem]

    def __add__(self, other: Machine) -> Machine:
        return Machine(self.facts | other.facts, self.problems + other.problems)


@dataclass(frozen=True)
class Verdict:
    """One computation on the device, held against NumPy in float32."""

    name: str
    dtype: str
    size: str
    error: float  # root mean square of the difference, relative to that of the expected values
    limit: float
    worst: float  # largest difference, relative to the largest expected value
    worst_limit: float
    seconds: float
    note: str = ""  # if it is smaller than the real model's
    remedy: str = ""
    remark: str = ""  # what to know although it is right

    @property
    def right(self) -> bool:
        """Whether both errors are within their limits. An error that is no number is beyond any."""
        return self.error <= self.limit and self.worst <= self.worst_limit

    def to_json(self) -> JsonObject:
        """All fields, and the verdict."""
        return vars(self) | {
            "error": _finite(self.error), "worst": _finite(self.worst), "verdict": "right" if self.right else "wrong",
        }  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """How fast one kind of work is."""

    name: str
    dtype: str
    size: str
    per_second: float  # floating point operations, or bytes
    unit: str  # FLOP or byte
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """All that the doctor found."""

    quick: bool
    machine: Machine
    verdicts: Sequence[Verdict] = ()
    rates: Sequence[Rate] = ()
    measured: dict[str, float] = field(default_factory=dict)  # seconds of parts that predictions were scaled by
    predicted: JsonObject = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Verdict]:
        """The verdicts that are beyond their limits."""
        return [verdict for verdict in self.verdicts if not verdict.right]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong that makes results useless."""
        return not self.wrong and not any(problem.grave for problem in self.machine.problems)

    def to_json(self) -> JsonObject:
        """For a file that people attach to a report."""
        return {
            "format": FORMAT,
            "zimage": __version__,
            "quick": self.quick,
            "healthy": self.healthy,
            "seconds": round(self.seconds, 1),
            "machine": self.machine.facts,
            "problems": [vars(problem) for problem in self.machine.problems],
            "right": [verdict.to_json() for verdict in self.verdicts],
            "fast": [vars(rate) for rate in self.rates],
            "measured": self.measured,
            "predicted": self.predicted,
        }


def _finite(error: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return error if error == error and abs(error) != float("inf") else str(error)
