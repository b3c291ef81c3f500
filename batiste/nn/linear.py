# SPDX-License-Identifier: Apache-2.0
"""Linear maps with learnt kernels: over the last dim, over chosen dims, as an einsum, as a table of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import Module, Param, VariableMetadata, data, make
from batiste.graph.birth import drawn
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.precision import promote_dtype
from batiste.sharding import constrain_batch

from . import initializers
from .checks import check_last_dim, check_sizes, params_stream
from .initializers import Initializer

default_kernel_init = initializers.lecun_normal()
default_bias_init = initializers.zeros
default_embed_init = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


def value_of(variable: Any) -> Any:
    """The array in a Variable, or None for a parameter that is switched off."""
    return None if variable is None else variable[...]


def add_bias(y: Array, bias: Array | None) -> Array:
    """y[..., features] + bias[features], or a bias for the last dims"""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def output_dtype(preferred_element_type: DTypeLike | None) -> dict[str, Any]:
    """The option for a product's accumulation dtype, where one is asked for: replaced products may not know it."""
    return {} if preferred_element_type is None else {"preferred_element_type": preferred_element_type}


class Linear(Module):
    """y[..., out] = x[..., in] @ kernel[in, out] + bias[out]

    Args:
        dtype: what is computed in; None takes what the input and the parameters promote to.
        param_dtype: what the parameters are kept in.
        dot_general, promote_dtype: functions that take the places of `jax.lax.dot_general` and of the own promotion.
        preferred_element_type: the dtype of the product; float32 for bfloat16 operands uses the matrix units of CPUs.
        kernel_metadata, bias_metadata: metadata of the Variables, such as `out_sharding`.

    Raises:
        ShapeError: the last dim of `x` is not `in_features`.

    >>> from batiste.graph import Rngs
    >>> Linear(3, 4, rngs=Rngs(0))(jnp.ones((2, 3))).shape
    (2, 4)

    Source: kernel scale of LeCun et al. 1998, "Efficient BackProp", eq. 16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Callable[..., Array] = lax.dot_general,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, in_features=in_features, out_features=out_features)
        stream = params_stream(self, rngs)
        self.kernel = make(Param, kernel_init, (in_features, out_features), param_dtype, stream, kernel_metadata)
        bias = make(Param, bias_init, (out_features,), param_dtype, stream, bias_metadata) if use_bias else None
        self.bias = data(bias)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], value_of(self.bias)), dtype=self.dtype)
        check_last_dim(self, x, kernel.shape[0], "in_features")
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        y = self.dot_general(x, kernel, contract, precision=self.precision, out_sharding=out_sharding,
                             **output_dtype(self.preferred_element_type))  # fmt: skip
        return add_bias(y, bias)


class AxisSizes(Mapping[int, int]):
    """An immutable mapping from a dim to its size, compared and hashed by value."""

    def __init__(self, sizes: Mapping[int, int] = MappingProxyType({})):
        self._items = tuple(sizes.items())

    def __getitem__(self, axis: int) -> int:
        return dict(self._items)[axis]

    def __iter__(self) -> Iterator[int]:
        return (axis for axis, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return f"AxisSizes({dict(self._items)})"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """`(value,)` for one number, a tuple of all for several."""
    return tuple(value) if hasattr(value, "__iter__") else (value,)


class LinearGeneral(Module):
    """y[*batch, ..., *out] = sum over in of x[*batch, ..., *in] * kernel[*batch, *in, *out] + bias[*batch, *out]

    The dims of `x` in `axis` are contracted with the dims `in_features` of the kernel, in ascending order; those that
    are neither in `axis` nor in `batch_axis` are kept, in front of the new ones.

    Args:
        axis: the dims of `x` to contract, as many as `in_features` has entries.
        batch_axis: dim -> size of the leading dims that have parameters of their own.
        dot_general_cls: a class whose instances take the place of `jax.lax.dot_general`; wins over `dot_general`.

    Raises:
        ArgumentError: `axis` and `in_features` differ in length, or `batch_axis` are not the leading dims.
        ShapeError: the dims of `x` do not fit the kernel.

    >>> from batiste.graph import Rngs
    >>> LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=Rngs(0))(jnp.ones((7, 2, 3))).shape
    (7, 4, 5)

    Source: kernel scale of LeCun et al. 1998, "Efficient BackProp", eq. 16, with all contracted dims as fan-in.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = AxisSizes(),
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: lax.PrecisionLike = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        dot_general: Callable[..., Array] | None = None,
        dot_general_cls: Any = None,
        preferred_element_type: DTypeLike | None = None,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = as_tuple(in_features)
        self.out_features = as_tuple(out_features)
        self.axis = as_tuple(axis)
        self.batch_axis = AxisSizes(batch_axis)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.dot_general_cls = dot_general_cls
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self._check_axes()

        batch = tuple(self.batch_axis.values())
        stream = params_stream(self, rngs)
        kernel_init = _as_matrix(kernel_init, split=len(batch) + len(self.in_features))
        bias_init = _as_matrix(bias_init, split=0)
        kernel_shape = (*batch, *self.in_features, *self.out_features)
        self.kernel = make(Param, kernel_init, kernel_shape, param_dtype, stream, kernel_metadata)
        bias_shape = (*batch, *self.out_features)
        bias = make(Param, bias_init, bias_shape, param_dtype, stream, bias_metadata) if use_bias else None
        self.bias = data(bias)

    def _check_axes(self) -> None:
        for size in self.in_features:
            check_sizes(self, in_features=size)
        for size in self.out_features:
            check_sizes(self, out_features=size)
        if len(self.in_features) != len(self.axis):
            raise ArgumentError("LinearGeneral: in_features and axis must have the same length",
                                got=f"in_features={self.in_features} and axis={self.axis}",
                                fix="give one entry of in_features for each dim in axis")  # fmt: skip
        if sorted(self.batch_axis) != list(range(len(self.batch_axis))):
            raise ArgumentError("LinearGeneral: batch_dims must be consecutive leading dimensions starting from 0",
                                got=f"batch_axis={dict(self.batch_axis)}", expected="the dims 0, 1, 2, ...",
                                fix="move the batch dims of the input to the front")  # fmt: skip

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], value_of(self.bias)), dtype=self.dtype)
        n_batch, n_in, n_out = len(self.batch_axis), len(self.axis), len(self.out_features)
        axis = _contracted(self, x, kernel)
        batch = tuple(range(n_batch))
        dims = ((axis, tuple(range(n_batch, n_batch + n_in))), (batch, batch))
        product = self.dot_general_cls() if self.dot_general_cls is not None else self.dot_general or lax.dot_general
        y = product(x, kernel, dims, precision=self.precision, out_sharding=out_sharding,
                    **output_dtype(self.preferred_element_type))  # fmt: skip
        if bias is None:
            return y
        kept = y.ndim - n_batch - n_out
        return y + bias.reshape(bias.shape[:n_batch] + (1,) * kept + bias.shape[n_batch:])


def _contracted(layer: LinearGeneral, x: Array, kernel: Array) -> tuple[int, ...]:
    """The dims of `x` that are summed over, in ascending order, once they are known to fit the kernel."""
    n_batch = len(layer.batch_axis)
    axis = tuple(sorted(a % max(x.ndim, 1) for a in layer.axis))
    dims = (*range(n_batch), *axis)
    inside = all(-x.ndim <= a < x.ndim for a in layer.axis) and n_batch <= x.ndim
    if not inside or len(set(dims)) < len(dims) or tuple(x.shape[d] for d in dims) != kernel.shape[: len(dims)]:
        wanted = {**layer.batch_axis, **dict(zip(layer.axis, layer.in_features))}
        raise ShapeError("LinearGeneral got an input that does not fit its kernel", at=layer, got=x.shape,
                         expected=", ".join(f"dim {dim} of size {size}" for dim, size in wanted.items()),
                         fix="transpose the input, or change in_features, axis or batch_axis")  # fmt: skip
    return axis


def _as_matrix(init: Initializer, split: int) -> Initializer:
    """`init` drawn as a matrix [product of shape[:split], product of shape[split:]] (a vector for 0), then reshaped."""

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        fans = (math.prod(shape[:split]), math.prod(shape[split:])) if split else (math.prod(shape),)
        value = drawn(init, key, fans, dtype)
        if not isinstance(value, VariableMetadata):
            return value.reshape(shape)
        value.raw_value = value.raw_value.reshape(shape)
        return value

    return draw


class Einsum(Module):
    """y = einsum(einsum_str, x, kernel[*kernel_shape]) + bias[*bias_shape]

    The bias has those dims of the result that the kernel names, in the order of the result.

    Args:
        einsum_str: an explicit equation of two operands, such as "btd,dhk->bthk"; None leaves it to the call.
        bias_shape: None for no bias.
        einsum_op: a function that takes the place of `jax.numpy.einsum`.

    Raises:
        ArgumentError: the equation is not of the form "x,kernel->y".
        ShapeError: `x`, the kernel or the bias do not fit the equation.

    >>> from batiste.graph import Rngs
    >>> Einsum("btd,dhk->bthk", (8, 2, 4), (2, 4), rngs=Rngs(0))(jnp.ones((3, 5, 8))).shape
    (3, 5, 2, 4)

    Source: kernel scale of LeCun et al. 1998, "Efficient BackProp", eq. 16.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: int | Sequence[int],
        bias_shape: int | Sequence[int] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: Callable[..., Any] = promote_dtype,
        einsum_op: Callable[..., Array] = jnp.einsum,
        preferred_element_type: DTypeLike | None = None,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        einsum_str = _equation(einsum_str)
        stream = params_stream(self, rngs)
        kernel_shape = as_tuple(kernel_shape)
        bias_shape = None if bias_shape is None else as_tuple(bias_shape)
        self.kernel = make(Param, kernel_init, kernel_shape, param_dtype, stream, kernel_metadata)
        bias = None if bias_shape is None else make(Param, bias_init, bias_shape, param_dtype, stream, bias_metadata)
        self.bias = data(bias)
        self.einsum_str = einsum_str
        self.kernel_shape = kernel_shape
        self.bias_shape = bias_shape
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.einsum_op = einsum_op
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None) -> Array:
        equation = self.einsum_str if einsum_str is None else _equation(einsum_str)
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], value_of(self.bias)), dtype=self.dtype)
        self._check_operands(equation, x, kernel)
        y = self.einsum_op(equation, x, kernel, precision=self.precision, out_sharding=out_sharding,
                           **output_dtype(self.preferred_element_type))  # fmt: skip
        if bias is None:
            return y
        shape = _bias_shape(equation, y.shape)
        if math.prod(shape) != bias.size:
            raise ShapeError("Einsum has a bias that does not fit its result", at=self, got=self.bias_shape,
                             expected=f"the dims of the result {y.shape} that the kernel names in {equation!r}",
                             fix=f"build it with bias_shape={tuple(n for n in shape if n != 1)}")  # fmt: skip
        return y + bias.reshape(shape)

    def _check_operands(self, equation: str, x: Array, kernel: Array) -> None:
        left, right = equation.split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for word, names, operand in (("input", left, x), ("kernel", right, kernel)):
            letters = names.replace("...", "")
            if len(letters) > operand.ndim or (letters == names and len(letters) != operand.ndim):
                raise ShapeError(f"Einsum {equation!r} got the wrong rank of the {word}", at=self, got=operand.shape,
                                 expected=f"the dims {names!r}", fix="change the operand, or einsum_str")  # fmt: skip
            for name, size in _sizes_of(names, operand.shape):
                if sizes.setdefault(name, size) != size and 1 not in (size, sizes[name]):
                    raise ShapeError(f"Einsum {equation!r} got two sizes for the label '{name}'", at=self,
                                     got=f"{x.shape} for a kernel of {kernel.shape}",
                                     fix="give each label one size: change the input, or kernel_shape")  # fmt: skip


def _equation(text: Any) -> str:
    """`text` without blanks, once it is known to be of the form "x,kernel->y"."""
    form = 'an equation such as "btd,df->btf"'
    if not isinstance(text, str):
        raise ArgumentError("Einsum needs an einsum_str", got=repr(text), expected=form,
                            fix="name the dims of the input, the kernel and the result")  # fmt: skip
    text = text.replace(" ", "")
    if "->" not in text:
        raise ArgumentError('`einsum_str` equation must be explicit and include "->"', got=repr(text), expected=form,
                            fix="write the dims of the result after '->'")  # fmt: skip
    if (commas := text.count(",")) != 1:
        raise ArgumentError("`einsum_str` equation must have exactly two operands and therefore, exactly one comma "
                            f"character, instead of {commas}", got=repr(text), expected=form,
                            fix="name the dims of the input, a comma, the dims of the kernel")  # fmt: skip
    return text


def _sizes_of(names: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """The pairs of a label and its size; dims under an ellipsis have no label."""
    before, dots, after = names.partition("...")
    yield from zip(before, shape)
    if dots and after:
        yield from zip(after, shape[-len(after) :])


def _bias_shape(equation: str, result: tuple[int, ...]) -> tuple[int, ...]:
    """The result's shape with 1 for all dims that the kernel does not name."""
    operands, names = equation.split("->")
    kernel = operands.split(",")[1].replace("...", ".")
    letters = len(names.replace("...", ""))
    names = names.replace("...", "." * (len(result) - letters))
    return tuple(size if name in kernel else 1 for name, size in zip(names, result))


class Embed(Module):
    """y[..., features] = embedding[x[...], features]

    And back, by `attend`: logits[..., n] = q[..., features] @ embedding[n, features].T. Numbers outside the table give
    NaN, negative ones count from the end, as with `jax.numpy.take`.

    Raises:
        ArgumentError: `x` holds no integers.
        ShapeError: the last dim of `q` is not `features`.

    >>> from batiste.graph import Rngs
    >>> embed = Embed(7, 4, rngs=Rngs(0))
    >>> embed(jnp.array([0, 6])).shape, embed.attend(jnp.ones((2, 4))).shape
    ((2, 4), (2, 7))

    Source: tied logits of Press & Wolf 2017, "Using the Output Embedding to Improve Language Models", sec. 2.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        embedding_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_embeddings=num_embeddings, features=features)
        stream = params_stream(self, rngs)
        shape = (num_embeddings, features)
        self.embedding = make(Param, embedding_init, shape, param_dtype, stream, embedding_metadata)
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype or self.embedding.dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        ids = jnp.asarray(inputs)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ArgumentError("Embed looks up rows by number: Input type must be an integer or unsigned integer",
                                at=self, got=ids.dtype, fix="convert the input with .astype(jnp.int32)")  # fmt: skip
        (embedding,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        if self.num_embeddings == 1:  # the one row, whatever the number
            return jnp.broadcast_to(embedding.reshape((1,) * ids.ndim + (-1,)), (*ids.shape, self.features))
        rows = embedding.at[ids].get(mode="fill", out_sharding=out_sharding)
        return rows if ids.ndim < 2 else constrain_batch(rows)  # not divided as the columns of a plan's tables are

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """logits[..., n] = query[..., features] @ embedding[n, features].T

        Raises:
            ShapeError: the last dim of `query` is not `features`.
        """
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        check_last_dim(self, query, embedding.shape[1], "features")
        return jnp.dot(query, embedding.T, out_sharding=out_sharding)
