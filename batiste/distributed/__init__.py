# SPDX-License-Identifier: Apache-2.0
"""Many processes, on one host or many: the same program, started by Slurm, Kubernetes, Open MPI, Ray or `launch`.

    from batiste import distributed, sharding
    print(distributed.initialize())                  # before any computation; alone, it does nothing
    with sharding.use(sharding.fsdp()) as plan:      # a mesh of the devices of all processes
        rows = distributed.process_slice(1024)       # what this process reads
        loss = step(model, optimizer, distributed.global_batch(examples[rows]))

`python -m batiste.distributed launch -n 2 PROGRAM` tries it on one machine.
"""

from __future__ import annotations

from .batches import everywhere, global_batch, process_slice
from .environment import World
from .exchange import exchange
from .launch import launch
from .runtime import BarrierTimeout, barrier, initialize, world

__all__ = [
    "BarrierTimeout",
    "World",
    "barrier",
    "everywhere",
    "exchange",
    "global_batch",
    "initialize",
    "launch",
    "process_slice",
    "world",
]
