"""Prompt classes: reading them, one's own or those shipped, and splitting them by source."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

POOLED = "pooled"
RESERVED = frozenset({POOLED, "full", "exact", "routed", "auto", "embedded"})
FEWEST_PROMPTS, FEWEST_SOURCES = 8, 3
SHARES = {"fit": 0.65, "choose": 0.15, "report": 0.2}
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_CONTENTS = ("text", "prompt", "messages")
_FIELDS = frozenset({*_CONTENTS, "class", "source"})

WriteChat = Callable[[list[dict[str, Any]]], str]  # messages as the model's chat template writes them


class BadPrompts(ValueError):
    """Prompts that cannot be used; the message names the file, the line and the reason."""


@dataclass(frozen=True)
class Prompt:
    """A text of a class, the document it was cut from, and the file and line it was read from."""

    text: str
    source: str
    place: str = field(default="", compare=False)


@dataclass
class Parts:
    """A class's prompts by use, no source in two of them: to fit on, to choose by, to report."""

    fit: list[Prompt] = field(default_factory=list)
    choose: list[Prompt] = field(default_factory=list)
    report: list[Prompt] = field(default_factory=list)


def shipped_prompts() -> Path:
    """The folder of class prompts inside the package."""
    return Path(str(files("strace"))) / "prompts"


_Found = dict[str, tuple[str, list[Prompt]]]  # prompts by class, and where they were found


def refuse_chat(messages: list[dict[str, Any]]) -> str:
    """Where no model is at hand to write a conversation."""
    raise BadPrompts("messages need a model with a chat template to be written by")


def read_prompts(
    place: Path, only: Sequence[str] = (), class_name: str | None = None, write_chat: WriteChat = refuse_chat
) -> dict[str, list[Prompt]]:
    """Every class at a place (or those named in `only`), by name. A place is

    - a JSONL file whose lines name their class, or are all of `class_name`;
    - another text file, all of the class `class_name` or of the file's name;
    - a folder with a file (CLASS.jsonl, CLASS.txt) or a subfolder of documents for each class; one named in capitals
      (README.txt, NOTICES.txt) is about the folder, not of it.

    A line of JSON is an object with `text`, `prompt` or `messages`, and optional `class` and `source`. In a text file a
    paragraph is a prompt, or a line where no blank line parts paragraphs. A prompt without a source is its own; a
    repeated text is read once.

    Raises:
        BadPrompts: nothing there, a bad class name, bad JSON, an empty class, too few prompts, a text in two classes.
    """
    if place.is_dir() and class_name is not None:
        raise BadPrompts(f"--class names the class of one file; {place} is a folder, whose files name theirs")
    found = _read_folder(place, only, write_chat) if place.is_dir() else _read_file(place, class_name, write_chat)
    if unknown := sorted(set(only) - set(found)):
        raise BadPrompts(f"{place} has no class {', '.join(unknown)}; it has {', '.join(found) or 'none'}")
    classes = {name: _check_class(*found[name]) for name in found if not only or name in only}
    _refuse_shared_texts(classes)
    return classes


def read_log(place: Path, write_chat: WriteChat = refuse_chat) -> list[Prompt]:
    """Prompts of no class yet, each text once, from a file as `read_prompts` reads it or a folder of such files.

    Raises:
        BadPrompts: nothing there, bad JSON, a line that names a class.
    """
    if not place.exists():
        raise BadPrompts(f"no prompts at {place}")
    prompts: dict[str, Prompt] = {}
    folder = place if place.is_dir() else None
    for path in [place] if folder is None else _list_files(folder):
        for label, prompt in _read_labelled(path, folder, write_chat):
            if label is not None:
                raise BadPrompts(f"{prompt.place}: names the class {label!r}; leave --classes auto out to use it")
            prompts.setdefault(prompt.text, prompt)
    if not prompts:
        raise BadPrompts(f"{place} holds no prompt")
    return list(prompts.values())


def _read_folder(folder: Path, only: Sequence[str], write_chat: WriteChat) -> _Found:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name[0] in "._" or path.stem.isupper() or not (path.is_dir() or path.suffix in (".jsonl", ".txt")):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise BadPrompts(f"{folder} has the class {name} twice: {found[name].name} and {path.name}")
        found[name] = path
    if not found:
        raise BadPrompts(f"{folder} has no CLASS.jsonl, no CLASS.txt and no folder CLASS")
    classes: _Found = {}
    for name, path in found.items():
        check_name(name, str(path))
        prompts: list[Prompt] = []
        classes[name] = str(path), prompts
        documents = path if path.is_dir() else None
        for file in [] if only and name not in only else [path] if documents is None else _list_files(documents):
            for label, prompt in _read_labelled(file, documents, write_chat):
                if label not in (None, name):
                    raise BadPrompts(f"{prompt.place}: names the class {label!r} in a file of the class {name!r}")
                prompts.append(prompt)
    return classes


def _list_files(folder: Path) -> list[Path]:
    """The files of a folder and its folders, hidden ones left out."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [p for p in found if not any(part[0] in "._" for part in p.relative_to(folder).parts)]


def _read_file(path: Path, class_name: str | None, write_chat: WriteChat) -> _Found:
    if not path.is_file():
        raise BadPrompts(f"no prompts at {path}")
    default = class_name if class_name is not None or path.suffix == ".jsonl" else path.stem
    if default is not None:
        check_name(default, str(path))
    classes: _Found = {}
    for label, prompt in _read_labelled(path, None, write_chat):
        name = label if label is not None else default
        if name is None:
            raise BadPrompts(f"{prompt.place}: names no class; say --class NAME, or --classes auto to find classes")
        classes.setdefault(name, (f"{path}, class {name}", []))[1].append(prompt)
    if not classes:
        raise BadPrompts(f"{path} holds no prompt")
    return dict(sorted(classes.items()))


def check_name(name: str, place: str) -> None:
    """Raise BadPrompts, naming the place, for what cannot be the name of a class and of its folder."""
    if name in RESERVED or not NAME.fullmatch(name):
        reason = "is reserved" if name in RESERVED else "is not lower-case letters, digits, - and _"
        raise BadPrompts(f"{place}: the class name {name!r} {reason}")


def _check_class(place: str, found: Sequence[Prompt]) -> list[Prompt]:
    prompts = list({prompt.text: prompt for prompt in found}.values())
    if not prompts:
        raise BadPrompts(f"{place} holds no prompt")
    sources = {prompt.source for prompt in prompts}
    if len(prompts) < FEWEST_PROMPTS or len(sources) < FEWEST_SOURCES:
        raise BadPrompts(
            f"{place} has {len(prompts)} different prompts of {len(sources)} sources; "
            f"fitting and reporting apart needs at least {FEWEST_PROMPTS} of {FEWEST_SOURCES}"
        )
    return prompts


def _read_labelled(path: Path, folder: Path | None, write_chat: WriteChat) -> Iterator[tuple[str | None, Prompt]]:
    """Prompts of a file, each with the class that it names. folder: it is one of this folder's documents, each of which
    is one prompt unless it is JSONL."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompts(f"cannot read {path}: {error}") from error
    if path.suffix == ".jsonl":
        yield from _parse_lines(path, content, write_chat)
    elif folder is None:
        yield from ((None, prompt) for prompt in _parse_text(path, content))
    elif content.strip():
        yield None, Prompt(content.strip("\n"), str(path.relative_to(folder)), str(path))


def _parse_lines(path: Path, content: str, write_chat: WriteChat) -> Iterator[tuple[str | None, Prompt]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadPrompts(f"{place}: not JSON: {error.msg}") from error
        if not isinstance(record, dict) or sum(name in record for name in _CONTENTS) != 1:
            raise BadPrompts(f"{place}: needs an object with one of {', '.join(_CONTENTS)}")
        if unknown := sorted(set(record) - _FIELDS):
            raise BadPrompts(f"{place}: unknown field {', '.join(unknown)}")
        text, source, label = _read_text(record, place, write_chat), record.get("source"), record.get("class")
        if not isinstance(text, str) or not text.strip() or not (source is None or isinstance(source, str)):
            raise BadPrompts(f"{place}: text must be a string that is not empty, source a string")
        if label is not None:
            if not isinstance(label, str):
                raise BadPrompts(f"{place}: class must be a string")
            check_name(label, place)
        yield label, Prompt(text, source or text, place)


def _read_text(record: dict[str, Any], place: str, write_chat: WriteChat) -> Any:
    if "messages" not in record:
        return record.get("text", record.get("prompt"))
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise BadPrompts(f"{place}: messages must be objects with role and content, both strings, at least one")
    try:
        return write_chat(messages)
    except BadPrompts as error:
        raise BadPrompts(f"{place}: {error}") from error


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _parse_text(path: Path, content: str) -> Iterator[Prompt]:
    """Paragraphs, or lines where no blank line parts paragraphs."""
    parted = re.search(r"\n\s*\n", content.strip()) is not None
    for found in re.finditer(r"\S.*?(?=\n\s*\n|\Z)" if parted else r"[^\n]*\S[^\n]*", content, re.DOTALL):
        start = content.rfind("\n", 0, found.start()) + 1  # the first line's indent belongs to it
        text = content[start : found.end()].rstrip("\n")
        if text.strip():
            yield Prompt(text, text, f"{path}:{content.count(chr(10), 0, start) + 1}")


def _refuse_shared_texts(classes: Mapping[str, Sequence[Prompt]]) -> None:
    owner: dict[str, tuple[str, str]] = {}
    for name, prompts in classes.items():
        for prompt in prompts:
            other, place = owner.setdefault(prompt.text, (name, prompt.place))
            if other != name:
                raise BadPrompts(
                    f"the same text is in the classes {other} ({place}) and {name} ({prompt.place}): "
                    f"{prompt.text[:60]!r}"
                )


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
