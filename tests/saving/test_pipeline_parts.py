"""Saved pipelines of which some components alone are loaded."""

from tiny_pipelines import wan, wan_pipe

from diffusers_dmp.saving.pipeline_parts import load_components, saved_class


def test_optional_components_are_left_out_as_well(tmp_path):
    """Diffusers' own `DiffusionPipeline.from_pretrained(…, transformer=None)` loads the transformer of Wan."""
    pipeline = wan_pipe(wan(), transformer_2=wan(seed=1), boundary_ratio=0.875)
    pipeline.save_pretrained(tmp_path)
    assert saved_class(pipeline.config) is type(pipeline) and saved_class({"_class_name": "OfNobody"}) is None
    for wanted in ("transformer", "transformer_2", "scheduler"):
        parts = load_components(str(tmp_path), wanted.__eq__)
        loaded = [name for name, component in parts.components.items() if component is not None]
        assert (type(parts), loaded) == (type(pipeline), [wanted])
    other = load_components(str(tmp_path), {"transformer"}.__contains__, scheduler=pipeline.scheduler)
    assert other.scheduler is pipeline.scheduler and other.config.boundary_ratio == 0.875
