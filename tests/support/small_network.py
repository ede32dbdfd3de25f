"""A user's network for tests: no tangent rules of its own, PyTorch's layers and initial values."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvmatch.models import register_network


@dataclass
class SmallConfig:
    """Sizes of a `SmallNetwork`."""

    width: int = 16
    depth: int = 2
    scales: tuple[float, ...] = (1.0, 2.0)


@register_network("small", SmallConfig)
class SmallNetwork(nn.Module):
    """An MLP of x, cosines of the times, and a label embedding; it cannot tell guidance weights apart."""

    frequencies: Tensor

    def __init__(
        self, config: SmallConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        values = torch.Size(shape).numel()
        self.register_buffer("frequencies", torch.tensor(config.scales), persistent=False)
        self.embed = nn.Linear(values + 2 * len(config.scales), config.width)
        self.label = nn.Embedding(class_count + 1, config.width)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, values)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """F of x's shape."""
        times = torch.cat([(time[:, None] * self.frequencies).cos() for time in (t, s)], 1)
        if labels is None:
            labels = torch.full(t.shape, self.label.num_embeddings - 1, device=t.device)
        hidden = self.embed(torch.cat([x.flatten(1), times], 1)) + self.label(labels)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(hidden).view_as(x)
