"""From tokens to text, one token at a time: whole characters only, cut before the first stop string."""

from __future__ import annotations

import copy

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT = 8  # prompt tokens that tell the decoder whether a leading space belongs to the text


class Text:
    """The text of one continuation as far as it can be shown.

    What could still become a stop string is held back, and so are the bytes of an unfinished character, which are
    dropped when the text ends in them. Text is looked at token by token, so what it becomes does not depend on how
    tokens arrive. What completes a stop string within the first `least` tokens is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stop: tuple[str, ...] = (),
        specials: bool = False,
        least: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        before = prompt[-_CONTEXT:]
        # Behind an unfinished character the decoder would give the prompt's end out again.
        whole = not tokenizer.decode(before).endswith("\ufffd")
        self._stream = DecodeStream(ids=before if whole else [], skip_special_tokens=not specials)
        self._stop, self._least = stop, least
        self._shown = ""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Add one token; True when it completed a stop string, which with all after it is then cut off."""
        piece = self._stream.step(self._tokenizer, token) or ""
        self._least -= 1
        if not self._stop:
            self._shown += piece
            return False
        known = len(self._held)
        self._held += piece
        # What was complete before may have been passed over, so only what this token completes counts.
        found = [start for stop in self._stop if (start := self._held.find(stop, max(0, known - len(stop) + 1))) >= 0]
        found = found if self._least < 0 else []
        if found:
            self._shown, self._held, self.stopped = self._shown + self._held[: min(found)], "", True
            return True
        safe = len(self._held) - self._risky()
        self._shown, self._held = self._shown + self._held[:safe], self._held[safe:]
        return False

    def completes_stop(self, token: int) -> bool:
        """Whether `token`, were it next, would complete a stop string."""
        if not self._stop:
            return False
        trial = copy.copy(self)
        trial._stream = copy.copy(self._stream)
        return trial.push(token)

    def take(self, final: bool = False) -> str:
        """What became showable since the last call; at the end also what was held back in vain."""
        text = self._shown + (self._held if final else "")
        self._shown = ""
        return text

    def _risky(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
