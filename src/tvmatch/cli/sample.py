"""`tvmatch sample`: a PNG grid, a folder of PNGs, or an .npz file."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tvmatch.cli import options, results
from tvmatch.config.parser import OneLineParser
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.generation import partial_output
from tvmatch.generation.numbered import labels_in_turn, numbered_samples, sample_labels
from tvmatch.generation.sample_files import Layout, SampleFiles, sample_files
from tvmatch.generation.uint8 import Uint8, check_uint8
from tvmatch.sampling import expect_sample_numbers, time_grid
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import find_checkpoint

DESCRIPTION = """\
Draw samples from a checkpoint. --out decides the form: a name ending in .png is one grid, in .npz an
array file (`samples` of shape (n, C, H, W) in [0, 1], or (n, 2), and `labels`), anything else a folder
with one PNG a sample, named by its number. --format adm makes an .npz file of bytes, `arr_0` of shape
(n, H, W, 3), as ADM's evaluation and `tvmatch evaluate --reference` read it. With several numbers of steps
each gets a file or folder of its own, its name marked _1, _2, …. Sample k has the same noise for every
number of steps, batch size and device, and --first k draws samples k, k + 1, … of the same long run.
Nothing is overwritten. What an interrupted command has drawn stays in OUT.partial; the same command goes
on there, another one is refused."""

_SUFFIXES: dict[str, Layout] = {".png": "grid", ".npz": "npz", "": "folder"}


@dataclass(frozen=True)
class Request:
    """What is to be drawn, checked as far as it can be without the model."""

    count: int | None
    first: int
    counts: tuple[int, ...]
    times: tuple[float, ...] | None
    seed: int
    batch_size: int
    uint8: Uint8


def run(arguments: list[str]) -> int:
    """Sample and write."""
    parsed = _parser().parse_args(arguments)
    request = _request(parsed)
    if parsed.out is not None:
        _check_out(Path(parsed.out), parsed.format, request.counts)
    model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
    out = Path(parsed.out or _default_name(model.spec, parsed.format))
    layout, paths = _check_out(out, parsed.format, request.counts)
    _check_layout(layout, model, parsed.uint8, out)
    classes = _classes(model.spec, parsed.labels)
    if classes is not None and parsed.labels_from is not None:
        raise InputError("labels_from", "give --labels or have them drawn, not both")
    labels = (
        sample_labels(model, parsed.labels_from, request.seed) if classes is None else labels_in_turn(classes)
    )
    count = request.count or (len(classes) if classes else model.spec.class_count or 16)
    expect_sample_numbers(request.first, count)
    numbers = range(request.first, request.first + count)
    guidance = model.guidance_weight(parsed.guidance)

    settings = {
        "checkpoint": _fingerprint(find_checkpoint(Path(parsed.checkpoint))),
        "autoencoder": getattr(model.decoder, "fingerprint", None),
        "device": model.device.type,
        **asdict(request),
        "count": count,
        "labels": classes,
        "labels_from": parsed.labels_from,
        "guidance": guidance,
        "layout": layout,
        "outputs": [path.name for path in paths],
    }
    with partial_output.begin(out, paths, settings) as folder:
        for steps, path in zip(request.counts, paths, strict=True):
            files = sample_files(
                layout, folder / str(steps), path, numbers, model.output_shape, request.uint8
            )
            if not path.exists():
                draw = numbered_samples(
                    model, labels, steps=steps, times=request.times, guidance=guidance, seed=request.seed
                )
                _fill(files, draw, request.batch_size)
                files.finish(labels(numbers))
            elif 0 < files.begin(request.batch_size) < count:  # not finished by us
                raise InputError("out", f"{path} exists already, and an unfinished one in {folder}")
            results.show_paths([path])
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tvmatch sample", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument(
        "--labels",
        type=str,
        default=None,
        help="class names or numbers, 3,cat (default: all in turn)",
    )
    parser.add_argument("--count", type=int, default=None, help="samples in all; labels are repeated in turn")
    parser.add_argument("--first", type=int, default=0, help="number of the first sample (default: 0)")
    parser.add_argument("--steps", type=str, default=None, help="network evaluations, 1,2,4 (default: 1)")
    parser.add_argument("--times", type=str, default=None, help="a time grid instead of --steps, 1,0.6,0")
    parser.add_argument(
        "--guidance", type=float, default=None, help="weight w, where the model takes several"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and drawn labels (default: 0)")
    options.add_label_options(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument(
        "--out", type=str, default=None, help="file or folder (default: samples.png, samples.npz for points)"
    )
    parser.add_argument(
        "--format",
        type=str,
        default=None,
        help="adm: an .npz file of bytes for ADM's tools (default: by --out)",
    )
    return parser


def _request(parsed: argparse.Namespace) -> Request:
    if parsed.times is not None and parsed.steps is not None:
        raise InputError("times", "give a grid of times or a number of --steps, not both")
    times = None if parsed.times is None else options.numbers("times", parsed.times, "1,0.5,0")
    for name, least in (("count", 1), ("first", 0), ("seed", 0), ("batch_size", 1)):
        number = getattr(parsed, name)
        if number is not None and number < least:
            wanted = "must not be negative" if least == 0 else f"must be at least {least}"
            raise InputError(name, f"{wanted}, got {number}")
    uint8: Uint8 = parsed.uint8 or "round"
    check_uint8(uint8)
    counts = options.step_counts("1" if parsed.steps is None else parsed.steps)
    grid = None if times is None else time_grid(times=times)
    return Request(parsed.count, parsed.first, counts, grid, parsed.seed, parsed.batch_size, uint8)


def _default_name(spec: DataSpec, form: str | None) -> str:
    return "samples.npz" if spec.kind == "points" or form == "adm" else "samples.png"


def _check_out(out: Path, form: str | None, counts: tuple[int, ...]) -> tuple[Layout, list[Path]]:
    """How and where the samples of each number of steps go, checked before any is drawn."""
    if form not in (None, "adm"):
        raise InputError("format", f"must be adm, got {form!r}; other forms are chosen by the name of --out")
    if not out.name:
        raise InputError("out", f"must name a file or a new folder, got {str(out)!r}")
    # Of a name that is nothing but a suffix, pathlib says that it has none.
    suffix = (out.name if out.name.lower() in _SUFFIXES else out.suffix).lower()
    if suffix not in _SUFFIXES:
        raise InputError("out", f"must end in .png or .npz, or be a folder's name, got {out}")
    if out.name.lower() == suffix:
        raise InputError("out", f"must have a name before its ending, got {out}")
    if form == "adm" and suffix != ".npz":
        raise InputError("out", f"the format adm is an .npz file, got {out}")
    several = len(counts) > 1
    paths = [out.with_name(f"{out.stem}_{n}{out.suffix}") if several else out for n in counts]
    partial_output.check_new(out, paths)
    options.check_writable("out", out)
    return "adm" if form == "adm" else _SUFFIXES[suffix], paths


def _check_layout(layout: Layout, model: TrainedModel, uint8: str | None, out: Path) -> None:
    """Refuse a form that samples of the model cannot have."""
    if model.spec.kind == "points" and layout != "npz":
        raise InputError("out", f"points go to an .npz file of floating-point numbers, got {out}")
    if layout == "adm" and model.output_shape[0] not in (1, 3):
        raise InputError(
            "format", f"adm is for grey or RGB images, these have {model.output_shape[0]} channels"
        )
    if layout == "npz" and uint8 is not None:
        raise InputError(
            "uint8", f"{out} holds floating-point numbers, no bytes; --format adm makes a file of bytes"
        )


def _classes(spec: DataSpec, given: str | None) -> list[int] | None:
    """The class numbers of --labels, all of which must be classes; None without."""
    return None if given is None else spec.labels_in(given).tolist()


def _fingerprint(checkpoint: Path) -> str:
    """What a checkpoint is known by, whatever folder it lies in."""
    whole = hashlib.sha256()
    for name in ("model.json", "model.safetensors"):
        with (checkpoint / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _fill(files: SampleFiles, draw: Callable[[range], Tensor], batch_size: int) -> None:
    """Draw what is missing, a batch after another."""
    numbers = files.numbers
    there = files.begin(batch_size)
    if there:
        print(f"{files.path}: going on after {there:,} of {len(numbers):,} samples", file=sys.stderr)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=len(numbers), completed=there)
        for start in range(there, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            files.write(batch, draw(batch))
            progress.update(task, advance=len(batch))
