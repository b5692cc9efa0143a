"""Prompt classes: reading them, splitting them by source, and telling which class a prompt is of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strace.files import file_beside

POOLED = "pooled"
RESERVED = frozenset({POOLED, "full", "exact", "routed", "auto", "embedded"})
FEWEST_PROMPTS, FEWEST_SOURCES = 8, 3
SHARES = {"fit": 0.65, "choose": 0.15, "report": 0.2}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FIELDS = frozenset({"text", "prompt", "source"})


class BadPrompts(ValueError):
    """Prompts that cannot be used; the message names the file, the line and the reason."""


@dataclass(frozen=True)
class Prompt:
    """A text of a class and the document it was cut from."""

    text: str
    source: str


@dataclass
class Parts:
    """A class's prompts by use, no source in two of them: to fit on, to choose by, to report."""

    fit: list[Prompt] = field(default_factory=list)
    choose: list[Prompt] = field(default_factory=list)
    report: list[Prompt] = field(default_factory=list)


def shipped_prompts() -> Path:
    """The folder of class prompts inside the package."""
    return Path(str(files("strace"))) / "prompts"


def read_prompts(folder: Path, only: Sequence[str] = ()) -> dict[str, list[Prompt]]:
    """Every class of a folder (or those named in `only`), by name: `CLASS.jsonl` with `text` or `prompt` and optional
    `source`, or `CLASS.txt`, blank-line separated. A prompt without a source is its own; a repeated text is read once.
    A file named in capitals (README.txt, NOTICES.txt) is about the folder, not of it.

    Raises:
        BadPrompts: no such folder or class, a bad name, bad JSON, an empty class, too few prompts, a text in two
        classes.
    """
    if not folder.is_dir():
        raise BadPrompts(f"no prompt folder {folder}")
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".txt") and not path.stem.isupper()]
    paths = {path.stem: path for path in found}
    if len(paths) < len(found):
        raise BadPrompts(f"{folder} has a class both as .jsonl and as .txt")
    if unknown := sorted(set(only) - set(paths)):
        raise BadPrompts(f"{folder} has no class {', '.join(unknown)}; it has {', '.join(paths) or 'none'}")
    if not paths:
        raise BadPrompts(f"{folder} has no CLASS.jsonl and no CLASS.txt")
    classes = {name: _read_class(path) for name, path in paths.items() if not only or name in only}
    _refuse_shared_texts(classes)
    return classes


def _read_class(path: Path) -> list[Prompt]:
    if path.stem in RESERVED or not _NAME.fullmatch(path.stem):
        reason = "is reserved" if path.stem in RESERVED else "is not lower-case letters, digits, - and _"
        raise BadPrompts(f"{path}: the class name {path.stem!r} {reason}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompts(f"cannot read {path}: {error}") from error
    found = _parse_lines(path, content) if path.suffix == ".jsonl" else _parse_paragraphs(content)
    prompts = list({prompt.text: prompt for prompt in found}.values())
    if not prompts:
        raise BadPrompts(f"{path} holds no prompt")
    sources = {prompt.source for prompt in prompts}
    if len(prompts) < FEWEST_PROMPTS or len(sources) < FEWEST_SOURCES:
        raise BadPrompts(
            f"{path} has {len(prompts)} different prompts of {len(sources)} sources; "
            f"fitting and reporting apart needs at least {FEWEST_PROMPTS} of {FEWEST_SOURCES}"
        )
    return prompts


def _parse_lines(path: Path, content: str) -> Iterator[Prompt]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadPrompts(f"{path}:{number}: not JSON: {error.msg}") from error
        if not isinstance(record, dict) or ("text" in record) == ("prompt" in record):
            raise BadPrompts(f"{path}:{number}: needs an object with either text or prompt")
        if unknown := sorted(set(record) - _FIELDS):
            raise BadPrompts(f"{path}:{number}: unknown field {', '.join(unknown)}")
        text, source = record.get("text", record.get("prompt")), record.get("source")
        if not isinstance(text, str) or not text.strip() or not (source is None or isinstance(source, str)):
            raise BadPrompts(f"{path}:{number}: text must be a string that is not empty, source a string")
        yield Prompt(text, source or text)


def _parse_paragraphs(content: str) -> Iterator[Prompt]:
    for text in re.split(r"\n\s*\n", content):
        if text.strip():
            yield Prompt(text.strip("\n"), text.strip("\n"))


def _refuse_shared_texts(classes: Mapping[str, Sequence[Prompt]]) -> None:
    owner: dict[str, str] = {}
    for name, prompts in classes.items():
        for prompt in prompts:
            other = owner.setdefault(prompt.text, name)
            if other != name:
                raise BadPrompts(f"the same text is in the classes {other} and {name}: {prompt.text[:60]!r}")


def split_classes(classes: Mapping[str, Sequence[Prompt]], seed: int = 0) -> dict[str, Parts]:
    """Every class split by source, and `pooled`, all classes together.

    A source that two classes share goes to the same part in both, so that `pooled` is as disjoint as its classes.
    Sources go, largest first, to the part that is emptiest for its share: no part stays empty, even with a few large
    sources.
    """
    rng = np.random.default_rng(seed)
    part_of: dict[str, str] = {}
    split = {name: Parts() for name in classes}
    for name, prompts in classes.items():
        sizes = Counter(prompt.source for prompt in prompts)
        held = dict.fromkeys(SHARES, 0)
        for source in part_of.keys() & sizes.keys():
            held[part_of[source]] += sizes[source]
        fresh = [source for source in sizes if source not in part_of]
        rng.shuffle(fresh)
        for source in sorted(fresh, key=lambda s: -sizes[s]):
            part = min(SHARES, key=lambda p: held[p] / SHARES[p])
            part_of[source] = part
            held[part] += sizes[source]
        for prompt in prompts:
            getattr(split[name], part_of[prompt.source]).append(prompt)
    pooled = Parts(*([p for parts in split.values() for p in getattr(parts, use)] for use in SHARES))
    return {**split, POOLED: pooled}


@dataclass(frozen=True)
class Classifier:
    """Which class a prompt's tokens are of: logistic regression on its token frequencies.

    weights: float32 [C, V]. biases: float32 [C]. `least`: the probability below which the answer is `pooled`.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    biases: np.ndarray
    least: float = 0.6

    FILE = "classifier.safetensors"

    @classmethod
    def fit(cls, prompts: Mapping[str, Sequence[Sequence[int]]], vocabulary: int, seed: int = 0) -> Classifier:
        """From token ids of each class's prompts; of each also its openings, because a short prompt must be told as
        well."""
        # Here, because serving needs neither and scikit-learn loads slowly.
        from scipy.sparse import csr_matrix, vstack
        from sklearn.linear_model import LogisticRegression

        names = tuple(prompts)
        if len(names) < 2:
            return cls(names, np.zeros((len(names), vocabulary), np.float32), np.zeros(len(names), np.float32), 2.0)
        examples = [(c, ids[:n]) for c, name in enumerate(names) for ids in prompts[name] for n in (8, 32, len(ids))]
        features = vstack([csr_matrix(_frequencies(ids, vocabulary)) for _, ids in examples])
        labels = [c for c, _ in examples]
        model = LogisticRegression(C=30.0, class_weight="balanced", max_iter=300, random_state=seed)
        model.fit(features, labels)
        # Two classes give one row, whose sigmoid is the softmax of (0, row).
        rows, biases = model.coef_, model.intercept_
        if len(rows) == 1:
            rows, biases = np.concatenate([0 * rows, rows]), np.concatenate([0 * biases, biases])
        return cls(names, np.ascontiguousarray(rows, np.float32), biases.astype(np.float32))

    def probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """float [C]."""
        scores = self.weights @ _frequencies(ids, self.weights.shape[1]) + self.biases
        scores = np.exp(scores - scores.max())
        return np.asarray(scores / scores.sum())

    def choose(self, ids: Sequence[int]) -> str:
        """The class of a prompt's token ids, `pooled` when unsure."""
        if not len(ids) or not self.names:
            return POOLED
        p = self.probabilities(ids)
        return self.names[int(p.argmax())] if p.max() >= self.least else POOLED

    def save(self, folder: Path) -> None:
        """Write `classifier.safetensors` into `folder`."""
        tensors = {"weights": self.weights, "biases": self.biases}
        with file_beside(folder / self.FILE) as beside:
            save_file(tensors, beside, {"names": json.dumps(self.names), "least": str(self.least)})

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read `classifier.safetensors` of `folder`.

        Raises:
            ValueError: if it is missing or cannot be read.
        """
        try:
            with safe_open(folder / cls.FILE, framework="numpy") as stored:
                about = stored.metadata() or {}
                names = tuple(json.loads(about["names"]))
                weights, biases = stored.get_tensor("weights"), stored.get_tensor("biases")
                return cls(names, weights, biases, float(about["least"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"cannot read the classifier {folder / cls.FILE}: {error}") from error


def _frequencies(ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """float32 [V] of unit length, square roots of counts: one frequent word shall not outweigh all others."""
    counts = np.sqrt(np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocabulary)[:vocabulary])
    return np.asarray(counts / max(float(np.linalg.norm(counts)), 1e-12), dtype=np.float32)
