#!/usr/bin/env python3
"""Diagnoses every run of a folder and compares the verdicts with truth.json.

    scripts/confusion.py ROOT [--binary target/release/spikeprobe] [--only TEXT] [--jobs N] [--out DIR]

ROOT holds runs/<id>/train.yaml and runs/<id>/truth.json (expected_cause, separated by |; `weak` runs are reported
and not counted). The folder's names and truth.json are read here only; the program sees the run alone. Exit code 1
when a run that counts got another verdict.
"""
import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time


def diagnose(binary, root, run, out):
    answer = out / f"{run.name}.json"
    command = [binary, "diagnose", str(run / "train.yaml"), "--root", str(root), "--json", str(answer), "--device", "cpu", "--no-cache"]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - began
    (out / f"{run.name}.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        return None, seconds, done.stderr.strip().splitlines()[-1:] or [""]
    return json.loads(answer.read_text()), seconds, []


def judge(truth, diagnosis):
    cause = diagnosis["verdict"]["cause"] if diagnosis else "failed"
    expected = truth["expected_cause"].split("|")
    return cause, expected, cause in expected


def windows(diagnosis):
    """Optimizer steps replayed: unchanged + under changes + proof."""
    cost = (diagnosis or {}).get("cost", {})
    return " + ".join(f"{cost.get(part, 0):3}" for part in ("baseline", "experiments", "proof")) + " windows"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("--binary", default="target/release/spikeprobe")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/confusion"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = sorted(p.parent for p in (options.root / "runs").glob("*/truth.json") if options.only in p.parent.name)
    wrong = counted = 0
    confusion = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda run: diagnose(options.binary, options.root, run, options.out), runs)
        for run, (diagnosis, seconds, error) in zip(runs, results):
            truth = json.loads((run / "truth.json").read_text())
            cause, expected, right = judge(truth, diagnosis)
            weak = bool(truth.get("weak"))
            counted += not weak
            wrong += not (right or weak)
            confusion.setdefault("|".join(expected), {}).setdefault(cause, []).append(run.name)
            mark = "ok   " if right else ("weak " if weak else "WRONG")
            steps = [(s["step"], round(s["height"], 2), s["verdict"]["cause"]) for s in (diagnosis or {}).get("spikes", [])]
            verdict = (diagnosis or {}).get("verdict", {})
            rows = [r["row"] for r in (diagnosis or {}).get("rows", [])]
            print(f"{mark} {run.name:40} {truth['expected_cause']:22} -> {cause:22} {verdict.get('confidence', ''):9}"
                  f" {seconds:6.1f} s {windows(diagnosis)}"
                  f"  also {verdict.get('also_sufficient', [])} rows {rows} spikes {steps[:4]} truth@{truth.get('spike_step')}"
                  f" {(diagnosis or {}).get('fault') or ''} {error}", flush=True)
    print(f"\n{counted - wrong} of {counted} counted runs right")
    for expected, got in sorted(confusion.items()):
        print(f"{expected:30} {({cause: len(names) for cause, names in sorted(got.items())})}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
