"""An objective of one's own, and Flow Matching, in a whole run: nothing under src/ knows them by name."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from runs import TINY_MLP, assert_same_run, environment, images, tiny_config
from torch import Tensor

import tvmatch
from tvmatch.check import Setting, check_network, random_model
from tvmatch.cli import main, results
from tvmatch.condition import Condition
from tvmatch.config import Config
from tvmatch.config.parser import parse_config
from tvmatch.config.yaml_files import read_yaml
from tvmatch.data import Density
from tvmatch.dry_run.estimate import estimate
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap, Network, interpolate
from tvmatch.objectives import (
    FlowMatching,
    Inputs,
    Loss,
    Objective,
    draw_condition,
    flow_matching_loss,
    register_objective,
)
from tvmatch.seeds import RowDraws
from tvmatch.training import NonFiniteError, Trainer
from tvmatch.training.state import untrained_network


@register_objective("consistency of two jumps")
@dataclass
class TwoJumps(Objective):
    """Flow Matching, and that a jump from t to 0 is two jumps, by way of `middle` · t.

    Attributes:
        middle: where between 0 and t the first jump ends.
        weight: of the second term.
        target_ema: rate of the target's moving average.
        explode: makes the second term infinite for late times, for a test.
    """

    term_times: ClassVar = {"velocity": "t", "two_jumps": "t"}

    middle: float = 0.5
    weight: float = 0.1
    target_ema: float = 0.9
    explode: bool = False

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        t = draws.uniform("my times", rows).to(torch.float32)
        noise = draws.normal("my noise", rows, x0.shape[1:])
        return Inputs(x0, noise, {"t": t}, draw_condition(condition, null_label, self, draws, rows))

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        x0, noise, times, condition = inputs
        t = times["t"]
        x_t = interpolate(x0, noise, t)
        online, frozen = FlowMap(network), FlowMap(target)
        velocity = (online.velocity(x_t, t, condition) - (noise - x0)).square().flatten(1).mean(1)
        with torch.no_grad():
            first = frozen.displacement(x_t, t, self.middle * t, condition)
            second = frozen.displacement(x_t + first, self.middle * t, 0 * t, condition)
        jump = online.displacement(x_t, t, 0 * t, condition)
        two_jumps = self.weight * (jump - first - second).square().flatten(1).mean(1)
        if self.explode:
            two_jumps = torch.where(t > 0.75, torch.inf, two_jumps)
        return Loss((velocity + two_jumps).mean(), {"velocity": velocity, "two_jumps": two_jumps})


def config(objective: Objective, steps: int = 6) -> Config:
    made = tiny_config(steps)
    made.objective = objective
    return made


@pytest.mark.parametrize("objective", [TwoJumps(), FlowMatching()], ids=["own", "flow matching"])
def test_it_trains_logs_and_resumes(objective: Objective, tmp_path: Path) -> None:
    """Stopped and resumed, a run is that of one piece; the log has its terms, config.yaml its options."""
    Trainer(config(objective), images(), tmp_path / "whole", device="cpu").run()
    Trainer(config(objective), images(), tmp_path / "parts", device="cpu").run(until=3)
    again = parse_config(
        read_yaml(tmp_path / "parts" / "config.yaml") | {"data": {"kind": "digits"}}, "config.yaml"
    )
    assert again.objective == objective
    Trainer(config(objective), images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    row = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    terms = tuple(objective.term_times)
    assert [name for name in row if "/" not in name][:5][1 : 2 + len(terms)] == ["loss", *terms]
    assert row["loss"] == pytest.approx(sum(row[name] for name in terms), rel=1e-5)
    model = tvmatch.load(tmp_path / "whole")
    assert (model.scaled, model.guidance) == (False, 1.0)
    assert model.sample(count=2).isfinite().all()


def test_what_is_not_finite_has_the_name_of_its_term(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 1: not finite: the two_jumps term of \d samples with t in 0.75–1.00$"
    ):
        Trainer(config(TwoJumps(explode=True)), images(), tmp_path / "run", device="cpu").run()


def test_the_dry_run_and_the_check_take_it() -> None:
    """A pass for each use of the network, and none with a tangent; the gradient is right in float32."""
    counted = estimate(config(TwoJumps()), images().spec, on_gpu=False)
    assert counted.target > 0
    assert set(counted.flops) == {"forward", "forward, target", "backward"}
    assert counted.flops["forward"] == counted.flops["forward, target"]
    model = random_model("tiny/2")
    model.scaled, model.guidance = False, 1.0
    found = check_network(model, Setting(torch.device("cpu"), torch.float32), TwoJumps())
    assert [one.passed for one in found] == [True] * 4, found


def test_flow_matching_is_its_loss() -> None:
    """Of the inputs that it draws; a row's are the same in every range of rows."""
    objective, draws = FlowMatching(t=(0.5, 0.7), label_dropout=0.5), RowDraws(0, "step", 3)
    data = images()
    batch = data.batch(3, 16, 0)
    whole = objective.draw(batch.values, batch.condition, 3, draws, range(16))
    part = objective.draw(batch.values[4:9], Condition(batch.labels[4:9]), 3, draws, range(4, 9))  # type: ignore[index]
    for name in ("x0", "noise"):
        assert torch.equal(getattr(whole, name)[4:9], getattr(part, name))
    assert torch.equal(whole.times["t"][4:9], part.times["t"])
    assert whole.condition.labels is not None
    assert {0, 1, 2, 3} == set(whole.condition.labels.tolist())
    network = untrained_network(config(objective), data.spec)
    loss = objective.loss(network, network, whole)
    expected = flow_matching_loss(network, whole.x0, whole.noise, whole.times["t"], whole.condition.labels)
    torch.testing.assert_close(loss.loss, expected, rtol=1e-6, atol=0)
    assert loss.terms["velocity"].shape == (16,)


def test_the_logit_of_t_is_normal() -> None:
    x0 = torch.zeros(20_000, 1)
    inputs = FlowMatching(t=(0.5, 0.7)).draw(x0, Condition(), 0, RowDraws(0), range(20_000))
    logits = inputs.times["t"].double().logit()
    assert abs(logits.mean() - 0.5) < 5 * 0.7 / 20_000**0.5  # five standard errors
    assert abs(logits.std() - 0.7) < 5 * 0.7 / 40_000**0.5


def test_the_command_line_trains_flow_matching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of the recipe's objective that the other has too are kept; those that it lacks are unknown."""
    # One draw of each distance instead of five, which takes 13 seconds longer.
    monkeypatch.setattr(results, "evaluate_points", partial(results.evaluate_points, draws=1))
    out = tmp_path / "run"
    short = ["--training.steps=2", "--training.batch_size=8", "--training.sample_every=0", "--device=cpu"]
    tiny = [f"--network.{name}={getattr(TINY_MLP, name)}" for name in ("hidden_size", "depth")]
    arguments = [
        "train",
        "gaussians",
        "--objective.name=flow_matching",
        "--objective.t=[-1,2]",
        *short,
        *tiny,
    ]
    assert main([*arguments, f"--out={out}"]) == 0
    content = read_yaml(out / "config.yaml")
    assert content["objective"] == {"name": "flow_matching", "t": [-1.0, 2.0], "label_dropout": 0.0}
    assert "velocity" in (out / "log.jsonl").read_text()
    assert (out / "training.png").is_file()
    capsys.readouterr()
    assert main([*arguments, "--objective.detach_jvp=true"]) == 2
    assert "--objective.detach_jvp: no such option" in capsys.readouterr().err
    assert main(["train", "gaussians", "--objective.name=mean_flow"]) == 2
    assert "objective.name: must be one of flow_matching, tvm, " in capsys.readouterr().err


def test_a_name_belongs_to_one_objective() -> None:
    with pytest.raises(InputError, match="'tvm' is registered already"):
        register_objective("tvm")(TwoJumps)
    assert Density("moons").spec.is_conditional is False


def test_a_configuration_of_an_objective_that_is_not_there(tmp_path: Path) -> None:
    """Another process does not know it: one line, and nothing is imported by a file's leave.

    With --import it goes on, to what is wrong next: these are not the digits.
    """
    Trainer(config(TwoJumps(), steps=2), images(), tmp_path / "run", device="cpu").run()
    command = [sys.executable, "-m", "tvmatch", "train", "--resume", str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
