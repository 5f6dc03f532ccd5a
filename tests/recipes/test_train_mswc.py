"""The recipe for spoken words: which words it learns, of which data, and what it measures to be forgotten."""

import csv
import re
import shutil
import tarfile

import pytest
import torch
import yaml

from microtune.datamodules.mswc import MSWC
from microtune.datamodules.speech_commands import SpeechCommands
from microtune.modules.classifier import Classifier
from microtune.recipes import train_mswc

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
FORGETTING = {"earlier_top1_before", "earlier_top1_after"}
ARABIC = sorted(("واحد", "اثنان", "ثلاثة"))


def class_names(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["hyper_parameters"]["class_names"]


def samples(report):
    return [report[name] for name in ("train_samples", "val_samples", "test_samples")]


@pytest.fixture
def train(called, tiny_run, tmp_path):
    """Calls ``train(languages="en")``: a run of one epoch under the smallest scheme."""

    def call(**changed):
        defaults = {"epochs": 1, "scheme": "classifier", "out_dir": tmp_path / "run"}
        return called("train_mswc", **tiny_run("train_mswc") | defaults | changed)

    return call


@pytest.fixture(scope="session")
def english(tiny_run, finished_once):
    """The folder of a run from scratch that knows three English words, and not by heart."""
    changed = {"languages": "en", "scheme": "none", "epochs": 15, "batch_size": 6}
    return finished_once("english", "train_mswc", **tiny_run("train_mswc") | changed)


@pytest.fixture
def two_steps(limited):
    """Lets runs end after two batches of each epoch."""
    limited(limit_train_batches=2, limit_val_batches=1)


@pytest.fixture
def words_to_learn(finished_runs):
    """Sets up the data of a run with some arguments changed."""
    config = yaml.safe_load((finished_runs["train_mswc"] / "config.yaml").read_text())

    def call(**changed):
        data = train_mswc.words_to_learn(config | changed)
        data.setup()
        return data

    return call


@pytest.fixture(params=["train_mswc", "train_speech_commands"])
def earlier(request, english, finished_runs, tiny_mswc, tiny_speech_commands):
    """The folder of an earlier run, and a function that makes its data anew."""
    if request.param == "train_mswc":
        return english, lambda: MSWC(tiny_mswc, ["en"])
    return finished_runs["train_speech_commands"], lambda: SpeechCommands(tiny_speech_commands, "words10")


# ---- what is forgotten


def test_earlier_network_has_learnt_something(english, report_of):
    """Else nothing could be forgotten."""
    assert report_of(english)["top1"] > 0.6  # chance is 0.33


def test_what_is_forgotten_under_sub_tensor_update(earlier, train, evaluated, report_of, tmp_path):
    """After: the adapted trunk with the classifier of the earlier weights, put together here from both checkpoints."""
    folder, make_data = earlier
    report = train(weights=str(folder / "last.ckpt"), scheme="sub_tensor", learning_rate=0.2, epochs=3)
    assert report["earlier_top1_before"] == pytest.approx(report_of(folder)["top1"])
    adapted, before = (Classifier.load_from_checkpoint(run / "last.ckpt") for run in (tmp_path / "run", folder))
    assert not torch.equal(adapted.net.classifier[1].weight[:3], before.net.classifier[1].weight[:3])
    adapted.net.classifier = before.net.classifier
    assert report["earlier_top1_after"] == pytest.approx(evaluated(adapted, make_data())[0])
    assert report_of(tmp_path / "run") == report


def test_something_is_forgotten(english, train):
    report = train(weights=str(english / "last.ckpt"), scheme="full", allow_oversize=True, learning_rate=1.0, epochs=3)
    assert report["earlier_top1_after"] < report["earlier_top1_before"]


def test_update_of_the_classifier_alone_forgets_nothing(earlier, train, tmp_path):
    report = train(weights=str(earlier[0] / "last.ckpt"))
    assert report["earlier_top1_after"] == report["earlier_top1_before"]
    assert class_names(tmp_path / "run") == ARABIC


def test_loggers_learn_only_of_the_new_words(english, two_steps, train, tmp_path):
    report = train(weights=str(english / "last.ckpt"))
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    with file.open() as opened:
        found = [row["test/top1"] for row in csv.DictReader(opened) if row["test/top1"]]
    assert [float(value) for value in found] == [report["top1"]]


def test_measuring_what_is_forgotten_changes_nothing(english, two_steps, train, weights_of, tmp_path):
    options = {"weights": str(english / "last.ckpt"), "scheme": "sub_tensor"}
    measured = train(**options)
    report = train(**options, forgetting=False, out_dir=tmp_path / "without")
    assert measured.keys() - report.keys() == FORGETTING
    same = report.keys() - {"seconds"}
    assert {name: measured[name] for name in same} == {name: report[name] for name in same}
    one, other = weights_of(tmp_path / "run"), weights_of(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_run_says_what_is_forgotten(english, two_steps, train, interrupt, tmp_path):
    options = {"weights": str(english / "last.ckpt"), "scheme": "sub_tensor", "epochs": 2}
    whole = train(**options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train(**options)
    assert train(**options, resume=True) | {"seconds": 0} == whole | {"seconds": 0}


def test_evaluation_forgets_nothing_and_measures_none(english, train, report_of):
    report = train(weights=str(english / "last.ckpt"), languages="en", evaluate_only=True)
    assert report["top1"] == report_of(english)["top1"]
    assert not report.keys() & FORGETTING


@pytest.fixture
def moved(english, tmp_path):
    """An earlier run whose data is not there any more."""
    folder = shutil.copytree(english, tmp_path / "english")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data_dir": str(tmp_path / "gone")}))
    return folder


def test_earlier_data_that_is_gone_is_a_warning(
    moved, two_steps, tiny_run, as_words, command, caplog, report_of, tmp_path
):
    run = tiny_run("train_mswc") | {"epochs": 1, "weights": moved / "last.ckpt", "out_dir": tmp_path / "run"}
    ended = command("train_mswc", *as_words(run))
    assert ended.status == 0
    (warning,) = (message for message in caplog.messages if "forgotten" in message)
    assert "\n" not in warning
    assert warning.startswith(f"what is forgotten is not measured: {tmp_path / 'gone/en'} does not exist: ")
    assert "earlier classifier" not in ended.output
    assert not report_of(tmp_path / "run").keys() & FORGETTING


def test_figures_are_printed(english, two_steps, tiny_run, as_words, command, report_of, tmp_path):
    run = tiny_run("train_mswc") | {"epochs": 1, "weights": english / "last.ckpt", "out_dir": tmp_path / "run"}
    ended = command("train_mswc", *as_words(run))
    before, after = (report_of(tmp_path / "run")[f"earlier_top1_{when}"] for when in ("before", "after"))
    line = f"top-1 on what it knew before, with its earlier classifier: {before:.2%}, now {after:.2%}"
    assert line in ended.output.splitlines()


def test_weights_that_lie_alone(english, tmp_path):
    shutil.copy(english / "last.ckpt", tmp_path / "alone.ckpt")
    assert train_mswc.earlier_words(str(tmp_path / "alone.ckpt")) is None


def test_weights_of_a_run_on_images(finished_runs, two_steps, train):
    """Its config.yaml lies beside, but there are no words to forget."""
    assert not train(weights=str(finished_runs["train_cifar"] / "last.ckpt")).keys() & FORGETTING


# ---- which words, of which data


@pytest.mark.parametrize(
    ("options", "names", "expected"),
    [
        ({"shots": 3}, ARABIC, [9, 6, 12]),
        ({"languages": "en", "words": "tree,bed"}, ["tree", "bed"], [16, 4, 8]),
        ({"languages": "en", "words": " tree , bed,"}, ["tree", "bed"], [16, 4, 8]),
        ({"languages": "en", "num_words": 2}, ["bed", "cat"], [16, 4, 8]),
        ({"languages": "en", "words": "tree,bed", "unknown": True}, ["tree", "bed", "_unknown_"], [24, 6, 12]),
        (
            {"languages": "en,ar"},
            sorted(["en/bed", "en/cat", "en/tree", *(f"ar/{word}" for word in ARABIC)]),
            [48, 12, 24],
        ),
        ({"languages": "en,ar", "words": "ar/واحد,cat"}, ["ar/واحد", "en/cat"], [16, 4, 8]),
    ],
)
def test_choice_of_words(options, names, expected, words_to_learn):
    data = words_to_learn(**options)
    assert list(data.class_names) == names
    assert [data.train_samples, data.val_samples, data.test_samples] == expected


def test_shots_are_drawn_by_the_seed(words_to_learn):
    def clips(**changed):
        batches = list(words_to_learn(**{"shots": 3} | changed).train_dataloader())
        return {waveform.numpy().tobytes() for batch in batches for waveform in batch[0]}

    assert len(clips(seed=0)) == 9
    assert clips(seed=0) == clips(seed=0) != clips(seed=1)
    assert clips(seed=0) < clips(shots=None)


def test_noise_changes_training_and_is_no_clip(
    finished_runs, tiny_speech_commands, train, weights_of, report_of, tmp_path
):
    noise_dir = tiny_speech_commands / "SpeechCommands/speech_commands_v0.02/_background_noise_"
    report = train(noise_dir=noise_dir, scheme="sub_tensor", epochs=3)
    assert samples(report) == samples(report_of(finished_runs["train_mswc"]))
    one, other = weights_of(tmp_path / "run"), weights_of(finished_runs["train_mswc"])
    assert not torch.equal(one["net.classifier.1.weight"], other["net.classifier.1.weight"])


def test_cache_on_disk_gives_the_same_weights(finished_runs, train, weights_of, tmp_path):
    for name in ("first", "again"):  # filling the cache, and reading it
        train(cache="disk", cache_dir=tmp_path / "cache", scheme="sub_tensor", epochs=3, out_dir=tmp_path / name)
        one, other = weights_of(tmp_path / name), weights_of(finished_runs["train_mswc"])
        assert all(torch.equal(one[key], other[key]) for key in one)
        (folder,) = (tmp_path / "cache").iterdir()
        assert folder.name.startswith("mswc_ar-")


def test_splits_may_lie_elsewhere(tiny_mswc, words_to_learn, tmp_path):
    shutil.copytree(tiny_mswc / "ar/clips", tmp_path / "audio/ar/clips")
    (tmp_path / "splits").mkdir()
    shutil.copy(tiny_mswc / "ar/ar_splits.csv", tmp_path / "splits")
    data = words_to_learn(data_dir=tmp_path / "audio", splits_dir=tmp_path / "splits")
    assert [data.train_samples, data.val_samples, data.test_samples] == [24, 6, 12]


def test_archives_are_unpacked_once(tiny_mswc, finished_runs, train, weights_of, tmp_path):
    """Into a folder that need not be there; audio and splits come apart."""
    audio, splits = tmp_path / "ar.tar.gz", tmp_path / "ar_splits.tar.gz"
    with tarfile.open(audio, "w:gz") as archive:
        archive.add(tiny_mswc / "ar/clips", "ar/clips")
    with tarfile.open(splits, "w:gz") as archive:
        archive.add(tiny_mswc / "ar/ar_splits.csv", "ar_splits.csv")
    options = {"data_dir": tmp_path / "data", "archives": f"{audio},{splits}", "scheme": "sub_tensor", "epochs": 3}
    train(**options)
    one, other = weights_of(tmp_path / "run"), weights_of(finished_runs["train_mswc"])
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    train(**options | {"epochs": 1}, out_dir=tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


# ---- real data


def test_real_words(shared_data, called, limited, tmp_path):
    """The chain of both speech recipes on real clips: English commands, then few steps on Arabic words."""
    limited(limit_train_batches=4, limit_val_batches=1)
    common = {"epochs": 1, "accelerator": "cpu", "logger": "none"}
    commands = {"data_dir": shared_data, "task": "words10", **common, "out_dir": tmp_path / "first"}
    first = called("train_speech_commands", **commands)
    assert samples(first) == [952, 197, 351]
    arabic = {"data_dir": shared_data / "mswc", "languages": "ar", "num_words": 10}
    weights = str(tmp_path / "first/last.ckpt")
    then = called("train_mswc", **arabic, **common, weights=weights, out_dir=tmp_path / "then")
    assert samples(then) == [243, 25, 32]
    assert then["classes"] == 10
    assert then["loss"] < 10
    assert then["earlier_top1_before"] == pytest.approx(first["top1"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "argument of type 'NoneType'"),
        ("languages: [en", "expected ',' or ']'"),
        ("languages: en\nn_mels: 40\n", "config.yaml has no 'num_words'|config.yaml has no 'splits_dir'"),
        (None, "No such file or directory"),
    ],
)
def test_without_a_readable_config_what_is_forgotten_is_not_measured(content, reason, english, tmp_path, caplog):
    shutil.copy(english / "last.ckpt", tmp_path / "last.ckpt")
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert train_mswc.earlier_words(str(tmp_path / "last.ckpt")) is None
    (message,) = caplog.messages
    assert message.startswith("what is forgotten is not measured: ")
    assert re.search(reason, message)
