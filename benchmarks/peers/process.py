"""A runner as the orchestrator sees it: a process to ask, that may fail or take too long."""

import json
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class RunnerError(Exception):
    """A runner that did not start, gave up, or took too long; the message is one line for the report."""


class Runner:
    """Starts a runner and waits until it has said what it is (`about`); use it in a `with`."""

    def __init__(self, command: Sequence[str], log: Path, *, threads: int, root: Path, patience: float = 600.0) -> None:
        self.patience = patience
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        pipe = subprocess.PIPE
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=root, env=environment
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about = self._answer()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer; raises RunnerError, and then the process is gone."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words may tell why
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            return self._read()
        except RunnerError:
            self.close()  # one that is only slow would go on and disturb the others
            raise

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.patience)
        except queue.Empty:
            raise RunnerError(f"took more than {self.patience:.0f} s") from None
        if not line:
            raise RunnerError(self._reason("ended"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunnerError(" ".join(str(answer["error"]).split())[:300])
        return answer

    def _reason(self, what: str) -> str:
        code = self._process.wait(timeout=30)
        said = self._log.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing on stderr")
        return f"{what} with exit code {code}: {last[:200]}"
