"""A quantised matrix whose numbers learn without leaving their format.

Codes are trained as real numbers that every pass rounds, with the gradient carried through as if it did not
(straight-through, arXiv:1308.3432): the kept weights keep their format, and no byte is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strace.linear import Codes, Linear

RANGES = {"int4": (-8, 7), "int8": (-127, 127)}


class Trained(Linear):
    """A quantised matrix whose codes, scales and bias learn."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        assert linear.codes is not None
        super().__init__(linear.codes, linear.bias, dtype)
        self.numbers = linear.codes.codes.float().requires_grad_()
        self.growth = torch.zeros_like(linear.codes.scales, dtype=torch.float32).requires_grad_()
        self.added = None if linear.bias is None else linear.bias.float().clone().requires_grad_()
        self._start = linear.codes.scales.float().clone()

    @property
    def scales(self) -> Tensor:
        return self._start * self.growth.exp()

    def __call__(self, x: Tensor) -> Tensor:
        assert self.codes is not None
        bounded = self.numbers.clamp(*RANGES[self.codes.format])
        codes = bounded + (bounded.round() - bounded).detach()
        n, groups = self.growth.shape
        weight = (codes.view(n, groups, -1) * self.scales[..., None]).view(self.numbers.shape)
        return F.linear(x, weight.to(x.dtype), None if self.added is None else self.added.to(x.dtype))

    def settle(self) -> Linear:
        """As it is served."""
        assert self.codes is not None
        with torch.no_grad():
            codes = self.numbers.clamp(*RANGES[self.codes.format]).round().to(torch.int8)
            bias = None if self.added is None or self.bias is None else self.added.to(self.bias.dtype)
            return Linear(Codes(self.codes.format, codes, self.scales.to(torch.bfloat16)), bias, self._dtype)
