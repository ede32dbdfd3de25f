"""Configurations: recipes, YAML files, dotted options, and what each of them refuses."""

import re
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import SHORT_RUN, TINY_NETWORK, newest, saved_tensors, tree

from tvmatch.cli import main, train
from tvmatch.config import Config, recipe, recipe_names
from tvmatch.config.parser import parse_config
from tvmatch.config.recipes import recipe_text
from tvmatch.config.schema import OptimizerConfig, TrainingConfig
from tvmatch.config.yaml_files import read_yaml, to_yaml
from tvmatch.data.config import DensityData, DigitsData, ImagesData
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.models import MLP, DiT, build_network
from tvmatch.objectives import TVM

Requested = list[tuple[Config, Path, str, Path | None]]


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> Requested:
    """What `tvmatch train` would train: configuration, run folder, device, run to resume."""
    calls: Requested = []

    def record(config: Config, out: Path, device: str, resume: Path | None) -> int:
        calls.append((config, out, device, resume))
        return 0

    monkeypatch.setattr(train, "_train", record)
    return calls


def write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def one_line(captured: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    output = captured.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("tvmatch: error: ")
    return line.removeprefix("tvmatch: error: ")


# Recipes


def test_the_recipes() -> None:
    ours = ("checkerboard", "cifar10", "digits", "gaussians", "image_folder", "moons")
    papers = ("imagenet256_w1.75", "imagenet256_w2", "imagenet512_w2.25", "imagenet512_w2.5")
    assert recipe_names() == tuple(sorted(ours + papers))


@pytest.mark.parametrize("name", ["checkerboard", "cifar10", "digits", "gaussians", "image_folder", "moons"])
def test_a_recipe_is_complete(name: str) -> None:
    """It says what it is, parses, builds a network, and states each setting that makes a run."""
    content = yaml.safe_load(recipe_text(name))
    assert recipe_text(name).startswith("# ")
    assert content["recipe"] == name
    config = recipe(name)
    config.check()
    kinds: dict[type, tuple[DataSpec, type]] = {
        DigitsData: (DataSpec("image", (1, 8, 8), tuple("0123456789"), (0.5,), (0.5,)), DiT),
        DensityData: (DataSpec("points", (2,), None, (0.0, 0.0), (1.0, 1.0)), MLP),
        ImagesData: (DataSpec("image", (3, 32, 32), ("a", "b"), (0.5,) * 3, (0.5,) * 3), DiT),
    }
    spec, network = kinds[type(config.data)]
    with torch.device("meta"):
        assert isinstance(build_network(config.network, spec.shape, spec.class_count), network)
    assert config.training.steps == content["training"]["steps"]
    assert config.optimizer.learning_rate == content["optimizer"]["learning_rate"]


def test_unknown_recipe() -> None:
    with pytest.raises(InputError, match="no recipe 'digitz'; there are checkerboard, cifar10, digits"):
        recipe("digitz")


@pytest.mark.parametrize("name", ["checkerboard", "digits", "image_folder"])
def test_yaml_round_trip(name: str) -> None:
    """What a run folder's config.yaml says is what was used, every value of it."""
    config = recipe(name)
    config.objective.times.distribution = "truncated"
    config.objective.times.gap = (0.25, 1.5)
    config.optimizer.gradient_clip = 0.5
    config.optimizer.epsilon = 1e-12
    config.training.keep_checkpoints = None
    config.seed = 12345678901
    if name == "image_folder":
        config.objective.guidance_weight = (1.25, 3.0)
        config.data = ImagesData(path="größer/weiter", resolution=(32, 64), channels=1, label_column=None)
    again = parse_config(yaml.safe_load(to_yaml(config)), "config.yaml")
    assert again == config


# Precedence


def test_recipe_then_file_then_options(tmp_path: Path, requested: Requested) -> None:
    """Options win wherever they stand, later files over earlier ones."""
    first = write(tmp_path / "1.yaml", {"training": {"steps": 11, "batch_size": 12}, "seed": 3})
    second = write(tmp_path / "2.yaml", {"training": {"batch_size": 22}, "optimizer": {"epsilon": "1e-3"}})
    arguments = ["digits", "--training.steps", "33", "--config", first, "--config", second]
    for turned in (arguments, [*arguments[3:], *arguments[:3]]):
        assert main(["train", *turned]) == 0
        config, out, device, resume = requested.pop()
        assert (config.training.steps, config.training.batch_size, config.seed) == (33, 22, 3)
        assert config.optimizer.epsilon == 1e-3
        assert config.optimizer.learning_rate == recipe("digits").optimizer.learning_rate
        assert (out, device, resume) == (Path("runs/digits"), "auto", None)


def test_a_file_may_name_its_recipe(tmp_path: Path, requested: Requested) -> None:
    file = write(tmp_path / "mine.yaml", {"recipe": "moons", "training": {"steps": 5}})
    assert main(["train", "--config", file, "--out", "somewhere"]) == 0
    config, out, *_ = requested.pop()
    assert config.data == DensityData("moons")
    assert config.training.batch_size == recipe("moons").training.batch_size
    assert out == Path("somewhere")


def test_a_file_may_be_a_recipe(tmp_path: Path, requested: Requested) -> None:
    """A whole configuration under a name of its own."""
    config = recipe("digits")
    config.recipe = "mine"
    config.training.steps = 77
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--seed", "4"]) == 0
    read, out, *_ = requested.pop()
    config.seed = 4
    assert read == config
    assert out == Path("runs/mine")


def test_an_empty_section_changes_nothing(tmp_path: Path, requested: Requested) -> None:
    """As when every line of it is commented out."""
    (tmp_path / "mine.yaml").write_text("training:\n  # steps: 3\nseed: 2\n")
    assert main(["train", "digits", "--config", str(tmp_path / "mine.yaml")]) == 0
    assert requested.pop()[0].training == recipe("digits").training


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits", "--seed", "2"],
        ["--seed", "2", "digits"],
        ["--seed=2", "digits"],
        ["--out", "runs/digits", "--seed", "2", "digits"],
    ],
    ids=" ".join,
)
def test_the_recipe_may_stand_anywhere(arguments: list[str], requested: Requested) -> None:
    assert main(["train", *arguments]) == 0
    config, out, *_ = requested.pop()
    assert (config.recipe, config.seed, out) == ("digits", 2, Path("runs/digits"))


def test_the_value_of_an_option_is_no_recipe(tmp_path: Path, requested: Requested) -> None:
    assert main(["train", "checkerboard", "--data.name", "moons"]) == 0
    assert requested.pop()[0].data == DensityData("moons")
    file = write(tmp_path / "mine.yaml", {"recipe": "gaussians"})
    assert main(["train", "--config", file, "--data.name", "moons"]) == 0
    assert requested.pop()[0].recipe == "gaussians"


def test_pairs_and_nothing(requested: Requested) -> None:
    options = [
        "--objective.guidance_weight=[1,2.5]",
        "--times.gap=[-1,0.5]",
        "--training.keep_checkpoints=null",
        "--optimizer.gradient_clip=1",
        "--objective.detach_jvp=true",
        "--optimizer.learning_rate=1e-3",
    ]
    assert main(["train", "digits", *options]) == 0
    config = requested.pop()[0]
    assert config.objective.guidance_weight == (1.0, 2.5)
    assert config.objective.times.gap == (-1.0, 0.5)
    assert config.training.keep_checkpoints is None
    assert config.optimizer.gradient_clip == 1.0
    assert config.objective.detach_jvp is True
    assert config.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("name", ["checkerboard", "digits", "image_folder"])
def test_the_printed_configuration_can_be_read_back(
    name: str, tmp_path: Path, requested: Requested, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--times.s=[0.5,2]", "--training.steps=17", "--out", "there", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(["train", name, *options, "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "printed.yaml")]) == 0
    assert main(["train", name, *options]) == 0
    read, direct = requested
    assert read == direct
    assert read[0].training.steps == 17


def test_a_runs_configuration_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config.yaml` is the whole of it: the same weights, bit for bit."""
    monkeypatch.setattr("tvmatch.cli.results.draw", lambda *_: [])
    monkeypatch.setattr("tvmatch.cli.results.measure", lambda *_, **__: {"nfe": {}})
    options = [*SHORT_RUN, *TINY_NETWORK, "--objective.guidance_weight=[1,3]", "--seed=5"]
    options.append("--objective.label_dropout=0.2")
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "digits", *options, "--out", str(first)]) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    wanted = saved_tensors(newest(first))
    for name, tensor in saved_tensors(newest(second)).items():
        assert torch.equal(tensor, wanted[name])


# Refusals


UNKNOWN = [
    ("training.stepz", "did you mean training.steps?"),
    ("trainin.steps", "did you mean training.steps?"),
    ("training.steps.more", ""),
    ("optimizer.lr", ""),
    ("data.path", ""),
    ("help", ""),
    ("config", ""),
]


@pytest.mark.parametrize(("key", "hint"), UNKNOWN, ids=[key for key, _ in UNKNOWN])
def test_unknown_keys_of_a_file(
    key: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content: Any = 5
    for part in reversed(key.split(".")):
        content = {part: content}
    file = write(tmp_path / "mine.yaml", content)
    assert main(["train", "digits", "--config", file]) == 2
    assert re.match(rf"{file}: {re.escape(key)}: no such option.*{re.escape(hint)}$", one_line(capsys))


@pytest.mark.parametrize(
    "option",
    ["--training.stepz", "--training.step", "--training.st", "--train.steps", "--lr", "--objective.guidance"],
)
def test_unknown_and_abbreviated_options(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([option, "5"], [f"{option}=5"]):
        assert main(["train", "digits", *arguments]) == 2
        assert one_line(capsys).startswith(f"{option}: no such option")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: 5\n", "training: must be a section of options, got 5"),
        ("- 1\n- 2\n", "must hold a mapping of options"),
        ("", "must hold a mapping of options"),
        ("a: [1\n  b: }", "not readable as YAML"),
        ("training:\n  steps: abc\n", "training.steps: must be a whole number, got abc"),
        ("training:\n  steps: 2.5\n", "training.steps: must be a whole number, got 2.5"),
        ("training:\n  steps: true\n", "training.steps: must be a whole number, got True"),
        ("training:\n  ema_warmup: maybe\n", "training.ema_warmup: must be true or false, got maybe"),
        ("optimizer:\n  learning_rate: fast\n", "optimizer.learning_rate: must be a number, got fast"),
        ("times:\n  gap: [1]\n", "objective.times.gap: must be a pair of numbers like [1,2], got [1]"),
        ("resume: runs/digits\n", "resume: give it on the command line, --resume runs/digits"),
        ("seed: 1\ntraining:\n  steps: 1\n  steps: 2\n", "steps: given twice, again in line 4"),
        ("training:\n  steps: 1\ntraining:\n  batch_size: 2\n", "training: given twice, again in line 3"),
        ("data:\n  split: all\n", "data.split: must be one of 'train', 'fit'"),
        (
            "training:\n  keep_checkpoints: few\n",
            "training.keep_checkpoints: must be a whole number or null, got few",
        ),
        (
            "objective:\n  guidance_weight: [1, 2, 3]\n",
            "objective.guidance_weight: must be a number or a pair of numbers like [1,2], got [1, 2, 3]",
        ),
    ],
)
def test_files_that_are_wrong(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the file and the key; the same content as a run's own configuration is refused alike."""
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert main(["train", "digits", "--config", str(file)]) == 2
    assert one_line(capsys).startswith(f"{file}: {message}")


def test_merged_mappings_are_no_duplicates(tmp_path: Path, requested: Requested) -> None:
    """YAML's own way to take a mapping over and to change a key of it."""
    file = tmp_path / "mine.yaml"
    file.write_text("times: &same {t: [0, 1], s: [1, 1]}\nseed: 4\n")
    assert read_yaml(file)["seed"] == 4
    file.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 5}\n")
    assert read_yaml(file)["c"] == {"x": 5, "y": 3}


def test_a_key_twice_beside_merged_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a {x: 1}\nc:\n  x: 5\n  <<: *a\n  x: 6\n")
    with pytest.raises(InputError, match="x: given twice, again in line 5"):
        read_yaml(file)


def test_a_file_for_another_recipe(
    tmp_path: Path, requested: Requested, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a name on the command line nor another file is passed over."""
    moons = write(tmp_path / "moons.yaml", {"recipe": "moons"})
    mine = write(tmp_path / "mine.yaml", {"recipe": "gaussians"})
    for arguments, names in (
        (["digits", "--config", moons], f"recipe: digits, but {moons} is for the recipe moons"),
        (["--config", mine, "--config", moons], f"recipe: gaussians, but {moons} is for the recipe moons"),
    ):
        assert main(["train", *arguments]) == 2
        assert one_line(capsys) == names
    assert main(["train", "moons", "--config", moons]) == 0
    assert requested.pop()[0].recipe == "moons"


def test_a_file_may_say_where_and_on_what(tmp_path: Path, requested: Requested) -> None:
    file = write(tmp_path / "mine.yaml", {"out": "there", "device": "cpu", "resume": None})
    assert main(["train", "moons", "--config", file]) == 0
    _, out, device, resume = requested.pop()
    assert (out, device, resume) == (Path("there"), "cpu", None)


@pytest.mark.parametrize("value", ["1,2", "[1,2,3]", "1;2", "[1,b]"])
def test_what_is_no_pair(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", f"--times.gap={value}"]) == 2
    assert one_line(capsys).startswith("objective.times.gap: must be a pair of numbers like [1,2], got")


def test_infinite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (
        ("objective.guidance_weight", "finite and at least 1 and at most 1,000,000"),
        ("optimizer.learning_rate", "finite and positive"),
    ):
        assert main(["train", "digits", f"--{option}=.inf"]) == 2
        assert one_line(capsys) == f"{option}: must be {expected}, got inf"


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for file, message in (
        (tmp_path / "missing.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.yaml", "not readable as YAML"),
    ):
        for recipe_given in (["digits"], []):
            assert main(["train", *recipe_given, "--config", str(file)]) == 2
            assert one_line(capsys).startswith(f"{file}: {message}")
    assert main(["train", "digits", "--config"]) == 2
    assert "--config: expected one argument" in one_line(capsys)


# Every number of the configuration, with values just outside its range and on the inner edge.
RANGES: dict[str, tuple[list[str], list[str]]] = {
    "seed": (["-1"], ["0"]),
    "network.hidden_size": (["0", "6", "-4"], ["4"]),
    "network.depth": (["0"], ["1"]),
    "network.heads": (["0", "3"], ["1"]),
    "network.patch_size": (["0", "-2"], ["1"]),
    "network.mlp_ratio": (["0", "-1", ".inf", "1e300"], ["0.1"]),
    "network.time_frequencies": (["0"], ["1"]),
    "objective.times.equal_probability": (["-0.1", "1.1", ".nan"], ["0", "1"]),
    "objective.times.gap": (["[0,0]", "[.nan,1]", "[0,.inf]"], ["[0,0.1]"]),
    "objective.times.t": (["[0,-1]"], ["[0,0.1]"]),
    "objective.times.s": (["[.inf,1]"], ["[0,0.1]"]),
    "objective.guidance_weight": (
        ["0.99", "1e39", "[0.5,2]", "[2,2]", "[3,2]", ".inf", "[1,.inf]"],
        ["1", "1e6", "[1,2]"],
    ),
    "objective.label_dropout": (["-0.1", "1.1", ".nan"], ["0", "1"]),
    "objective.target_ema": (["-0.1", "1", ".nan"], ["0", "0.999"]),
    "optimizer.learning_rate": (["0", "-1", ".inf", ".nan"], ["1e-9"]),
    "optimizer.beta1": (["-0.1", "1"], ["0"]),
    "optimizer.beta2": (["-0.1", "1"], ["0"]),
    "optimizer.epsilon": (["0", "-1"], ["1e-12"]),
    "optimizer.weight_decay": (["-1", ".inf"], ["0"]),
    "optimizer.warmup_steps": (["-1"], ["0"]),
    "optimizer.decay_fraction": (["-0.1", "1.1"], ["0", "1"]),
    "optimizer.gradient_clip": (["0", "-1", ".inf"], ["0.1", "null"]),
    "training.steps": (["0", "-1"], ["1"]),
    "training.batch_size": (["0"], ["1"]),
    "training.accumulation": (["0", "3"], ["1", "64"]),
    "training.evaluation_ema": (["-0.1", "1"], ["0"]),
    "training.data_workers": (["-1"], ["0"]),
    "training.log_every": (["0"], ["1"]),
    "training.sample_every": (["-1"], ["0"]),
    "training.checkpoint_every": (["0"], ["1"]),
    "training.keep_checkpoints": (["0"], ["1", "null"]),
}


def numeric_keys(config: Any, prefix: str = "") -> set[str]:
    """Every field of a configuration that holds a number or a pair, or may hold one."""
    found = set()
    for entry in fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            found |= numeric_keys(value, f"{key}.")
        elif re.match(r".*\b(int|float)\b(?!.*Literal)", str(entry.type)):
            found.add(key)
    return found


def test_the_table_of_ranges_is_complete() -> None:
    assert set(RANGES) == numeric_keys(recipe("digits"))


@pytest.mark.parametrize("key", RANGES)
def test_ranges(key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line that names the option, nothing written; the edge itself is fine."""
    outside, inside = RANGES[key]
    given = ["--network.preset=tiny/2", "--training.batch_size=64"]
    for value in outside:
        arguments = ["digits", *given, f"--{key}={value}", "--out", str(tmp_path / "run")]
        assert main(["train", *arguments]) == 2, value
        line = one_line(capsys)
        assert line.startswith(f"{key}: "), line
        assert not re.search(r"class|typing|Traceback", line)
    assert tree(tmp_path) == {}
    for value in inside:
        parse_config(yaml.safe_load(recipe_text("digits")), "digits", [*given, f"--{key}={value}"])


def test_guidance_needs_dropped_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without them the target is mixed with a velocity that nothing trains, and no loss would show it."""
    for weight in ("1.5", "[1,2]"):
        options = [f"--objective.guidance_weight={weight}", "--objective.label_dropout=0"]
        assert main(["train", "digits", *options, "--out", str(tmp_path / "run")]) == 2
        assert one_line(capsys).startswith("objective.label_dropout: must be positive (0.1, say) for a guid")
    assert tree(tmp_path) == {}


def test_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, message in (
        ("objective.times.distribution", "even", "must be one of 'gap*', 'gap', 'truncated', 'clamped'"),
        ("objective.times.s_prime", "free", "must be one of 'independent', 'tied'"),
        ("network.time_embedding_init", "zero", "must be one of 'spectral', 'normal'"),
        ("training.precision", "float16", "must be one of 'auto', 'float32', 'bfloat16'"),
        ("network.preset", "X/2", "no preset 'X/2'; there are tiny/2"),
        ("network.qk_norm", "perhaps", "must be true or false, got perhaps"),
    ):
        assert main(["train", "digits", f"--{option}={value}"]) == 2
        assert one_line(capsys).startswith(f"{option}: {message}")
    assert main(["train", "digits", "--times.s_prime=tied"]) == 2
    assert one_line(capsys).startswith("objective.times.s_prime: must be independent for gap*")


def test_the_configuration_of_a_run_is_checked_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.yaml that somebody edited by hand."""
    file = tmp_path / "config.yaml"
    for wrong, message in (
        ({"training": {"steps": "many"}}, "training.steps: must be a whole number, got many"),
        ({"training": {"stepz": 3}}, "training.stepz: no such option; did you mean training.steps?"),
        ({"network": 3}, "network: must be a section of options, got 3"),
    ):
        write(file, yaml.safe_load(recipe_text("digits")) | wrong)
        assert main(["train", "--resume", str(tmp_path)]) == 2
        assert one_line(capsys) == f"{file}: {message}"
    assert read_yaml(file)["network"] == 3


# From Python


def test_a_list_is_a_pair() -> None:
    for pair in ([1.5, 2.0], (1.5, 2.0)):
        config = recipe("digits")
        config.objective.guidance_weight = pair  # type: ignore[assignment]
        config.check()
        assert config.objective.guidance_weight == (1.5, 2.0)
        assert TVM(guidance_weight=pair) == TVM(guidance_weight=(1.5, 2.0))  # type: ignore[arg-type]


WRONG: list[tuple[str, Any, str]] = [
    ("objective.guidance_weight", [1.5], "must be a number or a pair of numbers like [1,2], got [1.5]"),
    (
        "objective.guidance_weight",
        [1, 2, 3],
        "must be a number or a pair of numbers like [1,2], got [1, 2, 3]",
    ),
    ("objective.guidance_weight", (1, "2"), "must be a number or a pair of numbers like [1,2], got (1, '2')"),
    ("objective.guidance_weight", None, "must be a number or a pair of numbers like [1,2], got None"),
    ("objective.scaled", 1, "must be true or false, got 1"),
    ("objective.guidance", 2.0, "no such option; did you mean objective.guidance_weight?"),
    ("optimizer.learning_rate", "x", "must be a number, got 'x'"),
    ("optimizer.gradient_clip", True, "must be a number or null, got True"),
    ("optimizer.warmup_steps", None, "must be a whole number, got None"),
    ("optimizer.lr", 1e-3, "no such option"),
    ("training.stps", 3, "no such option; did you mean training.steps?"),
    ("training.steps", 3.0, "must be a whole number, got 3.0"),
    ("training.steps", True, "must be a whole number, got True"),
    ("training.precision", "fp16", "must be one of 'auto', 'float32', 'bfloat16', got 'fp16'"),
    ("training.ema_warmup", "no", "must be true or false, got 'no'"),
    ("training", {"steps": 3}, "must be a TrainingConfig, got {'steps': 3}"),
    ("objective.times.gap", 3, "must be a pair of numbers like [1,2], got 3"),
    ("objective.times.distributon", "gap", "no such option; did you mean objective.times.distribution?"),
    ("objective.times.equal_probability", "half", "must be a number, got 'half'"),
    ("network.depth", "3", "must be a whole number or null, got '3'"),
    ("network.qk_norm", "yes", "must be true or false, got 'yes'"),
    ("network.head", 2, "no such option; did you mean network.heads?"),
    ("network", None, "must be the configuration of a registered network (DiTConfig (dit), MLPConfig (mlp)"),
    ("seed", "1", "must be a whole number, got '1'"),
    ("sed", 1, "no such option; did you mean seed?"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG]
)
def test_attributes_that_are_wrong(key: str, value: Any, message: str) -> None:
    """An attribute that Python takes silently, and one that would fail later as something else."""
    config = recipe("digits")
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)
    with pytest.raises(InputError) as caught:
        config.check()
    assert str(caught.value).startswith(f"{key}: {message}"), caught.value


def test_sections_are_checked_when_they_are_made() -> None:
    with pytest.raises(InputError, match=r"^optimizer\.learning_rate: must be a number, got 'x'$"):
        OptimizerConfig(learning_rate="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^training\.precision: must be one of 'auto', .*, got 'fp16'$"):
        TrainingConfig(precision="fp16")  # type: ignore[arg-type]


def test_a_range_of_guidance_needs_its_embedding() -> None:
    """One weight does not: a dropped label says already that w = 1."""
    config = recipe("digits")
    config.network.guidance_embedding = False
    config.objective.guidance_weight = 2.0
    config.check()
    config.objective.guidance_weight = (1.0, 2.0)
    with pytest.raises(InputError, match=r"^network\.guidance_embedding: must be true for a range of .*\[1"):
        config.check()


def test_guidance_of_images_without_classes() -> None:
    """Known before the images are prepared."""
    config = recipe("image_folder")
    config.objective.guidance_weight = 1.5
    config.data = ImagesData(path="/no/where", label_column=None)
    with pytest.raises(
        InputError, match=r"^objective\.guidance_weight: must be 1 for data without cla.*1\.5"
    ):
        config.check()
    config.data = ImagesData(path="/no/where", label_column="label")
    config.check()
