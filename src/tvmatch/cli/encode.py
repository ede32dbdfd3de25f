"""`tvmatch encode`: images to latents, by any number of processes, in as many runs as it takes."""

import errno
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from tvmatch.cli.options import DEVICE_HELP
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
Turn images into an autoencoder's posteriors (mean and standard deviation), in shards that training reads
memory-mapped. Given the same options again it goes on with the shards that are missing, after a kill or a
full disk too. Several processes share the work: under torchrun, or each with a --part of its own. Nothing
is overwritten."""
_OPTIONS = {  # of this command, by those of training's data section
    "data.path": "data",
    "data.latents": "data",
    **{f"data.{name}": name for name in ("split", "label_column", "image_column", "resolution", "crop")},
}
_FAR = 0.5  # of a deviation; the recipes for 256 and 512 pixels are 0.15 apart
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SECONDS_A_LINE = 60  # without a terminal, which would have a bar


def run(arguments: list[str]) -> int:
    """Encode, or go on with it."""
    parsed = _parser().parse_args(arguments)
    if parsed.workers < 0:
        raise InputError("workers", f"must be at least 0, got {parsed.workers}")
    part, out = _part(parsed.part), Path(parsed.out)
    again = f"tvmatch encode {shlex.join(arguments)}"
    with arguments_named(_OPTIONS):
        encoder = _encoder(parsed, out)
        try:
            with _progress(encoder, part) as on_images:
                encoder.encode(
                    part, workers=parsed.workers, on_bad_image=parsed.on_bad_image, on_images=on_images
                )
            info = encoder.finish()
        except KeyboardInterrupt:
            print(f"interrupted; {_finished(encoder, part)}; continue with: {again}", file=sys.stderr)
            return 130
        except torch.OutOfMemoryError:
            raise InputError(
                "batch_size",
                f"{parsed.batch_size} images at once are too many for the memory of the device; "
                "take fewer, and another --out",
            ) from None
        except FileNotFoundError as error:
            raise InputError(
                "out",
                f"{error.filename} is gone; if another process makes the same part at the same "
                "time, give each a --part of its own",
            ) from None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InputError(
                "out",
                f"{error.filename or out}: {error.strerror}; {_finished(encoder, part)} and stay; "
                f"continue with: {again}",
            ) from None
    _show(info, encoder, part, out)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tvmatch encode", description=DESCRIPTION)
    add = parser.add_argument
    add("--data", type=str, required=True, help="folder, ImageNet, .zip, .parquet, .arrow, or a Hub data set")
    add("--autoencoder", type=str, required=True, help="of diffusers: a folder or a name on the Hub")
    add("--resolution", type=int, default=256, help="of the images, in pixels (default: 256)")
    add("--out", type=str, required=True, help="folder for the latents: new, or to go on with")
    add("--split", type=str, default="train", help="of the data (default: train)")
    add(
        "--label_column",
        type=str,
        default="auto",
        help="column of the classes, null for none (default: label or class folders, if there are any)",
    )
    add("--image_column", type=str | None, default=None, help="default: the only one with images")
    add("--crop", type=Crop, default="dhariwal", help="to squares: dhariwal (default) or centre")
    add(
        "--flips",
        type=Flips,
        default="none",
        help="none (default), stored: encode mirror images too, drawn: mirror the latents in training",
    )
    add(
        "--normalization",
        type=str | None,
        default=None,
        help="what networks see: measured (default), or that of a recipe, a checkpoint or another folder "
        "of latents; on a finished folder this is all that changes",
    )
    add("--shard_size", type=int, default=4096, help="images a shard (default: 4096)")
    add("--batch_size", type=int, default=32, help="images encoded together (default: 32)")
    add(
        "--workers",
        type=int,
        default=min(4, available_cores()),  # PyTorch warns of more than there are cores
        help="processes that read images (default: 4, or the number of cores if fewer)",
    )
    add(
        "--part",
        type=str | None,
        default=None,
        help="2/8 for the second of 8 processes (default: torchrun's)",
    )
    add("--device", type=str, default="auto", help=f"{DEVICE_HELP}; under torchrun one GPU a process")
    add(
        "--on_bad_image",
        type=Literal["error", "skip"],
        default="error",
        help="error (default), or skip images that cannot be read",
    )
    return parser


def _encoder(parsed: Any, out: Path) -> Encoder:
    normalization = _normalization(parsed.normalization)
    device = resolve_device(device_of_process(parsed.device))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
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
    """Of --part, else of torchrun's variables."""
    if given is None:
        try:
            return launched()
        except InputError as error:
            raise error.within("part").with_hint("--part=1/1 takes no notice of them") from None
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
            raise InputError("normalization", f"the recipe {given} says none for latents")
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


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Images a second, of late."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} images/s")


@contextmanager
def _progress(encoder: Encoder, part: Position) -> Iterator[Callable[[int], None]]:
    """A bar of the images of this part, or without a terminal a line a minute."""
    total = sum(len(encoder.images(shard)) for shard in encoder.of_part(part))
    done = sum(len(encoder.images(shard)) for shard in encoder.finished(part))
    console = Console(stderr=True)
    if console.is_terminal and is_first():
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress("encoding", *columns, console=console) as progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda count: progress.advance(task, count)
        return
    start = shown = time.monotonic()
    encoded = 0

    def on_images(count: int) -> None:
        nonlocal encoded, shown
        encoded += count
        now = time.monotonic()
        if now - shown > _SECONDS_A_LINE:
            shown = now
            rate = encoded / (now - start)
            print(f"{done + encoded} of {total} images, {rate:.3g} images/s", file=sys.stderr, flush=True)

    yield on_images


def _finished(encoder: Encoder, part: Position) -> str:
    """How much of a part is there."""
    where = "" if part.world_size == 1 else f" of part {part.rank + 1}/{part.world_size}"
    return f"{len(encoder.finished(part))} of {len(encoder.of_part(part))} shards{where} are finished"


def _show(info: LatentsInfo | None, encoder: Encoder, part: Position, out: Path) -> None:
    if info is None:
        missing = encoder.shards - len(encoder.finished())
        print(
            f"{_finished(encoder, part)}; {missing} shards of other parts are not yet: {out / INFO_NAME} is "
            "written by the part that finishes last, or by this command given again then"
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
    """Say so if networks would see channels far from mean 0 and deviation 1."""
    shift = max(abs(m - own) / scale for m, own, scale in zip(mean, spec.mean, spec.std, strict=True))
    ratios = [measured / own for measured, own in zip(std, spec.std, strict=True)]
    if shift > _FAR or max(ratios) > 1 + _FAR or min(ratios) < 1 / (1 + _FAR):
        means, stds = (", ".join(f"{number:.5g}" for number in numbers) for numbers in (mean, std))
        print(f"these latents are of another scale: measured mean {means}; std {stds}", file=sys.stderr)
