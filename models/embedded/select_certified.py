"""Cut the prompts that the embedded model's subgraphs are certified on: one of every document of the calibration part
that tracing neither fitted nor chose on.

These are all sources that `strace/prompts` does not hold, and of those it holds the ones that the trace only reported
on. Classes with too few such sources are left out. The result depends on the corpus and the options only.

Example:
  python models/embedded/select_certified.py ../shared/corpus -o models/embedded/certify
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus import MIXTURE
from select_prompts import OPENINGS_ONLY, select
from strace.classes import FEWEST_PROMPTS, FEWEST_SOURCES, read_prompts, shipped_prompts, split_classes
from strace.duplicates import drop_repeats


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of CLASS.PART.jsonl files")
    parser.add_argument("--part", default="calib", help="part to cut from (default %(default)s)")
    parser.add_argument("--units", type=int, default=400, help="prompts of a class at most (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for CLASS.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    split = split_classes(read_prompts(shipped_prompts()))
    for name in sorted(MIXTURE):
        seen = {p.source for use in ("fit", "choose") for p in getattr(drop_repeats(split[name]).parts, use)}
        path = arguments.corpus / f"{name}.{arguments.part}.jsonl"
        dealt = select(path, name in OPENINGS_ONLY, 10**9, 10**9)
        by_source: dict[str, dict[str, str]] = {}
        for prompt in dealt:
            if prompt["source"] not in seen:
                by_source.setdefault(prompt["source"], prompt)
        prompts = list(by_source.values())[: arguments.units]
        if len(prompts) < max(FEWEST_PROMPTS, FEWEST_SOURCES):
            print(f"{name}: {len(prompts)} documents, too few")
            continue
        lines = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
        (arguments.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(prompts)} documents, {len(lines)} characters")


if __name__ == "__main__":
    main()
