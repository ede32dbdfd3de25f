"""Initial weights (TVM appendix B): each parameter is a function of the seed and its name."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tvmatch.models.layers import HeadNorm, TimeEmbedding
from tvmatch.seeds import generator

InitialValue = float | Callable[[Tensor, torch.Generator], object]
"""A constant, or a function that draws values in place."""

# Name parts that `torch.compile`, DistributedDataParallel, FSDP and checkpoint_wrapper insert.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@torch.no_grad()
def spectral_(weight: Tensor, random: torch.Generator) -> None:
    """Fill with Xavier-normal values divided by their largest singular value: Lipschitz constant 1.

    Args:
        weight: (out_features, in_features), changed in place.
        random: random number generator.
    """
    nn.init.xavier_normal_(weight, generator=random)
    # The eigenvalues of the smaller Gram matrix are faster to compute than an SVD.
    with torch.autocast(weight.device.type, enabled=False):
        gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    weight /= torch.linalg.eigvalsh(gram)[-1].sqrt()


@torch.no_grad()
def initialize(
    network: nn.Module,
    seed: int,
    *,
    spectral: bool,
    time_embedding_std: float | None,
    zeroed: Iterable[nn.Module],
) -> None:
    """Set every parameter of `network` to its initial value, in place.

    Values are drawn in float32 on the CPU and depend only on the seed and the parameter's name without the
    parts that wrappers such as `DistributedDataParallel` insert. Spectral norms may vary with the threads.

    Args:
        network: must have memory; its current values are not used.
        seed: a non-negative integer.
        spectral: draw linear weights by `spectral_`; otherwise Xavier-uniform as in DiT. Biases are zero.
        time_embedding_std: if given, weights of the time embeddings are N(0, std²) instead.
        zeroed: linear layers whose weights are zero.

    Raises:
        TypeError: for parameters of a layer class without a rule.
    """
    weights = _initial_weights(network, spectral, time_embedding_std) | dict.fromkeys(zeroed, 0.0)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if module not in weights:
                raise TypeError(f"{name}: there is no rule for initial values of a {type(module).__name__}")
            initial = 0.0 if name.endswith("bias") else weights[module]
            if isinstance(initial, float):
                parameter.fill_(initial)
                continue
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            initial(values, generator(seed, "initial", _without_wrappers(name)))
            parameter.copy_(values)


def _initial_weights(
    network: nn.Module, spectral: bool, time_embedding_std: float | None
) -> dict[nn.Module, InitialValue]:
    """The initial value of each layer's weight."""
    linear: InitialValue = spectral_ if spectral else _draw(nn.init.xavier_uniform_)
    initial: dict[nn.Module, InitialValue] = {}
    for module in network.modules():
        if isinstance(module, nn.Linear):
            initial[module] = linear
        elif isinstance(module, nn.Embedding):
            initial[module] = _draw(nn.init.normal_, std=0.02)
        elif isinstance(module, HeadNorm):
            initial[module] = 1.0
    if time_embedding_std is not None:
        for module in network.modules():
            if isinstance(module, TimeEmbedding):
                drawn = _draw(nn.init.normal_, std=time_embedding_std)
                initial |= dict.fromkeys((module.expand, module.project), drawn)
    return initial


def _draw(function: Callable[..., Tensor], **options: float) -> InitialValue:
    return lambda weight, random: function(weight, **options, generator=random)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def allocate(network: nn.Module) -> bool:
    """Allocate float32 memory for a network on the meta device, on PyTorch's default device.

    `Module.to_empty` does not support fake tensors, with which the dry run estimates memory.

    Returns:
        Whether there is memory for initial values: False if the default device is the meta device.
    """
    device = torch.get_default_device()
    if device.type == "meta":
        return False
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            setattr(module, name, nn.Parameter(memory))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return True


def seed_of_process() -> int:
    """A seed from PyTorch's global generator, which `torch.manual_seed` sets."""
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)  # a fake tensor has no value
