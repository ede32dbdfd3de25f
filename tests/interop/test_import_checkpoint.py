"""`tvmatch import`: files in the authors' formats become checkpoints; hostile and damaged ones do nothing."""

import io
import pickle
import shutil
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_files import EasyDict, Persistent, authors_bytes, authors_network, storage_bytes
from helpers import random_inputs, randomize_, small_dit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

import tvmatch
from tvmatch.cli import main
from tvmatch.errors import InputError
from tvmatch.interop import network_to_authors
from tvmatch.interop.checkpoints.snapshot import import_network, read_snapshot
from tvmatch.models import DiT

SHAPE, CLASSES = (4, 4, 4), 3
OPTIONS = ["--mean=0.5,-0.5,0,1", "--std=2", "--guidance=2", "--scaled=true", "--autoencoder=none"]


def dit(**switches: Any) -> DiT:
    return randomize_(small_dit(SHAPE, CLASSES, **switches)).requires_grad_(False)


def beside() -> dict[str, Any]:
    """What stands beside the networks of a snapshot."""
    return {
        "encoder": authors_network({"scale": torch.ones(4)}, kind="StabilityVAE"),
        "loss_fn": Persistent(),
        "optimizer": None,
        "dataset_kwargs": EasyDict(path="imagenet.zip", use_labels=True),
        "statistics": np.arange(3.0),
        "progress": [np.float64(0.5), 100, {"when": (1, 2)}],
    }


def snapshot(network: DiT, entry: str = "ema", **options: Any) -> dict[str, Any]:
    return {entry: authors_network(network_to_authors(network), **options), **beside()}


@pytest.fixture(autouse=True)
def _no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Source code in a snapshot would write a file: it must not appear, nor may anything be imported."""
    monkeypatch.setattr(Persistent, "marker", tmp_path / "marker")
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "marker").exists()
    assert not {"torch_utils", "dnnlib", "timm"} & sys.modules.keys()


def import_file(data: bytes, *options: str, name: str = "snapshot.pkl") -> DiT:
    """The network of the checkpoint that the command makes of a file."""
    Path(name).write_bytes(data)
    assert main(["import", name, "--out", "out", *OPTIONS, *options]) == 0
    network = tvmatch.load("out").network
    assert isinstance(network, DiT)
    return network


def assert_same(actual: DiT, expected: DiT) -> None:
    """Every weight and the outputs, bit for bit: the same numbers go through the same operations."""
    assert actual.config.heads == expected.config.heads
    weights = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    inputs = random_inputs(SHAPE, CLASSES, dtype=torch.float32)
    assert torch.equal(actual(*inputs), expected(*inputs))  # type: ignore[arg-type]


# Files that are as they should be


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_snapshot(protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    network = dit()
    data = authors_bytes(snapshot(network, img_resolution=4, label_dim=3), protocol)
    assert f"open({str(Persistent.marker)!r}, 'w')".encode() in data  # the code that must not run
    assert_same(import_file(data), network)
    model = tvmatch.load("out")
    assert model.spec.class_names == ("0", "1", "2")
    assert (model.spec.kind, model.spec.shape) == ("image", SHAPE)
    assert model.spec.mean == (0.5, -0.5, 0, 1)
    assert model.spec.std == (2, 2, 2, 2)
    assert (model.guidance, model.scaled) == (2.0, True)
    assert model.provenance["imported_from"] == "snapshot.pkl"
    assert model.provenance["imported_network"] == "ema"
    assert len(model.provenance["imported_sha256"]) == 64
    shown = capsys.readouterr().out
    assert "left out     encoder, loss_fn, optimizer, " in shown


def test_the_average_is_preferred() -> None:
    average, latest = dit(), randomize_(dit(), seed=1)
    content = {"net": authors_network(network_to_authors(latest)), **snapshot(average)}
    assert_same(import_file(authors_bytes(content)), average)
    shutil.rmtree("out")
    assert_same(import_file(authors_bytes(content), "--network=net"), latest)
    shutil.rmtree("out")
    assert_same(import_file(authors_bytes(snapshot(latest, "net") | {"ema": None})), latest)


def wrapped(level: str, inner: nn.Module) -> nn.Module:
    """As DDP wraps a module, and as compiled ones were pickled before they had a pickle of their own."""
    outer = nn.Module()
    outer.add_module(level, inner)
    return outer


@pytest.mark.parametrize("where", ["compiled", "inner compiled", "_orig_mod", "module", "both"])
def test_levels_of_compilation_and_ddp(where: str) -> None:
    network = dit()
    theirs: Any = authors_network(network_to_authors(network))
    if where == "compiled":
        theirs = torch.compile(theirs)
    elif where == "inner compiled":
        theirs._modules["model"] = torch.compile(theirs.model)
    else:
        for level in ("_orig_mod", "module") if where == "both" else (where,):
            theirs = wrapped(level, theirs)
    assert_same(import_file(authors_bytes({"ema": theirs, **beside()})), network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    network = dit()
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))
    theirs = {name: tensor.to(dtype) for name, tensor in network_to_authors(network).items()}
    theirs["model.pos_embed"] = network_to_authors(network)[
        "model.pos_embed"
    ]  # where only weights are averaged
    assert_same(import_file(authors_bytes({"ema": authors_network(theirs)})), network)
    precisions = ", ".join(sorted([str(dtype).removeprefix("torch."), "float32"]))
    assert f"precision    {precisions}, converted to float32\n" in capsys.readouterr().out


PLAIN = {
    "safetensors": lambda tensors: save(tensors),
    "zip": lambda tensors: _saved(tensors, True),
    "old": lambda tensors: _saved(tensors, False),
    "zip, ema": lambda tensors: _saved(
        {"ema": tensors, "opt": {"state": {0: torch.ones(1)}}, "step": 7}, True
    ),
    "pickled": lambda tensors: pickle.dumps(tensors),
}


def _saved(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model._orig_mod."])
@pytest.mark.parametrize("kind", PLAIN)
def test_state_dicts(kind: str, prefix: str) -> None:
    network = dit(qk_norm=False)
    tensors = {f"{prefix}{name.removeprefix('model.')}": x for name, x in network_to_authors(network).items()}
    imported = import_file(PLAIN[kind](tensors), "--heads=2", name="weights")  # the name tells nothing
    assert_same(imported, network)


def test_recipes_say_how_a_network_was_trained() -> None:
    network = randomize_(small_dit((4, 32, 32), 1000))
    Path("snapshot.pkl").write_bytes(authors_bytes(snapshot(network)))
    autoencoder = "--autoencoder=no/such/autoencoder"  # not even a name on the Hub
    assert main(["import", "snapshot.pkl", "--out=out", "--recipe=imagenet256_w2", autoencoder]) == 0
    model = tvmatch.load("out")
    assert model.spec.mean == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert model.spec.std == (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    assert (model.guidance, model.scaled) == (2.0, True)
    assert model.spec.autoencoder is not None
    assert model.spec.autoencoder.fingerprint == ""
    assert model.spec.autoencoder.image_shape == (3, 256, 256)
    changed = ["--mean=0", "--guidance=1,4", "--scaled=false"]
    assert main(["import", "snapshot.pkl", "--out=2", "--recipe=imagenet256_w2", autoencoder, *changed]) == 0
    model = tvmatch.load("2")
    assert (model.spec.mean, model.guidance, model.scaled) == ((0, 0, 0, 0), (1, 4), False)


def test_the_autoencoder_is_recorded_and_makes_images() -> None:
    diffusers = pytest.importorskip("diffusers")
    from tvmatch.cli.options import load_model
    from tvmatch.data.latents.autoencoder import load_autoencoder

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks
    ).save_pretrained("autoencoder")
    import_file(authors_bytes(snapshot(dit())), "--autoencoder=autoencoder")
    model = load_model("out", "cpu")
    assert model.spec.autoencoder == load_autoencoder("autoencoder").info((3, 8, 8))
    assert model.sample(count=2).shape == (2, 3, 8, 8)
    other = network_to_authors(randomize_(small_dit((3, 4, 4), CLASSES)))
    Path("other.pkl").write_bytes(authors_bytes({"ema": authors_network(other)}))
    check_refused(
        ["import", "other.pkl", "--out=2", *OPTIONS, "--mean=0", "--autoencoder=autoencoder"], "4 channels"
    )


def test_a_state_dict_is_one_network() -> None:
    save_file(network_to_authors(dit()), "weights.safetensors")
    torch.save(network_to_authors(dit()), "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        check_refused(["import", name, "--out=out", *OPTIONS, "--network=ema"], "there is no ema to choose")


def test_commands_beside_the_network() -> None:
    """Whatever a file names is inert: each of these would leave a mark."""
    hostile = [SYSTEM, Call(eval, "open('marker', 'w')"), Call(LOAD_BYTES, _saved(SYSTEM, False))]
    Path("nested.pkl").write_bytes(authors_bytes({"loss": hostile, **snapshot(dit())}))
    check_refused(["import", "nested.pkl", "--out=out", *OPTIONS], "something else than a storage")
    assert_same(import_file(authors_bytes({"loss": hostile[:2], **snapshot(dit())})), dit())


@pytest.mark.parametrize(
    "content",
    [
        b"ant\nbee\ncow\n",
        b"\xef\xbb\xbfant\r\nbee\r\ncow",  # a byte-order mark and line ends of Windows
        b"  ant\t\n\nbee\n cow\n\n",
    ],
)
def test_class_names(content: bytes) -> None:
    Path("names.txt").write_bytes(content)
    import_file(authors_bytes(snapshot(dit())), "--class_names=names.txt")
    model = tvmatch.load("out")
    assert model.spec.class_names == ("ant", "bee", "cow")
    assert model.spec.label_indices(["ant"]).tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ant\nbee\nant\n", "names.txt has 'ant' twice, in lines 1 and 3"),
        (b"\xef\xbb\xbfant\n\nbee\n bee \n", "names.txt has 'bee' twice, in lines 3 and 4"),
        ("ant\nbee\ncow\n".encode("utf-16"), "names.txt cannot be read as text"),
        (b"", "0 names for a network of 3 classes"),
        (b"\xef\xbb\xbf\n", "0 names for a network of 3 classes"),
    ],
)
def test_class_names_that_are_none(content: bytes, message: str) -> None:
    Path("snapshot.pkl").write_bytes(authors_bytes(snapshot(dit())))
    Path("names.txt").write_bytes(content)
    check_refused(["import", "snapshot.pkl", "--out=out", *OPTIONS, "--class_names=names.txt"], message)


def test_sit() -> None:
    switches = dict.fromkeys(("rms_norm", "qk_norm", "modulation_norm", "guidance_embedding"), False)
    theirs = network_to_authors(dit(**switches))
    tensors = {name: x for name, x in theirs.items() if ".s_embedder." not in name}
    save_file(tensors, "sit.safetensors")
    arguments = ["--mean=0", "--std=5.5", "--autoencoder=none", "--heads=2"]
    assert main(["import", "sit.safetensors", "--out=out", *arguments]) == 0
    model = tvmatch.load("out")
    assert (model.guidance, model.scaled) == (1.0, False)
    check_refused(["import", "sit.safetensors", "--out=2", *arguments, "--modulation_norm=true"], "of a SiT")
    without = [x for x in arguments if x != "--std=5.5"]
    check_refused(
        ["import", "sit.safetensors", "--out=2", *without, "--recipe=imagenet256_w2"], "std: needed for a SiT"
    )
    x, t, s, labels, _ = random_inputs(SHAPE, CLASSES, dtype=torch.float32)
    expected = import_network(tensors, heads=2).network(x, t, t, labels)
    assert isinstance(expected, Tensor)
    # The velocity is the same for every s, up to the rounding of an added zero embedding: none.
    assert torch.equal(model.network(x, t, s, labels), expected)


# Files that are not


def check_refused(arguments: list[str], message: str) -> None:
    """Exit code 2, one line that says why, and no new file."""
    before, errors = sorted(Path().iterdir()), io.StringIO()
    with redirect_stderr(errors):
        assert main(arguments) == 2
    text = errors.getvalue()
    assert text.startswith("tvmatch: error: ")
    assert text.count("\n") == 1
    assert len(text) < 600
    assert message in text
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean=1,2"], "mean"),
        (["--std=0"], "std"),
        (["--std=nan"], "std"),
        (["--mean=a"], "mean"),
        (["--guidance=0.5"], "guidance"),
        (["--guidance=3,2"], "guidance"),
        (["--heads=3"], "heads"),
        (["--heads=4"], "q_norm"),
        (["--network=net"], "no network under net; the file holds ema, encoder"),
        (["--network=other"], "network"),
        (["--recipe=imagenet256_w3"], "imagenet256_w3"),
        (["--recipe=imagenet256_w2"], "of shape (4, 32, 32) with 1000 classes"),
        (["--class_names=none.txt"], "none.txt"),
        (["--class_names=two.txt"], "2 names for a network of 3 classes"),
        (["--out=taken"], "exists already"),
    ],
)
def test_options(arguments: list[str], message: str) -> None:
    Path("snapshot.pkl").write_bytes(authors_bytes(snapshot(dit())))
    Path("two.txt").write_text("ant\nbee\n")
    Path("taken").mkdir()
    check_refused(["import", "snapshot.pkl", "--out=out", *OPTIONS, *arguments], message)


@pytest.mark.parametrize("option", ["mean", "std", "guidance", "scaled", "autoencoder"])
def test_what_the_file_does_not_tell(option: str) -> None:
    Path("snapshot.pkl").write_bytes(authors_bytes(snapshot(dit())))
    options = [x for x in OPTIONS if not x.startswith(f"--{option}")]
    check_refused(["import", "snapshot.pkl", "--out=out", *options], f"{option}: ")


def without(name: str) -> dict[str, Tensor]:
    return {key: x for key, x in network_to_authors(dit()).items() if key != f"model.{name}"}


def with_(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return network_to_authors(dit()) | {f"model.{name}": tensor}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("blocks.1.attn.qkv.bias"), "missing tensors ['blocks.1.attn.qkv.bias']"),
        (without("x_embedder.proj.weight"), "missing tensor x_embedder.proj.weight"),
        (with_("more", torch.ones(1)), "unexpected tensors ['more']"),
        (network_to_authors(dit()) | {"sigma": torch.ones(1)}, "unexpected tensors ['sigma']"),
        (with_("final_layer.linear.bias", torch.ones(5)), "(5,), expected floating point of shape (16,)"),
        (with_("blocks.999999999.attn.qkv.bias", torch.ones(1)), "names and shapes"),
        (with_("blocks.1001.attn.qkv.bias", torch.ones(1)), "names and shapes"),
        (with_("y_embedder.embedding_table.weight", torch.tensor(1.0)), "names and shapes"),
        (
            network_to_authors(dit()) | {"final_layer.linear.bias": torch.zeros(16)},
            "with and without 'model.'",
        ),
        (with_("x_embedder.proj.weight", torch.ones(100_000, 1, 1, 1)), "expected"),
        (with_("x_embedder.proj.weight", torch.ones(0, 4, 2, 2)), "empty"),
        (with_("pos_embed", torch.ones(1, 4, 16)), "pos_embed"),
        (with_("final_layer.linear.bias", torch.full((16,), torch.nan)), "not finite"),
        (with_("final_layer.linear.bias", torch.full((16,), 1e300, dtype=torch.float64)), "not finite"),
        (with_("final_layer.linear.bias", torch.ones(16, dtype=torch.int64)), "floating point"),
        ({"weight": torch.ones(3)}, "missing tensor"),
    ],
)
def test_other_architectures(tensors: dict[str, Tensor], message: str) -> None:
    Path("snapshot.pkl").write_bytes(authors_bytes({"ema": authors_network(tensors)}))
    check_refused(["import", "snapshot.pkl", "--out=out", *OPTIONS], message)
    save_file(tensors, "weights.safetensors")
    check_refused(["import", "weights.safetensors", "--out=out", *OPTIONS], message)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _inner(content: Any) -> dict[str, Any]:
    """Content where the network's first weights are."""
    network = authors_network(network_to_authors(dit()))
    network._parameters["first"] = content
    return {"ema": network}


def _state(**parts: Any) -> Any:
    """A persistent object of any state."""
    thing = Persistent()
    vars(thing).clear()
    vars(thing).update(parts)
    return thing


def _nested() -> nn.Module:
    """More modules within each other than any network has."""
    module = nn.Module()
    for _ in range(60):
        module = wrapped("x", module)
    return module


def _cycle() -> Any:
    network = authors_network({})
    network._modules["again"] = network
    return network


def _wide() -> Any:
    """Every module has the next one twice: 2⁶⁰ modules to whoever walks them."""
    module: nn.Module = nn.Module()
    for _ in range(40):
        above = nn.Module()
        above._modules |= {"a": module, "b": module}
        module = above
    return module


FOUR = Call(torch.storage._load_from_bytes, storage_bytes(torch.ones(4), zipped=False))
LOAD_BYTES, REBUILD = torch.storage._load_from_bytes, torch._utils._rebuild_tensor_v2
SYSTEM = Call(__import__("os").system, "touch marker")
HOSTILE: dict[str, tuple[Any, str]] = {
    "command": (SYSTEM, "it holds an object of class system"),
    "command as the network": ({"ema": SYSTEM}, "ema is an object of class system, not a PyTorch module"),
    "command among the weights": (_inner(SYSTEM), "first is an object of class system"),
    "eval": (_inner(Call(eval, "open('marker', 'w')")), "first is an object of class eval"),
    "nested bytes": (_inner(Call(LOAD_BYTES, pickle.dumps(SYSTEM))), "not a storage"),
    "nested ZIP": (_inner(Call(LOAD_BYTES, _saved(SYSTEM, True))), "not a storage"),
    "nested old torch.save": (_inner(Call(LOAD_BYTES, _saved(SYSTEM, False))), "else than a storage"),
    "10 GB": (_inner(Call(REBUILD, FOUR, 0, (10**10,), (1,), False, {})), "a storage of 4 numbers"),
    "10 GB of one number": (
        _inner(Call(REBUILD, FOUR, 0, (10**10,), (0,), False, {})),
        "a storage of 4 numbers",
    ),
    "text for a tensor": (_inner("weights"), "first is a str"),
    "array for a tensor": (_inner(np.ones(3)), "first is an array"),
    "terminal codes": ({"ema": {"\x1b[2J\n": torch.ones(1)}}, "it has ?[2J?"),
    "a name without end": ({"ema": {"x" * 10_000: torch.ones(1)}}, "…"),
    "a number without end": ({10**10_000: 1, "step": 1}, "the file holds something of type int, step"),
    "network is a list": ({"ema": [1, 2]}, "ema is a list, not a PyTorch module"),
    "no network": ({"model": {}}, "no network under ema or net"),
    "a list": ([1, 2], "a list"),
    "state is text": ({"ema": _state(_parameters="a")}, "not a PyTorch module"),
    "names are numbers": ({"ema": _state(_parameters={1: None}, _buffers={}, _modules={})}, "not a PyTorch"),
    "names with dots": (
        {"ema": _state(_parameters={"a.b": None}, _buffers={}, _modules={})},
        "not a PyTorch",
    ),
    "empty state dict": ({"ema": {}}, "missing"),
    "empty tensors": ({"ema": {"x_embedder.proj.weight": torch.ones(0, 4, 2, 2)}}, "empty tensors"),
    "modules within modules": ({"ema": _nested()}, "more than"),
    "modules in a circle": ({"ema": _cycle()}, "more than"),
    "modules without end": ({"ema": _wide()}, "more than"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_snapshots(content: Any, message: str) -> None:
    Path("snapshot.pkl").write_bytes(authors_bytes(content))
    check_refused(["import", "snapshot.pkl", "--out=out", *OPTIONS], message)


NESTED = b"\x80\x04}\x8c\x03ema" + b"]" * 20_000 + b"a" * 19_999 + b"s."
BOMBS: dict[str, bytes] = {
    "deep lists": NESTED,
    "deep tuples": b"\x80\x04}\x8c\x03emaN" + b"\x85" * 20_000 + b"s.",
    "10 GB of bytes": b"\x80\x04\x8e" + (10**10).to_bytes(8, "little") + b"x.",
    "10 GB of lines": b"V" + b"x" * 1000,
    "10 GB in a storage": authors_bytes(_inner(torch.ones(4))).replace(
        b"K\x04Nt", b"J" + b"\xff\xff\xff\x7fNt"
    ),
    "10 GB of safetensors": (10**10).to_bytes(8, "little") + b"{",
    "an archive": _saved({"ema": {}}, True)[:-30],
    "no pickle": b"GIF89a" + bytes(1000),
    "a name of a library": b"\x80\x04\x8c\x0fnumpy.ctypeslib\x8c\x0cload_library\x93\x8c\x01x\x8c\x01/\x86R.",
    "extension": b"\x80\x02\x82\x01)R.",
    "instance": b"(S'touch marker'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch marker'\no.",
    "call with keywords": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93)}\x92.",
    "set state": b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81X\x01\x00\x00\x00ab.",
    "wrong arguments": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\nK\x01\x85R.",
    "tensor of text": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(VA\nVB\nVC\nVD\ntR.",
    "empty": b"",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_hostile_bytes(data: bytes) -> None:
    Path("snapshot.pkl").write_bytes(data)
    check_refused(["import", "snapshot.pkl", "--out=out", *OPTIONS], "snapshot.pkl: ")


def test_truncation_at_every_hundredth() -> None:
    whole = authors_bytes(snapshot(dit()))
    for percent in range(100):
        Path("snapshot.pkl").write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(InputError, match=r"^snapshot.pkl: .*(truncated|empty)"):
            read_snapshot(Path("snapshot.pkl"))


SMALL = authors_bytes(snapshot(randomize_(small_dit((1, 2, 2), 1, depth=1, hidden_size=4, heads=1))))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_give_finite_weights_or_an_error(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(SMALL)
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "changed.pkl"
    path.write_bytes(data)
    with suppress(InputError):
        network = import_network(read_snapshot(path).tensors, heads=1).network
        assert all(parameter.isfinite().all() for parameter in network.parameters())
