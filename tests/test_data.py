"""
python -m pytest tests/test_data.py

Preparing a dataset, splitting it, and cutting batches from it.
"""
import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import soxr
import torch

import corpora
import data
from conftest import closed, ending, noise, spy, wait_for
from data import IGNORE, START, DataError, Dataset, prepare, read_audio, split_clips
from mel import HANN, HOP, SAMPLE_RATE, log_mel


def clips(folder, n=4, seconds=1.0):
    """A folder of n short recordings, a.wav, b.wav and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        soundfile.write(folder / f"{'abcdefgh'[i]}.wav", noise(seconds + i / 10, seed=i), SAMPLE_RATE)
    return folder


def codec_whose_encoder(tiny_codec, stream_encoder):
    """The tiny codec to `prepare`, but for what it does when a clip begins."""
    return SimpleNamespace(name=tiny_codec.name, checksum=tiny_codec.checksum, n_codebooks=tiny_codec.n_codebooks,
                           quantize=tiny_codec.quantize, device=tiny_codec.device, stream_encoder=stream_encoder,
                           stream_decoder=tiny_codec.stream_decoder)


def describe(home, n_frames, val):
    """The meta.json of a Dataset made by hand: so many frames, and which clips validate."""
    clips = [{"name": str(i), "val": bool(v)} for i, v in enumerate(val)]
    (home / "meta.json").write_text(json.dumps({"clips": clips, "train_frames": n_frames, "val_frames": 0}))


def numbered(home, lengths, val):
    """A Dataset without audio in which row i has the code i and a mel frame full of i."""
    home.mkdir()
    ends = np.cumsum(lengths)
    rows = np.arange(ends[-1])
    assert len(rows) <= START                                 # so that every row is known by its code
    np.save(home / "codes.npy", np.stack([rows, rows * 0], axis=1).astype(np.uint16))
    np.save(home / "mel.npy", np.repeat(rows[:, None], 80, axis=1).astype(np.float16))
    np.save(home / "clips.npy", np.stack([ends - lengths, ends], axis=1))
    np.savez(home / "mel_statistics.npz", mean=np.zeros(80), covariance=np.eye(80))
    describe(home, len(rows), val)
    return Dataset(home)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Clips shorter than, equal to and longer than a context of 32, three of them for validation."""
    lengths = [100, 7, 32, 33, 300, 5, 150, 64]
    return numbered(tmp_path_factory.mktemp("numbered") / "mixed", lengths,
                    [False, False, False, False, False, True, True, True])


def caches(folder):
    """The finished caches in a cache folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def clip_of(dataset, row):
    return next((start, end) for start, end in [*dataset.train, *dataset.val] if start <= row < end)


# ----------------------------------------------------------------------------- what lies on disk

def test_codes_and_mel_on_disk_are_those_of_the_whole_clip(tmp_path, tiny_codec):
    dataset = prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True)
    rows = np.load(tmp_path / "cache" / dataset.key / "clips.npy")
    assert [clip["name"] for clip in dataset.meta["clips"]] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    for name, (start, end) in zip("abcd", rows):
        wave = torch.from_numpy(soundfile.read(tmp_path / "in" / f"{name}.wav", dtype="float32")[0])
        assert end - start == len(wave) // HOP
        codes = tiny_codec.encode(wave[None])[0].T
        assert np.array_equal(dataset.codes[start:end], codes.numpy()), name
        np.testing.assert_allclose(dataset.mel[start:end], log_mel(wave).numpy(), rtol=1e-3, atol=1e-3)
    assert len(np.unique(dataset.codes[:, 0])) > 5, "the tiny codec must tell frames apart for this to mean anything"


@pytest.mark.parametrize("mel_codebooks", [1, 8])
def test_the_mel_may_be_that_of_what_some_codebooks_decode_to(tmp_path, tiny_codec, mel_codebooks):
    folder = clips(tmp_path / "in")
    original = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    decoded = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True, mel_codebooks=mel_codebooks)
    assert original.key != decoded.key and np.array_equal(original.codes, decoded.codes)
    for start, end in [*decoded.train, *decoded.val]:
        codes = torch.from_numpy(decoded.codes[start:end].astype(np.int64)).T[None]
        mel = log_mel(tiny_codec.decode(codes[:, :mel_codebooks]))[0].numpy()
        np.testing.assert_allclose(decoded.mel[start:end], mel, rtol=1e-3, atol=5e-3)
        assert np.abs(original.mel[start:end] - mel).mean() > 0.1


def test_latents_are_what_the_codes_are_decoded_from_or_chosen_for(tmp_path, tiny_codec):
    folder = clips(tmp_path / "in")
    decoded, original = (prepare(folder, tiny_codec, tmp_path / "cache", quiet=True, mel_codebooks=k, latents=True)
                         for k in (3, 0))
    codes = decoded.codes.astype(np.int64)
    expected = sum(tiny_codec.vectors[k, codes[:, k]] for k in range(3)).numpy()
    np.testing.assert_allclose(decoded.mel, expected, rtol=1e-3, atol=1e-3)
    assert np.array_equal(decoded.codes, original.codes) and len(decoded.mel_statistics[0]) == expected.shape[1]
    again = tiny_codec.quantize(torch.from_numpy(original.mel.astype(np.float32)).T[None], 8)[0].T
    assert (again.numpy() == codes)[:, 0].mean() > 0.99       # but for float16


@pytest.mark.parametrize("options", [{"mel_codebooks": 2}, {"latents": True}])
def test_only_a_recordings_mel_can_look_ahead(tmp_path, tiny_codec, options):
    with pytest.raises(DataError, match="goes with the mel of recordings only"):
        prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True, lookahead=320, **options)


def test_latents_have_no_window(tmp_path, tiny_codec):
    with pytest.raises(DataError, match="--window or --latents"):
        prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True, latents=True, window=[512, 512])


@pytest.mark.parametrize("lookahead", [192, 352, 704])
def test_the_mel_may_look_ahead(tmp_path, tiny_codec, lookahead):
    # blocks of 187 frames: one file ends just past three of them, another less than a lookahead past one
    lengths = (30 * HOP + 319, 12 * HOP, 187 * HOP + 150, 3 * 187 * HOP + 1)
    waves = [noise(n / SAMPLE_RATE)[:, 0].astype(np.float32) for n in lengths]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, wave in enumerate(waves):
        soundfile.write(folder / f"{i}.wav", wave, 24_000, subtype="FLOAT")
    causal = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    dataset = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True, lookahead=lookahead)
    assert np.array_equal(dataset.codes, causal.codes) and dataset.key != causal.key
    expected = np.concatenate([log_mel(torch.from_numpy(wave), lookahead).numpy() for wave in waves])
    np.testing.assert_allclose(dataset.mel, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("window", [{"lookahead": -705}, {"lookahead": 705}, {"window": (0, 64)},
                                    {"window": (960, 65)}])
def test_a_window_that_cannot_be_is_refused(tmp_path, tiny_codec, window):
    with pytest.raises(DataError, match="704|1024"):
        prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True, **window)


def test_a_mel_of_more_codebooks_than_there_are_is_refused(tmp_path, tiny_codec):
    with pytest.raises(DataError, match="has 8 codebooks"):
        prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True, mel_codebooks=9)


def test_a_long_file_is_encoded_in_pieces_as_if_in_one(tmp_path, tiny_codec):
    clips(tmp_path / "in", n=1, seconds=23.456)
    dataset = prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    wave = torch.from_numpy(soundfile.read(tmp_path / "in" / "a.wav", dtype="float32")[0])
    codes = tiny_codec.encode(wave[None])[0].T.numpy()
    assert dataset.codes.shape == codes.shape
    assert (dataset.codes == codes).mean() > 0.999            # a rounding may tip a nearest neighbour
    np.testing.assert_allclose(dataset.mel, log_mel(wave).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 24000, 1), ("flac", 24000, 1), ("ogg", 24000, 1), ("mp3", 24000, 1), ("WAV", 24000, 2),
    ("wav", 48000, 8), ("flac", 8000, 1), ("mp3", 44100, 2), ("wav", 192000, 2), ("aiff", 11025, 1)])
def test_any_format_rate_and_number_of_channels_gives_75_frames_a_second(tmp_path, tiny_codec, suffix, rate,
                                                                          channels):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / f"clip.{suffix}", noise(1.5, rate, channels), rate)
    dataset = prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    duration = 1.5 + 0.1 * (suffix == "mp3")                  # mp3 codes whole blocks and may pad
    assert 1.5 * 75 - 1 <= len(dataset.codes) <= duration * 75 + 1
    assert len(dataset.mel) == len(dataset.codes)


@pytest.mark.parametrize("rate, seconds", [(44100, 1.7), (8000, 25.3), (48000, 21.0), (24000, 12.0)])
def test_reading_in_pieces_equals_resampling_the_whole(tmp_path, rate, seconds):
    wave = noise(seconds, rate, channels=2)
    soundfile.write(tmp_path / "clip.wav", wave, rate, subtype="FLOAT")
    pieces = list(read_audio(tmp_path / "clip.wav"))
    whole = soxr.resample(wave.astype(np.float32).mean(axis=1), rate, SAMPLE_RATE)
    assert max(map(len, pieces)) <= 11 * SAMPLE_RATE
    assert len(pieces) > seconds // 10
    got = np.concatenate(pieces)
    assert len(got) == len(whole) and got.dtype == np.float32
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_the_mel_statistics_are_numpys_over_the_training_frames(tmp_path, tiny_codec):
    dataset = prepare(clips(tmp_path / "in", n=5), tiny_codec, tmp_path / "cache", quiet=True)
    assert len(dataset.val) >= 1
    frames = np.concatenate([dataset.mel[a:b] for a, b in dataset.train]).astype(np.float64)
    mean, covariance = dataset.mel_statistics
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(frames.T, bias=True) + 1e-4 * np.eye(80), atol=1e-6)
    assert dataset.meta["train_frames"] == len(frames)
    assert dataset.meta["val_frames"] == len(dataset.codes) - len(frames)


def test_the_statistics_of_one_long_file_leave_out_what_validates(tmp_path, tiny_codec, monkeypatch):
    fromfile = np.fromfile                                    # 100 rows at once, where it reads 100,000
    monkeypatch.setattr(np, "fromfile", lambda file, dtype=float, count=-1, **more: fromfile(
        file, dtype, count // 1000 if count > 100_000 else count, **more))
    dataset = prepare(clips(tmp_path / "in", n=1, seconds=4.0), tiny_codec, tmp_path / "cache", quiet=True)
    np.testing.assert_allclose(dataset.mel_statistics[0], dataset.mel[:270].astype(np.float64).mean(0), rtol=1e-6)


def test_silence_does_not_give_a_variance_of_zero(tmp_path, tiny_codec):
    (tmp_path / "in").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "in" / f"{name}.wav", np.zeros(24000), SAMPLE_RATE)
    dataset = prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    assert np.linalg.eigvalsh(dataset.mel_statistics[1]).min() > 5e-5


# ----------------------------------------------------------------------------- which files there are

@pytest.mark.parametrize("dataset", ["speech", "music"])
def test_the_bundled_datasets_are_there(dataset):
    folder, names = data.find_audio(dataset)
    assert len(names) > 100 and {name.split("/")[0] for name in names} == {"train", "val"}


def test_a_mistyped_name_is_an_error_that_lists_the_bundled_datasets(tmp_path, tiny_codec):
    with pytest.raises(DataError, match="speeech.*speech.*music") as caught:
        prepare("speeech", tiny_codec, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_home_that_nobody_has_is_no_dataset():
    with pytest.raises(DataError, match="no dataset '~nobody-of-that-name/in'"):
        data.find_audio("~nobody-of-that-name/in")


def test_an_empty_folder_is_an_error(tmp_path, tiny_codec):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no audio files"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache")


def test_a_folder_that_holds_the_cache_is_refused(tiny_codec):
    with pytest.raises(DataError, match="cache"):
        prepare(data.CACHE.parent, tiny_codec)


def test_audio_is_known_by_its_ending_and_a_link_that_leads_nowhere_is_none(tmp_path, monkeypatch):
    clips(tmp_path / "in", n=1)
    for name in ("b.opus", "c.oga", "d.aif", "e.m4a"):
        shutil.copy(tmp_path / "in" / "a.wav", tmp_path / "in" / name)
    (tmp_path / "in" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a.wav", "b.opus", "c.oga", "d.aif"]
    assert data.find_audio("~/in", tmp_path / "cache") == (tmp_path / "in", names)


def test_what_macos_notes_beside_a_file_is_no_audio(tmp_path):
    folder = clips(tmp_path / "in" / "eval")
    (folder.parent / "._eval.wav").write_bytes(b"notes")
    assert all("._" not in name for name in data.find_audio(str(folder.parent), tmp_path / "cache")[1])


def test_linked_folders_are_searched_and_a_link_back_up_does_no_harm(tmp_path, tiny_codec):
    clips(tmp_path / "elsewhere", n=2)
    clips(tmp_path / "in", n=2)
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert len(data.find_audio(tmp_path / "in", tmp_path / "cache")[1]) == 4


@pytest.mark.parametrize("first", ["z", "a"])
def test_a_folder_of_two_names_has_the_same_one_on_every_disk(tmp_path, first):
    (tmp_path / "in").mkdir()
    clips(tmp_path / "elsewhere", n=1)
    for name in {first: None, "z": None, "a": None}:          # created in this order
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    assert data.find_audio(tmp_path / "in", tmp_path / "cache")[1] == ["a/a.wav"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, capsys):
    clips(tmp_path / "in", n=2)
    clips(tmp_path / "in" / "closed", n=2)
    scandir = os.scandir

    def refusing(path):                                       # chmod would not stop root
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refusing)
    assert len(data.find_audio(tmp_path / "in", tmp_path / "cache")[1]) == 2
    assert f"skipped the folder {tmp_path / 'in' / 'closed'}: Permission denied" in capsys.readouterr().err


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    clips(tmp_path / "in")
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with closed(tmp_path / "in"), pytest.raises(DataError, match="no audio files under .*in"):
        data.find_audio(str(tmp_path / "in"), tmp_path / "cache")


def test_a_cache_that_may_not_be_entered_is_named(tmp_path, tiny_codec):
    (tmp_path / "cache").mkdir()
    folder = clips(tmp_path / "in")
    with closed(tmp_path / "cache"), pytest.raises(DataError, match="no permission to use .*cache"):
        prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)


def test_a_folder_that_may_be_listed_but_not_entered_is_named(tmp_path):
    folder = clips(tmp_path / "in")
    refused = PermissionError(errno.EACCES, "Permission denied", str(folder / "a.wav"))       # root may enter any
    with mock.patch.object(Path, "is_file", side_effect=refused):
        with pytest.raises(DataError, match="no permission to use .*a.wav"):
            data.find_audio(str(folder), tmp_path / "cache")


# ----------------------------------------------------------------------------- files that cannot be used

def test_unusable_files_are_skipped_and_named_in_one_line(tmp_path, tiny_codec, capsys):
    folder = clips(tmp_path / "in", n=3)
    (folder / "text.wav").write_text("this is not audio")
    soundfile.write(folder / "empty.wav", np.zeros(0), SAMPLE_RATE)
    spoilt = noise(1.0)
    spoilt[20_000] = np.nan
    soundfile.write(folder / "nan.wav", spoilt, SAMPLE_RATE, subtype="FLOAT")
    late = noise(12.0)                                        # spoilt after a piece is written already
    late[-5] = np.inf
    soundfile.write(folder / "b-late.wav", late, SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", noise(0.01), SAMPLE_RATE)
    (folder / "notes.txt").write_text("not audio, and does not claim to be")
    dataset = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "skipped 5 of 8 files" in lines[0]
    assert all(name in lines[0] for name in ("text.wav", "empty.wav", "nan.wav", "b-late.wav", "short.wav"))
    assert "NaN" in lines[0] and "shorter than one frame" in lines[0] and "notes" not in lines[0]
    assert len(dataset.meta["skipped"]) == 5
    prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)           # opened again: what it lacks is not forgotten
    assert f"skipped earlier: 5 of 8 files; to try them again, delete {dataset.home}" in capsys.readouterr().err

    clean = prepare(clips(tmp_path / "clean", n=3), tiny_codec, tmp_path / "cache", quiet=True)
    assert np.array_equal(dataset.codes, clean.codes) and np.array_equal(dataset.mel, clean.mel)
    assert dataset.fingerprint == clean.fingerprint           # so training can go on without the unusable ones


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_a_header_with_an_absurd_sample_rate_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", noise(0.5), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=f"a.wav: claims {rate} samples a second"):
        list(read_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20, -3000])
def test_samples_that_no_sound_has_are_refused_by_name(tmp_path, value):      # the last: 16-bit samples, not scaled
    soundfile.write(tmp_path / "loud.wav", np.array([0.0, value] * 500), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(DataError, match="loud.wav: holds NaN or infinite samples, or some far outside"):
        list(read_audio(tmp_path / "loud.wav"))


def test_a_flac_whose_header_tells_no_length_is_refused(tmp_path):
    soundfile.write(tmp_path / "pipe.flac", noise(0.5), SAMPLE_RATE)
    content = bytearray((tmp_path / "pipe.flac").read_bytes())
    content[21:26] = [content[21] & 0xF0, 0, 0, 0, 0]         # 36 bits, the number of samples: as in a pipe's FLAC
    (tmp_path / "pipe.flac").write_bytes(content)
    with pytest.raises(DataError, match="pipe.flac: its header does not tell its length"):
        list(read_audio(tmp_path / "pipe.flac"))


def test_many_channels_are_read_in_smaller_blocks(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.repeat(noise(12.0), 64, axis=1), SAMPLE_RATE)
    with spy(soundfile.SoundFile, "read") as read:
        wave = np.concatenate(list(read_audio(tmp_path / "a.wav")))
    assert all(call.args[1] * 64 <= data.BLOCK for call in read.call_args_list)
    np.testing.assert_allclose(wave, noise(12.0)[:, 0], atol=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_of_a_file_that_was_cut_off_what_is_there_is_read(tmp_path, share):
    soundfile.write(tmp_path / "a.mp3", noise(30.0), 44_100)
    whole = np.concatenate(list(read_audio(tmp_path / "a.mp3")))
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content[:int(share * len(content))])         # its header claims all of it
    cut = np.concatenate(list(read_audio(tmp_path / "a.mp3")))
    assert abs(len(cut) / len(whole) - share) < 0.1
    np.testing.assert_allclose(cut[:-5000], whole[:len(cut) - 5000], atol=1e-3)


def test_a_file_that_does_not_say_what_it_holds_is_refused_by_name(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="a.raw: cannot be read as audio"):
        list(read_audio(tmp_path / "a.raw"))


def test_a_folder_with_nothing_usable_is_an_error(tmp_path, tiny_codec):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.wav").write_text("this is not audio")
    with pytest.raises(DataError, match="nothing usable"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_breaks_off_does_not_harm_those_beside_it(tmp_path, tiny_codec):
    folder = clips(tmp_path / "in", n=3, seconds=11)
    wave = noise(25)
    wave[-5] = np.nan                                         # found when the others have long ended
    soundfile.write(folder / "nan.wav", wave, SAMPLE_RATE, subtype="FLOAT")
    dataset = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    assert dataset.meta["skipped"] == ["nan.wav: holds NaN or infinite samples, or some far outside [-1, 1]"]
    (folder / "nan.wav").unlink()
    alone = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    assert (dataset.codes == alone.codes).mean() > 0.999 and dataset.codes.shape == alone.codes.shape


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_a_name_that_is_not_text_costs_that_file_only(tmp_path, tiny_codec, capfd):
    folder = clips(tmp_path / "in", n=3)
    os.rename(folder / "a.wav", os.fsencode(folder) + b"/caf\xe9.wav")
    assert len(prepare(folder, tiny_codec, tmp_path / "cache", quiet=True).meta["clips"]) == 2
    assert "skipped 1 of 3 files" in capfd.readouterr().err


# ----------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("name, spoilt", [("mel.npy", lambda mel: mel[:-1]), ("codes.npy", lambda codes: codes[:, 0]),
                                          ("codes.npy", lambda codes: codes.astype(np.int64))])
def test_a_cache_whose_parts_do_not_fit_together_is_refused(tmp_path, tiny_codec, name, spoilt):
    dataset = prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True)
    np.save(dataset.home / name, spoilt(np.load(dataset.home / name)))
    with pytest.raises(DataError, match=f"{dataset.key} is damaged .*do not fit together.*delete"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("spoilt", [lambda meta: meta.pop("val_frames"), lambda meta: meta.update(train_frames=1),
                                    lambda meta: meta["clips"].pop()])
def test_a_cache_whose_description_is_damaged_is_refused(tmp_path, tiny_codec, spoilt):
    dataset = prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True)
    spoilt(dataset.meta)
    (dataset.home / "meta.json").write_text(json.dumps(dataset.meta))
    with pytest.raises(DataError, match=f"{dataset.key} is damaged.*delete"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)


def test_a_cache_without_its_description_is_refused(tmp_path, tiny_codec):
    dataset = prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True)
    (dataset.home / "meta.json").unlink()
    with pytest.raises(DataError, match=f"{dataset.key} is damaged.*delete"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("rows, val", [([[0, 30], [30, 51]], [False, True]), ([[0, 30], [30, 50]], [False, False]),
                                       ([[0, 30], [30, 50]], [True, True])])
def test_a_list_of_clips_that_does_not_fit_is_refused(tmp_path, rows, val):
    home = numbered(tmp_path / "home", [30, 20], [False, True]).home
    np.save(home / "clips.npy", np.array(rows))
    describe(home, 50, val)
    with pytest.raises(DataError, match="do not fit together"):
        Dataset(home)


def test_a_cache_with_codes_that_do_not_exist_is_refused(tmp_path, tiny_codec):
    dataset = prepare(clips(tmp_path / "in"), tiny_codec, tmp_path / "cache", quiet=True)
    codes = np.load(tmp_path / "cache" / dataset.key / "codes.npy")
    codes[3::50, 0] = 1024                                   # in every clip
    np.save(tmp_path / "cache" / dataset.key / "codes.npy", codes)
    with pytest.raises(DataError, match=f"{dataset.key} is damaged.*delete"):
        for _ in prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True).validation(32, 8):
            pass
    with pytest.raises(DataError, match=f"{dataset.key} is damaged.*delete"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True).gather([(0, 10, 0, 0)], 32)


def test_a_second_preparation_encodes_nothing(tmp_path, tiny_codec):
    folder = clips(tmp_path / "in")
    first = prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    home = tmp_path / "cache" / first.key
    times = [(p.name, p.stat().st_mtime_ns) for p in sorted(home.iterdir())]

    def encoder():
        raise AssertionError("encoded again")
    again = prepare(folder, codec_whose_encoder(tiny_codec, encoder), tmp_path / "cache", quiet=True)
    assert again.key == first.key
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(home.iterdir())] == times


def test_touching_or_adding_a_file_or_another_codec_makes_another_cache(tmp_path, tiny_codec):
    folder, cache = clips(tmp_path / "in", n=2, seconds=0.5), tmp_path / "cache"
    keys = [prepare(folder, tiny_codec, cache, quiet=True).key]
    other = codec_whose_encoder(tiny_codec, tiny_codec.stream_encoder)
    other.checksum = "another"
    keys.append(prepare(folder, other, cache, quiet=True).key)
    os.utime(folder / "a.wav", ns=(1, 1))
    keys.append(prepare(folder, tiny_codec, cache, quiet=True).key)
    soundfile.write(folder / "z.wav", noise(0.5), SAMPLE_RATE)
    keys.append(prepare(folder, tiny_codec, cache, quiet=True).key)
    keys.append(prepare(folder, tiny_codec, cache, quiet=True, window=HANN).key)
    soundfile.write(folder / "a.wav", noise(0.7), SAMPLE_RATE)
    os.utime(folder / "a.wav", ns=(1, 1))                     # the time it had: it is its size that tells
    keys.append(prepare(folder, tiny_codec, cache, quiet=True).key)
    assert len(set(keys)) == 6
    assert caches(cache) == sorted(keys)


@pytest.mark.parametrize("constant", ["SAMPLE_RATE", "HOP", "N_FFT", "FLOOR", "N_MELS"])
def test_another_constant_of_the_mel_or_another_folder_makes_another_cache(tmp_path, tiny_codec, monkeypatch, constant):
    folder, homes = clips(tmp_path / "in", n=2, seconds=0.1), []
    monkeypatch.setattr(data, "_make", lambda home, *_: homes.append(home))       # nothing is encoded
    monkeypatch.setattr(data, "Dataset", mock.Mock())
    prepare(folder, tiny_codec, tmp_path / "cache")
    prepare(shutil.copytree(folder, tmp_path / "b" / "in"), tiny_codec, tmp_path / "cache")       # the times, too
    monkeypatch.setattr(data, constant, 2 * getattr(data, constant))
    prepare(folder, tiny_codec, tmp_path / "cache")
    assert len({*homes}) == 3


def test_other_lengths_splits_or_names_of_clips_are_other_audio(tmp_path):
    one, *others = (numbered(tmp_path / name, lengths, val) for name, lengths, val in (
        ("a", [25, 25], [False, True]), ("b", [26, 24], [False, True]), ("c", [25, 25], [True, False])))
    renamed = shutil.copytree(one.home, tmp_path / "d")
    meta = json.loads((renamed / "meta.json").read_text())
    meta["clips"][0]["name"] += "x"
    (renamed / "meta.json").write_text(json.dumps(meta))
    assert all(one.fingerprint != other.fingerprint for other in (*others, Dataset(renamed)))
    assert one.fingerprint == Dataset(one.home).fingerprint


def test_another_codec_or_mel_is_other_audio(tmp_path, tiny_codec):
    folder, other = clips(tmp_path / "in", n=2, seconds=0.5), codec_whose_encoder(tiny_codec, tiny_codec.stream_encoder)
    other.checksum = "another"
    made = [prepare(folder, codec, tmp_path / "cache", quiet=True, **mel).fingerprint for codec, mel in (
        (tiny_codec, {}), (other, {}), (tiny_codec, {"mel_codebooks": 1}), (tiny_codec, {"latents": True}),
        (tiny_codec, {"lookahead": 192}), (tiny_codec, {"window": HANN}))]
    assert len({*made}) == len(made)


def test_what_is_prepared_is_on_the_disk_before_it_has_its_name(tmp_path, tiny_codec, monkeypatch):
    synced, named, fsync, rename = set(), [], os.fsync, os.replace

    def sync(file):
        synced.add((os.fstat(file).st_ino, os.fstat(file).st_size))
        fsync(file)

    def replace(source, target):
        files = [source] if Path(target).suffix == ".clip" else [path for path in source.iterdir() if path.is_file()]
        assert all((path.stat().st_ino, path.stat().st_size) in synced for path in files)
        named.extend(files)
        rename(source, target)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    folder = clips(tmp_path / "in", seconds=0.1)              # so short that all of it fits into the file's buffer
    assert prepare(folder, tiny_codec, tmp_path / "cache", quiet=True) and len(named) == 4 + 5


def test_an_interrupted_preparation_goes_on_with_the_files_it_lacks(tmp_path, tiny_codec, monkeypatch):
    monkeypatch.setattr(data, "LONG", 0)                      # each file is encoded by itself
    folder, cache, begun = clips(tmp_path / "in"), tmp_path / "cache", []

    def encoder():
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return tiny_codec.stream_encoder()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [], raising=False)                # in this process
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, codec_whose_encoder(tiny_codec, encoder), cache, quiet=True)
    assert caches(cache) == []
    dataset = prepare(folder, codec_whose_encoder(tiny_codec, encoder), cache, quiet=True)
    assert len(begun) == 2 + 1 + 2 and caches(cache) == [dataset.key]
    assert len(list((cache / dataset.key).iterdir())) == 5
    at_once = prepare(folder, tiny_codec, tmp_path / "other cache", quiet=True)
    assert np.array_equal(dataset.codes, at_once.codes) and np.array_equal(dataset.mel, at_once.mel)


def test_files_of_similar_length_are_encoded_side_by_side(tmp_path):
    names = [f"{i:02d}.wav" for i in range(40)]
    lengths = {name: 800 * (1 + 7 * i % 40) for i, name in enumerate(names)}       # a permutation
    for name, n in lengths.items():
        soundfile.write(tmp_path / name, np.zeros(n), SAMPLE_RATE)
    files = [SimpleNamespace(name=name) for name in names]
    for device in ("cpu", "cuda"):
        batches, _ = data._divide(range(40), tmp_path, files, torch.device(device))
        assert sorted(i for batch in batches for i in batch) == list(range(40)) and max(map(len, batches)) > 1
        padded = sum(max(lengths[names[i]] for i in batch) * len(batch) for batch in batches)
        assert padded < 1.4 * sum(lengths.values())


def test_preparing_shows_how_far_it_is(tmp_path, tiny_codec, capfd):
    prepare(str(clips(tmp_path / "talks")), tiny_codec, cache=tmp_path / "cache")
    assert re.search(rf"preparing talks with {tiny_codec.name}: 100%", capfd.readouterr().err)


def test_several_processes_encode_what_one_does(tmp_path, tiny_codec, monkeypatch):
    folder = clips(tmp_path / "in", n=7, seconds=0.9)
    (folder / "broken.wav").write_bytes(b"no audio")
    one = prepare(folder, tiny_codec, tmp_path / "one", quiet=True)
    monkeypatch.setattr(data, "LONG", 1.3)                    # two processes, longer files alone
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [0, 1], raising=False)
    with spy(torch.utils.data, "DataLoader") as pool:
        two = prepare(folder, tiny_codec, tmp_path / "two", quiet=True)
    assert pool.call_args.kwargs["num_workers"] == 2
    assert one.meta == two.meta and len(one.meta["clips"]) == 7
    assert (one.codes == two.codes).mean() > 0.999            # a rounding may tip a nearest neighbour
    np.testing.assert_allclose(one.mel, two.mel, rtol=1e-3, atol=5e-3)


def test_who_waited_for_another_process_encodes_nothing(tmp_path, tiny_codec, monkeypatch):
    folder, cache, locked = clips(tmp_path / "in"), tmp_path / "cache", data.locked

    @contextlib.contextmanager
    def after_another(place):
        monkeypatch.setattr(data, "locked", locked)
        prepare(folder, tiny_codec, cache, quiet=True)        # by another process, while this one waits
        with locked(place):
            yield

    def encoder():
        raise AssertionError("encoded again")
    monkeypatch.setattr(data, "locked", after_another)
    assert len(prepare(folder, codec_whose_encoder(tiny_codec, encoder), cache, quiet=True).train) > 0


def test_a_preparation_that_is_killed_with_its_workers_at_work_blocks_nobody(tmp_path):
    folder = clips(tmp_path / "in", n=8, seconds=20)
    script = ("import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import data, tokens\n"
              "os.sched_getaffinity = lambda _: [0, 1]\n"
              "data.prepare(sys.argv[2], tokens.load_codec(), Path(sys.argv[3]), quiet=True); print('done')")
    command = [sys.executable, "-c", script, data.ASSETS.parent, folder, tmp_path / "cache"]
    with ending(subprocess.Popen(command)) as process:
        wait_for(lambda: list(tmp_path.glob("cache/.*/clips/*.part")), process)
        time.sleep(0.3)
        process.kill()
        process.wait()
    assert subprocess.run(command, timeout=120, stdout=subprocess.PIPE, text=True).stdout == "done\n"
    assert not list(tmp_path.glob("cache/**/*.part"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_needs_no_main_guard_whatever_way_processes_are_usually_started(tmp_path, tiny_codec_file, method):
    (tmp_path / "script.py").write_text(
        f"import multiprocessing, os, sys; sys.path.insert(0, {str(data.ASSETS.parent)!r}); import data, tokens\n"
        f"multiprocessing.set_start_method({method!r}, force=True)\n"
        f"data.LONG, os.sched_getaffinity = 1, lambda _: [0, 1]\n"
        f"folder, codec = {str(clips(tmp_path / 'in', n=4))!r}, tokens.load_codec({str(tiny_codec_file)!r})\n"
        f"print(len(data.prepare(folder, codec, {str(tmp_path / 'cache')!r}).meta['clips']))\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "4\n", done.stderr


def test_a_second_process_waits_for_the_first_and_finds_its_cache(tmp_path, tiny_codec, tiny_codec_file):
    folder = clips(tmp_path / "in")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import data, tokens; from pathlib import Path\n"
            "data.prepare(sys.argv[2], tokens.load_codec(sys.argv[3]), Path(sys.argv[4]))")
    command = [sys.executable, "-c", code, data.ASSETS.parent, folder, tiny_codec_file, tmp_path / "cache"]
    with corpora.locked(tmp_path / "cache"):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert "waiting for another process" in process.stderr.readline()
        time.sleep(1)                                         # all it needs is a moment
        assert process.poll() is None and caches(tmp_path / "cache") == []
    assert process.wait(60) == 0
    assert caches(tmp_path / "cache") == [prepare(folder, tiny_codec, tmp_path / "cache", quiet=True).key]


def test_a_cache_on_a_disk_that_is_not_mounted_is_one_clear_line(tmp_path, tiny_codec):
    (tmp_path / "cache").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="cache is a file, or a link to a folder that is not there"):
        prepare(clips(tmp_path / "in", n=2), tiny_codec, tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("name", ["x" * 255, "x" + "é" * 127])
def test_folder_and_codec_may_have_the_longest_names_there_are(tmp_path, tiny_codec, monkeypatch, name):
    folder = clips(tmp_path / name, n=2)
    monkeypatch.setattr(tiny_codec, "name", "y" * 250)
    assert len(prepare(folder, tiny_codec, tmp_path / "cache", quiet=True).meta["clips"]) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_must_not_be_written_to_is_named(tmp_path, tiny_codec, number):
    refuse = mock.Mock(side_effect=OSError(number, "no", str(tmp_path / "cache" / ".lock")))
    with mock.patch.object(Path, "mkdir", refuse), pytest.raises(DataError, match=r"permission .*cache/\.lock"):
        prepare("speech", tiny_codec, tmp_path / "cache", quiet=True)


def test_a_full_disk_is_one_clear_line_and_loses_no_finished_file(tmp_path, tiny_codec, monkeypatch):
    folder, cache, written = clips(tmp_path / "in"), tmp_path / "cache", []
    monkeypatch.setattr(data, "LONG", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [], raising=False)

    def full(source, target):
        written.append(target)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)
    rename = os.replace
    with mock.patch.object(os, "replace", full), pytest.raises(DataError, match="no space left .*again"):
        prepare(folder, tiny_codec, cache, quiet=True)
    assert len(list(cache.rglob("*.clip"))) == 2
    assert len(prepare(folder, tiny_codec, cache, quiet=True).meta["clips"]) == 4


def test_nothing_is_written_into_the_users_folder(tmp_path, tiny_codec):
    folder = clips(tmp_path / "in")
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())], folder.stat().st_mtime_ns
    prepare(folder, tiny_codec, tmp_path / "cache", quiet=True)
    assert ([(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())], folder.stat().st_mtime_ns) == before


# ----------------------------------------------------------------------------- the split

def test_about_a_tenth_of_many_files_validates():
    share = np.mean(split_clips([f"some/{i}.wav" for i in range(500)]))
    assert 0.07 < share < 0.13


def test_which_files_validate_never_changes():
    assert [i for i, val in enumerate(split_clips([f"{i}.wav" for i in range(50)])) if val] == [11, 17, 34, 43]
    assert [i for i, val in enumerate(split_clips([f"{i % 5}/{i // 5}.wav" for i in range(50)])) if val] == [18, 19]


def test_adding_files_moves_no_other_file_to_the_other_side():
    names = [f"{i}.flac" for i in range(300)]
    few, many = split_clips(names), split_clips([f"new/{i}.wav" for i in range(200)] + names)
    assert many[200:] == few


def test_two_files_give_one_of_each_side_whatever_their_names():
    assert all(sorted(split_clips([f"a{i}", f"b{i}"])) == [False, True] for i in range(200))


def test_a_third_folder_beside_train_and_val_is_refused():
    with pytest.raises(DataError, match="test"):
        split_clips(["train/a.wav", "val/b.wav", "test/c.wav"])


def test_an_unclear_split_is_found_before_encoding(tmp_path, tiny_codec):
    for side in ("train", "val", "test"):
        clips(tmp_path / "in" / side, n=2)
    with pytest.raises(DataError, match="the dataset holds test, train, val: call"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["validation", "dev", "Val"])
def test_a_folder_that_is_almost_called_val_is_no_part_of_what_is_trained_on(name):
    for train in ("train", "Train"):
        with pytest.raises(DataError, match=f"holds .*{name}.*: call the two sides of a split train/ and val/"):
            split_clips([f"{train}/a.wav", f"{name}/b.wav"])


@pytest.mark.parametrize("names", [["a.wav", "val/b.wav"], ["train/a.wav", "held-out/b.wav"],
                                   ["Training/a.wav", "Testing/b.wav"], ["speaker/a.wav", "test/b.wav"]])
def test_one_side_of_a_split_beside_something_else_is_refused(names):
    with pytest.raises(DataError, match="call the two sides of a split train/ and val/"):
        split_clips(names)
    assert len(split_clips(["train/a.wav", "train/b.wav"])) == 2          # nothing but one side: it is divided


def test_top_level_folders_train_and_val_decide_the_split(tmp_path, tiny_codec):
    clips(tmp_path / "in" / "train", n=2)
    clips(tmp_path / "in" / "val" / "deeper", n=3)
    dataset = prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    assert [(c["name"].split("/")[0], c["val"]) for c in dataset.meta["clips"]] == \
        [("train", False)] * 2 + [("val", True)] * 3
    assert len(dataset.train) == 2 and len(dataset.val) == 3


def test_the_last_tenth_of_a_single_file_validates_and_a_warning_says_so(tmp_path, tiny_codec, capsys):
    dataset = prepare(clips(tmp_path / "in", n=1, seconds=4.0), tiny_codec, tmp_path / "cache", quiet=True)
    assert dataset.train.tolist() == [[0, 270]] and dataset.val.tolist() == [[270, 300]]
    header = 128
    assert (dataset.home / "codes.npy").stat().st_size == header + 300 * 2 * tiny_codec.n_codebooks      # nothing twice
    warning = capsys.readouterr().err
    assert warning.startswith("warning:") and "a.wav" in warning and len(warning.splitlines()) == 1


@pytest.mark.parametrize("frames", [9, 12])
def test_one_file_needs_ten_frames_of_which_the_last_validates(tmp_path, tiny_codec, frames):
    clips(tmp_path / "in", n=0)
    soundfile.write(tmp_path / "in" / "a.wav", noise(1.0)[:frames * HOP], SAMPLE_RATE)
    if frames < 10:
        with pytest.raises(DataError, match="holds 9 frames in one file: too few"):
            prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    else:
        assert prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True).val.tolist() == [[11, 12]]


@pytest.mark.parametrize("lost", ["train", "val"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_side_that_has_nothing_usable_is_not_made_up_from_the_other(tmp_path, tiny_codec, lost, n):
    (tmp_path / "in").mkdir()
    for side in ("train", "val"):
        clips(tmp_path / "in" / side, n=n)
    for path in (tmp_path / "in" / lost).iterdir():
        path.write_bytes(b"no audio")
    with pytest.raises(DataError, match="is left to " + ("train" if lost == "train" else "validate") + " on"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)
    for path in (tmp_path / "in" / lost).iterdir():
        path.rename(path.with_suffix(".m4a"))                 # of a kind that is not looked for
    with pytest.raises(DataError, match=f"no audio files under .*{lost}"):
        prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True)


# ----------------------------------------------------------------------------- training batches

def test_a_batch_is_a_pure_function_of_seed_and_step(mixed, tmp_path):
    twin = numbered(tmp_path / "twin", [100, 7, 32, 33, 300, 5, 150, 64], [False] * 5 + [True] * 3)
    twin.batch(seed=5, step=9, batch_size=3, context=8)       # what was asked before must not matter
    same = zip(mixed.batch(1, 2, 8, 32), twin.batch(1, 2, 8, 32))
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(mixed.batch(1, 2, 8, 32)[2], mixed.batch(1, 3, 8, 32)[2])
    assert not torch.equal(mixed.batch(1, 2, 8, 32)[2], mixed.batch(2, 2, 8, 32)[2])
    assert not torch.equal(mixed.batch(1, 2, 8, 32)[2], mixed.batch(2, 1, 8, 32)[2])


def test_some_rows_of_a_batch_are_the_same_as_in_all_of_it(mixed):
    for whole, part in zip(mixed.batch(1, 2, 8, 32), mixed.batch(1, 2, 8, 32, rows=slice(3, 5))):
        assert len(part) == 2 and torch.equal(part, whole[3:5])


def test_a_batch_without_the_finest_codes_is_otherwise_the_same(mixed):
    for whole, part in [(mixed.batch(1, 2, 8, 32), mixed.batch(1, 2, 8, 32, n_codebooks=1)),
                        *zip(mixed.validation(32, 4), mixed.validation(32, 4, n_codebooks=1))]:
        assert len(whole[0][0]) == 2 and torch.equal(part[0], whole[0][:, :1]) and torch.equal(part[2], whole[2][:, :1])
        assert torch.equal(part[1], whole[1])


def test_codes_that_do_not_exist_are_refused_as_inputs_too(mixed):
    start, end = mixed.train[0]
    for row in (start + 10, start + 9):                       # a target, and what is shown
        codes = np.load(mixed.home / "codes.npy")
        codes[row] = 5000
        with mock.patch.object(data.Dataset, "codes", codes), pytest.raises(DataError, match="codes that do not exist"):
            mixed.gather([(start, end, 10, 0)], 8)


def test_a_stretch_is_cut_into_rows_that_follow_one_another(mixed):
    whole, parts = mixed.batch(0, 1, 4, 96), mixed.batch(0, 1, 12, 32, stretch=96)
    for x, cut, axis in zip(whole, parts, (2, 1, 2)):         # codes, mel, targets
        assert torch.equal(x, torch.stack([torch.cat(list(rows), dim=axis - 1) for rows in cut.split(3)]))


def test_every_training_frame_is_drawn_equally_often(mixed):
    drawn, frames = [], np.diff(mixed.train)[:, 0]
    each_once = SimpleNamespace(integers=lambda n, size: np.arange(n)[:size])
    with mock.patch.object(mixed, "gather", lambda crops, *_: drawn.extend(start for start, *_ in crops)), \
            mock.patch.object(np.random, "default_rng", lambda _: each_once):
        mixed.batch(0, 0, frames.sum(), 32)
    assert [drawn.count(start) for start in mixed.train[:, 0]] == frames.tolist()         # each as often as it is long


def test_inputs_are_the_targets_one_frame_behind_and_windows_stay_inside_their_clip(mixed):
    started, drawn = set(), set()
    for step in range(60):
        codes, mel, targets = mixed.batch(0, step, 8, 32)
        assert codes.shape == targets.shape == (8, mixed.codes.shape[1], 32) and mel.shape == (8, 32, 80)
        for c, m, t in zip(codes[:, 0].tolist(), mel, targets[:, 0].tolist()):
            n = 32 - t.count(IGNORE)
            start, end = clip_of(mixed, t[0])
            assert [start, end] in mixed.train.tolist()
            assert t[:n] == list(range(t[0], t[0] + n)) and t[n - 1] < end        # rows in order, of one clip
            assert t[n:] == [IGNORE] * (32 - n)
            assert n == min(32, end - start)                  # a clip shorter than the context is used whole
            assert c[1:n] == t[:n - 1]
            assert c[0] == (START if t[0] == start else t[0] - 1)                 # START exactly at clip starts
            shown = [code if code != START else 0 for code in c[:n]]
            assert torch.equal(m[:n], torch.tensor(shown, dtype=torch.float)[:, None].expand(n, 80))
            drawn.update(t[:n])
            started.add(start if c[0] == START else None)
    assert started == {None, *mixed.train[:, 0]}              # every clip's beginning came up, and middles too
    assert drawn == {row for start, end in mixed.train for row in range(start, end)}      # and every frame


# ----------------------------------------------------------------------------- validation

def scored(dataset, context, batch_size):
    """[(row of the target, its position in the window, the window's first code, clip)] in order."""
    out = []
    for codes, mel, targets, clip in dataset.validation(context, batch_size):
        assert ((targets == IGNORE) == (targets[:, :1] == IGNORE)).all()          # all codebooks of a frame, or none
        for b, p in (targets[:, 0] != IGNORE).nonzero().tolist():
            out.append((targets[b, 0, p].item(), p, codes[b, 0, 0].item(), clip[b].item()))
    return out


@pytest.mark.parametrize("context", [2, 3, 8, 31, 32, 64, 300])
def test_validation_scores_every_target_of_every_clip_once(mixed, context):
    rows = [s[0] for s in scored(mixed, context, 4)]
    assert sorted(rows) == [row for start, end in mixed.val for row in range(start, end)]


@pytest.mark.parametrize("context", [31, 32])
def test_validation_scores_nothing_with_less_than_half_a_context_except_at_a_clips_start(mixed, context):
    for row, position, first_code, clip in scored(mixed, context, 4):
        start, end = mixed.val[clip]
        assert start <= row < end                             # the clip named is the target's
        if first_code == START:
            assert row == start + position
        else:
            assert position >= 16


def test_validation_windows_are_the_same_for_any_batch_size_and_every_time(mixed):
    def windows(batch_size):
        return [torch.cat(parts) for parts in zip(*mixed.validation(32, batch_size))]
    first = windows(4)
    for batch_size in (4, 1, 100):
        assert all(torch.equal(a, b) for a, b in zip(first, windows(batch_size)))


def test_validation_inputs_are_the_targets_one_frame_behind(mixed):
    for codes, mel, targets, _ in mixed.validation(32, 4):
        for c, m, t in zip(codes[:, 0], mel, targets[:, 0]):
            for p in (t != IGNORE).nonzero()[:, 0].tolist():
                at_start = t[p].item() in mixed.val[:, 0]
                assert c[p].item() == (START if at_start else t[p].item() - 1)
                assert at_start or (m[p] == t[p] - 1).all()


def test_the_unigram_figure_is_add_one_cross_entropy(tmp_path, tiny_codec):
    dataset = prepare(clips(tmp_path / "in", n=5), tiny_codec, tmp_path / "cache", quiet=True)
    train = [int(c) for a, b in dataset.train for c in dataset.codes[a:b, 0]]
    val = [int(c) for a, b in dataset.val for c in dataset.codes[a:b, 0]]
    plain = -sum(math.log((train.count(c) + 1) / (len(train) + 1024)) for c in val) / len(val)
    assert abs(dataset.unigram_nll() - plain) < 1e-9


def test_joining_takes_no_more_memory_for_a_longer_clip(tmp_path):
    (tmp_path / "clips").mkdir()
    for i, n in enumerate((1_000_000, 1)):                                         # 3.7 hours; 176 MB, all zeros
        with open(tmp_path / "clips" / f"{i}.clip", "wb") as file:
            file.truncate(2 * n * (8 + 80))
    tracemalloc.start()
    try:
        data._join(tmp_path, "long", ["train/a.wav", "val/b.wav"], {"n_codebooks": 8, "n_mels": 80}, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.load(tmp_path / "mel.npy", mmap_mode="r").shape == (1_000_001, 80)
    assert peak < 150e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own memory from /proc")
def test_a_hundred_hours_take_no_more_memory_than_their_batches(tmp_path):
    n, resident = 100 * 3600 * 75, lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    home = tmp_path / "home"
    numbered(home, [500, 500], [False, True])
    for name, shape, dtype in (("codes", (n, 8), np.uint16), ("mel", (n, 80), np.float16)):
        np.lib.format.open_memmap(home / f"{name}.npy", "w+", dtype, shape)        # a sparse file: it takes no disk
    ends = np.arange(1500, n + 1, 1500)                                            # clips of 20 seconds
    np.save(home / "clips.npy", np.stack([ends - 1500, ends], axis=1))
    describe(home, n, [i % 100 == 0 for i in range(len(ends))])
    dataset = Dataset(home)
    dataset.batch(0, 0, 16, 256)
    before = resident()
    for step in range(200):                                                        # 144 MB pass by
        dataset.batch(0, step, 16, 256)
    assert resident() - before < 30e6
