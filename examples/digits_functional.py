# SPDX-License-Identifier: Apache-2.0
"""The program of digits.py with pure functions: `split` the model once, plain `jax.jit`, `merge` inside."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from digits import Net, loss, restore, save
from digits_data import batches, in_chunks, load
from digits_report import Report, options


class Training(NamedTuple):
    """Everything that changes from step to step: a pytree."""

    params: nnx.State
    rest: nnx.State  # statistics of BatchNorm, random streams of Dropout
    opt_state: optax.OptState


def main() -> int:
    args = options(__doc__ or "")
    data = load(args.data)
    report = Report(data, args)

    model = Net(data.size, len(data.classes), rngs=nnx.Rngs(args.seed))
    if args.load:
        restore(model, args.load)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    steps = report.epochs * report.per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=steps // 10, decay_steps=steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)

    @jax.jit
    def train_step(now: Training, images: jax.Array, labels: jax.Array) -> tuple[Training, jax.Array]:
        def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[dict[str, jax.Array], nnx.State]]:
            model = nnx.merge(graphdef, params, now.rest, copy=True)  # a copy: it changes inside the gradient
            value, found = loss(model, (images, labels))
            rest: nnx.State = nnx.state(model, nnx.Not(nnx.Param))  # type: ignore[assignment]
            return value, (found, rest)

        (value, (found, rest)), grads = jax.value_and_grad(loss_of, has_aux=True)(now.params)
        updates, opt_state = optimizer.update(grads, now.opt_state, now.params)
        figures = jnp.stack([value, found["accuracy"]])
        params: nnx.State = optax.apply_updates(now.params, updates)  # type: ignore[assignment]
        return Training(params, rest, opt_state), figures

    @jax.jit
    def predict(now: Training, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, now.params, now.rest)
        model.eval()  # a static setting of the copy inside, so it is part of this program
        return model(images)

    now = Training(params, rest, optimizer.init(params))
    predicted = np.zeros_like(data.test_y)
    with report.progress():
        for epoch in range(report.epochs):
            rng = np.random.default_rng((args.seed, epoch))
            figures = []
            for images, labels in batches(data.train_x, data.train_y, args.batch, rng):
                now, latest = train_step(now, images, labels)
                figures.append(latest)
                if report.step():
                    report.show(*np.mean(figures, axis=0))
            logits = jnp.concatenate([predict(now, images) for images in in_chunks(data.test_x)])
            test_loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, data.test_y).mean())
            predicted = np.asarray(logits.argmax(-1))
            mean, share = np.mean(figures, axis=0)
            report.epoch(mean, share, test_loss, predicted)

    if args.save:
        save(nnx.merge(graphdef, now.params, now.rest), args.save)
    parameters = sum(value.size for value in jax.tree.leaves(now.params))
    return report.finish(predicted, parameters)


if __name__ == "__main__":
    raise SystemExit(main())
