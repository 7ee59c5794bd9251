"""Keep a server for no longer than its parent lives; run as a script by `testing`, it imports nothing of ours.

The parent holds the other end of our standard input, and nobody else does: when it dies, by kill -9 too, we read
the end of the file, stop the server and remove its folder. Commands are lines; each is answered by one line:

    start   run the server; its process id
    kill    kill -9 it, and wait until its children have gone as well
    stop    ask it to stop, and wait
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

PATIENCE_SECONDS = 20


def main() -> None:
    """Obey the parent until it has gone. The one argument is JSON: command, folder, signal, user."""
    order = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent
    server: subprocess.Popen[bytes] | None = None
    try:
        for line in sys.stdin:
            if line.strip() == "start":
                server = start(order)
                print(server.pid, flush=True)
            elif server is not None:
                end(server, signal.SIGKILL if line.strip() == "kill" else order["signal"])
                print("ended", flush=True)
    except BrokenPipeError:
        pass
    finally:
        if server is not None:
            end(server, order["signal"])
        shutil.rmtree(order["folder"], ignore_errors=True)


def start(order: dict[str, Any]) -> "subprocess.Popen[bytes]":
    as_user = {"user": order["user"], "group": order["group"], "extra_groups": []}
    with open(os.path.join(order["folder"], "log"), "ab") as log:
        return subprocess.Popen(
            order["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=take_default_signals,
            **(as_user if order["user"] is not None else {}),
        )


def take_default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def end(server: "subprocess.Popen[bytes]", number: int) -> None:
    """End the server by a signal, after a while by kill -9, and wait for its children too."""
    family: list[int] = []
    if server.poll() is None:
        server.send_signal(signal.SIGSTOP)  # so that it starts no child that would be missed
        family = children(server.pid)
        server.send_signal(number)
        for pid in (server.pid, *family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # it, or they, may have been frozen
        try:
            server.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while family and time.monotonic() < deadline:
        family = [child for child in family if alive(child)]
        time.sleep(0.02)
    for child in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [pid for pid, (ppid, _) in processes().items() if ppid == parent]


def alive(pid: int) -> bool:
    """Return whether a process exists; one that nobody has waited for counts as gone."""
    _, state = processes().get(pid, (0, "Z"))
    return not state.startswith("Z")


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the state of each process: from /proc, as small images have no `ps`, else from `ps`."""
    if not os.path.exists("/proc/self/stat"):
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True)
        rows = [line.split() for line in listing.stdout.splitlines()]
        return {int(pid): (int(ppid), state) for pid, ppid, state in rows}
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as file:
            state, ppid = file.read().rpartition(")")[2].split()[:2]  # a name may hold blanks and brackets
            found[int(name)] = (int(ppid), state)
    return found


if __name__ == "__main__":
    main()
