"""
tokens.py: a codec, EnCodec or a small one like it, turns a waveform into a few integers 75 times a second, and back.

    wave (B, N) ──encoder──▶ latents ──residual vector quantiser──▶ codes (B, K, T) ──decoder──▶ wave (B, T*320)

The encoder makes a vector of each frame, its *latent*. Codebook 1 picks the nearest of 1024 vectors to it, codebook 2
the nearest to what is left over, and so on, coarse first: K codebooks cost K * 10 bits a frame (0.75 kbit/s each).

Two codecs, both of one class of the `encodec` package (Défossez et al., arXiv 2210.13438):

    mini     made by this project, weights in assets/; zeros before a clip, so causal from the first code on. Its coarse
             code describes the spectral envelope, of its own 320 samples and of sound before them, so that the mel has
             already shown part of what it says (notebooks 02 and 05)
    encodec  Meta's EnCodec 24 kHz, 14.9 M parameters, downloaded once (93 MB) or read from a folder

    >>> codec = load_codec("mini")
    >>> codes = codec.encode(wave)          # (B, 8, T), T = N // 320
    >>> again = codec.decode(codes)         # (B, T * 320)

Everything runs piece by piece (`stream_encoder`, `stream_decoder`): each layer remembers the little of the past that it
needs, so any split gives the result of one pass, up to float rounding, and a file of any length takes no more memory
than ten seconds.
"""
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

# encodec imports torchaudio, which only train_codec.py --adversarial uses. Its wheel for Linux is built for CUDA and
# fails to load beside a CPU build of torch (OSError) or one for another CUDA (RuntimeError): then, and only then, an
# empty module of that name (with a spec, for find_spec) takes its place.
try:
    import torchaudio                # noqa: F401
except (ImportError, OSError, RuntimeError):
    spec = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)
import encodec.model
from encodec.model import EncodecModel
from encodec.modules import SConv1d, SConvTranspose1d, SEANetDecoder, SEANetEncoder, SLSTM
from encodec.modules.conv import pad1d
from encodec.modules.seanet import SEANetResnetBlock
from encodec.quantization import ResidualVectorQuantizer

from mel import HOP, SAMPLE_RATE     # a code is 320 samples, as a mel frame is

CODEBOOK_SIZE = 1024
PIECE = 10 * SAMPLE_RATE             # long audio goes through the networks in pieces of this many samples
SILENCE = 8                          # frames of silence before a clip for a codec that pads by reflection, see `Codec`

MINI = Path(__file__).parent / "assets" / "mini.pt"
MINI_SHA256 = "da13ab60fe19712f5ce7b639acb10fcca1455ee60c551ffdc19008beb0726169"
TRAINING_ONLY = ("inited", "cluster_size", "embed_avg")       # the quantiser's, for training: not in mini's file
ENCODEC_SHA256 = "d7cc33bc"          # its first eight digits, which Meta put into the file's name
ENCODEC_FILE = f"encodec_24khz-{ENCODEC_SHA256}.th"

# GPU and CPU should find the same codes: no TF32, which rounds mantissas to 10 bits, in convolutions and LSTM
torch.backends.cudnn.allow_tf32 = False


class CodecError(RuntimeError):
    """A codec that cannot be loaded, or input that it cannot take; the message is one line, meant for the user."""


# ----------------------------------------------------------------------------- the codec

def exact(method):
    """Run a method (tensor first) without gradients and in float32, even inside torch.autocast: in bfloat16 more than
    a tenth of all coarse codes would differ."""
    @functools.wraps(method)
    def wrapped(self, x, *args, **options):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args, **options)
    return wrapped


class Codec:
    """An EnCodec model behind two calls, `encode` and `decode`. Made by `load_codec`; always eval, never a gradient.

    name, checksum   which codec it is, for caches and checkpoints
    n_codebooks      how many codebooks the weights hold
    silence_frames   frames of silence before every clip; their codes and sound are dropped. EnCodec pads the start of
                     a clip by reflection, which lets its first codes see about six frames ahead; a reflection of
                     silence is silence, so that every code of the clip is causal. 0 for a codec that pads with zeros.
    """

    def __init__(self, model, name, checksum, device="cpu"):
        for module in model.modules():                        # undo weight normalisation: g * v / |v|, once and for all
            if hasattr(module, "weight_g"):
                torch.nn.utils.remove_weight_norm(module)
        # all files count on these two; for a codec with others change HOP in mel.py, CODEBOOK_SIZE here and in model.py
        assert (model.encoder.hop_length, model.quantizer.bins) == (HOP, CODEBOOK_SIZE)
        self.model = model.to(device).eval().requires_grad_(False)
        self.name, self.checksum, self.device = name, checksum, torch.device(device)
        self.n_codebooks = model.quantizer.n_q
        self.silence_frames = SILENCE if model.encoder.model[0].pad_mode == "reflect" else 0
        if self.silence_frames:
            silence = torch.zeros(1, 1, self.silence_frames * HOP, device=self.device)
            self.silence_codes = self.quantize(self.model.encoder(silence), self.n_codebooks)       # (1, K, 8)

    @property
    def vectors(self):
        """What the codes stand for, (K, 1024, C): a frame is decoded from the sum of its K codes' vectors."""
        return torch.stack([layer.codebook for layer in self.model.quantizer.vq.layers])

    @exact
    def quantize(self, latents, n_codebooks):
        """latents (B, C, T) -> codes (B, n_codebooks, T)."""
        return self.model.quantizer.vq.encode(latents, n_q=n_codebooks).transpose(0, 1)

    def dequantize(self, codes):
        """codes (B, K, T) -> the decoder's input: the sum of the vectors that they stand for, (B, C, T)."""
        # as the package's quantizer.decode, which takes twice as long for one frame
        layers = self.model.quantizer.vq.layers
        return sum(F.embedding(row, layer.codebook) for row, layer in zip(codes.unbind(1), layers)).mT

    def encode(self, wave, n_codebooks=None):
        """24 kHz waveform (B, N), floats in [-1, 1] -> codes (B, K, N // 320) int64, coarse first.

        n_codebooks: only the first K; all of them by default. Samples after the last whole frame are dropped.
        Raises CodecError for another shape, integers, non-finite samples or a number of codebooks the codec does not
        have.
        """
        if wave.dim() != 2 or not wave.is_floating_point():
            raise CodecError("encode takes a waveform (B, N) of floats, not a tensor of shape "
                             f"{tuple(wave.shape)} and {wave.dtype}")
        if not wave.isfinite().all():
            raise CodecError("the waveform holds NaN or infinite samples")
        return self.stream_encoder(n_codebooks).push(wave.to(self.device, torch.float32))

    def decode(self, codes):
        """codes (B, K, T) int64 in [0, 1024), K from 1 to `n_codebooks` -> waveform (B, T * 320) float32.

        Raises CodecError for another shape or codes out of range.
        """
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.n_codebooks:
            raise CodecError(f"decode takes codes (B, 1..{self.n_codebooks}, T), not shape {tuple(codes.shape)}")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < CODEBOOK_SIZE:
            raise CodecError(f"codes must lie in [0, {CODEBOOK_SIZE})")
        return self.stream_decoder().push(codes.to(self.device))

    def stream_encoder(self, n_codebooks=None):
        """A fresh `StreamEncoder` for one clip (or a batch of clips, padded to equal length), on the codec's device.

        n_codebooks: only the first K, all by default. Raises CodecError if the codec has fewer.
        """
        n_codebooks = self.n_codebooks if n_codebooks is None else n_codebooks
        if not 1 <= n_codebooks <= self.n_codebooks:
            raise CodecError(f"codec {self.name} has 1 to {self.n_codebooks} codebooks, not {n_codebooks}")
        return StreamEncoder(self, n_codebooks)

    def stream_decoder(self):
        """A fresh `StreamDecoder` for one clip (or one batch of clips), on the codec's device."""
        return StreamDecoder(self)


# ----------------------------------------------------------------------------- networks, one piece at a time

class StreamEncoder:
    """`push(wave (B, n)) -> codes (B, K, t)`: the codes that became complete; n >= 0, split anywhere, the same B."""

    def __init__(self, codec, n_codebooks):
        self.codec, self.n_codebooks = codec, n_codebooks
        self.state, self.rest = {}, None                      # rest: samples of a frame that is not yet complete

    def push(self, wave):
        return torch.cat([self.codec.quantize(self.latents(piece), self.n_codebooks)
                          for piece in wave.split(PIECE, dim=-1)], dim=-1)

    @exact
    def latents(self, wave):
        """Instead of `push`: the encoder's output before quantisation, (B, C, t). Keep pieces to a few seconds: only
        `push` cuts longer ones, to bound memory."""
        encoder = self.codec.model.encoder
        if self.codec.silence_frames and not self.state:      # the first piece
            silence = wave.new_zeros(len(wave), 1, self.codec.silence_frames * HOP)
            run_piece(encoder.model, silence, self.state)
        if self.rest is not None:
            wave = torch.cat([self.rest, wave], dim=-1)
        whole = wave.shape[-1] // HOP * HOP
        self.rest = wave[:, whole:].clone()
        if whole == 0:
            return wave.new_zeros(len(wave), encoder.dimension, 0)
        return run_piece(encoder.model, wave[:, None, :whole], self.state)


class StreamDecoder:
    """`push(codes (B, K, t)) -> wave (B, t * 320)`: t >= 0, split anywhere, the same B and K each time."""

    def __init__(self, codec):
        self.codec, self.state = codec, {}

    @exact
    def push(self, codes):
        model = self.codec.model
        if self.codec.silence_frames and not self.state:      # the first piece
            silence = self.codec.silence_codes[:, :codes.shape[1]].expand(len(codes), -1, -1)
            run_piece(model.decoder.model, self.codec.dequantize(silence), self.state)
        if codes.shape[-1] == 0:
            return codes.new_zeros(len(codes), 0, dtype=torch.float32)
        return torch.cat([run_piece(model.decoder.model, self.codec.dequantize(piece), self.state)[:, 0]
                          for piece in codes.split(PIECE // HOP, dim=-1)], dim=-1)


def run_piece(module, x, state):
    """Apply one of EnCodec's modules to the next piece of a signal, x (B, C, T) -> (B, C', T').

    Pieces are whole frames, so that every stride divides them and no layer is left with half an output.
    `state` is a dict, empty at the start of a clip: layer -> what it must remember. For a causal convolution, the last
    inputs that its kernel still reaches. For the LSTM, its hidden and cell state. A transposed convolution's kernel is
    twice its stride, so input t adds `now` to output block t (one stride long) and `later` to block t + 1:

        y[block t] = now[t] + later[t - 1]                    remembered: `later` of the last input
    """
    if isinstance(module, torch.nn.Sequential):
        for child in module:
            x = run_piece(child, x, state)
        return x
    if isinstance(module, SEANetResnetBlock):
        return run_piece(module.shortcut, x, state) + run_piece(module.block, x, state)
    if isinstance(module, SConv1d):
        conv = module.conv.conv
        # how many inputs before the current stride the kernel still reaches; the package pads by as many
        reach = (conv.kernel_size[0] - 1) * conv.dilation[0] - (conv.stride[0] - 1)
        if module in state:
            x = torch.cat([state[module], x], dim=-1)
        else:                                                 # the start of the clip: pad as the package does
            x = pad1d(x, (reach, 0), mode=module.pad_mode)
        state[module] = x[..., x.shape[-1] - reach:].clone()  # a view would keep all of x
        return module.conv(x)
    if isinstance(module, SConvTranspose1d):
        conv = module.convtr.convtr                           # as a matrix product: faster than the package's
        blocks = x.mT @ conv.weight.flatten(1)                # (B, T, C' * 2 * stride)
        now, later = blocks.unflatten(2, (conv.out_channels, 2, conv.stride[0])).unbind(3)        # (B, T, C', stride)
        before = state.get(module, torch.zeros_like(later[:, :1]))
        state[module] = later[:, -1:].clone()
        y = now + torch.cat([before, later[:, :-1]], dim=1)   # block t: the `now` of input t, the `later` of t - 1
        return y.transpose(1, 2).flatten(2) + conv.bias[:, None]
    if isinstance(module, SLSTM):
        x = x.permute(2, 0, 1)                                # (T, B, C)
        before = state.get(module, x.new_zeros(2, module.lstm.num_layers, *x.shape[1:]))
        if len(x) > 1:
            y, state[module] = module.lstm(x, tuple(before))
        else:                                                 # module.lstm would pack its weights anew at every call
            y, after = x[0], []                               # layer by layer; y, h and c are (B, C)
            for h, c, weights in zip(*before, module.lstm.all_weights):
                y, c = torch.lstm_cell(y, (h, c), *weights)
                after.append((y, c))
            y, state[module] = y[None], tuple(torch.stack(part) for part in zip(*after))
        return (y + x if module.skip else y).permute(1, 2, 0)
    return module(x)                                          # activations, identities: no memory


# ----------------------------------------------------------------------------- which weights

def build_mini(n_filters, dimension, lstm, n_codebooks=8):
    """A small causal EncodecModel at EnCodec's rates, zero padding, untrained."""
    shape = dict(n_filters=n_filters, dimension=dimension, lstm=lstm, ratios=[8, 5, 4, 2], causal=True,
                 pad_mode="constant", norm="none")
    return EncodecModel(SEANetEncoder(**shape), SEANetDecoder(**shape),
                        ResidualVectorQuantizer(dimension=dimension, n_q=n_codebooks, bins=CODEBOOK_SIZE),
                        target_bandwidths=[0.75 * n_codebooks], sample_rate=SAMPLE_RATE, channels=1)


def load_codec(name="mini", device="cpu", folder=None):
    """A `Codec` by name, `mini` or `encodec`, or from a file that assets/train_codec.py wrote.

    folder: where `encodec` finds its weights (a file encodec_24khz-d7cc33bc.th) instead of downloading them.
    Raises CodecError, in one line, when the weights are missing, damaged or not those of a codec.
    """
    if folder == "":                                          # a shell variable that is not set
        raise CodecError("the folder of EnCodec's weights has an empty name")
    if name == "encodec":
        return _load_encodec(device, folder and os.path.expanduser(folder))
    if folder:
        raise CodecError(f"a folder of weights goes with codec encodec, not with '{name}'")
    path = MINI if name == "mini" else Path(os.path.expanduser(name))
    if name != "mini" and not os.path.isfile(path):
        raise CodecError(f"no codec '{name}': use mini, encodec, or a file written by assets/train_codec.py (--codec "
                         "FILE if it has moved)")
    checksum = _sha256(path)
    if name == "mini" and checksum != MINI_SHA256:
        raise CodecError(f"{path} is not the codec this version was made with (SHA-256 {checksum[:12]}…, expected "
                         f"{MINI_SHA256[:12]}…): restore it with `git checkout assets/mini.pt`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = build_mini(**saved["config"])
        as_built = {key: value for key, value in model.state_dict().items() if key.endswith(TRAINING_ONLY)}
        model.load_state_dict(as_built | saved["weights"])    # into float32; raises for any other missing key
    except Exception as error:       # torch.load raises many kinds of exception for a foreign or damaged file
        raise CodecError(f"{path} is not a codec file of assets/train_codec.py ({type(error).__name__})") from error
    return Codec(model, path.stem, checksum[:16], device)


def _sha256(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CodecError(f"cannot read {path} ({error.strerror})") from error


def _load_encodec(device, folder):
    """Meta's weights through the package: its download, cache and checksum, or a local folder."""
    where = Path(folder) / ENCODEC_FILE if folder else encodec.model.ROOT_URL + ENCODEC_FILE
    # the package checks what it downloads and what is in a folder, but not what it has downloaded before
    cached = Path(torch.hub.get_dir()) / "checkpoints" / ENCODEC_FILE
    if not folder and cached.is_file() and not _sha256(cached).startswith(ENCODEC_SHA256):
        raise CodecError(f"the cached download {cached} is damaged: delete it and try again")
    try:
        with warnings.catch_warnings():                       # torch deprecates the weight_norm that encodec calls
            warnings.simplefilter("ignore")
            model = EncodecModel.encodec_model_24khz(repository=Path(folder) if folder else None)
    except Exception as error:       # network, disk, checksum, unpickling: all mean that the weights cannot be had
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CodecError(f"cannot load EnCodec's weights from {where} ({reason}); fetch "
                         f"{encodec.model.ROOT_URL}{ENCODEC_FILE} on a machine with network and pass --codec-dir "
                         "FOLDER, or use --codec mini") from error
    return Codec(model, "encodec", ENCODEC_SHA256, device)
