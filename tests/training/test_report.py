"""What a run shows of itself: held-out loss, previews, metrics, and the page, opened in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.training_runs import Run, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import zimage_mlx
import zimage_ref.training.metrics
from zimage_cli.app import main
from zimage_mlx import Previewed, Validated, ZImagePipeline
from zimage_ref import ConfigError, DatasetError
from zimage_ref.training.chart import Curve, Line, chart
from zimage_ref.training.report import page
from zimage_ref.training.run_folder import RunFolder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def run(shop: Workshop) -> Run:
    return shop.train(
        "shown", steps=6, save_every=4, validation="0.25", validation_every=2, preview_every=3, preview_steps=2,
        preview_prompt=("a <b>fox</b> & an owl", "waves"), preview_size=48,
    )  # fmt: skip


def test_the_held_out_loss_is_measured_at_fixed_sigmas(run: Run) -> None:
    measured = run.of(Validated)
    assert [event.step for event in measured] == [0, 2, 4, 6]
    assert all(list(event.losses) == [0.25, 0.5, 0.75, 1.0] for event in measured)
    assert measured[0].loss == pytest.approx(np.mean(list(measured[0].losses.values())))
    assert len({event.loss for event in measured}) == 4


def test_held_out_pictures_are_not_learned_and_their_noise_is_fixed(shop: Workshop) -> None:
    held = pictures(shop.folder / "held", (32, 48))
    frozen = shop.train("frozen", steps=2, validation=str(held), validation_every=1, lr=1e-9)
    losses = np.array([list(event.losses.values()) for event in frozen.of(Validated)])
    np.testing.assert_allclose(losses, np.broadcast_to(losses[0], losses.shape), rtol=1e-5)
    assert len(set(losses[0])) == 4
    watched, plain = (
        shop.train(f"watched{bool(v)}", steps=2, validation=v, validation_every=1) for v in (str(held), "")
    )
    assert watched.losses == plain.losses and len(plain.of(Validated)) == 0
    assert len(shop.train("fraction", epochs=1, validation="0.5").steps) == 2
    for value, error in (("1.5", ConfigError), ("no-such-folder", DatasetError)):
        with pytest.raises(error, match=value):
            shop.train("refused", validation=value)


def test_previews_come_from_the_same_noise_with_the_lora_of_their_step(shop: Workshop, run: Run) -> None:
    drawn = run.of(Previewed)
    assert [(event.step, event.index) for event in drawn] == [(s, i) for s in (0, 3, 6) for i in (0, 1)]
    shown = {(event.step, event.index): np.asarray(Image.open(event.path), np.int16) for event in drawn}
    assert shown[0, 0].shape == (48, 48, 3)
    assert np.abs(shown[0, 0] - shown[6, 0]).max() > 2 and np.abs(shown[0, 0] - shown[0, 1]).max() > 2
    pipeline = ZImagePipeline.from_pretrained(shop.model)
    for step, loras in ((0, []), (6, [(run.output, 1.0)])):
        (alone,) = pipeline("waves", width=48, height=48, steps=2, seed=1, loras=loras)
        assert np.abs(np.asarray(alone, np.int16) - shown[step, 1]).max() <= 1  # the file is bfloat16


def test_previews_of_a_base_model_are_guided_and_take_more_steps(shop: Workshop, monkeypatch) -> None:
    asked = []
    original = ZImagePipeline.denoise

    def denoise(self, x, captions, steps, guidance):
        asked.append((len(captions), steps, guidance))
        return original(self, x, captions, 1, guidance)

    monkeypatch.setattr(ZImagePipeline, "denoise", denoise)
    monkeypatch.setattr("zimage_ref.generation.presets.is_turbo", lambda scheduler: False)
    shop.train("base", steps=1, preview_prompt="a fox")
    monkeypatch.undo()
    assert asked == [(2, 30, 4.0)] * 2


def test_metrics_have_a_line_for_each_step_measurement_and_preview(run: Run) -> None:
    lines = [json.loads(line) for line in RunFolder(run.output).metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == run.losses
    assert steps[0]["smoothed"] == pytest.approx(run.losses[0]) != steps[1]["smoothed"]  # the first has no past
    assert {"step", "epoch", "smoothed", "lr", "grad_norm", "seconds", "pictures", "peak_memory"} <= steps[0].keys()
    assert all(line["seconds"] > 0 and line["peak_memory"] > 0 for line in steps)
    assert [line["step"] for line in lines if "validation" in line] == [0, 2, 4, 6]
    assert len([line for line in lines if "preview" in line]) == 6


def test_the_page_is_refreshed_while_the_run_goes_on(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zimage_ref.training.metrics, "_REFRESH", 0.0)
    seen = []
    events = zimage_mlx.train(shop.config("refreshed", steps=3))
    for event in events:
        report = shop.folder / "refreshed.run" / "report.html"
        if isinstance(event, zimage_mlx.Step):
            seen.append(re.search(r"<b>(\d+) of 3</b><span>step</span>", report.read_text(encoding="utf-8")))
    assert [match and match[1] for match in seen] == ["1", "2", "3"]


def test_a_chart_stays_small_and_finite() -> None:
    points = [(i, math.sin(i / 500) + 2) for i in range(100_000)]
    svg = chart("t", [Line("wave", "c0", points)], 100_000)
    assert len(svg) < 30_000 and "nan" not in svg
    assert "nothing measured yet" in chart("t", [Line("none", "c0", [])], 0)
    for flat in ([(0, 0.0), (5, 0.0)], [(3, 2.0)], [(0, 1e-9), (1, 2e-9)], [(0, -5.0), (9, 1e9)]):
        assert "polyline" in chart("t", [Line("flat", "c0", flat)], 9)


def test_a_long_curve_has_the_means_of_its_points() -> None:
    assert Curve([(0, 3.0), (1, 5.0)]).points == [(0, 3.0), (1, 5.0)]
    points = Curve((i, i % 2) for i in range(3201)).points
    assert len(points) == 201 and points[-1] == (3200, 0) and points[0] == (7.5, 0.5) and points[199] == (3191.5, 0.5)


def test_a_larger_value_stands_higher_in_a_chart() -> None:
    svg = chart("t", [Line("rising", "c0", [(0, 1.0), (1, 2.0), (2, 4.0)])], 2)
    points = re.search('points="([^"]*)"', svg)
    assert points is not None
    x, y = zip(*(map(float, point.split(",")) for point in points[1].split()), strict=True)
    assert x[0] < x[1] < x[2] and y[0] > y[1] > y[2]  # in SVG, y goes down


def test_a_page_before_the_first_step_and_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x.safetensors")
    assert "no step made yet" in page(run, [], {}, {})
    step = {
        "step": 1, "total": 9, "epoch": 1, "loss": None, "smoothed": None, "lr": 1e-4, "grad_norm": None,
        "seconds": 0.5, "pictures": 1, "peak_memory": 10, "skipped": True,
    }  # fmt: skip
    html = page(
        run,
        [step, {"step": 1, "validation": {"0.5": None}}],
        {"rank": 3, "lr": 1e-4, "steps": None, "trigger": None},
        {},
    )
    assert "<th>steps</th><td>auto</td>" in html and "<th>trigger</th><td>none</td>" in html
    assert "not finite" in html and "steps skipped" in html and "http-equiv=refresh" in html
    assert "http-equiv=refresh" not in page(run, [{**step, "step": 9}], {}, {})


def test_texts_of_a_run_cannot_change_its_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "<i>.safetensors")
    run.previews.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(run.previews / "a.png")
    line = {"step": 1, "index": 0, "prompt": "<b>&", "preview": "previews/a.png"}
    html = page(run, [line], {"trigger": "<u>"}, {"<s>": "<em>"})
    assert "<h3>&lt;b&gt;&amp;</h3>" in html and "<h1>&lt;i&gt;.safetensors</h1>" in html
    assert "&lt;u&gt;" in html and "&lt;em&gt;" in html
    assert not re.search(r"<(b|i|u|s|em)>", html)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_report_opens_in_a_browser_and_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    report = tmp_path / "alone.html"  # far from the run: everything is in it
    shutil.copy(RunFolder(run.output).report, report)
    text = report.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text and "@import" not in text
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    command = [BROWSER, *options, "--window-size=1280,1700", f"--screenshot={shot}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    pixels = np.asarray(Image.open(shot).convert("RGB"), np.int16)
    background = pixels[2, 2]
    inked = np.abs(pixels - background).max(-1) > 40
    assert inked[:200].any() and inked[200:900].mean() > 0.004  # title and tiles; the charts' lines
    blue = (pixels[..., 2] - pixels[..., 0]) > 80
    assert blue.sum() > 200  # the loss curve

    command = [BROWSER, *options, "--dump-dom", report.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=300, text=True).stdout
    assert dom.count("<polyline") >= 8 and dom.count("<img") == 6  # 2 + 4 + 1 + 1 lines; 2 prompts at 3 steps
    assert "a &lt;b&gt;fox&lt;/b&gt; &amp; an owl" in dom and "σ 0.25" in dom and "grad-clip" in dom


def test_the_command_line_logs_plain_lines_without_a_terminal(
    shop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "train", f"--model-dir={shop.model}", f"--dataset={shop.data}", f"--output={shop.folder}/logged.safetensors",
        f"--cache={shop.folder}/cache", "--resolution=32", "--steps=3", "--validation=0.25", "--save-every=2",
    ]  # fmt: skip
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert out.split() == [f"{shop.folder}/logged.step2.safetensors", f"{shop.folder}/logged.safetensors"]
    for fact in ("step 1/3  epoch 1  loss", "step 3/3", "held out", "lr ", "norm ", "s/step", "pictures/s", "min left"):
        assert fact in err, fact
    assert "step 0: held-out loss" in err and "this is Turbo" in err
