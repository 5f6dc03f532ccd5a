"""An offline run of Weights & Biases, read back from its file."""

import hashlib
import json
from base64 import b64encode
from types import SimpleNamespace

import pytest
import wandb

from microtune.modules.sparse_update.update_scheme import UpdateScheme


@pytest.fixture(scope="module")
def run(process, offline_run, tiny_run, as_words, scheme_file, tmp_path_factory):
    """A training run with the default logger, by a user who is not logged in and cannot answer.

    Of all tests the one in which a training recipe is run as a program to its end.
    """
    home, out_dir = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("wandb") / "out"
    arguments = tiny_run("train_cifar") | {"epochs": 2, "scheme": scheme_file, "out_dir": out_dir}
    del arguments["logger"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_SILENT", "NETRC"):
            patch.delenv(name, raising=False)
        ended = process("train_cifar", *as_words(arguments), HOME=str(home))
    assert ended.status == 0, ended.errors
    return SimpleNamespace(
        ended=ended,
        arguments=arguments,
        out_dir=out_dir,
        report=json.loads((out_dir / "report.json").read_text()),
        **vars(offline_run(out_dir)),
    )


def test_nothing_is_asked(run):
    printed = run.ended.output + run.ended.errors
    for word in ("wandb login", "API key", "Enter your choice", "authorize"):
        assert word not in printed


def test_config_holds_arguments_scheme_and_memory(run):
    logged = run.config["arguments"]
    expected = run.arguments | {name: str(run.arguments[name]) for name in ("data_dir", "scheme", "out_dir")}
    assert {name: logged[name] for name in expected} == expected
    assert (logged["optimizer"], logged["logger"]) == ("sgd", "wandb")  # defaults too
    assert UpdateScheme.from_dict(run.config["scheme"]) == UpdateScheme.load(run.arguments["scheme"])
    memory = run.config["memory"]
    assert (memory["mcu"], memory["budget_bytes"]) == ("stm32f746", 288 * 1024)
    for name in ("extra_memory_bytes", "peak_memory_bytes", "autograd_bytes_per_sample", "fits"):
        assert memory[name] == run.report[name]


def test_history_holds_the_curves(run):
    losses = [row["train/loss"] for row in run.history if "train/loss" in row]
    top1 = [row["val/top1"] for row in run.history if "val/top1" in row]
    assert len(losses) == 1  # 12 steps, every tenth is logged
    assert len(top1) == 2 + 1  # after every epoch, and of the weights that are tested
    assert top1[-1] == run.report["val_top1"]


def test_summary_holds_the_results(run):
    assert run.summary["top1"] == run.report["top1"]
    assert run.summary["peak_memory_bytes"] == run.report["peak_memory_bytes"]


def test_memory_picture(run):
    (row,) = (row for row in run.history if "memory/path" in row)
    assert row["memory/_type"] == "image-file"
    picture = (run.files / row["memory/path"]).read_bytes()
    assert hashlib.sha256(picture).hexdigest() == row["memory/sha256"]
    assert picture == (run.out_dir / "memory.png").read_bytes()


def test_confusion_matrix(run):
    (row,) = (row for row in run.history if "test/confusion_matrix_table/path" in row)
    table = json.loads((run.files / row["test/confusion_matrix_table/path"]).read_text())
    assert table["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert len(table["data"]) == 10 * 10
    assert {actual for actual, _, _ in table["data"]} == {f"class {number}" for number in range(10)}
    assert sum(count for *_, count in table["data"]) == run.report["test_samples"]
    right = sum(count for actual, predicted, count in table["data"] if actual == predicted)
    assert right / run.report["test_samples"] == pytest.approx(run.report["top1"])


def test_scheme_is_an_artifact(run):
    (artifact,) = (artifact for artifact in run.artifacts if artifact.type == "update-scheme")
    (entry,) = artifact.manifest.contents
    assert entry.path == "scheme.json"
    digest = b64encode(hashlib.md5((run.out_dir / "scheme.json").read_bytes()).digest()).decode()
    assert entry.digest == digest
    assert UpdateScheme.from_dict(json.loads(artifact.metadata)) == UpdateScheme.load(run.arguments["scheme"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_no_file_holds_a_key(command, tiny_run, as_words, monkeypatch, tmp_path):
    """The key of a user who is logged in, here in the environment, is in no file that a run writes."""
    key = "0123456789abcdef" * 2 + "01234567"
    for name, value in {"WANDB_API_KEY": key, "WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    arguments = tiny_run("train_cifar") | {"epochs": 1, "logger": "wandb", "out_dir": tmp_path / "out"}
    ended = command("train_cifar", *as_words(arguments))
    wandb.teardown()
    assert ended.status == 0, ended.errors
    assert list(tmp_path.glob("out/wandb/offline-run-*/run-*.wandb"))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path
    assert key not in ended.output + ended.errors
