"""Folders of images: which labels they have, what is left out and said, and what is refused in one line."""

import contextlib
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features
from pipelines import tiny_vae

from tvmatch.cli import main
from tvmatch.data import ImagesData
from tvmatch.data.images.dataset import ImageDataset
from tvmatch.data.images.folders.image_formats import image_suffixes
from tvmatch.data.images.reader import open_images
from tvmatch.data.latents.dataset import LatentDataset
from tvmatch.errors import InputError
from tvmatch.evaluation.references.loading import source_fingerprint
from tvmatch.evaluation.references.npz import NpzReader

FORMATS = {".jpg": "JPEG", ".JPEG": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".webp": "WEBP"}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    datasets.disable_progress_bars()
    yield tmp_path / "here"
    datasets.enable_progress_bars()


def mk(*names: str) -> None:
    """16×16 noise; "a/{0,1}.png" is two files."""
    for name in names:
        before, brace, rest = name.partition("{")
        if brace:
            choices, _, after = rest.partition("}")
            mk(*(before + choice + after for choice in choices.split(",")))
            continue
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        image = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(path, format=FORMATS.get(path.suffix, "PNG"))


def see(path: str, **options: Any) -> ImageDataset:
    return ImagesData(
        path=path, **({"resolution": 8, "label_column": "label", "workers": 1} | options)
    ).load()


def found(path: str, **options: Any) -> tuple[int, tuple[str, ...] | None]:
    dataset = see(path, **options)
    return len(dataset), dataset.spec.class_names


def labels_of(path: str, **options: Any) -> list[int] | None:
    """In the order of the rows."""
    labels = see(path, **options)._labels
    return None if labels is None else labels.tolist()


def refused(path: str, *words: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        see(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


class Encoded:
    """Of `tvmatch encode` with the tiny autoencoder into the folder `z`, and what it printed."""

    def __init__(self, vae: Path, path: str, *more: str) -> None:
        shutil.rmtree("z", ignore_errors=True)
        out, err = io.StringIO(), io.StringIO()
        words = ["encode", "--data", path, "--autoencoder", str(vae), "--resolution", "16", "--out", "z"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.code = main([*words, "--workers", "0", "--device", "cpu", *more])
        self.out, self.error = out.getvalue(), err.getvalue()

    @property
    def classes(self) -> tuple[int, tuple[str, ...] | None]:
        assert self.code == 0, self.error
        dataset = LatentDataset("z")
        return len(dataset), dataset.spec.class_names

    def refused(self, *words: str) -> None:
        assert self.code == 2
        assert self.error.count("\n") == 1
        assert self.error.startswith("tvmatch: error: ")
        for word in words:
            assert word in self.error


# --- where there are no classes, and where there seem to be some ---


def test_flat_splits_have_no_classes(vae: Path) -> None:
    mk("flat/train/{0,1,2}.png", "flat/test/{0,1}.png")
    refused("flat", "data.label_column: flat is a data set without labels", "no subfolders")
    dataset = see("flat", label_column="auto")
    assert (len(dataset), dataset.spec.class_names) == (3, None)
    assert dataset.findings == ("flat, split train: 3 images, no classes (its images lie in no subfolders)",)
    run = Encoded(vae, "flat")
    assert run.classes == (3, None)
    assert "3 images, no classes (its images lie in no subfolders)" in run.out
    Encoded(vae, "flat", "--label_column", "label").refused("label_column: flat is a data set without labels")


@pytest.mark.parametrize("stray", ["preview.png", "0.jpg", "a b [1].png"])
def test_an_image_above_its_class_is_named(vae: Path, stray: str) -> None:
    mk("stray/{cats,dogs}/{0,1}.png", f"stray/{stray}")
    Encoded(vae, "stray").refused(f"stray/{stray}", "first folder below", "label_column null")
    refused("stray", f"stray/{stray}", "data.label_column null")
    assert found("stray", label_column=None) == (5, None)
    assert Encoded(vae, "stray", "--label_column", "null").classes == (5, None)


def test_an_image_above_its_class_in_a_split_is_named(vae: Path) -> None:
    mk("stray/train/{cats,dogs}/deep/{0,1}.png", "stray/train/preview.png", "stray/val/0.png")
    Encoded(vae, "stray").refused("stray/train/preview.png has no class")
    Path("stray/train/preview.png").rename("stray/preview.png")
    refused("stray", "splits (train, validation) and also preview.png, which is in none of them")
    mk("net/train/n0000000{1,2}/0.JPEG", "net/train/stray.JPEG")
    refused("net", "net/train/stray.JPEG has no class")


@pytest.mark.parametrize(
    "test", ["test/{0,1}.png", "test/unknown/0.png", "test/{cats,birds}/0.png", "val/a/b/c/0.png"]
)
def test_classes_are_those_of_the_split(vae: Path, test: str) -> None:
    mk("some/train/{cats,dogs}/{0,1}.png", f"some/{test}")
    assert found("some") == (4, ("cats", "dogs"))
    assert labels_of("some") == [0, 0, 1, 1]
    assert Encoded(vae, "some").classes == (4, ("cats", "dogs"))


@pytest.mark.parametrize(
    "junk",
    [
        "@eaDir/",
        ".thumbnails/",
        "__MACOSX/",
        "lost+found/",
        ".ipynb_checkpoints/",
        "$RECYCLE.BIN/",
        "Thumbs.db",
        ".DS_Store",
        "desktop.ini",
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_what_systems_leave_behind_is_no_class(vae: Path, junk: str, empty: bool) -> None:
    """In ImageNet's layout, in a folder of classes, and in a class; also with an image in it."""
    mk("net/train/n0000000{1,2}/{0,1}.JPEG", "net/val/0.JPEG", "plain/{cats,dogs}/{0,1}.png")
    for root in ("net/train", "net/train/n00000001", "plain", "plain/cats"):
        path = Path(root, junk)
        if not junk.endswith("/"):
            path.write_bytes(b"")
        elif empty:
            path.mkdir()
        else:
            mk(f"{path}/0.png")
    assert found("net") == (4, ("n00000001", "n00000002"))
    dataset = see("plain")
    assert (len(dataset), dataset.spec.class_names) == (4, ("cats", "dogs"))
    assert "left out hidden files and folders" in dataset.findings[1]
    assert f": 2 ({junk.strip('/')}, …)" in dataset.findings[1]
    if junk == "@eaDir/":
        assert Encoded(vae, "net").classes == (4, ("n00000001", "n00000002"))


def test_the_first_folder_is_the_class(vae: Path) -> None:
    mk("tiny/train/n0000000{1,2}/images/{0,1}.JPEG", "tiny/val/images/0.JPEG")
    assert found("tiny") == (4, ("n00000001", "n00000002"))
    mk("breeds/cats/{persian,siamese}/0.png", "breeds/dogs/pug/0.png", "breeds/dogs/1.png")
    assert found("breeds") == (4, ("cats", "dogs"))
    assert labels_of("breeds") == [0, 0, 1, 1]
    run = Encoded(vae, "breeds")
    assert run.classes == (4, ("cats", "dogs"))
    assert "breeds, split train: 4 images, 2 classes: cats, dogs" in run.out
    mk("one/photos/a/b/c/{0,1}.png")
    assert found("one") == (2, ("photos",))


def test_folders_that_only_number_files_are_no_classes(vae: Path) -> None:
    mk("edm/0000{0,1}/img0000000{0,1}.png")
    assert Encoded(vae, "edm").classes == (4, None)
    refused("edm", "without labels; its folders are only numbered")
    mk("digits/{0,1}/img0.png")
    assert found("digits") == (2, ("0", "1"))


# --- formats ---


def test_formats_are_those_that_pillow_reads_by_itself() -> None:
    suffixes = image_suffixes()
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".bmp",
        ".gif",
        ".tif",
        ".ppm",
        ".webp",
        ".jp2",
        ".qoi",
        ".tga",
    } <= suffixes
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".mpg", ".mpeg", ".h5", ".svg", ".txt", ""} & suffixes


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_classes_of_every_format(vae: Path) -> None:
    mk(
        "some/cats/{0,1}.png",
        "some/dogs/{0,1}.jpg",
        "some/fox/{0,1}.avif",
        "some/owl/0.jp2",
        "some/pug/0.webp",
    )
    assert found("some") == (8, ("cats", "dogs", "fox", "owl", "pug"))
    Path("some/cats/2.heic").write_bytes(b"x")
    Path("some/cats/3.HEIC").write_bytes(b"x")
    Path("some/dogs/LICENSE").write_bytes(b"x")
    assert see("some").findings[1] == (
        "some, split train: left out .heic files: 2 (cats/2.heic, …), "
        "files without an ending: 1 (dogs/LICENSE)"
    )
    run = Encoded(vae, "some")
    assert run.classes == (8, ("cats", "dogs", "fox", "owl", "pug"))
    assert ".heic files: 2 (cats/2.heic, …)" in run.out


def test_a_class_without_images_is_an_error(vae: Path) -> None:
    mk("some/{cats,dogs}/0.png")
    Path("some/fox/inner").mkdir(parents=True)
    refused("some", "some/fox is empty", "data.label_column null")
    Encoded(vae, "some").refused("data: some/fox is empty", "label_column null")
    for name in ("0.heic", "1.heic", "b.eps"):
        Path("some/fox/inner", name).write_bytes(b"x")
    refused("some", "some/fox holds no images that can be read, but .eps (1), .heic (2)")
    assert found("some", label_column=None) == (2, None)
    mk("net/train/n0000000{1,2}/0.JPEG")
    Path("net/train/n00000003").mkdir()
    refused("net", "net/train/n00000003 is empty")
    mk("split/train/{a,b}/0.png", "split/test/{a,b}/0.png")
    Path("split/test/c").mkdir()
    assert found("split") == (2, ("a", "b"))
    refused("split", "split/test/c is empty", split="test")


def test_a_folder_without_readable_images_says_what_it_holds() -> None:
    Path("some/cats").mkdir(parents=True)
    for number in range(3):
        Path(f"some/cats/{number}.heic").write_bytes(b"x")
    refused("some", "some holds no images and no .parquet or .arrow files, but .heic (3)")


NAMES = [
    "std::vector",
    "ünïcødé 犬",
    "a [1]*?",
    "with space ",
    "#hash%20",
    "-x",
    "~",
    "zip:",
    "C:\\x",
    "file:::y",
    "'q\"",
    "0",
]


def test_names_of_all_kinds_are_classes(vae: Path) -> None:
    for name in NAMES:
        mk(f"some/{name}/{name}.png", f"some/{name}/inner::{name}/1.png")
    assert found("some") == (2 * len(NAMES), tuple(sorted(NAMES)))
    assert labels_of("some") == [number for number in range(len(NAMES)) for _ in range(2)]
    assert Encoded(vae, "some").classes == (2 * len(NAMES), tuple(sorted(NAMES)))


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "bell\x07", "line\u2028end"])
def test_names_that_cannot_be_printed_are_refused_in_one_line(vae: Path, name: str) -> None:
    mk(f"some/{name}/0.png", "some/b/0.png")
    refused("some", "cannot name a class")
    Encoded(vae, "some").refused("cannot name a class")
    assert found("some", label_column=None) == (2, None)


def test_names_that_are_not_in_utf_8_are_refused_in_one_line(vae: Path) -> None:
    mk("some/a/0.png", "some/b/0.png")
    os.rename(b"some/b", b"some/\xff\xfe")
    refused("some", "not in UTF-8")
    Encoded(vae, "some").refused("not in UTF-8")


# --- links ---


def test_links_in_a_circle_end(vae: Path) -> None:
    mk("loop/{0,1}.png")
    Path("loop/again").symlink_to(".")
    assert found("loop", label_column="auto") == (2, None)
    assert source_fingerprint("loop") is not None
    run = Encoded(vae, "loop")
    assert run.classes == (2, None)
    assert "left out links to a folder above: 1 (again)" in run.out
    mk("up/{a,b}/{0,1}.png")
    for name in ("a", "b"):
        Path("up", name, "up").symlink_to("..")
        Path("up", name, "root").symlink_to("/")
        Path("up", name, "self").symlink_to("self")
    assert found("up") == (4, ("a", "b"))
    assert source_fingerprint("up") is not None
    mk("splits/train/{a,b}/0.png", "splits/test/{a,b}/0.png")
    Path("splits/train/a/above").symlink_to("../..")
    assert found("splits") == (2, ("a", "b"))
    mk("net/train/n0000000{1,2}/0.JPEG")
    Path("net/train/n00000001/up").symlink_to("..")
    assert found("net") == (2, ("n00000001", "n00000002"))
    Path("edm").mkdir()
    mk("edm/00000/img00000000.png")
    Path("edm/00000/up").symlink_to("..")
    Path("edm/dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 0]]}))
    assert found("edm") == (1, ("0",))


@pytest.mark.parametrize(
    ("link", "target"), [("some/c", "a"), ("some/b/inner", "../a"), ("some/a/x/y", "../../b")]
)
def test_a_folder_of_two_classes_is_an_error_that_names_both(vae: Path, link: str, target: str) -> None:
    mk("some/{a,b}/{0,1}.png")
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(target)
    text = refused("some", link, "are one folder, of two classes")
    assert f"some/{target.strip('./')} " in text
    Encoded(vae, "some").refused("are one folder")
    assert found("some", label_column=None) == (4, None)


def test_a_folder_outside_under_two_classes_is_an_error() -> None:
    mk("pool/0.png", "some/a/1.png", "some/b/2.png")
    for name in ("a", "b"):
        Path("some", name, "more").symlink_to("../../pool")
    refused("some", "some/b/more and some/a/more are one folder")


def test_links_to_folders_are_followed_once() -> None:
    mk("pool/{cats,dogs}/{0,1}.png", "some/{x,y}/0.png", "some/x/inner/1.png")
    Path("some/cats").symlink_to("../pool/cats")
    Path("some/x/twice").symlink_to("inner")
    assert found("some") == (5, ("cats", "x", "y"))
    dataset = see("some")
    assert "folders linked a second time: 1 (x/twice)" in dataset.findings[1]
    mk("splits/train/{a,b}/0.png")
    Path("splits/val").symlink_to("train")
    for split in ("train", "validation", "val"):
        assert found("splits", split=split) == (2, ("a", "b"))


def test_links_to_nothing_are_said() -> None:
    mk("some/{cats,dogs}/0.png")
    Path("some/fox").symlink_to("gone")
    Path("some/owl").symlink_to("owl")
    assert see("some").findings[-1] == "some, split train: left out links to nothing: 2 (fox, …)"
    Path("some/cats/1.png").symlink_to("gone.png")
    refused("some", "some/cats/1.png: No such file or directory")


def test_what_is_neither_file_nor_folder_is_left_out() -> None:
    mk("some/a/0.png")
    os.mkfifo("some/a/1.png")
    assert "neither file nor folder: 1 (a/1.png)" in see("some").findings[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is locked for root")
def test_a_locked_folder_is_named() -> None:
    mk("some/{a,b}/0.png")
    Path("some/b").chmod(0)
    refused("some", "data.path: some/b: Permission denied")
    Path("some/b").chmod(0o700)


# --- splits ---

UNCLEAR = [
    ("train_set", "test_set"),
    ("train", "holdout"),
    ("trainset", "testset"),
    ("train2017", "val2017"),
    ("DIV2K_train_HR", "DIV2K_valid_HR"),
    ("Training Images", "held-out"),
    ("train", "extra"),
    ("trainval", "test"),
    ("dogs", "test"),
]


@pytest.mark.parametrize(("first", "second"), UNCLEAR)
def test_splits_of_other_names_are_refused_and_can_be_named(vae: Path, first: str, second: str) -> None:
    mk(f"some/{first}/{{a,b}}/0.png", f"some/{second}/{{a,b,c}}/0.png")
    text = refused("some", "data.path: some holds", "--data.split ", second)
    other = second if first in ("train", "dogs") else first
    assert f"--data.split {other}" in text or f"data.path some/{first}" in text
    Encoded(vae, "some").refused("data: some holds", "--split ")
    assert found(f"some/{first}") == (2, ("a", "b"))
    expected = (3, ("a", "b", "c")) if other == second else (2, ("a", "b"))
    assert found("some", split=other) == expected
    assert found("some", split=f"{other}[1:]")[0] == expected[0] - 1


def test_flat_splits_of_other_names_are_refused() -> None:
    for first, second in [("train", "holdout"), ("train_set", "test_set"), ("train", "unlabeled")]:
        root = f"{first}-{second}"
        mk(f"{root}/{first}/0.png", f"{root}/{second}/0.png")
        refused(root, "data.path: ", second, label_column=None)


def test_classes_that_are_called_like_splits_stay_classes() -> None:
    mk("vehicles/{bus,train,train_station,test_tube}/0.png")
    assert found("vehicles") == (4, ("bus", "test_tube", "train", "train_station"))
    mk("tickets/{valid,invalid}/0.png")
    assert found("tickets") == (2, ("invalid", "valid"))
    mk("more/{bullet_train,steam train,test_pattern,cat,dog}/0.png")
    assert len(see("more").spec.class_names or ()) == 5


def test_a_folder_without_images_beside_splits_is_no_split() -> None:
    mk("some/train/{a,b}/0.png", "some/test/{a,b}/0.png")
    Path("some/annotations").mkdir()
    Path("some/annotations/all.json").write_text("{}")
    assert found("some") == (2, ("a", "b"))


def test_two_folders_of_one_split_are_refused_if_it_is_wanted() -> None:
    mk("some/train/{a,b}/0.png", "some/val/{a,b}/0.png", "some/valid/c/0.png")
    assert found("some") == (2, ("a", "b"))
    refused("some", "data.split: 'validation' of some is both val and valid", split="validation")
    refused("some", "unknown split, should be one of ['train', 'validation']", split="test")


@pytest.mark.parametrize("root", ["some", "some/whole"])
def test_splits_below_classes_are_refused(root: str) -> None:
    mk(f"{root}/cats/{{train,test}}/{{0,1}}.png", f"{root}/dogs/{{train,test}}/0.png")
    refused(root, "holds test and train of cats: splits must be folders above the classes")
    mk("photos/all/{train,val}/{a,b}/0.png")
    refused("photos", "holds train and val of all")
    assert found("photos/all") == (2, ("a", "b"))
    mk("deep/data/{train_set,test_set}/{a,b}/0.png")
    refused("deep", "holds test_set and train_set of data", label_column=None)


def test_a_folder_that_imagenet_has_not_makes_no_class_of_all_of_it() -> None:
    """Above the folder of the splits, it would be the only class, test images in it."""
    inner = "net/ILSVRC/Data/CLS-LOC"
    mk(f"{inner}/train/{{n00000001,n00000002}}/0.png", f"{inner}/{{val,test}}/{{0,1}}.png")
    assert found("net") == (2, ("n00000001", "n00000002"))
    Path(inner, "train/more").mkdir()
    refused("net", "holds test and train and val of ILSVRC/Data/CLS-LOC: splits must be folders above")
    refused(inner, f"{inner}/train/more is empty: a class without images")
    Path(inner, "train/more").rmdir()
    Path(inner, "train/n00000002").rename(Path(inner, "train/tench"))
    refused("net", "give the folder that holds them as data.path", label_column="auto")
    assert found(inner) == (2, ("n00000001", "tench"))


def test_tables_that_are_no_splits_beside_some_are_refused() -> None:
    rows = datasets.Dataset.from_dict(
        {"image": [None]}, features=datasets.Features({"image": datasets.Image()})
    )
    for number, names in enumerate([("train", "holdout"), ("trainset", "testset"), ("data", "test")]):
        for name in names:
            rows.to_parquet(f"{number}/{name}.parquet")
        refused(str(number), f"data.path: {number} holds", label_column=None)


# --- slices ---

NOTHING = "[5:] [3:] [:-9] [2:1] [1:0] [:0] [0:0] [-1:1] [100%:] [:0%] [-1:-2]"
ROWS = {
    **{"[1:]": [1, 2], "[-2:]": [1, 2], "[-9:2]": [0, 1], "[:99]": [0, 1, 2], "[:]": [0, 1, 2]},
    **{"[50%:]": [2], "[:-1]": [0, 1], "[-100%:]": [0, 1, 2], "[1:2]": [1], "": [0, 1, 2]},
}


def layouts() -> list[str]:
    """Three images of the classes 0, 1 and 2 in every layout."""
    mk("folder/{0,1,2}/0.png", "split/train/{0,1,2}/0.png", "split/test/0/0.png")
    names = [f"{number}/0.png" for number in range(3)]
    shutil.copytree("folder", "described")
    Path("described/dataset.json").write_text(
        json.dumps({"labels": [[name, int(name[0])] for name in names]})
    )
    shutil.copytree("folder", "net/train")
    for number in range(3):
        Path(f"net/train/{number}").rename(f"net/train/n0000000{number}")
    for root in ("folder", "described"):
        shutil.make_archive(root, "zip", root)
    content = [{"bytes": Path("folder", name).read_bytes(), "path": None} for name in names]
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    rows = datasets.Dataset.from_dict(
        {"image": content, "label": [0, 1, 2]}, features=datasets.Features(kinds)
    )
    rows.to_parquet("table.parquet")
    return ["folder", "split", "described", "net", "folder.zip", "described.zip", "table.parquet"]


def test_slices_of_every_layout() -> None:
    for path in layouts():
        for part, rows in ROWS.items():
            dataset = see(path, split=f"train{part}")
            assert dataset._labels is not None
            classes = dataset.spec.class_names or ()
            assert [int(classes[label][-1]) for label in dataset._labels] == rows, (path, part)
        for part in NOTHING.split():
            refused(path, f"data.split: 'train{part}' of ", path, "holds no rows", split=f"train{part}")
        for part in ("[150%:]", "[:-101%]"):
            refused(path, "data.split: percents must be within -100 and 100", split=f"train{part}")


# --- ZIPs ---


def zipped(name: str, root: str, inner: str = "") -> str:
    with zipfile.ZipFile(name, "w") as archive:
        for path in sorted(Path(root).rglob("*")):
            archive.write(path, inner + path.relative_to(root).as_posix())
    return name


def test_zips_without_a_description_go_by_their_folders(vae: Path) -> None:
    mk("a/{cats,dogs}/x/{0,1}.png", "b/train/{cats,dogs}/0.png", "b/test/unknown/{0,1}.png", "c/{0,1}.png")
    assert found(zipped("a.zip", "a")) == (4, ("cats", "dogs"))
    assert found(zipped("wrapped.zip", "a", "photos/all/")) == (4, ("cats", "dogs"))
    assert found(zipped("b.zip", "b")) == (2, ("cats", "dogs"))
    assert found("b.zip", split="test") == (2, ("unknown",))
    assert found(zipped("wrapped b.zip", "b", "photos/")) == (2, ("cats", "dogs"))
    refused(zipped("c.zip", "c"), "c.zip is a data set without labels", "no subfolders")
    assert Encoded(vae, "a.zip").classes == (4, ("cats", "dogs"))
    assert Encoded(vae, "c.zip").classes == (2, None)
    for _ in range(2):  # the second time from the cache
        run = Encoded(vae, "b.zip")
        assert "b.zip, split train: 2 images, 2 classes: cats, dogs" in run.out
    pixels, direct = (see(path).take(4, 0).values for path in ("a.zip", "a"))
    assert torch.equal(pixels, direct)


def test_zips_are_held_to_the_rules_of_folders(vae: Path) -> None:
    mk("a/{cats,dogs}/{0,1}.png", "a/preview.png")
    Encoded(vae, zipped("stray.zip", "a")).refused("stray.zip/preview.png has no class")
    Path("a/preview.png").unlink()
    mk("a/__MACOSX/0.png", "a/@eaDir/0.png", "a/cats/.hidden.png")
    Path("a/Thumbs.db").write_bytes(b"x")
    dataset = see(zipped("junk.zip", "a"))
    assert (len(dataset), dataset.spec.class_names) == (4, ("cats", "dogs"))
    assert dataset.findings == see("junk.zip").findings
    assert ": 4 (" in dataset.findings[1]
    Path("a/fox").mkdir()
    refused(zipped("empty.zip", "a"), "empty.zip/fox is empty")
    Path("a/fox/0.heic").write_bytes(b"x")
    refused(
        zipped("unreadable.zip", "a"), "unreadable.zip/fox holds no images that can be read, but .heic (1)"
    )
    mk("b/{train_set,test_set}/{a,b}/0.png")
    refused(zipped("b.zip", "b"), "b.zip holds test_set, train_set, which look like splits")
    assert found("b.zip", split="train_set") == (2, ("a", "b"))


# --- Git LFS pointers ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2713059840\n"
POINTERS = {
    "images/{cats,dogs}/{0,1}.png": "images/cats/0.png: not a readable image (a Git LFS pointer",
    "some.zip": "some.zip: a Git LFS pointer",
    "some.parquet": "some.parquet: a Git LFS pointer",
    "tables/train-0.parquet": "tables/train-0.parquet: a Git LFS pointer",
    "numbered/{dataset.json,0.png}": "dataset.json of numbered is a Git LFS pointer",
    "described/{metadata.csv,0.png}": "described/metadata.csv: a Git LFS pointer",
}


@pytest.mark.parametrize("files", POINTERS)
def test_data_that_are_git_lfs_pointers_are_called_so(vae: Path, files: str) -> None:
    mk(files)
    top = files.partition("/")[0]
    for path in [Path(top)] if Path(top).is_file() else Path(top).rglob("*.*"):
        path.write_bytes(POINTER)
    refused(top, POINTERS[files], "git lfs pull", label_column="auto")
    Encoded(vae, top).refused(POINTERS[files], "git lfs pull")


def test_images_that_are_git_lfs_pointers_may_be_left_out(vae: Path) -> None:
    mk("some/{cats,dogs}/0.png")
    Path("some/cats/1.png").write_bytes(POINTER)
    assert found("some", on_bad_image="skip") == (2, ("cats", "dogs"))
    assert Encoded(vae, "some", "--on_bad_image", "skip").classes == (2, ("cats", "dogs"))
    Path("z/shards/00000.arrow").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"00000\.arrow: a Git LFS pointer"):
        LatentDataset("z")
    shutil.rmtree("some/dogs")
    Path("some/cats/0.png").write_bytes(POINTER)
    refused("some", "none of the 2 images of some can be read", "a Git LFS pointer", on_bad_image="skip")


def test_arrays_that_are_git_lfs_pointers_are_called_so() -> None:
    Path("statistics.npz").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"statistics\.npz: a Git LFS pointer"):
        NpzReader(Path("statistics.npz"), "reference")
    Path("some").mkdir()
    np.save("some/0.npy", np.ones((8, 2, 2), np.float32))
    Path("some/1.npy").write_bytes(POINTER)
    Path("some/dataset.json").write_text('{"labels": null}')
    latents = open_images("some", "train", label_column=None)
    with pytest.raises(InputError, match=r"1\.npy: a Git LFS pointer"):
        latents.moments(1)


# --- folders that `datasets` reads ---


def described(folder: str, animals: dict[str, str]) -> None:
    lines = ["file_name,animal", *(f"{name},{animal}" for name, animal in animals.items())]
    Path(folder, "metadata.csv").write_text("\n".join(lines))


def test_folders_with_a_description_have_splits_and_links_like_others() -> None:
    mk("some/std::x/0.png", "some/b/1.png")
    described("some", {"std::x/0.png": "ant", "b/1.png": "bee"})
    Path("some/b/again").symlink_to("..")
    assert found("some", label_column="animal") == (2, ("ant", "bee"))
    assert "no classes (its columns are image, animal)" in see("some", label_column="auto").findings[0]
    mk("splits/train/{0,1}.png", "splits/holdout/2.png")
    described("splits/train", {"0.png": "ant", "1.png": "bee"})
    described("splits/holdout", {"2.png": "cow"})
    refused("splits", "splits (train) and also holdout", label_column="animal")
    assert found("splits", label_column="animal", split="holdout") == (1, ("cow",))
