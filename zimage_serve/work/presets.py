"""Sets of training options to begin with: those of the built-in model, and the examples beside the code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zimage_ref.options_file import read_options
from zimage_ref.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[2] / "examples"  # an installed package comes without them
_STEM = "train-"


def presets(own: Mapping[str, object], not_asked: set[str], examples: Path = EXAMPLES) -> list[dict[str, object]]:
    """The name, a line of explanation and the options of each set.

    own: options for the model of this server. not_asked: options that clients do not set.
    """
    found: list[dict[str, object]] = []
    if own:
        found.append(
            {"name": "lesson", "about": "Eight drawings of a new word, for the built-in model", "options": own}
        )
    for path in sorted(examples.glob(f"{_STEM}*.toml")):
        options = read_options(path, TrainConfig)
        if "datasets" in options:  # a run here has one dataset
            continue
        about = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(":")[0]
        asked = {name: value for name, value in options.items() if name not in not_asked}
        found.append({"name": path.stem.removeprefix(_STEM), "about": about, "options": asked})
    return found
