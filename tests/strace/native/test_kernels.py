"""The native products, format by format, against float64; their bits do not depend on what shares the call."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strace import native
from strace.linear import _PIECE, DENSE, FORMATS, Codes, quantise, round_activations
from strace.native_runner import _PIECE_ROWS, NativeRunner, Weights
from tests.strace.native.passes import load_tiny, make_native

GROUP = 32
ISAS = ("avx512amx", "avx512bf16", "avx512vnni", "avx2", "portable")
ROUNDING = 2.0**-20  # of the sum of the products' magnitudes; float32 sums of some hundred terms lose less


@cache
def runner() -> NativeRunner:
    return make_native({"full": load_tiny()})


def multiply(weight: Tensor | Codes, bias: Tensor | None, x: Tensor, threads: int = 1) -> Tensor:
    """float32 [tokens, rows], by the library, of weights packed by so many threads."""
    rows = (weight.codes if isinstance(weight, Codes) else weight).shape[0]
    y = torch.full((len(x), rows), torch.nan)
    with ThreadPoolExecutor(threads) as pool:
        weights = Weights(pool)
        matrix = weights.matrix(weight, bias)
    native.check(native.load().st_multiply(runner()._handle, matrix, x.data_ptr(), len(x), y.data_ptr()))
    return y


@st.composite
def products(draw: st.DrawFn) -> tuple[str, Tensor | Codes, Tensor | None, Tensor]:
    """A format, a matrix in it, a bias or none, and rows of activations of very different sizes."""
    format = draw(st.sampled_from(FORMATS))
    rows, tokens = draw(st.integers(1, 100)), draw(st.integers(1, 70))
    columns = draw(st.integers(1, 10)) * GROUP if format in ("int8", "int4") else draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dense = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
    x[torch.rand(tokens, generator=generator) < 0.1] = 0
    bias = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    weight = dense.to(DENSE[format]) if format in DENSE else quantise(dense, format)
    return format, weight, bias, x


@given(products())
def test_products_equal_those_in_float64(product: tuple[str, Tensor | Codes, Tensor | None, Tensor]) -> None:
    format, weight, bias, x = product
    dense = (weight.dense() if isinstance(weight, Codes) else weight).double()
    rounded = (round_activations(x) if isinstance(weight, Codes) else x.to(weight.dtype)).double()
    wanted = rounded @ dense.T + (0 if bias is None else bias.double())
    allowed = ROUNDING * (rounded.abs() @ dense.abs().T + (0 if bias is None else bias.double().abs()))
    found = multiply(weight, bias, x).double()
    assert ((found - wanted).abs() <= allowed).all(), f"{format}: {((found - wanted).abs() / allowed).max()}"


@given(st.sampled_from(("int8", "int4")), st.integers(1, 12), st.integers(0, 2**32))
def test_products_of_the_largest_codes_are_exact(format: str, groups: int, seed: int) -> None:
    """Integer products must not saturate."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 127) if format == "int8" else (-8, 7)
    signs = torch.randint(2, (40, groups * GROUP), generator=generator)
    signs[:20] = signs[:20, :1]  # of some rows all have one sign
    codes = torch.where(signs == 1, high, low).to(torch.int8)
    x = 127.0 * torch.where(torch.rand(7, groups * GROUP, generator=generator) < 0.5, 1, -1)
    x[:2] = x[:2, :1]
    weight = Codes(format, codes, torch.ones(40, groups if format == "int4" else 1, dtype=torch.bfloat16))
    assert torch.equal(multiply(weight, None, x).double(), x.double() @ codes.double().T)


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_of_several_pieces(format: str) -> None:
    """More rows than are packed at once, and more weights than are quantised at once."""
    rows, columns = 2 * _PIECE_ROWS + 33, 9 * GROUP
    assert rows * columns > _PIECE
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight = dense.to(DENSE[format]) if format in DENSE else quantise(dense, format)
    if isinstance(weight, Codes):
        last = quantise(dense[-50:], format)
        assert torch.equal(weight.codes[-50:], last.codes)
        assert torch.equal(weight.scales[-50:], last.scales)
    one = torch.eye(columns)[:3] * 127  # which int8 activations hold exactly
    wanted = 127 * (weight.dense() if isinstance(weight, Codes) else weight.float())[:, :3].T
    assert torch.allclose(multiply(weight, None, one, threads=2), wanted, rtol=1e-6)


@given(products(), st.data())
def test_a_rows_bits_do_not_depend_on_what_shares_the_call(
    product: tuple[str, Tensor | Codes, Tensor | None, Tensor], data: st.DataObject
) -> None:
    _, weight, bias, x = product
    first = data.draw(st.integers(0, len(x) - 1))
    last = data.draw(st.integers(first + 1, len(x)))
    whole, part = multiply(weight, bias, x), multiply(weight, bias, x[first:last].contiguous())
    assert torch.equal(whole[first:last].view(torch.int32), part.view(torch.int32))


@pytest.mark.skipif("STRACE_ISA" in os.environ, reason="an instruction set was asked for")
def test_intel_multiplies_pairs_only_in_tiles() -> None:
    about = Path("/proc/cpuinfo")
    if not about.exists() or "GenuineIntel" not in about.read_text():
        pytest.skip("no processor of Intel's")
    assert native.load().st_isa().decode() != "avx512bf16"


@pytest.mark.skipif("STRACE_ISA" in os.environ, reason="an instruction set was asked for")
@pytest.mark.parametrize("isa", ISAS)
def test_all_instruction_sets_that_this_processor_has(isa: str) -> None:
    here = native.load().st_isa().decode()
    environment = {**os.environ, "STRACE_ISA": isa}
    print_isa = "from strace import native; print(native.load().st_isa().decode())"
    found = subprocess.run([sys.executable, "-c", print_isa], env=environment, capture_output=True, text=True).stdout
    if found.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    if isa == here:
        return  # the tests above ran on it
    tests = ["tests/strace/native/test_kernels.py", "tests/strace/native/test_invariance.py"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
