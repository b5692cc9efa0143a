"""What a model's folder and the flags make of its chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import EngineConfig
from server.load import load_served
from tests.tiny import make_tokenizer, save_tiny

QWEN = "{% if tools %}<tool_call>{% endif %}{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}"
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{% if message.tool_calls %}[TOOL_CALLS]{% endif %}"
LLAMA = """{{ 'Respond in the format {"name": function name, "parameters": dictionary of argument name}' }}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("load") / "tiny")


@pytest.mark.parametrize(
    ("template", "flags", "calls", "thinks"),
    [
        (QWEN, {}, "hermes", True),
        (MISTRAL, {}, "mistral", False),
        (LLAMA, {}, "llama3_json", False),
        ("{{ messages }}", {}, None, False),
        (None, {}, None, False),
        (QWEN, {"tool_parser": "none", "reasoning_parser": "none"}, None, False),
        ("{{ messages }}", {"tool_parser": "llama3_json", "reasoning_parser": "think"}, "llama3_json", True),
    ],
)
def test_parsers(folder: Path, template: str | None, flags: dict[str, str], calls: str | None, thinks: bool) -> None:
    make_tokenizer(template).save_pretrained(folder)
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    served = load_served(EngineConfig(model=str(folder), dtype="fp32", runner="torch", **flags))
    assert (served.calls and served.calls.name, served.thinks) == (calls, thinks)
    served.engine.stop()
