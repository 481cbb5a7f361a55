"""Collect the inputs of many requests into batches for one model, which runs in a thread of its own.

There is no waiting for a batch to fill: while one is computed, the next one collects. Source of the scheme:
dynamic batching as in text-embeddings-inference, by a budget of tokens.
"""

import asyncio
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trbert_jax.errors import UserError

Run = Callable[[list[Any], Any], Sequence[Any]]  # (inputs, their options) -> a result for each
AfterBatch = Callable[[Sequence[Any], float], None]  # results, seconds


class FullError(Exception):
    """Too many inputs wait; `retry_after` is the number of seconds in which they will be done."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"overloaded; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclasses.dataclass(eq=False)
class _Request:
    """Inputs that are answered together."""

    results: list[Any]
    missing: int
    done: "asyncio.Future[list[Any]]"

    def finish(self, place: int, result: Any) -> None:
        self.results[place], self.missing = result, self.missing - 1
        if not self.missing and not self.done.done():
            self.done.set_result(self.results)

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclasses.dataclass(eq=False)
class _Input:
    value: Any
    tokens: int
    options: Hashable
    request: _Request
    place: int  # in the request


class Batcher:
    """Runs batches of at most `max_tokens` tokens, but at least one input, in the order of arrival.

    A batch has inputs with equal options. `max_waiting` bounds the inputs that wait. `after_batch` sees each
    batch in the thread of the model. Belongs to one event loop.
    """

    def __init__(
        self, run: Run, *, max_tokens: int, max_waiting: int, after_batch: AfterBatch | None = None
    ) -> None:
        self._run, self._after = run, after_batch
        self.max_tokens, self.max_waiting = max_tokens, max_waiting
        self._waiting = collections.deque[_Input]()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._rate = 0.0  # tokens a second, of the last batches

    @property
    def num_waiting(self) -> int:
        """Inputs that no batch has taken yet."""
        return len(self._waiting)

    async def submit(
        self, inputs: Sequence[Any], tokens: Sequence[int], options: Hashable = None
    ) -> list[Any]:
        """Returns the results of some inputs, in their order.

        `tokens` are their sizes. Inputs of a caller that is cancelled are not run. Raises `FullError` if too
        many wait, and what running them raises.
        """
        if not inputs:
            return []
        if len(self._waiting) + len(inputs) > self.max_waiting:
            raise FullError(self._retry_after())
        done = asyncio.get_running_loop().create_future()
        request = _Request([None] * len(inputs), len(inputs), done)
        for place, (value, count) in enumerate(zip(inputs, tokens, strict=True)):
            self._waiting.append(_Input(value, count, options, request, place))
        self._arrived.set()
        try:
            results: list[Any] = await done  # a caller that is cancelled cancels it
        finally:
            if done.cancelled():
                self._waiting = collections.deque(x for x in self._waiting if x.request is not request)
        return results

    async def work(self) -> None:
        """Runs batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            while batch := self._take():
                await self._compute(loop, batch)
            await self._arrived.wait()

    async def run_now(self, function: Callable[[], Any]) -> Any:
        """Runs something else in the thread of the model."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """Ends the thread, after the batch that it computes."""
        self._thread.shutdown()

    def _retry_after(self) -> int:
        waiting = sum(entry.tokens for entry in self._waiting)
        return max(1, math.ceil(waiting / self._rate)) if self._rate else 1

    def _take(self) -> list[_Input]:
        """Takes the inputs of the next batch."""
        batch, others, tokens = list[_Input](), list[_Input](), 0
        while self._waiting:
            entry = self._waiting.popleft()
            if entry.request.done.done():  # cancelled, or failed in another batch
                continue
            if batch and entry.options != batch[0].options:
                others.append(entry)
            elif batch and tokens + entry.tokens > self.max_tokens:
                others.append(entry)
                break
            else:
                batch.append(entry)
                tokens += entry.tokens
        self._waiting.extendleft(reversed(others))
        return batch

    async def _compute(self, loop: asyncio.AbstractEventLoop, batch: list[_Input]) -> None:
        start, tokens = time.perf_counter(), sum(entry.tokens for entry in batch)
        outcomes = await loop.run_in_executor(self._thread, self._outcomes, batch)
        rate = tokens / max(time.perf_counter() - start, 1e-6)
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                entry.request.fail(outcome)
            else:
                entry.request.finish(entry.place, outcome)

    def _outcomes(self, batch: list[_Input]) -> Sequence[Any]:
        """Returns for each input its result or an error; in the thread of the model."""
        start, values = time.perf_counter(), [entry.value for entry in batch]
        try:
            results = self._run(values, batch[0].options)
        except Exception as error:
            if len(batch) == 1 or not isinstance(error, UserError):
                return [error] * len(batch)
            return [*self._one_by_one(batch)]  # so that a bad input spoils no other
        if self._after is not None:
            self._after(results, time.perf_counter() - start)
        return results

    def _one_by_one(self, batch: list[_Input]) -> Iterator[Any]:
        for entry in batch:
            yield self._outcomes([entry])[0]
