"""Image data sets: pixels, labels, splits, the cache, and every mistake told in one line."""

import logging
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tvmatch.data import DataSpec, ImagesData, epoch_indices
from tvmatch.data.images import rows as images
from tvmatch.data.images import source as image_source
from tvmatch.data.images.dataset import ImageDataset
from tvmatch.data.images.pixels import centre_box, decode
from tvmatch.errors import InputError

SIZE = 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven noise images in the class folders `cat` (4) and `dog` (3), and a file that is no image."""
    root = tmp_path / "images"
    for number in range(7):
        save(root / ("cat" if number < 4 else "dog") / f"{number}.png", noise(number))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_text("no image either")
    return root


def noise(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def encoded(path: Path) -> dict[str, Any]:
    """An image as the Hub's Parquet files hold it."""
    return {"bytes": path.read_bytes(), "path": None}


def load(path: Path | str, **options: Any) -> ImageDataset:
    return ImagesData(str(path), **({"resolution": SIZE, "workers": 1} | options)).load()


def everything(dataset: ImageDataset) -> dict[tuple[float, ...], int]:
    """All images, as tuples of pixels, with their labels (−1 without)."""
    values, labels, *_ = dataset.take(len(dataset), seed=0)
    numbers = [-1] * len(values) if labels is None else labels.tolist()
    return dict(zip(map(tuple, values.flatten(1).tolist()), numbers, strict=True))


def as_tensor(pixels: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def key(number: int) -> tuple[float, ...]:
    return tuple(as_tensor(noise(number)).flatten().tolist())


# --- pixels ---


def test_images_of_the_wanted_size_keep_their_pixels_and_folder_names_are_classes(folder: Path) -> None:
    dataset = load(folder, label_column="label")
    half = (0.5, 0.5, 0.5)
    assert dataset.spec == DataSpec("image", (3, SIZE, SIZE), ("cat", "dog"), mean=half, std=half)
    assert everything(dataset) == {key(number): int(number >= 4) for number in range(7)}
    assert dataset.skipped == 0


def test_without_a_label_column_there_are_no_classes(folder: Path) -> None:
    dataset = load(folder)
    assert dataset.spec.class_names is None
    assert dataset.take(3, 0).labels is None
    assert everything(dataset) == {key(number): -1 for number in range(7)}


@pytest.mark.parametrize(
    ("size", "wanted", "box"),
    [
        ((10, 10), (4, 4), (0, 0, 10, 10)),
        ((10, 6), (4, 4), (2, 0, 8, 6)),
        ((6, 10), (4, 4), (0, 2, 6, 8)),
        ((7, 4), (4, 4), (1, 0, 5, 4)),  # an odd margin: whole pixels, no shift by half a one
        ((10, 10), (8, 4), (0, 2, 10, 7)),
        ((8, 4), (8, 4), (0, 0, 8, 4)),
        ((1, 100), (64, 1), (0, 49, 1, 50)),
    ],
)
def test_centre_box(size: tuple[int, int], wanted: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert centre_box(*size, *wanted) == box


def test_only_the_centre_of_an_oblong_image_is_kept(tmp_path: Path) -> None:
    """Red margins left and right of a green square; none of the red is left, at any size."""
    pixels = np.zeros((12, 20, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[:, 4:16] = (0, 255, 0)
    save(tmp_path / "images" / "0.png", pixels)
    for resolution in (12, 6, 24):
        values = load(tmp_path / "images", resolution=resolution).take(1, 0).values
        assert torch.equal(
            values[0], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, resolution, resolution)
        )


def test_rectangles_are_height_by_width(tmp_path: Path) -> None:
    """The upper half white: rows stay rows."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    save(tmp_path / "images" / "0.png", pixels)
    dataset = load(tmp_path / "images", resolution=(8, 4))
    assert dataset.spec.shape == (3, 8, 4)
    image = dataset.take(1, 0).values[0]
    # The filter reaches two source pixels at each side of the edge: rows 3 and 4 may be mixed.
    assert torch.equal(image[:, :3], torch.ones(3, 3, 4))
    assert torch.equal(image[:, 5:], torch.zeros(3, 3, 4))


def test_shrinking_averages_instead_of_picking_pixels(tmp_path: Path) -> None:
    """Noise of variance σ² shrunk eightfold: picking pixels keeps σ², an average of about 64 leaves σ²/64."""
    path = save(tmp_path / "noise.png", noise(0, 128, 128))
    large, small = (decode(path.read_bytes(), size, size, 3).astype(float) for size in (128, 16))
    assert abs(small.mean() - large.mean()) < 1
    assert small.std() < large.std() / 4


GREY_RAMP = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 7
TRANSPARENT = np.dstack([noise(1), np.where(GREY_RAMP > 100, 255, 0).astype(np.uint8)])
TRANSPARENT_SEEN = np.where(GREY_RAMP[..., None] > 100, noise(1), 255)


@pytest.mark.parametrize(
    ("image", "suffix", "rgb"),
    [
        pytest.param(Image.fromarray(GREY_RAMP), "png", GREY_RAMP, id="grey"),
        pytest.param(Image.fromarray(GREY_RAMP > 100), "png", (GREY_RAMP > 100) * 255, id="one bit"),
        pytest.param(
            Image.fromarray(GREY_RAMP).convert("P"), "png", GREY_RAMP, id="palette"
        ),  # Pillow's grey palette
        pytest.param(Image.fromarray(TRANSPARENT), "png", TRANSPARENT_SEEN, id="RGBA"),
        pytest.param(
            Image.merge("LA", [Image.fromarray(GREY_RAMP), Image.fromarray(TRANSPARENT[..., 3])]),
            "png",
            np.where(GREY_RAMP > 100, GREY_RAMP, 255),
            id="grey with alpha",
        ),
        pytest.param(Image.fromarray(GREY_RAMP.astype(np.uint16) * 257), "png", GREY_RAMP, id="16-bit"),
        pytest.param(Image.fromarray(GREY_RAMP.astype(np.uint16) * 257), "tiff", GREY_RAMP, id="16-bit TIFF"),
        pytest.param(Image.fromarray(noise(1)).convert("CMYK"), "tiff", noise(1), id="CMYK"),
    ],
)
def test_every_kind_of_pixel_is_seen_as_a_viewer_shows_it(
    tmp_path: Path, image: Image.Image, suffix: str, rgb: np.ndarray[Any, Any]
) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    seen = decode(path.read_bytes(), SIZE, SIZE, 3)
    expected = np.broadcast_to(rgb if rgb.ndim == 3 else rgb[..., None], (SIZE, SIZE, 3))
    np.testing.assert_array_equal(seen.transpose(1, 2, 0), expected)
    assert decode(str(path), SIZE, SIZE, 1).shape == (1, SIZE, SIZE)


def test_a_transparent_palette_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "0.png", transparency=0)
    seen = decode((tmp_path / "0.png").read_bytes(), 2, 2, 3)
    assert seen.transpose(1, 2, 0).tolist() == [[[255] * 3, [40, 50, 60]], [[255] * 3, [255] * 3]]


def test_grey_is_the_luma_of_colour(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0.png", noise(0))
    dataset = load(tmp_path / "images", channels=1)
    assert dataset.spec.shape == (1, SIZE, SIZE)
    luma = (
        torch.from_numpy(noise(0)).double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    ) / 255
    # Half a grey level of rounding, and Pillow's 16-bit weights.
    torch.testing.assert_close(dataset.take(1, 0).values[0, 0].double(), luma, rtol=0, atol=0.51 / 255)


def test_the_camera_s_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: rotate by a quarter clockwise to see it upright
    path = tmp_path / "0.png"
    Image.fromarray(noise(0)).save(path, exif=exif)
    np.testing.assert_array_equal(
        decode(path.read_bytes(), SIZE, SIZE, 3).transpose(1, 2, 0), np.rot90(noise(0), k=-1)
    )


# --- batches ---


def test_an_epoch_holds_every_image_once_with_its_label(folder: Path) -> None:
    dataset = load(folder, label_column="label")
    order = epoch_indices(7, 0, 7, seed=4)
    values, labels, *_ = dataset.batch(step=0, size=7, seed=4)
    assert labels is not None
    assert (values.dtype, labels.dtype) == (torch.float32, torch.int64)
    in_file_order = torch.stack([as_tensor(noise(number)) for number in range(7)])
    assert torch.equal(values, in_file_order[order])
    assert torch.equal(labels, (order >= 4).long())


def test_training_images_are_mirrored_and_taken_ones_are_not(folder: Path) -> None:
    dataset = load(folder, horizontal_flip=True)
    plain = load(folder)
    steps = range(10)
    mirrored = 0
    for step in steps:
        got, original = (each.batch(step, 7, seed=0).values for each in (dataset, plain))
        flipped = (got == original.flip(-1)).flatten(1).all(1)
        assert (flipped ^ (got == original).flatten(1).all(1)).all()
        mirrored += int(flipped.sum())
    # Five standard deviations of a binomial of 70 and 1/2.
    assert abs(mirrored - 35) < 21
    assert everything(dataset) == everything(plain)


def test_take_is_limited_to_what_there_is(folder: Path) -> None:
    with pytest.raises(InputError, match="8 elements were asked for, the data set has 7"):
        load(folder).take(8, seed=0)


def test_a_pickled_copy_gives_the_same_batches(folder: Path) -> None:
    dataset = load(folder, label_column="label", horizontal_flip=True)
    ours, theirs = dataset.batch(2, 5, 1), pickle.loads(pickle.dumps(dataset)).batch(2, 5, 1)
    assert ours.labels is not None
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.labels, theirs.labels)


# --- Parquet, Arrow and labels ---


def table(
    tmp_path: Path, columns: dict[str, list[Any]], features: datasets.Features | None = None
) -> datasets.Dataset:
    """Three noise images in the column `image`, beside further columns."""
    content = [encoded(save(tmp_path / "png" / f"{number}.png", noise(number))) for number in range(3)]
    return datasets.Dataset.from_dict({"image": content, **columns}, features=features)


@pytest.mark.parametrize(
    ("labels", "feature", "names", "numbers"),
    [
        ([1, 0, 1], datasets.ClassLabel(names=["yes", "no", "never"]), ("yes", "no", "never"), [1, 0, 1]),
        (["dog", "ant", "dog"], datasets.Value("string"), ("ant", "dog"), [1, 0, 1]),
        ([2, 0, 2], datasets.Value("int64"), ("0", "1", "2"), [2, 0, 2]),
        ([2, 0, 2], datasets.Value("uint8"), ("0", "1", "2"), [2, 0, 2]),
    ],
)
@pytest.mark.parametrize(
    "image_feature", [datasets.Image(), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}]
)
def test_labels_of_a_parquet_file(
    tmp_path: Path,
    labels: list[Any],
    feature: Any,
    names: tuple[str, ...],
    numbers: list[int],
    image_feature: Any,
) -> None:
    features = datasets.Features({"image": image_feature, "kind": feature})
    table(tmp_path, {"kind": labels}, features).to_parquet(tmp_path / "some.parquet")
    dataset = load(tmp_path / "some.parquet", label_column="kind")
    assert dataset.spec.class_names == names
    assert everything(dataset) == {key(number): label for number, label in enumerate(numbers)}


def test_a_folder_of_arrow_files_and_raw_bytes(tmp_path: Path) -> None:
    content = [save(tmp_path / "png" / f"{number}.png", noise(number)).read_bytes() for number in range(3)]
    datasets.Dataset.from_dict({"picture": content}).save_to_disk(tmp_path / "arrow")
    dataset = load(tmp_path / "arrow", image_column="picture")
    assert everything(dataset) == {key(number): -1 for number in range(3)}


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, -1, 1], datasets.Value("int64"), "holds -1"),
        ([0, -1, 1], datasets.ClassLabel(num_classes=2), r"holds -1, classes are numbers 0 … 1"),
        ([0, 10**9, 1], datasets.Value("int64"), "holds 1000000000"),
        (["a", None, "b"], datasets.Value("string"), "rows without a label"),
        ([0.0, 1.0, 2.0], datasets.Value("float32"), "names or whole numbers, not float32"),
        ([[0], [1], [2]], datasets.List(datasets.Value("int64")), "names or whole numbers"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[Any], feature: Any, message: str) -> None:
    features = datasets.Features({"image": datasets.Image(), "kind": feature})
    table(tmp_path, {"kind": labels}, features).to_parquet(tmp_path / "some.parquet")
    with pytest.raises(InputError, match=f"data.label_column: 'kind' .*{message}"):
        load(tmp_path / "some.parquet", label_column="kind")


def test_missing_and_doubtful_columns_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    rows = table(tmp_path, {"kind": [0, 1, 2]}, features)
    rows.to_parquet(tmp_path / "one.parquet")
    rows.add_column("mask", rows.cast_column("image", datasets.Image(decode=False))["image"][:]).to_parquet(
        tmp_path / "two.parquet"
    )
    for name, options, message in [
        ("one", {"label_column": "label"}, "data.label_column: .*'label'; the columns are image, kind"),
        ("one", {"image_column": "img"}, "data.image_column: .*'img'; the columns are image, kind"),
        ("one", {"image_column": "kind"}, "data.image_column: 'kind' of .*one.parquet does not hold images"),
        ("two", {}, "data.image_column: .*two.parquet .* 2 seem to; the columns are image, kind, mask"),
    ]:
        with pytest.raises(InputError, match=message):
            load(tmp_path / f"{name}.parquet", **options)
    assert len(load(tmp_path / "two.parquet", image_column="mask")) == 3


def test_links_to_folders_and_files_are_followed(tmp_path: Path, folder: Path) -> None:
    linked = tmp_path / "linked [1]*"  # and a name that is a pattern
    linked.mkdir()
    (linked / "animal").symlink_to(folder / "dog")
    (linked / "others").mkdir()
    (linked / "others" / "a.png").symlink_to(folder / "cat" / "0.png")
    dataset = load(linked, label_column="label")
    assert dataset.spec.class_names == ("animal", "others")
    assert everything(dataset) == {key(4): 0, key(5): 0, key(6): 0, key(0): 1}


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    (folder / "cat" / "lost.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(InputError, match=r"data.path: .*lost\.png"):
        load(folder)


def test_labels_of_a_description_file(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "images" / "pictures" / f"{number}.png", noise(number))
    lines = ["file_name,animal", "pictures/0.png,dog", "pictures/1.png,ant", "pictures/2.png,dog"]
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(lines))
    dataset = load(tmp_path / "images", label_column="animal")
    assert dataset.spec.class_names == ("ant", "dog")
    assert everything(dataset) == {key(0): 1, key(1): 0, key(2): 1}


# --- splits ---


def test_split_folders_are_splits(tmp_path: Path) -> None:
    for number, place in enumerate(["training/a", "training/b", "val/a", "val/b", "test/a", "test/b"]):
        save(tmp_path / "images" / place / "0.png", noise(number))
    for split, first in [("train", 0), ("validation", 2), ("test", 4)]:
        dataset = load(tmp_path / "images", split=split, label_column="label")
        assert dataset.spec.class_names == ("a", "b")
        assert everything(dataset) == {key(first): 0, key(first + 1): 1}


def test_a_class_called_train_is_not_a_split(tmp_path: Path) -> None:
    for number, place in enumerate(["bus", "train"]):
        save(tmp_path / "images" / place / f"test {number}.png", noise(number))
    dataset = load(tmp_path / "images", label_column="label")
    assert dataset.spec.class_names == ("bus", "train")
    assert everything(dataset) == {key(0): 0, key(1): 1}


def test_splits_beside_other_images_are_refused(tmp_path: Path) -> None:
    for place in ("train", "test", "more"):
        save(tmp_path / "images" / place / "0.png", noise(0))
    with pytest.raises(InputError, match=r"data.path: .*splits \(test, train\) and also .*more"):
        load(tmp_path / "images")


def test_parquet_files_named_like_splits(tmp_path: Path) -> None:
    rows = table(tmp_path, {})
    for name, row in [("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)]:
        rows.select([row]).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "data" / f"{name}.parquet"
        )
    assert everything(load(tmp_path / "data")) == {key(0): -1, key(1): -1}
    assert everything(load(tmp_path / "data", split="test")) == {key(2): -1}
    assert everything(load(tmp_path / "data", split="train[1:]")) == {key(1): -1}


# --- bad images ---


def test_a_bad_image_stops_and_is_named(folder: Path) -> None:
    whole = (folder / "dog" / "5.png").read_bytes()
    (folder / "dog" / "5.png").write_bytes(whole[: len(whole) // 2])
    for workers in (1, 2):
        with pytest.raises(
            InputError, match=r"dog/5\.png: not a readable image .*on_bad_image=skip"
        ) as caught:
            load(folder, workers=workers)
        assert "\n" not in str(caught.value)


def test_bad_images_can_be_skipped_and_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cat" / "1.png").write_bytes(b"no image")
    (folder / "dog" / "5.png").write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = load(folder, label_column="label", on_bad_image="skip", workers=2)
        assert dataset.skipped == 2
        assert len(dataset) == 5
        assert everything(dataset) == {key(number): int(number >= 4) for number in (0, 2, 3, 4, 6)}
        (record,) = [record for record in caplog.records if record.name.startswith("tvmatch")]
        assert f"skipped 2 of 7 images of {folder}" in record.getMessage()
        assert "cat/1.png" in record.getMessage()
    with pytest.raises(InputError, match=r"cat/1\.png"):  # skipping them once does not accept them for ever
        load(folder, label_column="label")


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 1 images .*0\.png"):
        load(tmp_path / "images", on_bad_image="skip")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, workers: int) -> None:
    rows = table(tmp_path, {}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "data" / "a.parquet")
    content = [*rows.cast_column("image", datasets.Image(decode=False))["image"]]
    content[1] = {"bytes": b"no image", "path": None}
    broken = datasets.Dataset.from_dict({"image": content}, features=rows.features)
    broken.to_parquet(tmp_path / "data" / "b.parquet")
    with pytest.raises(InputError, match=r"row 4 of .*data, split train: not an image"):
        load(tmp_path / "data", workers=workers)
    content[1] = None
    missing = datasets.Dataset.from_dict({"image": content}, features=rows.features)
    missing.to_parquet(tmp_path / "data" / "b.parquet")
    with pytest.raises(InputError, match=r"row 4 of .*data, split train: there is no image"):
        load(tmp_path / "data", workers=workers)


def test_pixels_without_a_defined_white_are_bad(tmp_path: Path) -> None:
    greys = (70_000, np.int32), (200, np.int32), (257 * 200, np.int32), (np.nan, np.float32), (1, np.float32)
    for number, (level, kind) in enumerate(greys):
        pixels = np.full((4, 4), level, kind)
        path = save(tmp_path / str(number) / "0.tiff", pixels)
        with pytest.raises(InputError, match=r"0\.tiff: not a readable image \(pixels .* not supported: "):
            load(path.parent)


# --- the cache ---


def test_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def counting(*arguments: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(images, "decode", counting)
    first = everything(load(folder))
    assert len(decoded) == 7
    for workers in (1, 2):
        assert everything(load(folder, workers=workers)) == first
    assert len(decoded) == 7
    load(folder, channels=1)
    assert len(decoded) == 14
    save(folder / "cat" / "0.png", noise(99))
    assert key(99) in everything(load(folder))


def test_two_processes_prepare_the_same_as_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = load(folder, label_column="label").batch(0, 7, 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other cache")
    together = load(folder, label_column="label", workers=2).batch(0, 7, 0)
    assert torch.equal(alone.values, together.values)
    assert alone.labels is not None
    assert together.labels is not None
    assert torch.equal(alone.labels, together.labels)


def test_the_environment_stays_the_same_object(folder: Path) -> None:
    """`datasets` replaces it by a copy, in which libraries that keep the first one see no change."""
    environment = os.environ
    load(folder, workers=2)
    assert os.environ is environment


def test_a_full_disk_is_told_and_leaves_nothing_half_done(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the list of paths, but not for 7 images of 3 · 64 · 64 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"prepared images cannot be written to .*cache .*HF_HOME"):
            load(folder, resolution=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load(folder, resolution=64).take(7, seed=0).values) == 7


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_full_disk_is_not_blamed_on_the_data(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `datasets` copies them; before it begins; and where the cache may not be written."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = folder
    if kind == "parquet":
        source = tmp_path / "rows.parquet"
        pixels = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.rglob("*.png"))]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = datasets.Dataset.from_dict({"image": pixels, "label": [0] * len(pixels)}, features=features)
        rows.to_parquet(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(
            InputError,
            match=r"^the (data set|list of images) cannot be written to .*cache \(.*too large.*HF_HO",
        ):
            load(source, label_column=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if kind == "parquet":  # `datasets` looks at the disk before it copies tables
        with monkeypatch.context() as patch:
            patch.setattr("datasets.builder.has_sufficient_disk_space", lambda *_, **__: False)
            with pytest.raises(
                InputError, match=r"^the data set cannot be written to .*\(Not enough disk space"
            ):
                load(source, label_column=None)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        InputError, match=r"^the (data set|list of images) cannot be written to .*file/cache \(.*Not a dir"
    ):
        load(source, label_column=None)


# --- sources that are not there, or not readable ---


@pytest.mark.parametrize(
    "name", ["junk.parquet", "short.parquet", "zeros.parquet", "empty.parquet", "junk.arrow"]
)
def test_unreadable_tables_are_named(tmp_path: Path, name: str) -> None:
    rows = table(tmp_path, {}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    content = {
        "short.parquet": whole[:-20],
        "zeros.parquet": whole[:4] + bytes(len(whole) - 1004) + whole[-1000:],  # a footer, but no pages
        "empty.parquet": b"",
    }
    (tmp_path / name).write_bytes(content.get(name, b"junk"))
    with pytest.raises(InputError, match=f"data.path: .*{name}") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_without_rows(tmp_path: Path) -> None:
    rows = table(tmp_path, {}).cast_column("image", datasets.Image())
    rows.select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"data.split: 'train' of .*none\.parquet holds no rows"):
        load(tmp_path / "none.parquet")


def test_unusable_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one.png", noise(0))
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).write_bytes(b"")
    expected = {
        "": "data.path: give a folder",
        "missing": "data.path: .*missing does not exist",
        "empty": "data.path: .*empty holds no images",
        "one.png": "data.path: .*one.png must be a folder",
        ".": r"data.path: .*must be .*\['.arrow', '.parquet'\]",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message):
            load(tmp_path / name if name else "")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", r"'test' of .*\['train'\]"),
        ("train[:x]", r"must be .*, got 'train\[:x\]'"),
        ("train[2:2]", r"'train\[2:2\]' of .* holds no rows"),
    ],
)
def test_splits_that_are_not_there(folder: Path, split: str, message: str) -> None:
    with pytest.raises(InputError, match=f"data.split: {message}"):
        load(folder, split=split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "data.resolution: .* got 0"),
        ({"resolution": (8, -8)}, "data.resolution: .*-8"),
        ({"resolution": (8,)}, "data.resolution: .*8"),
        ({"channels": 4}, "data.channels: .* got 4"),
        ({"workers": 0}, "data.workers: .* got 0"),
        ({"on_bad_image": "ignore"}, "data.on_bad_image: .* got 'ignore'"),
    ],
)
def test_options_out_of_range(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(folder, **options)


class HubWithoutDatasets(BaseHTTPRequestHandler):
    """Answers every question as the Hub does for a data set that does not exist."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), HubWithoutDatasets)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["somebody/something", "something", "csv"])
def test_a_name_that_the_hub_does_not_know(hub: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)
    with pytest.raises(
        InputError,
        match=f"data.path: '{name}' is neither a local path nor a data set on the Hugging Face Hub$",
    ):
        load(name)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # the port of `discard`: closed
    with pytest.raises(
        InputError, match=r"'some/thing' is neither .* that can be reached \(.*\); HF_HUB_OFFLINE=1"
    ) as caught:
        load("some/thing")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(image_source, "dataset_commit", None)  # offline, not even one question is asked
    with pytest.raises(InputError, match=r"data.path: some/thing could not be read"):
        load("some/thing")
