"""One writer per database: a lease with a heartbeat, on disks, on shared ones and in buckets.

A holder creates a numbered record below `leases/` that nobody else can have created, one number
above the last, and renews it every few seconds. The highest number holds. A record that is released,
or whose process is known to be dead, or that was not renewed for `missed` beats, gives way to the
next number. Numbers only grow, so a holder that slept through its end finds a higher one, and stops
before its next commit.

What is guaranteed. On a disk of this host flock refuses the second writer and ends with the process
that holds it, so a killed build's successor starts at once. Between hosts that share a file system
or a bucket, a number is created once: exclusively on the file system, by a conditional PUT
(If-None-Match) on a store, so two never hold the same one. A holder that is stopped for longer than
`missed` beats just after it looked and just before Lance commits may commit once beside its
successor: no store joins a look at one object and a write of another. `arrag-db verify` would name
what such a commit doubled.

A writer of tombstones does not take the lease: a takedown never waits for a build.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from arrag_runtime.format.errors import BadInputError, DatabaseBusyError, LeaseLostError
from arrag_runtime.format.location import (
    delete_place,
    in_store,
    join,
    make_folder,
    names_in,
    read_bytes,
    write_bytes,
)
from arrag_runtime.format.manifest import Layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """Seconds between two renewals of a record, and how many must fail to come."""

    seconds: float = 10.0
    missed: int = 3

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which a holder counts as gone."""
        return self.seconds * self.missed


BEAT = Beat()


@dataclass(frozen=True)
class Holder:
    """What a record says of who holds the lease, by a random name, and of its process.

    place: the host, its boot, and the namespace of its process ids; started: when the process
    began, in ticks since that boot. since and renewed: seconds since 1970 by the holder's clock,
    for people and as a hint; that a holder is gone is judged by `beats` standing still.
    """

    holder: str
    command: str
    host: str
    pid: int
    place: str
    started: str
    since: float
    renewed: float
    beats: int = 0
    released: bool = False


class Lease:
    """A held lease. `check` before every commit."""

    def __init__(self, layout: Layout, number: int, record: Holder, beat: Beat) -> None:
        self._layout, self._number, self._record, self._beat = layout, number, record, beat
        self._renewed = _clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError when another writer has taken over.

        Nobody may within `patience` of the last renewal, so mostly nothing is asked.
        """
        if _clock() - self._renewed > self._beat.seconds * (self._beat.missed - 1):
            self._look()

    def release(self) -> None:
        """Let the next writer in."""
        self._over.set()
        self._thread.join()
        try:
            if _last(self._layout) == self._number:
                self._write(replace(self._record, released=True))
            for number in _numbers(self._layout):
                if number < self._number:
                    delete_place(_record_place(self._layout, number))
        except OSError as error:
            _log.warning("the lease could not be released and will run out: %s", error)

    def _look(self) -> None:
        last = _last(self._layout)
        if last != self._number or _read(self._layout, last).holder != self._record.holder:
            taken = _describe(_read(self._layout, last)) if last else "someone who removed it"
            raise LeaseLostError(
                f"the lease on {self._layout.root} was taken over by {taken}, since this process"
                " gave no sign of life; it stopped before its next commit, and what it had"
                " committed stays"
            )

    def _renew(self) -> None:
        while not self._over.wait(self._beat.seconds):
            asked = _clock()
            try:
                self._look()
                beats = self._record.beats + 1
                self._write(replace(self._record, beats=beats, renewed=time.time()))
                self._renewed = asked
            except LeaseLostError:
                return
            except OSError as error:
                _log.warning("the lease could not be renewed: %s", error)

    def _write(self, record: Holder) -> None:
        write_bytes(_record_place(self._layout, self._number), _to_bytes(record))
        self._record = record


@contextmanager
def lease(layout: Layout, command: str, beat: Beat = BEAT) -> Iterator[Lease]:
    """Hold the database's lease. Raises DatabaseBusyError, naming the holder, when it is taken."""
    make_folder(layout.leases)
    with _locked(layout, beat) as locked:
        held = _claim(layout, command, beat, locked)
        try:
            yield held
        finally:
            held.release()
            if names_in(layout.root) == [layout.leases.rpartition("/")[2]]:
                # Nothing came of it: leave no empty folder behind.
                delete_place(layout.leases)
                if not in_store(layout.root):
                    Path(layout.root).rmdir()


@contextmanager
def _locked(layout: Layout, beat: Beat) -> Iterator[bool]:
    """Hold the folder's file lock; False where there is none, as on a store."""
    if in_store(layout.root):
        yield False
        return
    with Path(layout.leases, "lock").open("a") as file:
        yield _flock(file, layout, beat)


def _flock(file: IO[str], layout: Layout, beat: Beat) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            last = _last(layout)
            raise _busy(layout, _read(layout, last) if last else None, beat) from error
        _log.warning("no file locks in %s (%s); the heartbeat alone decides", layout.root, error)
        return False
    return True


def _claim(layout: Layout, command: str, beat: Beat, locked: bool) -> Lease:
    """The next number, once the last one's holder is known to be gone."""
    if last := _last(layout):
        record = _read(layout, last)
        if not (record.released or _is_dead(record, locked)):
            _watch(layout, last, record, beat)
    now = time.time()
    mine = Holder(
        holder=uuid.uuid4().hex,
        command=command,
        host=socket.gethostname(),
        pid=os.getpid(),
        place=_place(),
        started=_started(os.getpid()),
        since=now,
        renewed=now,
    )
    if not _create(layout, last + 1, mine):
        raise _busy(layout, _read(layout, last + 1), beat)
    return Lease(layout, last + 1, mine, beat)


def _watch(layout: Layout, number: int, record: Holder, beat: Beat) -> None:
    """Wait until a holder that looks gone has missed its beats; DatabaseBusyError if it lives.

    One that renewed just now, by its own clock, is believed at once.
    """
    if abs(time.time() - record.renewed) < beat.patience:
        raise _busy(layout, record, beat)
    end = time.monotonic() + beat.patience
    while time.monotonic() < end:
        time.sleep(beat.seconds / 4)
        last = _last(layout)
        now = _read(layout, last)
        if last != number or now.beats != record.beats:
            raise _busy(layout, now, beat)
        if now.released:
            return


def _busy(layout: Layout, record: Holder | None, beat: Beat) -> DatabaseBusyError:
    who = _describe(record) if record else "another process"
    return DatabaseBusyError(
        f"database {layout.root} is being written by {who}; wait for it, or end it there (if it is"
        f" gone, the same command takes over {beat.patience:.0f} s after its last sign of life)"
    )


def _describe(record: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.since))
    return f"`{record.command}`, process {record.pid} on {record.host}, since {since}"


def _is_dead(record: Holder, locked: bool) -> bool:
    """Whether the holder's process is known to have ended: it ran here, and is no more.

    Here means this host since its last start, and this container. A file lock that was to be had
    proves the same.
    """
    return record.place == _place() and (locked or _started(record.pid) != record.started)


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot: with its id it is one process, for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _record_place(layout: Layout, number: int) -> str:
    return join(layout.leases, f"{number:010d}.json")


def _numbers(layout: Layout) -> list[int]:
    found = (name.removesuffix(".json") for name in names_in(layout.leases))
    return [int(name) for name in found if name.isdigit()]


def _last(layout: Layout) -> int:
    return max(_numbers(layout), default=0)


def _read(layout: Layout, number: int) -> Holder:
    """A record; one that is being written, or is gone, is a holder of whom nothing is known."""
    try:
        return Holder(**json.loads(read_bytes(_record_place(layout, number))))
    except (FileNotFoundError, ValueError, TypeError):
        return Holder("", "unknown", "unknown", 0, "", "", 0.0, 0.0)


def _to_bytes(record: Holder) -> bytes:
    return (json.dumps(asdict(record), indent=1) + "\n").encode()


def _create(layout: Layout, number: int, record: Holder) -> bool:
    """Create a record unless it is there: exclusively on disks, by a conditional PUT on stores."""
    place, data = _record_place(layout, number), _to_bytes(record)
    if not in_store(place):
        try:
            with Path(place).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True
    import obstore
    from obstore.store import from_url

    folder, _, name = place.rpartition("/")
    try:
        obstore.put(from_url(folder), name, data, mode="create")
    except obstore.exceptions.AlreadyExistsError:
        # A PUT that landed but was not answered is tried again, and finds itself.
        return _read(layout, number).holder == record.holder
    except (OSError, obstore.exceptions.BaseError) as error:
        raise BadInputError(
            f"cannot write to {layout.root}: {str(error).splitlines()[0][:200]}; check the bucket's"
            " name and the rights of these credentials"
        ) from error
    return True


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
