"""Random streams that belong to a purpose, not to a moment.

Every draw of the project belongs to a name such as (seed 0, "step", 1200, "noise", row 17). Nothing depends
on how many draws came before, so a resumed run, another batch size or another number of processes sees
the same numbers, and no generator state has to be saved.

`RowDraws` gives each row of a batch numbers of its own, and any rows without drawing the others. `generator`
serves what has no rows: the order of an epoch, the initial values of a parameter.
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
"""Of the streams. Checkpoints record it: a run repeats bit for bit under its own version alone."""

BLOCK = 256
"""Numbers that a stream of short rows serves; drawing them costs about as much as starting it."""

_PARALLEL = 2**18  # numbers: 3 ms on one thread, beside 0.1 ms for starting a second

Array = npt.NDArray[Any]
_Fill = Callable[[np.random.Generator, Array], object]


def _entropy(seed: int, path: Sequence[int | str]) -> np.random.SeedSequence:
    """The hash of a stream's name: no two names give the same words to it.

    NumPy pads the 32-bit words of the entropy with zeros. The lengths keep (1, 2), (1, 2, 0) and
    (1 + 2 * 2**32,) apart, and the last bit of a length keeps "a" and 97 apart.
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
    """Mix a seed and a path of purposes and numbers into one 63-bit seed.

    Args:
        seed: any non-negative integer.
        path: strings and non-negative integers that name the stream.

    Raises:
        ValueError: if `seed` or a number of the path is negative, or a string of it is empty.
    """
    return int(_entropy(seed, path).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` for the stream `(seed, *path)`; see `fold`."""
    return torch.Generator(device).manual_seed(fold(seed, *path))


class RowDraws:
    """Random numbers of rows: those of row n belong to (seed, *path, purpose, n) alone.

    They are bit for bit the same whichever rows are drawn with them, in any order and on any number of
    threads. Rows are blocked: max(1, 256 / w) of them share a stream, w being the numbers of a row rounded up
    to a power of two, so a range draws fewer than 256 numbers at either end that it does not need.

    A stream is Philox 4×64 (Salmon et al., SC 2011), a hash of a key and a counter. The key is the hash of
    (seed, *path); of the counter's four words the third is the block, the fourth the hash of the purpose.
    NumPy's transformations of its bits are the same code on every CPU, unlike PyTorch's.

    Args:
        seed: any non-negative integer.
        path: strings and non-negative integers, for example ("step", 1200).

    Raises:
        ValueError: as `fold`.
    """

    def __init__(self, seed: int, *path: int | str) -> None:
        self._name = _entropy(seed, path)

    def normal(
        self,
        purpose: str,
        rows: Sequence[int],
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """N(0, 1) of shape (len(rows), *shape) on the CPU.

        Args:
            purpose: what they are for; other purposes have other numbers.
            rows: numbers of rows in 0 … 2⁶⁴ − 1, usually a range.
            shape: of a row.
            dtype: float32 or float64.

        Raises:
            ValueError: if a row's number is out of range, or for another dtype.
        """
        if dtype == torch.float32:
            return self._draw(purpose, rows, shape, np.float32, _normal_32)
        if dtype == torch.float64:
            return self._draw(purpose, rows, shape, np.float64, _normal_64)
        raise ValueError(f"dtype: must be float32 or float64, got {dtype}")

    def uniform(self, purpose: str, rows: Sequence[int], shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), multiples of 2⁻⁵³: float64; arguments as for `normal`."""
        return self._draw(purpose, rows, shape, np.float64, _uniform_64)

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
                bits.state = state  # a tenth of the cost of a new generator
                fill(stream, block)
                numbers[places] = block[inside]

        threads = torch.get_num_threads() if numbers.size >= _PARALLEL else 1
        if threads == 1:
            draw(blocks)
        else:  # NumPy draws without the lock of the interpreter
            share = -(-len(blocks) // threads)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(draw, (blocks[i : i + share] for i in range(0, len(blocks), share))))
        return torch.from_numpy(numbers).view(len(rows), *shape)


def _normal_32(stream: np.random.Generator, block: Array) -> None:
    stream.standard_normal(dtype=np.float32, out=block)


def _normal_64(stream: np.random.Generator, block: Array) -> None:
    stream.standard_normal(out=block)


def _uniform_64(stream: np.random.Generator, block: Array) -> None:
    stream.random(out=block)


_Block = tuple[int, slice | list[int], slice | list[int]]
"""Its number, the places of its rows in the result, and which of its rows they are."""


def _blocks(rows: Sequence[int], height: int) -> list[_Block]:
    """The blocks of `height` rows that hold `rows`, each once."""
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
    """compute(rows), bit for bit the same for a row whatever the range, for a function of each row alone.

    PyTorch may round log or cos differently by an element's place and the tensor's length: a vectorised body
    has another code than the rest. So `compute` always sees a whole block, rows BLOCK k … BLOCK (k + 1) − 1.

    Args:
        compute: from a range to a tensor with as many rows.
        rows: a range of step 1, not empty.
    """
    first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
    blocks = [compute(range(BLOCK * k, BLOCK * (k + 1))) for k in range(first, last)]
    start = rows.start - BLOCK * first
    return torch.cat(blocks)[start : start + len(rows)]
