"""Speech clips decoded once: one second at 16 kHz each, held in memory or in a file on disk."""

import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import get_args

import numpy as np
import soundfile
import torch
from lightning.pytorch.utilities import rank_zero_only
from torchaudio.transforms import Resample

from microtune.datamodules.option_names import CacheName
from microtune.datamodules.progress import progress_bar
from microtune.datamodules.spectrogram_shape import CLIP_SAMPLES, SAMPLE_RATE_HZ
from microtune.modules.atomic_files import whole_folder, write_json
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

CLIP_BYTES = 2 * CLIP_SAMPLES
CLIPS_PER_JOB = 64
REMEDY = ": remove it or give --skip_broken true"

# a rate that has hardly a divisor in common with 16 kHz, as a damaged header says, would be resampled by gigabytes
MOST_PHASES = 1000

# libsndfile reads what is left of a WAV, and only remarks on it
CUT_SHORT = re.compile(r"^data : (?P<said>\d+) \(should be (?P<found>\d+)\)", re.MULTILINE)
UNKNOWN_BYTES = 2**31 - 4096  # programs that write into a pipe give sizes from about here on


def default_cache_dir() -> Path:
    """The folder for decoded clips that the XDG base directory specification gives to this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "microtune"


def read_audio(path: Path) -> np.ndarray:
    """Reads a recording: one channel at 16 kHz, whatever its own rate and channels are.

    Returns:
        int16 samples of shape (samples,); those of a 16 kHz WAV of one channel as they are in the file.

    Raises:
        UserError: if it cannot be read, is cut short or is empty.

    Example::

        read_audio(Path("_background_noise_/pink_noise.wav")).shape  # (960000,)
    """
    try:
        with path.open("rb") as opened, soundfile.SoundFile(opened) as file:
            samples, rate_hz, remarks = file.read(dtype="float32", always_2d=True), file.samplerate, file.extra_info
    except (soundfile.SoundFileError, OSError) as error:
        reason = getattr(error, "error_string", error)
        raise UserError(f"{path} cannot be decoded ({reason}){REMEDY}") from error
    cut = CUT_SHORT.search(remarks)
    if cut and int(cut["said"]) < UNKNOWN_BYTES:
        raise UserError(f"{path} is cut short ({cut['found']} of {cut['said']} bytes){REMEDY}")
    if not len(samples):
        raise UserError(f"{path} holds no sound{REMEDY}")
    if rate_hz // math.gcd(rate_hz, SAMPLE_RATE_HZ) > MOST_PHASES:
        raise UserError(f"{path} has an odd rate of {rate_hz} Hz{REMEDY}")
    mono = samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        mono = _resampler(rate_hz)(torch.from_numpy(mono)).numpy()
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


@functools.cache
def _resampler(rate_hz: int) -> Resample:
    return Resample(rate_hz, SAMPLE_RATE_HZ)


def one_second(samples: np.ndarray) -> np.ndarray:
    """The middle second of a recording, or the whole of a shorter one with silence on both sides.

    Example::

        one_second(np.ones(8000, np.int16)).shape  # (16000,)
    """
    missing = CLIP_SAMPLES - len(samples)
    if missing > 0:
        return np.pad(samples, (missing // 2, missing - missing // 2))
    return samples[-missing // 2 :][:CLIP_SAMPLES]


def decode_clips(
    paths: Sequence[Path],
    cache: CacheName = "memory",
    cache_dir: Path | None = None,
    name: str = "clips",
    skip_broken: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes clips, all cores at once and with a progress bar, or takes what an earlier run left on disk.

    Args:
        paths: Files (N,).
        cache: Where clips are kept: ``"memory"`` decodes in every process, ``"disk"`` once, into a file
            that later runs map into memory: for sets that memory does not hold. 32 kB per clip either way.
        cache_dir: Folder of that file; by default below the user's own cache folder.
        name: First part of its name, which goes on with a hash of the clips' paths, sizes and times.
        skip_broken: Whether to leave out what cannot be decoded, and log how many.

    Returns:
        int16 clips of shape (N, 16000), and the indices of those that could be decoded; the others are silent.

    Raises:
        UserError: if a file cannot be decoded, or there is no room.

    Example::

        clips, decodable = decode_clips(paths, cache="disk", name="speech_commands")
    """
    if cache not in get_args(CacheName):
        raise UserError(f"cache is {cache!r}: give one of {', '.join(get_args(CacheName))}")
    if cache == "memory":
        _check_memory(len(paths) * CLIP_BYTES)
        clips = np.zeros((len(paths), CLIP_SAMPLES), np.int16)
        broken = _decode_into(clips, paths, name, skip_broken)
    else:
        folder = (cache_dir or default_cache_dir()).expanduser() / f"{name}-{_digest(paths)}"
        if not folder.is_dir():
            _decode_to_disk(folder, paths, name, skip_broken)
        clips = np.load(folder / "clips.npy", mmap_mode="r")
        broken = json.loads((folder / "broken.json").read_text(encoding="utf-8"))
    if broken and not skip_broken:
        raise UserError(broken[0]["error"])
    if broken:
        first = str(broken[0]["error"]).removesuffix(REMEDY)
        rank_zero_only(log.warning)("%d of %d clips are left out: %s, the first", len(broken), len(paths), first)
    return clips, np.setdiff1d(np.arange(len(paths)), [entry["index"] for entry in broken])


def _decode_to_disk(folder: Path, paths: Sequence[Path], name: str, skip_broken: bool) -> None:
    with whole_folder(folder) as partial:
        needed, free = len(paths) * CLIP_BYTES, shutil.disk_usage(partial).free
        if needed > free:
            raise UserError(
                f"{folder.parent} has {_gb(free)} left, {len(paths):,} clips need {_gb(needed)}: "
                "make room or give another --cache_dir"
            )
        clips = np.lib.format.open_memmap(partial / "clips.npy", "w+", np.int16, (len(paths), CLIP_SAMPLES))
        write_json(partial / "broken.json", _decode_into(clips, paths, name, skip_broken))
        clips.flush()
    rank_zero_only(log.info)("decoded clips are kept in %s (%s); delete it when you like", folder, _gb(needed))


def _decode_into(clips: np.ndarray, paths: Sequence[Path], name: str, skip_broken: bool) -> list[dict[str, int | str]]:
    """Fills ``clips``; returns index and error of those that cannot be decoded, or raises the first such error."""

    def decode(start: int) -> list[dict[str, int | str]]:
        broken = []
        for index in range(start, min(start + CLIPS_PER_JOB, len(paths))):
            try:
                clips[index] = one_second(read_audio(paths[index]))
            except UserError as error:
                if not skip_broken:
                    raise
                broken.append({"index": index, "error": str(error)})
        return broken

    broken = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar() as progress,
    ):
        task = progress.add_task(f"decoding {name}", total=len(paths))
        try:
            for found in pool.map(decode, range(0, len(paths), CLIPS_PER_JOB)):
                broken += found
                progress.advance(task, CLIPS_PER_JOB)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return broken


def _digest(paths: Sequence[Path]) -> str:
    """A hash of what the clips are: another file, or one that was changed, is another cache."""
    described = hashlib.sha256(f"{SAMPLE_RATE_HZ} {CLIP_SAMPLES}".encode())
    for path in paths:
        described.update(os.fsencode(os.path.abspath(path)))
        with suppress(OSError):  # a file that is not there is found missing where it is decoded
            found = os.stat(path)
            described.update(f" {found.st_size} {found.st_mtime_ns}\n".encode())
    return described.hexdigest()[:16]


def _check_memory(needed_bytes: int) -> None:
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not told on every system
        return
    needed_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every process of this machine has its own
    if needed_bytes > memory_bytes / 2:
        raise UserError(
            f"the decoded clips need {_gb(needed_bytes)} of the machine's {_gb(memory_bytes)} of memory: "
            "give --cache disk, or fewer words"
        )


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
