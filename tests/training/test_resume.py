"""A run that is stopped anywhere and continued equals the uninterrupted one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    TINY_MLP,
    Disturbed,
    assert_same_run,
    environment,
    every_switch,
    images,
    newest,
    saved_tensors,
    tiny_config,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tvmatch import seeds
from tvmatch.config import Config
from tvmatch.data.base import Batch, Dataset
from tvmatch.data.densities import Density
from tvmatch.errors import InputError
from tvmatch.training import Interrupted, Trainer, checkpoint, checkpoints
from tvmatch.training.log import read_log


def no_target(config: Config) -> Config:
    config.objective.target_ema = 0.0
    return config


def bfloat16(config: Config) -> Config:
    config.training.precision = "bfloat16"
    return config


def points(config: Config) -> Config:
    config.network = TINY_MLP
    config.objective.guidance_weight = 1.0
    return config


KINDS: dict[str, tuple[Callable[[], Config], Callable[[], Dataset]]] = {
    "every switch": (every_switch, lambda: images(horizontal_flip=True)),
    "without a target network": (lambda: no_target(tiny_config()), images),
    "in bfloat16": (lambda: bfloat16(every_switch()), images),
    "points drawn afresh": (lambda: points(tiny_config()), lambda: Density("moons")),
    "batches read by other processes": (lambda: every_switch(data_workers=2), images),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [[4], [1, 2, 7]], ids=str)
def test_stopped_and_resumed(kind: str, stops: list[int], tmp_path: Path) -> None:
    """Stopped between checkpoints, on one (6), after the first step and before the last."""
    config, dataset = KINDS[kind]
    Trainer(config(), dataset(), tmp_path / "whole").run()
    for number, stop in enumerate([*stops, None]):
        out = tmp_path / "parts"
        trainer = Trainer(config(), dataset(), out, resume=out if number else None)
        assert trainer.messages == []  # nothing warns of another build or thread count
        assert trainer.state.step == ([0, *stops][number])
        trainer.run(until=stop)
        assert newest(out).name == f"step_{stop or 8:07d}"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_comparison_sees_every_source_of_randomness(tmp_path: Path) -> None:
    """Each of the switches that the comparison above is to cover does change the run."""
    Trainer(every_switch(), images(horizontal_flip=True), tmp_path / "whole").run()
    whole = saved_tensors(newest(tmp_path / "whole"))["network/head.weight"]
    changes: dict[str, Callable[[Config], object]] = {
        "seed": lambda config: setattr(config, "seed", 1),
        "w": lambda config: setattr(config.objective, "guidance_weight", (1.5, 2.9)),
        "dropout": lambda config: setattr(config.objective, "label_dropout", 0.1),
        "t = s": lambda config: setattr(config.objective.times, "equal_probability", 0.0),
        "warm-up": lambda config: setattr(config.optimizer, "warmup_steps", 0),
        "decay": lambda config: setattr(config.optimizer, "decay_fraction", 0.0),
        "clip": lambda config: setattr(config.optimizer, "gradient_clip", None),
        "weight decay": lambda config: setattr(config.optimizer, "weight_decay", 0.0),
        "average": lambda config: setattr(config.objective, "target_ema", 0.1),
        "flip": lambda config: None,
    }
    for name, change in changes.items():
        config = every_switch()
        change(config)
        Trainer(config, images(horizontal_flip=name != "flip"), tmp_path / name).run()
        assert not torch.equal(saved_tensors(newest(tmp_path / name))["network/head.weight"], whole), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last", [False, True], ids=["midway", "at the last step"])
def test_signals(number: signal.Signals, last: bool, tmp_path: Path) -> None:
    """The step in progress is finished and saved, the former handlers come back, and the rest follows."""
    Trainer(every_switch(), images(), tmp_path / "whole").run()
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    at = 7 if last else 4

    def send(step: int, batch: Batch) -> None:
        if step == at:
            signal.raise_signal(number)

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=number.name) as caught:
        Trainer(every_switch(), Disturbed(images(), send), out).run()
    assert caught.value.signal_number == number
    assert caught.value.checkpoint == newest(out) == out / "checkpoints" / f"step_{at + 1:07d}"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    Trainer(every_switch(), images(), out, resume=out).run()
    assert_same_run(out, tmp_path / "whole")


@pytest.fixture
def foreground() -> Iterator[None]:
    """SIGINT as in a terminal: a shell starts background jobs with it ignored, and tests inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends even a save that hangs; the checkpoint before stays the newest."""

    def send(step: int, batch: Batch) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(checkpoint, "save_tensors", lambda *_: signal.raise_signal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        Trainer(every_switch(), Disturbed(images(), send), tmp_path / "run").run()
    monkeypatch.undo()
    assert newest(tmp_path / "run").name == "step_0000003"
    Trainer(every_switch(), images(), tmp_path / "run", resume=tmp_path / "run").run()
    Trainer(every_switch(), images(), tmp_path / "whole").run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_leaves_the_data_workers_alone(tmp_path: Path) -> None:
    """A terminal sends it to every process; the trainer still gets the batches that it waits for."""

    def send(step: int, batch: Batch) -> None:
        if step == 4:  # inside a worker process
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getppid(), signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        Trainer(every_switch(data_workers=1, steps=200), Disturbed(images(), send), out).run()
    assert read_log(out)[-1]["step"] == int(newest(out).name.removeprefix("step_")) < 200


# Dies of SIGKILL in a child process, at one of several places.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from runs import every_switch, images
from tvmatch.training import Trainer, checkpoint, log, trainer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_step(last):
    step = trainer.training_step
    trainer.training_step = lambda *a: die() if a[5] == last else step(*a)

def die_writing(tensors, path, save=checkpoint.save_tensors):
    save(tensors, path)
    if "step_0000006" in str(path):
        os.truncate(path, path.stat().st_size // 2)
        die()

def die_writing_json(self, text, encoding=None, write=Path.write_text):
    if self.name == "training.json" and "step_0000006" in str(self):
        write(self, text[:20])
        die()
    return write(self, text, encoding=encoding)

def die_renaming(self, target, rename=Path.rename):
    die() if "step_0000006" in str(target) and not str(target).endswith("removed") else rename(self, target)

def die_removing(folder, *_, rmtree=shutil.rmtree, **__):
    next(iter(Path(folder).glob("*.safetensors"))).unlink()
    die()

def die_logging(self, step, scalars, record=log.RunLog.scalars):
    if step == 5:
        self.file.write('{"step": 5, "tangent_norm/t 0.50'), self.file.flush(), die()
    record(self, step, scalars)

def apply(place):
    if place == "before the first checkpoint":
        die_at_step(1)
    elif place == "between checkpoints":
        die_at_step(4)
    elif place == "writing the weights":
        checkpoint.save_tensors = die_writing
    elif place == "writing the facts":
        Path.write_text = die_writing_json
    elif place == "before the checkpoint gets its name":
        Path.rename = die_renaming
    elif place == "removing the one before":
        checkpoint.shutil.rmtree = die_removing
    elif place == "in the middle of a line of the log":
        log.RunLog.scalars = die_logging
    elif place == "after the end":
        trainer.RunLog.__exit__ = die

Trainer(every_switch(1), images(), Path(sys.argv[1]) / "first").run()  # imports what the children need
for number, place in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        apply(place)
        Trainer(every_switch(keep_checkpoints=1), images(), Path(sys.argv[1]) / str(number)).run()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, place
"""
PLACES = {  # where it dies, and the newest whole checkpoint there
    "before the first checkpoint": None,
    "between checkpoints": 3,
    "in the middle of a line of the log": 3,
    "writing the weights": 3,
    "writing the facts": 3,
    "before the checkpoint gets its name": 3,
    "removing the one before": 6,
    "after the end": 8,
}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL leaves no time to save: the newest whole checkpoint and the log up to it are all there is."""
    script = [sys.executable, "-c", KILLED, str(tmp_path), *PLACES]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    config = every_switch(keep_checkpoints=1)
    Trainer(config, images(), tmp_path / "whole").run()
    for number, (place, step) in enumerate(PLACES.items()):
        run = tmp_path / str(number)
        found = [folder.name for folder in checkpoints(run)]
        assert found == ([] if step is None else [f"step_{step:07d}"]), place
        trainer = Trainer(config, images(), run, resume=run)
        assert trainer.state.step == (step or 0), place
        trainer.run()
        assert_same_run(run, tmp_path / "whole")
        if step != 8:
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000008"], place
            assert tensorboard_steps(run) == list(range(1, 9)), place


def tensorboard_steps(run: Path) -> list[int]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step for event in events.Scalars("training/loss")]


def test_nothing_is_logged_twice(tmp_path: Path) -> None:
    """What a run wrote after its last checkpoint is dropped: scalars of a step appear once, in order."""

    def fail(step: int, batch: Batch) -> None:
        if step == 5:
            raise RuntimeError("the machine broke down")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="broke down"):
        Trainer(every_switch(), Disturbed(images(), fail), run).run()
    assert [row["step"] for row in read_log(run)] == [1, 2, 3, 4, 5]
    Trainer(every_switch(), images(), run, resume=run).run()
    assert [row["step"] for row in read_log(run)] == list(range(1, 9)) == tensorboard_steps(run)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    trained = Trainer(tiny_config(), images(), tmp_path).run()
    before = saved_tensors(newest(tmp_path))
    again = Trainer(tiny_config(), images(), tmp_path, resume=tmp_path).run()
    assert torch.equal(again.sample(steps=2), trained.sample(steps=2))
    after = saved_tensors(newest(tmp_path))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_more_steps_can_be_asked_for(tmp_path: Path) -> None:
    """A constant learning rate does not know the number of steps: 3 and then 8 are 8."""
    first, whole = tiny_config(3), tiny_config(8)
    for config in (first, whole):
        config.optimizer.decay_fraction = 0.0
    Trainer(first, images(), tmp_path / "parts").run()
    Trainer(whole, images(), tmp_path / "parts", resume=tmp_path / "parts").run()
    Trainer(whole, images(), tmp_path / "whole").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(InputError, match=r"training\.steps: 3, but the checkpoint has 8"):
        Trainer(first, images(), tmp_path / "parts", resume=tmp_path / "parts")


def test_the_checkpoint_to_resume_may_be_named(tmp_path: Path) -> None:
    config = tiny_config(8, keep_checkpoints=None)
    Trainer(config, images(), tmp_path).run(until=6)
    first, last = checkpoints(tmp_path)
    assert Trainer(config, images(), tmp_path, resume=last).state.step == 6
    with pytest.raises(InputError, match=r"step_0000003 is not the newest checkpoint of .*step_0000006"):
        Trainer(config, images(), tmp_path, resume=first)


def test_another_build_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of threads, version, or size of the data set: the run goes on, but says so."""
    Trainer(tiny_config(), images(), tmp_path).run(until=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    (message,) = Trainer(tiny_config(), images(23), tmp_path, resume=tmp_path).messages
    assert f"threads {1} → 7" in message
    assert "→ 9.9.9" in message
    assert "elements 20 → 23" in message
    assert "bit for bit" in message
    assert "machine" not in message


def test_a_run_of_older_random_streams_goes_on_with_a_message(tmp_path: Path) -> None:
    """Its checkpoint says nothing of them: what was drawn then is drawn otherwise now."""
    config = every_switch()
    Trainer(config, images(), tmp_path).run(until=3)
    path = newest(tmp_path) / "training.json"
    facts = json.loads(path.read_text())
    assert facts["build"].pop("random_streams") == seeds.VERSION > 1
    assert facts["build"].pop("numpy") == np.__version__
    path.write_text(json.dumps(facts))
    trainer = Trainer(config, images(), tmp_path, resume=tmp_path)
    (message,) = trainer.messages
    assert f"random_streams 1 → {seeds.VERSION}" in message
    assert "not equal an uninterrupted run bit for bit" in message
    assert trainer.run().step == 8
    facts = json.loads((newest(tmp_path) / "training.json").read_text())
    assert facts["build"]["random_streams"] == seeds.VERSION


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for keep, expected in ((1, [8]), (2, [6, 8]), (None, [2, 4, 6, 8])):
        run = tmp_path / str(keep)
        Trainer(tiny_config(checkpoint_every=2, keep_checkpoints=keep), images(), run).run()
        assert [int(folder.name.removeprefix("step_")) for folder in checkpoints(run)] == expected
        assert len(list((run / "checkpoints").iterdir())) == len(expected)
