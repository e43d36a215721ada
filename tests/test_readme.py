"""
python -m pytest tests/test_readme.py

What README.md says can be typed, and its figures and those of results/README.md are what was measured.
"""
import json
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import sample
import train
from model import PRESETS, HybridGPT

ROOT = Path(train.__file__).absolute().parent
README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / "results" / "README.md").read_text()
sys.path.insert(0, str(ROOT / "notebooks"))
import experiments                                                     # noqa: E402


@pytest.mark.parametrize("script", [train, sample])
def test_every_command_is_one_that_the_scripts_understand(script):
    lines = re.findall(rf"^python {script.__name__}\.py (.*)$", README.replace("\\\n", ""), re.M)
    assert len(lines) >= 3
    for line in lines:
        with mock.patch.object(sys, "argv", ["", *shlex.split(line.split("|")[0], comments=True)]):
            script.parse_arguments()


@pytest.mark.parametrize("page", ["README.md", "assets/README.md", "results/README.md"])
def test_every_link_leads_to_something_that_is_there(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", (ROOT / page).read_text()):
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:                                           # as GitHub writes it: small letters, hyphens, no marks
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("script", [train, sample])
def test_help_can_be_printed(script, capsys):
    with mock.patch.object(sys, "argv", ["", "--help"]), pytest.raises(SystemExit) as end:
        script.parse_arguments()
    assert not end.value.code and "--device" in capsys.readouterr().out


SMALL, LARGE = ("coarse-gpt", "coarse", "coarse-heard"), ("gpt-m", "hybrid", "hybrid-heard")
LONG = [f"{model}-steps1200" for model in LARGE]


@pytest.mark.parametrize("dataset, models, name", [
    ("speech", SMALL, "bundled (synthetic) speech"), ("music", SMALL, "bundled music"),
    ("corpus-speech", SMALL, "real speech"), ("corpus-speech", LARGE, "real speech"), ("music", LARGE, "bundled music"),
    ("large-speech", LONG, "three hours of synthetic speech"), ("large-music", LONG, "three hours of synthetic music")])
def test_the_table_shows_what_was_measured(dataset, models, name):
    gpt, hybrid, heard = (experiments.best_runs(dataset, model) for model in models)
    tokens_only = np.mean([run["best"]["val_nll"] for run in gpt])
    gains = experiments.gain(hybrid, gpt, "0"), experiments.gain(heard, gpt, "8")
    assert all(len(gain.by_seed) == 3 and min(*gain.by_seed, gain.low) > 0 for gain in gains)
    cells = " | ".join(f"**{gain.mean:.2f}**" for gain in gains)
    assert f"| {name} | {'1.2' if models is SMALL else '3.9'} | {tokens_only:.2f} | {cells} |" in README


def test_the_presets_are_of_the_size_that_is_stated():
    for name, config in PRESETS.items():
        line = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        assert line.split(" | ")[3] == f"{HybridGPT(config).n_params() / 1e6:.2g}", name


@pytest.mark.parametrize("dataset", ["speech", "music"])
def test_the_table_of_what_more_audio_brings_shows_what_was_measured(dataset):
    for what, small, name in (("the mel that the codes decode to", "coarse-heard", "nano"),
                              ("the codes as embeddings", "coarse-codes8", "nano-codes8"),
                              ("the codec's vectors", "coarse-latents8", "nano-latents8")):
        cells = []
        for place, model, twin in ((dataset, small, "coarse-gpt"),
                                   (f"large-{dataset}", f"{name}-steps1200", "nano-gpt-steps1200"),
                                   (f"larger-{dataset}", f"{name}-steps2400", "nano-gpt-steps2400")):
            runs, twins = experiments.best_runs(place, model), experiments.best_runs(place, twin)
            assert len(runs) in (1, 3)
            gain = experiments.gain(runs, twins, experiments.trained_on(model)).mean
            cells.append(f"{gain:.2f}" + " (one)" * (len(runs) == 1))
        assert f"| {dataset}: {what} | {' | '.join(cells)} |" in RESULTS


@pytest.mark.parametrize("dataset", ["speech", "music"])
def test_the_table_of_whole_frames_shows_what_was_measured(dataset):
    for what, name in (("tokens only", "nano-gpt"), ("the mel that the codes decode to", "nano"),
                       ("the codes as embeddings", "nano-codes8"), ("the codec's vectors", "nano-latents8")):
        cells = []
        for place, steps in ((dataset, ""), (f"large-{dataset}", "-steps1200"), (f"larger-{dataset}", "-steps2400")):
            tried = [[experiments.read(file) for file in experiments.RESULTS.glob(f"{place}-{name}{steps}-lr{lr}-*")]
                     for lr in ("6e-3", "1.2e-2")]
            seeds = max(map(len, tried))
            nll = [experiments.frame_nll(runs) for runs in tried if len(runs) == seeds]
            cells.append(f"{min(nll):.2f}" + " (one)" * (seeds == 1))
        assert f"| {dataset}: {what} | {' | '.join(cells)} |" in RESULTS


@pytest.mark.parametrize("what, music, speech", [
    ("`nano-gpt`, tokens only", "nano-gpt-steps1200-lr6e-3", "nano-gpt-steps1200-lr1.2e-2"),
    ("`nano`, trained on the mel of recordings", *["nano-recorded-steps1200-lr1.2e-2"] * 2),
    ("`nano`, unchanged", "nano-steps1200-lr6e-3", "nano-steps1200-lr1.2e-2"),
    ("`nano --own-details`", "nano-own-steps1200-lr6e-3", "nano-own-steps1200-lr1.2e-2"),
    ("`nano --latents`", "nano-latents8-steps1200-lr6e-3", "nano-latents8-steps1200-lr1.2e-2")])
def test_the_table_of_what_comes_out_shows_what_was_measured(what, music, speech):
    cells = []
    for dataset, model, finer, distance in (("music", music, 1, "from_copy"), ("music", music, 1, "from_copy_12"),
                                            ("speech", speech, 1, "from_copy"), ("speech", speech, 0.7, "from_copy")):
        rows = [row for path in experiments.RESULTS.glob(f"closeness-{dataset}*.json")
                for row in json.loads(path.read_text())["rows"]
                if f"{dataset}-{model}-" in row["what"] and not row.get("top_p") and row["n_codebooks"] == 8
                and (row["temperature"], row["finer_temperature"]) == (1, finer)]
        mean = np.mean([row[distance] for row in rows]) if rows else None
        digits = 1 if dataset == "speech" and mean < 20 else 0
        cells.append(f"{mean:.{digits}f}" + {1: " (one)", 2: " (two)"}.get(len(rows), "") if rows else "–")
    line = next(line for line in RESULTS.splitlines() if line.startswith(f"| {what}"))
    assert line.endswith(f"| {' | '.join(cells)} |")
