"""`tvmatch encode`: encode images as latents, with one or several processes; resumes interrupted runs."""

import errno
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tvmatch.cli.options import DEVICE_HELP, hide_data_progress
from tvmatch.cli.progress import progress_bar
from tvmatch.config.parser import OneLineParser
from tvmatch.config.recipes import recipe, recipe_names
from tvmatch.data.config import LatentsData
from tvmatch.data.images.batches import available_cores
from tvmatch.data.images.pixels import Crop
from tvmatch.data.images.reader import open_images
from tvmatch.data.latents.autoencoder import load_autoencoder
from tvmatch.data.latents.dataset import INFO_NAME, Flips, LatentsInfo
from tvmatch.data.latents.encoder import MEASURED, Encoder, Normalization
from tvmatch.data.latents.settings import EncodingOptions
from tvmatch.data.spec import DataSpec
from tvmatch.devices import resolve_device
from tvmatch.distributed import Position, device_of_process, is_first, launched, print_once
from tvmatch.errors import InputError, arguments_named
from tvmatch.trained_model.files import read_spec

DESCRIPTION = """\
Encode images as posteriors (mean and standard deviation) of an autoencoder, in shards that training maps into
memory. The same command resumes an interrupted run with the missing shards. Several processes can share the
work: under torchrun, or each with its own --part. Existing files are not overwritten."""
_OPTIONS = {  # names of this command's options, by those of the data section of training
    "data.path": "data",
    "data.latents": "data",
    **{f"data.{name}": name for name in ("split", "label_column", "image_column", "resolution", "crop")},
}
_FAR = 0.5  # standard deviations; the recipes for 256 and 512 pixels differ by 0.15
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(arguments: list[str]) -> int:
    """Encode the images, or resume."""
    parsed = _parser().parse_args(arguments)
    if parsed.workers < 0:
        raise InputError("workers", f"must be at least 0, got {parsed.workers}")
    part, out = _part(parsed.part), Path(parsed.out)
    again = f"tvmatch encode {shlex.join(arguments)}"
    with arguments_named(_OPTIONS):
        encoder = _encoder(parsed, out)
        try:
            with progress_bar("encoding", shown=is_first()) as report:
                encoder.encode(
                    part, workers=parsed.workers, on_bad_image=parsed.on_bad_image, on_progress=report
                )
            info = encoder.finish()
        except KeyboardInterrupt:
            print(f"interrupted; {_finished(encoder, part)}; continue with: {again}", file=sys.stderr)
            return 130
        except torch.OutOfMemoryError:
            raise InputError(
                "batch_size",
                f"{parsed.batch_size} images at once need more memory than the device has; "
                "use fewer, and another --out",
            ) from None
        except FileNotFoundError as error:
            raise InputError(
                "out",
                f"{error.filename} was removed; if another process encodes the same part, "
                "give each its own --part",
            ) from None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InputError(
                "out",
                f"{error.filename or out}: {error.strerror}; {_finished(encoder, part)}; "
                f"continue with: {again}",
            ) from None
    _show(info, encoder, part, out)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tvmatch encode", description=DESCRIPTION)
    add = partial(parser.add_argument, type=str)
    add("--data", required=True, help="folder, ImageNet, .zip, .parquet, .arrow, or a Hub data set")
    add("--autoencoder", required=True, help="of diffusers: a folder or a name on the Hub")
    add("--resolution", type=int, default=256, help="of the images, in pixels (default: 256)")
    add("--out", required=True, help="folder for the latents: new, or to resume")
    add("--split", default="train", help="of the data (default: train)")
    labels = "column of the classes, null for none (default: label or class folders, if there are any)"
    add("--label_column", default="auto", help=labels)
    add("--image_column", help="column of the images (default: the only one with images)")
    add("--crop", type=Crop, default="dhariwal", help="to squares: dhariwal (default) or centre")
    flips = "none (default), stored: also encode mirror images, drawn: mirror latents during training"
    add("--flips", type=Flips, default="none", help=flips)
    normalization = (
        "of the networks' inputs: measured (default), or that of a recipe, a checkpoint or another folder of "
        "latents; the only option that can change for a finished folder"
    )
    add("--normalization", help=normalization)
    add("--shard_size", type=int, default=4096, help="images per shard (default: 4096)")
    add("--batch_size", type=int, default=32, help="images encoded together (default: 32)")
    workers = min(4, available_cores())  # PyTorch warns of more workers than cores
    add(
        "--workers",
        type=int,
        default=workers,
        help="processes that read images (default: 4, at most the cores)",
    )
    add("--part", help="2/8 for the second of 8 processes (default: torchrun's)")
    add("--device", default="auto", help=f"{DEVICE_HELP}; under torchrun one GPU per process")
    bad = "error (default), or skip images that cannot be read"
    add("--on_bad_image", type=Literal["error", "skip"], default="error", help=bad)
    return parser


def _encoder(parsed: Any, out: Path) -> Encoder:
    normalization = _normalization(parsed.normalization)
    device = resolve_device(device_of_process(parsed.device))
    if not sys.stderr.isatty():
        hide_data_progress()
    label_column = None if parsed.label_column == "null" else parsed.label_column
    source = open_images(
        parsed.data, parsed.split, label_column=label_column, image_column=parsed.image_column
    )
    print_once(*source.findings)
    options = EncodingOptions(
        data=parsed.data,
        split=parsed.split,
        label_column=source.label_column,
        image_column=parsed.image_column,
        resolution=parsed.resolution,
        crop=parsed.crop,
        flips=parsed.flips,
        shard_size=parsed.shard_size,
        batch_size=parsed.batch_size,
    )
    autoencoder = load_autoencoder(parsed.autoencoder, device)
    return Encoder(source, autoencoder, out, options, normalization)


def _part(given: str | None) -> Position:
    """The part given by --part, else by torchrun's variables."""
    if given is None:
        try:
            return launched()
        except InputError as error:
            raise error.within("part").with_hint("--part=1/1 ignores them") from None
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError("part", f"must be like 2/8, from 1/8 to 8/8, got {given!r}")
    return Position(int(match[1]) - 1, int(match[2]))


def _normalization(given: str | None) -> Normalization | Literal["measured"] | None:
    if given is None or given == MEASURED:
        return None if given is None else "measured"
    if given in recipe_names():
        data = recipe(given).data
        if not isinstance(data, LatentsData) or data.mean is None or data.std is None:
            raise InputError("normalization", f"the recipe {given} has none for latents")
        return Normalization(tuple(data.mean), tuple(data.std), f"recipe {given}")
    folder = Path(given)
    if folder.is_dir():
        latents = (folder / INFO_NAME).is_file()
        spec = LatentsInfo.read(folder).spec if latents else read_spec(folder)
        return Normalization(spec.mean, spec.std, given)
    raise InputError(
        "normalization",
        f"must be {MEASURED}, a recipe, or a folder of latents or a checkpoint, got {given!r}",
    )


def _finished(encoder: Encoder, part: Position) -> str:
    """Number of finished shards of a part, in words."""
    where = "" if part.world_size == 1 else f" of part {part.rank + 1}/{part.world_size}"
    return f"{len(encoder.finished(part))} of {len(encoder.of_part(part))} shards{where} are finished"


def _show(info: LatentsInfo | None, encoder: Encoder, part: Position, out: Path) -> None:
    if info is None:
        missing = encoder.shards - len(encoder.finished())
        print(
            f"{_finished(encoder, part)}; {missing} shards of other parts are missing: {out / INFO_NAME} is "
            "written by the part that finishes last, or by running this command again"
        )
        return
    skipped = info.provenance["skipped"]
    if skipped:
        first = info.provenance["first_skipped"][0]
        print(f"left out {skipped} images that cannot be read, the first: {first}", file=sys.stderr)
    spec = info.spec
    classes = "no classes" if spec.class_count == 0 else f"{spec.class_count} classes"
    mean, std = (", ".join(f"{number:.5g}" for number in numbers) for numbers in (spec.mean, spec.std))
    print(f"{out / INFO_NAME}: {info.count} latents of shape {list(spec.shape)}, {classes}")
    print(f"normalisation ({info.provenance['normalization']}): mean {mean}; std {std}")
    if info.measured_std is not None and info.measured_mean is not None:
        _warn_of_another_scale(spec, info.measured_mean, info.measured_std)


def _warn_of_another_scale(spec: DataSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Warn if networks would see channels far from mean 0 and standard deviation 1."""
    shift = max(abs(m - own) / scale for m, own, scale in zip(mean, spec.mean, spec.std, strict=True))
    ratios = [measured / own for measured, own in zip(std, spec.std, strict=True)]
    if shift > _FAR or max(ratios) > 1 + _FAR or min(ratios) < 1 / (1 + _FAR):
        means, stds = (", ".join(f"{number:.5g}" for number in numbers) for numbers in (mean, std))
        print(f"these latents have another scale: measured mean {means}; std {stds}", file=sys.stderr)
