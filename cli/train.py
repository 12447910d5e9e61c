"""zimage train: a LoRA from a folder of captioned pictures."""

from __future__ import annotations

import argparse

from zimage_ref import TrainConfig

from .backends import require_mlx
from .console import Console
from .options import add_fields, from_args

_SMOOTHING = 0.95  # of the loss shown, an average over about the last 20 steps


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage train`."""
    add_fields(parser, TrainConfig)


def run(args: argparse.Namespace, console: Console) -> None:
    """Trains, showing loss, rate and time left, and names each file that is written."""
    config = from_args(TrainConfig, args)
    require_mlx("training")

    console.facts("train", {
        "model": config.model_dir, "dataset": config.dataset, "output": config.output,
        "LoRA": f"rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)}",
        "epochs": config.epochs, "learning rate": f"{config.lr:g}", "resolution": config.resolution,
    })  # fmt: skip
    follow(config, console)


def follow(config: TrainConfig, console: Console) -> list[float]:
    """Trains with a progress bar, names the files written, and returns the loss of every step."""
    mlx = require_mlx("training")
    losses: list[float] = []
    loss, saved = None, []
    with console.progress() as bars:
        for event in mlx.train(config):
            if isinstance(event, mlx.Encoded):
                bars.update("encode", event.done, event.total)
            elif isinstance(event, mlx.Step):
                losses.append(event.loss)
                loss = event.loss if loss is None else _SMOOTHING * loss + (1 - _SMOOTHING) * event.loss
                detail = f"epoch {event.epoch}  loss {loss:.4f}  {event.seconds:.2f} s/step"
                bars.update("train", event.step, event.total, detail)
            else:
                saved.append(event.path)
    for path in saved:
        console.wrote(path)
    return losses
