"""`python -m view`: which view is shown, and what is said where there is none."""

import sys

import pytest

from view.__main__ import VIEWS, main


@pytest.mark.parametrize("name", ["report", "play"])
def test_the_name_chooses_the_view_and_the_rest_is_for_it(name, monkeypatch):
    asked = []
    monkeypatch.setitem(VIEWS, name, asked.append)
    main([name, "runs/x", "--seed", "3"])
    monkeypatch.setattr(sys, "argv", ["view", name, "runs/y"])
    main()
    assert asked == [["runs/x", "--seed", "3"], ["runs/y"]]


@pytest.mark.parametrize("argv, said", [([], "no view ''"), (["reports", "runs/x"], "no view 'reports'")])
def test_another_name_is_refused_in_one_line(argv, said):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    code = stopped.value.code
    assert code.startswith(f"error: there is {said}: take report or play") and "\n" not in code


def test_help_names_both(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert "python -m view report RUN" in out and "python -m view play RUN" in out
