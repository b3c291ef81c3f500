# SPDX-License-Identifier: Apache-2.0
"""Opening files of weights, whatever their format: only what says where tensors lie is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batiste.graph.strict import parse_json

from .gguf import open_gguf
from .safetensors import FILE, INDEX, STEMS, open_safetensors
from .tensors import Weights, WeightsError
from .torch_files import open_torch

SUFFIXES = {".safetensors": open_safetensors, ".gguf": open_gguf,
            **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".jit"), open_torch)}  # fmt: skip
IN_FOLDERS = {
    **{name.format(stem): open_safetensors for stem in STEMS for name in (INDEX, FILE)},
    **dict.fromkeys(("pytorch_model.bin.index.json", "pytorch_model.bin"), open_torch),
}
MOST_SETTINGS = 1 << 24  # bytes of a config.json


def open_weights(path: str | Path) -> Weights:
    """The tensors of a safetensors, PyTorch or GGUF file, or of a folder with one or with an index of several.

    No file is executed, and nothing of a tensor is read before it is called for.

    Raises:
        WeightsError: a file is missing, damaged, hostile, or of another format.
    """
    path = Path(path)
    if path.is_dir():
        return next((opened for name, opened in IN_FOLDERS.items() if (path / name).exists()), open_safetensors)(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError("a file's ending says its format", at=str(path), got=repr(path.suffix),
                           expected=", ".join(SUFFIXES))  # fmt: skip
    return SUFFIXES[path.suffix](path)


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a file, such as `config.json`.

    Raises:
        WeightsError: there is none, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError("the files do not say what the model is", at=str(path), fix="pass config=")
    if path.stat().st_size > MOST_SETTINGS:
        raise WeightsError("settings are not that long", at=str(path), got=f"{path.stat().st_size} bytes",
                           expected=f"at most {MOST_SETTINGS}")  # fmt: skip
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise WeightsError("this is no JSON", at=str(path), got=str(error)[:80]) from None
    if not isinstance(found, dict):
        raise WeightsError("this is no JSON object", at=str(path), got=type(found).__name__)
    return found
