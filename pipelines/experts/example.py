"""Generate with two transformers, each for its own noise levels, in a pipeline of Diffusers.
eDiff-I, https://arxiv.org/abs/2211.01324

Two tiny transformers with random weights in Stable Diffusion 3's pipeline, in seconds and without a download:

    python pipelines/experts/example.py

A pipeline's own transformer for little noise and another one, such as a fine-tuned copy, for much noise:

    python pipelines/experts/example.py --pipeline stabilityai/stable-diffusion-3.5-medium --high user/for-much-noise \
        --boundary 0.7 --prompt "a red fox in the snow"
"""

import argparse

import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from diffusers_dmp import DenoiserExperts, NoiseIntervals
from diffusers_dmp.systems import responsibility

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pipeline", help="folder or Hub id; its transformer gets little noise")
parser.add_argument("--high", help="folder or Hub id of a pipeline whose transformer gets much noise")
parser.add_argument("--prompt", default="a red fox in the snow")
parser.add_argument("--boundary", type=float, default=0.875, help="σ at which much noise begins, in (0, 1)")
parser.add_argument("--output_dir", default="outputs/experts")
parser.add_argument("--num_inference_steps", type=int, default=8)
args = parser.parse_args()


def tiny_transformer(num_layers: int) -> SD3Transformer2DModel:
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    widths = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    texts = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
    return SD3Transformer2DModel(num_layers=num_layers, **sizes, **widths, **texts)


def tiny_pipeline() -> StableDiffusion3Pipeline:
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=2, shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    texts = dict.fromkeys(
        ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
    )
    return StableDiffusion3Pipeline(transformer=tiny_transformer(num_layers=1), scheduler=scheduler, vae=vae, **texts)


torch.manual_seed(0)
if args.pipeline is None:
    pipe, high = tiny_pipeline(), tiny_transformer(num_layers=3)  # experts may differ in depth and width
    embeds = {"prompt_embeds": torch.randn(1, 7, 16), "pooled_prompt_embeds": torch.randn(1, 16)}
    call = embeds | {f"negative_{name}": torch.zeros_like(value) for name, value in embeds.items()}
else:
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.bfloat16)
    high = AutoModel.from_pretrained(args.high, subfolder="transformer", dtype=torch.bfloat16)
    call = {"prompt": args.prompt}

# expert 0 owns the least noise; the boundary is a noise level, whatever the scheduler's shift and number of steps
pipe.transformer = DenoiserExperts([pipe.transformer, high], NoiseIntervals.from_sigmas([args.boundary]))

pipe.save_pretrained(args.output_dir)  # one model; `diffusers-dmp publish` uploads it with the code that loads it
# a tiny pipeline has no text encoders
absent = {name: None for name, component in pipe.components.items() if component is None}
pipe = DiffusionPipeline.from_pretrained(args.output_dir, dtype=high.dtype, **absent)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()  # only the expert that is working is on the GPU
generator = torch.Generator().manual_seed(0)
image = pipe(**call, num_inference_steps=args.num_inference_steps, generator=generator).images[0]
for timestep in pipe.scheduler.timesteps.tolist():
    print(responsibility(pipe, timestep))
image.save("experts_samples.png")
