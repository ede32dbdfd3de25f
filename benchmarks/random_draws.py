"""What the random numbers of a training step cost on the CPU, beside the step and beside PyTorch's own.

    PYTHONPATH=src python benchmarks/random_draws.py
    PYTHONPATH=src python benchmarks/random_draws.py --threads 2

All numbers are ratios of medians that are measured in turns, so that a busy machine slows both sides alike.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import tvmatch
from tvmatch.seeds import RowDraws
from tvmatch.training import Trainer
from tvmatch.training.step import draw_inputs, training_step


def medians(*functions: Callable[[int], object], repetitions: int) -> list[float]:
    """Seconds of each, called in turns with 0, 1, …"""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(repetitions + 3):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function(number)
            own.append(time.perf_counter() - start)
    return [statistics.median(own[3:]) for own in times]


def of_a_step(recipe: str, repetitions: int) -> str:
    """Data, noise, times and conditions of a step, beside the step itself."""
    config = tvmatch.recipe(recipe)
    data = config.data.load()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, folder, device="cpu")
    state, size = trainer.state, config.training.batch_size
    exact = torch.autocast("cpu", enabled=False)

    def draw(step: int) -> object:
        return draw_inputs(data.batch(step, size, 0), data.spec, config, step, trainer.device)

    inputs = draw_inputs(data.batch(0, size, 0), data.spec, config, 0, trainer.device)

    def train(step: int) -> object:
        return training_step(state.network, trainer.target, state.optimizer, inputs, config, step, exact)

    drawing, training = medians(draw, train, repetitions=repetitions)
    return (
        f"{recipe}: the draws of {size} rows take {100 * drawing / training:.2f} % of a step "
        f"({1e3 * drawing:.2f} of {1e3 * training:.1f} ms)"
    )


def of_noise(rows: int, shape: tuple[int, ...]) -> str:
    """Noise that belongs to rows, beside `torch.randn` of as many numbers."""
    draws = RowDraws(0, "step", 0)
    ours, plain = medians(
        lambda number: draws.normal("noise", range(number * rows, (number + 1) * rows), shape),
        lambda _: torch.randn(rows, *shape),
        repetitions=7,
    )
    return (
        f"normal numbers {(rows, *shape)}: {ours / plain:.2f} times torch.randn "
        f"({1e3 * ours:.2f} and {1e3 * plain:.2f} ms)"
    )


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description="The cost of random numbers.", allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    torch.set_num_threads(parser.parse_args().threads)
    for recipe in ("moons", "checkerboard", "digits"):
        print(of_a_step(recipe, 40))
    for rows, shape in ((256, (2,)), (64, (1, 8, 8)), (256, (3, 32, 32)), (2048, (4, 32, 32))):
        print(of_noise(rows, shape))


if __name__ == "__main__":
    main()
