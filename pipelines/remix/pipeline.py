"""For `DiffusionPipeline.from_pretrained(…, custom_pipeline="pipelines/remix", trust_remote_code=True)`: any repository with a
denoiser of Diffusers or of this package, such as facebook/DiT-XL-2-256, in this package's pipeline.
"""

from diffusers_dmp import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
