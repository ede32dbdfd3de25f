"""Everything that a metric depends on, as a dictionary and as one line."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tvmatch.distributed import Processes
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.feature_request import FeatureRequest
from tvmatch.evaluation.references.files import Reference
from tvmatch.generation.uint8 import ROUNDING
from tvmatch.trained_model import TrainedModel

_PACKAGES = ("torch", "numpy", "torchvision", "torch_fidelity", "transformers", "diffusers")


def provenance_of(
    model: TrainedModel,
    extractor: Extractor,
    reference: Reference | None,
    request: FeatureRequest,
    processes: Processes,
) -> dict[str, Any]:
    """Everything that metrics depend on except guidance and steps, as JSON values."""
    _, height, width = model.output_shape
    dtype = str(next(model.network.parameters()).dtype).removeprefix("torch.")
    device = str(model.device)
    if model.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(model.device)})"
        # Sampling may use TensorFloat-32; extractors never do.
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        dtype += f" (matmul {matmul.fp32_precision}, convolution {convolution.fp32_precision})"
    return {
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "rounding": ROUNDING[request.uint8],
        "resolution": [height, width],
        "samples": request.count,
        "classes": model.spec.class_count,
        "labels_from": request.labels_from or ("k mod K" if model.spec.class_count else None),
        "reference": None if reference is None else dict(reference.provenance),
        "seed": request.seed,
        "batch_size": request.batch_size,
        "processes": processes.world_size,
        "model_step": model.step,
        "autoencoder": _autoencoder(model),
        "device": device,
        "precision": dtype,
        "versions": _versions(),
    }


def _autoencoder(model: TrainedModel) -> dict[str, str] | None:
    """The autoencoder that decodes, or if it has no such attributes the one that encoded the latents."""
    expected = model.spec.autoencoder
    if expected is None:
        return None
    return {
        name: str(getattr(model.decoder, name, None) or getattr(expected, name))
        for name in ("source", "fingerprint")
    }


def _versions() -> dict[str, str]:
    """Versions of tvmatch, Python and the imported packages."""
    found = {"tvmatch": _version("tvmatch"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _PACKAGES if name in sys.modules}


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def provenance_line(provenance: dict[str, Any]) -> str:
    """The provenance as one line; with guidance and steps if they are in the dictionary."""
    reference, autoencoder = provenance["reference"], provenance["autoencoder"]
    parts = [
        f"extractor {provenance['extractor']} {provenance['extractor_fingerprint'][:12]}",
        f"{provenance['samples']:,} samples",
        f"{'×'.join(map(str, provenance['resolution']))} pixels as uint8, {provenance['rounding']}",
        _label_words(provenance),
        "no reference" if reference is None else _reference_words(reference),
        f"seed {provenance['seed']}",
    ]
    if "guidance" in provenance:
        parts += [f"guidance {provenance['guidance']:g}", f"steps {provenance['steps']}"]
    parts += [
        f"{provenance['model_step']:,} training steps",
        f"autoencoder {autoencoder['source']} {autoencoder['fingerprint'][:12]}" if autoencoder else "pixels",
        f"{provenance['device']}, {provenance['precision']}, batches of {provenance['batch_size']}",
        ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
    ]
    return "; ".join(parts)


def _label_words(provenance: dict[str, Any]) -> str:
    if not provenance["classes"]:
        return "no labels"
    return {
        "data": f"labels drawn as the training data of {provenance['classes']} classes have them",
        "uniform": f"labels drawn uniformly of {provenance['classes']} classes",
    }.get(provenance["labels_from"], f"labels k mod {provenance['classes']}")


def _reference_words(reference: dict[str, Any]) -> str:
    """Path, hash, number of images and kind of the reference."""
    kind, _, digest = str(reference["fingerprint"]).rpartition(" ")
    words = f"reference {reference['source']} ({f'{kind} {digest[:12]}'.strip()}"
    if "images" in reference:
        words += f", {reference['images']:,} images"
    if "split" in reference:
        words += f", split {reference['split']}, crop {reference['crop']}"
    return words + (")" if reference["kind"] == "images" else f", {reference['kind']})")
