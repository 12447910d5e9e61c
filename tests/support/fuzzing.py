"""Damage to small valid files, and the readers that refuse it in one line, within the memory of the file's size."""

from __future__ import annotations

import json
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from zimage_ref.errors import ZImageError

BASE = 1 << 21  # bytes that a reader may take whatever the size of the file
LONGEST = 5000  # characters of a message
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)
NUMBERS = (b"0", b"-1", b"1e308", b"1e999", b"NaN", b"99999999999999999999", b"0.5", b"4294967296", b"null", b"true")
VALUES = (b"null", b"[]", b"{}", b'""', b"[[[[", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\x00", b"'", b'"""', b"=")
PIECES = (1, 4, 64, 1000)  # bytes


@dataclass(frozen=True)
class Reader:
    """One way to read files: the files, by their path in a folder, and a function that reads all of the folder."""

    files: Mapping[str, bytes]
    use: Callable[[Path], object]
    victims: tuple[str, ...] = ()  # the files that are damaged; none: all
    measured: bool = True  # whether memory has a bound: that of a picture is bounded by its pixels
    share: float = 1.0  # of the inputs that other readers get: less for a slow one


def damaged(data: bytes, rng: Random) -> bytes:
    """`data` with one to four faults."""
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(DAMAGES)(mutant, rng)
    return bytes(mutant)


def _place(data: bytearray, rng: Random) -> int:
    """A place in `data`, in the first kilobyte more often than not: headers are there."""
    return rng.randrange(min(len(data), rng.choice((16, 1024, len(data)))) or 1) if data else 0


def flip(data: bytearray, rng: Random) -> None:
    """Flips a bit, or changes a byte."""
    if data:
        at = _place(data, rng)
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))


def truncate(data: bytearray, rng: Random) -> None:
    """Loses the end."""
    del data[_place(data, rng) :]


def delete(data: bytearray, rng: Random) -> None:
    """Loses a range."""
    at = _place(data, rng)
    del data[at : at + rng.choice(PIECES)]


def duplicate(data: bytearray, rng: Random) -> None:
    """Has a range twice, here or elsewhere."""
    at, to = _place(data, rng), _place(data, rng)
    data[to:to] = data[at : at + rng.choice(PIECES)]


def binary_number(data: bytearray, rng: Random) -> None:
    """Lies about a length, an offset or a count."""
    at, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    number = rng.choice((*EXTREMES, len(data), at)) & (1 << 8 * width) - 1
    data[at : at + width] = number.to_bytes(width, "little" if rng.random() < 0.7 else "big")


def written_number(data: bytearray, rng: Random) -> None:
    """Changes a number in a text to an extreme one."""
    _exchange(data, rb"-?\d+(\.\d+)?", rng.choice(NUMBERS), rng)


def value(data: bytearray, rng: Random) -> None:
    """Changes a value in a text to one of another type."""
    _exchange(data, rb'"[^"\n]{0,40}"|\[[^\]\n]{0,60}\]|true|false|null', rng.choice(VALUES), rng)


def rename(data: bytearray, rng: Random) -> None:
    """Changes a letter of a name."""
    _exchange(data, rb"(?<=[\"._\w])[a-z](?=[\w._\"])", bytes([rng.choice(b"abqvw_.0/\\")]), rng)


DAMAGES: tuple[Callable[[bytearray, Random], None], ...] = (
    flip, flip, truncate, delete, duplicate, binary_number, binary_number, written_number, value, rename,
)  # fmt: skip


def _exchange(data: bytearray, pattern: bytes, new: bytes, rng: Random) -> None:
    """Puts `new` in the place of one of the first texts that fit the pattern."""
    places = [match.span() for _, match in zip(range(200), re.finditer(pattern, data), strict=False)]
    if places:
        start, stop = rng.choice(places)
        data[start:stop] = new


@contextmanager
def laid_out(reader: Reader) -> Iterator[Path]:
    """A folder with the whole files of `reader`."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for file, content in reader.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        yield folder


def attack(name: str, reader: Reader, count: int, seed: int = 0) -> int:
    """Reads `count` damaged versions of the files of `reader`. Returns how many were refused.

    Raises AssertionError if anything but an error of the project comes out, if a message is not one printable line
    that names the folder, or if memory exceeds its bound.
    """
    rng, refused = Random(f"{name} {seed}"), 0
    victims = reader.victims or tuple(reader.files)
    with laid_out(reader) as folder:
        reader.use(folder)  # the whole files are read, and modules are imported
        tracemalloc.start()
        try:
            for number in range(max(1, round(count * reader.share))):
                victim = rng.choice(victims)
                mutant = damaged(reader.files[victim], rng)
                (folder / victim).write_bytes(mutant)
                refused += _read(f"mutant {number} of {name}, seed {seed}: {mutant[:2000]!r}", reader, folder)
                (folder / victim).write_bytes(reader.files[victim])
        finally:
            tracemalloc.stop()
    return refused


def _read(what: str, reader: Reader, folder: Path) -> bool:
    """Whether it was refused."""
    tracemalloc.reset_peak()
    before, refused = tracemalloc.get_traced_memory()[0], False
    try:
        reader.use(folder)
    except ZImageError as error:
        message, refused = str(error), True
        assert message.isprintable() and len(message) < LONGEST and str(folder) in message, (what, message)
    except BaseException as error:
        raise AssertionError(what) from error
    taken = tracemalloc.get_traced_memory()[1] - before
    size = sum(len(content) for content in reader.files.values())
    assert not reader.measured or taken < BASE + 4 * size, (taken, size, what)
    return refused


def as_json(data: object) -> bytes:
    """A JSON file."""
    return json.dumps(data, indent=1).encode()
