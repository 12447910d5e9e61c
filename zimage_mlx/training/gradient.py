"""The gradient of the flow-matching loss, block by block, last block first.

MLX's `value_and_grad` of the whole network keeps every intermediate array of every block. Here a block keeps nine wide
arrays: its input, and what its Linear layers and its attention made. The others are cheap to make again from these,
because none of them is the output of a matrix product. Blocks that must keep less keep their input only: they run a
second time when their gradient is due. The gradient of a block is in `block_gradient`.

Source: gradient checkpointing, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from zimage_mlx.networks.compiled import PerBlock
from zimage_mlx.networks.parameters import Parameters
from zimage_mlx.networks.running import EvalOneAhead, RunInPieces
from zimage_mlx.networks.token_layout import TokenLayout
from zimage_mlx.networks.transformer import Block, RunBlock, Transformer
from zimage_mlx.networks.tree import trainable
from zimage_ref.memory import kept_values
from zimage_ref.model.flow import model_time

from .block_gradient import Backward, BlockContext, Forward, Kept, backward, forward, pull_back
from .loss import JointBatch, NoisyBatch

_PADDING = {"all_x_embedder": ["x_pad_token"], "cap_embedder": ["cap_pad_token"]}  # what fills up the tokens of each


class LossAndGradients:
    """(loss, gradients) of a batch, for one model and one way of trading memory for time.

    budget: bytes for what blocks keep. The last blocks keep all that they need, as many as fit. The others keep their
    input and run twice, in pieces. Blocks and pieces are evaluated one ahead, so that memory stays bounded.
    compiled: for GPUs, whose kernels it fuses.
    Which parameters train must not change during the life of this object.
    use: takes the gradients of one part after the other, and empties the table that it gets. It may change the weights
    of that part. So the gradients of two blocks are never in memory at once. None: all are returned.
    """

    def __init__(
        self, model: Transformer, budget: float, compiled: bool, use: Callable[[Parameters], None] | None = None
    ) -> None:
        self.model, self.budget, self.eval_ahead, self.use = model, budget, EvalOneAhead(), use
        around = model.weights.around
        self.forward: Forward = around(PerBlock(forward) if compiled else forward)
        self.backward: Backward = around(PerBlock(backward) if compiled else backward)
        pieces = RunInPieces(compiled, model.weights.read_ahead)
        self.run: RunBlock = around(pieces.block)
        self.rerun: Backward = around(partial(backward, run=pieces))
        # looked for once: going through all blocks takes milliseconds
        chains = ("noise_refiner", "context_refiner", "layers")
        self.blocks_train = {name: [_trains(block) for block in getattr(model, name)] for name in chains}

    def __call__(self, batch: NoisyBatch | JointBatch) -> tuple[mx.array, Parameters]:
        """The loss, a float32 scalar, and the gradients of all trainable parameters by name, computed."""
        model, t, captions, x = self.model, model_time(batch.sigma), batch.captions, batch.x_sigma
        layout = model.layout([len(c) for c in captions], *x.shape[2:])
        adaln = model.embed_time(t)
        roots = {
            "t_embedder": lambda: model.embed_time(t),
            "all_x_embedder": lambda: model.embed_image(x),
            "cap_embedder": lambda: model.embed_captions(captions),
        }
        owners = {name: [name, *_PADDING.get(name, ())] for name in roots}
        trains = {name: bool(trainable(model, owners[name])) for name in roots}
        time_too = trains["t_embedder"]

        keep = self._keep(len(x), layout)
        left = keep - len(model.layers)  # the last blocks keep theirs, for the shortest time
        of_image = _Chain(self, "noise_refiner", left, BlockContext(layout.image_rotation, None, adaln), time_too)
        left -= len(model.noise_refiner)
        caption_context = BlockContext(layout.caption_rotation, layout.caption_mask, None)
        of_caption = _Chain(self, "context_refiner", left, caption_context, False)
        of_both = _Chain(self, "layers", keep, BlockContext(layout.rotation, layout.plain_mask, adaln), time_too)
        image, caption = of_image.forward(roots["all_x_embedder"]()), of_caption.forward(roots["cap_embedder"]())
        tokens = of_both.forward(mx.concatenate([image, caption], axis=1))

        def error(tokens: mx.array, adaln: mx.array) -> mx.array:
            return batch.error(model.finish(tokens, adaln, *x.shape[2:]))

        last, one, gradients = ["all_final_layer"], mx.array(1.0), dict[str, mx.array]()
        (loss,), (d_tokens, d_time), found = pull_back(model, last, error, [tokens, adaln], [one])
        self.found(gradients, found, loss, d_tokens, d_time)
        del tokens, found
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
                self.found(gradients, pull_back(model, owners[name], roots[name], [], [d])[2])
        mx.eval(loss, gradients)
        return loss, gradients

    def found(self, gradients: Parameters, more: Parameters, *others: object) -> None:
        """Adds `more` to `gradients`, or gives it to `use`. others: what was made with it."""
        if self.use is None:
            gradients |= more
            return
        mx.eval(more, *others)  # nothing may be left that needs the weights as they were
        if more:
            self.use(more)

    def _keep(self, pictures: int, layout: TokenLayout) -> int:
        """How many blocks may keep all that their gradient needs."""
        config = self.model.config
        tokens = pictures * layout.rotation[0].shape[1]
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
            if self.owner.use is None:
                self.owner.eval_ahead(d, found)
            if d_time is not None:
                self.d_time = self.d_time + d_time
            found = {f"{self.name}.{i}.{name}": gradient for name, gradient in found.items()}
            self.owner.found(gradients, found, d, self.d_time)
            del found
        return d


def _trains(block: Block) -> bool:
    return bool(tree_flatten(block.trainable_parameters()))
