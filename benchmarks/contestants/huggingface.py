"""transformers: `generate`, plain or assisted by prompt lookup (an early exit needs a checkpoint trained for it, and no
smaller model of the same tokenizer exists for ours)."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer


class _Clock(BaseStreamer):
    """The time at which each generated token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times += [time.perf_counter()] * value.numel()
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Contestant:
    """One model in transformers, in bf16."""

    def load(self, path: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        model = self._model
        sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self._bytes = sum(sizes.values()) - (0 if tied else sizes[id(model.get_input_embeddings().weight)])
        return {"bytes_per_step": self._bytes, "version": transformers.__version__}

    def generate(
        self, prompt: list[int], tokens: int, stop: list[int], temperature: float, seed: int, lookup: bool = False
    ) -> tuple[list[int], list[float], float | None]:
        """Ids, the time at which each was there, and the bytes of weights read after the first. lookup: assisted by
        prompt lookup."""
        torch.manual_seed(seed)
        clock, ids = _Clock(), torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if lookup:
            options["prompt_lookup_num_tokens"] = 4
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
            streamer=clock,
            **options,
        )
        new = out[0, len(prompt) :].tolist()
        return new, clock.times, None if lookup else self._bytes * (len(new) - 1)
