"""Random weights in the shapes of published models, as Hugging Face folders: what a step costs depends on nothing else.

They have the true vocabulary size; the tokenizer beside them is the embedded model's, so only token ids make sense as
prompts. A folder is written once, to ~/.cache/strace-llm/shapes.

Examples:
  python benchmarks/shapes.py
  python benchmarks/shapes.py SmolLM2-135M Llama-3.2-1B
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from strace.checkpoint import embedded_folder

CACHE = Path("~/.cache/strace-llm").expanduser()
SHAPES: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Llama-3.2-1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def write_shape(name: str, cache: Path = CACHE) -> Path:
    """The folder of a shape, written on the first call: bf16, weights of transformers' own initialisation, seed 0."""
    folder = cache / "shapes" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16).save_pretrained(part)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded_folder() / "model" / file, part)
        os.replace(part, folder)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(SHAPES)}")
    names = parser.parse_args().names or list(SHAPES)
    if unknown := set(names) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(unknown)}; choose from {', '.join(SHAPES)}")
    for name in names:
        print(write_shape(name))


if __name__ == "__main__":
    main()
