"""Options of the data sets; the fields are the command line's `--data.*`."""

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
        split: part to train on. "train" has 1,437 digits and is evaluated on the 360 held-out ones. "fit"
            has 1,077 of them and is evaluated on the other 360, for choosing hyper-parameters.
    """

    split: Literal["train", "fit"] = "train"

    def load(self) -> TensorDataset:
        """The digits of the split."""
        return digits(self.split)


@dataclass(frozen=True)
class DensityData:
    """A distribution in the plane; every batch is a new draw.

    Attributes:
        name: "checkerboard", "moons" or "gaussians".
    """

    name: DensityName = "checkerboard"

    def load(self) -> Density:
        """The distribution."""
        return Density(self.name)


@dataclass(frozen=True)
class ImagesData:
    """Images from a folder, ImageNet, a ZIP, Parquet or Arrow files, or the Hugging Face Hub.

    The images are decoded, cropped and resized once, and cached as bytes in the cache folder of Hugging Face
    `datasets` (environment variable HF_HOME).

    Attributes:
        path: a folder of images (class folders allowed), a .parquet or .arrow file, a folder of such files,
            ImageNet (the folder with ILSVRC, or with train and val), a .zip of images or a folder with a
            dataset.json, or the name of a data set on the Hub.
        split: split to use. Folders or files named train, validation and test are splits; without them the
            whole data set is "train". Slices like "train[:1000]" are allowed.
        resolution: size in pixels, one number for squares or [height, width]. Images are cropped about their
            centre to these proportions and resized with an antialiasing filter.
        crop: "centre" keeps the largest part of these proportions; "dhariwal" is the usual crop of ImageNet
            for generative models (arXiv 2105.05233), for squares only.
        channels: 3 for RGB, 1 for greyscale.
        image_column: column of the images; by default the only column with images.
        label_column: column of the classes (names, or numbers from 0); "label" for class folders, ImageNet
            and dataset.json; "auto" for "label" if there are classes; by default none, for training without
            classes.
        horizontal_flip: mirror each training image with probability 1/2.
        on_bad_image: "error" stops at an image that cannot be read; "skip" leaves such images out and counts
            them.
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
        """(channels, height, width) of a prepared image."""
        size = self.resolution
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def load(self) -> "ImageDataset":
        """Open the images; prepare them first if they are not in the cache.

        Raises:
            InputError: the data are missing, empty or unreadable, lack a column, have an unreadable image or
                a wrong label, or an option is out of range.
        """
        # Imported here because `datasets` takes a second to import
        from tvmatch.data.images.dataset import load_images

        return load_images(**vars(self))


@dataclass(frozen=True)
class LatentsData:
    """Latents of images, written by `tvmatch encode`.

    The other options state what a recipe expects; a folder with another shape, number of classes or
    normalisation is refused.

    Attributes:
        latents: the folder.
        shape: of a latent, [C, h, w]; null accepts any.
        class_count: number of classes, 0 for none; null accepts any.
        mean: of the normalisation, per channel, to at least five digits; null accepts the folder's.
        std: of the normalisation, per channel, to at least five digits; null accepts the folder's.
        autoencoder: folder or name on the Hub of the autoencoder, for pictures of samples; null uses the
            one recorded in the folder. It must have the weights that encoded the images.
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
            InputError: they are missing, unfinished or damaged, or differ from the expected options.
        """
        if not self.latents:
            raise InputError("data.latents", "give the folder that `tvmatch encode` wrote")
        # Imported here because `datasets` takes a second to import
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
                    "`tvmatch encode` with another --normalization changes it without encoding again, "
                    f"and data.{name}=null accepts it",
                )
        return dataset


DATA_KINDS = {"digits": DigitsData, "density": DensityData, "images": ImagesData, "latents": LatentsData}
"""The dataclasses by their names in files and on the command line, `data.kind`."""
