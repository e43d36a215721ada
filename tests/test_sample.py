"""
python -m pytest tests/test_sample.py

Drawing codes, the loop around model, codec and spectrogram, and the sampling script as a user runs it.
"""
import functools
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch

import data
import sample
from bench_sample import recompute
from conftest import assert_refused, closed, ending, noise, run_script, spy, wait_for
from mel import HOP, StreamingLogMel, log_mel
from model import START, Config, HybridGPT, save, to_checkpoint
from sample import draw, generate
from tokens import StreamDecoder, load_codec

SCRIPT = Path(sample.__file__).absolute()


@pytest.fixture()
def run(ckpt, tmp_path):
    """run(*options): sample.py with that checkpoint, in an empty folder, 30 frames unless told otherwise."""
    return functools.partial(run_script, tmp_path, SCRIPT, "--ckpt", ckpt, "--device", "cpu", "--seconds", 0.4)


# ----------------------------------------------------------------------------- drawing a code

def test_temperature_zero_and_top_k_one_take_the_likeliest_code():
    logits = torch.randn(50, 1024)
    assert torch.equal(draw(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(draw(logits, temperature=5.0, top_k=1), logits.argmax(-1))
    for little in (1e-9, 1e-46):                              # the latter is 0 in float32
        assert torch.equal(draw(logits, temperature=5.0, top_p=little), logits.argmax(-1))


def test_top_k_draws_every_one_of_the_k_likeliest_and_nothing_else():
    logits = torch.randn(1, 1024)
    drawn = draw(logits.expand(3000, -1), top_k=5)
    assert set(drawn.tolist()) == set(logits[0].topk(5).indices.tolist())
    assert draw(logits, top_k=5000).shape == (1,)             # more than there are: all of them


def test_top_p_draws_the_smallest_set_that_holds_p_and_nothing_else():
    p = torch.full((1024,), 1e-9)
    p[[7, 100, 3, 900]] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = p.log().expand(3000, -1)
    assert set(draw(rows, top_p=0.45).tolist()) == {7}
    assert set(draw(rows, top_p=0.7).tolist()) == {7, 100}
    assert set(draw(rows, top_p=0.9).tolist()) == {7, 100, 3}
    assert set(draw(rows, top_p=1.0).tolist()) == {7, 100, 3, 900}
    assert set(draw(rows, temperature=0.4, top_p=0.7).tolist()) == {7}            # the temperature comes first
    equal = torch.full((3000, 8), -torch.inf).index_fill(1, torch.arange(4), 0.0)
    assert draw(equal, top_p=0.5).unique().numel() == 2       # two of four hold a half: no third
    share = (draw(rows, top_p=0.7) == 7).float().mean()       # renormalised: 0.5 / 0.8
    assert abs(share - 0.625) < 0.04


def test_codes_come_as_often_as_the_temperature_says():
    p = torch.full((1024,), 1e-12)
    p[[5, 6]] = torch.tensor([0.8, 0.2])
    for temperature, expected in ((1.0, 0.8), (0.5, 0.64 / 0.68), (2.0, 0.8 ** 0.5 / (0.8 ** 0.5 + 0.2 ** 0.5))):
        drawn = draw(p.log().expand(5000, -1), temperature=temperature)
        share = (drawn == 5).sum() / ((drawn == 5) | (drawn == 6)).sum()
        assert abs(share - expected) < 0.03


def test_the_generator_decides_what_is_drawn():
    logits = torch.randn(20, 1024)
    one, same, other = (draw(logits, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ----------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("fields", [{}, {"use_mel": False}, {"use_codes": False}, {"n_codebooks": 8},
                                    {"n_codebooks": 8, "n_input_codebooks": 8}],
                         ids=["hybrid", "token-only", "mel-only", "deep", "reader"])
@pytest.mark.parametrize("n_prompt", [0, 10])
def test_generating_frame_by_frame_equals_recomputing_everything(tiny_codec, fields, n_prompt):
    """Forty frames with a context of 16: before every draw the whole past is decoded, analysed and modelled anew."""
    torch.manual_seed(0)
    model = HybridGPT(Config(n_layer=2, n_head=2, n_embd=32, n_inner=64, n_mel_embd=32, context=16, n_depth_embd=32,
                             **fields)).eval()
    K = model.config.n_codebooks
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        model.head.weight.mul_(10)                            # or no draw would depend on what is heard
    frames = log_mel(tiny_codec.decode(torch.randint(1024, (1, K, 300))))[0]
    model.set_mel_statistics(frames.mean(0), torch.cov(frames.T))
    prompt = torch.randint(1024, (1, K + 1, n_prompt)) if n_prompt else None      # one code more than the model has
    frames = list(generate(model, tiny_codec, 40, num=2, prompt=prompt, generator=torch.Generator().manual_seed(1)))
    codes, wave = (torch.cat(parts, dim=-1) for parts in zip(*frames))
    assert codes.shape == (2, K, n_prompt + 40) and wave.shape == (2, (n_prompt + 40) * HOP)
    assert frames[-1][0].is_inference()                       # nothing is kept for a gradient
    torch.testing.assert_close(wave, tiny_codec.decode(codes), rtol=1e-4, atol=1e-5)

    generator, again = torch.Generator().manual_seed(1), codes[..., :n_prompt]
    assert prompt is None or torch.equal(again, prompt[:, :K].expand(2, -1, -1))
    for _ in range(40):
        again = recompute(model, tiny_codec, again, generator)
    assert torch.equal(again, codes)
    assert codes[..., n_prompt:].unique().numel() > 40        # not one code for ever


def test_a_model_of_latents_hears_the_vectors_of_the_codes_it_draws(tiny_codec):
    torch.manual_seed(0)
    model = HybridGPT(Config(n_layer=1, n_head=2, n_embd=32, n_inner=64, n_mel_embd=32, n_codebooks=3,
                             n_depth_embd=32, n_mels=tiny_codec.vectors.shape[-1], latents=True)).eval()
    model.set_mel_statistics(torch.zeros(model.config.n_mels), tiny_codec.vectors[0].T.cov())
    codes = torch.cat([frame for frame, _ in generate(model, tiny_codec, 40, temperature=0)], dim=-1)
    inputs = torch.cat([torch.full((1, 3, 1), START), codes[..., :-1]], dim=-1)
    vectors = sum(tiny_codec.vectors[k, codes[:, k, :-1]] for k in range(3))          # (1, 39, C)
    likeliest = lambda heard: model(inputs, torch.cat([torch.zeros_like(heard[:, :1]), heard], dim=1))[0].argmax(-1)
    assert torch.equal(likeliest(vectors), codes[:, 0])
    assert not torch.equal(likeliest(torch.zeros_like(vectors)), codes[:, 0])


@pytest.mark.parametrize("finer, expected", [(None, 0.9), (0.7, 0.7), (0.0, 0.0)])
def test_finer_codes_are_drawn_like_the_coarse_one_unless_told_otherwise(tiny_codec, finer, expected):
    model = HybridGPT(Config(n_layer=1, n_head=2, n_embd=32, n_inner=64, n_mel_embd=32, n_codebooks=3,
                             n_depth_embd=32)).eval()
    with spy(sample, "draw") as drawn:
        list(sample.generate(model, tiny_codec, 2, temperature=0.9, finer_temperature=finer))
    assert [call.args[1] for call in drawn.call_args_list] == [0.9, expected, expected] * 2


# ----------------------------------------------------------------------------- the script

def test_the_script_works_as_a_process_of_its_own(ckpt, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "0.4", "--device", "cpu",
                           "--out", "声.wav"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})       # which lacks that letter
    assert done.returncode == 0 and "\\u58f0.wav: 0.40 s" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["声.wav"]
    refused = subprocess.run([sys.executable, SCRIPT, "--ckpt", "absent.pt"], cwd=tmp_path, capture_output=True,
                             text=True)
    assert_refused(SimpleNamespace(code=refused.returncode, err=refused.stderr), "absent.pt")


def test_the_output_is_24_khz_mono_of_the_length_asked_for(run, tmp_path):
    for name in ("a.wav", "a.flac"):
        assert run("--seconds", 1.64, "--out", name).code == 0            # 1.64 * 75 = 122.99999999999999
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 24_000 and wave.shape == (123 * HOP,) and np.isfinite(wave).all()
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.flac")[0], wave, atol=1.1 / 2 ** 15)      # 16 bits


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run, tmp_path):
    for out, seed in (("a.wav", 1), ("b.wav", 1), ("c.wav", 2)):
        assert run("--seed", seed, "--out", out).code == 0
    a, b, c = ((tmp_path / f"{name}.wav").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("trained_on, mixed_in, word", [(8, None, None), (0, None, "of recordings"), (0, 8, None),
                                                        (2, 0, "of 2 codebooks")])
def test_a_model_that_hears_what_it_did_not_learn_from_says_so(ckpt, tmp_path, trained_on, mixed_in, word):
    checkpoint = torch.load(ckpt, weights_only=True)
    torch.save(checkpoint | {"mel_codebooks": trained_on, "mix": mixed_in}, tmp_path / "other.pt")
    done = run_script(tmp_path, SCRIPT, "--ckpt", "other.pt", "--device", "cpu", "--seconds", 0.1)
    assert done.code == 0 and (tmp_path / "sample.wav").exists()
    assert f"learnt from the mel {word}" in done.err if word else "note" not in done.err


def test_num_3_writes_three_different_files(run, tmp_path):
    assert run("--num", 3, "--out", "s.wav").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s-1.wav", "s-2.wav", "s-3.wav"]
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 3
    assert {len(soundfile.read(p)[0]) for p in tmp_path.iterdir()} == {30 * HOP}


def test_the_output_begins_with_the_prompt_as_its_codes_decode(run, tmp_path, tiny_codec):
    soundfile.write(tmp_path / "prompt.wav", noise(0.5, 48_000, 2), 48_000)
    assert run("--prompt", "prompt.wav", "--num", 2).code == 0
    wave = torch.from_numpy(np.concatenate(list(data.read_audio(tmp_path / "prompt.wav"))))
    assert abs(len(wave) - 12_000) <= 1
    heard = tiny_codec.decode(tiny_codec.encode(wave[None]))[0].clamp(-1, 1).numpy()
    for name in ("sample-1.wav", "sample-2.wav"):
        out, _ = soundfile.read(tmp_path / name)
        assert len(out) == len(heard) + 30 * HOP
        np.testing.assert_allclose(out[:len(heard)], heard, atol=1e-4)            # 16 bits
    assert (tmp_path / "sample-1.wav").read_bytes() != (tmp_path / "sample-2.wav").read_bytes()


def test_a_dash_streams_the_samples_of_the_file_to_standard_output(ckpt, tmp_path):
    command = [sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "0.4", "--device", "cpu", "--out"]
    streamed = subprocess.run([*command, "-"], cwd=tmp_path, capture_output=True)
    assert streamed.returncode == 0 and list(tmp_path.iterdir()) == [] and b"0.40 s" in streamed.stderr
    subprocess.run([*command, "a.wav"], cwd=tmp_path, check=True, capture_output=True)
    assert np.array_equal(np.frombuffer(streamed.stdout, "<i2"), soundfile.read(tmp_path / "a.wav", dtype="int16")[0])


def test_the_stream_begins_long_before_it_ends_and_a_listener_may_leave(ckpt, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "1e6", "--device", "cpu",
                                "--out", "-"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    first = os.read(process.stdout.fileno(), 1 << 20)         # what has come when anything comes
    assert len(first) % (HOP * 2) == 0 and 1 <= len(first) // (HOP * 2) < 5        # frames, not a full buffer
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and b"Traceback" not in process.stderr.read()


def test_a_file_is_written_even_if_nobody_reads_what_is_said_of_it(ckpt, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "0.4", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    os.close(writer)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "sample.wav").exists()


def test_an_interrupted_run_leaves_what_was_there(run, tmp_path):
    (tmp_path / "sample.wav").write_bytes(b"dear")
    with mock.patch.object(HybridGPT, "finer_logits", side_effect=KeyboardInterrupt):
        assert run().code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["sample.wav"] and (tmp_path / "sample.wav").read_bytes() == b"dear"


def test_a_folder_in_the_place_of_the_output_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "sample.wav").mkdir()
    with mock.patch.object(HybridGPT, "finer_logits", side_effect=AssertionError):
        assert_refused(run(), "cannot write sample.wav")
        (tmp_path / "sample.wav").rename(tmp_path / "sample-2.wav")
        assert_refused(run("--num", 2), "cannot write sample.wav")


def test_silence_can_be_continued(run, tmp_path):
    soundfile.write(tmp_path / "prompt.wav", np.zeros(12_000), 24_000)
    assert run("--prompt", "prompt.wav").code == 0
    assert len(soundfile.read(tmp_path / "sample.wav")[0]) == (37 + 30) * HOP


@pytest.mark.parametrize("rate, channels", [(8_000, 1), (44_100, 8), (192_000, 2), (22_050, 6)])
def test_a_prompt_of_any_rate_and_number_of_channels_can_be_continued(run, tmp_path, rate, channels):
    soundfile.write(tmp_path / "prompt.wav", noise(0.5, rate, channels), rate)
    assert run("--prompt", "prompt.wav").code == 0
    assert len(soundfile.read(tmp_path / "sample.wav")[0]) == (37 + 30) * HOP


def test_a_full_disk_is_one_clear_line_and_leaves_what_was_there(run, tmp_path):
    (tmp_path / "sample.wav").write_bytes(b"dear")
    with mock.patch.object(soundfile.SoundFile, "write", side_effect=soundfile.LibsndfileError(2)):
        assert_refused(run(), "cannot write --out", "disk")
    assert [p.name for p in tmp_path.iterdir()] == ["sample.wav"] and (tmp_path / "sample.wav").read_bytes() == b"dear"


def test_an_error_in_the_very_last_write_is_noticed(run, tmp_path):
    with mock.patch.object(soundfile, "info", return_value=SimpleNamespace(frames=29 * HOP)):
        assert_refused(run("--out", "a.flac"), "cannot write --out", "not complete")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("MPS backend out of memory …"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")])
def test_too_little_memory_is_one_clear_line(run, tmp_path, error):
    with mock.patch.object(HybridGPT, "backbone", side_effect=error):
        assert_refused(run(), "out of memory", "--num")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output_is_one_clear_line(ckpt, tmp_path):
    command = [sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "0.4", "--device", "cpu", "--out", "-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines() == ["error: no space left where --out goes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_terminated_leaves_no_unfinished_file(ckpt, tmp_path, number):
    command = [sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "1e6", "--device", "cpu"]
    listen = functools.partial(signal.signal, number, signal.SIG_DFL)             # nohup's children do not
    with ending(subprocess.Popen(command, cwd=tmp_path, preexec_fn=listen)) as process:
        wait_for(lambda: list(tmp_path.iterdir()), process)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number and not list(tmp_path.iterdir())


def test_two_runs_with_the_same_output_do_not_mix(run, ckpt, tmp_path):
    command = [sys.executable, SCRIPT, "--ckpt", ckpt, "--seconds", "1e6", "--device", "cpu"]
    with ending(subprocess.Popen(command, cwd=tmp_path)) as other:
        wait_for(lambda: list(tmp_path.iterdir()), other)
        assert run().code == 0 and len(list(tmp_path.iterdir())) == 2
        assert len(soundfile.read(tmp_path / "sample.wav")[0]) == 30 * HOP
        other.terminate()
        assert other.wait(timeout=60) == 143 and [path.name for path in tmp_path.iterdir()] == ["sample.wav"]


def test_a_terminal_sees_the_progress(run):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    with mock.patch.object(io, "StringIO", Terminal):
        done = run("--seconds", 0.4)
    assert done.code == 0 and "\r0.4 s at " in done.err and done.err.endswith("\n")


def test_a_folder_that_cannot_be_written_to_is_refused(run):
    with mock.patch.object(os, "access", return_value=False):         # root may write anywhere
        assert_refused(run(), "writable")


def test_a_checkpoint_made_by_hand_can_be_sampled_from_and_scored(run, ckpt, tmp_path, tiny_codec, tiny_codec_file):
    clips = ckpt.with_name("clips")
    dataset = data.prepare(clips, tiny_codec, tmp_path / "cache", quiet=True, mel_codebooks=2)
    model = HybridGPT(Config(n_layer=1, n_head=2, n_embd=32, n_inner=64, n_codebooks=2, n_depth_embd=16, context=16))
    model.set_mel_statistics(*dataset.mel_statistics)
    save(tmp_path / "mine.pt", to_checkpoint(model, **dataset.meta))
    result = run("--ckpt", "mine.pt", "--codec", tiny_codec_file)
    assert result.code == 0 and not result.err
    prepare = functools.partial(data.prepare, cache=tmp_path / "cache", quiet=True)
    scored = run_script(tmp_path, SCRIPT.with_name("train.py"), "--eval", "mine.pt", "--codec", tiny_codec_file,
                        "--device", "cpu", prepare=prepare)
    assert json.loads(scored.out)["mel_codebooks"] == 2 and json.loads(scored.out)["dataset"] == str(clips)


def test_an_output_may_have_the_longest_name_there_is(run, tmp_path):
    name = "x" * 251 + ".wav"
    assert run("--out", name).code == 0 and [path.name for path in tmp_path.iterdir()] == [name]


def test_prompt_and_output_may_be_the_same_file(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.5), 24_000)
    assert run("--prompt", "a.wav", "--out", "a.wav").code == 0
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == (37 + 30) * HOP


def test_the_script_passes_its_options_on(run, tmp_path):
    for out, options in (("a", ["--temperature", 0]), ("b", ["--top-k", 1]), ("c", ["--top-p", 1e-9]),
                         ("d", ["--finer-temperature", 0]), ("e", ["--finer-temperature", 1])):
        assert run(*options, "--out", f"{out}.wav").code == 0
    a, b, c, d, e = ((tmp_path / f"{x}.wav").read_bytes() for x in "abcde")
    assert a == b == c and d != e


@pytest.mark.parametrize("num", [1, 2])
def test_one_stream_takes_one_thread(run, num):
    with mock.patch.object(torch, "set_num_threads") as set_num_threads:
        assert run("--num", num).code == 0
    assert set_num_threads.called == (num == 1)


def test_what_is_too_loud_is_cut_off_in_the_file_and_heard_by_the_model_as_it_is(run, tmp_path):
    levels, push = iter([1.5, -1.5, 2.6 / 32767] * 10), StreamDecoder.push
    with mock.patch.object(StreamDecoder, "push", lambda self, codes: push(self, codes) * 0 + next(levels)), \
            spy(StreamingLogMel, "push") as hear:
        assert run().code == 0
    assert max(call.args[1].max() for call in hear.call_args_list) == 1.5
    wave, _ = soundfile.read(tmp_path / "sample.wav", dtype="int16")
    assert [set(part) for part in wave[:3 * HOP].reshape(3, HOP)] == [{32767}, {-32767}, {3}]         # and rounded


# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("options, words", [
    (["--ckpt", "absent.pt"], ["absent.pt"]),
    (["--prompt", "absent.wav"], ["absent.wav", "no such file"]),
    (["--codec", "absent"], ["absent"]),
    (["--codec", "~nobody-of-that-name/a.pt"], ["no codec '~nobody-of-that-name/a.pt'"]),
    (["--codec", 300 * "a"], ["no codec 'aaa"]),
    (["--out", "", "--num", 2], [".wav"]),
    (["--out", "/", "--num", 2], [".wav"]),
    (["--out", 300 * "a" + ".wav"], ["cannot write aaa"]),
    (["--out", "nowhere/a.wav"], ["nowhere"]),
    (["--out", "sample.mp3"], ["sample.mp3", ".wav"]),
    (["--temperature", -1], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--finer-temperature", "nan"], ["--finer-temperature"]),
    (["--finer-temperature", -1], ["--finer-temperature"]),
    (["--seconds", 0], ["--seconds"]),
    (["--seconds", "nan"], ["--seconds"]),
    (["--seconds", "inf"], ["--seconds"]),
    (["--num", 0], ["--num"]),
    (["--num", 2, "--out", "-"], ["--num 1"]),
    (["--top-k", 0], ["--top-k"]),
    (["--top-p", 1.5], ["--top-p"]),
    (["--device", "abacus"], ["abacus"]),
    (["--no-such-option"], ["--no-such-option"]),
])
def test_a_bad_option_is_one_clear_line(run, tmp_path, options, words):
    assert_refused(run(*options), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_a_folder_that_may_not_be_entered_is_refused(run, tmp_path):
    (tmp_path / "closed").mkdir()
    with closed(tmp_path / "closed"):
        assert_refused(run("--out", tmp_path / "closed" / "a.wav"), "cannot write")
        assert_refused(run("--out", tmp_path / "closed" / "in" / "a.wav"), "cannot write")


def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(run, ckpt, tmp_path):
    (tmp_path / "half.pt").write_bytes(ckpt.read_bytes()[:100_000])
    torch.save({"something": 1}, tmp_path / "foreign.pt")
    for name in ("half.pt", "foreign.pt"):
        assert_refused(run("--ckpt", name), name)


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(lookahead=192), ["--lookahead 192", "not sampled"]),
    (lambda c: (c.update(lookahead=192), c["config"].update(use_mel=False, use_codes=True)), []),
    (lambda c: c.update(window=[512, 512]), ["--window 512 512", "not sampled"]),
    (lambda c: c["config"].update(mel_delay=2, use_mel=True), ["2 frames late", "not sampled"]),
    (lambda c: c["config"].update(use_codes=False, use_mel=True), []),
    (lambda c: c["config"].update(n_input_codebooks=9, use_codes=True), ["reads 9 codebooks", "not sampled"])])
def test_a_checkpoint_that_only_serves_to_measure_is_refused(run, ckpt, tmp_path, change, words):
    changed = torch.load(ckpt, weights_only=True)
    change(changed)
    changed["model"] = HybridGPT(Config(**changed["config"])).state_dict()
    torch.save(changed, tmp_path / "changed.pt")
    result = run("--ckpt", "changed.pt")
    if words:
        assert_refused(result, *words)
    assert (tmp_path / "sample.wav").exists() == (not words) == (result.code == 0)


def test_another_codec_than_the_checkpoints_is_refused(run, tmp_path, tiny_codec_file):
    saved = torch.load(tiny_codec_file, weights_only=True)
    saved["weights"] = {key: value * 1.5 for key, value in saved["weights"].items()}
    torch.save(saved, tmp_path / "other.pt")
    assert_refused(run("--codec", "other.pt"), "codec", load_codec(tmp_path / "other.pt").checksum)
    assert not (tmp_path / "sample.wav").exists()


def test_a_prompt_that_cannot_be_used_is_one_clear_line(run, tmp_path):
    spoilt = noise(0.5)
    spoilt[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", spoilt, 24_000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", noise(0.01), 24_000)
    soundfile.write(tmp_path / "empty.wav", noise(0), 24_000)
    (tmp_path / "text.wav").write_text("this is not audio")
    for name, word in (("nan", "NaN"), ("short", "frame"), ("empty", "samples"), ("text", "audio")):
        assert_refused(run("--prompt", f"{name}.wav"), f"{name}.wav", word)
    assert not (tmp_path / "sample.wav").exists()
