# SPDX-License-Identifier: Apache-2.0
"""A draft of the table between a model and a file, from shapes and names: what a person would write down first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from batiste.graph import Module, iter_graph
from batiste.nn.stack import Stack

from .mapping import Table, bare_entries
from .tensors import Weights

# How published files say what our layers say. The words of a name are looked up together first, then one by one.
PHRASES = {
    "input layernorm": "attn norm", "post attention layernorm": "mlp norm", "attention output layernorm": "attn norm",
    "output layernorm": "mlp norm", "ln 1": "attn norm", "ln 2": "mlp norm", "ffn norm": "mlp norm",
    "layernorm before": "attn norm", "layernorm after": "mlp norm", "ln f": "norm", "output norm": "norm",
    "attention output dense": "attn out", "output dense": "mlp down", "intermediate dense": "mlp up",
    "token embd": "embed", "embed tokens": "embed", "word embeddings": "token embed", "lm head": "head",
    "token type embeddings": "type embed", "running mean": "mean", "running var": "var", "c fc": "mlp up",
    "conv dw": "depthwise", "conv pw": "pointwise", "depthwise conv": "depthwise", "expand conv": "expand",
    "project conv": "project",
}  # fmt: skip
WORDS = {
    "weight": "", "kernel": "", "scale": "", "embedding": "embed", "embeddings": "embed", "embd": "embed",
    "wte": "embed", "wpe": "position embed", "layers": "block", "layer": "block", "blocks": "block", "blk": "block",
    "h": "block", "attention": "attn", "attn": "attn", "self": "attn", "q": "query", "k": "key", "v": "value",
    "o": "out", "output": "out", "proj": "", "ffn": "mlp", "fc1": "mlp up", "fc2": "mlp down", "layernorm": "norm",
    "ln": "norm", "bn": "norm", "bn0": "norm 0", "bn1": "norm 1", "bn2": "norm 2", "model": "", "encoder": "",
    "decoder": "", "dense": "", "fc": "head", "classifier": "head",
}  # fmt: skip
STATISTICS = {"bias", "mean", "var"}


class Line(NamedTuple):
    """Tensors whose names differ in numbers alone."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    words: frozenset[str]

    @property
    def layer(self) -> str:
        return re.split(r"[./](?=[^./]*$)", self.name)[0]


def propose_mapping(model: Module, weights: Weights) -> Table:
    """A draft of the table between a model and a file; look it over, then hand it to `mapping.load`.

    Names of either side whose numbers alone differ are one line. Lines are joined whose shapes are the same, one after
    the other; where several are, those whose words are most alike, and those whose layer is joined already. What found
    no partner is left out, and `mapping.check` names it.

    >>> from batiste.graph import Rngs
    >>> from batiste.models import DECODERS, Decoder, open_safetensors, save_decoder
    >>> import tempfile
    >>> model = Decoder(DECODERS["tiny"], rngs=Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_decoder(model, folder)
    ...     table = propose_mapping(model, open_safetensors(folder))
    >>> table.names["blocks/layers/attn/query/kernel"]
    'model.layers.{}.self_attn.q_proj.weight'
    """
    stacks = {"/".join(map(str, path)) for path, x in iter_graph(model) if isinstance(x, Stack)}
    ours: dict[str, list[tuple[int, ...]]] = {}
    whole: dict[str, list[str]] = {}
    for entry in bare_entries(model, lambda path: sum(path.startswith(f"{stack}/layers/") for stack in stacks)):
        pattern = _pattern(entry.path, "/")
        ours.setdefault(pattern, []).extend([entry.theirs] * max(1, len(list(entry.parts()))))
        whole.setdefault(pattern, []).append(entry.path)
    theirs: dict[str, list[str]] = {}
    for name in sorted(weights.tensors, key=_natural):
        theirs.setdefault(_pattern(name, "."), []).append(name)

    def lines(groups: dict[str, list[str]]) -> list[Line]:
        return [_line(name, (weights.tensors[one].shape for one in group)) for name, group in groups.items()]

    names = dict(_joined([_line(name, shapes) for name, shapes in ours.items()], lines(theirs)))
    left = {path: [path] for pattern, paths in whole.items() if pattern not in names for path in paths}
    single = {name: [name] for group, found in theirs.items() if group not in names.values() for name in found}
    shapes = {entry.path: entry.theirs for entry in bare_entries(model, lambda path: 0)}
    names |= dict(_joined([_line(path, [shapes[path]]) for path in left], lines(single)))
    return Table(names)


def _joined(ours: list[Line], theirs: list[Line]) -> Iterator[tuple[str, str]]:
    """The most certain pair first, until none is left."""
    layers: dict[str, str] = {}
    while True:
        by_shapes: dict[tuple, tuple[list[Line], list[Line]]] = {}
        for i, side in enumerate((ours, theirs)):
            for line in side:
                by_shapes.setdefault(line.shapes, ([], []))[i].append(line)
        pairs = [(_alike(a, b, layers) + (len(mine) == len(yours) == 1), -i, a, b)
                 for mine, yours in by_shapes.values() for i, a in enumerate(mine) for b in yours
                 if a.words & STATISTICS == b.words & STATISTICS]  # fmt: skip
        if not pairs:
            return
        _, _, a, b = max(pairs, key=lambda pair: pair[:2])
        ours.remove(a)
        theirs.remove(b)
        layers[a.layer] = b.layer
        yield a.name, b.name


def _alike(a: Line, b: Line, layers: dict[str, str]) -> float:
    """The words both have, of those that either has; more where their layers are joined, less where to others."""
    alike = len(a.words & b.words) / max(1, len(a.words | b.words))
    known = layers.get(a.layer)
    return alike + (0 if known is None else 1 if known == b.layer else -1)


def _line(name: str, shapes: Iterable[tuple[int, ...]]) -> Line:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("LayerNorm", "Layernorm")).lower()
    text = f" {' '.join(re.split(r'[^a-z0-9]+', apart))} "
    for phrase, meant in sorted(PHRASES.items(), key=lambda item: -len(item[0])):
        text = text.replace(f" {phrase} ", f" {meant} ")
    words = (part for word in text.split() for part in WORDS.get(word, word).split())
    return Line(name, tuple(shapes), frozenset(words))


def _pattern(name: str, mark: str) -> str:
    """The name with `{}` for each part that is a number.

    >>> _pattern("h.0.mlp.fc1.weight", ".")
    'h.{}.mlp.fc1.weight'
    """
    return mark.join("{}" if part.isdigit() else part for part in name.split(mark))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """By which names are sorted: 2 before 10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"[./]", name)]
