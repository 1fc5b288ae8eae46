"""Changes of tensors that caches notice, and copies on the CPU."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_dmp.models.caching import CopiesOnCPU, TensorSnapshot


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


VIEWS = {
    "one": lambda schedule, i: schedule[i],
    "expanded": lambda schedule, i: schedule[i].expand(3),
    "expanded twice": lambda schedule, i: schedule[i][None, None].expand(2, 3),
    "iterated": lambda schedule, i: list(schedule)[i],
    "slice": lambda schedule, i: schedule[i:],
    "of a slice": lambda schedule, i: schedule[1:].flip(0)[::2][i // 3].expand(2),
    "strided": lambda schedule, i: schedule[::2][i // 2].expand(2),
    "transposed": lambda schedule, i: schedule.view(2, 3).T[i // 2],
    "detached": lambda schedule, i: schedule.detach()[i],
    "computed": lambda schedule, i: schedule[i].expand(2) / 1000,
    "other dtype": lambda schedule, i: schedule[i].view(torch.int32).expand(2),
    "whole": lambda schedule, i: schedule,
}


def changed(schedule: torch.Tensor, change: str, i: int) -> torch.Tensor:
    if change == "another tensor":
        return schedule + 1
    if change == "whole":
        schedule.mul_(1.5)
    elif change == "one value":
        schedule[i].fill_(7.0)
    elif change == "by index":
        schedule[i] = 8.0
    return schedule


CHANGES = ["none", "whole", "one value", "by index", "another tensor"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), st.sampled_from(CHANGES), st.integers(0, 5)), max_size=8))
@torch.no_grad()
def test_copies_always_have_the_present_values(pretended, calls):
    accelerator, copies = pretended.PretendedAccelerator(), CopiesOnCPU()
    schedule = accelerator.put(torch.linspace(1000.0, 10.0, 6))
    with accelerator:
        for view, change, i in calls:
            schedule = changed(schedule, change, i)
            shown = VIEWS[view](schedule, i)
            assert torch.equal(copies.shown_by(shown), shown.held)
            assert torch.equal(copies.whole(schedule), schedule.held)


@pytest.mark.parametrize("view", sorted(VIEWS))
@torch.no_grad()
def test_views_of_a_schedule_are_waited_for_once(accelerator, view):
    """Not those of which it is not certain what they show."""
    copies, schedule = CopiesOnCPU(), accelerator.put(torch.linspace(1000.0, 10.0, 6))
    with accelerator:
        shown = [VIEWS[view](schedule, i) for i in range(6)]
        for each in shown:
            copies.shown_by(each)
    is_certain = view not in ("of a slice", "detached", "computed", "other dtype", "whole")  # `flip` copies
    assert len(accelerator.waits) == (1 if is_certain else 6)


def test_what_is_uncertain_is_read_each_time(accelerator):
    """PyTorch counts no changes of the first; the second may be a buffer that a CUDA graph fills; the third is long."""
    with torch.inference_mode():
        uncounted = accelerator.put(torch.linspace(0, 1, 6))
    buffer = accelerator.put(torch.zeros(1))
    long = accelerator.put(torch.zeros(CopiesOnCPU.MAX_VALUES + 1))
    for tensor in (uncounted, buffer, long):
        copies = CopiesOnCPU()
        accelerator.waits.clear()
        with accelerator:
            copies.shown_by(tensor[0].expand(2))
            copies.shown_by(tensor[0].expand(2))
        assert len(accelerator.waits) == 2


def test_copied_owners_begin_without_copies(accelerator):
    copies = CopiesOnCPU()
    with accelerator:
        copies.whole(accelerator.put(torch.zeros(3)))
        assert len(copies._copies) == 1
        assert copy.deepcopy(copies)._copies == []


def test_tensors_here_are_not_copied():
    copies, tensor = CopiesOnCPU(), torch.linspace(0, 1, 3)
    assert copies.shown_by(tensor[1:]).data_ptr() == tensor[1:].data_ptr()
    assert copies.whole(tensor).data_ptr() == tensor.data_ptr()
