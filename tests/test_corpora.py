"""
python -m pytest tests/test_corpora.py

Published corpora, from a server on this machine that serves small archives of the same layout and misbehaves on demand.
"""
import errno
import hashlib
import http.server
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpora
from corpora import Archive, Corpus, DataError, fetch
from data import find_audio, prepare, split_clips


# ----------------------------------------------------------------------------- a server, and what it serves

class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: bytes}. Each request takes the next of `moods`, and "well" when there is none left."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.moods, self.ranges = {}, [], []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, mood = self.server, self.server.moods.pop(0) if self.server.moods else "well"
        server.ranges.append(self.headers.get("Range"))
        body = server.files.get(self.path[1:])
        if body is None or isinstance(mood, int):
            return self.send_error(mood if body is not None else 404)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        if mood == "no ranges":
            start = 0
        if start >= len(body):
            return self.send_error(416)
        if mood == "a page instead":
            start, body = 0, b"back in a minute"
        if mood == "wrong bytes":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        part = body[start:start + (len(body) - start) // 2] if mood in ("cuts off", "stalls") else body[start:]
        try:
            self.wfile.write(part)
            if mood == "stalls":
                self.wfile.flush()
                time.sleep(5)
        except (BrokenPipeError, ConnectionResetError):
            pass                                              # a client that was killed

    def log_message(self, *_):
        pass


@pytest.fixture()
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def audio(seed, format="FLAC"):
    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(seed).standard_normal(16_000)
    soundfile.write(file, wave, 44_100 if format == "MP3" else 16_000, format=format)
    return file.getvalue()


def tar(members):
    """{name: bytes, or a TarInfo} -> a .tar.gz, the folders among its members as in the real ones."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        folders = {str(parent) for name in members for parent in Path(name).parents} - {".", "/"}
        for folder in sorted(folders):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if info.isfile() else None)
    return file.getvalue()


def librispeech(part, speakers):
    """A LibriSpeech archive: two utterances a speaker, transcripts, and the texts that lie around them."""
    members = {"LibriSpeech/README.TXT": b"read me", "LibriSpeech/SPEAKERS.TXT": b"; ID |SEX| SUBSET"}
    for speaker in speakers:
        folder = f"LibriSpeech/{part}/{speaker}/{speaker}0"
        members[f"{folder}/{speaker}-{speaker}0.trans.txt"] = b"84-1-0000 GO DO YOU HEAR"
        for i in range(2):
            members[f"{folder}/{speaker}-{speaker}0-000{i}.flac"] = audio(speaker + i)
    return tar(members)


@pytest.fixture()
def published(server, tmp_path, monkeypatch):
    """The three corpora in miniature on the server, and an empty folder for them: returns that folder."""
    def serve(archive, content):
        path = archive.url.rsplit("/", 1)[1]
        server.files[path] = content
        algorithm = archive.checksum.split(":")[0]
        return archive._replace(url=server.url(path), checksum=f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}")

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fma_small/README.txt", "read me")
        for n in range(8):
            archive.writestr(f"fma_small/{n:03}/{n:03}002.mp3", audio(n, "MP3"))
    train = serve(corpora.TRAIN_CLEAN_100, librispeech("train-clean-100", range(103, 106)))
    dev = serve(corpora.DEV_CLEAN, librispeech("dev-clean", range(84, 96)))
    fma = serve(corpora.FMA_SMALL, file.getvalue())
    for name, archives in (("librispeech", (train, dev)), ("librispeech-mini", (dev,)), ("fma", (fma,))):
        monkeypatch.setitem(corpora.CORPORA, name, corpora.CORPORA[name]._replace(archives=archives))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(corpora, "HOME", tmp_path / "corpora")
    monkeypatch.setattr(corpora, "TIMEOUT", 0.3)
    monkeypatch.setattr(corpora, "ATTEMPTS", 3)
    return tmp_path / "corpora"


# ----------------------------------------------------------------------------- what they become

def test_librispeech_trains_on_one_part_and_validates_on_the_other(published, tiny_codec, tmp_path):
    dataset = prepare("librispeech", tiny_codec, tmp_path / "cache", quiet=True)
    speakers = {val: {c["name"].split("/")[2] for c in dataset.meta["clips"] if c["val"] == val} for val in (False, True)}
    assert speakers == {False: {"103", "104", "105"}, True: {str(n) for n in range(84, 96)}}
    assert len(dataset.codes) == 30 * 75 and dataset.key.startswith("librispeech-tiny-")


def test_no_speaker_of_librispeech_mini_is_on_both_sides(published):
    folder, names = find_audio("librispeech-mini")
    sides = {}
    for name, val in zip(names, split_clips(names, "librispeech-mini")):
        sides.setdefault(name.split("/")[2], set()).add(val)
    assert len(sides) == 12 and all(len(side) == 1 for side in sides.values()) and {True} in sides.values()
    assert all(name.endswith(".flac") and (folder / name).is_file() for name in names)
    chapters = [f"LibriSpeech/dev-clean/{speaker}/{chapter}/a.flac"
                for speaker in range(84, 124) for chapter in range(3)]
    val = split_clips(chapters, "librispeech-mini")
    assert val[::3] == val[1::3] == val[2::3] and 0 < sum(val) < len(val)          # all three chapters of a speaker


def test_tracks_of_fma_that_were_uploaded_together_stay_together(published):
    names = [f"fma_small/{n // 100:03}/{n:06}.mp3" for n in range(3000)]
    sides = {}
    for name, val in zip(names, split_clips(names, "fma")):
        sides.setdefault(name.split("/")[1], set()).add(val)
    assert all(len(side) == 1 for side in sides.values()) and 0 < sum({True} == s for s in sides.values()) < 10
    assert len(find_audio("fma")[1]) == 8


def test_what_is_there_is_not_fetched_again(published, server, capfd):
    find_audio("librispeech-mini")
    assert "downloading dev-clean.tar.gz: 100%" in capfd.readouterr().err
    find_audio("librispeech")                                 # needs dev-clean, too
    find_audio("librispeech")
    assert len(server.ranges) == 2
    assert sorted(path.name for path in published.iterdir()) == [".lock", "LibriSpeech"]
    assert sorted(path.name for path in (published / "LibriSpeech").iterdir()) == ["dev-clean", "train-clean-100"]


# ----------------------------------------------------------------------------- a network that is none

@pytest.mark.parametrize("mood", ["cuts off", "stalls", 503])
def test_a_bad_connection_is_made_anew_and_goes_on_where_it_was(published, server, mood):
    server.moods = [mood, mood, "well"]
    folder, names = find_audio("librispeech-mini")
    assert len(names) == 24 and len(server.ranges) == 3
    if mood != 503:
        first, second = (int(re.match(r"bytes=(\d+)-", r)[1]) for r in server.ranges[1:])
        assert first == len(server.files["dev-clean.tar.gz"]) // 2 and second > first


@pytest.mark.parametrize("code", [408, 429, 500])
def test_a_busy_server_is_asked_again(published, server, code):
    server.moods = [code]
    assert len(find_audio("librispeech-mini")[1]) == 24 and len(server.ranges) == 2


def test_an_interrupted_download_goes_on_in_the_next_call(published, server):
    server.moods = ["cuts off"] + [503] * 3
    with pytest.raises(DataError, match=r"brought nothing \(503 .* bytes are kept"):
        find_audio("librispeech-mini")
    assert len(find_audio("librispeech-mini")[1]) == 24
    assert int(re.match(r"bytes=(\d+)-", server.ranges[-1])[1]) == len(server.files["dev-clean.tar.gz"]) // 2


def test_a_server_without_ranges_sends_it_all_again(published, server):
    server.moods = ["cuts off", "no ranges"]
    assert len(find_audio("librispeech-mini")[1]) == 24


def test_a_page_that_comes_instead_of_the_rest_costs_nothing(published, server):
    server.moods = ["cuts off"] + ["a page instead"] * 3
    with pytest.raises(DataError, match="16 bytes came instead of the rest.* bytes are kept"):
        find_audio("librispeech-mini")
    assert len(find_audio("librispeech-mini")[1]) == 24
    assert int(re.match(r"bytes=(\d+)-", server.ranges[-1])[1]) == len(server.files["dev-clean.tar.gz"]) // 2


def test_a_whole_file_that_was_never_checked_is_not_fetched_again(published, server):
    published.mkdir()
    (published / "dev-clean.tar.gz").write_bytes(server.files["dev-clean.tar.gz"])
    assert len(find_audio("librispeech-mini")[1]) == 24 and not server.ranges
    (published / "fma_small.zip").write_bytes(server.files["fma_small.zip"] + b"more than there is")
    with pytest.raises(DataError, match="not what its publishers describe .* deleted"):
        find_audio("fma")                                     # the server has answered 416
    assert len(find_audio("fma")[1]) == 8


def test_a_file_put_there_by_hand_is_checked_too(published, server):
    published.mkdir()
    whole = server.files["dev-clean.tar.gz"]
    (published / "dev-clean.tar.gz").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(DataError, match="not what its publishers describe"):
        find_audio("librispeech-mini")


def test_a_link_to_a_copy_elsewhere_is_completed_there(published, server, tmp_path):
    (tmp_path / "disk").mkdir()
    published.mkdir()
    (published / "LibriSpeech").symlink_to(tmp_path / "disk")
    assert len(find_audio("librispeech-mini")[1]) == 24
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["dev-clean"]


@pytest.mark.parametrize("place", ["", "LibriSpeech"])
def test_a_link_to_a_disk_that_is_not_mounted_is_found_before_the_download(published, server, tmp_path, place):
    if place:
        published.mkdir()
    (published / place).symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="is a link to .*unmounted, which is not there"):
        fetch("librispeech-mini")
    assert not server.ranges


def test_an_archive_that_outlived_its_unpacking_goes(published, server):
    find_audio("librispeech-mini")
    (published / "dev-clean.tar.gz").write_bytes(server.files["dev-clean.tar.gz"])
    find_audio("librispeech")
    assert sorted(path.name for path in published.iterdir()) == [".lock", "LibriSpeech"]


@pytest.mark.parametrize("moods, words", [
    ([404], "answers 404 Not Found"), ([503] * 3, "brought nothing .503"),
    (["wrong bytes"], "not what its publishers describe .it should have the checksum md5")])
def test_what_cannot_be_had_is_one_clear_line(published, server, moods, words):
    server.moods = moods
    with pytest.raises(DataError, match=words) as caught:
        find_audio("librispeech-mini")
    assert "\n" not in str(caught.value) and server.url("dev-clean.tar.gz") in str(caught.value)
    assert len(find_audio("librispeech-mini")[1]) == 24       # and the next call can have it


def test_as_long_as_something_arrives_it_is_not_given_up(published, server):
    server.moods = [503, "stalls", "stalls", 503]
    assert len(find_audio("librispeech-mini")[1]) == 24


def test_no_network_at_all_is_one_clear_line(published, server):
    archive = corpora.CORPORA["fma"].archives[0]._replace(url="http://127.0.0.1:9/fma_small.zip")
    corpora.CORPORA["fma"] = Corpus((archive,))
    with pytest.raises(DataError, match="refused"):
        fetch("fma")


def test_a_disk_that_is_too_small_is_found_before_the_download(published, server, monkeypatch):
    usage = corpora.shutil.disk_usage
    monkeypatch.setattr(corpora.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(DataError, match="corpora lacks the .* GB of free space"):
        fetch("librispeech-mini")


def test_there_must_be_room_for_the_archive_and_what_is_in_it(published, server, monkeypatch):
    usage, size = corpora.shutil.disk_usage, len(server.files["dev-clean.tar.gz"])
    monkeypatch.setattr(corpora.shutil, "disk_usage", lambda path: usage(path)._replace(free=2 * size - 1))
    with pytest.raises(DataError, match="lacks the .* GB of free space"):
        fetch("librispeech-mini")
    monkeypatch.setattr(corpora.shutil, "disk_usage", lambda path: usage(path)._replace(free=2 * size))
    assert fetch("librispeech-mini")


def test_a_disk_that_fills_up_keeps_what_has_arrived(published, server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as broken:
        broken.setattr(corpora.shutil, "copyfileobj", full)
        with pytest.raises(DataError, match="no space left"):
            fetch("librispeech-mini")
    assert len(find_audio("librispeech-mini")[1]) == 24 and len(server.ranges) == 1


@pytest.mark.parametrize("number, words", [(errno.EACCES, "no permission to use .*dev-clean"),
                                           (errno.ENOSPC, "no space left in .*corpora"),
                                           (errno.EFBIG, "files of this size cannot be kept in .*corpora")])
def test_a_disk_is_not_taken_for_a_network(published, server, monkeypatch, number, words):
    def closed(path, mode):
        raise OSError(number, os.strerror(number), str(path))
    monkeypatch.setattr(corpora, "_is_right", lambda *_: False)
    monkeypatch.setattr(corpora, "locked", corpora.contextlib.nullcontext)        # opens a file, too
    monkeypatch.setattr(corpora, "open", closed, raising=False)
    published.mkdir()
    with pytest.raises(DataError, match=words):
        fetch("librispeech-mini")
    assert len(server.ranges) == 1


def test_a_disk_without_locks_is_named(published, server, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(DataError, match="corpora cannot be locked .*link to a local disk"):
        fetch("librispeech-mini")
    assert server.ranges == []


@pytest.mark.parametrize("after", [0.05, 0.3, 0.6])
def test_a_process_killed_while_it_fetches_leaves_what_the_next_one_completes(published, server, after):
    server.moods = ["stalls"] * 2
    archive = corpora.CORPORA["librispeech-mini"].archives[0]
    code = (f"import sys; sys.path.insert(0, {str(Path(corpora.__file__).parent)!r}); import corpora, pathlib\n"
            f"corpora.TIMEOUT = 0.3; corpora.CORPORA['x'] = corpora.Corpus((corpora.Archive{tuple(archive)!r},))\n"
            f"print('ready', flush=True); corpora.fetch('x', {str(published)!r})")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.moods = []
    assert len(find_audio("librispeech-mini")[1]) == 24


# ----------------------------------------------------------------------------- archives that are none

def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("member", [
    {"../evil.flac": b"x"}, {"/tmp/evil.flac": b"x"}, {"LibriSpeech/dev-clean/../../../evil.flac": b"x"},
    {"LibriSpeech/dev-clean/..\\..\\evil.flac": b"x"}, {"LibriSpeech/dev-clean/C:/evil.flac": b"x"},
    {"LibriSpeech/dev-clean/l": link("LibriSpeech/dev-clean/l", "/etc/passwd")},
    {"LibriSpeech/dev-clean/h": link("LibriSpeech/dev-clean/h", "../../../etc/passwd", tarfile.LNKTYPE)},
    {"LibriSpeech/dev-clean/fifo": link("LibriSpeech/dev-clean/fifo", "", tarfile.FIFOTYPE)}])
def test_nothing_in_an_archive_leads_out_of_it(tmp_path, member):
    path = tmp_path / "home" / "dev-clean.tar.gz"
    path.parent.mkdir()
    path.write_bytes(tar({"LibriSpeech/dev-clean/84/a.flac": b"x"} | member))
    with pytest.raises(DataError, match="a link or a path that leads out"):
        corpora.unpack(path, corpora.DEV_CLEAN, path.parent)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dev-clean.tar.gz", "home"]


def test_a_link_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "fma_small.zip"
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("fma_small/000/000002.mp3")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(DataError, match="a link or a path that leads out"):
        corpora.unpack(path, corpora.FMA_SMALL, tmp_path)


WHOLE = tar({"LibriSpeech/dev-clean/84/a.flac": "".join(map(str, range(99_999))).encode()})


@pytest.mark.parametrize("content", [b"", b"no archive", WHOLE[:99_999], WHOLE[:80_000] + WHOLE[99_999:]])
def test_a_damaged_archive_is_one_clear_line_and_leaves_no_folder(tmp_path, content):
    path = tmp_path / "dev-clean.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged .*delete it"):
        corpora.unpack(path, corpora.DEV_CLEAN, tmp_path)
    assert os.listdir(tmp_path) == ["dev-clean.tar.gz"]


def test_a_damage_that_has_no_words_of_its_own_is_named_by_its_kind(tmp_path, monkeypatch):
    def cut_off(_):
        raise EOFError
    (tmp_path / "dev-clean.tar.gz").touch()
    monkeypatch.setattr(corpora, "_members", cut_off)
    with pytest.raises(DataError, match="is damaged .EOFError.: delete it"):
        corpora.unpack(tmp_path / "dev-clean.tar.gz", corpora.DEV_CLEAN, tmp_path)


def test_an_archive_without_the_folder_is_refused(tmp_path):
    path = tmp_path / "dev-clean.tar.gz"
    path.write_bytes(tar({"LibriSpeech/test-clean/84/a.flac": b"x"}))
    with pytest.raises(DataError, match="holds no LibriSpeech/dev-clean"):
        corpora.unpack(path, corpora.DEV_CLEAN, tmp_path)


def test_an_unpacking_that_was_interrupted_is_done_again(published, server):
    staging = published / ".dev-clean.tar.gz.unpacking" / "84"
    staging.mkdir(parents=True)
    (staging / "half.flac").write_bytes(b"half a file")
    (published / "dev-clean.tar.gz").write_bytes(server.files["dev-clean.tar.gz"])
    assert len(find_audio("librispeech-mini")[1]) == 24 and not server.ranges
    assert not staging.exists()


def test_archives_come_from_their_publishers_by_https_and_have_whole_checksums():
    archives = {a for corpus in corpora.CORPORA.values() for a in corpus.archives}
    assert {Archive(*a).url.split("/")[2] for a in archives} == {"www.openslr.org", "os.unil.cloud.switch.ch"}
    assert all(a.url.startswith("https://") for a in archives)
    lengths = {"md5": 32, "sha1": 40}
    assert all(len(digest) == lengths[algorithm] for algorithm, digest in (a.checksum.split(":") for a in archives))
