"""What a run leaves in its folder: log, TensorBoard events, pictures; and what a full disk leaves of it."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Inputs, in_direction_s, randomize_
from PIL import Image
from runs import TINY_MLP, Disturbed, environment, every_switch, images, newest, tiny_config, tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tvmatch
from tvmatch import pictures
from tvmatch.data import TensorDataset
from tvmatch.data.base import Batch
from tvmatch.data.densities import Density
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.flow_map import interpolate
from tvmatch.models import DiT, DiTConfig
from tvmatch.training import Trainer, checkpoint, checkpoints, log
from tvmatch.training.log import RunLog, read_log
from tvmatch.training.non_finite import bin_of, time_bin
from tvmatch.training.step import draw_inputs


def diverse(tmp_path: Path) -> Trainer:
    """A trainer of two blocks with random weights and a batch that has times in every bin."""
    config = every_switch(4, batch_size=32)
    config.network = DiTConfig(hidden_size=8, depth=2, heads=2, patch_size=2, time_frequencies=4)
    trainer = Trainer(config, images(40), tmp_path / "run")
    randomize_(trainer.state.network)
    return trainer


def test_norms_of_modulation_and_tangent(tmp_path: Path) -> None:
    """Computed once more without hooks: the modulation's layers by hand, ∂_s F in one pass of its own."""
    trainer = diverse(tmp_path)
    network = trainer.state.network
    assert isinstance(network, DiT)
    x0, noise, times, (labels, weight, *_) = draw_inputs(
        trainer.dataset.batch(0, 32, 0), trainer.dataset.spec, trainer.config, 0, torch.device("cpu")
    )
    assert weight is not None
    with torch.no_grad():
        condition = network.conditioning(Dual(times["t"]), Dual(times["s"]), labels, weight).value
        activated = Dual(condition * condition.sigmoid())
        expected = {
            "modulation_norm/block 0": network.blocks[0].modulation.project(activated).value,
            "modulation_norm/block 1": network.blocks[1].modulation.project(activated).value,
            "modulation_norm/head": network.head_modulation.project(activated).value,
        }
        inputs = Inputs(interpolate(x0, noise, times["t"]), times["t"], times["s"], labels, weight)
        _, tangent = in_direction_s(network, inputs)
    for index in range(4):
        inside = tangent[bin_of(times["t"]) == index]
        if len(inside):
            expected[f"tangent_norm/t {time_bin(index / 4)}"] = inside
    assert len(expected) >= 6

    trainer.run(until=1)
    (row,) = read_log(tmp_path / "run")
    recorded = {name: value for name, value in row.items() if "_norm/" in name}
    assert recorded.keys() == expected.keys()
    for name, values in expected.items():
        # Two micro-batches against one pass, in float32.
        assert recorded[name] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-4), name
        assert recorded[name] > 0
    hooks = [module for module in network.modules() if module._forward_hooks]
    assert hooks == []


def test_the_log_holds_what_the_steps_were(tmp_path: Path) -> None:
    trainer = diverse(tmp_path)
    trainer.run()
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {"loss", "terminal", "flow", "gradient_norm", "learning_rate"} <= row.keys()
        assert row["loss"] == pytest.approx(row["terminal"] + row["flow"], rel=1e-5)
        assert row["gradient_norm"] > 0


def test_the_first_step_and_every_few_are_logged(tmp_path: Path) -> None:
    Trainer(tiny_config(8, log_every=3), images(), tmp_path).run()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 3, 6]


def test_tensorboard_shows_the_log(tmp_path: Path) -> None:
    diverse(tmp_path).run()
    run = tmp_path / "run"
    events = EventAccumulator(str(run))
    events.Reload()
    rows = read_log(run)
    names = {name for row in rows for name in row} - {"step"}
    assert len(names) > 8
    tags = {name: name if "/" in name else f"training/{name}" for name in names}
    assert set(events.Tags()["scalars"]) == set(tags.values())
    for name, tag in tags.items():
        shown = {event.step: event.value for event in events.Scalars(tag)}
        expected = {row["step"]: np.float32(row[name]) for row in rows if name in row}  # events are float32
        assert shown == expected, name


def test_a_log_cut_off_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    """Even in the middle of a character."""
    whole = '{"step": 1, "tangent_norm/t 0.00–0.25": 2.0}\n'.encode()
    for cut in range(1, len(whole)):
        (tmp_path / log.LOG_NAME).write_bytes(whole + whole[:cut])
        assert len(read_log(tmp_path)) == (2 if cut == len(whole) - 1 else 1)


def test_ten_lines_for_a_terminal_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file or a pipe gets a line for every tenth of the run that is logged, whatever `log_every` is."""
    for every, expected in ((1, 10), (7, 2), (20, 1), (50, 0)):
        Trainer(tiny_config(20, log_every=every), images(), tmp_path / str(every)).run()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
        assert len(lines) == expected, every
        assert all("terminal" in line and "flow" in line and "images/s" in line for line in lines)


def test_images_are_drawn_on_schedule(tmp_path: Path) -> None:
    """A row a class, beside TensorBoard; channels that are no colours side by side."""
    for channels in (1, 2, 3, 4):
        run = tmp_path / str(channels)
        data = TensorDataset(torch.rand(9, channels, 4, 4), [0, 1, 2] * 3)
        Trainer(tiny_config(4, sample_every=2), data, run).run()
        found = sorted(path.name for path in (run / "samples").iterdir())
        assert found == ["step_0000002.png", "step_0000004.png"]
        with Image.open(run / "samples" / found[0]) as picture:
            assert picture.mode == ("RGB" if channels == 3 else "L")
            assert picture.width > picture.height  # 8 columns, 3 rows
        events = EventAccumulator(str(run))
        events.Reload()
        assert [event.step for event in events.Images("samples/1 step")] == [2, 4]


def test_points_are_drawn_on_schedule(tmp_path: Path) -> None:
    """In the plane, however few there are; in other dimensions training goes on without a picture."""
    config = tiny_config(2, sample_every=2)
    config.network = TINY_MLP
    for name, data in (("fresh", Density("moons")), ("few", TensorDataset(torch.randn(5, 2)))):
        Trainer(config, data, tmp_path / name).run()
        assert (tmp_path / name / "samples" / "step_0000002.png").stat().st_size > 1000
    Trainer(config, TensorDataset(torch.randn(5, 3)), tmp_path / "space").run()
    assert not (tmp_path / "space" / "samples").exists()
    assert newest(tmp_path / "space").name == "step_0000002"


def test_samples_that_are_not_finite_do_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny_config(2, sample_every=1), images(), tmp_path)
    with torch.no_grad():  # finite weights, infinite activations
        for parameter in trainer.state.evaluation.network.parameters():
            parameter.fill_(1e25)
    trainer.run()
    assert "step 1: samples are not finite, no picture is written" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_seconds_count_all_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a batch counts as training, too, and a resumed run adds to what it was."""
    clock = [0.0]
    monkeypatch.setattr("tvmatch.training.trainer.time.perf_counter", lambda: clock[0])

    def slow(step: int, batch: Batch) -> None:
        clock[0] += 10

    Trainer(tiny_config(), Disturbed(images(), slow), tmp_path).run(until=5)
    Trainer(tiny_config(), Disturbed(images(), slow), tmp_path, resume=tmp_path).run()
    provenance = json.loads((newest(tmp_path) / "model.json").read_text())["provenance"]
    assert provenance["train_seconds"] == 80.0


# A full disk

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    """A real limit on the size of files: the former checkpoint stays whole, and nothing else is left."""
    Trainer(tiny_config(), images(), tmp_path).run(until=3)
    before = tree(tmp_path / "checkpoints")
    size = (newest(tmp_path) / "training.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer(tiny_config(), images(), tmp_path, resume=tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, hard))
        with pytest.raises(
            InputError, match=r"step_0000006: cannot be saved \(.*too large.*step_0000003$"
        ) as caught:
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "checkpoints") == before
    assert tvmatch.load(tmp_path).step == 3
    assert Trainer(tiny_config(), images(), tmp_path, resume=tmp_path).run().step == 8


@pytest.mark.parametrize("what", ["model.safetensors", "training.safetensors", "training.json", "rename"])
def test_disk_full_at_any_file_of_a_checkpoint(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(tiny_config(), images(), tmp_path).run(until=3)
    before = tree(tmp_path / "checkpoints")

    def full(*_: object, **__: object) -> None:
        raise FULL

    if what == "rename":
        monkeypatch.setattr(Path, "rename", full)
    elif what == "training.json":
        write = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda self, *a, **k: full() if self.name == what else write(self, *a, **k)
        )
    else:
        module = (
            "tvmatch.trained_model.model" if what == "model.safetensors" else "tvmatch.training.checkpoint"
        )
        monkeypatch.setattr(f"{module}.save_tensors", full)
    with pytest.raises(InputError, match=r"step_0000004: cannot be saved \(.*No space.*step_0000003$"):
        Trainer(tiny_config(), images(), tmp_path, resume=tmp_path).run(until=4)
    monkeypatch.undo()
    assert tree(tmp_path / "checkpoints") == before


@pytest.mark.parametrize("what", ["log", "picture", "configuration"])
def test_disk_full_while_writing_something_else(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the file or the run, and the last good checkpoint; the log keeps its rows."""
    Trainer(tiny_config(), images(), tmp_path).run(until=3)

    def full(*_: object, **__: object) -> None:
        raise OSError(*FULL.args)

    if what == "log":
        monkeypatch.setattr(RunLog, "scalars", full)
    elif what == "picture":
        monkeypatch.setattr(pictures.images.Image.Image, "save", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    named = {"log": "", "picture": "/samples/step_0000004.png", "configuration": "/config.yaml"}[what]
    expected = rf"^{tmp_path}{named}: No space left on device; the last good checkpoint is .*step_0000003$"
    with pytest.raises(InputError, match=expected):
        Trainer(tiny_config(8, sample_every=1), images(), tmp_path, resume=tmp_path).run()
    monkeypatch.undo()
    assert [row["step"] for row in read_log(tmp_path)] == ([1, 2, 3, 4] if what == "picture" else [1, 2, 3])
    assert not list(tmp_path.rglob("*.tmp"))


# TensorBoard writes from a thread of its own: only a limit on the whole process reaches it.
EVENTS_FULL = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from runs import images, tiny_config
from tvmatch.errors import InputError
from tvmatch.training import Trainer
run = Path(sys.argv[1])
trainer = Trainer(tiny_config(4000, checkpoint_every=2, keep_checkpoints=1), images(), run)
trainer.run(until=2)
again = Trainer(tiny_config(4000, checkpoint_every=4000), images(), run, resume=run)
size = (run / "checkpoints/step_0000002/training.safetensors").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    again.run()
except InputError as error:
    print(error)
"""


def test_disk_full_while_writing_events(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", EVENTS_FULL, str(run)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(run)), done
    assert "File too large; the last good checkpoint is" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert [folder.name for folder in checkpoints(run)] == ["step_0000002"]
    assert checkpoint.read_json(newest(run) / "training.json", checkpoint.FORMAT)["step"] == 2
