import pytest

from openrlhf.errors import DataError, NumericError
from openrlhf.rollout.reward_result import RewardResult
from openrlhf.rollout.reward_source import RewardFunction

QUERIES, PROMPTS, LABELS = ["q1", "q22", "q333"], ["p1", "p2", "p3"], ["1", "2", "3"]


@pytest.fixture
def reward_file(tmp_path):
    """Return a function that writes the lines of a reward file and gives its path."""

    def write(*lines):
        path = tmp_path / "my_reward.py"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def score(path, **options):
    return RewardFunction(path).score(QUERIES, PROMPTS, LABELS, **options)


@pytest.mark.parametrize(
    ("signature", "expression", "expected"),
    [
        ("queries, prompts", "[len(q) for q in queries]", [2.0, 3.0, 4.0]),
        ("queries, prompts, labels", "[float(label) for label in labels]", [1.0, 2.0, 3.0]),
        ("queries, prompts, labels, **kwargs", "[float(label) for label in labels]", [1.0, 2.0, 3.0]),
        ("queries, prompts, *, labels", "[float(label) for label in labels]", [1.0, 2.0, 3.0]),
        ("queries, prompts, **kwargs", "[float(label) for label in kwargs['labels']]", [1.0, 2.0, 3.0]),
        ("queries, prompts, extra=None", "[float(label) for label in extra]", [1.0, 2.0, 3.0]),
        ("*columns", "[float(label) for label in columns[2]]", [1.0, 2.0, 3.0]),
    ],
)
def test_every_signature_in_use_is_called_the_way_it_asks(reward_file, signature, expression, expected):
    assert score(reward_file(f"def reward_func({signature}):", f"    return {expression}")).rewards == expected


@pytest.mark.parametrize(
    "expression",
    ["[1, 2, 3]", "(1.0, 2.0, 3.0)", "torch.tensor([1., 2., 3.])", "torch.tensor([[1.], [2.], [3.]])",
     "[torch.tensor(1.), torch.tensor(2), torch.tensor([3.])]", "numpy.array([1, 2, 3])"],
)  # fmt: skip
def test_tensors_arrays_and_lists_give_the_same_rewards(reward_file, expression):
    path = reward_file("import numpy, torch", "def reward_func(queries, prompts):", f"    return {expression}")
    assert score(path) == RewardResult([1.0, 2.0, 3.0])


def test_true_and_false_are_one_and_zero(reward_file):
    path = reward_file("def reward_func(queries, prompts):", "    return [q == 'q22' for q in queries]")
    assert score(path).rewards == [0.0, 1.0, 0.0]


def test_a_dict_brings_scores_and_logs(reward_file):
    path = reward_file(
        "import torch",
        "def reward_func(queries, prompts, labels, **kwargs):",
        "    return {'rewards': torch.ones(3), 'scores': [0, 1, 0], 'extra_logs': {'len': [2, 3, 4], 'all': 7}}",
    )
    result = score(path)
    assert result.rewards == [1.0, 1.0, 1.0]
    assert result.extra == {"scores": [0.0, 1.0, 0.0], "len": [2.0, 3.0, 4.0], "all": [7.0, 7.0, 7.0]}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("[1, 2]", "should give 3 rewards, one a query; it gave 2"),
        ("0.5", "should give 3 rewards, one a query; it gave one float"),
        ("None", "it gave one NoneType"),
        ("['1', '2', '3']", "numbers as rewards; query 0 got str"),
        ("[1, None, 3]", "numbers as rewards; query 1 got NoneType"),
        ("[[1, 2], [3, 4], [5, 6]]", "query 0 got list"),
        ("{'reward': [1, 2, 3]}", "a dict without 'rewards'; keys: reward"),
        ("{'rewards': [1, 2, 3], 'extra_logs': {'a': [1]}}", "should give 3 a, one a query; it gave 1"),
        ("{'rewards': [1, 2, 3], 'extra_logs': [1]}", "'extra_logs' of reward_func is a dict; found list"),
    ],
)
def test_a_wrong_result_names_the_file_what_was_expected_and_what_came(reward_file, expression, message):
    path = reward_file("def reward_func(queries, prompts):", f"    return {expression}")
    with pytest.raises(DataError, match=message) as caught:
        score(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite_names_the_uids(reward_file, value):
    path = reward_file("def reward_func(queries, prompts):", f"    return [1, float('{value}'), 2]")
    with pytest.raises(NumericError, match=f"not finite: uid 8: {value}"):
        score(path, uids=["7", "8", "9"])


def test_an_exception_names_file_line_and_query(reward_file):
    path = reward_file(
        "def reward_func(queries, prompts, labels):",
        "    return [value(query) for query in queries]",
        "def value(query):",
        "    return {'q1': 1.0, 'q333': 2.0}[query]",
    )
    with pytest.raises(
        DataError, match=r"my_reward.py:4: reward_func raised KeyError: 'q22' for uid b: 'q22'"
    ) as caught:
        score(path, uids=["a", "b", "c"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("alone", ["[1]", "[][1]"])
def test_an_exception_that_only_the_batch_raises_names_no_query(reward_file, alone):
    path = reward_file(
        "def reward_func(queries, prompts):",
        "    if len(queries) == 1:",
        f"        return {alone}",
        "    return [1 / 0]",
    )
    with pytest.raises(DataError, match="my_reward.py:4: reward_func raised ZeroDivisionError: division by zero$"):
        score(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["def reward_fn(queries, prompts): pass"], "defines no reward_func; it has 'reward_fn'; write reward_func"),
        (["x = 1", "y = x / 0"], r"my_reward.py:2: the file fails to load: ZeroDivisionError"),
        (["x = 1", "def ("], r"my_reward.py:2: the file fails to load: SyntaxError"),
        (["def reward_func(query): pass"], r"reward_func\(query\) cannot be called; write reward_func"),
        (["def reward_func(a, b, c, d): pass"], r"reward_func\(a, b, c, d\) cannot be called"),
        (["async def reward_func(queries, prompts): pass"], "should be an ordinary function"),
        (["reward_func = 3"], "should be an ordinary function"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_when_it_is_loaded(reward_file, lines, message):
    with pytest.raises(DataError, match=message):
        RewardFunction(reward_file(*lines))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        RewardFunction(tmp_path / "nowhere.py")


def test_without_labels_the_function_gets_empty_strings(reward_file):
    path = reward_file("def reward_func(queries, prompts, labels):", "    return [len(label) for label in labels]")
    assert RewardFunction(path).score(QUERIES, PROMPTS).rewards == [0.0, 0.0, 0.0]
