"""Step caches: decisions and values of diffusers' hooks, the same in both engines, for each row of a batch alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import cases, controls, tiny
from support.daily import daily
from support.networks import BACKENDS, PARAMETERS, long_only, mlx_only, native, network, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.generation.caching import CACHES, CacheChoice
from zimage_ref.generation.provenance import Repeat
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.generation.steering import passes_of
from zimage_ref.model.step_cache import Taylor, stretched

STEPS, THRESHOLD = 16, 0.5
RATIOS = tuple(1 + 0.02 * np.sin(np.arange(9)))
WAYS = {
    "first-block": CacheChoice("first-block", threshold=THRESHOLD),
    "taylor": CacheChoice("taylor", interval=4),
    "mag": CacheChoice("mag", ratios=RATIOS),
}
HOW: dict[str, Any] = {
    "width": 32, "height": 48, "steps": 10, "guidance": 2.0, "output": "latents",
}  # fmt: skip
PROMPTS = ["waves", "a picture of soft waves and a red fox in the snow, " * 3]


def drift(seed: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents (1, C, h, w) and times (1,) of STEPS steps, which change slowly and sometimes more."""
    rng, config = np.random.RandomState(seed), tiny.TRANSFORMER
    x = rng.standard_normal((1, config.in_channels, 6, 10))
    steps = []
    for i in range(STEPS):
        x = x + (0.5 if i % 5 == 4 else 0.08) * rng.standard_normal(x.shape)
        steps.append((x.astype(np.float32), np.array([0.4 + 0.001 * i], np.float32)))
    return steps


def walked(backend: str, choice: CacheChoice, seed: int, dtype: str) -> tuple[list[Any], list[int]]:
    """The outputs of the small transformer along `drift`, and how many steps were computed after each."""
    config = replace(tiny.TRANSFORMER, n_layers=3)
    weights = tiny.random_weights(PARAMETERS["transformer"](config), salt=f"cache {seed} ")
    model, cache = network(backend, "transformer", config, weights, dtype), choice.make(STEPS)
    caption = cases.transformer_inputs(config, "padded", seed)["caption0"]
    conditioning = replace(model.condition([native(backend, caption)], 6, 10), cache=cache)
    outputs, counts = [], []
    for x, t in drift():
        outputs.append(model.denoise(native(backend, x), native(backend, t), conditioning))
        counts.append(cache.computed)
    return outputs, counts


@mlx_only
@pytest.mark.parametrize("way", WAYS)
def test_both_engines_decide_alike_and_compute_the_same(way: str) -> None:
    (mine, mine_counts), (theirs, counts) = (walked(b, WAYS[way], 3, d) for b, d in
                                             (("mlx", "float32"), ("numpy", "float64")))  # fmt: skip
    assert mine_counts == counts and 2 < counts[-1] < STEPS - 4
    for a, b in zip(mine, theirs, strict=True):
        assert_parity(a, b, "twin")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_hooks_of_diffusers_decide_alike_and_compute_the_same(way: str, backend: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra `oracle`)")
    import torch
    from diffusers import hooks
    from support import official

    apply: dict[str, Any] = {
        "first-block": lambda m: hooks.apply_first_block_cache(m, hooks.FirstBlockCacheConfig(threshold=THRESHOLD)),
        "taylor": lambda m: hooks.apply_taylorseer_cache(m, hooks.TaylorSeerCacheConfig(
            cache_interval=4, cache_identifiers=[r"layers\.\d+"], taylor_factors_dtype=torch.float64
        )),
        "mag": lambda m: hooks.apply_mag_cache(
            m, hooks.MagCacheConfig(mag_ratios=list(RATIOS), num_inference_steps=STEPS)
        ),
    }  # fmt: skip
    seed = 3
    config = replace(tiny.TRANSFORMER, n_layers=3)
    weights = tiny.random_weights(PARAMETERS["transformer"](config), salt=f"cache {seed} ")
    model = official.transformer(config, weights)
    # the hook looks for an argument of this name, and the blocks of this model call it x
    names = hooks._helpers.TransformerBlockRegistry.get(type(model.layers[0]))
    names._cached_parameter_indices = {"hidden_states": 0}
    calls: list[int] = []
    last = model.layers[-1].feed_forward
    whole = last.forward
    last.forward = lambda *a, **k: (calls.append(1), whole(*a, **k))[1]
    apply[way](model)
    hooks.hooks._set_cache_context(model, hooks.hooks.CacheContext("cond"))
    caption = cases.transformer_inputs(config, "padded", seed)["caption0"]
    dtype = "float64" if backend == "numpy" else "float32"
    outputs, counts = walked(backend, WAYS[way], seed, dtype)
    for (x, t), mine, count in zip(drift(), outputs, counts, strict=True):
        expected = official.denoise(model, x, t, [caption])
        assert len(calls) == count
        assert_parity(mine, expected, "golden", dtype)
    assert 2 < len(calls) < STEPS - 4


def made(pipe: Any, prompts: list[str], **options: Any) -> list[np.ndarray]:
    force = {"cache_min_steps": 1} if "cache" in options else {}
    return [np.asarray(x) for x in pipe(prompts, **(HOW | force | {"seed": 3} | options))]


@pytest.mark.parametrize("cache", daily(["first-block:0.55", "taylor:3", "mag"], "first-block:0.55"))
def test_a_picture_depends_on_no_other_of_its_batch(pipe: Any, cache: str) -> None:
    together = made(pipe, PROMPTS, cache=cache)
    alone = [made(pipe, [prompt], cache=cache, seed=3 + i)[0] for i, prompt in enumerate(PROMPTS)]
    for a, b, plain in zip(together, alone, made(pipe, PROMPTS), strict=True):
        assert_parity(a, b, "same")
        assert np.abs(a - plain).max() > 1e-4 * np.abs(plain).max(), "the cache did nothing"


@mlx_only
@pytest.mark.slow
@pytest.mark.parametrize("cache", ["first-block:0.55", "taylor:3"])
def test_each_tile_of_a_second_pass_has_its_own_state(cache: str, reference: Any, model_dir: Path) -> None:
    second = {"width": 64, "upscale": 2.0, "tile_size": 64, "upscale_strength": 0.8}
    plain, theirs = made(reference, PROMPTS[:1], **second), made(reference, PROMPTS[:1], cache=cache, **second)
    assert_parity(made(pipeline("mlx", model_dir), PROMPTS[:1], cache=cache, **second)[0], theirs[0], "twin")
    assert np.abs(theirs[0] - plain[0]).max() > 1e-3 * np.abs(plain[0]).max()


@mlx_only
@pytest.mark.parametrize("cache", ["first-block:0.55", "taylor:3"])
def test_lean_and_streamed_weights_give_the_same_picture(cache: str, model_dir: Path) -> None:
    plain, lean, streamed = (
        made(pipeline("mlx", model_dir, **mode), PROMPTS[:1], cache=cache)[0]
        for mode in ({}, {"lean": True}, {"stream": True})
    )
    assert_parity(lean, plain, "same")
    np.testing.assert_array_equal(lean, streamed)


def test_a_change_of_captions_or_control_begins_anew(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    restarts: list[int] = []
    begin = Taylor.restart
    monkeypatch.setattr(Taylor, "restart", lambda self: (restarts.append(self.asked), begin(self))[1])
    picture = Image.new("RGB", (64, 48), "gray")
    net = controls.write(tmp_path / "net", controls.SMALL["lite"])
    control = {"control": str(net), "control_image": picture, "control_end": 0.5}
    for options, expected in (({}, [0, 0]), ({"variety": 0.5, "variety_until": 0.2}, [0, 0, 4]), (control, [0, 0, 10])):
        restarts.clear()
        made(pipe, PROMPTS[:1], cache="taylor:4", **options)
        assert restarts == expected  # of two rows a step


class Steady:
    """Layers of two rows that add the same in every step."""

    rows, count = 2, 3

    def enter(self) -> np.ndarray:
        return np.ones((2, 4, 5))

    def run(self, stream: np.ndarray, first: int, end: int, rows: Any) -> np.ndarray:
        return stream + (end - first)

    def joined(self, rows: Any) -> np.ndarray:
        return np.concatenate(rows)

    def kept(self, stream: np.ndarray) -> np.ndarray:
        return stream

    def size(self, stream: np.ndarray, row: int) -> float:
        return float(np.abs(stream).mean())

    def growth(self, stream: np.ndarray, before: np.ndarray, row: int) -> float:
        return 1.0


@pytest.mark.parametrize("name", CACHES)
def test_steady_steps_are_spared_until_a_restart(name: str) -> None:
    cache, counts = CacheChoice(name).make(20), []
    for step in range(14):
        if step == 7:
            cache.restart()
        np.testing.assert_array_equal(cache(Steady()), np.full((2, 4, 5), 4.0))
        counts.append(cache.computed // 2)
    assert counts[7] == counts[6] + 1 and counts[6] < 7 and counts[-1] < 14


def test_guidance_that_ends_leaves_the_states_of_the_prompts(pipe: Any) -> None:
    plain = made(pipe, PROMPTS, cfg_truncation=0.6)
    for cache in ("first-block:0.55", "taylor", "mag"):
        for a, b in zip(made(pipe, PROMPTS, cfg_truncation=0.6, cache=cache), plain, strict=True):
            assert 0 < np.abs(a - b).max() < np.abs(b).max()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"cache": "teacache"}, "`cache` 'teacache' is unknown: known are first-block, taylor, mag"),
        ({"cache": "first-block:"}, "after first-block: comes a threshold such as 0.1"),
        ({"cache": "taylor:2.5"}, "after taylor: comes a number of steps such as 4"),
        ({"cache": "first-block:0.1,0.2"}, "after first-block: comes a threshold"),
        ({"cache": "first-block:-1"}, "`cache` 'first-block:-1': -1 must be at least 0"),
        ({"cache": "mag:1,nan"}, "`cache` 'mag:1,nan': nan must be above 0"),
        ({"cache": "taylor:0"}, "`cache` 'taylor:0': 0 must be at least 1"),
        ({"cache": "taylor", "sampler": "heun"}, "`sampler` heun makes two in a step"),
        ({"cache_min_steps": 5}, "`cache_min_steps` needs `cache`"),
        ({"cache": "mag", "cache_min_steps": 0}, "`cache_min_steps` 0 must be at least 1"),
    ],
)
def test_wrong_values_are_refused_in_one_line(options: Any, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateConfig("waves", **options)
    assert fact in str(caught.value) and "\n" not in str(caught.value)


def test_few_steps_are_computed_and_said_so_unless_forced(reference: Any) -> None:
    run, told = GenerationRun(reference, RunSettings()), list[str]()
    config = GenerateConfig("waves", width=64, height=48, steps=8, guidance=0.0, cache="taylor")
    (idle,) = run.make(run.plan([config], told.append))
    assert told == ["`cache` is not used: it acts from 20 steps on, and there are 8. `cache_min_steps` changes this"]
    (forced,) = run.make(run.plan([replace(config, cache_min_steps=8)], told.append))
    assert len(told) == 1 and idle.reused == 0 and forced.reused == 4 / 8  # 0, 1, 2 and 4 are computed


def test_the_memory_estimate_counts_what_is_kept(reference: Any) -> None:
    def bytes_with(**options: Any) -> int:
        config = GenerateConfig("x", width=512, height=512, steps=30, **{"guidance": 0.0, **options})
        stages: Any = reference.memory(reference.plan([config]), 1)
        return int(stages[1].activations)

    kept = {cache: bytes_with(cache=cache) - bytes_with() for cache in CACHES}
    stream = (32 * 32 + 128) * tiny.TRANSFORMER.dim * 4
    assert kept["mag"] >= stream and kept["taylor"] == kept["first-block"] >= 2 * stream
    assert bytes_with(cache="mag", guidance=1.0) - bytes_with(guidance=1.0) >= 2 * stream


def test_the_time_estimate_counts_computed_passes_and_first_block_has_no_more_than_all(reference: Any) -> None:
    def passes(**options: Any) -> int:
        return passes_of(
            reference.plan([GenerateConfig("x", width=64, height=64, steps=50, guidance=0.0, **options)])[0]
        )

    assert passes(cache="taylor:4") == 15  # the first three, and 4, 8, ..., 48
    assert passes(cache="first-block") == passes() == 50


def test_ratios_are_stretched_as_diffusers_does() -> None:
    assert stretched([1.0, 2.0, 3.0], 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert stretched([1.0, 2.0, 3.0], 1) == [3.0]


def test_the_command_line_caches_shows_it_and_repeats_it(tmp_path: Path, model_dir: Path, capsys: Any) -> None:
    first, again, plain = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    common = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--prompt=waves", "--size=32", "--steps=20"]
    assert main([*common, "--cache=taylor:3", f"--output={first}"]) == 0
    shown = capsys.readouterr().err
    assert "taylor:3" in shown and "the step cache spared 55% of the passes" in shown
    assert main(["generate", f"--from-image={first}", f"--output={again}"]) == 0
    assert main([*common, f"--output={plain}"]) == 0
    pictures = [Path(name).read_bytes() for name in (first, again, plain)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert Repeat.read(Path(first)).config().cache == "taylor:3"
    assert "cache" not in Repeat.read(Path(plain)).options


@long_only
@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_half_the_passes_make_nearly_the_same_drawing(cache: str) -> None:
    pipe = pipeline("mlx", Path("tiny"), None)
    prompts = ["a big red star left of a small blue ring on a yellow background", "a red circle", "a blue square"]
    configs = [
        GenerateConfig(p, seed=3 + i, width=128, height=128, steps=50, guidance=4.0) for i, p in enumerate(prompts)
    ]
    shares: list[float] = []

    def drawn(**options: Any) -> list[np.ndarray]:
        requests = pipe.plan([replace(config, **options) for config in configs])
        steps = pipe.generate(requests, batch_size=3, output="array", watch=lambda _, step: shares.append(step.reused))
        return [array for _, array in steps]

    for a, b in zip(drawn(), drawn(cache=cache), strict=True):
        assert -10 * np.log10(np.mean((a - b) ** 2)) > 30  # dB
    assert shares[-1] >= 0.5
