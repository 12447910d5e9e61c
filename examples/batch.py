"""Pictures for every prompt in a file, with the model loaded once.

python examples/batch.py prompts.txt --model-dir Tongyi-MAI/Z-Image-Turbo --folder pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zimage_mlx import GenerateConfig, ZImagePipeline


def main() -> None:
    """Reads the prompts, plans all pictures, and saves each one when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--folder", type=Path, default=Path("pictures"))
    parser.add_argument("--side", type=int, default=1024, help="width and height in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own number if left out)")
    args = parser.parse_args()

    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    configs = [
        GenerateConfig(prompt, seed=seed, width=args.side, height=args.side, steps=args.steps)
        for seed, prompt in enumerate(prompts)
    ]
    pipe = ZImagePipeline.from_pretrained(args.model_dir, lean=True)  # one network in memory at a time
    args.folder.mkdir(parents=True, exist_ok=True)
    for request, picture in pipe.generate(pipe.plan(configs), batch_size=2):
        path = args.folder / f"{request.config.seed:03}.png"
        picture.save(path)
        print(path, request.config.prompt)


if __name__ == "__main__":
    main()
