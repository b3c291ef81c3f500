# SPDX-License-Identifier: Apache-2.0
"""What a client may ask, as tables: every field is checked, and named if it is wrong, before anything waits.

Source: the fields and their bounds, platform.openai.com/docs/api-reference; `top_k`, `min_p` and `repetition_penalty`
    are the names that open servers give them.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from batiste.graph.strict import parse_json

from .errors import RequestError
from .sampling import ALTERNATIVES, Sampling
from .templates import Message

Check = Callable[[Any], Any]
MOST_STOPS, LONGEST_STOP, MOST_MESSAGES, MOST_BIASED = 4, 256, 1024, 1024


class Wrong(ValueError):
    """A value is not what its field takes: the text says what it takes; `within` is a place inside the field."""

    def __init__(self, expected: str, within: str = ""):
        super().__init__(expected)
        self.within = within


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a client asks for, whichever way it asks."""

    model: str
    prompt: Any
    n: int
    limit: int | None
    limited_by: str
    sampling: Sampling
    stops: tuple[str, ...]
    bias: Mapping[int, float]
    stream: bool
    usage: bool
    alternatives: int | None
    echo: bool

    def draw(self, choice: int) -> Sampling:
        """How the tokens of one of several answers to a prompt are drawn."""
        return dataclasses.replace(self.sampling, choice=choice)


# ---------------------------------------------------------------- checks
def number(low: float, high: float, above: bool = False) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            raise Wrong(f"a number from {low:g} to {high:g}" + (f", above {low:g}" if above else ""))
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Wrong(f"a whole number from {low} to {high}")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Wrong("true or false")
    return value


def text(most: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or not 0 < len(value) <= most:
            raise Wrong(f"a text of 1 to {most} characters")
        return readable(value)

    return check


def readable(value: str, within: str = "") -> str:
    """Text that can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong("text without lone surrogates", within) from None
    return value


def stops(value: Any) -> tuple[str, ...]:
    listed = [value] if type(value) is str else value
    if type(listed) is not list or len(listed) > MOST_STOPS or not all(
        type(stop) is str and 0 < len(stop) <= LONGEST_STOP for stop in listed
    ):  # fmt: skip
        raise Wrong(f"a text, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters each")
    return tuple(map(readable, listed))


def bias(value: Any) -> dict[int, float]:
    added = number(-100, 100)
    if type(value) is not dict or len(value) > MOST_BIASED or not all(key.isascii() and key.isdigit() and len(key) < 10
                                                                     for key in value):  # fmt: skip
        raise Wrong(f"an object of up to {MOST_BIASED} tokens' numbers with what is added to their logits")
    return {int(token): added(amount) for token, amount in value.items()}


def stream_options(value: Any) -> bool:
    if type(value) is not dict or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise Wrong('an object with "include_usage"')
    return flag(value.get("include_usage", False))


def messages(value: Any) -> list[Message]:
    if type(value) is not list or not 0 < len(value) <= MOST_MESSAGES:
        raise Wrong(f"a list of 1 to {MOST_MESSAGES} messages")
    return [_message(message, f"[{i}]") for i, message in enumerate(value)]


def _message(value: Any, at: str) -> Message:
    if type(value) is not dict or not {"role", "content"} <= value.keys() <= {"role", "content", "name", "refusal"}:
        raise Wrong('an object with "role" and "content"', at)
    roles = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
    role, content = value["role"], value["content"]
    if type(role) is not str or role not in roles:
        raise Wrong(", ".join(roles), f"{at}.role")
    if type(content) is list:
        typed = [part for part in content if type(part) is dict and part.keys() == {"type", "text"}]
        if len(typed) < len(content) or any(part["type"] != "text" or type(part["text"]) is not str for part in typed):
            raise Wrong('a text, or parts {"type": "text", "text": ...}', f"{at}.content")
        content = "".join(part["text"] for part in typed)
    if type(content) is not str:
        raise Wrong('a text, or parts {"type": "text", "text": ...}', f"{at}.content")
    return Message(roles[role], readable(content, f"{at}.content"))


def prompts(most: int) -> Check:
    """A text, a list of texts, a list of tokens or a list of such lists: always given back as a list."""

    def check(value: Any) -> list[Any]:
        if type(value) is str or (type(value) is list and value and type(value[0]) is int):
            value = [value]
        if type(value) is not list or not 0 < len(value) <= most:
            raise Wrong(f"a text, a list of tokens, or a list of up to {most} of these")
        for i, prompt in enumerate(value):
            if type(prompt) is str:
                readable(prompt, f"[{i}]")
            elif type(prompt) is not list or not all(type(token) is int for token in prompt):
                raise Wrong("a text or a list of tokens", f"[{i}]")
            if not prompt:
                raise Wrong("a prompt that is not empty", f"[{i}]")
        return value

    return check


def only(*allowed: Any) -> Check:
    """A field that is known and not served: what it may be is what changes nothing."""

    def check(value: Any) -> None:
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise Wrong(" or ".join(map(json.dumps, allowed)) + ": nothing else is served here" if allowed
                        else "it to be left out: it is not served here")  # fmt: skip

    return check


def one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise Wrong(" or ".join(map(json.dumps, allowed)))
        return value

    return check


def anything(value: Any) -> None:
    """A field that says something about the client, which is not kept."""


# ---------------------------------------------------------------- tables
MOST_TOKENS = 1 << 24
MODEL = {"model": text(256)}
ABOUT = dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"), anything)
SHARED: dict[str, Check] = {
    **MODEL, **ABOUT,
    "temperature": number(0, 2), "top_p": number(0, 1), "top_k": integer(0, MOST_TOKENS), "min_p": number(0, 1),
    "presence_penalty": number(-2, 2), "frequency_penalty": number(-2, 2), "repetition_penalty": number(0, 10, True),
    "seed": integer(-(2**63), 2**63 - 1), "n": integer(1, 128), "max_tokens": integer(1, MOST_TOKENS),
    "stop": stops, "logit_bias": bias, "stream": flag, "stream_options": stream_options,
}  # fmt: skip
CHAT: dict[str, Check] = {
    **SHARED,
    "messages": messages, "max_completion_tokens": integer(1, MOST_TOKENS),
    "logprobs": flag, "top_logprobs": integer(0, ALTERNATIVES),
    "store": only(False), "tools": only([]), "tool_choice": only("none", "auto"), "functions": only([]),
    "function_call": only("none", "auto"), "parallel_tool_calls": flag, "response_format": only({"type": "text"}),
    "modalities": only(["text"]), "audio": only(), "prediction": only(), "reasoning_effort": only("none"),
}  # fmt: skip
TEXT: dict[str, Check] = {
    **SHARED,
    "prompt": prompts(128), "logprobs": integer(0, 5), "echo": flag, "best_of": integer(1, 128), "suffix": only(""),
}  # fmt: skip
EMBEDDINGS: dict[str, Check] = {
    **MODEL, **ABOUT,
    "input": prompts(2048), "encoding_format": one_of("float", "base64"), "dimensions": integer(1, MOST_TOKENS),
}  # fmt: skip


def parsed(raw: bytes) -> dict[str, Any]:
    """The object that a body holds, by the letter of JSON: no field twice, no NaN, no depth without end.

    Raises:
        RequestError: it holds none.
    """

    try:
        body = parse_json(raw)
    except ValueError as error:
        raise RequestError(400, f"The body is not JSON: {str(error)[:100]}") from None
    if type(body) is not dict:
        raise RequestError(400, "The body is no JSON object")
    return body


def checked(body: Mapping[str, Any], table: Mapping[str, Check], *required: str) -> dict[str, Any]:
    """The fields, each as its check gives it back; null is as if it were left out.

    Raises:
        RequestError: a field is unknown, missing, or no such value; the error names it.
    """
    for field in body:
        if field not in table:
            raise RequestError(400, f"Unknown field {field[:64]!r}", param=field[:64], code="unknown_parameter")
    found = {}
    for field, value in body.items():
        try:
            if value is not None:
                found[field] = table[field](value)
        except Wrong as wrong:
            at = field + wrong.within
            raise RequestError(400, f"{at!r} is wrong: expected {wrong}", param=at, code="invalid_value") from None
    for field in required:
        if field not in found:
            raise RequestError(400, f"{field!r} is missing", param=field, code="missing_required_parameter")
    return found


def asked(body: Mapping[str, Any], chat: bool) -> Ask:
    """A request for a chat completion, or for a completion of texts.

    Raises:
        RequestError: a field is wrong, or fields do not go together.
    """
    found = checked(body, CHAT if chat else TEXT, "model", "messages" if chat else "prompt")
    take = found.get
    alternatives = take("top_logprobs") if chat else take("logprobs")
    if chat and alternatives is not None and not take("logprobs"):
        raise RequestError(400, "'top_logprobs' needs 'logprobs': true", param="top_logprobs", code="invalid_value")
    if chat and take("logprobs"):
        alternatives = alternatives or 0
    if "stream_options" in found and not take("stream"):
        raise RequestError(400, "'stream_options' needs 'stream': true", param="stream_options", code="invalid_value")
    n = take("n", 1)
    if take("best_of", n) != n:
        raise RequestError(400, "'best_of' is served only if it is 'n'", param="best_of", code="invalid_value")
    if take("echo") and alternatives is not None:
        raise RequestError(400, "'echo' is not served with 'logprobs'", param="echo", code="invalid_value")
    sampling = Sampling(
        temperature=take("temperature", 1.0), top_k=take("top_k", 0), top_p=take("top_p", 1.0),
        min_p=take("min_p", 0.0), repetition=take("repetition_penalty", 1.0), presence=take("presence_penalty", 0.0),
        frequency=take("frequency_penalty", 0.0), seed=take("seed", secrets.randbits(63)),
        logprobs=alternatives is not None,
    )  # fmt: skip
    limited_by = "max_completion_tokens" if "max_completion_tokens" in found else "max_tokens"
    return Ask(
        model=found["model"], prompt=found["messages" if chat else "prompt"], n=n,
        limit=take(limited_by, None if chat else 16), limited_by=limited_by, sampling=sampling,
        stops=take("stop", ()), bias=take("logit_bias", {}), stream=take("stream", False),
        usage=take("stream_options", False), alternatives=alternatives, echo=take("echo", False),
    )  # fmt: skip
