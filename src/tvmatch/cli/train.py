"""`tvmatch train`: train a configuration, then draw samples and compute metrics."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from rich.console import Console

from tvmatch.cli import results
from tvmatch.cli.options import DEVICE_HELP, add_import_option, load_data, load_decoder
from tvmatch.config import Config, recipe_names
from tvmatch.config.parser import add_defaults, config_parser, instantiate
from tvmatch.config.recipes import recipe_text
from tvmatch.config.sections import (
    KIND_OPTIONS,
    config_class,
    present_arguments,
    with_chosen_kinds,
    with_kinds,
    with_present_names,
)
from tvmatch.config.yaml_files import differences, read_yaml
from tvmatch.data.config import DensityData, DigitsData
from tvmatch.devices import resolve_device
from tvmatch.distributed import refuse_several
from tvmatch.errors import InputError
from tvmatch.storage.locks import FolderLock
from tvmatch.training import (
    CONFIG_NAME,
    Interrupted,
    NonFiniteError,
    Trainer,
    checkpoints,
    last_checkpoint,
    lock_run,
)
from tvmatch.training.fine_tuning import network_section
from tvmatch.training.run_folder import run_config, run_folder

USAGE = """tvmatch train RECIPE [--out DIR] [--config FILE] [--SECTION.KEY VALUE ...]
       tvmatch train --resume RUN"""
DESCRIPTION = """\
Train a recipe, then draw samples and compute metrics. Every value of the configuration can be set in a YAML
file (--config FILE) or by an option, which takes precedence. `--print_config` prints the configuration.
Ctrl-C saves a checkpoint, and `tvmatch train --resume RUN` resumes from it."""
NUMBERS_OF_STEPS = (1, 2, 4)


class Request(NamedTuple):
    """The configuration to start from, and the arguments that change it.

    Attributes:
        content: of the recipe, or of the configuration of the run to resume.
        source: where the content comes from, for messages.
        files: YAML files that override it, in order.
        resume: run folder or checkpoint to resume.
        arguments: all arguments except --config.
    """

    content: dict[str, Any]
    source: str
    files: list[Path]
    resume: Path | None
    arguments: list[str]


def run(arguments: list[str]) -> int:
    """Train, draw samples and compute metrics."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: {USAGE}\n\n{DESCRIPTION}\n\nrecipes: {', '.join(recipe_names())}")
        print("`tvmatch train RECIPE --help` lists all options.")
        return 0
    arguments = [re.sub("^--(dry|world)-(run|size)", r"--\1_\2", argument) for argument in arguments]
    request = _request(present_arguments(arguments))
    given = [_on_top(file, request.content) for file in request.files]
    content = with_chosen_kinds(
        with_kinds(request.content, request.source), _chosen_kinds(given, request.arguments)
    )
    cls = config_class(content)
    parser = config_parser(cls, prog="tvmatch train", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("--out", type=str, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--resume",
        type=str,
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="resume the run in this folder (default: --out) with its configuration",
    )
    add_import_option(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters, FLOPs and memory of a training step, without training",
    )
    parser.add_argument("--world_size", type=int, default=1, help="number of GPUs for --dry_run")
    add_defaults(parser, content, request.source)
    for file, own in zip(request.files, given, strict=True):
        add_defaults(parser, own, str(file))
    parsed = parser.parse_args(request.arguments)
    config = instantiate(parser, parsed)
    if parsed.dry_run:
        from tvmatch.cli import dry_run  # here, because it imports PyTorch's compiler

        return dry_run.run(config, parsed.world_size)
    return _train(config, _out(parsed.out, config, request.resume), parsed.device, request.resume)


def _on_top(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The options of a YAML file, which may neither change the recipe nor resume a run."""
    own = with_present_names(read_yaml(file), str(file))
    name = content.get("recipe", "custom")
    if own.get("recipe", name) != name:
        raise InputError("recipe", f"{name}, but {file} is for the recipe {own['recipe']}")
    if own.get("resume") is not None:
        raise InputError(file, f"resume: give it on the command line, --resume {own['resume']}")
    return own


def _chosen_kinds(files: list[dict[str, Any]], arguments: list[str]) -> dict[str, str]:
    """The kinds of sections that files and options set, in order of increasing precedence."""
    chosen: dict[str, str] = {}
    for content in files:
        for section, option in KIND_OPTIONS.items():
            own = content.get(section)
            if isinstance(own, dict) and option in own:
                chosen[section] = own[option]
    peek = _Peek()
    for section, option in KIND_OPTIONS.items():
        peek.add_argument(f"--{section}.{option}", dest=section, default=argparse.SUPPRESS)
    return chosen | vars(peek.parse_known_args(arguments)[0])


def _train(config: Config, out: Path, device: str, resume: Path | None) -> int:
    refuse_several("training")
    config.check()
    resolve_device(device)
    with lock_run(out, resume) as lock:
        return _train_locked(config, out, device, resume, lock)


def _train_locked(config: Config, out: Path, device: str, resume: Path | None, lock: FolderLock) -> int:
    dataset = load_data(config)  # may take minutes, so everything else is checked before
    decoder = load_decoder(config, dataset.spec, device)
    trainer = Trainer(config, dataset, out, device=device, resume=resume, decoder=decoder, lock=lock)
    changes = [] if resume is None else differences(run_config(out), config)
    if changes:
        print(f"changed in this run: {', '.join(changes)}", file=sys.stderr)
    again = f"tvmatch train --resume {shlex.quote(str(out))}"
    again += "" if device == "auto" else f" --device {shlex.quote(device)}"
    try:
        model = trainer.run()
        paths = [checkpoints(out)[-1], out / CONFIG_NAME]
        paths += results.draw(out, model, dataset, NUMBERS_OF_STEPS)
        console = Console()
        if isinstance(config.data, DigitsData | DensityData):
            metrics = results.measure(model, config, dataset, NUMBERS_OF_STEPS, None, seed=0)
            paths.append(out / results.METRICS_NAME)
            results.show(console, metrics, paths[-1])
    except Interrupted as stop:
        print(f"saved {stop.checkpoint}; continue with: {again}", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # a second one while saving, or one while drawing
        print(f"interrupted; {last_checkpoint(out)}; continue with: {again}", file=sys.stderr)
        return 130
    except NonFiniteError as error:
        print(f"tvmatch: error: {error}; {last_checkpoint(out)}", file=sys.stderr)
        return 1
    results.show_paths(paths)
    return 0


def _out(given: str | None, config: Config, resume: Path | None) -> Path:
    """The run folder: the one to resume, the one given, or runs/<recipe>."""
    if resume is None:
        return Path(given or f"runs/{config.recipe}")
    out = run_folder(resume)
    if given and Path(given).resolve() != out.resolve():
        raise InputError("out", f"{given} is not the run of --resume, {out}")
    return out


class _Peek(argparse.ArgumentParser):
    """Reads the arguments that decide which options the full parser has."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _request(arguments: list[str]) -> Request:
    files = _Peek()
    files.add_argument("--config", action="append", type=Path, default=[])
    known, arguments = files.parse_known_args(arguments)
    configs: list[Path] = known.config

    peek = _Peek()
    peek.add_argument("--resume", nargs="?", const="")
    for option in ("--out", "--device", "--initial"):
        peek.add_argument(option)
    known, rest = peek.parse_known_args(arguments)
    if known.resume in recipe_names() and not Path(known.resume).exists():
        known.resume, rest = "", [known.resume, *rest]  # a recipe after --resume without a value
    name = _recipe_name(rest)

    if known.resume is not None:
        folder = known.resume or known.out or (f"runs/{name}" if name else None)
        if folder is None:
            raise InputError("resume", "must be followed by a run folder")
        source = run_folder(Path(folder)) / CONFIG_NAME
        content = read_yaml(source)
        if name and name != content.get("recipe"):
            raise InputError("recipe", f"{name}, but {source} is of {content.get('recipe')}")
        return Request(content, str(source), configs, Path(folder), arguments)
    if name is None and configs:
        content = read_yaml(configs[0])
        name = content.get("recipe")
        if name not in recipe_names() and "data" in content:  # a complete configuration of a custom name
            content = _on_top(configs[0], content)
            return Request(content, str(configs[0]), configs[1:], None, arguments)
    if name is None:
        raise InputError("recipe", f"must be one of {', '.join(recipe_names())}")
    content = yaml.safe_load(recipe_text(name))
    given = [read_yaml(file) for file in configs]
    for file, own in zip(configs, given, strict=True):
        if own.get("data", content) is None:
            raise InputError(
                file, "data: null means that the data came from Python; such a run is resumed from Python"
            )
        if not isinstance(own.get("initial", ""), str | None):
            raise InputError(file, f"initial: must be text or null, got {own['initial']!r}")
    initial = known.initial or next((own["initial"] for own in reversed(given) if own.get("initial")), None)
    if initial is not None:  # of the initial checkpoint; options override it
        content["network"] = network_section(initial)
    return Request(content, f"recipe {name}", configs, None, arguments)


def _recipe_name(arguments: list[str]) -> str | None:
    """The recipe: the first argument, or a later one that is not the value of an option."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    flags = ("-h", "--help", "--print_config", "--dry_run")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument in recipe_names() and (not before.startswith("--") or "=" in before or before in flags):
            return argument
    return None
