"""What the processes of the strategy tests run; every function is called by all ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from openrlhf.config.groups import CheckpointConfig, DeepSpeedConfig, OptimConfig
from openrlhf.errors import DataError, InfraError, NumericError, OpenRLHFError
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.disk import SharedDisk
from openrlhf.strategy.engine import TrainEngine

BETAS = (0.9, 0.95)
WIDTH, CLASSES, ROWS = 8, 5, 8
OPTIMIZER = OptimConfig(learning_rate=1e-2, l2=0.1, adam_betas=BETAS, lr_scheduler="linear", lr_warmup_ratio=0.0)


class TinyNet(nn.Module):
    """An embedding, a norm, two linear layers and dropout: weights with and without decay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(torch.tanh(self.inner(self.norm(self.embed(tokens)))))
        return self.head(hidden)


def tiny_net(bf16: bool = False) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = TinyNet().eval()
    return net.bfloat16() if bf16 else net


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens, targets, mask), each (ROWS, 6), of an optimizer step; rows have 1 to 6 targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, CLASSES, (ROWS, 6), generator=generator)
    targets = torch.randint(0, CLASSES, (ROWS, 6), generator=generator)
    mask = torch.arange(6) <= torch.arange(ROWS)[:, None] % 6
    return tokens, targets, mask


def loss_sum(module, tokens: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_probs = module(tokens).float().log_softmax(-1)
    picked = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return -torch.where(mask, picked, 0.0).sum()


def strategy_of(**options) -> DeepSpeedStrategy:
    own = {name: options.pop(name) for name in ("bf16", "max_norm") if name in options}
    options.setdefault("collective_timeout", 60)
    strategy = DeepSpeedStrategy(DeepSpeedConfig(**options), param_persistence_threshold=0, **{"max_norm": 0.0, **own})
    strategy.setup_distributed()
    return strategy


def engine_of(strategy: DeepSpeedStrategy) -> TrainEngine:
    return strategy.prepare_train(tiny_net(strategy.bf16), OPTIMIZER, 20)


def run_step(engine: TrainEngine, strategy: DeepSpeedStrategy, step: int, micro: int, poison: bool = False):
    """Do one optimizer step over this rank's rows, ``micro`` rows at a time."""
    tokens, targets, mask = rows(step)
    weight, world = mask.sum(), strategy.world_size
    for start in range(0, ROWS // world, micro):
        mine = slice(strategy.rank + start * world, (start + micro) * world, world)
        loss = loss_sum(engine, tokens[mine], targets[mine], mask[mine])
        engine.backward(loss * float("inf") if poison and strategy.rank == 0 and start == 0 else loss, weight)
    return engine.step()


def first_gradients(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, read back from Adam's first moment."""
    from deepspeed.utils import safe_get_full_optimizer_state

    gradients = {}
    if engine.strategy.config.zero_stage in (1, 2):
        # DeepSpeed links the state of its second parameter group before that group has any.
        engine.engine.optimizer._hp_optimizer_states_linked = False
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if engine.strategy.config.zero_stage == 0:
            moment = engine.engine.optimizer.state[param]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(param, "exp_avg")
        gradients[name] = moment.detach().clone() / (1 - BETAS[0])
    return gradients


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return dict(engine.named_weights())


def gradients(stages: list[int], micros: list[int]) -> list:
    """Return (stage, micro, gradient norm, gradients, weights after three steps) of every combination."""
    found = []
    for stage in stages:
        strategy = strategy_of(zero_stage=stage)
        for micro in micros:
            engine = engine_of(strategy)
            norm = run_step(engine, strategy, 0, micro).grad_norm
            first = first_gradients(engine)
            for step in (1, 2):
                run_step(engine, strategy, step, micro)
            found.append((stage, micro, norm, first, weights(engine)))
    return found


def poisoned(stages: list[int], first: bool = False, **options) -> list:
    """Return (stage, raised, weights unchanged, trains on) with a gradient that is not finite on rank 0."""
    found = []
    for stage in stages:
        strategy = strategy_of(zero_stage=stage, max_norm=1.0, **options)
        engine = engine_of(strategy)
        if not first:
            run_step(engine, strategy, 0, 2)
        before, raised, lr = weights(engine), False, engine.lr
        try:
            run_step(engine, strategy, 1, 2, poison=True)
        except NumericError:
            raised = True
        after = weights(engine)
        same = all(torch.equal(before[name], after[name]) for name in before) and lr == engine.lr
        run_step(engine, strategy, 1, 2)
        moved = weights(engine)
        healthy = all(bool(tensor.isfinite().all()) for tensor in moved.values())
        trains = any(not torch.equal(moved[name], after[name]) for name in moved)
        found.append((stage, raised, same, healthy and trains))
    return found


def resumed_on(stages: list[int], folder: str, **options) -> dict[int, bool]:
    """Return for every stage whether a resumed run is bitwise the uninterrupted one."""
    return {stage: all(resumed(stage, f"{folder}/{stage}", **options)) for stage in stages}


def resumed(stage: int, folder: str, **options) -> list[bool]:
    """Return which weights are bitwise equal after two resumes and without any, dropout on."""
    strategy = strategy_of(zero_stage=stage, max_norm=0.5, **options)
    config = CheckpointConfig(ckpt_path=folder, load_checkpoint=True)
    manager = CheckpointManager(config, strategy.comm, layout=strategy.layout, say=lambda line: None)

    def steps(engine: TrainEngine, first: int, last: int) -> TrainEngine:
        engine.train()
        for step in range(first, last):
            run_step(engine, strategy, step, 2)
        return engine

    torch.manual_seed(strategy.rank)
    whole = steps(engine_of(strategy), 0, 6)
    expected = [weights(whole), run_step(whole, strategy, 6, 2)]
    torch.manual_seed(strategy.rank)
    manager.save(2, {"actor": steps(engine_of(strategy), 0, 2).save}, {"step": 2})
    for first in (2, 4):
        torch.manual_seed(99)
        engine = engine_of(strategy)
        state = manager.load(manager.latest(), {"actor": engine.load})
        steps(engine, state["step"], first + 2)
        manager.save(first + 2, {"actor": engine.save}, {"step": first + 2})
    actual = [weights(engine), run_step(engine, strategy, 6, 2)]
    return [torch.equal(expected[0][name], actual[0][name]) for name in expected[0]] + [expected[1] == actual[1]]


def steps_of(strategy: DeepSpeedStrategy, folder: str, first: int, last: int, **flags) -> tuple[list, str]:
    """Go on at step ``first`` from what is in ``folder`` and save at the end; return losses and what was said."""
    said: list[str] = []
    config = CheckpointConfig(ckpt_path=folder, load_checkpoint=True, **flags)
    manager = CheckpointManager(config, strategy.comm, layout=strategy.layout, say=said.append)
    engine, losses = engine_of(strategy), []
    checkpoint = manager.start()
    if checkpoint is not None:
        manager.load(checkpoint, {"model": engine.load})
    for step in range(first, last):
        # Without dropout, whose random numbers belong to the ranks.
        engine.eval()
        tokens, targets, mask = rows(step)
        with torch.no_grad():
            losses.append(loss_sum(engine, tokens, targets, mask).item())
        losses.append(run_step(engine, strategy, step, 1).grad_norm)
    manager.save(last, {"model": engine.save}, {"step": last})
    return losses, " ".join(said)


def cut_anew(folder: str, stage: int, first: int, last: int, **options) -> tuple[list, str]:
    """Return what `steps_of` does with ``stage``, converting the checkpoint if it has another layout."""
    flags = {"use_ds_universal_ckpt": options.pop("convert", True)}
    try:
        return steps_of(strategy_of(zero_stage=stage, **options), folder, first, last, **flags)
    except OpenRLHFError as error:
        return [], f"{type(error).__name__}: {error}"


def comm_operations() -> list:
    """Return what every operation gives on this rank."""
    comm = strategy_of(zero_stage=0).comm
    rank = comm.rank
    tensor = torch.tensor([1.0, float(rank)])
    found = [comm.all_reduce(tensor, op).tolist() for op in ("sum", "max", "mean")]
    found += [comm.all_reduce(rank + 0.5, op) for op in ("sum", "max", "mean")]
    found += [tensor.tolist(), comm.all_gather_object({"rank": rank}), comm.broadcast_object(f"from {rank}", src=1)]
    comm.barrier("done")
    return found


def absent_from_barrier() -> str:
    """Return the message of the rank that waits alone; the other leaves without the barrier."""
    strategy = strategy_of(zero_stage=0, collective_timeout=2)
    if strategy.rank == 1:
        import time

        time.sleep(6)
        return "away"
    try:
        strategy.comm.barrier("the test")
    except InfraError as error:
        return str(error)
    return "no error"


def absent_from_a_step(how: str, victim: int, stage: int) -> tuple[str, float]:
    """Return what the other rank says, and after how many seconds, when ``victim`` does not come to the second step.

    ``how``: it is ``"stopped"`` (SIGSTOP), ``"killed"``, or ``"busy"`` with something else.
    """
    import os
    import signal
    import time

    strategy = strategy_of(zero_stage=stage, collective_timeout=4)
    engine = engine_of(strategy)
    run_step(engine, strategy, 0, 2)
    pids = strategy.comm.all_gather_object(os.getpid())
    if strategy.rank == victim:
        if how == "busy":
            time.sleep(30)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    began = time.monotonic()
    try:
        run_step(engine, strategy, 1, 2)
    except InfraError as error:
        return str(error), time.monotonic() - began
    finally:
        os.kill(pids[victim], signal.SIGKILL)
    return "no error", 0.0


def slow_rank_zero(folder: str) -> str:
    """Return the checkpoint that is there although rank 0 writes for three times the collective timeout."""
    import time

    from openrlhf.strategy import files

    strategy = strategy_of(zero_stage=0, collective_timeout=2)
    manager = CheckpointManager(CheckpointConfig(ckpt_path=folder), strategy.comm, layout=strategy.layout)
    durable = files.write_durably

    def slowly(path: Path, text: str) -> None:
        time.sleep(6)
        durable(path, text)

    files.write_durably = slowly

    def saver(path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / f"{strategy.rank}.txt").write_text("x")

    manager.save(1, {"actor": saver})
    return manager.latest().path.name


def slow_weights(folder: str) -> str:
    """Return the checkpoint that is there although rank 0's weights take three times the collective timeout."""
    import time

    strategy = strategy_of(zero_stage=1, collective_timeout=3)
    manager = CheckpointManager(CheckpointConfig(ckpt_path=folder), strategy.comm, layout=strategy.layout)
    engine, write = engine_of(strategy), torch.save

    def slowly(value, file, **options) -> None:
        if strategy.rank == 0 and str(file).endswith("_model_states.pt"):
            time.sleep(9)
        write(value, file, **options)

    torch.save = slowly
    manager.save(1, {"model": engine.save})
    return manager.latest().path.name


def stopped_before_saving(folder: str) -> tuple[str, float]:
    """Return what rank 0 says, and after how many seconds, when rank 1 is stopped before it saves."""
    import os
    import signal
    import time

    from openrlhf.strategy import heartbeat

    heartbeat.SILENT_S = 3.0
    strategy = strategy_of(zero_stage=1)
    engine = engine_of(strategy)
    pids = strategy.comm.all_gather_object(os.getpid())
    if strategy.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        engine.save(Path(folder) / "model")
    except InfraError as error:
        return str(error), time.monotonic() - began
    finally:
        os.kill(pids[1], signal.SIGKILL)
    return "no error", time.monotonic() - began


def full_on_one_rank(folder: str) -> tuple[str, float]:
    """Return the message, and the seconds until it came, when rank 1 cannot write its part of a checkpoint."""
    import resource
    import time

    strategy = strategy_of(zero_stage=2, collective_timeout=30)
    manager = CheckpointManager(CheckpointConfig(ckpt_path=folder), strategy.comm, layout=strategy.layout)
    engine = engine_of(strategy)
    run_step(engine, strategy, 0, 2)
    if strategy.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    began = time.monotonic()
    try:
        manager.save(1, {"model": engine.save})
    except OpenRLHFError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error", time.monotonic() - began


def failing_on_main(folder: str) -> list[tuple[str, float]]:
    """Return the kinds of error of three actions that fail on rank 0, and the seconds until each was heard."""
    import time

    disk = SharedDisk(Path(folder), strategy_of(zero_stage=0, collective_timeout=30).comm)
    found = []
    for error in (DataError("damaged"), RuntimeError("PytorchStreamWriter failed"), OSError(28, "No space left")):

        def action(error: Exception = error) -> None:
            raise error

        began = time.monotonic()
        try:
            disk.on_main(action, "convert")
        except OpenRLHFError as told:
            found.append((type(told).__name__, time.monotonic() - began))
    return found


def killed_before_the_disk(folder: str, victim: int) -> tuple[str, float]:
    """Return what the other rank says, and after how many seconds, when ``victim`` is killed before the disk work."""
    import os
    import signal
    import time

    strategy = strategy_of(zero_stage=0, collective_timeout=30)
    strategy.comm.barrier("the start")
    if strategy.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        SharedDisk(Path(folder), strategy.comm).on_main(lambda: None, "write to")
    except OpenRLHFError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", time.monotonic() - began


def other_checkpoint_on_one_rank(folder: str) -> str:
    """Return the message when rank 1 sees another checkpoint of the same name than rank 0."""
    strategy = strategy_of(zero_stage=0, collective_timeout=10)
    own = Path(folder, str(strategy.rank))
    alone = CheckpointManager(CheckpointConfig(ckpt_path=str(own)), SoloComm(), say=lambda line: None)

    def saver(path: Path) -> None:
        path.mkdir(parents=True)
        (path / "weights").write_text("x")

    alone.save(2, {"actor": saver}, {"written by": strategy.rank})
    try:
        CheckpointManager(CheckpointConfig(ckpt_path=str(own)), strategy.comm).latest()
    except OpenRLHFError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def different_disks(folder: str) -> str:
    """Return the message when the ranks look into different folders."""
    strategy = strategy_of(zero_stage=0, collective_timeout=10)
    own = f"{folder}/{strategy.rank}"
    manager = CheckpointManager(CheckpointConfig(ckpt_path=own), strategy.comm, layout=strategy.layout)

    def saver(path: Path) -> None:
        path.mkdir(parents=True)
        (path / "weights").write_text(str(strategy.rank))

    try:
        manager.save(1, {"actor": saver})
    except OpenRLHFError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sharded_model(folder: str, out: str, value: bool, stage: int = 3) -> dict:
    """Read, train one step, export twice; return what was read, if it was sharded, the norm, the sum of weights."""
    from openrlhf.config.groups import ModelConfig
    from openrlhf.models.actor import Actor
    from openrlhf.models.loading import load_causal_lm, load_value_model
    from openrlhf.models.tokenizer import load_tokenizer
    from openrlhf.models.value_head import ValueModel
    from openrlhf.strategy.export import export_model

    strategy = strategy_of(zero_stage=stage)

    def load(train: bool):
        context = partial(strategy.loading_context, train=train)
        if not value:
            return Actor(load_causal_lm(folder, ModelConfig(pretrain=folder), context=context))
        head = {"value_head_prefix": "value_head", "pad_token_id": 0, "gather": strategy.gather}
        return ValueModel(load_value_model(folder, ModelConfig(pretrain=folder), context=context, **head))

    def read(model, rows: slice) -> torch.Tensor:
        output = model(tokens[rows], mask[rows])
        return output if value else output.log_probs

    tokens = torch.arange(40).view(4, 10) * 7 % 300
    mask = torch.arange(10) < torch.tensor([10, 4, 7, 9])[:, None]
    with torch.no_grad():
        seen = [read(strategy.prepare_eval(load(False), offload=offload), slice(None)) for offload in (False, True)]
    module = load(True)
    sharded = any(getattr(param, "ds_id", None) is not None for param in module.parameters())
    config = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", adam_betas=BETAS)
    engine = strategy.prepare_train(module, config, 10)
    engine.train()
    output = read(engine, slice(strategy.rank, None, strategy.world_size))
    engine.backward(output.square().sum(), 100)
    norm = engine.step().grad_norm
    export_model(engine, strategy, out, load_tokenizer(folder))
    export_model(engine, strategy, out, load_tokenizer(folder))
    total = sum(tensor.double().sum().item() for tensor in weights(engine).values())
    return {"read": [part.sum().item() for part in seen], "sharded": sharded, "norm": norm, "sum": total}
