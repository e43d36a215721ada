"""
python tests/bench_speed.py                      two minutes on two cores; ratios, all from one run
python tests/bench_speed.py --device cuda --compile --dtype bfloat16 --models gpt-s hybrid gpt-l --batch-size 64

What does it cost? Each pair takes turns, and a ratio is the median over the turns: a machine that slows down slows both.

    training      a step of `gpt-s` against one of a nanoGPT-shaped model of the same width, depth and vocabulary (learned
                  positions, LayerNorm with gain, GELU, biases off, SDPA; written for this file), and `hybrid` against
                  `gpt-s`: batch x 512, forward + backward + AdamW
    spectrogram   `log_mel` of one minute against torch.stft and a matrix product, and against librosa if it is installed
    preparation   seconds of audio a second: encoding by a codec of EnCodec's shape; reading the bundled music and
                  making its `mini` codes and mel, on all cores or the GPU; and positions a second put into batches

With a GPU also the share of its peak that the model's arithmetic uses: 6 operations per parameter and token, embeddings
included, and for attention 12 per layer of the backbone, channel and position, nearly as nanoGPT counts (the default
--peak is that of an H100 or H200, bf16).
"""
import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import prepare
from mel import FLOOR, FRAME_RATE, HANN, HOP, N_FFT, N_MELS, SAMPLE_RATE, hann_window, log_mel, mel_filterbank
from model import CODEBOOK_SIZE, PRESETS, HybridGPT
from tokens import Codec, EncodecModel, load_codec


class NanoBlock(nn.Module):
    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for t in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Token embedding + learned positions, blocks, final LayerNorm, head tied to the embedding as in nanoGPT."""

    def __init__(self, d=256, n_layer=4, n_head=4, context=512):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CODEBOOK_SIZE + 1, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(NanoBlock(d, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d, bias=False)

    def forward(self, codes, mel, targets):
        x = self.tokens(codes[:, 0]) + self.positions(torch.arange(codes.shape[2], device=codes.device))
        for block in self.blocks:
            x = block(x)
        logits = self.ln_f(x) @ self.tokens.weight[:CODEBOOK_SIZE].T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def take_turns(functions, turns, device="cpu", calls=1):
    """{name: function} -> {name: seconds a call, of each turn}, after two turns that do not count.

    A turn is `calls` calls in a row, after `calls` - 1 that are not timed: a library's first calls after another's are
    slower, as the other's threads still wait for work, memory must be allocated again and threads find free cores.
    """
    seconds = {name: [] for name in functions}
    for turn in range(turns + 2):
        for name, function in functions.items():
            for call in range(1 - calls, calls):
                if call == 0:
                    if device == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: torch.tensor(s) for name, s in seconds.items()}


def ratio(times, a, b):
    return (times[a] / times[b]).median().item()


def bench_training(args):
    B, T = args.batch_size, 512
    codes = torch.randint(CODEBOOK_SIZE, (B, 1, T), device=args.device)
    targets = torch.randint(CODEBOOK_SIZE, (B, 1, T), device=args.device)
    mel = torch.randn(B, T, N_MELS, device=args.device)
    models = {"nanoGPT-shaped": NanoGPT()} | {name: HybridGPT(PRESETS[name]) for name in args.models}
    steps = {}
    for name, model in models.items():
        model.to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(model) if args.compile else model

        def step(forward=forward, optimizer=optimizer):
            with torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext():
                _, loss = forward(codes, mel, targets)
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps[name] = step
    times = take_turns(steps, args.turns, args.device)
    for name, t in times.items():
        n, rate = sum(p.numel() for p in models[name].parameters()), B * T / t.median().item()
        line = f"{name:15s} {n:>10,} parameters  {1000 * t.median():7.1f} ms a step  {rate:9,.0f} tokens/s"
        if args.device == "cuda" and name in PRESETS:
            c = PRESETS[name]
            line += f"  {rate * (6 * n + 12 * c.n_layer * c.n_embd * T) / args.peak:.1%} of the peak"
        print(line)
    if "gpt-s" in times:
        print(f"gpt-s tokens/s over nanoGPT-shaped: {ratio(times, 'nanoGPT-shaped', 'gpt-s'):.3f}")
        if "hybrid" in times:
            print(f"hybrid step over gpt-s step:        {ratio(times, 'hybrid', 'gpt-s'):.3f}")


def bench_spectrogram(args):
    wave = 0.1 * torch.randn(60 * SAMPLE_RATE, device=args.device)
    window, bank = hann_window(N_FFT).to(args.device), mel_filterbank().to(args.device)

    def stft():
        spectrum = torch.stft(F.pad(wave, (N_FFT - HOP, 0)), N_FFT, HOP, window=window, center=False, return_complex=True)
        return ((spectrum.real.square() + spectrum.imag.square()).T @ bank).clamp(min=FLOOR).log()
    assert torch.allclose(stft(), log_mel(wave, window=HANN), atol=1e-3)
    functions = {"log_mel": lambda: log_mel(wave, window=HANN), "torch.stft": stft}
    with contextlib.suppress(ImportError):
        import librosa
        samples = wave.cpu().numpy()
        functions["librosa"] = lambda: librosa.power_to_db(librosa.feature.melspectrogram(
            y=samples, sr=SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS))
    times = take_turns(functions, args.turns, args.device, calls=40)
    for name in list(functions)[1:]:
        print(f"log_mel over {name + ':':11} {ratio(times, name, 'log_mel'):5.2f} times as fast "
              f"({1000 * times['log_mel'].median():.1f} against {1000 * times[name].median():.1f} ms a minute of audio)")


def bench_preparation(args):
    large = Codec(EncodecModel.encodec_model_24khz(pretrained=False), "encodec's shape", "random weights", args.device)
    n_files, turns = (16, 5) if args.device == "cuda" else (8, 1)             # as many files as `prepare` takes
    wave = 0.1 * torch.randn(n_files, 10 * SAMPLE_RATE)
    times = take_turns({"encode": lambda: large.encode(wave)}, turns, args.device)
    rate = wave.numel() / SAMPLE_RATE / times["encode"].median().item()
    print(f"EnCodec's 14.9 M shape: {rate:6.1f} x real time, encoding alone, {n_files} files side by side, one process")
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        data = prepare("music", load_codec("mini", args.device), cache=Path(cache), quiet=True)
        seconds = len(data.codes) / FRAME_RATE
        rate = seconds / (time.perf_counter() - start)
        start = time.perf_counter()
        for step in range(20):
            data.batch(0, step, 64, 512)
        batches = 20 * 64 * 512 / (time.perf_counter() - start)
    print(f"preparation:            {rate:6.1f} x real time (codec mini, {seconds / 60:.0f} minutes)")
    print(f"batches of 64 x 512:    {batches:,.0f} positions/s, gathered by one core")


def main():
    parser = argparse.ArgumentParser(description="Time training, spectrogram and preparation.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--models", nargs="+", choices=[m for m in PRESETS if PRESETS[m].n_codebooks == 1],
                        default=["gpt-s", "hybrid"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8, help="turns that count (default: %(default)s)")
    parser.add_argument("--peak", type=float, default=989e12, help="GPU operations a second (default: %(default)g)")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, {'' if args.compile else 'not '}compiled")
    bench_training(args)
    bench_spectrogram(args)
    bench_preparation(args)


if __name__ == "__main__":
    main()
