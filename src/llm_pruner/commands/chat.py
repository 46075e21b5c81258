"""Conversations with one model, or with two that are asked the same."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from llm_pruner.errors import UserError
from llm_pruner.evaluation.samples import (
    decoded,
    encoded,
    encoded_chat,
    end_ids,
    has_template,
    strip_control,
    write,
)
from llm_pruner.models.forward import Decoder, maximum_length
from llm_pruner.models.load import LoadedModel, check, load
from llm_pruner.settings.chat import ChatSettings


@dataclass(frozen=True)
class Answer:
    """What a model has written so far.

    Attributes:
        first: seconds to the first token, in which the question is read.
        seconds: for the other tokens, without those of another model that answers in turns.
    """

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; None where there is no other."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else None


@dataclass(frozen=True)
class Turn:
    """A question, and the answer of each model by its name."""

    question: str
    answers: dict[str, Answer]


class Conversation:
    """A model, and what it was told and has said.

    With a chat template the lines are messages of a user. Without one they and the answers make up
    a text that the model continues. What was read stays in the cache, so a question takes the time
    of its own tokens.
    """

    def __init__(self, loaded: LoadedModel, name: str, settings: ChatSettings) -> None:
        self.name = name
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._settings = settings
        self._chats = has_template(loaded.tokenizer)
        self._ends = end_ids(loaded.model, loaded.tokenizer)
        self._longest = maximum_length(loaded.model)
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self._said: list[str] = []  # by the user and the model in turns
        self._decoder = _Reader(self._model)
        self._chance = torch.Generator().manual_seed(self._settings.seed)

    def ask(self, line: str) -> Generator[Answer]:
        """Yield the answer as it grows; one that is broken off stays as far as it went.

        Raises UserError: it is too long, its logits are not finite, or its chat template fails.
        """
        given = self._encoded(line)
        room = self._settings.new_tokens
        if self._longest is not None:
            room = min(room, self._longest - len(given))
        if room < 1:
            raise UserError(
                f"the conversation has {len(given):,} tokens and {self.name} reads "
                f"{self._longest:,}; begin another one with /new"
            )
        unread = self._unread(given)
        tokens = write(self._decoder, unread, room, self._ends, self._choose)
        written: list[int] = []
        text, first, seconds = "", 0.0, 0.0
        begin = time.perf_counter()
        try:
            for token in tokens:
                spent = time.perf_counter() - begin
                first, seconds = (first, seconds + spent) if written else (spent, 0.0)
                written.append(token)
                text = decoded(self._tokenizer, given, written, chat=self._chats)
                answer = Answer(strip_control(text), len(written), first, seconds)
                yield answer
                begin = time.perf_counter()
        finally:
            self._said += [line, text]  # as it was written: tokens of it are read already

    def _encoded(self, line: str) -> list[int]:
        if self._chats:
            return encoded_chat(self._tokenizer, [*self._said, line])
        pairs = zip(self._said[::2], self._said[1::2], strict=True)
        text = "".join(f"{told}{said}\n" for told, said in pairs)
        return encoded(self._tokenizer, text + line, chat=False)

    def _unread(self, given: list[int]) -> list[int]:
        """Return what of a text is not in the cache; a cache of another text is thrown away."""
        read = self._decoder.read
        if read and given[: len(read)] == read and len(given) > len(read):
            return given[len(read) :]
        self._decoder = _Reader(self._model)
        return given

    def _choose(self, logits: torch.Tensor) -> int:
        if self._settings.temperature == 0:
            return int(logits.argmax())
        shares = (logits / self._settings.temperature).softmax(dim=-1)
        return int(shares.multinomial(1, generator=self._chance))


class _Reader(Decoder):
    """The same, which knows what its cache has ``read``: nothing where reading was broken off."""

    def __init__(self, model: object) -> None:
        super().__init__(model)
        self.read: list[int] = []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        read, self.read = [*self.read, *tokens[0].tolist()], []
        logits = super().step(tokens)
        self.read = read
        return logits


def begun(settings: ChatSettings) -> list[Conversation]:
    """Load the models and return a conversation with each; UserError, early, if one cannot be."""
    models = [settings.loading()]
    if settings.against is not None:
        models.append(settings.loading(settings.against))
    for model in models:
        check(model, packed=True)
    found = [load(model, packed=True) for model in models]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        names = [model.model for model in models]
    return [Conversation(one, name, settings) for one, name in zip(found, names, strict=True)]


def ask(conversations: Sequence[Conversation], line: str) -> Iterator[Turn]:
    """Yield the answers as they grow, a token of each model in turns; see ``Conversation.ask``."""
    turn = Turn(line, {one.name: Answer() for one in conversations})
    growing = [one.ask(line) for one in conversations]
    yield turn
    try:
        for grown in zip_longest(*growing):
            latest = zip(turn.answers.items(), grown, strict=True)
            turn = Turn(line, {name: new or old for (name, old), new in latest})
            yield turn
    finally:
        for one in growing:
            one.close()
