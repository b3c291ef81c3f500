# SPDX-License-Identifier: Apache-2.0
"""`batiste models`: what each action prints and ends with."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from batiste import nnx
from batiste.cli import main
from batiste.models import (
    BERTS,
    DECODERS,
    Bert,
    Decoder,
    load_bert,
    load_decoder,
    open_weights,
    save_bert,
    save_decoder,
)
from batiste.models.registry import ARCHITECTURES, architecture_of, configuration, configurations, told_parameters

from .packages import minilm, place


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(Decoder(DECODERS["tiny"], rngs=nnx.Rngs(0)), folder)
    return folder


def ended(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["models", *map(str, args)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_list_names_every_configuration_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(capsys, "list")
    assert code == 0
    assert len(out.splitlines()) >= 1 + len(list(configurations()))
    for words in ("decoder/smollm2-135m", "134,515,008", "bert/minilm-l6", "22,713,216", "sentence encoders"):
        assert words in out


@pytest.mark.parametrize("name", [name for name, _, _ in configurations()])
def test_every_configuration_has_the_parameters_it_says(name: str) -> None:
    architecture, config = configuration(name)
    assert architecture is ARCHITECTURES[name.partition("/")[0]]
    assert architecture.parameters(config) == told_parameters(name) > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_known_by_its_files_and_computes_the_same_from_them(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    config = architecture.configs["tiny"]
    model = architecture.model(config, rngs=nnx.Rngs(0))
    model.eval()
    files = architecture.save(model, tmp_path, shard_bytes=1000)
    assert len(files) > 1
    if architecture.kinds:  # others have no config.json
        assert architecture_of(tmp_path) is architecture
        config = None
    again = architecture.load(tmp_path, config)
    run = nnx.jit(lambda model, *x: model(*x))
    found, expected = (run(m, *architecture.inputs(model.config)) for m in (again, model))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_show_a_configuration_and_a_file(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(capsys, "show", "minilm-l6")
    assert code == 0
    for words in ("22,713,216", "encoder.layer.{}.attention.self.query.weight", "[6, 384, 12, 32]", "hidden = 1536"):
        assert words in out
    code, out, _ = ended(capsys, "show", tiny)
    assert code == 0 and "model.layers.1.mlp.down_proj.weight" in out
    code, out, _ = ended(capsys, "show", place("silero_vad") / "data" / "silero_vad.jit")
    assert code == 0 and "_model.decoder.rnn.weight_ih" in out


def test_convert_goes_from_pytorch_to_safetensors_and_back_is_the_same(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({name: torch.tensor(t.read()) for name, t in open_weights(tiny).tensors.items()}, tmp_path / "a.pth")
    code, out, _ = ended(capsys, "convert", tmp_path / "a.pth", tmp_path / "out", "--shard-bytes", 100_000)
    assert code == 0 and "model-00002-of-" in out
    for name, tensor in open_weights(tiny).tensors.items():
        np.testing.assert_array_equal(open_weights(tmp_path / "out").tensors[name].read(), tensor.read())
    code, out, _ = ended(capsys, "convert", tiny, tmp_path / "half", "--dtype", "bfloat16")
    assert code == 0
    assert open_weights(tmp_path / "half").tensors["model.norm.weight"].read().dtype.name == "bfloat16"
    assert load_decoder(tmp_path / "half").config == load_decoder(tiny).config
    code, _, err = ended(capsys, "convert", tiny, tmp_path / "half")
    assert code == 2 and "not empty" in err


def test_convert_takes_the_tokenizer_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bert(Bert(BERTS["tiny"], rngs=nnx.Rngs(0)), tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert ended(capsys, "convert", tmp_path / "in", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert load_bert(tmp_path / "out").config == load_bert(tmp_path / "in").config


def test_verify_says_whether_files_are_whole_and_alike(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ended(capsys, "verify", tiny, "--against", tiny)
    assert code == 0 and "all agree" in out
    other = load_decoder(tiny)
    kernel = other.blocks.layers.mlp.up.kernel
    kernel[...] = kernel[...].at[1].multiply(2)
    save_decoder(other, tmp_path)
    code, out, _ = ended(capsys, "verify", tmp_path, "--against", tiny)
    assert code == 1 and "blocks/1/mlp/up is the first that departs" in out
    kernel[...] = kernel[...].at[0, 0, 0].set(np.nan)
    save_decoder(other, tmp_path)
    code, out, _ = ended(capsys, "verify", tmp_path)
    assert code == 1 and "not finite: model.layers.0.mlp.up_proj.weight" in out
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    code, out, _ = ended(capsys, "verify", tmp_path)
    assert code == 1 and "fetch the file again" in out


def test_generate_goes_on_with_a_text(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"the": 0, "cat": 1, "sat": 2}
    tokenizer = Tokenizer(models.WordLevel({**words, **{f"w{i}": i for i in range(3, 256)}}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    code, out, err = ended(capsys, "generate", tmp_path, "the cat", "--tokens", 3)
    assert code == 0 and out.startswith("the cat"), err
    expected = out
    assert ended(capsys, "generate", tmp_path, "the cat", "--tokens", 3)[1] == expected
    code, _, err = ended(capsys, "generate", tmp_path, "", "--tokens", 3)
    assert code == 2 and "no tokens" in err
    code, _, err = ended(capsys, "generate", tmp_path, "the", "--tokens", 0)
    assert code == 2 and "--tokens of 1 or more" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "batiste models list|show|convert"),
        (("show", "nothing"), "there is no such configuration"),
        (("show", "tiny"), "there are several configurations of this name"),
        (("generate", "nowhere", "x"), "there is no such file|ending says"),
        (("convert", "nowhere.pt", "out"), "there is no such file"),
    ],
)
def test_a_wrong_command_ends_with_2_and_a_reason(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ended(capsys, *args)
    assert code == 2
    assert any(part in err for part in message.split("|")) and "Traceback" not in err


def test_an_encoder_does_not_generate_and_strangers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ended(capsys, "generate", minilm(), "hello")
    assert code == 2 and "does not generate" in err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    code, out, _ = ended(capsys, "verify", tmp_path)
    assert code == 1 and "'wav2vec2'" in out
