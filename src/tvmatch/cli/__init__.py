"""The command line: `tvmatch COMMAND …`, one module for each command."""

import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from tvmatch import __version__
from tvmatch.distributed import ProcessError, is_reported_by_another, leave_last
from tvmatch.errors import DataError, InputError, NotRegisteredError
from tvmatch.user_modules import import_module

COMMANDS = {
    "train": "train a model, then draw samples and compute metrics",
    "sample": "draw samples from a checkpoint: a PNG grid, a folder of PNGs, or an .npz file",
    "evaluate": "compare samples of a checkpoint with real data",
    "demo": "serve a web page that draws samples from a checkpoint",
    "encode": "encode images to latents of an autoencoder, for training",
    "import": "convert a checkpoint of the TVM authors or of SiT, without executing its code",
    "export": "write a checkpoint for the Hub or diffusers, or with the authors' parameter names",
    "recipes": "list the recipes, or print one",
    "info": "print the properties of a checkpoint",
    "check": "compare derivatives and gradients on this machine with float64",
}

_LONGEST = 2_000  # characters of an error message
NETWORKS = ("train", "sample", "evaluate", "demo", "export", "info", "check")  # commands with --import
MODULES = {"import": "import_checkpoint"}  # commands whose module has another name

HELP = f"""\
usage: tvmatch COMMAND ...

One-step generative models by Terminal Velocity Matching (arXiv 2511.19797).

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

options:
  --version   print the version
  -h, --help  print this help; `tvmatch COMMAND --help` describes a command

examples:
  tvmatch train digits                          takes two minutes on a CPU; writes runs/digits
  tvmatch train checkerboard --out runs/board   points in the plane
  tvmatch train image_folder --data.path photos --data.resolution 32 --network.preset S/2
  tvmatch train --resume runs/digits            continue an interrupted run
  tvmatch sample runs/digits --labels 3,8 --count 16 --steps 1,4 --out digits.png
  tvmatch evaluate runs/digits --steps 1,2,4
  tvmatch demo runs/digits
  tvmatch train imagenet256_w2 --dry-run        parameters, FLOPs and memory; needs no data
  tvmatch import im256_w2.pkl --recipe imagenet256_w2 --out im256_w2
  tvmatch export runs/digits --layout diffusers --out pipeline
  tvmatch check --device cuda --dtype bfloat16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 for a wrong argument or file, 1 for a failed run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # terminals whose encoding lacks our symbols
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"tvmatch {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise InputError(f"no command {arguments[0]!r}; commands are {', '.join(COMMANDS)}")
        for argument in arguments:
            if "\0" in argument:  # not allowed in paths
                raise InputError(f"{argument!r}", "an option cannot contain the character 0")
        code = _run(arguments[0], arguments[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except NotRegisteredError as error:
        return _fail(error, str(error.with_hint("use --import MODULE")), 2)
    except InputError as error:
        return _fail(error, str(error), 2)
    except (DataError, ProcessError) as error:
        return _fail(error, str(error), 1)
    except BrokenPipeError:  # from a reader such as `head`
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
    """Import the modules of --import, and return the other arguments."""
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
        except InputError as error:  # from registering a network or an objective
            raise error.within(name) from None
        except Exception as error:  # from the user's code
            raise InputError(
                "import", f"{name} cannot be imported ({type(error).__name__}: {error})"
            ) from error
    return others


def _fail(error: BaseException, message: str, code: int) -> int:
    if is_reported_by_another(error):
        return leave_last(code)
    line = " ".join(message.split())
    # Escape control characters in values and file names.
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]} … ({len(line)} characters)"
    print(f"tvmatch: error: {line}", file=sys.stderr)
    return code
