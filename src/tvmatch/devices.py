"""Devices and precisions by name."""

import re
import warnings

import torch

from tvmatch.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if it is available, else the CPU.

    Raises:
        InputError: for an unknown name, or a device that is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # about deprecated names
            device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # has no data
        raise InputError("device", f"no device is called {name!r}; use auto, cpu, cuda, cuda:1, …")
    try:
        torch.empty(0, device=device)
    except (NotImplementedError, ImportError):  # their messages are long lists of operators and backends
        raise InputError("device", f"{name!r} cannot be used (this PyTorch is built without it)") from None
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        if "INTERNAL ASSERT" in reason:
            reason = "PyTorch has no tensors there"
        raise InputError("device", f"{name!r} cannot be used ({reason})") from None
    return device


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`wanted`; "auto" is bfloat16 if the device supports it in hardware, else float32."""
    if wanted != "auto":
        return wanted
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if supported else "float32"
