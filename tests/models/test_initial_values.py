"""Initial values belong to (seed, parameter name): in threads, on the meta device, inside wrappers."""

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OFF
from runs import TINY_DIT, TINY_MLP, assert_same_run, every_switch, images, tiny_config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tvmatch.data import Density
from tvmatch.models import MLP, PRESETS, DiT, DiTConfig, MLPConfig
from tvmatch.models.init import initialize
from tvmatch.training import Trainer
from tvmatch.training.state import untrained_network
from tvmatch.training.step import step_batches

SIZES = {"hidden_size": 16, "depth": 2, "heads": 2, "patch_size": 2, "time_frequencies": 8}
BUILD: dict[str, Callable[[int | None], DiT | MLP]] = {
    "DiT": lambda seed: DiT(DiTConfig(**SIZES), (3, 4, 4), 5, seed=seed),  # type: ignore[arg-type]
    "DiT without everything": lambda seed: DiT(
        DiTConfig(**SIZES, **dict.fromkeys(OFF, False)),
        (1, 4, 6),
        seed=seed,  # type: ignore[arg-type]
    ),
    "DiT with normal time embeddings": lambda seed: DiT(
        DiTConfig(**SIZES, time_embedding_init="normal"),
        (1, 4, 4),
        2,
        seed=seed,  # type: ignore[arg-type]
    ),
    "MLP": lambda seed: MLP(MLPConfig(hidden_size=12, depth=2, time_frequencies=8), (2,), 3, seed=seed),
}
networks = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved."""
    return {name: x.detach() for name, x in (*network.named_parameters(), *network.named_buffers())}


def assert_same(actual: nn.Module, expected: nn.Module, dtype: torch.dtype | None = None) -> None:
    ours, wanted = tensors(actual), tensors(expected)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        kept = dtype is None or name == "positions"  # these are float32 always
        assert torch.equal(ours[name], tensor if kept else tensor.to(dtype)), name


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """PyTorch's, NumPy's and Python's global generators stay as they were."""
    torch.manual_seed(11), np.random.seed(12), random.seed(13)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert str(after) == str(before[1])
    assert np.array_equal(after["state"]["key"], before[1]["state"]["key"])  # type: ignore[index,call-overload]
    assert random.getstate() == before[2]


# --- seeds


@networks
def test_values_are_the_seeds(build: Callable[[int | None], DiT | MLP]) -> None:
    with untouched_random_state():
        first, again, other = build(3), build(3), build(2**70)
    assert_same(first, again)
    drawn = [name for name, x in first.named_parameters() if x.unique().numel() > 1]
    assert len(drawn) > 8
    ours, theirs = tensors(first), tensors(other)
    assert not any(torch.equal(ours[name], theirs[name]) for name in drawn)
    numbers = torch.cat([ours[name].flatten() for name in drawn])
    # Each layer has numbers of its own: of a few thousand of 2²⁴ hardly any two are equal.
    assert len(numbers.unique()) > 0.99 * len(numbers)


@networks
def test_without_a_seed_pytorchs_decides(build: Callable[[int | None], DiT | MLP]) -> None:
    torch.manual_seed(5)
    first, second = build(None), build(None)
    torch.manual_seed(5)
    assert_same(build(None), first)
    assert not torch.equal(first.conditioning.time.expand.weight, second.conditioning.time.expand.weight)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        BUILD["MLP"](-1)


# --- names


def test_a_layer_starts_alike_in_every_network() -> None:
    """More blocks, classes or channels change no other parameter's values."""
    plain = tensors(DiT(DiTConfig(**SIZES), (1, 4, 4), seed=1))  # type: ignore[arg-type]
    larger = tensors(DiT(DiTConfig(**(SIZES | {"depth": 4})), (3, 4, 4), 7, seed=1))  # type: ignore[arg-type]
    shared = [name for name in plain if name in larger and plain[name].shape == larger[name].shape]
    assert len(shared) > 0.8 * len(plain)
    for name in shared:
        assert torch.equal(plain[name], larger[name]), name


@pytest.mark.parametrize("preset", PRESETS)
def test_no_parameter_is_called_like_a_wrapper(preset: str) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(preset=preset), (4, 32, 32), 1000)
    names = [name for name, _ in network.named_parameters()]
    assert not any(part in name.split(".") for name in names for part in ("module", "_orig_mod"))


class Wrapper(nn.Module):
    """As `DistributedDataParallel` and FSDP hold a network."""

    def __init__(self, module: nn.Module, name: str = "module") -> None:
        super().__init__()
        self.add_module(name, module)


def test_wrappers_change_no_value() -> None:
    expected = DiT(TINY_DIT, (1, 4, 4), 3, seed=8)
    network = DiT(TINY_DIT, (1, 4, 4), 3, seed=0)
    network.blocks[0] = torch.compile(network.blocks[0])  # type: ignore[assignment]
    network.conditioning.time = checkpoint_wrapper(network.conditioning.time)
    assert any("_orig_mod" in name for name, _ in network.named_parameters())
    network.init_weights(8)
    for mine, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    inner = DiT(TINY_DIT, (1, 4, 4), 3, seed=0)
    outer = Wrapper(torch.compile(Wrapper(Wrapper(inner), "_fsdp_wrapped_module")))  # type: ignore[arg-type]
    zeroed = [inner.head, inner.head_modulation.project, inner.blocks[0].modulation.project]
    initialize(outer, 8, spectral=True, time_embedding_std=None, zeroed=zeroed)
    assert_same(inner, expected)


def test_a_layer_without_a_rule_is_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"1\.weight: .*LayerNorm"):
        initialize(network, 0, spectral=False, time_embedding_std=None, zeroed=[])


# --- meta device, precision


def spoil(network: nn.Module) -> None:
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        tensor.detach().fill_(math.nan)  # what memory may hold


@networks
def test_from_the_meta_device(build: Callable[[int | None], DiT | MLP]) -> None:
    with untouched_random_state():
        with torch.device("meta"):
            deferred = build(None)
        assert all(x.is_meta for x in (*deferred.parameters(), *deferred.buffers()))
        deferred.to_empty(device="cpu")
        spoil(deferred)
        deferred.init_weights(4)
        assert_same(deferred, build(4))
    assert all(x.requires_grad for x in deferred.parameters())


@networks
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_another_precision(build: Callable[[int | None], DiT | MLP], dtype: torch.dtype) -> None:
    """The float32 values, rounded if they are converted before memory is written; no default has a say."""
    expected = build(4)
    torch.set_default_dtype(dtype)
    try:
        assert_same(build(4), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        deferred = build(None)
    for parameter in deferred.parameters():
        parameter.data = parameter.data.to(dtype)
    deferred.to_empty(device="cpu")
    deferred.init_weights(4)
    assert_same(deferred, expected, dtype)


def test_under_autocast() -> None:
    expected = BUILD["DiT"](4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(BUILD["DiT"](4), expected)


# --- trainers


def test_trainers_in_threads_start_from_their_seed(tmp_path: Path) -> None:
    """Eight at once, two of each seed and network: no random state of the process takes part."""
    configs = []
    for number in range(8):
        config = tiny_config()
        config.seed, config.network = number // 2 % 2, (TINY_DIT, TINY_MLP)[number // 4]
        config.objective.guidance_weight, config.objective.label_dropout = 1.0, 0.0
        configs.append(config)
    data = [images() if config.network is TINY_DIT else Density("moons") for config in configs]
    made: dict[int, Trainer] = {}
    together = threading.Barrier(len(configs))

    def build(number: int) -> None:
        together.wait()
        made[number] = Trainer(configs[number], data[number], tmp_path / str(number))

    with untouched_random_state():
        threads = [threading.Thread(target=build, args=(number,)) for number in range(len(configs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, config in enumerate(configs):
        expected = untrained_network(config, data[number].spec)
        assert_same(made[number].state.network, expected)


def test_runs_in_threads_are_those_of_one_thread(tmp_path: Path) -> None:
    """Two of one seed at once, from their initial weights to the last checkpoint."""
    Trainer(every_switch(), images(horizontal_flip=True), tmp_path / "alone").run()
    together = threading.Barrier(2)

    def run(name: str) -> None:
        together.wait()
        Trainer(every_switch(), images(horizontal_flip=True), tmp_path / name).run()

    with untouched_random_state():
        threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in ("first", "second"):
        assert_same_run(tmp_path / name, tmp_path / "alone")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_leaves_the_callers_random_numbers_alone(workers: int, tmp_path: Path) -> None:
    """Batches, every draw of a step, pictures, checkpoints and samples."""
    with untouched_random_state():
        config = every_switch(3, sample_every=2, data_workers=workers)
        model = Trainer(config, images(horizontal_flip=True), tmp_path).run()
        model.sample(count=3, steps=2)


def test_the_callers_random_numbers_change_no_batch() -> None:
    """Nor the seeds of data workers, which a data set of one's own might use."""
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = tiny_config(data_workers=2)
        with step_batches(WorkerNumbers(), config, range(2)) as batches:  # type: ignore[arg-type]
            drawn.append(torch.stack(list(batches)))  # type: ignore[arg-type]
    assert torch.equal(*drawn)
    assert not torch.equal(*drawn[0]), "each worker has numbers of its own"


class WorkerNumbers:
    """Its batches come from the global generator of the process that reads them."""

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        return torch.rand(size)
