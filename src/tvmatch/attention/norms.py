"""Norms with correct forward-mode derivatives; outside forward mode they call PyTorch's.

In PyTorch 2.11 and 2.13:

- Layer norm's forward-mode rule treats the saved mean and deviation as constants: the tangent is correct,
  gradients through it are silently wrong.
- Group norm's rule fails for `channels_last`. With a weight of another dtype, as under autocast, its tangent
  has another dtype than its value. The latter also holds for batch norm with running statistics.
- Batch norm and instance norm with batch statistics are as wrong as layer norm. See `attention.refusals`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tvmatch.attention.refusals import refuse_batch_statistics
from tvmatch.dual.joint_backward import at_least_float32

# PyTorch's functions, which `drop_in.repair_forward_mode` replaces in `torch.nn.functional`.
pytorch_layer_norm = F.layer_norm
pytorch_group_norm = F.group_norm
pytorch_batch_norm = F.batch_norm
pytorch_instance_norm = F.instance_norm


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """(x − mean) (variance + ε)^(−1/2) ∘ weight + bias; half precision is computed in float32."""
    if forward_ad._current_level < 0:
        return pytorch_layer_norm(input, list(normalized_shape), weight, bias, eps)
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"input: a shape that ends in {shape} is needed, got {tuple(input.shape)}")
    if any(x is not None and x.shape != shape for x in (weight, bias)):
        raise ValueError(f"weight, bias: the shape {shape} is needed")
    x = _standardize(at_least_float32(input), list(range(-len(shape), 0)), eps)
    return _rounded(_affine(x, weight, bias), input)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise (B, C, ...) over all positions and each of `num_groups` groups of channels.

    Channels are split and merged by views only, so a `channels_last` input gives a `channels_last` result.
    """
    if forward_ad._current_level < 0:
        return pytorch_group_norm(input, num_groups, weight, bias, eps)
    if input.ndim < 2 or num_groups < 1 or input.shape[1] % num_groups:
        raise ValueError(
            f"input: a shape (B, C, ...) with a C that num_groups={num_groups} divides is needed, "
            f"got {tuple(input.shape)}"
        )
    if any(x is not None and x.shape != input.shape[1:2] for x in (weight, bias)):
        raise ValueError(f"weight, bias: the shape {tuple(input.shape[1:2])} is needed")
    x = at_least_float32(input).unflatten(1, (num_groups, -1))
    x = _standardize(x, list(range(2, x.ndim)), eps).flatten(1, 2)
    return _rounded(_affine_of_channels(x, weight, bias), input)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """PyTorch's batch norm; in float32 if running statistics and input differ in dtype."""
    tensors = (input, running_mean, running_var, weight, bias)
    name = "batch_norm(training=True)"
    return _norm_of_channels(pytorch_batch_norm, name, tensors, training, momentum, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """PyTorch's instance norm; in float32 if running statistics and input differ in dtype."""
    tensors = (input, running_mean, running_var, weight, bias)
    name = "instance_norm(use_input_stats=True)"
    return _norm_of_channels(pytorch_instance_norm, name, tensors, use_input_stats, momentum, eps)


def _norm_of_channels(
    pytorch_norm: Callable[..., Tensor],
    name: str,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    by_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    input, mean, variance, weight, bias = tensors
    if by_batch:
        refuse_batch_statistics(name, input, weight, bias)
    elif _mixes_precisions(*tensors):
        assert mean is not None
        assert variance is not None
        return _by_running_statistics(input, mean, variance, weight, bias, eps)
    return pytorch_norm(*tensors, by_batch, momentum, eps)


def _refusing_forward(pytorch_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of a batch norm module, refused before it counts the batch in place."""

    def forward(module: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
        if module.training or (module.running_mean is None and module.running_var is None):
            refuse_batch_statistics("batch_norm(training=True)", input)
        return pytorch_forward(module, input)

    return forward


batch_norm_forward = _refusing_forward(nn.modules.batchnorm._BatchNorm.forward)
sync_batch_norm_forward = _refusing_forward(nn.SyncBatchNorm.forward)


def _mixes_precisions(input: Tensor, *others: Tensor | None) -> bool:
    """Whether, in forward mode, PyTorch's tangent would have another dtype than its value."""
    mixed = any(x is not None and x.dtype != input.dtype for x in others)
    return mixed and forward_ad._current_level >= 0


def _by_running_statistics(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    x = at_least_float32(input)
    mean, variance = at_least_float32(mean), at_least_float32(variance)
    x = (x - _of_channels(mean, x)) * (_of_channels(variance, x) + eps).rsqrt()
    return _affine_of_channels(x, weight, bias).to(input.dtype)


def _of_channels(numbers: Tensor, like: Tensor) -> Tensor:
    """Reshape (C,) to broadcast against (B, C, ...)."""
    return numbers.reshape(-1, *[1] * (like.ndim - 2))


def _standardize(x: Tensor, dimensions: list[int], eps: float) -> Tensor:
    x = x - x.mean(dimensions, keepdim=True)
    return x * (x.square().mean(dimensions, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _affine_of_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    parts = [None if part is None else _of_channels(part, x) for part in (weight, bias)]
    return _affine(x, *parts)


def _rounded(x: Tensor, input: Tensor) -> Tensor:
    """x in the input's dtype; in float32 under autocast on a GPU, like PyTorch's norms."""
    device = input.device.type
    widened = device not in ("cpu", "meta") and torch.is_autocast_enabled(device)
    return x if widened else x.to(input.dtype)
