"""`tvmatch sample`: draw samples into a PNG grid, a folder of PNGs, or an .npz file."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from tvmatch.cli import options, results
from tvmatch.cli.progress import progress_bar
from tvmatch.config.parser import OneLineParser
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.generation import partial_output
from tvmatch.generation.numbered import labels_in_turn, numbered_samples, sample_labels
from tvmatch.generation.sample_files import Layout, SampleFiles, sample_files
from tvmatch.generation.uint8 import Uint8, check_uint8
from tvmatch.sampling import expect_sample_numbers, time_grid
from tvmatch.storage.files import sha256_of
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import find_checkpoint

DESCRIPTION = """\
Draw samples from a checkpoint. The name of --out decides the format: NAME.png is one grid, NAME.npz has the
arrays `samples`, of shape (n, C, H, W) in [0, 1] or (n, 2), and `labels`; any other name is a folder with one
PNG for each sample, named by its number. With --format adm, NAME.npz has the array `arr_0`, uint8 of shape
(n, H, W, 3), as ADM's evaluation and `tvmatch evaluate --reference` read it. Several numbers of steps are
written to separate files or folders, NAME_1, NAME_2, …. Sample k has the same noise for every number of
steps, batch size and device; --first k draws samples k, k + 1, … of the same sequence.
Existing files are never overwritten. If the command is interrupted, its samples stay in OUT.partial, and
the same command resumes there. Another command with the same --out is refused."""

_SUFFIXES: dict[str, Layout] = {".png": "grid", ".npz": "npz", "": "folder"}


@dataclass(frozen=True)
class Request:
    """Checked options that do not depend on the model."""

    count: int | None
    first: int
    counts: tuple[int, ...]
    times: tuple[float, ...] | None
    seed: int
    batch_size: int
    uint8: Uint8


def run(arguments: list[str]) -> int:
    """Draw samples and write them."""
    parsed = _parser().parse_args(arguments)
    request = _request(parsed)
    if parsed.out is not None:
        _check_out(Path(parsed.out), parsed.format, request.counts)
    model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
    out = Path(parsed.out or _default_name(model.spec, parsed.format))
    layout, paths = _check_out(out, parsed.format, request.counts)
    _check_layout(layout, model, parsed.uint8, out)
    classes = None if parsed.labels is None else model.spec.labels_in(parsed.labels).tolist()
    if classes is not None and parsed.labels_from is not None:
        raise InputError("labels_from", "cannot be combined with --labels")
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
            elif 0 < files.begin(request.batch_size) < count:  # not written by an earlier command
                raise InputError("out", f"{path} exists already, and an unfinished one in {folder}")
            results.show_paths([path])
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tvmatch sample", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    add = options.adder(parser)
    add("--labels", help="names or numbers of classes, such as 3,cat (default: all classes in turn)")
    add("--count", type=int, help="number of samples (default: one for each label or class, or 16)")
    add("--first", type=int, default=0, help="number of the first sample")
    add("--steps", help="network evaluations a sample, such as 1,2,4 (default: 1)")
    add("--times", help="time grid instead of --steps, such as 1,0.6,0")
    add("--guidance", type=float, help="guidance weight within the range of the model (default: highest)")
    add("--seed", type=int, default=0, help="seed of the noise and of drawn labels")
    for name, text in options.LABEL_OPTIONS.items():
        add(f"--{name}", help=text)
    add("--batch_size", type=int, default=64, help="samples at a time")
    add("--out", help="file or folder (default: samples.png, or samples.npz for points)")
    add("--format", help="adm: uint8 arrays for the evaluation of ADM (default: by the name of --out)")
    return parser


def _request(parsed: argparse.Namespace) -> Request:
    if parsed.times is not None and parsed.steps is not None:
        raise InputError("times", "cannot be combined with --steps")
    times = None if parsed.times is None else options.numbers("times", parsed.times, "1,0.5,0")
    for name, least in (("count", 1), ("first", 0), ("seed", 0), ("batch_size", 1)):
        number = getattr(parsed, name)
        if number is not None and number < least:
            raise InputError(name, f"must be at least {least}, got {number}")
    uint8: Uint8 = parsed.uint8 or "round"
    check_uint8(uint8)
    counts = options.step_counts("1" if parsed.steps is None else parsed.steps)
    grid = None if times is None else time_grid(times=times)
    return Request(parsed.count, parsed.first, counts, grid, parsed.seed, parsed.batch_size, uint8)


def _default_name(spec: DataSpec, form: str | None) -> str:
    return "samples.npz" if spec.kind == "points" or form == "adm" else "samples.png"


def _check_out(out: Path, form: str | None, counts: tuple[int, ...]) -> tuple[Layout, list[Path]]:
    """The layout, and the output path for each number of steps."""
    if form not in (None, "adm"):
        raise InputError("format", f"must be adm, got {form!r}; the name of --out chooses other formats")
    if not out.name:
        raise InputError("out", f"must name a file or a new folder, got {str(out)!r}")
    suffix = out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError("out", f"must end in .png or .npz, or be the name of a folder, got {out}")
    if form == "adm" and suffix != ".npz":
        raise InputError("out", f"must end in .npz for the format adm, got {out}")
    several = len(counts) > 1
    paths = [out.with_name(f"{out.stem}_{n}{out.suffix}") if several else out for n in counts]
    partial_output.check_new(out, paths)
    options.check_writable("out", out)
    return "adm" if form == "adm" else _SUFFIXES[suffix], paths


def _check_layout(layout: Layout, model: TrainedModel, uint8: str | None, out: Path) -> None:
    """Raise InputError if the samples of the model cannot be written in this layout."""
    if model.spec.kind == "points" and layout != "npz":
        raise InputError("out", f"must end in .npz for points, without --format, got {out}")
    if layout == "adm" and model.output_shape[0] not in (1, 3):
        raise InputError("format", f"adm is for grey or RGB, these have {model.output_shape[0]} channels")
    if layout == "npz" and uint8 is not None:
        raise InputError("uint8", f"{out} will hold floating-point numbers; use --format adm for bytes")


def _fingerprint(checkpoint: Path) -> str:
    """Hash of a checkpoint, the same for a copy of it."""
    whole = hashlib.sha256()
    for name in ("model.json", "model.safetensors"):
        whole.update(bytes.fromhex(sha256_of(checkpoint / name)))
    return whole.hexdigest()


def _fill(files: SampleFiles, draw: Callable[[range], Tensor], batch_size: int) -> None:
    """Draw the missing samples batch by batch."""
    numbers = files.numbers
    existing = files.begin(batch_size)
    if existing:
        print(f"{files.path}: resuming after {existing:,} of {len(numbers):,} samples", file=sys.stderr)
    with progress_bar("sampling") as report:
        for start in range(existing, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            files.write(batch, draw(batch))
            report(start + len(batch), len(numbers))
