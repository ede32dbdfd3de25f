"""Settings that determine the latents of a data set, recorded in encoding.json before encoding starts."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from tvmatch.data.images.pixels import Crop, check_crop
from tvmatch.data.images.reader import ImageReader
from tvmatch.data.latents.autoencoder import Autoencoder
from tvmatch.data.latents.dataset import Flips
from tvmatch.errors import InputError
from tvmatch.storage.files import parse_json, replacing
from tvmatch.storage.locks import FolderLock, is_lock

FORMAT = "tvmatch-encoding-1"
SETTINGS_NAME = "encoding.json"


@dataclass(frozen=True)
class EncodingOptions:
    """Options that determine the latents of a data set.

    Attributes:
        data: path or name of the data set.
        split: of the data set.
        label_column: column of the classes, None for none.
        image_column: column of the images, None if only one holds images.
        resolution: of the images in pixels, a multiple of the autoencoder's down-sampling factor.
        crop: how images are cropped to squares.
        flips: "none"; "stored" encodes each image and its mirror image; "drawn" mirrors latents during
            training instead, which is an approximation.
        shard_size: images per shard.
        batch_size: images encoded together; changing it changes the last bits of the latents.
    """

    data: str
    split: str = "train"
    label_column: str | None = None
    image_column: str | None = None
    resolution: int = 256
    crop: Crop = "dhariwal"
    flips: Flips = "none"
    shard_size: int = 4096
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("resolution", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.flips not in get_args(Flips):
            raise InputError("flips", f"must be one of {', '.join(get_args(Flips))}, got {self.flips!r}")
        check_crop(self.crop, self.resolution, self.resolution)


def begin(
    folder: Path, options: EncodingOptions, source: ImageReader, autoencoder: Autoencoder
) -> dict[str, Any]:
    """Write encoding.json, or check that data, autoencoder and options equal those recorded there.

    Returns:
        Provenance of the folder when it was begun: paths of data and autoencoder, versions.

    Raises:
        InputError: settings differ (all are named), or the folder holds other files.
    """
    settings = asdict(options) | {
        "images": len(source),
        "data_fingerprint": source.fingerprint,
        "autoencoder_fingerprint": autoencoder.fingerprint,
    }
    del settings["data"]  # compared by its fingerprint
    path = folder / SETTINGS_NAME
    if not path.exists():
        _check_empty(folder)
        provenance = {
            "data": options.data,
            "autoencoder": autoencoder.source,
            "versions": {name: _version(name) for name in ("tvmatch", "torch", "diffusers", "pillow")},
        }
        content = {"format": FORMAT, "settings": settings, "provenance": provenance}
        with FolderLock(folder, ".begin.lock", wait=True):  # against processes that begin it at the same time
            if not path.exists():
                with replacing(path) as unfinished:
                    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                    unfinished.write_text(text, encoding="utf-8")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"the format is {content['format']!r}")
        before, provenance = dict(content["settings"]), dict(content["provenance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("out", f"{path} cannot be read, or is of another version ({error})") from None
    different = [
        f"{name} {before.get(name)} before, {now} now"
        for name, now in settings.items()
        if before.get(name) != now
    ]
    if different:
        raise InputError(
            "out",
            f"{folder} was begun with other settings, {'; '.join(different)}; use another folder or the "
            "same options",
        )
    return provenance


def _check_empty(folder: Path) -> None:
    """Refuse a folder with files other than those of a process that begins it at the same time."""
    if folder.exists() and not folder.is_dir():
        raise InputError("out", f"{folder} is a file")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    left_behind = f".{SETTINGS_NAME}."  # by a process that was killed
    ours = [name for name in names if is_lock(name) or name.startswith(left_behind) or name == SETTINGS_NAME]
    other = set(names) - set(ours)
    if other:
        raise InputError(
            "out", f"{folder} holds other files ({min(other)}), which are not overwritten; use a new folder"
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
