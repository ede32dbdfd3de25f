"""The command line: `tvmatch COMMAND …`, each in a module of its own."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from tvmatch import __version__
from tvmatch.cli.streams import printable_streams
from tvmatch.distributed import ProcessError, is_reported_by_another, leave_last
from tvmatch.errors import DataError, InputError, NotRegisteredError
from tvmatch.user_modules import import_module

COMMANDS = {
    "train": "train a recipe, draw what it made, and measure it",
    "sample": "draw samples from a checkpoint: a PNG grid, a folder of PNGs, or an .npz file",
    "evaluate": "measure a checkpoint against real data",
    "demo": "open a page to draw samples with",
    "encode": "turn images into the latents of an autoencoder, to train on",
    "import": "make a checkpoint of the authors' files, or of a SiT's, executing nothing",
    "export": "write a checkpoint for diffusers, the Hub, or under the authors' names",
    "recipes": "list the recipes, or print one",
    "info": "what a checkpoint holds",
    "check": "compare this machine's derivatives and gradients with float64",
}

_LONGEST = 2_000  # characters of an error, which may show a value of any length
NETWORKS = ("train", "sample", "evaluate", "demo", "export", "info", "check")  # which take --import
MODULES = {"import": "import_checkpoint"}  # where the command's name cannot be a module's

HELP = f"""\
usage: tvmatch COMMAND ...

One-step generative models by Terminal Velocity Matching (arXiv 2511.19797).

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

options:
  --version   print the version
  -h, --help  print this help; `tvmatch COMMAND --help` tells more

examples:
  tvmatch train digits                          two minutes on a CPU; writes runs/digits
  tvmatch train checkerboard --out runs/board   points in the plane
  tvmatch train image_folder --data.path photos --data.resolution 32 --network.preset S/2
  tvmatch train --resume runs/digits            continue an interrupted run
  tvmatch sample runs/digits --labels 3,8 --count 16 --steps 1,4 --out digits.png
  tvmatch evaluate runs/digits --steps 1,2,4
  tvmatch demo runs/digits                      a page to draw samples with
  tvmatch train imagenet256_w2 --dry-run        parameters, FLOPs and memory; needs no data
  tvmatch import im256_w2.pkl --recipe imagenet256_w2 --out im256_w2   the authors' file, executing nothing
  tvmatch export runs/digits --layout diffusers --out pipeline
  tvmatch check --device cuda --dtype bfloat16  are derivatives and gradients right on this machine?
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a mistake in what was given, 1 for a broken run."""
    with printable_streams():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"tvmatch {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise InputError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
        for argument in arguments:
            if "\0" in argument:  # which no path can hold
                raise InputError(f"{argument!r}", "an option cannot hold the character 0")
        code = _run(arguments[0], arguments[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except NotRegisteredError as error:
        return _fail(error, str(error.with_hint("--import MODULE does that")), 2)
    except InputError as error:
        return _fail(error, str(error), 2)
    except (DataError, ProcessError) as error:
        return _fail(error, str(error), 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(error, f"{error.filename or 'file system'}: {error.strerror or error}", 2)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130)


def _run(command: str, arguments: list[str]) -> int:
    if command in NETWORKS:
        arguments = _with_imports(arguments)
    # Each command imports only what it needs.
    module = importlib.import_module(f"tvmatch.cli.{MODULES.get(command, command)}")
    run: Callable[[list[str]], int] = module.run
    return run(arguments)


def _with_imports(arguments: list[str]) -> list[str]:
    """Import what --import names, before anything else is read; the other arguments."""
    others, given = [], iter(arguments)
    for argument in given:
        option, equals, name = argument.partition("=")
        if option != "--import":
            others.append(argument)
            continue
        name = name if equals else next(given, "")
        if not name or name.startswith("-"):
            raise InputError("import", "name a module, --import MODULE")
        try:
            import_module(name)
        except InputError as error:  # of registering a network or an objective
            raise error.within(name) from None
        except Exception as error:  # the user's own code
            raise InputError(
                "import", f"{name} cannot be imported ({type(error).__name__}: {error})"
            ) from error
    return others


def _fail(error: BaseException, message: str, code: int) -> int:
    if is_reported_by_another(error):
        return leave_last(code)
    line = " ".join(message.split())
    # Values and names of files are shown as they were given: nothing in them may act on the terminal.
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]} … ({len(line)} characters)"
    print(f"tvmatch: error: {line}", file=sys.stderr)
    return code
