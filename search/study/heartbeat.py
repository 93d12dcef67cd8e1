"""Tells the study's database regularly that a trial's worker is alive."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from search.errors import StudyStopped

HEARTBEAT_S = 10


@contextlib.contextmanager
def beating(storage: Any, trial_id: int) -> Iterator[None]:
    """Record a heartbeat of the trial every HEARTBEAT_S seconds while the block runs, from a thread."""
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(StudyStopped):  # the database is away for too long: the trial's own calls say so
            while True:
                storage.record_heartbeat(trial_id)
                if ended.wait(HEARTBEAT_S):
                    storage.remove_session()  # a session belongs to its thread
                    return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
