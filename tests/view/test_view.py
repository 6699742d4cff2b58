"""`python -m view`: which view is shown, and what is said where there is none."""

import sys

import pytest

from view import play, report
from view.__main__ import main


@pytest.mark.parametrize("module, name", [(report, "report"), (play, "play")])
def test_the_name_chooses_the_view_and_the_rest_is_for_it(module, name, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "main", asked.append)
    main([name, "runs/x", "--seed", "3"])
    monkeypatch.setattr(sys, "argv", ["view", name, "runs/y"])
    main()
    assert asked == [["runs/x", "--seed", "3"], ["runs/y"]]


@pytest.mark.parametrize("argv, said", [([], "no view ''"), (["reports", "runs/x"], "no view 'reports'")])
def test_another_name_is_refused_in_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said_there = capsys.readouterr()
    assert stopped.value.code == 2 and said_there.out == ""
    assert said in said_there.err and "choose report or play" in said_there.err and said_there.err.count("\n") == 1


def test_help_names_both(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert "python -m view report RUN" in out and "python -m view play RUN" in out
