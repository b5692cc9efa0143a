"""The training text: five classes of units read from a corpus folder, rendered, tokenised and mixed.

The folder holds one ``CLASS.PART.jsonl`` per class and part, one JSON object with ``source`` and ``text`` a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

# Rows of each class in every group of 20 training rows. By size stories would be .41 and math .05; a class that
# small would not be learned, and the order is interleaved so that every batch holds every class.
MIXTURE = {"stories": 6, "code": 5, "chat": 4, "facts": 3, "math": 2}
GROUP = sum(MIXTURE.values())
SPEAKERS = {"User: ": "user", "Assistant: ": "assistant", "Question: ": "user", "Answer: ": "assistant"}


def read_units(corpus: Path, name: str, part: str) -> list[str]:
    """The texts of one class and part, in file order."""
    path = corpus / f"{name}.{part}.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def as_messages(text: str) -> list[dict[str, str]]:
    """Split a dialogue or a worked problem into chat messages; prose gives an empty list."""
    messages: list[dict[str, str]] = []
    for line in text.split("\n"):
        speaker = next((s for s in SPEAKERS if line.startswith(s)), None)
        if speaker is not None:
            messages.append({"role": SPEAKERS[speaker], "content": line[len(speaker) :]})
        elif messages:
            messages[-1]["content"] += "\n" + line
        else:
            return []
    return messages


def render(text: str, name: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """The forms in which a unit is trained on: as it stands and, for dialogues and problems, through the template.

    Both are needed: `/v1/completions` and traces of raw text see the first, `/v1/chat/completions` the second.
    """
    yield text + tokenizer.eos_token
    messages = as_messages(text) if name in ("chat", "math") else []
    if messages:
        yield str(tokenizer.apply_chat_template(messages, tokenize=False)) + tokenizer.eos_token


class TokenStream:
    """Training rows as a pure function of their index, so that a resumed run sees exactly the rows it would have.

    Every class is one long token array. Each epoch over it starts at another offset and visits its windows in
    another order.
    """

    def __init__(self, tokens: dict[str, np.ndarray], length: int, seed: int = 0) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        names = list(MIXTURE)
        spread = sorted((k / MIXTURE[n], n, k) for n in names for k in range(MIXTURE[n]))
        self.pattern = [(n, k) for _, n, k in spread]
        self.orders: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def row(self, index: int) -> np.ndarray:
        """Row `index`: int64 [length + 1], inputs and the shifted targets."""
        name, rank = self.pattern[index % GROUP]
        stream = self.tokens[name]
        windows = (len(stream) - 2) // self.length - 1
        epoch, place = divmod(index // GROUP * MIXTURE[name] + rank, windows)
        if (name, epoch) not in self.orders:
            rng = np.random.default_rng([self.seed, list(MIXTURE).index(name), epoch])
            self.orders[name, epoch] = (int(rng.integers(self.length)), rng.permutation(windows))
        offset, order = self.orders[name, epoch]
        start = offset + int(order[place]) * self.length
        return stream[start : start + self.length + 1].astype(np.int64)

    def batch(self, step: int, rows: int) -> np.ndarray:
        """int64 [rows, length + 1] of training step `step`."""
        return np.stack([self.row(step * rows + r) for r in range(rows)])


def tokenise(corpus: Path, part: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> dict[str, np.ndarray]:
    """One shuffled uint16 token array per class, every rendering of every unit once."""
    streams = {}
    for name in MIXTURE:
        texts = [form for text in read_units(corpus, name, part) for form in render(text, name, tokenizer)]
        order = np.random.default_rng(seed).permutation(len(texts))
        encoded = tokenizer.backend_tokenizer.encode_batch([texts[i] for i in order])
        streams[name] = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])
    return streams
