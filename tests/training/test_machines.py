"""Several processes that train one LoRA together, over MLX's ring on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.training_runs import Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.training import machines
from zimage_mlx.training.machines import Machines
from zimage_ref.errors import TrainingError
from zimage_ref.options_file import dump_options
from zimage_ref.training.run_folder import RunFolder

if not mx.distributed.is_available("ring"):
    pytest.skip("this build of MLX has no ring to train over", allow_module_level=True)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = workshop(tmp_path_factory.mktemp("machines"))
    sizes = [(40, 40), (44, 40), (40, 44), (64, 32), (64, 36)]  # three of one shape, two of another: uneven shares
    return Workshop(shop.folder, shop.model, pictures(shop.folder / "shapes", *sizes))


def together(
    shop: Workshop, name: str, ranks: int = 2, late: float = 0.0, **options: Any
) -> list[subprocess.CompletedProcess[str]]:
    """Trains in `ranks` processes, as `mlx.launch` would start them; the last one `late` seconds later in its work."""
    ports = [_free_port() for _ in range(ranks)]
    hosts = shop.folder / f"{name}-hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]), encoding="utf-8")
    file = shop.folder / f"{name}.toml"
    file.write_text(dump_options(shop.config(name, **options)), encoding="utf-8")
    command = [sys.executable, "-m", "zimage_cli", "train", "--config", str(file)]
    started = []
    wait = f"import time; from zimage_mlx.training.machines import Machines as M; agree = M.agree; \
M.agree = lambda self, facts: (time.sleep({late}), agree(self, facts))[1]; \
import sys; from zimage_cli.app import main; sys.exit(main(sys.argv[1:]))"
    for rank in range(ranks):
        if late and rank == ranks - 1:
            command = [sys.executable, "-c", wait, *command[3:]]
        environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    return done


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_machines_with_batch_b_train_as_one_with_batch_2b(shop: Workshop) -> None:
    alone = shop.train("alone", batch_size=2, epochs=1, rank_dropout=0.3)
    first, second = together(shop, "ring", batch_size=1, epochs=1, rank_dropout=0.3)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert str(shop.folder / "ring.safetensors") in first.stdout
    assert not (second.stdout + second.stderr).strip()  # only the first writes and reports
    lines = [json.loads(line) for line in (shop.folder / "ring.run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in lines] == [step.pictures for step in alone.steps]
    assert {step.pictures for step in alone.steps} == {1, 2}
    assert [line["loss"] for line in lines] == pytest.approx(alone.losses, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([s.grad_norm for s in alone.steps], rel=1e-3)
    ours, theirs = (RunFolder(shop.folder / f"{name}.safetensors").latest()[0] for name in ("ring", "alone"))
    assert ours is not None and theirs is not None
    for name, array in theirs.tensors["lora"].items():
        np.testing.assert_allclose(ours.tensors["lora"][name], array, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("fact", ["total", "batch", "dataset", "model", "adapter", "begins_with"])
def test_machines_compare_every_fact_that_decides_the_result(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: Any = {
        "config": {}, "total": 4, "batch": 2, "dataset": "d", "model": {"vae": "v"}, "adapter": None,
        "begins_with": None, "environment": {},
    }  # fmt: skip
    machine, told = Machines(lambda: False), list[mx.array]()
    machine.alone = False
    monkeypatch.setattr(machines, "greatest", lambda array, group: told.append(array) or array)
    machine.agree(facts)  # as the other machine: what it tells is noted
    others = told * 2
    monkeypatch.setattr(machines, "greatest", lambda array, group: mx.maximum(array, others.pop(0)))
    machine.agree(facts)
    with pytest.raises(TrainingError, match="the machines differ in pictures, model or options"):
        machine.agree({**facts, fact: "another"})


def test_all_machines_stop_if_one_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, others = Machines(lambda: False), iter([0.0, 1.0])  # how many of the others were asked
    machine.alone = False
    monkeypatch.setattr(machines, "summed", lambda array, group: array + next(others))
    assert [machine.asked_to_stop() for _ in range(2)] == [False, True]


@pytest.mark.slow
def test_a_machine_that_cannot_go_on_ends_the_others_in_one_line(shop: Workshop) -> None:
    (shop.folder / "ends.run").mkdir()
    with RunFolder(shop.folder / "ends.safetensors").locked():
        first, second = together(shop, "ends", steps=4)
    assert first.returncode == second.returncode == 1
    assert "another run is writing it" in first.stderr
    assert "error: another machine of the group is gone" in second.stderr and "Traceback" not in second.stderr


@pytest.mark.slow
def test_machines_resume_from_what_the_first_one_saved(shop: Workshop) -> None:
    whole = together(shop, "whole", steps=4)
    part = together(shop, "part", steps=2)
    rest = together(shop, "part", steps=4, resume=True, resume_anyway=True)
    assert [d.returncode for d in (*whole, *part, *rest)] == [0] * 6, rest[0].stderr + rest[1].stderr
    assert (shop.folder / "part.safetensors").read_bytes() == (shop.folder / "whole.safetensors").read_bytes()


@pytest.mark.slow
def test_a_machine_may_be_late(shop: Workshop) -> None:
    """The others wait: MLX's ring has no limit, and the GPU has no part in it."""
    both = together(shop, "late", steps=2, late=10.0)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert (shop.folder / "late.safetensors").is_file()
