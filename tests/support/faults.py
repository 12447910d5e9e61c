"""Faults at every change of the file system, in a process of its own: a crash, or an error of the disk.

    python tests/support/faults.py FOLDER JOB crash|error STRIDE OFFSET

FOLDER holds the whole files that a job needs, in `start`. A change is a file that is created, written, synced, renamed
or deleted, or a folder that is made or deleted. Child k runs the job and has its fault at change k. Then files with
final names must be whole, and the job, run again, must give the bytes of a job without faults.

The job is a JSON object: argv, the command line; again, the options to add after a fault; results, patterns of the
files to compare at the end. Prints a JSON object: changes, tried, refused (ended in one line) and faults.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zimage_cli.commands.demo
import zimage_ref.formats.files
import zimage_ref.training.metrics
import zimage_ref.training.run_folder
from zimage_cli.app import main
from zimage_cli.commands import COMMANDS, load

CRASHED = 77  # an exit code
_GROWING = ("metrics.jsonl", "report.html", "previews.png", "lock")  # they grow, or depend on the time
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LEFT = re.compile(r"\..*\.(tmp|old)$")
Seen = dict[str, set[str]]


class Injector:
    """Counts the changes below `root`, and has a fault at one of them."""

    def __init__(self, root: Path, at: int, how: str, watch: Callable[[], None] = lambda: None) -> None:
        """at: the number of the change, from 1; 0 means none. watch: is called before each change."""
        self.root, self.at, self.how, self.watch = str(root), at, how, watch
        self.count, self._busy = 0, False

    def install(self) -> None:
        """Watches this process from now on."""
        sys.addaudithook(self._hook)
        files = zimage_ref.formats.files
        write, sync = files._NamedFile.write, files.sync

        def torn(file: Any, data: Any) -> int | None:
            if self._counts():
                write(file, bytes(data)[: len(data) // 2])
                self._fault(str(file._path))
            return write(file, data)

        def failing(handle: int) -> None:
            if self._counts():
                self._fault("sync")
            sync(handle)

        files._NamedFile.write = torn  # type: ignore[method-assign,assignment]
        for module in (files, zimage_ref.training.metrics, zimage_ref.training.run_folder):
            module.sync = failing  # type: ignore[attr-defined]

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
            return
        path = args[0] if isinstance(args[0], str) else str(args[0])
        if (path.startswith(self.root) or not path.startswith("/")) and self._counts():
            self._fault(path)

    def _counts(self) -> bool:
        self._busy = True
        self.watch()
        self._busy = False
        self.count += 1
        return self.count == self.at

    def _fault(self, path: str) -> None:
        if self.how == "crash":
            os._exit(CRASHED)
        number = errno.EIO if self.at % 2 else errno.ENOSPC
        raise OSError(number, os.strerror(number), path)


def contents(root: Path) -> Iterator[tuple[str, str]]:
    """The files with final names, and the digest of each."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and path.name not in _GROWING and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def _keep_everything() -> None:
    """Without it, each state holds how many bytes the gradient may keep, which varies with the memory in use."""
    from zimage_mlx.training import loop

    loop._budget = lambda plan, pipeline: math.inf


def run(root: Path, argv: list[str], injector: Injector | None = None) -> tuple[int, str, int]:
    """Runs a command in a child process: its exit code, what it wrote to stderr, and the number of changes."""
    log, counted = root.parent / "stderr", root.parent / "count"
    counted.write_text("0")
    if not (child := os.fork()):
        os.chdir(root)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            if argv[0] == "demo":
                _keep_everything()
            if injector:
                injector.install()
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 - what escapes is the fault that is looked for
            traceback.print_exc()
            code = 99
        sys.stderr.flush()
        if injector:
            injector.at = -1
            counted.write_text(str(injector.count))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), int(counted.read_text())


def fresh(folder: Path) -> Path:
    """A copy of the files that the job starts with."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folder / "start", root)
    return root


def results(root: Path, patterns: list[str]) -> dict[str, str]:
    """The digests of the files that must be the same in the end."""
    return {name: digest for name, digest in contents(root) if any(Path(name).match(p) for p in patterns)}


def reference(folder: Path, job: Any) -> tuple[int, Seen, dict[str, str]]:
    """The number of changes without a fault, the whole contents of every file by name, and the results."""
    root, seen = fresh(folder), folder / "seen"
    seen.write_text("")

    def watch() -> None:
        with seen.open("a") as file:
            file.write(json.dumps(list(contents(root))) + "\n")

    before: Seen = {}
    for name, digest in contents(root):
        before.setdefault(name, set()).add(digest)
    code, err, changes = run(root, job["argv"], Injector(root, 0, "", watch))
    assert code == 0, err
    whole: Seen = {name: set(digests) for name, digests in before.items()}
    for line in [*map(json.loads, seen.read_text().splitlines()), list(contents(root))]:
        for name, digest in line:
            whole.setdefault(name, set()).add(digest)
    twice = {name for name, digests in whole.items() if len(digests - before.get(name, set())) > 1}
    assert not twice, f"written under a final name: {twice}"
    return changes, whole, results(root, job["results"])


def judge(root: Path, job: Any, how: str, outcome: tuple[int, str, int], known: tuple[Seen, dict[str, str]]) -> str:
    """What is wrong after one fault; "" if nothing is."""
    (code, err, _), (whole, expected) = outcome, known
    if code not in ((CRASHED, 0) if how == "crash" else (0, 1)) or "Traceback" in err:
        return f"exit code {code}: {err[-600:]}"
    if code == 1 and err.count("error: ") != 1:
        return f"not one line: {err[-600:]}"
    half = [name for name, digest in contents(root) if digest not in whole.get(name, ())]
    if half:
        return f"half written: {half}"
    if lost := [name for name in job["precious"] if not (root / name).exists()]:
        return f"lost: {lost}"
    code, err, _ = run(root, [*job["argv"], *job["again"]])
    if code:
        return f"cannot be run again: {err[-600:]}"
    if (found := results(root, job["results"])) != expected:
        return f"other results after it was run again: {sorted(set(found.items()) ^ set(expected.items()))}"
    left = [path.name for path in root.rglob("*") if _LEFT.match(path.name)]
    return f"left behind: {left}" if left else ""


def faults(folder: Path, job: Any, how: str, stride: int, offset: int) -> dict[str, Any]:
    """The report; see the top of this file."""
    changes, whole, expected = reference(folder, job)
    wrong: dict[int, str] = {}
    tried = refused = 0
    for at in range(1 + offset, changes + 1, stride):
        root = fresh(folder)
        outcome = run(root, job["argv"], Injector(root, at, how))
        tried, refused = tried + 1, refused + (outcome[0] == 1)
        if fact := judge(root, job, how, outcome, (whole, expected)):
            wrong[at] = fact
    return {"changes": changes, "tried": tried, "refused": refused, "faults": wrong}


if __name__ == "__main__":
    os.fsync = os.fstat  # a crash is the end of a process here, not of the power: nothing need wait for the disk
    for command in COMMANDS:
        load(command)  # before the children are made
    zimage_cli.commands.demo.EPOCHS = 1
    arguments = sys.argv[1:]
    print(json.dumps(faults(Path(arguments[0]), json.loads(arguments[1]), arguments[2], *map(int, arguments[3:]))))
