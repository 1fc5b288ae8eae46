"""Remix-DiT: the published numbers, experts that equal plain DiTs, saved intervals, and fused weights that are never out of date."""

import copy
import io
import json

import pytest
import torch
from accelerate import cpu_offload
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import AutoModel, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dmp import DiTModel, RemixDiTModel, convert_checkpoint, to_diffusers_experts
from diffusers_dmp.models.remix_dit import REMIX_DIT_PRESETS
from diffusers_dmp.models.remix_layers import BasisLinear, Mix

REMIX_CONFIG = TINY_CONFIG | {"num_bases": 3, "num_experts": 7}  # 7 does not divide 1000


@pytest.fixture
def tiny_remix() -> RemixDiTModel:
    return randomised(RemixDiTModel(**REMIX_CONFIG))


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """
    Compare outputs of two computations that round differently.

    A rounding error is relative to the largest summand, not to the sum, so that the tolerance is relative to the largest
    output: 192 (the longest sum, 4·D) times float32's eps.
    """
    atol = 192 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def expert_batch(model: RemixDiTModel, expert: int, batch: dict) -> dict:
    """The batch at the first, the last and two more timesteps of an expert."""
    low, high = model.intervals.edges[expert : expert + 2]
    return batch | {"timestep": torch.tensor([low, high - 1, (low + high) // 2, low + 1])}


# Outputs


@pytest.mark.parametrize("case", ["expert0", "expert3", "expert7"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_matches_the_published_remix_dit(case, with_gradients):
    vectors = Vectors("remix_tiny")
    model = convert_checkpoint("remix", vectors.state_dict, vectors.config)
    with torch.set_grad_enabled(with_gradients):
        output = model(vectors[f"case.{case}.x"], vectors[f"case.{case}.t"], vectors[f"case.{case}.y"]).sample
    assert_matches(output, vectors[f"case.{case}.out"])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_every_sample_gets_the_expert_of_its_own_timestep(with_gradients):
    """The published code averages the experts over the batch (`case.batch_mean`), which is wrong for each of them."""
    vectors = Vectors("remix_tiny")
    model = convert_checkpoint("remix", vectors.state_dict, vectors.config)
    sample, timestep, labels = (vectors[f"case.batch_mean.{name}"] for name in "xty")
    order = torch.tensor([2, 0, 3, 1, 0])  # not sorted by expert, and one of them twice
    with torch.set_grad_enabled(with_gradients):
        together = model(sample[order], timestep[order], labels[order]).sample
        for i, which in enumerate(order):
            own = slice(which, which + 1)
            alone = model(sample[own], timestep[own], labels[own]).sample
            assert_equal_up_to_rounding(together[i : i + 1], alone)
    assert (together[1] - vectors["case.batch_mean.out"][0]).abs().max() > 1e-2


def test_dropped_labels_follow_their_samples(tiny_remix, batch):
    drop = torch.tensor([True, False, False, True])
    reverse = {name: value.flip(0) for name, value in batch.items()}
    output = tiny_remix(**batch, force_drop_ids=drop).sample
    assert not torch.allclose(output, tiny_remix(**batch).sample)
    assert_equal_up_to_rounding(tiny_remix(**reverse, force_drop_ids=drop.flip(0)).sample.flip(0), output)


def test_one_basis_is_the_plain_dit(tiny_dit, batch):
    model = RemixDiTModel.from_dit(tiny_dit, num_bases=1, num_experts=8)
    assert_equal_up_to_rounding(model(**batch).sample, tiny_dit(**batch).sample)


@pytest.mark.parametrize("num_bases, num_experts", [(4, 8), (4, 20), (3, 7)])
def test_every_expert_starts_as_the_dit(tiny_dit, batch, num_bases, num_experts):
    model = RemixDiTModel.from_dit(tiny_dit, num_bases, num_experts)
    assert not model.training
    for expert in range(num_experts):
        inputs = expert_batch(model, expert, batch)
        assert_equal_up_to_rounding(model(**inputs).sample, tiny_dit(**inputs).sample)


def test_from_a_stock_dit(batch):
    stock = randomised(
        DiTTransformer2DModel(4, 12, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10)
    )
    for model in (
        RemixDiTModel.from_dit(stock, 2, 5),
        RemixDiTModel.from_diffusers(stock, num_bases=2, num_experts=5),
    ):
        assert (model.config.num_bases, model.config.num_experts) == (2, 5)
        assert (model.config.downscale_freq_shift, model.config.norm_eps) == (1.0, 1e-5)
        torch.testing.assert_close(model(**batch).sample, stock(**batch).sample, atol=2e-5, rtol=1e-4)


def test_from_an_original_checkpoint():
    vectors = Vectors("dit_tiny")
    model = RemixDiTModel.from_dit(convert_checkpoint("dit", vectors.state_dict, vectors.config))
    output = model(vectors["case.mixed_t.x"], vectors["case.mixed_t.t"], vectors["case.mixed_t.y"]).sample
    assert_matches(output, vectors["case.mixed_t.out"])


def test_coefficients_start_at_the_prior_and_noise():
    torch.manual_seed(0)
    logits = torch.stack([RemixDiTModel(**TINY_CONFIG, num_bases=4, num_experts=8).mixing_logits for _ in range(300)])
    prior = torch.eye(4).repeat_interleave(2, 0)  # basis ⌊i·4/8⌋
    torch.testing.assert_close(logits.mean(0), 3 * prior, atol=0.25, rtol=0)
    assert logits.std(0).mean().item() == pytest.approx(1, abs=0.03)


def test_prior_loss(tiny_remix):
    coefficients = tiny_remix.mixing_coefficients
    assert coefficients.shape == (7, 3)
    torch.testing.assert_close(coefficients.sum(1), torch.ones(7))
    prior = torch.tensor([0, 0, 0, 1, 1, 2, 2])  # ⌊i·3/7⌋
    expected = -coefficients.log()[torch.arange(7), prior].mean()
    torch.testing.assert_close(tiny_remix.prior_loss(), expected)


def test_prior_loss_comes_with_the_output_in_training(tiny_remix, batch):
    assert tiny_remix(**batch).prior_loss is None
    assert len(tiny_remix(**batch, return_dict=False)) == 1
    torch.testing.assert_close(tiny_remix.train()(**batch).prior_loss, tiny_remix.prior_loss())


@pytest.mark.parametrize("name", REMIX_DIT_PRESETS)
def test_presets_are_the_dits(name):
    with torch.device("meta"):
        model = RemixDiTModel.from_preset(name, num_bases=2)
        plain = DiTModel.from_preset(name.removeprefix("Remix"))
    mixed = sum(parameter.numel() for linear in model.basis_linears for parameter in linear.parameters())
    assert model.num_parameters() == plain.num_parameters() + mixed // 2 + 8 * 2


# Mixing


@given(
    num_bases=st.integers(1, 4), num_groups=st.integers(1, 3), shape=st.tuples(st.integers(1, 3), st.integers(1, 3))
)
def test_gradients_of_mixing(num_bases, num_groups, shape):
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(num_groups, num_bases, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(num_bases, *shape, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(num_bases, shape[0], generator=generator, dtype=torch.float64, requires_grad=True),
    )
    weights, biases = Mix.apply(*inputs)
    torch.testing.assert_close(weights, torch.einsum("gk,kpq->gpq", inputs[0], inputs[1]))
    torch.testing.assert_close(biases, inputs[0] @ inputs[2])
    assert torch.autograd.gradcheck(Mix.apply, inputs)


class Allocations(TorchDispatchMode):
    """Record the number of elements of every tensor that is allocated; views are not."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in known}
        self.known = set(self.tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            # keeps it alive, so that no other tensor gets its address
            self.tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return output

    @property
    def sizes(self) -> list[int]:
        return [tensor.numel() for pointer, tensor in self.tensors.items() if pointer not in self.known]


def test_mixing_makes_no_scaled_copies_of_the_bases():
    linear = BasisLinear(8, 20, 30)
    linear.reset_parameters()
    coefficients = torch.full((1, 8), 1 / 8, requires_grad=True)
    with Allocations(*linear.parameters()) as forward, torch.autocast("cpu", torch.bfloat16):
        weights, biases = linear.mix(coefficients)
    assert max(forward.sizes) == 20 * 30
    assert weights.dtype == torch.float32  # autocast would have copied the bases, too
    gradients = torch.randn_like(weights), torch.randn_like(biases)
    with Allocations(*linear.parameters(), *gradients) as backward:
        torch.autograd.backward((weights, biases), gradients)
    assert [size for size in backward.sizes if size >= 20 * 30] == [8 * 20 * 30]  # the gradient itself


def test_frozen_bases_get_no_gradient():
    linear = BasisLinear(8, 20, 30).requires_grad_(False)
    linear.reset_parameters()
    coefficients = torch.full((1, 8), 1 / 8, requires_grad=True)
    weights, biases = linear.mix(coefficients)
    gradients = torch.randn_like(weights), torch.randn_like(biases)
    with Allocations(*linear.parameters(), *gradients) as backward:
        torch.autograd.backward((weights, biases), gradients)
    assert max(backward.sizes) < 20 * 30
    expected = torch.stack(
        [(w * gradients[0]).sum() + (b * gradients[1]).sum() for w, b in zip(linear.weight, linear.bias)]
    )
    torch.testing.assert_close(coefficients.grad[0], expected)


def test_gradients_reach_bases_and_coefficients_of_the_experts_at_work(tiny_remix, batch):
    """The gradient of a batch of several experts is the mean of its samples' gradients, computed with plain DiTs."""
    tiny_remix(**batch).sample.square().mean().backward()
    experts = tiny_remix.intervals.index(batch["timestep"]).tolist()  # 0, 1, 4, 6
    name = "transformer_blocks.1.ff.net.2.weight"
    coefficients = tiny_remix.mixing_coefficients.detach()
    expected, shared = 0, 0
    for i, expert in enumerate(experts):
        baked = tiny_remix.bake_expert(expert)
        own = {key: value[i : i + 1] for key, value in batch.items()}
        (baked(**own).sample.square().mean() / 4).backward()
        expected = expected + coefficients[expert][:, None, None] * baked.get_parameter(name).grad
        shared = shared + baked.proj_out_2.weight.grad
    torch.testing.assert_close(tiny_remix.get_parameter(name).grad, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tiny_remix.proj_out_2.weight.grad, shared, atol=1e-6, rtol=1e-4)
    at_work = tiny_remix.mixing_logits.grad.abs().sum(1) > 0
    assert at_work.nonzero().flatten().tolist() == experts


def test_gradient_checkpointing_changes_no_gradient(tiny_remix, batch):
    other = copy.deepcopy(tiny_remix)
    other.enable_gradient_checkpointing()
    for model in (tiny_remix, other):
        model.train()
        drop = torch.zeros(4, dtype=torch.bool)
        outputs = [model(**expert_batch(model, expert, batch), force_drop_ids=drop).sample for expert in (1, 5)]
        sum(output.square().mean() for output in outputs).backward()  # two experts' graphs at once
    for plain, checkpointed in zip(tiny_remix.parameters(), other.parameters()):
        torch.testing.assert_close(checkpointed.grad, plain.grad, atol=1e-7, rtol=1e-5)


# Fused weights in sampling


@pytest.fixture
def mixings(monkeypatch) -> list[torch.Tensor]:
    """Record the coefficients of every fused mixture of a layer."""
    calls, original = [], BasisLinear.fuse

    def fuse(linear, coefficients):
        calls.append(coefficients)
        return original(linear, coefficients)

    monkeypatch.setattr(BasisLinear, "fuse", fuse)
    return calls


NUM_LINEARS = 4 * TINY_CONFIG["num_layers"]


@torch.no_grad()
def test_mixes_once_per_expert(tiny_remix, batch, mixings):
    edges = tiny_remix.intervals.edges
    expected = [tiny_remix.bake_expert(expert) for expert in range(7)]
    for timestep in range(999, -1, -30):
        inputs = batch | {"timestep": torch.tensor(timestep).expand(4)}
        output = tiny_remix(**inputs).sample
        plain = expected[sum(timestep >= edge for edge in edges[1:])]
        assert_equal_up_to_rounding(output, plain(**inputs).sample)
    assert len(mixings) == 7 * NUM_LINEARS


@torch.no_grad()
def test_one_fused_copy(tiny_remix, batch, mixings):
    for timestep in (999, 999, 0, 999):
        tiny_remix(**batch | {"timestep": timestep})
        fused = [tensor for linear in tiny_remix.basis_linears for tensor in linear._fused]
        bases = [tensor for linear in tiny_remix.basis_linears for tensor in linear.parameters()]
        assert sum(map(torch.numel, fused)) == sum(map(torch.numel, bases)) / 3
    assert len(mixings) == 3 * NUM_LINEARS
    assert not any("fused" in name for name in tiny_remix.state_dict())
    sizes = []
    for model in (tiny_remix, tiny_remix.eval()):  # `eval` drops the fused copy
        torch.save(model, buffer := io.BytesIO())
        sizes.append(buffer.tell())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@torch.no_grad()
def test_fused_weights_stay_where_they_are(tiny_remix, batch):
    """A CUDA graph reads them at the addresses that they had when it was captured."""

    def fused() -> list[torch.Tensor]:
        return [tensor for linear in tiny_remix.basis_linears for tensor in linear._fused]

    with torch.inference_mode():  # a tensor that is made there can be changed there alone
        tiny_remix.fuse_expert(6)
    assert not any(tensor.is_inference() for tensor in fused())
    before = [tensor.data_ptr() for tensor in fused()]
    for expert in (3, 0, 6):
        with Allocations(*tiny_remix.parameters(), *fused()) as switching:
            tiny_remix.fuse_expert(expert)
        assert max(switching.sizes) <= tiny_remix.mixing_logits.numel()
        assert [tensor.data_ptr() for tensor in fused()] == before
        inputs = expert_batch(tiny_remix, expert, batch)
        assert_equal_up_to_rounding(tiny_remix(**inputs).sample, tiny_remix.bake_expert(expert)(**inputs).sample)


@torch.no_grad()
def test_an_interrupted_change_of_experts_leaves_no_mixture_of_both(tiny_remix, batch, monkeypatch):
    """Such as by Ctrl-C in a notebook: some layers have the weights of the new expert then, and others those of the old one."""
    expected = tiny_remix(**batch | {"timestep": 999}).sample
    last, original = tiny_remix.basis_linears[-1], BasisLinear.fuse

    def fuse(linear, coefficients):
        if linear is last:
            raise KeyboardInterrupt
        original(linear, coefficients)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BasisLinear, "fuse", fuse)
        tiny_remix(**batch | {"timestep": 0})
    torch.testing.assert_close(tiny_remix(**batch | {"timestep": 999}).sample, expected)


@torch.no_grad()
def test_fusing_ahead_and_unfusing(tiny_remix, batch, mixings):
    inputs = batch | {"timestep": 999}
    with torch.enable_grad():
        assert tiny_remix.fuse_expert(6)
    assert not any(tensor.requires_grad for linear in tiny_remix.basis_linears for tensor in linear._fused)
    before = tiny_remix(**inputs).sample
    assert len(mixings) == NUM_LINEARS  # the call found expert 6 fused
    tiny_remix(**batch | {"timestep": 0})  # another expert's timestep gets that expert's weights
    assert len(mixings) == 2 * NUM_LINEARS

    tiny_remix(**inputs)
    for parameter in tiny_remix.parameters():
        parameter.data.mul_(2)  # which PyTorch does not count
    tiny_remix.unfuse_expert()
    assert not any(linear.is_fused for linear in tiny_remix.basis_linears)
    after = tiny_remix(**inputs).sample
    assert not torch.allclose(after, before, atol=1e-4)
    assert_equal_up_to_rounding(after, tiny_remix.bake_expert(6)(**inputs).sample)


def test_a_layer_is_fused_before_it_is_called(tiny_remix):
    with pytest.raises(RuntimeError, match="to be fused, or to be called within `mixing`"):
        tiny_remix.basis_linears[0](torch.zeros(1, 1, 48))


def optimizer_step(model):
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(torch.ones(1, 4, 8, 8), 7).sample.square().mean().backward()
        optimizer.step()


def load(model):
    model.load_state_dict(randomised(copy.deepcopy(model), seed=1).state_dict())


def assign(model):
    model.load_state_dict(randomised(copy.deepcopy(model), seed=1).state_dict(), assign=True)


def change_in_place(model):
    model.basis_linears[-1].bias.add_(1)


def change_coefficients(model):
    model.mixing_logits.mul_(-1)


def replace(model):
    linear = model.basis_linears[0]
    for factor in (2, -1):  # twice, so that the second may get the address of the first
        linear.weight = torch.nn.Parameter(factor * linear.weight)


def replace_storage(model):
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(2 * flat, model.parameters())  # through `.data`


def replace_block(model):
    used = copy.deepcopy(model.transformer_blocks[0])
    used.basis_linears[0].weight.mul_(-1)
    model.transformer_blocks[1] = used


def average(model):
    ema = EMAModel(randomised(copy.deepcopy(model), seed=1).parameters())
    ema.copy_to(model.parameters())  # through `.data`
    model.eval()


def to_double_and_back(model):
    model.basis_linears[0].weight.data.mul_(2)
    model.double().float()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load,
        assign,
        change_in_place,
        change_coefficients,
        replace,
        replace_storage,
        replace_block,
        average,
        to_double_and_back,
    ],
    ids=lambda change: change.__name__,
)
@torch.no_grad()
def test_other_weights_are_fused_again(tiny_remix, batch, change):
    inputs = batch | {"timestep": torch.tensor(7).expand(4)}
    before = tiny_remix(**inputs).sample
    change(tiny_remix)
    after = tiny_remix(**inputs).sample
    assert not torch.allclose(after, before, atol=1e-4)
    assert_equal_up_to_rounding(after, copy.deepcopy(tiny_remix)(**inputs).sample)
    assert_equal_up_to_rounding(after, tiny_remix.bake_expert(0)(**inputs).sample)


def test_fuses_under_inference_mode_too(tiny_remix, batch, mixings):
    inputs = batch | {"timestep": 7}
    with torch.inference_mode():
        model = copy.deepcopy(tiny_remix)  # its parameters are inference tensors
        expected = [model(**inputs).sample for _ in range(2)][1]
        assert len(mixings) == NUM_LINEARS
        load(model)
        assert_equal_up_to_rounding(model(**inputs).sample, copy.deepcopy(model)(**inputs).sample)
        tiny_remix(**inputs)
    with torch.no_grad():
        assert_equal_up_to_rounding(tiny_remix(**inputs).sample, expected)
    assert_equal_up_to_rounding(tiny_remix(**inputs).sample, expected)  # with gradients


@torch.no_grad()
def test_replaced_tensors_are_noticed(tiny_remix, batch):
    """Python gives the id of a deleted object to a new one."""
    name = "transformer_blocks.0.attn.to_qkv.weight"
    weight = tiny_remix.get_parameter(name).clone()
    for scale in range(20):
        inputs = ({name: scale * weight}, (batch["hidden_states"], 7, batch["class_labels"]))
        output = torch.func.functional_call(tiny_remix, *inputs).sample
        tiny_remix.get_parameter(name).copy_(scale * weight)
        expected = tiny_remix.bake_expert(0)(**batch | {"timestep": 7}).sample
        assert_equal_up_to_rounding(output, expected)


@pytest.mark.parametrize("timestep", [7, [3, 250, 600, 999]])
@torch.no_grad()
def test_offloaded_weights_are_mixed_in_every_call(tiny_remix, batch, timestep):
    inputs = batch | {"timestep": torch.tensor(timestep)}
    expected = tiny_remix(**inputs).sample
    offloaded = cpu_offload(copy.deepcopy(tiny_remix), torch.device("cpu"))  # weights on "meta" between the calls
    assert offloaded.basis_linears[0].weight.is_meta
    for _ in range(2):
        assert_equal_up_to_rounding(offloaded(**inputs).sample, expected)


# Export, and saving


def test_a_baked_expert_equals_the_model_on_its_timesteps(tiny_remix, batch):
    for expert in range(7):
        baked = tiny_remix.bake_expert(expert)
        assert type(baked) is DiTModel and not baked.training
        inputs = expert_batch(tiny_remix, expert, batch)
        assert_equal_up_to_rounding(baked(**inputs).sample, tiny_remix(**inputs).sample)


def test_experts_as_stock_models(batch, tmp_path):
    model = randomised(RemixDiTModel(**REMIX_CONFIG, downscale_freq_shift=1.0, norm_eps=1e-5))
    paths = to_diffusers_experts(model, tmp_path)
    assert [path.name for path in paths] == [f"expert_{expert}" for expert in range(7)]
    for expert, path in enumerate(paths):
        stock = DiTTransformer2DModel.from_pretrained(path)
        inputs = expert_batch(model, expert, batch)
        torch.testing.assert_close(stock(**inputs).sample, model(**inputs).sample, atol=2e-5, rtol=1e-4)
    assert '"edges": [\n    0,\n    142,' in (tmp_path / "experts.json").read_text()


def test_stock_experts_of_the_published_semantics_are_approximate(tiny_remix, tmp_path):
    with pytest.raises(ValueError, match="approximate=True"):
        to_diffusers_experts(tiny_remix, tmp_path)
    assert len(to_diffusers_experts(tiny_remix, tmp_path, approximate=True)) == 7
    with pytest.raises(ValueError, match="bake_expert"):
        tiny_remix.to_diffusers()


@pytest.mark.parametrize("loader", [RemixDiTModel, AutoModel])
def test_round_trip(tiny_remix, batch, tmp_path, loader):
    tiny_remix.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is RemixDiTModel
    assert loaded.intervals == tiny_remix.intervals
    assert dict(loaded.config).items() >= {"num_bases": 3, "num_experts": 7}.items()
    assert all(map(torch.equal, loaded.parameters(), tiny_remix.parameters()))
    assert_equal_up_to_rounding(loaded(**batch).sample, tiny_remix(**batch).sample)


# Intervals


def test_the_edges_are_saved(tiny_remix, tmp_path):
    # ⌊1000/7⌋ = 142 timesteps each, and the last one the rest; PPAP's rounding would give 857 for 852
    edges = [0, 142, 284, 426, 568, 710, 852, 1000]
    assert tiny_remix.config.interval_edges == edges
    tiny_remix.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["interval_edges"] == edges


def test_odd_edges_survive_a_checkpoint_and_decide(tiny_dit, batch, tmp_path):
    edges = [0, 0.5, 599.25, 999.5, 1000]
    model = RemixDiTModel.from_dit(tiny_dit, num_bases=2, num_experts=4, interval_edges=edges)
    randomised(model).save_pretrained(tmp_path)
    loaded = RemixDiTModel.from_pretrained(tmp_path)
    assert loaded.config.interval_edges == edges and loaded.intervals.edges == tuple(edges)
    assert type(loaded).from_config(loaded.config).intervals == loaded.intervals
    with torch.no_grad():
        for timestep, expert in ((0, 0), (1, 1), (599, 1), (599.25, 2), (600, 2), (999, 2), (999.5, 3), (1000.0, 3)):
            inputs = batch | {"timestep": torch.tensor(timestep)}
            assert_equal_up_to_rounding(loaded(**inputs).sample, loaded.bake_expert(expert)(**inputs).sample)


def test_configurations_of_0_1_0_have_no_edges(tiny_remix, tmp_path):
    tiny_remix.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["interval_edges"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = RemixDiTModel.from_pretrained(tmp_path)
    assert loaded.intervals == tiny_remix.intervals
    assert loaded.config.interval_edges == tiny_remix.config.interval_edges


# Precision and compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_half_precision(tiny_remix, batch, dtype, mixed):
    if not mixed:
        batch["timestep"] = torch.tensor(700).expand(4)
    expected = tiny_remix(**batch).sample
    batch["hidden_states"] = batch["hidden_states"].to(dtype)
    output = copy.deepcopy(tiny_remix).to(dtype)(**batch).sample
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_autocast(tiny_remix, batch, mixed):
    if not mixed:
        batch["timestep"] = torch.tensor(700).expand(4)
    expected, dtypes = tiny_remix(**batch).sample, set()
    for linear in tiny_remix.basis_linears:
        linear.register_forward_hook(lambda linear, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_remix(**batch).sample
    assert dtypes == {torch.bfloat16}
    assert (output.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("timestep", ["mixed", "shared", "expert"])
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_without_a_graph_break(tiny_remix, batch, timestep, with_gradients):
    if timestep == "shared":
        batch["timestep"] = torch.tensor(700).expand(4)
    elif timestep == "expert":
        batch = expert_batch(tiny_remix, 5, batch) | {"expert": 5}
    with torch.set_grad_enabled(with_gradients):
        expected = tiny_remix(**batch).sample
        compiled = torch.compile(tiny_remix, fullgraph=True, backend="eager")
        assert_equal_up_to_rounding(compiled(**batch).sample, expected)


@torch.no_grad()
def test_repeated_blocks_compile_once_for_all_experts(tiny_remix, batch, mixings):
    torch._dynamo.reset()
    experts = [batch | {"timestep": torch.tensor(timestep).expand(4)} for timestep in range(999, -1, -100)]
    expected = [tiny_remix(**inputs).sample for inputs in experts]
    tiny_remix.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = [tiny_remix(**inputs).sample for inputs in experts]
    for output, eager in zip(outputs, expected):
        assert_equal_up_to_rounding(output, eager)
    assert len(mixings) == 2 * 7 * NUM_LINEARS  # fused once per expert here, too


# Bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_bases": 0}, "num_bases. to be at least 1, but got 0"),
        ({"num_experts": 0}, "num_experts. to be between 1 and the 1000.*got 0"),
        ({"num_experts": 1001}, "num_experts.*1001"),
        ({"interval_edges": [0, 500, 1000]}, "interval_edges.*1000 training timesteps among 8 experts.*500"),
        ({"num_experts": 2, "interval_edges": [0, 500, 999]}, "1000 training timesteps among 2 experts.*999"),
        ({"num_experts": 2, "interval_edges": [0, 1000, 500]}, "ascend"),
    ],
)
def test_refuses_a_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        RemixDiTModel(**TINY_CONFIG | config)


def test_warns_of_more_bases_than_experts(batch):
    with pytest.warns(UserWarning, match="4 for 2"):
        model = RemixDiTModel(**TINY_CONFIG, num_bases=4, num_experts=2)
    assert model.prior.tolist() == [0, 2]
    assert model.eval()(**batch).sample.shape == (4, 8, 8, 8)


def test_refuses_a_dit_of_another_size_by_the_first_weight():
    stock = DiTModel(**TINY_CONFIG, downscale_freq_shift=1.0).to_diffusers()
    with pytest.raises(ValueError, match=r"'pos_embed.proj.weight' in `model`.*\(96, 4, 2, 2\).*\(48, 4, 2, 2\)"):
        RemixDiTModel.from_dit(stock, num_attention_heads=8)
    with pytest.raises(ValueError, match="`model` to hold 'transformer_blocks.2"):
        RemixDiTModel.from_dit(stock, num_layers=3)
    with pytest.raises(ValueError, match="`model` to hold.*got 'transformer_blocks.1"):
        RemixDiTModel.from_dit(stock, num_layers=1)


def test_refuses_models_that_are_no_plain_dit(tiny_dtr):
    with pytest.raises(ValueError, match="plain DiT.*DTRTransformer2DModel"):
        RemixDiTModel.from_dit(tiny_dtr)


@pytest.mark.parametrize("expert", [-1, 7])
def test_refuses_unknown_experts(tiny_remix, batch, expert):
    with pytest.raises(ValueError, match=rf"`expert` to be in \[0, 7\), but got {expert}"):
        tiny_remix.bake_expert(expert)
    with pytest.raises(ValueError, match="expert"):
        tiny_remix(**batch, expert=expert)
    with pytest.raises(ValueError, match="expert"):
        tiny_remix.fuse_expert(expert)


@pytest.mark.parametrize("timestep", [-1, 1000, [0, 1, 2, 1000]])
def test_refuses_timesteps_out_of_range(tiny_remix, batch, timestep):
    with pytest.raises(ValueError, match="timestep.*1000 training timesteps"):
        tiny_remix(**batch | {"timestep": torch.tensor(timestep)})


def test_refuses_another_number_of_timesteps(tiny_remix, tiny_dit, batch):
    for model in (tiny_remix, tiny_dit):
        with pytest.raises(ValueError, match="timestep. to be one or 4, but got 3"):
            model(**batch | {"timestep": torch.tensor([3, 250, 999])})


def test_arguments_are_the_dits_by_position_too(tiny_remix, batch):
    output = tiny_remix(*batch.values(), None, False)
    assert torch.equal(output[0], tiny_remix(**batch).sample)


def test_refuses_timesteps_of_another_expert(tiny_remix, batch):
    with pytest.raises(ValueError, match="to belong to `expert` 0.*250"):
        tiny_remix(**batch, expert=0)
