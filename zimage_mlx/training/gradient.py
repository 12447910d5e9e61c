"""The gradient of the flow-matching loss, block by block, last block first.

`value_and_grad` of the whole network keeps every intermediate array of every block. Here each block keeps nine, those
that its matrix products made or its norms need; or only its input, from which the nine are made again. What lies
between them is recomputed, which costs elementwise passes and no matrix product.

    x -> q, k, v -> o -> a -> x + gate norm(a) -> u, w -> f -> x + gate norm(f)       (see transformer.Block)

Source: gradient checkpointing, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_mlx.networks.compiled import PerBlock, Pieces, Settle, call
from zimage_mlx.networks.ops import Rotation, attention_gradient
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.transformer import Block, Layout, Transformer, normed
from zimage_mlx.networks.tree import substituted, trainable
from zimage_ref.memory import residual_values
from zimage_ref.model.flow import add_noise, model_time

from .loss import Batch, flow_matching_error


class Residuals(NamedTuple):
    """What a block's backward pass needs of its forward pass."""

    x: mx.array  # (B, S, D), the input
    q: mx.array  # (B, S, H, K), not yet normed, like k and v
    k: mx.array
    v: mx.array
    o: mx.array  # (B, S, D), attention before its last Linear layer
    a: mx.array  # (B, S, D), after it
    u: mx.array  # (B, S, F), the feed-forward's gate
    w: mx.array  # (B, S, F), its value
    f: mx.array  # (B, S, D), its output
    modulation: Sequence[mx.array | None]  # four (B, 1, D)


def forward(
    block: Block, x: mx.array, rotation: Rotation, mask: mx.array | None, adaln: mx.array | None
) -> tuple[mx.array, Residuals]:
    """The output of `block`, and the residuals."""
    modulation = scale_a, gate_a, scale_f, gate_f = block.modulation(adaln)
    q, k, v = block.attention.project(normed(block.attention_norm1, x, scale_a))
    o = block.attention.attend(q, k, v, rotation, mask)
    a = block.attention.to_out[0](o)
    middle = x + normed(block.attention_norm2, a, gate_a)
    u, w = block.feed_forward.expand(normed(block.ffn_norm1, middle, scale_f))
    f = block.feed_forward.contract(u, w)
    return middle + normed(block.ffn_norm2, f, gate_f), Residuals(x, q, k, v, o, a, u, w, f, modulation)


def backward(
    block: Block,
    kept: Residuals | mx.array,
    rotation: Rotation,
    mask: mx.array | None,
    adaln: mx.array | None,
    d_out: mx.array,
    time_too: bool = False,
    run: Callable[..., Any] = call,
) -> tuple[mx.array, mx.array | None, Parameters]:
    """Gradients of the input, of adaln (if `time_too`) and of the trainable parameters, by names within the block.

    kept: the residuals, or only the input, of which they are made again. run: how each part is run; see
    `compiled.Pieces`.
    """
    if isinstance(kept, mx.array):
        kept = run(_residuals, block, kept, rotation, mask, adaln)
    x, q, k, v, o, a, u, w, f, (scale_a, gate_a, scale_f, gate_f) = kept
    scales_too = adaln is not None and (time_too or bool(trainable(block, ["adaLN_modulation"])))
    d_middle, d_scales_f, gradients = run(
        _feed_forward_back, block, (x, a, u, w, f), gate_a, scale_f, gate_f, d_out, scales_too
    )
    del kept, u, w, f  # in pieces they are gone by the time that attention needs the room
    (ready_q, ready_k, ready_v), do, d_gate_a, more = run(
        _output_back, block, (q, k, v, o, a), rotation, gate_a, d_middle, scales_too
    )
    gradients = gradients | more
    heads = block.attention.heads
    d_ready = attention_gradient(ready_q, ready_k, ready_v, heads(do), heads(o), mask, run)
    d, d_scale_a, more = run(_projections_back, block, (x, q, k, v), rotation, scale_a, d_ready, scales_too)
    gradients = gradients | more

    d_adaln = None
    if scales_too:
        d_scales = [d_scale_a, d_gate_a, *d_scales_f]
        _, (d_adaln,), more = pull_back(block, ["adaLN_modulation"], block.modulation, [adaln], d_scales)
        gradients = gradients | more
    return d_middle + d, d_adaln if time_too else None, gradients


def _feed_forward_back(
    block: Block, residuals: Any, gate_a: Any, scale: Any, gate: Any, d_out: mx.array, scales_too: bool
) -> Any:
    """Gradients of the half with the feed-forward: of its input, (scale, gate), parameters.

    scales_too: whether scale and gate are wanted. All that a piece returns is computed, and their gradients take passes
    over wide float32 arrays.
    """
    x, a, u, w, f = residuals
    feed_forward = block.feed_forward
    middle = x + normed(block.attention_norm2, a, gate_a)
    _, (df, d_gate), _ = pull_back(block, (), lambda f, g: normed(block.ffn_norm2, f, g), [f, gate], [d_out])
    _, d_hidden, gradients = pull_back(block, ["feed_forward.w2"], feed_forward.contract, [u, w], [df])
    _, (d, d_scale), more = pull_back(
        block,
        ["feed_forward.w1", "feed_forward.w3"],
        lambda x, scale: feed_forward.expand(normed(block.ffn_norm1, x, scale)),
        [middle, scale],
        d_hidden,
    )
    return d_out + d, (d_scale, d_gate) if scales_too else None, gradients | more


def _output_back(block: Block, residuals: Any, rotation: Rotation, gate: Any, d: mx.array, scales_too: bool) -> Any:
    """Queries, keys, values as attention takes them; gradients of its output (B, S, D), the gate, parameters."""
    q, k, v, o, a = residuals
    attention = block.attention
    _, (da, d_gate), _ = pull_back(block, (), lambda a, g: normed(block.attention_norm2, a, g), [a, gate], [d])
    _, (do,), gradients = pull_back(block, ["attention.to_out"], lambda o: attention.to_out[0](o), [o], [da])
    return attention.prepare(q, k, v, rotation), do, d_gate if scales_too else None, gradients


def _projections_back(
    block: Block, residuals: Any, rotation: Rotation, scale: Any, d_ready: Any, scales_too: bool
) -> Any:
    """Gradients of the input of attention, its scale and its projections' parameters."""
    x, *projected = residuals
    attention = block.attention
    _, d, _ = pull_back(block, (), lambda q, k, v: attention.prepare(q, k, v, rotation), projected, d_ready)
    _, (dx, d_scale), gradients = pull_back(
        block,
        ["attention.to_q", "attention.to_k", "attention.to_v"],
        lambda x, scale: attention.project(normed(block.attention_norm1, x, scale)),
        [x, scale],
        d,
    )
    return dx, d_scale if scales_too else None, gradients


def pull_back(
    module: nn.Module,
    owners: Sequence[str],
    function: Callable[..., Any],
    inputs: Sequence[mx.array | None],
    cotangents: Sequence[Any],
) -> tuple[list[mx.array], list[Any], Parameters]:
    """What `function` returns; gradients of `inputs` (None for None) and of the parameters of `module` below `owners`.

    `function` takes the inputs and uses those parameters that train; it returns one array a cotangent.
    """
    own = trainable(module, owners)
    names = list(own)
    given = [i for i, array in enumerate(inputs) if array is not None]

    def outputs(*arrays: mx.array) -> list[mx.array]:
        filled = list(inputs)
        for i, array in zip(given, arrays[len(names) :], strict=True):
            filled[i] = array
        with substituted(module, dict(zip(names, arrays, strict=False))):
            result = function(*filled)
        return [result] if isinstance(result, mx.array) else list(result)

    primals: list[Any] = [*own.values(), *(inputs[i] for i in given)]
    if not primals:
        return outputs(), list(inputs), {}
    returned, d = mx.vjp(outputs, primals, list(cotangents))
    d_inputs: list[Any] = [None] * len(inputs)
    for i, gradient in zip(given, d[len(names) :], strict=True):
        d_inputs[i] = gradient
    return returned, d_inputs, dict(zip(names, d, strict=False))


class LossAndGradients:
    """(loss, gradients) of a batch, for one model and one way of trading memory for time.

    budget: bytes for the residuals of as many blocks as fit; the others keep their input and run twice, in pieces.
    Blocks and pieces are computed one ahead of what is done, so that memory stays bounded. compiled: for GPUs, whose
    kernels it fuses. Which parameters train must not change during the life of this object.
    """

    def __init__(self, model: Transformer, budget: float, compiled: bool) -> None:
        self.model, self.budget, self.settle = model, budget, Settle()
        wrap: Callable[[Any], Any] = PerBlock if compiled else lambda function: function
        self.forward, self.backward = wrap(forward), wrap(backward)
        pieces = Pieces(compiled)
        self.run: Callable[..., Any] = partial(Block.__call__, run=pieces)
        self.rerun: Callable[..., Any] = partial(backward, run=pieces)
        # looked for once: going through all blocks takes milliseconds
        chains = ("noise_refiner", "context_refiner", "layers")
        self.blocks_train = {name: [_trains(block) for block in getattr(model, name)] for name in chains}

    def __call__(self, batch: Batch) -> tuple[mx.array, Parameters]:
        """The loss, a float32 scalar, and the gradients of all trainable parameters by name, computed."""
        model, t, captions = self.model, model_time(batch.sigma), batch.captions
        x = add_noise(batch.x_0, batch.noise, batch.sigma[:, None, None, None])
        layout = model.layout([len(c) for c in captions], *x.shape[2:])
        adaln = model.embed_time(t)
        roots = {
            "t_embedder": lambda: model.embed_time(t),
            "all_x_embedder": lambda: model.embed_image(x),
            "cap_embedder": lambda: model.embed_captions(captions),
        }
        trains = {name: bool(trainable(model, [name])) for name in roots}
        time_too = trains["t_embedder"]

        keep = self._keep(batch, layout)
        left = keep - len(model.layers)  # the last blocks keep theirs, for the shortest time
        refiner = _Chain(self, "noise_refiner", left, (layout.image_rotation, None, adaln), time_too)
        left -= len(model.noise_refiner)
        context = _Chain(self, "context_refiner", left, (layout.caption_rotation, layout.caption_mask, None), False)
        layers = _Chain(self, "layers", keep, (layout.rotation, layout.mask, adaln), time_too)
        image, caption = refiner.forward(roots["all_x_embedder"]()), context.forward(roots["cap_embedder"]())
        tokens = layers.forward(mx.concatenate([image, caption], axis=1))

        def error(tokens: mx.array, adaln: mx.array) -> mx.array:
            return flow_matching_error(model.finish(tokens, adaln, *x.shape[2:]), batch)

        (loss,), (d, d_time), gradients = pull_back(model, ["all_final_layer"], error, [tokens, adaln], [mx.array(1.0)])
        image_too, caption_too = trains["all_x_embedder"] or time_too, trains["cap_embedder"]
        d = layers.backward(d, gradients, image_too or caption_too or refiner.trains or context.trains)
        d_image, d_caption = (None, None) if d is None else mx.split(d, [image.shape[1]], axis=1)
        d_image = refiner.backward(d_image, gradients, image_too)
        d_caption = context.backward(d_caption, gradients, caption_too)
        if time_too:
            d_time = sum(chain.d_time for chain in (layers, refiner)) + d_time
        for name, cotangent in (("t_embedder", d_time), ("all_x_embedder", d_image), ("cap_embedder", d_caption)):
            if trains[name]:
                gradients |= pull_back(model, [name], roots[name], [], [cotangent])[2]
        mx.eval(loss, gradients)
        return loss, gradients

    def _keep(self, batch: Batch, layout: Layout) -> int:
        """How many blocks may keep their residuals."""
        config = self.model.config
        tokens = len(batch.x_0) * layout.rotation[0].shape[1]
        each = tokens * residual_values(config) * self.model.dtype.size
        return int(min(self.budget / each, len(self.model.layers) + 2 * config.n_refiner_layers))


class _Chain:
    """Blocks one after the other: forward, keeping what backward needs, then backward."""

    def __init__(self, owner: LossAndGradients, name: str, keep: int, context: Any, time_too: bool) -> None:
        self.owner, self.name, self.context, self.time_too = owner, name, context, time_too
        self.blocks: list[Block] = getattr(owner.model, name)
        self.keep_from = len(self.blocks) - max(keep, 0)
        self.train = owner.blocks_train[name]
        self.kept: list[mx.array | Residuals] = []
        self.d_time: Any = 0.0

    @property
    def trains(self) -> bool:
        """Whether any block has trainable parameters."""
        return any(self.train)

    def forward(self, x: mx.array) -> mx.array:
        """The output of the last block for x (B, S, D)."""
        for i, block in enumerate(self.blocks):
            if i < self.keep_from:
                self.kept.append(x)
                x = self.owner.run(block, x, *self.context)
            else:
                x, residuals = self.owner.forward(block, x, *self.context)
                self.kept.append(residuals)
            self.owner.settle(x)
        return x

    def backward(self, d: mx.array | None, gradients: Parameters, input_too: bool) -> mx.array | None:
        """Adds the blocks' gradients to `gradients`; the input's, or None where nothing below needs it."""
        for i, block in reversed(list(enumerate(self.blocks))):
            if not (input_too or any(self.train[: i + 1])):
                return None
            kept = self.kept.pop()
            step = self.owner.backward if isinstance(kept, Residuals) else self.owner.rerun
            d, d_time, found = step(block, kept, *self.context, d, self.time_too)
            self.owner.settle(d, found)
            gradients |= {f"{self.name}.{i}.{name}": gradient for name, gradient in found.items()}
            if d_time is not None:
                self.d_time = self.d_time + d_time
        return d


def _trains(block: Block) -> bool:
    return bool(tree_flatten(block.trainable_parameters()))


def _residuals(block: Block, *args: Any) -> Residuals:
    return forward(block, *args)[1]
