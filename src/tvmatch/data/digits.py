"""scikit-learn's 1,797 handwritten digits of 8×8 pixels, in fixed parts."""

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from tvmatch.data.tensors import TensorDataset
from tvmatch.errors import InputError

MEAN, STD = 0.305, 0.376  # of the training pixels; the same for all parts
DigitsSplit = Literal["train", "held_out", "fit", "validation"]


@cache
def digits(split: DigitsSplit) -> TensorDataset:
    """One part of the digits: grey images of shape (1, 8, 8) in [0, 1], classes "0" … "9".

    Every part has the ten digits in the same proportions, and is the same on every machine.

    Args:
        split: the digits consist of "train" (1,437) and "held_out" (360, for evaluation only); "train"
            consists of "fit" (1,077) and "validation" (360), for choosing hyper-parameters.

    Raises:
        InputError: the name is unknown.
    """
    if split not in get_args(DigitsSplit):
        raise InputError("split", f"must be one of {', '.join(get_args(DigitsSplit))}, got {split!r}")
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    data = load_digits()
    chosen = _parts(data.target)[split]
    # The pixels are the integers 0 … 16.
    images = torch.from_numpy(data.images[chosen]).float()[:, None] / 16
    return TensorDataset(
        images,
        torch.from_numpy(data.target[chosen]),
        class_names=[str(k) for k in range(10)],
        mean=(MEAN,),
        std=(STD,),
    )


def _parts(labels: NDArray[np.int64]) -> dict[DigitsSplit, NDArray[np.int64]]:
    """Indices of the elements of every part."""
    from sklearn.model_selection import train_test_split

    def divided(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        larger, smaller = train_test_split(rows, test_size=360, stratify=labels[rows], random_state=0)
        return larger, smaller

    train, held_out = divided(np.arange(len(labels)))
    fit, validation = divided(train)
    return {"train": train, "held_out": held_out, "fit": fit, "validation": validation}
