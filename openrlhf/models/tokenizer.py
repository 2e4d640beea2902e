"""Loading a tokenizer: right padding, and a pad token that is not the end of a sequence."""

from __future__ import annotations

from pathlib import Path

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import DataError

PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>")
NUL_NAMES = ("\u0100", "<0x00>")
"""The byte 0 in byte-level and in sentencepiece vocabularies: in every such vocabulary, in no text."""
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(
    path: str,
    *,
    use_fast: bool = True,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    flag: str = "--pretrain",
):
    """Return the tokenizer of the folder or hub model ``path``, padding on the right.

    A missing pad token, or one that is also the end of a sequence, is replaced by a token that the model's vocabulary
    already has; the vocabulary never grows. ``chat_template`` takes the place of the tokenizer's own. ``flag`` named
    ``path``, for messages.

    Raises:
        DataError: there is no tokenizer at ``path``, it does not say which token ends a sequence, or it has tokens
            that the model has no embedding for.
    """
    from transformers import AutoTokenizer

    from openrlhf.models.loading import check_folder, loading_error

    local = check_folder(path, trust_remote_code=trust_remote_code, flag=flag)
    if local and not any((Path(path) / name).is_file() for name in FILES):
        raise DataError(f"{flag} {path}: the folder has no tokenizer; copy tokenizer.json from the base model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=use_fast, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise loading_error(error, f"{flag} {path}", "its tokenizer") from error
    known = _embedded_tokens(path, trust_remote_code)
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= known:
        raise DataError(
            f"{flag} {path}: the tokenizer has no end-of-sequence token that the model knows; "
            "set `eos_token` in tokenizer_config.json"
        )
    _check_vocabulary(tokenizer, known, f"{flag} {path}")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = _pad_token(tokenizer, known)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def end_ids(tokenizer, settings) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own, and those of a model's generation ``settings``.

    Chat models have several (Llama 3 ends a message, or a call of a tool); it is the list at which vLLM stops.
    """
    more = settings.eos_token_id
    own = [more] if isinstance(more, int) else more or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))


def check_vocabulary(path: str, tokenizer, model_cfg: ModelConfig, flag: str) -> None:
    """Raise DataError when the model at ``path``, named by ``flag``, has another vocabulary than ``tokenizer``."""
    own = load_tokenizer(
        path,
        use_fast=not model_cfg.disable_fast_tokenizer,
        trust_remote_code=model_cfg.trust_remote_code,
        flag=flag,
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{flag} {path}: its vocabulary differs from that of --pretrain {model_cfg.pretrain}; both models read "
            "the same token ids, so both must have one tokenizer"
        )


def _embedded_tokens(path: str, trust_remote_code: bool) -> float:
    """Return how many tokens the model has embeddings for.

    transformers adds the default special tokens of a model's family to a tokenizer that lacks them, beyond those.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return float("inf")
    return getattr(config.get_text_config(), "vocab_size", float("inf"))


def _check_vocabulary(tokenizer, known: float, source: str) -> None:
    """Raise DataError when ordinary tokens have no embedding; special ones need none until they are used."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    beyond = sorted(index for index in tokenizer.get_vocab().values() if index >= known and index not in special)
    if beyond:
        raise DataError(
            f"{source}: the tokenizer has {len(tokenizer):,} tokens and the model embeddings for {known:,.0f} "
            f"(vocab_size in config.json), so {len(beyond):,} tokens have none; copy the tokenizer of this model"
        )


def _pad_token(tokenizer, known: float) -> str:
    """Return the token that pads: one made for it, else one that text does not contain, else eos."""
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if index < known}
    specials = [token for token in tokenizer.all_special_tokens if token != tokenizer.bos_token]
    for token in (*PAD_NAMES, tokenizer.unk_token, *NUL_NAMES, *specials):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    return tokenizer.eos_token


def get_tokenizer(pretrain, model, padding_side="left", strategy=None, use_fast=True):
    """Return the tokenizer of ``pretrain``, with OpenRLHF's signature; tells ``model`` the pad token."""
    tokenizer = load_tokenizer(pretrain, use_fast=use_fast)
    tokenizer.padding_side = padding_side
    if model is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
