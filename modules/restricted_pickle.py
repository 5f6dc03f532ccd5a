"""Pickles of plain data and numpy arrays, read without running what they say."""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from microtune.modules.user_error import UserError

LIMIT = 2**29  # bytes of a file; the largest one that is read so, CIFAR-100's training images, has 155 MB
DEEPEST = 100  # containers in containers, lest Python's own recursion end
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
KEYS = (str, int, float, bool, type(None))
UNFILLED = np.dtype("V0")  # of an array whose values follow
# opcodes that plain data does not need: they make objects, sets, and what an application has registered
REFUSED = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "EMPTY_SET", "FROZENSET", "ADDITEMS"}
REFUSED |= {"DUP", "NEXT_BUFFER", "READONLY_BUFFER"}


def read_plain_pickle(
    path: str | Path,
    kind: str = "a pickle of plain data",
    remedy: str = "save it again with dicts, lists, tuples, numbers, text and numpy arrays only",
    dtypes: Collection[str] = DTYPES,
) -> Any:
    """Reads a pickle of dicts, lists, tuples, numbers, text and numpy arrays, and runs nothing that the file names.

    Args:
        path: A pickle of any protocol, of Python 2 too, or the zip file that ``torch.save`` makes of one.
        kind: What it should be, for the message of an error: ``"{path} is not {kind} (why): {remedy}"``.
        remedy: What to do if it is not.
        dtypes: Of the arrays and scalars that are admitted, in numpy's codes such as ``"u1"``.

    Returns:
        What was pickled; arrays are copies of their own, C-contiguous.

    Raises:
        UserError: The file is missing, is no pickle, holds or names anything else, or is larger than 512 MiB.

    Example::

        read_plain_pickle("data/cifar-10-batches-py/batches.meta")["label_names"]
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    try:
        file = io.BytesIO(_read_pickled(path))
        value = _PlainUnpickler(file, encoding="latin1").load()
        if rest := file.read():
            raise pickle.UnpicklingError(f"{len(rest)} bytes follow its end")
        _check_plain(value, dtypes, set(), DEEPEST)
        return value
    # what is no pickle fails with almost any exception
    except Exception as error:
        why = f"{type(error).__name__}: {str(error) or 'it is cut off'}"[:200]
        why = "".join(character if character.isprintable() else "?" for character in why)
        raise UserError(f"{path} is not {kind} ({why}): {remedy}") from error


def _read_pickled(path: Path) -> bytes:
    if path.stat().st_size > LIMIT:
        raise pickle.UnpicklingError(f"it has more than {LIMIT} bytes")
    content = path.read_bytes()
    # no pickle of plain data begins so: P is the opcode of an object outside the file
    return _read_member(content) if content.startswith(b"PK\x03\x04") else content


def _read_member(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [info for info in archive.infolist() if info.filename.split("/")[-1] == "data.pkl"]
        if len(members) != 1:
            raise pickle.UnpicklingError(f"it is a zip file of {len(members)} data.pkl, and torch.save writes one")
        # torch.save does not compress, so that no member can be larger than the file
        if members[0].compress_type != zipfile.ZIP_STORED or members[0].file_size != members[0].compress_size:
            raise pickle.UnpicklingError("its data.pkl is compressed, which torch.save does not do")
        return archive.read(members[0])


class _Opcodes(dict):
    """The method of each opcode by its code; of one that is not there it says so in words."""

    def __missing__(self, code: int) -> Any:
        names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        raise pickle.UnpicklingError(f"it uses {names.get(code, bytes([code]))}, which plain data does not need")


class _PlainUnpickler(pickle._Unpickler):
    """Python's unpickler with the opcodes of plain data, which finds only the functions below, none of numpy's own.

    It is the one in Python, whose methods can be overridden, as joblib and pandas do. The one in C ends the whole
    program on a key that is a tuple 300,000 deep, hangs on one that holds a tuple 2**60 times, claims 32 GiB for an
    object numbered 2**31, and lets a file set the state of numpy's types, which reads beyond an array's memory.
    """

    dispatch = _Opcodes(
        (ord(opcode.code), pickle._Unpickler.dispatch[ord(opcode.code)])
        for opcode in pickletools.opcodes
        if opcode.name not in REFUSED and opcode.proto <= 5
    )

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module.replace('numpy._core.', 'numpy.core.')}.{name}"  # numpy 2 renamed it
        if full_name not in FOUND:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return FOUND[full_name]

    def persistent_load(self, _: object) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the pickle, such as torch's tensors")

    def load_frame(self) -> None:
        self.read(8)  # the size of what is to be read ahead, and all is in memory

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"it sets {len(items)} keys and values of {_described(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEYS:
                raise pickle.UnpicklingError(f"a key is {_described(key)}, which is not a number or text")
            target[key] = value

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is tuple and type(target) is np.ndarray:
            _fill(target, *state)
        elif type(state) is tuple and isinstance(target, np.dtype):
            _check_state(target, *state)
        else:
            raise pickle.UnpicklingError(f"it sets the state of {_described(target)}")

    dispatch |= {pickle.FRAME[0]: load_frame, pickle.DICT[0]: load_dict, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    # as bytes, since Python's own claims the memory that the file says it needs
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]


def _check_plain(value: Any, dtypes: Collection[str], checked: set[int], deepest: int) -> None:
    """Raises unless all is plain data; what is checked is not checked again, as a pickle can refer to it often."""
    if type(value) in KEYS or id(value) in checked:
        return
    if deepest == 0:
        raise pickle.UnpicklingError(f"it is nested more than {DEEPEST} deep, or contains itself")
    if isinstance(value, np.ndarray | np.generic):
        _check_dtype(_code(value.dtype), dtypes)
    elif type(value) in (dict, list, tuple):
        for item in value.values() if type(value) is dict else value:
            _check_plain(item, dtypes, checked, deepest - 1)
    else:
        raise pickle.UnpicklingError(f"it holds {_described(value)}, which is not plain data")
    checked.add(id(value))


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray | np.dtype):
        return "an array" if type(value) is np.ndarray else "a numpy.dtype"
    return f"a {type(value).__name__}"


def _code(dtype: np.dtype) -> str:
    return dtype.str[1:]


def _check_dtype(code: Any, dtypes: Collection[str]) -> None:
    if type(code) is not str or code not in dtypes:
        code = code if type(code) is str else _described(code)  # the text of a hostile list can be endless
        raise pickle.UnpicklingError(f"it holds an array of type {code}, not {' or '.join(dtypes)}")


def _dtype(code: Any, *_: object) -> np.dtype:
    """As numpy's, of numbers."""
    _check_dtype(code, DTYPES)
    return np.dtype(f"<{code}")


def _check_state(dtype: np.dtype, _: object, byte_order: Any, *record: object) -> None:
    """In place of setting the state of a type, which is the same for the whole program."""
    if byte_order not in ("<", "|") or record[:3] != (None, None, None):
        raise pickle.UnpicklingError(f"it holds an array of {_code(dtype)} which are not plain little-endian numbers")


def _unfilled(*_: object) -> np.ndarray:
    """As ``_reconstruct``, which makes an array whose shape and values follow."""
    return np.empty((), UNFILLED)


def _fill(target: np.ndarray, _: object, shape: Any, dtype: Any, columns_first: Any, values: Any) -> None:
    if target.dtype != UNFILLED:
        raise pickle.UnpicklingError("it fills an array twice")
    array = _array(values, dtype, shape, "F" if columns_first else "C")
    target.__setstate__((1, shape, dtype, False, array.tobytes()))


def _array(values: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    values = values.encode("latin1") if isinstance(values, str) else values  # a str if written by Python 2
    if type(values) is not bytes or not isinstance(dtype, np.dtype) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array is not made of bytes, their type and their order")
    # numpy has at most 64 dimensions
    if type(shape) is not tuple or len(shape) > 64 or not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError("the shape of an array is not a tuple of sizes")
    wanted = math.prod(shape) * dtype.itemsize
    if len(values) != wanted:
        raise pickle.UnpicklingError(f"an array of {_code(dtype)} has {len(values)} bytes, and its shape {wanted}")
    flat = np.frombuffer(values, dtype)
    if _code(dtype) == "b1" and flat.view("u1").max(initial=0) > 1:
        raise pickle.UnpicklingError("an array of b1 has bytes other than 0 and 1")
    return flat.reshape(shape, order=order)


def _from_buffer(values: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """As ``_frombuffer``, which carries contiguous arrays in pickles of protocol 5."""
    if order == "K":
        return _array(values, dtype, shape, "C").transpose(axes).copy()
    return _array(values, dtype, shape, order).copy()


def _scalar(dtype: Any, values: Any) -> np.generic:
    return _array(values, dtype, (), "C")[()]


def _encoded(text: str, encoding: str) -> bytes:
    """As ``_codecs.encode``, which carries bytes in pickles of protocol 2 that Python 3 wrote."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text otherwise than as latin1")
    return text.encode("latin1")


FOUND = {
    "numpy.core.multiarray._reconstruct": _unfilled,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _unfilled,  # only an argument of _reconstruct
    "_codecs.encode": _encoded,
    "__builtin__.bytes": lambda: b"",  # which stands for b"" in pickles of protocol 2
    "builtins.bytes": lambda: b"",
}
