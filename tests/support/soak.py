"""Long use of the built-in model in one process, and the memory that it takes, in the order of time.

    python tests/support/soak.py train|pictures|lines COUNT FOLDER

Prints a JSON object: memory (bytes after each step, picture or line), same (whether the first result and the last are).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import zimage_mlx
from support import tiny
from zimage_cli.app import main
from zimage_cli.terminal.console import Console
from zimage_ref import TrainConfig

SIZE = {"width": 64, "height": 64, "steps": 2}
MEASURED = Path("/proc/self/statm").exists()  # memory is read from Linux's /proc
_PAGE = 4096


def memory() -> int:
    """The bytes of this process that no file backs."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * _PAGE


def train(count: int, folder: Path) -> tuple[list[int], bool]:
    """A run of `count` steps."""
    tiny.write_dataset(folder / "data")
    config = TrainConfig(
        "tiny", folder / "data", folder / "soak.safetensors", steps=count, resolution=32, rank=4, resume_every=count,
        validation="0.25", validation_every=max(1, count // 50),
    )  # fmt: skip
    taken = [memory() for event in zimage_mlx.train(config) if isinstance(event, zimage_mlx.Step)]
    return taken, (folder / "soak.safetensors").is_file()


def pictures(count: int, folder: Path) -> tuple[list[int], bool]:
    """`count` pictures of one pipeline; the last is asked for as the first."""
    pipe, taken = zimage_mlx.ZImagePipeline.from_pretrained("tiny"), []
    first = last = np.zeros(0)
    for i in range(count):
        seed = 0 if i == count - 1 else i
        (picture,) = pipe("a red star" if not seed else f"a blue circle {i % 7}", seed=seed, **SIZE)
        last = np.asarray(picture)
        first = first if i else last
        taken.append(memory())
    return taken, np.array_equal(first, last)


def lines(count: int, folder: Path) -> tuple[list[int], bool]:
    """`count` lines typed at `zimage generate --interactive`: prompts, settings and mistakes."""
    taken: list[int] = []
    typed = {1: "/steps 3", 2: "/guidance 2", 3: "/steps x", 4: "/show", 5: "/unknown", 6: "/steps 2", 7: "/guidance"}

    def ask(self: Console, prompt: str) -> str:
        taken.append(memory())
        at = len(taken) - 1
        if at >= count:
            raise EOFError
        return "a red star" if at in (0, count - 1) else typed.get(at % 10, f"a circle {at % 7}")

    Console.ask = ask  # type: ignore[method-assign]
    options = [f"--{name}={value}" for name, value in {**SIZE, "seed": 3}.items()]  # without a seed, one is drawn
    code = main(["generate", "--model-dir=tiny", "--interactive", f"--output={folder}/{{index}}.png", *options])
    made = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    first, last = made[0].read_bytes(), made[-1].read_bytes()
    return taken[:count], code == 0 and first == last


if __name__ == "__main__":
    memory_taken, same = {"train": train, "pictures": pictures, "lines": lines}[sys.argv[1]](
        int(sys.argv[2]), Path(sys.argv[3])
    )
    print(json.dumps({"memory": memory_taken, "same": same}))
