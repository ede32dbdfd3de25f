"""A fixed small extractor for tests, `--extractor small_extractor:SmallExtractor` on the command line."""

import torch
from torch import Tensor, nn

from tvmatch.evaluation.extractors import Features
from tvmatch.seeds import generator

POOLED, SPATIAL, CLASSES = 6, 8, 5


class SmallExtractor(nn.Module):
    """Random convolution, pooling and linear maps, always the same; any resolution from 2 × 2."""

    name = "small"
    fingerprint = "5" * 64

    def __init__(self) -> None:
        super().__init__()
        random = generator(0, "small extractor")
        self.register_buffer("kernel", torch.randn(POOLED, 3, 2, 2, generator=random))
        self.register_buffer("classifier", torch.randn(POOLED, CLASSES, generator=random))

    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        maps = torch.tanh(nn.functional.conv2d(images.to(self.kernel) / 128 - 1, self.kernel))
        pooled = maps.mean(dim=(2, 3))
        spatial = nn.functional.adaptive_avg_pool2d(maps[:, :2], 2).flatten(1)
        return Features(pooled, spatial, 4 * pooled @ self.classifier)
