"""Expressions and the arithmetic task: parsing, exact values, worked steps, problems, the verifier."""

import random
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mathformer import ArithmeticTask
from mathformer import expressions as ex
from mathformer.task import prompt_text, solution_text
from mathformer.tokenizer import LITTLE


def operations(tree):
    """One operation of each operator, over `tree`."""
    built = [
        st.builds(ex.Operation, st.just(s), st.tuples(*[tree] * op.arity)) for s, op in sorted(ex.OPERATORS.items())
    ]
    return st.one_of(built)


numbers = st.integers(-99, 99)
trees = st.recursive(numbers, operations, max_leaves=12)
small_trees = st.recursive(st.integers(-12, 12), operations, max_leaves=4)


def python_value(text: str) -> Fraction:
    """The oracle: Python's own parser and fractions."""
    names = dict(F=Fraction, max=max, min=min, abs=abs, next=lambda a: a + 1, prev=lambda a: a - 1)
    return eval(re.sub("[0-9]+", lambda n: f"F({int(n[0])})", text), names)  # noqa: S307 - our own text, in a test


def value_or_none(tree):
    try:
        return ex.evaluate(tree)
    except ZeroDivisionError:
        return None


# Parsing and values


@given(trees)
@settings(deadline=None)
def test_parse_inverts_render(tree):
    assert ex.parse(ex.render(tree)) == tree


@given(trees, st.integers(0, 1000))
@settings(deadline=None)
def test_parse_inverts_render_with_parentheses_and_spaces_that_are_not_needed(tree, seed):
    text = ex.render(tree, random.Random(seed), parentheses=0.3, spaces=0.3)
    assert ex.parse(text) == tree
    assert ex.swap_endian(ex.swap_endian(text)) == text


def test_parentheses_and_spaces_are_there_when_asked_for():
    tree = ex.parse("(3+4)*-5")
    assert ex.render(tree) == "(3+4)*-5"
    texts = {ex.render(tree, random.Random(seed), parentheses=0.3, spaces=0.3) for seed in range(50)}
    assert any("(-5)" in text for text in texts) and any(" " in text for text in texts)
    assert all(" " not in ex.render(tree, random.Random(seed), parentheses=0.5) for seed in range(20))


@given(trees)
@settings(deadline=None)
def test_value_equals_pythons(tree):
    try:
        expected = python_value(ex.render(tree))
    except ZeroDivisionError:
        assert value_or_none(tree) is None
    else:
        assert ex.evaluate(tree) == expected


@pytest.mark.parametrize(
    "text, value",
    [
        ("(4-2)/-6", Fraction(-1, 3)),
        ("prev (-2 )*9", -27),
        ("7%-3", -2),
        ("7/2%(2/3)", Fraction(1, 6)),
        ("max(1/2,min(3,1/3))", Fraction(1, 2)),
        ("abs(next(-5))-1-1", 2),
        ("2-3*4%5", 0),
        ("-1/3", Fraction(-1, 3)),
    ],
)
def test_values_by_hand(text, value):
    assert ex.evaluate(ex.parse(text)) == value


@pytest.mark.parametrize(
    "text, said",
    [
        ("", r"a number, a function or \( was expected at symbol 1"),
        ("3+", "expected at symbol 3"),
        ("(3", r"a \) was expected"),
        ("3)", r"unexpected '\)' at symbol 2"),
        ("3 4", "unexpected '4'"),
        ("-(3)", "a number was expected at symbol 2"),
        ("3^4", r"unexpected '\^'"),
        ("٣+1", "a number"),
        ("max(3)", "a , was expected at symbol 4"),
        ("next(3,4)", r"a \) was expected at symbol 4"),
        ("abs 3", r"a \( was expected"),
        ("log(3)", "unexpected|a number, a function"),
        ("(" * 400 + "1", "more than 50 nested"),
        ("1" * 2000, "2000 characters"),
        ("1" + "+1" * 300, "more than 200 operators"),
    ],
)
def test_what_does_not_parse_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        ex.parse(text)


def test_operators_are_read_from_text():
    assert ex.parse_operators("+-*") == ("+", "-", "*")
    assert ex.parse_operators("+ max, next") == ("+", "max", "next")
    assert ex.parse_operators("all") == tuple(ex.OPERATORS)
    with pytest.raises(ValueError, match=r"there is no operator '\^'; choose from \+ - \* / % max"):
        ex.parse_operators("+^")
    with pytest.raises(ValueError, match="there is no operator 'sqrt'"):
        ex.parse_operators("+sqrt")
    with pytest.raises(ValueError, match="none is named"):
        ex.parse_operators(" ")


# Worked steps


@given(small_trees, st.booleans())
@settings(deadline=None, max_examples=300)
def test_steps_are_true_and_reach_the_result(tree, columns):
    assume(value_or_none(tree) is not None)
    steps = list(ex.equations(tree, columns))
    for left, right in steps:
        assert left != right
        assert python_value(left) == python_value(right)
        assert ex.evaluate(ex.parse(left)) == ex.evaluate(ex.parse(right))
    assert {left for left, _ in ex.applications(tree)} <= {left for left, _ in steps}
    if isinstance(tree, ex.Operation) and ex.applied(tree.symbol, [ex.evaluate(o) for o in tree.operands]) != str(
        ex.evaluate(tree)
    ):
        assert steps[-1].right == str(ex.evaluate(tree))


@pytest.mark.parametrize(
    "text, steps",
    [
        ("7-(4+8)*3", "4+8=12;12*3=36;7-36=-29"),
        ("1-2-3", "1-2=-1;-1-3=-4"),
        ("84/36", "84/36=42/18;42/18=21/9;21/9=7/3"),
        ("4/-6", "4/-6=-4/6;-4/6=-2/3"),
        ("8/2", "8/2=4"),
        ("1/3", ""),
        ("0/4", "0/4=0"),
        ("1/2+1/3", "1/2+1/3=3/6+2/6;3/6+2/6=5/6"),
        ("1/2-1/2", "1/2-1/2=0"),
        ("2/3*(3/4)", "2/3*(3/4)=6/12;6/12=3/6;3/6=1/2"),
        ("2/3/(3/-4)", "3/-4=-3/4;2/3/(-3/4)=2/3*(-4/3);2/3*(-4/3)=-8/9"),
        ("max(1/2,2/3)", "max(1/2,2/3)=max(3/6,4/6);max(3/6,4/6)=4/6;4/6=2/3"),
        ("next(1/2)", "next(1/2)=3/2"),
        ("abs(min(2,-3))%2", "min(2,-3)=-3;abs(-3)=3;3%2=1"),
        ("7/2%2", "7/2%2=7/2%(4/2);7/2%(4/2)=3/2"),
    ],
)
def test_steps_by_hand(text, steps):
    assert ";".join(f"{left}={right}" for left, right in ex.equations(ex.parse(text))) == steps


@pytest.mark.parametrize(
    "text, steps",
    [
        ("3+4", "3+4=7"),
        ("47+38", "7+8=15;4+3+1=8;47+38=85"),
        ("95+5", "5+5=10;9+1=10;95+5=100"),
        ("52-37", "12-7=5;5-1-3=1;52-37=15"),
        ("37-52", "12-7=5;5-1-3=1;52-37=15;37-52=-15"),
        ("100-1", "10-1=9;10-1=9;1-1=0;100-1=99"),
        ("-12-9", "2+9=11;1+1=2;12+9=21;-12-9=-21"),
        ("47*8", "7*8=56;4*8+5=37;47*8=376"),
        ("8*-47", "7*8=56;4*8+5=37;8*-47=-376"),
        ("12*34", "4*2=8;3*2+0=6;34*2=68;4*1=4;3*1+0=3;34*10=340;8+0=8;6+4=10;3+1=4;68+340=408;12*34=408"),
        ("47%5", "9*5+2=47;47%5=2"),
        ("10/4", "10/4=5/2"),
        ("0-15", "5-0=5;15-0=15;0-15=-15"),
        ("0+12", "0+2=2;0+12=12"),
        ("9%4", "9%4=1"),
        ("12%5", "2*5+2=12;12%5=2"),
    ],
)
def test_columns_carry_and_borrow(text, steps):
    assert ";".join(f"{left}={right}" for left, right in ex.equations(ex.parse(text), columns=True)) == steps


def test_steps_are_applications_of_the_problem():
    assert ex.applications(ex.parse("7-(4+8)*3")) == [("4+8", "12"), ("12*3", "36"), ("7-36", "-29")]
    assert ex.applications(ex.parse("prev(2)/7")) == [("prev(2)", "1")]
    assert ex.applications(ex.parse("1/2+1/2")) == [("1/2+1/2", "1")]


# Problems


def test_generated_problems_keep_to_their_limits():
    rng = random.Random(0)
    found = [ex.generate(rng, 2, 3, ("+", "-"), 150) for _ in range(2000)]
    assert {ex.depth(tree) for tree in found} == {1, 2, 3}
    assert max(map(ex.largest_number, found)) <= 150
    text = "".join(map(ex.render, found))
    assert "*" not in text and {"+", "-"} <= set(text)
    assert all(leaf >= 0 for tree in found for leaf in ex.leaves(tree))
    assert [ex.generate(random.Random(5), 1, 3) for _ in range(3)] == [ex.generate(random.Random(5), 1, 3)] * 3


def test_problems_of_all_operators_have_a_value_and_small_steps():
    rng = random.Random(0)
    found = [ex.generate(rng, 1, 3, tuple(ex.OPERATORS), 99, negatives=0.2) for _ in range(3000)]
    values = list(map(ex.evaluate, found))  # no division by zero
    assert sum(value.denominator > 1 for value in values) > 100
    assert set().union(*map(ex.symbols, found)) == set(ex.OPERATORS)
    assert min(leaf for tree in found for leaf in ex.leaves(tree)) == -9
    for tree in found:
        written = ex.render(tree) + "".join(f";{left}={right}" for left, right in ex.equations(tree))
        assert max(map(int, re.findall("[0-9]+", written))) <= 99


def test_limits_that_leave_no_problem_are_an_error(monkeypatch):
    monkeypatch.setattr(ex, "MAX_DRAWS", 100)
    with pytest.raises(ValueError, match="none of 100 random ones keeps to max_value 0 and"):
        ex.generate(random.Random(0), 1, 1, ("next",), max_value=0)


def test_limits_of_what_is_parsed_are_the_last_that_is_parsed():
    assert ex.evaluate(ex.parse("+".join(["1"] * 201))) == 201  # 200 operators
    with pytest.raises(ValueError, match="more than 200 operators"):
        ex.parse("+".join(["1"] * 202))
    assert ex.parse("(" * 50 + "1" + ")" * 50) == 1
    with pytest.raises(ValueError, match="more than 50 nested parentheses"):
        ex.parse("(" * 51 + "1" + ")" * 51)
    assert ex.parse("1" * 1000) and ex.MAX_PARSE_LENGTH == 1000
    with pytest.raises(ValueError, match="expression of 1001 characters, at most 1000"):
        ex.parse("1" * 1001)


def test_what_is_held_out_stays_held_out():
    """The shipped model was trained on the others: by another rule, its evaluation would hold problems it has seen."""
    held_out = ["5-1", "6+2-6", "8*7+6-(9-(6-8))", "2*(2+9)+(0-5+(7+8))", "3-(6-0+7)", "7+8*0-4", "8*(0-3)"]
    free = ["(5-7)*4", "7-(9+9)-7*(4*1)", "(8-2)*(0-7)-8", "4*(8+5)", "0*5+(5*8+6*5)"]
    assert all(ex.held_out(ex.parse(text)) for text in held_out)
    assert not any(ex.held_out(ex.parse(text)) for text in free)
    rng = random.Random(0)
    share = sum(ex.held_out(ex.generate(rng, 1, 3)) for _ in range(4000)) / 4000
    assert 0.04 < share < 0.06


def test_held_out_problems_are_those_of_all_problems_that_are_held_out():
    def draw(n, for_eval):
        rng = random.Random(0)
        return [ex.generate(rng, 1, 3, tuple(ex.OPERATORS), 99, for_eval=for_eval) for _ in range(n)]

    found = draw(1000, None)
    for kind in (True, False):
        wanted = [tree for tree in found if ex.held_out(tree) == kind]
        assert len(wanted) > 20 and draw(len(wanted), kind) == wanted


# The task


def test_prompt_of_a_problem():
    assert prompt_text("(3+4)*5") == "<sos><big>(3+4)*5"
    assert prompt_text("12*5", LITTLE) == "<sos><little>21*5"
    assert solution_text(ex.parse("12*5"), True, LITTLE) == "<scratchpad>21*5=06<answer>06"
    assert solution_text(ex.parse("1/3"), worked=True) == "<answer>1/3"


@pytest.mark.parametrize("settings", [{}, dict(operators="all", parentheses=0.2, spaces=0.2, endian="both")])
def test_evaluation_problems_are_in_no_training(settings):
    task = ArithmeticTask(**settings)
    evaluation = {example["expression"] for example in task.eval()}
    assert len(evaluation) == len(task.eval()) == 500
    rng = random.Random(0)
    training = {task.train(rng, 0)["expression"] for _ in range(3000)}
    assert not evaluation & training
    assert task.eval() == ArithmeticTask(**settings).eval()


def test_small_settings_give_fewer_evaluation_problems():
    assert 1 < len(ArithmeticTask(max_depth=1).eval()) < 40


def test_problems_too_few_to_hold_some_out_are_an_error(monkeypatch):
    monkeypatch.setattr(ex, "MAX_DRAWS", 1000)
    with pytest.raises(ValueError, match="too few different problems: none .* is held out for"):
        ArithmeticTask(max_depth=1, operators="next", max_value=3).eval()


def test_the_curriculum_grows_and_the_evaluation_does_not():
    task = ArithmeticTask(max_digits=2, max_depth=4, max_value=None, curriculum_steps=100)
    rng = random.Random(0)

    def hardest(step):
        found = [ex.parse(task.train(rng, step)["expression"]) for _ in range(300)]
        return max(map(ex.depth, found)), max(leaf for tree in found for leaf in ex.leaves(tree)) > 9

    assert [hardest(step) for step in (1, 26, 51, 76, 100, 500)] == [
        (1, False), (2, False), (3, True), (4, True), (4, True), (4, True),
    ]  # fmt: skip
    assert task.eval() == ArithmeticTask(max_digits=2, max_depth=4, max_value=None).eval()


ALL = dict(operators="all", negatives=0.2, parentheses=0.1, spaces=0.1, endian="both")


@pytest.mark.parametrize("settings", [{}, ALL, ALL | dict(max_digits=7, max_value=None)])
def test_the_verifier_accepts_what_pretraining_teaches(settings):
    task = ArithmeticTask(**settings)
    rng = random.Random(0)
    for _ in range(300):
        tree = task.draw(rng, for_eval=False)
        example = task.example(tree, rng)
        for worked in (True, False):
            parts = task.reward(solution_text(tree, worked, example["endian"], columns=True), example)
            assert parts["reward"] == parts["correct"] == parts["format"] == 1
            if example["steps"]:
                assert parts["worked"] == parts["steps_right"] == worked
            assert parts["prediction"] == parts["ground_truth"] == str(ex.evaluate(tree))


def rewarded(text: str, expression: str, endian: str = "big", **settings) -> dict:
    task = ArithmeticTask(endian=endian, **settings)
    return task.reward(text, task.example(ex.parse(expression), random.Random(0)))


@pytest.mark.parametrize(
    "text, correct, format, worked",
    [
        ("<answer>35", 1, 1, 0),
        ("<answer>-35", 0, 1, 0),
        ("<answer>36", 0, 1, 0),
        ("<answer>035", 1, 1, 0),
        ("<answer>70/2", 0, 1, 0),
        ("<answer>35/1", 0, 1, 0),
        ("<answer>35/0", 0, 1, 0),
        ("<answer>35<answer>35", 0, 0, 0),
        ("<answer>35+0", 0, 0, 0),
        ("<answer>", 0, 0, 0),
        ("35", 0, 0, 0),
        ("", 0, 0, 0),
        ("<scratchpad>3+4=7;7*5=35<answer>35", 1, 1, 1),
        ("<scratchpad>3+4=8;8*5=41<answer>35", 1, 1, 0),  # steps that are all false are no work
        ("<scratchpad><answer>35", 1, 1, 0),
        ("<scratchpad>3+4=7;7*5=35", 0, 0, 0),
        ("<scratchpad>3+4=7=<answer>36", 0, 1, 0),
        ("<scratchpad>35=35<answer>35", 1, 1, 0),
        ("<scratchpad>3+4=3+4<answer>35", 1, 1, 0),
        ("<scratchpad>3+4=4+3<answer>35", 1, 1, 1),
        ("<scratchpad>3/0=3/0;3%0=1;3/0=1<answer>35", 1, 1, 0),
        ("<answer>" + "9" * 5000, 0, 0, 0),
        ("<scratchpad>" + "(" * 5000 + "<answer>1", 0, 1, 0),
        ("<scratchpad>" + "1+" * 400 + "1=401<answer>1", 0, 1, 0),
    ],
)
def test_rewards_by_hand(text, correct, format, worked):
    parts = rewarded(text, "(3+4)*5")
    assert (parts["reward"], parts["correct"], parts["format"], parts["worked"]) == (correct, correct, format, worked)


@pytest.mark.parametrize(
    "text, correct",
    [
        ("<answer>-1/3", 1),
        ("<answer>1/3", 0),
        ("<answer>-2/6", 0),  # the problem itself, copied
        ("<answer>2/-6", 0),
        ("<answer>0", 0),
        ("<answer>-1/03", 1),
    ],
)
def test_fractions_must_be_reduced(text, correct):
    assert rewarded(text, "2/-6", operators="all")["correct"] == correct


def test_little_endian_numbers_are_read_from_their_last_digit():
    example = ArithmeticTask(endian="little").example(ex.parse("12*5"), random.Random(0))
    assert example["prompt"] == "<sos><little>21*5"
    parts = rewarded("<scratchpad>21*5=06<answer>06", "12*5", endian="little")
    assert (parts["correct"], parts["worked"], parts["prediction"]) == (1, 1, "60")
    assert rewarded("<answer>60", "12*5", endian="little")["correct"] == 0
    assert rewarded("<answer>12/1", "1/21", endian="little", operators="all")["correct"] == 0
    assert rewarded("<answer>1/12", "1/21", endian="little", operators="all")["correct"] == 1


@pytest.mark.parametrize(
    "text, reward, steps_right",
    [
        ("<answer>35", 1, 0),
        ("<answer>36", 0, 0),
        ("<scratchpad>3+4=7;7*5=36<answer>36", 0.25, 0.5),
        ("<scratchpad>3+4=7;7*5=35<answer>36", 0.5, 1),
        ("<scratchpad>3+4=7;3+4=7;3+4=7<answer>36", 0.25, 0.5),  # once is enough
        ("<scratchpad>1+1=2;2+2=4;5*7=35<answer>36", 0, 0),  # true, but no step of this problem
        ("<scratchpad>7*5=35<answer>36", 0.25, 0.5),
        ("<scratchpad>3+4=4+3;7*5=5*7<answer>36", 0, 0),  # true, and nothing worked out
        ("<scratchpad>3+4=4+3;4+3=7<answer>36", 0.25, 0.5),  # a chain of two
        ("<scratchpad>3+4=7;7*5=35", 0, 0),  # no answer, no form: nothing
        ("<scratchpad>3+4=7;7*5=35<answer>35", 1, 1),
    ],
)
def test_partial_credit_is_for_right_steps_of_the_problem(text, reward, steps_right):
    parts = rewarded(text, "(3+4)*5", partial_credit=0.5)
    assert (parts["reward"], parts["steps_right"]) == (reward, steps_right)
    assert rewarded(text, "(3+4)*5")["reward"] == parts["correct"]


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(max_depth=0), "max_depth is 0, it must be 1 or more"),
        (dict(max_digits=0), "max_digits is 0"),
        (dict(operators="+^"), r"no operator '\^'; choose from"),
        (dict(negatives=1.0), "negatives is 1.0, it is a probability"),
        (dict(spaces=-0.1), "spaces is -0.1"),
        (dict(parentheses=2), "parentheses is 2"),
        (dict(endian="middle"), "endian is 'middle', it must be one of big, little, both"),
        (dict(partial_credit=1.0), "partial_credit is 1.0, it must be from 0 to less than 1"),
        (dict(max_value=0), "max_value is 0"),
        (dict(max_digits=3), "max_digits 3 needs a max_value of 100 or more"),
        (dict(curriculum_steps=-1), "curriculum_steps is -1"),
        (dict(eval_size=0), "eval_size is 0"),
    ],
)
def test_settings_that_are_not_allowed_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        ArithmeticTask(**settings)
