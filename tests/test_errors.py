"""What a command ends with."""

import pickle

import pytest

from openrlhf import errors

EXIT_CODES = {
    "OpenRLHFError": 1,
    "UsageError": 2,
    "DataError": 3,
    "InfraError": 4,
    "NumericError": 5,
    "Preempted": 143,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_each_kind_of_error_has_its_own_exit_status(name, code):
    kind = getattr(errors, name)
    assert kind.exit_code == code
    assert issubclass(kind, errors.OpenRLHFError)


def test_every_error_of_the_module_is_in_the_table():
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds == set(EXIT_CODES)


def test_a_usage_error_takes_one_problem_or_several():
    assert errors.UsageError("--a is wrong").problems == ["--a is wrong"]
    several = errors.UsageError(problem for problem in ("--a is wrong", "--b is wrong"))
    assert several.problems == ["--a is wrong", "--b is wrong"]
    assert str(several) == "--a is wrong\n--b is wrong"


@pytest.mark.parametrize(
    "error",
    [
        errors.UsageError(["--a", "--b"]),
        errors.InfraError("rank 1 is missing"),
        errors.NumericError("the loss is nan", [3, 7]),
    ],
)
def test_errors_survive_the_way_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
