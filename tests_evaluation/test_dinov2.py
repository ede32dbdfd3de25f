"""DINOv2 beside torchvision, which changes what transformers imports."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from tvmatch.evaluation.extractors import load_extractor


def test_dinov2_is_the_class_token_after_the_last_norm(photographs: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = Dinov2Model(Dinov2Config(image_size=224, **sizes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)  # not zero, nor one, as class token and norms are at first
    network.save_pretrained(tmp_path)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = photographs[::16].repeat(1, 1, 4, 4)[..., 16:240, 16:240]  # already of 224 × 224 pixels
    with torch.no_grad():
        expected = network((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).pooler_output
    pooled = load_extractor("dinov2", torch.device("cpu"), tmp_path)(images).pooled
    assert pooled.std(0).mean() > 1e-2
    # float32 through two layers, with another kind of attention.
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)
