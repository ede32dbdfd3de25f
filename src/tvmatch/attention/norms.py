"""Stand-ins for PyTorch's norms in forward mode. Outside it each is PyTorch's own.

Seen with 2.11 and 2.13:

- Layer norm's rule reads the mean and the deviation which the operator saved, and its backward drops the
  gradients of these two: the tangent is right, gradients through it are wrong, without a word.
- Group norm's rule fails on `channels_last`, and with a weight in another precision than the input, as under
  autocast, its tangent has another dtype than its value. So has batch norm's by running statistics.
- Batch norm and instance norm by statistics of the batch are as wrong as layer norm, and are refused; see
  `attention.refusals`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tvmatch.attention.refusals import refuse_batch_statistics

# PyTorch's own, also while the names stand for others.
pytorch_layer_norm = F.layer_norm
pytorch_group_norm = F.group_norm
pytorch_batch_norm = F.batch_norm
pytorch_instance_norm = F.instance_norm
_pytorch_batch_norm_forward = nn.modules.batchnorm._BatchNorm.forward
_pytorch_sync_batch_norm_forward = nn.SyncBatchNorm.forward


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
    x = _standardize(_at_least_float32(input), list(range(-len(shape), 0)), eps)
    return _rounded(_affine(x, weight, bias), input)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Layer norm of (B, C, ...) over each of `num_groups` parts of the channels, and all positions.

    Views alone split the channels and put them together again, so that a `channels_last` input gives a
    `channels_last` result.
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
    x = _at_least_float32(input).unflatten(1, (num_groups, -1))
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
    """PyTorch's; by running statistics of another precision, computed in float32."""
    if training:
        refuse_batch_statistics("batch_norm(training=True)", input, weight, bias)
    elif _mixes_precisions(input, running_mean, running_var, weight, bias):
        assert running_mean is not None
        assert running_var is not None
        return _by_running_statistics(input, running_mean, running_var, weight, bias, eps)
    return pytorch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


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
    """As `batch_norm`."""
    if use_input_stats:
        refuse_batch_statistics("instance_norm(use_input_stats=True)", input, weight, bias)
    elif _mixes_precisions(input, running_mean, running_var, weight, bias):
        assert running_mean is not None
        assert running_var is not None
        return _by_running_statistics(input, running_mean, running_var, weight, bias, eps)
    return pytorch_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def batch_norm_forward(module: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """Of `nn.BatchNorm1d` and its kin, which count batches in place before they call `batch_norm`."""
    if module.training or (module.running_mean is None and module.running_var is None):
        refuse_batch_statistics("batch_norm(training=True)", input)
    return _pytorch_batch_norm_forward(module, input)


def sync_batch_norm_forward(module: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    """Likewise of `nn.SyncBatchNorm`."""
    if module.training or (module.running_mean is None and module.running_var is None):
        refuse_batch_statistics("batch_norm(training=True)", input)
    return _pytorch_sync_batch_norm_forward(module, input)


def _mixes_precisions(input: Tensor, *others: Tensor | None) -> bool:
    """Whether PyTorch's tangent would have another dtype than its value."""
    mixed = any(x is not None and x.dtype != input.dtype for x in others)
    return mixed and forward_ad._current_level >= 0


def _by_running_statistics(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    x = _at_least_float32(input)
    mean, variance = _at_least_float32(mean), _at_least_float32(variance)
    x = (x - _of_channels(mean, x)) * (_of_channels(variance, x) + eps).rsqrt()
    return _affine_of_channels(x, weight, bias).to(input.dtype)


def _of_channels(numbers: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to multiply (B, C, ...)."""
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rounded(x: Tensor, input: Tensor) -> Tensor:
    """To the input's dtype, save where autocast wants the result in float32, as PyTorch: on a GPU."""
    device = input.device.type
    widened = device not in ("cpu", "meta") and torch.is_autocast_enabled(device)
    return x if widened else x.to(input.dtype)
