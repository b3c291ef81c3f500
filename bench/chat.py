# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second do slots give, beside answering the same requests one after another with `generate`?

Greedy answers of equal length to prompts of several lengths, in float32, layers apart; everything is compiled before
the clock runs. Each round asks all requests of every contender; at most so many at a time are with the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time

import jax.numpy as jnp
import numpy as np

from batiste.graph import Rngs
from batiste.models import DECODERS, Decoder, generate
from batiste.serve.chat import Engine, Job, Slots
from measure import machine, print_table


def one_after_another(model: Decoder, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    found = [np.asarray(generate(model, jnp.array([prompt]), tokens))[0] for prompt in prompts]
    return [row[len(prompt) :].tolist() for row, prompt in zip(found, prompts)]


def together(engine: Engine, prompts: list[list[int]], tokens: int, at_once: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    room, left = threading.Semaphore(at_once), threading.Semaphore(0)
    for prompt, answer in zip(prompts, answers):
        room.acquire()

        def end(why: str) -> None:
            room.release()
            left.release()

        engine.submit(Job(prompt, tokens, lambda token, answer=answer: answer.append(token.token) or False, end))
    for _ in prompts:
        left.acquire()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", choices=DECODERS, help="sizes; the weights are random")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16], help="slots, all of them asked for")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--length", type=int, default=128, help="positions of a slot")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print a line of JSON at the end")
    args = parser.parse_args()

    random, most = np.random.default_rng(0), args.length - args.tokens
    model = Decoder(DECODERS[args.model], rngs=Rngs(0)).apart()
    sizes = [max(1, most * (1 + i % 4) // 4) for i in range(args.requests)]
    prompts = [random.integers(0, model.config.vocab, size).tolist() for size in sizes]
    pieces = [size for size in (32, 64) if size < args.length] + [args.length]
    engines = {n: Engine(Slots(model, count=n, length=args.length, pieces=pieces), waiting=args.requests)
               for n in args.slots}  # fmt: skip
    calls = {f"{n} slots": lambda n=n: together(engines[n], prompts, args.tokens, n) for n in args.slots}
    calls = {"one after another": lambda: one_after_another(model, prompts, args.tokens)} | calls
    expected = calls["one after another"]()  # and everything is compiled: slots are when they are made
    same: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            found = call()
            seconds[name].append(time.perf_counter() - began)
            same[name] = sum(a == b for a, b in zip(found, expected))
    for engine in engines.values():
        engine.close()

    rows, figures = [], {}
    for name, times in seconds.items():
        rate = args.requests * args.tokens / statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(seconds["one after another"], times))
        rows.append([name, f"{rate:.1f}", f"{ratio:.2f}", f"{same[name]} of {args.requests}"])
        figures[name] = {"tokens_per_second": rate, "ratio": ratio, "same": same[name]}
    print(machine())
    title = f"{args.model}, {args.requests} prompts of {min(sizes)} to {max(sizes)} tokens, {args.tokens} more each"
    print_table(title, ["contender", "tokens/s", "x generate", "same answers"], rows)
    if args.json:
        print(json.dumps({"chat": figures}))


if __name__ == "__main__":
    main()
