"""The flags of ``serve_rm``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import ClassVar

from openrlhf.config.checks import key_problems
from openrlhf.config.flags import flag


@dataclass(frozen=True)
class ServeConfig:
    """Serving a reward model.

    Answer reward requests over HTTP: POST /get_reward, and GET /health.
    """

    run_prefix: ClassVar[str] = "serve"
    reward_pretrain: str | None = flag(None, "Reward model: a local folder or a hub name.")
    normalize_reward: bool = flag(False, "Normalise with the mean and std stored in the model's config.json.")
    value_head_prefix: str = flag("score", "Name of the scalar head; the one in config.json wins.")
    max_len: int = flag(2048, "Most tokens of a text that are read; the end of a longer one is cut.", at_least=2)
    port: int = flag(5000, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65535)
    host: str = flag("127.0.0.1", "Address to listen on; any but this machine's own needs --api_key.")
    api_key: str | None = flag(None, "Key that requests must bring: a file, or an environment variable's name.")
    load_in_4bit: bool = flag(False, "Load the weights as 4-bit NF4.")
    bf16: bool = flag(False, "Compute with bf16 weights; without it in fp32.")
    flash_attn: bool = flag(False, "Use FlashAttention.")
    disable_fast_tokenizer: bool = flag(False, "Load the slow tokenizer.")
    batch_size: int | None = flag(None, "Most texts of a forward pass; default is 16.", at_least=1)
    trust_remote_code: bool = flag(False, "Run model code that comes with the model folder.")
    use_ms: bool = flag(False, "Take a model that is not on this machine from ModelScope.")

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problems(self) -> list[str]:
        found = key_problems("api_key", self.api_key)
        if not self.reward_pretrain:
            found.append("--reward_pretrain is missing: name the folder or hub name of the reward model")
        if not self.is_private and self.api_key is None:
            found.append(
                f"--host {self.host} can be reached from other machines: name a key with --api_key, which clients "
                "send (--remote_rm_key), or leave --host at 127.0.0.1"
            )
        return found
