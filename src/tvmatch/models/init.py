"""Initial weights of the networks (TVM appendix B)."""

import torch
from torch import nn

from tvmatch.models.layers import HeadNorm, TimeEmbedding


@torch.no_grad()
def spectral_(weight: torch.Tensor) -> None:
    """Xavier-normal divided by its largest singular value, in place: a linear map of Lipschitz constant 1.

    Args:
        weight: (out_features, in_features).
    """
    nn.init.xavier_normal_(weight)
    # The smaller Gram matrix gives the same number as an SVD at a fraction of the time.
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    weight /= torch.linalg.eigvalsh(gram)[-1].sqrt()


def initialize(network: nn.Module, *, spectral: bool, time_embedding_std: float | None) -> None:
    """Start every layer of `network`; the network then zeroes what must start at zero.

    Args:
        spectral: linear weights by `spectral_`, else Xavier-uniform as in DiT. Biases are zero.
        time_embedding_std: if given, weights of the time embeddings are N(0, std²) instead.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            if spectral:
                spectral_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, HeadNorm):
            nn.init.ones_(module.weight)
    if time_embedding_std is not None:
        for module in network.modules():
            if isinstance(module, TimeEmbedding):
                nn.init.normal_(module.expand.weight, std=time_embedding_std)
                nn.init.normal_(module.project.weight, std=time_embedding_std)
