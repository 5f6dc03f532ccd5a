"""What MSWC's csv files say: which clip is of which word and in which split."""

import csv
import itertools
import logging
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
COLUMNS = ("LINK", "WORD", "VALID")


@dataclass(frozen=True)
class Splits:
    """The valid clips that csv files name.

    Args:
        links: LINK of each clip (N,), ``<word>/<clip>.opus``.
        words: Words, each ``<language>/<word>`` in normal form C (W,).
        word_of: Word of each clip, as an index into ``words`` (N,).
        split_of: Split of each clip, as an index into ``SPLITS`` (N,).
    """

    links: list[str]
    words: list[str]
    word_of: np.ndarray
    split_of: np.ndarray

    def clips_per_word(self) -> np.ndarray:
        """How many clips there are, of shape (3, W)."""
        flat = self.split_of.astype(np.int64) * len(self.words) + self.word_of
        return np.bincount(flat, minlength=3 * len(self.words)).reshape(3, -1)


def read_languages(languages: Sequence[str], folders: dict[str, list[Path]]) -> Splits:
    """Reads the splits of several languages.

    Args:
        languages: Codes of the languages.
        folders: Folders where the csv files of each may lie; the first that holds them is read.

    Raises:
        UserError: as ``find_tables`` and ``read_tables``.

    Example::

        splits = read_languages(["en"], {"en": [Path("mswc/en")]})
    """
    alone = len(languages) == 1
    parts = [read_tables(language, find_tables(language, folders[language], alone)) for language in languages]
    firsts = np.cumsum([0] + [len(part.words) for part in parts])
    return Splits(
        list(itertools.chain.from_iterable(part.links for part in parts)),
        [word for part in parts for word in part.words],
        np.concatenate([part.word_of + first for part, first in zip(parts, firsts[:-1], strict=True)]),
        np.concatenate([part.split_of for part in parts]),
    )


def find_tables(language: str, folders: Sequence[Path], alone: bool = True) -> list[tuple[Path, int | None]]:
    """The csv files of a language, each with its split, which is None where a column SET tells it.

    Args:
        language: Code of the language.
        folders: Folders where they may lie.
        alone: Whether there is no other language, whose files could be called ``train.csv`` as well; else only those
            in a folder with the language's name are taken for its own.

    Raises:
        UserError: if there are none, or one of the three splits is missing.

    Example::

        find_tables("en", [Path("mswc/en")])  # [(mswc/en/en_train.csv, 0), (mswc/en/en_dev.csv, 1), ...]
    """
    for folder in folders:
        for prefix in (f"{language}_", "") if alone or folder.name == language else (f"{language}_",):
            tables = [(folder / f"{prefix}{name}.csv", split) for split, name in enumerate(SPLITS)]
            whole = folder / f"{prefix}splits.csv"
            missing = [path for path, _ in tables if not path.is_file()]
            if not missing:
                return tables
            if whole.is_file():
                return [(whole, None)]
            if len(missing) < len(SPLITS):
                raise UserError(f"{missing[0]} is missing beside the other splits: unpack the splits archive again")
    raise UserError(
        f"there is no {language}_train.csv, {language}_splits.csv or train.csv in {' or '.join(map(str, folders))}: "
        "the splits are an archive of their own; unpack it there, or give its folder as --splits_dir"
    )


def read_tables(language: str, tables: Sequence[tuple[Path, int | None]]) -> Splits:
    """Reads csv files with the columns LINK, WORD, VALID and, where the split is None, SET.

    Raises:
        UserError: naming file and line, if a file is no such table or a clip is in two splits.

    Example::

        read_tables("en", [(Path("mswc/en/en_splits.csv"), None)])
    """
    links, word_of, split_of = [], array("i"), array("b")
    words: dict[str, int] = {}
    spellings: dict[str, int] = {}  # the same words, as the files spell them
    for path, split in tables:
        for link, word, clip_split in _valid_rows(path, split):
            index = spellings.get(word)
            if index is None:
                name = f"{language}/{unicodedata.normalize('NFC', word)}"
                index = spellings[word] = words.setdefault(name, len(words))
            links.append(link)
            word_of.append(index)
            split_of.append(clip_split)
    once = _once(links, np.frombuffer(split_of, np.int8), tables)
    return Splits(
        list(itertools.compress(links, once)),
        list(words),
        np.frombuffer(word_of, np.int32)[once].astype(np.int64),
        np.frombuffer(split_of, np.int8)[once],
    )


def _valid_rows(path: Path, split: int | None) -> Iterator[tuple[str, str, int]]:
    """LINK, WORD and split of the rows whose VALID is true."""
    names = {name.upper(): index for index, name in enumerate(SPLITS)}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path}, line 1: the file is empty: unpack the splits archive again")
            of_link, of_word, of_valid, *of_set = _columns(
                path, header, (*COLUMNS, "SET") if split is None else COLUMNS
            )
            for row in reader:
                if len(row) < len(header):
                    if not row:
                        continue
                    raise UserError(f"{path}, line {reader.line_num}: {len(row)} fields instead of {len(header)}")
                found = names.get(row[of_set[0]].strip().upper()) if split is None else split
                if found is None:
                    raise UserError(
                        f"{path}, line {reader.line_num}: SET is {row[of_set[0]]!r}, not {', '.join(names)}"
                    )
                if row[of_link].startswith("/") or ".." in row[of_link].split("/"):
                    raise UserError(f"{path}, line {reader.line_num}: {row[of_link]} leaves the folder: do not use it")
                if row[of_valid] == "True" or row[of_valid].strip().lower() == "true":
                    yield row[of_link], row[of_word], found
            if reader.line_num < 2:
                raise UserError(f"{path}, line 2: there are no clips in it: unpack the splits archive again")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: not a table in UTF-8 ({error})") from error


def _columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    header = [name.strip() for name in header]
    for column in columns:
        if column not in header:
            raise UserError(f"{path} has no column {column}, only {', '.join(header)}: is it MSWC's table?")
    return [header.index(column) for column in columns]


def _once(links: list[str], split_of: np.ndarray, tables: Sequence[tuple[Path, int | None]]) -> np.ndarray:
    """True for each clip but those named before; an error if that was in another split."""
    once = np.ones(len(links), bool)
    # a set of millions of texts would take more memory than the texts
    hashes = np.fromiter(map(hash, links), np.int64, len(links))
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(np.diff(hashes[order]) == 0):
        first, second = order[place : place + 2]
        if links[first] != links[second]:
            continue
        if split_of[first] != split_of[second]:
            both = f"{SPLITS[split_of[first]]} and {SPLITS[split_of[second]]}"
            where = ", ".join(str(path) for path, _ in tables)
            raise UserError(f"{links[second]} is in two splits, {both}: test clips must not be trained on ({where})")
        once[second] = False
    return once


def some_of(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are.

    Example::

        some_of(["a", "b", "c", "d", "e", "f", "g"])  # "a, b, c, d, e and 2 more"
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
