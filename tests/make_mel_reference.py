"""
make_mel_reference.py: writes mel_reference.npz, what librosa computes for the mel that test_mel.py checks.

librosa is needed here only, never by the project or its tests:

    python -m venv /tmp/librosa && /tmp/librosa/bin/pip install librosa
    /tmp/librosa/bin/python tests/make_mel_reference.py
"""
from pathlib import Path

import librosa
import numpy as np

SAMPLE_RATE, HOP, N_FFT, N_MELS = 24_000, 320, 1024, 80


def chirp(n_samples):
    """A tone rising from 100 Hz to 11 kHz over a little noise, which keeps every band well above the floor."""
    seconds = np.arange(n_samples) / SAMPLE_RATE
    rate = (11_000 - 100) / seconds[-1]                                           # Hz per second
    noise = np.random.default_rng(0).standard_normal(n_samples)
    return (0.5 * np.sin(2 * np.pi * (100 * seconds + rate * seconds ** 2 / 2)) + 0.05 * noise).astype(np.float32)


if __name__ == "__main__":
    filterbank = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, htk=False, norm="slaney")
    wave = chirp(12 * HOP + 100)
    causal = np.pad(wave.astype(np.float64), (N_FFT - HOP, 0))                    # frame t ends at (t+1)*HOP
    spectrum = librosa.stft(causal, n_fft=N_FFT, hop_length=HOP, window="hann", center=False)     # (513, T)
    power = librosa.feature.melspectrogram(S=np.abs(spectrum) ** 2, sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS)
    log_mel = np.log(np.maximum(power, 1e-5)).T                                   # (T, 80)
    np.savez_compressed(Path(__file__).with_name("mel_reference.npz"), filterbank=filterbank.T.astype(np.float32),
                        wave=wave, log_mel=log_mel.astype(np.float32), librosa=librosa.__version__)
    print(f"librosa {librosa.__version__}: filterbank {filterbank.T.shape}, log-mel {log_mel.shape}")
