"""The Runner contract and its torch implementation: full-model or subgraph passes over a ragged batch.

Everything the engine does to a model goes through a runner. The full model is the graph named `full`; a subgraph is
named by its class. Sampling belongs to the runner: draft and full model must shape and draw with the same arithmetic,
and a native runner does it where the logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from strace.decoder import Decoder
from strace.draft import Draft, Drafting, DraftPlan, Held, Verdict
from strace.kv import Batch, KVCache, PagedAttend
from strace.sampling import audit, verify

FULL = "full"


class Runner(Protocol):
    """Runs graphs over one shared KV cache. name, isa: which runner, and the instruction set of its kernels."""

    name: str
    isa: str
    graphs: dict[str, Decoder]
    cache: KVCache

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        """float32 logits [len(rows), vocabulary] at the positions `rows` of the concatenated tokens.

        Ids outside a subgraph's short head get -inf.
        """

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        """Run the subgraph over the batch's pending tokens, then token by token while the plan has any sequence go on.

        A draft's q is overwritten by the graph's next draft.
        """

    def verify(self, logits: Tensor, held: Sequence[Held]) -> list[Verdict]:
        """Per text `strace.sampling.verify` and `audit`, from the full model's logits, float32 [R, V], which may be
        overwritten."""

    def verify_pass(self, batch: Batch, rows: list[int], held: Sequence[Held]) -> list[Verdict]:
        """`verify` of the full model's rows at the positions `rows`, where nobody else asks for them."""
        return self.verify(self.forward(FULL, batch, rows), held)


class TorchRunner(Runner):
    """The portable reference, in eager torch."""

    name = "torch"

    def __init__(self, graphs: dict[str, Decoder], cache: KVCache) -> None:
        self.graphs = graphs
        self.cache = cache
        self.isa = torch.backends.cpu.get_cpu_capability()

    @torch.inference_mode()
    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        decoder, logits = self.graphs[graph], self._run(graph, batch, rows).cpu()
        if decoder.token_ids is None:
            return logits
        full = torch.full((len(rows), decoder.spec.vocabulary), -torch.inf)
        full[:, decoder.token_ids] = logits
        return full

    def _run(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        """Logits [len(rows), head rows] on the head's device."""
        decoder, positions = self.graphs[graph], batch.positions
        device = decoder.embed.device
        attend = PagedAttend(self.cache, batch, positions)
        streams = decoder.streams(torch.tensor(batch.tokens, device=device), positions.to(device), attend)
        return decoder.logits(streams[torch.tensor(rows, dtype=torch.int64, device=streams.device)])

    @torch.inference_mode()
    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        coverage = self.graphs[graph].coverage
        drafting = [Drafting(*each, plan.rule) for each in zip(plan.samplers, plan.limits, strict=True)]
        alive = list(range(len(drafting)))
        ends = [s + n for s, n in zip(batch.starts, batch.counts, strict=True)]
        rows = [sum(batch.counts[: i + 1]) - 1 for i in alive]
        step, drawn = batch, 0
        while alive:
            logits = self.forward(graph, step, rows)
            drawn += sum([drafting[i].draw(row, coverage) for i, row in zip(alive, logits, strict=True)])
            alive = [i for i in alive if drafting[i].goes_on(len(alive), drawn)]
            starts = [ends[i] + len(drafting[i].tokens) - 1 for i in alive]
            tokens = [drafting[i].tokens[-1] for i in alive]
            step, rows = Batch(tokens, [1] * len(alive), starts, batch.tables[alive]), list(range(len(alive)))
        return [each.draft for each in drafting]

    @torch.inference_mode()
    def verify(self, logits: Tensor, held: Sequence[Held]) -> list[Verdict]:
        return [_settle(logits[text.row : text.row + len(text.tokens) + 1], text) for text in held]


def _settle(logits: Tensor, held: Held) -> Verdict:
    """One text's drafts, by its own rows."""
    p, noise, position = held.sampler.process(logits, held.tokens), held.sampler.noise, held.sampler.position
    tokens = verify(p, held.q, held.tokens, noise, position, held.emitted)
    return Verdict(tokens, audit(p, held.q, held.tokens[: min(held.audited, len(tokens))], noise, position))
