"""
python -m pytest tests/test_devices.py

Would it run on a GPU? The scripts run here with `--device cuda`, but on the CPU: every tensor that would be on the GPU
is marked, and each function that is given marked and unmarked ones is reported.
"""
import functools
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from torch.overrides import TorchFunctionMode

import data
import mel
import sample
import train

MAY_MIX = ("to", "type_as", "copy_", "__getitem__", "__setitem__", "__set__", "_has_compatible_shallow_copy_type")


def flat(x):
    """All that is in x, a value or nested lists, tuples and dicts of values."""
    if isinstance(x, (list, tuple, dict)):
        return [leaf for part in (x.values() if isinstance(x, dict) else x) for leaf in flat(part)]
    return [x]


class PretendGPU(TorchFunctionMode):
    """Within it "cuda" is the CPU; `problems` names the functions that were given tensors of both."""

    def __init__(self):
        super().__init__()
        self.marks, self.problems = {}, []                    # address of a storage -> (is it on the GPU?, the storage)

    def on_gpu(self, tensor):
        return self.marks.get(tensor.untyped_storage()._cdata, (False,))[0]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":       # they only read a device
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda" if self.on_gpu(args[0]) else "cpu")
        if name == "pin_memory":
            return args[0]
        is_place = lambda x: isinstance(x, torch.device) or isinstance(x, str) and x in ("cpu", "cuda")
        leaves = flat((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        places = [torch.device(x).type for x in leaves if is_place(x)] + ["cpu"] * (name == "cpu")
        gpu = places[0] == "cuda" if places else any(map(self.on_gpu, tensors[-1:] if name == "type_as" else tensors))
        kinds = {self.on_gpu(x) for x in tensors if x.dim()}  # a GPU takes single numbers from the CPU
        if len(kinds) > 1 and name not in MAY_MIX or name == "numpy" and True in kinds:
            here = [f for f in traceback.extract_stack() if Path(f.filename).parent == data.ASSETS.parent]
            self.problems.append(f"{name} in {here[-1].filename}, line {here[-1].lineno}" if here else name)
        on_cpu = lambda x: torch.device("cpu") if is_place(x) else x
        result = func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        memory = {x.untyped_storage()._cdata for x in tensors}
        if places and isinstance(result, torch.Tensor) and result.untyped_storage()._cdata in memory \
                and self.on_gpu(result) != gpu:
            result, memory = result.clone(), set()            # moved: no longer the same memory
        for out in flat(result):
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in memory:
                self.marks[out.untyped_storage()._cdata] = gpu, out.untyped_storage()
        return result


def test_only_what_a_gpu_would_refuse_is_a_problem():
    with PretendGPU() as pretended:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        layer = torch.nn.Linear(3, 3).to("cuda")
        assert there.device.type == layer(there).device.type == here.to("cuda").device.type == "cuda"
        assert here.device.type == there.cpu().device.type == "cpu"
        there + torch.tensor(1.0), there.cpu() + here, there[torch.tensor([0])], there.cpu().numpy(), here.type_as(there)
        assert pretended.problems == []
        there + here, layer(here), there.numpy()
    assert pretended.problems == ["add", "linear", "numpy"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    for i in range(3):
        noise = 0.1 * np.random.default_rng(i).standard_normal(12_000 + 4_000 * i)
        soundfile.write(folder / f"{i}.wav", noise, 24_000)
    return folder


@pytest.fixture(scope="module")
def problems(clips, tiny_codec_file, tmp_path_factory):
    """problems(script, *options): what a GPU would have refused."""
    cache = tmp_path_factory.mktemp("cache")

    def problems(script, *options):
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        handlers = [signal.getsignal(number) for number in numbers]
        argv = [f"{script.__name__}.py", "--device", "cuda", *map(str, options)]
        with mock.patch.object(sys, "argv", argv), \
                mock.patch.object(train, "prepare", functools.partial(data.prepare, cache=cache, quiet=True)):
            mel._constants.cache_clear()                      # marks are not kept from one call to the next
            try:
                with PretendGPU() as pretended:
                    script.main()
            finally:
                mel._constants.cache_clear()
                for number, handler in zip(numbers, handlers):
                    signal.signal(number, handler)
        assert any(gpu for gpu, _ in pretended.marks.values())
        return pretended.problems
    return problems


@pytest.mark.parametrize("options", [
    ["--own-details"], ["--mix", "0", "--set", "n_input_codebooks=8", "mel_noise=0.5"],
    ["--model", "nano-gpt", "--accumulate", "2"], ["--latents", "--set", "use_codes=False"],
    ["--n-codebooks", "1", "--window", "512", "512", "--lookahead", "192"]])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_training_and_sampling_keep_devices_apart(problems, clips, tiny_codec_file, tmp_path, options):
    small = ["--dataset", clips, "--codec", tiny_codec_file, "--context", 16, "--batch-size", 4, "--no-compile"]
    out = tmp_path / "out.pt"
    assert problems(train, *small, "--steps", 3, "--eval-every", 2, "--out", out, *options) == []
    if options == ["--own-details"]:
        assert problems(train, "--resume", "--out", out) == []
        assert problems(train, "--eval", out) == []
        beyond_context = ["--seconds", 0.1, "--prompt", clips / "0.wav", "--num", 2]
        assert problems(sample, "--ckpt", out, *beyond_context, "--top-p", 0.9, "--out", tmp_path / "a.wav") == []
