"""Every schedule of ``--lr_scheduler`` starts at the learning rate and can be built."""

import pytest
from torch import nn

from openrlhf.config.groups import SCHEDULERS, OptimConfig
from openrlhf.strategy.optimizer import build_optimizer, build_schedule


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_starts_at_the_learning_rate_and_never_exceeds_it(name):
    config = OptimConfig(learning_rate=1e-3, lr_scheduler=name, lr_warmup_ratio=0.0)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-3) and max(rates) == rates[0]
    assert ("constant" in name) == (rates[-1] == rates[0])
