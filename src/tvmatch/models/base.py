"""`BaseNetwork`: the interface of a network, with a default for every method but `forward`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tvmatch.models.wrapper import optional_arguments


class Addition(NamedTuple):
    """A part that fine-tuning may add to a checkpoint's network. Initially it does not change the output.

    Attributes:
        field: configuration field that is true for a network with this part.
        name: name in messages, such as "guidance embedding".
        prefix: common prefix of its parameter names.
        zeroed: full names of its parameters that start at zero.
    """

    field: str
    name: str
    prefix: str
    zeroed: tuple[str, ...]


class AttentionShape(NamedTuple):
    """Shape of self-attention: number of tokens and head width."""

    tokens: int
    head_dim: int


class BaseNetwork(nn.Module):
    """A network F_θ(x, t, s, c, w), with the methods that training, checkpoints, export and checks use.

    `register_network` accepts any `nn.Module` with the following constructor and `forward`, and adds the
    defaults below. To override one, inherit from this class or define an attribute of the same name.

        __init__(self, config, shape, class_count, *, seed=None)
        forward(self, x, t, s, labels=None, guidance_weight=None)

    x is (B, *shape); t, s and guidance_weight are (B,); labels are int64 (B,) in 0 … class_count, where
    class_count is the dropped label. `labels=None` drops all labels, `guidance_weight=None` means 1. The
    result has x's shape. The last two arguments are optional; without `labels`, data must have no classes.

    Attributes:
        takes_dual: whether `forward` accepts `Dual` inputs x, t or s, and then returns a `Dual`. Otherwise
            the network is called through `torch.func.jvp` (see `JVPNetwork`), with the same parameter names.
        draws_from_seed: whether the constructor draws all initial weights from `seed`. Otherwise PyTorch's
            global generator is seeded with it during construction.
        needs_float32: refuse to sample with weights of another dtype.
        knows_dropped_labels: whether it was trained with dropped labels; stored in checkpoints.
        label_table: name of the parameter (K + 1, C) with one row per class and a last row for the dropped
            label; fine-tuning on other classes needs it.
        additions: parts that fine-tuning may add.
        config: its configuration; `build_network` sets it if the constructor does not.
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
        """Check a configuration before the data are read. Default: no check.

        Args:
            config: of the network.
            shape: of one element of the data, if known.
            size_name: the image size in messages, such as "data.resolution 32".

        Raises:
            InputError: if no network can be built from it, or none for this shape.
        """

    @classmethod
    def takes_guidance_weight(cls, config: Any) -> bool:
        """Whether the network uses the guidance weight. Default: whether `forward` has the argument."""
        return "guidance_weight" in optional_arguments(cls)

    def architecture(self) -> Mapping[str, Any]:
        """Settings that must equal a checkpoint's for fine-tuning. Default: all configuration fields."""
        return asdict(self.config)

    def dual_blocks(self) -> Sequence[nn.Module]:
        """Consecutive blocks of one class that map Duals (x, activated) to a Dual. Default: none.

        They are recomputed, compiled and sharded separately. They must not draw random numbers.
        """
        return ()

    def modulations(
        self, t: Tensor, s: Tensor, labels: Tensor | None, guidance_weight: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and vectors (before their norm) of each modulation, for the log. Default: none."""
        return iter(())

    def attention_shape(self) -> AttentionShape | None:
        """Shape of its self-attention, for `tvmatch check`. Default: None."""
        return None

    def fill_buffers(self) -> bool:
        """Fill non-persistent buffers and other tensors that are not in the state dict, after `to_empty`.

        Returns:
            Whether the network is then complete. Default: False; the network is then built again on the CPU.
        """
        return False


def answers_of(network: nn.Module) -> BaseNetwork:
    """The network itself if it is a `BaseNetwork`, otherwise a `BaseNetwork` with all defaults."""
    return network if isinstance(network, BaseNetwork) else BaseNetwork()
