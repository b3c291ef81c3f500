# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of published models as a table, in both directions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax.typing import DTypeLike

from .files import open_weights, read_json
from .mapping import Table, load, save
from .safetensors import STEMS
from .tensors import Weights, WeightsError

Config = TypeVar("Config")


class Settings(NamedTuple):
    """What a file says of a kind of model.

    Args:
        kind: its `model_type`, or what it says in place of that.
        names: our setting -> theirs; a dot leads into a part.
        fixed: what theirs have to be for the model to be ours; that is also what they are if left out.
        said_by: the setting that says the kind.
    """

    kind: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any]
    said_by: str = "model_type"

    def read(self, folder: str | Path, make: Callable[..., Config], **more: Any) -> Config:
        """The configuration that a folder's `config.json` describes; `more` is not said there.

        Raises:
            WeightsError: there is none, or it is that of another architecture.
        """
        path = Path(folder) / "config.json"
        about = _flat(read_json(path))
        for name, wanted in {self.said_by: self.kind, **self.fixed}.items():
            found = about.get(name, None if name == self.said_by else wanted)
            if found != wanted:
                raise WeightsError("the model is of an architecture that this one is not", at=str(path),
                                   got=f"{name}={str(found)[:80]!r}", expected=repr(wanted))  # fmt: skip
        try:
            said = {ours: _hashable(about[theirs]) for ours, theirs in self.names.items() if theirs in about}
            return make(**said, **more)
        except (TypeError, ValueError) as error:
            raise WeightsError("the settings do not describe a model", at=str(path), got=str(error)[:200]) from error

    def write(self, folder: str | Path, config: Any, **more: Any) -> None:
        """Writes `config.json`."""
        about = {self.said_by: self.kind, **self.fixed, **more}
        about |= {theirs: getattr(config, ours) for ours, theirs in self.names.items()}
        nested: dict[str, Any] = {name: value for name, value in about.items() if "." not in name}
        for name in about.keys() - nested.keys():
            part, _, rest = name.partition(".")
            nested.setdefault(part, {})[rest] = about[name]
        (Path(folder) / "config.json").write_text(json.dumps(nested, indent=2, sort_keys=True) + "\n")


class Published(NamedTuple):
    """How models of one kind lie in folders: what makes them, their settings, and the names of their weights.

    Args:
        model, config: the classes; in place of the second, a function of its settings.
        head: of a classifier, the tensor that is as long as there are classes.
        stem: of the names of files.
        again: a part of names, with `{}`: what has it with the number of any layer repeats what has it with 0.
        older: what names of older files have within them -> what newer ones have.
    """

    model: Callable[..., Any]
    config: Callable[..., Any]
    settings: Settings
    table: Table
    head: str = ""
    stem: str = STEMS[0]
    again: str = ""
    older: Mapping[str, str] = MappingProxyType({})

    def load(self, path: str | Path, config: Any, dtype: DTypeLike, **more: Any) -> Any:
        """The model of a folder, of the configuration found there if `config` is None; it is not in training.

        Raises:
            WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
        """
        weights = self._newest(open_weights(path))
        if config is None:
            head = weights.tensors.get(self.head)
            config = self.settings.read(path, self.config, **({"classes": head.shape[0]} if head else {}), **more)
        weights = _once(weights, self.again, path)
        model = load(lambda rngs: self.model(config, rngs=rngs), weights, self.table, path, dtype=dtype)
        model.eval()
        return model

    def save(
        self, model: Any, folder: str | Path, dtype: DTypeLike | None, shard_bytes: int, **more: Any
    ) -> list[Path]:
        """Writes safetensors, and `config.json` with `more` in it; says which files hold the weights."""
        again = [self.again.format(i) for i in range(model.config.layers)] if self.again else ()
        files = save(model, self.table, folder, dtype=dtype, shard_bytes=shard_bytes, stem=self.stem, again=again)
        self.settings.write(folder, model.config, **more)
        return files

    def _newest(self, weights: Weights) -> Weights:
        """With the newer names."""
        found = {}
        for name, tensor in weights.tensors.items():
            for old, new in self.older.items():
                name = name.replace(old, new)
            found[name] = tensor
        return weights._replace(tensors=found)


def _once(weights: Weights, again: str, at: str | Path) -> Weights:
    """Without the tensors that repeat others.

    Raises:
        WeightsError: one differs from what it should repeat.
    """
    expression, found = re.compile(re.escape(again).replace(r"\{\}", r"[1-9]\d*")), {}
    for name, tensor in weights.tensors.items():
        first = expression.sub(again.format(0), name, count=1) if again else name
        if first == name or first not in weights.tensors:
            found[name] = tensor
        elif not np.array_equal(tensor.read(), weights.tensors[first].read()):
            raise WeightsError("a tensor is not the one that it repeats", at=f"{at}: {name}",
                               expected=f"the values of {first}, which all blocks share here")  # fmt: skip
    return weights._replace(tensors=found)


def labels(classes: int) -> dict[str, dict[str, str]]:
    """How Hugging Face's settings say how many classes there are."""
    return {"id2label": {str(n): f"LABEL_{n}" for n in range(classes)}}


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """With what the parts of a model say, behind a dot."""
    parts = {name: part for name, part in about.items() if isinstance(part, dict)}
    return {**about, **{f"{name}.{rest}": value for name, part in parts.items() for rest, value in part.items()}}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
