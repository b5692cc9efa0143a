"""The worker: one thread for all, exceptions handed over; a served model is loaded in the thread that runs it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import server.load
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.worker import Worker
from tests.tiny import save_tiny


def test_one_thread_for_all_tasks() -> None:
    worker = Worker()
    threads = {worker.submit(threading.get_ident).result(10) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_exception_reaches_the_caller_and_the_next_task_runs() -> None:
    worker = Worker()
    failing = worker.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    assert worker.submit(lambda: 7).result(10) == 7


def test_a_model_is_loaded_in_the_thread_that_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded in another thread it would decode at a third of its speed (see the module)."""
    threads: list[int] = []

    def build(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return build_engine(*arguments, **options)

    def loop(engine: Engine) -> None:
        threads.append(threading.get_ident())

    monkeypatch.setattr(server.load, "build_engine", build)
    monkeypatch.setattr(Engine, "_loop", loop)
    served = server.load.load_served(EngineConfig(model=str(save_tiny(tmp_path / "tiny"))))
    served.engine.start()
    served.engine.stop()
    assert len(threads) == 2
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
