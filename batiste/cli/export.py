# SPDX-License-Identifier: Apache-2.0
"""`batiste export`, `verify`, `reexport`: bundles from experiments, their proof, and new ones from old ones."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from batiste import export as bundles
from batiste.checkpoint import SaveError
from batiste.export import Bundle, BundleError
from batiste.graph import Module
from batiste.graph.errors import BatisteError

from .judge import experiment
from .restore import restored
from .usage import NEGATIVE, OK, UsageError


def export(args: Namespace) -> int:
    """The model of an experiment, of a checkpoint if one is named, as a bundle."""
    made = experiment(args, "state", "export")
    out, key = wanted(args, "out", "--out BUNDLE"), key_of(args)
    model = restored(made, args.checkpoint)
    if isinstance(model, Module):
        model.eval()
    assert made.export is not None
    arguments: dict[str, Any] = {"model": model, **made.export(model)}
    return told(lambda: bundles.export(arguments.pop("model"), path=out, key=key, **arguments))


def verify(args: Namespace) -> int:
    """Checks a bundle; 1 if it is damaged, not signed with the key, or gives other outputs here."""
    path = wanted(args, "bundle", "a bundle")
    if not Path(path).is_dir():
        raise UsageError("There is no bundle", got=path)
    try:
        bundle = bundles.load_bundle(path, key_of(args), allow_unsigned=args.allow_unsigned)
        difference = bundle.verify()
    except BundleError as error:
        print(f"batiste verify: {error}", file=sys.stderr)
        return NEGATIVE
    print(f"{bundle.signature}\ngolden outputs agree: the largest difference is {difference:.2g}")
    return OK


def reexport(args: Namespace) -> int:
    """A bundle anew; 1 if the old one is damaged, or the model of today gives other outputs."""
    path, out = wanted(args, "bundle", "a bundle"), wanted(args, "out", "--out BUNDLE")
    sys.path.insert(0, "")
    options = {"key": key_of(args), "allow_unsigned": args.allow_unsigned}
    return told(lambda: bundles.reexport(path, out, args.builder, **options))


def told(write: Any) -> int:
    """Writes a bundle and says what it is; what the model does not allow is an error of the command."""
    try:
        bundle: Bundle = write()
    except BundleError as error:
        print(f"batiste: {error}", file=sys.stderr)
        return NEGATIVE
    except SaveError:
        raise
    except BatisteError as error:
        raise UsageError(str(error).rstrip(".")) from error
    print(f"{bundle.path}: {bundle.signature}")
    if bundle.described.fallback:
        sizes = ", ".join(f"{name} {' '.join(map(str, plan))}" for name, plan in bundle.buckets.items())
        print(f"a program for each of {sizes}, for JAX cannot leave them open: {bundle.described.fallback}")
    return OK


def wanted(args: Namespace, name: str, what: str) -> str:
    """An argument that must be given."""
    value = getattr(args, name)
    if value is None:
        raise UsageError(f"{args.command} needs {what}")
    return value


def key_of(args: Namespace) -> bytes | None:
    """The key in the file that is named."""
    if args.key_file is None:
        return None
    try:
        return Path(args.key_file).read_bytes().strip()
    except OSError as error:
        raise UsageError(f"The key cannot be read: {error}") from error
