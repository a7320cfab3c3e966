"""A real Redis of the test's own, on a socket in a folder of its own; it can be killed and come back."""

import asyncio
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.sockets import until


@dataclass
class RedisServer:
    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/redis.sock"

    async def start(self) -> None:
        executable = shutil.which("redis-server")
        assert executable, "redis-server is missing: apt-get install redis-server"
        socket = self.folder / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", str(self.folder), "--save", ""]
        append = ["--appendonly", "yes", "--appendfsync", "everysec"]  # what was written survives a kill of the process
        self.process = await asyncio.to_thread(
            subprocess.Popen, [executable, *options, *append], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await until(self._answers)

    def pause(self) -> None:
        """It answers nobody until `go_on`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.folder / "redis.sock"))
        except OSError:
            return False
        writer.write(b"PING\r\n")
        answer = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return answer.startswith(b"+PONG")


@asynccontextmanager
async def redis_server(folder: Path) -> AsyncIterator[RedisServer]:
    server = RedisServer(folder)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()
