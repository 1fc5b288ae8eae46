"""Between Gradio and the studio: one job per user at a time, progress, and nothing but plain words to the outside."""

import logging
import threading
import time
from collections.abc import Callable

import gradio as gr
from checks import Refusal, shown
from fastapi import Request
from fastapi.responses import JSONResponse
from gradio.route_utils import FnIndexInferError
from studio import Studio

try:  # Hugging Face's package, not this folder; it is to be imported before a model is moved
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        """There is no ZeroGPU, which would lend a GPU to each call."""
        return function


log = logging.getLogger("diffusers_dmp.space")
FORGOTTEN_AFTER = 60.0  # seconds, since Gradio does not tell of a job that was cancelled in the queue
UNEXPECTED = (
    "Something went wrong on the server; it was written to its log. Please try again, with other settings if need be."
)


def unknown_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Gradio has no words for it."""
    known = "generate, compare, specialise or guide"
    return JSONResponse({"detail": f"Expected the endpoint to be {known}, but got {shown(request.url.path)}."}, 404)


# Of the web server under Gradio; the second is an unknown number instead of a name.
EXCEPTION_HANDLERS = {FnIndexInferError: unknown_endpoint, KeyError: unknown_endpoint}


class Turnstile:
    """Who has a job in the queue: a courtesy among users, not a defence."""

    def __init__(self):
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    def enter(self, user: str) -> bool:
        """Whether the user had none, and now has one."""
        with self._lock:
            now = time.monotonic()
            self._since = {each: since for each, since in self._since.items() if now - since < FORGOTTEN_AFTER}
            if user in self._since:
                return False
            self._since[user] = now
            return True

    def leave(self, user: str) -> None:
        """The job is done, or will never be."""
        with self._lock:
            self._since.pop(user, None)


def user_of(http: gr.Request) -> str:
    """A browser's tab or a client has a session; a bare HTTP call has its address only, which a Space's proxy passes on."""
    state = http.request.state  # of one HTTP call: a bare one is given a session between its validator and its job
    if not hasattr(state, "user"):
        forwarded = http.headers.get("x-forwarded-for", "").split(",")[-1].strip()  # what the nearest proxy has seen
        state.user = http.session_hash or forwarded or http.client.host
    return state.user


class Service:
    """
    The studio's requests, as Gradio's events ask for them with inputs as they come (`preprocess=False`).

    Args:
        studio ([`Studio`]): Called for one event at a time: they share a `concurrency_id`.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.turnstile = Turnstile()
        self._carry_out = on_gpu(self._carry_out)

    def validator(self, name: str) -> Callable:
        """What runs before a job is queued: nobody waits for a refusal."""

        def validate(http: gr.Request, *values):
            problems = self.studio.examine(name, values)[1]
            if not any(problems) and not self.turnstile.enter(user_of(http)):
                problems[0] = "Expected one job at a time, but got another one; please wait for the first."
            return [gr.validate(problem is None, problem or "") for problem in problems]

        return validate

    def run(self, name: str, values: tuple, http: gr.Request, progress: gr.Progress) -> tuple:
        """
        Carry out what was queued.

        Raises:
            gr.Error: in plain words, whatever went wrong.
        """
        try:
            return self._carry_out(name, values, progress)
        finally:
            self.turnstile.leave(user_of(http))

    def forget(self, http: gr.Request) -> None:
        """A browser's tab was closed: what it had queued never runs."""
        self.turnstile.leave(user_of(http))

    def _carry_out(self, name: str, values: tuple, progress: gr.Progress) -> tuple:
        """In a process of its own on ZeroGPU, out of which only Gradio's errors come as they are."""

        def on_step(done: int, steps: int) -> None:
            progress((done, steps), desc="Denoising", unit="steps")

        try:
            return getattr(self.studio, name)(*values, on_step=on_step)
        except Refusal as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        except Exception as error:
            log.exception("%s%r", name, values)
            raise gr.Error(UNEXPECTED, print_exception=False) from error
