"""What the ranks of the gradient tests run: the gradients that an engine applies, against plain torch.

A case is a loss, packed or padded rows, a ZeRO stage and the rows of a micro-batch. Its gradients come from one step
of the real trainer or worker: Adam's first moment after the first step is ``1 - beta1`` times the gradient that was
applied. The other side is ``gradient_formulas.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from openrlhf.config.algorithms import PAIR_LOSSES
from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig, OptimConfig
from openrlhf.config.ppo import (
    AlgorithmConfig,
    PPOConfig,
    PPOModelConfig,
    PPOOptimConfig,
    PromptDataConfig,
    RewardConfig,
    RolloutConfig,
)
from openrlhf.models.actor import Actor
from openrlhf.models.attention import switch_attention
from openrlhf.models.backbone import TokenModel
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.strategy.deepspeed import DeepSpeedStrategy, TrainEngine
from openrlhf.trainer.dpo import DPOTrainer
from openrlhf.trainer.frozen import answer_log_probs, without_adapter
from openrlhf.trainer.kd import KDTrainer
from openrlhf.trainer.kto import KTOTrainer
from openrlhf.trainer.ppo.groups import deal
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker
from openrlhf.trainer.prm import ProcessRewardModelTrainer
from openrlhf.trainer.reward_model import RewardModelTrainer
from openrlhf.trainer.sft import SFTTrainer
from tests.strategy.programs import BETAS, first_gradients
from tests.trainer.gradient_adapters import FOLDER, LORA, adapted, teach
from tests.trainer.gradient_formulas import (
    ENTROPY_COEF,
    KL_COEF,
    PTX_COEF,
    REWARD_IDS,
    ROWS,
    TEMPERATURE,
    WHITEN,
    Rows,
    UnpairedRows,
    cispo_formula,
    dpo_formula,
    dual_formula,
    experience,
    gspo_formula,
    kd_formula,
    kto_formula,
    kto_pair_formula,
    pairs,
    policy_formula,
    prm_formula,
    ptx_formula,
    reference,
    rm_formula,
    sequences,
    sft_formula,
    sft_rows,
    simpo_formula,
    steps_of,
    value_formula,
    write_texts,
)

OPTIMIZER = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", adam_betas=BETAS)


def ready(engine: TrainEngine, packed: bool) -> TrainEngine:
    """Choose between packed and padded rows, after the check of the first forward."""
    model: TokenModel = engine.module
    engine.eval()
    with torch.no_grad():
        engine(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    if not model.packed:
        raise ValueError("this model should be one that can be packed")
    if not packed:
        model.packed = False
        switch_attention(model.model, model.padded_attention)
    return engine


def actor_step(
    trainer: type,
    rows: Rows,
    own: Callable[[Callable], dict],
    folder: str,
    strategy: DeepSpeedStrategy,
    packed: bool,
    batch: BatchConfig,
    lora: bool = False,
) -> TrainEngine:
    """Take one step of a trainer of language models; ``own(frozen)`` returns its options, made with a frozen model.

    With ``lora`` only adapters are trained, and the frozen model is the policy without them.
    """
    path = f"{folder}/{FOLDER}/frozen" if lora else f"{folder}/policy"
    model = load_causal_lm(path, ModelConfig(), lora=LORA if lora else None, context=strategy.loading_context)
    if lora:
        teach(model, strategy)
    engine = ready(strategy.prepare_train(Actor(model), OPTIMIZER, 1), packed)

    def other() -> Callable:
        if lora:
            return partial(without_adapter, engine)
        context = partial(strategy.loading_context, train=False)
        return strategy.prepare_eval(Actor(load_causal_lm(f"{folder}/frozen", ModelConfig(), context=context)))

    trainer(engine, strategy, rows, (), batch, **own(other)).fit()
    return engine


def pair_step(loss: str, **flags: float) -> Callable:
    """Return the step of a loss of pairs."""
    nll = flags.pop("nll_loss_coef", 0.0)
    entry = PAIR_LOSSES[loss]

    def own(other: Callable) -> dict:
        reference = partial(answer_log_probs, other()) if entry.needs_reference else None
        pair_loss = partial(entry.load(), **flags)
        measured = entry.needs_divergences
        common = {"beta": flags["beta"], "reference": reference, "nll_loss_coef": nll}
        return {"pair_loss": pair_loss, "measures_divergences": measured, **common}

    return partial(actor_step, DPOTrainer, pairs(), own)


def kto_options(other: Callable) -> dict:
    return {
        "reference": partial(answer_log_probs, other()),
        "beta": 0.1,
        "desirable_weight": 1.5,
        "undesirable_weight": 0.5,
    }


def rm_step(folder: str, strategy: DeepSpeedStrategy, packed: bool, batch: BatchConfig) -> TrainEngine:
    model = load_value_model(
        f"{folder}/reward", ModelConfig(), gather=strategy.gather, context=strategy.loading_context, pad_token_id=0
    )
    engine = ready(strategy.prepare_train(ValueModel(model), OPTIMIZER, 1), packed)
    trainer = RewardModelTrainer(engine, strategy, pairs(), (), batch, margin_loss=True)
    trainer.fit()
    return engine


def ppo_config(folder: str, stage: int, batch: BatchConfig, **algorithm: Any) -> PPOConfig:
    texts = write_texts(Path(folder) / "texts.jsonl") if "ptx_coef" in algorithm else None
    return PPOConfig(
        prompts=PromptDataConfig(pretrain_data=texts),
        model=PPOModelConfig(pretrain=f"{folder}/policy", critic_pretrain=f"{folder}/reward"),
        reward=RewardConfig(remote_rm_url="unused.py"),
        algorithm=AlgorithmConfig(advantage_estimator="gae", **algorithm),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optim=PPOOptimConfig(adam_betas=BETAS, max_norm=0.0, lr_warmup_ratio=0.0),
        deepspeed=DeepSpeedConfig(zero_stage=stage),
        batch=batch,
    )


def ppo_step(
    worker_class: type,
    common: dict,
    algorithm: dict,
    folder: str,
    strategy: DeepSpeedStrategy,
    packed: bool,
    batch: BatchConfig,
) -> TrainEngine:
    """Take one step of a worker of PPO; ``common`` goes to its update, ``algorithm`` to the flags."""
    config = ppo_config(folder, strategy.config.zero_stage, batch, **algorithm)
    worker = worker_class(config, strategy, max_steps=1)
    ready(worker.engine, packed)
    mine = deal(range(ROWS), strategy.world_size)[strategy.rank]
    worker.update([experience(folder).select(mine)], rollout=1, **common)
    return worker.engine


def policy_step(kl_coef: float = 0.0, **algorithm: Any) -> Callable:
    """Return the step of a policy loss."""
    return partial(ppo_step, PolicyWorker, {"whiten": WHITEN, "kl_coef": kl_coef}, algorithm)


def correction(kind: str) -> dict[str, Any]:
    return {
        "enable_vllm_is_correction": True,
        "vllm_is_correction_type": kind,
        "vllm_is_truncated_threshold": (0.9, 1.1),
    }


LOSSES = {
    "sft": (sft_formula, partial(actor_step, SFTTrainer, sft_rows(), lambda other: {})),
    "dpo": (dpo_formula, pair_step("dpo", beta=0.3, label_smoothing=0.1, nll_loss_coef=0.2)),
    "simpo": (simpo_formula, pair_step("simpo", beta=2.0, target_margin=0.5)),
    "kto_pair": (kto_pair_formula, pair_step("kto_pair", beta=0.1)),
    "kto": (kto_formula, partial(actor_step, KTOTrainer, UnpairedRows(), kto_options)),
    "sft_lora": (adapted(sft_formula), partial(actor_step, SFTTrainer, sft_rows(), lambda other: {}, lora=True)),
    "dpo_lora": (
        adapted(dpo_formula),
        partial(pair_step("dpo", beta=0.3, label_smoothing=0.1, nll_loss_coef=0.2), lora=True),
    ),
    "kto_lora": (adapted(kto_formula), partial(actor_step, KTOTrainer, UnpairedRows(), kto_options, lora=True)),
    "kd": (
        kd_formula,
        partial(actor_step, KDTrainer, sft_rows(), lambda other: {"teacher": other(), "kd_coef": 0.4}),
    ),
    "prm": (
        prm_formula,
        partial(
            actor_step, ProcessRewardModelTrainer, steps_of(*sequences(1)), lambda other: {"reward_ids": REWARD_IDS}
        ),
    ),
    "rm": (rm_formula, rm_step),
    "policy": (policy_formula, policy_step()),
    "ptx": (ptx_formula, policy_step(ptx_coef=PTX_COEF)),
    "dual": (
        dual_formula,
        policy_step(
            **correction("icepop"), eps_clip_low_high=(0.1, 0.3), dual_clip=1.05, entropy_loss_coef=ENTROPY_COEF
        ),
    ),
    "gspo": (
        gspo_formula,
        policy_step(
            KL_COEF,
            **correction("tis"),
            policy_loss_type="gspo",
            eps_clip_low_high=(0.05, 0.1),
            kl_estimator="k3",
            entropy_loss_coef=ENTROPY_COEF,
        ),
    ),
    "cispo": (
        cispo_formula,
        policy_step(
            KL_COEF, **correction("tis"), policy_loss_type="cispo", loss_reduction="sequence", kl_estimator="k2"
        ),
    ),
    "value": (value_formula, partial(ppo_step, CriticWorker, {}, {})),
}


def differences(folder: str, cases: list[list], ring: int = 1, budget: int = 0) -> list[tuple[str, float]]:
    """Return for each ``[loss, packed, stage, micro-batch]`` the tensor that is furthest off, and by how much.

    The measure is the norm of the difference over the norm of plain torch's gradient, tensor by tensor. ``ring`` ranks
    share each sequence; ``budget`` tokens a rank take the place of the rows of a micro-batch.
    """
    expected = {loss: reference(folder, LOSSES[loss][0]) for loss in {case[0] for case in cases}}
    dynamic = {"use_dynamic_batch": True, "train_max_tokens_per_gpu": budget} if budget else {}
    joined = cache(partial(strategy_of, ring))
    found = []
    for loss, packed, stage, micro in cases:
        batch = BatchConfig(micro_train_batch_size=micro, train_batch_size=8, **dynamic)
        engine = LOSSES[loss][1](folder, joined(stage), packed, batch)
        gradients = first_gradients(engine)
        engine.close()
        if gradients.keys() != expected[loss].keys():
            raise ValueError(f"{sorted(gradients)} are not {sorted(expected[loss])}")
        off = {
            name: float((gradients[name].double() - plain).norm() / plain.norm())
            for name, plain in expected[loss].items()
        }
        worst = max(off, key=lambda name: off[name])
        found.append((worst, off[worst]))
    return found


def strategy_of(ring: int, stage: int) -> DeepSpeedStrategy:
    """Return a strategy that has joined; every one makes process groups, and their threads stay until the end."""
    strategy = DeepSpeedStrategy(
        DeepSpeedConfig(zero_stage=stage, collective_timeout=60), max_norm=0.0, param_persistence_threshold=0,
        ring_size=ring,
    )  # fmt: skip
    strategy.setup_distributed()
    return strategy


def ring_cases() -> list[list]:
    """Return every loss with 4 stages and 3 sizes of a micro-batch."""
    return [list(case) for case in product(LOSSES, (True,), (0, 1, 2, 3), (1, 2, 4))]


def every_case() -> list[list]:
    """Return every loss packed and padded, with 4 stages and 3 sizes of a micro-batch."""
    return [list(case) for case in product(LOSSES, (True, False), (0, 1, 2, 3), (1, 2, 4))]
