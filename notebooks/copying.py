"""
copying.py: does a model play back pieces of what it was trained on?

    python notebooks/copying.py corpora/large/music assets/nano-music.pt assets/nano-gpt-music.pt

For every generated clip: the longest run of coarse codes that some training clip holds, too. A code that is repeated (a
pause, a sustained note) counts once, or silences would be the longest. Real clips of the validation split, which no
model has been trained on, show how long such runs are by chance. Only playback code by code is found, not near copies:
to show that, some training clips are encoded again, half a frame later. DATASET is the one that the checkpoints were
trained on, or this says nothing. Prints a table and writes results/copying-DATASET.json.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from closeness import LAG, load_all, parse_arguments, recordings
from data import MEL_OPTIONS, DataError, prepare
from experiments import commit, machine, write
from mel import FRAME_RATE, HOP
from model import CheckpointError
from sample import generate
from tokens import CodecError


def without_repeats(codes):
    """(n,) -> (m,), m <= n: of neighbouring equal codes one."""
    return codes[np.append(True, codes[1:] != codes[:-1])]


def longest_shared(clips, training):
    """For each clip, codes (n,), the length of its longest run that occurs in one of the `training` clips."""
    longest = np.zeros(len(clips), int)
    for n in itertools.count(1):
        runs = lambda clip: (clip[i:i + n].tobytes() for i in range(len(clip) - n + 1))
        known = {run for clip in training for run in runs(clip)}
        found = [any(run in known for run in runs(clip)) for clip in clips]
        if not any(found):
            return longest.tolist()
        longest[found] = n


def main():
    parser = argparse.ArgumentParser(description="The longest runs of codes that generated and training clips share.")
    args = parse_arguments(parser, "copying")
    models, codec = load_all(args.checkpoints)
    checkpoint = models[args.checkpoints[0]][2]               # any would do: the codes do not depend on the mel
    data = prepare(args.dataset, codec, **{name: checkpoint[name] for name in MEL_OPTIONS})
    if checkpoint.get("audio") != data.fingerprint:
        print(f"note: {args.checkpoints[0]} was trained on other audio than {args.dataset} holds", file=sys.stderr)
    coarse = data.codes[:, 0]
    training = [without_repeats(coarse[start:end]) for start, end in data.train]
    n_frames, made_by, rows = round(args.seconds * FRAME_RATE), commit(), []

    def compare(what, clips):
        runs = longest_shared([without_repeats(np.asarray(clip, coarse.dtype)) for clip in clips], training)
        rows.append({"what": what, "mean": round(np.mean(runs), 2), "longest": runs})
        print(f"| {what} | {np.mean(runs):.2f} | {max(runs)} |", flush=True)

    print("| longest run of codes shared with a training clip | mean over clips | longest |\n|---|---|---|")
    compare("validation clips", [coarse[start:end][:n_frames] for start, end in data.val])
    waves, _ = recordings(args.dataset, args.seconds)         # training clips
    if not waves:
        raise DataError(f"{args.dataset}: wants a training clip of more than {2 * LAG} frames")
    some = waves[::max(1, len(waves) // args.clips)][:args.clips]
    compare("training clips, half a frame later", [codec.encode(wave[None, HOP // 2:], 1)[0, 0] for wave in some])
    for path, (model, _, _) in models.items():
        frames = generate(model, codec, n_frames, args.clips, generator=torch.Generator().manual_seed(0))
        compare(Path(path).stem, torch.cat([codes[:, 0] for codes, _ in frames], dim=1))         # (clips, n_frames)
    write(args.out, {"command": f"python notebooks/copying.py {' '.join(sys.argv[1:])}", "codec": codec.name,
                     "codec_checksum": codec.checksum, "seconds": args.seconds, "seed": 0, "temperature": 1.0,
                     "machine": machine(torch.get_num_threads()), "torch": torch.__version__, "commit": made_by,
                     "rows": rows})


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, CodecError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
