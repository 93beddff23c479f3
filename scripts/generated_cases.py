#!/usr/bin/env python3
"""Plants one thing in a healthy run, lets the replayer write the log, and asks for the cause.

    scripts/generated_cases.py ROOT [--cases 60] [--seed 0] [--binary target/release/spikeprobe] [--jobs N] [--out DIR]

ROOT holds models/ (tiny-llama, tiny-qwen2, tiny-qwen3, tiny-*-fp32, tiny-llama-ovfall) and a templated dataset in
runs/k1-healthy-mem-llama-bf16/data. Each case draws model, seed and strength from the seeded generator. The log is
what `spikeprobe replay` computes for the planted configuration, so arithmetic agrees and only the reasoning is tested.
A case whose log shows no spike to the eye (loss never 2x the minimum of the three steps before, all finite) was not
a case: it counts as healthy, and accusing it is wrong. Exit code 1 below 90 % right, or when anything healthy is
accused, or anything is wrongly accused of hardware.
"""
import argparse
import concurrent.futures
import json
import pathlib
import random
import shutil
import subprocess
import sys

KINDS = ["healthy", "learning_rate", "data", "gradient_clipping", "gradient_accumulation", "schedule", "fp16_overflow",
         "trainer_bookkeeping", "masked_labels"]
MODELS = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-llama-fp32", "tiny-qwen2-fp32"]


def configuration(kind, rng):
    model = rng.choice(MODELS)
    c = dict(stage="sft", do_train=True, finetuning_type="lora", lora_rank=8, lora_dropout=0.0, lora_target="all", dataset="train",
             template="chatml", cutoff_len=512, logging_steps=1, save_steps=500, per_device_train_batch_size=1,
             gradient_accumulation_steps=8, learning_rate=1e-3, num_train_epochs=3.0, lr_scheduler_type="cosine",
             warmup_ratio=0.1, seed=rng.randrange(1, 10**6), lora_alpha=256, model_name_or_path=f"models/{model}")
    if not model.endswith("fp32"):
        c["bf16"] = True
    if kind == "learning_rate":
        c.update(learning_rate=rng.uniform(1.2e-2, 3e-2), adam_beta2=0.9, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.6)
    if kind == "gradient_clipping":
        c.update(optim="sgd", max_grad_norm=0.0, learning_rate=rng.uniform(2.5e-2, 5e-2))
    if kind == "gradient_accumulation":
        c.update(gradient_accumulation_steps=1, learning_rate=rng.uniform(4e-3, 6e-3), adam_beta2=0.95, num_train_epochs=0.4)
    if kind == "schedule":
        c.update(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}, num_train_epochs=4.0,
                 learning_rate=rng.uniform(6e-3, 1e-2), adam_beta2=0.9)
    if kind == "fp16_overflow":
        c.pop("bf16", None)
        c.update(fp16=True, model_name_or_path="models/tiny-llama-ovfall", lora_target="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj")
    if kind == "trainer_bookkeeping":
        c.update(per_device_train_batch_size=2, gradient_accumulation_steps=5)
    if kind == "masked_labels":
        c.update(gradient_accumulation_steps=1, cutoff_len=40, num_train_epochs=1.0)
    return c


def rows_of(kind, rows, rng):
    rows = [dict(row) for row in rows]
    if kind == "data":
        victim = rng.randrange(len(rows))
        rows[victim]["output"] = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(rng.randrange(80, 160)))
    if kind == "masked_labels":
        victim = rng.randrange(len(rows))
        rows[victim]["instruction"] = " ".join(rows[victim]["instruction"] for _ in range(400))
        rows[victim]["output"] = " ".join([rows[victim]["output"]] * 3)
    return rows, (victim if kind in ("data", "masked_labels") else None)


def case(number, options):
    rng = random.Random(options.seed * 1000 + number)
    kind = KINDS[number % len(KINDS)]
    folder = options.out / f"case{number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "models").symlink_to((options.root / "models").resolve())
    source = options.root / "runs" / "k1-healthy-mem-llama-bf16" / "data"
    rows, victim = rows_of(kind, json.loads((source / "train.json").read_text()), rng)
    (folder / "data" / "train.json").write_text(json.dumps(rows))
    shutil.copy(source / "dataset_info.json", folder / "data")
    c = configuration(kind, rng)
    c.update(dataset_dir="data", output_dir="out")
    (folder / "train.json").write_text(json.dumps(c, indent=1))
    if kind == "trainer_bookkeeping":
        versions = {"transformers": "4.48.2", "accelerate": "1.2.1", "peft": "0.12.0", "llamafactory": "0.9.2"}
    else:
        versions = {"transformers": "5.6.0", "accelerate": "1.11.0", "peft": "0.18.1", "llamafactory": "0.9.5"}
    (folder / "versions.json").write_text(json.dumps(versions))
    common = [str(folder / "train.json"), "--root", str(folder), "--device", "cpu", "-q"]
    run = lambda *words: subprocess.run([options.binary, *words], capture_output=True, text=True)
    done = run("replay", *common, "--json", str(folder / "replay.json"))
    if done.returncode:
        return number, kind, "replay failed", victim, [], done.stderr.strip()
    steps = json.loads((folder / "replay.json").read_text())["steps"]
    value = lambda x: float(x) if isinstance(x, str) else x
    history = [dict(step=s["step"], epoch=s["epoch"], loss=value(s["loss"]), grad_norm=value(s["grad_norm"]),
                    learning_rate=s["learning_rate_logged"]) for s in steps]
    if kind == "trainer_bookkeeping":
        history = [dict(h, loss=round(h["loss"], 4)) for h in history]
    state = dict(log_history=history, global_step=len(history), max_steps=len(history), epoch=history[-1]["epoch"],
                 num_train_epochs=c["num_train_epochs"], logging_steps=1, save_steps=500)
    (folder / "out" / "trainer_state.json").write_text(json.dumps(state))
    expected = kind
    losses = [h["loss"] for h in history]
    jumps = [losses[i] / min(losses[max(0, i - 3):i]) for i in range(1, len(losses)) if min(losses[max(0, i - 3):i]) > 0]
    broken = any(not (l > 0) for l in losses) or any(h["grad_norm"] != h["grad_norm"] for h in history)
    if kind != "trainer_bookkeeping" and not broken and max(jumps) < 2:
        expected = "none"
    if kind == "healthy":
        expected = "none"
    done = run("diagnose", *common, "--json", str(folder / "diagnosis.json"))
    if done.returncode:
        return number, kind, expected, "failed", victim, [], done.stderr.strip()
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    named = sorted({r["row"] for r in diagnosis["rows"]})
    return number, kind, expected, diagnosis["verdict"]["cause"], victim, named, diagnosis["verdict"]["confidence"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=63)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--binary", default="target/release/spikeprobe")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/generated"))
    options = parser.parse_args()
    right = accused = hardware = total = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for answer in pool.map(lambda n: case(n, options), range(options.first, options.first + options.cases)):
            number, kind, expected, got, victim, named, note = (answer + ("",))[:7]
            good = got == expected and (victim is None or got != kind or named == [victim])
            total += 1
            right += good
            accused += expected == "none" and got not in ("none", "undetermined")
            hardware += got == "hardware"
            print(f"{'ok   ' if good else 'WRONG'} case {number:3} planted {kind:22} expected {expected:22} got {got:22}"
                  f" row {victim} named {named} {note}", flush=True)
    print(f"\n{right} of {total} right; healthy accused {accused}; wrongly hardware {hardware}")
    sys.exit(0 if right >= 0.9 * total and not accused and not hardware else 1)


if __name__ == "__main__":
    main()
