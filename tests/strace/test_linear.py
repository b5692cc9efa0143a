"""Weight formats: rounding error, the int4 scale's sign, the same bits from the library and from torch, and each kernel
against the dense product of the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strace import native
from strace.linear import (
    DENSE,
    FORMATS,
    GROUP,
    Codes,
    Linear,
    _quantise_rows,
    make_linear,
    quantise,
    round_activations,
)

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 5).map(lambda groups: groups * GROUP))
BF16 = 2.0**-8  # largest relative error of one rounding to bf16


def random_weight(shape: tuple[int, int], seed: int) -> Tensor:
    """Rows of very different size, a few of them with one large weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[0])[:, None]
    weight[::3, 0] *= 8
    return weight


@given(SHAPES, st.integers(0, 1000))
def test_int8_rounds_to_half_a_step_of_the_row(shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(shape, seed)
    codes = quantise(weight, "int8")
    assert codes.codes.dtype == torch.int8
    assert codes.scales.shape == (shape[0], 1)
    peak = weight.abs().amax(1, keepdim=True)
    # Half a step, and the largest weight once more by the rounding of the scale to bf16.
    assert ((codes.dense() - weight).abs() <= peak * (0.5 / 127 * (1 + BF16) + BF16)).all()


@given(SHAPES, st.integers(0, 1000))
def test_int4_rounds_to_half_a_step_of_the_group_in_the_mean(shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(shape, seed)
    codes = quantise(weight, "int4")
    assert codes.scales.shape == (shape[0], shape[1] // GROUP)
    assert codes.codes.min() >= -8
    assert codes.codes.max() <= 7
    groups = weight.view(shape[0], -1, GROUP)
    error = (codes.dense().view_as(groups) - groups).square().sum(2)
    # The unshrunk scale errs by half a step (peak / 8) at most, a full one on the side that ends at 7.
    assert (error <= GROUP * (groups.abs().amax(2) / 8 * (1 + BF16)).square()).all()


def test_int4_errs_less_than_a_symmetric_grid() -> None:
    groups = torch.randn(64, 8, GROUP, generator=torch.Generator().manual_seed(0))
    step = groups.abs().amax(2, keepdim=True) / 7
    symmetric = ((groups / step).round() * step - groups).square().sum()
    weight = groups.view(64, -1)
    assert (quantise(weight, "int4").dense() - weight).square().sum() < 0.8 * symmetric


@given(st.integers(0, 1000), st.sampled_from([-1.0, 1.0]))
def test_int4_scale_carries_the_sign_of_the_largest_weight(seed: int, sign: float) -> None:
    weight = torch.rand(1, GROUP, generator=torch.Generator().manual_seed(seed)) * 0.2
    weight[0, 7] = 2.0 * sign
    codes = quantise(weight, "int4")
    assert codes.codes[0, 7] == -8
    assert codes.scales[0, 0].sign() == -sign
    assert codes.dense()[0, 7].item() == pytest.approx(2.0 * sign, rel=0.21)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zero_groups_stay_zero(format: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = 1.0
    codes = quantise(weight, format)
    assert codes.dense().isfinite().all()
    assert torch.equal(codes.dense() != 0, weight != 0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_is_on_the_grid_is_kept_exactly(format: str) -> None:
    low, high = (-8, 7) if format == "int4" else (-127, 127)
    grid = torch.randint(low, high + 1, (5, 64), generator=torch.Generator().manual_seed(0)).float()
    grid[:, ::GROUP] = low
    codes = quantise(grid * 0.25, format)
    assert torch.equal(codes.dense(), grid * 0.25)
    assert torch.equal(quantise(codes.dense(), format).codes, codes.codes)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """fp32 or bf16; numbers of all sizes, many of them equal but for their sign, some zero."""
    rows, groups = draw(SHAPES)
    weight = random_weight((rows, groups), draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["any", "few", "tiny", "huge"]))
    if kind == "few":
        weight = (weight / weight.abs().amax(1, keepdim=True) * draw(st.integers(1, 12))).round()
    weight = weight * {"tiny": 1e-38, "huge": 1e15}.get(kind, 1.0)
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@pytest.mark.skipif(not native.available(), reason="the native library is not here")
@given(weights(), st.sampled_from(["int8", "int4"]))
def test_the_library_rounds_to_the_same_bits(weight: Tensor, format: str) -> None:
    ours, (codes, scales) = quantise(weight, format), _quantise_rows(weight, format)
    assert torch.equal(ours.scales.view(torch.int16), scales.view(torch.int16))
    assert torch.equal(ours.codes, codes)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", [1, 16, 40, 300])
@pytest.mark.parametrize("format", FORMATS)
def test_kernel_multiplies_by_the_numbers_it_says(format: str, n: int, bias: bool) -> None:
    dtype = DENSE.get(format, torch.bfloat16)
    weight = random_weight((n, 96), n).to(dtype)
    offset = torch.linspace(-1, 1, n).to(dtype) if bias else None
    linear = make_linear(weight, offset, format)
    assert linear.format == format
    assert linear.shape == (n, 96)
    assert linear.dense().dtype == torch.float32
    if format in DENSE:
        assert torch.equal(linear.dense(), weight.float())
    for rows in range(1, 10):
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = linear(x)
        assert got.dtype == dtype
        assert got.shape == (rows, n)
        x = x if format in DENSE else round_activations(x)
        wanted = F.linear(x.double(), linear.dense().double())
        # Weights may pass through bf16 inside the kernel; the product, then the sum with the bias, are rounded once
        # each.
        slack = (x.double().abs() @ linear.dense().double().abs().T) * (BF16 / 4 if dtype == torch.bfloat16 else 1e-6)
        slack += wanted.abs() * (BF16 if dtype == torch.bfloat16 else 1e-6)
        if offset is not None:
            wanted += offset.double()
            slack += wanted.abs() * (BF16 if dtype == torch.bfloat16 else 1e-6)
        assert ((got.double() - wanted).abs() <= slack + 1e-9).all(), rows


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_run_in_float32_too(format: str) -> None:
    linear = make_linear(random_weight((20, 64), 0), None, format)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(linear(x), round_activations(x) @ linear.dense().T, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 1000))
def test_activations_are_rounded_to_codes_of_their_group(rows: int, columns: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    x[0, :GROUP] = 0
    for got, wanted in zip(round_activations(x).split(GROUP, 1), x.split(GROUP, 1), strict=True):
        peak = wanted.abs().amax(1, keepdim=True)
        assert ((got - wanted).abs() <= peak * (0.5 / 127 + 1e-6)).all()
        codes = got * 127 / peak.clamp_min(1e-30)
        assert torch.allclose(codes, codes.round(), atol=1e-3)


@pytest.mark.parametrize(
    ("format", "expected"),
    [("fp32", 40 * 64 * 4), ("bf16", 40 * 64 * 2), ("int8", 40 * 64 + 40 * 2), ("int4", 40 * 64 // 2 + 40 * 2 * 2)],
)
def test_bytes_are_those_stored(format: str, expected: int) -> None:
    weight = random_weight((40, 64), 0).to(DENSE.get(format, torch.bfloat16))
    assert make_linear(weight, None, format).bytes == expected
    assert make_linear(weight, weight[:, 0], format).bytes == expected + 40 * weight.element_size()


def test_int4_falls_back_to_int8_where_groups_do_not_fit() -> None:
    assert make_linear(random_weight((4, 48), 0), None, "int4").format == "int8"


def test_bad_formats_are_named() -> None:
    weight = random_weight((4, 48), 0)
    with pytest.raises(ValueError, match="'int2' is not a quantised format"):
        quantise(weight, "int2")
    with pytest.raises(ValueError, match="multiple of 32 inputs, got 48"):
        quantise(weight, "int4")
    with pytest.raises(ValueError, match=r"no format stores torch\.float16"):
        Linear(weight.half())


def test_int8_codes_may_lie_anywhere() -> None:
    """Codes of a mapped file start at any byte; torch's kernel wants a cache line."""
    codes = quantise(torch.randn(512, 256), "int8")
    shifted = torch.empty(codes.codes.numel() + 8, dtype=torch.int8)[8:].view(codes.codes.shape)
    shifted.copy_(codes.codes)
    x = torch.randn(8, 256).bfloat16()
    assert torch.equal(Linear(Codes("int8", shifted, codes.scales))(x), Linear(codes)(x))
