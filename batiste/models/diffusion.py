# SPDX-License-Identifier: Apache-2.0
"""Diffusion: how pictures become noise, what a model learns of that, and how noise becomes pictures again.

    loss = flow_loss(lambda x, t: model(x, t, labels), pictures, key)                             # to train
    make = nnx.jit(lambda model, noise: heun(guided(model, labels, none=10, scale=2.0), noise, flow_times(20)))

Two ways of adding noise ε to a picture x₀:

    diffusion   x = a x₀ + s ε,        a² + s² = 1, of a whole time 0 … T - 1      sampled by `ddpm`, `ddim`
    flow        x = (1 - σ) x₀ + σ ε,  σ from 0 to 1                               sampled by `euler`, `heun`

A prediction is a function of pictures x[B, ...] and times[B] (of a flow, 1000 σ). Each sampler is one loop on the
device, `jax.lax.scan`; nothing here knows of models.

Dims, in the suffixes of names:  B batch   T times of a schedule   N steps of a sampler
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from batiste.graph.errors import ArgumentError

Predict = Callable[[Array, Array], Array]
Numbers = ArrayLike | Sequence[float]
Kind = Literal["epsilon", "v", "x0"]
FLOW = 1000.0  # the time that a model is told where σ = 1


# ---------------------------------------------------------------- schedules
class Schedule(NamedTuple):
    """How much of a picture is left, ᾱ = a², and how much is noise, 1 - ᾱ = s², at each time; both as numbers of
    their own, since the difference of rounded numbers loses the small one.
    """

    kept_T: np.ndarray
    noise_T: np.ndarray

    def at(self, t: ArrayLike, ndim: int = 0) -> tuple[Array, Array]:
        """a and s, with dims of size 1 behind up to `ndim` of them"""
        found = (jnp.sqrt(jnp.asarray(part))[jnp.asarray(t)] for part in self)
        a, s = (x.reshape(x.shape + (1,) * (ndim - x.ndim)) for x in found)
        return a, s


def schedule_of(beta_T: Numbers) -> Schedule:
    """ᾱ[t] = Π (1 - β[i]), i = 0 … t

    Raises:
        ArgumentError: a variance is not between 0 and 1.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4.
    """
    beta_T = np.asarray(beta_T, np.float64)
    if beta_T.ndim != 1 or beta_T.size == 0 or not ((beta_T > 0) & (beta_T < 1)).all():
        raise ArgumentError("a schedule is of variances", got=f"shape {beta_T.shape}",
                            expected="one or more numbers between 0 and 1")  # fmt: skip
    logs_T = np.cumsum(np.log1p(-beta_T))
    return Schedule(np.exp(logs_T).astype(np.float32), (-np.expm1(logs_T)).astype(np.float32))


def linear(count: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """β from first to last

    >>> [round(float(x), 6) for x in linear().kept_T[[0, 500, 999]]]
    [0.9999, 0.077797, 4e-05]

    Source: Ho et al. 2020, section 4.
    """
    return schedule_of(np.linspace(first, last, count))


def scaled_linear(count: int = 1000, first: float = 0.00085, last: float = 0.012) -> Schedule:
    """√β from √first to √last

    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", in their program.
    """
    return schedule_of(np.linspace(first**0.5, last**0.5, count) ** 2)


def cosine(count: int = 1000, offset: float = 0.008) -> Schedule:
    """ᾱ as cos²((t / T + offset) / (1 + offset) π / 2), with β up to 0.999

    Source: Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 17.
    """
    kept = np.cos((np.arange(count + 1) / count + offset) / (1 + offset) * np.pi / 2) ** 2
    return schedule_of(np.minimum(1 - kept[1:] / kept[:-1], 0.999))


def spaced(steps: int, count: int = 1000, *, to_zero: bool = True) -> np.ndarray:
    """times[N] to go through, from large to small and evenly: down to 0 itself, or from the last one of the schedule

    >>> spaced(4).tolist(), spaced(4, to_zero=False).tolist()
    ([750, 500, 250, 0], [999, 749, 499, 249])

    Raises:
        ArgumentError: there are more steps than times.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2.
    """
    _check_steps(steps, count)
    if to_zero:
        return np.arange(steps)[::-1] * (count // steps)
    return np.round(count - np.arange(steps) * count / steps).astype(int) - 1


def flow_times(steps: int, shift: float = 1.0) -> np.ndarray:
    """σ[N + 1] from 1 to 0;  σ ← shift σ / (1 + (shift - 1) σ), which stays longer among the noise if shift > 1

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23.
    """
    _check_steps(steps)
    sigma = np.linspace(1, 0, steps + 1)
    return (shift * sigma / (1 + (shift - 1) * sigma)).astype(np.float32)


def _check_steps(steps: int, most: int = 1 << 20) -> None:
    if not 1 <= steps <= most:
        raise ArgumentError("a sampler takes some steps", got=steps, expected=f"1 to {most}")


# ---------------------------------------------------------------- what is learnt
def noised(schedule: Schedule, x0: Array, epsilon: Array, t_B: Array) -> Array:
    """x = a x₀ + s ε

    Source: Ho et al. 2020, eq. 4.
    """
    a, s = schedule.at(t_B, x0.ndim)
    return a * x0 + s * epsilon


def target_of(kind: Kind, x0: Array, epsilon: Array, a: Array, s: Array) -> Array:
    """What a model should say: ε;  v = a ε - s x₀;  x₀

    Source: Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D (v).
    """
    if kind == "v":
        return a * epsilon - s * x0
    return epsilon if _known(kind) == "epsilon" else x0


def parts_of(kind: Kind, said: Array, x: Array, a: Array, s: Array) -> tuple[Array, Array]:
    """x₀ and ε of what a model says of x = a x₀ + s ε"""
    if kind == "v":
        return a * x - s * said, s * x + a * said
    if _known(kind) == "epsilon":
        return (x - s * said) / a, said
    return said, (x - a * said) / s


def min_snr(schedule: Schedule, kind: Kind, gamma: float = 5.0) -> np.ndarray:
    """Weights[T] of the losses: min(a² / s², γ) for x₀, that over a² / s² for ε, that over a² / s² + 1 for v

    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    ratio_T = schedule.kept_T / schedule.noise_T
    over_T = {"epsilon": ratio_T, "v": ratio_T + 1, "x0": np.ones_like(ratio_T)}[_known(kind)]
    return np.minimum(ratio_T, gamma) / over_T


def noise_loss(predict: Predict, x0: Array, key: Array, schedule: Schedule, *, kind: Kind = "epsilon",
               gamma: float | None = None) -> Array:  # fmt: skip
    """mean of w (predict(a x₀ + s ε, t) - target)²,  t drawn for each row, ε for each number;  w of `min_snr`, or 1

    Source: Ho et al. 2020, eq. 14.
    """
    t_key, key = jax.random.split(key)
    t_B = jax.random.randint(t_key, x0.shape[:1], 0, len(schedule.kept_T))
    epsilon = jax.random.normal(key, x0.shape, x0.dtype)
    said = predict(noised(schedule, x0, epsilon, t_B), t_B)
    error_B = _per_row(said - target_of(kind, x0, epsilon, *schedule.at(t_B, x0.ndim)))
    return (error_B if gamma is None else jnp.asarray(min_snr(schedule, kind, gamma))[t_B] * error_B).mean()


def flow_loss(predict: Predict, x0: Array, key: Array, *, middle: float | None = None) -> Array:
    """mean of (predict((1 - σ) x₀ + σ ε, 1000 σ) - (ε - x₀))²,  σ drawn for each row, ε for each number

    Args:
        middle: σ is drawn as sigmoid(middle · normal), so the middle comes more often; evenly if left out.

    Source: Liu et al. 2023, "Flow Straight and Fast", eq. 1; Esser et al. 2024, eq. 19 (`middle`).
    """
    sigma_key, key = jax.random.split(key)
    sigma_B = jax.random.uniform(sigma_key, x0.shape[:1])
    if middle is not None:
        sigma_B = jax.nn.sigmoid(middle * jax.random.normal(sigma_key, x0.shape[:1]))
    epsilon = jax.random.normal(key, x0.shape, x0.dtype)
    sigma = sigma_B.reshape(-1, *(1,) * (x0.ndim - 1)).astype(x0.dtype)
    return _per_row(predict((1 - sigma) * x0 + sigma * epsilon, FLOW * sigma_B) - (epsilon - x0)).mean()


def dropped(labels_B: Array, key: Array, *, none: int, rate: float = 0.1) -> Array:
    """labels[B], of which a share becomes `none`: what `guided` compares with is learnt so

    `Dit` does so by itself in training, `Unet` does not.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1.
    """
    return jnp.where(jax.random.bernoulli(key, rate, labels_B.shape), none, labels_B)


def _per_row(error: Array) -> Array:
    return jnp.square(error.astype(jnp.float32)).reshape(error.shape[0], -1).mean(-1)


def _known(kind: str) -> str:
    if kind not in ("epsilon", "v", "x0"):
        raise ArgumentError("a model says one of three things of noise", got=repr(kind), expected="epsilon, v or x0")
    return kind


# ---------------------------------------------------------------- sampling
def guided(model: Callable[..., Array], labels_B: ArrayLike, *, none: int, scale: float) -> Predict:
    """e(x, none) + scale · (e(x, y) - e(x, none)), both computed as one batch

    Args:
        none: the label that stands for none.
        scale: 1 is the model itself, 0 the model without labels; more follows the labels more closely.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 (scale = 1 + w).
    """
    labels_B = jnp.asarray(labels_B)

    def predict(x: Array, t_B: Array) -> Array:
        labels = jnp.concatenate([labels_B, jnp.full_like(labels_B, none)])
        said = model(jnp.concatenate([x, x]), jnp.concatenate([t_B, t_B]), labels)
        given, free = jnp.split(said, 2)
        channels = x.shape[-1]  # behind them, variances are not guided
        moved = free[..., :channels] + scale * (given - free)[..., :channels]
        return jnp.concatenate([moved, given[..., channels:]], axis=-1)

    return predict


def ddpm(predict: Predict, x: Array, key: Array, schedule: Schedule, times: Numbers, *, kind: Kind = "epsilon",
         variance: Literal["small", "large", "learnt"] = "small", clip: float | None = None) -> Array:  # fmt: skip
    """x ← √ᾱ' β / s² x₀ + √α s'² / s² x + √variance z,  α = ᾱ / ᾱ',  β = 1 - α;  ' is the next time; no z at the end

    Args:
        x: noise.
        times: of the schedule, from large to small (`spaced`).
        kind: what the model says.
        variance: small is β s'² / s², large is β; learnt lies between, as more channels of the prediction say.
        clip: the largest number in a picture.

    Source: Ho et al. 2020, eqs. 6 and 7; Nichol and Dhariwal 2021, eqs. 15 (learnt) and 19 (fewer times).
    """
    if variance not in ("small", "large", "learnt"):
        raise ArgumentError("a variance is one of three", got=repr(variance), expected="small, large or learnt")

    def step(x: Array, t: Array, now: Now, key: Array) -> Array:
        said, channels = predict(x, jnp.full(x.shape[:1], t)), x.shape[-1]
        x0 = _clipped(parts_of(kind, said[..., :channels], x, now.a, now.s)[0], clip)
        beta = (now.noise - now.next_noise) / now.next_kept
        small = beta * now.next_noise / now.noise
        of_x0 = jnp.sqrt(now.next_kept) * beta / now.noise
        of_x = jnp.sqrt(now.kept / now.next_kept) * now.next_noise / now.noise
        width = jnp.sqrt({"small": small, "large": beta}.get(variance, 1.0))
        if variance == "learnt":
            share = (said[..., channels:] + 1) / 2
            width = jnp.exp(0.5 * (share * jnp.log(beta) + (1 - share) * jnp.log(jnp.maximum(small, 1e-20))))
        z = jax.random.normal(key, x.shape, x.dtype)
        return of_x0 * x0 + of_x * x + jnp.where(now.next_noise > 0, width, 0) * z

    times_N = _checked(times, schedule)
    return _loop(step, x, jnp.asarray(times_N), _nows(schedule, times_N), jax.random.split(key, len(times_N)))


def ddim(predict: Predict, x: Array, schedule: Schedule, times: Numbers, *, kind: Kind = "epsilon",
         eta: float = 0.0, key: Array | None = None, clip: float | None = None) -> Array:  # fmt: skip
    """x ← √ᾱ' x₀ + √(s'² - w²) ε + w z,  w = eta √(β s'² / s²);  with eta = 0 nothing is drawn

    Args:
        x, times, kind, clip: as in `ddpm`.
        eta: from 0 to 1, which has the variance of `ddpm`.
        key: for eta above 0.

    Raises:
        ArgumentError: eta is above 0, and there is no key.

    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", eqs. 12 and 16.
    """
    if eta and key is None:
        raise ArgumentError("with eta above 0, noise is drawn", got=f"eta={eta}, no key", fix="pass key=")

    def step(x: Array, t: Array, now: Now, key: Array | None) -> Array:
        said = predict(x, jnp.full(x.shape[:1], t))[..., : x.shape[-1]]
        x0, epsilon = parts_of(kind, said, x, now.a, now.s)
        variance = eta**2 * (now.noise - now.next_noise) / now.next_kept * now.next_noise / now.noise
        x0 = _clipped(x0, clip)
        mean = jnp.sqrt(now.next_kept) * x0 + jnp.sqrt(jnp.maximum(now.next_noise - variance, 0)) * epsilon
        return mean if key is None else mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape, x.dtype)

    times_N = _checked(times, schedule)
    keys = None if not eta or key is None else jax.random.split(key, len(times_N))
    return _loop(step, x, jnp.asarray(times_N), _nows(schedule, times_N), keys)


def euler(predict: Predict, x: Array, times: Numbers) -> Array:
    """x ← x + (σ' - σ) v(x, σ), of a flow whose model says v = ε - x₀

    Args:
        x: noise.
        times: σ from 1 to 0 (`flow_times`).
    """

    def step(x: Array, sigma: Array, after: Array) -> Array:
        return x + (after - sigma) * predict(x, jnp.full(x.shape[:1], FLOW * sigma))

    sigmas = jnp.asarray(times, x.dtype)
    return _loop(step, x, sigmas[:-1], sigmas[1:])


def heun(predict: Predict, x: Array, times: Numbers) -> Array:
    """x ← x + (σ' - σ) (v(x, σ) + v(y, σ')) / 2,  y = x + (σ' - σ) v(x, σ); as `euler`, of second order

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1; its
        last step is one of Euler's, and here none is, as v has no pole at 0.
    """

    def step(x: Array, sigma: Array, after: Array) -> Array:
        first = predict(x, jnp.full(x.shape[:1], FLOW * sigma))
        second = predict(x + (after - sigma) * first, jnp.full(x.shape[:1], FLOW * after))
        return x + (after - sigma) * (first + second) / 2

    sigmas = jnp.asarray(times, x.dtype)
    return _loop(step, x, sigmas[:-1], sigmas[1:])


class Now(NamedTuple):
    """ᾱ and s² at a time and at the next: 1 and 0 after the last."""

    kept: Any
    noise: Any
    next_kept: Any
    next_noise: Any

    @property
    def a(self) -> Array:
        return jnp.sqrt(self.kept)

    @property
    def s(self) -> Array:
        return jnp.sqrt(self.noise)


def _nows(schedule: Schedule, times_N: np.ndarray) -> Now:
    kept_N, noise_N = schedule.kept_T[times_N], schedule.noise_T[times_N]
    return Now(kept_N, noise_N, np.append(kept_N[1:], np.float32(1)), np.append(noise_N[1:], np.float32(0)))


def _checked(times: Numbers, schedule: Schedule) -> np.ndarray:
    """Raises:
    ArgumentError: these are no falling times of the schedule.
    """
    times_N = np.asarray(times)
    count, whole = len(schedule.kept_T), times_N.ndim == 1 and times_N.size and times_N.dtype.kind in "iu"
    if not whole or (np.diff(times_N) >= 0).any() or times_N.min() < 0 or times_N.max() >= count:
        raise ArgumentError("a sampler goes through times of the schedule, from large to small", got=str(times_N)[:60],
                            expected=f"whole numbers from {count - 1} to 0", fix="see spaced")  # fmt: skip
    return times_N


def _clipped(x0: Array, clip: float | None) -> Array:
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def _loop(step: Callable[..., Array], x: Array, *each: Any) -> Array:
    return jax.lax.scan(lambda x, now: (step(x, *now).astype(x.dtype), None), x, each)[0]
