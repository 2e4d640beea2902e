"""The error types of the project. Each carries the exit status that a command ends with."""

from __future__ import annotations

from collections.abc import Iterable


class OpenRLHFError(Exception):
    """Something the user can act on: printed as one message, without a traceback."""

    exit_code = 1


class UsageError(OpenRLHFError):
    """Wrong flags. Takes one problem or several; every problem names its flag and the fix."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return type(self), (self.problems,)


class DataError(OpenRLHFError):
    """Wrong data or a wrong model folder; the message names the file and line, or the key."""

    exit_code = 3


class InfraError(OpenRLHFError):
    """A machine, process, port or disk failed; the message names who is missing."""

    exit_code = 4


class NumericError(OpenRLHFError):
    """A loss, gradient or reward is not finite; raised before the weights change.

    ``rows`` are the numbers of the rows, or of the samples of a rollout, that it came from, where they are known.
    """

    exit_code = 5

    def __init__(self, message: str, rows: Iterable[int] = ()):
        self.rows = tuple(rows)
        super().__init__(message)

    def __reduce__(self):
        return type(self), (str(self), self.rows)


class Preempted(OpenRLHFError):
    """The run was asked to stop (SIGTERM or SIGINT); what is left of it is its last checkpoint."""

    exit_code = 143
