"""MLP: a small network with the interface of the DiT, for vectors such as 2-D points.

Shapes: B batch, C hidden size, d dimension of a point.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvmatch import dual
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models.init import allocate, initialize, seed_of_process
from tvmatch.models.layers import ConditionedNetwork, Conditioning, Linear, Modulation


@dataclass
class MLPConfig:
    """Size of an MLP.

    Attributes:
        hidden_size: C.
        depth: number of residual blocks.
        time_frequencies: sinusoid pairs of each time embedding.

    Raises:
        InputError: if one of them is less than 1.
    """

    hidden_size: int = 256
    depth: int = 4
    time_frequencies: int = 128

    def __post_init__(self) -> None:
        for name in ("hidden_size", "depth", "time_frequencies"):
            if getattr(self, name) < 1:
                raise InputError(f"network.{name}", f"must be at least 1, got {getattr(self, name)}")


class MLPBlock(nn.Module):
    """x + W₂ GELU((W₁ x) ∘ (1 + â) + b̂)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.modulation = Modulation(hidden_size, 2, normalized=True)
        self.expand = Linear(hidden_size, hidden_size)
        self.project = Linear(hidden_size, hidden_size)

    def forward(self, x: Dual, activated: Dual) -> Dual:
        """x (B, 1, C) and SiLU(c) (B, C) to (B, 1, C)."""
        shift, scale = self.modulation(activated)
        return dual.add(x, self.project(dual.gelu(dual.modulate(self.expand(x), shift, scale))))


class MLP(ConditionedNetwork):
    """F_θ(x, t, s, c, w) for points of shape (d,); the arguments are those of `DiT`.

    Raises:
        InputError: if the data are not vectors.
    """

    def __init__(
        self, config: MLPConfig, shape: tuple[int, ...], class_count: int = 0, *, seed: int | None = None
    ) -> None:
        super().__init__()
        self.check(config, shape)
        (dimension,) = shape
        self.config, self.shape, self.class_count = config, tuple(shape), class_count
        with torch.device("meta"):  # skip the initialisation of PyTorch's layers
            self.conditioning = Conditioning(config.hidden_size, class_count, config.time_frequencies)
            self.embed = Linear(dimension, config.hidden_size)
            self.blocks = nn.ModuleList(MLPBlock(config.hidden_size) for _ in range(config.depth))
            self.head = Linear(config.hidden_size, dimension)
        if allocate(self):
            self.init_weights(seed)

    @classmethod
    def check(
        cls, config: MLPConfig, shape: tuple[int, ...] | None = None, size_name: str | None = None
    ) -> None:
        """Check that the data are vectors; see `BaseNetwork.check`."""
        if shape is not None and len(shape) != 1:
            raise InputError("network", f"an MLP takes points (d,), got data of shape {tuple(shape)}")

    def fill_buffers(self) -> bool:
        """Nothing to fill."""
        return True

    def init_weights(self, seed: int | None = None) -> None:
        """Set the initial parameters in place, those of the head to zero; see `DiT.init_weights`."""
        seed = seed_of_process() if seed is None else seed
        initialize(self, seed, spectral=True, time_embedding_std=None, zeroed=[self.head])

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        """F of shape (B, d), a `Dual` if x, t or s is one; see `DiT.forward`."""
        has_dual = any(isinstance(argument, Dual) for argument in (x, t, s))
        x, t, s = dual.as_dual(x), dual.as_dual(t), dual.as_dual(s)
        if x.value.shape[1:] != self.shape:
            raise ValueError(f"x has shape {tuple(x.value.shape)}, the network takes (B, {self.shape[0]})")
        activated = dual.silu(self.conditioning(t, s, labels, guidance_weight))
        hidden = self.embed(dual.linear_map(lambda y: y.unsqueeze(1), x))
        for block in self.blocks:
            hidden = block(hidden, activated)
        output = dual.linear_map(lambda y: y.squeeze(1).to(x.value.dtype), self.head(hidden))
        return output if has_dual else output.value
