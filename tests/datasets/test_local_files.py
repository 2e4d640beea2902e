"""Files of rows are recognised by what they hold."""

import pytest

from openrlhf.datasets.blending import load_mixture


@pytest.mark.parametrize(
    "text", ['[{"a": "1"}, {"a": "2"}]', '\n\n[\n{"a": "1"},\n{"a": "2"}\n]\n', '{"a": "1"}\n\n{"a": "2"}\n']
)
def test_a_json_list_or_json_lines_may_begin_anywhere(tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_text(text)
    options = {"split": "train", "max_samples": 10, "seed": 0, "stopping": "first_exhausted", "flag": "--dataset"}
    rows = load_mixture(str(file), None, required={"a": "--input_key"}, **options)
    assert sorted(row["a"] for row in rows) == ["1", "2"]
