"""The command line as a person uses it: every command, its files, its messages and its exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import (
    SHORT_RUN,
    TINY_MLP,
    TINY_NETWORK,
    TINY_POINTS,
    assert_same_run,
    environment,
    every_switch,
    images,
    newest,
    tiny_config,
    tree,
)

import tvmatch
from tvmatch.cli import COMMANDS, main, results, train
from tvmatch.config.parser import parse_config
from tvmatch.config.recipes import recipe_text
from tvmatch.config.yaml_files import read_yaml
from tvmatch.data import TensorDataset
from tvmatch.data.base import Batch
from tvmatch.data.densities import Density
from tvmatch.training import Trainer, checkpoints


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Defaults such as runs/digits and samples.png lie in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert {path.name for path in tmp_path.glob(".*")} == set()  # no temporary file is left


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures and no figures at the end, for tests of what comes before."""
    monkeypatch.setattr(results, "draw", lambda *_: [])
    monkeypatch.setattr(results, "measure", lambda *_, **__: {"nfe": {}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of `tvmatch train digits`, by a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    done = command(["train", "digits", *SHORT_RUN, *TINY_NETWORK], folder)
    return folder / "runs" / "digits", done


def command(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tvmatch", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "-V"):
        assert main([option]) == 0
        assert lines(capsys) == [f"tvmatch {tvmatch.__version__}"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The overview names every command and shows examples that parse."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name}" in text
    assert main([]) == 2
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", [*COMMANDS, "train digits"])
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option has words of its own beside its name."""
    try:
        code = main([*name.split(), "--help"])
    except SystemExit as caught:
        code = int(caught.code or 0)
    assert code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"tvmatch {name.split()[0]}" in text
    expected = {
        "train": ["--resume RUN", "--config FILE", "checkerboard, cifar10, digits"],
        "train digits": ["--optimizer.warmup_steps", "rises linearly", "--out OUT", "default: runs/RECIPE"],
        "sample": ["--labels", "--count", "--steps", "--times", "--guidance", "--seed", "--out", "--device"],
        "evaluate": ["--samples", "--steps", "metrics.json", "--reference", "metrics_EXTRACTOR.json"],
        "demo": ["--port", "--host"],
        "encode": ["--autoencoder", "--normalization", "--part", "--crop"],
        "import": ["--recipe", "--class_names"],
        "export": ["--layout", "hub, diffusers, authors", "--push"],
        "recipes": ["start for a custom configuration"],
        "info": ["its newest checkpoint"],
        "check": ["--device", "--dtype", "bfloat16 and float16 use autocast", "--model", "exit code is 1"],
    }[name]
    for words in expected:
        assert words in text


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name in ("checkerboard", "cifar10", "digits", "gaussians", "image_folder", "moons"):
        assert name in text
    assert main(["recipes", "digits"]) == 0
    printed = capsys.readouterr().out
    assert printed == recipe_text("digits")
    assert parse_config(yaml.safe_load(printed), "printed") == tvmatch.recipe("digits")


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`tvmatch recipes digits | head -1` says nothing of a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "tvmatch", "recipes", "digits"],
            env=environment(),
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")


# Train


def test_train_digits(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Exit code, files, figures, and what is printed where nobody looks at a terminal."""
    run, done = trained
    assert done.returncode == 0, done.stderr
    found = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    pictures = {"samples_1.png", "samples_2.png", "samples_4.png", "training.png"}
    assert found == {"checkpoints", "config.yaml", "log.jsonl", "metrics.json", *pictures}
    assert [folder.name for folder in checkpoints(run)] == ["step_0000004"]
    assert read_yaml(run / "config.yaml")["training"]["steps"] == 4

    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics)[:4] == ["dataset", "steps", "parameters", "train_seconds"]
    assert (metrics["dataset"], metrics["steps"]) == ("digits", 4)
    assert metrics["parameters"] == sum(x.numel() for x in tvmatch.load(run).network.parameters())
    assert metrics["train_seconds"] > 0
    assert metrics["classifier_accuracy"] >= 0.97
    assert list(metrics["nfe"]) == ["1", "2", "4"]
    for row in metrics["nfe"].values():
        assert set(row) == {"label_accuracy", "frechet", "frechet_ratio", "images_per_second"}
        assert row["frechet_ratio"] == pytest.approx(row["frechet"] / metrics["real_frechet"])

    assert "label accuracy" in done.stdout
    printed = [line for line in done.stdout.splitlines() if line.startswith("runs/digits/")]
    paths = ["checkpoints/step_0000004", "config.yaml", *sorted(pictures), "metrics.json"]
    assert sorted(printed) == sorted(f"runs/digits/{path}" for path in paths)
    assert "step 4/4  terminal" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # no colours, no cursor movements


def test_pictures_show_what_they_say(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Ten rows, one a digit; enlarged, so that 8 pixels are 56."""
    for steps in (1, 2, 4):
        with Image.open(trained[0] / f"samples_{steps}.png") as picture:
            assert picture.size == (12 * 60 + 4, 10 * 60 + 4)


def test_train_points(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of data, samples and trajectories, and the exact 2-Wasserstein distances."""
    # One draw of each distance instead of five, which takes 13 seconds longer.
    monkeypatch.setattr(results, "evaluate_points", partial(results.evaluate_points, draws=1))
    assert main(["train", "gaussians", *SHORT_RUN, *TINY_POINTS, "--out", "points"]) == 0
    run = Path("points")
    with Image.open(run / "samples.png") as picture:
        assert picture.width > 3 * picture.height  # a row of five panels
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"] == "gaussians"
    # 2,000 samples of noise-like quality are further from the data than two data sets are.
    for steps in ("1", "2", "4"):
        assert metrics["nfe"][steps]["wasserstein2"] > metrics["real_wasserstein2"] > 0
    output = lines(capsys)
    assert "points/samples.png" in output
    assert any("wasserstein2" in line for line in output)

    assert main(["evaluate", "points", "--samples", "40", "--steps", "3", "--out", "other.json"]) == 0
    other = json.loads(Path("other.json").read_text())
    assert list(other["nfe"]) == ["3"]
    assert json.loads((run / "metrics.json").read_text()) == metrics


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures in class folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "photos" / ("hound" if number % 2 else "größe") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_a_folder_of_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From class folders to samples by the folders' names; one bad file is named, or left out and counted."""
    options = [*SHORT_RUN, *TINY_NETWORK, "--data.path", str(photos), "--data.resolution", "4"]
    options += ["--data.workers", "1"]
    assert main(["train", "image_folder", *options, "--out", "first"]) == 0
    capsys.readouterr()
    assert main(["info", "first"]) == 0
    assert any(re.match(r"classes +2: größe, hound$", line) for line in lines(capsys))
    assert main(["sample", "first", "--labels", "hound,größe", "--count", "5", "--out", "a.npz"]) == 0
    assert np.load("a.npz")["labels"].tolist() == [1, 0, 1, 0, 1]
    assert main(["evaluate", "first"]) == 0  # by default with half of the images
    assert set(json.loads(Path("first/metrics.json").read_text())["nfe"]) == {"1", "2", "4"}
    capsys.readouterr()
    assert main(["evaluate", "first", "--samples", "7"]) == 2
    assert one_line(capsys) == ("tvmatch: error: samples: must be at most half of the 12 images, got 7")

    broken = photos / "hound" / "broken.png"
    broken.write_bytes(b"not a picture")
    assert main(["train", "image_folder", *options, "--out", "second"]) == 2
    assert str(broken) in capsys.readouterr().err
    assert not Path("second").exists()


def test_bad_images_are_counted(photos: Path, quick: None, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "hound" / "broken.png").write_bytes(b"not a picture")
    options = [*SHORT_RUN, *TINY_NETWORK, "--data.path", str(photos), "--data.resolution", "4"]
    options += ["--data.workers", "1", "--data.on_bad_image", "skip"]
    assert main(["train", "image_folder", *options]) == 0
    (message,) = caplog.messages  # without a handler, logging prints it to stderr
    assert "skipped 1 of 13 images" in message
    assert "broken.png" in message


# Signals and resuming


def test_ctrl_c(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that is told to stop saves, says how to go on, and going on gives the uninterrupted run."""
    options = [*SHORT_RUN, *TINY_NETWORK, "--training.steps=150", "--objective.guidance_weight=[1,2]"]
    options.append("--objective.label_dropout=0.2")
    out = tmp_path / "my runs"
    arguments = ["train", "digits", *options, "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tvmatch", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    log = out / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    stopped = newest(out)
    message = stderr.splitlines()[-1]
    assert message.startswith(f"saved {stopped}; continue with: ")
    again = shlex.split(message.partition("continue with: ")[2])
    assert again == ["tvmatch", "train", "--resume", str(out), "--device", "cpu"]
    assert 5 < int(stopped.name.removeprefix("step_")) < 150

    assert main(again[1:]) == 0
    capsys.readouterr()
    assert main(["train", "digits", *options, "--out", str(tmp_path / "whole")]) == 0
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_of_signals(
    number: signal.Signals,
    code: int,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batch = TensorDataset.batch

    def send(self: TensorDataset, step: int, size: int, seed: int) -> Batch:
        if step == 2:
            signal.raise_signal(number)
        return batch(self, step, size, seed)

    monkeypatch.setattr(TensorDataset, "batch", send)
    assert main(["train", "digits", *SHORT_RUN, *TINY_NETWORK]) == code
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == (
        "saved runs/digits/checkpoints/step_0000003; continue with: tvmatch train --resume runs/digits"
    )
    monkeypatch.undo()


def test_ctrl_c_while_drawing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The training is done and saved; the same command draws what is missing."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "draw", stop)
    assert main(["train", "digits", *SHORT_RUN, *TINY_NETWORK]) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == (
        "interrupted; the last good checkpoint is runs/digits/checkpoints/step_0000004; "
        "continue with: tvmatch train --resume runs/digits"
    )


def test_a_finished_run_is_drawn_again(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = trained
    before = tree(run)
    (run / "samples_1.png").unlink()
    (run / "metrics.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    after = tree(run)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed <= {"metrics.json"}  # images a second differ
    assert after.keys() == before.keys()


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path | None]]:
    """(run folder, what to resume) of every `tvmatch train`, which trains nothing."""
    calls: list[tuple[Path, Path | None]] = []

    def record(config: object, out: Path, device: str, resume: Path | None) -> int:
        calls.append((out, resume))
        return 0

    monkeypatch.setattr(train, "_train", record)
    return calls


def test_ways_to_resume(
    tmp_path: Path, trained: tuple[Path, Any], resumed: list[tuple[Path, Path | None]]
) -> None:
    run = Path("runs/digits")
    run.parent.mkdir()
    run.symlink_to(trained[0])
    for arguments in (
        ["--resume", "runs/digits"],
        ["--resume=runs/digits"],
        ["digits", "--resume", "runs/digits"],
        ["--resume", "--out", "runs/digits"],
        ["--resume", "runs/digits", "--out", "runs/digits/"],
        ["digits", "--resume"],
        ["--resume", "digits"],
        ["--resume", "--seed", "0", "digits"],
        ["--resume", "runs/digits", "--training.steps", "9"],
    ):
        assert main(["train", *arguments]) == 0, arguments
        assert resumed.pop() == (run, run), arguments
    checkpoint = run / "checkpoints" / "step_0000004"
    assert main(["train", "--resume", str(checkpoint)]) == 0
    assert resumed.pop() == (run, checkpoint)


def test_ways_not_to_resume(
    trained: tuple[Path, Any], resumed: list[tuple[Path, Path | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained[0])
    Path("empty").mkdir()
    for arguments, message in (
        (["--resume"], "resume: must be followed by a run folder"),
        (["--resume", "nowhere"], "nowhere: no such file or folder"),
        (["--resume", "empty"], "empty: not a run: no config.yaml here or in the run folder above"),
        (["--resume", f"{run}/checkpoints"], f"{run}/checkpoints: not a run"),
        (["--resume", run, "--out", "other"], f"out: other is not the run of --resume, {run}"),
        (["moons", "--resume", run], f"recipe: moons, but {run}/config.yaml is of digits"),
    ):
        assert main(["train", *arguments]) == 2
        assert one_line(capsys).startswith(f"tvmatch: error: {message}"), arguments
    assert resumed == []


def test_a_python_run_is_resumed_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration cannot say where its data are."""
    tvmatch.train(tiny_config(), images(), tmp_path / "mine")
    capsys.readouterr()
    for arguments, message in (
        (["train", "--resume", "mine"], "no data section; a run on data passed from Python is resumed from"),
        (["evaluate", "mine"], "the data set of this run was passed from Python; evaluate it from Python"),
    ):
        assert main(arguments) == 2
        assert one_line(capsys).startswith(f"tvmatch: error: mine/config.yaml: {message}")
    assert main(["sample", "mine", "--labels", "bee"]) == 0


def test_resuming_says_what_changed(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before the training goes on; none if nothing did."""
    arguments = ["train", "gaussians", *SHORT_RUN, *TINY_POINTS, "--out", "run"]
    assert main(arguments) == 0
    capsys.readouterr()
    changes = ["--training.steps=5", "--optimizer.learning_rate=0.5", "--times.gap=[-1,2]"]
    assert main(["train", "--resume", "run"]) == 0
    assert "changed in this run" not in capsys.readouterr().err
    rate = tvmatch.recipe("gaussians").optimizer.learning_rate
    gap = list(tvmatch.recipe("gaussians").objective.times.gap)
    assert main(["train", "--resume", "run", *changes]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed in this")]
    assert line == (
        f"changed in this run: objective.times.gap: {gap} → [-1.0, 2.0], "
        f"optimizer.learning_rate: {rate} → 0.5, training.steps: 4 → 5"
    )
    assert main(["train", "--resume", "run"]) == 0  # with the changes, which are the run's own by now
    assert "changed in this run" not in capsys.readouterr().err


def test_a_broken_run(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that is not finite is no mistake in what was given: exit code 1, step and checkpoint named."""
    options = [*SHORT_RUN, *TINY_NETWORK, "--training.steps=90", "--training.checkpoint_every=1"]
    assert main(["train", "digits", *options, "--optimizer.learning_rate=1e30"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"tvmatch: error: step \d+: not finite: .*; the last good checkpoint is runs/digits/.*", message
    )
    assert tvmatch.load("runs/digits").step >= 1


def test_samples_of_a_model_that_diverged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer.run

    def diverge(self: Trainer) -> tvmatch.TrainedModel:
        model = run(self)
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.fill_(1e25)
        return model

    monkeypatch.setattr(Trainer, "run", diverge)
    assert main(["train", "digits", *SHORT_RUN, *TINY_NETWORK]) == 1
    assert "samples of the trained model are not finite: training has diverged" in capsys.readouterr().err


# Sample


def test_sample_as_arrays(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as from Python, whatever the batch size, to the last 1e-5."""
    run, _ = trained
    options = ["--labels", "3,8", "--count", "6", "--steps", "2", "--seed", "9"]
    model = tvmatch.load(run)
    expected = model.sample([3, 8, 3, 8, 3, 8], steps=2, seed=9)
    for batch_size in (1, 4, 64):
        path = Path(f"{batch_size}.npz")
        assert main(["sample", str(run), *options, "--batch_size", str(batch_size), "--out", str(path)]) == 0
        assert lines(capsys) == [str(path)]
        arrays = np.load(path)
        assert arrays["labels"].tolist() == [3, 8, 3, 8, 3, 8]
        assert arrays["samples"].dtype == np.float32
        np.testing.assert_allclose(arrays["samples"], expected.numpy(), rtol=0, atol=1e-5)


def test_sample_several_numbers_of_steps(
    trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    assert main(["sample", str(run), "--steps", "1,2,4", "--out", "new/grid.png", "--count", "9"]) == 0
    expected = ["new/grid_1.png", "new/grid_2.png", "new/grid_4.png"]
    assert lines(capsys) == expected
    for path in expected:
        with Image.open(path) as picture:
            assert picture.size == (3 * 60 + 4, 3 * 60 + 4)


def test_sample_defaults(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """All classes once, in one step, into samples.png; of points, into samples.npz."""
    run, _ = trained
    assert main(["sample", str(newest(run))]) == 0
    assert lines(capsys) == ["samples.png"]
    with Image.open("samples.png") as picture:
        assert picture.size == (4 * 60 + 4, 3 * 60 + 4)  # ten cells in a nearly square grid
    config = tiny_config()
    config.network = TINY_MLP
    model = tvmatch.train(config, Density("moons"), "points")
    assert main(["sample", "points"]) == 0
    assert lines(capsys) == ["samples.npz"]
    arrays = np.load("samples.npz")
    assert list(arrays) == ["samples"]
    np.testing.assert_array_equal(arrays["samples"], model.sample().numpy())


def test_sample_a_folder(trained: tuple[Path, Any]) -> None:
    """One PNG a sample, of the image's own size."""
    run, _ = trained
    assert main(["sample", str(run), "--labels", "7", "--count", "3", "--out", "many/sevens"]) == 0
    paths = sorted(Path("many/sevens").iterdir())
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    expected = tvmatch.load(run).sample([7] * 3)
    with Image.open(paths[2]) as picture:
        assert picture.size == (8, 8)
        pixels = torch.tensor(np.asarray(picture) / 255)  # 8-bit rounding
    torch.testing.assert_close(pixels.float(), expected[2, 0], rtol=0, atol=0.5 / 255 + 1e-6)


def test_sample_on_a_grid_of_times(trained: tuple[Path, Any]) -> None:
    run, _ = trained
    assert main(["sample", str(run), "--times", "1,0.7,0.2,0", "--labels", "1", "--out", "t.npz"]) == 0
    expected = tvmatch.load(run).sample([1], times=[1, 0.7, 0.2, 0])
    np.testing.assert_array_equal(np.load("t.npz")["samples"], expected.numpy())


def test_sample_at_another_guidance(tmp_path: Path) -> None:
    """A model of several weights takes each of them by --guidance."""
    model = tvmatch.train(every_switch(), images(), tmp_path / "run")
    assert main(["sample", "run", "--guidance", "2", "--labels", "bee", "--out", "g.npz"]) == 0
    np.testing.assert_array_equal(np.load("g.npz")["samples"], model.sample(["bee"], guidance=2.0).numpy())


def test_nothing_is_overwritten(
    trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    Path("a_2.npz").write_text("mine")
    Path("folder").mkdir()
    before = tree(tmp_path)
    for out, steps in (("a.npz", "1,2"), ("folder", "1"), ("a_2.npz", "3")):
        assert main(["sample", str(run), "--out", out, "--steps", steps]) == 2
        assert "exists already" in one_line(capsys)
    assert tree(tmp_path) == before


# Evaluate and info


def test_evaluate_digits(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run or of a checkpoint: the same figures as after training, all but the speed."""
    run, _ = trained
    Path("copy").mkdir()
    assert main(["evaluate", str(newest(run)), "--steps", "1", "--out", "copy/m.json"]) == 0
    output = lines(capsys)
    assert output[-1] == "copy/m.json"
    assert any("label accuracy" in line for line in output)
    ours, theirs = (json.loads(p.read_text()) for p in (Path("copy/m.json"), run / "metrics.json"))
    assert ours["real_frechet"] == theirs["real_frechet"]
    for name in ("label_accuracy", "frechet", "frechet_ratio"):
        assert ours["nfe"]["1"][name] == theirs["nfe"]["1"][name]


def test_info(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    assert main(["info", str(run)]) == 0
    of_run = lines(capsys)
    assert main(["info", str(newest(run))]) == 0
    assert lines(capsys) == of_run
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in of_run)
    assert facts["checkpoint"] == str(newest(run))
    assert facts["network"] == "DiT"
    assert facts["generates"] == "image, shape 1×8×8"
    assert facts["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert facts["guidance weight"] == "1"
    assert facts["steps trained"] == "4"
    assert facts["recipe"] == "digits"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"


def test_a_configuration_of_data_from_python_is_not_taken_for_the_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data: null` in a run's file: to train on the recipe's digits would be another run without a word."""
    (tmp_path / "mine.yaml").write_text("recipe: digits\ndata: null\n")
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "data: null" in one_line(capsys)
    assert not (tmp_path / "run").exists()
