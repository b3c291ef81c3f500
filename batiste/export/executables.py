# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on this machine, so that a restarted program does not compile again.

An executable is code of this machine: none is loaded but those that this user wrote. The folder belongs to the user, no
one else may write it, and each file is sealed by a key (HMAC-SHA256) that was drawn when the folder was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from batiste.checkpoint.files import Fs, write_all, write_sealed
from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

KEY, SUFFIX = "key", ".executable"
SEAL = 32


class Executables:
    """The executables in a folder, by what they were compiled from and for.

    Raises:
        ArgumentError: the folder belongs to somebody else, or others may write it.
    """

    def __init__(self, folder: str | os.PathLike[str], fs: Fs | None = None):
        self.folder, self._fs = Path(folder), fs or Fs()
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        about = os.stat(self.folder)
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
            raise ArgumentError("Others could put programs into the folder of executables", at=str(self.folder),
                                fix=f"chmod go-w {self.folder}, or take another folder")  # fmt: skip
        self._key = self._own_key()

    def _own_key(self) -> bytes:
        path = self.folder / KEY
        with contextlib.suppress(FileNotFoundError):
            key = path.read_bytes()
            if len(key) == SEAL and not stat.S_IMODE(path.stat().st_mode) & 0o077:
                return key
            path.unlink()  # what was sealed with it is compiled again
        with contextlib.suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "wb") as writer:
                writer.write(secrets.token_bytes(SEAL))
        return path.read_bytes()

    def get(self, name: str, in_tree: Any, out_tree: Any) -> Any | None:
        """The executable of this name, ready to be called; None if there is none that can be used here."""
        try:
            content = (self.folder / (name + SUFFIX)).read_bytes()
        except OSError:
            return None
        if not hmac.compare_digest(content[:SEAL], self._seal(name, content[SEAL:])):
            return None
        with contextlib.suppress(Exception):  # of another build of XLA: it is compiled again
            return _loaded(content[SEAL:], in_tree, out_tree)
        return None

    def put(self, name: str, compiled: Any, args: tuple[Any, ...]) -> None:
        """Keeps an executable that runs with `args`; none where the platform cannot write one that does."""
        try:
            content, in_tree, out_tree = _serializer().serialize(compiled)
            jax.block_until_ready(_loaded(content, in_tree, out_tree)(*args))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return
        sealed = memoryview(self._seal(name, content) + content)
        write_sealed(self._fs, self.folder / (name + SUFFIX), lambda file: write_all(self._fs, file, sealed))

    def _seal(self, name: str, content: bytes) -> bytes:
        return hmac.digest(self._key, name.encode() + b"\0" + content, "sha256")


def _serializer() -> Any:
    return need("jax.experimental.serialize_executable", extra="export")


def _loaded(content: bytes, in_tree: Any, out_tree: Any) -> Any:
    return _serializer().deserialize_and_load(content, in_tree, out_tree, execution_devices=jax.local_devices()[:1])


def named_anew(function: Callable[..., Any]) -> Any:
    """The function, jitted under a name of its own: so it is compiled, and not found in JAX's cache on disk.

    On a CPU, an executable from there cannot be written again: it runs, but what is written of it lacks code.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = f"bundle_{secrets.token_hex(8)}"
    return jax.jit(call)


def executable_name(bundle: str, program: str, room: Mapping[str, int]) -> str:
    """Of all that an executable depends on: the bundle, the sizes, JAX, XLA and its flags, the chip, the driver."""
    device = jax.devices()[0]
    parts = [bundle, program, sorted(room.items()), jax.__version__, version("jaxlib"), device.platform,
             device.device_kind, device.client.platform_version, device.client.runtime_type,
             [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")], cpu_features()]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cpu_features() -> str:
    """What the processor can do: machine code that was made for another one may not run."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()
    return ""
