"""TrainedModel: samples in data units, arguments, and what is on disk."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize_
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap
from tvmatch.models import DiTConfig, MLPConfig, build_network
from tvmatch.sampling import sample_noise, sample_trajectory
from tvmatch.trained_model import TrainedModel, load
from tvmatch.trained_model.files import find_checkpoint, of_newest

IMAGES = DataSpec("image", (3, 4, 6), ("zero", "one", "größer"), mean=(0.5, 0.4, 0.6), std=(0.5, 0.3, 0.2))
POINTS = DataSpec("points", (2,), None, mean=(1.0, -2.0), std=(3.0, 0.5))
SMALL_DIT = DiTConfig(hidden_size=16, depth=2, heads=2, patch_size=2, time_frequencies=8)
SMALL_MLP = MLPConfig(hidden_size=16, depth=2, time_frequencies=8)


def image_model(**changes: Any) -> TrainedModel:
    torch.manual_seed(0)
    network = randomize_(build_network(SMALL_DIT, IMAGES.shape, IMAGES.class_count))
    fields: dict[str, Any] = {"scaled": True, "guidance": 1.5, "step": 12, "provenance": {"recipe": "größer"}}
    return TrainedModel(network=network, spec=IMAGES, **(fields | changes))


def points_model() -> TrainedModel:
    torch.manual_seed(0)
    network = randomize_(build_network(SMALL_MLP, POINTS.shape))
    return TrainedModel(network=network, spec=POINTS, scaled=False, guidance=1.0)


@pytest.fixture(params=[image_model, points_model])
def model(request: pytest.FixtureRequest) -> TrainedModel:
    made: TrainedModel = request.param()
    return made


def test_samples_are_in_data_units() -> None:
    images = image_model().sample(count=40)
    assert images.shape == (40, 3, 4, 6)
    assert images.dtype == torch.float32
    assert images.min() == 0  # an untrained network leaves the range, and is clipped
    assert images.max() == 1
    points = points_model().sample(count=200)
    assert points.shape == (200, 2)
    assert points.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_by_the_parts(steps: int) -> None:
    """Noise, trajectory, mean and standard deviation, clipping, each done by hand."""
    model = image_model()
    labels = torch.tensor([2, 0, 1, 1])
    times = [1 - i / steps for i in range(steps)] + [0.0]
    noise = sample_noise(7, range(4), IMAGES.shape)
    flow_map = FlowMap(model.network, scaled=True)
    states = sample_trajectory(flow_map, noise, times, labels=labels, guidance_weight=1.5)
    mean, std = torch.tensor(IMAGES.mean).view(3, 1, 1), torch.tensor(IMAGES.std).view(3, 1, 1)
    expected = (states * std + mean).clamp(0, 1)
    assert torch.equal(model.sample([2, "zero", "one", 1], steps=steps, seed=7), expected[-1])
    assert torch.equal(model.trajectory([2, "zero", "one", 1], steps=steps, seed=7), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_samples_do_not_depend_on_the_batch_size(model: TrainedModel, batch_size: int) -> None:
    expected = model.sample(count=10, steps=2, seed=1)
    actual = model.sample(count=10, steps=2, seed=1, batch_size=batch_size)
    # Matrix products round differently for other batch sizes: 1e-5 is what is promised.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_sample_k_does_not_depend_on_the_count(model: TrainedModel) -> None:
    torch.testing.assert_close(model.sample(count=3), model.sample(count=9)[:3], rtol=0, atol=1e-5)


def test_seeds(model: TrainedModel) -> None:
    torch.manual_seed(0)
    first = model.sample(count=4, seed=3)
    torch.manual_seed(1)
    assert torch.equal(model.sample(count=4, seed=3), first)
    assert not torch.allclose(model.sample(count=4, seed=4), first)


def test_trajectory_runs_from_the_noise_to_the_sample(model: TrainedModel) -> None:
    times = [1, 0.7, 0.1, 0]
    trajectory = model.trajectory(count=5, times=times, seed=2, batch_size=2)
    assert trajectory.shape == (4, 5, *model.spec.shape)
    noise = model.spec.denormalize(sample_noise(2, range(5), model.spec.shape))
    if model.spec.kind == "image":
        noise = noise.clamp(0, 1)
    assert torch.equal(trajectory[0], noise)
    assert torch.equal(trajectory[-1], model.sample(count=5, times=times, seed=2, batch_size=2))
    uniform = model.sample(count=5, steps=3, seed=2, batch_size=2)
    assert not torch.allclose(trajectory[-1], uniform)
    assert torch.equal(model.sample(count=5, times=[1, 2 / 3, 1 / 3, 0], seed=2, batch_size=2), uniform)


def test_labels_by_number_name_and_list() -> None:
    model = image_model()
    one = model.sample(1)
    assert one.shape == (1, 3, 4, 6)
    several: list[Any] = ["one", "1", [1], ["one"], (1,), torch.tensor([1])]
    for labels in several:
        assert torch.equal(model.sample(labels), one)
    assert not torch.allclose(model.sample(2), one)
    assert torch.equal(model.sample("größer", count=4), model.sample([2] * 4))
    assert torch.equal(model.sample(), model.sample([0, 1, 2]))
    assert torch.equal(model.sample(count=5), model.sample([0, 1, 2, 0, 1]))


def test_default_counts() -> None:
    assert len(points_model().sample()) == 16
    assert len(image_model().sample()) == 3


def test_guidance_constant_or_range() -> None:
    constant, ranged = image_model(guidance=2.0), image_model(guidance=(1.0, 2.0))
    assert torch.equal(constant.sample(), constant.sample(guidance=2.0))
    assert torch.equal(ranged.sample(), constant.sample())  # the highest
    assert torch.equal(ranged.sample(guidance=1.25), image_model(guidance=1.25).sample())
    assert not torch.allclose(ranged.sample(guidance=1.25), ranged.sample())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 3}, "labels: 3 is outside 0 … 2"),
        ({"labels": -1}, "labels: -1"),
        ({"labels": "two"}, "labels: .*'two'.*zero, one, größer"),
        ({"labels": [0, 7]}, "labels: 7"),
        ({"labels": []}, "labels"),
        ({"labels": [0, 1], "count": 3}, "count: 3 samples for 2 labels"),
        ({"count": 0}, "count.*0"),
        ({"count": -2}, "count.*-2"),
        ({"steps": 0}, "steps.*0"),
        ({"times": [0, 1]}, r"times.*\[0.0, 1.0\]"),
        ({"times": [1, 0.5, 0], "steps": 4}, "times.*steps is 4"),
        ({"guidance": 2.0}, "guidance.*1.5.*2"),
        ({"guidance": float("nan")}, "guidance.*nan"),
        ({"seed": -1}, "seed.*-1"),
        ({"batch_size": 0}, "batch_size.*0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    for method in (image_model().sample, image_model().trajectory):
        with pytest.raises(InputError, match=message) as caught:
            method(**arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("guidance", [0.99, 2.01, float("nan")])
def test_guidance_outside_the_trained_range(guidance: float) -> None:
    with pytest.raises(InputError, match=f"guidance.*1 to 2.*{guidance}"):
        image_model(guidance=(1.0, 2.0)).sample(guidance=guidance)


def test_labels_for_a_model_without_classes() -> None:
    with pytest.raises(InputError, match=r"labels.*no classes"):
        points_model().sample(0)


def test_saved_and_loaded_model_is_the_same(model: TrainedModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    loaded = load(str(tmp_path))
    for name in ("spec", "scaled", "guidance", "step", "provenance"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.network.config == model.network.config
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert torch.equal(loaded.sample(count=5, steps=2), model.sample(count=5, steps=2))


def test_a_range_of_guidance_is_saved(tmp_path: Path) -> None:
    image_model(guidance=(1.0, 2.5)).save(tmp_path)
    assert load(tmp_path).guidance == (1.0, 2.5)


def test_run_folder_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (900, 1000, 200):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        image_model(step=step).save(folder)
    unfinished = tmp_path / "checkpoints" / "step_2000.partial"
    unfinished.mkdir()
    (unfinished / "model.json").write_text("{")
    assert find_checkpoint(tmp_path).name == "step_1000"
    assert load(tmp_path).step == 1000
    assert load(tmp_path / "checkpoints" / "step_200").step == 200


@pytest.mark.parametrize("damage", ["a folder", "an empty file"])
def test_a_damaged_newest_checkpoint_is_an_error(tmp_path: Path, damage: str) -> None:
    """It is not asked for again and again, as one is that was removed meanwhile."""
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        image_model(step=step).save(tmp_path / "checkpoints" / f"step_{step}")
    description = tmp_path / "checkpoints" / "step_2" / "model.json"
    description.unlink()
    if damage == "a folder":
        description.mkdir()
    else:
        description.touch()
    reads = 0

    def read(folder: Path) -> TrainedModel:
        nonlocal reads
        reads += 1
        assert reads < 3
        return load(folder)

    with pytest.raises(InputError):
        of_newest(tmp_path, read)


def test_a_network_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    model = TrainedModel(nn.Linear(2, 2), POINTS, scaled=False, guidance=1.0)
    with pytest.raises(TypeError, match="Linear"):
        model.save(tmp_path)
    model = image_model(provenance={"path": tmp_path})  # not JSON
    with pytest.raises(TypeError):
        model.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*no such"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no checkpoint"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors.*no checkpoint"):
        load(file)


class Payload:
    """What a hostile pickle does when it is loaded: here it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_not_executed(tmp_path: Path) -> None:
    image_model().save(tmp_path)
    marker = tmp_path / "executed"
    torch.save({"weight": Payload(marker)}, tmp_path / "model.safetensors")
    for content in ((tmp_path / "model.safetensors").read_bytes(), pickle.dumps(Payload(marker))):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors.*not a safetensors"):
            load(tmp_path)
        assert not marker.exists()
    pickle.loads(content)  # the payload is a real one
    assert marker.exists()


def load_after(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a saved model whose tensors were changed."""
    image_model().save(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "missing.*head.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected.*extra"),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(5)}), r"head.bias.*\(5,\).*\(12,\)"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(12, dtype=torch.int64)}),
            "head.bias.*int64.*float32",
        ),
        (lambda tensors: tensors.clear(), "missing"),
    ],
)
def test_mismatched_tensors(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"model.safetensors.*{message}"):
        load_after(tmp_path, change)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -4, -1])
def test_truncated_tensors(kept: int, tmp_path: Path) -> None:
    image_model().save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model.safetensors.*truncated"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"model.safetensors: missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": "tvmatch-model-0"}', '{"format": "tvmatch-model-1"}', "\x80\x02"],
)
def test_foreign_descriptions(content: str, tmp_path: Path) -> None:
    image_model().save(tmp_path)
    (tmp_path / "model.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"model.json") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (("network", "kind"), None),
        (("network", "hidden"), 3),
        (("network", "hidden_size"), None),
        (("network", "hidden_size"), "16"),
        (("network", "time_embedding_init"), "spectal"),
        (("network", "heads"), 3),
        (("data", "kind"), "points"),
        (("data", "shape"), [3, 4]),
        (("data", "colour"), True),
        (("guidance",), None),
        (("guidance",), [1.0]),
        (("guidance",), [3.0, 1.0]),
        (("guidance",), 0.5),
        (("guidance",), 1e300),
        (("guidance",), float("nan")),
        (("step",), float("inf")),
        (("step",), "many"),
        (("network",), None),
        (("data",), []),
    ],
)
def test_mismatched_descriptions(path: tuple[str, ...], number: Any, tmp_path: Path) -> None:
    image_model().save(tmp_path)
    file = tmp_path / "model.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    part = description
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = number
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"model.json: not a model description") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["unet", "", "tvmatch.models.dit", "a\nb", "x" * 10_000])
def test_a_network_that_nobody_registered(kind: str, tmp_path: Path) -> None:
    """The description is right, but what it names has to be imported first, and by the user."""
    image_model().save(tmp_path)
    file = tmp_path / "model.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    description["network"]["kind"] = kind
    file.write_text(json.dumps(description))
    modules = set(sys.modules)
    with pytest.raises(InputError, match=r"model\.json: network\.kind: .* import the module") as caught:
        load(tmp_path)
    assert repr(kind)[:100] in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 400
    assert "\n" not in str(caught.value)
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("part", "name", "number"), [("network", "hidden_size", 2**32), ("data", "shape", [3, 2**32, 2**32])]
)
def test_a_description_of_more_than_there_is_memory(
    part: str, name: str, number: Any, tmp_path: Path
) -> None:
    image_model().save(tmp_path)
    file = tmp_path / "model.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    description[part][name] = number
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"model\.(json|safetensors)") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_of_other_data_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"MLP.*points"):
        build_network(SMALL_MLP, IMAGES.shape)
    with pytest.raises(InputError, match=r"DiT.*images"):
        build_network(SMALL_DIT, POINTS.shape)
