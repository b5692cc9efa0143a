"""OpenVINO: exported and compressed by optimum-intel, run as the compiled stateful model itself, without the Python of
`generate` around it, which is OpenVINO at its best.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino


class Contestant:
    """One model in OpenVINO."""

    def export(self, source: str, output: str, format: str) -> dict[str, Any]:
        """Write the folder `output`; format: bf16, int8, int4 (symmetric; groups of 128 where they divide, else 64)."""
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
        from transformers import AutoConfig

        compression: dict[str, Any] = {"load_in_8bit": False}
        if format != "bf16":
            bits = 8 if format == "int8" else 4
            size = 128 if AutoConfig.from_pretrained(source).hidden_size % 128 == 0 else 64
            group = {"group_size": size} if bits == 4 else {}
            compression = {"quantization_config": OVWeightQuantizationConfig(bits=bits, sym=True, **group)}
        model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, dtype="auto", **compression)
        model.save_pretrained(output)
        return {}

    def load(self, path: str, threads: int, kv_bf16: bool) -> dict[str, Any]:
        """kv_bf16: keep the cache in bf16, where OpenVINO's own choice is 8 bits."""
        core = openvino.Core()
        config = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if kv_bf16:
            config["KV_CACHE_PRECISION"] = "bf16"
        model = core.read_model(f"{path}/openvino_model.xml")
        self._bytes = bytes_per_step(model)
        self._request = core.compile_model(model, "CPU", config).create_infer_request()
        return {"bytes_per_step": self._bytes, "version": openvino.__version__}

    def generate(
        self, prompt: list[int], tokens: int, stop: list[int], temperature: float, seed: int
    ) -> tuple[list[int], list[float], float | None]:
        """Ids, the time at which each was there, and the bytes of weights read after the first."""
        random = np.random.default_rng(seed)
        self._request.reset_state()
        ids: list[int] = []
        times: list[float] = []
        pending, length = prompt, 0
        while len(ids) < tokens and not (ids and ids[-1] in stop):
            positions = np.arange(length, length + len(pending))[None]
            length += len(pending)
            self._request.infer(
                {
                    "input_ids": np.array([pending]),
                    "attention_mask": np.ones((1, length), np.int64),
                    "position_ids": positions,
                    "beam_idx": np.zeros(1, np.int32),
                }
            )
            row = self._request.get_tensor("logits").data[0, -1]
            ids.append(
                int(row.argmax() if temperature == 0 else (row / temperature + random.gumbel(size=len(row))).argmax())
            )
            times.append(time.perf_counter())
            pending = ids[-1:]
        return ids, times, self._bytes * (len(ids) - 1)


def bytes_per_step(model: openvino.Model) -> int:
    """Of the constants behind every matrix product's weights: what one token reads."""
    found: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            _add_constants(node.input_value(1).get_node(), found)
    return sum(found.values())


def _add_constants(node: Any, found: dict[str, int]) -> None:
    """Follow what unpacks a weight back to its codes, scales and zero points."""
    kind = node.get_type_name()
    if kind == "Constant":
        found[node.get_friendly_name()] = node.get_byte_size()
    elif kind in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        for value in node.input_values():
            _add_constants(value.get_node(), found)
