"""Several LoRA files become one.

python examples/merge.py dog.safetensors:0.8 style.safetensors:0.5 --output both.safetensors [--rank 16]

Without --rank the ranks add up, and the result does exactly what the inputs do together. `zimage convert
--model-type lora` does the same; this shows the functions behind it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zimage_mlx import combine_loras, read_lora, write_lora


def path_and_scale(text: str) -> tuple[Path, float]:
    """The two parts of FILE:SCALE; the scale is 1 if there is none."""
    path, colon, scale = text.rpartition(":")
    return (Path(path), float(scale)) if colon else (Path(text), 1.0)


def main() -> None:
    """Reads every LoRA, adds them up, and writes the sum in the spelling that most programs load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("loras", nargs="+", metavar="FILE[:SCALE]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, help="the result has at most this rank")
    args = parser.parse_args()

    files = [(read_lora(path), scale) for path, scale in map(path_and_scale, args.loras)]
    for file, scale in files:
        print(f"{file.path} at {scale:g}: {file.dialect}, {len(file.updates)} layers")
    lora = combine_loras([(file.updates, scale) for file, scale in files], args.rank)
    write_lora(args.output, lora, {"sources": ", ".join(args.loras)}, with_sidecar=False)
    print(args.output)


if __name__ == "__main__":
    main()
