# SPDX-License-Identifier: Apache-2.0
"""The seal of a bundle: a manifest with the digest of every file, signed where a key is given."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

from batiste.graph.errors import BatisteError

FILES = ("program.bin", "weights.safetensors", "golden.safetensors", "signature.json")
SMALL = 1 << 20


class BundleError(BatisteError, ValueError):
    """A bundle that is damaged, incomplete, or not signed as it should be."""


def read(folder: Path, name: str, most: int) -> bytes:
    """The bytes of a plain file of at most `most` bytes; links are refused."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{name} of the bundle cannot be read: {error.strerror}") from error
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise BundleError(f"{name} of the bundle is no plain file of at most {most} bytes")
        return file.read(most + 1)


def seal(folder: Path, contents: dict[str, bytes], key: bytes | None) -> None:
    """Writes the files and, last, the manifest."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = json.dumps(digests, indent=1).encode()
    if key is not None:
        (folder / "manifest.hmac").write_text(hmac.new(key, manifest, "sha256").hexdigest())
    (folder / "manifest.json").write_bytes(manifest)


def unseal(folder: Path, key: bytes | None, max_bytes: int) -> dict[str, bytes]:
    """The files of a bundle, each as it was written; nothing of them has been parsed."""
    manifest = read(folder, "manifest.json", SMALL)
    if key is not None:
        signature = read(folder, "manifest.hmac", 64)
        if not hmac.compare_digest(signature, hmac.new(key, manifest, "sha256").hexdigest().encode()):
            raise BundleError("the bundle is not signed with this key")
    try:
        digests = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise BundleError("manifest.json of the bundle is no JSON") from error
    if not isinstance(digests, dict) or set(digests) != set(FILES):
        raise BundleError(f"manifest.json of the bundle must name exactly {', '.join(FILES)}")
    contents = {}
    for name in FILES:
        contents[name] = read(folder, name, max_bytes)
        if hashlib.sha256(contents[name]).hexdigest() != digests[name]:
            raise BundleError(f"{name} of the bundle was changed since it was written: its sha256 is another")
    return contents
