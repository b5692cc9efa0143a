"""What passes cost on this machine: timed as they alternate in serving, and kept on disk by all that they depend on.

The one source of c and v(n): tracing predicts speedups by it, the engine starts from it, `strace-llm measure` shows it.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from strace import native
from strace.decoder import Decoder, Layer
from strace.draft import TIMING, Held, plan_steps
from strace.files import cache_folder, write_beside
from strace.graphs import cpu_has_bf16
from strace.kv import BLOCK, Batch, KVCache
from strace.linear import Linear
from strace.runner import FULL, Runner

TYPICAL = 192  # tokens of context at which c and v(n) are quoted
CONTEXTS, SEQUENCES, LENGTHS = (64, 1024, 4096), (1, 4, 16), (1, 2, 4, 8, 16)
PROMPTS = (128, 512)  # tokens of the prompts whose prefill is timed
ROUNDS = 8
_MOST = 64  # tokens of one pass
STEPS = 6  # draft steps timed in one call: about as many as a served draft has, for they share what the call costs
_QUANTILE = 0.25  # other load on the machine only ever adds time
_SQUARE = 2048  # rows and columns of the product by which the matrix peak is found
SETTLE = "settle"  # beside the graphs: what the rows of a full pass make of its drafts


class Case(NamedTuple):
    """A full pass over `tokens` of each of `sequences` texts, after `context` tokens of each."""

    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass of `graph` over `tokens` of each of `sequences` texts, after `context` tokens of each; of
    `SETTLE`, of judging that pass's drafts at temperature 1, all of which stand."""

    graph: str
    sequences: int
    tokens: int
    context: int
    seconds: float


@dataclass(frozen=True)
class Graph:
    """What a graph reads for one token: the formats of its matrices, and all its bytes (KV not counted)."""

    formats: str
    bytes_per_step: int


@dataclass(frozen=True)
class Setting:
    """All that costs depend on: a table holds only where all of this is the same."""

    device: str
    processor: str
    threads: int
    runner: str
    isa: str
    versions: dict[str, str]
    weight_hash: str
    dtype: str
    graphs: dict[str, Graph]


@dataclass(frozen=True)
class Prefill:
    """The full model's pass over a prompt: seconds, and the multiplications of its products, attention's among them."""

    seconds: float
    macs: int


@dataclass(frozen=True)
class CostTable:
    """The costs measured in a setting. bandwidth: bytes/s at which this machine reads memory, the best of the rounds in
    which the costs were measured. prefill: by the tokens of the prompt. peak: multiplications/s of a large product, by
    `matrix_peak`."""

    setting: Setting
    date: str
    bandwidth: float
    costs: list[Cost]
    prefill: dict[int, Prefill]
    peak: float = 0.0


def draw_curve(costs: Iterable[Cost], graph: str, context: int = TYPICAL) -> dict[int, float]:
    """Seconds of one pass by tokens: of the full model, or of judging, over tokens of one text, of a draft over a token
    of each of so many texts. Linear between the contexts measured."""
    by_size: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for cost in costs:
        if cost.graph == graph and (graph not in (FULL, SETTLE) or cost.sequences == 1):
            by_size[cost.sequences * cost.tokens].append((cost.context, cost.seconds))
    seconds = {}
    for n, points in by_size.items():
        contexts, values = zip(*sorted(points), strict=True)
        seconds[n] = float(np.interp(context, contexts, values))
    return seconds


def draw_verifying(costs: Sequence[Cost], context: int = TYPICAL) -> dict[int, float]:
    """As `draw_curve` of the full model, each pass with the judging of its drafts, where that was timed."""
    settle = draw_curve(costs, SETTLE, context)
    return {n: seconds + settle.get(n, 0.0) for n, seconds in draw_curve(costs, FULL, context).items()}


def list_cases(
    limit: int,
    contexts: Iterable[int] = CONTEXTS,
    sequences: Iterable[int] = SEQUENCES,
    lengths: Sequence[int] = LENGTHS,
) -> list[Case]:
    """Every combination that is one pass; contexts are cut to what `limit` tokens of text leave room for."""
    fitting = sorted({min(context, limit - max(lengths) - STEPS) for context in contexts})
    return [Case(s, n, c) for c in fitting for s in sequences for n in lengths if s * n <= _MOST]


def measure_table(runner: Runner, setting: Setting, watch: Callable[[float], None] = lambda share: None) -> CostTable:
    """Measure all there is to say of `runner`, which has a draft and an empty cache. watch: hears the share done."""
    limit, meter = text_limit(runner), ReadMeter(setting.device)
    costs = measure_costs(runner, list_drafts(runner), list_cases(limit), watch=watch, meter=meter)
    prefill, peak = measure_prefill(runner, limit), matrix_peak(setting.device)
    return CostTable(setting, stamp(), meter.best, costs, prefill, peak)


def stamp() -> str:
    """Now, as a table is dated."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@torch.inference_mode()
def measure_costs(
    runner: Runner,
    drafts: Sequence[str],
    cases: Sequence[Case],
    rounds: int | None = None,
    budget: float = math.inf,
    watch: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
    meter: ReadMeter | None = None,
    quantile: float = _QUANTILE,
) -> list[Cost]:
    """Time `cases` in the alternation of serving: a few steps of one of the `drafts` (at least one), then one full
    pass, whose drafts are judged. A pass over one token of each text follows another such, as it does where nobody
    drafts.

    All cases and drafts take turns within a round, so that other load hits them alike, and lower quartiles over the
    rounds are taken, because it only ever adds time. Writes over the cache's first blocks: nothing may be stored there
    yet. rounds: default `ROUNDS`. budget: seconds after which no round is begun once there were two.
    meter: takes a sample in each round, so that bytes/s of passes and of memory are of the same minutes.
    quantile: of the times over the rounds.
    """
    _fill(runner.cache, count_blocks(cases))
    # Filled beforehand: torch shares out what is large, and its threads then spin for longer than a pass takes.
    q = torch.zeros(max(case.tokens for case in cases), runner.graphs[FULL].spec.vocabulary)
    samples: dict[tuple[str, Case], list[float]] = defaultdict(list)
    rounds, begun = rounds or ROUNDS, clock()
    for turn in range(rounds + 1):
        if turn > 2 and clock() - begun >= budget:
            break
        for number, case in enumerate(cases):
            for key, seconds in _time_cycles(runner, drafts, case, q, clock):
                if turn:  # the first round warms up
                    samples[key].append(seconds)
            watch((turn + (number + 1) / len(cases)) / (rounds + 1))
        if meter is not None:
            meter.sample()
    taken = {key: float(np.quantile(times, quantile, method="lower")) for key, times in samples.items()}
    return [Cost(graph, *case, seconds) for (graph, case), seconds in taken.items()]


def _time_cycles(
    runner: Runner, drafts: Sequence[str], case: Case, q: Tensor, clock: Callable[[], float]
) -> Iterator[tuple[tuple[str, Case], float]]:
    """Per draft: its steps, then the full pass and the verdicts on what it was over. q: see `_hold`."""
    step = Case(case.sequences, 1, case.context)
    block, first = _dummy(case, runner.cache.blocks), _dummy(step, runner.cache.blocks)
    rows, plan = list(range(len(block.tokens))), plan_steps(case.sequences, STEPS)
    held = _hold(case, q[: case.tokens - 1])
    for graph in drafts:
        begun = clock()
        runner.draft(graph, first, plan)
        yield (graph, step), (clock() - begun) / STEPS
        if case.tokens == 1:
            runner.forward(FULL, block, rows)
        begun = clock()
        logits = runner.forward(FULL, block, rows)
        read = clock()
        runner.verify(logits, held)
        yield (SETTLE, case), clock() - read
        yield (FULL, case), read - begun


def _hold(case: Case, q: Tensor) -> list[Held]:
    """Drafts of token 0 for all rows but each text's last one, drawn by q, zeros [tokens - 1, V], so that all stand."""
    return [Held(s * case.tokens, [0] * (case.tokens - 1), q, TIMING) for s in range(case.sequences)]


@torch.inference_mode()
def measure_prefill(runner: Runner, limit: int) -> dict[int, Prefill]:
    """The full model's pass over a prompt, by its tokens: the best of a few."""
    found = {}
    for tokens in sorted({min(tokens, limit) for tokens in PROMPTS}):
        times = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            runner.forward(FULL, _dummy(Case(1, tokens, 0), runner.cache.blocks), [tokens - 1])
            times.append(time.perf_counter() - begun)
        found[tokens] = Prefill(min(times), count_macs(runner.graphs[FULL], tokens))
    return found


def count_macs(full: Decoder, tokens: int) -> int:
    """Multiplications of the products of a pass over a whole prompt, of which only the last row's logits are wanted;
    sliding windows and norms are left out."""
    linears = [linear for layer in full.layers for linear in list_linears(layer)]
    heads = sum(layer.attention.heads for layer in full.layers if layer.attention is not None)
    attention = heads * full.spec.head_dim * tokens * (tokens + 1)  # two products over half of a square
    rows, columns = full.head.shape
    return tokens * sum(n * k for n, k in (linear.shape for linear in linears)) + attention + rows * columns


def matrix_peak(device: torch.device | str = "cpu", rounds: int = 12) -> float:
    """Multiplications/s of one large product by torch, whose library is the processor's maker's: the best of a few. In
    bf16, but for CPUs that do not multiply in it, where torch takes minutes: there in fp32."""
    emulated = torch.device(device).type == "cpu" and not cpu_has_bf16()
    square = torch.ones(_SQUARE, _SQUARE, dtype=torch.float32 if emulated else torch.bfloat16, device=device)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        (square @ square)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begun)
    return float(_SQUARE**3 / min(times))


def list_drafts(runner: Runner) -> list[str]:
    """The runner's graphs that draft."""
    return [graph for graph in runner.graphs if graph != FULL]


def text_limit(runner: Runner) -> int:
    """Tokens of the longest text that the model takes and the cache holds."""
    return min(runner.graphs[FULL].spec.context, runner.cache.blocks * BLOCK)


def count_blocks(cases: Iterable[Case]) -> int:
    """Blocks of a cache in which every text of every case has its own."""
    return max(case.sequences * _width(case) for case in cases)


def _width(case: Case) -> int:
    return -(-(case.context + case.tokens + STEPS) // BLOCK)


def _dummy(case: Case, blocks: int) -> Batch:
    """Texts of token 0. They share blocks where the cache is too small for all, for only the time counts."""
    texts = case.sequences
    tables = (torch.arange(texts * _width(case)) % blocks).view(texts, -1)
    return Batch([0] * (texts * case.tokens), [case.tokens] * texts, [case.context] * texts, tables)


def _fill(cache: KVCache, blocks: int) -> None:
    """Write to the first blocks: memory that never was written is one page of zeros, held by the processor's own
    cache."""
    for entries in (*cache.keys, *cache.values):
        entries[:blocks].fill_(0.5)


class ReadMeter:
    """How fast all threads read memory that no cache holds: the most that a pass can read at."""

    def __init__(self, device: torch.device | str = "cpu", megabytes: int = 1024) -> None:
        self._device = torch.device(device)
        size = megabytes << 20
        if self._device.type == "cpu":
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # as the weights lie
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._block = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
        else:
            self._block = torch.ones(size // 4, device=self._device)
        self.samples: list[float] = []

    def sample(self) -> float:
        """bytes/s of reading all of it once, now."""
        rate = self._read_natively() or self._read_by_torch()
        self.samples.append(rate)
        return rate

    @property
    def best(self) -> float:
        """bytes/s: the best so far, for other load on the machine only ever slows."""
        return max(self.samples)

    def _read_natively(self) -> float | None:
        """By the native library; torch's sum is bound by more than memory on some CPUs."""
        if self._device.type != "cpu":
            return None
        try:
            library = native.load()
        except native.NativeError:
            return None
        return native.check(
            library.st_read_bandwidth(torch.get_num_threads(), self._block.data_ptr(), self._block.nbytes)
        )

    def _read_by_torch(self) -> float:
        started = time.perf_counter()
        self._block.sum().item()  # waits for the device
        return self._block.nbytes / (time.perf_counter() - started)


def read_bandwidth(device: torch.device | str = "cpu", megabytes: int = 1024, rounds: int = 8) -> float:
    """bytes/s at which all threads read memory that no cache holds: the best of a few times."""
    meter = ReadMeter(device, megabytes)
    meter.sample()
    for _ in range(rounds):
        meter.sample()
    return meter.best


def describe_setting(runner: Runner, weight_hash: str) -> Setting:
    """What the costs of a runner's passes depend on."""
    full = runner.graphs[FULL]
    device = runner.cache.keys[0].device
    versions = {name: version(name) for name in ("strace-llm", "torch")}
    if runner.name == "native":
        versions["kernels"] = native.name_build(native.find_library())
    return Setting(
        device=str(device),
        processor=name_processor(device),
        threads=torch.get_num_threads(),
        runner=runner.name,
        isa=runner.isa,
        versions=versions,
        weight_hash=weight_hash,
        dtype=str(full.dtype).removeprefix("torch."),
        graphs={name: _describe_graph(graph) for name, graph in runner.graphs.items()},
    )


def _describe_graph(graph: Decoder) -> Graph:
    linears = [linear for layer in graph.layers for linear in list_linears(layer)]
    formats = sorted({linear.format for linear in (*linears, graph.head)})
    return Graph(" ".join(formats), graph.bytes_per_step)


def list_linears(layer: Layer) -> list[Linear]:
    """A layer's matrices."""
    parts = [part for part in (layer.attention, layer.mlp) if part is not None]
    return [linear for part in parts for linear in vars(part).values() if isinstance(linear, Linear)]


def name_processor(device: torch.device | str = "cpu") -> str:
    """The name of the GPU, or of the CPU where the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


_file = TypeAdapter(CostTable)


def _place(setting: Setting) -> Path:
    name = hashlib.sha256(TypeAdapter(Setting).dump_json(setting)).hexdigest()[:16]
    return cache_folder() / "costs" / f"{name}.json"


def dump_table(table: CostTable) -> str:
    """The table as one line of JSON."""
    return _file.dump_json(table).decode()


def save_table(table: CostTable) -> Path:
    """Keep a table for `load_table`; the file it is in."""
    path = _place(table.setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, dump_table(table) + "\n")
    return path


def read_table(path: Path) -> CostTable:
    """A table in a file, as `strace-llm measure --json` prints it, on any machine.

    Raises:
        ValueError: it cannot be read, or is no such table.
    """
    try:
        return _file.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not what `strace-llm measure --json` prints"
        raise ValueError(f"cannot read the costs {path}: {reason}") from error


def load_table(setting: Setting) -> CostTable | None:
    """The table kept for a setting; None where there is none, or none that can be read."""
    path = _place(setting)
    if not path.exists():
        return None
    try:
        table = _file.validate_json(path.read_bytes())
    except ValidationError:
        return None
    return table if asdict(table.setting) == asdict(setting) else None
