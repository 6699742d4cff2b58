"""Tasks, tokenizers, templates and checkpoints of anyone's: each fault is one line before there is a folder."""

import json

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from test_models import SIZES
from tokenizers.processors import TemplateProcessing

import grpo
from harness import evaluation, loading
from harness.prompts import Problem, encode_prompt, written_text
from harness.settings import Sample

TASK = """
import math, numpy, torch
class Own:
    def __init__(self): pass
    def train(self, rng, step): return {"q": rng.choice("1234")}
    def eval(self): return [{"q": q} for q in "56"]
    def prompt(self, example): return f"{example['q']}+1"
    def reward(self, text, example):
        return dict(reward=0.0, correct=0, format=1, prediction=text, ground_truth=None)
class Task(Own):
    def METHOD: BODY
PARTS = dict(reward=0.0, correct=0, format=1, prediction="", ground_truth=None)
"""


def words(task: str, model, tmp_path, **settings) -> list[str]:
    (tmp_path / "own.py").write_text(task)
    settings |= dict(steps=1, prompts_per_step=1, group_size=2, max_completion_tokens=4, max_prompt_tokens=200)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return ["--model", str(model), "--task", f"{tmp_path}/own.py:Task", "--runs", str(tmp_path / "runs"), *flags]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Starts a run that has to end in one line, before any evaluation and any folder."""
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: pytest.fail("the evaluation was started"))

    def start(task: str, model, **settings) -> str:
        with pytest.raises(SystemExit) as stopped:
            grpo.main(words(task, model, tmp_path, **settings))
        message = stopped.value.code  # a text, which Python prints, and ends with 1
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message.strip()
        assert len(message) < 1000 and not (tmp_path / "runs").exists()
        return message

    return start


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    save(folder, byte_tokenizer())
    return folder


def save(folder, tokenizer, **config) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | config, **{} if "vocab_size" in config else dict(vocab_size=300))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def case(method: str, body: str, said: str):
    return pytest.param(method, body, said, id=f"{method.partition('(')[0]}: {body[:50]}")


TRAIN, EVAL, PROMPT = "train(self, rng, step)", "eval(self)", "prompt(self, example)"
REWARD = "reward(self, text, example)"
TASKS = [
    case(TRAIN, "return [][0]", "Task.train() raised IndexError: list index out of range"),
    case(TRAIN, "raise ValueError('two\\nlines')", "Task.train() raised ValueError: two lines"),
    *(case(TRAIN, f"return {given}", "Task.train() must give problems") for given in ("None", "[]", "5", "('q', 1)")),
    case(EVAL, "raise KeyError('x')", "Task.eval() raised KeyError"),
    case(EVAL, "return None", "Task.eval() raised TypeError"),
    case(EVAL, "return 5", "Task.eval() raised TypeError"),
    case(EVAL, "return []", "Task.eval() gave no problems"),
    *(case(EVAL, f"return {given}", "Task.eval() must give problems") for given in ("'text'", "[None]", "[('q', 1)]")),
    case(EVAL, "return [list(range(10000))]", "Task.eval() must give problems"),
    case(PROMPT, "return example['x']", "Task.prompt() raised KeyError"),
    case(PROMPT, "return ''", "there is no token to go on from"),
    *(
        case(PROMPT, f"return {given}", "Task.prompt() must give a text, or a list of messages")
        for given in (
            "None", "5", "[]", "b'text'", "('user', 'text')", "['text']", "[{}]", "[{'role': 'user'}]",
            "[{'role': 'user', 'content': None}]", "{'role': 'user', 'content': 'text'}",
        )
    ),
    case(REWARD, "raise OSError('gone')", "raised OSError: gone"),
    *(case(REWARD, f"return {given}", "must be a dict with the keys") for given in ("None", "1.0", "{}", "[1]")),
    case(REWARD, "return 10**5000", "must be a dict with the keys"),
    *(
        case(REWARD, f"return PARTS | dict(reward={value})", "which is no finite number")
        for value in (
            "10**400", "10**5000", "-10**400", "math.nan", "math.inf", "None", "'1'", "1j", "[1.0]", "numpy.ones(2)",
            "torch.ones(2)", "numpy.array(['a'])",
        )
    ),
    case(REWARD, "return PARTS | dict(correct=0.5)", "must be 0 or 1"),
    case(REWARD, "return PARTS | dict(format=math.nan)", "which is no finite number"),
    case(REWARD, "return PARTS | dict(mine=10**400)", "too large to be averaged"),
    *(case(REWARD, f"return PARTS | dict({name}=7.0)", "choose another") for name in (
        "accuracy", "step", "length", "tokens", "loss", "reward_std", "pass_at_k", "truncated", "advantage",
    )),
    case("__init__(self)", "raise RuntimeError('no network')", "no network"),
    case("__init__(self, x)", "pass", "its arguments"),
]  # fmt: skip


@pytest.mark.parametrize("method, body, said", TASKS)
def test_a_task_that_gives_what_it_must_not_is_named(method, body, said, refused, model_folder):
    assert said in refused(TASK.replace("METHOD", method).replace("BODY", body), model_folder)


@pytest.mark.parametrize("value, paid", [("numpy.float32(0.5)", 0.5), ("torch.tensor(2)", 2), ("numpy.ones(1)", 1)])
def test_numbers_of_numpy_and_torch_are_numbers(value, paid, tmp_path, model_folder):
    task = TASK.replace("METHOD", REWARD).replace("BODY", f"return PARTS | dict(reward={value}, mine={value})")
    config = grpo.parse_config(words(task, model_folder, tmp_path, eval_steps=0))
    assert grpo.train(config)["last"]["mine"] == paid


def config_of(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights_of(folder, change) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights) or weights, file, {"format": "pt"})


def template_of(folder, template: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def in_gguf(folder) -> None:
    (folder / "config.json").unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


CHAT = TASK.replace("METHOD", PROMPT).replace(
    "BODY", "return [dict(role='system', content='Be brief.'), dict(role='user', content=example['q'])]"
)
QUANTISED = "its weights cannot be trained"
MODELS = {
    "no template": (lambda f: template_of(f, None), "no chat template"),
    "a template that does not parse": (lambda f: template_of(f, "{% if %}"), "chat template cannot be used"),
    "a template that refuses everything": (lambda f: template_of(f, "{{ raise_exception('never') }}"), "never"),
    "a template that adds what is not text": (lambda f: template_of(f, "{{ messages + 1 }}"), "cannot be used"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "an empty config": (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    "an unknown architecture": (lambda f: config_of(f, model_type="nobodys"), "cannot be loaded"),
    "an encoder and decoder": (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'), "is a t5"),
    "Bart": (lambda f: (f / "config.json").write_text('{"model_type": "bart"}'), "is a bart"),
    "images": (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "is a clip"),
    "GPTQ": (lambda f: config_of(f, quantization_config=dict(quant_method="gptq", bits=4)), QUANTISED),
    "AWQ": (lambda f: config_of(f, quantization_config=dict(quant_method="awq", bits=4)), QUANTISED),
    "bitsandbytes": (lambda f: config_of(f, quantization_config=dict(load_in_4bit=True)), QUANTISED),
    "FP8": (lambda f: config_of(f, quantization_config=dict(quant_method="fp8")), QUANTISED),
    "an unknown quantisation": (lambda f: config_of(f, quantization_config=dict(quant_method="own")), QUANTISED),
    "GGUF": (in_gguf, "is in GGUF"),
    "layers in words": (lambda f: config_of(f, num_hidden_layers="two"), "cannot be loaded"),
    "heads that do not divide": (lambda f: config_of(f, num_attention_heads=5), "cannot be loaded"),
    "one layer more than there is": (lambda f: config_of(f, num_hidden_layers=3), "is missing"),
    "a wrong vocabulary": (lambda f: config_of(f, vocab_size=280), "is [300, 32], not [280, 32]"),
    "a short window": (lambda f: config_of(f, max_position_embeddings=64), "64 positions"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "weights that are cut off": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "cannot be loaded"),
    "a tensor that lacks": (
        lambda f: weights_of(f, lambda w: w.pop("lm_head.weight") is w), "lm_head.weight is missing"
    ),
    "weights that are no numbers": (
        lambda f: weights_of(f, lambda w: w["model.norm.weight"].fill_(torch.nan) is w), "that are not finite"
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "cannot be loaded"
    ),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "a smaller model than the tokenizer": (
        lambda f: save(f, byte_tokenizer(), vocab_size=40), "the prompt has the token"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_named(name, refused, model_folder):
    spoil, said = MODELS[name]
    spoil(model_folder)
    assert said in refused(CHAT, model_folder)


# What is right all the same


class Asks:
    def __init__(self, prompt, prefill: str = ""):
        self.asked, self.prefill = prompt, prefill

    def prompt(self, example: dict):
        return self.asked


USER = [dict(role="user", content="2+2?")]
SYSTEM = [dict(role="system", content="Be brief.")]


def test_a_system_message_that_the_template_refuses_goes_into_the_users_turn(capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    for _ in range(2):
        assert encode_prompt(tokenizer, Asks(SYSTEM + USER), {})[0] == "[user] Be brief.\n\n2+2?\n"
    assert encode_prompt(tokenizer, Asks(USER), {})[0] == "[user] 2+2?\n"
    assert capsys.readouterr().out.count("takes no system message") <= 1  # once in a process


@pytest.mark.parametrize(
    "end, prefill, prompt, begun",
    [
        ("A: <think>\n", "", "2+2?A: <think>\n", "<think>\n"),
        ("A: <think>\n", "Let me see.", "2+2?A: <think>\nLet me see.", "<think>\nLet me see."),
        ("A: <think>\n", "<think>", "2+2?A: <think>\n", "<think>\n"),
        ("A: ", "<think>", "2+2?A: <think>", "<think>"),
        ("A: ", "", "2+2?A: ", ""),
    ],
)
def test_what_is_judged_begins_where_the_answer_begins(end, prefill, prompt, begun):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + f"{{{{ {end!r} }}}}"
    assert encode_prompt(tokenizer, Asks(USER, prefill), {})[::2] == (prompt, begun)


@pytest.mark.parametrize("text", ["2+2?", "<eos>2+2?", "2+2?<eos>"])
def test_plain_text_has_each_special_token_once(text):
    """Of a tokenizer that puts one before, and one behind, every text."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<pad>"
    ends = [("<pad>", 1), ("<eos>", 0)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<pad>:0 $A:0 <eos>:0", special_tokens=ends)
    ids = encode_prompt(tokenizer, Asks(text), {})[1]
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids in ([1, *wanted], [1, *wanted, 0]) and ids.count(1) == 1
    assert (ids[-1] == 0) is text.endswith("<eos>")
    assert encode_prompt(tokenizer, Asks("<pad>" + text), {})[1] == ids


def test_an_id_that_the_tokenizer_does_not_have_is_shown():
    tokenizer = byte_tokenizer()
    seven, two = (tokenizer(text)["input_ids"][0] for text in "72")
    n = len(tokenizer)
    sample = Sample([], [seven, n + 5, n, two, 0], [], truncated=False)
    assert written_text(tokenizer, sample) == f"7<unknown token {n + 5}><unknown token {n}>2"
    assert written_text(tokenizer, sample._replace(truncated=True)).endswith("2<eos>")


def test_the_end_of_a_turn_in_the_template_ends_an_answer(model_folder, capsys):
    model, tokenizer = loading.load_model(str(model_folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    before = loading.find_eos(model, tokenizer)
    assert turn not in before
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|turn|>\n{% endfor %}"
    assert loading.find_eos(model, tokenizer) == sorted([*before, turn])
    assert "<|turn|> ends a turn" in capsys.readouterr().out


def test_all_of_the_answer_reaches_the_reward(model_folder):
    """Through `complete`: the opened think, what stands between, and what is written."""
    model, tokenizer = loading.load_model(str(model_folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>\n' }}"
    seen = []

    class Judges(Asks):
        def reward(self, text, example):
            seen.append(text)
            return dict(reward=0.0, correct=0, format=0, prediction="", ground_truth="")

    task = Judges(USER)
    problem = Problem({}, *encode_prompt(tokenizer, task, {}))
    sampler = grpo.TorchSampler(model, [0])
    grpo.complete(sampler, tokenizer, task, [problem], 2, grpo.Sampling(3), 0, prefix="So: ")
    assert all(text.startswith("<think>\nSo: ") for text in seen) and len(seen) == 2
