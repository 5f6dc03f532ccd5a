"""Which words of MSWC become classes, and which of their clips are used."""

import difflib
import logging
import unicodedata
from collections.abc import Sequence

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from microtune.datamodules.mswc_splits import SPLITS, Splits, some_of
from microtune.datamodules.reproducible_order import random_bits
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

UNKNOWN = "_unknown_"
# so that the clips of the unknown class and the shots of an equal seed are drawn apart
UNKNOWN_DRAW, SHOTS_DRAW = 0, 1


def choose_words(
    splits: Splits, languages: Sequence[str], words: Sequence[str] | None = None, num_words: int | None = None
) -> list[int]:
    """The words that become classes, as indices into ``splits.words``, in the order of the classes.

    Args:
        splits: Valid clips of the languages.
        languages: Codes of its languages.
        words: Words to choose, in this order, each ``<word>`` or ``<language>/<word>``; or None to take ``num_words``.
        num_words: Number of words, those with the most training clips; or None for all. These are sorted, and words
            that lack training or test clips are passed over.

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
        splits: Valid clips of the languages.
        chosen: Chosen words, as indices into ``splits.words``; the class of each is its place.
        unknown: Whether the other words make a class, the last.
        split_seed: Seed that draws the clips of the other words.

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
        rank_zero_only(log.warning)("fewer than %d training clips, so all are used: %s", shots, some_of(fewer))
    return remaining


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
