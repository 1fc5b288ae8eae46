"""The plain DiT: the published numbers, both weight layouts, and the ways to run it."""

import copy

import pytest
import torch
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_dmp import DiTModel, convert_checkpoint
from diffusers_dmp.models.dit import layers
from diffusers_dmp.models.dit.configuration import DIT_PRESETS
from diffusers_dmp.models.dit.layers import unpatchify


@pytest.fixture
def stock() -> DiTTransformer2DModel:
    """Diffusers' own DiT, with a copy of one embedder in every block, as in published checkpoints."""
    stock = randomised(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=2,
            sample_size=8,
            out_channels=8,
            num_embeds_ada_norm=10,
        )
    )
    for block in stock.transformer_blocks:
        block.norm1.emb.load_state_dict(stock.transformer_blocks[0].norm1.emb.state_dict())
    return stock


@pytest.mark.parametrize("case", ["mixed_t", "same_t"])
def test_matches_the_published_dit(case):
    vectors = Vectors("dit_tiny")
    model = convert_checkpoint("dit", vectors.state_dict, vectors.config)
    output = model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"], vectors[f"case.{case}.y"]).sample
    assert_matches(output, vectors[f"case.{case}.out"])


def test_starts_as_published(batch):
    model = DiTModel(**TINY_CONFIG)
    # adaLN-Zero: every block is the identity, and the output zero
    tokens, conditioning = torch.randn(2, 16, 48), torch.randn(2, 48)
    torch.testing.assert_close(model.transformer_blocks[0](tokens, conditioning), tokens)
    assert (model.eval()(**batch).sample == 0).all()  # products with zero are exact
    assert model.time_label_embed.class_embedder.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", DIT_PRESETS)
def test_presets_have_the_published_sizes(name):
    size, patch_size = name.removeprefix("DiT-").split("/")
    # Table 1 of the paper: layers, width, heads, and Table 4's parameters in millions (for 1000 classes)
    layers, width, heads = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}[size]
    millions = {"S": 33, "B": 130, "L": 458, "XL": 675}[size]
    with torch.device("meta"):
        model = DiTModel.from_preset(name)
    assert len(model.transformer_blocks) == layers
    assert model.config.num_attention_heads == heads
    assert model.config.num_attention_heads * model.config.attention_head_dim == width
    assert model.config.patch_size == int(patch_size)
    assert model.config.out_channels == 2 * model.config.in_channels
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="DiT-S/2, DiT-S/4.*DiT-M/2"):
        DiTModel.from_preset("DiT-M/2")


def test_equals_the_stock_model_under_its_semantics(stock, batch):
    model = DiTModel.from_diffusers(stock)
    assert (model.config.downscale_freq_shift, model.config.norm_eps) == (1.0, 1e-5)
    torch.testing.assert_close(model(**batch).sample, stock(**batch).sample, atol=2e-5, rtol=1e-4)


def test_a_stock_checkpoint_keeps_its_weights_both_ways(stock, batch, tmp_path):
    stock.save_pretrained(tmp_path)
    exported = DiTModel.from_diffusers(tmp_path).to_diffusers()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    torch.testing.assert_close(exported(**batch).sample, stock(**batch).sample)


def test_from_pretrained_knows_a_stock_checkpoint(stock, batch, tmp_path):
    stock.save_pretrained(tmp_path / "transformer")
    model = DiTModel.from_pretrained(tmp_path, subfolder="transformer")
    torch.testing.assert_close(model(**batch).sample, stock(**batch).sample, atol=2e-5, rtol=1e-4)
    for load in (DiTModel.from_pretrained, DiTModel.from_diffusers):  # never a model where a pair is asked for
        with pytest.raises(ValueError, match="no `output_loading_info` for a model of Diffusers' own class"):
            load(tmp_path, subfolder="transformer", output_loading_info=True)


def test_a_stock_model_keeps_its_own_eps(batch):
    stock = randomised(
        DiTTransformer2DModel(4, 12, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10, norm_eps=0.1)
    )
    model = DiTModel.from_diffusers(stock)
    torch.testing.assert_close(model(**batch).sample, stock(**batch).sample, atol=2e-5, rtol=1e-4)
    assert model.to_diffusers().config.norm_eps == 0.1


def test_the_residual_stream_keeps_float32_under_autocast(tiny_dit, batch):
    dtypes = []
    for block in tiny_dit.transformer_blocks:
        block.register_forward_hook(lambda block, args, output: dtypes.append(output.dtype))
        block.attn.register_forward_hook(lambda block, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tiny_dit(**batch)
    assert dtypes == [torch.bfloat16, torch.float32] * 2  # attention computes in half precision, the sum does not


def test_semantics_differ_at_equal_weights(stock, batch):
    stock_semantics = DiTModel.from_diffusers(stock)
    published = DiTModel(**TINY_CONFIG).eval()
    published.load_state_dict(stock_semantics.state_dict())
    difference = published(**batch).sample - stock_semantics(**batch).sample
    assert difference.norm() / stock_semantics(**batch).sample.norm() > 1e-3


def test_export_of_published_semantics_needs_one_line_more(tiny_dit, batch, tmp_path):
    with pytest.raises(ValueError, match="downscale_freq_shift.*approximate=True"):
        tiny_dit.to_diffusers()

    tiny_dit.to_diffusers(approximate=True).save_pretrained(tmp_path)
    stock = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert not torch.allclose(stock(**batch).sample, tiny_dit(**batch).sample, atol=1e-3)
    for block in stock.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(stock(**batch).sample, tiny_dit(**batch).sample, atol=2e-5, rtol=1e-4)


def test_export_of_a_model_without_null_class(batch):
    model = randomised(DiTModel(**TINY_CONFIG, class_dropout_prob=0.0, downscale_freq_shift=1.0, norm_eps=1e-5))
    batch["class_labels"] = batch["class_labels"].clamp(max=9)
    torch.testing.assert_close(model.to_diffusers()(**batch).sample, model(**batch).sample, atol=2e-5, rtol=1e-4)


def test_refuses_a_stock_model_whose_embedders_differ(stock):
    with torch.no_grad():
        stock.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight += 1
    with pytest.raises(ValueError, match="every block.*transformer_blocks.1"):
        DiTModel.from_diffusers(stock)


def test_position_embeddings_of_another_size_are_computed_once(tiny_dit, monkeypatch):
    embedding, original, sizes = tiny_dit.pos_embed, layers.get_2d_sincos_pos_embed, []

    def compute(dim, grid_size, **options):
        sizes.append(grid_size)
        return original(dim, grid_size, **options)

    monkeypatch.setattr(layers, "get_2d_sincos_pos_embed", compute)
    with torch.inference_mode():
        embedding(torch.zeros(1, 4, 12, 8))
    for height, width in [(12, 8), (8, 12), (8, 8), (8, 12)]:
        latent = torch.randn(2, 4, height, width)
        torch.testing.assert_close(embedding(latent), PatchEmbed.forward(embedding, latent))
    assert sizes == [(6, 4), (4, 6)]
    embedding(torch.randn(1, 4, 12, 8)).sum().backward()  # what was computed in inference mode serves training, too


def test_a_call_within_a_transform_leaves_nothing_behind(tiny_dit):
    """Tensors of `torch.func` stand for others, and can neither be copied nor used outside of it."""
    sample, inputs = torch.randn(1, 4, 6, 6), {"timestep": 5, "class_labels": torch.tensor([1])}
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivatives
        torch.func.jvp(lambda x: tiny_dit(x, **inputs).sample, (sample,), (sample,))
    torch.testing.assert_close(tiny_dit(sample, **inputs).sample, copy.deepcopy(tiny_dit)(sample, **inputs).sample)


@torch.no_grad()
def test_few_position_embeddings_are_kept_and_none_is_copied(tiny_dit):
    embedding = tiny_dit.pos_embed
    for height in range(2, 2 * embedding.MAX_TABLES + 12, 2):
        latents = torch.randn(1, 4, height, 4)
        torch.testing.assert_close(embedding(latents), PatchEmbed.forward(embedding, latents))
        assert len(embedding._tables) <= embedding.MAX_TABLES
    assert embedding._tables and not copy.deepcopy(embedding)._tables


@pytest.mark.parametrize("shared", [7, torch.tensor(7), torch.tensor([7]), torch.tensor(7).expand(4)])
def test_a_shared_timestep_may_be_given_in_many_ways(tiny_dit, batch, shared):
    per_sample = tiny_dit(**batch | {"timestep": torch.full((4,), 7)}).sample
    torch.testing.assert_close(tiny_dit(**batch | {"timestep": shared}).sample, per_sample, atol=1e-5, rtol=1e-4)


def test_labels_default_to_the_null_class(tiny_dit, batch):
    null = tiny_dit(**batch | {"class_labels": torch.full((4,), 10)}).sample
    assert torch.equal(tiny_dit(**batch | {"class_labels": None}).sample, null)


def test_label_dropout_in_training(tiny_dit, batch):
    null = tiny_dit(**batch | {"class_labels": None}).sample
    torch.testing.assert_close(tiny_dit(**batch, force_drop_ids=torch.ones(4, dtype=torch.bool)).sample, null)

    embedder = tiny_dit.time_label_embed.train()
    torch.manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    dropped = (embedder(torch.zeros(1), labels) != embedder(torch.zeros(1), labels, torch.zeros(2000).bool())).any(1)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (4, 16)])
def test_other_sizes_and_channels(channels, height, width):
    model = randomised(DiTModel(**TINY_CONFIG | {"in_channels": channels, "out_channels": None}))
    output = model(torch.randn(2, channels, height, width), 5, torch.tensor([0, 1])).sample
    assert output.shape == (2, channels, height, width)


def test_unpatchify_is_the_inverse_of_patchify():
    image = torch.randn(2, 3, 4, 6)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, H/p, W/p, p, p)
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(tokens, 4, 6, 2), image)


@torch.no_grad()
def test_loaded_in_half_precision(tiny_dit, batch, tmp_path):
    """The position embeddings, which are computed and not loaded, stay in float32."""
    tiny_dit.save_pretrained(tmp_path)
    loaded = DiTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batch["hidden_states"] = batch["hidden_states"].bfloat16()
    output = loaded(**batch).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, copy.deepcopy(tiny_dit).bfloat16()(**batch).sample, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_dit, batch, dtype):
    expected = tiny_dit(**batch).sample
    batch["hidden_states"] = batch["hidden_states"].to(dtype)
    output = copy.deepcopy(tiny_dit).to(dtype)(**batch).sample
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.03


def test_attention_backends_agree(tiny_dit, batch):
    expected = tiny_dit(**batch).sample
    try:
        tiny_dit.set_attention_backend("_native_math")
        assert all(block.attn.processor._attention_backend == "_native_math" for block in tiny_dit.transformer_blocks)
        torch.testing.assert_close(tiny_dit(**batch).sample, expected, atol=1e-5, rtol=1e-4)
    finally:
        tiny_dit.set_attention_backend("native")  # the choice is global


@pytest.mark.parametrize(
    "change, message",
    [
        ({"class_labels": torch.tensor([0, 1, 2, 11])}, r"class_labels.*\[0, 11\).*11"),
        ({"class_labels": torch.tensor([0, 1, 2, -1])}, "class_labels"),
        ({"timestep": torch.tensor([0, 1, 2, 1000])}, "timestep.*1000 training timesteps.*1000"),
        ({"hidden_states": torch.zeros(4, 4, 7, 8)}, "patch_size.*2.*7 x 8"),
        ({"hidden_states": torch.zeros(4, 3, 8, 8)}, "4 channels.*3"),
    ],
)
def test_refuses_bad_input(tiny_dit, batch, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit(**batch | change)


def test_needs_labels_without_a_null_class(batch):
    model = DiTModel(**TINY_CONFIG, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="class_labels.*no null class"):
        model(**batch | {"class_labels": None})


@pytest.mark.parametrize(
    "config, name",
    [
        ({"num_layers": 0}, "num_layers"),
        ({"patch_size": 3}, "sample_size"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
        ({"attention_head_dim": 3, "num_attention_heads": 1}, "width"),
    ],
)
def test_refuses_a_bad_configuration(config, name):
    with pytest.raises(ValueError, match=name):
        DiTModel(**TINY_CONFIG | config)
