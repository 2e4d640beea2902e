"""The one strategy: DeepSpeed over one or many ranks, on CPU (gloo) and GPU (NCCL), ZeRO stage 0 to 3.

A module goes in, a `TrainEngine` comes out. The engine accumulates gradients over as many micro-batches as the caller
likes, normalised by the weight of the whole optimizer step, and refuses a step whose gradient is not finite.
Left out: what a loss is, when to save and where checkpoints live (`checkpoint.py`, `export.py`).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from openrlhf import device as machine
from openrlhf.config.groups import DeepSpeedConfig, OptimConfig
from openrlhf.errors import DataError, InfraError, NumericError, UsageError
from openrlhf.strategy import deepspeed_config
from openrlhf.strategy.comm import Comm, SoloComm, TorchComm, waiting
from openrlhf.strategy.optimizer import build_optimizer, build_schedule, cpu_adam_is_available

logger = logging.getLogger(__name__)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StepResult(NamedTuple):
    """What one optimizer step did: the gradient norm before clipping, the learning rate it used,
    whether it counted.
    """

    grad_norm: float
    lr: float
    applied: bool


class DeepSpeedStrategy:
    """Where and how models are trained: ranks, device, sharding. One object serves every model of a process.

    Call `setup_distributed` first. ``micro_batch_size`` only tells DeepSpeed how many rows a micro-batch has.
    ``param_persistence_threshold`` is the size in elements under which ZeRO-3 keeps a parameter whole on every rank
    (None: DeepSpeed's 100,000).
    """

    def __init__(
        self,
        config: DeepSpeedConfig,
        *,
        bf16: bool = False,
        max_norm: float = 1.0,
        micro_batch_size: int = 1,
        seed: int = 42,
        param_persistence_threshold: int | None = None,
    ):
        deepspeed_config.check(config, bf16)
        self.config = config
        self.bf16 = bf16
        self.max_norm = max_norm
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.param_persistence_threshold = param_persistence_threshold
        self.comm: Comm = SoloComm()
        self.device = torch.device("cpu")

    @property
    def rank(self) -> int:
        """This process's place among the ranks."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.comm.world_size

    @property
    def layout(self) -> dict[str, Any]:
        """What a checkpoint's files depend on: they load only into the same layout."""
        return {
            "world_size": self.world_size,
            "zero_stage": self.config.zero_stage,
            "bf16": self.bf16,
            "adam_offload": self.config.adam_offload,
        }

    def setup_distributed(self) -> None:
        """Join the ranks that the launcher (or the Ray host) described in the environment; alone without one.

        Seeds every generator. Raises ``InfraError`` when the others do not show up within ``collective_timeout``.
        """
        timeout = timedelta(seconds=self.config.collective_timeout)
        local_rank = int(os.environ.setdefault("LOCAL_RANK", str(max(0, self.config.local_rank))))
        machine.seed_everything(self.seed)
        self.device = machine.current_device(local_rank)
        if not dist.is_initialized():
            if all(os.environ.get(name) for name in LAUNCHER_VARIABLES):
                _join(timeout)
            else:
                # A store inside the process: no port to find, nothing to connect to.
                dist.init_process_group(
                    machine.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
                )
        _start_deepspeed(timeout)
        if dist.get_world_size() > 1:
            self.comm = TorchComm(self.config.collective_timeout)

    def close(self) -> None:
        """Leave the process group. The strategy cannot be used afterwards."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def loading_context(self, train: bool = True) -> Iterator[None]:
        """Make models that are built or loaded inside sharded from the start under ZeRO-3; changes nothing otherwise.

        Transformers looks this up in a process-wide global, so it lives only as long as the load.
        """
        if self.config.zero_stage != 3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        alive = HfDeepSpeedConfig(self._train_config() if train else self._eval_config())
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del alive

    def gather(self, params: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
        """Make sharded parameters whole inside the context. All ranks must enter it.

        With ``modifier_rank`` what that rank writes inside reaches all ranks; with None nothing may be written.
        """
        sharded = [param for param in params if hasattr(param, "ds_id")]
        if not sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank)

    def prepare_train(self, module: nn.Module, optim_config: OptimConfig, max_steps: int) -> TrainEngine:
        """Return the engine that trains ``module`` for ``max_steps`` optimizer steps (the length of the schedule)."""
        import deepspeed

        offload = self.config.adam_offload
        if offload and self.config.zero_stage == 0 and self.device.type != "cpu":
            raise UsageError("--adam_offload needs --zero_stage 1, 2 or 3")
        use_cpu_adam = offload and self._all_ranks_have_cpu_adam()
        optimizer = build_optimizer(module, optim_config, use_cpu_adam=use_cpu_adam)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._train_config())
        return TrainEngine(engine, self, optimizer, optim_config, max_steps)

    def prepare_eval(self, module: nn.Module, offload: bool = False) -> nn.Module:
        """Return ``module`` on the device, in eval mode and without gradients; a DeepSpeed engine under ZeRO-3.

        ``offload`` keeps the shards of ZeRO-3 in host memory. All ranks must call the result equally often.
        """
        module.requires_grad_(False)
        if self.config.zero_stage != 3:
            return module.to(self.device).eval()
        import deepspeed

        engine, *_ = deepspeed.initialize(model=module, config=self._eval_config(offload))
        engine.eval()
        return engine

    def _all_ranks_have_cpu_adam(self) -> bool:
        available = cpu_adam_is_available()
        everywhere = self.comm.all_reduce(float(available)) == self.world_size
        if not everywhere and self.rank == 0:
            logger.warning("--adam_offload: DeepSpeed's CPU Adam cannot be compiled here; torch's fused AdamW is used")
        return everywhere

    def _sizes(self) -> dict[str, Any]:
        return {
            "bf16": self.bf16,
            "micro_batch_size": self.micro_batch_size,
            "world_size": self.world_size,
            "param_persistence_threshold": self.param_persistence_threshold,
        }

    def _train_config(self) -> dict[str, Any]:
        # Stage 0 in fp32 has no DeepSpeed optimizer around ours: TrainEngine clips there itself.
        max_norm = 0.0 if self.config.zero_stage == 0 and not self.bf16 else self.max_norm
        offload = self.config.adam_offload and self.config.zero_stage > 0
        return deepspeed_config.train_config(self.config, max_norm=max_norm, offload=offload, **self._sizes())

    def _eval_config(self, offload: bool = False) -> dict[str, Any]:
        return deepspeed_config.eval_config(self.config, offload=offload, **self._sizes())


class TrainEngine:
    """A module in training: forward through the call, `backward` per micro-batch, `step` per optimizer step.

    Every method but `train` and `eval` must be called by all ranks, equally often.
    """

    def __init__(
        self,
        engine: Any,
        strategy: DeepSpeedStrategy,
        optimizer: torch.optim.Optimizer,
        optim_config: OptimConfig,
        max_steps: int,
    ):
        self.engine = engine
        self.strategy = strategy
        self._optimizer = optimizer
        self._own_norm: float | None = None
        if strategy.config.zero_stage == 0:
            # DeepSpeed may have taken a step on zero gradients to allocate the state; it must not count.
            optimizer.state.clear()
        if engine.optimizer is optimizer:
            optimizer.register_step_pre_hook(self._clip_or_skip)
        self._schedule = build_schedule(optimizer, optim_config, max_steps)

    @property
    def module(self) -> nn.Module:
        """The module that was given to `DeepSpeedStrategy.prepare_train`."""
        return self.engine.module

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._optimizer.param_groups[0]["lr"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.engine(*args, **kwargs)

    def train(self) -> TrainEngine:
        """Switch to training mode (dropout on)."""
        self.engine.train()
        return self

    def eval(self) -> TrainEngine:
        """Switch to evaluation mode (dropout off)."""
        self.engine.eval()
        return self

    def backward(self, loss_sum: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Add the gradient of ``loss_sum / weight`` to the step.

        ``loss_sum`` is the sum over this rank's micro-batch, ``weight`` the loss weights (tokens, pairs) of the whole
        optimizer step over all ranks; so the gradient does not depend on how the step was cut.
        """
        with waiting("backward", self.strategy.config.collective_timeout):
            self.engine.backward(loss_sum * (self.strategy.world_size / float(weight)), scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip, update the weights and advance the schedule.

        Raises ``NumericError`` on all ranks, with the weights unchanged and the gradient dropped, if it is not finite.
        """
        lr = self.lr
        with waiting("the optimizer step", self.strategy.config.collective_timeout):
            self.engine.step()
        norm = (
            self._own_norm if self.engine.optimizer is self._optimizer else float(self.engine.get_global_grad_norm())
        )
        if norm is None or not math.isfinite(norm) or getattr(self.engine.optimizer, "overflow", False):
            raise NumericError(
                f"the gradient is not finite (norm {norm}) at optimizer step {self._schedule.last_epoch + 1}; the "
                "weights were not changed. Lower the learning rate, or look at the data of this step"
            )
        self._schedule.step()
        return StepResult(norm, lr, True)

    def named_weights(
        self, dtype: torch.dtype | None = None, root: nn.Module | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, whole tensor on the CPU)`` of every weight and saved buffer; see `named_weights`."""
        return named_weights(root or self.module, self.strategy, dtype)

    def save(self, directory: str | Path) -> None:
        """Write weights, optimizer state and schedule of all ranks to ``directory``, in DeepSpeed's format."""
        directory = Path(directory)
        state = {"schedule": self._schedule.state_dict()}
        with waiting(f"saving {directory}", self.strategy.config.collective_timeout):
            self.engine.save_checkpoint(
                str(directory.parent), tag=directory.name, client_state=state, save_latest=False
            )

    def load(self, directory: str | Path) -> None:
        """Read back what `save` wrote; training goes on bit for bit. Raises ``DataError`` if it is not there.

        The files are unpickled by DeepSpeed: check their hashes first, as `CheckpointManager` does.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise DataError(f"{directory}: no such checkpoint folder")
        with waiting(f"loading {directory}", self.strategy.config.collective_timeout):
            path, state = self.engine.load_checkpoint(str(directory.parent), tag=directory.name)
        if path is None:
            raise DataError(f"{directory} holds no DeepSpeed checkpoint")
        self._schedule.load_state_dict(state["schedule"])
        if hasattr(self.engine.optimizer, "clip_grad"):
            self.engine.optimizer.clip_grad = self.engine.gradient_clipping()

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Do what DeepSpeed's wrapped optimizers do: without gradients the optimizer leaves every weight alone."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        norm = nn.utils.get_total_norm([param.grad for param in params])
        self._own_norm = float(norm)
        if not math.isfinite(self._own_norm):
            for param in params:
                param.grad = None
        elif self.strategy.max_norm > 0:
            nn.utils.clip_grads_with_norm_(params, self.strategy.max_norm, norm)


def named_weights(
    root: nn.Module, strategy: DeepSpeedStrategy, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, whole tensor on the CPU)`` for every entry of ``root``'s state dict, gathered one at a time.

    Names are relative to ``root``. A weight that is tied to an earlier one is left out. Floating tensors become
    ``dtype`` (None: as they are). All ranks must exhaust the iterator, even those that do not want the tensors.
    """
    seen: set[int] = set()
    for name, tensor in root.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with strategy.gather([tensor]):
            copy = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        yield name, copy


def _start_deepspeed(timeout: timedelta) -> None:
    os.environ.setdefault("DS_ACCELERATOR", machine.device_type())
    # ZeRO-3 on gloo says this at every step.
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    import deepspeed

    # On a CPU DeepSpeed would compile an all-reduce that only inference uses, for 40 s, and fail without a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=machine.backend(), timeout=timeout, auto_mpi_discovery=False)


def _join(timeout: timedelta) -> None:
    try:
        dist.init_process_group(machine.backend(), timeout=timeout)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InfraError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at {place} within "
            f"{timeout.total_seconds():g} s (--collective_timeout): {error}"
        ) from error
