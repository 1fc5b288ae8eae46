"""For `DiffusionPipeline.from_pretrained(…, custom_pipeline="pipelines/patch_diffusion", trust_remote_code=True)`: a repository
whose denoisers lie in `denoiser_0`, `denoiser_1`, …
"""

from diffusers_dmp import SNRSplitPipeline

__all__ = ["SNRSplitPipeline"]
