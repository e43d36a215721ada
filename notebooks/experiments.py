"""
experiments.py: does the mel help? Runs train.py many times and writes one small file a run into results/.

    python notebooks/experiments.py speech music              # 26 runs of 300 steps, two at a time, one thread each
    python notebooks/experiments.py speech music --table      # only print the table of what is there

The question needs a fair comparison: `nano` (tokens and mel) and `nano-gpt` (tokens only) have the same size, batches,
steps, dropout and schedule, and predict the coarse code; each may choose its learning rate from the same three, by
validation NLL on the first dataset with seed 0, and keeps it for the other datasets and seeds. `nano-heard` is `nano`
trained on the mel of what eight codebooks decode to, which is what a sampler of all codebooks shows. `nano-all`, trained
on that mel, too, and `nano-gpt-all` predict all eight, as the presets do (one seed). Hybrids are scored with the mel of
the original, of eight codebooks and of one.

A gain is the difference of two models' NLL, its interval a paired bootstrap: validation clips are drawn with
replacement a thousand times, the same ones for both models and all seeds; 95 % of the gains lie inside.

A run whose result exists, made with the codec that ships now, is not run again; an interrupted one goes on where it
stopped.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tokens import MINI_SHA256

RESULTS, RUNS = ROOT / "results", ROOT / "runs"               # runs/ holds checkpoints and is not committed
MODELS = {"nano": ["--model", "nano", "--n-codebooks", "1"],
          "nano-heard": ["--model", "nano", "--n-codebooks", "1", "--mel-codebooks", "8"],
          "nano-gpt": ["--model", "nano-gpt", "--n-codebooks", "1"],
          "nano-all": ["--model", "nano"],
          "nano-gpt-all": ["--model", "nano-gpt"]}
TWINS = {"nano": "nano-gpt", "nano-heard": "nano-gpt", "nano-all": "nano-gpt-all"}
LEARNING_RATES = ("3e-3", "6e-3", "1.2e-2")
TRAIN = [sys.executable, str(ROOT / "train.py")]
HOW = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


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


def write(path, content):
    """JSON that can be read in a diff: a key a line, a list on one line."""
    text = json.dumps(content, indent=1)
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def run(dataset, model, lr, seed):
    """Train once, unless that is done; return the result: the best evaluation and what it was made with."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    result = RESULTS / f"{name}.json"
    if not read(result):
        out = RUNS / f"{name}.pt"
        place = dataset if dataset == label(dataset) else str(Path(dataset).resolve())
        options = ["--dataset", place, *MODELS[model], "--lr", lr, "--seed", str(seed), "--device", "cpu"]
        again = ["--resume"] if out.with_suffix(".last.pt").exists() else ["--overwrite"]
        git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        commit = git("describe", "--always") + "-dirty" * bool(git("status", "--porcelain", "--", "*.py", "assets"))
        with open(out.with_suffix(".txt"), "a") as text:
            done = subprocess.run([*TRAIN, *options, *again, "--out", str(out)], stdout=text, stderr=text, **HOW)
        if done.returncode:
            last = Path(text.name).read_text().strip().splitlines()[-1]
            raise RuntimeError(f"run {name} failed: {last.removeprefix('error: ')} (all of it: {text.name})")
        log = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        evaluations = [entry for entry in log if "val_nll" in entry]
        command = "python train.py " + " ".join(options).replace(place, dataset)
        content = {"command": command, "dataset": label(dataset), "model": model,
                   "lr": lr, "seed": seed, "codec": log[0]["codec"], "codec_checksum": log[0]["codec_checksum"],
                   "best": min(evaluations, key=lambda e: e["val_nll"]), "seconds": evaluations[-1]["seconds"],
                   "curve": [[e["step"], round(e["val_nll"], 4)] for e in evaluations],
                   "machine": machine(), "torch": log[0]["torch"], "commit": commit}
        write(result, content)
        out.with_suffix(".last.pt").unlink()                  # nothing is left to continue
    return json.loads(result.read_text())


def score(dataset, model, lr, seed):
    """Add to a run's result what its best checkpoint scores, clip by clip, when shown other mels than in training."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    result, out = RESULTS / f"{name}.json", RUNS / f"{name}.pt"
    content = json.loads(result.read_text())
    if "scores" not in content and out.exists():
        scores = {}                                           # by codebooks whose mel it is shown, 0: the original
        for codebooks in ("0", "8", "1") if model in TWINS else ("0",):
            done = subprocess.run([*TRAIN, "--eval", str(out), "--mel-codebooks", codebooks, "--device", "cpu"],
                                  stdout=subprocess.PIPE, check=True, **HOW)
            figures = json.loads(done.stdout)
            scores[codebooks] = {key: figures[key] for key in ("val_nll", "clip_nll", "clip_targets")}
        write(result, {**content, "scores": scores})


def bootstrap(gains, weights, draws=1000):
    """Mean gain over all targets and its 95 % interval: gains (seeds, clips) in nats, weights (clips,) in targets."""
    gains, weights = np.mean(gains, axis=0), np.array(weights)
    mean = lambda picked: (gains[picked] * weights[picked]).sum(-1) / weights[picked].sum(-1)
    rng = np.random.default_rng(0)
    low, high = np.quantile(mean(rng.integers(len(gains), size=(draws, len(gains)))), (0.025, 0.975))
    return mean(np.arange(len(gains))), low, high


def table(datasets):
    """Two markdown tables from results/: each model at its learning rate, and what each hybrid gains over its twin."""
    models = ["| dataset | model | parameters | lr | val NLL by seed | mean ± sd | perplexity | accuracy | unigram |",
              "|---|---|---|---|---|---|---|---|---|"]
    gains = ["| dataset | gain of | over | shown the mel of | by seed | mean | 95 % interval |",
             "|---|---|---|---|---|---|---|"]
    made = set()
    for dataset in map(label, datasets):
        runs = {}
        for model in MODELS:
            found = [result for p in RESULTS.glob(f"{dataset}-{model}-lr*.json") if (result := read(p))]
            if not found:
                continue
            lr = min((r for r in found if r["seed"] == 0), key=lambda r: r["best"]["val_nll"])["lr"]
            runs[model] = sorted((r for r in found if r["lr"] == lr), key=lambda r: r["seed"])
            made |= {(r["codec"], r["codec_checksum"], r["machine"], r["torch"]) for r in runs[model]}
            nll = [r["best"]["val_nll"] for r in runs[model]]
            mean = lambda key: statistics.mean(r["best"][key] for r in runs[model])
            spread = f" ± {statistics.stdev(nll):.3f}" if len(nll) > 1 else ""
            models.append(f"| {dataset} | `{model}` | {runs[model][0]['best']['n_params']:,} | {lr} | "
                          f"{' '.join(f'{n:.3f}' for n in nll)} | {mean('val_nll'):.3f}{spread} | "
                          f"{mean('val_ppl'):.1f} | {100 * mean('val_acc'):.1f} % | {mean('unigram_nll'):.3f} |")
        for model, twin in TWINS.items():
            pairs = [(a["scores"], b["scores"]["0"]) for a, b in zip(runs.get(model, []), runs.get(twin, []))
                     if "scores" in a and "scores" in b]
            for shown, name in (("0", "the original"), ("8", "8 codebooks"), ("1", "1 codebook")) if pairs else ():
                by_clip = [np.subtract(b["clip_nll"], a[shown]["clip_nll"]) for a, b in pairs]
                mean, low, high = bootstrap(by_clip, pairs[0][1]["clip_targets"])
                seeds = " ".join(f"{b['val_nll'] - a[shown]['val_nll']:+.3f}" for a, b in pairs)
                gains.append(f"| {dataset} | `{model}` | `{twin}` | {name} | {seeds} | {mean:+.3f} | "
                             f"{low:+.3f} to {high:+.3f} |")
    return "\n".join([*models, "", *gains, "", *(f"Codec {c} ({checksum}), {cpu}, torch {torch}."
                                                for c, checksum, cpu, torch in sorted(made))])


def main():
    parser = argparse.ArgumentParser(description="Compare nano with its token-only twin.")
    parser.add_argument("datasets", nargs="+", help="speech, music, or folders")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of the results that exist")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if not args.table:
        for folder in (RESULTS, RUNS):
            folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            search = [(m, lr) for lr in LEARNING_RATES for m in ("nano", "nano-gpt")]
            found = list(pool.map(lambda r: run(args.datasets[0], *r, 0), search))
            nll = {r: result["best"]["val_nll"] for r, result in zip(search, found)}
            best = {model: min(LEARNING_RATES, key=lambda lr: nll[model, lr]) for model, _ in search}
            best |= {"nano-heard": best["nano"], "nano-all": best["nano"], "nano-gpt-all": best["nano-gpt"]}
            runs = [(d, m, best[m], seed) for m in MODELS for d in args.datasets
                    for seed in range(1 if m.endswith("-all") else args.seeds)]
            list(pool.map(lambda r: run(*r), runs))
            list(pool.map(lambda r: score(*r), runs))
    print(table(args.datasets))


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
