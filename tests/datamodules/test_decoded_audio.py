"""Clips are one second at 16 kHz, the same from memory and from disk, and the disk holds whole sets or none."""

import collections
import json
import os
import re
import shutil
import signal
import threading
import time
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.datamodules import decoded_audio
from microtune.datamodules.decoded_audio import decode_clips, default_cache_dir, one_second, read_audio
from microtune.datamodules.spectrogram_shape import CLIP_SAMPLES
from microtune.modules.user_error import UserError


def write_wav(path, samples, rate_hz=16_000, **kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz, **kind)
    return path


def sine(frequency_hz, seconds, rate_hz, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def dominant_hz(samples):
    spectrum = abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16_000 / len(samples)


@pytest.fixture
def paths(tmp_path):
    """Five clips of noise, from half a second to one and a half."""
    random = np.random.default_rng(0)
    lengths = [8000, 15_999, 16_000, 16_001, 24_000]
    clips = [random.integers(-(2**15), 2**15, length).astype(np.int16) for length in lengths]
    return [write_wav(tmp_path / "clips" / f"{number}.wav", clip) for number, clip in enumerate(clips)]


@pytest.fixture
def broken_paths(paths):
    """The same with two that cannot be decoded, the second and the fourth."""
    paths[1].write_bytes(b"no sound")
    paths[3].unlink()
    paths[3].mkdir()
    return paths


@pytest.fixture
def no_decoding(monkeypatch):
    """Called, it makes every further attempt to read a clip an error."""

    def refuse(path):
        raise AssertionError(f"{path} is decoded again")

    return lambda: monkeypatch.setattr(decoded_audio, "read_audio", refuse)


def test_a_16_khz_wav_is_read_as_it_is(tmp_path):
    samples = np.arange(-(2**15), 2**15).astype(np.int16)
    read = read_audio(write_wav(tmp_path / "all.wav", samples))
    assert read.dtype == np.int16
    assert (read == samples).all()


def test_a_flac_is_read_as_it_is(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 5000).astype(np.int16)
    assert (read_audio(write_wav(tmp_path / "clip.flac", samples)) == samples).all()


def test_two_channels_are_averaged(tmp_path):
    channels = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, 2)).astype(np.int16)
    channels[:3] = [[2**15 - 1, 2**15 - 1], [-(2**15), -(2**15)], [2**15 - 1, -(2**15)]]
    read = read_audio(write_wav(tmp_path / "stereo.wav", channels))
    assert (read == np.rint(channels.astype(np.float64).mean(axis=1))).all()


def test_what_is_too_loud_is_clipped(tmp_path):
    samples = np.array([1.5, -1.5, 1.0, -1.0, 0.5])
    read = read_audio(write_wav(tmp_path / "loud.wav", samples, subtype="FLOAT"))
    assert read.tolist() == [32767, -32768, 32767, -32768, 16384]


SOUNDS = [
    (8000, 1, {}),
    (44_100, 1, {}),
    (44_100, 2, {}),
    (48_000, 2, {"subtype": "PCM_24"}),
    (48_000, 1, {"format": "OGG", "subtype": "OPUS"}),
    (48_000, 2, {"format": "OGG", "subtype": "OPUS"}),
]


@pytest.mark.parametrize(
    ("rate_hz", "channels", "kind", "frequency_hz"),
    [(*sound, frequency_hz) for sound in SOUNDS for frequency_hz in (200, 1000, 5000) if frequency_hz < sound[0] / 2],
)
def test_other_rates_keep_length_pitch_and_loudness(tmp_path, rate_hz, channels, kind, frequency_hz):
    tone = np.stack([sine(frequency_hz, 0.9, rate_hz)] * channels, axis=1)
    read = read_audio(write_wav(tmp_path / "tone", tone, rate_hz, **{"format": "WAV", **kind}))
    assert len(read) == round(0.9 * 16_000)
    assert abs(dominant_hz(read) - frequency_hz) < 2
    loudness = np.sqrt(((read[1000:-1000] / 32768.0) ** 2).mean()) / 0.5 * 2**0.5
    assert 0.97 < loudness < 1.03


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path):
    read = read_audio(write_wav(tmp_path / "high.wav", sine(11_000, 1, 44_100), 44_100))
    assert abs(read[200:-200]).max() < 0.01 * 32768


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 2000), rate_hz=st.sampled_from([8000, 11_025, 22_050, 24_000, 44_100, 48_000]))
def test_the_length_of_any_resampled_recording(tmp_path_factory, samples, rate_hz):
    path = tmp_path_factory.getbasetemp() / "resampled.wav"
    read = read_audio(write_wav(path, np.zeros(samples, np.int16), rate_hz))
    assert len(read) == -(-samples * 16_000 // rate_hz)


@pytest.mark.parametrize("content", [b"", b"no sound", b"RIFF\0\0\0\0WAVE", b"OggS" * 50])
def test_what_cannot_be_decoded_is_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} .*: remove it or give --skip_broken true$"):
        read_audio(path)


@pytest.mark.parametrize(
    ("rate_hz", "kind"),
    [
        (16_000, {"format": "WAV"}),
        (16_000, {"format": "WAV", "subtype": "FLOAT"}),
        (16_000, {"format": "WAVEX"}),
        (16_000, {"format": "FLAC"}),
        (48_000, {"format": "OGG", "subtype": "OPUS"}),
    ],
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_recording_cut_anywhere_is_refused(tmp_path_factory, rate_hz, kind, data):
    path = tmp_path_factory.getbasetemp() / "cut"
    content = write_wav(path, sine(440, 0.5, rate_hz), rate_hz, **kind).read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, 100) | st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} .*: remove it or give --skip_broken true$"):
        read_audio(path)


def test_a_wav_cut_short_is_named_with_its_bytes(tmp_path):
    path = write_wav(tmp_path / "cut.wav", np.ones(1000, np.int16))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cut\.wav is cut short \(1500 of 2000 bytes\): remove it or give"):
        read_audio(path)


def test_a_wav_written_into_a_pipe_is_whole(tmp_path):
    path = write_wav(tmp_path / "piped.wav", np.arange(1000).astype(np.int16))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"  # such programs do not know the sizes of file and data
    path.write_bytes(content)
    assert read_audio(path).tolist() == list(range(1000))


def test_what_stands_behind_the_sound_is_not_read(tmp_path):
    path = write_wav(tmp_path / "tagged.wav", np.arange(1000).astype(np.int16))
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert read_audio(path).tolist() == list(range(1000))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.wav cannot be decoded \(.*\): remove it or give --skip_broken true"):
        read_audio(tmp_path / "missing.wav")


def test_a_recording_of_nothing_is_named(tmp_path):
    path = write_wav(tmp_path / "empty.wav", np.zeros(0, np.int16))
    with pytest.raises(UserError, match=r"empty\.wav holds no sound: remove it or give --skip_broken true"):
        read_audio(path)


@given(length=st.integers(1, CLIP_SAMPLES) | st.integers(CLIP_SAMPLES - 3, CLIP_SAMPLES))
def test_short_clips_are_between_silences(length):
    samples = np.full(length, 7, np.int16)
    clip = one_second(samples)
    sound = np.flatnonzero(clip)
    before, behind = sound[0], CLIP_SAMPLES - 1 - sound[-1]
    assert clip.shape == (CLIP_SAMPLES,)
    assert clip.dtype == np.int16
    assert (sound == np.arange(before, before + length)).all()
    assert behind - before in (0, 1)


@given(length=st.integers(CLIP_SAMPLES, 60_000) | st.integers(CLIP_SAMPLES, CLIP_SAMPLES + 5))
def test_of_long_clips_the_middle_is_taken(length):
    clip = one_second(np.arange(length))
    before, behind = clip[0], length - 1 - clip[-1]
    assert (clip == np.arange(before, before + CLIP_SAMPLES)).all()
    assert behind - before in (0, 1)


def test_one_second_is_left_as_it_is():
    samples = np.arange(CLIP_SAMPLES).astype(np.int16)
    assert (one_second(samples) == samples).all()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_clips_are_the_files_seconds_in_their_order(paths, tmp_path, cache):
    many = [paths[number % 5] for number in range(200)]  # more than one job of a thread
    clips, decodable = decode_clips(many, cache, tmp_path / "cache")
    assert clips.shape == (200, CLIP_SAMPLES)
    assert clips.dtype == np.int16
    assert decodable.tolist() == list(range(200))
    for clip, path in zip(clips, many, strict=True):
        assert (clip == one_second(soundfile.read(path, dtype="int16")[0])).all()


def test_memory_and_disk_give_the_same_bits(paths, tmp_path):
    opus = tmp_path / "clips" / "other.opus"
    paths.append(write_wav(opus, sine(440, 1, 48_000), 48_000, format="OGG", subtype="OPUS"))
    in_memory, _ = decode_clips(paths)
    on_disk, _ = decode_clips(paths, "disk", tmp_path / "cache")
    again, _ = decode_clips(paths, "disk", tmp_path / "cache")
    assert in_memory.tobytes() == on_disk.tobytes() == again.tobytes()


def test_memory_writes_no_cache(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    decode_clips(paths, "memory", tmp_path / "cache")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "clips"]


def test_the_disk_is_decoded_to_once(paths, tmp_path, no_decoding):
    first, _ = decode_clips(paths, "disk", tmp_path / "cache", name="words")
    no_decoding()
    second, decodable = decode_clips(paths, "disk", tmp_path / "cache", name="words")
    assert (first == second).all()
    assert decodable.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("words-")


def test_the_users_own_cache_folder_is_the_default(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "microtune"
    decode_clips(paths, "disk")
    assert len(list(default_cache_dir().iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "microtune"


def test_the_tilde_of_a_cache_folder_is_the_home(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    decode_clips(paths, "disk", decoded_audio.Path("~/decoded"))
    assert len(list((tmp_path / "home" / "decoded").iterdir())) == 1


@pytest.mark.parametrize("change", ["time", "size", "order", "fewer", "folder"])
def test_other_clips_are_another_cache(paths, tmp_path, change):
    cache_dir = tmp_path / "cache"
    decode_clips(paths, "disk", cache_dir)
    found = paths[2].stat()
    if change == "time":
        os.utime(paths[2], ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
    elif change == "size":
        write_wav(paths[2], np.ones(12_000, np.int16))
        os.utime(paths[2], ns=(found.st_atime_ns, found.st_mtime_ns))
    elif change == "order":
        paths = paths[::-1]
    elif change == "fewer":
        paths = paths[1:]
    elif change == "folder":
        shutil.copytree(tmp_path / "clips", tmp_path / "copy")
        paths = [tmp_path / "copy" / path.name for path in paths]
    clips, _ = decode_clips(paths, "disk", cache_dir)
    assert (clips == decode_clips(paths)[0]).all()
    assert len(list(cache_dir.iterdir())) == 2


def test_a_relative_path_is_the_same_cache(paths, tmp_path, monkeypatch, no_decoding):
    decode_clips(paths, "disk", tmp_path / "cache")
    no_decoding()
    monkeypatch.chdir(tmp_path)
    decode_clips([path.relative_to(tmp_path) for path in paths], "disk", tmp_path / "cache")


@pytest.mark.parametrize("how", ["Ctrl-C", KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_interrupted_decoding_leaves_nothing(paths, tmp_path, monkeypatch, how, cache):
    lock, calls = threading.Lock(), []

    def interrupted(path):
        with lock:
            calls.append(path)
            number = len(calls)
        if number == 100 and how == "Ctrl-C":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        elif number == 100:
            raise how
        time.sleep(0.001 * (number > 100))
        return read_audio(path)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(decoded_audio, "read_audio", interrupted)
    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else how):
        decode_clips(paths * 200, cache, tmp_path / "cache")
    assert len(calls) < 1000  # nor does it go on to the end
    assert not (tmp_path / "cache").is_dir() or list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    assert len(decode_clips(paths, cache, tmp_path / "cache")[1]) == 5


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_the_first_broken_file_is_named(broken_paths, tmp_path, cache):
    expected = rf"{re.escape(str(broken_paths[1]))} cannot be decoded \(.+\): remove it or give --skip_broken true"
    with pytest.raises(UserError, match=expected):
        decode_clips(broken_paths, cache, tmp_path / "cache")
    assert cache == "memory" or list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_files_are_left_out_with_one_warning(broken_paths, tmp_path, cache, caplog):
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        clips, decodable = decode_clips(broken_paths, cache, tmp_path / "cache", skip_broken=True)
        assert decodable.tolist() == [0, 2, 4]
        assert np.issubdtype(decodable.dtype, np.integer)
        assert clips.any(axis=1).tolist() == [True, False, True, False, True]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.message.startswith(f"2 of 5 clips are left out: {broken_paths[1]} cannot be decoded")
        assert record.message.endswith(", the first")


def test_only_broken_files(broken_paths):
    clips, decodable = decode_clips([broken_paths[1]], skip_broken=True)
    assert clips.shape == (1, CLIP_SAMPLES)
    assert decodable.tolist() == []


def test_whole_files_give_no_warning(paths, caplog):
    decode_clips(paths, skip_broken=True)
    assert not caplog.records


def test_a_path_with_a_colon_is_named_whole(tmp_path, caplog):
    path = tmp_path / "a:b" / "broken.wav"
    path.parent.mkdir()
    path.write_bytes(b"no sound")
    decode_clips([path], skip_broken=True)
    assert str(path) in caplog.text


def test_a_cache_with_broken_files_is_refused_without_skip_broken(broken_paths, tmp_path, no_decoding):
    decode_clips(broken_paths, "disk", tmp_path / "cache", skip_broken=True)
    no_decoding()
    expected = rf"{re.escape(str(broken_paths[1]))} cannot be decoded \(.+\): remove it or give --skip_broken true"
    with pytest.raises(UserError, match=expected):
        decode_clips(broken_paths, "disk", tmp_path / "cache")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_missing_clip_is_a_broken_one(paths, tmp_path, cache):
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1\.wav cannot be decoded"):
        decode_clips(paths, cache, tmp_path / "cache")
    assert decode_clips(paths, cache, tmp_path / "cache", skip_broken=True)[1].tolist() == [0, 2, 3, 4]


# Such a name is text with lone surrogates, which no encoder takes.
def test_a_file_name_that_is_no_unicode(paths, tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff.wav")
    shutil.copy(paths[0], odd)
    assert (decode_clips([odd], "disk", tmp_path / "cache")[0] == decode_clips([paths[0]])[0]).all()


def test_no_clips_at_all(tmp_path):
    for cache in ("memory", "disk"):
        clips, decodable = decode_clips([], cache, tmp_path / "cache")
        assert clips.shape == (0, CLIP_SAMPLES)
        assert decodable.tolist() == []


def test_another_process_may_be_first(paths, tmp_path, monkeypatch):
    lock, started = threading.Lock(), []

    def read_late(path):
        with lock:  # before the first clip is read, another process decodes all of them
            if not started:
                started.append(path)
                with monkeypatch.context() as patch:
                    patch.setattr(decoded_audio, "read_audio", read_audio)
                    decode_clips(paths, "disk", tmp_path / "cache")
        return read_audio(path)

    monkeypatch.setattr(decoded_audio, "read_audio", read_late)
    clips, _ = decode_clips(paths, "disk", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["broken.json", "clips.npy"]
    assert json.loads((folder / "broken.json").read_text()) == []
    assert (clips == decode_clips(paths)[0]).all()


def test_too_little_memory(paths, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 2_000_000}.get)  # 2 GB
    many = [paths[0]] * 31_251
    with pytest.raises(
        UserError, match=r"need 1\.0 GB of the machine's 2\.0 GB of memory: give --cache disk, or fewer words"
    ):
        decode_clips(many)
    assert len(decode_clips(paths)[0]) == 5


@pytest.mark.parametrize("exception", [ValueError, OSError])
def test_a_system_that_does_not_tell_its_memory(paths, monkeypatch, exception):
    def unknown(name):
        raise exception(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert len(decode_clips(paths)[0]) == 5


def test_too_little_room_on_disk(paths, tmp_path, monkeypatch, no_decoding):
    usage = collections.namedtuple("usage", "total used free")
    no_decoding()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10 - 159_999, 159_999))
    with pytest.raises(UserError, match=r"cache has 0\.0 GB left, 5 clips need 0\.0 GB: make room or give"):
        decode_clips(paths, "disk", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_true_clip_of_the_spoken_words_corpus(shared_data):
    path = shared_data / "mswc" / "common_voice_en_10504.opus"
    assert soundfile.info(path).frames == 48_000
    read = read_audio(path)
    assert read.shape == (CLIP_SAMPLES,)
    assert 100 < abs(read.astype(int)).max() < 32767
    original = soundfile.read(path)[0]
    ours, theirs = abs(np.fft.rfft(read / 32768)) / 16_000, abs(np.fft.rfft(original))[:8001] / 48_000
    assert abs(ours - theirs)[:7000].max() < 0.02 * theirs.max()


def test_true_speech_commands_are_read_as_they_are(shared_data, tmp_path):
    paths = sorted((shared_data / "SpeechCommands/speech_commands_v0.02/right").glob("*.wav"))[:20]
    clips, decodable = decode_clips(paths, "disk", tmp_path / "cache")
    assert decodable.tolist() == list(range(20))
    for clip, path in zip(clips, paths, strict=True):
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert (read_audio(path) == samples).all()
        assert (clip == one_second(samples)).all()
