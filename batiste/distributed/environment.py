# SPDX-License-Identifier: Apache-2.0
"""What a launcher has written into the environment: how many processes there are, which one this is, where they meet.

Nothing here touches JAX: a function reads a mapping of variables and gives a `World`, or None where it is not meant.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

__all__ = ["World", "detect"]

Environ = Mapping[str, str]

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PLAIN = (COORDINATOR, PROCESSES, PROCESS)
FIRST_PORT, PORTS = 61440, 4096  # ports are derived from the number of the job, which all its processes know


@dataclasses.dataclass(frozen=True)
class World:
    """The processes that compute together, as one of them sees them.

    Attributes:
        found: what told it: "Slurm", "Open MPI", "Kubernetes", "TPU", "Ray", "environment variables", "arguments",
            "nothing".
        process, processes: this one's number, from zero, and how many there are.
        coordinator: host:port of process 0, where all meet.
        devices: the numbers of this host's accelerators that are this process's; None for all.

    >>> print(World("Slurm", process=1, processes=4, coordinator="node01:62000"))
    process 1 of 4, found by Slurm, coordinator node01:62000
    >>> print(World())
    one process: no launcher found
    """

    found: str = "nothing"
    process: int = 0
    processes: int = 1
    coordinator: str | None = None
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.processes == 1:
            return f"one process: {'no launcher found' if self.found == 'nothing' else f'found by {self.found}'}"
        text = f"process {self.process} of {self.processes}, found by {self.found}"
        text += f", coordinator {self.coordinator}" if self.coordinator else ""
        return text + (f", devices {list(self.devices)}" if self.devices is not None else "")


def number(env: Environ, name: str) -> int:
    """The whole number in a variable.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return int(env[name])
    except ValueError:
        raise ArgumentError(f"the environment variable {name} holds no number", got=repr(env[name]),
                            fix=f"export {name} as a whole number") from None  # fmt: skip


def own_devices(env: Environ, local: int, beside: int) -> tuple[int, ...] | None:
    """The accelerators of a process: all of the host, unless it shares the host and sees more than one."""
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES") or ""
    bound = visible != "" and "," not in visible
    return None if beside <= 1 or bound else (local,)


def plain(env: Environ) -> World | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as `launch` and the job files set them."""
    if PROCESSES not in env and PROCESS not in env:
        return None
    missing = [name for name in PLAIN if name not in env]
    if missing and not (PROCESSES in env and number(env, PROCESSES) == 1):
        raise ArgumentError("the environment says only a part of where the processes are",
                            got=", ".join(f"{name}={env[name]}" for name in PLAIN if name in env),
                            expected=f"also {' and '.join(missing)}",
                            fix=f"export {' and '.join(missing)} in every process")  # fmt: skip
    devices = tuple(int(n) for n in env.get("JAX_LOCAL_DEVICE_IDS", "").split(",") if n) or None
    if (processes := number(env, PROCESSES)) == 1:
        return World("environment variables")
    return World("environment variables", number(env, PROCESS), processes, env[COORDINATOR], devices)


def slurm(env: Environ) -> World | None:
    """A step of a Slurm job, begun by `srun`; the first host of the step is the coordinator's."""
    if not all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    count = next(name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env)
    beside = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")))
    step = env.get("SLURM_STEP_ID", "0")
    port = _port(env, number(env, "SLURM_JOB_ID") + (int(step) if step.isdigit() else 0))
    return World(
        "Slurm",
        number(env, "SLURM_PROCID"),
        number(env, count),
        env.get(COORDINATOR, f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}"),
        own_devices(env, number(env, "SLURM_LOCALID"), int(beside[0]) if beside else 1),
    )


def first_host(nodes: str) -> str:
    """The first name of a list of hosts in Slurm's spelling.

    >>> [first_host(nodes) for nodes in ("node7", "a1,b2", "gpu[003-010,12],cpu1", "rack[1-2]-n[05,07]")]
    ['node7', 'a1', 'gpu003', 'rack1-n05']
    """
    head = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head)


def open_mpi(env: Environ) -> World | None:
    """A process begun by `mpirun`; releases before 5 also tell where it was called, which is the coordinator's host."""
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    processes, process = number(env, "OMPI_COMM_WORLD_SIZE"), number(env, "OMPI_COMM_WORLD_RANK")
    where = re.match(r"(\d+)\..*?(?:tcp://([^:,]+)|tcp6://\[([^\],]+))", env.get("OMPI_MCA_orte_hnp_uri", ""))
    coordinator = env.get(COORDINATOR)
    if coordinator is None and where:
        coordinator = f"{where[2] or f'[{where[3]}]'}:{_port(env, int(where[1]) // PORTS)}"
    if coordinator is None and processes > 1:
        raise ArgumentError(f"Open MPI started process {process} of {processes}, and does not say where process 0 is",
                            fix=f"mpirun -x {COORDINATOR}=$(hostname):{FIRST_PORT} ...")  # fmt: skip
    local = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    return World("Open MPI", process, processes, coordinator,
                 own_devices(env, local, int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))))  # fmt: skip


def kubernetes(env: Environ) -> World | None:
    """A pod of an Indexed Job or a JobSet: the number comes from Kubernetes, the other two from the manifest."""
    if "JOB_COMPLETION_INDEX" not in env or "KUBERNETES_SERVICE_HOST" not in env:
        return None
    if PROCESSES not in env and "TPU_WORKER_HOSTNAMES" in env:
        return None
    index = env.get(PROCESS) or env["JOB_COMPLETION_INDEX"]
    world = plain({PROCESS: index, **{name: env[name] for name in (*PLAIN, "JAX_LOCAL_DEVICE_IDS") if name in env}})
    return world and dataclasses.replace(world, found="Kubernetes")


def tpu(env: Environ) -> World | None:
    """A host of a TPU slice, of which the environment names all hosts (GKE, and Cloud TPU with `gcloud`)."""
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) < 2:
        return None
    if "TPU_WORKER_ID" not in env:
        raise ArgumentError("the environment names the hosts of the slice, and not which one this is",
                            got=f"TPU_WORKER_HOSTNAMES={','.join(hosts)}", expected="also TPU_WORKER_ID",
                            fix="export TPU_WORKER_ID in every process")  # fmt: skip
    coordinator = env.get(COORDINATOR, f"{hosts[0]}:{_port(env, 0)}")
    return World("TPU", number(env, "TPU_WORKER_ID"), len(hosts), coordinator)


def ray(env: Environ) -> World | None:
    """A worker of Ray Train; process 0 tells the others where it is, through Ray."""
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        process, processes = context.get_world_rank(), context.get_world_size()
    except Exception:  # Ray's errors differ by release; all say that this is no worker
        return None
    if not isinstance(process, int) or not isinstance(processes, int):
        return None
    if processes == 1:
        return World("Ray")
    coordinator = env.get(COORDINATOR)
    if coordinator is None:
        here = f"{sys.modules['ray'].util.get_node_ip_address()}:{_port(env, 0)}"
        try:
            coordinator = need("ray.train.collective", extra="ray").broadcast_from_rank_zero(here)
        except ImportError:
            raise ArgumentError("this release of Ray gives its workers no way to say where the first one is",
                                fix=f"update Ray, or export {COORDINATOR} in every worker") from None  # fmt: skip
    return World("Ray", process, processes, coordinator)


def _port(env: Environ, job: int) -> int:
    return number(env, "JAX_COORDINATOR_PORT") if "JAX_COORDINATOR_PORT" in env else FIRST_PORT + job % PORTS


DETECTORS: tuple[Callable[[Environ], World | None], ...] = (kubernetes, plain, slurm, open_mpi, tpu, ray)


def detect(env: Environ) -> World:
    """The world that these variables describe: the first of Kubernetes, plain variables, Slurm, Open MPI, TPU, Ray.

    >>> print(detect({"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}))
    process 1 of 2, found by environment variables, coordinator host:1234

    Raises:
        ArgumentError: the variables are incomplete, or do not fit each other.
    """
    world = next(filter(None, (find(env) for find in DETECTORS)), World())
    return checked(world)


def checked(world: World) -> World:
    """The world, if its numbers fit.

    Raises:
        ArgumentError: they do not.
    """
    if not 0 <= world.process < world.processes:
        raise ArgumentError(f"{world.found}: the number of this process does not fit", got=f"process {world.process} "
                            f"of {world.processes}", expected=f"a number from 0 to {world.processes - 1}")  # fmt: skip
    if world.processes > 1 and not re.search(r".:\d+$", world.coordinator or ""):
        raise ArgumentError(f"{world.found}: no address where the processes meet", got=repr(world.coordinator),
                            expected="host:port of process 0", fix=f"export {COORDINATOR}=host:1234")  # fmt: skip
    return world
