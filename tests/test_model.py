"""
python -m pytest tests/test_model.py

The model: its size, its loss, what each prediction may depend on, its cache, its checkpoints.
"""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from conftest import Malicious
from mel import HOP, log_mel
from model import (IGNORE, PRESETS, START, Attention, Block, CheckpointError, Config, HybridGPT, KVCache,
                   load_checkpoint, rotary_angles, rotate, to_checkpoint, write_whole)
from tokens import load_codec

HYBRID = Config(n_layer=2, n_head=2, n_embd=32, n_inner=64, n_mel_embd=32, context=16)
TOKENS, MEL = replace(HYBRID, use_mel=False), replace(HYBRID, use_codes=False)
DEEP = replace(HYBRID, n_codebooks=4, n_depth_embd=16)
READER, ADDER = replace(HYBRID, n_input_codebooks=3), replace(HYBRID, fuse="add")
EACH = pytest.mark.parametrize("config", [HYBRID, TOKENS, MEL, DEEP, READER, ADDER],
                               ids=["hybrid", "token-only", "mel-only", "deep", "reader", "adder"])


def make(config):
    """A model whose predictions depend strongly on what it sees: after initialisation attention is nearly flat."""
    torch.manual_seed(0)
    model = HybridGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.std() < 0.1 else 1)
    return model


def inputs(T, B=2, seed=1):
    """Random codes (B, 4, T) that begin with START, mel (B, T, 80), targets (B, 4, T)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1024, (B, 4, T), generator=generator)
    codes[:, 0, 0] = START
    return (codes, torch.randn(B, T, 80, generator=generator) * 3 - 5,
            torch.randint(1024, (B, 4, T), generator=generator))


@torch.no_grad()
def logits_of(model, codes, mel):
    return model(codes, mel)[0]


# ----------------------------------------------------------------------------- size and beginning

def test_presets_have_the_sizes_of_the_paper():
    """The depth blocks not counted: only `nano` and its twin have them."""
    n = {name: HybridGPT(replace(config, n_codebooks=1)).n_params() for name, config in PRESETS.items()}
    assert [name for name, config in PRESETS.items() if config.n_codebooks > 1] == ["nano", "nano-gpt"]
    assert abs(n["gpt-s"] / 3.7e6 - 1) < 0.05
    assert abs(n["hybrid"] / 4.0e6 - 1) < 0.05
    assert abs(n["gpt-l"] / 40e6 - 1) < 0.05
    assert abs(n["gpt-m"] / n["hybrid"] - 1) < 0.01
    assert abs(n["nano-gpt"] / n["nano"] - 1) < 0.01
    assert n["nano"] < 1.5e6


def test_presets_differ_between_twins_in_the_mel_branch_and_the_mlp_only():
    for hybrid, twin in (("hybrid", "gpt-m"), ("nano", "nano-gpt")):
        hybrid, twin = PRESETS[hybrid], PRESETS[twin]
        assert replace(twin, use_mel=True, n_inner=hybrid.n_inner, n_mel_embd=hybrid.n_mel_embd) == hybrid


@pytest.mark.parametrize("wrong, words", [
    *(({field: size}, "at least 1") for size in (0, -4) for field in (
        "n_layer", "n_head", "n_embd", "n_inner", "n_mel_embd", "n_depth_embd", "n_input_codebooks", "n_codebooks",
        "context")),
    *(({field: -1}, "at least 0") for field in ("n_mel_layer", "n_depth_layer", "mel_noise", "mel_delay")),
    (dict(mel_noise=float("nan")), "at least 0"), (dict(fuse="glue"), "glue"),
    (dict(use_codes=False, use_mel=False), "use_codes or use_mel"),
    (dict(use_codes=False, n_input_codebooks=2), "n_input_codebooks needs use_codes"),
    *((dict(use_mel=False, **sizes), "even head size") for sizes in (dict(n_head=3), dict(n_embd=30, n_head=2))),
    (dict(n_mel_embd=40), "multiples"), (dict(n_codebooks=2, n_depth_embd=40), "multiples")])
def test_a_config_that_cannot_work_is_a_value_error(wrong, words):
    with pytest.raises(ValueError, match=words):
        HybridGPT(replace(HYBRID, **wrong))


def test_only_matrices_are_drawn_at_random(monkeypatch):
    class Gained(Block):                                # a fork's block, with a norm that has a gain
        def __init__(self, n_embd, *sizes):
            super().__init__(n_embd, *sizes)
            self.norm = torch.nn.RMSNorm(n_embd)
    monkeypatch.setattr("model.Block", Gained)
    assert all((block.norm.weight == 1).all() for block in HybridGPT(HYBRID).blocks)


def test_what_is_added_to_the_stream_begins_the_smaller_the_deeper_the_stack():
    model = HybridGPT(replace(HYBRID, n_layer=8))
    for block in [*model.blocks, *model.mel_blocks]:
        for layer in (block.attention.proj, block.proj):
            assert layer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.15)
        for layer in (block.attention.qkv, block.up, model.head):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)


@EACH
def test_what_enters_the_stack_has_variance_one_whichever_branches_there_are(config):
    model = HybridGPT(replace(config, n_embd=128, n_inner=256, n_mel_embd=128, n_depth_embd=64, context=64))
    entered = {}
    for name in ("blocks", "mel_blocks", "depth_blocks"):
        for block in getattr(model, name, [])[:1]:
            block.register_forward_pre_hook(lambda _, inputs, name=name: entered.update({name: inputs[0].var()}))
    codes = torch.randint(1024, (4, 4, 64))
    model(codes, torch.randn(4, 64, 80), codes)
    assert 0.85 < entered["blocks"] < 1.15 and 0.8 < entered.get("mel_blocks", 1) < 1.2
    assert 0.85 < entered.get("depth_blocks", 1) < 1.15                              # the state; a code adds little


@EACH
def test_an_untrained_model_knows_nothing(config):
    torch.manual_seed(0)
    logits, losses = HybridGPT(config)(*inputs(16, B=8))
    assert (losses - 6.931).abs().max() < 0.1                 # ln 1024


def test_a_model_that_reads_finer_codes_begins_as_one_that_does_not():
    model = HybridGPT(READER).eval()
    codes = torch.randint(1024, (2, 3, 20))
    others = torch.cat([codes[:, :1], codes[:, 1:].flip(0)], dim=1)
    logits, changed = (model(c, torch.zeros(2, 20, 80))[0] for c in (codes, others))
    assert 0 < (logits - changed).std() < 0.1 * logits.std()


# ----------------------------------------------------------------------------- loss and gradients

@EACH
def test_the_loss_is_the_mean_cross_entropy_over_targets_that_count(config):
    model, (codes, mel, targets) = make(config), inputs(12)
    targets[0, :, 7:] = IGNORE
    with torch.no_grad():
        logits, losses = model(codes, mel, targets)
    assert logits.shape == (2, 12, 1024) and losses.shape == (config.n_codebooks,)
    by_hand = [-logits[b, t].log_softmax(-1)[targets[b, 0, t]] for b in range(2) for t in range(12)
               if targets[b, 0, t] != IGNORE]
    assert len(by_hand) == 19
    assert abs(losses[0] - sum(by_hand) / 19) < 1e-5


def test_twenty_steps_on_one_batch_lower_the_loss():
    torch.manual_seed(0)
    model, batch = HybridGPT(HYBRID), inputs(16, B=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(*batch)[1].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2


@EACH
def test_every_parameter_gets_a_gradient(config):
    model = make(config)
    model(*inputs(12))[1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for name, p in model.named_parameters():
        if name in ("finer_embedding", "depth_embedding", "depth_head"):          # each codebook has its own
            assert (p.grad.flatten(1).abs().sum(1) > 0).all(), name


def test_gradients_are_the_same_bit_for_bit_with_two_threads():
    """Or a resumed run could not be the uninterrupted one: index_put_, which indexing with a tensor leads to in the
    backward pass, adds up in the order in which threads happen to come."""
    model, threads = HybridGPT(replace(PRESETS["nano"], n_input_codebooks=8)), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    codes, targets = torch.randint(8, (2, 8, 8, 256), generator=generator)        # few codes: many sums collide
    mel = torch.randn(8, 256, 80, generator=generator)
    runs = []
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            model.zero_grad()
            model(codes, mel, targets)[1].sum().backward()
            runs.append({name: p.grad.clone() for name, p in model.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    assert [name for name in runs[0] if any(not torch.equal(run[name], runs[0][name]) for run in runs)] == []


@torch.no_grad()
@pytest.mark.parametrize("name, coarse, finer", [("nano-speech", 3.339, 5.031), ("nano-gpt-speech", 3.523, 5.085)])
def test_a_shipped_model_predicts_a_clip_as_well_as_it_always_did(name, coarse, finer):
    """Nothing in the network may change unnoticed: its weights would still load, and predict worse."""
    assets = Path(__file__).parent.parent / "assets"
    model, codec = load_checkpoint(assets / f"{name}.pt")[0], load_codec("mini")
    clip = sorted((assets / "speech" / "val").glob("*.ogg"))[0]
    targets = codec.encode(torch.from_numpy(soundfile.read(clip, dtype="float32")[0])[None, :256 * HOP])  # (1, 8, 256)
    codes, mel = targets.roll(1, dims=-1), log_mel(codec.decode(targets)).roll(1, dims=1)
    codes[:, 0, 0] = START
    losses = model(codes, mel, targets)[1]
    assert losses[0].item() == pytest.approx(coarse, abs=0.02)
    assert losses[1:].mean().item() == pytest.approx(finer, abs=0.02)


# ----------------------------------------------------------------------------- dropout and noise

def test_every_block_has_the_dropout_asked_for():
    c = replace(DEEP, dropout=0.3)
    rates = [module.p for module in HybridGPT(c).modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.3] * (c.n_layer + c.n_mel_layer + c.n_depth_layer)


@torch.no_grad()
@pytest.mark.parametrize("silenced", [".attention.proj.weight", ".proj.weight"], ids=["MLPs", "attention"])
def test_both_halves_of_a_block_have_dropout(silenced):
    model, (codes, mel, _) = make(replace(HYBRID, dropout=0.5)).train(), inputs(12)
    for name, p in model.named_parameters():
        if name.endswith(silenced) and ("attention" in name) == ("attention" in silenced):
            p.zero_()                                         # what is left is dropped by the other half
    assert not torch.equal(model(codes, mel)[0], model(codes, mel)[0])


def test_dropout_acts_in_training_and_not_in_evaluation():
    model, (codes, mel, _) = make(replace(HYBRID, dropout=0.5)), inputs(12)
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, codes, mel))
    assert torch.equal(logits_of(model, codes, mel), logits_of(make(HYBRID), codes, mel))
    model.train()
    assert not torch.equal(logits_of(model, codes, mel), logits_of(model, codes, mel))


@torch.no_grad()
def test_noise_on_the_mel_acts_in_training_and_not_in_evaluation():
    codes, mel, _ = inputs(20)
    noisy, plain = make(replace(HYBRID, mel_noise=0.5)), make(HYBRID)
    assert torch.equal(logits_of(noisy, codes, mel), logits_of(plain, codes, mel))
    assert not torch.equal(logits_of(noisy.train(), codes, mel), logits_of(plain.train(), codes, mel))
    assert torch.equal(logits_of(noisy, codes, mel)[:, 0], logits_of(plain, codes, mel)[:, 0])       # none at START


@torch.no_grad()
def test_the_noise_on_the_mel_is_as_loud_as_asked():
    model, heard = make(replace(HYBRID, mel_noise=0.5)), []
    model.mel_in.register_forward_pre_hook(lambda _, arguments: heard.append(*arguments))
    codes, mel, _ = inputs(16, B=8)
    model(codes, mel)
    model.train()(codes, mel)
    assert (heard[1] - heard[0])[:, 1:].std().item() == pytest.approx(0.5, rel=0.05)


@torch.no_grad()
def test_a_delayed_mel_is_the_whitened_mel_some_frames_late():
    late, model = make(replace(HYBRID, mel_delay=3)), make(HYBRID)
    codes, mel, _ = inputs(16)
    for m in (late, model):
        m.mel_mean.fill_(0.5)
    shifted = torch.cat([model.mel_mean.expand(*mel[:, :3].shape), mel[:, :-3]], dim=1)    # the mean: zeros, whitened
    shifted[:, 3] = model.mel_mean                            # what stood at START is not heard later, either
    torch.testing.assert_close(logits_of(late, codes, mel), logits_of(model, codes, shifted))
    assert not torch.equal(logits_of(late, codes, mel), logits_of(model, codes, mel))
    with pytest.raises(ValueError, match="no mel_delay"):     # one step at a time it would hear nothing
        late.backbone(codes[..., :1], mel[:, :1], KVCache(16))


# ----------------------------------------------------------------------------- the finer codes

def test_the_coarse_code_is_predicted_as_without_finer_ones():
    deep, flat = make(DEEP), make(HYBRID)
    flat.load_state_dict({name: p for name, p in deep.state_dict().items() if not name.startswith("depth")})
    codes, mel, targets = inputs(12)
    with torch.no_grad():
        (logits, losses), (flat_logits, flat_losses) = deep(codes, mel, targets), flat(codes, mel, targets)
    assert torch.equal(logits, flat_logits) and losses[0] == flat_losses[0] and len(flat_losses) == 1


@torch.no_grad()
def test_a_finer_code_depends_on_its_frame_and_the_coarser_codes_of_it_and_on_nothing_else():
    model, (codes, mel, targets) = make(DEEP), inputs(12)
    x = model.backbone(codes, mel)                            # (2, 12, n_embd)
    x, chosen = x[:, 5], targets[:, :3, 5]                    # one frame of either clip
    logits = model.finer_logits(x, chosen)
    assert logits.shape == (2, 3, 1024)
    for k in range(3):
        other = chosen.clone()
        other[:, k] = (other[:, k] + 1) % 1024
        changed = model.finer_logits(x, other)
        assert torch.equal(changed[:, :k], logits[:, :k])
        assert all((changed[:, j] - logits[:, j]).abs().max() > 1e-3 for j in range(k, 3))
        torch.testing.assert_close(model.finer_logits(x, chosen[:, :k + 1]), logits[:, :k + 1])   # a prefix is enough
    assert (model.finer_logits(x.flip(0), chosen) - logits).abs().max() > 1e-3
    torch.testing.assert_close(model.finer_logits(x[1:], chosen[1:]), logits[1:])
    cache = KVCache(4)                                        # one code at a time, as in sampling
    steps = [model.finer_logits(x, chosen[:, k:k + 1], cache) for k in range(3)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits)


@torch.no_grad()
def test_finer_codes_are_drawn_from_the_logits_that_all_coarser_codes_of_the_frame_give():
    model, (codes, mel, _), seen = make(DEEP), inputs(12), []
    x = model.backbone(codes, mel)[:, 5]                      # (2, n_embd)
    drawn = model.draw_finer(x, codes[:, 0, 6], lambda logits: seen.append(logits) or torch.randint(1024, (2,)))
    assert drawn.shape == (2, 4) and torch.equal(drawn[:, 0], codes[:, 0, 6])
    torch.testing.assert_close(torch.stack(seen, dim=1), model.finer_logits(x, drawn[:, :-1]))


@torch.no_grad()
def test_the_losses_of_finer_codebooks_are_what_their_logits_say():
    model, (codes, mel, targets) = make(DEEP), inputs(12)
    targets[0, :, 7:] = IGNORE
    _, losses = model(codes, mel, targets)
    x = model.backbone(codes, mel)
    for k in (1, 2, 3):
        by_hand = [-model.finer_logits(x[b, t:t + 1], targets[b:b + 1, :k, t])[0, -1].log_softmax(-1)[targets[b, k, t]]
                   for b in range(2) for t in range(12) if targets[b, k, t] != IGNORE]
        assert len(by_hand) == 19 and abs(losses[k] - sum(by_hand) / 19) < 1e-5


@torch.no_grad()
def test_some_frames_alone_can_teach_the_finer_codes():
    model, (codes, mel, targets) = make(DEEP), inputs(20)
    some = torch.arange(3, 20, 8)
    _, everywhere = model(codes, mel, targets)
    _, losses = model(codes, mel, targets, depth_frames=some)
    assert losses[0] == everywhere[0]                         # the coarse code learns from all of them
    thinned = targets.clone()
    thinned[:, 1:] = IGNORE
    thinned[:, 1:, some] = targets[:, 1:, some]
    for k in (1, 2, 3):
        shown = torch.where(torch.arange(4)[:, None] < k, targets, thinned)
        assert abs(losses[k] - model(codes, mel, shown)[1][k]) < 1e-5
    targets[:, :, 5:] = IGNORE                                # clips that end before any of those frames
    assert (model(codes, mel, targets, depth_frames=torch.arange(7, 20, 8))[1][1:] == 0).all()


def test_a_context_shorter_than_the_codes_of_a_frame_works():
    model = HybridGPT(replace(PRESETS["nano"], context=2))
    codes, mel = torch.randint(1024, (1, 8, 2)), torch.randn(1, 2, 80)
    assert model(codes, mel, codes)[1].isfinite().all()


# ----------------------------------------------------------------------------- causality

@EACH
@pytest.mark.parametrize("T", [16, 40])
def test_predictions_do_not_depend_on_later_inputs(config, T):
    model, (codes, mel, _), (codes2, mel2, _) = make(config), inputs(T), inputs(T, seed=2)
    before = logits_of(model, codes, mel)
    for t in (0, 5, 14, T - 2):
        changed = logits_of(model, torch.cat([codes[..., :t + 1], codes2[..., t + 1:]], dim=-1),
                            torch.cat([mel[:, :t + 1], mel2[:, t + 1:]], dim=1))
        assert torch.equal(changed[:, :t + 1], before[:, :t + 1])
        assert not torch.allclose(changed[:, t + 1], before[:, t + 1])            # and do on their own


def test_no_prediction_depends_on_audio_of_the_frame_it_predicts_or_later(tiny_codec):
    """From samples to logits: codec, spectrogram, the shift by one frame, and the model."""
    n_frames, model = 24, make(HYBRID)

    def predictions(wave):                                    # (N,) -> (T, 1024); row t predicts code t
        codes = tiny_codec.encode(wave[None], n_codebooks=1)
        codes = torch.cat([torch.full((1, 1, 1), START), codes[..., :-1]], dim=-1)
        mel = torch.cat([torch.zeros(1, 80), log_mel(wave)[:-1]])
        return logits_of(model, codes, mel[None])[0]
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(n_frames * HOP, generator=generator) * 0.3
    before = predictions(wave)
    for t in (0, 1, 2, 11, 21):
        later = wave.clone()                                  # frame t + 1 and all after it sound different
        later[(t + 1) * HOP:] = torch.randn(len(wave) - (t + 1) * HOP, generator=generator)
        after = predictions(later)
        torch.testing.assert_close(after[:t + 2], before[:t + 2], rtol=1e-4, atol=1e-4)
        assert (after[t + 2] - before[t + 2]).abs().max() > 1e-2                  # it shows in the very next one
        earlier = wave.clone()
        earlier[(t + 1) * HOP - 40:(t + 1) * HOP] *= -2       # the end of frame t
        assert (predictions(earlier)[t + 1] - before[t + 1]).abs().max() > 1e-3


def test_predictions_do_not_depend_on_other_rows_of_the_batch():
    model, (codes, mel, _), (codes2, mel2, _) = make(HYBRID), inputs(12), inputs(12, seed=2)
    codes2[0], mel2[0] = codes[0], mel[0]
    torch.testing.assert_close(logits_of(model, codes, mel)[0], logits_of(model, codes2, mel2)[0])


# ----------------------------------------------------------------------------- the branches

def test_a_token_only_model_never_looks_at_the_mel():
    model, (codes, mel, _) = make(TOKENS), inputs(12)
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, codes, None))
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, codes, mel * torch.nan))


def test_a_mel_only_model_looks_at_no_code_but_start():
    model, (codes, mel, _), (codes2, _, _) = make(MEL), inputs(12), inputs(12, seed=2)
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, codes2, mel))
    codes2[:, :, 5] = START
    assert not torch.allclose(logits_of(model, codes, mel)[:, 5], logits_of(model, codes2, mel)[:, 5])
    assert logits_of(model, codes, mel)[:, 0].std() > 0.01    # the first code of a clip can be learnt, too


def test_finer_codebooks_are_not_read_unless_asked_for():
    model, (codes, mel, _) = make(HYBRID), inputs(12)
    other = torch.cat([codes[:, :1], torch.randint(1024, (2, 7, 12))], dim=1)
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, other, mel))
    assert torch.equal(logits_of(model, codes, mel), logits_of(model, codes[:, :1], mel))


def test_a_reader_of_three_codebooks_reads_three_but_for_the_start():
    model, (codes, mel, _) = make(READER), inputs(12)
    before = logits_of(model, codes, mel)
    for k in (1, 2, 3):
        other = codes.clone()
        other[:, k, 0] = (codes[:, k, 0] + 1) % 1024          # nothing stands below START
        assert torch.equal(logits_of(model, other, mel), before)
        other[:, k, 5] = (codes[:, k, 5] + 1) % 1024
        moved = (logits_of(model, other, mel) - before).abs().amax((0, 2)) > 0
        assert moved.tolist() == [k < 3 and t >= 5 for t in range(12)]


def test_a_hybrid_looks_at_both():
    model, (codes, mel, _), (codes2, mel2, _) = make(HYBRID), inputs(12), inputs(12, seed=2)
    assert not torch.allclose(logits_of(model, codes, mel)[:, 1:], logits_of(model, codes2, mel)[:, 1:])
    assert not torch.allclose(logits_of(model, codes, mel)[:, 1:], logits_of(model, codes, mel2)[:, 1:])


@pytest.mark.parametrize("config", [HYBRID, MEL], ids=["hybrid", "mel-only"])
def test_the_mel_at_start_is_ignored_whatever_it_holds(config):
    model, (codes, mel, _) = make(config), inputs(12)
    before = logits_of(model, codes, mel)
    for value in (7.0, -100.0):
        mel[:, 0] = value
        assert torch.equal(logits_of(model, codes, mel), before)
    mel[:, 1] = value
    assert not torch.equal(logits_of(model, codes, mel), before)


def some_mel(n=4000):
    """Frames like log-mel's: a few strong directions, far from zero, (n, 80)."""
    strength = 10 ** torch.linspace(0.5, -1.5, 80)
    return torch.randn(n, 80) * strength @ torch.linalg.qr(torch.randn(80, 80))[0] - 5


def test_whitened_bands_are_uncorrelated_and_none_is_louder_than_the_others():
    model, mel = make(HYBRID), some_mel()
    model.set_mel_statistics(mel.mean(0), torch.cov(mel.T))
    covariance = torch.cov(((mel - model.mel_mean) @ model.mel_whitening).T)
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-3
    assert variances.mean().item() == pytest.approx(1, abs=1e-3) and variances.max() < 2
    before = torch.linalg.eigvalsh(torch.cov(mel.T))          # ascending, as the components are
    expected = before / (before + 0.01 * before.mean())
    torch.testing.assert_close(variances, expected / expected.mean(), rtol=0.02, atol=1e-4)


def test_whitening_does_not_blow_up_what_never_moves():
    model, mel = make(HYBRID), some_mel()
    mel[:, 7] = -11.5
    model.set_mel_statistics(mel.mean(0), torch.cov(mel.T))
    assert model.mel_whitening.isfinite().all() and ((mel - model.mel_mean) @ model.mel_whitening).abs().max() < 10
    mel[:, 7] += 0.01                                         # a hundredth of a nat where there was nothing
    assert ((mel - model.mel_mean) @ model.mel_whitening).abs().max() < 10


def test_whitening_is_as_exact_in_bfloat16():
    model, (codes, mel, _), heard = make(HYBRID), inputs(12), []
    frames = some_mel()
    model.set_mel_statistics(frames.mean(0), torch.cov(frames.T))
    model.mel_in.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0]))
    logits_of(model, codes, mel)
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, codes, mel)
    assert torch.equal(*heard)


@EACH
def test_the_residual_stream_stays_float32_in_bfloat16(config):
    model, (codes, mel, targets), entered = make(config), inputs(12), set()
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, arguments: entered.add(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(codes, mel, targets)
    assert entered == {torch.float32}


# ----------------------------------------------------------------------------- positions, band, cache

@EACH
def test_one_step_at_a_time_equals_the_whole_up_to_and_beyond_the_context(config):
    model, (codes, mel, _), cache = make(config), inputs(4 * 16 + 3), KVCache(16)
    whole = logits_of(model, codes, mel)
    with torch.no_grad():
        steps = [model.head(model.backbone(codes[..., t:t + 1], mel[:, t:t + 1], cache)) for t in range(whole.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:, 20], logits_of(model, codes[..., 3:], mel[:, 3:])[:, 17])  # history matters
    with pytest.raises(ValueError, match="one position at a time, not 2"):
        model.backbone(codes[..., :2], mel[:, :2], cache)


@EACH
def test_nothing_older_than_the_band_influences_a_prediction(config):
    layers = config.n_layer + config.n_mel_layer * config.use_mel
    reach = layers * (config.context - 1)
    T = reach + 12
    model, (codes, mel, _), (codes2, mel2, _) = make(config), inputs(T), inputs(T, seed=2)
    before = logits_of(model, codes, mel)
    old = T - 1 - reach                                       # positions [0, old) are out of the last one's reach
    changed = logits_of(model, torch.cat([codes2[..., :old], codes[..., old:]], dim=-1),
                        torch.cat([mel2[:, :old], mel[:, old:]], dim=1))
    torch.testing.assert_close(changed[:, -1], before[:, -1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed[:, old], before[:, old], rtol=1e-5, atol=1e-5)


def test_one_layer_sees_exactly_context_positions():
    model, (codes, _, _) = make(replace(TOKENS, n_layer=1)), inputs(40)
    before = logits_of(model, codes, None)
    for back, seen in ((15, True), (16, False)):
        changed = codes.clone()
        changed[..., 39 - back] = (changed[..., 39 - back] + 1) % 1024
        assert torch.equal(logits_of(model, changed, None)[:, 39], before[:, 39]) is not seen


def test_attention_depends_on_relative_positions_only():
    torch.manual_seed(0)
    x, attention = torch.randn(2, 12, 32), Attention(32, 16)
    with torch.no_grad():
        near, far = (attention(x, rotary_angles(start, 12, 16)) for start in (0, 10_000_000))
        shuffled = attention(x, rotary_angles(0, 12, 16)[:, torch.randperm(12)])
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, shuffled, rtol=1e-3, atol=1e-3)


def test_rotation_keeps_lengths_and_turns_position_zero_not_at_all():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 16)
    turned = rotate(x, rotary_angles(0, 12, 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.allclose(turned[:, :, 1], x[:, :, 1])


# ----------------------------------------------------------------------------- checkpoints

def test_mel_statistics_survive_a_checkpoint(tmp_path):
    model, (codes, mel, _) = make(HYBRID), inputs(12)
    before = logits_of(model, codes, mel)
    frames = some_mel()
    mean, covariance = frames.mean(0), torch.cov(frames.T)
    model.set_mel_statistics(mean.tolist(), covariance.numpy())
    assert not torch.allclose(logits_of(model, codes, mel), before)
    torch.save(to_checkpoint(model, step=3), tmp_path / "m.pt")
    again, checkpoint = load_checkpoint(tmp_path / "m.pt")
    assert torch.equal(again.mel_whitening, model.mel_whitening) and checkpoint["step"] == 3
    assert torch.equal(logits_of(again, codes, mel), logits_of(model, codes, mel))
    HybridGPT(TOKENS).set_mel_statistics(mean, covariance)    # nothing to set, and no error


def test_a_checkpoint_that_cannot_be_used_is_one_clear_line_and_runs_no_code(tmp_path):
    model = HybridGPT(HYBRID)
    torch.save(to_checkpoint(model), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    assert load_checkpoint(tmp_path / "good.pt")[0].training is False
    (tmp_path / "truncated.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "beginning.pt").write_bytes(good[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({**to_checkpoint(model), "format": "whisper-gpt-0"}, tmp_path / "version.pt")
    torch.save({**to_checkpoint(model), "model": HybridGPT(TOKENS).state_dict()}, tmp_path / "misfit.pt")
    torch.save({**to_checkpoint(model), "extra": Malicious(tmp_path / "ran")}, tmp_path / "malicious.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("absent", "truncated", "beginning", "empty", "text", "foreign", "tensor", "version", "misfit",
                 "malicious", "folder"):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(caught.value) and "\n" not in str(caught.value)
        assert ("mel_in.weight" in str(caught.value)) == (name == "misfit")       # says what does not fit
        assert ("cannot read" in str(caught.value)) == (name == "folder")         # training anew would not help
    assert not (tmp_path / "ran").exists()


def test_what_is_synced_is_the_whole_file(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file)))
    write_whole(tmp_path / "a", b"a line")
    assert sizes == [6] and (tmp_path / "a").read_bytes() == b"a line"


def test_a_link_to_a_checkpoint_on_another_disk_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.pt").symlink_to(tmp_path / "disk" / "out.pt")
    write_whole(tmp_path / "out.pt", b"weights")
    assert (tmp_path / "out.pt").is_symlink() and (tmp_path / "disk" / "out.pt").read_bytes() == b"weights"
