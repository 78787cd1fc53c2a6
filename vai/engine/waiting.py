"""How long a queue that is full will be: when it is worth asking again, for those who are refused.

The speed of the queue is how many requests have left it lately, while others waited: since then, or for the last KEPT
of them. Places come free one after another, so those who are refused get times one after another, or all would come
back for the first place at once.
"""

from __future__ import annotations

from collections import deque

KEPT = 64
LONGEST = 60.0  # seconds; what is said to be further off, clients take for nonsense


class Patience:
    """The time at which a place is expected for the next who is refused. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._left: deque[float] = deque(maxlen=KEPT)
        self._since = 0.0
        self._promised = 0.0

    def began(self, now: float) -> None:
        """Somebody waits again, where nobody did."""
        self._since = now
        self._left.clear()

    def left(self, now: float) -> None:
        """A request is over."""
        self._left.append(now)

    def retry_after(self, now: float) -> float:
        """Seconds until one who is refused now may expect a place; the next one gets a later one."""
        since = self._left[0] if len(self._left) == KEPT else self._since
        each = (now - since) / len(self._left) if self._left else now - since
        self._promised = min(max(now, self._promised) + each, now + LONGEST)
        return self._promised - now
