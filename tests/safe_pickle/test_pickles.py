"""Pickles read as data: contents are right, and nothing that a file names is imported or called."""

import copyreg
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from authors_files import storage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import ones

from tvmatch.errors import InputError
from tvmatch.safe_pickle.arrays import Array
from tvmatch.safe_pickle.inert import Dict, Function, Inert
from tvmatch.safe_pickle.unpickler import STAND_INS, restricted_load

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
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file.pkl"
        path.write_bytes(data)
        return restricted_load(path)


class Call:
    """Pickles as a call: the way in which pickles run code."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, *((state,) if state is not None else ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def body(content: Any) -> bytes:
    """The operations of protocol 2 that put `content` on the stack, with memo places of their own."""
    return pickle.dumps(content, 2)[2:-1]


# What is read


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
        "frozen": {frozenset([1]): 1},
        "transposed": transposed,
        "numbers": [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex128(1j)],
        "twice": [transposed, transposed],
        "scalar array": np.array(2.5),
        "empty": np.empty((0, 3), np.float16),
        "long": np.zeros(2**18),
    }
    read = load(pickle.dumps(content, protocol))
    assert list(read["ordered"]) == ["b", "a"]
    assert read["frozen"] == {frozenset([1]): 1}
    assert isinstance(read["transposed"], np.ndarray)
    assert read["transposed"].dtype.newbyteorder("=") == np.float32  # NumPy may swap the bytes as it reads
    assert np.array_equal(read["transposed"], transposed)
    assert read["numbers"] == content["numbers"]
    assert [type(number) for number in read["numbers"]] == [np.float32, np.int64, np.bool_, np.complex128]
    assert read["twice"][0] is read["twice"][1] is not None
    assert read["scalar array"].shape == ()
    assert read["empty"].shape == (0, 3)
    assert np.array_equal(read["long"], content["long"])


def test_python_2_wrote_arrays_as_text() -> None:
    data = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
    data += b"(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    assert load(data).tolist() == [1, 2]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(InputError, match="directory"):
            restricted_load(missing)
    with pytest.raises(InputError, match="empty"):
        load(b"")


def test_objects_record_what_they_were_made_from() -> None:
    made = load(pickle.dumps(Call(print, "words", state={"a": 1})))
    assert isinstance(made, Inert)
    assert (made.class_name, made.arguments, made.state) == ("print", ("words",), {"a": 1})


# What runs nothing

SYSTEM = b"cos\nsystem\n"
TOUCH = b"X\x0c\x00\x00\x00touch MARKER"
GETATTR = b"cbuiltins\ngetattr\n(ccanary\nThing\nX\x04\x00\x00\x00calltR"
INERT: dict[str, bytes] = {
    "os.system": pickle.dumps(Call(os.system, "touch MARKER")),
    "eval": pickle.dumps(Call(eval, "open('MARKER', 'w')")),
    "protocol 0": b"cos\nsystem\n(S'touch MARKER'\ntR.",
    "a module that writes": b"ccanary\ncall\n)R.",
    "a result that is called": b"ccanary\ncall\n)R)R)R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x16ctypeslib.load_library\x93.",
    "INST": b"(S'touch MARKER'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch MARKER'\no.",
    "NEWOBJ": b"\x80\x02cbuiltins\nexec\n" + TOUCH + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93)}\x92.",
    "keywords": b"\x80\x04" + SYSTEM + b")}\x8c\x07command\x8c\x0ctouch MARKERs\x92.",
    "getattr": b"\x80\x02" + GETATTR + b")R.",
    "getattr as a class": b"\x80\x02" + GETATTR + b")\x81.",
    "getattr of a stand-in": b"\x80\x02cbuiltins\ngetattr\n(c_codecs\nencode\nX\x08\x00\x00\x00__code__tR.",
    "operator.methodcaller": b"\x80\x02coperator\nmethodcaller\n" + TOUCH + b"\x85R" + SYSTEM + b"\x85R.",
    "functools.partial": b"\x80\x02cfunctools\npartial\n(" + SYSTEM + TOUCH + b"tR)R.",
    "builtins.map": b"\x80\x02cbuiltins\nset\ncbuiltins\nmap\n(" + SYSTEM + b"](" + TOUCH + b"etR\x85.",
    "append": b"\x80\x02" + SYSTEM + b")R(" + TOUCH + b"e.",
    "add": b"\x80\x04" + SYSTEM + b")R(" + TOUCH + b"\x90.",
    "set item": b"\x80\x02" + SYSTEM + b")R" + TOUCH + b"Ns.",
    "state": b"\x80\x02" + SYSTEM + b")R}X\x0c\x00\x00\x00__setstate__" + SYSTEM + b"sb}b.",
    "slots": b"\x80\x02" + SYSTEM + b")RN}X\x09\x00\x00\x00__class__" + SYSTEM + b"s\x86b.",
    "reduce_ex of a subclass": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n("
    + SYSTEM
    + b"N"
    + TOUCH
    + b"\x85NtR.",
    "persistent source code": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}"
    b"(X\x0a\x00\x00\x00class_nameX\x01\x00\x00\x00aX\x0a\x00\x00\x00module_srcX\x12\x00\x00\x00"
    b"open('MARKER','w')u\x85R.",
    "torch.load": b"\x80\x02ctorch\nload\n" + TOUCH + b"\x85R.",
    "a rebuild function of torch": b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n)R.",
}
REFUSED: dict[str, bytes] = {
    "BUILD of a class": b"\x80\x02" + SYSTEM + b"}b.",
    "slots of a class": b"\x80\x02" + SYSTEM + b"N}X\x08\x00\x00\x00__init__" + SYSTEM + b"s\x86b.",
    "BUILD of a dict's class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    "BUILD of a function": b"\x80\x02c_codecs\nencode\n}X\x09\x00\x00\x00_function" + SYSTEM + b"sb.",
    "slots of a function": b"\x80\x02c_codecs\nencode\nN}X\x09\x00\x00\x00_function" + SYSTEM + b"s\x86b.",
    "item of a function": b"\x80\x02c_codecs\nencode\nNNs.",
    "append to a class": b"\x80\x02" + SYSTEM + b"Na.",
    "item of a class": b"\x80\x02" + SYSTEM + b"NNs.",
    "NEWOBJ of a function": b"\x80\x02c_codecs\nencode\n)\x81.",
    "BUILD of a list": b"\x80\x02]}K\x01Nsb.",
    "slots of a list": b"\x80\x02]N}X\x09\x00\x00\x00__class__" + SYSTEM + b"s\x86b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"P1\n.",
    "BINPERSID": b"\x80\x02K\x01Q.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05K\x01\x98.",
    "call of data": b"\x80\x02]K\x01\x85R.",
    "call without arguments": b"\x80\x02cnumpy\ndtype\nK\x01R.",
    "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "getattr of no text": b"\x80\x02cbuiltins\ngetattr\n(NNtR.",
    "rebuild by data": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(NN)NtR.",
    "bytes in another codec": pickle.dumps(Call(__import__("codecs").encode, "a", "rot13")),
    "array of objects": pickle.dumps(np.array([{}], dtype=object)),
    "array of text": pickle.dumps(np.array(["text"])),
    "array of records": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
    "scalar of text": pickle.dumps(np.str_("text")),
    "date": pickle.dumps(np.datetime64("2026-01-01")),
    "nested marks": b"(" * 100_000,
    "nested calls": b"\x80\x02" + b"ctorch.storage\n_load_from_bytes\n" * 2 + b"\x85R\x85R.",
    "bytes in place of a storage": b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x01a\x85R.",
    "no stop": b"\x80\x02N",
    "text": b"<!DOCTYPE html><html></html>",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "tar": b"storages".ljust(257, b"\0") + b"ustar" + bytes(2000),
    "pop of nothing": b"0.",
    "underneath a mark": b"]K\x01(a.",
    "missing memo": b"h\x05.",
    "odd items": b"\x80\x02}(K\x01u.",
    "items of a list": b"\x80\x02](K\x01K\x02u.",
    "elements of a number": b"\x80\x02K\x01(K\x02e.",
    "a set element that cannot be hashed": b"\x80\x04\x8f(]\x90.",
}


@pytest.fixture
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file appears, no module is imported, the module `canary` neither, and no stand-in changes."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary.py").write_text("open('MARKER', 'w').close()\ncall = Thing = print\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    modules, before = set(sys.modules), _stand_ins()
    yield
    assert not list((tmp_path / "work").iterdir())
    new = set(sys.modules) - modules
    assert not [name for name in new if not name.startswith("hypothesis.")]  # which imports parts when needed
    assert _stand_ins() == before


def _stand_ins() -> list[Any]:
    """The names of a file and all that their stand-ins consist of."""
    types = [Inert, Dict, Array, Function, *(x for x in STAND_INS.values() if isinstance(x, type))]
    functions = {name: x._function for name, x in STAND_INS.items() if isinstance(x, Function)}
    details = [vars(function).copy() for function in functions.values() if hasattr(function, "__dict__")]
    codes = [
        (x.__code__, x.__defaults__, x.__kwdefaults__) for x in functions.values() if hasattr(x, "__code__")
    ]
    return [dict(STAND_INS), functions, details, codes, *(dict(vars(x)) for x in types)]


def _check_is_data(content: Any) -> None:
    """All that can be reached consists of plain data and stand-ins."""
    plain = (str, bytes, bytearray, int, float, bool, type(None), np.generic, Array, Function)
    seen: dict[int, Any] = {}
    waiting = [content]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Inert):
            waiting += vars(thing).values()
        elif isinstance(thing, dict):
            assert type(thing) in (dict, Dict)
            waiting += [*thing, *thing.values()]
        elif type(thing) in (list, tuple, set, frozenset):
            waiting += thing
        else:
            classes = (Inert, Dict)
            assert isinstance(thing, plain) or (isinstance(thing, type) and issubclass(thing, classes))


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("data", INERT.values(), ids=INERT.keys())
def test_names_are_inert(data: bytes) -> None:
    _check_is_data(load(data))


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_foreign_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"file\.pkl: .+") as caught:
        load(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.usefixtures("_nothing_runs")
def test_the_extension_registry_gives_nothing_real() -> None:
    """Python's unpicklers keep objects of the registry and hand them out without asking find_class."""
    copyreg.add_extension("posix", "system", 200)  # type: ignore[no-untyped-call]
    try:
        for loads in (pickle.loads, load, pickle.loads):
            assert (loads(b"\x80\x02\x82\xc8.") is os.system) == (loads is pickle.loads)
        _check_is_data(load(b"\x80\x02\x82\xc8" + TOUCH + b"\x85R."))
    finally:
        copyreg.remove_extension("posix", "system", 200)  # type: ignore[no-untyped-call]


FOUR = storage_bytes(ones(4), zipped=False)
PIECES = [
    *(b"c" + "\n".join(name).encode() + b"\n" for name in STAND_INS),
    *(b"ccanary\ncall\n", b"cposix\nsystem\n", b"ctorch\nFloatStorage\n", GETATTR),
    *(b"N", b")", b"]", b"}", b"K\x01", TOUCH, b"X\x02\x00\x00\x00f4", b"X\x01\x00\x00\x00<", b"C\x04abcd"),
    *(b"X\x09\x00\x00\x00__class__", b"X\x0c\x00\x00\x00__setstate__", b"X\x0a\x00\x00\x00class_name"),
    *(body(np.zeros(2)), body(np.dtype("f4")), body(np.float32(1)), body({1, 2})),
    *(b"B" + struct.pack("<I", len(FOUR)) + FOUR, body((0, (4,), (1,), False, {}))),
    *(b"R", b"R", b"R", b"b", b"b", b"b", b"\x81", b"\x92", b"o", b"s", b"u", b"a", b"e", b"\x90"),
    *(
        b"\x85",
        b"\x85",
        b"\x86",
        b"\x87",
        b"(",
        b"(",
        b"t",
        b"l",
        b"d",
        b"2",
        b"0",
        b"\x94",
        b"h\x00",
        b"h\x01",
    ),
]


@pytest.mark.usefixtures("_nothing_runs")
def test_programs_of_any_kind() -> None:
    """Random programs of the operations above give data or an error."""

    @settings(max_examples=2000, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), max_size=14))
    def check(pieces: list[bytes]) -> None:
        with suppress(InputError):
            _check_is_data(load(b"\x80\x04" + b"".join(pieces) + b"."))

    check()


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(STAND_INS)),
    st.lists(PLAIN | st.just(np.dtype("f4")) | st.just(np.zeros(2)), max_size=6),
    st.none() | st.just(()) | st.tuples(PLAIN, PLAIN, PLAIN, PLAIN, PLAIN) | PLAIN,
)
def test_arguments_of_any_kind(name: tuple[str, str], arguments: list[Any], state: Any) -> None:
    """A stand-in takes its arguments and state, or the pickle is refused; nothing else may happen."""
    call = b"\x80\x02c" + "\n".join(name).encode() + b"\n" + body(tuple(arguments)) + b"R"
    for data in (call + b".", call + body(state) + b"b."):
        with suppress(InputError):
            _check_is_data(load(data))


# Damage


def test_truncation_anywhere() -> None:
    whole = pickle.dumps({"mu": np.arange(4.0), "n": 3, "words": ["a", "b"], "o": OrderedDict(a=1)})
    load(whole)
    for length in range(len(whole)):
        with pytest.raises(InputError):
            load(whole[:length])


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
        with pytest.raises(InputError, match="array"):
            load(pickle.dumps(array))


ABSURD = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"abc.",
    "endless bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"abc.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"abc.",
    "byte array": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"abc.",
    "integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "decimal": b"I" + b"9" * 100_000 + b"\n.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo in text": b"Np1000000000000\n.",
    "nested storages": b"\x80\x02" + b"B" + struct.pack("<I", 2**31) + b"abc.",
}


def test_absurd_sizes_are_one_line(tmp_path: Path) -> None:
    """In a process that may take two gigabytes. A large index in the memo takes no memory: see _Unpickler."""
    for name, data in ABSURD.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    program = """
import resource, sys
from pathlib import Path
from tvmatch.errors import InputError
from tvmatch.safe_pickle.unpickler import restricted_load
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**31
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        print(f"{path}: loaded {restricted_load(path)}")
    except InputError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(ABSURD)
    loaded = {Path(line.partition(":")[0]).stem for line in lines if line.endswith("loaded None")}
    assert loaded == {"memo", "memo in text"}
