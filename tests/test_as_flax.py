# SPDX-License-Identifier: Apache-2.0
"""Programs that import Flax run on batiste, unchanged, and see of it what they would see of Flax and of Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = (sys.executable, "-m", "batiste.as_flax")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


LOOKS = """
import importlib.metadata, importlib.util, json, numpy, pickle, pkgutil, sys
had = [importlib.util.find_spec("flax").name, "jax" in sys.modules]

import flax
from flax import linen as nn, struct
import flax.linen.attention
import flax.training.train_state
from flax.core import FrozenDict
from flax.version import __version__
from flax import *
import batiste, batiste.linen, batiste.nnx

params = {"params": {"kernel": numpy.ones((1, 2)), "bias": numpy.ones(2)}}

def missing(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return str(error)

print(json.dumps({
    "found": had,
    "versions": [flax.__version__, __version__, importlib.metadata.version("FLAX")],
    "ours is": batiste.__version__,
    "same": [flax.nnx is batiste.nnx, nn is batiste.linen, nn is sys.modules["flax.linen"],
             flax.linen.attention is sys.modules["batiste.linen.attention"], flax.struct is struct,
             pickle.loads(pickle.dumps(nn.Dense)) is nn.Dense, nn.__spec__.name == "batiste.linen"],
    "missing": [missing("flax.nope"), missing("flax.linen.nope"), hasattr(flax, "nope"), hasattr(flax, "__nope__")],
    "distributions": [d.version for d in importlib.metadata.distributions(name="flax")][0],
    "is listed": "flax" in [d.name for d in importlib.metadata.distributions()],
    "needs": importlib.metadata.requires("flax"),
    "below": "flax.linen" in [m.name for m in pkgutil.iter_modules(flax.__path__, "flax.")],
    "listed": {"linen", "nnx", "__version__"} <= set(dir(flax)),
    "errors": issubclass(flax.errors.ScopeParamShapeError, flax.errors.FlaxError),
    "apply": nn.Dense(2).apply(params, numpy.ones((1, 1))).tolist(),
}))
"""


def test_a_program_sees_flax(tmp_path):
    (tmp_path / "looks.py").write_text(LOOKS)
    ended = run(*LAUNCH, "looks.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    assert seen.pop("ours is") != "0.12.8"
    assert seen == {
        "found": ["flax", False],
        "versions": ["0.12.8"] * 3,
        "same": [True] * 7,
        "missing": ["No module named 'flax.nope'", "No module named 'flax.linen.nope'", False, False],
        "distributions": "0.12.8",
        "is listed": True,
        "needs": None,
        "below": True,
        "listed": True,
        "errors": True,
        "apply": [[2.0, 2.0]],
    }


TELLS = """
import sys
main = sys.modules["__main__"]
print(sys.argv, __name__, __file__, __package__, __spec__ and __spec__.name, main.__dict__ is globals(), sys.path[0])
def fail():
    raise ValueError("boom")
if sys.argv[1:] == ["fail"]:
    fail()
if sys.argv[1:] == ["interrupt"]:
    raise KeyboardInterrupt
if sys.argv[1:]:
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A file, a file with a mistake, a package, a folder and an archive with a program."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "tells.py").write_text(TELLS)
    (folder / "wrong.py").write_text("a b\n")
    for name in ("package", "folder"):
        (folder / name).mkdir()
        (folder / name / "__main__.py").write_text(TELLS)
    (folder / "package" / "__init__.py").touch()
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", TELLS)
    return folder


@pytest.mark.parametrize(
    "command",
    ["tells.py", "tells.py 3 -m x", "tells.py fail", "tells.py interrupt", "wrong.py", "nowhere.py", "-m tells 4",
     "-m tells fail", "-m package", "-m wrong", "-m nowhere", "-m nowhere.inside", "folder 5", "archive.zip fail"],
)  # fmt: skip
def test_arguments_main_status_and_traceback_are_those_of_python(command, programs):
    expected = run(sys.executable, *command.split(), cwd=programs)
    ended = run(*LAUNCH, *command.split(), cwd=programs)
    assert ended.returncode == expected.returncode
    assert ended.stdout == expected.stdout
    assert without_frozen(ended.stderr) == without_frozen(expected.stderr)


def without_frozen(text: str) -> str:
    """An error text without Python's own frames, and without the head of a traceback that had no others."""
    text = re.sub(r'  File "<frozen .*\n', "", text)
    return text.removeprefix("Traceback (most recent call last):\n") if "SyntaxError" in text else text


def test_the_command_explains_itself(tmp_path):
    ended = run(*LAUNCH, "--help", cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout.startswith("usage: python -m batiste.as_flax [-h] PROGRAM")
    for wrong in ([], ["-x"], ["-m"]):
        ended = run(*LAUNCH, *wrong, cwd=tmp_path)
        assert ended.returncode == 2 and "no PROGRAM or MODULE to run" in ended.stderr


def test_the_real_flax_that_was_imported_first_is_an_error(tmp_path):
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").touch()
    program = """
import batiste
batiste.install_as_flax()
batiste.install_as_flax()
import sys
del sys.meta_path[0]
import flax
try:
    batiste.install_as_flax()
except ImportError as error:
    print(type(error).__name__, error)
"""
    ended = run(sys.executable, "-c", program, cwd=tmp_path)
    assert ended.stdout.startswith("FlaxImportedError The real Flax was already imported, as 'flax' from "), ended
    assert "Fix: call batiste.install_as_flax() before" in ended.stdout
