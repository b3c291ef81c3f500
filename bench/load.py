# SPDX-License-Identifier: Apache-2.0
"""How long does it take to load published weights, and how much memory at most? In a fresh process each.

Beside ours: safetensors' own loaders (all tensors into numpy; into torch), and transformers' `from_pretrained`. The
model is a drawn decoder, saved as a folder of safetensors. Memory is the most the process ever held, less what it held
with its packages imported; time is without imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

HEADINGS = ("what loads", "seconds", "of the CPU", "most memory, MB", "/ the file", "largest tensor, MB")


def resident(most: bool) -> int:
    """Bytes of memory that the process holds now, or held at most."""
    said = Path("/proc/self/status").read_text()
    return 1024 * int(said.split("VmHWM:" if most else "VmRSS:")[1].split()[0])


def ours(folder: str, apart: bool = False) -> Callable[[], object]:
    import jax

    from batiste.models import load_decoder

    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the backend is there
    return lambda: jax.block_until_ready(jax.tree.leaves(load_decoder(folder, apart=apart)))


def ours_apart(folder: str) -> Callable[[], object]:
    return ours(folder, apart=True)


def ours_sharded(folder: str) -> Callable[[], object]:
    import jax

    from batiste import sharding
    from batiste.models import RULES, load_decoder

    plan = sharding.ready_plan(fsdp=-1, rules=RULES)

    def load() -> object:
        with sharding.use(plan):
            return jax.block_until_ready(jax.tree.leaves(load_decoder(folder)))

    return load


def safetensors_numpy(folder: str) -> Callable[[], object]:
    from safetensors.numpy import load_file

    return lambda: load_file(f"{folder}/model.safetensors")


def safetensors_torch(folder: str) -> Callable[[], object]:
    from safetensors.torch import load_file

    return lambda: {name: value.clone() for name, value in load_file(f"{folder}/model.safetensors").items()}


def transformers(folder: str) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM

    def load() -> object:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model, [float(value.abs().max()) for value in model.parameters()]  # it reads values when they are used

    return load


CONTENDERS = {
    "batiste": ours,
    "batiste, layers apart": ours_apart,
    "batiste, sharded over 4 devices": ours_sharded,
    "safetensors into numpy": safetensors_numpy,
    "safetensors into torch, copied": safetensors_torch,
    "transformers": transformers,
}


def measured(name: str, folder: str) -> None:
    """In the child: prints seconds and bytes."""
    load = CONTENDERS[name](folder)
    before, began, worked = resident(most=False), time.perf_counter(), time.process_time()
    kept = load()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": resident(most=True) - before, "kept": kept is not None}))


def child(name: str, folder: str) -> dict[str, float]:
    devices = "--xla_force_host_platform_device_count=4" if "sharded" in name else ""
    command = [sys.executable, __file__, "--child", name, "--folder", folder]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": devices})
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def figures(layers: int, features: int, vocab: int, rounds: int, folder: str) -> list[dict[str, Any]]:
    from batiste.graph import Rngs
    from batiste.models import Decoder, DecoderConfig, save_decoder

    config = DecoderConfig(vocab, features, layers, 8, 4, 3 * features)
    files = save_decoder(Decoder(config, rngs=Rngs(0)), folder)
    size = sum(file.stat().st_size for file in files)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):  # the first brings the file into memory
        for name in CONTENDERS:
            found[name].append(child(name, folder))
    largest = 4 * max(vocab * features, layers * 3 * features * features)
    return [{"contender": name, "seconds": statistics.median(run["seconds"] for run in runs[1:]),
             "cpu": statistics.median(run["cpu"] for run in runs[1:]),
             "bytes": statistics.median(run["bytes"] for run in runs[1:]), "file": size, "largest": largest}
            for name, runs in found.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measured(args.child, args.folder)
    from measure import machine, print_table

    with tempfile.TemporaryDirectory() as folder:
        rows = figures(args.layers, args.features, args.vocab, args.rounds, folder)
    print_table(
        f"Loading {rows[0]['file'] / 1e6:.0f} MB in float32 ({machine()}; medians of {args.rounds})",
        HEADINGS,
        [
            (
                str(row["contender"]),
                f"{row['seconds']:.2f}",
                f"{row['cpu']:.2f}",
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['bytes'] / row['file']:.2f}",
                f"{row['largest'] / 1e6:.0f}",
            )
            for row in rows
        ],
    )
    if args.json:
        print(json.dumps({"loads": rows}))


if __name__ == "__main__":
    main()
