"""Guidance targets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from networks import PLAIN, make_dpt, make_segformer, make_vit
from transformers import ViTConfig
from transformers.modeling_outputs import DepthEstimatorOutput, ImageClassifierOutput, SemanticSegmenterOutput

from diffusers_dmp import (
    ClassTarget,
    DepthTarget,
    GuidanceExperts,
    GuidanceTarget,
    GuidedScheduler,
    SegmentationTarget,
    WeightedTargets,
)

NAMES = {0: "tench, Tinca tinca", 1: "zebra", 2: "tabby, tabby cat"}
CONFIG = ViTConfig(id2label=NAMES, label2id={name: index for index, name in NAMES.items()})


@pytest.mark.parametrize(
    ("labels", "indices"),
    [
        (1, [1]),
        ("zebra", [1]),
        (["tabby cat", "tench"], [2, 0]),
        ("tench, Tinca tinca", [0]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
def test_classes(labels, indices):
    target = ClassTarget(labels)
    target.prepare(CONFIG)
    logits = torch.randn(2, 3)
    expected = F.log_softmax(logits, -1)[range(2), indices if len(indices) == 2 else indices * 2]
    torch.testing.assert_close(target.log_likelihood(ImageClassifierOutput(logits=logits)), expected)


def test_unknown_classes():
    with pytest.raises(ValueError, match=r"among \['tench', .*'zebra'.*\], but got 'zebras'"):
        ClassTarget("zebras").prepare(CONFIG)
    with pytest.raises(ValueError, match=r"in \[0, 2\], but got 3"):
        ClassTarget([0, 3]).prepare(CONFIG)
    target = ClassTarget([0, 1, 2])
    target.prepare(CONFIG)
    with pytest.raises(ValueError, match="`labels` to be for 1 or 2 images, but got 3"):
        target.log_likelihood(ImageClassifierOutput(logits=torch.zeros(2, 3)))


def test_depth():
    predicted, asked = torch.randn(2, 4, 5), torch.randn(1, 4, 5)
    likelihood = DepthTarget(asked).log_likelihood(DepthEstimatorOutput(predicted_depth=predicted))
    torch.testing.assert_close(likelihood, -((predicted - asked) ** 2).mean((1, 2)))
    with pytest.raises(ValueError, match=r"`depth` to have the network's size \(4, 5\), but got \(5, 4\)"):
        DepthTarget(asked.mT).log_likelihood(DepthEstimatorOutput(predicted_depth=predicted))


def test_segmentation():
    logits, classes = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    classes[1, :, :3] = -100
    target = SegmentationTarget(classes)
    target.prepare(CONFIG)
    likelihood = target.log_likelihood(SemanticSegmenterOutput(logits=logits))
    log_probs = F.log_softmax(logits, 1)
    first = log_probs[0].gather(0, classes[0][None]).mean()
    second = log_probs[1, :, :, 3:].gather(0, classes[1][None, :, 3:]).mean()
    torch.testing.assert_close(likelihood, torch.stack([first, second]))
    with pytest.raises(ValueError, match=r"`classes` to be in \[0, 2\] or -100, but got \[7\]"):
        SegmentationTarget(torch.full((1, 4, 5), 7)).prepare(CONFIG)
    with pytest.raises(ValueError, match=r"the network's size \(4, 5\), but got \(2, 2\)"):
        SegmentationTarget(torch.zeros(1, 2, 2)).log_likelihood(SemanticSegmenterOutput(logits=logits))


def test_weighted_targets():
    logits = torch.randn(2, 3)
    targets = WeightedTargets([(ClassTarget(0), 1.0), (ClassTarget("zebra"), -0.5)])
    targets.prepare(CONFIG)
    log_probs = F.log_softmax(logits, -1)
    expected = log_probs[:, 0] - 0.5 * log_probs[:, 1]
    torch.testing.assert_close(targets.log_likelihood(ImageClassifierOutput(logits=logits)), expected)


class BrightTarget(GuidanceTarget):
    """A target as users write their own: the logit of the first class."""

    def log_likelihood(self, output):
        return output.logits[:, 0]


@pytest.mark.parametrize(
    ("make_network", "target"),
    [
        (make_vit, BrightTarget()),
        (make_segformer, SegmentationTarget(torch.ones(1, 8, 8))),
        (make_dpt, DepthTarget(torch.ones(1, 64, 64))),
    ],
)
def test_each_kind_of_network_guides(make_network, target):
    experts = GuidanceExperts(make_network(), **PLAIN)
    scheduler = GuidedScheduler(DDIMScheduler(clip_sample=False), experts, target, scale=1.0)
    scheduler.set_timesteps(10)
    x_t = torch.randn(2, 3, 32, 32)
    t = scheduler.timesteps[5]
    plain = DDIMScheduler(clip_sample=False)
    plain.set_timesteps(10)
    shift = scheduler.step(x_t, t, x_t).prev_sample - plain.step(x_t, t, x_t).prev_sample
    assert (shift.flatten(1).norm(dim=1) > 0).all()


def test_targets_may_be_numpy_or_single_maps():
    for labels in (np.int64(2), np.array(["zebra"]), np.str_("zebra"), torch.tensor(2), np.array([2])):
        target = ClassTarget(labels)
        target.prepare(CONFIG)
        assert target.indices.tolist() == [1 if "zebra" in str(labels) else 2]
    assert DepthTarget(np.ones((4, 5))).depth.shape == SegmentationTarget(np.ones((4, 5))).classes.shape == (1, 4, 5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassTarget(True).prepare(CONFIG), "`labels` to be integers or names"),
        (lambda: ClassTarget([1.0]).prepare(CONFIG), "`labels` to be integers or names"),
        (lambda: DepthTarget(torch.full((2, 2), torch.nan)), "`depth` to be finite"),
        (lambda: DepthTarget(torch.ones(1, 1, 2, 2)), r"`depth` to have the shape \(B, h, w\)"),
        (lambda: SegmentationTarget(torch.full((2, 2), 0.5)), "`classes` to be integers"),
    ],
)
def test_refuses_targets_of_other_kinds(make, message):
    with pytest.raises(ValueError, match=message):
        make()
