"""The NumPy models keep weights mapped: what a full-size transformer needs of memory that is its own."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest

from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.model import parameters
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.positions import padded

LIMIT = 3_000_000_000  # bytes of anonymous memory for a whole transformer
BLOCK, TOKENS = "layers.0", padded(32 * 32) + padded(20)  # a picture of 512 x 512 and a short caption

# Runs one block of a checkpoint file and prints two numbers: the most anonymous memory seen, and that before the model
PROGRAM = """
import sys, threading, time
from pathlib import Path
import numpy as np
from zimage_ref.formats import safetensors
from zimage_ref.model.config import OFFICIAL_TRANSFORMER as config
from zimage_ref.networks.transformer import Block
from zimage_ref.networks.weights import Weights

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while running:
        seen.append(anonymous())
        time.sleep(0.002)

path, name, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
before, running, seen = anonymous(), True, []
watcher = threading.Thread(target=watch, daemon=True)  # an error below must end the program
watcher.start()
block = Block(Weights(safetensors.read(Path(path))[0], np.dtype("float32")).at(name), config)
x = np.random.default_rng(0).standard_normal((1, tokens, config.dim), dtype=np.float32)
rotation = np.ones((1, tokens, config.head_dim // 2), np.complex64)
y = block(x, rotation, None, np.ones((1, config.adaln_dim), np.float32))
running = False
watcher.join()
assert y.shape == x.shape and y.dtype == x.dtype and np.isfinite(y).all()
print(max(seen), before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_a_full_size_transformer_needs_less_than_three_gigabytes_of_its_own(tmp_path: Path) -> None:
    shapes = parameters.transformer_parameters(OFFICIAL_TRANSFORMER)
    block = {name: shape for name, shape in shapes.items() if name.startswith(f"{BLOCK}.")}
    stored = 2 * sum(prod(shape) for shape in block.values())
    assert stored > 360e6
    write_ones(tmp_path / "block.safetensors", block)

    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "block.safetensors"), BLOCK, str(TOKENS)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, before = map(int, run.stdout.split())

    # The other 33 blocks run one after another and leave nothing behind. No weight outside this block is larger than
    # its largest; what stays beside a block is the stream, the conditioning and the latents.
    largest = max(shapes.values(), key=prod)
    assert prod(largest) == max(prod(shape) for shape in block.values())
    stream = 4 * TOKENS * OFFICIAL_TRANSFORMER.dim
    rotations = 2 * 8 * TOKENS * OFFICIAL_TRANSFORMER.head_dim // 2
    whole = peak + 2 * stream + rotations
    print(f"one block {(peak - before) / 1e6:.0f} MB of its own, process {peak / 1e6:.0f} MB, all {whole / 1e6:.0f} MB")
    assert peak - before > 4 * prod(largest)  # the measurement saw the largest weight in float32
    assert whole < LIMIT < 2 * sum(prod(shape) for shape in shapes.values())


def write_ones(path: Path, shapes: parameters.Shapes) -> None:
    """A bfloat16 checkpoint of small constants, without ever holding more than one tensor."""

    def constant(shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 0x3A80, np.uint16).view(BFLOAT16)  # 2 ** -10

    safetensors.write(path, {k: Tensor(s, BFLOAT16, lambda s=s: constant(s)) for k, s in shapes.items()})
