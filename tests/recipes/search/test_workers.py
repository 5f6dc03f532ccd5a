"""Evaluations on processes and on a cluster, with workers that die."""

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.search import workers as workers_module
from microtune.recipes.search.workers import Workers

# a test file is no module that a worker could import
JOBS = """
import os
import time

from microtune.modules.user_error import UserError


def double(value):
    return 2 * value


def add(first, second):
    return first + second


def later_first(value):
    time.sleep(0.2 if value == 0 else 0)
    return value


def double_or_die(value, dies, marks):
    (marks / f"{value}-{time.monotonic_ns()}").touch()
    if value == dies:
        time.sleep(0.1)
        os._exit(9)
    return 2 * value


def die_once(marks):
    mark = marks / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return "alive"


def refuse(value):
    if value == 1:
        raise UserError("value 1 is no good: give another")
    time.sleep(60)


def environment(_):
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A module that the workers can import, with what they are to do."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs_of_the_workers.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # spawned processes get sys.path
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # and Dask's scheduler and workers this
        yield importlib.import_module("jobs_of_the_workers")


@pytest.fixture(scope="module")
def pool(jobs):
    with Workers(processes=2) as workers:
        yield workers


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == workers_module.__name__]


def times_tried(folder, value):
    return len(list(folder.glob(f"{value}-*")))


def test_one_process_is_plain_map():
    seen = []
    with Workers() as workers:
        assert (
            workers.map(lambda value: seen.append(value) or threading.get_ident(), "abc") == [threading.get_ident()] * 3
        )
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("processes", [0, -3])
def test_too_few_processes(processes):
    with pytest.raises(UserError, match=f"processes is {processes}: give 1 or more"):
        Workers(processes)


def test_processes_and_cluster():
    with pytest.raises(UserError, match="processes is 2 beside cluster tcp://a:1: leave one of them out"):
        Workers(2, "tcp://a:1")


class TestProcesses:
    def test_order_is_kept(self, pool, jobs):
        assert pool.map(jobs.later_first, range(5)) == [0, 1, 2, 3, 4]
        assert pool.map(jobs.add, [1, 2, 3], [10, 20]) == [11, 22]
        assert pool.map(jobs.double, []) == []

    def test_processes_are_kept_and_have_one_thread(self, pool, jobs, monkeypatch):
        pool.map(jobs.double, range(2))  # both are started
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        first, second = (pool.map(jobs.environment, range(6)) for _ in range(2))
        assert {process for process, _ in first + second} <= set(pool._executor._processes)
        assert {threads for _, threads in first + second} == {"1"}
        assert os.environ["OMP_NUM_THREADS"] == "7"

    def test_environment_is_put_back(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with workers_module._inherited_by_workers():
            assert os.environ["OMP_NUM_THREADS"] == "1"
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert "OMP_NUM_THREADS" not in os.environ
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def test_evaluation_that_kills_its_worker_is_none(self, pool, jobs, tmp_path, caplog):
        values = range(6)
        assert pool.map(jobs.double_or_die, values, [2] * 6, [tmp_path] * 6) == [0, 2, None, 6, 8, 10]
        (warning,) = warnings_in(caplog)
        assert warning.startswith("evaluation 3 of 6, double_or_die(2, 2, PosixPath(")
        assert warning.endswith("its result is None")
        # finished results are kept, and the culprit is tried twice
        assert [times_tried(tmp_path, value) for value in (0, 2)] == [1, 2]
        assert pool.map(jobs.double, [4]) == [8]

    def test_worker_that_dies_once_costs_nothing(self, pool, jobs, tmp_path, caplog):
        assert pool.map(jobs.die_once, [tmp_path]) == ["alive"]
        assert not warnings_in(caplog)

    def test_worker_that_dies_between_calls_costs_nothing(self, pool, jobs, caplog):
        ((process, _),) = pool.map(jobs.environment, [0])
        os.kill(process, signal.SIGKILL)
        assert pool.map(jobs.double, [1, 2]) == [2, 4]
        assert not warnings_in(caplog)

    def test_exception_is_raised_and_ends_the_others(self, pool, jobs):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"^value 1 is no good: give another$"):
            pool.map(jobs.refuse, [0, 1, 2])
        assert time.monotonic() - started < 20
        assert pool.map(jobs.double, [4]) == [8]

    def test_function_that_cannot_be_imported_is_an_exception(self, pool, jobs, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            (tmp_path / "only_here.py").write_text("def job(value): return value")
            patch.syspath_prepend(tmp_path)
            job = importlib.import_module("only_here").job
        pool.map(jobs.double, range(2))
        with pytest.raises(ModuleNotFoundError, match="only_here"):
            pool.map(job, [1])

    def test_nothing_is_left(self, jobs):
        threads = set(threading.enumerate())
        with Workers(processes=2) as workers:
            processes = {process for process, _ in workers.map(jobs.environment, range(3))}
        assert set(threading.enumerate()) == threads
        assert not any(is_alive(process) for process in processes)


SCRIPT = """
import time
from microtune.recipes.search.workers import Workers

if __name__ == "__main__":
    with Workers(2) as workers:
        workers.map(print, ["started"])
        workers.map(time.sleep, [60] * 3)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_search_ends_its_workers(number, tmp_path):
    script = tmp_path / "search.py"
    script.write_text(SCRIPT)
    search = subprocess.Popen(
        [sys.executable, "-u", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert search.stdout.readline() == "started\n"
    time.sleep(0.2)
    # Ctrl-C goes to the workers, too
    (os.killpg if number == signal.SIGINT else os.kill)(search.pid, number)
    # the workers hold the pipes, so this is over when they are
    _, errors = search.communicate(timeout=30)
    assert search.returncode == -number
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1
        assert errors.endswith("KeyboardInterrupt\n")


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def distributed():
    package = pytest.importorskip("distributed", reason="the cluster extra is not installed")
    # workers fork from a process that has imported Dask, which takes most of their start
    with importlib.import_module("dask").config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield package


@pytest.fixture(scope="module")
def cluster(distributed, jobs):
    """A scheduler that gives a task up at the first death, and two workers in processes of their own."""
    settings = {"distributed.scheduler.allowed-failures": 0}
    with (
        importlib.import_module("dask").config.set(settings),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=logging.CRITICAL
        ) as cluster,
    ):
        yield cluster


class TestCluster:
    def test_results(self, cluster, jobs, caplog):
        with Workers(cluster=cluster.scheduler_address) as workers:
            assert workers.map(jobs.later_first, range(5)) == [0, 1, 2, 3, 4]
            assert workers.map(lambda value: value + 1, [1]) == [2]  # what no worker could import
            results = workers.map(jobs.environment, range(6))
            assert len({process for process, _ in results} - {os.getpid()}) == 2
            assert {threads for _, threads in results} == {"1"}
        assert not warnings_in(caplog)

    def test_exceptions(self, cluster, jobs, tmp_path):
        with Workers(cluster=cluster.scheduler_address) as workers:
            with pytest.raises(UserError, match=r"^value 1 is no good: give another$"):
                workers.map(jobs.refuse, [1])
            with pytest.MonkeyPatch.context() as patch:
                (tmp_path / "only_at_home.py").write_text("def job(value): return value")
                patch.syspath_prepend(tmp_path)
                job = importlib.import_module("only_at_home").job
            with pytest.raises(
                UserError, match=r"lacks what this machine has .*only_at_home.*: start it in the same env"
            ):
                workers.map(job, [1])

    def test_evaluation_that_kills_its_worker_is_none(self, cluster, jobs, tmp_path, caplog):
        with Workers(cluster=cluster.scheduler_address) as workers:
            results = workers.map(jobs.double_or_die, range(4), [2] * 4, [tmp_path] * 4)
            assert results == [0, 2, None, 6]
            (warning,) = warnings_in(caplog)
            assert warning.startswith("evaluation 3 of 4, double_or_die(2, 2, ")
            assert times_tried(tmp_path, 2) == 2
            assert workers.map(jobs.double, [1]) == [2]

    def test_nothing_is_left(self, cluster, jobs):
        threads = set(threading.enumerate())
        with Workers(cluster=cluster.scheduler_address) as workers:
            workers.map(jobs.double, [1])
        assert set(threading.enumerate()) <= threads

    def test_worker_in_place_of_the_scheduler(self, cluster):
        address = next(iter(cluster.scheduler.workers))
        with pytest.raises(UserError, match=r"is a Dask worker: give the address that `dask scheduler` prints"):
            Workers(cluster=address)

    def test_no_worker_and_then_no_scheduler(self, distributed, jobs, caplog, monkeypatch):
        monkeypatch.setattr(workers_module, "SILENT_SECONDS", 0.1)
        monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 1)
        with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=logging.CRITICAL) as empty:
            address = empty.scheduler_address
            with Workers(cluster=address) as workers:
                threading.Timer(0.5, empty.scale, [1]).start()
                assert workers.map(jobs.double, [1]) == [2]
                empty.close()
                with pytest.raises(
                    UserError, match=f"the Dask scheduler at {address} is gone: start it and the search"
                ):
                    workers.map(jobs.double, [1])
        assert f"no worker has joined {address}: waiting for `dask worker {address} --nthreads 1`" in warnings_in(
            caplog
        )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.0.0.5", "'10.0.0.5' is none .missing port number.*: give the address that `dask scheduler` prints"),
        ("http://a:1", "'http://a:1' is none .unknown address scheme 'http'"),
        ("tcp://127.0.0.1:1", "tcp://127.0.0.1:1 did not answer within 0.5 s: start `dask scheduler` there"),
        ("silent", r"tcp://127.0.0.1:\d+ did not answer within 0.5 s: start `dask scheduler` there"),
    ],
)
def test_no_scheduler(distributed, address, message, monkeypatch):
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 0.5)
    threads = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never says a word
        address = address.replace("silent", f"tcp://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=f"^cluster {message}"):
            Workers(cluster=address)
    assert set(threading.enumerate()) <= threads


def test_without_distributed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'microtune\[cluster\]', or uv sync --extra cluster"):
        Workers(cluster="tcp://10.0.0.5:8786")
