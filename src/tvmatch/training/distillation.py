"""Distillation: the velocity of a frozen model, with guidance, as the target u_θ*."""

import math

import torch
from torch import Tensor, nn

from tvmatch.condition import Condition, Guidance
from tvmatch.data.spec import DataSpec, agree
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap, per_sample
from tvmatch.objectives import Objective
from tvmatch.trained_model import TrainedModel, load


class GuidedTeacher(nn.Module):
    """F_θ* such that k(w) F_θ*(x, s, s, c, w) is the velocity of a frozen model with guidance weight w.

    For a model trained at w = 1 this is classifier-free guidance (Ho and Salimans, arXiv 2207.12598),

        u(x, s, c, w) = w u(x, s, c) + (1 − w) u(x, s, ∅).

    A model trained with guidance gets w as its input.

    Args:
        model: the teacher.
        scaled: whether the student uses the scaled parameterisation, k(w) = w; otherwise k = 1.
    """

    def __init__(self, model: TrainedModel, *, scaled: bool) -> None:
        super().__init__()
        self.network = model.network.requires_grad_(False).eval()
        self.flow_map = FlowMap(self.network, model.scaled)
        self.scaled = scaled
        self.combines = model.guidance == 1

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """u(x, s, c, w) / k(w); arguments as in `flow_map.Network`, without tangents. t is not used."""
        assert isinstance(x, Tensor)
        assert isinstance(s, Tensor)
        condition = Condition(labels, None, embeddings, mask)
        if guidance_weight is None:
            return self.flow_map.velocity(x, s, condition)
        weight = per_sample(guidance_weight, x)
        if not self.combines:
            velocity = self.flow_map.velocity(x, s, condition._replace(guidance_weight=guidance_weight))
        elif condition.is_unconditional:
            velocity = self.flow_map.velocity(x, s)
        else:
            conditional, unconditional = self.flow_map.velocity(x, s, condition), self.flow_map.velocity(x, s)
            velocity = torch.lerp(unconditional, conditional, weight.to(conditional.dtype))
        return velocity / weight if self.scaled else velocity


def load_teacher(spec: DataSpec, objective: Objective, device: torch.device) -> GuidedTeacher | None:
    """Load the teacher from the checkpoint `objective.teacher`; None if it is not set.

    Args:
        spec: of the student's data; must equal the teacher's.
        objective: of the student; the teacher must support its guidance weights.
        device: of the teacher.

    Raises:
        InputError: if there is no checkpoint, or it has other data or another guidance weight.
    """
    path = objective.teacher
    if path is None:
        return None
    model = load(path, device)
    expect_same_data("objective.teacher", path, model.spec, spec)
    if not same_classes(model.spec, spec):
        raise InputError("objective.teacher", f"{path} was trained on other classes")
    guidance = objective.guidance_weight
    if not _supports(model.guidance, guidance):
        raise InputError(
            "objective.teacher",
            f"{path} was trained at guidance weight {_as_text(model.guidance)}, and does not support "
            f"objective.guidance_weight {_as_text(guidance)}",
        )
    if not model.knows_dropped_labels and (objective.label_dropout > 0 or guidance != 1):
        raise InputError(
            "objective.teacher",
            f"{path} was trained without dropped labels and has no unconditional velocity, which an "
            "objective.guidance_weight other than 1 and an objective.label_dropout above 0 need",
        )
    return GuidedTeacher(model, scaled=objective.scaled)


def expect_same_data(option: str, path: str, theirs: DataSpec, ours: DataSpec) -> None:
    """Raise an InputError if a checkpoint's data differ in kind, shape, normalisation or encoders."""
    for name in ("kind", "shape", "mean", "std", "embedding_size"):
        there, here = getattr(theirs, name), getattr(ours, name)
        same = agree(there, here, ours.std) if name in ("mean", "std") else there == here
        if not same:
            raise InputError(option, f"the data's {name} is {there} in {path}, here it is {here}")
    if theirs.autoencoder is not None and ours.autoencoder is not None:
        known = theirs.autoencoder.fingerprint and ours.autoencoder.fingerprint
        if known and theirs.autoencoder.fingerprint != ours.autoencoder.fingerprint:
            raise InputError(
                option,
                f"{path} is for latents of another autoencoder, {theirs.autoencoder.source}, "
                f"not {ours.autoencoder.source}",
            )


def known_classes(theirs: DataSpec, ours: DataSpec) -> list[int | None]:
    """The number of each of our classes in a checkpoint; None for a class that it does not have.

    If the classes of one side have only numbers as names, as in an imported checkpoint, and there are equally
    many, both are taken to be in the same order.
    """
    count, names = ours.class_count, ours.class_names or ()
    numbered = [spec.class_names == tuple(map(str, range(spec.class_count))) for spec in (theirs, ours)]
    if any(numbered):
        return [*range(count)] if theirs.class_count == count else [None] * count
    numbers = {name: number for number, name in enumerate(theirs.class_names or ())}
    return [numbers.get(name) for name in names]


def same_classes(theirs: DataSpec, ours: DataSpec) -> bool:
    """Whether the classes and their order are those of a checkpoint."""
    same_count = theirs.class_count == ours.class_count
    return same_count and known_classes(theirs, ours) == list(range(ours.class_count))


def _supports(has: Guidance, wanted: Guidance) -> bool:
    """Whether a teacher trained with guidance `has` provides the weights `wanted`."""
    low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if isinstance(has, tuple):
        return has[0] <= low and high <= has[1]
    return has == 1 or (math.isclose(has, low) and math.isclose(has, high))


def _as_text(guidance: Guidance) -> str:
    return f"{list(guidance)}" if isinstance(guidance, tuple) else f"{guidance:g}"
