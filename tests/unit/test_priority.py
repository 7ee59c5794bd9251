"""The scope of a priority: nested, restored, inherited by tasks and threads, carried where it would be lost."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox import InvalidPriority, Priority, carry_priority, current_priority, processing_priority
from outbox.event import encode


def test_the_default_is_normal():
    assert current_priority() is Priority.NORMAL


def test_scopes_nest_and_the_innermost_wins():
    with processing_priority(Priority.LOW):
        with processing_priority(Priority.HIGH):
            assert current_priority() == 50
        assert current_priority() == -50
    assert current_priority() == 0


def test_an_exception_ends_the_scope():
    with pytest.raises(RuntimeError), processing_priority(Priority.LOW):
        raise RuntimeError
    assert current_priority() == 0


def test_one_scope_may_be_entered_again_and_inside_itself():
    scope = processing_priority(Priority.LOW)
    with scope, scope:
        assert current_priority() == -50
    assert current_priority() == 0
    with scope:
        assert current_priority() == -50


def test_one_scope_is_shared_by_tasks():
    scope = processing_priority(Priority.LOW)

    async def enter(entered, leave):
        with scope:
            entered.set()
            await leave.wait()
            inside = current_priority()
        return inside, current_priority()

    async def main():
        entered, leave = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(enter(*events)) for events in zip(entered, leave, strict=True)]
        for event in entered:
            await event.wait()
        leave[0].set()  # the first one in is the first one out
        first = await tasks[0]
        leave[1].set()
        return first, await tasks[1]

    assert asyncio.run(main()) == ((-50, 0), (-50, 0))


def test_one_scope_is_shared_by_threads():
    scope = processing_priority(Priority.LOW)
    first_is_out = threading.Event()
    both_are_in = threading.Barrier(2)

    def enter(first):
        with scope:
            both_are_in.wait()
            if not first:
                first_is_out.wait()
            inside = current_priority()
        found = inside, current_priority()
        first_is_out.set()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(enter, [True, False])] == [(-50, 0), (-50, 0)]


def test_a_scope_entered_again_ends_from_the_inside():
    scope = processing_priority(Priority.LOW)
    with scope:
        with processing_priority(Priority.HIGH):
            with scope:
                assert current_priority() == -50
            assert current_priority() == 50
        assert current_priority() == -50
    assert current_priority() == 0


def generator(priority):
    with processing_priority(priority):
        yield current_priority()


def test_closing_a_generator_ends_its_scope():
    running = generator(Priority.LOW)
    assert next(running) == -50
    running.close()
    assert current_priority() == 0


def test_a_generator_that_ends_after_a_later_scope_has_begun_leaves_that_alone():
    running = generator(Priority.LOW)
    next(running)
    with processing_priority(Priority.HIGH):
        running.close()
        assert current_priority() == 50
    assert current_priority() == 0


def test_an_asynchronous_generator_may_be_closed_in_another_task():
    async def stream():
        with processing_priority(Priority.LOW):
            yield current_priority()

    async def main():
        running = stream()
        assert await anext(running) == -50
        await asyncio.create_task(running.aclose())
        with processing_priority(Priority.HIGH):
            return current_priority()

    assert asyncio.run(main()) == 50


def test_a_task_keeps_the_scope_in_which_it_was_made():
    async def read(go):
        await go.wait()
        return current_priority()

    async def main():
        go = asyncio.Event()
        with processing_priority(Priority.LOW):
            inside = asyncio.create_task(read(go))
        outside = asyncio.create_task(read(go))
        go.set()
        return await inside, await outside

    assert asyncio.run(main()) == (-50, 0)


def test_to_thread_keeps_the_scope():
    async def main():
        with processing_priority(Priority.LOW):
            return await asyncio.to_thread(current_priority)

    assert asyncio.run(main()) == -50


def test_threads_do_not_see_each_others_scopes():
    with ThreadPoolExecutor() as pool, processing_priority(Priority.LOW):
        assert pool.submit(current_priority).result() == 0


def test_carry_priority_where_a_pool_would_lose_it():
    with ThreadPoolExecutor(4) as pool:
        with processing_priority(Priority.LOW):
            carried = carry_priority(lambda n: (n, current_priority()))
        with processing_priority(Priority.HIGH):
            assert [*pool.map(carried, range(50))] == [(n, -50) for n in range(50)]
        assert pool.submit(current_priority).result() == 0


def test_carry_priority_in_an_executor_of_a_loop():
    async def main():
        with processing_priority(Priority.LOW):
            return await asyncio.get_running_loop().run_in_executor(None, carry_priority(current_priority))

    assert asyncio.run(main()) == -50


@pytest.mark.parametrize("priority", [-32768, -1, 0, 7, 32767, Priority.BULK])
def test_any_smallint_is_a_priority(priority):
    with processing_priority(priority):
        assert current_priority() == priority


@pytest.mark.parametrize("wrong", [True, 1.0, "50", None, 32768, -32769])
def test_what_is_no_priority_is_refused_at_the_scope(wrong):
    with pytest.raises(InvalidPriority, match=r"^priority: "):
        processing_priority(wrong)
    assert current_priority() == 0


@pytest.mark.parametrize("wrong", [True, 1.0, "50", 32768])
def test_what_is_no_priority_is_refused_at_the_event(wrong):
    with pytest.raises(InvalidPriority, match=r"^priority: "):
        encode({}, type="T", stream="s", priority=wrong)


def test_what_an_event_says_itself_beats_the_scope_and_this_the_default():
    def recorded(**options):
        return encode({}, type="T", stream="s", **options).priority

    assert recorded() == 0
    with processing_priority(Priority.LOW):
        assert recorded() == -50
        assert recorded(priority=Priority.NORMAL) == 0
