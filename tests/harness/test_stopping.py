"""Stop strings: a completion ends with the token that completes one, and is trained and judged as it was sampled."""

import pytest
import torch
from conftest import row_logps

import grpo
from harness.prompts import written_text
from harness.settings import Sample
from harness.stopping import closing_tokens, completes, up_to_stop

STOPS = ("12", "=7")  # in the small tokenizer, characters are tokens: two each


class Digits:
    """Any answer; the text that is judged is what it predicts. The prompt has a stop string in it."""

    stop: tuple = ()

    def train(self, rng, step):
        return {"prompt": "<sos><big>31+12"}

    def eval(self):
        return [self.train(None, 0)]

    def prompt(self, example):
        return example["prompt"]

    def reward(self, text, example):
        paid = float(len(text) % 2)
        return dict(reward=paid, correct=paid, format=1.0, prediction=text, ground_truth=None)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text, stops, kept",
    [
        ("a</answer> b </answer>", ("</answer>",), "a</answer>"),
        ("nothing", ("</answer>",), "nothing"),
        ("x END y STOP", ("STOP", "END"), "x END"),
        ("ab", ("b", "ab"), "ab"),
        ("", ("b",), ""),
        ("a b\n\nQuestion", ("\n\n",), "a b"),  # white space is no part of the answer
        ("a </answer>\n\n", ("\n\n", "</answer>"), "a </answer>"),
    ],
)
def test_text_behind_the_first_stop_is_cut_off(text, stops, kept):
    assert up_to_stop(text, stops) == kept


def test_only_ends_that_can_complete_a_string_are_decoded(tokenizer, monkeypatch):
    rows = [ids_of(tokenizer, text) for text in ("3412", "1234", "3=7=", "24=7", "21=2")]
    decoded = []
    closing_tokens(tokenizer, STOPS)
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: decoded.append(ids) or decode(self, ids))
    assert completes(tokenizer, STOPS, torch.tensor(rows)).tolist() == [True, False, False, True, False]
    assert len(decoded) == 3, "those that end with 2 or 7"


def test_long_rows_are_decoded_at_their_ends_only(tokenizer, monkeypatch):
    lengths = []
    closing_tokens(tokenizer, STOPS)
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    row = ids_of(tokenizer, "3" * 500 + "12")
    assert completes(tokenizer, STOPS, torch.tensor([row])).all() and lengths == [6]


@pytest.mark.parametrize("stop", ["é", "。", "</é>", "🙂"])
def test_characters_of_several_tokens_are_seen(stop, byte_tokenizer):
    """A byte-level tokenizer that knows bytes alone: the last token of the string is a part of a character."""
    ids = byte_tokenizer(f"ab{stop}")["input_ids"]
    assert len(ids) == 2 + len(stop.encode())
    ends = [bool(completes(byte_tokenizer, (stop,), torch.tensor([ids[:n]]))) for n in range(1, len(ids) + 1)]
    assert ends == [False] * (len(ids) - 1) + [True]


@pytest.fixture
def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_what_was_sampled_stays_and_what_is_behind_is_not_judged(tokenizer):
    ids = ids_of(tokenizer, "3=7")
    assert written_text(tokenizer, Sample([5], ids, [0.0] * 3, False), STOPS) == "3=7"
    assert written_text(tokenizer, Sample([5], ids, [0.0] * 3, True), ()) == "3=7"
    assert written_text(tokenizer, Sample([5], ids, [0.0] * 3, False), ()) == "3=", "the last one ends the sequence"
    ended = [*ids_of(tokenizer, "34"), tokenizer.eos_token_id]
    assert written_text(tokenizer, Sample([5], ended, [0.0] * 3, False), STOPS) == "34"
    inside = ids_of(tokenizer, "3=78")  # as if one token were `78`
    assert written_text(tokenizer, Sample([5], inside, [0.0] * 4, False), STOPS) == "3=7"


def test_the_sampler_ends_a_row_with_the_token_that_completes_a_string(model, tokenizer):
    sampler = grpo.TorchSampler(model, [tokenizer.eos_token_id], tokenizer=tokenizer)
    stops = ("1", "2", "=7", "34")
    plain = sampler.generate([[5, 6, 7]], 64, grpo.Sampling(24), seed=0)
    found = sampler.generate([[5, 6, 7]], 64, grpo.Sampling(24, stop=stops), seed=0)
    ended_by_string = 0
    for sample in found:
        text = tokenizer.decode(sample.completion_ids)
        before = tokenizer.decode(sample.completion_ids[:-1])
        assert not any(stop in before for stop in stops), "it should have ended before"
        by_string = any(stop in text for stop in stops)
        ended_by_string += by_string
        assert sample.truncated == (not by_string and sample.completion_ids[-1] != tokenizer.eos_token_id)
        assert len(sample.logps) == sample.length
        r = grpo.Rollout(**sample._asdict())
        assert torch.allclose(row_logps(model, r), torch.tensor(sample.logps).double(), atol=1e-4)
    assert ended_by_string > 10 and sum(map(len, (s.completion_ids for s in found))) < sum(s.length for s in plain)


@pytest.mark.parametrize("where", ["setting", "task", "setting before task"])
def test_a_run_stops_at_strings_of_the_setting_or_of_the_task(where, tmp_path, monkeypatch, make_config):
    """The prompt has one, which ends nothing; the last token is trained with the others."""
    monkeypatch.setattr(Digits, "stop", () if where == "setting" else ("2",) if where == "task" else ("nowhere",))
    monkeypatch.setattr(grpo.loading, "load_task", lambda *args: Digits())
    seen, update = [], grpo.update
    monkeypatch.setattr(grpo, "update", lambda *args: seen.extend(args[3]) or update(*args))
    settings = dict(steps=2, prompts_per_step=2, group_size=16, eval_samples=2, lr=1e-4, dead_groups="keep")
    if where != "task":
        settings["stop"] = ["2"]
    result = grpo.train(make_config(**settings, runs=str(tmp_path)))
    stopped = [r for r in seen if "2" in r.text]
    assert len(stopped) > 4 and all(r.text.endswith("2") and "2" not in r.text[:-1] for r in stopped)
    assert not any(r.truncated for r in stopped) and all(r.length == len(r.logps) for r in stopped)
    assert "stop:\n- '2'\n" in (result["run"] / "config.yaml").read_text()


def test_a_tokenizer_is_read_once(tokenizer):
    closing_tokens.cache_clear()
    for _ in range(3):
        completes(tokenizer, STOPS, torch.tensor([[5, 6]]))
    assert closing_tokens.cache_info().misses == 1


@pytest.mark.parametrize("stop", [[""], ["a", ""], [7]])
def test_an_empty_string_is_refused(stop, make_config):
    with pytest.raises(grpo.UsageError, match="each of its strings must have a character or more"):
        make_config(stop=stop)


def test_the_most_likely_answer_stops_there_too(make_config):
    config = make_config(stop=["a", "b"])
    assert config.most_likely == grpo.Sampling(16, temperature=0.0, stop=("a", "b"))
    assert config.sampling.stop == ("a", "b")
