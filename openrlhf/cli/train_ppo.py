"""PPO in one program: every rank holds a part of all models, the policy itself generates.

    deepspeed --module openrlhf.cli.train_ppo --pretrain SFT --reward_pretrain RM --prompt_data FILE --input_key prompt
    python -m openrlhf.cli.train_ppo ...        (one rank)

Writes the policy to ``--save_path``, and metrics, samples, report and log to ``--run_path``. The loop is that of
``train_ppo_ray``, in ``openrlhf/trainer/ppo``; here is only the wiring.
"""

from __future__ import annotations

from typing import Any

from openrlhf.cli.common import run
from openrlhf.config.plan import plan_lines
from openrlhf.config.ppo import PPOConfig
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run


def plan(config: PPOConfig, ranks: int) -> list[str]:
    """Return the plan of a run on the ranks of the launcher."""
    return plan_lines(config, ranks, placement=[placement(config, ranks)])


def placement(config: PPOConfig, ranks: int) -> str:
    """Return which models the ranks hold, in one line."""
    return f"{ranks} rank{'s' if ranks > 1 else ''}, on each: {', '.join(config.role_names)}"


def prompts(config: PPOConfig) -> Any:
    """Return the training prompts, before any model."""
    from openrlhf.trainer.ppo.program import Inputs

    return Inputs(config).prompts


def train(config: PPOConfig) -> None:
    """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    with open_run(config, "train_ppo") as opened:
        _train(config, opened)


def _train(config: PPOConfig, opened: Run) -> None:
    from openrlhf.trainer.ppo.policy_engine import PolicyEngine
    from openrlhf.trainer.ppo.program import Inputs, build_loop, finish_run, local_roles, start_up_lines
    from openrlhf.trainer.program import joined_ranks

    opened.phase("data preparation")
    inputs = Inputs(config)
    with joined_ranks(config) as strategy:
        opened.phase("model")
        roles = local_roles(config, strategy, inputs.optimizer_steps)
        where = f"{strategy.device.type}, {placement(config, strategy.world_size)}"
        opened.say(*start_up_lines(config, opened, inputs, roles, [where]))
        engine = PolicyEngine(roles.policy)
        loop = build_loop(config, opened, inputs, roles, engine, engine)
        with signals.held():
            loop.fit()
            finish_run(config, opened, loop)


if __name__ == "__main__":
    run(PPOConfig, train, "train_ppo", plan, data=prompts)
