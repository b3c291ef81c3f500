# SPDX-License-Identifier: Apache-2.0
"""How much of the bare program's speed is left behind a server, and how long do answers take at which load?

Requests of one row each come over loopback from this process, which shares the cores with the server. Beside it stand
the bare program, a full batch after another, and PyTorch behind a plain Starlette application, a request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batiste import export
from batiste.export import Bundle, load_bundle
from batiste.graph import Rngs
from batiste.models import BERTS, Bert
from batiste.models.efficientnet import EFFICIENTNETS, EfficientNet
from measure import machine, print_table

LENGTH, SIZE, ROWS = 64, 96, 16
BUCKETS = {"batch": (1, 4, ROWS)}


class Subject(NamedTuple):
    """A model: how it is built, its input, and a row of it."""

    build: Any
    name: str
    spec: str
    row: np.ndarray


SUBJECTS = {
    "encoder": Subject(lambda: Bert(BERTS["minilm-l6"], rngs=Rngs(0)), "tokens", f"int32[batch, {LENGTH}] < 30522",
                       np.arange(LENGTH, dtype=np.int32)[None] + 7),
    "classifier": Subject(lambda: EfficientNet(EFFICIENTNETS["lite0"], rngs=Rngs(0)), "images",
                          f"float32[batch, {SIZE}, {SIZE}, 3]", np.ones((1, SIZE, SIZE, 3), np.float32)),
}  # fmt: skip


# ---------------------------------------------------------------- servers
@contextlib.contextmanager
def server(*command: str) -> Iterator[int]:
    """A server in a process of its own, ready; gives its port."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    with tempfile.TemporaryFile() as output, subprocess.Popen([sys.executable, *words], stdout=output,
                                                              stderr=output) as process:  # fmt: skip
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    output.seek(0)
                    raise SystemExit(f"the server ended: {output.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in connection.recv(64)
    return False


def pytorch(port: int) -> None:
    """MiniLM's sizes in PyTorch: what one writes first."""
    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response
    from starlette.routing import Route
    from transformers import BertConfig, BertModel

    c = BERTS["minilm-l6"]
    sizes: Any = {"vocab_size": c.vocab, "hidden_size": c.features, "num_hidden_layers": c.layers,
                  "num_attention_heads": c.heads, "intermediate_size": c.hidden}  # fmt: skip
    model = BertModel(BertConfig(**sizes)).eval()

    @torch.inference_mode()
    def run(raw: bytes) -> bytes:
        tokens = torch.frombuffer(bytearray(raw), dtype=torch.int32).reshape(1, LENGTH).long()
        return model(tokens).last_hidden_state.numpy().tobytes()

    async def answer(request: Any) -> Any:
        return Response(await run_in_threadpool(run, (await request.body())[-4 * LENGTH :]))

    async def ready(request: Any) -> Any:
        return Response("ready")

    routes = [Route("/v2/models/encoder/infer", answer, methods=["POST"]), Route("/readyz", ready)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


# ---------------------------------------------------------------- clients
def request_of(subject: Subject, model: str) -> bytes:
    """One row, as bytes, and the answer as bytes."""
    x = subject.row
    entry = {"name": subject.name, "shape": list(x.shape), "datatype": "INT32" if x.dtype == np.int32 else "FP32",
             "parameters": {"binary_data_size": x.nbytes}}  # fmt: skip
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    fields = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + x.nbytes}"
    return f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n".encode() + head + x.tobytes()


class Client:
    """One connection that is kept."""

    def __init__(self, port: int):
        self.port, self.streams = port, None

    async def ask(self, request: bytes) -> int:
        """The status; the whole answer has been read."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self.streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        await reader.readexactly(int(fields[b"content-length"]))
        if fields.get(b"connection") == b"close":
            writer.close()
            self.streams = None
        return int(head[9:12])


async def closed(port: int, request: bytes, clients: int, seconds: float) -> float:
    """Rows a second, when each of some clients asks again as soon as it is answered."""
    end, count = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal count
        client = Client(port)
        while time.perf_counter() < end:
            status = await client.ask(request)
            if status != 200:
                raise SystemExit(f"the server answered {status}")
            count += 1

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return count / (time.perf_counter() - start)


async def opened(port: int, request: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
    """Seconds until each answer, when requests come at a rate that waits for nothing; and how many were refused."""
    idle: list[Client] = []
    took, refused = [], 0

    async def one() -> None:
        nonlocal refused
        client = idle.pop() if idle else Client(port)
        start = time.perf_counter()
        status = await client.ask(request)
        if status == 200:
            took.append(time.perf_counter() - start)
        else:
            refused += 1
        idle.append(client)

    start, tasks = time.perf_counter(), []
    for i in range(max(8, int(rate * seconds))):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(max(start + (i + 1) / rate - time.perf_counter(), 0))
    await asyncio.gather(*tasks)
    return took, refused


def bare(bundle: Bundle, subject: Subject, seconds: float) -> float:
    """Rows a second of the program alone, in full batches."""
    batch = np.repeat(subject.row, ROWS, 0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        {name: np.asarray(x) for name, x in bundle(**{subject.name: batch}).items()}
        count += ROWS
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------- figures
def throughput(name: str, path: Path, seconds: float, rounds: int, loads: list[float], out: Path | None) -> Any:
    subject = SUBJECTS[name]
    bundle = load_bundle(path, buckets=BUCKETS)
    bundle.compile()
    buckets = "batch=" + ",".join(map(str, BUCKETS["batch"]))
    request = request_of(subject, name)
    found: dict[str, list[float]] = {"bare": [], "served": [], "pytorch": []}
    latencies = []
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(server("-m", "batiste", "serve", f"{name}={path}", "--port", "PORT", "--buckets",
                                          buckets, "--allow-unsigned", "--log", "error"))  # fmt: skip
        theirs = stack.enter_context(server(__file__, "--pytorch", "PORT")) if name == "encoder" else None
        for _ in range(rounds):
            found["bare"].append(bare(bundle, subject, seconds))
            found["served"].append(asyncio.run(closed(port, request, 2 * ROWS, seconds)))
            if theirs is not None:
                found["pytorch"].append(asyncio.run(closed(theirs, request, 2 * ROWS, seconds)))
        peak = statistics.median(found["served"])
        for load in loads:
            took, refused = asyncio.run(opened(port, request, load * peak, seconds))
            p50, p99 = (float(np.quantile(took, q)) for q in (0.5, 0.99)) if took else (float("nan"),) * 2
            latencies.append({"load": load, "p50": p50, "p99": p99, "refused": refused / (refused + len(took))})
    if out is not None and latencies:
        draw(latencies, name, peak, out / f"latency-{name}.png")
    ratios = {key: statistics.median(a / b for a, b in zip(found["served"], rates)) if rates else None
              for key, rates in found.items() if key != "served"}  # fmt: skip
    rates = {key: statistics.median(each) for key, each in found.items() if each}
    return {"model": name, "rates": rates, "ratios": ratios, "latencies": latencies}


def draw(latencies: list[dict[str, float]], name: str, peak: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in ("p50", "p99"):
        axes.plot([x["load"] for x in latencies], [1e3 * x[key] for x in latencies], marker="o", label=key)
    axes.set(xlabel=f"offered load, parts of the peak ({peak:.0f} rows/s)", ylabel="ms until the answer", title=name)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="encoder,classifier", help="of encoder, classifier (both)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each slice (5)")
    parser.add_argument("--rounds", type=int, default=3, help="of the contenders in turns (3)")
    parser.add_argument("--loads", default="0.25,0.5,0.75,0.9,1.5,3", help="parts of the peak; or none")
    parser.add_argument("--out", type=Path, help="a folder for the pictures")
    parser.add_argument("--json", action="store_true", help="end with the figures in one line")
    parser.add_argument("--pytorch", type=int, metavar="PORT", help="be the server of PyTorch")
    args = parser.parse_args()
    if args.pytorch:
        return pytorch(args.pytorch)
    names = args.models.split(",")
    if wrong := [name for name in names if name not in SUBJECTS]:
        parser.error(f"--models: there is no {', '.join(wrong)}; there are {', '.join(SUBJECTS)}")
    loads = [] if args.loads == "none" else [float(load) for load in args.loads.split(",")]
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model = SUBJECTS[name].build()
            model.eval()
            export.export(model, {SUBJECTS[name].name: SUBJECTS[name].spec}, Path(folder) / name)
            rows.append(throughput(name, Path(folder) / name, args.seconds, args.rounds, loads, args.out))
            print("  done:", json.dumps(rows[-1]), flush=True)
    shown = lambda x, form: "-" if x is None else format(x, form)
    print_table("Rows a second at saturation, and the server's part of the others'",
                ["model", "bare", "served", "PyTorch", "served / bare", "served / PyTorch"],
                [[r["model"], *(shown(r["rates"].get(key), ",.0f") for key in ("bare", "served", "pytorch")),
                  *(shown(r["ratios"][key], ".2f") for key in ("bare", "pytorch"))] for r in rows])  # fmt: skip
    print_table("Until the answer, ms", ["model", "load", "p50", "p99", "refused"],
                [[r["model"], f"{x['load']:g}", f"{1e3 * x['p50']:.0f}", f"{1e3 * x['p99']:.0f}", f"{x['refused']:.0%}"]
                 for r in rows for x in r["latencies"]])  # fmt: skip
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
