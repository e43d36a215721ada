"""
model.py: one hybrid transformer. It reads two views of the same 1/75 s of audio and predicts the next code.

    coarse code ── embedding ─────────────────────────┐
                                                      ├─ concatenate ── project ── blocks ── head ── next code
    log-mel frame ── whiten ── linear ── blocks ──────┘
                                          (light, causal)

The discrete side makes the output a distribution that can be sampled and scored; the continuous side brings what the
coarse code has thrown away, without adding a position (Whisper-GPT, arXiv 2412.11449, figure 1). A token-only GPT and a
mel-only model are this same class with one branch switched off.

With n_codebooks > 1 a second, small transformer runs over *depth*, inside each frame, as in Moshi (2410.00037), after
RQ-Transformer (2203.01941). Its position k is given the output of the blocks above (the *backbone*) plus code k; it
sees codes 1 to k, in training the right ones (teacher forcing), and predicts code k + 1:

    backbone ─┬─ head ───────────────────────────── code 1
              ├─ + code 1 ─ depth blocks ─ head 2 ─ code 2
              │                 ▼ (causal)
              └─ + code 2 ─ depth blocks ─ head 3 ─ code 3 ...

A frame is still one position of the backbone, which reads the coarse code and the mel only (in those two papers it
reads all codes, as it does here with n_input_codebooks = K).

Blocks are pre-norm with rotary positions (Su et al., 2104.09864), PyTorch's fused attention, a SiLU MLP, no biases.

    >>> model = HybridGPT(PRESETS["nano"])                          # K = 8
    >>> model.set_mel_statistics(*data.mel_statistics)              # before training
    >>> codes, mel, targets = data.batch(0, 0, 16, 256)             # a data.Dataset: inputs are one frame late
    >>> logits, losses = model(codes, mel, targets)      # (B, K, T), (B, T, 80), (B, K, T) -> (B, T, 1024), (K,)
"""
import io
import math
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

CODEBOOK_SIZE = 1024                 # as in tokens.py; repeated, so that this file needs nothing but PyTorch
START = CODEBOOK_SIZE                # what the model reads where a clip's first frame is predicted (a BOS token)
IGNORE = -1                          # a target that is not scored


@dataclass
class Config:
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int                     # width of the backbone's MLPs
    use_codes: bool = True           # the token branch
    use_mel: bool = True             # the mel branch
    n_input_codebooks: int = 1       # how many codebooks the token branch reads, their embeddings summed
    fuse: str = "concat"             # how the branches meet: "concat", as in the paper, or "add"
    n_mel_layer: int = 1             # light causal blocks over the mel frames
    n_mel_embd: int = 128            # their width; a multiple of n_embd // n_head
    n_mels: int = 80                 # numbers per frame that the mel branch is shown; train.py sets this and the next
    latents: bool = False            # they are no mel, but the codec's own vectors
    mel_noise: float = 0.0           # standard deviation of the noise added to the whitened mel in training
    mel_delay: int = 0               # frames by which the mel comes too late, to measure what the latest are worth
    n_codebooks: int = 1             # K: codes predicted for each frame, coarse first
    n_depth_layer: int = 2           # blocks over depth, if K > 1
    n_depth_embd: int = 128          # their width; a multiple of n_embd // n_head
    context: int = 512               # positions that attention sees, its own included
    dropout: float = 0.0             # train.py sets it, too

    @property
    def n_used_codebooks(self):
        """How many codes of a frame the model reads or predicts."""
        return max(self.n_input_codebooks, self.n_codebooks)

    def check(self):
        """Raise ValueError for a combination that cannot work."""
        sizes = (self.n_layer, self.n_head, self.n_embd, self.n_inner, self.n_mel_embd, self.n_depth_embd,
                 self.n_input_codebooks, self.n_codebooks, self.context)
        may_be_0 = (self.mel_noise, self.mel_delay, self.n_mel_layer, self.n_depth_layer)
        if min(sizes) < 1 or not min(may_be_0) >= 0:          # or nan
            raise ValueError("every size must be at least 1, n_mel_layer, n_depth_layer, mel_noise and mel_delay at "
                             "least 0")
        if not (self.use_codes or self.use_mel):
            raise ValueError("a model needs use_codes or use_mel")
        if self.n_input_codebooks > 1 and not self.use_codes:
            raise ValueError("n_input_codebooks needs use_codes")
        if self.fuse not in ("concat", "add"):
            raise ValueError(f'fuse "{self.fuse}" must be "concat" or "add"')
        head_dim = self.n_embd // self.n_head
        if self.n_embd % self.n_head or head_dim % 2 or (self.use_mel and self.n_mel_embd % head_dim) or (
                self.n_codebooks > 1 and self.n_depth_embd % head_dim):
            raise ValueError(f"n_embd {self.n_embd} must be n_head {self.n_head} times an even head size, n_mel_embd "
                             f"{self.n_mel_embd} and n_depth_embd {self.n_depth_embd} multiples of that size")


PRESETS = {                          # train.py's default learning rate is higher for those narrower than 256
    # the paper's three, and gpt-m: a token-only model of the hybrid's size
    "gpt-s":    Config(n_layer=4, n_head=4, n_embd=256, n_inner=1024, use_mel=False),
    "gpt-m":    Config(n_layer=4, n_head=4, n_embd=256, n_inner=1144, use_mel=False),        # hybrid's size, + 0.2 %
    "hybrid":   Config(n_layer=4, n_head=4, n_embd=256, n_inner=1024),
    "gpt-l":    Config(n_layer=12, n_head=8, n_embd=512, n_inner=2048, use_mel=False),
    # small enough to learn something on two CPU cores in minutes, and its token-only twin; both predict all codes of
    # codec mini, so that there is something to hear
    "nano":     Config(n_layer=4, n_head=4, n_embd=128, n_inner=512, n_mel_embd=96, context=256,
                       n_codebooks=8, n_depth_embd=64),
    "nano-gpt": Config(n_layer=4, n_head=4, n_embd=128, n_inner=620, use_mel=False, context=256,   # as nano
                       n_codebooks=8, n_depth_embd=64),
}


# ----------------------------------------------------------------------------- positions

def rotary_angles(start, length, head_dim):
    """What `rotate` multiplies by, for `length` positions from `start`: cos and signed sin, (2, length, head_dim).

    Channel i and channel i + D/2 form a pair that turns by position * 10000^(-2i/D). A query and a key turned this way
    have a dot product in which only their distance appears: there is no position embedding to run out of in sampling.
    Positions then grow without bound: hence float64 (on the CPU).
    """
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]).float()


def rotate(x, rotary):
    """Turn each pair of channels of x (..., T, D) by its angle: (a, b) -> (a, b) * cos + (b, a) * (-sin, sin)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


# ----------------------------------------------------------------------------- the block

def norm(x):
    """Layer norm without parameters: mean 0, variance 1 over the channels (B, T, C)."""
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Causal self-attention, x (B, T, C) -> (B, T, C); a mask or a cache bounds how far back it sees."""

    def __init__(self, n_embd, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rotary, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)         # (B, H, T, D) each
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and cache is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer MLP, each added to the stream."""

    def __init__(self, n_embd, n_inner, head_dim, dropout):
        super().__init__()
        self.attention = Attention(n_embd, head_dim)
        self.up = nn.Linear(n_embd, n_inner, bias=False)
        self.proj = nn.Linear(n_inner, n_embd, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, rotary, mask=None, cache=None):
        x = x + self.drop(self.attention(norm(x), rotary, mask, cache))
        return x + self.drop(self.proj(F.silu(self.up(norm(x)))))


class KVCache:
    """Keys and values of the last `context` positions, to generate one position at a time in bounded time and memory.

    Attention ignores the order of its keys, and every key carries its own position (rotary), so a ring buffer is
    enough: position t overwrites position t - context. (Beyond `context`, deep layers hear from further back than in
    training: what they attend to has itself attended to `context` earlier positions.)
    """

    def __init__(self, context):
        self.context, self.position, self.rings = context, 0, {}

    def extend(self, attention, k, v):
        """Store k, v (B, H, 1, D) of the current position; return those of all visible ones, (B, H, n, D) each."""
        kv = torch.stack([k, v])                                                  # (2, B, H, 1, D)
        if attention not in self.rings:
            self.rings[attention] = kv.new_zeros(*kv.shape[:3], self.context, kv.shape[4])
        ring = self.rings[attention]
        ring.narrow(3, self.position % self.context, 1).copy_(kv)
        return ring.narrow(3, 0, min(self.position + 1, self.context))


# ----------------------------------------------------------------------------- the model

def mean_nll(logits, targets):
    """Mean cross-entropy in nats of logits (n, 1024) over the targets (n,) that are scored; 0 if none is."""
    nll = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return nll / (targets != IGNORE).sum().clamp(min=1)


class HybridGPT(nn.Module):
    """Predictor of the next frame's codes from two aligned streams, coarse codes and log-mel frames.

    config: a `Config`, for example one of `PRESETS`. Raises ValueError for one that cannot work (`Config.check`).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        c.check()
        head_dim = c.n_embd // c.n_head
        if c.use_codes:
            self.code_embedding = nn.Embedding(CODEBOOK_SIZE + 1, c.n_embd)       # + 1: START
            if c.n_input_codebooks > 1:
                self.finer_embedding = nn.Parameter(torch.empty(c.n_input_codebooks - 1, CODEBOOK_SIZE, c.n_embd))
        if c.use_mel:
            self.register_buffer("mel_mean", torch.zeros(c.n_mels))
            self.register_buffer("mel_whitening", torch.eye(c.n_mels))
            self.mel_in = nn.Linear(c.n_mels, c.n_mel_embd, bias=False)
            self.mel_blocks = nn.ModuleList(
                Block(c.n_mel_embd, 2 * c.n_mel_embd, head_dim, c.dropout) for _ in range(c.n_mel_layer))
            width = c.n_mel_embd + c.n_embd * (c.use_codes and c.fuse == "concat")
            self.fuse = nn.Linear(width, c.n_embd, bias=False)
            if not c.use_codes:                               # START has neither a code's embedding nor a mel
                self.start_embedding = nn.Embedding(1, c.n_embd)
        self.blocks = nn.ModuleList(Block(c.n_embd, c.n_inner, head_dim, c.dropout) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, CODEBOOK_SIZE, bias=False)
        if c.n_codebooks > 1:                                 # embeddings of codebooks 1 to K - 1, heads of 2 to K
            finer = c.n_codebooks - 1
            self.depth_in = nn.Linear(c.n_embd, c.n_depth_embd, bias=False)
            self.depth_embedding = nn.Parameter(torch.empty(finer, CODEBOOK_SIZE, c.n_depth_embd))
            self.depth_blocks = nn.ModuleList(
                Block(c.n_depth_embd, 4 * c.n_depth_embd, head_dim, c.dropout) for _ in range(c.n_depth_layer))
            self.depth_head = nn.Parameter(torch.empty(finer, c.n_depth_embd, CODEBOOK_SIZE))
        self.register_buffer("rotary", rotary_angles(0, max(c.context, c.n_codebooks), head_dim), persistent=False)

        for name, p in self.named_parameters():
            # GPT-2's initialisation: what is added to the residual stream shrinks with the number of additions
            # (the two small transformers use the backbone's number, too)
            std = 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("proj.weight") else 0.02
            if p.dim() > 1:                                   # biases and gains that you add keep their values
                nn.init.normal_(p, mean=0.0, std=std)
        # what enters the stream has variance 1 whatever the branches, so that twins differ only in what they read.
        # finer_embedding and depth_embedding stay small: they are thousands of rarely used random vectors, which at
        # full size would drown what they are added to until each is learnt
        for name in ("mel_in", "code_embedding", "start_embedding", "fuse", "depth_in"):
            if layer := getattr(self, name, None):
                n_terms = getattr(layer, "in_features", 1)    # terms of variance 1 that it sums; an embedding: one
                nn.init.normal_(layer.weight, std=n_terms ** -0.5)

    def n_params(self):
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    def set_mel_statistics(self, mean, covariance):
        """Mean (n_mels,) and covariance (n_mels, n_mels) of the training split's log-mel frames, for whitening.

        Neighbouring bands say nearly the same: a few of the 80 directions hold nearly all the variance, yet the others
        may tell two sounds apart. So a frame is expressed in the principal components of the training frames, each
        divided by sqrt(its variance + 0.01 * the mean variance): the strong ones come out about equal, the weakest,
        mostly noise, stay small. A common factor then makes the mean variance 1.
        """
        if self.config.use_mel:
            variances, directions = torch.linalg.eigh(torch.as_tensor(covariance, dtype=torch.float64))
            scale = (variances + 0.01 * variances.mean()).rsqrt()
            scale = scale / (variances * scale.square()).mean().sqrt()
            self.mel_mean.copy_(torch.as_tensor(mean))
            self.mel_whitening.copy_(directions * scale)

    def forward(self, codes, mel, targets=None, depth_frames=None):
        """Logits of the next coarse code at every position, and the losses.

        codes (B, n_input_codebooks or more, T) int64: further rows are not read (the presets read one, the coarse
            code); START in the coarse row where a clip's first frame is predicted
        mel (B, T, 80) float, raw log-mel of the same frames, ignored at START; may be None without use_mel
        targets (B, n_codebooks or more, T) int64 or None: the next frames' codes, IGNORE where none is scored
        depth_frames (n,) int64: the positions whose finer codes are scored, all by default
        Returns logits (B, T, 1024) and the mean cross-entropy of each codebook in nats, (n_codebooks,), 0 if nothing is
        scored; without targets (logits, None).
        """
        x = self.backbone(codes, mel)                                             # (B, T, n_embd)
        logits = self.head(x)                                                     # (B, T, 1024)
        if targets is None:
            return logits, None
        losses = [mean_nll(logits.flatten(0, 1), targets[:, 0].flatten())]
        if self.config.n_codebooks > 1:
            if depth_frames is not None:
                x, targets = x[:, depth_frames], targets[:, :, depth_frames]
            targets = targets[:, :self.config.n_codebooks].transpose(1, 2).flatten(0, 1)              # (B * n, K)
            finer = self.finer_logits(x.flatten(0, 1), targets[:, :-1].clamp(min=0))      # IGNORE is not a code
            losses += [mean_nll(finer[:, k], targets[:, k + 1]) for k in range(finer.shape[1])]
        return logits, torch.stack(losses)

    def backbone(self, codes, mel, cache=None):
        """Both branches and the blocks: codes (B, K, T), mel (B, T, 80) -> hidden states (B, T, n_embd), for `head` and
        `finer_logits`. With a `KVCache` T is 1, and the positions before this one are remembered."""
        T, context = codes.shape[2], self.config.context
        if cache is not None and (T != 1 or self.config.use_mel and self.config.mel_delay):
            raise ValueError(f"with a cache one position at a time, not {T}, and no mel_delay")
        at_start = (codes[:, 0] == START)[..., None]                              # (B, T, 1)
        first = 0 if cache is None else cache.position
        if first + T <= context:
            rotary = self.rotary[:, first:first + T].unbind()
        else:                                                                     # sampling goes on past the context
            rotary = rotary_angles(first, T, self.rotary.shape[-1]).to(codes.device)
        mask = None                                                               # causal: all that came before
        if T > context:                                                           # no further back than `context`
            mask = torch.ones(T, T, dtype=torch.bool, device=codes.device).tril().triu(1 - context)

        if self.config.use_codes:
            x = self.code_embedding(codes[:, 0])                                  # (B, T, n_embd)
            for k in range(1, self.config.n_input_codebooks):
                x = x + F.embedding(codes[:, k], self.finer_embedding[k - 1]).masked_fill(at_start, 0.0)
        if self.config.use_mel:
            with torch.autocast(mel.device.type, enabled=False):                  # bfloat16 would lose weak directions
                mel = (mel.to(self.mel_mean.dtype) - self.mel_mean) @ self.mel_whitening
            if self.training and self.config.mel_noise:
                mel = mel + self.config.mel_noise * torch.randn_like(mel)
            mel = mel.masked_fill(at_start, 0.0)
            if self.config.mel_delay:
                mel = F.pad(mel, (0, 0, self.config.mel_delay, 0))[:, :T]         # zeros, then all but the latest
            m = self.mel_in(mel).type_as(mel)                                     # (B, T, n_mel_embd)
            for block in self.mel_blocks:
                m = block(m, rotary, mask, cache)
            m = norm(m)
            if not self.config.use_codes:
                x = self.fuse(m) + at_start * self.start_embedding.weight
            elif self.config.fuse == "concat":
                x = self.fuse(torch.cat([x, m], dim=-1))
            else:
                x = (x + self.fuse(m)) * 2 ** -0.5                                # the variance stays 1
            # the stream stays float32 under autocast, as the twin's does: bfloat16 would lose small additions to it
            x = x.type_as(mel)
        for block in self.blocks:
            x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.position += 1                               # only now: every layer has stored this position
        return norm(x)

    def finer_logits(self, x, codes, cache=None):
        """Within one frame: x (n, n_embd) of the backbone, its codes so far (n, k), coarse first -> (n, k, 1024).

        Row 0 predicts the second code from the first, row 1 the third from the first two, and so on, each with a table
        of depth_embedding and one of depth_head of its own. With a `KVCache` of this frame codes is (n, 1), the latest
        code alone, and the earlier ones are remembered.
        """
        first, k = 0 if cache is None else cache.position, codes.shape[1]
        # rows of all tables, one below the other. depth_embedding[arange(k), codes] would be the same, but its gradient
        # is summed in an order that varies with the threads: a resumed run would differ from an uninterrupted one
        rows = codes + CODEBOOK_SIZE * torch.arange(first, first + k, device=codes.device)
        x = self.depth_in(x)[:, None] + F.embedding(rows, self.depth_embedding.flatten(0, 1))    # (n, k, n_depth_embd)
        rotary = self.rotary[:, first:first + k].unbind()
        for block in self.depth_blocks:
            x = block(x, rotary, cache=cache)
        if cache is not None:
            cache.position += 1
        return torch.einsum("nkc,kcv->nkv", norm(x), self.depth_head[first:first + k])

    def draw_finer(self, x, coarse, draw):
        """All codes of a frame: x (n, n_embd) of the backbone, coarse codes (n,) -> (n, n_codebooks), coarse first.

        draw: a function that chooses codes (n,) by their logits (n, 1024), called once for each finer codebook.
        """
        codes, cache = coarse[:, None], KVCache(self.config.n_codebooks)
        for _ in range(1, self.config.n_codebooks):
            logits = self.finer_logits(x, codes[:, -1:], cache)[:, 0]
            codes = torch.cat([codes, draw(logits)[:, None]], dim=1)
        return codes


# ----------------------------------------------------------------------------- checkpoints

class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message is one line, meant for the user."""


FORMAT = "whisper-gpt-5"             # weights of format 4 would load, but learnt from a mel with a symmetric window


def to_checkpoint(model, **facts):
    """What a checkpoint holds: configuration, weights and `facts`; plain types and tensors only.

    sample.py and --eval need facts about the data: pass those of a `Dataset`'s meta and, if its codec came from a
    file, that file's path as `codec`.
    """
    return {**facts, "format": FORMAT, "config": asdict(model.config), "model": model.state_dict()}


def write_whole(path, content):
    """Write bytes beside `path`, then rename: whatever happens, `path` is complete, the old or the new."""
    path = os.path.realpath(path)                             # a link stays one
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(path, content):
    """Write a checkpoint; serialised in memory first, because torch would hide why a write failed."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of train.py -> (HybridGPT in eval mode, the checkpoint's dict). Runs no code from the file.

    Raises CheckpointError if the file is missing, damaged, of an older format, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {checkpoint['format']}, and this is {FORMAT}: train it anew")
        # the first files of this format do not name `latents`, some later ones only beside "config", not in it
        checkpoint.setdefault("latents", False)
        model = HybridGPT(Config(**{"latents": checkpoint["latents"], **checkpoint["config"]}))
        model.load_state_dict(checkpoint["model"])
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint '{path}': train.py writes one") from error
    except (PermissionError, IsADirectoryError) as error:     # a damaged file may raise another OSError
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from error
    except Exception as error:       # a damaged or foreign file makes torch.load raise almost anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)        # some have many lines
        raise CheckpointError(f"{path} is not a whole checkpoint of this train.py: name another, or train one anew "
                              f"({reason})") from error
    return model.to(device).eval(), checkpoint
