"""Time candidate tiles of each attention kernel, for the table in `tvmatch/attention/tiles.py`.

    PYTHONPATH=src python benchmarks/attention.py --sweep

The kernels are compiled in parallel processes first (they land in Triton's cache on disk); then every
candidate is launched and timed alone, after its results were compared with those of the table's tiles.

Shapes: B batch, H heads, N queries and keys, D head width.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import common
import torch
from attention_contenders import Shape, relative_error
from attention_report import TOLERANCES
from common import Work
from torch import Tensor

from tvmatch.attention.operands import Operands
from tvmatch.attention.tiles import Part, Tile, Tiles, tiles_for

SHAPES: list[Shape] = [(8, 18, 1024, 64), (1, 24, 8192, 128)]
COMPILE_SECONDS = 75  # what is not compiled by then is left out

FORWARD: tuple[str, ...] = ()


class Candidate(NamedTuple):
    """A tile for one launch.

    Attributes:
        gradients: that the launch computes, by the names of their operands; FORWARD for the forward pass.
        tile: queries, keys, warps, stages.
        tangent: with the tangent, or the value alone.
        descriptors: read through the copy engine where the layout allows (None), or through pointers (False).
    """

    gradients: tuple[str, ...]
    tile: Tile
    tangent: bool
    descriptors: bool | None = None

    @property
    def kernel(self) -> str:
        """What is launched, in words."""
        names = [name for name in self.gradients if self.tangent or "tangent" not in name]
        return ("gradients of " + ", ".join(names) if names else "forward") + (
            "" if self.tangent else " (value only)"
        )

    def alone(self, table: Tiles) -> Tiles:
        """The backward pass of this launch and no other; the row statistics stay as they are."""
        part = (Part(self.gradients, self.tile),)
        return table._replace(
            query_gradients=part if self.gradients[0] == "q" else (),
            key_gradients=part if self.gradients[0] != "q" else (),
        )

    def complete(self, table: Tiles) -> Tiles:
        """The same behind the table's launches for the queries, which also compute the row statistics."""
        alone = self.alone(table)
        return alone if alone.query_gradients else alone._replace(query_gradients=table.query_gradients)


# By the gradients of a launch (the forward pass has none): queries, keys, warps, stages. The table's tiles
# and one step around them, without those that ahead-of-time compilation shows to spill badly, and other ways
# to share the gradients among launches.
_TANGENT = {
    64: {
        "": "128,64,8,2 128,64,8,3 128,128,8,2 128,32,8,3 64,64,4,2 64,64,4,3 64,128,4,2",
        "q q_tangent": "128,64,8,2 128,64,8,3 128,32,8,2 128,32,8,3 64,64,4,2 64,64,4,3 64,32,4,3",
        "k k_tangent v v_tangent": "32,128,8,2 32,128,8,3 16,128,8,2 32,64,4,2 16,64,4,2",
        "k k_tangent": "32,128,8,2 32,128,8,3 64,128,8,2 32,64,4,2",
        "v v_tangent": "64,128,8,2 64,128,8,3 32,128,8,2 64,64,4,2",
        "k": "64,128,8,2 64,64,4,2",
        "v": "64,128,8,2 128,128,8,2 64,64,4,2",
        "k_tangent v_tangent": "64,128,8,2 128,128,8,2 64,64,4,2",
    },
    128: {
        "": "128,64,8,2 128,64,8,1 128,32,8,2 128,32,8,3 64,64,4,2 64,64,4,1 64,32,4,2",
        "q q_tangent": "64,16,4,2 64,16,4,3 64,32,4,2 128,32,8,2",
        "q": "128,32,8,2 128,32,8,3 128,64,8,1 64,32,4,2 64,32,4,1 64,64,4,1",
        "q_tangent": "128,64,8,2 128,64,8,3 128,128,8,2 64,64,4,2",
        "k k_tangent": "16,128,8,2 16,128,8,3",
        "v v_tangent": "32,128,8,2 32,128,8,3 64,128,8,2 32,64,4,2",
        "k": "32,128,8,2 32,128,8,3 32,64,4,2 32,64,4,1",
        "v": "64,128,8,2 64,128,8,1 32,128,8,2 64,64,4,2 64,64,4,1",
        "k_tangent v_tangent": "64,128,8,2 64,128,8,3 32,128,8,2 64,64,4,2",
    },
}
_VALUE = {
    64: {
        "": "128,128,8,2 128,128,8,3 128,64,8,3 128,64,4,3 64,64,4,3",
        "q q_tangent": "128,64,8,2 128,64,8,3 128,128,8,2 64,64,4,3",
        "k k_tangent v v_tangent": "64,128,8,2 64,128,8,3 32,128,8,3 64,64,4,2",
    },
    128: {
        "": "128,64,8,2 128,64,8,3 128,128,8,2 64,64,4,3",
        "q q_tangent": "128,64,8,2 128,32,8,2 128,32,8,3 64,32,4,3",
        "k k_tangent v v_tangent": "64,128,8,2 32,128,8,2 32,128,8,3 32,64,4,2",
    },
}


def own_candidates(width: int, itemsize: int, tangent: bool) -> list[Candidate]:
    """The launches of the table."""
    table = tiles_for(width, itemsize, tangent=tangent)
    parts = [Part(FORWARD, table.forward), *table.query_gradients, *table.key_gradients]
    return [Candidate(part.gradients, part.tile, tangent) for part in parts]


def candidates(width: int, itemsize: int, quick: bool) -> list[Candidate]:
    """What to try for a head width, the table's own first; with `quick`, these alone."""
    found: list[Candidate] = []
    for tangent, lists in ((True, _TANGENT), (False, _VALUE)):
        own = own_candidates(width, itemsize, tangent)
        found += own
        if not quick:
            found += [candidate._replace(descriptors=False) for candidate in own]
            for gradients, tiles in lists.get(max(64, width), {}).items():
                names = tuple(gradients.split())
                others = [Candidate(names, Tile(*map(int, t.split(","))), tangent) for t in tiles.split()]
                found += [other for other in others if other not in own]
    return found


# --- running one candidate -----------------------------------------------------------------------------


class Problem:
    """Random operands and what the launchers take besides."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        draws = torch.Generator(device).manual_seed(0)
        self.tensors = [torch.randn(shape, generator=draws, device=device, dtype=dtype) for _ in range(8)]

    def operands(self, tangent: bool) -> Operands:
        """q, k, v and, if asked for, their tangents."""
        return Operands(*self.tensors[: 6 if tangent else 3])

    def run(self, candidate: Candidate, *, alone: bool) -> Work:
        """The candidate's launch, alone or with those that it needs to be right."""
        from tvmatch.attention import launch  # imports Triton

        q, tangent = self.tensors[0], candidate.tangent
        table = tiles_for(q.shape[3], q.itemsize, tangent=tangent)
        operands, scale = self.operands(tangent), q.shape[3] ** -0.5
        cotangents = self.tensors[6], self.tensors[7] if tangent else None
        loads = {"descriptors": candidate.descriptors}
        if candidate.gradients == FORWARD:
            return Work(lambda _: launch.forward(operands, None, scale, False, tile=candidate.tile, **loads))
        tiles = candidate.alone(table) if alone else candidate.complete(table)
        result = launch.forward(operands, None, scale, False)
        return Work(
            lambda _: launch.backward(operands, result, *cotangents, None, scale, False, tiles=tiles, **loads)
        )

    def results(self, candidate: Candidate) -> dict[str, Tensor]:
        """What the candidate computes, by name."""
        output = self.run(candidate, alone=False).call(None)._asdict()
        names = candidate.gradients or tuple(output)
        return {name: output[name] for name in names if output[name] is not None}


def compile_candidate(candidate: Candidate, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Run it on a small input that Triton specialises like the large one; why that failed, or nothing."""
    batch, heads, length, width = shape
    try:
        Problem((min(batch, 2), heads, min(length, 512), width), dtype, device).results(candidate)
        common.synchronize(device)
    except Exception as error:
        return _line(error)
    return ""


def compile_all(
    jobs: Sequence[tuple[Candidate, Shape]], dtype: torch.dtype, device: torch.device
) -> dict[tuple[Candidate, Shape], str]:
    """Why each job cannot run, or nothing; in as many processes as there are cores to spare."""
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    end = time.perf_counter() + COMPILE_SECONDS
    problems: dict[tuple[Candidate, Shape], str] = {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
        pending = {job: pool.apply_async(compile_candidate, (*job, dtype, device)) for job in jobs}
        for job, result in pending.items():
            try:
                problems[job] = result.get(max(0.0, end - time.perf_counter()))
            except multiprocessing.TimeoutError:
                problems[job] = f"not compiled within {COMPILE_SECONDS} s"
    return problems


def compile_table(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels that attention uses on these shapes; errors are left to those who use them."""
    of_width = {shape[3]: shape for shape in shapes}
    jobs = [
        (candidate, shape)
        for shape in of_width.values()
        for tangent in (True, False)
        for candidate in own_candidates(shape[3], dtype.itemsize, tangent)
    ]
    compile_all(jobs, dtype, device)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


# --- the sweep -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A candidate's time on a shape and its difference from the table's results; else a note why not."""

    shape: Shape
    candidate: Candidate
    ms: float | None = None
    difference: float | None = None
    note: str = ""


def time_candidate(
    candidate: Candidate, shape: Shape, problem: Problem, expected: dict[tuple[str, bool], Tensor]
) -> Result:
    """Compare with `expected`, into which the first results of each name go, then time the launch alone."""
    q = problem.tensors[0]
    difference = 0.0
    for name, tensor in problem.results(candidate).items():
        known = expected.setdefault((name, candidate.tangent), tensor)
        difference = max(difference, relative_error(tensor, known.double()))
    if difference > TOLERANCES[q.dtype]:
        return Result(shape, candidate, difference=difference, note="WRONG")
    works = {"": problem.run(candidate, alone=True)}
    timing = common.time_together(works, q.device, seconds=0.05, warm_up=1)[""]
    return Result(shape, candidate, timing.ms, difference)


def sweep_shape(
    shape: Shape,
    found: Sequence[Candidate],
    problems: Mapping[tuple[Candidate, Shape], str],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Result]:
    """A result for each candidate; the table's come first, and the others are compared with them."""
    problem = Problem(shape, dtype, device)
    expected: dict[tuple[str, bool], Tensor] = {}
    results = []
    for candidate in found:
        result = Result(shape, candidate, note=problems.get((candidate, shape), ""))
        if not result.note:
            try:
                result = time_candidate(candidate, shape, problem, expected)
            except Exception as error:
                result = result._replace(note=_line(error))
        results.append(result)
    return results


def _place(result: Result) -> tuple[Any, ...]:
    candidate = result.candidate
    kernel = result.shape, not candidate.tangent, candidate.gradients
    return (*kernel, float("inf") if result.ms is None else result.ms)


def best(results: Sequence[Result]) -> list[Result]:
    """The fastest candidate of each shape and kernel."""
    fastest: dict[tuple[Any, ...], Result] = {}
    for result in sorted(results, key=_place):
        if result.ms is not None:
            fastest.setdefault(_place(result)[:-1], result)
    return list(fastest.values())


def results_table(results: Sequence[Result]) -> str:
    """The times, fastest first within each kernel."""
    lines = []
    for result in sorted(results, key=_place):
        candidate = result.candidate
        shape, tile = "×".join(map(str, result.shape)), ",".join(map(str, candidate.tile))
        loads = "pointers" if candidate.descriptors is False else ""
        lines.append([shape, candidate.kernel, tile, loads, result.ms, result.note])
    return common.table(("shape", "launch", "queries,keys,warps,stages", "loads", "ms", "note"), lines)


def main(arguments: argparse.Namespace) -> int:
    """Compile, time, print, write; 1 if a candidate computes something else than the table's tiles."""
    device, dtype = arguments.device, common.chosen_dtype(arguments)
    start = time.perf_counter()
    shapes = arguments.shapes or SHAPES
    jobs = [(c, s) for s in shapes for c in candidates(s[3], dtype.itemsize, arguments.quick)]
    problems: dict[tuple[Candidate, Shape], str] = {}
    if device.type == "cuda":
        problems = compile_all(jobs, dtype, device)
        print(f"{len(jobs)} candidates compiled after {time.perf_counter() - start:.0f} s", flush=True)
    results: list[Result] = []
    for shape in shapes:
        results += sweep_shape(shape, [c for c, s in jobs if s == shape], problems, dtype, device)
        print(f"{shape} timed after {time.perf_counter() - start:.0f} s", flush=True)

    facts = common.record(device) | {"dtype": str(dtype)}
    text = f"{results_table(results)}\n\n## In short\n\nThe fastest:\n\n{results_table(best(results))}"
    rows = [result._asdict() | {"candidate": result.candidate._asdict()} for result in results]
    folder = common.results_folder(device, arguments.out)
    common.write_results(folder, "tile_sweep", facts, {"rows": rows}, text)
    print(f"{text}\n\nwritten to {folder}")
    return 1 if any(result.note == "WRONG" for result in results) else 0
