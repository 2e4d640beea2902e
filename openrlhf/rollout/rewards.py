"""The rewards of a run that no reward model of its own gives: python files and servers, added up as one source."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf.config.ppo import PPOConfig, RewardConfig
from openrlhf.config.secrets import named_key
from openrlhf.rollout.reward_client import RemoteRewards
from openrlhf.rollout.reward_process import RewardProcess
from openrlhf.rollout.reward_request import Patience
from openrlhf.rollout.reward_result import RewardResult, RewardSource


class SummedRewards:
    """The weighted sum of several sources of rewards.

    With more than one source it logs what each gives as ``reward_source_1``, ``reward_source_2`` and so on.

    Args:
        functions: python files.
        servers: addresses of servers.
        weights: one for each function, then one for each source of ``servers``.
    """

    def __init__(self, functions: Sequence[RewardSource], servers: RemoteRewards | None, weights: Sequence[float]):
        self._functions = functions
        self._servers = servers
        self._weights = weights

    def score(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[str] | None = None,
        uids: Sequence[str] | None = None,
    ) -> RewardResult:
        """Return the rewards as :meth:`~openrlhf.rollout.reward_result.RewardSource.score` describes."""
        columns = (queries, prompts, labels, uids)
        results = [function.score(*columns) for function in self._functions]
        if self._servers:
            results += self._servers.score(*columns)
        rewards = [
            sum(weight * result.rewards[row] for weight, result in zip(self._weights, results, strict=True))
            for row in range(len(queries))
        ]
        return RewardResult(rewards, _all_extra(results))


def _all_extra(results: Sequence[RewardResult]) -> dict[str, list[float]]:
    """Return what all sources log; a name that an earlier source uses gets the number of its own."""
    extra: dict[str, list[float]] = {}
    for number, result in enumerate(results, start=1):
        own = {f"reward_source_{number}": result.rewards} if len(results) > 1 else {}
        for name, values in {**result.extra, **own}.items():
            extra[f"{name}_{number}" if name in extra else name] = values
    return extra


def reward_function(path: str, reward: RewardConfig) -> RewardProcess:
    """Return the function of a python file. Raises DataError when it cannot be used."""
    return RewardProcess(path, reward.reward_func_timeout, reward.reward_func_secrets)


def reward_source(config: PPOConfig) -> RewardSource | None:
    """Return what ``--remote_rm_url`` names, or None.

    Raises:
        DataError: a python file cannot be used.
    """
    reward = config.reward
    functions = [reward_function(path, reward) for path in reward.reward_files]
    servers = None
    if reward.reward_servers:
        servers = RemoteRewards(
            reward.reward_servers,
            batch_size=config.rollout.micro_rollout_batch_size,
            key=named_key(reward.remote_rm_key),
            patience=Patience(tries=reward.remote_rm_tries, try_s=reward.remote_rm_timeout),
        )
    _, weights = config.reward_weights
    return SummedRewards(functions, servers, weights) if functions or servers else None
