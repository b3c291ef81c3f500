# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: the same answers in any company, slots that come free, queues that refuse, lone failures."""

from __future__ import annotations

import threading
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph import Rngs
from batiste.graph.errors import ArgumentError
from batiste.models import DECODERS, Decoder, generate
from batiste.serve.chat.engine import Engine, Refused
from batiste.serve.chat.sampling import Sampling
from batiste.serve.chat.slots import Slots

RANDOM = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    return RANDOM.integers(0, 256, length).tolist()


def sampling(i: int) -> Sampling:
    kinds = (dict(), dict(temperature=1.0), dict(temperature=0.7, top_p=0.9), dict(temperature=1.3, top_k=12),
             dict(temperature=1.0, min_p=0.05, repetition=1.2), dict(temperature=0.9, presence=0.5, frequency=0.5),
             dict(logprobs=True))  # fmt: skip
    return Sampling(**kinds[i % len(kinds)], seed=i)


@pytest.fixture
def compiled():
    """The programs that were compiled, or loaded, so far."""
    events = []
    listen = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_greedy_answers_are_those_of_generate(engine, model, answer, asked) -> None:
    prompts = [prompt(n) for n in (1, 9, 17, 40)]
    found = asked(engine, *(answer(p, 6) for p in prompts))
    for i in (0, 3):
        whole = np.asarray(generate(model, jnp.array([prompts[i]]), 6))[0]
        assert found[i] == whole[len(prompts[i]) :].tolist()
    forward = nnx.jit(model)
    for p, ids in zip(prompts, found):
        rows = jnp.array([(p + ids + [0] * 64)[:64]])
        assert jnp.argmax(forward(rows)[0, len(p) - 1 : len(p) + 5], axis=-1).tolist() == ids


def test_an_answer_is_the_same_alone_and_in_any_company(engine, compiled, answer, asked) -> None:
    """60 answers alone, then together over four slots, each with its own settings: bit for bit, nothing compiled."""
    cases = [(prompt(1 + i % 40), 1 + i % 12, sampling(i)) for i in range(60)]
    compiled.clear()
    alone = [asked(engine, answer(*case))[0] for case in cases]
    order = RANDOM.permutation(len(cases))
    together = [answer(*cases[i], client=str(i % 3)) for i in order]
    for i in range(0, 60, 20):
        engine.submit(*(a.job for a in together[i : i + 20]))
        together[i].over.wait(30)
    assert [a.ids for a in together] == [alone[i] for i in order]
    same = [a for i, a in zip(order, together) if cases[i][2].logprobs]
    for a in same:
        again = answer(a.job.prompt, a.job.limit, a.job.sampling)
        asked(engine, again)
        assert again.tokens == a.tokens  # the log probabilities too
    assert compiled == []


def test_a_job_ends_by_its_reader_and_by_its_limit(engine, answer, asked) -> None:
    p = prompt(5)
    ids = asked(engine, whole := answer(p, 10))[0]
    assert whole.why == "length" and len(ids) == 10
    asked(engine, cut := answer(p, 10, stop=ids[3]))
    assert cut.why == "stop" and cut.ids == ids[: ids.index(ids[3]) + 1]
    asked(engine, full := answer(prompt(63), 1))
    assert full.why == "length"


def test_bias_and_repetition_choose_other_tokens(engine, answer, asked) -> None:
    p = prompt(4)
    assert asked(engine, answer(p, 3, bias={17: 100.0}))[0] == [17, 17, 17]
    ids = asked(engine, answer(p, 20, Sampling(repetition=1e6)))[0]
    assert len(set(ids)) == 20


def test_a_cancelled_job_frees_its_slot(engine, answer, asked) -> None:
    long = [answer(prompt(3), 60) for _ in range(4)]
    engine.submit(*(a.job for a in long))
    for a in long:
        a.job.cancel()
    short = answer(prompt(3), 2)
    asked(engine, short)
    assert short.why == "length" and all(a.over.wait(5) and a.why in ("cancelled", "length") for a in long)
    assert engine.figures.live == 0 and engine.figures.ended["cancelled"] >= 1


def test_a_late_job_is_given_up_while_it_answers_and_while_it_waits(engine, answer) -> None:
    late = [answer(prompt(3), 60, deadline=time.monotonic() + 0.02) for _ in range(6)]
    engine.submit(*(a.job for a in late))
    assert all(a.over.wait(5) for a in late)
    assert {a.why for a in late} <= {"late", "length"} and "late" in {a.why for a in late}


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(slots, answer) -> None:
    slots.clear()
    with Engine(slots, waiting=2) as engine:
        jobs = [answer(prompt(3), 40) for _ in range(6)]
        engine.submit(*(a.job for a in jobs))
        jobs[0].began.wait(10)
        with pytest.raises(Refused, match="try again in") as refused:
            engine.submit(*(answer(prompt(3), 1).job for _ in range(3)))
        assert refused.value.busy and refused.value.after >= 1
        assert engine.figures.refused == 3
        assert all(len(a.ids) == 40 for a in jobs)
        engine._service = 100.0
        busy = [answer(prompt(3), 40) for _ in range(4)]
        engine.submit(*(a.job for a in busy))
        with pytest.raises(Refused):  # there is room, but no time
            engine.submit(answer(prompt(3), 1, deadline=time.monotonic() + 5).job)


def test_clients_take_turns(slots, answer) -> None:
    """One of 40 jobs of a greedy client does not keep another one waiting for all of them."""
    slots.clear()
    with Engine(slots, waiting=64) as engine:
        order: list[str] = []
        many = [answer(prompt(2), 4, client="many") for _ in range(40)]
        few = [answer(prompt(2), 4, client="few") for _ in range(3)]
        for a in (*many, *few):
            end = a.end
            a.job.end = lambda why, a=a, end=end: (order.append(a.job.client), end(why))
        engine.submit(*(a.job for a in many))
        engine.submit(*(a.job for a in few))
        assert all(a.over.wait(30) for a in (*many, *few))
        assert order[-10:] == ["many"] * 10


def test_a_reader_that_raises_fails_alone(engine, answer, asked, caplog) -> None:
    def broken(token):
        raise RuntimeError("a reader's fault")

    bad, good = answer(prompt(3), 8), answer(prompt(3), 8)
    bad.job.take = broken
    engine.submit(bad.job, good.job)
    assert len(good.ids) == 8 and good.why == "length"
    assert bad.over.wait(5) and bad.why == "failed" and "a reader's fault" in caplog.text


def test_a_prompt_starts_from_nothing_whatever_its_slot_held(engine, answer, asked) -> None:
    p = prompt(6)
    expected = asked(engine, answer(p, 8))[0]
    slots = engine._groups[0].slots
    poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, slots._rows.cache)
    slots._rows = slots._rows._replace(cache=poison)
    found = asked(engine, *(answer(p, 8) for _ in range(8)))
    assert found == [expected] * 8


def test_a_program_that_fails_ends_its_jobs_and_the_engine_goes_on(engine, answer, asked, monkeypatch, caplog) -> None:
    slots = engine._groups[0].slots
    step = slots._step

    def fails_once(*args):
        slots._step = step
        raise RuntimeError("RESOURCE_EXHAUSTED")

    slots._step = fails_once
    lost = answer(prompt(3), 8)
    engine.submit(lost.job)
    assert lost.over.wait(5) and lost.why == "failed"
    assert len(asked(engine, answer(prompt(3), 8))[0]) == 8 and "given up" in caplog.text


def test_closing_ends_what_it_has_and_takes_no_more(slots, answer) -> None:
    slots.clear()
    engine = Engine(slots)
    jobs = [answer(prompt(3), 20) for _ in range(9)]
    engine.submit(*(a.job for a in jobs))
    assert engine.close(timeout=30)
    assert all(a.why == "length" and len(a.ids) == 20 for a in jobs)
    with pytest.raises(Refused) as refused:
        engine.submit(answer(prompt(3)).job)
    assert not refused.value.busy


def test_closing_without_time_tells_everybody(slots, answer) -> None:
    slots.clear()
    engine = Engine(slots)
    jobs = [answer(prompt(3), 60) for _ in range(9)]
    engine.submit(*(a.job for a in jobs))
    engine.close(timeout=0)
    assert all(a.over.wait(5) for a in jobs) and "closed" in {a.why for a in jobs}


@pytest.mark.parametrize(
    ("tokens", "limit", "says"),
    [([], 4, "fit into a slot"), ([1] * 64, 1, "fit into a slot"), ([1], 0, "fit into a slot"),
     ([-1], 4, "outside the vocabulary"), ([256], 4, "outside the vocabulary"), ([2**40], 4, "outside the vocabulary")],
)  # fmt: skip
def test_what_cannot_be_answered_never_waits(engine, answer, tokens, limit, says) -> None:
    with pytest.raises(ArgumentError, match=says):
        engine.submit(answer(tokens, limit).job)


def test_slots_of_several_lengths(model, slots, answer, asked) -> None:
    """A job takes the shortest slot that holds it, or waits for one."""
    slots.clear()
    short = Slots(model, count=2, length=16, pieces=(8,))
    with Engine([slots, short]) as engine:
        assert (engine.length, engine.size) == (64, 6)
        brief = [answer(prompt(4), 4) for _ in range(5)]
        long = [answer(prompt(30), 4) for _ in range(5)]
        asked(engine, *brief, *long)
        assert engine.figures.tokens == 40


def test_a_window_is_kept(answer, asked) -> None:
    model = Decoder(DECODERS["tiny"].replace(window=8, layers=1), rngs=Rngs(0))
    p = prompt(13)
    with Engine(Slots(model, count=2, length=32, pieces=(8,))) as engine:
        found = asked(engine, answer(p, 12), answer(p[:3], 12))
    assert found[0] == np.asarray(generate(model, jnp.array([p]), 12))[0, 13:].tolist()


def test_wrong_sizes_of_slots(model) -> None:
    for wrong in (
        dict(count=0),
        dict(length=0),
        dict(pieces=()),
        dict(pieces=(0, 8)),
        dict(length=100, pieces=(8, 16)),
    ):
        with pytest.raises(ArgumentError):
            Slots(model, **wrong)
    with pytest.raises(ArgumentError):
        Engine([])


def test_an_engine_whose_thread_breaks_refuses(slots, answer, monkeypatch) -> None:
    slots.clear()
    engine = Engine(slots)
    monkeypatch.setattr(threading, "excepthook", lambda failed: None)
    monkeypatch.setattr(engine, "_leave", lambda: 1 / 0)
    engine.submit((lost := answer(prompt(3))).job)
    assert lost.over.wait(5) and lost.why == "closed"
    with pytest.raises(Refused):
        engine.submit(answer(prompt(3)).job)
    assert engine.close(1)
