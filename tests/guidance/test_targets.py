"""Guidance targets."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from diffusers import DDIMScheduler
from networks import PLAIN, TRANSFORMER, make_dpt, make_segformer, make_vit, randomised
from tiny_pipelines import RECIPES, generate
from torch import nn
from transformers import CLIPConfig, CLIPForImageClassification, PreTrainedConfig, ViTConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput
from transformers.utils import ModelOutput

from diffusers_dmp import (
    ClassTarget,
    DepthTarget,
    FrameTargets,
    GuidanceExperts,
    GuidanceTarget,
    GuidedScheduler,
    ScoreTarget,
    SegmentationTarget,
    TextTarget,
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
        (lambda: SegmentationTarget(torch.full((2, 2), torch.nan)), "`classes` to be integers"),
        (lambda: WeightedTargets([]), "at least one target"),
        (lambda: WeightedTargets([ClassTarget(0)]), "pairs of a target and its finite weight"),
        (lambda: WeightedTargets([(ClassTarget(0), float("nan"))]), "pairs of a target and its finite weight"),
        (lambda: WeightedTargets([(1.0, ClassTarget(0))]), "pairs of a target and its finite weight"),
        (lambda: WeightedTargets([("zebra", 1.0)]), "instances of GuidanceTarget, but got 'zebra'"),
        (lambda: FrameTargets([]), "at least one target"),
        (lambda: FrameTargets(["zebra"]), "instances of GuidanceTarget, but got 'zebra'"),
    ],
)
def test_refuses_targets_of_other_kinds(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A high score


def aesthetic_head(size: int) -> nn.Module:
    """Of the kind of LAION's predictor, with layers of different sizes and dropout."""
    return randomised(nn.Sequential(nn.Linear(size, 6), nn.Dropout(0.5), nn.Linear(6, 1))).train()


def test_the_score_of_a_head_on_embeddings():
    head, images = aesthetic_head(8), torch.randn(3, 8)
    for target, seen in [(ScoreTarget(head), images), (ScoreTarget(head, normalize=True), F.normalize(images))]:
        scores = target.log_likelihood(CLIPVisionModelOutput(image_embeds=images))
        torch.testing.assert_close(scores, copy.deepcopy(head).eval()(seen)[:, 0])
    assert head.training and all(weight.requires_grad for weight in head.parameters())  # the user's own
    assert not [weight for weight in target.head.parameters() if weight.requires_grad]


def test_a_head_follows_the_network():
    target = ScoreTarget(aesthetic_head(8).bfloat16())
    assert target.log_likelihood(CLIPVisionModelOutput(image_embeds=torch.randn(3, 8).double())).dtype == torch.float64


def test_the_score_of_logits():
    logits = torch.randn(3, 5)
    smiling = ScoreTarget(lambda logits: logits[:, 1] - logits[:, 0])  # any function
    torch.testing.assert_close(
        smiling.log_likelihood(ImageClassifierOutput(logits=logits)), logits[:, 1] - logits[:, 0]
    )
    alone = ScoreTarget().log_likelihood(ImageClassifierOutput(logits=logits[:, :1]))
    torch.testing.assert_close(alone, logits[:, 0])


def test_a_classifier_on_clip_with_one_logit():
    sizes = TRANSFORMER | {"hidden_size": 8}
    network = CLIPForImageClassification(CLIPConfig(vision_config=sizes, num_labels=1)).eval()
    experts = GuidanceExperts(network, **PLAIN, num_experts=1)
    assert [name for name in experts.expert_tensors(0) if name.endswith("lora_A.weight")]
    GuidedScheduler(DDIMScheduler(), experts, ScoreTarget())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        output = experts(images, torch.tensor(0))
    torch.testing.assert_close(ScoreTarget().log_likelihood(output), output.logits[:, 0])
    with pytest.raises(
        ValueError, match="a single logit for a ScoreTarget .* but got a ViTForImageClassification with 10"
    ):
        GuidedScheduler(DDIMScheduler(), GuidanceExperts(make_vit(), **PLAIN), ScoreTarget())


def test_heads_that_do_not_fit():
    output = CLIPVisionModelOutput(image_embeds=torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"`head` to take what the network gives, of shape \(3, 8\), but got: mat1"):
        ScoreTarget(aesthetic_head(7)).log_likelihood(output)
    with pytest.raises(ValueError, match=r"output of `head` to be one score .* \(3,\) or \(3, 1\), but got \(3, 2\)"):
        ScoreTarget(nn.Linear(8, 2)).log_likelihood(output)
    with pytest.raises(ValueError, match="output of `head` to be one score .* but got a ImageClassifierOutput"):
        ScoreTarget(lambda seen: ImageClassifierOutput(logits=seen[:, :1])).log_likelihood(output)
    with pytest.raises(ValueError, match=r"the `logits` to be one score for each image, .* but got \(2, 3\)"):
        ScoreTarget().log_likelihood(ImageClassifierOutput(logits=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="`head` to be a module, a function or None, but got 'aesthetic.pth'"):
        ScoreTarget("aesthetic.pth")
    with pytest.raises(ValueError, match="`normalize` with a `head`"):
        ScoreTarget(normalize=True)


# Several targets, and videos


def frames_of(count: int) -> list[ImageClassifierOutput]:
    return [ImageClassifierOutput(logits=torch.randn(2, 3)) for _ in range(count)]


def prepared(target: GuidanceTarget) -> GuidanceTarget:
    target.prepare(CONFIG)
    return target


def test_each_frame_has_its_target():
    frames = frames_of(3)
    target = prepared(FrameTargets([ClassTarget("zebra"), ClassTarget([0, 2]), ClassTarget("zebra")]))
    first, second, third = (F.log_softmax(each.logits, -1) for each in frames)
    expected = (first[:, 1] + second[[0, 1], [0, 2]] + third[:, 1]) / 3
    torch.testing.assert_close(target.log_likelihood_of_frames(frames), expected)


def test_without_targets_of_their_own_frames_count_alike():
    frames = frames_of(4)
    target = prepared(ClassTarget("zebra"))
    expected = torch.stack([F.log_softmax(each.logits, -1)[:, 1] for each in frames]).mean(0)
    torch.testing.assert_close(target.log_likelihood_of_frames(frames), expected)


def test_weighted_targets_of_videos():
    """Those of frames inside, in any nesting."""
    frames = frames_of(2)
    of_frames = FrameTargets([ClassTarget(0), ClassTarget(1)])
    target = prepared(WeightedTargets([(WeightedTargets([(of_frames, 2.0)]), 1.0), (ClassTarget(2), -0.5)]))
    first, second = (F.log_softmax(each.logits, -1) for each in frames)
    expected = first[:, 0] + second[:, 1] - 0.25 * (first[:, 2] + second[:, 2])
    torch.testing.assert_close(target.log_likelihood_of_frames(frames), expected)


def test_videos_of_other_lengths():
    target = prepared(FrameTargets([ClassTarget(0), ClassTarget(1)]))
    with pytest.raises(ValueError, match="a target for each of the 3 frames that are decoded, but got 2"):
        target.log_likelihood_of_frames(frames_of(3))
    with pytest.raises(
        ValueError, match="Expected videos, as FrameTargets has a target for each of 2 frames, but got im"
    ):
        target.log_likelihood(frames_of(1)[0])
    with pytest.raises(ValueError, match="Expected videos"):
        WeightedTargets([(target, 1.0)]).log_likelihood(frames_of(1)[0])


class Brightness(nn.Module):
    """A network of five lines: `logits` for dark and bright images."""

    def forward(self, images):
        brightness = images.mean((1, 2, 3))
        return torch.stack([-brightness, brightness], dim=1)


@torch.no_grad()
def test_frames_of_a_video():
    """The first frame of a real pipeline's video gets darker, and the last one brighter."""

    def first_and_last(latents: torch.Tensor) -> torch.Tensor:
        """Instead of a VAE: the first channels are red, green and blue."""
        return latents[:, :3, [0, -1]].transpose(1, 2)

    pipe = RECIPES["wan"].pipe(RECIPES["wan"].denoiser())
    unguided = first_and_last(generate("wan", pipe)).mean((0, 2, 3, 4))
    experts = GuidanceExperts(Brightness(), **PLAIN, method="finetune", num_experts=1, outputs="logits")
    target = FrameTargets([ClassTarget(0), ClassTarget(1)])
    pipe.scheduler = GuidedScheduler(pipe.scheduler, experts, target, scale=100.0, decoder=first_and_last)
    darker, brighter = first_and_last(generate("wan", pipe)).mean((0, 2, 3, 4)) - unguided
    assert darker < -0.1 and brighter > 0.1
    pipe.scheduler.target = FrameTargets([ClassTarget(0)])
    with pytest.raises(ValueError, match="a target for each of the 2 frames that are decoded, but got 1"):
        generate("wan", pipe, num_inference_steps=2)


# Networks that do not give what is asked for

OUTPUTS = {
    "classifier": ImageClassifierOutput(logits=torch.zeros(2, 3)),
    "segmentation": SemanticSegmenterOutput(logits=torch.zeros(2, 3, 4, 5)),
    "depth": DepthEstimatorOutput(predicted_depth=torch.zeros(2, 4, 5)),
    "CLIP": CLIPVisionModelOutput(image_embeds=torch.zeros(2, 8)),
    "SigLIP": BaseModelOutputWithPooling(last_hidden_state=torch.zeros(2, 4, 8), pooler_output=torch.zeros(2, 8)),
    "features": BaseModelOutputWithPooling(pooler_output=torch.zeros(2, 8, 1, 1)),
}
ARCHITECTURES = {
    "classifier": "ViTForImageClassification",
    "segmentation": "SegformerForSemanticSegmentation",
    "depth": "DPTForDepthEstimation",
    "CLIP": "CLIPVisionModelWithProjection",
    "SigLIP": "SiglipVisionModel",
}
READ = {  # by each target
    ClassTarget(0): ["classifier"],
    SegmentationTarget(np.zeros((4, 5))): ["segmentation"],
    DepthTarget(np.zeros((4, 5))): ["depth"],
    TextTarget(torch.ones(8)): ["CLIP", "SigLIP"],
    ScoreTarget(lambda seen: seen.sum(1)): ["CLIP", "SigLIP", "classifier"],
    ScoreTarget(): ["classifier"],
}


@pytest.mark.parametrize("network", OUTPUTS)
@pytest.mark.parametrize(("target", "networks"), READ.items(), ids=[type(target).__name__ for target in READ])
def test_networks_of_another_kind(target, networks, network):
    """Refused before the first step where the configuration says what a network is, and else at the first step."""
    count = 3 if not isinstance(target, ScoreTarget) or target.head else 1
    architectures = [ARCHITECTURES[network]] if network in ARCHITECTURES else None
    config = PreTrainedConfig(architectures=architectures, num_labels=count)
    output = OUTPUTS[network] if count == 3 else one_logit(OUTPUTS[network])
    if network in networks:
        target.prepare(config)
        assert target.log_likelihood(output).shape == (2,)
        return
    name = type(target).__name__
    if network in ARCHITECTURES:
        with pytest.raises(ValueError, match=f"for a {name}, but got a {ARCHITECTURES[network]}"):
            target.prepare(config)
    target.prepare(PreTrainedConfig(num_labels=3))
    with pytest.raises(ValueError, match=rf"for a {name}, but got one with `\w+` \(2, "):
        target.log_likelihood(output)


def test_networks_in_memory_are_refused_before_the_first_step():
    experts = GuidanceExperts(make_dpt(), **PLAIN)
    with pytest.raises(ValueError, match="an image classifier, .* for a ClassTarget, but got a DPTForDepthEstimation"):
        GuidedScheduler(DDIMScheduler(), experts, ClassTarget(0))
    of_depth = GuidanceExperts(make_dpt(), **PLAIN, outputs=lambda output: output.predicted_depth.mean(2))
    GuidedScheduler(DDIMScheduler(), of_depth, ClassTarget(0))  # its class does not say what a function returns


def one_logit(output: ModelOutput) -> ModelOutput:
    return ImageClassifierOutput(logits=output.logits[:, :1]) if output is OUTPUTS["classifier"] else output


def test_the_configuration_may_promise_more_classes_than_there_are():
    target = prepared(ClassTarget(2))
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 1\], but got 2"):
        target.log_likelihood(ImageClassifierOutput(logits=torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("target", "network"),
    [
        (ClassTarget([0, 2]), "classifier"),
        (SegmentationTarget(torch.zeros(4, 5)), "segmentation"),
        (DepthTarget(torch.ones(4, 5)), "depth"),
        (TextTarget(torch.ones(8), negative_embeds=torch.ones(2, 8)), "CLIP"),
        (TextTarget(torch.ones(2, 8), 10.0, -1.0, negative_embeds=torch.ones(2, 8)), "SigLIP"),
        (ScoreTarget(lambda seen: seen.sum(1), normalize=True), "CLIP"),
        (WeightedTargets([(ClassTarget(0), 1.0), (ClassTarget(1), -0.5)]), "classifier"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_step_waits_for_an_accelerator(monkeypatch, target, network):
    """What is asked for is moved there at the first step, and not again."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.pretended_accelerator import PretendedAccelerator

    target.prepare(CONFIG)
    accelerator, output = PretendedAccelerator(), OUTPUTS[network]
    there = type(output)(**accelerator.put(dict(output)))
    with accelerator:
        first = target.log_likelihood(there)
        accelerator.waits.clear()
        second = target.log_likelihood(there)
        assert accelerator.waits == []
        assert torch.equal(first.cpu(), second.cpu())
