"""The foundations of the other tests: the virtual clock, the guard, the search for leftovers, the scripted peers."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEFTOVERS = '''
import asyncio
import socket

import conftest

conftest.GUARD_S = 0.3
conftest.SETTLE_S = 0.1
kept = []


async def test_task():
    kept.append(asyncio.create_task(asyncio.Event().wait()))


async def test_transport():
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    kept.append(await asyncio.open_connection(*server.sockets[0].getsockname()))
    server.close()


async def test_socket():
    socket.create_server(("127.0.0.1", 0))


async def test_callback():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)


async def test_hang():
    await asyncio.Event().wait()


async def test_tidy():
    await asyncio.sleep(0)
'''


@pytest.mark.virtual_time
async def test_timers_run_in_order_and_take_no_real_time() -> None:
    """Timers of several days fire at once, in the order of their times, each at its own time."""
    loop, began = asyncio.get_running_loop(), time.monotonic()
    since, last = loop.time(), loop.create_future()
    fired: list[float] = []
    for delay_s in (30, 0.5, 86_400 * 3, 7):
        loop.call_later(delay_s, lambda: fired.append(loop.time() - since))
    loop.call_later(86_400 * 4, last.set_result, None)
    await last
    assert fired == pytest.approx([0.5, 7, 30, 86_400 * 3]) and time.monotonic() - began < 1


@pytest.mark.virtual_time
async def test_the_clock_waits_for_sockets_and_threads() -> None:
    """Bytes under way on loopback and the work of a thread come before any timer."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    loop, finish = asyncio.get_running_loop(), threading.Event()
    since = loop.time()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for number in range(200):
        writer.write(b"%d\n" % number)
        async with asyncio.timeout(300):
            assert await reader.readline() == b"%d\n" % number
    writer.close()
    server.close()
    threading.Timer(0.1, finish.set).start()
    async with asyncio.timeout(0.001):
        assert await loop.run_in_executor(None, finish.wait, 5)
    assert loop.time() == since


def test_leftovers_fail_the_test_that_left_them(tmp_path: Path) -> None:
    """A task, a transport, a socket, an unseen error and a hang each fail their own test, and no other."""
    shutil.copy(HERE / "conftest.py", tmp_path)
    shutil.copy(HERE.parent / ".pytest.ini", tmp_path)
    (tmp_path / "test_left.py").write_text(LEFTOVERS)
    command = [sys.executable, "-m", "pytest", "-c", ".pytest.ini", "-rA", "--tb=line", "test_left.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60).stdout
    outcomes = {line.split()[1].partition("::")[2]: line.split()[0] for line in output.splitlines() if "::" in line}
    broken = ("task", "transport", "socket", "callback", "hang")
    assert outcomes == {**{f"test_{name}": "FAILED" for name in broken}, "test_tidy": "PASSED"}, output
