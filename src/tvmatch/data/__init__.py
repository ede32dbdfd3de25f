"""Data sets: digits, densities in the plane, images, their latents, and a user's own tensors."""

from tvmatch.data.base import Batch, Dataset, epoch_indices
from tvmatch.data.config import DensityData, DigitsData, ImagesData, LatentsData
from tvmatch.data.densities import Density
from tvmatch.data.digits import digits
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.data.tensors import TensorDataset

__all__ = [
    "AutoencoderInfo",
    "Batch",
    "DataSpec",
    "Dataset",
    "Density",
    "DensityData",
    "DigitsData",
    "ImagesData",
    "LatentsData",
    "TensorDataset",
    "digits",
    "epoch_indices",
]
