"""The data sets as typed options: the fields are the command line's `--data.*`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tvmatch.data.densities import Density, DensityName
from tvmatch.data.digits import digits
from tvmatch.data.spec import agree
from tvmatch.data.tensors import TensorDataset
from tvmatch.errors import InputError

if TYPE_CHECKING:
    from tvmatch.data.images.dataset import ImageDataset
    from tvmatch.data.latents.dataset import LatentDataset


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
    """Images from a folder, ImageNet's own layout, a ZIP, Parquet or Arrow files, or the Hugging Face Hub.

    The images are decoded, centre-cropped and resized once, and kept as bytes in the cache folder of
    Hugging Face `datasets` (environment variable HF_HOME), where a second run with these options finds them.

    Attributes:
        path: a folder of images (class folders allowed), a .parquet or .arrow file, a folder of such files,
            ImageNet as it is distributed (the folder that holds ILSVRC, or train and val), a .zip of images
            or a folder with a dataset.json, or the name of a data set on the Hub.
        split: which split to use. Folders or files named train, validation and test are splits; without any
            all is "train". Slices like "train[:1000]" are allowed.
        resolution: size in pixels, one number for squares or [height, width]. An image is cropped about its
            centre to this shape and resized with an antialiasing filter.
        crop: "centre" keeps all of the image that the proportions allow; "dhariwal" is how ImageNet is
            cropped for generative models (arXiv 2105.05233), for squares only.
        channels: 3 for RGB, 1 for greyscale.
        image_column: column that holds the images; by default the only one that does.
        label_column: column that holds the classes (names or numbers from 0), "label" for class folders,
            ImageNet and dataset.json, "auto" for that if there are any classes; by default none, which trains
            without classes.
        horizontal_flip: mirror each training image with probability 1/2.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves such images
            out and counts them.
        workers: processes that decode the images.
    """

    path: str
    split: str = "train"
    resolution: int | tuple[int, int] = 32
    crop: Literal["centre", "dhariwal"] = "centre"
    channels: Literal[1, 3] = 3
    image_column: str | None = None
    label_column: str | None = None
    horizontal_flip: bool = False
    on_bad_image: Literal["error", "skip"] = "error"
    workers: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a prepared image, (channels, height, width)."""
        size = self.resolution
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def load(self) -> "ImageDataset":
        """Open the images, preparing them first if the cache does not hold them yet.

        Raises:
            InputError: the data are missing, empty or unreadable, lack a column, hold a bad image or label,
                or an option is out of range.
        """
        # Here, because `datasets` takes a second to import
        from tvmatch.data.images.dataset import load_images

        return load_images(**vars(self))


@dataclass(frozen=True)
class LatentsData:
    """Latents of images, made by `tvmatch encode`.

    All but the folder says what a recipe expects of it. A folder of another shape, number of classes or
    normalisation is refused, since training would give a model of something else without a word.

    Attributes:
        latents: the folder.
        shape: of a latent, [C, h, w]; null takes any.
        class_count: number of classes, 0 for none; null takes any.
        mean: of the normalisation, a channel, to five digits at least; null takes the folder's.
        std: likewise.
        autoencoder: a folder or the name on the Hub to load the autoencoder from, for pictures of samples;
            null takes the one that the folder names. Its weights must be those that encoded the images.
    """

    latents: str
    shape: tuple[int, int, int] | None = None
    class_count: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    autoencoder: str | None = None

    def load(self) -> "LatentDataset":
        """Open the latents.

        Raises:
            InputError: they are missing, unfinished or damaged, or not what is expected of them.
        """
        if not self.latents:
            raise InputError("data.latents", "give the folder that `tvmatch encode` made")
        # Here, because `datasets` takes a second to import
        from tvmatch.data.latents.dataset import LatentDataset

        dataset = LatentDataset(self.latents)
        spec = dataset.spec
        if self.shape is not None and tuple(self.shape) != spec.shape:
            raise InputError(
                "data.shape", f"{list(self.shape)} is expected, {self.latents} holds {list(spec.shape)}"
            )
        if self.class_count is not None and self.class_count != spec.class_count:
            hint = "; encode the images with --label_column" if spec.class_count == 0 else ""
            raise InputError(
                "data.class_count",
                f"{self.class_count} classes are expected, {self.latents} has "
                f"{spec.class_count or 'no labels'}{hint}",
            )
        for name, expected, stored in (("mean", self.mean, spec.mean), ("std", self.std, spec.std)):
            if expected is not None and not agree(expected, stored, spec.std):
                raise InputError(
                    f"data.{name}",
                    f"{list(expected)} is expected, {self.latents} has {list(stored)}; "
                    "`tvmatch encode` with another --normalization changes that without encoding again, "
                    f"and data.{name}=null takes what is stored",
                )
        return dataset


DATA_KINDS = {"digits": DigitsData, "density": DensityData, "images": ImagesData, "latents": LatentsData}
"""The dataclasses by the names that files and the command line know them by, `data.kind`."""
