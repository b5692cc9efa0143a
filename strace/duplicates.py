"""Prompts that say again what a prompt of an earlier use said: measured on them, a fit would look better than it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strace.classes import SHARES, Parts, Prompt

WORDS = 8  # of a run that two texts share by more than chance
MOST = 0.5  # share of such runs that an earlier use may hold


@dataclass(frozen=True)
class Distinct:
    """The parts without repeats, and how many prompts were left out of each."""

    parts: Parts
    repeats: dict[str, int]


def drop_repeats(parts: Parts) -> Distinct:
    """Leave out of each use the prompts of which earlier uses (fit, choose, report) hold more than half of the runs of
    eight words; sources that differ do not make a text another."""
    seen: set[tuple[str, ...]] = set()
    left: dict[str, list[Prompt]] = {}
    for use in SHARES:
        prompts: Sequence[Prompt] = getattr(parts, use)
        runs = [_list_runs(prompt.text) for prompt in prompts]
        left[use] = [p for p, own in zip(prompts, runs, strict=True) if len(own & seen) <= MOST * len(own)]
        seen |= set().union(*runs)
    repeats = {use: len(getattr(parts, use)) - len(kept) for use, kept in left.items()}
    return Distinct(Parts(**left), repeats)


def _list_runs(text: str) -> set[tuple[str, ...]]:
    """Runs of words, case and spacing aside; all of a shorter text is one."""
    words = text.lower().split()
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
