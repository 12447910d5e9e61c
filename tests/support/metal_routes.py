"""What MLX's Metal backend does with each primitive that this program makes. Read in MLX's source, never run on a Mac.

Files are of mlx/backend/metal, lines of the main branch of 2026-08-22; 0.31.0 and 0.32.1 have the same rules. A graph
is traced on this machine, without computing. MLX on a CPU would take some functions apart that Metal has kernels for,
so stand-ins take their place, and remember their inputs. A function with a gradient of its own cannot be exported: it
is differentiated by MLX instead, and its own gradient is traced alone, on inputs of the same shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from zimage_mlx.networks import ops

LONGEST = 1.5e12 * 1.01  # operations of one kernel: macOS ends one of about 5 s, and an M1 makes 1e12 or so a second
ELEMENTS = 1 << 31  # of an array: kernels that index with 32 bits
BYTES = 4 << 30  # of a buffer, at most: offsets of 32 bits
SCORES = 1 << 30  # bytes of scores that attention may write out if it is not fused
FLOATS = {mx.float32, mx.float16, mx.bfloat16}
FUSED_WIDTHS = {64, 80, 128}  # of a head: scaled_dot_product_attention.cpp:661-680
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten", "Full"}
# Kernels for any float: binary.cpp, unary.cpp, ternary.cpp, copy.cpp, reduce.cpp, softmax.cpp, indexing.cpp
PLAIN = {
    "Add", "Arange", "AsType", "Concatenate", "Cos", "Cosh", "Depends", "Divide", "Gather", "Less", "Multiply",
    "Negative", "Pad", "Reduce", "Select", "Sigmoid", "Sin", "SliceUpdate", "Softmax", "Sqrt", "Square", "Subtract",
    "Tanh",
}  # fmt: skip
PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul"}  # matmul.cpp, quantized.cpp


@dataclass
class Graph:
    """The primitives of a traced function, how often each was met, and every rule that one of them breaks."""

    met: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest: float = 0.0  # operations of one kernel
    flops: Counter[str] = field(default_factory=Counter)  # operations in all, by kernel
    gradients: dict[Any, tuple[Callable[..., Any], list[Any]]] = field(default_factory=dict)  # and shapes of inputs

    def kernel(self, name: str, flops: float, *about: object) -> None:
        """Holds the operations of one dispatch against the limit."""
        self.longest = max(self.longest, flops)
        self.flops[name] += int(flops)
        if flops >= LONGEST:
            self.faults.append(f"{name} is one kernel of {flops:.2g} operations: {about}")

    def take(self, event: dict[str, Any]) -> None:
        """One event of `mx.export_function`."""
        if event["type"] != "primitive":
            return
        name, arguments = event["name"], event["arguments"]
        inputs, outputs = ([(shape, dtype) for _, shape, dtype in event[k]] for k in ("inputs", "outputs"))
        self.met[name] += 1
        for shape, dtype in inputs + outputs:
            self._array(name, shape, dtype)
        if name in PRODUCTS:
            self._product(name, inputs, outputs[0])
        elif name == "Convolution":
            self._convolution(inputs[0][0], inputs[1][0], outputs[0][0], arguments)
        elif name not in VIEWS | PLAIN:
            self.faults.append(f"{name}: nobody has read how Metal makes it")

    def _array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        if dtype == mx.float64:
            self.faults.append(f"{name}: a GPU of a Mac has no float64")
        if name in VIEWS - {"Reshape", "Flatten", "Unflatten"}:
            return  # of no memory of their own
        if prod(shape) >= ELEMENTS or prod(shape) * dtype.size > BYTES:
            self.faults.append(f"{name}: {shape} of {dtype} is too large for a buffer")

    def _product(self, name: str, inputs: list[Any], output: Any) -> None:
        (shape, dtype), (out, _) = inputs[0], output
        if dtype not in FLOATS:
            self.faults.append(f"{name}: no kernel for {dtype}")
        self.kernel(name, 2 * prod(out) * shape[-1], *inputs)

    def _convolution(self, x: tuple[int, ...], w: tuple[int, ...], out: tuple[int, ...], arguments: list[Any]) -> None:
        stride, flip = arguments[0], arguments[-1]
        if is_winograd(x, w, tuple(stride), flip):
            self.faults.append(f"Convolution: {x} by {w} is made by Winograd's method")
        self.kernel("Convolution", 2 * prod(out) * prod(w[1:]), x, w)

    def attention(self, q: mx.array, k: mx.array, mask: Any) -> None:
        """A call of MLX's fused attention: whether Metal has a kernel for it, else what the scores take."""
        B, H, S, K = q.shape
        self.met["attention"] += 1
        self.kernel("attention", 4 * B * H * S * k.shape[2] * K, q.shape, k.shape)
        causal_fits = mask != "causal" or k.shape[2] >= S if isinstance(mask, str) else True
        fused = q.dtype in FLOATS and K in FUSED_WIDTHS and q.dtype == k.dtype and causal_fits
        scores = B * H * S * k.shape[2] * q.dtype.size
        if not fused and scores > SCORES:
            self.faults.append(f"attention {q.shape} of {q.dtype} is not fused: {scores / 1e9:.1f} GB of scores")


def is_winograd(inputs: tuple[int, ...], weights: tuple[int, ...], stride: Any, flip: bool) -> bool:
    """Whether Metal makes a convolution of `inputs` (B, H, W, C) by Winograd's method: conv.cpp:1322-1337."""
    B, H, W, C = inputs
    outputs, height, width, _ = weights
    plain = not flip and stride in (1, (1, 1)) and (height, width) == (3, 3)
    return plain and C % 32 == 0 and outputs % 32 == 0 and C + outputs >= 256 and B * H * W >= 4096


def depending(shape: Any, dtype: mx.Dtype, *inputs: mx.array | None) -> mx.array:
    """An array that stands for a function of `inputs`."""
    return mx.depends([mx.zeros(shape, dtype)], [array for array in inputs if array is not None])[0]


class Custom:
    """Stands for `mx.custom_function`: the function alone. It remembers its gradient and the shapes of its inputs."""

    def __init__(self, function: Callable[..., mx.array], graph: Graph) -> None:
        self._function, self._graph = function, graph
        self._gradient: Callable[..., Any] | None = None

    def vjp(self, gradient: Callable[..., Any]) -> None:
        """As that of `mx.custom_function`."""
        self._gradient = gradient

    def __call__(self, *inputs: mx.array) -> mx.array:
        y = self._function(*inputs)
        if self._gradient is not None:
            key = (self._gradient.__qualname__, *(array.shape for array in inputs))
            like = [(array.shape, array.dtype) for array in (*inputs, y)]
            self._graph.gradients.setdefault(key, (self._gradient, like))
        return y


@contextmanager
def stand_ins(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block in which MLX's functions record what Metal would be asked for."""

    def attended(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        graph.attention(q, k, mask)
        return depending(q.shape, q.dtype, q, k, v, mask if isinstance(mask, mx.array) else None)

    def normed(x: mx.array, weight: mx.array | None, *_: Any) -> mx.array:
        graph.met["norm"] += 1
        wide = x if weight is None else x.astype(mx.result_type(x, weight))
        return mx.depends([wide], [x if weight is None else weight])[0]

    def roped(x: mx.array, *_: Any, **__: Any) -> mx.array:
        graph.met["rope"] += 1
        return mx.depends([x], [x])[0]

    def dequantized(w: mx.array, scales: mx.array, biases: mx.array, *_: Any, **how: Any) -> mx.array:
        graph.met["dequantize"] += 1
        return depending((w.shape[0], scales.shape[1] * how["group_size"]), scales.dtype, w, scales, biases)

    turn = Custom(ops._turned, graph)
    turn.vjp(ops._turned_back)
    with monkeypatch.context() as patched:
        patched.setattr(mx.fast, "scaled_dot_product_attention", attended)
        patched.setattr(mx.fast, "rms_norm", normed)
        patched.setattr(mx.fast, "layer_norm", normed)
        patched.setattr(mx.fast, "rope", roped)
        patched.setattr(mx, "dequantize", dequantized)
        patched.setattr(mx, "custom_function", lambda function: Custom(function, graph))
        patched.setattr(ops, "_turn", turn)
        patched.setattr(mx, "eval", lambda *trees: None)
        patched.setattr(mx, "async_eval", lambda *trees: None)
        yield


def trace(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, gradients: bool = False) -> Graph:
    """The graph that `function` makes on Metal. Nothing of it is computed. gradients: also those of its parts."""
    graph = Graph()
    with stand_ins(graph, monkeypatch):
        mx.export_function(graph.take, lambda: leaves(function()))
        for gradient, like in list(graph.gradients.values()) if gradients else []:
            *inputs, y = (mx.zeros(shape, dtype) for shape, dtype in like)
            mx.export_function(graph.take, lambda g=gradient, i=inputs, y=y: leaves(g(i, mx.zeros_like(y), y)))
    return graph


def leaves(tree: Any) -> list[mx.array]:
    """The arrays of a tree."""
    return [leaf for _, leaf in tree_flatten([tree]) if isinstance(leaf, mx.array)]
