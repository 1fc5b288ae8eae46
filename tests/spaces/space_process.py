"""Start the Space in a process of its own, as `make space` does."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio", reason="pip install diffusers-dmp[space]")

SPACE = Path(__file__).parents[2] / "spaces"
PATIENCE = 600  # seconds to wait until it answers; a busy computer imports slowly


@contextmanager
def running_space(log: Path, **environment: str) -> Iterator[str]:
    """Start the Space with an environment, and give its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own | environment,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"The Space did not start:\n{log.read_text()}")
