"""`kvfold serve` in a process of its own, for benchmarks that load it."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server that is ready; it is ended afterwards."""
    command = [str(Path(sys.executable).with_name("kvfold")), "serve", "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    try:
        found = (re.search(r"ready on (http://\S+)", line) for line in server.stderr)
        ready = next(filter(None, found), None)
        if ready is None:
            raise SystemExit(f"the server ended: {' '.join(command)}")
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would hold it up
        yield ready[1], server.pid
    finally:
        server.terminate()
        server.wait()
