"""Devices: which one a command uses, how torch uses it, and in which dtype."""

import sys

import torch

from common import processes
from common.cli import InputError


def pick_device(name):
    """Return --device as a torch.device."""
    if name is None:  # mps is not the default, because it lacks some operations
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.ones(1, device=name).device  # a GPU too old for this torch fails to compute it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device: cannot use {name} ({reason})") from None


def prepare_device(name):
    """Return --device as a torch.device that is ready for a run. Each process gets another GPU."""
    if processes.WORLD > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{processes.LOCAL_RANK}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and memory_gb use the current device
        # torch compiles code for a number of threads. Each thread of autograd has one, so have one
        # here, too. Otherwise they would compile everything again.
        torch.set_num_threads(1)
        # Take the flash kernels on an H100, too. There torch prefers cuDNN's attention, which
        # gave NaN gradients elsewhere (pull request 264 of kyutai-labs/pocket-tts).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(device):
    """Return the name of the dtype in which steps are computed by default on a device."""
    if device.type == "cuda":
        # GPUs have had bfloat16 units since Ampere, which is compute capability 8.
        capability = torch.cuda.get_device_capability(device)
        return "bfloat16" if capability[0] >= 8 else "float16"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        if torch.cpu.get_capabilities().get("avx512_bf16"):
            return "bfloat16"
    return "float32"


def compile_parts(model):
    """Let the towers and the word head be compiled when they are first used."""
    print("The first steps compile the model, which can take minutes.")
    # Compile part by part. Otherwise longer captions would recompile the image tower, too.
    for part in model.children():
        part.compile()


def can_compile(device):
    """Return whether torch.compile works with CUDA under Linux, and say why not. Many containers
    lack what it needs, and without this trial a run would end in its first step."""
    if device.type != "cuda" or sys.platform != "linux":
        return False
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
        return True
    except Exception as error:  # each missing part has another kind
        reason = str(error).partition("\n")[0]
        print(f"torch.compile does not work here, so training takes longer. {reason}")
        return False
