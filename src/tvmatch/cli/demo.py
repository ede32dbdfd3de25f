"""`tvmatch demo`: a page on this machine with samples of a checkpoint."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tvmatch.cli import options
from tvmatch.config.parser import OneLineParser
from tvmatch.errors import InputError

DESCRIPTION = """\
A page to look at a checkpoint: choose class, seed, numbers of steps, and guidance where the model takes
it, and see the samples beside each other with their time. It is served to this machine alone unless --host
says otherwise, and fetches nothing from elsewhere. Ctrl-C ends it."""


def run(arguments: list[str]) -> int:
    """Load the model and serve the page."""
    parser = OneLineParser(prog="tvmatch demo", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to serve (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 for any free one")
    parsed = parser.parse_args(arguments)

    # Gradio writes pictures to this folder, which ends with us.
    with TemporaryDirectory(prefix="tvmatch-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            from tvmatch.demo import page, server
        except ModuleNotFoundError as error:
            if str(error.name).startswith("tvmatch"):
                raise
            raise InputError(
                "demo", f'the package {error.name} is missing; run: pip install "tvmatch[demo]"'
            ) from None
        from tvmatch.demo.generation import Demonstration

        with server.listen(parsed.host, parsed.port) as listening:
            model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
            demonstration = Demonstration(model)
            application = page.application(demonstration, _name(Path(parsed.checkpoint)))
            print(f"tvmatch demo: {server.url(listening)} (Ctrl-C ends it)", flush=True)
            code = server.serve(application, listening)
    if demonstration.drawing:
        os._exit(code)  # a thread inside PyTorch cannot be ended, and Python's own way out would abort
    return code


def _name(checkpoint: Path) -> str:
    """The run's name, and the checkpoint's where one was chosen."""
    path = checkpoint.resolve()
    return f"{path.parents[1].name}, {path.name}" if path.parent.name == "checkpoints" else path.name
