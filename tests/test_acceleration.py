"""Recomputation and compilation change time and memory, not numbers."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NETWORKS, Inputs, in_direction_s, random_inputs, randomize_, relative_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tvmatch import acceleration
from tvmatch.acceleration import Recompute, accelerate
from tvmatch.config import recipe
from tvmatch.data.digits import digits
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models import DiT, DiTConfig
from tvmatch.objectives import tvm_loss
from tvmatch.training import Trainer
from tvmatch.training.non_finite import NonFiniteError

KINDS = ["DiT", "DiT without everything", "MLP of classes, in three dimensions"]
eager_compile = partial(torch.compile, backend="aot_eager")  # the whole of torch.compile but code generation


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Inputs]:
    network: Any = randomize_(NETWORKS[name]()).to(dtype)
    return network, random_inputs(network.shape, network.class_count, dtype=dtype)


def loss(network: nn.Module, inputs: Inputs) -> Tensor:
    """The TVM loss with the network as its own target."""
    x, t, s, labels, weight = inputs
    s_prime, noise = t.flip(0) * 0.5, x.flip(0)
    return tvm_loss(network, network, x, noise, t, s, s_prime, labels, weight, scaled=True).loss


def gradients(network: nn.Module, inputs: Inputs, function: Callable[..., Tensor] = loss) -> list[Tensor]:
    return list(torch.autograd.grad(function(network, inputs), list(network.parameters())))


@pytest.mark.parametrize("what", ["pointwise", "blocks"])
@pytest.mark.parametrize("name", KINDS)
def test_recomputation_changes_no_bit(name: str, what: Any) -> None:
    """The same operations on the same numbers, once more; an in-place change of what is kept would show."""
    network, inputs = build(name)
    names = list(network.state_dict())
    expected = gradients(network, inputs)
    accelerate(network, recompute=what)
    for actual, right in zip(gradients(network, inputs), expected, strict=True):
        assert right.any()
        assert torch.equal(actual, right)
    assert list(network.state_dict()) == names


def test_pointwise_recomputation_repeats_no_matrix_product() -> None:
    network, inputs = build("DiT")

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            gradients(network, inputs)
        return counter.get_total_flops()

    plain = count()
    accelerate(network, recompute="pointwise")
    assert count() == plain
    accelerate(network, recompute="blocks")
    assert count() > 1.1 * plain


def held(function: Callable[[], object]) -> int:
    """Bytes allocated by `function` and not freed while its result lives, counted by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del result
    return int(total)


def test_recomputation_saves_memory() -> None:
    """Blocks of ordinary proportions: without the pointwise activations less than 60 % remain."""
    torch.manual_seed(0)
    sizes = {}
    for what in ("none", "pointwise", "blocks"):
        network = randomize_(DiT(DiTConfig(hidden_size=64, depth=3, heads=2, patch_size=2), (1, 16, 16), 3))
        inputs = random_inputs((1, 16, 16), 3, batch=8, dtype=torch.float32)
        inputs = inputs._replace(s=Dual(inputs.s, torch.ones_like(inputs.s)))  # type: ignore[arg-type]
        accelerate(network, recompute=what)  # type: ignore[arg-type]
        held(lambda n=network, i=inputs: n(*i))  # type: ignore[misc]
        sizes[what] = held(lambda n=network, i=inputs: n(*i))  # type: ignore[misc]
    assert sizes["pointwise"] < 0.6 * sizes["none"]
    assert sizes["blocks"] < 0.4 * sizes["pointwise"]


@pytest.mark.parametrize("recompute", ["none", "pointwise", "blocks"])
@pytest.mark.parametrize("whole_up_to", [0, 8])
@pytest.mark.parametrize("name", KINDS)
def test_compiled_equals_eager(
    name: str, whole_up_to: int, recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for each pass (fullgraph); float64 sums in another order differ by some 1e-16."""
    monkeypatch.setattr(torch, "compile", eager_compile)
    monkeypatch.setattr(acceleration, "WHOLE_UP_TO", whole_up_to)
    torch.compiler.reset()
    network, inputs = build(name)
    names, expected = list(network.state_dict()), gradients(network, inputs)
    accelerate(network, recompute=recompute, compiled=True)
    for actual, right in zip(gradients(network, inputs), expected, strict=True):
        assert relative_error(actual, right) < 1e-12
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_has_a_forward_of_its_own(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", eager_compile)
    torch.compiler.reset()
    network, inputs = build("DiT")
    accelerate(network, recompute="blocks", compiled=compiled)
    before = network(*inputs)
    copied = copy.deepcopy(network)
    randomize_(copied, seed=1)
    assert torch.equal(network(*inputs), before)
    assert relative_error(copied(*inputs), before) > 0.1


def test_a_network_without_blocks_cannot_recompute() -> None:
    with pytest.raises(InputError, match=r"training\.recompute: blocks needs .*blocks, Linear has none"):
        accelerate(nn.Linear(1, 1), recompute="blocks")


def test_the_whole_objective_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    network, inputs = build("DiT")
    expected = gradients(network, inputs)
    compiled = gradients(network, inputs, eager_compile(loss, fullgraph=True))
    for actual, right in zip(compiled, expected, strict=True):
        assert relative_error(actual, right) < 1e-12


@pytest.mark.parametrize("recompute", ["none", "pointwise", "blocks"])
def test_blocks_share_one_compilation(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks, three graphs: the first block (whose input has no tangent yet), the others, plain."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    network = randomize_(DiT(DiTConfig(hidden_size=16, depth=12, heads=2, patch_size=2), (1, 4, 4), 3))
    inputs = random_inputs((1, 4, 4), 3, dtype=torch.float32)
    accelerate(network, recompute=recompute, compiled=True)
    network(*inputs._replace(s=Dual(inputs.s, torch.ones_like(inputs.s))))
    network(*inputs)
    assert counter.frame_count == 3


@pytest.mark.exhaustive
def test_inductor() -> None:
    """The real compiler, in float32: kernels that fuse round differently, by some 1e-7 a layer."""
    torch.compiler.reset()
    torch.manual_seed(0)
    network = randomize_(DiT(DiTConfig(hidden_size=16, depth=2, heads=2, patch_size=2), (1, 4, 4), 3))
    inputs = random_inputs((1, 4, 4), 3, dtype=torch.float32)
    expected = gradients(network, inputs)
    accelerate(network, recompute="pointwise", compiled=True)
    for actual, right in zip(gradients(network, inputs), expected, strict=True):
        assert relative_error(actual, right) < 1e-4


# As a run's options


def short_run(out: Path, steps: int = 4, **options: Any) -> Trainer:
    config = recipe("digits")
    config.training = replace(
        config.training, steps=steps, batch_size=8, sample_every=0, log_every=2, **options
    )
    config.network = DiTConfig(hidden_size=16, depth=2, heads=2, patch_size=2, time_frequencies=8)
    return Trainer(config, digits("train"), out, device="cpu")


def test_a_run_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains as without, logs the same quantities, and the checkpoint's names are the network's own."""
    monkeypatch.setattr(torch, "compile", eager_compile)
    torch.compiler.reset()
    plain = short_run(tmp_path / "plain").run()
    fast = short_run(tmp_path / "fast", compile=True, recompute="pointwise").run()
    for (name, right), (other, actual) in zip(
        plain.network.state_dict().items(), fast.network.state_dict().items(), strict=True
    ):
        assert name == other
        # AdamW divides by the gradient's size, so that a rounding of a small gradient shows.
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-5)
    keys = [
        (tmp_path / name / "log.jsonl").read_text().splitlines()[0].count('"') for name in ("plain", "fast")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("recompute", ["pointwise", "blocks"])
def test_recomputation_under_autocast_changes_no_bit(recompute: Recompute) -> None:
    """A step has several passes, and autocast would remember casts of weights from one to the next.

    That changes how their gradients are summed, so the plain network is compared without remembering.
    """
    found = []
    for what, remember in (("none", False), (recompute, True)):
        network, inputs = build("DiT")
        network, inputs = (
            network.float(),
            Inputs(*(x.float() if x.is_floating_point() else x for x in inputs)),
        )
        accelerate(network, recompute=what)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=remember):
            found.append(gradients(network, inputs, value_tangent_and_plain))
    names = [name for name, _ in network.named_parameters()]
    for name, actual, expected in zip(names, *found, strict=True):
        assert torch.equal(actual, expected) or not name.startswith("blocks."), name


def value_tangent_and_plain(network: nn.Module, inputs: Inputs) -> Tensor:
    """A number to which a pass with a tangent and one without contribute."""
    value, tangent = in_direction_s(network, inputs)
    plain: Tensor = network(*inputs)
    return value.square().sum() + tangent.square().sum() + plain.square().sum()


def test_a_compiled_run_names_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", eager_compile)
    torch.compiler.reset()
    trainer = short_run(tmp_path / "run", compile=True)
    with torch.no_grad():
        next(trainer.state.network.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: not finite: .*term"):
        trainer.run()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"training\.compile: .*C\+\+ compiler.*g\+\+ or clang\+\+"):
        short_run(tmp_path / "run", compile=True)


@pytest.mark.parametrize(("option", "value"), [("compile", "all"), ("recompute", "all")])
def test_unknown_value(option: str, value: object) -> None:
    config = recipe("digits").training
    with pytest.raises(InputError, match=rf"training\.{option}: must be .*got 'all'"):
        replace(config, **{option: value})
