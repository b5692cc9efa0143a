"""What `routed` diverges by at each threshold: a row per calibration prompt and threshold, run by the engine itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strace.files import file_beside

THRESHOLDS = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
"""Strictest first, and the same for every model: fixed before anything is measured."""


@dataclass
class Losses:
    """Arrays of one length, a row per prompt, temperature and threshold.

    key: what the rows were measured with; rows of another key do not go together. document: number of the prompt, each
    of another document. emitted: tokens of the text; unverified: those emitted before a full pass saw them. divergent:
    how many of these the full model would not have chosen after the same text; where tokens are drawn, the sum of the
    total variations.
    """

    key: str
    document: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    temperature: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float64))
    threshold: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float64))
    emitted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    unverified: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    divergent: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float64))

    def add(
        self, document: int, temperature: float, threshold: float, emitted: int, unverified: int, divergent: float
    ) -> None:
        """Append a row."""
        row = (document, temperature, threshold, emitted, unverified, divergent)
        for name, value in zip(_COLUMNS, row, strict=True):
            column = getattr(self, name)
            setattr(self, name, np.append(column, np.asarray(value, column.dtype)))

    def at(self, temperature: float, threshold: float) -> Losses:
        """The rows of one temperature and threshold, by document."""
        here = np.flatnonzero((self.temperature == temperature) & (self.threshold == threshold))
        here = here[np.argsort(self.document[here])]
        return Losses(self.key, *(getattr(self, name)[here] for name in _COLUMNS))

    @property
    def loss(self) -> np.ndarray:
        """float64: the divergence of each row's request, divergent over emitted tokens."""
        return self.divergent / np.maximum(self.emitted, 1)

    def measured(self, temperature: float, documents: int) -> list[float]:
        """The thresholds, strictest first, up to the first that lacks one of so many documents."""
        found: list[float] = []
        for threshold in THRESHOLDS:
            if len(self.at(temperature, threshold).document) < documents:
                break
            found.append(threshold)
        return found

    def matrix(self, temperature: float, thresholds: list[float]) -> np.ndarray:
        """float64 [documents, thresholds]: losses of thresholds that were measured to their end."""
        return np.stack([self.at(temperature, threshold).loss for threshold in thresholds], 1)

    def save(self, path: Path) -> None:
        """Write the table."""
        path.parent.mkdir(exist_ok=True)
        with file_beside(path) as beside:
            save_file({name: getattr(self, name) for name in _COLUMNS}, beside, {"key": json.dumps(self.key)})

    @classmethod
    def load(cls, path: Path) -> Losses:
        """Read what `save` wrote.

        Raises:
            ValueError: if it is missing or cannot be read.
        """
        try:
            with safe_open(path, framework="numpy") as stored:
                key = json.loads((stored.metadata() or {})["key"])
                return cls(key, *(stored.get_tensor(name) for name in _COLUMNS))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"cannot read the table {path}: {error}") from error


_COLUMNS = [f.name for f in fields(Losses) if f.name != "key"]
