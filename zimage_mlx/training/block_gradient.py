"""The gradient of one block of the transformer, in its two halves.

    x -> q, k, v -> attended -> out -> x + gate norm(out)         the half with attention
    x -> hidden_gate, hidden_value -> out -> x + gate norm(out)   the half with the feed-forward

The arrays are described at `AttentionKept` and `FeedForwardKept`, in zimage_mlx.networks.kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec

import mlx.core as mx
import mlx.nn as nn

from zimage_mlx.networks.kept import AttentionKept, FeedForwardKept
from zimage_mlx.networks.ops import QKV, Rotation, attention_gradient, row_parts
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.running import Run, run_directly
from zimage_mlx.networks.transformer import Block
from zimage_mlx.networks.tree import substituted, trainable

P = ParamSpec("P")

_FEED_FORWARD_ROWS = 2304  # tokens whose wide arrays are made again at once: fewer take longer


class BlockContext(NamedTuple):
    """What a block takes beside the stream; see `Block`."""

    rotation: Rotation
    mask: mx.array | None
    adaln: mx.array | None


class Kept(NamedTuple):
    """What a block's backward pass needs of its forward pass."""

    attention: AttentionKept
    feed_forward: FeedForwardKept


class _Middle(NamedTuple):
    """What the stream between the halves follows from; see `AttentionKept`."""

    x: mx.array
    out: mx.array
    gate: mx.array | None

    def stream(self, block: Block) -> mx.array:
        """(B, S, D), the input of the half with the feed-forward."""
        return self.x + block.attention_added(self.out, self.gate)


class _Modulation(NamedTuple):
    """Scale and gate of the half with the feed-forward, (B, 1, D) each; None for a block without modulation."""

    scale: mx.array | None
    gate: mx.array | None


BlockGradients = tuple[mx.array, "mx.array | None", Parameters]  # of the input, of adaln, of parameters
Forward = Callable[[Block, mx.array, BlockContext], tuple[mx.array, Kept]]
Backward = Callable[[Block, "Kept | mx.array", BlockContext, mx.array, bool], BlockGradients]


def forward(block: Block, x: mx.array, context: BlockContext) -> tuple[mx.array, Kept]:
    """The output (B, S, D) of `block`, and what its halves kept."""
    kept = []

    def keep(half: Callable[P, tuple[mx.array, object]], /, *args: P.args, **kwargs: P.kwargs) -> mx.array:
        y, more = half(*args, **kwargs)
        kept.append(more)
        return y

    y = block(x, *context, run=keep)
    attention, feed_forward = kept
    assert isinstance(attention, AttentionKept) and isinstance(feed_forward, FeedForwardKept)
    return y, Kept(attention, feed_forward)


def backward(
    block: Block,
    kept: Kept | mx.array,
    context: BlockContext,
    d_out: mx.array,
    time_too: bool = False,
    run: Run = run_directly,
) -> BlockGradients:
    """Gradients of the input, of adaln (if `time_too`) and of the trainable parameters, by names within the block.

    kept: the arrays that `forward` kept, or the input alone; the others are then made again. run: runs a part; see
    `running.RunInPieces`.
    """
    rotation, mask, adaln = context
    scales_too = adaln is not None and (time_too or bool(trainable(block, ["adaLN_modulation"])))
    attention, other = kept if isinstance(kept, Kept) else run(_kept_again, block, kept, context)
    d_middle, d_scales_f, gradients = _feed_forward_back(block, attention, other, d_out, scales_too, run)
    ready, d_attended, d_gate_a, more = run(_output_back, block, attention, rotation, d_middle, scales_too)
    gradients = gradients | more  # not in place: `run` still has to wait for what the first piece returned
    heads = block.attention.heads
    d_heads, attended = heads(d_attended), heads(attention.attended)
    x, projected, scale_a = attention.x, QKV(attention.q, attention.k, attention.v), attention.scale
    del attention, d_attended
    d_ready = attention_gradient(ready, d_heads, attended, mask, run)
    del ready, d_heads, attended  # in pieces, an array is gone by the time that another one needs the room
    d, d_scale_a, more = run(_projections_back, block, x, projected, scale_a, rotation, d_ready, scales_too)
    gradients = gradients | more

    d_adaln = None
    if adaln is not None and scales_too:
        d_scales = [*d_scale_a, *d_gate_a, *d_scales_f]
        _, (d_adaln,), more = pull_back(block, ["adaLN_modulation"], block.modulation, [adaln], d_scales)
        gradients = gradients | more
    return d_middle + d, d_adaln if time_too else None, gradients


def _feed_forward_back(
    block: Block,
    attention: AttentionKept,
    kept: FeedForwardKept | _Modulation,
    d_out: mx.array,
    scales_too: bool,
    run: Run,
) -> tuple[mx.array, list[mx.array], Parameters]:
    """Gradients of the half with the feed-forward: of its input; of scale and gate, if `scales_too`; of parameters.

    kept: if it is the modulation alone, the wide arrays are made again, for some tokens at a time.
    """
    B, S, _ = d_out.shape
    parts = row_parts(S, 1 if isinstance(kept, FeedForwardKept) else -(-B * S // _FEED_FORWARD_ROWS))
    d_parts: list[mx.array] = []
    d_scales: list[mx.array] = []
    gradients: Parameters = {}
    for rows in parts:
        d, x, out = (a if len(parts) == 1 else a[:, rows] for a in (d_out, attention.x, attention.out))
        middle = _Middle(x, out, attention.gate)
        hidden = kept if isinstance(kept, FeedForwardKept) else run(_hidden_again, block, middle, kept)
        d_hidden, d_gate, more = run(_contract_back, block, hidden, d, scales_too)
        del hidden
        d, d_scale, last = run(_expand_back, block, middle, kept.scale, d_hidden, d, scales_too)
        del d_hidden
        d_parts.append(d)
        found = [*d_scale, *d_gate]
        d_scales = [a + b for a, b in zip(d_scales, found, strict=True)] if d_scales else found
        more = more | last
        gradients = {name: gradients[name] + d for name, d in more.items()} if gradients else more
    return d_parts[0] if len(parts) == 1 else mx.concatenate(d_parts, axis=1), d_scales, gradients


def _contract_back(
    block: Block, kept: FeedForwardKept, d_out: mx.array, scales_too: bool
) -> tuple[list[mx.array], list[mx.array], Parameters]:
    """Gradients of the hidden gate and value (B, S, F); of the block's gate, if `scales_too`; of parameters.

    All that a piece returns is computed, and gradients of scale and gate take passes over wide float32 arrays.
    """
    _, (d_normed, *d_gate), gradients = pull_back(
        block, ["ffn_norm2"], block.feed_forward_added, _present(kept.out, kept.gate), [d_out]
    )
    _, d_hidden, more = pull_back(
        block, ["feed_forward.w2"], block.feed_forward.contract, [kept.hidden_gate, kept.hidden_value], [d_normed]
    )
    return d_hidden, d_gate if scales_too else [], gradients | more


def _expand_back(
    block: Block,
    middle: _Middle,
    scale: mx.array | None,
    d_hidden: list[mx.array],
    d_out: mx.array,
    scales_too: bool,
) -> tuple[mx.array, list[mx.array], Parameters]:
    """Gradients of the input of the half with the feed-forward; of its scale, if `scales_too`; of parameters."""
    _, (d, *d_scale), gradients = pull_back(
        block,
        ["feed_forward.w1", "feed_forward.w3", "ffn_norm1"],
        lambda x, scale=None: block.feed_forward.expand(block.feed_forward_input(x, scale)),
        _present(middle.stream(block), scale),
        d_hidden,
    )
    return d_out + d, d_scale if scales_too else [], gradients


def _output_back(
    block: Block, kept: AttentionKept, rotation: Rotation, d: mx.array, scales_too: bool
) -> tuple[QKV, mx.array, list[mx.array], Parameters]:
    """Queries, keys, values as attention takes them; gradients of its output (B, S, D), the gate, parameters."""
    attention = block.attention
    _, (d_out, *d_gate), gradients = pull_back(
        block, ["attention_norm2"], block.attention_added, _present(kept.out, kept.gate), [d]
    )
    _, (d_attended,), more = pull_back(block, ["attention.to_out"], attention.output, [kept.attended], [d_out])
    ready = attention.norm_and_rotate(kept.q, kept.k, kept.v, rotation)
    return ready, d_attended, d_gate if scales_too else [], gradients | more


def _projections_back(
    block: Block,
    x: mx.array,
    projected: QKV,
    scale: mx.array | None,
    rotation: Rotation,
    d_ready: QKV,
    scales_too: bool,
) -> tuple[mx.array, list[mx.array], Parameters]:
    """Gradients of the input x of attention, its scale and its projections' parameters."""
    attention = block.attention
    _, d, gradients = pull_back(
        block,
        ["attention.norm_q", "attention.norm_k"],
        lambda q, k, v: attention.norm_and_rotate(q, k, v, rotation),
        projected,
        d_ready,
    )
    _, (dx, *d_scale), more = pull_back(
        block,
        ["attention.to_q", "attention.to_k", "attention.to_v", "attention_norm1"],
        lambda x, scale=None: attention.project(block.attention_input(x, scale)),
        _present(x, scale),
        d,
    )
    return dx, d_scale if scales_too else [], gradients | more


def pull_back(
    module: nn.Module,
    owners: Sequence[str],
    function: Callable[..., mx.array | Sequence[mx.array]],
    inputs: Sequence[mx.array],
    cotangents: Sequence[mx.array],
) -> tuple[list[mx.array], list[mx.array], Parameters]:
    """What `function` returns; gradients of `inputs`, and of the parameters of `module` below `owners`.

    `function` takes the inputs and uses those parameters that train; it returns one array for each cotangent.
    """
    own = trainable(module, owners)
    names = list(own)

    def outputs(*arrays: mx.array) -> list[mx.array]:
        with substituted(module, dict(zip(names, arrays, strict=False))):
            result = function(*arrays[len(names) :])
        return [result] if isinstance(result, mx.array) else list(result)

    returned, d = mx.vjp(outputs, [*own.values(), *inputs], list(cotangents))
    return returned, d[len(names) :], dict(zip(names, d, strict=False))


def _present(array: mx.array, scale: mx.array | None) -> list[mx.array]:
    """The inputs of a function whose last one, a scale or gate, is missing in a block without modulation."""
    return [array] if scale is None else [array, scale]


def _kept_again(block: Block, x: mx.array, context: BlockContext) -> tuple[AttentionKept, _Modulation]:
    """What the half with attention keeps, and the modulation of the other half."""
    rotation, mask, adaln = context
    scale_a, gate_a, scale_f, gate_f = block.scales_and_gates(adaln)
    kept = block.attention_half(x, rotation, mask, scale_a, gate_a)[1]
    return kept, _Modulation(scale_f, gate_f)


def _hidden_again(block: Block, middle: _Middle, modulation: _Modulation) -> FeedForwardKept:
    """What the half with the feed-forward keeps."""
    return block.feed_forward_half(middle.stream(block), *modulation)[1]
