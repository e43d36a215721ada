"""
experiments.py: does the mel help? Runs train.py many times and writes one small file a run into results/.

    python notebooks/experiments.py speech music              # 22 runs of 300 steps, two at a time, one thread each
    python notebooks/experiments.py speech music --table      # only print the table of what is there

The question needs a fair comparison: `nano` (tokens and mel) and `nano-gpt` (tokens only) have the same size, batches,
steps, dropout and schedule, and predict the coarse code; each may choose its learning rate from the same three, by
validation NLL on the first dataset with seed 0, and keeps it for the other datasets and seeds. `nano-heard` is `nano`,
with its learning rate, trained on the mel of what eight codebooks decode to: on what it is shown when it samples.
Both hybrids are scored with the mel of the original, of eight codebooks and of one.

A run whose result exists, made with the codec that ships now, is not run again; an interrupted one goes on where it
stopped.
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
sys.path.insert(0, str(ROOT))
from tokens import MINI_SHA256

RESULTS, RUNS = ROOT / "results", ROOT / "runs"               # runs/ holds checkpoints and is not committed
MODELS = {"nano": ["--model", "nano", "--n-codebooks", "1"],
          "nano-heard": ["--model", "nano", "--n-codebooks", "1", "--mel-codebooks", "8"],
          "nano-gpt": ["--model", "nano-gpt", "--n-codebooks", "1"]}
LEARNING_RATES = ("3e-3", "6e-3", "1.2e-2")
TRAIN = [sys.executable, str(ROOT / "train.py")]
HOW = dict(check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def machine():
    """The processor, and how much of it a run gets."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cpu)
    return f"{cpu}, 1 thread"


def label(dataset):
    """A dataset's short name; of a folder the last two parts, so that nobody's `speech` passes for the bundled one."""
    return dataset if dataset in ("speech", "music") else "-".join(Path(dataset).resolve().parts[-2:])


def read(path):
    """A run's result, or None if there is none with the codec that ships now."""
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("codec_checksum") == MINI_SHA256[:16] else None


def run(dataset, model, lr, seed):
    """Train once, unless that is done; return the result: the best evaluation and what it was made with."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    result = RESULTS / f"{name}.json"
    if not read(result):
        out = RUNS / f"{name}.pt"
        place = dataset if dataset == label(dataset) else str(Path(dataset).resolve())
        options = ["--dataset", place, *MODELS[model], "--lr", lr, "--seed", str(seed), "--device", "cpu"]
        again = ["--resume"] if out.with_suffix(".last.pt").exists() else ["--overwrite"]
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                                text=True).stdout             # now: the tree may change while the run goes on
        with open(out.with_suffix(".txt"), "a") as text:
            subprocess.run([*TRAIN, *options, *again, "--out", str(out)], stdout=text, stderr=text, **HOW)
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


def score(dataset, model, lr, seed):
    """Add to a run's result what its best checkpoint scores when shown other mels than in training."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    result, out = RESULTS / f"{name}.json", RUNS / f"{name}.pt"
    content = json.loads(result.read_text())
    if "val_nll_by_mel" not in content and out.exists():
        nll = {}                                              # codebooks that the mel is decoded from, 0: the original
        for codebooks in ("0", "8", "1"):
            scored = subprocess.run([*TRAIN, "--eval", str(out), "--mel-codebooks", codebooks, "--device", "cpu"],
                                    stdout=subprocess.PIPE, **HOW)
            nll[codebooks] = json.loads(scored.stdout)["val_nll"]
        result.write_text(json.dumps({**content, "val_nll_by_mel": nll}, indent=1) + "\n")


def table(datasets):
    """A markdown table from results/: each model at its learning rate, mean and spread over the seeds."""
    lines = ["| dataset | model | parameters | lr | val NLL, seeds 0 1 2 | mean ± sd | perplexity | accuracy | "
             "unigram | shown the mel of 8 codebooks | of 1 |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for dataset in map(label, datasets):
        means = {}
        for model in MODELS:
            found = [result for p in RESULTS.glob(f"{dataset}-{model}-lr*.json") if (result := read(p))]
            if not found:
                continue
            lr = min((r for r in found if r["seed"] == 0), key=lambda r: r["best"]["val_nll"])["lr"]
            runs = sorted((r for r in found if r["lr"] == lr), key=lambda r: r["seed"])
            nll = [r["best"]["val_nll"] for r in runs]
            mean = lambda key: statistics.mean(r["best"][key] for r in runs)
            shown = [[r["val_nll_by_mel"][k] for r in runs if "val_nll_by_mel" in r] for k in ("8", "1")]
            shown = [f"{statistics.mean(nll):.3f}" if nll else "" for nll in shown]
            spread = f" ± {statistics.stdev(nll):.3f}" if len(nll) > 1 else ""
            means[model] = nll
            lines.append(f"| {dataset} | `{model}` | {runs[0]['best']['n_params']:,} | {lr} | "
                         f"{' '.join(f'{n:.3f}' for n in nll)} | {mean('val_nll'):.3f}{spread} | "
                         f"{mean('val_ppl'):.1f} | {100 * mean('val_acc'):.1f} % | {mean('unigram_nll'):.3f} | "
                         f"{shown[0]} | {shown[1]} |")
        for model in [m for m in means if m != "nano-gpt"] if "nano-gpt" in means else []:
            gains = [b - a for a, b in zip(means[model], means["nano-gpt"])]
            lines.append(f"| {dataset} | gain of `{model}` | | | {' '.join(f'{g:+.3f}' for g in gains)} | "
                         f"{statistics.mean(gains):+.3f} | | | | | |")
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
            search = [(m, lr) for lr in LEARNING_RATES for m in MODELS if m != "nano-heard"]
            found = list(pool.map(lambda r: run(args.datasets[0], *r, 0), search))
            nll = {r: result["best"]["val_nll"] for r, result in zip(search, found)}
            best = {model: min(LEARNING_RATES, key=lambda lr: nll[model, lr]) for model, _ in search}
            best["nano-heard"] = best["nano"]
            runs = [(d, m, best[m], seed) for m in ("nano", "nano-gpt", "nano-heard") for d in args.datasets
                    for seed in range(args.seeds)]
            list(pool.map(lambda r: run(*r), runs))
            list(pool.map(lambda r: score(*r), [r for r in runs if r[1] != "nano-gpt"]))
    print(table(args.datasets))


if __name__ == "__main__":
    main()
