"""`python -m benchmarks dtr|remix|dmp|patch|ppap [--preset DiT-S/2] [--device cuda] [--compile]`"""

import argparse

import torch

from . import dmp, dtr, patch, ppap, remix
from .timing import HEADER, hardware, keep_freed_memory

SYSTEMS = {"dtr": dtr.run, "remix": remix.run, "dmp": dmp.run, "patch": patch.run, "ppap": ppap.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--preset", default="DiT-S/2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=40.0, help="per comparison")
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.manual_seed(0)
    keep_freed_memory()
    print(f"{hardware(device)}\n\n{HEADER}")
    dtypes = [getattr(torch, name) for name in args.dtypes]
    for ratio in SYSTEMS[args.system](args.preset, device, dtypes, args.batch_sizes, args.compile, args.seconds):
        print(ratio.row(), flush=True)


if __name__ == "__main__":
    main()
