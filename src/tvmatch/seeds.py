"""Random streams that belong to a purpose, not to a moment.

Every draw of the project comes from a generator seeded with (seed, purpose, number), for example
`(0, "noise", 1200)`. Nothing depends on how many draws came before, so a resumed run, another
batch size or another number of processes sees the same numbers, and no generator state has to
be saved.
"""

import operator
import zlib

import numpy as np
import torch


def fold(seed: int, *path: int | str) -> int:
    """Mix a seed and a path of purposes and numbers into one 63-bit seed.

    Args:
        seed: any non-negative integer.
        path: strings and non-negative integers that name the stream.

    Raises:
        ValueError: if `seed` or a number of the path is negative, or a string of it is empty.
    """
    if any(isinstance(part, str) and not part for part in path):  # its checksum is 0, the number
        raise ValueError(f"a name in the path is empty, got {(seed, *path)}")
    parts = (zlib.crc32(part.encode()) if isinstance(part, str) else operator.index(part) for part in path)
    words = [operator.index(seed), *parts]
    if min(words) < 0:
        raise ValueError(f"seed and path must be non-negative integers, got {(seed, *path)}")
    # NumPy hashes the entropy's 32-bit words, padded with zeros; the lengths keep (1, 2), (1, 2, 0) and
    # (1 + 2 * 2**32,) apart.
    lengths = [word.bit_length() + 1 for word in words]
    state = np.random.SeedSequence([*words, *lengths]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` for the stream `(seed, *path)`; see `fold`."""
    return torch.Generator(device).manual_seed(fold(seed, *path))
