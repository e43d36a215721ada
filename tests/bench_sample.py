"""
python tests/bench_sample.py                 untrained `nano`, codec mini; about a minute
python tests/bench_sample.py --device cuda --num 64          on a GPU, 64 streams side by side

Is sampling faster than real time, does it stay so, and what does caching save? Prints, from one run:

    real-time factor    seconds of audio per second, all streams together, everything included
    second 60 / 5       median time of a frame around second 60 over that around second 5: 1 means constant time
    recompute / stream  time for ten seconds if model, decoder and spectrogram run over the whole past for every frame,
                        over the time with caches (every tenth frame is timed; weights do not matter to either)
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from mel import FRAME_RATE, log_mel
from model import PRESETS, START, HybridGPT
from sample import draw, generate
from tokens import load_codec


@torch.no_grad()
def recompute(model, codec, codes, generator=None):
    """One frame of a sampler that remembers nothing: codes (B, K, t) so far -> (B, K, t + 1)."""
    B, K, t = codes.shape
    mel = torch.zeros(B, 1, model.config.n_mels, device=codes.device)
    if t:
        mel = torch.cat([mel, log_mel(codec.decode(codes))], dim=1)
    start = torch.zeros(B, K, 1, dtype=torch.long, device=codes.device)
    start[:, 0] = START
    x = model.backbone(torch.cat([start, codes], dim=-1), mel)[:, -1]             # (B, n_embd)
    chosen = draw(model.head(x), generator=generator)[:, None]
    while chosen.shape[1] < model.config.n_codebooks:
        finer = draw(model.finer_logits(x, chosen)[:, -1], generator=generator)
        chosen = torch.cat([chosen, finer[:, None]], dim=1)
    return torch.cat([codes, chosen[..., None]], dim=-1)


def main():
    parser = argparse.ArgumentParser(description="Time sampling.")
    parser.add_argument("--model", choices=PRESETS, default="nano")
    parser.add_argument("--num", type=int, default=1, help="streams side by side (default: 1)")
    parser.add_argument("--seconds", type=int, default=62, help="at least 10 (default: 62, which shows second 60)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, codec = HybridGPT(PRESETS[args.model]).to(args.device).eval(), load_codec("mini", args.device)

    codes, times, before = [], [], time.perf_counter()
    for frame, _ in generate(model, codec, args.seconds * FRAME_RATE, args.num):
        codes.append(frame)
        times.append(time.perf_counter() - before)
        before = time.perf_counter()
    codes, times = torch.cat(codes, dim=-1), torch.tensor(times)
    around = lambda second: times[(second - 1) * FRAME_RATE:(second + 1) * FRAME_RATE].median().item()
    print(f"{args.model}, {model.config.n_codebooks} codebooks, {args.num} stream(s), {args.device}, "
          f"{torch.get_num_threads()} threads: median {1000 * times.median():.2f} ms a frame")
    print(f"real-time factor    {args.num * args.seconds / times.sum():.2f}")
    if args.seconds > 61:
        print(f"second 60 / 5       {around(60) / around(5):.3f}   ({1000 * around(60):.2f} over "
              f"{1000 * around(5):.2f} ms)")

    timed = range(0, 10 * FRAME_RATE, 10)
    start = time.perf_counter()
    for t in timed:
        recompute(model, codec, codes[..., :t])
    recomputed = (time.perf_counter() - start) / len(timed) * 10 * FRAME_RATE
    streamed = times[:10 * FRAME_RATE].sum()
    print(f"recompute / stream  {recomputed / streamed:.1f}   (10 s of audio: {recomputed:.0f} over {streamed:.1f} s)")


if __name__ == "__main__":
    main()
