"""Tile sizes of the kernels: a fixed table, so that results are reproducible on a kind of GPU."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The tile of one program.

    Attributes:
        queries: rows of Q per tile.
        keys: rows of K per tile.
        warps: number of warps.
        stages: number of software-pipeline stages.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Part(NamedTuple):
    """One launch of a backward kernel: the names of the gradients that it computes, and its tile."""

    gradients: tuple[str, ...]
    tile: Tile


class Tiles(NamedTuple):
    """Tiles of the three kernels for one head width; a backward kernel may be launched in several parts.

    More parts repeat some matrix products, but each part has fewer accumulators and can use larger tiles.
    """

    forward: Tile
    query_gradients: tuple[Part, ...]
    key_gradients: tuple[Part, ...]


def parts(tiles: dict[str, Tile]) -> tuple[Part, ...]:
    """Parts from a mapping of gradient names, separated by spaces, to tiles."""
    return tuple(Part(tuple(names.split()), tile) for names, tile in tiles.items())


_Q, _K = "q q_tangent", "k k_tangent v v_tangent"
_APART = ("q", "q_tangent"), ("k", "v", "k_tangent", "v_tangent")


def _apart(forward: Tile, query_gradients: Tile, key_gradients: Tile) -> Tiles:
    """Launch each gradient separately."""
    of_queries, of_keys = _APART
    return Tiles(
        forward,
        parts(dict.fromkeys(of_queries, query_gradients)),
        parts(dict.fromkeys(of_keys, key_gradients)),
    )


# Half precision on Hopper, with a tangent. Compiled for sm_90, these tiles have no register spills and no
# serialised matrix products at D = 64, 80, 96 and 128 (benchmarks/registers.py); widths that are no multiple
# of 16 spill a few hundred bytes, and D = 256 spills. A product whose left operand is in shared memory needs
# at least 64 columns to run at full rate, hence the large tiles; at D = 128 they cost repeated products.
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
# Half precision on Hopper, without a tangent.
_VALUE = {
    64: Tiles(Tile(128, 128, 8, 2), parts({_Q: Tile(128, 64, 8, 2)}), parts({_K: Tile(64, 128, 8, 2)})),
    128: Tiles(Tile(128, 64, 8, 2), parts({_Q: Tile(128, 64, 8, 2)}), parts({_K: Tile(64, 128, 8, 2)})),
    256: _apart(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
}
# float32 does not use the tensor cores. With a tangent it spills registers from D = 64 on; these spill least.
_SINGLE_PRECISION = _apart(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
# Half precision on GPUs with less shared memory than Hopper, down to the 99 KB of consumer GPUs. With a
# tangent some tiles spill at D = 128.
_COMPACT = {
    64: Tiles(Tile(64, 32, 4, 2), parts({_Q: Tile(32, 32, 4, 2)}), parts({_K: Tile(32, 32, 4, 2)})),
    128: _apart(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: _apart(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
HOPPER_SHARED_MEMORY = 227 * 1024  # bytes per program


def tiles_for(
    block_d: int, itemsize: int, *, tangent: bool, shared_memory: int = HOPPER_SHARED_MEMORY
) -> Tiles:
    """The tiles for a padded head width `block_d` and an element size in bytes.

    Args:
        tangent: whether there is a tangent.
        shared_memory: bytes of shared memory that a program can use.
    """
    if itemsize == 4:
        return _SINGLE_PRECISION
    table = _COMPACT if shared_memory < HOPPER_SHARED_MEMORY else _TANGENT if tangent else _VALUE
    return next(tiles for width, tiles in table.items() if block_d <= width)
