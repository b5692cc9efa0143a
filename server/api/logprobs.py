"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.api.protocol import ChatLogprobs, CompletionLogprobs, Logprob, TokenLogprobs
from server.engine.logprobs import TokenLogprob

_BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def _logprob(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> Logprob:
    name = _name(tokenizer, token)
    spelt = _spell(str(tokenizer.convert_ids_to_tokens(token))) if "\ufffd" in name else list(name.encode())
    return Logprob(token=name, logprob=logprob, bytes=spelt)


def _spell(symbol: str) -> list[int] | None:
    """The bytes of a token that is no whole text, from its entry in the vocabulary: byte-level, or byte fallback."""
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", symbol):
        return [int(fallback[1], 16)]
    return [_BYTES[s] for s in symbol] if all(s in _BYTES for s in symbol) else None


def tell_chat(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """As chat completions have them."""
    return ChatLogprobs(
        content=[
            TokenLogprobs(
                **_logprob(tokenizer, told.token, told.logprob).model_dump(),
                top_logprobs=[_logprob(tokenizer, token, logprob) for token, logprob in told.best],
            )
            for told in tokens
        ]
    )


def tell_completion(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[TokenLogprob | int], offset: int = 0
) -> CompletionLogprobs:
    """As completions have them; of a prompt's first token, given as its id, nothing is known. offset: where in the
    choice's text the first token begins."""
    told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for each in tokens:
        name = _name(tokenizer, each if isinstance(each, int) else each.token)
        told.tokens.append(name)
        told.text_offset.append(offset)
        offset += len(name)
        if isinstance(each, int):
            told.token_logprobs.append(None)
            told.top_logprobs.append(None)
        else:
            told.token_logprobs.append(each.logprob)
            told.top_logprobs.append({_name(tokenizer, token): logprob for token, logprob in reversed(each.best)})
    return told
