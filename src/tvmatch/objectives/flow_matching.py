"""Flow Matching (arXiv 2210.02747), the objective that TVM becomes where t = s."""

from torch import Tensor

from tvmatch.flow_map import FlowMap, Network, interpolate


def flow_matching_loss(
    network: Network, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None = None
) -> Tensor:
    """mean ‖ F_θ(x_t, t, t, c) − (x1 − x0) ‖² over batch and pixels.

    Args:
        network: F_θ.
        x0: data (B, ...) in the network's units.
        noise: x1 ~ N(0, I) of the same shape.
        t: (B,) times in [0, 1].
        labels: int64 (B,), the class count for a dropped label; None drops all.

    Raises:
        InputError: for an argument, or an output of the network, of another shape, kind or device.
    """
    velocity = FlowMap(network).velocity(interpolate(x0, noise, t), t, labels)
    return (velocity - (noise - x0)).square().mean()
