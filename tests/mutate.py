"""Breaks lines of the code, one at a time, and says whether a default test notices.

    python tests/mutate.py                     all lines of mutants.toml
    python tests/mutate.py feed samplers       those in files with one of these words in their names
    python tests/mutate.py --new               those that `--log` has no result for

Each line is broken in a copy of the tree. The tests most likely to notice run first, then the whole suite for what
they let through. Prints a line for each, the count at the end; exits with 1 if fewer than 97 % were noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import Queue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutants.toml")
ENOUGH = 0.97  # the share that must be noticed
PATIENCE = 1800  # seconds; a test that takes longer has noticed, too
_MOMENTS = count(1_000_000_000)  # seconds since 1970
COPIED = ("cli", "docs", "examples", "tests", "zimage_mlx", "zimage_ref", "zimage_serve", ".ci", ".github")


@dataclass(frozen=True)
class Mutant:
    """A wrong change: `old`, which stands once in `file`, becomes `new`."""

    file: str
    old: str
    new: str
    why: str  # it matters
    tests: tuple[str, ...]  # run first
    excuse: str = ""  # why no test can notice it

    @property
    def name(self) -> str:
        """The file, and the first line that changes."""
        return f"{self.file}: {self.new.strip().splitlines()[0] if self.new.strip() else '(deleted)'}"


def mutants() -> list[Mutant]:
    """The table. Raises ValueError if a text is not there, or there twice, in the file that it is said to be in."""
    made = []
    for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]:
        tests = tuple(entry.pop("tests", [mirrored(entry["file"])]))
        mutant = Mutant(tests=tests, **entry)
        found = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if found != 1 or mutant.old == mutant.new:
            raise ValueError(f"{mutant.file}: holds {mutant.old!r} {found} times")
        made.append(mutant)
    return made


def mirrored(file: str) -> str:
    """The tests of the folder that `file` is in."""
    package, *folders, _ = Path(file).parts
    folder = "cli" if package == "cli" else folders[0] if folders else ""
    return f"tests/{folder}" if (ROOT / "tests" / folder).is_dir() else "tests"


@contextmanager
def copies(number: int) -> Iterator[Queue[Path]]:
    """Copies of the tree, to be taken and given back."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        queue: Queue[Path] = Queue()
        for i in range(number):
            copy = Path(folder) / str(i) / "tree"
            for name in COPIED:
                if (ROOT / name).exists():
                    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            for path in ROOT.iterdir():
                if path.is_file() and path.name != ".git":
                    shutil.copy(path, copy)
            (copy.parent / "zimage_cli").symlink_to(copy / "cli", target_is_directory=True)  # as it is installed
            queue.put(copy)
        yield queue


def failure(copy: Path, tests: Sequence[str]) -> str:
    """The first of the default tests among `tests` that fails in a copy of the tree; "" if all pass."""
    paths = os.pathsep.join(filter(None, [str(copy), str(copy.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    with tempfile.TemporaryDirectory(prefix="mutate-tests-") as temporary:
        try:
            done = subprocess.run(
                [*command, f"--basetemp={temporary}/t"], cwd=copy, env=environment, timeout=PATIENCE,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "a test that does not end"
    if not done.returncode:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else f"exit code {done.returncode}: {done.stdout[-300:]}"


def attempt(mutant: Mutant, queue: Queue[Path], first_only: bool) -> str:
    """The test that noticed; "" if none did."""
    copy = queue.get()
    target = copy / mutant.file
    whole = target.read_text(encoding="utf-8")
    try:
        _put(target, whole.replace(mutant.old, mutant.new))
        return failure(copy, mutant.tests) or ("" if first_only else failure(copy, ["tests"]))
    finally:
        _put(target, whole)
        queue.put(copy)


def _put(file: Path, text: str) -> None:
    """Writes `file`, with a time of its own: Python would take compiled code of a file with the same time and size."""
    file.write_text(text, encoding="utf-8")
    moment = next(_MOMENTS)
    os.utime(file, (moment, moment))


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only files with one of these in their names")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--whole", action="store_true", help="first see whether the tests pass on the code as it is")
    parser.add_argument("--first", action="store_true", help="run only the tests most likely to notice")
    parser.add_argument("--log", type=Path, help="a file of results as JSON lines; they are added to it")
    parser.add_argument("--new", action="store_true", help="leave out those that the log has")
    parser.add_argument("--check", action="store_true", help="see whether the table fits the code, and end")
    args = parser.parse_args()
    chosen = [m for m in mutants() if not args.words or any(word in m.file for word in args.words)]
    if args.check:
        print(f"{len(chosen)} lines, all there")
        return 0
    lines = args.log.read_text(encoding="utf-8").splitlines() if args.log and args.log.exists() else []
    known = {tuple(json.loads(line)["mutant"]) for line in lines} if args.new else set()
    chosen = [m for m in chosen if (m.file, m.old, m.new) not in known]
    chosen.sort(key=lambda mutant: not all(test.endswith(".py") for test in mutant.tests))  # the quick ones first

    def run(mutant: Mutant) -> bool:
        began = time.monotonic()
        by = attempt(mutant, queue, args.first)
        verdict = f"noticed by {by}" if by else f"explained: {mutant.excuse}" if mutant.excuse else "UNNOTICED"
        print(f"{time.monotonic() - began:4.0f} s  {mutant.name}\n        {verdict}", flush=True)
        if args.log:
            with args.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"mutant": [mutant.file, mutant.old, mutant.new], "by": by}) + "\n")
        return bool(by)

    with copies(args.jobs) as queue, ThreadPoolExecutor(args.jobs) as pool:
        whole = queue.get()
        if args.whole and (by := failure(whole, ["tests"])):
            print(f"fails before anything is broken: {by}")
            return 2
        queue.put(whole)
        noticed = list(pool.map(run, chosen))
    print(f"{sum(noticed)} of {len(noticed)} noticed")
    return 0 if sum(noticed) >= ENOUGH * len(noticed) else 1


if __name__ == "__main__":
    sys.exit(main())
