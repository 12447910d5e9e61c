"""Hints that a ControlNet adds to the stream of the transformer: the interface between both networks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Protocol

from zimage_ref.formats.tensors import Array

if TYPE_CHECKING:
    from .transformer import Conditioning, Transformer


class Hints(Protocol):
    """Hints for the stream, added after some layers. `controlnet.Control` makes it."""

    @property
    def places(self) -> tuple[int, ...]:
        """The layers, in ascending order, after which a hint is added."""

    def hints(
        self, transformer: Transformer, embedded: Array, refined: Array, conditioning: Conditioning,
        adaln: Array,
    ) -> Iterator[Array]:  # fmt: skip
        """Yields a hint (B, S, D) for each place.

        embedded, refined: image tokens (B, L, D) before and after the noise refiner. adaln: the embedded time.
        """


def hints_of(
    transformer: Transformer, embedded: Array, refined: Array, conditioning: Conditioning, adaln: Array
) -> tuple[Collection[int], Iterator[Array]]:
    """The places and the hints of the control in `conditioning`; none without it. See `Hints`."""
    control = conditioning.control
    if control is None:
        return (), iter(())
    return control.places, control.hints(transformer, embedded, refined, conditioning, adaln)
