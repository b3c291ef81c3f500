# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by adapters: chosen layers of a trained model get small trainable products; the rest stays as it is.

add_lora(model, "blocks/*/attn/query", "blocks/*/attn/value", rank=8, rngs=Rngs(0))
optimizer = Optimizer(model, optax.adam(1e-3), wrt=LoRAParam)    # the adapters alone have gradients and moments
save_adapters(model, "mine/");  load_adapters(model, "mine/")    # files of the adapters alone
merge_lora(model)                                                # the layers are plain again

Over `batiste.quant.quantize(model, bits=4)` this is QLoRA.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Module, Param, Rngs, iter_graph
from batiste.graph.errors import ArgumentError
from batiste.nn.initializers import he_uniform
from batiste.nn.lora import LoRAParam
from batiste.quant import QuantizedWeight

from .safetensors import Spec, open_safetensors, write_safetensors
from .tensors import WeightsError


def select(model: Module, *patterns: str) -> dict[str, Any]:
    """The modules and Variables of a model whose path fits one of the patterns; `*` stands for any part of a path.

    >>> model = nn.Linear(2, 3, rngs=Rngs(0))
    >>> list(select(model, "ker*"))
    ['kernel']
    """
    parts = {"/".join(map(str, path)): part for path, part in iter_graph(model)}
    return {path: part for path, part in parts.items() if any(fnmatchcase(path, pattern) for pattern in patterns)}


class Adapted(Module):
    """y = base(x) + scale · x[..., in] @ lora_a[in, rank] @ lora_b[rank, out]

    Args:
        base: a Linear, or a LinearGeneral over the last dims of x; of a stack of them, with the stack's first dims.
        scale: of the product.
    """

    def __init__(self, base: Any, rank: int, *, scale: float = 1.0, param_dtype: DTypeLike = jnp.float32, rngs: Rngs):
        lead, self.inputs, features = _sizes(base)
        keys = jax.random.split(rngs.params(), lead)
        draw = lambda key: he_uniform()(key, (math.prod(features[: self.inputs]), rank), param_dtype)
        self.base, self.scale = base, scale
        self.lora_a = LoRAParam(_mapped(draw, len(lead))(keys))
        self.lora_b = LoRAParam(jnp.zeros((*lead, rank, math.prod(features[self.inputs :])), param_dtype))

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        y = self.base(x, **kwargs)
        rows = x.reshape(*x.shape[: x.ndim - self.inputs], -1)
        more = rows @ self.lora_a[...].astype(x.dtype) @ self.lora_b[...].astype(x.dtype)
        return y + (self.scale * more).reshape(y.shape).astype(y.dtype)

    def merged(self) -> Any:
        """The base, with the product in its kernel; its values are floats, if they were quantised."""
        kernel = self.base.kernel
        more = self.scale * jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        value = kernel[...] + more.reshape(kernel.shape).astype(kernel.dtype)
        self.base.kernel = Param(value) if isinstance(kernel, QuantizedWeight) else kernel.replace(value)
        return self.base


def add_lora(model: Module, *patterns: str, rank: int = 8, alpha: float | None = None,
             param_dtype: DTypeLike = jnp.float32, rngs: Rngs) -> dict[str, Adapted]:  # fmt: skip
    """Puts adapters around the layers whose paths fit, where they are; the model computes what it did.

    Args:
        patterns: of paths, such as `blocks/*/attn/query`.
        rank: of the products.
        alpha: they are multiplied by alpha / rank; by 1, if left out.

    Raises:
        ArgumentError: no layer fits, or one that does is no Linear or LinearGeneral, or has an adapter.

    >>> from batiste.models import DECODERS, Decoder
    >>> model = Decoder(DECODERS["tiny"], rngs=Rngs(0))
    >>> list(add_lora(model, "*/attn/query", rank=2, rngs=Rngs(1)))
    ['blocks/layers/attn/query']
    """
    if rank < 1:
        raise ArgumentError("a product has a rank", got=f"rank={rank}", expected="1 or more")
    found = {path: part for path, part in select(model, *patterns).items() if isinstance(part, Module)}
    if not found:
        raise ArgumentError("no layer has a path that fits", got=", ".join(patterns),
                            fix="look at list(select(model, '*'))")  # fmt: skip
    for path, layer in found.items():
        if not isinstance(layer, (nn.Linear, nn.LinearGeneral)) or path.endswith("/base"):
            raise ArgumentError("adapters stand around Linear and LinearGeneral, one around each", at=path,
                                got=type(layer).__name__, fix="take narrower patterns")  # fmt: skip
    scale = 1.0 if alpha is None else alpha / rank
    made = {id(layer): Adapted(layer, rank, scale=scale, param_dtype=param_dtype, rngs=rngs)
            for layer in found.values()}  # fmt: skip
    _replace(model, made)
    return {path: made[id(layer)] for path, layer in found.items()}


def merge_lora(model: Module) -> None:
    """Adds the products to the kernels, and puts the plain layers back."""
    _replace(model, {id(part): part.merged() for part in select(model, "*").values() if isinstance(part, Adapted)})


def remove_lora(model: Module) -> None:
    """Puts the plain layers back, as they were."""
    _replace(model, {id(part): part.base for part in select(model, "*").values() if isinstance(part, Adapted)})


def save_adapters(model: Module, folder: str | Path) -> list[Path]:
    """Writes the adapters alone into a folder, as safetensors with their paths as names; says which files."""
    found = _adapters(model)
    specs = [Spec(path, v.shape, np.dtype(v.dtype)) for path, v in found.items()]
    return write_safetensors(folder, specs, (np.asarray(v[...]) for v in found.values()))


def load_adapters(model: Module, folder: str | Path) -> None:
    """Gives the adapters of a model the values of a folder.

    Raises:
        WeightsError: it has other adapters, or of another rank.
    """
    weights, found = open_safetensors(Path(folder)), _adapters(model)
    theirs = {name: tensor.shape for name, tensor in weights.tensors.items()}
    ours = {path: v.shape for path, v in found.items()}
    if wrong := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise WeightsError("the files hold adapters of another model", at=f"{folder}: {wrong[0]}",
                           got=theirs.get(wrong[0], "nothing"), expected=ours.get(wrong[0], "nothing"),
                           fix="call add_lora with the patterns and the rank they were trained with")  # fmt: skip
    for path, v in found.items():
        v.set_value(jnp.asarray(weights.tensors[path].read(), v.dtype))


def _adapters(model: Module) -> dict[str, LoRAParam]:
    return {path: v for path, v in select(model, "*").items() if isinstance(v, LoRAParam)}


def _sizes(base: Any) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The first dims of a stack, how many dims are summed over, and all dims of one layer's kernel."""
    is_plain = isinstance(base, nn.Linear)
    inputs = 1 if is_plain else len(base.in_features)
    own = 2 if is_plain else inputs + len(base.out_features)
    lead = len(base.kernel.shape) - own
    if not is_plain and (base.batch_axis or sorted(base.axis) != list(range(-inputs, 0))):
        raise ArgumentError("an adapter reads the last dims of its input", got=f"axis={base.axis}", at=base)
    return tuple(base.kernel.shape[:lead]), inputs, tuple(base.kernel.shape[lead:])


def _mapped(f: Any, dims: int) -> Any:
    return f if not dims else jax.vmap(_mapped(f, dims - 1))


def _replace(model: Module, new: dict[int, Any]) -> None:
    """Puts other parts where these ids are, everywhere: what is shared stays shared."""
    for part in [model, *(part for part in select(model, "*").values() if isinstance(part, Module))]:
        if isinstance(part, Adapted) and id(part.base) in new:
            continue
        for name, value in list(vars(part).items()):
            if id(value) in new:
                setattr(part, name, new[id(value)])
