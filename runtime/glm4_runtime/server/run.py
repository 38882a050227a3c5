"""Runs the HTTP server for a bundle until a signal."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from glm4_runtime import trace_options
from glm4_runtime.backend import Backend, OpenBundle
from glm4_runtime.chat_template import start_template_worker
from glm4_runtime.errors import RequestError
from glm4_runtime.server import log
from glm4_runtime.server.app import create_app
from glm4_runtime.server.connections import ConnectionLimits, Connections
from glm4_runtime.server.front import Front
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.session import Session
from glm4_runtime.session.warm_up import warm_up

# Maximum number of connections (each needs a file), and the number of files reserved for everything else.
_MOST_CONNECTIONS, _OTHER_FILES = 1024, 128
# Seconds that a request may take beyond its own limits.
_GRACE = 5.0
# None: Windows has no such signal.
_HANGUP: int | None = getattr(signal, "SIGHUP", None)
# uvicorn ticks every 0.1 s; connections are checked at every fifth tick.
_SWEEP_TICKS = 5


class Server(uvicorn.Server):
    """uvicorn that continues after a signal until all running requests have finished."""

    def __init__(self, served: ServedModel, on_hangup: Callable[["Server"], None] | None = None) -> None:
        """``on_hangup``: called on a thread of its own after SIGHUP."""
        options, self._on_hangup = served.options, on_hangup
        self._traces = trace_options.started(options.trace_options)
        self._front = Front(create_app(served, self._traces))
        log.configure(options.log_level, options.log_prompts)
        self._models = [served]
        self._signals: list[int] = []
        self._drain_began: float | None = None
        self._connections = Connections(_limits(options))
        served.metrics.watch(self._connections)
        served.metrics.watch_log(log.dropped)
        super().__init__(
            uvicorn.Config(
                self._front,
                http=self._connections.protocol,  # type: ignore[arg-type]  # called as a class would be
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=options.idle_timeout,  # type: ignore[arg-type]  # seconds, whole or not
                # running requests have ended by then; this is for clients that do not read the rest of their answers
                timeout_graceful_shutdown=int(_GRACE),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's signature
        """Record a signal; :meth:`on_tick` handles it, outside the interrupted code."""
        self._signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        if counter % _SWEEP_TICKS == 0:
            self._connections.sweep()
        if _HANGUP in self._signals:
            self._signals.remove(_HANGUP)
            threading.Thread(target=self._hang_up, name="glm4-hangup", daemon=True).start()
        if self._signals and self._drain_began is None:
            self._begin_to_drain()
        elif self._signals.count(signal.SIGINT) > 1:  # second Ctrl-C: do not wait any longer
            self._drain(at_once=True)
        if all(one.drained for one in self._models):
            self.should_exit = True
        return await super().on_tick(counter)

    def change(self, served: ServedModel) -> threading.Event:
        """Give new requests to another model. Returns the event of the end of those that the old model has."""
        self._models = [*(one for one in self._models if not one.drained), served]
        served.metrics.follow(served.stats, served.stats_by_replica)
        return self._front.change(create_app(served, self._traces))

    @property
    def _served(self) -> ServedModel:
        """The model that takes new requests."""
        return self._models[-1]

    def _drain(self, at_once: bool = False) -> None:
        for one in self._models:
            one.drain(at_once)

    def _hang_up(self) -> None:
        if self._on_hangup is not None and self._drain_began is None:
            self._on_hangup(self)

    def _begin_to_drain(self) -> None:
        self._drain_began = time.monotonic()
        seconds = self._served.options.drain_timeout
        log.write(
            "draining",
            signal=signal.Signals(self._signals[0]).name,
            drain_seconds=seconds,
            **self._served.load,
        )
        self._drain()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.write("listening", model=self._served.name, url=self.url)
            for warning in self._served.session.warnings:
                log.write("side_files", "warning", warning=warning)
            self._tell_of_template()

    def _tell_of_template(self) -> None:
        """Log facts about the chat template for the operator: what it drops, and its own end tokens."""
        served = self._served
        if served.conversation is None:
            return
        dropped, ends = (
            served.conversation.traits.dropped,
            [*map(served.tokenizer.token_of, served.turn_ends)],
        )
        if dropped or ends:
            log.write("template", "warning", drops=dropped, also_ends_at=ends)

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        began = self._drain_began or time.monotonic()
        log.write("stopped", seconds=round(time.monotonic() - began, 3))

    @property
    def url(self) -> str:
        """The server's address, once it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _limits(options: ServerOptions) -> ConnectionLimits:
    return ConnectionLimits(
        most=_affordable(_MOST_CONNECTIONS),
        header=options.header_timeout,
        request=options.header_timeout + options.body_timeout + options.request_timeout + _GRACE,
        answer=options.request_timeout,
        send=options.send_timeout,
    )


def _affordable(connections: int) -> int:
    """The number of connections for which the process may have files, after raising that limit if allowed."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            return max(1, allowed - _OTHER_FILES)
    return connections


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for every address of ``host``, bound to one port and not listening yet.

    Raises:
        RequestError: the port is in use or not allowed, or the host is not this machine.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            with contextlib.suppress(_NoSuchFamilyError):
                found = _bound(family, kind, protocol, (address[0], port, *address[2:]))
                sockets.append(found)
                port = found.getsockname()[1]  # for port 0: the port that the first address got
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise _cannot_listen(host, port, error) from error
    if not sockets:
        raise RequestError(f"cannot listen on {host}: this machine has no such address")
    return sockets


class _NoSuchFamilyError(Exception):
    """IPv6 on a system without it."""


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    try:
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _NoSuchFamilyError from error
    try:
        if sys.platform != "win32":  # there it would share a port in use
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
            raise _NoSuchFamilyError from error
        raise
    return found


def _cannot_listen(host: str, port: int, error: OSError) -> RequestError:
    advice = {
        errno.EADDRINUSE: "another program listens there; end it, or choose another port by --port",
        errno.EACCES: "ports below 1024 need a privilege; choose another by --port",
        errno.EADDRNOTAVAIL: "this machine has no such address; see --host",
    }.get(error.errno or 0, error.strerror or str(error))
    return RequestError(f"cannot listen on {host}, port {port}: {advice}")


def serve(session: Session, options: ServerOptions, sockets: Sequence[socket.socket] | None = None) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish running requests.

    Args:
        sockets: from :func:`bind`; bound here if None.
    """
    listening = bind(options.host, options.port) if sockets is None else list(sockets)
    serve_model(ServedModel(session, options), listening)


def serve_model(
    served: ServedModel,
    listening: list[socket.socket],
    on_hangup: Callable[[Server], None] | None = None,
) -> None:
    """:func:`serve` for a model that is there, on sockets from :func:`bind`.

    Args:
        on_hangup: called on a thread after SIGHUP. None: SIGHUP ends the process, as is usual.
    """
    logging.basicConfig(handlers=[log.Handler()], level=logging.WARNING)
    logging.captureWarnings(True)  # else they go straight to stderr, and wait for who reads it
    options, server = served.options, Server(served, on_hangup)
    if on_hangup is not None and _HANGUP is not None:
        signal.signal(_HANGUP, server.handle_exit)
    try:
        server.run(listening)
    except OSError as error:  # another server bound the port at the same time, and listened first
        raise _cannot_listen(options.host, options.port, error) from error
    finally:
        log.flush()


@contextlib.contextmanager
def serving(
    session: OpenBundle, options: ServerOptions, scheduler: Backend | None = None
) -> Iterator[Server]:
    """A server on its own thread during the block; ``scheduler`` as for :class:`ServedModel`."""
    with serving_model(ServedModel(session, options, scheduler)) as server:
        yield server


@contextlib.contextmanager
def serving_model(served: ServedModel, on_hangup: Callable[[Server], None] | None = None) -> Iterator[Server]:
    """:func:`serving` for a model that is there; ``on_hangup`` as for :func:`serve_model`."""
    listening = bind(served.options.host, served.options.port)
    server = Server(served, on_hangup)
    thread = threading.Thread(target=server.run, args=(listening,), name="glm4-http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
        log.flush()


def open_and_serve(bundle: str | Path, options: ServerOptions, **session_options: Any) -> None:
    """Open a bundle (options as for :meth:`Session.open`) and serve it.

    Binds the port first: loading a model takes minutes, but a port in use is known at once.
    """
    options.names(Path(bundle))
    sockets = bind(options.host, options.port)
    start_template_worker()  # ready when the model is loaded
    with contextlib.ExitStack() as undo:
        for bound in sockets:
            undo.callback(bound.close)
        session = Session.open(bundle, **session_options)
        undo.callback(session.close)
        warm_up(session)
        undo.pop_all()
    serve(session, options, sockets)
