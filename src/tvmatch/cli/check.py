"""`tvmatch check`: compare attention, derivatives and gradients on this machine with float64."""

import math
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tvmatch import __version__
from tvmatch.check import (
    Comparison,
    Setting,
    check_attention,
    check_compilation,
    check_network,
    obstacle_to_kernels,
    own_case,
    random_model,
)
from tvmatch.cli.options import DEVICE_HELP, add_import_option, adder
from tvmatch.compilation import obstacle as obstacle_to_compilation
from tvmatch.config.parser import OneLineParser
from tvmatch.devices import resolve_device, resolve_precision
from tvmatch.errors import InputError
from tvmatch.models import PRESETS
from tvmatch.trained_model import TrainedModel, load

DESCRIPTION = """\
Compare results on this machine with float64 on the CPU: value, tangent and gradients of attention; the
derivative ∂_s F of the network, also with finite differences; and the gradient of the loss, which includes
that of ∂_s F. Errors are relative. The allowed error is measured: it is the change of the exact result
when every number is rounded once to the tested precision. Compiled operations with a hand-written backward
pass are compared with eager execution. The exit code is 1 if any error is too large."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


def run(arguments: list[str]) -> int:
    """Run the checks and print a table."""
    parser = OneLineParser(prog="tvmatch check", description=DESCRIPTION)
    add = adder(parser)
    add("--device", default="auto", help=DEVICE_HELP)
    dtypes = f"auto (as in training), {', '.join(DTYPES)}; bfloat16 and float16 use autocast"
    add("--dtype", default="auto", help=dtypes)
    models = f"run folder, checkpoint, or a network with random weights: {', '.join(PRESETS)}"
    add("--model", default="tiny/2", help=models)
    add_import_option(parser)
    parsed = parser.parse_args(arguments)

    setting = _setting(parsed.device, parsed.dtype)
    model, name = _model(parsed.model)
    with Console(stderr=True).status("checking"):
        of_network = check_network(model, setting)
        of_attention = check_attention(setting, own_case(model.network))
        checks = _grouped(of_attention + of_network + check_compilation(setting))
    _print_facts(setting, model, name)
    Console().print(_table(checks))
    return _verdict(checks)


def _setting(device_name: str, dtype_name: str) -> Setting:
    """Resolve the device and the precision, which the device must support."""
    device = resolve_device(device_name)
    dtype_name = resolve_precision(dtype_name, device)
    if dtype_name not in DTYPES:
        raise InputError("dtype", f"must be one of auto, {', '.join(DTYPES)}, got {dtype_name!r}")
    dtype: torch.dtype = getattr(torch, dtype_name)
    try:
        torch.zeros(1, device=device, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            "dtype", f"{device} does not support {dtype_name} ({str(error).splitlines()[0]})"
        ) from None
    return Setting(device, dtype)


def _model(name: str) -> tuple[TrainedModel, str]:
    """The model of a preset or path, and its name in the output."""
    if name in PRESETS:
        return random_model(name), f"{name} with random weights"
    try:
        return load(name), name
    except InputError as error:
        hint = f"take a run folder, a checkpoint, or {', '.join(PRESETS)}"
        raise error.within("model").with_hint(hint) from None


def _print_facts(setting: Setting, model: TrainedModel, name: str) -> None:
    device, dtype = setting.device, str(setting.dtype).removeprefix("torch.")
    hardware = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    print(f"tvmatch {__version__}, PyTorch {torch.__version__}, {hardware}, {dtype}")
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    print(f"network: {name}, {parameters:,} parameters")
    obstacle = obstacle_to_kernels(setting)
    if device.type == "cuda" and obstacle is not None:
        print(f"fused attention kernels are not used: {obstacle}")
    obstacle = obstacle_to_compilation(device)
    if obstacle is not None:
        print(f"compilation is not compared: {obstacle}")


def _grouped(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Group the comparisons of each computation by each backend."""
    checks: dict[tuple[str, str, str], list[Comparison]] = {}
    for comparison in comparisons:
        key = comparison.subject, comparison.name, comparison.backend
        checks.setdefault(key, []).append(comparison)
    return list(checks.values())


def _failed(check: list[Comparison]) -> list[Comparison]:
    return [comparison for comparison in check if not comparison.passed]


def _table(checks: list[list[Comparison]]) -> Table:
    """One row for each check with its largest error relative to the limit, or one for each failed part."""
    table = Table(box=None)
    for column in ("check", "backend", "worst part"):
        table.add_column(column)
    for column in ("error", "allowed", ""):
        table.add_column(column, justify="right", no_wrap=True)
    subject = ""
    for check in checks:
        if check[0].subject != subject:
            subject = check[0].subject
            table.add_row(f"[bold]{subject}[/]")
        for shown in _failed(check) or [max(check, key=lambda part: part.error / part.tolerance)]:
            numbers = ("–" if math.isnan(x) else f"{x:.1e}" for x in (shown.error, shown.tolerance))
            mark = "[green]ok[/]" if shown.passed else "[bold red]OFF[/]"
            table.add_row(f"  {escape(shown.name)}", shown.backend, escape(shown.part), *numbers, mark)
    return table


def _verdict(checks: list[list[Comparison]]) -> int:
    """Print the last line and return the exit code."""
    failed = []
    for first, *_ in filter(_failed, checks):
        by = f" ({first.backend})" if first.backend else ""
        failed.append(f"{first.subject}: {first.name}{by}")
    if failed:
        print(f"{len(failed)} of {len(checks)} checks are off: {'; '.join(failed)}")
        return 1
    print(f"all {len(checks)} checks passed")
    return 0
