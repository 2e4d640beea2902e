"""Bad data and bad model folders: what is wrong, how to run into it, and what the one message must say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import tiny_folder, tiny_tokenizer
from tests.trainer.ppo.harness import reward_file, tiny_reward_model

GOOD = [{"input": f"What is {i} + 30?", "output": f"It is {i + 30}."} for i in range(4)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SFT = "train_sft --pretrain model --dataset {data} --output_key output"
STANDARD = "train_sft --pretrain model --dataset {data}"
RM = "train_rm --pretrain model --dataset {data} --prompt_key input --chosen_key output"
PPO = "train_ppo_ray --pretrain model --reward_pretrain rm --prompt_data {data}"


def lines(*rows: dict | str | list | int, name: str = "data.jsonl") -> Callable[[Path], str]:
    """Return a function that writes the rows as JSON lines, text as it is, and gives the name of the file."""

    def write(folder: Path) -> str:
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return name

    return write


def raw(content: bytes, name: str = "data.jsonl") -> Callable[[Path], str]:
    """Return a function that writes bytes to a file and gives its name."""

    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return write


def model(
    change: Callable[[Path], object], name: str = "model", rows: list[dict] | None = None
) -> Callable[[Path], str]:
    """Return a function that changes the copy of a model folder, writes good rows and gives their file."""

    def write(folder: Path) -> str:
        change(folder / name)
        return lines(*(rows or GOOD))(folder)

    return write


def configured(**changes: object) -> Callable[[Path], object]:
    """Return a function that changes the config.json of a model folder."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def without_template(folder: Path) -> None:
    tokenizer = tiny_tokenizer(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()


def other_words(folder: Path) -> None:
    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    tokenizer.save_pretrained(folder)


def swapped_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    *_, first, second = words
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def overwritten(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def a_folder(name: str, *files: str) -> Callable[[Path], str]:
    """Return a function that makes a folder with files of good rows and gives its name."""

    def write(folder: Path) -> str:
        (folder / name).mkdir()
        for file in files:
            lines(*GOOD, name=f"{name}/{file}")(folder)
        return name

    return write


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: what is wrong.
        command: the command line; ``{data}`` is the file that ``write`` gives.
        write: makes the bad input in a folder that holds good models ``model`` and ``rm``.
        says: regular expressions that the message must match.
        code: the exit status.
    """

    name: str
    command: str
    write: Callable[[Path], str]
    says: tuple[str, ...]
    code: int = 3


def nested(depth: int) -> str:
    return '{"input": ' + "[" * depth + "]" * depth + ', "output": "x"}'


DATA = [
    Case(
        "broken line", SFT, lines(*GOOD[:2], '{"input": "x", "output": }'), (r"data\.jsonl:3: bad JSON at column 26",)
    ),
    Case(
        "indented object",
        SFT,
        raw(b'{\n "input": "x"\n}', "d.json"),
        (r"d\.json:1: bad JSON.*one JSON object a line",),
    ),
    Case("list item", SFT, raw(b'[{"input": "x", "output": "y"}, 7]', "d.json"), (r"d\.json: item 1: .*JSON object",)),
    Case("scalar line", SFT, lines(GOOD[0], 7), (r"data\.jsonl:2: expected a JSON object, found int",)),
    Case("no such key", SFT, lines(GOOD[0], {"input": "x"}), (r"data\.jsonl:2: no key 'output'; found: input",)),
    Case(
        "other key", SFT + " --input_key question", lines(*GOOD), (r"data\.jsonl:1: no key 'question'", "--input_key")
    ),
    Case("a number", SFT, lines(*[{"input": "x", "output": 7}] * 3), (r"data\.jsonl:1: 'output' \(--output_key\)",)),
    Case("an object", SFT, lines({"input": {"a": 1}, "output": "x"}), (r"data\.jsonl:1: 'input' \(--input_key\)",)),
    Case(
        "two types", SFT, lines(GOOD[0], {"input": CHAT, "output": "x"}), (r"data\.jsonl:2: 'input' is a list here",)
    ),
    Case(
        "foreign messages",
        "train_sft --pretrain model --dataset {data} --apply_chat_template",
        lines({"input": [{"from": "human", "value": "x"}]}),
        (r"data\.jsonl:1: 'input' .*role and content; found: from, value",),
    ),
    Case("messages as text", SFT, lines({"input": CHAT, "output": "x"}), (r"row 0", "--apply_chat_template")),
    Case(
        "text as messages",
        "train_sft --pretrain model --dataset {data} --apply_chat_template",
        lines(*GOOD),
        (r"row 0: 'input' is text.*--output_key",),
        2,
    ),
    Case("empty file", SFT, raw(b""), (r"data\.jsonl: no rows",)),
    Case("blank lines", SFT, raw(b"\n \n\n"), (r"data\.jsonl: no rows",)),
    Case("empty list", SFT, raw(b"[]", "d.json"), (r"d\.json: no rows",)),
    Case(
        "nothing but empty prompts", SFT, lines(*[{"input": " ", "output": "x"}] * 3), (r"3 dropped .empty prompt: 3",)
    ),
    Case(
        "null answers", SFT, lines(*[{"input": "x", "output": None}] * 3), (r"--dataset data\.jsonl.*empty response",)
    ),
    Case("all too long", SFT + " --max_len 4", lines(*GOOD), (r"prompt too long for --max_len 4: 4",)),
    Case(
        "too long, refused",
        SFT + " --max_len 30 --too_long error",
        lines(*GOOD),
        (r"row 0 has \d+ tokens.*--max_len",),
    ),
    Case("latin-1", SFT, raw(b'{"input": "caf\xe9", "output": "x"}\n'), (r"data\.jsonl:1: not UTF-8 \(byte 14\)",)),
    Case(
        "half a surrogate", SFT, lines('{"input": "\\ud83d", "output": "x"}'), (r"data\.jsonl:1: half of a surrogate",)
    ),
    Case("NaN", SFT, lines('{"input": "x", "output": NaN}'), (r"data\.jsonl:1: bad JSON \(NaN is not JSON\)",)),
    Case("deep nesting", SFT, lines(nested(200_000)), (r"data\.jsonl:1: bad JSON",)),
    Case("endless line", SFT, raw(b'{"input": "' + b"x" * 51 * 2**20), (r"data\.jsonl:1: .*longer than 50 MB",)),
    Case("no gzip", SFT, raw(b"plain", "data.jsonl.gz"), (r"data\.jsonl\.gz: cannot be read.*gzip",)),
    Case(
        "half a gzip", SFT, raw(gzip.compress(b"x" * 999)[:20], "d.jsonl.gz"), (r"d\.jsonl\.gz: cannot be read.*gzip",)
    ),
    Case("gzip without its name", SFT, raw(gzip.compress(b"x")), (r"data\.jsonl:1: not UTF-8.*gzip",)),
    Case("parquet without its name", SFT, raw(b"PAR1\x15\xff"), (r"data\.jsonl:1: not UTF-8.*parquet",)),
    Case("broken parquet", SFT, raw(b"PAR1 nonsense PAR1", "d.parquet"), (r"d\.parquet: cannot be loaded",)),
    Case("text file", SFT, raw(b"hello", "data.txt"), (r"--dataset data\.txt: not a data file.*\.jsonl",)),
    Case("missing file", SFT, lambda folder: "./" + lines(*GOOD)(folder)[:-1], (r"no such file.*meant data\.jsonl",)),
    Case("missing plain name", SFT, lambda folder: "dat.jsonl", (r"--dataset dat\.jsonl: no such file",)),
    Case("folder without data", SFT, a_folder("rows"), (r"--dataset rows: cannot be loaded: .*data files",)),
    Case(
        "unknown split",
        SFT,
        a_folder("rows", "dev.jsonl", "val.jsonl"),
        (r"no split 'train'; splits there: dev, val",),
    ),
    Case(
        "two formats", SFT, a_folder("rows", "train.jsonl", "train.csv"), (r"rows: the split 'train' is there as csv",)
    ),
    Case("folder like a file", SFT, a_folder("data.jsonl"), (r"data\.jsonl: cannot be read.*directory",)),
    Case("dataset script", SFT, raw(b"", "rows.py"), (r"--dataset rows\.py: data set scripts are not run",)),
    Case("csv column", SFT, raw(b"question,output\na,b\n", "d.csv"), (r"d\.csv:1: no key 'input'.*--input_key",)),
    Case("csv row", SFT, raw(b"input,output\na,b\na,b,c,d\n", "d.csv"), (r"d\.csv:3: 4 fields and the header has 2",)),
    Case("csv header only", SFT, raw(b"input,output\n", "d.csv"), (r"d\.csv: no rows",)),
    Case(
        "no evaluation file", SFT + " --eval_dataset ./e.jsonl", lines(*GOOD), (r"--eval_dataset e\.jsonl: no such",)
    ),
    Case(
        "useless evaluation rows",
        SFT + " --eval_dataset e.jsonl",
        lambda folder: lines({"input": "", "output": "x"}, name="e.jsonl")(folder) and lines(*GOOD)(folder),
        (r"--eval_dataset e\.jsonl: no row can be used; 1 dropped .empty prompt",),
    ),
    Case(
        "spelled special token",
        SFT + " --special_tokens_in_text error",
        lines(GOOD[0], {"input": "x<|im_end|>y", "output": "z"}),
        (r"row 1: the text spells the special token '<\|im_end\|>'; --special_tokens_in_text",),
    ),
    Case(
        "equal pairs",
        RM + " --rejected_key other",
        lines(*[row | {"other": row["output"]} for row in GOOD]),
        (r"--dataset data\.jsonl: no row can be used; 4 dropped .chosen equals rejected: 4",),
    ),
    Case("no rejected answers", RM, lines(*GOOD), (r"data\.jsonl:1: no key 'rejected'.*--rejected_key",)),
    Case(
        "margin in words",
        RM + " --rejected_key input",
        lines(GOOD[0], GOOD[1] | {"margin": "big"}),
        (r"--prompt_key and --rejected_key both name",),
        2,
    ),
    Case(
        "margin as text",
        "train_rm --pretrain model --dataset {data} --chosen_key input --rejected_key output",
        lines(GOOD[0], GOOD[1] | {"margin": "big"}),
        (r"data\.jsonl:2: 'margin' is a number; found str",),
    ),
    Case(
        "text pairs in a chat",
        "train_rm --pretrain model --dataset {data} --chosen_key input --rejected_key output --apply_chat_template",
        lines(*GOOD),
        (r"row 0: .*--prompt_key",),
        2,
    ),
    Case("no answer named", STANDARD, lines(*GOOD), (r"--output_key is missing: name the column",), 2),
    Case(
        "messages without a chat template",
        STANDARD,
        lambda folder: without_template(folder / "model") or lines({"messages": CHAT})(folder),
        (r"--apply_chat_template: the tokenizer of .* has no chat template", "--tokenizer_chat_template"),
    ),
    Case(
        "messages of another form",
        STANDARD,
        lines({"messages": [{"from": "human", "value": "x"}]}),
        (r"data\.jsonl:1: 'messages' .*role and content; found: from, value",),
    ),
    Case(
        "messages without an answer",
        STANDARD,
        lines({"messages": CHAT[:1]}),
        (r"no row can be used; 1 dropped .last message is not the assistant's: 1",),
    ),
    Case(
        "a completion of another type",
        STANDARD,
        lines({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": CHAT[1:]}),
        (r"data\.jsonl:2: 'completion' is a list here and a str in .*data\.jsonl:1",),
    ),
    Case(
        "a pair without its other half",
        STANDARD.replace("sft", "rm"),
        lines({"prompt": "x", "chosen": "y", "rejected": "z"}, {"prompt": "x", "chosen": "y"}),
        (r"data\.jsonl:2: no key 'rejected'; found: prompt, chosen",),
    ),
    Case(
        "a prompt that is a number",
        STANDARD.replace("sft", "rm"),
        lines({"prompt": 7, "chosen": "y", "rejected": "z"}),
        (r"data\.jsonl:1: 'prompt' \(--prompt_key\): expected text",),
    ),
    Case(
        "a second data set of another form",
        STANDARD + ",other.jsonl --dataset_probs .5,.5",
        lambda folder: lines(*GOOD, name="other.jsonl")(folder) and lines({"messages": CHAT})(folder),
        (r"other\.jsonl:1: no key 'messages'; found: input, output; set --input_key",),
    ),
    Case("no label", PPO + " --label_key gold", lines(*GOOD), (r"data\.jsonl:1: no key 'gold'.*--label_key",)),
    Case("empty prompts", PPO, lines({"input": ""}), (r"--prompt_data data\.jsonl: no row can be used; 1 dropped",)),
    Case(
        "prompt too long", PPO + " --prompt_max_len 3 --too_long error", lines(*GOOD), (r"row 0 .*--prompt_max_len 3",)
    ),
    Case(
        "reward file without its function",
        PPO + " --remote_rm_url other.py",
        lambda folder: raw(b"x = 1\n", "other.py")(folder) and lines(*GOOD)(folder),
        (r"other\.py.*reward_func",),
    ),
]
MODELS = [
    Case(
        "no model folder",
        SFT.replace("model", "./nowhere"),
        lines(*GOOD),
        (r"--pretrain \./nowhere: there is no such",),
    ),
    Case("no config", SFT, model(removed("config.json")), (r"--pretrain model: .*no config\.json",)),
    Case("broken config", SFT, model(overwritten("config.json", "{")), (r"model/config\.json: not a JSON file",)),
    Case(
        "no tokenizer", SFT, model(lambda folder: [path.unlink() for path in folder.glob("token*")]), ("no tokenizer",)
    ),
    Case(
        "broken tokenizer",
        SFT,
        model(overwritten("tokenizer.json", "{")),
        (r"--pretrain model: its tokenizer cannot",),
    ),
    Case("no weights", SFT, model(removed("model.safetensors")), (r"--pretrain model: the folder has no weights",)),
    Case("pickled weights", SFT, model(pickled), (r"pickled \(pytorch_model\.bin\).*save_pretrained",)),
    Case("half the weights", SFT, model(truncated), (r"--pretrain .*model\.safetensors: damaged",)),
    Case(
        "no language-model head",
        SFT,
        model(configured(architectures=["Qwen2Model"], tie_word_embeddings=False)),
        (r"--pretrain model: this model has no language-model head",),
    ),
    Case("no eos", SFT, model(without_eos), (r"--pretrain model: .*eos_token",)),
    Case(
        "small vocabulary", SFT, model(configured(vocab_size=256)), (r"--pretrain model: the tokenizer has \d+.*256",)
    ),
    Case("no chat template", SFT + " --apply_chat_template", model(without_template), ("--tokenizer_chat_template",)),
    Case(
        "broken chat template",
        SFT + " --apply_chat_template --tokenizer_chat_template {{%for",
        lines(*GOOD),
        (r"the chat template is not valid Jinja.*--tokenizer_chat_template",),
    ),
    Case(
        "own code", SFT, model(configured(model_type="mine", auto_map={"AutoConfig": "m.M"})), ("--trust_remote_code",)
    ),
    Case(
        "unknown architecture", SFT, model(configured(model_type="mine")), (r"--pretrain model: .*model_type 'mine'",)
    ),
    Case(
        "a reward model to tune",
        SFT.replace(" model", " rm"),
        lines(*GOOD),
        (r"--pretrain rm: this is a reward model",),
    ),
    Case(
        "a reward model as policy",
        PPO.replace("model", "rm"),
        lines(*GOOD),
        (r"--pretrain rm: this is a reward model",),
    ),
    Case(
        "a language model as reward",
        PPO.replace(" rm", " model"),
        lines(*GOOD),
        (r"--reward_pretrain model: .*no value",),
    ),
    Case(
        "no reward model", PPO.replace(" rm", " ./rm2"), lines(*GOOD), (r"--reward_pretrain \./rm2: there is no such",)
    ),
    Case("other vocabulary", PPO, model(other_words, "rm"), (r"--reward_pretrain rm: ",)),
    Case(
        "no mean and std",
        PPO + " --normalize_reward",
        lines(*GOOD),
        (r"--reward_pretrain rm: --normalize_reward needs",),
    ),
    Case("no critic", PPO + " --critic_pretrain ./c", lines(*GOOD), (r"--critic_pretrain \./c: there is no such",)),
    Case("offline hub", SFT.replace("model", "somebody/none"), lines(*GOOD), (r"--pretrain somebody/none: ",)),
]
DPO = "train_dpo --pretrain model --dataset {data} --prompt_key input --chosen_key output"
KTO = "train_kto --pretrain model --dataset {data} --output_key output"
KD = "train_kd --pretrain model --teacher_model teacher --dataset {data}"
PRM = "train_prm --pretrain model --dataset {data} --placeholder_token * --reward_tokens + -"
PAIRS = [{**row, "rejected": "No."} for row in GOOD]
LABELLED = [{**row, "label": True} for row in GOOD]
STEPS = [{"input": "2 * 3 *", "label": ["+", "-"]}]
FAMILY = [
    Case("dpo without rejected answers", DPO, lines(*GOOD), (r"data\.jsonl:1: no key 'rejected'", "--rejected_key")),
    Case(
        "another reference",
        DPO + " --ref_pretrain rm",
        lines(*PAIRS),
        (r"--ref_pretrain rm: this is a reward model",),
    ),
    Case(
        "reference of another vocabulary",
        DPO + " --ref_pretrain teacher",
        model(other_words, "teacher", rows=PAIRS),
        (r"--ref_pretrain teacher: ",),
    ),
    Case("no reference", DPO + " --ref_pretrain ./r", lines(*PAIRS), (r"--ref_pretrain \./r: there is no such",)),
    Case("kto without labels", KTO, lines(*GOOD), (r"data\.jsonl:1: no key 'label'", "--label_key")),
    Case("odd label", KTO, lines(*[{**row, "label": 3} for row in GOOD]), (r"row 0: 'label' \(--label_key\) is 3",)),
    Case("two types of labels", KTO, lines(LABELLED[0], {**GOOD[0], "label": 1}), (r"data\.jsonl:2: 'label' is a n",)),
    Case(
        "no teacher", KD.replace("teacher --d", "./t --d"), lines(*GOOD), (r"--teacher_model \./t: there is no such",)
    ),
    Case(
        "teacher of another vocabulary",
        KD,
        model(swapped_words, "teacher"),
        (r"--teacher_model teacher: its vocabulary differs from that of --pretrain model",),
    ),
    Case(
        "a reward model as teacher", KD.replace("teacher --d", "rm --d"), lines(*GOOD), (r"--teacher_model rm: this",)
    ),
    Case("prm without labels", PRM, lines(*GOOD), (r"data\.jsonl:1: no key 'label'", "--label_key")),
    Case("long placeholder", PRM.replace("*", "ab-ab"), lines(*STEPS), (r"--placeholder_token: 'ab-ab' is",), 2),
    Case("foreign label", PRM, lines({**STEPS[0], "label": ["+", "?"]}), (r"row 0.*'\?' is not one of --reward_tok",)),
    Case(
        "steps without labels",
        PRM,
        lines({**STEPS[0], "label": []}),
        (r"row 0: 0 labels and 2 placeholders; give one label a step", "--placeholder_token"),
    ),
]
CASES = DATA + MODELS + FAMILY


def good_models(folder: Path) -> Path:
    """Make the models and the reward file that every case starts from."""
    tiny_folder(folder / "model")
    tiny_folder(folder / "teacher", hidden=48)
    tiny_reward_model(folder / "rm")
    reward_file(folder)
    return folder


def prepare(case: Case, models: Path, folder: Path) -> list[str]:
    """Make the input of a case in ``folder`` and return the words of its command line, the command first."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    return case.command.replace("{data}", case.write(folder)).replace("{{%", "{%").split()
