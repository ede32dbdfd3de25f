"""Damage to the files that commands read."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fuzz_cases import DEEP, PLAIN, Case
from fuzz_material import CALLS, SMALL_DIT
from hypothesis import strategies as st


@dataclass(frozen=True)
class Damage:
    """Something that happens to a file.

    Attributes:
        kind: the file is cut, changed in some bytes, made longer, emptied, text, lost, or a folder.
        places: where, in parts of its length.
        value: what changed bytes differ by, or how many are added.
        near: bytes are changed at the beginning, where the structure is.
    """

    kind: str
    places: list[float]
    value: int
    near: bool

    def __call__(self, path: Path) -> None:
        """Do it."""
        content = bytearray(path.read_bytes())
        if self.kind == "flip" and content:
            for place in self.places:
                content[int(place * (min(len(content), 200) if self.near else len(content)))] ^= self.value
        elif self.kind == "cut":
            del content[int(self.places[0] * len(content)) :]
        elif self.kind == "longer":
            content += bytes(self.value)
        elif self.kind in ("empty", "text"):
            content = bytearray(b"" if self.kind == "empty" else b"not what it was\n")
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind != "lost":
            path.write_bytes(content)


def damages() -> st.SearchStrategy[Damage]:
    """Damage to any file."""
    kinds = ["cut", "flip", "flip", "flip", "longer", "empty", "lost", "folder", "text"]
    places = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3)
    return st.builds(Damage, st.sampled_from(kinds), places, st.integers(1, 255), st.booleans())


def _valid(name: str, *more: str) -> list[str]:
    words, caps = CALLS[name]
    return [*words, *more, *caps]


_RUN = ["info", "sample", "evaluate features", "train again", "demo"]
_RUN += ["export hub", "export pipeline", "export weights"]
_TABLE = ["--reference=photos.parquet", "--cache=new"]
# The files that may be damaged, and calls that read them.
_READERS: dict[str, list[list[str]]] = {
    "run/": [*map(_valid, _RUN), ["evaluate", "run", "--steps=1"], ["check", "--model=run/config.yaml"]],
    "points/": [["evaluate", "points", "--samples=4"], ["sample", "points", "--out=new.npz"]],
    "z/": [
        _valid("train latents"),
        _valid("encode", "--out=z"),
        _valid("encode", "--out=z", "--normalization=measured"),
        _valid("encode", "--normalization=z"),
    ],
    "vae/": [_valid("encode"), _valid("sample latents")],
    "latent/": [_valid("sample latents"), ["info", "latent"], _valid("train digits", "--initial=latent")],
    "hub/": [
        ["info", "hub"],
        ["sample", "hub", "--out=new.png"],
        ["export", "hub", "--layout=hub", "--out=new"],
    ],
    "snapshot.pkl": [_valid("import")],
    "weights.safetensors": [_valid("import safetensors")],
    "reference.npz": [_valid("evaluate features"), _valid("evaluate features", "--metrics=fid,sfid")],
    "photos.zip": [_valid("train images", "--data.path=photos.zip", "--data.label_column=label")],
    "photos.parquet": [_valid("encode", "--data=photos.parquet"), _valid("evaluate features", *_TABLE)],
    "photos/": [_valid("train images"), _valid("encode")],
    "mine.yaml": [["train", "--config=mine.yaml", "--out=new", *SMALL_DIT]],
}


@st.composite
def damaged_files(draw: st.DrawFn, files: list[str]) -> Case:
    """One of the valid files is damaged, or put in the place of another, before it is read."""
    place = draw(st.sampled_from(sorted(_READERS)))
    name = draw(st.sampled_from([name for name in files if name.startswith(place)]))
    harm = draw(damages())
    other = draw(st.none() | st.none() | st.sampled_from(files))

    def prepare(here: Path) -> None:
        if other is None:
            harm(here / name)
        else:
            shutil.copyfile(here / other, here / name) if other != name else (here / name).unlink()

    return Case(draw(st.sampled_from(_READERS[place])), prepare, (name, other or harm))


@st.composite
def damaged_descriptions(draw: st.DrawFn, files: list[str]) -> Case:
    """A value in a JSON or YAML file is another, or gone."""
    name = draw(st.sampled_from([name for name in files if name.endswith((".json", ".yaml"))]))
    place = next(place for place in _READERS if name.startswith(place))
    way = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    value = draw(st.sampled_from([*PLAIN, "gone", "gone", "deep", "again"]))

    def prepare(here: Path) -> None:
        path = here / name
        content = (json.loads if name.endswith("json") else yaml.safe_load)(path.read_text())
        _change(content, way, value)
        text = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content)
        path.write_text(text.replace('"deep"', "[" * DEEP + "]" * DEEP))

    return Case(draw(st.sampled_from(_READERS[place])), prepare, (name, way, value))


def _change(content: Any, way: list[int], value: Any) -> None:
    """Follow `way` into lists and mappings as far as it goes, and change what is there."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return
    key = keys[way[0] % len(keys)]
    if len(way) > 1 and isinstance(content[key], dict | list) and content[key]:
        return _change(content[key], way[1:], value)
    if value == "gone":
        del content[key]
    elif value == "again" and isinstance(content, list):
        content.append(content[key])
    else:
        content[key] = value
