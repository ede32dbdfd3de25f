"""Facts about a data set that a checkpoint records beside the spec, for evaluations."""

from typing import Any

from tvmatch.data.base import Dataset


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Attributes `crop` and `class_counts` of a data set, as plain values.

    Returns:
        "crop": how its images were cropped, see `data.images.pixels.Crop`; "class_counts": the number of
        elements of each class. An attribute that is missing or None is left out.
    """
    facts = {name: getattr(dataset, name, None) for name in ("crop", "class_counts")}
    return {name: fact for name, fact in facts.items() if fact is not None}
