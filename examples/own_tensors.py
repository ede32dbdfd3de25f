"""Train on tensors of your own, then draw samples of one class in one step.

python examples/own_tensors.py --out runs/own_tensors
"""

import argparse

import torch

import tvmatch
from tvmatch.data import TensorDataset


def squares_and_bars(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 8×8 pictures, (N, 1, 8, 8) in [0, 1]: a bright square, and a bright bar."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    rows, columns = torch.randint(0, 5, (2, count), generator=random)
    images = 0.1 * torch.rand(count, 1, 8, 8, generator=random)
    for image, label, row, column in zip(images, labels, rows, columns, strict=True):
        if label == 0:
            image[0, row : row + 3, column : column + 3] = 1
        else:
            image[0, row, :] = 1
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps (600 take 50 seconds)")
    options = parser.parse_args()

    images, labels = squares_and_bars(512)
    dataset = TensorDataset(images, labels, class_names=["square", "bar"])
    config = tvmatch.recipe("digits")
    config.training.steps = options.steps
    config.training.sample_every = 0
    model = tvmatch.train(config, dataset, options.out)

    samples = model.sample("bar", count=64, steps=1)  # (64, 1, 8, 8) in [0, 1]
    bright = samples.amax(2).mean().item()  # of each column the brightest pixel; 1 for a perfect bar
    print(f"bars: mean of the brightest pixel in each column {bright:.2f}")


if __name__ == "__main__":
    main()
