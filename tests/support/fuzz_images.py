"""Hostile folders, ZIPs and tables of images."""

import datetime
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from fuzz_cases import DEEP, PLAIN, Case, words
from fuzz_damage import damages
from fuzz_material import SMALL_IMAGES, photo
from hypothesis import strategies as st

FOLDERS = words(
    "train test val validation a b cats 0 größe std::vector @eaDir .hidden __MACOSX n01440764 images"
)
FOLDERS += ["ILSVRC", "Data", "CLS-LOC", "train_set", "a b", "new\nline"]
NAMES = words(
    "0.png 1.PNG 2.jpg 3.jpeg 4.npy 5.txt 6 7.webp 8.gif 9.parquet 10.tiff dataset.json metadata.csv"
)
NAMES += words("metadata.jsonl labels.txt Thumbs.db .DS_Store a.zip data.arrow n01440764_1.JPEG x\x1b.png")
NAMES += ["LOC_synset_mapping.txt", "LOC_val_solution.csv"]


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


CONTENTS: list[bytes] = [photo(1), photo(2, 5), photo(3)[:60], b"", b"text", b"\x00" * 40, b"[1, 2]", b"{}"]
CONTENTS += [
    _npy(np.zeros((3, 8, 8), np.uint8)),
    _npy(np.zeros((8, 2, 2), np.float32)),
    _npy(np.zeros(3, "i2")),
]
CONTENTS += [
    b"file_name,label\n0.png,1\n",
    b'{"file_name": "0.png", "x": 1}\n',
    b"n01440764 a fish\n",
    b"PK\x03\x04",
]
LABELS = ["label", "label", "auto", "null", "image", "nothing", ""]
SPLITS = [
    "",
    *words("train train test train[:1] train[1:] train[99:] train[:50%] train[x] all train+test [1:2]"),
]


@st.composite
def layouts(draw: st.DrawFn) -> Case:
    """A small tree of images and other things, at times with links, for training or encoding."""
    folder = st.lists(st.sampled_from(FOLDERS), max_size=3).map("/".join)
    files = draw(
        st.dictionaries(
            st.tuples(folder, st.sampled_from(NAMES)),
            st.sampled_from([*CONTENTS[:2] * 6, *CONTENTS]),
            min_size=1,
            max_size=7,
        )
    )
    targets = st.sampled_from(["..", "..", ".", "nowhere", "../../photos", "0.png", "/dev"])
    links = draw(st.dictionaries(st.tuples(folder, st.sampled_from(["link", "zlink"])), targets, max_size=3))
    empty = draw(st.none() | folder)

    def prepare(here: Path) -> None:
        root = here / "tree"
        for (inside, name), content in files.items():
            (root / inside).mkdir(parents=True, exist_ok=True)
            (root / inside / name).write_bytes(content)
        if empty is not None:
            (root / empty / "empty").mkdir(parents=True, exist_ok=True)
        for (inside, name), target in links.items():
            (root / inside).mkdir(parents=True, exist_ok=True)
            (root / inside / name).symlink_to(target)

    return Case(draw(_reading("tree")), prepare, (files, links, empty))


def _reading(path: str) -> st.SearchStrategy[list[str]]:
    """A call that reads images from `path`."""

    def train(label: str, split: str, bad: str) -> list[str]:
        options = [f"--data.path={path}", f"--data.label_column={label}", f"--data.split={split}"]
        options += [f"--data.on_bad_image={bad}", "--objective.guidance_weight=1", "--out=new"]
        return ["train", "image_folder", *options, *SMALL_IMAGES]

    def encode(label: str, split: str, bad: str) -> list[str]:
        options = [f"--data={path}", f"--label_column={label}", f"--split={split}", f"--on_bad_image={bad}"]
        return ["encode", *options, "--autoencoder=vae", "--resolution=16", "--out=new", "--workers=0"]

    choices = st.sampled_from(LABELS), st.sampled_from(SPLITS), st.sampled_from(["error", "skip"])
    return st.one_of(st.builds(train, *choices), st.builds(encode, *choices))


_MEMBERS = ["0.png", "1.png", "a/2.png", "../3.png", "/4.png", "5.npy", "6.txt", "a\\7.png", "é.png", "b/"]
_DESCRIPTIONS: list[Any] = [None, [], {}, 3, "x", {"labels": None}, {"labels": 3}, {"labels": {"0.png": 1}}]
_DESCRIPTIONS += [{"labels": [["0.png", label], ["1.png", 0]]} for label in PLAIN]
_DESCRIPTIONS += [
    {"labels": [["0.png"]]},
    {"labels": [[0, 0]]},
    {"labels": ["0.png"]},
    {"labels": [["nowhere.png", 0]]},
]
_DESCRIPTIONS += [
    {"labels": [["0.png", 0], ["0.png", 1]]},
    {"labels": [["0.png", 0]], "x": 1},
    {"labels": [[None, 0]]},
]
_TEXTS = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * DEEP,
    b'{"labels": [["0.png", 1e999]]}',
    b'{"labels": 1, "labels": null}',
]


@st.composite
def archives(draw: st.DrawFn) -> Case:
    """A ZIP of images, with or without a description, at times cut or with bytes changed."""
    members = draw(st.lists(st.tuples(st.sampled_from(_MEMBERS), st.sampled_from(CONTENTS)), max_size=5))
    content = draw(
        st.none()
        | st.sampled_from(_DESCRIPTIONS).map(lambda value: json.dumps(value).encode())
        | st.sampled_from(_TEXTS)
    )
    packed = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
    harm = draw(st.none() | st.none() | damages())

    def prepare(here: Path) -> None:
        with zipfile.ZipFile(here / "odd.zip", "w", packed) as archive:
            for name, data in dict(members).items():
                archive.writestr(name, data)
            if content is not None:
                archive.writestr("dataset.json", content)
        if harm is not None:
            harm(here / "odd.zip")

    return Case(draw(_reading("odd.zip")), prepare, (members, content, packed, harm))


_IMAGE = {"bytes": photo(1), "path": None}
_COLUMNS: list[list[Any]] = [
    [_IMAGE, _IMAGE],
    [_IMAGE, None],
    [{"bytes": b"x", "path": None}] * 2,
    [photo(1)] * 2,
]
_COLUMNS += [[{"bytes": None, "path": "photos/a/0.png"}] * 2, [{"bytes": None, "path": "/etc/passwd"}] * 2]
_COLUMNS += [
    [0, 1],
    [1, 2],
    [-1, 0],
    [None, 0],
    [2**40, 0],
    ["a", "b"],
    ["a", None],
    ["", "\n"],
    [0.5, 1.0],
    [True, False],
]
_COLUMNS += [
    [[1], [2]],
    [{"x": 1}, {"x": 2}],
    [None, None],
    [b"a", b"b"],
    [datetime.date(2020, 1, 1)] * 2,
    [],
]


@st.composite
def tables(draw: st.DrawFn) -> Case:
    """A Parquet file with odd columns, at times damaged."""
    names = st.sampled_from(["image", "label", "img", "x", "", "größe", "place", "pixels"])
    first = draw(st.sampled_from(_COLUMNS))
    rest = draw(
        st.dictionaries(names, st.sampled_from([c for c in _COLUMNS if len(c) == len(first)]), max_size=3)
    )
    columns = {draw(names): first, **rest}
    harm = draw(st.none() | st.none() | damages())

    def prepare(here: Path) -> None:
        pa.parquet.write_table(pa.table(columns), here / "odd.parquet")
        if harm is not None:
            harm(here / "odd.parquet")

    return Case(draw(_reading("odd.parquet")), prepare, (columns, harm))
