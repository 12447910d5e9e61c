"""The memory of a process that makes a picture with streamed weights, as the system counts it and as MLX does.

    python tests/support/residence.py MODEL

Prints a JSON object of bytes, each the growth over the built-in model's picture: anonymous (memory that no file backs),
mapped (pages of files), counted (the peak of MLX). For Linux.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import mlx.core as mx

from zimage_mlx import ZImagePipeline

REQUEST = {"width": 32, "height": 32, "steps": 1, "output": "latents"}


def pages() -> tuple[int, int]:
    """Anonymous and mapped bytes of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines if "kB" in line)
    }
    return found["RssAnon"], found["RssFile"]


def main() -> None:
    """Makes two pictures and watches the second."""
    ZImagePipeline.from_pretrained("tiny", "float32", stream=True)("a fox", **REQUEST)
    mx.clear_cache()
    before, seen, done = pages(), [pages()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(pages())

    watcher = threading.Thread(target=watch)
    watcher.start()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    ZImagePipeline.from_pretrained(sys.argv[1], "float32", stream=True)("a fox", **REQUEST)
    done.set()
    watcher.join()
    anonymous, mapped = (max(each) - start for each, start in zip(zip(*seen, strict=True), before, strict=True))
    print(json.dumps({"anonymous": anonymous, "mapped": mapped, "counted": mx.get_peak_memory() - active}))


if __name__ == "__main__":
    main()
