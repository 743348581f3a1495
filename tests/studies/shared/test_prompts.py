"""Prompts read from files: what is written comes back, and every mistake is told with its line and column."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens.errors import PromptError, StoreError
from dit_lens.studies.shared import prompts
from dit_lens.toys.scenes import Scene

texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text
)


def written(folder, text, suffix="csv"):
    file = folder / f"p.{suffix}"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(texts, min_size=1, max_size=5))
def test_what_is_written_comes_back(tmp_path, suffix, found):
    rows = [{"id": f"n{i}", "prompt": text} for i, text in enumerate(found)]
    file = tmp_path / f"p.{suffix}"
    with file.open("w", newline="", encoding="utf-8") as stream:
        if suffix == "csv":
            writer = csv.DictWriter(stream, ["id", "prompt"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    loaded = prompts.load(file)
    assert loaded.texts == found
    assert [prompt.id for prompt in loaded] == [row["id"] for row in rows]


def test_pairs_and_subjects(tmp_path):
    file = written(
        tmp_path,
        "\ufeffprompt,subject,pair,role\n"
        '"a cat, asleep",Cat,1,target\na lone dog,dog,,\n"a fox, asleep",fox,1,source\n',
    )
    found = prompts.load(file)
    assert found.pairs == [("a fox, asleep", "a cat, asleep")]
    assert found.unpaired.texts == ["a lone dog"]
    assert found.subjects == ["Cat", "dog", "fox"]
    assert [prompt.id for prompt in found] == ["2", "3", "4"]
    assert found[:2].pairs == []
    assert repr(found).startswith("PromptList: 3 prompts, 1 pairs\n  2: a cat, asleep\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,subjct\na cat,cat\n", r"p\.csv, line 1: there is no column 'subjct'\. Nearest: 'subject'"),
        ("id,subject\n1,cat\n", r"p\.csv, line 1: the column 'prompt' is missing; there are: id, subject"),
        ("prompt,prompt\na,b\n", r"line 1: the column 'prompt' is there twice"),
        ("", r"line 1: the column 'prompt' is missing"),
        ("prompt\n", r"p\.csv holds no prompts"),
        ("id,prompt\na,a cat\nb,\n", r"p\.csv, line 3, column prompt: it is empty"),
        ("id,prompt\na,a cat\na,a dog\n", r"line 3, column id: 'a' is that of line 2 already"),
        ("prompt,subject\na caterpillar,cat\n", r"line 2, column subject: 'cat' is not a word of the prompt"),
        ("prompt,pair,role\na cat,1,sauce\n", r"line 2, column role: there is no role 'sauce'\. Nearest: 'source'"),
        ("prompt,pair,role\na cat,1,\n", r"line 2, column role: it is empty\. Give pair and role together"),
        ("prompt,pair,role\na cat,,source\n", r"line 2, column pair: it is empty"),
        ("prompt,pair,role\na cat,1,source\n", r"line 2, column pair: pair '1' has a source and no target"),
        (
            "prompt,pair,role\na,1,source\nb,1,source\n",
            r"line 3, column role: line 2 is the source of pair '1' already",
        ),
        ("id,prompt\na,a cat, asleep\n", r"line 2: more cells than the header has columns.*in double quotes"),
    ],
)
def test_mistakes_in_a_table_name_line_and_column(tmp_path, text, words):
    with pytest.raises(PromptError, match=words):
        prompts.load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a cat"}\n\n{"prompt": }\n', r"p\.jsonl, line 3: not valid JSON: "),
        ('["a cat"]\n', r"line 1: not a JSON object\. Write \{\"prompt\": \"a cat\"\}"),
        ('{"prompt": ["a"]}\n', r"line 1, column prompt: \['a'\] is not a text"),
        ('{"promt": "a"}\n', r"line 1: there is no column 'promt'\. Nearest: 'prompt'"),
    ],
)
def test_mistakes_in_json_lines_name_line_and_column(tmp_path, text, words):
    with pytest.raises(PromptError, match=words):
        prompts.load(written(tmp_path, text, "jsonl"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(StoreError, match=r"there is no file .*p\.csv"):
        prompts.load(tmp_path / "p.csv")
    with pytest.raises(StoreError, match=r"neither \.csv nor \.jsonl"):
        prompts.load(tmp_path / "p.txt")
    (tmp_path / "latin.csv").write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin\.csv is not in UTF-8"):
        prompts.load(tmp_path / "latin.csv")


def test_the_bundled_list_is_varied_and_paired():
    found = dl.prompts.bundled()
    alone = found.unpaired
    assert len(alone) == len(set(alone.texts)) == len(set(alone.subjects)) == 60
    assert len(found.pairs) == 20
    assert all(found.subjects)
    for source, target in found.pairs:
        assert len(set(source.split()) ^ set(target.split())) == 2  # they differ in one word


def test_scenes_are_those_of_the_grammar():
    found = dl.prompts.scenes(5, seed=1)
    assert found == dl.prompts.scenes(5, seed=1)
    assert [Scene.parse(text).shape for text in found.texts] == found.subjects
    assert all(Scene.parse(text).held_out for text in dl.prompts.scenes(3, 0, held_out=True).texts)
    with pytest.raises(PromptError, match="n=0 scenes were asked for"):
        dl.prompts.scenes(0, 0)
    with pytest.raises(PromptError, match=r"n=1,000,000 scenes were asked for, and there are \d,\d{3} of training"):
        dl.prompts.scenes(1_000_000, 0)


def test_a_list_of_prompts_is_what_runs_and_studies_take(toy):
    found = prompts.scenes(2, seed=0)
    assert all(isinstance(prompt, str) for prompt in found)
    run = toy.run(found, seed=0, num_inference_steps=1)
    assert run.spec["prompt"] == found.texts
    result = dl.studies.stability(toy, found, k=4, site="blocks.2.img", num_inference_steps=1)
    assert result.settings["prompts"] == found.texts
