"""A worker that is told to end waits for what it does at the end, however often it is told."""

import signal
import subprocess
import sys
import textwrap

from benchmarks.comparison.workers import TERMINATED
from conftest import REPOSITORY


def test_a_second_signal_does_not_interrupt_the_end():
    """As when a whole process group is told to end, and the main process then tells its workers, too."""
    script = """
        import signal, time
        from benchmarks.comparison.workers import end_in_order
        signal.signal(signal.SIGTERM, end_in_order)
        try:
            print("begun", flush=True)
            time.sleep(600)
        except BaseException:
            print("ending", flush=True)
            time.sleep(0.5)  # the training writes its last checkpoint
            print("ended", flush=True)
            raise
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    for line in ("begun", "ending"):
        assert process.stdout.readline() == f"{line}\n"
        process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "ended\n" and process.wait() == TERMINATED
