# SPDX-License-Identifier: Apache-2.0
"""A language model as it is served: an engine, a tokenizer and a template under a name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from batiste.graph.errors import ArgumentError

from .engine import Engine
from .errors import RequestError
from .requests import Ask
from .templates import JinjaTemplate, Message, Template, template_of
from .text import Tokenizer, divided, encoded


class LanguageModel:
    """What answers under a name.

    Args:
        name: by which clients ask for it.
        engine: runs the model; its vocabulary holds the tokenizer's.
        tokenizer: text to tokens and back; see `batiste.serve.chat.text.Tokenizer`.
        template: of conversations; if left out, the one that the special tokens hint at.
        ends: tokens that end an answer, besides those of the template.
        begin: tokens before every prompt that is plain text.
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer, *,
                 template: Template | JinjaTemplate | None = None, ends: Iterable[int] = (),
                 begin: Sequence[int] = ()):  # fmt: skip
        self.name, self.engine, self.tokenizer, self.begin = name, engine, tokenizer, list(begin)
        self.template = template or template_of(None, tokenizer.specials)
        self.ends = frozenset(ends) | self.template.ends(tokenizer)
        self.created = int(time.time())
        self._most_characters = engine.length * getattr(tokenizer, "longest", math.inf)

    def prompts(self, ask: Ask) -> list[list[int]]:
        """The tokens of what is asked.

        Raises:
            RequestError: tokens are outside the vocabulary, texts too long by far, messages not for the template.
        """
        texts = [prompt.content if isinstance(prompt, Message) else prompt for prompt in ask.prompt]
        longest = sum(map(len, texts)) if self.chats(ask) else max(map(len, texts))
        if longest > self._most_characters:  # what cannot fit is not even read
            field = "messages" if self.chats(ask) else "prompt"
            raise RequestError(400, f"The context is {self.engine.length} tokens, {field!r} has {longest} characters",
                               param=field, code="context_length_exceeded")  # fmt: skip
        if self.chats(ask):
            try:
                return [self.template.tokens(ask.prompt, self.tokenizer)]
            except ArgumentError as wrong:
                raise RequestError(400, str(wrong), param=wrong.path or "messages", code="invalid_value") from None
        return [self._read(prompt, i) for i, prompt in enumerate(ask.prompt)]

    @staticmethod
    def chats(ask: Ask) -> bool:
        """Whether messages are to be answered, not texts to be continued."""
        return isinstance(ask.prompt[0], Message)

    def checked(self, ask: Ask) -> Ask:
        """The request, if the numbers in it fit the model.

        Raises:
            RequestError: a bias is on a token outside the vocabulary, or more answers are asked for than may wait.
        """
        if any(token >= self.engine.vocab for token in ask.bias):
            raise RequestError(400, f"'logit_bias' is wrong: expected tokens below {self.engine.vocab}",
                               param="logit_bias", code="invalid_value")  # fmt: skip
        prompts = 1 if self.chats(ask) else len(ask.prompt)
        if ask.n * prompts > self.engine.room:
            raise RequestError(400, f"'n' is wrong: expected at most {self.engine.room} answers in all",
                               param="n", code="invalid_value")  # fmt: skip
        return ask

    def word(self, token: int) -> str:
        """A token on its own, as text."""
        return self.tokenizer.decode([token])

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "batiste"}

    def _read(self, prompt: str | list[int], i: int) -> list[int]:
        if isinstance(prompt, str):
            return [*self.begin, *encoded(self.tokenizer, divided(prompt, self.tokenizer.specials))]
        if not 0 <= min(prompt) <= max(prompt) < self.engine.vocab:
            raise RequestError(400, f"'prompt[{i}]' is wrong: expected tokens from 0 to {self.engine.vocab - 1}",
                               param=f"prompt[{i}]", code="invalid_value")  # fmt: skip
        return prompt
