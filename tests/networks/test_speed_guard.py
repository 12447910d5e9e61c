"""What keeps it fast, without a clock: operations per block, dtypes on the way, programs compiled, memory held."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.networks import HAS_MLX, mlx_only, network, pipeline

from zimage_ref.model import parameters

if HAS_MLX:
    import mlx.core as mx

    import zimage_mlx.networks.compiled
    import zimage_mlx.networks.running
    import zimage_mlx.networks.transformer
    from zimage_mlx.lora import layers as lora_layers
    from zimage_mlx.training import block_gradient

pytestmark = mlx_only
WEIGHTS = tiny.random_weights(parameters.transformer_parameters(tiny.TRANSFORMER))


def block_and_inputs(dtype: str = "bfloat16") -> tuple[Any, Any]:
    model = network("mlx", "transformer", tiny.TRANSFORMER, WEIGHTS, dtype)
    layout = model.layout([3], 12, 20)
    x = mx.zeros((1, layout.rotation[0].shape[1], tiny.TRANSFORMER.dim), model.dtype)
    adaln = mx.zeros((1, tiny.TRANSFORMER.adaln_dim), model.dtype)
    mx.eval(x, adaln)
    return model.layers[0], (x, layout.rotation, None, adaln)


def operations(y: Any, path: Path) -> Counter[str]:
    """How often each operation is in the graph that makes y."""
    mx.export_to_dot(str(path), y)
    return Counter(re.findall(r'label ="(\w+)"', path.read_text(encoding="utf-8")))


def test_a_block_makes_no_more_products_and_copies_than_it_needs(tmp_path: Path) -> None:
    block, inputs = block_and_inputs()
    count = operations(block(*inputs), tmp_path / "block.dot")
    assert count["Matmul"] + count["AddMM"] == 7 + 2 + 2 + 1  # Linear, rotation of q and k, attention, modulation
    assert count["Concatenate"] == count["Gather"] == count["Select"] == 0  # no mask where nothing is masked


def test_scales_and_gates_take_one_small_kernel_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kernels limits small pictures. The program is traced and not built, which would take a compiler."""
    monkeypatch.setattr(zimage_mlx.networks.compiled, "on_gpu", lambda: True)
    block, inputs = block_and_inputs()
    program = zimage_mlx.networks.compiled.PerBlock(zimage_mlx.networks.running._call)
    count = operations(program(block, *inputs), tmp_path / "program.dot")
    modulations = {name: n for name, n in count.items() if name.endswith(("AddMultiply", "TanhMultiply"))}
    assert sum(modulations.values()) == 4 and count["Multiply"] == count["Tanh"] == 0
    assert count["Add"] == 2  # of the two halves to the stream


def test_nothing_promotes_the_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Linear layer of a block is given bfloat16, also where LoRAs of float32 are beside it."""
    seen = []
    block, inputs = block_and_inputs()
    lora_layers.add_trainable_loras(block, ["attention.to_q", "feed_forward.w2"], 2, 2.0, np.random.default_rng(0))
    call = zimage_mlx.networks.transformer.nn.Linear.__call__
    monkeypatch.setattr(
        zimage_mlx.networks.transformer.nn.Linear, "__call__", lambda self, x: seen.append(x.dtype) or call(self, x)
    )
    assert block(*inputs).dtype == mx.bfloat16
    assert len(seen) == 8 and set(seen) == {mx.bfloat16}


def test_programs_serve_all_blocks_steps_and_pictures(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zimage_mlx.networks.running, "on_gpu", lambda: True)
    mx.disable_compile()  # counts programs without building them
    try:
        pipe = pipeline("mlx", model_dir)
        for prompt in ("a fox", "an owl"):
            pipe(prompt, width=32, height=48, steps=2)
        assert pipe.transformer.run.programs == 2  # blocks with and without modulation
    finally:
        mx.enable_compile()


def test_every_block_is_computed_once_and_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued block by block, waited for one block later: neither all at once nor each on its own."""
    block, inputs = block_and_inputs("float32")
    events: list[str] = []
    monkeypatch.setattr(zimage_mlx.networks.running.mx, "async_eval", lambda *a: events.append("queue"))
    monkeypatch.setattr(zimage_mlx.networks.running.mx, "eval", lambda *a: events.append("wait"))
    run, x = zimage_mlx.networks.running.BlockRunner(), inputs[0]
    for _ in range(3):
        x = run(block, x, *inputs[1:])
    assert events == ["queue", "queue", "wait", "queue", "wait"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["in pieces", "whole"])
def test_generation_computes_nothing_for_a_gradient(how: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a program returns is computed. So each returns one array, the stream."""
    block, inputs = block_and_inputs()
    running, evaluated = zimage_mlx.networks.running, list[Any]()
    monkeypatch.setattr(running, "on_gpu", lambda: compiled)
    monkeypatch.setattr(running.mx, "async_eval", lambda *trees: evaluated.extend(trees))
    run = running.RunInPieces(compiled).block if how == "in pieces" else running.BlockRunner()
    run(block, *inputs)
    assert len(evaluated) == (2 if how == "in pieces" else 1)
    assert all(isinstance(tree, mx.array) and tree.shape == inputs[0].shape for tree in evaluated)


def test_the_gradient_of_a_block_makes_no_more_products_than_it_needs(tmp_path: Path) -> None:
    block, (x, *context) = block_and_inputs()
    layers = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    lora_layers.add_trainable_loras(
        block, [*layers, *(f"feed_forward.w{i}" for i in (1, 2, 3))], 2, 2.0, np.random.default_rng(0)
    )
    context = block_gradient.BlockContext(*context)
    y, kept = block_gradient.forward(block, x, context)
    mx.eval(y, kept)
    d, _, gradients = block_gradient.backward(block, kept, context, mx.ones_like(y))
    count = operations([d, *gradients.values()], tmp_path / "gradient.dot")
    # of seven Linear layers: input; hidden, its gradient, A, B of their LoRAs; attention; rotations, again and back
    assert count["Matmul"] == 7 + 4 * 7 + 5 + 2 + 2
    assert count["AddMM"] == 7  # the input's gradient through the LoRA, added to that through the layer
    assert count["Select"] == 0
