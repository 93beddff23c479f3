#!/usr/bin/env python3
"""Plants one thing in a healthy run, lets the replayer write the log, and asks for the cause.

    scripts/generated_cases.py ROOT [--cases 65] [--seed 0] [--jobs N] [--out DIR]

ROOT holds models/ (tiny-llama, tiny-qwen2, tiny-qwen3, tiny-*-fp32, tiny-llama-ovfall), a Mistral model in
runs/n6-lossx8-mistral447-bf16/model and a templated dataset in runs/k1-healthy-mem-llama-bf16/data. Needs `cargo build --release --examples` beside the program. Each case draws
model, seed and strength from a seeded generator, so that it can be run again alone (--first N --cases 1). The log is
what the library computes for the planted run (examples/planted_log.rs), so arithmetic agrees and only the reasoning
is tested.

The rule that decides what is right, the same for all kinds and without a look at the diagnosis:
- Each case is computed twice: planted, and as the same run with that one thing put back. Where the run put back is
  not healthy itself (a row above twice the lowest of the three before it, or anything not finite or 0), the case is
  no single change of a healthy run and is drawn again. A schedule that restarts is judged from the lowest row before
  the restart on, and drawn again unless what follows rises 1.5 times as far as anything before: the first cycle
  starts at the same learning rate and may be rough itself.
- The planted thing is visible if (a) some row lies above the other run's by more than that run's own highest rise,
  and by 1.25 at least, and (b) the planted log shows it by itself: a loss or norm that is not finite, a loss of 0, a row
  above twice the lowest of the three before it and above it by three times (in ln) what four fifths of all rises are, or
  four rows in turn 1.7 times the lowest before them; for a leak, a row above both neighbours by 1.25 at every epoch
  boundary; for a multiple, a first row above 1.5 times ln(vocabulary). For bf16 rounding there is no spike: visible is a loss 3 % higher in the mean over
  the last half.
- Visible: the kind's own cause is right (for data and masked labels, with exactly the planted row). Not visible:
  `none` is right, and so is the kind's own cause, which is the truth, if the diagnosis finds it anyway.
Exit code 1 below 90 % right, or when anything healthy is accused, or anything is wrongly accused of hardware.
"""
import argparse
import concurrent.futures
import json
import math
import pathlib
import random
import shutil
import subprocess
import sys
import time

MODELS = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-llama-fp32", "tiny-qwen2-fp32"]
NEW = {"transformers": "5.6.0", "accelerate": "1.11.0", "peft": "0.18.1", "llamafactory": "0.9.5"}
LEAKING = {"transformers": "4.48.2", "accelerate": "1.2.1", "peft": "0.12.0", "llamafactory": "0.9.2"}
UNDIVIDED = {**LEAKING, "transformers": "4.47.1"}
# kind → cause
KINDS = {"healthy": "none", "learning_rate": "learning_rate", "data": "data", "gradient_clipping": "gradient_clipping",
         "gradient_accumulation": "gradient_accumulation", "schedule": "schedule", "fp16_overflow": "fp16_overflow",
         "leak": "trainer_bookkeeping", "multiple": "trainer_bookkeeping", "masked_labels": "masked_labels",
         "optimizer_state": "optimizer_state", "bf16_rounding": "bf16_rounding", "bit_flip": "hardware"}
TRIES = 12


def base(rng):
    model = rng.choice(MODELS)
    c = dict(stage="sft", do_train=True, finetuning_type="lora", lora_rank=8, lora_dropout=0.0, lora_target="all", dataset="train",
             template="chatml", cutoff_len=512, logging_steps=1, save_steps=500, per_device_train_batch_size=1,
             gradient_accumulation_steps=8, learning_rate=1e-3, num_train_epochs=3.0, lr_scheduler_type="cosine",
             warmup_ratio=0.1, seed=rng.randrange(1, 10**6), lora_alpha=256, model_name_or_path=f"models/{model}",
             dataset_dir="data", output_dir="out")
    if not model.endswith("fp32"):
        c["bf16"] = True
    return c


def pair(kind, rng):
    """(planted, put back): each a dict of config, versions, options of planted_log."""
    c = base(rng)
    back, versions, back_versions, options = {}, NEW, NEW, []
    if kind == "healthy":
        c.update(learning_rate=rng.uniform(3e-4, 2e-3), lora_alpha=rng.choice([64, 128, 256]),
                 lr_scheduler_type=rng.choice(["cosine", "linear", "constant_with_warmup"]))
    if kind == "learning_rate":
        rate = rng.uniform(1e-3, 2e-3)
        c.update(learning_rate=rate * rng.uniform(10, 20), adam_beta2=0.9, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.6)
        back = dict(learning_rate=rate)
    if kind == "gradient_clipping":
        c.update(optim="sgd", max_grad_norm=0.0, learning_rate=rng.uniform(2.5e-2, 5e-2))
        back = dict(max_grad_norm=1.0)
    if kind == "gradient_accumulation":
        c.update(gradient_accumulation_steps=1, learning_rate=rng.uniform(4e-3, 6e-3), adam_beta2=0.95, num_train_epochs=0.4)
        back = dict(gradient_accumulation_steps=8, num_train_epochs=3.2)
    if kind == "schedule":
        c.update(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}, num_train_epochs=rng.choice([4.0, 5.0]),
                 learning_rate=rng.uniform(4e-3, 9.5e-3), adam_beta2=rng.choice([0.9, 0.95]), warmup_ratio=rng.choice([0.1, 0.2, 0.3]))
        back = dict(lr_scheduler_type="cosine", lr_scheduler_kwargs=None)
    if kind == "fp16_overflow":
        c.pop("bf16", None)
        c.update(fp16=True, model_name_or_path="models/tiny-llama-ovfall", lora_target="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj")
        back = dict(fp16=None, bf16=True)
    if kind == "leak":
        c.update(per_device_train_batch_size=2, gradient_accumulation_steps=5)
        versions = LEAKING
    if kind == "multiple":
        c.update(gradient_accumulation_steps=rng.choice([4, 8, 16]), model_name_or_path="runs/n6-lossx8-mistral447-bf16/model", bf16=True)
        versions = UNDIVIDED
        back_versions = LEAKING
    if kind == "masked_labels":
        c.update(gradient_accumulation_steps=1, cutoff_len=40, num_train_epochs=1.0, learning_rate=2e-4)
    if kind == "optimizer_state":
        c.update(learning_rate=rng.uniform(1e-3, 2.5e-3), lora_alpha=512, lr_scheduler_type="constant_with_warmup",
                 warmup_ratio=0.0, warmup_steps=4, num_train_epochs=4.0)
    if kind == "bf16_rounding":
        c.pop("bf16", None)
        c.update(pure_bf16=True, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=6e-5, num_train_epochs=6.0,
                 lora_alpha=1024, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.03,
                 model_name_or_path=f"models/{rng.choice(MODELS[:3])}")
        options = ["pure_bf16"]
    if kind == "bit_flip":
        options = [f"flip={rng.randrange(22, 33)},{rng.randrange(28)},{rng.choice([25, 26, 30])}"]
    return dict(config=c, versions=versions, options=options), dict(config={**c, **back}, versions=back_versions, options=[])


def rows_of(kind, rows, rng):
    rows, victim = [dict(row) for row in rows], None
    if kind == "data":
        victim = rng.randrange(len(rows))
        rows[victim]["output"] = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(rng.randrange(80, 160)))
    if kind == "masked_labels":
        victim = rng.randrange(len(rows))
        rows[victim]["instruction"] = " ".join(rows[victim]["instruction"] for _ in range(400))
        rows[victim]["output"] = " ".join([rows[victim]["output"]] * 3)
    return rows, victim


def number(x):
    return float(x) if isinstance(x, str) else x


class Planted:
    """A run folder, its log and what made it."""

    def __init__(self, folder, root, rows, run, program):
        self.folder, self.root, self.run, self.program = folder, root, run, program
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data").mkdir(parents=True)
        (folder / "out").mkdir()
        (folder / "models").symlink_to((root / "models").resolve())
        (folder / "runs").symlink_to((root / "runs").resolve())
        (folder / "data" / "train.json").write_text(json.dumps(rows))
        (folder / "data" / "dataset_info.json").write_text(json.dumps({"train": {"file_name": "train.json"}}))
        (folder / "versions.json").write_text(json.dumps(run["versions"]))
        self.configure({})

    def configure(self, more):
        config = {k: v for k, v in {**self.run["config"], **more}.items() if v is not None}
        (self.folder / "train.json").write_text(json.dumps(config, indent=1))

    def log(self, *more):
        command = [self.program, self.folder / "train.json", self.folder, *self.run["options"], *more]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        rounds = self.run["versions"] is not NEW
        return [{**r, "loss": round(number(r["loss"]), 4) if rounds else number(r["loss"]), "grad_norm": number(r["grad_norm"])} for r in rows]

    def write(self, history, attempts=None):
        state = dict(log_history=history, global_step=len(history), max_steps=len(history), epoch=history[-1]["epoch"],
                     num_train_epochs=self.run["config"]["num_train_epochs"], logging_steps=1, save_steps=500)
        (self.folder / "out" / "trainer_state.json").write_text(json.dumps(state))
        if attempts:
            line = lambda r: json.dumps(dict(current_steps=r["step"], total_steps=len(history), loss=r["loss"], lr=r["learning_rate"],
                                             epoch=r["epoch"], percentage=0, elapsed_time="0:00:01", remaining_time="0:00:01"))
            text = "\n".join(line(r) for attempt in attempts for r in attempt) + "\n"
            (self.folder / "out" / "trainer_log.jsonl").write_text(text)

    def checkpoint(self, step, *more):
        """The log, with the adapter after `step` kept as a checkpoint without optimizer state."""
        adapter = self.folder / "adapter.safetensors"
        history = self.log(f"adapter={step},{adapter}", *more)
        folder = self.folder / "out" / f"checkpoint-{step}"
        folder.mkdir()
        adapter.rename(folder / "adapter_model.safetensors")
        return history


def rises(losses):
    return [math.log(losses[i] / min(losses[max(0, i - 3):i])) for i in range(1, len(losses))]


def broken(history):
    return any(not math.isfinite(h["loss"]) or h["loss"] <= 0 or not math.isfinite(h["grad_norm"]) for h in history)


def healthy(history):
    return not broken(history) and max(rises([h["loss"] for h in history])) < math.log(2)


def farthest(history):
    """ln of the highest rise from any row to any later one."""
    low, far = math.inf, 0.0
    for h in history:
        low = min(low, h["loss"])
        far = max(far, math.log(h["loss"] / low))
    return far


def restart(history):
    """Index of the first row whose learning rate has jumped back up."""
    rates = [h["learning_rate"] for h in history]
    jumps = [i for i in range(2, len(rates)) if rates[i] > 2 * rates[i - 1] and rates[i - 1] < max(rates[:i]) / 2]
    return jumps[0] if jumps else len(rates)


def visible(kind, planted, back):
    """The docstring's rule."""
    if broken(planted):
        return True
    losses, others = [h["loss"] for h in planted], [h["loss"] for h in back]
    apart = [math.log(a / b) for a, b in zip(losses, others)]
    if kind == "bf16_rounding":
        half = apart[len(apart) // 2:]
        return sum(half) / len(half) >= 0.03
    if max(apart) < max(math.log(1.25), max(rises(others))):
        return False
    if kind == "leak":
        first = [i for i in range(1, len(planted) - 1) if math.ceil(planted[i - 1]["epoch"]) < math.ceil(planted[i]["epoch"])]
        return all(losses[i] >= 1.25 * max(losses[i - 1], losses[i + 1]) for i in first)
    if kind == "multiple":
        return losses[0] > 1.5 * math.log(2048)
    up = sorted(r for r in rises(losses) if r > 0)
    usual = up[max(0, len(up) * 4 // 5 - 1)] if len(up) > 1 else 0.0
    single = max(rises(losses)) >= max(math.log(2), 3 * usual if len(up) > 4 else 0.0)
    stays = any(min(losses[i:i + 4]) >= 1.7 * min(losses[:i]) for i in range(1, len(losses) - 3))
    return single or stays


def make(kind, folder, options, rng):
    """A planted run on disk, and whether what was planted can be seen; `None`: not a change of a healthy run."""
    source = json.loads((options.root / "runs" / "k1-healthy-mem-llama-bf16" / "data" / "train.json").read_text())
    rows, victim = rows_of(kind, source, rng)
    planted, back = pair(kind, rng)
    other = Planted(folder / "put-back", options.root, source, back, options.example)
    run = Planted(folder / "run", options.root, rows, planted, options.example)
    if kind == "optimizer_state":
        whole = run.checkpoint(24)
        # Once for the attempts, once for what they compute.
        run.configure(dict(resume_from_checkpoint="out/checkpoint-24"))
        run.write(whole, [whole[:26], whole[24:]])
        history = run.log()
        run.write(history, [whole[:26], history[24:]])
        reference = whole
    else:
        reference = other.log()
        at = None
        if kind == "bf16_rounding":
            at = len(reference)
        if kind == "bit_flip":
            at = min(len(reference), int(planted["options"][0].split("=")[1].split(",")[0]) + 1)
        history = run.checkpoint(at) if at else run.log()
        run.write(history)
    if kind == "schedule":
        at = restart(history)
        low = min(range(at), key=lambda i: history[i]["loss"])
        if at == len(history) or farthest(history[low:]) < farthest(history[:low]) + math.log(1.5):
            return None
        history, reference = history[low:], reference[low:]
    if kind == "leak":
        reference = Planted(folder / "put-back", options.root, source, {**back, "versions": NEW}, options.example).log()
    return (run, victim, visible(kind, history, reference)) if healthy(reference) else None


def case(number, options):
    kind = list(KINDS)[number % len(KINDS)]
    folder = options.out / f"case{number:03d}"
    began = time.time()
    for draw in range(TRIES):
        made = make(kind, folder, options, random.Random(options.seed * 1000 + number + 10**6 * draw))
        if made:
            break
    if not made:
        return dict(number=number, kind=kind, expected="?", got="never healthy", victim=None, rows=[], note="", seconds=0.0)
    run, victim, seen = made
    expected = KINDS[kind] if seen else "none"
    answer = folder / "diagnosis.json"
    planted_at = time.time()
    done = subprocess.run(list(map(str, [options.binary, "diagnose", run.folder / "train.json", "--root", run.folder, "--device", "cpu", "-q",
                           "--no-cache", "--json", answer])), capture_output=True, text=True)
    if done.returncode:
        return dict(number=number, kind=kind, expected=expected, got="failed", victim=victim, rows=[], note=done.stderr.strip(), seconds=0.0)
    diagnosis = json.loads(answer.read_text())
    note = f"{diagnosis['verdict']['confidence']}, {diagnosis['cost']['experiments']} windows, {draw + 1} drawn"
    return dict(number=number, kind=kind, expected=expected, got=diagnosis["verdict"]["cause"], victim=victim,
                rows=sorted({r["row"] for r in diagnosis["rows"]}), note=note, seconds=time.time() - planted_at)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=65)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--binary", type=pathlib.Path, default=pathlib.Path("target/release/spikeprobe"))
    parser.add_argument("--example", type=pathlib.Path, default=pathlib.Path("target/release/examples/planted_log"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/generated"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    numbers = [n for n in range(options.first, options.first + options.cases)
               if not options.only or list(KINDS)[n % len(KINDS)] in options.only.split(",")]
    right = accused = hardware = total = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for a in pool.map(lambda n: case(n, options), numbers):
            exact = a["victim"] is None or a["got"] not in ("data", "masked_labels") or a["rows"] == [a["victim"]]
            good = a["got"] in (a["expected"], KINDS[a["kind"]]) and exact
            total += 1
            right += good
            accused += a["expected"] == "none" and a["got"] not in ("none", "undetermined", KINDS[a["kind"]])
            hardware += a["got"] == "hardware" and KINDS[a["kind"]] != "hardware"
            print(f"{'ok   ' if good else 'WRONG'} case {a['number']:3} planted {a['kind']:22} expected {a['expected']:22} got {a['got']:22}"
                  f" row {a['victim']} named {a['rows']} {a['seconds']:.1f} s {a['note']}", flush=True)
    print(f"\n{right} of {total} right; healthy accused {accused}; wrongly hardware {hardware}")
    sys.exit(0 if right >= 0.9 * total and not accused and not hardware else 1)


if __name__ == "__main__":
    main()
