"""Evaluations on processes of this machine or on a Dask cluster, in place of ``map``.

Python's own pool rather than another (tried on 2026-11-21 with two workers): workers of loky, pebble and mpire, too,
outlive a parent that is killed, and none tries a lost evaluation again. loky 3.7 breaks as a whole where a worker dies,
as Python's does, and ends workers that grow by 300 MB, which lose what they have cached. pebble 5.2 loses one
evaluation only, but waits forever for one that ended with ``os._exit(0)``, breaks where an idle worker dies, and starts
the worker in its place without ``OMP_NUM_THREADS``. mpire 2.10 ends 1.7 s after Ctrl-C, with two tracebacks. Workers of
a Dask cluster on this machine start in 6 to 8 s, these in 1.5 to 2.

Dask rather than Ray: ``distributed`` is pure Python, comes with 20 MB of packages under BSD-3, needs two commands to
be a cluster, and speaks ``concurrent.futures`` like the pool of this machine. Ray's wheel is 80 MB, 200 unpacked, and
starts daemons of its own in C++ on every machine.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import pickle
import reprlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Self

from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
SILENT_SECONDS = 60  # without a result, before the cluster is asked whether it has workers


def check_workers(processes: int, cluster: str | None) -> None:
    """Raises ``UserError`` where evaluations cannot be shared out so; starts nothing and asks nobody."""
    check_at_least_one(processes=processes)
    if cluster is not None and processes > 1:
        raise UserError(f"processes is {processes} beside cluster {cluster}: leave one of them out")


class Workers:
    """Evaluates on processes of this machine, or on a cluster; a worker that dies costs its evaluation, not the search.

    With one process and no cluster, ``map`` evaluates in this process. More processes are started as they are needed
    and kept between calls, so that what they have cached stays. They have one OpenMP thread each, and a fresh
    interpreter: torch hangs in forked ones. A script that uses them needs ``if __name__ == "__main__"``.

    A cluster is a Dask scheduler and workers, each with this package and the data under the same paths::

        uv run --extra cluster dask scheduler
        uv run --extra cluster dask worker tcp://10.0.0.5:8786 --nworkers 8 --nthreads 1

    Args:
        processes: How many evaluations run at once on this machine.
        cluster: Address of a Dask scheduler, such as ``tcp://10.0.0.5:8786``, in place of processes.

    Raises:
        UserError: There are fewer than one processes, or a cluster beside them; ``distributed`` is not installed, or
            there is no scheduler at the address within ten seconds.

    Example::

        with Workers(processes=4) as workers:
            toolbox.register("map", workers.map)
            ...
    """

    def __init__(self, processes: int = 1, cluster: str | None = None):
        check_workers(processes, cluster)
        self.processes = processes
        self.cluster = cluster
        self._client = None if cluster is None else _connect(cluster)
        self._executor: Executor | None = None

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
        """The results of ``function`` in the order of the arguments, as ``list(map(function, *iterables))``.

        What was under way when a worker died is tried once more, one at a time, which shows the culprit. Its result is
        None, and a warning names it. (On a cluster the scheduler tries it several times before, by
        ``distributed.scheduler.allowed-failures``.) The first exception of an evaluation ends the others and is raised.

        Raises:
            UserError: The cluster's scheduler is gone; or ``function`` raised it.
        """
        calls = list(zip(*iterables, strict=False))  # to the end of the shortest, as map does
        if self.processes == 1 and self.cluster is None:
            return [function(*arguments) for arguments in calls]
        dumps = pickle.dumps if self._client is None else _cloudpickle_dumps
        tasks = [dumps((function, arguments)) for arguments in calls]
        results: dict[int, Any] = {}
        waiting = deque(range(len(tasks)))
        try:
            self._warn_without_workers()
            while waiting:
                for index in self._evaluate(tasks, waiting, results):
                    if self._evaluate(tasks, deque([index]), results):
                        results[index] = None
                        call = getattr(function, "__name__", function), ", ".join(map(reprlib.repr, calls[index]))
                        log.warning(
                            "evaluation %d of %d, %s(%s), ended each worker that tried it, as a crash or too little "
                            "memory does: its result is None", index + 1, len(tasks), *call,
                        )  # fmt: skip
        except BaseException:
            self._abandon()
            raise
        return [results[index] for index in range(len(tasks))]

    def close(self) -> None:
        """Ends the processes, or leaves the cluster."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _evaluate(self, tasks: list[bytes], waiting: deque[int], results: dict[int, Any]) -> list[int]:
        """Evaluates until nothing waits or a worker died; returns what was under way on workers that died."""
        at_once = self.processes if self._client is None else math.inf  # a cluster's scheduler has a queue of its own
        running: dict[Future, int] = {}
        lost = []
        while running or (waiting and not lost):
            while waiting and not lost and len(running) < at_once:
                index = waiting.popleft()
                running[self._submit(tasks[index])] = index
            done = wait(running, SILENT_SECONDS, FIRST_COMPLETED).done
            if not done:
                self._warn_without_workers()
            for future in done:
                index = running.pop(future)
                try:
                    results[index] = future.result()
                except Exception as error:
                    if _is_death(error):
                        lost.append(index)
                    elif explanation := self._explanation(error):
                        raise explanation from error
                    else:
                        raise
            if lost and self._client is None:  # a pool that lost a process ends the others
                lost += running.values()
                running.clear()
                self._abandon()
        return sorted(lost)

    def _submit(self, task: bytes) -> Future:
        if self._client is not None:
            self._executor = self._executor or self._client.get_executor(pure=False)
            return self._executor.submit(_travelling_evaluate(), task)
        with _inherited_by_workers():
            if self._executor is None:
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(self.processes, context, initializer=_end_with_parent)
            pool = self._executor
            try:
                future = pool.submit(_evaluate, task)
            # the last two: broken in the middle of submit, its pipes closed
            except (BrokenProcessPool, OSError, ValueError):
                if not pool._broken:
                    raise
        if pool._broken:  # by a process that died meanwhile; Python 3.11's pool may never say so of this evaluation
            future = Future()
            future.set_exception(BrokenProcessPool())
        return future

    def _abandon(self) -> None:
        """Ends what is running, at once on this machine; on a cluster, once what has begun is done."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        if self._client is not None:
            executor.shutdown(wait=False)
            return
        for process in list((executor._processes or {}).values()):  # public from Python 3.14 on: kill_workers
            process.kill()
        executor.shutdown(cancel_futures=True)

    def _warn_without_workers(self) -> None:
        if self._client is None:
            return
        try:
            workers = self._client.nthreads()
        except OSError as error:
            raise self._explanation(CancelledError()) from error
        if not workers:
            log.warning(
                "no worker has joined %s: waiting for `dask worker %s --nthreads 1`", self.cluster, self.cluster
            )

    def _explanation(self, error: Exception) -> UserError | None:
        """What an exception means that is the cluster's and not the evaluation's."""
        if self._client is None:
            return None
        if isinstance(error, CancelledError):
            return UserError(f"the Dask scheduler at {self.cluster} is gone: start it and the search again")
        if isinstance(error, ModuleNotFoundError):
            return UserError(
                f"a worker of cluster {self.cluster} lacks what this machine has ({error}): start it in the same "
                "environment"
            )
        return None


_one_at_a_time = threading.Lock()  # torch's random state belongs to the process, and a Dask worker may have threads


def _evaluate(task: bytes) -> Any:
    """What a worker does; unpickled here, a function that it cannot import is an exception and not its death."""
    with _one_at_a_time:
        function, arguments = pickle.loads(task)
        return function(*arguments)


def _travelling_evaluate() -> Callable[[bytes], Any]:
    """``_evaluate`` for a cluster: a worker of Dask's that cannot import what it is sent falls silent."""

    def evaluate(task: bytes) -> Any:  # nested, so pickled as a whole
        from microtune.recipes.search.workers import _evaluate

        return _evaluate(task)

    return evaluate


def _end_with_parent() -> None:
    """Ends this worker when the process that started it was killed and could not."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """Lets processes that are started in the block have one OpenMP thread, and leave Ctrl-C to this process."""
    before = os.environ.get("OMP_NUM_THREADS")
    # read when torch is loaded, which is before the pool's initializer where the main script imports it
    os.environ["OMP_NUM_THREADS"] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _is_death(error: Exception) -> bool:
    """Whether a worker died, as the pool and Dask say it."""
    return isinstance(error, BrokenProcessPool) or type(error).__name__ == "KilledWorker"  # Dask may not be installed


def _cloudpickle_dumps(value: Any) -> bytes:
    """Pickles what the main script defines as a whole: the workers of a cluster have another."""
    import cloudpickle  # comes with distributed, which is an extra

    return cloudpickle.dumps(value)


def _connect(address: str) -> Any:
    """A client of the Dask scheduler at ``address``."""
    try:
        import distributed  # an extra: who searches on one machine needs none of it
    except ImportError as error:
        raise UserError(
            f"cluster {address} needs the package distributed: pip install 'microtune[cluster]', "
            "or uv sync --extra cluster"
        ) from error

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # tracebacks of a lost scheduler, before ours

    async def identity() -> dict[str, Any]:
        async with asyncio.timeout(CONNECT_SECONDS), distributed.rpc(address) as scheduler:
            return await scheduler.identity()

    try:
        # Client's own timeout does not end its wait for something that accepts connections and is no scheduler
        kind = asyncio.run(identity())["type"]
        client = None
        if kind == "Scheduler":
            client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except TimeoutError as error:
        raise UserError(
            f"cluster {address} did not answer within {CONNECT_SECONDS} s: start `dask scheduler` there, and give the "
            "address that it prints"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"cluster {address!r} is none ({error}): give the address that `dask scheduler` prints"
        ) from error
    if client is None:
        raise UserError(f"cluster {address} is a Dask {kind.lower()}: give the address that `dask scheduler` prints")
    threads = max(client.nthreads().values(), default=1)
    if threads > 1:
        log.warning("workers with %d threads evaluate one at a time all the same: use --nthreads 1", threads)
    return client
