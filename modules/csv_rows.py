"""CSV files whose rows are dataclasses: every value is checked when they are read, and they are written whole."""

import csv
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from microtune.modules.atomic_files import whole_file
from microtune.modules.user_error import UserError

Row = TypeVar("Row")
# what to give in place of a value, by pydantic's name of the error
WANTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "True or False",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "{le:g} or less",
}


def read_rows(
    path: Path | str,
    row_type: type[Row],
    check: Callable[[Row, Mapping[int, Row]], None] | None = None,
    remedy: str = "",
) -> list[Row]:
    """Reads the rows of a CSV file that ``write_rows`` wrote, or one by hand; its columns may be in any order.

    Args:
        path: The file, in UTF-8.
        row_type: A dataclass whose fields are the columns. Their types say what a value may be, with pydantic's
            constraints in ``Annotated``; an empty value is None where ``None`` is allowed. A property ``key`` says
            what no two rows share.
        check: Called with each row and, by line, those before it; raises ``UserError`` if they do not go together.
        remedy: What else helps than to mend the line, for the end of an error.

    Raises:
        UserError: The file is missing or no such CSV, or a value is not of its type; the message begins with the
            path, and says the line where one line is wrong.

    Example::

        @dataclass(frozen=True)
        class Accuracy:
            data: str
            top1: Annotated[float, Field(ge=0, le=1)]

        read_rows("accuracies.csv", Accuracy)  # [Accuracy("cifar10", 0.798)]
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # a spreadsheet may begin it with a byte order mark
        return _parse(text, row_type, check)
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is a binary file, not CSV{remedy}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}{remedy}") from error


def write_rows(path: Path | str, rows: Iterable[Row], row_type: type[Row]) -> None:
    """Writes rows as CSV, whole or not at all; ``read_rows`` gives equal ones.

    Args:
        path: The file; its folder is made if need be.
        rows: May be none.
        row_type: Their dataclass, whose fields are the columns in this order.

    Example::

        write_rows("accuracies.csv", [Accuracy("cifar10", 0.798)], Accuracy)
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(row_type), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_adapter(row_type).dump_python(row) for row in rows)
    with whole_file(path) as partial:
        partial.write_bytes(text.getvalue().encode())


@functools.cache
def _adapter(row_type: type) -> TypeAdapter:
    return TypeAdapter(row_type)


@functools.cache
def _columns(row_type: type) -> dict[str, Any]:
    """The types of the columns by their names."""
    types = get_type_hints(row_type)
    return {field.name: types[field.name] for field in fields(row_type)}


def _parse(text: str, row_type: type[Row], check: Callable[[Row, Mapping[int, Row]], None] | None) -> list[Row]:
    if "\0" in text:
        raise UserError("this is a binary file, not CSV")
    lines = _numbered_lines(text)
    columns = next(lines, (1, []))[1]
    _check_columns(columns, list(_columns(row_type)))
    rows: dict[int, Row] = {}
    line_of: dict[Any, int] = {}
    for line, values in lines:
        if len(values) != len(columns):
            raise UserError(f"line {line} has {len(values)} fields, not {len(columns)}, perhaps cut off: mend it")
        try:
            row = _row(dict(zip(columns, values, strict=True)), row_type)
            if check is not None:
                check(row, rows)
        except UserError as error:
            raise UserError(f"line {line}: {error}") from error
        key = getattr(row, "key", (line,))
        if key in line_of:
            raise UserError(f"lines {line_of[key]} and {line} are both {', '.join(map(str, key))}: keep one")
        line_of[key] = line
        rows[line] = row
    return list(rows.values())


def _numbered_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each line that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            if values:
                yield reader.line_num, values
    except csv.Error as error:
        raise UserError(f"line {reader.line_num}: not valid CSV, perhaps cut off: {error}") from error


def _check_columns(found: list[str], expected: list[str]) -> None:
    are = f"the columns are {','.join(expected)}"
    if not found:
        raise UserError(f"the file is empty: {are}")
    if unknown := [column for column in found if column not in expected]:
        raise UserError(f"line 1: unknown column {unknown[0]!r:.80}: {are}")
    if missing := [column for column in expected if column not in found]:
        raise UserError(f"line 1: column {missing[0]!r} is missing: {are}")
    if len(found) > len(expected):
        doubled = next(column for column in found if found.count(column) > 1)
        raise UserError(f"line 1: column {doubled!r} stands there twice: {are}")


def _row(texts: dict[str, str], row_type: type[Row]) -> Row:
    values: dict[str, str | None] = dict(texts)
    for column, kind in _columns(row_type).items():
        kinds = get_args(kind) or (kind,)
        if texts[column] == "" and type(None) in kinds:
            values[column] = None
        if int in kinds and "." in texts[column]:  # pydantic would take 2.0
            raise UserError(f"{column} is {texts[column]!r:.80}: give a whole number")
    try:
        return _adapter(row_type).validate_python(values)
    except ValidationError as error:
        raise UserError(_mistake(error)) from error


def _mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    context = first.get("ctx", {})
    if isinstance(context.get("error"), UserError):  # the row's own
        return str(context["error"])
    wanted = WANTED.get(first["type"])
    remedy = first["msg"] if wanted is None else f"give {wanted.format(**context).replace(chr(39), '')}"
    return f"{first['loc'][0]} is {first['input']!r:.80}: {remedy}"
