"""A board lays reports side by side, sorts in a browser, says where they differ, and refuses what is no report."""

import copy
import json

import pandas as pd
import pytest

from dit_lens.commands import cli
from tests.browser import page as opened
from tests.reports import CONTENT, DIFFERENCES, made_up


def report_of(name, mean, verdict="holds", **changes):
    content = copy.deepcopy(CONTENT)
    estimate = {"mean": mean, "low": mean - 2, "high": mean + 2}
    verdicts = content["verdicts"]
    verdicts[0] |= {"verdict": verdict, "differences": [{**DIFFERENCES[0], "estimate": estimate}]}
    return made_up(model={**content["model"], "id": name}, verdicts=verdicts, **changes)


@pytest.fixture
def folders(tmp_path):
    reports = {
        "b": report_of("beta", -4.0, "fails"),
        "a": report_of("alpha <b>", 12.0, prompts={**CONTENT["prompts"], "digest": "0" * 16}),
        "c": report_of("gamma", 3.0, "is undecided", energy_share=None),
    }
    for name, report in reports.items():
        report.save(tmp_path / name)
    return [tmp_path / name for name in reports]


def test_the_same_numbers_in_all_three_files(folders, tmp_path, capsys):
    out = tmp_path / "board"
    assert cli.main(["board", *map(str, folders), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out / "board.html")
    assert (
        "prompts differ: 3 of prompts.csv (fedcba9876543210): b, c; 3 of prompts.csv (0000000000000000): a" in said.err
    )
    assert "protocols differ" not in said.err
    data = json.loads((out / "board.json").read_text())
    claim = data["columns"][1]["name"]
    assert claim == CONTENT["verdicts"][0]["claim"]
    assert [row["model"] for row in data["rows"]] == ["beta", "alpha <b>", "gamma"]
    assert [row[claim]["difference"]["mean"] for row in data["rows"]] == [-4.0, 12.0, 3.0]
    table = pd.read_csv(out / "board.csv")
    assert table[f"{claim}: difference mean"].tolist() == [-4.0, 12.0, 3.0]
    assert table["k / width"].tolist() == [8 / 3072] * 3
    assert table["energy share"].isna().tolist() == [False, False, True]
    assert "alpha <b>" not in (out / "board.html").read_text()  # it would be an element


def test_the_difference_that_decides_is_the_one_with_the_largest_p(tmp_path):
    made_up().save(tmp_path / "one")
    assert cli.main(["board", str(tmp_path / "one"), "--out", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "board.json").read_text())["rows"][0]
    assert row[CONTENT["verdicts"][0]["claim"]]["from"] == "random"  # whose p is not known


def test_what_is_no_report_is_refused_and_nothing_is_written(folders, tmp_path, capsys):
    file = folders[1] / "result.json"
    data = json.loads(file.read_text())
    del data["model"]["width"]
    file.write_text(json.dumps(data))
    assert cli.main(["board", *map(str, folders), "--out", str(tmp_path / "board")]) == 2
    assert f"{file} is no model report of schema 1: model lacks 'width'" in capsys.readouterr().err
    assert cli.main(["board", str(tmp_path / "nowhere"), "--out", str(tmp_path / "board")]) == 2
    assert "nowhere/result.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "board").exists()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
def test_a_column_sorts_with_a_click(folders, tmp_path, width, dark):
    assert cli.main(["board", *map(str, folders), "--out", str(tmp_path / "board")]) == 0
    with opened(width=width, dark=dark) as page:
        page.goto((tmp_path / "board" / "board.html").as_uri())
        names = lambda: page.locator("td.name").all_inner_texts()  # noqa: E731
        assert names() == ["beta", "alpha <b>", "gamma"]
        for column, ascending in (
            ("model", ["alpha <b>", "beta", "gamma"]),
            ("claim 1", ["beta", "gamma", "alpha <b>"]),
        ):
            head = page.locator("th button", has_text=column).first
            head.click()
            assert names() == ascending
            assert page.locator("th[aria-sort='ascending'] button").inner_text().startswith(column)
            head.click()
            assert names() == ascending[::-1]
        share = page.locator("th button", has_text="energy share")
        for _ in range(2):
            share.click()
            assert names()[-1] == "gamma"  # what is missing comes last
        page.get_by_role("searchbox").fill("BETA")
        assert names() == ["beta"]
        assert page.locator("ul.warnings li").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
