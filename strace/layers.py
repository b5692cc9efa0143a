"""The layers of a decoder that are made when they are asked for, so that no model need be in memory whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch

from strace.decoder import Layer
from strace.memory import give_back

ROOM = 1 << 27  # bytes of layers that stay


class Layers(Sequence[Layer]):
    """Layers that `make` makes, or reads, by their numbers, with the same bits each time. The first ones stay, up to
    `room` bytes (default `ROOM`), for passes go over all again and again; of the others only the one asked for last."""

    def __init__(self, count: int, make: Callable[[int], Layer], room: int | None = None) -> None:
        self._numbers, self._make, self._room = range(count), make, ROOM if room is None else room
        self._staying: dict[int, Layer] = {}
        self._last: tuple[int, Layer | None] = -1, None

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...

    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[l] for l in self._numbers[index]]
        l = self._numbers[index]
        if l != self._last[0]:
            self._last = -1, None  # gone before the next one comes
        layer = self.peek(l)
        if l not in self._staying and layer.bytes <= self._room:
            self._room -= layer.bytes
            self._staying[l] = layer
        self._last = l, layer
        return layer

    def __iter__(self) -> Iterator[Layer]:
        for l in self._numbers:
            yield self[l]
        self._last = -1, None

    def peek(self, l: int) -> Layer:
        """As `[l]`, but it does not stay for having been asked for."""
        number, last = self._last
        if last is not None and number == l:
            return last
        if l in self._staying:
            return self._staying[l]
        give_back()  # malloc keeps what earlier layers took: at the size of a billion weights, one and a half gigabytes
        with torch.inference_mode(False):  # distillation cannot read inference tensors
            return self._make(l)


def map_layers(
    layers: Sequence[Layer], change: Callable[[int, Layer], Layer], room: int | None = None
) -> Sequence[Layer]:
    """Every layer, changed: now, or when it is asked for where `layers` are made so themselves."""
    if isinstance(layers, Layers):
        return Layers(len(layers), lambda l: change(l, layers.peek(l)), room)
    return [change(l, layer) for l, layer in enumerate(layers)]
