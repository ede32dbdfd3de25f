"""The same normalisation with fewer digits is the same; any other is refused, wherever two of them meet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import images, tiny_config

from tvmatch.config.recipes import recipe
from tvmatch.data.config import LatentsData
from tvmatch.data.latents.dataset import LatentDataset
from tvmatch.data.spec import AutoencoderInfo, DataSpec, agree
from tvmatch.errors import InputError
from tvmatch.training import Trainer
from tvmatch.training.distillation import expect_same_data

SHORT = {"mean": (0.86488, -0.27787, 0.21617, 0.37384), "std": (4.85504, 5.31922, 3.93725, 3.98700)}


@pytest.mark.parametrize("name", ["imagenet256_w2", "imagenet256_w1.75"])
def test_five_digits_of_the_recipes_are_theirs(name: str) -> None:
    data = recipe(name).data
    for numbers, short in ((data.mean, SHORT["mean"]), (data.std, SHORT["std"])):
        assert numbers != short
        assert agree(short, numbers, data.std)
        for channel in range(4):
            other = tuple(x + (3e-4 if i == channel else 0) for i, x in enumerate(short))  # the fourth digit
            assert not agree(other, numbers, data.std)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=4), st.floats(0.1, 10), st.integers(5, 16))
def test_rounding_to_five_decimals_agrees(numbers: list[float], std: float, digits: int) -> None:
    """Half a unit of the fifth decimal is 5e-6: within 1e-5 deviations from a deviation of 0.5 on."""
    rounded = [round(x, digits) for x in numbers]
    assert agree(numbers, rounded, [std] * len(numbers)) or std < 0.5


@pytest.mark.parametrize("others", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, float("inf")], []])
def test_other_numbers_do_not_agree(others: list[float]) -> None:
    assert not agree([1.0, 2.0], others, [1.0, 1.0])
    assert not agree(others, [1.0, 2.0], [1.0, 1.0])


@pytest.mark.parametrize("name", ["mean", "std"])
def test_where_checkpoints_and_data_meet(name: str, tmp_path: Path) -> None:
    """A run goes on, and a checkpoint serves as another's start, on data normalised with more digits."""
    numbers = {"mean": [0.3], "std": [0.4]}
    rounded = images(**numbers)
    more = images(**numbers | {name: [numbers[name][0] + 2e-6]})
    other = images(**numbers | {name: [numbers[name][0] + 2e-4]})
    config = tiny_config(steps=2)
    Trainer(config, rounded, tmp_path / "run").run(until=1)
    assert Trainer(config, more, tmp_path / "run", resume=tmp_path / "run").state.step == 1
    with pytest.raises(InputError, match=rf"data\.{name} is \["):
        Trainer(config, other, tmp_path / "run", resume=tmp_path / "run")
    expect_same_data("initial", "there", rounded.spec, more.spec)
    with pytest.raises(InputError, match=f"initial: the data's {name}"):
        expect_same_data("initial", "there", rounded.spec, other.spec)


def test_latents_of_five_digits_fit_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe("imagenet256_w2").data
    assert isinstance(data, LatentsData)
    data = replace(data, latents="folder")
    names = tuple(map(str, range(1000)))
    info = AutoencoderInfo("stabilityai/sd-vae-ft-ema", "", (3, 256, 256))

    def opened(mean: tuple[float, ...]) -> LatentDataset:
        dataset = object.__new__(LatentDataset)
        dataset.spec = DataSpec("latents", (4, 32, 32), names, mean, SHORT["std"], info)
        monkeypatch.setattr("tvmatch.data.latents.dataset.LatentDataset", lambda _: dataset)
        return data.load()

    assert opened(SHORT["mean"]).spec.mean == SHORT["mean"]
    with pytest.raises(InputError, match=r"data\.mean: .* is expected, folder has \[0\.8651, "):
        opened((0.8651, *SHORT["mean"][1:]))


def test_what_a_difference_of_digits_does() -> None:
    """Latents that are normalised with five digits differ from all digits' by 1e-6 of their deviation."""
    data = recipe("imagenet256_w2").data
    latents = torch.randn(4, 1000, dtype=torch.float64) * 5
    long, short = (
        (latents - torch.tensor(mean, dtype=torch.float64)[:, None]) / torch.tensor(std)[:, None].double()
        for mean, std in ((data.mean, data.std), (SHORT["mean"], SHORT["std"]))
    )
    assert 0 < (long - short).abs().max() < 1e-5
