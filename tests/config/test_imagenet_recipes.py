"""The four ImageNet recipes are TVM's (arXiv 2511.19797, Table 6, and the released configurations)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tvmatch.cli import main
from tvmatch.config import recipe, recipe_names
from tvmatch.config.recipes import recipe_text
from tvmatch.config.yaml_files import flattened
from tvmatch.data import LatentsData
from tvmatch.errors import InputError
from tvmatch.models import DiT

# Of all four.
COMMON = {
    "data.class_count": 1000,
    "data.autoencoder": "stabilityai/sd-vae-ft-ema",
    "network.preset": "XL/2",
    "network.hidden_size": None,
    "network.depth": None,
    "network.heads": None,
    "network.patch_size": None,
    "network.mlp_ratio": 4.0,
    "network.time_frequencies": 128,
    "network.rms_norm": True,
    "network.qk_norm": True,
    "network.modulation_norm": True,
    "network.spectral_init": True,
    "network.guidance_embedding": True,
    "objective.times.distribution": "gap*",
    "objective.times.gap": (-0.8, 1.0),
    "objective.times.s": (-0.4, 1.0),
    "objective.times.s_prime": "independent",
    "objective.times.equal_probability": 0.0,
    "objective.label_dropout": 0.1,
    "objective.target_ema": 0.99,
    "objective.detach_jvp": False,
    "optimizer.learning_rate": 1e-4,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.epsilon": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_fraction": 0.0,
    "training.steps": 300_000,
    "training.batch_size": 2048,
    "training.precision": "bfloat16",
    "training.evaluation_ema": 0.9999,
    "training.ema_warmup": False,
}
SMALL = {
    "data.shape": (4, 32, 32),
    "data.mean": (0.86488, -0.27787343, 0.21616915, 0.3738409),
    "data.std": (4.85503674, 5.31922414, 3.93725398, 3.9870003),
    "optimizer.gradient_clip": None,
}
LARGE = {
    "data.shape": (4, 64, 64),
    "data.mean": (1.56, -0.695, 0.483, 0.729),
    "data.std": (5.27, 5.91, 4.21, 4.31),
    "optimizer.gradient_clip": 1.0,
}
KEYS = ("objective.guidance_weight", "objective.scaled", "network.time_embedding_init")
TABLE: dict[str, dict[str, Any]] = {
    "imagenet256_w2": SMALL | dict(zip(KEYS, (2.0, True, "spectral"), strict=True)),
    "imagenet256_w1.75": SMALL | dict(zip(KEYS, (1.75, True, "normal"), strict=True)),
    "imagenet512_w2.5": LARGE | dict(zip(KEYS, (2.5, False, "normal"), strict=True)),
    "imagenet512_w2.25": LARGE | dict(zip(KEYS, (2.25, True, "spectral"), strict=True)),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_value(name: str) -> None:
    config = recipe(name)
    assert isinstance(config.data, LatentsData)
    expected = COMMON | TABLE[name]
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in flattened(asdict(config)).items()
    }
    assert {key: values[key] for key in expected} == expected
    config.check()


@pytest.mark.parametrize("name", TABLE)
def test_every_value_is_written_out(name: str) -> None:
    """A reader of the file sees all of the table, and not what happens to be a default."""
    written = yaml.safe_load(recipe_text(name))
    named = flattened(written).keys()
    sizes = {f"network.{key}" for key in ("hidden_size", "depth", "heads", "patch_size")}  # the preset's
    assert (COMMON | TABLE[name]).keys() - sizes <= named
    assert written["recipe"] == name


@pytest.mark.parametrize("name", TABLE)
def test_the_header_says_what_the_released_code_leaves_out(name: str) -> None:
    header = recipe_text(name).partition("\nrecipe:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "`time_specinit`" in header
    assert "patch embedding" in header


@pytest.mark.parametrize("name", TABLE)
def test_parameters(name: str) -> None:
    """DiT-XL/2 with three time embeddings and norms of queries and keys: 678 million."""
    config = recipe(name)
    with torch.device("meta"):
        network = DiT(config.network, config.data.shape, config.data.class_count)
    assert sum(parameter.numel() for parameter in network.parameters()) == 678_068_496


def test_there_are_no_others() -> None:
    assert {name for name in recipe_names() if name.startswith("imagenet")} == TABLE.keys()


def test_a_name_with_a_dot_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "imagenet256_w1.75"]) == 0
    assert capsys.readouterr().out == recipe_text("imagenet256_w1.75")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "imagenet256_w1.75", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["recipe"] == "imagenet256_w1.75"
    assert printed["objective"]["guidance_weight"] == 1.75
    assert main(["train", "imagenet256_w1.75"]) == 2
    assert "data.latents: give the folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"no recipe 'imagenet256_w1'"):
        recipe_text("imagenet256_w1")
