"""Images to latents on disk: what is stored, the same however the work is cut up or broken off."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import PHOTOGRAPHS
from runs import environment, tree
from test_autoencoder import tiny
from torch import Tensor

from tvmatch.cli import main
from tvmatch.config import Config, recipe
from tvmatch.data.base import data_facts, epoch_indices, mirrored_at_random
from tvmatch.data.images import source as image_source
from tvmatch.data.images.reader import ImageReader, open_images
from tvmatch.data.latents.autoencoder import Autoencoder, load_autoencoder
from tvmatch.data.latents.dataset import LatentDataset, LatentsInfo, Posterior
from tvmatch.data.latents.encoder import Encoder, Normalization
from tvmatch.data.latents.settings import EncodingOptions
from tvmatch.data.latents.shards import ChannelSums, ShardWriter
from tvmatch.distributed import Position
from tvmatch.errors import DataError, InputError
from tvmatch.seeds import RowDraws, generator
from tvmatch.training.step import step_batches

SIZE, SHARD, BATCH = 16, 24, 5  # shards of 24, 24 and 16 images; batches that do not divide them
COUNT = 64


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of `datasets` for these tests alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(vae: Path) -> Autoencoder:
    return load_autoencoder(str(vae))


@pytest.fixture(scope="module")
def photographs(cache: Path) -> ImageReader:
    return open_images(str(PHOTOGRAPHS), "train", label_column="label")


@pytest.fixture(scope="module")
def images(photographs: ImageReader) -> Tensor:
    """All of them, (64, 3, 16, 16) in [0, 1]."""
    pixels = [photographs.pixels(k, SIZE, "dhariwal") for k in range(COUNT)]
    return torch.from_numpy(np.stack(pixels)).float() / 255


def options(**changes: Any) -> EncodingOptions:
    defaults = {"data": str(PHOTOGRAPHS), "label_column": "label", "resolution": SIZE}
    return EncodingOptions(**defaults | {"shard_size": SHARD, "batch_size": BATCH} | changes)


MakeEncoder = Callable[..., Encoder]


@pytest.fixture(scope="module")
def encoder(photographs: ImageReader, autoencoder: Autoencoder) -> MakeEncoder:
    """Of the photographs, into a folder, by default with the options above."""

    def make(folder: Path, normalization: Any = None, **changes: Any) -> Encoder:
        return Encoder(photographs, autoencoder, folder, options(**changes), normalization)

    return make


def encode(encoder: Encoder, **arguments: Any) -> LatentsInfo:
    encoder.encode(**{"workers": 0} | arguments)
    info = encoder.finish()
    assert info is not None
    return info


def posterior_of(dataset: LatentDataset, indices: Tensor) -> Posterior:
    """Of the images of these numbers, not mirrored."""
    return dataset._posterior(dataset._read(indices, torch.zeros(len(indices), dtype=torch.bool)))


@pytest.fixture(scope="module")
def encoded(encoder: MakeEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    encode(encoder(folder))
    return folder


@pytest.fixture
def copy(encoded: Path, tmp_path: Path) -> Path:
    """A finished folder to spoil."""
    return Path(shutil.copytree(encoded, tmp_path / "latents"))


def command(folder: Path, vae: Path, *more: str) -> list[str]:
    """`tvmatch encode`, as `encoded` was made."""
    own = {"--data": PHOTOGRAPHS, "--autoencoder": vae, "--out": folder, "--resolution": SIZE}
    own |= {"--shard_size": SHARD, "--batch_size": BATCH, "--workers": 0, "--device": "cpu"}
    return ["encode", *(str(word) for pair in own.items() for word in pair), *more]


# What is stored.


def test_each_row_is_the_posterior_of_its_image(
    encoded: Path, autoencoder: Autoencoder, images: Tensor
) -> None:
    dataset = LatentDataset(encoded)
    assert len(dataset) == COUNT
    assert [shard.rows for shard in dataset.info.shards] == [24, 24, 16]
    stored = posterior_of(dataset, torch.arange(COUNT))
    expected = autoencoder.encode(images)
    # Encoded in batches of another size: sums of a few hundred float32 terms in another order.
    assert relative_error(stored.mean, expected.mean) < 1e-5
    assert relative_error(stored.std, expected.std) < 1e-5
    spec = dataset.spec
    assert spec.kind == "latents"
    assert spec.shape == (4, SIZE // 2, SIZE // 2)
    assert spec.class_names == ("astronaut", "cat", "coffee", "rocket")
    assert spec.autoencoder == autoencoder.info((3, SIZE, SIZE))
    labels = dataset.take(COUNT, seed=0).labels
    assert labels is not None
    assert labels.bincount().tolist() == [16] * 4


def test_labels_stay_with_their_images(encoded: Path, photographs: ImageReader) -> None:
    labels = LatentDataset(encoded).batch(0, COUNT, seed=3).labels
    assert labels is not None
    indices = epoch_indices(COUNT, 0, COUNT, 3)
    assert labels.tolist() == [photographs.label(int(k)) for k in indices]


def test_a_checkpoint_of_latents_records_crop_and_classes(
    encoded: Path, photographs: ImageReader, encoder: MakeEncoder, tmp_path: Path
) -> None:
    """The crop is that of the images before they were encoded."""
    labels = [photographs.label(k) for k in range(COUNT)]
    counts = [labels.count(k) for k in range(max(filter(None, labels)) + 1)]
    assert data_facts(LatentDataset(encoded)) == {"crop": "dhariwal", "class_counts": counts}
    encode(encoder(tmp_path / "stored", flips="stored", crop="centre"))
    facts = data_facts(LatentDataset(tmp_path / "stored"))
    assert facts == {"crop": "centre", "class_counts": [2 * count for count in counts]}


def test_statistics_are_those_of_all_latents_at_once(encoded: Path) -> None:
    dataset = LatentDataset(encoded)
    mean, std = (
        part.double().transpose(0, 1).flatten(1) for part in posterior_of(dataset, torch.arange(COUNT))
    )
    info = dataset.info
    assert info.measured_mean is not None
    assert info.measured_std is not None
    # Both are sums of 4,096 float64 numbers, in another order.
    assert relative_error(torch.tensor(info.measured_mean, dtype=torch.float64), mean.mean(1)) < 1e-12
    direct = (mean.var(1, correction=0) + std.square().mean(1)).sqrt()
    assert relative_error(torch.tensor(info.measured_std, dtype=torch.float64), direct) < 1e-12
    assert (info.spec.mean, info.spec.std) == (info.measured_mean, info.measured_std)
    assert info.provenance["normalization"] == "measured"


@given(cuts=st.lists(st.integers(1, 9), max_size=4), offset=st.floats(-1e4, 1e4), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_sums_of_parts_are_those_of_the_whole(cuts: list[int], offset: float, scale: float) -> None:
    random = generator(0, "sums")
    draws = torch.randn(10, 2, 3, 3, generator=random, dtype=torch.float64) * scale + offset
    moments = Posterior(draws, torch.rand(10, 2, 3, 3, generator=random, dtype=torch.float64) * scale)
    ends = [0, *sorted(set(cuts)), 10]
    parts = [Posterior(*(x[a:b] for x in moments)) for a, b in pairwise(ends)]
    sums = ChannelSums.of(parts[0])
    for part in parts[1:]:
        sums = sums.plus(ChannelSums.of(part))
    whole = ChannelSums.of(moments)
    assert sums.count == whole.count == 90
    # Rounding of float64 relative to the largest number that is squared, not to the spread.
    error = 1e-14 * (abs(offset) + 10 * scale)
    assert sums.mean == pytest.approx(whole.mean, rel=0, abs=error)
    assert sums.squares == pytest.approx(whole.squares, rel=1e-12, abs=90 * error * 10 * scale)


def test_batches_are_functions_of_seed_and_step(encoded: Path) -> None:
    dataset, again = LatentDataset(encoded), LatentDataset(encoded)
    first = dataset.batch(5, 10, seed=1)
    dataset.batch(6, 10, seed=1)
    assert torch.equal(first.values, again.batch(5, 10, seed=1).values)
    others = [again.batch(6, 10, seed=1), again.batch(5, 10, seed=2)]
    assert all(not torch.equal(first.values, other.values) for other in others)
    assert torch.equal(dataset.take(7, seed=1).values, again.take(7, seed=1).values)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_batches(encoded: Path, method: str) -> None:
    dataset, config = LatentDataset(encoded), Config()
    config.seed, config.training.batch_size, config.training.data_workers = 1, 10, 2
    assert len(pickle.dumps(dataset)) < 10_000, "names of files, and not what is in them"
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        with step_batches(dataset, config, range(4)) as read:
            batches = list(read)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        expected = dataset.batch(step, 10, 1)
        assert torch.equal(batch.values, expected.values)
        assert torch.equal(batch.labels, expected.labels)


def test_draws_have_the_posterior_s_mean_and_deviation(encoded: Path) -> None:
    """One epoch a step: every image is drawn once in each of n steps."""
    dataset, steps = LatentDataset(encoded), 200
    moments = posterior_of(dataset, torch.arange(COUNT))
    draws = torch.stack([dataset.batch(step, COUNT, 0).values for step in range(steps)])
    order = torch.stack([epoch_indices(COUNT, step, COUNT, 0).argsort() for step in range(steps)])
    standardized = torch.stack(
        [(x[k] - moments.mean) / moments.std for x, k in zip(draws, order, strict=True)]
    )
    # 16,384 latents with 200 draws each: means are N(0, 1/200), variances have the deviation √(2/199). The
    # largest of 16,384 normal numbers exceeds 6 deviations once in 3e4 seeds, and the seed is fixed.
    assert float(standardized.mean(0).abs().max()) < 6 / steps**0.5
    assert float((standardized.var(0) - 1).abs().max()) < 8 * (2 / (steps - 1)) ** 0.5
    assert abs(float(standardized.mean())) < 5 / standardized.numel() ** 0.5


def expected_draws(step: int, dataset: LatentDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the images of a step, which of them are mirrored, and the noise."""
    noise = RowDraws(0, "step", step).normal("posterior", range(COUNT), dataset.spec.shape)
    return epoch_indices(COUNT, step, COUNT, 0), mirrored_at_random(range(COUNT), step, 0), noise


def test_flips_stored_are_encodings_of_mirror_images(
    encoder: MakeEncoder, autoencoder: Autoencoder, images: Tensor, tmp_path: Path
) -> None:
    info = encode(encoder(tmp_path / "stored", flips="stored"))
    assert (info.count, info.rows) == (COUNT, 2 * COUNT)
    dataset = LatentDataset(tmp_path / "stored")
    straight, mirror = autoencoder.encode(images), autoencoder.encode(images.flip(-1))
    assert relative_error(mirror.mean, straight.mean.flip(-1)) > 1e-2, "a mirrored latent is another thing"
    indices, mirrored, noise = expected_draws(2, dataset)
    assert mirrored.any()
    assert not mirrored.all()
    pairs = zip(straight, mirror, strict=True)
    chosen = [torch.where(mirrored.view(-1, 1, 1, 1), m[indices], s[indices]) for s, m in pairs]
    batch = dataset.batch(2, COUNT, 0)
    assert relative_error(batch.values, chosen[0] + chosen[1] * noise) < 1e-5  # as above
    assert batch.labels is not None
    assert batch.labels.tolist() == (indices // 16).tolist()
    # The statistics are of what is drawn from, mirror images included.
    both = torch.cat([straight.mean, mirror.mean]).double().mean((0, 2, 3))
    assert info.measured_mean == pytest.approx(both.tolist(), rel=1e-5)


def test_a_shorter_batch_has_the_same_draws(encoded: Path) -> None:
    """Posterior noise belongs to the row: the first rows of step 0 are the same whatever its size."""
    dataset = LatentDataset(encoded)
    assert torch.equal(dataset.batch(0, 13, 4).values, dataset.batch(0, 30, 4).values[:13])
    moments, draws = posterior_of(dataset, torch.arange(20)), RowDraws(0, "step", 1)
    some = Posterior(moments.mean[5:11], moments.std[5:11]).sample(draws, range(5, 11))
    assert torch.equal(some, moments.sample(draws, range(20))[5:11])


def test_flips_drawn_mirror_the_latents(encoder: MakeEncoder, encoded: Path, tmp_path: Path) -> None:
    info = encode(encoder(tmp_path / "drawn", flips="drawn"))
    assert (info.count, info.rows) == (COUNT, COUNT)
    dataset, plain = LatentDataset(tmp_path / "drawn"), LatentDataset(encoded)
    batch, straight = dataset.batch(2, COUNT, 0), plain.batch(2, COUNT, 0)
    _, mirrored, _ = expected_draws(2, dataset)
    assert torch.equal(batch.values[mirrored], straight.values[mirrored].flip(-1))
    assert torch.equal(batch.values[~mirrored], straight.values[~mirrored])
    assert torch.equal(dataset.take(9, 0).values, plain.take(9, 0).values), "evaluation sees none mirrored"


def test_latents_of_a_zip_are_taken_as_they_are(tmp_path: Path, vae: Path, autoencoder: Autoencoder) -> None:
    """Means and then deviations, as `dataset.json` codes store them; the encoder is not asked."""
    random = np.random.default_rng(0)
    moments = np.abs(random.standard_normal((6, 8, 8, 8))).astype(np.float32)
    archive = tmp_path / "latents.zip"
    with zipfile.ZipFile(archive, "w") as file:
        names = [f"00000/img{k:08d}.npy" for k in range(6)]
        for name, array in zip(names, moments, strict=True):
            buffer = BytesIO()
            np.save(buffer, array)
            file.writestr(name, buffer.getvalue())
        file.writestr("dataset.json", json.dumps({"labels": [[name, k % 3] for k, name in enumerate(names)]}))
    words = ["--data", str(archive)]
    assert main(command(tmp_path / "out", vae, *words)) == 0
    dataset = LatentDataset(tmp_path / "out")
    stored = posterior_of(dataset, torch.arange(6))
    assert torch.equal(torch.cat(stored, dim=1), torch.from_numpy(moments))
    assert dataset.spec.class_names == ("0", "1", "2")

    source = open_images(str(archive), "train", label_column=None)
    with pytest.raises(InputError, match="flips: must be none or drawn, got stored"):
        Encoder(source, autoencoder, tmp_path / "flips", options(flips="stored"))
    other = Encoder(source, autoencoder, tmp_path / "large", options(resolution=32))
    with pytest.raises(
        InputError, match=r"have shape \(8, 8, 8\), those of .* \(8, 16, 16\) at this resolution"
    ):
        other.encode(workers=0)


# However the work is cut up or broken off, the result is the same.


def test_parts_are_the_whole(
    encoder: MakeEncoder, encoded: Path, tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "parts"
    assert main(command(folder, vae, "--part=2/2")) == 0
    out = capsys.readouterr().out
    assert "1 of 1 shards of part 2/2 are finished; 2 shards of other parts are missing" in out
    assert not (folder / "latents.json").exists()
    with pytest.raises(InputError, match="holds no finished latents"):
        LatentDataset(folder)
    encoder(folder).encode(Position(0, 2), workers=2)
    info = encoder(folder).finish()
    assert info == LatentsInfo.read(encoded)
    assert tree(folder) == tree(encoded)


def test_torchrun_says_which_part(
    vae: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (1, 0, 3, 2):
        monkeypatch.setenv("RANK", str(rank))
        assert main(command(tmp_path / "ranks", vae)) == 0
        shards = {path.name for path in (tmp_path / "ranks" / "shards").glob("*.arrow")}
        assert (f"0000{rank}.arrow" in shards) == (rank < 3), "of four processes one finds nothing to do"
    assert tree(tmp_path / "ranks") == tree(encoded)


KILLED = """
import os, signal, sys
from tvmatch.cli import main
from tvmatch.data.latents.shards import ShardWriter

write, calls = ShardWriter.write, []
def killed(self, moments, labels):
    calls.append(1)
    if len(calls) == 7:  # the second batch of the second shard; the first one is on the disk
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, moments, labels)
ShardWriter.write = killed
main(sys.argv[1:])
"""


def test_a_killed_process_is_finished_by_another(
    vae: Path, encoded: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "latents"
    words = [sys.executable, "-c", KILLED, *command(folder, vae, "--workers=1")]
    killed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = {path.name for path in (folder / "shards").iterdir()}
    left_behind = found - {"00000.arrow", "00000.json"}
    assert len(left_behind) == 1, "the unfinished shard has another name"
    assert left_behind.pop().startswith(".00001.arrow.")
    before = (folder / "shards" / "00000.arrow").stat()
    assert main(command(folder, vae)) == 0
    assert tree(folder) == tree(encoded)
    assert (folder / "shards" / "00000.arrow").stat().st_mtime_ns == before.st_mtime_ns, "made again"


def test_ctrl_c_says_how_to_go_on(
    vae: Path,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, calls = ShardWriter.write, []

    def interrupted(self: ShardWriter, *arguments: Any) -> None:
        calls.append(1)
        write(self, *arguments)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    folder = tmp_path / "the latents"
    assert main(command(folder, vae, "--workers=2")) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("interrupted; 1 of 3 shards are finished; continue with: tvmatch encode --data")
    assert f"--out '{folder}'" in error
    assert "\n" not in error
    assert sorted(path.name for path in (folder / "shards").iterdir()) == ["00000.arrow", "00000.json"]
    assert main(command(folder, vae)) == 0
    assert tree(folder) == tree(encoded)


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("--part=1/1", "--part=1/1", True),
        ("--part=1/1", "--part=2/3", True),
        ("--part=2/3", "--part=1/1", True),
        ("--part=2/3", "--part=2/3", True),
        ("--part=2/3", "--part=1/3", False),
    ],
)
def test_two_processes_with_the_same_part(
    first: str,
    second: str,
    refused: bool,
    vae: Path,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second is refused before it writes, the first goes on unharmed."""
    write, calls = ShardWriter.write, []
    folder = tmp_path / "latents"

    def overtaken(self: ShardWriter, *arguments: Any) -> None:
        calls.append(1)
        write(self, *arguments)
        if len(calls) == 2:
            monkeypatch.setattr(ShardWriter, "write", write)
            before = tree(folder)
            assert main(command(folder, vae, second)) == (2 if refused else 0)
            if refused:
                assert tree(folder) == before

    monkeypatch.setattr(ShardWriter, "write", overtaken)
    assert main(command(folder, vae, first)) == 0
    error = capsys.readouterr().err
    assert error == (
        f"tvmatch: error: out: {folder} is in use: process {os.getpid()} on {socket.gethostname()} encodes "
        "into it; give each process its own --part\n"
        if refused
        else ""
    )
    assert main(command(folder, vae)) == 0
    assert tree(folder) == tree(encoded)


@pytest.mark.parametrize("same", [True, False])
def test_two_first_starts_at_once(same: bool, encoder: MakeEncoder, tmp_path: Path) -> None:
    """One begins the folder; the other sees whether its options are the same."""
    results: list[Encoder | InputError] = []
    together = threading.Barrier(4)

    def start(number: int) -> None:
        together.wait()
        try:
            results.append(encoder(tmp_path / "latents", flips=["none", "drawn"][0 if same else number % 2]))
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, InputError)]
    assert len(errors) == (0 if same else 2)
    assert all("was begun with other settings, flips" in str(error) for error in errors)
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["encoding.json"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than this fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_finished_shards(
    vae: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "latents"
    assert main(command(folder, vae, "--part=3/3")) == 0, "the last shard, which is smaller"
    sizes = [(encoded / "shards" / f"0000{k}.arrow").stat().st_size for k in range(3)]
    before = tree(folder)
    capsys.readouterr()
    with largest_file((sizes[0] + sizes[2]) // 2):
        assert main(command(folder, vae)) == 2
    error = capsys.readouterr().err
    assert error.startswith("tvmatch: error: out: ")
    assert f"{os.strerror(errno.EFBIG)}; 1 of 3 shards are finished; continue with: tvmatch" in error
    assert error.count("\n") == 1
    assert tree(folder) == before
    assert main(command(folder, vae)) == 0
    assert tree(folder) == tree(encoded)


def shorten(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


SPOILED: dict[str, Callable[[Path], None]] = {
    "no report": lambda shards: (shards / "00001.json").unlink(),
    "half a report": lambda shards: shorten(shards / "00001.json", 40),
    "a report of something else": lambda shards: (shards / "00001.json").write_text('{"rows": 24}'),
    "no shard": lambda shards: (shards / "00001.arrow").unlink(),
    "an empty shard": lambda shards: (shards / "00001.arrow").write_bytes(b""),
    "a byte less": lambda shards: shorten(shards / "00001.arrow", 1),
    "half a shard": lambda shards: shorten(shards / "00001.arrow", 10_000),
    "the end is zeros": lambda shards: (
        shorten(shards / "00001.arrow", 60_000),
        os.truncate(shards / "00001.arrow", (shards / "00000.arrow").stat().st_size),
    )[0],
    "the start is zeros": lambda shards: (shards / "00001.arrow").write_bytes(
        bytes(2048) + (shards / "00001.arrow").read_bytes()[2048:]
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_shard_is_made_again_and_no_other(
    how: str, copy: Path, encoder: MakeEncoder, encoded: Path
) -> None:
    SPOILED[how](copy / "shards")
    again = encoder(copy)
    assert again.finished() == [0, 2]
    shown: list[tuple[int, int]] = []
    assert again.finish() is None
    encode(again, on_progress=lambda done, total: shown.append((done, total)))
    assert shown[0] == (COUNT - SHARD, COUNT)
    assert shown[-1] == (COUNT, COUNT)
    assert tree(copy) == tree(encoded)


def test_a_finished_folder_stays_as_it_is(copy: Path, vae: Path, encoded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()}
    assert main(command(copy, vae)) == 0
    assert {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()} == before
    assert tree(copy) == tree(encoded)


def change(**values: Any) -> Callable[[Path], None]:
    """Of latents.json."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "latents.json").read_text())
        content["data"] |= {name: values[name] for name in values.keys() & content["data"].keys()}
        content |= {name: values[name] for name in values.keys() - content["data"].keys()}
        (folder / "latents.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "latents.json").unlink(), "holds no finished latents"),
        (lambda folder: shorten(folder / "latents.json", 9), "is not readable as JSON"),
        (change(format="tvmatch-latents-0"), "the format of .* is not tvmatch-latents-1"),
        (change(flips="both"), "does not describe latents .flips must be one of none, stored, drawn"),
        (change(shards=[]), "does not describe latents .the shards have 0 rows"),
        (change(count=63), "does not describe latents .the shards have 64 rows, 63 images are 63"),
        (change(count="64"), "does not describe latents"),
        (change(spec=1), "does not describe latents"),
        (change(std=[1.0, 1.0]), "mean and std must have one number for each"),
        (change(shape=[4, 4, 8]), "00000.arrow holds latents of another shape than latents.json says"),
        (
            lambda folder: (folder / "shards" / "00001.arrow").unlink(),
            "00001.arrow is missing; `tvmatch encode",
        ),
        (lambda folder: (folder / "shards" / "00001.arrow").write_bytes(b""), "00001.arrow is damaged"),
        (lambda folder: shorten(folder / "shards" / "00001.arrow", 10_000), "00001.arrow is damaged"),
        (
            lambda folder: shutil.copy(folder / "shards" / "00002.arrow", folder / "shards" / "00001.arrow"),
            "00001.arrow is damaged: it has 16 of 24 rows",
        ),
        (
            lambda folder: shutil.copy(PHOTOGRAPHS / "cat" / "00.jpg", folder / "shards" / "00001.arrow"),
            "00001.arrow is damaged",
        ),
    ],
)
def test_training_refuses_a_spoiled_folder(spoil: Callable[[Path], None], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(InputError, match=message) as caught:
        LatentDataset(copy)
    assert "\n" not in str(caught.value)


# Normalisation.


def test_another_normalisation_encodes_nothing_again(
    copy: Path,
    vae: Path,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Autoencoder, "encode", None)
    before = tree(copy / "shards")
    measured = LatentsInfo.read(copy)
    assert main(command(copy, vae, "--normalization=imagenet256_w2")) == 0
    assert "normalisation (recipe imagenet256_w2): mean 0.86488, -0.27787" in capsys.readouterr().out
    changed = LatentsInfo.read(copy)
    expected: Any = recipe("imagenet256_w2").data
    assert changed.spec.mean == tuple(expected.mean)
    assert changed.spec.std == tuple(expected.std)
    assert changed.measured_mean == measured.measured_mean
    assert tree(copy / "shards") == before
    # Finishing a folder without a word on it leaves it so.
    assert main(command(copy, vae)) == 0
    assert LatentsInfo.read(copy) == changed

    other = shutil.copytree(encoded, tmp_path / "other")
    assert main(command(other, vae, f"--normalization={copy}")) == 0
    assert LatentsInfo.read(other).spec == changed.spec
    assert main(command(copy, vae, "--normalization=measured")) == 0
    assert tree(copy) == tree(encoded)


# Images that cannot be read.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The photographs, of which one of the first and one of the last shard are damaged."""
    folder = Path(shutil.copytree(PHOTOGRAPHS, tmp_path / "photographs"))
    shorten(folder / "astronaut" / "07.jpg", 1000)
    (folder / "rocket" / "15.jpg").write_bytes(b"no image")
    return folder


def test_a_bad_image_is_named_or_left_out(
    damaged: Path, vae: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(damaged)]
    assert main(command(tmp_path / "out", vae, *words)) == 2
    error = capsys.readouterr().err
    assert "astronaut/07.jpg: " in error
    assert "on_bad_image=skip leaves such images out" in error
    assert error.count("\n") == 1
    # The same folder goes on, and what is good keeps its place.
    words.append("--on_bad_image=skip")
    assert main(command(tmp_path / "out", vae, *words, "--part=2/2")) == 0
    assert main(command(tmp_path / "out", vae, *words, "--workers=2")) == 0
    error = capsys.readouterr().err
    assert "left out 2 images that cannot be read, the first: " in error
    dataset = LatentDataset(tmp_path / "out")
    assert len(dataset) == COUNT - 2
    assert [shard.rows for shard in dataset.info.shards] == [23, 24, 15]
    assert dataset.info.provenance["skipped"] == 2
    good = torch.tensor([k for k in range(COUNT) if k not in (7, 63)])
    stored = posterior_of(dataset, torch.arange(COUNT - 2)).mean
    expected = posterior_of(LatentDataset(encoded), good).mean
    assert relative_error(stored, expected) < 1e-5  # as above
    assert main(command(tmp_path / "whole", vae, *words)) == 0
    assert tree(tmp_path / "whole") == tree(tmp_path / "out")


def test_shards_without_a_good_image(damaged: Path, autoencoder: Autoencoder, tmp_path: Path) -> None:
    for path in (damaged / "astronaut").iterdir():
        path.write_bytes(b"no image")
    source = open_images(str(damaged), "train", label_column="label")
    encoder = Encoder(source, autoencoder, tmp_path / "out", options(data=str(damaged), shard_size=16))
    info = encode(encoder, on_bad_image="skip")
    assert [shard.rows for shard in info.shards] == [16, 16, 15]
    assert len(LatentDataset(tmp_path / "out")) == 47
    assert encoder.finished() == [0, 1, 2, 3]

    for path in damaged.rglob("*.jpg"):
        path.write_bytes(b"no image")
    source = open_images(str(damaged), "train", label_column="label")
    none = Encoder(source, autoencoder, tmp_path / "none", options(data=str(damaged)))
    none.encode(workers=0, on_bad_image="skip")
    with pytest.raises(InputError, match="none of 64 images can be read; the first: "):
        none.finish()


def test_a_worker_that_dies(encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard that it read for is not there, the one before is."""
    pixels = ImageReader.pixels

    def killed(self: ImageReader, number: int, *arguments: Any) -> Any:
        if number == SHARD + 20:  # in a process that inherits this function, a few batches ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels(self, number, *arguments)

    monkeypatch.setattr(ImageReader, "pixels", killed)
    unlucky = encoder(tmp_path)
    with pytest.raises(
        DataError, match=r"the process \d+ that reads data was killed by SIGKILL, perhaps for"
    ):
        unlucky.encode(workers=2)
    assert unlucky.finished() == [0]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.arrow", "00000.json"]


def test_reading_that_fails_in_another_way(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 1, and the folder for the latents is not blamed; whoever reads."""

    def broken(self: ImageReader, number: int, *arguments: Any) -> Any:
        raise OSError(5, "Input/output error", "photo.png")

    monkeypatch.setattr(ImageReader, "pixels", broken)
    for workers in (0, 2):
        assert main(command(tmp_path / str(workers), vae, f"--workers={workers}")) == 1
        error = capsys.readouterr().err
        assert error == (
            "tvmatch: error: the data set failed: OSError: [Errno 5] Input/output error: 'photo.png'\n"
        )


def test_latents_that_are_not_finite_are_not_stored(photographs: ImageReader, tmp_path: Path) -> None:
    network = tiny()
    network.quant_conv.bias.data[0] = torch.nan
    known = Normalization((0.0,) * 4, (1.0,) * 4, "recipe")
    broken = Encoder(photographs, Autoencoder(network, "broken"), tmp_path, options(), known)
    with pytest.raises(InputError, match=r"broken gives non-finite numbers .* images 0 … 4"):
        broken.encode(workers=0, on_bad_image="skip")
    assert broken.finished() == []


# What is refused, and what is shown.


def test_other_options_are_refused(
    copy: Path, encoder: MakeEncoder, autoencoder: Autoencoder, photographs: ImageReader, damaged: Path
) -> None:
    before = tree(copy)
    differing: dict[str, Any] = {"resolution": 32, "crop": "centre", "flips": "drawn", "shard_size": 25}
    differing |= {"batch_size": 6, "split": "train[:64]", "label_column": None}
    for name, value in differing.items():
        with pytest.raises(
            InputError, match=rf"begun with other settings, {name} .* before, .* now; use another"
        ):
            encoder(copy, **{name: value})
    others = open_images(str(damaged), "train", label_column="label")
    with pytest.raises(InputError, match="begun with other settings, data_fingerprint"):
        Encoder(others, autoencoder, copy, options())
    network = tiny()
    network.decoder.conv_out.bias.data += 1
    with pytest.raises(InputError, match="begun with other settings, autoencoder_fingerprint"):
        Encoder(photographs, Autoencoder(network, "own"), copy, options())
    assert tree(copy) == before


@pytest.mark.parametrize(
    ("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", None), (None, "2"), ("", "")]
)
def test_variables_of_another_launcher(
    rank: str | None,
    world: str | None,
    vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Processes that all take themselves for the first would do the same work."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert main(command(tmp_path / "out", vae)) == 2
    error = capsys.readouterr().err
    assert error.startswith("tvmatch: error: part: RANK and WORLD_SIZE must be torchrun's")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(command(tmp_path / "out", vae, "--part=1/1")) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--resolution=17"], "resolution: must be a multiple of 2 pixels"),
        (["--resolution=0"], "resolution: must be at least 1, got 0"),
        (["--shard_size=0"], "shard_size: must be at least 1, got 0"),
        (["--batch_size=-1"], "batch_size: must be at least 1, got -1"),
        (["--workers=-1"], "workers: must be at least 0, got -1"),
        (["--crop=circle"], "crop: must be one of 'centre', 'dhariwal', got circle"),
        (["--flips=yes"], "flips: must be one of 'none', 'stored', 'drawn', got yes"),
        (["--on_bad_image=cry"], "on_bad_image: must be one of"),
        (["--part=0/2"], "part: must be like 2/8, from 1/8 to 8/8, got '0/2'"),
        (["--part=3/2"], "part: must be like 2/8, from 1/8 to 8/8, got '3/2'"),
        (["--part=half"], "part: must be like 2/8"),
        (["--normalization=nothing"], "normalization: must be measured, a recipe, or a folder of latents"),
        (["--normalization=digits"], "normalization: the recipe digits has none for latents"),
        (["--data=no/such-data"], "data: no/such-data could not be read"),
        (["--data=/no/such/folder"], "data: /no/such/folder does not exist"),
        (["--split=test"], "split: "),
        (["--label_column=kind"], "label_column: there is no column 'kind'"),
        (["--image_column=picture"], "image_column: there is no column 'picture'"),
        (["--autoencoder=/no/such/folder"], "autoencoder: '/no/such/folder' is neither a folder nor"),
        (["--device=moon"], "device: no device is called 'moon'"),
        (["--resolutoin=16"], "--resolutoin: no such option; did you mean --resolution?"),
    ],
)
def test_bad_options_are_one_line(
    changes: list[str],
    message: str,
    vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert main(command(tmp_path / "out", vae, *changes)) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"tvmatch: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_refused(
    vae: Path, tmp_path: Path, encoder: MakeEncoder, autoencoder: Autoencoder, photographs: ImageReader
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(mine\.txt\), which are not overwritten"):
        encoder(tmp_path)
    with pytest.raises(InputError, match=r"mine\.txt is a file"):
        encoder(tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    encoder(tmp_path / "empty")
    for text in ("{", "[]", '{"format": "tvmatch-encoding-0"}', '{"format": "tvmatch-encoding-1"}'):
        (tmp_path / "empty" / "encoding.json").write_text(text)
        with pytest.raises(InputError, match=r"encoding\.json cannot be read, or is of another version"):
            encoder(tmp_path / "empty")
    narrow = Normalization((0.0,) * 16, (1.0,) * 16, "recipe wide")
    with pytest.raises(InputError, match=r"recipe wide has 16 channels, latents of .* have 4"):
        encoder(tmp_path / "new", narrow)
    assert not (tmp_path / "new").exists()


def test_data_without_labels(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (PHOTOGRAPHS / "cat").iterdir():
        shutil.copy(path, flat)
    assert main(command(tmp_path / "flat latents", vae, "--data", str(flat))) == 0
    assert "16 latents of shape [4, 8, 8], no classes" in capsys.readouterr().out
    dataset = LatentDataset(tmp_path / "flat latents")
    assert dataset.spec.class_names is None
    assert dataset.batch(0, 4, 0).labels is None
    assert main(command(tmp_path / "unlabelled", vae, "--label_column=null")) == 0
    assert LatentDataset(tmp_path / "unlabelled").spec.class_names is None


def test_the_data_are_listed_once(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million files take minutes on a network's disk."""
    walk, calls = image_source.walk, []

    def counted(root: Path) -> Any:
        calls.append(root)
        return walk(root)

    monkeypatch.setattr(image_source, "walk", counted)
    assert main(command(tmp_path / "out", vae)) == 0
    assert calls == [PHOTOGRAPHS]


def test_no_more_readers_than_cores(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PyTorch would warn of it, in four lines."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    words = [word for word in command(tmp_path / "out", vae) if word not in ("--workers", "0")]
    assert main(words) == 0
    assert [str(warning.message) for warning in recwarn if "worker" in str(warning.message)] == []


def test_progress_on_a_terminal(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(command(tmp_path / "out", vae)) == 0
    error = capsys.readouterr().err
    assert "encoding" in error
    assert "64/64" in error
    assert "/s" in error


def test_each_process_of_torchrun_has_a_gpu_of_its_own(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr("tvmatch.cli.encode.resolve_device", resolve)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in ("auto", "cuda", "cuda:1", "cpu"):
        main(command(tmp_path / "out", vae, "--device", device, "--part=4/4"))
    assert asked == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
