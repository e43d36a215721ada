"""
refit_codec.py: `mini` with other codebooks, to ask how much of the mel's gain is owed to what its first one describes.

    python notebooks/refit_codec.py                           five minutes on two cores -> runs/whole-da13ab60.pt
    python notebooks/experiments.py speech music --only codec

The first codebook of `mini` describes the spectral envelope alone (assets/train_codec.py). Here all eight are fitted
anew by k-means, on the same encoder's latents, but the first to all of them, waveform and envelope alike, as an RVQ
usually is. The decoder has not been trained for these, so this codec is for predicting codes, not for listening.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
from experiments import WHOLE
from mel import SAMPLE_RATE
from model import save
from tokens import MINI, load_codec
from train_codec import batch, fit_codebooks, load


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Fit mini's codebooks anew, the first to the whole of the latents.")
    parser.add_argument("--data", nargs="+", default=["assets/speech", "assets/music"],
                        help="folders of audio (default: %(default)s)")
    args = parser.parse_args()
    train, _ = load(args.data)
    model = load_codec("mini").model
    torch.manual_seed(0)
    waves = batch(train, np.random.default_rng(0), 256, 4 * SAMPLE_RATE)
    latents = torch.cat([model.encoder(some).mT.flatten(0, 1) for some in waves[:, None].split(16)])
    fit_codebooks(model.quantizer, latents, whole=True)
    saved = torch.load(MINI, weights_only=True)
    for name, weight in model.state_dict().items():
        if name.endswith("embed"):
            saved["weights"][name] = weight.half()
    (ROOT / WHOLE).parent.mkdir(exist_ok=True)
    save(ROOT / WHOLE, saved)
    print(f"wrote {WHOLE}")


if __name__ == "__main__":
    main()
