"""A certificate on disk, in the folder `routed` of a subgraph: which thresholds keep which risk, and what it holds for.

It is valid for one subgraph and classifier, known by the hashes of their files, and for the runner, the instruction set
and the format of the full model that it was measured with: kernels of another set round in another order, and a text
may go another way. Each such setting has a certificate of its own. Where none is valid nothing is promised.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strace import classifier
from strace.files import write_beside
from strace.subgraph import MANIFEST

logger = logging.getLogger(__name__)
FOLDER = "routed"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Level(_Record):
    """A risk, and the threshold that keeps it with probability 1 - delta; None where none does."""

    temperature: float
    risk: float = Field(gt=0, lt=1)
    delta: float
    threshold: float | None = Field(ge=0, le=1)
    why: str


class Tested(_Record):
    """A threshold on the calibration prompts. divergence: mean over the requests; bound: what it is at most, with
    probability 1 - delta, for this threshold alone. unverified: share of all tokens."""

    temperature: float
    threshold: float
    documents: int
    divergence: float
    bound: float
    unverified: float


@dataclass(frozen=True)
class Setting:
    """What a certificate is valid for, beside its subgraph: `native` or `torch`, the instruction set of its kernels,
    and the format of the full model."""

    runner: str
    isa: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.runner}-{self.isa}-{self.dtype}".lower().replace(" ", "")

    def path(self, folder: Path) -> Path:
        """The certificate of this setting in a subgraph's folder."""
        return folder / FOLDER / f"{self}.json"


class Certificate(_Record):
    """All that it says.

    subgraph, classifier: SHA-256 of `subgraph.json` and `classifier.json`, which have the hashes of the tensors, the
    base model and the tokenizer. tokens: most tokens of a measured text. run_limit: most tokens emitted unverified in a
    row.
    """

    schema_version: Literal[1] = 1
    class_name: str = Field(alias="class")
    created: str
    subgraph: str
    classifier: str
    runner: str
    isa: str
    dtype: str
    processor: str
    tokens: int = Field(ge=1)
    run_limit: int
    prompts: int
    levels: list[Level]
    tested: list[Tested]

    def find(self, temperature: float, risk: float) -> Level | None:
        """The highest certified level that is not above `risk`."""
        kept = [v for v in self.levels if v.temperature == temperature and v.threshold is not None and v.risk <= risk]
        return max(kept, key=lambda level: level.risk, default=None)

    @property
    def temperatures(self) -> list[float]:
        """Those at which any risk is certified."""
        return sorted({level.temperature for level in self.levels if level.threshold is not None})

    def save(self, folder: Path) -> None:
        """Write it into a subgraph's folder."""
        path = Setting(self.runner, self.isa, self.dtype).path(folder)
        path.parent.mkdir(exist_ok=True)
        write_beside(path, self.model_dump_json(by_alias=True, indent=1) + "\n")


def hash_parts(folder: Path, name: str) -> dict[str, str]:
    """The hashes that a certificate of the class `name`, in a folder of subgraphs, must have."""
    paths = {"subgraph": folder / name / MANIFEST, "classifier": folder / classifier.MANIFEST}
    return {part: hashlib.sha256(path.read_bytes()).hexdigest() for part, path in paths.items()}


def load_certificates(folder: Path, names: Iterable[str], setting: Setting) -> dict[str, Certificate]:
    """The certificates in force, by class. One that is void is left out, with a warning that says why; so is a class
    that has certificates of other settings only."""
    found: dict[str, Certificate] = {}
    elsewhere: dict[str, list[str]] = {}
    for name in names:
        path = setting.path(folder / name)
        if not path.exists():
            if settings := sorted(other.stem for other in path.parent.glob("*.json")):
                elsewhere[name] = settings
            continue
        try:
            certificate = Certificate.model_validate(json.loads(path.read_text(encoding="utf-8")))
            why = find_void(certificate, folder, name, setting)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError) as error:
            why = f"it cannot be read: {error}"
        if why is None:
            found[name] = certificate
        else:
            logger.warning("%s is ignored, routed promises nothing for class %r: %s", path, name, why)
    if elsewhere:
        others = ", ".join(sorted(set().union(*elsewhere.values())))
        logger.warning(
            "routed promises nothing for class %s: served is %s, certified %s; `strace-llm certify` certifies it here",
            ", ".join(map(repr, elsewhere)), setting, others,
        )  # fmt: skip
    return found


def find_void(certificate: Certificate, folder: Path, name: str, setting: Setting) -> str | None:
    """Why a certificate does not hold for what is served, if it does not."""
    if certificate.class_name != name:
        return f"it is of the class {certificate.class_name!r}"
    for part, hash in hash_parts(folder, name).items():
        if getattr(certificate, part) != hash:
            return f"the {part} has been made anew since; run `strace-llm certify` again"
    for part in ("runner", "isa", "dtype"):
        if (own := getattr(certificate, part)) != (served := getattr(setting, part)):
            return f"it was measured with {part} {own}, served is {served}"
    return None
