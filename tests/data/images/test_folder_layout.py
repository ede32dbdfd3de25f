"""Splits, classes and walks of folders, against their definitions computed in another way."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tvmatch.data.images.folders.layout import FLAT, labels_by_folder, splits_within_classes
from tvmatch.data.images.folders.splits import SPLIT_OF, find_splits, kind_of_split, look_like_splits
from tvmatch.data.images.folders.walk import IN_A_CIRCLE, TWICE, Level, walk
from tvmatch.errors import InputError

PARTS = st.sampled_from(["a", "b", "c c", "ü", "::", "train", "1"])
IMAGES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), unique=True, min_size=1, max_size=12)


@given(IMAGES)
def test_labels_are_the_first_folders(paths: list[str]) -> None:
    """None at all without folders, all of them with folders, and otherwise a problem: never some."""
    images = [f"{path}.png" for path in paths]
    folders = sorted({path[:end] for path in images for end in range(len(path)) if path[end] == "/"})
    found = labels_by_folder(images, [], folders, {}, "root")
    first = [Path(image).parts[0] if len(Path(image).parts) > 1 else None for image in images]
    if not any(first):
        assert (found.class_names, set(found.labels), found.why_none, found.problem) == (
            None,
            {None},
            FLAT,
            "",
        )
    elif None in first:
        assert (found.class_names, set(found.labels)) == (None, {None})
        assert images[first.index(None)] in found.problem
    else:
        assert found.problem == found.why_none == ""
        names = found.class_names or ()
        assert list(names) == sorted(set(first), key=str)
        assert [names[label] for label in found.labels if label is not None] == first


@given(IMAGES, st.lists(PARTS, max_size=3), st.data())
def test_a_class_without_images_is_a_problem(paths: list[str], empty: list[str], data: st.DataObject) -> None:
    images = [f"{data.draw(PARTS)}/{path}.png" for path in paths]
    others = [f"{name}/x.heic" for name in empty]
    folders = sorted({name.split("/")[0] for name in images + others})
    found = labels_by_folder(images, others, folders, {}, "root")
    lacking = set(empty) - {image.split("/")[0] for image in images}
    assert bool(found.problem) == bool(lacking)
    assert all(f"root/{min(lacking)} holds no images" in found.problem for _ in range(bool(lacking)))


def test_splits_within_classes() -> None:
    assert splits_within_classes(["a/train/0.png", "a/test/0.png"]) == "train and test of a"
    assert splits_within_classes(["a/train/0.png", "b/test/0.png", "test/0.png", "c/train.png"]) == ""
    assert splits_within_classes(["bus/red/0.png", "train/val/0.png", "train/x/train/0.png"]) == ""
    assert splits_within_classes(["a/b/c/val/0.png", "a/b/c/Train/x/0.png"]) == "val and Train of a/b/c"
    assert splits_within_classes(["a/train2017/0.png", "a/val2017/0.png"]) == "train2017 and val2017 of a"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train", "training"),
        ("Training-Set", "training"),
        ("trainval", "training"),
        ("train2017", "training"),
        ("images_train", "training"),
        ("val", "holding out"),
        ("test_images", "holding out"),
        ("held out", "holding out"),
        ("hold-out", "holding out"),
        ("testset", "holding out"),
        ("devdata", "holding out"),
        ("trainA", "training"),
        ("HoldOut", "holding out"),
        ("celebTEST", "holding out"),
        ("trains", None),
        ("contest", None),
        ("value", None),
        ("cats", None),
        ("n01440764", None),
        ("", None),
        ("3", None),
    ],
)
def test_kinds_of_splits(name: str, kind: str | None) -> None:
    assert kind_of_split(name) == kind


def test_names_that_look_like_splits() -> None:
    assert look_like_splits(["train_set", "test_set", "docs"]) == ["train_set", "test_set"]
    assert look_like_splits(["DIV2K_train_HR", "DIV2K_valid_HR"]) == ["DIV2K_train_HR", "DIV2K_valid_HR"]
    pairs = ["testA", "testB", "trainA", "trainB"]
    assert look_like_splits(pairs) == pairs
    assert look_like_splits(["train_station", "test_tube", "cat"]) == []
    assert look_like_splits(["train_a", "train_b"]) == look_like_splits([]) == []


LIKE = ["train", "Training", "val", "valid", "test", "EVAL", "holdout", "test_set", "train_set"]
NAMES = st.lists(st.sampled_from([*LIKE, "cats", "dogs", "bus", "invalid"]), unique=True, max_size=5)


@given(NAMES, st.booleans(), st.booleans())
def test_a_split_is_never_mixed_with_another(names: list[str], stray: bool, flat: bool) -> None:
    """What is chosen is one folder, or the whole where that does not hold splits of both kinds."""
    root = Level(sorted(names), ["0.png"] if stray else [])
    splits = find_splits(root, lambda name: Level([], ["1.png"]) if flat else Level(["x"], []), "root")
    kinds = {kind_of_split(name) for name in names} - {None}
    for wanted in ("train", "validation", "test", *names):
        try:
            folder = splits.choose(wanted, "root")
        except InputError:
            continue
        if folder == "":
            assert kinds != {"training", "holding out"}
            assert SPLIT_OF.get(wanted.lower()) == "train"
        else:
            assert folder in names
            assert folder == wanted or SPLIT_OF[folder.lower()] == SPLIT_OF[wanted.lower()]


# --- walks ---

FOLDER = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
FOLDERS = st.lists(FOLDER, unique=True, max_size=8)
LINKS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10)), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FOLDERS, LINKS)
@example(["a", "b"], [(1, 0), (2, 0), (1, 2), (2, 1)])
def test_walks_see_each_file_once_and_end(
    tmp_path_factory: pytest.TempPathFactory, folders: list[str], links: list[tuple[int, int]]
) -> None:
    """Links from any folder to any folder, the root, its parents and a folder outside.

    The oracle follows all links breadth first, and knows folders by their real paths.
    """
    base = tmp_path_factory.mktemp("walk")
    root, outside = base / "root", base / "outside"
    places = [root, *(root / folder for folder in folders)]
    for folder in (*places, outside):
        folder.mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate([*places, outside]):
        (folder / f"{number}.png").write_bytes(b"")
    targets = [*places, outside, base, Path("/")]
    for number, (source, target) in enumerate(links):
        (places[source % len(places)] / f"link{number}").symlink_to(targets[target % len(targets)])
    tree = walk(root)
    assert walk(root) == tree
    assert tree.files == sorted(tree.files, key=lambda name: name.split("/"))

    above = {os.path.realpath(folder) for folder in root.parents}
    known, waiting = set[str](), [os.path.realpath(root)]
    while waiting:
        folder = waiting.pop(0)
        if folder not in known and folder not in above:
            known.add(folder)
            waiting += [os.path.realpath(entry) for entry in Path(folder).iterdir() if entry.is_dir()]
    expected = sorted(
        os.path.realpath(entry) for folder in known for entry in Path(folder).iterdir() if entry.is_file()
    )
    assert sorted(os.path.realpath(root / name) for name in tree.files) == expected
    assert {os.path.realpath(root / name) for name in ("", *tree.folders)} == known
    assert len(tree.folders) == len(known) - 1
    for link, first in tree.again.items():
        assert os.path.samefile(root / link, root / first)
        assert not Path(link).is_relative_to(first)
    assert set(tree.left_out) <= {IN_A_CIRCLE, TWICE}
    assert tree.left_out.get(TWICE, (0, ""))[0] == len(tree.again)


def test_real_folders_come_before_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "0.png").write_bytes(b"")
    (tmp_path / "a").symlink_to("z")
    tree = walk(tmp_path)
    assert (tree.files, tree.again) == (["z/0.png"], {"a": "z"})
