# SPDX-License-Identifier: Apache-2.0
"""BERT and sentence encoders: against transformers with drawn and with real weights, sizes, errors."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError
from batiste.models.bert import BERT, BERTS, RULES, Bert, BertConfig, load_bert, save_bert
from batiste.models.mapping import entries
from batiste.models.sentences import SentenceEncoder

from .packages import minilm

SMALL = BertConfig(vocab=30, features=16, layers=2, heads=4, hidden=24, positions=12)
TEXTS = [
    "A man is eating food.",
    "The cat sits outside.",
    "A man is eating a piece of bread.",
    "",
    "Plus ça change, plus c'est la même chose. 猫",
    "The new movie is awesome, " * 80,
]


def make(**changes) -> Bert:
    return Bert(BertConfig(**{**SMALL.__dict__, **changes}), rngs=nnx.Rngs(0))


def theirs() -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=24, max_position_embeddings=12)  # fmt: skip
    model = transformers.BertModel(config).eval()
    for value in model.parameters():  # also biases and norms, which begin as zeros and ones
        torch.nn.init.normal_(value, std=0.3)
    return model


@pytest.fixture(scope="module")
def real() -> SentenceEncoder:
    return SentenceEncoder.load(minilm())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_with_drawn_weights_it_computes_what_transformers_computes(form: str, tmp_path: Path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save({f"bert.{name}": value for name, value in reference.state_dict().items()},
                   tmp_path / "pytorch_model.bin")  # fmt: skip
    model = load_bert(tmp_path)
    tokens, types = np.random.default_rng(0).integers(0, 30, (2, 10)), np.arange(20).reshape(2, 10) % 2
    mask = np.arange(10)[None] < np.array([[10], [6]])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), torch.tensor(mask), torch.tensor(types))
    found = model(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(types))
    np.testing.assert_allclose(found[mask], expected.last_hidden_state.numpy()[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.pooled(found), expected.pooler_output.numpy(), rtol=1e-4, atol=1e-5)


def test_real_sentence_vectors_are_those_of_transformers(real: SentenceEncoder) -> None:
    reference = transformers.BertModel.from_pretrained(minilm()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=real.most, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = reference(**batch).last_hidden_state, batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    found = real.encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(real.similarity(TEXTS[:3], TEXTS).round(3), (expected[:3] @ expected.T).round(3))
    assert real.tokens(TEXTS[5]) == real.most == 256


def test_the_order_and_the_company_of_texts_do_not_matter(real: SentenceEncoder) -> None:
    alone = np.concatenate([real.encode([text]) for text in TEXTS[:4]])
    np.testing.assert_allclose(real.encode(TEXTS)[:4], alone, atol=1e-6)
    assert real.encode([]).shape == (0, 384)


def test_lengths_and_rows_come_in_few_sizes(real: SentenceEncoder) -> None:
    traced = []

    class Counted(Bert):
        def __call__(self, tokens_BT: jax.Array, *rest: jax.Array) -> jax.Array:
            traced.append(tokens_BT.shape)
            return super().__call__(tokens_BT, *rest)

    model = Counted(BertConfig(30522, 4, 1, 1, 4, positions=16, dropout=0.0), rngs=nnx.Rngs(0))
    encoder = SentenceEncoder(model, real.tokenizer, most=12, lengths=(4, 8), batch=3)
    assert encoder.lengths == (4, 8, 12) and encoder.batch == 4
    words = [" ".join(["cat"] * n) for n in range(1, 11)]
    for start in range(5):
        encoder.encode(words[start:])
        encoder.encode(words[: start + 1])
    assert len(traced) == len(set(traced))
    assert set(traced) <= {(rows, length) for rows in (1, 2, 4) for length in (4, 8, 12)}


def test_it_is_saved_under_their_names_and_read_by_them(tmp_path: Path) -> None:
    model = make()
    model.eval()
    save_bert(model, tmp_path, shard_bytes=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_bert(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(again, nnx.Param), nnx.state(model, nnx.Param)))
    tokens = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = transformers.BertModel.from_pretrained(tmp_path).eval()(torch.tensor(tokens)).last_hidden_state
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected.numpy(), atol=1e-5)


def test_a_table_has_twenty_lines_and_speaks_of_all(tmp_path: Path) -> None:
    assert len(BERT.names) <= 24
    names = [name for entry in entries(make(), BERT) for name, _ in entry.parts()]
    assert set(names) == {name for name in theirs().state_dict() if "position_ids" not in name}
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True,
                         names={"heads": "tensor", "mlp": "tensor", "vocab": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


def test_with_a_plan_each_value_goes_to_its_place(tmp_path: Path) -> None:
    save_bert(make(), tmp_path)
    with sharding.use(sharding.ready_plan(fsdp=4, tensor=2, rules=RULES, least=16)):
        loaded = load_bert(tmp_path)
    assert loaded.blocks.layers.mlp.up.kernel[...].sharding.spec == jax.P(None, "fsdp", "tensor")


def test_it_trains_with_dropout() -> None:
    model = make(dropout=0.2)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    tokens = jnp.arange(20).reshape(4, 5) % 7

    @nnx.jit
    def step(model: Bert, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Bert) -> jax.Array:
            logits = model(tokens) @ model.token.embedding[...].T
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    same = [model(tokens), model(tokens)]
    assert (same[0] != same[1]).any()
    model.eval()
    assert (model(tokens) == model(tokens)).all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("minilm-l6", 22_713_216), ("bert-base-uncased", 109_482_240), ("bert-large-uncased", 335_141_888),
     ("bert-base-cased", 108_310_272)],
)  # fmt: skip
def test_published_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert BERTS[name].parameters == parameters


def test_what_is_wrong_is_said(real: SentenceEncoder, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="choose heads that divide"):
        make(heads=3)
    with pytest.raises(ArgumentError, match="layers is a size"):
        make(layers=0)
    with pytest.raises(ShapeError, match="rows of tokens"):
        make()(jnp.zeros((1, 13), int))
    with pytest.raises(ArgumentError, match="no pooler"):
        make(pooled=False).pooled(jnp.zeros((1, 2, 16)))
    with pytest.raises(ArgumentError, match="of another model"):
        SentenceEncoder(make(), real.tokenizer, most=8)
    with pytest.raises(ArgumentError, match="most=1"):
        SentenceEncoder(real.model, real.tokenizer, most=1)
    save_bert(make(), tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        SentenceEncoder.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="tokenizer cannot be read"):
        SentenceEncoder.load(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"vocab_size": 31}, "embeddings.word_embeddings.weight"),
        ({"model_type": "llama"}, "of an architecture"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_size": "16"}, "do not describe"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(WeightsError, match=message):
            load_bert(tmp_path)
