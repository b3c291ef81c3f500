# SPDX-License-Identifier: Apache-2.0
"""The job files are well formed, and what they say fits what `initialize` reads."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from batiste.distributed import environment
from batiste.distributed.environment import detect

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "docs" / "jobs"


def test_the_slurm_job_is_a_script_that_starts_one_process_per_host() -> None:
    script = JOBS / "slurm.sh"
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    assert int(options["nodes"]) > 1
    assert "exec srun " in script.read_text()


def test_the_pods_of_the_job_set_find_each_other() -> None:
    job_set = yaml.safe_load((JOBS / "jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]

    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3", **env}
    name = job_set["metadata"]["name"]
    first = f"{name}-{group['name']}-0-0.{name}"
    port = container["ports"][0]["containerPort"]
    assert str(detect(pod)) == f"process 3 of 4, found by Kubernetes, coordinator {first}:{port}"


def test_the_ray_job_sets_what_initialize_reads() -> None:
    source = (JOBS / "ray_job.py").read_text()
    names = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert set(environment.PLAIN) <= names


@pytest.mark.parametrize("job", ["slurm.sh", "jobset.yaml", "ray_job.py"])
def test_the_page_shows_the_job(job: str) -> None:
    assert f"(jobs/{job})" in (ROOT / "docs" / "distributed.md").read_text()
