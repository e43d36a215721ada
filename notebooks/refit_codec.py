"""
refit_codec.py: `mini` with other codebooks: does the mel gain so much because of what the first one describes?

    python notebooks/refit_codec.py whole                     three minutes -> runs/whole-da13ab60.pt
    python notebooks/refit_codec.py waveform
    python notebooks/experiments.py speech music --only codec

The first codebook of `mini` describes the spectral envelope alone (assets/train_codec.py). Here all eight are fitted
anew by k-means, on the same encoder's latents: the first to the `whole` of them, envelope and waveform alike, as an
RVQ usually is, or to the `waveform` alone. The decoder has not been trained for these: they are there to be predicted,
not to be heard.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
from experiments import REFITTED
from mel import SAMPLE_RATE
from model import save
from tokens import MINI, load_codec
from train_codec import SHAPE, WAVEFORM, batch, fit_codebooks, load

FIRST = {"whole": slice(0, SHAPE["dimension"]), "waveform": WAVEFORM}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Fit the codebooks of mini anew.")
    parser.add_argument("first", choices=FIRST, help="what the first codebook describes")
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "assets/speech"), str(ROOT / "assets/music")],
                        help="folders of audio (default: the bundled ones)")
    args = parser.parse_args()
    train, _ = load(args.data)
    model = load_codec("mini").model
    torch.manual_seed(0)
    waves = batch(train, np.random.default_rng(0), 256, 4 * SAMPLE_RATE)
    latents = torch.cat([model.encoder(some).mT.flatten(0, 1) for some in waves[:, None].split(16)])
    fit_codebooks(model.quantizer, latents, FIRST[args.first])
    saved = torch.load(MINI, weights_only=True)
    for name, weight in model.state_dict().items():
        if name.endswith("embed"):
            saved["weights"][name] = weight.half()
    out = ROOT / REFITTED[args.first]
    out.parent.mkdir(exist_ok=True)
    save(out, saved)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
