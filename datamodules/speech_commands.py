"""Google Speech Commands: spoken words of one second, in the splits that come with them."""

import http.client
import logging
import math
import posixpath
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch.hub
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchaudio.datasets import SPEECHCOMMANDS

from microtune.datamodules.archives import unpack
from microtune.datamodules.decoded_audio import decode_clips, read_audio
from microtune.datamodules.keyword_audio import Batch, KeywordClips, KeywordFrontEnd, generated_noise, join_recordings
from microtune.datamodules.option_names import CacheName, Task
from microtune.datamodules.reproducible_order import data_loader, random_bits
from microtune.datamodules.spectrogram_shape import CLIP_SAMPLES, spectrogram_shape
from microtune.modules.atomic_files import whole_folder
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

# Warden, "Speech Commands" (arXiv 1804.03209), section 5.8: the ten that a device is to tell apart
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHERS_V1 = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("bed", "bird", "cat", "dog", "happy", "house", "marvin", "sheila", "tree", "wow"),
)
WORDS = {1: {*COMMANDS, *OTHERS_V1}, 2: {*COMMANDS, *OTHERS_V1, "backward", "follow", "forward", "learn", "visual"}}
UNKNOWN, SILENCE = "_unknown_", "_silence_"
BACKGROUND_NOISE = "_background_noise_"

SPLITS = ("train", "val", "test")
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}

URL = "http://download.tensorflow.org/data/{name}.tar.gz"
SHA256 = {
    "speech_commands_v0.01": "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
    "speech_commands_v0.02": "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
}


class SpeechCommands(LightningDataModule):
    """Google Speech Commands, version 1 or 2, as log-mel spectrograms.

    The splits are those that the data set lists: no speaker is in two of them, which is checked. Silence is cut from
    the background noise, of each recording the first eight tenths for training, one tenth for validation, the last
    for the test; the first eight are also the noise that training clips are mixed with (see ``KeywordFrontEnd``).

    Args:
        data_dir: Folder that holds, or shall hold, ``SpeechCommands/speech_commands_v0.02`` (or ``v0.01``).
        task: Words to tell apart: ``"words10"``, ten commands; ``"words12"``, these, other words and silence, a tenth
            as many of each as there are commands; or ``"all"``, every word there is, 35 in version 2 and 30 in version
            1.
        version: Version of the data set, 1 or 2.
        batch_size: Number of clips in a batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation of the training clips, which are functions of (seed, epoch, index).
        augment: Whether to move, mix with noise and mask the training clips.
        n_mels: Number of mel bands.
        hop_ms: Time from one window of the spectrogram to the next, in milliseconds.
        cache: Where decoded clips are kept: ``"memory"`` of each process, or a file on ``"disk"`` for later runs.
        cache_dir: Folder of that file; by default below the user's own cache folder.
        download: Whether to fetch the data (2.4 GB, version 1: 1.5 GB) where it is missing.
        skip_broken: Whether to leave out clips that cannot be decoded or whose name has no speaker, lines of the lists
            that name no clip, and empty folders, and log how many.
        num_workers: Number of processes that load; none is enough, as the clips are decoded before.
        split_seed: Seed that chooses the other words and the silence of ``"words12"``.

    Raises:
        UserError: if the data is missing or not as its makers left it, or an argument is out of its range.

    Example::

        data = SpeechCommands("data", task="words12", download=True)
        data.prepare_data()
        data.setup()
        batch = next(iter(data.train_dataloader()))  # clips as int16, labels, random numbers
        spectrograms, labels = data.on_after_batch_transfer(batch, 0)  # (64, 1, 97, 40), (64,); a Trainer calls this
    """

    normalization = None  # spectrograms have constants of their own

    def __init__(
        self,
        data_dir: str | Path,
        task: Task = "words12",
        version: Literal[1, 2] = 2,
        batch_size: int = 64,
        seed: int = 0,
        augment: bool = True,
        n_mels: int = 40,
        hop_ms: int = 10,
        cache: CacheName = "memory",
        cache_dir: Path | None = None,
        download: bool = False,
        skip_broken: bool = False,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if task not in ("words10", "words12", "all"):
            raise UserError(f"there is no task {task!r}: give words10, words12 or all")
        if version not in WORDS:
            raise UserError(f"there is no version {version} of Speech Commands: give 1 or 2")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is not positive: give a whole number such as 64")
        self.input_shape = spectrogram_shape(n_mels, hop_ms)
        self.folder = Path(data_dir).expanduser() / "SpeechCommands" / f"speech_commands_v0.0{version}"
        self.task = task
        self.version = version
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.n_mels = n_mels
        self.hop_ms = hop_ms
        self.cache = cache
        self.cache_dir = cache_dir
        self.download = download
        self.skip_broken = skip_broken
        self.num_workers = num_workers
        self.split_seed = split_seed
        self._decoded: tuple[np.ndarray, np.ndarray] | None = None
        self._train: KeywordClips | None = None

    def prepare_data(self) -> None:
        """Download the data if that was asked for and it is not there yet, and fill the cache if it is on disk."""
        if self.download and not self.folder.exists():
            download_whole(self.folder)
        if self.cache == "disk":
            self._choose_and_decode()

    def setup(self, stage: str | None = None) -> None:
        """List, split and decode the clips, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        self._choose_and_decode()
        noise = dict.fromkeys(SPLITS)
        if self.task == "words12" or self.augment:
            noise = read_noise(self.folder / BACKGROUND_NOISE, self.task, self.skip_broken)
        self._val, self._test = (self._clips_of(split, noise[split], seed=None) for split in ("val", "test"))
        self.front_end = KeywordFrontEnd(self.n_mels, self.hop_ms, noise["train"])
        self._train = self._clips_of("train", noise["train"], self.seed if self.augment else None)
        self.train_samples, self.val_samples, self.test_samples = map(len, (self._train, self._val, self._test))

    def _choose_and_decode(self) -> None:
        if self._decoded is not None:
            return
        if not self.folder.is_dir():
            url = URL.format(name=self.folder.name)
            if "SpeechCommands" in self.folder.parents[1].parts:
                raise UserError(f"{self.folder} does not exist: data_dir is the folder that holds SpeechCommands/")
            raise UserError(
                f"{self.folder} does not exist: give --download true (or --data_options.download true), or unpack "
                f"{url} there"
            )
        speakers = list_clips(self.folder, self.version, self.skip_broken)
        split_of = read_splits(self.folder, speakers, self.skip_broken)
        check_speakers(speakers, split_of)
        words = COMMANDS if self.task != "all" else tuple(sorted({word_of(path) for path in speakers}))
        missing = set(words) - {word_of(path) for path in speakers}
        if missing:
            raise UserError(f"{self.folder / min(missing)} has no clips, and task {self.task} needs some: add them")
        self.class_names = [*words, UNKNOWN, SILENCE] if self.task == "words12" else list(words)
        self.num_classes = len(self.class_names)
        self._chosen = {}
        for split in SPLITS:
            paths = [path for path in speakers if split_of[path] == split]
            self._chosen[split] = choose_clips(paths, words, self.task == "words12", self.split_seed)
        paths = [self.folder / path for split in SPLITS for path in self._chosen[split][0]]
        name = f"speech_commands_v{self.version}"
        self._decoded = decode_clips(paths, self.cache, self.cache_dir, name, self.skip_broken)

    def _clips_of(self, split: str, noise: np.ndarray | None, seed: int | None) -> KeywordClips:
        clips, decodable = self._decoded
        first = sum(len(self._chosen[earlier][0]) for earlier in SPLITS[: SPLITS.index(split)])
        all_labels = np.array(self._chosen[split][1], np.int64)
        rows = decodable[(decodable >= first) & (decodable < first + len(all_labels))]
        labels = all_labels[rows - first]
        if split != "train" and not len(labels):
            raise UserError(f"{self.folder / LISTS[split]} names no clip of task {self.task}: add some of its words")
        if self.task == "words12":
            count = _a_tenth((all_labels < len(COMMANDS)).sum())
            bits = random_bits(self.split_seed, SPLITS.index(split), np.arange(count), draws=1)[:, 0]
            clips = ClipsAndNoise(clips, noise, (bits % np.uint64(len(noise) - CLIP_SAMPLES + 1)).astype(np.int64))
            rows = np.concatenate([rows, np.arange(len(clips) - count, len(clips))])
            labels = np.concatenate([labels, np.full(count, self.class_names.index(SILENCE))])
        absent = np.setdiff1d(np.arange(self.num_classes), labels)
        if split == "train" and len(absent):
            name = self.class_names[absent[0]]
            raise UserError(f"class {name} has no training clip in {self.folder}: add some that the lists do not name")
        return KeywordClips(clips, rows, labels, seed)

    def train_dataloader(self) -> DataLoader:
        return data_loader(self._train, self.batch_size, shuffle_seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return data_loader(self._val, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return data_loader(self._test, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Spectrograms and labels, computed where the batch is."""
        return self.front_end(batch)


class ClipsAndNoise:
    """Decoded clips, and behind them seconds of background noise; neither is copied before it is asked for.

    Args:
        clips: Clips, int16 of shape (clips, 16000), in memory or mapped from disk.
        noise: Background noise, int16 of shape (samples,), a second or more.
        starts: Where in it each second begins (N,).

    Example::

        clips = ClipsAndNoise(np.zeros((3, 16000), np.int16), np.ones(20000, np.int16), np.array([0, 4000]))
        clips[np.array([0, 4])]  # the first clip and the second piece of noise: (2, 16000)
    """

    def __init__(self, clips: np.ndarray, noise: np.ndarray, starts: np.ndarray) -> None:
        self.clips = clips
        self.noise = noise
        self.starts = starts

    def __len__(self) -> int:
        return len(self.clips) + len(self.starts)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        of_noise = rows >= len(self.clips)
        found = np.empty((len(rows), CLIP_SAMPLES), np.int16)
        found[~of_noise] = self.clips[rows[~of_noise]]
        seconds = np.lib.stride_tricks.sliding_window_view(self.noise, CLIP_SAMPLES)
        found[of_noise] = seconds[self.starts[rows[of_noise] - len(self.clips)]]
        return found


def download_whole(folder: Path) -> None:
    """Download and unpack Speech Commands beside ``folder`` and rename it last: what is there under that name is whole.

    torchaudio's own download unpacks in place, and takes what an interrupted one left for the data set.

    Args:
        folder: Folder where the unpacked files shall be; its name tells the version.

    Raises:
        UserError: if the download fails, its SHA-256 is another, or it cannot be unpacked.

    Example::

        download_whole(Path("data/SpeechCommands/speech_commands_v0.02"))
    """
    url = URL.format(name=folder.name)
    with whole_folder(folder) as partial:
        archive = partial / f"{folder.name}.tar.gz"
        try:
            torch.hub.download_url_to_file(url, str(archive), hash_prefix=SHA256[folder.name])
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"{url} could not be downloaded ({error}): fetch it yourself and unpack it in {folder}"
            ) from error
        unpack(archive, partial)
        archive.unlink()


def word_of(path: str) -> str:
    """The word of a clip, ``"yes/0a7c2a8d_nohash_0.wav"``."""
    return path.partition("/")[0]


def list_clips(folder: Path, version: int, skip_broken: bool) -> dict[str, str]:
    """Return the speaker of each clip, the clips sorted; hidden files and folders are passed over.

    Args:
        folder: Folder of the words' folders.
        version: Version of the data set, 1 or 2.
        skip_broken: Whether to leave out empty folders and files whose name has no speaker, and log how many.

    Raises:
        UserError: if there are not two words, a folder is none of the data set's words or empty, or the name of a file
            has no speaker.

    Example::

        list_clips(Path("speech_commands_v0.02"), version=2, skip_broken=False)  # {"bed/00176480_nohash_0.wav": ...}
    """
    words = [path.name for path in _visible(folder) if path.is_dir() and path.name != BACKGROUND_NOISE]
    for word in words:
        if word not in WORDS[version]:
            raise UserError(
                f"{folder / word} is none of the {len(WORDS[version])} words of Speech Commands version {version}: "
                "move it elsewhere"
            )
    if len(words) < 2:
        raise UserError(f"{folder} has {len(words)} words, a folder each: delete it and give --download true")
    found = [f"{word}/{path.name}" for word in words for path in _visible(folder / word)]
    source = SPEECHCOMMANDS(folder.parents[1], url=folder.name, folder_in_archive=folder.parent.name)
    speaker_of = {}
    for index in range(len(source)):
        with suppress(ValueError):  # a name that torchaudio cannot take apart
            path, _, _, speaker, _ = source.get_metadata(index)
            speaker_of[Path(path).relative_to(folder.name).as_posix()] = speaker
    speakers = {path: speaker_of[path] for path in found if speaker_of.get(path)}
    odd = [folder / path for path in found if path not in speakers]
    empty = [folder / word for word in sorted(set(words) - {word_of(path) for path in speakers})]
    if odd and not skip_broken:
        raise UserError(
            f"{odd[0]} is not named <speaker>_nohash_<number>.wav, and its speaker is not known: "
            "remove it or give --skip_broken true"
        )
    if empty and not skip_broken:
        raise UserError(f"class folder {empty[0]} has no clips: add some, remove it or give --skip_broken true")
    _warn_of(odd, "files not named <speaker>_nohash_<number>.wav")
    _warn_of(empty, "class folders without clips")
    return speakers


def read_splits(folder: Path, clips: Iterable[str], skip_broken: bool) -> dict[str, str]:
    """Return the split of each clip: ``"val"`` or ``"test"`` where a list names it, else ``"train"``.

    Args:
        folder: Folder with ``validation_list.txt`` and ``testing_list.txt``.
        clips: Word and file name of every clip.
        skip_broken: Whether to pass over lines that name no clip, and log how many.

    Raises:
        UserError: if a list is missing, names no clip or one of the other list, or leaves the folder.

    Example::

        read_splits(Path("speech_commands_v0.02"), ["yes/0a7c2a8d_nohash_0.wav"], skip_broken=False)
    """
    split_of = dict.fromkeys(clips, "train")
    words = {word_of(path) for path in split_of}
    no_clips = []
    for split, name in LISTS.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: take it from the archive {URL.format(name=folder.name)}")
        lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            path = posixpath.normpath(line.strip())
            place = f"{folder / name}, line {number}, {line.strip()}"
            if path.startswith(("../", "/")):
                raise UserError(f"{place}, leaves the folder: do not trust this list")
            if path not in split_of:
                no_clips.append(f"{place}, names {'no clip' if word_of(path) in words else 'an unknown word'}")
                continue
            if split_of[path] not in ("train", split):
                raise UserError(f"{place}, is in {LISTS['val']} as well: remove it from one of the two")
            split_of[path] = split
    if no_clips and not skip_broken:
        raise UserError(f"{no_clips[0]}: correct the list or give --skip_broken true")
    _warn_of(no_clips, "lines of the lists that name no clip")
    return split_of


def check_speakers(speakers: dict[str, str], split_of: dict[str, str]) -> None:
    """Refuse splits that share a speaker: a network would be tested on voices that it knows.

    Args:
        speakers: Speaker of each clip.
        split_of: Split of each clip.

    Raises:
        UserError: if they do; it names the speaker and two clips.

    Example::

        check_speakers({"yes/a_nohash_0.wav": "a", "no/a_nohash_0.wav": "a"}, split_of)
    """
    first_of = {}
    for path, speaker in speakers.items():
        first = first_of.setdefault(speaker, path)
        if split_of[first] != split_of[path]:
            raise UserError(
                f"speaker {speaker} is in two splits, {split_of[first]} ({first}) and {split_of[path]} ({path}): "
                f"correct {' and '.join(LISTS.values())}"
            )


def choose_clips(
    paths: Sequence[str], words: Sequence[str], with_unknown: bool, split_seed: int
) -> tuple[list[str], list[int]]:
    """Return the clips of a split that a task uses, and their labels.

    Args:
        paths: Clips of the split.
        words: Words that are the classes, in the order of their labels.
        with_unknown: Whether to add a class of other words, at most a tenth as many clips as there are of ``words``,
            as TensorFlow's ``speech_commands/input_data.py`` does.
        split_seed: Seed that chooses these.

    Example::

        choose_clips(["no/a_nohash_0.wav", "yes/a_nohash_0.wav"], ["yes", "no"], False, split_seed=0)  # ..., [1, 0]
    """
    label_of = {word: label for label, word in enumerate(words)}
    chosen = [path for path in paths if word_of(path) in label_of]
    labels = [label_of[word_of(path)] for path in chosen]
    if with_unknown:
        others = [path for path in paths if word_of(path) not in label_of]
        order = np.argsort(random_bits(split_seed, 0, np.arange(len(others)), draws=1)[:, 0], kind="stable")
        drawn = np.sort(order[: _a_tenth(len(chosen))])
        chosen += [others[index] for index in drawn]
        labels += [len(words)] * len(drawn)
    return chosen, labels


def read_noise(folder: Path, task: Task, skip_broken: bool) -> dict[str, np.ndarray | None]:
    """Read recordings of background noise and divide each in time, so that no sound is in two splits.

    Args:
        folder: Folder of the recordings.
        task: Task that it is for: ``"words12"`` needs a second or more in every split, the others in training.
        skip_broken: Whether to leave out recordings that cannot be read, and log how many.

    Returns:
        The splits' noise, int16 of shape (samples,); if there are no recordings, which is logged, generated noise for
        training and None.

    Raises:
        UserError: if a recording cannot be read, they are too short, or ``"words12"`` has none.

    Example::

        read_noise(Path("speech_commands_v0.02/_background_noise_"), "words12", skip_broken=False)["train"].shape
    """
    recordings, broken = [], []
    for path in _visible(folder) if folder.is_dir() else []:
        if path.suffix != ".wav":
            continue
        try:
            recordings.append(read_audio(path))
        except UserError:
            if not skip_broken:
                raise
            broken.append(path)
    _warn_of(broken, "recordings of background noise that cannot be decoded")
    if not recordings and task == "words12":
        raise UserError(
            f"{folder} has no recordings, and the silence of words12 is cut from them: "
            "take them from the data set's archive, or give --task words10"
        )
    if not recordings:
        rank_zero_only(log.warning)("%s has no recordings: generated noise is mixed into the training clips", folder)
        return {"train": generated_noise(), "val": None, "test": None}
    divided = [np.split(samples, [len(samples) * 8 // 10, len(samples) * 9 // 10]) for samples in recordings]
    noise = dict(zip(SPLITS, map(join_recordings, zip(*divided, strict=True)), strict=True))
    for split in SPLITS if task == "words12" else SPLITS[:1]:
        if len(noise[split]) < CLIP_SAMPLES:
            raise UserError(
                f"{folder} has {len(noise[split])} samples for the split {split}, less than a second: add recordings"
            )
    return noise


def _a_tenth(count: int) -> int:
    return math.ceil(count / 10)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _warn_of(left_out: Sequence[Path | str], what: str) -> None:
    if left_out:
        rank_zero_only(log.warning)("%s are left out: %d, %s the first", what, len(left_out), left_out[0])
