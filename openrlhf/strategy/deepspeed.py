"""The one strategy: DeepSpeed over one or many ranks, on CPU (gloo) and GPU (NCCL), ZeRO stage 0 to 3.

It knows the ranks, the device and how weights are sharded; a module goes in, a `TrainEngine` (`engine.py`) comes out.
Left out: what a loss is, when to save and where checkpoints live (`checkpoint.py`, `export.py`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from openrlhf import device as machine
from openrlhf.config.checks import ring_problems
from openrlhf.config.groups import DeepSpeedConfig, OptimConfig
from openrlhf.errors import UsageError
from openrlhf.models.backbone import TokenModel
from openrlhf.models.ring import Ring, join_neighbours
from openrlhf.strategy import deepspeed_config, rendezvous
from openrlhf.strategy.comm import Comm, SoloComm, TorchComm, limit_groups
from openrlhf.strategy.engine import TrainEngine
from openrlhf.strategy.master_weights import step_all_at_once
from openrlhf.strategy.optimizer import build_optimizer, build_schedule, cpu_adam_is_available

logger = logging.getLogger(__name__)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class DeepSpeedStrategy:
    """Where and how models are trained: ranks, device, sharding. One object serves every model of a process.

    Call `setup_distributed` first. ``micro_batch_size`` only tells DeepSpeed how many rows a micro-batch has.
    ``param_persistence_threshold`` is the size in elements under which ZeRO-3 keeps a parameter whole on every rank
    (None: DeepSpeed's 100,000). ``ring_size`` neighbouring ranks share each sequence; `ring` are those of this one.
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
        ring_size: int = 1,
        ring_head_stride: int = 1,
    ):
        self.config = config
        self.bf16 = bf16
        self.max_norm = max_norm
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.param_persistence_threshold = param_persistence_threshold
        self.comm: Comm = SoloComm()
        self.ring = Ring()
        self._ring_size, self._ring_head_stride = ring_size, ring_head_stride
        self.device = torch.device("cpu")
        self._engines: list[TrainEngine] = []

    @property
    def rank(self) -> int:
        """This process's place among the ranks."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.comm.world_size

    @property
    def data_parallel_rank(self) -> int:
        """The place of this process's ring among the rings: all ranks of one read the same rows."""
        return self.rank // self.ring.size

    @property
    def data_parallel_size(self) -> int:
        """The number of rings, which is that of the ranks where each rank is one by itself."""
        return self.world_size // self.ring.size

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

        Seeds every generator. Raises ``InfraError`` when the others do not show up within ``collective_timeout``, and
        ``UsageError`` when they cannot be dealt to rings.
        """
        timeout = timedelta(seconds=self.config.collective_timeout)
        local_rank = int(os.environ.setdefault("LOCAL_RANK", str(max(0, self.config.local_rank))))
        machine.seed_everything(self.seed)
        self.device = machine.current_device(local_rank)
        if not dist.is_initialized():
            if all(os.environ.get(name) for name in LAUNCHER_VARIABLES):
                rendezvous.join(timeout)
            else:
                rendezvous.join_alone(timeout)
        _start_deepspeed(timeout)
        if dist.get_world_size() > 1:
            self.comm = TorchComm(self.config.collective_timeout)
        problems = ring_problems(self._ring_size, self.world_size)
        if problems:
            raise UsageError(problems)
        if self._ring_size > 1:
            self.ring = join_neighbours(self._ring_size, self._ring_head_stride, timeout)

    @contextmanager
    def joined(self) -> Iterator[DeepSpeedStrategy]:
        """Join the ranks for the length of the block, see :meth:`setup_distributed`, and leave them at its end.

        After an error only a rank that is alone leaves: to leave in good order another would wait for ranks that may
        be gone.
        """
        self.setup_distributed()
        try:
            yield self
        except BaseException:
            if self.world_size == 1:
                self.close()
            raise
        self.close()

    def close(self) -> None:
        """Leave the process group. Neither this strategy nor its engines can be used afterwards; another may join."""
        for engine in self._engines:
            engine.close()
        self._engines.clear()
        self.comm.close()
        if dist.is_initialized():
            import deepspeed

            # DeepSpeed keeps groups of its own, which would outlive theirs.
            deepspeed.comm.destroy_process_group()

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
        self._share_batches(module)
        use_cpu_adam = offload and self._all_ranks_have_cpu_adam()
        optimizer = build_optimizer(module, optim_config, use_cpu_adam=use_cpu_adam)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._train_config())
        limit_groups(self.config.collective_timeout)
        if self.config.zero_stage == 0:
            # DeepSpeed may have taken a step on zero gradients to allocate the state; it must not count.
            optimizer.state.clear()
            if engine.optimizer is not optimizer:
                step_all_at_once(engine.optimizer)
        self._engines.append(TrainEngine(engine, self, optimizer, build_schedule(optimizer, optim_config, max_steps)))
        return self._engines[-1]

    def prepare_eval(self, module: nn.Module, offload: bool = False) -> nn.Module:
        """Return ``module`` on the device, in eval mode and without gradients; a DeepSpeed engine under ZeRO-3.

        ``offload`` keeps the shards of ZeRO-3 in host memory. All ranks must call the result equally often.
        """
        module.requires_grad_(False)
        self._share_batches(module)
        if self.config.zero_stage != 3:
            return module.to(self.device).eval()
        import deepspeed

        engine, *_ = deepspeed.initialize(model=module, config=self._eval_config(offload))
        limit_groups(self.config.collective_timeout)
        engine.eval()
        return engine

    def release(self, module: nn.Module) -> None:
        """Give back the memory of what `prepare_eval` returned; nobody may call it any more.

        DeepSpeed keeps every module that it ever sharded, so the weights are dropped one by one.
        """
        for param in module.parameters():
            param.data = torch.empty(0, dtype=param.dtype)
            if hasattr(param, "ds_tensor"):
                param.ds_tensor.data = torch.empty(0, dtype=param.dtype)
        if hasattr(module, "destroy"):
            module.destroy()
        machine.empty_cache()

    def _share_batches(self, module: nn.Module) -> None:
        if self.ring.size > 1 and isinstance(module, TokenModel):
            module.share_batches(self.ring)

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


def _start_deepspeed(timeout: timedelta) -> None:
    os.environ.setdefault("DS_ACCELERATOR", machine.device_type())
    # ZeRO-3 on gloo says this at every step.
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    import deepspeed

    # On a CPU DeepSpeed would compile an all-reduce that only inference uses, for 40 s, and fail without a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=machine.backend(), timeout=timeout, auto_mpi_discovery=False)
