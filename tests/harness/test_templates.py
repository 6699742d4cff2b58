"""What settings make of a prompt: chat templates, a system prompt, worked examples; each as it reaches the sampler."""

import json

import pytest
import yaml
from architectures import tiny_model
from conftest import PRETRAINED, byte_tokenizer

import grpo
from harness import loading

TEMPLATE = (
    "{% for m in messages %}<sos>{{ '+' if m.role == 'user' else '-' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if shout is defined and shout %}*{% else %}={% endif %}{% endif %}"
)
TASK = """
class Asks:
    def train(self, rng, step):
        return {"n": 1}
    def eval(self):
        return [{"n": 1}]
    def prompt(self, example):
        return PROMPT
    def reward(self, text, example):
        return dict(reward=len(text) % 2, correct=len(text) % 2, format=1.0, prediction=text, ground_truth=None)
"""
SHOWS = (
    TASK.replace("PROMPT", "self.asked('1+1' if example['n'] == 1 else '2+' + str(example['n']))")
    + """
    prefill = "<answer>"
    def asked(self, text):
        return ASKED
    def eval(self):
        return [{"n": n} for n in EVALUATED]
    def demonstration(self, rng):
        n = rng.randrange(1, 4)
        return {"n": n}, f"{n}\\n \\n{n + 1}"
"""
)
USER = [{"role": "user", "content": "1+1"}]
SYSTEM = [{"role": "system", "content": "7"}]


@pytest.fixture
def prompts(tmp_path, tokenizer, monkeypatch):
    """The texts that a run's sampler gets, with these settings."""

    def of(prompt=USER, template=TEMPLATE, source=TASK, **settings) -> set[str]:
        reads_lines = source != TASK  # which the small model's tokenizer cannot
        reader = byte_tokenizer() if reads_lines else tokenizer
        model = tiny_model("llama") if reads_lines else loading.load_model(PRETRAINED)[0]
        model.save_pretrained(tmp_path / "model")
        reader.chat_template = template
        reader.save_pretrained(tmp_path / "model")
        reader.chat_template = None
        (tmp_path / "asks.py").write_text(source.replace("PROMPT", json.dumps(prompt)))
        seen, complete = set(), grpo.complete
        monkeypatch.setattr(grpo, "complete", lambda *args: [seen.add(p.prompt) for p in args[3]] and complete(*args))
        small = dict(steps=1, prompts_per_step=1, group_size=2, eval_samples=1, max_completion_tokens=4)
        small |= dict(max_prompt_tokens=200, runs=str(tmp_path / "runs"), lr=1e-6)
        where = dict(model=str(tmp_path / "model"), task=f"{tmp_path}/asks.py:Asks")
        result = grpo.train(grpo.Config(**where, **small | settings))
        of.result = result
        return seen

    return of


def test_arguments_of_the_template_reach_it(prompts):
    assert prompts() == {"<sos>+1+1="}
    assert prompts(chat_template_args={"shout": True}) == {"<sos>+1+1*"}
    assert prompts(chat_template_args={"shout": False}) == {"<sos>+1+1="}


def test_a_template_of_a_file_takes_the_place_of_the_models_and_is_kept(prompts, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<sos>{{ m.content }}{% endfor %}={{ mark }}")
    own = dict(chat_template=str(tmp_path / "own.jinja"), chat_template_args={"mark": "%"})
    assert prompts(**own) == {"<sos>1+1=%"}
    final = prompts.result["run"] / "final"
    assert (final / "chat_template.jinja").read_text() == (tmp_path / "own.jinja").read_text()
    (tmp_path / "own.jinja").unlink()  # a run that goes on has it in its checkpoint
    resumed = grpo.train(grpo.parse_config(["--resume", str(prompts.result["run"]), "--steps", "2"]))
    assert resumed["last"]["step"] == 2


@pytest.mark.parametrize("prompt", [USER, SYSTEM + USER])
def test_a_system_prompt_takes_the_place_of_the_tasks_own(prompt, prompts):
    assert prompts(prompt, system_prompt="3") == {"<sos>-3<sos>+1+1="}


CHAT = SHOWS.replace("ASKED", "[dict(role='system', content='7'), dict(role='user', content=text)]")
EVERY = CHAT.replace("EVALUATED", "(1, 2, 3)")
CHAT = CHAT.replace("EVALUATED", "[1]")
PLAIN = SHOWS.replace("ASKED", "'<sos>' + text").replace("EVALUATED", "[1]")


def test_worked_examples_are_earlier_turns_of_a_chat(prompts):
    """Of other problems than the one that is asked, always the same, with the prefill, behind the system prompt."""
    one = {f"<sos>-7<sos>+2+{n}<sos>-<answer>{n}\n \n{n + 1}<sos>+1+1=<answer>" for n in (2, 3)}
    assert prompts(source=CHAT) == {"<sos>-7<sos>+1+1=<answer>"}
    (shown,) = prompts(source=CHAT, few_shot=1)
    assert shown in one and prompts(source=CHAT, few_shot=1) == {shown}
    assert yaml.safe_load((prompts.result["run"] / "config.yaml").read_text())["stop"] == []
    each = prompts(source=EVERY, few_shot=2)
    assert len(each) == 3 and all(text.count("+1+1") == text.count("+2+2") == text.count("+2+3") == 1 for text in each)
    assert prompts(source=CHAT, few_shot=1, system_prompt="3").pop().startswith("<sos>-3<sos>+2")


@pytest.mark.parametrize("stop, kept", [([], ["\n\n"]), (["7"], ["7"])])
def test_worked_examples_of_a_text_end_in_blank_lines_as_the_answer_does(stop, kept, prompts):
    """There is no blank line inside of an answer, and the next one ends the completion, if no other stop is set."""
    (shown,) = prompts(source=PLAIN, few_shot=2, stop=stop)
    asked = [f"<sos>2+{n}<answer>{n}\n{n + 1}\n\n" for n in (2, 3)]
    assert shown in {"".join(order) + "<sos>1+1<answer>" for order in (asked, asked[::-1])}
    assert yaml.safe_load((prompts.result["run"] / "config.yaml").read_text())["stop"] == kept


def test_a_template_that_drops_the_thinking_of_earlier_turns_shows_no_examples(prompts):
    """As those of Qwen3 and DeepSeek's R1 models do: what would be shown is not what is paid."""
    thinks = CHAT.replace('f"{n}', 'f"<think>{n}</think>{n}')
    drops = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert "</think>" in prompts(source=thinks, few_shot=1).pop()
    with pytest.raises(grpo.UsageError, match="leaves out parts of earlier answers"):
        prompts(source=thinks, few_shot=1, template=drops)


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_one_line():
    """The small model's has none for a line break, which stands between worked examples."""
    config = grpo.parse_config(["--few_shot", "2", "--steps", "0"])
    with pytest.raises(grpo.UsageError, match="this model's tokenizer cannot read .*Missing"):
        loading.load(config)


@pytest.mark.parametrize(
    "source, said",
    [
        (TASK, r"Asks has no method `demonstration\(rng\) -> \(example, text\)`"),
        (CHAT, "few_shot is 3, and Asks has 2 other worked examples"),
        (CHAT.replace('{"n": n}, f"', '{"n": n}, 3, f"'), r"Asks.demonstration\(\) raised ValueError"),
        (
            CHAT.replace('{"n": n}, f"', '7, f"'),
            r"Asks.demonstration\(\) must give problems, which are dicts, but gave 7",
        ),
        (CHAT.replace('f"{n}', 'b"{n}'), r"Asks.demonstration\(\) must give text, but gave"),
    ],
)
def test_worked_examples_that_cannot_be_had_are_one_line(source, said, prompts, tmp_path):
    with pytest.raises(grpo.UsageError, match=said):
        prompts(source=source, few_shot=3)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(chat_template_args={"shout": 1, "wink": 1}), "chat_template_args has wink, which .* knows shout"),
        (dict(chat_template_args={"shout": 1}, template="{{ messages[0].content }}"), "has shout, which .* knows none"),
        (dict(chat_template_args={"shout": 1}, template=None, prompt="1+1"), "tokenizer has no chat template"),
        (
            dict(chat_template_args={"shout": 1}, prompt="1+1"),
            "chat_template_args is for tasks that give chat messages",
        ),
        (dict(system_prompt="7", prompt="1+1"), "system_prompt is for tasks that give chat messages: Asks.prompt"),
        (dict(chat_template="nowhere.jinja"), "chat_template nowhere.jinja cannot be read: .*No such file"),
        (dict(template="{% if %}", chat_template_args={"a": 1}), "the model's chat template cannot be used"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings, said, prompts, tmp_path):
    with pytest.raises(grpo.UsageError, match=said):
        prompts(**settings)
    assert not (tmp_path / "runs").exists()
