"""A run that is stopped by a signal, or killed, loses nothing that was saved."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.daily import SIGNALS
from support.training_runs import EVERYTHING, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_ref import TrainConfig
from zimage_ref.lora.trained import TRAINED
from zimage_ref.model.flow import TIMESTEP_SAMPLINGS
from zimage_ref.options_file import dump_options
from zimage_ref.training.dataset_options import DatasetOptions
from zimage_ref.training.learning_options import LOSS_WEIGHTS, LOSSES
from zimage_ref.training.optimizers import OPTIMIZERS
from zimage_ref.training.run_folder import RunFolder

_PATIENCE = 300  # seconds: a machine with other work to do may be slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = workshop(tmp_path_factory.mktemp("resume"))
    sizes = [(40, 40), (44, 40), (40, 44), (64, 32), (64, 36)]
    return Workshop(shop.folder, shop.model, pictures(shop.folder / "shapes", *sizes))


@contextmanager
def launched(shop: Workshop, name: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`zimage train` in a process of its own, which does not outlive the test."""
    file = shop.folder / f"{name}.toml"
    file.write_text(dump_options(shop.config(name, **options)), encoding="utf-8")
    command = [sys.executable, "-m", "zimage_cli", "train", "--config", str(file), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _await(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_finishes_the_step_saves_and_exits(shop: Workshop, number: int, code: int) -> None:
    name, options = f"signal{number}", {"steps": 400, "save_every": 2}
    with launched(shop, name, **options) as process:
        _await(shop.folder / f"{name}.step2.safetensors", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == code, err
    saved, _ = RunFolder(shop.folder / f"{name}.safetensors").latest()
    assert saved is not None and 2 <= saved.step < 400
    assert f"stopped after step {saved.step}\n" in err and "go on with --resume\n" in err
    assert "Traceback" not in err and f"{name}.step2.safetensors" in out


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_loses_nothing_saved(shop: Workshop) -> None:
    options = {"steps": 400, "resume_every": 1, "grad_accumulation": 80, "repeats": 80}  # steps last, with any BLAS
    with launched(shop, "impatient", **options) as process:
        _await(shop.folder / "impatient.run" / "resume" / "step1", process)
        time.sleep(0.3)  # the second step has begun
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 130, err
    assert err.strip().endswith("error: interrupted")
    saved, faults = RunFolder(shop.folder / "impatient.safetensors").latest()
    assert saved is not None and saved.step == 1 and not faults


@pytest.mark.slow
def test_kill_9_of_a_run_of_the_whole_transformer_and_resuming_changes_no_bit(shop: Workshop) -> None:
    """Once while the state is written, once at another moment."""
    options: dict[str, Any] = {
        "kind": "full", "rank": 16, "alpha": 16.0, "base_precision": "bf16", "steps": 8, "resume_every": 2,
        "caption_dropout": 0.3, "batch_size": 2, "preserve_prompt": ("an owl", "a tree"), "preserve_every": 2,
    }  # fmt: skip
    assert not _killed(shop, "whole", [], lambda: False, **options)
    expected = (shop.folder / "whole.safetensors").read_bytes()
    for name, part in (("whole-saving", ".step4.tmp"), ("whole-later", "step2")):
        moment = shop.folder / f"{name}.run/resume/{part}"
        assert _killed(shop, name, [], moment.exists, **options)
        assert not _killed(shop, name, ["--resume"], lambda: False, **options)
        assert (shop.folder / f"{name}.safetensors").read_bytes() == expected
        assert not list(shop.folder.glob(f".{name}*")) and not list((shop.folder / f"{name}.run").rglob(".*"))


def _killed(shop: Workshop, name: str, arguments: list[str], ready: Callable[[], bool], **options: Any) -> bool:
    """Runs until `ready`, then kills it; False where it ended before."""
    with launched(shop, name, *arguments, **options) as process:
        while process.poll() is None and not ready():
            time.sleep(0.0005)
        process.kill()
        _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


@pytest.mark.slow
def test_kill_9_at_20_random_moments_and_resuming_changes_no_bit(shop: Workshop) -> None:
    """Seven times while the cache is built, seven while a resume folder is written, else whenever."""
    rng = random.Random(20)
    options = {**EVERYTHING, "steps": 12}
    began = time.monotonic()
    assert not _killed(shop, "never", [], lambda: False, **options, cache=shop.folder / "never-cache")
    length = time.monotonic() - began
    expected = (shop.folder / "never.safetensors").read_bytes()
    kills = {"cache": 0, "save": 0, "any": 0}
    for trial in range(20):
        name, cache = f"kill{trial}", shop.folder / f"kill{trial}-cache"
        kind = ("cache", "save", "any")[trial % 3]
        entries, saving = rng.randrange(1, 14), shop.folder / f"{name}.run/resume/.step{rng.choice((2, 4, 6, 8))}.tmp"
        moment = time.monotonic() + rng.uniform(0.2, 0.8) * length
        ready = {
            "cache": lambda: len(list(cache.rglob("*.safetensors*"))) >= entries,  # noqa: B023
            "save": lambda: saving.exists(),  # noqa: B023
            "any": lambda: time.monotonic() > moment,  # noqa: B023
        }[kind]
        kills[kind] += _killed(shop, name, [], ready, **options, cache=cache)
        assert not _killed(shop, name, ["--resume"], lambda: False, **options, cache=cache)
        assert (shop.folder / f"{name}.safetensors").read_bytes() == expected, f"trial {trial}, {kind}"
        assert not list(shop.folder.glob(f".{name}*")) and not list((shop.folder / f"{name}.run").rglob(".*"))
        assert not list(cache.rglob(".*"))
    print(kills)
    assert kills["cache"] == 7 and kills["save"] >= 6 and kills["any"] >= 5  # a moment may come too late


CAPTIONS = [
    "a {red|green} fox, in snow, at night\nfoxes, two, small",
    "an {old|young} owl, gray\nowl, on a {tree|roof}",
]
# What is drawn, one line for each run of the test below, which also goes through kinds and optimizers
DRAWS: list[dict[str, Any]] = [
    {"caption_lines": True, "caption_choices": True, "caption_dropout": 0.3},
    {"shuffle_tags": True, "keep_tags": 1, "timesteps": "uniform"},
    {"rank_dropout": 0.4, "timesteps": "logit-normal"},
    {"module_dropout": 0.4, "timesteps": "sigmoid"},
    {"dropout": 0.4, "timesteps": "weighted"},
    {"noise_offset": 0.2, "min_sigma": 0.2, "max_sigma": 0.9, "timesteps": "content"},
    {
        "trigger": "fox",
        "preserve": "owl",
        "preserve_prompt": ("a cat", "a tree"),
        "preserve_blank": True,
        "preserve_every": 2,
        "timesteps": "style",
    },
    {"loss": "huber", "loss_weight": "flow-weighted", "timesteps": "beta"},
    {"dropout": 0.3, "module_dropout": 0.3, "rank_dropout": 0.3, "loss": "mae", "timesteps": "shift=3"},
    {"ema": 0.8, "flip": True, "resolution": (32, 48), "batch_size": 2},
    {"regularization": True, "repeats": 2},
    {"differential_guidance": 3.0, "grad_accumulation": 2, "schedule": "linear", "warmup": 3},
    {"base_precision": "4/32", "repeats": 3},
]
KINDS = ("lora", "lokr", "loha", "dora", "dora")  # the place of a kind decides which draws go with it
CASES = [
    {"optimizer": optimizer, "kind": KINDS[i % len(KINDS)], **draws}
    for i, (optimizer, draws) in enumerate(zip(OPTIMIZERS, DRAWS, strict=True))
]


def test_the_cases_below_name_every_kind_optimizer_and_draw() -> None:
    for option, every in (
        ("kind", TRAINED),
        ("optimizer", OPTIMIZERS),
        ("loss", LOSSES),
        ("loss_weight", LOSS_WEIGHTS),
    ):
        default = getattr(TrainConfig("m", "d"), option)
        assert {case.get(option, default) for case in CASES} == set(every), option
    assert {str(case.get("timesteps", "auto")).partition("=")[0] for case in CASES} == {*TIMESTEP_SAMPLINGS, "shift"}


@pytest.fixture(scope="module")
def told(shop: Workshop) -> Workshop:
    """Pictures with captions of which parts are drawn, and others for a regularization set."""
    pictures(shop.folder / "told", (40, 40), (44, 40), captions=CAPTIONS)
    return Workshop(shop.folder, shop.model, shop.folder / "told")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['optimizer']}")
def test_kill_9_and_resuming_changes_no_bit_with_any_kind_optimizer_and_draw(
    told: Workshop, case: dict[str, Any]
) -> None:
    options = {"steps": 24, "resume_every": 2, "lr": 1e-3, "rank": 4, **case}
    if options.pop("regularization", False):
        beside = DatasetOptions(folder=told.folder / "shapes", kind="regularization", weight=0.5)
        options |= {"dataset": None, "datasets": (DatasetOptions(folder=told.data), beside)}
    name = f"{case['kind']}-{case['optimizer']}"
    assert not _killed(told, f"{name}-whole", [], lambda: False, **options)  # in a process: it has the same BLAS
    saved = told.folder / f"{name}.run" / "resume" / f"step{random.Random(name).choice((4, 6, 8))}"
    assert _killed(told, name, [], saved.exists, **options)
    found, _ = RunFolder(told.folder / f"{name}.safetensors").latest()
    assert found is not None and 4 <= found.step < 24
    assert not _killed(told, name, ["--resume"], lambda: False, **options)
    results = [(told.folder / f"{stem}.safetensors").read_bytes() for stem in (name, f"{name}-whole")]
    assert results[0] == results[1]
