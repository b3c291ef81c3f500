# SPDX-License-Identifier: Apache-2.0
"""The processes of a program: joining them, waiting for each other."""

from __future__ import annotations

import collections
import logging
import os
import time
from typing import Any

import jax

from batiste.graph.errors import ArgumentError, BatisteError, CallError
from batiste.graph.jaxcompat import backends_started, processes_state

from .environment import World, checked, detect

__all__ = ["BarrierTimeout", "barrier", "initialize", "world"]

logger = logging.getLogger("batiste.distributed")

_world = World()
_passed: collections.Counter[str] = collections.Counter()


class BarrierTimeout(BatisteError, TimeoutError):
    """Some processes did not come to a barrier in time.

    Attributes:
        missing: their numbers.
    """

    def __init__(self, name: str, timeout: float, missing: list[int], processes: int):
        self.missing = missing
        named = ", ".join(map(str, missing))
        super().__init__(
            f"the barrier {name!r} was given up after {timeout:g} s: {'process' if len(missing) == 1 else 'processes'} "
            f"{named} of {processes} did not come",
            fix="look at what they printed last: one may have failed, or be in another branch of the program; "
            "where they are only slow, pass a larger timeout=",
        )


def world() -> World:
    """The processes that this one computes with, as `initialize` found them."""
    return _world


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
) -> World:
    """Joins the processes that a launcher has started, through `jax.distributed`; call it before any computation.

    Without arguments the environment tells: Kubernetes (Job, JobSet), the variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, Open MPI, TPU slices, Ray Train. Where it tells of nothing, or of one
    process, JAX is left as it is: the same program runs alone. Where JAX was initialised already (by Ray, or by the
    program) that is only reported.

    Args:
        coordinator, processes, process: host:port of process 0, the number of processes, and this one's; all or none.
        timeout: how many seconds process 0 may take to appear.

    >>> print(initialize())
    one process: no launcher found

    Raises:
        ArgumentError: arguments or environment tell a part only, or do not fit each other.
        CallError: there are several processes, and JAX has begun to compute with this one alone.
    """
    global _world
    if jax.distributed.is_initialized():
        if _world.processes == 1:
            _world = World("JAX, which was initialised already", jax.process_index(), jax.process_count(),
                           processes_state.coordinator_address)  # fmt: skip
        return _world
    given = (coordinator, processes, process)
    if any(x is not None for x in given):
        if None in given:
            raise ArgumentError("initialize takes three arguments or none", got=f"coordinator={coordinator!r}, "
                                f"processes={processes}, process={process}",
                                fix="pass all three, or let the environment tell")  # fmt: skip
        found = checked(World("arguments", process or 0, processes or 1, coordinator))
    else:
        found = detect(os.environ)
    if found.processes > 1:
        _join(found, timeout)
    _world = found
    logger.info("%s", found)
    return found


def _join(found: World, timeout: float) -> None:
    if backends_started():
        raise CallError(f"{found}: JAX has begun to compute with this process alone",
                        fix="call batiste.distributed.initialize() before the first array is made")  # fmt: skip
    jax.distributed.initialize(
        found.coordinator,
        found.processes,
        found.process,
        found.devices,
        cluster_detection_method="deactivate",  # JAX's own detection would hide devices from each process
        initialization_timeout=round(timeout),
    )


def barrier(name: str = "barrier", *, timeout: float = 300) -> None:
    """Waits until every process has come here; where there is one process, it goes on.

    Args:
        name: the same in all processes; it may be used again.
        timeout: after so many seconds the wait is given up.

    Raises:
        BarrierTimeout: some did not come; it names them.
    """
    client: Any = processes_state.client
    if client is None or jax.process_count() == 1:
        return
    key = f"batiste/barrier/{name}/{_passed[name]}"
    _passed[name] += 1
    client.key_value_set(f"{key}/{jax.process_index()}", "here")
    until = time.monotonic() + timeout
    try:
        client.wait_at_barrier(key, round(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        if time.monotonic() < until and "DEADLINE_EXCEEDED" not in str(error):
            raise  # not the time is up: the coordinator, or a process, has died
        came = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
        missing = sorted(set(range(jax.process_count())) - came)
        raise BarrierTimeout(name, timeout, missing, jax.process_count()) from error
