"""A process that ends with the one that started it: no training goes on writing after what started it was killed.

`python -m benchmarks.watched PID SCRIPT [ARGUMENT …]` runs a script for the process PID.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

SECONDS_TO_NOTICE = 1.0
SECONDS_TO_END = 60.0  # for the present step and its checkpoint


def end_with(parent: int) -> None:
    """
    Send this process SIGTERM when its parent is gone, in whichever way that ended, and end it if that does not.

    Args:
        parent (`int`): The id of the process that started this one, which may be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_TO_NOTICE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    parent, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if the script had been started
    end_with(int(parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
