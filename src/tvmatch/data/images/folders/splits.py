"""Splits of a data set among the folders at its top, from names alone; docs/folders.md has the rules.

Ambiguous names are refused, because reading them as classes, or all as one split, could train on test images.
"""

import re
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import NamedTuple

from tvmatch.data.findings import printable
from tvmatch.data.images.folders.walk import Level
from tvmatch.errors import InputError, name_of

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}

_OF_TRAINING = "train|training|trainval|trn"
_OF_HOLDING_OUT = (
    "validation|valid|val|minival|dev|test|testing|tst|eval|evaluation|holdout|heldout"
    "|unseen|unlabell?ed|extra"
)
_GENERAL = "set|data|dataset|images?|imgs?|pics|pictures|photos|split|part|fold|files?|samples"
_LIKE = {
    kind: re.compile(f"({_GENERAL})?({words})({_GENERAL})*")
    for kind, words in (("training", _OF_TRAINING), ("holding out", _OF_HOLDING_OUT))
}


def kind_of_split(name: str) -> str | None:
    """The kind of split that a name resembles: "training" (DIV2K_train_HR, trainA, train_station), "holding
    out" (val2017, held_out), or None.
    """
    words = re.findall("[a-z]+", name.lower())
    parts = [part.lower() for part in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    joined = [first + second for whole in (words, parts) for first, second in pairwise(whole)]
    kinds = [kind for kind, like in _LIKE.items() if any(map(like.fullmatch, [*words, *parts, *joined]))]
    return kinds[-1] if kinds else None


def _means_a_split(name: str) -> bool:
    """Whether all words of a name are about splits and data: test_images, but not test_tube."""
    letters = "".join(re.findall("[a-z]+", name.lower()))
    return any(like.fullmatch(letters) for like in _LIKE.values())


def _are_splits(names: Collection[str]) -> bool:
    """Whether these are probably splits rather than classes."""
    return any(map(_means_a_split, names)) or (bool(names) and all(map(kind_of_split, names)))


class Splits(NamedTuple):
    """Result of `find_splits`.

    Attributes:
        known: folders of each split; empty if the whole data set is one split.
        other: further folders, which can be chosen by name.
        problem: why splits are ambiguous, so that only folders can be chosen; "" if they are not.
    """

    known: dict[str, list[str]]
    other: list[str]
    problem: str

    def choose(self, split: str, path: str) -> str:
        """The folder of a split, "" for the whole data set.

        Args:
            split: name of the split, or of a folder.
            path: of the data set, for messages.

        Raises:
            InputError: there is no such split, or it is ambiguous.
        """
        wanted = SPLIT_OF.get(split.lower(), split)
        if split in self.other or (self.problem and split != "train" and split in self._folders()):
            return split
        if self.problem:
            raise InputError("data.path", self.problem)
        found = self.known.get(wanted, []) if self.known else [""] * (wanted == "train")
        if not found:
            there = sorted([*(self.known or ["train"]), *self.other])
            raise InputError("data.split", f"{split!r} of {path}: unknown split, should be one of {there}")
        if len(found) > 1:
            raise InputError(
                "data.split",
                f"{split!r} of {path} is both {' and '.join(map(printable, found))}; give one of "
                f"them as {name_of('data.path')}, like {path}/{printable(found[0])}",
            )
        return found[0]

    def _folders(self) -> list[str]:
        return [folder for folders in self.known.values() for folder in folders]


ONE_SPLIT = Splits({}, [], "")  # the whole data set is "train"


def find_splits(root: Level, inside: Callable[[str], Level], path: str) -> Splits:
    """Find the splits among the folders at the root of a data set.

    Args:
        root: content of the root; of its folders, those that hold images or are named like splits.
        inside: gives the content of a folder of the root; called for the training split only.
        path: of the data set, for messages.
    """
    names = root.folders
    lower = {name.lower() for name in names}
    no_splits = {"valid"} if "invalid" in lower else set()
    known: dict[str, list[str]] = {}
    for name in names:
        if name.lower() in SPLIT_OF and name.lower() not in no_splits:
            known.setdefault(SPLIT_OF[name.lower()], []).append(name)
    other = [name for name in names if all(name not in folders for folders in known.values())]
    if not known:
        alike = look_like_splits(other)
        return Splits({}, alike, _unnamed(alike, path) if alike else "")
    if not other:
        return Splits(known, [], _stray(known, root.images, path) if root.images else "")
    is_class = set(known) == {"train"} and not _are_splits(other)
    if is_class and all(inside(name).images for name in known["train"]):
        return ONE_SPLIT
    return Splits(known, other, _beside(known, other, path))


def look_like_splits(names: Collection[str]) -> list[str]:
    """The names that resemble splits; none unless both kinds occur, for training and for holding out."""
    both = {"training", "holding out"}
    for alike in ([name for name in names if _means_a_split(name)], list(names)):
        if {kind_of_split(name) for name in alike} == both:
            return alike
    return []


def _unnamed(alike: list[str], path: str) -> str:
    first = printable(next(name for name in alike if kind_of_split(name) == "training"))
    return (
        f"{path} holds {', '.join(map(printable, alike))}, which look like splits, but those are "
        f"called train, validation or test: name one of these with --{name_of('data.split')} {first}, "
        f"give {name_of('data.path')} {path}/{first}, or rename them"
    )


def _stray(known: dict[str, list[str]], images: list[str], path: str) -> str:
    return (
        f"{path} holds splits ({', '.join(sorted(known))}) and also {printable(images[0])}, which "
        "is in none of them; move it"
    )


def _beside(known: dict[str, list[str]], other: list[str], path: str) -> str:
    first, beside = printable(next(iter(known.values()))[0]), printable(other[0])
    splits = ", ".join(sorted(known))
    option = f"--{name_of('data.split')}"
    holds = f"{path} holds splits ({splits}) and also {beside}, which is no split's name"
    if "train" in known:
        return (
            f"{holds}: give {name_of('data.path')} {path}/{first} for that split alone, name the other one "
            f"with {option} {beside}, or move or rename one of them"
        )
    return (
        f"{holds}: if that is a class, move or rename {first}, or take it alone with {option} {first}; "
        f"if it is a split, name it with {option} {beside}"
    )
