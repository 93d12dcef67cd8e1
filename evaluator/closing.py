"""What ends by itself: at the end of a `with` block, or also when nothing holds it any more."""

from __future__ import annotations

import abc
import contextlib
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """Closing ends at the end of a `with` block; `close` may be called by hand, and again."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it. A second call does nothing."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, whatever was raised."""
        self.close()


class ClosingUnheld(Closing):
    """ClosingUnheld ends too when nothing holds it any more."""

    def __del__(self) -> None:
        """End it; what it was may never have begun."""
        with contextlib.suppress(Exception):
            self.close()
