"""Five systems of diffusion models that are specialised by noise level, to try out: `make space`, or a Space on the Hub.

The environment's `DMP_PIPELINES` names other pipelines to show: 'name=folder-or-hub-id' or plain ids, between commas.
"""

from collections.abc import Callable

import gradio as gr
from examples import EXAMPLES, Example
from service import EXCEPTION_HANDLERS, Service
from studio import COMPARED_IMAGES, MAX_IMAGES, MAX_SCALE, MAX_SEED, MAX_STEPS, Studio
from systems import ALL_CLASSES, CLASSIFIER_FREE_SCALE, EXPERTS_SCALE, load_systems

from diffusers_dmp.diffusion.schedulers import SCHEDULERS

SYSTEMS, PROBLEMS = load_systems()
STUDIO = Studio(SYSTEMS)
SERVICE = Service(STUDIO)
MAX_QUEUE = 40

HEADER = """# Diffusion models specialised by noise level
Removing the first noise and removing the last are different tasks. In each of these systems a stretch of noise levels owns
something: channels (DTR), a mixture of weights (Remix-DiT), of prompts (DMP), a whole model (Patch Diffusion), a guide (PPAP)."""
# nothing to download
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
FOOTER = ["api", "gradio", "settings"]
PROGRESS = gr.Progress()
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
.picture {padding-top: 2.5rem !important}  /* for the label and the buttons, which would cover it */
.picture img {image-rendering: pixelated}
.picture .icon-button-wrapper {top: -2.3rem !important}
.picture .grid-wrap {max-height: none !important; overflow: visible !important}
.picture .thumbnail-lg img {object-position: top}  /* the caption is at the bottom */
[data-testid=status-tracker]:not(.hide) {z-index: 50 !important}  /* above the labels: refusals are shown there */
@media (max-width: 640px) {.answer {order: -1}}
"""


def generate(
    system, class_name, count, scale, steps, scheduler, seed, randomise, http: gr.Request, progress=PROGRESS
) -> tuple:
    """One system's images in a grid."""
    asked = (system, class_name, count, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("generate", asked, http, progress)


def compare(names, class_name, scale, steps, scheduler, seed, randomise, http: gr.Request, progress=PROGRESS) -> tuple:
    """What several systems make of the same noise."""
    asked = (names, class_name, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("compare", asked, http, progress)


def specialise(system, timestep, http: gr.Request, progress=PROGRESS) -> tuple:
    """Who is responsible for a timestep."""
    return SERVICE.run("specialise", (system, timestep), http, progress)


def guide(class_name, count, scale, steps, scheduler, seed, randomise, http: gr.Request, progress=PROGRESS) -> tuple:
    """Without guidance by experts, and with it."""
    asked = (class_name, count, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("guide", asked, http, progress)


def class_update(names: "str | list[str]") -> gr.Dropdown:
    """The classes that the chosen systems know."""
    names = [names] if isinstance(names, str) else names
    return gr.Dropdown(STUDIO.class_choices(names) if names else [ALL_CLASSES], value=ALL_CLASSES)


def system_dropdown() -> gr.Dropdown:
    return gr.Dropdown([(system.title, name) for name, system in SYSTEMS.items()], label="System")


def class_dropdown(names: list[str]) -> gr.Dropdown:
    return gr.Dropdown(STUDIO.class_choices(names), value=ALL_CLASSES, label="Class")


def count_slider() -> gr.Slider:
    return gr.Slider(1, MAX_IMAGES, 20, step=1, label="Images")


def drawing_controls(scale: float, scale_info: str, steps: int, scheduler: str) -> list[gr.components.Component]:
    """Scale, steps, scheduler, seed and whether to randomise it."""
    return [
        gr.Slider(0, MAX_SCALE, scale, step=0.1, label="Guidance scale", info=scale_info),
        gr.Slider(1, MAX_STEPS, steps, step=1, label="Steps"),
        gr.Dropdown(list(SCHEDULERS), value=scheduler, label="Scheduler"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
        gr.Checkbox(True, label="Randomise the seed"),
    ]


def picture(name: str, label: str, value: "str | None", **options) -> gr.Image:
    return gr.Image(
        value,
        label=label,
        format="png",
        interactive=False,
        buttons=["download"],
        elem_id=name,
        elem_classes="picture",
        **options,
    )


def shipped(request: str) -> list[Example]:
    """The examples whose systems are those that the pictures are of."""
    return [
        example
        for example in EXAMPLES[request]
        if all(name in SYSTEMS and SYSTEMS[name].is_shipped for name in example.systems)
    ]


def first_pictures(request: str, count: int) -> list[str | None]:
    """What a tab shows before anything is asked for."""
    examples = shipped(request)
    return [str(path) for path in examples[0].paths(count)] if examples else [None] * count


def captioned(example: Example) -> list[tuple[str, str]]:
    """A comparison's pictures under their systems' names."""
    paths = example.paths(len(example.systems))
    return [(str(path), SYSTEMS[name].title) for path, name in zip(paths, example.systems)]


def add_examples(request: str, inputs: list, outputs: list, answers: Callable[[Example], list]) -> None:
    """Buttons that fill in a request and its answer, which was drawn before."""
    examples = shipped(request)
    if examples:
        rows = [[*example.values, *answers(example), f"Example: {example.label}."] for example in examples]
        labels = [example.label for example in examples]
        gr.Examples(rows, inputs + outputs, example_labels=labels, label="Examples", api_visibility="private")


def on_request(events: list[Callable], handler: Callable, inputs: list, pictures: list, others: list) -> None:
    """An event with everything that the queue is to know; its name in the API is the handler's."""
    gr.on(
        events,
        handler,
        inputs,
        pictures + others,
        api_name=handler.__name__,
        concurrency_id="models",  # which are shared: one job at a time, of whichever tab
        concurrency_limit=1,
        trigger_mode="once",
        show_progress_on=pictures,
        scroll_to_output=True,  # on a phone it is above the button
        validator=SERVICE.validator(handler.__name__),
        preprocess=False,  # values are checked by the validator, all in the same words
    )


def generate_tab() -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            system = system_dropdown()
            class_name = class_dropdown([next(iter(SYSTEMS))])
            count = count_slider()
            drawing = drawing_controls(next(iter(SYSTEMS.values())).default_scale, "1 is none, for PPAP 0", 25, "DDPM")
            button = gr.Button("Generate", variant="primary", elem_id="generate-button")
        with gr.Column(scale=3, min_width=300, elem_classes="answer"):
            grid = picture("generate-picture", "Images", *first_pictures("generate", 1))
            sentence = gr.Markdown(elem_id="generate-sentence")
            inputs = [system, class_name, count, *drawing]
            add_examples(
                "generate", inputs, [grid, sentence], lambda example: [str(path) for path in example.paths(1)]
            )
    system.input(class_update, system, class_name, api_visibility="private")
    system.input(lambda name: SYSTEMS[name].default_scale, system, drawing[0], api_visibility="private")
    on_request([button.click], generate, inputs, [grid], [drawing[3], sentence])


def compare_tab() -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            titles = [(system.title, name) for name, system in SYSTEMS.items()]
            names = gr.CheckboxGroup(titles, value=list(SYSTEMS), label="Systems")
            class_name = class_dropdown(list(SYSTEMS))
            info = f"1 is none; PPAP's experts guide with {EXPERTS_SCALE:g} here"
            drawing = drawing_controls(CLASSIFIER_FREE_SCALE, info, 25, "DDPM")
            button = gr.Button("Compare", variant="primary", elem_id="compare-button")
        with gr.Column(scale=3, min_width=300, elem_classes="answer"):
            examples = shipped("compare")
            gallery = gr.Gallery(
                captioned(examples[0]) if examples else None,
                label=f"{COMPARED_IMAGES} images of each",
                columns=2,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                elem_id="compare-picture",
                elem_classes="picture",
            )
            sentence = gr.Markdown()
            inputs = [names, class_name, *drawing]
            add_examples("compare", inputs, [gallery, sentence], lambda example: [captioned(example)])
    names.input(class_update, names, class_name, api_visibility="private")
    on_request([button.click], compare, inputs, [gallery], [drawing[3], sentence])


def specialise_tab() -> None:
    system = system_dropdown()
    longest = max(system.num_train_timesteps for system in SYSTEMS.values())
    timestep = gr.Slider(
        0, longest - 1, longest // 2, step=1, label="Timestep", info="0 is almost clean, right almost noise"
    )
    button = gr.Button("Show", variant="primary", elem_id="specialise-button")
    sentence = gr.Markdown(elem_id="specialise-sentence")
    plots = picture("specialise-picture", "Who works when", *first_pictures("specialise", 1))
    events = [button.click, timestep.release, system.input]
    on_request(events, specialise, [system, timestep], [plots], [sentence])


def guide_tab() -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            class_name = class_dropdown([STUDIO.guides[0].name])
            count = count_slider()
            drawing = drawing_controls(EXPERTS_SCALE, "Of the experts; 0 is none", 25, "DDPM")
            button = gr.Button("Guide", variant="primary", elem_id="guide-button")
        with gr.Column(scale=3, min_width=300, elem_classes="answer"):
            gr.Markdown(
                "An unconditional model was never told of classes. A classifier's experts on noisy images guide it."
            )
            before, after = first_pictures("guide", 2)
            with gr.Row():
                unguided = picture("guide-unguided", "Unguided", before, min_width=140)
                guided = picture("guide-picture", "Guided", after, min_width=140)
            sentence = gr.Markdown()
            inputs = [class_name, count, *drawing]
            add_examples(
                "guide", inputs, [unguided, guided, sentence], lambda example: [str(path) for path in example.paths(2)]
            )
    on_request([button.click], guide, inputs, [unguided, guided], [drawing[3], sentence])


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Diffusion models specialised by noise level", analytics_enabled=False) as page:
        gr.Markdown(HEADER)
        for problem in PROBLEMS:
            gr.Markdown(f"**{problem}**")
        with gr.Tab("Generate"):
            generate_tab()
        with gr.Tab("Compare"):
            compare_tab()
        with gr.Tab("Specialisation"):
            specialise_tab()
        if STUDIO.guides:
            with gr.Tab("Guide"):
                guide_tab()
        page.unload(SERVICE.forget)
    return page.queue(max_size=MAX_QUEUE, api_open=False)


if __name__ == "__main__":
    for problem in PROBLEMS:
        print(problem)
    app_kwargs = {"exception_handlers": EXCEPTION_HANDLERS}
    build().launch(theme=THEME, css=CSS, show_error=True, ssr_mode=False, footer_links=FOOTER, app_kwargs=app_kwargs)
