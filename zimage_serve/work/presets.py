"""Sets of training options to begin with: one for the built-in model, and the presets of the library."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_ref.training.presets import PRESETS

ABOUT = {
    "character": "A person, a pet or a figure: 10 to 30 pictures in different poses, places and light",
    "style": "The look of many pictures: their lines, colours and grain",
    "object": "One thing with its small parts and labels",
    "logo": "A sign, a letter or a logo: one exact shape in many colours. Name its class, and prompts, to be preserved",
}


def presets(own: Mapping[str, object]) -> list[dict[str, object]]:
    """The name, a line of explanation and the options of each set. own: options for the model of this server."""
    about = "Eight drawings of a new word, for the built-in model"
    found: list[dict[str, object]] = [{"name": "lesson", "about": about, "options": own}] if own else []
    for name, options in PRESETS.items():
        found.append({"name": name, "about": ABOUT[name], "options": options})
    return found
