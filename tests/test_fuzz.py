"""Damaged files of every kind: read, or refused in one line that names the file, within the memory of their size.

ZIMAGE_FUZZ=50000 pytest tests/test_fuzz.py     that many inputs, instead of a few hundred
ZIMAGE_FUZZ_SEED=7                              others than those of seed 0
"""

from __future__ import annotations

import os

import pytest
from support.fuzzing import attack
from support.readers import READERS

COUNT, SEED = int(os.environ.get("ZIMAGE_FUZZ", "400")), int(os.environ.get("ZIMAGE_FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str) -> None:
    attack(name, READERS[name](), -(-COUNT // len(READERS)), SEED)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_2000_damaged_files_are_read_or_refused_in_one_line(name: str) -> None:
    count = -(-2000 // len(READERS))
    assert attack(name, READERS[name](), count, SEED + 1) > 0
