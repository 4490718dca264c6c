"""What keeps a Lava worker from hanging, leaking, or dying without a word. Defines things and does nothing by itself.

Lava's own weak points, each met by one function here: a failed part leaves its peers waiting for ever; shared memory is
promised before it exists, so that a full /dev/shm ends in SIGBUS; segments and semaphores outlive whoever is killed.
"""

from __future__ import annotations

import errno
import gc
import glob
import multiprocessing.process
import multiprocessing.shared_memory
import os
import queue
import select
import shutil
import signal
import sys
import threading
import time
import traceback


class SharedMemoryFull(OSError):
    """/dev/shm had no room for a channel of the network."""


def name_shared_memory(prefix: str) -> None:
    """Let multiprocessing name its segments and semaphores `<prefix>...`; the children inherit it."""
    memory = multiprocessing.shared_memory
    memory._SHM_NAME_PREFIX = "/" + prefix
    memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 13
    multiprocessing.process.current_process()._config["semprefix"] = "/" + prefix


def leftovers(prefix: str) -> list:
    """Paths of the segments and semaphores of a prefix."""
    name = glob.escape(prefix)
    return glob.glob("/dev/shm/" + name + "*") + glob.glob("/dev/shm/sem." + name + "*")


def allocate_at_once(limit: int) -> None:
    """Let every new segment get its pages when it is made, so that a shortage is an error there and not a SIGBUS later.

    `limit`: bytes in all, after which a shortage is reported; below 0 for none (the tests set it).
    """
    segment = multiprocessing.shared_memory.SharedMemory
    make, given = segment.__init__, [0]

    def allocate(self, name=None, create=False, size=0):
        make(self, name, create, size)
        if not create:
            return
        given[0] += self.size
        try:
            if 0 <= limit < given[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            self.close()
            self.unlink()
            raise SharedMemoryFull(
                error.errno, "%s at a segment of %d bytes, after %d bytes of this worker" % (error.strerror, size, given[0])
            ) from error

    segment.__init__ = allocate


def requests_until_the_end(prefix: str, folder: str):
    """A queue of the lines that arrive at stdin; when stdin closes or the starter is gone, the whole group ends.

    A thread of its own reads, beside everything else, so that the end is seen also in the middle of a run.
    """
    lines, starter, group = queue.Queue(), os.getppid(), os.getpgid(0)

    def read() -> None:
        rest = b""
        while os.getppid() == starter:
            if not select.select([0], [], [], 0.5)[0]:
                continue
            data = os.read(0, 65536)  # not sys.stdin: forked children close that one, and would wait for its lock
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                lines.put(line)
        if os.fork():
            return
        os.setsid()  # out of the group that is to end
        os.killpg(group, signal.SIGKILL)
        time.sleep(0.1)
        for path in leftovers(prefix):
            os.unlink(path)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def fail(text: str) -> None:
    """Say why, and end this process at once: an interpreter with a failed Lava runtime may never leave by itself."""
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


def how_it_ended(code: int) -> str:
    """Words for an exit code of multiprocessing, negative for a signal."""
    if code >= 0:
        return "with code %d" % code
    name = signal.Signals(-code).name
    return "by signal %s%s" % (name, ": shared memory ran out" if name == "SIGBUS" else "")


def end_with_failure(process, done: threading.Event) -> None:
    """Look, beside the run, whether a process of Lava's raised or vanished: Lava itself would wait for it for ever."""

    def watch() -> None:
        while not done.wait(0.02):
            infrastructure = getattr(process.runtime, "_messaging_infrastructure", None)
            for actor in list(infrastructure.actors) if infrastructure is not None else ():
                try:
                    error, code = actor.exception, actor.exitcode
                except (
                    ValueError,
                    OSError,
                    EOFError,
                ):  # closed: Lava met an error and joins its processes, perhaps for ever
                    if not done.wait(0.5):
                        fail("Lava stopped its network after an error\n")
                    return
                if error is not None:
                    fail(error[1])
                if code not in (None, 0) and not done.is_set():
                    fail("a process of the Lava network ended %s\n" % how_it_ended(code))

    threading.Thread(target=watch, daemon=True).start()


def report_errors_of_models() -> None:
    """Let a process model that raised write its traceback and end at once; in Lava it goes on to wait for its peers."""
    from lava.magma.core.model.py.model import AbstractPyProcessModel

    join = AbstractPyProcessModel.join

    def join_or_end(self) -> None:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        join(self)

    AbstractPyProcessModel.join = join_or_end


def look_for_models_once() -> None:
    """Keep what Lava finds for a process class: it executes the files beside the class again for every single process."""
    from lava.magma.compiler.compiler_graphs import ProcGroupDiGraphs

    find, found = ProcGroupDiGraphs._find_proc_models, {}

    def find_once(proc):
        if type(proc) not in found:
            found[type(proc)] = find(proc)
        return list(found[type(proc)])

    ProcGroupDiGraphs._find_proc_models = staticmethod(find_once)


def collect_by_hand() -> None:
    """No garbage collection but that of `forget_processes`, and none of what is there by now.

    Each process of a network is a fork of this one, and a collection in it would copy every page it looks at.
    """
    gc.disable()
    gc.collect()
    gc.freeze()


def forget_processes() -> None:
    """Drop what Lava's registry of all processes ever made still holds, so that a worker of many graphs does not grow."""
    from lava.magma.core.process.process import ProcessServer

    ProcessServer().processes.clear()
    gc.collect()
