"""Which folders or files at the top of a data set are its splits, by their names alone.

- A folder called as in `SPLIT_NAMES` (whatever the case of its letters) is that split.
- Without any such folder all is one split, "train".
- Names that are no split's beside names that are, or names that only look like splits (train_set and
  test_set, train2017 and val2017, train and holdout), are refused: taken as classes, or as one split, test
  images would be trained on. One of them can be chosen by its own name.
- "train" is a class, too (of vehicles), where it holds images just as folders of other names beside it do;
  and "valid" is one beside "invalid".
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
    """What a name looks like to people: "training" (DIV2K_train_HR, trainA, train_station), "holding out"
    (val2017, held_out), or neither.
    """
    words = re.findall("[a-z]+", name.lower())
    parts = [part.lower() for part in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    joined = [first + second for whole in (words, parts) for first, second in pairwise(whole)]
    kinds = [kind for kind, like in _LIKE.items() if any(map(like.fullmatch, [*words, *parts, *joined]))]
    return kinds[-1] if kinds else None


def _means_a_split(name: str) -> bool:
    """Whether all of a name is of splits and data: test_images, but not test_tube."""
    letters = "".join(re.findall("[a-z]+", name.lower()))
    return any(like.fullmatch(letters) for like in _LIKE.values())


def _are_splits(names: Collection[str]) -> bool:
    """Whether these are splits rather than classes, as far as names tell."""
    return any(map(_means_a_split, names)) or (bool(names) and all(map(kind_of_split, names)))


class Splits(NamedTuple):
    """What `find_splits` finds.

    Attributes:
        known: the folders of each split; empty if the whole is one split.
        other: folders that are no split's by their names, which can be chosen by them.
        problem: why no split can be chosen but by a folder's own name, "" if all is clear.
    """

    known: dict[str, list[str]]
    other: list[str]
    problem: str

    def choose(self, split: str, path: str) -> str:
        """The folder of a split, "" for the whole.

        Args:
            split: its name, or that of a folder.
            path: of the data set, for messages.

        Raises:
            InputError: there is no such split, or it cannot be told which folder it is.
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


ONE_SPLIT = Splits({}, [], "")  # of a data set that is one split as a whole


def find_splits(root: Level, inside: Callable[[str], Level], path: str) -> Splits:
    """The splits among the folders of a data set's root.

    Args:
        root: what lies in it; of its folders those that hold images, and those called like splits.
        inside: what lies in a folder of it; asked for the training split alone.
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
    """Those names that look like splits; none unless they are of both kinds, for training and held out."""
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
