"""Speech Commands: the data set's own splits, the tasks cut from it, and trees that are not what they say."""

import hashlib
import io
import itertools
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torchaudio.datasets import speechcommands
from torchaudio.functional import resample

from microtune.datamodules import speech_commands
from microtune.datamodules.speech_commands import (
    COMMANDS,
    WORDS,
    ClipsAndNoise,
    SpeechCommands,
    choose_clips,
    list_clips,
    read_splits,
)
from microtune.modules.user_error import UserError

REAL = "SpeechCommands/speech_commands_v0.02"
OTHERS = ("bed", "dog", "zero")
# the last digit tells the split; a speaker has said every word once
SPEAKERS = {"train": ["a0", "b0", "c0", "d0"], "val": ["a1", "b1"], "test": ["a2"]}


def write_sound(path, samples, rate_hz=16000):
    file = io.BytesIO()  # a file of its own would be synced with the disk, which is slow
    soundfile.write(file, samples, rate_hz, subtype="PCM_16", format="WAV")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def fill(data_dir, version=2, words=COMMANDS + OTHERS):
    folder = data_dir / "SpeechCommands" / f"speech_commands_v0.0{version}"
    rng = np.random.default_rng(0)
    for word in words:
        for speaker in itertools.chain(*SPEAKERS.values()):
            write_sound(folder / word / f"{speaker}_nohash_0.wav", rng.integers(-9999, 9999, 16000).astype(np.int16))
    for split, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        lines = [f"{word}/{speaker}_nohash_0.wav\n" for word in sorted(words) for speaker in SPEAKERS[split]]
        (folder / name).write_text("".join(lines))
    # 32 + 24 seconds of which every sample tells its split
    for name, seconds in (("a", 32), ("b", 24)):
        values = np.repeat([1000, 2000, 3000], [seconds * 12800, seconds * 1600, seconds * 1600]).astype(np.int16)
        write_sound(folder / "_background_noise_" / f"{name}.wav", values)
    (folder / "_background_noise_" / "README.md").write_text("where the noise is from")
    return folder


@pytest.fixture
def tree(tmp_path):
    return fill(tmp_path)


def ready(folder, **arguments):
    data = SpeechCommands(folder.parents[1], **arguments)
    data.prepare_data()
    data.setup()
    return data


def batches(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def files(data):
    return [set(data._chosen[split][0]) for split in ("train", "val", "test")]


def add_line(path, line):
    path.write_text(path.read_text() + line + "\n")


def cut(path):
    path.write_bytes(path.read_bytes()[:20000])


def test_real_words12(shared_data):
    data = SpeechCommands(shared_data)
    assert data.input_shape == (1, 97, 40)
    data.prepare_data()
    data.setup()
    assert data.class_names == [*COMMANDS, "_unknown_", "_silence_"]
    assert data.num_classes == 12
    # 952, 197 and 351 clips of commands, and twice a tenth of each
    assert (data.train_samples, data.val_samples, data.test_samples) == (952 + 192, 197 + 40, 351 + 72)
    for loader, tenth in ((data.train_dataloader(), 96), (data.val_dataloader(), 20), (data.test_dataloader(), 36)):
        assert torch.bincount(batches(loader)[1])[10:].tolist() == [tenth, tenth]
    waveforms, labels, draws = next(iter(data.train_dataloader()))
    assert (waveforms.shape, waveforms.dtype) == ((64, 16000), torch.int16)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert draws.dtype == torch.int32
    spectrograms, same_labels = data.on_after_batch_transfer((waveforms, labels, draws), 0)
    assert (spectrograms.shape, spectrograms.dtype) == ((64, 1, 97, 40), torch.float32)
    assert torch.equal(same_labels, labels)
    spectrograms, _ = data.on_after_batch_transfer(batches(data.val_dataloader()), 0)
    assert abs(spectrograms.mean()) < 0.2
    assert 0.8 < spectrograms.std() < 1.2
    assert spectrograms.abs().max() < 4


@pytest.fixture(scope="module")
def real_words10(shared_data):
    return ready(shared_data / REAL, task="words10")


@pytest.fixture(scope="module")
def real_all(shared_data):
    return ready(shared_data / REAL, task="all")


def test_real_sizes(real_words10, real_all):
    words10, every = real_words10, real_all
    assert words10.class_names == list(COMMANDS)
    assert (words10.train_samples, words10.val_samples, words10.test_samples) == (952, 197, 351)
    assert every.class_names == sorted(WORDS[2])
    assert every.num_classes == 35
    assert (every.train_samples, every.val_samples, every.test_samples) == (1118, 238, 414)


def test_real_splits_are_disjoint_and_whole(shared_data, real_all):
    folder = shared_data / REAL
    train, val, test = files(real_all)
    assert val == set((folder / "validation_list.txt").read_text().split())
    assert test == set((folder / "testing_list.txt").read_text().split())
    assert not train & (val | test)
    assert len(train | val | test) == len(list(folder.glob("[a-z]*/*.wav")))
    speakers = [{path.split("/")[1].split("_nohash_")[0] for path in split} for split in (train, val, test)]
    assert not speakers[0] & speakers[1]
    assert not speakers[0] & speakers[2]
    assert not speakers[1] & speakers[2]


def test_real_sound_is_not_changed_by_evaluation(shared_data, real_words10):
    folder, data = shared_data / REAL, real_words10
    waveforms, labels = batches(data.test_dataloader())
    paths, expected = data._chosen["test"]
    assert labels.tolist() == expected
    for index in (0, 100, 350):
        samples, _ = soundfile.read(folder / paths[index], dtype="int16")
        middle = samples[max(0, len(samples) - 16000) // 2 :][:16000]
        assert np.isin(middle, waveforms[index]).all()
        if len(samples) == 16000:
            assert np.array_equal(waveforms[index], samples)


def test_real_clip_cut_short(shared_data, tree):
    path = tree / "yes/a0_nohash_0.wav"
    source = next((shared_data / REAL / "yes").iterdir())
    path.write_bytes(source.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"a0_nohash_0.wav is cut short \(\d+ of \d+ bytes\): remove it or give --skip"):
        ready(tree)


def test_words_of_both_versions():
    assert len(WORDS[1]) == 30
    assert len(WORDS[2]) == 35
    assert set(COMMANDS) < WORDS[1] < WORDS[2]


def test_archives_are_those_that_torchaudio_names():
    ours = {speech_commands.URL.format(name=name): sha256 for name, sha256 in speech_commands.SHA256.items()}
    assert ours == speechcommands._CHECKSUMS


def test_words10(tree):
    data = ready(tree, task="words10")
    assert data.class_names == ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
    assert data.num_classes == 10
    assert (data.train_samples, data.val_samples, data.test_samples) == (40, 20, 10)
    assert torch.bincount(batches(data.train_dataloader())[1]).tolist() == [4] * 10


def test_words12(tree):
    data = ready(tree)
    assert data.class_names[10:] == ["_unknown_", "_silence_"]
    for loader, each, tenth in (
        (data.train_dataloader(), 4, 4),
        (data.val_dataloader(), 2, 2),
        (data.test_dataloader(), 1, 1),
    ):
        assert torch.bincount(batches(loader)[1]).tolist() == [each] * 10 + [tenth] * 2
    for split, paths in zip(SPEAKERS, files(data), strict=True):
        assert {path.split("/")[1][:2] for path in paths} == set(SPEAKERS[split])


def test_all(tree):
    data = ready(tree, task="all")
    assert data.class_names == sorted(COMMANDS + OTHERS)
    assert (data.num_classes, data.train_samples, data.val_samples, data.test_samples) == (13, 52, 26, 13)
    waveforms, labels = batches(data.test_dataloader())
    for waveform, label in zip(waveforms, labels, strict=True):
        samples, _ = soundfile.read(tree / data.class_names[label] / "a2_nohash_0.wav", dtype="int16")
        assert np.array_equal(waveform, samples)


def test_version_1(tmp_path):
    folder = fill(tmp_path, version=1, words=sorted(WORDS[1]))
    data = ready(folder, task="all", version=1)
    assert data.class_names == sorted(WORDS[1])
    assert data.num_classes == 30
    write_sound(folder / "visual/a0_nohash_0.wav", np.ones(16000, np.int16))
    with pytest.raises(UserError, match="visual is none of the 30 words of Speech Commands version 1: move it"):
        ready(folder, version=1)


def test_silence_is_cut_from_its_own_part_of_the_noise(tree):
    data = ready(tree)
    for loader, value in (
        (data.train_dataloader(), 1000),
        (data.val_dataloader(), 2000),
        (data.test_dataloader(), 3000),
    ):
        waveforms, labels = batches(loader)[:2]
        assert waveforms[labels == 11].eq(value).all()
    assert data.front_end.noise.mul(32768).round().unique().tolist() == [1000]
    assert len(data.front_end.noise) == 56 * 12800


def test_unknown_and_silence_follow_from_the_split_seed(tmp_path):
    tree = fill(tmp_path, words=sorted(WORDS[2]))
    noise = np.random.default_rng(0).integers(-9999, 9999, 16000 * 40).astype(np.int16)
    write_sound(tree / "_background_noise_/a.wav", noise)
    first, again, other = (ready(tree, **chosen) for chosen in ({}, {"seed": 7}, {"split_seed": 7}))
    assert files(first) == files(again) != files(other)

    def of_class(data, label):
        waveforms, labels = batches(data.val_dataloader())
        return waveforms[labels == label]

    for label in (10, 11):
        assert torch.equal(of_class(first, label), of_class(again, label))
        assert not torch.equal(of_class(first, label), of_class(other, label))
    assert torch.equal(of_class(first, 3), of_class(other, 3))


@given(commands=st.integers(1, 300), others=st.integers(0, 40), split_seed=st.integers(-(2**40), 2**40))
def test_unknown_is_a_tenth_or_all_there_is(commands, others, split_seed):
    paths = [f"bed/{n}_nohash_0.wav" for n in range(others)] + [f"yes/{n}_nohash_0.wav" for n in range(commands)]
    chosen, labels = choose_clips(paths, COMMANDS, True, split_seed)
    assert (chosen, labels) == choose_clips(paths, COMMANDS, True, split_seed)
    assert len(set(chosen)) == len(chosen) == len(labels)
    assert set(chosen) <= set(paths)
    assert labels == [0] * commands + [10] * min(-(-commands // 10), others)
    assert all(path.startswith("yes/") == (label == 0) for path, label in zip(chosen, labels, strict=True))


@given(
    splits=st.lists(st.sampled_from(["train", "val", "test"]), max_size=30),
    line_end=st.sampled_from(["\n", "\r\n", "  \n\n"]),
    prefix=st.sampled_from(["", "./"]),
)
def test_splits_are_those_of_the_lists(tmp_path_factory, splits, line_end, prefix):
    folder = tmp_path_factory.mktemp("lists")
    split_of = {f"yes/{number}_nohash_0.wav": split for number, split in enumerate(splits)}
    for split, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        lines = [prefix + path + line_end for path in split_of if split_of[path] == split]
        (folder / name).write_bytes("".join(lines).encode())
    assert read_splits(folder, split_of, skip_broken=False) == split_of


@given(clips=st.integers(0, 5), starts=st.lists(st.integers(0, 2000), max_size=5), data=st.data())
def test_clips_and_noise_are_as_if_joined(clips, starts, data):
    rng = np.random.default_rng(0)
    decoded = rng.integers(-9999, 9999, (clips, 16000)).astype(np.int16)
    noise = rng.integers(-9999, 9999, 18000).astype(np.int16)
    joined = np.concatenate([decoded, *(noise[start : start + 16000][None] for start in starts)])
    both = ClipsAndNoise(decoded, noise, np.array(starts, np.int64))
    assert len(both) == len(joined)
    rows = data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=6)) if len(joined) else []
    rows = np.array(rows, np.int64)
    assert np.array_equal(both[rows], joined[rows])


def test_batches_do_not_depend_on_workers(tree):
    def all_of(**arguments):
        loader = ready(tree, batch_size=16, **arguments).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(batches(loader))
        return epochs

    alone, together = all_of(num_workers=0), all_of(num_workers=2)
    for parts, same_parts in zip(alone, together, strict=True):
        assert all(torch.equal(part, same) for part, same in zip(parts, same_parts, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(alone[0][0], all_of(seed=1)[0][0])


def test_augmentation_of_a_clip_does_not_depend_on_its_batch(tree):
    data = ready(tree)

    def spectrograms(*keys):
        return data.on_after_batch_transfer(data._train.__getitems__(keys), 0)[0]

    together = spectrograms(*((3, index) for index in range(20)))
    assert torch.allclose(together[17:18], spectrograms((3, 17)), atol=1e-5)
    assert not torch.allclose(together[17:18], spectrograms((4, 17)), atol=1e-1)
    # the same sound twice: silence is of one value here
    silence = np.flatnonzero(data._train.labels == 11)[:2]
    first, second = data._train.__getitems__([(3, index) for index in silence])[2]
    assert not torch.equal(first, second)


def test_augmentation_can_be_turned_off(tree, caplog):
    for path in (tree / "_background_noise_").iterdir():
        path.unlink()
    data = ready(tree, task="words10", augment=False)
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 2
    assert data.on_after_batch_transfer(batch, 0)[0].shape == (40, 1, 97, 40)
    assert caplog.messages == []


def test_recording_of_another_rate_sounds_the_same(tree):
    before = ready(tree, task="all")._test.clips
    seconds = torch.arange(16000) / 16000
    sound = 0.3 * torch.sin(2 * torch.pi * (200 + 1500 * seconds) * seconds) * torch.sin(torch.pi * seconds)
    write_sound(tree / "bed/a2_nohash_0.wav", sound.numpy())
    expected = ready(tree, task="all")._test[0][0].double()
    at_44_khz = resample(sound, 16000, 44100).numpy()
    write_sound(tree / "bed/a2_nohash_0.wav", np.stack([1.5 * at_44_khz, 0.5 * at_44_khz], axis=1), 44100)
    data = ready(tree, task="all")
    found, label = data._test[0]
    assert data.class_names[label] == "bed"
    assert torch.corrcoef(torch.stack([found.double(), expected]))[0, 1] > 0.9999
    assert (found.double() - expected).abs().max() < 100
    assert np.array_equal(np.delete(data._test.clips, 78, axis=0), np.delete(before, 78, axis=0))


@pytest.mark.parametrize("hop_ms", [10, 20])
def test_trainer_gets_spectrograms(tree, hop_ms):
    seen = []

    class Linear(LightningModule):
        def __init__(self, values):
            super().__init__()
            self.layer = torch.nn.Linear(values, 12)

        def training_step(self, batch, _=None):
            seen.append((batch[0].shape, batch[0].dtype, batch[1].dtype))
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        validation_step = test_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = SpeechCommands(tree.parents[1], batch_size=10, hop_ms=hop_ms)
    trainer = Trainer(
        fast_dev_run=1, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    module = Linear(np.prod(data.input_shape))
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert seen == [((10, *data.input_shape), torch.float32, torch.int64)] * 3
    assert data.input_shape == (1, {10: 97, 20: 49}[hop_ms], 40)


def test_second_setup_does_nothing(tree):
    data = ready(tree)
    train = data._train
    (tree / "validation_list.txt").unlink()
    data.setup("test")
    assert data._train is train


def test_disk_cache_is_filled_once_and_in_prepare_data(tree, tmp_path, monkeypatch):
    cache_dir = tmp_path / "cache"
    data = SpeechCommands(tree.parents[1], cache="disk", cache_dir=cache_dir)
    data.prepare_data()
    (folder,) = cache_dir.iterdir()
    assert folder.name.startswith("speech_commands_v2-")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data.prepare_data()
    data.setup()
    again = ready(tree, cache="disk", cache_dir=cache_dir)
    assert list(cache_dir.iterdir()) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    in_memory = ready(tree)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        expected = batches(getattr(in_memory, loader)())
        for found in (batches(getattr(data, loader)()), batches(getattr(again, loader)())):
            assert all(torch.equal(part, same) for part, same in zip(found, expected, strict=True))


def test_only_the_clips_of_the_task_are_decoded(tree):
    cut(tree / "bed/a0_nohash_0.wav")
    assert ready(tree, task="words10").train_samples == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "words35"}, "there is no task 'words35': give words10, words12 or all"),
        ({"version": 3}, "there is no version 3 of Speech Commands: give 1 or 2"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"n_mels": 4}, "n_mels is 4: give 8 to 80 bands"),
        ({"hop_ms": 1}, "hop_ms is 1: give 5 to 100 milliseconds"),
    ],
)
def test_wrong_arguments_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        SpeechCommands(tmp_path, **arguments)


def test_missing_folder_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"speech_commands_v0.01 does not exist: give --download true .*or unpack http.*v0.01.tar.gz",
    ):
        ready(tmp_path / "SpeechCommands/speech_commands_v0.01", version=1)


def test_folder_without_words_refused(tmp_path):
    folder = tmp_path / "SpeechCommands/speech_commands_v0.02"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"v0.02 has 0 words, a folder each: delete it and give --download true"):
        ready(folder)


def test_folder_of_another_word_refused(tree):
    (tree / "computer").mkdir()
    with pytest.raises(UserError, match="computer is none of the 35 words of Speech Commands version 2: move it"):
        ready(tree, task="all", skip_broken=True)


def test_hidden_files_are_passed_over(tree):
    expected = files(ready(tree, task="all"))
    (tree / ".cache").mkdir()
    (tree / "yes/.DS_Store").write_bytes(b"x")
    (tree / "yes/._a0_nohash_0.wav").write_bytes(b"x")
    (tree / "LICENSE").write_text("CC BY 4.0")
    assert files(ready(tree, task="all")) == expected


@pytest.mark.parametrize("skip_broken", [False, True])
def test_missing_command_refused(tree, skip_broken):
    for path in (tree / "left").iterdir():
        path.unlink()
    (tree / "left").rmdir()
    for name in ("validation_list.txt", "testing_list.txt"):
        lines = (tree / name).read_text().splitlines(keepends=True)
        (tree / name).write_text("".join(line for line in lines if not line.startswith("left/")))
    with pytest.raises(UserError, match="left has no clips, and task words12 needs some: add them"):
        ready(tree, skip_broken=skip_broken)
    assert "left" not in ready(tree, task="all").class_names


def test_empty_class_folder(tree, caplog):
    (tree / "cat").mkdir()
    with pytest.raises(UserError, match=r"class folder .*/cat has no clips: add some, remove it or give --skip_broken"):
        ready(tree, task="all")
    data = ready(tree, task="all", skip_broken=True)
    assert "cat" not in data.class_names
    assert caplog.messages == [f"class folders without clips are left out: 1, {tree / 'cat'} the first"]


@pytest.mark.parametrize("name", ["a0.wav", "a0_nohash_.wav", "_nohash_0.wav", "a_nohash_b_nohash_0.wav", "notes.txt"])
def test_name_without_speaker(tree, caplog, name):
    (tree / "yes/a0_nohash_0.wav").rename(tree / "yes" / name)
    with pytest.raises(
        UserError, match=rf"yes/{name} is not named <speaker>_nohash_<number>.wav, and .* --skip_broken"
    ):
        ready(tree)
    assert ready(tree, task="words10", skip_broken=True).train_samples == 39
    assert caplog.messages == [
        f"files not named <speaker>_nohash_<number>.wav are left out: 1, {tree / 'yes' / name} the first"
    ]


@pytest.mark.parametrize("name", ["validation_list.txt", "testing_list.txt"])
def test_missing_list_refused(tree, name):
    (tree / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing: take it from the archive http.*v0.02.tar.gz"):
        ready(tree)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("yes/ffff_nohash_0.wav", "names no clip"),
        ("yes", "names no clip"),
        ("hello/a1_nohash_0.wav", "names an unknown word"),
        ("_background_noise_/a.wav", "names an unknown word"),
        ("x" * 5000, "names an unknown word"),
    ],
)
def test_line_that_names_no_clip(tree, caplog, line, message):
    add_line(tree / "validation_list.txt", line)
    place = f"validation_list.txt, line 27, {line}, {message}"
    with pytest.raises(UserError, match=f"{place}: correct the list or give --skip_broken true"):
        ready(tree)
    add_line(tree / "testing_list.txt", "hello/a2_nohash_0.wav")
    assert files(ready(tree, task="all", skip_broken=True))[1] == {
        f"{word}/{speaker}_nohash_0.wav" for word in COMMANDS + OTHERS for speaker in SPEAKERS["val"]
    }
    assert caplog.messages == [f"lines of the lists that name no clip are left out: 2, {tree}/{place} the first"]


@pytest.mark.parametrize("line", ["../secret.wav", "yes/../../secret.wav", "/etc/passwd"])
def test_line_that_leaves_the_folder_refused(tree, line):
    add_line(tree / "testing_list.txt", line)
    with pytest.raises(
        UserError, match=f"testing_list.txt, line 14, {line}, leaves the folder: do not trust this list"
    ):
        ready(tree, skip_broken=True)


def test_list_that_is_no_text_refused(tree):
    (tree / "testing_list.txt").write_bytes(bytes(range(128, 256)) + b"\0")
    with pytest.raises(UserError, match=r"testing_list.txt, line 1, .*names an unknown word"):
        ready(tree)


def test_clip_in_both_lists_refused(tree):
    add_line(tree / "testing_list.txt", "yes/a1_nohash_0.wav")
    with pytest.raises(
        UserError, match=r"testing_list.txt, line 14, yes/a1_nohash_0.wav, is in validation_list.txt as well: remove it"
    ):
        ready(tree, skip_broken=True)


def test_speaker_in_two_splits_refused(tree):
    # of a word that the task does not use
    write_sound(tree / "zero/a1_nohash_1.wav", np.ones(16000, np.int16))
    with pytest.raises(
        UserError,
        match=r"speaker a1 is in two splits, val \(bed/a1_nohash_0.wav\) and train \(zero/a1_nohash_1.wav\): correct",
    ):
        ready(tree, task="words10", skip_broken=True)


def test_empty_split_refused(tree):
    (tree / "validation_list.txt").write_text("")
    for word in COMMANDS + OTHERS:
        for speaker in SPEAKERS["val"]:
            (tree / word / f"{speaker}_nohash_0.wav").unlink()
    with pytest.raises(UserError, match=r"validation_list.txt names no clip of task all: add some of its words"):
        ready(tree, task="all")


def test_class_without_training_clips_refused(tree):
    for speaker in SPEAKERS["train"]:
        (tree / "bed" / f"{speaker}_nohash_0.wav").unlink()
    with pytest.raises(
        UserError, match=r"class bed has no training clip in .*v0.02: add some that the lists do not nam"
    ):
        ready(tree, task="all")
    assert ready(tree, task="words12").num_classes == 12


def test_no_other_words_refused(tmp_path):
    tree = fill(tmp_path, words=COMMANDS)
    with pytest.raises(UserError, match="class _unknown_ has no training clip"):
        ready(tree)
    assert ready(tree, task="words10").num_classes == 10


@pytest.mark.parametrize("contents", [b"", b"no sound", None])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_clips(tree, caplog, tmp_path, contents, cache):
    first, second = tree / "yes/b0_nohash_0.wav", tree / "yes/a1_nohash_0.wav"
    for path in (first, second):
        path.write_bytes(path.read_bytes()[:20000] if contents is None else contents)
    arguments = {"task": "words10", "cache": cache, "cache_dir": tmp_path / "cache"}
    with pytest.raises(UserError, match=r"nohash_0.wav .*: remove it or give --skip_broken true"):
        ready(tree, **arguments)
    data = ready(tree, **arguments, skip_broken=True)
    assert (data.train_samples, data.val_samples, data.test_samples) == (39, 19, 10)
    assert torch.bincount(batches(data.train_dataloader())[1]).tolist() == [3] + [4] * 9
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"2 of 70 clips are left out: {first} ")
    plain = batches(data.val_dataloader())[0]
    assert plain.any(dim=1).all()


def test_labels_stay_with_their_clips_where_some_are_broken(tree):
    whole = ready(tree)
    cut(tree / "down/a0_nohash_0.wav")
    data = ready(tree, skip_broken=True)
    for split in ("_train", "_val", "_test"):
        before, after = (
            {waveform.tobytes(): int(label) for waveform, label in zip(part.clips[part.rows], part.labels, strict=True)}
            for part in (getattr(whole, split), getattr(data, split))
        )
        assert after.items() <= before.items()


def test_missing_noise(tree, caplog):
    for path in (tree / "_background_noise_").iterdir():
        path.unlink()
    (tree / "_background_noise_").rmdir()
    with pytest.raises(UserError, match="_background_noise_ has no recordings, and the silence of words12 is cut from"):
        ready(tree)
    data = ready(tree, task="words10")
    assert len(data.front_end.noise) == 3 * 20 * 16_000
    assert caplog.messages == [
        f"{tree / '_background_noise_'} has no recordings: generated noise is mixed into the training clips"
    ]


def test_broken_noise(tree, caplog):
    cut(tree / "_background_noise_/a.wav")
    with pytest.raises(UserError, match=r"_background_noise_/a.wav is cut short"):
        ready(tree)
    data = ready(tree, skip_broken=True)
    assert len(data.front_end.noise) == 24 * 12800
    assert caplog.messages == [
        "recordings of background noise that cannot be decoded are left out: "
        f"1, {tree / '_background_noise_/a.wav'} the first"
    ]


def test_short_noise_refused(tree):
    (tree / "_background_noise_/b.wav").unlink()
    write_sound(tree / "_background_noise_/a.wav", np.ones(159980, np.int16))
    with pytest.raises(
        UserError, match="_background_noise_ has 15998 samples for the split val, less than a second: ad"
    ):
        ready(tree)
    assert len(ready(tree, task="words10").front_end.noise) == 127984


def serve_archive(monkeypatch, tmp_path, folder, cut_to=None, extra=()):
    """Put an archive like the official one where the download looks for it; what downloads and unpacks it is real."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
        for name in extra:
            tar.addfile(tarfile.TarInfo(name))
    contents = archive.getvalue()[:cut_to]
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / f"{folder.name}.tar.gz").write_bytes(contents)
    monkeypatch.setattr(speech_commands, "URL", f"{(tmp_path / 'served').as_uri()}/{{name}}.tar.gz")
    monkeypatch.setitem(speech_commands.SHA256, folder.name, hashlib.sha256(contents).hexdigest())


def new_folder(tmp_path):
    return tmp_path / "new/SpeechCommands/speech_commands_v0.02"


def test_download_is_done_once(tree, tmp_path, monkeypatch, capfd):
    serve_archive(monkeypatch, tmp_path, tree)
    folder = new_folder(tmp_path)
    data = ready(folder, download=True)
    assert "100%" in capfd.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tree.iterdir())
    assert (data.train_samples, data.test_samples) == (48, 12)

    def download_again(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_again)
    data.prepare_data()
    assert files(ready(folder, download=True)) == files(ready(tree))


def assert_nothing_is_taken_for_whole(folder):
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(UserError, match="does not exist"):
        ready(folder)


def test_other_checksum_refused(tree, tmp_path, monkeypatch):
    serve_archive(monkeypatch, tmp_path, tree)
    monkeypatch.setitem(speech_commands.SHA256, tree.name, "0" * 64)
    with pytest.raises(
        UserError, match=r"v0.02.tar.gz could not be downloaded \(invalid hash value .*\): fetch it your"
    ):
        ready(new_folder(tmp_path), download=True)
    assert_nothing_is_taken_for_whole(new_folder(tmp_path))


@pytest.mark.parametrize("step", ["torch.hub.download_url_to_file", "microtune.datamodules.speech_commands.unpack"])
def test_interruption_leaves_nothing(tree, tmp_path, monkeypatch, step):
    serve_archive(monkeypatch, tmp_path, tree)

    def interrupted(*_, **__):
        (partial,) = new_folder(tmp_path).parent.iterdir()
        (partial / "yes").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(new_folder(tmp_path), download=True)
    assert_nothing_is_taken_for_whole(new_folder(tmp_path))


def test_archive_cut_short_refused(tree, tmp_path, monkeypatch):
    serve_archive(monkeypatch, tmp_path, tree, cut_to=100_000)
    with pytest.raises(UserError, match=r"v0.02.tar.gz cannot be unpacked"):
        ready(new_folder(tmp_path), download=True)
    assert_nothing_is_taken_for_whole(new_folder(tmp_path))


def test_archive_that_leaves_its_folder_is_refused(tree, tmp_path, monkeypatch):
    serve_archive(monkeypatch, tmp_path, tree, extra=["../../escaped"])
    with pytest.raises(UserError, match="has a member that would be written outside its folder"):
        ready(new_folder(tmp_path), download=True)
    assert not list(tmp_path.rglob("escaped"))
    assert_nothing_is_taken_for_whole(new_folder(tmp_path))


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        UserError,
        match=r"http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz could not be downloaded "
        r"\(no route to host\): fetch it yourself and unpack it in .*/SpeechCommands/speech_commands_v0.02",
    ):
        ready(new_folder(tmp_path), download=True)
    assert_nothing_is_taken_for_whole(new_folder(tmp_path))


def test_speaker_is_what_torchaudio_reads(tree):
    (tree / "yes/a0_nohash_0.wav").rename(tree / "yes/a0_nohash_3.wav.wav")  # as in the separate test archives
    speakers = list_clips(tree, version=2, skip_broken=False)
    assert speakers["yes/a0_nohash_3.wav.wav"] == "a0"
    assert list(speakers) == sorted(speakers)
