"""Tile sizes of the kernels: a table, so that every run of a machine computes in the same order."""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program works on at a time, and with what.

    Attributes:
        queries: rows of Q a tile.
        keys: rows of K a tile.
        warps: of 32 threads each.
        stages: tiles in flight between memory and the matrix units.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Part(NamedTuple):
    """One launch of a backward kernel: the gradients it computes, by their operands' names, and its tile."""

    gradients: tuple[str, ...]
    tile: Tile


class Tiles(NamedTuple):
    """Tiles of the three kernels for one head width; a backward kernel may be launched in several parts.

    More parts repeat some of the products of a tile, but each has fewer accumulators, and so room for larger
    tiles.
    """

    forward: Tile
    query_gradients: tuple[Part, ...]
    key_gradients: tuple[Part, ...]


def parts(tiles: dict[str, Tile]) -> tuple[Part, ...]:
    """Launches from the names of their gradients, separated by spaces."""
    return tuple(Part(tuple(names.split()), tile) for names, tile in tiles.items())


_Q, _K = "q q_tangent", "k k_tangent v v_tangent"
_APART = ("q", "q_tangent"), ("k", "v", "k_tangent", "v_tangent")


def _apart(forward: Tile, query_gradients: Tile, key_gradients: Tile) -> Tiles:
    """Every gradient in a launch of its own."""
    of_queries, of_keys = _APART
    return Tiles(
        forward,
        parts(dict.fromkeys(of_queries, query_gradients)),
        parts(dict.fromkeys(of_keys, key_gradients)),
    )


# Half precision on Hopper, with a tangent: tiles that ahead-of-time compilation for sm_90 shows without
# register spills and without serialised matrix products (at 64, 80, 96 and 128; widths that are no multiple
# of 16 spill up to some hundred bytes, and D = 256 spills; see benchmarks/registers.py). A
# product whose left operand lies in shared memory can run at full rate from 64 columns on, hence the large
# tiles, at D = 128 at the price of products that more launches repeat.
_TANGENT = {
    64: Tiles(Tile(128, 64, 8, 2), parts({_Q: Tile(128, 64, 8, 2)}), parts({_K: Tile(32, 128, 8, 2)})),
    128: Tiles(
        Tile(128, 64, 8, 2),
        parts({"q": Tile(128, 32, 8, 2), "q_tangent": Tile(128, 64, 8, 2)}),
        parts(
            {"k": Tile(32, 128, 8, 2), "v": Tile(64, 128, 8, 2), "k_tangent v_tangent": Tile(64, 128, 8, 2)}
        ),
    ),
    256: _apart(Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(16, 64, 8, 1)),
}
# The same for the value alone, which has a third of the matrices.
_VALUE = {
    64: Tiles(Tile(128, 128, 8, 2), parts({_Q: Tile(128, 64, 8, 2)}), parts({_K: Tile(64, 128, 8, 2)})),
    128: Tiles(Tile(128, 64, 8, 2), parts({_Q: Tile(128, 64, 8, 2)}), parts({_K: Tile(64, 128, 8, 2)})),
    256: _apart(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
}
# float32 is computed without the matrix units, and spills registers from D = 64 on with a tangent: these
# tiles spill the least of those tried.
_SINGLE_PRECISION = _apart(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
# Half precision on GPUs with less shared memory than Hopper's, down to the 99 KB of consumer chips. With a
# tangent some spill at D = 128.
_COMPACT = {
    64: Tiles(Tile(64, 32, 4, 2), parts({_Q: Tile(32, 32, 4, 2)}), parts({_K: Tile(32, 32, 4, 2)})),
    128: _apart(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: _apart(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that one program may have


def tiles_for(
    block_d: int, itemsize: int, *, tangent: bool, shared_memory: int = HOPPER_SHARED_MEMORY
) -> Tiles:
    """The tiles for a padded head width, an element size in bytes, with a tangent or without.

    Args:
        shared_memory: bytes that a program may have on the GPU in question.
    """
    if itemsize == 4:
        return _SINGLE_PRECISION
    table = _COMPACT if shared_memory < HOPPER_SHARED_MEMORY else _TANGENT if tangent else _VALUE
    return next(tiles for width, tiles in table.items() if block_d <= width)
