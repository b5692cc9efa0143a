"""Which class a prompt is of: a calibrated answer, or `pooled` where there is none to be sure of.

Two small tables over the vocabulary decide. Logistic regression on token frequencies says which class is likeliest; its
probability, calibrated by a temperature, must reach the class's threshold: above it `PRECISION` of the answers were
right. The class's unigrams say whether the text is of the class at all: a text of no class is likeliest of some class,
but its words are not that class's. What is chosen is chosen out of fold, by source; what is reported is measured on
sources apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from strace.classes import POOLED
from strace.files import file_beside, write_beside

SCHEMA = 1
MANIFEST, TENSORS = "classifier.json", "classifier.safetensors"
READ = 512  # tokens, the latest: those before say less of what comes next, and the cost stays bounded
LATE = 96  # tokens, the latest: of what class they are for sure, a conversation has turned to
OPENINGS = (8, 32, READ)  # tokens of a text that are fitted and judged: a short prompt must be told as well
PRECISION = 0.95  # share of the answers of a class that are to be right
LEAST = 0.6  # probability below which nothing is answered, however often it was right
STRANGE = 0.03  # share of a class's own texts that may be taken for strangers
NEVER = 2.0  # a threshold that no probability reaches
FOLDS = 5
MOST_DOCUMENTS = 500  # of a class; more change little and take minutes
_STRENGTH = 30.0  # of the logistic regression; of the unigrams _PRIOR tokens of all classes' text
_PRIOR = 500.0

Floats = NDArray[np.float32]
Document = tuple[str, Sequence[int]]  # source and token ids
Cut = Callable[[Sequence[int]], Sequence[int]]


class BadClassifier(ValueError):
    """A classifier that cannot be used; the message names its folder and the reason."""


class Confusion(BaseModel):
    """What texts of known classes were taken for, on sources that nothing was fitted on. counts[i][j]: texts of class i
    taken for class j; the last column is `pooled`. read: which tokens of each text were given. precision: right among
    those given a class. answered: share given a class. ece: expected calibration error of the probability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read: str
    counts: list[list[int]]
    precision: float
    answered: float
    ece: float


class ClassifierManifest(BaseModel):
    """All that `classifier.json` says.

    temperature: divides the scores. least: per class the probability from which on it is answered; 2: never. floors:
    per class (slope, height): a text of n tokens is a stranger whose mean log-probability under the class's unigrams is
    below height + slope / sqrt(n). ignored: token ids that say nothing of a class. documents: [fitted on, reported] by
    class. strangers: share of a class's reported texts that a classifier of the other classes gave no class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    names: list[str]
    tokenizer_hash: str
    temperature: float
    precision: float
    least: list[float]
    floors: list[tuple[float, float]]
    ignored: list[int]
    documents: dict[str, tuple[int, int]]
    confusion: list[Confusion] = []
    strangers: dict[str, float] = {}
    tensors_hash: str = ""


@dataclass(frozen=True)
class Frame:
    """The tokens that a chat template puts around the one turn of a user: a prompt comes as text and as a turn."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def around(self, ids: Sequence[int]) -> list[int]:
        """`ids` as a turn."""
        return [*self.before, *ids, *self.after]


@dataclass(frozen=True)
class Texts:
    """Texts of known classes. scores [S, C] of the logistic regression, likelihoods [S, C] of the unigrams (mean
    natural logarithm), labels [S], lengths [S] in tokens that count."""

    scores: NDArray[np.float64]
    likelihoods: NDArray[np.float64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """weights: float32 [V, C] and biases: float32 [C] of the logistic regression. unigrams: float32 [V, C], natural
    logarithms. counted: bool [V], False for ids that say nothing."""

    weights: Floats
    biases: Floats
    unigrams: Floats
    counted: NDArray[np.bool_]

    def score(self, ids: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Scores [C], mean log-probabilities [C], and how many tokens counted; only tokens that occur are touched."""
        latest = np.asarray(ids[-READ:], dtype=np.int64)
        tokens, counts = np.unique(latest[latest < len(self.counted)], return_counts=True)
        counts, tokens = counts[self.counted[tokens]], tokens[self.counted[tokens]]
        total = int(counts.sum())
        if not total:
            return self.biases, np.zeros_like(self.biases), 0
        roots = np.sqrt(counts, dtype=np.float32)
        roots /= np.linalg.norm(roots)
        likelihoods = (counts.astype(np.float32) / total) @ self.unigrams[tokens]
        return roots @ self.weights[tokens] + self.biases, likelihoods, total

    def score_all(self, texts: Sequence[tuple[int, Sequence[int]]]) -> Texts:
        """Of (label, ids)."""
        rows = [self.score(ids) for _, ids in texts]
        return Texts(
            scores=np.array([scores for scores, _, _ in rows], dtype=np.float64),
            likelihoods=np.array([likelihoods for _, likelihoods, _ in rows], dtype=np.float64),
            labels=np.array([label for label, _ in texts]),
            lengths=np.array([max(1, length) for _, _, length in rows]),
        )


@dataclass(frozen=True)
class Classifier:
    """Tables, and the manifest that says how to read them."""

    manifest: ClassifierManifest
    tables: Tables

    def probabilities(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """float [C], calibrated."""
        return _softmax(self.tables.score(ids)[0] / self.manifest.temperature)

    def choose(self, ids: Sequence[int]) -> str:
        """The class of a prompt's token ids: that of the latest if they are surely of one, for a long conversation on
        something else must not outvote its last turn; else that of all."""
        late = self._tell(ids[-LATE:])
        return late if late != POOLED or len(ids) <= LATE else self._tell(ids)

    def _tell(self, ids: Sequence[int]) -> str:
        """`pooled` when unsure or when the text is a stranger to its class."""
        scores, likelihoods, length = self.tables.score(ids)
        if not length:
            return POOLED
        p = _softmax(scores / self.manifest.temperature)
        best = int(p.argmax())
        slope, height = self.manifest.floors[best]
        known = likelihoods[best] >= height + slope * length**-0.5
        return self.manifest.names[best] if known and p[best] >= self.manifest.least[best] else POOLED

    def save(self, folder: Path) -> None:
        """Write `classifier.safetensors` and `classifier.json` into `folder`."""
        t = self.tables
        tensors = {"weights": t.weights, "biases": t.biases, "unigrams": t.unigrams}
        with file_beside(folder / TENSORS) as beside:
            save_file(tensors, beside)
            digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        manifest = self.manifest.model_copy(update={"tensors_hash": digest})
        write_beside(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, tokenizer_hash: str | None = None) -> Classifier:
        """Read what `save` wrote, and refuse it if it is not of the tokenizer.

        Raises:
            BadClassifier: if a file is missing, is not what the other describes, or belongs to another tokenizer.
        """
        manifest = read_classifier(folder)
        if tokenizer_hash is not None and manifest.tokenizer_hash != tokenizer_hash:
            raise BadClassifier(f"classifier {folder / MANIFEST} was made with another tokenizer than the model's")
        path = folder / TENSORS
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tensors_hash:
                raise BadClassifier(f"classifier {path} is corrupt: its hash is not the one in {MANIFEST}")
            stored = load_file(path)
            weights, biases, unigrams = (stored[name] for name in ("weights", "biases", "unigrams"))
        except (OSError, SafetensorError, KeyError) as error:
            raise BadClassifier(f"cannot read the classifier {path}: {error}") from error
        classes = len(manifest.names)
        if weights.shape != unigrams.shape or weights.shape[1:] != (classes,) or biases.shape != (classes,):
            raise BadClassifier(f"classifier {path} does not fit {MANIFEST}: {classes} classes, {weights.shape}")
        return cls(manifest, Tables(weights, biases, unigrams, _count(len(weights), manifest.ignored)))


def read_classifier(folder: Path) -> ClassifierManifest:
    """`classifier.json` of a folder of subgraphs.

    Raises:
        BadClassifier: if it is missing or cannot be read.
    """
    path = folder / MANIFEST
    try:
        return ClassifierManifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadClassifier(f"classifier {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise BadClassifier(f"cannot read the classifier {path}: {error}") from error


def fit_classifier(
    known: Mapping[str, Sequence[Document]],
    reported: Mapping[str, Sequence[Document]],
    vocabulary: int,
    *,
    tokenizer_hash: str = "",
    ignored: Sequence[int] = (),
    frame: Frame | None = None,
    seed: int = 0,
) -> Classifier:
    """A classifier of the classes of `known`, judged on `reported`, whose sources are others.

    A class alone cannot be told from what is not of it: its classifier answers `pooled` to everything.
    """
    rng = np.random.default_rng(seed)
    known = {name: _draw(documents, rng) for name, documents in known.items()}
    reported = {name: _draw(documents, rng) for name, documents in reported.items()}
    frame = frame or Frame()
    made = _fit(known, vocabulary, tokenizer_hash, ignored, frame)
    if len(known) < 2:
        return made
    strangers = {}
    for left in known if len(known) > 2 else ():
        others = {name: documents for name, documents in known.items() if name != left}
        other = _fit(others, vocabulary, tokenizer_hash, ignored, frame)
        answers = [other.choose(ids) for _, ids in reported[left]]
        strangers[left] = answers.count(POOLED) / max(1, len(answers))
    cuts: dict[str, Cut] = {
        "the first 8 tokens": lambda ids: ids[:8],
        "the first 32 tokens": lambda ids: ids[:32],
        "the whole text": lambda ids: ids,
    }
    if frame.before or frame.after:
        cuts["the first 32 tokens as a turn"] = lambda ids: frame.around(ids[:32])
    tables = [_confuse(made, reported, read, cut) for read, cut in cuts.items()]
    documents = {name: (len(known[name]), len(reported[name])) for name in known}
    update = {"confusion": tables, "strangers": strangers, "documents": documents}
    return Classifier(made.manifest.model_copy(update=update), made.tables)


def _draw(documents: Sequence[Document], rng: np.random.Generator) -> list[Document]:
    return [documents[i] for i in sorted(rng.permutation(len(documents))[:MOST_DOCUMENTS])]


def _fit(
    known: Mapping[str, Sequence[Document]], vocabulary: int, tokenizer_hash: str, ignored: Sequence[int], frame: Frame
) -> Classifier:
    """Tables of all documents; temperature, thresholds and floors by tables that have not seen the text's source."""
    names, counted = list(known), _count(vocabulary, ignored)
    temperature, least, floors = 1.0, [NEVER] * len(names), [(0.0, 0.0)] * len(names)
    if len(names) > 1:
        unseen = _score_unseen(known, counted, frame)
        temperature = _calibrate(unseen)
        p = _softmax(unseen.scores / temperature)
        least = [_find_least(p, unseen.labels, c) for c in range(len(names))]
        floors = [_find_floor(unseen, c) for c in range(len(names))]
    manifest = ClassifierManifest(
        names=names,
        tokenizer_hash=tokenizer_hash,
        temperature=temperature,
        precision=PRECISION,
        least=least,
        floors=floors,
        ignored=list(ignored),
        documents={name: (len(documents), 0) for name, documents in known.items()},
    )
    return Classifier(manifest, fit_tables(_expand(known, frame), len(names), counted))


def _count(vocabulary: int, ignored: Sequence[int]) -> NDArray[np.bool_]:
    counted = np.ones(vocabulary, dtype=np.bool_)
    counted[list(ignored)] = False
    return counted


def _expand(known: Mapping[str, Sequence[Document]], frame: Frame) -> list[tuple[int, Sequence[int]]]:
    """(class number, ids) of every document's openings, as text and as a turn."""
    found: list[tuple[int, Sequence[int]]] = []
    for c, documents in enumerate(known.values()):
        for _, ids in documents:
            openings = [ids[:n] for n in OPENINGS]
            found += [(c, opening) for opening in openings]
            found += [(c, frame.around(opening)) for opening in openings if frame.before or frame.after]
    return found


def fit_tables(texts: Sequence[tuple[int, Sequence[int]]], classes: int, counted: NDArray[np.bool_]) -> Tables:
    """The two tables, from (class number, ids); a class without a text is never the likeliest."""
    # Here, because serving needs neither and scikit-learn loads slowly.
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    counts = np.zeros((len(counted), classes))
    values: list[float] = []
    columns: list[int] = []
    ends = [0]
    for c, ids in texts:
        tokens, times = np.unique(np.asarray(ids[-READ:], dtype=np.int64), return_counts=True)
        times, tokens = times[counted[tokens]], tokens[counted[tokens]]
        counts[tokens, c] += times
        roots = np.sqrt(times)
        values += (roots / max(float(np.linalg.norm(roots)), 1e-12)).tolist()
        columns += tokens.tolist()
        ends.append(len(columns))
    features = csr_matrix((values, columns, ends), shape=(len(texts), len(counted)))
    labels = np.array([c for c, _ in texts])
    weights = np.zeros((len(counted), classes), np.float32)
    biases = np.full(classes, -30.0, np.float32)
    there = np.unique(labels)
    if len(there) > 1:
        model = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=300).fit(features, labels)
        # Two classes give one row, whose sigmoid is the softmax of (0, row).
        rows, heights = model.coef_, model.intercept_
        if len(rows) == 1:
            rows, heights = np.concatenate([0 * rows, rows]), np.concatenate([0 * heights, heights])
        weights[:, there], biases[there] = rows.T, heights
    else:
        biases[there] = 0.0
    shared = counts.sum(1) + 0.5
    shared /= shared.sum()
    unigrams = np.log((counts + _PRIOR * shared[:, None]) / (counts.sum(0) + _PRIOR))
    return Tables(weights, biases, unigrams.astype(np.float32), counted)


def _score_unseen(known: Mapping[str, Sequence[Document]], counted: NDArray[np.bool_], frame: Frame) -> Texts:
    """Every document's openings, scored by tables fitted without its source."""
    fold_of: dict[str, int] = {}
    sources = {name: list(dict.fromkeys(source for source, _ in documents)) for name, documents in known.items()}
    folds = max(2, min(FOLDS, *(len(own) for own in sources.values())))
    for own in sources.values():
        for i, source in enumerate(own):
            fold_of.setdefault(source, i % folds)
    parts = []
    for fold in range(folds):
        rest, held = (
            {name: [d for d in ds if (fold_of[d[0]] == fold) == out] for name, ds in known.items()}
            for out in (False, True)
        )
        if any(held.values()) and any(rest.values()):
            tables = fit_tables(_expand(rest, frame), len(known), counted)
            parts.append(tables.score_all(_expand(held, frame)))
    return Texts(*(np.concatenate([getattr(part, f) for part in parts]) for f in Texts.__dataclass_fields__))


def _calibrate(texts: Texts) -> float:
    """The temperature of the least cross entropy, 1 at least: where classes are always told apart it would go to 0, and
    a text of neither would be told as surely as theirs."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(texts.labels))

    def loss(log: float) -> float:
        p = _softmax(texts.scores / np.exp(log))
        return float(-np.log(p[rows, texts.labels] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(0, 2), method="bounded").x))


def _find_least(p: NDArray[np.float64], labels: NDArray[np.int64], c: int) -> float:
    """The lowest probability, `LEAST` at least, from which on `PRECISION` of the answers `c` are right."""
    mine = p.argmax(1) == c
    order = np.argsort(-p[mine, c], kind="stable")
    right = (labels[mine] == c)[order].cumsum() / np.arange(1, mine.sum() + 1)
    good = np.flatnonzero(right >= PRECISION)
    return max(LEAST, float(p[mine, c][order][good[-1]])) if len(good) else NEVER


def _find_floor(texts: Texts, c: int) -> tuple[float, float]:
    """Slope and height of the line below which `STRANGE` of the class's own texts lie, over 1 / sqrt(tokens)."""
    mine = (texts.labels == c) & (texts.scores.argmax(1) == c)
    if not mine.any():
        return 0.0, 0.0
    short, values = texts.lengths[mine] ** -0.5, texts.likelihoods[mine, c]
    groups = [g for g in np.array_split(np.argsort(short), len(OPENINGS)) if len(g)]
    places = np.array([short[group].mean() for group in groups])
    heights = np.array([np.quantile(values[group], STRANGE) for group in groups])
    spread = places - places.mean()
    slope = 0.0 if (spread**2).sum() < 1e-4 else float((spread * heights).sum() / (spread**2).sum())
    return slope, float((heights - slope * places).min())


def _confuse(classifier: Classifier, reported: Mapping[str, Sequence[Document]], read: str, cut: Cut) -> Confusion:
    names = [*classifier.manifest.names, POOLED]
    counts = np.zeros((len(names) - 1, len(names)), np.int64)
    sure, right = [], []
    for i, name in enumerate(names[:-1]):
        for _, ids in reported[name]:
            counts[i, names.index(classifier.choose(cut(ids)))] += 1
            p = classifier.probabilities(cut(ids))
            sure.append(float(p.max()))
            right.append(int(p.argmax()) == i)
    answered = int(counts[:, :-1].sum())
    return Confusion(
        read=read,
        counts=counts.tolist(),
        precision=float(np.trace(counts[:, :-1]) / max(1, answered)),
        answered=answered / max(1, int(counts.sum())),
        ece=_calibration_error(np.array(sure), np.array(right, dtype=float)),
    )


def _calibration_error(sure: NDArray[np.float64], right: NDArray[np.float64], bins: int = 10) -> float:
    """Mean distance between probability and share right, over bins of equal width."""
    places = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = (abs((sure - right)[places == b].sum()) for b in range(bins))
    return float(sum(gaps) / max(1, len(sure)))


def _softmax(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Over the last axis."""
    powers = np.exp(np.asarray(scores, np.float64) - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))
