"""`tvmatch evaluate --reference …`: FID and its kin, of any checkpoint."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tvmatch.cli import options, results
from tvmatch.config.parser import OneLineParser
from tvmatch.data.config import ImagesData, LatentsData
from tvmatch.distributed import Processes
from tvmatch.errors import InputError, arguments_named
from tvmatch.evaluation import (
    evaluate_features,
    features_table,
    load_extractor,
    load_reference,
    write_metrics,
)
from tvmatch.evaluation.feature_metrics import METRICS, check_request
from tvmatch.evaluation.provenance import provenance_line
from tvmatch.evaluation.references.loading import is_array_file
from tvmatch.generation.uint8 import Uint8
from tvmatch.storage.files import parse_json
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import find_checkpoint
from tvmatch.training.run_folder import run_config, run_folder

if TYPE_CHECKING:
    from tvmatch.data.images.pixels import Crop

SAMPLES = 50_000
BATCH_SIZE = 64
OPTIONS = (
    "reference",
    "reference_split",
    "reference_crop",
    "extractor",
    "weights",
    "metrics",
    "guidance",
    "labels_from",
    "uint8",
    "batch_size",
    "cache",
)
"""Any of these asks for figures in features."""


def add_options(parser: OneLineParser) -> None:
    """What feature-based figures take besides the options of every evaluation."""
    parser.add_argument(
        "--reference",
        type=str,
        default=None,
        help="real images (folder, Parquet, ZIP, Hub data set) or their statistics (.npz, .pkl)",
    )
    parser.add_argument(
        "--reference_split", type=str, default=None, help="of a data set of images (default: train)"
    )
    parser.add_argument(
        "--reference_crop",
        type=str,
        default=None,
        help="of a data set of images: centre or dhariwal (default: that of the images that the model was "
        "trained on; dhariwal where no file says it)",
    )
    parser.add_argument(
        "--extractor",
        type=str,
        default=None,
        help="inception (the default), dinov2, or package.module:attribute of your own",
    )
    parser.add_argument("--weights", type=str, default=None, help="of the extractor: a file or folder")
    parser.add_argument(
        "--metrics",
        type=str,
        default=None,
        help=f"of {','.join(METRICS)} (default: all that extractor and reference allow); pr is precision and "
        "recall",
    )
    parser.add_argument(
        "--guidance", type=str, default=None, help="weights w, 1.5,2, where the model takes several"
    )
    options.add_label_options(parser)
    parser.add_argument("--batch_size", type=int, default=None, help="images at a time (default: 64)")
    parser.add_argument(
        "--cache",
        type=str,
        default=None,
        help="folder for computed reference statistics (default: tvmatch/references in HF_HOME)",
    )


@arguments_named({"count": "samples"})
def evaluate(
    parsed: argparse.Namespace, model: TrainedModel, steps: tuple[int, ...], processes: Processes
) -> int:
    """Measure, write and print; the first of several processes does the latter two.

    Raises:
        InputError: for any option that does not fit the model, the extractor or the reference.
    """
    extractor_name: str = parsed.extractor or "inception"
    uint8: Uint8 = parsed.uint8 or "round"
    path = _out(Path(parsed.checkpoint), parsed.out, [extractor_name, *_unusual(parsed)])
    metrics = None if parsed.metrics is None else tuple(name.strip() for name in parsed.metrics.split(","))
    if parsed.reference is None and metrics != ("is",):
        raise InputError(
            "reference",
            "name real images or their statistics, --reference PATH; only the Inception Score can "
            "do without (--metrics is)",
        )
    if parsed.reference_crop is not None and (parsed.reference is None or is_array_file(parsed.reference)):
        raise InputError(
            "reference_crop",
            f"only images of a data set are cropped, not {parsed.reference or 'no reference'}",
        )
    guidance = None if parsed.guidance is None else options.numbers("guidance", parsed.guidance, "1.5,2")
    batch_size = BATCH_SIZE if parsed.batch_size is None else parsed.batch_size
    count = SAMPLES if parsed.samples is None else parsed.samples
    check_request(
        model,
        metrics=metrics,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=parsed.seed,
        batch_size=batch_size,
        labels_from=parsed.labels_from,
        uint8=uint8,
    )
    extractor = load_extractor(
        extractor_name, model.device, None if parsed.weights is None else Path(parsed.weights)
    )
    with _warnings_on_stderr():
        reference = None
        if parsed.reference is not None:
            _quiet_data_sets(processes)
            with _progress("reference", processes) as report:
                reference = load_reference(
                    parsed.reference,
                    extractor,
                    model.output_shape,
                    split=parsed.reference_split or "train",
                    crop=parsed.reference_crop or _crop_of_training(model, Path(parsed.checkpoint)),
                    with_vectors=metrics is None or "pr" in metrics,
                    cache=None if parsed.cache is None else Path(parsed.cache),
                    batch_size=batch_size,
                    processes=processes,
                    on_progress=report,
                )
        with _progress("samples", processes) as report:
            figures = evaluate_features(
                model,
                extractor,
                reference,
                metrics=metrics,
                count=count,
                steps=steps,
                guidance=guidance,
                seed=parsed.seed,
                labels_from=parsed.labels_from,
                uint8=uint8,
                batch_size=batch_size,
                processes=processes,
                on_progress=report,
            )
    if figures is not None:
        facts = {"checkpoint": parsed.checkpoint, "steps": model.step, "parameters": _parameters(model)}
        try:
            write_metrics(path, facts | figures)
        finally:  # hours of work are shown even if the disk is full
            Console().print(features_table(figures))
            print(provenance_line(figures["provenance"]))
        results.show_paths([path])
    return 0


def _crop_of_training(model: TrainedModel, checkpoint: Path) -> "Crop | None":
    """How the images were cropped that a model was trained on; None where nothing says it.

    The checkpoint says it. For one of an earlier version, which does not, the run's configuration may, and
    the latents that it names.
    """
    from tvmatch.data.images.pixels import Crop

    # Here, because `datasets` takes a second to import
    from tvmatch.data.latents.dataset import LatentsInfo

    crop = model.provenance.get("crop")
    try:
        if crop is None:
            data = run_config(run_folder(checkpoint)).data
            if isinstance(data, ImagesData):
                crop = data.crop
            elif isinstance(data, LatentsData):
                crop = LatentsInfo.read(Path(data.latents).expanduser()).provenance.get("crop")
    except InputError:
        return None
    return crop if crop in get_args(Crop) else None


def _parameters(model: TrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def _unusual(parsed: argparse.Namespace) -> list[str]:
    """What the samples are made by that is not the default: other figures, in a file of their own."""
    labels = [] if parsed.labels_from is None else [f"labels_{parsed.labels_from}"]
    return labels + ([] if parsed.uint8 in (None, "round") else [f"uint8_{parsed.uint8}"])


def _out(checkpoint: Path, given: str | None, names: list[str]) -> Path:
    """Where the figures go, checked before anything is computed.

    Only figures of the same names that were measured before are replaced.
    """
    try:
        folder = run_folder(checkpoint)
    except InputError:
        folder = find_checkpoint(checkpoint)
    default = folder / f"metrics_{re.sub(r'[^A-Za-z0-9.-]+', '_', '_'.join(names))}.json"
    path = default if given is None else Path(given)
    if path.is_dir():
        raise InputError("out", f"{path} is a folder, the figures go to a file")
    if path.exists() and (path.resolve() != default.resolve() or not _is_ours(path)):
        raise InputError("out", f"{path} exists already")
    options.check_writable("out", path)
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file holds figures like those that are to replace it."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"provenance", "rows"} <= content.keys()


def _quiet_data_sets(processes: Processes) -> None:
    """Progress bars of preparing images are for terminals alone, and once."""
    if not processes.is_first or not sys.stderr.isatty():
        import datasets  # here, because it takes a second to import

        datasets.disable_progress_bars()


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Warnings of the evaluation as lines like those of errors."""
    logger = logging.getLogger("tvmatch.evaluation")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("tvmatch: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.1f} images/s")


@contextmanager
def _progress(text: str, processes: Processes) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    shown = processes.is_first and console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    ) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
