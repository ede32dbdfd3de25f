"""A training run: built from a configuration, carried to its last step, interrupted and resumed."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tvmatch import pictures
from tvmatch.data.base import Batch, Dataset
from tvmatch.errors import InputError
from tvmatch.files import replacing
from tvmatch.flow_map import Network
from tvmatch.seeds import fold
from tvmatch.trained_model import FORMAT as MODEL_FORMAT
from tvmatch.trained_model import TrainedModel, build_network, read_json
from tvmatch.training.checkpoint import (
    TrainingState,
    build_facts,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from tvmatch.training.config import Config
from tvmatch.training.diagnostics import record_norms
from tvmatch.training.ema import ParameterAverage
from tvmatch.training.log import RunLog
from tvmatch.training.recipes import to_yaml
from tvmatch.training.step import StepResult, draw_inputs, training_step

CONFIG_NAME = "config.yaml"


class Interrupted(Exception):  # noqa: N818  # not an error: the run is saved and can go on
    """SIGINT or SIGTERM ended the run after saving it.

    Attributes:
        signal_number: which.
        checkpoint: where to resume.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: saved {checkpoint}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class StepBatches(TorchDataset[Batch]):
    """Item k is the batch of optimiser step k, whoever reads it and in whichever process."""

    def __init__(self, dataset: Dataset, size: int, seed: int) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.batch(step, self.size, self.seed)


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: for a name that PyTorch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device


class Trainer:
    """Trains the network of a configuration on a data set, in a run folder.

    Args:
        config: the run.
        dataset: what to train on.
        out: the run folder; it must be empty, missing, or hold the run that `resume` names.
        device: "auto", or a PyTorch device name.
        resume: a run folder or checkpoint to continue; what it holds must fit the configuration.

    Raises:
        InputError: if `out` holds another run, the checkpoint does not fit, or the configuration does not fit
            the data.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        out: str | Path,
        *,
        device: str = "auto",
        resume: str | Path | None = None,
    ) -> None:
        self.config, self.dataset, self.out = config, dataset, Path(out)
        self.device = resolve_device(device)
        if resume is None and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(
                f"out: {self.out} holds another run or other files; "
                f"continue it with --resume {self.out}, or give another --out"
            )
        if dataset.spec.class_count == 0 and config.objective.guidance_weight != 1:
            raise InputError(
                "objective.guidance_weight: must be 1 for data without classes, "
                f"got {config.objective.guidance_weight}"
            )
        self.state = self._initial_state()
        self.messages: list[str] = []
        if resume is not None:
            self._resume(Path(resume))
        if self.state.step > config.training.steps:
            raise InputError(
                f"training.steps: {config.training.steps}, but the checkpoint has {self.state.step}"
            )

    def _initial_state(self) -> TrainingState:
        """Untrained weights, a function of the configuration's seed alone."""
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(fold(config.seed, "weights"))
            network: nn.Module = build_network(config.network, self.dataset.spec)
        network.to(self.device)
        warmup = config.training.ema_warmup
        rate = config.objective.target_ema
        settings = config.optimizer
        return TrainingState(
            network=network,
            target=ParameterAverage(network, rate, warmup=warmup) if rate else None,
            evaluation=ParameterAverage(network, config.training.evaluation_ema, warmup=warmup),
            optimizer=torch.optim.AdamW(
                network.parameters(),
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
                fused=True,
            ),
        )

    def _resume(self, path: Path) -> None:
        """Load the newest checkpoint; a run that was killed before its first starts over."""
        saved = checkpoints(self.out)
        if not saved:
            self.messages.append(f"{self.out} has no checkpoint yet: starting from step 0")
            return
        if path.resolve() not in (self.out.resolve(), saved[-1].resolve()):
            raise InputError(f"resume: {path} is not the newest checkpoint of {self.out}, {saved[-1].name}")
        self._expect_same_model(saved[-1])
        written_under = load_checkpoint(saved[-1], self.state)
        if written_under != build_facts():
            self.messages.append(
                f"resuming under {build_facts()}, saved under {written_under}: the run goes on, "
                "but will not repeat an uninterrupted one bit for bit"
            )

    def _expect_same_model(self, folder: Path) -> None:
        """Refuse to go on with another network, data set or parameterisation than the checkpoint's."""
        saved = read_json(folder / "model.json", MODEL_FORMAT)
        ours = json.loads(json.dumps(self.trained_model().describe()))
        for key in ("network", "data", "scaled", "guidance"):
            if saved.get(key) != ours[key]:
                raise InputError(f"{folder}: {_difference(key, saved.get(key), ours[key])}")

    @property
    def target(self) -> Network:
        """θ*: the target average, or the network itself."""
        return self.state.network if self.state.target is None else self.state.target.network

    def trained_model(self) -> TrainedModel:
        """The evaluation average as a model to sample from; it changes as training goes on."""
        config = self.config
        return TrainedModel(
            network=self.state.evaluation.network,
            spec=self.dataset.spec,
            scaled=config.objective.scaled,
            guidance=config.objective.guidance_weight,
            step=self.state.step,
            provenance={
                "recipe": config.recipe,
                "seed": config.seed,
                "parameters": sum(x.numel() for x in self.state.network.parameters()),
                "train_seconds": round(self.state.seconds, 2),
                "batch_size": config.training.batch_size,
                **build_facts(),
            },
        )

    def run(self, until: int | None = None) -> TrainedModel:
        """Train up to step `until` (the configuration's last by default), then save.

        Returns:
            The evaluation average.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once everything is saved.
            NonFiniteError: if a loss or gradient is not finite; the last checkpoint stays as it was.
        """
        last = self.config.training.steps if until is None else min(until, self.config.training.steps)
        if self.state.step >= last:
            return self.trained_model()
        with replacing(self.out / CONFIG_NAME) as unfinished:
            unfinished.write_text(to_yaml(self.config))
        with RunLog(self.out, self.state.step, self.config.training.steps) as log, _signals() as received:
            for message in self.messages:
                log.message(message)
            for batch in self._batches(last):
                self._step(batch, log)
                if received:
                    raise Interrupted(received[0], self._save())
                self._on_schedule(log)
        self._save()
        return self.trained_model()

    def _batches(self, last: int) -> Iterator[Batch]:
        training = self.config.training
        return iter(
            DataLoader(
                StepBatches(self.dataset, training.batch_size, self.config.seed),
                batch_size=None,
                sampler=range(self.state.step, last),
                num_workers=training.data_workers,
            )
        )

    def _step(self, batch: Batch, log: RunLog) -> None:
        """One optimiser step, the moving averages, and the log."""
        state, training = self.state, self.config.training
        started = time.perf_counter()
        draws = draw_inputs(batch, self.dataset.spec, self.config, state.step, self.device)
        logged = (state.step + 1) % training.log_every == 0 or state.step == 0
        no_norms: AbstractContextManager[dict[str, float]] = nullcontext({})
        with record_norms(state.network, draws.times.t) if logged else no_norms as recorded:
            result = training_step(
                state.network, self.target, state.optimizer, draws, self.config, state.step, self._autocast()
            )
        state.step += 1
        for average in (state.target, state.evaluation):
            if average is not None:
                average.update(state.network, state.step)
        elapsed = time.perf_counter() - started
        state.seconds += elapsed
        log.advance(state.step)
        if logged:
            scalars = _scalars(result) | {"learning_rate": state.optimizer.param_groups[0]["lr"]} | recorded
            log.scalars(state.step, scalars, training.batch_size / elapsed)

    def _autocast(self) -> torch.autocast:
        wanted = self.config.training.precision
        if wanted == "auto":
            supported = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            wanted = "bfloat16" if supported else "float32"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted == "bfloat16")

    def _on_schedule(self, log: RunLog) -> None:
        """Pictures and checkpoints that are due."""
        training, step = self.config.training, self.state.step
        if training.sample_every and step % training.sample_every == 0:
            self._draw_samples(log)
        if step % training.checkpoint_every == 0:
            self._save()

    def _draw_samples(self, log: RunLog) -> None:
        """One-step samples of the evaluation average, into `samples/` and TensorBoard."""
        model, spec = self.trained_model(), self.dataset.spec
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{self.state.step:07d}.png"
        if spec.kind == "points":
            data = self.dataset.take(2000, self.config.seed).values
            clouds = {n: model.sample(count=2000, steps=n, batch_size=2000) for n in (1, 2, 4)}
            paths = model.trajectory(count=100, steps=8, batch_size=100)
            pictures.points_picture(data, clouds, paths, path)
            return
        columns = 8
        labels = (
            None
            if spec.class_names is None
            else [k // columns for k in range(columns * min(spec.class_count, 10))]
        )
        samples = model.sample(labels, count=None if labels else columns * 8)
        pictures.save_png(pictures.image_grid(samples, columns), path)
        log.events.add_images("samples/1 step", samples, self.state.step)

    def _save(self) -> Path:
        return save_checkpoint(
            self.out, self.state, self.trained_model(), keep=self.config.training.keep_checkpoints
        )


def _difference(key: str, saved: Any, ours: Any) -> str:
    """What differs between a checkpoint's description and the configuration's."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        key, saved, ours = next(
            (f"{key}.{name}", saved.get(name), value)
            for name, value in ours.items()
            if saved.get(name) != value
        )
    return f"its {key} is {saved}, the configuration's {ours}"


def _scalars(result: StepResult) -> dict[str, float]:
    return {
        "loss": result.loss.loss.item(),
        "terminal": result.loss.terminal.mean().item(),
        "flow": result.loss.flow.mean().item(),
        "gradient_norm": result.gradient_norm.item(),
    }


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one of either is not held back."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


def train(
    config: Config, dataset: Dataset, out: str | Path, *, device: str = "auto", resume: bool = False
) -> TrainedModel:
    """Train on any data set, for example a `tvmatch.data.TensorDataset` of one's own tensors.

    Args:
        config: a recipe, changed at will; its data section is not used.
        dataset: what to train on.
        out: the run folder.
        device: "auto", or a PyTorch device name.
        resume: continue the run in `out` from its newest checkpoint.

    Returns:
        The evaluation average, ready to sample.

    Raises:
        InputError, Interrupted, NonFiniteError: see `Trainer`.
    """
    config.data = None  # what was really used is not described by the recipe's data section
    trainer = Trainer(config, dataset, out, device=device, resume=out if resume else None)
    return trainer.run()
