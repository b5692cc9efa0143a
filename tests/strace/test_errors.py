"""How commands end: one line, the right exit code, no traceback."""

from __future__ import annotations

import pytest
import typer

from strace.errors import FAILED, INTERRUPTED, WRONG_USAGE, fail, told


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), FAILED, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), FAILED, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), INTERRUPTED, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_put_right_is_told_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, told():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr() == ("", line)


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(KeyError), told():
        raise KeyError("x")


def test_a_code_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, told():
        fail("so", WRONG_USAGE)
    assert ended.value.exit_code == WRONG_USAGE
    assert capsys.readouterr().err == "error: so\n"
