"""
python -m pytest tests/test_mel.py

The log-mel equals other people's, looks exactly as far as it says, and is the same whole or in pieces. librosa's
figures are in mel_reference.npz, made by make_mel_reference.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mel
from mel import (FLOOR, HANN, HOP, N_FFT, N_MELS, SAMPLE_RATE, WINDOW, StreamingLogMel, asymmetric_window, frame,
                 hann_window, hz_to_mel, log_mel, mel_filterbank, mel_to_hz)

REFERENCE = np.load(Path(__file__).with_name("mel_reference.npz"))


def random_wave(*shape):
    return 0.3 * torch.randn(*shape)


def changed_frames(wave, start, stop, lookahead=0):
    """Which frames notice that samples [start, stop) become others."""
    other = wave.clone()
    other[start:stop] = random_wave(len(other[start:stop]))
    changed = (log_mel(wave, lookahead) != log_mel(other, lookahead)).any(-1)
    return changed.nonzero().flatten().tolist()


def pieces(wave, cuts):
    """wave[..., N] cut at the given sample positions."""
    bounds = [0, *sorted(cuts), wave.shape[-1]]
    return [wave[..., a:b] for a, b in zip(bounds, bounds[1:])]


# ----------------------------------------------------------------------------- the numbers

@pytest.mark.parametrize("n_frames", [20, 600])                     # 600: more than a CPU transforms at once
@pytest.mark.parametrize("window", [WINDOW, HANN, (1023, 1), (100, 200)])
def test_log_mel_equals_torch_stft_of_the_same_frames(window, n_frames):
    wave = random_wave(2, n_frames * HOP + 17)
    padded = torch.cat([torch.zeros(2, N_FFT - HOP), wave], dim=-1)
    weights = torch.hann_window(N_FFT, periodic=True) if window == HANN else asymmetric_window(N_FFT, *window)
    spectrum = torch.stft(padded, N_FFT, HOP, window=weights, center=False, return_complex=True)     # (2, 513, T)
    expected = (spectrum.abs().square().mT @ mel_filterbank()).clamp(min=FLOOR).log()
    assert log_mel(wave, window=window).shape == expected.shape == (2, n_frames, N_MELS)
    assert (log_mel(wave, window=window) - expected).abs().max() < 1e-4


def test_log_mel_equals_librosa_of_the_same_frames():
    expected = torch.from_numpy(REFERENCE["log_mel"])
    ours = log_mel(torch.from_numpy(REFERENCE["wave"]), window=HANN)
    assert ours.shape == expected.shape
    assert expected.min() > math.log(FLOOR)                # no figure agrees only because both are at the floor
    assert (ours - expected).abs().max() < 1e-4


def test_filterbank_equals_librosas_slaney_filterbank():
    filterbank, expected = mel_filterbank(), torch.from_numpy(REFERENCE["filterbank"])
    assert filterbank.shape == expected.shape == (N_FFT // 2 + 1, N_MELS)
    assert (filterbank - expected).abs().max() < 1e-5 * expected.max()      # its largest weight is only 0.03


@pytest.mark.parametrize("n_fft, n_mels", [(1024, 80), (512, 20), (64, 80), (2048, 1)])
def test_a_band_is_the_sum_of_all_powers_weighted_by_its_triangle(n_fft, n_mels):
    segments = torch.randn(3, 300, n_fft)                  # (64, 80): the lowest triangles hold no bin
    power = torch.fft.rfft(segments * hann_window(n_fft)).abs().square()
    assert torch.allclose(mel.mel_power(segments, n_mels), power @ mel_filterbank(n_fft, n_mels), rtol=1e-4, atol=1e-6)


def test_mel_scale_is_librosas_and_its_inverse_undoes_it():
    hz = torch.linspace(0, 12_000, 1000, dtype=torch.float64)
    assert (mel_to_hz(hz_to_mel(hz)) - hz).abs().max() < 1e-8
    assert hz_to_mel(torch.tensor([200.0, 1000.0, 6400.0]).double()).tolist() == pytest.approx([3, 15, 42])


def test_the_window_rises_slowly_and_falls_fast_and_is_hanns_if_it_does_both_for_as_long():
    rise, fall = WINDOW
    window = asymmetric_window(N_FFT, rise, fall)
    assert window.shape == (N_FFT,) and (window[:-rise - fall + 1] == 0).all() and window[-fall] == 1
    assert (window[-rise - fall:].diff()[:rise] > 0).all() and (window[-fall:].diff() < 0).all()
    assert window[-fall // 2] == pytest.approx(0.5) and window[-fall - rise // 2] == pytest.approx(0.5)
    assert torch.equal(asymmetric_window(N_FFT, *HANN), hann_window(N_FFT))


def test_a_frame_hears_mostly_its_own_samples_and_with_hanns_window_hardly():
    def share(window):
        energy = asymmetric_window(N_FFT, *window).square()
        return (energy[-HOP:].sum() / energy.sum()).item()
    assert share(WINDOW) == pytest.approx(0.974, abs=0.002) and share(HANN) == pytest.approx(0.10, abs=0.01)


def test_hann_window_is_periodic_and_its_half_shifted_copies_add_up_to_one():
    window = hann_window(N_FFT)
    assert (window - torch.hann_window(N_FFT, periodic=True)).abs().max() < 1e-6
    assert (window - torch.hann_window(N_FFT, periodic=False)).abs().max() > 1e-4
    assert (window[: N_FFT // 2] + window[N_FFT // 2:] - 1).abs().max() < 1e-6


def test_silence_is_the_floor_in_every_band():
    assert (log_mel(torch.zeros(2, 10 * HOP)) - math.log(1e-5)).abs().max() < 1e-6


def test_a_tone_of_1_khz_peaks_in_the_band_centred_nearest_to_1_khz():
    edges = mel_to_hz(torch.linspace(0, hz_to_mel(torch.tensor(12_000.0)).item(), N_MELS + 2))
    nearest = (edges[1:-1] - 1000).abs().argmin()
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(20 * HOP) / SAMPLE_RATE)
    interior = log_mel(tone)[4:]                           # earlier windows hold some of the zeros before the start
    assert (interior.argmax(-1) == nearest).all()


# ----------------------------------------------------------------------------- when a frame looks

def test_a_frame_sees_as_many_samples_as_its_window_has_and_none_before():
    wave = random_wave(20 * HOP)
    assert torch.equal(frame(wave)[10], wave[11 * HOP - N_FFT: 11 * HOP])
    assert torch.equal(frame(wave)[0, :-HOP], torch.zeros(N_FFT - HOP))
    for window in (WINDOW, HANN, (200, 300)):
        start = 11 * HOP - sum(window)
        other = torch.cat([random_wave(start), wave[start:]])
        same = (log_mel(wave, window=window) == log_mel(other, window=window)).all(-1)
        assert same[10] and not same[:10].all()


@pytest.mark.parametrize("lookahead", [0, 192, 352, 512, 704])
def test_a_frame_sees_its_own_last_sample_and_as_many_later_ones_as_it_looks_ahead(lookahead):
    wave = random_wave(20 * HOP)
    for t in (0, 1, 2, 3, 10):
        end = (t + 1) * HOP + lookahead
        assert min(changed_frames(wave, end, len(wave), lookahead)) == t + 1
        assert t in changed_frames(wave, end - 40, end, lookahead)    # 40: the window is near zero at its end
        assert torch.equal(frame(wave, lookahead=lookahead)[t, -HOP:], wave[end - HOP:end])      # without a window


@pytest.mark.parametrize("lookahead", [192, 352, 512])
def test_lookahead_is_the_causal_mel_of_the_audio_that_many_samples_later(lookahead):
    wave = random_wave(2, 20 * HOP)
    ahead, later = log_mel(wave, lookahead=lookahead), log_mel(wave[:, lookahead:])
    interior = slice(3, 18)                                # not where one of them sees the zeros outside the clip
    assert (ahead[:, interior] - later[:, interior]).abs().max() < 1e-5
    assert (ahead - log_mel(wave)).abs().max() > 0.1


@pytest.mark.parametrize("lookahead", [192, 352, 512])
@pytest.mark.parametrize("window", [WINDOW, HANN])
def test_a_negative_lookahead_is_the_same_window_deaf_to_what_lies_past_the_frame(lookahead, window):
    wave, other = random_wave(20 * HOP), random_wave(20 * HOP)
    silent = wave.clone()
    for t in (0, 1, 10):
        silent[(t + 1) * HOP:] = 0
        other[:(t + 1) * HOP] = wave[:(t + 1) * HOP]
        cut = log_mel(wave, -lookahead, window)[t]
        assert (cut - log_mel(silent, lookahead, window)[t]).abs().max() < 1e-5
        assert torch.equal(cut, log_mel(other, -lookahead, window)[t])                  # the future does not matter
        silent = wave.clone()


def test_lookahead_past_the_end_of_the_clip_sees_zeros():
    wave = random_wave(5 * HOP)
    longer = torch.cat([wave, torch.zeros(2 * HOP)])
    assert torch.equal(log_mel(wave, lookahead=512), log_mel(longer, lookahead=512)[:5])


@pytest.mark.parametrize("lookahead", [-705, N_FFT - HOP + 1, 100_000])
def test_a_lookahead_outside_the_window_is_refused(lookahead):
    with pytest.raises(ValueError, match=rf"lookahead is {lookahead} .*\[-704, 704\]"):
        log_mel(random_wave(10 * HOP), lookahead=lookahead)


@pytest.mark.parametrize("window", [(0, 64), (448, 0), (-1, 64), (960, 65)])
def test_a_window_that_does_not_rise_and_fall_or_fit_is_refused(window):
    for make in (lambda: log_mel(random_wave(10 * HOP), window=window), lambda: StreamingLogMel(window=window)):
        with pytest.raises(ValueError, match=f"rises for {window[0]} samples and falls for {window[1]}; .* 1024"):
            make()


# ----------------------------------------------------------------------------- shapes, batches, gradients

@pytest.mark.parametrize("n", [0, 1, 319, 320, 321, 639, 640, 1024, 24_000, 24_319])
@pytest.mark.parametrize("lookahead", [0, 192, 512])
def test_a_clip_has_one_frame_for_every_whole_320_samples(n, lookahead):
    assert log_mel(random_wave(n), lookahead).shape == (n // 320, 80)
    assert log_mel(random_wave(3, n), lookahead).shape == (3, n // 320, 80)


def test_samples_after_the_last_whole_frame_change_nothing():
    wave = random_wave(5 * HOP + 319)
    assert torch.equal(log_mel(wave), log_mel(wave[:5 * HOP]))


def test_a_batch_is_its_clips_one_by_one():
    wave = random_wave(4, 15 * HOP + 7)
    batch = log_mel(wave)
    for b, clip in enumerate(wave):
        assert (log_mel(clip) - batch[b]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(), (1, 2, 640)])
def test_a_waveform_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="takes a waveform"):
        log_mel(torch.zeros(shape))


def test_a_waveform_may_be_of_float64_but_not_of_integers():
    wave = random_wave(5 * HOP)
    assert torch.equal(log_mel(wave.double()), log_mel(wave))
    assert torch.equal(StreamingLogMel().push(wave.double()), StreamingLogMel().push(wave))
    with pytest.raises(ValueError, match="of floats, .* torch.int16"):
        log_mel(wave.mul(32767).short())


@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_gradient_reaches_the_waveform_and_is_finite_also_in_silence(scale):
    wave = (scale * torch.randn(2, 10 * HOP)).requires_grad_()
    log_mel(wave).sum().backward()
    assert wave.grad.isfinite().all()
    assert (wave.grad.abs().amax(-1) > 0).all() or scale == 0.0


def test_log_mel_can_be_trained_through_after_use_in_inference_mode():
    mel._constants.cache_clear()                           # so that window and filterbank are made in inference mode
    with torch.inference_mode():
        log_mel(random_wave(HOP))
    wave = random_wave(2 * HOP).requires_grad_()
    log_mel(wave).sum().backward()
    assert wave.grad.abs().sum() > 0


# ----------------------------------------------------------------------------- streaming

@pytest.mark.parametrize("shape", [(30 * HOP + 100,), (3, 30 * HOP + 100)])
@pytest.mark.parametrize("n_cuts", [0, 1, 7, 200])
def test_streaming_in_any_split_equals_the_whole_clip(shape, n_cuts):
    wave = random_wave(*shape)
    cuts = torch.randint(0, wave.shape[-1] + 1, (n_cuts,)).tolist()
    if n_cuts == 7:
        cuts += [0, 0, 320, 320, 321, wave.shape[-1]]      # pushes of nothing, of one sample, of exactly one frame
    stream = StreamingLogMel()
    streamed = torch.cat([stream.push(piece) for piece in pieces(wave, cuts)], dim=-2)
    assert streamed.shape == log_mel(wave).shape
    assert (streamed - log_mel(wave)).abs().max() < 1e-5


@pytest.mark.parametrize("lookahead", [1, 192, 352, 704, -192, -704])
def test_streaming_with_a_lookahead_equals_the_whole_clip_once_zeros_follow(lookahead):
    wave, stream, later = random_wave(30 * HOP + 100), StreamingLogMel(lookahead), torch.zeros(max(0, lookahead))
    streamed = torch.cat([stream.push(piece) for piece in (*pieces(wave, [1, 500, 5000]), later)])
    assert len(streamed) - 30 in (0, 1, 2)                    # frames that end in the zeros may be one too many
    assert (streamed[:30] - log_mel(wave, lookahead)).abs().max() < 1e-5


def test_streaming_returns_a_frame_as_soon_as_its_last_sample_arrives():
    stream = StreamingLogMel()
    assert stream.push(random_wave(0)).shape == (0, N_MELS)
    assert stream.push(random_wave(319)).shape == (0, N_MELS)
    assert stream.push(random_wave(1)).shape == (1, N_MELS)
    assert stream.push(random_wave(640)).shape == (2, N_MELS)


def test_streaming_for_an_hour_remembers_no_more_than_a_window():
    stream = StreamingLogMel()
    for n in (1, 5000, 319, 24_000, 7):
        stream.push(random_wave(2, n))
        assert stream.tail.untyped_storage().nbytes() < 2 * N_FFT * 4             # no view of something longer


def test_streaming_keeps_to_its_window():
    wave = random_wave(10 * HOP)
    assert (StreamingLogMel(window=HANN).push(wave) - log_mel(wave, window=HANN)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inside_autocast_a_mel_is_the_same(dtype):
    loud = torch.ones(24_000)                                 # in float16 its power would be infinite
    with torch.autocast("cpu", dtype):
        heard = log_mel(loud)
    assert torch.equal(heard, log_mel(loud))


def test_the_window_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert asymmetric_window(1024, 480, 32).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
