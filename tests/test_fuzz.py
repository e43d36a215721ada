"""
python -m pytest tests/test_fuzz.py

Files with random damage: whatever reads them reads on or says in one line what is wrong, soon and in little memory.
"""
import resource
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from data import DataError, Dataset, prepare, read_audio
from mel import SAMPLE_RATE
from model import CheckpointError, Config, HybridGPT, load_checkpoint, to_checkpoint

HEADER = 120


def damaged(content, rng):
    """Some bytes changed, most often in the first ones, or the end missing."""
    content = bytearray(content)
    kind = rng.integers(4)
    if kind == 3:
        return bytes(content[:rng.integers(len(content))])
    for place in rng.integers(HEADER if kind else len(content), size=rng.integers(1, 9)):
        content[place % len(content)] = rng.integers(256)
    return bytes(content)


@pytest.fixture(autouse=True)
def modest():
    """A minute of work and a gigabyte more than before are enough for all the files of a test."""
    unit = 1 if sys.platform == "darwin" else 1000                                          # macOS counts bytes, not kB
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    start, before = time.process_time(), peak()
    yield
    assert peak() - before < 1e9 and time.process_time() - start < 60


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_damaged_audio_is_read_or_refused_by_name(suffix, tmp_path):
    rng, path, refused = np.random.default_rng(0), tmp_path / f"a.{suffix}", 0
    soundfile.write(path, 0.1 * rng.standard_normal((6000, 2)), 44_100)
    content = path.read_bytes()
    for _ in range(125):
        path.write_bytes(damaged(content, rng))
        try:
            pieces = list(read_audio(path))
            assert all(np.isfinite(piece).all() and len(piece) <= 11 * SAMPLE_RATE for piece in pieces)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 5


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_loaded_or_refused_by_name(tmp_path):
    rng, path, refused = np.random.default_rng(0), tmp_path / "a.pt", 0
    config = Config(n_layer=1, n_head=1, n_embd=8, n_inner=8, n_mel_embd=8, context=8)
    torch.save(to_checkpoint(HybridGPT(config), step=1), path)
    content = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damaged(content, rng))
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 30


def test_a_damaged_cache_is_opened_or_refused_by_name(tmp_path, tiny_codec):
    (tmp_path / "in").mkdir()
    rng, refused = np.random.default_rng(0), 0
    for name in "ab":
        soundfile.write(tmp_path / "in" / f"{name}.wav", 0.1 * rng.standard_normal(24_000), SAMPLE_RATE)
    home = tmp_path / "cache" / prepare(tmp_path / "in", tiny_codec, tmp_path / "cache", quiet=True).key
    for path in sorted(home.iterdir()):
        content = path.read_bytes()
        for _ in range(20):
            path.write_bytes(damaged(content, rng))
            try:
                Dataset(home).batch(0, 0, batch_size=2, context=8)
            except DataError as error:
                refused += 1
                assert str(home) in str(error) and "\n" not in str(error)
        path.write_bytes(content)
    assert refused > 20 and Dataset(home).key == home.name
