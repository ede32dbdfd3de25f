"""Layers as maps Dual → Dual: written once, with or without a tangent.

Shapes: B batch, N tokens, C hidden size, H heads, D head width.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tvmatch import dual
from tvmatch.attention import attention
from tvmatch.dual import Dual
from tvmatch.models.base import Addition, BaseNetwork


class Linear(nn.Linear):
    """x Wᵀ + b for a Dual of shape (..., in_features)."""

    def forward(self, x: Dual) -> Dual:  # type: ignore[override]
        """(..., in_features) to (..., out_features)."""
        return dual.linear(x, self.weight, self.bias)


class TimeEmbedding(nn.Module):
    """Embedding of a scalar: Linear–SiLU–Linear of [cos(τ ω), sin(τ ω)], ω_i = 10000^(−i/n), i = 0 … n − 1.

    The features are computed in float64 and the layers run outside autocast: low precision in time embeddings
    is a known cause of NaNs in such models.
    """

    def __init__(self, hidden_size: int, frequency_count: int) -> None:
        super().__init__()
        self.frequency_count = frequency_count
        self.expand = Linear(2 * frequency_count, hidden_size)
        self.project = Linear(hidden_size, hidden_size)

    def frequencies(self, device: torch.device) -> Tensor:
        """ω, float64 (n,). Not a buffer, which `Module.float()` would round."""
        exponents = torch.arange(self.frequency_count, dtype=torch.float64, device=device)
        return torch.exp(exponents * (-math.log(10_000) / self.frequency_count))

    def features(self, time: Dual) -> Dual:
        """(B,) to (B, 2 n); tangent [−sin(τ ω), cos(τ ω)] ∘ ω τ̇."""
        frequencies = self.frequencies(time.value.device)
        angles = time.value.to(torch.float64)[:, None] * frequencies
        cosine, sine = angles.cos(), angles.sin()
        value = torch.cat([cosine, sine], -1)
        if time.tangent is None:
            return Dual(value)
        speed = time.tangent.to(torch.float64)[:, None] * frequencies
        return Dual(value, torch.cat([-sine * speed, cosine * speed], -1))

    def forward(self, time: Dual) -> Dual:
        """(B,) to (B, C)."""
        with torch.autocast(time.value.device.type, enabled=False):
            features = dual.linear_map(lambda x: x.to(self.expand.weight.dtype), self.features(time))
            return self.project(dual.silu(self.expand(features)))  # type: ignore[no-any-return]


def position_table(rows: int, columns: int, hidden_size: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings, float32 (rows · columns, C) on the CPU.

    The first half of the channels comes from the column index, the second from the row index, each
    [sin(i ω), cos(i ω)] with ω_j = 10000^(−j / (C/4)).
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij"
    )
    angles = [index.reshape(-1, 1) * frequencies for index in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


class Conditioning(nn.Module):
    """c = E₁(t) + E₂(t − s) + E₃(1/w) + label embedding, shape (B, C) (TVM §4, appendix B).

    Args:
        hidden_size: C.
        class_count: number of classes K. The embedding table has K + 1 rows, the last for the dropped label.
            0: no table.
        frequency_count: of each time embedding.
        guidance_embedding: if false, the network does not depend on w.

    Attributes:
        label_dropout: whether the network is trained with dropped labels; if false, labels are required.
    """

    def __init__(
        self, hidden_size: int, class_count: int, frequency_count: int, *, guidance_embedding: bool = True
    ) -> None:
        super().__init__()
        self.class_count = class_count
        self.label_dropout = True
        self.time = TimeEmbedding(hidden_size, frequency_count)
        self.duration = TimeEmbedding(hidden_size, frequency_count)
        self.guidance = TimeEmbedding(hidden_size, frequency_count) if guidance_embedding else None
        self.label = nn.Embedding(class_count + 1, hidden_size) if class_count else None

    @torch.no_grad()
    def without_label_dropout(self) -> None:
        """Require labels from now on; the dropped label's row becomes the mean of the classes."""
        self.label_dropout = False
        if self.label is not None:
            self.label.weight[-1] = self.label.weight[:-1].mean(0)

    def forward(self, t: Dual, s: Dual, labels: Tensor | None, guidance_weight: Tensor | None) -> Dual:
        """Compute c from t, s and guidance_weight (B,) and labels, int64 (B,) in 0 … K.

        `labels=None` drops all labels, `guidance_weight=None` means 1.

        Raises:
            ValueError: if labels are given without classes, or missing without label dropout.
        """
        if labels is not None and self.label is None:
            raise ValueError("labels: the network was built without classes")
        condition = dual.add(self.time(t), self.duration(dual.subtract(t, s)))
        if self.guidance is not None:
            weight = torch.ones_like(t.value) if guidance_weight is None else guidance_weight
            condition = dual.add(condition, self.guidance(Dual(weight.reciprocal())))
        if self.label is not None:
            if labels is None and not self.label_dropout:
                raise ValueError("labels: trained without dropped labels; give each sample one")
            if labels is None:
                labels = torch.full(t.value.shape, self.class_count, device=t.value.device)
            condition = dual.add(condition, Dual(self.label(labels)))
        return condition


class Modulation(nn.Module):
    """`count` modulation vectors of a condition: Linear(SiLU(c)), each with a parameter-free RMSNorm.

    The norm bounds every vector by √C for any weights (TVM §4); `normalized=False` omits it.
    """

    def __init__(self, hidden_size: int, count: int, *, normalized: bool) -> None:
        super().__init__()
        self.count = count
        self.normalized = normalized
        self.project = Linear(hidden_size, count * hidden_size)

    def forward(self, activated: Dual) -> tuple[Dual, ...]:
        """SiLU(c) of shape (B, C) to `count` Duals of shape (B, 1, C)."""
        vectors = dual.linear_map(lambda x: x.unflatten(-1, (self.count, 1, -1)), self.project(activated))
        if self.normalized:
            vectors = dual.rms_norm(vectors)
        return dual.unbind(vectors, 1)


class HeadNorm(nn.Module):
    """Learnable scale (D,) of an RMSNorm over the head width."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class SelfAttention(nn.Module):
    """Multi-head self-attention on (B, N, C), with RMS-normalised queries and keys (TVM §4)."""

    def __init__(self, hidden_size: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.query_norm = HeadNorm(hidden_size // heads) if qk_norm else None
        self.key_norm = HeadNorm(hidden_size // heads) if qk_norm else None
        self.project = Linear(hidden_size, hidden_size)

    def forward(self, x: Dual) -> Dual:
        """(B, N, C) to (B, N, C)."""
        packed = dual.linear_map(lambda y: y.unflatten(-1, (3, self.heads, -1)), self.qkv(x))
        q, k, v = (dual.linear_map(lambda y: y.transpose(1, 2), part) for part in self._heads(packed))
        merged = dual.linear_map(lambda y: y.transpose(1, 2).flatten(2), attention(q, k, v))
        return self.project(merged)  # type: ignore[no-any-return]

    def _heads(self, packed: Dual) -> tuple[Dual, ...]:
        """(B, N, 3, H, D) to queries, keys and values, each (B, N, H, D) in the dtype of the input.

        Queries and keys are normalised together, before the transpose, where their rows are contiguous.
        """
        if self.query_norm is None or self.key_norm is None:
            return dual.unbind(packed, 2)
        both, values = dual.split(packed, (2, 1), 2)
        scales = torch.stack([self.query_norm.weight, self.key_norm.weight])
        scales = scales.unsqueeze(1).expand(both.value.shape[2:]).contiguous()
        both = dual.rms_norm(both, scale=Dual(scales))
        both = dual.linear_map(lambda y: y.to(packed.value.dtype), both)
        return *dual.unbind(both, 2), dual.linear_map(lambda y: y.squeeze(2), values)


class FeedForward(nn.Module):
    """Linear–GELU–Linear on (..., C), hidden width `ratio` · C."""

    def __init__(self, hidden_size: int, ratio: float) -> None:
        super().__init__()
        width = max(1, round(hidden_size * ratio))
        self.expand = Linear(hidden_size, width)
        self.project = Linear(width, hidden_size)

    def forward(self, x: Dual) -> Dual:
        """(..., C) to (..., C)."""
        return self.project(dual.gelu(self.expand(x)))  # type: ignore[no-any-return]


class ConditionedNetwork(BaseNetwork):
    """Base of DiT and MLP: a `Conditioning`, and blocks that it modulates."""

    takes_dual = draws_from_seed = needs_float32 = True
    label_table = "conditioning.label.weight"
    additions: ClassVar[Sequence[Addition]] = (
        Addition(
            "guidance_embedding",
            "guidance embedding",
            "conditioning.guidance.",
            ("conditioning.guidance.project.weight", "conditioning.guidance.project.bias"),
        ),
    )
    conditioning: Conditioning
    blocks: nn.ModuleList

    @property
    def knows_dropped_labels(self) -> bool:
        """Whether the row of the dropped label was trained."""
        return self.conditioning.label_dropout

    @knows_dropped_labels.setter
    def knows_dropped_labels(self, known: bool) -> None:
        self.conditioning.label_dropout = known

    def dual_blocks(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def modulations(
        self, t: Tensor, s: Tensor, labels: Tensor | None, guidance_weight: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Recompute the modulations from the condition, since hooks in a compiled network are not called."""
        activated = dual.silu(self.conditioning(Dual(t), Dual(s), labels, guidance_weight))
        for name, module in self.named_modules():
            if isinstance(module, Modulation):
                short = name.removesuffix(".modulation").removesuffix("_modulation")
                yield short.replace("blocks.", "block "), module.project(activated).value
