"""A module in training under DeepSpeed.

The engine accumulates gradients over as many micro-batches as the caller likes, normalised by the weight of the whole
optimizer step, and refuses a step whose loss or gradient is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from openrlhf.errors import DataError, NumericError
from openrlhf.models.adapters import base_weights
from openrlhf.strategy.deferred import write_after
from openrlhf.strategy.disk import DISK_S
from openrlhf.strategy.resting import rest, resume
from openrlhf.strategy.universal import reading_universal
from openrlhf.strategy.unpickling import tensors_only

if TYPE_CHECKING:
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy

HYPERPARAMETERS = ("betas", "weight_decay")


class StepResult(NamedTuple):
    """What one optimizer step did: the gradient norm before clipping, and the learning rate it used."""

    grad_norm: float
    lr: float


class TrainEngine:
    """A module in training: forward through the call, `backward` per micro-batch, `step` per optimizer step.

    Every method but `train` and `eval` must be called by all ranks, equally often.
    """

    def __init__(self, engine: Any, strategy: DeepSpeedStrategy, optimizer: torch.optim.Optimizer, schedule: Any):
        self.engine = engine
        self.strategy = strategy
        self._optimizer = optimizer
        self._schedule = schedule
        self._own_norm = math.nan
        params = dict(engine.module.named_parameters(remove_duplicate=False))
        self._trained = {name for name, param in params.items() if param.requires_grad}
        self._buffers = {name for name, _ in engine.module.named_buffers(remove_duplicate=False)}
        self._all_trained = len(self._trained) == len(params)
        self._wrapped = engine.optimizer is not optimizer
        if not self._wrapped:
            optimizer.register_step_pre_hook(self._clip_or_skip)

    def close(self) -> None:
        """Take DeepSpeed's hooks out of the module: with them its memory and that of the optimizer are never freed."""
        self.engine.destroy()

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
        with self._waiting("forward"):
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
        optimizer step over all ranks; so the gradient does not depend on how the step was cut. A loss that is not
        finite makes the whole gradient so, which it need not be by itself: all ranks then refuse the step together.
        """
        scale = self.strategy.world_size / float(weight)
        scale = torch.where(loss_sum.detach().isfinite(), scale, math.nan)
        with self._waiting("backward"):
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip, update the weights and advance the schedule.

        Raises ``NumericError`` on all ranks, with the weights unchanged and the gradient dropped, if the gradient is
        not finite. `trainer/finite.py` says which rows it came from.
        """
        lr = self.lr
        with self._waiting("the optimizer step"):
            self.engine.step()
        norm = self._norm()
        if not math.isfinite(norm):
            raise NumericError(f"the gradient is not finite (norm {norm})")
        self._schedule.step()
        return StepResult(norm, lr)

    def rest(self) -> None:
        """Move what only an optimizer step needs to host memory, until :meth:`resume`; ZeRO stage 1 to 3."""
        rest(self.engine)

    def resume(self) -> None:
        """Undo :meth:`rest`."""
        resume(self.engine)

    def find_poison(self, losses: Iterable[Callable[[], torch.Tensor]]) -> list[bool]:
        """Return which micro-batches of this rank have a gradient that is not finite, by computing them again.

        ``losses`` compute the loss of each. Their gradients stay in the engine: this is for the last words of a run.
        """
        found = []
        params = [param for param in self.module.parameters() if param.requires_grad]
        for loss in losses:
            flags: list[torch.Tensor] = []
            hooks = [param.register_hook(lambda grad, to=flags: to.append(grad.isfinite().all())) for param in params]
            self.backward(loss(), 1.0)
            for hook in hooks:
                hook.remove()
            found.append(not all(flags))
        return found

    def named_weights(
        self, dtype: torch.dtype | None = None, root: nn.Module | None = None, wanted: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, whole tensor on the CPU)`` of every weight and saved buffer; see `named_weights`."""
        return named_weights(root or self.module, self.strategy, dtype, wanted)

    def save(self, directory: str | Path) -> None:
        """Write weights, optimizer state and schedule of all ranks to ``directory``, in DeepSpeed's format.

        Weights that are not trained stay out: they come from where the model was loaded. Ranks meet before they
        write, not after: for each other's disks the caller must wait, before the weights change on any rank. Raises
        ``InfraError`` that names a rank that does not come.
        """
        directory = Path(directory)
        state = {"schedule": self._schedule.state_dict()}
        # Others may still write what came before. DeepSpeed's own collectives could not tell that from a dead rank.
        self.strategy.comm.barrier(f"saving {directory}", DISK_S)
        with write_after(self.engine, self._kept), self._waiting(f"saving {directory}"):
            self.engine.save_checkpoint(
                str(directory.parent), tag=directory.name, client_state=state, save_latest=False,
                exclude_frozen_parameters=not self._all_trained,
            )  # fmt: skip

    def load(self, directory: str | Path) -> None:
        """Read back what `save` wrote; training goes on bit for bit.

        Raises ``DataError`` if it is not there, or holds anything but tensors and plain values.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise DataError(f"{directory}: no such checkpoint folder")
        given = [{name: group[name] for name in HYPERPARAMETERS} for group in self._optimizer.param_groups]
        rates = list(self._schedule.base_lrs)
        reading = tensors_only(directory), reading_universal(self.engine, directory)
        with self._waiting(f"loading {directory}", DISK_S), reading[0], reading[1]:
            path, state = self.engine.load_checkpoint(
                str(directory.parent), tag=directory.name, custom_load_fn=self._load_weights
            )
        if path is None:
            raise DataError(f"{directory} holds no DeepSpeed checkpoint")
        self._schedule.load_state_dict(state["schedule"])
        self._apply(given, rates)
        if hasattr(self.engine.optimizer, "clip_grad"):
            self.engine.optimizer.clip_grad = self.engine.gradient_clipping()

    def _kept(self, name: str) -> bool:
        """Return whether the weight or buffer ``name`` of the module is in a checkpoint."""
        return name in self._trained or name in self._buffers

    def _load_weights(self, src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
        """Load the weights of a checkpoint. Raises DataError unless they are those that this model trains."""
        dst.load_state_dict(src, strict=False)
        different = {name for name in {*src, *dst.state_dict()} if self._kept(name)} ^ set(src)
        if different:
            raise DataError(
                f"the checkpoint does not hold the weights that this model trains: {', '.join(sorted(different)[:3])} "
                f"and {max(0, len(different) - 3)} more are in one of them only"
            )

    def _apply(self, given: list[dict[str, Any]], rates: list[float]) -> None:
        """Let the flags of this run win over those that the checkpoint was written with; mostly they are the same."""
        self._schedule.base_lrs = rates
        done = self._schedule.last_epoch
        for group, values, rate, factor in zip(
            self._optimizer.param_groups, given, rates, self._schedule.lr_lambdas, strict=True
        ):
            group.update(values, initial_lr=rate, lr=rate * factor(done))

    def _waiting(self, what: str, timeout_s: float | None = None) -> AbstractContextManager:
        return self.strategy.comm.waiting(what, timeout_s)

    def _norm(self) -> float:
        """Return the norm of the last step's gradient before clipping; infinite if the step was refused."""
        if not self._wrapped:
            return self._own_norm
        if getattr(self.engine.optimizer, "overflow", False):
            return math.inf
        return float(self.engine.get_global_grad_norm())

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
    root: nn.Module,
    strategy: DeepSpeedStrategy,
    dtype: torch.dtype | None = None,
    wanted: bool = True,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, whole tensor on the CPU)`` for every entry of ``root``'s state dict, gathered one at a time.

    Names are relative to ``root``. A weight that is tied to an earlier one is left out. Floating tensors become
    ``dtype`` (None: as they are). All ranks must exhaust the iterator; one where ``wanted`` is false helps to gather,
    copies nothing and gets no entry. ``only`` are the names that are asked for; None means all.
    """
    seen: set[int] = set()
    for name, tensor in root.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (only is not None and name not in only):
            continue
        seen.add(id(tensor))
        copy = None
        with strategy.comm.waiting(f"gathering {name}"), strategy.gather([tensor]):
            if wanted:
                copy = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        if copy is not None:
            yield name, copy


def merged_weights(
    model: nn.Module, strategy: DeepSpeedStrategy, wanted: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of ``model`` as `named_weights` does, adapters merged in, under the names of its base."""
    for weight in base_weights(model):
        copy = None
        with strategy.comm.waiting(f"gathering {weight.name}"), strategy.gather(weight.parts):
            if wanted:
                copy = weight.merged().to("cpu", copy=True)
        if copy is not None:
            yield weight.name, copy
