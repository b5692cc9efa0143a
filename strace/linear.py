"""A weight matrix that knows its format and its kernel on this device.

Formats (activation precision is part of a format's meaning; all accumulate in float32):

| name | stored as | bits per weight | activations |
|---|---|---|---|
| fp32, bf16 | dense | 32, 16 | the same |
| int8 | signed codes, one bf16 scale per output row | 8 + 16/K | int8, one float32 scale per 32 inputs |
| int4 | codes -8..7, one signed bf16 scale per 32 inputs of a row | 4.5 | int8, one float32 scale per 32 inputs |

int4's scale carries the sign of the group's largest weight, so that the longer side of -8..7 always serves it. The
native runner multiplies int8 activations as integers; here the input is rounded to the same grid and multiplied by
torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from strace import native

GROUP = 32
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("fp32", "bf16", "int8", "int4")
_CACHE_LINE = 64
_PIECE = 1 << 18  # weights quantised at once: what is made of them on the way stays in the processor's cache
_SHRINKS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8)}  # scales tried: the largest weight's, and less
_KERNEL_ROWS = 16  # torch's CPU int4 kernel takes output rows in multiples of this


@dataclass(frozen=True)
class Codes:
    """A quantised matrix in its portable layout: int8 codes [N, K] and bf16 scales [N, K / group] (int8: [N, 1])."""

    format: str
    codes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> int:
        bits = 4 if self.format == "int4" else 8
        return self.codes.numel() * bits // 8 + self.scales.numel() * 2

    def dense(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        return (self.codes.view(n, groups, k // groups).float() * self.scales.float()[..., None]).view(n, k)


def choose_format(format: str, columns: int) -> str:
    """int4, or int8 in its place where the columns are not whole groups."""
    return "int8" if format == "int4" and columns % GROUP else format


def quantise(weight: Tensor, format: str) -> Codes:
    """Round a [N, K] matrix to `format`, each group's scale being the best in squared error of a few candidates.

    Raises:
        ValueError: for a format that is not quantised, or K no multiple of the int4 group.
    """
    n, k = weight.shape
    if format not in ("int8", "int4"):
        raise ValueError(f"{format!r} is not a quantised format; choose int8 or int4")
    if format == "int4" and k % GROUP:
        raise ValueError(f"int4 needs a multiple of {GROUP} inputs, got {k}")
    # Threads fill what is made here: memory that each allocates for itself would stay with it.
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, k // GROUP if format == "int4" else 1, dtype=torch.bfloat16, device=weight.device)
    step = max(1, _PIECE // k)
    pieces = [slice(first, first + step) for first in range(0, n, step)]
    if weight.device.type == "cpu" and native.available():
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(lambda rows: _quantise_natively(weight[rows], codes[rows], scales[rows], format), pieces):
                pass
    else:
        for rows in pieces:
            codes[rows], scales[rows] = _quantise_rows(weight[rows], format)
    return Codes(format, codes, scales)


def _quantise_natively(weight: Tensor, codes: Tensor, scales: Tensor, format: str) -> None:
    """Fill in codes and scales of some rows by the native library, on this thread alone; the same bits as
    `_quantise_rows`."""
    dense = weight.detach() if weight.dtype == torch.bfloat16 else weight.detach().float()
    dense, (n, k) = dense.contiguous(), weight.shape
    described = native.FORMATS[format], n, k, native.FORMATS[_dense_format(dense.dtype)]
    native.check(native.load().st_quantise(*described, *(t.data_ptr() for t in (dense, codes, scales))))


def _quantise_rows(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows."""
    n, k = weight.shape
    groups = k // GROUP if format == "int4" else 1
    low, high = (-8, 7) if format == "int4" else (-127, 127)
    blocks = weight.detach().float().reshape(n, groups, k // groups)
    peak = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    candidates = [(peak * shrink / low).to(torch.bfloat16).float() for shrink in _SHRINKS[format]]
    scales, *others = (torch.where(scale == 0, torch.ones_like(scale), scale) for scale in candidates)
    if others:
        best = _find_error(blocks, scales, low, high)
    for scale in others:
        error = _find_error(blocks, scale, low, high)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    codes = (blocks / scales).round().clamp(low, high).to(torch.int8).view(n, k)
    return codes, scales.squeeze(2).to(torch.bfloat16)


def _find_error(blocks: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The squared error of each group [..., 1] at its scale."""
    return _add_halves(((blocks / scales).round().clamp(low, high) * scales - blocks).square())


def _add_halves(x: Tensor) -> Tensor:
    """Sums over the last dimension, which is a power of two, in an order that is the same everywhere."""
    while (size := x.shape[-1]) > 1:
        x = x[..., : size // 2] + x[..., size // 2 :]
    return x


def round_activations(x: Tensor) -> Tensor:
    """x [R, K] on the grid of int8 activations: per 32 inputs codes -127..127 times the largest magnitude over 127; in
    x's dtype."""
    columns = x.shape[1]
    groups = F.pad(x.float(), (0, -columns % GROUP)).view(len(x), -1, GROUP)
    scale = (groups.abs().amax(2, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return ((groups / scale).round() * scale).view(len(x), -1)[:, :columns].to(x.dtype)


def _dense_format(dtype: torch.dtype) -> str:
    for name, known in DENSE.items():
        if dtype == known:
            return name
    raise ValueError(f"no format stores {dtype}; choose one of {', '.join(DENSE)}")


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _has_blocked_kernel(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by this weight in a layout of its own: the same bits in about half of F.linear's
    time."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return on_cpu and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """`y = x W^T + b` with W [N, K] in one of `FORMATS`, on the device of its weight.

    What the kernel of this device and format wants is made on the first product, so that a runner with kernels of its
    own never holds a weight twice. Where there is no kernel, codes are expanded to the activation dtype: the same
    numbers at more bytes per step.
    """

    def __init__(self, weight: Tensor | Codes, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.codes = weight if isinstance(weight, Codes) else None
        self.shape = tuple(weight.codes.shape if isinstance(weight, Codes) else weight.shape)
        self.format = weight.format if isinstance(weight, Codes) else _dense_format(weight.dtype)
        self.bias = bias
        self.bytes = (weight.bytes if isinstance(weight, Codes) else weight.nbytes) + (
            0 if bias is None else bias.nbytes
        )
        self._weight, self._dtype = weight, dtype

    @property
    def weight(self) -> Tensor | Codes:
        """As it was given, in its plain layout."""
        if isinstance(self._weight, Tensor) and self._weight.is_mkldnn:
            self._weight = self._weight.to_dense()
            del self._multiply  # the next product makes the kernel's layout anew, so that one is held at a time
        return self._weight

    @cached_property
    def _multiply(self) -> Callable[[Tensor], Tensor]:
        weight = self._weight
        if isinstance(weight, Codes):
            if weight.codes.device.type == "cpu" and self._dtype == torch.bfloat16:
                return self._use_int4(weight) if weight.format == "int4" else self._use_int8(weight)
            return self._use_dense(weight.dense().to(self._dtype))
        return self._use_dense(weight)

    def _use_dense(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        bias = self.bias  # not self, which would hold itself, and so its weights, until garbage is collected
        if not _has_blocked_kernel(weight):
            return lambda x: F.linear(x, weight, bias)
        kernel = torch.ops.mkldnn._linear_pointwise.default
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        if self.codes is None:
            self._weight = blocked  # in place of the plain layout
        return lambda x: kernel(x, blocked, bias, "none", [], "")

    def _use_int8(self, weight: Codes) -> Callable[[Tensor], Tensor]:
        kernel, scales, bias = torch.ops.aten._weight_int8pack_mm.default, weight.scales[:, 0].contiguous(), self.bias
        # torch's kernel crashes on codes that lie anywhere but on a cache line, as those of a mapped file may.
        codes = weight.codes.clone() if weight.codes.data_ptr() % _CACHE_LINE else weight.codes
        return lambda x: _add_bias(kernel(x, codes, scales), bias)

    def _use_int4(self, weight: Codes) -> Callable[[Tensor], Tensor]:
        n, bias = self.shape[0], self.bias
        short = -n % _KERNEL_ROWS
        codes = F.pad(weight.codes, (0, 0, 0, short)).int() + 8
        scales = F.pad(weight.scales, (0, 0, 0, short))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        with_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        if short:
            return lambda x: _add_bias(kernel(x, packed, GROUP, with_zeros)[:, :n], bias)
        return lambda x: _add_bias(kernel(x, packed, GROUP, with_zeros), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, K] -> [R, N]."""
        return self._multiply(x if self.codes is None else round_activations(x))

    def dense(self) -> Tensor:
        """float32 [N, K], the numbers that the product really uses."""
        if isinstance(self._weight, Codes):
            return self._weight.dense()
        weight = self._weight.to_dense() if self._weight.is_mkldnn else self._weight
        return weight.float()


def make_linear(weight: Tensor, bias: Tensor | None, format: str) -> Linear:
    """A `Linear` of a dense [N, K] weight in `format`; int4 falls back to int8 where K is no multiple of its group."""
    if format in DENSE:
        return Linear(weight.to(DENSE[format]), None if bias is None else bias.to(DENSE[format]))
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    codes = quantise(weight, choose_format(format, weight.shape[1]))
    return Linear(codes, None if bias is None else bias.to(dtype), dtype)
