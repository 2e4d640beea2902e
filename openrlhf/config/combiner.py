"""The flags of ``lora_combiner``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from openrlhf.config.flags import flag


@dataclass(frozen=True)
class CombinerConfig:
    """Merging an adapter.

    Write a model that computes what a base model computes with its LoRA adapter.
    """

    run_prefix: ClassVar[str] = "combine"
    model_path: str | None = flag(None, "Base model: a local folder or a hub name.")
    lora_path: str | None = flag(None, "Folder of the adapter.")
    output_path: str | None = flag(None, "Folder of the merged model.")
    is_rm: bool = flag(False, "The adapter is that of a reward model or critic.")
    bf16: bool = flag(False, "Write bf16 weights; without it weights have the type of the base model's.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the model folder.")

    def problems(self) -> list[str]:
        needed = {"model_path": "the base model", "lora_path": "the adapter", "output_path": "the merged model"}
        found = [
            f"--{name} is missing: name the folder of {what}"
            for name, what in needed.items()
            if not getattr(self, name)
        ]
        places = [Path(path) for path in (self.model_path, self.lora_path) if path]
        if self.output_path and Path(self.output_path).resolve() in [place.resolve() for place in places]:
            found.append(f"--output_path {self.output_path} would overwrite what is merged: name another folder")
        return found
