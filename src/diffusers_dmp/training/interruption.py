"""SIGTERM and Ctrl-C end a training after the present step, in all of its processes; a second signal ends it at once."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal and a launcher may both pass on what a user asked for once.
SECONDS_OF_ONE_REQUEST = 2.0
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it
PARENT = os.getppid()  # when this process began, which may be long before its first step
FIRST_NOTICE = b"\nEnding after this step, with a checkpoint; a second signal ends at once.\n"


class Interruption:
    """
    Receives signals within its context; outside of it they do what they did before.

    ```py
    with Interruption(accelerator) as interruption:
        for step in steps:
            if interruption.signal_received() is not None:
                break
    ```

    `accelerate launch` ends on SIGTERM without passing it on; its end is taken as that signal.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to enter the context.
    """

    def __init__(self, accelerator: Accelerator):
        self.received: int | None = None
        self.received_at = 0.0
        self.launcher = PARENT if LAUNCHED in os.environ else None
        self.has_others = accelerator.num_processes > 1
        self.group: Any = None
        if self.has_others and torch.distributed.get_backend() != "gloo":
            # on the CPU, so that the processes agree without waiting for their devices
            self.group = torch.distributed.new_group(backend="gloo")
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows no other to receive signals
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            os.write(2, FIRST_NOTICE)  # not `print`, which may be what was interrupted
        elif time.monotonic() - self.received_at > SECONDS_OF_ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def signal_received(self) -> int | None:
        """The signal that one of the processes received; each of them has to ask, after the same steps."""
        if self.received is None and self.launcher is not None and os.getppid() != self.launcher:
            self.received = signal.SIGTERM
        if self.has_others:
            number = torch.tensor([self.received or 0])
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
            self.received = int(number) or None
        return self.received


def ignore_signals(worker: int = 0) -> None:
    """In a process that reads data: its training decides when it ends, and may need it for the present step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
