"""PyTorch's fused attention, under a name that `attention.drop_in` does not replace."""

import torch.nn.functional as F

pytorch_attention = F.scaled_dot_product_attention
