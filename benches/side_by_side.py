#!/usr/bin/env python3
"""Seconds per optimizer step and peak memory: LLaMA-Factory's own training beside spikeprobe's replay of it.

    benches/side_by_side.py run.yaml --python /path/to/llamafactory-venv/bin/python [--rounds 3] [--steps 3]

run.yaml is the configuration of a finished run (its output_dir holds the log). Both do the same steps on the same
cores, in turns; the first step of each is left out. LLaMA-Factory trains into a temporary folder and saves nothing.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Runs under the venv's python: trains with the given arguments and prints the duration of each step as JSON.
TRAIN = """
import json, sys, time
from transformers import TrainerCallback
from llamafactory.train.tuner import run_exp

class Clock(TrainerCallback):
    seconds = []
    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()
    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)

run_exp(json.loads(sys.argv[1]), callbacks=[Clock()])
print("SECONDS " + json.dumps(Clock.seconds))
"""


def run(command, root):
    """Runs a command; returns (standard output, wall seconds, peak resident MB of it and its children)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=root, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode not in (0, 3):  # 3: the replay departs from its log
            sys.exit(f"{' '.join(map(str, command))[:200]}\n{err.read()[-2000:]}")
        return out.read(), wall, usage.ru_maxrss / 1024


def train(python, config, root, steps):
    with tempfile.TemporaryDirectory() as folder:
        arguments = config | {
            "output_dir": folder, "max_steps": steps + 1, "save_strategy": "no", "plot_loss": False,
            "overwrite_output_dir": True,
        }
        out, _, peak = run([python, "-c", TRAIN, json.dumps(arguments)], root)
    line = next(line for line in out.splitlines() if line.startswith("SECONDS "))
    return statistics.median(json.loads(line[8:])[1:]), peak


def replay(binary, yaml, root, steps):
    command = [binary, "replay", yaml, "--device", "cpu", "--cache", "none", "--quiet", "--steps"]
    _, one, _ = run([*command, "1"], root)
    _, all_of_them, peak = run([*command, str(steps + 1)], root)
    return (all_of_them - one) / steps, peak


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--python", required=True, help="python of a venv with llamafactory")
    parser.add_argument("--binary", default=Path(__file__).parent.parent / "target/release/spikeprobe", type=Path)
    parser.add_argument("--root", default=Path("."), type=Path, help="folder that LLaMA-Factory was started in")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--steps", default=3, type=int)
    options = parser.parse_args()
    # The configuration's YAML is read by the venv, which has a parser.
    reader = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"
    config = json.loads(subprocess.check_output([options.python, "-c", reader, str(options.config.resolve())]))
    binary, yaml = options.binary.resolve(), options.config.resolve()
    rows = []
    for _ in range(options.rounds):
        ours = replay(binary, yaml, options.root, options.steps)
        theirs = train(options.python, config, options.root, options.steps)
        rows.append((*theirs, *ours))
        print("LLaMA-Factory {:.2f} s a step, {:.0f} MB; replay {:.2f} s, {:.0f} MB".format(*rows[-1]), flush=True)
    theirs, their_peak, ours, our_peak = (statistics.median(column) for column in zip(*rows))
    print(
        f"\n{processor()}, {os.cpu_count()} cores, medians of {options.rounds} rounds: "
        f"LLaMA-Factory {theirs:.2f} s a step, {their_peak:.0f} MB; replay {ours:.2f} s, {our_peak:.0f} MB; "
        f"{theirs / ours:.2f} x as fast, {our_peak / their_peak:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
