# SPDX-License-Identifier: Apache-2.0
"""Comparing models layer by layer: agreement with PyTorch, and the name of the first layer that departs."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.models import DECODERS, Bert, Decoder, activations, load_bert, load_decoder, save_decoder
from batiste.models.bert import BERT
from batiste.models.kinds import LLAMA
from batiste.models.verify import torch_activations, verify

from .test_bert import SMALL, theirs

TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bert, dict[str, np.ndarray]]:
    """Ours with their weights, and what theirs gives."""
    folder = tmp_path_factory.mktemp("bert")
    reference = theirs()
    reference.save_pretrained(folder)
    with torch.no_grad():
        return load_bert(folder), torch_activations(reference, torch.tensor(TOKENS))


def test_layers_agree_with_those_of_pytorch(bert: tuple[Bert, dict[str, np.ndarray]]) -> None:
    found = verify(bert[0], bert[1], (TOKENS,), table=BERT)
    assert found and found.first is None
    names = [d.layer for d in found.differences]
    assert {"token", "norm", "blocks/0/attn/query", "blocks/1/mlp/down", "blocks/1"} <= set(names)
    assert names.index("blocks/0/attn/query") < names.index("blocks/0") < names.index("blocks/1/attn/query")
    assert "all agree" in str(found)


@pytest.mark.parametrize(
    ("path", "first"),
    [("blocks/layers/attn/value/kernel", "blocks/1/attn/value"), ("blocks/layers/mlp_norm/bias", "blocks/1/mlp_norm")],
)
def test_the_first_that_departs_is_named(path: str, first: str, bert: tuple[Bert, dict[str, np.ndarray]]) -> None:
    model = nnx.clone(bert[0])
    part = model
    for name in path.split("/"):
        part = getattr(part, name)
    part[...] = part[...].at[1].add(0.1)  # type: ignore[index]
    found = verify(model, bert[1], (TOKENS,), table=BERT)
    assert not found and found.first is not None
    assert found.first.layer == first
    assert f"{first} is the first that departs" in str(found)
    second = verify(model, bert[0], (TOKENS,))
    assert second.first is not None and second.first.layer == first


def test_decoders_agree_too(tmp_path: Path) -> None:
    model = Decoder(DECODERS["tiny"], rngs=nnx.Rngs(0))
    save_decoder(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = torch_activations(reference, torch.tensor(TOKENS))
    found = verify(load_decoder(tmp_path), expected, (TOKENS,), table=LLAMA, names={"": "lm_head"})
    assert found, str(found)
    assert {"", "blocks/1/mlp/down"} <= {d.layer for d in found.differences}


def test_each_layer_of_a_convolution_is_compared_with_channels_last() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.convs = nnx.List([nnx.Conv(3, 3, (3, 3), rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for conv in self.convs:
                x = conv(x)
            return self.convs[0](x)

    model, x = Net(nnx.Rngs(0)), np.random.default_rng(0).normal(size=(1, 5, 4, 3)).astype(np.float32)
    reference = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
    with torch.no_grad():
        for ours, part in zip(model.convs, reference):
            part.weight.copy_(torch.tensor(np.transpose(ours.kernel[...], (3, 2, 0, 1)).copy()))
            part.bias.copy_(torch.tensor(np.array(ours.bias[...])))
        expected = torch_activations(reference, torch.tensor(np.moveaxis(x, -1, 1).copy()))
    found = verify(model, expected, (jnp.asarray(x),), names={"convs/{}": "{}"})
    assert found and [d.layer for d in found.differences] == ["convs/0", "convs/1"]
    assert list(activations(model, jnp.asarray(x))) == ["convs/0", "convs/1", "convs/0#1", ""]


def test_a_difference_in_shape_departs_and_strangers_are_an_error() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    found = verify(model, {"fc": np.ones((1, 4))}, (jnp.ones((1, 2)),), names={"": "fc"})
    assert "theirs (1, 4)" in str(found) and not found
    with pytest.raises(ArgumentError, match="no layer of the model has a partner"):
        verify(model, {"fc": np.ones((1, 3))}, (jnp.ones((1, 2)),))
    assert not verify(model, {"fc": np.full((1, 3), np.nan)}, (jnp.ones((1, 2)),), names={"": "fc"})
    assert SMALL.layers == 2
