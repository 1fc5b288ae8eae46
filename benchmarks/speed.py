"""Every system beside Diffusers' DiT: forward passes, training steps and sampling, eager and compiled, and what the device allows.

`--parts forward training sampling` takes some of the table, and `--results` a file that each group of figures is added to when it is
measured: the same command goes on where it was interrupted, and prints all of it.

A forward pass has one timestep for all samples, as in sampling. A training step has the largest of the batch sizes, a timestep for
each sample, weights and AdamW in float32, and autocast for another dtype; a DiT with prompts trains these alone. Sampling makes one
image with guidance in 50 steps of DDIM, by `ClassConditionalPipeline` and Diffusers' `DiTPipeline`, whose VAE is the smallest there
can be. All weights are random. What is compared is timed in turns, but for training steps: two models' would not fit into a GPU.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DiTPipeline

from diffusers_dmp.models.remix_layers import BasisLinear
from diffusers_dmp.training.utilisation import count_flops, measure_limits

from .denoisers import (
    DIT,
    DTR,
    MAKERS,
    REMIX,
    STOCK,
    compute_gradients,
    in_training,
    learned,
    make_denoiser,
    make_pipeline,
    parts_of,
    sample,
    sampling_inputs,
    sizes_of,
    training_inputs,
)
from .speed_table import Cell, Figure, Group, Table
from .timing import Ratio, Settings, time_in_turns

PARTS = ("forward", "training", "sampling")
EAGER, BLOCKS, WHOLE, AHEAD = "eager", "blocks compiled", "compiled", "compiled, modulations ahead"
STEPS = 50
AHEAD_BATCHES = 2  # up to which the modulations, a third of the weights, are what a pass waits for
# On a GPU; `baselines` says of what each is a share.
DTR_TARGET, AHEAD_TARGET, REMIX_TRAINING_TARGET, SYSTEMS_TARGET = 1.02, 0.85, 1.15, 1.03
STOCK_EAGER_TARGET, STOCK_COMPILED_TARGET = 0.13, 0.5


def run(settings: Settings) -> Iterator[Ratio]:
    """Measure the groups that the results do not have yet, yield the ratios, and print the table of each dtype."""
    tables = []
    for dtype in settings.dtypes:
        table = Table(settings, dtype)
        tables.append(table)
        for group in groups(settings, dtype):
            if not table.has(group.cells):
                table.add(measure(settings, group))
            yield from ratios(table, settings.device)
    for table in tables:
        print(table.in_milliseconds(list(MAKERS)))
        print(table.beside_limits(measure_limits(settings.device, table.dtype)), flush=True)


def groups(settings: Settings, dtype: torch.dtype) -> Iterator[Group]:
    """The groups of figures that are measured in turns."""
    hows = [EAGER, BLOCKS, WHOLE] if settings.compile else [EAGER]
    if "forward" in settings.parts:
        for batch_size in settings.batch_sizes:
            for how in hows:
                yield forward_passes(settings, dtype, batch_size, how)
    if "training" in settings.parts:
        for how in hows[:2]:
            for system in MAKERS:
                yield training_step(settings, dtype, system, how)
    if "sampling" in settings.parts:
        yield samplings(settings, dtype, hows[::2])


def measure(settings: Settings, group: Group) -> list[Figure]:
    """Measure a group's times and operations."""
    if settings.compile:
        torch.compiler.reset()  # so that what is compiled depends on nothing that was compiled before
    functions, moved = group.prepare()
    times = time_in_turns(functions, settings.device, settings.budget, settings.clock)
    figures = [
        Figure(cell, times[cell], flops=count_flops(function), moved=moved[cell])
        for cell, function in functions.items()
    ]
    if settings.device.type == "cuda":  # the next group needs the memory
        del functions
        gc.collect()
        torch.cuda.empty_cache()
    return figures


def forward_passes(settings: Settings, dtype: torch.dtype, batch_size: int, how: str) -> Group:
    """Forward passes of all systems, and with modulations that were computed ahead."""
    what = f"forward B={batch_size}"
    ours = [system for system in MAKERS if system != STOCK]
    ahead = ours if how == WHOLE and batch_size <= AHEAD_BATCHES else []
    cells = [Cell(what, how, system) for system in MAKERS] + [Cell(what, AHEAD, system) for system in ahead]

    def prepare():
        functions, moved = {}, {}
        for system in MAKERS:
            model = compiled(make_denoiser(system, sizes_of(settings.preset), settings.device, dtype), how)
            inputs = sampling_inputs(model, batch_size, settings.device, dtype)
            cell = Cell(what, how, system)
            functions[cell], moved[cell] = partial(forward, model, inputs), weight_bytes(model)
            if system in ahead:
                modulations = model.modulations_at(inputs["timestep"][:1], inputs["class_labels"])[0]
                cell = Cell(what, AHEAD, system)
                functions[cell] = partial(forward, model, inputs | {"modulations": modulations})
                unread = sum(p.nbytes for block in model.transformer_blocks for p in block.norm1.linear.parameters())
                moved[cell] = weight_bytes(model) - unread + modulations.nbytes
        return functions, moved

    return Group(cells, prepare)


@torch.no_grad()
def forward(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A forward pass without gradients."""
    model(**inputs)


def training_step(settings: Settings, dtype: torch.dtype, system: str, how: str) -> Group:
    """A training step of one system: autocast, backward pass and AdamW."""
    batch_size = max(settings.batch_sizes)
    cell = Cell(f"training step B={batch_size}", how, system)

    def prepare():
        model = compiled(in_training(make_denoiser(system, sizes_of(settings.preset), settings.device)), how)
        inputs = training_inputs(model, batch_size, settings.device)
        optimizer = torch.optim.AdamW(learned(model), fused=True)

        def step():
            compute_gradients(model, inputs, autocast=None if dtype == torch.float32 else dtype)
            optimizer.step()

        return {cell: step}, {cell: training_bytes(model)}

    return Group([cell], prepare)


def samplings(settings: Settings, dtype: torch.dtype, hows: list[str]) -> Group:
    """Sampling runs of all systems."""
    cells = [Cell(f"{STEPS} steps, one image, guidance", how, system) for how in hows for system in MAKERS]

    def prepare():
        functions, moved = {}, {}
        for cell in cells:
            model = make_denoiser(cell.system, sizes_of(settings.preset), settings.device, dtype)
            pipeline = make_pipeline(cell.system, model)
            if cell.how == WHOLE:
                compile_pipeline(pipeline)
            functions[cell] = partial(sample, pipeline, STEPS)
            moved[cell] = STEPS * weight_bytes(model)
        return functions, moved

    return Group(cells, prepare)


def compiled(model: Any, how: str) -> Any:
    """Return a denoiser, compiled as a table's row says: not, block by block, or whole."""
    if how == BLOCKS:
        for block in model.transformer_blocks:  # as `compile_repeated_blocks`, which Diffusers' DiT has not
            block.compile(dynamic=False)
    elif how == WHOLE:
        model.compile(dynamic=False, mode=graphs_of(model))
    return model


def compile_pipeline(pipeline: Any) -> None:
    """Compile a pipeline's denoiser: ours by the pipeline's own call, Diffusers' as its documentation does."""
    if isinstance(pipeline, DiTPipeline):
        pipeline.transformer.compile(mode=graphs_of(pipeline.transformer))
    else:
        pipeline.compile()


def graphs_of(model: Any) -> str | None:
    """The mode of `torch.compile` that makes CUDA graphs, where there is a GPU."""
    return "reduce-overhead" if model.device.type == "cuda" else None


def weight_bytes(model: Any) -> int:
    """
    The bytes of weights that a forward pass reads: each once, of several bases as much as one of them (they are fused), and
    nothing of embeddings, of which it reads rows.
    """
    modules = [module for part in parts_of(model) for module in part.modules()]
    num_bytes = 0
    for module in modules:
        own = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if isinstance(module, BasisLinear):
            own //= len(module.weight)
        num_bytes += 0 if isinstance(module, torch.nn.Embedding) else own
    return num_bytes


def training_bytes(model: Any) -> int:
    """
    The bytes of weights, gradients and moments that a training step must move: frozen weights once, and of trained ones
    weights (read and written), gradients (written and read) and both moments (read and written).
    """
    trained = sum(parameter.nbytes for parameter in learned(model))
    frozen = sum(p.nbytes for part in parts_of(model) for p in part.parameters() if not p.requires_grad)
    return frozen + 8 * trained


def ratios(table: Table, device: torch.device) -> Iterator[Ratio]:
    """The ratios of a table that were not yielded yet, with their targets on a GPU."""
    for cell in list(table.figures):
        for baseline, target in baselines(cell):
            yield from table.ratio(cell, baseline, target if device.type == "cuda" else None)


def baselines(cell: Cell) -> list[tuple[Cell, float | None]]:
    """What a figure is compared with, and the largest ratio that is wanted."""
    is_training, is_sampling = (cell.what.startswith(what) for what in ("training", f"{STEPS} steps"))
    if cell.how == AHEAD:
        return [(replace(cell, how=WHOLE), AHEAD_TARGET)]
    if is_sampling and cell.system == DIT:
        stock = replace(cell, system=STOCK)
        if cell.how == EAGER:
            return [(stock, None)]
        return [(replace(stock, how=EAGER), STOCK_EAGER_TARGET), (stock, STOCK_COMPILED_TARGET)]
    if cell.system == DIT or (is_sampling and cell.system == STOCK):
        return []
    target = DTR_TARGET if cell.system == DTR else None
    if is_training and cell.system == REMIX and cell.how == BLOCKS:
        target = REMIX_TRAINING_TARGET
    if is_sampling:
        target = SYSTEMS_TARGET if cell.how == WHOLE else None
    return [(replace(cell, system=DIT), target)]
