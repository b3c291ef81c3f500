# SPDX-License-Identifier: Apache-2.0
"""`batiste models`: published architectures, and files of weights: list, show, convert, verify, generate."""

from __future__ import annotations

import dataclasses
import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph.errors import ArgumentError
from batiste.graph.text import size_text, table
from batiste.models import open_weights
from batiste.models.decoder import Decoder
from batiste.models.mapping import entries
from batiste.models.registry import architecture_of, configuration, configurations, told_parameters
from batiste.models.safetensors import Spec, write_safetensors
from batiste.models.sampling import Sampling
from batiste.models.tensors import Weights, WeightsError
from batiste.models.tokenizers import load_tokenizer, write
from batiste.models.verify import verify

from .usage import NEGATIVE, OK, UsageError

BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.txt",
          "merges.txt", "sentence_bert_config.json")  # fmt: skip


def run(args: Namespace) -> int:
    if args.action is None:
        raise UsageError("What about the models?", expected=f"batiste models {'|'.join(ACTIONS)}")
    try:
        return ACTIONS[args.action](args)
    except (ArgumentError, ImportError) as error:  # of files and names; a traceback would say no more
        raise UsageError(str(error)) from error


def listed(args: Namespace) -> int:
    rows = [(name, f"{told_parameters(name):,}", architecture.summary) for name, architecture, _ in configurations()]
    print(table([("configuration", "parameters", "architecture"), *rows]))
    return OK


def show(args: Namespace) -> int:
    """A configuration by its name, or the tensors of a file."""
    if Path(args.name).exists():
        weights = open_weights(args.name)
        rows = [(name, str(list(tensor.shape)), size_text(tensor.size)) for name, tensor in weights.tensors.items()]
        count = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        total = size_text(sum(tensor.size for tensor in weights.tensors.values()))
        print(table([("tensor", "shape", "bytes"), *rows, (f"{len(rows)} tensors", f"{count:,} values", total)]))
        return OK
    architecture, config = configuration(args.name)
    settings = "\n".join(f"  {field.name} = {getattr(config, field.name)}" for field in dataclasses.fields(config))
    found = entries(architecture.abstract(config), architecture.table)
    rows = [(entry.path, str(list(entry.variable.shape)), f"{math.prod(entry.variable.shape):,}", entry.names.name)
            for entry in found]  # fmt: skip
    total = sum(math.prod(entry.variable.shape) for entry in found)
    print(f"{architecture.name}: {architecture.summary}\n{settings}\n")
    print(
        table([("value", "shape", "parameters", "published as"), *rows, (f"{len(rows)} values", "", f"{total:,}", "")])
    )
    return OK


def convert(args: Namespace) -> int:
    """Any file into a folder of safetensors: with the published names where the architecture is known."""
    source, target = Path(args.source), Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("The folder to write to is not empty", got=str(target), fix="name a new one")
    dtype = _dtype(args.dtype)
    weights = open_weights(source)
    if source.is_dir() or "general.architecture" in weights.about:
        architecture = architecture_of(source)
        model = architecture.load(source, **({"dtype": dtype} if dtype else {}))
        files = architecture.save(model, target, shard_bytes=args.shard_bytes)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    else:
        files = write_safetensors(target, _specs(weights, dtype), (t.read() for t in weights.tensors.values()),
                                  args.shard_bytes)  # fmt: skip
    print(f"{len(weights.tensors)} tensors -> {', '.join(str(file) for file in files)}")
    return OK


def _specs(weights: Weights, dtype: np.dtype | None) -> list[Spec]:
    """What will be written; a tensor of unknown dtype is read to see it."""
    return [Spec(name, tensor.shape, tensor.read().dtype if dtype is None else dtype)
            for name, tensor in weights.tensors.items()]  # fmt: skip


def _dtype(name: str | None) -> np.dtype | None:
    return None if name is None else np.dtype(getattr(jnp, name))


def verified(args: Namespace) -> int:
    """Whether the files are whole and finite, and, with --against, whether two models compute the same."""
    try:
        architecture = architecture_of(args.path)
        model = architecture.load(args.path)
    except WeightsError as error:
        print(error)
        return NEGATIVE
    weights, names = open_weights(args.path), []
    for name, tensor in weights.tensors.items():
        value = tensor.read()
        if jnp.issubdtype(value.dtype, jnp.inexact) and not np.isfinite(value.astype(np.float32)).all():
            names.append(name)
    if names:
        print(f"not finite: {', '.join(names)}")
        return NEGATIVE
    print(f"{len(weights.tensors)} tensors, all finite, of {architecture.name}")
    if args.against is None:
        return OK
    other = architecture.load(args.against)
    found = verify(model, other, architecture.inputs(model.config), tolerance=args.tolerance)
    print(found)
    return OK if found else NEGATIVE


def generated(args: Namespace) -> int:
    """The text that a language model goes on with."""
    path = Path(args.path)
    architecture = architecture_of(path)
    model = architecture.load(path)
    if not isinstance(model, Decoder):
        raise UsageError("The model does not generate", got=architecture.name, expected="a decoder")
    if args.tokens < 1 or args.temperature < 0:
        got = f"--tokens {args.tokens} --temperature {args.temperature}"
        expected = "--tokens of 1 or more, --temperature of 0 or more"
        raise UsageError("How many tokens, and how bold?", got=got, expected=expected)
    words = load_tokenizer(path)
    if not words.encode(args.prompt):
        raise UsageError("The prompt has no tokens", got=repr(args.prompt))
    print(args.prompt, end="", flush=True)
    how = Sampling(temperature=args.temperature, top_k=args.top_k or 0)
    for piece in write(model, words, args.prompt, args.tokens, how, key=jax.random.key(args.seed)):
        print(piece, end="", flush=True)
    print()
    return OK


ACTIONS: dict[str, Callable[[Namespace], int]] = {
    "list": listed,
    "show": show,
    "convert": convert,
    "verify": verified,
    "generate": generated,
}
