"""Image files of kinds that Pillow reads and does not write, byte by byte; and photographs."""

import struct
import zlib
from pathlib import Path

PHOTOGRAPHS = Path(__file__).parents[1] / "files" / "photographs"


def png(depth: int, colour: int, width: int, rows: bytes, *, key: bytes = b"") -> bytes:
    """A PNG (ISO/IEC 15948) of one row.

    Args:
        depth: bits a sample.
        colour: type: 0 grey, 2 RGB, 3 palette (of four colours), 4 and 6 with alpha.
        width: pixels.
        rows: the packed samples of the row.
        key: content of the chunk tRNS.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90, 255, 0, 0])) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
        + palette
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + rows))  # a row of filter type 0
        + chunk(b"IEND", b"")
    )


def tiff(
    width: int, row: bytes, bits: tuple[int, ...], *, photometric: int = 1, extra: int = -1, sample: int = 1
) -> bytes:
    """An uncompressed little-endian TIFF 6.0 of one row.

    Args:
        width: pixels.
        row: the packed samples.
        bits: of each sample of a pixel.
        photometric: 0 grey with white at 0, 1 grey, 2 RGB.
        extra: kind of the last sample: 1 premultiplied alpha, 2 alpha; −1 for none.
        sample: 1 unsigned, 2 signed, 3 floating point.
    """
    short, long = 3, 4
    entries: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (long, (width,)),
        257: (long, (1,)),
        258: (short, bits),
        259: (short, (1,)),
        262: (short, (photometric,)),
        273: (long, (0,)),  # where the row begins, known below
        277: (short, (len(bits),)),
        278: (long, (1,)),
        279: (long, (len(row),)),
        339: (short, (sample,) * len(bits)),
    }
    if extra >= 0:
        entries[338] = (short, (extra,))
    position = 8 + 2 + 12 * len(entries) + 4
    directory, behind = b"", b""
    for tag in sorted(entries):
        kind, numbers = entries[tag]
        if tag == 273:
            numbers = (
                position + sum(2 * len(n) for k, n in entries.values() if 2 * len(n) > 4 and k == short),
            )
        content = struct.pack(f"<{len(numbers)}{'H' if kind == short else 'L'}", *numbers)
        if len(content) > 4:
            content, behind = struct.pack("<L", position + len(behind)), behind + content
        directory += struct.pack("<HHL", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    return struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + directory + bytes(4) + behind + row
