"""
train_codec.py: trains `mini`, the codec that ships with the project, and writes assets/mini.pt.

    python assets/train_codec.py --data assets/speech assets/music FOLDER --minutes 60
    python assets/train_codec.py --data ... --minutes 60 --resume          # after an interruption
    (then put the printed SHA-256 into tokens.py: MINI_SHA256)

An autoencoder (EnCodec's SEANet, small) with a residual vector quantiser between its halves, in two phases:

  1. the autoencoder alone, until its latents mean something; then each codebook is fitted by k-means to what the
     codebooks before it left over;
  2. everything together. The decoder sees the latents through 1, 2, 4 or 8 codebooks, another number for every clip
     of the batch, so that any number decodes; codebooks follow their latents by moving averages; the gradient passes
     straight through the quantiser, and a commitment term at *each* codebook pulls the residual towards its choice.

The loss is the distance between log-mel spectrograms at four window lengths (L1 + L2) plus the waveform's L1,
relative to the clip's level. Everything runs on one CPU or GPU; a clock, not a step count, sets the schedule.
Held-out clips (every folder's `val/`, else one file in fifty) are measured every few minutes.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from mel import SAMPLE_RATE, frame, mel_power
from tokens import CODEBOOK_SIZE, HOP, build_mini

SCALES = ((256, 32), (512, 64), (1024, 80), (2048, 128))      # (window in samples, mel bands) of the loss
COUNTS = torch.tensor([1, 2, 4, 8])                           # codebooks a clip of the batch may be decoded from
WARM_UP = 0.25                                                # part of the time before the quantiser comes in
DECAY = 0.99                                                  # of the codebooks' moving averages


# ----------------------------------------------------------------------------- data

def read(path):
    """One file as mono 24 kHz int16 (N,)."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    if rate != SAMPLE_RATE:
        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    return (np.clip(wave, -1, 1) * 32767).astype(np.int16)


def load(folders):
    """Folders of audio -> training audio and held-out audio: one list of (N,) int16 arrays per folder."""
    train, held_out = [], []
    for folder in folders:
        paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".ogg", ".wav", ".flac", ".mp3"))
        if not paths:
            sys.exit(f"error: no audio under {folder}")
        has_val = any(p.parent.name == "val" for p in paths)
        is_val = [p.parent.name == "val" if has_val else i % 50 == 25 for i, p in enumerate(paths)]
        with ThreadPoolExecutor() as pool:
            waves = list(pool.map(read, paths))
        train.append([w for w, v in zip(waves, is_val) if not v])
        held_out.append([w for w, v in zip(waves, is_val) if v])
        print(f"{folder}: {sum(map(len, train[-1])) / SAMPLE_RATE / 60:.1f} minutes to train on, "
              f"{len(held_out[-1])} clips held out")
    return train, held_out


def batch(train, rng, batch_size, n_samples):
    """Random crops, an equal share of every folder, with random level and polarity -> (B, n_samples) float32."""
    rows = []
    for i in range(batch_size):
        waves = train[rng.integers(len(train))]
        wave = waves[rng.integers(len(waves))]
        start = rng.integers(max(1, len(wave) - n_samples))
        crop = wave[start:start + n_samples].astype(np.float32) / 32768
        gain = 10 ** (rng.uniform(-12, 3) / 20) * rng.choice([-1, 1])
        rows.append(np.pad(crop, (0, n_samples - len(crop))) * gain)
    return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp(-1, 1)


@torch.no_grad()
def initialise(model, wave):
    """Scale every convolution so that its output has variance 1 on this batch, the last one so that it is as loud.

    PyTorch's default shrinks a signal at each of the twenty layers until nothing of the input reaches the output, and
    training starts with a long plateau. Source: data-dependent initialisation, Salimans & Kingma 2016 (1602.07868).
    """
    def rescale(conv, _, out):
        std = out.std() / (wave.std() if conv is last else 1)
        conv.weight_g /= std
        if conv.bias is not None:
            conv.bias /= std
        return out / std

    convolutions = [m for m in model.modules() if hasattr(m, "weight_g")]
    last = model.decoder.model[-1].conv.conv
    hooks = [conv.register_forward_hook(rescale) for conv in convolutions]
    model.decoder(model.encoder(wave[:, None]))
    for hook in hooks:
        hook.remove()


# ----------------------------------------------------------------------------- quantiser

def nearest(x, codebook):
    """Index of the closest codebook vector for each row: (n, C), (1024, C) -> (n,)."""
    return (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)      # |x|^2 is the same for every candidate


@torch.no_grad()
def fit_codebooks(quantizer, latents, rounds=12):
    """K-means, one codebook after the other, each on what the former left over. latents (n, C)."""
    residual = latents
    for layer in quantizer.vq.layers:
        book = layer._codebook
        centres = residual[torch.randperm(len(residual))[:CODEBOOK_SIZE]].clone()
        for _ in range(rounds):
            index = nearest(residual, centres)
            count = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
            total = torch.zeros_like(centres).index_add_(0, index, residual)
            centres = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), centres)
        book.embed.copy_(centres)
        book.cluster_size.copy_(count)
        book.embed_avg.copy_(centres * count[:, None])
        book.inited.fill_(1)
        residual = residual - centres[nearest(residual, centres)]
        print(f"  k-means: {residual.square().sum() / latents.square().sum():.3f} of the latents' energy left over")


def quantize(quantizer, latents, counts, update):
    """Latents (B, C, T) through `counts` (B,) codebooks -> quantised latents, commitment loss.

    The package's own training path detaches the residual wrongly (past the first codebook no gradient comes back)
    and re-seeds codes used less than twice a step, which at 500 frames a step is nearly all: hence these lines.
    """
    B, C, T = latents.shape
    residual, total, commitment = latents.transpose(1, 2).reshape(-1, C), 0.0, 0.0
    row_counts = counts.repeat_interleave(T)[:, None]                     # (B*T, 1)
    for k, layer in enumerate(quantizer.vq.layers):
        book = layer._codebook
        index = nearest(residual.detach(), book.embed)
        chosen = book.embed[index]                                        # (B*T, C), a buffer: no gradient
        if update:
            update_codebook(book, residual.detach(), index)
        used = (row_counts > k).float()
        total = total + chosen * used
        commitment = commitment + ((residual - chosen).square().mean(1, keepdim=True) * used).mean()
        residual = residual - chosen
    total = total.view(B, T, C).transpose(1, 2)
    return latents + (total - latents).detach(), commitment


@torch.no_grad()
def update_codebook(book, x, index):
    """Move each vector towards the mean of the x (n, C) that chose it; give a dead one to a random frame."""
    count = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
    total = torch.zeros_like(book.embed).index_add_(0, index, x)
    book.cluster_size.lerp_(count, 1 - DECAY)
    book.embed_avg.lerp_(total, 1 - DECAY)
    fair = len(x) / CODEBOOK_SIZE                             # uses per step if all codes were used alike
    dead = (book.cluster_size < 0.03 * fair).nonzero()[:, 0]
    if len(dead):
        new = x[torch.randint(len(x), (len(dead),), device=x.device)]
        book.cluster_size[dead] = 0.3 * fair
        book.embed_avg[dead] = new * 0.3 * fair
    book.embed.copy_(book.embed_avg / book.cluster_size[:, None])


# ----------------------------------------------------------------------------- losses and measures

def soft_log_mel(wave, n_fft=1024, n_mels=80):
    """log(power + 0.01): as the log-mel, but about 40 dB below a voice it fades out instead of going on.

    The slope of log(power) is largest where there is almost nothing to hear. With the model's own floor of 1e-5 the
    pauses outvote the speech, and training stays for thousands of steps where the average spectrum is all it knows.
    """
    return (mel_power(frame(wave, n_fft, n_fft // 4), n_mels) + 0.01).log()


def reconstruction_loss(out, wave):
    """Mean over window lengths of L1 + L2 between log-mels, plus the waveform's L1 relative to its level."""
    loss = 0.0
    for n_fft, n_mels in SCALES:
        difference = soft_log_mel(out, n_fft, n_mels) - soft_log_mel(wave, n_fft, n_mels)
        loss = loss + (difference.abs().mean() + difference.square().mean(2).add(1e-6).sqrt().mean()) / len(SCALES)
    return loss + ((out - wave).abs().mean(1) / (wave.abs().mean(1) + 1e-2)).mean()


@torch.no_grad()
def measure(model, held_out, phase, device, n_clips=12, seconds=4):
    """Held-out log-mel distance (mean absolute nats) for each number of codebooks, and each codebook's perplexity."""
    model.eval()
    report = {}
    for name, waves in held_out.items():
        clips = [w[:seconds * SAMPLE_RATE] for w in waves if len(w) >= seconds * SAMPLE_RATE][:n_clips]
        wave = torch.from_numpy(np.stack(clips).astype(np.float32) / 32768).to(device)
        latents = model.encoder(wave[:, None])
        target = soft_log_mel(wave)
        distance = lambda z: round((soft_log_mel(model.decoder(z)[:, 0]) - target).abs().mean().item(), 3)
        report[name] = {"unquantised": distance(latents)}
        if phase == 2:
            codes = model.quantizer.vq.encode(latents)                    # (K, B, T)
            for k in COUNTS.tolist():
                report[name][f"{k} codebooks"] = distance(model.quantizer.vq.decode(codes[:k]))
            p = [torch.bincount(c.flatten(), minlength=CODEBOOK_SIZE).float() / c.numel() for c in codes]
            report[name]["perplexity"] = [round(torch.exp(-(q * q.clamp(min=1e-9).log()).sum()).item()) for q in p]
    model.train()
    return report


# ----------------------------------------------------------------------------- training

def save(path, content):
    """Write beside the target, then replace it: a crash leaves the old file whole."""
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def export(model, config, path):
    """Write the inference weights, weight norm folded, in fp16, and print the SHA-256 that tokens.py checks."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_g"):                       # weight norm, dim 0: w = g v / |v|
            norm = module.weight_v.flatten(1).norm(dim=1).view(-1, *[1] * (module.weight_v.dim() - 1))
            weights[f"{name}.weight"] = module.weight_g * module.weight_v / norm
    training_only = ("weight_g", "weight_v", "inited", "cluster_size", "embed_avg")
    weights |= {k: v for k, v in model.state_dict().items() if not k.endswith(training_only)}
    save(path, {"config": config, "weights": {k: v.detach().half().cpu() for k, v in weights.items()}})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    print(f"wrote {path}: {os.path.getsize(path) / 2**20:.2f} MiB, MINI_SHA256 = \"{digest}\"")


def main():
    parser = argparse.ArgumentParser(description="Train the mini codec.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["assets/speech", "assets/music"], help="folders of audio")
    parser.add_argument("--minutes", type=float, default=60, help="of training, k-means and measuring included")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=48, help="length of a training crop, 1/75 s each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--commitment", type=float, default=0.25, help="weight of the commitment loss")
    parser.add_argument("--n-filters", type=int, default=8)
    parser.add_argument("--dimension", type=int, default=128, help="of the latents")
    parser.add_argument("--lstm", type=int, default=2, help="layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="assets/mini.pt")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.last, written every two minutes")
    args = parser.parse_args()

    train, held_out = load(args.data)
    held_out = dict(zip(args.data, held_out))
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)                            # silence makes denormals, and they crawl on a CPU
    config = dict(n_filters=args.n_filters, dimension=args.dimension, lstm=args.lstm)
    model = build_mini(**config, norm="weight_norm").to(args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.8, 0.99), weight_decay=0.0)
    initialise(model, batch(train, np.random.default_rng(args.seed), 16, SAMPLE_RATE).to(args.device))
    averaged = [p.detach().clone() for p in parameters]       # moving average of the weights: what is measured
    step, spent, phase, start = 0, 0.0, 1, time.time()
    if args.resume:
        state = torch.load(f"{args.out}.last", map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step, spent, phase = state["averaged"], state["step"], state["spent"], state["phase"]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {args.minutes:g} minutes on {args.device}")

    def swap():                                               # the averaged weights in and out of the model
        for p, a in zip(parameters, averaged):
            p.data, a.data = a.data, p.data

    next_save, next_report = spent + 120, spent
    while True:
        now = spent + time.time() - start                     # seconds of training so far
        done = now / (60 * args.minutes)
        if now > next_report or done >= 1:
            swap()
            print(json.dumps({"minutes": round(now / 60, 1), "step": step, "phase": phase,
                              **measure(model, held_out, phase, args.device)}), flush=True)
            if done >= 1 and phase == 2:
                export(model, config, args.out)
            swap()
            next_report = now + max(120, 3 * args.minutes)
        if now > next_save or done >= 1:
            save(f"{args.out}.last", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                                      "averaged": averaged, "spent": now, "phase": phase})
            next_save = now + 120
        if done >= 1:
            break

        rng = np.random.default_rng((args.seed, step))
        if phase == 1 and done > WARM_UP:
            with torch.no_grad():
                waves = [batch(train, rng, 16, 4 * SAMPLE_RATE).to(args.device) for _ in range(12)]
                latents = torch.cat([model.encoder(w[:, None]).transpose(1, 2).flatten(0, 1) for w in waves])
            fit_codebooks(model.quantizer, latents)
            phase = 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 200) * max(0.02, 1 - done ** 2)
        wave = batch(train, rng, args.batch_size, args.frames * HOP).to(args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):      # the encoder only: the codebook
            latents = model.encoder(wave[:, None])            # (B, C, T)     search and the waveform want fp32
        latents, loss = latents.float(), 0.0
        if phase == 2:
            counts = COUNTS[torch.from_numpy(rng.choice(4, args.batch_size, p=[0.25, 0.15, 0.15, 0.45]))]
            latents, commitment = quantize(model.quantizer, latents, counts.to(args.device), update=True)
            loss = args.commitment * commitment
        loss = loss + reconstruction_loss(model.decoder(latents)[:, 0], wave)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(0.999, step / (step + 10)))
        if step % 100 == 0:
            print(f"step {step}  {now / 60:.1f} min  loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
