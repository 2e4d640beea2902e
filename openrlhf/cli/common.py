"""What every command does around its work: read flags, print the plan, turn an error into one message."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from openrlhf import device
from openrlhf.config.arguments import Problems, parse
from openrlhf.config.dialect import Dialect
from openrlhf.config.flags import flag_table
from openrlhf.config.plan import plan_lines
from openrlhf.errors import OpenRLHFError, Preempted, UsageError
from openrlhf.strategy import signals

Plan = Callable[[Any, int], list[str]]


def run(
    config_class: type,
    train: Callable[[Any], object],
    prog: str,
    plan: Plan = plan_lines,
    argv: Sequence[str] | None = None,
    problems: Problems | None = None,
    data: Callable[[Any], Any] | None = None,
) -> None:
    """Parse the command line and call ``train(config)``; with ``--dry_run`` print ``plan(config, ranks)`` instead.

    ``problems(config)`` returns what the command itself finds wrong with its flags; it joins the one message.
    ``data(config)`` reads the training rows, for ``--dry_run --show_samples``.

    An :class:`OpenRLHFError` becomes one message on standard error and the exit status of its type; SIGTERM and SIGINT
    end the run as :mod:`openrlhf.strategy.signals` says. Nothing here imports torch, so a wrong flag is reported at
    once.
    """
    device.configure_threads()
    if argv is None:
        signals.install()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config, dry_run = parse(config_class, words, prog, problems)
        if dry_run:
            if _first_rank():
                print("\n".join(plan(config, int(os.environ.get("WORLD_SIZE", "1")))))
                if data and config.logging.show_samples:
                    _show_samples(config, data)
            return
        from openrlhf.cli.downloads import fetched

        train(fetched(config))
    except KeyboardInterrupt:
        fail(Preempted(f"stopped by {signals.requested() or 'SIGINT'}: no step was lost"))
    except Exception as error:
        ended_by = _told(error)
        if ended_by is None:
            raise
        fail(ended_by, partial(_as_written, config_class, words))


def _as_written(config_class: Any, argv: list[str], text: str) -> str:
    """Return ``text`` with its flags spelled as the command line spells them."""
    names = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    return Dialect(flag_table(config_class)).as_written(text, names)


def _told(error: Exception) -> OpenRLHFError | None:
    """Return an error of ours, or the request to stop whatever failed on the way out; None for a mistake of ours."""
    asked_by = signals.requested()
    if asked_by and not isinstance(error, Preempted):
        return Preempted(f"stopped by {asked_by}; on the way out: {error}")
    return error if isinstance(error, OpenRLHFError) else None


def _show_samples(config: Any, data: Callable[[Any], Any]) -> None:
    """Print three training rows as the model will read them; a dry run stays off the hub."""
    from openrlhf.datasets.preview import sample_lines

    os.environ["HF_HUB_OFFLINE"] = "1"
    print("\n".join(sample_lines(data(config))))


@contextmanager
def libraries_hushed() -> Iterator[None]:
    """Keep the warnings that libraries log when they are imported off the screen, where none speaks of the work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def fail(error: OpenRLHFError, say: Callable[[str], str] = str) -> NoReturn:
    """Print one message and end the process; what is the same on every rank is printed by one.

    ``say`` puts the message in the words of the user.
    """
    if not isinstance(error, (UsageError, Preempted)) or _first_rank():
        print(say(_message(error)), file=sys.stderr, flush=True)
    if _among_ranks():
        # Threads of the collectives would wait for a rank that is gone, or abort an ordinary exit.
        sys.stdout.flush()
        os._exit(error.exit_code)
    raise SystemExit(error.exit_code)


def _among_ranks() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


def _message(error: OpenRLHFError) -> str:
    problems = error.problems if isinstance(error, UsageError) else [str(error)]
    if isinstance(error, Preempted):
        return problems[0]
    if len(problems) == 1:
        return f"error: {problems[0]}"
    head = f"error: {len(problems)} problems; --help lists the flags"
    return "\n".join([head, *(f"  {line}" for line in problems)])


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
