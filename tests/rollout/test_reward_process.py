"""A reward function in a process of its own: whatever it does, the driver gets rewards or one clear error, in time."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from openrlhf.errors import DataError, NumericError
from openrlhf.rollout.reward_process import RewardProcess
from openrlhf.rollout.reward_result import RewardResult
from tests.cli.supervised import ROOT, environment
from tests.rollout.fake_reward_server import interrupted_after

QUERIES, PROMPTS, LABELS = ["q1", "q22", "q333"], ["p1", "p2", "p3"], ["1", "2", "3"]


@pytest.fixture
def started(tmp_path):
    """Return a function that starts the process of a reward file with these lines; ended with the test."""
    processes = []

    def start(*lines, timeout_s=20.0):
        path = tmp_path / f"reward{len(processes)}.py"
        path.write_text("\n".join(lines) + "\n")
        processes.append(RewardProcess(path, timeout_s))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def score(process, **options):
    return process.score(QUERIES, PROMPTS, LABELS, **options)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_rewards_scores_and_logs_come_back(started):
    process = started(
        "import torch",
        "def reward_func(queries, prompts, labels, **kwargs):",
        "    print('a function may print')",
        "    rewards = torch.tensor([float(label) for label in labels])",
        "    return {'rewards': rewards, 'scores': [1, 0, 1], 'extra_logs': {'length': [len(q) for q in queries]}}",
    )
    expected = RewardResult([1.0, 2.0, 3.0], {"scores": [1.0, 0.0, 1.0], "length": [2.0, 3.0, 4.0]})
    assert score(process) == expected and score(process) == expected


def test_the_old_signature_and_a_call_without_labels_work(started):
    process = started("def reward_func(queries, prompts): return [len(query) for query in queries]")
    assert process.score(["a\ud800", "é\n"], ["", ""]).rewards == [2.0, 2.0]


def test_the_process_keeps_what_the_file_keeps_and_is_not_this_one(started):
    process = started(
        "import os",
        "calls = []",
        "def reward_func(queries, prompts):",
        "    calls.append(1)",
        "    return {'rewards': [len(calls)] * len(queries), 'extra_logs': {'pid': os.getpid()}}",
    )
    first, second = score(process), score(process)
    assert (first.rewards, second.rewards) == ([1.0] * 3, [2.0] * 3)
    assert first.extra["pid"] == second.extra["pid"] != [float(os.getpid())] * 3


HANGS = {
    "a loop": "    while True: pass",
    "sleep": "    import time; time.sleep(60)",
    "a regular expression": "    import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a deaf loop": "    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    while True: pass",
    "a thread that waits": "    import threading; threading.Event().wait()",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_call_that_never_returns_is_ended_and_shown(started, how):
    lines = ["import os", "def reward_func(queries, prompts):", "    if queries[0] == 'fine': return [1.0]"]
    process = started(*lines, HANGS[how], timeout_s=1.0)
    asked = time.monotonic()
    with pytest.raises(DataError, match="did not answer within 1 s and was ended.*--reward_func_timeout") as caught:
        score(process)
    assert time.monotonic() - asked < 20
    assert f'File "{process.path}", line ' in str(caught.value) and "in reward_func" in str(caught.value)
    assert process.score(["fine"], [""]).rewards == [1.0], "another process answers the next call"


def test_a_file_that_never_loads_is_ended_too(started):
    with pytest.raises(DataError, match=r"did not load within 1 s(.|\n)*line 2 in <module>"):
        started("x = 1", "while True: pass", timeout_s=1.0)


ENDS = {
    "os._exit": ("    os._exit(7)", r"ended its process \(exit status 7\)"),
    "a signal": ("    os.kill(os.getpid(), 9)", r"ended its process \(signal SIGKILL\)"),
    "a crash": (
        "    import ctypes; ctypes.string_at(0)",
        r"ended its process \(signal SIGSEGV\)(.|\n)*Segmentation fault(.|\n)*line 4 in reward_func",
    ),
    "sys.exit": ("    raise SystemExit(3)", r"raised SystemExit: 3\n(.|\n)*line 4, in reward_func"),
    "an exception": ("    return [1 / 0]", r":4: reward_func raised ZeroDivisionError(.|\n)*line 4, in reward_func"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_call_that_ends_its_process_is_one_error(started, how):
    line, says = ENDS[how]
    process = started("import os", "def reward_func(queries, prompts):", "    if len(queries) < 3: return [1.0]", line)
    with pytest.raises(DataError, match=says):
        score(process)
    assert process.score(["fine"], [""]).rewards == [1.0]


def test_an_exception_names_the_query_and_shows_its_way_through_the_file(started):
    process = started(
        "def reward_func(queries, prompts, labels):",
        "    return [value(query) for query in queries]",
        "def value(query):",
        "    return {'q1': 1.0, 'q333': 2.0}[query]",
    )
    with pytest.raises(DataError, match=":4: reward_func raised KeyError: 'q22' for uid b: 'q22'\n") as caught:
        score(process, uids=["a", "b", "c"])
    text = str(caught.value)
    assert text.index("line 2, in reward_func") < text.index("line 4, in value") and "reward_worker" not in text


@pytest.mark.parametrize(
    ("expression", "error", "says"),
    [
        ("[1, 2]", DataError, "should give 3 rewards, one a query; it gave 2"),
        ("None", DataError, "it gave one NoneType"),
        ("[1, '2', 3]", DataError, "uid b got str"),
        ("{'reward': [1, 2, 3]}", DataError, "a dict without 'rewards'"),
        ("[1, float('nan'), 2]", NumericError, "not finite: uid b: nan"),
        ("[1, 2, 1e39]", NumericError, "not finite: uid c: 1e[+]39"),
    ],
)
def test_a_wrong_result_is_refused(started, expression, error, says):
    process = started("def reward_func(queries, prompts):", f"    return {expression}")
    with pytest.raises(error, match=f"{process.path}.*{says}"):
        score(process, uids=["a", "b", "c"])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["def reward_fn(queries, prompts): pass"], "defines no reward_func; it has 'reward_fn'"),
        (["x = 1", "y = x / 0"], ":2: the file fails to load: ZeroDivisionError"),
        (["import sys", "sys.exit('no')"], "raised SystemExit: no"),
        (["import nowhere_at_all"], "No module named 'nowhere_at_all'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(started, lines, says):
    with pytest.raises(DataError, match=says):
        started(*lines)


def test_random_numbers_repeat_with_the_state_of_the_run(started):
    process = started(
        "import random, numpy",
        "def reward_func(queries, prompts):",
        "    return [random.random() + numpy.random.rand() for _ in queries]",
    )
    random.seed(4)
    first, second = score(process), score(process)
    process.close()
    random.seed(4)
    assert [score(process), score(process)] == [first, second] and first != second


def test_a_call_from_another_thread_works_with_alarms_inside(started):
    process = started(
        "import signal",
        "def reward_func(queries, prompts):",
        "    signal.alarm(5); signal.alarm(0)",
        "    return [1.0] * len(queries)",
    )
    found = []
    thread = threading.Thread(target=lambda: found.append(score(process).rewards))
    thread.start()
    thread.join(20)
    assert found == [[1.0] * 3]


def test_keys_are_kept_back_but_for_those_that_are_named(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(
        "import os\ndef reward_func(queries, prompts): return [float(query in os.environ) for query in queries]\n"
    )
    for name in ("MY_API_KEY", "OTHER_SECRET", "HARMLESS"):
        monkeypatch.setenv(name, "x")
    process = RewardProcess(tmp_path / "reward.py", 20.0, ["MY_API_KEY"])
    assert process.score(["MY_API_KEY", "OTHER_SECRET", "HARMLESS"], [""] * 3).rewards == [1.0, 0.0, 1.0]
    process.close()


CHILD = "    import subprocess; child = subprocess.Popen(['sleep', '60'])"


def test_nothing_is_left_of_it(started):
    lines = ["import os", "def reward_func(queries, prompts):", CHILD]
    process = started(*lines, "    return {'rewards': [1.0] * 3, 'extra_logs': {'a': child.pid, 'b': os.getpid()}}")
    extra = score(process).extra
    process.close()
    assert ended(int(extra["a"][0])) and ended(int(extra["b"][0]))


def test_the_process_ends_with_its_object(tmp_path):
    (tmp_path / "r.py").write_text(
        "import os\ndef reward_func(queries, prompts): return [os.getpid()] * len(queries)\n"
    )
    process = RewardProcess(tmp_path / "r.py")
    pid = int(score(process).rewards[0])
    assert is_running(pid)
    del process
    gc.collect()
    assert ended(pid)


def test_large_requests_and_answers_pass(started):
    process = started(
        "def reward_func(queries, prompts):",
        "    logs = {f'n{k}': [k] * len(queries) for k in range(40)}",
        "    return {'rewards': [len(query) for query in queries], 'extra_logs': logs}",
    )
    queries = ["x" * number for number in range(3000)]
    result = process.score(queries, [""] * 3000)
    assert result.rewards == [float(number) for number in range(3000)] and result.extra["n39"] == [39.0] * 3000


WAITS = ["import time", "def reward_func(queries, prompts):", "    time.sleep(0 if queries[0] == 'fine' else 60)"]


def test_a_signal_interrupts_the_wait_and_the_next_call_works(started):
    process = started(*WAITS, "    return [1.0] * len(queries)", timeout_s=60.0)
    with interrupted_after(0.5), pytest.raises(KeyboardInterrupt):
        score(process)
    assert process.score(["fine"], [""]).rewards == [1.0]


DRIVER = """
import sys, time
from openrlhf.rollout.reward_process import RewardProcess
process = RewardProcess(sys.argv[1], 3.0)
print(int(process.score(["fine"], [""]).rewards[0]), flush=True)
process.score([sys.argv[2]], [""])
time.sleep(60)
"""


@pytest.mark.parametrize("then", ["fine", "hang"])
def test_a_driver_that_is_killed_leaves_no_process_behind(tmp_path, then):
    lines = ["import os", *WAITS, "    return [os.getpid()] * len(queries)"]
    (tmp_path / "reward.py").write_text("\n".join(lines))
    words = [sys.executable, "-c", DRIVER, str(tmp_path / "reward.py"), then]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as driver:
        pid = int(driver.stdout.readline())
        time.sleep(0.3)
        assert is_running(pid)
        driver.kill()
    assert ended(pid, seconds=20.0)
