"""The engine gives the gradients of plain torch, however the step was cut and sharded, and goes on after a resume."""

import copy

import pytest
import torch

from openrlhf.config.groups import DeepSpeedConfig, OptimConfig
from openrlhf.errors import DataError
from openrlhf.strategy.deepspeed_config import eval_config, train_config
from openrlhf.strategy.optimizer import build_optimizer, build_schedule, parameter_groups
from tests.strategy import programs
from tests.strategy.ranks import run_ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def plain():
    """Gradients of the first step and weights after three, in plain torch on the whole batch."""
    net = programs.tiny_net()
    config = programs.OPTIMIZER
    optimizer = torch.optim.AdamW(parameter_groups(net, config.l2), betas=programs.BETAS)
    schedule = build_schedule(optimizer, config, 20)
    for step in range(3):
        tokens, targets, mask = programs.rows(step)
        optimizer.zero_grad()
        (programs.loss_sum(net, tokens, targets, mask) / mask.sum()).backward()
        if step == 0:
            first = {name: param.grad.clone() for name, param in net.named_parameters()}
        optimizer.step()
        schedule.step()
    return first, copy.deepcopy(net.state_dict())


def check_against(plain, found):
    first, last = plain
    expected_norm = torch.stack([grad.norm() for grad in first.values()]).norm().item()
    for stage, micro, norm, grads, weights in found:
        where = f"stage {stage}, micro-batch {micro}: "
        assert norm == pytest.approx(expected_norm, rel=1e-5), where + "norm"
        assert grads.keys() == first.keys()
        for name in first:
            torch.testing.assert_close(
                grads[name], first[name], **CLOSE, msg=lambda text, at=where + name: f"{at}: {text}"
            )
            torch.testing.assert_close(weights[name], last[name], rtol=1e-4, atol=1e-5)


def test_one_rank_gives_the_gradients_of_plain_torch_on_every_stage_and_micro_batch(plain):
    check_against(plain, programs.gradients(stages=[0, 1, 2, 3], micros=[8, 1]))


def test_two_ranks_give_the_gradients_of_plain_torch(plain):
    results = run_ranks("tests.strategy.programs:gradients", 2, stages=[0, 2, 3], micros=[2])
    for found in results:
        check_against(plain, found)


@pytest.mark.full
def test_two_ranks_give_the_gradients_of_plain_torch_on_every_stage_and_micro_batch(plain):
    for found in run_ranks("tests.strategy.programs:gradients", 2, stages=[0, 1, 2, 3], micros=[1, 2, 4]):
        check_against(plain, found)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(options, first):
    for stage, raised, unchanged, goes_on in programs.poisoned(stages=[0, 1, 2, 3], first=first, **options):
        assert (raised, unchanged, goes_on) == (True, True, True), f"stage {stage}"


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"adam_offload": True}], ids=["fp32", "bf16", "offload"])
def test_a_gradient_not_finite_on_one_rank_stops_all_ranks(options):
    for found in run_ranks("tests.strategy.programs:poisoned", 2, stages=[0, 1, 2, 3], **options):
        assert all(flags == [True] * 3 for _, *flags in found), found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(stage, tmp_path):
    assert all(programs.resumed(stage, str(tmp_path)))


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"adam_offload": True}, {"bf16": True, "adam_offload": True}],
    ids=["fp32", "bf16", "offload", "bf16-offload"],
)
def test_every_kind_of_resumed_run_is_bitwise_the_uninterrupted_one(world, options, tmp_path):
    stages = [0, 1, 2, 3]
    for equal in run_ranks(
        "tests.strategy.programs:resumed_on", world, stages=stages, folder=str(tmp_path), **options
    ):
        assert equal == dict.fromkeys(stages, True)


def test_zero_max_norm_does_not_clip_and_one_does():
    norms = {}
    for max_norm in (0.0, 1e-3):
        strategy = programs.strategy_of(zero_stage=0, max_norm=max_norm)
        engine = programs.engine_of(strategy)
        result = programs.run_step(engine, strategy, 0, 8)
        moments = programs.first_gradients(engine).values()
        norms[max_norm] = (result.grad_norm, torch.stack([moment.norm() for moment in moments]).norm().item())
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5)
    assert norms[1e-3] == pytest.approx((norms[0.0][0], 1e-3), rel=1e-3)


def test_loading_a_folder_that_is_not_there_is_a_data_error(tmp_path):
    engine = programs.engine_of(programs.strategy_of(zero_stage=0))
    with pytest.raises(DataError, match="nowhere"):
        engine.load(tmp_path / "nowhere")


def test_norm_weights_and_biases_have_no_decay():
    decay, no_decay = parameter_groups(programs.tiny_net(), 0.1)
    assert [group["weight_decay"] for group in (decay, no_decay)] == [0.1, 0.0]
    assert len(decay["params"]) == 3 and len(no_decay["params"]) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine_with_min_lr", [0.0, 0.5, 1.0, 0.775, 0.325, 0.1]),
        ("constant", [1.0] * 6),
        ("linear", [0.0, 0.5, 1.0, 2 / 3, 1 / 3, 0.0]),
    ],
)
def test_the_schedule_warms_up_and_falls_as_its_name_says(name, expected):
    config = OptimConfig(learning_rate=1.0, lr_scheduler=name, lr_warmup_ratio=0.3)
    optimizer = build_optimizer(programs.tiny_net(), config)
    schedule = build_schedule(optimizer, config, 5)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_zero_max_norm_reaches_deepspeed_as_no_clipping():
    sizes = {"bf16": False, "micro_batch_size": 4, "world_size": 2}
    config = train_config(DeepSpeedConfig(zero_stage=2), max_norm=0.0, **sizes)
    assert config["gradient_clipping"] == 0.0
    assert config["train_batch_size"] == 8
    assert config["managed_gradient_accumulation"] is False
    assert eval_config(DeepSpeedConfig(zero_stage=2), **sizes)["zero_optimization"]["stage"] == 0
    assert eval_config(DeepSpeedConfig(zero_stage=3), **sizes)["zero_optimization"]["stage"] == 3
