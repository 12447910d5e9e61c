"""The gradient of the flow-matching loss, block by block, last block first.

MLX's `value_and_grad` of the whole network keeps every intermediate array of every block. Here a block keeps nine wide
arrays: its input, and what its Linear layers and its attention made. The others are cheap to make again from these,
because none of them is the output of a matrix product. Blocks that must keep less keep their input only: they run a
second time when their gradient is due.

    x -> q, k, v -> attended -> out -> x + gate norm(out)         the half with attention
    x -> hidden_gate, hidden_value -> out -> x + gate norm(out)   the half with the feed-forward

The arrays are described at `AttentionKept` and `FeedForwardKept`, in zimage_mlx.networks.kept. Source: gradient
checkpointing, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, ParamSpec

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_mlx.networks.compiled import PerBlock
from zimage_mlx.networks.kept import AttentionKept, FeedForwardKept
from zimage_mlx.networks.ops import QKV, Rotation, attention_gradient
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.running import EvalOneAhead, Run, RunInPieces, run_directly
from zimage_mlx.networks.token_layout import TokenLayout
from zimage_mlx.networks.transformer import Block, RunBlock, Transformer
from zimage_mlx.networks.tree import substituted, trainable
from zimage_ref.memory import kept_values
from zimage_ref.model.flow import model_time

from .loss import NoisyBatch, flow_matching_error

P = ParamSpec("P")


class BlockContext(NamedTuple):
    """What a block takes beside the stream; see `Block`."""

    rotation: Rotation
    mask: mx.array | None
    adaln: mx.array | None


class Kept(NamedTuple):
    """What a block's backward pass needs of its forward pass."""

    attention: AttentionKept
    feed_forward: FeedForwardKept


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
    if isinstance(kept, mx.array):
        kept = run(_kept_again, block, kept, context)
    rotation, mask, adaln = context
    scales_too = adaln is not None and (time_too or bool(trainable(block, ["adaLN_modulation"])))
    attention, feed_forward = kept
    d_middle, d_scales_f, gradients = run(_feed_forward_back, block, attention, feed_forward, d_out, scales_too)
    del kept, feed_forward  # in pieces they are gone by the time that attention needs the room
    ready, d_attended, d_gate_a, more = run(_output_back, block, attention, rotation, d_middle, scales_too)
    gradients = gradients | more  # not in place: `run` still has to wait for what the first piece returned
    heads = block.attention.heads
    d_ready = attention_gradient(ready, heads(d_attended), heads(attention.attended), mask, run)
    d, d_scale_a, more = run(_projections_back, block, attention, rotation, d_ready, scales_too)
    gradients = gradients | more

    d_adaln = None
    if adaln is not None and scales_too:
        d_scales = [*d_scale_a, *d_gate_a, *d_scales_f]
        _, (d_adaln,), more = pull_back(block, ["adaLN_modulation"], block.modulation, [adaln], d_scales)
        gradients = gradients | more
    return d_middle + d, d_adaln if time_too else None, gradients


def _feed_forward_back(
    block: Block, attention: AttentionKept, kept: FeedForwardKept, d_out: mx.array, scales_too: bool
) -> tuple[mx.array, list[mx.array], Parameters]:
    """Gradients of the half with the feed-forward: of its input; of scale and gate, if `scales_too`; of parameters.

    All that a piece returns is computed, and gradients of scale and gate take passes over wide float32 arrays.
    """
    feed_forward = block.feed_forward
    middle = attention.x + block.attention_added(attention.out, attention.gate)
    _, (d_normed, *d_gate), _ = pull_back(block, (), block.feed_forward_added, _present(kept.out, kept.gate), [d_out])
    _, d_hidden, gradients = pull_back(
        block, ["feed_forward.w2"], feed_forward.contract, [kept.hidden_gate, kept.hidden_value], [d_normed]
    )
    _, (d, *d_scale), more = pull_back(
        block,
        ["feed_forward.w1", "feed_forward.w3"],
        lambda x, scale=None: feed_forward.expand(block.feed_forward_input(x, scale)),
        _present(middle, kept.scale),
        d_hidden,
    )
    return d_out + d, [*d_scale, *d_gate] if scales_too else [], gradients | more


def _output_back(
    block: Block, kept: AttentionKept, rotation: Rotation, d: mx.array, scales_too: bool
) -> tuple[QKV, mx.array, list[mx.array], Parameters]:
    """Queries, keys, values as attention takes them; gradients of its output (B, S, D), the gate, parameters."""
    attention = block.attention
    _, (d_out, *d_gate), _ = pull_back(block, (), block.attention_added, _present(kept.out, kept.gate), [d])
    _, (d_attended,), gradients = pull_back(block, ["attention.to_out"], attention.output, [kept.attended], [d_out])
    ready = attention.norm_and_rotate(kept.q, kept.k, kept.v, rotation)
    return ready, d_attended, d_gate if scales_too else [], gradients


def _projections_back(
    block: Block, kept: AttentionKept, rotation: Rotation, d_ready: QKV, scales_too: bool
) -> tuple[mx.array, list[mx.array], Parameters]:
    """Gradients of the input of attention, its scale and its projections' parameters."""
    attention = block.attention
    _, d, _ = pull_back(
        block, (), lambda q, k, v: attention.norm_and_rotate(q, k, v, rotation), [kept.q, kept.k, kept.v], d_ready
    )
    _, (dx, *d_scale), gradients = pull_back(
        block,
        ["attention.to_q", "attention.to_k", "attention.to_v"],
        lambda x, scale=None: attention.project(block.attention_input(x, scale)),
        _present(kept.x, kept.scale),
        d,
    )
    return dx, d_scale if scales_too else [], gradients


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


class LossAndGradients:
    """(loss, gradients) of a batch, for one model and one way of trading memory for time.

    budget: bytes for what blocks keep. The last blocks keep all that they need, as many as fit. The others keep their
    input and run twice, in pieces. Blocks and pieces are evaluated one ahead, so that memory stays bounded.
    compiled: for GPUs, whose kernels it fuses.
    Which parameters train must not change during the life of this object.
    """

    def __init__(self, model: Transformer, budget: float, compiled: bool) -> None:
        self.model, self.budget, self.eval_ahead = model, budget, EvalOneAhead()
        around = model.weights.around
        self.forward: Forward = around(PerBlock(forward) if compiled else forward)
        self.backward: Backward = around(PerBlock(backward) if compiled else backward)
        pieces = RunInPieces(compiled, model.weights.read_ahead)
        self.run: RunBlock = around(pieces.block)
        self.rerun: Backward = around(partial(backward, run=pieces))
        # looked for once: going through all blocks takes milliseconds
        chains = ("noise_refiner", "context_refiner", "layers")
        self.blocks_train = {name: [_trains(block) for block in getattr(model, name)] for name in chains}

    def __call__(self, batch: NoisyBatch) -> tuple[mx.array, Parameters]:
        """The loss, a float32 scalar, and the gradients of all trainable parameters by name, computed."""
        model, t, captions = self.model, model_time(batch.sigma), batch.captions
        x = batch.x_sigma
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
        of_image = _Chain(self, "noise_refiner", left, BlockContext(layout.image_rotation, None, adaln), time_too)
        left -= len(model.noise_refiner)
        caption_context = BlockContext(layout.caption_rotation, layout.caption_mask, None)
        of_caption = _Chain(self, "context_refiner", left, caption_context, False)
        of_both = _Chain(self, "layers", keep, BlockContext(layout.rotation, layout.plain_mask, adaln), time_too)
        image, caption = of_image.forward(roots["all_x_embedder"]()), of_caption.forward(roots["cap_embedder"]())
        tokens = of_both.forward(mx.concatenate([image, caption], axis=1))

        def error(tokens: mx.array, adaln: mx.array) -> mx.array:
            return flow_matching_error(model.finish(tokens, adaln, *x.shape[2:]), batch)

        last, one = ["all_final_layer"], mx.array(1.0)
        (loss,), (d_tokens, d_time), gradients = pull_back(model, last, error, [tokens, adaln], [one])
        image_too, caption_too = trains["all_x_embedder"] or time_too, trains["cap_embedder"]
        below_too = image_too or caption_too or of_image.trains or of_caption.trains
        d_both = of_both.backward(d_tokens, gradients, below_too)
        d_image, d_caption = (None, None) if d_both is None else mx.split(d_both, [image.shape[1]], axis=1)
        d_image = of_image.backward(d_image, gradients, image_too)
        d_caption = of_caption.backward(d_caption, gradients, caption_too)
        if time_too:
            d_time = of_both.d_time + of_image.d_time + d_time
        for name, d in (("t_embedder", d_time), ("all_x_embedder", d_image), ("cap_embedder", d_caption)):
            if trains[name]:
                assert d is not None  # the chains were asked for it
                gradients |= pull_back(model, [name], roots[name], [], [d])[2]
        mx.eval(loss, gradients)
        return loss, gradients

    def _keep(self, batch: NoisyBatch, layout: TokenLayout) -> int:
        """How many blocks may keep all that their gradient needs."""
        config = self.model.config
        tokens = len(batch.x_0) * layout.rotation[0].shape[1]
        each = tokens * kept_values(config) * self.model.dtype.size
        return int(min(self.budget / each, len(self.model.layers) + 2 * config.n_refiner_layers))


class _Chain:
    """Blocks one after the other: forward, keeping what backward needs, then backward."""

    def __init__(self, owner: LossAndGradients, name: str, keep: int, context: BlockContext, time_too: bool) -> None:
        self.owner, self.name, self.context, self.time_too = owner, name, context, time_too
        self.blocks: list[Block] = getattr(owner.model, name)
        self.keep_from = len(self.blocks) - max(keep, 0)
        self.train = owner.blocks_train[name]
        self.kept: list[mx.array | Kept] = []
        self.d_time: mx.array | float = 0.0

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
                x, kept = self.owner.forward(block, x, self.context)
                self.kept.append(kept)
            self.owner.eval_ahead(x)
        return x

    def backward(self, d: mx.array | None, gradients: Parameters, input_too: bool) -> mx.array | None:
        """Adds the blocks' gradients to `gradients`; the input's, or None if nothing below needs it."""
        for i, block in reversed(list(enumerate(self.blocks))):
            if not (input_too or any(self.train[: i + 1])):
                return None
            assert d is not None  # blocks above were asked for it
            step = self.owner.backward if isinstance(self.kept[-1], Kept) else self.owner.rerun
            # popped here, without a name that would hold the arrays until the next block is done
            d, d_time, found = step(block, self.kept.pop(), self.context, d, self.time_too)
            self.owner.eval_ahead(d, found)
            gradients |= {f"{self.name}.{i}.{name}": gradient for name, gradient in found.items()}
            if d_time is not None:
                self.d_time = self.d_time + d_time
        return d


def _trains(block: Block) -> bool:
    return bool(tree_flatten(block.trainable_parameters()))


def _kept_again(block: Block, x: mx.array, context: BlockContext) -> Kept:
    return forward(block, x, context)[1]
