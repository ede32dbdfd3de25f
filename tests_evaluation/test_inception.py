"""torch-fidelity's Inception as an extractor: its own features, and its own command line's metrics."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LIVING
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors import load_extractor
from tvmatch.evaluation.metrics.frechet import fit_gaussian, frechet_distance
from tvmatch.evaluation.metrics.inception_score import inception_score
from tvmatch.evaluation.metrics.precision_and_recall import precision_recall

CPU = torch.device("cpu")


def test_features_are_torch_fidelitys_own_to_the_bit(weights: Path, photographs: Tensor) -> None:
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    ours = load_extractor("inception", CPU, weights)
    for images in (photographs[::16], photographs[:2, :, 5:, :50]):
        pooled, logits = theirs(images)
        features = ours(images)
        assert torch.equal(features.pooled, pooled)
        assert features.logits is not None
        assert torch.equal(features.logits, logits)
        assert int((pooled.std(0) > 0).sum()) > 2000, "features tell images apart"


def test_spatial_features_are_those_of_sfid(weights: Path, photographs: Tensor) -> None:
    """The 1 × 1 branch of the third block of 17 × 17 after the reduction, written out in float64."""
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    ).double()
    images = photographs[::32]
    x = interpolate_bilinear_2d_like_tensorflow1x(images.double(), (299, 299), align_corners=False)
    x = (x - 128) / 128
    for name, layer in network.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    branch = network.Mixed_6d.branch1x1
    norm = branch.bn
    x = torch.einsum("oi,bihw->bhwo", branch.conv.weight[:7, :, 0, 0], x)
    x = (x - norm.running_mean[:7]) / (norm.running_var[:7] + 0.001).sqrt() * norm.weight[:7] + norm.bias[:7]
    expected = x.clamp(min=0).flatten(1)  # row, column, channel

    features = load_extractor("inception", CPU, weights)(images)
    assert features.spatial is not None
    assert features.spatial.shape == (2, 2023)
    # float32 through some forty layers.
    torch.testing.assert_close(features.spatial.double(), expected, rtol=1e-4, atol=1e-4)
    assert 0.1 < float((expected > 0).double().mean()) < 0.9, "after the ReLU"


def save_pngs(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return folder


def fidelity(generated: Path, real: Path, weights: Path) -> dict[str, float]:
    """What torch-fidelity's command line prints."""
    command = [str(Path(sys.executable).with_name("fidelity")), "--cpu", "--json", "--silent", "--no-cache"]
    command += ["--fid", "--isc", "--prc", "--no-samples-shuffle", "--save-cpu-ram", "--batch-size", "16"]
    command += ["--feature-extractor", "inception-v3-compat"]
    command += ["--feature-extractor-weights-path", str(weights)]
    command += ["--input1", str(generated), "--input2", str(real)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics: dict[str, float] = json.loads(done.stdout)
    return metrics


def two_sets(photographs: Tensor) -> tuple[Tensor, Tensor]:
    """16 and 16 images: half of each set shows a thing that the other does not."""
    only_a, common, only_b = photographs[::2].split((8, 16, 8))
    return torch.cat([only_a, common[::2]]), torch.cat([common[1::2], only_b])


def test_metrics_are_those_of_torch_fidelitys_command_line(
    few_features: Path, photographs: Tensor, tmp_path: Path
) -> None:
    """FID of two folders of PNGs within 1e-6 of the traces; Inception Score, precision and recall.

    With fewer living features than images, as evaluations have; the next test shows why that matters.
    """
    generated, real = two_sets(photographs)
    theirs = fidelity(save_pngs(tmp_path / "a", generated), save_pngs(tmp_path / "b", real), few_features)

    extractor = load_extractor("inception", CPU, few_features)
    a, b = extractor(generated), extractor(real)
    assert int((a.pooled.std(0) > 0).sum()) == LIVING
    fid, traces = frechet(a.pooled, b.pooled)
    assert fid > 0.01 * traces
    assert abs(theirs["frechet_inception_distance"] - fid) <= 1e-6 * traces

    # Both take the softmax in float64; the logits are float32, from another process.
    assert a.logits is not None
    score = inception_score(a.logits)
    assert score.mean > 1.1
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert score.std == pytest.approx(theirs["inception_score_std"], rel=1e-5)

    # Shares of 16 images, theirs in float32.
    shares = precision_recall(a.pooled, b.pooled)
    assert shares.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert shares.recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.1 < min(shares) < 1


def frechet(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Fréchet distance, and the sum of both traces."""
    fit_a, fit_b = fit_gaussian(a), fit_gaussian(b)
    return frechet_distance(fit_a, fit_b), float(fit_a.covariance.trace() + fit_b.covariance.trace())


def test_with_fewer_images_than_features_torch_fidelity_adds_the_roots_of_rounded_zeros(
    weights: Path, photographs: Tensor
) -> None:
    """FID sums the square roots of the eigenvalues of Σ₁ Σ₂: here 512, of which all but 15 are 0.

    torch-fidelity sums the roots of what rounding makes of these zeros: 1e-16 of the largest eigenvalue, so
    1e-8 of its root, and there are many of them. With all 2,048 features this was 1.2e-6 to 1.4e-6 of the
    traces. Without them it agrees with the stable computation but for its float32 means.
    """
    extractor = load_extractor("inception", CPU, weights)
    a, b = (extractor(images).pooled[:, ::4] for images in two_sets(photographs))
    fid, traces = frechet(a, b)
    statistics = [fid_features_to_statistics(features) for features in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    eigenvalues = np.linalg.eigvals(statistics[0]["sigma"] @ statistics[1]["sigma"])
    zeros = eigenvalues[np.argsort(np.abs(eigenvalues))[: 512 - 15]]
    assert np.abs(zeros).max() < 1e-12 * np.abs(eigenvalues).max()
    from_zeros = 2 * np.sqrt(zeros.astype(complex)).real.sum()
    assert from_zeros > 1e-8 * traces
    assert abs(theirs + from_zeros - fid) < 1e-8 * traces


def test_weights_come_from_torch_fidelitys_cache(
    weights: Path, photographs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / Path(URL_INCEPTION_V3).name
    cached.parent.mkdir(parents=True)
    os.link(weights, cached)
    extractor = load_extractor("inception", CPU)
    assert extractor.name == "inception"
    assert extractor.fingerprint == hashlib.sha256(weights.read_bytes()).hexdigest()
    named = load_extractor("inception", CPU, weights)
    assert named.fingerprint == extractor.fingerprint
    images = photographs[:1]
    assert torch.equal(extractor(images).pooled, named(images).pooled)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_weights_that_execute_code_or_are_of_another_network_are_refused(
    network: nn.Module, tmp_path: Path
) -> None:
    def refusal(content: Any) -> str:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        with pytest.raises(InputError) as caught:
            load_extractor("inception", CPU, path)
        message = str(caught.value)
        assert message.startswith(f"extractor weights: {path} ")
        assert "\n" not in message
        return message

    state = network.state_dict()
    refusal({**state, "fc.weight": Malicious(tmp_path / "executed")})
    assert not (tmp_path / "executed").exists()
    refusal(network)  # a pickled module
    fewer = {name: tensor for name, tensor in state.items() if name != "fc.bias"}
    extra = {**state, "AuxLogits.fc.bias": torch.zeros(9)}
    for other in (fewer, extra, {**state, "fc.bias": torch.zeros(1000)}):
        assert "is not of torch-fidelity's Inception" in refusal(other)
