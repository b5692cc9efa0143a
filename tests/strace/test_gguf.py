"""GGUF files: the weights as stored, q and k rows in llama.cpp's order, the tokenizer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from strace.checkpoint import SINGLE, open_checkpoint
from strace.cli import app
from strace.gguf import NotConvertible, convert, find_pre_tokenizer, pair_rows
from tests.tiny import END, EOS, save_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
THREE_DIGITS = WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, bf16 as such, and metadata by name."""
    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        data = torch.tensor(tensor.data)
        tensors[tensor.name] = data.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else data
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def rotate(x: torch.Tensor, position: int, pairs: bool) -> torch.Tensor:
    """x [heads, d] turned by angles that differ per dimension: neighbours with each other, or the halves."""
    heads, d = x.shape
    angle = position * torch.linspace(0.1, 2, d // 2)
    a, b = (x[:, 0::2], x[:, 1::2]) if pairs else (x[:, : d // 2], x[:, d // 2 :])
    turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.stack(turned, 2).reshape(heads, d) if pairs else torch.cat(turned, 1)


def test_paired_rows_score_as_halves_do() -> None:
    heads, d, hidden = 3, 8, 16
    q, k, x = torch.randn(heads * d, hidden), torch.randn(heads * d, hidden), torch.randn(hidden)
    plain = [rotate((w @ x).view(heads, d), place, pairs=False) for place, w in enumerate((q, k))]
    paired = [rotate((pair_rows(w, d) @ x).view(heads, d), place, pairs=True) for place, w in enumerate((q, k))]
    torch.testing.assert_close((paired[0] * paired[1]).sum(1), (plain[0] * plain[1]).sum(1))


@pytest.mark.parametrize(
    ("family", "architecture"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_weights_are_those_of_the_checkpoint(tmp_path: Path, family: str, architecture: str) -> None:
    overrides: dict[str, Any] = {"attention_bias": True} if family == "llama" else {}
    folder = save_tiny(tmp_path / "model", family, **{"sliding_window": None} | overrides)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / SINGLE).items()}
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    done = convert(str(folder), tmp_path / "model.gguf")
    tensors, fields = read(tmp_path / "model.gguf")
    assert done.architecture == fields["general.architecture"] == architecture
    assert done.tensors == len(tensors) == len(weights)
    assert fields[f"{architecture}.attention.head_count_kv"] == 2
    first = "model.layers.1.self_attn"
    for part in ("q", "k"):
        stored = weights[f"{first}.{part}_proj.weight"]
        expected = pair_rows(stored, 16) if architecture == "llama" else stored
        assert torch.equal(tensors[f"blk.1.attn_{part}.weight"], expected)
        if family in ("llama", "qwen2"):
            bias = weights[f"{first}.{part}_proj.bias"].float()
            expected = pair_rows(bias, 16) if architecture == "llama" else bias
            assert torch.equal(tensors[f"blk.1.attn_{part}.bias"], expected)
    assert torch.equal(tensors["blk.2.ffn_down.weight"], weights["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(tensors["output.weight"], weights["lm_head.weight"])
    assert tensors["output.weight"].dtype == torch.bfloat16
    assert tensors["output_norm.weight"].dtype == torch.float32
    assert torch.equal(tensors["output_norm.weight"], weights["model.norm.weight"].float())


def test_tied_head_is_left_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    convert(str(folder), tmp_path / "model.gguf")
    assert "output.weight" not in read(tmp_path / "model.gguf")[0]


def test_tokenizer_keeps_ids_kinds_and_template(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    convert(str(folder), tmp_path / "model.gguf")
    _, fields = read(tmp_path / "model.gguf")
    tokenizer = open_checkpoint(str(folder)).tokenizer
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:259] == tokenizer.convert_ids_to_tokens(list(range(259)))
    assert kinds[tokenizer.convert_tokens_to_ids(END)] == 3
    assert (kinds[5], kinds[299], len(tokens)) == (1, 5, 300)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids(EOS)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_embedded_model_merges(tmp_path: Path) -> None:
    done = convert("embedded", tmp_path / "model.gguf")
    _, fields = read(tmp_path / "model.gguf")
    backend = json.loads(open_checkpoint("embedded").tokenizer.backend_tokenizer.to_str())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges
    assert (done.pre_tokenizer, done.same_words) == ("qwen2", False), "it knows lower-case contractions only"


@pytest.mark.parametrize(
    ("name", "patterns"), [("gpt-2", [None]), ("smollm", [r"\p{N}", None]), ("llama-bpe", [THREE_DIGITS])]
)
def test_word_rules_are_told_apart(name: str, patterns: list[str | None]) -> None:
    backend = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated")
        if pattern
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        for pattern in patterns
    ]
    last = [] if steps[-1].__class__ is pre_tokenizers.ByteLevel else [pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, *last])
    assert find_pre_tokenizer(backend) == (name, True)


def test_rope_factors_stretch_the_frequencies(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", rope_parameters=LLAMA3)
    convert(str(folder), tmp_path / "model.gguf")
    factors = read(tmp_path / "model.gguf")[0]["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    frequencies = open_checkpoint(str(folder)).spec.inverse_frequencies[0].double()
    torch.testing.assert_close(plain / factors.double(), frequencies, rtol=1e-6, atol=0)
    assert factors[0] == 1 < factors[-1]


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("qwen2", {"rope_parameters": LLAMA3}, "llama3"),
        ("llama", {"rope_parameters": YARN}, "yarn"),
        ("mistral", {"sliding_window": 32}, "sliding windows"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_refuses_what_llama_cpp_would_run_otherwise(
    tmp_path: Path, family: str, overrides: dict[str, Any], said: str
) -> None:
    folder = save_tiny(tmp_path / "model", family, **overrides)
    with pytest.raises(NotConvertible, match=said):
        convert(str(folder), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something was left behind"


def test_refuses_tokenizers_that_are_not_byte_level(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(NotConvertible, match="byte-level BPE"):
        convert(str(folder), tmp_path / "model.gguf")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(writer: GGUFWriter) -> None:
        raise OSError("disk full")

    folder, output = save_tiny(tmp_path / "model"), tmp_path / "model.gguf"
    output.write_text("the one before")
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(str(folder), output)
    assert output.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_command(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    done = CliRunner().invoke(app, ["convert", str(folder), "-o", str(tmp_path / "model.gguf")])
    assert done.exit_code == 0, done.output
    assert "llama, 30 tensors" in done.output
    done = CliRunner().invoke(app, ["convert", str(folder), "-o", str(tmp_path / "no" / "model.gguf")])
    assert done.exit_code == 1
    assert "error:" in done.stderr
