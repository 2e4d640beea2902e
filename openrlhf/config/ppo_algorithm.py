"""The flags of the algorithm of PPO: advantages, the loss of the actor, the divergence, and what goes around them."""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf.config.algorithms import ESTIMATORS, POLICY_LOSSES, Estimator, PolicyLoss
from openrlhf.config.flags import flag

KL_ESTIMATORS = ("k1", "k2", "k3")
REDUCTIONS = ("token", "sequence")
CORRECTIONS = ("tis", "icepop", "seq-mask-tis")


@dataclass(frozen=True)
class AlgorithmConfig:
    """Algorithm."""

    advantage_estimator: str = flag("gae", "How advantages are estimated.", choices=ESTIMATORS)
    gamma: float = flag(1.0, "Discount.", at_least=0, at_most=1)
    lambd: float = flag(1.0, "Lambda of GAE.", at_least=0, at_most=1)
    no_advantage_std_norm: bool = flag(False, "Centre advantages, and do not divide by their standard deviation.")
    policy_loss_type: str = flag("ppo", "Loss of the actor.", choices=POLICY_LOSSES)
    loss_reduction: str = flag("token", "Mean over tokens, or over sequences of their means.", choices=REDUCTIONS)
    eps_clip: float = flag(0.2, "Clip range of the policy ratio.", above=0)
    eps_clip_low_high: tuple[float, float] | None = flag(
        None, "Clip range below and above 1 (clip-higher); default is --eps_clip twice.", above=0
    )
    dual_clip: float | None = flag(
        None, "Most that a loss grows with the ratio where advantages are negative.", above=1
    )
    entropy_loss_coef: float | None = flag(None, "Weight of the entropy bonus; 0 only logs the entropy.", at_least=0)
    value_clip: float = flag(0.2, "Clip range of the value update.", above=0)
    init_kl_coef: float = flag(0.01, "Weight of the KL penalty; with --kl_target where it starts.", at_least=0)
    kl_target: float | None = flag(None, "Adapt the KL weight towards this KL.", above=0)
    kl_horizon: int = flag(10000, "Samples over which the KL weight adapts.", at_least=1)
    kl_estimator: str = flag(
        "k1", "Estimate of the KL: k1 for the reward, k2 or k3 for a loss.", choices=KL_ESTIMATORS
    )
    use_kl_estimator_k3: bool = flag(False, "Short for --kl_estimator k3.")
    use_kl_loss: bool = flag(False, "Add the KL to the loss of the actor instead of taking it from the reward.")
    enable_vllm_is_correction: bool = flag(False, "Weigh samples by how likely the policy is to give them itself.")
    vllm_is_correction_type: str = flag("tis", "How the weights are bounded.", choices=CORRECTIONS)
    vllm_is_truncated_threshold: tuple[float, ...] = flag(
        (0.5, 5.0), "Smallest and largest weight; one value is the largest.", at_least=0
    )
    ptx_coef: float = flag(0.05, "Weight of the language-model loss on --pretrain_data.", at_least=0)
    enable_ema: bool = flag(False, "Keep an exponential moving average of the actor and save it instead.")
    ema_beta: float = flag(0.992, "Decay of the moving average.", above=0, at_most=1)
    freezing_actor_steps: int = flag(-1, "Train only the critic for this many steps.", at_least=-1)

    @property
    def estimator(self) -> Estimator:
        """The facts of the advantage estimator."""
        return ESTIMATORS[self.advantage_estimator]

    @property
    def policy_loss(self) -> PolicyLoss:
        """The facts of the loss of the actor."""
        return POLICY_LOSSES[self.policy_loss_type]

    @property
    def policy_reduction(self) -> str:
        """What the loss of the actor is a mean of: ``"token"`` or ``"sequence"``."""
        return "sequence" if self.policy_loss.of_sequences else self.loss_reduction

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the policy ratio may go below and above 1."""
        return self.eps_clip_low_high or (self.eps_clip, self.eps_clip)

    @property
    def correction_range(self) -> tuple[float, float]:
        """The smallest and the largest weight of ``--enable_vllm_is_correction``."""
        low, high = (0.0, *self.vllm_is_truncated_threshold)[-2:]
        return low, high

    @property
    def discount(self) -> float:
        """``gamma``, where an answer is not compared as a whole."""
        return 1.0 if self.estimator.of_whole_answers else self.gamma

    @property
    def kl(self) -> str:
        """The estimate of the KL."""
        return "k3" if self.use_kl_estimator_k3 else self.kl_estimator

    @property
    def needs_reference(self) -> bool:
        """Whether the policy is compared with a reference at all."""
        return self.init_kl_coef > 0 or self.kl_target is not None

    def problems(self) -> list[str]:
        found = []
        if self.kl_target is not None and self.init_kl_coef == 0:
            found.append(
                f"--kl_target {self.kl_target:g} scales --init_kl_coef, which is 0 and would stay so: "
                "give --init_kl_coef a positive start, or leave --kl_target out"
            )
        if self.use_kl_loss and self.init_kl_coef == 0:
            found.append(
                "--use_kl_loss weighs the KL with --init_kl_coef, which is 0: raise it, or leave the flag out"
            )
        if self.use_kl_estimator_k3 and self.kl_estimator == "k2":
            found.append("--kl_estimator k2 and --use_kl_estimator_k3 exclude each other: drop one")
        given, (low, high) = self.vllm_is_truncated_threshold, self.correction_range
        if len(given) > 2 or low >= high:
            words = " ".join(f"{value:g}" for value in given)
            found.append(
                f"--vllm_is_truncated_threshold {words}: give the smallest and a larger largest weight, or the latter"
            )
        return found

    def notices(self) -> list[str]:
        if not (self.use_kl_loss and self.kl == "k1"):
            return []
        return ["--use_kl_loss with k1 pulls the policy nowhere on average: use --kl_estimator k2 or k3"]
