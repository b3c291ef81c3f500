# SPDX-License-Identifier: Apache-2.0
"""`batiste serve` and `batiste replay`: models over HTTP, and yesterday's requests against today's model."""

from __future__ import annotations

import logging
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batiste.export import load_bundle
from batiste.export.described import FILE
from batiste.graph.errors import BatisteError
from batiste.serve import Recorder, Servable, Server, samples, serve
from batiste.serve.chat import Api, load_embedder, load_language_model

from .export import key_of
from .usage import FAILED, NEGATIVE, OK, UsageError


def run(args: Namespace) -> int:
    """Serves until a signal."""
    if not args.models:
        raise UsageError("Something to serve is missing", expected="[NAME=]PATH of a bundle, or of a language model")
    if args.engine == "thread" or args.executables is not None:
        return _serve(args)
    with tempfile.TemporaryDirectory(prefix="batiste-") as args.executables:  # an engine that died is back the sooner
        return _serve(args)


def _serve(args: Namespace) -> int:
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=args.log.upper())
    keys = [] if args.api_keys is None else _lines(args.api_keys)
    try:
        loaders, speakers = [], []
        for text in args.models:
            name, path = _named(text)
            if (path / FILE).is_file():
                loaders.append(_bundles(args, name, path))
            else:
                speakers.append(_language_model(args, name, path))
        recorder = Recorder(args.record, share=args.share, reference=args.reference) if _looks(args) else None
        chat = Api(speakers, timeout=args.timeout) if speakers else None
        server = Server(loaders, chat=chat, keys=keys, timeout=args.timeout, admin=args.admin, recorder=recorder,
                        waiting=args.waiting, most_bytes=args.most_bytes)  # fmt: skip
    except BatisteError as error:
        print(f"batiste serve: {error}", file=sys.stderr)
        return FAILED
    shown = ", ".join([*server.models, *(speaker.name for speaker in speakers)])
    print(f"serving {shown} at http://{args.host}:{args.port}/", flush=True)
    return serve(server, host=args.host, port=args.port, grace=args.grace)


def replay(args: Namespace) -> int:
    """Runs what a server recorded on a bundle; 1 if an answer is another."""
    if not args.samples or not args.bundle:
        raise UsageError("Samples and a bundle are needed", expected="batiste replay SAMPLES BUNDLE")
    try:
        bundle = load_bundle(args.bundle, key_of(args), allow_unsigned=args.allow_unsigned)
    except BatisteError as error:
        print(f"batiste replay: {error}", file=sys.stderr)
        return NEGATIVE
    count, others, worst = 0, 0, 0.0
    for path, _, inputs, outputs in samples(args.samples):
        count += 1
        try:
            found = bundle(**inputs)
            difference = max(_difference(found.get(name), x) for name, x in outputs.items())
            why = f"differs by {difference:.3g}" if difference > args.tolerance else ""
            worst = max(worst, difference)
        except BatisteError as error:
            why = f"is refused: {error}"
        if why:
            others += 1
            if others <= args.show:
                print(f"{path.name}: the answer {why}")
    if not count:
        raise UsageError("There are no samples here", got=args.samples)
    print(f"{count} requests: {others} with another answer; the largest difference is {worst:.3g}")
    return NEGATIVE if others else OK


def _difference(found: Any, expected: np.ndarray) -> float:
    if found is None or found.shape != expected.shape:
        return float("inf")
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b)).max(initial=0.0))


def _looks(args: Namespace) -> bool:
    return args.record is not None or args.reference is not None


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.rpartition("=")
    found = Path(path)
    if not found.exists():
        raise UsageError("There is nothing to serve", got=path)
    return (name if equals else found.resolve().name.removesuffix(".gguf")), found


def _bundles(args: Namespace, name: str, path: Path) -> Any:
    options = {"key": key_of(args), "allow_unsigned": args.allow_unsigned, "executables": args.executables}
    if options["key"] is None and not args.allow_unsigned:
        raise UsageError("Bundles are served with the key that signed them", got=str(path),
                         expected="--key-file FILE, or --allow-unsigned for one that you trust")  # fmt: skip
    options |= {"path": path, "name": name, "buckets": _buckets(args.buckets)}
    if args.engine == "process":
        return partial(Servable.in_process, "batiste.serve.servable:Servable.of_bundle", **options)
    return partial(Servable.of_bundle, **options)


def _language_model(args: Namespace, name: str, path: Path) -> Any:
    config = path / "config.json"
    encoder = config.is_file() and '"bert"' in config.read_text()
    if encoder:
        return load_embedder(path, name=name)
    return load_language_model(path, name=name, slots=args.slots, length=args.length)


def _buckets(given: list[str]) -> dict[str, tuple[int, ...]] | None:
    found = {}
    for text in given:
        name, equals, sizes = text.partition("=")
        if not (equals and name and all(size.isdigit() and int(size) for size in sizes.split(","))):
            raise UsageError("These are no buckets", got=text, expected="such as batch=1,8,32")
        found[name] = tuple(map(int, sizes.split(",")))
    return found or None


def _lines(path: str) -> list[str]:
    try:
        found = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"The file of API keys cannot be read: {error.strerror}", got=path) from error
    if not found:
        raise UsageError("The file of API keys is empty", got=path)
    return found
