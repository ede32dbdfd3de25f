"""What a checkpoint records of its data set beside the spec, so that an evaluation can do likewise."""

from typing import Any

from tvmatch.data.base import Dataset


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """The facts that a data set knows of itself, as plain values.

    Returns:
        "crop": how its images were cropped, see `data.images.pixels.Crop`; "class_counts": the number of
        elements of each class. Either is missing where the data set has no attribute of this name, or None.
    """
    facts = {name: getattr(dataset, name, None) for name in ("crop", "class_counts")}
    return {name: fact for name, fact in facts.items() if fact is not None}
