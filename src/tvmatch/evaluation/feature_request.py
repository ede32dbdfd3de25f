"""What `evaluate_features` computes: which metrics, of which samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tvmatch.errors import InputError
from tvmatch.evaluation.samples import check_steps
from tvmatch.generation.numbered import LabelsFrom, sample_labels
from tvmatch.generation.uint8 import Uint8, check_uint8
from tvmatch.trained_model import TrainedModel

Metric = Literal["fid", "sfid", "is", "pr"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class FeatureRequest:
    """Metrics in the features of an extractor, and the samples to compute them from.

    Attributes:
        metrics: "fid" (Fréchet distance of the pooled features: FID with "inception", FD-DINOv2 with
            "dinov2"), "sfid" (of the spatial features, Nash et al., arXiv 2103.03841), "is" (Inception Score,
            10 splits), "pr" (precision and recall, k = 3). None: all that extractor and reference allow.
        count: number of samples n.
        steps: numbers of network evaluations a sample.
        guidance: weights w. None: the weight of the model, or the highest of its range.
        seed: of the noise and of drawn labels.
        labels_from: "data" draws labels with the class frequencies of the training data, "uniform" draws them
            uniformly. None: sample k has class k mod K.
        uint8: whether the samples are rounded or truncated to bytes. Bytes of the reference do not change.
        batch_size: samples at a time, in each process.
    """

    metrics: Sequence[Metric] | None = None
    count: int = 50_000
    steps: Sequence[int] = (1, 2, 4)
    guidance: Sequence[float] | None = None
    seed: int = 0
    labels_from: LabelsFrom | None = None
    uint8: Uint8 = "round"
    batch_size: int = 64

    def check(self, model: TrainedModel) -> None:
        """Check everything that can be checked without the reference, which may take hours to compute.

        Raises:
            InputError: naming the attribute; "model" if the model does not generate images.
        """
        if not model.gives_images:
            hint = "; it needs its autoencoder" if model.spec.kind == "latents" else ""
            raise InputError("model", f"must generate images, this one generates {model.spec.kind}{hint}")
        check_steps(self.steps)
        if self.metrics is not None and (not self.metrics or not set(self.metrics) <= set(METRICS)):
            given = ", ".join(self.metrics) or "none"
            raise InputError("metrics", f"must be among {', '.join(METRICS)}, got {given}")
        for name, least in (("count", 2), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(name, f"must be at least {least}, got {getattr(self, name)}")
        check_uint8(self.uint8)
        sample_labels(model, self.labels_from, self.seed)
        if self.guidance is None:
            return
        low, high = model.guidance if isinstance(model.guidance, tuple) else (model.guidance,) * 2
        for weight in self.guidance:
            if not (low <= weight <= high or math.isclose(weight, low)):
                trained = f"for {low:g} to {high:g}" if low < high else f"at the one weight {low:g}"
                raise InputError("guidance", f"this model was trained {trained}, got {weight:g}")
        if not self.guidance or len(set(self.guidance)) < len(self.guidance):
            raise InputError("guidance", f"must be one or more different weights, got {list(self.guidance)}")
