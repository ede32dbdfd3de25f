"""What the rest of tvmatch asks of a network besides calling it; every question has a default answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tvmatch.models.wrapper import optional_arguments


class Addition(NamedTuple):
    """A part that fine-tuning may add to a network whose checkpoint lacks it. It starts by adding nothing.

    Attributes:
        field: of the configuration, true for a network that has the part.
        name: for messages, such as "guidance embedding".
        prefix: that the names of its parameters begin with.
        zeroed: its parameters that start at zero, by their full names.
    """

    field: str
    name: str
    prefix: str
    zeroed: tuple[str, ...]


class AttentionShape(NamedTuple):
    """Self-attention of `tokens` queries and keys in heads of width `head_dim`."""

    tokens: int
    head_dim: int


class BaseNetwork(nn.Module):
    """A network F_θ(x, t, s, c, w) and what training, checkpoints, export and `tvmatch check` ask of it.

    `register_network` takes any `nn.Module` with this constructor and this call, and gives it the answers
    below. A network that answers differently inherits from this class, or has attributes of these names.

        __init__(self, config, shape, class_count, *, seed=None)
        forward(self, x, t, s, labels=None, guidance_weight=None)

    x is (B, *shape); t, s and guidance_weight are (B,); labels are int64 (B,) in 0 … class_count, the last
    one for the dropped label. None drops all labels, or means a weight of 1. The result has x's shape. A
    `forward` may lack the last two arguments: without `labels` it is for data without classes.

    Attributes:
        takes_dual: whether `forward` takes a `Dual` in place of x, t or s and then returns one. A network
            without is called through `torch.func.jvp` (see `JVPNetwork`), under the same parameter names.
        draws_from_seed: whether the constructor draws all initial weights from `seed` itself. For others
            PyTorch's global generator has this seed while they are built, as `nn.Linear` needs it.
        needs_float32: refuse to sample with weights in another precision.
        knows_dropped_labels: whether it was trained with dropped labels, and can be called without labels.
            Checkpoints store it.
        label_table: name of the parameter (K + 1, C) with a row a class and one for the dropped label, for
            fine-tuning on other classes. Without it the classes must be the checkpoint's.
        additions: parts that fine-tuning may add.
        config: what it was built from; `build_network` sets it where the constructor does not.
    """

    takes_dual: ClassVar[bool] = False
    draws_from_seed: ClassVar[bool] = False
    needs_float32: ClassVar[bool] = False
    knows_dropped_labels: bool = True
    label_table: ClassVar[str | None] = None
    additions: ClassVar[Sequence[Addition]] = ()
    config: Any

    @classmethod
    def check(cls, config: Any, shape: tuple[int, ...] | None = None, size_name: str | None = None) -> None:
        """Refuse a configuration before data are read. Default: all are accepted until the network is built.

        Args:
            config: of the network.
            shape: of the data, where it is known.
            size_name: how a message calls the size of images, such as "data.resolution 32".

        Raises:
            InputError: if no network can be built of it, or none for this shape.
        """

    @classmethod
    def takes_guidance_weight(cls, config: Any) -> bool:
        """Whether it can tell guidance weights apart. Default: whether `forward` has the argument."""
        return "guidance_weight" in optional_arguments(cls)

    def architecture(self) -> Mapping[str, Any]:
        """What must agree for fine-tuning from a checkpoint. Default: every field of the configuration."""
        return asdict(self.config)

    def dual_blocks(self) -> Sequence[nn.Module]:
        """Modules of the same class that follow each other, each a map of Duals (x, activated) to a Dual.

        They are recomputed, compiled and sharded one by one, and must not draw random numbers. Default: none.
        """
        return ()

    def modulations(
        self, t: Tensor, s: Tensor, labels: Tensor | None, guidance_weight: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and vectors, before their norm, of each modulation, for the log. Default: none."""
        return iter(())

    def attention_shape(self) -> AttentionShape | None:
        """Of its self-attention, for `tvmatch check`. Default: none."""
        return None

    def fill_buffers(self) -> bool:
        """Write what neither `to_empty` nor the state dict fills, such as non-persistent buffers.

        Loading builds a network on the meta device, and allocates memory when all tensors of the file fit.

        Returns:
            Whether the network is then complete. Default: no, so that it is built anew on the CPU.
        """
        return False


def answers_of(network: nn.Module) -> BaseNetwork:
    """The network itself if it is a `BaseNetwork`, else one with every default answer."""
    return network if isinstance(network, BaseNetwork) else BaseNetwork()
