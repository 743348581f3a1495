"""What is said of large studies is what was measured, and the engine loses nothing and keeps nothing twice."""

from pathlib import Path

from benchmarks.scaling import ThreadCrew, simulate


def test_the_page_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import scaling

    assert scaling.PAGE.read_text("utf-8") == scaling.page(), "run `python docs/scaling.py`"


def test_threads_that_die_lose_nothing():
    found = simulate(ThreadCrew(8, (0.001, 0.1)), 150, needing=20)
    assert (found["kept"], found["kept_twice"], found["counted"]) == (150, 0, 150)
    assert found["deaths"] > 2
