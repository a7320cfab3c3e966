"""What comes with a text and must not be lost where the text is held, cut or taken out."""

from typing import Any

from penstock.core.events import Finished, Text


class Extras:
    """Tokens, logprobs and token ids whose text is held or was a marker: they go with what comes next."""

    __slots__ = ("logprobs", "token_ids", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.logprobs: list[Any] | None = None
        self.token_ids: list[int] | None = None

    def keep(self, item: Text) -> None:
        self.tokens += item.tokens
        if item.logprobs is not None:
            self.logprobs = (self.logprobs or []) + item.logprobs
        if item.token_ids is not None:
            self.token_ids = (self.token_ids or []) + item.token_ids

    def take_tokens(self) -> int:
        tokens, self.tokens = self.tokens, 0
        return tokens

    def forget(self) -> None:
        """Of hidden text no trace is left to read in what comes next; its tokens were counted."""
        self.logprobs = self.token_ids = None

    def give(self, item: Text | Finished) -> None:
        item.tokens += self.tokens
        self.tokens = 0
        if self.logprobs is not None:
            item.logprobs, self.logprobs = self.logprobs + (item.logprobs or []), None
        if self.token_ids is not None:
            item.token_ids, self.token_ids = self.token_ids + (item.token_ids or []), None
