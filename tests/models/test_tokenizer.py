import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from openrlhf.errors import DataError
from openrlhf.models.tokenizer import get_tokenizer, load_tokenizer
from tests.helpers import tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


def resave(folder, tmp_path, vocabulary=None, **specials):
    """Save a tokenizer with other special tokens beside the config of ``folder``."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(vocabulary or {"a": 0, "</s>": 1, "b": 2}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, **specials).save_pretrained(tmp_path)
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    return str(tmp_path)


def test_the_pad_token_stays_and_padding_is_on_the_right(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_pad_token_equal_to_eos_is_replaced_by_one_of_the_vocabulary(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tiny_folder(tmp_path)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<|pad|>"
    assert loaded.pad_token_id == 0


def test_without_any_pad_token_the_byte_0_pads(folder, tmp_path):
    path = resave(folder, tmp_path, {"a": 0, "</s>": 1, "\u0100": 2}, eos_token="</s>")
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token_id == 2


def test_a_vocabulary_with_nothing_to_pad_with_pads_with_eos(folder, tmp_path):
    tokenizer = load_tokenizer(resave(folder, tmp_path, eos_token="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_a_tokenizer_without_an_end_of_sequence_is_a_data_error(folder, tmp_path):
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(resave(folder, tmp_path, unk_token="a"))


def test_a_missing_folder_is_a_data_error_that_names_the_flag(tmp_path):
    with pytest.raises(DataError, match="--pretrain"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_folder_without_a_tokenizer_is_a_data_error(folder, tmp_path):
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_the_chat_template_can_be_replaced(folder):
    tokenizer = load_tokenizer(folder, chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_the_old_signature_tells_the_model_its_pad_token(folder):
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=None))
    tokenizer = get_tokenizer(folder, model, "left", None)
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


def test_digits_are_single_tokens_and_text_survives_the_round_trip(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer("2026", add_special_tokens=False).input_ids) == 4
    assert tokenizer.decode(tokenizer("48 clips, café").input_ids) == "48 clips, café"


def test_more_tokens_than_the_model_embeds_are_an_error_at_once(tmp_path):
    tiny_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 256}))
    with pytest.raises(DataError, match=r"--reward_pretrain .*the tokenizer has \d+ tokens and the model.* for 256"):
        load_tokenizer(str(tmp_path), flag="--reward_pretrain")


def test_fewer_tokens_than_the_model_embeds_are_usual(tmp_path):
    tiny_folder(tmp_path, vocab=384)
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2
