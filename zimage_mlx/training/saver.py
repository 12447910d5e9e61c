"""The files that a run leaves: results that can be used at once, and folders to resume from."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import mlx.core as mx
import numpy as np

from zimage_ref import __version__
from zimage_ref.lora.alpha import sidecar
from zimage_ref.lora.trained import DEFAULT_KIND
from zimage_ref.model.parameters import TARGETS
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.events import Checkpointed, Saved
from zimage_ref.training.facts import RunFacts, SavedFacts
from zimage_ref.training.kinds import FULL
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.run_folder import RunFolder, remove_folder

from .learning import Learning

_GROUPS = {  # target -> what is in the name of each of its layers
    "attention": ".attention.", "feed_forward": ".feed_forward.", "refiners": "_refiner.", "adaln": "adaLN_modulation.0"
}  # fmt: skip


class Saver:
    """Saves the result and the state of a learner."""

    def __init__(
        self, plan: TrainPlan, run: RunFolder, learner: Learning, facts: RunFacts, budget: float, unpacks: bool
    ) -> None:
        """facts: what the run is, kept in every resume folder, as is the budget of the gradient.

        unpacks: whether quantized weights are unpacked for products.
        """
        self._plan, self._run, self._learner, self._facts = plan, run, learner, facts
        self._kept_bytes, self._unpacks = budget if math.isfinite(budget) else None, unpacks

    def result(self, path: Path, step: int, event: type[Saved] = Saved) -> Saved:
        """Writes the result as it is after `step` to `path`, and drops those of earlier steps that are not to be kept.

        event: which event it is, Saved or Done.
        """
        with self._run.room_for(self._learner.file_bytes):
            self._learner.write(path, self._record(step))
        self._drop_old(step)
        return event(path, step)

    def state(self, step: int, smoothed: float | None, failures: int) -> Checkpointed:
        """Writes the state that `resume` needs after `step`, with the loss and the failures; see `SavedFacts`."""
        facts: SavedFacts = {
            **self._facts,
            "smoothed": smoothed,
            "failures": failures,
            "kept_bytes": self._kept_bytes,
            "unpacks": self._unpacks,
        }
        return Checkpointed(self._run.save(step, self._learner.state(), facts), step)

    def _drop_old(self, step: int) -> None:
        keep = self._plan.config.keep_last
        if not keep:
            return
        by_step = {number: path for number, path in self._run.results().items() if number <= step}
        for old in sorted(by_step)[:-keep]:
            if by_step[old].is_dir():
                remove_folder(by_step[old])
                continue
            by_step[old].unlink()
            sidecar(by_step[old]).unlink(missing_ok=True)

    def _record(self, step: int) -> dict[str, object]:
        """What the file of a result says about itself."""
        config = self._plan.config
        datasets = [config.settings(number) for number in range(len(config.sets))]
        sides = list(dict.fromkeys(side for each in datasets for side in each.resolution))
        trained = {name: any(part in layer for layer in self._plan.layers) for name, part in _GROUPS.items()}
        of_lora = {
            "rank": config.rank,
            "alpha": config.alpha,
            **{f"target_{target}": on for target, on in trained.items()},
            **_beyond_a_plain_lora(config),
        }
        return {
            "base_model": config.model_dir.resolve().name,
            **({"kind": FULL, "targets": list(config.targets)} if config.kind == FULL else of_lora),
            "steps": step,
            "resolution": sides[0] if len(sides) == 1 else sides,
            "timesteps": config.timesteps,
            "trigger": ", ".join(dict.fromkeys(each.trigger for each in datasets if each.trigger)),
            "training_adapter": config.training_adapter.name if config.training_adapter else "",
            "dataset": self._facts["dataset"],
        }


def _beyond_a_plain_lora(config: TrainConfig) -> dict[str, object]:
    """The facts that a LoRA with common options does not have."""
    found: dict[str, object] = {}
    if config.kind != DEFAULT_KIND:
        found["kind"] = config.kind
    if config.kind == "lokr":
        found["factor"] = config.factor
    if not set(config.targets) <= set(TARGETS):
        found["targets"] = list(config.targets)
    if config.init_lora:
        found["init_lora"] = config.init_lora.name
    return found


def environment() -> dict[str, str]:
    """The software and the machine, for the record."""
    return {
        "zimage-mlx": __version__,
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
    }
