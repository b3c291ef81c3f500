# SPDX-License-Identifier: Apache-2.0
"""Saving a tree to a file, at once or in the background, and loading one."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from batiste.checkpoint import sealed, together
from batiste.checkpoint.errors import NotFoundError
from batiste.checkpoint.files import Fs
from batiste.checkpoint.foreign import Foreign, is_sealed
from batiste.checkpoint.leaves import SCALARS, Leaves, is_key_array, nested
from batiste.checkpoint.match import Choice, Rename, described, impl_of, matched
from batiste.checkpoint.sealed import Entry, Sealed, Written
from batiste.graph.errors import ArgumentError

FS = Fs()
_unheard: list[Saving] = []  # background saves whose outcome nobody has asked for
_unheard_lock = threading.Lock()


# ---------------------------------------------------------------- saving


def save(
    path: str | os.PathLike[str], tree: Any, *, step: int | None = None, healthy: bool | None = None,
    metrics: Mapping[str, float] | None = None, fs: Fs = FS,
) -> None:  # fmt: skip
    """Writes a model, an optimizer, variables, a train state or any tree of them to one file.

    On return the file is on the medium; until then `path` is what it was before. The file remembers `step`, `metrics`
    and whether it is `healthy`: by default, whether no value is NaN or infinite (a single number may be infinite).
    Of several processes all call this; each writes what it holds, to a file of its own beside `path`, and all return
    when the whole is saved.

    Raises:
        SaveError: the operating system refused something; also of an earlier `save_async` that nobody waited for.
    """
    raise_unheard()
    _write(fs, Path(path), _taken(Leaves(tree).values, keep=False), _about(step, healthy, metrics))


def save_async(
    path: str | os.PathLike[str], tree: Any, *, step: int | None = None, healthy: bool | None = None,
    metrics: Mapping[str, float] | None = None, fs: Fs = FS,
) -> Saving:  # fmt: skip
    """`save` in a thread: the values are those of now, whatever happens to the tree afterwards, donation included.

    The program's end waits for the thread. An error comes out of `wait()`, else out of the next save of the program,
    else it ends the program with a message and status 1.
    """
    raise_unheard()
    return Saving(fs, Path(path), _taken(Leaves(tree).values, keep=True), _about(step, healthy, metrics))


class Saving:
    """A save that goes on in the background.

    Raises (from `wait`):
        SaveError: it failed.
    """

    def __init__(self, fs: Fs, path: Path, leaves: list[Taken], about: dict[str, Any]):
        self.path = path
        self._error: BaseException | None = None
        with _unheard_lock:
            _unheard.append(self)
        self._thread = threading.Thread(target=self._run, args=(fs, leaves, about), name=f"save {path.name}")
        self._thread.start()  # not a daemon: the interpreter waits for it

    def _run(self, fs: Fs, leaves: list[Taken], about: dict[str, Any]) -> None:
        try:
            _write(fs, self.path, leaves, about)
        except BaseException as error:
            self._error = error
        else:
            self._heard()

    def _heard(self) -> None:
        with _unheard_lock:
            if self in _unheard:
                _unheard.remove(self)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the checkpoint is on the medium."""
        self._thread.join()
        self._heard()
        if self._error is not None:
            raise self._error


def raise_unheard() -> None:
    """Raises the error of a background save that nobody waited for."""
    with _unheard_lock:
        ended = [saving for saving in _unheard if saving.done()]
    for saving in ended:
        saving.wait()


@atexit.register
def _fail_at_exit() -> None:
    failed = [saving for saving in _unheard if saving.done() and saving._error is not None]
    if failed:
        for saving in failed:
            print(f"batiste: the checkpoint {saving.path} was NOT saved: {saving._error}", file=sys.stderr)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Taken:
    """A leaf as it was at one moment: an array (on a device or the host) or a Python value."""

    def __init__(self, name: str, value: Any):
        self.name, self.value, self.impl = name, value, None
        self.now: Written | None = None
        if is_key_array(value):
            self.impl = impl_of(value)
            if self.impl not in sealed.IMPLS:
                raise ArgumentError("A checkpoint cannot hold keys of this kind", at=name, got=self.impl)
            self.value = jax.random.key_data(value)
        elif isinstance(value, jax.ShapeDtypeStruct):
            raise ArgumentError("This entry is a shape without values", at=name, got=described(value))
        if isinstance(self.value, Tracer):
            raise ArgumentError("A tracer cannot be saved", at=name, fix="return the state, and save it outside of jit")
        dtype = getattr(self.value, "dtype", None)
        if dtype is not None and np.dtype(dtype).name not in sealed.DTYPES:
            raise ArgumentError("A checkpoint cannot hold this dtype", at=name, got=dtype)

    def written(self) -> Written:
        """Its content on the host: one box for each part that lies on a device of its own.

        Of several processes each has the boxes that it holds; what all hold is the first one's.
        """
        x = self.value
        if self.now is not None:
            return self.now
        if isinstance(x, SCALARS) and not isinstance(x, np.generic):
            return Written(self.name, scalar=x)
        if jax.process_index() and not (isinstance(x, jax.Array) and not x.is_fully_addressable):
            boxes = ()
        elif isinstance(x, jax.Array):
            boxes = tuple(_box(shard) for shard in x.addressable_shards if shard.replica_id == 0)
        else:
            boxes = (((0,) * np.ndim(x), np.asarray(x)),)
        return Written(self.name, np.dtype(x.dtype), tuple(x.shape), boxes, self.impl)


def _box(shard: Any) -> tuple[tuple[int, ...], np.ndarray]:
    return tuple(cut.start or 0 for cut in shard.index), np.asarray(shard.data)


def _taken(values: Mapping[str, Any], keep: bool) -> list[Taken]:
    """The leaves; to `keep` them, nothing that happens to their arrays may change what was taken."""
    leaves = [Taken(name, value) for name, value in values.items()]
    if keep:
        on_devices: dict[Any, list[Taken]] = {}
        for leaf in leaves:
            if isinstance(leaf.value, np.ndarray):
                leaf.value = np.array(leaf.value)
            elif isinstance(leaf.value, jax.Array):
                if next(iter(leaf.value.devices())).platform == "cpu":
                    leaf.now = leaf.written()  # views of the memory, which JAX then does not donate
                else:
                    on_devices.setdefault(leaf.value.sharding, []).append(leaf)
        for group in on_devices.values():
            for leaf, copy in zip(group, _copies([leaf.value for leaf in group])):
                leaf.value = copy
    return leaves


_copies = jax.jit(lambda xs: [jnp.copy(x) for x in xs])


def _about(step: int | None, healthy: bool | None, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    metrics = {str(name): float(x) for name, x in (metrics or {}).items()}
    if strange := {name: x for name, x in metrics.items() if not np.isfinite(x)}:
        metrics = {name: x for name, x in metrics.items() if name not in strange}
        healthy = False
    return {"step": None if step is None else int(step), "healthy": healthy, "metrics": metrics}


def _write(fs: Fs, path: Path, leaves: list[Taken], about: dict[str, Any]) -> None:
    together.write(fs, path, lambda: (leaf.written() for leaf in leaves), about)


# ---------------------------------------------------------------- loading


def load(
    path: str | os.PathLike[str], into: Any = None, *, rename: Rename = None, ignore: Choice = (),
    partial: Choice = False, cast: Choice = False, max_bytes: int | None = None, fs: Fs = FS,
) -> Any:  # fmt: skip
    """A checkpoint's values in `into`: objects in it are written into, all else is returned anew; each array lies where
    its counterpart lies, on whatever mesh. Without `into`, nested dicts of NumPy arrays.

    Also reads folders that Orbax wrote and msgpack files that Flax wrote.

    Args:
        into: of the same structure as what was saved; `jax.ShapeDtypeStruct`s (with a sharding) will do for arrays.
        rename: `{"in the file": "in the model"}`, for entries and for whole branches; or a function of the name.
        ignore: names or patterns of entries of the file that are not wanted, or True for all.
        partial: names or patterns of entries of `into` that keep their values when the file lacks them, or True.
        cast: names or patterns of entries that may be converted to another dtype, or True.
        max_bytes: refuse, before memory is taken, a checkpoint with more bytes of arrays.

    Raises:
        NotFoundError, CorruptError: there is no checkpoint, or it is damaged; nothing was written.
        MismatchError: entries do not fit; nothing was written, and the table shows all of them.
    """
    return reading(Path(path), into, rename=rename, ignore=ignore, partial=partial, cast=cast, max_bytes=max_bytes,
                   fs=fs)()  # fmt: skip


def reading(
    path: Path, into: Any = None, *, rename: Rename = None, ignore: Choice = (), partial: Choice = False,
    cast: Choice = False, max_bytes: int | None = None, fs: Fs = FS,
) -> Callable[[], Any]:  # fmt: skip
    """What reads a checkpoint and checks it whole; the function that it returns puts the values in `into`.

    With objects in `into`, a fault in the last entry, or in another process, must find the first one unwritten.
    """
    with _opened(fs, path, max_bytes) as source:
        if into is None:
            free = {name: _free(source.read(entry), entry) for name, entry in source.entries.items()}
            return lambda: nested(free)
        leaves = Leaves(into)
        fits = matched(source.entries, leaves.values, path, rename, ignore, partial, cast)
        new = {name: _from(source, entry, leaves.values[name]) for name, entry in fits.items()}
    return lambda: leaves.restored({**leaves.values, **new})


def verify(path: str | os.PathLike[str], fs: Fs = FS) -> dict[str, Any]:
    """Reads a checkpoint whole, checks every byte, and returns what `peek` returns.

    Raises:
        CorruptError: it is not what was written.
    """
    with _opened(fs, Path(path), None) as source:
        source.verify()
        return source.about


def peek(path: str | os.PathLike[str], fs: Fs = FS) -> dict[str, Any]:
    """What a checkpoint says of itself, without reading its arrays: step, healthy, metrics, versions, and `entries`."""
    with _opened(fs, Path(path), None) as source:
        return {**source.about, "entries": {name: described(entry) for name, entry in source.entries.items()}}


def _opened(fs: Fs, path: Path, max_bytes: int | None) -> Sealed | Foreign:
    if not path.exists():
        raise NotFoundError("There is no checkpoint", at=str(path), fix="look at the path")
    return Sealed(fs, path, max_bytes) if is_sealed(path) else Foreign(path, max_bytes)


def _free(value: Any, entry: Entry) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(value), impl=entry.impl) if entry.impl else value


def _from(source: Sealed | Foreign, entry: Entry, like: Any) -> Any:
    """An entry where its counterpart lies; of an array that spans processes only what this one holds is read."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or sharding.is_fully_addressable or entry.dtype is None:
        return placed(source.read(entry), entry, like)
    cuts = list(sharding.addressable_devices_indices_map(like.shape).values())
    value = source.read(entry, cuts)
    if entry.impl is not None:  # bits have one dim more, which no mesh divides
        bits = jax.make_array_from_callback(value.shape, sharding, lambda cut: value[cut])
        return jax.random.wrap_key_data(bits, impl=entry.impl)
    return jax.make_array_from_callback(like.shape, sharding, lambda cut: np.asarray(value[cut], like.dtype))


def placed(value: Any, entry: Entry, like: Any) -> Any:
    """A value read from a file as what stands in the tree: a Python value, a host array, or an array on its devices."""
    if isinstance(like, SCALARS) and not isinstance(like, np.generic):
        return type(like)(value.item() if isinstance(value, np.ndarray) else value)
    if entry.impl is not None:
        key = jax.random.wrap_key_data(jnp.asarray(value), impl=entry.impl)
        return _put(key, like)
    value = np.asarray(value, like.dtype)
    if isinstance(like, np.generic):
        return value[()]
    return value if isinstance(like, np.ndarray) else _put(value, like)


def _put(value: Any, like: Any) -> jax.Array:
    settled = like.sharding is not None and getattr(like, "committed", True)
    return jax.device_put(value, like.sharding) if settled else jnp.asarray(value)
