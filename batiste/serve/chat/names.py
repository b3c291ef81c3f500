# SPDX-License-Identifier: Apache-2.0
"""What the models of files and folders are called."""

from __future__ import annotations

import re
from pathlib import Path

from batiste.graph.errors import ArgumentError


def name_of(path: Path) -> str:
    """By which clients ask for the model of a file or folder

    >>> name_of(Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    'smollm2-135m-instruct.q4_1'
    """
    name = path.name.removesuffix(".gguf") if path.suffix == ".gguf" else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-")
    if not name:
        raise ArgumentError("the model needs a name", got=str(path), fix="pass name=")
    return name
