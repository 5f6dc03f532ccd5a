"""Pickles of plain data and numpy arrays, read without running what they say."""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microtune.modules.user_error import UserError

LIMIT = 2**29  # bytes of a file; the largest one that is read so, CIFAR-100's training images, has 155 MB
DEEPEST = 100  # containers in containers, lest Python's own recursion end
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# opcodes that put their own argument on the stack: numbers, text and bytes
VALUES = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.stack_after and opcode.stack_after[0] is not pickletools.anyobject
}
# those that take from the stack: all above the last mark, or so many
TO_MARK = ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "POP_MARK")
TAKES = {"POP": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
TAKES |= {"BUILD": 1, "REDUCE": 2, "STACK_GLOBAL": 2}


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
        return _plain(_unpickled(pickled), dtypes, {}, DEEPEST)
    # what is no pickle fails with almost any exception
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


def _unpickled(pickled: bytes) -> Any:
    """What a pickle holds, with stand-ins for numpy's arrays.

    A machine of our own runs the opcodes, as ``torch.load(weights_only=True)`` has one: it knows those for plain data
    and calls nothing but the functions below. Python's unpickler, however it is restricted, ends the whole program on a
    key that is a deep tuple, or on an object numbered two billions.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(pickled):
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
            continue
        begin = marks.pop() if name in TO_MARK else len(stack) - TAKES.get(name, 0)
        if begin < (marks[-1] if marks else 0):
            raise pickle.UnpicklingError(f"{name} takes more than there is")
        taken = stack[begin:]
        del stack[begin:]
        match name:
            case "STOP":
                if position + 1 < len(pickled):
                    raise pickle.UnpicklingError(f"{len(pickled) - position - 1} bytes follow its end")
            case "MARK":
                marks.append(len(stack))
            case "APPEND" | "APPENDS":
                _extend(stack[-1], taken)
            case "SETITEM" | "SETITEMS":
                _set_items(stack[-1], taken)
            case "BUILD":
                _set_state(stack[-1], taken[0])
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PROTO" | "FRAME" | "POP" | "POP_MARK":
                pass
            case _:
                stack.append(_made(name, argument, taken))
    return stack[-1]


def _made(name: str, argument: Any, taken: list[Any]) -> Any:
    match name:
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
        case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
            return tuple(taken)
        case "LIST" | "EMPTY_LIST":
            return taken
        case "DICT" | "EMPTY_DICT":
            made: dict[Any, Any] = {}
            _set_items(made, taken)
            return made
        case "GLOBAL":
            return _named(*argument.split(" ", 1))
        case "STACK_GLOBAL":
            return _named(*taken)
        case "REDUCE":
            return _called(*taken)
        case "PERSID" | "BINPERSID":
            raise pickle.UnpicklingError("it refers to objects outside the pickle, such as torch's tensors")
    raise pickle.UnpicklingError(f"it uses {name}, which plain data does not need")


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise pickle.UnpicklingError(f"it appends to {_described(target)}")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise pickle.UnpicklingError(f"it sets {len(items)} keys and values of {_described(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key is not None and type(key) not in (str, int, float, bool):
            raise pickle.UnpicklingError(f"a key is {_described(key)}, which is not a number or text")
        target[key] = value


def _set_state(target: Any, state: Any) -> None:
    if type(target) not in (_Array, _Dtype) or type(state) is not tuple:
        raise pickle.UnpicklingError(f"it sets the state of {_described(target)}")
    target.set_state(*state)


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
    if type(value) is _Function:
        return value.name
    return {_Array: "an array", _Dtype: "a numpy.dtype"}.get(type(value), f"a {type(value).__name__}")


def _check_dtype(code: Any, dtypes: Collection[str]) -> None:
    if type(code) is not str or code not in dtypes:
        code = code if type(code) is str else _described(code)  # the text of a hostile list can be endless
        raise pickle.UnpicklingError(f"it holds an array of type {code}, not {' or '.join(dtypes)}")


@dataclass(frozen=True)
class _Function:
    """Takes the place of a function of numpy or Python."""

    name: str


class _Dtype:
    """Takes the place of numpy's dtype, and admits numbers."""

    def __init__(self, code: Any, *_: object) -> None:
        _check_dtype(code, DTYPES)
        self.code = code

    def set_state(self, _: object, byte_order: Any, *record: object) -> None:
        if byte_order not in ("<", "|") or record[:3] != (None, None, None):
            raise pickle.UnpicklingError(f"it holds an array of {self.code} which are not plain little-endian numbers")


class _Array:
    """Takes the place of a numpy array or scalar."""

    def __init__(self, values: np.ndarray | np.generic | None = None) -> None:
        self.values = values

    def set_state(self, _: object, shape: Any, dtype: Any, columns_first: Any, values: Any) -> None:
        if self.values is not None:
            raise pickle.UnpicklingError("it fills an array twice")
        self.values = _array(values, dtype, shape, "F" if columns_first else "C")


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


def _reconstructed(*_: object) -> _Array:
    """As numpy's function, which makes an array whose shape and values follow."""
    return _Array()


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


CALLED = {
    "numpy.core.multiarray._reconstruct": _reconstructed,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}
NOT_CALLED = "numpy.ndarray"  # only an argument of _reconstruct


def _named(module: Any, name: Any) -> _Function:
    if type(module) is not str or type(name) is not str:
        raise pickle.UnpicklingError(f"it asks for {_described(module)} and {_described(name)}, which are no names")
    full_name = f"{module.replace('numpy._core.', 'numpy.core.')}.{name}"  # numpy 2 renamed it
    if full_name not in (*CALLED, NOT_CALLED):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
    return _Function(full_name)


def _called(function: Any, arguments: Any) -> Any:
    if type(function) is not _Function or function.name not in CALLED or type(arguments) is not tuple:
        raise pickle.UnpicklingError(f"it calls {_described(function)} with {_described(arguments)}")
    return CALLED[function.name](*arguments)
