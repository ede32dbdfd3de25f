"""Runs that start from a checkpoint, and runs whose target is a frozen teacher."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize_
from image_files import PHOTOGRAPHS
from runs import SHORT_RUN, TINY_DIT, assert_same_run, images, newest, saved_tensors, tiny_config
from torch import Tensor, nn

from tvmatch import InputError, TrainedModel, load
from tvmatch.cli import main
from tvmatch.config import Config
from tvmatch.data import DataSpec, TensorDataset
from tvmatch.flow_map import FlowMap
from tvmatch.models import DiT, DiTConfig
from tvmatch.objectives import tvm_loss
from tvmatch.training import Trainer
from tvmatch.training.distillation import GuidedTeacher
from tvmatch.training.step import draw_inputs

LABELS = "conditioning.label.weight"


def teacher(
    folder: Path,
    *,
    guidance: float | tuple[float, float] = 1.0,
    scaled: bool = False,
    spec: DataSpec | None = None,
    **switches: Any,
) -> Path:
    """A checkpoint of random weights for `images()`."""
    spec = images().spec if spec is None else spec
    config = DiTConfig(**(vars(TINY_DIT) | switches))
    torch.manual_seed(1)
    network = randomize_(DiT(config, spec.shape, spec.class_count))
    folder.mkdir(parents=True)
    TrainedModel(network, spec, scaled=scaled, guidance=guidance, step=7).save(folder)
    return folder


def fine_tuning(initial: Path, **objective: Any) -> Config:
    config = tiny_config(4)
    config.initial = str(initial)
    config.network = deepcopy(load(initial).network.config)  # type: ignore[arg-type]
    for name, value in objective.items():
        setattr(config.objective, name, value)
    return config


def assert_equal_weights(network: nn.Module, expected: nn.Module) -> None:
    ours, theirs = network.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_everything_starts_at_the_checkpoint(tmp_path: Path) -> None:
    """The weights that train, and both averages."""
    initial = teacher(tmp_path / "initial")
    made = Trainer(fine_tuning(initial), images(), tmp_path / "run", device="cpu")
    assert made.state.target is not None
    for network in (made.state.network, made.state.target.network, made.state.evaluation.network):
        assert_equal_weights(network, load(initial).network)
    assert any("7 steps" in message for message in made.messages)


def test_a_new_guidance_embedding_changes_nothing_at_first(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial", guidance_embedding=False)
    config = fine_tuning(initial, guidance_weight=(1.0, 2.0))
    config.network.guidance_embedding = True
    made = Trainer(config, images(), tmp_path / "run", device="cpu")
    draws = draw_inputs(images().batch(0, 8, 0), images().spec, config, 0, torch.device("cpu"))
    arguments = (draws.x0, draws.times["t"], draws.times["s"], draws.condition.labels)
    for weight in (None, torch.full((8,), 1.7)):
        assert torch.equal(made.state.network(*arguments, weight), load(initial).network(*arguments))
    made.run()
    trained = made.state.network.conditioning.guidance.project.weight  # type: ignore[union-attr]
    assert trained.any(), "it learns"


def test_new_classes_start_as_the_dropped_label(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial")
    # Four numbered classes, the checkpoint has three with names; then two of the three and a new one.
    data = TensorDataset(torch.rand(8, 1, 4, 4), [0, 1, 2, 3] * 2)
    made = Trainer(fine_tuning(initial), data, tmp_path / "run", device="cpu")
    table, theirs = made.state.network.state_dict()[LABELS], load(initial).network.state_dict()[LABELS]
    assert table.shape[0] == 5
    assert all(torch.equal(row, theirs[-1]) for row in table)
    assert any("4 of 4 classes are new" in message for message in made.messages)
    data = TensorDataset(torch.rand(3, 1, 4, 4), [0, 1, 2], class_names=["cow", "dog", "ant"])
    made = Trainer(fine_tuning(initial), data, tmp_path / "some", device="cpu")
    assert torch.equal(made.state.network.state_dict()[LABELS], theirs[[2, 3, 0, 3]])
    assert any("1 of 3 classes are new" in message for message in made.messages)


def test_numbered_classes_are_taken_in_their_order(tmp_path: Path) -> None:
    """An imported checkpoint knows its classes by number alone."""
    numbered = TensorDataset(torch.rand(3, 1, 4, 4), [0, 1, 2]).spec
    assert numbered.class_names == ("0", "1", "2")
    path = teacher(tmp_path / "initial", spec=numbered)
    made = Trainer(fine_tuning(path, teacher=str(path)), images(), tmp_path / "run", device="cpu")
    assert_equal_weights(made.state.network, load(path).network)
    assert any("in their order" in message for message in made.messages)
    two = TensorDataset(torch.rand(2, 1, 4, 4), [0, 1], class_names=["ant", "bee"])
    with pytest.raises(InputError, match="other classes"):
        Trainer(fine_tuning(path, teacher=str(path)), two, tmp_path / "two", device="cpu")


def test_a_scaled_start_at_another_velocity_is_told(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial")
    for weight, scaled in ((1.0, True), (1.5, False), (1.5, True)):
        config = fine_tuning(initial, guidance_weight=weight, scaled=scaled)
        made = Trainer(config, images(), tmp_path / "run", device="cpu")
        told = any("guidance_weight times" in message for message in made.messages)
        given = inputs(config) | {"guidance_weight": torch.full((8,), weight)}
        velocity = FlowMap(made.state.network, scaled).velocity(**given)
        kept = torch.equal(velocity, FlowMap(load(initial).network, False).velocity(**given))
        assert told is not kept


def test_a_preset_is_its_sizes(tmp_path: Path) -> None:
    """Imported checkpoints tell sizes, recipes a preset; and how weights began matters no more."""
    initial = teacher(tmp_path / "initial", hidden_size=64, depth=4, heads=2)
    config = fine_tuning(initial)
    config.network = DiTConfig("tiny/2", time_frequencies=4, spectral_init=False)
    made = Trainer(config, images(), tmp_path / "run", device="cpu")
    assert_equal_weights(made.state.network, load(initial).network)


def test_classes_can_be_left_out_and_come_anew(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial")
    plain = TensorDataset(torch.rand(8, 1, 4, 4))
    without = Trainer(fine_tuning(initial), plain, tmp_path / "without", device="cpu")
    assert LABELS not in without.state.network.state_dict()
    without.run()
    again = fine_tuning(newest(tmp_path / "without"))
    table = Trainer(again, images(), tmp_path / "again", device="cpu").state.network.state_dict()[LABELS]
    assert not table.any(), "a network without classes has nothing to add"


def test_a_resumed_fine_tuning_needs_its_start_no_more(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial")
    config = fine_tuning(initial, guidance_weight=1.5)
    Trainer(config, images(), tmp_path / "whole", device="cpu").run()
    Trainer(config, images(), tmp_path / "parts", device="cpu").run(until=2)
    shutil.rmtree(initial)
    Trainer(config, images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_goes_on_from_its_own_start(tmp_path: Path) -> None:
    initial = teacher(tmp_path / "initial")
    Trainer(fine_tuning(initial), images(), tmp_path / "run", device="cpu").run(until=2)
    config = fine_tuning(teacher(tmp_path / "other"))
    with pytest.raises(InputError, match=r"initial: .* started from .*initial, .* says .*other"):
        Trainer(config, images(), tmp_path / "run", device="cpu", resume=tmp_path / "run")
    config.initial = None
    with pytest.raises(InputError, match=r"says random weights"):
        Trainer(config, images(), tmp_path / "run", device="cpu", resume=tmp_path / "run")


def other_normalisation() -> DataSpec:
    return images(mean=[0.4]).spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spec": other_normalisation()},
            r"initial: the data's mean is \(0\.4,\) in .*, here it is \(0\.5,\)",
        ),
        ({"depth": 2}, r"network\.depth: .* was trained with 2, the configuration says 1"),
        (
            {"guidance": 2.0, "scaled": False},
            r"objective\.scaled: .* was trained with False, at guidance weight 2",
        ),
    ],
    ids=["normalisation", "network", "parameterisation"],
)
def test_a_start_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = fine_tuning(teacher(tmp_path / "fits"))
    config.initial = str(teacher(tmp_path / "other", **change))
    with pytest.raises(InputError, match=message):
        Trainer(config, images(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_the_network_of_the_start(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = DataSpec("image", (3, 8, 8), ("astronaut", "cat", "coffee", "rocket"), (0.5,) * 3, (0.5,) * 3)
    initial = teacher(tmp_path / "initial", spec=spec)
    arguments = ["train", "image_folder", f"--data.path={photographs}", "--data.resolution=8", *SHORT_RUN]
    arguments += ["--training.ema_warmup=false", "--device=cpu", f"--initial={initial}"]
    assert main([*arguments, f"--out={tmp_path / 'run'}"]) == 0
    trained = newest(tmp_path / "run")
    assert load(trained).network.config.depth == 1  # type: ignore[union-attr]
    assert load(trained).provenance["initial"] == str(initial)
    capsys.readouterr()
    assert main([*arguments, f"--out={tmp_path / 'deep'}", "--network.depth=2"]) == 2
    assert "network.depth" in capsys.readouterr().err
    assert main(["train", "image_folder", f"--initial={tmp_path / 'nothing'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "mine.yaml").write_text(f"initial: {initial}\n")
    in_a_file = [argument for argument in arguments if not argument.startswith("--initial")]
    in_a_file += [f"--config={tmp_path / 'mine.yaml'}", f"--out={tmp_path / 'same'}"]
    assert main(in_a_file) == 0
    assert saved_tensors(newest(tmp_path / "same")).keys() == saved_tensors(trained).keys()


@pytest.fixture
def photographs() -> Path:
    return PHOTOGRAPHS


def inputs(config: Config) -> dict[str, Tensor]:
    draws = draw_inputs(images().batch(0, 8, 0), images().spec, config, 0, torch.device("cpu"))
    return {"x": draws.x0, "s": draws.times["s"], "labels": torch.arange(8) % 4}  # 3 is the dropped label


def test_guidance_of_a_teacher_without(tmp_path: Path) -> None:
    """w u(c) + (1 − w) u(∅), and what it is divided by is what the student multiplies with."""
    model = load(teacher(tmp_path / "teacher"))
    given, weight = inputs(tiny_config()), torch.linspace(1, 2.5, 8)
    flow_map = FlowMap(model.network, scaled=False)
    conditional = flow_map.velocity(given["x"], given["s"], given["labels"])
    unconditional = flow_map.velocity(given["x"], given["s"], None)
    w = weight.view(-1, 1, 1, 1)
    for scaled in (False, True):
        student = FlowMap(GuidedTeacher(model, scaled=scaled), scaled)
        # The two sides round differently, a few units of 6e-8.
        torch.testing.assert_close(
            student.velocity(given["x"], given["s"], given["labels"], weight),
            w * conditional + (1 - w) * unconditional,
            rtol=1e-5,
            atol=1e-5,
        )
        assert torch.equal(student.velocity(given["x"], given["s"], None, torch.ones(8)), unconditional)
        assert torch.equal(student.velocity(given["x"], given["s"], given["labels"]), conditional)


@pytest.mark.parametrize("theirs", [False, True], ids=["plain", "scaled"])
def test_a_guided_teacher_is_asked_for_the_weight(tmp_path: Path, theirs: bool) -> None:
    model = load(teacher(tmp_path / "teacher", guidance=(1.0, 3.0), scaled=theirs))
    given, weight = inputs(tiny_config()), torch.linspace(1, 2.5, 8)
    expected = FlowMap(model.network, theirs).velocity(given["x"], given["s"], given["labels"], weight)
    for scaled in (False, True):
        student = FlowMap(GuidedTeacher(model, scaled=scaled), scaled)
        actual = student.velocity(given["x"], given["s"], given["labels"], weight)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # divided by w and multiplied


def test_distillation_uses_the_teacher_and_leaves_it_alone(tmp_path: Path) -> None:
    """The first loss is `tvm_loss` with the teacher as target; no average of the weights is kept for it."""
    path = teacher(tmp_path / "teacher")
    config = tiny_config(4)
    config.objective.teacher, config.objective.guidance_weight = str(path), 1.5
    made = Trainer(config, images(), tmp_path / "run", device="cpu")
    before = deepcopy(made.state.network)
    made.run()
    draws = draw_inputs(images().batch(0, 8, 0), images().spec, config, 0, torch.device("cpu"))
    target = GuidedTeacher(load(path), scaled=True)
    expected = tvm_loss(
        before, target, draws.x0, draws.noise, **draws.times, labels=draws.condition, scaled=True
    ).loss
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert made.teacher is not None
    assert_equal_weights(made.teacher.network, load(path).network)
    assert not any(name.startswith("target/") for name in saved_tensors(newest(tmp_path / "run")))
    assert load(tmp_path / "run").provenance["teacher"] == str(path)


def test_a_teacher_needs_no_dropped_labels(tmp_path: Path) -> None:
    config = tiny_config(4)
    config.objective.guidance_weight, config.objective.label_dropout = 1.5, 0.0
    with pytest.raises(InputError, match=r"objective\.label_dropout"):
        Trainer(config, images(), tmp_path / "run", device="cpu")
    config.objective.teacher = str(teacher(tmp_path / "teacher"))
    Trainer(config, images(), tmp_path / "run", device="cpu").run()


def test_a_distillation_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(4)
    config.objective.teacher = str(teacher(tmp_path / "teacher"))
    Trainer(config, images(), tmp_path / "whole", device="cpu").run()
    Trainer(config, images(), tmp_path / "parts", device="cpu").run(until=2)
    Trainer(config, images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": other_normalisation()}, r"objective\.teacher: the data's mean"),
        (
            {"guidance": 2.0},
            r"trained at guidance weight 2, and does not support objective\.guidance_weight 1\.5",
        ),
        ({"guidance": (2.0, 3.0)}, r"weight \[2\.0, 3\.0\], and does not support"),
        (
            {"spec": TensorDataset(torch.rand(4, 1, 4, 4), [0, 1, 2, 1], class_names=["x", "y", "z"]).spec},
            "other classes",
        ),
    ],
    ids=["normalisation", "guidance", "range of guidance", "classes"],
)
def test_a_teacher_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = tiny_config(4)
    config.objective.guidance_weight = 1.5
    config.objective.teacher = str(teacher(tmp_path / "teacher", **change))
    with pytest.raises(InputError, match=message):
        Trainer(config, images(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
