"""One writer a database: a lease that ends with the process that holds it, even when killed."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import DatabaseBusyError
from schemas.location import in_store
from schemas.manifest import Layout


@contextmanager
def lease(layout: Layout, command: str) -> Iterator[None]:
    """Hold the database's lease. Raises DatabaseBusyError, naming the holder, when it is taken."""
    if in_store(layout.root):
        yield
        return
    root, place = Path(layout.root), Path(layout.lease)
    root.mkdir(parents=True, exist_ok=True)
    with place.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DatabaseBusyError(
                f"database {layout.root} is being written by {holder}; wait for it, or end it"
            ) from error
        file.truncate(0)
        who = {"command": command, "pid": os.getpid(), "host": socket.gethostname()}
        file.write(json.dumps(who))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if [path.name for path in root.iterdir()] == [place.name]:
                # Nothing came of it: leave no empty folder behind.
                place.unlink()
                root.rmdir()
