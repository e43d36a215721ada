"""
python -m pytest tests/test_make.py

More training audio than ships, rendered by the scripts in assets/: what ships is among it, what validates stays.
"""
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "assets"))
import make_music                                                      # noqa: E402
import make_speech                                                     # noqa: E402


def test_more_speech_begins_with_what_there_was():
    few, many = (make_speech.plan("train", n, set(), random.Random("0 train")) for n in (20, 60))
    assert few == many[:20]
    sentences = [sentence for clip in many for sentence in clip[-1]]
    assert len(sentences) == len(set(sentences)) > 200


def test_more_music_leaves_what_there_was_and_shares_nothing_with_what_validates(tmp_path, monkeypatch):
    pieces = {}

    def render(p, soundfont, folder):
        pieces[len(pieces)] = p
        assert folder.parent == tmp_path                      # beside its place: moving it there is a rename
        return np.full(make_music.RATE * 30, len(p.notes) / 10_000, np.float32)
    monkeypatch.setattr(make_music, "MINUTES", {"train": 30, "val": 5})
    monkeypatch.setattr(make_music, "SOUNDFONTS", [__file__])
    monkeypatch.setattr(make_music.shutil, "which", lambda program: program)
    monkeypatch.setattr(make_music, "render", render)
    monkeypatch.setattr(make_music.soundfile, "write", lambda path, audio, *_, **__: path.write_text(str(audio[0])))
    made = []
    for more in ("0", "90"):
        pieces.clear()
        monkeypatch.setattr(sys, "argv", ["make_music.py", "--out", str(tmp_path / more), "--more", more])
        make_music.main()
        made.append({path.relative_to(tmp_path / more): path.read_text() for path in (tmp_path / more).rglob("*.ogg")})
    few, many = made
    assert few.items() <= many.items() and len(few) == 70 and len(many) == 70 + 180
    assert {path for path in few if path.parts[0] == "val"} == {path for path in many if path.parts[0] == "val"}
    marks = [p.lines | {("chords", *p.chords)} for p in pieces.values()]
    validate = set().union(*marks[60:70])
    assert not any(validate & heard for heard in marks[:60] + marks[70:])


def test_what_else_lies_in_the_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    for name in ("train/old.ogg", "mine.flac"):
        (tmp_path / name).write_bytes(b"dear")
    monkeypatch.setattr(make_speech, "CLIPS", {"train": 3, "val": 2})
    monkeypatch.setattr(make_speech.shutil, "which", lambda program: program)
    monkeypatch.setattr(make_speech, "render", lambda clip, folder: Path(folder, f"{clip[0]}.ogg").write_text("new"))
    monkeypatch.setattr(sys, "argv", ["make_speech.py", "--out", str(tmp_path)])
    make_speech.main()
    assert len(list(tmp_path.glob("train/*"))) == 3 and len(list(tmp_path.glob("val/*"))) == 2
    assert (tmp_path / "mine.flac").read_bytes() == b"dear" and not (tmp_path / "train/old.ogg").exists()


def test_a_voice_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="no such voice\n")
    monkeypatch.setattr(make_speech.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="festival cannot speak as .*no such voice.*apt-get install festival"):
        make_speech.speak("slt", 1.0, ["Hello."], str(tmp_path))
