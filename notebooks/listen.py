"""
listen.py: what the notebooks use to read a file, play a sound and draw a spectrogram.
"""
import base64
import io

import matplotlib.pyplot as plt
import soundfile
import torch
from IPython.display import HTML, display

from data import read_audio
from mel import FRAME_RATE, SAMPLE_RATE, log_mel


def read(path):
    """A whole file as a waveform (N,) at 24 kHz; `read_audio` gives it in pieces."""
    return torch.cat([torch.as_tensor(piece) for piece in read_audio(path)])


def play(**waves):
    """A sound player for each waveform (N,), losslessly packed; its name beside it, "_" as a space."""
    rows = ""
    for name, wave in waves.items():
        file = io.BytesIO()
        soundfile.write(file, wave.numpy().clip(-1, 1), SAMPLE_RATE, format="FLAC")
        sound = base64.b64encode(file.getvalue()).decode()
        player = f"<audio controls src='data:audio/flac;base64,{sound}'></audio>"
        rows += f"<tr><td>{name.replace('_', ' ')}</td><td>{player}</td></tr>"
    display(HTML(f"<table>{rows}</table>"))


def spectrograms(axes, waves, title=""):
    """Draw the log-mel spectrograms of waves, (N,) by name, on as many axes and in one scale.

    Time runs to the right, pitch upwards; louder is brighter. Black is 12 nats or more below the loudest spot.
    """
    mels = [log_mel(wave) for wave in waves.values()]
    loudest = torch.cat(mels).max()
    for axis, name, mel in zip(axes, waves, mels):
        axis.imshow(mel.T, origin="lower", aspect="auto", vmin=loudest - 12, vmax=loudest, cmap="magma",
                    extent=[0, len(mel) / FRAME_RATE, 0, mel.shape[1]])
        axis.set(title=title + name, ylabel="mel band", xlabel="seconds")
        axis.label_outer()
    plt.tight_layout()
