"""Pickles and files of `torch.save` read without executing anything: what comes out, and what is refused."""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_files import storage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmatch.errors import InputError
from tvmatch.safe_pickle import machine as pickles
from tvmatch.safe_pickle.inert import Inert, Refused
from tvmatch.safe_pickle.machine import CONTAINERS, NUMPY_ARRAYS, restricted_load
from tvmatch.safe_pickle.torch_files import TENSORS, Storage, load_torch

ALLOWED = {**CONTAINERS, **NUMPY_ARRAYS}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
KEYS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5) | st.binary(max_size=5)
PLAIN = st.recursive(
    KEYS | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
    ),
    max_leaves=20,
)


def load(data: bytes) -> Any:
    return restricted_load(data, ALLOWED, what="file.pkl")


class Call:
    """Pickles as a call: the way in which pickles run code."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, *((state,) if state is not None else ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _body(content: Any) -> bytes:
    """The operations of protocol 2 that put `content` on the stack, with memo places of their own."""
    return pickle.dumps(content, 2)[2:-1]


# What comes out


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.sampled_from(PROTOCOLS))
def test_plain_data_are_as_python_reads_them(content: Any, protocol: int) -> None:
    shared = [content, content]  # the same object twice, through the memo
    first, second = load(pickle.dumps(shared, protocol))
    assert first == content
    assert second is first or not isinstance(first, list | dict | set)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_arrays(protocol: int) -> None:
    ordered = OrderedDict(b=1, a=2)
    ordered.attribute = 3  # type: ignore[attr-defined]
    transposed = np.arange(6, dtype=">f4").reshape(2, 3).T
    content = {
        "ordered": ordered,
        "frozen": frozenset([1]),
        "transposed": transposed,
        "numbers": [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex128(1j)],
        "twice": [transposed, transposed],
        "scalar array": np.array(2.5),
        "empty": np.empty((0, 3), np.float16),
        "long": np.zeros(2**18),
    }
    read = load(pickle.dumps(content, protocol))
    assert list(read["ordered"]) == ["b", "a"]
    assert read["frozen"] == {1}
    assert read["transposed"].dtype.newbyteorder("=") == np.float32  # NumPy may swap the bytes as it reads
    assert np.array_equal(read["transposed"], transposed)
    assert read["numbers"] == content["numbers"]
    assert [type(number) for number in read["numbers"]] == [np.float32, np.int64, np.bool_, np.complex128]
    assert read["twice"][0] is read["twice"][1] is not None
    assert read["scalar array"].shape == ()
    assert read["empty"].shape == (0, 3)
    assert np.array_equal(read["long"], content["long"])


def test_a_file_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"weights": bytes(2**21)}))
    assert len(restricted_load(path, {}, what="file.pkl")["weights"]) == 2**21
    for missing in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(InputError, match="directory"):
            restricted_load(missing, {}, what="none.pkl")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        restricted_load(path, {}, what="file.pkl")


def test_stand_ins_are_called_and_given_their_state() -> None:
    data = pickle.dumps(Call(print, "words", state={"a": 1}))
    stands_in = restricted_load(data, {("builtins", "print"): Inert}, what="file.pkl")
    assert (stands_in.arguments, stands_in.state) == (("words",), {"a": 1})


# What is refused

FOREIGN = {
    "os.system": pickle.dumps(Call(__import__("os").system, "touch MARKER")),
    "eval": pickle.dumps(Call(eval, "open('MARKER', 'w')")),
    "protocol 0": b"cos\nsystem\n(S'touch MARKER'\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x18ctypeslib.load_library\x93.",
    "ctypes": b"\x80\x02cnumpy.ctypeslib\nload_library\n.",
    "INST": b"(S'touch MARKER'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch MARKER'\no.",
    "OBJ of what is allowed": b"(cnumpy\nndarray\nK\x01o.",
    "NEWOBJ": b"\x80\x02cbuiltins\nexec\n(X\x01\x00\x00\x001t\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93)}\x92.",
    "BUILD": b"\x80\x02cos\nsystem\n}b.",
    "BUILD of a name": b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__init__K\x01sb.",
    "BUILD of a list": b"\x80\x02]}b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"P1\n.",
    "BINPERSID": b"\x80\x02K\x01Q.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "call of data": b"\x80\x02]K\x01\x85R.",
    "call without arguments": b"\x80\x02cnumpy\ndtype\n]R.",
    "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "array of objects": pickle.dumps(np.array([{}], dtype=object)),
    "array of text": pickle.dumps(np.array(["text"])),
    "array of records": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
    "scalar of text": pickle.dumps(np.str_("text")),
    "date": pickle.dumps(np.datetime64("2026-01-01")),
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested marks": b"(" * 100_000,
    "nested tuples": b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "nested tuple as a key": b"\x80\x02}N" + b"\x85" * 100_000 + b"K\x01s.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**10) + b"abc.",
    "endless bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"abc.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"abc.",
    "huge byte array": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"abc.",
    "huge integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "huge decimal": b"I" + b"9" * 100_000 + b"\n.",
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "text": b"<!DOCTYPE html><html></html>",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "pop of nothing": b"0.",
    "underneath a mark": b"]K\x01(a.",
    "missing memo": b"h\x05.",
    "odd items": b"\x80\x02}(K\x01u.",
    "items of a list": b"\x80\x02](K\x01K\x02u.",
    "elements of a number": b"\x80\x02K\x01(K\x02e.",
    "elements of a set that cannot be hashed": b"\x80\x04\x8f(]\x90.",
    "a key of thousands of digits": pickle.dumps({10**10_000: 1}),
    "an object numbered 10^12": b"Np1000000000000\n.",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_pickles_do_nothing(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    with pytest.raises(InputError, match=r"^file\.pkl: .+") as caught:
        load(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())
    assert set(sys.modules) == modules


def test_the_refused_name_is_told() -> None:
    with pytest.raises(InputError, match=r"posix\.system.*nothing was run"):
        load(FOREIGN["os.system"])
    with pytest.raises(InputError, match=r"refers to a\?\[31mb\.x+…"):  # not the terminal's colours
        load(b"\x80\x04\x8c\x07a\x1b[31mb\x8c\xc8" + b"x" * 200 + b"\x93.")


def test_truncation_anywhere() -> None:
    whole = pickle.dumps({"mu": np.arange(4.0), "n": 3, "words": ["a", "b"], "o": OrderedDict(a=1)})
    load(whole)
    for length in range(len(whole)):
        with pytest.raises(InputError):
            load(whole[:length])


def test_number_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 50)
    load(b"\x80\x02]" + b"]0" * 20 + b".")
    with pytest.raises(InputError, match="more than 50 operations"):
        load(b"\x80\x02]" + b"]0" * 30 + b".")


def test_repetition_takes_no_memory() -> None:
    # Every list holds the one before it twice: a million lists to whoever walks them, forty here.
    data = b"\x80\x02]q\x00"
    for i in range(40):
        data += b"](" + bytes([ord("h"), i]) * 2 + b"eq" + bytes([i + 1])
    assert len(load(data + b".")) == 2


def _repeated(module: bytes, name: bytes, arguments: bytes, times: int = 500) -> bytes:
    """The same call over and over, every one of whose results is kept."""
    start = b"\x80\x04c" + module + b"\n" + name + b"\nq\xf0(" + arguments + b"tq\xf1"
    return start + b"](" + b"h\xf0h\xf1R" * times + b"e."


MEGABYTE = b"B" + struct.pack("<I", 2**20) + bytes(2**20)
BYTE = b"cnumpy\ndtype\n(" + _body("u1") + b"tR"
UNFOLDING = {
    "array": _repeated(b"numpy.core.numeric", b"_frombuffer", MEGABYTE + BYTE + _body((2**20,)) + _body("C")),
    "bytes": _repeated(b"_codecs", b"encode", b"X" + struct.pack("<I", 2**20) + b"a" * 2**20),
    "list": _repeated(b"torch", b"Size", b"](" + b"N" * 2**20 + b"e"),
    "object": _repeated(b"torch", b"device", b"N" * 2**20),
}


@pytest.mark.parametrize("data", UNFOLDING.values(), ids=UNFOLDING.keys())
def test_copies_of_one_piece_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="unfolds"):
        restricted_load(data, {**ALLOWED, **TENSORS}, what="file.pkl")


def test_keys_of_one_hash() -> None:
    """Python takes minutes to put a hundred thousand of these into a dict."""
    keys = b"".join(_body(k * sys.hash_info.modulus) + b"N" for k in range(1, 100_000))
    with pytest.raises(InputError, match="unusual key"):
        load(b"\x80\x02}(" + keys + b"u.")


ARRAY_SHAPES = [
    (10**10,),
    (10**5, 10**5),
    (2**40, 2**40),
    (-1,),
    (3,),
    (5,),
    (2.0, 2.0),
    (True, 4),
    4,
    (4,) * 40,
]


@pytest.mark.parametrize("shape", ARRAY_SHAPES, ids=str)
def test_array_of_another_size_than_its_bytes(shape: Any) -> None:
    from numpy._core.multiarray import _reconstruct, scalar  # type: ignore[attr-defined]
    from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]

    dtype, data = np.dtype("f4"), bytes(16)
    arrays = [
        Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data)),
        Call(_frombuffer, data, dtype, shape, "C"),
        Call(scalar, np.dtype("f8"), data),
    ]
    for array in arrays:
        with pytest.raises(InputError, match=r"array|arguments"):
            load(pickle.dumps(array))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted({**ALLOWED, **TENSORS})),
    st.lists(PLAIN | st.just(np.dtype("f4")) | st.just(np.zeros(2)), max_size=6),
    st.none() | st.just(()) | st.tuples(PLAIN, PLAIN, PLAIN, PLAIN, PLAIN) | PLAIN,
)
def test_arguments_of_any_kind(name: tuple[str, str], arguments: list[Any], state: Any) -> None:
    """A stand-in takes its arguments and state, or the pickle is refused; nothing else may happen."""
    call = b"\x80\x02c" + "\n".join(name).encode() + b"\n" + _body(tuple(arguments)) + b"R"
    for data in (call + b".", call + _body(state) + b"b."):
        with suppress(InputError):
            restricted_load(data, {**ALLOWED, **TENSORS}, what="file.pkl")


# Files of torch.save

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def read_torch(data: bytes) -> Any:
    return load_torch(memoryview(data), {**NUMPY_ARRAYS, **TENSORS})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storages_are_as_pytorch_reads_them(dtype: torch.dtype, zipped: bool) -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = storage_bytes(values, zipped=zipped)
    storage = read_torch(data)
    assert isinstance(storage, Storage)
    expected = torch.tensor([], dtype=dtype).set_(torch.load(io.BytesIO(data), weights_only=True))
    assert storage.values.dtype == dtype
    assert torch.equal(storage.values, expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_of_views(zipped: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=draws)
    tensors = OrderedDict(
        whole=base,
        part=base[3:7, ::2],
        turned=base.T,
        number=base[2, 3],
        none=base[:0],
        parameter=torch.nn.Parameter(base),
    )
    file = io.BytesIO()
    torch.save({"ema": tensors, "step": 3}, file, _use_new_zipfile_serialization=zipped)
    read = read_torch(file.getvalue())
    assert read["step"] == 3
    for name, tensor in tensors.items():
        assert torch.equal(read["ema"][name].tensor(), tensor), name


KEYS_OF_STORAGES = [[1], [None], [["a"]], {}, "key", [10**10_000]]


@pytest.mark.parametrize("keys", KEYS_OF_STORAGES, ids=["number", "none", "list", "dict", "text", "digits"])
def test_storages_of_the_old_format_called_otherwise(keys: Any) -> None:
    start = LEGACY.rindex(b"\x80\x02]")
    name = pickle.loads(LEGACY[start:])[0]
    rest = LEGACY[LEGACY.index(b".", LEGACY.index(b"a.", start)) + 1 :]
    whole = LEGACY[:start] + pickle.dumps([name], 2) + rest
    assert torch.equal(read_torch(whole).values, torch.arange(4.0))
    keys = [int(name)] if keys == [1] else keys  # the right one, as a number
    with pytest.raises(Refused, match="storages"):
        read_torch(LEGACY[:start] + pickle.dumps(keys, 2) + rest)


def test_a_storage_called_by_what_has_no_end() -> None:
    """As text, forty lists that hold each other twice would take terabytes."""
    start = LEGACY.rindex(b"\x80\x02]")
    lists = b"]q\x00" + b"".join(b"](" + bytes([104, i, 104, i]) + b"eq" + bytes([i + 1]) for i in range(40))
    with pytest.raises(Refused, match="storages"):
        read_torch(LEGACY[:start] + b"\x80\x02" + lists + b"]h\x28a." + bytes(24))


def test_negated_tensors_are_refused() -> None:
    """PyTorch keeps the sign of some tensors beside their numbers."""
    negated = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    file = io.BytesIO()
    torch.save({"x": negated}, file)
    with pytest.raises(Refused, match="negated"):
        read_torch(file.getvalue())


def _archive(pickled: bytes, **records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {"data.pkl": pickled, **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def _persistent(count: int, name: bytes = b"FloatStorage") -> bytes:
    """A pickle of the storage "0" with `count` numbers."""
    parts = [_body("storage"), b"ctorch\n" + name + b"\n", _body("0"), _body("cpu"), _body(count)]
    return b"\x80\x02(" + b"".join(parts) + b"tQ."


ZIPPED = storage_bytes(torch.arange(4.0), zipped=True)
LEGACY = storage_bytes(torch.arange(4.0), zipped=False)
BAD_STORAGES = {
    "10 GB in 16 bytes": _archive(_persistent(10**10), **{"data/0": bytes(16)}),
    "negative": _archive(_persistent(-4), **{"data/0": bytes(16)}),
    "no record": _archive(_persistent(4)),
    "unknown type": _archive(_persistent(4, b"QUInt8Storage"), **{"data/0": bytes(16)}),
    "big-endian": _archive(_persistent(4), **{"data/0": bytes(16), "byteorder": b"big"}),
    "10 GB in the old format": LEGACY.replace(
        b"K\x04Nt", b"\x8a\x05" + (10**10).to_bytes(5, "little") + b"Nt"
    ),
    "a call within": _archive(pickle.dumps(Call(bytearray, 10**10), 2)),
    "a command within": _archive(pickle.dumps(Call(__import__("os").system, "touch MARKER"), 2)),
    "a command within the old format": LEGACY[: LEGACY.index(b"\x80\x02(X")] + FOREIGN["os.system"],
    "two pickles": _archive(_persistent(4), **{"data/0": bytes(16), "code/data.pkl": b"N."}),
    "no identity": _archive(b"\x80\x02K\x01Q."),
    "identity of arrays": _archive(b"\x80\x02(" + _body(np.ones(3)) * 6 + b"tQ."),
    "not an archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("data", BAD_STORAGES.values(), ids=BAD_STORAGES.keys())
def test_bad_storages(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as caught:
        read_torch(data)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_archives_that_unfold_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _persistent(2**20))
        archive.writestr("archive/data/0", bytes(2**22))
    assert len(file.getvalue()) < 2**14
    with pytest.raises(Refused, match="compressed"):
        read_torch(file.getvalue())


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zipped", "legacy"])
def test_truncated_storages(data: bytes) -> None:
    read_torch(data)
    for length in range(4, len(data)):
        with pytest.raises(Refused):
            read_torch(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([ZIPPED, LEGACY]), st.integers(0, 10_000), st.integers(0, 255))
def test_changed_bytes_of_storages(data: bytes, place: int, value: int) -> None:
    changed = bytearray(data)
    changed[place % len(data)] = value
    with suppress(Refused):
        content = read_torch(bytes(changed))
        assert not isinstance(content, Storage) or content.values.numel() <= len(data)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
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
        (2**60, (1,), (1,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (1,) * 10_000, (1,) * 10_000),
        (0, (0, 2**47, 2**47), (1, 1, 1)),  # no numbers, but PyTorch multiplies the sizes
    ],
)
def test_tensors_outside_their_storage(offset: Any, shape: Any, strides: Any) -> None:
    call = Call(
        torch._utils._rebuild_tensor_v2,
        Call(torch.storage._load_from_bytes, LEGACY),
        offset,
        shape,
        strides,
        False,
        OrderedDict(),
    )
    with pytest.raises(InputError, match="tensor"):
        restricted_load(pickle.dumps(call), TENSORS, what="file.pkl")
