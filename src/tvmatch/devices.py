"""The device and the precision that a name stands for."""

import re
import warnings

import torch

from tvmatch.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: for a name that PyTorch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that PyTorch is going to forget
            device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # PyTorch knows it, but it holds no numbers
        raise InputError("device", f"no device is called {name!r}; take auto, cpu, cuda, cuda:1, …")
    try:
        torch.empty(0, device=device)
    except (NotImplementedError, ImportError):  # whose message is a page about operators and backends
        raise InputError("device", f"{name!r} cannot be used (this PyTorch is built without it)") from None
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        if "INTERNAL ASSERT" in reason:
            reason = "PyTorch has no tensors there"
        raise InputError("device", f"{name!r} cannot be used ({reason})") from None
    return device


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`wanted`, or for "auto" bfloat16 where the device computes it itself, else float32."""
    if wanted != "auto":
        return wanted
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if supported else "float32"
