"""Shape and classes of the data of a configuration, without reading the data."""

from tvmatch.config.schema import Config
from tvmatch.data.config import DensityData, DigitsData, ImagesData, LatentsData
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError


def expected_spec(config: Config) -> DataSpec:
    """Shape and number of classes of the data of a configuration, without reading the data.

    Images with labels are counted as one class, since the number of classes is not known; each class has C
    parameters.

    Raises:
        InputError: if shape or class count of latents is not configured, or data are passed from Python.
    """
    data = config.data
    if isinstance(data, DigitsData):
        return _spec((1, 8, 8), 10)
    if isinstance(data, DensityData):
        return _spec((2,), 0)
    if isinstance(data, ImagesData):
        return _spec(data.shape, 0 if data.label_column is None else 1)
    if isinstance(data, LatentsData):
        missing = [f"data.{name}" for name in ("shape", "class_count") if getattr(data, name) is None]
        if data.shape is None or data.class_count is None:
            raise InputError(
                ", ".join(missing),
                "a dry run reads no data: give shape and classes, such as "
                "--data.shape=[4,32,32] --data.class_count=1000",
            )
        return _spec(tuple(data.shape), data.class_count)
    raise InputError("data", "a dry run needs a recipe's data section")


def _spec(shape: tuple[int, ...], class_count: int) -> DataSpec:
    """A spec without normalisation; the kind of the data does not change the cost of a step."""
    names = tuple(str(k) for k in range(class_count)) or None
    kind = "points" if len(shape) == 1 else "image"
    return DataSpec(kind, shape, names, (0.0,) * shape[0], (1.0,) * shape[0])  # type: ignore[arg-type]
