"""The layer between Gradio and the studio: one job per user at a time, progress, and error messages in plain words."""

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

try:  # Hugging Face's package, not this folder; to be imported before a model moves to a GPU
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        """Return the function unchanged, as there is no ZeroGPU to lend it a GPU."""
        return function


log = logging.getLogger("diffusers_dmp.space")
FORGOTTEN_AFTER = 60.0  # seconds; Gradio does not report a job that is cancelled in the queue
UNEXPECTED = (
    "Something went wrong on the server, which has logged it. Please try again, with other settings if necessary."
)


def unknown_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Answer a request for an unknown endpoint, for which Gradio has no message."""
    known = "generate, compare, specialise or guide"
    return JSONResponse({"detail": f"Expected the endpoint to be {known}, but got {shown(request.url.path)}."}, 404)


# For the web server under Gradio. KeyError: an unknown number in the place of an endpoint's name.
EXCEPTION_HANDLERS = {FnIndexInferError: unknown_endpoint, KeyError: unknown_endpoint}


class Turnstile:
    """Lets each user have one job in the queue: a courtesy among users, not a defence."""

    def __init__(self):
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    def enter(self, user: str) -> bool:
        """Let a user in unless they have a job already; return whether they were let in."""
        with self._lock:
            now = time.monotonic()
            self._since = {each: since for each, since in self._since.items() if now - since < FORGOTTEN_AFTER}
            if user in self._since:
                return False
            self._since[user] = now
            return True

    def leave(self, user: str) -> None:
        """Let the user in again: the job is done, or will never run."""
        with self._lock:
            self._since.pop(user, None)


def user_of(http: gr.Request) -> str:
    """Name the user of a call: by the session of a browser's tab or client, else by the address that a Space's proxy passes on."""
    # kept for the call, because Gradio adds a session between the validator and the job of a bare HTTP call
    state = http.request.state
    if not hasattr(state, "user"):
        forwarded = http.headers.get("x-forwarded-for", "").split(",")[-1].strip()  # as the nearest proxy saw it
        state.user = http.session_hash or forwarded or http.client.host
    return state.user


class Service:
    """
    Answers Gradio's events, whose inputs come as they were sent (`preprocess=False`).

    Args:
        studio ([`Studio`]): What answers; called for one event at a time, because all share a `concurrency_id`.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.turnstile = Turnstile()
        self._answer = on_gpu(self._answer)

    def validator(self, name: str) -> Callable:
        """Return the check that runs before a job is queued, so that nobody waits for a refusal."""

        def validate(http: gr.Request, *values):
            problems = self.studio.examine(name, values)[1]
            if not any(problems) and not self.turnstile.enter(user_of(http)):
                problems[0] = "Expected one job at a time, but got a second one; please wait for the first."
            return [gr.validate(problem is None, problem or "") for problem in problems]

        return validate

    def run(self, name: str, values: tuple, http: gr.Request, progress: gr.Progress) -> tuple:
        """
        Answer a queued request.

        Raises:
            gr.Error: for any error, in plain words.
        """
        try:
            return self._answer(name, values, progress)
        finally:
            self.turnstile.leave(user_of(http))

    def forget(self, http: gr.Request) -> None:
        """Forget the jobs of a closed tab, which will never run."""
        self.turnstile.leave(user_of(http))

    def _answer(self, name: str, values: tuple, progress: gr.Progress) -> tuple:
        """Answer a request; on ZeroGPU in a process of its own, from which only Gradio's errors arrive unchanged."""

        def on_step(done: int, steps: int) -> None:
            progress((done, steps), desc="Denoising", unit="steps")

        try:
            return getattr(self.studio, name)(*values, on_step=on_step)
        except Refusal as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        except Exception as error:
            log.exception("%s%r", name, values)
            raise gr.Error(UNEXPECTED, print_exception=False) from error
