"""
measure_codec.py: how good a codec is, in tables like those of assets/README.md.

    pip install pystoi pesq && apt install opus-tools        # needed here and nowhere else in the project
    python assets/measure_codec.py --data assets/speech assets/music FOLDER --music assets/music

Clips the codec was not trained on (train_codec.py's rule, `data.split_clips`) go through 1, 2, 4 and 8 codebooks and,
for comparison, Opus at 6 kbit/s, the rate of 8 codebooks. For every clip:

    mel distance   mean |difference| of log-mels (mel.py's, but the usual Hann window), in nats; lower is better
    SI-SDR         scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 1811.02508): the waveform itself
    STOI           short-time objective intelligibility, 0 to 1 (Taal et al. 2011), speech only; `mini` was trained for
                   a relative of it
    ESTOI          extended STOI (Jensen and Taal, 2016), which nobody was trained for, 0 to 1, speech only
    PESQ           wide-band at 16 kHz, 1.0 to 4.6 (ITU-T P.862.2), speech only

and over all clips of a folder each codebook's perplexity: exp(entropy) of its codes, 1024 if all are equally frequent.
The last line is the cost: time to encode and decode one minute and to decode one frame in a stream, memory.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from data import DataError
from mel import HANN, HOP, SAMPLE_RATE, log_mel
from tokens import CodecError, load_codec
from train_codec import load, perplexity

try:
    from pesq import pesq
    from pystoi import stoi
except ImportError as error:
    sys.exit(f"error: {error}; this script alone needs them: pip install pystoi pesq")

COUNTS = (1, 2, 4, 8)


def opus(wave):
    """(N,) float32 -> the same clip through Opus at a constant 6 kbit/s, (N,)."""
    with tempfile.TemporaryDirectory() as folder:
        original, coded, decoded = (f"{folder}/{name}" for name in ("in.wav", "clip.opus", "out.wav"))
        soundfile.write(original, wave, SAMPLE_RATE)
        try:
            subprocess.run(["opusenc", "--quiet", "--bitrate", "6", "--hard-cbr", original, coded], check=True)
            subprocess.run(["opusdec", "--quiet", "--rate", str(SAMPLE_RATE), "--no-dither", coded, decoded],
                           check=True, stderr=subprocess.DEVNULL)
        except FileNotFoundError as error:
            sys.exit(f"error: {error.filename} not found; it comes with opus-tools (apt install opus-tools)")
        out, _ = soundfile.read(decoded, dtype="float32")
    return np.pad(out, (0, max(0, len(wave) - len(out))))[:len(wave)]


def si_sdr(out, wave):
    """Scale-invariant SDR in dB of out (N,) against wave (N,), both without their mean."""
    out, wave = out - out.mean(), wave - wave.mean()
    target = wave * (out @ wave / (wave @ wave))
    return 10 * np.log10(target @ target / ((out - target) @ (out - target)))


def compare(out, wave, speech):
    """All measures of one clip, out and wave (N,) float32 -> dict."""
    mels = [log_mel(torch.from_numpy(w), window=HANN) for w in (out, wave)]
    row = {"mel distance": (mels[0] - mels[1]).abs().mean().item(), "SI-SDR": si_sdr(out, wave)}
    if speech:
        row["STOI"] = stoi(wave, out, SAMPLE_RATE)
        row["ESTOI"] = stoi(wave, out, SAMPLE_RATE, extended=True)
        row["PESQ"] = pesq(16_000, *(soxr.resample(w, SAMPLE_RATE, 16_000) for w in (wave, out)), "wb")
    return row


def measure(codec, waves, speech):
    """Clips, (N,) float32 each -> {"Opus": row, "1": row, ...} with the mean over clips, and codebook perplexities."""
    rows, codes = {"Opus": []} | {str(k): [] for k in COUNTS}, []
    for wave in waves:
        rows["Opus"].append(compare(opus(wave), wave, speech))
        codes.append(codec.encode(torch.from_numpy(wave)[None]))
        for k in COUNTS:
            rows[str(k)].append(compare(codec.decode(codes[-1][:, :k])[0].numpy(), wave, speech))
    means = {name: {key: float(np.mean([clip[key] for clip in clips])) for key in clips[0]}
             for name, clips in rows.items()}
    return means, [perplexity(c) for c in torch.cat(codes, dim=-1)[0]]


def cost(codec):
    """Seconds to encode and to decode one minute, and milliseconds per frame of streaming decoding."""
    wave = torch.randn(1, 60 * SAMPLE_RATE) * 0.1
    start = time.perf_counter()
    codes = codec.encode(wave)
    middle = time.perf_counter()
    codec.decode(codes)
    end = time.perf_counter()
    decoder, frames = codec.stream_decoder(), codes[..., :300].split(1, dim=-1)
    for frame in frames[:50]:                                 # the first ones are slower
        decoder.push(frame)
    begin = time.perf_counter()
    for frame in frames[50:]:
        decoder.push(frame)
    return {"encode 1 min, s": middle - start, "decode 1 min, s": end - middle,
            "stream, ms/frame": (time.perf_counter() - begin) / 250 * 1000,
            "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}         # Linux counts in kB


def main():
    parser = argparse.ArgumentParser(description="Measure a codec on held-out clips.")
    parser.add_argument("--codec", default="mini", help="mini, encodec, or a file of train_codec.py")
    parser.add_argument("--codec-dir", help="folder with EnCodec's weights")
    parser.add_argument("--data", nargs="+", default=["assets/speech", "assets/music"], help="folders of audio")
    parser.add_argument("--music", nargs="*", default=["assets/music"], help="those of --data that are not speech")
    parser.add_argument("--clips", type=int, default=40, help="at most this many of each folder, evenly spread")
    parser.add_argument("--seconds", type=float, default=10, help="at most this much of each clip")
    args = parser.parse_args()
    if args.clips < 1 or not args.seconds * SAMPLE_RATE >= HOP:
        parser.error("--clips must be at least 1, --seconds at least one frame")
    warnings.filterwarnings("ignore", module="pystoi")
    music = {Path(folder).resolve() for folder in args.music}

    codec = load_codec(args.codec, folder=args.codec_dir)
    timing = cost(codec)
    _, held_out = load(args.data)
    for folder, waves in zip(args.data, held_out):
        pick = np.linspace(0, len(waves) - 1, min(args.clips, len(waves))).round().astype(int)
        waves = [waves[i][:int(args.seconds * SAMPLE_RATE)] for i in pick]
        waves = [w[:len(w) // HOP * HOP].astype(np.float32) / 32768 for w in waves]
        means, usage = measure(codec, waves, Path(folder).resolve() not in music)
        print(f"\n{folder}, {len(waves)} clips, {sum(map(len, waves)) / SAMPLE_RATE:.0f} seconds\n")
        names = list(means["Opus"])
        print(f"| | kbit/s | {' | '.join(names)} | perplexity of codebooks |\n|---|---|{'---|' * len(names)}---|")
        for row, figures in means.items():
            label = "Opus | 6" if row == "Opus" else f"{row} codebook{'s' * (row != '1')} | {0.75 * int(row):g}"
            used = "" if row == "Opus" else " ".join(f"{p:.0f}" for p in usage[:int(row)])
            print(f"| {label} | {' | '.join(f'{figures[n]:.3f}' for n in names)} | {used} |", flush=True)
    print(f"\n{json.dumps({k: round(v, 2) for k, v in timing.items()})}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    try:
        main()
    except (CodecError, DataError) as error:
        sys.exit(f"error: {error}")
