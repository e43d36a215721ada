"""
train_codec.py: trains `mini`, the codec that ships with the project.

    python assets/train_codec.py --data assets/speech assets/music FOLDER --steps 16000
    python assets/train_codec.py --data ... --steps 7500 --batch-size 64 --frames 60        # on a GPU
    python assets/train_codec.py --resume                                # after an interruption
    (to ship it: move out-codec.pt to assets/mini.pt, and the printed SHA-256 into tokens.py, MINI_SHA256)

The first takes two to three hours on two CPU cores, the second, which made the codec that ships, four minutes on an
H100. Clips that train.py would validate on (`data.split_clips`) are held out, for measuring every thousand steps from
phase 3 on.

An autoencoder (EnCodec's SEANet, small) with a residual vector quantiser between its halves. A first one, trained all
at once from random weights, ended up using only the first of its codebooks. So it is trained in four phases:

  1. the encoder alone learns to write the spectral envelope (`Envelope`) into an eighth of its latents. The others pass
     the waveform on (`initialise`), except the last four (`count_latents`);
  2. both halves learn to reproduce the sound from unquantised latents, a fifth of the clips from the envelope alone,
     with as much noise on it as one codebook will cause;
  3. each codebook is fitted by k-means to what those before it left over, the first to the envelope. The decoder learns
     to decode 1, 2, 4 or 8 of them, a number drawn for every clip, so that any number will do;
  4. envelope, codebooks and decoder adapt to each other, the encoder slowly, through the quantiser.

The losses follow EnCodec's (arXiv 2210.13438, section 3.4), with one for intelligibility (`words_loss`); a balancer
gives each its share of the gradient. With --adversarial P, EnCodec's multi-scale STFT discriminator joins once the
fraction P of the steps is done.
"""
import argparse
import copy
import functools
import hashlib
import sys
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import DataError, find_audio, read_audio, split_clips
from mel import HANN, HOP, SAMPLE_RATE, frame, log_mel, mel_power
from model import save
from tokens import CODEBOOK_SIZE, TRAINING_ONLY, build_mini
from train import choose_device
from encodec import msstftd                                                               # tokens makes it importable
from encodec.modules.seanet import SConv1d, SConvTranspose1d, SEANetResnetBlock, SLSTM

SCALES = ((256, 32), (512, 64), (1024, 80), (2048, 128))      # (window in samples, mel bands) of the mel loss
# shares of the gradient, see `balance`: of that at the decoder's output and, separately, of that at the latents
WEIGHTS = {"mel": 1.0, "wave": 0.1, "words": 3.0, "adversarial": 1.0, "features": 1.0,
           "decoder": 1.0, "envelope": 1.0, "unchanged": 1.0, "commitment": 0.3}
OFTEN = {1: 0.2, 2: 0.3, 4: 0.2, 8: 0.3}                      # number of codebooks a clip is decoded from: probability
PHASES = {1: (0.20, 3e-3, 0), 2: (0.40, 5e-4, 5e-4),          # each: the fraction of the steps at which it ends, and
          3: (0.50, 0, 5e-4), 4: (1.0, 1e-4, 5e-4)}           # the learning rates of encoder and decoder
SHAPE = dict(n_filters=16, dimension=132, lstm=2)             # of the networks
# the 132 latents of a frame: for the waveform, for its spectral envelope, and for the number of codebooks decoded
WAVEFORM, ENVELOPE, COUNT = slice(0, 112), slice(112, 128), slice(128, 132)
COUNTED = (0, 1, 2, 4)                                        # the codebooks, from 0, that those of COUNT announce
WHITEN = 0.6                                                  # how much of the previous frame `Envelope` subtracts
NOISE = 0.09                                                  # standard deviation, about what one codebook leaves over
SAVE_EVERY = 250                                              # steps; about two minutes on a CPU


# ----------------------------------------------------------------------------- data

def load(folders):
    """Folders of audio -> training audio and held-out audio: one list of (N,) int16 arrays, 24 kHz, per folder."""
    train, held_out = [], []
    for name in folders:
        folder, clips = find_audio(name)
        is_val = split_clips(clips, name)                     # first, as it may fail
        waves = [(np.concatenate(list(read_audio(folder / clip))).clip(-1, 1) * 32767).astype(np.int16)
                 for clip in clips]
        train.append([w for w, val in zip(waves, is_val) if not val])
        held_out.append([w for w, val in zip(waves, is_val) if val])
        if not held_out[-1]:
            raise DataError(f"{name}: one file is not enough, another has to be held out")
        print(f"{name}: {sum(map(len, train[-1])) / SAMPLE_RATE / 60:.1f} minutes to train on, "
              f"{len(held_out[-1])} clips held out", flush=True)
    return train, held_out


def batch(train, rng, batch_size, n_samples):
    """Random crops, an equal share of every folder, augmented -> (B, n_samples) float32 in [-1, 1].

    Half of them are played at another speed, which also moves pitch and formants; one in five is put into a room: its
    convolution with noise that decays by 60 dB in 0.1 to 0.6 s is added to it. Level and polarity are random."""
    rows = []
    for _ in range(batch_size):
        waves = train[rng.integers(len(train))]
        wave = waves[rng.integers(len(waves))]
        speed = rng.uniform(0.8, 1.25) if rng.random() < 0.5 else 1.0
        n = int(n_samples * speed) + 8                        # more, as the resampler may return a little less
        start = rng.integers(max(1, len(wave) - n))
        crop = soxr.resample(wave[start:start + n].astype(np.float32) / 32768, SAMPLE_RATE * speed, SAMPLE_RATE)
        crop = np.pad(crop, (0, max(0, n_samples - len(crop))))[:n_samples]
        if rng.random() < 0.2:
            t = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
            tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.1, 0.6))
            tail *= rng.uniform(0.1, 0.7) / np.sqrt(tail @ tail)
            size = n_samples + len(t)
            crop = crop + np.fft.irfft(np.fft.rfft(crop, size) * np.fft.rfft(tail, size), size)[:n_samples]
        rows.append(crop * 10 ** (rng.uniform(-12, 3) / 20) * rng.choice([-1, 1]))
    return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp(-1, 1)


def inputs(train, args, step):
    """What a step is given, by its number alone, so that a run can be resumed: audio (B, N), how many codebooks (B,) to
    decode each clip from, and whether it is the discriminator's turn."""
    rng = np.random.default_rng((args.seed, step))
    wave = batch(train, rng, args.batch_size, args.frames * HOP)
    counts = rng.choice(list(OFTEN), len(wave), p=list(OFTEN.values()))
    return wave, torch.from_numpy(counts), rng.random() < 2 / 3


@torch.no_grad()
def initialise(model, wave):
    """Make the untrained model pass its input through: wave (B, N) comes out recognisable and not delayed.

    Some channels of every layer become a linear transform codec: a convolution of stride r computes the principal
    components of the patches of r frames that reach it, its mirror in the decoder applies their transpose. The signal
    is kept small, where ELU is almost linear; all other channels start random and loud, where ELU bends. From random
    weights alone the same network spends its first thousands of steps knowing only the average spectrum."""
    x, mirror = wave[:, None], []
    for layer in model.encoder.model:
        if isinstance(layer, SConv1d):
            conv = layer.conv.conv
            conv.weight /= layer(x).std()
            if not mirror:                                    # the waveform itself in channel 0, small; the others loud
                basis = torch.full((1, 1, 1), 0.1)
                conv.weight *= 5
            else:
                r = conv.stride[0]
                patches = x[:, :len(basis)].unfold(2, r, r).transpose(1, 2)           # (B, T / r, C, r)
                patches = patches.flatten(2).flatten(0, 1)                            # (B * T / r, C * r)
                _, vectors = torch.linalg.eigh(patches.T @ patches)           # columns, by rising eigenvalue
                basis = vectors.flip(1)[:, :conv.out_channels * 3 // 4].T.reshape(-1, len(basis), r)
            # principal components are undone by their transpose, below, the first layer's 0.1 by 10
            mirror.append(basis if mirror else 1 / basis)
        plant(layer, basis)
        x = layer(x)
    model.encoder.model[-1].conv.conv.weight[COUNT] = 0       # the encoder leaves these latents to the codebooks
    for layer in model.decoder.model:
        if isinstance(layer, (SConv1d, SConvTranspose1d)):    # they undo the encoder's, last to first
            basis = mirror.pop().transpose(0, 1)
        plant(layer, basis)


def plant(layer, basis):
    """In a convolution, the first channels out become `basis` (out, in, taps) of the first ones in; a residual block,
    or an LSTM with a skip around it, passes them nearly unchanged."""
    n_out, n_in, n_taps = basis.shape
    if isinstance(layer, SConv1d):
        conv = layer.conv.conv
        conv.weight[:n_out] = 0                               # (out, in, kernel)
        conv.weight[:n_out, :n_in, -n_taps:] = basis          # the newest taps
        conv.bias.zero_()
    if isinstance(layer, SConvTranspose1d):
        conv = layer.convtr.convtr
        conv.weight[:, :n_out] = 0                            # (in, out, kernel)
        conv.weight[:n_in, :n_out, :n_taps] = basis.transpose(0, 1)
        conv.bias.zero_()
    if isinstance(layer, SEANetResnetBlock):
        shortcut, branch = layer.shortcut.conv.conv, layer.block[-1].conv.conv
        shortcut.weight[:n_out] = torch.eye(len(shortcut.weight))[:n_out, :, None]
        branch.weight[:n_out] *= 0.01
        shortcut.bias[:n_out] = branch.bias[:n_out] = 0
    if isinstance(layer, SLSTM):
        for parameter in layer.parameters():
            parameter *= 0.1


# ----------------------------------------------------------------------------- quantiser

def nearest(x, codebook):
    """Index of the closest codebook vector for each row: (n, C), (1024, C) -> (n,)."""
    return (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)      # |x|^2 is the same for every candidate


def count_latents(counts):
    """Numbers of codebooks (B,) -> the last latents, (B, 4), of the decoder's input for that many.

    They tell it how rough a waveform to expect. Every vector of codebook 1 holds 1/4 in the first of them, those of 2,
    3 and 5 in one of the others; they are added up. Within a codebook all agree there, so this changes no choice."""
    return torch.stack([counts > k for k in COUNTED], dim=1) / 4


@torch.no_grad()
def fit_codebooks(quantizer, latents, part, rounds=20):
    """K-means, codebook by codebook, each on what those before left over: latents (rows, C).

    For the first, all but the latents `part`, the envelope, are taken as zero, so its vectors differ in nothing else.
    Otherwise the waveform, loud and hard to predict, would use up its ten bits."""
    residual, target = latents, torch.zeros_like(latents)
    target[:, part] = latents[:, part]
    for k, layer in enumerate(quantizer.vq.layers):
        book = layer._codebook
        book.embed.copy_(target[torch.randperm(len(target))[:CODEBOOK_SIZE]])
        for _ in range(rounds):
            index = nearest(target, book.embed)
            size = torch.bincount(index, minlength=CODEBOOK_SIZE)[:, None]
            total = torch.zeros_like(book.embed).index_add_(0, index, target)
            book.embed.copy_(torch.where(size > 0, total / size.clamp(min=1), book.embed))
        book.cluster_size.copy_(size[:, 0] * CODEBOOK_SIZE / len(residual))      # 1 if used equally often
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
        target = residual = residual - book.embed[nearest(residual, book.embed)]
        book.embed[:, COUNT] = torch.tensor([k == counted for counted in COUNTED]) / 4
        left = residual.var(0).sum() / latents.var(0).sum()
        print(f"  k-means: {left:.3f} of the latents' variance left over", flush=True)


@torch.no_grad()
def follow(book, index, x, part):
    """Move the latents `part` of a codebook's vectors towards the mean of what was assigned to them: x (n, C), index
    (n,). Running averages: cluster_size, how often a code is used, 1 on average; embed_avg, that times the mean x."""
    # one-hot products and torch.where, not bincount or a list of dead codes, for which the CPU would await the GPU
    assigned = F.one_hot(index, CODEBOOK_SIZE).type_as(x) * (CODEBOOK_SIZE / len(x))      # (n, 1024)
    book.cluster_size.lerp_(assigned.sum(0), 0.01)
    book.embed_avg.lerp_(assigned.T @ x, 0.01)
    dead = book.cluster_size < 0.03                           # thirty times rarer than the average: restart
    book.cluster_size.masked_fill_(dead, 0.3)
    others = 0.3 * x[torch.randint(len(x), (CODEBOOK_SIZE,), device=x.device)]
    book.embed_avg.copy_(torch.where(dead[:, None], others, book.embed_avg))
    book.embed[:, part] = (book.embed_avg / book.cluster_size[:, None])[:, part]


@torch.no_grad()
def quantized(quantizer, latents, counts, adapt):
    """Latents (B, C, T) -> what the first counts[i] codebooks make of clip i, and codebook 1 alone, (B, C, T) each.
    adapt: let the codebooks `follow`."""
    rest, vectors = latents.mT.flatten(0, 1), []              # (B * T, C)
    for k, layer in enumerate(quantizer.vq.layers):
        index = nearest(rest, layer.codebook)                 # (B * T,)
        vectors.append(layer.codebook[index])
        if adapt:                                             # codebook 1 moves in the envelope only; none in COUNT
            follow(layer._codebook, index, rest, slice(COUNT.start) if k else ENVELOPE)
        rest = rest - vectors[k]
    vectors = [vector.unflatten(0, (len(latents), -1)).mT for vector in vectors]          # (B, C, T)
    return sum(vector * (counts > k)[:, None, None] for k, vector in enumerate(vectors)), vectors[0]


# ----------------------------------------------------------------------------- losses

def log_bands(wave, n_fft, n_mels, hop, floor=3e-5, window=None):
    """log(mel power + floor), wave (B, N) -> (B, N // hop, n_mels). The floor limits the logarithm's slope, which is
    largest where there is least to hear; as power grows with the window, it cuts off most in short ones."""
    return (mel_power(frame(wave, n_fft, hop), n_mels, window) + floor).log()


class Envelope:
    """wave (B, N) -> targets for 16 latents, (B, 16, T): the spectral envelope, less a predictable part.

    The 16 strongest principal components of log-mel frames (one per code; the window ends where the code's samples do),
    less `whiten` times those of the frame before: what repeats from frame to frame would cost bits in each. Not all of
    it is subtracted, as the decoder, which adds the frames up again, would also add up their errors (half-whitening:
    Costas, Coding with linear systems, 1952). Fitted to audio (B, N), on which the targets' variances sum to 1."""

    def __init__(self, wave, window=HANN, whiten=WHITEN):
        self.window, self.whiten, self.scale = window, whiten, 1.0
        bands = self.bands(wave).flatten(0, 1)
        self.mean = bands.mean(0)
        directions = torch.linalg.eigh(torch.cov(bands.T))[1].flip(1)                 # columns, by falling variance
        self.basis = directions[:, :ENVELOPE.stop - ENVELOPE.start]                   # (80, 16)
        self.scale = self(wave)[..., 1:].var((0, 2)).sum().rsqrt()

    def bands(self, wave):                                    # a coarse code has no room for what is very quiet
        return log_bands(wave, 1024, 80, HOP, floor=3e-4, window=self.window)

    def __call__(self, wave):
        components = ((self.bands(wave) - self.mean) @ self.basis).transpose(1, 2) * self.scale
        return components - self.whiten * F.pad(components, (1, 0))[..., :-1]


def mel_loss(out, wave):
    """Mean over window lengths of L1 + L2 between log-mel spectrograms, out and wave (B, N)."""
    loss = 0.0
    for n_fft, n_mels in SCALES:
        difference = log_bands(out, n_fft, n_mels, n_fft // 4) - log_bands(wave, n_fft, n_mels, n_fft // 4)
        loss = loss + difference.abs().mean() + difference.square().mean(2).add(1e-6).sqrt().mean()
    return loss / len(SCALES)


def wave_loss(out, wave, fine):
    """L1 relative to each clip's level, out and wave (B, N); clips where fine (B,) is False count as zero: a coarse
    code does not know the phase, and the best guess at a waveform of unknown phase is silence."""
    return ((out - wave).abs().mean(1) / (wave.abs().mean(1) + 1e-2) * fine).mean()


def words_loss(out, wave, coarse):
    """1 - correlation between band envelopes over 0.4 s, out and wave (B, N), of the clips where coarse (B,) is True.

    This is the core of STOI (Taal et al., 2011), here in the lower 13 of 20 mel bands, to 3.7 kHz (STOI: third-octave
    bands, to 4.3): above, where there is little to correlate, the surest way to be like the original is a whistle."""
    bands = (mel_power(frame(w, 512, 256), 20)[..., :13] for w in (wave, out))
    x, y = (b.add(1e-7).sqrt().unfold(1, 36, 3) for b in bands)                       # (B, segments, 13, 36)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    loss = 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-4)             # (B, segments, 13)
    return (loss.mean((1, 2)) * coarse).sum() / coarse.sum().clamp(min=1)


# a decorator, for a GPU only: a CPU without instructions for bfloat16 would take ten times as long
bfloat16 = torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


@bfloat16
def discriminator_loss(discriminator, out, wave):
    """Hinge loss: aims above 1 for real clips, below -1 for decoded ones, at every scale."""
    real, fake = discriminator(wave[:, None])[0], discriminator(out[:, None])[0]
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)


@bfloat16
def adversarial_losses(discriminator, out, wave):
    """The discriminator's verdict on the decoded clips, and how far its features are from the originals'."""
    with torch.no_grad():
        real = discriminator(wave[:, None])[1]
    logits, fake = discriminator(out[:, None])
    distances = [(f - r).abs().mean() / r.abs().mean() for fs, rs in zip(fake, real) for f, r in zip(fs, rs)]
    return {"adversarial": sum(F.relu(1 - g).mean() for g in logits) / len(logits),
            "features": sum(distances) / len(distances)}


def balance(gradients, norms):
    """EnCodec's balancer: gradients (B, ...) by name, at one tensor -> their sum, in which each has the share that
    WEIGHTS gives it on average, whatever its scale: it is divided by a moving average of its norm, kept in `norms`.
    (One that begins at zero, as `unchanged` does, has too large a share in its first hundred steps.)"""
    total = 0.0
    for name, gradient in gradients.items():
        norm = gradient.flatten(1).norm(dim=1).mean()
        norms[name] = norms.get(name, norm) * 0.99 + norm * 0.01 + 1e-12
        total = total + WEIGHTS[name] * gradient / norms[name]
    return total / sum(WEIGHTS[name] for name in gradients)


# ----------------------------------------------------------------------------- training

def perplexity(codes):
    """exp(entropy) of how often each code occurs: 1024 when a codebook is used evenly, 1 when it has collapsed."""
    p = torch.bincount(codes.flatten(), minlength=CODEBOOK_SIZE).float() / codes.numel()
    return torch.exp(torch.special.entr(p).sum()).item()


@torch.no_grad()
def measure(model, waves):
    """Log-mel distance (mean absolute nats) by number of codebooks, and each codebook's perplexity, on the first 4 s of
    12 clips, a list of (N,) int16."""
    waves = [F.pad(torch.from_numpy(w), (0, 4 * SAMPLE_RATE - len(w))) for w in waves[:12]]           # cut or extended
    wave = torch.stack(waves).to(next(model.parameters()).device) / 32768                             # (12, N)
    mel = lambda wave: log_mel(wave, window=HANN)             # the usual window: nothing is predicted here
    codes = model.quantizer.vq.encode(model.encoder(wave[:, None]))           # (K, B, T)
    again = {k: model.decoder(model.quantizer.vq.decode(codes[:k]))[:, 0] for k in OFTEN}
    distance = {k: round((mel(out) - mel(wave)).abs().mean().item(), 3) for k, out in again.items()}
    return distance, [round(perplexity(c)) for c in codes]


def backward(model, frozen, wave, counts, phase, envelope, norms, discriminator=None):
    """One batch, wave (B, N), clip i decoded from counts[i] codebooks: leaves gradients on the model's parameters,
    returns the losses by name and, from phase 2 on, the decoded wave. frozen: the encoder as phase 3 found it.

    The graph is cut at the latents and at the output. At each cut every loss's gradient is taken alone, and what
    `balance` makes of them is propagated further.

    phase   losses at the latents    the decoder is given                        and its gradient reaches the latents
      1     envelope                 (it does not run)
      2     envelope                 latents; if counts is 1, a noisy envelope   all it was given
      3                              codes                                       none: the encoder is frozen
      4     unchanged, commitment    codes, of codebooks that `follow`           the envelope only, straight through
    """
    gradients = lambda losses, x: {k: torch.autograd.grad(v, x, retain_graph=True)[0] for k, v in losses.items()}
    with torch.set_grad_enabled(phase != 3):
        latents = model.encoder(wave[:, None])                # (B, C, T)
    leaf = latents.detach().requires_grad_()
    spectral, losses, out = leaf[:, ENVELOPE], {}, None
    if phase < 3:
        losses["envelope"] = (spectral - envelope(wave)).square().mean()
    if phase == 2:
        coarse = (counts == 1)[:, None, None]
        heard = leaf.masked_fill(coarse, 0)
        heard[:, ENVELOPE] = spectral + NOISE * coarse * torch.randn_like(spectral)
        heard[:, COUNT] = count_latents(torch.where(counts == 1, 1, 8))[:, :, None]
    if phase > 2:
        heard, first = quantized(model.quantizer, leaf, counts, adapt=phase == 4)
    if phase == 4:                                            # the envelope adapts, the waveform should stay as it was
        with torch.no_grad():
            as_frozen = frozen(wave[:, None])
        losses["unchanged"] = (leaf - as_frozen)[:, WAVEFORM].square().mean()
        losses["commitment"] = (spectral - first[:, ENVELOPE]).square().mean()                # be near a code
        # straight-through: adds zero, but passes the decoder's gradient at the code on to the encoder's latents
        heard[:, ENVELOPE] += spectral - spectral.detach()
    at_latents = gradients(losses, leaf)
    if phase > 1:
        out = model.decoder(heard)[:, 0]                      # (B, N)
        at_output = {"mel": mel_loss(out, wave), "wave": wave_loss(out, wave, counts > 2),
                     "words": words_loss(out, wave, counts <= 2)}
        if discriminator:
            at_output |= adversarial_losses(discriminator, out, wave)
        out.backward(balance(gradients(at_output, out), norms))
        losses, out = losses | at_output, out.detach()
        at_latents["decoder"] = leaf.grad
    if phase != 3:
        latents.backward(balance(at_latents, norms))
    return losses, out


def parse_arguments():
    parser = argparse.ArgumentParser(usage="%(prog)s [options]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["assets/speech", "assets/music"], help="folders of audio")
    add("--steps", type=int, default=16_000, help="training steps")
    add("--adversarial", type=float, default=1.0, help="fraction of the steps after which the discriminator joins "
        "(1: never); it costs many times the codec's arithmetic: for a GPU")
    add("--batch-size", type=int, default=8)
    add("--frames", type=int, default=48, help="length of a training crop, in 1/75 s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--out", default="out-codec.pt")
    add("--resume", action="store_true", help="go on from OUT.last, written every few minutes, with its options")
    args = parser.parse_args()
    # with fewer steps phases would be left out; 29 frames are one segment of `words_loss`
    if args.steps < 4 or args.batch_size < 1 or args.frames < 29:
        parser.error("--steps must be at least 4, --batch-size 1, --frames 29")
    if Path(args.out).is_dir() or not Path(args.out).parent.is_dir():
        parser.error(f"--out {args.out}: not a file in an existing folder")
    choose_device(args.device)                                # exits in one line if it cannot be used
    return args


def main():
    args = parse_arguments()
    last = Path(f"{args.out}.last")
    for path, or_else in ((last, ", or continue it with --resume"), (Path(args.out), "")):
        if path.exists() and not args.resume:
            sys.exit(f"error: {path} exists: delete it, or choose another --out{or_else}")
    if args.resume:
        try:
            state = torch.load(last, map_location=args.device, weights_only=True)
            vars(args).update(state["options"])
        except Exception:            # a damaged or foreign file makes torch.load raise almost anything
            sys.exit(f"error: --resume: no {last}, or not one that can be read: start again without --resume")
    if args.adversarial < 1 and not hasattr(sys.modules["torchaudio"], "transforms"):
        sys.exit("error: --adversarial needs a torchaudio that loads, and that is one beside a CUDA build of torch")
    try:
        train, held_out = load(args.data)
    except DataError as error:
        sys.exit(f"error: {error}")

    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = True                    # which tokens.py switches off
    torch.set_flush_denormal(True)                            # silence makes denormals, slow on a CPU
    model = build_mini(**SHAPE)
    clips = batch(train, np.random.default_rng(args.seed), 64, SAMPLE_RATE)
    initialise(model, clips)
    envelope = Envelope(clips.to(args.device))
    model.to(args.device)
    average = copy.deepcopy(model).requires_grad_(False)      # the weights' moving average, to measure and export;
    average.quantizer = model.quantizer                       # the codebooks are averages already
    frozen, discriminator = copy.deepcopy(average.encoder), None
    optimizer = torch.optim.AdamW([{"params": half.parameters()} for half in (model.encoder, model.decoder)],
                                  betas=(0.8, 0.99), weight_decay=0.0, fused=True)
    modules = {"model": model, "average": average, "frozen": frozen, "optimizer": optimizer}        # all with a state
    if args.adversarial < 1:
        sizes = [2048, 1024, 512, 256, 128]
        discriminator = msstftd.MultiScaleSTFTDiscriminator(32, n_ffts=sizes, win_lengths=sizes,
                                                            hop_lengths=[n // 4 for n in sizes])
        modules["discriminator"] = discriminator.to(args.device)
        optimizer.add_param_group({"params": discriminator.parameters(), "lr": 3e-4, "betas": (0.5, 0.9),
                                   "weight_decay": 0.01})
    step, phase, began, norms = 0, 1, 0, {}                   # began: the step at which the phase did
    if args.resume:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        vars(envelope).update(state["envelope"])              # another device might flip the sign of its axes
        step, phase, began, norms = state["at"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.steps} steps on {args.device}")

    on_gpu = args.device.startswith("cuda")                   # one process could not make batches fast enough
    # the data set is the steps' numbers; collate_fn makes a batch of each
    batches = torch.utils.data.DataLoader(range(step, args.steps), collate_fn=functools.partial(inputs, train, args),
                                          batch_size=None, pin_memory=on_gpu, num_workers=8 * on_gpu)
    for step, (wave, counts, in_turn) in enumerate(batches, start=step):
        if step % SAVE_EVERY == 0:
            options = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
            save(last, {name: module.state_dict() for name, module in modules.items()}
                 | {"at": (step, phase, began, norms), "envelope": vars(envelope), "options": options})
        torch.manual_seed(args.seed + step)
        if step / args.steps >= PHASES[phase][0]:
            phase, began = phase + 1, step
            if phase == 3:                                    # go on from the averages, and freeze their encoder
                model.load_state_dict(average.state_dict())
                frozen.load_state_dict(average.encoder.state_dict())
                clips = batch(train, np.random.default_rng(args.seed), min(256, 32 * args.batch_size), 4 * SAMPLE_RATE)
                with torch.no_grad():                         # a few clips at a time: bounds memory
                    latents = [frozen(few.to(args.device)).mT.flatten(0, 1) for few in clips[:, None].split(16)]
                fit_codebooks(model.quantizer, torch.cat(latents), ENVELOPE)

        wave, counts = (x.to(args.device, non_blocking=True) for x in (wave, counts))     # pinned: nothing waits
        optimizer.zero_grad()
        listener = discriminator if phase > 1 and step / args.steps > args.adversarial else None
        losses, out = backward(model, frozen, wave, counts, phase, envelope, norms, listener)
        if listener and in_turn:                              # not every step: it learns faster than the codec
            discriminator_loss(discriminator, out, wave).backward()
        end, *rates = PHASES[phase]                           # every phase warms up and cools down
        done = (step - began) / max(1, end * args.steps - began)
        for group, rate in zip(optimizer.param_groups, rates):                # encoder, decoder
            group["lr"] = rate * min(1, (step - began + 1) / 200) * max(0.02, 1 - done ** 2)
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        for mean, now in zip(average.parameters(), model.parameters()):
            mean.lerp_(now.detach(), 1 - min(0.995, step / (step + 10)))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}", *(f" {name} {loss.item():.3f}" for name, loss in losses.items()), flush=True)
        if phase > 2 and (step + 1) % 1000 == 0 or step + 1 == args.steps:
            for name, waves in zip(args.data, held_out):
                print(name, *measure(average, waves), flush=True)
    # what inference needs, in fp16; tokens.py checks the SHA-256
    weights = {k: v.half().cpu() for k, v in average.state_dict().items() if not k.endswith(TRAINING_ONLY)}
    if not all(v.isfinite().all() for v in weights.values()):
        sys.exit("error: the weights are no longer finite: is there nothing but silence in --data?")
    save(args.out, {"config": SHAPE, "weights": weights})
    print(f'wrote {args.out}, MINI_SHA256 = "{hashlib.sha256(Path(args.out).read_bytes()).hexdigest()}"')
    last.unlink(missing_ok=True)                              # nothing is left to continue


if __name__ == "__main__":
    main()
