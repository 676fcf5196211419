"""Lanes: threads that each compute passes of their own, on a copy of a model that shares all its frozen numbers.

On a CPU, two passes beside each other on one core each are faster than one pass on two cores: between the large
products lie many small operations, over which threads only wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from fedpers.cohort.batching import Index, microbatches

LEAST_WORK = 2e8  # floating-point operations; what is less is not worth handing to a second thread
LEAST_TOKENS = 512  # of a pass that was cut smaller so that every lane has some

Model = TypeVar("Model")
Item = TypeVar("Item")
Found = TypeVar("Found")


def worth(effort: float) -> bool:
    """Whether so many floating-point operations are worth sharing out."""
    return effort >= LEAST_WORK


class Lanes(Generic[Model]):
    """A model and its copies, one for each thread."""

    def __init__(self, model: Model, copy: Callable[[Model], Model], count: int) -> None:
        """Make no thread and no copy before they are needed.

        Args:
            model: the original; it is the first lane.
            copy: makes a copy that may be used by another thread.
            count: lanes; 1 computes in the calling thread.
        """
        self.first, self.count = model, count
        self._models, self._copy = [model], copy
        self._pool: ThreadPoolExecutor | None = None

    @property
    def models(self) -> Sequence[Model]:
        """The original first; makes the copies."""
        while len(self._models) < self.count:
            self._models.append(self._copy(self.first))
        return self._models

    def forget(self) -> None:
        """Drop the copies, as what they were made from has changed."""
        del self._models[1:]

    def together(self, work: Callable[[int], Found], count: int) -> list[Found]:
        """Do `work` of 0, 1, ... count - 1 at the same time; returns what it gives in that order."""
        if count < 2:
            return [work(lane) for lane in range(count)]
        running = [self._threads().submit(work, lane) for lane in range(count)]
        wait(running)  # also where one breaks: nobody may work on while the caller cleans up
        return [one.result() for one in running]

    def each(self, work: Callable[[Model, Item], Found], items: Sequence[Item], effort: float) -> Iterator[Found]:
        """Yield what `work` makes of each item, in the order of items, whichever lane it is done by.

        Args:
            work: gets a lane's model and an item.
            items: what is to be done.
            effort: floating-point operations of all items; too few stay in the calling thread.
        """
        if self.count == 1 or len(items) == 1 or not worth(effort):
            for item in items:
                yield work(self.first, item)
            return
        free: SimpleQueue[Model] = SimpleQueue()
        for model in self.models:
            free.put(model)

        def one(item: Item) -> Found:
            model = free.get()
            try:
                return work(model, item)
            finally:
                free.put(model)

        running = [self._threads().submit(one, item) for item in items]
        try:
            for future in running:
                yield future.result()
        finally:  # where one breaks, nobody may work on while the caller cleans up
            for future in running:
                future.cancel()
            wait(running)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            # PyTorch counts threads for each thread that calls it.
            self._pool = ThreadPoolExecutor(self.count, "lane", initializer=torch.set_num_threads, initargs=(1,))
        return self._pool


def passes(lengths: Index, budget: int, lanes: int) -> list[list[Index]]:
    """Cut the records of a step into passes and share them out; returns each lane's passes, each of positions.

    Which lane gets a pass hangs on lengths alone, so that sums are added up in the same order every time.
    """
    if lanes > 1:
        budget = min(budget, max(LEAST_TOKENS, -(-int(lengths.sum()) // (2 * lanes))))
    shared: list[list[Index]] = [[] for _ in range(lanes)]
    load = [0] * lanes
    for part in microbatches(lengths, budget):
        lane = load.index(min(load))
        shared[lane].append(part)
        load[lane] += len(part) * int(lengths[part[0]])  # the first is the longest
    return [one for one in shared if one]
