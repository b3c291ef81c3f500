# SPDX-License-Identifier: Apache-2.0
"""Conv and ConvTranspose in one to three dims, under every padding, and the pooling functions."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from tests.parity.case import Case, distinct, normal

bias_init = initializers.normal()
X1, X2, X3 = (normal(2, 7, 4),), (normal(2, 7, 6, 4),), (normal(2, 5, 4, 3, 2),)
X2_BF16 = (normal(2, 7, 6, 4, dtype=jnp.bfloat16),)
DISTINCT = (distinct(2, 7, 6, 4),)
MASK = (normal(3, 2, 4, 6) > 0).astype(np.float32)


def conv(name: str, *args, inputs=X2, layer: str = "Conv", tolerance: float = 1e-5, **options) -> Case:
    options.setdefault("bias_init", bias_init)
    return Case(name, lambda nnx: getattr(nnx, layer)(*args, **options, rngs=nnx.Rngs(0)), inputs, tolerance=tolerance)


def paddings() -> Iterator[Case]:
    """Every padding, without and with strides and dilation."""
    for padding in ("SAME", "VALID", "SAME_LOWER", "CIRCULAR", "REFLECT", 1, (2, 0), ((1, 0), (0, 2))):
        for strides, dilation in ((1, 1), ((3, 2), (1, 2))):
            name = f"conv-{padding}-strides-{strides}-dilation-{dilation}"
            yield conv(name, 4, 6, (3, 2), strides, padding=padding, kernel_dilation=dilation)
    for strides, dilation in ((1, 1), (2, 3)):
        name = f"conv-CAUSAL-strides-{strides}-dilation-{dilation}"
        yield conv(name, 4, 6, 3, strides, padding="CAUSAL", kernel_dilation=dilation, inputs=X1)


def transposed_paddings() -> Iterator[Case]:
    for padding in ("SAME", "VALID", "CIRCULAR", 1, ((1, 0), (0, 2))):
        for strides, dilation in ((None, None), ((3, 2), (1, 2))):
            for transpose_kernel in (False, True):
                name = f"conv-transpose-{padding}-strides-{strides}-dilation-{dilation}-{transpose_kernel}"
                yield conv(name, 4, 6, (3, 2), strides, padding=padding, kernel_dilation=dilation,
                           transpose_kernel=transpose_kernel, layer="ConvTranspose")  # fmt: skip


def pooling() -> Iterator[Case]:
    """Functions of no parameters, on distinct numbers, so that no two tie for an extremum."""
    for function in ("max_pool", "min_pool", "avg_pool"):
        for window, strides in (((2, 2), (2, 2)), ((3, 2), (2, 1)), ((2,), None)):
            for padding in ("VALID", "SAME"):
                yield _pool(f"{function}-{window}-strides-{strides}-{padding}", function, window, strides, padding)
        yield _pool(f"{function}-pairs", function, (2, 2), (2, 2), ((1, 0), (0, 2)))
        yield _pool(f"{function}-all", function, (7, 6))
        yield _pool(f"{function}-bf16", function, (2, 2), (2, 2), inputs=X2_BF16, tolerance=2e-2)
    for padding in ("SAME", ((1, 1), (0, 1))):
        yield _pool(f"avg_pool-count-{padding}", "avg_pool", (3, 3), (2, 2), padding, False)


def _pool(name: str, function: str, *args, inputs=DISTINCT, tolerance: float = 1e-5) -> Case:
    def build(nnx):
        return nnx.Sequential(lambda x: getattr(nnx, function)(x, *args))

    return Case(name, build, inputs, tolerance=tolerance)


CASES = [
    *paddings(),
    conv("conv-number-for-kernel-size", 4, 6, 3, inputs=X1),
    conv("conv-3d", 2, 4, (3, 2, 2), inputs=X3),
    conv("conv-3d-reflect", 2, 4, (3, 2, 2), padding="REFLECT", inputs=X3),
    conv("conv-no-spatial-dim", 4, 6, (), inputs=(normal(5, 4),)),
    conv("conv-no-batch", 4, 6, (3, 3), inputs=(normal(7, 6, 4),)),
    conv("conv-many-batch-dims", 4, 6, 3, inputs=(normal(2, 3, 7, 4),)),
    conv("conv-groups", 4, 6, (3, 3), feature_group_count=2),
    conv("conv-depthwise", 4, 8, (3, 3), feature_group_count=4),
    conv("conv-input-dilation", 4, 6, (3, 3), padding=1, input_dilation=(2, 1)),
    conv("conv-mask", 4, 6, (3, 2), mask=MASK),
    conv("conv-no-bias", 4, 6, (3, 3), use_bias=False),
    conv("conv-no-strides", 4, 6, (3, 3), None, input_dilation=None, kernel_dilation=None, padding="same"),
    conv("conv-circular-window-over-input", 4, 6, 9, padding="CIRCULAR", inputs=(normal(2, 3, 4),)),
    conv("conv-bf16", 4, 6, (3, 3), dtype=jnp.bfloat16, tolerance=5e-2),
    conv("conv-bf16-input", 4, 6, (3, 3), inputs=X2_BF16, tolerance=5e-2),
    conv("conv-bf16-params", 4, 6, (3, 3), param_dtype=jnp.bfloat16, inputs=X2_BF16, tolerance=5e-2),
    *transposed_paddings(),
    conv("conv-transpose-number-for-kernel-size", 4, 6, 3, layer="ConvTranspose", inputs=X1),
    conv("conv-transpose-3d", 2, 4, (3, 2, 2), (2, 1, 2), layer="ConvTranspose", inputs=X3),
    conv("conv-transpose-no-batch", 4, 6, (3, 3), 2, layer="ConvTranspose", inputs=(normal(7, 6, 4),)),
    conv("conv-transpose-many-batch-dims", 4, 6, 3, 2, layer="ConvTranspose", inputs=(normal(2, 3, 7, 4),)),
    conv("conv-transpose-circular-long-kernel", 4, 6, 9, 2, padding="CIRCULAR", layer="ConvTranspose",
         inputs=(normal(2, 3, 4),)),
    conv("conv-transpose-mask", 4, 6, (3, 2), mask=MASK, layer="ConvTranspose"),
    conv("conv-transpose-no-bias", 4, 6, (3, 3), 2, use_bias=False, layer="ConvTranspose"),
    conv("conv-transpose-bf16", 4, 6, (3, 3), 2, dtype=jnp.bfloat16, layer="ConvTranspose", tolerance=5e-2),
    *pooling(),
]  # fmt: skip
