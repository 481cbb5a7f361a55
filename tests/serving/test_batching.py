"""Requests share batches, in order and within limits, and none spoils another."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from trbert_jax.errors import UserError
from trbert_jax.serving.batching import Batcher, FullError


class Model:
    """Doubles numbers; runs only when it may."""

    def __init__(self) -> None:
        self.batches = list[tuple[list[Any], Any]]()
        self.may_run, self.entered = threading.Event(), threading.Event()

    def __call__(self, inputs: list[Any], options: Any) -> list[Any]:
        self.entered.set()
        assert self.may_run.wait(10)
        self.batches.append((inputs, options))
        if any(x < 0 for x in inputs):
            raise UserError("negative")
        if any(x > 1000 for x in inputs):
            raise ZeroDivisionError
        return [2 * x for x in inputs]


def run(test: Callable[[Batcher, Model], Awaitable[Any]], **limits: int) -> Any:
    async def main() -> Any:
        model = Model()
        options: Any = {"max_tokens": 10, "max_waiting": 10, **limits}
        batcher = Batcher(model, **options)
        work = asyncio.ensure_future(batcher.work())
        try:
            return await asyncio.wait_for(test(batcher, model), 10)
        finally:
            model.may_run.set()
            work.cancel()
            batcher.close()

    return asyncio.run(main())


async def begin(
    batcher: Batcher, model: Model, *requests: Sequence[int], options: Sequence[Any] = ()
) -> list["asyncio.Task[list[Any]]"]:
    """Submits requests while the model is busy with the input 0."""
    jobs = [asyncio.ensure_future(batcher.submit([0], [1]))]
    while not model.entered.is_set():
        await asyncio.sleep(0.001)
    for number, request in enumerate(requests):
        given = options[number] if options else None
        jobs.append(asyncio.ensure_future(batcher.submit(request, [3] * len(request), given)))
    await asyncio.sleep(0.01)
    return jobs


def test_batches_fill_up_in_order() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1, 2], [3, 4, 5], [6])
        assert batcher.num_waiting == 6
        model.may_run.set()
        assert await asyncio.gather(*jobs) == [[0], [2, 4], [6, 8, 10], [12]]
        assert model.batches == [([0], None), ([1, 2, 3], None), ([4, 5, 6], None)]

    run(test)


def test_a_batch_has_one_set_of_options() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1], [2], [3], options=["a", "b", "a"])
        model.may_run.set()
        await asyncio.gather(*jobs)
        assert model.batches[1:] == [([1, 3], "a"), ([2], "b")]

    run(test)


def test_an_input_larger_than_a_batch_runs_alone() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1, 2])
        model.may_run.set()
        await asyncio.gather(*jobs)
        assert model.batches[1:] == [([1], None), ([2], None)]

    run(test, max_tokens=2)


def test_more_than_may_wait_is_refused() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1, 2, 3], [4, 5])
        error = jobs[2].exception()
        assert isinstance(error, FullError)
        assert error.retry_after >= 1
        model.may_run.set()
        assert await jobs[1] == [2, 4, 6]

    run(test, max_waiting=4)


def test_a_bad_input_fails_its_own_request() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1], [-1], [2])
        model.may_run.set()
        found = await asyncio.gather(*jobs, return_exceptions=True)
        assert [found[1], found[3]] == [[2], [4]]
        assert isinstance(found[2], UserError)

    run(test)


def test_a_failing_model_fails_the_batch_and_goes_on() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1], [1001])
        model.may_run.set()
        found = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(x) for x in found] == [list, ZeroDivisionError, ZeroDivisionError]
        assert await batcher.submit([7], [1]) == [14]

    run(test)


def test_inputs_of_a_client_that_left_are_not_run() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        jobs = await begin(batcher, model, [1], [2])
        jobs[1].cancel()
        await asyncio.sleep(0)
        assert batcher.num_waiting == 1
        model.may_run.set()
        with pytest.raises(asyncio.CancelledError):
            await jobs[1]
        assert await jobs[2] == [4]
        assert model.batches[1:] == [([2], None)]

    run(test)
