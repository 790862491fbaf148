"""A Python whose imports are paid once: `launches.PYTHON`, for tests that start a script as a user would.

    PYTHON recipes/grpo_pte.py --config recipes/tiny.yaml

A server imports TRL and the package, then forks a process for each command, which runs it with the caller's arguments,
folder, environment and open files. What a variable changes while a library is imported (HF_HUB_OFFLINE,
OMP_NUM_THREADS) is as it was when the server began. This file is the server (`serve`) and, run by its path, the
client.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ADDRESS = "PTE_TEST_FORKS"  # the variable that names the server's socket
EXECUTABLE = "PTE_TEST_FORKS_PYTHON"  # and the one that names the client
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What most commands import; not the scripts themselves, which run as __main__.
PRELOADED = (
    *("pandas", "matplotlib.pyplot", "datasets", "trl.trainer.grpo_trainer", "accelerate.commands.launch"),
    *("pte_trl.training.grpo", "pte_trl.training.distill.script", "pte_trl.evaluation.script"),
    *("pte_trl.evaluation.generate", "pte_trl.inspect.states", "pte_trl.inspect.kl", "pte_trl.estimate.terms"),
)


# ---- the client: standard library only, so that it starts in a moment ------------------------------------------


def call(argv: list[str]) -> None:
    """Has the server run `python argv` and ends as it ended."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[ADDRESS])
    about = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ), "client": os.getpid()}
    about = json.dumps(about).encode()
    socket.send_fds(server, [len(about).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(about)
    reply = server.makefile()
    pid = int(reply.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(reply.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the server --------------------------------------------------------------------------------------------------


def python() -> str:
    """The path of the client; starts the server of this process where there is none yet."""
    if ADDRESS not in os.environ or os.environ.get(f"{ADDRESS}_OWNER") != str(os.getpid()):
        folder = tempfile.mkdtemp()
        address = f"{folder}/forks"
        server = subprocess.Popen(
            [sys.executable, "-c", f"from tests.forked import serve; serve({address!r})"],
            stdin=subprocess.PIPE,  # its end is the server's
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"},
        )
        assert server.stdout.readline() == b"ready\n"
        python.server = server
        os.environ |= {ADDRESS: address, f"{ADDRESS}_OWNER": str(os.getpid())}
        client = Path(folder, "python")
        # Other options, as those of the grading workers, are Python's own to understand.
        call = f'{ADDRESS}={address} {EXECUTABLE}={client} exec {sys.executable} -S -E {__file__} "$@"'
        client.write_text(f'#!/bin/sh\ncase "$1" in -m|-u|*.py) {call};; *) exec {sys.executable} "$@";; esac\n')
        client.chmod(0o755)
        python.client = str(client)
    return python.client


def serve(address: str) -> None:
    """Forks a process for every command until this one's standard input ends."""
    import gc
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all of these modules' memory
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
        else:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return attend(connection)


def attend(connection: socket.socket) -> None:
    """Forks the process of one command, and tells its client its number and how it ended."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    size, about = int.from_bytes(size, "big"), b""
    while len(about) < size:
        about += connection.recv(size - len(about))
    about = json.loads(about)
    pid = os.fork()
    if pid == 0:
        connection.close()
        end(lambda: run(files, **about))
    for file in files:
        os.close(file)
    connection.sendall(f"{pid}\n".encode())
    gone = os.pidfd_open(pid)
    ready, _, _ = select.select([gone, connection], [], [])
    if gone not in ready:  # the client was killed
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(f"{code}\n".encode())
    finally:
        os._exit(0)


def end(command) -> None:
    """Runs a command and ends the process as Python would, but for taking its modules apart, which takes seconds."""
    import atexit
    import threading
    import traceback

    code = 0
    try:
        command()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def run(files: list[int], argv: list[str], folder: str, environment: dict[str, str], client: int) -> None:
    """What `python argv` would do."""
    import runpy

    import psutil

    # The client stands for this process: what started it is its parents.
    parents = psutil.Process.parents
    psutil.Process.parents = lambda self: parents(psutil.Process(client) if self.pid == os.getpid() else self)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Those of the server are at other files, and may be buffered.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    argv = argv[1:] if argv[0] == "-u" else argv  # as torchrun asks for: the streams above are unbuffered enough
    module = argv[0] == "-m"
    sys.argv = argv[1:] if module else argv
    sys.executable = environment[EXECUTABLE]  # so that what it starts is forked, too
    sys.path[:0] = [folder if module else str(Path(argv[0]).resolve().parent), *paths]
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    call(sys.argv[1:])
