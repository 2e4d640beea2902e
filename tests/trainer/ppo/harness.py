"""A whole PPO run in this process: tiny models in a folder, one worker a role, the policy generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf.config.groups import BatchConfig, CheckpointConfig, DeepSpeedConfig, LoggingConfig
from openrlhf.config.ppo import AlgorithmConfig, PPOModelConfig, PPOOptimConfig, RewardConfig, RolloutConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.rollout.reward_process import RewardProcess
from openrlhf.rollout.rewards import reward_source
from openrlhf.rollout.types import Prompt, Rollout
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.callbacks import Callback, Evaluation
from openrlhf.trainer.ppo.checkpoints import PPOCheckpointing, checkpoint_layout
from openrlhf.trainer.ppo.evaluation import Evaluator
from openrlhf.trainer.ppo.experience import ExperienceMaker
from openrlhf.trainer.ppo.loop import PPOLoop
from openrlhf.trainer.ppo.policy_engine import PolicyEngine
from openrlhf.trainer.ppo.program import local_roles as make_roles
from openrlhf.trainer.ppo.rating import Rater
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.sample_log import SampleLog
from tests.helpers import tiny_folder, tiny_tokenizer

COUNT_E = (
    "def reward_func(queries, prompts, labels):\n"
    "    return [float(query[len(prompt):].count('e')) for query, prompt in zip(queries, prompts)]\n"
)
NOISY_COUNT = (
    "import random\n"
    "def reward_func(queries, prompts, labels):\n"
    "    return [query[len(prompt):].count('e') + random.random() for query, prompt in zip(queries, prompts)]\n"
)


def reward_file(folder: Path, source: str = COUNT_E) -> str:
    """Write a reward file, by default one that counts the letter e of the answer, and return its path."""
    path = folder / "reward.py"
    path.write_text(source)
    return str(path)


def tiny_reward_model(path: Path, arch: str = "qwen2", **config: Any) -> str:
    """Save a tiny reward model with the tokenizer of a tiny policy of family ``arch``; ``config`` goes to its
    config.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from tests.helpers import tiny_config

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(tiny_config(arch, num_labels=1))
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return str(path)


def tiny_ppo_config(folder: Path, **groups: Any) -> RayPPOConfig:
    """Return a PPO configuration around a tiny policy in ``folder``; ``groups`` replace whole groups."""
    model = folder / "policy"
    if not model.is_dir():
        tiny_folder(model)
    defaults = {
        "model": PPOModelConfig(pretrain=str(model)),
        "reward": RewardConfig(remote_rm_url=reward_file(folder)),
        "algorithm": AlgorithmConfig(advantage_estimator="reinforce"),
        "rollout": RolloutConfig(rollout_batch_size=8, micro_rollout_batch_size=8, generate_max_len=6),
        "batch": BatchConfig(micro_train_batch_size=4, train_batch_size=8),
        "optim": PPOOptimConfig(actor_learning_rate=3e-3, critic_learning_rate=3e-3, lr_warmup_ratio=0.0),
        "deepspeed": DeepSpeedConfig(zero_stage=0),
        "checkpoint": CheckpointConfig(save_path=str(folder / "out"), ckpt_path=str(folder / "ckpt")),
        "logging": LoggingConfig(run_path=str(folder / "run")),
    }
    return RayPPOConfig(**{**defaults, **groups})


def solo_strategy(config: RayPPOConfig) -> DeepSpeedStrategy:
    """Return the strategy of one rank."""
    strategy = DeepSpeedStrategy(config.deepspeed, max_norm=config.optim.max_norm, seed=config.batch.seed)
    strategy.setup_distributed()
    return strategy


def tiny_prompts(tokenizer: Any, count: int) -> list[Prompt]:
    """Return ``count`` prompts of different length."""
    return prompts_of(
        tokenizer,
        ["How many clips did " + "Natalia and " * (number % 3) + f"{number} sell?" for number in range(count)],
    )


def prompts_of(tokenizer: Any, texts: Sequence[str]) -> list[Prompt]:
    """Return the prompts of ``texts``, which have numbers for uids and labels."""
    return [
        Prompt(str(number), text, tuple(tokenizer(text).input_ids), label=str(number))
        for number, text in enumerate(texts)
    ]


class Recorder(Callback):
    """Keeps what the callbacks of a run are told; ``stop_after`` breaks the run off after that step."""

    def __init__(self, stop_after: int | None = None):
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self._stop_after = stop_after

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Keep the metrics."""
        self.steps.append({"step": trainer.global_step, **metrics})
        if trainer.global_step == self._stop_after:
            raise KeyboardInterrupt

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Keep the figures."""
        self.evaluations.append((trainer.global_step, values))


def local_roles(config: RayPPOConfig, prompts: int) -> Roles:
    """Return the roles that the run needs, one worker each in this process."""
    return make_roles(config, solo_strategy(config), config.optimizer_steps(prompts))


def local_loop(
    config: RayPPOConfig,
    prompts: int = 16,
    eval_prompts: int = 0,
    stop_after: int | None = None,
    texts: Sequence[str] = (),
) -> tuple[PPOLoop, Recorder]:
    """Return a loop over ``prompts`` prompts, or over ``texts``, and the recorder of its metrics."""
    prompts = len(texts) or prompts
    roles = local_roles(config, prompts)
    tokenizer = roles.policy.worker.tokenizer
    engine = PolicyEngine(roles.policy)
    evaluation = config.evaluation.eval_reward_func
    true_score = RewardProcess(evaluation) if evaluation else None
    rater = Rater(config, roles, tokenizer, reward_source(config), true_score)
    maker = ExperienceMaker(config, roles, rater)
    run_path = Path(config.logging.run_path)
    run_path.mkdir(exist_ok=True)
    samples = SampleLog(run_path / "samples.jsonl", tokenizer)
    rows = prompts_of(tokenizer, texts) if texts else tiny_prompts(tokenizer, max(prompts, eval_prompts))
    evaluator = Evaluator(config, rows[:eval_prompts], engine, rater, samples)
    recorder = Recorder(stop_after)
    layout = checkpoint_layout(config, roles)
    manager = CheckpointManager(config.checkpoint, SoloComm(), layout=layout, say=lambda _: None)
    callbacks = [Evaluation(config.logging.eval_steps), PPOCheckpointing(config, roles, manager), recorder]
    return PPOLoop(config, roles, engine, engine, maker, rows[:prompts], evaluator, callbacks), recorder


def policy_weights(loop: PPOLoop) -> dict[str, Any]:
    """Return copies of the policy's weights."""
    return {name: weight.clone() for name, weight in loop.roles.policy.worker.engine.named_weights()}


def with_rollout(config: RayPPOConfig, **values: Any) -> RayPPOConfig:
    """Return ``config`` with other rollout settings."""
    return replace(config, rollout=replace(config.rollout, **values))


def with_batch(config: RayPPOConfig, **values: Any) -> RayPPOConfig:
    """Return ``config`` with other batch settings."""
    return replace(config, batch=replace(config.batch, **values))


def with_algorithm(config: RayPPOConfig, **values: Any) -> RayPPOConfig:
    """Return ``config`` with other settings of the algorithm."""
    return replace(config, algorithm=replace(config.algorithm, **values))


def rollout_of(prompt: Prompt, response: list[int], *, finish_reason: str = "stop", log_prob: float = -1.0) -> Rollout:
    """Return a rollout with the given answer."""
    start = len(prompt.token_ids)
    return Rollout(
        prompt=prompt,
        token_ids=(*prompt.token_ids, *response),
        action_spans=((start, start + len(response)),),
        log_probs=(log_prob,) * len(response),
        finish_reason=finish_reason,
        policy_version=0,
        seed=0,
    )
