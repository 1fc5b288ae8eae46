"""FSDP2 on CPUs, for tests: Accelerate itself shards on accelerators alone.

`python -m torch.distributed.run … sharded_launch.py script.py [arguments]` runs a script with it.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

# what `accelerate launch` makes of the shipped configurations
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def pretend_accelerators() -> None:
    """Tell Accelerate, before anything else asks, that the processes' devices are accelerators."""
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    pretend_accelerators()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
