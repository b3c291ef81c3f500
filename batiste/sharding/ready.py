# SPDX-License-Identifier: Apache-2.0
"""Ready plans: every axis of the mesh does what its name says.

axis       what it divides                                       what travels, per layer and step
data       the batch                                             all-reduce of the gradients
fsdp       the batch, and each parameter on its largest dim      all-gather of the parameters, twice; reduce-scatter
tensor     heads, MLP features and vocabulary                    all-reduce of the activations, twice each way
sequence   the positions (with `ring_attention`)                 keys and values
expert     the batch, and the experts of a mixture               all-to-all of the tokens, twice each way
pipeline   the layers (with `pipeline`)                          activations, from stage to stage

The axes go together: `ready_plan(fsdp=-1, tensor=2)`. Parameters are known by their axis names, or else by their paths:
the names that layers, and the usual text of transformers, give them. What the rules do not know is an error where there
is a `tensor` axis; `rules` come before the own ones.

Source: Rajbhandari et al. 2020, "ZeRO", section 5 (stage 3); Shoeybi et al. 2019, "Megatron-LM", section 3;
    Lepikhin et al. 2020, "GShard", section 3.2.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from batiste.graph.errors import ArgumentError
from batiste.graph.placement import Axes

from .mesh import ORDER, make_mesh
from .plan import Plan
from .rules import PathRules

COLUMN = "{up,gate,wi,wi_0,wi_1,w1,w3,fc1,fc_in,c_fc,linear1,up_proj,gate_proj,gate_up}"
ROW = "{down,w2,fc2,fc_out,linear2,down_proj,c_proj,out,wo,o_proj,out_proj}"
QUERY, KEY_VALUE = "{query,q_proj,wq,qkv,c_attn}", "{key,value,k_proj,v_proj,wk,wv}"
TABLE = "{embed,embedder,embedding,embeddings,token_embed,token_embedding,tok_embed,wte,vocab_embed}"
HEAD = "{head,lm_head,output_head,logits,unembed,readout}"

MEGATRON: PathRules = (
    ("experts/{up,gate}", ("expert", None, "mlp")),
    ("experts/down", ("expert", "mlp", None)),
    ("router/kernel", ()),
    (f"{QUERY}/kernel", (None, "heads", None)),
    (f"{QUERY}/kernel", (None, "heads")),
    (f"{QUERY}/kernel", (..., None, "heads", None)),
    (f"{QUERY}/bias", ("heads",)),
    (f"{QUERY}/bias", (..., "heads", None)),
    (f"{KEY_VALUE}/kernel", (None, "kv_heads", None)),
    (f"{KEY_VALUE}/kernel", (None, "kv_heads")),
    (f"{KEY_VALUE}/kernel", (..., None, "kv_heads", None)),
    (f"{KEY_VALUE}/bias", ("kv_heads",)),
    (f"{KEY_VALUE}/bias", (..., "kv_heads", None)),
    (f"{COLUMN}/kernel", (..., None, "mlp")),
    (f"{COLUMN}/bias", (..., "mlp")),
    ("{out,o_proj,out_proj,wo}/kernel", ("heads", None, None)),
    ("out/kernel", (None, "heads", None, None)),
    (f"{ROW}/kernel", (..., "mlp", None)),
    (f"{ROW}/bias", ()),
    (f"{TABLE}/embedding", ("vocab", None)),
    (f"{HEAD}/kernel", (..., None, "vocab")),
    (f"{HEAD}/bias", (..., "vocab")),
    ("{bias,scale}", (...,)),  # in a stack these are no vectors
)
"""Column-parallel, row-parallel and vocabulary-parallel parameters, by the names that they usually have."""


def meanings(mesh: Mesh) -> dict[str, Axes]:
    """What the usual axis names mean on this mesh: None where it lacks the axis."""

    def on(axis: str) -> Axes:
        return axis if axis in mesh.axis_names else None

    batch = tuple(axis for axis in ("data", "fsdp", "expert") if axis in mesh.axis_names)
    tensor = dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), on("tensor"))
    return {"batch": batch or None, "expert": on("expert"), "layers": on("pipeline"),
            **tensor}  # fmt: skip


def ready_plan(mesh: Mesh | None = None, *, rules: PathRules = (), names: dict[str, Axes] | None = None,
               least: int = 4096, explicit: bool = False, devices: Any = None, **sizes: int) -> Plan:  # fmt: skip
    """The plan of this mesh, or of one with axes of these sizes, one of which may be -1 for what is left.

    Args:
        rules: path rules that come before the ready ones; `(("patch/**", ()),)` keeps these parameters whole.
        names: axis names besides the usual ones, or in their place.
        least, explicit: see `Plan` and `make_mesh`.

    >>> ready_plan(data=-1, tensor=2).batch
    ('data',)

    Raises:
        ArgumentError: an axis has none of the names above.
    """
    mesh = make_mesh(explicit=explicit, devices=devices, **sizes) if mesh is None else mesh
    for axis in mesh.axis_names:
        if axis not in ORDER:
            raise ArgumentError(f"no ready plan knows what to do with the axis {axis!r}", expected=f"one of {ORDER}",
                                fix="write a Plan with rules of your own")  # fmt: skip
    known = meanings(mesh)
    batch = known["batch"]
    return Plan(
        mesh,
        names={**known, **(names or {})},
        paths=(*rules, *MEGATRON),
        fill=("fsdp",) if "fsdp" in mesh.axis_names else (),
        least=least,
        batch=batch if isinstance(batch, tuple) else (),
        sequence=("sequence",) if "sequence" in mesh.axis_names else (),
        strict="tensor" in mesh.axis_names,
    )


def data_parallel(**options: Any) -> Plan:
    """The batch divided, all parameters whole on every device."""
    return ready_plan(**{"data": -1, **options})


def fsdp(**options: Any) -> Plan:
    """ZeRO stage 3: parameters, gradients, optimizer state and batch divided. `data=n` keeps n copies (HSDP)."""
    return ready_plan(**{"fsdp": -1, **options})


def tensor_parallel(tensor: int = -1, **options: Any) -> Plan:
    """Megatron: the columns of the first matrix of a block divided, and the rows of the second."""
    return ready_plan(**{"tensor": tensor, **options})


def fsdp_tensor(tensor: int, **options: Any) -> Plan:
    """Megatron on `tensor` devices, what is left of each parameter divided over the others."""
    return ready_plan(**{"fsdp": -1, "tensor": tensor, **options})
