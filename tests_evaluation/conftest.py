"""Random weights for torch-fidelity's Inception, and photographs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

PHOTOGRAPHS = Path(__file__).parents[1] / "tests" / "files" / "photographs"
LIVING = 12  # of 2,048 features in the file `few_features`


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """64 photographs, uint8 (64, 3, 64, 64), 16 of each of four things."""
    files = sorted(PHOTOGRAPHS.rglob("*.jpg"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


class _Untrained(FeatureExtractorInceptionV3):
    """The network without weights from anywhere."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:  # type: ignore[override]
        pass


@pytest.fixture(scope="session")
def network(photographs: Tensor) -> nn.Module:
    """Inception with random weights that keep the variance through its depth.

    The statistics of the batch norms are measured on some photographs, as training would: with the initial
    ones, all images would give nearly parallel features.
    """
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    made = _Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    nn.init.normal_(made.fc.weight, 0, 0.3)
    nn.init.normal_(made.fc.bias)
    with torch.no_grad():
        made.train()
        made(photographs[::8])
    return made.eval()


@pytest.fixture(scope="session")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file as torch-fidelity reads it."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def few_features(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but only 12 pooled features, from all branches, ever differ from 0."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start = 0
    for branch in ("1x1", "3x3_2a", "3x3_2b", "3x3dbl_3a", "3x3dbl_3b", "_pool"):  # as Mixed_7c joins them
        bias = state[f"Mixed_7c.branch{branch}.bn.bias"]
        dead = (torch.arange(start, start + len(bias)) % 171) != 0
        bias[dead] = -1e4
        start += len(bias)
    assert start == 2048
    path = tmp_path_factory.mktemp("weights") / "few_features.pth"
    torch.save(state, path)
    return path
