"""MSWC: its layouts, its splits, the choice of words and clips, its archives, and trees that are not what they say."""

import csv
import functools
import io
import logging
import math
import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from microtune.datamodules import mswc_files
from microtune.datamodules.decoded_audio import one_second, read_audio
from microtune.datamodules.mswc import MSWC
from microtune.datamodules.mswc_choice import choose_clips, choose_words, few_shots
from microtune.datamodules.mswc_files import unpack_mswc
from microtune.datamodules.mswc_splits import SPLITS, Splits, read_tables
from microtune.modules.user_error import UserError

# training, dev and test clips of each word
WORDS = {"yes": (6, 2, 2), "no": (4, 2, 2), "up": (4, 1, 1), "left": (2, 1, 1)}
LAYOUTS = [
    "clips/{word}/{clip}",
    "{word}/{clip}",
    "{word}_{clip}",
    "clips/{word}_{clip}",
    "audio/{word}_{clip}",
    "{split}/{word}_{clip}",
    "{split}/audio/{word}_{clip}",
]


@functools.cache
def opus(number):
    """The bytes of a clip of a quarter second, another for each number."""
    seconds = np.arange(12000) / 48000
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * (200 + 37 * number) * seconds), 48000, format="OGG", subtype="OPUS")
    return file.getvalue()


def clips_of(words, language="en"):
    """Split, word and file name of each clip."""
    for split in range(3):
        for word, counts in words.items():
            for number in range(counts[split]):
                yield SPLITS[split], word, f"common_voice_{language}_{split}{number:03d}.opus"


def write_tables(folder, rows, language="en", kind="three", encoding="utf-8"):
    """Rows of (split, link, word, valid)."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["LINK", "WORD", "VALID", "SPEAKER", "GENDER"]
    lines = {name: [header] for name in SPLITS}
    whole = [["SET", *header]]
    for split, link, word, valid in rows:
        line = [link, word, valid, "ab12", "" if kind == "hf" else "NAN"]
        lines[split].append(line)
        whole.append([split.upper(), *line])
    names = {name: f"{name}.csv" if kind == "hf" else f"{language}_{name}.csv" for name in SPLITS}
    tables = {f"{language}_splits.csv": whole} if kind == "one" else {names[split]: lines[split] for split in SPLITS}
    for name, table in tables.items():
        with (folder / name).open("w", newline="", encoding=encoding) as file:
            csv.writer(file, lineterminator="\n").writerows(table)


def corpus(data_dir, words=WORDS, language="en", layout=LAYOUTS[0], kind="three", splits_dir=None, same=False):
    """A made-up language; ``same`` gives all clips one sound."""
    rows = []
    for number, (split, word, clip) in enumerate(clips_of(words, language)):
        path = data_dir / language / layout.format(split=split, word=word, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(opus(0 if same else number))
        rows.append((split, f"{word}/{clip}", word, "True"))
    write_tables(splits_dir or data_dir / language, rows, language, kind)
    return data_dir / language


@pytest.fixture
def en(tmp_path):
    return corpus(tmp_path / "mswc")


def ready(data_dir, **arguments):
    data = MSWC(data_dir, **arguments)
    data.prepare_data()
    data.setup()
    return data


def sizes(data):
    return data.train_samples, data.val_samples, data.test_samples


def batches(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def labels_of(data):
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    return [np.bincount(batches(loader)[1], minlength=data.num_classes).tolist() for loader in loaders]


def sounds(data, name):
    """What a split holds, in its order."""
    split = getattr(data, name)
    return [(split.clips[row].tobytes(), int(label)) for row, label in zip(split.rows, split.labels, strict=True)]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# ---- real data


def test_real_english_is_whole(shared_data):
    paths, labels, split_of, class_names = MSWC(shared_data / "mswc")._choose()  # decodes nothing
    words = ["bed", "cat", "down", "go", "happy", "left", "no", "off", "on", "right", "stop", "up", "yes"]
    assert class_names == words
    assert np.bincount(split_of).tolist() == [845, 90, 105]
    assert [path.parent.name for path in paths] == [words[label] for label in labels]


def test_real_english(shared_data):
    data = ready(shared_data / "mswc", words=["yes", "no"])
    assert (data.num_classes, data.input_shape, sum(sizes(data))) == (2, (1, 97, 40), 160)
    waveforms, labels, draws = next(iter(data.train_dataloader()))
    assert (waveforms.dtype, labels.dtype, draws.dtype) == (torch.int16, torch.int64, torch.int32)
    assert waveforms.shape == (64, 16000)
    spectrograms, same_labels = data.on_after_batch_transfer((waveforms, labels, draws), 0)
    assert (spectrograms.shape, spectrograms.dtype) == ((64, 1, 97, 40), torch.float32)
    assert torch.equal(labels, same_labels)
    assert spectrograms.isfinite().all()
    clean, _ = data.on_after_batch_transfer((waveforms, labels), 0)
    assert abs(clean.mean()) < 0.5
    assert 0.5 < clean.std() < 1.5
    assert spectrograms.mean() > clean.mean()  # noise was mixed in
    assert np.abs(data._train.clips).max() > 10_000


@pytest.mark.parametrize("language", ["en", "ar"])
def test_real_tables_agree(shared_data, language):
    folder = shared_data / "mswc" / language
    three = read_tables(language, [(folder / f"{language}_{name}.csv", split) for split, name in enumerate(SPLITS)])
    one = read_tables(language, [(folder / f"{language}_splits.csv", None)])
    described = [
        sorted(zip(table.links, (table.words[word] for word in table.word_of), table.split_of.tolist(), strict=True))
        for table in (three, one)
    ]
    assert described[0] == described[1]


def test_real_arabic_most_frequent(shared_data):
    with (shared_data / "mswc/ar/ar_train.csv").open(encoding="utf-8") as file:
        counts = Counter(row["WORD"] for row in csv.DictReader(file))
    expected = sorted(sorted(counts, key=lambda word: (-counts[word], word))[:5])
    data = ready(shared_data / "mswc", languages=["ar"], num_words=5, unknown=True)
    assert data.class_names == [*expected, "_unknown_"]
    assert labels_of(data)[0][:5] == [counts[word] for word in expected]
    assert labels_of(data)[0][5] == math.ceil(sum(counts[word] for word in expected) / 5)


def test_real_clip_is_decoded(shared_data, en):
    real = shared_data / "mswc/common_voice_en_10504.opus"
    for path in en.glob("clips/yes/*"):
        shutil.copyfile(real, path)
    data = ready(en.parent, words=["no", "yes"])
    expected = one_second(read_audio(real))
    assert expected.std() > 100
    assert sum(np.array_equal(data._train.clips[row], expected) for row in data._train.rows) == 6


# ---- layouts and splits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, en, layout):
    expected = ready(en.parent)
    corpus(tmp_path / "other", layout=layout, kind="hf")
    data = ready(tmp_path / "other")
    assert sizes(data) == (16, 6, 6)
    assert data.class_names == ["left", "no", "up", "yes"]
    for name in ("_train", "_val", "_test"):
        assert sounds(data, name) == sounds(expected, name)


@pytest.mark.parametrize("kind", ["three", "one", "hf"])
@pytest.mark.parametrize("place", ["beside", "splits", "splits/en"])
def test_places_of_the_tables(tmp_path, kind, place):
    data_dir = tmp_path / "{data}"
    corpus(data_dir, kind=kind, splits_dir=None if place == "beside" else tmp_path / place)
    data = ready(data_dir, splits_dir=None if place == "beside" else tmp_path / "splits")
    assert labels_of(data) == [[2, 4, 4, 6], [1, 2, 1, 2], [1, 2, 1, 2]]


def test_splits_of_several_languages_directly_in_splits_dir_have_their_names(tmp_path):
    for language in ("en", "ar"):
        corpus(tmp_path / "mswc", language=language, kind="hf", splits_dir=tmp_path / "splits")
    with pytest.raises(UserError, match=r"there is no en_train.csv, en_splits.csv or train.csv in .*splits/en"):
        ready(tmp_path / "mswc", languages=["en", "ar"], splits_dir=tmp_path / "splits")


FORMS = ["NFC", "NFD"]


@pytest.mark.parametrize("of_csv", FORMS)
@pytest.mark.parametrize("of_files", FORMS)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5]])
def test_words_in_any_script_and_normal_form(tmp_path, of_csv, of_files, layout):
    words = ["café", "ζώο", "آه", "нет", "việt", "yes"]
    rows = []
    for number, (split, word, clip) in enumerate(clips_of(dict.fromkeys(words, (1, 1, 1)))):
        path = tmp_path / "en" / unicodedata.normalize(of_files, layout.format(split=split, word=word, clip=clip))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(opus(number))
        word = unicodedata.normalize(of_csv, word)
        rows.append((split, f"{word}/{clip}", word, "True"))
    write_tables(tmp_path / "en", rows, encoding="utf-8-sig")
    for of_given in FORMS:
        data = ready(tmp_path, words=[unicodedata.normalize(of_given, word) for word in words])
        assert data.class_names == [unicodedata.normalize("NFC", word) for word in words]
        assert labels_of(data) == [[1] * 6] * 3
    assert ready(tmp_path).class_names == sorted(unicodedata.normalize("NFC", word) for word in words)


def test_invalid_clips_are_left_out(en):
    path = en / "en_train.csv"
    lines = path.read_text().splitlines()
    for line, valid in ((1, "False"), (2, "false"), (3, "true"), (4, ""), (5, "TRUE"), (7, "NA")):
        lines[line] = lines[line].replace("True", valid)
    path.write_text("\n".join(lines))
    assert labels_of(ready(en.parent))[0] == [2, 3, 4, 3]  # lines 1 to 6 are of yes, 7 to 10 of no


def test_a_clip_named_twice_in_a_split_is_one(en):
    path = en / "en_train.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], "", lines[2]]))
    assert labels_of(ready(en.parent))[0] == [2, 4, 4, 6]


plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/"), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SPLITS), plain, st.booleans()), min_size=1, max_size=12))
def test_tables_are_read_as_written(rows):
    rows = [(split, f"{word}/{number}.opus", word, str(valid)) for number, (split, word, valid) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), rows, kind="one")
        splits = read_tables("en", [(Path(folder, "en_splits.csv"), None)])
    found = zip((SPLITS[split] for split in splits.split_of), splits.links, splits.word_of, strict=True)
    assert [(split, link, splits.words[word]) for split, link, word in found] == [
        (split, link, "en/" + unicodedata.normalize("NFC", word))
        for split, link, word, valid in rows
        if valid == "True"
    ]


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SET,LINK", "SET,PATH", r"en_splits.csv has no column LINK, only SET, PATH, WORD.*is it MSWC's table\?"),
        ("WORD", "KEYWORD", "en_splits.csv has no column WORD"),
        ("VALID", "OK", "en_splits.csv has no column VALID"),
        ("SET", "PART", "en_splits.csv has no column SET"),
        ("TRAIN", "VALIDATION", "en_splits.csv, line 2: SET is 'VALIDATION', not TRAIN, DEV, TEST"),
        ("True,ab12,NAN\nTRAIN", "True\nTRAIN", "en_splits.csv, line 2: 4 fields instead of 6"),
        ("yes/", '"yes/', "en_splits.csv, line 2: |en_splits.csv, line .*: .* fields instead of 6|not a table"),
    ],
)
def test_wrong_table_refused(tmp_path, old, new, message):
    edit(corpus(tmp_path, kind="one") / "en_splits.csv", old, new)
    with pytest.raises(UserError, match=message):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "en_dev.csv, line 1: the file is empty: unpack the splits archive again"),
        (b"LINK,WORD,VALID,SPEAKER,GENDER\n", "en_dev.csv, line 2: there are no clips in it"),
        (b"LINK,WORD,VALID\na/b.opus,\xff\xfe,True\n", r"en_dev.csv, line \d: not a table in UTF-8 \("),
        (
            b"LINK,WORD,VALID\n" + b"a" * 200_000 + b",a,True\n",
            r"en_dev.csv, line \d: not a table in UTF-8 \(field larger",
        ),
    ],
)
def test_wrong_contents_refused(en, contents, message):
    (en / "en_dev.csv").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        ready(en.parent)


def test_missing_split_refused(en):
    (en / "en_dev.csv").unlink()
    with pytest.raises(UserError, match=r"en_dev.csv is missing beside the other splits: unpack"):
        ready(en.parent)


def test_missing_splits_refused(en, tmp_path):
    for path in en.glob("*.csv"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no en_train.csv, .* in .*/en: the splits are an archive of their own; .*--splits_dir"
    ):
        ready(en.parent)
    with pytest.raises(UserError, match=r"splits_dir .*nowhere is not a folder: give that of the csv files"):
        ready(en.parent, splits_dir=tmp_path / "nowhere")


def test_missing_language_refused(en):
    message = r"/de does not exist: get the audio and the splits of 'de' at .*--archives.*de/clips and .*de_train.csv"
    with pytest.raises(UserError, match=message):
        ready(en.parent, languages=["en", "de"])


def test_a_clip_in_two_splits_is_refused(en):
    line = (en / "en_train.csv").read_text().splitlines()[3]
    with (en / "en_test.csv").open("a") as file:
        file.write(line)
    with pytest.raises(
        UserError, match=r"yes/common_voice_en_0002.opus is in two splits, train and test: test clips must"
    ):
        ready(en.parent)


# ---- words and clips


def test_given_words_in_their_order(en):
    data = ready(en.parent, words=["yes", "left", "en/no"])
    assert data.class_names == ["yes", "left", "no"]
    assert labels_of(data) == [[6, 2, 4], [2, 1, 2], [2, 1, 2]]


def test_most_frequent_words(en):
    assert ready(en.parent, num_words=2).class_names == ["no", "yes"]  # up has as many as no
    assert ready(en.parent, num_words=3).class_names == ["no", "up", "yes"]
    assert ready(en.parent, num_words=4).class_names == ["left", "no", "up", "yes"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=8), st.data())
def test_most_frequent_of_any(counts, data):
    names = [f"en/{name}" for name in data.draw(st.permutations("abcdefgh"))][: len(counts)]
    splits = table(dict(zip(names, counts, strict=True)))
    usable = [name for name, (train, _, test) in zip(names, counts, strict=True) if train and test]
    wanted = data.draw(st.integers(0, len(usable)))
    clips = dict(zip(names, (train for train, _, _ in counts), strict=True))
    chosen = [splits.words[index] for index in choose_words(splits, ["en"], num_words=wanted)]
    assert chosen == sorted(sorted(usable, key=lambda name: (-clips[name], name))[:wanted])


def table(counts):
    clips = [
        (split, word)
        for split in range(3)
        for word, of_word in enumerate(counts.values())
        for _ in range(of_word[split])
    ]
    split_of, word_of = np.array(clips, np.int64).reshape(-1, 2).T
    return Splits([f"{number}.opus" for number in range(len(clips))], list(counts), word_of, split_of.astype(np.int8))


def test_words_without_test_clips_are_passed_over(tmp_path, caplog):
    corpus(tmp_path, {**WORDS, "rare": (9, 1, 0), "untrained": (0, 1, 1)})
    with caplog.at_level(logging.WARNING):
        assert ready(tmp_path).class_names == ["left", "no", "up", "yes"]
    assert messages(caplog) == ["2 of 6 words lack training or test clips and are left out, en/rare the first"]
    assert ready(tmp_path, num_words=1, unknown=True).class_names == ["yes", "_unknown_"]


@pytest.mark.parametrize(("split", "name"), [(0, "train"), (2, "test")])
def test_given_word_without_clips_in_a_split_is_refused(tmp_path, split, name):
    corpus(tmp_path, {**WORDS, "rare": tuple(int(number != split) for number in range(3))})
    with pytest.raises(UserError, match=f"'rare' has no clips in the {name} split: choose other words"):
        ready(tmp_path, words=["yes", "rare"])


def test_word_without_dev_clips_is_mentioned(tmp_path, caplog):
    corpus(tmp_path, {**WORDS, "rare": (1, 0, 1)})
    with caplog.at_level(logging.WARNING):
        assert labels_of(ready(tmp_path, words=["yes", "rare"]))[1] == [2, 0]
    assert messages(caplog) == [
        "1 of 2 classes have no clips in the dev split and do not count in validation, rare the first"
    ]


def test_no_dev_clips_at_all_is_refused(tmp_path):
    corpus(tmp_path, {**WORDS, "rare": (1, 0, 1), "seldom": (1, 0, 1)})
    with pytest.raises(UserError, match="the dev split has no clips of the chosen words: choose more words, or other"):
        ready(tmp_path, words=["seldom", "rare"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": ["yes", "upp"]}, "the word 'upp' is not in the splits of en: the nearest are up"),
        ({"words": ["yes", "1"]}, "the word '1' is not in the splits of en: the nearest are left, no, up, yes"),
        ({"words": ["yes", "en/yes"]}, "the word 'en/yes' is given twice: give each once"),
        ({"words": ["yes"]}, "classes: 1, but a classifier needs two: choose more words, or give --unknown true"),
        ({"words": []}, "classes: 0, but a classifier needs two"),
        ({"num_words": 1}, "classes: 1, but a classifier needs two"),
        ({"num_words": 5}, "num_words is 5, but only 4 words have training and test clips"),
        ({"unknown": True}, "all words are chosen, none is left for the class of unknown words: choose fewer"),
        ({"num_words": 0}, "num_words is 0: give 1 or more"),
        ({"shots": 0}, "shots is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"words": ["yes", "no"], "num_words": 2}, "words and num_words are two ways to choose: give one of them"),
        ({"languages": []}, r"languages is \[\]: give one code or several, each once, such as en"),
        ({"languages": ["en", "en"]}, r"languages is \['en', 'en'\]: give one"),
        ({"n_mels": 4}, "n_mels is 4: give 8 to 80 bands"),
        ({"hop_ms": 1}, "hop_ms is 1: give 5 to 100 milliseconds"),
    ],
)
def test_wrong_choice_refused(en, arguments, message):
    with pytest.raises(UserError, match=message):
        ready(en.parent, **arguments)


def test_several_languages(tmp_path):
    corpus(tmp_path, {"no": (2, 1, 1), "yes": (3, 1, 1), "si": (1, 1, 1)}, "es", LAYOUTS[0])
    corpus(tmp_path, {"no": (4, 1, 1), "yes": (2, 1, 1)}, "en", LAYOUTS[2], kind="one")
    data = ready(tmp_path, languages=["es", "en"])
    assert data.class_names == ["en/no", "en/yes", "es/no", "es/si", "es/yes"]
    assert labels_of(data)[0] == [4, 2, 2, 1, 3]
    assert ready(tmp_path, languages=["es", "en"], num_words=2).class_names == ["en/no", "es/yes"]
    data = ready(tmp_path, languages=["es", "en"], words=["si", "en/no"], unknown=True)
    assert data.class_names == ["es/si", "en/no", "_unknown_"]
    assert labels_of(data)[0] == [1, 4, 3]
    with pytest.raises(UserError, match="the word 'no' is in several languages: give one of es/no, en/no"):
        ready(tmp_path, languages=["es", "en"], words=["no", "si"])
    with pytest.raises(UserError, match="the word 'fr/no' is not in the splits of es, en: the nearest are "):
        ready(tmp_path, languages=["es", "en"], words=["fr/no", "si"])
    assert ready(tmp_path, languages="es").class_names == ["no", "si", "yes"]


@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=2, max_size=8),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_unknown_words_are_as_many_as_a_word_has(counts, chosen, split_seed):
    chosen = min(chosen, len(counts) - 1)
    splits = table({f"en/{number}": of_word for number, of_word in enumerate(counts)})
    rows, labels = choose_clips(splits, range(chosen), unknown=True, split_seed=split_seed)
    again, _ = choose_clips(splits, range(chosen), unknown=True, split_seed=split_seed)
    assert np.array_equal(rows, again)
    assert (np.diff(rows) > 0).all()
    for split in range(3):
        in_split = labels[splits.split_of[rows] == split]
        of_words = [of_word[split] for of_word in counts[:chosen]]
        others = sum(of_word[split] for of_word in counts[chosen:])
        assert np.bincount(in_split, minlength=chosen + 1).tolist() == [
            *of_words,
            min(others, max(1, math.ceil(sum(of_words) / chosen))),
        ]
    assert (splits.word_of[rows[labels == chosen]] >= chosen).all()


def test_unknown_words_follow_from_split_seed(en):
    def unknown(**arguments):
        data = ready(en.parent, words=["up"], unknown=True, **arguments)
        assert data.class_names == ["up", "_unknown_"]
        assert labels_of(data) == [[4, 4], [1, 1], [1, 1]]
        return sounds(data, "_train")

    assert unknown() == unknown(seed=5)
    assert any(unknown() != unknown(split_seed=split_seed) for split_seed in range(1, 4))


def test_unknown_words_without_test_clips_are_refused(tmp_path):
    corpus(tmp_path, {"yes": (2, 1, 1), "no": (2, 1, 1), "up": (2, 1, 0)})
    with pytest.raises(UserError, match="'_unknown_' has no clips in the test split"):
        ready(tmp_path, words=["yes", "no"], unknown=True)


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=2, max_size=5), st.integers(1, 10), st.integers(0, 1000))
def test_shots(counts, shots, seed):
    splits = table({f"en/{number}": of_word for number, of_word in enumerate(counts)})
    rows, labels = choose_clips(splits, range(len(counts)), unknown=False, split_seed=0)
    kept = few_shots(rows, labels, splits, shots, seed, splits.words)
    of_split = splits.split_of[rows[kept]]
    assert np.bincount(labels[kept][of_split == 0]).tolist() == [min(shots, train) for train, _, _ in counts]
    assert np.count_nonzero(of_split) == sum(dev + test for _, dev, test in counts)


def test_shots_follow_from_seed(en, caplog):
    with caplog.at_level(logging.WARNING):
        data = ready(en.parent, num_words=3, unknown=True, shots=3)
    assert messages(caplog) == ["fewer than 3 training clips, so all are used: _unknown_ (2)"]
    assert labels_of(data) == [[3, 3, 3, 2], [2, 1, 2, 1], [2, 1, 2, 1]]
    one, same, other = (ready(en.parent, words=["yes", "no"], shots=2, seed=seed) for seed in (0, 0, 3))
    assert sounds(one, "_train") == sounds(same, "_train")
    assert sounds(one, "_train") != sounds(other, "_train")
    assert sounds(one, "_test") == sounds(other, "_test")
    assert set(sounds(other, "_train")) < set(sounds(ready(en.parent, words=["yes", "no"]), "_train"))


# ---- batches


def test_splits_are_disjoint_and_whole(en):
    data = ready(en.parent)
    held = [sound for name in ("_train", "_val", "_test") for sound, _ in sounds(data, name)]
    files = {one_second(read_audio(path)).tobytes() for path in en.glob("clips/*/*.opus")}
    assert len(held) == len(set(held)) == 28
    assert set(held) == files


def test_batches_do_not_depend_on_workers(en):
    def all_of(**arguments):
        loader = ready(en.parent, batch_size=5, **arguments).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(batches(loader))
        return epochs

    alone, together = all_of(num_workers=0), all_of(num_workers=2)
    for epoch in range(2):
        for part, same in zip(alone[epoch], together[epoch], strict=True):
            assert torch.equal(part, same)
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(alone[0][2], alone[1][2])
    assert not torch.equal(alone[0][2], all_of(seed=1)[0][2])


def test_augmentation_is_of_seed_epoch_and_index(en):
    data = ready(en.parent)
    first = data.front_end(data._train.__getitems__([(3, index) for index in range(8)]))[0]
    assert torch.equal(data.front_end(data._train.__getitems__([(3, 5)]))[0][0], first[5])
    assert not torch.equal(data.front_end(data._train.__getitems__([(4, 5)]))[0][0], first[5])
    draws = data._train.__getitems__([(3, index) for index in range(8)])[2]
    assert len(draws[:, 0].unique()) == 8


def test_no_augmentation_on_request_and_in_evaluation(en):
    data = ready(en.parent, augment=False)
    assert len(next(iter(data.train_dataloader()))) == 2
    assert len(next(iter(ready(en.parent).val_dataloader()))) == 2
    batch = data._train.__getitems__([(0, 3), (1, 3)])
    spectrograms, _ = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(spectrograms[0], spectrograms[1])


def test_setup_once_and_shape_from_the_start(en):
    data = MSWC(en.parent, n_mels=20, hop_ms=20)
    assert data.input_shape == (1, 49, 20)
    data.setup("test")
    train = data._train
    data.setup("fit")
    assert data._train is train
    assert data.front_end(next(iter(data.test_dataloader())))[0].shape == (6, 1, 49, 20)


class Seen(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(97 * 40, 4)
        self.shapes = set()

    def training_step(self, batch, _):
        spectrograms, labels = batch
        self.shapes.add((tuple(spectrograms.shape), spectrograms.dtype))
        return torch.nn.functional.cross_entropy(self.layer(spectrograms.flatten(1)), labels)

    def validation_step(self, batch, _):
        self.shapes.add((tuple(batch[0].shape), batch[0].dtype))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_spectrograms_in_a_trainer(en):
    module = Seen()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=MSWC(en.parent, batch_size=12))
    assert module.shapes == {((count, 1, 97, 40), torch.float32) for count in (12, 4, 6)}


def test_noise(en, tmp_path):
    noise_dir = tmp_path / "noise"
    noise_dir.mkdir()
    with pytest.raises(UserError, match=r"noise_dir .*noise has no WAV files: give another folder, or none"):
        ready(en.parent, noise_dir=noise_dir)
    with pytest.raises(UserError, match=r"noise_dir .*nowhere is not a folder: give one with WAV files, or none"):
        ready(en.parent, noise_dir=tmp_path / "nowhere")
    rng = np.random.default_rng(0)
    for name, seconds in (("b.wav", 2), ("a.WAV", 1)):
        soundfile.write(noise_dir / name, rng.integers(-9000, 9000, 16000 * seconds, np.int16), 16000, format="WAV")
    (noise_dir / "README.md").write_text("no sound")
    data = ready(en.parent, noise_dir=noise_dir)
    assert len(data.front_end.noise) == 48000
    batch = data._train.__getitems__([(0, index) for index in range(16)])
    plain = ready(en.parent).front_end(batch)[0]
    changed = (data.front_end(batch)[0] != plain).flatten(1).any(1)
    assert 8 <= changed.sum() < 16  # 80 % of the clips are mixed with noise


# ---- missing and broken files


@pytest.fixture
def many(tmp_path):
    """240 clips, so that 2 are under 1 %."""
    return corpus(tmp_path / "mswc", {"yes": (80, 20, 20), "no": (80, 20, 20)}, same=True)


def test_few_missing_clips_are_left_out(many, caplog):
    gone = many / "clips/yes/common_voice_en_0007.opus"
    gone.unlink()
    (many / "clips/no/common_voice_en_2003.opus").unlink()
    with caplog.at_level(logging.WARNING):
        data = ready(many.parent)
    assert labels_of(data) == [[80, 79], [20, 20], [19, 20]]
    assert messages(caplog) == [f"2 of 240 clips that the splits name are missing, {gone} the first: they are left out"]


@pytest.mark.parametrize("skip_broken", [False, True])
def test_many_missing_clips_are_refused(many, skip_broken):
    for number in range(3):
        (many / f"clips/yes/common_voice_en_000{number}.opus").unlink()
    message = r"3 of 240 clips .* are missing, .*clips/yes/common_voice_en_0000.opus the first: is it the right"
    with pytest.raises(UserError, match=message):
        ready(many.parent, skip_broken=skip_broken)


def test_words_without_any_clip_are_named(many, caplog):
    shutil.rmtree(many / "clips/yes")
    with pytest.raises(
        UserError, match=r"120 of 240 clips .* missing, .*; there is none at all of en/yes: is it the right"
    ):
        ready(many.parent)
    corpus(many.parent, {"yes": (100, 1, 1), "no": (200, 1, 1), "typo": (1, 1, 1)}, same=True)
    shutil.rmtree(many / "clips/typo")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="'typo' has no clips in the train split: choose other words"),
    ):
        ready(many.parent)
    assert "3 of 307 clips" in messages(caplog)[0]
    assert "the first; there is none at all of en/typo: they are left out" in messages(caplog)[0]


def test_wrong_folder_refused(en):
    shutil.rmtree(en / "clips")
    message = r"none of the clips .* is in .*/en, neither .*/yes/common_voice_en_0000.opus nor, say, .*/en/yes_common"
    with pytest.raises(UserError, match=message):
        ready(en.parent)


def test_broken_clips(en, caplog):
    broken = en / "clips/no/common_voice_en_0001.opus"
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{broken} cannot be decoded \(.*\): remove it or give --skip_broken true"):
        ready(en.parent)
    with caplog.at_level(logging.WARNING):
        data = ready(en.parent, skip_broken=True)
    assert labels_of(data)[0] == [2, 3, 4, 6]
    assert [message.partition(":")[0] for message in messages(caplog)] == ["1 of 28 clips are left out"]


def test_word_of_broken_clips_is_refused(en):
    (en / "clips/left/common_voice_en_2000.opus").write_bytes(b"")
    with pytest.raises(UserError, match="'left' has no clips in the test split"):
        ready(en.parent, skip_broken=True)


def test_cache_on_disk_is_filled_once(en, tmp_path):
    data = MSWC(en.parent, cache="disk", cache_dir=tmp_path / "cache")
    data.prepare_data()
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("mswc_en-")
    before = os.stat(folder / "clips.npy").st_mtime_ns
    data.setup()
    again = ready(en.parent, cache="disk", cache_dir=tmp_path / "cache")
    assert os.stat(folder / "clips.npy").st_mtime_ns == before
    assert isinstance(again._train.clips, np.memmap)
    assert sounds(again, "_train") == sounds(ready(en.parent), "_train")


# ---- archives


def add(tar, name, contents=b"", **properties):
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    for key, value in properties.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(contents))


def archive(path, folder, rename, pattern="**/*"):
    """An archive of the files of a folder, with names made of theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                add(tar, rename(file.relative_to(folder).as_posix()), file.read_bytes())
    return path


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


AUDIO_NAMES = [
    lambda name: f"en/{name}",
    lambda name: f"./en/{name}",
    lambda name: name,
    lambda name: "/" + name.removeprefix("clips/").replace("/", "_"),
]
TABLE_NAMES = [
    lambda name: name,
    lambda name: f"en/{name}",
    lambda name: f"./splits/en/{name}",
    lambda name: f"/{name}",
]


@pytest.mark.parametrize(("audio_name", "table_name"), list(zip(AUDIO_NAMES, TABLE_NAMES, strict=True)))
def test_archives_are_unpacked_once(en, tmp_path, audio_name, table_name, monkeypatch):
    archives = [
        archive(tmp_path / "down/0.tar.gz", en, audio_name, "clips/**/*"),
        archive(tmp_path / "down/splits.tar.gz", en, table_name, "*.csv"),
    ]
    data_dir = tmp_path / "new/data"
    data = ready(data_dir, archives=archives)
    assert sounds(data, "_train") == sounds(ready(en.parent), "_train")
    assert {path.name for path in data_dir.iterdir() if not path.name.startswith(".unpacked-")} == {"en"}
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    monkeypatch.setattr(mswc_files, "_unpack_files", None)
    ready(data_dir, archives=archives)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def test_archives_of_several_languages(tmp_path):
    one, other = corpus(tmp_path / "one", language="en"), corpus(tmp_path / "one", language="sv-SE")
    same = tmp_path / "down"
    archives = [
        archive(same / "en/train/audio/0.tar.gz", one, lambda name: "/" + name[6:].replace("/", "_"), "clips/**/*"),
        archive(same / "sv-SE.tar.gz", other, lambda name: name, "clips/**/*"),
        archive(same / "1.tar.gz", one, lambda name: name, "*.csv"),
        archive(same / "2.tar.gz", other, lambda name: f"./{name}", "*.csv"),
    ]
    data = ready(tmp_path / "new", languages=["en", "sv-SE"], archives=archives)
    assert data.num_classes == 8
    assert (tmp_path / "new/en/audio/yes_common_voice_en_0000.opus").is_file()
    assert (tmp_path / "new/sv-SE/clips/yes/common_voice_sv-SE_0000.opus").is_file()
    nameless = archive(tmp_path / "down/audio.tar.gz", other, lambda name: name, "clips/**/*")
    with pytest.raises(UserError, match=r"does not say which of en, sv-SE it holds: rename it, say, en_audio.tar.gz"):
        unpack_mswc(nameless, tmp_path / "other", ["en", "sv-SE"])


def test_shards_are_joined_and_what_is_there_remains(en, tmp_path):
    shards = [
        archive(tmp_path / f"{split}/0.tar.gz", en, lambda name: name, f"clips/*/*_{number}*.opus")
        for number, split in enumerate(SPLITS)
    ]
    data_dir = tmp_path / "new"
    shutil.copytree(en / "clips/yes", data_dir / "en/clips/yes")
    for shard in shards:
        unpack_mswc(shard, data_dir, ["en"])
    assert tree(data_dir / "en/clips") == tree(en / "clips")


def test_nothing_is_overwritten(en, tmp_path):
    path = archive(tmp_path / "en.tar.gz", en, lambda name: f"en/{name}")
    mine = tmp_path / "new/en/clips/yes/common_voice_en_0003.opus"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(
        UserError, match=rf"{mine} is there already, and not as in .*en.tar.gz: move it away, or leave out"
    ):
        unpack_mswc(path, tmp_path / "new", ["en"])
    assert tree(tmp_path / "new") == {"en/clips/yes/common_voice_en_0003.opus": b"mine"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["en"]


def test_archives_may_each_have_a_version(tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as tar:
            add(tar, f"en/{number}.csv", b"x")
            add(tar, "en/version.txt", f"{number}".encode())
        unpack_mswc(tmp_path / f"{number}.tar.gz", tmp_path / "new", ["en"])
    assert tree(tmp_path / "new") == {"en/0.csv": b"x", "en/1.csv": b"x", "en/version.txt": b"0"}


def outside(tar):
    add(tar, "en/clips/yes/../../../../escaped.opus", b"x")


def absolute_link(tar):
    add(tar, "en/clips/yes/a.opus", type=tarfile.SYMTYPE, linkname="/etc/passwd")


def relative_link(tar):
    add(tar, "en/clips/yes/a.opus", type=tarfile.SYMTYPE, linkname="../b.opus")


def hard_link(tar):
    add(tar, "en/clips/yes/a.opus", type=tarfile.LNKTYPE, linkname="/etc/passwd")


def device(tar):
    add(tar, "en/clips/yes/a.opus", type=tarfile.CHRTYPE)


@pytest.mark.parametrize("hostile", [outside, absolute_link, relative_link, hard_link, device])
def test_hostile_archive_leaves_nothing(en, tmp_path, hostile):
    path = tmp_path / "en.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "en/clips/no/b.opus", b"x")
        hostile(tar)
    before = tree(en.parent)
    with pytest.raises(
        UserError, match=r"en.tar.gz (has a member|holds a link or a device).*: do not trust this archive"
    ):
        ready(en.parent, archives=[path])
    assert tree(en.parent) == before
    assert [path.name for path in en.parent.iterdir()] == ["en"]
    assert not list(tmp_path.rglob("escaped*"))


def test_truncated_archive_leaves_nothing(en, tmp_path):
    path = archive(tmp_path / "en.tar.gz", en, lambda name: f"en/{name}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"en.tar.gz .*: download it again"):
        ready(tmp_path / "new", archives=[path])
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"0.tar.gz holds no files: download it again"),
        (["etc/passwd"], r"0.tar.gz holds a folder 'etc', neither clips nor one of the languages \(en\)"),
        (["de/clips/ja/a.opus"], r"0.tar.gz holds a folder 'de', neither clips nor"),
        (["a/train.csv", "b/train.csv"], r"0.tar.gz has several files of one name: unpack it yourself"),
    ],
)
def test_other_archive_refused(tmp_path, names, message):
    path = tmp_path / "0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            add(tar, name, b"x")
    with pytest.raises(UserError, match=message):
        unpack_mswc(path, tmp_path / "new", ["en"])
    assert list((tmp_path / "new").iterdir()) == []


def test_missing_archive_refused(tmp_path):
    with pytest.raises(UserError, match=r"en.tar.gz does not exist: give a .tar or .tar.gz file"):
        ready(tmp_path / "new", archives=[tmp_path / "en.tar.gz"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("link", ["/etc/hello.opus", "../../secret.opus", "yes/../../secret.opus"])
def test_link_that_leaves_the_folder_is_refused(en, link):
    table = en / "en_train.csv"
    table.write_text(table.read_text(encoding="utf-8") + f"{link},yes,True,ab12,NAN\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"en_train\.csv, line \d+: \S+ leaves the folder: do not use it"):
        ready(en.parent)
