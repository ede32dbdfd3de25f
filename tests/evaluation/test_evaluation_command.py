"""`tvmatch evaluate --reference`: from a checkpoint and real photographs to a table."""

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import randomize_, small_dit
from image_files import PHOTOGRAPHS
from PIL import Image
from runs import environment, images, tiny_config, tree
from small_extractor import POOLED, SmallExtractor
from torch import Tensor

import tvmatch
from tvmatch.cli import feature_metrics, main, options
from tvmatch.config import Config
from tvmatch.data.config import ImagesData
from tvmatch.data.images.dataset import ImageDataset
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.evaluation import fit_gaussian, frechet_distance
from tvmatch.evaluation.references import cache
from tvmatch.generation.uint8 import to_bytes
from tvmatch.trained_model import TrainedModel, load

EXTRACTOR = "--extractor=small_extractor:SmallExtractor"
SHORT = ["--samples=20", "--steps=1,2", "--batch_size=6", "--device=cpu"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is in no run folder, real photographs, and caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path / "home"))
    save(tmp_path / "checkpoint")
    for name in ("cat", "rocket"):
        shutil.copytree(PHOTOGRAPHS / name, tmp_path / "real" / name)
    return tmp_path


def save(folder: Path, kind: str = "image") -> TrainedModel:
    names = ("cat", "coffee", "rocket")
    info = AutoencoderInfo("autoencoder", "", (3, 16, 16)) if kind == "latents" else None
    spec = DataSpec(kind, (3, 8, 8), names, (0.5,) * 3, (0.5,) * 3, info)  # type: ignore[arg-type]
    network = randomize_(small_dit((3, 8, 8), 3))
    model = TrainedModel(network.requires_grad_(False).eval(), spec, scaled=False, guidance=(1.0, 3.0))
    folder.mkdir()
    model.save(folder)
    return model


def evaluate(*arguments: str) -> int:
    return main(["evaluate", "checkpoint", EXTRACTOR, *SHORT, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an evaluation that changes nothing."""
    before = tree(Path())
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert tree(Path()) == before
    return line.removeprefix("tvmatch: error: ")


def figures(path: str) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    rows = json.loads(Path(path).read_text())["rows"]
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "provenance")}
        for row in rows
    ]


OWN_FILE = "checkpoint/metrics_small_extractor_SmallExtractor.json"


def test_a_table_of_guidance_and_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--reference=real", "--guidance=1.5,3", "--seed=4") == 0
    output = capsys.readouterr()
    assert output.err == ""
    metrics = json.loads((place / OWN_FILE).read_text())
    rows = metrics["rows"]
    assert [(row["guidance"], row["steps"]) for row in rows] == [(1.5, 1), (1.5, 2), (3.0, 1), (3.0, 2)]
    model, extractor = load("checkpoint"), SmallExtractor()
    real = torch.stack([pixels.clone() for pixels in real_photographs()])
    expected = fit_gaussian(extractor(to_bytes(real)).pooled)
    for row in rows:
        samples = model.sample(
            [k % 3 for k in range(20)], steps=row["steps"], guidance=row["guidance"], seed=4, batch_size=6
        )
        fitted = fit_gaussian(extractor(to_bytes(samples)).pooled)
        # float32 features differ by 1e-7 between batches of one size and another.
        assert row["fd"] == pytest.approx(frechet_distance(fitted, expected), rel=1e-4)
        assert 0 <= row["precision"] <= 1
        assert row["images_per_second"] > 0
        assert "reference real (sizes and times " in row["provenance"]
    lines = output.out.splitlines()
    assert lines[-1] == OWN_FILE
    assert re.match(
        r"extractor small_extractor:SmallExtractor [0-9a-f]{12}; 20 samples; 8×8 pixels", lines[-2]
    )
    assert sum("│" in line for line in lines) == 4

    # Again, from the cache: the same figures, in place of the former.
    assert evaluate("--reference=real", "--guidance=1.5,3", "--seed=4") == 0
    again = json.loads((place / OWN_FILE).read_text())["rows"]
    assert [row["fd"] for row in again] == [row["fd"] for row in rows]
    assert len(list((place / "home/tvmatch/references").iterdir())) == 1


def real_photographs() -> Tensor:
    return ImagesData("real", resolution=8, crop="dhariwal", workers=1).load().take(32, 0).values


def test_two_processes_find_the_figures_of_one(place: Path) -> None:
    """The samples are two batches, the reference three."""
    arguments = ["evaluate", "checkpoint", EXTRACTOR, *SHORT, "--reference=real", "--guidance=2"]
    arguments += ["--batch_size=10", "--reference_split=train[:25]"]
    assert main([*arguments, "--out=one.json"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, "-m", "tvmatch", *arguments, "--cache=empty", "--out=two.json"],
        env=environment() | {"HF_HOME": str(place / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.endswith(".json")] == ["two.json"]
    for row, expected in zip(figures("two.json"), figures("one.json"), strict=True):
        # The same batches give the same features; their float64 sums are taken in another order.
        assert row == pytest.approx(expected, rel=1e-9)


def test_few_samples_are_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("reference.npz", **statistics(POOLED))
    few = ["--reference=reference.npz", "--metrics=fid", f"--samples={POOLED}"]
    assert evaluate(*few) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"tvmatch: warning: samples: {POOLED} images give the covariance of {POOLED} features only rank"
    )
    assert json.loads((place / OWN_FILE).read_text())["warnings"] == [line.removeprefix("tvmatch: warning: ")]


def statistics(features: int, **more: Any) -> dict[str, Any]:
    return {"mu": np.zeros(features), "sigma": np.eye(features), **more}


def test_the_inception_score_needs_no_reference(place: Path) -> None:
    assert evaluate("--metrics=is") == 0
    row = figures(OWN_FILE)[0]
    assert list(row) == ["guidance", "steps", "inception_score", "inception_score_std"]


def test_a_run_keeps_its_other_figures(place: Path) -> None:
    """Figures in features go beside those of pixels, from one of its checkpoints too."""
    tvmatch.train(tiny_config(2), images(), place / "run")
    (place / "run/metrics.json").write_text("{}")
    np.savez("reference.npz", **statistics(POOLED))
    arguments = [EXTRACTOR, *SHORT, "--reference=reference.npz", "--guidance=1"]
    assert main(["evaluate", "run", *arguments]) == 0
    file = place / "run/metrics_small_extractor_SmallExtractor.json"
    first = json.loads(file.read_text())
    assert (place / "run/metrics.json").read_text() == "{}"
    assert main(["evaluate", "run/checkpoints/step_0000002", *arguments]) == 0
    assert figures(str(file)) == [
        {name: value for name, value in row.items() if name not in ("images_per_second", "provenance")}
        for row in first["rows"]
    ]


class Decoder:
    """Latents 8 × 8 to images 16 × 16."""

    source, fingerprint = "folder", "9" * 64

    def __call__(self, values: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(values.clamp(0, 1), scale_factor=2)


def test_latents_are_decoded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(place / "latents", "latents")
    model.decoder = Decoder()
    monkeypatch.setattr(options, "load_model", lambda *_: model)
    assert refused(capsys, "latents").startswith("reference: is required")
    assert main(["evaluate", "latents", EXTRACTOR, *SHORT, "--reference=real"]) == 0
    metrics = json.loads((place / "latents/metrics_small_extractor_SmallExtractor.json").read_text())
    assert metrics["provenance"]["resolution"] == [16, 16]
    assert metrics["provenance"]["autoencoder"]["fingerprint"] == "9" * 64
    assert "autoencoder folder 999999999999" in metrics["rows"][0]["provenance"]
    model.decoder = None
    line = refused(capsys, "latents", EXTRACTOR, *SHORT, "--reference=real")
    assert line == "model: must generate images, this one generates latents; it needs its autoencoder"


def points(place: Path) -> None:
    spec = DataSpec("points", (2,), None, (0.0,) * 2, (1.0,) * 2)
    network = tvmatch.models.MLP(tvmatch.models.MLPConfig(8, 1, 4), (2,))
    (place / "points").mkdir()
    TrainedModel(network, spec, scaled=False, guidance=1.0).save(place / "points")


def infinite(place: Path) -> None:
    np.savez("bad.npz", **statistics(POOLED, mu=np.full(POOLED, math.inf)))


BAD: dict[str, tuple[list[str], str, Callable[[Path], object]]] = {
    "no reference": ([], "reference: is required", lambda _: None),
    "metrics without reference": (["--metrics=is,pr"], "reference: is required", lambda _: None),
    "no such reference": (["--reference=x.npz"], "reference: x.npz: no such file", lambda _: None),
    "no such images": (["--reference=./x"], "reference: ./x does not exist", lambda _: None),
    "no such split": (
        ["--reference=real", "--reference_split=a"],
        "reference_split: ",
        lambda _: real_photographs(),  # so that what `datasets` keeps of a folder is there already
    ),
    "another resolution": (
        ["--reference=bad.npz"],
        "reference: bad.npz holds images of 16×16 pixels, the samples have 8×8",
        lambda _: np.savez("bad.npz", np.zeros((9, 16, 16, 3), np.uint8)),
    ),
    "other features": (
        ["--reference=bad.npz"],
        f"reference: bad.npz: mu must have shape ({POOLED},) for this extractor, got (2048,)",
        lambda _: np.savez("bad.npz", **statistics(2048)),
    ),
    "statistics that are not finite": (
        ["--reference=bad.npz"],
        "reference: bad.npz: its statistics hold a number that is not finite",
        infinite,
    ),
    "statistics alone": (
        ["--reference=bad.npz", "--metrics=fid,pr"],
        "metrics: pr cannot be computed, the reference has statistics only, no images",
        lambda _: np.savez("bad.npz", **statistics(POOLED)),
    ),
    "no such metric": (["--reference=real", "--metrics=kid"], "metrics: must be among fid,", lambda _: None),
    "no such extractor": (
        ["--extractor=resnet", "--reference=real"],
        "extractor: must be inception, dinov2 or package.module:attribute, got 'resnet'",
        lambda _: None,
    ),
    "an extractor that is not there": (
        ["--extractor=no_such:thing", "--reference=real"],
        "extractor: no_such:thing cannot be imported",
        lambda _: None,
    ),
    "guidance out of range": (
        ["--reference=real", "--guidance=2,4"],
        "guidance: this model was trained for 1 to 3, got 4",
        lambda _: None,
    ),
    "guidance in words": (
        ["--reference=real", "--guidance=high"],
        "guidance: must be numbers like 1.5,2, got 'high'",
        lambda _: None,
    ),
    "one sample": (["--reference=real", "--samples=1"], "samples: must be at least 2, got 1", lambda _: None),
    "no batch": (["--reference=real", "--batch_size=0"], "batch_size: must be at least 1", lambda _: None),
    "negative seed": (
        ["--reference=real", "--seed=-1"],
        "seed: must not be negative, got -1",
        lambda _: None,
    ),
    "a folder for the figures": (["--reference=real", "--out=real"], "out: real is a folder", lambda _: None),
    "an existing file": (
        ["--reference=real", "--out=checkpoint/model.json"],
        "out: checkpoint/model.json exists already",
        lambda _: None,
    ),
    "a file in the place of a folder": (
        ["--reference=real", "--out=checkpoint/model.json/figures/a.json"],
        "out: checkpoint/model.json/figures/a.json cannot be written",
        lambda _: None,
    ),
    "points": (["--reference=real"], "model: must generate images, this one generates points", points),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message, spoil = BAD[name]
    spoil(place)
    checkpoint = "points" if name == "points" else "checkpoint"
    extractor = [] if any("--extractor" in argument for argument in arguments) else [EXTRACTOR]
    line = refused(capsys, checkpoint, *extractor, *SHORT, *arguments)
    assert line.startswith(message), line


def test_figures_are_shown_even_if_they_cannot_be_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", OWN_FILE)

    monkeypatch.setattr(feature_metrics, "write_metrics", full)
    assert evaluate("--metrics=is") == 2
    output = capsys.readouterr()
    assert output.err == f"tvmatch: error: {OWN_FILE}: No space left on device\n"
    assert sum("│" in line for line in output.out.splitlines()) == 2  # steps 1 and 2
    assert OWN_FILE not in output.out


def test_an_extractor_that_has_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own statistics name their extractor; those of another one are refused."""
    Path("pixels.py").write_text(
        "import torch\n\ndef pooled(images):\n"
        f"    return images.float().flatten(2).mean(2).repeat(1, {POOLED // 3})\n"
    )
    assert evaluate("--reference=real", "--metrics=fid") == 0
    (file,) = (place / "home/tvmatch/references").iterdir()
    line = refused(
        capsys, "checkpoint", "--extractor=pixels:pooled", *SHORT, f"--reference={file}", "--metrics=fid"
    )
    assert line.endswith(
        "was computed with extractor small_extractor:SmallExtractor, this evaluation has pixels:pooled"
    )


# The crop of the reference


def untouched(model: TrainedModel, dataset: ImageDataset) -> None:
    """In the place of samples, the images that the model was trained on."""
    images = dataset.take(len(dataset), 0).values
    model.sample = lambda *_, first, batch_size, **__: images[first : first + batch_size]  # type: ignore[assignment, method-assign]


def cropped_run(place: Path, crop: str, channels: int = 3) -> tuple[Path, Config]:
    """A run of two steps on photographs that are wider than high."""
    for name in ("cat", "rocket"):
        for number, file in enumerate(sorted((place / "real" / name).iterdir())):
            with Image.open(file) as image:
                image.convert("RGB").resize((21 + number % 3, 37)).save(file.with_suffix(".png"))
            file.unlink()
    data = ImagesData(
        str(place / "real"), resolution=8, crop=crop, channels=channels, label_column="label", workers=1
    )  # type: ignore[arg-type]
    config = tiny_config(2)
    config.data = data
    tvmatch.train(config, data.load(), place / "run")
    return place / "run", config


@pytest.mark.parametrize(("crop", "channels"), [("centre", 3), ("dhariwal", 3), ("centre", 1)])
def test_the_training_images_themselves_score_nothing(
    crop: str, channels: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is cropped as they were; another crop is another reference."""
    run, config = cropped_run(place, crop, channels)
    model = load(run)
    dataset = config.data.load()  # type: ignore[union-attr]
    assert model.provenance["crop"] == crop
    assert model.provenance["class_counts"] == dataset.class_counts
    assert sum(dataset.class_counts) == len(dataset)
    untouched(model, dataset)
    monkeypatch.setattr(options, "load_model", lambda *_: model)
    arguments = ["evaluate", "run", EXTRACTOR, "--steps=1", "--batch_size=6", "--metrics=fid"]
    arguments += [f"--samples={len(dataset)}", "--reference=real"]
    other = {"centre": "dhariwal", "dhariwal": "centre"}[crop]
    distances = {}
    for asked in ("", crop, other):
        option = [f"--reference_crop={asked}"] if asked else []
        assert main([*arguments, f"--out={asked}.json", *option]) == 0
        metrics = json.loads(Path(f"{asked}.json").read_text())
        assert metrics["provenance"]["reference"]["crop"] == (asked or crop)
        assert f"crop {asked or crop}" in metrics["rows"][0]["provenance"]
        distances[asked] = metrics["rows"][0]["fd"]
    # Of float32 features, which batches change by 1e-7; their variances are about 1e-2.
    assert distances[""] == distances[crop] < 1e-9
    assert distances[other] > 1e-6


def test_an_imported_model_has_the_crop_of_imagenet(place: Path) -> None:
    assert evaluate("--reference=real", "--metrics=fid") == 0
    assert json.loads(Path(OWN_FILE).read_text())["provenance"]["reference"]["crop"] == "dhariwal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference=real", "--reference_crop=center"], "must be centre or dhariwal, got 'center'"),
        (["--reference=bad.npz", "--reference_crop=centre"], "applies to images only"),
        (["--metrics=is", "--reference_crop=centre"], "applies to images only"),
    ],
)
def test_a_bad_crop(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("bad.npz", **statistics(POOLED))
    assert refused(capsys, "checkpoint", EXTRACTOR, *SHORT, *arguments).startswith(
        f"reference_crop: {message}"
    )
