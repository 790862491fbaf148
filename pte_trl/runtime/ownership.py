"""An output folder, or an output file, has one owner at a time.

Two runs in one folder would overwrite each other's checkpoints and records, and both would exit 0. The owner is
written into `.owner` (for a file: `NAME.owner`) and the file is locked. The kernel gives the lock up when the owner
ends, however it ends. Where locks do not reach other machines the owner's heartbeat decides: it touches its file.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from pte_trl.runtime.together import on_main

# Of a file system without locks, or of locks that are off there.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Owner:
    """This process's hold on a path, until `release`.

    Args:
        path: an output folder, made if it is missing, or an output file.
        file: whether it is a file.

    Raises:
        ValueError: another run has it, or it cannot be written; says what to do.
    """

    beat, silence = 5.0, 30.0  # s: how often the owner's file is touched, and after what time without it is given up

    def __init__(self, path: str | Path, file: bool = False):
        self.path = Path(path)
        self.mark = self.path.with_name(f"{self.path.name}.owner") if file else self.path / ".owner"
        try:
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{path}: {error.filename} is a file where a folder is needed") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be written to ({error.strerror})") from error
        self._stop, self._pid = threading.Event(), os.getpid()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def _take(self) -> None:
        while True:
            self.descriptor = os.open(self.mark, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock_or_refuse()
                if os.path.samestat(os.fstat(self.descriptor), os.stat(self.mark)):
                    break
            except FileNotFoundError:  # the previous owner has just ended and removed its file
                pass
            except BaseException:
                os.close(self.descriptor)
                raise
            os.close(self.descriptor)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(here()).encode(), 0)

    def _lock_or_refuse(self) -> None:
        before = read_owner(self.descriptor)
        self._lock(before)
        if before is None:
            return
        if before["machine"] == machine():
            if is_running(before["pid"], before["started"]):
                raise self._refusal(before)
            return
        if self._is_beating(before):
            raise self._refusal(before)
        self._lock(before)  # POSIX drops it when a process closes the file, and looking at it did

    def _lock(self, before: dict | None) -> None:
        try:
            # POSIX's lock, not flock: a forked worker that outlives its parent does not keep it.
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(before) from None
            if error.errno not in NO_LOCKS:
                raise

    def _is_beating(self, before: dict) -> bool:
        """Whether an owner on another machine, whose processes cannot be looked up, touches its file."""
        print(
            f"{self.path}: was last written to by {name_of(before)}; whether that process still runs is seen in "
            f"{self.silence:.0f} s at most",
            flush=True,
        )
        first, until = touched(self.mark), time.monotonic() + self.silence
        while time.monotonic() < until:
            time.sleep(min(1.0, self.silence / 10))
            if touched(self.mark) != first:
                return touched(self.mark) is not None
        return False

    def _refusal(self, owner: dict | None) -> ValueError:
        return ValueError(
            f"{self.path}: {name_of(owner)} is writing there; wait for it or end it, or take another output. "
            f"If it is sure that nothing runs there: rm {self.mark}"
        )

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)

    def release(self) -> None:
        """Releases the path; more than once is no error."""
        if self._stop.is_set() or os.getpid() != self._pid:  # a forked copy owns nothing
            return
        self._stop.set()
        with contextlib.suppress(OSError):
            self.mark.unlink()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def here() -> dict:
    """What tells this process from every other one, on any machine and after any restart."""
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def machine() -> str:
    """Where a process id means something: a boot of a kernel, and a container's own numbering on it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def is_running(pid: int, started: float) -> bool:
    """Whether the process still runs; another one may have got its number since."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it runs, under another user
        return True


def read_owner(descriptor: int) -> dict | None:
    """The owner named in an open file, None where none is, or none that can be read."""
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
        return owner if {"host", "machine", "pid", "started"} <= set(owner) else None
    except (ValueError, TypeError):
        return None


def name_of(owner: dict | None) -> str:
    if owner is None:
        return "another run"
    if owner["pid"] == os.getpid() and owner["machine"] == machine():
        return "this process"
    return f"process {owner['pid']} on {owner['host']}"


def touched(path: Path) -> int | None:
    """When a file was touched; opened, since a network file system asks its server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


# ---- what a script owns ----------------------------------------------------------------------------------------

_owned: list[Owner] = []


def own(path: str | Path | None, file: bool = False) -> None:
    """Takes a path for this run until `release_all`; the main process does, for all.

    Raises:
        ValueError: as `Owner`; on every process.
    """
    if path is None or not str(path):
        raise ValueError("output_dir='': not given; a run needs a folder of its own")
    on_main(lambda: _owned.append(Owner(path, file)))


@contextlib.contextmanager
def owned(path: str | Path):
    """`own` for the time of a `with`."""
    own(path)
    try:
        yield
    finally:
        for owner in [each for each in _owned if each.path == Path(path)]:
            _owned.remove(owner)
            owner.release()


@atexit.register
def release_all() -> None:
    while _owned:
        _owned.pop().release()
