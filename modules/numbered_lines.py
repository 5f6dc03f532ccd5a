"""The lines of a CSV text with their numbers, so that an error can say where it is."""

import csv
import io
from collections.abc import Iterator

from microtune.modules.user_error import UserError


def numbered_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not blank.

    Raises:
        UserError: The text is no CSV.

    Example::

        list(numbered_lines("a,b\n\n1,2\n"))  # [(1, ["a", "b"]), (3, ["1", "2"])]
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"line {reader.line_num}: not valid CSV, perhaps cut off: {error}") from error
