"""
experiments.py: does the mel help? Runs train.py many times and writes one small file a run into results/.

    python notebooks/experiments.py speech music              # 16 runs of 300 steps, two at a time, one thread each
    python notebooks/experiments.py speech music --table      # only print the table of what is there

The question needs a fair comparison: `nano` (tokens and mel) and `nano-gpt` (tokens only) have the same size, batches,
steps, dropout and schedule; each may choose its learning rate from the same three, by validation NLL on the first
dataset with seed 0, and keeps it for the other datasets and seeds. A run whose result exists is not run again, an interrupted one goes on where it stopped.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "runs"               # runs/ holds checkpoints and is not committed
MODELS = ("nano", "nano-gpt")
LEARNING_RATES = ("3e-3", "6e-3", "1.2e-2")


def machine():
    """The processor, and how much of it a run gets."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cpu)
    return f"{cpu}, 1 thread"


def label(dataset):
    """A dataset's short name; of a folder the last two parts, so that nobody's `speech` passes for the bundled one."""
    return dataset if dataset in ("speech", "music") else "-".join(Path(dataset).resolve().parts[-2:])


def run(dataset, model, lr, seed):
    """Train once, unless that is done; return the result: the best evaluation and what it was made with."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    result = RESULTS / f"{name}.json"
    if not result.exists():
        out = RUNS / f"{name}.pt"
        place = dataset if dataset == label(dataset) else str(Path(dataset).resolve())
        options = ["--dataset", place, "--model", model, "--lr", lr, "--seed", str(seed), "--device", "cpu"]
        again = ["--resume"] if out.with_suffix(".last.pt").exists() else ["--overwrite"]
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                                text=True).stdout             # now: the tree may change while the run goes on
        with open(out.with_suffix(".txt"), "a") as text:
            subprocess.run([sys.executable, str(ROOT / "train.py"), *options, *again, "--out", str(out)], check=True,
                           cwd=ROOT, stdout=text, stderr=text, env={**os.environ, "OMP_NUM_THREADS": "1"})
        log = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        evaluations = [entry for entry in log if "val_nll" in entry]
        command = "python train.py " + " ".join(options).replace(place, dataset)
        content = {"command": command, "dataset": label(dataset), "model": model,
                   "lr": lr, "seed": seed, "codec": log[0]["codec"], "codec_checksum": log[0]["codec_checksum"],
                   "best": min(evaluations, key=lambda e: e["val_nll"]), "seconds": evaluations[-1]["seconds"],
                   "curve": [[e["step"], round(e["val_nll"], 4)] for e in evaluations],
                   "machine": machine(), "torch": log[0]["torch"], "commit": commit.strip()}
        result.write_text(json.dumps(content, indent=1) + "\n")
        out.with_suffix(".last.pt").unlink()                  # nothing is left to continue
    return json.loads(result.read_text())


def table(datasets):
    """A markdown table from results/: each model at its learning rate, mean and spread over the seeds."""
    lines = ["| dataset | model | parameters | lr | val NLL, seeds 0 1 2 | mean ± sd | perplexity | accuracy | unigram |",
             "|---|---|---|---|---|---|---|---|---|"]
    for dataset in map(label, datasets):
        means = {}
        for model in MODELS:
            found = [json.loads(p.read_text()) for p in RESULTS.glob(f"{dataset}-{model}-lr*.json")]
            if not found:
                continue
            lr = min((r for r in found if r["seed"] == 0), key=lambda r: r["best"]["val_nll"])["lr"]
            runs = sorted((r for r in found if r["lr"] == lr), key=lambda r: r["seed"])
            nll = [r["best"]["val_nll"] for r in runs]
            mean = lambda key: statistics.mean(r["best"][key] for r in runs)
            spread = f" ± {statistics.stdev(nll):.3f}" if len(nll) > 1 else ""
            means[model] = nll
            lines.append(f"| {dataset} | `{model}` | {runs[0]['best']['n_params']:,} | {lr} | "
                         f"{' '.join(f'{n:.3f}' for n in nll)} | {mean('val_nll'):.3f}{spread} | {mean('val_ppl'):.1f} | "
                         f"{100 * mean('val_acc'):.1f} % | {mean('unigram_nll'):.3f} |")
        if len(means) == 2:
            gains = [b - a for a, b in zip(*means.values())]
            lines.append(f"| {dataset} | gain of the mel | | | {' '.join(f'{g:+.3f}' for g in gains)} | "
                         f"{statistics.mean(gains):+.3f} | | | |")
    if len(lines) > 2:
        made = {(r["codec"], r["codec_checksum"], r["machine"], r["torch"]) for r in found}
        lines += ["", *(f"Codec {c} ({checksum}), {cpu}, torch {torch}." for c, checksum, cpu, torch in made)]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Compare nano with its token-only twin.")
    parser.add_argument("datasets", nargs="+", help="speech, music, or folders")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of the results that exist")
    args = parser.parse_args()
    if not args.table:
        for folder in (RESULTS, RUNS):
            folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            search = [(m, lr) for lr in LEARNING_RATES for m in MODELS]
            found = list(pool.map(lambda r: run(args.datasets[0], *r, 0), search))
            nll = {r: result["best"]["val_nll"] for r, result in zip(search, found)}
            best = {model: min(LEARNING_RATES, key=lambda lr: nll[model, lr]) for model in MODELS}
            runs = [(d, m, best[m], seed) for d in args.datasets for seed in range(args.seeds) for m in MODELS]
            list(pool.map(lambda r: run(*r), runs))
    print(table(args.datasets))


if __name__ == "__main__":
    main()
