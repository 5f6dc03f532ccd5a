"""Promises about pickles: plain data and arrays come back as they were, and nothing that a file names is run."""

import builtins
import contextlib
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from microtune.modules import restricted_pickle
from microtune.modules.restricted_pickle import read_plain_pickle
from microtune.modules.user_error import UserError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
numbers = arrays_of.boolean_dtypes() | st.sampled_from([f"<{code}" for code in restricted_pickle.DTYPES]).map(np.dtype)
arrays = arrays_of.arrays(numbers, arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
scalars = arrays_of.arrays(numbers, ()).map(lambda array: array[()])
keys = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
plain = st.recursive(
    keys | st.floats() | arrays | scalars,
    lambda items: st.lists(items) | st.lists(items).map(tuple) | st.dictionaries(keys, items),
    max_leaves=8,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.pkl"


def reading(file, content, **arguments):
    file.write_bytes(content)
    return read_plain_pickle(file, **arguments)


def assert_same(read, written):
    assert type(read) is type(written)
    if isinstance(written, dict):
        # one by one: the order is kept, and 0.0 does not become False
        assert [(type(key), key) for key in read] == [(type(key), key) for key in written]
        for key in written:
            assert_same(read[key], written[key])
    elif isinstance(written, list | tuple):
        assert len(read) == len(written)
        for items in zip(read, written, strict=True):
            assert_same(*items)
    elif isinstance(written, np.ndarray | np.generic):
        assert (read.dtype, read.shape, read.tobytes()) == (written.dtype, written.shape, written.tobytes())
    else:
        assert repr(read) == repr(written)  # so that nan is nan


@settings(deadline=None)
@given(plain, st.sampled_from(PROTOCOLS), st.booleans())
def test_plain_data_comes_back_as_it_was(tmp_path_factory, value, protocol, in_zip):
    file = tmp_path_factory.getbasetemp() / "plain.pkl"
    if in_zip:
        torch.save(value, file, pickle_protocol=max(protocol, 1))  # torch's own writer needs 1
    else:
        file.write_bytes(pickle.dumps(value, protocol))
    assert_same(read_plain_pickle(file), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_layout_are_copies_of_their_own(file, protocol):
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    for layout in (array, np.asfortranarray(array), array.transpose(1, 0, 2), array[:, ::2], array[:0]):
        read = reading(file, pickle.dumps([layout], protocol))[0]
        assert np.array_equal(read, layout)
        assert read.flags.owndata
        assert read.flags.writeable
        assert read.flags.c_contiguous


def test_pickles_of_older_numpy_are_read(file):
    content = pickle.dumps(np.arange(3, dtype=np.uint8), 2)
    assert content.count(b"numpy._core.") == 1
    read = reading(file, content.replace(b"numpy._core.", b"numpy.core."))
    assert read.tolist() == [0, 1, 2]


def test_text_of_python_2_is_read(file):
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xe9\x00tb"
    )
    read = reading(file, b"\x80\x02}(U\x04dataU\x02\xe9tU\x05array" + array + b"u.")
    assert read["data"] == "ét"
    assert read["array"].tolist() == [0xE9, 0]


def test_what_is_shared_stays_shared(file):
    array, shared = np.arange(3), [1]
    read = reading(file, pickle.dumps({"first": (array, shared), "second": [array, shared]}))
    assert read["first"][0] is read["second"][0]
    assert read["first"][1] is read["second"][1]


def test_the_published_network_is_read(shared_data):
    path = shared_data / "weights/mbv2-w0.35.pkl"
    assert_same(read_plain_pickle(path), torch.load(path, weights_only=False))


def test_only_the_types_asked_for_are_admitted(file):
    content = pickle.dumps({"data": np.zeros(3, np.uint8), "number": np.float32(1)})
    assert reading(file, content, dtypes=("u1", "f4"))["number"] == 1
    with pytest.raises(UserError, match="it holds an array of type f4, not u1"):
        reading(file, content, dtypes=("u1",))
    with pytest.raises(UserError, match="it holds an array of type u1, not i1 or f4"):
        reading(file, content, dtypes=("i1", "f4"))


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


def calls_that_make(path):
    """Calls that would leave a file there, and by what name the refusal tells them."""
    return {
        r"(posix|nt)\.system": Calls(os.system, f"touch {path}"),
        r"\w+\.eval": Calls(builtins.eval, f"open({str(path)!r}, 'w')"),
        r"\w+\.exec": Calls(builtins.exec, f"open({str(path)!r}, 'w')"),
        r"(subprocess|commands)\.Popen": Calls(subprocess.Popen, ["touch", str(path)]),
        r"_?io\.open": Calls(io.open, str(path), "w"),
        r"\w+\.getattr": Calls(getattr, Calls(builtins.__import__, "os"), "system"),
        r"numpy\.load": Calls(np.load, str(path), None, True),
        r"\w+\.reduce": Calls(functools.reduce, os.system, [f"touch {path}"]),
        r"operator\.attrgetter": Calls(operator.attrgetter, "system"),
        r"collections\.OrderedDict": Calls(OrderedDict, [("a", Calls(os.system, f"touch {path}"))]),
    }


@pytest.mark.parametrize("name", calls_that_make(Path()))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("in_zip", [False, True], ids=["plain", "zip"])
def test_a_hostile_pickle_runs_nothing_and_is_told_by_name(file, tmp_path, name, protocol, in_zip):
    content = pickle.dumps({"blocks": [calls_that_make(tmp_path / "made")[name]]}, protocol)
    if in_zip:
        content = zipped({"archive/data.pkl": content})
    pattern = (
        rf"file\.pkl is not a pickle of plain data \(UnpicklingError: it asks for {name}, which is not plain data\)"
    )
    with pytest.raises(UserError, match=pattern):
        reading(file, content)
    assert list(tmp_path.iterdir()) == [file]


def test_the_hostile_calls_would_run(tmp_path):
    # lest the test above pass with calls that do nothing
    path = tmp_path / "made"
    for name in (r"(posix|nt)\.system", r"\w+\.eval", r"_?io\.open"):
        pickle.loads(pickle.dumps(calls_that_make(path)[name]))
        path.unlink()


def zipped(members, compression=zipfile.ZIP_STORED):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as file:
        for name, content in members.items():
            # of 1980, so that a test has the same name in every process
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return archive.getvalue()


INT4 = b"cnumpy\ndtype\nX\x02\x00\x00\x00i4\x85R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R"
BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"
SHAPE_4 = b"K\x04\x85"


def filled(shape=b"K\x01\x85", dtype=INT4, order=b"\x89", values=b"C\x04abcd"):
    return ARRAY + b"(K\x01" + shape + dtype + order + values + b"tb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # numpy's types and shapes are not believed
        (pickle.dumps(np.array([print], dtype=object)), "it holds an array of type O8, not b1 or i1 or"),
        (pickle.dumps(np.zeros(2, "i4,f4")), "it holds an array of type V8, not b1"),
        (pickle.dumps(np.zeros(2, "c8")), "it holds an array of type c8, not"),
        (pickle.dumps(np.zeros(2, "U3")), "it holds an array of type U3, not"),
        (pickle.dumps(np.zeros(2, "M8[s]")), "it holds an array of type M8, not"),
        (pickle.dumps(np.zeros(2, ">f4")), "it holds an array of f4 which are not plain little-endian numbers"),
        (pickle.dumps(np.dtype("f4")), "it holds a numpy.dtype, which is not plain data"),
        (pickle.dumps(np.ma.array([1])), "it asks for numpy.ma"),
        (filled(shape=b"J\xff\xff\xff\x7f\x85") + b".", "an array of i4 has 4 bytes, and its shape 8589934588"),
        (filled(shape=b"K\x00\x85") + b".", "an array of i4 has 4 bytes, and its shape 0"),
        (filled(shape=b"J\xff\xff\xff\xff\x85") + b".", "the shape of an array is not a tuple of sizes"),
        (filled(shape=b"K\x01\x88\x86") + b".", "the shape of an array is not a tuple of sizes"),
        (filled(shape=b"K\x01") + b".", "the shape of an array is not a tuple of sizes"),
        (filled(shape=b"(" + b"K\x01" * 65 + b"t") + b".", "the shape of an array is not a tuple of sizes"),
        (filled(values=b"]K\x01a") + b".", "an array is not made of bytes, their type and their order"),
        (filled(dtype=b"X\x02\x00\x00\x00i4") + b".", "an array is not made of bytes, their type and their order"),
        (filled(dtype=b"cnumpy\ndtype\n]\x85R") + b".", "it holds an array of type a list, not b1"),
        (filled(dtype=INT4.replace(b"i4", b"b1"), values=b"C\x01\x02") + b".", "an array of b1 has bytes other than 0"),
        (BUFFER + b"(C\x04abcd" + INT4 + SHAPE_4 + b"X\x01\x00\x00\x00KtR.", "has 4 bytes, and its shape 16"),
        (
            BUFFER + b"(C\x04abcd" + INT4 + b"K\x01\x85X\x01\x00\x00\x00AtR.",
            "an array is not made of bytes, their type",
        ),
        (ARRAY + b".", "it holds an array of type V0, not b1"),
        # what stands in for numpy cannot be changed, refilled or called otherwise
        (filled() + b"(K\x01K\x01\x85" + INT4 + b"\x89C\x04abcdtb.", "it fills an array twice"),
        (b"c_codecs\nencode\n}X\x0c\x00\x00\x00__defaults__K\x01\x85sb.", "it sets the state of a function"),
        (b"cnumpy\nndarray\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.", "it sets the state of a function"),
        (ARRAY + b"}X\x06\x00\x00\x00valuesK\x01sb.", "it sets the state of an array"),
        (ARRAY + b"Nb.", "it sets the state of an array"),
        (ARRAY + b")b.", "_fill.* missing 5 required positional arguments"),
        (b"}}X\x09\x00\x00\x00__class__K\x01sb.", "it sets the state of a dict"),
        (b"cnumpy\nndarray\nK\x01\x85R.", "it holds an array of type V0, not b1"),
        (b"cnumpy\ndtype\n]X\x02\x00\x00\x00i4aR.", "it holds a numpy.dtype, which is not plain data"),
        (b"X\x06\x00\x00\x00systemX\x04\x00\x00\x00echo\x85R.", "TypeError: 'str' object is not callable"),
        (ARRAY + b")R.", "TypeError: 'numpy.ndarray' object is not callable"),
        (b"cnumpy\nndarray\n)\x81.", "it uses NEWOBJ, which plain data does not need"),
        (b"cnumpy\nndarray\n.", "it holds a function, which is not plain data"),
        (
            b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
            "it encodes text otherwise than as latin1",
        ),
        (b"c_codecs\nencode\n]X\x06\x00\x00\x00latin1\x86R.", "it encodes text otherwise than as latin1"),
        (b"cbuiltins\nbytes\nJ\x00\x00\x00\x7f\x85R.", "TypeError: <lambda>.. takes 0 positional arguments but 1"),
        (b"\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "it asks for numpy.dtype.__init__, which is not plain data"),
        (b"\x8c\x17hostile_place.LIMIT\x1b[2J\x8c\x01a\x93.", r"it asks for hostile_place.LIMIT\?\[2J.a, which is not"),
        (b"]\x8c\x06system\x93.", "UnpicklingError: STACK_GLOBAL requires str"),
        (b"(ios\nsystem\n.", "it uses INST, which plain data does not need"),
        (b"(cnumpy\ndtype\no.", "it uses OBJ, which plain data does not need"),
        (b"]2aa.", "it uses DUP, which plain data does not need"),
        (b"\x8f(NK\x01\x90.", "it uses EMPTY_SET, which plain data does not need"),
        (b"\x82\x01.", "it uses EXT1, which plain data does not need"),
        (b"\x97.", "it uses NEXT_BUFFER, which plain data does not need"),
        (b"NQ.", "it refers to objects outside the pickle, such as torch's tensors"),
        (b"Pname\n.", "it refers to objects outside the pickle, such as torch's tensors"),
        # other data
        (pickle.dumps({1, 2}), "it uses EMPTY_SET, which plain data does not need"),
        (pickle.dumps({1, 2}, 2), "it asks for __builtin__.set, which is not plain data"),
        (pickle.dumps(b"bytes"), "it holds a bytes, which is not plain data"),
        (pickle.dumps(bytearray(b"bytes")), "it asks for builtins.bytearray, which is not plain data"),
        (pickle.dumps(bytearray(b"bytes"), 5), "it holds a bytes, which is not plain data"),
        (pickle.dumps(1j), "it asks for builtins.complex"),
        (pickle.dumps({(1, 2): 3}), "a key is a tuple, which is not a number or text"),
        (b"}" + filled() + b"K\x01s.", "a key is an array, which is not a number or text"),
        (pickle.dumps(torch.zeros(2)), "it asks for torch._utils._rebuild_tensor_v2, which is not plain data"),
        # what costs memory or time, or ends Python: the hash of a tuple that is deep, or that holds one tuple often
        (b"})" + b"\x85" * 300_000 + b"Ns.", "a key is a tuple, which is not a number or text"),
        (b"}()" + b"\x85" * 60 + b"Nu.", "a key is a tuple, which is not a number or text"),
        (b"()" + b"\x85" * 60 + b"Nd.", "a key is a tuple, which is not a number or text"),
        (b")" + b"q\x00h\x00\x86" * 60 + b"q\x000}h\x00Ns.", "a key is a tuple, which is not a number or text"),
        (b"]q\x00h\x00a.", "it is nested more than 100 deep, or contains itself"),
        (b"]" * 102 + b"a" * 101 + b".", "it is nested more than 100 deep"),
        (b"]" * 50_000 + b"a" * 49_999 + b".", "it is nested more than 100 deep"),
        (
            b"\x8e" + struct.pack("<Q", 2**40) + b"a.",
            "EOFError: it is cut off",
        ),
        # steps that do not fit together
        (b"NNa.", "AttributeError: 'NoneType' object has no attribute 'append'"),
        (b")(u.", "it sets 0 keys and values of a tuple"),
        (b"}(Nu.", "it sets 1 keys and values of a dict"),
        (b"](\x85.", "IndexError: list index out of range"),
        (b"t.", "IndexError: pop from empty list"),
        (b"h\x07.", "UnpicklingError: Memo value not found at index 7"),
        (b".", "IndexError: pop from empty list"),
        # no pickles
        (b"", "EOFError: it is cut off"),
        (b"<html>not found</html>", "it uses b'<', which plain data does not need"),
        (b"\xff" * 100, r"it uses b'.xff', which plain data does not need"),
        (pickle.dumps(np.arange(100))[:300], "EOFError: it is cut off"),
        (pickle.dumps([1]) + b"more", "UnpicklingError: 4 bytes follow its end"),
        # zip files
        (zipped({"archive/data.pkl": b"N."})[:60], "BadZipFile: File is not a zip file"),
        (zipped({"archive/other": b"N."}), "it is a zip file of 0 data.pkl, and torch.save writes one"),
        (
            zipped({"a/data.pkl": b"N.", "b/data.pkl": b"N."}),
            "it is a zip file of 2 data.pkl, and torch.save writes one",
        ),
        (
            zipped({"data.pkl": b"N." * 9}, zipfile.ZIP_DEFLATED),
            "its data.pkl is compressed, which torch.save does not",
        ),
        (zipped({"data.pkl": b"N."}).replace(b"N.", b"K."), "BadZipFile: Bad CRC-32 for file 'data.pkl'"),
    ],
)
def test_what_is_no_plain_data_is_refused(file, content, message):
    with pytest.raises(UserError, match=rf"^\S*file\.pkl is not a pickle of plain data \(.*({message}).*\): save it"):
        reading(file, content)


WHOLE = pickle.dumps({"a": [np.arange(3), (np.float32(1), 2.5, None)], "b": np.ones((2, 2), bool)}, 2)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=2)), min_size=1, max_size=3),
    st.integers(1, len(WHOLE)),
)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, damages, length):
    content = bytearray(WHOLE)
    for position, put in damages:
        content[position : position + 1] = put
    with contextlib.suppress(UserError):
        reading(tmp_path_factory.getbasetemp() / "damaged.pkl", bytes(content[:length]))


@pytest.mark.parametrize(
    "content", [b"]r\xff\xff\xff\x7f.", b"]p999999999999\n.", b"\x80\x04\x95" + b"\xff" * 7 + b"\0]."]
)
def test_large_numbers_that_claim_memory_are_harmless(file, content):
    assert reading(file, content) == []


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d"], ids=["BINBYTES8", "BYTEARRAY8", "BINUNICODE8"])
def test_what_a_file_says_it_needs_is_not_claimed(file, opcode):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="it is cut off"):
            reading(file, opcode + struct.pack("<Q", 2**28) + b"few")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_mark_may_be_dropped(file):
    assert reading(file, b"](N1K\x01a.") == [1]
    assert reading(file, b"]N0K\x01a.") == [1]


def test_a_list_that_is_met_a_billion_times_is_read_once(file):
    layers = b"]q\x00" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(60))
    read = reading(file, layers + b".")
    assert read[0] is read[1]


def test_tensors_are_refused(file):
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"it asks for torch\._utils\._rebuild_tensor_v2, .* numpy arrays only"):
        read_plain_pickle(file)


def test_a_file_that_is_too_large_is_not_read(file, monkeypatch):
    content = pickle.dumps([0] * 100)
    monkeypatch.setattr(restricted_pickle, "LIMIT", len(content))
    assert reading(file, content) == [0] * 100
    with pytest.raises(UserError, match=f"it has more than {len(content)} bytes"):
        reading(file, content + b" ")


def test_kind_and_remedy_are_told(file):
    told = {"kind": "a CIFAR file", "remedy": "fetch it again"}
    with pytest.raises(UserError, match=r"file\.pkl is missing: fetch it again$"):
        read_plain_pickle(file, **told)
    with pytest.raises(
        UserError, match=r"file\.pkl is not a CIFAR file \(UnpicklingError: 1 bytes .*: fetch it again$"
    ):
        reading(file, b"N..", **told)
