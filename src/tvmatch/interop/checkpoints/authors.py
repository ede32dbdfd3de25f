"""Networks in the tensor names of the TVM authors' published checkpoints."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.models import DiT, DiTConfig
from tvmatch.models.dit import PRESETS
from tvmatch.models.layers import position_table
from tvmatch.safe_pickle.inert import shown
from tvmatch.trained_model import TrainedModel

PREFIX = "model."
MAX_DEPTH = 1_000  # blocks
# Levels that compilation, FSDP and activation checkpointing add anywhere within a name.
WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# Levels that DDP, averages and the attributes of training code add in front of a name.
LEADING = frozenset({"module", "model", "net", "network", "ema"})
LABEL_TABLE = "y_embedder.embedding_table.weight"
PATCHES = "x_embedder.proj.weight"


def _names(network: DiT) -> dict[str, str]:
    """The authors' names, without the prefix, by our parameter names."""
    names = {"patch_embedding": "x_embedder.proj", "head": "final_layer.linear"}
    names["head_modulation.project"] = "final_layer.adaLN_modulation.1"
    for ours, theirs in (("time", "t"), ("duration", "s"), ("guidance", "guidance")):
        names[f"conditioning.{ours}.expand"] = f"{theirs}_embedder.mlp.0"
        names[f"conditioning.{ours}.project"] = f"{theirs}_embedder.mlp.2"
    names["conditioning.label"] = "y_embedder.embedding_table"
    for i in range(len(network.blocks)):
        for ours, theirs in (
            ("modulation.project", "adaLN_modulation.1"),
            ("attention.qkv", "attn.qkv"),
            ("attention.query_norm", "attn.q_norm"),
            ("attention.key_norm", "attn.k_norm"),
            ("attention.project", "attn.proj"),
            ("feed_forward.expand", "mlp.fc1"),
            ("feed_forward.project", "mlp.fc2"),
        ):
            names[f"blocks.{i}.{ours}"] = f"blocks.{i}.{theirs}"
    translated = {}
    for name, _ in network.named_parameters():
        module, leaf = name.rsplit(".", 1)
        translated[name] = f"{names[module]}.{leaf}"
    return translated


def expect_dit(model: TrainedModel, subject: str, layout: str) -> DiT:
    """The network of a model, for a layout that supports networks of the kind "dit" only.

    Raises:
        InputError: about `subject`, for any other network.
    """
    if not isinstance(model.network, DiT):
        raise InputError(
            subject,
            f"{layout} is for images and their latents by networks of the kind dit, not for "
            f"{model.spec.kind} by {type(model.network).__name__}; the layout hub takes every network",
        )
    return model.network


def split_prefix(name: str) -> tuple[tuple[str, ...], str]:
    """(leading levels, the rest) of a tensor's name; both without the levels of wrappers."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    count = 0
    while count < len(parts) - 1 and parts[count] in LEADING:
        count += 1
    return tuple(parts[:count]), ".".join(parts[count:])


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose names have no levels of wrappers, such as `_orig_mod.module.model.`.

    Raises:
        InputError: if two tensors would have the same name.
    """
    full_names: dict[str, str] = {}
    for name in state_dict:
        short = split_prefix(name)[1]
        if short in full_names:
            first, second = sorted((full_names[short], name), key=len)
            places = f"as {first} and as {second}"
            if first == short and second.endswith(short):
                places = f"with and without {second.removesuffix(short)!r}"
            raise InputError("state_dict", f"it has {short} twice, {places}")
        full_names[short] = name
    # Other leading levels are recognised by this tensor's name, if all names have them.
    ends = [short for short in full_names if f".{short}".endswith(f".{PATCHES}")]
    front = ends[0].removesuffix(PATCHES) if len(ends) == 1 else ""
    front = front if all(short.startswith(front) for short in full_names) else ""
    return {short.removeprefix(front): state_dict[name] for short, name in full_names.items()}


def some_of(names: Iterable[str]) -> str:
    """A few names of tensors, for a message about a missing one."""
    ordered = sorted(map(shown, names))
    return f"{', '.join(ordered[:3])}{', …' if len(ordered) > 3 else ''}" if ordered else "no tensor"


def network_from_authors(
    state_dict: Mapping[str, Tensor],
    *,
    heads: int,
    rms_norm: bool = True,
    qk_norm: bool = True,
    modulation_norm: bool = True,
    label_dropout: bool = True,
) -> DiT:
    """A DiT with the weights of an authors' state dict; sizes come from the tensors' shapes.

    Args:
        state_dict: tensors by the authors' names, with or without the levels of `WRAPPERS` and `LEADING`.
            The precision is kept.
        heads: number of attention heads, which the shapes do not determine.
        rms_norm: whether the blocks' norms are RMSNorm, not LayerNorm.
        qk_norm: whether queries and keys are normalised.
        modulation_norm: whether the modulation vectors are normalised.
        label_dropout: whether it was trained with dropped labels. If not, the label table has one row per
            class, the network refuses calls without labels, and the row for them in `state_dict()` is the
            mean of the classes.

    Raises:
        InputError: if a tensor is missing, left over, of another shape or dtype, or the positions are not
            the fixed sin-cos table of a square image.
    """
    theirs = without_prefix(state_dict)
    if not label_dropout:
        table = theirs.get(LABEL_TABLE)
        if table is None or table.ndim != 2 or not table.is_floating_point():
            raise InputError("label_dropout", "the network has no classes whose labels could be dropped")
        theirs[LABEL_TABLE] = torch.cat([table, table[:1]])  # the last row is filled below
    architecture = _architecture(theirs, heads, rms_norm, qk_norm, modulation_norm)
    try:
        with torch.device("meta"):  # no memory is allocated before the shapes are checked
            network = DiT(*architecture)
    except RuntimeError:
        raise InputError("state_dict", f"a DiT of impossible size, {architecture[0].size()}") from None
    names = _names(network)
    expected = {*names.values(), "pos_embed"}
    if theirs.keys() != expected:
        missing, extra = sorted(expected - theirs.keys()), sorted(theirs.keys() - expected)
        there = f"; it has {some_of(expected & theirs.keys())}" if missing else ""
        raise InputError(
            "state_dict", f"missing tensors {missing[:3]}, unexpected tensors {extra[:3]}{there}"
        )

    ours = {}
    for name, parameter in network.named_parameters():
        tensor = theirs[names[name]]
        if name == "patch_embedding.weight":
            tensor = tensor.flatten(1)  # a convolution with stride p is a linear map of patches
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise InputError(
                "state_dict",
                f"{names[name]} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected floating point of shape {tuple(parameter.shape)}",
            )
        ours[name] = tensor
    positions, expected_shape = theirs["pos_embed"], network.positions.shape
    fits = positions.shape[-2:] == expected_shape and positions.numel() == network.positions.numel()
    positions = positions.reshape(expected_shape) if fits else positions
    # They are stored in float32 at best; half-precision files round them further.
    if not fits or not torch.allclose(
        positions.float(), position_table(*network.grid, expected_shape[-1]), atol=5e-3
    ):
        raise InputError("state_dict", "pos_embed is not the fixed sin-cos table of a square image")
    dtypes = {tensor.dtype for tensor in (*ours.values(), positions)}
    if len(dtypes) > 1:
        raise InputError("state_dict", f"tensors differ in precision: {', '.join(sorted(map(str, dtypes)))}")
    network = network.to(positions.dtype).to_empty(device="cpu")
    network.load_state_dict(ours, strict=True)
    network.positions.copy_(positions)  # exactly theirs, beyond the tolerance above
    if not label_dropout:
        network.conditioning.without_label_dropout()
    return network


def guess_attention(state_dict: Mapping[str, Tensor]) -> tuple[int, bool]:
    """(heads, whether queries and keys are normalised) of an authors' state dict.

    If they are, the scale's length is the width of a head. Otherwise the number of heads is that of the
    preset with this hidden size, or else gives heads of width 64.
    """
    theirs = without_prefix(state_dict)
    hidden_size = max([1, *theirs.get(PATCHES, torch.empty(0, device="cpu")).shape[:1]])
    scale = theirs.get("blocks.0.attn.q_norm.weight")
    if scale is not None and scale.ndim == 1 and len(scale) > 0:
        return max(hidden_size // len(scale), 1), True
    presets = {size.hidden_size: size.heads for size in PRESETS.values()}
    return presets.get(hidden_size, max(hidden_size // 64, 1)), scale is not None


def _architecture(
    theirs: Mapping[str, Tensor], heads: int, rms_norm: bool, qk_norm: bool, modulation_norm: bool
) -> tuple[DiTConfig, tuple[int, int, int], int]:
    """(config, image shape, class count) from the shapes of the tensors."""
    empty = [name for name, tensor in theirs.items() if tensor.numel() == 0]
    if empty:
        raise InputError("state_dict", f"empty tensors {sorted(empty)[:3]}")
    try:
        hidden_size, channels, patch_size, _ = theirs[PATCHES].shape
        side = math.isqrt(theirs["pos_embed"].shape[-2]) * patch_size
        mlp_size = theirs["blocks.0.mlp.fc1.weight"].shape[0]
        frequencies = theirs["t_embedder.mlp.0.weight"].shape[1] // 2
        depth = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
        table = theirs.get(LABEL_TABLE)
        class_count = 0 if table is None else table.shape[0] - 1
        if min(hidden_size, channels, patch_size, side, mlp_size, frequencies) < 1 or depth > MAX_DEPTH:
            raise ValueError
    except KeyError as missing:
        there = some_of(theirs)
        raise InputError("state_dict", f"missing tensor {missing.args[0]}; it has {there}") from None
    except (ValueError, IndexError):
        raise InputError(
            "state_dict",
            "not the names and shapes of a DiT: x_embedder.proj.weight (C, channels, p, p), "
            "pos_embed (1, N, C), blocks.0.mlp.fc1.weight (hidden, C), …",
        ) from None
    config = DiTConfig(
        hidden_size=hidden_size,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        mlp_ratio=mlp_size / hidden_size,
        time_frequencies=frequencies,
        rms_norm=rms_norm,
        qk_norm=qk_norm,
        modulation_norm=modulation_norm,
        guidance_embedding="guidance_embedder.mlp.0.weight" in theirs,
    )
    return config, (channels, side, side), class_count


def network_to_authors(network: DiT) -> dict[str, Tensor]:
    """Copies of the parameters and the fixed positions under the authors' names, with the prefix "model."."""
    names = _names(network)
    rows = network.class_count + network.conditioning.label_dropout  # of the label table, those in use
    tensors = {}
    for name, parameter in network.named_parameters():
        tensor = parameter.detach()
        if name == "patch_embedding.weight":
            p = network.patch_size
            tensor = tensor.unflatten(1, (-1, p, p))
        if name == "conditioning.label.weight":
            tensor = tensor[:rows]
        tensors[PREFIX + names[name]] = tensor.clone()
    tensors[PREFIX + "pos_embed"] = network.positions.detach()[None].clone()
    return tensors
