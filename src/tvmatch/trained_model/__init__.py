"""A trained generator in memory and on disk."""

from tvmatch.trained_model.loading import load, load_with_decoder
from tvmatch.trained_model.model import Decoder, Labels, TrainedModel

__all__ = ["Decoder", "Labels", "TrainedModel", "load", "load_with_decoder"]
