"""The groups of options of `zimage train`, in the order that help shows them."""

from __future__ import annotations

from zimage_ref.options import Group


class TrainGroup(Group):
    """The groups of options of `zimage train`."""

    MODEL = "Model"
    DATA = "Pictures and captions"
    LORA = "What is learned"
    PACE = "How far and how fast"
    NOISE = "Noise levels"
    LOSS = "The loss"
    CHECKS = "Held-out loss and previews"
    SAVING = "Saving"
    MEMORY = "Memory"
    RUN = "The run"
