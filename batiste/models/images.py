# SPDX-License-Identifier: Apache-2.0
"""What the models of images share: pictures made ready, a convolution with its norm, whole paths left out in training.

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from batiste import nn
from batiste.graph import Module, Rngs, data
from batiste.graph.errors import ShapeError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Means and deviations of red, green and blue, where 1 is the brightest."""


def prepared(image: ArrayLike, size: int, colours: tuple[Any, Any] = IMAGENET, *, crop: float = 0.875) -> Array:
    """(image / 255 - mean) / deviation, [size, size, 3]: the middle of the picture, bicubic without aliases

    Args:
        image: [rows, columns, 3], in bytes.
        colours: the means and the deviations.
        crop: the share of the shorter side that is kept.

    Raises:
        ShapeError: it is no picture with three colours.

    >>> prepared(np.zeros((60, 80, 3), np.uint8), 32).shape
    (32, 32, 3)
    """
    shape = np.shape(image)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ShapeError("a picture has rows, columns and three colours", at="prepared", got=shape,
                         expected="(rows, columns, 3)", fix="convert it to RGB")  # fmt: skip
    rows, columns = shape[:2]
    least = max(size, round(size / crop))
    tall, wide = (max(size, round(n * least / min(rows, columns))) for n in (rows, columns))
    resized = jax.image.resize(jnp.asarray(image, jnp.float32), (tall, wide, 3), "cubic", antialias=True)
    top, left = (tall - size) // 2, (wide - size) // 2
    middle = jnp.clip(jnp.round(resized[top : top + size, left : left + size]), 0, 255) / 255
    mean, deviation = (jnp.asarray(values, jnp.float32)[None, None] for values in colours)
    return (middle - mean) / deviation


def check_images(model: Module, images: Array, channels: int = 3) -> None:
    """Raises:
    ShapeError: these are no images[B, Y, X, channels].
    """
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ShapeError("the model looks at batches of images, channels last", at=model, got=images.shape,
                         expected=f"(batch, rows, columns, {channels})",
                         fix="add a dim of size 1: image[None]; move channels to the end")  # fmt: skip


class ConvNorm(Module):
    """norm(x * kernel), of a stride of 1 or more; `groups` as in `Conv`

    Args:
        even: pads by (size - 1) / 2 on both sides, as PyTorch's models do; else as XLA's SAME, more at the end.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, *, groups: int = 1,
                 even: bool = False, epsilon: float = 1e-5, momentum: float = 0.9, rngs: Rngs):  # fmt: skip
        self.conv = nn.Conv(inputs, outputs, (size, size), stride, feature_group_count=groups, use_bias=False,
                            padding=(size - 1) // 2 if even else "SAME", rngs=rngs)  # fmt: skip
        self.norm = nn.BatchNorm(outputs, epsilon=epsilon, momentum=momentum, rngs=rngs)

    def __call__(self, x_BYXC: Array) -> Array:
        return self.norm(self.conv(x_BYXC))


def conv_norm(ours: str, conv: str, norm: str) -> dict[str, str]:
    """The lines of a table for a ConvNorm, by PyTorch's names.

    >>> conv_norm("stem", "conv1", "bn1")["stem/norm/mean"]
    'bn1.running_mean'
    """
    statistics = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    norms = {f"{ours}/norm/{name}": f"{norm}.{theirs}" for name, theirs in statistics.items()}
    return {f"{ours}/conv/kernel": f"{conv}.weight", **norms}


def drop_path(rate: float, rngs: Rngs) -> Any:
    """A layer that leaves out the path of whole rows of a batch, in training; None if it never does.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3.
    """
    return data(nn.Dropout(rate, broadcast_dims=(1, 2, 3), rngs=rngs) if rate else None)
