"""Tiny models and tokenizers that the tests build on the spot: nothing is downloaded."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? The answer is 72.",
    "user assistant system\nWrite a short story about a tiny robot. What is 12 + 30? It is 42.",
] * 8
VOCABULARY = 320

ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
    "bloom": {},
}


def tiny_tokenizer(path: str | Path):
    """Train a digits + byte-level BPE tokenizer with a ChatML template, save it to ``path`` and return it.

    The specials are ``<|pad|>`` (0), ``<|im_start|>`` (1) and ``<|im_end|>`` (2, the end of a sequence).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(path))
    return fast


def tiny_config(
    arch: str = "qwen2", *, hidden: int = 32, layers: int = 2, tied: bool = True, vocab: int = VOCABULARY, **extra
):
    """Return the transformers config of a tiny model of family ``arch`` (2 heads, 1 key-value head where it can)."""
    from transformers import AutoConfig

    common = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if arch == "gpt2":
        names = {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif arch == "bloom":
        names = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    else:
        names = {"num_key_value_heads": 1, "intermediate_size": 2 * hidden, "max_position_embeddings": 512}
    return AutoConfig.for_model(arch, **{**common, **names, **ARCHITECTURES.get(arch, {}), **extra})


def tiny_causal_lm(
    path: str | Path | None = None,
    arch: str = "qwen2",
    *,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = True,
    vocab: int = VOCABULARY,
    seed: int = 0,
    scale: float = 0.1,
    **extra,
):
    """Make a random float32 language model of family ``arch``, save it as safetensors to ``path``, return it.

    ``scale`` is the standard deviation of every weight matrix: large enough that the log-probs are far from uniform.
    ``extra`` goes to the config, e.g. ``sliding_window=4``. With ``path`` None nothing is saved.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(arch, hidden=hidden, layers=layers, tied=tied, vocab=vocab, **extra)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, scale)
    model.eval()
    if path is not None:
        model.save_pretrained(str(path), safe_serialization=True)
    return model


def tiny_folder(path: str | Path, arch: str = "qwen2", **options) -> str:
    """Save a tiny causal language model and its tokenizer to one folder and return the folder as text."""
    tiny_causal_lm(path, arch, **options)
    tiny_tokenizer(path)
    return str(path)


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody uses.

    They lie below those that the system hands out for outgoing connections, which busy neighbours would take in the
    minutes until they are used.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
