"""Chats that a model writes, both the questions and the answers (arXiv 2406.08464)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from llm_pruner.data.sequences import bare_ids, render_chat
from llm_pruner.errors import UserError

QUESTION = 128
"""Tokens of a question at most, and a quarter of a chat; what is longer is cut off and answered."""
_SAID = ("Alpha", "Beta", "Gamma")


class Turns:
    """The tokens that a chat template puts before a question (``opening``) and between turns.

    ``ends`` are the special tokens that end a question or an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("source 'chat' needs a chat template, and the tokenizer has none")
        roles = ("user", "assistant", "user")
        chat = [{"role": r, "content": said} for r, said in zip(roles, _SAID, strict=True)]
        asked, talked = render_chat(tokenizer, chat[:1], True), render_chat(tokenizer, chat, True)
        before, _, answering = asked.partition(_SAID[0])
        _, _, asking = talked.partition(_SAID[1])
        asking = asking.partition(_SAID[2])[0]
        self.opening = torch.tensor(bare_ids(tokenizer, before), dtype=torch.int64, device="cpu")
        self._parts = [bare_ids(tokenizer, text) for text in (answering, asking)]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        if not (len(self.opening) and all(part and part[0] in special for part in self._parts)):
            raise UserError("source 'chat' needs a chat template with special tokens after turns")
        self.ends = {part[0] for part in self._parts}

    def start(self, count: int, tokens: int) -> None:
        """Begin ``count`` chats of so many tokens."""
        self._longest = min(QUESTION, tokens // 4)
        self._forced: list[deque[int]] = [deque() for _ in range(count)]
        self._answering, self._said = [False] * count, [0] * count

    def follow(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return the next token of each chat, (chats,): the one drawn, or what must stand there."""
        return torch.tensor(
            [self._next(row, token) for row, token in enumerate(drawn.tolist())], device="cpu"
        )

    def _next(self, row: int, token: int) -> int:
        forced = self._forced[row]
        if not forced:
            self._said[row] += 1
            answering = self._answering[row]
            if token not in self.ends and (answering or self._said[row] <= self._longest):
                return int(token)
            forced.extend(self._parts[answering])
            self._answering[row], self._said[row] = not answering, 0
        return forced.popleft()
