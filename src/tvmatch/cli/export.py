"""`tvmatch export`: write a checkpoint for other programs, or upload it to the Hub."""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image
from safetensors.torch import save_file

from tvmatch import pictures
from tvmatch.cli import options, results
from tvmatch.config.parser import OneLineParser
from tvmatch.errors import InputError
from tvmatch.evaluation.report import metrics_files
from tvmatch.interop import expect_dit, hub, network_to_authors
from tvmatch.storage.files import new_folder, replacing
from tvmatch.storage.hub import check_repository_name, upload
from tvmatch.trained_model import TrainedModel, load
from tvmatch.trained_model.files import find_checkpoint
from tvmatch.training import CONFIG_NAME

DESCRIPTION = """\
Write the evaluation weights of a checkpoint for other programs. --layout hub writes a folder with a model
card, for tvmatch.from_pretrained. --layout diffusers writes a pipeline with a model card, for
tvmatch.diffusers.TVMPipeline.from_pretrained. Both include the autoencoder of a model of latents. --layout
authors writes one .safetensors file with the parameter names of the TVM authors. The model card shows
samples, the configuration of the run, and the metrics (metrics*.json) of this checkpoint.
--push uploads the folder to the Hugging Face Hub as a new commit. Local files are never overwritten."""

LAYOUTS = ("hub", "diffusers", "authors")


def run(arguments: list[str]) -> int:
    """Write the files, and upload them with --push."""
    parser = OneLineParser(prog="tvmatch export", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    add = options.adder(parser)
    add("--layout", required=True, help=", ".join(LAYOUTS))
    add("--out", help="new folder, or new .safetensors file for --layout authors")
    add("--push", help="repository on the Hub to upload to, USER/NAME")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    add("--license", help="license of the weights for the model card, such as cc-by-4.0")
    parsed = parser.parse_args(arguments)
    out = None if parsed.out is None else Path(parsed.out)
    _check(parsed, out)
    if parsed.layout == "authors":
        assert out is not None
        _write_authors(load(parsed.checkpoint), out)
        results.show_paths([out])
        return 0

    model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
    if parsed.layout == "diffusers":
        expect_dit(model, "layout", "diffusers")
    card: dict[str, Any] = {
        "metrics": metrics_files(parsed.checkpoint, model.step),
        "samples": _samples(model),
        "config": _config(Path(parsed.checkpoint)),
        "license": parsed.license,
        "repo_id": parsed.push,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model" if out is None else out
        if parsed.layout == "diffusers":
            _write_pipeline(model, folder, card)
        else:
            hub.save_pretrained(model, folder, autoencoder=model.decoder, **card)  # type: ignore[arg-type]
        if out is not None:
            results.show_paths([folder])
        if parsed.push is not None:
            message = f"tvmatch export --layout {parsed.layout}"
            print(upload(folder, parsed.push, private=parsed.private, commit_message=message))
    return 0


def _check(parsed: argparse.Namespace, out: Path | None) -> None:
    if parsed.layout not in LAYOUTS:
        raise InputError("layout", f"must be one of {', '.join(LAYOUTS)}, got {parsed.layout!r}")
    if out is None and parsed.push is None:
        raise InputError("out", "is required without --push")
    if out is not None and out.exists():
        raise InputError("out", f"{out} exists already")
    if parsed.private and parsed.push is None:
        raise InputError("private", "requires --push")
    if parsed.layout == "authors":
        for name in ("push", "autoencoder", "license"):
            if (value := getattr(parsed, name)) is not None:
                raise InputError(name, f"cannot be used with --layout authors, got {value!r}")
    if parsed.push is not None:
        check_repository_name(parsed.push)


def _write_authors(model: TrainedModel, path: Path) -> None:
    network = expect_dit(model, "layout", "authors")
    if path.suffix != ".safetensors":
        raise InputError("out", f"must end in .safetensors for the authors' layout, got {path}")
    if not network.config.rms_norm:
        raise InputError(
            "layout", "authors needs a network with RMSNorm, this one has LayerNorm; use --layout hub"
        )
    _, height, width = model.spec.shape
    if height != width:
        raise InputError("layout", f"authors is for square images, this model's are {height}×{width}")
    metadata = {"format": "pt", "tvmatch": json.dumps(model.describe(), ensure_ascii=False)}
    with replacing(path) as unfinished:
        save_file(network_to_authors(network), unfinished, metadata)


def _write_pipeline(model: TrainedModel, folder: Path, card: Mapping[str, Any]) -> None:
    from tvmatch.diffusers import TVMPipeline  # here, because it imports diffusers

    pipeline = TVMPipeline.from_trained_model(model)
    with new_folder(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
        hub.write_card(model, unfinished, pipeline=True, **card)


def _config(checkpoint: Path) -> Path | None:
    """The configuration of the run that a checkpoint is in; None outside a run."""
    folder = find_checkpoint(checkpoint).resolve()
    path = folder.parents[1] / CONFIG_NAME
    return path if folder.parent.name == "checkpoints" and path.is_file() else None


def _samples(model: TrainedModel) -> Image | None:
    """A grid of one-step samples of all classes, about 1000 pixels wide."""
    if not model.gives_images:
        return None
    columns = min(max(1024 // model.output_shape[-1], 4), 12)
    count = columns * min(columns, 8)
    classes = model.spec.class_count
    labels = [k * classes // count for k in range(count)] if classes else None
    return pictures.image_grid(model.sample(labels, count=count), columns)
