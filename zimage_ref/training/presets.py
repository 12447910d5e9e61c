"""Options that fit together, for a kind of thing to learn. Options that are given count before those of a preset.

The length is given in epochs, so it follows from the number of pictures: an epoch shows each at each resolution once.
Others report about 100 steps a picture for a subject; a style has more pictures and needs fewer steps for each.
"""

from __future__ import annotations

from .kinds import FULL

PRESETS: dict[str, dict[str, object]] = {
    # Near and far views at two sizes; a face is not symmetric, so no flip
    "character": {"rank": 16, "alpha": 16.0, "resolution": (512, 768), "epochs": 50, "flip": False},
    # A style is spread over more layers than a subject; grain needs pixels; guidance leans on the empty caption
    "style": {
        "rank": 32, "alpha": 32.0, "resolution": (768,), "epochs": 80, "flip": True, "caption_dropout": 0.1
    },
    # Labels and small parts need pixels, and writing must not be mirrored
    "object": {"rank": 16, "alpha": 16.0, "resolution": (768,), "epochs": 100, "flip": False},
    # High noise decides a shape; B that learns faster and a target that is moved away need fewer steps. Together they
    # would change every word. So words and prompts are to be preserved, and an average of steps at a constant rate
    # forgets less than steps at a falling one. Tried on the built-in model: docs/training.md
    "logo": {
        "rank": 16, "alpha": 16.0, "resolution": (512,), "epochs": 115, "flip": False, "batch_size": 2, "lr": 1.6e-4,
        "schedule": "constant", "lora_plus": 4.0, "ema": 0.98, "timesteps": "content", "differential_guidance": 2.0,
        "caption_dropout": 0.0, "preserve_every": 6, "preserve_weight": 10.0,
    },
}  # fmt: skip

_OF_LORAS = ("rank", "alpha", "lr", "schedule", "lora_plus", "ema", "preserve_every", "preserve_weight")


def preset_options(name: str | None, kind: object) -> dict[str, object]:
    """The options of the preset `name`, {} if it is None. The kind full leaves out those of LoRAs."""
    left_out = _OF_LORAS if kind == FULL else ()
    return {option: value for option, value in PRESETS.get(name or "", {}).items() if option not in left_out}
