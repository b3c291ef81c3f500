# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ and the Python in the pages run, and say what is wrong when they are used wrongly."""

from __future__ import annotations

import gzip
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from batiste import nnx

ROOT = Path(__file__).parents[1]
PROGRAMS = ("digits.py", "digits_functional.py", "digits_linen.py")
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in page.read_text()]


def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """All programs after one epoch; no network is perfect by then. The last one goes on where the first one stopped."""
    folders = {program: tmp_path_factory.mktemp("out") for program in PROGRAMS}
    trained = folders["digits.py"] / "trained.msgpack"
    extra = {"digits.py": ("--save", trained), "digits_linen.py": ("--load", trained)}
    return {
        program: (run(program, "--epochs", 1, "--out", out, "--require", 1.0, *extra.get(program, ())), out)
        for program, out in folders.items()
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_trains_reports_and_draws(program: str, runs: dict) -> None:
    ended, out = runs[program]
    assert "held-out accuracy" in ended.stdout, ended.stderr
    assert "53,194 parameters" in ended.stdout
    assert len(re.findall(r"^│ \d ", ended.stdout, re.M)) == 10, "one row per class"
    for picture in ("curves.png", "confusion.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert ended.returncode == 1
    assert "below the required 100.00%" in ended.stdout


def test_both_styles_train_the_same_network_and_the_other_face_goes_on_from_its_checkpoint(runs: dict) -> None:
    losses = [float(re.findall(r"epoch .*loss ([\d.]+)", ended.stdout)[0]) for ended, _ in runs.values()]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert losses[2] < 0.7 * losses[0]


def test_both_faces_have_one_parameter_tree_and_read_each_others_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    objects, linen = importlib.import_module("digits"), importlib.import_module("digits_linen")
    data = importlib.import_module("digits_data").load("digits")
    images, path = data.test_x[:4], tmp_path / "checkpoint"

    model = objects.Net(data.size, 10, rngs=nnx.Rngs(0))
    model.eval()
    variables = linen.first(data, seed=1)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (variables, objects.variables(model))]
    assert shapes[0] == shapes[1]

    objects.save(model, path)
    np.testing.assert_array_equal(linen.Net(10).apply(linen.restore(variables, path), images), model(images))
    linen.save(variables, path)
    objects.restore(model, path)
    np.testing.assert_array_equal(model(images), linen.Net(10).apply(variables, images))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "nope"), "invalid choice: 'nope'"),
        (("--epochs", "0"), "got '0', expected a whole number above zero"),
        (("--batch", "5000"), "expected at most the 1,437 images"),
        (("--out", __file__), "cannot write to --out"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_a_reason(args: tuple[str, str], message: str) -> None:
    ended = run("digits.py", *args)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture
def digits_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("digits_data")


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_fashion_mnist_is_read_from_idx_files(digits_data: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n))
    data = digits_data.fashion_mnist(tmp_path)
    assert data.train_x.shape == (6, 28, 28, 1)
    assert data.test_y.tolist() == [0, 1, 2]
    assert 0 <= data.train_x.min() < data.train_x.max() <= 1


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc", mtime=0), gzip.compress(b"", mtime=0)]
)
def test_a_damaged_file_is_an_error_with_a_fix(
    content: bytes, digits_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        digits_data.read_idx(tmp_path / "broken.gz")
    assert "broken.gz" in (said := capsys.readouterr().err)
    assert "fix: sudo apt-get install" in said


def test_a_missing_data_set_is_an_error_with_a_fix(
    digits_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits_data.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        digits_data.fashion_mnist(tmp_path / "nowhere")
    assert "fix: sudo apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def test_an_epoch_has_every_image_at_most_once_and_moved_by_at_most_a_pixel(digits_data: ModuleType) -> None:
    x = np.random.default_rng(1).random((20, 8, 8, 1), np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = []
    for images, labels in digits_data.batches(x, np.arange(20), 8, np.random.default_rng(0)):
        for image, i in zip(images, labels):
            moves = [padded[i, a : a + 8, b : b + 8] for a in range(3) for b in range(3)]
            assert any(np.array_equal(image, moved) for moved in moves)
            seen.append(i)
    assert len(seen) == len(set(seen)) == 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_in_a_page_runs(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    program = "\n".join(blocks)
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
