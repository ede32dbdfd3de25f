"""Save and load checkpoints: folders of safetensors and JSON files, written atomically.

docs/architecture.md lists the files. Random numbers are functions of (seed, step, row), so no generator state
is saved.
"""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from tvmatch import seeds
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel, files
from tvmatch.trained_model.files import load_tensors, read_json, read_tensors, save_tensors
from tvmatch.training.state import TrainingState

FORMAT = "tvmatch-training-1"


def build_facts(device: torch.device) -> dict[str, Any]:
    """What must be unchanged for a resumed run to equal an uninterrupted one bit for bit."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": device.type,
        "numpy": np.__version__,  # `seeds` uses its generators
        "random_streams": seeds.VERSION,
    }


def save_checkpoint(
    run: Path, state: TrainingState, model: TrainedModel, build: dict[str, Any], *, keep: int | None
) -> Path:
    """Write the checkpoint of `state.step`; if this fails, earlier checkpoints are not damaged.

    Files are written to a temporary folder and flushed to disk; then the folder is renamed.

    Args:
        run: the run folder.
        state: the training state.
        model: the trained model for this state.
        build: see `build_facts`.
        keep: number of newest checkpoints to keep; None keeps all.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: if it cannot be written, for example because the disk is full.
    """
    folder = run / "checkpoints"
    final, partial = folder / f"step_{state.step:07d}", folder / f".step_{state.step:07d}.partial"
    if final.exists():
        return final  # training is deterministic: this step was saved before with the same content
    try:
        for incomplete in folder.glob(".step_*"):  # the run was killed while it wrote or removed it
            shutil.rmtree(incomplete)
        partial.mkdir(parents=True)
        model.save(partial)
        save_tensors(_tensors(state), partial / "training.safetensors")
        facts = {"format": FORMAT, "step": state.step, "seconds": state.seconds, "build": build}
        (partial / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(final, f"cannot be saved ({error}); {last_checkpoint(run)}") from None
    if keep is not None:
        for old in checkpoints(run)[:-keep]:
            removed = old.rename(old.with_name(f".{old.name}.removed"))  # removal may be interrupted
            shutil.rmtree(removed)
    return final


def first_non_finite(state: TrainingState) -> str | None:
    """The name of the first tensor of the state with non-finite values; None if all are finite."""
    tensors = _tensors(state) | {
        f"evaluation/{name}": tensor for name, tensor in state.evaluation.network.state_dict().items()
    }
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def load_checkpoint(folder: Path, state: TrainingState) -> dict[str, Any]:
    """Load a checkpoint into `state`.

    Returns:
        The `build_facts` at the time it was written.

    Raises:
        InputError: if a file is missing, truncated, or does not fit the configuration's network.
    """
    facts = read_json(folder / "training.json", FORMAT)
    source = folder / "training.safetensors"
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(source).items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    evaluation = read_tensors(folder / "model.safetensors")
    if "network" not in groups:
        raise InputError(source, f"holds no network, only {sorted(groups)}")
    if state.target is not None and "target" not in groups:
        raise InputError(source, "holds no target average, which objective.target_ema above 0 needs")
    load_tensors(state.network, groups["network"], source)
    load_tensors(state.evaluation.network, evaluation, folder / "model.safetensors")
    if state.target is not None:
        load_tensors(state.target.network, groups["target"], source)
    try:
        state.step, state.seconds = int(facts["step"]), float(facts["seconds"])
        build: dict[str, Any] = dict(facts["build"])
    except (KeyError, TypeError, ValueError):
        raise InputError(folder / "training.json", "incomplete") from None
    _load_moments(state, groups, source)
    return build


def last_checkpoint(run: Path) -> str:
    """The newest checkpoint as text, for the end of an error message."""
    saved = checkpoints(run)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder that training can resume from, oldest first."""
    return files.checkpoints(run, "training.json")


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {f"network/{name}": tensor for name, tensor in state.network.state_dict().items()}
    if state.target is not None:
        tensors |= {f"target/{name}": tensor for name, tensor in state.target.network.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                tensors[f"{moment}/{name}"] = moments[moment]
    return tensors


def _load_moments(state: TrainingState, groups: dict[str, dict[str, Tensor]], source: Path) -> None:
    """Load AdamW's moments. Before the first step, and for parameters without a gradient, there are none."""
    if state.step == 0:
        return
    if not {"exp_avg", "exp_avg_sq"} <= groups.keys():
        raise InputError(source, "holds no moments of AdamW: exp_avg and exp_avg_sq are missing")
    for name, parameter in state.network.named_parameters():
        if name not in groups["exp_avg"] and name not in groups["exp_avg_sq"]:
            continue
        moments = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            tensor = groups[moment].get(name)
            if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise InputError(
                    source, f"{moment}/{name} is missing, or has another shape or dtype than the parameter"
                )
            moments[moment] = torch.empty_like(parameter).copy_(tensor)  # with the parameter's strides
        # Fused AdamW keeps its step count on the parameter's device, otherwise it is on the CPU.
        device = parameter.device if state.optimizer.defaults.get("fused") else "cpu"
        steps = torch.tensor(float(state.step), dtype=torch.float32, device=device)
        state.optimizer.state[parameter] = {"step": steps, **moments}


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
