"""The data sets as typed options: the fields are the command line's `--data.*`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tvmatch.data.densities import Density, DensityName
from tvmatch.data.digits import digits
from tvmatch.data.tensors import TensorDataset

if TYPE_CHECKING:
    from tvmatch.data.images import ImageDataset


@dataclass(frozen=True)
class DigitsData:
    """scikit-learn's bundled handwritten digits, 8×8 grey, ten classes.

    Attributes:
        split: part to train on. "train" is 1,437 digits, measured against the 360 held-out ones. "fit" is
            1,077 of them, measured against the other 360, for choosing hyper-parameters.
    """

    split: Literal["train", "fit"] = "train"

    def load(self) -> TensorDataset:
        """The digits of the split."""
        return digits(self.split)


@dataclass(frozen=True)
class DensityData:
    """A distribution in the plane, drawn afresh for every batch.

    Attributes:
        name: "checkerboard", "moons" or "gaussians".
    """

    name: DensityName = "checkerboard"

    def load(self) -> Density:
        """The distribution."""
        return Density(self.name)


@dataclass(frozen=True)
class ImagesData:
    """Images from a folder, Parquet or Arrow files, or the Hugging Face Hub.

    The images are decoded, centre-cropped and resized once, and kept as bytes in the cache folder of
    Hugging Face `datasets` (environment variable HF_HOME), where a second run with these options finds them.

    Attributes:
        path: a folder of images (class folders allowed), a .parquet or .arrow file, a folder of such files,
            or the name of a data set on the Hub.
        split: which split to use. Folders or files named train, validation and test are splits; anything
            else is "train". Slices like "train[:1000]" are allowed.
        resolution: size in pixels, one number for squares or [height, width]. An image is cropped about its
            centre to this shape and resized with an antialiasing filter.
        channels: 3 for RGB, 1 for greyscale.
        image_column: column that holds the images; by default the only one that does.
        label_column: column that holds the classes (names or numbers from 0), "label" for class folders; by
            default none, which trains without classes.
        horizontal_flip: mirror each training image with probability 1/2.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves such images
            out and counts them.
        workers: processes that decode the images.
    """

    path: str
    split: str = "train"
    resolution: int | tuple[int, int] = 32
    channels: Literal[1, 3] = 3
    image_column: str | None = None
    label_column: str | None = None
    horizontal_flip: bool = False
    on_bad_image: Literal["error", "skip"] = "error"
    workers: int = 2

    def load(self) -> "ImageDataset":
        """Open the images, preparing them first if the cache does not hold them yet.

        Raises:
            InputError: the data are missing, empty or unreadable, lack a column, hold a bad image or label,
                or an option is out of range.
        """
        from tvmatch.data.images import load_images  # here, because `datasets` takes a second to import

        return load_images(self)
