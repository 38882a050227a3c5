"""A bundle behind HTTP until a signal ends it."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from glm4_runtime.scheduler import Scheduler
from glm4_runtime.server import log
from glm4_runtime.server.app import create_app
from glm4_runtime.server.engine import Engine
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.session import Session

# Connections at one time; each costs a file.
_MOST_CONNECTIONS = 1024


class Server(uvicorn.Server):
    """uvicorn, which at a signal also tells the engine to let running requests finish."""

    def __init__(self, engine: Engine) -> None:
        options = engine.options
        super().__init__(
            uvicorn.Config(
                create_app(engine),
                host=options.host,
                port=options.port,
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                # the scheduler ends what is left after drain_timeout, and clients are told; this is for the rest
                timeout_graceful_shutdown=int(options.drain_timeout) + 5,
            )
        )
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.drain()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.write("listening", model=self._engine.name, url=self.url)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(session: Session, options: ServerOptions) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish what runs."""
    logging.basicConfig(handlers=[log.Handler()], level=logging.WARNING)
    server = Server(Engine(session, options))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal once more after a clean end
        server.run()


@contextlib.contextmanager
def serving(session: Session, options: ServerOptions, scheduler: Scheduler | None = None) -> Iterator[Server]:
    """A server on a thread of its own, for as long as the block runs; ``scheduler`` as for :class:`Engine`."""
    server = Server(Engine(session, options, scheduler))
    thread = threading.Thread(target=server.run, name="glm4-http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield server
    finally:
        server.handle_exit(15, None)
        thread.join()


def open_and_serve(bundle: str | Path, options: ServerOptions, **session_options: Any) -> None:
    """Open a bundle (options as for :meth:`Session.open`) and serve it."""
    serve(Session.open(bundle, **session_options), options)
