"""`tvmatch train RECIPE --dry_run`: parameters, FLOPs and memory of a training step, without running it."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from tvmatch.acceleration import Recompute
from tvmatch.config.schema import Config
from tvmatch.data.config import ImagesData
from tvmatch.data.spec import DataSpec
from tvmatch.dry_run.estimate import Estimate, estimate, rows_at_a_time
from tvmatch.dry_run.expected_data import expected_spec
from tvmatch.dry_run.tracker import FORWARD
from tvmatch.models import network_class_of

RECOMPUTE: tuple[Recompute, ...] = ("none", "pointwise", "blocks")
Choice = tuple[Recompute, bool]
"""Values of `training.recompute` and `training.compile`."""
UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
NOT_COUNTED = """\
Counted: all tensors of a training step, with the fused attention kernels; 1 GB is 10^9 bytes. Not counted: \
fragmentation, the CUDA context, workspaces of libraries, communication, pictures of samples. Nothing is \
sharded: every GPU holds all weights, averages and moments. Compiled steps are counted before operators are \
fused, which may overestimate memory by about 10 %."""


def run(config: Config, world_size: int) -> int:
    """Print tables of the cost of a training step on one of `world_size` GPUs.

    Raises:
        InputError: if the configuration is invalid, the batch size is not divisible by the number of GPUs, or
            the shape of the data is not known without reading them.
    """
    config.check()
    spec = expected_spec(config)
    rows_at_a_time(config, world_size)
    console = Console()
    choice = (config.training.recompute, config.training.compile)
    counts: dict[Choice, Estimate] = {}
    with Console(stderr=True).status("counting a training step"):
        # Compilation is slow, so it is counted for the configured choice only.
        for recompute, compiled in dict.fromkeys([*((what, False) for what in RECOMPUTE), choice]):
            plain = counts.get(("none", False))
            if plain is not None and not plain.has_blocks and (recompute, compiled) != choice:
                continue  # it has nothing to recompute
            training = replace(config.training, recompute=recompute, compile=compiled)
            counted = estimate(replace(config, training=training), spec, world_size=world_size)
            counts[recompute, compiled] = counted
    chosen = counts[choice]
    for line in _facts(config, spec, world_size, chosen):
        console.print(line, highlight=False, soft_wrap=True)
    for table in (
        _parameters(chosen),
        _flops(chosen, counts["none", False], config, world_size),
        _memory(chosen),
        _recomputation(counts, choice),
    ):
        console.print()
        console.print(table)
    console.print()
    console.print(NOT_COUNTED, highlight=False, soft_wrap=True)
    return 0


def _facts(config: Config, spec: DataSpec, world_size: int, counted: Estimate) -> list[str]:
    training = config.training
    kind = network_class_of(config.network).__name__
    shape = "×".join(map(str, spec.shape))
    classes = f"{spec.class_count or 'no'} classes"
    if isinstance(config.data, ImagesData) and spec.class_count:
        classes = "counted with one class, since the number of classes is not known before the data are read"
    facts = [
        f"{config.recipe}: {kind} for data of shape {shape}, {classes}",
        f"batch {training.batch_size}: {world_size} × {training.accumulation} × {counted.rows} "
        "(world_size × training.accumulation × elements at a time)",
        f"precision {training.precision if training.precision != 'auto' else 'bfloat16 (auto)'}, "
        f"{'compiled' if training.compile else 'not compiled'}, recomputed in the backward pass: "
        f"{training.recompute}",
    ]
    if config.objective.teacher is not None:
        facts.append("the teacher is assumed to have the same size as the network")
    return facts


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _unit(size: float) -> str:
    """The largest unit in which `size` is at least 1."""
    return next((unit for unit, factor in UNITS.items() if size >= factor), "")


def _in(unit: str, size: float) -> str:
    number = size / UNITS[unit]
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"


def _parameters(counted: Estimate) -> Table:
    table = _table("parameters", "part", "number")
    for part, count in counted.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_row("all", f"{sum(counted.parameters.values()):,}")
    return table


def _flops(chosen: Estimate, plain: Estimate, config: Config, world_size: int) -> Table:
    """FLOPs of each pass without recomputation, and of the recomputation."""
    elements = config.training.batch_size // world_size
    useful = sum(plain.flops.values())
    of_step, of_element = _unit(useful), _unit(useful / elements)
    columns = f"{of_step}FLOP", f"{of_element}FLOP an element"
    table = _table("floating-point operations of a step, on one GPU", "pass", *columns)

    def add(name: str, count: int) -> None:
        table.add_row(name, _in(of_step, count), _in(of_element, count / elements))

    for name, count in plain.flops.items():
        add(name, count)
    add("all", useful)
    if FORWARD in plain.flops:
        table.add_row("all, in forward passes", f"{useful / plain.flops[FORWARD]:.3g}")
    again = sum(chosen.flops.values()) - useful
    if again:
        add("computed again", again)
    return table


def _memory(counted: Estimate) -> Table:
    unit = _unit(counted.peak)
    table = _table("memory of one GPU", "part", f"{unit}B", "at the peak of a step")
    for name, size, at_peak in (
        ("weights", counted.weights, counted.weights),
        ("optimiser's moments", counted.moments, counted.moments),
        ("target average", counted.target, counted.target),
        ("evaluation average", counted.evaluation, counted.evaluation),
        ("gradients", counted.gradients, counted.gradients_at_peak),
        ("activations", counted.held, counted.activations),
    ):
        table.add_row(name, _in(unit, size), _in(unit, at_peak))
    table.add_row("all", "", _in(unit, counted.peak))
    return table


def _recomputation(counts: dict[Choice, Estimate], choice: Choice) -> Table:
    unit = _unit(counts[choice].peak)
    columns = "training.compile", f"activations, {unit}B", f"peak, {unit}B"
    table = _table("memory for other options", "training.recompute", *columns)
    for (recompute, compiled), counted in counts.items():
        mark = " (this run)" if (recompute, compiled) == choice else ""
        numbers = _in(unit, counted.activations), _in(unit, counted.peak)
        table.add_row(f"{recompute}{mark}", str(compiled).lower(), *numbers)
    return table
