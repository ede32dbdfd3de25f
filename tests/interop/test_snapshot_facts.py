"""The authors' snapshots with their run's configuration: inert, believed where it is whole, and compared."""

import io
import json
import pickletools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_files import (
    CONFIGURATION,
    Persistent,
    authors_bytes,
    authors_network,
    authors_torch_bytes,
    changed,
    training_state,
    wrapper,
)
from helpers import randomize_, small_dit
from omegaconf import OmegaConf
from torch import nn

import tvmatch
from tvmatch.cli import main
from tvmatch.errors import InputError
from tvmatch.interop import network_to_authors, read_snapshot
from tvmatch.interop.checkpoints.training_facts import TrainingFacts
from tvmatch.models import DiT

DIT = randomize_(small_dit((4, 4, 4), 3)).requires_grad_(False)
AUTOENCODER = "--autoencoder=no/such/autoencoder"  # its place; not even a name on the Hub
FACTS = TrainingFacts(
    scaled=True,
    guidance=2.0,
    mean=(0.86488, -0.27787343, 0.21616915, 0.3738409),
    std=(4.85503674, 5.31922414, 3.93725398, 3.9870003),
    autoencoder="stabilityai/sd-vae-ft-ema",
    class_count=3,
    label_dropout=0.1,
    s=(-0.4, 1.0),
    gap=(-0.8, 1.0),
    detach_jvp=False,
    evaluation_ema=0.9999,
    target_ema=0.99,
)


@pytest.fixture(autouse=True)
def _no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Persistent, "marker", tmp_path / "marker")
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "marker").exists()
    assert not {"torch_utils", "dnnlib", "timm"} & sys.modules.keys()


def content(configuration: Any = None, network: nn.Module | None = None, **state: Any) -> dict[str, Any]:
    tensors = network_to_authors(DIT if network is None else network)  # type: ignore[arg-type]
    return {"net": wrapper(tensors, configuration, **state), "dataset_kwargs": {"path": "imagenet.zip"}}


def facts_of(data: bytes) -> TrainingFacts:
    Path("snapshot.pkl").write_bytes(data)
    return read_snapshot(Path("snapshot.pkl")).facts


def names_in(data: bytes) -> set[str]:
    """The globals that a pickle of protocol 2 or 3 names."""
    return {argument for code, argument, _ in pickletools.genops(data) if code.name == "GLOBAL"}


# What the file says


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_snapshot_of_theirs_suffices(protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = authors_bytes(content(), protocol)
    Path("snapshot.pkl").write_bytes(data)
    if protocol == 2:
        assert {
            "omegaconf.dictconfig DictConfig",
            "omegaconf.listconfig ListConfig",
            "omegaconf.base ContainerMetadata",
            "omegaconf.base Metadata",
            "omegaconf.nodes AnyNode",
            "typing Any",
        } <= names_in(data)
    loaded = set(sys.modules)
    assert read_snapshot(Path("snapshot.pkl")).facts == FACTS
    assert not [name for name in set(sys.modules) - loaded if not name.startswith("tvmatch")]
    assert main(["import", "snapshot.pkl", "--out=out", AUTOENCODER]) == 0
    model = tvmatch.load("out")
    assert (model.spec.mean, model.spec.std, model.guidance, model.scaled) == (
        FACTS.mean,
        FACTS.std,
        2.0,
        True,
    )
    assert isinstance(model.network, DiT)
    for name, tensor in DIT.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    assert model.provenance["file_says"] == json.loads(json.dumps(FACTS.known()))
    assert "file says    scaled=True, guidance=2.0, " in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [False, True])
def test_training_states(compiled: bool) -> None:
    network: Any = content()["net"]
    state = training_state(torch.compile(network) if compiled else network)  # type: ignore[arg-type]
    data = authors_torch_bytes(state)
    pickled = data[data.index(b"\x80\x02") :]
    for name in ("__builtin__\nlong", "__builtin__\nunicode", "__builtin__\nset", "__builtin__\ngetattr"):
        assert name.encode() in pickled
    assert b"_rebuild_parameter_with_state" in pickled
    assert b"contextlib\nnullcontext" in pickled
    assert (b"torch._dynamo" in pickled) is compiled
    Path("training-state-1.pt").write_bytes(data)
    snapshot = read_snapshot(Path("training-state-1.pt"))
    assert snapshot.facts == FACTS
    assert snapshot.entry == "net"
    for name, tensor in network_to_authors(DIT).items():
        assert torch.equal(snapshot.tensors[name.removeprefix("model.")], tensor)


@dataclass
class _Settings:
    """A typed configuration."""

    depth: int = 28
    names: list[str] = field(default_factory=lambda: ["a"])
    widths: dict[str, list[int]] = field(default_factory=dict)
    path: Path = Path("there")
    maybe: float | None = None
    on: bool = True


@pytest.mark.parametrize("protocol", [2, 5])
def test_typed_configurations(protocol: int) -> None:
    """Their metadata name types, the user's own classes among them: all are inert."""
    configuration = OmegaConf.create(changed())
    configuration.typed = OmegaConf.structured(_Settings)
    data = authors_bytes(content(configuration), protocol)
    assert facts_of(data) == FACTS


def _storage_on(device: str, storage: Any) -> tuple[Any, tuple[bytes]]:
    """As a storage on a device is pickled: the device is a word."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    word = b"X" + len(device).to_bytes(4, "little") + device.encode()
    data = file.getvalue()
    assert b"X\x03\x00\x00\x00cpu" in data
    return torch.storage._load_from_bytes, (data.replace(b"X\x03\x00\x00\x00cpu", word),)


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_snapshots_of_other_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.storage.TypedStorage, "__reduce__", lambda storage: _storage_on(device, storage)
    )
    data = authors_bytes(content())
    assert device.encode() in data
    assert facts_of(data) == FACTS
    tensors = read_snapshot(Path("snapshot.pkl")).tensors
    assert torch.equal(tensors["pos_embed"], network_to_authors(DIT)["model.pos_embed"])


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_training_states_of_other_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    Path("training-state-1.pt").write_bytes(authors_torch_bytes(content()))
    assert device.encode() in Path("training-state-1.pt").read_bytes()
    tensors = read_snapshot(Path("training-state-1.pt")).tensors
    assert torch.equal(tensors["pos_embed"], network_to_authors(DIT)["model.pos_embed"])


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_part_of_a_configuration_that_lost_the_whole(protocol: int) -> None:
    """What the network itself remembers is still said."""
    facts = facts_of(authors_bytes(content({"depth": 28, "norms": ["rms"]}), protocol))
    assert facts == TrainingFacts(scaled=True, class_count=3, detach_jvp=False)


def test_a_configuration_in_other_places() -> None:
    """Among the positional arguments, as an attribute, and beside a plain state dict."""
    whole = OmegaConf.create(changed())
    tensors = network_to_authors(DIT)
    expected = replace(FACTS, class_count=None, detach_jvp=None)
    for name, value in (("_init_args", (1, whole.encoder.raw_mean)), ("options", whole.loss)):
        network = authors_network(tensors)
        vars(network)[name] = value
        assert facts_of(authors_bytes({"net": network})) == expected
    assert facts_of(authors_torch_bytes({"ema": tensors, "cfg": whole, "step": 3})) == expected


def test_tensors_that_carry_attributes() -> None:
    tensors = network_to_authors(DIT)
    root = wrapper(tensors)
    extra = torch.ones(2)
    extra.note = "said of it"  # type: ignore[attr-defined]
    root.model.register_buffer("extra", extra)
    data = authors_bytes({"net": root})
    assert b"_rebuild_from_type_v2" in data
    Path("snapshot.pkl").write_bytes(data)
    assert torch.equal(read_snapshot(Path("snapshot.pkl")).tensors["extra"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_configuration(dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in network_to_authors(DIT).items()}
    data = authors_bytes({"net": wrapper(tensors, dtype=dtype), "dataset_kwargs": {}})
    assert facts_of(data) == FACTS
    assert main(["import", "snapshot.pkl", "--out=out", AUTOENCODER]) == 0
    network = tvmatch.load("out").network
    assert torch.equal(network.state_dict()["head.weight"], DIT.head.weight.to(dtype).float())


def test_networks_of_several_averages() -> None:
    """Each has its own weights; all say the same of the run."""
    content_ = {
        f"ema_{i}": wrapper(network_to_authors(randomize_(small_dit((4, 4, 4), 3), i))) for i in range(2)
    }
    Path("snapshot.pkl").write_bytes(authors_bytes(content_))
    with pytest.raises(InputError, match="no network under ema or net; the file holds ema_0, ema_1"):
        read_snapshot(Path("snapshot.pkl"))
    for i in range(2):
        assert main(["import", "snapshot.pkl", f"--out={i}", AUTOENCODER, f"--network=ema_{i}"]) == 0
        weight = tvmatch.load(str(i)).network.state_dict()["head.weight"]
        assert torch.equal(weight, randomize_(small_dit((4, 4, 4), 3), i).head.weight)


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scale after normalisation": (
        {"encoder__final_std": 0.5},
        {"std": tuple(2 * x for x in CONFIGURATION["encoder"]["raw_std"])},
    ),
    "a scale a channel": (
        {"encoder__final_std": [1, 2, 4, 0.5], "encoder__raw_std": [1, 2, 4, 0.5]},
        {"std": (1.0, 1.0, 1.0, 1.0)},
    ),
    "interpolated weight": ({"loss__cfg": "${training.w}", "training__w": 1.75}, {"guidance": None}),
    "interpolated section": (
        {"training__other": {"m": [1.0, 2, 3, 4]}, "encoder__raw_mean": "${training.other.m}"},
        {"mean": None, "std": None},
    ),
    "interpolated element": ({"encoder__raw_std": [1, 1, 1, "${loss.cfg}"]}, {"mean": None, "std": None}),
    "missing value": ({"loss__cfg": "???"}, {"guidance": None}),
    "no value": ({"loss__cfg": None}, {"guidance": None}),
    "no entry": ({"loss__cfg": ...}, {"guidance": None}),
    "a range": ({"loss__cfg": [1, 4]}, {"guidance": None}),
    "text": ({"loss__cfg": "two"}, {"guidance": None}),
    "a switch": ({"loss__cfg": True}, {"guidance": None}),
    "not a number": ({"loss__cfg": float("nan")}, {"guidance": None}),
    "without end": ({"loss__cfg": 10**400}, {"guidance": None}),
    "below one": ({"loss__cfg": 0.5}, {"guidance": None}),
    "no scale": ({"encoder__final_std": ...}, {"mean": None, "std": None}),
    "scale of nothing": ({"encoder__final_std": 0}, {"mean": None, "std": None}),
    "fewer deviations": ({"encoder__raw_std": [1.0]}, {"mean": None, "std": None}),
    "a negative one": ({"encoder__raw_std": [1.0, 1.0, 1.0, -1.0]}, {"mean": None, "std": None}),
    "text among them": ({"encoder__raw_mean": [1.0, 1.0, "a", 1.0]}, {"mean": None, "std": None}),
    "a folder of their machine": ({"encoder__vae_name": "/data/vae"}, {"autoencoder": None}),
    "a name that is none": ({"encoder__vae_name": "a/b\n\x1b[2J"}, {"autoencoder": None}),
    "one rate": ({"training__ema_target_beta": ...}, {"target_ema": None}),
    "rates of several averages": ({"training__ema_beta": [0.99, 0.999]}, {"evaluation_ema": None}),
    "no gap": ({"loss__gap_P_std": ...}, {"gap": None}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_values(name: str) -> None:
    """A number that is there is taken; anything else is as if it were not said."""
    values, expected = FORMS[name]
    assert facts_of(authors_bytes(content(changed(**values)))) == TrainingFacts(
        **{**{name: getattr(FACTS, name) for name in FACTS.known()}, **expected}
    )


@pytest.mark.parametrize("raw_std", [0.1, 5.0])
@pytest.mark.parametrize("final_std", [0.5, 1.0, 2.0])
def test_the_normalisation_is_theirs(raw_std: float, final_std: float) -> None:
    """(x − mean) / std with what is read equals their (x − raw_mean) · final_std / raw_std."""
    encoder = {
        "encoder__raw_mean": [0.3] * 4,
        "encoder__raw_std": [raw_std] * 4,
        "encoder__final_std": final_std,
    }
    facts = facts_of(authors_bytes(content(changed(**encoder))))
    assert facts.mean is not None
    assert facts.std is not None
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close((x - facts.mean[0]) / facts.std[0], (x - 0.3) * final_std / raw_std)


# Where it contradicts


def test_a_recipe_that_contradicts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The issue's example: an unscaled file of w = 2.5 under the recipe of a scaled one of 2.25."""
    large = {"raw_mean": [1.56, -0.695, 0.483, 0.729], "raw_std": [5.27, 5.91, 4.21, 4.31]}
    values = {f"encoder__{name}": x for name, x in large.items()}
    configuration = changed(**values, loss__cfg=2.5, network__do_scale_param=False)
    network = randomize_(small_dit((4, 64, 64), 1000, depth=1))
    Path("s.pkl").write_bytes(
        authors_bytes(content(configuration, network, do_scale_param=False, label_dim=1000))
    )
    assert main(["import", "s.pkl", "--out=out", "--recipe=imagenet512_w2.25", AUTOENCODER]) == 2
    message = capsys.readouterr().err
    assert message == (
        "tvmatch: error: recipe: imagenet512_w2.25 has scaled true, guidance 2.25, "
        "but s.pkl was trained with scaled false, guidance 2.5\n"
    )
    assert not Path("out").exists()
    assert main(["import", "s.pkl", "--out=out", "--recipe=imagenet512_w2.5", AUTOENCODER]) == 0
    model = tvmatch.load("out")
    assert (model.guidance, model.scaled, model.spec.std) == (2.5, False, (5.27, 5.91, 4.21, 4.31))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "weight": ({"loss__cfg": 1.75}, "guidance 2, but s.pkl was trained with guidance 1.75"),
    "parameterisation": (
        {"network__do_scale_param": ...},
        "scaled true, but s.pkl was trained with scaled f",
    ),
    "mean": ({"encoder__raw_mean": [0.9, -0.27787, 0.21617, 0.37384]}, "mean [0.86488, -0.27787343, "),
    "deviation": ({"encoder__final_std": 0.5}, "std [4.85503674, "),
    "label dropout": ({"loss__label_dropout": 0.2}, "label_dropout 0.1, but s.pkl was trained with"),
    "times": ({"loss__gap_P_mean": -0.4}, "gap [-0.8, 1], but s.pkl was trained with gap [-0.4, 1]"),
    "autoencoder": (
        {"encoder__vae_name": "stabilityai/sd-vae-ft-mse"},
        "with autoencoder stabilityai/sd-vae-ft-mse",
    ),
    "average": ({"training__ema_beta": 0.999}, "evaluation_ema 0.9999, but"),
}
SMALL = randomize_(small_dit((4, 32, 32), 1000, depth=1))


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_every_fact_is_compared_with_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, message = CONTRADICTIONS[name]
    scaled = name != "parameterisation"
    data = content(changed(**values), SMALL, label_dim=1000, do_scale_param=scaled)
    Path("s.pkl").write_bytes(authors_bytes(data))
    assert main(["import", "s.pkl", "--out=out", "--recipe=imagenet256_w2", AUTOENCODER]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tvmatch: error: recipe: imagenet256_w2 has ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_fewer_digits_do_not_contradict() -> None:
    five = {
        "encoder__raw_mean": [0.86488, -0.27787, 0.21617, 0.37384],
        "encoder__raw_std": [4.85504, 5.31922, 3.93725, 3.98700],
    }
    Path("s.pkl").write_bytes(authors_bytes(content(changed(**five), SMALL, label_dim=1000)))
    assert main(["import", "s.pkl", "--out=out", "--recipe=imagenet256_w2", AUTOENCODER]) == 0
    assert tvmatch.load("out").spec.mean == (0.86488, -0.27787, 0.21617, 0.37384)  # the file's
    more = ["--mean=0.86488,-0.27787343,0.21616915,0.3738409", "--guidance=2.0", "--scaled=true"]
    assert main(["import", "s.pkl", "--out=2", AUTOENCODER, *more]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--guidance=3", "guidance: 3 is given, but s.pkl was trained with 2"),
        ("--guidance=1,4", "guidance: [1, 4] is given"),
        ("--scaled=false", "scaled: false is given, but s.pkl was trained with true"),
        ("--mean=0", "mean: [0, 0, 0, 0] is given"),
        ("--std=5.5", "std: [5.5, "),
        ("--mean=0.86488,-0.27787", "mean: "),
        ("--label_dropout=0", "label_dropout: 0 is given, but s.pkl was trained with 0.1"),
        ("--label_dropout=2", "label_dropout: must be in [0, 1]"),
        ("--autoencoder=none", "autoencoder: none is for pixels"),
    ],
)
def test_an_option_that_contradicts_is_refused(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.pkl").write_bytes(authors_bytes(content()))
    assert main(["import", "s.pkl", "--out=out", *([] if "auto" in option else [AUTOENCODER]), option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tvmatch: error: {message}")
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_a_file_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"snapshot\.pkl: it contradicts itself about scaled: False and True"
    ):
        facts_of(authors_bytes(content(do_scale_param=False)))


def test_what_is_not_said_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.pkl").write_bytes(authors_bytes(content(changed(loss__cfg=...))))
    assert main(["import", "s.pkl", "--out=out", AUTOENCODER]) == 2
    assert "guidance: the file does not say it; give --recipe NAME or --guidance" in capsys.readouterr().err
    assert main(["import", "s.pkl", "--out=out", AUTOENCODER, "--guidance=1,3"]) == 0
    assert tvmatch.load("out").guidance == (1.0, 3.0)
