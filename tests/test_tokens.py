"""
python -m pytest tests/test_tokens.py

The codec gives what the `encodec` package gives, whole or in pieces, and no code knows the future. Random weights do
for that: two shapes stand for `mini` and for Meta's 24 kHz model, codebooks spread so that the codes vary.
"""
import functools
import hashlib
import http.server
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import encodec.model
import pytest
import soundfile
import torch
from conftest import Malicious, closed, liven
from encodec.model import EncodecModel

import tokens
from mel import HANN, HOP, log_mel
from tokens import SILENCE, Codec, CodecError, build_mini, load_codec

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")      # deprecated in torch, used by encodec

SPEECH = Path(__file__).parent.parent / "assets" / "speech"


def random_wave(n, batch=1):
    """Noise whose loudness wanders, (batch, n)."""
    loudness = 0.05 + 0.3 * torch.sin(torch.arange(n) / 3000).square()
    return loudness * torch.randn(batch, n)


def cut(x, bounds):
    """x[..., N] in pieces that end at the given positions."""
    bounds = [0, *sorted(bounds), x.shape[-1]]
    return [x[..., a:b] for a, b in zip(bounds, bounds[1:])]


def package_24khz():
    return EncodecModel.encodec_model_24khz(pretrained=False)


@pytest.fixture(scope="module", params=["mini", "encodec", "mini that ships"])
def pair(request):
    """(codec, the package's own model with the same weights): both shapes with random ones, and what ships."""
    if request.param == "mini that ships":
        return load_codec("mini"), load_codec("mini").model
    torch.manual_seed(1)
    build = functools.partial(build_mini, 16, 128, 2) if request.param == "mini" else package_24khz
    package, twin = liven(build()), build()      # twin: Codec changes the model that it is given
    twin.load_state_dict(package.state_dict())
    return Codec(twin, request.param, "random"), package


@torch.no_grad()
def package_forward(codec, package, wave):
    """The package's one pass: latents (B, C, T), codes (B, K, T), waveform (B, N), leading silence cut off again."""
    n = codec.silence_frames
    padded = torch.cat([torch.zeros(len(wave), n * HOP), wave], dim=-1)[:, None]
    latents = package.encoder(padded)
    [(codes, _)] = package.encode(padded)
    again = package.decode([(codes, None)])
    return latents[..., n:], codes[..., n:], again[:, 0, n * HOP:]


@torch.no_grad()
def own_latents(codec, wave):
    """What the stream encoder quantises."""
    state = {}
    if codec.silence_frames:
        tokens.run_piece(codec.model.encoder.model, torch.zeros(len(wave), 1, codec.silence_frames * HOP), state)
    return tokens.run_piece(codec.model.encoder.model, wave[:, None], state)


def assert_same_codes(codec, latents, codes, expected):
    """Equal but for rounding: where a frame differs, the lowest differing codebook had a near-tie to break."""
    assert codes.shape == expected.shape and codes.dtype == expected.dtype == torch.int64
    different = (codes != expected).any(1).nonzero().tolist()                      # [clip, frame]
    assert len(different) <= 1 + codes.numel() // 10_000
    for b, t in different:
        k = (codes[b, :, t] != expected[b, :, t]).nonzero()[0].item()
        tables = [layer.codebook for layer in codec.model.quantizer.vq.layers[: k + 1]]
        residual = latents[b, :, t] - sum(table[codes[b, j, t]] for j, table in enumerate(tables[:k]))
        one, other = ((residual - tables[k][c[b, k, t]]).square().sum() for c in (codes, expected))
        assert (one - other).abs() < 1e-3 * one


# ----------------------------------------------------------------------------- equal to the package

def test_whole_clip_equals_the_package_in_one_pass(pair):
    codec, package = pair
    wave = random_wave(75 * HOP)
    latents, codes, again = package_forward(codec, package, wave)
    assert (own_latents(codec, wave) - latents).abs().max() < 1e-4 * latents.std()
    assert_same_codes(codec, latents, codec.encode(wave), codes)
    assert (codec.decode(codes) - again).abs().max() < 1e-5
    assert (codec.decode(codes) - again).abs().max() < 1e-3 * again.std()          # random weights are quiet


def test_codes_vary(pair):
    codec, _ = pair
    codes = codec.encode(random_wave(75 * HOP))
    least = 15 if codec.checksum == "random" else 5           # to what ships, noise is the same few coarse codes
    assert all(codes[:, k].unique().numel() > least for k in range(codec.n_codebooks))


def test_a_batch_is_its_clips_one_by_one(pair):
    codec, _ = pair
    wave = random_wave(10 * HOP, batch=3)
    codes = codec.encode(wave)
    for b in range(3):
        assert_same_codes(codec, own_latents(codec, wave[b:b + 1]), codec.encode(wave[b:b + 1]), codes[b:b + 1])
        assert (codec.decode(codes)[b] - codec.decode(codes[b:b + 1])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("split", ["frame by frame", "at random", "with empty pushes and single samples"])
def test_streaming_in_any_split_equals_the_whole_clip(pair, split):
    codec, _ = pair
    n_frames = 20
    wave = random_wave(n_frames * HOP + 50, batch=2)
    if split == "frame by frame":
        samples, frames = [HOP * t for t in range(1, n_frames)], range(1, n_frames)
    elif split == "at random":
        samples = torch.randint(0, wave.shape[-1] + 1, (9,)).tolist()
        frames = torch.randint(0, n_frames + 1, (5,)).tolist()
    else:
        samples, frames = [0, 0, 1, 2, 319, 320, 320, 321, 5000, 5001], [0, 0, 1, 7, 7, n_frames]
    codes, again = codec.encode(wave), codec.decode(codec.encode(wave))
    whole, encoder = own_latents(codec, wave), codec.stream_encoder()
    latents = torch.cat([encoder.latents(piece) for piece in cut(wave, samples)], dim=-1)
    assert (latents - whole[..., :n_frames]).abs().max() < 1e-4 * whole.std()
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    streamed = torch.cat([encoder.push(piece) for piece in cut(wave, samples)], dim=-1)
    assert_same_codes(codec, whole, streamed, codes)
    streamed = torch.cat([decoder.push(piece) for piece in cut(codes, frames)], dim=-1)
    assert streamed.shape == again.shape == (2, n_frames * HOP)
    assert (streamed - again).abs().max() < 1e-5
    assert (streamed - again).abs().max() < 1e-3 * again.std()


def test_streams_give_a_frame_as_soon_as_its_last_sample_arrives(tiny_codec):
    encoder, decoder = tiny_codec.stream_encoder(n_codebooks=3), tiny_codec.stream_decoder()
    got = [encoder.push(random_wave(n)) for n in (0, 319, 1, 640)]
    assert [codes.shape for codes in got] == [(1, 3, 0), (1, 3, 0), (1, 3, 1), (1, 3, 2)]
    assert [decoder.push(codes).shape for codes in got] == [(1, 0), (1, 0), (1, 320), (1, 640)]


def test_audio_longer_than_a_piece_equals_the_package_in_one_pass(tiny_codec):
    wave = random_wave(25 * tokens.SAMPLE_RATE)
    assert wave.shape[-1] > 2 * tokens.PIECE
    latents, codes, again = package_forward(tiny_codec, tiny_codec.model, wave)
    assert_same_codes(tiny_codec, latents, tiny_codec.encode(wave), codes)
    assert (tiny_codec.decode(codes) - again).abs().max() < min(1e-5, 1e-3 * again.std())


# ----------------------------------------------------------------------------- causal from the first code on

@pytest.mark.parametrize("t", [0, 1, 5])
def test_no_code_depends_on_a_sample_of_a_later_frame(pair, t):
    codec, _ = pair
    wave = random_wave(12 * HOP)
    other = torch.cat([wave[:, :(t + 1) * HOP], random_wave(12 * HOP)[:, (t + 1) * HOP:]], dim=-1)
    codes, others = codec.encode(wave), codec.encode(other)
    assert torch.equal(codes[..., :t + 1], others[..., :t + 1])
    assert not torch.equal(codes[..., t + 1], others[..., t + 1])
    assert torch.equal(codes[..., :t + 1], codec.encode(wave[:, :(t + 1) * HOP]))  # nor on there being later frames


@pytest.mark.parametrize("t", [0, 1, 5])
def test_a_code_depends_on_the_last_samples_of_its_frame(pair, t):
    codec, _ = pair
    wave = random_wave(12 * HOP)
    other = wave.clone()
    other[:, (t + 1) * HOP - 40: (t + 1) * HOP] += 0.5
    assert not torch.equal(codec.encode(wave)[..., t], codec.encode(other)[..., t])


@pytest.mark.parametrize("t", [0, 1, 5])
def test_no_sample_depends_on_a_later_code(pair, t):
    codec, _ = pair
    codes = codec.encode(random_wave(12 * HOP))
    other = codes.clone()
    other[..., t] = (other[..., t] + 1) % tokens.CODEBOOK_SIZE
    wave, others = codec.decode(codes), codec.decode(other)
    assert torch.equal(wave[:, :t * HOP], others[:, :t * HOP])
    assert not torch.equal(wave[:, t * HOP: (t + 1) * HOP], others[:, t * HOP: (t + 1) * HOP])


def test_the_package_alone_lets_the_first_codes_see_the_future(pair):
    """Why `encodec` begins with 8 frames of silence, and `mini` pads with zeros."""
    codec, package = pair
    wave = random_wave(12 * HOP)
    other = torch.cat([wave[:, :HOP], random_wave(12 * HOP)[:, HOP:]], dim=-1)
    (codes, _), (others, _) = package.encode(wave[:, None])[0], package.encode(other[:, None])[0]
    sees_the_future = not torch.equal(codes[..., 0], others[..., 0])
    assert sees_the_future == (codec.name == "encodec")
    assert codec.silence_frames == (SILENCE if sees_the_future else 0)


# ----------------------------------------------------------------------------- shapes, codebooks, gradients

def test_fewer_codebooks_are_the_first_of_all(pair):
    codec, _ = pair
    wave = random_wave(10 * HOP)
    codes = codec.encode(wave)
    assert codes.shape == (1, codec.n_codebooks, 10)
    for k in (1, 2, codec.n_codebooks):
        assert torch.equal(codec.encode(wave, n_codebooks=k), codes[:, :k])
        assert torch.equal(codec.stream_encoder(k).push(wave), codes[:, :k])
        assert codec.decode(codes[:, :k]).shape == (1, 10 * HOP)
    assert not torch.equal(codec.decode(codes[:, :1]), codec.decode(codes))


def test_fewer_codebooks_decode_as_the_package_decodes_them(pair):
    codec, package = pair
    wave, n = random_wave(10 * HOP), codec.silence_frames
    [(codes, _)] = package.encode(torch.cat([torch.zeros(1, n * HOP), wave], dim=-1)[:, None])
    for k in (1, 2, codec.n_codebooks):
        again = package.decode([(codes[:, :k], None)])[:, 0, n * HOP:]
        assert (codec.decode(codes[:, :k, n:]) - again).abs().max() < min(1e-5, 1e-3 * again.std())


@pytest.mark.parametrize("n", [0, 1, 319, 320, 321, 2000])
def test_samples_after_the_last_whole_frame_are_dropped(tiny_codec, n):
    wave = random_wave(n, batch=2)
    codes = tiny_codec.encode(wave)
    assert codes.shape == (2, 8, n // HOP) and codes.dtype == torch.int64
    assert torch.equal(codes, tiny_codec.encode(wave[:, :n // HOP * HOP]))
    again = tiny_codec.decode(codes)
    assert again.shape == (2, n // HOP * HOP) and again.dtype == torch.float32


def test_the_codec_never_carries_a_gradient(pair):
    codec, _ = pair
    assert not any(p.requires_grad for p in codec.model.parameters())
    assert not codec.model.training
    codes = codec.encode(random_wave(2 * HOP).requires_grad_())
    assert not codes.requires_grad and not codec.decode(codes).requires_grad


# ----------------------------------------------------------------------------- refusals, in one line

def refusal(call):
    """The one line with which `call` is refused."""
    with pytest.raises(CodecError) as refused:
        call()
    message = str(refused.value)
    assert message and "\n" not in message
    return message


def test_an_unknown_codec_is_refused_naming_the_known_ones():
    message = refusal(lambda: load_codec("mimi"))
    assert "mimi" in message and "mini" in message and "encodec" in message


@pytest.mark.parametrize("k", [-1, 0, 9])
def test_a_number_of_codebooks_that_the_codec_lacks_is_refused(tiny_codec, k):
    for encode in (tiny_codec.encode, lambda wave, k: tiny_codec.stream_encoder(k).push(wave)):
        assert f"1 to 8 codebooks, not {k}" in refusal(lambda: encode(random_wave(HOP), k))


@pytest.mark.parametrize("constant", ["HOP", "CODEBOOK_SIZE"])
def test_a_codec_of_another_stride_or_table_size_than_the_rest_counts_on_is_refused(monkeypatch, constant):
    model = build_mini(4, 16, 1)
    monkeypatch.setattr(tokens, constant, 512)
    with pytest.raises(AssertionError):
        Codec(model, "other", "0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_no_numbers_are_refused(tiny_codec, value):
    wave = random_wave(5 * HOP)
    wave[0, 700] = value
    assert "NaN or infinite" in refusal(lambda: tiny_codec.encode(wave))


@pytest.mark.parametrize("shape", [(HOP,), (1, 1, HOP)])
def test_a_waveform_of_another_shape_is_refused(tiny_codec, shape):
    assert str(shape) in refusal(lambda: tiny_codec.encode(torch.zeros(shape)))


def test_a_waveform_may_be_of_float64_but_not_of_integers(tiny_codec):
    wave = random_wave(5 * HOP)
    assert torch.equal(tiny_codec.encode(wave.double()), tiny_codec.encode(wave))
    assert "of floats" in refusal(lambda: tiny_codec.encode(wave.mul(32767).short()))


def test_a_codec_file_may_lie_in_the_home_folder(tiny_codec_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_codec_file.parent))
    assert load_codec(f"~/{tiny_codec_file.name}").name == tiny_codec_file.stem


@pytest.mark.parametrize("shape", [(8, 5), (1, 0, 5), (1, 9, 5), (1, 1, 1, 5)])
def test_codes_of_another_shape_are_refused(tiny_codec, shape):
    assert str(shape) in refusal(lambda: tiny_codec.decode(torch.zeros(shape, dtype=torch.long)))


@pytest.mark.parametrize("value", [-1, 1024])
def test_codes_out_of_range_are_refused(tiny_codec, value):
    codes = torch.zeros(1, 8, 5, dtype=torch.long)
    codes[0, 3, 2] = value
    assert "[0, 1024)" in refusal(lambda: tiny_codec.decode(codes))


def test_a_codec_file_cannot_run_code(tiny_codec_file, tmp_path):
    saved = torch.load(tiny_codec_file, weights_only=True)
    torch.save(saved | {"extra": Malicious(tmp_path / "ran")}, tmp_path / "bad.pt")
    assert "bad.pt is not a codec file" in refusal(lambda: load_codec(str(tmp_path / "bad.pt")))
    assert not (tmp_path / "ran").exists()


def test_a_long_clip_passes_in_pieces_and_leaves_no_more_than_a_moment_behind(tiny_codec):
    with mock.patch.object(tokens, "run_piece", side_effect=tokens.run_piece) as run_piece:
        tiny_codec.decode(tiny_codec.encode(random_wave(25 * 24_000)))
    assert max(call.args[1].shape[-1] for call in run_piece.call_args_list) <= tokens.PIECE
    encoder = tiny_codec.stream_encoder()
    encoder.push(random_wave(24_000))
    kept = [x for x in encoder.state.values() if isinstance(x, torch.Tensor)]
    assert kept and sum(x.untyped_storage().nbytes() for x in kept) < 24_000      # no views of something longer


def test_a_codec_file_gives_the_codec_that_was_saved(tiny_codec_file, tiny_codec):
    assert tiny_codec.name == "tiny" and tiny_codec.n_codebooks == 8
    assert hashlib.sha256(tiny_codec_file.read_bytes()).hexdigest().startswith(tiny_codec.checksum)
    saved = torch.load(tiny_codec_file, weights_only=True)["weights"]
    for key, value in tiny_codec.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, saved[key].float())


def test_a_truncated_codec_file_is_refused(tiny_codec_file, tmp_path):
    data = tiny_codec_file.read_bytes()
    for n in (0, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:n])
        assert "cut.pt" in refusal(lambda: load_codec(str(tmp_path / "cut.pt")))


def test_a_codec_file_that_must_not_be_read_is_refused(tiny_codec_file, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert f"cannot read {tiny_codec_file} (Permission denied)" in refusal(lambda: load_codec(str(tiny_codec_file)))


def test_a_codec_in_a_folder_that_may_not_be_entered_is_refused(tiny_codec_file):
    with closed(tiny_codec_file.parent):
        assert f"no codec '{tiny_codec_file}'" in refusal(lambda: load_codec(str(tiny_codec_file)))


def test_a_file_that_is_no_codec_is_refused(tiny_codec_file, tmp_path):
    (tmp_path / "text.pt").write_text("not a codec\n" * 100)
    saved = torch.load(tiny_codec_file, weights_only=True)
    part = dict(list(saved["weights"].items())[3:])
    for name, content in {"list.pt": [1, 2], "model.pt": {"model": {}, "step": 7},
                          "config.pt": saved | {"config": {"n_layer": 4}}, "part.pt": saved | {"weights": part},
                          "size.pt": saved | {"config": dict(n_filters=8, dimension=16, lstm=1)},
                          "more.pt": saved | {"weights": saved["weights"] | {"more": torch.zeros(3)}}}.items():
        torch.save(content, tmp_path / name)
    for path in tmp_path.iterdir():
        assert path.name in refusal(lambda: load_codec(str(path)))


def test_a_mini_file_with_one_wrong_byte_is_refused(tiny_codec_file, tmp_path, monkeypatch):
    data = bytearray(tiny_codec_file.read_bytes())
    path = tmp_path / "mini.pt"
    path.write_bytes(data)
    monkeypatch.setattr(tokens, "MINI", path)
    monkeypatch.setattr(tokens, "MINI_SHA256", hashlib.sha256(data).hexdigest())
    assert load_codec("mini").name == "mini"
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refusal(lambda: load_codec("mini"))
    assert str(path) in message and "git checkout" in message
    path.unlink()
    assert "mini" in refusal(lambda: load_codec("mini"))


# ----------------------------------------------------------------------------- Meta's weights

@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A file laid out like Meta's 24 kHz weights, random, named as they are by the first digits of its SHA-256."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("meta")
    torch.save(liven(package_24khz()).state_dict(), folder / "weights")
    with open(folder / "weights", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (folder / "weights").rename(folder / f"encodec_24khz-{digest[:8]}.th")


@pytest.fixture
def meta(stand_in, tmp_path, monkeypatch):
    """A web server in place of Meta's, with an empty cache. The download and its check are the package's own."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "www")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    get_pretrained = EncodecModel._get_pretrained
    monkeypatch.setattr(EncodecModel, "_get_pretrained",
                        staticmethod(lambda name, repository=None: get_pretrained(stand_in.name, repository)))
    monkeypatch.setattr(tokens, "ENCODEC_FILE", stand_in.name)
    monkeypatch.setattr(tokens, "ENCODEC_SHA256", stand_in.stem.split("-")[1])
    monkeypatch.setattr(encodec.model, "ROOT_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path / "www", server
    server.shutdown()
    server.server_close()


def assert_is_stand_in(codec, stand_in):
    saved = torch.load(stand_in, weights_only=True)
    assert codec.name == "encodec" and codec.n_codebooks == 32 and codec.checksum in stand_in.name
    for k in (0, 31):
        key = f"quantizer.vq.layers.{k}._codebook.embed"
        assert torch.equal(codec.model.state_dict()[key], saved[key])


def test_encodec_is_downloaded_once_and_then_read_from_the_cache(meta, stand_in):
    www, server = meta
    (www / stand_in.name).hardlink_to(stand_in)
    assert_is_stand_in(load_codec("encodec"), stand_in)
    server.shutdown()
    server.server_close()
    codec = load_codec("encodec")
    assert_is_stand_in(codec, stand_in)
    assert codec.encode(random_wave(3 * HOP)).shape == (1, 32, 3)


def test_a_download_with_wrong_bytes_is_refused_and_not_kept(meta, stand_in, tmp_path):
    www, _ = meta
    (www / stand_in.name).write_text("a proxy's log-in page")
    assert stand_in.name in refusal(lambda: load_codec("encodec"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cached_file_damaged_since_is_refused(meta, stand_in, tmp_path):
    cached = tmp_path / "cache" / "hub" / "checkpoints" / stand_in.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(stand_in.read_bytes()[:100_000])
    assert stand_in.name in refusal(lambda: load_codec("encodec"))
    torch.save({"weight": torch.zeros(1)}, cached)         # readable, but another network's
    assert stand_in.name in refusal(lambda: load_codec("encodec"))
    content = bytearray(stand_in.read_bytes())
    content[len(content) // 2] ^= 1                        # one weight is another
    cached.write_bytes(content)
    assert f"{cached} is damaged" in refusal(lambda: load_codec("encodec"))


def test_encodec_without_a_network_names_the_address_and_the_option(meta, stand_in):
    _, server = meta
    for online in (True, False):                           # first 404, then nobody answers
        if not online:
            server.shutdown()
            server.server_close()
        message = refusal(lambda: load_codec("encodec"))
        assert encodec.model.ROOT_URL + stand_in.name in message
        assert "--codec-dir" in message and "--codec mini" in message
        assert ("HTTP Error 404" in message) == online


def test_encodec_is_read_from_a_folder_without_a_network(meta, stand_in, monkeypatch):
    assert_is_stand_in(load_codec("encodec", folder=str(stand_in.parent)), stand_in)
    monkeypatch.setenv("HOME", str(stand_in.parent.parent))
    assert_is_stand_in(load_codec("encodec", folder=f"~/{stand_in.parent.name}"), stand_in)


def test_a_folder_without_the_weights_or_with_wrong_ones_is_refused(meta, stand_in, tmp_path):
    folder = tmp_path / "folder"
    assert str(folder) in refusal(lambda: load_codec("encodec", folder=folder))
    folder.mkdir()
    assert str(folder) in refusal(lambda: load_codec("encodec", folder=folder))
    (folder / stand_in.name).write_bytes(stand_in.read_bytes()[:-1])
    assert "checksum" in refusal(lambda: load_codec("encodec", folder=folder))


# ----------------------------------------------------------------------------- the bundled codec

def test_mini_is_small():
    codec = load_codec("mini")
    assert codec.n_codebooks == 8 and codec.silence_frames == 0
    assert tokens.MINI.stat().st_size <= 10 * 2 ** 20


@pytest.mark.parametrize("view", [lambda wave: wave, lambda wave: log_mel(wave, window=HANN)], ids=["waveform", "mel"])
def test_each_doubling_of_minis_codebooks_brings_the_audio_closer(view):
    codec = load_codec("mini")
    samples, rate = soundfile.read(sorted((SPEECH / "val").glob("*.ogg"))[0], dtype="float32", frames=5 * 24_000)
    wave = torch.from_numpy(samples)[None, :len(samples) // HOP * HOP]
    assert rate == tokens.SAMPLE_RATE
    codes = codec.encode(wave)
    distances = [(view(codec.decode(codes[:, :k])) - view(wave)).abs().mean().item() for k in (1, 2, 4, 8)]
    assert distances == sorted(distances, reverse=True), distances


def test_convolutions_of_the_codec_do_not_round_on_a_gpu():
    torch.backends.cudnn.allow_tf32 = True                    # torch's default; codes would be others than a CPU's
    runpy.run_path(tokens.__file__)
    assert not torch.backends.cudnn.allow_tf32


def test_a_folder_of_weights_goes_with_encodec_alone(tmp_path):
    assert "goes with codec encodec" in refusal(lambda: load_codec("mini", folder=tmp_path))


@pytest.mark.parametrize("torchaudio, loads", [("loads = True", True), ("raise OSError('libc10_cuda.so')", False),
                                               ("raise RuntimeError('compiled with different CUDA versions')", False)])
def test_a_torchaudio_that_cannot_be_loaded_is_replaced_and_no_other(tmp_path, torchaudio, loads):
    (tmp_path / "torchaudio.py").write_text(torchaudio)
    code = "import sys, tokens; print(hasattr(sys.modules['torchaudio'], 'loads'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SPEECH.parent.parent)])})
    assert done.stdout.strip() == str(loads), done.stderr


def test_inside_autocast_codes_and_sound_are_the_same(pair):
    codec, _ = pair
    wave = 0.1 * torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(wave)
    with torch.autocast("cpu", torch.bfloat16):
        again, heard = codec.encode(wave), codec.decode(codes)
    assert torch.equal(again, codes) and torch.equal(heard, codec.decode(codes))
