"""Reading checkpoints: what is found, where it is placed, and a clear error for each thing that can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from strace.checkpoint import (
    INDEX,
    SINGLE,
    BadCheckpoint,
    load_decoder,
    open_checkpoint,
    place_layers,
)
from strace.decoder import Decoder
from strace.families import UnsupportedModel
from strace.kv import Batch
from strace.runner import FULL
from tests.tiny import CHAT_TEMPLATE, END, EOS, KINDS, make_runner, make_tiny, make_tokenizer, random_tokens, save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def logits(decoder: Decoder) -> torch.Tensor:
    runner = make_runner({FULL: decoder})
    return runner.forward(FULL, Batch(random_tokens(20).tolist(), [20], [0], torch.tensor([[3]])), list(range(20)))


def load(folder: Path) -> Decoder:
    return load_decoder(open_checkpoint(str(folder)), "fp32")


def shard(folder: Path, **overrides: Any) -> Path:
    make_tiny(**overrides).save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_sharded_checkpoint_equals_a_single_one(folder: Path, tmp_path: Path) -> None:
    assert torch.equal(logits(load(shard(tmp_path / "shards"))), logits(load(folder)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = shard(tmp_path / "shards")
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(BadCheckpoint, match=missing.name):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', "{"])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = shard(tmp_path / "shards")
    (folder / INDEX).write_text(content)
    with pytest.raises(BadCheckpoint, match=r"weight_map|Expecting"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("place", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "models/of/mine"])
def test_a_missing_folder_is_named(place: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"{place}.*no such folder"):
        open_checkpoint(place)


@pytest.mark.parametrize("name", ["someone/some-model", "some-model", "not a name?", ""])
def test_a_hub_name_that_cannot_be_reached_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(name)
    assert f"cannot read model {name!r}: " in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(BadCheckpoint, match=r"no model\.safetensors"):
        open_checkpoint(str(folder))


def test_pickled_weights_are_refused_with_the_reason(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"\.bin files can run code"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match=str(path)):
        load(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_named(folder: Path, name: str) -> None:
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(BadCheckpoint, match=f"lacks the weight {name}"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.self_attn.k_norm.weight",
        "model.norm.weight",
    ],
)
def test_a_weight_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3", attention_bias=True)
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(BadCheckpoint, match=rf"{name} is \[.*\], its config asks for \["):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"model_type": "wonder"}, UnsupportedModel, "wonder.*LlamaForCausalLM"),
        ({"architectures": ["WonderForCausalLM"]}, UnsupportedModel, "WonderForCausalLM.*LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, UnsupportedModel, "pre-quantised"),
        ({"hidden_size": "wide"}, BadCheckpoint, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(folder: Path, changes: Any, error: type[Exception], named: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(error, match=named):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_no_json_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{broken")
    with pytest.raises(BadCheckpoint, match=f"cannot read model '{folder}'"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_missing_tokenizer_is_refused(folder: Path, content: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BadCheckpoint, match="its tokenizer cannot be read"):
        open_checkpoint(str(folder))


def test_stop_ids_come_from_all_who_name_one(folder: Path) -> None:
    assert open_checkpoint(str(folder)).stop_ids == {257}
    edit_json(folder / "config.json", eos_token_id=[257, 11])
    assert open_checkpoint(str(folder)).stop_ids == {257, 11}
    edit_json(folder / "generation_config.json", eos_token_id=[258, 12])
    assert open_checkpoint(str(folder)).stop_ids == {257, 258, 11, 12}
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(str(folder)).stop_ids == {257, 11}


def test_tokenizer_and_chat_template_are_read(folder: Path) -> None:
    tokenizer = open_checkpoint(str(folder)).tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer.encode("Grüße 字")) == "Grüße 字"
    assert tokenizer.convert_tokens_to_ids([EOS, END]) == [257, 258]
    make_tokenizer(chat_template=None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert open_checkpoint(str(folder)).tokenizer.chat_template is None


def test_hashes_name_the_content(folder: Path, tmp_path: Path) -> None:
    one, same = open_checkpoint(str(folder)), open_checkpoint(str(save_tiny(tmp_path / "same")))
    other = open_checkpoint(str(save_tiny(tmp_path / "other", seed=1)))
    assert one.weight_hash == same.weight_hash != other.weight_hash
    assert one.tokenizer_hash == other.tokenizer_hash
    assert one.revision == "local"


@pytest.mark.parametrize("tied", [False, True])
def test_a_stored_head_wins_as_in_transformers(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    other = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": other}))
    wanted = AutoModelForCausalLM.from_pretrained(folder)(random_tokens(20)[None]).logits[0]
    assert (logits(load(folder)) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_checkpoint_saved_without_its_head_lacks_the_outer_name(tmp_path: Path, family: str) -> None:
    """As GPT-2's on the hub: `h.0.attn.c_attn.weight`, and buffers of old versions beside it."""
    folder = save_tiny(tmp_path / "model", family, tie_word_embeddings=True)
    wanted = logits(load(folder))
    weights = {name.partition(".")[2]: tensor for name, tensor in load_file(folder / SINGLE).items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(load(folder)), wanted)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "[64, 192]"),
        ("gpt2", "transformer.wpe.weight", "[256, 64]"),
        ("gpt_neox", "gpt_neox.layers.2.attention.query_key_value.bias", "[192]"),
        ("gpt_neox", "gpt_neox.layers.2.post_attention_layernorm.bias", "[64]"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "[128, 64]"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "[192, 64]"),
        ("olmo2", "model.layers.0.self_attn.k_norm.weight", "[32]"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "[64]"),
    ],
)
def test_a_weight_of_another_shape_is_named_as_stored(tmp_path: Path, family: str, name: str, shape: str) -> None:
    folder = save_tiny(tmp_path / "model", family)
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(BadCheckpoint, match=rf"{re.escape(name)} is \[.*\], its config asks for {re.escape(shape)}"):
        load(folder)


def test_fewer_positions_may_be_served_than_were_learned(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    short = load_decoder(open_checkpoint(str(folder), context=40), "fp32")
    assert short.position_embed is not None
    assert short.position_embed.shape == (40, 64)
    assert torch.equal(logits(short), logits(load(folder)))


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_the_embedding_is_scaled_as_the_dtype_has_it(tmp_path: Path, format: str) -> None:
    folder = save_tiny(tmp_path / "model", "gemma2", hidden_size=68)
    exact = 68**0.5
    scale = load_decoder(open_checkpoint(str(folder)), format).spec.embed_scale
    assert abs(scale - exact) < 1e-6 if format == "fp32" else scale == 8.25


def test_an_unknown_format_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'int3'.*int4"):
        load_decoder(open_checkpoint(str(folder)), "int3")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_placement_fills_devices_in_order(
    tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is accelerate's; its check that the GPUs it is told of exist is all that is left out here."""
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "model", family, tie_word_embeddings=tied)))
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda memory: memory)
    memory: dict[int | str, int | str] = {0: 200_000, 1: 100_000, "cpu": 10**9}
    *layers, head = place_layers(checkpoint, torch.bfloat16, memory)
    order = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    numbers = [order.index(device) for device in layers]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 1
    # A tied head is the embedding, so it lies with it; one of its own comes after the last layer.
    assert order.index(head) == 0 if tied else order.index(head) >= numbers[-1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_fits_nowhere_is_refused_by_name(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    memory: dict[int | str, int | str] = {"cpu": "100KB"}
    with pytest.raises(BadCheckpoint, match=rf"{folder}.*does not fit .*100KB"):
        load_decoder(open_checkpoint(str(folder)), device="auto", max_memory=memory)
    assert memory == {"cpu": "100KB"}


def test_automatic_placement_on_one_device_is_no_placement(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    decoder = load_decoder(checkpoint, "fp32", device="auto", max_memory={"cpu": "1GB"})
    assert decoder.devices == []
    assert torch.equal(logits(decoder), logits(load(folder)))
