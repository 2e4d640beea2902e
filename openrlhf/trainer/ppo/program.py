"""What every PPO command does around its loop: prompts before, callbacks between, export and report after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openrlhf.config.continuing import training_flags
from openrlhf.config.ppo import CRITIC, PROCESS, REFERENCE, PPOConfig
from openrlhf.datasets.blending import load_mixture, recognised, required_keys
from openrlhf.datasets.preview import sample_lines
from openrlhf.datasets.prompts import PromptDataset
from openrlhf.device import seed_everything
from openrlhf.models.suitability import check_language_model, check_model, check_reward_model
from openrlhf.models.tokenizer import check_vocabulary, load_tokenizer
from openrlhf.rollout.engine import RolloutEngine, WeightSync
from openrlhf.rollout.rewards import reward_function, reward_source
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.alarms import PPO_ALARMS, Alarms
from openrlhf.trainer.callbacks import Callback, Evaluation, MetricLogging, ProgressLine
from openrlhf.trainer.loggers import JsonlLogger, build_loggers
from openrlhf.trainer.ppo.checkpoints import PPOCheckpointing, checkpoint_layout
from openrlhf.trainer.ppo.evaluation import Evaluator
from openrlhf.trainer.ppo.experience import ExperienceMaker
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.ledger import Ledger
from openrlhf.trainer.ppo.loop import PPOLoop
from openrlhf.trainer.ppo.process import ProcessRewardWorker, step_tokens
from openrlhf.trainer.ppo.rating import Rater
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.sample_log import SampleLog
from openrlhf.trainer.ppo.texts import load_texts
from openrlhf.trainer.ppo.worker_base import Worker
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker
from openrlhf.trainer.profiling import Profiling, of_groups
from openrlhf.trainer.report import report_line
from openrlhf.trainer.setup import Run, learning_text

SHOWN = ("reward", "true_score", "kl", "response_length")
"""Metrics in the progress line."""


class Inputs:
    """What a run reads before any model is loaded, so that wrong data fails in seconds.

    Attributes:
        tokenizer: the policy's.
        prompts: training prompts.
        texts: of ``--pretrain_data``, or None.
        eval_prompts: evaluation prompts; empty without ``--eval_dataset``.
        reward_function: python files and servers of ``--remote_rm_url``, or None.
        true_score: of ``--eval_reward_func``, or None.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        _check_folders(config)
        self.tokenizer = load_tokenizer(
            config.model.pretrain,
            use_fast=not config.model.disable_fast_tokenizer,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=config.prompts.tokenizer_chat_template,
        )
        for path in config.model.reward_models:
            check_vocabulary(path, self.tokenizer, config.model, "--reward_pretrain")
        others = {"--critic_pretrain": config.model.critic_pretrain, "--prm_pretrain": config.reward.prm_pretrain}
        for flag, path in others.items():
            if path and path != config.model.pretrain:
                check_vocabulary(path, self.tokenizer, config.model, flag)
        if config.reward.prm_pretrain:
            step_tokens(config, self.tokenizer)
        eval_file = config.evaluation.eval_reward_func
        self.reward_function = reward_source(config)
        self.true_score = reward_function(eval_file, config.reward) if eval_file else None
        data = config.prompts
        self.prompts = self._load(data.prompt_data, data.prompt_data_probs, data.prompt_split, "--prompt_data")
        self.texts = load_texts(config, self.tokenizer) if data.pretrain_data else None
        wanted = config.evaluation.eval_dataset
        self.eval_prompts = self._load(wanted, None, config.evaluation.eval_split, "--eval_dataset") if wanted else []

    @property
    def optimizer_steps(self) -> int:
        """The length of the learning-rate schedule."""
        return self.config.optimizer_steps(len(self.prompts))

    def _load(self, spec: str, probs: str | None, split: str, flag: str) -> PromptDataset:
        reward = self.config.reward
        data = recognised(self.config.prompts, PromptDataset.FORMATS, spec, split, flag)
        rows = load_mixture(
            spec,
            probs,
            split=split,
            max_samples=int(data.max_samples),
            seed=self.config.batch.seed,
            stopping="first_exhausted",
            flag=flag,
            required=required_keys(data, label_key=reward.label_key),
        )
        most = self.config.rollout.prompt_max_len
        return PromptDataset(rows, self.tokenizer, data, most, reward.label_key, f"{flag} {spec}")


def _check_folders(config: PPOConfig) -> None:
    """Raise DataError when a model folder cannot be loaded, or does not suit its role."""
    model = config.model
    check_language_model(model.pretrain, trust_remote_code=model.trust_remote_code)
    for path in model.reward_models:
        check_reward_model(
            path,
            trust_remote_code=model.trust_remote_code,
            value_head_prefix=model.value_head_prefix,
            normalize_reward=config.reward.normalize_reward,
            flag="--reward_pretrain",
        )
    if prm := config.reward.prm_pretrain:
        check_language_model(prm, trust_remote_code=model.trust_remote_code, flag="--prm_pretrain")
    if model.critic_pretrain:
        check_model(model.critic_pretrain, trust_remote_code=model.trust_remote_code, flag="--critic_pretrain")


def local_roles(config: PPOConfig, strategy: DeepSpeedStrategy, max_steps: int) -> Roles:
    """Return the roles that the run needs, a worker of each in every rank; ``max_steps`` as in the schedule."""
    comm, names = strategy.comm, config.role_names
    policy = LocalGroup(PolicyWorker(config, strategy, max_steps=max_steps), comm)
    critic = LocalGroup(CriticWorker(config, strategy, max_steps=max_steps), comm) if CRITIC in names else None
    reference = LocalGroup(ReferenceWorker(config, strategy), comm) if REFERENCE in names else None
    rewards = [LocalGroup(RewardWorker(config, strategy, path=path), comm) for path in config.model.reward_models]
    process = LocalGroup(ProcessRewardWorker(config, strategy), comm) if PROCESS in names else None
    return Roles(policy, critic, reference, rewards, process, shared=True, comm=comm)


def build_loop(
    config: PPOConfig, run: Run, inputs: Inputs, roles: Roles, engine: RolloutEngine, weight_sync: WeightSync
) -> PPOLoop:
    """Return the loop of a run with its callbacks, whatever the roles and the engine are made of.

    Seeds this process: reward functions get their random numbers from it.
    """
    seed_everything(config.batch.seed)
    rater = Rater(config, roles, inputs.tokenizer, inputs.reward_function, inputs.true_score)
    samples = SampleLog(run.path / "samples.jsonl" if run.rank == 0 else None, inputs.tokenizer)
    evaluator = Evaluator(config, inputs.eval_prompts, engine, rater, samples)
    callbacks = ppo_callbacks(config, run, roles)
    maker = ExperienceMaker(config, roles, rater)
    return PPOLoop(config, roles, engine, weight_sync, maker, inputs.prompts, evaluator, callbacks)


def ppo_callbacks(config: PPOConfig, run: Run, roles: Roles) -> list[Callback]:
    """Return the callbacks of a PPO command in their order."""
    manager = CheckpointManager(
        config.checkpoint,
        roles.comm,
        layout=checkpoint_layout(config, roles),
        flags=training_flags(config),
        say=run.say,
    )
    talks, recording = run.rank == 0, of_groups(roles.groups, Worker.start_recording, Worker.stop_recording)
    return [
        Alarms(PPO_ALARMS, run.say),
        ProgressLine(run.console, SHOWN),
        MetricLogging(
            JsonlLogger(run.path / "metrics.jsonl") if talks else None,
            build_loggers(config.logging, run.flags, run.path) if talks else [],
            config.logging.logging_steps,
        ),
        Profiling(config.logging.profile_steps, *recording, run.path, run.say),
        Evaluation(config.logging.eval_steps),
        *([Ledger(run.path / "ledger.jsonl")] if talks else []),
        PPOCheckpointing(config, roles, manager),
    ]


def start_up_lines(config: PPOConfig, run: Run, inputs: Inputs, roles: Roles, placement: Sequence[str]) -> list[str]:
    """Return what a person wants to know before the first rollout."""
    rollout, batch, ranks = config.rollout, config.batch, roles.policy.size
    parameters, trained = roles.policy.get(roles.policy.run(PolicyWorker.parameters))[0]
    precision = "bf16 weights, fp32 master" if config.model.bf16 else "fp32"
    return [
        f"run      {run.path}",
        f"where    {placement[0]}, ZeRO-{config.deepspeed.zero_stage}, {precision}",
        *(f"         {line.strip()}" for line in placement[1:]),
        f"data     {len(inputs.prompts):,} prompts to train, {len(inputs.eval_prompts):,} to evaluate"
        + (f", {len(inputs.texts):,} texts" if inputs.texts else ""),
        *sample_lines(inputs.prompts),
        f"rollout  {rollout.rollout_batch_size} prompts x {rollout.n_samples_per_prompt} answers; "
        f"an optimizer step is {batch.train_batch_size} answers; {inputs.optimizer_steps:,} optimizer steps in all",
        f"policy   {config.model.pretrain}: {learning_text(config, ranks, parameters, trained)}",
    ]


def finish_run(config: PPOConfig, run: Run, loop: PPOLoop) -> None:
    """Export the policy to ``--save_path`` and with ``--save_value_network`` the critic, and write the report.

    Asked to stop meanwhile, it ends all this, saves the last step too, and raises ``Preempted`` as ``loop.fit``.
    """
    path, roles = str(Path(config.checkpoint.save_path).expanduser().absolute()), loop.roles
    with loop.saved_when_stopped():
        run.phase("export")
        roles.policy.get(roles.policy.run(PolicyWorker.export, path=path))
        run.say(f"model in {path}")
        if config.save_value_network and roles.critic:
            roles.critic.get(roles.critic.run(CriticWorker.export, path=f"{path}_critic"))
            run.say(f"critic in {path}_critic")
        if run.rank == 0:
            run.say(report_line(run.path))
        loop.leave_if_asked()
