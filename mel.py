"""
mel.py: from a waveform to a causal log-mel spectrogram, every step on the page.

    wave ──frame──▶ 1024 samples ──× Hann──▶ FFT ──|.|²──▶ 513 powers ──× triangles──▶ 80 bands ──log──▶ mel

The one unusual choice is *when* a frame looks. Frame t belongs to samples [t*HOP, (t+1)*HOP), the samples that
one column of codec tokens stands for, and its window ends exactly there:

    samples  -64  0          320          640          960          1280
    frame 2   ├───┼───────────────────────────────────┤             window = wave[-64 : 960], zeros before the clip
              zeros                                   └ (t+1)*HOP = 960: not one sample later

The usual centred window reaches past (t+1)*HOP, into the audio of the token that a model at this position has to
predict. That makes the likelihood look better than it is, and cannot be done while sampling. `lookahead` lets the
window reach past on purpose, to measure how much that leak is worth.

    >>> log_mel(torch.randn(24000)).shape
    torch.Size([75, 80])
"""
import functools
import math

import torch
import torch.nn.functional as F

SAMPLE_RATE = 24_000                 # Hz, EnCodec's
HOP = 8 * 5 * 4 * 2                  # 320 samples: the product of EnCodec's strides
FRAME_RATE = SAMPLE_RATE // HOP      # 75 frames a second, one clock for mel frames, codec tokens and model positions
N_FFT = 1024                         # 42.7 ms window
N_MELS = 80
FLOOR = 1e-5                         # smallest power that enters the logarithm


def hann_window(n_fft):
    """Periodic Hann window, w[n] = 1/2 - 1/2 cos(2 pi n / N). Returns (n_fft,) float32.

    Periodic: N in the denominator, not N - 1, so that copies shifted by N/2 add up to exactly 1.
    """
    n = torch.arange(n_fft, dtype=torch.float64)
    return (0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)).float()


def hz_to_mel(hz):
    """Slaney's mel scale: linear below 1 kHz (3 mel per 200 Hz), logarithmic above (27 mel per factor 6.4).

    Takes and returns a float64 tensor of any shape. Source: Slaney's Auditory Toolbox; librosa's default.
    """
    linear = hz * 3 / 200
    logarithmic = 15 + 27 * torch.log(hz.clamp(min=1000) / 1000) / math.log(6.4)
    return torch.where(hz < 1000, linear, logarithmic)


def mel_to_hz(mel):
    """The inverse of `hz_to_mel`."""
    linear = mel * 200 / 3
    logarithmic = 1000 * torch.exp((mel - 15) * math.log(6.4) / 27)
    return torch.where(mel < 15, linear, logarithmic)


def mel_filterbank(n_fft=N_FFT, n_mels=N_MELS, sample_rate=SAMPLE_RATE):
    """Triangular filters from 0 Hz to Nyquist, equally spaced in mel. Returns (n_fft // 2 + 1, n_mels) float32.

    Filter m rises from edge m to edge m+1 and falls to edge m+2. Slaney's norm divides by half the width in Hz,
    so that every triangle has area 1 and white noise gives a flat mel spectrum.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft        # Hz of each FFT bin
    top = hz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    edges = mel_to_hz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))            # (n_mels + 2,) Hz
    width = edges.diff()                                                                  # (n_mels + 1,)
    rising = (bins[:, None] - edges[:-2]) / width[:-1]                                    # (bins, n_mels)
    falling = (edges[2:] - bins[:, None]) / width[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])).float()


@functools.lru_cache(maxsize=32)
def _constants(n_fft, n_mels, device):
    """Window and filterbank on a device, made once."""
    with torch.inference_mode(False):          # a cached inference tensor could not be used in training later
        return hann_window(n_fft).to(device), mel_filterbank(n_fft, n_mels).to(device)


def frame(wave, n_fft=N_FFT, hop=HOP, lookahead=0):
    """Cut overlapping windows: frame t is wave[(t+1)*hop + lookahead - n_fft : (t+1)*hop + lookahead].

    wave (..., N) -> (..., N // hop, n_fft), a view of the padded wave. Samples before the start and after the end are
    zero. Raises ValueError if lookahead is not in [0, n_fft - hop].
    """
    if not 0 <= lookahead <= n_fft - hop:
        raise ValueError(f"lookahead is {lookahead} samples; it must lie in [0, n_fft - hop] = [0, {n_fft - hop}]")
    n_frames = wave.shape[-1] // hop
    wave = F.pad(wave[..., : n_frames * hop + lookahead], (n_fft - hop - lookahead, lookahead))
    if n_frames == 0:
        return wave.new_zeros(*wave.shape[:-1], 0, n_fft)
    return wave.unfold(-1, n_fft, hop)[..., :n_frames, :]                                 # (..., T, n_fft)


def mel_power(frames, n_mels=N_MELS):
    """Windows of samples to the power in each mel band: (..., T, n_fft) -> (..., T, n_mels)."""
    if frames.numel() == 0:                    # some FFT libraries refuse an empty batch
        return frames.new_zeros(*frames.shape[:-1], n_mels)
    window, filterbank = _constants(frames.shape[-1], n_mels, frames.device)
    at_once = 256 if frames.device.type == "cpu" else frames.shape[-2]        # what fits into a processor's cache
    power = []
    for some in frames.split(at_once, dim=-2):
        spectrum = torch.fft.rfft(some * window)                              # (..., t, n_fft // 2 + 1)
        power.append((spectrum.real.square() + spectrum.imag.square()) @ filterbank)
    return torch.cat(power, dim=-2)


def log_mel(wave, lookahead=0):
    """Causal log-mel spectrogram of a 24 kHz waveform.

    wave (B, N) or (N,) float32 in [-1, 1] -> (B, T, 80) or (T, 80), T = N // 320; raw natural-log power, not
    whitened. Frame t depends on samples before (t+1)*HOP + lookahead only. Differentiable, on any device.
    Raises ValueError for another number of dimensions or a bad lookahead.
    """
    if wave.dim() not in (1, 2):
        raise ValueError(f"log_mel takes a waveform (N,) or (B, N), not a tensor of shape {tuple(wave.shape)}")
    return mel_power(frame(wave, lookahead=lookahead)).clamp(min=FLOOR).log()


class StreamingLogMel:
    """`log_mel` for audio that arrives piece by piece; any split gives the frames of the whole clip.

    `push(samples)` takes (N,) or (B, N), N >= 0 (the same B each time), and returns the (T, 80) or (B, T, 80)
    frames that became complete. It remembers the N_FFT - HOP samples that the next window reaches back to, and
    those of a frame still incomplete. With a lookahead a frame comes so many samples later: push as many zeros at last.
    """

    def __init__(self, lookahead=0):
        self.tail, self.lookahead = None, lookahead

    def push(self, samples):
        if self.tail is None:
            self.tail = samples.new_zeros(*samples.shape[:-1], N_FFT - HOP - self.lookahead)
        wave = torch.cat([self.tail, samples], dim=-1)
        n_frames = max(0, (wave.shape[-1] - (N_FFT - HOP)) // HOP)
        self.tail = wave[..., n_frames * HOP:]
        if n_frames == 0:                      # nothing to unfold
            return samples.new_zeros(*samples.shape[:-1], 0, N_MELS)
        return mel_power(wave.unfold(-1, N_FFT, HOP)).clamp(min=FLOOR).log()
