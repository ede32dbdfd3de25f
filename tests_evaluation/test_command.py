"""`tvmatch evaluate` with the real Inception, from a checkpoint to every figure."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from test_inception import fidelity, frechet, save_pngs
from torch import Tensor

from tvmatch.cli import main
from tvmatch.data.spec import DataSpec
from tvmatch.evaluation.extractors import load_extractor
from tvmatch.generation.uint8 import to_bytes
from tvmatch.models import DiT, DiTConfig
from tvmatch.seeds import generator
from tvmatch.trained_model import TrainedModel

NAMES = ("astronaut", "cat", "coffee", "rocket")
COUNT = 16


@pytest.fixture
def model(tmp_path: Path) -> TrainedModel:
    """A random network of images 64 × 64, saved in the folder "checkpoint"."""
    spec = DataSpec("image", (3, 64, 64), NAMES, (0.5,) * 3, (0.5,) * 3)
    config = DiTConfig(hidden_size=32, depth=1, heads=2, patch_size=8, time_frequencies=4)
    network = DiT(config, spec.shape, len(NAMES))
    draws = generator(0, "tests of the command")
    with torch.no_grad():
        for parameter in network.parameters():
            std = 0.3 if parameter.ndim == 1 else 0.5 / math.sqrt(parameter.shape[1])
            parameter.add_(std * torch.randn(parameter.shape, generator=draws))
    made = TrainedModel(network.requires_grad_(False).eval(), spec, scaled=True, guidance=(1.0, 2.0))
    (tmp_path / "checkpoint").mkdir()
    made.save(tmp_path / "checkpoint")
    return made


def test_figures_of_a_checkpoint_are_those_of_torch_fidelitys_command_line(
    model: TrainedModel,
    few_features: Path,
    photographs: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    # Photographs alone are so far from noise that nothing but their mean would matter.
    alike = to_bytes(model.sample([k % 4 for k in range(COUNT - 4)], guidance=1, seed=6))
    references = torch.cat([alike, photographs[::16]])
    real = save_pngs(tmp_path / "real", references)
    arguments = ["evaluate", "checkpoint", "--reference=real", f"--weights={few_features}", "--cache=cache"]
    arguments += [f"--samples={COUNT}", "--steps=1", "--batch_size=16", "--device=cpu", "--seed=5"]
    assert main([*arguments, "--guidance=1,2"]) == 0
    output = capsys.readouterr()
    warnings = [line for line in output.err.splitlines() if line.startswith("tvmatch: ")]
    assert len(warnings) == 2, output.err
    for line, name in zip(warnings, ("samples", "reference"), strict=True):
        assert line.startswith(f"tvmatch: warning: {name}: 16 images give the covariance of 2,048 features")
    written = json.loads(Path("checkpoint/metrics_inception.json").read_text())
    assert [(row["guidance"], row["steps"]) for row in written["rows"]] == [(1, 1), (2, 1)]
    row = written["rows"][1]

    samples = to_bytes(model.sample([k % 4 for k in range(COUNT)], guidance=2, seed=5))
    theirs = fidelity(save_pngs(tmp_path / "generated", samples), real, few_features)
    extractor = load_extractor("inception", torch.device("cpu"), few_features)
    ours, reference = extractor(samples), extractor(references)
    fid, traces = frechet(ours.pooled, reference.pooled)
    assert 0.01 * traces < fid < 2 * traces
    assert abs(row["fid"] - theirs["frechet_inception_distance"]) <= 1e-6 * traces
    # Both take the softmax in float64; the logits are float32, from another process.
    assert row["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert row["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-5)
    # Shares of 16 images, theirs in float32.
    assert row["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert 0.1 < row["precision"] + row["recall"] < 1.9
    assert row["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    # torch-fidelity has no sFID. Features are float32, in batches of the same size but another order.
    assert ours.spatial is not None
    assert reference.spatial is not None
    assert row["sfid"] == pytest.approx(frechet(ours.spatial, reference.spatial)[0], rel=1e-5)
    for word in (f"extractor inception {extractor.fingerprint[:12]}", "64×64 pixels as uint8", "seed 5"):
        assert word in row["provenance"]
    assert "guidance 2; steps 1" in row["provenance"]
    assert "torchvision" in row["provenance"]
