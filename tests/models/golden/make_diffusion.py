# SPDX-License-Identifier: Apache-2.0
"""How diffusion.npz was made: what diffusers 0.35.2 computes, with weights and noise that every reader can draw anew.

    pip install diffusers==0.35.2 torch
    python tests/models/golden/make_diffusion.py

It holds, of two models, the settings, the names and shapes of all tensors, and the output; and where its samplers end.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = Path(__file__).with_name("diffusion.npz")
STEPS = 5
TIMES, LABELS = np.array([3, 777]), np.array([4, 10])
KINDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learnt": "learned_range"}
MODELS = {
    "dit": ("DiTTransformer2DModel", {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    }),
    "unet": ("UNet2DModel", {
        "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8, "num_class_embeds": 11,
    }),
    "unet, as of DDPM": ("UNet2DModel", {
        "sample_size": 8, "block_out_channels": [8, 12], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        "attention_head_dim": None,
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    }),
}  # fmt: skip


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a name; those of a DiT's embeddings are the same in every block."""
    if ".norm1.emb." in name:
        name = "transformer_blocks.0" + name[name.index(".norm1.emb.") :]
    return np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.3, shape).astype(np.float32)


def pictures(size: int, channels: int) -> np.ndarray:
    """[2, size, size, channels]"""
    return drawn("pictures", (2, size, size, channels)) / 0.3


def predicted(numpy: Any, x: Any, t: Any, channels: int) -> Any:
    """What samplers are told of x at times t: a function that anyone can compute."""
    weights = drawn("prediction", (x.shape[-1], 2 * x.shape[-1]))[:, :channels]
    return numpy.tanh(numpy.matmul(x, weights) + 0.001 * t.reshape(-1, 1, 1, 1))


def noises() -> Iterator[np.ndarray]:
    """What batiste's samplers draw with key 0."""
    return (np.asarray(jax.random.normal(key, (2, 4, 4, 3))) for key in jax.random.split(jax.random.key(0), STEPS))


def model_output(kind: str, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    torch, diffusers = importlib.import_module("torch"), importlib.import_module("diffusers")
    model = getattr(diffusers, kind)(**settings).eval()
    tensors = model.state_dict()
    for name, value in tensors.items():
        value.copy_(torch.tensor(drawn(name, tuple(value.shape))))
    x = torch.tensor(pictures(settings["sample_size"], settings.get("in_channels", 3))).permute(0, 3, 1, 2)
    labels = () if kind == "UNet2DModel" and "num_class_embeds" not in settings else (torch.tensor(LABELS),)
    with torch.no_grad():
        out = model(x, torch.tensor(TIMES), *labels).sample.permute(0, 2, 3, 1).numpy()
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    return {"output": out, "shapes": as_text(shapes), "config": as_text(json.loads(model.to_json_string()))}


def sampled(scheduler: Any, channels: int = 3, step: Callable[..., Any] | None = None) -> np.ndarray:
    """Where a sampler ends that starts from `pictures(4, 3)`."""
    torch, x = importlib.import_module("torch"), pictures(4, 3)
    for t in scheduler.timesteps:
        said = predicted(np, x, np.full(2, float(t), np.float32), channels)
        said, now = (torch.tensor(part).permute(0, 3, 1, 2) for part in (said, x))
        x = (step or scheduler.step)(said, t, now).prev_sample.permute(0, 2, 3, 1).numpy()
    return x


def samplers() -> Iterator[tuple[str, np.ndarray]]:
    torch, of = importlib.import_module("torch"), importlib.import_module("diffusers")
    ancestral: Any = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    channels_first = lambda noise: torch.tensor(noise).permute(0, 3, 1, 2)
    for schedule, settings in SCHEDULES.items():
        kept = of.DDIMScheduler(**settings).alphas_cumprod.numpy()
        yield f"kept/{schedule}", kept[::111]
        for kind, theirs in KINDS.items():
            for spacing in ("leading", "trailing"):
                scheduler = of.DDIMScheduler(**settings, prediction_type=theirs, clip_sample=False,
                                             timestep_spacing=spacing)  # fmt: skip
                scheduler.set_timesteps(STEPS)
                yield f"ddim/{schedule}/{kind}/{spacing}", sampled(scheduler)
    scheduler = of.DDIMScheduler()  # clips
    scheduler.set_timesteps(STEPS)
    drawing = noises()
    step = lambda *args: scheduler.step(*args, eta=1.0, variance_noise=channels_first(next(drawing)))
    yield "ddim/drawn", sampled(scheduler, step=step)
    for variance, theirs in VARIANCES.items():
        scheduler = of.DDPMScheduler(variance_type=theirs)
        scheduler.set_timesteps(STEPS)
        drawing = noises()
        ancestral.randn_tensor = lambda *args, drawing=drawing, **kwargs: channels_first(next(drawing))
        yield f"ddpm/{variance}", sampled(scheduler, 6 if variance == "learnt" else 3)
    for name, theirs in (("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")):
        scheduler = getattr(of, theirs)(shift=2.0)
        scheduler.set_timesteps(STEPS)
        yield f"{name}/times", np.unique(scheduler.sigmas.numpy())[::-1]
        yield name, sampled(scheduler)


def as_text(x: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(x).encode(), np.uint8)


if __name__ == "__main__":
    models = {f"{name}/{part}": value for name, how in MODELS.items() for part, value in model_output(*how).items()}
    found: dict[str, Any] = {**models, **dict(samplers())}
    np.savez_compressed(FILE, **found)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
