"""A page to try five systems of diffusion models specialised by noise level: `make space`, or a Space on the Hub.

The environment variable `DMP_PIPELINES` names further pipelines: 'name=folder-or-hub-id' or plain ids, separated by commas.
"""

from collections.abc import Callable

import gradio as gr
from examples import EXAMPLES, Example
from service import EXCEPTION_HANDLERS, Service
from showcase import ALL_CLASSES, CLASSIFIER_FREE_SCALE, EXPERTS_SCALE, load_pipelines
from studio import COMPARED_IMAGES, MAX_IMAGES, MAX_SCALE, MAX_SEED, MAX_STEPS, Studio

from diffusers_dmp.diffusion.schedulers import SCHEDULERS
from diffusers_dmp.terminal import run_command

PIPELINES, PROBLEMS = run_command(lambda _: load_pipelines())  # a wrong `DMP_PIPELINES` is told in one line
STUDIO = Studio(PIPELINES)
SERVICE = Service(STUDIO)
MAX_QUEUE = 40

HEADER = """# Diffusion models specialised by noise level
Removing the first noise and removing the last are different tasks. In each of these systems an interval of noise levels owns
something: channels (DTR), a mixture of weights (Remix-DiT), of prompts (DMP), a whole model (Patch Diffusion), a guide (PPAP).
Those that come with this page were trained on [Fashion-MNIST](https://arxiv.org/abs/1708.07747), clothes of 28 × 28 pixels."""
# fonts of the visitor's computer: nothing to download
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
    """Generate images with one system, in a grid."""
    values = (system, class_name, count, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("generate", values, http, progress)


def compare(names, class_name, scale, steps, scheduler, seed, randomise, http: gr.Request, progress=PROGRESS) -> tuple:
    """Generate images with several systems from the same noise."""
    values = (names, class_name, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("compare", values, http, progress)


def specialise(system, timestep, http: gr.Request, progress=PROGRESS) -> tuple:
    """Show which part of a system is at work at a timestep."""
    return SERVICE.run("specialise", (system, timestep), http, progress)


def guide(class_name, count, scale, steps, scheduler, seed, randomise, http: gr.Request, progress=PROGRESS) -> tuple:
    """Generate images without guidance by experts and with it."""
    values = (class_name, count, scale, steps, scheduler, seed, randomise)
    return SERVICE.run("guide", values, http, progress)


def class_update(names: "str | list[str]") -> gr.Dropdown:
    """Update the list of classes to those that all chosen systems know."""
    names = [names] if isinstance(names, str) else names
    return gr.Dropdown(STUDIO.class_choices(names) if names else [ALL_CLASSES], value=ALL_CLASSES)


def system_dropdown() -> gr.Dropdown:
    """Return a choice of one system."""
    return gr.Dropdown([(shown.title, name) for name, shown in PIPELINES.items()], label="System")


def class_dropdown(names: list[str]) -> gr.Dropdown:
    """Return a choice of the classes that all of these systems know."""
    return gr.Dropdown(STUDIO.class_choices(names), value=ALL_CLASSES, label="Class")


def count_slider() -> gr.Slider:
    """Return a choice of the number of images."""
    return gr.Slider(1, MAX_IMAGES, 20, step=1, label="Images")


def sampling_controls(scale: float, scale_info: str, steps: int, scheduler: str) -> list[gr.components.Component]:
    """Return the controls of scale, steps, scheduler and seed, and of whether to randomise the seed."""
    return [
        gr.Slider(0, MAX_SCALE, scale, step=0.1, label="Guidance scale", info=scale_info),
        gr.Slider(1, MAX_STEPS, steps, step=1, label="Steps"),
        gr.Dropdown(list(SCHEDULERS), value=scheduler, label="Scheduler"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
        gr.Checkbox(True, label="Randomise the seed"),
    ]


def picture(name: str, label: str, value: "str | None", **options) -> gr.Image:
    """Return an image that visitors can download but not change."""
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
    """Return the examples whose pictures were made by the pipelines that are shown now."""
    return [
        example
        for example in EXAMPLES[request]
        if all(name in PIPELINES and PIPELINES[name].is_shipped for name in example.systems)
    ]


def first_pictures(request: str, count: int) -> list[str | None]:
    """Return the pictures that a tab shows at first."""
    examples = shipped(request)
    return [str(path) for path in examples[0].paths(count)] if examples else [None] * count


def captioned(example: Example) -> list[tuple[str, str]]:
    """Return a comparison's pictures with the titles of their systems."""
    paths = example.paths(len(example.systems))
    return [(str(path), PIPELINES[name].title) for path, name in zip(paths, example.systems)]


def add_examples(request: str, inputs: list, outputs: list, answers: Callable[[Example], list]) -> None:
    """Add buttons that fill in a request and its answer, which was generated before."""
    examples = shipped(request)
    if examples:
        rows = [[*example.values, *answers(example), f"Example: {example.label}."] for example in examples]
        labels = [example.label for example in examples]
        gr.Examples(rows, inputs + outputs, example_labels=labels, label="Examples", api_visibility="private")


def on_request(events: list[Callable], handler: Callable, inputs: list, pictures: list, others: list) -> None:
    """Connect events with a handler, whose name becomes the name in the API."""
    gr.on(
        events,
        handler,
        inputs,
        pictures + others,
        api_name=handler.__name__,
        concurrency_id="models",  # all tabs share the models: one job at a time
        concurrency_limit=1,
        trigger_mode="once",
        show_progress_on=pictures,
        scroll_to_output=True,  # on a phone the picture is above the button
        validator=SERVICE.validator(handler.__name__),
        preprocess=False,  # the validator checks all values, with messages of one kind
    )


def generate_tab() -> None:
    """Build the tab 'Generate'."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            system = system_dropdown()
            class_name = class_dropdown([next(iter(PIPELINES))])
            count = count_slider()
            sampling = sampling_controls(
                next(iter(PIPELINES.values())).default_scale, "1 is none, for PPAP 0", 25, "DDPM"
            )
            button = gr.Button("Generate", variant="primary", elem_id="generate-button")
        with gr.Column(scale=3, min_width=300, elem_classes="answer"):
            grid = picture("generate-picture", "Images", *first_pictures("generate", 1))
            sentence = gr.Markdown(elem_id="generate-sentence")
            inputs = [system, class_name, count, *sampling]
            add_examples(
                "generate", inputs, [grid, sentence], lambda example: [str(path) for path in example.paths(1)]
            )
    system.input(class_update, system, class_name, api_visibility="private")
    system.input(lambda name: PIPELINES[name].default_scale, system, sampling[0], api_visibility="private")
    on_request([button.click], generate, inputs, [grid], [sampling[3], sentence])


def compare_tab() -> None:
    """Build the tab 'Compare'."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            titles = [(shown.title, name) for name, shown in PIPELINES.items()]
            names = gr.CheckboxGroup(titles, value=list(PIPELINES), label="Systems")
            class_name = class_dropdown(list(PIPELINES))
            info = f"1 is none; PPAP's experts guide with {EXPERTS_SCALE:g} here"
            sampling = sampling_controls(CLASSIFIER_FREE_SCALE, info, 25, "DDPM")
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
            inputs = [names, class_name, *sampling]
            add_examples("compare", inputs, [gallery, sentence], lambda example: [captioned(example)])
    names.input(class_update, names, class_name, api_visibility="private")
    on_request([button.click], compare, inputs, [gallery], [sampling[3], sentence])


def specialise_tab() -> None:
    """Build the tab 'Specialisation'."""
    system = system_dropdown()
    longest = max(shown.num_train_timesteps for shown in PIPELINES.values())
    timestep = gr.Slider(
        0,
        longest - 1,
        longest // 2,
        step=1,
        label="Timestep",
        info="0 is almost clean, the right end almost pure noise",
    )
    button = gr.Button("Show", variant="primary", elem_id="specialise-button")
    sentence = gr.Markdown(elem_id="specialise-sentence")
    plots = picture("specialise-picture", "Which part works when", *first_pictures("specialise", 1))
    events = [button.click, timestep.release, system.input]
    on_request(events, specialise, [system, timestep], [plots], [sentence])


def guide_tab() -> None:
    """Build the tab 'Guide'."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            class_name = class_dropdown([STUDIO.guides[0].name])
            count = count_slider()
            sampling = sampling_controls(EXPERTS_SCALE, "Scale of the experts' guidance; 0 is none", 25, "DDPM")
            button = gr.Button("Guide", variant="primary", elem_id="guide-button")
        with gr.Column(scale=3, min_width=300, elem_classes="answer"):
            gr.Markdown(
                "An unconditional model was trained without classes. A classifier's experts on noisy images guide it."
            )
            before, after = first_pictures("guide", 2)
            with gr.Row():
                unguided = picture("guide-unguided", "Unguided", before, min_width=140)
                guided = picture("guide-picture", "Guided", after, min_width=140)
            sentence = gr.Markdown()
            inputs = [class_name, count, *sampling]
            add_examples(
                "guide", inputs, [unguided, guided, sentence], lambda example: [str(path) for path in example.paths(2)]
            )
    on_request([button.click], guide, inputs, [unguided, guided], [sampling[3], sentence])


def build() -> gr.Blocks:
    """Build the page."""
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
