# SPDX-License-Identifier: Apache-2.0
"""How every test and every docstring's example is run: strictly, on eight CPU devices, with plans checked.

Programs are compiled with few optimisations and without fused kernels of LLVM: most are run once, and compiling them is
what takes the time.

The settings stand in the environment before JAX is imported, and only where the caller has not chosen otherwise.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

FUSED = "" if version("jaxlib") >= "0.11" else " --xla_cpu_use_fusion_emitters=false"  # a flag that is gone ends XLA

STRICT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    f"--xla_llvm_disable_expensive_passes=true{FUSED}",
    "NPROC": "32",  # threads of XLA: where these are few, collectives of two programs in flight wait for ever
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent / ".jaxcache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "BATISTE_CHECK_PLANS": "1",
}
for name, value in STRICT.items():
    os.environ.setdefault(name, value)


def pytest_configure() -> None:
    """Generated cases are the same in every run; a first case may compile, so none has a deadline."""
    from hypothesis import settings

    settings.register_profile("batiste", deadline=None, database=None, derandomize=True)
    settings.load_profile("batiste")


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_searched_for_garbage() -> Iterator[None]:
    """JAX keeps a million objects of the programs it has compiled: the collector is told not to walk them each time."""
    yield
    gc.collect()
    gc.freeze()
