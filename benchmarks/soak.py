"""Many users for a long time: mixed requests over HTTP, clients that hang up, requests that make no sense.

At the end the server must be as it was: no request runs or waits, no block of the KV cache is held, no file or thread
is open that was not, memory does not grow; every text has ended exactly once, and the same seeded question has had the
same answer all the time. Ends with status 1 where that is not so. This is no measurement of speed: it may run beside
other work, and be stopped and continued as a whole (SIGSTOP); only the time that it runs counts.

Examples:
  python benchmarks/soak.py --minutes 60
  python benchmarks/soak.py --minutes 3 --users 24 --pause 0.2 --kv-memory 8MiB
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import describe, finish, read_prompts
from servers import start_ours

from strace.checkpoint import EMBEDDED

CLASSES = ("chat", "code", "facts", "math", "stories")
MODES = ("auto", "exact", "routed", "full")
EVERY = 2.0  # seconds between two looks at the process
PATIENCE = 3600.0  # seconds that may pass while all of this is stopped
GROWTH = 0.02  # of the memory, from the second quarter of the time to the last: more is a leak
BAD: tuple[dict[str, Any] | bytes, ...] = (
    b"{",
    b"[]",
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x " * 20_000},
    {"prompt": [10**9]},
    {"prompt": "x", "max_tokens": 10**6},
    {"prompt": "x", "model": "nobody"},
    {"prompt": "x", "frobnicate": 1},
    {"prompt": "", "max_tokens": 4},
)


@dataclass
class Tally:
    """What the users saw. texts: finished ones, read to their ends; left: texts of requests that were given up."""

    requests: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)
    answers: dict[str, set[str]] = field(default_factory=dict)


@dataclass
class Looks:
    """What the process held over time: seconds that it ran, bytes of memory, open files, threads."""

    ran: float = 0.0
    last: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def take(self, pid: int) -> None:
        folder, now = Path(f"/proc/{pid}"), time.monotonic()
        self.ran, self.last = self.ran + min(now - self.last, 2 * EVERY), now
        self.seconds.append(self.ran)
        self.memory.append(int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(list((folder / "fd").iterdir())))
        self.threads.append(len(list((folder / "task").iterdir())))

    def growth(self) -> float:
        """Memory's mean over the last quarter against that over the second, less 1."""
        quarter = max(1, len(self.memory) // 4)
        return float(np.mean(self.memory[-quarter:]) / np.mean(self.memory[quarter : 2 * quarter]) - 1)

    def slope(self) -> float:
        """MiB per hour by a line through the last three quarters."""
        start = len(self.memory) // 4
        return float(np.polyfit(self.seconds[start:], self.memory[start:], 1)[0]) * 3600 / 2**20


class User:
    """One of many, with dice of its own."""

    def __init__(self, number: int, client: httpx.AsyncClient, texts: list[str], tally: Tally) -> None:
        self.dice = random.Random(number)
        self.client, self.texts, self.tally = client, texts, tally

    async def work(self, looks: Looks, seconds: float, pause: float) -> None:
        """Ask, wait for `pause` seconds on average, and so on."""
        while looks.ran < seconds:
            kind = self.dice.choices(("stream", "whole", "leave", "bad", "same"), (4, 3, 2, 1, 1))[0]
            try:
                await getattr(self, kind)()
            except httpx.HTTPError as error:
                self.tally.faults.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
            self.tally.requests[kind] += 1
            await asyncio.sleep(self.dice.expovariate(1 / pause))

    def make(self) -> dict[str, Any]:
        """A request; many begin with one of a few beginnings."""
        dice = self.dice
        text = dice.choice(self.texts)
        prompt = (
            dice.choice(self.texts[:4])[:600] + text[:200] if dice.random() < 0.5 else text[: dice.randint(1, 1200)]
        )
        body = {
            "prompt": prompt,
            "max_tokens": dice.randint(1, 120),
            "temperature": dice.choice((0, 0.7, 1)),
            "n": dice.choice((1, 1, 1, 3)),
            "strace": {"mode": dice.choice(MODES)},
        }
        more: list[dict[str, Any]] = [{}, {}, {"seed": dice.randint(0, 99)}, {"logprobs": 2}, {"stop": ["\n\n", "the"]}]
        more.append({"structured_outputs": {"regex": f"[a-z ]{{5,{dice.randint(6, 60)}}}"}})
        return body | dice.choice(more) | dice.choice(({}, {}, {"frequency_penalty": 0.5}))

    async def whole(self) -> None:
        body = self.make()
        response = await self.client.post("/v1/completions", json=self.named(body))
        if self.accepted(response.status_code, response.text, body["n"]):
            choices = response.json()["choices"]
            self.note(len(choices) == body["n"], f"{len(choices)} answers of {body['n']}")
            self.note(all(c["finish_reason"] in ("stop", "length") for c in choices), "an answer without an end")
            self.tally.texts += len(choices)

    async def stream(self) -> None:
        body = self.make()
        async with self.open(body) as response:
            text = "" if response.status_code == 200 else await read(response)
            if not self.accepted(response.status_code, text, body["n"]):
                return
            ends: Counter[int] = Counter()
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
        self.note(lines[-1] == "[DONE]" and lines.count("[DONE]") == 1, f"a stream ended with {lines[-1][:200]}")
        for line in lines[:-1]:
            event = json.loads(line)
            self.note("error" not in event, f"a stream broke: {line[:300]}")
            ends.update(c["index"] for c in event.get("choices", ()) if c["finish_reason"])
        self.note(ends == dict.fromkeys(range(body["n"]), 1), f"texts ended {dict(ends)} times")
        self.tally.texts += ends.total()

    async def leave(self) -> None:
        """Hang up: before the answer, or in the middle of a stream."""
        body = self.make() | {"max_tokens": 200}
        self.tally.left += body["n"]
        if self.dice.random() < 0.5:
            try:
                async with asyncio.timeout(self.dice.uniform(0.01, 1)):
                    await self.client.post("/v1/completions", json=self.named(body))
            except TimeoutError:
                pass
            return
        async with self.open(body) as response:
            left = self.dice.randint(0, 20)
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break

    async def bad(self) -> None:
        body = self.dice.choice(BAD)
        content = body if isinstance(body, bytes) else json.dumps({"model": "soak"} | body).encode()
        response = await self.client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        self.note(400 <= response.status_code < 500, f"{content[:60]!r} got {response.status_code}")

    async def same(self) -> None:
        """A seeded question that many ask: the answer must not depend on what else runs."""
        question = self.dice.randrange(4)
        body = {"prompt": self.texts[question][:300], "max_tokens": 40, "seed": 7, "temperature": 1}
        mode = self.dice.choice(("exact", "full"))
        response = await self.client.post("/v1/completions", json=self.named(body | {"strace": {"mode": mode}}))
        if self.accepted(response.status_code, response.text):
            self.tally.texts += 1
            self.tally.answers.setdefault(f"question {question}", set()).add(response.json()["choices"][0]["text"])

    def open(self, body: dict[str, Any]) -> Any:
        return self.client.stream("POST", "/v1/completions", json=self.named(body) | {"stream": True})

    @staticmethod
    def named(body: dict[str, Any]) -> dict[str, Any]:
        return {"model": "soak"} | body

    def accepted(self, status: int, text: str, answers: int = 1) -> bool:
        """Whether a good request was; a full queue is no fault, and may have taken all answers but the last."""
        if status == 429:
            self.tally.requests["refused"] += 1
            self.tally.left += answers - 1
        else:
            self.note(status == 200, f"a good request got {status}: {text[:200]}")
        return status == 200

    def note(self, well: bool, fault: str) -> None:
        if not well:
            self.tally.faults.append(fault)


async def read(response: httpx.Response) -> str:
    """The body of a streamed response that is an error."""
    return (await response.aread()).decode()


async def watch(pid: int, looks: Looks, seconds: float) -> None:
    """Look at the process now and then, until it has run for so long."""
    while looks.ran < seconds:
        looks.take(pid)
        await asyncio.sleep(EVERY)


async def at_rest(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's own figures once nothing runs any more, or after ten seconds."""
    for _ in range(100):
        figures = read_metrics((await client.get("/metrics")).text)
        if not figures["requests_running"] and not figures["requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    return figures


def read_metrics(text: str) -> dict[str, float]:
    """Sums over all labels, and `ended_REASON` of requests_total, `held_hit` of prefix_tokens_total."""
    figures: Counter[str] = Counter()
    for name, labels, value in re.findall(r"^strace_llm_(\w+)(\{.*\})? (\S+)$", text, re.MULTILINE):
        figures[name] += float(value)
        if name == "requests_total" and (reason := re.search(r'finish_reason="(\w+)"', labels)):
            figures[f"ended_{reason[1]}"] += float(value)
        if name == "prefix_tokens_total" and 'outcome="hit"' in labels:
            figures["held_hit"] += float(value)
    return figures


async def soak(
    address: str, pid: int, users: int, seconds: float, pause: float
) -> tuple[Tally, Looks, dict[str, float]]:
    """All users at once; what they saw, what the process held, what the server says at rest."""
    texts = [text for name in CLASSES for text in read_prompts(name, 20)]
    random.Random(0).shuffle(texts)
    tally, looks = Tally(), Looks()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:
        work = [User(number, client, texts, tally).work(looks, seconds, pause) for number in range(users)]
        await asyncio.gather(watch(pid, looks, seconds), *work)
        figures = await at_rest(client)
    await asyncio.sleep(EVERY)
    looks.take(pid)
    return tally, looks, figures


def judge(tally: Tally, looks: Looks, figures: dict[str, float]) -> dict[str, str]:
    """What is not as it should be, by its name."""
    ended = figures["requests_total"]
    bounds = (tally.texts, tally.texts + tally.left)
    found = {
        "faults": "; ".join(tally.faults[:5]),
        "requests left": f"{figures['requests_running'] + figures['requests_waiting']:g}",
        "blocks left": f"{figures['kv_cache_usage_ratio']:g}",
        "files left": str(max(0, looks.files[-1] - looks.files[0])),
        "threads left": str(max(0, looks.threads[-1] - max(looks.threads[: max(1, len(looks.threads) // 4)]))),
        "failed": f"{figures.get('ended_error', 0):g}",
        "ended twice or never": "" if bounds[0] <= ended <= bounds[1] else f"{ended:g}, not within {bounds}",
        "memory": "" if looks.growth() <= GROWTH else f"{looks.growth():.1%} more",
        "answers differ": ", ".join(question for question, texts in tally.answers.items() if len(texts) > 1),
    }
    return {name: told for name, told in found.items() if told not in ("", "0")}


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--minutes", type=float, default=60, help="that it runs")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds of a user between two requests")
    parser.add_argument("--kv-memory", default="12MiB", help="small, so that texts lose their blocks to each other")
    arguments = parser.parse_args()
    flags = {"kv-memory": arguments.kv_memory, "served-model-name": "soak", "max-queue": max(3, arguments.users // 2)}
    flags |= {"step-timeout": PATIENCE, "drain-timeout": PATIENCE}
    with start_ours(arguments.model, flags) as (address, server):
        seconds = 60 * arguments.minutes
        tally, looks, figures = asyncio.run(soak(address, server.pid, arguments.users, seconds, arguments.pause))
        server.send_signal(signal.SIGTERM)
        status = server.wait(PATIENCE)
    wrong = judge(tally, looks, figures) | ({} if status == 0 else {"exit status": str(status)})
    finish(
        {
            "benchmark": "soak",
            "model": arguments.model,
            **describe(),
            "minutes": arguments.minutes,
            "users": arguments.users,
            "pause": arguments.pause,
            "kv_memory": arguments.kv_memory,
            "requests": dict(tally.requests),
            "texts_read_to_the_end": tally.texts,
            "texts_ended": {name: int(n) for name, n in figures.items() if name.startswith("ended_")},
            "prompt_tokens": int(figures["prefix_tokens_total"]),
            "prompt_tokens_held": int(figures["held_hit"]),
            "preemptions": int(figures["preemptions_total"]),
            "memory_mib": [round(looks.memory[i] / 2**20, 1) for i in (0, len(looks.memory) // 4, -1)],
            "memory_growth": round(looks.growth(), 4),
            "memory_mib_per_hour": round(looks.slope(), 2),
            "server_files": [looks.files[0], looks.files[-1]],
            "server_threads": [looks.threads[0], looks.threads[-1]],
            "wrong": wrong,
        }
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
