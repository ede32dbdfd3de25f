"""Files of `torch.save` read without executing anything, and without reading memory that is not theirs."""

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from authors_files import storage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pickles import Call, body, load
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.safe_pickle.tensors import Storage, StoredTensor
from tvmatch.safe_pickle.unpickler import restricted_load

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def saved(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def values(storage: Any) -> Tensor:
    """All numbers of a storage."""
    assert isinstance(storage, Storage)
    (typed,) = storage.arguments
    return torch.empty(0, dtype=typed.dtype).set_(typed)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storages_are_as_pytorch_reads_them(dtype: torch.dtype, zipped: bool) -> None:
    numbers = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    read = values(load(storage_bytes(numbers, zipped=zipped)))
    assert read.dtype == dtype
    assert torch.equal(read, numbers)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_state_dicts_of_views(kind: str) -> None:
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    tensors = OrderedDict(
        whole=base,
        part=base[3:7, ::2],
        turned=base.T,
        number=base[2, 3],
        none=base[:0],
        parameter=torch.nn.Parameter(base),
    )
    content = {"ema": tensors, "step": 3}
    read = load(pickle.dumps(content) if kind == "pickle" else saved(content, kind == "zip"))
    assert read["step"] == 3
    for name, tensor in tensors.items():
        assert torch.equal(read["ema"][name].tensor(), tensor), name


def test_a_zip_is_mapped_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(1000), "b": torch.zeros(1000)}, path)
    before = path.read_bytes()
    read = {name: x.tensor() for name, x in restricted_load(path).items()}
    read["a"].fill_(2)
    assert not read["b"].any()
    assert path.read_bytes() == before


def test_negated_tensors_are_refused() -> None:
    """PyTorch keeps the sign of some tensors beside their numbers."""
    negated = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(InputError, match="negated"):
        load(saved({"x": negated}, True))["x"].tensor()


# Nothing runs


class Canary:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch MARKER",)


@pytest.mark.parametrize("zipped", [True, False])
def test_commands_are_inert(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = load(saved({"x": torch.ones(2), "y": Canary(), "z": torch.nn.Linear(2, 2)}, zipped))
    assert read["x"].tensor().tolist() == [1, 1]
    assert (read["y"].class_name, read["y"].arguments) == ("system", ("touch MARKER",))
    assert read["z"].class_name == "Linear"
    assert not list(tmp_path.iterdir())


def archive(pickled: bytes, **records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            made.writestr(f"archive/{name}", data)
    return file.getvalue()


@pytest.mark.parametrize("hidden", [False, True])
def test_torchscript_is_refused(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if Python's reader of archives does not see the record that PyTorch's sees."""
    data = archive(pickle.dumps({}, 2), **{"constants.pkl": pickle.dumps((), 2)})
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called"))
    if hidden:
        infolist = zipfile.ZipFile.infolist
        monkeypatch.setattr(
            zipfile.ZipFile, "infolist", lambda self: [x for x in infolist(self) if "const" not in x.filename]
        )
    with pytest.raises(InputError, match="TorchScript"):
        load(data)


def test_tar_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.load extracts the files of its oldest format, here one that begins like the next format."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name in (LEGACY[:15].decode("latin1"), "storages", "tensors", "pickle"):
            made.addfile(tarfile.TarInfo(name), io.BytesIO())
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a tar file was opened"))
    for data in (file.getvalue(), LEGACY[:15] + file.getvalue()[15:]):
        with pytest.raises(InputError, match="damaged"):
            load(data)
    assert values(load(LEGACY)).tolist() == [0, 1, 2, 3]


def test_source_code_in_old_files_is_ignored() -> None:
    """torch.load compares the source in an id ("module", class, file, source), and may write a patch."""
    start = LEGACY.index(b"\x80\x02(X")
    identity = b"\x80\x02(" + body("module") + b"cos\nsystem\n" + body("file") + body("source") + b"tQ."
    read = load(LEGACY[:start] + identity + pickle.dumps([], 2))
    assert read.class_name == "system"


# Sizes that lie


def persistent(count: int, name: bytes = b"FloatStorage", key: str = "0") -> bytes:
    """A pickle of a storage with `count` numbers."""
    parts = [body("storage"), b"ctorch\n" + name + b"\n", body(key), body("cpu"), body(count)]
    return b"\x80\x02(" + b"".join(parts) + b"tQ."


ZIPPED = storage_bytes(torch.arange(4.0), zipped=True)
LEGACY = storage_bytes(torch.arange(4.0), zipped=False)
KEYS = LEGACY.rindex(b"\x80\x02]")  # of the pickle of the storages' keys
REST = LEGACY[LEGACY.index(b".", LEGACY.index(b"a.", KEYS)) + 1 :]
BAD_STORAGES = {
    "10 GB in 16 bytes": archive(persistent(10**10), **{"data/0": bytes(16)}),
    "more than the record": archive(persistent(5), **{"data/0": bytes(16), "data/1": bytes(64)}),
    "fewer than the record": archive(persistent(3), **{"data/0": bytes(16)}),
    "negative": archive(persistent(-4), **{"data/0": bytes(16)}),
    "no record": archive(persistent(4)),
    "another key": archive(persistent(4, key="../0"), **{"data/0": bytes(16)}),
    "unknown type": archive(persistent(4, b"BoldStorage"), **{"data/0": bytes(16)}),
    "quantised": archive(persistent(16, b"QUInt8Storage"), **{"data/0": bytes(16)}),
    "a type that is changed": archive(
        persistent(4).replace(b"Storage\n", b"Storage\n}" + body("_dtype") + b"ctorch\nfloat64\nsb"),
        **{"data/0": bytes(16)},
    ),
    "no identity": archive(b"\x80\x02K\x01Q."),
    "identity of arrays": archive(b"\x80\x02(" + body(torch.ones(3).numpy()) * 6 + b"tQ."),
    "not an archive": b"PK\x03\x04" + bytes(100),
    "10 GB in the old format": LEGACY.replace(
        b"K\x04Nt", b"\x8a\x05" + (10**10).to_bytes(5, "little") + b"Nt"
    ),
    "more in the old format": LEGACY.replace(b"K\x04Nt", b"K\x05Nt"),
    "fewer in the old format": LEGACY.replace(b"K\x04Nt", b"K\x03Nt"),
    # PyTorch would leave such a storage as the memory was before.
    "no keys in the old format": LEGACY[:KEYS] + pickle.dumps([], 2),
    "a view in the old format": LEGACY.replace(b"K\x04Nt", b"K\x04(" + body("1") + b"K\x00K\x09tt"),
}


@pytest.mark.parametrize("data", BAD_STORAGES.values(), ids=BAD_STORAGES.keys())
def test_bad_storages(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        load(data)
    assert "\n" not in str(caught.value)


NAMES = [[1], [None], [["a"]], {}, "key", [10**10_000], [torch.ones(1).numpy()]]


@pytest.mark.parametrize("keys", NAMES, ids=["number", "none", "list", "dict", "text", "digits", "array"])
def test_storages_of_the_old_format_called_otherwise(keys: Any) -> None:
    name = pickle.loads(LEGACY[KEYS:])[0]
    assert values(load(LEGACY[:KEYS] + pickle.dumps([name], 2) + REST)).tolist() == [0, 1, 2, 3]
    keys = [int(name)] if keys == [1] else keys  # the right one, as a number
    with pytest.raises(InputError, match="damaged"):
        load(LEGACY[:KEYS] + pickle.dumps(keys, 2) + REST)


def test_compressed_archives_are_refused() -> None:
    """PyTorch would map the compressed bytes as numbers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", persistent(4))
        made.writestr("archive/data/0", bytes(16))
    with pytest.raises(InputError, match="compressed"):
        load(file.getvalue())


def test_records_that_pytorch_finds_elsewhere_stay_within_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if Python's reader of archives believes the size, no byte behind the file is read."""
    data = archive(persistent(10**6), **{"data/0": bytes(16)})
    infolist = zipfile.ZipFile.infolist

    def believed(self: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        records = infolist(self)
        records[-1].file_size = 4 * 10**6
        return records

    monkeypatch.setattr(zipfile.ZipFile, "infolist", believed)
    assert values(load(data)).nbytes <= len(data)


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zipped", "legacy"])
def test_truncated_storages(data: bytes) -> None:
    load(data)
    for length in range(4, len(data)):
        with pytest.raises(InputError):
            load(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([ZIPPED, LEGACY]), st.integers(0, 10_000), st.integers(0, 255))
def test_changed_bytes_of_storages(data: bytes, place: int, value: int) -> None:
    changed = bytearray(data)
    changed[place % len(data)] = value
    with suppress(InputError):
        content = load(bytes(changed))
        assert not isinstance(content, Storage) or values(content).nbytes <= len(data)


SHAPES: list[tuple[Any, Any, Any]] = [
    (0, (10**10,), (1,)),
    (0, (10**10,), (0,)),  # one number, repeated
    (0, (5,), (1,)),
    (1, (4,), (1,)),
    (0, (2, 2), (3, 1)),
    (0, (2, 2), (2,)),
    (-1, (2,), (1,)),
    (0, (-2,), (1,)),
    (0, (2,), (-1,)),
    (0, (2.0,), (1,)),
    (0, (True,), (1,)),
    (0, [2], [1]),
    (None, (2,), (1,)),
    (2**60, (1,), (1,)),
    (2**62, (1,), (2**62,)),
    (0, (2**40, 2**40), (0, 0)),
    (0, (1,) * 10_000, (1,) * 10_000),
]


@pytest.mark.parametrize(("offset", "shape", "strides"), SHAPES)
def test_tensors_outside_their_storage(offset: Any, shape: Any, strides: Any) -> None:
    rebuild, storage = torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, LEGACY)
    tensor = load(pickle.dumps(Call(rebuild, storage, offset, shape, strides, False, OrderedDict())))
    assert isinstance(tensor, StoredTensor)
    with pytest.raises(InputError, match="tensor"):
        tensor.tensor()


@pytest.mark.parametrize(
    "state", [(1, 0, (10**6,), (1,)), (1,) * 5, {"arguments": ()}, (None, {"arguments": ()})], ids=str
)
def test_state_cannot_move_a_tensor(state: Any) -> None:
    """`torch.Tensor.__setstate__` would resize the storage: a view of memory that is not the file's."""
    rebuild, storage = torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, LEGACY)
    call = Call(rebuild, storage, 0, (4,), (1,), False, OrderedDict(), state=state)
    assert load(pickle.dumps(call)).tensor().tolist() == [0, 1, 2, 3]


def test_a_type_of_storage_cannot_become_a_tensor() -> None:
    """PyTorch's own object for a storage's type takes any state, another class too."""
    swap = b"N}" + body("__class__") + b"ctorch._utils\n_rebuild_tensor_v2\ns\x86b"
    content = load(archive(b"\x80\x02ctorch\nFloatStorage\n" + swap + b"."))
    with pytest.raises(InputError, match="damaged tensor"):
        content.tensor()


def test_a_file_named_as_safetensors_is_one_line() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(ZIPPED)
        with pytest.raises(InputError, match=r"weights\.safetensors: damaged"):
            restricted_load(path)
