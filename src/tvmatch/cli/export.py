"""`tvmatch export`: a checkpoint for other programs and people."""

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
from tvmatch.interop import expect_dit, hub, network_to_authors
from tvmatch.storage.files import new_folder, parse_json, replacing
from tvmatch.storage.hub import check_repository_name, upload
from tvmatch.trained_model import TrainedModel, load
from tvmatch.trained_model.files import find_checkpoint
from tvmatch.training import CONFIG_NAME

DESCRIPTION = """\
Write a checkpoint's evaluation weights for others. --layout hub: a folder with a model card, which
tvmatch.from_pretrained reads from here or from the Hugging Face Hub. diffusers: a pipeline, which
tvmatch.diffusers.TVMPipeline.from_pretrained reads. authors: one .safetensors file in the parameter names
of the authors of Terminal Velocity Matching. A model of latents takes its autoencoder along, but not into
the authors' file. The card shows samples, the run's configuration, and its figures (metrics*.json) that are
of this checkpoint.
--push uploads the folder. Nothing is overwritten here; on the Hub it is a new commit."""

LAYOUTS = ("hub", "diffusers", "authors")


def run(arguments: list[str]) -> int:
    """Write, and upload if asked to."""
    parser = OneLineParser(prog="tvmatch export", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--layout", type=str, required=True, help=", ".join(LAYOUTS))
    parser.add_argument("--out", type=str, default=None, help="new folder, or .safetensors file for authors")
    parser.add_argument(
        "--push", type=str, default=None, help="repository on the Hub to upload to, user/name"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--license", type=str, default=None, help="of the weights, for the card: cc-by-4.0, …"
    )
    parsed = parser.parse_args(arguments)

    out = None if parsed.out is None else Path(parsed.out)
    if parsed.layout not in LAYOUTS:
        raise InputError("layout", f"must be one of {', '.join(LAYOUTS)}, got {parsed.layout!r}")
    if out is None and parsed.push is None:
        raise InputError("out", "name a new folder or file to write, or give a repository to --push to")
    if out is not None and out.exists():
        raise InputError("out", f"{out} exists already")
    if parsed.private and parsed.push is None:
        raise InputError("private", "is about a repository, and needs --push")
    if parsed.layout == "authors":
        for name in ("push", "autoencoder", "license"):
            if (value := getattr(parsed, name)) is not None:
                raise InputError(name, f"the authors' layout is one file of weights alone, got {value!r}")
        assert out is not None
        _write_authors(load(parsed.checkpoint), out)
        results.show_paths([out])
        return 0

    if parsed.push is not None:
        check_repository_name(parsed.push)
    model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
    if parsed.layout == "diffusers":
        expect_dit(model, "layout", "diffusers")
    card: dict[str, Any] = {
        "metrics": _metrics(Path(parsed.checkpoint), model),
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


def _write_authors(model: TrainedModel, path: Path) -> None:
    network = expect_dit(model, "layout", "authors")
    if path.suffix != ".safetensors":
        raise InputError("out", f"must end in .safetensors for the authors' layout, got {path}")
    if not network.config.rms_norm:
        raise InputError(
            "layout", "authors is for networks with RMSNorm, this one has LayerNorm; take --layout hub"
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
    """The configuration of a checkpoint's run, if it is in one."""
    folder = find_checkpoint(checkpoint).resolve()
    path = folder.parents[1] / CONFIG_NAME
    return path if folder.parent.name == "checkpoints" and path.is_file() else None


def _metrics(checkpoint: Path, model: TrainedModel) -> list[Path]:
    """The files of figures beside a checkpoint or in its run that are of this very checkpoint."""
    folder = find_checkpoint(checkpoint).resolve()
    places = (folder, folder.parents[1]) if folder.parent.name == "checkpoints" else (folder,)
    found = {path.name: path for place in reversed(places) for path in sorted(place.glob("metrics*.json"))}
    return [path for path in found.values() if _training_step(path) == model.step]


def _training_step(path: Path) -> Any:
    """At which the figures of a file were measured; None if it holds none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("steps") if isinstance(content, dict) else None


def _samples(model: TrainedModel) -> Image | None:
    """One-step samples for the card, about a thousand pixels wide, over all classes in order."""
    if not model.gives_images:
        return None
    columns = min(max(1024 // model.output_shape[-1], 4), 12)
    count = columns * min(columns, 8)
    classes = model.spec.class_count
    labels = [k * classes // count for k in range(count)] if classes else None
    return pictures.image_grid(model.sample(labels, count=count), columns)
