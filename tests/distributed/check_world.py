# SPDX-License-Identifier: Apache-2.0
"""A program for the tests: what two processes of four devices see. Prints a line of JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from batiste import distributed, sharding


def main() -> None:
    world = distributed.initialize()
    plans = {"data": sharding.data_parallel(), "tensor": sharding.tensor_parallel(8)}
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    seen: dict[str, object] = {"world": [world.process, world.processes], "again": distributed.initialize() == world}
    for name, plan in plans.items():
        rows = distributed.process_slice(16, plan)
        batch = distributed.global_batch(x[rows], plan)
        total = jax.jit(lambda x: jnp.sum(x * x), out_shardings=jax.NamedSharding(plan.mesh, jax.P()))(batch)
        seen[name] = [rows.start, rows.stop, batch.shape[0], float(total)]
    seen["even"] = distributed.process_slice(16).start
    try:
        if world.process == 0:
            distributed.barrier("lunch", timeout=0.5)
    except distributed.BarrierTimeout as error:
        seen["barrier"] = [error.missing, str(error)]
    for _ in range(2):
        distributed.barrier("end", timeout=30)
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
