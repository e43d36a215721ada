"""
train_codec.py: trains `mini`, the codec that ships with the project.

    python assets/train_codec.py --data assets/speech assets/music FOLDER --minutes 60
    python assets/train_codec.py --data ... --minutes 60 --resume          # after an interruption
    (to ship it: move out-codec.pt to assets/mini.pt, and the printed SHA-256 into tokens.py, MINI_SHA256)

An autoencoder (EnCodec's SEANet, small) with a residual vector quantiser between its halves, in four phases:

  1. listen: the encoder alone learns to write the spectral envelope (principal components of the log-mel) into the
     last quarter of its latents. The other three quarters pass the waveform on, see `initialise`;
  2. both halves learn to give the sound back from unquantised latents;
  3. the encoder is done. Each codebook is fitted by k-means to what the codebooks before it left over: the envelope is
     most of the latents' variance, so the coarse codes hold it, the finer ones the waveform. From here the decoder
     alone learns, hearing 1, 2, 4 or 8 codebooks, another number for every clip of the batch: any number decodes;
  4. with --adversarial, from that part of the time on, EnCodec's multi-scale STFT discriminator listens too.

The losses are EnCodec's (arXiv 2210.13438, section 3.4): distance between log-mel spectrograms at four window lengths
(L1 + L2), the waveform's L1, and the discriminator's verdict and features; a balancer gives each its share of the
gradient. Everything runs on one CPU or GPU; a clock, not a step count, sets the schedule. Held-out clips (every
folder's `val/`, else one file in fifty) are measured every few minutes.
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
from mel import SAMPLE_RATE, frame, log_mel, mel_power
from tokens import CODEBOOK_SIZE, HOP, build_mini
from encodec.modules import SConv1d, SConvTranspose1d, SLSTM          # after tokens: it makes encodec importable
from encodec.modules.seanet import SEANetResnetBlock

SCALES = ((256, 32), (512, 64), (1024, 80), (2048, 128))      # (window in samples, mel bands) of the mel loss
WEIGHTS = {"mel": 1.0, "wave": 0.5, "adversarial": 1.0, "features": 1.0,      # shares of the gradient, see `balance`:
           "decoder": 1.0, "envelope": 1.0}                   # at the decoder's output, and at the latents in phase 2
COUNTS = torch.tensor([1, 2, 4, 8])                           # codebooks a clip of the batch may be decoded from
PHASES = (0.18, 0.3)                                          # parts of the time at which phases 2 and 3 begin
SMALL = 0.1                                                   # gain of the waveform in the encoder, at the start
LOUD = 5.0                                                    # and of the channels beside it, where ELU bends


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
    """Random crops, an equal share of every folder, varied as below -> (B, n_samples) float32 in [-1, 1].

    Half of them are played up to 20 % faster or slower, which moves pitch and formants too; one in five comes from a
    room: plus noise that dies away by 60 dB in 0.1 to 0.6 seconds, convolved with it. Level and polarity are random.
    """
    rows = []
    for i in range(batch_size):
        waves = train[rng.integers(len(train))]
        wave = waves[rng.integers(len(waves))]
        speed = rng.uniform(0.8, 1.25) if rng.random() < 0.5 else 1.0
        n = int(n_samples * speed) + 8
        start = rng.integers(max(1, len(wave) - n))
        crop = wave[start:start + n].astype(np.float32) / 32768
        if speed != 1:
            crop = soxr.resample(crop, SAMPLE_RATE * speed, SAMPLE_RATE)
        crop = np.pad(crop, (0, max(0, n_samples - len(crop))))[:n_samples]
        if rng.random() < 0.2:
            t = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
            tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.1, 0.6))
            tail *= rng.uniform(0.1, 0.7) / np.sqrt(tail @ tail)
            size = n_samples + len(t)
            crop = crop + np.fft.irfft(np.fft.rfft(crop, size) * np.fft.rfft(tail, size), size)[:n_samples]
        rows.append(crop * 10 ** (rng.uniform(-12, 3) / 20) * rng.choice([-1, 1]))
    return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp(-1, 1)


@torch.no_grad()
def initialise(model, wave):
    """Let the untrained model pass its input: wave (B, N) comes out as nearly itself.

    A few channels of every layer become a linear transform codec: a convolution of stride r takes the principal
    components of the patches of r frames that reach it, its mirror in the decoder their transpose, residual blocks
    start near the identity, and the signal is kept small, where ELU is almost linear. All other channels start at
    random and loud, where it bends. From random weights alone the same network spends its first thousands of steps where
    the average spectrum is all it knows; from here it never visits that place.
    """
    x, linear, mirror = wave[:, None], 1, []                  # linear: how many channels of x hold the transform
    for layer in model.encoder.model:
        if isinstance(layer, SConv1d):
            conv = layer.conv.conv
            (n_out, n_in, kernel), stride = conv.weight.shape, conv.stride[0]
            conv.weight /= layer(x).std()
            if n_in == 1:
                basis = torch.full((1, 1, 1), SMALL)                          # the waveform itself, in channel 0
                conv.weight *= LOUD
            else:
                patches = x[:, :linear].unfold(2, stride, stride).transpose(1, 2).flatten(2).flatten(0, 1)    # (n, C*r)
                _, vectors = torch.linalg.eigh(patches.T @ patches)           # columns, by rising eigenvalue
                basis = vectors.flip(1)[:, :n_out * 3 // 4].T.reshape(-1, linear, stride)
            mirror.append(basis if n_in > 1 else basis / SMALL ** 2)
            conv.weight[:len(basis)] = 0
            conv.weight[:len(basis), :linear, kernel - stride:] = basis       # the newest taps
            conv.bias.zero_()
            linear = len(basis)
        start_as_identity(layer, linear)
        x = layer(x)
    for layer in model.decoder.model:
        if isinstance(layer, (SConv1d, SConvTranspose1d)):
            basis = mirror.pop().transpose(0, 1)                              # (linear channels out, in, r)
            linear, n_in, stride = basis.shape
            if isinstance(layer, SConv1d):
                conv, weight, taps = layer.conv.conv, layer.conv.conv.weight, slice(-1, None)
            else:                                                             # its weight is (in, out, kernel)
                conv, weight, taps = layer.convtr.convtr, layer.convtr.convtr.weight.transpose(0, 1), slice(stride)
            weight[:linear] = 0
            weight[:linear, :n_in, taps] = basis
            conv.bias.zero_()
        start_as_identity(layer, linear)


def start_as_identity(layer, linear):
    """The first `linear` channels pass a residual block, and an LSTM with a skip around it, nearly unchanged."""
    if isinstance(layer, SEANetResnetBlock):
        shortcut, branch = layer.shortcut.conv.conv, layer.block[-1].conv.conv
        shortcut.weight[:linear] = torch.eye(len(shortcut.weight))[:linear, :, None]
        branch.weight[:linear] *= 0.01
        for conv in (shortcut, branch):
            conv.bias[:linear] = 0
    if isinstance(layer, SLSTM):
        for parameter in layer.parameters():
            parameter *= 0.1


# ----------------------------------------------------------------------------- quantiser

def nearest(x, codebook):
    """Index of the closest codebook vector for each row: (n, C), (1024, C) -> (n,)."""
    return (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)      # |x|^2 is the same for every candidate


@torch.no_grad()
def fit_codebooks(quantizer, latents, rounds=20):
    """K-means, one codebook after the other, each on what the former left over. latents (n, C)."""
    residual = latents
    for layer in quantizer.vq.layers:
        book = layer._codebook
        book.embed.copy_(residual[torch.randperm(len(residual))[:CODEBOOK_SIZE]])
        for _ in range(rounds):
            index = nearest(residual, book.embed)
            count = torch.bincount(index, minlength=CODEBOOK_SIZE)[:, None]
            total = torch.zeros_like(book.embed).index_add_(0, index, residual)
            book.embed.copy_(torch.where(count > 0, total / count.clamp(min=1), book.embed))
        book.inited.fill_(1)
        residual = residual - book.embed[nearest(residual, book.embed)]
        left = residual.var(0).sum() / latents.var(0).sum()
        print(f"  k-means: {left:.3f} of the latents' variance left over", flush=True)


@torch.no_grad()
def quantize(quantizer, latents, counts):
    """Latents (B, C, T), clip i through its first counts[i] codebooks -> (B, C, T)."""
    codes = quantizer.vq.encode(latents)                                  # (K, B, T)
    total = torch.zeros_like(latents)
    for k, layer in enumerate(quantizer.vq.layers):
        total += layer.decode(codes[k]) * (counts > k)[:, None, None]
    return total


# ----------------------------------------------------------------------------- losses

def log_bands(wave, n_fft, n_mels, hop):
    """log(mel power + 3e-4), wave (B, N) -> (B, N // hop, n_mels). The floor is some 55 dB below a voice: the slope of
    the logarithm is largest where there is least to hear."""
    return (mel_power(frame(wave, n_fft, hop), n_mels) + 3e-4).log()


class Envelope:
    """wave (B, N) -> the n strongest principal components of its log-mel frames, (B, n, T): targets for latents.

    Frames are mel.py's: causal, one per code. Fitted to some audio (B, N); total variance about 0.5.
    """

    def __init__(self, wave, n):
        bands = log_bands(wave, 1024, 80, HOP).flatten(0, 1)
        self.mean = bands.mean(0)
        self.basis = torch.linalg.eigh(torch.cov(bands.T))[1].flip(1)[:, :n] / (2 * 80 ** 0.5)        # (80, n)

    def __call__(self, wave):
        return ((log_bands(wave, 1024, 80, HOP) - self.mean) @ self.basis).transpose(1, 2)


def mel_loss(out, wave):
    """Mean over window lengths of L1 + L2 between log-mel spectrograms, out and wave (B, N)."""
    loss = 0.0
    for n_fft, n_mels in SCALES:
        difference = log_bands(out, n_fft, n_mels, n_fft // 4) - log_bands(wave, n_fft, n_mels, n_fft // 4)
        loss = loss + difference.abs().mean() + difference.square().mean(2).add(1e-6).sqrt().mean()
    return loss / len(SCALES)


def wave_loss(out, wave):
    """L1 relative to each clip's level, out and wave (B, N)."""
    return ((out - wave).abs().mean(1) / (wave.abs().mean(1) + 1e-2)).mean()


def discriminator_loss(discriminator, out, wave):
    """Hinge loss: above 1 for what is real, below -1 for what is decoded, at every scale."""
    real, fake = discriminator(wave[:, None])[0], discriminator(out[:, None])[0]
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)


def adversarial_losses(discriminator, out, wave):
    """What the discriminator says of the decoded clips, and how far its features are from the original's."""
    with torch.no_grad():
        real_features = discriminator(wave[:, None])[1]
    logits, features = discriminator(out[:, None])
    distances = [(f - r).abs().mean() / r.abs().mean() for fs, rs in zip(features, real_features) for f, r in zip(fs, rs)]
    return {"adversarial": sum(F.relu(1 - g).mean() for g in logits) / len(logits),
            "features": sum(distances) / len(distances)}


def balance(gradients, norms):
    """Gradients (B, ...) by name, at one tensor -> their sum, in which each has the share WEIGHTS gives it.

    EnCodec's balancer: each is divided by a moving average of its norm, kept in `norms`; the shares sum to 1.
    """
    total = 0.0
    for name, gradient in gradients.items():
        norm = gradient.flatten(1).norm(dim=1).mean()
        norms[name] = norms.get(name, norm) * 0.99 + norm * 0.01
        total = total + WEIGHTS[name] * gradient / norms[name]
    return total / sum(WEIGHTS[name] for name in gradients)


# ----------------------------------------------------------------------------- measuring

def perplexity(codes):
    """exp(entropy) of how often each code occurs: 1024 when a codebook is used evenly, 1 when it has collapsed."""
    p = torch.bincount(codes.flatten(), minlength=CODEBOOK_SIZE).float() / codes.numel()
    return torch.exp(torch.special.entr(p).sum()).item()


@torch.no_grad()
def measure(model, held_out, envelope, phase, device, n_clips=12, seconds=4):
    """Held-out log-mel distance (mean absolute nats) by number of codebooks, each codebook's perplexity, and how much
    of the envelope's variance the latents explain."""
    model.eval()
    report = {}
    for name, waves in held_out.items():
        clips = [w[:seconds * SAMPLE_RATE] for w in waves if len(w) >= seconds * SAMPLE_RATE][:n_clips]
        wave = torch.from_numpy(np.stack(clips).astype(np.float32) / 32768).to(device)
        latents, spectrum, target = model.encoder(wave[:, None]), log_mel(wave), envelope(wave)
        distance = lambda z: round((log_mel(model.decoder(z)[:, 0]) - spectrum).abs().mean().item(), 3)
        error = (latents[:, -target.shape[1]:] - target).var((0, 2)).sum() / target.var((0, 2)).sum()
        report[name] = {"envelope": round(1 - error.item(), 3), "unquantised": distance(latents)}
        if phase > 2:
            codes = model.quantizer.vq.encode(latents)                    # (K, B, T)
            for k in COUNTS.tolist():
                report[name][f"{k} codebooks"] = distance(model.quantizer.vq.decode(codes[:k]))
            report[name]["perplexity"] = [round(perplexity(c)) for c in codes]
    model.train()
    return report


# ----------------------------------------------------------------------------- training

def save(path, content):
    """Write beside the target, then replace it: a crash leaves the old file whole."""
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def export(model, config, path):
    """Write the weights that inference needs, in fp16, and print the SHA-256 that tokens.py checks."""
    training_only = ("inited", "cluster_size", "embed_avg")
    weights = {k: v.half().cpu() for k, v in model.state_dict().items() if not k.endswith(training_only)}
    save(path, {"config": config, "weights": weights})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    print(f"wrote {path}: {os.path.getsize(path) / 2**20:.2f} MiB, MINI_SHA256 = \"{digest}\"")


def main():
    parser = argparse.ArgumentParser(description="Train the mini codec.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["assets/speech", "assets/music"], help="folders of audio")
    parser.add_argument("--minutes", type=float, default=60, help="of training, k-means and measuring included")
    parser.add_argument("--adversarial", type=float, default=1.0, help="part of the time at which the discriminator "
                        "joins; 1 is never. It costs many times the codec's own arithmetic: for a GPU")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=48, help="length of a training crop, 1/75 s each")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--n-filters", type=int, default=16)
    parser.add_argument("--dimension", type=int, default=128, help="of the latents")
    parser.add_argument("--lstm", type=int, default=2, help="layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out-codec.pt")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.last, written every two minutes")
    args = parser.parse_args()
    if args.resume and not Path(f"{args.out}.last").is_file():
        sys.exit(f"error: --resume: no {args.out}.last to go on from")

    train, held_out = load(args.data)
    held_out = dict(zip(args.data, held_out))
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)                            # silence makes denormals, and they crawl on a CPU
    config = dict(n_filters=args.n_filters, dimension=args.dimension, lstm=args.lstm)
    model, n_envelope = build_mini(**config), args.dimension // 4
    some = batch(train, np.random.default_rng(args.seed), 64, SAMPLE_RATE)
    initialise(model, some)
    envelope = Envelope(some.to(args.device), n_envelope)
    model.to(args.device)
    encoder, decoder = list(model.encoder.parameters()), list(model.decoder.parameters())
    parameters = encoder + decoder
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.8, 0.99), weight_decay=0.0, fused=True)
    modules = {"model": model, "optimizer": optimizer}        # whatever has a state to save
    if args.adversarial < 1:
        from encodec.msstftd import MultiScaleSTFTDiscriminator
        if not hasattr(sys.modules["torchaudio"], "transforms"):
            sys.exit("error: --adversarial needs a torchaudio that loads, and that is one beside a CUDA build of torch")
        sizes = [2048, 1024, 512, 256, 128]
        discriminator = MultiScaleSTFTDiscriminator(32, n_ffts=sizes, win_lengths=sizes,
                                                    hop_lengths=[n // 4 for n in sizes]).to(args.device)
        discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-4, betas=(0.5, 0.9), fused=True)
        modules |= {"discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
    averaged = [p.detach().clone() for p in parameters]       # moving average of the weights: what is measured
    state = {"averaged": averaged, "step": 0, "phase": 1, "ramp": 0, "norms": {}, "spent": 0.0}
    if args.resume:
        state = torch.load(f"{args.out}.last", map_location=args.device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state.pop(name))
        averaged = state["averaged"]
    norms, start = state["norms"], time.time() - state["spent"]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {args.minutes:g} minutes on {args.device}")

    def swap():                                               # the averaged weights in and out of the model
        for p, a in zip(parameters, averaged):
            p.data, a.data = a.data, p.data

    next_save, next_report = state["spent"] + 120, state["spent"]
    while True:
        step, phase, now = state["step"], state["phase"], time.time() - start
        done = now / (60 * args.minutes)
        if now > next_report or done >= 1:
            swap()
            print(json.dumps({"minutes": round(now / 60, 1), "step": step, "phase": phase,
                              **measure(model, held_out, envelope, phase, args.device)}), flush=True)
            if done >= 1 and phase > 2:
                export(model, config, args.out)
            swap()
            next_report = now + max(120, 3 * args.minutes)
        if now > next_save or done >= 1:
            save(f"{args.out}.last", state | {name: m.state_dict() for name, m in modules.items()} | {"spent": now})
            next_save = now + 120
        if done >= 1:
            break

        rng = np.random.default_rng((args.seed, step))
        if phase < 4 and done > (*PHASES, args.adversarial)[phase - 1]:
            phase, state["phase"], state["ramp"] = phase + 1, phase + 1, step
            if phase == 3:
                swap()
                with torch.no_grad():
                    waves = [batch(train, rng, 2 * args.batch_size, 4 * SAMPLE_RATE).to(args.device) for _ in range(16)]
                    latents = torch.cat([model.encoder(w[:, None]).transpose(1, 2).flatten(0, 1) for w in waves])
                fit_codebooks(model.quantizer, latents)
                torch._foreach_copy_(averaged, parameters)
        ramp = min(1, (step - state["ramp"] + 1) / 200)
        optimizer.param_groups[0]["lr"] = args.lr * (2 if phase == 1 else 1) * ramp * max(0.02, 1 - done ** 2)
        optimizer.zero_grad(set_to_none=True)
        wave = batch(train, rng, args.batch_size, args.frames * HOP).to(args.device)
        bf16 = torch.autocast(torch.device(args.device).type, torch.bfloat16)     # the networks only: the codebook
        with bf16, torch.set_grad_enabled(phase < 3):         # search and the losses need float32
            latents = model.encoder(wave[:, None]).float()    # (B, C, T)
        pulls = {}                                            # gradients at the latents
        if phase < 3:
            pulls["envelope"] = torch.zeros_like(latents)
            pulls["envelope"][:, -n_envelope:] = latents[:, -n_envelope:].detach() - envelope(wave)
        if phase > 1:
            heard = latents.detach().requires_grad_(phase == 2)
            if phase > 2:
                counts = COUNTS[torch.from_numpy(rng.choice(4, args.batch_size, p=[0.25, 0.2, 0.2, 0.35]))]
                heard = quantize(model.quantizer, latents, counts.to(args.device))
            with bf16:
                out = model.decoder(heard)[:, 0].float()      # (B, N)
            losses = {"mel": mel_loss(out, wave), "wave": wave_loss(out, wave)}
            if phase == 4:
                if rng.random() < 2 / 3:                      # its turns are fewer: it learns faster than the codec
                    discriminator_optimizer.zero_grad(set_to_none=True)
                    with bf16:
                        verdict = discriminator_loss(discriminator, out.detach(), wave)
                    verdict.backward()
                    discriminator_optimizer.step()
                with bf16:
                    losses |= adversarial_losses(discriminator, out, wave)
            pull = balance({name: torch.autograd.grad(loss, out, retain_graph=True)[0]
                            for name, loss in losses.items()}, norms)
            out.backward(pull)
            if phase == 2:
                pulls["decoder"] = heard.grad
        if phase < 3:
            latents.backward(balance(pulls, norms))
        for half in (encoder, decoder):
            torch.nn.utils.clip_grad_norm_(half, 1.0)
        optimizer.step()
        state["step"] += 1
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(0.999, step / (step + 10)))
        if state["step"] % 100 == 0:
            values = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()) if phase > 1 else ""
            print(f"step {state['step']}  {now / 60:.1f} min  {values}", flush=True)


if __name__ == "__main__":
    main()
