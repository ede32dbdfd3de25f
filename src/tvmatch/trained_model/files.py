"""Files of checkpoints: their folders, JSON and tensors. Reading executes no code."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvmatch.condition import MOST_GUIDANCE, Guidance
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.storage.files import expect_no_lfs_pointer, read_json_file

FORMAT = "tvmatch-model-1"
Read = TypeVar("Read")


def read_spec(path: str | Path) -> DataSpec:
    """The data specification of a checkpoint, read without its weights.

    Raises:
        InputError: if there is no checkpoint at the path.
    """
    return of_newest(Path(path), _read_spec)


def _read_spec(folder: Path) -> DataSpec:
    file = folder / "model.json"
    try:
        return DataSpec.from_description(read_json(file, FORMAT)["data"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(file, f"not a model description of this version ({error})") from None


def guidance_from(numbers: Any) -> Guidance:
    """A guidance weight or a range from JSON. Raises TypeError or ValueError for anything else."""
    low, high = map(float, numbers if isinstance(numbers, list) else [numbers] * 2)
    if not 1 <= low <= high <= MOST_GUIDANCE:
        raise ValueError(f"guidance {numbers}")
    return (low, high) if isinstance(numbers, list) else low


def of_newest(path: Path, read: Callable[[Path], Read]) -> Read:
    """Call `read` on a checkpoint folder: `path` itself, or the newest checkpoint of a run folder.

    A running training may remove the newest checkpoint while it is read; then the next one is read.

    Raises:
        InputError: from `read`, or if there is no checkpoint.
    """
    while True:
        folder = find_checkpoint(path)
        try:
            return read(folder)
        except (InputError, OSError):
            if os.path.lexists(folder / "model.json"):  # it was not removed
                raise


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at `path`: itself, or the newest of a run folder.

    Raises:
        InputError: if there is none.
    """
    if (path / "model.json").is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    if path.exists():
        raise InputError(path, "no checkpoint here (a folder with model.json, or a run folder)")
    raise InputError(path, "no such file or folder")


def checkpoints(run: Path, file: str = "model.json") -> list[Path]:
    """The checkpoints of a run folder that hold `file`, in the order of their steps.

    A checkpoint that is being written has another name.
    """
    found = [path.parent for path in run.glob(f"checkpoints/step_*/{file}")]
    return sorted((path for path in found if path.name.removeprefix("step_").isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def read_json(path: Path, expected_format: str) -> dict[str, Any]:
    """Read a JSON object. Raises InputError unless its `format` is as expected."""
    content = read_json_file(path)
    if not isinstance(content, dict) or content.get("format") != expected_format:
        raise InputError(path, f"its format is not {expected_format}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises InputError if it is missing, truncated or of another format."""
    expect_no_lfs_pointer(path)
    try:
        return load_file(path, device="cpu")
    except FileNotFoundError:
        raise InputError(path, "missing") from None
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"truncated or not a safetensors file ({error})") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Tied weights and views are copied, since the format does not support them."""
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    save_file(own, path)


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load a state dict. Raises InputError unless it has exactly the tensors of the module."""
    expect_tensors(module, tensors, source)
    module.load_state_dict(tensors, strict=True)


def expect_tensors(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Raise InputError unless names, shapes and dtypes of the tensors are those of a module."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise InputError(source, f"missing tensors {missing[:3]}, unexpected tensors {extra[:3]}")
    for name, tensor in tensors.items():
        own = expected[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise InputError(
                source,
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"the network's is {own.dtype} of shape {tuple(own.shape)}",
            )
