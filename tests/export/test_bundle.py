# SPDX-License-Identifier: Apache-2.0
"""Bundles: written and read, of any size; models of all kinds; what cannot be exported is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen, nnx
from batiste.checkpoint import SaveError
from batiste.export import Bundle, ExportError, GoldenError, PlatformError, ShapeDtype, export, load_bundle
from batiste.graph.errors import ArgumentError, DtypeError, ShapeError
from batiste.models import BERTS, Bert

KEY = b"a secret of 16 bytes"


class Net(nnx.Module):
    """With everything that a call may write: statistics, counts of random numbers, intermediates."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Intermediate(jnp.float32(0))

    def __call__(self, x):
        y = self.norm(self.linear(x))
        self.seen[...] = y.mean()
        return self.dropout(y)

    def twice(self, x):
        return {"once": self(x), "twice": (2 * self(x), x.sum(axis=1))}


class Functional(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        return linen.BatchNorm(use_running_average=not train)(linen.Dense(3)(x))


def net() -> Net:
    model = Net(nnx.Rngs(0))
    model.eval()
    return model


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "bundle"
    export(net(), {"x": "float32[batch, 4]"}, path, key=KEY, labels=["a", "b", "c"], about={"team": "vision"})
    return path


# ---------------------------------------------------------------- what a bundle is


def test_a_bundle_agrees_with_its_model_at_any_batch_size(folder: Path) -> None:
    bundle = load_bundle(folder, KEY)
    assert bundle.verify() <= 1e-6
    for batch in (1, 5):
        x = np.random.default_rng(batch).normal(size=(batch, 4)).astype("f4")
        np.testing.assert_allclose(bundle(x=x)["output"], net()(x), atol=1e-6)
    assert bundle.programs == 3


def test_a_bundle_says_what_it_is(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.signature.inputs == {"x": ShapeDtype(("batch", 4), "float32")}
    assert bundle.signature.outputs == {"output": ShapeDtype(("batch", 3), "float32")}
    said = bundle.described
    assert (said.labels, said.about, said.platforms) == (("a", "b", "c"), {"team": "vision"}, ("cpu", "cuda", "tpu"))
    assert said.environment["jax"] == jax.__version__
    assert "linear/kernel" in bundle.weights and not any("rng" in name for name in bundle.weights)
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == [
        "bundle.json", "golden.safetensors", "program.bin", "weights.safetensors",
    ]  # fmt: skip


def test_the_weights_are_plain_safetensors(folder: Path) -> None:
    from safetensors.numpy import load_file

    found = load_file(folder / "weights.safetensors")
    np.testing.assert_array_equal(found["linear/kernel"], net().linear.kernel[...])


def test_a_path_that_is_taken_is_left_alone(folder: Path) -> None:
    with pytest.raises(SaveError, match="already"):
        export(net(), {"x": "float32[batch, 4]"}, folder)
    load_bundle(folder, KEY).verify()


# ---------------------------------------------------------------- models of all kinds


def test_a_method_with_outputs_of_a_tree(tmp_path: Path) -> None:
    bundle = export(net().twice, {"x": "float32[batch, 4]"}, tmp_path / "b")
    assert list(bundle(x=ones(2, 4))) == ["once", "twice/0", "twice/1"]
    assert bundle.signature.outputs["twice/1"] == ShapeDtype(("batch",), "float32")
    named = export(net(), {"x": ones(2, 4)}, tmp_path / "c", method="twice", outputs=["one", "two", "sum"])
    assert str(named.signature) == "(x: float32[2, 4]) -> (one: float32[2, 3], two: float32[2, 3], sum: float32[2])"


def test_inputs_of_other_names_are_handed_over_by_position(tmp_path: Path) -> None:
    bundle = export(lambda weights, *both: both[0] - weights * both[1], {"b": "float32[n]", "a": "float32[n]"},
                    tmp_path / "b", weights=jnp.float32(2))  # fmt: skip
    assert bundle(a=ones(3), b=3 * ones(3))["output"].tolist() == [1, 1, 1]
    model = net()
    bundle = export(
        lambda model, x: model(x) + model.linear(x), {"x": "float32[batch, 4]"}, tmp_path / "c", weights=model
    )
    np.testing.assert_allclose(bundle(x=ones(2, 4))["output"], model(ones(2, 4)) + model.linear(ones(2, 4)), atol=1e-6)


def test_a_bundle_tells_no_path_of_the_place_where_it_was_written(folder: Path) -> None:
    for path in folder.iterdir():
        assert not [name for name in (str(Path(__file__).parent), "batiste/nn") if name.encode() in path.read_bytes()]


def test_a_linen_module(tmp_path: Path) -> None:
    model = Functional()
    variables = model.init(jax.random.key(0), ones(1, 4))
    with pytest.raises(ExportError, match='"mean" in "/BatchNorm_0"'):
        export(model, {"x": "float32[batch, 4]"}, tmp_path / "b", weights=variables)
    bundle = export(model, {"x": "float32[batch, 4]"}, tmp_path / "b", weights=variables, fixed={"train": False})
    assert "params/Dense_0/kernel" in bundle.weights
    np.testing.assert_allclose(
        bundle(x=ones(2, 4))["output"], model.apply(variables, ones(2, 4), train=False), atol=1e-6
    )


def test_a_function_of_weights_of_all_dtypes_and_a_random_key(tmp_path: Path) -> None:
    kinds = ("bfloat16", "float16", "float8_e4m3fn", "int8")
    weights = {
        "int4": jnp.arange(-8, 7).astype(jnp.int4).reshape(5, 3),
        "uint4": jnp.arange(15).astype(jnp.uint4).reshape(5, 3),
        **{name: jnp.arange(15).astype(name).reshape(5, 3) for name in kinds},
        "float8_e4m3b11fnuz": jnp.arange(15).astype(jnp.float8_e4m3b11fnuz).reshape(5, 3),
        "key": jax.random.key(1),
        "unused": jnp.ones(3),
    }

    def f(weights: Any, x: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        noise = jax.random.normal(key) + jax.random.normal(weights["key"])
        outputs = {name: x @ w.astype(jnp.float32) for name, w in weights.items() if name not in ("key", "unused")}
        return {**outputs, "noise": noise, "next": jax.random.split(key)}

    bundle = export(f, {"x": "float32[n, 5]", "key": jax.random.key(0)}, tmp_path / "b", weights=weights)
    assert {name: str(x.dtype) for name, x in bundle.weights.items()} == {
        name: str(x.dtype) for name, x in weights.items() if name != "unused"
    }
    x, key = np.eye(5, dtype="f4"), jax.random.key(7)
    found, expected = bundle(x=x, key=key), f(weights, jnp.asarray(x), key)
    for name in set(expected) - {"next"}:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    assert (found["next"] == expected["next"]).all()


# ---------------------------------------------------------------- what is refused


def refused(tmp_path: Path, model: Any, signature: dict[str, Any], **options: Any) -> str:
    with pytest.raises((ExportError, ArgumentError, GoldenError)) as caught:
        export(model, signature, tmp_path / "refused", **options)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    return str(caught.value)


def test_a_call_that_writes_state(tmp_path: Path) -> None:
    message = refused(tmp_path, Net(nnx.Rngs(0)), {"x": "float32[batch, 4]"})
    assert "BatchStat norm/mean" in message and "model.eval()" in message
    spectral = nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    message = refused(tmp_path, spectral, {"x": "float32[batch, 4]"})
    assert "BatchStat batch_stats" in message and "Param" not in message
    spectral.eval()  # now only the weights are written, and what is written would be written again
    bundle = export(spectral, {"x": "float32[batch, 4]"}, tmp_path / "spectral")
    np.testing.assert_allclose(bundle(x=ones(2, 4))["output"], spectral(ones(2, 4)), atol=1e-6)


def test_a_call_that_draws_random_numbers(tmp_path: Path) -> None:
    message = refused(tmp_path, nnx.Dropout(0.5, rngs=nnx.Rngs(0)), {"inputs": "float32[batch, 4]"})
    assert "draws random numbers" in message and "rngs/count, rngs/key" in message


class Counter(nnx.Module):
    def __init__(self) -> None:
        self.count = nnx.Variable(jnp.float32(0))

    def __call__(self, x):
        self.count[...] += 1
        return x + self.count


def test_a_state_with_which_each_call_begins_anew(tmp_path: Path) -> None:
    assert "Variable count" in refused(tmp_path, Counter(), {"x": "float32[n]"})
    bundle = export(Counter(), {"x": "float32[n]"}, tmp_path / "b", forget=["cou*"])
    assert [bundle(x=ones(1))["output"][0] for _ in range(2)] == [2, 2]


def test_draws_that_no_output_depends_on(tmp_path: Path) -> None:
    rnn = nnx.RNN(nnx.SimpleCell(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("f4")
    bundle = export(rnn, {"inputs": "float32[batch, 5, 4]"}, tmp_path / "b")
    np.testing.assert_allclose(bundle(inputs=x)["output"], rnn(x), atol=1e-5)


class Deep(nnx.Module):
    def __init__(self, depth: int):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(n)) for n in range(depth)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_many_layers_keep_their_order(tmp_path: Path) -> None:
    model, x = Deep(12), np.random.default_rng(0).normal(size=(2, 4)).astype("f4")
    bundle = export(model, {"x": "float32[batch, 4]"}, tmp_path / "b")
    np.testing.assert_allclose(bundle(x=x)["output"], model(x), atol=1e-5)


class Talking(nnx.Module):
    def __init__(self) -> None:
        self.inner = Inner()

    def __call__(self, x):
        return self.inner(x)


class Inner(nnx.Module):
    def __call__(self, x):
        jax.debug.print("{}", x.sum())
        return x


def test_a_callback_names_its_part_and_line(tmp_path: Path) -> None:
    message = refused(tmp_path, Talking(), {"x": "float32[batch, 4]"})
    assert "inner (Inner)" in message and "test_bundle.py" in message


def test_large_constants(tmp_path: Path) -> None:
    table = jnp.ones((600, 600))
    assert "weights=" in refused(tmp_path, lambda x: x @ table, {"x": "float32[batch, 600]"})


def test_golden_outputs_that_are_not_a_number(tmp_path: Path) -> None:
    assert "golden=" in refused(tmp_path, lambda x: jnp.log(x), {"x": "float32[batch, 4]"})


def test_padding_that_changes_the_outputs(tmp_path: Path) -> None:
    buckets = {"batch": (2, 4)}
    assert "output" in refused(
        tmp_path, lambda x: x - x.mean(0, keepdims=True), {"x": "float32[batch, 4]"}, buckets=buckets
    )


def test_signatures_that_do_not_fit(tmp_path: Path) -> None:
    assert "input x" in refused(tmp_path, net(), {"x": "float32(4)"})
    assert "float31" in refused(tmp_path, net(), {"x": "float31[4]"})
    assert "length" in refused(tmp_path, net(), {"x": "float32[batch, 4]"}, limits={"length": 4})
    assert "weights" in refused(tmp_path, Functional(), {"x": "float32[batch, 4]"})
    assert "weights" in refused(tmp_path, net(), {"x": "float32[batch, 4]"}, weights={})
    assert "names" in refused(tmp_path, net(), {"x": "float32[batch, 4]"}, outputs=["a", "b"])
    assert "model" in refused(tmp_path, 3, {})
    with pytest.raises(TypeError, match="unexpected keyword"):
        export(lambda x, y: x + y, {"x": "float32[batch, 4]", "z": "float32[batch, 4]"}, tmp_path / "b")


# ---------------------------------------------------------------- misuse, before anything is compiled


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def test_inputs_that_do_not_fit_are_named(bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match="names: got y, expected x"):
        bundle(y=ones(1, 4))
    with pytest.raises(ShapeError, match=r"input x: got \(1, 5\), expected float32\[batch, 4\]"):
        bundle(x=ones(1, 5))
    with pytest.raises(ShapeError, match="input x"):
        bundle(x=ones(4))
    with pytest.raises(DtypeError, match="astype"):
        bundle(x=np.ones((1, 4)))
    with pytest.raises(DtypeError, match="asarray"):
        bundle(x=[1.0])
    with pytest.raises(ShapeError, match="batch"):
        bundle(x=ones(0, 4))
    assert bundle.programs == 0


def test_sizes_that_belong_together_and_numbers_in_a_range(tmp_path: Path) -> None:
    bundle = export(lambda tokens, mask: jnp.where(mask, tokens, 0), {
        "tokens": "int32[batch, length] < 10", "mask": "bool[batch, length]",
    }, tmp_path / "b", limits={"length": 8})  # fmt: skip
    tokens = np.ones((2, 3), np.int32)
    with pytest.raises(ShapeError, match=r"input mask: got \(2, 4\).*length is 3"):
        bundle(tokens=tokens, mask=np.ones((2, 4), bool))
    with pytest.raises(ArgumentError, match="input tokens: got 10, expected 0 to 9"):
        bundle(tokens=10 * tokens, mask=np.ones((2, 3), bool))
    with pytest.raises(ShapeError, match=r"size length.*got 9, expected 1 to 8"):
        bundle(tokens=np.ones((2, 9), np.int32), mask=np.ones((2, 9), bool))


def test_a_program_for_other_devices(tmp_path: Path) -> None:
    bundle = export(net(), {"x": "float32[batch, 4]"}, tmp_path / "b", platforms=("tpu", "cuda"))
    with pytest.raises(PlatformError, match="got cpu, expected tpu, cuda"):
        bundle(x=ones(1, 4))


def test_numbers_of_64_bits(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        export(lambda x: 2 * x, {"x": "float64[n]"}, tmp_path / "b").verify()
    with pytest.raises(PlatformError, match="JAX_ENABLE_X64"):
        load_bundle(tmp_path / "b")


class Gated(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1))
        self.scale = nnx.Param(jnp.float32(2))

    def __call__(self, x):
        return self.scale * self.down(nnx.relu(self.up(x)))


def test_weights_that_are_spread_over_devices_are_so_where_it_is_loaded(tmp_path: Path) -> None:
    model, x = Gated(), np.random.default_rng(0).normal(size=(3, 4)).astype("f4")
    expected = model(x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    for param, place in ((model.up.kernel, (None, "model")), (model.down.kernel, ("model", "data")), (model.scale, ())):
        param[...] = jax.device_put(param[...], jax.NamedSharding(mesh, jax.P(*place)))
    bundle = export(nnx.merge(*nnx.split(model)), {"x": "float32[batch, 4]"}, tmp_path / "b", buckets={"batch": (4,)})
    assert bundle.described.devices == 4
    again = load_bundle(tmp_path / "b", executables=tmp_path / "kept")
    np.testing.assert_allclose(again(x=x)["output"], expected, atol=1e-6)
    assert again.weights["up/kernel"].sharding.spec == jax.P(None, "model")
    assert len(again.weights["down/kernel"].addressable_shards) == 4
    again.verify()
    assert again.programs == 1
    again.described = dataclasses.replace(again.described, devices=9)
    with pytest.raises(PlatformError, match="more devices: got 8, expected 9"):
        again.check_device()


def test_a_program_of_more_devices(tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    message = refused(tmp_path, lambda x: jax.lax.with_sharding_constraint(x, spread), {"x": "float32[4]"})
    assert "spans devices, and its weights do not: got 2" in message
    bundle = export(net(), {"x": "float32[batch, 4]"}, tmp_path / "b")
    bundle.described = dataclasses.replace(bundle.described, devices=9)
    with pytest.raises(PlatformError, match="more devices: got 8, expected 9"):
        bundle(x=ones(1, 4))


# ---------------------------------------------------------------- open sizes and buckets


def test_buckets_bound_the_programs(folder: Path) -> None:
    bundle = load_bundle(folder, buckets={"batch": (2, 4)})
    assert bundle.compile() == bundle.programs == 2
    for batch in (1, 2, 3, 4):
        x = np.random.default_rng(batch).normal(size=(batch, 4)).astype("f4")
        np.testing.assert_allclose(bundle(x=x)["output"], net()(x), atol=1e-6)
    assert bundle.programs == 2
    with pytest.raises(ShapeError, match=r"batch is outside.*got 5, expected 1 to 4"):
        bundle(x=ones(5, 4))


def test_compile_ahead_of_time(bundle: Bundle) -> None:
    assert bundle.compile({"batch": 2}) == 1 == bundle.programs
    assert bundle.compile([{"batch": 2}, {"batch": 3}]) == 2 == bundle.programs
    with pytest.raises(ArgumentError, match="buckets"):
        bundle.compile()
    with pytest.raises(ArgumentError, match="value"):
        bundle.compile({"length": 2})


def test_what_does_not_lower_with_open_sizes_gets_a_program_for_each_bucket(tmp_path: Path) -> None:
    def stubborn(x: jax.Array) -> dict[str, jax.Array]:
        return {"y": x + len(range(x.shape[0])) * 0, "n": jnp.zeros(7)}

    bundle = export(stubborn, {"x": "float32[batch, 4]"}, tmp_path / "b", limits={"batch": 6})
    assert "_DimExpr" in (bundle.described.fallback or "")
    assert bundle.buckets == {"batch": (1, 4, 6)}
    assert bundle.signature.outputs == {"n": ShapeDtype((7,), "float32"), "y": ShapeDtype(("batch", 4), "float32")}
    assert bundle(x=ones(5, 4))["y"].shape == (5, 4)
    with pytest.raises(ArgumentError, match="no programs for these buckets"):
        load_bundle(tmp_path / "b", buckets={"batch": (2,)})
    assert load_bundle(tmp_path / "b", buckets={"batch": (4,)}).compile() == 1


def test_a_dim_that_cannot_be_cut(tmp_path: Path) -> None:
    def doubled(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, x])

    assert "2*n" in refused(tmp_path, doubled, {"x": "float32[n]"}, buckets={"n": (4,)})
    stubborn = lambda x: doubled(x) + len(range(x.shape[0])) * 0
    assert "output output" in refused(tmp_path, stubborn, {"x": "float32[n]"}, buckets={"n": (4,)})
    bundle = export(doubled, {"x": "float32[n]"}, tmp_path / "b")
    assert bundle(x=ones(3))["output"].shape == (6,)
    with pytest.raises(ArgumentError, match="cut"):
        load_bundle(tmp_path / "b", buckets={"n": (4,)})


@pytest.mark.parametrize("run", ["scan", "unroll"])
def test_dropout_inside_a_stack_draws_nothing_once_it_is_off(run: str, tmp_path: Path) -> None:
    model, tokens = Bert(BERTS["tiny"], rngs=nnx.Rngs(0)), np.arange(12, dtype=np.int32).reshape(2, 6)
    model.set_attributes(nnx.Stack, run=run)
    with pytest.raises(ExportError, match=r"draws random numbers.*dropout"):
        export(model, {"tokens": "int32[batch, 6] < 64"}, tmp_path / "drawing")
    model.eval()
    bundle = export(model, {"tokens": "int32[batch, 6] < 64"}, tmp_path / "b")
    np.testing.assert_allclose(bundle(tokens=tokens)["output"], model(tokens), atol=1e-5)
    assert not [name for name in bundle.weights if "rngs" in name or "pooler" in name], "nothing depends on them"
