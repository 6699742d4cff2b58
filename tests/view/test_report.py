"""The report: groups, what is left out and said to be, bad folders, and the page itself in a browser."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import grpo
from harness import settings
from view import report
from view.__main__ import main as view_main

BROWSER = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
BROWSER += " --disable-component-update --disable-sync"
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>&lt;b&gt;\u2028<!--"
METRICS = dict(reward=0.5, reward_std=0.4, correct=0.5, length=9.0, length_correct=8.0, length_wrong=float("nan"))
CONFIG = dict(group_size=4, seed=0, lr=1e-3, task="arithmetic", reflection_words=["wait", "re-?check"])


def rollout(step: int, prompt: str, right: float, completion: str = "so it is 7", **more) -> dict:
    row = {"step": step, "prompt_id": f"id-{prompt}", "prompt": f"What is {prompt}?", "completion": completion}
    row |= {"reward": right, "correct": right, "format": 1.0, "prediction": "7", "ground_truth": "8", "penalty": 0.0}
    return row | {"advantage": right - 0.5, "length": 4, "truncated": False} | more


def group(step: int, prompt: str, rewards: str = "1010", **more) -> list[dict]:
    return [rollout(step, prompt, float(reward), **more) for reward in rewards]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def evaluation(step: int, accuracy: float) -> dict:
    row = {"step": step, "n": 2, "length": 5.0, "truncated": 0.0, "pass_at_k": {"1": accuracy, "4": 0.75}}
    for key in ("accuracy", "accuracy_sampled"):
        row |= {key: accuracy, f"{key}_low": accuracy - 0.1, f"{key}_high": accuracy + 0.1}
    return row


@pytest.fixture
def make_run(tmp_path):
    """A run's folder: 5 steps of 3 groups of 4, of which the second is dead; keyword arguments override."""

    def make(name="run", rollouts=None, metrics=None, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if rollouts is None:
            steps = [group(s, f"{s}+1") + group(s, "2+2", "0000") + group(s, "3+3") for s in range(1, 6)]
            rollouts = [row for step in steps for row in step]
        metrics = metrics or [{"step": s, **METRICS, "own_part": s / 7} for s in range(1, 6)]
        answers = [{**rollout(0, "9+9", right), "sampled_correct": right / 2} for right in (0.0, 1.0)]
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
        (folder / "metrics.jsonl").write_text(lines(metrics))
        (folder / "rollouts.jsonl").write_text(lines(rollouts))
        (folder / "eval.jsonl").write_text(lines([evaluation(0, 0.25), evaluation(5, 0.5)]))
        for step, answer in zip((0, 5), answers, strict=True):
            (folder / f"eval-{step}.jsonl").write_text(lines([answer]))
        return folder

    return make


def data_of(page: Path) -> dict:
    """The page's data, read as strictly as a browser reads it."""
    text = page.read_text().split('id="data">')[1].split("</script>")[0]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def run_data(folder: Path, *arguments: str) -> dict:
    report.main([str(folder), *arguments])
    return data_of(folder / "report.html")["runs"][0]


# ---- Groups ----


def test_a_group_is_group_size_rows_of_one_step_and_prompt(make_run):
    twice = group(1, "a", "1000") + group(1, "a", "1100") + group(1, "b") + group(2, "b") + group(3, "c")[:3]
    run = run_data(make_run(rollouts=twice))
    rights = [sum(row["correct"] for row in g["rows"]) for g in run["groups"]]
    assert [(g["step"], g["prompt_id"]) for g in run["groups"]] == [(1, "id-a"), (1, "id-a"), (1, "id-b"), (2, "id-b")]
    assert rights == [1, 2, 2, 2] and run["total"] == run["shown"] == 16
    assert "3 rollouts are in no whole group of 4: they are left out" in run["notes"]
    assert run["prompts"]["id-a"]["trained"] == [[1, 3, 8]], "accuracy counts both groups"
    once = {"step", "prompt", "prompt_id"}  # for the group, not with each of its rows: the page would be twice as long
    assert not any(once & row.keys() for g in run["groups"] for row in g["rows"])


def test_without_a_group_size_neighbours_of_one_prompt_are_a_group(make_run):
    folder = make_run(rollouts=group(1, "a", "10") + group(1, "b", "101") + group(2, "b", "1"))
    (folder / "config.yaml").unlink()
    assert [len(g["rows"]) for g in run_data(folder)["groups"]] == [2, 3, 1]


def test_a_broken_line_does_not_shift_the_groups_behind_it(make_run):
    folder = make_run()
    broken = (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
    broken[1] = broken[1][:20] + "\n"
    (folder / "rollouts.jsonl").write_text("".join(broken))
    run = run_data(folder)
    assert run["total"] == 56 and all(len(g["rows"]) == 4 for g in run["groups"])
    assert run["notes"][-3:-1] == [
        "1 lines of rollouts.jsonl are no JSON objects: they are left out",
        "3 rollouts are in no whole group of 4: they are left out",
    ]


@pytest.mark.parametrize("rewards, dead", [("0000", True), ("1111", True), ("1000", False)])
def test_a_group_of_equal_rewards_is_dead(make_run, rewards, dead):
    rows = group(1, "a", rewards)
    for i, row in enumerate(rows):
        row["advantage"] = i * 1e-9  # rounding: judged by the rewards
    assert [g["dead"] for g in run_data(make_run(rollouts=rows))["groups"]] == [dead]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 25, 30, 99])
def test_the_chosen_groups_are_spread_over_the_steps(count):
    groups = [report.Group(step, f"{step}-{i}", begin=10 * step + i) for step in range(1, 11) for i in range(3)]
    chosen = report.choose(groups, count)
    per_step = [sum(g.step == step for g in chosen) for step in range(1, 11)]
    assert len(chosen) == min(count, 30) and sorted({g.begin for g in chosen}) == [g.begin for g in chosen]
    assert max(per_step) - min(per_step) <= 1
    assert count == 1 or per_step[0] and per_step[-1], "the first and the last step are always there"
    gaps = [b.step - a.step for a, b in zip(chosen, chosen[1:], strict=False)]
    assert count > 10 or count == 1 or max(gaps) - min(gaps) <= 1


def test_the_page_is_bounded_in_rollouts_and_in_bytes(make_run, monkeypatch):
    folder = make_run()
    few = run_data(folder, "--max_rollouts", "23")
    assert (few["shown"], few["total"]) == (20, 60) and {g["step"] for g in few["groups"]} == {1, 2, 3, 4, 5}
    size = (folder / "rollouts.jsonl").stat().st_size
    monkeypatch.setattr(report, "MAX_BYTES", size // 3)
    light = run_data(folder)
    assert 12 <= light["shown"] <= 20 and {light["groups"][0]["step"], light["groups"][-1]["step"]} == {1, 5}


def test_the_accuracy_of_a_prompt_is_of_all_rollouts(make_run):
    run = run_data(make_run(rollouts=[row for step in (1, 2, 3, 4) for row in group(step, "a")]), "--max_rollouts", "8")
    assert [g["step"] for g in run["groups"]] == [1, 4]
    assert run["prompts"]["id-a"]["trained"] == [[step, 2, 4] for step in (1, 2, 3, 4)]


# ---- What is missing, or broken ----


def test_nan_and_infinity_become_null(make_run):
    rows = group(1, "a")
    rows[2]["penalty"], rows[3]["penalty"] = float("nan"), float("-inf")
    folder = make_run(rollouts=rows, clip_high=float("inf"))
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write(lines(group(1, "b")).replace('"length": 4', '"length": 1e999'))
    run = run_data(folder)
    assert [row["penalty"] for row in run["groups"][0]["rows"]] == [0, 0, None, None]
    assert run["metrics"][0]["length_wrong"] is None and run["config"]["clip_high"] is None
    assert run["groups"][1]["rows"][0]["length"] is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "eval.jsonl"])
def test_a_line_that_is_being_written_is_left_out_and_said(make_run, name):
    folder = make_run()
    with open(folder / name, "a") as file:
        file.write('{"step": 6, "reward": 0.')
    notes = run_data(folder)["notes"]
    assert f"the last line of {name} is cut off, as while a run is going on: it is left out" in notes
    assert not [note for note in notes if "no JSON objects" in note]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rollouts.jsonl", "eval.jsonl"])
def test_a_missing_file_is_said_and_the_rest_is_shown(make_run, name, capsys):
    folder = make_run()
    (folder / name).unlink()
    run = run_data(folder)
    assert any(note.startswith(f"{name} is missing") for note in run["notes"])
    assert f"  {name} is missing" in capsys.readouterr().out
    files = dict(zip(("config", "metrics", "groups", "evaluations"), report.LOGS, strict=True))
    assert [file for key, file in files.items() if not run[key]] == [name]


def test_empty_and_unreadable_files_are_said(make_run):
    folder = make_run()
    (folder / "rollouts.jsonl").write_text("")
    (folder / "config.yaml").write_text("a: b: c")
    notes = run_data(folder)["notes"]
    assert "rollouts.jsonl is empty" in notes and any("config.yaml is no YAML file of settings" in n for n in notes)


def test_metrics_of_another_version_are_named(make_run):
    notes = run_data(make_run())["notes"]
    assert len(notes) == 1 and "metrics.jsonl has no age, clipped_high, clipped_low, entropy" in notes[0]
    assert "reward" not in notes[0] and "worked" not in notes[0]


@pytest.mark.parametrize("folder, words", [("nowhere", "there is no folder"), (".", "has none of config.yaml, ")])
def test_a_folder_that_is_no_run_is_one_line_and_status_1(tmp_path, folder, words):
    command = [sys.executable, "-m", "view", "report", str(tmp_path / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1


def test_max_rollouts_must_be_positive(make_run):
    with pytest.raises(SystemExit, match="error: --max_rollouts is 0, it must be 1 or more"):
        view_main(["report", str(make_run()), "--max_rollouts", "0"])


# ---- Several runs, one prompt ----


def test_runs_that_differ_in_the_seed_only_are_one_arm():
    base = dict(CONFIG, lr_schedule="constant", steps=5, runs="a", task_args={"max_depth": 2})
    other_steps, decayed = base | {"steps": 9, "runs": "b"}, base | {"lr_schedule": "linear"}
    arms = [base, base | {"seed": 1}, base | {"lr": 1.0}, other_steps, decayed, decayed | {"steps": 9}, {}, {}]
    assert report.find_arms(arms) == [0, 0, 1, 0, 2, 3, 4, 5]
    assert report.differing([base, other_steps | {"lr": 1.0}]) == ["lr", "steps"]
    assert settings.CHANGEABLE_ON_RESUME < report.NOT_LEARNED | {"steps"}


def test_several_runs_share_one_page_and_its_bound(make_run, tmp_path):
    folders = [make_run("a"), make_run("b", seed=1), make_run("c", lr=0.5)]
    report.main([*map(str, folders), "--max_rollouts", "60"])
    page = data_of(tmp_path / "runs_report.html")
    assert [(run["name"], run["arm"], run["arm_name"], run["shown"]) for run in page["runs"]] == [
        ("a", 0, "lr 0.001", 20), ("b", 0, "lr 0.001", 20), ("c", 1, "lr 0.5", 20)
    ]  # fmt: skip
    assert sorted(page["differs"]) == ["lr", "seed"]
    report.main([*map(str, folders), "--out", str(tmp_path / "x.html")])
    assert len(data_of(tmp_path / "x.html")["runs"]) == 3


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run, tmp_path):
    (tmp_path / "a").mkdir()
    folders = [make_run("a/same"), make_run("same")]
    report.main([*map(str, folders), "--out", str(tmp_path / "x.html")])
    assert [run["name"] for run in data_of(tmp_path / "x.html")["runs"]] == list(map(str, folders))


@pytest.mark.parametrize("prompt, drawn", [("id-2+2", [[1, 2, 3, 4, 5], [0] * 5]), ("id-9+9", [[0, 5], [0, 1]])])
def test_one_prompt_over_time_as_a_plot(make_run, tmp_path, monkeypatch, prompt, drawn):
    from matplotlib.axes import Axes

    calls, plot = [], Axes.plot

    def record(axes, xs, ys, *style, **more):
        calls.append([list(xs), list(ys)])
        return plot(axes, xs, ys, *style, **more)

    monkeypatch.setattr(Axes, "plot", record)
    report.main([str(make_run()), "--prompt_id", prompt, "--out", str(tmp_path / "x.png")])
    assert prompt != "id-9+9" or calls[1] == [[0, 5], [0, 0.5]], "the sampled answers"
    assert calls[0] == drawn and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_prompt_is_an_error(make_run):
    folder = make_run()
    with pytest.raises(SystemExit, match="error: no rollout and no evaluation of .* has the prompt_id 123"):
        view_main(["report", str(folder), "--prompt_id", "123"])
    with pytest.raises(SystemExit, match="error: --prompt_id takes one run"):
        view_main(["report", str(folder), str(folder), "--prompt_id", "123"])


def test_the_evaluation_problems_are_among_the_prompts(make_run):
    prompt = run_data(make_run())["prompts"]["id-9+9"]
    assert [point[:3] for point in prompt["evaluated"]] == [[0, 0, 0], [5, 1, 0.5]] and not prompt["trained"]
    assert all(point[3]["completion"] == "so it is 7" for point in prompt["evaluated"])


# ---- A real run, and the page in a browser ----


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    config = dict(model="mathformer/pretrained", task="arithmetic", task_args={"eval_size": 6}, steps=3)
    config |= dict(runs=str(tmp_path_factory.mktemp("runs")), prompts_per_step=4, group_size=4, eval_samples=2)
    return Path(grpo.train(grpo.Config(**config, max_prompt_tokens=48, max_completion_tokens=24, lr=1e-4))["run"])


def test_the_report_knows_every_metric_of_a_run(real_run):
    run = run_data(real_run)
    assert run["notes"] == [] and run["shown"] == 48 and len(run["evaluations"]) == 2
    known = {key for panels in report.METRICS.values() for keys in panels for key in keys.split()}
    assert set(run["metrics"][0]) - known <= {"step", "steps_right"}, "the latter is a part of the task's own"


@pytest.fixture(scope="module")
def browser():
    """Skips where there is no chromium or no playwright; fails there if REQUIRE_CHROMIUM is set."""
    chromium = shutil.which("chromium")
    if not (chromium and find_spec("playwright")):
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip)("chromium or playwright is missing")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=BROWSER.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, and at the end of the test makes sure that it had no error and asked for nothing but itself."""
    opened, troubles, requests = [], [], []

    def open_(path: Path, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.resolve().as_uri())
        opened.append(page)
        return page

    yield open_
    urls = [page.url for page in opened]
    for page in opened:
        page.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith("data:")] == urls


def test_the_page_of_a_real_run_shows_every_curve(real_run, open_page):
    run_data(real_run)
    page = open_page(real_run / "report.html")
    assert page.title() == real_run.name and page.locator("#notes").count() == 0
    panels = [keys for panels in report.METRICS.values() for keys in panels] + ["steps_right"]
    assert "resampled_groups" in page.locator("#zero summary").inner_text()
    page.locator("#zero summary").click()
    page.evaluate("scrollTo(0, 0)")
    titles = page.locator("#curves h4").all_inner_texts()
    assert set(titles) == {keys.replace(" ", ", ") for keys in panels} - {"kl_ref"}, "there is no KL without a penalty"
    for path in page.locator("#curves path.mean").all():
        box = path.bounding_box()
        assert box["width"] > 100 and box["y"] > 0 and path.get_attribute("d").startswith("M")
    assert page.locator("#curves path.band").count() == 3, "two intervals of accuracy, and reward_std"
    table = page.locator("#evaluation table").inner_text()
    assert "greedy accuracy" in table and "answers that show steps" in table and "after 3 steps" in table
    page.get_by_text("Configuration", exact=True).click()
    assert page.locator(".settings").inner_text().count("group_size") == 1


def test_values_of_a_curve_are_read_by_pointer_and_by_key(make_run, open_page):
    folder = make_run(metrics=[{"step": s, "reward": s / 10} for s in range(1, 6)])
    run_data(folder)
    page = open_page(folder / "report.html")
    figure = page.locator("figure", has=page.locator("h4", has_text="reward"))
    assert figure.locator(".readout").inner_text().startswith("step 5")
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + box["height"] / 2)
    assert figure.locator(".readout").inner_text() == "step 3\n0.3 (mean 0.3)"
    figure.locator("svg").press("ArrowLeft")
    assert figure.locator(".readout").inner_text() == "step 2\n0.2 (mean 0.2)"


def test_a_whole_group_is_shown_with_its_signs(make_run, open_page):
    folder = make_run(rollouts=group(1, "1+1", "1000", own=0.25) + group(1, "2+2", "1111", advantage=0.0))
    run_data(folder)
    page = open_page(folder / "report.html")
    cards = page.locator("#view article")
    assert cards.count() == 4 and [c.get_attribute("class") for c in cards.all()] == ["card good"] + ["card bad"] * 3
    assert page.locator("#view .advantage").all_inner_texts() == ["A = +0.5", "A = −0.5", "A = −0.5", "A = −0.5"]
    text = cards.first.inner_text()
    for part in ("✓ right", "own\n0.25", "reward\n1", "length\n4", "prediction 7", "ground truth 8", "so it is 7"):
        assert part in text, part
    page.get_by_role("button", name="next →").click()
    assert [c.get_attribute("class") for c in cards.all()] == ["card zero"] * 4
    assert "a dead group" in page.locator("#view h3").inner_text()


def test_filters_and_search_change_the_list(make_run, open_page):
    rows = group(1, "1+1", "1111") + group(1, "2+2", "0000") + group(2, "3+3", "1000", completion="Wait, so 7")
    rows += group(2, "4+4", "0001", completion="awaiting") + group(3, "5+5", "0100")
    rows[-1] |= {"truncated": True, "completion": "a (needle)"}
    folder = make_run(rollouts=rows)
    run_data(folder)
    page = open_page(folder / "report.html")

    def listed() -> tuple[str, int]:
        return page.locator("#status").inner_text(), len(page.locator("#step option").all())

    def search(text: str) -> None:
        page.locator("#search").fill(text)
        page.wait_for_timeout(300)  # it waits for the end of typing

    assert listed() == ("5 of 5 groups match.", 3)
    page.get_by_label("answer").select_option("right")
    assert listed() == ("4 of 5 groups match.", 3)
    page.get_by_label("in a dead group").check()
    assert listed() == ("1 of 5 groups match.", 1) and "1+1" in page.locator("#view").inner_text()
    page.get_by_label("answer").select_option("wrong")
    assert listed() == ("1 of 5 groups match.", 1) and "2+2" in page.locator("#view").inner_text()
    page.get_by_label("in a dead group").uncheck()
    page.get_by_label("with reflection").check()
    assert listed() == ("1 of 5 groups match.", 1) and "Wait, so 7" in page.locator("#view").inner_text()
    page.get_by_label("with reflection").uncheck()
    page.get_by_label("truncated").check()
    assert listed() == ("1 of 5 groups match.", 1)
    assert page.locator("#view .badge").all_inner_texts() == ["truncated", "matches"]
    page.get_by_label("truncated").uncheck()
    search("A (NEEDLE")
    assert listed() == ("1 of 5 groups match.", 1) and "5+5" in page.locator("#view").inner_text()
    search("What is 4+4")
    assert listed() == ("1 of 5 groups match.", 1) and "4+4" in page.locator("#view").inner_text()
    search("nowhere")
    assert listed() == ("0 of 5 groups match.", 0) and page.locator("#view").inner_text() == ""


@pytest.mark.parametrize("words, text", [(None, "config.yaml has no reflection_words"), (["("], "is no list")])
def test_without_words_of_reflection_there_is_no_such_filter(make_run, open_page, words, text):
    folder = make_run(reflection_words=words)
    if words is None:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    run_data(folder)
    page = open_page(folder / "report.html")
    assert page.locator("#reflecting").count() == 0 and text in page.locator("#rollouts").inner_text()


def test_what_a_model_wrote_is_text_and_never_code(make_run, open_page):
    fields = dict.fromkeys(("prompt_id", "prediction", "ground_truth", "own", HOSTILE), HOSTILE)
    rows = group(1, HOSTILE, completion=HOSTILE, **fields) + group(2, HOSTILE, completion=HOSTILE, **fields)
    folder = make_run(HOSTILE.replace("/", ""), rows, [{"step": 1, HOSTILE: 1.0}], task=HOSTILE, **{HOSTILE: 1})
    (folder / "eval-0.jsonl").write_text(lines([{"prompt": HOSTILE, "completion": HOSTILE, "correct": 1.0}]))
    run_data(folder)
    data = (folder / "report.html").read_text().split('id="data">')[1]
    assert data.index("<") == data.index("</script>\n<script>"), "no < before the end of the data"
    page = open_page(folder / "report.html")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    assert page.locator("#view pre").nth(1).evaluate("node => node.textContent") == HOSTILE
    assert page.locator("#view .dim code").first.evaluate("node => node.textContent") == HOSTILE


def test_long_completions_are_folded(make_run, open_page):
    long = "\n".join(f"line {i}" for i in range(60))
    folder = make_run(rollouts=group(1, "a", completion=long) + group(1, "b"))
    run_data(folder)
    page = open_page(folder / "report.html")
    text, button = page.locator("#view article pre").first, page.locator("#view article button").first
    folded = text.bounding_box()["height"]
    button.press("Enter")
    assert text.bounding_box()["height"] > 4 * folded and button.inner_text() == "fold"
    button.press("Enter")
    assert text.bounding_box()["height"] == folded and button.inner_text() == "unfold (60 lines, 469 characters)"


def test_the_page_says_how_many_rollouts_it_shows(make_run, open_page):
    folder = make_run()
    run_data(folder)
    assert "All 60 rollouts" in open_page(folder / "report.html").locator("#shown").inner_text()
    run_data(folder, "--max_rollouts", "20")
    page = open_page(folder / "report.html")
    assert page.locator("#shown").inner_text().startswith("20 of 60 rollouts are on this page: whole groups")
    assert page.locator("#status").inner_text() == "5 of 5 groups match."


def test_one_prompt_early_and_late(make_run, open_page):
    rows = group(1, "2+2", "0000") + group(2, "1+1", "1000") + group(5, "1+1", "1111", completion="late now")
    folder = make_run(rollouts=rows)
    run_data(folder)
    page = open_page(folder / "report.html")
    view = page.locator("#prompt-view")
    assert page.locator("#prompt option").first.inner_text().startswith("1+1"), "the most improved one"
    assert view.locator("h3").all_inner_texts()[1:] == ["early: step 2", "late: step 5"]
    assert view.locator("article").count() == 8 and "late now" in view.locator("article").last.inner_text()
    assert view.locator("path.mean").bounding_box()["height"] > 50
    page.locator("#prompt-search").fill("9+9")
    assert "greedy answer after step 0" in view.inner_text() and view.locator("article").count() == 2
    page.get_by_role("button", name="← previous").click()
    page.get_by_role("button", name="this prompt over time").click()
    assert "prompt id-2+2" in view.inner_text() and "only once" in view.inner_text()


def test_the_comparison_has_one_legend_entry_an_arm(make_run, open_page, tmp_path):
    folders = [make_run("a"), make_run("b", group(1, "7+7"), seed=1), make_run("c", lr=0.5)]
    report.main([*map(str, folders)])
    page = open_page(tmp_path / "runs_report.html")
    assert page.locator("#legend .arm").all_inner_texts() == ["lr 0.001 (runs: 2)", "lr 0.5 (runs: 1)"]
    figure = page.locator("figure", has=page.locator("h4", has_text="own_part"))
    colors = [path.evaluate("node => node.style.stroke") for path in figure.locator("path.mean").all()]
    assert len(colors) == 3 and colors[0] == colors[1] != colors[2]
    tables = [table.inner_text() for table in page.locator("#evaluation table").all()]
    assert tables[0].count("→") == 3 * 5 and tables[1].split("\n")[0].split() == ["run", "lr", "seed"]
    page.get_by_label("Run of the rollouts").select_option("b")
    assert "What is 7+7?" in page.locator("#view").inner_text()
    assert "All 4 rollouts" in page.locator("#shown").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(make_run, open_page, tmp_path, scheme):
    long = "x" * 3000
    rows = [row for s in (1, 2) for row in group(s, "a" * 300, completion=long, own=long, prediction=long)]
    folders = [make_run("a" * 120, rows), make_run("b", rows, task="t" * 300)]
    report.main([*map(str, folders), "--out", str(tmp_path / "several.html")])
    run_data(folders[0])
    backgrounds = []
    for path in (tmp_path / "several.html", folders[0] / "report.html"):
        page = open_page(path, width=360, scheme=scheme)
        for button in page.locator("summary, article button").all():
            button.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert set(backgrounds) == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)"}


def test_on_a_phone_the_rollouts_are_within_two_screens(make_run, open_page):
    """The curves are folded there, and open at a desk."""
    folder = make_run()
    run_data(folder)
    phone, desk = open_page(folder / "report.html", width=390), open_page(folder / "report.html")
    assert phone.locator("#rollouts").bounding_box()["y"] < 2 * 900
    assert phone.locator("#curves details[open]").count() == 0 < desk.locator("#curves details[open]").count()
    phone.get_by_text("Learning", exact=True).click()
    assert phone.locator("#curves svg").first.is_visible()


def test_the_head_says_what_was_run_and_with_which_command(make_run, open_page):
    folder = make_run(model="mathformer/pretrained", task="arithmetic", seed=3, steps=5)
    run_data(folder)
    head = open_page(folder / "report.html").locator("body > header").inner_text()
    assert "mathformer/pretrained on arithmetic, seed 3, 5 steps, 20" in head
    assert f"python grpo.py --config {folder}/config.yaml" in head


def test_panels_that_are_zero_throughout_are_folded_away(make_run, open_page):
    rows = [{"step": s, "reward": 0.5 * s, "truncated": 0.0, "skipped_updates": 0} for s in range(1, 6)]
    folder = make_run(metrics=rows)
    run_data(folder)
    page = open_page(folder / "report.html")
    folded = page.locator("#zero")
    assert folded.locator("summary").inner_text() == "Zero throughout: truncated, skipped_updates"
    assert not folded.locator("svg").first.is_visible()
    assert page.locator("figure", has=page.locator("h4", has_text="reward")).locator("svg").is_visible()


@pytest.mark.parametrize("values, last", [((0.2, 0.7), "1"), ((0.2, 1.0), "1"), ((0.01, 0.02), "0.02")])
def test_the_axis_of_a_share_ends_at_1_unless_all_of_it_is_small(values, last, make_run, open_page):
    folder = make_run(metrics=[{"step": s, "correct": v} for s, v in enumerate(values, 1)])
    run_data(folder)
    page = open_page(folder / "report.html")
    figure = page.locator("figure", has=page.locator("h4", has_text="correct"))
    assert figure.locator("text").all_text_contents()[-3] == last


def test_seeds_of_one_setting_are_told_apart(make_run, open_page, tmp_path):
    report.main([str(make_run("a")), str(make_run("b", seed=1)), str(make_run("c", lr=0.5))])
    page = open_page(tmp_path / "runs_report.html")
    figure = page.locator("figure", has=page.locator("h4", has_text="reward")).first
    strokes = [
        (path.get_attribute("style"), path.get_attribute("stroke-dasharray"))
        for path in figure.locator("path.mean").all()
    ]
    assert len(set(strokes)) == 3 and strokes[0][0] == strokes[1][0] != strokes[2][0]
    readout = figure.locator(".readout").inner_text()
    assert "seed 0" in readout and "seed 1" in readout


def test_every_control_has_a_name(make_run, open_page, tmp_path):
    report.main([str(make_run("a")), str(make_run("b", seed=1))])
    page = open_page(tmp_path / "runs_report.html")
    names = {"select, input": "labels.length", "button, summary": "textContent.trim()", "[tabindex]": "ariaLabel"}
    for controls, name in names.items():
        found = page.locator(controls).all()
        assert len(found) > 4 and all(control.evaluate(f"node => Boolean(node.{name})") for control in found)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rollouts.jsonl", "eval.jsonl"])
def test_the_page_opens_whatever_is_missing(make_run, open_page, name):
    folder = make_run()
    (folder / name).unlink()
    run_data(folder)
    page = open_page(folder / "report.html")
    assert f"{name} is missing" in page.locator("#notes").inner_text()
    assert page.locator("#view article").count() == (0 if name == "rollouts.jsonl" else 4)
    assert page.locator("#step").count() == (0 if name == "rollouts.jsonl" else 1), "no filters of nothing"
