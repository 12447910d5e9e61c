"""One picture, saved at every step: what the model predicts while it denoises.

python examples/stream.py "a red fox in snow" --model-dir Tongyi-MAI/Z-Image-Turbo --folder steps
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zimage_mlx import ZImagePipeline


def main() -> None:
    """Saves the predicted picture of each step. You may leave the loop at any step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--folder", type=Path, default=Path("steps"))
    parser.add_argument("--side", type=int, default=1024, help="width and height in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own number if left out)")
    args = parser.parse_args()

    pipe = ZImagePipeline.from_pretrained(args.model_dir)
    args.folder.mkdir(parents=True, exist_ok=True)
    for step in pipe.stream(args.prompt, width=args.side, height=args.side, steps=args.steps):
        path = args.folder / f"{step.index:02}.png"
        pipe.picture(step.x_0).save(path)  # x_0: the finished picture as it looks from here
        print(f"step {step.index} of {step.total}, sigma {step.sigma:.3f}: {path}")


if __name__ == "__main__":
    main()
