"""Recognise image files by the endings of their names."""

import os
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from PIL import Image

# Formats that Pillow decodes itself. Not EPS and PS, for which it starts Ghostscript; not WMF, EMF, BUFR,
# GRIB and HDF5, which it only recognises; not PDF, MPEG and FLI, which are not single pictures.
FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM"),
    *("JPEG", "JPEG2000", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN"),
    *("TGA", "TIFF", "WEBP", "XBM", "XPM"),
)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """File name endings in lower case (".png") of `FORMATS`."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, "" without one."""
    return os.path.splitext(name)[1].lower()


def files_like(name: str) -> str:
    """Description of files with the same ending: ".heic files"."""
    return f"{suffix_of(name)} files" if suffix_of(name) else "files without an ending"


def formats_in_words(names: Iterable[str]) -> str:
    """The endings of files with their counts: ".heic (12), .txt (1)"."""
    counts = Counter(suffix_of(name) or "no ending" for name in names)
    return ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
