"""Where the rewards of PPO come from, and what becomes of them before anything is learned."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from openrlhf.config.checks import file_problems, key_problems, url_problems
from openrlhf.config.flags import flag

REMOTE_MODES = ("sum", "replicas")


@dataclass(frozen=True)
class RewardConfig:
    """Rewards."""

    prm_pretrain: str | None = flag(None, "Process reward model (train_prm): a reward at the end of each step.")
    prm_placeholder_token: str | None = flag(None, "The token with which the policy ends a step.")
    prm_reward_tokens: tuple[str, ...] | None = flag(
        None, "Tokens that a step is judged with, the positive one first; its probability is the reward."
    )
    remote_rm_url: str | None = flag(
        None, "Reward servers (http://HOST:PORT/PATH) and .py files with reward_func, separated by commas."
    )
    remote_rm_mode: str = flag(
        "sum", "Several servers: add up their rewards, or share the work between equal ones.", choices=REMOTE_MODES
    )
    remote_rm_timeout: float = flag(180.0, "Seconds that a reward server may take for one request.", above=0)
    remote_rm_tries: int = flag(5, "How often a request is sent to servers that fail before the run ends.", at_least=1)
    remote_rm_key: str | None = flag(None, "Key of the reward servers: a file, or an environment variable's name.")
    reward_func_timeout: float = flag(600.0, "Seconds that one call of a reward function may take.", above=0)
    reward_func_env: str | None = flag(
        None, "Environment variables with keys that reward functions need, separated by commas; others are kept back."
    )
    reward_weights: str | None = flag(
        None, "Weights of reward models, then .py files, then servers, separated by commas; default is 1 each."
    )
    normalize_reward: bool = flag(False, "Normalise with the mean and std stored in the reward model's config.json.")
    reward_clip_range: tuple[float, float] = flag((-10.0, 10.0), "Lowest and highest reward of a sample.")
    label_key: str | None = flag(None, "Column of the reference answer that reward functions and servers get.")
    ref_reward_offload: bool = flag(False, "Keep reference and reward models in main memory between uses.")
    overlong_buffer_len: float | None = flag(
        None, "Tokens before --generate_max_len in which a penalty for length grows.", above=0
    )
    overlong_penalty_factor: float = flag(1.0, "The penalty for length at --generate_max_len.", at_least=0)
    stop_properly_penalty_coef: float | None = flag(
        None, "Score of an answer that was cut off: times this from 0 to 1, replaced by it below 0.", at_most=1
    )

    @property
    def has_length_penalty(self) -> bool:
        """Whether the length of an answer changes its score."""
        return self.overlong_buffer_len is not None or self.stop_properly_penalty_coef is not None

    @property
    def reward_files(self) -> list[str]:
        """The python reward files."""
        return [entry for entry in self._entries if entry.endswith(".py") and "://" not in entry]

    @property
    def reward_servers(self) -> list[list[str]]:
        """The addresses of each source of rewards that is a server; those of one source are replicas."""
        urls = [entry for entry in self._entries if entry not in self.reward_files]
        return [urls] if urls and self.remote_rm_mode == "replicas" else [[url] for url in urls]

    @property
    def reward_func_secrets(self) -> list[str]:
        """The environment variables whose names say that they are secret and that reward functions get."""
        return [name.strip() for name in (self.reward_func_env or "").split(",") if name.strip()]

    @property
    def remote_sources(self) -> int:
        """How many sources of rewards there are beside reward models."""
        return len(self.reward_files) + len(self.reward_servers)

    @property
    def _entries(self) -> list[str]:
        return [entry.strip() for entry in (self.remote_rm_url or "").split(",") if entry.strip()]

    def prm_problems(self) -> list[str]:
        """Return what is missing to read a process reward model."""
        if not self.prm_pretrain:
            return []
        found, tokens = [], self.prm_reward_tokens or ()
        if not self.prm_placeholder_token:
            found.append("--prm_pretrain needs --prm_placeholder_token, the token with which the policy ends a step")
        if len(set(tokens)) < max(2, len(tokens)):
            found.append(
                "--prm_pretrain needs --prm_reward_tokens: two different tokens or more, the positive one first"
            )
        return found

    def problems(self) -> list[str]:
        low, high = self.reward_clip_range
        found = [problem for path in self.reward_files for problem in file_problems("remote_rm_url", path)]
        if low >= high:
            found.append(f"--reward_clip_range {low:g} {high:g}: the first must be below the second")
        for url in (url for urls in self.reward_servers for url in urls):
            if "://" in url:
                found += url_problems("remote_rm_url", url)
            else:
                found.append(f"--remote_rm_url {url} is neither a .py file nor a URL: write http://HOST:PORT/PATH")
        for name in self.reward_func_secrets:
            if name not in os.environ:
                found.append(
                    f"--reward_func_env {name}: there is no such environment variable; name variables, not keys"
                )
        return found + key_problems("remote_rm_key", self.remote_rm_key)

    def weights(self, models: int) -> list[float]:
        """Return the weights of all sources of rewards, of which ``models`` are reward models.

        Raises:
            ValueError: ``--reward_weights`` does not fit; the rest of a sentence that begins with the flag.
        """
        count = models + self.remote_sources
        if self.reward_weights is None:
            return [1.0] * count
        try:
            weights = [float(word) for word in self.reward_weights.split(",")]
        except ValueError:
            raise ValueError(f"{self.reward_weights!r} is not a list of numbers: write for example 1,0.5") from None
        if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"{self.reward_weights!r}: give one finite weight for each of the {count} sources: reward models, "
                "then .py files, then servers (replicas are one)"
            )
        return weights
