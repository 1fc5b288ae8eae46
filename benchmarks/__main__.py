"""`python -m benchmarks dtr|remix|dmp|patch|ppap|experts|text_training|training|guidance|speed|launches [--preset DiT-S/2] [--device cuda] [--compile]`"""

from importlib import import_module
from pathlib import Path

import torch

from diffusers_dmp.models.dit.configuration import DIT_PRESETS
from diffusers_dmp.models.precision import check_device, check_dtype, dtype_named
from diffusers_dmp.systems import SYSTEMS
from diffusers_dmp.terminal import OneLineParser, run_command

from .timing import HEADER, Settings, allow_more_shapes, commit, hardware, keep_freed_memory

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
    "speed",
    "launches",
]


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("system", choices=BENCHMARKS)
    parser.add_argument("--preset", default="DiT-S/2", choices=DIT_PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=40.0, help="per comparison")
    parser.add_argument("--cpu_time", action="store_true", help="compare the processors' time, on a busy computer")
    parser.add_argument("--parts", nargs="+", help="of speed: forward, training, sampling; by default all")
    parser.add_argument("--results", type=Path, help="of speed: a file to write to, and to go on with in another call")
    args = parser.parse_args(argv)
    benchmark = import_module(f"{__package__}.{args.system}")
    settings = make_settings(args, getattr(benchmark, "PARTS", ()))

    torch.manual_seed(0)
    keep_freed_memory()
    if settings.compile:
        allow_more_shapes()
    print(f"{hardware(settings.device)}, commit {commit()}\n\n{getattr(benchmark, 'HEADER', HEADER)}", flush=True)
    for ratio in benchmark.run(settings):
        print(ratio.row(), flush=True)


def make_settings(args, parts: tuple[str, ...]) -> Settings:
    """
    Check the options.

    Args:
        args (`argparse.Namespace`): The options.
        parts (`tuple[str, ...]`): The parts that the benchmark has.

    Raises:
        ValueError: if the computer has no such device, the device no such dtype, or the benchmark no such parts.
    """
    device = check_device(args.device)
    dtypes = [dtype_named(name) for name in args.dtypes]
    for dtype in dtypes:
        check_dtype(dtype, device)
    if min(args.batch_sizes) < 1:
        raise ValueError(f"Expected `batch_sizes` to be at least 1, but got {min(args.batch_sizes)}.")
    if args.cpu_time and device.type != "cpu":
        raise ValueError(f"Expected `cpu_time` on the CPU alone, but got {args.device}, which has a time of its own.")
    if not parts and (args.parts or args.results):
        raise ValueError(f"Expected `parts` and `results` for speed alone, but got them for {args.system}.")
    unknown = sorted(set(args.parts or ()) - set(parts))
    if unknown:
        raise ValueError(f"Expected `parts` to be of {', '.join(parts)}, but got {', '.join(unknown)}.")
    return Settings(
        preset=args.preset,
        device=device,
        dtypes=dtypes,
        batch_sizes=args.batch_sizes,
        compile=args.compile,
        budget=args.seconds,
        cpu_time=args.cpu_time,
        parts=[part for part in parts if part in (args.parts or parts)],
        results=args.results,
    )


if __name__ == "__main__":
    run_command(main, name="benchmarks")
