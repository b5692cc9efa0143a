"""Classes found in an unlabelled prompt log: texts that use like words together, named by the words that tell most."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strace.classes import FEWEST_PROMPTS, FEWEST_SOURCES, RESERVED, BadPrompts, Prompt
from strace.files import write_beside

MOST_CLUSTERS = 8  # tried where no number is asked for
FILE = "prompts.jsonl"
_DIRECTIONS = 50  # of the words, which the texts are compared along
_SAMPLE = 2000  # texts that a silhouette is measured on


@dataclass(frozen=True)
class Clusters:
    """Prompts by class, and how well the classes part: the mean silhouette, 1 apart, 0 none."""

    classes: dict[str, list[Prompt]]
    silhouette: float


def cluster_prompts(log: Sequence[Prompt], clusters: int | None = None, seed: int = 0) -> Clusters:
    """So many clusters, or as many, up to eight, as part best (k-means on TF-IDF along its main directions).

    Raises:
        BadPrompts: if no number of clusters, or not that asked for, leaves each with prompts enough for a class.
    """
    # Here, because scikit-learn loads slowly.
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    most = len(log) // FEWEST_PROMPTS
    if most < 2 or (clusters is not None and not 2 <= clusters <= most):
        raise BadPrompts(
            f"{len(log)} different prompts make {f'2 to {most}' if most > 1 else 'no two'} classes of at least "
            f"{FEWEST_PROMPTS}" + ("" if clusters is None else f", not {clusters}")
        )
    places, telling, words = _place(log, seed)
    found: list[tuple[float, NDArray[np.int64]]] = []
    for count in range(2, min(MOST_CLUSTERS, most) + 1) if clusters is None else [clusters]:
        labels = KMeans(count, n_init=8, random_state=seed).fit_predict(places)
        if _smallest(log, labels) is None and len(set(labels.tolist())) == count:
            sample = min(_SAMPLE, len(log))
            found.append((float(silhouette_score(places, labels, sample_size=sample, random_state=seed)), labels))
    if not found:
        asked = "every number of clusters" if clusters is None else f"{clusters} clusters"
        raise BadPrompts(
            f"{asked} leaves one with less than {FEWEST_PROMPTS} prompts of {FEWEST_SOURCES} sources; "
            "label the prompts, or give more of them"
        )
    silhouette, labels = max(found, key=lambda each: each[0])
    names = name_clusters(telling, words, labels)
    classes = {name: [p for p, l in zip(log, labels, strict=True) if l == c] for c, name in enumerate(names)}
    return Clusters(dict(sorted(classes.items())), silhouette)


def _place(log: Sequence[Prompt], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Each text's place by its words and signs, [S, directions] of unit length; its TF-IDF over the words that may
    name a class, [S, W]; those words."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    texts = [prompt.text for prompt in log]
    common = max(2, round(0.9 * len(texts)))
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=common, token_pattern=r"\w+|[^\w\s]")
    try:
        table = vectors.fit_transform(texts)
    except ValueError as error:  # nothing is left of the vocabulary
        raise BadPrompts("the prompts have no words in common: no classes to be found") from error
    directions = min(_DIRECTIONS, table.shape[1] - 1, len(texts) - 1)
    if directions < 1:
        raise BadPrompts("the prompts have no words in common: no classes to be found")
    places = TruncatedSVD(directions, random_state=seed).fit_transform(table)
    places /= np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-12)
    words = vectors.get_feature_names_out().tolist()
    named = [i for i, word in enumerate(words) if len(_slug(word)) > 2 and word not in ENGLISH_STOP_WORDS]
    return places, table[:, named].toarray(), [words[i] for i in named]


def _smallest(log: Sequence[Prompt], labels: NDArray[np.int64]) -> int | None:
    """A cluster that has too few prompts or sources to be a class; None: there is none."""
    for c in set(labels.tolist()):
        own = [prompt for prompt, label in zip(log, labels, strict=True) if label == c]
        if len(own) < FEWEST_PROMPTS or len({prompt.source for prompt in own}) < FEWEST_SOURCES:
            return int(c)
    return None


def name_clusters(telling: NDArray[np.float64], words: Sequence[str], labels: NDArray[np.int64]) -> list[str]:
    """A name for each cluster, safe as a folder's: its two most telling words, those that its texts use more than all
    others do; a third or a number where a name is taken."""
    names: list[str] = []
    for c in range(int(labels.max()) + 1):
        own = labels == c
        lead = telling[own].mean(0) - telling[~own].mean(0)
        best = [_slug(words[i]) for i in np.argsort(-lead, kind="stable") if lead[i] > 0]
        best = [word for word in dict.fromkeys(best) if word][:3] or ["cluster"]
        tries = ["-".join(best[:count]) for count in (2, 3)] + [f"{best[0]}-{n}" for n in range(2, len(labels) + 3)]
        names.append(next(name for name in tries if name not in names and name not in RESERVED))
    return names


def _slug(word: str) -> str:
    """A word in plain lower-case letters, at most twenty; empty where it has none."""
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z]", "", plain)[:20]


def save_clusters(folder: Path, clusters: Clusters) -> Path:
    """Write the prompts, each with its class, to `prompts.jsonl`, which can be mended and traced again."""
    lines = [
        json.dumps({"class": name, "text": prompt.text, "source": prompt.source}, ensure_ascii=False)
        for name, prompts in clusters.classes.items()
        for prompt in prompts
    ]
    path = folder / FILE
    write_beside(path, "\n".join(lines) + "\n")
    return path
