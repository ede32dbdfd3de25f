"""Data sets: digits, densities in the plane, images, and a user's own tensors."""

from tvmatch.data.base import Batch, Dataset, epoch_indices
from tvmatch.data.config import DensityData, DigitsData, ImagesData
from tvmatch.data.densities import Density
from tvmatch.data.digits import digits
from tvmatch.data.spec import DataSpec
from tvmatch.data.tensors import TensorDataset

__all__ = [
    "Batch",
    "DataSpec",
    "Dataset",
    "Density",
    "DensityData",
    "DigitsData",
    "ImagesData",
    "TensorDataset",
    "digits",
    "epoch_indices",
]
