"""Prompts that the text encoder writes: the tokens of transformers, in both engines and all memory modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.networks import BACKENDS, PARAMETERS, mlx_only, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_ref import ConfigError, ModelFolder
from zimage_ref.formats.tensors import Tensor
from zimage_ref.generation import enhancing
from zimage_ref.generation.enhancing import SYSTEM, answer, check_can_write, lots_of
from zimage_ref.generation.provenance import Repeat
from zimage_ref.memory import LEAN, NUMPY, STREAM, LoadedModel, writing_stage
from zimage_ref.model.sampling import TOP_K, drawn, likely
from zimage_ref.networks.weights import Weights
from zimage_ref.networks.writer import Writer

IDS = [7, 3, 250, 11, 11, 90, 4]
GREEDY = repeat(0.0)  # lots that take the most likely token


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends texts early: random weights hardly ever do."""
    monkeypatch.setattr(enhancing, "MAX_NEW", 12)


def writer(backend: str, name: str, broken: bool = False) -> Any:
    """A language model of `backend` with random weights, float64 for NumPy, float32 for MLX. broken: not all finite."""
    config = tiny.TEXT_ENCODERS[name]
    arrays = tiny.random_weights(PARAMETERS["text_encoder"](config), salt="writer 1 ")
    arrays["model.norm.weight"][0] *= np.inf if broken else 1
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    if backend == "numpy":
        return Writer(config, Weights(tensors, np.dtype("float64")))
    import mlx.core as mx

    from zimage_mlx.networks import text_encoder, writer
    from zimage_mlx.networks.weights import load
    from zimage_ref.model.parameters import text_encoder_unused

    spare = {name: tensor for name, tensor in tensors.items() if name in text_encoder_unused(config)}
    encoder, ending = text_encoder.TextEncoder(config), writer.Ending(config, has_head=False)
    load(encoder, {name: tensor for name, tensor in tensors.items() if name not in spare}, mx.float32)
    load(ending, writer.ending_tensors(config, spare, None), mx.float32)
    return writer.Writer(encoder, ending)


def test_tokens_one_by_one_give_what_all_at_once_give() -> None:
    together, apart = writer("numpy", "odd"), writer("numpy", "odd")
    first = together(IDS)
    for token in IDS[:-1]:
        apart([token])
    assert_parity(apart(IDS[-1:]), first, "same", "float64")
    assert_parity(apart([5, 6]), together([5, 6]), "same", "float64")


@mlx_only
@pytest.mark.parametrize("name", tiny.TEXT_ENCODERS)
def test_both_engines_give_the_same_logits(name: str) -> None:
    mine, theirs = writer("mlx", name), writer("numpy", name)
    for ids in (IDS * 40, [5], [6], [1, 2, 3]):  # 280 tokens: more than the room that is taken at once
        assert_parity(mine(ids), theirs(ids), "twin")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tiny.TEXT_ENCODERS)
def test_greedy_tokens_are_those_of_transformers(name: str, backend: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra `oracle`)")
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = tiny.TEXT_ENCODERS[name]
    arrays = tiny.random_weights(PARAMETERS["text_encoder"](config), salt="writer 1 ")
    model = Qwen3ForCausalLM(Qwen3Config(**config.to_json())).double().eval()
    state = {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS), dtype=torch.long), max_new_tokens=40,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(IDS) :].tolist()  # fmt: skip
    made = answer(writer(backend, name), IDS, frozenset(), GREEDY, most=40)
    assert made == expected and len(set(made)) > 2


class Scripted:
    """A writer that gives these tokens, and counts the lots that it takes."""

    def __init__(self, tokens: Callable[[int], int]) -> None:
        self._tokens, self.lots = tokens, list[float]()

    def tokens(self, ids: Any, lots: Iterable[float]) -> Iterator[int]:
        """As `enhancing.Writer`."""
        for i, lot in enumerate(lots):
            self.lots.append(lot)
            yield self._tokens(i)


def test_an_answer_ends_at_a_stop_token_or_the_most() -> None:
    told: list[tuple[int, int]] = []
    counting = Scripted(lambda i: i + 1)
    assert answer(counting, [8, 8], frozenset({4}), lots_of(3), written=lambda *n: told.append(n)) == [1, 2, 3]
    assert [done for done, _ in told] == [1, 2, 3] and len(set(counting.lots)) == 4
    assert counting.lots == list(islice(lots_of(3), 4))
    assert answer(Scripted(lambda i: 2), [1], frozenset({4}), GREEDY, most=5) == [2] * 5


def test_tokens_are_drawn_from_the_likely_ones_by_the_lot() -> None:
    logits = np.log(np.array([0.05, 0.6, 0.3, 0.05]))
    found = np.bincount([drawn(logits, lot) for lot in np.arange(300) / 300], minlength=4) / 300
    assert found[0] == found[3] == 0, "a token beyond the first 80 % was drawn"
    assert abs(found[1] - 0.729) < 0.01  # 0.6 and 0.3, each to the power of 1 / 0.7
    assert drawn(logits, 0.0) == 1 and drawn(logits, 1 - 2**-53) == 2
    first = [next(lots) for lots in map(lots_of, range(300))]
    assert abs(np.mean(first) - 0.5) < 0.06 and min(first) >= 0 and max(first) < 1


def test_the_likely_tokens_are_those_of_a_whole_sort() -> None:
    rng = np.random.default_rng(0)
    for size in (3, TOP_K, 1000):
        logits = rng.integers(0, 40, size).astype(np.float32)  # many are equal
        assert likely(logits).tolist() == np.argsort(-logits, kind="stable")[:TOP_K].tolist()


@mlx_only
def test_both_engines_draw_the_same_tokens() -> None:
    import mlx.core as mx

    from zimage_mlx.networks import writer as ours

    rng = np.random.default_rng(1)
    for size in (2, TOP_K + 1, 5000):
        for lot in (0.0, 0.3, 0.61, 0.8, 0.999, 1 - 2**-53):
            logits = (4 * rng.standard_normal(size)).astype(np.float32)
            assert ours.drawn(mx.array(logits), lot).item() == drawn(logits, lot)
    tied = np.repeat(np.float32([1, 2, 1]), 4)  # bfloat16 makes many equal logits
    assert [ours.drawn(mx.array(tied), lot).item() for lot in (0.0, 0.5)] == [drawn(tied, lot) for lot in (0.0, 0.5)]
    assert drawn(tied, 0.0) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_follow_from_the_lots_one_after_the_other(backend: str) -> None:
    lots = [0.0, 0.9, 0.4, 0.99, 0.2, 0.7]
    step, made = writer(backend, "odd"), list[int]()
    ids = IDS
    for lot in lots:
        made.append(drawn(step(ids), lot))
        ids = made[-1:]
    assert list(writer(backend, "odd").tokens(IDS, lots)) == made
    assert list(writer(backend, "odd").tokens(IDS, [])) == []
    assert list(writer(backend, "odd").tokens(IDS, repeat(0.0, 6))) != made


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_end_the_writing_in_one_line(backend: str) -> None:
    broken = writer(backend, "odd", broken=True)
    with pytest.raises(ConfigError, match="the logits of the text encoder hold numbers that are not finite"):
        list(broken.tokens(IDS, repeat(0.5, 3)))


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_text_follows_from_prompt_seed_and_system(backend: str, model_dir: Path) -> None:
    pipe = pipeline(backend, model_dir)
    text = pipe.enhance("waves", seed=1)
    assert text == pipe.enhance("waves", seed=1, system=SYSTEM)
    assert len({text, pipe.enhance("waves", seed=2), pipe.enhance("snow", seed=1),
                pipe.enhance("waves", seed=1, system="Be brief.")}) == 4  # fmt: skip


@mlx_only
def test_streamed_and_quantized_encoders_write_too() -> None:
    ids, tokens = [1, 2, 3], [5, 6, 7]

    def logits(**how: Any) -> list[np.ndarray]:
        step = pipeline("mlx", Path("tiny"), **how).writer()
        return [step(ids), *(step([token]) for token in tokens)]

    plain = logits()
    for lean, streamed, before in zip(logits(lean=True), logits(stream=True), plain, strict=True):
        assert_parity(lean, before, "same")
        assert_parity(streamed, before, "same")
    lots = [0.9, 0.3, 0.99, 0.6]
    written = [list(pipeline("mlx", Path("tiny"), **how).writer().tokens(ids, lots)) for how in ({}, {"stream": True})]
    assert written[0] == written[1] and len(written[0]) == 4
    coarse = logits(quantize=8, group_size=32)
    for streamed, resident, before in zip(logits(quantize=8, group_size=32, stream=True), coarse, plain, strict=True):
        assert_parity(streamed, resident, "same")
        assert 0 < np.abs(resident - before).max() < 0.2 * np.abs(before).max()


def test_an_encoder_that_cannot_write_is_refused_in_one_line(model_dir: Path) -> None:
    folder = ModelFolder.open(model_dir)
    check_can_write(folder)
    with pytest.raises(ConfigError, match=r"lacks 12 tensors of the last one: give the whole Qwen3-4B as `text_encod"):
        check_can_write(replace(folder, spare={}))
    with pytest.raises(ConfigError, match="has learned nothing but captions"):
        check_can_write(ModelFolder.open(Path("tiny")))


@pytest.mark.usefixtures("brief")
def test_the_command_line_writes_shows_and_records_the_prompt(tmp_path: Path, model_dir: Path, capsys: Any) -> None:
    first, again, other = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    rules, empty = tmp_path / "rules.txt", tmp_path / "empty.txt"
    rules.write_text("Write about the sea.")
    empty.write_text(" \n")
    common = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--size=32", "--steps=1"]
    assert main([*common, "--prompt=waves", "--seed=4", "--enhance", f"--output={first}"]) == 0
    made = Repeat.read(Path(first))
    assert made.options["original_prompt"] == "waves" != made.options["prompt"]
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "written from waves" in shown and str(made.options["prompt"])[:12] in shown
    assert main(["generate", f"--from-image={first}", f"--output={again}"]) == 0
    assert Path(first).read_bytes() == Path(again).read_bytes()
    assert main([*common, "--prompt=waves", "--seed=4", f"--enhance-with={rules}", f"--output={other}"]) == 0
    assert Repeat.read(Path(other)).options["prompt"] != made.options["prompt"]
    assert main(["generate", f"--from-image={first}", "--prompt=snow", "--overwrite", f"--output={other}"]) == 0
    assert "original_prompt" not in Repeat.read(Path(other)).options
    capsys.readouterr()
    for options, fact in (
        ([f"--enhance-with={empty}"], "--enhance-with: the file holds no text"),
        ([f"--enhance-with={tmp_path / 'none.txt'}"], "cannot be read as UTF-8 text"),
    ):
        assert main([*common, "--prompt=waves", *options, f"--output={tmp_path / 'd.png'}"]) == 1
        assert fact in " ".join(capsys.readouterr().err.split())
    assert main(["generate", "--model-dir=tiny", "--prompt=x", "--enhance", f"--output={tmp_path / 'd.png'}"]) == 1
    assert "has learned nothing but captions" in " ".join(capsys.readouterr().err.split())


def test_the_memory_of_writing_counts_the_last_layer_and_what_is_remembered(model_dir: Path) -> None:
    model = LoadedModel(ModelFolder.open(model_dir), "float32")
    config, short, long = model.folder.text_encoder, *(writing_stage(model, NUMPY, 0, n) for n in (10, 1010))
    past = 2 * config.num_hidden_layers * 1000 * config.num_key_value_heads * config.head_dim * 4
    assert long.activations - short.activations == past
    table = config.vocab_size * config.hidden_size * 4
    assert writing_stage(model, STREAM, 5, 10).weights == 5 + table + model.spare_bytes("text_encoder")
    assert writing_stage(model, LEAN, 5, 10).weights == 5 + model.spare_bytes("text_encoder")
    assert model.spare_bytes("text_encoder") == sum(t.nbytes for t in model.folder.spare["text_encoder"].values())
