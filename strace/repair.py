"""Repair and quantise: fit what a subgraph keeps so that its stream follows the full model's.

Layer by layer, on the inputs that the compact, quantised layers before really give, and in the serving regime (draft
blocks of 1 to 8 positions over the full model's keys and values, see blocks.py). All projections are fitted by ridge
regression towards the sliced weights and rounded with their inputs' second moments (arXiv:2210.17323); how hard the
ridge pulls is judged after rounding, on texts apart from those fitted on. Output projections also get the bias that
removes the mean residual.

An input projection is fitted to what the sliced one gives on the full model's stream (as in arXiv:2504.02692): a part
of what the subgraph lacks can be told from what it has. Dense ones stay as they are, which is why folders need not hold
them.

What an output projection is fitted to is what the full stream has that the own one lacks. Where a post-norm follows
(OLMo-2, Gemma), which no linear fit sees through, it is the full model's own part before that norm instead: what
earlier layers lack stays lacking. In a parallel block attention and MLP read the same stream and are fitted one after
the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from strace.blocks import BlockAttend, RecordAttend, random_starts
from strace.decoder import MLP, Attention, Decoder, Layer, Norm, Sublayer, add, normalise_part
from strace.keep import Kept, slice_attention, slice_mlp, take
from strace.linear import DENSE, GROUP, Codes, Linear, quantise
from strace.texts import Texts

RIDGES = (0.003, 0.03, 0.3, 3.0)  # in mean diagonals of the inputs' moments
DAMPING = 0.01  # in the same
LOT = 1 << 24  # numbers of an input projection that are fitted together


class Moments:
    """Second moments of a product's inputs x [N, K] and wanted outputs r [N, D], float64, and their means.

    A constant is appended to x: the last row and column hold its sums.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xr = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.rr = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, r: Tensor | None = None) -> None:
        """Count rows in; without r only the inputs' moments grow."""
        x = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)
        self.xx += x.T @ x
        if r is not None:
            self.xr += x.T @ r
            self.rr += r.double().square().sum()

    @property
    def inputs(self) -> Tensor:
        """[K, K], about zero."""
        return self.xx[:-1, :-1]

    def centre(self) -> tuple[Tensor, Tensor]:
        """[K, K] and [K, D] about the means: what is left for a weight when the bias takes the means. They take the
        place of those about zero, so that afterwards only `bias` is still of use."""
        x = self.xx[:-1, -1] / -self.xx[-1, -1]
        return self.inputs.addr_(x, self.xx[:-1, -1]), self.xr[:-1].addr_(x, self.xr[-1])

    def bias(self, weight: Tensor) -> Tensor:
        """float64 [D]: the mean of r - W x."""
        return (self.xr[-1] - weight.double() @ self.xx[:-1, -1]) / self.xx[-1, -1]

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error per row of W x + b against r."""
        both = torch.cat([weight.double(), bias.double()[:, None]], 1)
        total = ((both @ self.xx) * both).sum() - 2 * (both * self.xr.T).sum() + self.rr
        return float(total / self.xx[-1, -1])


class Twins:
    """Second moments of inputs x [N, K] and of what the full model has in their places, float64 [K, K]."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.own, self.both = (torch.zeros(inputs, inputs, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, own: Tensor, full: Tensor) -> None:
        """Count rows in."""
        own = own.float()
        self.own += own.T @ own
        self.both += own.T @ full.float()

    def error(self, weight: Tensor, wanted: Tensor) -> float:
        """Squared error of `weight` on the own inputs against `wanted` on the full ones, but for a constant."""
        weight, wanted = weight.double(), wanted.double()
        return float(((weight @ self.own) * weight).sum() - 2 * ((weight @ self.both) * wanted).sum())


class Rounding:
    """Rounds matrices [N, K] of one kind of inputs to `format`, by the inputs' moments [K, K]. Dense ones stay as they
    are; int4 falls back to int8 where K is no multiple of its group, as in `make_linear`."""

    def __init__(self, moments: Tensor, format: str) -> None:
        self.moments, self.format = moments, format

    @cached_property
    def _upper(self) -> Tensor:
        return factor(self.moments)

    def __call__(self, weight: Tensor) -> Tensor | Codes:
        if self.format in DENSE:
            return weight
        if self.format == "int4" and weight.shape[1] % GROUP == 0:
            return round_second_order(weight, self._upper)
        return quantise(weight, "int8")


def factor(moments: Tensor) -> Tensor:
    """The upper factor, of unit diagonal, of the inverse of some inputs' moments [K, K]."""
    inverse = invert(add_diagonal(moments, DAMPING * moments.diagonal().mean().clamp_min(1e-12)))
    upper = torch.linalg.cholesky(inverse, upper=True, out=inverse)
    return upper.div_(upper.diagonal().clone()[:, None])


def add_diagonal(matrix: Tensor, number: Tensor) -> Tensor:
    """A copy of a square matrix with a number added all along its diagonal."""
    copy = matrix.clone(memory_format=torch.contiguous_format)
    copy.diagonal().add_(number)
    return copy


def lower_factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a positive definite matrix [K, K], contiguous, in its own memory: with 8,192 inputs a copy
    takes half a gigabyte. LAPACK takes the transpose, the same matrix, as it lies."""
    return torch.linalg.cholesky(matrix.mT, out=matrix.mT)


def invert(matrix: Tensor) -> Tensor:
    """The inverse of such a matrix, in its own memory too."""
    lower = lower_factor(matrix)
    return torch.cholesky_inverse(lower, out=lower)


def round_second_order(weight: Tensor, upper: Tensor) -> Codes:
    """int4 codes of a [N, K] matrix, each column's rounding error carried to the columns after it by the `factor` of
    its inputs' moments (GPTQ, arXiv:2210.17323); groups of 32 are scaled on the weights as carried so far."""
    k = weight.shape[1]
    left = weight.double().clone()
    codes, scales = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
    for start in range(0, k, GROUP):
        group = slice(start, start + GROUP)
        scale = quantise(left[:, group], "int4").scales
        errors = torch.empty_like(left[:, group])
        for j in range(start, start + GROUP):
            codes[:, j] = (left[:, j] / scale[:, 0].double()).round().clamp(-8, 7).to(torch.int8)
            errors[:, j - start] = left[:, j] - codes[:, j] * scale[:, 0].double()
            left[:, j + 1 : group.stop] -= torch.outer(errors[:, j - start], upper[j, j + 1 : group.stop])
        left[:, group.stop :] -= errors @ upper[group, group.stop :]
        scales.append(scale)
    return Codes("int4", codes, torch.cat(scales, 1))


def as_dense(weight: Tensor | Codes) -> Tensor:
    """float32 [N, K]."""
    return weight.dense() if isinstance(weight, Codes) else weight.float()


def pull_towards(start: Tensor, xx: Tensor, moved: Tensor) -> Iterator[Tensor]:
    """A matrix [N, K], float64, and ridge regressions towards it; xx, moved: moments of the inputs [K, K] and of the
    inputs with what `start` leaves of the wanted outputs [N, K]."""
    yield start
    unit = xx.diagonal().mean().clamp_min(1e-12)
    for ridge in RIDGES:
        yield start + torch.cholesky_solve(moved.T, lower_factor(add_diagonal(xx, ridge * unit))).T


def fit_input(sliced: Tensor, fit: Twins, choose: Twins, format: str) -> Codes:
    """The input projection [N, K] in a quantised format: what gives, on the own stream, the most of what `sliced` gives
    on the full model's. Rows go in lots of `LOT` numbers at most, for a head may have a billion."""
    rounding = Rounding(fit.own, format)
    lots = [_fit_rows(rows, fit, choose, rounding) for rows in sliced.split(max(1, LOT // sliced.shape[1]))]
    return Codes(lots[0].format, torch.cat([lot.codes for lot in lots]), torch.cat([lot.scales for lot in lots]))


def _fit_rows(sliced: Tensor, fit: Twins, choose: Twins, rounding: Rounding) -> Codes:
    """Some rows: of several ridges and no fit at all, the one whose rounded result errs least on `choose`."""
    start = sliced.double()
    least, best = math.inf, None
    for weight in pull_towards(start, fit.own, start @ (fit.both.T - fit.own)):
        rounded = rounding(weight)
        error = choose.error(as_dense(rounded), sliced)
        if error < least:
            least, best = error, rounded
    assert isinstance(best, Codes), "dense projections are not fitted"
    return best


def fit_output(sliced: Tensor, fit: Moments, choose: Moments, format: str) -> tuple[Tensor | Codes, Tensor]:
    """The output projection [D, K] in `format` and its bias [D]: ridge regression of the wanted outputs towards
    `sliced`, for the ridge whose rounded result errs least on `choose`. Where no fit beats them, the sliced weights
    stay. `fit` is used up."""
    xx, xr = fit.centre()
    start, rounding = sliced.double(), Rounding(xx, format)
    tried = []
    for weight in pull_towards(start, xx, xr.T - start @ xx):
        rounded = rounding(weight)
        bias = fit.bias(as_dense(rounded))
        tried.append((choose.error(as_dense(rounded), bias), rounded, bias))
    _, rounded, bias = min(tried, key=lambda t: t[0])
    return rounded, bias


@dataclass
class March:
    """One batch on its way through the layers: the full model's stream and the subgraph's, float32 [S * n, hidden],
    what the sublayer at hand `read`s of the two, and the full model's keys and values of the layer at hand."""

    texts: Texts
    starts: Tensor
    rotation: tuple[Tensor, Tensor]
    full: Tensor
    own: Tensor
    fitted_on: bool
    read: tuple[Tensor, Tensor] = field(init=False)
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def real(self, values: Tensor) -> Tensor:
        """The rows of `values` that are not padding."""
        return values[self.texts.real.flatten().to(values.device)]

    def move(self, device: torch.device) -> None:
        """Bring the streams to the device of the next layer."""
        if self.own.device != device:
            self.full, self.own = self.full.to(device), self.own.to(device)
            self.rotation = self.rotation[0].to(device), self.rotation[1].to(device)

    def look(self) -> None:
        """Let the sublayers to come read the streams as they are now."""
        self.read = self.full, self.own


class Capture:
    """A tap that keeps one activation."""

    value: Tensor

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, name: str, layer: int, value: Tensor) -> Tensor:
        if name == self.name:
            self.value = value
        return value


class Repair:
    """One repair under way. `served` is the subgraph as it will be served; `work` has the same numbers with rounded
    matrices expanded, because the kernels of quantised formats are slow over thousands of rows. What is kept of a layer
    is cut out when its turn comes, and its expanded matrices go when it is over."""

    def __init__(self, full: Decoder, kept: Kept, format: str, marches: list[March]) -> None:
        self.full, self.kept, self.format, self.marches = full, kept, format, marches
        self.work, self.served = (replace(full, layers=[Layer(None, None) for _ in full.layers]) for _ in range(2))
        if kept.token_ids is not None:
            ids = kept.token_ids.to(full.embed.device)
            self.served = replace(self.served, head=take(full.head, rows=ids), token_ids=ids)

    def attention(self, l: int) -> None:
        """Advance all streams over the attention of layer `l`."""
        wanted = []
        for march in self.marches:
            march.move(self.full.layers[l].device)
            march.look()
            record, tap = RecordAttend(*march.texts.shape, device=march.full.device), Capture("z")
            added = self.full.attention(l, march.read[0], march.rotation, record, tap)
            march.full, march.entries = add(march.full, added), record.entries
            wanted.append(self._wanted(march, self.full.layers[l].attention, tap))
        whole = self.full.layers[l].attention
        part = None if whole is None else slice_attention(whole, self.kept.groups[l], self.full.spec)
        if part is None:
            return
        qkv, dense = self._fit_input(part.qkv, part.norm)
        self.work.layers[l].attention = replace(part, qkv=dense)
        inputs = []
        for march in self.marches:
            tap = Capture("z")
            self.work.attention(l, march.read[1], march.rotation, BlockAttend(march.starts, march.entries), tap)
            inputs.append(tap.value)
        self.work.layers[l].attention = None
        self.served.layers[l].attention = replace(part, qkv=qkv, o=self._fit_output(part, part.o, inputs, wanted))

    def mlp(self, l: int) -> None:
        """Advance all streams over the MLP of layer `l`."""
        wanted = []
        for march in self.marches:
            if not self.full.spec.parallel:
                march.look()
            tap = Capture("act")
            march.full = add(march.full, self.full.mlp(l, march.read[0], tap))
            wanted.append(self._wanted(march, self.full.layers[l].mlp, tap))
        whole = self.full.layers[l].mlp
        part = None if whole is None else slice_mlp(whole, self.kept.neurons[l], self.full.spec)
        if part is None:
            return
        inner, dense = self._fit_input(part.inner, part.norm)
        self.work.layers[l].mlp = replace(part, inner=dense)
        inputs = []
        for march in self.marches:
            tap = Capture("act")
            self.work.mlp(l, march.read[1], tap)
            inputs.append(tap.value)
        self.work.layers[l].mlp = None
        self.served.layers[l].mlp = replace(part, inner=inner, down=self._fit_output(part, part.down, inputs, wanted))

    def head(self) -> None:
        """Fit the head to the normalised streams that it will read."""
        for march in self.marches:
            march.move(self.full.final_norm.device)
            march.look()
        self.served.head, _ = self._fit_input(self.served.head, self.full.final_norm)

    def _wanted(self, march: March, whole: Attention | MLP | None, tap: Capture) -> Tensor:
        """What the output projection at hand shall give, float32 [S * n, hidden]; `tap` saw what the full one reads."""
        if whole is None or whole.post_norm is None:
            return march.full - march.own
        output = whole.o if isinstance(whole, Attention) else whole.down
        return output(tap.value).float()

    def _fit_input(self, linear: Linear, norm: Norm | None) -> tuple[Linear, Linear]:
        """Fit an input projection to what it gives on the full model's stream: as served, and expanded."""
        if self.format in DENSE:
            return linear, linear
        fit, choose = (Twins(linear.shape[1], self.marches[0].own.device) for _ in range(2))
        for march in self.marches:
            full, own = (self.full.normalise(march.real(stream), norm) for stream in march.read)
            (fit if march.fitted_on else choose).add(own, full)
        return self._linears(fit_input(linear.dense(), fit, choose, self.format), linear.bias)

    def _fit_output(self, part: Sublayer, sliced: Linear, inputs: list[Tensor], wanted: list[Tensor]) -> Linear:
        """Fit an output projection to what is wanted of it, then add what the part gives to the own streams."""
        fit, choose = (Moments(sliced.shape[1], sliced.shape[0], inputs[0].device) for _ in range(2))
        for march, x, y in zip(self.marches, inputs, wanted, strict=True):
            (fit if march.fitted_on else choose).add(march.real(x), march.real(y))
        served, dense = self._linears(*fit_output(sliced.dense(), fit, choose, self.format))
        for march, x in zip(self.marches, inputs, strict=True):
            march.own = march.own + normalise_part(dense(x), part)
        return served

    def _linears(self, weight: Tensor | Codes, bias: Tensor | None) -> tuple[Linear, Linear]:
        """As served, and expanded."""
        dtype = self.full.dtype
        bias = None if bias is None else bias.to(dtype)
        dense = Linear(as_dense(weight).to(dtype), bias)
        return Linear(weight, bias, dtype) if isinstance(weight, Codes) else dense, dense


@torch.inference_mode()
def repair(
    full: Decoder, kept: Kept, format: str, fit: Sequence[Texts], choose: Sequence[Texts], seed: int = 0
) -> Decoder:
    """The kept units of `full`, rounded to `format` and fitted on the texts of `fit`; see the module.

    Sublayers that were dropped stay dropped: the next one that is kept is fitted towards the full stream after it, and
    so takes over what it can of theirs, unless a post-norm follows it (see the module).
    """
    generator = torch.Generator().manual_seed(seed)
    work = Repair(full, kept, format, [_start(full, t, generator, t_fit) for t, t_fit in _both(fit, choose)])
    for l in range(len(full.layers)):
        work.attention(l)
        work.mlp(l)
    work.head()
    return work.served


def _both(fit: Sequence[Texts], choose: Sequence[Texts]) -> list[tuple[Texts, bool]]:
    return [(texts, True) for texts in fit] + [(texts, False) for texts in choose]


def _start(full: Decoder, texts: Texts, generator: torch.Generator, fitted_on: bool) -> March:
    device = full.embed.device
    positions = texts.positions.to(device)
    stream = full.embedded(texts.tokens.flatten().to(device), positions)
    starts = random_starts(texts.shape, generator)
    return March(texts, starts, full.rotation(positions), stream, stream, fitted_on)
