"""Long use takes no more memory than short use, and gives the same pictures at its end.

ZIMAGE_LONG=1 ZIMAGE_SOAK=1 pytest -s -m slow tests/test_soak.py  5,000 steps, 2,000 pictures, 500 lines: some minutes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from support.networks import mlx_only

TESTS = Path(__file__).parent
WHOLE = {"train": 5000, "pictures": 2000, "lines": 500}
SHORT = {"train": 300, "pictures": 100, "lines": 100}
COUNTS = WHOLE if os.environ.get("ZIMAGE_SOAK") else SHORT
pytestmark = pytest.mark.skipif(not os.environ.get("ZIMAGE_LONG"), reason="takes minutes: set ZIMAGE_LONG=1")


@mlx_only
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", COUNTS)
def test_memory_does_not_grow(kind: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "support" / "soak.py"), kind, str(COUNTS[kind]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    memory, tenth = report["memory"], COUNTS[kind] // 10
    assert len(memory) == COUNTS[kind] and report["same"]
    early, late = mean(memory[tenth : 2 * tenth]), mean(memory[-tenth:])
    print(f"{kind}: {early / 1e6:.1f} MB in the second tenth, {late / 1e6:.1f} MB in the last: {late / early - 1:+.2%}")
    assert late < 1.02 * early
