# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and what they claim without a clock holds: flat memory, models that are freed, few imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"


def figures(program: str, *args: object) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / program), *map(str, args), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_overhead_compares_every_contender_with_its_floor() -> None:
    found = figures("overhead.py", "--sizes", 4, "--seconds", 0.1)
    ratios = {row["contender"]: row["cpu_ratio"] for row in found["steps"]}
    assert ratios["floor"] == ratios["floor, donated"] == 1
    assert {"batiste nnx.jit, donated", "nested dict", "equinox filter_jit", "flax nnx.jit"} <= set(ratios)
    assert {"batiste linen TrainState", "flax linen TrainState, donated"} <= set(ratios)
    assert all(ratio > 0 for ratio in ratios.values())
    assert found["changes"][0]["modules"] > 2


def test_tracing_compares_both_faces_with_flax() -> None:
    found = {row["what"]: row for row in figures("tracing.py", "--blocks", 1, "--seconds", 0.1)["tracing"]}
    assert set(found) == {"linen init", "linen apply", "nnx init", "nnx apply"}
    assert all(row["ratio"] > 0 for row in found.values())


def test_layers_are_compared_with_those_of_flax() -> None:
    found = figures("layers.py", "Dropout", "--seconds", 0.01)
    assert set(found) == {"Dropout"}
    assert set(found["Dropout"]) == {"forward time", "gradient time", "gradient memory"}
    assert all(ratio > 0 for ratio in found["Dropout"].values())


def test_memory_stays_flat_and_dropped_models_are_freed() -> None:
    found = figures("memory.py", "--steps", 1200, "--models", 4, "--width", 16)
    assert len(found["steps"]) == 10
    assert found["steps"][-1]["objects"] - found["steps"][4]["objects"] < 100, "objects stay behind after steps"
    assert found["steps"][-1]["arrays"] == found["steps"][0]["arrays"]
    assert [row["alive"] for row in found["models"]] == [0] * 4
    assert found["models"][-1]["objects"] - found["models"][0]["objects"] < 100, "objects stay behind after a model"


def test_importing_every_name_of_the_object_face_loads_no_other_package() -> None:
    imports = figures("import_time.py", "--rounds", 1)["imports"]
    assert imports["batiste.nnx"]["packages"] == []
    assert imports["batiste.nnx, every name"]["packages"] == []
    assert "flax" not in imports["jax"]["packages"]


def test_the_loop_adds_little_to_a_step_and_says_how_much() -> None:
    found = figures("loop.py", "--width", 32, "--batch", 16, "--steps", 5, "--rounds", 2)
    assert set(found) == {"step_ms", "fit_ratio", "guard_ratio", "rollback_ratio", "loop_us", "loop_share_of_20_ms"}
    assert found["loop_share_of_20_ms"] < 0.05, "1 ms a step"
