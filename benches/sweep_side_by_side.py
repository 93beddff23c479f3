#!/usr/bin/env python3
"""A sweep against its cells as single replays, one process after another, the same steps; and whether losses and
gradient norms are the same bit for bit.

    sweep_side_by_side.py BINARY ROOT RUN [--steps N] [--rounds N] [SWEEP ARGUMENTS ...]

Without sweep arguments: four learning rates, four accumulations, two precisions (32 cells). The replay of the suggested
cell with another seed is part of a sweep, so it has its single replay too. Cells that a sweep stops early are replayed
as far as it got: the ratio says nothing about stopping early. `others` is processor time that other programs took;
rounds with much of it say little. Python 3 on Linux, no packages.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

GRID = ["--lr", "x0.1,x0.3,x1,x3", "--accumulation", "1,2,4,8", "--precision", "fp32,bf16"]


def own():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def busy():
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


class Spent:
    """Seconds by the clock, of processor time, and of others' processor time."""

    def __init__(self):
        self.wall = self.cpu = self.others = 0.0

    def run(self, command, root):
        wall, cpu, all_cpu = time.perf_counter(), own(), busy()
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        self.wall += time.perf_counter() - wall
        self.cpu += own() - cpu
        self.others += busy() - all_cpu - (own() - cpu)

    def __str__(self):
        return f"{self.wall:.2f} s (processor {self.cpu:.2f}, others {max(self.others, 0):.1f})"


def single(args, cell, steps, trace):
    command = [args.binary, "replay", args.run, "-q", "--device", "cpu", "--to", str(steps), "--json", str(trace)]
    for key, value in {**cell["axes"], **cell["derived"]}.items():
        word = value if isinstance(value, str) else json.dumps(value)
        command += ["--precision", word] if key == "precision" else ["--set", f"{key}={word}"]
    return command


def same(result, trace):
    """Whether the curve of a cell is in the trace, number for number (a long curve keeps some of its points)."""
    steps = json.loads(trace.read_text())["steps"]
    points = {(point["loss"], point["grad_norm"]) for point in result["outcome"]["curve"]}
    return points <= {(step["loss_raw"], step["grad_norm"]) for step in steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("root")
    parser.add_argument("run")
    parser.add_argument("--steps", default="12", help="of the run's own; cells of other accumulations as many samples")
    parser.add_argument("--rounds", type=int, default=1)
    args, grid = parser.parse_known_args()
    ratios = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            out, trace = Path(folder, "sweep"), Path(folder, "trace.json")
            sweep = [args.binary, "sweep", args.run, "-q", "--device", "cpu", "--steps", args.steps, *(grid or GRID)]
            together, alone, different = Spent(), Spent(), 0
            together.run([*sweep, "--out", str(out)], args.root)
            results = [json.loads(path.read_text()) for path in sorted(out.glob("cells/*.json"))]
            for result in results:
                alone.run(single(args, result["cell"], result["outcome"]["steps"], trace), args.root)
                different += not same(result, trace)
        ratios.append(alone.wall / together.wall)
        steps = sum(result["outcome"]["steps"] for result in results)
        print(f"{len(results)} cells, {steps} steps: one by one {alone}, sweep {together}, ratio {ratios[-1]:.2f}; "
              f"{different} cells differ", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
