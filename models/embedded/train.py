"""Train the embedded model: an ordinary Llama, next-token loss, Muon for the matrices and AdamW for the rest.

Writes under OUTPUT: `checkpoint/` (resumable, replaced every ten minutes), `log.jsonl` (tokens, mean loss) and,
when the tokens are spent, `model/`: a plain Hugging Face folder in bf16.

The learning rate is constant after a warm-up and falls linearly to zero over the last share of the tokens
(warmup-stable-decay), so a run may be stopped and resumed with fewer or more tokens than first planned.

Examples:
  python models/embedded/train.py ../shared/corpus -o build/embedded
  python models/embedded/train.py ../shared/corpus -o build/embedded --tokens 60e6   # resumes, goes on to there
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import TokenStream, tokenise
from tokenizer import train_tokenizer

BATCH_TOKENS = 5_120
SHORT, LONG = 512, 1024  # tokens a row before and while the learning rate falls: attention is a third of the time
MUON_RATE, ADAM_RATE = 0.01, 0.003
WARMUP_STEPS = 60
CHECKPOINT_SECONDS = 600
LOG_STEPS = 20


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """12 layers, 4 query heads on 2 key/value heads, tied embeddings: 11.5 million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LONG,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon orthogonalises the update of every matrix inside a layer; embeddings and norms stay with AdamW."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, steps: int, decay: float) -> float:
    """The learning rate as a share of its peak at `step` of `steps`."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (steps - step) / (decay * steps)))


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`, gradients included, a chunk of rows at a time.

    The float32 logits of a whole batch would be 170 MB, written and read five times; a chunk stays in the cache.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        low = weight.to(torch.bfloat16)
        loss, d_weight, d_hidden = 0.0, torch.zeros_like(weight), torch.empty_like(hidden)
        for start in range(0, len(hidden), HeadLoss.CHUNK):
            rows = slice(start, start + HeadLoss.CHUNK)
            log_p = (hidden[rows] @ low.T).float().log_softmax(-1)
            picked = targets[rows, None]
            loss -= log_p.gather(1, picked).sum().item()
            p = log_p.exp_()
            p.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=p.dtype))
            gradient = p.to(torch.bfloat16)
            torch.mm(gradient, low, out=d_hidden[rows])
            d_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(d_hidden / len(hidden), d_weight / len(hidden))
        return hidden.new_tensor(loss / len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * upstream[0], d_weight * upstream[0], None


def final_states(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """bf16 [rows * length, hidden]: the normalised stream that the head reads."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return states.flatten(0, 1).to(torch.bfloat16)


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by `parameter.key`: safetensors holds no nesting, and pickle is not used here."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(v).contiguous() for i, s in state.items() for key, v in s.items()}


def restore_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """The inverse of `flatten_state`, into an optimizer of the same parameters."""
    whole = optimizer.state_dict()
    for name, tensor in flat.items():
        index, key = name.split(".")
        whole["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(whole)


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write beside, then rename: a stop half way leaves the previous checkpoint."""
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, fresh / "model.safetensors")
    for number, optimizer in enumerate(optimizers):
        save_file(flatten_state(optimizer), fresh / f"optimizer{number}.safetensors")
    (fresh / "progress.json").write_text(json.dumps({"tokens": step * BATCH_TOKENS}))
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore everything and return the step to go on from; 0 where there is no checkpoint."""
    if not folder.exists():
        return 0
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    for number, optimizer in enumerate(optimizers):
        restore_state(optimizer, load_file(folder / f"optimizer{number}.safetensors"))
    return int(json.loads((folder / "progress.json").read_text())["tokens"]) // BATCH_TOKENS


def export_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain Hugging Face folder in bf16, readable by transformers without this project."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(eos_token_id=model.config.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_tokens(corpus: Path, output: Path) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray]]:
    """The tokenizer and the training tokens, made once and kept beside the checkpoint."""
    folder, cache = output / "tokenizer", output / "tokens.safetensors"
    if not folder.exists():
        train_tokenizer(corpus).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not cache.exists():
        streams = tokenise(corpus, "train", tokenizer)
        save_file({n: torch.from_numpy(s) for n, s in streams.items()}, cache)
    return tokenizer, {n: s.numpy() for n, s in load_file(cache).items()}


def train(arguments: argparse.Namespace) -> None:
    """Run, or go on, until the tokens are spent or a signal asks for a checkpoint and an end."""
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, tokens = load_tokens(arguments.corpus, output)
    streams = {length: TokenStream(tokens, length) for length in (SHORT, LONG)}
    model = build_model(tokenizer)
    optimizers = build_optimizers(model)
    first = load_checkpoint(output / "checkpoint", model, optimizers)
    steps = math.ceil(arguments.tokens / BATCH_TOKENS)
    peaks = [group["lr"] for o in build_optimizers(model) for group in o.param_groups]
    states_of = torch.compile(final_states, dynamic=False) if arguments.compile else final_states

    stopping: list[int] = []
    losses: list[float] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: stopping.append(number))
    saved = started = time.monotonic()
    for step in range(first, steps):
        share = rate_share(step, steps, arguments.decay)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * share
        length = SHORT if share == 1 or step < WARMUP_STEPS else LONG
        batch = torch.from_numpy(streams[length].batch(step, BATCH_TOKENS // length))
        loss = HeadLoss.apply(states_of(model, batch[:, :-1]), model.lm_head.weight, batch[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) == LOG_STEPS:
            speed = (step + 1 - first) * BATCH_TOKENS / (time.monotonic() - started)
            entry = {"tokens": (step + 1) * BATCH_TOKENS, "loss": round(sum(losses) / LOG_STEPS, 4)}
            losses.clear()
            entry |= {"rate": round(share, 4), "tokens_per_s": round(speed)}
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
        if stopping or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(output / "checkpoint", model, optimizers, step + 1)
            saved = time.monotonic()
        if stopping:
            return
    save_checkpoint(output / "checkpoint", model, optimizers, steps)
    export_model(output / "model", model, tokenizer)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of CLASS.PART.jsonl files; only the train part is read")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint, log and model")
    parser.add_argument("--tokens", type=float, default=17.5e6, help="training tokens in all (default %(default)g)")
    parser.add_argument("--decay", type=float, default=0.35, help="last share of the tokens over which the rate falls")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
