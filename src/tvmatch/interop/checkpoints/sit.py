"""Flow Matching networks in the tensor names of SiT (Ma et al., arXiv 2401.08740): a DiT of (x, t, class).

A SiT predicts the velocity of a flow and takes one time. The network F(x, t, s) made from it predicts the
same velocity for every s: the last layer of the new embedding of the duration t − s is zero.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.authors import guess_attention, network_from_authors, some_of, without_prefix
from tvmatch.models import DiT

TIME_LAYER = "t_embedder.mlp.0.weight"
DURATION = "s_embedder.mlp"
XL_SIZE = 1152  # heads 72 wide (DiT, arXiv 2212.09748, Table 1)
_RANKS = {
    "x_embedder.proj.weight": 4,
    TIME_LAYER: 2,
    "t_embedder.mlp.2.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
}


def is_sit(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a DiT with one time."""
    names = without_prefix(state_dict)
    return TIME_LAYER in names and f"{DURATION}.0.weight" not in names


def sit_heads(state_dict: Mapping[str, Tensor]) -> int:
    """Number of attention heads of a SiT: 16 for the width of XL, unlike ours; else `guess_attention`."""
    theirs = without_prefix(state_dict)
    table = theirs.get("x_embedder.proj.weight")
    hidden_size = table.shape[0] if table is not None and table.ndim else 0
    return 16 if hidden_size == XL_SIZE else guess_attention(theirs)[0]


def network_from_sit(state_dict: Mapping[str, Tensor], *, heads: int, label_dropout: bool = True) -> DiT:
    """A DiT whose F(x, t, s, c) is, for every s, the velocity of a SiT at time t.

    Published SiTs have data at time 1 and noise at 0: x_τ = τ x0 + (1 − τ) x1, with velocity
    dx/dτ. Here τ = 1 − t, so F(x, t) = −F_SiT(x, 1 − t). Both signs go into the weights, exactly: the time
    features cos((1 − t) ω), sin((1 − t) ω) are a rotation of cos(t ω), sin(t ω).

    A network that also predicts a variance keeps the first half of its output channels, the velocity.

    Args:
        state_dict: tensors by SiT's names. Sizes come from their shapes; the precision is kept.
        heads: number of attention heads, which the shapes do not determine.
        label_dropout: see `network_from_authors`.

    Raises:
        InputError: if a tensor is missing, left over, or of another shape; see `network_from_authors`.
    """
    theirs = without_prefix(state_dict)
    for name, rank in _RANKS.items():
        if name not in theirs:
            raise InputError("state_dict", f"missing tensor {name}; it has {some_of(theirs)}")
        if theirs[name].ndim != rank or 0 in theirs[name].shape:
            raise InputError("state_dict", f"{name} is of shape {tuple(theirs[name].shape)}")
    expand, project = theirs[TIME_LAYER], theirs["t_embedder.mlp.2.weight"]
    weight, bias = theirs["final_layer.linear.weight"], theirs["final_layer.linear.bias"]
    _, channels, patch_size, _ = theirs["x_embedder.proj.weight"].shape
    if expand.shape[1] % 2:
        raise InputError("state_dict", f"{TIME_LAYER} takes {expand.shape[1]} features, half of them cosines")
    weight, bias = (_velocity_rows(rows, channels, patch_size) for rows in (weight, bias))
    theirs[TIME_LAYER] = _reversed_time(expand)
    theirs |= {"final_layer.linear.weight": -weight, "final_layer.linear.bias": -bias}
    # The first layer of the new embedding is a copy of t's, so that its features have the right scale.
    theirs[f"{DURATION}.0.weight"] = expand.clone()
    theirs[f"{DURATION}.0.bias"] = theirs.get("t_embedder.mlp.0.bias", expand[:, 0]).clone()
    theirs[f"{DURATION}.2.weight"] = torch.zeros_like(project)
    theirs[f"{DURATION}.2.bias"] = torch.zeros_like(project[:, 0])
    return network_from_authors(
        theirs, heads=heads, rms_norm=False, qk_norm=False, modulation_norm=False, label_dropout=label_dropout
    )


def _velocity_rows(rows: Tensor, channels: int, patch_size: int) -> Tensor:
    """The rows of the first `channels` outputs, of (p · p · outputs, …) rows with the channel last."""
    outputs, rest = divmod(len(rows), patch_size**2)
    if rest or outputs not in (channels, 2 * channels):
        raise InputError(
            "state_dict",
            f"final_layer.linear has {len(rows)} rows, {channels} channels in patches of "
            f"{patch_size} take {channels * patch_size**2}, or twice that with a variance",
        )
    velocity: Tensor = rows.unflatten(0, (patch_size**2, outputs))[:, :channels].flatten(0, 1)
    return velocity


def _reversed_time(weight: Tensor) -> Tensor:
    """W with W [cos tω, sin tω] = W' [cos((1 − t)ω), sin((1 − t)ω)], of (C, 2 n), computed in float64."""
    count = weight.shape[1] // 2
    frequencies = torch.exp(
        torch.arange(count, dtype=torch.float64, device="cpu") * (-math.log(10_000) / count)
    )
    cosine, sine = frequencies.cos(), frequencies.sin()
    of_cosine, of_sine = weight.double().unflatten(1, (2, count)).unbind(1)
    turned = torch.cat([of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine], 1)
    return turned.to(weight.dtype)
