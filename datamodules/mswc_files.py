"""Where MSWC's files lie: its archives unpacked, and the clips found in whichever layout they have."""

import filecmp
import hashlib
import logging
import os
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from microtune.datamodules.archives import read_archive
from microtune.datamodules.mswc_splits import SPLITS, Splits, some_of
from microtune.modules.atomic_files import whole_folder
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

# below <language>/: the original's clips/<word>/<clip>.opus, and where the files of Hugging Face's variant may lie
CLIP_FOLDERS = ("clips", "", "audio", "{split}", "{split}/audio")
PROBES = 300
TOLERATED_MISSING = 0.01


def unpack_mswc(archive: Path, data_dir: Path, languages: Sequence[str]) -> None:
    """Unpacks an archive of MSWC into ``data_dir/<language>/``, whole or not at all, and overwrites nothing.

    An archive of audio or splits may hold ``<language>/``; or ``clips/``, ``audio/``, ``train/``, ``dev/``, ``test/``
    or csv files, which go into ``<language>/``; or Opus files without a folder (Hugging Face), which go into
    ``<language>/audio/``. If it holds only csv and text files, their folders are passed over. Where there are several
    languages and no folder tells which one it is, a csv file's name does (``en_train.csv``), or the archive's own name
    or folder (``en.tar.gz``, ``en_splits.tar.gz``, ``en/train/audio/0.tar.gz``). A file that is there already with the
    same contents remains, and so does a text file: audio and splits may each bring a ``version.txt``. An empty hidden
    folder marks what was unpacked, and a second call does nothing.

    Args:
        archive: Tar file, compressed or not.
        data_dir: Folder where the languages' folders are, or will be.
        languages: Codes of the languages that the archive may hold.

    Raises:
        UserError: if the archive cannot be read, is not MSWC's, or a file of it is there with other contents.

    Example::

        unpack_mswc(Path("en.tar.gz"), Path("data/mswc"), ["en"])
    """
    if not archive.is_file():
        raise UserError(f"{archive} does not exist: give a .tar or .tar.gz file")
    marker = data_dir / f".unpacked-{archive.name}-{_digest(archive)}"
    if marker.exists():
        return
    with whole_folder(marker) as partial:
        files = partial / "files"
        only_tables = _unpack_files(archive, files)
        moves = [
            move
            for source, target in _places(files, only_tables, archive, data_dir, languages)
            for move in _moves(source, target, archive)
        ]
        if len({target for _, target in moves}) < len(moves):
            raise UserError(f"{archive} has several files of one name: unpack it yourself")
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)
        shutil.rmtree(files)


def _digest(archive: Path) -> str:
    """A hash of an archive's size, beginning and end: Hugging Face's are all called 0.tar.gz, 1.tar.gz and so on."""
    size_bytes = archive.stat().st_size
    with archive.open("rb") as file:
        described = hashlib.sha256(f"{size_bytes} ".encode() + file.read(2**20))
        file.seek(max(0, size_bytes - 2**16))
        described.update(file.read())
    return described.hexdigest()[:16]


def _unpack_files(archive: Path, folder: Path) -> bool:
    """Unpacks, and returns whether there are only csv and text files."""
    only_tables = True
    folder.mkdir()
    with read_archive(archive) as members:
        for tar, member in members:
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{archive} holds a link or a device, {member.name}: do not trust this archive")
            tar.extract(member, folder, filter="data")
            only_tables &= member.isdir() or member.name.endswith((".csv", ".txt"))
    if not any(folder.iterdir()):
        raise UserError(f"{archive} holds no files: download it again")
    return only_tables


def _places(
    files: Path, only_tables: bool, archive: Path, data_dir: Path, languages: Sequence[str]
) -> list[tuple[Path, Path]]:
    """What was unpacked, and where it belongs; see ``unpack_mswc``."""
    places = []
    if only_tables:
        tables = sorted(path for path in files.rglob("*") if path.is_file())
        for path in tables:
            named = [*reversed(path.relative_to(files).parts), *(other.name for other in tables)]
            places.append((path, data_dir / _language(named, archive, languages) / path.name))
        return places
    for entry in sorted(files.iterdir(), key=lambda path: (path.is_file(), path.name)):
        if entry.is_dir() and entry.name in languages:
            places.append((entry, data_dir / entry.name))
        elif entry.is_dir() and entry.name not in ("clips", "audio", *SPLITS):
            raise UserError(
                f"{archive} holds a folder {entry.name!r}, neither clips nor one of the languages "
                f"({', '.join(languages)}): name its language too, or unpack it yourself"
            )
        else:
            named = [entry.name] if entry.suffix == ".csv" else []
            below = "audio" if entry.is_file() and entry.suffix == ".opus" else ""
            places.append((entry, data_dir / _language(named, archive, languages) / below / entry.name))
    return places


def _language(names: Sequence[str], archive: Path, languages: Sequence[str]) -> str:
    if len(languages) == 1:
        return languages[0]
    for name in (*names, *reversed(archive.absolute().parts)):
        for language in languages:
            if language in name.partition(".")[0].split("_"):
                return language
    raise UserError(
        f"{archive} does not say which of {', '.join(languages)} it holds: "
        f"rename it, say, {languages[0]}_{archive.name}"
    )


def _moves(source: Path, target: Path, archive: Path) -> Iterator[tuple[Path, Path]]:
    """The renames that bring ``source`` to ``target``, without what is there with the same contents."""
    if not os.path.lexists(target):
        yield source, target
    elif source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir()):
            yield from _moves(entry, target / entry.name, archive)
    elif not (source.is_file() and target.is_file()) or not (
        source.suffix == ".txt" or filecmp.cmp(source, target, shallow=False)
    ):
        raise UserError(f"{target} is there already, and not as in {archive}: move it away, or leave out the archive")


def find_clips(splits: Splits, rows: np.ndarray, data_dir: Path) -> tuple[list[Path], np.ndarray]:
    """Finds the files of clips, in whichever layout each language has.

    Args:
        splits: Clips that the csv files name.
        rows: Clips to look for, indices into ``splits.links`` (N,).
        data_dir: Folder with a folder per language.

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
        what += f"; there is none at all of {some_of(wordless)}"
    if missing > TOLERATED_MISSING * clips:
        raise UserError(
            f"{what}: is it the right folder, was the archive wholly unpacked, are splits and audio of one?"
        )
    rank_zero_only(log.warning)("%s: they are left out", what)
