"""Which files are images, by the endings of their names."""

import os
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from PIL import Image, features

# Formats of Pillow that it decodes by itself. Not among them: EPS and PS, for which it starts Ghostscript;
# WMF, EMF, BUFR, GRIB and HDF5, which it only recognises; PDF, MPEG and FLI, which are no single pictures.
FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM"),
    *("JPEG", "JPEG2000", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN"),
    *("TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
_READ_BY = {"MPO": "JPEG"}  # formats that another's reader opens
_NEEDS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Endings in lower case (".png") of the files that the installed Pillow reads as one of `FORMATS`."""
    Image.init()

    def readable(name: str) -> bool:
        reader = _READ_BY.get(name, name)
        return reader in Image.OPEN and (reader not in _NEEDS or bool(features.check(_NEEDS[reader])))

    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS and readable(name)
    )


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, "" without one."""
    return os.path.splitext(name)[1].lower()


def files_like(name: str) -> str:
    """What to call files with this one's ending: ".heic files"."""
    return f"{suffix_of(name)} files" if suffix_of(name) else "files without an ending"


def formats_in_words(names: Iterable[str]) -> str:
    """The endings of files and how many have each: ".heic (12), .txt (1)"."""
    counts = Counter(suffix_of(name) or "no ending" for name in names)
    return ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
