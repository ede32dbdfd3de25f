"""Hostile configurations in YAML."""

from pathlib import Path
from typing import Any

import yaml
from fuzz_cases import DEEP, PLAIN, Case, words
from fuzz_material import SMALL_DIT
from hypothesis import strategies as st

# A file a line; \n begins a new line in it, and \t is a tab.
_LINES = r"""
null
- 1
x
[
{
a: b: c
\t- x
a:\n\tb: 1
&a [*a]
a: &a {b: *a}
seed: &a {b: *a}
data: &a {b: *a}
*nothing
seed: 1\nseed: 2
? [1, 2]\n: 3
!!python/object/apply:os.system [touch marker]
seed: !!python/name:os.system
!!set {a, b}
!x 1
<<: {seed: 1}
<<: 3
<<: [{seed: 1}, 2]
%YAML 9.9\n---\nseed: 1
seed: 1\n---\nseed: 2
seed: 0x1_0
seed: 1:30
seed: 2020-01-01
seed: .nan
seed: =
seed: !!binary aGk=
seed: !!float x
seed: !!int ''
seed: !!timestamp x
seed: '\ud800'
1: 2
true: 1
'a\nb': 1
training: 3
training: [steps, 2]
training: {steps: {a: 1}}
training: {'': 1}
training: {null: 1}
training.steps: 2
data: x
data: null
network: null
network: {kind: mlp}
recipe: moons
recipe: [digits]
recipe: {}
resume: run
out: 3
config: mine.yaml
help: true
print_config: true
initial: run
initial: photos
initial: [run]
initial: 3
times: {t: [[0, 1], 2]}
times: {gap: null}
"""
YAML = [line.replace(r"\n", "\n").replace(r"\t", "\t") for line in _LINES.strip("\n").splitlines()]
YAML += ["", "seed: 1\x00", "\ufeffseed: 1", "seed: " + "[" * DEEP + "]" * DEEP, "a: " * 50]
YAML += ["x: " + "y" * 3_000, "seed: 9" + "9" * 5_000, "seed: 1\r\nrecipe: digits\r"]
_BOMB = [f"k{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 'x'}]" for k in range(9)]
YAML += ["{" + ", ".join(_BOMB) + "}"]  # 9⁸ elements, if anybody counts them
KEYS = words("seed initial recipe nothing data data.split network network.depth times.gap objective")
KEYS += ["objective.guidance_weight", "optimizer.gradient_clip", "training.precision", "training.log_every"]


@st.composite
def configurations(draw: st.DrawFn) -> Case:
    """A recipe with a YAML file on top, or the file alone."""
    text = st.sampled_from(YAML) | st.dictionaries(
        st.sampled_from(KEYS), st.sampled_from(PLAIN), min_size=1, max_size=3
    ).map(_nested)
    content = draw(text)
    name = draw(st.sampled_from([["digits"], ["digits"], ["moons"], []]))
    more = draw(st.sampled_from([[], [], ["--config=mine.yaml"], ["--print_config"]]))
    caps = [*SMALL_DIT, "--out=new"] if name != ["moons"] else ["--training.steps=1", "--out=new"]

    def prepare(folder: Path) -> None:
        (folder / "odd.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))

    return Case(["train", *name, "--config=odd.yaml", *more, *caps], prepare, content)


def _nested(options: dict[str, Any]) -> str:
    content: dict[str, Any] = {}
    for key, value in options.items():
        first, _, rest = key.partition(".")
        inner = content.get(first)
        content[first] = {**(inner if isinstance(inner, dict) else {}), rest: value} if rest else value
    text: str = yaml.safe_dump(content)
    return text
