"""conftest.py: what all tests share. `python -m pytest` from the repository root runs them all but those marked slow,
which `python -m pytest --slow` runs, too."""
import contextlib
import errno
import functools
import io
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"        # tests are tiny: a second thread, here or in a script they start, only waits

import numpy as np                                                 # noqa: E402
import pytest                                                      # noqa: E402
import soundfile                                                   # noqa: E402
import torch                                                       # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data                                                        # noqa: E402  (needs the path above)
import tokens                                                      # noqa: E402
from mel import SAMPLE_RATE                                        # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=skip)
        items[:] = [item for item in items if item not in skip]


@pytest.fixture(autouse=True)
def same_random_numbers_whatever_ran_before():
    torch.manual_seed(1)


@contextlib.contextmanager
def ending(process):
    """A process that does not outlive the block, whatever fails in it."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process):
    """Wait until condition() holds; fail if the process ends before, or after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def run_script(folder, script, *options, prepare=data.prepare):
    """A script in this process (torch is imported once), as if called in `folder`: its status, output and errors.

    Whatever is no SystemExit, which is what a user would see as a traceback, fails the test.
    """
    out, err, code = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(sys, "argv", [str(script), *map(str, options)]), \
            mock.patch.object(data, "prepare", prepare):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if isinstance(code, str):                                 # sys.exit("error: …") prints its message and exits 1
        err.write(code + "\n")
        code = 1
    return SimpleNamespace(code=code, out=out.buffer.getvalue().decode(), err=err.getvalue())


def assert_refused(result, *words):
    """One clear line, no traceback, and a status that scripts notice."""
    last = result.err.strip().splitlines()[-1]
    assert result.code not in (0, None)
    assert last.startswith(("error: ", "train.py: error: ", "sample.py: error: ")), result.err
    assert "Traceback" not in result.err
    assert all(word in last for word in words), last


def noise(seconds, rate=SAMPLE_RATE, channels=1, seed=0):
    """Noise that swells and fades, (n, channels)."""
    n = round(seconds * rate)
    swell = np.sin(np.arange(n) / rate * 7 + seed) ** 2
    return 0.2 * swell[:, None] * np.random.default_rng(seed).standard_normal((n, channels)).clip(-4, 4)


@contextlib.contextmanager
def closed(folder):
    """A folder that may not be entered: nothing can be learnt about what is in it. (chmod would not stop root.)"""
    stat = os.stat

    def refusing(path, **options):
        if not isinstance(path, int) and folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return stat(path, **options)
    with mock.patch.object(os, "stat", refusing):
        yield


def spy(owner, name):
    """`with spy(owner, name) as calls`: the function works as ever, and calls.call_args_list has what it was given."""
    return mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


class Malicious:
    """Pickled, it asks whoever loads it to make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@torch.no_grad()
def liven(model):
    """Make a random codec listen, and fill its codebooks with normal vectors as wide as what reaches them.

    Fresh weights shrink a signal layer by layer until only the biases are left. With small biases and larger weights
    the latents follow the audio: then neighbouring codes differ, and a change in the audio changes them.
    """
    for name, parameter in model.named_parameters():
        parameter.mul_(0.1 if "bias" in name else 3 ** 0.5)
    residual = model.encoder(0.3 * torch.randn(1, 1, 100 * tokens.HOP))[0].T       # (100, C)
    for layer in model.quantizer.vq.layers:
        embed = layer._codebook.embed                                               # (1024, C)
        embed.copy_(residual.mean(0) + 0.5 * residual.std(0) * torch.randn(embed.shape))
        layer._codebook.inited.fill_(1)
        residual = residual - embed[layer._codebook.encode(residual)]
    return model.eval()


@pytest.fixture(scope="session")
def tiny_codec_file(tmp_path_factory):
    """A codec file in the format of assets/train_codec.py, weights random: its codes vary, and decode to noise."""
    torch.manual_seed(1)
    config = dict(n_filters=4, dimension=16, lstm=1)
    model = liven(tokens.build_mini(**config))
    path = tmp_path_factory.mktemp("codec") / "tiny.pt"
    torch.save({"config": config, "weights": {key: value.half() for key, value in model.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="session")
def tiny_codec(tiny_codec_file):
    return tokens.load_codec(str(tiny_codec_file))


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, tiny_codec_file):
    """A checkpoint of train.py after four steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "clips").mkdir()
    for i in range(4):
        soundfile.write(folder / "clips" / f"{i}.wav", noise(1.0, seed=i), SAMPLE_RATE)
    prepare = functools.partial(data.prepare, cache=folder / "cache", quiet=True)
    done = run_script(folder, ROOT / "train.py", "--dataset", "clips", "--codec", tiny_codec_file,
                      "--steps", 4, "--eval-every", 4, "--context", 32, "--batch-size", 2, "--device", "cpu",
                      "--model", "nano", prepare=prepare)
    assert done.code == 0, done.err
    return folder / "out.pt"
