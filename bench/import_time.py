# SPDX-License-Identifier: Apache-2.0
"""How long does `import batiste.nnx` take beside `import jax`, and which packages does it load?

Each import runs in a fresh process; the rounds interleave the contenders, and the figures above `import jax` are
medians of the differences within a round.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec

import batiste
from measure import machine, print_table

BASE = "jax"
EVERY_NAME = "batiste.nnx, every name"
PROGRAMS = {
    BASE: "import jax",
    "batiste.nnx": "import batiste.nnx",
    EVERY_NAME: "import batiste.nnx as nnx; [getattr(nnx, name) for name in dir(nnx)]",
    "flax.nnx": "import flax.nnx",
    "equinox": "import equinox",
}

PROBE = """
import time
cpu, wall = time.process_time(), time.perf_counter()
{program}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
import json, sys
names = {{name.partition(".")[0] for name in sys.modules}}
third = sorted(n for n in names - sys.stdlib_module_names if getattr(sys.modules.get(n), "__file__", None))
print(json.dumps(dict(cpu=cpu, wall=wall, modules=len(sys.modules), packages=third)))
"""


def probe(name: str) -> dict:
    """Seconds of CPU and of wall that the program takes in a new process, and the packages loaded by it."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROBE.format(program=PROGRAMS[name])]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode:
        raise SystemExit(f"{PROGRAMS[name]} failed:\n{out.stderr}")
    return json.loads(out.stdout)


def top(name: str) -> str:
    """The package that a module or a contender belongs to."""
    return name.partition(",")[0].partition(".")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="fresh processes per contender (default: 15)")
    parser.add_argument("--json", action="store_true", help="one JSON line with everything at the end")
    args = parser.parse_args()
    print(machine())

    names = [name for name in PROGRAMS if find_spec(top(name))]
    # An installed package comes with byte code, a working copy may have none: then the compiler would be timed.
    compileall.compile_dir(batiste.__path__[0], quiet=1)
    for name in names:  # the first reads the files from disk
        probe(name)
    rounds = [{name: probe(name) for name in names} for _ in range(args.rounds)]

    rows, found = [], {}
    for name in names:
        above = {key: statistics.median(r[name][key] - r[BASE][key] for r in rounds) * 1e3 for key in ("cpu", "wall")}
        whole = {key: statistics.median(r[name][key] for r in rounds) * 1e3 for key in ("cpu", "wall")}
        last = rounds[-1][name]
        extra = sorted(set(last["packages"]) - set(rounds[-1][BASE]["packages"]) - {top(name)})
        found[name] = {"ms": whole, "above_jax_ms": above, "modules": last["modules"], "packages": extra}
        figures = [f"{v:,.0f}" for v in (whole["cpu"], above["cpu"], whole["wall"], above["wall"], last["modules"])]
        rows.append([name, *figures, " ".join(extra) or "-"])
    print_table(
        f"import in a fresh process, median of {args.rounds} rounds",
        ["", "CPU ms", "above jax", "wall ms", "above jax", "modules", "packages that jax does not load"],
        rows,
    )
    if args.json:
        print(json.dumps({"machine": machine(), "imports": found}))


if __name__ == "__main__":
    main()
