"""Pickles of plain data and numpy arrays, read without running what they say."""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from microtune.modules.user_error import UserError

LIMIT = 2**29  # bytes of a file; the largest one that is read so, CIFAR-100's training images, has 155 MB
DEEPEST = 100  # containers in containers, lest Python's own recursion end
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# pickle's opcodes for what is not in the file: persistent objects, registered classes, buffers handed over beside it
OUTSIDE = ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER")
SETS = ("EMPTY_SET", "ADDITEMS", "FROZENSET")


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
        pickled = _read_pickled(path)
        _check_opcodes(pickled)
        _check_keys(pickled)
        return _plain(_PlainUnpickler(io.BytesIO(pickled), encoding="latin1").load(), dtypes, {}, DEEPEST)
    # A file that is no pickle makes the unpickler fail with almost any exception.
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:200]
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


def _check_opcodes(pickled: bytes) -> None:
    """Refuses what lies outside the pickle, and what could cost memory before the unpickler fails."""
    end = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(pickled)):
        if opcode.name in OUTSIDE:
            raise pickle.UnpicklingError("it refers to objects outside the pickle, such as torch's tensors")
        if opcode.name in SETS:
            raise pickle.UnpicklingError("it holds a set, which is not plain data")
        # the unpickler makes room for as many objects as the largest index, which pickle counts up from 0
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"it numbers an object {argument} after {count} steps")
        end = position + 1
    if end < len(pickled):
        raise pickle.UnpicklingError(f"{len(pickled) - end} bytes follow its end")


def _check_keys(pickled: bytes) -> None:
    """Refuses a tuple as a key before the unpickler hashes it: a deep one ends Python, of a shared one there is no end.

    It follows the unpickler's stack as pickletools describes it, of which it keeps what is a tuple.
    """
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name, after = opcode.name, opcode.stack_after
        items = []
        if name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif pickletools.markobject in opcode.stack_before:
            begin = marks.pop()
            items, stack[begin:] = stack[begin:], []
            del stack[len(stack) - opcode.stack_before.index(pickletools.markobject) :]
        elif opcode.stack_before:
            count = len(opcode.stack_before)
            items, stack[-count:] = stack[-count:], []
        keys = items[1:2] if name == "SETITEM" else items[::2] if name in ("SETITEMS", "DICT") else []
        if True in keys:
            raise pickle.UnpicklingError("a key is a tuple, which is not a number or text")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("MEMOIZE", "DUP"):
            stack.extend(items * len(after))
        else:
            stack.extend(kind is pickletools.pytuple for kind in after)
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]


def _plain(value: Any, dtypes: Collection[str], known: dict[int, tuple[Any, Any]], deepest: int) -> Any:
    """The value with arrays in place of their stand-ins.

    ``known`` keeps, by identity, what was met before and what became of it: a few bytes of a pickle can refer to the
    same list billions of times.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if id(value) in known:
        if known[id(value)][1] is known:
            raise pickle.UnpicklingError("it contains itself")
        return known[id(value)][1]
    if deepest == 0:
        raise pickle.UnpicklingError(f"it is nested more than {DEEPEST} deep")
    known[id(value)] = (value, known)  # not finished
    result = value
    if type(value) is dict:
        for key, item in value.items():
            if key is not None and type(key) not in (str, int, float, bool):
                raise pickle.UnpicklingError(f"a key is {_described(key)}, which is not a number or text")
            value[key] = _plain(item, dtypes, known, deepest - 1)
    elif type(value) is list:
        value[:] = [_plain(item, dtypes, known, deepest - 1) for item in value]
    elif type(value) is tuple:
        result = tuple(_plain(item, dtypes, known, deepest - 1) for item in value)
    elif type(value) is _Array and value.values is not None:
        _check_dtype(value.values.dtype.str[1:], dtypes)
        result = value.values
    else:
        what = "an array without values" if type(value) is _Array else f"{_described(value)}, which is not plain data"
        raise pickle.UnpicklingError(f"it holds {what}")
    known[id(value)] = (value, result)
    return result


def _described(value: Any) -> str:
    names = {_Array: "an array", _Dtype: "a numpy.dtype", _Function: "a function of numpy"}
    return names.get(type(value), f"a {type(value).__name__}")


def _check_dtype(code: Any, dtypes: Collection[str]) -> None:
    if type(code) is not str or code not in dtypes:
        code = code if type(code) is str else _described(code)  # the text of a hostile list can be endless
        raise pickle.UnpicklingError(f"it holds an array of type {code}, not {' or '.join(dtypes)}")


class _Dtype:
    """Takes the place of numpy's dtype, and admits numbers."""

    __slots__ = ("code",)

    def __init__(self, code: str, *_: object) -> None:
        _check_dtype(code, DTYPES)
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        # byte order, and what only arrays of records have
        if state[1] not in ("<", "|") or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError(f"it holds an array of {self.code} which are not plain little-endian numbers")


class _Array:
    """Takes the place of a numpy array or scalar. numpy's own ``__setstate__`` would trust the types in the file."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray | np.generic | None = None) -> None:
        self.values = values

    def __setstate__(self, state: tuple) -> None:
        if self.values is not None:
            raise pickle.UnpicklingError("it fills an array twice")
        _, shape, dtype, columns_first, values = state
        self.values = _array(values, dtype, shape, "F" if columns_first else "C")


class _Function:
    """Takes the place of a function. A pickle can set the state of anything, and a function of Python has some."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable | None) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> Any:
        if self._function is None:
            raise pickle.UnpicklingError("it makes a numpy.ndarray of its own")
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


def _array(values: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    values = values.encode("latin1") if isinstance(values, str) else values  # a str if written by Python 2
    if type(values) not in (bytes, bytearray) or type(dtype) is not _Dtype or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array is not made of bytes, their type and their order")
    # numpy has at most 64 dimensions
    if type(shape) is not tuple or len(shape) > 64 or not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError("the shape of an array is not a tuple of sizes")
    wanted = math.prod(shape) * int(dtype.code[1:])
    if len(values) != wanted:
        raise pickle.UnpicklingError(f"an array of {dtype.code} has {len(values)} bytes, and its shape {wanted}")
    flat = np.frombuffer(values, f"<{dtype.code}")
    if dtype.code == "b1" and flat.view("u1").max(initial=0) > 1:
        raise pickle.UnpicklingError("an array of b1 has bytes other than 0 and 1")
    return flat.reshape(shape, order=order).copy()


def _from_buffer(values: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """As numpy's function, which carries contiguous arrays in pickles of protocol 5."""
    if order == "K":
        return _Array(_array(values, dtype, shape, "C").transpose(axes).copy())
    return _Array(_array(values, dtype, shape, order))


def _scalar(dtype: Any, values: Any) -> _Array:
    return _Array(_array(values, dtype, (), "C")[()])


def _encoded(text: str, encoding: str) -> bytes:
    """As ``_codecs.encode``, which carries bytes in pickles of protocol 2 that Python 3 wrote."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text otherwise than as latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """As ``bytes``, which stands for ``b""`` in pickles of protocol 2."""
    return b""


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Function(lambda *_: _Array()),
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Function(_from_buffer),
    ("numpy", "ndarray"): _Function(None),  # an argument of _reconstruct, which is not called itself
    ("numpy", "dtype"): _Function(_Dtype),
    ("_codecs", "encode"): _Function(_encoded),
    ("__builtin__", "bytes"): _Function(_no_bytes),
    ("builtins", "bytes"): _Function(_no_bytes),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module.replace("numpy._core.", "numpy.core."), name]  # numpy 2 renamed it
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data") from None
