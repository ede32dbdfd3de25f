"""Bad input: one clear line that names the option or file, exit code 2, and nothing written or changed."""

import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SHORT_RUN, TINY_MLP, TINY_NETWORK, images, newest, tiny_config, tree
from safetensors.torch import load_file, save_file

import tvmatch
from tvmatch.cli import main
from tvmatch.data import TensorDataset
from tvmatch.data.densities import Density
from tvmatch.errors import InputError
from tvmatch.training import Trainer

TRAIN = ["train", "digits", *SHORT_RUN, *TINY_NETWORK]
FOLDER = ["train", "image_folder", *SHORT_RUN, *TINY_NETWORK, "--data.resolution=4", "--data.workers=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own, with a cache outside of it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of digits (`run`), one of points (`points`), and images (`photos`)."""
    folder = tmp_path_factory.mktemp("origin")
    config = tvmatch.recipe("digits")
    small = tiny_config()
    config.network, config.training, config.objective = small.network, small.training, small.objective
    Trainer(config, config.data.load(), folder / "run").run(until=4)  # of 8 steps
    config = tvmatch.recipe("moons")
    config.network, config.training, config.objective = TINY_MLP, small.training, small.objective
    Trainer(config, Density("moons"), folder / "points").run()
    random = np.random.default_rng(0)
    for number in range(4):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def made(origin: Path, elsewhere: Path) -> Path:
    """A copy of it to spoil."""
    for path in origin.rglob("*"):
        target = elsewhere / path.relative_to(origin)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    return elsewhere


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says, having changed nothing."""
    capsys.readouterr()
    before = tree(folder)
    code = main(arguments)
    output = capsys.readouterr()
    assert code == 2, (arguments, output)
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("tvmatch: error: ")
    assert len(line) < 400
    assert tree(folder) == before
    return line.removeprefix("tvmatch: error: ")


class Case(NamedTuple):
    """Arguments of a command, in a folder with a run, points and photos, and the start of its one line."""

    arguments: list[str]
    message: str
    spoil: Callable[[], object] = lambda: None


def photo_is_corrupt() -> None:
    path = Path("photos/a/2.png")
    path.write_bytes(path.read_bytes()[:60])


def photos_are_gone() -> None:
    for path in Path("photos").rglob("*.png"):
        path.unlink()


def parquet_is_cut() -> None:
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet("table.parquet")
    os.truncate("table.parquet", 40)


CASES: dict[str, Case] = {
    # The command line itself
    "no such command": Case(["trian"], "no command 'trian'; commands are train, sample, evaluate"),
    "no recipe": Case(["train"], "recipe: must be one of checkerboard, cifar10, digits"),
    "unknown recipe": Case(["train", "digit"], "recipe: no recipe 'digit'; there are"),
    "unknown option": Case([*TRAIN, "--optimiser.beta1=0"], "--optimiser.beta1: no such option"),
    "abbreviated option": Case([*TRAIN, "--training.batch=3"], "--training.batch: no such option"),
    "abbreviated option of sample": Case(["sample", "run", "--label", "3"], "--label: no such option"),
    "an argument too many": Case([*TRAIN, "runs"], "unrecognized arguments: runs"),
    "a value is missing": Case([*TRAIN, "--seed"], "argument --seed: expected one argument"),
    "wrong type": Case([*TRAIN, "--training.steps=few"], "training.steps: must be a whole number"),
    "wrong type of sample": Case(["sample", "run", "--count=few"], "count: must be a whole number"),
    "out of range": Case([*TRAIN, "--training.steps=0"], "training.steps: must be a whole number of at"),
    "control characters in a value": Case(
        [*TRAIN, "--training.steps=\x1b[31mred"], r"training.steps: must be a whole number, got \x1b[31mred"
    ),
    "a name that cannot be printed": Case(["info", "a\u202eb"], r"a\u202eb: no such file or folder"),
    "unknown device": Case([*TRAIN, "--device=gpu"], "device: no device is called 'gpu'"),
    "no such device": Case(["sample", "run", "--device=cuda:99"], "device: 'cuda:99' cannot be used"),
    "no such backend": Case(
        ["sample", "run", "--device=mps"], "device: 'mps' cannot be used (this PyTorch is built without it)"
    ),
    "no such package": Case(
        ["sample", "run", "--device=hpu"], "device: 'hpu' cannot be used (this PyTorch is built without it)"
    ),
    "a device of old": Case(
        ["sample", "run", "--device=mkldnn"], "device: 'mkldnn' cannot be used (PyTorch has"
    ),
    # Data
    "no path": Case(FOLDER, "data.path: give a folder"),
    "missing data": Case([*FOLDER, "--data.path=/no/where"], "data.path: /no/where does not exist"),
    "empty data": Case([*FOLDER, "--data.path=photos"], "data.path: photos holds no im", photos_are_gone),
    "unreadable data": Case(
        [*FOLDER, "--data.path=table.parquet"], "data.path: table.parquet could not be read", parquet_is_cut
    ),
    "a file of another kind": Case(
        [*FOLDER, "--data.path=run/log.jsonl"], "data.path: run/log.jsonl must be a folder, or .parquet"
    ),
    "corrupt image": Case([*FOLDER, "--data.path=photos"], "{here}/photos/a/2.png: ", photo_is_corrupt),
    "guidance of images without classes": Case(  # known before the corrupt image is met
        [*FOLDER, "--data.path=photos", "--data.label_column=null", "--objective.guidance_weight=2"],
        "objective.guidance_weight: must be 1 for data without classes, got 2.0",
        photo_is_corrupt,
    ),
    "label column absent": Case(
        [*FOLDER, "--data.path=photos", "--data.label_column=kind"],
        "data.label_column: there is no column 'kind'; the columns are image, label",
    ),
    "image column absent": Case(
        [*FOLDER, "--data.path=photos", "--data.image_column=picture"],
        "data.image_column: there is no column 'picture'",
    ),
    "no such split": Case([*FOLDER, "--data.path=photos", "--data.split=best"], "data.split: 'best'"),
    "size not divisible by the patch": Case(
        [*FOLDER, "--data.path=photos", "--data.resolution=7"],
        "network.patch_size: 2 does not divide data.resolution 7",
    ),
    "height not divisible by the patch": Case(
        [*FOLDER, "--data.path=photos", "--data.resolution=[5,4]"],
        "network.patch_size: 2 does not divide data.resolution (5, 4)",
    ),
    "digits not divisible by the patch": Case(
        [*TRAIN, "--network.patch_size=3"], "network.patch_size: 3 does not divide the image size 8×8"
    ),
    "resolution out of range": Case(
        [*FOLDER, "--data.path=photos", "--data.resolution=0"], "data.resolution: must be one or two numbers"
    ),
    "channels": Case([*FOLDER, "--data.channels=2"], "data.channels: must be one of 1, 3, got 2"),
    "workers": Case(
        [*FOLDER, "--data.path=photos", "--data.workers=0"], "data.workers: must be at least 1, got 0"
    ),
    "guidance without classes": Case(
        ["train", "moons", "--objective.guidance_weight=2"],
        "objective.guidance_weight: must be 1 for data without classes, got 2.0",
    ),
    # Folders
    "another run": Case(
        [*TRAIN, "--out", "run"],
        "out: run holds another run; continue it with --resume run, or give another --out",
    ),
    "other files": Case([*TRAIN, "--out", "photos"], "out: photos is not an empty folder; give another"),
    "a file as a folder": Case(
        [*TRAIN, "--out", "run/config.yaml"], "out: run/config.yaml is not an empty folder"
    ),
    "below a file": Case([*TRAIN, "--out", "run/config.yaml/x"], "run/config.yaml"),
    "nothing to resume": Case(["train", "--resume", "nowhere"], "nowhere: no such file or folder"),
    "resuming no run": Case(["train", "--resume", "photos"], "photos: not a run: no config.yaml"),
    "resuming with another network": Case(
        ["train", "--resume", "run", "--network.depth=3"],
        "run/checkpoints/step_0000004: its network.depth is 1, the configuration's 3",
    ),
    "resuming with another data set": Case(
        ["train", "--resume", "run", "--network.patch_size=4"],
        "run/checkpoints/step_0000004: its network.patch_size is 2, the configuration's 4",
    ),
    "resuming for fewer steps": Case(
        ["train", "--resume", "run", "--training.steps=2"], "training.steps: 2, but the checkpoint has 4"
    ),
    # Sampling
    "no such checkpoint": Case(["sample", "nowhere"], "nowhere: no such file or folder"),
    "no checkpoint there": Case(["sample", "photos"], "photos: no checkpoint here"),
    "unknown label": Case(
        ["sample", "run", "--labels=3,cat"], "labels: no class is named 'cat'; the classes"
    ),
    "label out of range": Case(["sample", "run", "--labels=10"], "labels: 10 is outside 0 … 9"),
    "negative label": Case(["sample", "run", "--labels=-1"], "labels: -1 is outside 0 … 9"),
    "no label": Case(["sample", "run", "--labels="], "labels: must be names or numbers"),
    "labels of points": Case(["sample", "points", "--labels=1"], "labels: this model has no classes"),
    "no steps": Case(["sample", "run", "--steps=0"], "steps: must be at least 1, got 0"),
    "one of the steps is none": Case(["sample", "run", "--steps=1,-2"], "steps: must be at least 1, got -2"),
    "steps that are no numbers": Case(["sample", "run", "--steps=1,b"], "steps: must be whole numbers like"),
    "steps twice": Case(["sample", "run", "--steps=2,2"], "steps: 2,2 contains a number twice"),
    "steps and times": Case(["sample", "run", "--steps=2", "--times=1,0"], "times: cannot be combined with"),
    "times that rise": Case(["sample", "run", "--times=1,0.2,0.4,0"], "times: must decrease strictly from 1"),
    "times that are no numbers": Case(["sample", "run", "--times=1,x"], "times: must be numbers like"),
    "times that end early": Case(["sample", "run", "--times=1,0.5"], "times: must decrease strictly"),
    "another guidance": Case(
        ["sample", "run", "--guidance=2"], "guidance: this model was trained at the one weight 1, got 2"
    ),
    "guidance that is no number": Case(["sample", "run", "--guidance=nan"], "guidance: "),
    "no samples": Case(["sample", "run", "--count=0"], "count: must be at least 1, got 0"),
    "negative seed": Case(["sample", "run", "--seed=-1"], "seed: must be at least 0, got -1"),
    "batch of none": Case(["sample", "run", "--batch_size=0"], "batch_size: must be at least 1, got 0"),
    "another file format": Case(["sample", "run", "--out=a.jpg"], "out: must end in .png or .npz"),
    "points as a picture": Case(["sample", "points", "--out=a.png"], "out: must end in .npz for points"),
    "points as a folder": Case(["sample", "points", "--out=a"], "out: must end in .npz for points"),
    "samples over a file": Case(["sample", "run", "--out=photos"], "out: photos exists already"),
    "samples without a name": Case(["sample", "run", "--out="], "out: must name a file or a new folder"),
    "samples below a file": Case(
        ["sample", "run", "--out=run/log.jsonl/a.png"], "out: run/log.jsonl/a.png cannot be written"
    ),
    # Evaluation
    "evaluating nothing": Case(["evaluate", "nowhere"], "nowhere: no such file or folder"),
    "evaluating no run": Case(["evaluate", "photos"], "photos: no checkpoint here"),
    "evaluating in no steps": Case(["evaluate", "run", "--steps=0"], "steps: must be at least 1, got 0"),
    "evaluating few digits": Case(["evaluate", "run", "--samples=7"], "samples: cannot be set for digits"),
    "evaluating one point": Case(["evaluate", "points", "--samples=1"], "samples: must be at least 2, got 1"),
    "evaluating with a negative seed": Case(["evaluate", "points", "--seed=-3"], "seed: must not be neg"),
    "figures over a folder": Case(["evaluate", "run", "--out=photos"], "out: photos is a folder"),
    "figures over a file": Case(
        ["evaluate", "points", "--samples=9", "--out=run/config.yaml"], "out: run/config.yaml exists already"
    ),
    "figures over another run's": Case(
        ["evaluate", "points", "--samples=9", "--out=run/metrics.json"],
        "out: run/metrics.json exists already",
        lambda: Path("run/metrics.json").write_text("{}"),
    ),
    # The rest
    "information on nothing": Case(["info", "nowhere"], "nowhere: no such file or folder"),
    "information on no checkpoint": Case(["info", "photos"], "photos: no checkpoint here"),
    "a recipe to print": Case(["recipes", "nothing"], "recipe: no recipe 'nothing'; there are"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_changed(name: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message, spoil = CASES[name]
    spoil()
    line = refused(arguments, made, capsys)
    assert line.startswith(message.format(here=made)), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("times: {gap: null}", "objective.times.gap: must be a pair of numbers like [1,2], got None"),
        ("data: {split: null}", "data.split: must be one of 'train', 'fit', got None"),
        ("seed: null", "seed: must be a whole number, got None"),
        ("initial: [run]", "initial: must be text or null, got ['run']"),
        ("initial: true", "initial: must be text or null, got True"),
        ("seed: !!float x", "not readable as YAML (could not convert string to float: 'x')"),
        ("seed: !!int ''", "not readable as YAML (string index out of range)"),
        ("seed: !!timestamp x", "not readable as YAML ("),
        ("times: &a {gap: *a}", "nested too deeply, or a mapping that is a part of itself"),
        ("a: &a {b: {c: *a}}", "nested too deeply, or a mapping that is a part of itself"),
        ("seed: " + "[" * 3_000, "nested too deeply, or a mapping that is a part of itself"),
    ],
)
def test_values_that_no_option_takes(
    text: str, message: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "odd.yaml").write_text(text)
    assert refused([*TRAIN, "--config=odd.yaml"], made, capsys).startswith(f"odd.yaml: {message}")


def test_long_values_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    """A line of two thousand characters, and how many there would be."""
    assert main([*TRAIN, f"--training.steps={'9a' * 5_000}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"9a9a … \(100\d\d characters\)$", line)
    assert len(line) < 2_100


def test_a_table_that_is_none_is_told_once(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`datasets` logs the error that it raises."""
    (made / "table.parquet").write_bytes(b"no table")
    assert main([*FOLDER, "--data.path=table.parquet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("tvmatch: error: data.path: table.parquet")


@pytest.mark.parametrize("command", ["info", "sample", "evaluate"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: network.update(depth=2**70), "not a model description of this version (a depth of"),
        (lambda network: network.update(depth=10**6), "not a model description of this version (a depth of"),
        (lambda network: network.update(depth="DEEP"), "not readable as JSON (nested too deeply)"),
    ],
)
def test_descriptions_of_what_has_no_end(
    command: str,
    change: Callable[[dict[str, Any]], object],
    message: str,
    made: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A network that would take hours to build, and brackets that are deeper than the stack."""
    file = newest(made / "run") / "model.json"
    description = json.loads(file.read_text())
    change(description["network"])
    file.write_text(json.dumps(description).replace('"DEEP"', "[" * 3_000 + "]" * 3_000))
    assert message in refused(COMMANDS[command], made, capsys)


def test_a_folder_without_permission(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not for the superuser, who may write anywhere: a folder that is a file stands for it above."""
    locked = made / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        (locked / "letter.txt").write_text("")
        assert refused([*TRAIN, "--out", "locked"], made, capsys).startswith("out: locked is not an empty")
    else:
        assert refused([*TRAIN, "--out", "locked/run"], made, capsys) == "locked/run: Permission denied"


# Checkpoints

COMMANDS: dict[str, list[str]] = {
    "info": ["info", "run"],
    "sample": ["sample", "run"],
    "evaluate": ["evaluate", "run"],
    "resume": ["train", "--resume", "run"],
}
WEIGHTS = ["model.safetensors", "training.safetensors"]


def files_of(command: str) -> list[str]:
    """What a command reads of a checkpoint."""
    model = ["model.json", "model.safetensors"]
    return [*model, "training.json", "training.safetensors"] if command == "resume" else model


@pytest.mark.parametrize("command", COMMANDS)
def test_truncated_checkpoints(command: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At any length: nothing, within the header, within the tensors, one byte short; and missing."""
    for name in files_of(command):
        file = newest(made / "run") / name
        whole = file.read_bytes()
        for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1 - name.endswith("json")):
            file.write_bytes(whole[:length])
            line = refused(COMMANDS[command], made, capsys)
            assert line.startswith(f"run/checkpoints/step_0000004/{name}: "), (length, line)
        if name not in ("model.json", "training.json"):  # without these it is no checkpoint at all
            file.unlink()
            assert refused(COMMANDS[command], made, capsys).endswith(f"{name}: missing")
        file.write_bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_foreign_checkpoints(command: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program's files under our names: a pickle, random bytes, other JSON, a newer format."""
    pickle = made / "weights.pt"
    torch.save({"a": torch.zeros(3)}, pickle)
    foreign: dict[str, list[bytes]] = {
        "safetensors": [pickle.read_bytes(), os.urandom(500), b"", b"{}"],
        "json": [b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": "tvmatch-model-99"}', pickle.read_bytes()],
    }
    pickle.unlink()
    for name in files_of(command):
        file = newest(made / "run") / name
        whole = file.read_bytes()
        for content in foreign[name.partition(".")[2]]:
            file.write_bytes(content)
            line = refused(COMMANDS[command], made, capsys)
            assert line.startswith(f"run/checkpoints/step_0000004/{name}: "), line
        file.write_bytes(whole)


def spoiled(file: Path) -> Iterator[str]:
    """A weights file with a tensor too few, too many, of another shape, another type; then whole again."""
    tensors = load_file(file)
    whole = file.read_bytes()
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    wider = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])
    for changed in (rest, rest | {name: wider}, rest | {name: tensors[name].double()}):
        save_file(changed, file)
        yield name
    file.write_bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_mismatched_checkpoints(command: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in WEIGHTS if command == "resume" else WEIGHTS[:1]:
        file = newest(made / "run") / name
        for tensor in spoiled(file):
            line = refused(COMMANDS[command], made, capsys)
            assert line.startswith(f"run/checkpoints/step_0000004/{name}: "), line
            assert tensor.partition("/")[2] in line or tensor in line
    file = newest(made / "run") / "model.safetensors"
    save_file(load_file(file) | {"surplus": torch.zeros(1)}, file)
    assert "unexpected tensors ['surplus']" in refused(COMMANDS[command], made, capsys)


def test_weights_of_another_model(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and description that do not belong together."""
    weights = newest(made / "points") / "model.safetensors"
    (newest(made / "run") / "model.safetensors").write_bytes(weights.read_bytes())
    for command in COMMANDS.values():
        assert "model.safetensors: missing tensors [" in refused(command, made, capsys)


def test_training_facts_that_are_wrong(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = newest(made / "run") / "training.json"
    facts = json.loads(file.read_text())
    for key, value in (("step", None), ("step", "four"), ("seconds", []), ("build", 3)):
        file.write_text(json.dumps(facts | {key: value}))
        assert refused(COMMANDS["resume"], made, capsys) == f"{file.relative_to(made)}: incomplete"
    del facts["step"]
    file.write_text(json.dumps(facts))
    assert refused(COMMANDS["resume"], made, capsys) == f"{file.relative_to(made)}: incomplete"


def test_optimiser_moments_that_are_missing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = newest(made / "run") / "training.safetensors"
    for group in ("exp_avg", "exp_avg_sq", "target", "network"):
        tensors = load_file(file)
        whole = file.read_bytes()
        save_file({name: x for name, x in tensors.items() if not name.startswith(f"{group}/")}, file)
        line = refused(COMMANDS["resume"], made, capsys)
        assert line.startswith("run/checkpoints/step_0000004/training.safetensors: ")
        file.write_bytes(whole)
    assert main(COMMANDS["info"]) == 0


# A full disk


def limited(size: int, arguments: list[str]) -> int:
    """A command that cannot write files of more than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_while_training(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The former checkpoint stays whole and is named, and the run goes on once there is room."""
    before = tree(made / "run" / "checkpoints")
    size = (newest(made / "run") / "training.safetensors").stat().st_size
    assert limited(size // 2, COMMANDS["resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("tvmatch: error: run/checkpoints/step_000000")
    assert "cannot be saved" in line
    assert line.endswith("the last good checkpoint is run/checkpoints/step_0000004")
    assert tree(made / "run" / "checkpoints") == before
    assert tvmatch.load("run").step == 4
    assert Trainer(*resumable(made), resume=made / "run").run().step == 8


def resumable(made: Path) -> tuple[Any, Any, Path]:
    config = tvmatch.recipe("digits")
    small = tiny_config()
    config.network, config.training, config.objective = small.network, small.training, small.objective
    return config, config.data.load(), made / "run"


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a"])
def test_disk_full_while_sampling(out: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the file, and no part of it is left."""
    before = tree(made)
    assert limited(60, ["sample", "run", "--count=9", "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tvmatch: error: {out}.partial/settings.json: File too large"
    assert tree(made) == before


def test_the_runs_own_figures_are_replaced(made: Path) -> None:
    """By whatever name they are given."""
    own = made / "points" / "metrics.json"
    for out in ([], ["--out=points/metrics.json"], [f"--out={own}"]):
        own.write_text("{}")
        assert main(["evaluate", "points", "--samples=9", "--steps=1", *out]) == 0
        assert json.loads(own.read_text())["dataset"] == "moons"


def test_disk_full_while_evaluating(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former figures stay."""
    (made / "points" / "metrics.json").write_text("{}")
    before = tree(made)
    assert limited(60, ["evaluate", "points", "--samples=9", "--steps=1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == ("tvmatch: error: points/metrics.json: File too large")
    assert tree(made) == before


# From Python


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.full((2, 1, 4, 4), float("nan")), {}, "values: element 0 holds a number that is not finite"),
        (torch.tensor([0.0, float("inf")]).view(2, 1), {}, "values: element 1 holds a number that is not"),
        (torch.rand(2, 1, 4, 4) + 1, {}, "values: pixels must lie in"),
        (torch.rand(0, 1, 4, 4), {}, "values: there are no elements"),
        (torch.rand(2, 4, 4), {}, "values: must be"),
        (torch.rand(2, 1, 4, 4), {"labels": [0]}, "labels: there must be one for each of the 2"),
        (torch.rand(2, 1, 4, 4), {"labels": [0, 2], "class_names": ["a", "b"]}, "labels: 2 is outside 0 … 1"),
    ],
)
def test_tensors(values: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        TensorDataset(values, **options)


def test_images_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    odd = TensorDataset(torch.rand(9, 1, 5, 4))
    with pytest.raises(InputError, match=r"network\.patch_size: 2 does not divide the image size 5×4"):
        tvmatch.train(tiny_config(), odd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_mistakes_from_python(made: Path) -> None:
    model = tvmatch.load("run")
    for mistake, message in (
        (lambda: model.sample(labels=[11]), "labels: 11 is outside"),
        (lambda: model.sample(labels="cat"), "labels: no class is named 'cat'"),
        (lambda: model.sample(steps=0), "steps: must be at least 1"),
        (lambda: model.sample(guidance=3.0), "guidance: this model was trained at the one weight 1, got 3"),
        (lambda: tvmatch.load("photos"), "photos: no checkpoint here"),
        (lambda: tvmatch.train(tiny_config(), images(), "run"), "out: run holds another run"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            mistake()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--out=a\0b"], "an option cannot contain the character 0"),
        (["sample", "run", f"--guidance={'9' * 400}"], "too large"),
        (["recipes", "\0"], "an option cannot contain the character 0"),
    ],
)
def test_values_beyond_what_paths_and_numbers_hold(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
