"""
data.py: a dataset's name, or a folder of audio, becomes aligned arrays on disk, and those become batches.

    audio files ──mono, 24 kHz──▶ codec ──▶ codes.npy (frames, K) uint16     clip after clip; row t of both belongs
                             └──▶ log_mel ─▶ mel.npy  (frames, 80) float16   to the same 1/75 s of the same clip

The mel is the original audio's, or, with mel_codebooks, that of the audio which so many codebooks decode to: what a
model sees when it samples.

    clips.npy            (clips, 2) int64, first row and one past the last row of every clip
    mel_statistics.npz   mean and covariance of the training split's mel
    meta.json            what it was made from and with, the split, counts

    >>> data = prepare("speech", load_codec("mini"))          # once: afterwards it is only opened
    >>> codes, mel, targets = data.batch(seed=0, step=0, batch_size=16, context=256)

A batch is a pure function of (seed, step): the same for every model, and after a resume. Each row is a window of one
clip, never of two; a clip shorter than the context is used whole and the rest of its row is padding that no target
counts. The first position of a clip is START, so the model is always told that there is nothing before.
"""
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

from mel import FLOOR, HOP, N_FFT, N_MELS, SAMPLE_RATE, StreamingLogMel
from tokens import CODEBOOK_SIZE

START = CODEBOOK_SIZE                # as in model.py: the code shown before a clip
IGNORE = -1                          # a target that does not count
ASSETS = Path(__file__).parent / "assets"
BUNDLED = {"speech": ASSETS / "speech", "music": ASSETS / "music"}
CACHE = Path(__file__).parent / "cache"
BLOCK_SECONDS = 10                   # audio is read, resampled and encoded this much at a time,
BLOCK_VALUES = 4_000_000             # and never more than this, all channels together
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"}
SUFFIXES |= {".oga", ".opus", ".aif"}


class DataError(RuntimeError):
    """Audio or a dataset that cannot be used; the message is one line for a person."""


# ----------------------------------------------------------------------------- audio in

def read_audio(path):
    """Yield a file's audio, any sample rate and channels, as mono 24 kHz float32 pieces (n,) of at most 10 s.

    Raises DataError, naming the file, if it is unreadable, empty, claims a sample rate that no audio has or holds
    non-finite samples.
    """
    n_samples = 0
    try:
        with soundfile.SoundFile(path) as file:
            if not 1_000 <= file.samplerate <= 1_000_000:
                raise DataError(f"{path}: claims {file.samplerate} samples a second, not 1,000 to 1,000,000")
            resampler = None
            if file.samplerate != SAMPLE_RATE:
                resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
            n = min(BLOCK_SECONDS * file.samplerate, BLOCK_VALUES // file.channels)
            for block in file.blocks(n, dtype="float32", always_2d=True):
                if not np.isfinite(block).all():
                    raise DataError(f"{path}: holds NaN or infinite samples")
                wave = block.mean(axis=1)
                n_samples += len(wave)
                yield resampler.resample_chunk(wave) if resampler else wave
            if resampler:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        reason = str(error).removeprefix(f"Error opening {str(path)!r}: ")
        raise DataError(f"{path}: cannot be read as audio ({reason.strip()})") from error
    if n_samples == 0:
        raise DataError(f"{path}: holds no samples")


def encode_file(path, codec, mel_codebooks=0, lookahead=0):
    """Yield (codes (t, K) uint16, mel (u, 80) float16) of a file piece by piece, in bounded memory.

    mel_codebooks: 0 for the mel of the file itself, else of what the first so many codebooks decode to. lookahead: as
    in `log_mel`; then mel frames come later than their codes, but in the end there are as many.
    """
    encoder, spectrogram, behind = codec.stream_encoder(), StreamingLogMel(lookahead), 0
    decoder = codec.stream_decoder() if mel_codebooks else None
    for piece in read_audio(path):
        wave = torch.from_numpy(piece).to(codec.device)
        codes = encoder.push(wave[None])                      # (1, K, t)
        if mel_codebooks:
            wave = decoder.push(codes[:, :mel_codebooks])[0]
        mel = spectrogram.push(wave)                          # (u, 80)
        behind += codes.shape[-1] - len(mel)
        yield codes[0].T.cpu().numpy().astype(np.uint16), mel.cpu().numpy().astype(np.float16)
    if lookahead:
        mel = spectrogram.push(torch.zeros(lookahead, device=codec.device))[:behind]
        yield np.zeros((0, codec.n_codebooks), np.uint16), mel.cpu().numpy().astype(np.float16)


# ----------------------------------------------------------------------------- preparing a dataset

def find_audio(dataset, cache=CACHE):
    """A bundled dataset's name or a folder -> (folder, sorted paths of the audio files under it)."""
    folder = BUNDLED.get(dataset, Path(dataset).expanduser())
    if not folder.is_dir():
        raise DataError(f"no dataset '{dataset}': use {', '.join(BUNDLED)}, or the path of a folder of audio files")
    if Path(cache).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} contains this program's cache ({cache}): choose a folder of audio only")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise DataError(f"no audio files under {folder} (looked for wav, flac, ogg, mp3 and the like)")
    return folder, paths


def split_clips(names):
    """Which clips validate: bool per name (relative path).

    With top-level folders train/ and val/, those in val/. Otherwise the tenth or so whose path hashes low, so that
    adding a file moves no other, but for the one that a small folder needs on either side. Raises DataError where
    train/ and val/ have a neighbour: nobody could tell which side it belongs to.
    """
    tops = [name.split("/")[0] for name in names]
    if {"train", "val"} <= set(tops):
        if others := set(tops) - {"train", "val"}:
            raise DataError(f"beside train/ and val/ the dataset holds {sorted(others)[0]}: move it out, or into one")
        return [top == "val" for top in tops]
    hashes = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names]
    threshold = min(max(0.1, min(hashes) + 1e-12), max(hashes))
    return [h < threshold for h in hashes]


def prepare(dataset, codec, cache=CACHE, quiet=False, mel_codebooks=0, lookahead=0):
    """Encode a dataset with a codec, unless that is done already, and open it.

    dataset: `speech`, `music` or a folder, searched recursively. mel_codebooks, lookahead: as in `encode_file`.
    Returns a `Dataset`. The cache lies in `cache/`, under a key made of everything that its content depends on: files
    (path, size, time), codec and its checksum, mel settings. Files that cannot be used are skipped and named in one
    line.
    Raises DataError if there is no such dataset, nothing in it can be used, or the mel cannot be had.
    """
    if not 0 <= mel_codebooks <= codec.n_codebooks:
        raise DataError(f"codec {codec.name} has {codec.n_codebooks} codebooks: no mel can be had of what "
                        f"{mel_codebooks} decode to")
    if not 0 <= lookahead <= N_FFT - HOP:
        raise DataError(f"a lookahead of {lookahead} samples: it must lie between 0 and {N_FFT - HOP}")
    folder, paths = find_audio(dataset, cache)
    names = [path.relative_to(folder).as_posix() for path in paths]
    split_clips(names)                                        # an unclear split is found now, not after encoding
    files = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in zip(names, paths)]
    made_with = {"format": 2, "codec": codec.name, "codec_checksum": codec.checksum, "n_codebooks": codec.n_codebooks,
                 "sample_rate": SAMPLE_RATE, "hop": HOP, "n_fft": N_FFT, "n_mels": N_MELS, "mel_floor": FLOOR,
                 "mel_codebooks": mel_codebooks, "lookahead": lookahead}
    key = hashlib.sha256(json.dumps([str(folder.resolve()), files, made_with]).encode()).hexdigest()[:16]
    name = dataset if dataset in BUNDLED else folder.resolve().name
    home = Path(cache) / f"{name}-{Path(codec.name).name}-{key}"
    if not (home / "meta.json").is_file():
        Path(cache).mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=cache))
        try:                                                  # only a finished cache ever gets the name
            _encode_dataset(unfinished, name, paths, names, codec, made_with, quiet)
            if not (home / "meta.json").is_file():            # or has another process been faster?
                shutil.rmtree(home, ignore_errors=True)
                os.rename(unfinished, home)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Dataset(home)


def _encode_dataset(home, name, paths, names, codec, made_with, quiet):
    """Fill the folder `home` with codes.npy, mel.npy, clips.npy, mel_statistics.npz and meta.json."""
    clips, usable, skipped, row = [], [], [], 0
    total = sum(path.stat().st_size for path in paths)
    with open(home / "codes.npy", "wb+") as codes_file, open(home / "mel.npy", "wb+") as mel_file, \
            tqdm(total=total, unit="B", unit_scale=True, desc=f"preparing {name} with {codec.name}",
                 disable=quiet) as bar:
        arrays = (codes_file, np.uint16, codec.n_codebooks), (mel_file, np.float16, N_MELS)
        for file, dtype, width in arrays:
            _write_npy_header(file, dtype, (0, width))
        for path, clip_name in zip(paths, names):
            before = [codes_file.tell(), mel_file.tell()]
            start, problem = row, None
            try:
                for codes, mel in encode_file(path, codec, made_with["mel_codebooks"], made_with["lookahead"]):
                    codes_file.write(codes.tobytes())
                    mel_file.write(mel.tobytes())
                    row += len(codes)
                if row == start:
                    problem = f"shorter than one frame of {HOP} samples"
            except DataError as error:
                problem = str(error).removeprefix(f"{path}: ")
            if problem:                                       # take back what was written of this file
                for (file, _, _), position in zip(arrays, before):
                    file.seek(position)
                    file.truncate()
                row = start
                skipped.append(f"{clip_name}: {problem}")
            else:
                clips.append((start, row))
                usable.append(clip_name)
            bar.update(path.stat().st_size)
        for file, dtype, width in arrays:
            file.seek(0)
            _write_npy_header(file, dtype, (row, width))
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} files: {'; '.join(skipped)}", file=sys.stderr)
    if not clips:
        raise DataError(f"nothing usable in dataset '{name}': all {len(paths)} files were skipped")
    if len(clips) == 1:
        if row < 10:
            raise DataError(f"dataset '{name}' holds {row} frames in one file: too few to train and to validate on")
        print(f"warning: {usable[0]} is the only usable file of '{name}': its last 10 % validate", file=sys.stderr)
        cut = row - max(1, row // 10)
        clips, usable, is_val = [(0, cut), (cut, row)], usable * 2, [False, True]
    else:
        is_val = split_clips(usable)

    clips, is_val = np.array(clips, dtype=np.int64), np.array(is_val)
    np.save(home / "clips.npy", clips)
    mel = np.load(home / "mel.npy", mmap_mode="r")
    n, total, products = 0, np.zeros(N_MELS), np.zeros((N_MELS, N_MELS))
    for start, end in clips[~is_val]:                         # one clip in memory at a time
        part = mel[start:end].astype(np.float64)
        n, total, products = n + len(part), total + part.sum(0), products + part.T @ part
    mean = total / n
    covariance = products / n - np.outer(mean, mean) + 1e-4 * np.eye(N_MELS)      # silence alone has no variance
    np.savez(home / "mel_statistics.npz", mean=mean, covariance=covariance)
    meta = {"dataset": name, **made_with, "n_frames": row, "train_frames": n, "val_frames": row - n,
            "skipped": skipped, "clips": [{"name": c, "val": bool(v)} for c, v in zip(usable, is_val)]}
    (home / "meta.json").write_text(json.dumps(meta, indent=1))


def _write_npy_header(file, dtype, shape):
    """The header of a .npy file. numpy pads it so that a longer first axis fits later: it can be written twice."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})


# ----------------------------------------------------------------------------- batches

class Dataset:
    """A prepared dataset: memory-mapped codes and mel, their clips, and batches of them.

    meta, key       the content of meta.json; the name of the cache, which changes with anything it was made from
    codes, mel      (frames, K) uint16 and (frames, 80) float16, all clips one after the other
    train, val      (clips, 2) first and one past the last frame of each clip of the split
    mel_statistics  mean (80,) and covariance (80, 80) of the training split's mel
    """

    def __init__(self, home):
        try:
            self.meta, self.key = json.loads((home / "meta.json").read_text()), home.name
            self.codes = np.load(home / "codes.npy", mmap_mode="r")
            self.mel = np.load(home / "mel.npy", mmap_mode="r")
            clips, statistics = np.load(home / "clips.npy"), np.load(home / "mel_statistics.npz")
            self.mel_statistics = statistics["mean"], statistics["covariance"]
            is_val = np.array([clip["val"] for clip in self.meta["clips"]])
            self.train, self.val = clips[~is_val], clips[is_val]
            if not (self.codes.dtype == np.uint16 and self.mel.dtype == np.float16 and clips.dtype == np.int64
                    and len(self.codes) == len(self.mel) and self.mel.shape[1] == N_MELS
                    and 0 <= clips.min() <= clips.max() <= len(self.codes) and (clips[:, 0] < clips[:, 1]).all()
                    and len(self.train) and len(self.val) and self.codes.max() < CODEBOOK_SIZE):
                raise ValueError("its parts do not fit together")
        except Exception as error:                            # damaged arrays make numpy raise almost anything
            raise DataError(f"the cache {home} is damaged ({type(error).__name__}): delete that folder, and it will be "
                            "made anew") from error
        self.train_ends = np.diff(self.train, axis=1)[:, 0].cumsum()      # frames up to and with each clip

    def batch(self, seed, step, batch_size, context):
        """A training batch, a pure function of its arguments: codes (B, K, T), mel (B, T, 80), targets (B, K, T).

        Each row is centred on a frame drawn uniformly from the training split, then moved to lie inside its clip,
        so that the first frames of a clip, where sampling starts, come up often.
        """
        rng = np.random.default_rng((seed, step))
        windows = []
        for frame in rng.integers(self.train_ends[-1], size=batch_size):
            clip = np.searchsorted(self.train_ends, frame, side="right")
            start, end = self.train[clip]
            offset = frame - (self.train_ends[clip] - (end - start)) - context // 2
            windows.append((start, end, max(0, min(offset, end - start - context)), 0))
        return self.gather(windows, context)

    def validation(self, context, batch_size):
        """The whole validation split in fixed order: yields (codes, mel, targets, clip (B,)) batches.

        Windows overlap by half and only the second half of each is scored, the first window of a clip whole: every
        target counts exactly once, with at least half a context behind it wherever the clip has that much.
        `context` must be even.
        """
        half = context // 2
        windows = [(i, start, end, offset, half if offset else 0)
                   for i, (start, end) in enumerate(self.val)
                   for offset in [0, *range(half, end - start - half, half)]]
        for i in range(0, len(windows), batch_size):
            part = windows[i:i + batch_size]
            yield (*self.gather([w[1:] for w in part], context), torch.tensor([w[0] for w in part]))

    def gather(self, windows, context):
        """Windows (clip start, clip end, offset, first scored position) -> padded tensors, inputs one frame behind.

        Position p of a row predicts frame offset + p of the clip and is shown frame offset + p - 1; before the
        clip's first frame it is shown START.
        """
        B = len(windows)
        codes = torch.zeros(B, self.codes.shape[1], context, dtype=torch.long)
        mel = torch.zeros(B, context, self.mel.shape[1])
        targets = torch.full((B, self.codes.shape[1], context), IGNORE)
        for row, (start, end, offset, score_from) in enumerate(windows):
            first, n = start + offset, min(context, end - start - offset)
            at_start = int(offset == 0)                       # the clip's first input is START, not a frame
            shown = slice(first - 1 + at_start, first - 1 + n)
            codes[row, 0, 0] = START
            codes[row, :, at_start:n] = torch.from_numpy(self.codes[shown].T.astype(np.int64))
            mel[row, at_start:n] = torch.from_numpy(self.mel[shown].astype(np.float32))
            targets[row, :, :n] = torch.from_numpy(self.codes[first:first + n].T.astype(np.int64))
            targets[row, :, :score_from] = IGNORE
        return codes, mel, targets

    def unigram_nll(self):
        """Cross-entropy (nats) of the validation targets under add-one counts of the training targets."""
        train, val = (np.bincount(np.concatenate([self.codes[a:b, 0] for a, b in clips]), minlength=CODEBOOK_SIZE)
                      for clips in (self.train, self.val))
        log_p = np.log((train + 1) / (train.sum() + CODEBOOK_SIZE))
        return float(-(val * log_p).sum() / val.sum())
