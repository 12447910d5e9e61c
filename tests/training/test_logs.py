"""Logs for TensorBoard and Weights & Biases hold every figure of metrics.jsonl, also after a run was resumed."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from support.training_runs import Workshop, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx import Checkpointed, train
from zimage_ref import ConfigError, TrainingError
from zimage_ref.errors import BackendError
from zimage_ref.training.check_options import LOG_NAMES
from zimage_ref.training.metrics_lines import figures, read_lines
from zimage_ref.training.plan import make_plan
from zimage_ref.training.run_folder import RunFolder

OPTIONS: dict[str, Any] = {
    "steps": 3, "resume_every": 1, "validation": "0.25", "preview_prompt": "a fox", "preview_steps": 1,
    "preview_every": 2, "preview_size": 32,
}  # fmt: skip
Figures = dict[int, dict[str, float]]  # step -> name -> value


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("logs"))


def expected(run: RunFolder) -> Figures:
    found: Figures = {}
    for line in read_lines(run):
        found.setdefault(line["step"], {}).update(figures(line))
    return found


def cut(shop: Workshop, name: str, **options: Any) -> RunFolder:
    """A run that is left after its third step, when the state of the second is saved."""
    events = train(shop.config(name, **OPTIONS, **options))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 2):
        pass
    next(events)
    events.close()
    return RunFolder(shop.config(name).output)


@pytest.fixture(scope="module")
def tensorboard() -> Callable[[RunFolder], Any]:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
    )

    def read(run: RunFolder) -> Any:
        events = accumulator.EventAccumulator(str(run.tensorboard), size_guidance={"images": 0, "scalars": 0})
        return events.Reload()

    return read


def scalars(events: Any) -> Figures:
    found: Figures = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.get(event.step, {}), f"{name} stands twice at step {event.step}"
            found.setdefault(event.step, {})[name] = event.value
    return found


def compare(actual: Figures, wanted: Figures) -> None:
    assert actual.keys() == wanted.keys()
    for step, values in wanted.items():
        assert actual[step] == pytest.approx(values, rel=1e-6)


def test_tensorboard_reads_every_figure_and_preview_and_the_lora_is_the_same(
    shop: Workshop, tensorboard: Callable[[RunFolder], Any]
) -> None:
    run = shop.train("board", **OPTIONS, log="tensorboard")
    folder = RunFolder(run.output)
    events = tensorboard(folder)
    compare(scalars(events), expected(folder))
    shown = events.Images("previews/0 a fox")
    assert [image.step for image in shown] == [0, 2, 3]
    for image in shown:
        drawn = Image.open(io.BytesIO(image.encoded_image_string))
        assert drawn.tobytes() == Image.open(folder.previews / f"step{image.step}-0.png").tobytes()
        assert (image.width, image.height) == drawn.size == (32, 32)
    assert f"the log for TensorBoard is {folder.tensorboard}" in run.notices
    plain = shop.train("plain", **OPTIONS)
    assert run.bytes == plain.bytes
    assert not RunFolder(plain.output).tensorboard.exists() and not RunFolder(plain.output).wandb.exists()
    found = expected(folder)
    assert {"loss", "smoothed", "lr", "grad_norm", "seconds", "pictures", "peak_memory"} <= found[3].keys()
    assert {"held_out/0.25", "held_out/1.0", "held_out/mean"} <= found[3].keys() and "step" not in found[3]
    assert "held_out/mean" in found[0] and "loss" not in found[0]


def test_a_resumed_run_goes_on_in_the_same_tensorboard_log(
    shop: Workshop, tensorboard: Callable[[RunFolder], Any]
) -> None:
    folder = cut(shop, "board-cut", log="tensorboard")
    assert 3 in scalars(tensorboard(folder))  # it is made again
    shop.train("board-cut", **OPTIONS, log="tensorboard", resume=True)
    compare(scalars(tensorboard(folder)), expected(folder))
    assert len(list(folder.tensorboard.iterdir())) == 2
    shop.train("board-cut", **{**OPTIONS, "steps": 1}, log="tensorboard", overwrite=True)
    assert set(scalars(tensorboard(folder))) == {0, 1}  # a new run has a new log


@pytest.mark.slow
def test_a_log_that_a_resumed_run_is_given_later_holds_the_steps_before(
    shop: Workshop, tensorboard: Callable[[RunFolder], Any]
) -> None:
    folder = cut(shop, "board-late")
    shop.train("board-late", **OPTIONS, log="tensorboard", resume=True)
    compare(scalars(tensorboard(folder)), expected(folder))
    assert [image.step for image in tensorboard(folder).Images("previews/0 a fox")] == [0, 2, 3]


@pytest.mark.parametrize("name", LOG_NAMES)
def test_a_missing_package_is_named_before_anything_is_read(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    fact = rf"`log` {name} needs the package {name}: pip install 'zimage-mlx\[{name}\]'"
    with pytest.raises(BackendError, match=fact):
        make_plan(shop.config("missing", log=name))
    with pytest.raises(ConfigError, match=f"`log` 'csv' is unknown: known are {', '.join(LOG_NAMES)}"):
        shop.config("unknown", log="csv")


class Recorder(ModuleType):
    """A stand-in for wandb, which keeps what it is given."""

    class Error(Exception):
        """wandb's own error."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.mode, self.known, self.fails = "offline", True, 10**9
        self.begun: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.ended = 0
        self.Settings = dict

    @staticmethod
    def Image(path: str) -> tuple[int, int]:  # noqa: N802
        with Image.open(path) as picture:
            return picture.size

    def setup(self) -> Any:
        return type("Setup", (), {"settings": type("Settings", (), {"mode": self.mode})})

    def login(self, prompt: bool) -> bool:
        assert not prompt
        return self.known

    def init(self, **how: Any) -> Any:
        if self.mode == "broken":
            raise self.Error("no network.\nand more")
        self.begun.append(how)
        define_metric = lambda _, name, step_metric: self.begun[-1].update(axis=(name, step_metric))  # noqa: E731
        return type("Run", (), {
            "offline": True, "define_metric": define_metric,
            "log": lambda _, line: self.log(line), "finish": lambda _: self.finish(),
        })()  # fmt: skip

    def log(self, line: dict[str, Any]) -> None:
        if len(self.lines) >= self.fails:
            raise self.Error("the service has ended")
        self.lines.append(line)

    def finish(self) -> None:
        self.ended += 1

    @property
    def latest(self) -> Figures:
        """The figures of each step; of a step that was made twice, those of the second time."""
        found: Figures = {}
        for line in self.lines:
            values = {name: value for name, value in line.items() if name != "step" and not isinstance(value, tuple)}
            found.setdefault(line["step"], {}).update(values)
        return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    stand_in = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


@pytest.mark.slow
def test_wandb_gets_every_figure_and_preview_and_a_resumed_run_has_its_id(shop: Workshop, recorder: Recorder) -> None:
    folder = cut(shop, "weights", log="wandb")
    assert recorder.ended == 1
    shop.train("weights", **OPTIONS, log="wandb", resume=True)
    assert recorder.ended == 2
    compare(recorder.latest, expected(folder))
    assert [line["step"] for line in recorder.lines if "previews/0 a fox" in line] == [0, 2, 3]
    first, second = recorder.begun
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["axis"] == ("*", "step")
    assert first["dir"] == str(folder.path) and first["config"]["rank"] == 2 and first["project"] == "zimage"
    shop.train("weights", **{**OPTIONS, "steps": 1}, log="wandb", overwrite=True)
    assert recorder.begun[2]["id"] != first["id"]


def test_wandb_that_cannot_begin_ends_the_run_before_it_starts(shop: Workshop, recorder: Recorder) -> None:
    recorder.mode, recorder.known = "online", False
    with pytest.raises(ConfigError, match="`log` wandb: nobody is logged in: run `wandb login`, or set WANDB_MODE"):
        make_plan(shop.config("anonymous", log="wandb"))
    recorder.mode = "broken"
    with pytest.raises(TrainingError, match="`log` wandb: no network: run `wandb login`"):
        shop.train("offline", **OPTIONS, log="wandb")


def test_wandb_that_fails_later_does_not_end_the_run(shop: Workshop, recorder: Recorder) -> None:
    recorder.fails = 2
    run = shop.train("failing", **OPTIONS, log="wandb")
    assert run.notices.count("`log` wandb ends at step 1, the run goes on: the service has ended") == 1
    assert len(run.steps) == 3 and recorder.ended == 1 and len(recorder.lines) == 2


@pytest.mark.slow
def test_wandb_itself_keeps_every_figure_offline(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = cut(shop, "real", log="wandb")
    shop.train("real", **OPTIONS, log="wandb", resume=True)
    found: Figures = {}
    files = sorted(folder.wandb.glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two sessions of one run
    for file in files:
        for values in history(file):
            own = ("_", "previews")
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not k.startswith(own)}
            found.setdefault(int(numbers.pop("step")), {}).update(numbers)
    compare(found, expected(folder))
    media = {path.name for path in folder.wandb.glob("offline-run-*/files/media/**/*.png")}
    assert len(media) == 3


def history(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of wandb's, in their order: records of a LevelDB log after 7 bytes, with any fragments."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # no header fits into the block
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or the last fragment
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
