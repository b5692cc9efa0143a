"""Bits per byte of a Hugging Face model on each class of a corpus, beside a 5-gram Kneser-Ney model of its train part.

Bits per byte: -log2 of the probability of all tokens of a unit, its end token included and the end token as first
context, over the UTF-8 bytes of its raw text. Both models read the same tokens. The Kneser-Ney model is fitted twice,
on the train text of all classes and on that of the class alone; the better of the two is the baseline.
The last line of the output is one JSON document.

Example: python models/embedded/evaluate.py build/embedded/model ../shared/corpus --baseline build/embedded/kn.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corpus import MIXTURE, read_units
from kneser_ney import KneserNey

BATCH_TOKENS = 8192
console = Console()


class Text(NamedTuple):
    """The units of one class that are scored."""

    units: list[np.ndarray]  # int64 [n] each, without the end token
    size: int  # of the raw text, UTF-8 bytes


class Window(NamedTuple):
    """Tokens read at once; only targets not scored by an earlier window of the same unit count."""

    inputs: np.ndarray  # int64 [n], from the end token or from inside the unit
    targets: np.ndarray  # int64 [m], the tokens after the last m inputs


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, without its end token."""
    return [np.array(ids, np.int64) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def cut_windows(unit: np.ndarray, end: int, context: int) -> Iterator[Window]:
    """Windows of at most `context` inputs, moved on by half a context, whose targets are each token of `unit` once."""
    tokens = np.concatenate([[end], unit, [end]])
    start = scored = 0
    while scored < len(tokens) - 1:
        stop = min(start + context, len(tokens) - 1)
        yield Window(tokens[start:stop], tokens[scored + 1 : stop + 1])
        start, scored = stop - context // 2, stop


def batch_windows(windows: list[Window]) -> Iterator[list[Window]]:
    """Groups of windows of about one length, each at most BATCH_TOKENS once padded, or a single window."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: len(w.inputs)):
        if batch and (len(batch) + 1) * len(window.inputs) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    yield batch


@torch.inference_mode()
def score_batch(model: PreTrainedModel, batch: list[Window]) -> float:
    """Bits of all targets of the batch. Rows are padded on the right, where a causal model does not look."""
    inputs = torch.zeros(len(batch), max(len(w.inputs) for w in batch), dtype=torch.long)
    for row, window in zip(inputs, batch, strict=True):
        row[: len(window.inputs)] = torch.from_numpy(window.inputs)
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    nats = 0.0
    for row, window in zip(logits, batch, strict=True):
        stop, targets = len(window.inputs), torch.from_numpy(window.targets).to(row.device)
        nats += cross_entropy(row[stop - len(targets) : stop].float(), targets, reduction="sum").item()
    return nats / math.log(2)


def measure_model(model: PreTrainedModel, end: int, texts: dict[str, Text]) -> dict[str, float]:
    """Bits per byte of each class."""
    context = model.config.max_position_embeddings
    batches = {
        name: list(batch_windows([window for unit in text.units for window in cut_windows(unit, end, context)]))
        for name, text in texts.items()
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("model", total=sum(map(len, batches.values())))
        bits = dict.fromkeys(batches, 0.0)
        for name, of_class in batches.items():
            for batch in of_class:
                bits[name] += score_batch(model, batch)
                progress.advance(task)
    return {name: bits[name] / text.size for name, text in texts.items()}


def measure_baseline(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, texts: dict[str, Text]
) -> dict[str, dict[str, float]]:
    """Bits per byte of each class under a Kneser-Ney model of all train text and under one of the class's own."""
    end, vocabulary = tokenizer.eos_token_id, len(tokenizer)
    train = {
        name: encode(tokenizer, read_units(corpus, name, "train"))
        for name in track(texts, "tokenising the train part", console=console, transient=True)
    }
    pooled = KneserNey.fit([unit for units in train.values() for unit in units], vocabulary, end)
    figures = {}
    for name, text in track(texts.items(), "Kneser-Ney", console=console, transient=True):
        alone = KneserNey.fit(train[name], vocabulary, end)
        figures[name] = {k: m.bits(text.units) / text.size for k, m in (("pooled", pooled), ("class", alone))}
    return figures


def cached_baseline(
    path: Path | None, corpus: Path, tokenizer: PreTrainedTokenizerBase, texts: dict[str, Text]
) -> dict[str, dict[str, float]]:
    """`measure_baseline`, read from `path` when it holds it for the very same tokens; written there when absent."""
    tokens = {name: [unit.tolist() for unit in text.units] for name, text in texts.items()}
    scored = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        if found["scored_tokens_sha256"] != scored:
            raise SystemExit(f"{path} was measured on other units or with another tokenizer; remove it or name another")
        cached: dict[str, dict[str, float]] = found["bits_per_byte"]
        return cached
    figures = measure_baseline(corpus, tokenizer, texts)
    if path is not None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"scored_tokens_sha256": scored, "bits_per_byte": figures}, indent=1) + "\n")
        fresh.rename(path)
    return figures


def read_texts(corpus: Path, part: str, count: int | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Text]:
    """All units of each class of the part, or `count` evenly spaced ones."""
    texts = {}
    for name in MIXTURE:
        raw = read_units(corpus, name, part)
        if count is not None and count < len(raw):
            raw = [raw[i * len(raw) // count] for i in range(count)]
        texts[name] = Text(encode(tokenizer, raw), sum(len(unit.encode()) for unit in raw))
    return texts


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the rows as a table; the baseline's columns only where it was measured."""
    columns = list(next(iter(rows.values())))
    table = Table("class", *(column.replace("_", " ") for column in columns))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.4f}" if isinstance(row[c], float) else f"{row[c]:,}" for c in columns))
    console.print(table)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder with weights and tokenizer")
    parser.add_argument("corpus", type=Path, help="folder of CLASS.PART.jsonl files")
    parser.add_argument("--part", default="valid", help="part to score (default %(default)s)")
    parser.add_argument("--units", type=int, help="score only this many evenly spaced units of each class")
    parser.add_argument("--no-baseline", action="store_true", help="leave the Kneser-Ney model out")
    parser.add_argument(
        "--baseline", type=Path, help="JSON file to keep the baseline's figures in, or to read them from"
    )
    arguments = parser.parse_args()
    if arguments.units is not None and arguments.units < 1:
        parser.error("--units must be at least 1")

    if not arguments.model.is_dir():
        parser.error(f"no model folder at {arguments.model}")
    for name in MIXTURE:
        if not (path := arguments.corpus / f"{name}.{arguments.part}.jsonl").exists():
            parser.error(f"no such part of the corpus: {path}")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, use_safetensors=True)
    texts = read_texts(arguments.corpus, arguments.part, arguments.units, tokenizer)
    baseline = {} if arguments.no_baseline else cached_baseline(arguments.baseline, arguments.corpus, tokenizer, texts)
    measured = measure_model(model, tokenizer.eos_token_id, texts)
    rows: dict[str, dict[str, Any]] = {}
    for name, text in texts.items():
        rows[name] = {"units": len(text.units), "bytes": text.size, "bits_per_byte": measured[name]}
        rows[name] |= {f"kneser_ney_{kind}": figure for kind, figure in baseline.get(name, {}).items()}
    show(rows)
    print(json.dumps({"model": str(arguments.model), "part": arguments.part, "classes": rows}))


if __name__ == "__main__":
    main()
