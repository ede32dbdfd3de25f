"""Shared by the tests of the Hub, pipelines and exports: small trained models, and a Hub in a folder."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize_

from tvmatch.data.spec import DataSpec
from tvmatch.models import DiTConfig, MLPConfig, build_network
from tvmatch.trained_model import TrainedModel

DIT = DiTConfig(hidden_size=16, depth=2, heads=2, patch_size=2, time_frequencies=8)
PIXELS = DataSpec("image", (3, 6, 6), ("zero", "one", "two"), mean=(0.5, 0.4, 0.6), std=(0.5, 0.3, 0.2))
GREY = DataSpec("image", (1, 4, 6), None, mean=(0.5,), std=(0.5,))
POINTS = DataSpec("points", (2,), None, mean=(1.0, -2.0), std=(3.0, 0.5))


def trained(spec: DataSpec, **changes: Any) -> TrainedModel:
    torch.manual_seed(0)
    config = MLPConfig(hidden_size=16, depth=2, time_frequencies=8) if spec.kind == "points" else DIT
    fields: dict[str, Any] = {
        "scaled": True,
        "guidance": (1.0, 2.0),
        "step": 12,
        "provenance": {"recipe": "größer"},
    }
    return TrainedModel(
        randomize_(build_network(config, spec.shape, spec.class_count)), spec, **(fields | changes)
    )


def tiny_vae(seed: int = 0) -> Any:
    """4 channels, down-sampling 2. Random layers, so that another latent gives another picture."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def latents_model(**changes: Any) -> TrainedModel:
    """Of the tiny autoencoder's latents, 8 × 8 for images of 16 × 16; ready to give images."""
    from tvmatch.data.latents.autoencoder import Autoencoder

    autoencoder = Autoencoder(tiny_vae(), "tiny")
    info = autoencoder.info((3, 16, 16))
    spec = DataSpec("latents", (4, 8, 8), ("zero", "one", "two"), (0.1, 0.2, 0.3, 0.4), (1.3,) * 4, info)
    return trained(spec, **({"decoder": autoencoder} | changes))


class FakeHub:
    """Stands in for the two functions of huggingface_hub that speak with the network.

    Attributes:
        repositories: by name, a folder each.
        private: names of those that were made so.
        downloaded: relative names of the files that were fetched.
        arguments: of the last call.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.folder = folder
        self.repositories: dict[str, Path] = {}
        self.private: set[str] = set()
        self.downloaded: list[str] = []
        self.arguments: dict[str, Any] = {}
        monkeypatch.setattr(huggingface_hub, "HfApi", self.api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def api(self, **arguments: Any) -> "FakeHub":
        self.arguments = arguments
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.repositories.setdefault(repo_id, self.folder / repo_id.replace("/", "--")).mkdir(
            parents=True, exist_ok=True
        )
        self.private |= {repo_id} if private else set()
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, self.repositories[repo_id], dirs_exist_ok=True)

    def snapshot_download(self, repo_id: str, *, allow_patterns: Sequence[str], **arguments: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.arguments = arguments
        source, target = self.repositories[repo_id], self.folder / "cache" / repo_id
        self.downloaded = sorted(filter_repo_objects(_files(source), allow_patterns=list(allow_patterns)))
        for name in self.downloaded:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        return str(target)


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def files(folder: Path) -> list[str]:
    """Relative names of all files below."""
    return list(_files(folder))
