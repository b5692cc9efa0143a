"""The native CPU runner: a whole pass over all layers is one call into strace/native/.

Its results do not depend, to the bit, on what shares a pass, on chunking or on the number of threads; so greedy and
seeded text of `exact` equals that of `full`.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from strace import native
from strace.decoder import MLP, Attention, Decoder, Layer, Norm
from strace.draft import Draft, DraftLimits, DraftPlan, GainRule, Held, Verdict
from strace.kv import Batch, KVCache
from strace.linear import DENSE, Codes, Linear
from strace.native import NativeError
from strace.runner import FULL
from strace.sampling import Sampler, SamplingParams

_CACHE_LINE = 64
_PIECE_ROWS = 512  # whole panels
_SLAB = 1 << 28  # bytes asked of the system at once; what is not written to takes no memory
_FORMAT_OF = {dtype: name for name, dtype in DENSE.items()}


class Weights:
    """Packed copies of matrices, each once however many graphs share it, and all else that C points to.

    A matrix is packed when it is described, so that of layers which are read from disk one at a time no more is held.
    The copies lie one after the other, as a step reads them, on large pages where the system has them.
    """

    def __init__(self, pool: Executor) -> None:
        self.bytes = 0
        self._library, self._pool = native.load(), pool
        self._slabs: list[mmap.mmap] = []
        self._free = range(0)  # addresses of the last slab
        self._packed: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # a dead one's place is another's soon
        self._ropes: MutableMapping[Tensor, list[native.Rope]] = WeakTensorKeyDictionary()
        self._kept: list[Tensor] = []

    def matrix(self, weight: Tensor | Codes, bias: Tensor | None = None) -> native.Matrix:
        """The matrix as C sees it, packed unless it was before."""
        tensor = weight.codes if isinstance(weight, Codes) else weight
        if tensor not in self._packed:
            self._packed[tensor] = self._pack(weight)
        return native.Matrix(*_describe(weight), self._packed[tensor], self.keep(bias, torch.float32))

    def _pack(self, weight: Tensor | Codes) -> int:
        size = self._library.st_packed_bytes(*_describe(weight))
        place = self._reserve(-(-size // _CACHE_LINE) * _CACHE_LINE)
        for _ in self._pool.map(lambda piece: _pack(*piece), _cut(weight, place)):
            pass
        return place

    def _reserve(self, size: int) -> int:
        """The address of so many bytes."""
        if size > len(self._free):
            slab = mmap.mmap(-1, max(size, _SLAB), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory: small pages
            if hasattr(mmap, "MADV_HUGEPAGE"):
                slab.madvise(mmap.MADV_HUGEPAGE)
            start = torch.frombuffer(slab, dtype=torch.uint8).data_ptr()
            self._slabs.append(slab)
            self._free = range(start, start + len(slab))
        place, self._free = self._free.start, self._free[size:]
        self.bytes += size
        return place

    def norm(self, norm: Norm | None) -> native.Norm:
        if norm is None:
            return native.Norm()
        weight, bias = self.keep(norm.weight, torch.float32), self.keep(norm.bias, torch.float32)
        return native.Norm(native.NORMS[norm.kind], len(norm.weight), weight, bias)

    def ropes(self, decoder: Decoder) -> list[native.Rope]:
        """The rope tables of a graph, those of a model and its subgraphs once."""
        assert decoder.ropes is not None
        first, *_ = decoder.ropes
        if first not in self._ropes:
            tables = zip(*decoder.ropes, strict=True)
            self._ropes[first] = [native.Rope(*(self.keep(t, torch.float32) for t in pair)) for pair in tables]
        return self._ropes[first]

    def keep(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """The address of a copy that lives as long as this does."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().to("cpu", dtype, copy=True).contiguous())
        return self._kept[-1].data_ptr()


def _describe(weight: Tensor | Codes) -> tuple[int, int, int]:
    """Format, rows, columns as the library wants them."""
    name = weight.format if isinstance(weight, Codes) else _FORMAT_OF[weight.dtype]
    rows, columns = (weight.codes if isinstance(weight, Codes) else weight).shape
    return native.FORMATS[name], rows, columns


def _cut(weight: Tensor | Codes, address: int) -> Iterator[tuple[Tensor | Codes, int]]:
    """Some rows of a matrix at a time, and where they are packed."""
    format, rows, columns = _describe(weight)
    for first in range(0, rows, _PIECE_ROWS):
        part = slice(first, first + _PIECE_ROWS)
        place = address + native.load().st_packed_bytes(format, first, columns)
        if isinstance(weight, Codes):
            yield replace(weight, codes=weight.codes[part], scales=weight.scales[part]), place
        else:
            yield weight[part], place


def _pack(weight: Tensor | Codes, address: int) -> None:
    library, described = native.load(), _describe(weight)
    if isinstance(weight, Codes):
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        native.check(library.st_pack_codes(*described, codes.data_ptr(), scales.data_ptr(), address))
    else:
        dense = weight.contiguous()
        native.check(library.st_pack_dense(*described, dense.data_ptr(), address))


def _attention(part: Attention | None, weights: Weights) -> native.Attention:
    if part is None:
        return native.Attention()
    kept = torch.arange(part.kv_heads) if part.kept is None else part.kept
    return native.Attention(
        norm=weights.norm(part.norm),
        post_norm=weights.norm(part.post_norm),
        q_norm=weights.norm(part.q_norm),
        k_norm=weights.norm(part.k_norm),
        qkv=weights.matrix(part.qkv.weight, part.qkv.bias),
        o=weights.matrix(part.o.weight, part.o.bias),
        present=1,
        heads=part.heads,
        kv_heads=part.kv_heads,
        kept=weights.keep(kept, torch.int32),
        window=part.window or 0,
        rope=part.rope,
    )


def _mlp(part: MLP | None, weights: Weights) -> native.MLP:
    if part is None:
        return native.MLP()
    return native.MLP(
        norm=weights.norm(part.norm),
        post_norm=weights.norm(part.post_norm),
        inner=weights.matrix(part.inner.weight, part.inner.bias),
        down=weights.matrix(part.down.weight, part.down.bias),
        present=1,
        gated=part.gated,
    )


def _describe_graph(decoder: Decoder, weights: Weights) -> tuple[native.GraphDescription, Decoder]:
    """A graph as C sees it, and its outline. Its layers are read once, one after the other."""
    spec = decoder.spec
    embed = weights.matrix(decoder.embed)
    layers, outlines = [], []
    for layer in decoder.layers:
        layers.append(native.Layer(_attention(layer.attention, weights), _mlp(layer.mlp, weights)))
        outlines.append(_outline_layer(layer))
    ropes = weights.ropes(decoder)
    outline = replace(decoder, embed=decoder.embed.to("meta"), layers=outlines, head=_outline(decoder.head))
    description = native.GraphDescription(
        layers=len(layers),
        hidden=spec.hidden,
        head_dim=spec.head_dim,
        rotary_dim=spec.rotary_dim,
        vocabulary=spec.vocabulary,
        context=spec.context,
        activation=native.ACTIVATIONS[spec.activation],
        parallel=spec.parallel,
        ropes=len(ropes),
        norm_eps=spec.norm_eps,
        embed_scale=spec.embed_scale,
        attention_scale=spec.attention_scale,
        attention_cap=spec.attention_cap,
        logit_cap=spec.logit_cap,
        layer=(native.Layer * len(layers))(*layers),
        rope=(native.Rope * len(ropes))(*ropes),
        embed=embed,
        position_embed=weights.keep(decoder.position_embed, torch.float32),
        final_norm=weights.norm(decoder.final_norm),
        head=weights.matrix(decoder.head.weight, decoder.head.bias),
        token_ids=weights.keep(decoder.token_ids, torch.int64),
        coverage=decoder.coverage,
    )
    return description, outline


_array = cache(operator.mul)
"""The type of an array, of an element's type and a length. ctypes itself forgets types, and takes long to make them."""


class _Tables:
    """The tables of a graph's last batch as C sees them: from pass to pass they are mostly the same."""

    def __init__(self, given: Tensor) -> None:
        self.given = given
        self._held = given.contiguous()
        self.sequences, self.stride = given.shape
        self.pointer = self._held.data_ptr()


class _Room:
    """Where a graph's drafts leave their distributions, float32 [sequences, most, vocabulary], in the same memory from
    draft to draft. What is seen of it is kept: making a view of a tensor takes longer than drawing a token."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._shape, self.pointer = (0, 0, 0), 0
        self._views: dict[tuple[int, int], Tensor] = {}

    def reshape(self, sequences: int, most: int, vocabulary: int) -> None:
        """Make room for the coming draft; what the last one left is lost."""
        if (shape := (sequences, most, vocabulary)) != self._shape:
            if (size := math.prod(shape)) > len(self._memory):
                self._memory = torch.empty(size)
            self._shape, self.pointer = shape, self._memory.data_ptr()
            self._views.clear()

    def see(self, sequence: int, drawn: int) -> Tensor:
        """The distributions of what was drawn for a sequence [drawn, vocabulary]."""
        if (sequence, drawn) not in self._views:
            whole = self._memory[: math.prod(self._shape)].view(self._shape)
            self._views[sequence, drawn] = whole[sequence, :drawn]
        return self._views[sequence, drawn]


def _allow(allowed: Callable[[Sequence[int]], np.ndarray]) -> Callable[..., int]:
    """What a sampler allows, as C asks for it."""

    def allow(drafts: Sequence[int], count: int, bits: int) -> int:
        row = allowed(drafts[:count])
        ctypes.memmove(bits, row.ctypes.data, row.nbytes)
        return 0

    return native.ALLOW(allow)


@lru_cache(maxsize=256)
def _describe_params(params: SamplingParams) -> tuple[native.Sampler, tuple[np.ndarray, np.ndarray]]:
    """What samplers of these parameters have in common, and what must live as long."""
    bias_ids = np.asarray([id for id, _ in params.logit_bias], dtype=np.int64)
    bias = np.asarray([bias for _, bias in params.logit_bias], dtype=np.float32)
    return native.Sampler(
        temperature=params.temperature,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        bias_ids=bias_ids.ctypes.data,
        bias=bias.ctypes.data,
        bias_count=len(bias),
    ), (bias_ids, bias)


class _Samplers:
    """How sequences are sampled as C sees it: described anew for others than the last time, the same only moved on."""

    def __init__(self) -> None:
        self._known: list[Sampler] = []
        self._described = (native.Sampler * 0)()
        self._places: list[native.Sampler] = []
        self._kept: list[Any] = []  # what must live as long as the description
        self._histories: list[np.ndarray] = []

    def describe(self, samplers: Iterable[Sampler]) -> ctypes.Array[native.Sampler]:
        """Good until the next call."""
        if (now := list(samplers)) != self._known:
            self._known, self._described = now, (native.Sampler * len(now))()
            self._places = list(self._described)
            self._kept = [_describe_sampler(*each) for each in zip(self._places, now, strict=True)]
        self._histories = []
        for place, sampler in zip(self._places, now, strict=True):
            place.position = sampler.position
            if sampler.history:
                self._histories.append(_add_history(place, sampler.history))
        return self._described


def _describe_sampler(place: native.Sampler, sampler: Sampler) -> list[Any]:
    """Describe what of a sampler stays; what must live as long."""
    common = _describe_params(sampler.params)
    ctypes.pointer(place)[0] = common[0]
    place.shared, place.key = sampler.noise.shared, sampler.noise.key
    prompt, barred = (np.asarray(ids, dtype=np.int64) for ids in (sampler.prompt, sampler.barred))
    place.prompt, place.prompt_count = prompt.ctypes.data, len(prompt)
    place.barred, place.barred_count, place.barred_until = barred.ctypes.data, len(barred), sampler.barred_until
    if sampler.allowed is not None:
        place.allow = _allow(sampler.allowed)
    return [common, prompt, barred, place.allow]


def _add_history(place: native.Sampler, history: Sequence[int]) -> np.ndarray:
    """Describe the tokens that a sampler counts; the array that holds them."""
    array = np.asarray(history, dtype=np.int64)
    place.history, place.history_count = array.ctypes.data, len(array)
    return array


def _describe_held(held: Sequence[Held]) -> tuple[ctypes.Array[native.Held], Any, Any]:
    """Drafts to judge as C sees them, what must live until the call is over, and where their divergences will be."""
    described = _array(native.Held, len(held))()
    tokens = [token for text in held for token in text.tokens]
    drafts, divergences = _array(ctypes.c_int64, len(tokens))(*tokens), _array(ctypes.c_float, len(tokens))()
    place, told = ctypes.addressof(drafts), ctypes.addressof(divergences)
    for entry, text in zip(described, held, strict=True):
        entry.row, entry.count, entry.drafts = text.row, len(text.tokens), place
        if text.q is not None:
            entry.q = text.q.data_ptr()
        if text.audited:
            entry.emitted, entry.audited, entry.divergences = text.emitted, text.audited, told
        place += ctypes.sizeof(ctypes.c_int64) * len(text.tokens)
        told += ctypes.sizeof(ctypes.c_float) * len(text.tokens)
    return described, drafts, divergences


def _describe_rule(rule: GainRule, drafts: int) -> native.Rule:
    """The rule as C sees it, of its tables what so many drafts in all can ask for."""
    shares, stops = len(rule.acceptance), len(rule.stop_ids)
    full, draft = (table[: rule.planned + drafts + 2] for table in (rule.full_seconds, rule.draft_seconds))
    return native.Rule(
        rule.always,
        rule.tokens_per_second,
        _array(ctypes.c_double, len(full))(*full),
        _array(ctypes.c_double, len(draft))(*draft),
        len(full),
        rule.planned,
        stops,
        shares - 1,
        _array(ctypes.c_double, shares)(*rule.acceptance),
        _array(ctypes.c_int64, stops)(*rule.stop_ids),
    )


def _most(limits: DraftLimits) -> int:
    """The most tokens that a draft within these limits has."""
    return min(limits.room, limits.held + (limits.emitted if limits.threshold <= 1 else 0))


def _outline(linear: Linear) -> Linear:
    """A matrix that has a shape, a format and a size, and takes no memory."""
    weight, bias = linear.weight, None if linear.bias is None else linear.bias.to("meta")
    if isinstance(weight, Codes):
        return Linear(replace(weight, codes=weight.codes.to("meta"), scales=weight.scales.to("meta")), bias)
    return Linear(weight.to("meta"), bias)


def _outline_layer(layer: Layer) -> Layer:
    a, m = layer.attention, layer.mlp
    attention = None if a is None else replace(a, qkv=_outline(a.qkv), o=_outline(a.o))
    return Layer(attention, None if m is None else replace(m, inner=_outline(m.inner), down=_outline(m.down)))


def _check_places(graphs: dict[str, Decoder], cache: KVCache) -> None:
    for name, decoder in graphs.items():
        places = {decoder.embed.device, *decoder.devices}
        if any(place.type != "cpu" for place in places):
            raise NativeError(f"the native runner runs on the CPU; graph {name!r} lies on {sorted(map(str, places))}")
    if any(tensor.device.type != "cpu" for tensor in chain(cache.keys, cache.values)):
        raise NativeError("the native runner runs on the CPU; the cache lies elsewhere")


class NativeRunner:
    """Runs graphs over one shared cache, all on the CPU; see `strace.runner.Runner`.

    The weights are packed into memory of its own, and `graphs` holds the decoders without theirs: once the caller drops
    the decoders it gave, no weight is held twice. Calls come from one thread at a time.

    Raises:
        NativeError: if the library is missing, a graph or the cache does not lie on the CPU, or a graph cannot be run.
    """

    name = "native"

    def __init__(self, graphs: dict[str, Decoder], cache: KVCache, threads: int | None = None) -> None:
        self._library = native.load()
        _check_places(graphs, cache)
        self.cache = cache
        self.isa = self._library.st_isa().decode()
        self.threads = threads or torch.get_num_threads()
        described = self._describe_cache()
        self._handle = self._library.st_create(described, self.threads)
        if not self._handle:
            raise NativeError(self._library.st_error().decode())
        self._destroy = weakref.finalize(self, self._library.st_destroy, self._handle)
        self._numbers: dict[str, int] = {}
        self.graphs: dict[str, Decoder] = {}
        known: dict[int, str] = {}  # a model in int4 drafts for itself
        with ThreadPoolExecutor(self.threads) as pool:
            self._weights = Weights(pool)
            for name, decoder in graphs.items():
                if (same := known.setdefault(id(decoder), name)) != name:
                    self._numbers[name], self.graphs[name] = self._numbers[same], self.graphs[same]
                    continue
                description, self.graphs[name] = _describe_graph(decoder, self._weights)
                self._numbers[name] = native.check(self._library.st_add_graph(self._handle, description))
        self._tables: dict[str, _Tables] = {}
        self._rooms = {name: _Room() for name in graphs}
        self._judging, self._drafting = _Samplers(), {name: _Samplers() for name in graphs}
        self._token_ids = {name: decoder.token_ids for name, decoder in graphs.items()}

    def _describe_cache(self) -> native.Cache:
        layers = [
            native.LayerCache(k.data_ptr(), v.data_ptr())
            for k, v in zip(self.cache.keys, self.cache.values, strict=True)
        ]
        first = self.cache.keys[0]
        blocks, kv_heads, _, head_dim = first.shape
        format = native.FORMATS[_FORMAT_OF[first.dtype]]
        return native.Cache(format, len(layers), blocks, kv_heads, head_dim, (native.LayerCache * len(layers))(*layers))

    @property
    def packed_bytes(self) -> int:
        """Memory of all matrices of all graphs."""
        return self._weights.bytes

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        outline, ids = self.graphs[graph], self._token_ids[graph]
        logits = torch.empty(len(rows), outline.head.shape[0])
        self._run(graph, batch, rows, logits.data_ptr(), None)
        if ids is None:
            return logits
        full = torch.full((len(rows), outline.spec.vocabulary), -torch.inf)
        full[:, ids] = logits
        return full

    def summarise(self, graph: str, batch: Batch, rows: list[int]) -> list[native.Summary]:
        """As `forward`, but of each row only what a greedy caller needs: the best id (the lowest of equals), its
        probability at temperature 1, the gap to the next best logit, and the entropy in nats."""
        summaries = (native.Summary * len(rows))()
        self._run(graph, batch, rows, None, ctypes.addressof(summaries))
        return list(summaries)

    def _run(self, graph: str, batch: Batch, rows: list[int], logits: int | None, summaries: int | None) -> None:
        described, number = self._describe_batch(graph, batch), self._numbers[graph]
        wanted = _array(ctypes.c_int32, len(rows))(*rows)
        native.check(self._library.st_forward(self._handle, number, described, wanted, len(rows), logits, summaries))

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        sequences, most = len(plan.limits), max(map(_most, plan.limits))
        room = self._rooms[graph]
        room.reshape(sequences, most, self.graphs[graph].spec.vocabulary)
        limits = (native.Limits(limit.held, limit.emitted, limit.room, limit.threshold) for limit in plan.limits)
        counts, tokens = _array(ctypes.c_int32, sequences)(), _array(ctypes.c_int64, sequences * most)()
        confidence = _array(ctypes.c_float, sequences * most)()
        native.check(
            self._library.st_draft(
                self._handle,
                self._numbers[graph],
                self._describe_batch(graph, batch),
                self._drafting[graph].describe(plan.samplers),
                _array(native.Limits, sequences)(*limits),
                _describe_rule(plan.rule, sequences * most),
                most,
                counts,
                tokens,
                confidence,
                room.pointer,
            )
        )
        drafts = []
        for s, (count, sampler) in enumerate(zip(counts[:], plan.samplers, strict=True)):
            drawn = slice(s * most, s * most + count)
            drafts.append(Draft(tokens[drawn], confidence[drawn], None if sampler.greedy else room.see(s, count)))
        return drafts

    def _describe_batch(self, graph: str, batch: Batch) -> native.Batch:
        """A batch as C sees it, good until the graph's next one."""
        tables = self._tables.get(graph)
        if tables is None or tables.given is not batch.tables:
            self._tables[graph] = tables = _Tables(batch.tables)
        numbers = _array(ctypes.c_int32, tables.sequences)
        return native.Batch(
            tables.sequences,
            tables.stride,
            _array(ctypes.c_int64, len(batch.tokens))(*batch.tokens),
            numbers(*batch.counts),
            numbers(*batch.starts),
            tables.pointer,
        )

    def process(self, logits: Tensor, drafts: Sequence[int], sampler: Sampler) -> Tensor:
        """`Sampler.process` in place, for tests."""
        described = _Samplers()
        rows, vocabulary = logits.shape
        between = np.asarray(drafts, dtype=np.int64)
        place, samplers = between.ctypes.data, described.describe([sampler])
        native.check(self._library.st_process(self._handle, logits.data_ptr(), rows, place, vocabulary, samplers))
        return logits

    def verify(self, logits: Tensor, held: Sequence[Held]) -> list[Verdict]:
        return self._judge(self._library.st_verify, (logits.data_ptr(), logits.shape[1]), held)

    def verify_pass(self, batch: Batch, rows: list[int], held: Sequence[Held]) -> list[Verdict]:
        wanted = _array(ctypes.c_int32, len(rows))(*rows)
        asked = self._numbers[FULL], self._describe_batch(FULL, batch), wanted, len(rows)
        return self._judge(self._library.st_verify_pass, asked, held)

    def _judge(self, call: Callable[..., int], asked: tuple[Any, ...], held: Sequence[Held]) -> list[Verdict]:
        """The verdicts of a call that takes, behind what is asked, the texts and places for what it finds."""
        described, _drafts, divergences = _describe_held(held)
        samplers = self._judging.describe(text.sampler for text in held)
        standing, tokens = _array(ctypes.c_int32, len(held))(), _array(ctypes.c_int64, len(held))()
        native.check(call(self._handle, *asked, len(held), described, samplers, standing, tokens))
        return _tell(held, standing[:], tokens[:], divergences)


def _tell(
    held: Sequence[Held], standing: Iterable[int], tokens: Iterable[int], divergences: Sequence[float]
) -> list[Verdict]:
    """The verdicts as the engine wants them."""
    first, verdicts = 0, []
    for text, n, token in zip(held, standing, tokens, strict=True):
        told = divergences[first : first + min(text.audited, n + 1)] if text.audited else []
        verdicts.append(Verdict([*text.tokens[:n], token], list(told)))
        first += len(text.tokens)
    return verdicts
