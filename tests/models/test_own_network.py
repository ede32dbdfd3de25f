"""A network registered from outside the package: it trains, resumes, loads, samples, exports."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import central_difference, random_inputs, randomize_
from runs import assert_same_run, environment, images, newest, tiny_config
from small_network import SmallConfig, SmallNetwork
from torch import Tensor, nn

import tvmatch
from tvmatch import Dual, InputError, TrainedModel, load
from tvmatch.acceleration import accelerate
from tvmatch.check import Setting, check_network, own_case
from tvmatch.cli import main
from tvmatch.config import Config
from tvmatch.config.parser import parse_config
from tvmatch.interop import hub
from tvmatch.models import (
    BaseNetwork,
    DiT,
    DiTConfig,
    MLPConfig,
    build_network,
    config_class_of,
    kind_of,
    network_class_of,
    network_kinds,
    register_network,
    registry,
)
from tvmatch.objectives import FlowMatching
from tvmatch.training import Trainer


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


def config(steps: int = 4, **training: Any) -> Config:
    made = tiny_config(steps, **training)
    made.network = SmallConfig()
    return made


def small(class_count: int = 3, seed: int = 0) -> BaseNetwork:
    return build_network(SmallConfig(), (1, 4, 4), class_count, seed)


def trained(folder: Path) -> TrainedModel:
    return tvmatch.train(config(), images(), folder, device="cpu")


def small_model(**changes: Any) -> TrainedModel:
    fields = {"scaled": False, "guidance": 1.0, "provenance": {"recipe": "mine"}} | changes
    return TrainedModel(randomize_(small()), images().spec, **fields)


# The whole way


def test_it_trains_checkpoints_and_resumes(tmp_path: Path) -> None:
    model = trained(tmp_path / "whole")
    assert isinstance(model.network, SmallNetwork)
    assert model.step == 4
    before, after = small(), model.network
    assert not torch.equal(before.state_dict()["embed.weight"], after.state_dict()["embed.weight"])
    Trainer(config(), images(), tmp_path / "parts", device="cpu").run(until=2)
    Trainer(config(), images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    loaded = load(tmp_path / "whole")
    assert loaded.network.config == SmallConfig(scales=[1.0, 2.0])  # type: ignore[arg-type] # JSON's tuple
    assert torch.equal(loaded.sample(count=5, steps=2), model.sample(count=5, steps=2))
    description = json.loads((newest(tmp_path / "whole") / "model.json").read_text())
    assert description["network"] == {"kind": "small", "width": 16, "depth": 2, "scales": [1.0, 2.0]}


PROGRAM = """
import sys, torch, tvmatch
if sys.argv[2] == "import":
    import small_network
try:
    print(tvmatch.load(sys.argv[1]).sample(count=3, seed=1).double().sum().item())
except tvmatch.InputError as error:
    print(error)
"""


def test_a_fresh_process_imports_what_registers_it(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    folder = tmp_path / "hub"
    hub.save_pretrained(model, folder)
    said = {}
    for what in ("import", "nothing"):
        arguments = [sys.executable, "-c", PROGRAM, str(folder), what]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
        said[what] = done.stdout.strip()
        assert done.returncode == 0, done.stderr
    assert float(said["import"]) == pytest.approx(
        model.sample(count=3, seed=1).double().sum().item(), rel=1e-9
    )
    assert said["nothing"] == (
        f"{folder / 'model.json'}: network.kind: no network is registered as 'small', only dit, mlp; "
        "import the module that registers it first"
    )


def test_the_hub_layout(tmp_path: Path) -> None:
    model = small_model()
    hub.save_pretrained(model, tmp_path / "hub")
    assert torch.equal(hub.from_pretrained(tmp_path / "hub").sample(), model.sample())
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "import small_network  # registers the network small" in card
    for layout in ("authors", "diffusers"):
        command = [
            "export",
            str(tmp_path / "hub"),
            f"--layout={layout}",
            f"--out={tmp_path / 'out.safetensors'}",
        ]
        assert main(command) == 2
    assert not (tmp_path / "out.safetensors").exists()


# The command line

OWN_MODULE = """
from dataclasses import dataclass
from torch import nn
from tvmatch.models import register_network

@dataclass
class Config:
    factor: float = 1.0

class Network(nn.Module):
    def __init__(self, config, shape, class_count, *, seed=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, t, s, labels=None, guidance_weight=None):
        return self.layer(x.unsqueeze(-1)).squeeze(-1)

register_network("on_the_command_line", Config, Network)
"""


def test_the_command_line_imports_a_module_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_module_of_a_test.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = tvmatch.user_modules.import_module("own_module_of_a_test")
    network = build_network(own.Config(), (1, 4, 4), 3, seed=0)
    Path("checkpoint").mkdir()
    TrainedModel(network, images().spec, scaled=False, guidance=1.0).save(Path("checkpoint"))
    del sys.modules["own_module_of_a_test"], registry._KINDS["on_the_command_line"]

    assert main(["info", "checkpoint"]) == 2
    said = capsys.readouterr().err
    assert "'on_the_command_line'" in said
    assert said.count("\n") == 1
    assert "--import MODULE" in said
    assert main(["info", "checkpoint", "--import", "own_module_of_a_test"]) == 0
    assert "Network" in capsys.readouterr().out
    assert main(["sample", "--import=own_module_of_a_test", "checkpoint", "--out=samples.npz"]) == 0
    assert Path("samples.npz").exists()
    for wrong, words in (
        (["--import", "no_module_of_this_name"], "import: no_module_of_this_name cannot be imported"),
        (["--import"], "import: name a module"),
        (["--import="], "import: name a module"),
        (["--import", "--device=cpu"], "import: name a module"),
    ):
        assert main(["info", "checkpoint", *wrong]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert main(["recipes", "--import=own_module_of_a_test"]) == 2  # which needs no network


@pytest.mark.parametrize("command", ["train digits", "sample", "evaluate", "demo", "export", "info", "check"])
def test_the_help_names_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "--import MODULE" in capsys.readouterr().out


# What it is asked


def test_the_tangent_is_that_of_finite_differences() -> None:
    network = randomize_(small()).double()
    x, t, s, labels, _ = random_inputs((1, 4, 4), 3)
    output = network(x, t, Dual(s, torch.ones_like(s)), labels, torch.ones_like(t))
    slope = central_difference(lambda step: network(x, t, s + step, labels))
    torch.testing.assert_close(output.value, network(x, t, s, labels), rtol=1e-12, atol=1e-12)
    # Fourth-order differences in float64 of a function with frequencies of 2 at most.
    torch.testing.assert_close(output.tangent, slope, rtol=1e-8, atol=1e-10)
    assert output.tangent.any()


def test_check_compares_it() -> None:
    model = small_model()
    assert own_case(model.network) is None
    comparisons = check_network(model, Setting(torch.device("cpu"), torch.float32))
    assert len(comparisons) == 4
    assert all(comparison.passed for comparison in comparisons), comparisons


def test_initial_values_belong_to_the_seed() -> None:
    """Though PyTorch's layers draw from the global generator, which is left as it was."""
    state = torch.get_rng_state()
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert not torch.equal(other.state_dict()["head.weight"], first.state_dict()["head.weight"])


def test_names_in_the_state_dict_are_the_networks_own() -> None:
    own = SmallNetwork(SmallConfig(), (1, 4, 4), 3)
    assert small().state_dict().keys() == own.state_dict().keys()
    assert isinstance(small(), SmallNetwork)
    assert type(small()).__name__ == "SmallNetwork"


@pytest.mark.parametrize("where", ["meta device", "default precision"])
def test_what_is_not_in_the_file_is_built_again(where: str, tmp_path: Path) -> None:
    """Non-persistent buffers, which memory alone does not restore; weights are read as they were saved."""
    small_model().save(tmp_path)
    if where == "default precision":
        torch.set_default_dtype(torch.float64)
    try:
        loaded = load(tmp_path).network
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded.frequencies.float(), torch.tensor([1.0, 2.0]))
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}


@dataclass
class PlainConfig:
    width: int = 4
    names: list[str] = field(default_factory=lambda: ["a"])


class Plain(nn.Module):
    """Reads the values of a tensor in its constructor, and knows no labels."""

    def __init__(
        self, config: PlainConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        self.factors = torch.linspace(0, 1, config.width).tolist()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(config.width))

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return sum(
            factor * layer(x[..., None])[..., 0]
            for factor, layer in zip(self.factors, self.layers, strict=True)
        )


def test_a_constructor_that_reads_values(tmp_path: Path) -> None:
    register_network("plain", PlainConfig, Plain)
    spec = tvmatch.data.DataSpec("points", (2,), None, (0.0,) * 2, (1.0,) * 2)
    model = TrainedModel(build_network(PlainConfig(), (2,)), spec, scaled=False, guidance=1.0)
    model.save(tmp_path)
    assert torch.equal(load(tmp_path).sample(), model.sample())


class Tied(nn.Module):
    """Two names for one tensor, tensors that are not contiguous, and a buffer that is a part of another."""

    def __init__(
        self, config: PlainConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.first.weight.data = self.first.weight.data.t()
        self.last.weight = self.first.weight
        factors = torch.linspace(0, 1, 8)
        self.register_buffer("factors", factors)
        self.register_buffer("evens", factors[::2])

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.first(x.flatten(1)) + (self.factors.sum() - self.evens.sum()) * s[:, None]
        return self.last(torch.tanh(hidden)).view_as(x)


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    """Which safetensors refuses to write, after all of the training."""
    register_network("tied", PlainConfig, Tied)
    made = config()
    made.network = PlainConfig()
    whole = Trainer(made, images(), tmp_path / "whole", device="cpu").run()
    Trainer(made, images(), tmp_path / "parts", device="cpu").run(until=2)
    resumed = Trainer(made, images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts")
    assert resumed.state.network.first.weight is resumed.state.network.last.weight
    resumed.run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    loaded = load(tmp_path / "whole")
    assert loaded.network.first.weight is loaded.network.last.weight
    assert torch.equal(loaded.sample(count=3), whole.sample(count=3))


@pytest.mark.parametrize("width", [10**9, 2**70])
def test_a_description_of_any_depth(width: int, tmp_path: Path) -> None:
    """It is refused before hours are spent on building what it asks for."""
    small_model().save(tmp_path)
    file = tmp_path / "model.json"
    description = json.loads(file.read_text())
    description["network"]["depth"] = width
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"model\.json: not a model description"):
        load(tmp_path)


def test_a_network_without_labels_is_for_data_without_classes() -> None:
    register_network("plain", PlainConfig, Plain)
    assert build_network(PlainConfig(), (2,))(torch.ones(3, 2), torch.ones(3), torch.zeros(3)).shape == (3, 2)
    with pytest.raises(InputError, match=r"network: Plain\.forward has no argument labels, .* 10 classes"):
        build_network(PlainConfig(), (2,), 10)


def test_guidance_weights_that_it_cannot_tell_apart() -> None:
    assert not network_class_of(SmallConfig()).takes_guidance_weight(SmallConfig())
    assert network_class_of(MLPConfig()).takes_guidance_weight(MLPConfig())
    assert not DiT.takes_guidance_weight(DiTConfig(guidance_embedding=False))


def test_nothing_of_it_is_recomputed() -> None:
    """It may have an attribute `blocks`, but they are no maps of Duals."""
    with pytest.raises(InputError, match=r"training\.recompute: blocks needs .*SmallNetwork has none"):
        accelerate(small(), recompute="blocks")


def test_fine_tuning_takes_the_same_network_and_classes(tmp_path: Path) -> None:
    small_model().save(tmp_path)
    made = config()
    made.initial = str(tmp_path)
    run = Trainer(made, images(), tmp_path / "run", device="cpu")
    for name, tensor in load(tmp_path).network.state_dict().items():
        assert torch.equal(run.state.network.state_dict()[name], tensor)
    for name, value in (("depth", 3), ("scales", (1.0, 3.0))):
        changed = config()
        changed.initial = str(tmp_path)
        setattr(changed.network, name, value)
        with pytest.raises(InputError, match=rf"network\.{name}: .* was trained with"):
            Trainer(changed, images(), tmp_path / "other", device="cpu")
    made.network = tiny_config().network
    with pytest.raises(InputError, match=r"initial: .* holds a SmallNetwork"):
        Trainer(made, images(), tmp_path / "other", device="cpu")


class Answering(BaseNetwork):
    """Everything that a network may answer for itself."""

    takes_dual = True
    label_table: ClassVar[str | None] = "label.weight"

    def __init__(
        self, config: PlainConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.label = nn.Embedding(class_count + 1, 1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        last = torch.full(t.shape, self.label.num_embeddings - 1)
        factor = self.label(last if labels is None else labels).view(-1, 1, 1, 1)
        if not isinstance(s, Dual):
            return x * factor * s.view(-1, 1, 1, 1)
        assert s.tangent is not None
        return Dual(x * factor * s.value.view(-1, 1, 1, 1), x * factor * s.tangent.view(-1, 1, 1, 1))

    def modulations(
        self, t: Tensor, s: Tensor, labels: Tensor | None, guidance_weight: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        yield "all", 3 * torch.ones(2, 2)

    def fill_buffers(self) -> bool:
        return True


def test_a_network_with_answers_of_its_own(tmp_path: Path) -> None:
    register_network("answering", PlainConfig, Answering)
    made = config()
    made.network = PlainConfig()
    assert type(build_network(PlainConfig(), (1, 4, 4), 3)) is Answering, "nothing is added to it"
    Trainer(made, images(), tmp_path / "run", device="cpu").run()
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["modulation_norm/all"] == 3
    # Classes that the checkpoint does not know start as its dropped label.
    made.initial = str(tmp_path / "run")
    data = tvmatch.data.TensorDataset(
        torch.rand(4, 1, 4, 4), [0, 1, 2, 3], class_names=["ant", "x", "y", "cow"]
    )
    table = Trainer(made, data, tmp_path / "more", device="cpu").state.network.state_dict()["label.weight"]
    theirs = load(tmp_path / "run").network.state_dict()["label.weight"]
    assert torch.equal(table, theirs[[0, 3, 3, 2, 3]])


# The registry


def test_what_is_registered() -> None:
    assert network_kinds()[:2] == ("dit", "mlp")
    assert "small" in network_kinds()
    assert kind_of(SmallConfig()) == "small"
    assert config_class_of("small") is SmallConfig
    assert network_class_of(DiTConfig()) is DiT
    with pytest.raises(InputError, match=r"network\.kind: .*'unet', only dit, mlp, .*small.*; import"):
        config_class_of("unet")
    for nothing in (None, DiTConfig, "dit", PlainConfig()):
        with pytest.raises(
            InputError, match=r"network: must be .*DiTConfig \(dit\), MLPConfig \(mlp\), .*Sm.*got"
        ):
            kind_of(nothing)


def test_a_name_belongs_to_one_network() -> None:
    for kind, config_class in (("dit", PlainConfig), ("small", PlainConfig), ("other", SmallConfig)):
        with pytest.raises(
            InputError, match=r"kind: cannot register .*Plain as .*registered as '(dit|small)'"
        ):
            register_network(kind, config_class, Plain)
    assert network_class_of(DiTConfig()) is DiT
    register_network("plain", PlainConfig, Plain)
    register_network("plain", PlainConfig, Plain)  # a module that is read again
    with pytest.raises(InputError, match="config_class: must be a dataclass"):
        register_network("none", Plain, Plain)

    @dataclass
    class Kind:
        kind: str = "x"

    with pytest.raises(InputError, match="config_class: Kind has a field kind"):
        register_network("none", Kind, Plain)


def test_options_without_a_default_are_named() -> None:
    """A parser needs a default of each option; from Python the configuration is made by the user."""

    @dataclass
    class Wide:
        width: int
        depth: int = 1

    class WideNetwork(Plain):
        pass

    register_network("wide", Wide, WideNetwork)
    with pytest.raises(InputError, match=r"network\.kind: Wide has no default for width"):
        parse_config({"data": {"kind": "digits"}, "network": {"kind": "wide", "width": 3}}, "mine.yaml")
    assert kind_of(Wide(3)) == "wide"


@dataclass
class NormedConfig:
    width: int = 8


class Normed(nn.Module):
    """A network with running statistics, a frozen parameter, and one that is never used."""

    def __init__(
        self, config: NormedConfig, shape: tuple[int, ...], class_count: int, *, seed: Any = None
    ) -> None:
        super().__init__()
        size = shape[0] * shape[1] * shape[2]
        self.enter, self.norm = nn.Linear(size + 2, config.width), nn.BatchNorm1d(config.width)
        self.leave = nn.Linear(config.width, size)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        numbers = torch.cat([x.flatten(1), t[:, None], s[:, None]], 1)
        return self.leave(torch.relu(self.norm(self.enter(numbers)))).view_as(x) * self.frozen


def test_statistics_and_parameters_without_a_gradient(tmp_path: Path) -> None:
    """The samples' copy has the trained network's running statistics; the checkpoint resumes bit for bit."""
    register_network("normed", NormedConfig, Normed)
    whole, parts = (tiny_config(4), tiny_config(4))
    for made in (whole, parts):
        made.network, made.objective = NormedConfig(), FlowMatching()
    trainer = Trainer(whole, images(), tmp_path / "whole", device="cpu")
    model = trainer.run()
    trained_norm, saved_norm = trainer.state.network.norm, model.network.norm
    assert not torch.equal(saved_norm.running_mean, torch.zeros(8))
    assert torch.equal(saved_norm.running_mean, trained_norm.running_mean)
    assert torch.equal(saved_norm.num_batches_tracked, trained_norm.num_batches_tracked)
    Trainer(parts, images(), tmp_path / "parts", device="cpu").run(until=2)
    Trainer(parts, images(), tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_dry_run_of_a_network_without_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    register_network("normed", NormedConfig, Normed)
    assert (
        main(["train", "digits", "--network.kind=normed", "--dry_run", "--objective.name=flow_matching"]) == 0
    )


def test_embeddings_need_a_network_that_reads_them() -> None:
    with pytest.raises(InputError, match=r"network: MLP.*no argument embeddings, .*of size 4"):
        build_network(MLPConfig(), (2,), embedding_size=4)
    network = build_network(SmallConfig(), (1, 4, 4), 3)
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    with pytest.raises(TypeError, match=r"embeddings: SmallNetwork\.forward has no argument of this name"):
        network(x, t, t, embeddings=torch.zeros(2, 3, 4))
