"""State dicts as training code leaves them: prefixes of all kinds, label tables of both, no files at all."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_files import authors_bytes, authors_network
from helpers import random_inputs, randomize_, small_dit
from runs import images, tiny_config
from safetensors.torch import save_file
from test_sit import sit_state
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import tvmatch
from tvmatch.cli import main
from tvmatch.data.latents.autoencoder import load_autoencoder
from tvmatch.errors import InputError
from tvmatch.interop import import_network, network_from_authors, network_to_authors, read_snapshot
from tvmatch.interop.checkpoints.authors import split_prefix, without_prefix
from tvmatch.models import DiT
from tvmatch.safe_pickle.unpickler import restricted_load
from tvmatch.storage.files import expect_no_lfs_pointer
from tvmatch.training import Trainer

OPTIONS = ["--mean=0", "--std=2", "--autoencoder=none"]
DIT = randomize_(small_dit((4, 4, 4), 3)).requires_grad_(False)
THEIRS = {name.removeprefix("model."): x for name, x in network_to_authors(DIT).items()}
SIT = {name: x.float() for name, x in sit_state().items()}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["import", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tvmatch: error: ")
    assert error.count("\n") == 1
    return error


# Prefixes

LEVELS = ["_orig_mod", "module", "ema", "net", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
CHAINS = [
    *product(LEVELS, repeat=2),
    ("_orig_mod", "module", "model", "_orig_mod"),
    ("module", "module", "module"),
    ("ema", "module", "_fsdp_wrapped_module", "net", "model"),
    ("_forward_module", "_orig_mod", "network"),
    ("_fsdp_wrapped_module", "_fpw_module"),
    ("ema_model", "module"),
    ("model", "diffusion_model", "_orig_mod"),
    ("anything", "0"),
]


@pytest.mark.parametrize("chain", CHAINS, ids=".".join)
def test_any_levels_in_front(chain: tuple[str, ...]) -> None:
    """In any order and number, for the authors' layout and for SiT's."""
    prefixed = {".".join((*chain, name)): x for name, x in THEIRS.items()}
    network = network_from_authors(prefixed, heads=2)
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in DIT.state_dict().items())
    sit = import_network({".".join((*chain, name)): x for name, x in SIT.items()}, heads=2)
    assert sit.is_flow
    expected = import_network(SIT, heads=2).network.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in sit.network.state_dict().items())


@pytest.mark.parametrize("level", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_wrapped_parts(level: str, place: int) -> None:
    """FSDP, recomputation and compilation wrap blocks or their parts: the level stands within the name."""
    names = {}
    for name in THEIRS:
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(place, level)
        names[name] = ".".join(["module", *parts])
    save_file({names[name]: x.contiguous() for name, x in THEIRS.items()}, "weights.safetensors")
    assert (
        main(["import", "weights.safetensors", "--out=out", *OPTIONS, "--guidance=2", "--scaled=true"]) == 0
    )
    assert torch.equal(tvmatch.load("out").network.state_dict()["head.weight"], DIT.head.weight)


def test_levels_that_nobody_listed_stand_before_all_names_or_before_none() -> None:
    mixed = {f"dit.{name}" if "blocks" in name else name: x for name, x in THEIRS.items()}
    assert without_prefix(mixed).keys() == mixed.keys()
    mixed = {f"dit.{name}" if "proj" in name else name: x for name, x in THEIRS.items()}
    assert without_prefix(mixed).keys() == mixed.keys()


def test_only_levels_in_front_are_left_out() -> None:
    assert split_prefix("module.model.blocks.0.net.ema") == (("module", "model"), "blocks.0.net.ema")
    assert split_prefix("model") == ((), "model")
    assert split_prefix("ema.model") == (("ema",), "model")
    assert split_prefix("models.0.weight") == ((), "models.0.weight")


def test_pytorch_s_averaged_model() -> None:
    """It counts its updates beside the weights."""
    inner = nn.Module()
    for name, tensor in THEIRS.items():
        module = inner
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    average = AveragedModel(inner)
    assert "n_averaged" in average.state_dict()
    torch.save(average.state_dict(), "weights.pt")
    torch.save({"ema": average}, "whole.pt")
    for name in ("weights.pt", "whole.pt"):
        tensors = read_snapshot(Path(name)).tensors
        assert tensors.keys() == THEIRS.keys()
    save_file(average.state_dict(), "weights.safetensors")
    assert read_snapshot(Path("weights.safetensors")).tensors.keys() == THEIRS.keys()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_two_networks_in_one_state_dict(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The average is preferred, as among the entries of a snapshot; `--network` chooses."""
    latest = {f"net.model.{name}": x + 1 if x.ndim == 1 else x.clone() for name, x in THEIRS.items()}
    both = {f"module.ema.{name}": x.contiguous() for name, x in THEIRS.items()} | latest
    save_file(both, "both.safetensors") if kind == "safetensors" else torch.save(both, "both.pt")
    options = [f"both.{kind}", *OPTIONS, "--guidance=2", "--scaled=true"]
    assert main(["import", *options, "--out=out"]) == 0
    assert "left out     net\n" in capsys.readouterr().out
    assert torch.equal(tvmatch.load("out").network.state_dict()["head.bias"], DIT.head.bias)
    assert main(["import", *options, "--out=2", "--network=net"]) == 0
    assert torch.equal(tvmatch.load("2").network.state_dict()["head.bias"], DIT.head.bias + 1)
    assert "there is no model to choose" in refused(*options, "--out=3", "--network=model", capsys=capsys)


@pytest.mark.parametrize("first", ["", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("second", ["network.", "module.module."])
def test_one_name_twice(first: str, second: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "final_layer.linear.bias"
    tensors = {f"{first}{name}": x for name, x in THEIRS.items()} | {f"{second}{name}": THEIRS[name].clone()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, "weights.safetensors")
    error = refused("weights.safetensors", "--out=out", *OPTIONS, capsys=capsys)
    assert f"it has {name} twice, " in error
    assert second in error


@pytest.mark.parametrize("missing", ["x_embedder.proj.weight", "blocks.1.attn.qkv.bias", "pos_embed"])
def test_a_missing_tensor_s_message_shows_some_that_are_there(
    missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for tensors in (THEIRS, SIT):
        rest = {f"module.{name}": x.contiguous() for name, x in tensors.items() if name != missing}
        save_file(rest, "weights.safetensors")
        error = refused("weights.safetensors", "--out=out", *OPTIONS, capsys=capsys)
        assert missing in error
        assert "it has blocks.0.adaLN_modulation.1.bias, " in error
    other = {"encoder.layer.0.weight": torch.ones(2), "decoder.weight": torch.ones(2)}
    save_file(other, "other.safetensors")
    error = refused("other.safetensors", "--out=out", *OPTIONS, capsys=capsys)
    assert "missing tensor x_embedder.proj.weight; it has decoder.weight, encoder.layer.0.weight" in error


# Label tables without a row for the dropped label


def without_dropped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    table = "y_embedder.embedding_table.weight"
    return state | {table: state[table][:-1].clone()}


@pytest.mark.parametrize("layout", ["sit", "authors"])
def test_a_row_a_class(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    state, count = (SIT, 5) if layout == "sit" else (THEIRS, 3)
    options = OPTIONS if layout == "sit" else [*OPTIONS, "--guidance=1", "--scaled=false"]
    rows = without_dropped(state)
    save_file({name: x.contiguous() for name, x in rows.items()}, "rows.safetensors")
    save_file({name: x.contiguous() for name, x in state.items()}, "whole.safetensors")
    heads = "--heads=2"
    arguments = ["import", "rows.safetensors", "--out=out", *options, heads, "--label_dropout=0"]
    assert main(arguments) == 0
    assert "required for each sample" in capsys.readouterr().out
    assert main(["import", "whole.safetensors", "--out=whole", *options, heads]) == 0
    assert "required for each sample" not in capsys.readouterr().out
    model, whole = tvmatch.load("out"), tvmatch.load("whole")
    assert (model.spec.class_count, whole.spec.class_count) == (count, count)
    assert (model.knows_dropped_labels, whole.knows_dropped_labels) == (False, True)
    assert torch.equal(model.sample(steps=2, count=7), whole.sample(steps=2, count=7))
    x, t, s, _, _ = random_inputs(model.spec.shape, count, dtype=torch.float32)
    whole.network(x, t, s)
    with pytest.raises(ValueError, match="labels: trained without dropped labels"):
        model.network(x, t, s)
    if layout == "authors":  # and back again
        assert main(["export", "out", "--layout=authors", "--out=back.safetensors"]) == 0
        assert read_snapshot(Path("back.safetensors")).tensors.keys() == rows.keys()
        assert network_to_authors(model.network)["model.y_embedder.embedding_table.weight"].shape[0] == count  # type: ignore[arg-type]
        assert main(["import", "back.safetensors", "--out=again", *arguments[3:]]) == 0
        assert not tvmatch.load("again").knows_dropped_labels


def test_a_file_says_that_no_label_was_dropped() -> None:
    """A table of `label_dim` rows has none for it; one of a row more may have it, untrained."""
    rows = authors_network(without_dropped(THEIRS))
    vars(rows).update(label_dim=3, do_scale_param=True)
    Path("rows.pkl").write_bytes(authors_bytes({"net": rows}))
    assert main(["import", "rows.pkl", "--out=out", *OPTIONS, "--guidance=2"]) == 0
    model = tvmatch.load("out")
    assert (model.spec.class_count, model.knows_dropped_labels) == (3, False)
    whole = authors_network(THEIRS)
    vars(whole).update(label_dim=3, do_scale_param=True)
    Path("whole.pkl").write_bytes(authors_bytes({"net": whole}))
    for dropout, knows in (("0", False), ("0.1", True)):
        options = ["--guidance=2", f"--label_dropout={dropout}", f"--out={dropout}"]
        assert main(["import", "whole.pkl", *OPTIONS, *options]) == 0
        model = tvmatch.load(dropout)
        assert (model.spec.class_count, model.knows_dropped_labels) == (3, knows)


def test_a_name_more_than_classes_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: x.contiguous() for name, x in without_dropped(SIT).items()}, "rows.safetensors")
    Path("names.txt").write_text("a\nb\nc\nd\ne\n")
    arguments = ["rows.safetensors", "--out=out", *OPTIONS, "--heads=2", "--class_names=names.txt"]
    assert refused(*arguments, capsys=capsys).endswith(
        "5 names for a network of 4 classes; --label_dropout=0 if no label was ever dropped\n"
    )
    assert main(["import", *arguments, "--label_dropout=0"]) == 0
    assert tvmatch.load("out").spec.class_names == ("a", "b", "c", "d", "e")
    Path("names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    again = ["rows.safetensors", "--out=again", *arguments[2:]]
    for more in ([], ["--label_dropout=0"]):
        assert refused(*again, *more, capsys=capsys).endswith(" classes\n")


@pytest.mark.parametrize(("said", "dropout"), [(2, None), (7, None), (4, "0.1"), (0, None)])
def test_a_file_of_other_classes_than_it_says(
    said: int, dropout: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table has four rows: three classes and the dropped label, or four."""
    network = authors_network(THEIRS)
    vars(network).update(label_dim=said, do_scale_param=True)
    Path("s.pkl").write_bytes(authors_bytes({"net": network}))
    options = [*OPTIONS, "--guidance=2", *([] if dropout is None else [f"--label_dropout={dropout}"])]
    assert refused("s.pkl", "--out=out", *options, capsys=capsys) == (
        f"tvmatch: error: s.pkl: it says that its network has {said} classes, but its label table has 3\n"
    )


def test_a_network_without_classes_drops_none(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = network_to_authors(randomize_(small_dit((4, 4, 4), 0)))
    save_file(tensors, "weights.safetensors")
    options = [*OPTIONS, "--guidance=1", "--scaled=true", "--label_dropout=0"]
    assert "label_dropout" in refused("weights.safetensors", "--out=out", *options, capsys=capsys)


def without_dropout(folder: Path) -> Path:
    """A checkpoint for `images()` that was trained without dropped labels."""
    dataset = images()
    trainer = Trainer(tiny_config(1), dataset, folder / "run")
    network = randomize_(trainer.state.evaluation.network)
    assert isinstance(network, DiT)
    network.conditioning.without_label_dropout()
    (folder / "checkpoint").mkdir()
    model = tvmatch.TrainedModel(network, dataset.spec, scaled=False, guidance=1.0)
    model.save(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("weight", "dropout", "fits"),
    [(1.0, 0.0, True), (2.0, 0.0, False), (1.0, 0.1, False), ((1.0, 2.0), 0.0, False)],
)
def test_as_a_teacher(weight: Any, dropout: float, fits: bool, tmp_path: Path) -> None:
    """Guidance and dropped labels need a velocity without a label, which it does not have."""
    config = tiny_config(1)
    config.objective.teacher = str(without_dropout(tmp_path))
    config.objective.guidance_weight, config.objective.label_dropout = weight, dropout
    if fits:
        Trainer(config, images(), tmp_path / "student").run()
    else:
        with pytest.raises(InputError, match=r"objective\.teacher: .* was trained without dropped labels"):
            Trainer(config, images(), tmp_path / "student")


def test_as_a_start(tmp_path: Path) -> None:
    """The dropped label is new: it starts as the mean of the classes, and is trained."""
    config = tiny_config(1)
    config.initial = str(without_dropout(tmp_path))
    trainer = Trainer(config, images(), tmp_path / "run2")
    assert any("that label starts as the classes' mean" in message for message in trainer.messages)
    table = trainer.state.network.conditioning.label.weight  # type: ignore[union-attr, operator]
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    assert trainer.run().knows_dropped_labels


# Git LFS

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2713059840\n"


@pytest.mark.parametrize("name", ["snapshot.pkl", "weights.pt", "weights.safetensors", "statistics.npz"])
def test_a_pointer_is_called_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(POINTER)
    error = refused(name, "--out=out", *OPTIONS, capsys=capsys)
    assert error == (
        f"tvmatch: error: {name}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was "
        "cloned\n"
    )


def test_pointers_in_other_places(tmp_path: Path) -> None:
    Path("reference.pkl").write_bytes(POINTER.replace(b"git-lfs.github.com", b"hawser.github.com"))
    with pytest.raises(InputError, match=r"reference\.pkl: a Git LFS pointer"):
        restricted_load(Path("reference.pkl"))
    with pytest.raises(InputError, match=r"reference\.pkl: a Git LFS pointer"):
        expect_no_lfs_pointer("reference.pkl")
    for other in (tmp_path, tmp_path / "none"):
        expect_no_lfs_pointer(other)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors: a Git LFS pointer"):
        load_autoencoder(str(tmp_path / "vae"))
    (tmp_path / "a").mkdir()
    checkpoint = without_dropout(tmp_path / "a")
    (checkpoint / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"model\.safetensors: a Git LFS pointer"):
        tvmatch.load(checkpoint)
    shutil.rmtree(checkpoint)
