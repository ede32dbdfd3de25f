"""Diffusion Transformer with semi-Lipschitz control (TVM, arXiv 2511.19797; DiT, arXiv 2212.09748).

Shapes: B batch, N tokens, C hidden size, (channels, height, width) of an image, p patch size.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tvmatch import dual
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models.base import AttentionShape
from tvmatch.models.init import allocate, initialize, seed_of_process
from tvmatch.models.layers import (
    ConditionedNetwork,
    Conditioning,
    FeedForward,
    Linear,
    Modulation,
    SelfAttention,
    position_table,
)


class DiTSize(NamedTuple):
    """The sizes of a DiT."""

    hidden_size: int
    depth: int
    heads: int
    patch_size: int


PRESETS: dict[str, DiTSize] = {
    "tiny/2": DiTSize(64, 4, 2, 2),
    "mini/2": DiTSize(128, 6, 4, 2),
    "S/2": DiTSize(384, 12, 6, 2),
    "B/2": DiTSize(768, 12, 12, 2),
    "L/2": DiTSize(1024, 24, 16, 2),
    "XL/2": DiTSize(1152, 28, 18, 2),
}


@dataclass
class DiTConfig:
    """Size and switches of a DiT.

    Attributes:
        preset: tiny/2, mini/2, S/2, B/2, L/2 or XL/2 sets the four sizes below.
        hidden_size: C; overrides the preset's.
        depth: number of blocks; overrides the preset's.
        heads: attention heads, a divisor of hidden_size; overrides the preset's.
        patch_size: p, a divisor of the image's height and width; overrides the preset's.
        mlp_ratio: hidden width of a block's MLP, relative to hidden_size.
        time_frequencies: number of sine-cosine pairs of each time embedding.
        rms_norm: use RMSNorm without parameters in the blocks; false: LayerNorm without parameters.
        qk_norm: RMSNorm of queries and keys.
        modulation_norm: RMSNorm of each modulation vector.
        spectral_init: linear weights with largest singular value 1; false: DiT's Xavier-uniform.
        time_embedding_init: spectral like the other weights, or normal, N(0, 0.02²).
        guidance_embedding: condition the network on 1/w.

    Raises:
        InputError: for a ratio or number of frequencies that is not positive, or an unknown initialisation.
    """

    preset: str | None = None
    hidden_size: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int | None = None
    mlp_ratio: float = 4.0
    time_frequencies: int = 128
    rms_norm: bool = True
    qk_norm: bool = True
    modulation_norm: bool = True
    spectral_init: bool = True
    time_embedding_init: Literal["spectral", "normal"] = "spectral"
    guidance_embedding: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mlp_ratio <= 1000:
            raise InputError("network.mlp_ratio", f"must be positive and at most 1000, got {self.mlp_ratio}")
        if self.time_frequencies < 1:
            raise InputError("network.time_frequencies", f"must be at least 1, got {self.time_frequencies}")
        if self.time_embedding_init not in ("spectral", "normal"):
            raise InputError(
                "network.time_embedding_init", f"must be spectral or normal, got {self.time_embedding_init!r}"
            )

    def size(self) -> DiTSize:
        """The sizes: those of the preset, unless a field overrides them.

        Raises:
            InputError: for an unknown preset, or sizes that are missing, not positive or indivisible.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError("network.preset", f"no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        sizes = dict(PRESETS[self.preset]._asdict()) if self.preset is not None else {}
        for name in DiTSize._fields:
            own = getattr(self, name)
            if own is None and name not in sizes:
                raise InputError(f"network.{name}", "give a number, or a network.preset")
            if own is not None:
                sizes[name] = own
            if sizes[name] < 1:
                raise InputError(f"network.{name}", f"must be at least 1, got {sizes[name]}")
        size = DiTSize(**sizes)
        if size.hidden_size % size.heads:
            raise InputError(
                "network.heads", f"{size.heads} does not divide network.hidden_size {size.hidden_size}"
            )
        if size.hidden_size % 4:
            raise InputError("network.hidden_size", f"must be a multiple of 4, got {size.hidden_size}")
        return size


def _modulated(norm: Callable[..., Dual], x: Dual, shift: Dual, scale: Dual) -> Dual:
    """norm(x) ∘ (1 + scale) + shift, the adaptive part of adaLN."""
    return norm(x, scale=Dual(1 + scale.value, scale.tangent), shift=shift)


class DiTBlock(nn.Module):
    """x + ĉ₁ ∘ Attn(norm(x) ∘ (1 + â₁) + b̂₁), then the same with an MLP; six vectors from the condition."""

    def __init__(self, size: DiTSize, config: DiTConfig) -> None:
        super().__init__()
        self.norm = dual.rms_norm if config.rms_norm else dual.layer_norm
        self.modulation = Modulation(size.hidden_size, 6, normalized=config.modulation_norm)
        self.attention = SelfAttention(size.hidden_size, size.heads, qk_norm=config.qk_norm)
        self.feed_forward = FeedForward(size.hidden_size, config.mlp_ratio)

    def forward(self, x: Dual, activated: Dual) -> Dual:
        """x (B, N, C) and SiLU(c) (B, C) to (B, N, C)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(activated)
        mixed = self.attention(_modulated(self.norm, x, shift_1, scale_1))
        x = dual.add_product(x, gate_1, mixed)
        fed = self.feed_forward(_modulated(self.norm, x, shift_2, scale_2))
        return dual.add_product(x, gate_2, fed)


class DiT(ConditionedNetwork):
    """F_θ(x, t, s, c, w) for images: the average-velocity network of TVM.

    Args:
        config: sizes and switches.
        shape: (channels, height, width), the last two multiples of the patch size.
        class_count: number of classes K; 0 for an unconditional network.
        seed: of the initial weights, see `init_weights`; on the meta device no weights are drawn.

    Raises:
        InputError: if a size is missing, out of range, or does not divide another.
    """

    positions: Tensor

    def __init__(
        self, config: DiTConfig, shape: tuple[int, ...], class_count: int = 0, *, seed: int | None = None
    ) -> None:
        super().__init__()
        self.check(config, shape)
        size, (_, height, width) = config.size(), shape
        self.config, self.shape, self.class_count = config, tuple(shape), class_count
        self.patch_size = size.patch_size
        self.grid = (height // size.patch_size, width // size.patch_size)
        self.norm = dual.rms_norm if config.rms_norm else dual.layer_norm
        with torch.device("meta"):  # skip the initialisation of PyTorch's layers
            self._add_layers(size, config)
        if allocate(self):
            self.init_weights(seed)

    @classmethod
    def check(
        cls, config: DiTConfig, shape: tuple[int, ...] | None = None, size_name: str | None = None
    ) -> None:
        """Check that all sizes are given and divide each other as needed; see `BaseNetwork.check`."""
        patch_size = config.size().patch_size
        if shape is not None and len(shape) != 3:
            raise InputError("network", f"a DiT takes images (C, H, W), got data of shape {tuple(shape)}")
        _, height, width = shape or (0, 0, 0)
        if height % patch_size or width % patch_size:
            size = size_name or f"the image size {height}×{width}"
            raise InputError("network.patch_size", f"{patch_size} does not divide {size}")

    @classmethod
    def takes_guidance_weight(cls, config: DiTConfig) -> bool:
        """Whether there is an embedding of 1/w."""
        return config.guidance_embedding

    def architecture(self) -> dict[str, Any]:
        """Sizes and switches, without the preset and the initialisation."""
        values = asdict(self.config) | self.config.size()._asdict()
        omitted = ("preset", "spectral_init", "time_embedding_init")
        return {name: value for name, value in values.items() if name not in omitted}

    def attention_shape(self) -> AttentionShape:
        """One token per patch."""
        return AttentionShape(math.prod(self.grid), self.positions.shape[-1] // self.config.size().heads)

    def _add_layers(self, size: DiTSize, config: DiTConfig) -> None:
        patch_values, tokens = self.shape[0] * size.patch_size**2, math.prod(self.grid)
        self.conditioning = Conditioning(
            size.hidden_size,
            self.class_count,
            config.time_frequencies,
            guidance_embedding=config.guidance_embedding,
        )
        self.patch_embedding = Linear(patch_values, size.hidden_size)
        positions = torch.empty(tokens, size.hidden_size, dtype=torch.float32)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(size, config) for _ in range(size.depth))
        self.head_modulation = Modulation(size.hidden_size, 2, normalized=config.modulation_norm)
        self.head = Linear(size.hidden_size, patch_values)

    def init_weights(self, seed: int | None = None) -> None:
        """Set the initial parameters and the fixed positions in place, for example after `to_empty`.

        Modulations and head start at zero. Other parameters depend only on `seed` and their names.

        Args:
            seed: a non-negative integer. Default: drawn from PyTorch's global generator.
        """
        modulation = [module.project for module in self.modules() if isinstance(module, Modulation)]
        initialize(
            self,
            seed_of_process() if seed is None else seed,
            spectral=self.config.spectral_init,
            time_embedding_std=0.02 if self.config.time_embedding_init == "normal" else None,
            zeroed=[*modulation, self.head],
        )
        self.fill_buffers()

    def fill_buffers(self) -> bool:
        """Fill the buffer of fixed positions."""
        self.positions.copy_(position_table(*self.grid, self.positions.shape[-1]))
        return True

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        """The network output F and, if an input is a Dual, its tangent.

        Args:
            x: (B, channels, height, width).
            t: (B,) starting times in [0, 1].
            s: (B,) terminal times, s ≤ t.
            labels: int64 (B,) in 0 … K, K for the dropped label; None drops all labels.
            guidance_weight: (B,) w; None means 1.

        Returns:
            F of x's shape and dtype; a `Dual` if x, t or s is one.

        Raises:
            ValueError: if x has another shape than the network's, labels are given to a network without
                classes, or missing for one that was trained without dropped labels.
        """
        has_dual = any(isinstance(argument, Dual) for argument in (x, t, s))
        x, t, s = dual.as_dual(x), dual.as_dual(t), dual.as_dual(s)
        if x.value.shape[1:] != self.shape:
            raise ValueError(f"x has shape {tuple(x.value.shape)}, expected (B, {str(self.shape)[1:]}")

        activated = dual.silu(self.conditioning(t, s, labels, guidance_weight))
        patches = self.patch_embedding(dual.linear_map(self._patchify, x))
        tokens = dual.add(patches, Dual(self.positions))
        for block in self.blocks:
            tokens = block(tokens, activated)
        shift, scale = self.head_modulation(activated)
        patches = self.head(_modulated(self.norm, tokens, shift, scale))
        output = dual.linear_map(lambda y: self._unpatchify(y).to(x.value.dtype), patches)
        return output if has_dual else output.value

    def _patchify(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) to (B, N, channels · p · p), channel first within a patch."""
        p, (rows, columns) = self.patch_size, self.grid
        x = x.unflatten(-1, (columns, p)).unflatten(-3, (rows, p))  # (B, channels, rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p · p · channels), channel last within a patch, to (B, channels, height, width)."""
        p, (rows, columns) = self.patch_size, self.grid
        x = x.unflatten(-1, (p, p, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
