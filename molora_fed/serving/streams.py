"""Tokens that become text while they are written: whole characters, nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_CONTEXT = 8
"""Tokens of what came before that are decoded again: a token's text may depend on them."""
_WINDOW = 32
"""Tokens decoded at most, where the text allows it."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of the tokens of one generation, piece by piece.

    A piece is handed out when it cannot change any more: a character that is spread over tokens
    waits for the last of them, and what may be the beginning of a stop string for the next text.

    Attributes:
        text: All that was handed out.
        is_stopped: Whether a stop string came; what follows it, and itself, is never handed out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Begin after a prompt.

        Args:
            tokenizer: Of the base.
            prompt: Its ids; the text goes on from it.
            stop: Strings that end the text, none of them empty.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt[-_CONTEXT:])
        self._taken = len(self._decode())
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Add a token.

        Returns:
            The text that it made certain; often empty.
        """
        self._window.append(token)
        decoded = self._decode()
        is_whole = not decoded.endswith(_BROKEN)
        certain = decoded if is_whole else decoded[:-1]
        self._held += certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        if is_whole and len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._taken = len(self._decode())
        return self._hand_out()

    def end(self) -> str:
        """The rest, when no token follows."""
        if not self.is_stopped:
            self._held += self._decode()[self._taken :]
        return self._hand_out(is_last=True)

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _hand_out(self, *, is_last: bool = False) -> str:
        if self.is_stopped:
            return ""
        places = [(self._held.find(stop), len(stop)) for stop in self._stop]
        found = [(at + length, at) for at, length in places if at >= 0]
        if found:
            # The first that is complete, the longest of equals: whatever the tokens are.
            (_, certain), self.is_stopped = min(found), True
        else:
            certain = len(self._held) if is_last else len(self._held) - self._count_open()
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece

    def _count_open(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stop):
                return count
        return 0
