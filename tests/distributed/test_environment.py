# SPDX-License-Identifier: Apache-2.0
"""What each launcher writes into the environment is read; what is incomplete is an error that says what to write."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import jax
import pytest

from batiste import distributed
from batiste.distributed.environment import detect
from batiste.graph.errors import ArgumentError, CallError

SLURM = {
    "SLURM_JOB_ID": "5001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "3",
    "JAX_NUM_PROCESSES": "4",
    "JAX_COORDINATOR_ADDRESS": "train-hosts-0-0.train:61440",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}


def shared(env: dict[str, str], **more: str) -> dict[str, str]:
    return {**env, "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", **more}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "one process: no launcher found"),
        (PLAIN, "process 1 of 2, found by environment variables, coordinator host:1234"),
        ({**PLAIN, "JAX_LOCAL_DEVICE_IDS": "2,3"}, "environment variables, coordinator host:1234, devices [2, 3]"),
        ({"JAX_NUM_PROCESSES": "1"}, "one process: found by environment variables"),
        (SLURM, "process 3 of 4, found by Slurm, coordinator gpu003:62347"),
        ({**SLURM, "JAX_COORDINATOR_PORT": "77"}, "process 3 of 4, found by Slurm, coordinator gpu003:77"),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "a:1"}, "process 3 of 4, found by Slurm, coordinator a:1"),
        (shared(SLURM), "coordinator gpu003:62347, devices [1]"),
        (shared(SLURM, CUDA_VISIBLE_DEVICES="0,1"), "coordinator gpu003:62347, devices [1]"),
        (shared(SLURM, CUDA_VISIBLE_DEVICES="1"), "coordinator gpu003:62347"),
        ({**SLURM, **PLAIN}, "process 1 of 2, found by environment variables"),
        ({"SLURM_JOB_ID": "5001", "SLURM_NTASKS": "4"}, "one process: no launcher found"),
        (MPI, "process 1 of 2, found by Open MPI, coordinator 10.96.0.1:62624, devices [1]"),
        (
            {**MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620::2]:43"},
            "coordinator [fe80::b9b]:61441, devices [1]",
        ),
        (POD, "process 3 of 4, found by Kubernetes, coordinator train-hosts-0-0.train:61440"),
        (TPU, "process 1 of 2, found by TPU, coordinator t0:61440"),
        ({**TPU, "TPU_WORKER_HOSTNAMES": "localhost"}, "one process"),
        ({**TPU, "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "process 1 of 2, found by TPU"),
    ],
)
def test_a_launcher_is_found(env: dict[str, str], said: str) -> None:
    assert said in str(detect(env))
    assert ("devices" in said) == (detect(env).devices is not None)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "Fix: export JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID in every process"),
        ({**PLAIN, "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID holds no number: got 'one'"),
        ({**PLAIN, "JAX_PROCESS_ID": "2"}, "got process 2 of 2, expected a number from 0 to 1"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "host"}, "got 'host', expected host:port of process 0"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, "Fix: mpirun -x JAX_COORDINATOR_ADDRESS=$(hostname):61440"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "expected also TPU_WORKER_ID"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            "got JAX_PROCESS_ID=1, expected also JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES",
        ),
    ],
)
def test_what_is_incomplete_is_an_error_with_a_fix(env: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        detect(env)


def ray_worker(rank: int, size: int) -> dict[str, SimpleNamespace]:
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: size)
    collective = SimpleNamespace(broadcast_from_rank_zero=lambda here: here.replace("10.0.0.9", "10.0.0.1"))
    train = SimpleNamespace(get_context=lambda: context, collective=collective)
    return {
        "ray": SimpleNamespace(util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.9"), train=train),
        "ray.train": train,
        "ray.train.collective": collective,
    }


def test_workers_of_ray_train_meet_at_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in ray_worker(2, 4).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert str(detect({})) == "process 2 of 4, found by Ray, coordinator 10.0.0.1:61440"
    for name, module in ray_worker(0, 1).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert str(detect({})) == "one process: found by Ray"


def test_a_ray_without_collectives_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in ray_worker(2, 4).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ray.train.collective", None)  # importing it fails
    with pytest.raises(ArgumentError, match="Fix: update Ray, or export JAX_COORDINATOR_ADDRESS in every worker"):
        detect({})
    assert "coordinator a:1" in str(detect({"JAX_COORDINATOR_ADDRESS": "a:1"}))


def test_a_program_that_has_ray_and_is_no_worker_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_session() -> None:
        raise RuntimeError("called outside of a worker")

    monkeypatch.setitem(sys.modules, "ray.train", SimpleNamespace(get_context=no_session))
    assert detect({}) == distributed.World()


def test_alone_initialize_leaves_jax_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLAIN:
        monkeypatch.delenv(name, raising=False)
    assert str(distributed.initialize()) == "one process: no launcher found"
    assert distributed.initialize(None, None, None) == distributed.world() == distributed.World()
    assert not jax.distributed.is_initialized()
    distributed.barrier("alone")


def test_initialize_takes_three_arguments_or_none_and_comes_first() -> None:
    with pytest.raises(ArgumentError, match="three arguments or none: got coordinator='host:1', processes=2"):
        distributed.initialize("host:1", 2)
    assert jax.device_count() > 0
    with pytest.raises(CallError, match="JAX has begun to compute with this process alone"):
        distributed.initialize("host:1", 2, 0)
