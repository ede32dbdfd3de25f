"""A loss or gradient that is not finite stops a run, says where, and leaves the last good checkpoint."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import randomize_
from runs import Disturbed, images, newest, saved_tensors, tiny_config
from torch import Tensor, nn

import tvmatch
from tvmatch.condition import Condition
from tvmatch.data.base import Batch
from tvmatch.dual import Dual
from tvmatch.objectives import TVM, Inputs, Loss
from tvmatch.objectives.times import Times
from tvmatch.training import NonFiniteError, Trainer, checkpoints, non_finite
from tvmatch.training.step import draw_inputs, training_step

INFINITE = float("inf")


def infinite_at(step: int) -> Disturbed:
    def disturb(at: int, batch: Batch) -> Batch | None:
        if at != step:
            return None
        values = batch.values.clone()
        values[:2] = INFINITE
        return batch._replace(values=values)

    return Disturbed(images(), disturb)


def test_infinite_data(tmp_path: Path) -> None:
    """The step is numbered as in the log: 7 is the one after the checkpoint of step 6."""
    trainer = Trainer(tiny_config(), infinite_at(6), tmp_path)
    with pytest.raises(NonFiniteError, match=r"^step 7: not finite: the data of 2 of 8 samples$"):
        trainer.run()
    assert newest(tmp_path).name == "step_0000006"
    # The state is that of the checkpoint: the step changed nothing.
    for name, tensor in saved_tensors(newest(tmp_path)).items():
        if name.startswith("network/"):
            assert torch.equal(trainer.state.network.state_dict()[name.removeprefix("network/")], tensor)
    assert tvmatch.load(tmp_path).step == 6
    resumed = Trainer(tiny_config(), images(), tmp_path, resume=tmp_path)
    assert resumed.run().step == 8


@pytest.mark.parametrize("accumulation", [1, 4])
def test_weights_that_are_not_finite(accumulation: int, tmp_path: Path) -> None:
    config = tiny_config(accumulation=accumulation)
    trainer = Trainer(config, images(), tmp_path)
    trainer.run(until=4)
    with torch.no_grad():
        next(trainer.state.network.parameters())[0] = float("nan")
    before = [x.detach().clone() for x in trainer.state.network.parameters()]
    moments = deepcopy(trainer.state.optimizer.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("step 5: not finite: the terminal term of 8 samples with t in 0.")
    assert "; the flow term of 8 samples with s' in 0." in message
    after = list(trainer.state.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    state = trainer.state.optimizer.state_dict()["state"]
    assert all(torch.equal(state[k]["exp_avg"], moments["state"][k]["exp_avg"]) for k in state)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_0000003", "step_0000004"]


def test_a_learning_rate_that_explodes(tmp_path: Path) -> None:
    """Whatever breaks first, the loss or the state to be saved: it stops, and no bad state is saved."""
    config = tiny_config(60, checkpoint_every=1, keep_checkpoints=None)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match=r"^step \d+: not finite: "):
        Trainer(config, images(), tmp_path).run()
    for checkpoint in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in saved_tensors(checkpoint).values())


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """A second moment that overflows would stop a parameter for ever, with every loss finite."""
    trainer = Trainer(tiny_config(), images(), tmp_path)
    trainer.run(until=3)
    parameter = trainer.state.network.head.weight
    trainer.state.optimizer.state[parameter]["exp_avg_sq"].fill_(INFINITE)
    with pytest.raises(NonFiniteError, match=r"^step 6: not finite: exp_avg_sq/head.weight; .* not saved"):
        trainer.run()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_0000003"]


class _Broken(torch.autograd.Function):
    """The identity, with an infinite gradient in the rows that are marked."""

    @staticmethod
    def forward(ctx, x: Tensor, marked: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(marked)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        (marked,) = ctx.saved_tensors
        return torch.where(marked.view(-1, 1, 1, 1), INFINITE, gradient), None


class BrokenGradient(nn.Module):
    """A network whose values are finite but whose gradient is not, in one term and one bin of its time."""

    def __init__(self, network: nn.Module, term: str, low: float, high: float) -> None:
        super().__init__()
        self.network, self.term, self.low, self.high = network, term, low, high

    def forward(self, x: Tensor, t: Tensor, s: Tensor | Dual, *condition: Tensor | None) -> Tensor | Dual:
        output = self.network(x, t, s, *condition)
        if not torch.is_grad_enabled() or isinstance(s, Dual) != (self.term == "terminal"):
            return output  # type: ignore[no-any-return]
        marked = (t >= self.low) & (t < self.high)
        if isinstance(output, Dual):
            return output._replace(value=_Broken.apply(output.value, marked))  # type: ignore[no-untyped-call]
        return _Broken.apply(output, marked)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize(
    ("term", "where"), [("terminal", "terminal term with t"), ("flow", "flow term with s'")]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite(term: str, where: str, accumulation: int, tmp_path: Path) -> None:
    """Both terms are finite; the report finds the term and the bin by taking the gradient apart."""
    config = tiny_config(batch_size=64, accumulation=accumulation)
    trainer = Trainer(config, images(), tmp_path)
    network = BrokenGradient(randomize_(trainer.state.network), term, 0.5, 0.75)
    draws = draw_inputs(trainer.dataset.batch(0, 64, 0), trainer.dataset.spec, config, 0, torch.device("cpu"))
    before = deepcopy(network.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        training_step(
            network,
            trainer.target,
            trainer.state.optimizer,
            draws,
            config,
            0,
            torch.autocast("cpu", enabled=False),
        )
    expected = rf"step 1: not finite: the gradient of the {re.escape(where)} in 0.50–0.75, in \d+ param"
    assert re.match(expected, str(caught.value)), caught.value
    assert "first network." in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def inputs(times: Times) -> Inputs:
    return Inputs(torch.zeros(4, 2), torch.zeros(4, 2), times._asdict(), Condition())


def test_a_norm_that_overflows() -> None:
    """Every gradient is finite, but their sum of squares is not."""
    network = nn.Linear(1, 1, bias=False)
    network.weight.grad = torch.full_like(network.weight, 1e30)
    zeros = torch.zeros(4)
    loss = Loss(zeros.mean(), {"terminal": zeros, "flow": zeros})
    message = non_finite.describe(
        9,
        inputs(Times(zeros, zeros, zeros)),
        loss,
        TVM.term_times,
        network,
        lambda rows: loss,
        rows_at_once=4,
    )
    assert message == (
        "step 9: not finite: the norm of the gradient overflows "
        "(both terms are finite, and so is the gradient itself)"
    )


def test_bins() -> None:
    times = [0.0, 0.2499, 0.25, 0.5, 0.9999, 1.0]
    names = ["0.00–0.25", "0.00–0.25", "0.25–0.50", "0.50–0.75", "0.75–1.00", "0.75–1.00"]
    assert [non_finite.time_bin(time) for time in times] == names
    assert non_finite.bin_of(torch.tensor(times)).tolist() == [0, 0, 1, 2, 3, 3]


def test_every_broken_term_and_bin_is_named() -> None:
    nan = float("nan")
    terms = {"terminal": torch.tensor([nan, 1.0, INFINITE, 1.0]), "flow": torch.tensor([1.0, 1.0, 1.0, nan])}
    loss = Loss(torch.tensor(nan), terms)
    times = Times(
        t=torch.tensor([0.1, 0.5, 0.9, 0.9]), s=torch.zeros(4), s_prime=torch.tensor([0.1, 0.1, 0.1, 0.3])
    )
    message = non_finite.describe(
        1, inputs(times), loss, TVM.term_times, nn.Linear(1, 1), lambda rows: loss, rows_at_once=4
    )
    assert message == (
        "step 1: not finite: the terminal term of 2 samples with t in 0.00–0.25 and 0.75–1.00; "
        "the flow term of 1 samples with s' in 0.25–0.50"
    )
