"""
mel.py: from a waveform to a causal log-mel spectrogram, every step on the page.

    wave ──frame──▶ 1024 samples ──× window──▶ FFT ──|.|²──▶ 513 powers ──× triangles──▶ 80 bands ──log──▶ mel

The FFT splits those 1024 samples into 513 tones, its *bins*, 23 Hz apart, and tells how strong each one is.

Two choices are unusual. One is which samples a frame may see. Frame t belongs to samples [t*HOP, (t+1)*HOP), those that
one column of codec tokens stands for, and its window ends exactly there:

    samples  -64  0          320          640          960          1280
    frame 2   ├───┼───────────────────────────────────┤             segment = wave[-64 : 960], zeros before the clip
              zeros                                   └ (t+1)*HOP = 960: not one sample later

The usual window, 1024 samples centred on the frame's first, reaches 192 samples past (t+1)*HOP, into the audio of the
token that a model at this position has to predict. That makes the likelihood look better than it is, and is
impossible while sampling, when that audio does not exist yet. `lookahead` lets the window reach that far on
purpose, to measure how much the leak is worth.

The other is the shape of the window. A Hann window of 1024 samples gives its end almost no weight, and that is where
the frame's own 320 samples are: they get a tenth of its energy (weights squared). Ours rises for 480 samples and falls
over the last 32: the frame's own samples get 97 %, and earlier frames have covered the rest. The first 512 have weight
zero; they only make the FFT's bins fine enough for the narrow low bands. Low-delay speech coders use such asymmetric
windows, too (ITU-T G.729, 3.2.1, which looks 5 ms ahead; ours does not).

    >>> log_mel(torch.randn(24000)).shape
    torch.Size([75, 80])
"""
import functools
import math

import torch
import torch.nn.functional as F

# After changing these, or what is computed below, raise FORMAT in model.py: old checkpoints cannot tell, and would hear
# another mel than the one they learnt from. Caches notice only the former: for the latter, raise data.py's "format"
SAMPLE_RATE = 24_000                 # Hz, EnCodec's
HOP = 8 * 5 * 4 * 2                  # 320 samples: the product of EnCodec's strides
FRAME_RATE = SAMPLE_RATE // HOP      # 75 a second, without remainder: one clock for mel frames, tokens and positions
N_FFT = 1024                         # samples of a segment, 42.7 ms
N_MELS = 80
WINDOW = (HOP * 3 // 2, HOP // 10)   # (480, 32) samples: how long it rises, then falls, to 0 at the frame's end
HANN = (N_FFT // 2, N_FFT // 2)      # the same for a Hann window
FLOOR = 1e-5                         # smallest power that enters the logarithm


def hann_window(n_fft):
    """Periodic Hann window, w[n] = 1/2 - 1/2 cos(2 pi n / N). Returns (n_fft,) float32.

    Periodic: N in the denominator, not N - 1, so that copies shifted by N/2 add up to exactly 1.
    """
    n = torch.arange(n_fft, dtype=torch.float64)
    return (0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)).float()


def asymmetric_window(n_fft, rise, fall):
    """Zeros, then the rising half of a Hann window of 2 * rise samples, then the falling half of one of 2 * fall.

    Returns (n_fft,) float32. With rise = fall = n_fft / 2 it is the Hann window.
    """
    zeros = torch.zeros(n_fft - rise - fall, dtype=torch.float32)
    return torch.cat([zeros, hann_window(2 * rise)[:rise], hann_window(2 * fall)[fall:]])


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


def mel_filterbank(n_fft=N_FFT, n_mels=N_MELS):
    """Triangular filters from 0 Hz to half the sample rate (Nyquist), equally spaced in mel: (bins, n_mels) float32.

    Filter m rises from edge m to edge m+1 and falls to edge m+2. Slaney's norm divides by half the width in Hz,
    so that every triangle has area 1 and white noise gives a flat mel spectrum.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / n_fft        # Hz of each FFT bin
    top = hz_to_mel(torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64)).item()
    edges = mel_to_hz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))            # (n_mels + 2,) Hz
    width = edges.diff()                                                                  # (n_mels + 1,)
    rising = (bins[:, None] - edges[:-2]) / width[:-1]                                    # (bins, n_mels)
    falling = (edges[2:] - bins[:, None]) / width[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])).float()


@functools.lru_cache(maxsize=32)
def _constants(n_fft, n_mels, window, device):
    """Window and filterbank on a device, made once."""
    with torch.inference_mode(False):          # a cached inference tensor could not be used in training later
        return asymmetric_window(n_fft, *window).to(device), mel_filterbank(n_fft, n_mels).to(device)


def frame(wave, n_fft=N_FFT, hop=HOP, lookahead=0):
    """Cut overlapping segments: frame t's is wave[(t+1)*hop + lookahead - n_fft : (t+1)*hop + lookahead].

    wave (..., N) -> (..., N // hop, n_fft), a view of the padded wave. Samples before the start and after the end are
    zero.
    """
    if wave.shape[-1] < hop:                   # nothing to unfold
        return wave.new_zeros(*wave.shape[:-1], 0, n_fft)
    return F.pad(wave, (n_fft - hop - lookahead, lookahead)).unfold(-1, n_fft, hop)       # (..., T, n_fft)


def mel_power(segments, n_mels=N_MELS, window=None):
    """The power in each mel band of segments of samples: (..., T, n_fft) -> (..., T, n_mels).

    window: (rise, fall) as in `asymmetric_window`; None: the Hann window.
    """
    if segments.numel() == 0:                  # some FFT libraries refuse an empty batch
        return segments.new_zeros(*segments.shape[:-1], n_mels)
    n_fft = segments.shape[-1]
    weights, filterbank = _constants(n_fft, n_mels, tuple(window or (n_fft // 2, n_fft // 2)), segments.device)
    at_once = 256 if segments.device.type == "cpu" else segments.shape[-2]    # as many as fit into a CPU's cache
    bands = []
    for part in segments.split(at_once, dim=-2):
        spectrum = torch.fft.rfft(part * weights)                             # (..., t, n_fft // 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        bands.append(power @ filterbank)                                      # (..., t, n_mels)
    return torch.cat(bands, dim=-2)


def log_mel(wave, lookahead=0, window=WINDOW):
    """Causal log-mel spectrogram of a 24 kHz waveform.

    wave (B, N) or (N,), floats in [-1, 1] -> (B, T, 80) or (T, 80), T = N // 320; raw natural-log power, not
    whitened. Without a lookahead, frame t depends on samples before (t+1)*HOP only. Differentiable, on any device.
    lookahead: for experiments. N > 0: the window ends N samples *past* the frame, and what it sees there is a leak.
        -N: the same window, but the samples past the frame are zero. The difference in score between N and -N is about
        what the leak is worth; the hard edge may itself help or hurt
    window: (rise, fall) as in `asymmetric_window`; HANN for comparing sounds, where nothing is to be predicted
    Raises ValueError for another number of dimensions, for integers, or for a window or lookahead that does not fit
    into 1024 samples.
    """
    if wave.dim() not in (1, 2) or not wave.is_floating_point():
        raise ValueError("log_mel takes a waveform (N,) or (B, N) of floats, not a tensor of shape "
                         f"{tuple(wave.shape)} and {wave.dtype}")
    check_window(lookahead, window)
    return _log_mel(frame(wave, lookahead=max(0, lookahead)), lookahead, window)


def check_window(lookahead, window):
    """Raise ValueError unless window and lookahead fit into a segment, and the window rises and falls."""
    if not abs(lookahead) <= N_FFT - HOP:
        raise ValueError(f"lookahead is {lookahead} samples; it must lie in [-{N_FFT - HOP}, {N_FFT - HOP}]")
    if not (min(window) > 0 and sum(window) <= N_FFT):
        raise ValueError(f"the window rises for {window[0]} samples and falls for {window[1]}; both must be above 0 "
                         f"and their sum at most {N_FFT}")


def _log_mel(segments, lookahead, window):
    """Segments of samples (..., T, 1024) -> (..., T, 80). Every mel, for training and for sampling, is made here.

    With a negative lookahead -N, each segment passed in ends with its frame: cut its first N samples, append N zeros.
    """
    if lookahead < 0:
        segments = F.pad(segments[..., -lookahead:], (0, -lookahead))
    with torch.autocast(segments.device.type, enabled=False):                 # bfloat16 would round the powers
        return mel_power(segments.float(), window=window).clamp(min=FLOOR).log()


class StreamingLogMel:
    """`log_mel` for audio that arrives piece by piece; any split gives the frames of the whole clip, up to rounding.

    `push(samples)` takes (N,) or (B, N), N >= 0 (the same B each time), and returns the (T, 80) or (B, T, 80)
    frames that became complete. It remembers the N_FFT - HOP samples that the next segment reaches back to, and
    those of a frame still incomplete. With lookahead N > 0 each frame is N samples late: push N zeros at the end.
    """

    def __init__(self, lookahead=0, window=WINDOW):
        check_window(lookahead, window)
        self.tail, self.lookahead, self.window = None, lookahead, window

    def push(self, samples):
        if self.tail is None:
            self.tail = samples.new_zeros(*samples.shape[:-1], N_FFT - HOP - max(0, self.lookahead))
        wave = torch.cat([self.tail, samples], dim=-1)
        n_frames = max(0, (wave.shape[-1] - (N_FFT - HOP)) // HOP)
        self.tail = wave[..., n_frames * HOP:].clone()                            # a view would keep all of wave
        # without a whole frame there is nothing to unfold
        segments = wave.unfold(-1, N_FFT, HOP) if n_frames else wave.new_zeros(*wave.shape[:-1], 0, N_FFT)
        return _log_mel(segments, self.lookahead, self.window)
