"""What MSWC's csv files say: which clip is of which word and in which split; the choice of clips, and their files."""

import csv
import difflib
import itertools
import logging
import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from microtune.datamodules.reproducible_order import random_bits
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
UNKNOWN = "_unknown_"
# below <language>/: the original's clips/<word>/<clip>.opus, and where the files of Hugging Face's variant may lie
CLIP_FOLDERS = ("clips", "", "audio", "{split}", "{split}/audio")
PROBES = 300
TOLERATED_MISSING = 0.01
COLUMNS = ("LINK", "WORD", "VALID")
# so that the clips of the unknown class and the shots of an equal seed are drawn apart
UNKNOWN_DRAW, SHOTS_DRAW = 0, 1


@dataclass(frozen=True)
class Splits:
    """The valid clips that csv files name.

    Args:
        links: the LINK of each clip (N,), ``<word>/<clip>.opus``.
        words: the words, each ``<language>/<word>`` in normal form C (W,).
        word_of: the word of each clip, as an index into ``words`` (N,).
        split_of: the split of each clip, as an index into ``SPLITS`` (N,).
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
        languages: their codes.
        folders: for each, where its csv files may lie; the first folder that holds them is read.

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
        language: its code.
        folders: where they may lie.
        alone: whether there is no other language, whose files could be called ``train.csv`` as well; else only those
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


def choose_words(
    splits: Splits, languages: Sequence[str], words: Sequence[str] | None = None, num_words: int | None = None
) -> list[int]:
    """The words that become classes, as indices into ``splits.words``, in the order of the classes.

    Args:
        splits: what there is.
        languages: the codes of its languages.
        words: these, in this order, each ``<word>`` or ``<language>/<word>``; or None for
        num_words: as many of those with the most training clips; or None for all. These are sorted, and words that
            lack training or test clips are passed over.

    Raises:
        UserError: if a word is not there, is there in several languages or given twice, or there are too few.

    Example::

        choose_words(splits, ["en"], num_words=10)
    """
    if words is not None:
        return _given_words(splits, languages, words)
    clips = splits.clips_per_word()
    usable = np.flatnonzero((clips[0] > 0) & (clips[2] > 0)).tolist()
    if num_words is None:
        if len(usable) < len(splits.words):
            passed_over = sorted(set(range(len(splits.words))) - set(usable))
            rank_zero_only(log.warning)(
                "%d of %d words lack training or test clips and are left out, %s the first",
                *(len(passed_over), len(splits.words), splits.words[passed_over[0]]),
            )
        num_words = len(usable)
    if num_words > len(usable):
        raise UserError(f"num_words is {num_words}, but only {len(usable)} words have training and test clips")
    by_clips = sorted(usable, key=lambda index: (-clips[0, index], splits.words[index]))
    return sorted(by_clips[:num_words], key=splits.words.__getitem__)


def _given_words(splits: Splits, languages: Sequence[str], words: Sequence[str]) -> list[int]:
    index_of = {name: index for index, name in enumerate(splits.words)}
    chosen: list[int] = []
    for word in words:
        word = unicodedata.normalize("NFC", word)
        found = [name for name in (word, *(f"{language}/{word}" for language in languages)) if name in index_of]
        if not found:
            pool = {name.partition("/")[2] if len(languages) == 1 else name for name in splits.words}
            pool |= {name.partition("/")[2] for name in splits.words}
            near = difflib.get_close_matches(word, sorted(pool), n=5, cutoff=0.5) or sorted(pool)[:5]
            raise UserError(
                f"the word {word!r} is not in the splits of {', '.join(languages)}: the nearest are {', '.join(near)}"
            )
        if len(found) > 1:
            raise UserError(f"the word {word!r} is in several languages: give one of {', '.join(found)}")
        if index_of[found[0]] in chosen:
            raise UserError(f"the word {word!r} is given twice: give each once")
        chosen.append(index_of[found[0]])
    return chosen


def choose_clips(
    splits: Splits, chosen: Sequence[int], unknown: bool, split_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The clips of the chosen words, and with ``unknown`` as many of the other words as a chosen one has on average.

    Args:
        splits: what there is.
        chosen: the words, as indices into ``splits.words``; the class of each is its place.
        unknown: whether the other words make a class, the last.
        split_seed: draws the clips of the other words.

    Returns:
        The clips, ascending indices into ``splits.links`` (N,), and their classes (N,).

    Raises:
        UserError: if there are no other words for ``unknown``.

    Example::

        rows, labels = choose_clips(splits, [3, 1], unknown=True, split_seed=0)  # labels 0, 1 and 2
    """
    class_of_word = np.full(len(splits.words), -1)
    class_of_word[list(chosen)] = np.arange(len(chosen))
    labels = class_of_word[splits.word_of]
    if unknown:
        if len(chosen) == len(splits.words):
            raise UserError("all words are chosen, none is left for the class of unknown words: choose fewer")
        for split in range(len(SPLITS)):
            in_split = splits.split_of == split
            wanted = max(1, -(-np.count_nonzero(in_split & (labels >= 0)) // len(chosen)))
            others = np.flatnonzero(in_split & (labels < 0))
            labels[drawn(others, wanted, split_seed, UNKNOWN_DRAW)] = len(chosen)
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows]


def drawn(rows: np.ndarray, count: int, seed: int, draw: int) -> np.ndarray:
    """``count`` of the rows at random, or all where there are not so many.

    Example::

        drawn(np.arange(100), count=5, seed=0, draw=SHOTS_DRAW)
    """
    bits = random_bits(seed, 0, rows, draws=draw + 1)[:, draw]
    return rows[np.argsort(bits, kind="stable")[:count]]


def few_shots(
    rows: np.ndarray, labels: np.ndarray, splits: Splits, shots: int, seed: int, class_names: Sequence[str]
) -> np.ndarray:
    """A mask (N,) of the clips that remain if training has ``shots`` per class; a class with fewer keeps them all.

    Example::

        kept = few_shots(rows, labels, splits, shots=5, seed=0, class_names=["yes", "no"])
    """
    training = splits.split_of[rows] == 0
    remaining = ~training
    fewer = []
    for label, name in enumerate(class_names):
        places = np.flatnonzero(training & (labels == label))
        kept = drawn(rows[places], shots, seed, SHOTS_DRAW)
        remaining[places[np.isin(rows[places], kept)]] = True
        if len(places) < shots:
            fewer.append(f"{name} ({len(places)})")
    if fewer:
        rank_zero_only(log.warning)("fewer than %d training clips, so all are used: %s", shots, _some(fewer))
    return remaining


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def check_classes(labels: np.ndarray, split_of: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """How many clips each class has, of shape (3, classes).

    Raises:
        UserError: if a class has no clips for training or testing, or none has any for validation.

    Example::

        check_classes(np.array([0, 0, 0]), np.array([0, 1, 2]), ["yes"])  # [[1], [1], [1]]
    """
    flat = split_of.astype(np.int64) * len(class_names) + labels
    clips = np.bincount(flat, minlength=3 * len(class_names)).reshape(3, -1)
    for split in (0, 2):
        empty = np.flatnonzero(clips[split] == 0)
        if len(empty):
            raise UserError(f"{class_names[empty[0]]!r} has no clips in the {SPLITS[split]} split: choose other words")
    if not clips[1].any():
        raise UserError("the dev split has no clips of the chosen words: choose more words, or other ones")
    return clips


def find_clips(splits: Splits, rows: np.ndarray, data_dir: Path) -> tuple[list[Path], np.ndarray]:
    """Finds the files of clips, in whichever layout each language has.

    Args:
        splits: what the csv files name.
        rows: the clips to look for, indices into ``splits.links`` (N,).
        data_dir: the folder with a folder per language.

    Returns:
        The files that are there, and a mask of them (N,).

    Raises:
        UserError: if more than 1 % are missing; fewer are logged.

    Example::

        paths, there = find_clips(splits, rows, Path("data/mswc"))
    """
    language_of_word = np.array([word.partition("/")[0] for word in splits.words])
    language_of = language_of_word[splits.word_of[rows]]
    found: list[str | None] = [None] * len(rows)
    layout_of = {}
    for language in np.unique(language_of).tolist():
        places = np.flatnonzero(language_of == language).tolist()
        clips = [(splits.links[row], SPLITS[splits.split_of[row]]) for row in rows[places]]
        layout_of[language] = _layout(data_dir / language, clips)
        for place, clip in zip(places, clips, strict=True):
            found[place] = _existing(*layout_of[language], *clip)
    there = np.array([path is not None for path in found])
    if not there.all():
        places = np.flatnonzero(~there)
        first = rows[places[0]]
        layout = layout_of[language_of[places[0]]]
        expected = _path(*layout, splits.links[first], SPLITS[splits.split_of[first]])
        _report_missing(len(places), expected, _wordless(splits, rows, there), len(rows))
    return [Path(path) for path in found if path is not None], there


def _layout(folder: Path, clips: Sequence[tuple[str, str]]) -> tuple[str, bool]:
    """The path to the clips, with ``{split}`` for the split, and whether words are part of the file names."""
    probes = clips[:: max(1, len(clips) // PROBES)]
    base = str(folder).replace("{", "{{").replace("}", "}}")
    layouts = [(os.path.join(base, below), flat) for flat in (False, True) for below in CLIP_FOLDERS]
    hits = [sum(_existing(*layout, *clip) is not None for clip in probes) for layout in layouts]
    if not any(hits):
        raise UserError(
            f"none of the clips that the splits name is in {folder}, neither {_path(*layouts[0], *clips[0])} nor, "
            f"say, {_path(*layouts[6], *clips[0])}: unpack the audio archive of this language there"
        )
    return layouts[int(np.argmax(hits))]


def _path(template: str, flat: bool, link: str, split: str) -> str:
    return os.path.join(template.format(split=split), link.replace("/", "_") if flat else link)


def _existing(template: str, flat: bool, link: str, split: str) -> str | None:
    # a file system, or a program that unpacks, may write accents in another normal form than the csv
    forms = (link,) if link.isascii() else (link, *(unicodedata.normalize(form, link) for form in ("NFC", "NFD")))
    for form in forms:
        path = _path(template, flat, form, split)
        if os.path.isfile(path):
            return path
    return None


def _wordless(splits: Splits, rows: np.ndarray, there: np.ndarray) -> list[str]:
    """The words of which no clip is there."""
    words = splits.word_of[rows]
    return sorted(splits.words[index] for index in np.setdiff1d(words, words[there]))


def _report_missing(missing: int, first: str, wordless: Sequence[str], clips: int) -> None:
    what = f"{missing} of {clips} clips that the splits name are missing, {first} the first"
    if wordless:
        what += f"; there is none at all of {_some(wordless)}"
    if missing > TOLERATED_MISSING * clips:
        raise UserError(
            f"{what}: is it the right folder, was the archive wholly unpacked, are splits and audio of one?"
        )
    rank_zero_only(log.warning)("%s: they are left out", what)
