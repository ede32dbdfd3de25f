"""ZIPs with `dataset.json`, ImageNet's layout, Dhariwal's crop, and the reader for encoding."""

import io
import json
import math
import multiprocessing
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import PHOTOGRAPHS
from numpy.typing import NDArray
from PIL import Image

from tvmatch.data import ImagesData
from tvmatch.data.images import rows as images
from tvmatch.data.images.dataset import ImageDataset
from tvmatch.data.images.pixels import decode, dhariwal_crop
from tvmatch.data.images.reader import ImageReader, open_images
from tvmatch.errors import InputError

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def photographs(count: int) -> list[Path]:
    """Every class in turn, so that labels are not in the order of the files."""
    return [PHOTOGRAPHS / kind / f"{number:02}.jpg" for number in range(16) for kind in classes()][:count]


def classes() -> list[str]:
    return sorted(folder.name for folder in PHOTOGRAPHS.iterdir())


def png(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).save(file, "png")
    return file.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """Whole, as uint8 (3, H, W)."""
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def pack(
    path: Path, files: dict[str, bytes], labels: Any = None, *, described: bool = True, deflated: bool = False
) -> Path:
    """A ZIP of these files, with `dataset.json` unless `described` is off."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if described:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def edm(
    count: int, encode: Callable[[Path], bytes] = Path.read_bytes, suffix: str = "jpg"
) -> dict[str, bytes]:
    return {
        f"{number // 4:05}/img{number:08}.{suffix}": encode(path)
        for number, path in enumerate(photographs(count))
    }


def labelled(files: dict[str, bytes]) -> list[list[Any]]:
    return [[name, number % 4] for number, name in enumerate(files)]


def load(path: Path, **options: Any) -> ImageDataset:
    return ImagesData(str(path), **({"resolution": SIZE, "workers": 1} | options)).load()


def reader(path: Path, split: str = "train", label_column: str | None = "label") -> ImageReader:
    return open_images(str(path), split, label_column=label_column)


def in_order(dataset: ImageDataset) -> tuple[NDArray[np.uint8], list[int] | None]:
    """All pixels and labels in the order of the rows."""
    values, labels, *_ = dataset._select(torch.arange(len(dataset)))
    return (values * 255).round().byte().numpy(), None if labels is None else labels.tolist()


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- ZIP and folder with dataset.json ---


@pytest.mark.parametrize("deflated", [False, True])
def test_a_zip_holds_the_images_and_labels_that_its_description_tells(tmp_path: Path, deflated: bool) -> None:
    files = edm(10)
    path = pack(tmp_path / "a.zip", files, labelled(files)[::-1], deflated=deflated)
    dataset = load(path, label_column="label")
    assert dataset.spec.class_names == ("0", "1", "2", "3")
    pixels, labels = in_order(dataset)
    assert labels == [number % 4 for number in range(10)]
    expected = [decode(file.read_bytes(), SIZE, SIZE, 3) for file in photographs(10)]
    np.testing.assert_array_equal(pixels, expected)
    assert not list(tmp_path.rglob("*.jpg")), "nothing is unpacked"


def test_png_and_both_orders_of_npy_are_the_same_pixels(tmp_path: Path) -> None:
    kinds: dict[str, Callable[[Path], bytes]] = {
        "png": png,
        "npy": lambda path: npy(pixels_of(path)),
        "npy, channels last": lambda path: npy(pixels_of(path).transpose(1, 2, 0)),
        "npy, Fortran's order": lambda path: npy(np.asfortranarray(pixels_of(path))),
    }
    found = []
    for kind, encode in kinds.items():
        path = pack(tmp_path / f"{kind}.zip", edm(4, encode, kind[:3]))
        found.append(in_order(load(path, resolution=64))[0])
    expected = np.stack([pixels_of(path) for path in photographs(4)])
    for pixels in found:
        np.testing.assert_array_equal(pixels, expected)


def test_grey_npy_has_one_channel_or_none(tmp_path: Path) -> None:
    grey = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    files = {"0.npy": npy(grey), "1.npy": npy(grey[None]), "2.npy": npy(grey[..., None])}
    pixels, _ = in_order(load(pack(tmp_path / "grey.zip", files), channels=1))
    np.testing.assert_array_equal(pixels, np.broadcast_to(grey, (3, 1, SIZE, SIZE)))


@pytest.mark.parametrize("suffix", ["jpg", "npy"])
def test_an_unpacked_zip_is_the_same_data_set(tmp_path: Path, suffix: str) -> None:
    encode: Callable[[Path], bytes] = (
        Path.read_bytes if suffix == "jpg" else lambda path: npy(pixels_of(path))
    )
    files = edm(9, encode, suffix)
    path = pack(tmp_path / "a.zip", files, labelled(files))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "a")
    packed, unpacked = (in_order(load(place, label_column="label")) for place in (path, tmp_path / "a"))
    np.testing.assert_array_equal(packed[0], unpacked[0])
    assert packed[1] == unpacked[1] == [number % 4 for number in range(9)]


def test_slices_of_a_zip(tmp_path: Path) -> None:
    files = edm(8)
    path = pack(tmp_path / "a.zip", files, labelled(files))
    for split, rows in {"train[2:5]": range(2, 5), "train[75%:]": range(6, 8), "train[-1:]": [7]}.items():
        source = reader(path, split)
        assert [source.label(index) for index in range(len(source))] == [row % 4 for row in rows]
    with pytest.raises(InputError, match=r"data.split: 'test' of .*a\.zip: .*train"):
        load(path, split="test")
    with pytest.raises(InputError, match=r"data.split: 'train\[3:3\]' of .*a\.zip holds no rows"):
        load(path, split="train[3:3]")


def test_other_files_and_duplicates_in_a_zip(tmp_path: Path) -> None:
    """A text, a hidden file and what macOS adds are no images; of a name given twice the last counts."""
    first, second, third = (path.read_bytes() for path in photographs(3))
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [("0.jpg", first), ("notes.txt", b"x"), (".1.jpg", first), ("a/b/c.JPG", third)]:
            archive.writestr(name, content)
        archive.writestr("__MACOSX/._0.jpg", b"no image")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("0.jpg", second)
    source = reader(path, label_column=None)
    assert [source.name(index) for index in range(len(source))] == [f"{path}/0.jpg", f"{path}/a/b/c.JPG"]
    np.testing.assert_array_equal(source.pixels(0, 64), decode(second, 64, 64, 3))


def test_no_labels_are_told_only_if_they_are_wanted(tmp_path: Path) -> None:
    files = edm(3)
    for name, options in {"null": {}, "none": {"described": False}}.items():
        path = pack(tmp_path / f"{name}.zip", files, **options)
        assert load(path).spec.class_names is None
        with pytest.raises(InputError, match=rf"{name}\.zip is a data set without labels; dataset\.json"):
            load(path, label_column="label")
    some = pack(tmp_path / "some.zip", files, labelled(files)[:2])
    with pytest.raises(InputError, match="'label' has rows without a label"):
        load(some, label_column="label")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"{", "is not readable JSON"),
        (b"\xff\xfe\x00", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[1]", r'must be \{"labels"'),
        (b'{"label": null}', r'must be \{"labels"'),
        (b'{"labels": 5}', r'must be \{"labels"'),
        (b'{"labels": [["0.jpg"]]}', r'must be \{"labels".*, got \[.0.jpg.\]'),
        (b'{"labels": [[0, 0]]}', r'must be \{"labels"'),
        (b'{"labels": [["1.jpg", 0]]}', "names '1.jpg', which is missing"),
        (b'{"labels": [["../../etc/passwd", 0]]}', "names '../../etc/passwd', which is missing"),
        (b'{"labels": [["0.jpg", -1]]}', r"class of '0.jpg' must be a number 0 … 99999, got -1"),
        (b'{"labels": [["0.jpg", 100000]]}', "got 100000"),
        (b'{"labels": [["0.jpg", 1e3]]}', "got 1000.0"),
        (b'{"labels": [["0.jpg", true]]}', "got True"),
        (b'{"labels": [["0.jpg", "3"]]}', "got '3'"),
        (b'{"labels": [["0.jpg", [0.1, 0.9]]]}', r"got \[0.1, 0.9\]"),
        (b'{"labels": [["0.jpg", 1' + b"0" * 5000 + b"]]}", "is not readable JSON"),
        (b'{"labels": [["a\\nb\\ud800", 1]]}', r"names 'a\\nb\\ud800'"),
    ],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_descriptions_that_are_wrong(
    tmp_path: Path, description: bytes, message: str, unpacked: bool
) -> None:
    files = {"0.jpg": photographs(1)[0].read_bytes(), "dataset.json": description}
    path = pack(tmp_path / "a.zip", files, described=False)
    if unpacked:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "a")
        path = tmp_path / "a"
    with pytest.raises(InputError, match=rf"data.path: dataset.json of {path}.*{message}") as caught:
        load(path, label_column="label")
    one_line(caught)


def test_a_changed_zip_is_prepared_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counting(*arguments: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(images, "decode", counting)
    files = edm(5)
    path = pack(tmp_path / "a.zip", files, labelled(files))
    load(path, label_column="label")
    load(path, label_column="label")
    assert len(decoded) == 5
    load(path, label_column="label", crop="dhariwal")
    assert len(decoded) == 10, "the crop is part of the key"
    before = reader(path).fingerprint
    names = list(files)
    files[names[0]] = files[names[3]]  # another image; a replacement by renaming, as programs do
    pack(tmp_path / "b.zip", files, [[name, 0] for name in names]).replace(path)
    pixels, labels = in_order(load(path, label_column="label"))
    assert labels == [0] * 5
    np.testing.assert_array_equal(pixels[0], pixels[3])
    assert reader(path).fingerprint != before


# --- hostile and damaged files in a ZIP ---


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def npy_header(header: str, version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


BAD_IMAGES = {
    "PNG bomb": (png_claiming(60_000, 60_000), r"not a readable image \(.*bomb"),
    "no image": (b"text", "not an image"),
    "empty": (b"", "there is no image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "PostScript"),
    "10 GB of NPY": (
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 100000, 33334), }") + bytes(100),
        "takes 10000200000 bytes, there are 100",
    ),
    "overflowing NPY": (
        npy_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': (3, {2**62}, {2**62}), }}"),
        "bytes, there are 0",
    ),
    "negative NPY": (
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (3, -1, 8), }") + bytes(24),
        r"\(3, -1, 8\)",
    ),
    "pickled NPY": (
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")
        + b"cos\nsystem\n(S'false'\ntR.",
        "holds neither pixels nor latents",
    ),
    "code in NPY": (npy_header("__import__('os').getcwd()"), "not a readable image"),
    "deep NPY": (npy_header("(" * 9000 + ")" * 900, version=2), "not a readable image"),
    "huge header of NPY": (
        npy_header("{'descr': '|u1'," + " " * 20_000 + "}", version=2),
        "not a readable image",
    ),
    "NPY of an unknown version": (b"\x93NUMPY\x09\x00" + bytes(50), "not a readable image"),
    "cut NPY": (npy(np.zeros((3, 8, 8), np.uint8))[:-1], "takes 192 bytes, there are 191"),
    "cut header of NPY": (npy(np.zeros((3, 8, 8), np.uint8))[:40], "not a readable image"),
    "complex NPY": (npy(np.zeros((3, 8, 8), complex)), "holds neither"),
    "16-bit NPY": (npy(np.zeros((3, 8, 8), np.uint16)), "must be uint8, not uint16"),
    "NPY of five channels": (npy(np.zeros((5, 8, 8), np.uint8)), r"C = 1 or 3, not \(5, 8, 8\)"),
    "NPY without pixels": (npy(np.zeros((3, 0, 8), np.uint8)), "no pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_in_a_zip_is_one_line_or_left_out(tmp_path: Path, kind: str) -> None:
    content, message = BAD_IMAGES[kind]
    suffix = "npy" if "NPY" in kind else "png"
    files = {"0.jpg": photographs(1)[0].read_bytes(), f"1.{suffix}": content}
    path = pack(tmp_path / "a.zip", files, [["0.jpg", 1], [f"1.{suffix}", 0]])
    with pytest.raises(InputError, match=rf"a\.zip/1\.{suffix}: .*{message}.*on_bad_image=skip") as caught:
        load(path)
    one_line(caught)
    dataset = load(path, on_bad_image="skip", label_column="label")
    assert (len(dataset), dataset.skipped, in_order(dataset)[1]) == (1, 1, [1])
    source = reader(path)
    with pytest.raises(InputError, match=rf"a\.zip/1\.{suffix}: .*{message}") as caught:
        source.pixels(1, SIZE)
    one_line(caught)
    assert source.pixels(0, SIZE).shape == (3, SIZE, SIZE)


def test_a_line_break_in_a_name_stays_in_the_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.zip/a\\nb\.png: not an image") as caught:
        load(pack(tmp_path / "a.zip", {"a\nb.png": b"text"}))
    one_line(caught)


def test_a_wrong_check_sum_is_a_bad_image(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", edm(3, lambda path: npy(pixels_of(path)), "npy"))
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 1000] ^= 1  # one bit of one pixel of the first image
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"img00000000\.npy: .*check sum is wrong"):
        load(path)
    assert len(load(path, on_bad_image="skip")) == 2


def test_claims_of_a_directory_are_not_believed(tmp_path: Path) -> None:
    """A member that claims 4 GB, one that unpacks to more than it claims, and a packing that is unknown."""
    path = pack(
        tmp_path / "a.zip", {"0.npy": npy(np.zeros((3, 64, 64), np.uint8))}, deflated=True, described=False
    )
    whole = path.read_bytes()
    entry = whole.index(b"PK\1\2")
    for offset, value, message in [
        (24, struct.pack("<I", 2**32 - 2), "claims 4294967294 bytes"),
        (20, struct.pack("<I", 2**32 - 2), "claims 4294967294 bytes"),
        (24, struct.pack("<I", 100), "length or check sum"),
        (10, struct.pack("<H", 12), "not supported"),
        (8, struct.pack("<H", 1), "encryption"),
    ]:
        path.write_bytes(whole[: entry + offset] + value + whole[entry + offset + len(value) :])
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        one_line(caught)


def test_every_truncation_of_a_zip_is_one_line(tmp_path: Path) -> None:
    files = edm(6)
    whole = pack(tmp_path / "whole.zip", files, labelled(files)).read_bytes()
    path = tmp_path / "cut.zip"
    for percent in range(100):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(InputError, match=r"data.path: .*cut\.zip is not a readable ZIP file") as caught:
            load(path, label_column="label")
        one_line(caught)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    files = {f"{number}.npy": npy(np.full((3, 4, 4), 9 * number, np.uint8)) for number in range(3)}
    path = pack(tmp_path / "a.zip", files, [[name, 2 - number] for number, name in enumerate(files)])
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found: Any
    try:
        source = reader(path)
        found = [(source.label(row), int(source.pixels(row, 4).max())) for row in range(len(source))]
    except InputError as error:
        found = str(error).count("\n")
    assert found in ([(2, 0), (1, 9), (0, 18)], 0)


# --- latents in NPY ---


def latents(number: int, shape: tuple[int, ...] = (8, 4, 4)) -> NDArray[np.float32]:
    """Means and standard deviations, which are positive."""
    values = np.random.default_rng(number).normal(size=shape).astype(np.float32)
    values[len(values) // 2 :] = np.abs(values[len(values) // 2 :])
    return values


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_latents_are_read_as_they_are(tmp_path: Path, dtype: str, unpacked: bool) -> None:
    files = {f"{number}.npy": npy(latents(number).astype(dtype)) for number in range(3)}
    path = pack(tmp_path / "a.zip", files, [[name, number] for number, name in enumerate(files)])
    if unpacked:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "a")
        path = tmp_path / "a"
    source = reader(path)
    for number in range(3):
        moments = source.moments(number)
        assert moments is not None
        assert moments.dtype == np.dtype(np.float32)
        assert moments.flags.c_contiguous
        np.testing.assert_array_equal(moments, latents(number).astype(dtype).astype(np.float32))
        assert source.label(number) == number


def test_latents_are_no_pixels_and_pixels_no_latents(tmp_path: Path) -> None:
    """Latents are another kind of data, not bad images: they are not skipped."""
    path = pack(tmp_path / "a.zip", {"0.npy": npy(latents(0))})
    for skip in ("error", "skip"):
        with pytest.raises(
            InputError, match=r"0\.npy: holds latents \(float32 \(8, 4, 4\)\) and no pixels"
        ) as caught:
            load(path, on_bad_image=skip)
        one_line(caught)
    with pytest.raises(InputError, match="holds latents"):
        reader(path, label_column=None).pixels(0, SIZE)
    assert reader(pack(tmp_path / "b.zip", edm(2)), label_column=None).moments(1) is None
    pixels = pack(tmp_path / "c.zip", edm(2, lambda path: npy(pixels_of(path)), "npy"))
    assert reader(pixels, label_column=None).moments(1) is None


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (npy(latents(1, (8, 4, 6))), r"latents of shape \(8, 4, 6\), the first have \(8, 4, 4\)"),
        (npy(latents(1, (7, 4, 4))), r"\(2C, h, w\).* not float32 \(7, 4, 4\)"),
        (npy(np.full((8, 4, 4), np.nan, np.float32)), "not finite"),
        (npy(np.full((8, 4, 4), 1e300)), "not finite"),
        (npy(-np.ones((8, 4, 4), np.float32)), "negative standard deviations"),
        (npy(np.zeros((3, 4, 4), np.uint8)), "not uint8"),
        (photographs(1)[0].read_bytes(), "no latents"),
        (npy(latents(1))[:-1], "takes 512 bytes, there are 511"),
    ],
)
def test_latents_unlike_the_first_are_refused(tmp_path: Path, second: bytes, message: str) -> None:
    source = reader(pack(tmp_path / "a.zip", {"0.npy": npy(latents(0)), "1.npy": second}), label_column=None)
    assert source.moments(0) is not None
    with pytest.raises(InputError, match=rf"a\.zip/1\.npy: .*{message}") as caught:
        source.moments(1)
    one_line(caught)


def test_first_latents_that_are_wrong_are_told_of_as_latents(tmp_path: Path) -> None:
    """Such as means and logarithms of variances, which other codes keep."""
    path = pack(tmp_path / "a.zip", {"0.npy": npy(-np.ones((8, 4, 4), np.float32))})
    with pytest.raises(InputError, match=r"a\.zip/0\.npy: negative standard deviations"):
        reader(path, label_column=None).moments(0)


# --- ImageNet ---

WORDS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}
IDS = sorted(WORDS)
NAMES = ("tench", "crane (n02012849)", "crane (n03126707)", "maillot", "maillot, tank suit")
VALIDATION = [3, 0, 4, 4, 1, 2]  # classes of the validation images in the order of their numbers


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number + 1:08}.JPEG"


def imagenet(root: Path, *, flat: bool = True) -> Path:
    """Ten training images, two a class, six validation images and a test image; returns the inner folder."""
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    files = iter(photographs(17))
    for wordnet_id in IDS:
        for number in range(2):
            write(inner / "train" / wordnet_id / f"{wordnet_id}_{number}.JPEG", next(files).read_bytes())
    for number, label in enumerate(VALIDATION):
        place = "" if flat else IDS[label]
        write(inner / "val" / place / validation_name(number), next(files).read_bytes())
    write(inner / "test" / "ILSVRC2012_test_00000001.JPEG", next(files).read_bytes())
    return inner


def solution(labels: Sequence[int] = VALIDATION) -> str:
    lines = [f"{validation_name(number)[:-5]},{IDS[label]} 1 2 30 40 " for number, label in enumerate(labels)]
    return "\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n"


def mapping() -> str:
    return "".join(f"{wordnet_id} {words}\n" for wordnet_id, words in WORDS.items())


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_as_it_is_unpacked(tmp_path: Path, given: str) -> None:
    imagenet(tmp_path)
    write(tmp_path / "LOC_synset_mapping.txt", mapping())
    write(tmp_path / "LOC_val_solution.csv", solution())
    train = load(tmp_path / given, label_column="label")
    validation = load(tmp_path / given, label_column="label", split="validation")
    assert train.spec.class_names == validation.spec.class_names == NAMES
    assert in_order(train)[1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert in_order(validation)[1] == VALIDATION
    decoded = [decode(path.read_bytes(), SIZE, SIZE, 3) for path in photographs(17)]
    np.testing.assert_array_equal(in_order(train)[0], decoded[:10])
    np.testing.assert_array_equal(in_order(validation)[0], decoded[10:16])
    np.testing.assert_array_equal(in_order(load(tmp_path / given, split="test"))[0], decoded[16:])
    assert len(load(tmp_path / given, split="validation[:2]")) == 2
    with pytest.raises(
        InputError, match=r"data.split: 'best' of .*: ImageNet has train, validation, test here"
    ):
        load(tmp_path / given, split="best")


def test_names_of_classes_are_distinct_and_ids_without_a_mapping(tmp_path: Path) -> None:
    inner = imagenet(tmp_path, flat=False)
    for split in ("train", "validation"):
        assert reader(inner, split).class_names == tuple(IDS)
    write(inner / "LOC_synset_mapping.txt", mapping())
    for split in ("train", "validation"):
        assert reader(inner, split).class_names == NAMES


def test_validation_images_in_class_folders(tmp_path: Path) -> None:
    source = reader(imagenet(tmp_path, flat=False), "validation")
    found = {Path(source.name(row)).name: source.label(row) for row in range(len(source))}
    assert found == {validation_name(number): label for number, label in enumerate(VALIDATION)}


def test_validation_alone(tmp_path: Path) -> None:
    """Without the training images the classes are those of the mapping."""
    inner = imagenet(tmp_path)
    (inner / "train").rename(tmp_path / "elsewhere")
    write(tmp_path / "LOC_val_solution.csv", solution())
    write(tmp_path / "LOC_synset_mapping.txt", "n00000001 first\n" + mapping())
    source = reader(tmp_path, "validation")
    assert source.class_names == ("first", *NAMES)
    assert [source.label(row) for row in range(len(source))] == [label + 1 for label in VALIDATION]
    with pytest.raises(InputError, match=r"data.split: 'train' of .*: ImageNet has validation, test here"):
        reader(tmp_path, "train")


def test_missing_and_wrong_answers_are_named(tmp_path: Path) -> None:
    inner = imagenet(tmp_path)
    assert load(inner, split="validation").spec.class_names is None
    cases: list[tuple[str, str, str]] = [
        ("", "", "data.label_column: .* is a data set without labels; .* no LOC_val_solution.csv"),
        ("LOC_val_solution.csv", solution(VALIDATION[:5]), r"val_00000006\.JPEG is of no known class"),
        ("LOC_val_solution.csv", "x\n", r"LOC_val_solution\.csv must have lines like .* got 'x'"),
        ("LOC_val_solution.csv", "", r"LOC_val_solution\.csv must have lines like"),
        ("LOC_val_solution.csv", "ImageId,P\na,b,c\n", r"got 'a,b,c'"),
        (
            "LOC_val_solution.csv",
            solution().replace(IDS[3], "n99999999"),
            "class 'n99999999', which is none of the 5",
        ),
        ("LOC_synset_mapping.txt", "tench\n", "LOC_synset_mapping.txt must have lines like"),
    ]
    for name, content, message in cases:
        if name:
            write(inner / name, content)
        if name == "LOC_synset_mapping.txt":
            write(inner / "LOC_val_solution.csv", solution())
        with pytest.raises(InputError, match=message) as caught:
            load(inner, split="validation", label_column="label")
        one_line(caught)


def test_other_folders_with_train_and_val_are_not_imagenet(tmp_path: Path) -> None:
    """Tiny ImageNet keeps its images a folder deeper, and has other answers."""
    for name in ("train/n01440764/images/a.JPEG", "val/images/val_0.JPEG"):
        write(tmp_path / "tiny" / name, photographs(1)[0].read_bytes())
    assert len(load(tmp_path / "tiny", split="validation")) == 1
    assert load(tmp_path / "tiny", label_column=None).spec.class_names is None


def test_a_changed_image_or_answer_changes_the_fingerprint(tmp_path: Path) -> None:
    inner = imagenet(tmp_path)
    write(tmp_path / "LOC_val_solution.csv", solution())
    found = [reader(inner, "train").fingerprint, reader(inner, "validation").fingerprint]
    write(tmp_path / "LOC_val_solution.csv", solution([0] * 6))
    found.append(reader(inner, "validation").fingerprint)
    write(inner / "val" / validation_name(2), photographs(1)[0].read_bytes() + b"more")
    found.append(reader(inner, "validation").fingerprint)
    assert len(set(found)) == 4
    assert reader(inner, "train").fingerprint == found[0]


# --- Dhariwal's crop ---


def resample(values: NDArray[np.float64], size: int, kind: str) -> NDArray[np.float64]:
    """Rows of `values` to `size` rows, in float64.

    Each is a mean of the old ones, weighted by the distance of their centres from its own; where that
    shrinks, the filter is stretched by the step.
    """
    step = len(values) / size
    wide = max(step, 1.0)
    distance = (np.arange(len(values)) + 0.5 - (np.arange(size)[:, None] + 0.5) * step) / wide
    if kind == "box":
        weights = ((distance > -0.5) & (distance <= 0.5)).astype(np.float64)
    else:  # Keys' cubic convolution with a = −1/2
        x = np.abs(distance)
        inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.tensordot(weights, values, axes=1), 0, 255)


def oracle(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """(H, W, 3) → (size, size, 3), never rounded."""

    def both(values: NDArray[np.float64], height: int, width: int, kind: str) -> NDArray[np.float64]:
        across = resample(values.swapaxes(0, 1), width, kind).swapaxes(0, 1)
        return resample(across, height, kind)

    values = pixels.astype(np.float64)
    while min(values.shape[:2]) >= 2 * size:
        values = both(values, values.shape[0] // 2, values.shape[1] // 2, "box")
    height, width = values.shape[:2]
    shorter = min(height, width)
    values = both(values, round(height * size / shorter), round(width * size / shorter), "bicubic")
    top, left = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (64, 64, 16),
        (64, 64, 20),
        (63, 45, 16),
        (45, 64, 22),
        (30, 64, 16),
        (33, 64, 16),
        (20, 37, 48),
        (64, 17, 64),
    ],
)
def test_dhariwal_s_crop_is_what_the_formula_says(height: int, width: int, size: int) -> None:
    pixels = pixels_of(photographs(2)[1]).transpose(1, 2, 0)[:height, :width]
    seen = np.asarray(dhariwal_crop(Image.fromarray(pixels), size)).astype(np.float64)
    expected = oracle(pixels, size)
    # Half a level of rounding after each of two passes; weights of a pass sum in magnitude to 1.25 at most
    # (cubic), 1 (box), so a resize adds at most 0.5 (1 + 1.25) and carries on 1.25² times what was there.
    halvings = max(math.floor(math.log2(min(height, width) / size)), 0)
    assert np.abs(seen - expected).max() <= 1.125 + 1.5625 * halvings
    # Rounding errors average out, but for ties, which go up: half of all means of two pixels, in two passes.
    assert -0.1 < (seen - expected).mean() < 0.1 + 0.5 * halvings


def test_dhariwal_s_crop_differs_from_the_mere_one() -> None:
    """So that the tests above could not pass by comparing one with itself."""
    file = photographs(1)[0].read_bytes()
    both = [decode(file, 20, 20, 3, crop).astype(int) for crop in ("centre", "dhariwal")]
    assert np.abs(both[0] - both[1]).max() > 5


def test_an_image_of_the_size_keeps_its_pixels() -> None:
    path = photographs(1)[0]
    np.testing.assert_array_equal(decode(path.read_bytes(), 64, 64, 3, "dhariwal"), pixels_of(path))


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_a_board_of_two_greys_is_their_mean(halvings: int) -> None:
    """100 and 200 alternate: after one halving all is 150, exactly."""
    rows, columns = np.indices((8 * 2**halvings, 9 * 2**halvings))
    board = np.where((rows + columns) % 2, 100, 200).astype(np.uint8)
    seen = dhariwal_crop(Image.fromarray(board), 8)
    np.testing.assert_array_equal(np.asarray(seen), np.full((8, 8), 150))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40), st.integers(0, 255))
def test_any_size_gives_a_square_and_a_constant_stays_one(
    height: int, width: int, size: int, grey: int
) -> None:
    seen = np.asarray(dhariwal_crop(Image.new("L", (width, height), grey), size))
    np.testing.assert_array_equal(seen, np.full((size, size), grey))


def test_the_centre_is_kept() -> None:
    """Dark beyond the middle square: none of it is left, but for the reach of the filter at the edges."""
    pixels = np.zeros((32, 96), np.uint8)
    pixels[:, 32:64] = 255
    seen = np.asarray(dhariwal_crop(Image.fromarray(pixels), 16))
    assert (seen[:, 1:-1] == 255).all()
    assert (seen[:, [0, -1]] > 200).all()


def test_crops_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.crop: dhariwal makes squares only, got a resolution of 8×4"):
        load(PHOTOGRAPHS, resolution=(8, 4), crop="dhariwal")
    with pytest.raises(InputError, match=r"data.crop: must be centre or dhariwal, got 'left'"):
        load(PHOTOGRAPHS, crop="left")
    with pytest.raises(InputError, match=r"data.crop: dhariwal makes squares only"):
        reader(PHOTOGRAPHS).pixels(0, (8, 4), "dhariwal")
    (tmp_path / "images").mkdir()
    Image.new("1", (50_000, 1)).save(tmp_path / "images" / "0.png")
    with pytest.raises(InputError, match=r"0\.png: .*proportions of 50000 to 1 are not supported"):
        load(tmp_path / "images", crop="dhariwal", resolution=64)


# --- the reader ---


def as_parquet(folder: Path, feature: Any, labels: list[Any]) -> Path:
    content = [{"bytes": path.read_bytes(), "path": None} for path in photographs(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "kind": feature})
    path = folder / "some.parquet"
    datasets.Dataset.from_dict({"picture": content, "kind": labels}, features=features).to_parquet(path)
    return path


def test_the_reader_gives_what_training_sees(tmp_path: Path) -> None:
    files = edm(8)
    root = imagenet(tmp_path / "net", flat=False)
    parquet = as_parquet(tmp_path, datasets.Value("string"), ["dog", "ant", "dog"])
    sources: list[tuple[Path, str, str]] = [
        (PHOTOGRAPHS, "train", "label"),
        (pack(tmp_path / "a.zip", files, labelled(files)), "train", "label"),
        (root, "validation", "label"),
        (parquet, "train", "kind"),
    ]
    for path, split, column in sources:
        for crop in ("centre", "dhariwal"):
            dataset = load(path, split=split, label_column=column, crop=crop)
            source = open_images(str(path), split, label_column=column)
            pixels, labels = in_order(dataset)
            assert (len(source), source.class_names) == (len(dataset), dataset.spec.class_names)
            assert [source.label(row) for row in range(len(source))] == labels
            for row in range(len(source)):
                seen = source.pixels(row, SIZE, crop)
                assert (seen.shape, seen.dtype) == ((3, SIZE, SIZE), np.dtype(np.uint8))
                np.testing.assert_array_equal(seen, pixels[row])
            assert source.pixels(0, (8, 12)).shape == (3, 8, 12)
            assert source.moments(0) is None


def test_a_table_s_own_column_called_place_is_just_a_column(tmp_path: Path) -> None:
    """The rows of a ZIP have a column of this name."""
    content = [{"bytes": path.read_bytes(), "path": None} for path in photographs(2)]
    features = datasets.Features({"image": datasets.Image(), "place": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": content, "place": ["Rome", "Oslo"]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    for labels in ("place", None):
        source = open_images(str(tmp_path / "a.parquet"), "train", label_column=labels)
        dataset = load(tmp_path / "a.parquet", label_column=labels)
        assert source.class_names == dataset.spec.class_names == (("Oslo", "Rome") if labels else None)
        np.testing.assert_array_equal(source.pixels(1, SIZE), in_order(dataset)[0][1])


def test_names_of_the_reader(tmp_path: Path) -> None:
    assert reader(PHOTOGRAPHS).name(17) == str(PHOTOGRAPHS / "cat" / "01.jpg")
    assert reader(imagenet(tmp_path)).name(2) == str(
        tmp_path / "ILSVRC/Data/CLS-LOC/train" / IDS[1] / f"{IDS[1]}_0.JPEG"
    )
    parquet = as_parquet(tmp_path, datasets.Value("int64"), [1, 0, 1])
    source = open_images(str(parquet), "train", label_column=None, image_column="picture")
    assert source.name(2) == f"row 2 of {parquet}, split train"
    assert (source.class_names, source.label(0)) == (None, None)


def test_the_reader_s_labels_of_every_kind(tmp_path: Path) -> None:
    kinds: list[tuple[Any, list[Any], tuple[str, ...], list[int]]] = [
        (datasets.ClassLabel(names=["yes", "no"]), [1, 0, 1], ("yes", "no"), [1, 0, 1]),
        (datasets.Value("large_string"), ["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (datasets.Value("uint8"), [2, 0, 2], ("0", "1", "2"), [2, 0, 2]),
    ]
    for feature, labels, names, numbers in kinds:
        path = as_parquet(tmp_path, feature, labels)
        for split, rows in {"train": numbers, "train[1:]": numbers[1:]}.items():
            source = open_images(str(path), split, label_column="kind")
            assert source.class_names == names
            assert [source.label(row) for row in range(len(source))] == rows


def test_what_the_reader_refuses(tmp_path: Path) -> None:
    write(tmp_path / "bad" / "0.png", b"no image")
    with pytest.raises(InputError, match=r"bad/0\.png: not an image") as caught:
        reader(tmp_path / "bad", label_column=None).pixels(0, SIZE)
    one_line(caught)
    for path, options, message in [
        (PHOTOGRAPHS, {"label_column": "kind"}, "data.label_column: there is no column 'kind'"),
        (
            PHOTOGRAPHS,
            {"label_column": None, "image_column": "x"},
            "data.image_column: there is no column 'x'",
        ),
        (tmp_path / "none", {"label_column": None}, "data.path: .* does not exist"),
        (pack(tmp_path / "empty.zip", {}), {"label_column": None}, "'train' of .*empty.zip holds no rows"),
        (write(tmp_path / "junk.zip", b"junk"), {"label_column": None}, "junk.zip is not a readable ZIP"),
    ]:
        with pytest.raises(InputError, match=message):
            open_images(str(path), "train", **options)  # type: ignore[arg-type]


def test_files_beyond_4_gigabytes(tmp_path: Path) -> None:
    """A ZIP behind 5 GB of nothing, which takes no room on the disk."""
    content = pack(tmp_path / "a.zip", edm(2)).read_bytes()
    with (tmp_path / "far.zip").open("wb") as file:
        file.seek(5 * 2**30)
        file.write(content)
    near, far = (reader(tmp_path / name, label_column=None) for name in ("a.zip", "far.zip"))
    np.testing.assert_array_equal(near.pixels(1, SIZE), far.pixels(1, SIZE))


def _row(source: ImageReader, row: int) -> NDArray[np.uint8]:
    return source.pixels(row, SIZE)


def test_the_reader_survives_pickling_and_forks(tmp_path: Path) -> None:
    """Forked after a first read, so that the open file is shared: reads do not disturb each other."""
    files = edm(32)
    for path in (pack(tmp_path / "a.zip", files), PHOTOGRAPHS):
        source = reader(path, label_column=None)
        expected = [source.pixels(row, SIZE) for row in range(32)]
        copy = pickle.loads(pickle.dumps(source))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            rows = [row for row in range(32) for _ in range(4)]
            seen = pool.starmap(_row, [(copy, row) for row in rows], chunksize=1)
        np.testing.assert_array_equal(seen, [expected[row] for row in rows])


def test_the_reader_is_small(tmp_path: Path) -> None:
    """Rows stay on the disk: ten times the images add their labels, 4 bytes each, and nothing else."""
    content = npy(np.zeros((1, 2, 2), np.uint8))
    sizes = {}
    for count in (200, 2000):
        files = {f"{number:08}.npy": content for number in range(count)}
        path = pack(tmp_path / f"{count:05}.zip", files, [[name, 0] for name in files])
        sizes[count] = len(pickle.dumps(reader(path)))
    assert sizes[2000] - sizes[200] <= 4 * 1800 + 100  # and some bytes for longer numbers


def test_the_fingerprint_follows_files_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    for number, path in enumerate(photographs(4)):
        write(root / path.parent.name / f"{number}.jpg", path.read_bytes())
    files = edm(4)
    parquet = as_parquet(tmp_path, datasets.Value("int64"), [1, 0, 1])
    archive = pack(tmp_path / "a.zip", files)
    for path in (root, parquet, archive):
        first = reader(path, label_column=None).fingerprint
        assert reader(path, "train[:2]", label_column=None).fingerprint != first
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
        assert reader(path, label_column=None).fingerprint == first
    before = {path: reader(path, label_column=None).fingerprint for path in (root, parquet, archive)}
    write(root / "cat" / "1.jpg", photographs(6)[5].read_bytes())
    as_parquet(tmp_path, datasets.Value("int64"), [1, 1, 1])
    pack(archive, {name: content[::-1] for name, content in files.items()})
    for path, fingerprint in before.items():
        assert reader(path, label_column=None).fingerprint != fingerprint


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", write(tmp_path / "a file", "") / "cache")
    with pytest.raises(InputError, match=r"list of images cannot be written to .*a file/cache .*HF_HOME"):
        reader(pack(tmp_path / "a.zip", edm(2)), label_column=None)
