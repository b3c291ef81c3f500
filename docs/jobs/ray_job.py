# SPDX-License-Identifier: Apache-2.0
"""Runs a program on the hosts of a Ray cluster, one process on each.

ray job submit --working-dir . -- python ray_job.py --hosts 4 --gpus 8 train.py --steps 1000
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_restarts=0)
class Host:
    """One process of the program, on a host of its own."""

    def address(self) -> str:
        with socket.socket() as listening:
            listening.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listening.getsockname()[1]}"

    def run(self, command: list[str], coordinator: str, processes: int, process: int) -> int:
        world = {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
        return subprocess.run([sys.executable, "-u", *command], env={**os.environ, **world}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a program on the hosts of a Ray cluster.")
    parser.add_argument("--hosts", type=int, default=2, help="how many (2)")
    parser.add_argument("--gpus", type=int, default=0, help="of each host (0)")
    parser.add_argument("--cpus", type=int, default=1, help="of each host (1)")
    parser.add_argument("--pack", action="store_true", help="several processes may share a host, to try it")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="PROGRAM ARGS")
    args = parser.parse_args()

    ray.init()
    need = {"CPU": args.cpus, **({"GPU": args.gpus} if args.gpus else {})}
    group = placement_group([need] * args.hosts, strategy="PACK" if args.pack else "STRICT_SPREAD")
    ray.get(group.ready())
    hosts = [
        Host.options(
            num_cpus=args.cpus,
            num_gpus=args.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        ).remote()
        for i in range(args.hosts)
    ]
    coordinator = ray.get(hosts[0].address.remote())
    running = [host.run.remote(args.command, coordinator, args.hosts, i) for i, host in enumerate(hosts)]
    while running:  # the first that fails ends the job, and Ray ends the others
        done, running = ray.wait(running, num_returns=1)
        if code := ray.get(done[0]):
            return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main())
