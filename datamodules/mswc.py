"""The Multilingual Spoken Words Corpus (Mazumder et al., NeurIPS Datasets and Benchmarks 2021)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from microtune.datamodules.decoded_audio import decode_clips, read_audio
from microtune.datamodules.keyword_audio import Batch, KeywordClips, KeywordFrontEnd, generated_noise, join_recordings
from microtune.datamodules.mswc_choice import UNKNOWN, check_classes, choose_clips, choose_words, few_shots
from microtune.datamodules.mswc_files import find_clips, unpack_mswc
from microtune.datamodules.mswc_splits import SPLITS, read_languages
from microtune.datamodules.option_names import CacheName
from microtune.datamodules.reproducible_order import data_loader
from microtune.datamodules.spectrogram_shape import spectrogram_shape
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

ADDRESS = "https://mlcommons.org/datasets/multilingual-spoken-words/"


class MSWC(LightningDataModule):
    """Spoken words of 50 languages, one second each, as log-mel spectrograms; the splits are the corpus' own.

    Two layouts are understood, each below ``data_dir/<language>/``: the original, ``clips/<word>/<clip>.opus``, and
    that of Hugging Face's MLCommons/ml_spoken_words, ``<word>_<clip>.opus`` there or in ``clips/``, ``audio/``,
    ``<split>/`` or ``<split>/audio/``. The splits are ``<language>_{train,dev,test}.csv``, ``<language>_splits.csv`` or
    ``{train,dev,test}.csv``. Clips that the corpus marks as not valid are left out. Nothing is downloaded.

    Training clips are moved in time, mixed with noise and masked (see ``KeywordFrontEnd``).

    Args:
        data_dir: Folder with a folder per language.
        languages: Codes of the languages; with several, classes are called ``<language>/<word>``.
        words: Words that are the classes, in this order, each ``<word>`` or ``<language>/<word>``; or None to take
            ``num_words``.
        num_words: Number of words, those with the most training clips over all languages; or None for all. These are
            sorted, and words without training or test clips are passed over.
        unknown: Whether to add a last class, ``_unknown_``, of clips of the other words: in each split as many as a
            chosen word has on average.
        shots: Number of training clips per class, drawn by ``seed``; or None for all.
        splits_dir: Folder of the csv files, or of a folder of them per language, if not beside the audio.
        noise_dir: Folder of WAV files that training clips are mixed with; or None for generated noise.
        archives: Tar files that ``prepare_data`` unpacks into ``data_dir``, each once.
        batch_size: Number of clips in a batch; the last one of an epoch may be smaller.
        seed: Seed of order, augmentation and shots of the training clips.
        augment: Whether to move, mix with noise and mask the training clips.
        n_mels: Number of mel bands of a spectrogram.
        hop_ms: Time from one of its frames to the next, in milliseconds.
        cache: Where decoded clips are kept, ``"memory"`` or ``"disk"``, 32 kB each.
        cache_dir: Folder of those on disk; by default below the user's own cache folder.
        skip_broken: Whether to leave out clips that cannot be decoded, and log how many.
        num_workers: Number of processes that load; none is enough, as the clips are decoded before.
        split_seed: Seed that draws the clips of unknown words.

    Raises:
        UserError: if files are missing or are not MSWC's, a word is not there, or an argument is out of its range.

    Example::

        data = MSWC("data/mswc", languages=["en"], num_words=10, archives=["en.tar.gz", "en_splits.tar.gz"])
        data.prepare_data()
        data.setup()
        waveforms, labels, draws = next(iter(data.train_dataloader()))  # (64, 16000) int16, (64,), (64, 12)
        spectrograms, labels = data.front_end((waveforms, labels, draws))  # (64, 1, 97, 40); a Trainer does this
    """

    normalization = None  # spectrograms have constants of their own

    def __init__(
        self,
        data_dir: str | Path,
        languages: Sequence[str] = ("en",),
        words: Sequence[str] | None = None,
        num_words: int | None = None,
        unknown: bool = False,
        shots: int | None = None,
        splits_dir: Path | None = None,
        noise_dir: Path | None = None,
        archives: Sequence[Path] = (),
        batch_size: int = 64,
        seed: int = 0,
        augment: bool = True,
        n_mels: int = 40,
        hop_ms: int = 10,
        cache: CacheName = "memory",
        cache_dir: Path | None = None,
        skip_broken: bool = False,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.input_shape = spectrogram_shape(n_mels, hop_ms)
        self.languages = _checked_languages(languages)
        _check_choice(words, num_words, shots, batch_size)
        self.data_dir = Path(data_dir).expanduser()
        self.words = words
        self.num_words = num_words
        self.unknown = unknown
        self.shots = shots
        self.splits_dir = Path(splits_dir).expanduser() if splits_dir else None
        self.noise_dir = Path(noise_dir).expanduser() if noise_dir else None
        self.archives = [Path(archive).expanduser() for archive in archives]
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.n_mels = n_mels
        self.hop_ms = hop_ms
        self.cache = cache
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.skip_broken = skip_broken
        self.num_workers = num_workers
        self.split_seed = split_seed
        self._train: KeywordClips | None = None

    def prepare_data(self) -> None:
        """Unpack the archives that are not unpacked yet and, with a cache on disk, decode the clips into it."""
        for archive in self.archives:
            unpack_mswc(archive, self.data_dir, self.languages)
        if self.cache == "disk":
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read the splits and decode the clips, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        noise = generated_noise() if self.noise_dir is None else read_noise(self.noise_dir)
        front_end = KeywordFrontEnd(self.n_mels, self.hop_ms, noise)
        paths, labels, split_of, class_names = self._choose()
        clips, decodable = decode_clips(
            paths, self.cache, self.cache_dir, f"mswc_{'_'.join(self.languages)}", self.skip_broken
        )
        without_dev = np.flatnonzero(check_classes(labels[decodable], split_of[decodable], class_names)[1] == 0)
        if len(without_dev):
            rank_zero_only(log.warning)(
                "%d of %d classes have no clips in the dev split and do not count in validation, %s the first",
                *(len(without_dev), len(class_names), class_names[without_dev[0]]),
            )
        rows = [decodable[split_of[decodable] == split] for split in range(len(SPLITS))]
        seed = self.seed if self.augment else None
        self.front_end = front_end
        self.class_names = class_names
        self.num_classes = len(class_names)
        self._val, self._test = (KeywordClips(clips, of_split, labels[of_split]) for of_split in rows[1:])
        self._train = KeywordClips(clips, rows[0], labels[rows[0]], seed)
        self.train_samples, self.val_samples, self.test_samples = map(len, rows)

    def _choose(self) -> tuple[list[Path], np.ndarray, np.ndarray, list[str]]:
        """The files of the clips in use, their classes and splits (N,), and the names of the classes."""
        splits = read_languages(self.languages, {language: self._csv_folders(language) for language in self.languages})
        chosen = choose_words(splits, self.languages, self.words, self.num_words)
        several = len(self.languages) > 1
        class_names = [splits.words[index] if several else splits.words[index].partition("/")[2] for index in chosen]
        class_names += [UNKNOWN] * self.unknown
        if len(class_names) < 2:
            raise UserError(
                f"classes: {len(class_names)}, but a classifier needs two: choose more words, or give --unknown true"
            )
        rows, labels = choose_clips(splits, chosen, self.unknown, self.split_seed)
        if self.shots is not None:
            kept = few_shots(rows, labels, splits, self.shots, self.seed, class_names)
            rows, labels = rows[kept], labels[kept]
        check_classes(labels, splits.split_of[rows], class_names)
        paths, there = find_clips(splits, rows, self.data_dir)
        rows, labels = rows[there], labels[there]
        check_classes(labels, splits.split_of[rows], class_names)
        return paths, labels, splits.split_of[rows], class_names

    def _csv_folders(self, language: str) -> list[Path]:
        folder = self.data_dir / language
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist: get the audio and the splits of {language!r} at {ADDRESS} (or of "
                "MLCommons/ml_spoken_words at Hugging Face), and give both as --archives, or unpack them so that "
                f"there are {folder / 'clips'} and {folder / language}_train.csv"
            )
        if self.splits_dir is None:
            return [folder]
        if not self.splits_dir.is_dir():
            raise UserError(f"splits_dir {self.splits_dir} is not a folder: give that of the csv files")
        return [self.splits_dir / language, self.splits_dir]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Spectrograms of a batch, computed where the batch is."""
        return self.front_end(batch)

    def train_dataloader(self) -> DataLoader:
        return data_loader(self._train, self.batch_size, shuffle_seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return data_loader(self._val, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return data_loader(self._test, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)


def _checked_languages(languages: Sequence[str]) -> list[str]:
    languages = [languages] if isinstance(languages, str) else list(languages)
    if not languages or len(set(languages)) < len(languages):
        raise UserError(f"languages is {languages}: give one code or several, each once, such as en")
    return languages


def _check_choice(words: Sequence[str] | None, num_words: int | None, shots: int | None, batch_size: int) -> None:
    if words is not None and num_words is not None:
        raise UserError("words and num_words are two ways to choose: give one of them")
    for name, value in (("num_words", num_words), ("shots", shots), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")


def read_noise(folder: Path) -> np.ndarray:
    """The WAV files of a folder one after another, int16 of shape (samples,) at 16 kHz.

    Raises:
        UserError: if it is no folder, has no WAV files, or one cannot be read.

    Example::

        read_noise(Path("speech_commands_v0.02/_background_noise_"))
    """
    if not folder.is_dir():
        raise UserError(f"noise_dir {folder} is not a folder: give one with WAV files, or none")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".wav")
    if not paths:
        raise UserError(f"noise_dir {folder} has no WAV files: give another folder, or none")
    return join_recordings([read_audio(path) for path in paths])
