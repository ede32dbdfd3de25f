"""One trainer in a folder: the second is refused, the first goes on, and a lock ends with its holder."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from runs import Disturbed, assert_same_run, images, newest, tiny_config, tree

import tvmatch
from tvmatch.cli import main
from tvmatch.data.base import Batch
from tvmatch.errors import InputError
from tvmatch.storage.locks import FolderLock
from tvmatch.trained_model.files import find_checkpoint
from tvmatch.training import Trainer, checkpoints, lock_run

IN_USE = rf"^out: .*run is in use: process {os.getpid()} on {socket.gethostname()} trains in it$"


def test_a_lock_belongs_to_one(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with FolderLock(folder):
        for name in (folder, str(folder), tmp_path / "a" / ".." / "a" / "b"):
            with pytest.raises(InputError, match=r"^out: .*b is in use: process \d+ on .* writes to it$"):
                FolderLock(name)
        FolderLock(folder, ".other.lock").release()
        (folder / ".lock").read_bytes()  # to read it does not lose it
        with pytest.raises(InputError):
            FolderLock(folder)
    assert not (tmp_path / "a").exists(), "nothing came into it"
    with FolderLock(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    dropped = FolderLock(folder)
    del dropped
    FolderLock(folder).release()


def test_shared_locks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = FolderLock(tmp_path, shared=True), FolderLock(tmp_path, shared=True)
    for holder in (first, second):
        with pytest.raises(InputError, match="is in use"):
            FolderLock(tmp_path)
        holder.release()
    with FolderLock(tmp_path), pytest.raises(InputError, match="is in use"):
        FolderLock(tmp_path, shared=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_at_a_time(tmp_path: Path) -> None:
    """Each of many finds the counter as the one before has left it, though the lock's file comes and goes."""
    counter = tmp_path / "folder" / "counter"

    def count() -> None:
        for _ in range(25):
            with FolderLock(counter.parent, wait=True):
                before = int(counter.read_text()) if counter.exists() else 0
                time.sleep(1e-4)
                counter.write_text(str(before + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "100"


def hold(folder: Path, pipe: Connection) -> None:
    lock = FolderLock(folder)
    child = os.fork()  # as a data worker: it inherits what is open, and lives on
    if child == 0:
        time.sleep(1000)
    pipe.send(child)
    time.sleep(1000)
    lock.release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """After `kill -9` at once, though a process that it had forked lives on."""
    pipe, inside = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, inside), daemon=True)
    holder.start()
    child = pipe.recv()
    try:
        with pytest.raises(InputError, match=rf"is in use: process {holder.pid} on "):
            FolderLock(tmp_path)
        holder.kill()
        holder.join()
        os.kill(child, 0)
        assert (tmp_path / ".lock").exists()
        FolderLock(tmp_path).release()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on and says so in one line."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    Trainer(tiny_config(1), images(), tmp_path / "run").run()
    expected = f"{tmp_path / 'run'}: this file system has no locks ({os.strerror(number)}); a second run"
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(expected) for line in lines if "locks" in line] == [True]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(tiny_config(1), images(), tmp_path / "run").run()
    before, opened = tree(tmp_path), os.open

    def refuse(path: Path, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)
    for folder, resume in ((tmp_path / "run", tmp_path / "run"), (tmp_path / "new", None)):
        with pytest.raises(InputError) as caught:
            Trainer(tiny_config(), images(), folder, resume=resume)
        assert str(caught.value) == f"{folder}: cannot be written ({os.strerror(number)})"
    assert tree(tmp_path) == before


# Trainers


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    """New or resumed, made before or now; the first is the run it would have been alone."""
    run, tried = tmp_path / "run", []
    unused = Trainer(tiny_config(), images(), run)

    def intrude(step: int, batch: Batch) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: Trainer(tiny_config(), images(), run),
            lambda: tvmatch.train(tiny_config(), images(), run, resume=True),
            lambda: Trainer(tiny_config(), images(), run, resume=run),
            unused.run,
        ]
        for attempt in attempts:
            with pytest.raises(InputError, match=IN_USE):
                attempt()
        tried.append(step)
        if newest_step(run):
            assert tvmatch.load(run).step == newest_step(run)
            assert main(["info", str(run)]) == 0

    Trainer(tiny_config(), Disturbed(images(), intrude), run).run()
    assert tried == list(range(8))
    Trainer(tiny_config(), images(), tmp_path / "alone").run()
    assert_same_run(run, tmp_path / "alone")
    assert tree(run).keys() - {name for name in tree(run) if "events" in name} == {
        name for name in tree(tmp_path / "alone") if "events" not in name
    }
    with pytest.raises(InputError, match=r"^out: .*run holds another run; continue it with --resume"):
        unused.run()


def newest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in checkpoints(run)), default=0)


def test_the_command_line_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is read or written."""
    run = tmp_path / "run"
    for resume in (False, True):
        command = ["train", "--resume", str(run)] if resume else ["train", "digits", "--out", str(run)]
        with lock_run(run, run if resume else None):
            if not resume:
                (run / "config.yaml").write_text(tvmatch.config.recipes.recipe_text("digits"))
            before = tree(run)
            assert main(command) == 2
            assert tree(run) == before
        error = capsys.readouterr().err
        assert error == (
            f"tvmatch: error: out: {run} is in use: process {os.getpid()} on {socket.gethostname()} "
            "trains in it\n"
        )


def test_two_trainers_started_at_once(tmp_path: Path) -> None:
    """In threads, made before either runs: one trains."""
    trainers = [Trainer(tiny_config(), images(), tmp_path / "run") for _ in range(3)]
    outcomes: list[str] = []
    together = threading.Barrier(3)

    def train(trainer: Trainer) -> None:
        together.wait()
        try:
            trainer.run()
            outcomes.append("trained")
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=train, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("trained") == 1
    assert all("is in use" in text or "holds another run" in text for text in outcomes if text != "trained")
    assert newest(tmp_path / "run").name == "step_0000008"


def test_a_trainer_does_not_overwrite_what_came_after_it(tmp_path: Path) -> None:
    first = Trainer(tiny_config(), images(), tmp_path)
    first.run(until=3)
    Trainer(tiny_config(), images(), tmp_path, resume=tmp_path).run()
    before = tree(tmp_path)
    with pytest.raises(
        InputError, match=r"another trainer has written .*step_0000008, this one is at step 3"
    ):
        first.run()
    assert tree(tmp_path) == before


def test_a_checkpoint_removed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living run keeps its newest alone: the reader takes the next, or says that there is none."""
    trainer = Trainer(tiny_config(keep_checkpoints=1), images(), tmp_path)
    trainer.run(until=3)
    find, found = find_checkpoint, []

    def overtaken(path: Path) -> Path:
        found.append(find(path))
        if len(found) == 1:
            trainer.run(until=6)
        return found[-1]

    monkeypatch.setattr("tvmatch.trained_model.files.find_checkpoint", overtaken)
    assert tvmatch.load(tmp_path).step == 6
    assert [path.name for path in found] == ["step_0000003", "step_0000006"]
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"step_0000003: no such file or folder$"):
        tvmatch.load(tmp_path / "checkpoints" / "step_0000003")
