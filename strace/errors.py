"""How a command ends when something is wrong: one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say what is wrong and exit."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def told() -> Iterator[None]:
    """Ends with `fail` for what a user can put right. Every error of this package that says so is a ValueError."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
