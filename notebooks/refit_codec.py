"""
refit_codec.py: `mini` with another first codebook: does the mel gain so much because of what `mini`'s describes?

    python notebooks/refit_codec.py late --data FOLDER ...    ten minutes -> runs/late-da13ab60.pt
    python notebooks/experiments.py speech music --only codec

The first codebook of `mini` describes the spectral envelope alone. It was taught the envelope through a Hann window of
1024 samples, which ends with the code's own 320 samples and is nearly deaf there (assets/train_codec.py). Here all
codebooks are refitted by k-means, the first one to other latents of a frame:

    whole       all of them, envelope and waveform alike, as is usual for an RVQ
    waveform    those of the waveform
    hann        those of the envelope, through `mini`'s own window: the baseline for the next
    late        the envelope through mel.py's window: that of the code's own, latest samples
    plain       as late, but nothing of the previous envelope is subtracted (see `Envelope`)

For the last three, `mini`'s encoder is first trained further, to write that envelope into its latents. The decoder is
not trained for any of these codes: they are for predicting, not for listening. Except with

    hann-decoder, late-decoder      the same codes, and a decoder trained for them: for models that hear decoded sound
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
from data import DataError
from experiments import REFITTED
from mel import HANN, HOP, SAMPLE_RATE, WINDOW
from model import save
from tokens import MINI, load_codec
from train_codec import ENVELOPE, SHAPE, WAVEFORM, WHITEN, Envelope, backward, batch, fit_codebooks, load, measure

FIRST = {"whole": slice(0, SHAPE["dimension"]), "waveform": WAVEFORM}
ENVELOPES = {"hann": (HANN, WHITEN), "late": (WINDOW, WHITEN), "plain": (WINDOW, 0.0)}
STEPS, DECODER_STEPS = 800, 2000


def teach_envelope(encoder, train, envelope):
    """Train the encoder to write an `Envelope` into its latents; print how much of its variance is missed."""
    optimizer = torch.optim.AdamW(encoder.requires_grad_(True).parameters(), weight_decay=0.0)
    missed = []
    for step in range(STEPS):
        wave = batch(train, np.random.default_rng((1, step)), 8, 48 * HOP)
        target = envelope(wave)
        loss = F.mse_loss(encoder(wave[:, None])[:, ENVELOPE], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / STEPS)
        optimizer.step()
        missed.append(loss.item() / target.var((0, 2)).mean().item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  {np.mean(missed[-100:]):.3f} of the envelope's variance missed", flush=True)
    encoder.requires_grad_(False)


def teach_decoder(model, train):
    """Train `mini`'s decoder further, with the losses of train_codec.py's phase 3, but for eight new codebooks always
    (and so without `words_loss`, which is for clips of one or two)."""
    optimizer = torch.optim.AdamW(model.decoder.requires_grad_(True).parameters(), betas=(0.8, 0.99), weight_decay=0.0)
    norms = {}
    for step in range(DECODER_STEPS):
        wave = batch(train, np.random.default_rng((2, step)), 8, 48 * HOP)
        optimizer.zero_grad()
        losses, _ = backward(model, None, wave, torch.full((len(wave),), 8), 3, None, norms)
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 200) * (1 - step / DECODER_STEPS)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  mel loss {losses['mel'].item():.3f}", flush=True)
    model.decoder.requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description="Refit the codebooks of mini.")
    parser.add_argument("first", choices=REFITTED, help="what the first codebook describes")
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "assets/speech"), str(ROOT / "assets/music")],
                        help="folders of audio (default: the bundled ones)")
    args = parser.parse_args()
    try:
        train, held_out = load(args.data)
    except DataError as error:
        sys.exit(f"error: {error}")
    first, _, decoder = args.first.partition("-")
    model = load_codec("mini").model
    torch.manual_seed(0)
    torch.set_flush_denormal(True)                            # silence makes denormals, slow on a CPU
    waves = batch(train, np.random.default_rng(0), 256, 4 * SAMPLE_RATE)
    if first in ENVELOPES:
        teach_envelope(model.encoder, train, Envelope(waves[:64], *ENVELOPES[first]))
    with torch.no_grad():
        latents = torch.cat([model.encoder(some).mT.flatten(0, 1) for some in waves[:, None].split(16)])
    fit_codebooks(model.quantizer, latents, FIRST.get(first, ENVELOPE))
    if decoder:
        teach_decoder(model, train)
        for folder, clips in zip(args.data, held_out):
            for name, codec in (("mini", load_codec("mini").model), (args.first, model)):
                print(folder, name, *measure(codec, clips), flush=True)
    saved = torch.load(MINI, weights_only=True)
    saved["weights"] = {name: weight.half() for name, weight in model.state_dict().items() if name in saved["weights"]}
    out = ROOT / REFITTED[args.first]
    out.parent.mkdir(exist_ok=True)
    save(out, saved)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
