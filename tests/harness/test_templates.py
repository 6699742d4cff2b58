"""Chat templates from settings: a file, arguments, a system prompt; each as it reaches the sampler."""

import json

import pytest
from conftest import PRETRAINED

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
USER = [{"role": "user", "content": "1+1"}]
SYSTEM = [{"role": "system", "content": "7"}]


@pytest.fixture
def prompts(tmp_path, tokenizer, monkeypatch):
    """The texts that a run's sampler gets, with these settings."""

    def of(prompt=USER, template=TEMPLATE, **settings) -> set[str]:
        model, _ = loading.load_model(PRETRAINED)
        model.save_pretrained(tmp_path / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        tokenizer.chat_template = None
        (tmp_path / "asks.py").write_text(TASK.replace("PROMPT", json.dumps(prompt)))
        seen, complete = set(), grpo.complete
        monkeypatch.setattr(grpo, "complete", lambda *args: [seen.add(p.prompt) for p in args[3]] and complete(*args))
        small = dict(steps=1, prompts_per_step=1, group_size=2, eval_samples=1, max_completion_tokens=4)
        small |= dict(max_prompt_tokens=40, runs=str(tmp_path / "runs"), lr=1e-6)
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
