"""vLLM engines as one engine that lasts: an actor that dies or hangs is replaced, and does its work again.

A sample is a function of its seed, so what a new engine draws, with the present weights, is what the lost one would
have drawn; answers of the other engines are kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from openrlhf.errors import InfraError, OpenRLHFError
from openrlhf.ray.obituary import one_line
from openrlhf.ray.slots import Slots
from openrlhf.ray.vllm_actor import start_engine
from openrlhf.ray.watch import Watch
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.trainer.ppo.groups import deal

LOG = logging.getLogger(__name__)
SILENT_S = 10.0
"""After how long an engine that answers no ping, or stands still in a call, is replaced. Loading may take longer."""
LOSSES = 3
"""How many times one engine is replaced before it has answered prompts again."""
FAILURES = 1
"""How many times when it did not die but raised: a prompt may be to blame, and would fail the next one too."""
SHOWN_PROMPTS = 16


class Seat:
    """The place of one engine, and the actor that sits there now; nobody while an engine that was lost asleep is not
    asked for anything, because others use the memory that a new one would load into.

    Args:
        slots: where engines run.
        index: which of them this one is.
        watch: looks after the actor.
        weights: starts the publishing of the present weights; returns a future of their buckets, and their version.
    """

    def __init__(self, slots: Slots, index: int, watch: Watch, weights: Callable[[], tuple[Any, int]]):
        self.name = f"vLLM engine {index}"
        self._slots, self._index, self._watch, self._weights = slots, index, watch, weights
        self._model: tuple[str, dict[str, Any]] | None = None
        self._call: tuple[str, tuple] | None = None
        self._answer: Any = None
        self._awaited: list[tuple[str, Any]] = []
        self._current = False
        self._empty = False
        self._losses, self._lost_at = 0, 0.0
        self._sit()

    def load(self, model_path: str, options: dict[str, Any]) -> Any:
        """Begin to load the model; return a future."""
        self._model = (model_path, options)
        self._queue("setup", *self._model)
        return self._awaited[-1][1]

    def ask(self, method: str, *arguments: Any) -> None:
        """Begin a call of the engine; it is done when :attr:`waits_for` is empty."""
        if self._empty and (method, *arguments) == ("call", "sleep"):
            return
        self._call = (method, arguments)
        if self._empty:
            self._refill()
        self._begin()

    @property
    def waits_for(self) -> list[Any]:
        """Futures that stand before the answer."""
        return [future for _, future in self._awaited] if self._call else []

    def take(self) -> Any:
        """Return the answer."""
        answer, self._answer = self._answer, None
        return answer

    def hear(self, done: Sequence[Any]) -> None:
        """Take what has come of :attr:`waits_for`. Raises what the call raised, unless it is the engine's failure."""
        while self._awaited and self._awaited[0][1] in done:
            method, future = self._awaited[0]
            try:
                value = ray.get(future)
            except RayError as error:
                self._fail(method, error)
                return
            self._awaited.pop(0)
            self._note(method, value)

    def replace(self, why: str, most: int = LOSSES) -> None:
        """Put a new actor in the place of the one that is lost, which does its work again.

        One that may sleep and is asked for nothing leaves the place empty until the next call.

        Raises:
            InfraError: too many were lost since this engine last answered prompts.
        """
        self._losses += 1
        asked = f" while it was asked to {self._doing()}" if self._call else ""
        if self._losses > most:
            raise InfraError(f"{self.name} was lost {self._losses} times{asked}. The last time: {why}")
        self._empty = self._call is None and self._model[1].get("sleep", False)
        then = "a new one starts when it is needed" if self._empty else "starting a new one"
        LOG.warning("%s was lost%s; %s. %s", self.name, asked, then, why)
        self._lost_at = time.monotonic()
        self._watch.forget(self._watched)
        ray.kill(self.actor)
        self._awaited, self._current = [], False
        if self._empty:
            return
        self._refill()
        if self._call:
            self._begin()

    def _refill(self) -> None:
        """Start a new engine, which loads the model."""
        self._empty = False
        self._sit()
        self._queue("setup", *self._model)

    def _doing(self) -> str:
        """Return the call that is under way, for a message; a prompt of it may be to blame."""
        method, arguments = self._call
        if method != "generate":
            return arguments[0] if method == "call" else method
        uids = [prompt.uid for prompt in arguments[0]]
        more = f" and {len(uids) - SHOWN_PROMPTS} more" if len(uids) > SHOWN_PROMPTS else ""
        return f"answer prompts {', '.join(uids[:SHOWN_PROMPTS])}{more}"

    def _sit(self) -> None:
        self.actor = start_engine(self._slots, self._index)
        # While the run starts there is nothing to keep: a loss ends it.
        self._watched = self._watch.add(self.actor, self.name, self.replace if self._model else None)

    def _begin(self) -> None:
        method, arguments = self._call
        if method == "generate" and not self._current:
            self._queue("update_weights", *self._weights())
        self._queue(method, *arguments)

    def _queue(self, method: str, *arguments: Any) -> None:
        """Send a call; the actor does one after the other."""
        self._awaited.append((method, getattr(self.actor, method).remote(*arguments)))

    def _note(self, method: str, value: Any) -> None:
        self._watched.limit_s, self._watched.on_loss = min(SILENT_S, self._watch.timeout_s), self.replace
        self._current = self._current or method == "update_weights"
        if self._lost_at and self._current:
            LOG.info("%s serves again, %.1f s after it was lost", self.name, time.monotonic() - self._lost_at)
            self._lost_at = 0.0
        if self._awaited or not self._call or method != self._call[0]:
            return
        self._call, self._answer = None, value
        if method == "generate":
            self._losses = 0

    def _fail(self, method: str, error: RayError) -> None:
        """Replace the engine when ``error`` means that it is broken; else raise what it means."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        mine = not isinstance(cause, RayActorError) or cause.actor_id == self._watched.key
        broken = method == "setup" or isinstance(cause, InfraError) or not isinstance(cause, OpenRLHFError)
        if not mine or not broken:
            raise self._watch.translate(error) from None
        if isinstance(cause, RayActorError):
            self.replace(str(self._watch.translate(error)))
        else:
            LOG.debug("%s failed", self.name, exc_info=error)
            self.replace(f"{type(cause).__name__}: {one_line(cause)}", FAILURES)


class RayEngines:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` of several vLLM actors; each gets a contiguous list."""

    def __init__(self, slots: Slots, watch: Watch):
        self.watch = watch
        self._publish: Callable[[], Any] | None = None
        self._published: Any = None
        self._version = 0
        self.seats = [Seat(slots, index, watch, self._weights) for index in range(len(slots.bundles))]

    def setup(self, model_path: str, **options: Any) -> list[Any]:
        """Load ``model_path`` in every engine (options of ``VLLMEngine``); return futures."""
        return [seat.load(model_path, options) for seat in self.seats]

    def take_weights_from(self, publish: Callable[[], Any]) -> None:
        """Call ``publish`` where a new engine needs the present weights; it returns a future of their buckets."""
        self._publish = publish

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, in the order of ``prompts``."""
        shares = deal(prompts, len(self.seats))
        asked = [(seat, share) for seat, share in zip(self.seats, shares, strict=True) if share]
        for seat, share in asked:
            seat.ask("generate", share, sampling)
        rollouts = [rollout for answers in self._answers([seat for seat, _ in asked]) for rollout in answers]
        self._check(rollouts)
        return rollouts

    def update_weights(self, buckets: list[Any], version: int) -> None:
        """Give every engine the same buckets, by reference; return when all of them serve ``version``."""
        self._version = version
        self._all("update_weights", buckets, version)

    def sleep(self) -> None:
        """Give device memory back, where engines were started to do so."""
        self._all("call", "sleep")

    def wake_up(self, part: str) -> None:
        """Take a part of the memory back."""
        self._all("call", "wake_up", part)

    def _all(self, method: str, *arguments: Any) -> None:
        for seat in self.seats:
            seat.ask(method, *arguments)
        self._answers(self.seats)

    def _answers(self, asked: list[Seat]) -> list[Any]:
        """Return the answers of those who were asked, as soon as all of them have answered."""
        while pending := [future for seat in asked for future in seat.waits_for]:
            done = self.watch.turn(pending)
            for seat in asked:
                seat.hear(done)
        self._published = None
        return [seat.take() for seat in asked]

    def _weights(self) -> tuple[Any, int]:
        """Return a future of the present weights and their version; engines that are lost together share it."""
        if self._published is None:
            self._published = self._publish()
        return self._published, self._version

    def _check(self, rollouts: list[Rollout]) -> None:
        """Raise InfraError when an engine answered with other weights than those it was last given."""
        versions = {rollout.policy_version for rollout in rollouts} - {self._version}
        if versions:
            found = ", ".join(map(str, sorted(versions)))
            raise InfraError(f"an engine served the weights of version {found}; the present ones are {self._version}")
