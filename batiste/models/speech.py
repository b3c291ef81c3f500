# SPDX-License-Identifier: Apache-2.0
"""Speech to text with Whisper: windows of half a minute, what may be said in them, and again where it went wrong.

words = load_words("whisper-tiny/")                    # the tokenizer, and the tokens with a meaning
said = transcribe(load_whisper("whisper-tiny/"), samples, words)
print(said.text, [(part.start, part.end, part.text) for part in said.parts])

Dims, in the suffixes of names:  B batch   N samples   J moments   M bands   T tokens   V vocabulary

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", sections 2.3 and 4.5.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from batiste.graph.errors import ArgumentError
from batiste.transforms.compile import jit

from .files import read_json
from .generation import size_of
from .sampling import Sampling, drawn
from .spectra import HOP, RATE, log_mel
from .tensors import WeightsError
from .tokenizers import Decodes, Tokenizer
from .whisper import Said, Whisper

TICKS = 50
"""Times of a second that can be said."""
SIZES = tuple(1 << i for i in range(2, 12))
"""The sizes to which prompts are padded."""
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""What a window is written at, one after another, until it is credible."""


class Marks(NamedTuple):
    """The tokens with a meaning.

    Args:
        times: that of 0.00 s; those after it are later by 0.02 s each.
        languages: by their code, such as `en`; none, if the model knows but one.
        never, never_first: tokens that are not said, and that are not said first.
    """

    end: int
    start: int
    previous: int
    silence: int
    untimed: int
    times: int
    transcribe: int
    translate: int
    languages: Mapping[str, int] = {}
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, specials: Mapping[str, int], never: Sequence[int] = (), never_first: Sequence[int] = ()) -> Marks:
        """Those of the special tokens of a tokenizer, by their names.

        Raises:
            WeightsError: one is missing.
        """
        names = {"end": ["endoftext"], "start": ["startoftranscript"], "previous": ["startofprev"],
                 "silence": ["nospeech", "nocaptions"], "untimed": ["notimestamps"], "transcribe": ["transcribe"],
                 "translate": ["translate"]}  # fmt: skip
        found = {}
        for ours, theirs in names.items():
            numbers = [specials[f"<|{name}|>"] for name in theirs if f"<|{name}|>" in specials]
            if not numbers:
                raise WeightsError("the tokenizer is not one of speech", got=f"no <|{theirs[0]}|>",
                                   fix="take the files of one model")  # fmt: skip
            found[ours] = numbers[0]
        between = range(found["start"] + 1, min(found["transcribe"], found["translate"]))
        codes = {name.strip("<|>"): number for name, number in specials.items() if number in between}
        return cls(**found, times=found["untimed"] + 1, languages=codes, never=tuple(never),
                   never_first=tuple(never_first))  # fmt: skip


class Words(NamedTuple):
    """What makes text of tokens, and the tokens that are none."""

    tokenizer: Decodes
    marks: Marks


def load_words(folder: str | Path) -> Words:
    """Those of a folder with `tokenizer.json`, and `generation_config.json`, if it says what is not said.

    Raises:
        WeightsError: there is none, it cannot be read, or it is not one of speech.
    """
    tokenizer, path = Tokenizer.of_folder(Path(folder)), Path(folder) / "generation_config.json"
    about = read_json(path) if path.exists() else {}
    never, first = (about.get(f"{kind}suppress_tokens") or () for kind in ("", "begin_"))
    marks = Marks.of(tokenizer.specials, never, first)
    return Words(tokenizer, marks if about.get("is_multilingual", True) else marks._replace(languages={}))


spectrum = jit(log_mel, static_argnames="bands")


# ---------------------------------------------------------------- one window
class Rules(NamedTuple):
    """What may be said next, as arrays, so that one program serves all choices.

    Args:
        timed: times are said, at the begin and end of each part.
        latest: the latest time that may be said first.
    """

    never_V: Array
    never_first_V: Array
    end: Array
    times: Array
    timed: Array
    latest: Array

    @classmethod
    def of(cls, marks: Marks, vocab: int, *, timed: bool = True, latest: float = 1.0) -> Rules:
        def among(tokens: Sequence[int]) -> np.ndarray:
            return np.isin(np.arange(vocab), np.array(tokens, int))

        never = (*marks.never, marks.untimed) if timed else marks.never
        numbers = marks.end, marks.times, timed, marks.times + round(latest * TICKS)
        return cls(among(never), among(marks.never_first), *map(np.asarray, numbers))  # pyright: ignore[reportArgumentType]


class Past(NamedTuple):
    """What the rules look at: how many tokens were said, the last two, and the latest time."""

    count: Array
    last_B: Array
    before_B: Array
    time_B: Array


def allowed(logits_BV: Array, rules: Rules, past: Past) -> Array:
    """logits, and -inf for what may not be said next

    Times stand in pairs, end of a part and begin of the next, and never go back; the end may stand for a second one.
    If all times together are likelier than every word, a time is said.
    """
    each_1V, is_first = jnp.arange(logits_BV.shape[1])[None], past.count == 0
    never_1V = rules.never_V[None] | (is_first & rules.never_first_V[None])
    logits_BV = jnp.where(never_1V, -jnp.inf, logits_BV)
    is_time_1V = each_1V >= rules.times
    after_time_B = (past.last_B >= rules.times) & ~is_first
    is_alone_B = after_time_B & (past.before_B < rules.times) & (past.count > 1)
    is_paired_B = after_time_B & ~is_alone_B
    earliest_B = past.time_B + ~is_alone_B
    forbidden_BV = is_time_1V & (is_paired_B[:, None] | (each_1V < earliest_B[:, None]))
    forbidden_BV |= is_alone_B[:, None] & (each_1V < rules.end)
    forbidden_BV |= is_first & (~is_time_1V | (each_1V > rules.latest))
    timed_BV = jnp.where(forbidden_BV, -jnp.inf, logits_BV)
    times_B = jax.nn.logsumexp(jnp.where(is_time_1V, timed_BV, -jnp.inf), axis=1)
    word_B = jnp.where(is_time_1V, -jnp.inf, timed_BV).max(axis=1)
    timed_BV = jnp.where((times_B > word_B)[:, None] & ~is_time_1V, -jnp.inf, timed_BV)
    return jnp.where(rules.timed, timed_BV, logits_BV)


class Written(NamedTuple):
    """tokens[B, T] with the end behind the last, how many they are, and the mean logarithm of their probability."""

    tokens_BT: Array
    length_B: Array
    mean_B: Array


@jit
def heard(model: Whisper, spectrum_BJM: Array) -> Said:
    """What the decoder looks at: computed once for a window, however often it is written."""
    return model.heard(model.encode(spectrum_BJM), model.config.length)


def written(model: Whisper, said: Said, prompt: Sequence[int], rules: Rules, steps: int | None = None, *,
            temperature: float = 0.0, key: Array | None = None) -> Written:  # fmt: skip
    """What follows the prompt in each row: the likeliest tokens, or with a temperature drawn ones.

    Prompts are padded to a few sizes, so few programs are compiled; a program ends as soon as all rows have ended.

    Args:
        said: of `heard`.
        steps: how many tokens at most; up to the last position, if left out.

    Raises:
        ArgumentError: there is no prompt, or no room behind it.
    """
    room = model.config.length - len(prompt)
    if not prompt or not 1 <= (steps := room if steps is None else steps) <= room:
        raise ArgumentError("a text has a most of tokens", at="written", got=f"{len(prompt)} and {steps} more",
                            expected=f"from 1, at most {model.config.length}",
                            fix="ask for fewer steps, at least one")  # fmt: skip
    padded_P = np.zeros(min(size_of(len(prompt), SIZES), model.config.length), np.int32)
    padded_P[: len(prompt)] = prompt
    sampling = Sampling(temperature).rows(said.heard_LBSHC[0].shape[1])
    key = jax.random.key(0) if key is None else key
    return _written(model, said, padded_P, np.int32(len(prompt)), np.int32(steps), rules, sampling, key)


@jit
def _written(model: Whisper, said: Said, prompt_P: Array, length: Array, steps: Array, rules: Rules,
             sampling: Sampling, key: Array) -> Written:  # fmt: skip
    batch, most = said.heard_LBSHC[0].shape[1], model.config.length
    logits_BPV, said = model.decode(jnp.broadcast_to(prompt_P[None], (batch, len(prompt_P))), said)
    first_BV = lax.dynamic_index_in_dim(logits_BPV, length - 1, axis=1, keepdims=False)
    none_B = jnp.zeros(batch, jnp.int32)
    past = Past(jnp.int32(0), none_B, none_B, none_B + rules.times - 1)
    tokens_BT = jnp.full((batch, most), rules.end, jnp.int32)
    start = (past, first_BV, said._replace(filled=length), tokens_BT, none_B == 1, none_B, none_B.astype(jnp.float32))

    def goes_on(carry: Any) -> Array:
        past, *_, ended_B, _, _ = carry
        return (past.count < steps) & ~ended_B.all()

    def step(carry: Any) -> Any:
        past, logits_BV, said, tokens_BT, ended_B, length_B, sum_B = carry
        logits_BV = allowed(logits_BV, rules, past)
        token_B = drawn(logits_BV, sampling, jax.random.fold_in(key, past.count))
        token_B = jnp.where(ended_B, rules.end, token_B).astype(jnp.int32)
        log_p_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
        sum_B = sum_B + jnp.where(ended_B, 0, log_p_B)
        tokens_BT = lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], past.count, axis=1)
        ended_B = ended_B | (token_B == rules.end)
        past = Past(past.count + 1, token_B, past.last_B,
                    jnp.where(token_B >= rules.times, token_B, past.time_B))  # fmt: skip
        logits_B1V, said = model.decode(token_B[:, None], said)
        return past, logits_B1V[:, 0], said, tokens_BT, ended_B, length_B + ~ended_B, sum_B

    _, _, _, tokens_BT, _, length_B, sum_B = lax.while_loop(goes_on, step, start)
    return Written(tokens_BT, length_B, sum_B / (length_B + 1))


@jit
def after_start(model: Whisper, said: Said, start: Array) -> Array:
    """p[B, V] of what follows the start: a language, or that nothing is said"""
    tokens_B1 = jnp.broadcast_to(start, (said.heard_LBSHC[0].shape[1], 1))
    return jax.nn.softmax(model.decode(tokens_B1, said)[0][:, 0])


# ---------------------------------------------------------------- windows, one after another
class Part(NamedTuple):
    """A part of what is said: from when to when in seconds, and how credible it is.

    Args:
        temperature: at which it was written.
        log_probability: the mean of its window's tokens.
        compression: how much shorter zlib makes the text of its window, as a factor: large where it says one thing
            over and over.
        silence: the probability that nothing is said in its window.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    log_probability: float
    compression: float
    silence: float


class Transcript(NamedTuple):
    """The language, and the parts of what is said in it."""

    language: str | None
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts).strip()


def transcribe(model: Whisper, samples: Any, words: Words, *, language: str | None = None, translate: bool = False,
               temperatures: Sequence[float] = TEMPERATURES, most_compression: float = 2.4,
               least_log_probability: float = -1.0, silence: float = 0.6, remembers: bool = True, before: str = "",
               steps: int | None = None, key: Array | None = None) -> Transcript:  # fmt: skip
    """What is said in samples[N] between -1 and 1, 16000 a second

    A window begins where the last whole part of the one before it ended. It is written at each of the temperatures,
    until its text compresses little enough and is probable enough. One that is most likely silent and not probable
    says nothing.

    Args:
        language: the one with the highest probability in the first window, if left out.
        translate: into English.
        remembers: what was said goes before the next window as its context, but for text written above 0.5.
        before: what goes before the first one, such as names; with a tokenizer that encodes.
        steps: the most tokens of a window; half of the model's, less one, if left out.
        key: what draws above temperature 0 are made from.

    Raises:
        ArgumentError: samples are no row, or the language is not known.
    """
    samples_N, config, marks = np.asarray(samples, np.float32), model.config, words.marks
    if samples_N.ndim != 1 or not samples_N.size:
        raise ArgumentError("what is said is a row of samples", at="transcribe", got=samples_N.shape,
                            expected="(samples,), 16000 a second", fix="take one channel, or their mean")  # fmt: skip
    if language is not None and language not in marks.languages:
        raise ArgumentError("the model does not know the language", at="transcribe", got=language,
                            expected=", ".join(marks.languages) or "none: it knows but one")  # fmt: skip
    moments = 2 * config.moments
    window, half = moments * HOP / RATE, config.length // 2
    silent = 2 * moments * HOP - len(samples_N) % (moments * HOP)  # whole windows: few programs
    spectrum_JM = spectrum(np.pad(samples_N, (0, silent))[None], config.bands)[0]
    stream = jax.random.key(0) if key is None else key
    rules = Rules.of(marks, config.vocab, latest=min(1.0, window))
    context: list[int] = list(words.tokenizer.encode(before)) if before else []  # pyright: ignore[reportAttributeAccessIssue]
    parts: list[Part] = []
    at, end = 0, -(-len(samples_N) // HOP)
    while at < end:
        said = heard(model, spectrum_JM[None, at : at + moments])
        first_V = np.asarray(after_start(model, said, np.int32(marks.start)))[0]
        if language is None and marks.languages:
            language = max(marks.languages, key=lambda code: first_V[marks.languages[code]])
        task = [marks.translate if translate else marks.transcribe]
        header = [marks.start, *([marks.languages[language], *task] if language else [])]
        prompt = [*([marks.previous, *context[-(half - 1) :]] if context else []), *header]
        room = min(half - 1 if steps is None else steps, config.length - len(prompt))
        quiet = float(first_V[marks.silence])
        for temperature in temperatures:
            stream, used = jax.random.split(stream)
            found = written(model, said, prompt, rules, room, temperature=temperature, key=used)
            tokens = np.asarray(found.tokens_BT)[0, : int(found.length_B[0])].tolist()
            mean = float(found.mean_B[0])
            ratio = compression(words.tokenizer.decode([token for token in tokens if token < marks.end]))
            is_silent = quiet > silence and mean < least_log_probability
            if is_silent or (ratio <= most_compression and mean >= least_log_probability):
                break
        if is_silent:
            at += moments
            continue
        pieces, seconds = parts_of(tokens, marks, window)
        for start, stop, inner in pieces:
            if text := words.tokenizer.decode(inner):
                begun = at * HOP / RATE
                parts.append(Part(begun + start, min(begun + stop, len(samples_N) / RATE), text, tuple(inner),
                                  temperature, mean, ratio, quiet))  # fmt: skip
        if remembers:
            context = [*context, *(t for piece in pieces for t in piece[2])] if temperature <= 0.5 else []
        at += max(1, round(seconds * RATE / HOP))
    return Transcript(language, tuple(parts))


def parts_of(tokens: Sequence[int], marks: Marks, window: float) -> tuple[list[tuple[float, float, list[int]]], float]:
    """(begin, end, tokens) of the parts of a window, and how far the next window is from it, all in seconds

    The last part, if it has no end, is heard once more in the next window, where it begins; one that is the only one
    lasts as long as the window.

    >>> marks = Marks(5, 6, 7, 8, 9, 10, 11, 12)
    >>> parts_of([10, 1, 2, 60, 60, 3], marks, 30.0)
    ([(0.0, 1.0, [1, 2])], 1.0)
    >>> parts_of([10, 1, 2], marks, 30.0)
    ([(0.0, 30.0, [1, 2])], 30.0)
    """
    found: list[tuple[float, float, list[int]]] = []
    begin, inner = 0.0, []
    for token in tokens:
        if token < marks.times:
            inner = [*inner, token] if token < marks.end else inner
            continue
        time = min((token - marks.times) / TICKS, window)
        if inner:
            found.append((begin, time, inner))
        begin, inner = time, []
    if inner and not found:
        return [(begin, window, inner)], window
    ends_with_two = len(tokens) > 1 and tokens[-2] >= marks.times
    return found, begin if found and (inner or ends_with_two) else window


def compression(text: str) -> float:
    """
    >>> compression("over and over and " * 9) > 2.4 > compression("The sea is calm tonight.")
    True
    """
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0
