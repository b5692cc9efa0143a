"""What a model's chat template writes: whole conversations, and what stands around a user's turn."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from strace.checkpoint import Checkpoint
from strace.classes import BadPrompts
from strace.classifier import Frame


def write_chat(checkpoint: Checkpoint, messages: list[dict[str, Any]]) -> str:
    """A conversation as the model's chat template writes it, up to the answer where a user has the last word.

    Raises:
        BadPrompts: if there is no template or it refuses the messages.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template is None:
        raise BadPrompts(f"messages need a chat template, and {checkpoint.model} has none")
    ask = messages[-1]["role"] != "assistant"
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise BadPrompts(f"the chat template refuses the messages: {error}") from error
    bos = tokenizer.bos_token
    twice = bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if twice else text


def read_frame(checkpoint: Checkpoint) -> Frame:
    """What the chat template puts around a user's turn; nothing where there is none."""
    tokenizer, mark = checkpoint.tokenizer, "Zq7"
    if tokenizer.chat_template is None:
        return Frame()
    turn = [{"role": "user", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # it wants more than one turn of a user
        return Frame()
    before, found, after = str(text).rpartition(mark)
    if not found:
        return Frame()
    ids = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
    return Frame(*(tuple(part) for part in ids))
