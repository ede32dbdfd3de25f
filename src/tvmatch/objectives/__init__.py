"""Training objectives; each sees a network as a callable."""

from tvmatch.objectives.flow_matching import flow_matching_loss
from tvmatch.objectives.tvm import TVMLoss, tvm_loss

__all__ = ["TVMLoss", "flow_matching_loss", "tvm_loss"]
