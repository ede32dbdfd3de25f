"""The ImageNet path at small size: photographs, latents, training, samples, figures, every kind of export.

One tiny autoencoder, 64 photographs, fifty steps; the same seed gives the same pixels from whatever the model
was loaded.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize_
from image_files import PHOTOGRAPHS
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

import tvmatch
from tvmatch.cli import main
from tvmatch.cli.options import load_model
from tvmatch.data import LatentsData
from tvmatch.data.latents.dataset import LatentsInfo
from tvmatch.errors import InputError
from tvmatch.interop import network_from_authors
from tvmatch.models import DiT
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import read_tensors

NAMES = ["astronaut", "cat", "coffee", "rocket"]
TINY = [
    "--network.preset=null",
    "--network.hidden_size=16",
    "--network.depth=2",
    "--network.heads=2",
    "--network.patch_size=2",
    "--network.time_frequencies=8",
    "--optimizer.learning_rate=1e-3",
    "--training.batch_size=8",
    "--training.accumulation=1",
    "--training.data_workers=0",
    "--training.precision=float32",
    "--training.compile=false",
    "--training.evaluation_ema=0.9",
    "--training.log_every=10",
    "--training.sample_every=25",
    "--training.checkpoint_every=25",
    "--device=cpu",
]


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def features(images: Tensor) -> Tensor:
    """A fixed small extractor, as a user would name it: mean colours of a 2 × 2 grid, in [0, 1]."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imagenet_path")


@pytest.fixture(scope="module")
def autoencoder(home: Path) -> Path:
    """Down-sampling 2, four channels, random weights."""
    return save_autoencoder(home / "autoencoder", seed=0)


def save_autoencoder(folder: Path, seed: int) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, **blocks
    )
    randomize_(network, seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(home: Path, autoencoder: Path) -> Path:
    out = home / "latents"
    run("encode", "--data", PHOTOGRAPHS, "--autoencoder", autoencoder, "--resolution", 16, "--out", out,
        "--workers", 0, "--flips", "stored", "--device", "cpu")  # fmt: skip
    return out


@pytest.fixture(scope="module")
def trained(home: Path, latents: Path) -> Path:
    """The paper's recipe on the 64 photographs, with a smaller network, for fifty steps."""
    data = [f"--data.latents={latents}", "--data.shape=[4,8,8]", "--data.class_count=4"]
    data += ["--data.mean=null", "--data.std=null", "--data.autoencoder=null"]
    run("train", "imagenet256_w2", *data, *TINY, "--training.steps=50", f"--out={home / 'run'}")
    return home / "run"


def pixels(model: TrainedModel, steps: int = 1) -> Tensor:
    return model.sample([0, 1, 2, 3], steps=steps, seed=3)


@pytest.fixture(scope="module")
def expected(trained: Path) -> Tensor:
    images = pixels(load_model(trained, "cpu"))
    assert images.shape == (4, 3, 16, 16)
    assert images.std() > 0.01
    return images


def test_latents_say_what_they_are(latents: Path, autoencoder: Path) -> None:
    info = LatentsInfo.read(latents)
    assert info.spec.shape == (4, 8, 8)
    assert info.spec.class_names == tuple(NAMES)
    assert info.spec.autoencoder is not None
    assert info.spec.autoencoder.source == str(autoencoder)
    assert (info.count, info.rows, info.flips) == (64, 128, "stored")
    # Normalised latents have mean 0 and variance 1, up to the noise of 32 draws of 64 images.
    dataset = LatentsData(str(latents)).load()
    values = torch.cat([dataset.spec.normalize(dataset.batch(step, 64, 0).values) for step in range(32)])
    assert values.mean((0, 2, 3)).abs().max() < 0.1
    assert (values.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_training_ran_the_recipe(trained: Path, latents: Path) -> None:
    model = tvmatch.load(trained)
    assert (model.step, model.scaled, model.guidance) == (50, True, 2.0)
    assert model.spec == LatentsInfo.read(latents).spec
    assert pixels(model).shape == (4, 4, 8, 8), "without its autoencoder a model gives latents"
    for name in ("samples/step_0000025.png", "samples_1.png", "samples_4.png", "training.png"):
        assert (trained / name).is_file()
    assert Image.open(trained / "samples_1.png").size[0] > 12 * 16


def test_samples(trained: Path, expected: Tensor, home: Path) -> None:
    run(
        "sample",
        trained,
        "--labels",
        ",".join(NAMES),
        "--seed",
        3,
        "--out",
        home / "samples.npz",
        "--device=cpu",
    )
    samples = np.load(home / "samples.npz")["samples"]
    np.testing.assert_array_equal(samples, expected.numpy())


def test_figures(trained: Path, home: Path) -> None:
    """The distance of these very pixels from the photographs', and every number with what it depends on."""
    out = home / "figures.json"
    run("evaluate", trained, "--samples", 64, "--steps", "1,2", "--reference", PHOTOGRAPHS, "--extractor",
        "test_end_to_end:features", "--metrics", "fid,pr", "--cache", home / "cache", "--out", out,
        "--device", "cpu")  # fmt: skip
    figures = json.loads(out.read_text())
    text = json.dumps(figures)
    assert "test_end_to_end:features" in text
    rows = figures["rows"]
    assert [(row["guidance"], row["steps"]) for row in rows] == [(2.0, 1), (2.0, 2)]
    real = features(torch.stack([halved_twice(path) for path in sorted(PHOTOGRAPHS.glob("*/*.jpg"))]))
    model = load_model(trained, "cpu")
    for row in rows:
        images = model.sample([k % 4 for k in range(64)], steps=row["steps"], seed=0)
        # The features are exact to float32, 6e-8 of numbers up to 1; the distance is of order 0.1.
        expected = frechet_distance(real, features((255 * images).round()))
        assert row["fd"] == pytest.approx(expected, abs=1e-5)
        assert 0 <= row["precision"] <= 1


def halved_twice(path: Path) -> Tensor:
    """Dhariwal's crop of 64 × 64 to 16 × 16, uint8."""
    image = Image.open(path).convert("RGB")
    for size in (32, 16):
        image = image.resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """From the definition, with covariances divided by n − 1."""
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(mean + np.trace(s + t - 2 * sqrtm(s @ t).real))


def test_hub_folder(trained: Path, expected: Tensor, home: Path) -> None:
    run("export", trained, "--layout", "hub", "--out", home / "hub", "--device", "cpu")
    assert torch.equal(pixels(tvmatch.from_pretrained(home / "hub")), expected)


def test_pipeline(trained: Path, expected: Tensor, home: Path) -> None:
    from tvmatch.diffusers import TVMPipeline

    run("export", trained, "--layout", "diffusers", "--out", home / "pipeline", "--device", "cpu")
    pipe = TVMPipeline.from_pretrained(home / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=NAMES, num_inference_steps=1, seed=3, output_type="pt").images
    assert torch.equal(images, expected)


@pytest.fixture(scope="module")
def imported(trained: Path, home: Path, autoencoder: Path) -> Path:
    """Exported under the authors' names, and imported again."""
    exported, back = home / "authors.safetensors", home / "back"
    run("export", trained, "--layout", "authors", "--out", exported)
    network_from_authors(read_tensors(exported), heads=2)
    spec = tvmatch.load(trained).spec
    (home / "names.txt").write_text("\n".join(NAMES))
    run("import", exported, "--out", back, "--heads", 2, "--guidance", 2, "--scaled", "true",
        f"--mean={','.join(map(repr, spec.mean))}", f"--std={','.join(map(repr, spec.std))}",
        "--autoencoder", autoencoder, "--class_names", home / "names.txt")  # fmt: skip
    return back


def test_authors_names_and_back(trained: Path, imported: Path, expected: Tensor) -> None:
    assert tvmatch.load(imported).spec == tvmatch.load(trained).spec
    assert torch.equal(pixels(load_model(imported, "cpu")), expected)


def test_layer_norm_has_no_place_in_the_authors_layout(
    trained: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tvmatch.load(trained)
    assert isinstance(model.network, DiT)
    network = DiT(replace(model.network.config, rms_norm=False), model.spec.shape, model.spec.class_count)
    (home / "layer_norm").mkdir()
    replace(model, network=network).save(home / "layer_norm")
    arguments = ["export", home / "layer_norm", "--layout", "authors", "--out", home / "wrong.safetensors"]
    assert "LayerNorm" in refused(arguments, capsys)


def test_fine_tuning_what_was_imported(trained: Path, imported: Path, latents: Path, home: Path) -> None:
    expectations = ("shape", "class_count", "mean", "std", "autoencoder")
    options = [f"--data.latents={latents}", *(f"--data.{name}=null" for name in expectations)]
    options += [option for option in TINY if not option.startswith("--network")]
    options += [f"--initial={imported}", "--training.steps=2", f"--out={home / 'tuned'}"]
    run("train", "imagenet256_w2", *options)
    assert tvmatch.load(home / "tuned").network.config == tvmatch.load(trained).network.config  # type: ignore[union-attr]


def test_another_autoencoder_is_refused(
    trained: Path, latents: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_autoencoder(home / "other", seed=1)
    before = {path: os.stat(path).st_mtime_ns for path in trained.rglob("*")}
    for arguments in (
        ["sample", trained, "--autoencoder", other, "--out", home / "wrong.png"],
        [
            "evaluate",
            trained,
            "--autoencoder",
            other,
            "--reference",
            PHOTOGRAPHS,
            "--out",
            home / "wrong.json",
        ],
        ["export", trained, "--autoencoder", other, "--layout", "diffusers", "--out", home / "wrong"],
        ["encode", "--data", PHOTOGRAPHS, "--autoencoder", other, "--resolution", 16, "--out", latents],
    ):
        assert refused([*arguments, "--device", "cpu"], capsys)
    assert before == {path: os.stat(path).st_mtime_ns for path in trained.rglob("*")}
    assert not list(home.glob("wrong*"))


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert message.startswith("tvmatch: error: ")
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.shape: [4, 32, 32] is expected"),
        ({"shape": None}, "data.class_count: 1000 classes are expected"),
        ({"shape": None, "class_count": None}, "data.mean: [0.86488"),
        ({"shape": None, "class_count": None, "mean": None}, "data.std: [4.85503674"),
    ],
    ids=["shape", "classes", "mean", "std"],
)
def test_latents_of_something_else_are_refused(
    latents: Path, home: Path, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training under another normalisation is an error, not a silent FID of 40."""
    changes = [f"--data.{name}=null" for name in options]
    arguments = ["train", "imagenet256_w2", f"--data.latents={latents}", *changes, f"--out={home / 'no'}"]
    assert message in refused(arguments, capsys)
    assert not (home / "no").exists()


def test_latents_without_labels(home: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("encode", "--data", PHOTOGRAPHS, "--autoencoder", autoencoder, "--resolution", 16, "--out",
        home / "unlabelled", "--label_column", "null", "--workers", 0, "--device", "cpu")  # fmt: skip
    arguments = ["train", "imagenet256_w2", f"--data.latents={home / 'unlabelled'}", "--data.shape=null"]
    assert "1000 classes are expected" in refused([*arguments, f"--out={home / 'no'}"], capsys)
    arguments += [f"--data.{name}=null" for name in ("class_count", "mean", "std", "autoencoder")]
    assert "guidance_weight" in refused([*arguments, f"--out={home / 'no'}"], capsys)


def test_unfinished_latents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished latents"):
        LatentsData(str(tmp_path)).load()


def test_latents_for_a_checkpoint_that_is_there(
    trained: Path, latents: Path, home: Path, autoencoder: Path
) -> None:
    """To fine-tune it on other images, these are normalised as its own were."""
    run("encode", "--data", PHOTOGRAPHS / "cat", "--autoencoder", autoencoder, "--resolution", 16, "--out",
        home / "cats", "--normalization", trained, "--workers", 0, "--device", "cpu")  # fmt: skip
    own, theirs = LatentsInfo.read(home / "cats"), LatentsInfo.read(latents)
    assert (own.spec.mean, own.spec.std) == (theirs.spec.mean, theirs.spec.std)
    assert own.measured_mean != theirs.measured_mean


def test_latents_of_another_scale_are_pointed_out(
    latents: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Renamed to a recipe's normalisation and back: nothing is encoded anew."""
    before = LatentsInfo.read(latents)
    again = [
        "encode",
        "--data",
        PHOTOGRAPHS,
        "--autoencoder",
        autoencoder,
        "--resolution",
        16,
        "--out",
        latents,
    ]
    again += ["--workers", 0, "--flips", "stored", "--device", "cpu"]
    capsys.readouterr()
    run(*again, "--normalization", "imagenet256_w2")
    assert "another scale" in capsys.readouterr().err
    assert LatentsInfo.read(latents).spec.mean == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    run(*again, "--normalization", "measured")
    assert "another scale" not in capsys.readouterr().err
    assert LatentsInfo.read(latents) == before
