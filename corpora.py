"""
corpora.py: published corpora, from their official addresses to a folder of audio.

    address ──download, resumed──▶ archive ──checksum──▶ unpack ──▶ corpora/LibriSpeech/dev-clean/…

    >>> folder, corpus = fetch("librispeech-mini")            # downloads once, then only finds it

    name               what                                                                      download    licence
    librispeech        100.6 h of read English, 251 speakers; 5.4 h of 40 others validate          6.7 GB    CC BY 4.0
    librispeech-mini   those 5.4 h alone; two of the 40 speakers, by a hash, validate              0.3 GB    CC BY 4.0
    fma                66 h of music, 8,000 tracks of 30 s in eight genres                         7.7 GB    CC, various

LibriSpeech (Panayotov et al., ICASSP 2015) is the paper's corpus. FMA small (Defferrard et al., 1612.01840) is the
music corpus because it holds real recordings of many styles, published as one archive with a checksum, under licences
that allow research; MusicNet and MAESTRO hold classical music only (MAESTRO only piano), and GTZAN has no licence.

An archive is used only if its checksum is the one its publishers give. Nothing in it can write outside its folder. A
copy that you already have will do: corpora/LibriSpeech may be a link to it. (Downloads still pass through corpora/; to
put them on a larger disk, make corpora itself a link.)
"""
import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

HOME = Path(__file__).parent / "corpora"
TIMEOUT = 60                         # seconds without a byte after which a connection counts as dead
ATTEMPTS = 6                         # connections in a row that bring nothing before we give up
BLOCK = 1 << 20                      # bytes read at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataError(RuntimeError):
    """Audio or a dataset that cannot be used; the message is one line, meant for the user."""


class Archive(NamedTuple):
    url: str
    checksum: str                    # algorithm:hexadecimal digest, as its publishers print it
    folder: str                      # the folder inside it that we want; the rest is left in the archive


class Corpus(NamedTuple):
    archives: tuple
    val: str | None = None           # the folder that validates; None: about a tenth of the groups do
    group: int = 2                   # then: clips whose paths share this many leading parts form a group, never divided


SLR12 = "https://www.openslr.org/resources/12"                # checksums: md5sum.txt there
TRAIN_CLEAN_100 = Archive(f"{SLR12}/train-clean-100.tar.gz", "md5:2a93770f6d5c6c964bc36631d331a522",
                          "LibriSpeech/train-clean-100")
DEV_CLEAN = Archive(f"{SLR12}/dev-clean.tar.gz", "md5:42e2234ba48799c1f50f24a7926300a1", "LibriSpeech/dev-clean")
FMA_SMALL = Archive("https://os.unil.cloud.switch.ch/fma/fma_small.zip",              # checksum: github.com/mdeff/fma
                    "sha1:ade154f733639d52e35e32f5593efe5be76c6d70", "fma_small")

CORPORA = {
    "librispeech": Corpus((TRAIN_CLEAN_100, DEV_CLEAN), val="LibriSpeech/dev-clean"),
    "librispeech-mini": Corpus((DEV_CLEAN,), group=3),        # LibriSpeech/dev-clean/84/…: a speaker
    "fma": Corpus((FMA_SMALL,)),     # fma_small/000/…: of a thousand uploads in a row, so nearly all albums stay whole
}


# ----------------------------------------------------------------------------- one process at a time

@contextlib.contextmanager
def locked(folder):
    """Wait until no other process is inside `locked(folder)`. The operating system frees the lock if a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        with contextlib.suppress(ImportError):                # Windows has no fcntl: there, start one at a time
            import fcntl
            try:                                              # lockf, not flock: children do not inherit it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                print(f"waiting for another process to finish with {folder}", file=sys.stderr)
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError as error:                          # a network disk without locks
                raise DataError(f"{folder} cannot be locked ({error.strerror}): make it a link to a local "
                                "disk") from error
        yield


# ----------------------------------------------------------------------------- from the net

def fetch(name, home=None):
    """A corpus by name -> (folder, `Corpus`): `folder` holds its archives' folders, fetched if they are not there yet.

    Raises DataError, one line, if they cannot be fetched. What has arrived is kept, and the next call goes on from it.
    """
    corpus, home = CORPORA[name], Path(home or HOME)
    if not all((home / archive.folder).is_dir() for archive in corpus.archives):
        for place in (home, *((home / archive.folder).parent for archive in corpus.archives)):
            if place.is_symlink() and not place.exists():
                raise DataError(f"{place} is a link to {os.readlink(place)}, which is not there: is its disk mounted?")
        with disk_errors(home), locked(home):
            for archive in corpus.archives:
                if not (home / archive.folder).is_dir():
                    unpack(download(archive, home), archive, home)
                _path(archive, home).unlink(missing_ok=True)  # also one left by a call that ended right after unpacking
    return home, corpus


@contextlib.contextmanager
def disk_errors(folder):
    """Turn a full or missing disk, or missing permissions, into a DataError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"no permission to use {error.filename or folder}: this program writes into {folder}, and "
                            "reads all audio files of a dataset") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise DataError(f"{error.filename} is a file, or a link to a folder that is not there: is its disk "
                            "mounted?") from error
        if error.errno not in DISK_FULL:
            raise
        what = "files of this size cannot be kept" if error.errno == errno.EFBIG else "no space left"
        raise DataError(f"{what} in {folder}: make room there, or make it a link to another disk, and run the same "
                        "command again; it goes on from where it stopped") from error


def _path(archive, home):
    return home / archive.url.rsplit("/", 1)[1]


def download(archive, home):
    """Fetch an `Archive` into the folder `home` -> its path, its checksum verified.

    It goes on where an earlier call ended. If a connection stalls, breaks off or meets a busy server, a new one goes on
    from the first missing byte.
    """
    path, idle = _path(archive, home), 0
    if path.exists() and _is_right(path, archive):            # an earlier call ended while it was unpacking this
        return path
    with tqdm(desc=f"downloading {path.name}", unit="B", unit_scale=True, unit_divisor=1000) as bar:
        while idle < ATTEMPTS:
            have, done, problem = path.stat().st_size if path.exists() else 0, False, None
            try:
                done = _receive(archive.url, path, have, bar)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"{archive.url}: the server answers {error.code} {error.reason}; if the file has "
                                    f"moved, put it here: {path} (it is deleted once it is unpacked)") from error
                problem = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in DISK_FULL or getattr(error, "filename", None):
                    raise                                     # the disk's, not the network's
                problem = str(getattr(error, "reason", error))
            if done:
                if _is_right(path, archive):
                    return path
                path.unlink()                                 # or every later call would go on from it, and fail
                raise DataError(f"{archive.url}: what arrived is not what its publishers describe (it should have the "
                                f"checksum {archive.checksum}); it was deleted: run the command again")
            idle = 0 if path.exists() and path.stat().st_size > have else idle + 1
            if (problem or idle) and idle < ATTEMPTS:
                time.sleep(min(2 ** idle / 2, TIMEOUT))
    raise DataError(f"{archive.url}: {ATTEMPTS} attempts in a row brought nothing ({problem or 'no bytes'}); "
                    + (f"{have:,} bytes are kept: " if have else "") + "run the command again to go on")


def _receive(url, path, have, bar):
    """One connection: append what is missing to the file `path`, which holds `have` bytes. Is it complete now?"""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return True                                           # nothing beyond `have`: the checksum will tell
    with reply:
        length = reply.headers.get("Content-Length")
        if have and reply.status != 206:                      # no ranges here: the server sends everything
            if length and int(length) < have:                 # less than we have: an error page
                raise OSError(f"{length} bytes came instead of the rest")
            have = 0
        total = (have + int(length)) if length else None
        if total and shutil.disk_usage(path.parent).free < 2 * total - have:              # packed and unpacked
            raise DataError(f"{path.parent} lacks the {(2 * total - have) / 1e9:.1f} GB of free space that "
                            f"{path.name} needs, packed and unpacked: make room, or make that folder a link to a "
                            "larger disk")
        bar.total, bar.n = total, have
        with open(path, "r+b" if have else "wb") as file:
            file.seek(have)
            while block := reply.read1(BLOCK):          # what has arrived, without waiting for more
                file.write(block)
                have += len(block)
                bar.update(len(block))
            file.truncate()
    return total is None or have >= total


def _is_right(path, archive):
    """Does the file have the checksum that the archive's publishers print?"""
    algorithm, expected = archive.checksum.split(":")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


# ----------------------------------------------------------------------------- out of the archive

def unpack(path, archive, home):
    """Unpack the folder `archive.folder` of a tar or zip file into the folder `home`: all of it, or nothing.

    Raises DataError for a damaged archive and for a member that is a link or a device, or leads out of the archive (as
    C: would on Windows).
    """
    target, wanted = home / archive.folder, PurePosixPath(archive.folder)
    # on the disk where it will stay: target.parent may be a link to another one
    staging = (target.parent if target.parent.exists() else home).resolve() / f".{path.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)                # left by an interrupted call
    try:
        with tqdm(desc=f"unpacking {path.name}", unit=" files") as bar:
            for name, is_file, content in _members(path):
                name = PurePosixPath(name)
                if name.is_absolute() or ".." in name.parts or set("\\:") & set(str(name)) or not is_file:
                    raise DataError(f"{path} holds {name}, a link or a path that leads out of it: not unpacked")
                if name.is_relative_to(wanted):
                    place = staging / name.relative_to(wanted)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with open(place, "wb") as file, content() as source:
                        shutil.copyfileobj(source, file, BLOCK)
                    bar.update()
        if not staging.is_dir():
            raise DataError(f"{path} holds no {wanted}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise DataError(f"{path} is damaged ({reason}): delete it and run the command again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _members(path):
    """Yield (name, is it a plain file?, function that opens it) for all members but folders."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            for entry in file.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)                     # 0: the archiver stored no Unix mode
                if not entry.is_dir():
                    yield entry.filename, kind in (0, stat.S_IFREG), lambda: file.open(entry)
    else:
        with tarfile.open(path, "r:*") as file:
            for entry in file:
                if not entry.isdir():
                    yield entry.name, entry.isfile(), lambda: file.extractfile(entry)
