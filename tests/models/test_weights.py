# SPDX-License-Identifier: Apache-2.0
"""Files of weights: there and back, blocks of a few bits, files that are wrong or hostile."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from batiste import nnx, sharding
from batiste.models import (
    RULES,
    Decoder,
    DecoderConfig,
    Stretch,
    WeightsError,
    load_decoder,
    open_gguf,
    open_safetensors,
    save_decoder,
)
from batiste.models.kinds import HUGGING_FACE, LLAMA, settings_of
from batiste.models.mapping import entries
from batiste.models.safetensors import INDEX, Spec, of_arrays, write_safetensors
from batiste.models.weights import GGUF, SPARSE_GGUF

SMALL = DecoderConfig(vocab=32, features=16, layers=2, heads=4, kv_heads=2, hidden=24)
CHOICES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "mistral": {"window": 4, "tied": False},
}


def make(**changes) -> Decoder:
    return Decoder(SMALL.replace(**changes), rngs=nnx.Rngs(0))


def same(a: Decoder, b: Decoder) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, nnx.state(a), nnx.state(b)))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_a_saved_model_is_loaded_as_it_was(choice: str, shard_bytes: int, tmp_path: Path) -> None:
    model = make(**CHOICES[choice])
    files = save_decoder(model, tmp_path, shard_bytes=shard_bytes)
    assert (len(files) > 1) == (shard_bytes < 10**9) == (tmp_path / INDEX.format("model")).exists()
    loaded = load_decoder(tmp_path)
    assert loaded.config.replace(context=2048) == model.config
    assert same(loaded, model)


def test_a_layer_is_theirs_transposed(tmp_path: Path) -> None:
    model = make()
    save_decoder(model, tmp_path)
    tensors = open_safetensors(tmp_path).tensors
    found = tensors["model.layers.1.self_attn.q_proj.weight"].read()
    kernel = model.blocks.layers.attn.query.kernel[...][1]  # (16, 4, 4)
    np.testing.assert_array_equal(found, np.asarray(kernel).reshape(16, 16).T)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (16, 24)


def test_with_a_plan_each_value_goes_to_its_place(tmp_path: Path) -> None:
    save_decoder(make(), tmp_path)
    with sharding.use(sharding.ready_plan(fsdp=4, tensor=2, rules=RULES, least=16)):
        loaded = load_decoder(tmp_path)
    assert loaded.blocks.layers.mlp.up.kernel[...].sharding.spec == jax.P(None, "fsdp", "tensor")
    assert same(loaded, make())


def test_what_their_names_cannot_say_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no published architecture has these choices"):
        save_decoder(make(parallel=True), tmp_path)


def test_another_model_is_named_before_anything_is_read(tmp_path: Path) -> None:
    save_decoder(make(), tmp_path)
    for changes, message in (
        ({"vocab": 33}, "embed_tokens.weight"),
        ({"layers": 3}, "lack a tensor"),
        ({"layers": 1}, "hold what the model has not"),
        ({"qk_norm": True}, "k_norm"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_decoder(tmp_path, SMALL.replace(**changes))
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "model_type": "bert"}))
    with pytest.raises(WeightsError, match="of an architecture"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="do not say what the model is"):
        load_decoder(tmp_path)


# ---------------------------------------------------------------- damaged and hostile safetensors
def header_of(entries: object, values: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: str = "F32") -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_gguf_file_of_experts_is_loaded(name: str, tmp_path: Path) -> None:
    """Mixtral, whose heads are permuted as Llama's, and Qwen3-MoE; a layer's experts are one tensor [E, out, in]."""
    own: Any = {} if name == "llama" else {"qk_norm": True, "head_dim": 6, "top_k": 3}
    model = make(experts=4, tied=False, **own)
    c, tensors = model.config, dict[str, Any]()
    for entry in entries(model, SPARSE_GGUF):
        for theirs, at in entry.parts():
            value = np.asarray(entry.to_theirs(np.asarray(entry.variable[...][at])), np.float32)
            if name == "llama" and ("attn_q." in theirs or "attn_k." in theirs):
                value = value.reshape(-1, 2, c.depth // 2, 16).swapaxes(1, 2).reshape(value.shape)
            tensors[theirs] = (0, value.shape, np.ascontiguousarray(value).tobytes())
    layers: Any = model.blocks.layers
    expected = np.asarray(layers.mlp.experts.down[1]).transpose(0, 2, 1)
    assert tensors["blk.1.ffn_down_exps.weight"] == (0, (4, 16, 24), expected.tobytes())
    sizes = {"embedding_length": 16, "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2,
             "attention.key_length": c.depth, "feed_forward_length": 24 if name == "llama" else 99,
             "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": 4, "expert_used_count": c.top_k}  # fmt: skip
    sizes |= {} if name == "llama" else {"expert_feed_forward_length": 24}
    about: dict[str, object] = {"general.architecture": name}
    about |= {f"{name}.{key}": x for key, x in sizes.items()}
    (tmp_path / "a.gguf").write_bytes(gguf(about, tensors))
    found = load_decoder(tmp_path / "a.gguf")
    assert found.config.replace(epsilon=c.epsilon) == c and same(found, model)  # of ε, the file has 32 bits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header does not fit"),
        (b"\xff" * 8 + b"{}", "header does not fit"),
        (header_of(b"{no"), "no JSON"),
        (header_of(b"[" * 100_000), "no JSON"),
        (header_of([1]), "no JSON object"),
        (header_of({"a": 1}), "dtype"),
        (header_of(entry(dtype="Q9")), "dtype"),
        (header_of(entry(shape=[1 << 60]), b"\0" * 8), "no shape that the file can hold"),
        (header_of(entry(shape=[-2]), b"\0" * 8), "no shape that the file can hold"),
        (header_of(entry(shape=["2"]), b"\0" * 8), "no shape that the file can hold"),
        (header_of(entry(offsets=[0, 16]), b"\0" * 8), "bytes do not fit"),
        (header_of(entry(offsets=[-8, 0]), b"\0" * 8), "bytes do not fit"),
        (header_of(entry(), b"\0" * 12), "does not end"),
        (header_of({**entry(), "b": entry()["a"]}, b"\0" * 8), "overlap"),
    ],
)
def test_a_damaged_file_is_one_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_safetensors(tmp_path)


def test_an_index_names_files_of_its_folder_that_are_there(tmp_path: Path) -> None:
    for place, message in (("../secret", "outside its folder"), ("gone.safetensors", "no such file")):
        (tmp_path / INDEX.format("model")).write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(WeightsError, match=message):
            open_safetensors(tmp_path)
    write_safetensors(tmp_path, of_arrays({"b": np.ones(2)}), [np.ones(2)])
    (tmp_path / INDEX.format("model")).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(WeightsError, match="lacks a tensor"):
        open_safetensors(tmp_path)


# ---------------------------------------------------------------- GGUF
def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(settings: dict[str, object], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A file: settings, and tensors (format, shape, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    for name, value in settings.items():
        kind, code = {str: (8, ""), int: (4, "<I"), float: (6, "<f")}[type(value)]
        out += string(name) + struct.pack("<I", kind)
        out += string(value) if isinstance(value, str) else struct.pack(code, value)
    data = b""
    for name, (kind, shape, values) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        out += struct.pack("<IQ", kind, len(data))
        data += values
    return out + b"\0" * (-len(out) % 32) + data


def test_blocks_are_decoded(tmp_path: Path) -> None:
    d, m, q = np.float16(0.5).tobytes(), np.float16(-1).tobytes(), bytes(range(16))  # low halves 0 … 15, high ones 0
    signed = np.arange(-16, 16, dtype=np.int8)
    tensors = {
        "q4_0": (2, (1, 32), d + q),
        "q4_1": (3, (32,), d + m + q),
        "q8_0": (8, (32,), d + signed.tobytes()),
        "f16": (1, (2,), np.array([1, 2], np.float16).tobytes()),
        "f32": (0, (1, 2), np.array([3, 4], np.float32).tobytes()),
    }
    (tmp_path / "a.gguf").write_bytes(gguf({"general.architecture": "llama"}, tensors))
    weights = open_gguf(tmp_path / "a.gguf")
    assert weights.about == {"general.architecture": "llama"}
    found = {name: tensor.read() for name, tensor in weights.tensors.items()}
    halves = np.array([*range(16), *[0] * 16])
    np.testing.assert_array_equal(found["q4_0"], 0.5 * (halves[None] - 8))
    np.testing.assert_array_equal(found["q4_1"], 0.5 * halves - 1)
    np.testing.assert_array_equal(found["q8_0"], 0.5 * signed)
    np.testing.assert_array_equal(found["f16"], [1, 2])
    np.testing.assert_array_equal(found["f32"], [[3, 4]])


def test_a_gguf_file_is_loaded_with_its_heads_unpermuted(tmp_path: Path) -> None:
    model, depth = make(), SMALL.depth
    save_decoder(model, tmp_path)
    tensors = {}
    for ours, theirs in HUGGING_FACE.items():
        for i in range(2):
            if (found := open_safetensors(tmp_path).tensors.get(theirs.format(i))) is None:
                continue
            value = found.read()
            if "attn/query/" in ours or "attn/key/" in ours:
                value = value.reshape(-1, 2, depth // 2, 16).swapaxes(1, 2).reshape(value.shape)
            tensors[GGUF[ours].format(i)] = (0, value.shape, value.tobytes())
    about: dict[str, object] = {"general.architecture": "llama"}
    sizes = {"embedding_length": 16, "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2,
             "feed_forward_length": 24, "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    about |= {f"llama.{name}": value for name, value in sizes.items()}
    (tmp_path / "a.gguf").write_bytes(gguf(about, tensors))
    assert same(load_decoder(tmp_path / "a.gguf"), model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GG", "claims more"),
        (b"GGML" + b"\3\0\0\0" + b"\0" * 16, "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims more entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50) + b"\0" * 9, "claims more"),
        (gguf({}, {"a": (0, (1 << 40, 1 << 40), b"")}), "no shape"),
        (gguf({}, {"a": (0, (16,), b"\0" * 8)}), "past the end"),
        (gguf({}, {"a": (99, (1,), b"\0" * 8)}), "format 99"),
        (gguf({}, {"a": (2, (16,), b"\0" * 18)}), "whole number of blocks"),
        (gguf({"general.alignment": 0}, {}), "alignment"),
    ],
)
def test_a_damaged_gguf_file_is_one_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_gguf(tmp_path / "a.gguf")


# ---------------------------------------------------------------- memory
def test_loading_holds_the_model_and_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    bench = importlib.import_module("load")
    config = DecoderConfig(vocab=32768, features=512, layers=8, heads=8, kv_heads=8, hidden=1536)
    found = entries(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), LLAMA)
    specs = [Spec(name, entry.theirs, np.dtype(np.float32)) for entry in found for name, _ in entry.parts()]
    (file,) = write_safetensors(tmp_path, specs, (np.zeros(spec.shape, np.float32) for spec in specs))
    (tmp_path / "config.json").write_text(json.dumps(settings_of(config)))
    ran = bench.child("batiste", str(tmp_path))
    largest = max(spec.size for spec in specs)
    assert ran["bytes"] < file.stat().st_size + largest + (32 << 20), "32 MB for what is traced"


def test_what_was_loaded_may_be_given_away(tmp_path: Path) -> None:
    save_decoder(make(), tmp_path)
    model = load_decoder(tmp_path)
    double = nnx.jit(lambda model: nnx.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model))), donate_argnums=0)
    double(model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), nnx.state(model), nnx.state(make()))


def test_how_rope_is_stretched_goes_there_and_back(tmp_path: Path) -> None:
    stretch = Stretch(4.0, 1.0, 4.0, 64)
    save_decoder(make(rope_stretch=stretch), tmp_path)
    assert load_decoder(tmp_path).config.rope_stretch == stretch
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}))
    with pytest.raises(WeightsError, match=r"stretches RoPE in a way.*yarn"):
        load_decoder(tmp_path)
