"""`tvmatch demo`: a web page with samples of a checkpoint."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tvmatch.cli import options
from tvmatch.config.parser import OneLineParser
from tvmatch.errors import InputError

DESCRIPTION = """\
Serve a web page that draws samples from a checkpoint. The page has controls for class, seed, number of
steps and, if the model allows it, guidance weight, and shows samples and their time for each number of
steps. It is available on this machine only, unless --host is set, and loads nothing from other servers.
Ctrl-C ends it."""


def run(arguments: list[str]) -> int:
    """Load the model and serve the page."""
    parser = OneLineParser(prog="tvmatch demo", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to serve")
    parser.add_argument("--port", type=int, default=7860, help="port; 0 for any free port")
    parsed = parser.parse_args(arguments)

    # Gradio writes pictures to this folder.
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
        os._exit(code)  # Python would abort at exit while a daemon thread runs PyTorch
    return code


def _name(checkpoint: Path) -> str:
    """The name of the run folder or checkpoint; of a checkpoint in a run, the names of both."""
    path = checkpoint.resolve()
    return f"{path.parents[1].name}, {path.name}" if path.parent.name == "checkpoints" else path.name
