"""Changes of tensors that caches notice."""

import torch

from diffusers_dmp.models.caching import TensorSnapshot


def test_changes_that_are_noticed():
    tensors = [torch.zeros(3), torch.zeros(4)]
    snapshot = TensorSnapshot(tensors)
    assert snapshot.matches(tensors)
    assert not snapshot.matches([tensors[0], torch.zeros(4)])
    tensors[1].add_(1)
    assert not snapshot.matches(tensors)

    snapshot = TensorSnapshot(tensors)
    tensors[0].data = torch.zeros(3)
    assert not snapshot.matches(tensors)


def test_ids_are_not_used_again():
    """Python gives the id of a deleted object to a new one; the snapshot keeps its tensors alive."""
    snapshot = TensorSnapshot([torch.zeros(3)])
    assert not any(snapshot.matches([torch.zeros(3)]) for _ in range(100))


def test_tensors_without_a_count_of_changes():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert TensorSnapshot([tensor]).matches([tensor])
