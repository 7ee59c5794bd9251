"""A TCP proxy that a network's faults are made of: it cuts, delays, withholds, and loses replies.

with Proxy(server.port) as proxy:
    ...connect to proxy.port instead...
    proxy.cut()
"""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import closing, suppress
from typing import Self


class Proxy:
    """A proxy in front of a port of this machine; its faults may be changed at any time.

    `delay_seconds` holds up each piece of data, either way. With `lose`, a share of the servers' replies, the
    connection is cut in place of the reply: the request has gone through. `target` may be moved to another port;
    open connections stay where they are.
    """

    def __init__(self, target: int, chance: random.Random | None = None) -> None:
        self.target = target
        self.delay_seconds = 0.0
        self.lose = 0.0
        self._chance = chance or random.Random()
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.flow()

    def cut(self) -> None:
        """Close all connections."""
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def withhold(self) -> None:
        """Let nothing through, as a network that drops all packets; connections stay open."""
        self._flowing.clear()

    def flow(self) -> None:
        """Deliver what was withheld, and what comes from now on."""
        self._flowing.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            closing(client),
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.target)) as server,
        ):
            ends = (client, server)
            for end in ends:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.update(ends)
            try:
                back = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
                back.start()
                self._pump(client, server, False)
                back.join()
            finally:
                self._open.difference_update(ends)

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                if replies and self.lose and self._chance.random() < self.lose:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
