"""JSON files that hold an object from names to the fields of a dataclass, such as lists of data sets and of ways."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from microtune.modules.user_error import UserError

Entry = TypeVar("Entry")


def read_named(path: Path | str, entry_type: type[Entry], what: str) -> dict[str, Entry]:
    """Reads a JSON object from a name to the fields of an entry.

    Args:
        path: Of the file.
        entry_type: A pydantic dataclass.
        what: The entries are, in the plural, for errors.

    Raises:
        UserError: The file is missing or no such object, or an entry is wrong; the message begins with the path.

    Example::

        read_named("recipes/results/data_sets.json", TransferTask, "data sets")["cifar10"].weights
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the list of {what}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f"{path}: this is no list of {what}: give an object from a name to its fields")
    try:
        return {name: checked(name, entry, entry_type) for name, entry in entries.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def checked(name: str, given: dict[str, Any], entry_type: type[Entry]) -> Entry:
    """The entry that the fields give.

    Args:
        name: Of the entry, which becomes part of the names of files.
        given: Its fields; texts are converted.
        entry_type: A pydantic dataclass.

    Raises:
        UserError: The name is unsuitable, a field is unknown or missing, or a value is wrong.

    Example::

        checked("quarter", {"scheme": "expanding", "ratio": "0.25"}, Way).ratio  # 0.25
    """
    if not re.fullmatch(r"\w+", name):
        raise UserError(f"the name {name!r} would suit no table: give letters, digits and underscores")
    try:
        return TypeAdapter(entry_type).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{name}: {first['ctx']['error']}") from error
        field = first["loc"][0]
        if first["type"] == "unexpected_keyword_argument":
            known = ", ".join(one.name for one in fields(entry_type))
            raise UserError(f"{name} has the unknown field {field!r}: give some of {known}") from error
        if first["type"] == "missing":
            raise UserError(f"{name} has no {field!r}: add it") from error
        mistake = first["msg"].replace("Input should", "it should")
        raise UserError(f"{name}: {field} is {first['input']!r:.80}: {mistake}") from error
