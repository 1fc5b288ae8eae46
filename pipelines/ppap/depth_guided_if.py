"""Generate an image for a prompt with the depth of a photograph: DeepFloyd-IF, whose stage I is guided by depth experts.
PPAP, https://arxiv.org/abs/2212.05973, section 5.3

python pipelines/ppap/depth_guided_if.py photo.png "a photo of a dog" --experts outputs/ppap_if_depth/experts

With the published experts, once they are converted (docs/guidance_training.md, "DeepFloyd-IF"):

python pipelines/ppap/depth_guided_if.py photo.png "a photo of a dog" --experts deepfloyd_midas --network midas
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_dmp import DepthTarget, GuidanceExperts, GuidedScheduler
from diffusers_dmp.training.data.images import center_crop, to_tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="photograph with the depth to ask for")
    parser.add_argument("prompt")
    parser.add_argument("--experts", default="outputs/ppap_if_depth/experts", help="folder of the experts")
    parser.add_argument(
        "--network", choices=["midas"], help="midas: the experts are the published ones, of MiDaS small from torch.hub"
    )
    parser.add_argument("--stage_1", default="DeepFloyd/IF-I-XL-v1.0")
    parser.add_argument("--stage_2", default="DeepFloyd/IF-II-L-v1.0", help="empty to stop at 64 x 64 pixels")
    parser.add_argument("--scale", type=float, default=40.0)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="depth_guided.png")
    args = parser.parse_args()

    network = torch.hub.load("intel-isl/MiDaS", "MiDaS_small") if args.network == "midas" else None
    experts = GuidanceExperts.from_pretrained(args.experts, network=network)
    photograph = to_tensor(center_crop(Image.open(args.image).convert("RGB"), 256))[None]  # (1, 3, 256, 256)
    with torch.no_grad():
        depth = experts(photograph, torch.tensor(0)).predicted_depth

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.stage_1, dtype=dtype).to(device)
    pipe.scheduler = GuidedScheduler(pipe.scheduler, experts, DepthTarget(depth), args.scale, rescale_to_mean=True)
    prompt_embeds, negative_embeds = pipe.encode_prompt(args.prompt)
    settings = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_embeds}
    settings |= {"num_inference_steps": args.num_inference_steps, "output_type": "pt"}
    generator = torch.Generator(device).manual_seed(args.seed)
    images = pipe(**settings, generator=generator).images
    if args.stage_2:
        enlarge = DiffusionPipeline.from_pretrained(args.stage_2, text_encoder=None, dtype=dtype).to(device)
        images = enlarge(image=images, **settings | {"num_inference_steps": 50}, generator=generator).images
    pixels = (images[0].float().clamp(-1, 1) + 1) * 127.5
    Image.fromarray(pixels.byte().permute(1, 2, 0).cpu().numpy()).save(args.output)


if __name__ == "__main__":
    main()
