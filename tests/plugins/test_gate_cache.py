"""Gates are computed once for the same timesteps and labels, as long as nothing else changes."""

import copy

import torch
from prompted import count_gatings

from diffusers_dmp import PromptPatch

pytest_plugins = ["prompted_fixtures"]


@torch.no_grad()
def test_gates_are_cached_by_timestep_and_label(patched_dit, batch):
    computed = count_gatings(PromptPatch.attached_to(patched_dit))
    first = patched_dit(**batch).sample
    assert torch.equal(patched_dit(**{name: value.clone() for name, value in batch.items()}).sample, first)
    assert len(computed) == 1
    for change in ({"timestep": torch.tensor([3, 250, 600, 998])}, {"class_labels": torch.tensor([0, 4, 9, 9])},
                   {"force_drop_ids": torch.tensor([True, False, False, False])}):  # fmt: skip
        patched_dit(**batch | change)
        patched_dit(**batch | change)
    assert len(computed) == 4


@torch.no_grad()
def test_the_cache_is_cleared_when_weights_change(patched_dit, batch):
    patch = PromptPatch.attached_to(patched_dit)

    def changed() -> None:
        """The output is the one without cached gates, not the one before."""
        nonlocal before
        after = patched_dit(**batch).sample
        torch.testing.assert_close(after, copy.deepcopy(patched_dit)(**batch).sample)  # a copy's cache is empty
        assert (after - before).abs().max() > 1e-3
        before = after

    before = patched_dit(**batch).sample
    patch.gate_proj.weight[0].add_(0.1)
    changed()
    patched_dit.time_label_embed.class_embedder.weight.mul_(2)
    changed()
    patch.load_state_dict({name: 2 * value for name, value in patch.state_dict().items()})
    changed()
    patch.gate_proj.weight.data[1].add_(0.1)  # which PyTorch does not count
    patch.eval()
    changed()


def test_gates_are_not_cached_in_training(patched_dit, batch):
    patch = PromptPatch.attached_to(patched_dit)
    computed = count_gatings(patch)
    for _ in range(2):
        patched_dit(**batch).sample.sum().backward()  # in eval mode, with gradients
    patch.train()
    with torch.no_grad():
        patched_dit(**batch)
        patched_dit(**batch)
    assert len(computed) == 4


@torch.no_grad()
def test_the_cache_is_bounded_in_bytes(patched_dit, batch, monkeypatch):
    monkeypatch.setattr("diffusers_dmp.plugins.gate_cache.MAX_CACHED_BYTES", 10 * 2 * 4 * 16 * 4)  # ten of (L, B, M)
    computed = count_gatings(PromptPatch.attached_to(patched_dit))
    for timestep in [*range(12), 11, 2, 1]:
        patched_dit(**batch | {"timestep": torch.tensor(timestep)})
    assert len(computed) == 13  # 0 and 1 had been dropped, 2 to 11 were cached


@torch.no_grad()
def test_the_cache_depends_on_precision_and_mode(patched_dit, batch):
    computed = count_gatings(PromptPatch.attached_to(patched_dit))
    plain = patched_dit(**batch).sample
    with torch.autocast("cpu", torch.bfloat16):
        patched_dit(**batch)
    assert torch.equal(patched_dit(**batch).sample, plain)
    assert len(computed) == 3  # again in another precision, and again in the first
    patched_dit.train()  # labels are dropped at random
    patched_dit(**batch)
    patched_dit(**batch)
    assert len(computed) == 5
