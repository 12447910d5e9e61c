"""What programs that were killed leave on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, signal, sys
from pathlib import Path
from zimage_ref.formats.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_half(path: Path) -> Path:
    """The temporary file of a process that was killed while it wrote `path`."""
    before = set(path.parent.glob(".*"))
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(path)], check=False)
    assert done.returncode < 0
    (left,) = set(path.parent.glob(".*")) - before
    assert left.read_bytes() == b"half" and not path.exists()
    return left
