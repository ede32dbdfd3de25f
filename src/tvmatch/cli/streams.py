"""Output to terminals and files of any encoding: what it lacks is written otherwise, and nothing fails."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

# Signs that this package prints. Letters are not replaced: they may be of a file's name.
_PLAIN = {
    "…": "...",
    "−": "-",
    "–": "-",
    "×": "x",
    "·": "*",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "²": "^2",
    "∂": "d",
    "‖": "|",
}
_SPINNER = range(0x2800, 0x2900)  # rich's, in Braille


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """One character that the encoding lacks: in ASCII, or the byte of a file's name that is no text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    after = error.start + 1
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), after
    if ord(character) in _SPINNER:
        return "*", after
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode(), after


codecs.register_error("tvmatch.plain", _plain)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Standard output and error of this process take every text while the context lasts."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="tvmatch.plain")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)
