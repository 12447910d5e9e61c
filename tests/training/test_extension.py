"""One table of optimizers: each entry says what MLX's optimizer does, and one more entry is one more optimizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.training_runs import Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from zimage_cli.app import main
from zimage_mlx import Checkpointed, Done, train
from zimage_mlx.training.optimizer import make_optimizer
from zimage_ref import ConfigError, TrainConfig
from zimage_ref.training.optimizers import OPTIMIZERS, OptimizerKind

SIDE = 64  # of a matrix


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_as_many_values_as_its_entry_says(name: str) -> None:
    kind, config = OPTIMIZERS[name], TrainConfig(Path("m"), Path("d"), optimizer=name)
    optimizer, matrix = make_optimizer(config), mx.ones((SIDE, SIDE))
    parameters = {"matrix": matrix if kind.by_matrix else matrix.flatten()}
    optimizer.init(parameters)
    optimizer.apply_gradients(parameters, parameters)
    kept = sum(array.nbytes for _, array in tree_flatten(optimizer.state["matrix"])) / 4
    assert 0 <= kept - kind.slots * matrix.size <= 2 * SIDE  # or a value for each row and column


def test_only_those_that_look_at_rows_and_columns_need_matrices() -> None:
    """The others make the same of a matrix as of a vector."""
    rows = mx.arange(1.0, 13.0).reshape(3, 4)
    for name, kind in OPTIMIZERS.items():
        config, results = TrainConfig(Path("m"), Path("d"), optimizer=name), []
        for parameter in (rows, rows.flatten()):
            optimizer = make_optimizer(config)
            optimizer.learning_rate = 0.1
            optimizer.init({"p": parameter})
            for _ in range(2):
                parameter = optimizer.apply_gradients({"p": parameter * parameter}, {"p": parameter})["p"]
            results.append(parameter.flatten())
        assert mx.array_equal(*results).item() != kind.by_matrix, name


class Signs(optim.Optimizer):
    """An optimizer that MLX does not have, with three values for each parameter; it wants matrices."""

    def __init__(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        assert parameter.ndim == 2
        state.update({slot: mx.zeros_like(parameter) for slot in "abc"})

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["a"] = state["a"] + gradient
        return parameter - self.learning_rate * mx.sign(state["a"])


def test_one_entry_adds_an_optimizer(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="`optimizer` 'signs' is unknown"):
        shop.config("refused", optimizer="signs")
    monkeypatch.setattr(optim, "Signs", Signs, raising=False)
    monkeypatch.setitem(OPTIMIZERS, "signs", OptimizerKind("Signs", slots=3, by_matrix=True))

    run = shop.train("signs", optimizer="signs", steps=3)
    assert run.of(Done) and len(run.steps) == 3 and run.vector("B").any()
    events = train(shop.config("stopped", optimizer="signs", steps=3, resume_every=1))
    while not isinstance(next(events), Checkpointed):
        pass
    events.close()
    assert shop.train("stopped", optimizer="signs", steps=3, resume=True).bytes == run.bytes  # its state is saved, too

    memory = {}
    for name in ("signs", "adamw"):
        argv = [f"--model-dir={shop.model}", f"--dataset={shop.data}", f"--output={shop.folder}/dry.safetensors"]
        assert main(["train", *argv, f"--optimizer={name}", "--rank=4096", "--resolution=32", "--dry-run"]) == 0
        found = re.search(r"LoRA and optimizer\D*([\d.]+)", capfd.readouterr().out)
        assert found
        memory[name] = float(found[1])
    assert memory["signs"] / memory["adamw"] == pytest.approx(5 / 4, abs=0.02)  # of 2 + 3 values and of 2 + 2
