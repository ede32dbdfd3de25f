"""What is wrong with a custom objective is named in one line, before it can harm a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runs import images, tiny_config
from torch import Tensor

from tvmatch import InputError
from tvmatch.condition import Condition
from tvmatch.flow_map import Network
from tvmatch.objectives import FlowMatching, Inputs, Loss, register_objective
from tvmatch.objectives.registry import objectives_by_name
from tvmatch.seeds import RowDraws
from tvmatch.training import NonFiniteError, Trainer


def train(objective: FlowMatching, out: Path) -> None:
    Trainer(replace(tiny_config(1), objective=objective), images(), out).run()


@dataclass
class Wrong(FlowMatching):
    """Flow Matching whose loss is changed by `change`."""

    term_times: ClassVar = {"velocity": "t"}

    def change(self, loss: Loss) -> Loss:
        return loss

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        return self.change(super().loss(network, target, inputs))


def changed(function: Any, terms: Mapping[str, str] = {"velocity": "t"}) -> FlowMatching:
    kind = type("Changed", (Wrong,), {"change": lambda self, loss: function(loss), "term_times": terms})
    objective: FlowMatching = kind()
    return objective


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda loss: loss._replace(loss=loss.terms["velocity"]), r"the loss must be a scalar, got shape \("),
        (lambda loss: loss._replace(terms={}), r"the loss has the terms \[\], term_times has \['velocity'\]"),
        (
            lambda loss: loss._replace(terms={"velocity": loss.loss}),
            r"velocity must have shape \(\d+,\), got \(\)",
        ),
        (
            lambda loss: loss._replace(terms={"velocity": loss.terms["velocity"][:, None].expand(-1, 2)}),
            r"velocity must have shape \(\d+,\), got \(\d+, 2\)",
        ),
    ],
)
def test_a_wrong_loss(function: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^objective: .*{message}"):
        train(changed(function), tmp_path)


def test_a_term_of_no_time(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^objective: .* velocity has the time r, but draw returns \['t'\]"):
        train(changed(lambda loss: loss, {"velocity": "r"}), tmp_path)


@dataclass
class Untimed(FlowMatching):
    """Flow Matching that calls its time r."""

    term_times: ClassVar = {"velocity": "r"}

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        inputs = super().draw(x0, condition, null_label, draws, rows)
        return inputs._replace(times={"r": inputs.times["t"]})


def test_no_time_of_the_network(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^objective: Untimed draws no time t: override network_times"):
        train(Untimed(), tmp_path)


def test_a_loss_that_is_not_finite_though_its_terms_are(tmp_path: Path) -> None:
    broken = changed(lambda loss: loss._replace(loss=loss.loss * torch.nan))
    with pytest.raises(NonFiniteError, match=r"^step 1: not finite: the loss, of which every term is finite"):
        train(broken, tmp_path)


def test_a_term_must_not_be_called_as_what_the_log_has() -> None:
    with pytest.raises(InputError, match=r"^term_times: the log has a quantity loss already"):
        register_objective("named_as_the_log")(type("Named", (Wrong,), {"term_times": {"loss": "t"}}))
    assert "named_as_the_log" not in objectives_by_name()


def test_a_class_may_be_defined_again() -> None:
    """As a cell of a notebook does, or a module that is reloaded; another class may not take the name."""

    def define() -> type[Wrong]:
        @dataclass
        class Again(Wrong):
            pass

        return Again

    first, second = (register_objective("again")(define()) for _ in range(2))
    assert first is not second
    assert objectives_by_name()["again"] is second
    with pytest.raises(InputError, match=r"^name: an objective 'again' is registered already"):
        register_objective("again")(Wrong)
