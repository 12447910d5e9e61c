"""One pipeline for many: open streams, runs that interleave, and threads. Each keeps its own LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cases import random_lora
from support.daily import daily
from support.networks import BACKENDS, mlx_only, pipeline

from zimage_ref import GenerateConfig
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.lora.file import write_lora
from zimage_ref.memory import Mode

SIZE: dict[str, Any] = {"width": 48, "height": 32, "steps": 3}


@pytest.fixture(params=BACKENDS)
def pipe(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    return pipeline(request.param, model_dir)


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    for seed in (1, 2):
        write_lora(tmp_path / f"{seed}.safetensors", random_lora(rank=4, seed=seed), {"rank": 4})
    return [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def latents(pipe: Any, lora: list[Path], **options: Any) -> np.ndarray:
    return pipe("waves", loras=lora, output="latents", **(SIZE | options))[0]


def last(stream: Any) -> np.ndarray:
    return np.array(list(stream)[-1].x)[0]


@pytest.mark.parametrize("mode", daily(["fast", "lean", "stream"], "fast", "stream"))
def test_a_stream_keeps_its_loras_while_others_use_the_pipeline(
    pipe: Any, loras: list[Path], tmp_path: Path, mode: Mode
) -> None:
    pipe.set_mode(mode)
    wanted = [[loras[0]], [loras[1]], []]
    alone = [latents(pipe, lora) for lora in wanted]
    streams = [pipe.stream("waves", loras=lora, **SIZE) for lora in wanted]
    for _ in range(2):
        for stream in streams:  # one step of each in turn
            next(stream)
    latents(pipe, [loras[1]], steps=1)  # a whole call between two steps
    other: Mode = "stream" if mode == "lean" else "lean"
    GenerationRun(pipe, RunSettings(memory=other)).plan([GenerateConfig("x", **SIZE)])
    pipe.set_mode(other)  # another run wants its own mode
    for stream, expected in zip(streams, alone, strict=True):
        np.testing.assert_array_equal(last(stream), expected)
    assert np.abs(alone[0] - alone[1]).max() > 0.05 and np.abs(alone[0] - alone[2]).max() > 0.05


def test_runs_that_interleave_keep_what_was_set_when_they_began(pipe: Any, loras: list[Path]) -> None:
    run = GenerationRun(pipe, RunSettings(keep_model=True), [loras[0]])
    wanted = [GenerateConfig("waves", seed=seed, **SIZE) for seed in (0, 1)]

    def pixels(made: Any) -> np.ndarray:
        return np.asarray(made.picture)

    first = [pixels(made) for made in run.make(run.plan(wanted))]
    second = [pixels(made) for made in run.make(run.plan(wanted, loras=[loras[1]]), loras=[loras[1]])]
    assert (first[0] != second[0]).any()
    one, other = run.make(run.plan(wanted)), run.make(run.plan(wanted), loras=[loras[1]])
    run.use_loras([])  # for later pictures: not for those that were asked for before
    for i in range(2):
        made, theirs = next(one), next(other)
        np.testing.assert_array_equal(pixels(made), first[i])
        np.testing.assert_array_equal(pixels(theirs), second[i])
        assert [lora["file"] for lora in made.record["loras"]] == [str(loras[0])]
        assert [lora["file"] for lora in theirs.record["loras"]] == [str(loras[1])]


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each of `works` returns, each in a thread of its own, at the same time."""
    with ThreadPoolExecutor(len(works)) as threads:
        return [done.result() for done in [threads.submit(work) for work in works]]


def test_threads_get_what_they_asked_for(pipe: Any, loras: list[Path]) -> None:
    wanted = [[loras[0]], [loras[1]], [], [(loras[0], 0.5)]]
    alone = [latents(pipe, lora) for lora in wanted]
    pictures = [np.asarray(pipe.picture(pipe.to_backend(x[None]))) for x in alone]

    def streamed(lora: Any) -> np.ndarray:
        for step in pipe.stream("waves", loras=lora, **SIZE):
            picture = pipe.picture(step.x)
        return np.asarray(picture)

    works = [lambda lora=lora: latents(pipe, lora) for lora in wanted]
    works += [lambda lora=lora: streamed(lora) for lora in wanted]
    for actual, expected in zip(together(*works), alone + pictures, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_stream_may_go_on_in_another_thread(pipe: Any, loras: list[Path]) -> None:
    alone = latents(pipe, [loras[0]])
    stream = pipe.stream("waves", loras=[loras[0]], **SIZE)
    next(stream)
    (end,) = together(lambda: last(stream))
    np.testing.assert_array_equal(end, alone)


def test_a_request_that_waits_for_its_user_blocks_nobody(pipe: Any) -> None:
    stream = pipe.stream("waves", **SIZE)
    next(stream)
    (made,) = together(lambda: latents(pipe, []))  # would wait for ever if the stream held the engine
    assert isinstance(made, np.ndarray)
    stream.close()


def test_a_request_that_fails_leaves_the_pipeline_to_others(pipe: Any, loras: list[Path]) -> None:
    plain = latents(pipe, [])

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    for kind in (
        {"progress": stop},
        {"loras": [loras[0]], "progress": lambda *event: event[0] == "encode" or stop(*event)},
    ):
        with pytest.raises(KeyboardInterrupt):
            pipe("waves", **SIZE, **kind)
        (after,) = together(lambda: latents(pipe, []))
        np.testing.assert_array_equal(after, plain)


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_a_picture_is_there_before_the_next_one_is_begun(pipe: Any, memory: str) -> None:
    stages: list[str] = []
    run = GenerationRun(pipe, RunSettings(memory=memory))
    requests = run.plan([GenerateConfig("waves", seed=seed, **(SIZE | {"steps": 1})) for seed in range(3)])
    made = run.make(requests, progress=lambda stage, done, total: stages.append(f"{stage} {done}"))
    next(made)
    assert stages == ["encode 1", "denoise 1"]
    assert len(list(made)) == 2 and stages[-2:] == ["denoise 3", "decode 3"]


@mlx_only
@pytest.mark.parametrize("roomy", [True, False])
def test_lean_holds_two_networks_only_if_both_fit(
    model_dir: Path, roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline("mlx", model_dir)
    run = GenerationRun(pipe, RunSettings(memory="lean", force=True))
    requests = run.plan([GenerateConfig("waves", seed=seed, **(SIZE | {"steps": 1})) for seed in range(2)])
    _, denoise, decode = pipe.memory(requests, 1, "lean")
    needed = max(denoise.total + decode.weights, decode.total + denoise.weights)
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: needed - (not roomy))
    held = [pipe.loaded for _ in run.make(requests)]
    assert held == [{"transformer", "vae"} if roomy else {"vae"}, {"vae"}]
    assert not pipe.loaded
