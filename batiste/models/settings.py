# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of published models as a table, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax.typing import DTypeLike

from .files import open_weights, read_json
from .mapping import Table, load, save
from .tensors import WeightsError

Config = TypeVar("Config")


class Settings(NamedTuple):
    """What a file says of a kind of model.

    Args:
        kind: its `model_type`.
        names: our setting -> theirs; a dot leads into a part.
        fixed: what theirs have to be for the model to be ours; that is also what they are if left out.
    """

    kind: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any]

    def read(self, folder: str | Path, make: type[Config], **more: Any) -> Config:
        """The configuration that a folder's `config.json` describes; `more` is not said there.

        Raises:
            WeightsError: there is none, or it is that of another architecture.
        """
        path = Path(folder) / "config.json"
        about = _flat(read_json(path))
        for name, wanted in {"model_type": self.kind, **self.fixed}.items():
            found = about.get(name, None if name == "model_type" else wanted)
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
        about = {"model_type": self.kind, **self.fixed, **more}
        about |= {theirs: getattr(config, ours) for ours, theirs in self.names.items()}
        nested: dict[str, Any] = {name: value for name, value in about.items() if "." not in name}
        for name in about.keys() - nested.keys():
            part, _, rest = name.partition(".")
            nested.setdefault(part, {})[rest] = about[name]
        (Path(folder) / "config.json").write_text(json.dumps(nested, indent=2, sort_keys=True) + "\n")


class Published(NamedTuple):
    """How models of one kind lie in folders: what makes them, their settings, and the names of their weights.

    Args:
        model, config: the classes.
        head: of a classifier, the tensor that is as long as there are classes.
    """

    model: Callable[..., Any]
    config: type
    settings: Settings
    table: Table
    head: str = ""

    def load(self, path: str | Path, config: Any, dtype: DTypeLike, **more: Any) -> Any:
        """The model of a folder, of the configuration found there if `config` is None; it is not in training.

        Raises:
            WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
        """
        weights = open_weights(path)
        if config is None:
            head = weights.tensors.get(self.head)
            config = self.settings.read(path, self.config, **({"classes": head.shape[0]} if head else {}), **more)
        model = load(lambda rngs: self.model(config, rngs=rngs), weights, self.table, path, dtype=dtype)
        model.eval()
        return model

    def save(
        self, model: Any, folder: str | Path, dtype: DTypeLike | None, shard_bytes: int, **more: Any
    ) -> list[Path]:
        """Writes safetensors, and `config.json` with `more` in it; says which files hold the weights."""
        files = save(model, self.table, folder, dtype=dtype, shard_bytes=shard_bytes)
        self.settings.write(folder, model.config, **more)
        return files


def labels(classes: int) -> dict[str, dict[str, str]]:
    """How Hugging Face's settings say how many classes there are."""
    return {"id2label": {str(n): f"LABEL_{n}" for n in range(classes)}}


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """With what the parts of a model say, behind a dot."""
    parts = {name: part for name, part in about.items() if isinstance(part, dict)}
    return {**about, **{f"{name}.{rest}": value for name, part in parts.items() for rest, value in part.items()}}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
