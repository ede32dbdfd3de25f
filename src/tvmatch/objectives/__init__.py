"""Training objectives."""

from tvmatch.objectives.base import Inputs, Loss, Objective, draw_condition
from tvmatch.objectives.flow_matching import FlowMatching, flow_matching_loss
from tvmatch.objectives.registry import objectives_by_name, register_objective
from tvmatch.objectives.tvm import TVM, TVMLoss, tvm_loss

__all__ = [
    "TVM",
    "FlowMatching",
    "Inputs",
    "Loss",
    "Objective",
    "TVMLoss",
    "draw_condition",
    "flow_matching_loss",
    "objectives_by_name",
    "register_objective",
    "tvm_loss",
]
