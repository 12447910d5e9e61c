"""Keeps a Mac awake: its idle sleep would suspend a run of hours."""

from __future__ import annotations

import os
import subprocess
import sys


def keep_awake() -> None:
    """Keeps a Mac from idle sleep until this process ends; its display may sleep. Elsewhere nothing happens."""
    if sys.platform != "darwin":
        return
    try:
        subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
    except OSError:  # it is part of macOS; without it the run goes on all the same
        return
