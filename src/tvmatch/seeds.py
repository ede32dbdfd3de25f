"""Random numbers as functions of a seed and a name, without generator state.

Every random number is a function of a name such as (seed 0, "step", 1200, "noise", row 17). It does not
depend on previous draws: a resumed run, another batch size or another number of processes gets the same
numbers, and no generator state is saved.

`RowDraws` draws numbers for the rows of a batch; any rows can be drawn without the others. `generator` is for
draws without rows, such as the order of an epoch or the initial values of a parameter.
"""

import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VERSION = 2
"""Version of the random streams. Checkpoints record it: other versions give other numbers."""

BLOCK = 256
"""Numbers per stream for short rows; drawing them takes about as long as starting the stream."""

_PARALLEL = 2**18  # numbers from which several threads draw: 3 ms on one thread

Array = npt.NDArray[Any]
_Fill = Callable[[np.random.Generator, Array], object]


def _entropy(seed: int, path: Sequence[int | str]) -> np.random.SeedSequence:
    """The hash of a stream's name; different names give different input to the hash.

    NumPy pads the 32-bit words of the entropy with zeros. The lengths distinguish (1, 2), (1, 2, 0) and
    (1 + 2 * 2**32,); the last bit of a length distinguishes "a" and 97.
    """
    words, lengths = [], []
    for part in (seed, *path):
        if isinstance(part, str):
            if not part:
                raise ValueError(f"a name in the path is empty, got {(seed, *path)}")
            text = part.encode()
            words.append(int.from_bytes(text, "little"))
            lengths.append(16 * len(text) + 1)
        else:
            number = operator.index(part)
            if number < 0:
                raise ValueError(f"seed and path must be non-negative integers, got {(seed, *path)}")
            words.append(number)
            lengths.append(2 * number.bit_length() + 2)
    return np.random.SeedSequence([*words, *lengths])


def fold(seed: int, *path: int | str) -> int:
    """Hash a seed and a path of strings and numbers to a 63-bit seed.

    Args:
        seed: a non-negative integer.
        path: strings and non-negative integers that name the stream.

    Raises:
        ValueError: if `seed` or a number in the path is negative, or a string in the path is empty.
    """
    return int(_entropy(seed, path).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A `torch.Generator` on the CPU for the stream `(seed, *path)`; see `fold`."""
    return torch.Generator("cpu").manual_seed(fold(seed, *path))


class RowDraws:
    """Random numbers for rows: those of row n are a function of (seed, *path, purpose, n).

    They are bit for bit the same for any set and order of rows and any number of threads. Blocks of
    max(1, 256 / w) rows share a stream, where w is the number of values per row, rounded up to a power of
    two. A range therefore draws fewer than 256 unnecessary numbers at each end.

    A stream is Philox 4×64 (Salmon et al., SC 2011), a hash of a key and a counter. The key is the hash of
    (seed, *path); the third of the counter's four words is the block, the fourth the hash of the purpose.
    NumPy converts its bits by the same code on every CPU, unlike PyTorch.

    Args:
        seed: a non-negative integer.
        path: strings and non-negative integers, for example ("step", 1200).

    Raises:
        ValueError: see `fold`.
    """

    def __init__(self, seed: int, *path: int | str) -> None:
        self._name = _entropy(seed, path)

    def normal(
        self, purpose: str, rows: Sequence[int], shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """N(0, 1) of shape (len(rows), *shape) on the CPU.

        Args:
            purpose: name of the numbers; each purpose has its own stream.
            rows: row numbers in 0 … 2⁶⁴ − 1, usually a range.
            shape: of a row.
            dtype: float32 or float64.

        Raises:
            ValueError: if a row number is out of range, or for another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: must be float32 or float64, got {dtype}")
        precision = np.float32 if dtype == torch.float32 else np.float64
        return self._draw(
            purpose,
            rows,
            shape,
            precision,
            lambda stream, block: stream.standard_normal(dtype=precision, out=block),
        )

    def uniform(self, purpose: str, rows: Sequence[int], shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), multiples of 2⁻⁵³, float64; the arguments are those of `normal`."""
        return self._draw(purpose, rows, shape, np.float64, lambda stream, block: stream.random(out=block))

    def _draw(
        self,
        purpose: str,
        rows: Sequence[int],
        shape: Sequence[int],
        precision: type[np.float32 | np.float64],
        fill: _Fill,
    ) -> Tensor:
        width = math.prod(shape)
        height = max(1, BLOCK >> (max(width, 1) - 1).bit_length())
        numbers: Array = np.empty((len(rows), width), precision)
        blocks = _blocks(rows, height)
        word = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")

        def draw(some: Sequence[_Block]) -> None:
            bits = np.random.Philox(self._name)
            stream, state, block = np.random.Generator(bits), bits.state, np.empty((height, width), precision)
            for number, places, inside in some:
                state["state"]["counter"][:] = 0, 0, number, word
                bits.state = state  # faster than a new generator
                fill(stream, block)
                numbers[places] = block[inside]

        threads = torch.get_num_threads() if numbers.size >= _PARALLEL else 1
        if threads == 1:
            draw(blocks)
        else:  # NumPy releases the global interpreter lock
            share = -(-len(blocks) // threads)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(draw, (blocks[i : i + share] for i in range(0, len(blocks), share))))
        return torch.from_numpy(numbers).view(len(rows), *shape)


_Block = tuple[int, slice | list[int], slice | list[int]]
"""Block number, indices of its rows in the result, and indices of these rows in the block."""


def _blocks(rows: Sequence[int], height: int) -> list[_Block]:
    """The blocks of `height` rows that contain `rows`, each once."""
    if isinstance(rows, range) and rows.step == 1 and rows:
        _require_rows(rows.start, rows.stop - 1)
        blocks: list[_Block] = []
        for start in range(rows.start // height * height, rows.stop, height):
            first, last = max(start, rows.start), min(start + height, rows.stop)
            places = slice(first - rows.start, last - rows.start)
            blocks.append((start // height, places, slice(first - start, last - start)))
        return blocks
    found: dict[int, tuple[list[int], list[int]]] = {}
    for place, row in enumerate(map(operator.index, rows)):
        _require_rows(row, row)
        in_result, in_block = found.setdefault(row // height, ([], []))
        in_result.append(place)
        in_block.append(row % height)
    return [(number, *lists) for number, lists in found.items()]


def _require_rows(first: int, last: int) -> None:
    if first < 0 or last >= 2**64:
        raise ValueError(f"rows must lie in 0 … 2^64 - 1, got {first} … {last}")


def in_whole_blocks(compute: Callable[[range], Tensor], rows: range) -> Tensor:
    """Compute `compute(rows)` so that the result of a row is bit for bit the same for every range.

    PyTorch's vectorised and scalar code may round log or cos differently, depending on an element's position
    and the tensor's length. `compute` is therefore called with whole blocks of BLOCK rows.

    Args:
        compute: maps a range to a tensor with one row per number, each a function of that number.
        rows: a range of step 1, not empty.
    """
    first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
    blocks = [compute(range(BLOCK * k, BLOCK * (k + 1))) for k in range(first, last)]
    start = rows.start - BLOCK * first
    return torch.cat(blocks)[start : start + len(rows)]
