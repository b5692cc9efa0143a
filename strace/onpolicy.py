"""How drafts do on the full model's own text: prompts of a class continued by it, and one row per drafted position.

Acceptance on other people's text is not what serving meets: the text after a prompt is the full model's. From the
table follow a_i, agreement, total variation and how far a draft's confidence tells whether it stands.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from strace.blocks import LONGEST_BLOCK
from strace.decoder import Decoder
from strace.draft import Held
from strace.files import file_beside
from strace.kv import BLOCK, Batch
from strace.measure import block_streams
from strace.runner import FULL, Runner
from strace.sampling import Noise, Sampler, SamplingParams, total_variation
from strace.texts import Texts, batch_texts, split_rows

TABLE = "positions.safetensors"
TEMPERATURES = (1.0, 0.7, 0.0)
SEQUENCES = 16  # continued side by side
BINS = 10


@dataclass(frozen=True)
class Continuation:
    """A prompt cut from the document `source`, and what the full model wrote after its `given` ids at `temperature`."""

    source: str
    ids: list[int]
    given: int
    temperature: float


def count_cache(given: int, tokens: int) -> int:
    """Blocks of a cache in which `continue_prompts` runs over prompts of at most `given` tokens."""
    return SEQUENCES * -(-(given + tokens) // BLOCK)


@torch.inference_mode()
def continue_prompts(
    runner: Runner,
    prompts: Sequence[tuple[str, list[int]]],
    temperature: float,
    tokens: int,
    stop_ids: Collection[int],
    seed: int = 0,
) -> list[Continuation]:
    """Every prompt (source, ids; none empty) continued by the full model for up to `tokens` tokens or to a stop id."""
    found = []
    for first in range(0, len(prompts), SEQUENCES):
        some = prompts[first : first + SEQUENCES]
        texts = [list(ids) for _, ids in some]
        samplers = [Noise(seed * len(prompts) + first + i, shared=False) for i in range(len(some))]
        _continue(runner, texts, SamplingParams(temperature), samplers, tokens, stop_ids)
        found += [Continuation(source, t, len(ids), temperature) for (source, ids), t in zip(some, texts, strict=True)]
    return found


def _continue(
    runner: Runner,
    texts: list[list[int]],
    params: SamplingParams,
    noises: Sequence[Noise],
    tokens: int,
    stop_ids: Collection[int],
) -> None:
    """Append to `texts`, all in one batch from token to token."""
    width = -(-(max(map(len, texts)) + tokens) // BLOCK)
    tables = torch.arange(len(texts) * width).view(-1, width)
    starts, alive = [0] * len(texts), list(range(len(texts)))
    for _ in range(tokens):
        counts = [len(texts[i]) - starts[i] for i in alive]
        pending = [token for i in alive for token in texts[i][starts[i] :]]
        batch = Batch(pending, counts, [starts[i] for i in alive], tables[alive])
        logits = runner.forward(FULL, batch, (np.cumsum(counts) - 1).tolist())
        held = [Held(row, [], None, Sampler(params, noises[i], len(texts[i]))) for row, i in enumerate(alive)]
        for i, verdict in zip(alive, runner.verify(logits, held), strict=True):
            starts[i] = len(texts[i])
            texts[i] += verdict.tokens
        alive = [i for i in alive if texts[i][-1] not in stop_ids]
        if not alive:
            return


@dataclass(frozen=True)
class Positions:
    """One entry per drafted position, arrays of one length, texts in order and positions in order within a text.

    source: number of the document in `sources`. text: number of the continuation. depth: 0..7 in its draft block. top,
    gap, entropy: of the draft's distribution at temperature 1. drawn: a token drawn from the draft's processed q; `q`,
    `p` are its probabilities, `tv` the total variation of the two distributions, `same` equality of their arg max.
    stood: probability that the token which the text goes on with would have stood, had the draft drawn the text.
    """

    sources: tuple[str, ...]
    source: np.ndarray
    text: np.ndarray
    temperature: np.ndarray
    depth: np.ndarray
    top: np.ndarray
    gap: np.ndarray
    entropy: np.ndarray
    drawn: np.ndarray
    q: np.ndarray
    p: np.ndarray
    tv: np.ndarray
    same: np.ndarray
    stood: np.ndarray

    def __len__(self) -> int:
        return len(self.depth)

    @property
    def reached(self) -> np.ndarray:
        """float64: the probability that all drafts before a position, in its block, stand.

        The text is drawn from p; weighted by min(1, q/p) at each token it is distributed as accepted drafts are.
        """
        reached = np.ones(len(self))
        for depth in range(1, LONGEST_BLOCK):
            here = np.flatnonzero(self.depth == depth)
            reached[here] = reached[here - 1] * self.stood[here - 1]
        return reached

    def at(self, temperature: float) -> Positions:
        """The rows of one temperature."""
        here = np.isclose(self.temperature, temperature)
        return Positions(self.sources, **{name: getattr(self, name)[here] for name in _COLUMNS})

    def save(self, folder: Path) -> None:
        """Write `positions.safetensors` into `folder`."""
        with file_beside(folder / TABLE) as beside:
            columns = {name: getattr(self, name).astype(_COLUMNS[name]) for name in _COLUMNS}
            save_file(columns, beside, {"sources": json.dumps(self.sources)})

    @classmethod
    def load(cls, folder: Path) -> Positions:
        """Read `positions.safetensors` of `folder`.

        Raises:
            ValueError: if it is missing or cannot be read.
        """
        try:
            with safe_open(folder / TABLE, framework="numpy") as stored:
                sources = tuple(json.loads((stored.metadata() or {})["sources"]))
                return cls(sources, **{name: stored.get_tensor(name) for name in _COLUMNS})
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"cannot read the table {folder / TABLE}: {error}") from error


_TYPES = {"source": "int32", "text": "int32", "drawn": "int32", "depth": "uint8", "same": "uint8"}
_COLUMNS = {f.name: np.dtype(_TYPES.get(f.name, "float32")) for f in fields(Positions) if f.name != "sources"}


@torch.inference_mode()
def measure_positions(
    full: Decoder, subgraph: Decoder, continuations: Sequence[Continuation], seed: int = 0
) -> Positions:
    """The table of `subgraph` drafting in blocks of 8 over the full model's own text, at each text's temperature."""
    [positions] = measure_heads(full, [subgraph], continuations, seed)
    return positions


@torch.inference_mode()
def measure_heads(
    full: Decoder, subgraphs: Sequence[Decoder], continuations: Sequence[Continuation], seed: int = 0
) -> list[Positions]:
    """As `measure_positions`, of subgraphs that differ in their heads alone: their layers are run once."""
    generators = [torch.Generator().manual_seed(seed) for _ in subgraphs]
    sources = tuple(sorted({c.source for c in continuations}))
    # batch_texts keeps this order, so that rows can be told whose they are.
    ordered = sorted(continuations, key=lambda c: len(c.ids), reverse=True)
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in subgraphs]
    done = 0
    for batch in batch_texts([c.ids for c in ordered]):
        own = ordered[done : done + batch.shape[0]]
        # The same from every generator: as many numbers were drawn from each.
        starts, *_ = [_draft_starts(batch, [c.given for c in own], generator) for generator in generators]
        p_stream, q_stream = block_streams(full, subgraphs[0], batch, starts)
        for s, each in enumerate(own):
            rows = torch.arange(each.given - 1, len(each.ids) - 1)
            if not len(rows):
                continue
            at = rows + s * batch.shape[1]
            for subgraph, generator, found in zip(subgraphs, generators, parts, strict=True):
                columns = _compare_rows(full, subgraph, p_stream[at], q_stream[at], each, generator)
                columns["depth"] = (rows - starts[s, rows]).numpy()
                columns["source"] = np.full(len(rows), sources.index(each.source))
                columns["text"] = np.full(len(rows), done + s)
                found.append(columns)
        done += len(own)
    return [_join(sources, found) for found in parts]


def _join(sources: tuple[str, ...], parts: Sequence[dict[str, np.ndarray]]) -> Positions:
    joined = {n: np.concatenate([p[n] for p in parts] or [np.zeros(0)]).astype(t) for n, t in _COLUMNS.items()}
    return Positions(sources, **joined)


def _draft_starts(batch: Texts, given: Sequence[int], generator: torch.Generator) -> Tensor:
    """int64 [S, n]: blocks of 8 from the last given token on, the first one cut to a random length."""
    places = torch.arange(batch.shape[1])
    offsets = torch.randint(LONGEST_BLOCK, (len(given), 1), generator=generator)
    behind = places - (torch.tensor(given)[:, None] - 1)
    starts = ((behind + offsets) // LONGEST_BLOCK * LONGEST_BLOCK - offsets).clamp_min(0)
    return torch.where(behind < 0, places, places - behind + starts)


def _compare_rows(
    full: Decoder, subgraph: Decoder, p_stream: Tensor, q_stream: Tensor, text: Continuation, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """The columns that the distributions of one text's rows give."""
    nexts = torch.tensor(text.ids[text.given :])
    columns: list[dict[str, Tensor]] = []
    parts = (split_rows(rows, full.spec.vocabulary) for rows in (p_stream, q_stream, nexts))
    for a, b, x in zip(*parts, strict=True):
        wanted, short = full.logits(a).cpu(), subgraph.logits(b).cpu()
        rows = short
        if subgraph.token_ids is not None:
            rows = torch.full_like(wanted, -torch.inf).index_copy_(1, subgraph.token_ids.cpu(), short)
        p, q = (_shape(r, text.temperature) for r in (wanted, rows))
        drawn = torch.multinomial(q, 1, generator=generator)
        plain = short.softmax(1)
        top = plain.topk(2, 1).values
        q_next, p_next = (t.gather(1, x[:, None])[:, 0] for t in (q, p))
        columns.append(
            {
                "temperature": torch.full((len(x),), text.temperature),
                "top": top[:, 0],
                "gap": top[:, 0] - top[:, 1],
                "entropy": torch.special.entr(plain).sum(1),
                "drawn": drawn[:, 0],
                "q": q.gather(1, drawn)[:, 0],
                "p": p.gather(1, drawn)[:, 0],
                "tv": total_variation(p, q),
                "same": wanted.argmax(1) == rows.argmax(1),
                "stood": torch.where(q_next >= p_next, (q_next > 0).float(), q_next / p_next.clamp_min(1e-30)),
            }
        )
    return {name: torch.cat([c[name] for c in columns]).numpy() for name in columns[0]}


def _shape(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return (logits / temperature).softmax(1)


def conditional_acceptance(positions: Positions) -> list[float]:
    """a_i at draft positions 1..8 of one temperature's rows: the share that stands where all before it stood."""
    reached = positions.reached
    found = []
    for depth in range(LONGEST_BLOCK):
        here = positions.depth == depth
        weight = float(reached[here].sum())
        found.append(float((reached * (1 - positions.tv))[here].sum()) / weight if weight else 0.0)
    return found


def share_agreeing(positions: Positions) -> list[float]:
    """The share of equal arg max at draft positions 1..8, whatever came before."""
    depths = [positions.same[positions.depth == depth] for depth in range(LONGEST_BLOCK)]
    return [float(same.mean()) if len(same) else 0.0 for same in depths]


@dataclass(frozen=True)
class Calibrated:
    """What a draft's confidence says of it. curve: acceptance at the middle of each tenth of confidence, by isotonic
    regression on one part. reliability, on another: of each tenth that occurs, mean predicted and mean observed
    acceptance, and its share of the positions. ece: mean gap between the two, weighted by share."""

    curve: list[float]
    reliability: list[tuple[float, float, float]]
    ece: float


def calibrate(fitted_on: Positions, reported_on: Positions) -> Calibrated:
    """Acceptance by confidence, fitted on one table and judged on another of other sources."""
    curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(fitted_on.top, standing(fitted_on))
    predicted, observed = curve.predict(reported_on.top), standing(reported_on)
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    reliability = []
    for number in range(BINS):
        here = bins == number
        if here.any():
            reliability.append((float(predicted[here].mean()), float(observed[here].mean()), float(here.mean())))
    ece = sum(share * abs(p - o) for p, o, share in reliability)
    return Calibrated(curve.predict((np.arange(BINS) + 0.5) / BINS).tolist(), reliability, float(ece))


def standing(positions: Positions) -> np.ndarray:
    """min(1, p/q) of every drawn token."""
    return np.minimum(1.0, positions.p / np.maximum(positions.q, 1e-30))
