"""
closeness.py: is what a model generates distributed like real audio?

    python notebooks/closeness.py speech assets/nano-speech.pt assets/nano-gpt-speech.pt --out mine.json
    python notebooks/closeness.py music assets/nano-music.pt assets/nano-gpt-music.pt --out mine.json

Each checkpoint generates clips without a prompt; each frame becomes a vector of 160 numbers: a log-mel frame and how
much it changes within the next 1/15 s. Two sets of clips are compared by the Fréchet distance (squared, as in FID),

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))      m mean, C covariance, in nats squared

between two Gaussians with the means and covariances of their vectors (Dowson and Landau, 1982); no neural network is
involved. The distance depends on timbre, loudness, pauses and pace, not on words or melodies. Every set is compared
with the validation clips (their first --seconds) and with the codec's copy of these, which is all that a model of codes
can know of them; with the copy also after all that is far below its loudest spot, by 12 nats or more, or 8 (52 or 35
dB), has been raised to that level, as logarithms make as much of a faint hiss as of a note. For scale, so are the
training clips, their decoded copy, and as many of these as a model generates; no model should be expected to come
closer.
Generated sets are also measured with only their coarse codes decoded, and drawn again with other seeds, to show how far
chance moves a figure. How much the choice of the validation clips matters is shown by drawing these with replacement a
hundred times, the same ones for every model; the file keeps the distances (`..._draws`, means over the sets). Prints a
table and writes a file, by default results/closeness-DATASET.json.
"""
import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import DataError, find_audio, read_blocks, split_clips
from experiments import RESULTS, commit, label, machine, write
from mel import FRAME_RATE, HANN, HOP, SAMPLE_RATE, log_mel
from model import CheckpointError
from sample import generate, load
from tokens import CodecError

LAG = FRAME_RATE // 15               # frames: 1/15 s
QUIET = (12, 8)                      # nats
DRAWS = 100                          # of the validation clips


def sums(waves, floor=-torch.inf):
    """Clips, (N,) each -> for each clip the number of its vectors, their sum (160,), and that of their products with
    themselves (160, 160), float64. floor: quieter spots of the log-mel are raised to that level."""
    parts = []
    for wave in waves:
        mel = log_mel(wave, window=HANN).double().clamp(min=floor)               # (T, 80)
        vectors = torch.cat([mel[:-LAG], mel[LAG:] - mel[:-LAG]], dim=1)
        parts.append((len(vectors), vectors.sum(0), vectors.T @ vectors))
    return parts


def statistics(parts):
    """`sums` of some clips -> mean (160,) and covariance (160, 160) over all their frames."""
    n, total, products = (sum(of_clips) for of_clips in zip(*parts))
    mean = total / n
    return mean, (products - n * mean[:, None] * mean) / (n - 1)


def frechet(a, b):
    """Squared Fréchet distance between two Gaussians, (mean, covariance) each."""
    (m1, c1), (m2, c2) = a, b
    # the eigenvalues of a product of two covariances are real and not negative, up to rounding
    root = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    return max(0.0, ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root).item())


def recordings(dataset, seconds):
    """The first `seconds` of every clip -> training waves and validation waves, (N,) each."""
    folder, names = find_audio(dataset)
    waves, splits = {}, ([], [])
    for name in names:
        with contextlib.suppress(DataError):                                     # `prepare` has named and skipped it
            waves[name] = torch.from_numpy(next(read_blocks(folder / name, int(seconds * SAMPLE_RATE))))
    for (name, wave), is_val in zip(waves.items(), split_clips(list(waves), dataset)):
        if len(wave) > 2 * LAG * HOP:
            splits[is_val].append(wave)
    return splits


def load_all(paths):
    """Checkpoints of train.py -> {path: (model, codec, checkpoint)} and their codec; CodecError if not the same."""
    models = {path: load(path) for path in paths}
    codec = models[paths[0]][1]
    if any(other.checksum != codec.checksum for _, other, _ in models.values()):
        raise CodecError("the checkpoints were trained on codes of different codecs: compare those of one at a time")
    return models, codec


def parse_arguments(parser, name):
    """What closeness.py and copying.py have in common: dataset, checkpoints, --clips, --seconds, --out."""
    parser.add_argument("dataset", help="speech, music, or a folder: what the checkpoints were trained on")
    parser.add_argument("checkpoints", nargs="+", help="written by train.py")
    parser.add_argument("--clips", type=int, default=32, help="clips from each checkpoint (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="length of every clip (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: results/{name}-DATASET.json)")
    args = parser.parse_args()
    if args.clips < 1 or not 2 * LAG < args.seconds * FRAME_RATE < 1e6:
        parser.error("--clips must be at least 1, --seconds more than a few frames")
    args.out = args.out or RESULTS / f"{name}-{label(args.dataset)}.json"
    if args.out.is_dir() or not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: not a file in an existing folder")
    return args


def pair(text):
    """Two temperatures like 1:0.5."""
    try:
        coarse, finer = map(float, text.split(":"))
    except ValueError:
        coarse = finer = -1
    if not (coarse >= 0 and finer >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not two temperatures of 0 or more, like 1:0.5")
    return coarse, finer


def main():
    parser = argparse.ArgumentParser(description="Fréchet distance of generated to validation audio, over log-mel.")
    parser.add_argument("--temperature", nargs="+", type=pair, default=[(0.8, 0.8), (1, 1), (1, 0.5)], metavar="T:F",
                        help="of the coarse and of the finer codes (default: 0.8:0.8 1:1 1:0.5)")
    parser.add_argument("--top-p", type=float, help="as in sample.py (default: off)")
    parser.add_argument("--seeds", type=int, default=3, help="sets of clips, from seed 0 on (default: %(default)s)")
    args = parse_arguments(parser, "closeness")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-p must be in (0, 1]")
    models, codec = load_all(args.checkpoints)
    train, val = recordings(args.dataset, args.seconds)
    if not (train and val):
        raise DataError(f"{args.dataset}: wants a clip of more than {2 * LAG} frames in each split")
    copy = lambda waves, k: [codec.decode(codec.encode(wave[None], k))[0] for wave in waves]
    made_by = commit()
    val_copy = copy(val, codec.n_codebooks)
    loudest = max(log_mel(wave, window=HANN).max() for wave in val_copy)
    rng = np.random.default_rng(0)
    draws = [range(len(val)), *(rng.integers(len(val), size=len(val)) for _ in range(DRAWS))]
    references, rows = {}, []
    for name, clips, floor in (("distance", val, -torch.inf), ("from_copy", val_copy, -torch.inf),
                               *((f"from_copy_{n}", val_copy, loudest - n) for n in QUIET)):
        parts = sums(clips, floor)
        references[name] = floor, [statistics([parts[i] for i in picked]) for picked in draws]

    def compare(name, sets, **facts):
        row, cells = {"what": name}, [name]
        for reference, (floor, (real, *drawn)) in references.items():
            made = [statistics(sums(waves, floor)) for waves in sets]
            by_seed = [round(frechet(one, real), 2) for one in made]
            row |= {reference: round(np.mean(by_seed), 2), f"{reference}_by_seed": by_seed}
            if facts:                                         # of a checkpoint
                row[f"{reference}_draws"] = [round(np.mean([frechet(x, other) for x in made]), 1) for other in drawn]
            cells.append(f"{np.mean(by_seed):.2f} ({' '.join(f'{d:.2f}' for d in by_seed)})")
        rows.append(row | facts)
        print(f"| {' | '.join(cells)} |", flush=True)

    print(f"| {args.dataset}: distance (by seed) | from {len(val)} validation clips | from the codec's copy of them | "
          + " | ".join(f"what is {n} nats below the loudest, raised" for n in QUIET) + " |\n" + "|---" * 5 + "|")
    compare("training clips", [train])
    train_copy = copy(train, codec.n_codebooks)
    compare("training clips, decoded", [train_copy])
    some = [rng.permutation(len(train_copy))[:args.clips] for _ in range(12)]
    compare(f"{args.clips} training clips, decoded", [[train_copy[i] for i in picked] for picked in some])
    for k in (codec.n_codebooks, 1):
        compare(f"validation clips, {k} codebook{'s' * (k > 1)} decoded", [copy(val, k)])
    for path, (model, _, checkpoint) in models.items():
        for temperature, finer in args.temperature:
            sets = []
            for seed in range(args.seeds):
                generator = torch.Generator().manual_seed(seed)
                codes, waves = zip(*generate(model, codec, round(args.seconds * FRAME_RATE), args.clips,
                                             temperature=temperature, finer_temperature=finer, top_p=args.top_p,
                                             generator=generator))
                sets.append((torch.cat(codes, dim=-1), torch.cat(waves, dim=1)))
            name = f"{Path(path).stem}, temperature {temperature:g}, finer codes {finer:g}"
            name += f", top-p {args.top_p:g}" if args.top_p else ""
            facts = {"checkpoint": path, "preset": checkpoint.get("preset"), "val_nll": checkpoint.get("val_nll"),
                     "temperature": temperature, "finer_temperature": finer, "top_p": args.top_p}
            compare(name, [waves for _, waves in sets], n_codebooks=model.config.n_codebooks, **facts)
            if model.config.n_codebooks > 1:
                compare(f"{name}, only the coarse code decoded", [codec.decode(codes[:, :1]) for codes, _ in sets],
                        n_codebooks=1, **facts)
    command = f"python notebooks/closeness.py {' '.join(sys.argv[1:])}"
    write(args.out, {"command": command, "codec": codec.name, "codec_checksum": codec.checksum, "clips": args.clips,
                     "seconds": args.seconds, "seeds": args.seeds, "machine": machine(torch.get_num_threads()),
                     "torch": torch.__version__, "commit": made_by, "rows": rows})


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, CodecError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
