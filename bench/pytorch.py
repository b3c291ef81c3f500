# SPDX-License-Identifier: Apache-2.0
"""What does a training step cost beside the same step in PyTorch, eager as most people run it?

A transformer over tokens and a convolutional network over images, in float32 with AdamW, the loss read after each step.
The two interleaved, each with all cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.nn import functional

from batiste import nnx
from measure import Slices, machine, print_table

FEATURES, HEADS, BLOCKS, ROWS, LENGTH, WORDS = 256, 4, 4, 8, 128, 1000
IMAGES, SIDE, CHANNELS, CLASSES = 64, 32, (3, 32, 64, 128), 10


# ---------------------------------------------------------------- batiste
class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.before, self.between = nnx.LayerNorm(FEATURES, rngs=rngs), nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs),
            nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.before(x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WORDS, FEATURES, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm, self.head = nnx.LayerNorm(FEATURES, rngs=rngs), nnx.Linear(FEATURES, WORDS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolutional(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        sizes = pairwise(CHANNELS)
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in sizes])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in CHANNELS[1:]])
        self.head = nnx.Linear(CHANNELS[-1], CLASSES, rngs=rngs)

    def __call__(self, x):
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = nnx.relu(norm(conv(nnx.max_pool(x, (2, 2), (2, 2)) if n else x)))
        return self.head(x.mean((1, 2)))


def of_batiste(model: nnx.Module, inputs: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    x, y = jnp.asarray(inputs), jnp.asarray(labels)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return lambda: float(step(model, optimizer, x, y))


# ---------------------------------------------------------------- PyTorch
class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = torch.nn.LayerNorm(FEATURES), torch.nn.LayerNorm(FEATURES)
        self.qkv, self.out = torch.nn.Linear(FEATURES, 3 * FEATURES), torch.nn.Linear(FEATURES, FEATURES)
        self.up, self.down = torch.nn.Linear(FEATURES, 4 * FEATURES), torch.nn.Linear(4 * FEATURES, FEATURES)

    def forward(self, x):
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1)]
        x = x + self.out(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x)), approximate="tanh"))


def torch_transformer() -> torch.nn.Module:
    blocks = [TorchBlock() for _ in range(BLOCKS)]
    ends = torch.nn.LayerNorm(FEATURES), torch.nn.Linear(FEATURES, WORDS)
    return torch.nn.Sequential(torch.nn.Embedding(WORDS, FEATURES), *blocks, *ends)


def torch_convolutional() -> torch.nn.Module:
    parts: list[torch.nn.Module] = []
    for n, (a, b) in enumerate(pairwise(CHANNELS)):
        parts += [torch.nn.MaxPool2d(2)] * bool(n)
        parts += [torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
    pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(*parts, *pooled, torch.nn.Linear(CHANNELS[-1], CLASSES))


def of_torch(model: torch.nn.Module, inputs: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x, y = torch.tensor(inputs), torch.tensor(labels)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="time per model (default: 15)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, WORDS, (ROWS, LENGTH))
    images = rng.normal(size=(IMAGES, SIDE, SIDE, CHANNELS[0])).astype(np.float32)
    classes = rng.integers(0, CLASSES, IMAGES)
    first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # channels first, as PyTorch wants them
    models = {
        "transformer": (
            of_batiste(Transformer(nnx.Rngs(0)), tokens, tokens),
            of_torch(torch_transformer(), tokens, tokens),
        ),
        "convolutional": (
            of_batiste(Convolutional(nnx.Rngs(0)), images, classes),
            of_torch(torch_convolutional(), first, classes),
        ),
    }
    found = {}
    for name, (ours, theirs) in models.items():
        slices = Slices({"batiste": ours, "torch": theirs}, args.seconds, 0.3)
        wall = {who: 1e3 * slices.median(who, "wall") for who in ("batiste", "torch")}
        found[name] = {
            **wall,
            "wall": slices.ratio("batiste", "torch", "wall"),
            "cpu": slices.ratio("batiste", "torch"),
        }
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = [[name, *(f"{row[k]:.{p}f}" for k, p in (("batiste", 1), ("torch", 1), ("wall", 2), ("cpu", 2)))]
            for name, row in found.items()]  # fmt: skip
    print_table("A training step", ["model", "batiste ms", "torch ms", "wall ratio", "CPU ratio"], rows)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
