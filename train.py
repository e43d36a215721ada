"""
train.py: the training loop, on one GPU or on the CPU, or on several GPUs.

    python train.py --dataset speech                        a hybrid on the bundled speech -> out.pt
    python train.py --dataset speech --model nano-gpt --out gpt.pt        its token-only twin, same batches
    python train.py --dataset ~/recordings --out mine.pt    your own folder of audio
    python train.py --resume                                go on after an interruption, from out.last.pt
    python train.py --eval out.pt                           score a checkpoint, train nothing
    torchrun --nproc_per_node=8 train.py --dataset ...      each batch divided among eight GPUs

It writes out.pt, the best model so far by validation NLL; out.last.pt, the whole state; and out.jsonl, every figure
that was printed, and each clip's NLL. Every evaluation covers the whole validation split in fixed order, so all can be
compared.

Read first: `evaluate`, `own_details` and, in `main`, "the loop". The rest is options, interruptions and errors.
"""
import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from corpora import CORPORA, DISK_FULL
from data import BUNDLED, MEL_OPTIONS, DataError, check_mel, prepare
from mel import N_MELS, WINDOW, log_mel
from model import (CODEBOOK_SIZE, IGNORE, PRESETS, CheckpointError, Config, HybridGPT,
                   load_checkpoint, save, to_checkpoint)
from tokens import CodecError, load_codec

# A step learns the coarse code of every frame, but the finer codes of every eighth only, as there are K - 1 of them,
# and each costs a softmax over 1024, too (Sesame's CSM takes a random sixteenth: compute amortisation)
DEPTH_EVERY = 8

# To the depth blocks each frame is a sequence, and CUDA's fused attention takes at most this many at once
MOST_FRAMES = 65_535

# torchrun sets all three; a cluster's scheduler may set some of them for its own purposes
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)
MASTER = RANK == 0                   # this process evaluates, prints and writes


# ----------------------------------------------------------------------------- what a step and an evaluation compute

@torch.no_grad()
def evaluate(model, data, batch_size=32, autocast=contextlib.nullcontext()):
    """Score the coarse code over the whole validation split, each target once (see Dataset.validation).

    Returns {"val_nll" in nats a code, "val_ppl", "val_acc", "val_nll_finer" (a list, codebooks 2 to K), "clip_nll" and
    "clip_targets" (for a bootstrap: each clip's mean NLL and number of targets)}.
    """
    was_training = model.training
    model.eval()
    device, c = next(model.parameters()).device, model.config
    batch_size = max(1, min(batch_size, MOST_FRAMES // c.context))
    sums, counts = np.zeros(len(data.val)), np.diff(data.val)[:, 0]               # every frame is a target once
    correct, finer = 0, np.zeros(c.n_codebooks - 1)
    for codes, mel, targets, clip in data.validation(c.context, batch_size, c.n_used_codebooks):
        targets = targets.to(device)
        with autocast:
            logits, losses = model(codes.to(device), mel.to(device), targets)
        coarse = targets[:, 0]                                                    # (B, T)
        row_nll = F.cross_entropy(logits.float().transpose(1, 2), coarse, ignore_index=IGNORE, reduction="none").sum(1)
        np.add.at(sums, clip.numpy(), row_nll.cpu().double().numpy())             # (B,) nats; a clip has many rows
        correct += (logits.argmax(-1) == coarse).sum().item()                     # IGNORE is never an argmax
        finer += losses[1:].cpu().double().numpy() * (coarse != IGNORE).sum().item()
    model.train(was_training)
    nll, accuracy = float(sums.sum() / counts.sum()), float(correct / counts.sum())
    return {"val_nll": nll, "val_ppl": float(np.exp(min(nll, 700))), "val_acc": accuracy,
            "val_nll_finer": (finer / counts.sum()).round(4).tolist(),
            "clip_nll": (sums / counts).round(4).tolist(), "clip_targets": counts.tolist()}


@torch.no_grad()
def own_details(model, codec, codes, mel, targets):
    """A batch's mel (B, T, 80), decoded from the right coarse codes and from finer ones that the model draws itself;
    for a model of latents the sum of their vectors, (B, T, C).

    That is close to what it hears when it samples; the target is still the right next code. It is scheduled sampling
    (Bengio et al., 1506.03099), but in one extra pass, as for Transformers in 1906.07651, at a fixed rate and of the
    finer codes alone. Two differences remain: while drawing, the model has heard the right finer codes, and for a mel
    each crop is decoded without its past.
    """
    model.eval()                                                                  # no dropout, no mel_noise
    x, coarse = model.backbone(codes, mel).flatten(0, 1), targets[:, 0].clamp(min=0).flatten()        # (B * T, ...)
    draw = lambda logits: torch.multinomial(logits.nan_to_num().softmax(-1), 1)[:, 0]         # `main` reports a NaN
    own = torch.cat([model.draw_finer(*part, draw) for part in zip(x.split(MOST_FRAMES), coarse.split(MOST_FRAMES))])
    model.train()
    own = own.unflatten(0, mel.shape[:2]).mT                                      # (B, K, T)
    heard = codec.dequantize(own).mT if model.config.latents else log_mel(codec.decode(own))
    return torch.cat([mel[:, :1], heard[:, :-1]], dim=1)                          # position p is shown frame p - 1


def get_batch(data, others, args, n_codebooks, step):
    """codes, mel, targets: this process's rows of a batch that depends on step and options only, so that a resumed run
    equals an uninterrupted one."""
    n = args.batch_size // WORLD
    which = args.seed, step, args.batch_size, args.context, args.stretch, n_codebooks, slice(RANK * n, (RANK + 1) * n)
    codes, mel, targets = data.batch(*which)
    for other in others:                                      # --mix: the same crops, every other one with its mel
        some = slice((RANK * n + step) % 2, None, 2)
        mel[some] = other.batch(*which)[1][some]
    return codes, mel, targets


def count_targets(targets, depth_frames):
    """How many frames of targets (B, K, T) are scored for the coarse code, and how many for the finer ones: (2,)."""
    scored = targets[:, 0] != IGNORE
    return torch.stack([scored.sum(), scored[:, depth_frames].sum()])


def total_loss(losses, shares):
    """NLL of the coarse code + mean NLL of the finer codes, from losses (K,), means over a part of a batch.

    Short clips are padded, so the parts hold unequal numbers of targets. Each part is weighted by its shares (2,) of
    the batch's targets, coarse and finer, so that all parts and processes add up to the means over the batch.
    """
    loss = losses[0] * shares[0]
    return loss + losses[1:].mean() * shares[1] if len(losses) > 1 else loss


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


# ----------------------------------------------------------------------------- the command line

SHOWN = ("dataset", "codec", *MEL_OPTIONS)           # what a model is shown; out.pt and every result name these options
# options that may change with --resume: where things are now (hashes tell whether they are the same), and how to
# compute (after changing dtype, compile or accumulate, the run is not bit-identical)
MAY_CHANGE = {"dataset", "codec", "codec_dir", "dtype", "compile", "accumulate"}
THIS_CALL = ("given", "out", "resume", "overwrite", "eval", "device")             # not stored for --resume
# options allowed beside --eval; not --latents, as their width would not fit a model made for a mel
BESIDE_EVAL = {"eval", *SHOWN, "codec_dir", "batch_size", "device", "dtype"} - {"latents"}


def parse_arguments():
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="python train.py [options]",
                                     description="Train a hybrid audio language model, or its token-only twin.")
    add = parser.add_argument_group("what to train on").add_argument
    add("--dataset", default="speech", help=f"speech, music, {', '.join(CORPORA)} (fetched once), or a folder of audio "
        "files (default: %(default)s)")
    add("--codec", help="mini, encodec, or a file of assets/train_codec.py (default: encodec for the corpora that are "
        "fetched, otherwise mini)")
    add("--codec-dir", help="folder with EnCodec's weights, instead of downloading them")
    add("--mel-codebooks", type=int, metavar="K", help="use the mel of the audio decoded from the first K codebooks, "
        "as in sampling; 0: of the original audio (default: as many as the model predicts, but 0 if it predicts one)")
    add("--mix", type=int, metavar="K", help="in training use --mel-codebooks K in every other crop, to measure "
        "whether it helps to know both (default: off)")
    add("--latents", action="store_true", help="use the codec's own vectors instead of the mel: the decoder's input "
        "for K codebooks or, with --mel-codebooks 0, the encoder's output before it is quantised")
    add("--own-details", action="store_true", help="in training show every other crop the mel (or --latents) of the "
        "right coarse codes and of finer ones that the model draws itself; on a CPU a step takes three to five times "
        "as long (with --latents less)")
    add = parser.add_argument_group("experiments with the mel; such models can be scored, not sampled").add_argument
    add("--window", type=int, nargs=2, default=list(WINDOW), metavar=("RISE", "FALL"), help="shape of the mel's "
        "window, in samples; 512 512 is a Hann window of 1024 (default: %(default)s)")
    add("--lookahead", type=int, default=0, metavar="N", help="with --mel-codebooks 0, let the window end N samples "
        "past the frame, to measure what the future is worth (192 with --window 512 512: the usual one, centred on the "
        "frame's first sample); -N: the same window, but samples past the frame are zero (default: %(default)s)")
    add = parser.add_argument_group("what to train").add_argument
    add("--model", choices=PRESETS, default="nano", help="preset of model.py (default: %(default)s)")
    add("--n-codebooks", type=int, help="codes to predict for each frame, 1: the coarse one (default: the preset's)")
    add("--context", type=int, help="positions the model sees, 75 a second (default: the preset's)")
    add("--dropout", type=float, default=0.1, help="default: %(default)s")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="other fields of model.py's "
        "Config, for example use_codes=False n_mel_layer=2")
    add = parser.add_argument_group("how to train").add_argument
    add("--steps", type=int, default=300, help="the learning rate falls over them, to a tenth (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="crops of one context each, per step (default: %(default)s)")
    add("--stretch", type=int, metavar="N", help="cut the crops from pieces of N positions, thus from fewer places, "
        "to measure what many places are worth; clips shorter than N leave rows empty (default: one crop)")
    add("--accumulate", type=int, default=1, help="parts to split a batch into, to save memory (default: %(default)s)")
    add("--lr", type=float, help="highest learning rate, after the warm-up (default: 1e-3; 1.2e-2 for presets "
        "narrower than 256; best: for nano 1.2e-2 in 300 steps, 6e-3 in 2,400 and, with one codebook, in 600; for "
        "larger ones 3e-3 to 6e-3 in 400)")
    add("--warmup", type=int, default=30, help="steps (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    add("--grad-clip", type=float, default=1.0, help="clip the gradient to this norm (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights, the batches and dropout (default: %(default)s)")
    add("--eval-every", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    add = parser.add_argument_group("where to run").add_argument
    add("--device", help="cuda, mps or cpu (default: the first usable; mps from macOS 15.1 on)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the matrix products (default: bfloat16 on cuda, if the "
        "GPU has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on cuda, if Triton is there)")
    add = parser.add_argument_group("files").add_argument
    add("--out", default="out.pt", help="checkpoint; its .last.pt and .jsonl go beside it (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run of --out, with the options it was started with")
    add("--overwrite", action="store_true", help="start anew even if --out exists")
    add("--eval", metavar="CKPT", help="print a checkpoint's validation figures and each clip's NLL, then exit")
    args = parser.parse_args()
    for name, least in dict(steps=1, batch_size=1, stretch=1, accumulate=1, eval_every=1, n_codebooks=1, context=2,
                            warmup=0, weight_decay=0, seed=0, mel_codebooks=0, mix=0).items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:                      # false for nan, too
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and below 2**63")
    types = {f.name: f.type for f in dataclasses.fields(Config)
             if f.name not in ("n_codebooks", "context", "dropout", "n_mels", "latents")}
    fields = {}
    for word in args.set:
        field, _, value = word.partition("=")
        try:                                                  # bool("False") would be True
            fields[field] = {"True": True, "False": False}[value] if types[field] is bool else types[field](value)
        except (KeyError, ValueError):
            parser.error(f"--set {word}: must be FIELD=VALUE, a field of model.py's Config and a value of its type "
                         "(n_codebooks, context, dropout and latents have options of their own, n_mels is fixed)")
    args.set = fields
    if not ((args.lr is None or 0 < args.lr < math.inf) and args.grad_clip > 0 and 0 <= args.dropout < 1):
        parser.error("--lr and --grad-clip must be above 0, --dropout at least 0 and below 1")
    if args.eval is None and (not args.out.endswith(".pt") or os.path.isdir(args.out)):
        parser.error(f"--out {args.out}: it must be a .pt file")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite discards it: give one of them")
    # Which options were given? Parse once more, into a namespace in which every option is None already: argparse sets
    # a default only where an attribute is missing, so what is not None afterwards was on the command line
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))
    args.given = {name for name, value in vars(parser.parse_args(namespace=blank)).items() if value is not None}
    if args.eval is not None and (others := sorted(args.given - BESIDE_EVAL)):
        parser.error(f"--eval scores a checkpoint as it is: --{others[0].replace('_', '-')} has no place beside it")
    return args


def out_of_memory(error):
    """Does this exception mean that? Off CUDA torch has no error of its own (the last three: Windows, MPS, and a
    process of `prepare` that was killed, most likely because memory was full)."""
    said = ("can't allocate memory", "not enough memory", "MPS backend out of memory", "DataLoader worker (pid")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def choose_device(name):
    """A torch.device by name, or the best that is usable; under torchrun each process gets a GPU of its own."""
    if name is None:
        mps = torch.backends.mps                              # before macOS 15.1 its convolutions refuse long clips
        usable = mps.is_available() and mps.is_macos_or_newer(15, 1)
        name = "cuda" if torch.cuda.is_available() else "mps" if usable else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name).item()
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        sys.exit(f"error: device '{name}' cannot be used here ({str(error).splitlines()[0]}); try --device cpu")
    return torch.device(name)


# ----------------------------------------------------------------------------- a run, new or interrupted

def open_log(args, out, last, path):
    """The log, to append to. Exits if there is an earlier run, unless told what to do with it, or one is running."""
    try:
        for file in (out, last, path):
            if file.exists() and file.stat().st_size and not (args.resume or args.overwrite):
                sys.exit(f"error: {file} exists: choose another --out, continue it with --resume, or discard it with "
                         "--overwrite")
        if args.resume and not last.exists():
            sys.exit(f"error: there is no {last}, the file that an interrupted run leaves beside --out, to continue")
        if not MASTER:
            return open(os.devnull, "a")
        if not os.access(out.parent, os.W_OK):                # a log that exists could be opened all the same
            raise PermissionError(errno.EACCES, "its folder cannot be written or does not exist")
        log = open(path, "a")
    except OSError as error:
        sys.exit(f"error: cannot write {path} beside --out {out} ({error.strerror})")
    with contextlib.suppress(ImportError, OSError):           # Windows has no fcntl, a network disk perhaps no locks
        import fcntl
        try:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            sys.exit(f"error: another training is writing {path}: choose another --out")
    return log


def fill_defaults(args):
    """Fill in the defaults that depend on other options."""
    if args.codec is None:
        args.codec = "encodec" if args.dataset in CORPORA else "mini"
    args.lr = args.lr or (1.2e-2 if PRESETS[args.model].n_embd < 256 else 1e-3)
    args.n_codebooks = args.n_codebooks or PRESETS[args.model].n_codebooks
    args.context = args.context or PRESETS[args.model].context
    if args.mel_codebooks is None:
        args.mel_codebooks = args.n_codebooks if args.n_codebooks > 1 else 0


def new_model(args, codec):
    """The untrained model that the options describe."""
    config = dataclasses.replace(PRESETS[args.model], dropout=args.dropout, context=args.context,
                                 n_codebooks=args.n_codebooks, **args.set)
    config.n_mels, config.latents = codec.vectors.shape[-1] if args.latents else N_MELS, args.latents
    if config.n_used_codebooks > codec.n_codebooks:
        raise CodecError(f"codec {codec.name} has {codec.n_codebooks} codebooks, not {config.n_used_codebooks}: lower "
                         "--n-codebooks or n_input_codebooks")
    torch.manual_seed(args.seed)
    try:
        return HybridGPT(config)
    except ValueError as error:
        sys.exit(f"error: --set: {error}")


def load_interrupted(args, last, device):
    """What --resume continues: (model, checkpoint) of the file `last`; args become those the run was started with,
    except those of MAY_CHANGE that are given now."""
    model, checkpoint = load_checkpoint(last, device)
    if "log_size" not in checkpoint:
        raise CheckpointError(f"{last} holds no training state, or that of an older version: --resume needs the file "
                              "that an interrupted run leaves beside --out")
    for name in sorted(args.given & checkpoint["args"].keys() - MAY_CHANGE):
        if getattr(args, name) != checkpoint["args"][name]:
            sys.exit(f"error: --{name.replace('_', '-')} differs from the run in {last} "
                     f"({checkpoint['args'][name]}); --resume continues with the options it was started with")
    vars(args).update({k: v for k, v in checkpoint["args"].items() if k not in args.given})
    return model, checkpoint


def its_codec(checkpoint, path, device, name, folder):
    """The codec that the checkpoint in `path` was trained with. name may differ from the checkpoint's, as the codec's
    file may have moved; the checksum may not."""
    codec = load_codec(name, device, folder)
    if codec.checksum != checkpoint["codec_checksum"]:
        raise CodecError(f"{path} was trained on codes of codec {checkpoint['codec']} "
                         f"({checkpoint['codec_checksum']}), not on those of {codec.name} ({codec.checksum})")
    return codec


def cannot_be_sampled(config, shown):
    """Why sample.py could not feed a model of this `Config`, or None; shown: by name the options of SHOWN."""
    if config.n_input_codebooks > config.n_codebooks:
        return f"reads {config.n_input_codebooks} codebooks and predicts {config.n_codebooks}"
    if config.use_mel and (shown["lookahead"] or tuple(shown["window"]) != WINDOW):
        return (f"was trained on the mel of --lookahead {shown['lookahead']} --window "
                f"{' '.join(map(str, shown['window']))}")
    if config.use_mel and config.mel_delay:
        return f"was trained on a mel that is {config.mel_delay} frames late"


def check_options(args, config):
    """Exit in one line, now and not after an hour of encoding, if options contradict each other."""
    if args.batch_size % (args.accumulate * WORLD):
        sys.exit(f"error: --accumulate {args.accumulate}" + (f" times {WORLD} processes" if WORLD > 1 else "")
                 + f" must divide --batch-size {args.batch_size}")
    frames = args.batch_size // (args.accumulate * WORLD) * math.ceil(args.context / DEPTH_EVERY)
    if config.n_codebooks > 1 and frames > MOST_FRAMES:
        sys.exit(f"error: finer codes of {frames:,} frames would be learnt at once; at most {MOST_FRAMES:,} can be: "
                 "raise --accumulate, or lower --batch-size")
    stretch, positions = args.stretch or args.context, args.batch_size * args.context
    if stretch % args.context or positions % stretch:
        sys.exit(f"error: --stretch {stretch} must be a multiple of the context, {args.context}, and divide the batch, "
                 f"{positions} positions")
    if args.mix is not None and not config.use_mel:
        sys.exit("error: --mix chooses between two kinds of mel, and a token-only model reads none")
    if args.own_details and (args.mix is not None or not config.use_mel or config.n_input_codebooks > 1
                             or not 1 < config.n_codebooks == args.mel_codebooks
                             or cannot_be_sampled(config, vars(args))):
        sys.exit("error: --own-details needs a hybrid that reads one codebook, predicts several and is shown the mel "
                 "(or --latents) of just as many, without --mix, --lookahead, --window or mel_delay")


def configure_optimizer(model, args):
    """AdamW. Embeddings do not decay: every step would shrink the rows of rare codes, and few steps train them."""
    decayed = [p for name, p in model.named_parameters() if "embedding" not in name]
    embeddings = [p for name, p in model.named_parameters() if "embedding" in name]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                              {"params": embeddings, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.95), fused=True)


def score(args, device):
    """--eval: print a checkpoint's validation figures in one line of JSON."""
    model, checkpoint = load_checkpoint(args.eval, device)
    shown = {name: getattr(args, name) if name in args.given else checkpoint[name] for name in SHOWN}
    codec = its_codec(checkpoint, args.eval, device, shown["codec"], args.codec_dir)
    data = prepare(shown["dataset"], codec, **{name: shown[name] for name in MEL_OPTIONS})
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    figures = evaluate(model, data, args.batch_size, autocast)
    say(json.dumps({"checkpoint": args.eval, **shown, "codec": codec.name, "unigram_nll": data.unigram_nll(),
                    "n_params": model.n_params(), **figures}))
    if stopped_by:                                            # nobody has read that
        sys.exit(128 + stopped_by[0])


# ----------------------------------------------------------------------------- the loop

stopped_by = []                      # signals received: the run ends after the current step


def stop_soon(number, _=None):
    """The signal handler while the loop runs: the run ends after the current step."""
    stopped_by.append(number)
    if not TORCHRUN:                                          # it may forward a Ctrl-C that has come already
        signal.signal(signal.SIGINT, signal.default_int_handler)          # a second Ctrl-C: at once


def signal_received():
    """The number of a signal that some process has received, so that all stop after the same step; 0: none."""
    number = torch.tensor(max(stopped_by, default=0))         # on the CPU: no step should wait for a GPU
    if WORLD > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def say(text):
    """Print; if the terminal is gone, or a pipe's reader, as in `train.py | head`, stop as for SIGHUP."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = sys.stderr
        stop_soon(getattr(signal, "SIGHUP", 1))               # Windows has none
        with contextlib.suppress(OSError):                    # standard error may be gone, too
            print(text, flush=True)


def move(x, device):
    """A batch's tensor to the device; to a GPU asynchronously, which needs pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def main():
    args = parse_arguments()
    device = choose_device(args.device)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float32")
    if not MASTER:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    if args.eval is not None:
        return score(args, device)
    if WORLD > 1:
        # gloo for the CPU's tensors, NCCL for the GPU's
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    out = Path(args.out)
    last, log_path = out.with_suffix(".last.pt"), out.with_suffix(".jsonl")
    log = open_log(args, out, last, log_path)                 # first of all, as it keeps other trainings away

    # --- what the run is: from the command line, or from the checkpoint that is continued
    if args.resume:
        model, checkpoint = load_interrupted(args, last, device)
        codec = its_codec(checkpoint, last, device, args.codec, args.codec_dir)
    else:
        fill_defaults(args)
        codec = load_codec(args.codec, device, args.codec_dir)
        model = new_model(args, codec).to(device)
    check_options(args, model.config)
    kinds = [{name: getattr(args, name) for name in MEL_OPTIONS}]                 # of mel: one, or two with --mix
    if args.mix is not None:
        kinds.append({**kinds[0], "mel_codebooks": args.mix})
        check_mel(codec, **kinds[1])                          # now, not after an hour of encoding the first
    data, *others = (prepare(args.dataset, codec, **kind) for kind in kinds)      # processes take turns by its lock
    whole = lambda path: os.path.abspath(os.path.expanduser(path))            # to be found again from any folder
    args.dataset = args.dataset if args.dataset in (*BUNDLED, *CORPORA) else whole(args.dataset)
    args.codec = args.codec if args.codec in ("mini", "encodec") else whole(args.codec)
    args.codec_dir = args.codec_dir and whole(args.codec_dir)
    unigram = data.unigram_nll() if MASTER else 0.0           # reads all codes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # --- model, optimiser, log
    model.train()
    optimizer = configure_optimizer(model, args)
    step, tokens_seen, seconds, best, log_size = 0, 0, 0.0, math.inf, 0
    if args.resume:
        if checkpoint["audio"] != data.fingerprint:
            raise CheckpointError(f"{last} was trained on other audio than dataset '{args.dataset}' holds now (has a "
                                  "file come, a sample.wav perhaps, or gone?), or on another mel of it")
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, tokens_seen, seconds, log_size = (checkpoint[k] for k in ("step", "tokens_seen", "seconds", "log_size"))
        best = checkpoint["best"] if out.exists() else math.inf         # without it the next evaluation is the best
        checkpoint = None                                     # frees its memory
    else:
        model.set_mel_statistics(*data.mel_statistics)
        if MASTER:
            last.unlink(missing_ok=True)                      # --overwrite: the old run must not be resumed
    if MASTER:
        log.truncate(min(log.tell(), log_size))               # --resume repeats the steps that were logged after that
    compiled = args.compile
    if compiled is None:                                      # PyTorch for Windows comes without Triton
        compiled = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    wrapped = torch.compile(model) if compiled else model
    if WORLD > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)

    def write_log(figures):
        print(json.dumps(figures), file=log, flush=True)

    def diverged(what):
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        sys.exit(f"error: {what} is no longer finite at step {step}, learning rate {lr:.2e}; {kept}; start anew "
                 "with a lower --lr (and --overwrite)")

    n_params, context = model.n_params(), args.context
    say(f"{args.model}: {n_params / 1e6:.2f} M parameters, context {context}, on {device} in {args.dtype}")
    say(f"{args.dataset}: {data.meta['train_frames']:,} frames to train on, {data.meta['val_frames']:,} to "
        f"validate, codec {codec.name}; {args.batch_size * context:,} targets a step at most")
    say(f"a model that knows nothing scores {math.log(CODEBOOK_SIZE):.3f} nats, one that knows only how often "
        f"each code occurs {unigram:.3f}")
    facts = {"preset": args.model, **{name: getattr(args, name) for name in SHOWN}, "mix": args.mix,
             "codec_checksum": codec.checksum, "data_key": data.key, "audio": data.fingerprint}
    options = {k: v for k, v in vars(args).items() if k not in THIS_CALL}
    write_log({"step": step, "args": options, "n_params": n_params, **facts, "device": str(device),
               "torch": torch.__version__, "unigram_nll": unigram, "train_frames": data.meta["train_frames"],
               "val_frames": data.meta["val_frames"]})

    # --- the loop
    signal.signal(signal.SIGINT, stop_soon)
    signal.signal(signal.SIGTERM, stop_soon)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup ignores it
        signal.signal(signal.SIGHUP, stop_soon)
    start, tokens_logged, time_logged = time.perf_counter() - seconds, tokens_seen, time.perf_counter()
    lr, grad_norm = 0.0, torch.zeros(())                      # before the first step, for the check for divergence
    while True:
        # A run is evaluated, saved and ended only here, between two steps. Apart from `best`, what is saved is the
        # state before this evaluation: --resume cuts the log back to log_size and evaluates again
        seconds, log_size = time.perf_counter() - start, log.tell()
        stop = signal_received()
        due = not stop and (step % args.eval_every == 0 or step == args.steps)    # if stopped, --resume will evaluate
        if (step % 20 == 0 or due or stop) and not grad_norm.isfinite():
            diverged("the loss or its gradient")
        if due and MASTER:                                    # not `wrapped`: it would be compiled for eval mode, too
            # rows at once: as many as a step's part has; if that is few because of many processes, up to 16
            n_rows = max(args.batch_size // args.accumulate // WORLD, min(args.batch_size // args.accumulate, 16))
            figures = evaluate(model, data, n_rows, autocast)
            if not math.isfinite(figures["val_nll"]):
                diverged("the validation loss")
            write_log({"step": step, "unigram_nll": unigram, "n_params": n_params, "tokens_seen": tokens_seen,
                       "seconds": round(seconds, 1), **figures})
            better = figures["val_nll"] < best
            finer = figures["val_nll_finer"]
            say(f"step {step:5d}  val NLL {figures['val_nll']:.4f}  perplexity {figures['val_ppl']:.1f}  accuracy "
                f"{100 * figures['val_acc']:.2f} %" + (f"  finer codes {np.mean(finer):.3f}" if finer else "")
                + ("  (best so far)" if better and step else ""))
            if better:
                best = figures["val_nll"]
                save(out, to_checkpoint(model, step=step, val_nll=best, **facts))
        if (due or stop) and MASTER:
            os.fsync(log.fileno())                            # so that even after a power cut it is as long as log_size
            save(last, to_checkpoint(model, optimizer=optimizer.state_dict(), step=step, tokens_seen=tokens_seen,
                                     seconds=seconds, best=best, log_size=log_size, args=options, **facts))
            time_logged, tokens_logged = time.perf_counter(), tokens_seen         # excluded from tokens/s
        if stop:
            launch = f"torchrun --nproc_per_node={WORLD}" if WORLD > 1 else "python"
            say(f"stopped at step {step}; continue with: {launch} train.py --resume --out {shlex.quote(str(out))}"
                + (f" --device {args.device}" if args.device else ""))
            sys.exit(128 + stop)
        if step == args.steps:
            break

        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = get_batch(data, others, args, model.config.n_used_codebooks, step)
        # dropout, too, depends on options, step and process only
        torch.manual_seed(int(np.random.default_rng((args.seed, step, RANK)).integers(2**63)))
        # the offset changes from step to step: if it were fixed, most frames near a clip's start, where many crops
        # begin, would never be trained
        depth_frames = torch.arange(step % min(DEPTH_EVERY, context), context, DEPTH_EVERY)
        n_targets, loss_sum = count_targets(batch[2], depth_frames), 0.0          # (2,)
        if WORLD > 1:
            dist.all_reduce(n_targets)                        # of the whole batch
        parts = zip(*(x.chunk(args.accumulate) for x in batch))
        for n_part, part in enumerate(parts):
            if WORLD > 1:                                     # gradients are averaged once, after the last part
                wrapped.require_backward_grad_sync = n_part == args.accumulate - 1
            codes, mel, targets = (move(x, device) for x in part)
            first_row = (RANK * args.accumulate + n_part) * len(mel)              # of this part, in the whole batch
            some = slice((first_row + step) % 2, None, 2)     # every other row: the even or the odd ones of the batch
            if args.own_details and len(mel[some]):
                mel[some] = own_details(model, codec, codes[some], mel[some], targets[some]).type_as(mel)
            with autocast:
                _, losses = wrapped(codes, mel, targets, depth_frames=move(depth_frames, device))         # (K,)
            loss = total_loss(losses, count_targets(part[2], depth_frames) / n_targets.clamp(min=1))
            (loss * WORLD).backward()                         # shares are of the whole batch, but DDP averages
            loss_sum += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens_seen += n_targets[0].item()

        if step % 20 == 0 or step == args.steps:
            if WORLD > 1:
                dist.all_reduce(loss_sum)
            loss_value = loss_sum.item()                      # a CPU-GPU sync point, hence not every step
            rate = (tokens_seen - tokens_logged) / (time.perf_counter() - time_logged)
            time_logged, tokens_logged = time.perf_counter(), tokens_seen
            write_log({"step": step, "loss": loss_value, "lr": lr, "tokens_per_second": round(rate)})
            say(f"step {step:5d}  loss {loss_value:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s")

    say(f"best validation NLL {best:.4f} nats ({abs(unigram - best):.4f} {'below' if best < unigram else 'above'} "
        f"the unigram figure) in {out}")
    if not cannot_be_sampled(model.config, facts):
        say(f"hear it with: python sample.py --ckpt {shlex.quote(str(out))}"
            + (f" --codec-dir {shlex.quote(args.codec_dir)}" if args.codec_dir else ""))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.stdout:                                            # a path may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (CheckpointError, CodecError, DataError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith("torch._inductor"):              # no C++ compiler, for example
            sys.exit(f"error: torch.compile failed ({str(error).splitlines()[0]}): go on with --resume --no-compile")
        if not out_of_memory(error):
            raise
        sys.exit("error: out of memory: raise --accumulate (also with --resume), or lower --context or --batch-size "
                 "(with --eval, only the latter); if it was still preparing, call it again on fewer cores (on Linux: "
                 "taskset -c 0 python train.py …)")
    except OSError as error:
        if error.errno not in DISK_FULL:                      # a folder that is gone, a name that is too long
            sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        sys.exit("error: no space left for the files of --out; those written before are whole: make room, then "
                 "continue with --resume, or start anew with --overwrite if this came before the first checkpoint")
    except KeyboardInterrupt:                                 # before the loop, or a second Ctrl-C in it
        sys.exit(130)
