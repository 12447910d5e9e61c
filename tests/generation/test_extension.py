"""A new sampler is one function and one entry: shown with an invented one, in a copy of the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.networks import HAS_MLX

ROOT = Path(__file__).parents[2]
PACKAGES = {"cli": "zimage_cli", "zimage_mlx": "zimage_mlx", "zimage_ref": "zimage_ref"}
FUNCTION = '''def midpoint(
    x: ArrayT, sigmas: Sequence[float], predict: Predict[ArrayT], blend: Blend[ArrayT]
) -> Iterator[tuple[ArrayT, ArrayT]]:
    """Follows the velocity in the middle of each step."""
    for sigma, next_sigma in pairwise(sigmas):
        middle = (sigma + next_sigma) / 2
        raw = predict(euler_step(x, predict(x, sigma), sigma, middle), middle)
        x_0 = predicted_picture(x, raw, sigma)
        x = blend(euler_step(x, raw, sigma, next_sigma), next_sigma)
        yield x, x_0


'''
ENTRY = '"midpoint": midpoint, '
USE = """
import sys
import numpy as np
import zimage_ref
from zimage_cli.app import main
from zimage_ref import GenerateConfig
from zimage_ref.generation.run import GenerationRun

copy, model, *backends = sys.argv[1:]
assert zimage_ref.__file__.startswith(copy), zimage_ref.__file__
made = {}
for backend in backends:
    package = __import__(f"zimage_{'ref' if backend == 'numpy' else 'mlx'}")
    pipe = package.ZImagePipeline.from_pretrained(model, "float32")
    run = GenerationRun(pipe)
    for sampler in ("midpoint", "euler"):
        requests = run.plan([GenerateConfig("a fox", width=48, height=32, steps=3, sampler=sampler)])
        (one,) = run.make(requests)
        assert one.record["sampler"] == sampler
        made[backend, sampler] = np.asarray(one.picture, int)
    argv = ["--prompt=a fox", "--width=48", "--height=32", "--steps=3", "--sampler=midpoint", "--dtype=float32"]
    code = main(["generate", f"--model-dir={model}", f"--backend={backend}", *argv, f"--output={copy}/{backend}.png"])
    assert code == 0
    written = np.asarray(zimage_ref.pictures.images.read_picture(f"{copy}/{backend}.png"), int)
    assert (written == made[backend, "midpoint"]).all()
    assert np.abs(made[backend, "midpoint"] - made[backend, "euler"]).max() > 2
    assert np.abs(made[backend, "midpoint"] - made["numpy", "midpoint"]).max() <= 1
main(["generate", "--help-all"])
"""


def test_a_sampler_is_one_function_and_one_entry(model_dir: Path, tmp_path: Path) -> None:
    for folder, package in PACKAGES.items():
        shutil.copytree(ROOT / folder, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    file = tmp_path / "zimage_ref" / "generation" / "samplers.py"
    source = file.read_text(encoding="utf-8")
    place = source.index("SAMPLERS: dict[str, Sampler] = {")
    source = source[:place] + FUNCTION + source[place:].replace("{", "{" + ENTRY, 1)
    file.write_text(source, encoding="utf-8")

    backends = ["numpy", "mlx"] if HAS_MLX else ["numpy"]
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path), str(model_dir), *backends],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Choices: midpoint, euler, heun, dpm++2m" in done.stdout  # the help
