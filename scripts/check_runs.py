#!/usr/bin/env python3
"""Replays recorded runs and prints how well each reproduces its log: a table for the acceptance of replays.

    scripts/check_runs.py RUNS_FOLDER [--only SUBSTRING] [--envelope 3] [--from-checkpoints] [--jobs 1]

RUNS_FOLDER holds `runs/<id>/train.yaml` whose paths are relative to RUNS_FOLDER. Columns: until the log's first
bump the largest relative deviation of loss and grad_norm, whether every learning rate is bit-exact, the first step
that departs; with --from-checkpoints the same for one step after every checkpoint.
"""
import argparse, json, math, os, pathlib, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor

BINARY = os.environ.get("SPIKEPROBE") or pathlib.Path(__file__).resolve().parent.parent / "target/release/spikeprobe"


def replay(root, run, *options):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        began = time.time()
        done = subprocess.run([BINARY, "--root", root, "--device", "cpu", "-q", "replay", run, "--json", out.name, *options],
                              capture_output=True, text=True)
        if done.returncode != 0:
            return None, done.stderr.strip().replace("\n", " "), time.time() - began
        return json.load(open(out.name)), "", time.time() - began


def number(x):
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(x, x) if isinstance(x, str) else x


def relative(a, b):
    a, b = number(a), number(b)
    if a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
        return 0.0
    d = abs(a - b) / abs(b) if b else math.inf
    return math.inf if math.isnan(d) else d


def bump(steps):
    seen = []
    for s in steps:
        loss = number((s["logged"] or {}).get("loss"))
        if loss is None:
            continue
        if not math.isfinite(loss) or (seen and (loss > 1.3 * min(seen[-3:]) or loss == 0)):
            return s["step"]
        seen.append(loss)


def logged_bump(out):
    """First bump of the last attempt's trainer_state.json, or the last step."""
    history = json.load(open(out / "trainer_state.json"))["log_history"]
    rows = [{"step": r["step"], "logged": {"loss": r["loss"]}} for r in history if "loss" in r]
    return bump(rows) or rows[-1]["step"]


def line(root, run, a):
    until = ["--to", str(logged_bump(run / "out"))] if a.until_bump else []
    got, error, seconds = replay(root, run, "--envelope", str(a.envelope), *until)
    if got is None:
        return f"{run.name:36} FAILED {error[:160]}"
    first, loss, norm, rate = bump(got["steps"]), 0.0, 0.0, True
    for s in got["steps"]:
        logged = s["logged"]
        if not logged:
            continue
        if "learning_rate" in logged:
            rate &= logged["learning_rate"] == s["learning_rate_logged"]
        if first is None or s["step"] < first:
            if "loss" in logged:
                loss = max(loss, relative(s["loss_logged"], logged["loss"]))
            if "grad_norm" in logged:
                norm = max(norm, relative(s["grad_norm"], logged["grad_norm"]))
    c = got["certificate"]
    text = (f"{run.name:36} bump {first or '-':>4}  loss {loss:8.1e} norm {norm:8.1e}  lr {'exact' if rate else 'DIFFERS':7} "
            f"{c['verdict']:10} at {c['departs_at'] or '-':>4} env {number(c['envelope']['loss']):.0e}/{number(c['envelope']['grad_norm']):.0e} {seconds:5.1f}s")
    if a.from_checkpoints:
        out = pathlib.Path(root) / "runs" / run.name / "out"
        for k in sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")):
            one, error, _ = replay(root, run, "--from", str(k), "--steps", "1")
            if one is None and "no step follows" in error:
                continue
            if one is None:
                text += f"\n    after checkpoint-{k:<4} {error[:130]}"
                continue
            s = one["steps"][0]
            if s["logged"]:
                text += (f"\n    after checkpoint-{k:<4} loss {relative(s['loss_logged'], s['logged'].get('loss', math.nan)):8.1e} "
                         f"norm {relative(s['grad_norm'], s['logged'].get('grad_norm', math.nan)):8.1e}")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--envelope", type=int, default=3)
    parser.add_argument("--from-checkpoints", action="store_true")
    parser.add_argument("--until-bump", action="store_true", help="stop at the log's first bump")
    parser.add_argument("--jobs", type=int, default=1)
    a = parser.parse_args()
    runs = sorted(p.parent for p in (a.folder / "runs").glob("*/train.yaml") if a.only in p.parent.name)
    with ThreadPoolExecutor(a.jobs) as pool:
        for text in pool.map(lambda r: line(a.folder, r, a), runs):
            print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
