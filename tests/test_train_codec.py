"""The codec's training: python -m pytest tests/test_train_codec.py"""
import copy
import functools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assets"))

import tokens                                                      # noqa: E402
import train_codec                                                 # noqa: E402
from encodec import msstftd                                        # noqa: E402


@pytest.fixture(scope="module")
def speech():
    """Four seconds from each of eight bundled clips, (8, 96000)."""
    paths = sorted((ROOT / "assets/speech/val").glob("*.ogg"))[:8]
    return torch.stack([torch.from_numpy(soundfile.read(path, dtype="float32")[0][:96_000]) for path in paths])


@pytest.fixture
def small(monkeypatch):
    """small(waveform, envelope): from here on so many latents are for each, and 4 for the count, 16 in all."""
    def small(waveform, envelope):
        borders = waveform, waveform + envelope, waveform + envelope + 4
        for name, start, stop in zip(("WAVEFORM", "ENVELOPE", "COUNT"), (0, *borders), borders):
            monkeypatch.setattr(train_codec, name, slice(start, stop))
        monkeypatch.setattr(train_codec, "SHAPE", dict(n_filters=4, dimension=borders[-1], lstm=1))
        return tokens.build_mini(**train_codec.SHAPE)
    return small


@torch.no_grad()
def test_an_initialised_but_untrained_codec_passes_the_waveform(speech):
    model = tokens.build_mini(n_filters=16, dimension=132, lstm=1)

    def correlation():
        out = model.decoder(model.encoder(speech[:, None]))
        return torch.corrcoef(torch.stack([out.flatten(), speech.flatten()]))[0, 1].item()

    assert abs(correlation()) < 0.2                                                     # PyTorch's own weights
    train_codec.initialise(model, speech)
    assert correlation() > 0.5


@torch.no_grad()
def test_clips_are_quantised_by_as_many_codebooks_as_asked(small):
    quantizer, latents = small(8, 4).quantizer, torch.randn(4, 16, 100)
    train_codec.fit_codebooks(quantizer, torch.randn(20_000, 16), train_codec.ENVELOPE, rounds=1)
    codes = quantizer.vq.encode(latents)                                                # (8, 4, 100)
    expected = [quantizer.vq.decode(codes[:k, i:i + 1])[0] for i, k in enumerate((1, 2, 4, 8))]
    quantised, first = train_codec.quantized(quantizer, latents, torch.tensor([1, 2, 4, 8]), adapt=False)
    torch.testing.assert_close(quantised, torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(first, quantizer.vq.decode(codes[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("phase", [1, 2, 3, 4])
def test_each_phase_teaches_the_parts_it_is_about(speech, small, phase):
    model = small(10, 2)
    train_codec.initialise(model, speech)
    envelope, before = train_codec.Envelope(speech), copy.deepcopy(model.encoder)
    train_codec.fit_codebooks(model.quantizer, torch.randn(2000, 16), train_codec.ENVELOPE, rounds=1)
    books = [layer._codebook.embed.clone() for layer in model.quantizer.vq.layers]
    counts = torch.tensor([1, 2, 4, 8] * 2)
    _, out = train_codec.backward(model, before, speech[:, :9600], counts, phase, envelope, {})
    halves = {"encoder": model.encoder, "decoder": model.decoder}
    learns = {name for name, half in halves.items() if any(p.grad is not None for p in half.parameters())}
    assert learns == {1: {"encoder"}, 2: {"encoder", "decoder"}, 3: {"decoder"}, 4: {"encoder", "decoder"}}[phase]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (out is None) if phase == 1 else out.shape == (8, 9600)
    moved = [not torch.equal(layer._codebook.embed, book) for layer, book in zip(model.quantizer.vq.layers, books)]
    assert all(moved) if phase == 4 else not any(moved)


def test_codebooks_follow_what_is_assigned_to_them_and_rare_codes_start_anew(small):
    quantizer = small(0, 12).quantizer
    latents = lambda n, mean: F.pad(torch.randn(1, 12, n) + mean, (0, 0, 0, 4))           # (1, 16, n)
    train_codec.fit_codebooks(quantizer, latents(4000, 0)[0].T, train_codec.ENVELOPE, rounds=2)
    shifted = latents(400, 4)

    def error():
        quantised, _ = train_codec.quantized(quantizer, shifted, torch.tensor([1]), adapt=False)
        return (quantised - shifted)[:, :12].square().mean()
    before = error()
    for _ in range(300):
        train_codec.quantized(quantizer, latents(400, 4), torch.tensor([1]), adapt=True)
    assert error() < 0.2 * before
    codes = quantizer.vq.encode(latents(4000, 4))[0]
    assert train_codec.perplexity(codes) > 200


@torch.no_grad()
def test_the_first_codebook_says_nothing_but_the_envelope(small):
    quantizer, latents = small(8, 4).quantizer, torch.randn(4, 16, 500)
    train_codec.fit_codebooks(quantizer, latents.mT.flatten(0, 1), train_codec.ENVELOPE, rounds=4)
    for _ in range(20):
        train_codec.quantized(quantizer, latents, torch.tensor([1, 2, 4, 8]), adapt=True)
    first, second = (layer._codebook.embed for layer in quantizer.vq.layers[:2])
    assert not first[:, :8].any() and first[:, 8:12].abs().min(1).values.gt(0).all() and second[:, :8].any()
    other = torch.cat([torch.randn(4, 8, 500), latents[:, 8:]], dim=1)                  # another waveform
    assert torch.equal(quantizer.vq.encode(other)[0], quantizer.vq.encode(latents)[0])


@torch.no_grad()
def test_the_decoder_is_told_how_many_codebooks_it_hears(small):
    quantizer, latents = small(8, 4).quantizer, torch.randn(4, 16, 300)
    train_codec.fit_codebooks(quantizer, latents.mT.flatten(0, 1), train_codec.ENVELOPE, rounds=2)
    train_codec.quantized(quantizer, latents, torch.tensor([1, 2, 4, 8]), adapt=True)
    codes = quantizer.vq.encode(latents)
    for k in range(1, 9):
        heard = quantizer.vq.decode(codes[:k])[:, train_codec.COUNT]                       # (4, 4, 300)
        expected = torch.tensor([k > 0, k > 1, k > 2, k > 4]) / 4
        torch.testing.assert_close(heard, expected[:, None].expand_as(heard), atol=1e-5, rtol=0)


def test_words_are_lost_when_bands_no_longer_move_as_they_did(speech):
    every = torch.ones(8, dtype=torch.bool)
    loss = lambda out: train_codec.words_loss(out, speech, every).item()
    noisy = [loss(speech + level * torch.randn_like(speech)) for level in (0, 0.003, 0.03, 0.3)]
    assert noisy == sorted(noisy) and noisy[0] < 0.15 and noisy[-1] > 0.5      # what is silent correlates with nothing
    assert loss(0.5 * speech) == pytest.approx(noisy[0], abs=0.03)
    assert train_codec.words_loss(0 * speech, speech, ~every) == 0
    some = torch.arange(8) % 3 == 0                                                     # the others do not count
    noisy = speech + 0.03 * torch.randn_like(speech)
    alone = train_codec.words_loss(noisy[some], speech[some], every[:3])
    torch.testing.assert_close(train_codec.words_loss(noisy, speech, some), alone, atol=1e-5, rtol=0)


def test_k_means_leaves_less_over_with_every_codebook_and_uses_all_codes(small, capsys):
    quantizer, latents = small(0, 12).quantizer, torch.randn(4000, 16)
    latents[:, 12:] = 0
    train_codec.fit_codebooks(quantizer, latents, train_codec.ENVELOPE, rounds=4)
    left = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(left) == 8 and left == sorted(left, reverse=True) and left[-1] < 0.3 * left[0]
    codes = train_codec.nearest(latents, quantizer.vq.layers[0]._codebook.embed)
    assert train_codec.perplexity(codes) > 700


def test_the_envelope_can_be_added_up_to_most_of_the_log_mel_it_was_taken_from(speech):
    envelope = train_codec.Envelope(speech)
    target = envelope(speech)                                                           # (8, 16, 300)
    assert target.shape == (8, 16, 300) and target[..., 1:].var((0, 2)).sum() == pytest.approx(1, rel=1e-3)
    frames, frame = [], torch.zeros(8, 16)
    for t in range(300):                                                                # undo the difference
        frame = target[..., t] + train_codec.WHITEN * frame
        frames.append(frame / envelope.scale @ envelope.basis.T + envelope.mean)
    bands = train_codec.log_bands(speech, 1024, 80, 320, floor=3e-4)                    # (8, 300, 80)
    assert (torch.stack(frames, 1) - bands).square().mean() < 0.1 * bands.var((0, 1)).mean()


def test_the_balancer_gives_each_gradient_its_share_whatever_its_scale():
    ones, step = torch.ones(4, 1000), torch.arange(1000).expand(4, -1) % 2 * 2.0 - 1
    gradient = train_codec.balance({"mel": 1000 * ones, "wave": 1e-3 * step}, norms={})
    share = {name: (gradient * way).sum(1).abs().mean() for name, way in (("mel", ones), ("wave", step))}
    weights = train_codec.WEIGHTS
    assert share["mel"] / share["wave"] == pytest.approx(weights["mel"] / weights["wave"], rel=1e-3)


class Spectrogram(torch.nn.Module):
    """What encodec.msstftd uses of torchaudio.transforms.Spectrogram, which a CPU build of torch cannot load."""

    def __init__(self, n_fft, hop_length, window_fn, **_):
        super().__init__()
        self.n_fft, self.hop_length, self.window = n_fft, hop_length, window_fn(n_fft)

    def forward(self, x):
        spectrum = torch.stft(x.flatten(0, 1).float(), self.n_fft, self.hop_length, window=self.window, center=False,
                              return_complex=True)
        return spectrum.view(*x.shape[:2], *spectrum.shape[1:]) / self.n_fft ** 0.5


def test_training_with_a_discriminator_writes_a_codec_and_resumes(tmp_path, monkeypatch, small, speech, capsys):
    small(10, 2)
    monkeypatch.setattr(sys.modules["torchaudio"], "transforms", types.SimpleNamespace(Spectrogram=Spectrogram),
                        raising=False)
    tiny = functools.partial(msstftd.MultiScaleSTFTDiscriminator, 2)
    monkeypatch.setattr(msstftd, "MultiScaleSTFTDiscriminator", lambda _, **sizes: tiny(**sizes))
    monkeypatch.setattr(train_codec, "fit_codebooks", functools.partial(train_codec.fit_codebooks, rounds=2))
    for i, wave in enumerate(speech):
        path = tmp_path / "audio" / ("val" if i < 2 else "train") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave.numpy(), 24_000)
    steps, backward, models = [], train_codec.backward, []

    def recorded(*args):
        models.append(args[0])
        if len(steps) == 7 and out.name == "other.pt":
            raise KeyboardInterrupt
        steps.append(backward(*args))
        return steps[-1]
    monkeypatch.setattr(train_codec, "backward", recorded)

    def train(*options):
        monkeypatch.setattr(sys, "argv", ["train_codec.py", "--device", "cpu", "--out", str(out), *options])
        train_codec.main()
    options = ["--data", str(tmp_path / "audio"), "--batch-size", "1", "--adversarial", "0.3", "--steps", "10"]
    out = whole = tmp_path / "codec.pt"
    train(*options)
    assert len(steps) == 10
    assert {name for losses, _ in steps for name in losses} == set(train_codec.WEIGHTS) - {"decoder"}
    name = "decoder.model.0.conv.conv.weight"                 # what is written is an average of the last steps' weights
    written, now = torch.load(out, weights_only=True)["weights"][name], models[-1].state_dict()[name]
    assert 0 < (written - now).abs().max() < 0.1 * now.abs().max() and not torch.equal(written, now.half())
    # interrupted in the middle of phase 4, and resumed, with the options that it had
    steps, out = [], tmp_path / "other.pt"
    monkeypatch.setattr(train_codec, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        train(*options)
    assert torch.load(f"{out}.last", weights_only=True)["at"][:2] == (7, 4)
    steps.append("one more")
    train("--resume")
    assert not Path(f"{out}.last").exists()
    one, two = (torch.load(path, weights_only=True)["weights"] for path in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    codec = tokens.load_codec(str(out))
    assert codec.decode(codec.encode(speech[:1])).isfinite().all()
    assert tokens.hashlib.sha256(out.read_bytes()).hexdigest() in capsys.readouterr().out


def test_from_silence_alone_no_codec_is_made(tmp_path, monkeypatch, small):
    small(10, 2)
    monkeypatch.setattr(train_codec, "fit_codebooks", functools.partial(train_codec.fit_codebooks, rounds=1))
    for side in ("train", "val"):
        (tmp_path / side).mkdir()
        soundfile.write(tmp_path / side / "silence.wav", torch.zeros(24_000), 24_000)
    out = tmp_path / "codec.pt"
    monkeypatch.setattr(sys, "argv", ["train_codec.py", "--device", "cpu", "--data", str(tmp_path), "--out", str(out),
                                      "--steps", "4", "--batch-size", "1", "--frames", "29"])
    with pytest.raises(SystemExit, match="no longer finite: is there nothing but silence in --data"):
        train_codec.main()
    assert not out.exists()


def test_resuming_without_a_state_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_codec.py", "--resume", "--out", str(tmp_path / "no.pt")])
    with pytest.raises(SystemExit, match="no .*no.pt.last, or not one that can be read"):
        train_codec.main()
    (tmp_path / "no.pt.last").write_bytes(b"PK half a file")
    with pytest.raises(SystemExit, match="no .*no.pt.last, or not one that can be read"):
        train_codec.main()


@pytest.mark.parametrize("options, words", [(["--steps", "0"], "--steps"), (["--steps", "nan"], "--steps"),
                                            (["--batch-size", "0"], "--batch-size"), (["--frames", "28"], "--frames"),
                                            (["--out", "nowhere/codec.pt"], "not a file in an existing folder"),
                                            (["--out", "."], "not a file in an existing folder")])
def test_a_bad_option_is_one_clear_line(monkeypatch, tmp_path, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_codec.py", *options])
    with pytest.raises(SystemExit, match="2"):
        train_codec.main()
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it could be used here")
def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_codec.py", "--device", "cuda", "--out", str(tmp_path / "codec.pt")])
    with pytest.raises(SystemExit, match="device 'cuda' cannot be used here"):
        train_codec.main()


@pytest.mark.parametrize("name", ["codec.pt.last", "codec.pt"])
def test_what_an_earlier_run_has_written_is_not_overwritten(monkeypatch, tmp_path, name):
    (tmp_path / name).write_bytes(b"hours of work")
    monkeypatch.setattr(sys, "argv", ["train_codec.py", "--out", str(tmp_path / "codec.pt")])
    with pytest.raises(SystemExit, match=f"{name} exists: "):
        train_codec.main()
    assert (tmp_path / name).read_bytes() == b"hours of work"


def test_audio_that_cannot_be_used_is_one_clear_line(monkeypatch, tmp_path, speech):
    for name, message in (("missing", "no dataset"), ("empty", "no audio files"), ("single", "one file is not enough"),
                          ("damaged", "b.wav: cannot be read as audio")):
        folder = tmp_path / name
        if name != "missing":
            folder.mkdir()
        if name in ("single", "damaged"):
            soundfile.write(folder / "a.wav", speech[0].numpy(), 24_000)
        if name == "damaged":
            (folder / "b.wav").write_text("this is not audio")
        monkeypatch.setattr(sys, "argv", ["train_codec.py", "--data", str(folder), "--out", str(tmp_path / "no.pt")])
        with pytest.raises(SystemExit, match=message):
            train_codec.main()


def test_held_out_clips_do_not_train_and_loud_ones_do_not_wrap(tmp_path):
    for side, level in (("train", 0.1), ("train", 1.5), ("val", 0.5)):
        (tmp_path / side).mkdir(exist_ok=True)
        soundfile.write(tmp_path / side / f"{level}.wav", np.full(24_000, level), 24_000, subtype="FLOAT")
    train, held_out = train_codec.load([str(tmp_path)])
    assert [[int(wave[0]) for wave in waves] for waves in train] == [[3276, 32767]]
    assert [[int(wave[0]) for wave in waves] for waves in held_out] == [[16383]]


def test_a_crop_played_at_another_speed_fills_its_row():
    wave = (3000 * np.sin(np.arange(48_000) / 10)).astype(np.int16)
    rows = train_codec.batch([[wave]], np.random.default_rng(0), 64, 9600)
    assert (rows[:, -200:].abs().amax(1) > 0.3 * rows[:, 4000:4200].abs().amax(1)).all()


def test_every_clip_of_a_batch_has_a_count_of_its_own():
    args = types.SimpleNamespace(seed=0, batch_size=64, frames=29)
    assert set(train_codec.inputs([[np.ones(48_000, np.int16)]], args, 3)[1].tolist()) == {1, 2, 4, 8}


def test_clips_of_coarse_codes_have_no_wave_loss():
    out, wave = torch.randn(2, 2, 1000)
    alone = train_codec.wave_loss(out[:1], wave[:1], torch.tensor([True]))
    torch.testing.assert_close(train_codec.wave_loss(out, wave, torch.tensor([True, False])), alone / 2)


def test_a_discriminator_that_is_right_has_nothing_to_learn_and_the_codec_everything():
    wave, out = torch.ones(2, 100), -torch.ones(2, 100)
    right, wrong = (lambda x, sign=sign: ([sign * x[:, 0]], [[x]]) for sign in (2, -2))
    assert [train_codec.discriminator_loss(d, out, wave) for d in (right, wrong)] == [0, 6]
    assert [train_codec.adversarial_losses(d, out, wave)["adversarial"] for d in (right, wrong)] == [3, 0]
