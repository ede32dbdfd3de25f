"""Numbers of classes: outside 0 … K − 1 they are refused, and classes without elements are said."""

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tvmatch.cli import main
from tvmatch.config import recipe
from tvmatch.data import Batch, DataSpec, ImagesData, TensorDataset
from tvmatch.data.base import checked_batch
from tvmatch.data.findings import LeftOut, Notes, lines_of_findings
from tvmatch.data.images.reader import open_images
from tvmatch.errors import InputError
from tvmatch.training import Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


class Own:
    """A user's data set: 4 images of 1×8×8 with these labels."""

    def __init__(self, labels: Any, names: tuple[str, ...] | None = ("ant", "bee", "cow")) -> None:
        self.spec = DataSpec("image", (1, 8, 8), names, mean=(0.5,), std=(0.5,))
        self.labels = labels

    def batch(self, step: int, size: int, seed: int) -> Batch:
        labels = None if self.labels is None else self.labels(step) if callable(self.labels) else self.labels
        return Batch(torch.rand(4, 1, 8, 8), labels)

    def take(self, count: int, seed: int) -> Batch:
        return self.batch(0, count, seed)


def trained(dataset: Own, out: Path, workers: int = 0) -> Trainer:
    config = recipe("digits")
    config.training.steps, config.training.batch_size, config.training.data_workers = 3, 4, workers
    config.training.sample_every = 0
    config.network = type(config.network)(hidden_size=16, depth=1, heads=2, patch_size=4, time_frequencies=4)
    trainer = Trainer(config, dataset, out, device="cpu")
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 2, 3, 3]), "labels must lie in 0 … 2, got 3; classes are numbered from 0"),
        (torch.tensor([0, 2, 3, 1]), "labels must lie in 0 … 2, got 3"),
        (torch.tensor([0, -1, 2, 1]), "labels must lie in 0 … 2, got -1"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), "labels must be a torch.int64 tensor .* got torch.float32"),
        (torch.tensor([True, False, True, True]), "labels must be a torch.int64 tensor .* got torch.bool"),
        (torch.tensor([[0], [1], [2], [1]]), r"labels must be .* got torch.int64 of shape \(4, 1\)"),
        (torch.tensor([0, 1, 2]), "3 labels for 4 elements"),
        (None, "spec has 3 classes, but none of its elements have labels"),
    ],
)
def test_labels_of_one_s_own_data_set_are_checked(
    tmp_path: Path, labels: Tensor | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"Own.batch: .*{message}") as caught:
        trained(Own(labels), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_every_batch_is_checked(tmp_path: Path) -> None:
    class Later(Own):
        def batch(self, step: int, size: int, seed: int) -> Batch:
            return Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 2 + (step == 2)]))

    with pytest.raises(InputError, match=r"labels must lie in 0 … 2, got 3$"):
        trained(Later(None), tmp_path / "run")


def test_labels_without_names_are_refused_and_right_ones_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spec has 0 classes, but some of its elements have labels"):
        trained(Own(torch.tensor([0, 0, 0, 0]), None), tmp_path / "none")
    assert trained(Own(torch.tensor([0, 1, 2, 0])), tmp_path / "right").state.step == 3


@given(st.lists(st.integers(-3, 6), min_size=1, max_size=8), st.integers(1, 5))
def test_labels_pass_if_and_only_if_they_are_classes(labels: list[int], count: int) -> None:
    spec = DataSpec("points", (2,), tuple(map(str, range(count))), mean=(0.0,) * 2, std=(1.0,) * 2)
    batch = Batch(torch.zeros(len(labels), 2), torch.tensor(labels))
    dataset = Own(None)
    dataset.spec = spec
    if set(labels) <= set(range(count)):
        assert checked_batch(batch, dataset, len(labels)) == batch
    else:
        with pytest.raises(InputError, match=f"labels must lie in 0 … {count - 1}"):
            checked_batch(batch, dataset, len(labels))


@pytest.mark.parametrize(
    "names", [range(2), (0, 1), ("a", 1), (b"a", b"b"), (None, "a"), "ab", np.array(["a", 1], object)]
)
def test_names_of_classes_must_be_text(names: Any) -> None:
    with pytest.raises(InputError, match="class names must be text"):
        DataSpec("image", (1, 8, 8), names, mean=(0.5,), std=(0.5,))
    if not isinstance(names, str):
        with pytest.raises(InputError, match="class names must be text"):
            TensorDataset(torch.rand(2, 1, 8, 8), [0, 1], class_names=names)


# --- what is said ---


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 3))
def test_exactly_the_classes_without_elements_are_named(labels: list[int], more: int) -> None:
    count = max(labels) + 1 + more
    names = tuple(map(str, range(count)))
    lines = lines_of_findings("there", len(labels), names, np.array(labels))
    lacking = [name for name in names if int(name) not in labels]
    said = [line for line in lines if "no images of" in line]
    assert len(said) == bool(lacking)
    for line in said:
        shown = line.partition("classes: ")[2].partition(";")[0].split(", ")
        assert shown in (lacking, [*lacking[:8], "…"])
        assert f"no images of {len(lacking)} of {count} classes" in line
        assert ("numbered from 0" in line) == (lacking == ["0"])


def test_findings_are_lines() -> None:
    left_out = LeftOut()
    for name in ("a\nb.txt", "c.txt"):
        left_out.add(".txt files", name)
    lines = lines_of_findings("x", 2, ("a\nb", "[c]"), np.array([0, 1]), Notes(left_out))
    assert lines == ("x: 2 images, 2 classes: a\\nb, [c]", "x: left out .txt files: 2 (a\\nb.txt, …)")


def table(name: str, labels: list[int], feature: Any) -> str:
    Image.new("RGB", (8, 8)).save("0.png")
    content = [{"bytes": Path("0.png").read_bytes(), "path": None}] * len(labels)
    kinds = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict({"image": content, "label": labels}, features=kinds).to_parquet(name)
    return name


def test_gaps_in_numbers_of_a_table_and_a_description_are_said() -> None:
    numbers = datasets.Value("int64")
    for name, labels, feature, line in [
        ("one.parquet", [1, 2, 3], numbers, "no images of 1 of 4 classes: 0; classes are numbered from 0"),
        ("gap.parquet", [0, 4, 2], numbers, "no images of 2 of 5 classes: 1, 3"),
        (
            "named.parquet",
            [0, 2],
            datasets.ClassLabel(names=["x", "y", "z"]),
            "no images of 1 of 3 classes: 1 (y)",
        ),
    ]:
        path = table(name, labels, feature)
        dataset = ImagesData(path, resolution=8, label_column="label", workers=1).load()
        source = open_images(path, "train", label_column="auto")
        assert dataset.findings == source.findings
        assert line in dataset.findings[1]
    with zipfile.ZipFile("a.zip", "w") as archive:
        for number in (1, 3):
            archive.write("0.png", f"{number}.png")
        archive.writestr("dataset.json", json.dumps({"labels": [["1.png", 1], ["3.png", 3]]}))
    dataset = ImagesData("a.zip", resolution=8, label_column="label", workers=1).load()
    assert "no images of 2 of 4 classes: 0, 2" in dataset.findings[1]


def test_gaps_of_tensors_are_said_when_training_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = TensorDataset(torch.rand(4, 1, 8, 8), [1, 2, 3, 3])
    trained(dataset, tmp_path / "run")  # type: ignore[arg-type]
    shown = "".join(capsys.readouterr())
    assert "data: 4 images, 4 classes: 0, 1, 2, 3" in shown
    assert "data: no images of 1 of 4 classes: 0; classes are numbered from 0" in shown


def test_auto_names_columns_that_hold_classes_under_other_names() -> None:
    table("a.parquet", [0, 1], datasets.Value("int64"))
    rows = datasets.load_dataset("parquet", data_files="a.parquet", split="train")
    for name, feature in [
        ("fine", datasets.ClassLabel(names=["a", "b"])),
        ("labels", datasets.Value("int64")),
    ]:
        rows.rename_column("label", name).cast_column(name, feature).to_parquet("b.parquet")
        with pytest.raises(InputError, match=f"no column label, but classes in {name}"):
            open_images("b.parquet", "train", label_column="auto")
        assert open_images("b.parquet", "train", label_column=name).class_names is not None
        assert open_images("b.parquet", "train", label_column=None).class_names is None
    # Of a type that no class is of, structs here: an error, not a data set without classes.
    structs = [{"first": 1, "second": None}] * 2
    rows.remove_columns("label").add_column("label", structs).to_parquet("d.parquet")
    with pytest.raises(InputError, match=r"'label' must hold names or whole numbers, not .*first"):
        ImagesData("d.parquet", resolution=8, label_column="auto", workers=1).load()
    rows.remove_columns("label").to_parquet("c.parquet")
    assert open_images("c.parquet", "train", label_column="auto").class_names is None


def test_train_says_what_it_found(tmp_path: Path) -> None:
    for name in ("cats/0.png", "cats/1.png", "[dogs]/0.png", "@eaDir/x.png"):
        Path("some", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(Path("some", name))
    Path("some/cats/notes.txt").write_text("")
    words = ["train", "image_folder", "--data.path", "some", "--data.resolution", "8", "--data.workers", "1"]
    words += [
        "--training.steps",
        "1",
        "--training.batch_size",
        "2",
        "--training.sample_every",
        "0",
        "--out",
        "run",
    ]
    words += [
        "--network.depth",
        "1",
        "--network.hidden_size",
        "16",
        "--network.heads",
        "2",
        "--device",
        "cpu",
    ]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert main(words) == 0, error.getvalue()
    shown = out.getvalue() + error.getvalue()
    assert "some, split train: 3 images, 2 classes: [dogs], cats" in shown
    assert "hidden files and folders, or the system's: 1 (@eaDir), .txt files: 1 (cats/notes.txt)" in shown
