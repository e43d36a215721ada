"""
data.py: a dataset's name, or a folder of audio, becomes aligned arrays on disk, and those become batches.

    audio files ──mono, 24 kHz──▶ codec ──▶ codes.npy (frames, K) uint16     clip after clip; row t of both belongs
                             └──▶ log_mel ─▶ mel.npy  (frames, 80) float16   to the same 1/75 s of the same clip

The mel is that of the original audio or, with mel_codebooks=K, of the audio decoded from K codebooks, which is what a
model sees when it samples. With latents=True the codec's own vectors replace it: the encoder's output or, with K, the
decoder's input.

    clips.npy            (clips, 2) int64, first row and one past the last row of every clip
    mel_statistics.npz   mean and covariance of the training split's mel
    meta.json            sources, settings, the split, counts

    >>> data = prepare("speech", load_codec("mini"), mel_codebooks=8)         # as for nano; later calls only open it
    >>> codes, mel, targets = data.batch(seed=0, step=0, batch_size=16, context=256)

Encoding is most of the work. Files of about the same length go through the codec side by side, on a GPU or on all cores
of the CPU (on Linux). Finished files are saved, so an interrupted preparation goes on with the rest (unless the folder
has changed meanwhile).

Which crops a batch holds depends on seed, step, size, context and stretch only, not on the model or a resume. Each row
is a crop of one clip, never of two; a clip shorter than the context is used whole, and the rest of its row is padding
that is not scored. Inputs are one frame late: START, "nothing came before", stands where a clip's frame 0 is predicted.

Read first: `encode_files`, then `Dataset.batch` and `gather`. The rest splits, caches and resumes.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

from corpora import CORPORA, DataError, disk_errors, fetch, locked
from mel import FLOOR, HOP, N_FFT, N_MELS, SAMPLE_RATE, WINDOW, StreamingLogMel, check_window
from model import CODEBOOK_SIZE, IGNORE, START

ASSETS = Path(__file__).parent / "assets"
MEL_OPTIONS = ("mel_codebooks", "latents", "lookahead", "window")      # those of `prepare` that choose the mel
BUNDLED = {"speech": ASSETS / "speech", "music": ASSETS / "music"}
CACHE = Path(__file__).parent / "cache"
SIDES = {"train", "training", "val", "valid", "validation", "validate", "dev", "test", "testing", "eval", "evaluation",
         "holdout", "heldout", "held-out", "held_out"}        # what the sides of a split are often called
File = namedtuple("File", "name size time")                    # its path below the dataset's folder, bytes, nanoseconds
BLOCK = 10 * SAMPLE_RATE             # samples: audio is read, resampled and encoded this much at a time
LONG = 60                            # seconds: on a CPU a longer file is encoded alone; if all files together are
                                     # shorter, a single process encodes them
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"} | {".oga", ".opus", ".aif"}


# ----------------------------------------------------------------------------- audio in

def read_audio(path):
    """Yield a file's audio as mono 24 kHz float32 pieces (n,) of at most about 10 s, whatever its rate and channels.

    Raises DataError, naming the file, if it is unreadable, empty, claims an impossible sample rate or holds non-finite
    samples.
    """
    n_samples = 0
    try:
        with soundfile.SoundFile(path) as file:
            if not 1_000 <= file.samplerate <= 1_000_000:
                raise DataError(f"{path}: claims {file.samplerate} samples a second, not 1,000 to 1,000,000")
            if file.frames > 2**62:                           # a FLAC that was written into a pipe
                raise DataError(f"{path}: its header does not tell its length: encode it again")
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")     # a copy, if at 24 kHz
            n = min(BLOCK, BLOCK * file.samplerate // SAMPLE_RATE) // file.channels
            while len(block := file.read(n, dtype="float32", always_2d=True)):            # may end before it claims to
                if not (np.abs(block) < 100).all():           # a little above 1 is normal
                    raise DataError(f"{path}: holds NaN or infinite samples, or some far outside [-1, 1]")
                wave = block.mean(axis=1)
                n_samples += len(wave)
                yield resampler.resample_chunk(wave)
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (soundfile.SoundFileError, ValueError, TypeError, OSError) as error:           # TypeError: a .raw file
        reason = getattr(error, "error_string", error) if os.path.exists(path) else "no such file, or no permission"
        raise DataError(f"{path}: cannot be read as audio ({reason})") from error
    if n_samples == 0:
        raise DataError(f"{path}: holds no samples")


def read_blocks(path, n, ahead=0):
    """A file in blocks of n samples, each with the `ahead` samples that follow it (past the end: zeros); the last block
    is shorter, perhaps nothing but those zeros."""
    rest = np.zeros(0, np.float32)
    for piece in itertools.chain(read_audio(path), [np.zeros(ahead, np.float32)]):
        rest = np.concatenate([rest, piece])
        while len(rest) >= n + ahead:
            yield rest[:n + ahead]
            rest = rest[n:]
    yield rest


def encode_files(paths, problems, codec, mel_codebooks, latents, lookahead, window):
    """Encode files side by side, block by block. Yields, for each block of each paths[i],

        (i, codes (t, K) uint16, mel (t, 80) float16)

    Everything is causal, so shorter files can be padded and the padding's frames dropped.
    problems: a list with a None per path; if a file cannot be read to its end, the reason goes there. mel_codebooks: 0
    for the mel of the file itself, K for that of what the first K codebooks decode to. latents: the codec's vectors in
    place of either mel, (t, C). lookahead, window: as in `log_mel`.
    """
    block_size = BLOCK if codec.device.type != "cpu" else max(BLOCK // len(paths) // HOP, 1) * HOP       # bounds memory
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()         # one state for all, a row for each file
    spectrogram = StreamingLogMel(lookahead, window)
    ahead = max(0, lookahead)                                 # samples that the mel sees before the codec does
    silence, n_seen = np.zeros(ahead, np.float32), 0          # n_seen: how much of a block the mel has seen already
    readers = [read_blocks(path, block_size, ahead) for path in paths]

    def read(i):                                              # a file's next block; when it has ended: silence
        try:
            return next(readers[i], silence)
        except DataError as error:
            problems[i] = str(error).removeprefix(f"{paths[i]}: ")
            return silence

    with ThreadPoolExecutor(len(paths)) as pool:
        blocks = list(pool.map(read, range(len(paths))))      # side by side
        while any(len(block) > ahead for block in blocks):
            coming = pool.map(read, range(len(paths)))        # begins now, while the codec works
            wave = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(block) for block in blocks], batch_first=True)
            wave = wave.to(codec.device)                                      # (B, n + ahead)
            unquantised = encoder.latents(wave[:, :wave.shape[1] - ahead])    # (B, C, t)
            codes = codec.quantize(unquantised, codec.n_codebooks)            # (B, K, t)
            if latents:
                mel = (codec.dequantize(codes[:, :mel_codebooks]) if mel_codebooks else unquantised).mT   # (B, t, C)
            else:                                                             # (B, t, 80)
                mel = spectrogram.push(decoder.push(codes[:, :mel_codebooks]) if mel_codebooks else wave[:, n_seen:])
            n_seen = ahead
            codes, mel = codes.mT.cpu().numpy().astype(np.uint16), mel.cpu().numpy().astype(np.float16)
            for i, block in enumerate(blocks):
                n = (len(block) - ahead) // HOP               # frames of this file; what follows is padding
                yield i, codes[i, :n], mel[i, :n]
            blocks = list(coming)


# ----------------------------------------------------------------------------- preparing a dataset

def find_audio(dataset, cache=CACHE):
    """A dataset's name or a folder -> (folder, sorted names of the audio files under it, as paths relative to it).

    A corpus of corpora.py is fetched if it is not there yet. Raises DataError if there is no such dataset, no audio in
    it (or in its train/ or val/), or if the cache is in it.
    """
    if dataset in CORPORA:
        folder, corpus = fetch(dataset)
        tops = [folder / archive.folder for archive in corpus.archives]
    else:
        folder = BUNDLED.get(dataset, Path(os.path.expanduser(dataset)))
        tops = [folder]
    if not (dataset and os.path.isdir(folder)):               # "": a shell variable that is not set
        raise DataError(f"no dataset '{dataset}': use {', '.join([*BUNDLED, *CORPORA])}, or the path of a folder of "
                        "audio files")
    if Path(cache).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} contains this program's cache ({cache}): choose a folder of audio only")
    with disk_errors(cache):                                  # a folder may be listed but not entered
        names = sorted(path.relative_to(folder).as_posix() for top in tops for path in _files(top)
                       if path.suffix.lower() in SUFFIXES and path.is_file()
                       and not path.name.startswith("._"))            # macOS's notes on a file of that name
    both = dataset not in CORPORA and all(os.path.isdir(folder / side) for side in ("train", "val"))
    for side in ("train/", "val/") if both else ("",):
        if not any(name.startswith(side) for name in names):
            raise DataError(f"no audio files under {folder / side} (looked for wav, flac, ogg, mp3 and the like)")
    return folder, names


def _files(top):
    """Every file below a folder, linked folders included; each folder only once, as links may form a loop."""
    seen = set()
    skipped = lambda error: print(f"skipped the folder {error.filename}: {error.strerror}", file=sys.stderr)
    for here, folders, files in os.walk(top, followlinks=True, onerror=skipped):
        folders.sort()               # or the disk's order would decide under which name a folder linked twice is listed
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        yield from (Path(here) / file for file in files)


def split_clips(names, dataset=None):
    """Which clips are for validation: a bool per name (relative path).

    Top-level folders train/ and val/ decide, if they are all there is. DataError if one of them, or a folder of another
    usual name, such as test/, stands beside anything else. Otherwise about a tenth validates: the clips whose paths
    hash low, so adding a file moves no other (in a small folder the lowest always validates and the highest never,
    until a lower or higher one comes). A dataset of corpora.py has a split, or groups (a speaker's clips) that stay
    whole.
    """
    corpus = CORPORA.get(dataset)
    if corpus and corpus.val:
        return [name.startswith(f"{corpus.val}/") for name in names]
    tops = sorted({name.split("/")[0] for name in names}, key=lambda top: (top.lower() not in SIDES, top))
    if len(tops) > 1 and tops[0].lower() in SIDES:            # sides of a split come first
        if tops != ["train", "val"]:
            raise DataError(f"the dataset holds {', '.join(tops[:3])}: call the two sides of a split train/ and val/, "
                            "and move all else out")
        return [name.startswith("val/") for name in names]
    groups = ["/".join(name.split("/")[:corpus.group]) for name in names] if corpus else names
    hashes = [int(hashlib.sha256(os.fsencode(group)).hexdigest()[:8], 16) / 2**32 for group in groups]
    threshold = min(max(0.1, min(hashes) + 1e-12), max(hashes))       # the lowest validates, the highest never does
    return [h < threshold for h in hashes]


def check_mel(codec, mel_codebooks, latents, lookahead, window):
    """Raise DataError if this mel cannot be made: options as in `encode_files`."""
    if not 0 <= mel_codebooks <= codec.n_codebooks:
        raise DataError(f"codec {codec.name} has {codec.n_codebooks} codebooks: the mel can be of 0 (the original) to "
                        f"{codec.n_codebooks}, not of {mel_codebooks}")
    if lookahead and (mel_codebooks or latents):
        raise DataError("a lookahead goes with the mel of recordings only: --mel-codebooks 0, no --mix, no --latents")
    if latents and tuple(window) != WINDOW:
        raise DataError("a window goes with a mel only: leave out --window or --latents")
    try:
        check_window(lookahead, window)
    except ValueError as error:
        raise DataError(str(error)) from error


def prepare(dataset, codec, cache=CACHE, quiet=False, mel_codebooks=0, latents=False, lookahead=0, window=WINDOW):
    """Encode a dataset with a codec, unless that is done already, and open it.

    dataset: `speech`, `music`, a name of corpora.py or a folder, searched recursively. mel_codebooks, latents,
    lookahead, window: as in `encode_files`. Returns a `Dataset`. It is kept in `cache/`, under a key made of everything
    that its content depends on: files (path, size, time), codec and its checksum, mel settings. Files that cannot be
    used are skipped and named in one line. It may fork: no other thread should be at work meanwhile. Raises DataError
    if there is no such dataset, nothing in it can be used, the mel cannot be made, or the disk is full or not writable.
    """
    check_mel(codec, mel_codebooks, latents, lookahead, window)
    folder, names = find_audio(dataset, cache)
    split_clips(names, dataset)                               # an unclear split is found now, not after encoding
    stats = [(folder / name).stat() for name in names]
    files = [File(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)]
    made_with = {"format": 2, "codec": codec.name, "codec_checksum": codec.checksum, "n_codebooks": codec.n_codebooks,
                 "sample_rate": SAMPLE_RATE, "hop": HOP, "n_fft": N_FFT, "mel_floor": FLOOR,
                 "n_mels": codec.vectors.shape[-1] if latents else N_MELS, "latents": latents,
                 "mel_codebooks": mel_codebooks, "lookahead": lookahead, "window": window}
    # changing any of these gives another key; after changing the code raise "format", or an old cache would be used
    key = hashlib.sha256(json.dumps([str(folder.resolve()), files, made_with]).encode()).hexdigest()[:16]
    if dataset not in (*BUNDLED, *CORPORA):
        dataset = str(folder.resolve())                       # so that it is found again from anywhere
    home = Path(cache) / (f"{Path(dataset).name}-{codec.name}"[:50] + f"-{key}")      # a name has 255 bytes at most
    ready = os.path.isdir(home)                               # False, too, if the cache may not be entered
    if not ready:
        with disk_errors(cache), locked(Path(cache)):
            if not home.is_dir():                             # another process may have made it while this one waited
                _make(home, dataset, folder, files, codec, made_with, quiet)
    shutil.rmtree(home / "clips", ignore_errors=True)         # joined; an earlier call may have been killed just here
    data = Dataset(home)
    if ready and data.meta["skipped"]:                        # otherwise `_make` has just said so
        print(f"skipped earlier: {len(data.meta['skipped'])} of {len(names)} files; to try them again, delete {home}",
              file=sys.stderr)
    return data


def _make(home, dataset, folder, files, codec, made_with, quiet):
    """Encode and join a dataset beside `home`: only a finished cache ever gets that name."""
    unfinished = home.with_name(f".{home.name}")
    clips = unfinished / "clips"                              # file I becomes clips/I.clip
    clips.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(len(files)) if not (clips / f"{i}.clip").exists()]
    batches, n_workers = _divide(todo, folder, files, codec.device)
    # A DataLoader as a pool of processes: its items are lists of files, its collate_fn encodes one list. Unlike
    # multiprocessing.Pool's, its processes end when their parent is killed
    work = torch.utils.data.DataLoader(
        batches, collate_fn=functools.partial(_encode, clips, folder, files, codec, made_with), batch_size=None,
        in_order=False, num_workers=n_workers, multiprocessing_context="fork" if n_workers else None)
    total, problems = sum(file.size for file in files), {}
    with tqdm(total=total, initial=total - sum(files[i].size for i in todo), unit="B", unit_scale=True,
              desc=f"preparing {Path(dataset).name} with {codec.name}", disable=quiet) as bar:
        for results in work:
            if isinstance(results, OSError):
                raise results                                 # here, where `disk_errors` sees it
            problems |= results
            bar.update(sum(files[i].size for i in results))
    skipped = [f"{files[i].name}: {problem}" for i, problem in sorted(problems.items()) if problem]
    if skipped:
        print(f"skipped {len(skipped)} of {len(files)} files: {'; '.join(skipped)}", file=sys.stderr)
    try:
        _join(unfinished, dataset, [file.name for file in files], made_with, skipped)
    except DataError:
        shutil.rmtree(unfinished)                             # nothing in it is worth keeping
        raise
    # the arrays, to the disk before their clips are deleted (the pattern skips clips/, which has no dot)
    for path in unfinished.glob("*.*"):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    os.replace(unfinished, home)


def _divide(todo, folder, files, device):
    """Which files are encoded side by side: (lists of their numbers, how many processes to start for that)."""
    seconds = {}
    for i in todo:
        try:
            seconds[i] = soundfile.info(folder / files[i].name).duration
        except (soundfile.SoundFileError, OSError, ValueError, ZeroDivisionError):
            seconds[i] = 0.0                                  # reading it will tell what is wrong
    todo = sorted(todo, key=seconds.get, reverse=True)        # similar lengths together, as padding is wasted work
    if device.type != "cpu":                                  # a GPU: 16 files at once, in this process
        return [todo[i:i + 16] for i in range(0, len(todo), 16)], 0
    # a process for each core, if there is enough to share; none on macOS and Windows, where forking is not safe
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    n_workers = cores if sum(seconds.values()) >= LONG else 0
    n_alone = sum(length > LONG for length in seconds.values())
    n = max(1, min(8, len(todo) // max(1, n_workers)))
    batches = [[i] for i in todo[:n_alone]] + [todo[i:i + n] for i in range(n_alone, len(todo), n)]
    return batches, min(n_workers, len(batches)) if len(batches) > 1 else 0


def _encode(clips, folder, files, codec, made_with, batch):
    """Encode the files numbered in `batch` side by side, file I into clips/I.clip: a row a frame, its codes and then
    the bits of its float16 mel. Returns {I: None, or why it cannot be used}, or the OSError if the cache's disk fails:
    were it raised, a DataLoader would raise a copy without its errno."""
    # a name of its own for each process: one whose parent was killed may still be writing
    parts, problems = [clips / f"{i}.{os.getpid()}.part" for i in batch], [None] * len(batch)
    mel_options = {name: made_with[name] for name in MEL_OPTIONS}
    try:
        with contextlib.ExitStack() as stack:
            out = [stack.enter_context(open(part, "wb")) for part in parts]
            paths = [folder / files[i].name for i in batch]
            for row, codes, mel in encode_files(paths, problems, codec, **mel_options):
                out[row].write(np.concatenate([codes, mel.view(np.uint16)], axis=1).tobytes())
            for file in out:
                file.flush()
                os.fsync(file.fileno())                       # or a power cut might leave an empty .clip
        for row, part in enumerate(parts):
            if not part.stat().st_size:
                problems[row] = problems[row] or f"shorter than one frame of {HOP} samples"
            if not problems[row]:
                os.replace(part, clips / f"{batch[row]}.clip")
    except OSError as error:                                  # not of an unreadable file, which is a `problem`
        return error
    return dict(zip(batch, problems))


def _join(unfinished, dataset, names, made_with, skipped):
    """The encoded clips one after the other: codes.npy, mel.npy, clips.npy, mel_statistics.npz and meta.json."""
    paths = {i: path for i in range(len(names)) if (path := unfinished / "clips" / f"{i}.clip").exists()}
    if not paths:
        raise DataError(f"nothing usable in dataset '{dataset}': all {len(names)} files were skipped")
    K, n_mels = made_with["n_codebooks"], made_with["n_mels"]
    width = K + n_mels                                        # numbers a row, 2 bytes each
    lengths = [path.stat().st_size // (2 * width) for path in paths.values()]             # in frames
    ends, n_frames = np.cumsum(lengths), sum(lengths)
    clips, used = np.stack([ends - lengths, ends], axis=1), [names[i] for i in paths]
    if {"train", "val"} <= {n.split("/")[0] for n in names}:  # even if one side has lost all its files
        is_val = [name.startswith("val/") for name in used]
    elif len(used) > 1:
        is_val = split_clips(used, dataset)
    else:
        if n_frames < 10:
            raise DataError(f"dataset '{dataset}' holds {n_frames} frames in one file: too few to be divided")
        print(f"warning: {used[0]} is the only usable file of '{dataset}': its last 10 % validate", file=sys.stderr)
        cut = n_frames - n_frames // 10
        clips, used, is_val = np.array([(0, cut), (cut, n_frames)]), used * 2, [False, True]
    # how many frames of each file train; for a lone file, cut in two above, `zip` below takes only the first number
    to_train = [0 if val else end - start for (start, end), val in zip(clips.tolist(), is_val)]
    if all(is_val) or not any(is_val):
        raise DataError(f"nothing usable in dataset '{dataset}' is left to {'train' if all(is_val) else 'validate'} on")
    train_frames, total, products = sum(to_train), np.zeros(n_mels), np.zeros((n_mels, n_mels))
    # written, not mapped: on a full disk a write raises OSError, whereas a mapped page would kill the process
    with open(unfinished / "codes.npy", "wb") as codes, open(unfinished / "mel.npy", "wb") as mels:
        for file, dtype, n_columns in (codes, "<u2", K), (mels, "<f2", n_mels):
            np.lib.format.write_array_header_1_0(
                file, {"descr": dtype, "fortran_order": False, "shape": (n_frames, n_columns)})
        for path, left in zip(paths.values(), to_train):
            with open(path, "rb") as file:
                while len(rows := np.fromfile(file, np.uint16, 100_000 * width).reshape(-1, width)):
                    codes.write(rows[:, :K].tobytes())
                    mels.write(rows[:, K:].tobytes())
                    part = rows[:left, K:].view(np.float16).astype(np.float64)
                    left -= len(part)
                    total, products = total + part.sum(0), products + part.T @ part
    mean = total / train_frames                               # and covariance E[x x'] - E[x] E[x]': one pass is enough
    covariance = products / train_frames - np.outer(mean, mean) + 1e-4 * np.eye(n_mels)        # silence has no variance
    np.savez(unfinished / "mel_statistics.npz", mean=mean, covariance=covariance)
    np.save(unfinished / "clips.npy", clips.astype(np.int64))
    meta = {"dataset": dataset, **made_with,
            "n_frames": n_frames, "train_frames": train_frames, "val_frames": n_frames - train_frames,
            "skipped": skipped, "clips": [{"name": c, "val": bool(v)} for c, v in zip(used, is_val)]}
    (unfinished / "meta.json").write_text(json.dumps(meta, indent=1))


# ----------------------------------------------------------------------------- batches

class Dataset:
    """A prepared dataset: memory-mapped codes and mel, their clips, and batches of them.

    meta, key       the content of meta.json; the name of the cache's folder, which changes with all it was made from
    codes, mel      (frames, K) uint16 and (frames, 80) float16, all clips one after the other
    fingerprint     hash of the clips' names, lengths and split, the codec's checksum and the mel settings, for
                    --resume. Where files and codec are is left out, so that a run may continue elsewhere; samples are
                    not hashed
    train, val      (clips, 2) first and one past the last frame of each clip of the split
    mel_statistics  mean (80,) and covariance (80, 80) of the training split's mel
    """

    def __init__(self, home):
        self.home, self.key = home, home.name
        try:
            self.meta = json.loads((home / "meta.json").read_text())
            clips, statistics = np.load(home / "clips.npy"), np.load(home / "mel_statistics.npz")
            self.mel_statistics = statistics["mean"], statistics["covariance"]
            made_of = [{**self.meta, "dataset": None, "codec": None, "skipped": []}, clips.tolist()]
            self.fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
            is_val = np.array([clip["val"] for clip in self.meta["clips"]])
            self.train, self.val = clips[~is_val], clips[is_val]
            n_frames, n_mels = self.meta["train_frames"] + self.meta["val_frames"], len(self.mel_statistics[0])
            fits = (self.codes.ndim == 2 and self.codes.dtype == np.uint16 and len(self.codes) == n_frames
                    and self.mel.shape == (n_frames, n_mels) and self.mel.dtype == np.float16
                    and clips.dtype == np.int64 and (clips[:, 0] < clips[:, 1]).all()
                    and 0 <= clips.min() <= clips.max() <= n_frames and len(self.train) and len(self.val))
        except Exception as error:                            # damaged arrays make numpy raise almost anything
            raise self.damaged(type(error).__name__) from error
        if not fits:
            raise self.damaged("its parts do not fit together")
        self.train_ends = np.diff(self.train, axis=1)[:, 0].cumsum()      # training frames up to the end of each clip

    # mapped anew for every batch, as nanoGPT does: otherwise the pages that were read pile up in this process's memory
    codes = property(lambda self: np.load(self.home / "codes.npy", mmap_mode="r"))
    mel = property(lambda self: np.load(self.home / "mel.npy", mmap_mode="r"))

    def damaged(self, how):
        return DataError(f"the cache {self.home} is damaged ({how}): delete that folder, and it will be made anew")

    def batch(self, seed, step, batch_size, context, stretch=None, n_codebooks=None, rows=slice(None)):
        """A training batch, a pure function of its arguments: codes and targets (B, K, T), mel (B, T, 80) float16.

        Each row is centred on a frame drawn uniformly from the training split, then moved to lie inside its clip,
        so that the first frames of a clip, where sampling starts, come up often. With `stretch`, a multiple of
        `context`, pieces of `stretch` frames are drawn instead and cut into rows: neighbours, from fewer places.
        K is `n_codebooks`, by default all that the codec has. rows: only these, for one of several processes.
        """
        stretch = stretch or context
        rng = np.random.default_rng((seed, step))
        crops = []
        for centre in rng.integers(self.train_ends[-1], size=batch_size * context // stretch):
            clip = np.searchsorted(self.train_ends, centre, side="right")         # the clip it is in
            start, end = self.train[clip]
            offset = centre - (self.train_ends[clip] - (end - start)) - stretch // 2      # within the clip
            offset = max(0, min(offset, end - start - stretch))
            crops += [(start, end, offset + i, 0) for i in range(0, stretch, context)]
        return self.gather(crops[rows], context, n_codebooks)

    def validation(self, context, batch_size, n_codebooks=None):
        """The whole validation split in fixed order: yields (codes, mel, targets, clip (B,)) batches.

        Crops overlap by half and only the second half of each is scored, except for a clip's first crop, which is
        scored whole: so every target counts once, with at least half a context behind it wherever the clip has that
        much. With a context of 4 and a clip of 9, crops at 0, 2, 4 and 6 score frames 0-3, 4-5, 6-7 and 8. `context`
        must be at least 2.
        """
        half = context // 2
        crops = [(i, start, end, offset, context - half if offset else 0)
                 for i, (start, end) in enumerate(self.val)
                 for offset in [0, *range(half, end - start - (context - half), half)]]
        for i in range(0, len(crops), batch_size):
            part = crops[i:i + batch_size]
            clips = torch.tensor([crop[0] for crop in part])
            yield (*self.gather([crop[1:] for crop in part], context, n_codebooks), clips)

    def gather(self, crops, context, n_codebooks=None):
        """Crops (clip start, clip end, offset, first scored position) -> padded tensors, the inputs one frame late.

        Position p of a row predicts frame offset + p of the clip and is shown frame offset + p - 1; before the
        clip's first frame it is shown START. n_codebooks: as in `batch`.
        """
        B, all_codes, all_mel = len(crops), self.codes[:, :n_codebooks], self.mel
        codes = np.zeros((B, all_codes.shape[1], context), np.int64)
        mel = np.zeros((B, context, all_mel.shape[1]), np.float16)
        targets = np.full((B, all_codes.shape[1], context), IGNORE, np.int64)
        for row, (start, end, offset, score_from) in enumerate(crops):
            first, n = start + offset, max(0, min(context, end - start - offset))             # n: 0 past the clip's end
            targets[row, :, score_from:n] = all_codes[first + score_from:first + n].T
            n_start = int(offset == 0)                        # how many positions, 1 or 0, are shown START
            codes[row, 0, :n_start] = START
            codes[row, :, n_start:n] = all_codes[first + n_start - 1:first + n - 1].T
            mel[row, n_start:n] = all_mel[first + n_start - 1:first + n - 1]
        if targets.max() >= CODEBOOK_SIZE or codes.max() > START:
            raise self.damaged(f"codes that do not exist: CODEBOOK_SIZE is {CODEBOOK_SIZE}")
        return torch.from_numpy(codes), torch.from_numpy(mel), torch.from_numpy(targets)

    def unigram_nll(self):
        """Cross-entropy (nats) of the validation targets under add-one counts of the training targets."""
        # self.codes is mapped anew for every clip: otherwise all that was read stays in memory
        train, val = (sum(np.bincount(self.codes[start:end, 0], minlength=CODEBOOK_SIZE)[:CODEBOOK_SIZE]
                          for start, end in clips) for clips in (self.train, self.val))
        log_p = np.log((train + 1) / (train.sum() + CODEBOOK_SIZE))
        return float(-(val * log_p).sum() / val.sum())
