"""Serve a reward model over HTTP, for ``--remote_rm_url http://HOST:PORT/get_reward``.

    python -m openrlhf.cli.serve_rm --reward_pretrain RM --port 5000 [--host 0.0.0.0 --api_key FILE]

Listens on this machine only unless ``--host`` says otherwise. Stop it with SIGTERM or Ctrl-C.
"""

from __future__ import annotations

from openrlhf.cli.common import run
from openrlhf.config.secrets import named_key
from openrlhf.config.serve import ServeConfig


def plan(config: ServeConfig, _: int) -> list[str]:
    """Return what would be done."""
    who = "this machine only" if config.is_private else "every machine that reaches it"
    key = "with a key" if config.api_key else "without a key"
    return [
        f"serve the reward model {config.reward_pretrain} at http://{config.host}:{config.port}/get_reward, "
        f"to {who}, {key}"
    ]


def serve_model(config: ServeConfig) -> None:
    """Serve as ``config`` says until the process is asked to stop. Raises the errors of :mod:`openrlhf.errors`."""
    from openrlhf.models.suitability import check_reward_model
    from openrlhf.rollout.reward_batcher import Limits
    from openrlhf.rollout.reward_scorer import RewardScorer
    from openrlhf.rollout.reward_server import bind, build_app, serve

    check_reward_model(
        config.reward_pretrain,
        trust_remote_code=config.trust_remote_code,
        value_head_prefix=config.value_head_prefix,
        normalize_reward=config.normalize_reward,
        flag="--reward_pretrain",
    )
    with bind(config.host, config.port) as place:
        limits = Limits(text=max(Limits.text, 16 * config.max_len))
        scorer = RewardScorer(config)
        scorer(["warm up"])
        app = build_app(scorer, key=named_key(config.api_key), name=config.reward_pretrain, limits=limits)
        place.listen()
        host, port = place.getsockname()[:2]
        print(f"serving rewards at http://{f'[{host}]' if ':' in host else host}:{port}/get_reward", flush=True)
        serve(app, place, limits)
    print("stopped", flush=True)


if __name__ == "__main__":
    run(ServeConfig, serve_model, "serve_rm", plan)
