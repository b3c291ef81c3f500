# SPDX-License-Identifier: Apache-2.0
"""DiT, UNet and samplers: as diffusers has them with drawn weights (golden/make_diffusion.py), training, errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError, dit, open_weights, unet
from batiste.models import diffusion as d
from batiste.models.mapping import entries
from batiste.models.safetensors import of_arrays, write_safetensors
from batiste.models.times import waves

from .golden.make_diffusion import FILE, LABELS, SCHEDULES, STEPS, TIMES, drawn, pictures, predicted

EXAMPLES = Path(__file__).parents[2] / "examples"
GOLDEN: dict[str, np.ndarray] = dict(np.load(FILE))
MODELS = {
    "dit": (dit.load_dit, dit.save_dit, dit.DIT, dit.RULES),
    "unet": (unet.load_unet, unet.save_unet, unet.UNET, unet.RULES),
    "unet, as of DDPM": (unet.load_unet, unet.save_unet, unet.UNET, unet.RULES),
}
SCHEDULES_HERE = {"linear": d.linear(), "scaled_linear": d.scaled_linear(), "cosine": d.cosine()}
SAYS: tuple[d.Kind, ...] = ("epsilon", "v", "x0")
run = nnx.jit(lambda model, *args: model(*args))


def told(name: str) -> Any:
    return json.loads(GOLDEN[name].tobytes())


def write_theirs(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The folder of a model that diffusers would write."""
    tensors = {key: drawn(key, tuple(shape)) for key, shape in told(f"{name}/shapes").items()}
    write_safetensors(folder, of_arrays(tensors), tensors.values(), stem="diffusion_pytorch_model")
    (folder / "config.json").write_text(json.dumps(told(f"{name}/config")))
    return tensors


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(model: Any) -> tuple[Any, ...]:
    labels = () if getattr(model.config, "labels", 1) is None else (LABELS,)
    return pictures(model.config.size, model.config.channels), TIMES, *labels


def test_with_drawn_weights_it_computes_what_diffusers_computes_and_is_saved_as_it_was(
    name: str, tmp_path: Path
) -> None:
    load, save, table, rules = MODELS[name]
    tensors = write_theirs(name, tmp_path)
    model = load(tmp_path)
    expected = GOLDEN[f"{name}/output"]
    np.testing.assert_allclose(run(model, *inputs(model)), expected, atol=1e-4 * abs(expected).max())

    half, more = load(tmp_path, dtype=jnp.bfloat16), inputs(model)
    assert jax.eval_shape(half, jnp.asarray(more[0], jnp.bfloat16), *more[1:]).dtype == jnp.bfloat16

    save(model, tmp_path / "out")
    found = {key: tensor.read() for key, tensor in open_weights(tmp_path / "out").tensors.items()}
    assert found.keys() == tensors.keys() and all(np.array_equal(found[key], tensors[key]) for key in found)
    said, theirs = json.loads((tmp_path / "out" / "config.json").read_text()), told(f"{name}/config")
    assert {key: theirs[key] for key in said.keys() & theirs} == said

    names = {theirs for entry in entries(model, table) for theirs, _ in entry.parts()}
    repeated = {key for key in tensors if ".norm1.emb." in key and not key.startswith("transformer_blocks.0.")}
    assert names == tensors.keys() - repeated
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=rules, strict=True,
                         names={"heads": "tensor", "mlp": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(lambda: nnx.clone(model), plan))


def test_names_of_older_files_are_read(tmp_path: Path) -> None:
    tensors = write_theirs("unet", tmp_path)
    older = dict(tensors)
    for old, new in unet.OLDER.items():
        older = {key.replace(new, old): value for key, value in older.items()}
    assert older.keys() != tensors.keys()
    write_safetensors(tmp_path, of_arrays(older), older.values(), stem="diffusion_pytorch_model")
    kernel = unet.load_unet(tmp_path).middle.attentions[0].attn.out.kernel
    assert np.array_equal(kernel[...].reshape(16, 16), tensors["mid_block.attentions.0.to_out.0.weight"].T)


def test_blocks_whose_embeddings_differ_are_refused(tmp_path: Path) -> None:
    tensors = write_theirs("dit", tmp_path)
    tensors["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"][3, 5] += 1
    write_safetensors(tmp_path, of_arrays(tensors), tensors.values(), stem="diffusion_pytorch_model")
    with pytest.raises(WeightsError, match=r"blocks.2.norm1.emb.*not the one that it repeats|repeats"):
        dit.load_dit(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
        ("dit", {"_class_name": "UNet2DModel"}, "_class_name='UNet2DModel'"),
        ("dit", {"num_layers": 4}, "lack a tensor"),
        ("dit", {"attention_head_dim": 7}, "patches divide|4 the features"),
        ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "on both ways alike"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet", {"block_out_channels": [8, 18]}, "groups, heads"),
        ("unet", {"layers_per_block": 2}, "lack a tensor|another model"),
    ],
)
def test_files_of_other_models_are_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    write_theirs(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told(f"{name}/config") | changes))
    with pytest.raises(WeightsError, match=message):
        MODELS[name][0](tmp_path)


# ---------------------------------------------------------------- samplers
def says(channels: int = 3) -> d.Predict:
    return lambda x, t: predicted(jnp, x, t.astype(jnp.float32), channels)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_ddim_are_those_of_diffusers(schedule: str) -> None:
    ours = SCHEDULES_HERE[schedule]
    np.testing.assert_allclose(ours.kept_T[::111], GOLDEN[f"kept/{schedule}"], rtol=2e-5)
    np.testing.assert_allclose(ours.kept_T + ours.noise_T, 1, rtol=1e-6)
    x = jnp.asarray(pictures(4, 3))
    sample = jax.jit(lambda x: {(kind, zero): d.ddim(says(), x, ours, d.spaced(STEPS, to_zero=zero), kind=kind)
                                for kind in SAYS for zero in (True, False)})  # fmt: skip
    for (kind, zero), found in sample(x).items():
        expected = GOLDEN[f"ddim/{schedule}/{kind}/{'leading' if zero else 'trailing'}"]
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max(), err_msg=f"{kind} {zero}")


def test_samplers_that_draw_and_those_of_flows_are_those_of_diffusers() -> None:
    x, key, schedule, times = jnp.asarray(pictures(4, 3)), jax.random.key(0), d.linear(), d.spaced(STEPS)

    @jax.jit
    def samples(x: jax.Array) -> dict[str, jax.Array]:
        found = {f"ddpm/{how}": d.ddpm(says(6 if how == "learnt" else 3), x, key, schedule, times, variance=how, clip=1)
                 for how in ("small", "large", "learnt")}  # fmt: skip
        found["ddim/drawn"] = d.ddim(says(), x, schedule, times, eta=1.0, key=key, clip=1)
        return found | {name: solve(says(), x, GOLDEN[f"{name}/times"])
                        for name, solve in (("euler", d.euler), ("heun", d.heun))}  # fmt: skip

    for name, found in samples(x).items():
        expected = GOLDEN[name]
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max(), err_msg=name)


def test_what_models_say_converts_and_weights_are_those_of_min_snr() -> None:
    schedule, (x0, epsilon) = d.cosine(), np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    t_B = jnp.array([10, 500, 900])
    x, level = d.noised(schedule, jnp.asarray(x0), jnp.asarray(epsilon), t_B), schedule.at(t_B, 2)
    for kind in SAYS:
        target = d.target_of(kind, jnp.asarray(x0), jnp.asarray(epsilon), *level)
        for found, expected in zip(d.parts_of(kind, target, x, *level), (x0, epsilon)):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    ratio = schedule.kept_T.astype(np.float64) / schedule.noise_T
    # the three losses are one: what is wrong with x0, seen as what is wrong with epsilon or v
    of_x0 = d.min_snr(schedule, "x0")
    np.testing.assert_allclose(d.min_snr(schedule, "epsilon") * ratio, of_x0, rtol=1e-5)
    np.testing.assert_allclose(d.min_snr(schedule, "v") * (ratio + 1), of_x0, rtol=1e-5)
    assert of_x0.max() == 5 and of_x0.min() == pytest.approx(ratio[-1])


@pytest.mark.parametrize(("solve", "order"), [(d.euler, 1), (d.heun, 2)])
def test_a_sampler_of_flows_has_its_order(solve: Any, order: int) -> None:
    """dx/dσ = 2 σ x, from x = e at σ = 1, ends at 1."""
    ends = [solve(lambda x, t: 2 * t[:, None] / 1000 * x, jnp.full((1, 1), jnp.e), d.flow_times(n)) for n in (10, 20)]
    wrong = [abs(float(x[0, 0]) - 1) for x in ends]
    assert wrong[0] / wrong[1] == pytest.approx(2**order, rel=0.15)


def test_a_model_that_knows_the_noise_gets_the_picture_back_and_losses_are_zero() -> None:
    x0, key, schedule = jnp.asarray(pictures(4, 3)), jax.random.key(1), d.linear()
    noise = jax.random.normal(key, x0.shape)
    found = d.euler(lambda x, t: noise - x0, noise, d.flow_times(3, shift=3.0))
    np.testing.assert_allclose(found, x0, atol=1e-5)
    a, s = schedule.at(999)
    found = d.ddim(lambda x, t: noise, a * x0 + s * noise, schedule, d.spaced(7, to_zero=False))
    np.testing.assert_allclose(found, x0, atol=2e-3)  # a is 0.006: rounding of x comes back 150 times

    def knows(x: jax.Array, t: jax.Array) -> jax.Array:
        a, s = schedule.at(t, 4)
        return (x - a * x0) / s

    sigma = lambda t: t.reshape(-1, 1, 1, 1) / 1000
    assert d.noise_loss(knows, x0, key, schedule) < 1e-6
    assert d.noise_loss(lambda x, t: x0, x0, key, schedule, kind="x0", gamma=5.0) == 0
    assert d.noise_loss(lambda x, t: jnp.zeros_like(x), x0, key, schedule, gamma=5.0) < 1.2
    assert d.flow_loss(lambda x, t: (x - x0) / sigma(t), x0, key, middle=1.0) < 1e-6
    assert d.flow_loss(lambda x, t: jnp.zeros_like(x), x0, key) > 1


def test_guidance_moves_from_none_to_the_label_and_beyond_but_not_variances() -> None:
    def model(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.concatenate([x * labels.reshape(-1, 1), x + labels.reshape(-1, 1)], axis=-1)

    x, t, labels = jnp.ones((2, 3)), jnp.zeros(2), jnp.array([1, 2])
    for scale in (0.0, 1.0, 2.5):
        found = d.guided(model, labels, none=7, scale=scale)(x, t)
        np.testing.assert_allclose(found[:, :3], 7 + scale * (labels[:, None] - 7) * jnp.ones((2, 3)), rtol=1e-6)
        np.testing.assert_allclose(found[:, 3:], 1 + labels[:, None] * jnp.ones((2, 3)))


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_every_parameter_has_a_gradient(name: str, tmp_path: Path) -> None:
    write_theirs(name, tmp_path)
    model = MODELS[name][0](tmp_path)
    loss = lambda model, *args: jnp.square(model(*args)).mean()
    gradients = nnx.jit(nnx.grad(loss))(model, *inputs(model))
    for path, g in nnx.to_flat_state(gradients):
        assert np.isfinite(g[...]).all(), path
        assert np.any(abs(g[...]) > 1e-9) or path[-2:] == ("key", "bias"), path  # which changes no result


def test_a_dit_begins_as_nothing_and_leaves_out_labels_in_training_alone() -> None:
    model = dit.Dit(dit.DITS["tiny"].replace(drop_class=0.5), rngs=nnx.Rngs(0))
    assert not np.any(run(model, *inputs(model)))
    labels = jnp.zeros(64, jnp.int32)
    none = model.classes.embed(jnp.array([10]))[0]
    dropped = [bool((row == none).all()) for row in np.asarray(model.classes(labels))]
    assert 16 < sum(dropped) < 48
    model.eval()
    assert not any((row == none).all() for row in np.asarray(model.classes(labels)))


def test_waves_are_of_all_lengths() -> None:
    t_B = np.array([0.0, 3.0, 999.5], np.float32)
    found = np.asarray(waves(jnp.asarray(t_B), 8, sine_first=True, shift=1))
    angles = t_B[:, None] * 10_000.0 ** -(np.arange(4) / 3)
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-4)


# ---------------------------------------------------------------- errors
def test_what_does_not_fit_is_refused() -> None:
    schedule, x = d.linear(), jnp.zeros((1, 2))
    tiny = jax.eval_shape(lambda: unet.Unet(unet.UNETS["tiny"], rngs=nnx.Rngs(0)))
    transformer = jax.eval_shape(lambda: dit.Dit(dit.DITS["tiny"], rngs=nnx.Rngs(0)))
    none = lambda x, t: x
    word: Any = "noise"
    for wrong, error, message in (
        (lambda: tiny(jnp.zeros((1, 8, 8, 3)), 0), ArgumentError, "labels left out"),
        (lambda: tiny(jnp.zeros((1, 9, 8, 3)), 0, 1), ShapeError, "halves the picture"),
        (lambda: transformer(jnp.zeros((1, 9, 8, 4)), 0, 1), ShapeError, "patches divide"),
        (lambda: transformer(jnp.zeros((1, 8, 8, 3)), 0, 1), ShapeError, "channels last"),
        (lambda: dit.DitConfig(layers=0), ArgumentError, "layers is a size"),
        (lambda: unet.UnetConfig(looking=(4,)), ArgumentError, "levels that exist"),
        (lambda: d.schedule_of([0.1, 1.0]), ArgumentError, "between 0 and 1"),
        (lambda: d.spaced(1001), ArgumentError, "1 to 1000"),
        (lambda: d.flow_times(0), ArgumentError, "got 0"),
        (lambda: d.ddim(none, x, schedule, [0, 10]), ArgumentError, "from large to small"),
        (lambda: d.ddim(none, x, schedule, [1000, 0]), ArgumentError, "from 999 to 0"),
        (lambda: d.ddim(none, x, schedule, [10, 0], eta=1.0), ArgumentError, "no key"),
        (lambda: d.ddpm(none, x, jax.random.key(0), schedule, [0], variance=word), ArgumentError, "learnt"),
        (lambda: d.min_snr(schedule, word), ArgumentError, "epsilon, v or x0"),
    ):
        with pytest.raises(error, match=message):
            wrong()


# ---------------------------------------------------------------- the program
@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("diffusion")


def test_the_program_learns_goes_on_from_its_run_draws_and_measures(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, written, kept = tmp_path / "out", program.written, []
    monkeypatch.setattr(program, "written", lambda model, *rest: kept.append(model) or written(model, *rest))
    argv = ["--tiny", "--model", "dit", "--steps", "6", "--each", "2", "--sampler", "euler", "--sampling-steps", "2",
            "--require", "1.0", "--out", str(out), "--run", str(tmp_path / "run")]  # fmt: skip
    data = importlib.import_module("digits_data").load("digits")
    first = program.trained(data, program.options(argv))
    begun = nnx.state(program.model_of("dit", True, 0), nnx.Param)
    still = jax.tree.map(np.array_equal, nnx.state(first, nnx.Param), begun)
    assert sum(map(bool, jax.tree.leaves(still))) <= 1, "every parameter learns but the bias of keys"
    assert program.main([*argv, "--seed", "1"]) == 1  # from the start it would be another model
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(first, nnx.Param), nnx.state(kept[0], nnx.Param)))
    said = capsys.readouterr().out
    assert "below the required 100.0%" in said
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in said.splitlines() if line.startswith(("written", "real"))]
    named, distance, nearest = ([float(row[i].rstrip("%")) for row in rows] for i in (-3, -2, -1))
    assert named[0] < 60 < named[1], "noise is no digit, real ones are"
    assert distance[0] > distance[2] > distance[1] and abs(distance[1]) < 1e-6
    assert nearest[0] > 2 * nearest[1] > nearest[2] == 0


def test_the_distance_of_sets_is_that_of_their_means_and_spreads(program: Any) -> None:
    x = np.random.default_rng(0).normal(size=(400, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    assert program.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert program.frechet(x, x + [3, 0, 4]) == pytest.approx(25)
    assert program.frechet(x, 3 * x) == pytest.approx(3 * (3 - 1) ** 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "expected a whole number above zero"),
        (["--model", "vae"], "invalid choice: 'vae'"),
        (["--batch", "5000"], "expected at most the 1,437 pictures"),
        (["--out", __file__], "cannot write to --out"),
        (["--out", str(Path(__file__).parent), "--run", __file__], "cannot write to --run"),
    ],
)
def test_wrong_arguments_end_the_program_with_2_and_a_reason(
    argv: list[str], message: str, program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err
