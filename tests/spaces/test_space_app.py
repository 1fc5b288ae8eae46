"""The Space: what it checks, what it loads, and the app in a process of its own, asked through its API."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from space_process import SPACE, running_space

sys.path.insert(0, str(SPACE))

from gradio_client import Client
from gradio_client.exceptions import AppError, ValidationError
from service import UNEXPECTED, Service, Turnstile
from specialisation import responsibility
from studio import Studio
from systems import MODELS, TITLES, load_systems

from diffusers_dmp.diffusion.schedulers import SCHEDULERS
from diffusers_dmp.evaluation.digits import fit_reader

DRAWING = {"scale": 1.5, "steps": 4, "scheduler": "DDIM", "seed": 0, "randomise": False}
GOOD = {
    "generate": {"system": "dtr", "class_name": "3", "count": 4, **DRAWING},
    "compare": {"names": list(TITLES), "class_name": "all", **DRAWING},
    "specialise": {"system": "remix", "timestep": 300},
    "guide": {"class_name": "7", "count": 4, **DRAWING},
}
MALFORMED = [
    ("generate", "system", "gpt"),
    ("generate", "system", 3),
    ("generate", "system", None),
    ("generate", "system", ["dtr"]),
    ("generate", "system", "x" * 1_000_000),
    ("generate", "system", "../../etc/passwd"),
    ("generate", "class_name", "ten"),
    ("generate", "class_name", 3),
    ("generate", "class_name", {"name": "3"}),
    ("generate", "class_name", "<script>alert(1)</script>"),
    ("generate", "count", 0),
    ("generate", "count", 41),
    ("generate", "count", 2.5),
    ("generate", "count", "4"),
    ("generate", "scale", float("nan")),
    ("generate", "scale", float("inf")),
    ("generate", "scale", -1),
    ("generate", "scale", True),
    ("generate", "steps", 100_000),
    ("generate", "steps", 10**400),
    ("generate", "steps", None),
    ("generate", "steps", [25]),
    ("generate", "scheduler", "LMSDiscreteScheduler"),
    ("generate", "seed", -1),
    ("generate", "seed", 2**32),
    ("generate", "seed", 1e308),
    ("generate", "randomise", "yes"),
    ("generate", "randomise", 1),
    ("compare", "names", []),
    ("compare", "names", "dtr"),
    ("compare", "names", ["dtr", "dtr"]),
    ("compare", "names", ["dtr"] * 100_000),
    ("compare", "names", ["dtr", None]),
    ("compare", "class_name", "eleven"),
    ("specialise", "timestep", 1000),
    ("specialise", "timestep", "half"),
    ("specialise", "system", ""),
    ("guide", "class_name", None),
    ("guide", "scale", 1e9),
    ("guide", "count", []),
]


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Iterator[str]:
    """The address of a Space of which one of two further pipelines does not load."""
    log = tmp_path_factory.mktemp("space") / "log.txt"
    with running_space(log, DMP_PIPELINES=f"mine={MODELS / 'dtr'}, ghost=/no/such/folder") as url:
        yield url


@pytest.fixture(scope="module")
def systems() -> dict:
    return load_systems(setting="")[0]


def call(url: str, request: str, values: dict, **body) -> httpx.Response:
    """As any program may: NaN and all."""
    content = json.dumps({"data": list(values.values()), **body})
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/gradio_api/call/{request}", content=content, headers=headers, timeout=60)


def is_blank(path: str) -> bool:
    return np.asarray(Image.open(path).convert("L")).std() < 5


def test_each_request_is_answered(space):
    client = Client(space, verbose=False)
    grid, seed, sentence = client.predict(**GOOD["generate"], api_name="/generate")
    assert not is_blank(grid) and seed == 0 and sentence.startswith("Drawn by DTR with seed 0")
    gallery, _, _ = client.predict(**GOOD["compare"], api_name="/compare")
    assert [entry["caption"].split(":")[0] for entry in gallery] == list(TITLES.values())
    assert not any(is_blank(entry["image"]) for entry in gallery)
    plots, sentence = client.predict(**GOOD["specialise"], api_name="/specialise")
    assert not is_blank(plots) and "expert 2 denoises" in sentence
    unguided, guided, _, _ = client.predict(**GOOD["guide"], api_name="/guide")
    assert not is_blank(unguided) and not is_blank(guided)
    assert not np.array_equal(np.asarray(Image.open(unguided)), np.asarray(Image.open(guided)))


def test_the_same_seed_draws_the_same(space):
    client = Client(space, verbose=False)
    first, second = (client.predict(**GOOD["generate"], api_name="/generate")[0] for _ in range(2))
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    seeds = {client.predict(**GOOD["generate"] | {"randomise": True}, api_name="/generate")[1] for _ in range(2)}
    assert len(seeds) == 2


def test_further_pipelines_come_from_the_setting(space):
    client = Client(space, verbose=False)
    mine, shipped = (
        client.predict(**GOOD["generate"] | {"system": name}, api_name="/generate")[0] for name in ("mine", "dtr")
    )
    assert np.array_equal(np.asarray(Image.open(mine)), np.asarray(Image.open(shipped)))
    assert "ghost was left out" in httpx.get(space).text


@pytest.mark.parametrize(("request_name", "name", "value"), MALFORMED, ids=lambda value: str(value)[:20])
def test_malformed_values_are_refused(space, request_name, name, value):
    response = call(space, request_name, GOOD[request_name] | {name: value})
    assert response.status_code == 422
    messages = [problem["message"] for problem in response.json()["detail"] if not problem["is_valid"]]
    assert len(messages) == 1 and messages[0].startswith("Expected ") and "but got" in messages[0]
    assert len(messages[0]) < 300


def test_malformed_requests_are_refused(space):
    assert call(space, "generate", {"system": "dtr"}).status_code == 400  # too few values
    unknown = call(space, "destroy", GOOD["generate"])
    assert unknown.status_code == 404 and "Expected the endpoint to be generate" in unknown.text
    join = {"data": [], "fn_index": 10**6, "session_hash": "me"}
    assert httpx.post(f"{space}/gradio_api/queue/join", json=join).status_code == 404
    assert httpx.post(f"{space}/gradio_api/call/generate", content="{").status_code == 422
    assert httpx.post(f"{space}/gradio_api/run/generate", json={"data": []}).status_code == 404  # past the queue
    grid, *_ = Client(space, verbose=False).predict(**GOOD["generate"], api_name="/generate")
    assert not is_blank(grid)


def test_a_user_has_one_job_at_a_time(space):
    client = Client(space, verbose=False)
    long = client.submit(**GOOD["generate"] | {"count": 40, "steps": 50}, api_name="/generate")
    time.sleep(0.3)
    with pytest.raises(ValidationError, match="Expected one job at a time"):
        client.predict(**GOOD["specialise"], api_name="/specialise")
    assert not is_blank(long.result()[0])
    client.predict(**GOOD["specialise"], api_name="/specialise")


def test_bare_calls_are_one_user_of_an_address(space):
    first = call(space, "generate", GOOD["generate"] | {"count": 40, "steps": 50})
    second = call(space, "generate", GOOD["generate"])
    assert first.status_code == 200
    assert second.status_code == 422 and "one job at a time" in second.text
    stream = f"{space}/gradio_api/call/generate/{first.json()['event_id']}"
    assert "event: complete" in httpx.get(stream, timeout=60).text
    assert call(space, "generate", GOOD["generate"]).status_code == 200


def test_twenty_users_at_once(space):
    clients = [Client(space, verbose=False) for _ in range(20)]
    start = threading.Barrier(len(clients))

    def draw(user: int) -> tuple[str, int]:
        start.wait()
        system = list(TITLES)[user % len(TITLES)]
        asked = GOOD["generate"] | {"system": system, "class_name": "all", "count": 20, "steps": 5, "seed": user}
        return clients[user].predict(**asked, api_name="/generate")[:2]

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        answers = list(pool.map(draw, range(len(clients))))
    print(f"20 users: {time.perf_counter() - begun:.1f} s")
    assert [seed for _, seed in answers] == list(range(20))
    assert not any(is_blank(grid) for grid, _ in answers)


def test_shipped_pipelines_are_small():
    assert {path.name for path in MODELS.iterdir()} == set(TITLES)
    assert sum(path.stat().st_size for path in SPACE.rglob("*") if path.is_file()) < 12e6


@pytest.mark.filterwarnings("ignore:Denoiser . has none of the")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", TITLES)
def test_every_scheduler_draws_with_every_system(systems, name, scheduler):
    settings = {"scale": systems[name].default_scale, "scheduler": scheduler, "seed": 0}
    steps = []
    images = systems[name].draw(
        "all", 3, num_inference_steps=3, on_step=lambda done, total: steps.append((done, total)), **settings
    )
    assert len(images) == 3 and steps[0][0] == 1 and steps[-1][0] == steps[-1][1]
    assert all(np.asarray(image).std() > 5 for image in images)
    assert systems[name].draw("5", 1, num_inference_steps=1, **settings)


def test_a_call_leaves_the_pipeline_as_it_was(systems):
    scheduler = systems["patch"].pipeline.scheduler
    Studio(systems).generate(*(GOOD["generate"] | {"system": "patch", "scheduler": "Euler"}).values())
    assert systems["patch"].pipeline.scheduler is scheduler
    assert type(scheduler) is DDPMScheduler and scheduler.num_inference_steps is None


@pytest.mark.parametrize("name", TITLES)
def test_specialisation_of_every_system(systems, name):
    picture, sentence = Studio({name: systems[name]}).specialise(name, 999)
    assert np.asarray(picture).std() > 5
    assert sentence.startswith("At timestep 999 ") and sentence.endswith(".")
    assert responsibility(systems[name], 0) != sentence.replace("999", "0")


def test_what_does_not_load_is_left_out(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    systems, problems = load_systems(f"stock={tmp_path / 'stock'},{tmp_path / 'gone'}, dtr={MODELS / 'remix'}")
    assert list(systems) == list(TITLES)
    assert not systems["dtr"].is_shipped and systems["remix"].is_shipped
    assert "stock was left out" in problems[0] and "Expected a pipeline of diffusers-dmp" in problems[0]
    assert "gone was left out" in problems[1]


def test_what_the_pipeline_refuses_is_said(systems):
    unguidable = Studio({"ppap": systems["ppap"]})
    unguidable.systems["ppap"].experts, experts = None, unguidable.systems["ppap"].experts
    try:
        asked = GOOD["generate"] | {"system": "ppap", "class_name": "all"}
        with pytest.raises(ValueError, match="PPAP: Expected `guidance_scale` to be 1"):
            unguidable.generate(*asked.values())
        unguidable.generate(*(asked | {"scale": 1}).values())
    finally:
        systems["ppap"].experts = experts


def test_unexpected_errors_are_plain_words(systems):
    service = Service(Studio(systems))
    http = SimpleNamespace(request=SimpleNamespace(state=SimpleNamespace(user="me")))
    service.studio.generate = lambda *values, on_step: 1 / 0
    assert service.turnstile.enter("me") and not service.turnstile.enter("me")
    with pytest.raises(AppError) as caught:
        service.run("generate", tuple(GOOD["generate"].values()), http, None)
    assert caught.value.message == UNEXPECTED
    assert service.turnstile.enter("me")


def test_forgotten_jobs_do_not_lock_users_out(monkeypatch):
    turnstile, now = Turnstile(), [0.0]
    monkeypatch.setattr("service.time.monotonic", lambda: now[0])
    assert turnstile.enter("me")
    now[0] = 1e6
    assert turnstile.enter("me")


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_shipped_pipelines_draw_what_is_asked(systems, name):
    scale = systems[name].default_scale
    images = systems[name].draw("all", 200, scale=scale, num_inference_steps=25, scheduler="DDPM", seed=0)
    pixels = np.stack([np.asarray(image) for image in images]).reshape(len(images), -1) / 255
    recognised = (fit_reader().predict(pixels) == systems[name].labels("all", 200)).mean()
    print(f"{name}: {recognised:.1%}")
    assert recognised > 0.8, Path(MODELS / name)
