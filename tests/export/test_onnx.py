# SPDX-License-Identifier: Apache-2.0
"""Every layer as ONNX gives in ONNX Runtime what it gives in JAX; open sizes stay open; the rest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from batiste import linen, nnx
from batiste.export import ExportError, ShapeDtype
from batiste.export.onnx import export_onnx
from batiste.export.signature import example
from batiste.graph.errors import ArgumentError
from batiste.models import BERTS, DECODERS, Bert, Decoder
from batiste.models.clip import CLIPS, Clip
from batiste.models.convnext import CONVNEXTS, ConvNext
from batiste.models.efficientnet import EFFICIENTNETS, EfficientNet
from batiste.models.resnet import RESNETS, ResNet
from batiste.models.silero import SILEROS, Silero
from batiste.models.vit import VITS, Vit
from batiste.models.whisper import WHISPERS, Whisper
from tests.parity.case import Case
from tests.parity.layers import CASES

STATE = {
    "attention-dropout-by-call": {"keep": ["rngs/*"]},
    "attention-decode": {"forget": ["cache*"]},
    "attention-decode-shared-heads": {"forget": ["cache*"]},
    "attention-decode-mask": {"forget": ["cache*"]},
}
"""What becomes of state that a call writes: these make their caches in the call itself."""
REFUSED = {"layernorm-complex": "operation real"}


def run(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    return session.run(None, {name: x for name, x in inputs.items() if name in known})


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype) for x in jax.tree.leaves(tree)]


def as_onnx(case: Case, path: Path, **options: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Writes the layer of a case; its inputs, and what JAX computes."""
    layer = case.build(nnx)
    is_module = isinstance(layer, nnx.Module)
    if is_module:
        layer.eval()
    inputs = {f"x{i}": np.asarray(x) for i, x in enumerate(case.inputs)}

    def call(live: Any, **inputs: Any) -> Any:
        return case.call(live, *(inputs[f"x{i}"] for i in range(len(inputs))))

    model, weights = (call, layer) if is_module else (lambda **inputs: call(layer, **inputs), None)
    export_onnx(model, inputs, path, weights=weights, **options)
    given = [jnp.asarray(x) for x in case.inputs]
    if is_module:
        return inputs, nnx.jit(lambda layer, given: case.call(layer, *given))(layer, given)
    return inputs, jax.jit(lambda given: case.call(layer, *given))(given)


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in REFUSED], ids=lambda case: case.name)
def test_a_layer_in_onnx_runtime_agrees_with_jax(case: Case, tmp_path: Path) -> None:
    inputs, expected = as_onnx(case, tmp_path / "layer.onnx", **STATE.get(case.name, {}))
    narrow = "bf16" in case.name
    given = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in inputs.items()}
    found = run(tmp_path / "layer.onnx", **given)
    assert len(found) == len(leaves(expected)) + 2 * ("keep" in STATE.get(case.name, {}))
    for ours, theirs in zip(found, leaves(expected)):
        tolerance = 2e-2 if narrow else 1e-5
        largest = np.abs(theirs, where=np.isfinite(theirs), out=np.ones(theirs.shape)).max(initial=1.0)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * largest)


class Draws(nnx.Module):
    """A cache that is read and written, and a draw."""

    def __init__(self):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
        self.attention.init_cache((2, 3, 4))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.dropout(self.attention(x))


def test_state_that_is_kept_goes_in_and_comes_out(tmp_path: Path) -> None:
    path, keep = tmp_path / "draws.onnx", ["attention/cache*", "dropout/rngs/*"]
    model, x = Draws(), np.random.default_rng(0).normal(size=(3, 2, 1, 4)).astype("f4")
    export_onnx(model, {"x": "float32[2, 1, 4]"}, path, keep=keep)
    names = [output.name for output in onnx.load(path).graph.output]
    given: dict[str, np.ndarray] = {}
    step = nnx.jit(lambda model, x: model(x))
    for token in x:  # the first time with what the model holds
        found = dict(zip(names, run(path, x=token, **given)))
        np.testing.assert_allclose(found.pop("output"), step(model, token), atol=1e-6)
        given = {name.removesuffix("_output"): value for name, value in found.items()}
    assert int(given["attention/cache_index"]) == 3 and int(given["dropout/rngs/count"]) == 3
    with pytest.raises(ArgumentError, match="no such state to keep"):
        export_onnx(Net(nnx.Rngs(0)), {"x": "float32[2, 8, 8, 1]"}, path, keep=["cache"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=REFUSED[name]):
        as_onnx(next(case for case in CASES if case.name == name), tmp_path / "layer.onnx")
    assert not list(tmp_path.iterdir())


class Net(nnx.Module):
    """Images of any number and size to classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return jax.nn.softmax(self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))))


def test_open_sizes_stay_open(tmp_path: Path) -> None:
    model = Net(nnx.Rngs(0))
    model.eval()
    export_onnx(model, {"x": "float32[batch, 8, 8, 1]"}, tmp_path / "net.onnx")
    for batch in (1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 8, 8, 1)).astype("f4")
        np.testing.assert_allclose(run(tmp_path / "net.onnx", x=x)[0], model(x), atol=1e-5)


IMAGES = {"vit": (Vit, VITS, 16), "resnet": (ResNet, RESNETS, 32), "convnext": (ConvNext, CONVNEXTS, 32),
          "efficientnet": (EfficientNet, EFFICIENTNETS, 32)}  # fmt: skip


def published(name: str) -> tuple[Any, Any, dict[str, str], dict[str, int]]:
    """A model, what of it is exported, its inputs, and the limits of sizes."""
    if name in IMAGES:
        kind, configs, size = IMAGES[name]
        return kind(configs["tiny"], rngs=nnx.Rngs(0)), None, {"x": f"float32[batch, {size}, {size}, 3]"}, {}
    if name == "bert":
        call = lambda live, tokens, seen: live(tokens, seen)
        inputs = {"tokens": "int32[batch, length]", "seen": "bool[batch, length]"}
        return Bert(BERTS["tiny"], rngs=nnx.Rngs(0)), call, inputs, {"length": 32}
    if name.startswith("clip"):
        model = Clip(CLIPS["tiny"], rngs=nnx.Rngs(0))
        if name == "clip-text":
            return model, lambda live, tokens: live.text(tokens), {"tokens": "int32[batch, 8]"}, {}
        return model, lambda live, x: live.image(x), {"x": "float32[batch, 16, 16, 3]"}, {}
    if name == "whisper":
        call = lambda live, x: live.encode(x)
        return Whisper(WHISPERS["tiny"], rngs=nnx.Rngs(0)), call, {"x": "float32[batch, 20, 6]"}, {}
    return Silero(SILEROS["tiny"], rngs=nnx.Rngs(0)), lambda live, x: live(x)[0], {"x": "float32[batch, 96]"}, {}


@pytest.mark.parametrize("name", [*IMAGES, "bert", "clip-image", "clip-text", "whisper", "silero"])
def test_a_published_model(name: str, tmp_path: Path) -> None:
    model, call, signature, limits = published(name)
    model.eval()
    export_onnx(call or model, signature, tmp_path / "m.onnx", weights=model if call else None, limits=limits)
    random = np.random.default_rng(0)
    specs = {name: ShapeDtype.of(given, name) for name, given in signature.items()}
    given = {name: example(spec, {"batch": 2, "length": 7}, random) for name, spec in specs.items()}
    expected = nnx.jit(call or type(model).__call__)(model, *given.values())
    np.testing.assert_allclose(run(tmp_path / "m.onnx", **given)[0], expected, atol=1e-4)


def test_a_decoder(tmp_path: Path) -> None:
    model = Decoder(DECODERS["tiny"], rngs=nnx.Rngs(0))
    export_onnx(model, {"tokens": "int32[batch, 12]"}, tmp_path / "d.onnx", outputs=["logits"])
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12), np.int32)
    (logits,) = run(tmp_path / "d.onnx", tokens=tokens)
    np.testing.assert_allclose(logits, model(jnp.asarray(tokens)), atol=1e-4, rtol=1e-5)


def test_a_linen_module(tmp_path: Path) -> None:
    model = linen.Sequential([linen.Dense(5), jnp.tanh, linen.LayerNorm()])
    x = np.random.default_rng(0).normal(size=(2, 3)).astype("f4")
    variables = model.init(jax.random.key(0), x)
    export_onnx(model, {"x": "float32[batch, 3]"}, tmp_path / "m.onnx", weights=variables)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x=x)[0], model.apply(variables, x), atol=1e-5)


X = np.random.default_rng(1).normal(size=(3, 4)).astype("f4")
I = np.array([[2], [0], [9]], np.int32)
FUNCTIONS: dict[str, Any] = {
    "log1p": lambda x: jnp.log1p(jnp.abs(x) * 1e-6),
    "expm1": lambda x: jnp.expm1(x * 1e-6),
    "exp2": lambda x: jnp.exp2(x),
    "cbrt": lambda x: jnp.cbrt(x),
    "erf": lambda x: jax.scipy.special.erfc(x) + jax.scipy.special.erf(x / 2),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.gelu(x),
    "powers": lambda x: x**2 + x**3 + x**-2 + jnp.abs(x) ** 0.3,
    "rounds": lambda x: jnp.round(3 * x) + jnp.floor(x) + jnp.ceil(x) + jnp.trunc(x),
    "remainder": lambda x: jnp.fmod(x, 0.3) + jnp.clip(x, -0.5, 0.5),
    "finite": lambda x: jnp.isfinite(x / (x - x)) | (x > 0),
    "reduced": lambda x: [x.sum(), x.prod(0), x.max(1), x.min(), (x > 0).any(1), (x > 0).all(), x.mean(0)],
    "arg": lambda x: [jnp.argmax(x, 1), jnp.argmin(x, 0)],
    "cumsum": lambda x: [jnp.cumsum(x, 1), jax.lax.cumsum(x, 0, reverse=True)],
    "sorted": lambda x: [jnp.sort(x, 1), jnp.argsort(x, 1), *jax.lax.top_k(x, 2)],
    "select": lambda x: (
        jnp.where(x > 0, x, -1) + jax.lax.select_n(jnp.int32([2, 0, 1, 0] * 3).reshape(3, 4), x, -x, 2 * x)
    ),
    "logic": lambda x: ((x > 0) ^ (x < 1)) & ~(x == 2) | jnp.logical_and(x > 1, x != 3),
    "take": lambda x: [x[jnp.array([2, -1])], x[:, jnp.array([1, 3])], jnp.take(x, I, axis=1), x[1], x[0, 2]],
    "slice": lambda x: [
        jax.lax.dynamic_slice_in_dim(x, I[2, 0], 2),
        x.at[I[2, 0]].get(mode="fill"),
        x.at[I[0, 0]].get(),
    ],
    "take along": lambda x: [jnp.take_along_axis(x, I % 3, 1), x[jnp.arange(3), jnp.array([0, 3, 1])]],
    "dynamic": lambda x: [
        jax.lax.dynamic_slice(x, (I[0, 0], I[1, 0]), (2, 3)),
        jax.lax.dynamic_update_slice(x, 9 * x[:2, :2], (1, I[0, 0])),
    ],
    "pads": lambda x: [
        jnp.pad(x, ((1, 0), (0, 2)), constant_values=7),
        jax.lax.pad(x, 1.0, ((0, 1, 2), (-1, 2, 1))),
        jnp.flip(x, 1),
        x[::2, 1:],
    ],
    "windows": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 3), (1, 2), "SAME"),
    "shapes": lambda x: [
        jnp.tile(x, (2, 1)),
        x.T.reshape(2, 6),
        jnp.stack([x, x], 1),
        *jnp.unstack(x),
        x[None].squeeze(0),
        jnp.eye(3),
    ],
    "products": lambda x: [x @ x.T, jnp.einsum("ab,cb->acb", x, x), jnp.vdot(x, x), jnp.outer(x[0], x[1])],
    "integers": lambda x: [(10 * x).astype(int) // 3, (10 * x).astype(jnp.int8) * 2, (x > 0).astype(jnp.uint8).sum(0)],
    "scan": lambda x: jax.lax.scan(lambda c, y: (c * 0.5 + y, c + x[0]), x[0], x, reverse=True),
    "fori": lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c * 1.1 + i, x),
    "while": lambda x: jax.lax.while_loop(lambda c: jnp.abs(c).sum() < 50, lambda c: c * 1.5, x),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y + 1, lambda y: y * 2, x),
    "remat": lambda x: jax.checkpoint(jnp.sin)(x),
    "softmax": lambda x: [jax.nn.softmax(x), jax.nn.log_softmax(x), jax.nn.logsumexp(x, 1), jax.nn.softplus(x)],
    "angles": lambda x: [jnp.arctan2(x, x[::-1]), jnp.arctan2(jnp.sign(x) * 0, -x), jnp.arctan2(x * 0, x)],
    "gammas": lambda x: [jax.lax.lgamma(4 * x), jax.lax.digamma(3 * x + 0.01), jax.lax.erf_inv(jnp.tanh(3 * x))],
    "cumulated": lambda x: [
        jnp.cumprod(x, 1),
        jax.lax.cummax(x, 0, reverse=True),
        jax.lax.cummin((9 * x).astype(int), 1),
        jax.lax.cumlogsumexp(x, 0),
    ],
    "scattered": lambda x: [
        x.at[I[:, 0]].set(7.0),
        x.at[:, jnp.array([1, 3, 1])].add(x[:, :3]),
        x.at[1, 2].mul(3),
        x.at[0, 9].set(1.0),
        x.at[jnp.array([0, 2]), 1].max(0.5),
        x.at[1:, :2].add(1),
        x.at[0].min(x[1]),
        x.at[I[1, 0]].subtract(x[0]),
        jnp.put_along_axis(x, I % 3, 5.0, axis=1, inplace=False),
        jnp.bincount((x > 0).astype(int).ravel(), length=3),
    ],
    "scattered slices": lambda x: jax.lax.scatter_add(
        x, I, jnp.stack([x[:, :3]] * 2, 2), jax.lax.ScatterDimensionNumbers((1, 2), (), (1,)), mode="drop"
    ),
    "gathered slices": lambda x: [
        jax.lax.gather(x, I, jax.lax.GatherDimensionNumbers((1, 2), (), (1,)), (2, 3), mode=mode)
        for mode in ("fill", "clip")
    ],
    "segments": lambda x: jax.ops.segment_sum(x, jnp.array([1, 0, 1]), 3),
    "branches": lambda x: [
        jax.lax.switch(n, [jnp.sin, jnp.cos, lambda x: x * 2], x) for n in (I[2, 0], I[0, 0], I[1, 0])
    ],
    "drawn": lambda x: [
        jax.random.normal(key := jax.random.split(jax.random.key(x[0, 0].astype(int)), 3)[1], (2, 2)),
        jax.random.bernoulli(jax.random.fold_in(key, 7), 0.3, (5,)),
    ],
    "bits": lambda x: [
        n := (1e3 * x).astype(int),
        n << 3,
        n >> 2,
        jax.lax.shift_right_logical(n, 4),
        n & 12,
        jnp.uint32(0xFFFFFFF0) + n.astype(jnp.uint32),
        n.astype(jnp.uint32) > 5,
    ],
    "window sums": lambda x: [
        jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 3), (1, 2), "SAME"),
        jax.lax.reduce_window(x, jnp.inf, jax.lax.min, (1, 2), (2, 1), "VALID"),
    ],
    "precision": lambda x: jax.lax.reduce_precision(x, 8, 7),
    "approximate": lambda x: jax.lax.approx_max_k(x, 2),
    "bfloat16": lambda x: jnp.cumsum((x.astype(jnp.bfloat16) * 1.3 + 7).astype(jnp.float32), 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_onnx_runtime_agrees_with_jax(name: str, tmp_path: Path) -> None:
    function = FUNCTIONS[name]
    export_onnx(function, {"x": X}, tmp_path / "f.onnx")
    for ours, theirs in zip(run(tmp_path / "f.onnx", x=X), leaves(function(jnp.asarray(X))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 if name not in ("log1p", "expm1") else 1e-11)


SIZES: dict[str, Any] = {
    "mean": lambda x: x - x.mean(0, keepdims=True),
    "iota": lambda x: x + jnp.arange(x.shape[0])[:, None],
    "mask": lambda x: jnp.tril(x @ x.T),
    "expand": lambda x: jnp.broadcast_to(x[:, :1], x.shape) + jnp.zeros((2 * x.shape[0], 4))[: x.shape[0]],
    "flat": lambda x: x.reshape(-1),
    "concatenated": lambda x: jnp.concatenate([x, x[1:]]),
    "attention": lambda x: jax.nn.dot_product_attention(x[None, :, None], x[None, :, None], x[None, :, None]),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_depends_on_an_open_size(name: str, tmp_path: Path) -> None:
    export_onnx(SIZES[name], {"x": "float32[n, 4]"}, tmp_path / "f.onnx")
    for n in (2, 5):
        x = np.random.default_rng(n).normal(size=(n, 4)).astype("f4")
        np.testing.assert_allclose(run(tmp_path / "f.onnx", x=x)[0], SIZES[name](x), rtol=1e-5, atol=1e-5)


class Outer(nnx.Module):
    def __init__(self) -> None:
        self.inner = Inner()

    def __call__(self, x):
        return self.inner(x)


class Inner(nnx.Module):
    def __call__(self, x):
        return jax.lax.bessel_i0e(x)


def test_an_operation_without_translation_is_named_with_its_part(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"operation bessel_i0e of JAX has no translation to ONNX at inner \(Inner\)"):
        export_onnx(Outer(), {"x": "float32[n]"}, tmp_path / "f.onnx")
    with pytest.raises(ExportError, match="writes state"):
        export_onnx(Net(nnx.Rngs(0)), {"x": "float32[2, 8, 8, 1]"}, tmp_path / "f.onnx")
    with pytest.raises(ExportError, match="draws random"):
        export_onnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), {"x": "float32[2]"}, tmp_path / "f.onnx")
    assert not list(tmp_path.iterdir())
