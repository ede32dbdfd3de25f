"""`tvmatch train`: a recipe, a user's YAML file and dotted overrides, trained, drawn and measured."""

import argparse
import sys
from pathlib import Path

import yaml
from rich.console import Console

from tvmatch.cli import results
from tvmatch.cli.options import run_folder
from tvmatch.data.config import DensityData, DigitsData
from tvmatch.errors import InputError
from tvmatch.training import (
    CONFIG_NAME,
    Interrupted,
    NonFiniteError,
    Trainer,
    checkpoints,
    recipe_names,
)
from tvmatch.training.recipes import config_class, config_parser, instantiate, read_yaml, recipe_text

USAGE = """tvmatch train RECIPE [--out DIR] [--config FILE] [--SECTION.KEY VALUE ...]
       tvmatch train --resume RUN"""
DESCRIPTION = """\
Train a recipe, then draw its samples and measure them. Every value of the configuration below can be set
by an option, or in a YAML file given with --config; `--print_config` prints the whole of it. Ctrl-C
saves, and `tvmatch train --resume RUN` continues."""


def run(arguments: list[str]) -> int:
    """Train, draw, measure."""
    name, resume_from = _peek(arguments)
    if name is None and resume_from is None:
        print(f"usage: {USAGE}\n\n{DESCRIPTION}\n\nrecipes: {', '.join(recipe_names())}")
        print("`tvmatch train RECIPE --help` lists every option of a recipe.")
        return 0
    content = read_yaml(resume_from / CONFIG_NAME) if resume_from else yaml.safe_load(recipe_text(name or ""))
    parser = config_parser(content, prog="tvmatch train", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("--out", type=str, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--resume",
        type=str,
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="continue the run in this folder (default: --out), with its own configuration",
    )
    parsed = parser.parse_args(arguments)
    config = instantiate(parser, parsed, config_class(content))
    out = resume_from or Path(parsed.out or f"runs/{config.recipe}")
    if resume_from and parsed.out and Path(parsed.out).resolve() != resume_from.resolve():
        raise InputError(f"out: {parsed.out} is not the run that --resume names, {resume_from}")

    dataset = config.data.load()
    trainer = Trainer(config, dataset, out, device=parsed.device, resume=resume_from)
    try:
        model = trainer.run()
    except Interrupted as stop:
        print(f"\nsaved {stop.checkpoint}; continue with: tvmatch train --resume {out}", file=sys.stderr)
        return 128 + stop.signal_number
    except NonFiniteError as error:
        saved = checkpoints(out)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        print(f"tvmatch: error: {error}; {last}", file=sys.stderr)
        return 1

    console = Console()
    steps = (1, 2, 4)
    paths = [checkpoints(out)[-1], out / CONFIG_NAME, *results.draw(out, model, dataset, steps)]
    if isinstance(config.data, DigitsData | DensityData):
        metrics = results.measure(model, config, dataset, steps, None, seed=0)
        paths.append(out / results.METRICS_NAME)
        results.show(console, metrics, paths[-1])
    results.show_paths(console, paths)
    return 0


def _peek(arguments: list[str]) -> tuple[str | None, Path | None]:
    """(recipe, run folder to resume), which decide the real parser's options; (None, None) asks for help."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--resume", nargs="?", const="")
    for option in ("--out", "--config", "--device"):
        peek.add_argument(option, nargs="?")
    known, rest = peek.parse_known_args(arguments)
    if known.resume in recipe_names():  # `--resume digits`: the recipe stands behind a bare flag
        known.resume, rest = "", [known.resume, *rest]
    name = _recipe_name(rest, known.config)
    if known.resume is not None:
        folder = known.resume or known.out or (f"runs/{name}" if name else None)
        if folder is None:
            raise InputError("resume: name the run folder, --resume RUN")
        return name, run_folder(Path(folder))
    if name is None and arguments and rest not in (["-h"], ["--help"]):
        raise InputError(f"recipe: name one of {', '.join(recipe_names())}")
    return name, None


def _recipe_name(rest: list[str], config: str | None) -> str | None:
    """The recipe among the arguments, or the one that a --config file comes from."""
    if rest and not rest[0].startswith("-"):
        return rest[0]
    named = [argument for argument in rest if argument in recipe_names()]
    if len(named) == 1:
        return named[0]
    return str(read_yaml(Path(config)).get("recipe", "")) or None if config else None
