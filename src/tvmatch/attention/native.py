"""PyTorch's own fused attention, under a name that stays while `attention.drop_in` replaces it."""

import torch.nn.functional as F

pytorch_attention = F.scaled_dot_product_attention
