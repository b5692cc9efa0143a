"""The paper's analysis of one model: traces and masked runs of every prompt, one finished prompt at a time.

A folder holds `manifest.json` (what was run on what), `parts/` (a JSON and a safetensors file per finished prompt, by
which a stopped run goes on) and, once the prompts are through, `rows.jsonl`: one row per prompt, control and size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from strace.ablate import CONTROLS, Composition, Means, Selection, Selections, compose, measure_means, run_masked
from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint
from strace.decoder import Decoder
from strace.extract import SIZES, Traces
from strace.files import file_beside, write_beside
from strace.importance import MEASURES, draw_weights, weigh_edges
from strace.metrics import (
    cosine,
    entropy,
    ordered_nucleus,
    relative_distance,
    tv_density,
    unigram_correlation,
)
from strace.sampling import total_variation

ABLATIONS = ("zero", "mean")
FORMATS = ("fp32", "bf16")
SCHEMA = 1
MANIFEST, ROWS, PARTS = "manifest.json", "rows.jsonl", "parts"
MEAN_PROMPTS = 64  # prompts of the file that mean ablation takes its means from


class BadAnalysis(ValueError):
    """Prompts, settings or a folder that an analysis cannot use; the message names the place and the reason."""


class BadOption(BadAnalysis):
    """A setting that has no such value."""


@dataclass(frozen=True)
class Options:
    """What to analyze. `sizes` are shares of a prompt's edges; `limit` prompts are taken from the start of the file."""

    model: str
    prompts: Path
    output: Path
    words: int = 40
    sizes: tuple[float, ...] = SIZES
    limit: int | None = None
    importance: str = "l1"
    ablation: str = "zero"
    format: str = "fp32"
    unigrams: Path | None = None
    skip_short: bool = False
    seed: int = 0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Row(_Strict):
    """One masked run. `size` is the trace's share of all edges that the control was made for; `edges` what it holds."""

    control: str
    size: float
    edges: int
    tv: float
    top1: bool
    nucleus: int


class Part(_Strict):
    """One finished prompt.

    Lists over sizes: attention [S][L][H], mlp [S][L] and residual [S][steps] count a trace's edges; macs are those of
    its edges alone and bytes those of the weights that they touch; cosine and distance [S][L] compare the stream after
    each layer with the full run's. `density` starts at the first size that can hold a path (2L edges, or L in parallel
    blocks).
    """

    schema_version: int = SCHEMA
    settings_hash: str
    index: int
    line: int
    text: str
    tokens: int
    edges: int
    residuals: int
    entropy: float
    density: float | None
    counts: list[int]
    attention: list[list[list[int]]]
    mlp: list[list[int]]
    residual: list[list[int]]
    macs: list[int]
    bytes: list[int]
    unigram: list[float | None]
    cosine: list[list[float]]
    distance: list[list[float]]
    rows: list[Row]
    seconds: dict[str, float]


class Shape(_Strict):
    """The model's sizes that traces depend on; `steps` is the length of a path in edges."""

    layers: int
    steps: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocabulary: int
    parameters_bytes: int


class Settings(_Strict):
    """What must not change between the runs that fill one folder."""

    model: str
    weight_hash: str
    words: int
    sizes: list[float]
    importance: str
    ablation: str
    format: str
    seed: int
    unigram_hash: str


class Manifest(_Strict):
    """What one folder holds."""

    schema_version: int = SCHEMA
    settings: Settings
    family: str
    revision: str
    shape: Shape
    prompts_file: str
    prompts: int
    created: str
    device: str
    torch: str
    transformers: str


@dataclass(frozen=True)
class Excerpt:
    """The first words of line `line` of the prompt file."""

    line: int
    text: str


@dataclass
class Texts:
    """A prompt file: the excerpts to analyze and every full text in it."""

    excerpts: list[Excerpt] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)


def read_texts(path: Path, words: int, skip_short: bool = False) -> Texts:
    """The prompts of a file: JSONL with `text` or `prompt`, else one text per line. Each is cut to its first `words`
    words, its own white space between them.

    Raises:
        BadAnalysis: for a file that cannot be read or is empty, a line that is not what it should be, or a text of
            fewer words, unless `skip_short` leaves those out.
    """
    if words < 1:
        raise BadOption(f"prompts need at least one word, got {words}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise BadAnalysis(f"cannot read prompts {path}: {error}") from error
    head = re.compile(rf"(?:\S+\s+){{{words - 1}}}\S+")
    texts = Texts()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = _read_record(path, number, line) if path.suffix == ".jsonl" else line
        texts.whole.append(text)
        found = head.match(text.lstrip())
        if found is not None:
            texts.excerpts.append(Excerpt(number, found.group()))
        elif not skip_short:
            raise BadAnalysis(
                f"{path}:{number}: {len(text.split())} words, but prompts of {words} were asked for; "
                f"ask for fewer (--words) or leave such lines out (--skip-short)"
            )
    if not texts.excerpts:
        raise BadAnalysis(f"{path} holds no prompt" + (f" of {words} words" if texts.whole else ""))
    return texts


def _read_record(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadAnalysis(f"{path}:{number}: not JSON: {error.msg}") from error
    text = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadAnalysis(f"{path}:{number}: needs an object with text or prompt, a string")
    return text


def check_options(options: Options) -> None:
    """Refuse what cannot be meant, before anything is loaded.

    Raises:
        BadOption: naming the setting.
    """
    if not options.sizes:
        raise BadOption("no sizes were given")
    for size in options.sizes:
        check_size(size)
    if list(options.sizes) != sorted(set(options.sizes)):
        raise BadOption("sizes must rise, each given once")
    check_choice("importance", options.importance, MEASURES)
    check_choice("ablation", options.ablation, ABLATIONS)
    check_choice("format", options.format, FORMATS)
    if options.limit is not None and options.limit < 1:
        raise BadOption(f"limit must be at least 1, got {options.limit}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among those known.

    Raises:
        BadOption: naming the setting and its values.
    """
    if value not in known:
        raise BadOption(f"unknown {name} {value!r}; choose one of {', '.join(known)}")


def check_size(size: float) -> None:
    """Refuse a size that is no share of a prompt's edges.

    Raises:
        BadOption: for a size outside (0, 1].
    """
    if not 0 < size <= 1:
        raise BadOption(f"size {size} is outside (0, 1]: a size is a share of a prompt's edges")


class Analyst:
    """One model and what it is analyzed with."""

    def __init__(self, options: Options) -> None:
        check_options(options)
        self.options = options
        texts = read_texts(options.prompts, options.words, options.skip_short)
        self.excerpts = texts.excerpts[: options.limit]
        self.checkpoint = open_checkpoint(options.model)
        self.tokens = [self.encode(excerpt) for excerpt in self.excerpts]
        self.state = PartialState()
        self.corpus = self._count_tokens(texts.whole)
        self.manifest = _describe(self.checkpoint, options, self.corpus, len(self.excerpts), self.state.device)
        self.settings_hash = hashlib.sha256(self.manifest.settings.model_dump_json().encode()).hexdigest()
        self.parts = options.output / PARTS
        self._prepare_folder()
        self.decoder = load_decoder(self.checkpoint, options.format, str(self.state.device))
        self.means = self._measure_means(texts.excerpts) if options.ablation == "mean" else None

    def _count_tokens(self, whole: Sequence[str]) -> Tensor:
        """int64 [vocabulary]: how often each token occurs in the corpus."""
        path = self.options.unigrams
        texts = whole if path is None else read_texts(path, 1).whole
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update(self.checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        found = torch.zeros(self.checkpoint.spec.vocabulary, dtype=torch.int64)
        found[list(counts)] = torch.tensor(list(counts.values()))
        return found

    def _prepare_folder(self) -> None:
        """Write the manifest of a new folder, or see that a folder already begun was begun with these settings."""
        there = self.options.output / MANIFEST
        if there.exists():
            _refuse_other_settings(there, read_manifest(self.options.output).settings, self.manifest.settings)
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            if self.state.is_main_process:
                write_beside(there, self.manifest.model_dump_json(indent=2))
        except OSError as error:
            raise BadAnalysis(f"cannot write to {self.options.output}: {error.strerror}") from error

    def _measure_means(self, excerpts: Sequence[Excerpt]) -> Means:
        return measure_means(self.decoder, (self.encode(excerpt) for excerpt in excerpts[:MEAN_PROMPTS]))

    def encode(self, excerpt: Excerpt) -> Tensor:
        """int64 [T].

        Raises:
            BadAnalysis: for a text longer than the model's context.
        """
        ids = self.checkpoint.tokenizer(excerpt.text, verbose=False)["input_ids"]
        if len(ids) > self.checkpoint.spec.context:
            raise BadAnalysis(
                f"{self.options.prompts}:{excerpt.line}: {len(ids)} tokens, the model's context is "
                f"{self.checkpoint.spec.context}"
            )
        return torch.tensor(ids, dtype=torch.int64)

    def finished(self) -> set[int]:
        """Numbers of the prompts that are through.

        Raises:
            BadAnalysis: for a part that is broken, or belongs to another text or analysis.
        """
        found = set()
        for index, excerpt in enumerate(self.excerpts):
            path = self.parts / f"{index:05}.json"
            if path.exists():
                part = read_part(path)
                if part.settings_hash != self.settings_hash:
                    raise BadAnalysis(
                        f"{path} is of an analysis with another model or settings; delete it and run again"
                    )
                if part.text != excerpt.text:
                    raise BadAnalysis(f"{path} belongs to another text; the prompt file changed: use another folder")
                found.add(index)
        return found

    def count_finished(self) -> int:
        """How many prompts are through by now, those of other processes too."""
        return sum((self.parts / f"{index:05}.json").exists() for index in range(len(self.excerpts)))

    def run(self) -> Iterator[int]:
        """Analyze what is not yet through, this process its share; gives each number when its part is on disk."""
        finished = self.finished()
        self.state.wait_for_everyone()  # else a fast process's new parts change what a slow one splits
        with self.state.split_between_processes([i for i in range(len(self.excerpts)) if i not in finished]) as mine:
            for index in mine:
                part, states = self.analyze(index)
                with file_beside(self.parts / f"{index:05}.safetensors") as beside:
                    save_file({"states": states}, beside)
                write_beside(self.parts / f"{index:05}.json", part.model_dump_json())
                yield index
        self.state.wait_for_everyone()

    def analyze(self, index: int) -> tuple[Part, Tensor]:
        """One prompt, and float32 [S + 1, hidden]: the last position's stream of each trace's run, last the full
        run's."""
        options, decoder, tokens = self.options, self.decoder, self.tokens[index]
        started = time.perf_counter()
        traces = Traces(weigh_edges(decoder, tokens, options.importance, options.seed + index))
        growth = draw_weights(decoder.spec, len(tokens), (1, options.seed, index))
        random = Traces(growth)
        counts = [traces.count_of(size) for size in options.sizes]
        made, grown = compose(traces, counts), compose(random, counts)
        traced = time.perf_counter()
        sets = Selections(traces, random, [Selection(control, count) for control in CONTROLS for count in counts])
        full, masked = run_masked(decoder, tokens, None), run_masked(decoder, tokens, sets, self.means)
        p, q = full.logits[0].softmax(-1), masked.logits.softmax(-1)
        held = sets.count({"trace": made, "random": grown})
        rows = _make_rows(options.sizes, held, p, q)
        states, reference = masked.states[: len(counts)], full.states
        costs = [_cost(decoder, made, i) for i in range(len(counts))]
        steps = len(traces.weights.steps)
        density = tv_density(options.sizes, [row.tv for row in rows[: len(counts)]], steps / traces.total)
        part = Part(
            settings_hash=self.settings_hash,
            index=index,
            line=self.excerpts[index].line,
            text=self.excerpts[index].text,
            tokens=len(tokens),
            edges=traces.total,
            residuals=made.residuals,
            entropy=float(entropy(p)),
            density=_known(density),
            counts=counts,
            attention=made.attention.tolist(),
            mlp=made.mlp.tolist(),
            residual=made.residual.tolist(),
            macs=[macs for macs, _ in costs],
            bytes=[size for _, size in costs],
            unigram=[_known(rho) for rho in unigram_correlation(q[: len(counts)], self.corpus)],
            cosine=_rounded(cosine(states, reference)),
            distance=_rounded(relative_distance(states, reference)),
            rows=rows,
            seconds={"trace": traced - started, "runs": time.perf_counter() - traced},
        )
        return part, torch.cat([states[:, -1], reference[:, -1]]).contiguous()


def _make_rows(sizes: Sequence[float], held: Sequence[int], p: Tensor, q: Tensor) -> list[Row]:
    """A row per distribution of q, the controls of `CONTROLS` in turn at all sizes, against the full model's p [V]."""
    tv, same = total_variation(q, p).tolist(), (q.argmax(-1) == p.argmax()).tolist()
    nuclei = [k for some in q.split(len(sizes)) for k in ordered_nucleus(p, some)]
    names = [(control, size) for control in CONTROLS for size in sizes]
    return [
        Row(control=control, size=size, edges=held[i], tv=tv[i], top1=same[i], nucleus=nuclei[i])
        for i, (control, size) in enumerate(names)
    ]


def _cost(decoder: Decoder, made: Composition, at: int) -> tuple[int, int]:
    """MACs of a trace's edges (scores and mixing for attention, the whole MLP at a position) and bytes of the weights
    that they touch (an MLP, or a head's share of its sublayer, counts once it has an edge)."""
    spec = decoder.spec
    neurons = sum(weight.shape[0] * weight.shape[1] for weight in _mlp_weights(decoder))
    macs = 2 * spec.head_dim * int(made.attention[at].sum()) + neurons * int(made.mlp[at].sum())
    size = 0.0
    for l, layer in enumerate(decoder.layers):
        if layer.attention is not None:
            size += layer.attention.bytes * float((made.attention[at, l] > 0).mean())
        if layer.mlp is not None and made.mlp[at, l]:
            size += layer.mlp.bytes
    return macs, round(size)


def _mlp_weights(decoder: Decoder) -> list[Any]:
    mlp = decoder.layers[0].mlp
    return [] if mlp is None else [value for value in vars(mlp).values() if hasattr(value, "dense")]


def _known(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(x, 6) for x in row] for row in values.tolist()]


def _describe(checkpoint: Checkpoint, options: Options, corpus: Tensor, prompts: int, device: torch.device) -> Manifest:
    spec = checkpoint.spec
    settings = Settings(
        model=options.model,
        weight_hash=checkpoint.weight_hash,
        words=options.words,
        sizes=list(options.sizes),
        importance=options.importance,
        ablation=options.ablation,
        format=options.format,
        seed=options.seed,
        unigram_hash=hashlib.sha256(corpus.numpy().tobytes()).hexdigest(),
    )
    shape = Shape(
        layers=spec.layers,
        steps=spec.steps,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        hidden=spec.hidden,
        mlp=spec.mlp,
        vocabulary=spec.vocabulary,
        parameters_bytes=sum(shard.stat().st_size for shard in checkpoint.shards),
    )
    return Manifest(
        settings=settings,
        family=spec.family,
        revision=checkpoint.revision,
        shape=shape,
        prompts_file=options.prompts.name,
        prompts=prompts,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        torch=version("torch"),
        transformers=version("transformers"),
    )


def _refuse_other_settings(path: Path, there: Settings, asked: Settings) -> None:
    for name, value in asked.model_dump().items():
        if (found := getattr(there, name)) != value:
            raise BadAnalysis(f"{path} was made with {name} {_short(found)}, not {_short(value)}; use another folder")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_part(path: Path) -> Part:
    """One finished prompt.

    Raises:
        BadAnalysis: for a broken file, which the message says to delete.
    """
    try:
        part = Part.model_validate_json(path.read_text(encoding="utf-8"))
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as states:
            rows = states.get_slice("states").get_shape()[0]
        if part.schema_version != SCHEMA or rows != len(part.counts) + 1:
            raise ValueError("it is of another version")
    except (OSError, ValueError, SafetensorError) as error:
        reason = "; ".join(_say(e) for e in error.errors()[:1]) if isinstance(error, ValidationError) else error
        raise BadAnalysis(
            f"{path} is broken ({reason}); delete it and run again: all other finished prompts are kept"
        ) from error
    return part


def _say(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def read_states(folder: Path, index: int) -> Tensor:
    """float32 [S + 1, hidden] of a finished prompt, as `Analyst.analyze` gives them."""
    with safe_open(folder / PARTS / f"{index:05}.safetensors", framework="pt") as states:
        found: Tensor = states.get_tensor("states")
    return found


def read_manifest(folder: Path) -> Manifest:
    """What a folder holds.

    Raises:
        BadAnalysis: where there is no manifest or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise BadAnalysis(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def read_parts(folder: Path) -> list[Part]:
    """All finished prompts of a folder, in order."""
    return [read_part(path) for path in sorted((folder / PARTS).glob("[0-9]*.json"))]


def write_rows(folder: Path, parts: Sequence[Part]) -> None:
    """`rows.jsonl`: every masked run with what is needed to read it alone."""
    model = read_manifest(folder).settings.model
    lines = []
    for part in parts:
        about = {"model": model, "prompt": part.index, "tokens": part.tokens, "all_edges": part.edges}
        about |= {"entropy": part.entropy, "density": part.density}
        costs = {count: (macs, size) for count, macs, size in zip(part.counts, part.macs, part.bytes, strict=True)}
        for i, row in enumerate(part.rows):
            record = about | row.model_dump()
            if row.control == "trace":
                record["macs"], record["bytes"] = costs[part.counts[i]]
            lines.append(json.dumps(record))
    write_beside(folder / ROWS, "\n".join(lines) + "\n")
