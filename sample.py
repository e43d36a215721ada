"""
sample.py: a checkpoint and, optionally, the beginning of a recording become audio.

    python sample.py --ckpt out.pt                                     five seconds from nothing -> sample.wav
    python sample.py --ckpt out.pt --prompt clip.wav --seconds 5 --num 3       three continuations of a clip
    python sample.py --ckpt out.pt --seconds 60 --out - | aplay -f S16_LE -r 24000     heard while it is generated

One frame, 1/75 s, at a time, around one loop:

    ┌▶ model ── logits ── draw ── codes ──▶ codec decoder ── 320 samples ──┬──▶ sample.wav
    └── coarse code and mel of this frame ◀──────────────── log-mel ◀──────┘

A model with several codebooks draws the finer codes of a frame one after the other, each knowing those before it. They
fix the exact shape of the wave; a lower --finer-temperature makes it smoother. At 0.7 the speech of the models in
assets/ comes closer to the corpus, but music strays farther, most of all that of a hybrid, which hears what it draws
and was trained on codes as varied as a recording's (notebook 06).

A model trained with --latents hears no mel, but the vectors that the codes stand for; its finer codes, too, are best
drawn at 0.7 or 0.8 on speech, perhaps also on music.

Each part remembers its own past (the model's keys and values, the decoder's layers, the spectrogram's last window), so
the cost of a frame stops growing once the context is full.
"""
import argparse
import contextlib
import errno
import math
import os
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from corpora import DISK_FULL
from data import DataError, read_audio
from mel import FRAME_RATE, HOP, SAMPLE_RATE, StreamingLogMel
from model import START, CheckpointError, KVCache, load_checkpoint
from tokens import CodecError
from train import cannot_be_sampled, choose_device, its_codec, out_of_memory


def load(path, device="cpu", codec=None, codec_dir=None):
    """A checkpoint of train.py -> (`HybridGPT` in eval mode, the `Codec` it was trained with, the checkpoint's dict).

    codec: a name for `load_codec`, None for the one that the checkpoint names. Raises CheckpointError for a checkpoint
    that cannot be read, or whose model needs what is not there while sampling; CodecError for a codec that is not the
    checkpoint's.
    """
    model, checkpoint = load_checkpoint(path, device)
    if why := cannot_be_sampled(model.config, checkpoint):
        raise CheckpointError(f"{path} {why}: it can be scored but not sampled")
    return model, its_codec(checkpoint, path, device, codec or checkpoint["codec"], codec_dir), checkpoint


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a code from logits (B, 1024) -> (B,) int64.

    temperature: divides the logits; 0 takes the likeliest code. top_k: only among the k likeliest codes. top_p: only
    among the smallest set of likeliest codes with a total probability of p (the nucleus; Holtzman et al., 1904.09751).
    generator: a CPU torch.Generator.
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        before = p.cumsum(-1) - p                             # probability of the codes likelier than this one
        beyond = (before >= top_p) & (before > 0)             # never the likeliest, even if top_p rounds to 0
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)         # sorting undone
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


@torch.inference_mode()
def generate(model, codec, n_frames, num=1, prompt=None, temperature=1.0, finer_temperature=None, **how):
    """Yield (codes (B, K, 1), wave (B, 320)) frame by frame: the prompt as the codec decodes it, then `n_frames` new.

    model: a `HybridGPT` of K codebooks in eval mode; codec: the `Codec` it was trained with; num: B, how many at once
    prompt: codes (1, K or more, P) or None; temperature: of the coarse code; finer_temperature: of the finer codes
        (None: the same); how: top_k, top_p and generator, for every `draw`
    The prompt and its continuation run through one codec state, so there is no seam between them; the prompt, too, goes
    frame by frame, so that there is one loop. Yields inference tensors: clone them before training on them.
    """
    device = next(model.parameters()).device
    finer_temperature = temperature if finer_temperature is None else finer_temperature
    n_prompt = 0 if prompt is None else prompt.shape[-1]
    cache, decoder, spectrogram = KVCache(model.config.context), codec.stream_decoder(), StreamingLogMel()
    codes = torch.zeros(num, model.config.n_input_codebooks, 1, dtype=torch.long, device=device)
    codes[:, 0] = START
    mel = torch.zeros(num, 1, model.config.n_mels, device=device)
    for t in range(n_prompt + n_frames):
        x = model.backbone(codes, mel, cache)[:, 0]           # (B, n_embd)
        if t < n_prompt:
            codes = prompt[:, :model.config.n_codebooks, t:t + 1].expand(num, -1, 1).to(device)
        else:
            coarse = draw(model.head(x), temperature, **how)                  # (B,)
            codes = model.draw_finer(x, coarse, lambda logits: draw(logits, finer_temperature, **how))[:, :, None]
        heard = codes.to(codec.device)
        wave = decoder.push(heard)                            # (B, 320)
        mel = codec.dequantize(heard).mT if model.config.latents else spectrogram.push(wave)          # (B, 1, n_mels)
        mel = mel.to(device)
        yield codes, wave


def can_be_written(path):
    """Is its folder there and writable, and is it not one itself?"""
    try:
        return os.access(path.parent, os.W_OK) and not stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:                                 # not there yet
        return True
    except OSError:                                           # in a folder that may not be entered, or too long a name
        return False


def parse_arguments():
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="python sample.py [options]",
                                     description="Generate audio from a checkpoint of train.py.")
    add = parser.add_argument
    add("--ckpt", default="out.pt", help="checkpoint of train.py (default: %(default)s)")
    add("--prompt", help="audio file to continue")
    add("--seconds", type=float, default=5.0, help="of new audio (default: %(default)s)")
    add("--num", type=int, default=1, help="how many, generated side by side (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest code (default: %(default)s)")
    add("--finer-temperature", type=float, help="of codebooks 2 and up (default: that of --temperature)")
    add("--top-k", type=int, help="in every codebook, draw among the k likeliest codes only")
    add("--top-p", type=float, help="in every codebook, draw among the likeliest codes that hold this much probability")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--codec", help="codec to decode with (default: the one the checkpoint names)")
    add("--codec-dir", help="folder with EnCodec's weights")
    add("--device", help="default: the first usable of cuda, mps (from macOS 15.1 on) and cpu")
    add("--out", default="sample.wav", help=".wav or .flac file, replaced only once all is generated; with --num 3: "
        "sample-1.wav, sample-2.wav, sample-3.wav; -: raw 16-bit PCM, mono, 24 kHz, to standard output while it is "
        "generated (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.seconds * FRAME_RATE < math.inf or args.num < 1:            # nan fails every comparison
        parser.error(f"--seconds must be at least one frame (1/{FRAME_RATE}) and --num at least 1")
    if not (0 <= args.temperature < math.inf and 0 <= (args.finer_temperature or 0) < math.inf
            and 0 <= args.seed < 2**63):
        parser.error("--temperature, --finer-temperature and --seed must be 0 or more")
    if args.out == "-" and args.num > 1:
        parser.error("--out - carries one stream: --num 1")
    if args.out != "-" and Path(args.out).suffix.lower() not in (".wav", ".flac"):
        parser.error(f"--out {args.out}: it must be a .wav or .flac file, or -")
    if args.top_k is not None and args.top_k < 1 or args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-k must be at least 1, --top-p in (0, 1]")
    return args


def main():
    args = parse_arguments()
    out, live = Path(args.out), args.out == "-"
    names = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(args.num)] if args.num > 1 else [out]
    if not live and not all(map(can_be_written, names)):
        sys.exit(f"error: cannot write {out}: --out takes the name of a file in an existing, writable folder")
    model, codec, checkpoint = load(args.ckpt, choose_device(args.device), args.codec, args.codec_dir)
    trained_on, hears = checkpoint["mel_codebooks"], model.config.n_codebooks         # the mel of that many codebooks
    if model.config.use_mel and hears not in (trained_on, checkpoint.get("mix")):
        kind = "latents" if model.config.latents else "mel"
        of = f"{trained_on} codebooks" if trained_on else "recordings"
        print(f"note: {args.ckpt} learnt from the {kind} of {of}, but hears the {kind} of the {hears} it predicts: "
              "expect less of it than its NLL says", file=sys.stderr)
    prompt = None
    if args.prompt is not None:
        wave = torch.from_numpy(np.concatenate(list(read_audio(args.prompt))))
        prompt = codec.encode(wave[None], model.config.n_codebooks)       # (1, K, P)
        if prompt.shape[-1] == 0:
            raise DataError(f"{args.prompt}: holds {len(wave)} samples, less than one frame ({HOP} at 24 kHz)")

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):      # delete unfinished files, as with Ctrl-C
        if number and signal.getsignal(number) != signal.SIG_IGN:         # nohup ignores it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if args.num == 1 and codec.device.type == "cpu":
        torch.set_num_threads(1)                              # one frame is too little work for several threads
    frames = generate(model, codec, round(args.seconds * FRAME_RATE), args.num, prompt, args.temperature,
                      args.finer_temperature, top_k=args.top_k, top_p=args.top_p,
                      generator=torch.Generator().manual_seed(args.seed))
    parts = [] if live else [name.with_name(f".{os.getpid()}-{i}.part{name.suffix}") for i, name in enumerate(names)]
    start = time.perf_counter()
    with contextlib.ExitStack() as cleanup:
        for part in parts:
            cleanup.callback(part.unlink, missing_ok=True)
        if sys.stderr.isatty():
            cleanup.callback(print, file=sys.stderr)          # ends the line that shows the progress
        files = [cleanup.enter_context(soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, "PCM_16")) for part in parts]
        for t, (_, wave) in enumerate(frames, start=1):
            samples = (wave.clamp(-1, 1) * 32767).round().short().cpu().numpy()                          # (B, 320)
            if live:
                sys.stdout.buffer.write(samples.astype("<i2").tobytes())
                sys.stdout.buffer.flush()
            for file, row in zip(files, samples):
                file.write(row)
            seconds = t / FRAME_RATE
            pace = seconds / (time.perf_counter() - start)
            if sys.stderr.isatty() and t % 15 == 0:
                print(f"\r{seconds:.1f} s at {pace:.2f} x real time ", end="", file=sys.stderr)
        for file, part, name in zip(files, parts, names):
            file.close()
            if soundfile.info(part).frames != t * HOP:        # libsndfile does not report that its last write failed
                raise soundfile.SoundFileRuntimeError("the file is not complete")
            os.replace(part, name)
    print(f"{'standard output' if live else ', '.join(map(str, names))}: {seconds:.2f} s"
          + (f", the first {prompt.shape[-1] / FRAME_RATE:.2f} s of it the prompt" if args.prompt else "")
          + f" ({pace:.2f} x real time)", file=sys.stderr if live else sys.stdout, flush=True)


if __name__ == "__main__":
    if sys.stdout:                                            # a path may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (CheckpointError, CodecError, DataError) as error:
        sys.exit(f"error: {error}")
    except soundfile.SoundFileError as error:
        sys.exit(f"error: cannot write --out ({str(error).strip()}): is the disk full, or --num too large?")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("error: out of memory: lower --num")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, *DISK_FULL):
            raise
        # at exit Python flushes stdout once more: into nothing, or that would fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # EPIPE: whoever read standard output has closed the pipe
        sys.exit(0 if error.errno == errno.EPIPE else "error: no space left where --out goes")
