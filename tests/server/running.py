"""A real server: the command `kvfold serve` in a process of its own."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

READY_SECONDS = 120.0  # a shared core may be slow


class RunningServer:
    """`url` once it listens; `log` has every line of stderr so far."""

    def __init__(self, model: Path, *arguments: str, cache: Path, **environment: str) -> None:
        own = {"KVFOLD_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
        self.log: list[str] = []
        self._listening: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("kvfold")), "serve", "--model", str(model), "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            env=os.environ | own,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._listening.get(timeout=READY_SECONDS)
        if not self.url:
            raise RuntimeError("the server ended at once:\n" + "".join(self.log))

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self, **options: Any) -> httpx.Client:
        """For requests to this server."""
        return httpx.Client(base_url=self.url, **{"timeout": 60.0, **options})

    def status(self) -> dict[str, Any]:
        """What /ready says."""
        return httpx.get(f"{self.url}/ready", timeout=10.0).json()

    def _answer(self) -> str | None:
        """Its status; None where it does not listen."""
        try:
            return str(self.status()["status"])
        except httpx.ConnectError:
            return None

    def wait_ready(self, status: str = "ready") -> None:
        """Returns when /ready says `status`."""
        deadline = time.monotonic() + READY_SECONDS
        while self._answer() != status:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the server is not {status}:\n" + "".join(self.log))
            time.sleep(0.05)

    def wait_idle(self) -> dict[str, Any]:
        """Returns /stats once nothing runs or waits and no page is held but by prefix snapshots."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            stats = httpx.get(f"{self.url}/stats", timeout=10.0).json()
            pool = stats["pool"]
            if not stats["running"] and not stats["waiting"] and pool["used"] == pool["cached"]:
                return stats
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server is not idle: {stats}")
            time.sleep(0.05)

    def engine(self) -> psutil.Process:
        """The engine process."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child for child in children if "kvfold.server.engine_process" in " ".join(child.cmdline())]
        return engine

    def kill_engine(self) -> None:
        """As if it had crashed; returns when it is gone."""
        engine = self.engine()
        engine.kill()
        psutil.wait_procs([engine], timeout=10)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def stop(self) -> int:
        """Ends it, gently and then not; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    return self.wait(10)
                except subprocess.TimeoutExpired:
                    continue
        return self.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"listening on (http://\S+?),", line)
            if found:
                self._listening.put(found[1])
        self._listening.put("")
