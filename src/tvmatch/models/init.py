"""Initial values of the networks (TVM appendix B), each a function of a seed and the parameter's name."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tvmatch.models.layers import HeadNorm, TimeEmbedding
from tvmatch.seeds import generator

Start = float | Callable[[Tensor, torch.Generator], object]
"""A constant, or what draws the values in place."""

# What `torch.compile`, DistributedDataParallel, FSDP and checkpoint_wrapper add to the names of parameters.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@torch.no_grad()
def spectral_(weight: Tensor, random: torch.Generator | None = None) -> None:
    """Xavier-normal divided by its largest singular value, in place: a linear map of Lipschitz constant 1.

    Args:
        weight: (out_features, in_features).
        random: where the numbers come from; by default PyTorch's global generator.
    """
    nn.init.xavier_normal_(weight, generator=random)
    # The smaller Gram matrix gives the same number as an SVD at a fraction of the time.
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
    """Give every parameter of `network` its initial value, in place.

    Values are drawn in float32 on the CPU, whatever the parameter's precision and device, and belong to
    (seed, name). The name is the one without wrappers, so that a network starts as it would alone inside
    `DistributedDataParallel`, and a layer as it would in a network with others beside it. PyTorch's number of
    threads changes the last digit of a spectral norm, as it does of any sum in training.

    Args:
        network: its parameters have memory, and any values.
        seed: a non-negative integer.
        spectral: linear weights by `spectral_`, else Xavier-uniform as in DiT. Biases are zero.
        time_embedding_std: if given, weights of the time embeddings are N(0, std²) instead.
        zeroed: the linear layers that start at zero.

    Raises:
        TypeError: for a layer of a kind that there is no rule for.
    """
    weights = _weight_starts(network, spectral, time_embedding_std) | dict.fromkeys(zeroed, 0.0)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if module not in weights:
                raise TypeError(
                    f"{name}: there is no rule for the initial value of a {type(module).__name__}"
                )
            start = 0.0 if name.endswith("bias") else weights[module]
            if isinstance(start, float):
                parameter.fill_(start)
                continue
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            start(values, generator(seed, "initial", _without_wrappers(name)))
            parameter.copy_(values)


def _weight_starts(
    network: nn.Module, spectral: bool, time_embedding_std: float | None
) -> dict[nn.Module, Start]:
    """How the weight of each layer starts."""
    linear: Start = spectral_ if spectral else _draw(nn.init.xavier_uniform_)
    starts: dict[nn.Module, Start] = {}
    for module in network.modules():
        if isinstance(module, nn.Linear):
            starts[module] = linear
        elif isinstance(module, nn.Embedding):
            starts[module] = _draw(nn.init.normal_, std=0.02)
        elif isinstance(module, HeadNorm):
            starts[module] = 1.0
    if time_embedding_std is not None:
        for module in network.modules():
            if isinstance(module, TimeEmbedding):
                drawn = _draw(nn.init.normal_, std=time_embedding_std)
                starts |= dict.fromkeys((module.expand, module.project), drawn)
    return starts


def _draw(function: Callable[..., Tensor], **options: float) -> Start:
    return lambda weight, random: function(weight, **options, generator=random)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def allocate(network: nn.Module) -> bool:
    """Give a network of the meta device float32 memory on PyTorch's default device, unless that is meta too.

    `Module.to_empty` does the same, but not for fake tensors, with which memory is estimated.

    Returns:
        Whether there is memory to put initial values in.
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
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)  # a fake one has no number, nor any use for it
