#!/usr/bin/env python3
"""Sweeps recorded runs whose learning rate or accumulation was planted, and says on which side each known point lies.

    scripts/check_sweeps.py RUNS_FOLDER [--only SUBSTRING] [--out FOLDER]

RUNS_FOLDER holds `runs/<id>/train.yaml` whose paths are relative to RUNS_FOLDER, beside it `truth.json` with
`expected_cause` and `counterfactual` (a list of `change` and `spike_removed`). Grid: learning rate times 0.1, 0.3, 1
and 3 and the verified counterfactual's factor, accumulation 1, 2, 8 and the run's own. The planted point must be
unstable, a verified counterfactual stable; the exit code is 1 if any is not. Cells: `.` stable, `#` unstable, `!`
stopped early, lines ascending in accumulation, columns in learning rate.
"""
import argparse, json, os, pathlib, re, subprocess, sys, tempfile, time

BINARY = os.environ.get("SPIKEPROBE") or pathlib.Path(__file__).resolve().parent.parent / "target/release/spikeprobe"
FACTORS = [0.1, 0.3, 1, 3]
ACCUMULATION = [1, 2, 8]


def removed(truth):
    """Verified counterfactuals: (factor of the learning rate, accumulation or None)."""
    for one in truth.get("counterfactual", []):
        rate, accumulation = re.fullmatch(r"lr/(\d+)", one["change"]), re.fullmatch(r"accumulation (\d+)", one["change"])
        if one.get("spike_removed") and rate:
            yield 1 / int(rate[1]), None
        if one.get("spike_removed") and accumulation:
            yield 1, int(accumulation[1])


def sweep(root, run, factors, accumulations, out):
    lr, acc = ",".join(f"x{f:g}" for f in factors), ",".join(map(str, accumulations))
    command = [BINARY, "--root", root, "--device", "cpu", "-q", "sweep", run, "--lr", lr, "--accumulation", acc, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{run}: {done.stderr.strip()}")
    out = pathlib.Path(out)
    return json.loads((out / "results.json").read_text()), json.loads((out / "sweep.json").read_text())["own"]


def check(root, run, truth, out):
    known = list(removed(truth))
    factors = sorted(set(FACTORS) | {f for f, _ in known})
    text = (run / "train.yaml").read_text()
    own = int(re.search(r"^gradient_accumulation_steps: *(\d+)", text, re.M)[1])
    accumulations = sorted(set(ACCUMULATION) | {own} | {a for _, a in known if a})
    began = time.time()
    result, own_values = sweep(root, run, factors, accumulations, out)
    rate = own_values["learning_rate"]
    cells = {}
    for cell in result["cells"]:
        axes = cell["axes"]
        cells[round(axes["learning_rate"] / rate, 9), axes["gradient_accumulation_steps"]] = cell["outcome"]
    side = lambda f, a: cells[round(f, 9), a]["stable"]
    planted = side(1, own)
    points = [(f, a or own, side(f, a or own)) for f, a in known]
    wrong = planted or not all(stable for *_, stable in points)
    told = ", ".join(f"lr x{f:g} acc {a}: {'stable' if s else 'UNSTABLE'}" for f, a, s in points) or "none recorded"
    print(f"{run.name:28} {'WRONG' if wrong else 'ok':5} planted lr x1 acc {own}: {'STABLE' if planted else 'unstable'}; "
          f"counterfactual {told}; {len(cells)} cells, {time.time() - began:.0f} s")
    print("    lr x" + " ".join(f"{f:<5g}" for f in factors))
    for a in accumulations:
        sign = lambda o: "." if o["stable"] else "!" if o["stopped"] else "#"
        print(f"    {'acc ' + str(a):>8} " + " ".join(f"{sign(cells[round(f, 9), a]):<5}" for f in factors))
    return wrong


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("root", type=pathlib.Path)
    p.add_argument("--only", default="")
    p.add_argument("--out", type=pathlib.Path, help="keep the sweeps in this folder")
    a = p.parse_args()
    wrong = seen = 0
    for run in sorted((a.root / "runs").iterdir()):
        truth = json.loads((run / "truth.json").read_text()) if (run / "truth.json").is_file() else {}
        planted = truth.get("expected_cause") in ("learning_rate", "gradient_accumulation")
        if a.only not in run.name or not planted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong += check(a.root, run, truth, (a.out or pathlib.Path(folder)) / run.name)
            seen += 1
    print(f"{seen} runs, {wrong} wrong")
    sys.exit(bool(wrong) or not seen)


main()
