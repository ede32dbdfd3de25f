"""Reference statistics in files: .npz files, pickles of the EDM family, and our cache.

Shapes: d features; H × W pixels.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tvmatch.data.npy import NpyHeader
from tvmatch.errors import InputError
from tvmatch.evaluation.collection import FeatureSizes
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.metrics.frechet import GaussianStatistics
from tvmatch.evaluation.references.npz import NpzReader
from tvmatch.safe_pickle.unpickler import restricted_load
from tvmatch.storage.files import parse_json, replacing, sha256_of

FORMAT = "tvmatch-reference-1"
_PICKLE_KEYS = {"inception": "fid", "dinov2": "fd_dinov2"}
_ASYMMETRY = 1e-5  # of the largest entry: a covariance computed in float32 has 1e-7, another matrix 1


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images.

    Attributes:
        pooled: mean and covariance of the pooled features.
        spatial: mean and covariance of the spatial features, or None.
        vectors: pooled features of some of the images, float32 (m, d), for precision and recall; or None.
        count: number of images of the statistics; None if unknown.
        provenance: the origin of the features, as JSON values.
    """

    pooled: GaussianStatistics
    spatial: GaussianStatistics | None
    vectors: Tensor | None
    count: int | None
    provenance: Mapping[str, Any]


def extractor_facts(extractor: Extractor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Everything that computed statistics depend on except the images."""
    return {
        "format": FORMAT,
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "resolution": list(shape[1:]),
    }


def cache_name(facts: Mapping[str, Any]) -> str:
    """The cache file of statistics with these facts. It does not depend on the path of the images."""
    text = json.dumps({name: fact for name, fact in facts.items() if name != "source"}, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def write_cache(path: Path, reference: Reference) -> None:
    """Write a reference atomically. The names of the arrays are those of other programs."""
    arrays: dict[str, NDArray[Any]] = {
        "mu": reference.pooled.mean.numpy(),
        "sigma": reference.pooled.covariance.numpy(),
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.vectors is not None:
        arrays["features"] = reference.vectors.numpy()
    provenance = np.array(json.dumps(dict(reference.provenance), ensure_ascii=False))
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, provenance=provenance, **arrays)  # type: ignore[arg-type]


def read_npz(
    file: NpzReader,
    path: Path,
    fingerprint: str | None,
    extractor: Extractor,
    sizes: FeatureSizes,
    shape: tuple[int, ...],
) -> Reference:
    """Read an .npz file with mu and sigma, optionally mu_s and sigma_s, and features in a file of our cache.

    Raises:
        InputError: for another number of features, non-finite numbers, a sigma that is not a covariance
            matrix, or in a file of our cache another extractor or resolution.
    """
    provenance: dict[str, Any] = {
        "source": str(path),
        "fingerprint": fingerprint,
        "kind": "statistics of unrecorded origin",
    }
    if "provenance" in file:
        provenance = _own_provenance(file, path)
        for name, fact in extractor_facts(extractor, shape).items():
            if provenance.get(name) != fact:
                raise InputError(
                    "reference",
                    f"{path} was computed with {name.replace('_', ' ')} "
                    f"{_short(provenance.get(name))}, this evaluation has {_short(fact)}",
                )
    pooled = _read_statistics(file, path, "mu", "sigma", sizes.pooled)
    spatial, vectors = None, None
    if "mu_s" in file and sizes.spatial is not None:
        spatial = _read_statistics(file, path, "mu_s", "sigma_s", sizes.spatial)
    if "provenance" in file and "features" in file:
        shape_, dtype, _ = file.kind("features")
        if dtype != np.float32 or len(shape_) != 2 or shape_[1] != sizes.pooled:
            raise InputError("reference", f"{path}: its features are {dtype} of shape {shape_}")
        vectors = torch.from_numpy(file.array("features"))
    return Reference(pooled, spatial, vectors, provenance.get("images"), provenance)


def _own_provenance(file: NpzReader, path: Path) -> dict[str, Any]:
    shape, dtype, _ = file.kind("provenance")
    try:
        if shape != () or dtype.kind != "U":
            raise ValueError("not text")
        provenance = parse_json(str(file.array("provenance")))
        if not isinstance(provenance, dict) or not isinstance(provenance.get("images"), int):
            raise ValueError("no number of images")
    except ValueError as error:
        raise InputError("reference", f"{path}: its provenance is not readable ({error})") from None
    return provenance


def _short(fact: Any) -> str:
    return f"{fact[:12]}…" if isinstance(fact, str) and len(fact) > 40 else str(fact)


def _read_statistics(
    file: NpzReader, path: Path, mean: str, covariance: str, features: int
) -> GaussianStatistics:
    """Read a mean and a covariance, after checking their shapes and types."""
    for name, shape in ((mean, (features,)), (covariance, (features, features))):
        if name not in file:
            raise InputError("reference", f"{path} has {mean} but no {covariance}")
        _check_kind(file.kind(name), shape, f"{path}: {name}")
    return checked_statistics(file.array(mean), file.array(covariance), str(path))


def _check_kind(kind: NpyHeader, shape: tuple[int, ...], what: str) -> None:
    if kind.shape != shape:
        raise InputError("reference", f"{what} must have shape {shape} for this extractor, got {kind.shape}")
    if kind.dtype.kind != "f":
        raise InputError("reference", f"{what} holds {kind.dtype}, not floating-point numbers")


def checked_statistics(mean: NDArray[Any], covariance: NDArray[Any], what: str) -> GaussianStatistics:
    """Convert a mean (d,) and a covariance (d, d) to statistics in float64.

    Raises:
        InputError: for a non-finite number, an asymmetric matrix or a negative variance.
    """
    mu, sigma = (torch.from_numpy(np.array(x, np.float64)) for x in (mean, covariance))
    if not mu.isfinite().all() or not sigma.isfinite().all():
        raise InputError("reference", f"{what}: its statistics hold a number that is not finite")
    scale = float(sigma.abs().max())
    asymmetry = float((sigma - sigma.T).abs().max())
    if asymmetry > _ASYMMETRY * scale:
        raise InputError(
            "reference", f"{what}: its covariance is not symmetric, entries differ by {asymmetry:.3g}"
        )
    if float(sigma.diagonal().min()) < 0:
        raise InputError(
            "reference",
            f"{what}: its covariance has a negative variance, {float(sigma.diagonal().min()):.3g}",
        )
    return GaussianStatistics(mu, (sigma + sigma.T) / 2)


def check_batch(file: NpzReader, path: Path, shape: tuple[int, ...]) -> NpyHeader:
    """Shape and type of the images `arr_0` of an ADM batch, checked for samples of `shape`, (C, H, W).

    Raises:
        InputError: unless they are uint8 (N, H, W, 3) with the resolution of the samples.
    """
    kind = file.kind("arr_0")
    if kind.dtype != np.uint8 or len(kind.shape) != 4 or kind.shape[3] != 3:
        raise InputError(
            "reference",
            f"{path}: arr_0 must be uint8 images (N, H, W, 3), got {kind.dtype} of shape {kind.shape}",
        )
    if kind.shape[1:3] != tuple(shape[1:]):
        theirs, ours = ("×".join(map(str, sizes)) for sizes in (kind.shape[1:3], shape[1:]))
        raise InputError("reference", f"{path} holds images of {theirs} pixels, the samples have {ours}")
    return kind


def read_pickle(path: Path, extractor: Extractor, sizes: FeatureSizes) -> Reference:
    """Statistics of an EDM-family pickle, {"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}, …}.

    Raises:
        InputError: for an extractor without an entry, a pickle that contains anything but arrays, and as for
            `checked_statistics`.
    """
    key = _PICKLE_KEYS.get(extractor.name)
    if key is None:
        raise InputError(
            "reference",
            f"{path}: .pkl files have statistics of inception and dinov2 only, not of {extractor.name}",
        )
    try:
        content = restricted_load(path)
    except InputError as error:
        raise error.within("reference") from None
    entry = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entry, dict):
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise InputError(
            "reference", f"{path}: it has no entry {key!r} for the extractor {extractor.name}, but {keys}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for name, shape in (("mu", (sizes.pooled,)), ("sigma", (sizes.pooled, sizes.pooled))):
        array = entry.get(name)
        if not isinstance(array, np.ndarray):
            raise InputError("reference", f"{path}: its entry {key!r} has no array {name!r}")
        _check_kind(NpyHeader(array.shape, array.dtype), shape, f"{path}: {name}")
        arrays[name] = array
    provenance = {
        "source": str(path),
        "kind": f"statistics {key} of unrecorded origin",
        "fingerprint": f"sha256 {sha256_of(path)}",
    }
    return Reference(
        checked_statistics(arrays["mu"], arrays["sigma"], str(path)), None, None, None, provenance
    )
