"""What a snapshot says about the training of its network.

The TVM authors' networks store the arguments of their constructors, among them a part of the run's OmegaConf
configuration, whose `_parent` leads to the whole.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvmatch.condition import Guidance
from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.inert_config import root_of, stated
from tvmatch.safe_pickle.inert import shown

HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
ROUNDING = 1e-6  # relative: numbers agree that differ by their rounding in YAML or JSON


@dataclass
class TrainingFacts:
    """How a network was trained, as far as its file says; None where it does not.

    Attributes:
        scaled: the scaled parameterisation.
        guidance: the weight w; a range of them only from options and recipes.
        mean: of the latents, per channel: the network's input is (latent − mean) / std.
        std: of the latents, per channel.
        autoencoder: name on the Hub of the latents' autoencoder.
        class_count: number of classes.
        label_dropout: probability of dropping a label.
        s: location and scale of the logit-normal distribution of s.
        gap: location and scale of the logit-normal distribution of t − s.
        detach_jvp: whether the gradient through the derivative in s was left out.
        evaluation_ema: rate of the evaluation weights' average.
        target_ema: rate of the target's average.
    """

    scaled: bool | None = None
    guidance: Guidance | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    autoencoder: str | None = None
    class_count: int | None = None
    label_dropout: float | None = None
    s: tuple[float, float] | None = None
    gap: tuple[float, float] | None = None
    detach_jvp: bool | None = None
    evaluation_ema: float | None = None
    target_ema: float | None = None

    def known(self) -> dict[str, Any]:
        """The facts that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_facts(state: dict[Any, Any], beside: Iterable[Any] = ()) -> TrainingFacts:
    """The facts in the state of a network's outermost module, and in configurations beside the network.

    Raises:
        InputError: if two places contradict each other.
    """
    keywords, positional = state.get("_init_kwargs"), state.get("_init_args")
    keywords = keywords if isinstance(keywords, dict) else {}
    given = [*keywords.values(), *(positional if isinstance(positional, tuple | list) else [])]
    roots = {id(root): root for value in (*state.values(), *given, *beside) if (root := root_of(value))}
    own, sources = keywords | state, list(map(_of_configuration, roots.values()))
    scaled, detach_jvp = _switch(own.get("do_scale_param")), _switch(own.get("detach_jvp"))
    classes = own.get("label_dim")
    class_count = classes if type(classes) is int and classes >= 0 else None
    sources.insert(0, TrainingFacts(scaled=scaled, detach_jvp=detach_jvp, class_count=class_count))
    merged: dict[str, Any] = {}
    for name in (field.name for field in fields(TrainingFacts)):
        values = [value for source in sources if (value := getattr(source, name)) is not None]
        for value in values:
            if not alike(value, values[0]):
                raise InputError(f"it contradicts itself about {name}: {shown(values[0])} and {shown(value)}")
        merged[name] = values[0] if values else None
    return TrainingFacts(**merged)


def alike(a: Any, b: Any) -> bool:
    """Whether two facts are the same up to the rounding of printed numbers."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=ROUNDING)
    return type(a) is type(b) and bool(a == b)


def _of_configuration(root: Any) -> TrainingFacts:
    def one(path: str, fits: Callable[[float], bool]) -> float | None:
        value = stated(root, path)
        return float(value) if _is_number(value) and fits(value) else None  # type: ignore[arg-type]

    def two(name: str) -> tuple[float, float] | None:
        location = one(f"loss.{name}_P_mean", lambda x: True)
        scale = one(f"loss.{name}_P_std", lambda x: x > 0)
        return None if location is None or scale is None else (location, scale)

    encoder = {name: stated(root, f"encoder.{name}") for name in ("raw_mean", "raw_std", "final_std")}
    mean, std = _normalization(*encoder.values())
    autoencoder = stated(root, "encoder.vae_name")
    named = isinstance(autoencoder, str) and HUB_NAME.fullmatch(autoencoder)  # a path is of another machine
    return TrainingFacts(
        scaled=_switch(stated(root, "network.do_scale_param")),
        guidance=one("loss.cfg", lambda w: w >= 1),
        mean=mean,
        std=std,
        autoencoder=str(autoencoder) if named else None,
        label_dropout=one("loss.label_dropout", lambda p: 0 <= p <= 1),
        s=two("s"),
        gap=two("gap"),
        evaluation_ema=one("training.ema_beta", lambda rate: 0 <= rate < 1),
        target_ema=one("training.ema_target_beta", lambda rate: 0 <= rate < 1),
    )


def _normalization(*values: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """(mean, std) of (latent − mean) / std from their (latent − raw_mean) · final_std / raw_std."""
    means, stds, finals = (value if isinstance(value, tuple) else (value,) for value in values)
    finals = finals * len(stds) if len(finals) == 1 else finals
    numbers = (*means, *stds, *finals)
    if not 0 < len(means) == len(stds) == len(finals) or not all(map(_is_number, numbers)):
        return None, None
    if min(*stds, *finals) < 1e-15:
        return None, None
    return tuple(map(float, means)), tuple(s / f for s, f in zip(stds, finals, strict=True))


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of a plausible size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
