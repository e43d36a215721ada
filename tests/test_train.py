"""
python -m pytest tests/test_train.py

The training script, run as a user runs it, on a few seconds of noise with a tiny codec.
"""
import contextlib
import errno
import functools
import itertools
import json
import math
import os
import pty
import random
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch

import corpora
import data
import sample
import tokens
import train
from conftest import assert_refused, noise, run_script, spy
from mel import log_mel
from model import IGNORE, HybridGPT, load_checkpoint, save
from tokens import load_codec

SCRIPT = Path(train.__file__).absolute()


def write_clips(folder, seconds):
    """One file of noise per entry of `seconds`."""
    folder.mkdir()
    for i, duration in enumerate(seconds):
        soundfile.write(folder / f"{i}.wav", noise(duration, seed=i), 24_000)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("train") / "clips", [1.6, 0.3, 1.0, 1.3, 0.9, 0.7])


@pytest.fixture(scope="module")
def run(clips, tiny_codec_file, tmp_path_factory):
    """run(folder, *options): `run_script` of train.py, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def run(folder, *options, small=True):
        options = [*run.options, *options] if small else options
        prepare = functools.partial(data.prepare, cache=cache, quiet=True)
        return run_script(folder, SCRIPT, *options, prepare=prepare)
    run.cache = cache
    run.options = ["--dataset", clips, "--codec", tiny_codec_file, "--steps", 4, "--eval-every", 2, "--context", 32,
                   "--batch-size", 2, "--device", "cpu", "--model", "nano"]
    return run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A folder in which a run of four steps has ended."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(folder)
    assert result.code == 0, result.err
    folder.joinpath("stdout").write_text(result.out)
    return folder


@pytest.fixture()
def own_clips(clips, tmp_path_factory):
    """The clips under a name nobody else uses, whose entry in the repository's cache/ goes afterwards."""
    folder, there = tmp_path_factory.mktemp("process") / f"test-{os.getpid()}", data.CACHE.exists()
    shutil.copytree(clips, folder)
    yield folder
    for entry in [*data.CACHE.glob(f"{folder.name}-*"), *data.CACHE.glob(f".{folder.name}-*")]:
        shutil.rmtree(entry)
    if not there and [path.name for path in data.CACHE.glob("*")] == [".lock"]:
        shutil.rmtree(data.CACHE)


@pytest.fixture()
def command(run, own_clips):
    """command(*options): `run`'s command line for a process of its own, with clips and cache that go afterwards."""
    return lambda *options: [sys.executable, *map(str, (SCRIPT, *run.options, "--dataset", own_clips, *options))]


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(path):
    return [entry for entry in log_of(path) if "val_nll" in entry]


def in_training(calls):
    """Of a spy's calls of HybridGPT.forward those in training: an evaluation names no depth_frames."""
    return [call for call in calls.call_args_list if "depth_frames" in call.kwargs]


# ----------------------------------------------------------------------------- what a run leaves

def test_a_run_writes_the_best_model_the_whole_state_and_a_log_that_begins_with_every_option(trained):
    assert sorted(p.name for p in trained.iterdir()) == ["out.jsonl", "out.last.pt", "out.pt", "stdout"]
    entries = evaluations(trained / "out.jsonl")
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    for entry in entries:
        assert {"step", "val_nll", "val_ppl", "val_acc", "unigram_nll", "n_params", "tokens_seen",
                "seconds"} <= set(entry)
        assert math.isclose(entry["val_ppl"], math.exp(entry["val_nll"])) and 0 <= entry["val_acc"] <= 1
        assert np.average(entry["clip_nll"], weights=entry["clip_targets"]) == pytest.approx(entry["val_nll"], abs=1e-4)
    assert 6.7 < entries[0]["val_nll"] < 7.2                  # ln 1024 = 6.93: it knows nothing yet
    assert entries[-1]["val_nll"] < entries[0]["val_nll"] - 0.05
    assert entries[0]["tokens_seen"] == 0 < entries[1]["tokens_seen"] <= 2 * 2 * 32
    best = min(entries, key=lambda entry: entry["val_nll"])
    model, checkpoint = load_checkpoint(trained / "out.pt")
    assert checkpoint["step"] == best["step"] and checkpoint["val_nll"] == best["val_nll"]
    assert model.n_params() == best["n_params"] and model.config.context == 32
    assert load_checkpoint(trained / "out.last.pt")[1]["step"] == 4
    options = log_of(trained / "out.jsonl")[0]["args"]
    assert options["context"] == 32 and options["seed"] == 0 and options["model"] == "nano" and "lr" in options


def test_a_checkpoint_holds_the_mel_statistics_of_the_training_frames(trained, run):
    model, checkpoint = load_checkpoint(trained / "out.pt")
    mean = np.load(run.cache / checkpoint["data_key"] / "mel_statistics.npz")["mean"]
    assert torch.allclose(model.mel_mean, torch.tensor(mean, dtype=torch.float32)) and mean.std() > 0
    assert not torch.equal(model.mel_whitening, torch.eye(80))


def test_a_model_of_latents_has_their_statistics_and_can_be_scored_and_sampled(run, tiny_codec, tmp_path):
    done = run(tmp_path, "--n-codebooks", 1, "--mel-codebooks", 3, "--latents")
    assert done.code == 0, done.err
    model, checkpoint = load_checkpoint(tmp_path / "out.pt")
    dataset = data.Dataset(run.cache / checkpoint["data_key"])
    frames = np.concatenate([dataset.codes[start:end, :3] for start, end in dataset.train]).astype(np.int64)
    mean = sum(tiny_codec.vectors[k, frames[:, k]] for k in range(3)).mean(0)
    torch.testing.assert_close(model.mel_mean, mean, atol=1e-3, rtol=1e-3)                # float16 in the cache
    scored = json.loads(run(tmp_path, "--eval", "out.pt", "--batch-size", 2, "--device", "cpu", small=False).out)
    assert scored["val_nll"] == evaluations(tmp_path / "out.jsonl")[-1]["val_nll"]
    del checkpoint["config"]["latents"]                        # as in files from before models could be sampled
    save(tmp_path / "old.pt", checkpoint)
    for name in ("out.pt", "old.pt"):
        assert len(list(sample.generate(*sample.load(tmp_path / name)[:2], 3))) == 3


def test_a_checkpoint_from_before_latents_were_an_option_is_as_good(run, trained, tmp_path):
    _, checkpoint = load_checkpoint(trained / "out.pt")
    del checkpoint["latents"]
    save(tmp_path / "old.pt", checkpoint)
    of = lambda path: run(tmp_path, "--eval", path, "--device", "cpu", small=False)
    assert json.loads(of("old.pt").out)["val_nll"] == json.loads(of(trained / "out.pt").out)["val_nll"]
    assert sample.load(tmp_path / "old.pt")[1].name


def test_a_checkpoint_names_dataset_and_codec_by_their_whole_paths(run, tmp_path, tiny_codec_file):
    write_clips(tmp_path / "own", [0.9, 1.0])
    shutil.copy(tiny_codec_file, tmp_path / "mine.pt")
    assert run(tmp_path, "--dataset", "own", "--codec", "mine.pt").code == 0
    _, checkpoint = load_checkpoint(tmp_path / "out.pt")
    assert (checkpoint["dataset"], checkpoint["codec"]) == (str(tmp_path / "own"), str(tmp_path / "mine.pt"))


def test_only_who_can_be_sampled_is_said_to_be(run, trained, tmp_path):
    assert "hear it with: python sample.py --ckpt out.pt" in (trained / "stdout").read_text()
    ended = run(tmp_path, "--steps", 1, "--n-codebooks", 1, "--lookahead", 9)
    assert ended.code == 0 and ended.out.endswith(" above the unigram figure) in out.pt\n")      # one step is nothing


def test_the_whole_run_works_as_a_process_of_its_own(command, trained, tmp_path):
    done = subprocess.run(command(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.last.pt", "out.pt"]
    np.testing.assert_allclose([entry["val_nll"] for entry in evaluations(tmp_path / "out.jsonl")],
                               [entry["val_nll"] for entry in evaluations(trained / "out.jsonl")], rtol=1e-4)
    assert "sample.py --ckpt out.pt" in done.stdout
    refused = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert_refused(SimpleNamespace(code=refused.returncode, err=refused.stderr), "out.pt exists")


def test_a_reader_that_goes_away_ends_the_run_as_a_closed_terminal_does(command, tmp_path):
    with subprocess.Popen(command("--steps", 400), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 128 + signal.SIGHUP and "Error" not in err, err
    assert err.splitlines()[-1].startswith("stopped at step") and (tmp_path / "out.last.pt").exists()


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(run, trained, tmp_path):
    run(tmp_path, "--out", "same.pt")
    run(tmp_path, "--out", "other.pt", "--seed", 1)
    figures = [[entry["val_nll"] for entry in evaluations(path)]
               for path in (trained / "out.jsonl", tmp_path / "same.jsonl", tmp_path / "other.jsonl")]
    assert figures[0] == figures[1] and figures[0][-1] != figures[2][-1]
    assert figures[0][0] != figures[2][0]                     # other weights, not only other batches


def test_a_worse_model_does_not_replace_the_best(run, tmp_path):
    assert run(tmp_path, "--lr", 3, "--warmup", 0).code == 0
    nll = [entry["val_nll"] for entry in evaluations(tmp_path / "out.jsonl")]
    assert nll[0] == min(nll) < nll[1] and load_checkpoint(tmp_path / "out.pt")[1]["step"] == 0


# ----------------------------------------------------------------------------- what is learnt

def test_twins_see_the_same_batches(run, tmp_path):
    with spy(HybridGPT, "forward") as calls:
        for name in ("nano", "nano-gpt"):
            assert run(tmp_path, "--model", name, "--out", f"{name}.pt").code == 0
            assert load_checkpoint(tmp_path / f"{name}.pt")[0].config.use_mel is (name == "nano")
    _, *seen = zip(*(call.args for call in in_training(calls)))                   # codes, mel and targets of each step
    assert all(len(x) == 8 and torch.equal(torch.cat(x[:4]), torch.cat(x[4:])) for x in seen)


def test_the_finer_codes_of_every_frame_are_learnt_in_turn(run, tmp_path):
    with spy(HybridGPT, "forward") as calls:
        assert run(tmp_path, "--steps", 8, "--eval-every", 8).code == 0
    learnt = [call.kwargs["depth_frames"].tolist() for call in in_training(calls)]
    assert sorted(sum(learnt, [])) == list(range(32)) and all(len(frames) == 4 for frames in learnt)
    result = run(tmp_path, "--context", 4, "--steps", 8, "--eval-every", 8, "--out", "short.pt")
    assert result.code == 0 and all(math.isfinite(entry["loss"]) for entry in log_of(tmp_path / "short.jsonl")
                                    if "loss" in entry), result.err


@pytest.mark.parametrize("options, n_codebooks, mel_codebooks", [
    ([], 8, 8), (["--n-codebooks", 1], 1, 0), (["--n-codebooks", 3], 3, 3), (["--mel-codebooks", 0], 8, 0),
    (["--n-codebooks", 1, "--mel-codebooks", 2], 1, 2)])
def test_codes_are_predicted_and_mels_are_shown_of_as_many_codebooks_as_asked(run, tmp_path, options, n_codebooks,
                                                                              mel_codebooks):
    result = run(tmp_path, "--steps", 2, *options)
    assert result.code == 0, result.err
    model, checkpoint = load_checkpoint(tmp_path / "out.pt")
    meta = json.loads((run.cache / checkpoint["data_key"] / "meta.json").read_text())
    assert model.config.n_codebooks == n_codebooks and meta["mel_codebooks"] == mel_codebooks
    for entry in evaluations(tmp_path / "out.jsonl"):
        finer = entry["val_nll_finer"]
        assert len(finer) == n_codebooks - 1 and all(6 < nll < 7.5 for nll in finer)


def test_fields_of_the_model_can_be_set_and_the_mel_can_look_ahead(run, tmp_path):
    result = run(tmp_path, "--steps", 2, "--n-codebooks", 1, "--lookahead", 192, "--window", 300, 20, "--set",
                 "use_codes=False", "n_mel_layer=2", "--set", "mel_noise=1")
    assert result.code == 0, result.err
    model, checkpoint = load_checkpoint(tmp_path / "out.pt")
    meta = json.loads((run.cache / checkpoint["data_key"] / "meta.json").read_text())
    assert meta["lookahead"] == checkpoint["lookahead"] == 192
    assert meta["window"] == list(checkpoint["window"]) == [300, 20]
    assert model.config.n_mel_layer == 2 and not model.config.use_codes and model.config.use_mel
    assert model.config.mel_noise == 1.0                                                      # both --set are heard
    scored = json.loads(run(tmp_path, "--eval", "out.pt", "--device", "cpu", small=False).out)
    assert scored["val_nll"] == evaluations(tmp_path / "out.jsonl")[-1]["val_nll"] and scored["lookahead"] == 192
    assert scored["window"] == [300, 20]


def test_splitting_a_batch_into_parts_changes_nothing(run, tmp_path):
    """With clips shorter than the context, so that the parts hold different numbers of targets."""
    folder = write_clips(tmp_path / "short", [0.1, 0.7, 0.15, 0.2, 0.6, 0.1, 0.3])
    losses, figures = [], []
    for parts in (1, 2, 4):
        assert run(tmp_path, "--dataset", folder, "--dropout", 0, "--batch-size", 4, "--accumulate", parts,
                   "--steps", 3, "--out", f"{parts}.pt").code == 0
        losses.append([entry["loss"] for entry in log_of(tmp_path / f"{parts}.jsonl") if "loss" in entry])
        figures.append(evaluations(tmp_path / f"{parts}.jsonl")[-1]["val_nll"])
        assert 0 < evaluations(tmp_path / f"{parts}.jsonl")[-1]["tokens_seen"] < 3 * 4 * 32
    assert len(losses[0]) == 1
    np.testing.assert_allclose(losses, np.tile(losses[0], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(figures, figures[0], rtol=1e-5)


@pytest.mark.parametrize("options, K", [(["--n-codebooks", 1], 1), (["--n-codebooks", 3], 3),
                                        (["--n-codebooks", 1, "--set", "n_input_codebooks=5"], 5)])
def test_batches_hold_the_codes_that_the_model_uses_and_no_more(run, tmp_path, options, K):
    with spy(HybridGPT, "forward") as calls:
        assert run(tmp_path, *options, "--steps", 1).code == 0
    assert {x.shape[1] for call in calls.call_args_list for x in (call.args[1], call.args[3])} == {K}


def test_batches_are_drawn_as_the_options_say_and_those_of_stretches_are_as_large_as_others(run, tmp_path):
    with spy(data.Dataset, "batch") as drawn, spy(HybridGPT, "forward") as calls:
        assert run(tmp_path, "--batch-size", 4, "--stretch", 64, "--seed", 5).code == 0
    assert [call.args[1:] for call in drawn.call_args_list] == [(5, step, 4, 32, 64, 8, slice(0, 4)) for step in range(4)]
    assert {call.args[1].shape for call in in_training(calls)} == {(4, 8, 32)}


def test_every_other_crop_is_shown_the_mel_that_is_mixed_in(run, tmp_path):
    shown = {}
    for name, options in {"decoded": ["--mel-codebooks", 8], "recorded": ["--mel-codebooks", 0],
                          "mixed": ["--mel-codebooks", 8, "--mix", 0]}.items():
        with spy(HybridGPT, "forward") as calls:
            assert run(tmp_path, "--batch-size", 4, "--out", f"{name}.pt", *options).code == 0
        shown[name] = [call.args[2] for call in in_training(calls)]
    for step, (decoded, recorded, mixed) in enumerate(zip(*shown.values())):
        assert not torch.equal(decoded, recorded)
        assert torch.equal(mixed[step % 2::2], recorded[step % 2::2])
        assert torch.equal(mixed[1 - step % 2::2], decoded[1 - step % 2::2])
    facts = load_checkpoint(tmp_path / "mixed.pt")[1]
    assert step == 3 and facts["mel_codebooks"] == 8 and facts["mix"] == 0
    decoded, recorded, mixed = (load_checkpoint(tmp_path / f"{name}.pt")[0].mel_mean for name in shown)
    assert torch.equal(mixed, decoded) and not torch.equal(mixed, recorded)               # whitened as what is first


def test_own_details_are_the_mel_of_the_right_coarse_codes_and_of_finer_ones_drawn_from_the_model(run, trained):
    model, checkpoint = load_checkpoint(trained / "out.pt")
    codec = load_codec(checkpoint["codec"])
    codes, mel, targets = data.Dataset(run.cache / checkpoint["data_key"]).batch(0, 0, 2, 32)
    targets[1, :, 20:], mel[1, 21:] = IGNORE, 0                                   # the end of a short clip
    asked = []

    def sure(self, x, latest, cache):
        """The latest code plus one, beyond all doubt."""
        asked.append((self.training, latest.shape))
        return 1e4 * torch.nn.functional.one_hot((latest + 1) % 1024, 1024).float()
    with mock.patch.object(HybridGPT, "finer_logits", sure):
        own = train.own_details(model.train(), codec, codes, mel, targets)
    coarse = targets[:, :1].clamp(min=0)                                          # (2, 1, 32)
    expected = log_mel(codec.decode((coarse + torch.arange(8)[:, None]) % 1024))
    assert own.shape == mel.shape and model.training and asked == 7 * [(False, (64, 1))]      # without dropout
    assert torch.allclose(own[:, 1:], expected[:, :-1], atol=1e-4) and torch.equal(own[:, 0].half(), mel[:, 0])
    asked.clear()
    with mock.patch.object(HybridGPT, "finer_logits", sure), mock.patch.object(train, "MOST_FRAMES", 48):
        assert torch.equal(train.own_details(model, codec, codes, mel, targets), own)
    assert [shape for _, shape in asked] == 7 * [(48, 1)] + 7 * [(16, 1)]         # no more at once
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(train.own_details(model, codec, codes, mel, targets))
    one, same, other = drawn
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_own_details_of_a_model_of_latents_are_the_vectors_of_what_it_draws(run, tmp_path):
    with spy(HybridGPT, "draw_finer") as draws:
        assert run(tmp_path, "--latents", "--own-details", "--steps", 1).code == 0
    assert draws.called
    model, checkpoint = load_checkpoint(tmp_path / "out.pt")
    codec = load_codec(checkpoint["codec"])
    codes, mel, targets = data.Dataset(run.cache / checkpoint["data_key"]).batch(0, 0, 2, 32)
    next_ones = lambda self, x, coarse, draw: (coarse[:, None] + torch.arange(8)) % 1024                   # (n, 8)
    with mock.patch.object(HybridGPT, "draw_finer", next_ones):
        own = train.own_details(model, codec, codes, mel, targets)
    drawn = next_ones(None, None, targets[:, 0].clamp(min=0).flatten(), None)
    vectors = sum(codec.vectors[k, drawn[:, k]] for k in range(8)).unflatten(0, mel.shape[:2])
    torch.testing.assert_close(own[:, 1:], vectors[:, :-1])
    assert torch.equal(own[:, 0].half(), mel[:, 0])


def test_every_other_crop_is_shown_its_own_details(run, tmp_path):
    with spy(HybridGPT, "forward") as calls:
        for options in ([], ["--own-details"], ["--own-details", "--accumulate", 4]):
            assert run(tmp_path, "--batch-size", 4, *options, "--steps", 2, "--out", f"{len(options)}.pt").code == 0
    shown = [call.args[2] for call in in_training(calls)]
    assert [len(mel) for mel in shown] == [4] * 4 + [1] * 8                       # at last in parts of one row
    split = shown[:4] + [torch.cat(shown[4:8]), torch.cat(shown[8:])]
    for step in range(2):
        for own in split[2 + step], split[4 + step]:
            assert [torch.equal(a, b) for a, b in zip(own, split[step])] == [row % 2 != step for row in range(4)]


def test_the_loss_is_that_of_the_coarse_code_plus_the_mean_of_the_finer_ones(run, tmp_path):
    seen, forward = [], HybridGPT.forward

    def recorded(self, *args, **more):
        logits, losses = forward(self, *args, **more)
        seen.extend([losses.detach()] * self.training)
        return logits, losses
    with mock.patch.object(HybridGPT, "forward", recorded):
        assert run(tmp_path, "--steps", 1).code == 0
    [losses], [loss] = seen, [entry["loss"] for entry in log_of(tmp_path / "out.jsonl") if "loss" in entry]
    assert loss == pytest.approx((losses[0] + losses[1:].mean()).item(), rel=1e-5)


def test_bfloat16_is_what_is_computed_in_and_float32_what_is_scored_in(run, tmp_path):
    seen, forward = [], HybridGPT.forward

    def recorded(self, *args, **more):
        logits, losses = forward(self, *args, **more)
        seen.append(logits.dtype)
        return logits, losses
    with mock.patch.object(HybridGPT, "forward", recorded), spy(train.F, "cross_entropy") as scored:
        assert run(tmp_path, "--dtype", "bfloat16").code == 0 and set(seen) == {torch.bfloat16}
        seen.clear()
        run(tmp_path, "--eval", "out.pt", "--dtype", "bfloat16", "--device", "cpu", small=False)
        assert set(seen) == {torch.bfloat16}
    assert {call.args[0].dtype for call in scored.call_args_list} == {torch.float32}


def test_every_step_and_seed_draws_its_own_dropout(run, tmp_path):
    seeds, forward = [], HybridGPT.forward

    def recorded(self, *args, **more):
        if self.training:
            seeds.append(torch.initial_seed())
        return forward(self, *args, **more)
    with mock.patch.object(HybridGPT, "forward", recorded):
        assert run(tmp_path).code == 0
        assert run(tmp_path, "--seed", 1, "--out", "other.pt").code == 0
    assert len(seeds) == len(set(seeds)) == 8


# ----------------------------------------------------------------------------- the optimiser and its schedule

@pytest.mark.parametrize("model, defaults", [("hybrid", (1e-3, "mini", 1, 512, 0)),
                                             *((model, (1.2e-2, "mini", 8, 256, 8)) for model in ("nano", "nano-gpt"))])
def test_what_a_model_is_trained_with_unless_told_otherwise(model, defaults):
    args = SimpleNamespace(codec=None, dataset="speech", lr=None, n_codebooks=None, context=None, mel_codebooks=None,
                           model=model)
    train.fill_defaults(args)
    assert (args.lr, args.codec, args.n_codebooks, args.context, args.mel_codebooks) == defaults


def test_the_learning_rate_warms_up_linearly_and_falls_to_a_tenth():
    args = SimpleNamespace(lr=2.0, warmup=10, steps=110)
    rates = [train.learning_rate(step, args) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert rates[10] == 2.0 and math.isclose(rates[60], 1.1) and math.isclose(rates[110], 0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert train.learning_rate(0, SimpleNamespace(lr=2.0, warmup=0, steps=5)) == 2.0


def test_embeddings_do_not_decay_and_rates_betas_and_dropout_are_as_meant(trained):
    model, checkpoint = load_checkpoint(trained / "out.last.pt")
    decayed, others = checkpoint["optimizer"]["param_groups"]
    names = [name for name, _ in model.named_parameters()]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == len([n for n in names if "embedding" in n]) == 2
    assert len(decayed["params"]) == len(names) - 2
    assert tuple(decayed["betas"]) == (0.9, 0.95)
    assert decayed["lr"] == others["lr"] == pytest.approx(1.2e-2 * 4 / 30)
    assert checkpoint["config"]["dropout"] == 0.1


def test_gradients_are_clipped(run, tmp_path):
    """AdamW does not mind how large gradients are, unless they vanish beside its epsilon."""
    assert run(tmp_path, "--grad-clip", 1e-12, "--weight-decay", 0).code == 0
    first, *_, last = evaluations(tmp_path / "out.jsonl")
    assert last["val_nll"] == pytest.approx(first["val_nll"], abs=1e-3)


# ----------------------------------------------------------------------------- scoring

def test_eval_prints_the_figures_of_the_log_and_trains_nothing(run, trained):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    result = run(trained, "--eval", "out.pt", "--device", "cpu", small=False)
    assert result.code == 0, result.err
    printed = json.loads(result.out.strip().splitlines()[-1])
    best = min(evaluations(trained / "out.jsonl"), key=lambda entry: entry["val_nll"])
    assert abs(printed["val_nll"] - best["val_nll"]) < 1e-5
    assert printed["val_acc"] == best["val_acc"] and printed["unigram_nll"] == best["unigram_nll"]
    assert printed["n_params"] == best["n_params"]
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_eval_can_score_on_another_dataset(run, trained, tmp_path):
    folder = write_clips(tmp_path / "others", [0.9, 1.0])
    result = run(trained, "--eval", "out.pt", "--dataset", folder, "--device", "cpu", small=False)
    figures = json.loads(result.out)
    assert result.code == 0 and figures["dataset"] == str(folder)
    assert figures["clip_targets"] in ([67], [75])
    assert figures["val_nll"] != evaluations(trained / "out.jsonl")[-1]["val_nll"]


def test_eval_shows_the_mel_of_training_or_the_one_asked_for(run, trained):
    figures = [json.loads(run(trained, "--eval", "out.pt", "--device", "cpu", *options, small=False).out)
               for options in ([], ["--mel-codebooks", 8], ["--mel-codebooks", 1], ["--mel-codebooks", 0])]
    assert [f["mel_codebooks"] for f in figures] == [8, 8, 1, 0]
    nll = [f["val_nll"] for f in figures]
    assert nll[0] == nll[1] == evaluations(trained / "out.jsonl")[-1]["val_nll"] and len({*nll}) == 3


def test_figures_that_nobody_reads_are_no_success(trained, own_clips):
    score = [sys.executable, SCRIPT, "--eval", trained / "out.pt", "--dataset", own_clips, "--device", "cpu"]
    with subprocess.Popen(score, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 128 + signal.SIGHUP and '"val_nll"' in err and "Error" not in err, err


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 6, 7])
def test_an_evaluation_does_not_depend_on_the_batch_size(run, trained, batch_size):
    """Whatever is left for the last batch: one window, several, or none."""
    model, checkpoint = load_checkpoint(trained / "out.pt")
    dataset = data.Dataset(run.cache / checkpoint["data_key"])
    figures = train.evaluate(model, dataset, batch_size)
    assert abs(figures["val_nll"] - checkpoint["val_nll"]) < 1e-5
    assert figures["clip_targets"] == [end - start for start, end in dataset.val]


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_leaves_the_model_in_the_mode_it_was_in(run, trained, training):
    model, checkpoint = load_checkpoint(trained / "out.pt")
    train.evaluate(model.train(training), data.Dataset(run.cache / checkpoint["data_key"]))
    assert model.training == training


def test_an_evaluation_takes_no_more_rows_at_once_than_a_step(run, tmp_path):
    with spy(data.Dataset, "validation") as calls:
        assert run(tmp_path, "--batch-size", 4, "--accumulate", 2).code == 0
        model, checkpoint = load_checkpoint(tmp_path / "out.pt")
        train.evaluate(model, data.Dataset(run.cache / checkpoint["data_key"]), 10**6)
    *sizes, most = [call.args[2] for call in calls.call_args_list]
    assert set(sizes) == {2} and most == 65_535 // 32         # as many frames as CUDA's attention takes


def test_the_nll_of_a_clip_is_what_it_scores_alone(run, trained, tmp_path):
    model, checkpoint = load_checkpoint(trained / "out.pt")
    (tmp_path / "own").mkdir()
    for side in ("train", "val"):
        write_clips(tmp_path / "own" / side, [0.3, 1.6, 0.9, 0.5])
    dataset = data.prepare(tmp_path / "own", load_codec(checkpoint["codec"]), tmp_path / "cache", quiet=True,
                           mel_codebooks=8)
    whole, clips = train.evaluate(model, dataset, 3), dataset.val
    for i in range(4):
        dataset.val = clips[i:i + 1]
        assert train.evaluate(model, dataset)["val_nll"] == pytest.approx(whole["clip_nll"][i], abs=2e-4)
    assert len({*whole["clip_nll"]}) == 4


@torch.no_grad()
def test_accuracy_and_finer_nll_are_the_models(run, trained):
    model, checkpoint = load_checkpoint(trained / "out.pt")
    dataset = data.Dataset(run.cache / checkpoint["data_key"])
    figures = train.evaluate(model, dataset, 2)
    counts = np.array(figures["clip_targets"])
    hits, finer = 0, torch.zeros(7)
    for codes, mel, targets, _ in dataset.validation(32, 1):
        logits, losses = model(codes, mel, targets)
        hits += (logits.argmax(-1) == targets[:, 0]).sum().item()
        finer += losses[1:] * (targets[:, 0] != IGNORE).sum()
    assert figures["val_acc"] == hits / counts.sum() > 0
    assert figures["val_nll_finer"] == pytest.approx((finer / counts.sum()).tolist(), abs=1e-3)


# ----------------------------------------------------------------------------- going on after an interruption

@pytest.mark.parametrize("stop_at, more", [(3, []), (4, []), (6, []), (3, ["--own-details"])])
def test_resuming_gives_the_same_losses_as_not_stopping(run, tmp_path, stop_at, more):
    """Stopped between two evaluations, where one is due (a signal does not wait for it), or after the last step; with
    dropout, whose random state must go on as well, and so must that of the codes that a model draws itself."""
    options = ["--steps", 6, "--dropout", 0.2, *more]
    assert run(tmp_path, *options, "--out", "whole.pt").code == 0
    batch = data.Dataset.batch

    def interrupted(self, seed, step, *args):
        if step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, seed, step, *args)
    with mock.patch.object(data.Dataset, "batch", interrupted):
        stopped = run(tmp_path, *options, "--out", "two halves.pt")
    assert stopped.code == 143
    assert f"stopped at step {stop_at}; continue with: python train.py --resume --out 'two halves.pt'" in stopped.out
    assert torch.load(tmp_path / "two halves.last.pt", weights_only=True)["step"] == stop_at
    assert [figures["step"] for figures in evaluations(tmp_path / "two halves.jsonl")] == list(range(0, stop_at, 2))
    resumed = run(tmp_path, "--resume", "--out", "two halves.pt", small=False)
    assert resumed.code == 0, resumed.err

    whole, halves = (torch.load(tmp_path / f"{name}.last.pt", weights_only=True) for name in ("whole", "two halves"))
    assert all(torch.equal(whole["model"][key], halves["model"][key]) for key in whole["model"])
    for a, b in zip(whole["optimizer"]["state"].values(), halves["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    figures = [[(e["step"], e["val_nll"], e["tokens_seen"]) for e in evaluations(tmp_path / f"{name}.jsonl")]
               for name in ("whole", "two halves")]
    assert figures[0] == figures[1]                           # each evaluation once, and the same figures
    losses = [[(e["step"], e["loss"]) for e in log_of(tmp_path / f"{name}.jsonl") if "loss" in e]
              for name in ("whole", "two halves")]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_no_figure(run, tmp_path):
    run(tmp_path)
    before = evaluations(tmp_path / "out.jsonl")
    assert run(tmp_path, "--resume", small=False).code == 0
    after = evaluations(tmp_path / "out.jsonl")
    assert [e["val_nll"] for e in after] == [e["val_nll"] for e in before]


def test_a_run_may_be_resumed_with_its_own_options_its_defaults_too(run, tmp_path, clips, tiny_codec_file):
    small = ["--dataset", clips, "--codec", tiny_codec_file, "--steps", 1, "--batch-size", 1, "--device", "cpu"]
    assert run(tmp_path, *small, small=False).code == 0
    defaults = ["--context", 256, "--lr", 1.2e-2, "--n-codebooks", 8, "--mel-codebooks", 8, "--dropout", 0.1]
    assert run(tmp_path, "--resume", *defaults, small=False).code == 0


def test_a_resumed_run_has_all_options_of_its_beginning(run, tmp_path):
    options = ["--warmup", 3, "--grad-clip", 0.5, "--weight-decay", 0.2, "--lr", 0.01, "--accumulate", 2, "--seed", 7,
               "--dropout", 0.2, "--stretch", 64]
    assert run(tmp_path, *options).code == 0 and run(tmp_path, "--resume", small=False).code == 0
    begun, resumed = [entry["args"] for entry in log_of(tmp_path / "out.jsonl") if "args" in entry]
    assert begun == resumed
    groups = torch.load(tmp_path / "out.last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


def test_the_time_of_a_resumed_run_goes_on(run, trained, tmp_path):
    for name in ("out.pt", "out.last.pt", "out.jsonl"):
        shutil.copy(trained / name, tmp_path)
    save(tmp_path / "out.last.pt", torch.load(tmp_path / "out.last.pt", weights_only=True) | {"seconds": 1000.0})
    assert run(tmp_path, "--resume", small=False).code == 0
    assert 1000 <= evaluations(tmp_path / "out.jsonl")[-1]["seconds"] < 1100


def test_resuming_with_another_option_is_refused(run, trained):
    assert_refused(run(trained, "--resume", "--lr", 0.5, small=False), "--lr", "0.012")
    assert_refused(run(trained, "--resume", "--batch-size=4", small=False), "--batch-size")
    assert_refused(run(trained, "--resume", "--overwrite", small=False), "--overwrite")


def test_resuming_without_a_state_is_refused_and_makes_no_file(run, tmp_path):
    assert_refused(run(tmp_path, "--resume", small=False), "out.last.pt")
    assert list(tmp_path.iterdir()) == []


def test_resuming_from_a_model_without_training_state_is_refused(run, trained, tmp_path):
    shutil.copy(trained / "out.pt", tmp_path / "out.last.pt")
    assert_refused(run(tmp_path, "--resume", small=False), "out.last.pt holds no training state")


def test_resuming_after_the_data_changed_is_refused(run, clips, tmp_path):
    folder = write_clips(tmp_path / "own", [0.5, 0.5, 0.6])
    run(tmp_path, "--dataset", folder)
    log = (tmp_path / "out.jsonl").read_bytes()
    write_clips(tmp_path / "other", [0.7])
    (tmp_path / "other" / "0.wav").rename(folder / "0.wav")
    assert_refused(run(tmp_path, "--resume", small=False), "other audio")
    assert (tmp_path / "out.jsonl").read_bytes() == log


def test_resuming_without_the_best_checkpoint_writes_one(run, tmp_path):
    assert run(tmp_path).code == 0
    (tmp_path / "out.pt").unlink()
    assert run(tmp_path, "--resume", small=False).code == 0
    assert load_checkpoint(tmp_path / "out.pt")[1]["step"] == 4


def test_a_worse_model_does_not_replace_the_best_after_resuming_either(run, trained, tmp_path):
    last = torch.load(trained / "out.last.pt", weights_only=True)
    save(tmp_path / "out.last.pt", last | {"best": last["best"] - 1})
    (tmp_path / "out.pt").write_text("the best so far")
    assert run(tmp_path, "--resume", small=False).code == 0
    assert (tmp_path / "out.pt").read_text() == "the best so far"


def test_a_log_that_breaks_off_in_mid_line_is_no_obstacle(run, trained, tmp_path):
    shutil.copy(trained / "out.last.pt", tmp_path)
    (tmp_path / "out.jsonl").write_bytes((trained / "out.jsonl").read_bytes()[:-20])
    assert run(tmp_path, "--resume", small=False).code == 0
    figures = [[e["val_nll"] for e in evaluations(folder / "out.jsonl")] for folder in (trained, tmp_path)]
    assert figures[0] == figures[1]


def test_a_run_whose_log_is_gone_begins_another(run, trained, tmp_path):
    shutil.copy(trained / "out.last.pt", tmp_path)
    assert run(tmp_path, "--resume", small=False).code == 0
    assert [entry["step"] for entry in evaluations(tmp_path / "out.jsonl")] == [4]            # nothing else is in it


def test_a_run_continues_where_the_same_audio_lies_elsewhere(run, tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_clips(tmp_path / place / "own", [0.5, 0.5, 0.6])
        os.utime(tmp_path / place / "own" / "0.wav", ns=(len(place), 1))
    assert run(tmp_path / "here", "--dataset", "own").code == 0
    for path in (tmp_path / "here").glob("out*"):
        path.rename(tmp_path / "there" / path.name)
    resumed = run(tmp_path / "there", "--resume", small=False)
    assert resumed.code == 0, resumed.err


def test_a_run_continues_where_its_folder_has_another_name(run, tmp_path):
    folder = write_clips(tmp_path / "own", [0.5, 0.5, 0.6])
    assert run(tmp_path, "--dataset", folder).code == 0
    folder.rename(tmp_path / "moved")
    resumed = run(tmp_path, "--resume", "--dataset", "moved", small=False)
    assert resumed.code == 0, resumed.err


def test_a_run_continues_where_its_codec_has_another_name(run, tmp_path, tiny_codec_file):
    shutil.copy(tiny_codec_file, tmp_path / "mine.pt")
    assert run(tmp_path, "--codec", tmp_path / "mine.pt").code == 0
    (tmp_path / "mine.pt").rename(tmp_path / "renamed.pt")
    resumed = run(tmp_path, "--resume", "--codec", tmp_path / "renamed.pt", small=False)
    assert resumed.code == 0, resumed.err


def test_a_run_can_continue_where_the_memory_is_smaller(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with spy(HybridGPT, "forward") as calls:
        assert run(tmp_path, "--steps", 1).code == 0
        state = torch.load("out.last.pt", weights_only=True)
        state["args"]["steps"] = 2
        torch.save(state, "out.last.pt")
        assert run(tmp_path, "--resume", "--accumulate", 2, "--device", "cpu", small=False).code == 0
    assert [len(call.args[1]) for call in in_training(calls)] == [2, 1, 1]


def test_resuming_keeps_the_number_format_of_the_run_unless_told_otherwise(run, tmp_path):
    assert run(tmp_path, "--dtype", "bfloat16").code == 0
    assert "on cpu in bfloat16" in run(tmp_path, "--resume", "--device", "cpu", small=False).out
    assert "on cpu in float32" in run(tmp_path, "--resume", "--device", "cpu", "--dtype", "float32", small=False).out


def test_a_run_that_was_compiled_can_continue_without(run, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    assert run(tmp_path, "--compile").code == 0
    assert run(tmp_path, "--resume", "--no-compile", small=False).code == 0
    assert len(compiled) == 1


# ----------------------------------------------------------------------------- signals, kills and other ends

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_its_state_saved_and_says_how_to_go_on(command, tmp_path, number, code):
    process = subprocess.Popen(command("--steps", 100_000, "--eval-every", 100_000), cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))       # as nohup does
    try:
        while not process.stdout.readline().startswith("step    20"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGHUP)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in err
    assert "continue with: python train.py --resume --out out.pt --device cpu\n" in out
    step = torch.load(tmp_path / "out.last.pt", weights_only=True)["step"]
    assert step >= 20 and f"stopped at step {step};" in out


def test_a_closed_terminal_ends_the_run_with_its_state_saved(command, tmp_path):
    """As when the connection to a remote machine breaks: to print anything more would be an error."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, command("--steps", 100_000, "--eval-every", 100_000))
    try:
        with open(terminal, errors="replace") as screen:
            assert any(line.startswith("step    20") for line in screen)
        status = os.waitpid(pid, 0)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "out.last.pt", weights_only=True)["step"] >= 20


def test_a_terminal_that_fails_before_its_signal_comes_costs_nothing_either(run, tmp_path):
    def broken(*words, **options):
        if str(words[0]).startswith("step     2  val"):
            raise OSError(errno.EIO, "Input/output error")
    with mock.patch("builtins.print", broken):
        assert run(tmp_path).code == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "out.last.pt", weights_only=True)["step"] == 3               # the one after
    assert run(tmp_path, "--resume", small=False).code == 0


def test_windows_has_no_such_signal(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(train, "stopped_by", [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", open(os.devnull))      # cannot be written to
    train.say("not to be seen")
    assert len(train.stopped_by) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_preparing_ends_the_run_without_a_word(command, own_clips, tmp_path, number, code):
    shutil.rmtree(own_clips)
    write_clips(own_clips, [16] * 12)                         # so much that it cannot be over before the signal
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)      # a shell's background jobs do not
    process = subprocess.Popen(command(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=listen)
    try:
        while not list(data.CACHE.glob(f".{own_clips.name}-*/clips/*.part")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, number)                        # a terminal's Ctrl-C reaches the helpers, too
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (code, -number) and "Traceback" not in err, err
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("out.jsonl", 0)]     # nothing is trained yet


def test_a_second_ctrl_c_does_not_wait_for_the_step(run, tmp_path):
    """The first lets the step finish; whoever does not want to wait loses what came after the last evaluation."""
    batch = data.Dataset.batch

    def impatient(self, seed, step, *args):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, seed, step, *args)
    with mock.patch.object(data.Dataset, "batch", impatient):
        result = run(tmp_path)
    assert result.code == 130 and "stopped" not in result.out
    assert torch.load(tmp_path / "out.last.pt", weights_only=True)["step"] == 2
    assert run(tmp_path, "--resume", small=False).code == 0


def test_a_signal_does_not_save_what_has_diverged(run, tmp_path):
    batch = data.Dataset.batch

    def spoilt(self, seed, step, *args):
        codes, mel, targets = batch(self, seed, step, *args)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            mel = mel * math.nan
        return codes, mel, targets
    with mock.patch.object(data.Dataset, "batch", spoilt):
        assert_refused(run(tmp_path), "no longer finite at step 3", "out.last.pt")
    assert load_checkpoint(tmp_path / "out.last.pt")[1]["step"] == 2


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path):
    save(tmp_path / "a.pt", {"x": 1})
    with mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"x": 2})                     # written, but not yet on the disk
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_log_is_on_the_disk_before_the_checkpoint_that_remembers_its_length(run, tmp_path, monkeypatch):
    done, log = [], tmp_path / "out.jsonl"
    is_log = lambda file: log.exists() and os.path.samestat(os.fstat(file), log.stat())
    monkeypatch.setattr(os, "fsync", lambda file: done.append(is_log(file)))
    monkeypatch.setattr("model.save", lambda path, content: (done.append(path.name), save(path, content)))
    assert run(tmp_path).code == 0
    saves = [i for i, what in enumerate(done) if what == "out.last.pt"]
    assert len(saves) == 3 and all(done[i - 1] is True for i in saves)


def without_times(path):
    """A log's figures but for what no two runs share."""
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")}
            for entry in log_of(path) if "args" not in entry]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(command, own_clips, tmp_path, kills):
    def start(out, *options):
        return subprocess.Popen(command("--steps", 30 * kills, "--eval-every", 3, "--out", out, *options), cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began, rng = time.time(), random.Random(0)
    calm = start("calm.pt")
    calm.stdout.readline()                                    # said when all is prepared
    prepared = time.time() - began
    assert calm.communicate() and calm.returncode == 0
    for path in data.CACHE.glob(f"{own_clips.name}-*"):       # preparation may be killed, too
        shutil.rmtree(path)
    reached = []
    for kill in range(kills):
        process = start("out.pt", "--resume" if (tmp_path / "out.last.pt").exists() else "--overwrite")
        if kill % 5 == 0:                                     # while it prepares, or as soon as that is done
            select.select([process.stdout], [], [], rng.uniform(0.5, 1) * prepared)
        else:                                                 # in the loop, after at most 27 steps more
            lines = (line for line in process.stdout if line.startswith("step"))
            list(itertools.islice(lines, rng.randint(1, 9)))
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        for path in tmp_path.glob("out*.pt"):                 # whatever is there, is whole
            reached.append(load_checkpoint(path)[1]["step"])
    assert len({*reached}) > kills // 2 and max(reached) < 30 * kills         # it was killed on its way
    process = start("out.pt", "--resume" if (tmp_path / "out.last.pt").exists() else "--overwrite")
    assert process.communicate() and process.returncode == 0
    assert without_times(tmp_path / "out.jsonl") == without_times(tmp_path / "calm.jsonl")
    calm, killed = (load_checkpoint(tmp_path / f"{name}.last.pt")[0].state_dict() for name in ("calm", "out"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)


def test_a_full_disk_ends_the_run_and_loses_nothing(run, tmp_path, trained):
    synced, fsync = [], os.fsync

    def full(file):
        synced.append(file)
        if len(synced) == 4:                                  # the whole state, after two steps
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)
    with mock.patch.object(os, "fsync", full):
        assert_refused(run(tmp_path), "no space left", "--resume")
    assert load_checkpoint(tmp_path / "out.last.pt")[1]["step"] == 0 and load_checkpoint(tmp_path / "out.pt")
    assert not list(tmp_path.glob("*.tmp"))
    assert run(tmp_path, "--resume", small=False).code == 0
    assert [e["val_nll"] for e in evaluations(tmp_path / "out.jsonl")] == \
        [e["val_nll"] for e in evaluations(trained / "out.jsonl")]


@pytest.mark.parametrize("every, options", [(1, []), (20, ["--own-details"])])        # drawn from what has diverged
def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(run, tmp_path, every, options):
    result = run(tmp_path, "--lr", "1e30", "--steps", 20, "--eval-every", every, *options)
    assert_refused(result, "no longer finite at step", "learning rate", "out.last.pt")
    model, checkpoint = load_checkpoint(tmp_path / "out.last.pt")
    assert f"at step {checkpoint['step'] + every}," in result.err
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("evaluation, step, word, saved",
                         [(1, 0, "there is no checkpoint yet", []), (2, 2, "out.last.pt", [0, 0])])
def test_a_model_whose_validation_loss_is_not_finite_is_never_saved(run, tmp_path, monkeypatch, evaluation, step, word,
                                                                    saved):
    validation, calls = data.Dataset.validation, []

    def broken(*args):
        calls.append(args)
        for codes, mel, *rest in validation(*args):
            yield codes, mel * (math.nan if len(calls) == evaluation else 1), *rest
    monkeypatch.setattr(data.Dataset, "validation", broken)
    assert_refused(run(tmp_path), f"the validation loss is no longer finite at step {step}", word)
    assert [load_checkpoint(path)[1]["step"] for path in tmp_path.glob("*.pt")] == saved


# ----------------------------------------------------------------------------- several processes

def test_two_processes_train_in_parts_as_one_does_at_once(command, tmp_path):
    # AdamW does not notice gradients that are too small by a factor; clipping them does, where some norms exceed it
    logs, two = [], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launch, parts in (("one", [], 1), ("two", two, 2)):
        python, *script = command("--batch-size", 4, "--dropout", 0, "--grad-clip", 1, "--warmup", 2,
                                  "--accumulate", parts, "--out", f"{name}.pt")
        done = subprocess.run([python, *launch, *script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best validation NLL") == 1                      # one of them speaks
        logs.append(log_of(tmp_path / f"{name}.jsonl"))
    one, two = ([entry.get("val_nll", entry.get("loss")) for entry in log[1:]] for log in logs)
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-4)
    assert one[0] - one[1] > 0.01                             # and not because nothing moves


def test_the_rows_of_all_processes_together_are_the_batch_of_one(run, clips, tiny_codec_file, monkeypatch):
    args, codec = SimpleNamespace(seed=3, batch_size=9, context=32, stretch=None), load_codec(str(tiny_codec_file))
    decoded, recorded = (data.prepare(str(clips), codec, run.cache, quiet=True, mel_codebooks=k) for k in (8, 0))
    for step in (0, 1):                                       # with --mix 0, and an odd number of rows each
        whole = train.get_batch(decoded, [recorded], args, 8, step)
        monkeypatch.setattr(train, "WORLD", 3)
        parts = []
        for rank in range(3):
            monkeypatch.setattr(train, "RANK", rank)
            parts.append(train.get_batch(decoded, [recorded], args, 8, step))
        assert all(torch.equal(torch.cat(pieces), all_of_it) for pieces, all_of_it in zip(zip(*parts), whole))
        monkeypatch.undo()


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_interrupt_ends_a_run_at_once_unless_torchrun_may_have_forwarded_it(monkeypatch, torchrun):
    handlers = {}
    monkeypatch.setattr(train, "TORCHRUN", torchrun)
    monkeypatch.setattr(train, "stopped_by", [])
    monkeypatch.setattr(train.signal, "signal", handlers.__setitem__)
    train.stop_soon(signal.SIGINT)
    assert train.stopped_by == [signal.SIGINT]
    assert handlers == ({} if torchrun else {signal.SIGINT: signal.default_int_handler})


def test_all_processes_stop_for_a_signal_that_any_of_them_has_received(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "all_reduce", lambda number, op: number.fill_(15 * (op == train.dist.ReduceOp.MAX)))
    assert train.signal_received() == 15


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    empty, chosen = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, device: chosen.append(device) or empty(*shape))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert train.choose_device("cuda") == torch.device("cuda:1") and chosen == ["cuda:1", "cuda:1"]
    assert train.choose_device("cpu") == torch.device("cpu") and chosen[2:] == ["cpu"]


@pytest.mark.parametrize("newer, expected", [(True, "mps"), (False, "cpu")])
def test_an_old_macos_trains_on_its_cpu(monkeypatch, newer, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: newer and version == (15, 1))
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(*shape))
    assert train.choose_device(None) == torch.device(expected)


@pytest.mark.parametrize("names, expected", [(["RANK"], (0, 1)), (["WORLD_SIZE"], (0, 1)),
                                             (["RANK", "WORLD_SIZE"], (0, 1)),
                                             (["RANK", "WORLD_SIZE", "LOCAL_RANK"], (2, 2))])
def test_a_rank_and_a_number_of_processes_alone_are_not_torchruns(monkeypatch, names, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "2")
    script = runpy.run_path(str(SCRIPT))
    assert (script["RANK"], script["WORLD"]) == expected


def test_every_process_refuses_to_overwrite_an_earlier_run(tmp_path):
    (tmp_path / "out.pt").write_bytes(b"precious")
    files = [tmp_path / name for name in ("out.pt", "out.last.pt", "out.jsonl")]
    for master in (True, False):
        with mock.patch.object(train, "MASTER", master), pytest.raises(SystemExit, match="out.pt exists"):
            train.open_log(SimpleNamespace(resume=False, overwrite=False), *files)


# ----------------------------------------------------------------------------- published corpora

def test_a_published_corpus_is_trained_on_by_its_name(run, tmp_path, clips, monkeypatch):
    folder = tmp_path / "corpora" / "LibriSpeech" / "dev-clean"
    for speaker in range(84, 90):
        shutil.copytree(clips, folder / str(speaker) / "1")
    monkeypatch.setattr(corpora, "HOME", tmp_path / "corpora")
    result = run(tmp_path, "--dataset", "librispeech-mini")
    assert result.code == 0 and "librispeech-mini: " in result.out


def test_published_corpora_are_encoded_with_metas_codec_unless_told_otherwise(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.encodec.model, "ROOT_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert_refused(run(tmp_path, "--dataset", "fma", "--device", "cpu", small=False), "cannot load EnCodec's weights",
                   "--codec-dir FOLDER", "--codec mini")


# ----------------------------------------------------------------------------- files that are there already

def test_an_existing_run_is_refused_and_left_untouched(run, trained):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    assert_refused(run(trained), "out.pt exists", "--resume", "--overwrite")
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


@pytest.mark.parametrize("left", ["out.pt", "out.last.pt", "out.jsonl"])
def test_any_one_file_of_an_earlier_run_is_enough_to_refuse(run, tmp_path, left):
    (tmp_path / left).write_text("precious")
    assert_refused(run(tmp_path), left)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(left, "precious")]


def test_overwrite_starts_anew(run, trained, tmp_path):
    run(tmp_path, "--seed", 3)
    assert run(tmp_path, "--overwrite").code == 0
    assert [e["val_nll"] for e in evaluations(tmp_path / "out.jsonl")] == \
        [e["val_nll"] for e in evaluations(trained / "out.jsonl")]
    assert sum("args" in entry for entry in log_of(tmp_path / "out.jsonl")) == 1


def test_overwriting_a_run_leaves_nothing_of_it_to_continue(run, trained, tmp_path, monkeypatch):
    shutil.copy(trained / "out.last.pt", tmp_path)

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.Dataset, "validation", stop)
    assert run(tmp_path, "--overwrite").code == 130
    assert not (tmp_path / "out.last.pt").exists()


def test_what_another_training_writes_is_left_alone(run, tmp_path):
    hold = "import fcntl; log = open('out.jsonl', 'a'); fcntl.lockf(log, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert_refused(run(tmp_path), "another training is writing out.jsonl", "--out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]
        other.communicate(b"\n")
    assert run(tmp_path).code == 0                            # an empty log is nothing that could be lost


def test_a_second_training_is_refused_while_the_first_prepares(run, tmp_path):
    refused, prepare = [], functools.partial(data.prepare, cache=run.cache, quiet=True)

    def meanwhile(*args, **options):
        second = [sys.executable, SCRIPT, "--device", "cpu", "--overwrite", "--dataset", "nowhere"]
        refused.append(subprocess.run(second, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return prepare(*args, **options)
    assert run_script(tmp_path, SCRIPT, *run.options, prepare=meanwhile).code == 0
    [second] = refused
    assert_refused(SimpleNamespace(code=second.returncode, err=second.stderr), "another training is writing out.jsonl")


def test_a_log_that_cannot_be_written_costs_no_earlier_run(run, tmp_path):
    (tmp_path / "out.last.pt").write_bytes(b"precious")
    (tmp_path / "out.jsonl").mkdir()
    assert_refused(run(tmp_path, "--overwrite"), "cannot write out.jsonl")
    assert (tmp_path / "out.last.pt").exists()


def test_a_folder_that_cannot_be_written_is_found_at_the_start_even_if_its_log_can(run, trained, tmp_path):
    for name in ("out.pt", "out.last.pt", "out.jsonl"):
        shutil.copy(trained / name, tmp_path)
    before = (tmp_path / "out.jsonl").read_text()
    with mock.patch.object(os, "access", return_value=False):                     # root may write anywhere
        for option in ("--overwrite", "--resume"):
            refused = run(tmp_path, option, small=option == "--overwrite")
            assert_refused(refused, "cannot write out.jsonl", "its folder")
    assert (tmp_path / "out.last.pt").exists() and (tmp_path / "out.jsonl").read_text() == before


def test_a_command_that_failed_can_be_corrected_and_run_again(run, tmp_path):
    assert run(tmp_path, "--dataset", "speeech").code != 0
    assert run(tmp_path).code == 0


# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("options, words", [
    (["--dataset", "speeech"], ["speeech", "speech", "music"]),
    (["--codec", "minni"], ["minni", "encodec"]),
    (["--codec", ""], ["no codec ''", "encodec"]),
    (["--no-such-option"], ["--no-such-option"]),
    (["--step", 3], ["--step"]),
    (["--context", 1], ["--context"]),
    (["--out", "run-lr1.5e-3"], ["--out", ".pt"]),
    (["--steps", 0], ["--steps"]),
    (["--n-codebooks", 0], ["--n-codebooks"]),
    (["--mel-codebooks", -1], ["--mel-codebooks"]),
    (["--n-codebooks", 1, "--lookahead", 705], ["lookahead is 705", "704"]),
    (["--window", 0, 64], ["rises for 0", "1024"]),
    (["--eval", ""], ["--eval"]),
    (["--eval-every", 0], ["--eval-every"]),
    (["--accumulate", 0], ["--accumulate"]),
    (["--eval", "out.pt"], ["--eval", "--context has no place"]),
    (["--n-codebooks", 1_000_000], ["8 codebooks", "not 1000000", "--n-codebooks"]),
    (["--mel-codebooks", 9], ["8 codebooks"]),
    (["--set", "n_mels=40"], ["n_mels is fixed"]),
    (["--set", "n_head=0"], ["at least 1"]),
    (["--set", "n_layer=-1"], ["at least 1"]),
    (["--set", "n_mel_layer=-1"], ["at least 0"]),
    (["--set", "n_layers=3"], ["--set n_layers=3"]),
    (["--set", "n_layer=three"], ["--set n_layer=three"]),
    (["--set", "use_mel=1"], ["--set use_mel=1"]),
    (["--set", "context=32"], ["--set context=32", "option"]),
    (["--set", "n_codebooks=3"], ["--set n_codebooks=3", "option"]),
    (["--set", "latents=True"], ["--set latents=True", "option"]),
    (["--set", "mel_noise=nan"], ["at least 0"]),
    (["--set", "fuse=glue"], ["--set", "glue", "concat"]),
    (["--set", "n_input_codebooks=9"], ["8 codebooks", "n_input_codebooks"]),
    (["--lookahead", 192], ["lookahead", "--mel-codebooks 0"]),
    *[(["--own-details", *more], ["--own-details"]) for more in (
        ["--n-codebooks", 1], ["--mel-codebooks", 0], ["--mix", 0], ["--window", 512, 512],
        ["--model", "nano-gpt"], ["--mel-codebooks", 0, "--lookahead", 9], ["--n-codebooks", 1, "--mel-codebooks", 1],
        ["--set", "n_input_codebooks=8"], ["--set", "mel_delay=1"])],
    (["--model", "nano-gpt", "--mix", 0], ["--mix", "token-only"]),
    (["--dataset", ""], ["no dataset ''"]),
    (["--codec-dir", ""], ["empty name"]),
    (["--batch-size", "many"], ["--batch-size"]),
    (["--accumulate", 3], ["--accumulate"]),
    (["--stretch", 16], ["--stretch 16", "context, 32"]),
    (["--n-codebooks", 2, "--batch-size", 16_384], ["65,536 frames", "at most 65,535", "--accumulate"]),
    (["--stretch", 128], ["--stretch 128", "divide the batch, 64"]),
    (["--model", "gpt-5"], ["gpt-5"]),
    (["--dropout", 1.5], ["--dropout"]),
    (["--lr", -1], ["--lr"]),
    (["--seed", -1], ["--seed"]),
    (["--weight-decay", -1], ["--weight-decay"]),
    (["--grad-clip", 0], ["--grad-clip"]),
])
def test_a_bad_option_is_one_clear_line(run, tmp_path, options, words):
    assert_refused(run(tmp_path, *options), *words)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("name", ["abacus", "meta", "hpu", "cpu:cpu"])
def test_a_device_that_cannot_compute_is_one_clear_line(run, tmp_path, name):
    assert_refused(run(tmp_path, "--device", name), f"device '{name}' cannot be used here", "--device cpu")


def test_a_mel_to_mix_in_that_cannot_be_had_is_refused_before_any_work(run, tmp_path):
    folder, before = write_clips(tmp_path / "own", [0.5, 0.5]), set(run.cache.iterdir())
    assert_refused(run(tmp_path, "--dataset", folder, "--mix", 9), "8 codebooks")
    assert_refused(run(tmp_path, "--dataset", folder, "--n-codebooks", 1, "--lookahead", 9, "--mix", 8), "--mix")
    assert set(run.cache.iterdir()) == before


def test_a_folder_without_audio_is_one_clear_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(run(tmp_path, "--dataset", "empty"), "no audio files under empty")


def test_an_out_that_cannot_be_written_is_refused_before_any_work(run, tmp_path):
    folder, before = write_clips(tmp_path / "own", [0.5, 0.5]), set(run.cache.iterdir())
    assert_refused(run(tmp_path, "--dataset", folder, "--out", "nowhere/out.pt"), "nowhere")
    assert set(run.cache.iterdir()) == before and not (tmp_path / "nowhere").exists()
    tmp_path.joinpath("file").touch()
    assert_refused(run(tmp_path, "--dataset", folder, "--out", "file/out.pt"), "file/out.pt")
    assert set(run.cache.iterdir()) == before


def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(run, trained, tmp_path):
    good = (trained / "out.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(good[:len(good) // 2])
    torch.save({"something": 1}, tmp_path / "foreign.pt")
    for name in ("half.pt", "foreign.pt", "absent.pt"):
        assert_refused(run(tmp_path, "--eval", name, small=False), name)
    assert_refused(run(tmp_path, "--eval", trained / "out.pt", "--latents", small=False), "--latents has no place")


def test_a_checkpoint_whose_codec_was_replaced_is_refused(run, tmp_path, tiny_codec_file):
    codec = tmp_path / "codec.pt"
    codec.write_bytes(tiny_codec_file.read_bytes())
    assert run(tmp_path, "--codec", codec).code == 0
    saved = torch.load(codec, weights_only=True)
    saved["weights"] = {key: value * 1.5 for key, value in saved["weights"].items()}
    torch.save(saved, codec)
    other = load_codec(codec).checksum
    assert_refused(run(tmp_path, "--eval", "out.pt", small=False), "codec", other)
    assert_refused(run(tmp_path, "--resume", small=False), "codec")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DataLoader worker (pid(s) 7030) exited unexpectedly")])
def test_too_little_memory_is_one_clear_line(run, tmp_path, error):
    with mock.patch.object(HybridGPT, "backbone", side_effect=error):
        assert_refused(run(tmp_path), "out of memory", "--accumulate", "fewer cores")


def test_a_model_that_cannot_be_compiled_is_one_clear_line(run, tmp_path):
    with mock.patch.object(HybridGPT, "backbone", side_effect=torch._inductor.exc.InvalidCxxCompiler()):
        assert_refused(run(tmp_path), "No working C++ compiler", "--no-compile")


def test_a_name_that_is_too_long_for_a_checkpoint_is_one_clear_line(run, tmp_path):
    assert_refused(run(tmp_path, "--out", f"{'a' * 245}.pt"), "aaa.last.pt.tmp: File name too long")


def test_an_error_of_ours_is_not_blamed_on_the_memory(run, tmp_path):
    with mock.patch.object(HybridGPT, "backbone", side_effect=RuntimeError("shapes do not fit")):
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            run(tmp_path)
