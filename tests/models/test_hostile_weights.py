# SPDX-License-Identifier: Apache-2.0
"""Files that want to do harm: code is never run, claims take no memory, and all that is wrong is one kind of error."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from batiste import nnx
from batiste.models import (
    DECODERS,
    Decoder,
    WeightsError,
    load_bert,
    load_decoder,
    open_torch,
    open_weights,
    pickled,
    save_decoder,
)
from batiste.models.safetensors import INDEX, of_arrays, write_safetensors
from batiste.models.torch_files import LEGACY_MAGIC

from .test_weights import gguf

# ---------------------------------------------------------------- code
CALLS = {
    "os.mkdir": lambda path: (os.mkdir, (path,)),
    "os.system": lambda path: (os.system, (f"touch '{path}'",)),
    "eval": lambda path: (eval, (f"open({path!r}, 'w')",)),
    "exec": lambda path: (exec, (f"open({path!r}, 'w')",)),
    "open": lambda path: (open, (path, "w")),
    "os.mknod": lambda path: (os.mknod, (path,)),
    "Path.touch": lambda path: (Path.touch, (Path(path),)),
    "torch.save": lambda path: (torch.save, (1, path)),
}


class Evil:
    """Pickled, it is a call."""

    def __init__(self, call: tuple):
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def as_archive(payload: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    return content.getvalue()


def as_old_file(payload: bytes) -> bytes:
    head = pickle.dumps(LEGACY_MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + payload + pickle.dumps([], 2)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "zip.pt": as_archive,
    "old.pth": as_old_file,
    "bare.bin": lambda payload: payload,
    "model.safetensors": lambda payload: payload,
    "model.gguf": lambda payload: payload,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_file_is_not_run(call: str, file: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps({"weight": Evil(CALLS[call](str(canary)))}, 2)
    (tmp_path / file).write_bytes(FILES[file](payload))
    with pytest.raises(WeightsError):
        open_weights(tmp_path / file)
    assert not canary.exists()


def test_the_canary_would_have_sung(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(CALLS["os.mkdir"](str(tmp_path / "canary"))), 2))
    assert (tmp_path / "canary").exists()


GLOBALS = {
    "global": b"\x80\x02cposix\nsystem\n(X\x01\x00\x00\x00atR.",
    "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93(\x8c\x01atR.",
    "stack_global_of_numbers": b"\x80\x04K\x01K\x02\x93.",
    "inst": b"(X\x01\x00\x00\x00aiposix\nsystem\n.",
    "obj": b"\x80\x02(cposix\nsystem\nX\x01\x00\x00\x00ao.",
    "newobj_ex": b"\x80\x04cposix\nsystem\n)}\x92.",
    "extension": b"\x80\x02\x82\x01.",
    "attribute_of_a_known_one": b"\x80\x02ccollections\nOrderedDict.__class__\n)R.",
    "class_that_looks_scripted": b"\x80\x02c__torch__\nsystem\n)R.",
    "call_of_a_number": b"\x80\x02K\x01)R.",
    "state_of_a_list": b"\x80\x02]}b.",
    "next_buffer": b"\x80\x05\x97.",
    "frozenset": b"\x80\x04(K\x01\x91.",
}


@pytest.mark.parametrize("name", GLOBALS)
def test_no_instruction_reaches_code(name: str, tmp_path: Path) -> None:
    for file, wrap in (("zip.pt", as_archive), ("old.pt", as_old_file)):
        (tmp_path / file).write_bytes(wrap(GLOBALS[name]))
        with pytest.raises(WeightsError, match=r"code that is no part|do not need|damaged"):
            open_torch(tmp_path / file)


# ---------------------------------------------------------------- claims
def rebuilt(offset: str, shape: str, strides: str, storage: str = "K\x04") -> bytes:
    """A pickle with one tensor; numbers are instructions."""
    said = ("ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + "0"
            + "X\x03\0\0\0cpu" + storage + "tQ" + offset + "(" + shape + "t(" + strides + "t\x89}tR")  # fmt: skip
    return b"\x80\x02}X\x01\x00\x00\x00a" + said.encode("latin-1") + b"s."


def archive(payload: bytes, members: dict[str, bytes], **options) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as made:
        for name, value in {"archive/data.pkl": payload, **members}.items():
            made.writestr(name, value)
    return content.getvalue()


GOOD = rebuilt("K\0", "K\x04", "K\x01")
HUGE = "\x8a\x08" + "\xff" * 7 + "\x7f"  # 2**63 - 1
VALUES = {"archive/data/0": b"\0" * 16}
NESTED = b"\x80\x02" + b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60)) + b"."
ARCHIVES = {
    "huge_shape": (archive(rebuilt("K\0", HUGE, "K\0"), VALUES), "no shape that the file can hold"),
    "overflow": (archive(rebuilt("K\0", HUGE + HUGE, "K\x01K\x01"), VALUES), "no shape"),
    "repeated_by_a_stride_of_zero": (archive(rebuilt("K\0", "K\xff", "K\0"), VALUES), "no shape"),
    "past_the_end": (archive(rebuilt("K\x02", "K\x04", "K\x01"), VALUES), "do not lie in its values"),
    "before_the_start": (archive(rebuilt("J\xff\xff\xff\xff", "K\x04", "K\x01"), VALUES), "damaged"),
    "backwards": (archive(rebuilt("K\x03", "K\x04", "J\xff\xff\xff\xff"), VALUES), "damaged"),
    "huge_stride": (archive(rebuilt("K\0", "K\x02", HUGE), VALUES), "do not lie in its values"),
    "strides_of_another_rank": (archive(rebuilt("K\0", "K\x02K\x02", "K\x01"), VALUES), "do not lie in its values"),
    "storage_claims_more": (archive(rebuilt("K\0", "K\x04", "K\x01", HUGE), VALUES), "do not lie in its values"),
    "values_missing": (archive(GOOD, {}), "lacks the values"),
    "values_short": (archive(GOOD, {"archive/data/0": b"\0" * 8}), "no shape|do not lie"),
    "packed": (archive(GOOD, VALUES, compression=zipfile.ZIP_DEFLATED), "packed"),
    "big_endian": (archive(GOOD, {**VALUES, "archive/byteorder": b"big"}), "little-endian"),
    "two_roots": (archive(GOOD, {**VALUES, "other/data.pkl": GOOD}), "no data.pkl"),
    "no_root": (archive(GOOD, {}).replace(b"data.pkl", b"data.pkX"), "no data.pkl"),
    "climbs_out": (archive(GOOD, {**VALUES, "../../evil": b""}), "a name that no weights have"),
    "absolute": (archive(GOOD, {**VALUES, "/etc/evil": b""}), "a name that no weights have"),
    "backslash": (archive(GOOD, {**VALUES, "..\\evil": b""}), "a name that no weights have"),
    "list_damaged": (archive(GOOD, VALUES)[:-30], "archive is damaged"),
    "nested_exponentially": (archive(NESTED, {}), "nested too deeply|not that many values"),
    "holds_itself": (archive(b"\x80\x02]q\x00h\x00a.", {}), "hold themselves"),
    "huge_number": (archive(b"\x80\x02\x8b\x00\x00\x01\x00" + b"\x7f" * 65536 + b".", {}), "larger than any"),
    "huge_string": (archive(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"a.", {}), "damaged"),
    "huge_memo": (archive(b"\x80\x02Nr\xff\xff\xff\xff0j\xff\xff\xff\x7f.", {}), "damaged"),
    "key_that_is_no_name": (archive(b"\x80\x02}))s.", {}), "damaged"),
    "no_end": (archive(b"\x80\x02", {}), "no end|damaged"),
    "empty_stack": (archive(b"\x80\x02.", {}), "damaged"),
}  # fmt: skip


def refused(path: Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=message):
            open_weights(path)
        assert tracemalloc.get_traced_memory()[1] < (16 << 20) + 4 * path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_one_error_and_no_memory(name: str, tmp_path: Path) -> None:
    content, message = ARCHIVES[name]
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", message)


def test_a_pickle_without_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MOST_INSTRUCTIONS", 1000)
    (tmp_path / "a.pt").write_bytes(archive(b"\x80\x02" + b"N0" * 1000 + b"N.", {}))
    refused(tmp_path / "a.pt", "not that long")


def test_a_good_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(archive(GOOD, VALUES))
    np.testing.assert_array_equal(open_torch(tmp_path / "a.pt").tensors["a"].read(), np.zeros(4, np.float32))


def header(text: str, values: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + values


ENTRY = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HEADERS = {
    "name_twice": (header(f'{{"a": {ENTRY}, "a": {ENTRY}}}', b"\0" * 8), "twice"),
    "not_a_number": (header('{"a": NaN}'), "no number"),
    "infinite_shape": (header('{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 0]}}'), "no number"),
    "long_number": (header('{"a": ' + "9" * 10_000 + "}"), "no JSON"),
    "float_shape": (header('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', b"\0" * 8), "no shape"),
    "true_shape": (header('{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', b"\0"), "no shape"),
    "overflow": (header('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
                 "no shape"),
    "rank": (header('{"a": {"dtype": "U8", "shape": [' + "1," * 99 + '1], "data_offsets": [0, 1]}}', b"\0"),
             "no shape"),
    "deep": (header('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"), "no JSON|dtype"),
    "header_of_2_to_63": (struct.pack("<Q", 1 << 63) + b"{}", "header does not fit"),
    "not_text": (struct.pack("<Q", 4) + b"\xff\xfe{}", "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_one_error_and_no_memory(name: str, tmp_path: Path) -> None:
    content, message = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", message)


PLACES = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "a\\b", "a\0b", ""]


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_an_index_does_not_lead_out_of_its_folder(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_safetensors(tmp_path, of_arrays({"a": np.ones(2)}), [np.ones(2)])
    (tmp_path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    folder.mkdir()
    for name in (INDEX.format("model"), "pytorch_model.bin.index.json"):
        (folder / name).write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(WeightsError, match=r"outside its folder|no such file"):
            open_weights(folder)
        (folder / name).unlink()


# ---------------------------------------------------------------- of another model
def test_files_of_another_model_are_named_before_memory_is_taken(tmp_path: Path) -> None:
    config = DECODERS["tiny"]
    save_decoder(Decoder(config, rngs=nnx.Rngs(0)), tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"vocab_size": 257}, r"embed_tokens\.weight.*(256, 64).*\n?.*257"),
        ({"vocab_size": 1 << 40}, "embed_tokens"),
        ({"hidden_size": 1 << 40, "head_dim": 16}, "input_layernorm|of another model"),
        ({"num_hidden_layers": 3}, "lack a tensor"),
        ({"num_hidden_layers": -1}, "do not describe a decoder"),
        ({"num_hidden_layers": "2"}, "do not describe a decoder"),
        ({"model_type": "bert"}, "of an architecture"),
        ({"model_type": ["llama"]}, "of an architecture"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(WeightsError, match=message):
            load_decoder(tmp_path)
    for text, message in (("[]", "no JSON object"), ("{", "no JSON"), ("[" * 10**5, "no JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 256, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}))  # fmt: skip
    with pytest.raises(WeightsError, match="lack a tensor"):
        load_bert(tmp_path)


# ---------------------------------------------------------------- at random
def seeds() -> dict[str, bytes]:
    """A good file of each format."""
    state, new, old = {"a": torch.ones(3, 4), "b": torch.arange(5)}, io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    entries = f'{{"a": {ENTRY}, "b": {{"dtype": "I8", "shape": [1, 2], "data_offsets": [8, 10]}}}}'
    blocks = {"a": (2, (1, 32), bytes(18)), "b": (0, (2,), bytes(8))}
    return {"a.pt": new.getvalue(), "b.pt": old.getvalue(), "a.safetensors": header(entries, bytes(10)),
            "a.gguf": gguf({"general.architecture": "llama", "n": 3, "x": 0.5}, blocks)}  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(5):
            case 0 if at < len(changed):
                changed[at] = draw.randrange(256)
            case 1:
                del changed[at : at + draw.randint(1, 16)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randint(1, 8))
            case 3:
                changed[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]))
            case _:
                changed = changed[:at] or bytearray(b"\0")
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.pt", "b.pt", "a.safetensors", "a.gguf"])
def test_no_change_of_a_file_gives_another_error(name: str, tmp_path: Path) -> None:
    count = 10_000 if os.environ.get("BATISTE_FAULTS") == "long" else 300
    content, draw, path, refusals = seeds()[name], random.Random(name), tmp_path / name, 0
    for _ in range(count):
        path.write_bytes(mutated(content, draw))
        try:
            for tensor in open_weights(path).tensors.values():
                assert tensor.read().nbytes <= 8 * path.stat().st_size
        except WeightsError:
            refusals += 1
    assert refusals > count // 4
