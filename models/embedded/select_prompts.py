"""Cut short prompts of every class from one part of the corpus, spread over as many sources as there are.

Dialogues and problems give their opening; code, facts and stories give pieces from anywhere in the document.
The result depends on the corpus and the options only.

Examples:
  python models/embedded/select_prompts.py ../shared/corpus --part calib -o strace/prompts
  python models/embedded/select_prompts.py ../shared/corpus --part valid --units 50 -o benchmarks/prompts
  python models/embedded/select_prompts.py ../shared/corpus --part valid --units 24 --without benchmarks/prompts \
    -o benchmarks/unused
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from corpus import MIXTURE

LONGEST, SHORTEST = 1500, 300  # characters of a piece
OPENINGS_ONLY = ("chat", "math")
BORDERS = ("\n\n", "\n", ". ", " ")


def split(text: str) -> Iterator[str]:
    """Consecutive pieces of at most LONGEST characters, each cut at the best border in its second half."""
    while len(text) > LONGEST:
        places = (text.rfind(border, LONGEST // 2, LONGEST) + len(border) for border in BORDERS)
        cut = next((place for place in places if place > LONGEST // 2), LONGEST)
        yield text[:cut]
        text = text[cut:]
    yield text


def read_pieces(path: Path, openings_only: bool, rng: random.Random) -> dict[str, list[str]]:
    """The pieces of every source, in random order."""
    pieces: dict[str, list[str]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for unit in map(json.loads, lines):
            parts = list(split(unit["text"]))
            kept = parts[:1] if openings_only else [p for p in parts if len(p.strip()) >= SHORTEST] or parts[:1]
            pieces[unit["source"]] += [piece.strip("\n").rstrip() for piece in kept]
    for of_source in pieces.values():
        rng.shuffle(of_source)
    return pieces


def deal(pieces: dict[str, list[str]], rng: random.Random) -> Iterator[dict[str, str]]:
    """One piece of every source, then a second one of every source that has it, and so on; no text twice."""
    sources, seen = sorted(pieces), set()
    rng.shuffle(sources)
    for turn in range(max(map(len, pieces.values()))):
        for source in sources:
            if turn < len(pieces[source]) and (text := pieces[source][turn]) not in seen:
                seen.add(text)
                yield {"source": source, "text": text}


def read_prompts(path: Path) -> list[dict[str, str]]:
    """What an earlier run chose."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def select(
    path: Path, openings_only: bool, units: int, size: int, without: Sequence[dict[str, str]] = ()
) -> list[dict[str, str]]:
    """At most `units` prompts whose texts are at most `size` UTF-8 bytes together, none of `without`; sources of which
    it has none come first."""
    rng = random.Random(0)
    chosen: list[dict[str, str]] = []
    sources, texts = {p["source"] for p in without}, {p["text"] for p in without}
    dealt = [p for p in deal(read_pieces(path, openings_only, rng), rng) if p["text"] not in texts]
    for prompt in sorted(dealt, key=lambda p: p["source"] in sources):
        size -= len(prompt["text"].encode())
        if size < 0 or len(chosen) == units:
            break
        chosen.append(prompt)
    return chosen


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of CLASS.PART.jsonl files")
    parser.add_argument("--part", required=True, help="part to cut from")
    parser.add_argument("--units", type=int, default=250, help="prompts of a class at most (default %(default)s)")
    parser.add_argument("--bytes", type=int, default=250_000, help="bytes of a class at most (default %(default)s)")
    parser.add_argument("--without", type=Path, help="folder of CLASS.jsonl whose texts are left out")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for CLASS.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in sorted(MIXTURE):
        path = arguments.corpus / f"{name}.{arguments.part}.jsonl"
        known = read_prompts(arguments.without / f"{name}.jsonl") if arguments.without else []
        prompts = select(path, name in OPENINGS_ONLY, arguments.units, arguments.bytes, known)
        lines = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
        (arguments.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(
            f"{name}: {len(prompts)} prompts of {len({p['source'] for p in prompts})} sources, {len(lines)} characters"
        )


if __name__ == "__main__":
    main()
