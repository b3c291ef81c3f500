# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back bit for bit, into any sort of tree, on any devices; what does not fit is refused as a
whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from batiste import checkpoint, linen, nnx
from batiste.graph.errors import ArgumentError, StructureError
from batiste.training.train_state import TrainState
from tests.checkpoint.models import Net, bits, run_state

GOLDEN = Path(__file__).parent / "golden"


def test_a_whole_run_comes_back_bit_for_bit_into_the_same_objects(tmp_path: Path) -> None:
    saved, target = run_state(5), run_state(6)
    checkpoint.save(tmp_path / "run.ckpt", saved, step=5)
    model, kernel = target["model"], target["model"].layers[0].kernel
    loaded = checkpoint.load(tmp_path / "run.ckpt", into=target)
    assert bits(loaded) == bits(saved)
    assert loaded["model"] is model
    assert model.layers[0].kernel is kernel is model.tied, "variables stay who they are, ties hold"
    assert loaded["optimizer"].opt_state[0].count[...] == saved["optimizer"].opt_state[0].count[...]
    assert loaded["nothing"] is None


def test_linen_variables_train_states_and_single_values(tmp_path: Path) -> None:
    variables = linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    adam = optax.adam(1e-3)
    first, other = (
        TrainState.create(apply_fn=abs, params=jax.tree.map(lambda x, n=n: x + n, variables["params"]), tx=adam)
        for n in (0, 1)
    )
    stepped = first.apply_gradients(grads=variables["params"]).replace(step=jnp.int32(1))
    for tree, into in (
        (variables, variables),
        (first, other),
        (jnp.arange(3), jnp.zeros(3, int)),
        (nnx.Param(2.0), nnx.Param(1.0)),
    ):
        checkpoint.save(tmp_path / "x", tree)
        assert bits(checkpoint.load(tmp_path / "x", into=into)) == bits(tree)
    checkpoint.save(tmp_path / "x", stepped)
    loaded = checkpoint.load(tmp_path / "x", into=other)
    assert (loaded.step, type(loaded.step)) == (1, int), "a count goes into what holds counts, exactly"
    assert bits(loaded.params) == bits(stepped.params)


def test_without_a_target_there_are_nested_dicts_of_host_arrays(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x", {"a": {"b": jnp.ones(2)}, "k": jax.random.key(3), "n": 4})
    loaded = checkpoint.load(tmp_path / "x")
    assert isinstance(loaded["a"]["b"], np.ndarray)
    assert loaded["n"] == 4
    assert loaded["k"] == jax.random.key(3)


@pytest.mark.parametrize("saved_on", [1, 2, 4, 8])
def test_any_number_of_devices_to_any_other_and_another_axis(saved_on: int, tmp_path: Path) -> None:
    def spread(count: int, spec: P) -> NamedSharding:
        return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("d",)), spec)

    x = jax.random.normal(jax.random.key(0), (8, 16))
    checkpoint.save(tmp_path / "x", {"x": jax.device_put(x, spread(saved_on, P("d")))})
    for count in (1, 2, 4, 8):
        for spec in (P("d"), P(None, "d"), P()):
            target = spread(count, spec)
            for like in (jax.device_put(x * 0, target), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)):
                loaded = checkpoint.load(tmp_path / "x", into={"x": like})["x"]
                np.testing.assert_array_equal(loaded, x)
                assert loaded.sharding == target


def test_a_grid_of_shards_is_put_together(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    x = jnp.arange(8 * 12.0).reshape(8, 12)
    for spec in (P("a", "b"), P("b", "a"), P(("a", "b")), P(None, "a")):
        checkpoint.save(tmp_path / "x", jax.device_put(x, NamedSharding(mesh, spec)))
        np.testing.assert_array_equal(checkpoint.load(tmp_path / "x", into=x), x)


def test_a_background_save_holds_the_values_of_its_call_whatever_happens_then(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, host = step(jnp.zeros(100_000)), np.zeros(1000)
    saving = checkpoint.save_async(tmp_path / "x", {"x": x, "host": host})
    host += 1
    for _ in range(5):
        x = step(x)
    saving.wait()
    loaded = checkpoint.load(tmp_path / "x")
    assert saving.done()
    assert (loaded["x"] == 1).all()
    assert (loaded["host"] == 0).all()


# ---------------------------------------------------------------- what does not fit


def a(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


MISMATCHES: dict[str, tuple[Any, Any, list[str]]] = {
    "shape": ({"k": a(3, 5)}, {"k": a(2, 2)}, ["k shape float32[3,5] float32[2,2]"]),
    "rank": ({"k": a(6)}, {"k": a(2, 3)}, ["k shape float32[6] float32[2,3]"]),
    "stretchable": ({"k": a(1)}, {"k": a(2, 2)}, ["k shape float32[1] float32[2,2]"]),
    "int8 for f32": ({"k": a(2, dtype=jnp.int8)}, {"k": a(2)}, ["k dtype int8[2] float32[2]"]),
    "f32 for int8": ({"k": a(2)}, {"k": a(2, dtype=jnp.int8)}, ["k dtype float32[2] int8[2]"]),
    "bf16": ({"k": a(2)}, {"k": a(2, dtype=jnp.bfloat16)}, ["k dtype float32[2] bfloat16[2]"]),
    "f64 on disk": ({"k": np.ones(2)}, {"k": a(2)}, ["k dtype float64[2] float32[2]"]),
    "text": ({"k": "text"}, {"k": a(2)}, ["k kind str float32[2]"]),
    "text for number": ({"k": "text"}, {"k": 1}, ["k kind str int"]),
    "complex": ({"k": a(2, dtype=jnp.complex64)}, {"k": a(2)}, ["k kind complex64[2] float32[2]"]),
    "infinite count": ({"k": float("inf")}, {"k": 1}, ["k kind float int"]),
    "dict for array": ({"k": {"q": a(2)}}, {"k": a(2)}, ["k missing - float32[2]", "k/q unexpected float32[2] -"]),
    "extra": ({"k": a(2), "x": a(1)}, {"k": a(2)}, ["x unexpected float32[1] -"]),
    "missing": ({"k": a(2)}, {"k": a(2), "b": a(1)}, ["b missing - float32[1]"]),
    "typo": ({"kernle": a(2)}, {"kernel": a(2)}, ["kernel missing - float32[2]", "kernle unexpected float32[2] -"]),
    "key as bits": ({"k": a(2, dtype=jnp.uint32)}, {"k": jax.random.key(0)}, ["k kind uint32[2] key<threefry2x32>[]"]),
    "bits as key": ({"k": jax.random.key(0)}, {"k": a(2, dtype=jnp.uint32)}, ["k kind key<threefry2x32>[] uint32[2]"]),
    "key kind": (
        {"k": jax.random.key(0, impl="rbg")},
        {"k": jax.random.key(0)},
        ["k kind key<rbg>[] key<threefry2x32>[]"],
    ),
    "keys": ({"k": jax.random.split(jax.random.key(0), 3)}, {"k": jax.random.key(0)}, ["k shape key<threefry2x32>[3]"]),
    "int for float": ({"k": 1}, {"k": 1.5}, ["k dtype int float"]),
    "float for int": ({"k": 1.5}, {"k": 1}, ["k dtype float int"]),
    "bool for int": ({"k": True}, {"k": 1}, ["k dtype bool int"]),
    "int too big": ({"k": 300}, {"k": jnp.int8(0)}, ["k dtype int int8[]"]),
    "float cut": ({"k": 0.1}, {"k": jnp.float32(0)}, ["k dtype float float32[]"]),
    "array for number": ({"k": a(1)}, {"k": 1.0}, ["k shape float32[1] float"]),
    "optimizer": (
        optax.sgd(0.1, momentum=0.9).init({"w": a(2)}),
        optax.adam(0.1).init({"w": a(2)}),
        ["0/count missing - int32[]", "0/mu/w missing", "0/nu/w missing", "0/trace/w unexpected float32[2]"],
    ),
    "a dim more": ({"k": a(2, 1)}, {"k": a(2)}, ["k shape float32[2,1] float32[2]"]),
    "list length": ([a(1), a(1)], [a(1)], ["1 unexpected float32[1] -"]),
    "tied": ({"m": {"tied": a(2)}}, {"m": {"a": a(2), "b": a(2)}}, ["m/a missing", "m/b missing", "m/tied unexpected"]),
    "all at once": (
        {"a": a(1), "b": a(2), "c": a(3)},
        {"a": a(2), "b": a(2, dtype=jnp.int32), "d": a(4)},
        ["a shape", "b dtype", "c unexpected", "d missing"],
    ),
}  # fmt: skip


def as_object(tree: Any) -> Any:
    parts = tree if isinstance(tree, dict) else {"t": tree}
    return {"o": nnx.Dict({name: nnx.data(part) for name, part in parts.items()})}


@pytest.mark.parametrize("face", ["tree", "object"])
@pytest.mark.parametrize("case", MISMATCHES)
def test_each_mismatch_is_named_with_both_sides_and_nothing_is_written(case: str, face: str, tmp_path: Path) -> None:
    saved, target, rows = MISMATCHES[case]
    if face == "object":
        saved, target = (as_object(tree) for tree in (saved, target))
    before = bits(target)
    checkpoint.save(tmp_path / "x", saved)
    with pytest.raises(checkpoint.MismatchError, match="fit the checkpoint") as caught:
        checkpoint.load(tmp_path / "x", into=target)
    said = re.sub(r" +", " ", str(caught.value))
    missed = [row for row in rows if row not in said]
    assert not missed, said
    assert f"{len(rows)} entr" in said
    assert "Fix: " in said
    assert bits(target) == before
    if "shape " in said or " kind " in said:
        with pytest.raises(checkpoint.MismatchError):
            checkpoint.load(tmp_path / "x", into=target, cast=True, partial=True, ignore=True)


def test_a_model_of_another_width_is_refused_and_unchanged(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x", Net(0, width=4))
    target = Net(1, width=8)
    before = bits(target)
    with pytest.raises(checkpoint.MismatchError, match="6 entries do not fit") as caught:
        checkpoint.load(tmp_path / "x", into=target)
    assert "layers/0/kernel" in str(caught.value)
    assert bits(target) == before


def test_the_four_words_that_allow_a_difference(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x", {"old": {"w": a(2)}, "extra": {"e": a(1)}, "n": jnp.arange(2)})
    target = {"new": {"w": jnp.zeros(2)}, "head": {"h": jnp.full(3, 7.0)}, "n": jnp.zeros(2, jnp.bfloat16)}
    words = dict(rename={"old": "new"}, ignore=["extra"], partial="head", cast=["n"])
    loaded = checkpoint.load(tmp_path / "x", into=target, **words)
    assert loaded["new"]["w"].tolist() == [1, 1]
    assert loaded["head"]["h"].tolist() == [7, 7, 7]
    assert loaded["n"].dtype == jnp.bfloat16
    assert loaded["n"].tolist() == [0, 1]
    for word in words:
        with pytest.raises(checkpoint.MismatchError):
            checkpoint.load(tmp_path / "x", into=target, **{k: v for k, v in words.items() if k != word})
    upper = checkpoint.load(tmp_path / "x", into={"EXTRA/E": a(1)}, rename=str.upper, ignore=True)
    assert upper["EXTRA/E"] == 1
    with pytest.raises(ArgumentError, match=r"rename names what the checkpoint does not have: got .'odl'."):
        checkpoint.load(tmp_path / "x", into=target, rename={"odl": "new"})
    with pytest.raises(ArgumentError, match="rename gives two entries one name"):
        checkpoint.load(tmp_path / "x", into=target, rename={"old/w": "n"})
    with pytest.raises(checkpoint.MismatchError, match="1 entry does not fit"):
        checkpoint.load(tmp_path / "x", into={"z": 1}, partial=True, ignore=True)


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path) -> None:
    for tree, name in (
        ({"a": {"f": object()}}, "a/f: got object"),
        ({"a": jax.ShapeDtypeStruct((1,), "f4")}, "shape without values at a"),
        ({"a": np.array(["text"])}, "dtype at a"),
        ({"a": np.array([{}], object)}, "dtype at a"),
    ):
        with pytest.raises(ArgumentError, match=name):
            checkpoint.save(tmp_path / "x", tree)
    with pytest.raises(StructureError, match="same name at a/b"):
        checkpoint.save(tmp_path / "x", {"a/b": 1, "a": {"b": 2}})
    with pytest.raises(ArgumentError, match="tracer cannot be saved at x"):
        jax.jit(lambda x: checkpoint.save(tmp_path / "x", {"x": x}))(1.0)
    assert not list(tmp_path.iterdir())


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x", {"w": a(2, 3)}, step=4, metrics={"loss": jnp.float32(0.5)})
    about = checkpoint.verify(tmp_path / "x")
    assert (about["step"], about["healthy"], about["metrics"]) == (4, True, {"loss": 0.5})
    assert set(about["versions"]) == {"batiste", "jax", "numpy"}
    assert checkpoint.peek(tmp_path / "x")["entries"] == {"w": "float32[2,3]"}
    with pytest.raises(
        checkpoint.CorruptError, match=r"larger than max_bytes at .*x: got 24 bytes, expected at most 23"
    ):
        checkpoint.load(tmp_path / "x", max_bytes=23)
    with pytest.raises(checkpoint.NotFoundError, match="There is no checkpoint at"):
        checkpoint.load(tmp_path / "y")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "float8_e5m2", "complex64"])
def test_health_is_that_no_value_is_nan_or_infinite(dtype: str, tmp_path: Path) -> None:
    whole = np.zeros(9, jnp.dtype(dtype))
    for value in (1, np.nan, np.inf, -np.inf):
        array = whole.copy()
        array[7] = value
        checkpoint.save(tmp_path / "x", {"w": array})
        assert checkpoint.peek(tmp_path / "x")["healthy"] == (value == 1)
    checkpoint.save(tmp_path / "x", {"best": np.asarray(np.inf, dtype)}, metrics={"loss": 1.0})
    assert checkpoint.peek(tmp_path / "x")["healthy"], "the best loss so far may be infinite"
    checkpoint.save(tmp_path / "x", {"best": 1.0}, metrics={"loss": np.nan})
    assert not checkpoint.peek(tmp_path / "x")["healthy"]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.ckpt")), ids=lambda file: file.stem)
def test_files_of_earlier_releases_load(file: Path) -> None:
    loaded = checkpoint.load(file, into=run_state(1))
    wanted = run_state(3)
    for tree in (loaded, wanted):
        del tree["model"], tree["optimizer"]  # initial values may change with JAX; their entries were matched above
    assert bits(loaded) == bits(wanted)


# ---------------------------------------------------------------- weights alone


def test_weights_go_through_safetensors(tmp_path: Path) -> None:
    model, other = Net(0), Net(1)
    checkpoint.save_weights(tmp_path / "w.safetensors", model)
    assert checkpoint.load_weights(tmp_path / "w.safetensors", other) is other
    kernels = [net.layers[0].kernel[...] for net in (model, other)]
    np.testing.assert_array_equal(*kernels)
    assert other.table[0] == 1, "only parameters are written"
    assert set(checkpoint.load_weights(tmp_path / "w.safetensors")["layers"]["1"]) == {"bias", "scale"}
    checkpoint.save_weights(tmp_path / "b.safetensors", {"w": a(3, dtype=jnp.bfloat16)})
    assert (
        checkpoint.load_weights(tmp_path / "b.safetensors", {"w": a(3, dtype=jnp.bfloat16) * 0})["w"].tolist()
        == [1] * 3
    )
    with pytest.raises(checkpoint.MismatchError, match="layers/0/kernel"):
        checkpoint.load_weights(tmp_path / "w.safetensors", Net(1, width=5))
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(checkpoint.CorruptError, match="no safetensors file"):
        checkpoint.load_weights(tmp_path / "w.safetensors")
