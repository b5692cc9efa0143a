"""Ours: whatever `build_engine` serves, driven by `server.bench`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from server.bench import Bench
from server.engine.build import Placement
from server.engine.request import Mode
from strace.checkpoint import open_checkpoint
from strace.costs import Case
from strace.kv import BLOCK, block_bytes
from strace.runner import FULL
from strace.sampling import SamplingParams

CONTEXT = 4160  # tokens: the longest context timed, and a block after it
_ROOM = 16  # tokens after the context: the longest pass timed and a few draft steps


class Contestant:
    """One model in our engine, with its subgraphs, or with the whole model in int4 as the only draft."""

    def load(self, model: str, threads: int, dtype: str) -> dict[str, Any]:
        """dtype: of the full model, bf16 or int4."""
        torch.set_num_threads(threads)
        spec = open_checkpoint(model).spec
        context = min(CONTEXT, spec.context)
        memory = CONTEXT // BLOCK * block_bytes(spec, torch.bfloat16)
        self._bench = Bench(model, placement=Placement(dtype=dtype, context=context, kv_memory=memory))
        runner = self._bench.engine.runner
        return {
            "bytes_per_step": runner.graphs[FULL].bytes_per_step,
            "version": f"{version('strace-llm')} ({runner.name} {runner.isa})",
        }

    def generate(
        self,
        prompt: list[int],
        tokens: int,
        stop: list[int],
        temperature: float,
        seed: int,
        mode: str,
        class_name: str | None = None,
    ) -> tuple[list[int], list[float], float]:
        """Ids, the time at which each was there, and the bytes of weights read after the first. stop, seed: the
        engine's own; the classes `class_name` may name are those of its subgraphs."""
        known = class_name if class_name in self._bench.engine.classes else None
        text = self._bench.generate(prompt, tokens, Mode(mode), SamplingParams(temperature), known)
        return text.ids, text.times, self._bench.bytes_read(text)

    def time_passes(self, cases: list[list[int]], rounds: int) -> dict[str, Any]:
        """Seconds of full passes, and of draft steps in int4. cases: (sequences, tokens of each, context, which is cut
        to what the model's own leaves room for)."""
        room = self._bench.engine.limits.context - _ROOM
        fitting = {Case(sequences, tokens, min(context, room)) for sequences, tokens, context in cases}
        return {"passes": self._bench.time_passes(sorted(fitting), rounds)}
