"""llama.cpp through llama-cpp-python: its C interface, greedy or sampled by its own sampler; prompt-lookup speculation
through the `Llama` class, which is where the package has it.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
from gguf import GGUFReader
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

FORMATS = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def bytes_per_step(path: str) -> int:
    """Of the weights read for one token: all but the embedding table, unless that is the head too."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    embedding = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - embedding


class Contestant:
    """One model in llama.cpp."""

    def quantise(self, source: str, output: str, format: str) -> dict[str, Any]:
        """Write `output` from the bf16 file, by llama.cpp's own quantiser with its defaults; format: q8_0, q4_0."""
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FORMATS[format], 2
        failed = llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama.cpp could not quantise {source}")
        return {}

    def load(self, path: str, threads: int, context: int, lookup: bool = False) -> dict[str, Any]:
        """lookup: speculate by prompt lookup."""
        self._lookup, self._bytes = lookup, bytes_per_step(path)
        if lookup:
            self._llama = llama_cpp.Llama(
                path,
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                draft_model=LlamaPromptLookupDecoding(num_pred_tokens=2),  # what its README advises without a GPU
                verbose=False,
            )
        else:
            llama_cpp.llama_backend_init()
            self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
            self._context = llama_cpp.llama_init_from_model(self._model, params)
        return {"bytes_per_step": self._bytes, "version": llama_cpp.__version__}

    def tokenize(self, text: str) -> dict[str, list[int]]:
        """The ids of a text, special tokens recognised."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        raw = text.encode()
        room = len(raw) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, room, True, True)
        return {"ids": list(ids[:count])}

    def generate(
        self, prompt: list[int], tokens: int, stop: list[int], temperature: float, seed: int
    ) -> tuple[list[int], list[float], float | None]:
        """Ids, the time at which each was there, and the bytes of weights read after the first."""
        run = self._generate_lookup if self._lookup else self._generate_plain
        ids, times = run(prompt, tokens, set(stop), temperature, seed)
        return ids, times, None if self._lookup else self._bytes * (len(ids) - 1)

    def _generate_plain(
        self, prompt: list[int], tokens: int, stop: set[int], temperature: float, seed: int
    ) -> tuple[list[int], list[float]]:
        context, sampler = self._context, _make_sampler(temperature, seed)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids: list[int] = []
        times: list[float] = []
        pending = prompt
        while len(ids) < tokens and not (ids and ids[-1] in stop):
            block = (llama_cpp.llama_token * len(pending))(*pending)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(block, len(pending))):
                raise RuntimeError("llama_decode failed")
            ids.append(llama_cpp.llama_sampler_sample(sampler, context, -1))
            times.append(time.perf_counter())
            pending = ids[-1:]
        llama_cpp.llama_sampler_free(sampler)
        return ids, times

    def _generate_lookup(
        self, prompt: list[int], tokens: int, stop: set[int], temperature: float, seed: int
    ) -> tuple[list[int], list[float]]:
        self._llama.reset()
        self._llama.set_seed(seed)
        ids: list[int] = []
        times: list[float] = []
        sampling = {"temp": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        for token in self._llama.generate(prompt, reset=True, **sampling):
            ids.append(token)
            times.append(time.perf_counter())
            if len(ids) == tokens or token in stop:
                break
        return ids, times


def _make_sampler(temperature: float, seed: int) -> Any:
    if temperature == 0:
        return llama_cpp.llama_sampler_init_greedy()
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain
