"""`tvmatch sample` into files: written as samples come, resumed after a kill, mixed with no others."""

import gc
import json
import multiprocessing
import os
import signal
import tracemalloc
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize_, small_dit
from PIL import Image
from runs import tree
from small_extractor import SmallExtractor
from torch import Tensor

import tvmatch
from tvmatch.cli import main
from tvmatch.data.spec import DataSpec
from tvmatch.evaluation import load_reference
from tvmatch.generation import partial_output, sample_files
from tvmatch.storage.locks import is_lock
from tvmatch.trained_model import TrainedModel, load

LAYOUTS = {"folder": ["--out=out"], "npz": ["--out=out.npz"], "adm": ["--out=out.npz", "--format=adm"]}
PARTIAL = {"folder": "out.partial", "npz": "out.npz.partial", "adm": "out.npz.partial"}
COMMON = ["sample", "model", "--count=11", "--batch_size=4", "--device=cpu", "--seed=3"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save("model", 3)
    return tmp_path


def save(folder: str, channels: int, seed: int = 0, class_count: int = 3) -> None:
    shape = (channels, 4, 4)
    names = ("ant", "bee", "cow")[:class_count] or None
    spec = DataSpec("image", shape, names, (0.5,) * channels, (0.5,) * channels)
    network = randomize_(small_dit(shape, class_count), seed).requires_grad_(False).eval()
    made = TrainedModel(network, spec, False, (1.0, 3.0), provenance={"class_counts": [1, 5, 2]})
    Path(folder).mkdir()
    made.save(Path(folder))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line.removeprefix("tvmatch: error: ")


def without_locks() -> dict[str, str]:
    """Every file: but a killed command leaves its lock, which the next one takes and removes."""
    return {name: content for name, content in tree(Path()).items() if not is_lock(Path(name).name)}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that changes nothing and draws nothing."""
    before = without_locks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedModel, "sample", lambda *_, **__: pytest.fail("samples were drawn"))
        checkpoints = [argument[13:] for argument in arguments if argument.startswith("--checkpoint=")]
        rest = [argument for argument in arguments if not argument.startswith("--checkpoint=")]
        assert main(["sample", *(checkpoints or ["model"]), *COMMON[2:], *rest]) == 2
    line = one_line(capsys)
    assert without_locks() == before
    return line


# What is written


def test_bytes_for_other_tools(capsys: pytest.CaptureFixture[str]) -> None:
    """ADM's layout, and read back as a reference: the samples' own features."""
    assert main([*COMMON, "--out=adm.npz", "--format=adm"]) == 0
    samples = load("model").sample([k % 3 for k in range(11)], seed=3, batch_size=4)
    expected = samples.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    arrays = np.load("adm.npz")
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert arrays["arr_1"].tolist() == [k % 3 for k in range(11)]
    found = load_reference("adm.npz", SmallExtractor(), (3, 4, 4), cache=Path("cache"))
    assert found is not None
    features = SmallExtractor()(torch.from_numpy(expected).permute(0, 3, 1, 2)).pooled.double()
    torch.testing.assert_close(found.pooled.mean, features.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_grey_bytes_have_three_channels() -> None:
    save("grey", 1)
    assert main(["sample", "grey", "--count=2", "--out=adm.npz", "--format=adm", "--uint8=truncate"]) == 0
    samples = load("grey").sample([0, 1])
    expected = samples.mul(255).floor().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    np.testing.assert_array_equal(np.load("adm.npz")["arr_0"], expected.numpy())


def test_a_folder_can_be_a_reference() -> None:
    """Nothing but the samples' own pixels in each file."""
    assert main([*COMMON, "--out=out", "--uint8=truncate"]) == 0
    samples = load("model").sample([k % 3 for k in range(11)], seed=3, batch_size=4)
    for k, pixels in enumerate(samples.mul(255).floor().byte()):
        with Image.open(f"out/{k:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3, 2])
def test_pictures_of_any_channels(channels: int) -> None:
    save("other", channels)
    assert main(["sample", "other", "--count=2", "--out=out"]) == 0
    samples = load("other").sample([0, 1]).mul(255).round().byte()
    with Image.open("out/000001.png") as picture:
        seen = torch.tensor(np.asarray(picture))
    expected = {1: samples[1, 0], 3: samples[1].permute(1, 2, 0), 2: torch.cat(list(samples[1]), dim=1)}
    assert torch.equal(seen, expected[channels])


def test_later_samples_of_the_same_long_run() -> None:
    """Noise and labels by number, of labels given, in turn and drawn."""
    for name, arguments in (
        ("turn", []),
        ("given", ["--labels=cow,ant"]),
        ("drawn", ["--labels_from=data"]),
        ("even", ["--labels_from=uniform"]),
    ):
        assert main([*COMMON, *arguments, f"--out={name}.npz"]) == 0
        assert main([*COMMON, *arguments, "--first=8", "--count=3", f"--out={name}_8.npz"]) == 0
        whole, later = np.load(f"{name}.npz"), np.load(f"{name}_8.npz")
        for array in ("samples", "labels"):
            np.testing.assert_array_equal(later[array], whole[array][8:])
    assert main([*COMMON, "--first=8", "--count=2", "--out=later"]) == 0
    assert sorted(path.name for path in Path("later").iterdir()) == ["000008.png", "000009.png"]
    assert main([*COMMON, "--first=8", "--count=2", "--out=later.png"]) == 0


def test_a_model_without_classes() -> None:
    save("none", 3, class_count=0)
    assert main(["sample", "none", "--first=2", "--count=3", "--out=a.npz"]) == 0
    arrays = np.load("a.npz")
    assert list(arrays) == ["samples"]
    np.testing.assert_array_equal(arrays["samples"], load("none").sample(count=3, first=2).numpy())


# Memory


def peak(count: int, arguments: list[str]) -> int:
    gc.collect()
    tracemalloc.start()
    assert main(["sample", "model", f"--count={count}", "--batch_size=8", *arguments]) == 0
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_does_not_depend_on_the_count(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large samples, which tracemalloc sees, being NumPy's; NumPy copies arrays in pieces of 16 MiB."""
    side = {"folder": 64, "npz": 256, "adm": 512}[layout]
    shape, alive = (3, side, side), set[int]()
    draw = TrainedModel.sample
    large = property(lambda model: shape)
    monkeypatch.setattr(TrainedModel, "output_shape", large)

    def sample(model: TrainedModel, *arguments: Any, **options: Any) -> Tensor:
        assert len(alive) <= 1  # the batch before this one
        small = draw(model, *arguments, **options)
        values = np.resize(small.numpy(), (len(small), *shape))
        alive.add(id(values))
        weakref.finalize(values, alive.discard, id(values))
        return torch.from_numpy(values)

    monkeypatch.setattr(TrainedModel, "sample", sample)
    out, *form = LAYOUTS[layout]
    assert main(["sample", "model", "--count=8", out, *form]) == 0  # it imports
    few, many = (
        peak(count, [f"{out}{name}".replace(f".npz{name}", f"{name}.npz"), *form])
        for count, name in ((24, "_few"), (56, "_many"))
    )
    sample_size = 4 * 3 * side * side
    assert many - few < 5 * sample_size  # 32 more of them


# Going on


def end(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int) -> Callable[..., Tensor]:
    """A `sample` that kills the process instead of drawing batch `number`."""
    draw, calls = TrainedModel.sample, iter(range(1000))

    def sample(model: TrainedModel, *arguments: Any, **options: Any) -> Tensor:
        if next(calls) == number:
            end()
        return draw(model, *arguments, **options)

    return sample


def half_a_picture(number: int) -> Callable[..., None]:
    """A Pillow that is killed when half of picture `number` is written."""
    save, calls = Image.Image.save, iter(range(1000))

    def half(image: Image.Image, path: Path, **options: Any) -> None:
        save(image, path, **options)
        if next(calls) == number:
            os.truncate(path, path.stat().st_size // 2)
            end()

    return half


def half_an_array(number: int) -> Callable[..., None]:
    """The same of batch `number` of an array."""
    write, calls = sample_files.Arrays.write, iter(range(1000))

    def half(files: sample_files.Arrays, numbers: range, samples: Tensor) -> None:
        before = files._raw.stat().st_size
        write(files, numbers, samples)
        if next(calls) == number:
            os.truncate(files._raw, (before + files._raw.stat().st_size) // 2 + 1)
            end()

    return half


def half_an_archive(*_: Any, **__: Any) -> None:
    Path("out.npz.partial/1.npz").write_bytes(b"PK half of it")
    end()


def killed(patch: tuple[Any, str, Any], arguments: list[str]) -> None:
    """Run a command in a forked process that ends by SIGKILL."""

    def child() -> None:
        setattr(*patch)
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


KILLS: dict[str, tuple[str, Callable[[], tuple[Any, str, Any]]]] = {
    "before the first batch": ("npz", lambda: (TrainedModel, "sample", kill_at(0))),
    "between batches of bytes": ("adm", lambda: (TrainedModel, "sample", kill_at(1))),
    "between batches of pictures": ("folder", lambda: (TrainedModel, "sample", kill_at(2))),
    "in a picture": ("folder", lambda: (Image.Image, "save", half_a_picture(6))),
    "in the last picture": ("folder", lambda: (Image.Image, "save", half_a_picture(10))),
    "in a batch of arrays": ("npz", lambda: (sample_files.Arrays, "write", half_an_array(1))),
    "in the last batch of bytes": ("adm", lambda: (sample_files.Arrays, "write", half_an_array(2))),
    "in the archive": ("npz", lambda: (zipfile, "ZipFile", half_an_archive)),
    "when all is drawn": ("adm", lambda: (sample_files.Arrays, "finish", end)),
    "when the output is in its place": ("folder", lambda: (partial_output.shutil, "rmtree", end)),
}


@pytest.mark.parametrize("name", KILLS)
def test_the_same_command_goes_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte what it would have been, and nothing else stays."""
    layout, patch = KILLS[name]
    Path("whole").mkdir()
    whole = [argument.replace("=out", "=whole/out") for argument in LAYOUTS[layout]]
    assert main([*COMMON, *whole]) == 0
    killed(patch(), [*COMMON, *LAYOUTS[layout]])
    assert (Path(PARTIAL[layout]) / "settings.json").is_file()
    assert main([*COMMON, *LAYOUTS[layout]]) == 0
    assert {name.removeprefix("whole/"): digest for name, digest in tree(Path("whole")).items()} == {
        name: digest for name, digest in tree(Path()).items() if name.startswith("out")
    }
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        ["model", "whole", LAYOUTS[layout][0].removeprefix("--out=")]
    )


def test_several_numbers_of_steps_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """What is finished is not drawn again."""
    for out in ("a.npz", "b", "c.png"):
        command = [*COMMON, "--steps=1,2,4", f"--out={out}"]
        assert main([*command[:-1], f"--out=whole_{out}"]) == 0
        killed((TrainedModel, "sample", kill_at(4)), command)
        first = Path(out).with_name(f"{Path(out).stem}_1{Path(out).suffix}")
        before = first.stat().st_mtime_ns
        assert main(command) == 0
        assert first.stat().st_mtime_ns == before
        ours = {name: digest for name, digest in tree(Path()).items() if name.startswith(out[0])}
        theirs = {name: digest for name, digest in tree(Path()).items() if name.startswith("whole_" + out[0])}
        assert ours == {name.removeprefix("whole_"): digest for name, digest in theirs.items()}
        assert len(ours) >= 3


OTHERS: dict[str, tuple[list[str], str]] = {
    "seed": (["--seed=4"], "seed 3 before, 4 now"),
    "count": (["--count=12"], "count 11 before, 12 now"),
    "first": (["--first=4"], "first 0 before, 4 now"),
    "steps": (["--steps=2"], "counts [1] before, [2] now"),
    "times": (["--times=1,0.5,0"], "times none before, [1.0, 0.5, 0.0] now"),
    "guidance": (["--guidance=2"], "guidance 3.0 before, 2.0 now"),
    "labels": (["--labels=ant"], "labels none before, [0] now"),
    "drawn labels": (["--labels_from=data"], "labels from none before, data now"),
    "bytes": (["--uint8=truncate"], "uint8 round before, truncate now"),
    "batches": (["--batch_size=5"], "batch size 4 before, 5 now"),
    "checkpoint": (["--checkpoint=other"], "checkpoint "),
}


def test_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    killed((TrainedModel, "sample", kill_at(1)), [*COMMON, "--out=out"])
    save("other", 3, seed=1)
    for arguments, message in OTHERS.values():
        line = refused(capsys, *arguments, "--out=out")
        assert line.startswith(f"out: out.partial was begun with other options, {message}"), line
        assert line.endswith("; repeat that command, or remove the folder")
    assert main([*COMMON, "--out=out"]) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_came_into_its_place_is_not_taken_for_finished(
    layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMON, *LAYOUTS[layout]]
    killed((TrainedModel, "sample", kill_at(1)), command)
    out = Path(LAYOUTS[layout][0].removeprefix("--out="))
    out.write_text("mine")
    assert main(command) == 2
    assert one_line(capsys).startswith(f"out: {out} exists already, and an unfinished one in {out}.partial")
    assert out.read_text() == "mine"
    out.unlink()
    assert main(command) == 0


def test_another_form_of_the_same_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    killed((TrainedModel, "sample", kill_at(1)), [*COMMON, "--out=out.npz"])
    assert "layout npz before, adm now" in refused(capsys, "--out=out.npz", "--format=adm")


def test_a_copy_of_the_checkpoint_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    killed((TrainedModel, "sample", kill_at(1)), [*COMMON, "--out=out"])
    Path("model").rename("elsewhere")
    assert main(["sample", "elsewhere", *COMMON[2:], "--out=out"]) == 0
    assert "resuming after 4 of 11 samples" in capsys.readouterr().err


def test_nothing_drawn_is_nothing_to_protect(capsys: pytest.CaptureFixture[str]) -> None:
    killed((TrainedModel, "sample", kill_at(0)), [*COMMON, "--out=out"])
    assert main([*COMMON, "--seed=9", "--out=out"]) == 0
    assert len(list(Path("out").iterdir())) == 11


def test_an_error_before_the_first_sample_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        return torch.full((4, 3, 4, 4), torch.nan)

    monkeypatch.setattr(TrainedModel, "sample", broken)
    assert main([*COMMON, "--out=out"]) == 2
    assert "images: 4 of 4 have a pixel that is not finite" in one_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["model"]


def test_two_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The second is told; the first goes on."""
    settings = {"seed": 0}
    with partial_output.begin(Path("x"), [Path("x")], settings) as folder:
        (folder / "1.raw").write_bytes(b"some")
        with (
            pytest.raises(tvmatch.InputError, match=r"x\.partial is in use: process \d+ .* draws samples"),
            partial_output.begin(Path("x"), [Path("x")], settings),
        ):
            pass
        assert (folder / "1.raw").read_bytes() == b"some"
    assert not folder.exists()


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"format": "tvmatch-partial-0", "settings": {}}'])
def test_settings_that_cannot_be_read(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.partial").mkdir()
    Path("out.partial/settings.json").write_text(content)
    line = refused(capsys, "--out=out")
    assert line.startswith("out: out.partial/settings.json is not of this version")


def test_somebody_elses_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.partial").mkdir()
    Path("out.partial/thesis.tex").write_text("mine")
    assert refused(capsys, "--out=out").startswith("out: out.partial holds other files")


# What is refused before anything is drawn


def dangling() -> None:
    Path("link.npz").symlink_to("nowhere")


def with_points() -> None:
    spec = DataSpec("points", (2,), None, (0.0,) * 2, (1.0,) * 2)
    Path("points").mkdir()
    network = tvmatch.models.MLP(tvmatch.models.MLPConfig(8, 1, 4), (2,))
    TrainedModel(network, spec, scaled=False, guidance=1.0).save(Path("points"))


BAD: dict[str, tuple[list[str], str, Callable[[], object]]] = {
    "wrong suffix": (
        ["--out=a.jpg"],
        "out: must end in .png or .npz, or be the name of a folder",
        lambda: None,
    ),
    "a file": (["--out=a.npz"], "out: a.npz exists already", lambda: Path("a.npz").touch()),
    "a folder": (["--out=model"], "out: model exists already", lambda: None),
    "a link to nothing": (["--out=link.npz"], "out: link.npz exists already", dangling),
    "below a file": (["--out=a/b"], "out: a/b cannot be written, ", lambda: Path("a").touch()),
    "far below a file": (
        ["--out=a/b/c.png"],
        "out: a/b/c.png cannot be written, ",
        lambda: Path("a").touch(),
    ),
    "one of several": (["--out=a", "--steps=1,2"], "out: a_2 exists", lambda: Path("a_2").mkdir()),
    "a form that there is not": (["--out=a.npz", "--format=hdf5"], "format: must be adm", lambda: None),
    "bytes in a picture": (
        ["--out=a.png", "--format=adm"],
        "out: must end in .npz for the format adm",
        lambda: None,
    ),
    "bytes in a folder": (
        ["--out=a", "--format=adm"],
        "out: must end in .npz for the format adm",
        lambda: None,
    ),
    "bytes of no bytes": (
        ["--out=a.npz", "--uint8=truncate"],
        "uint8: a.npz will hold floating",
        lambda: None,
    ),
    "no such bytes": (["--out=a", "--uint8=up"], "uint8: must be round or truncate", lambda: None),
    "negative first": (["--out=a", "--first=-1"], "first: must be at least 0, got -1", lambda: None),
    "samples without a number": (
        ["--out=a", f"--first={2**64 - 3}", "--count=4", "--labels_from=uniform"],
        f"first: samples are numbered up to 2^64 - 1, got {2**64 - 3} for 4 of them",
        lambda: None,
    ),
    "more than there can be": (["--out=a", f"--count={2**63}"], "count: must be at most 9", lambda: None),
    "negative seed": (["--out=a", "--seed=-1"], "seed: must be at least 0, got -1", lambda: None),
    "no samples": (["--out=a", "--count=0"], "count: must be at least 1, got 0", lambda: None),
    "no batch": (["--out=a", "--batch_size=0"], "batch_size: must be at least 1, got 0", lambda: None),
    "labels twice": (
        ["--out=a", "--labels=1", "--labels_from=data"],
        "labels_from: cannot be combined",
        lambda: None,
    ),
    "labels of nowhere": (["--out=a", "--labels_from=x"], "labels_from: must be data or", lambda: None),
    "guidance": (["--out=a", "--guidance=4"], "guidance: trained for 1 to 3, got 4", lambda: None),
    "times": (["--out=a", "--times=0,1"], "times: must decrease strictly", lambda: None),
}


@pytest.mark.parametrize("name", BAD)
def test_found_before_anything_is_drawn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message, spoil = BAD[name]
    spoil()
    line = refused(capsys, *arguments)
    assert line.startswith(message), line


def test_a_place_that_may_not_be_written_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # this process may be root's
    assert "cannot be written" in refused(capsys, "--out=new/a.npz")


@pytest.mark.parametrize("arguments", [["--out=a"], ["--out=a.png"], ["--out=a.npz", "--format=adm"]])
def test_points_go_to_arrays(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with_points()
    assert main(["sample", "points", *arguments]) == 2
    assert one_line(capsys).startswith("out: must end in .npz for points")


def test_drawn_labels_of_an_imported_model(capsys: pytest.CaptureFixture[str]) -> None:
    made = replace(load("model"), provenance={"imported_from": "im256.pkl"})
    Path("imported").mkdir()
    made.save(Path("imported"))
    assert main(["sample", "imported", "--labels_from=data", "--out=a.npz"]) == 2
    assert one_line(capsys).startswith("labels_from: this checkpoint does not record how many elements")
    description = json.loads(Path("imported/model.json").read_text())
    assert description["provenance"] == {"imported_from": "im256.pkl"}
