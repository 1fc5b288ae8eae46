"""`python -m benchmarks dtr|remix|dmp|patch|ppap|experts|text_training|training|guidance [--preset DiT-S/2] [--device cuda] [--compile]`"""

from importlib import import_module
from pathlib import Path

import torch

from diffusers_dmp.systems import SYSTEMS
from diffusers_dmp.terminal import OneLineParser, run_command

from .timing import HEADER, Settings, hardware, keep_freed_memory

# every system with a module of its name in this folder, whose `run` yields the ratios for some settings, and what no system has
BENCHMARKS = [
    *(
        system.short_name
        for system in SYSTEMS.values()
        if Path(__file__).with_name(f"{system.short_name}.py").is_file()
    ),
    "text_training",
    "training",
    "guidance",
]


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("system", choices=BENCHMARKS)
    parser.add_argument("--preset", default="DiT-S/2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=40.0, help="per comparison")
    parser.add_argument("--cpu_time", action="store_true", help="compare the processors' time, on a busy computer")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    keep_freed_memory()
    settings = Settings(
        preset=args.preset,
        device=torch.device(args.device),
        dtypes=[getattr(torch, name) for name in args.dtypes],
        batch_sizes=args.batch_sizes,
        compile=args.compile,
        budget=args.seconds,
        cpu_time=args.cpu_time,
    )
    print(f"{hardware(settings.device)}\n\n{HEADER}")
    for ratio in import_module(f"{__package__}.{args.system}").run(settings):
        print(ratio.row(), flush=True)


if __name__ == "__main__":
    run_command(main, name="benchmarks")
