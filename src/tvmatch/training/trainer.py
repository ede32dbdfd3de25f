"""`Trainer`: a training run, which can be interrupted and resumed."""

import time
from collections.abc import Generator, Iterator, Sized
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvmatch.compilation import require_right_compilation
from tvmatch.config.schema import Config
from tvmatch.config.yaml_files import to_yaml
from tvmatch.data.base import Batch, Dataset, checked_batch, data_facts
from tvmatch.devices import resolve_device, resolve_precision
from tvmatch.distributed import refuse_several
from tvmatch.errors import DataError, InputError
from tvmatch.flow_map import Network
from tvmatch.storage.files import replacing
from tvmatch.storage.locks import FolderLock
from tvmatch.trained_model import Decoder, TrainedModel
from tvmatch.training.checkpoint import (
    build_facts,
    checkpoints,
    first_non_finite,
    last_checkpoint,
    save_checkpoint,
)
from tvmatch.training.diagnostics import modulation_norms, tangent_norms
from tvmatch.training.distillation import load_teacher
from tvmatch.training.fine_tuning import start_from
from tvmatch.training.log import RunLog
from tvmatch.training.non_finite import NonFiniteError
from tvmatch.training.previews import draw_samples
from tvmatch.training.resume import expect_newest, load_newest
from tvmatch.training.run_folder import CONFIG_NAME, lock_run
from tvmatch.training.signals import Interrupted, collected_signals
from tvmatch.training.state import accelerate_training, initial_state, untrained_network
from tvmatch.training.step import draw_inputs, step_batches, training_step


class Trainer:
    """Trains the network of a configuration on a data set, in a run folder.

    Args:
        config: the run.
        dataset: the training data.
        out: the run folder; it must be empty, missing, or the run given by `resume`.
        device: "auto", or a PyTorch device name.
        resume: the run folder or its newest checkpoint, to resume the run; must fit the configuration.
        decoder: for latents, decodes them to images; without it there are no pictures of samples.
        lock: of `out`, if the caller holds it (`lock_run`). Default: the trainer locks the folder.

    Raises:
        InputError: if `out` contains another run or another run writes to it, the checkpoint does not fit,
            the configuration is wrong or does not fit the data, or there are several processes.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        out: str | Path,
        *,
        device: str = "auto",
        resume: str | Path | None = None,
        decoder: Decoder | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        self.config, self.dataset, self.out, self.decoder = config, dataset, Path(out), decoder
        config.check()
        refuse_several("training")
        self.device = resolve_device(device)
        config.objective.check(dataset.spec.is_conditional)
        self.messages: list[str] = []
        self._lock, self._is_begun = lock, resume is not None
        with self._locked():
            self._prepare(resume)

    def _prepare(self, resume: str | Path | None) -> None:
        """Build state and teacher, load the checkpoint, and compile; the folder is locked."""
        config, dataset = self.config, self.dataset
        self.state = initial_state(config, dataset.spec, self.device, self._initial_network())
        self.teacher = load_teacher(dataset.spec, config.objective, self.device)
        if resume is not None:
            model, facts = self.trained_model(), self._build_facts()
            self.messages += load_newest(Path(resume), self.out, self.state, model, config.initial, facts)
        if self.state.step > config.training.steps:
            steps = config.training.steps
            raise InputError("training.steps", f"{steps}, but the checkpoint has {self.state.step}")
        teacher = None if self.teacher is None else self.teacher.network
        accelerate_training(self.state, config.training, teacher)
        if config.training.compile:
            require_right_compilation(self.device)
            self.messages.append("compiling: the first step takes a minute or more")

    def _initial_network(self) -> nn.Module | None:
        """The network to fine-tune; None without `initial`, or if this run has a checkpoint to resume."""
        if self.config.initial is None or checkpoints(self.out):
            return None
        network = untrained_network(self.config, self.dataset.spec)
        self.messages += start_from(network, self.config, self.dataset.spec)
        return network

    def _build_facts(self) -> dict[str, Any]:
        """`build_facts`, with the size of the data set, compilation and recomputation."""
        elements = len(self.dataset) if isinstance(self.dataset, Sized) else None
        training = self.config.training
        chosen = {"elements": elements, "compile": training.compile, "recompute": training.recompute}
        return build_facts(self.device) | chosen

    @property
    def target(self) -> Network:
        """θ*: the teacher, the target average, or the network itself."""
        if self.teacher is not None:
            return self.teacher
        return self.state.network if self.state.target is None else self.state.target.network

    def trained_model(self) -> TrainedModel:
        """The evaluation average as a model for sampling; training changes it in place."""
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
                **({} if config.initial is None else {"initial": config.initial}),
                **({} if self.teacher is None else {"teacher": config.objective.teacher}),
                **data_facts(self.dataset),
                **build_facts(self.device),
            },
            decoder=self.decoder,
        )

    def run(self, until: int | None = None) -> TrainedModel:
        """Train until step `until` (default: the last step of the configuration), then save a checkpoint.

        Returns:
            The evaluation average.

        Raises:
            Interrupted: after SIGINT or SIGTERM; a checkpoint was saved.
            InputError: for a mistake in the data, or if the run folder cannot be written.
            DataError: if the data set fails with another error, or a process that reads it ends.
            NonFiniteError: if a loss or gradient is not finite; the last checkpoint is not changed.
        """
        last = self.config.training.steps if until is None else min(until, self.config.training.steps)
        try:
            with self._locked() as lock:
                expect_newest(self.out, self.state.step)
                if self.state.step < last:
                    self._run(last, lock)
        except OSError as error:
            raise InputError(
                error.filename or self.out, f"{error.strerror or error}; {last_checkpoint(self.out)}"
            ) from error
        return self.trained_model()

    @contextmanager
    def _locked(self) -> Iterator[FolderLock]:
        """Hold the lock of the run folder in this context."""
        if self._lock is not None:
            yield self._lock
        else:
            with lock_run(self.out, self.out if self._is_begun else None) as lock:
                yield lock

    def _run(self, last: int, lock: FolderLock) -> None:
        training, unit = self.config.training, self.dataset.spec.kind.removesuffix("s") + "s"
        with replacing(self.out / CONFIG_NAME) as unfinished:
            unfinished.write_text(to_yaml(self.config), encoding="utf-8")
        self._is_begun = True
        terms = tuple(self.config.objective.term_times)
        log = RunLog(self.out, self.state.step, training.steps, training.batch_size, unit, terms)
        with (
            log,
            collected_signals() as received,
            closing(self._read(range(self.state.step, last), received)) as batches,
        ):
            unlocked = f"{self.out}: {lock.problem}; a second run in this folder is not prevented"
            findings = getattr(self.dataset, "findings", ())
            for message in [*findings, *self.messages, *([unlocked] if lock.problem else [])]:
                log.message(message)
            clock = time.perf_counter()
            for batch in batches:
                self._step(batch, log)
                clock, before = time.perf_counter(), clock
                self.state.seconds += clock - before
                if received:
                    break
                self._on_schedule(log)
            checkpoint = self._save(log)
            if received:
                raise Interrupted(received[0], checkpoint)

    def _read(self, steps: range, received: list[int]) -> Generator[Batch]:
        """The batches of these steps; ends early if a signal arrives while it waits for a batch."""
        batches = step_batches(self.dataset, self.config, steps, stopped=lambda: received)
        with self._data_errors(), batches as read:
            yield from read

    @contextmanager
    def _data_errors(self) -> Iterator[None]:
        """Add the step and the last checkpoint to errors of the data."""
        try:
            yield
        except InputError as error:
            raise error.within(f"step {self.state.step}").with_hint(last_checkpoint(self.out)) from error
        except DataError as error:
            raise DataError(f"step {self.state.step}: {error}; {last_checkpoint(self.out)}") from error

    def _step(self, batch: Batch, log: RunLog) -> None:
        """Do one optimiser step, update the moving averages, and write the log."""
        state, training = self.state, self.config.training
        batch = checked_batch(batch, self.dataset, training.batch_size)
        inputs = draw_inputs(batch, self.dataset.spec, self.config, state.step, self.device)
        t, s = self.config.objective.network_times(inputs)
        logged = (state.step + 1) % training.log_every == 0 or state.step == 0
        norms = modulation_norms(state.network, t, s, inputs.condition) if logged else {}
        nothing: AbstractContextManager[dict[str, float]] = nullcontext({})
        with tangent_norms(state.network, t) if logged else nothing as recorded:
            result = training_step(
                state.network, self.target, state.optimizer, inputs, self.config, state.step, self._autocast()
            )
        state.step += 1
        for average in (state.target, state.evaluation):
            if average is not None:
                average.update(state.network, state.step)
        log.advance(state.step)
        if logged:
            rate = {"learning_rate": state.optimizer.param_groups[0]["lr"]}
            log.scalars(state.step, result.scalars() | rate | norms | recorded)

    def _autocast(self) -> torch.autocast:
        precision = resolve_precision(self.config.training.precision, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def _on_schedule(self, log: RunLog) -> None:
        """Write the pictures and checkpoints that are due at this step."""
        training, step = self.config.training, self.state.step
        if training.sample_every and step % training.sample_every == 0:
            samples = self.out / "samples"
            with self._data_errors():
                draw_samples(self.trained_model(), self.dataset, samples, log, self.config.seed)
        if step % training.checkpoint_every == 0:
            self._save(log)

    def _save(self, log: RunLog) -> Path:
        """Flush the log, then write a checkpoint."""
        broken = first_non_finite(self.state)
        if broken is not None:
            raise NonFiniteError(f"step {self.state.step}: not finite: {broken}; this state is not saved")
        log.flush()
        return save_checkpoint(
            self.out,
            self.state,
            self.trained_model(),
            self._build_facts(),
            keep=self.config.training.keep_checkpoints,
        )


def train(
    config: Config,
    dataset: Dataset,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    decoder: Decoder | None = None,
) -> TrainedModel:
    """Train on any data set, for example a `tvmatch.data.TensorDataset`.

    Args:
        config: the configuration, such as a modified recipe; its data section is not used.
        dataset: the training data.
        out: the run folder.
        device: "auto", or a PyTorch device name.
        resume: resume the run in `out` from its newest checkpoint.
        decoder: for latents, decodes them to images (a `tvmatch.data.latents.autoencoder.Autoencoder`).

    Returns:
        The evaluation average as a model for sampling.

    Raises:
        InputError, DataError, Interrupted, NonFiniteError: see `Trainer`.
    """
    config = replace(config, data=None)  # the recipe's data section does not describe these data
    return Trainer(config, dataset, out, device=device, resume=out if resume else None, decoder=decoder).run()
