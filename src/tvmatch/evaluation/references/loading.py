"""Features of real images to compare samples with, read from a file or computed.

Shapes: d pooled and s spatial features; H × W pixels.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tvmatch.data.base import epoch_indices
from tvmatch.distributed import ALONE, Processes
from tvmatch.errors import InputError, arguments_named
from tvmatch.evaluation.collection import FeatureSizes, ImagesByNumber, Kept, collect, feature_sizes
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.references import files as reference_files
from tvmatch.evaluation.references.cache import default_cache, source_fingerprint
from tvmatch.evaluation.references.files import Reference
from tvmatch.evaluation.references.npz import NpzReader
from tvmatch.evaluation.samples import Progress
from tvmatch.storage.files import sha256_of

if TYPE_CHECKING:
    from tvmatch.data.images.pixels import Crop

_LOGGER = logging.getLogger(__name__)

MOST_VECTORS = 50_000
"""Largest number of real images for precision and recall; a random choice of them is taken."""

_MOST_CACHED = 16_384  # features; their covariance takes 2 GB
_MOST_WORKERS = 4  # processes that decode images, for each process that extracts features


@dataclass(frozen=True)
class _Work:
    """Arguments of `load_reference` for the functions that it calls."""

    extractor: Extractor
    sizes: FeatureSizes
    shape: tuple[int, ...]
    with_vectors: bool
    cache: Path
    batch_size: int
    processes: Processes
    on_progress: Progress | None


def load_reference(
    path: str,
    extractor: Extractor,
    shape: tuple[int, ...],
    *,
    split: str = "train",
    crop: "Crop | None" = None,
    with_vectors: bool = False,
    cache: Path | None = None,
    batch_size: int = 64,
    processes: Processes = ALONE,
    on_progress: Progress | None = None,
) -> Reference | None:
    """Load or compute the reference at `path`, for samples of `shape`.

    A reference is one of
    - an .npz file with the arrays `mu` and `sigma` (optionally `mu_s` and `sigma_s` of spatial features),
      images as `arr_0`, uint8 (N, H, W, 3), or both, like the reference batches of ADM (Dhariwal and Nichol,
      arXiv 2105.05233); or a file of our cache;
    - a .pkl file of the EDM family, {"fid": {"mu", "sigma"}, "fd_dinov2": {…}}, read without executing it;
    - images that `data.images.reader.open_images` can open. They are cropped and resized to the resolution of
      the samples.

    Computed statistics, and pooled features with `with_vectors`, are cached. They are computed again if
    anything that they depend on changes, such as size or modification time of an image file.

    Args:
        path: of the reference.
        extractor: images to features.
        shape: (C, H, W) of the samples.
        split: of a data set of images.
        crop: of the images of a data set, preferably the crop of the model's training images. None:
            "dhariwal", as for published references, or "centre" if the samples are not square.
        with_vectors: whether to keep pooled features, for precision and recall; a file with statistics only
            has none.
        cache: folder; by default `default_cache()`.
        batch_size: images at a time.
        processes: share the work; all of them must call this function.
        on_progress: called with the number of images done and the total.

    Returns:
        The reference in the first process, None in the others.

    Raises:
        InputError: for an unreadable reference, an unknown crop, images of another resolution, statistics of
            another extractor or number of features, or not finite or symmetric, or a batch size < 1.
    """
    if batch_size < 1:
        raise InputError("batch_size", f"must be at least 1, got {batch_size}")
    work = _Work(
        extractor,
        feature_sizes(extractor, shape[1], shape[2]),
        shape,
        with_vectors,
        default_cache() if cache is None else cache,
        batch_size,
        processes,
        on_progress,
    )
    local = Path(path).expanduser()
    if is_array_file(path):
        if not local.is_file():
            raise InputError("reference", f"{path}: no such file")
        if local.suffix.lower() == ".npz":
            return _from_npz(local, work)
        return reference_files.read_pickle(local, extractor, work.sizes) if processes.is_first else None
    return _from_images(path, split, crop, work)


def is_array_file(path: str) -> bool:
    """Whether a reference is an .npz or .pkl file, not a data set of images."""
    local = Path(path).expanduser()
    return local.suffix.lower() in (".npz", ".pkl") and not local.is_dir()


def _from_npz(path: Path, work: _Work) -> Reference | None:
    """The statistics of the file; features of its images if it has no statistics or they are needed."""
    fingerprint = f"sha256 {sha256_of(path)}" if work.processes.is_first else None
    with NpzReader(path, "reference") as file:
        if "mu" not in file and "arr_0" not in file:
            raise InputError(
                "reference",
                f"{path} contains neither statistics (mu, sigma) nor images (arr_0), but "
                f"{', '.join(file.names[:6]) or 'nothing'}",
            )
        stored = None
        if "mu" in file:
            stored = reference_files.read_npz(file, path, fingerprint, work.extractor, work.sizes, work.shape)
        # The images are checked even if only the statistics are needed: both have the same resolution.
        count = reference_files.check_batch(file, path, work.shape).shape[0] if "arr_0" in file else 0
        if "arr_0" not in file or (stored is not None and not work.with_vectors):
            return stored if work.processes.is_first else None

        @contextmanager
        def images() -> Iterator[tuple[ImagesByNumber, int]]:
            with file.rows("arr_0") as read:

                def batch(numbers: range) -> Tensor:
                    pixels = torch.from_numpy(np.asarray(read(numbers), np.float32))
                    return pixels.div_(255).permute(0, 3, 1, 2)

                yield batch, count

        facts = {"source": str(path), "fingerprint": fingerprint, "array": "arr_0"}
        computed = _computed(facts, images, work)
    if computed is None or stored is None:
        return computed
    provenance = {**stored.provenance, "features_of": f"the file's {count} images"}
    return replace(stored, vectors=computed.vectors, provenance=provenance)


def _from_images(path: str, split: str, crop: "Crop | None", work: _Work) -> Reference | None:
    # Here, because `datasets` takes a second to import.
    from tvmatch.data.images.batches import available_cores, read_batches
    from tvmatch.data.images.pixels import check_crop
    from tvmatch.data.images.reader import open_images

    height, width = work.shape[1:]
    if crop is None:
        crop = "dhariwal" if height == width else "centre"
    names = {"data.path": "reference", "data.split": "reference_split", "data.crop": "reference_crop"}
    with arguments_named(names):
        check_crop(crop, height, width)
    channels = 1 if work.shape[0] == 1 else 3
    facts = {
        "source": path,
        "fingerprint": source_fingerprint(path) if work.processes.is_first else None,
        "split": split,
        "crop": crop,
        "channels": channels,
    }

    @contextmanager
    def images() -> Iterator[tuple[ImagesByNumber, int]]:
        if not work.processes.is_first:
            work.processes.wait()  # until the first process has opened, and perhaps downloaded, them
        with arguments_named(names):
            source = open_images(path, split, label_column=None)
        if work.processes.is_first:
            work.processes.wait()
        # A random order, so that the first `MOST_VECTORS` images are a random choice.
        batches = epoch_indices(len(source), 0, len(source), seed=0).split(work.batch_size)
        own = [batches[number].tolist() for number in work.processes.share(len(batches))]
        workers = min(_MOST_WORKERS, available_cores())

        def batch(numbers: range) -> Tensor:
            read = next(decoded)  # called in increasing order
            if read.problems:
                raise read.problems[0].within("reference")
            if read.values is None or read.values.dtype != torch.uint8:
                raise InputError("reference", f"{path} contains latents, must contain images")
            return read.values.float() / 255

        with read_batches(source, own, (height, width), crop, workers, channels) as decoded:
            yield batch, len(source)

    return _computed(facts, images, work)


def _computed(
    facts: Mapping[str, Any],
    images: Callable[[], AbstractContextManager[tuple[ImagesByNumber, int]]],
    work: _Work,
) -> Reference | None:
    """Statistics of the features of images, from the cache or computed.

    Args:
        facts: identify the images. Without a fingerprint nothing is cached.
        images: opens the images and yields them with their number.
        work: all other arguments.
    """
    facts = dict(facts) | reference_files.extractor_facts(work.extractor, work.shape)
    path = work.cache / reference_files.cache_name(facts) if facts["fingerprint"] else None
    found = None
    if work.processes.is_first and path is not None and path.is_file():
        found = _from_cache(path, facts, work)
    if work.processes.as_first(found is not None):
        return found
    with images() as (source, count):
        if count < 2:
            raise InputError("reference", f"{facts['source']} has {count} images, at least 2 are needed")
        collected = collect(
            source,
            count,
            work.extractor,
            work.sizes,
            Kept(spatial=work.sizes.spatial is not None, vectors=MOST_VECTORS if work.with_vectors else 0),
            batch_size=work.batch_size,
            processes=work.processes,
            on_progress=work.on_progress,
        )
    if collected is None:
        return None
    vectors = collected.vectors if work.with_vectors else None
    reference = Reference(
        collected.pooled, collected.spatial, vectors, count, facts | {"images": count, "kind": "images"}
    )
    if path is not None and len(reference.pooled.mean) > _MOST_CACHED:
        _LOGGER.warning("reference statistics are not cached: their covariance takes gigabytes")
    elif path is not None:
        try:
            reference_files.write_cache(path, reference)
        except OSError as error:  # the metrics can be computed without the cache
            _LOGGER.warning("reference statistics are not cached: %s: %s", path, error.strerror or error)
    return reference


def _from_cache(path: Path, facts: Mapping[str, Any], work: _Work) -> Reference | None:
    """The cached reference; None if the file is unreadable or lacks the features of `with_vectors`."""
    try:
        with NpzReader(path, "reference") as file:
            reference = reference_files.read_npz(file, path, None, work.extractor, work.sizes, work.shape)
    except InputError as error:
        _LOGGER.warning("reference statistics are computed again: %s", error.message)
        return None
    if work.with_vectors and reference.vectors is None:
        return None
    return replace(reference, provenance={**reference.provenance, "source": facts["source"]})
