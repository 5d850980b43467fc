"""Runs `async def` tests without a plug-in: debug mode, a real-time guard, a check for leftovers, virtual time on request.

`@pytest.mark.virtual_time` gives a test a loop whose clock stands still while anything is ready and jumps to the next
timer when nothing is. Sockets between peers on that loop are real. Jobs of an executor keep the clock from jumping.
"""

import asyncio
import gc
import inspect
import selectors
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

GUARD_S = 30.0  # real time one coroutine test may take
SETTLE_S = 1.0  # real time tasks and transports have for their last steps once a test has returned
EPOCH_S = 10_000.0  # any start but 0, so that "never" and "now" differ
# Loopback delivers inside the sender's system call unless the kernel is busy, so a jump waits for bytes under way. A
# long jump is rare, and does most harm when it comes too early, so it waits longer.
GRACE_S, LONG_GRACE_S, LONG_JUMP_S = 0.002, 0.015, 1.0
# Debug mode reports each TLS handshake that a client refuses to the exception handler; it is no error of the server.
EVERYDAY = "Error on transport creation for incoming connection"


class VirtualSelector(selectors.DefaultSelector):
    """A selector that advances its clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = EPOCH_S
        self.holds = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self.holds:
            return super().select(None)
        ready = super().select(LONG_GRACE_S if timeout >= LONG_JUMP_S else GRACE_S)
        if not ready:
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a VirtualSelector's clock."""

    def __init__(self) -> None:
        self.clock = VirtualSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self.clock.holds += 1
        future.add_done_callback(self._executor_done)
        return future

    def _executor_done(self, _future: asyncio.Future[Any]) -> None:
        self.clock.holds -= 1

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        self.clock.holds += 1
        await super().shutdown_default_executor(*args, **kwargs)


class Guard:
    """A timer that cancels a test after too much real time, and prints where each task waits."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.expired = False
        self._task = task
        self._timer = threading.Timer(GUARD_S, task.get_loop().call_soon_threadsafe, (self._expire,))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()

    def _expire(self) -> None:
        self.expired = True
        for task in asyncio.all_tasks():
            task.print_stack(file=sys.stderr)
        self._task.cancel()


def open_transports() -> list[asyncio.BaseTransport]:
    """Return the running loop's open transports, from its private registry: asyncio has no public one."""
    return list(getattr(asyncio.get_running_loop(), "_transports", {}).values())


def abort(transports: list[asyncio.BaseTransport]) -> None:
    """Close transports at once: their warnings would fail the next test."""
    for transport in transports:
        if isinstance(transport, asyncio.WriteTransport):
            transport.abort()


async def settle() -> tuple[set[asyncio.Task[Any]], list[asyncio.BaseTransport]]:
    """Wait for tasks and transports to end; return those that did not."""
    this = asyncio.current_task()
    give_up = time.monotonic() + SETTLE_S
    while True:
        tasks = {task for task in asyncio.all_tasks() if task is not this}
        transports = [transport for transport in open_transports() if getattr(transport, "_sock", None) is not None]
        if not (tasks or transports) or time.monotonic() > give_up:
            return tasks, transports
        del transports
        await asyncio.sleep(0)


async def supervise(test: Callable[[], Any], problems: list[str]) -> None:
    """Await a test under a guard; add leftover tasks and transports to `problems`."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: note_exception(context, problems))
    task = asyncio.current_task()
    assert task is not None
    guard = Guard(task)
    try:
        await test()
    except BaseException as failure:
        abort(open_transports())
        if guard.expired and isinstance(failure, asyncio.CancelledError):
            task.uncancel()
            pytest.fail(f"still running after {GUARD_S:g} s of real time; its tasks are on stderr", pytrace=False)
        raise
    finally:
        guard.stop()
    tasks, transports = await settle()
    problems += [f"task left running: {task!r}" for task in tasks]
    problems += [f"transport left open: {transport!r}" for transport in transports]
    abort(transports)
    await asyncio.sleep(0)


def note_exception(context: dict[str, Any], problems: list[str]) -> None:
    """Add an error that asyncio would only log to `problems`."""
    if context["message"] != EVERYDAY:
        problems.append(f"{context['message']}: {context.get('exception')!r} {context.get('task') or ''}".rstrip())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "virtual_time: the loop's clock jumps to the next timer when nothing is ready")


def pytest_collection_finish() -> None:
    """Exclude what exists before the first test from the collection after each test (20 ms each)."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in a loop of its own; leave other tests to pytest."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters}
    virtual = pyfuncitem.get_closest_marker("virtual_time") is not None
    problems: list[str] = []
    with asyncio.Runner(debug=True, loop_factory=VirtualLoop if virtual else asyncio.SelectorEventLoop) as runner:
        runner.run(supervise(lambda: function(**arguments), problems))
    # Warnings of collected objects have to fail this test (pytest's unraisable plugin), not a later one.
    gc.collect()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    return True
