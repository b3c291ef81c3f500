# SPDX-License-Identifier: Apache-2.0
"""PrefetchIterator: the next items of an iterator, fetched by a thread of its own."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class PrefetchIterator(Iterator):
    """Iterates over `data_iter`, up to `buffer_size` items ahead. Deprecated: input pipelines prefetch by themselves.

    An error in `data_iter` is raised where its item would have been.
    """

    def __init__(self, data_iter: Iterable[Any], buffer_size: int = 1):
        warnings.warn(
            "PrefetchIterator is deprecated: use the prefetching of the input pipeline, such as that of tf.data.",
            DeprecationWarning,
            stacklevel=2,
        )
        self.buffer_size = max(1, buffer_size)
        self._source = iter(data_iter)
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._active, self._error = True, None
        threading.Thread(target=self._fetch, daemon=True).start()

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._items or not self._active)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            raise self._error or StopIteration

    def close(self) -> None:
        """Ends the iteration and the thread."""
        with self._changed:
            self._active = False
            self._items.clear()
            self._changed.notify_all()

    def _fetch(self) -> None:
        while True:
            try:
                item = next(self._source)
            except Exception as error:
                return self._end(None if isinstance(error, StopIteration) else error)
            with self._changed:
                self._changed.wait_for(lambda: len(self._items) < self.buffer_size or not self._active)
                if not self._active:
                    return
                self._items.append(item)
                self._changed.notify_all()

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self._active, self._error = False, error
            self._changed.notify_all()
