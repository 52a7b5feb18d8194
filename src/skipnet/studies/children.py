"""Runs of a study as processes: several at once, a log file each, stopped together.

A child is a plain `skipnet train --resume RUN`: a run that has not begun is one that was stopped
before its first step.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from skipnet.errors import UserError
from skipnet.studies.study import Child, Study
from skipnet.studies.view import View
from skipnet.training.config import TrainConfig
from skipnet.training.loop import StopRequest

TRAIN = (sys.executable, "-m", "skipnet.cli", "train", "--resume")
LAST_LINES = 8
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end.

    Attributes:
        name: The child's.
        code: Its exit code; minus a signal's number; None if it never began.
        text: The last lines of its log, or why it never began.
    """

    name: str
    code: int | None
    text: str


@dataclass
class Result:
    """What became of the runs that were to be done.

    Attributes:
        failures: Those that did not come to their end, unless they were stopped.
        stopped: Whether Ctrl-C or SIGTERM ended it.
    """

    failures: list[Failure]
    stopped: bool


def places(config: TrainConfig, jobs: int | None) -> list[dict[str, str]]:
    """Return the environment variables of every place for a child: its device, its threads.

    Args:
        config: Says whether GPUs may be used.
        jobs: Children at once; one a GPU, or one on a CPU, if None. More than GPUs share them.

    Raises:
        UserError: When jobs is below 1.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}: give 1 or more runs at once")
    devices = [] if config.accelerator == "cpu" else _visible_devices()
    jobs = jobs or max(1, len(devices))
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if not devices:
        return [variables] * jobs
    return [
        variables | {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} for job in range(jobs)
    ]


def run_children(
    study: Study,
    children: Sequence[Child],
    *,
    environments: Sequence[dict[str, str]],
    view: View,
    finished: Callable[[], object],
) -> Result:
    """Run what is not finished yet, each once the child that it starts from is.

    A failed child leaves the others be, but for those that start from it. Ctrl-C or SIGTERM is
    passed on once: children write checkpoints. A second one kills them.

    Args:
        study: Locked.
        children: In the order to begin with.
        environments: See `places`; one child runs in each at a time.
        view: Shows what goes on.
        finished: Called after each child that came to its end.
    """
    processes = _Processes()
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for variables in environments:
        free.put(variables)

    def work(child: Child) -> Failure | None:
        variables = free.get()
        try:
            path = study.prepare(child)
            log = path.with_name(f"{path.name}.log")
            view.begun(child)
            code, text = processes.run([*TRAIN, str(path)], log, variables)
        except UserError as error:
            return Failure(child.name, None, str(error))
        finally:
            free.put(variables)
        return Failure(child.name, code, text) if code != 0 else None

    done = {child.name for child in children if study.finished(child)}
    left = [child for child in children if child.name not in done]
    failures: dict[str, Failure] = {}
    running: dict[Future[Failure | None], Child] = {}
    told = False
    with StopRequest() as stop, ThreadPoolExecutor(len(environments)) as pool:
        try:
            while left or running:
                if stop.requested:
                    left.clear()
                for child in list(left):
                    if child.after in failures:
                        left.remove(child)
                        text = f"it starts from {child.after}, which failed"
                        failures[child.name] = Failure(child.name, None, text)
                    elif len(running) < len(environments) and child.after in {None, *done}:
                        left.remove(child)
                        running[pool.submit(work, child)] = child
                if stop.requested and not told:
                    told = True
                    view.say("stopping: the runs write checkpoints (again: stop at once)")
                    processes.stop()
                ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    child, failure = running.pop(future), future.result()
                    if failure is None:
                        done.add(child.name)
                        finished()
                    elif not stop.requested:
                        failures[child.name] = failure
                    view.ended(child, failure is None)
                view.update()
        except KeyboardInterrupt:  # The second; what was saved last is kept.
            processes.stop(kill=True)
        except BaseException:
            processes.stop(kill=True)
            raise
    return Result(list(failures.values()), stop.requested)


class _Processes:
    """The processes that run now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self, words: Sequence[str], log: Path, variables: dict[str, str]) -> tuple[int, str]:
        """Run a command to its end, and return its exit code and its last lines."""
        with open(log, "ab") as file:
            begin = file.tell()
            header = f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {shlex.join(words)}\n"
            file.write(header.encode())
            file.flush()
            with self._lock:
                if self._stopping:
                    return 1, ""
                # A process group of its own: Ctrl-C on the terminal reaches it through us, once.
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
                    process_group=0,
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.remove(process)
        text = log.read_bytes()[begin:].decode(errors="replace")
        return code, "\n".join(text.splitlines()[1:][-LAST_LINES:])

    def stop(self, *, kill: bool = False) -> None:
        """Ask all to stop, or make them; none begins from now on."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                if kill:
                    process.kill()
                else:
                    process.terminate()


def _visible_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]
