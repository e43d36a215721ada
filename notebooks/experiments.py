"""
experiments.py: does the mel help, how much, and why? Runs train.py many times and writes one small file per run into
results/.

    python notebooks/experiments.py speech music              # 36 runs of 300 steps, two at a time, one thread each
    python notebooks/experiments.py speech --only streams     # another of the questions below
    python notebooks/experiments.py speech music --table      # only print the tables of what is there

A fair comparison needs models that are alike: `coarse` (tokens and mel) and `coarse-gpt` (tokens only), which predict
the coarse code, have the same size, batches, steps, dropout and schedule. Each chooses its learning rate from the same
four, by validation NLL on the first dataset (or on --search) with seed 0, and keeps it everywhere. So do those that
read eight codes, `coarse-codes8` and, with the mel, `coarse-both8`; `gpt-s`, `gpt-m`, `gpt-l` and `hybrid` choose from
three, in `paper` and again in `scale`. All others use the rate of the model they are a variant of, or of its kind.
`nano` and `nano-gpt` are the unchanged presets: they predict all eight codes.

gap       the gain with the recording's mel, and how much is left of it with the mel available in sampling: `coarse`,
          `coarse-gpt`, and `coarse-heard`, trained on the mel of what eight codebooks decode to; `nano`, trained on the
          same mel, and `nano-gpt`. Hybrids are scored with the mel of the original, of eight codebooks and of one
window    `coarse` with Hann windows of 1024 samples instead of ours: one that ends with the frame; the usual one, which
          looks 192 samples ahead; and that one cut off where the frame ends, which shows how much of its gain is no
          leak. These three also with the codes of `late` (see codec). And one of 600 samples (25 ms, as long as
          Whisper's) that ends with the frame
leak      Hann windows that look further ahead, the same cut off, and a longer and a shorter window of our kind;
          exploratory, with one seed, as are fuse, size, steps, noise and context
streams   the mel without tokens; the mel of what 1, 2 and 4 codebooks decode to; instead of a mel, all eight codes as
          embeddings, or the codec's own vectors: of the recording before quantisation, of one code, of all eight; both
          the mel of eight codebooks and all eight codes as embeddings
frames    for the NLL of whole frames: as `nano`, but instead of the mel reading all eight codes as embeddings, as Moshi
          does (`nano-codes8`), or as the sum of the codec's vectors, as RQ-Transformer can (`nano-latents8`)
delay     `coarse` and `coarse-heard`, with the mel one frame and three frames later than it could be: how much of the
          gain is in the very latest sound?
fuse      branches added instead of concatenated, and mel branches of 0, 2 and 4 blocks, all of `coarse`'s size; that of
          4 blocks also trained on decoded mel
size      both models narrower and wider (not in pairs of equal size: two curves over parameters), with learning rates
          in inverse proportion to the width
steps     `coarse`, `coarse-heard` and `coarse-gpt` trained four times as long
noise     `nano` and `coarse` with noise on the mel in training, as the sound they will generate is never quite right
mix       `coarse-heard` and `nano` given the recording's mel in half of the crops, so that they know both
twice     `coarse`, `coarse-heard` and `coarse-gpt` trained twice as long, three seeds
dropout   `coarse-heard` and `coarse-gpt` of twice, with twice the dropout: is it overfitting that shrinks the gain?
longer    `nano` with noise, without, and `nano-gpt`, for 600 steps
shipped   three hours of audio, 1,200 steps: `nano` with noise and without, and `nano-gpt`
robust    as `nano` in shipped, but with twice the noise; given the recording's mel in half of the crops; given that of
          the coarse code alone in half, without and with noise. One seed, to be sampled from
codes8    as `nano-gpt` and as `nano` in shipped, but reading all eight codes of a frame as embeddings: instead of the
          mel, and beside it
own       as `nano` in shipped, but given the mel of its own finer codes in half of the crops. (The models in assets/
          are from shipped and own: on speech `nano-own`, on music `nano`, and `nano-gpt`)
details   as `nano` and as `nano-latents8` in frames, given their own finer codes in the same way
vectors   as `nano` in shipped and in own, but reading the sum of the codec's vectors instead of the mel
recorded  as `nano` in shipped, but trained on the mel of recordings: what it generates shows what the gap costs. One
          seed
double    `nano`, `nano-gpt`, `nano-codes8` and `nano-latents8` for 2,400 steps, on six hours of audio (`--lr 6e-3`:
          after 300 steps `nano` and `nano-gpt` would choose twice that, which turned out worse, as did half of it)
context   `coarse`, `coarse-heard` and `coarse-gpt` with more and fewer positions but the same number of targets a step:
          the longer the context, the fewer places they come from
short     the same three with 32 positions, where music gains most, three seeds; and again from as few places a step as
          with 256: from stretches of 256 frames, each cut into eight crops
codec     `coarse` and `coarse-gpt` with the codes of codecs whose first codebook describes something else;
          refit_codec.py makes them
decoder   `coarse-heard` and `coarse-gpt` with the codes of two of those, decoded by decoders trained for them
paper     `gpt-s`, `gpt-m`, `gpt-l` and `hybrid`, 3.7 to 39 million parameters, each with the best of three learning
          rates, and `hybrid-heard`, with the rate of `hybrid`. For a GPU: `--only paper --device cuda --jobs 5`
scale     the same five on three hours of audio, 1,200 steps; and `hybrid` and `gpt-m` with the codes of `late`

A gain is the difference of two models' NLLs. Its interval is from a paired bootstrap: validation clips are drawn with
replacement a thousand times, the same ones for both models and all seeds; 95 % of the gains lie inside.

A run that has a result, made with the codec that ships now, is not repeated; an interrupted one goes on where it
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
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import BUNDLED, CORPORA
from model import PRESETS, write_whole
from tokens import MINI_SHA256

RESULTS, RUNS = ROOT / "results", ROOT / "runs"               # runs/ holds checkpoints and is not committed
NANO, NANO_GPT = ["--model", "nano"], ["--model", "nano-gpt"]
COARSE, GPT = [*NANO, "--n-codebooks", "1"], [*NANO_GPT, "--n-codebooks", "1"]
HEARD = [*COARSE, "--mel-codebooks", "8"]
HANN = ["--window", "512", "512"]
CODES8, NOISE = ["--set", "n_input_codebooks=8"], ["--set", "mel_noise=0.5"]
STEPS = {n: ["--steps", str(n)] for n in (600, 1200, 2400)}
REFITTED = {first: f"runs/{first}-{MINI_SHA256[:8]}.pt"                       # by refit_codec.py
            for first in ("whole", "waveform", "hann", "late", "plain", "hann-decoder", "late-decoder")}
TRIO = {"coarse": COARSE, "coarse-heard": HEARD, "coarse-gpt": GPT}       # trained on recordings, decoded audio, no mel
SIZES = ("gpt-s", "gpt-m", "hybrid", "gpt-l")
LARGE = "--n-codebooks 1 --context 256 --batch-size 32".split()
PAPER = [*LARGE, *"--steps 400 --eval-every 50 --dtype bfloat16".split()]
SCALE = [*LARGE, *"--steps 1200 --eval-every 100 --dtype bfloat16 --compile".split()]
# question: {model: options of train.py}; the options' order matters, as `read` looks for them in a result's command
EXPERIMENTS = {
    "gap": {**TRIO, "nano": NANO, "nano-gpt": NANO_GPT},
    "window": {**{f"coarse-{late}{name}": [*COARSE, *HANN, *ahead, *codec]
                  for late, codec in (("", []), ("late-", ["--codec", REFITTED["late"]]))
                  for name, ahead in (("window1024", []), ("leak192", ["--lookahead", "192"]),
                                      ("cut192", ["--lookahead", "-192"]))},
               "coarse-window600": [*COARSE, "--window", "300", "300"]},
    "leak": {**{f"coarse-{how}{n}": [*COARSE, *HANN, "--lookahead", f"{sign}{n}"]
                for n in (352, 512) for how, sign in (("leak", ""), ("cut", "-"))},
             **{f"coarse-window{rise + fall}": [*COARSE, "--window", str(rise), str(fall)]
                for rise, fall in ((960, 32), (288, 32))}},
    "streams": {"coarse-mel": [*COARSE, "--set", "use_codes=False", "n_inner=656"],
                **{f"coarse-heard{k}": [*COARSE, "--mel-codebooks", str(k)] for k in (1, 2, 4)},
                "coarse-codes8": [*GPT, *CODES8], "coarse-both8": [*HEARD, *CODES8],
                **{f"coarse-latents{k}": [*COARSE, "--mel-codebooks", str(k), "--latents"] for k in (0, 1, 8)}},
    "frames": {"nano-codes8": [*NANO_GPT, *CODES8], "nano-latents8": [*NANO, "--latents"]},
    "delay": {f"{name}-delay{n}": [*TRIO[name], "--set", f"mel_delay={n}"]
              for n in (1, 3) for name in ("coarse", "coarse-heard")},
    "fuse": {"coarse-add": [*COARSE, "--set", "fuse=add", "n_inner=528"],
             **{f"coarse-blocks{n}": [*COARSE, "--set", f"n_mel_layer={n}", f"n_inner={inner}"]
                for n, inner in ((0, 584), (2, 440), (4, 296))},
             "coarse-heard-blocks4": [*HEARD, "--set", "n_mel_layer=4", "n_inner=296"]},
    "size": {f"{name}-width{n}": [*options, "--set", f"n_embd={n}", f"n_head={n // 32}", f"n_inner={4 * n}"]
             for n in (64, 192) for name, options in (("coarse", COARSE), ("coarse-gpt", GPT))},
    "steps": {f"{name}-steps1200": [*options, "--steps", "1200"] for name, options in TRIO.items()},
    "twice": {f"{name}-steps600": [*options, *STEPS[600]] for name, options in TRIO.items()},
    "dropout": {f"{name}-steps600-dropout0.2": [*TRIO[name], *STEPS[600], "--dropout", "0.2"]
                for name in ("coarse-heard", "coarse-gpt")},
    "noise": {"nano-noise": [*NANO, *NOISE], "coarse-noise": [*COARSE, *NOISE]},
    "mix": {"coarse-heard-mix": [*HEARD, "--mix", "0"], "nano-mix": [*NANO, "--mix", "0"]},
    **{name: {f"nano-noise-steps{n}": [*NANO, *STEPS[n], *NOISE], f"nano-steps{n}": [*NANO, *STEPS[n]],
              f"nano-gpt-steps{n}": [*NANO_GPT, *STEPS[n]]} for name, n in (("longer", 600), ("shipped", 1200))},
    "robust": {"nano-noise1-steps1200": [*NANO, *STEPS[1200], "--set", "mel_noise=1.0"],
               **{f"nano-mix{k}-steps1200": [*NANO, *STEPS[1200], "--mix", str(k)] for k in (0, 1)},
               "nano-noise-mix1-steps1200": [*NANO, *STEPS[1200], "--mix", "1", *NOISE]},
    "codes8": {"nano-codes8-steps1200": [*NANO_GPT, *STEPS[1200], *CODES8],
               "nano-both8-steps1200": [*NANO, *STEPS[1200], *CODES8]},
    "own": {"nano-own-steps1200": [*NANO, *STEPS[1200], "--own-details"]},
    "details": {"nano-own": [*NANO, "--own-details"], "nano-own-latents8": [*NANO, "--own-details", "--latents"]},
    "vectors": {"nano-latents8-steps1200": [*NANO, *STEPS[1200], "--latents"],
                "nano-own-latents8-steps1200": [*NANO, *STEPS[1200], "--own-details", "--latents"]},
    "recorded": {"nano-recorded-steps1200": [*NANO, *STEPS[1200], "--mel-codebooks", "0"]},
    "double": {"nano-steps2400": [*NANO, *STEPS[2400]], "nano-gpt-steps2400": [*NANO_GPT, *STEPS[2400]],
               "nano-codes8-steps2400": [*NANO_GPT, *STEPS[2400], *CODES8],
               "nano-latents8-steps2400": [*NANO, *STEPS[2400], "--latents"]},
    "context": {f"{name}-context{n}": [*options, "--context", str(n), "--batch-size", str(4096 // n)]
                for n in (64, 128, 512) for name, options in TRIO.items()},
    "short": {f"{name}-context32{suffix}": [*options, "--context", "32", "--batch-size", "128", *stretch]
              for suffix, stretch in (("", []), ("-stretch256", ["--stretch", "256"]))
              for name, options in TRIO.items()},
    "codec": {f"{name}-{first}": [*options, "--codec", codec] for first, codec in REFITTED.items()
              if "decoder" not in first for name, options in (("coarse", COARSE), ("coarse-gpt", GPT))},
    "decoder": {f"{name}-{first}": [*options, "--codec", REFITTED[first]] for first in ("hann-decoder", "late-decoder")
                for name, options in (("coarse-heard", HEARD), ("coarse-gpt", GPT))},
    "paper": {**{name: ["--model", name, *PAPER] for name in SIZES},
              "hybrid-heard": ["--model", "hybrid", *PAPER, "--mel-codebooks", "8"]},
    "scale": {**{f"{name}-steps1200": ["--model", name, *SCALE] for name in SIZES},
              "hybrid-heard-steps1200": ["--model", "hybrid", *SCALE, "--mel-codebooks", "8"],
              **{f"{name}-late-steps1200": ["--model", name, *SCALE, "--codec", REFITTED["late"]]
                 for name in ("hybrid", "gpt-m")}}}
MODELS = {model: options for models in EXPERIMENTS.values() for model, options in models.items()}
SEVERAL_SEEDS = ("gap", "window", "streams", "frames", "delay", "mix", "twice", "dropout", "longer", "shipped",
                 "codes8", "own", "details", "vectors", "double", "short", "codec", "decoder", "paper", "scale")
LEARNING_RATES = ("3e-3", "6e-3", "1.2e-2", "2.4e-2")
PAPER_RATES = ("1.5e-3", "3e-3", "6e-3")
TRAIN = [sys.executable, str(ROOT / "train.py")]
ONE_THREAD = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})       # as runs go side by side


def twin(model):
    """The token-only model that is otherwise the same or, failing that, the plain one for as many codes of that codec.

    nano-noise-steps600 -> nano-gpt-steps600, coarse-both8 -> coarse-gpt, coarse-late-cut192 -> coarse-gpt-late"""
    kind = model.split("-")[0]                                # coarse or nano
    name = re.sub(r"-(heard|noise|mix|own|recorded|codes|both|latents)\d*", "", model).replace(kind, f"{kind}-gpt", 1)
    return name if name in MODELS else f"{kind}-gpt" + "-late" * ("-late-" in model)


# the models that a gain is measured against
TWINS = {f"hybrid{mel}{steps}": [f"{gpt}{steps}" for gpt in ("gpt-m", "gpt-s", "gpt-l")]
         for mel in ("", "-heard") for steps in ("", "-steps1200")}
TWINS["hybrid-late-steps1200"] = ["gpt-m-late-steps1200"]
TWINS |= {model: [twin(model)] for model in MODELS if "gpt" not in model and model not in TWINS}


def machine(threads=1, device="cpu"):
    """The processor and the threads that a run gets, or the GPU, in words."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cpu)
    return f"{cpu}, {threads} thread{'s' * (threads > 1)}"


def commit():
    """The commit of the code as it is here, "-dirty" if no commit has it; "unknown" without git or its folder."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = "-dirty" if git("status", "--porcelain", "--", "*.py", "assets") else ""
        return git("describe", "--always") + changed or "unknown"
    except FileNotFoundError:
        return "unknown"


def label(dataset):
    """A dataset's short name; for a folder its last two parts, so that no other `speech` passes for the bundled one."""
    return dataset if dataset in (*BUNDLED, *CORPORA) else "-".join(Path(dataset).expanduser().resolve().parts[1:][-2:])


def read(path):
    """A run's result, or None if there is none or it was made with another `mini` or other options than now."""
    result = json.loads(path.read_text()) if path.exists() else {}
    # a refitted codec has its own checksum; its file name, among the options, tells that it comes from this `mini`
    if result.get("codec_checksum") == MINI_SHA256[:16] or "--codec" in MODELS.get(result.get("model"), ()):
        options = [*MODELS[result["model"]], "--lr", result["lr"], "--seed", str(result["seed"])]
        return result if " ".join(options) in result["command"] else None


def write(path, content):
    """JSON that reads well in a diff: one key a line, a list on one line."""
    text = json.dumps(content, indent=1)
    write_whole(path, (re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n").encode())


def files_of(dataset, model, lr, seed):
    """A run's result and its checkpoint: two paths."""
    name = f"{label(dataset)}-{model}-lr{lr}-seed{seed}"
    return RESULTS / f"{name}.json", RUNS / f"{name}.pt"


def run(dataset, model, lr, seed, device="cpu"):
    """Train, unless a result exists; return it: the best evaluation and what it was made with."""
    file, out = files_of(dataset, model, lr, seed)
    if found := read(file):
        return found
    for first, codec in REFITTED.items():
        if codec in MODELS[model] and not (ROOT / codec).exists():
            raise RuntimeError(f"no {codec}: make it with python notebooks/refit_codec.py {first}")
    place = dataset if dataset == label(dataset) else str(Path(dataset).expanduser().resolve())
    options = ["--dataset", place, *MODELS[model], "--lr", lr, "--seed", str(seed), "--device", device]
    if dataset in CORPORA and "--codec" not in MODELS[model]:
        options += ["--codec", "mini"]                        # not their own default: all results are of one codec
    if device != "cpu" and "--compile" not in options:        # compiling takes longer than most runs
        options += ["--no-compile", *([] if "--dtype" in options else ["--dtype", "float32"])]
    again = ["--resume"] if out.with_suffix(".last.pt").exists() else ["--overwrite"]
    made_by = out.with_suffix(".commits")                     # an interrupted run may have used several
    commits = [commit(), *(made_by.read_text().split() if again == ["--resume"] and made_by.exists() else ())]
    write_whole(made_by, " ".join(dict.fromkeys(commits)).encode())
    output = out.with_suffix(".txt")
    with open(output, "a") as stream:
        done = subprocess.run([*TRAIN, *options, *again, "--out", str(out)], stdout=stream, stderr=stream, **ONE_THREAD)
    last = (output.read_text().strip().splitlines() or ["no word"])[-1]
    if done.returncode and "no longer finite" not in last:            # a diverged run counts, too
        raise RuntimeError(f"run {file.stem} failed: {last.removeprefix('error: ')} (all of it: {output})")
    log = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    evaluations = [entry for entry in log if "val_nll" in entry]
    best = min(evaluations, key=lambda e: e["val_nll"])
    clips = {key: best.pop(key) for key in ("clip_nll", "clip_targets")}
    command = "python train.py " + " ".join(options).replace(place, dataset)
    content = {"command": command, "dataset": label(dataset), "model": model, "lr": lr, "seed": seed,
               "codec": options[options.index("--codec") + 1] if "--codec" in options else "mini",
               "codec_checksum": log[0]["codec_checksum"],
               "best": best, "seconds": evaluations[-1]["seconds"],
               "curve": [[e["step"], round(e["val_nll"], 4)] for e in evaluations],
               "machine": machine(device=device), "dtype": log[0]["args"]["dtype"], "torch": log[0]["torch"],
               "commit": made_by.read_text(), "scores": {trained_on(model): {"val_nll": best["val_nll"], **clips}}}
    write(file, content)
    out.with_suffix(".last.pt").unlink()                      # nothing is left to continue
    return content


def score(dataset, model, lr, seed, device="cpu"):
    """Add to the result of a hybrid of `gap` or `mix` its scores, clip by clip, with those mels that it was not trained
    on, of the original ("0"), of 1 and of 8 codebooks."""
    file, out = files_of(dataset, model, lr, seed)
    content = json.loads(file.read_text())
    if model in {**EXPERIMENTS["gap"], **EXPERIMENTS["mix"]}.keys() & TWINS.keys() and out.exists():
        for shown in sorted({"0", "1", "8"} - content["scores"].keys()):
            done = subprocess.run([*TRAIN, "--eval", str(out), "--mel-codebooks", shown, "--device", device,
                                   "--dtype", "float32"], stdout=subprocess.PIPE, check=True, **ONE_THREAD)
            figures = json.loads(done.stdout)
            content["scores"][shown] = {key: figures[key] for key in ("val_nll", "clip_nll", "clip_targets")}
            write(file, content)


def trained_on(model):
    """The number of codebooks whose mel a model is trained on; "0" for the original's and for token-only twins."""
    options = MODELS[model]
    if "--mel-codebooks" in options:
        return options[options.index("--mel-codebooks") + 1]
    return "8" if model in TWINS and "--n-codebooks" not in options else "0"             # train.py's default


def bootstrap(gains, weights, draws=1000):
    """Mean gain over all targets and its 95 % interval: gains (seeds, clips) in nats, weights (clips,) in targets."""
    gains, weights = np.mean(gains, axis=0), np.array(weights)
    mean = lambda picked: (gains[picked] * weights[picked]).sum(-1) / weights[picked].sum(-1)
    rng = np.random.default_rng(0)
    low, high = np.quantile(mean(rng.integers(len(gains), size=(draws, len(gains)))), (0.025, 0.975))
    return mean(np.arange(len(gains))), low, high


def table(datasets):
    """Two markdown tables from results/: each model at its learning rate, and each hybrid's gain over its twin.
    (`coarse-codes8` and `nano-codes8` are listed with a mel, but read none.)"""
    models = ["| dataset | model | parameters | lr | val NLL by seed | mean ± sd | perplexity | accuracy | unigram | "
              "whole frames |", "|---|---|---|---|---|---|---|---|---|---|"]
    gains = ["| dataset | gain of | over | shown the mel (or vectors) of | by seed | mean | 95 % interval |",
             "|---|---|---|---|---|---|---|"]
    made = set()
    for dataset in map(label, datasets):
        runs = {model: found for model in MODELS if (found := best_runs(dataset, model))}
        for model, found in runs.items():
            made |= {(r["codec"], r["codec_checksum"], r["machine"], r["dtype"], r["torch"]) for r in found}
            nll = [r["best"]["val_nll"] for r in found]
            average = lambda key: statistics.mean(r["best"][key] for r in found)
            spread = f" ± {statistics.stdev(nll):.3f}" if len(nll) > 1 else ""
            frames = f"{frame_nll(found):.2f}" if found[0]["best"].get("val_nll_finer") else ""
            models.append(f"| {dataset} | `{model}` | {found[0]['best']['n_params']:,} | {found[0]['lr']} | "
                          f"{' '.join(f'{n:.3f}' for n in nll)} | {average('val_nll'):.3f}{spread} | "
                          f"{average('val_ppl'):.1f} | {100 * average('val_acc'):.1f} % | "
                          f"{average('unigram_nll'):.3f} | {frames} |")
        for model, other in ((model, other) for model, others in TWINS.items() for other in others):
            for shown, name in (("0", "the original"), ("8", "8 codebooks"), ("4", "4 codebooks"),
                                ("2", "2 codebooks"), ("1", "1 codebook")):
                if found := gain(runs.get(model, []), runs.get(other, []), shown):
                    by_seed, mean, low, high = found
                    seeds = " ".join(f"{g:+.3f}" for g in by_seed)
                    rate, twins = runs[model][0]["lr"], runs[other][0]["lr"]
                    unequal = f" (lr {rate} against {twins})" if rate != twins else ""
                    gains.append(f"| {dataset} | `{model}` | `{other}`{unequal} | {name} | {seeds} | {mean:+.3f} | "
                                 f"{low:+.3f} to {high:+.3f} |")
    return "\n".join([*models, "", *gains, "", *(f"Codec {c} ({checksum}), {where}, {dtype}, torch {version}."
                                                for c, checksum, where, dtype, version in sorted(made))])


def best_runs(dataset, model):
    """The results of one model, by seed, at the rate chosen for it: of the rates with most seeds the best."""
    found = [result for p in RESULTS.glob(f"{dataset}-{model}-lr*.json") if (result := read(p))]
    by_rate = [sorted((r for r in found if r["lr"] == lr), key=lambda r: r["seed"]) for lr in {r["lr"] for r in found}]
    return max(by_rate, key=lambda runs: (len(runs), -runs[0]["best"]["val_nll"]), default=[])


def frame_nll(runs):
    """Mean NLL of whole frames over several results, in nats: of the coarse code and of the finer ones, summed."""
    return statistics.mean(r["best"]["val_nll"] + sum(r["best"]["val_nll_finer"]) for r in runs)


Gain = namedtuple("Gain", "by_seed mean low high")            # in nats; low and high: the interval


def gain(runs, twins, shown="0"):
    """The `Gain` of runs over their twins with the same seeds and codes, or None without scores.

    shown: the mel that the hybrid is given, as in `trained_on`; twins get what they were trained on."""
    of = lambda run: (run["seed"], run["codec_checksum"])
    twins = {of(b): b["scores"][trained_on(b["model"])] for b in twins if "scores" in b}
    pairs = [(a["scores"][shown], twins[of(a)]) for a in runs if shown in a.get("scores", ()) and of(a) in twins]
    if pairs:
        by_clip = [np.subtract(b["clip_nll"], a["clip_nll"]) for a, b in pairs]
        return Gain([b["val_nll"] - a["val_nll"] for a, b in pairs], *bootstrap(by_clip, pairs[0][1]["clip_targets"]))


def choose_rates(questions, dataset, device, pool):
    """{model: its learning rate} for those that may choose one, by validation NLL on a dataset with seed 0."""
    tried = [(model, lr) for lr in PAPER_RATES for question in ("paper", "scale") if question in questions
             for model in EXPERIMENTS[question] if "-heard" not in model and "-late" not in model]
    small = ["coarse", "coarse-gpt"] if {*questions} - {"paper", "scale"} else []
    if {*questions} & {"streams", "frames", "codes8", "double"}:  # other inputs
        small += ["coarse-codes8", "coarse-both8"]
    tried += [(model, lr) for lr in LEARNING_RATES for model in small]
    found = list(pool.map(lambda pair: run(dataset, *pair, 0, device)["best"]["val_nll"], tried))
    nll = dict(zip(tried, found))
    return dict(sorted(tried, key=nll.get, reverse=True))     # each model keeps its last rate, of the lowest NLL


def rate_of(model, chosen):
    """The learning rate that a model has chosen, or that of the model it is a variant of, or of its kind; lower if
    wider."""
    variant_of = model.replace("-heard", "").replace("-late", "")
    small = re.sub(r"-steps\d+", "", variant_of).replace("nano", "coarse")
    kind = MODELS[model][1].replace("nano", "coarse")         # the preset
    lr = next(chosen[name] for name in (model, variant_of, small, kind) if name in chosen)
    width = re.search(r"width(\d+)", model)
    return f"{float(lr) * PRESETS['nano'].n_embd / int(width[1]):g}" if width else lr


def main():
    parser = argparse.ArgumentParser(description="Compare hybrids with token-only models of their size.")
    parser.add_argument("datasets", nargs="+", help="speech, music, another that train.py knows by name, or folders")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=["gap"], metavar="QUESTION",
                        help=f"{', '.join(EXPERIMENTS)} (default: gap)")
    parser.add_argument("--search", metavar="DATASET", help="to choose learning rates on (default: the first)")
    parser.add_argument("--lr", metavar="RATE", help="one learning rate for every model, instead of choosing")
    parser.add_argument("--seeds", type=int, default=3, help=f"how many in {', '.join(SEVERAL_SEEDS)} (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: one thread a run (default: cpu)")
    parser.add_argument("--table", action="store_true", help="run nothing, only print tables of the results")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if not args.table:
        for folder in (RESULTS, RUNS):
            folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            chosen = {} if args.lr else choose_rates(args.only, args.search or args.datasets[0], args.device, pool)
            runs = [(dataset, model, args.lr or rate_of(model, chosen), seed, args.device)
                    for question in args.only for model in EXPERIMENTS[question]
                    for seed in range(args.seeds if question in SEVERAL_SEEDS else 1) for dataset in args.datasets]
            list(pool.map(lambda r: (run(*r), score(*r)), dict.fromkeys(runs)))
    print(table(args.datasets))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
