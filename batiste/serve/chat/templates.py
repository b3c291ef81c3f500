# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what is written around the messages of a conversation, as a table.

What a message says is never read as a special token: nobody can end their turn and speak as the system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

from .text import Tokenizer, divided, encoded


class Message(NamedTuple):
    """What one side says; the roles are `system`, `user` and `assistant`."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands before and after each message, and before the answer.

    Args:
        user, assistant, system: before and after a message of that role. Without `system`, its text and `joint` stand
            before the first message of the user.
        answer: what the model goes on from.
        specials: the special tokens among all this.
        stops: those that end an answer.
        begin: what a conversation starts with.
        default: what the system says if it says nothing.
        strip: whether white space around messages is dropped.

    >>> CHATML.text([Message("user", "Hello!")])
    '<|im_start|>user\\nHello!<|im_end|>\\n<|im_start|>assistant\\n'
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    specials: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    system: tuple[str, str] | None = None
    joint: str = "\n\n"
    begin: str = ""
    default: str | None = None
    strip: bool = False

    def pieces(self, messages: Sequence[Message]) -> Iterator[tuple[bool, str]]:
        """The conversation and the beginning of the answer, as `(is markup, text)`."""
        if self.default is not None and messages[0].role != "system":
            messages = [Message("system", self.default), *messages]
        yield True, self.begin
        waiting = ""
        for role, content in messages:
            content = content.strip() if self.strip else content
            around = {"user": self.user, "assistant": self.assistant, "system": self.system}[role]
            if around is None:
                waiting += content + self.joint
                continue
            yield True, around[0]
            yield False, (waiting if role == "user" else "") + content
            yield True, around[1]
            waiting = "" if role == "user" else waiting
        yield True, self.answer

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation as one reads it."""
        return "".join(text for _, text in self.pieces(messages))

    def tokens(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The conversation as the model reads it."""
        pieces = self.pieces(messages)
        known = [special for special in self.specials if special in tokenizer.specials]
        return encoded(tokenizer, (part for markup, text in pieces for part in divided(text, known if markup else ())))

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(tokenizer.specials[stop] for stop in self.stops if stop in tokenizer.specials)


CHATML = Template(
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    specials=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    stops=("<|im_end|>", "<|endoftext|>"),
)

TEMPLATES: dict[str, Template] = {
    "chatml": CHATML,
    "smollm2": dataclasses.replace(
        CHATML, default="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ),
    "qwen2": dataclasses.replace(CHATML, default="You are a helpful assistant."),
    "llama3": Template(
        begin="<|begin_of_text|>",
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        stops=("<|eot_id|>", "<|end_of_text|>"),
        strip=True,
    ),
    "mistral": Template(
        begin="<s>",
        user=("[INST] ", " [/INST]"),
        assistant=(" ", "</s>"),
        answer="",
        specials=("<s>", "</s>", "[INST]", "[/INST]"),
        stops=("</s>",),
    ),
    "gemma": Template(
        begin="<bos>",
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        answer="<start_of_turn>model\n",
        specials=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        stops=("<end_of_turn>", "<eos>"),
        strip=True,
    ),
    "plain": Template(user=("User: ", "\n"), assistant=("Assistant: ", "\n"), system=("", "\n\n"), answer="Assistant:"),
}
"""Templates by name; `plain` is for models that were trained on none. To add one, add a row."""

SIGNS = {
    "smollm2": "named SmolLM",
    "qwen2": "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>",
    "chatml": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "gemma": "<start_of_turn>",
    "mistral": "[INST]",
}
"""By what a published template, or a list of special tokens, is known; the first that fits."""


def template_of(source: str | None, specials: Mapping[str, int] | None = None) -> Template | JinjaTemplate:
    """The template for a model: known by its published text or its special tokens, else that text run by Jinja.

    Args:
        source: the text in Jinja's language that models are published with, if there is one.
        specials: the tokenizer's special tokens.
    """
    signs = (source or "").replace("\n", "\\n") or " ".join(specials or {})
    name = next((name for name, sign in SIGNS.items() if sign in signs), None)
    if name is None and source:
        return JinjaTemplate(source)
    return TEMPLATES[name or "plain"]


class JinjaTemplate:
    """A template in Jinja's language, run in its sandbox, for models that are in no table.

    What it writes is one text, in which a message's special tokens would count: messages that hold one are refused.
    """

    def __init__(self, source: str, *, stops: Sequence[str] = (), **names: str):
        sandbox = need("jinja2.sandbox", extra="serve")
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self.stops = tuple(stops)
        self._compiled, self._names = environment.from_string(source), names

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation as one reads it."""
        told: Any = [message._asdict() for message in messages]
        return self._compiled.render(messages=told, add_generation_prompt=True, **self._names)

    def tokens(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The conversation as the model reads it.

        Raises:
            ArgumentError: a message holds a special token, or the template does not take this conversation.
        """
        for i, message in enumerate(messages):
            found = next((special for special in tokenizer.specials if special in message.content), None)
            if found:
                raise ArgumentError("a message holds one of the model's special tokens", at=f"messages[{i}]", got=found)
        return encoded(tokenizer, divided(self.text(messages), tokenizer.specials))

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(tokenizer.specials[stop] for stop in self.stops if stop in tokenizer.specials)


def _refuse(reason: str) -> None:
    raise ArgumentError("the template does not take this conversation", got=reason)
