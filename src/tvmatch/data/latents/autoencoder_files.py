"""Finding an autoencoder's files: in a folder, or on the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import expect_no_lfs_pointer, parse_json
from tvmatch.storage.hub import download

_CONFIG = "config.json"
_SUBFOLDER = "vae"  # where pipelines have theirs
_WEIGHTS = "diffusion_pytorch_model"
_SUFFIXES = ("safetensors", "bin")  # in the order of preference


@dataclass(frozen=True)
class AutoencoderFiles:
    """Where an autoencoder's files are.

    Attributes:
        source: the name to record: an absolute path, or the name on the Hub.
        folder: on this machine, with config.json.
        on_hub: whether the weights may have to be downloaded into it.
    """

    source: str
    folder: Path
    on_hub: bool

    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            InputError: if it cannot be read, or weights are quantised.
        """
        path = self.folder / _CONFIG
        try:
            config = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError("autoencoder", f"{path} is not readable as JSON ({one_line(error)})") from None
        if not isinstance(config, dict):
            raise InputError("autoencoder", f"{path} describes no autoencoder")
        if config.get("quantization_config") is not None:
            raise InputError("autoencoder", f"{self.source} is quantised; take the one in full precision")
        return config

    def weights(self) -> Path:
        """The file with the weights, or with the names of the files that hold them; downloaded if need be.

        Raises:
            InputError: if there is none, or a Git LFS pointer in its place.
        """
        found = self._weights()
        if found is None and self.on_hub:
            prefix = f"{_SUBFOLDER}/" if self.folder.name == _SUBFOLDER else ""
            for suffix in _SUFFIXES:
                names = (*_names(suffix), f"{_WEIGHTS}-*-of-*.{suffix}")
                _download(self.source, [prefix + name for name in names])
                found = found or self._weights()
        if found is None:
            raise InputError("autoencoder", f"{self.folder} holds no {_WEIGHTS}.{_SUFFIXES[0]}")
        expect_no_lfs_pointer(found)
        return found

    def _weights(self) -> Path | None:
        paths = (self.folder / name for suffix in _SUFFIXES for name in _names(suffix))
        return next((path for path in paths if path.is_file()), None)


def _names(suffix: str) -> tuple[str, str]:
    """One file with all weights, or the index of several."""
    return f"{_WEIGHTS}.{suffix}", f"{_WEIGHTS}.{suffix}.index.json"


def find_autoencoder(source: str) -> AutoencoderFiles:
    """The autoencoder in a folder, or of a name on the Hub; its configuration is on this machine then.

    Raises:
        InputError: if there is none.
    """
    if not source:
        raise InputError("autoencoder", "give a folder, or a name on the Hugging Face Hub")
    local = Path(source).expanduser()
    if local.exists() and not local.is_dir():
        raise InputError(
            "autoencoder", f"must be a folder or a name on the Hugging Face Hub, got a file, {source}"
        )
    on_hub = not local.exists()
    root = _download(source, [_CONFIG, f"{_SUBFOLDER}/{_CONFIG}"]) if on_hub else local
    for folder in (root / _SUBFOLDER, root):
        if (folder / _CONFIG).is_file():
            return AutoencoderFiles(source if on_hub else str(local.absolute()), folder, on_hub)
    raise InputError("autoencoder", f"there is neither {_CONFIG} nor {_SUBFOLDER}/{_CONFIG} in {source}")


def _download(name: str, patterns: list[str]) -> Path:
    """A snapshot's folder with the files of these patterns."""
    neither = "neither a folder nor the name of a model on the Hugging Face Hub"
    return download(name, patterns, subject="autoencoder", neither=neither)
