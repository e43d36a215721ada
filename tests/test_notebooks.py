"""
python -m pytest tests/test_notebooks.py

Every notebook runs from its first cell to its last, and the scripts beside them count correctly.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch

import sample
from conftest import assert_refused, noise, run_script
from data import prepare, split_clips
from mel import HANN, WINDOW, log_mel
from tokens import CodecError, load_codec

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import closeness                                                       # noqa: E402
import copying                                                         # noqa: E402
import experiments                                                     # noqa: E402
import refit_codec                                                     # noqa: E402
import train_codec                                                     # noqa: E402


def execute(path, folder):
    """Run a notebook in a process of its own, on few clips; returns that process, ended."""
    for split, n in (("train", 6), ("val", 2)):
        (folder / "clips" / split).mkdir(parents=True)
        for clip in sorted((NOTEBOOKS.parent / "assets" / "speech" / split).glob("*.ogg"))[:n]:
            (folder / "clips" / split / clip.name).symlink_to(clip)
    return subprocess.run([sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", path,
                           "--ExecutePreprocessor.timeout=300", "--output-dir", folder],       # seconds a cell
                          cwd=NOTEBOOKS, capture_output=True, text=True, env={**os.environ, "QUICK": str(folder)})


@pytest.fixture(scope="module", autouse=True)
def executed(request, tmp_path_factory):
    """The notebooks that are to be tested, by path. They run in the background, two at a time, from this file's first
    test on, and are waited for by its last ones."""
    paths = [item.callspec.params["path"] for item in request.session.items
             if getattr(item, "originalname", None) == test_a_notebook_runs.__name__]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute, path, tmp_path_factory.mktemp(path.stem)) for path in paths}
        pool.shutdown(cancel_futures=True)                    # those that have not begun, if a test has failed


@pytest.fixture()
def results_and_runs_here(tmp_path, monkeypatch):
    """experiments.py finds and leaves everything in the test's folder."""
    for folder in ("RESULTS", "RUNS"):
        monkeypatch.setattr(experiments, folder, tmp_path)


def gaussian(mean, std):
    return torch.full((160,), mean, dtype=torch.float64), torch.eye(160, dtype=torch.float64) * std ** 2


def test_the_frechet_distance_of_gaussians_is_known():
    assert closeness.frechet(gaussian(1, 2), gaussian(1, 2)) == pytest.approx(0, abs=1e-9)
    assert closeness.frechet(gaussian(1, 2), gaussian(4, 2)) == pytest.approx(160 * 9)
    assert closeness.frechet(gaussian(1, 2), gaussian(1, 5)) == pytest.approx(160 * 9)       # (5 - 2)^2 a dimension
    rotated = torch.linalg.qr(torch.randn(160, 160, dtype=torch.float64))[0]
    mean, covariance = torch.zeros(160).double(), torch.diag(torch.linspace(1, 9, 160).double())
    other = rotated @ covariance @ rotated.T
    assert closeness.frechet((mean, covariance), (mean, other)) > 1
    assert closeness.frechet((mean, other), (mean, other)) == pytest.approx(0, abs=1e-6)


def test_closeness_hears_loudness_and_pace():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(48_000, generator=generator) for _ in range(4)]
    pulse = (torch.arange(48_000) % 6000 < 3000).float()                                     # four bursts a second
    real = closeness.statistics(closeness.sums([0.1 * w for w in noise[:2]]))
    distance = [closeness.frechet(closeness.statistics(closeness.sums(waves)), real) for waves in (
        [0.1 * w for w in noise[2:]], [0.2 * w for w in noise[2:]], [0.1 * w * pulse for w in noise[2:]])]
    assert distance[0] < 0.2 * distance[1] < distance[1] < distance[2]


def test_a_gain_is_that_over_the_twin_of_the_same_seed():
    def made(seed, nll, codec="a"):
        return {"seed": seed, "codec_checksum": codec, "model": "coarse-gpt",
                "scores": {"0": {"val_nll": nll, "clip_nll": [nll, nll], "clip_targets": [1, 1]}}}
    by_seed, mean, *_ = experiments.gain([made(0, 1.0), made(2, 2.0)], [made(1, 9.0), made(2, 5.0), {"seed": 0}])
    assert by_seed == [3.0] and mean == 3.0                                                  # seed 0's was not scored
    assert experiments.gain([made(0, 1.0)], [made(1, 9.0)]) is None
    assert experiments.gain([made(0, 1.0)], [made(0, 9.0, "another")]) is None
    reader = {**made(0, 4.0), "model": "nano-codes8-steps1200"}                      # its score is filed under "8"
    reader["scores"] = {"8": reader["scores"]["0"]}
    assert experiments.gain([made(0, 1.0)], [reader]).mean == 3.0


@pytest.mark.parametrize("model, twin", [
    ("nano-noise-steps600", "nano-gpt-steps600"), ("nano-latents8-steps1200", "nano-gpt-steps1200"),
    ("nano-own-latents8", "nano-gpt"), ("coarse-both8", "coarse-gpt"), ("coarse-late-cut192", "coarse-gpt-late")])
def test_a_twin_differs_in_what_it_reads_only(model, twin):
    assert experiments.TWINS[model] == [twin]


def test_the_table_says_where_a_gain_compares_unequal_learning_rates():
    rows = experiments.table(["music"])
    assert "| `hybrid` | `gpt-l` (lr 6e-3 against 3e-3) |" in rows and "| `coarse` | `coarse-gpt` |" in rows


def test_a_whole_frame_costs_its_coarse_code_and_its_finer_ones():
    best = {"val_nll": 3.0, "val_nll_finer": [4.0, 5.5]}
    assert experiments.frame_nll([{"best": best}, {"best": {**best, "val_nll": 4.0}}]) == 13.0
    models = experiments.table(["speech"]).split("\n\n")[0].splitlines()
    nano, coarse = (next(row for row in models if f"| `{model}` |" in row) for model in ("nano", "coarse"))
    assert nano.endswith("| 38.99 |") and coarse.endswith("|  |")


@pytest.mark.parametrize("text", ["1", "1:2:3", "1:x", "-1:1", "nan:1"])
def test_two_temperatures_are_wanted(text):
    assert closeness.pair("1:0.5") == (1.0, 0.5)
    with pytest.raises(closeness.argparse.ArgumentTypeError, match="two temperatures of 0 or more, like 1:0.5"):
        closeness.pair(text)


def test_the_bootstrap_interval_holds_the_mean_and_narrows_with_the_clips():
    rng = np.random.default_rng(0)
    widths = []
    for n in (10, 1000):
        gains, weights = rng.normal(0.3, 0.1, size=(3, n)), rng.integers(50, 500, size=n)
        mean, low, high = experiments.bootstrap(gains, weights)
        assert mean == pytest.approx((gains.mean(0) * weights).sum() / weights.sum())
        assert low < mean < high
        widths.append(high - low)
    assert widths[1] < 0.3 * widths[0]


def test_a_model_is_compared_with_one_that_predicts_as_many_codes_from_as_long_a_past():
    def matters(model):
        words = experiments.MODELS[model]
        kept = "--n-codebooks", "--context", "--batch-size", "--steps"
        return {a: b for a, b in zip(words, words[1:]) if a in kept}
    for model, twins in experiments.TWINS.items():
        assert all(matters(model) == matters(twin) and model != twin for twin in twins)


@pytest.mark.parametrize("interrupted, commits", [(False, "b"), (True, "b a")])
@pytest.mark.usefixtures("results_and_runs_here")
def test_a_result_names_every_commit_that_its_run_was_made_with(tmp_path, monkeypatch, interrupted, commits):
    name = f"speech-coarse-lr{experiments.LEARNING_RATES[0]}-seed0"
    (tmp_path / f"{name}.commits").write_text("a")
    (tmp_path / f"{name}.jsonl").write_text(
        '{"codec": "mini", "codec_checksum": "0", "torch": "2", "args": {"dtype": "float32"}}\n'
        '{"step": 0, "val_nll": 7.0, "seconds": 1.0, "clip_nll": [7.0], "clip_targets": [9]}')
    if interrupted:
        (tmp_path / f"{name}.last.pt").touch()
    ran = []

    def run(words, **_):
        ran.append(words)
        (tmp_path / f"{name}.last.pt").touch()
        return SimpleNamespace(returncode=0, stdout="b" if "describe" in words else "")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    assert experiments.run("speech", "coarse", experiments.LEARNING_RATES[0], 0)["commit"] == commits
    assert ["--resume" in words for words in ran if "--out" in words] == [interrupted]


@pytest.mark.usefixtures("results_and_runs_here")
def test_a_corpus_known_by_name_is_encoded_with_the_codec_of_all_results(tmp_path, monkeypatch):
    name, ran = "librispeech-mini-coarse-lr6e-3-seed0", []
    (tmp_path / f"{name}.jsonl").write_text(
        '{"codec": "mini", "codec_checksum": "%s", "torch": "2", "args": {"dtype": "float32"}}\n'
        '{"step": 0, "val_nll": 7.0, "seconds": 1.0, "clip_nll": [7.0], "clip_targets": [9]}'
        % experiments.MINI_SHA256[:16])

    def run(words, **_):
        ran.append(" ".join(map(str, words)))
        (tmp_path / f"{name}.last.pt").touch()
        return SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    result = experiments.run("librispeech-mini", "coarse", "6e-3", 0)
    assert any("--dataset librispeech-mini " in words and "--codec mini" in words for words in ran)
    assert [result] == experiments.best_runs("librispeech-mini", "coarse")


def write_result(folder, lr, seed, nll, options=experiments.COARSE):
    command = " ".join(["python train.py --dataset speech", *options, "--lr", lr, "--seed", str(seed), "--device cpu"])
    experiments.write(folder / f"speech-coarse-lr{lr}-seed{seed}.json", {
        "command": command, "model": "coarse", "lr": lr, "seed": seed, "best": {"val_nll": nll},
        "codec_checksum": experiments.MINI_SHA256[:16]})


def test_a_result_made_with_other_options_is_none_of_this_models(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    write_result(tmp_path, "6e-3", 0, 4.0)
    assert [r["lr"] for r in experiments.best_runs("speech", "coarse")] == ["6e-3"]
    write_result(tmp_path, "6e-3", 0, 4.0, [*experiments.COARSE, "--steps", "600"])
    assert experiments.best_runs("speech", "coarse") == []


def test_a_learning_rate_with_more_seeds_is_the_one_that_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    for lr, seed, nll in (("6e-3", 0, 3.9), ("1.2e-2", 0, 4.0), ("3e-3", 0, 3.8)):
        write_result(tmp_path, lr, seed, nll)
    assert [r["lr"] for r in experiments.best_runs("speech", "coarse")] == ["3e-3"]
    write_result(tmp_path, "1.2e-2", 1, 4.1)
    assert [(r["lr"], r["seed"]) for r in experiments.best_runs("speech", "coarse")] == [("1.2e-2", 0), ("1.2e-2", 1)]


@pytest.mark.usefixtures("results_and_runs_here")
def test_a_rate_at_which_training_diverges_counts_with_the_best_before(tmp_path, monkeypatch):
    name = "speech-coarse-lr2.4e-2-seed0"
    (tmp_path / f"{name}.jsonl").write_text(
        '{"codec": "mini", "codec_checksum": "0", "torch": "2", "args": {"dtype": "float32"}}\n'
        '{"step": 0, "val_nll": 7.0, "seconds": 1.0, "clip_nll": [7.0], "clip_targets": [9]}')
    ending = "error: the loss or its gradient is no longer finite at step 20"

    def run(words, stdout=None, **_):
        (tmp_path / f"{name}.last.pt").touch()
        if "--out" in words:
            stdout.write(ending)
        return SimpleNamespace(returncode=int("--out" in words), stdout="")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    assert experiments.run("speech", "coarse", "2.4e-2", 0)["best"]["val_nll"] == 7.0
    (tmp_path / f"{name}.json").unlink()
    (tmp_path / f"{name}.txt").unlink()
    ending = "error: the disk is full"
    with pytest.raises(RuntimeError, match="disk is full"):
        experiments.run("speech", "coarse", "2.4e-2", 0)


@pytest.mark.parametrize("question, steps, others", [
    ("paper", "", ["hybrid-heard"]), ("scale", "-steps1200", ["hybrid-heard", "hybrid-late", "gpt-m-late"])])
@pytest.mark.usefixtures("results_and_runs_here")
def test_every_model_runs_at_the_learning_rate_that_was_best_for_its_kind(question, steps, others, monkeypatch):
    best, ran = {"gpt-s": "3e-3", "gpt-m": "6e-3", "hybrid": "1.5e-3", "gpt-l": "3e-3"}, []

    def run(dataset, model, lr, seed, device):
        ran.append((dataset, model, lr, seed))
        return {"best": {"val_nll": 4.0 if lr == best.get(model.removesuffix(steps)) else 5.0 + float(lr)}}
    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "score", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "speech", "music", "--only", question, "--seeds", "2"])
    experiments.main()
    searched, runs = ran[:12], ran[12:]
    assert {(d, s) for d, _, _, s in searched} == {("speech", 0)} and len(set(searched)) == 12
    kind = lambda model: model.removesuffix("-heard").removesuffix("-late")
    assert sorted(runs) == sorted((d, m + steps, best[kind(m)], s) for d in ("speech", "music") for s in (0, 1)
                                  for m in (*best, *others))


def test_the_commit_of_a_copy_without_git_or_of_a_machine_without_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(experiments, "ROOT", tmp_path / "unpacked")
    (tmp_path / "unpacked").mkdir()
    assert experiments.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert experiments.commit() == "unknown"


@pytest.mark.parametrize("folder, label", [("music", "music"), ("/nowhere", "nowhere"), ("/nowhere/c/", "nowhere-c"),
                                           ("/a/b/c/", "b-c"), ("~", "-".join(Path.home().resolve().parts[1:][-2:]))])
def test_a_datasets_label_is_short_and_the_beginning_of_a_file_name(folder, label):
    assert experiments.label(folder) == label


def test_an_experiments_list_stays_on_a_line(tmp_path):
    experiments.write(tmp_path / "a.json", {"a": 1, "clip_nll": [1.5, 2.25], "scores": {"0": {"clips": [3, 4]}}})
    assert '"clip_nll": [ 1.5, 2.25 ]' in (tmp_path / "a.json").read_text()
    assert experiments.json.loads((tmp_path / "a.json").read_text())["scores"]["0"]["clips"] == [3, 4]


@pytest.mark.usefixtures("results_and_runs_here")
def test_scores_are_filed_under_the_mel_that_was_shown(tmp_path, monkeypatch):
    name, asked = "speech-coarse-lr6e-3-seed0", []
    (tmp_path / f"{name}.pt").touch()
    (tmp_path / f"{name}.json").write_text(json.dumps({"scores": {"0": {"val_nll": 1}}}))

    def run(words, **_):
        asked.append(words[words.index("--mel-codebooks") + 1])
        return SimpleNamespace(stdout=json.dumps({"val_nll": 10 + int(asked[-1]), "clip_nll": [], "clip_targets": []}))
    monkeypatch.setattr(experiments.subprocess, "run", run)
    experiments.score("speech", "coarse", "6e-3", 0)
    scores = json.loads((tmp_path / f"{name}.json").read_text())["scores"]
    assert asked == ["1", "8"] and {k: s["val_nll"] for k, s in scores.items()} == {"0": 1, "1": 11, "8": 18}


def test_a_result_of_another_codec_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    write_result(tmp_path, "6e-3", 0, 4.0)
    assert experiments.best_runs("speech", "coarse")
    monkeypatch.setattr(experiments, "MINI_SHA256", "0" * 64)
    assert experiments.best_runs("speech", "coarse") == []


def test_what_a_model_is_trained_on():
    on = {"nano": "8", "nano-gpt": "0", "nano-noise": "8", "coarse": "0", "coarse-gpt": "0", "coarse-heard": "8",
          "coarse-latents1": "1", "coarse-both8": "8", "hybrid": "0", "hybrid-heard": "8"}
    assert {model: experiments.trained_on(model) for model in on} == on


@pytest.mark.usefixtures("results_and_runs_here")
def test_rates_are_searched_where_asked_and_fit_the_width(monkeypatch):
    ran = []

    def run(dataset, model, lr, seed, device):
        ran.append((dataset, model, lr, seed))
        return {"best": {"val_nll": abs(float(lr) - 6e-3)}}
    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "score", lambda *_: None)
    monkeypatch.setattr(sys, "argv", "experiments.py speech --search music --only size --seeds 2".split())
    experiments.main()
    assert {d for d, *_ in ran[:8]} == {"music"}
    assert sorted(ran[8:]) == sorted(("speech", f"{model}-width{n}", lr, 0) for model in ("coarse", "coarse-gpt")
                                     for n, lr in ((64, "0.012"), (192, "0.004")))
    ran.clear()
    sys.argv += ["--lr", "3e-4"]                              # given, not searched
    experiments.main()
    assert len(ran) == 4 and {lr for *_, lr, _ in ran} == {"3e-4"}


@pytest.mark.usefixtures("results_and_runs_here")
def test_the_best_evaluation_counts_not_the_last(tmp_path, monkeypatch):
    name = "speech-coarse-lr6e-3-seed0"
    (tmp_path / f"{name}.jsonl").write_text("\n".join([
        '{"codec": "mini", "codec_checksum": "0", "torch": "2", "args": {"dtype": "float32"}}',
        *(json.dumps({"step": step, "val_nll": nll, "seconds": 1.0, "clip_nll": [nll], "clip_targets": [9]})
          for step, nll in ((0, 7.0), (100, 4.0), (200, 5.0)))]))

    def run(words, **_):
        (tmp_path / f"{name}.last.pt").touch()
        return SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    result = experiments.run("speech", "coarse", "6e-3", 0)
    assert result["best"]["step"] == 100 and result["scores"]["0"]["clip_nll"] == [4.0]
    assert result["curve"] == [[0, 7.0], [100, 4.0], [200, 5.0]]


def test_the_bootstrap_weighs_clips_by_their_targets():
    gains = np.tile([0.0, 1.0], (3, 500))
    _, low, high = experiments.bootstrap(gains, 1 + 99 * gains[0])     # those that gain are 100 times as long
    assert 0.95 < low < high


def test_closeness_draws_as_it_is_told_and_says_so(monkeypatch, tmp_path):
    told, wave = [], 0.1 * torch.randn(24_000)

    def generate(model, codec, n_frames, num, **how):
        told.append(how)
        for frame in range(n_frames):
            yield torch.randint(1024, (num, 8, 1)), 0.1 * torch.randn(num, 320)
    monkeypatch.setattr(closeness, "generate", generate)
    monkeypatch.setattr(closeness, "DRAWS", 3)
    monkeypatch.setattr(closeness, "recordings", lambda *_: ([wave], [wave]))
    out, ready = tmp_path / "out.json", NOTEBOOKS.parent / "assets" / "nano-speech.pt"
    for given, drawn in ([], None), (["--top-p", "0.9"], 0.9):
        small = ["--clips", "1", "--seconds", "1", "--seeds", "1", "--temperature", "1:0.5", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["closeness.py", "speech", str(ready), *small, *given])
        closeness.main()
        assert (told[-1]["temperature"], told[-1]["finer_temperature"], told[-1]["top_p"]) == (1, 0.5, drawn)
        row = json.loads(out.read_text())["rows"][-1]
        assert row["top_p"] == drawn and ("top-p 0.9" in row["what"]) == bool(drawn)
        # drawn with replacement, the only clip there is always comes out
        assert row["from_copy_12_draws"] == pytest.approx(closeness.DRAWS * [row["from_copy_12"]], abs=0.1)


def test_closeness_without_what_is_quiet_does_not_hear_a_hiss():
    generator = torch.Generator().manual_seed(0)
    tone = torch.sin(torch.arange(48_000) / 4)
    sets = [[tone + loudness * torch.randn(48_000, generator=generator)] for loudness in (1e-3, 1e-2)]
    loudest = log_mel(tone, window=HANN).max()
    hiss, none = (closeness.frechet(*(closeness.statistics(closeness.sums(waves, floor)) for waves in sets))
                  for floor in (-torch.inf, loudest - 8))
    assert none < 0.001 * hiss


def test_closeness_hears_log_mel_and_its_change():
    wave, lag = 0.1 * torch.randn(24_000), closeness.LAG
    mel = log_mel(wave, window=HANN).double()
    mean, covariance = closeness.statistics(closeness.sums([wave]))
    vectors = torch.cat([mel[:-lag], mel[lag:] - mel[:-lag]], dim=1)
    torch.testing.assert_close(mean, vectors.mean(0))
    torch.testing.assert_close(covariance, torch.cov(vectors.T))


def test_closeness_is_measured_from_the_clips_and_from_what_the_codec_makes_of_them(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw", mock.Mock(side_effect=sample.draw))
    out = tmp_path / "found.json"
    done = run_script(tmp_path, NOTEBOOKS / "closeness.py", ckpt.parent / "clips", ckpt, "--clips", 2, "--seconds",
                      1, "--seeds", 2, "--temperature", "0.9:0.5", "--out", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    copy = rows["validation clips, 8 codebooks decoded"]
    assert copy["from_copy"] == pytest.approx(0, abs=0.01) and copy["distance"] > 1
    assert rows["training clips"]["distance"] < copy["distance"]
    generated = rows["out, temperature 0.9, finer codes 0.5"]
    assert [call.args[1] for call in sample.draw.call_args_list[:8]] == [0.9] + [0.5] * 7
    assert len(set(generated["from_copy_by_seed"])) == 2 and generated["n_codebooks"] == 8
    coarse = rows["out, temperature 0.9, finer codes 0.5, only the coarse code decoded"]
    assert coarse["n_codebooks"] == 1 and coarse["distance"] != generated["distance"]
    assert found["commit"] and found["codec_checksum"]
    assert found["rows"][-1]["what"] in done.out


def test_closeness_compares_the_first_seconds_of_each_clip_by_split(tmp_path):
    for side, n in (("train", 3), ("val", 2)):
        (tmp_path / "in" / side).mkdir(parents=True)
        for i in range(n):
            soundfile.write(tmp_path / "in" / side / f"{i}.wav", noise(1.0 + i, seed=i), 24_000)
    train, val = closeness.recordings(tmp_path / "in", 1.5)
    assert [*map(len, train)] == [24_000, 36_000, 36_000] and [*map(len, val)] == [24_000, 36_000]


def test_closeness_splits_a_folder_as_training_does_when_a_file_cannot_be_read(tmp_path):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.full(24_000, (i + 1) / 10), 24_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / names[split_clips(names).index(True)]).write_bytes(b"not audio")              # the only one held out
    data = prepare(tmp_path, load_codec("mini"), tmp_path.parent / "cache", quiet=True)
    held_out = {clip["name"] for clip in data.meta["clips"] if clip["val"]}
    train, val = closeness.recordings(tmp_path, 1)
    assert {f"{round(wave[0].item() * 10) - 1}.wav" for wave in val} == held_out and len(train) == 5 - len(held_out)


def test_checkpoints_of_two_codecs_are_not_compared(monkeypatch):
    monkeypatch.setattr(closeness, "load", lambda path: (None, SimpleNamespace(checksum=path[0]), None))
    assert list(closeness.load_all(["a1.pt", "a2.pt"])[0]) == ["a1.pt", "a2.pt"]
    with pytest.raises(CodecError, match="different codecs"):
        closeness.load_all(["a1.pt", "b1.pt"])


def test_closeness_refuses_checkpoints_of_different_codecs(ckpt, tmp_path, tiny_codec_file):
    saved = torch.load(tiny_codec_file, weights_only=True)
    saved["weights"] = {key: value * 1.5 for key, value in saved["weights"].items()}
    torch.save(saved, tmp_path / "other.pt")
    other = {"codec": str(tmp_path / "other.pt"), "codec_checksum": load_codec(tmp_path / "other.pt").checksum}
    torch.save(torch.load(ckpt, weights_only=True) | other, tmp_path / "b.pt")
    done = run_script(tmp_path, NOTEBOOKS / "closeness.py", ckpt.parent / "clips", ckpt, tmp_path / "b.pt", "--out",
                      tmp_path / "found.json")
    assert_refused(done, "codes of different codecs")


def test_copying_finds_the_longest_run_that_a_training_clip_holds():
    training = [np.array(clip, np.uint16) for clip in ([1, 2, 3, 4], [300, 6, 7])]
    clips = [np.array(clip, np.uint16) for clip in ([9, 2, 3, 4, 300], [4, 300, 6], [8, 8], [1, 2, 3, 4])]
    assert copying.longest_shared(clips, training) == [3, 2, 0, 4]           # no run spans two training clips
    assert copying.without_repeats(np.array([5, 5, 6, 6, 6, 5])).tolist() == [5, 6, 5]


def test_copying_knows_a_model_that_copies(monkeypatch, tmp_path, capsys):
    wave = 0.1 * torch.randn(300 * 320, generator=torch.Generator().manual_seed(0))
    codes = load_codec("mini").encode(wave[None], 8)[0].T.numpy().astype(np.uint16)                  # (300, 8)
    data = SimpleNamespace(codes=codes, train=np.array([[0, 200]]), val=np.array([[200, 300]]), fingerprint="another")
    monkeypatch.setattr(copying, "prepare", lambda dataset, codec, **mel: data)
    monkeypatch.setattr(copying, "recordings", lambda dataset, seconds: (3 * [wave[:75 * 320]], []))

    def generate(model, codec, n_frames, num, generator):
        for frame in torch.from_numpy(codes[100:100 + n_frames].astype(np.int64)):               # of a training clip
            yield torch.stack([frame[:, None], torch.full((8, 1), 1024)]), None                  # a code of no clip
    monkeypatch.setattr(copying, "generate", generate)
    ready = NOTEBOOKS.parent / "assets" / "nano-speech.pt"
    out = tmp_path / "mine.json"
    argv = ["copying.py", "speech", str(ready), "--clips", "2", "--out", str(out), "--seconds"]
    monkeypatch.setattr(sys, "argv", [*argv, "1"])
    copying.main()
    assert "was trained on other audio" in capsys.readouterr().err
    real, later, generated = json.loads(out.read_text())["rows"]
    assert len(later["longest"]) == 2
    assert generated["longest"] == [len(copying.without_repeats(codes[100:175, 0])), 0] and real["longest"][0] < 5
    assert later["longest"][0] < 5               # of 75: the wave that was trained on, but half a frame later
    monkeypatch.setattr(sys, "argv", [*argv, "0.1"])
    with pytest.raises(SystemExit):              # shorter than any clip that is compared
        copying.main()


@pytest.mark.parametrize("model, rate", [
    ("coarse-heard", "1"), ("nano-recorded-steps1200", "1"), ("nano-gpt-steps1200", "2"),
    ("coarse-gpt-plain", "2"), ("coarse-codes8", "3"), ("nano-codes8-steps1200", "3"), ("nano-both8-steps1200", "6"),
    ("hybrid-heard-steps1200", "5"), ("coarse-width64", "2")])
def test_a_variant_uses_the_rate_of_what_it_varies(model, rate):
    chosen = {"coarse": "1", "coarse-gpt": "2", "coarse-codes8": "3", "hybrid": "4", "hybrid-steps1200": "5",
              "coarse-both8": "6"}
    assert experiments.rate_of(model, chosen) == rate


def test_a_codec_that_has_to_be_made_first_is_named(monkeypatch, tmp_path):
    for folder in ("ROOT", "RESULTS", "RUNS"):
        monkeypatch.setattr(experiments, folder, tmp_path)
    with pytest.raises(RuntimeError, match="no runs/late-.*: make it with python notebooks/refit_codec.py late"):
        experiments.run("speech", "coarse-late", "1.2e-2", 0)


def test_a_codec_fitted_to_nothing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["refit_codec.py", "late", "--data", str(tmp_path / "gone")])
    with pytest.raises(SystemExit, match="^error: no dataset '.*gone'"):
        refit_codec.main()


@pytest.mark.parametrize("first, heard", [("whole", [True, True]), ("waveform", [True, False]),
                                          *((first, [False, True]) for first in ("hann", "late", "plain",
                                                                                 "late-decoder"))])
def test_codebooks_are_fitted_anew_to_what_is_asked_for(tmp_path, monkeypatch, first, heard):
    monkeypatch.setattr(refit_codec, "ROOT", tmp_path)
    monkeypatch.setattr(refit_codec, "load", lambda folders: (folders, [[np.ones(9, np.int16)]] * len(folders)))
    monkeypatch.setattr(refit_codec, "STEPS", 1 if first == "late-decoder" else 35)           # its encoder is late's
    monkeypatch.setattr(refit_codec, "DECODER_STEPS", 3)
    made = []

    def bursts(n, frames):
        return 0.05 * torch.randn(n, frames * 320) * torch.randn(n, frames).exp().repeat_interleave(320, 1)

    def batch(folders, rng, n, n_samples):
        made.append(bursts(4, 300) if n == 256 else bursts(2, 30))
        return made[-1]
    monkeypatch.setattr(refit_codec, "batch", batch)
    monkeypatch.setattr(sys, "argv", ["refit_codec.py", first])
    refit_codec.main()
    codec, mini = load_codec(tmp_path / experiments.REFITTED[first]), load_codec("mini")
    first, _, decoder = first.partition("-")                                      # another decoder only if asked for
    same = [torch.equal(a, b) for a, b in zip(codec.model.decoder.parameters(), mini.model.decoder.parameters())]
    assert sum(same) < 4 if decoder else all(same)                                # so short a training may miss a few
    book = codec.vectors[0]
    assert [bool(book[:, part].std() > 0) for part in (refit_codec.WAVEFORM, train_codec.ENVELOPE)] == heard
    assert (book[:, train_codec.COUNT] == mini.vectors[0][:, train_codec.COUNT]).all()        # how many are heard
    wave = bursts(1, 75)
    assert codec.encode(wave).unique().numel() > 100
    envelopes = {"hann": (HANN, 0.6), "late": (WINDOW, 0.6), "plain": (WINDOW, 0.0)}
    assert len(made) == 1 + refit_codec.STEPS * (first in envelopes) + 3 * bool(decoder)
    if first not in envelopes:
        assert torch.equal(codec.model.encoder(wave[None]), mini.model.encoder(wave[None]))
    elif not decoder:                                                             # the encoder has learnt that one
        latents = codec.model.encoder(wave[None])[:, train_codec.ENVELOPE, 3:]
        missed = {name: (latents - train_codec.Envelope(made[0], *how)(wave)[..., 3:]).square().mean()
                  for name, how in envelopes.items()}
        assert missed[first] == min(missed.values()) < 0.3 * max(missed.values())


def test_a_recording_that_is_not_ours_is_not_kept_in_a_notebook():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in json.loads(path.read_text())["cells"]
             if "REAL_SPEECH" in "".join(cell["source"]) and cell["cell_type"] == "code"]
    assert len(cells) == 1 and not cells[0]["outputs"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, executed):
    done = executed[path].result()
    assert done.returncode == 0, done.stderr[-3000:]
