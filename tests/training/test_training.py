"""Training step, averages, optimiser, schedules, batches, and training on one's own tensors."""

import dataclasses
import itertools
import threading
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize_, relative_error
from runs import TINY_DIT, TINY_MLP, every_switch, images, newest, saved_tensors, tiny_config, tree
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import tvmatch
from tvmatch.condition import Condition
from tvmatch.config import Config
from tvmatch.config.schema import OptimizerConfig
from tvmatch.data import TensorDataset
from tvmatch.data.base import Batch
from tvmatch.errors import InputError
from tvmatch.models.ema import ParameterAverage
from tvmatch.objectives import Inputs, draw_condition, tvm_loss
from tvmatch.seeds import RowDraws
from tvmatch.training import Trainer, checkpoints
from tvmatch.training.log import read_log
from tvmatch.training.step import draw_inputs, step_batches, training_step

CPU = torch.device("cpu")


def trainer(config: Config, tmp_path: Path, **options: Any) -> Trainer:
    """With random weights everywhere: behind a head of zeros most gradients are zero."""
    made = Trainer(config, images(), tmp_path / "run", **options)
    randomize_(made.state.network)
    averages = [made.state.evaluation, *([made.state.target] if made.state.target else [])]
    for average in averages:
        average.network.load_state_dict(made.state.network.state_dict())
    return made


def step_inputs(made: Trainer, step: int = 0) -> Inputs:
    batch = made.dataset.batch(step, made.config.training.batch_size, made.config.seed)
    return draw_inputs(batch, made.dataset.spec, made.config, step, CPU)


def take_step(made: Trainer, draws: Inputs, step: int = 0) -> None:
    exact = torch.autocast("cpu", enabled=False)
    training_step(made.state.network, made.target, made.state.optimizer, draws, made.config, step, exact)


def gradients(network: nn.Module) -> Tensor:
    return torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])


def weights(network: nn.Module) -> Tensor:
    return torch.cat([x.detach().flatten() for x in network.parameters()])


# Batches and accumulation


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_nothing_but_memory(parts: int, tmp_path: Path) -> None:
    """The gradient of a mean is the mean of its parts' gradients."""
    whole = trainer(every_switch(), tmp_path)
    split = trainer(every_switch(), tmp_path)
    whole.config.training.accumulation, split.config.training.accumulation = 1, parts
    for each in (whole, split):
        each.config.optimizer.gradient_clip = None  # which would hide a wrong size
        take_step(each, step_inputs(each))
    # Sums in another order in float32: a few units of 1e-7 of a number of order one.
    assert relative_error(gradients(split.state.network), gradients(whole.state.network)) < 1e-5
    # AdamW's first step is lr · g / (|g| + ε), so weights differ by more only where |g| is near ε = 1e-8.
    assert relative_error(weights(split.state.network), weights(whole.state.network)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 11])
def test_parts_weigh_by_their_rows(count: int, tmp_path: Path) -> None:
    """In float64, the gradient of a batch that the number of parts does not divide, or is larger than."""
    made = trainer(every_switch(), tmp_path)
    made.config.optimizer.gradient_clip = None
    made.state.network.double()
    assert made.state.target is not None
    made.state.target.network.double()
    batch = made.dataset.batch(0, count, made.config.seed)
    draws = tree_map(
        lambda x: x.double() if x is not None and x.is_floating_point() else x,
        draw_inputs(batch, made.dataset.spec, made.config, 0, CPU),
    )
    exact = torch.autocast("cpu", enabled=False)
    found = {}
    for parts in (1, 2, 3, 4, 8, 100):
        made.config.training.accumulation = parts
        state = deepcopy(made.state)
        assert state.target is not None
        result = training_step(
            state.network, state.target.network, state.optimizer, draws, made.config, 0, exact
        )
        found[parts] = gradients(state.network)
        terminal, flow = result.loss.terms["terminal"], result.loss.terms["flow"]
        assert terminal.shape == flow.shape == (count,)
        mean = (terminal + flow).mean()
        torch.testing.assert_close(result.loss.loss, mean, rtol=1e-13, atol=0)
    assert found[1].norm() > 1e-3
    for gradient in found.values():
        assert relative_error(gradient, found[1]) < 1e-12  # float64 sums in another order


def test_an_empty_batch_is_refused(tmp_path: Path) -> None:
    made = trainer(tiny_config(), tmp_path)
    empty = Batch(torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64))
    with pytest.raises(InputError, match="batch: must not be empty"):
        draw_inputs(empty, made.dataset.spec, made.config, 0, CPU)
    with pytest.raises(InputError, match="inputs: must not be empty"):
        take_step(made, step_inputs(made).rows(slice(0, 0)))


def test_the_gradient_is_that_of_the_objective(tmp_path: Path) -> None:
    made = trainer(tiny_config(), tmp_path)
    draws = step_inputs(made)
    before = deepcopy(made.state.network)
    take_step(made, draws)
    x0, noise, times, condition = draws
    loss = tvm_loss(before, made.target, x0, noise, **times, labels=condition, scaled=True).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(gradients(made.state.network), gradients(before), rtol=0, atol=0)


def test_inputs_belong_to_the_seed_and_the_step(tmp_path: Path) -> None:
    made = trainer(every_switch(), tmp_path)
    first, again, second = (step_inputs(made, step) for step in (3, 3, 4))
    made.config.seed = 5
    other = step_inputs(made, 3)

    def parts(draws: Inputs) -> list[Tensor]:
        assert draws.condition.labels is not None
        assert draws.condition.guidance_weight is not None
        return [draws.noise, *draws.times.values(), draws.condition.labels, draws.condition.guidance_weight]

    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    for different in (second, other):
        assert not any(torch.equal(a, b) for a, b in zip(parts(first), parts(different), strict=True))


@pytest.mark.parametrize("cuts", [[1], [5, 6, 300], [256, 512]], ids=str)
def test_inputs_belong_to_the_row(cuts: list[int]) -> None:
    """A process that draws some rows of a step draws what one that draws all of them has there."""
    config, data = every_switch(), images()
    batch = data.batch(3, 600, config.seed)
    assert batch.labels is not None
    whole = draw_inputs(batch, data.spec, config, 3, CPU)
    for start, stop in itertools.pairwise([0, *cuts, 600]):
        x0, labels = data.spec.normalize(batch.values[start:stop]), batch.labels[start:stop]
        draws, rows = RowDraws(config.seed, "step", 3), range(start, stop)
        drawn = config.objective.draw(x0, Condition(labels), data.spec.class_count, draws, rows)
        for mine, all_rows in zip(tree_leaves(drawn), tree_leaves(whole), strict=True):
            assert mine is all_rows or torch.equal(mine, all_rows[start:stop])
    first = draw_inputs(Batch(batch.values[:9], batch.labels[:9]), data.spec, config, 3, CPU)
    assert torch.equal(first.noise, whole.noise[:9])


def test_one_draw_does_not_change_another() -> None:
    """Without dropped labels and t = s the noise, s, s' and the weights are what they were with them."""
    config, data = every_switch(), images()
    batch = data.batch(0, 64, 0)
    before = draw_inputs(batch, data.spec, config, 0, CPU)
    config.objective.label_dropout, config.objective.times.equal_probability = 0.0, 0.0
    after = draw_inputs(batch, data.spec, config, 0, CPU)
    assert before.condition.guidance_weight is not None
    assert after.condition.guidance_weight is not None
    kept = before.condition.labels != data.spec.class_count  # type: ignore[operator]
    assert 0 < kept.sum() < 64
    assert torch.equal(before.condition.guidance_weight[kept], after.condition.guidance_weight[kept])
    assert torch.equal(before.noise, after.noise)
    assert torch.equal(before.times["s"], after.times["s"])
    assert torch.equal(before.times["s_prime"], after.times["s_prime"])
    assert not torch.equal(before.times["t"], after.times["t"])


def test_dropped_labels_and_guidance_weights() -> None:
    """A tenth is dropped, with w = 1; the others have 1/w uniform between 1/3 and 1/1.5."""
    config = every_switch().objective
    config.label_dropout = 0.1
    labels = torch.arange(20_000) % 3
    dropped, weight, *_ = draw_condition(Condition(labels), 3, config, RowDraws(0), range(len(labels)))
    assert dropped is not None
    assert weight is not None
    gone = dropped == 3
    assert abs(gone.float().mean() - 0.1) < 0.01  # five standard deviations of 0.0021
    assert torch.equal(dropped[~gone], labels[~gone])
    assert (weight[gone] == 1).all()
    uniform = ((1 / weight[~gone] - 1 / 3) / (1 / 1.5 - 1 / 3)).sort().values
    distance = (uniform - torch.linspace(0, 1, len(uniform))).abs().max()
    assert distance < 1.95 / len(uniform) ** 0.5  # Kolmogorov–Smirnov, one in a thousand

    config.guidance_weight = 2.0
    dropped, weight, *_ = draw_condition(Condition(labels), 3, config, RowDraws(0), range(len(labels)))
    assert dropped is not None
    assert weight is not None
    assert torch.equal(weight, torch.where(dropped == 3, 1.0, 2.0))
    config.guidance_weight = 1.0
    condition = draw_condition(Condition(labels), 3, config, RowDraws(0), range(len(labels)))
    assert condition.guidance_weight is None  # saves the unconditional evaluation
    assert draw_condition(Condition(), 0, config, RowDraws(0), range(4)).labels is None


def test_other_processes_read_the_same_batches() -> None:
    config = tiny_config(data_workers=2)
    dataset = images(horizontal_flip=True)
    with step_batches(dataset, config, range(2, 7)) as read:
        batches = list(read)
    for step, batch in zip(range(2, 7), batches, strict=True):
        expected = dataset.batch(step, 8, config.seed)
        assert torch.equal(batch.values, expected.values)
        assert batch.labels is not None
        assert expected.labels is not None
        assert torch.equal(batch.labels, expected.labels)


# Moving averages


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_follow_their_recursion(warmup: bool, tmp_path: Path) -> None:
    """θ̄_n = Π r_k θ_0 + Σ_k (1 − r_k) (Π_{j > k} r_j) θ_k, with r_k = min(r, (1 + k)/(10 + k)) in warm-up."""
    made = trainer(tiny_config(12, evaluation_ema=0.9, ema_warmup=warmup), tmp_path)
    made.config.objective.target_ema = 0.5
    assert made.state.target is not None
    made.state.target.rate, made.state.evaluation.rate = 0.5, 0.9
    history = [weights(made.state.network).double()]
    for step in range(1, 13):
        made.run(until=step)
        history.append(weights(made.state.network).double())
    for average, rate in ((made.state.target, 0.5), (made.state.evaluation, 0.9)):
        rates = [min(rate, (1 + k) / (10 + k)) if warmup else rate for k in range(1, 13)]
        expected = history[0]
        for factor, later in zip(rates, history[1:], strict=True):
            expected = factor * expected + (1 - factor) * later
        torch.testing.assert_close(weights(average.network).double(), expected, rtol=1e-5, atol=1e-6)
        # The two rates and the warm-up are told apart by more than the tolerance.
        assert (weights(average.network) - weights(made.state.network)).abs().max() > 1e-4


def test_rates_come_from_the_configuration(tmp_path: Path) -> None:
    config = tiny_config(evaluation_ema=0.7, ema_warmup=True)
    config.objective.target_ema = 0.3
    state = Trainer(config, images(), tmp_path).state
    assert state.target is not None
    assert (state.target.rate, state.evaluation.rate) == (0.3, 0.7)
    assert state.target.warmup
    assert state.evaluation.warmup


def test_the_warm_up_of_an_average_ends() -> None:
    """(1 + n)/(10 + n) reaches r = 0.9 at n = 80; until then a linear layer's average runs ahead."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    slow, warm = (ParameterAverage(network, 0.9, warmup=warmup) for warmup in (False, True))
    nn.init.ones_(network.weight)
    for updates, expected in ((1, 1 - 2 / 11), (80, 0.1), (200, 0.1)):
        for average in (slow, warm):
            nn.init.zeros_(average.network.weight)  # type: ignore[arg-type]
            average.update(network, updates)
        assert weights(warm.network).item() == pytest.approx(expected, abs=1e-6)  # float32
        assert weights(slow.network).item() == pytest.approx(0.1, abs=1e-6)


class _ZeroTensors(torch.autograd.Function):
    """Fails in the backward pass like code that PyTorch 2.13 compiles for some `torch.func.jvp`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        raise RuntimeError("ZeroTensors are immutable. Please use the materialized zero tensor …")


class Uncompilable(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any) -> Any:
        return tree_map(
            lambda x: _ZeroTensors.apply(x) if isinstance(x, Tensor) else x, self.network(*arguments)
        )


def test_a_network_that_pytorch_cannot_compile_is_named(tmp_path: Path) -> None:
    """PyTorch compiles it and then fails in the first step; the real failure takes minutes to compile."""
    made = trainer(tiny_config(), tmp_path)
    made.state.network = Uncompilable(made.state.network)
    with pytest.raises(RuntimeError, match="ZeroTensors"):
        take_step(made, step_inputs(made))
    made.config.training.compile = True
    with pytest.raises(
        InputError,
        match=r"^training\.compile: PyTorch .* cannot compile Uncompilable .*training\.compile=false$",
    ):
        take_step(made, step_inputs(made))


def test_both_averages_start_at_the_initial_weights(tmp_path: Path) -> None:
    state = Trainer(tiny_config(), images(), tmp_path).state
    assert state.target is not None
    assert torch.equal(weights(state.target.network), weights(state.network))
    assert torch.equal(weights(state.evaluation.network), weights(state.network))


def test_the_target_receives_no_gradient(tmp_path: Path) -> None:
    made = trainer(every_switch(), tmp_path)
    made.run(until=3)
    assert made.state.target is not None
    for network in (made.state.target.network, made.state.evaluation.network):
        assert all(x.grad is None and not x.requires_grad for x in network.parameters())


def test_without_an_average_the_network_is_its_own_target(tmp_path: Path) -> None:
    """And the gradient is that with a frozen copy of it as target."""
    config = every_switch()
    config.objective.target_ema = 0.0
    made = trainer(config, tmp_path)
    assert made.state.target is None
    assert made.target is made.state.network
    frozen = deepcopy(made.state.network).requires_grad_(False)
    draws = step_inputs(made)
    twin = deepcopy(made.state)
    exact = torch.autocast("cpu", enabled=False)
    training_step(twin.network, frozen, twin.optimizer, draws, config, 0, exact)
    take_step(made, draws)
    assert torch.equal(gradients(made.state.network), gradients(twin.network))
    assert gradients(made.state.network).any()


# Optimiser


def test_schedule() -> None:
    """Warm-up over 10 steps, constant, linear decay over the last 40 of 100, to a fortieth at the end."""
    settings = OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=0.4)
    rates = [settings.rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (k + 1) / 10 for k in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert rates[60:] == pytest.approx([2.0 * (100 - k) / 40 for k in range(60, 100)])
    assert rates[-1] == pytest.approx(2.0 / 40)
    constant = OptimizerConfig(learning_rate=3e-4)
    assert [constant.rate_at(step, 7) for step in range(7)] == [3e-4] * 7
    triangle = OptimizerConfig(learning_rate=1.0, warmup_steps=5, decay_fraction=1.0)
    assert [triangle.rate_at(step, 5) for step in range(5)] == pytest.approx([0.2, 0.32, 0.36, 0.32, 0.2])


def test_the_schedule_is_the_one_used(tmp_path: Path) -> None:
    config = every_switch()
    Trainer(config, images(), tmp_path).run()
    logged = [row["learning_rate"] for row in read_log(tmp_path)]
    assert logged == [config.optimizer.rate_at(step, 8) for step in range(8)]
    assert len(set(logged)) > 4


def test_adamw_is_the_configurations(tmp_path: Path) -> None:
    """Three steps by hand, in float64, from the gradients and the settings alone."""
    config = tiny_config()
    settings = OptimizerConfig(
        learning_rate=1e-2,
        beta1=0.8,
        beta2=0.7,
        epsilon=1e-3,
        weight_decay=0.3,
        warmup_steps=2,
        decay_fraction=0.5,
        gradient_clip=None,
    )
    config.optimizer = settings
    made = trainer(config, tmp_path)
    theta = weights(made.state.network).double()
    first = second = torch.zeros_like(theta)
    for step in range(3):
        take_step(made, step_inputs(made, step), step)
        gradient = gradients(made.state.network).double()
        rate = settings.rate_at(step, 8)
        first = 0.8 * first + 0.2 * gradient
        second = 0.7 * second + 0.3 * gradient**2
        theta = theta * (1 - rate * 0.3)
        corrected = second / (1 - 0.7 ** (step + 1))
        theta = theta - rate * first / (1 - 0.8 ** (step + 1)) / (corrected.sqrt() + 1e-3)
        # float32 holds weights of order one to 1e-7.
        torch.testing.assert_close(weights(made.state.network).double(), theta, rtol=1e-6, atol=1e-6)


def test_gradient_clipping(tmp_path: Path) -> None:
    """The gradient is scaled to the largest norm allowed, and not at all below it; the log has the whole."""
    results = {}
    for clip in (None, 0.01, 1e6):
        config = tiny_config()
        config.optimizer.gradient_clip = clip
        made = trainer(config, tmp_path)
        take_step(made, step_inputs(made))
        results[clip] = gradients(made.state.network)
    norm = results[None].norm()
    assert norm > 0.1
    torch.testing.assert_close(results[0.01], results[None] * 0.01 / norm)
    assert torch.equal(results[1e6], results[None])
    config = tiny_config()
    config.optimizer.gradient_clip = 0.01
    trainer(config, tmp_path).run(until=1)
    assert read_log(tmp_path / "run")[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_bfloat16_keeps_weights_and_averages_in_float32(tmp_path: Path) -> None:
    config = tiny_config()
    config.training.precision = "bfloat16"
    made = trainer(config, tmp_path)
    full = trainer(tiny_config(), tmp_path)
    assert made._autocast().fast_dtype == torch.bfloat16
    made.run(until=1)
    take_step(full, step_inputs(full))
    error = relative_error(gradients(made.state.network), gradients(full.state.network))
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: 4e-3 a rounding
    tensors = saved_tensors(newest(tmp_path / "run"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# From Python


def test_training_on_own_tensors(tmp_path: Path) -> None:
    """As in the README, on fewer and smaller images."""
    values = torch.rand(30, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 2
    config = tvmatch.recipe("digits")
    config.network = TINY_DIT
    config.training.steps = 6
    config.training.batch_size = 8
    config.objective.guidance_weight = 1.5
    config.objective.label_dropout = 0.1
    before = deepcopy(config)
    data = TensorDataset(values, labels, class_names=["cat", "dog"])
    model = tvmatch.train(config, data, out=tmp_path / "mine")
    assert config == before  # the caller's own
    samples = model.sample(labels="cat", count=16, steps=2)
    assert samples.shape == (16, 3, 4, 6)
    assert torch.equal(tvmatch.load(tmp_path / "mine").sample(labels="cat", count=16, steps=2), samples)

    with pytest.raises(InputError, match=r"out: .*mine holds another run"):
        tvmatch.train(config, data, out=tmp_path / "mine")
    config.training.steps = 8
    assert tvmatch.train(config, data, out=tmp_path / "mine", resume=True).step == 8


def test_training_in_a_thread(tmp_path: Path) -> None:
    """Only the main thread may handle signals; another one trains just the same."""
    found: list[tvmatch.TrainedModel] = []
    thread = threading.Thread(
        target=lambda: found.append(tvmatch.train(tiny_config(), images(), tmp_path / "thread"))
    )
    thread.start()
    thread.join()
    (model,) = found
    main = tvmatch.train(tiny_config(), images(), tmp_path / "main")
    assert torch.equal(model.sample(), main.sample())


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    """Initial weights belong to the seed, whatever PyTorch's global generator says, and do not reset it."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = Trainer(tiny_config(), images(), tmp_path).state.network
    assert torch.equal(torch.rand(3), expected)
    two = Trainer(tiny_config(), images(), tmp_path).state.network
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("training", "steps", 0),
        ("training", "batch_size", 2.5),
        ("training", "accumulation", 3),
        ("training", "evaluation_ema", 1.0),
        ("objective", "guidance_weight", 0.5),
        ("optimizer", "learning_rate", float("nan")),
        ("objective.times", "equal_probability", -1.0),
        ("network", "depth", 0),
    ],
)
def test_a_value_out_of_range_is_found_before_training(
    section: str, name: str, value: Any, tmp_path: Path
) -> None:
    """Even if it is set after the configuration was made, which no dataclass checks."""
    config = tiny_config()
    config.network = deepcopy(config.network)
    setattr(attrgetter(section)(config), name, value)
    with pytest.raises(InputError, match=rf"^{section}\.{name}: "):
        tvmatch.train(config, images(), tmp_path / "run")
    assert tree(tmp_path) == {}


def test_a_network_must_fit_the_data(tmp_path: Path) -> None:
    config = tiny_config()
    config.network = TINY_MLP
    with pytest.raises(InputError, match="an MLP takes points"):
        tvmatch.train(config, images(), tmp_path / "run")
    config.network = None
    with pytest.raises(InputError, match="network: must be the configuration of a registered network"):
        tvmatch.train(config, images(), tmp_path / "run")
    config.network = dataclasses.replace(TINY_DIT, hidden_size=4_000_000)
    with pytest.raises(InputError, match="network: too large for the memory of this machine"):
        tvmatch.train(config, images(), tmp_path / "run")
    config = tiny_config()
    config.objective.guidance_weight = 2.0
    unlabelled = TensorDataset(torch.rand(9, 1, 4, 4))
    with pytest.raises(InputError, match=r"objective\.guidance_weight: must be 1 for data without classes"):
        tvmatch.train(config, unlabelled, tmp_path / "run")
    assert tree(tmp_path) == {}


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"out: .* is not an empty folder"):
        tvmatch.train(tiny_config(), images(), tmp_path)
    with pytest.raises(InputError, match=r"resume: .* is not a run, it has no config.yaml"):
        tvmatch.train(tiny_config(), images(), tmp_path, resume=True)
    with pytest.raises(InputError, match=r"letter.txt is not an empty folder"):
        tvmatch.train(tiny_config(), images(), tmp_path / "letter.txt")
    assert tree(tmp_path) == before


def test_a_resumed_run_must_fit_its_checkpoint(tmp_path: Path) -> None:
    Trainer(tiny_config(), images(), tmp_path).run(until=3)
    before = tree(tmp_path)

    def refused(config: Config, dataset: TensorDataset, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Trainer(config, dataset, tmp_path, resume=tmp_path)

    config = tiny_config()
    config.network = dataclasses.replace(config.network, depth=2)
    refused(config, images(), r"step_0000003: its network.depth is 1, the configuration's 2")
    config = tiny_config()
    config.network = dataclasses.replace(config.network, qk_norm=False)
    refused(config, images(), r"its network.qk_norm is True, the configuration's False")
    config = tiny_config()
    config.objective.scaled = False
    refused(config, images(), r"its scaled is True, the configuration's False")
    config = tiny_config()
    config.objective.guidance_weight = 2.0
    refused(config, images(), r"its guidance is 1.0, the configuration's 2.0")
    other = TensorDataset(torch.rand(9, 3, 4, 4), [0, 1, 2] * 3, class_names=["ant", "bee", "cow"])
    refused(tiny_config(), other, r"its data.shape is \[1, 4, 4\], the configuration's \[3, 4, 4\]")
    renamed = TensorDataset(torch.rand(9, 1, 4, 4), [0, 1, 2] * 3, class_names=["ant", "bee", "dog"])
    refused(tiny_config(), renamed, r"its data.class_names is \['ant', 'bee', 'cow'\]")
    config = tiny_config()
    config.network = TINY_MLP
    points = TensorDataset(torch.rand(9, 2))
    refused(config, points, r"its network.kind is dit, the configuration's mlp")
    assert tree(tmp_path) == before
    assert len(checkpoints(tmp_path)) == 1
