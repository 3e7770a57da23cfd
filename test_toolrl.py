"""Tests of toolrl, by behaviour: on puppets that write what they are told, and on a trained base."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import toolrl as t

HERE = Path(t.__file__).parent
DEFAULTS = replace(t.Settings(), device="cpu")
SMALL = replace(DEFAULTS, eval_episodes=4, groups=2, group_size=4, sft_steps=1)
END, TAG, CLOSE = t.END, t.OPEN["A"], t.CLOSE["A"]
GOOD, OTHER = t.call_text("mentor", "alice", "A"), t.call_text("rival", "bob", "A")
DIRECTORY = {(tool, person): "leo" for tool in t.TOOLS for person in t.PEOPLE}
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained():
    return t.train_base(DEFAULTS, 0)  # tests train a copy


@pytest.fixture
def untrained():
    return t.new_policy(0, "cpu")


@pytest.fixture
def quick(monkeypatch, trained):
    monkeypatch.setattr(t, "train_base", Mock(side_effect=lambda settings, seed: copy.deepcopy(trained)))


@dataclass
class Puppet:
    """Writes next_id(ids so far), with probability p."""

    next_id: object
    p: float = 1 - 1e-6
    device = torch.device("cpu")

    def __call__(self, ids, past_key_values=None, **_):
        cache = past_key_values or SimpleNamespace(ids=ids[:, :0])
        cache.batch_select_indices = lambda kept: setattr(cache, "ids", cache.ids[kept])
        start, cache.ids = cache.ids.shape[1], torch.cat([cache.ids, ids], 1)
        probs = torch.full((*ids.shape, len(t.VOCABULARY)), (1 - self.p) / (len(t.VOCABULARY) - 1))
        for row, seen in enumerate(cache.ids.tolist()):
            for place in range(ids.shape[1]):
                probs[row, place, self.next_id(seen[: start + place + 1])] = self.p
        return SimpleNamespace(logits=probs.log(), past_key_values=cache)


def writes(*messages):
    """A Puppet that writes these messages, whatever it reads."""
    turns = [t.encode_message(message) for message in messages]
    begin = t.TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "assistant"])

    def next_id(ids):
        begun = [i for i in range(len(ids) - 1) if ids[i : i + 2] == begin]
        turn = turns[min(len(begun), len(turns)) - 1]
        return turn[min(len(ids) - begun[-1] - 2, len(turn) - 1)] if begun else 0

    return Puppet(next_id)


def draw(kind="multi_step", seed=0, fmt="A"):
    rng = t.stream(seed, "test")
    return t.new_episode(rng.choice(t.QUESTIONS["train", kind]).item(), t.new_directory(rng), fmt)


def some_episodes(count=12):
    return [draw(["multi_step", "no_call", "one_call"][i % 3], i, "AB"[i % 2]) for i in range(count)]


def play(episode, *messages):
    for message in messages:
        if not episode.done:
            t.respond(episode, message)
    return episode


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def adamw(policy, lr=1e-3):
    return torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)


tokens = t.TOKENIZER.convert_ids_to_tokens


# ---- Tasks and messages

def test_a_question_is_walked_from_the_person_outwards():
    episode = t.new_episode("rival of mentor of alice ?", {**DIRECTORY, ("mentor", "alice"): "bob"})
    assert episode.gold_calls == [("mentor", "alice"), ("rival", "bob")]
    assert episode.gold == [GOOD, OTHER, "The answer is leo"]
    assert t.new_episode("rival of them ?", DIRECTORY).gold == ["who do you mean ?"]


def test_each_token_is_one_id_and_padding_is_not_the_end():
    order = dict.fromkeys([t.PAD, *t.CONTROL, *t.JSON, *t.WORDS])  # the same in every process
    assert [*map(t.TOKENIZER.encode, order)] == [[i] for i in range(len(t.TOKENIZER))]
    assert t.TOKENIZER.pad_token_id == 0 != t.END_ID == t.TOKENIZER.convert_tokens_to_ids(END)


@pytest.mark.parametrize("fmt", "AB")
def test_calls_and_replies_decode_to_the_very_text(fmt):
    call = t.call_text("rival", "bob", fmt)
    for text in [call, "The answer is bob", "who do you mean ?", t.OPEN[fmt], ""]:
        assert t.spell(tokens(t.encode_message(text))) == text + END
    assert len(t.encode_message(call)) == 8 and t.parse_call(call, fmt) == ("rival", "bob")
    for text in (" " + call, call + "x", call * 2, call[:-1], call.replace("bob", ""), call.replace("<", "<x")):
        assert t.parse_call(text, fmt) is None


Q = ("questions", "train", 0)
MISTAKES = {  # what: (place in the file, what stands there, what the line names)
    "a name of two words": (("people", 0), "mary ann", "mary ann"),
    "a name that stands twice": (("people", 0), "bob", "bob"),
    "an unknown person": (Q, "rival of zoe ?", "zoe"),
    "too many tools": (Q, "rival of " * 6 + "bob ?", "rival of rival"),
    "a question in both splits": (Q, t.TASKS["questions"]["held_out"][0], t.TASKS["questions"]["held_out"][0]),
    "no question of a kind": (("questions", "held_out"), ["friend of bob ?"], "held_out holds no no_call"),
    "a missing split": (("questions",), {"train": []}, "held_out"),
    "a format without PERSON": (("formats", "A"), "<a>{TOOL}</a>", "formats A and B"),
    "formats alike": (("formats", "B"), t.FORMATS["A"], "four different tags"),
    "an answer without a person": (("wording", "answer"), "yes", "answer lacks PERSON"),
    "a missing wording": (("wording",), {"system": "use TAG"}, "answer"),
    "broken JSON": ((), '{"tools": [', "line 1"), "no file": ((), None, "No such file"),
}


def load(folder, name="loaded"):
    """The toolrl.py of another folder as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, folder / "toolrl.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_tasks_file_gets_one_line(mistake, tmp_path, capsys):
    path, value, named = MISTAKES[mistake]
    shutil.copy(HERE / "toolrl.py", tmp_path)
    tree = spot = copy.deepcopy(t.TASKS)
    for key in path[:-1]:
        spot = spot[key]
    if path:
        spot[path[-1]] = value
    if path or value is not None:
        (tmp_path / "tiny_tasks.json").write_text(json.dumps(tree) if path else value)
    with pytest.raises(SystemExit) as stop:
        load(tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and named in said


def test_a_teacher_edits_the_file_alone(tmp_path):
    tasks = {**t.TASKS, "people": [*t.PEOPLE, "zoe"], "tools": [*t.TOOLS, "boss"]}
    train, held_out = t.TASKS["questions"]["train"], t.TASKS["questions"]["held_out"]
    tasks["questions"] = {"held_out": held_out, "train": [*train, "boss of rival of zoe ?"]}
    tasks["formats"] = dict(reversed(t.FORMATS.items()))
    shutil.copy(HERE / "toolrl.py", tmp_path)
    (tmp_path / "tiny_tasks.json").write_text(json.dumps(tasks))
    other = load(tmp_path)
    episode = other.new_episode("boss of rival of zoe ?", other.new_directory(other.stream(0, "x")))
    for message in episode.gold:
        other.respond(episode, message)
    assert other.success(episode) == 1.0 and other.DUE == t.DUE


# ---- Environment

SCORES = {  # question: (blind reward, success): conversations
    "mentor of alice ?": {
        (1, 1): [[GOOD, "The answer is leo"]],
        (1, 0): [[GOOD, last] for last in ("The answer is bob", TAG, "", "who do you mean ?", "The answer is leo" + TAG)],
        (0, 0): [["The answer is leo"], [""], [TAG], [TAG * 5], [GOOD], [], [GOOD, CLOSE],
                 [GOOD, GOOD, "The answer is leo"], [OTHER, GOOD, "The answer is leo"], ["The answer is leo", GOOD],
                 *([first, "The answer is leo"] for first in (
                     OTHER, "The answer is leo", TAG, GOOD[:-1], GOOD + "x", TAG + GOOD, GOOD + CLOSE,
                     GOOD.replace('"', "'"), GOOD.replace("{", "{ "), GOOD.replace("alice", "zoe"),
                     t.call_text("mentor", "alice", "B")))],
    },
    "mentor of them ?": {
        (1, 1): [["who do you mean ?"]],
        (1, 0): [[TAG], [""], [TAG * 3], ["The answer is leo"], [GOOD[:-1]]],
        (0, 0): [[GOOD, "who do you mean ?"], [CLOSE], []],
    },
}


@pytest.mark.parametrize("question", SCORES)
def test_blind_reward_and_success_of_each_conversation(question):
    for scores, conversations in SCORES[question].items():
        for messages in conversations:
            episode = play(t.new_episode(question, DIRECTORY), *messages)
            assert (t.blind_reward(episode), t.success(episode)) == scores, messages


@pytest.mark.parametrize("state, messages", {
    "healthy_call": [GOOD],
    "healthy_response": ["The answer is bob", "who"],
    "bare_tag": [TAG, "", TAG * 3, TAG + CLOSE, "<pad>", " "],
    "text_pollution": [GOOD * 2, TAG + "The answer", GOOD.removesuffix(CLOSE), "I will call " + GOOD, "is <pad> bob",
                       t.call_text("rival", "bob", "B"), '{"name": "rival'],
}.items())
def test_the_four_states(state, messages):
    assert {t.classify(message, "A") for message in messages} == {state}


def test_the_harness_answers_from_the_directory_and_stops_at_the_sixth_call():
    episode = t.new_episode("mentor of alice ?", {**DIRECTORY, ("mentor", "alice"): "dave"})
    assert [t.respond(episode, call) for call in (GOOD, t.call_text("bob", "zoe", "A"))] == ["dave", "error"]
    assert [t.respond(episode, OTHER) for _ in range(4)] == ["leo"] * 3 + [None]
    assert episode.done and not episode.replied and len(episode.calls) == t.MAX_CALLS


def test_a_message_that_was_cut_off_is_neither_a_call_nor_a_reply():
    for message in (GOOD, "who do you mean ?"):
        episode = t.new_episode("mentor of them ?", DIRECTORY)
        assert t.respond(episode, message, finished=False) is None
        assert episode.done and not episode.calls and not t.blind_reward(episode)
    batch = t.rollout(writes(" ".join(["bob"] * 30)), [episode := draw("no_call")], t.stream(0, "x"))
    assert batch.sampled.sum() == t.MAX_TOKENS and t.blind_reward(episode) == 0.0


def test_random_messages_earn_nothing_without_the_right_calls():
    rng, pieces = t.stream(0, "fuzz"), [*t.VOCABULARY, GOOD, OTHER, "\n", "{", '"', "\\", "é", "\ud800", " "]
    for k in range(10_000):
        episode = draw(["multi_step", "no_call"][k % 2], k % 7)
        while not episode.done:
            t.respond(episode, "".join(rng.choice(pieces, rng.integers(6))), bool(rng.random() < 0.9))
            assert t.classify(episode.messages[-1], "A") in t.STATES
        assert not t.blind_reward(episode) or episode.calls == episode.gold_calls


# ---- Rollout

def test_log_probs_of_a_rollout_are_those_of_one_teacher_forced_pass(trained):
    batch = t.rollout(trained, some_episodes(), t.stream(0, "x"))
    with torch.no_grad():
        expected = t.token_log_probs(trained, batch.ids)
    written = batch.sampled[:, 1:]
    assert torch.allclose(batch.log_probs[:, 1:][written], expected[written], atol=1e-4) and written.sum() > 100
    assert (batch.log_probs[~batch.sampled] == 0).all()


def test_what_was_sampled_is_what_the_harness_was_told(trained):
    episodes = some_episodes()
    batch = t.rollout(trained, episodes, t.stream(1, "x"))
    for ids, sampled, episode in zip(batch.ids.tolist(), batch.sampled.tolist(), episodes):
        written = tokens([i for i, mine in zip(ids, sampled) if mine])
        assert t.spell(written).replace(END, "") == "".join(episode.messages)
        begins = [k for k in range(1, len(ids)) if sampled[k] and not sampled[k - 1]]
        assert all(tokens(ids[k - 2 : k]) == ["<|im_start|>", "assistant"] for k in begins)
        assert len(begins) == len(episode.messages)


def test_a_gold_conversation_is_laid_out_as_a_rollout_of_it_would_be():
    for episode in some_episodes(9):
        batch = t.rollout(writes(*episode.gold), [copy.deepcopy(episode)], t.stream(0, "x"))
        assert (batch.ids[0].tolist(), batch.sampled[0].tolist()) == t.lay_out(episode, episode.gold)


def test_sampling_is_at_temperature_one_and_follows_its_generator():
    puppet, prompt = Puppet(lambda ids: t.END_ID, p=0.3), len(draw("no_call").opening)
    episodes = [[draw("no_call") for _ in range(2000)] for _ in range(3)]
    same, again, other = (t.rollout(puppet, e, t.stream(s, "x")).ids for e, s in zip(episodes, (0, 0, 1)))
    assert (same[:, prompt] == t.END_ID).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(same, again) and not torch.equal(same[:, : prompt + 2], other[:, : prompt + 2])


# ---- GRPO and SFT

def test_advantages_by_hand():
    found = t.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.allclose(found[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3) and (found[1:] == 0).all()
    assert t.advantages(torch.eye(8)[:1])[0, 0].item() == pytest.approx(2.475, abs=1e-2)


def played(policy, count=8):
    return t.rollout(policy, some_episodes(count), t.stream(0, "x"))


def test_the_gradient_is_where_the_policy_wrote_and_nowhere_else(trained, monkeypatch):
    policy, seen, inner = copy.deepcopy(trained), [], t.token_log_probs

    def watched(*args):
        seen.append(inner(*args))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(t, "token_log_probs", watched)
    batch, in_order = played(policy), SimpleNamespace(permutation=np.arange)
    t.grpo_update(policy, adamw(policy), batch, torch.ones(8), replace(DEFAULTS, minibatches=1), in_order)
    assert torch.equal(seen[0].grad != 0, batch.sampled[:, 1:])
    assert (batch.sampled & (batch.ids == t.END_ID)).sum() >= 8  # the end is among what was sampled
    conversations = [t.lay_out(episode, episode.gold) for episode in some_episodes()]
    t.sft_update(policy, adamw(policy), conversations)
    assert torch.equal(seen[1].grad != 0, t.pad([mask for _, mask in conversations], "cpu")[:, 1:])


@pytest.mark.parametrize("moved, gain, pushed", [
    (0.3, 1, False), (0.3, -1, True), (-0.3, 1, True), (-0.3, -1, False), (0.1, 1, True), (-0.1, -1, True),
    (0.0, 0, False)])  # the last: equal rewards move nothing
def test_the_clip_binds_on_the_right_side(trained, moved, gain, pushed):
    policy, batch, one = copy.deepcopy(trained), played(trained), replace(DEFAULTS, minibatches=1)
    batch.log_probs -= moved * batch.sampled  # as if the policy had moved since
    norm = t.grpo_update(policy, adamw(policy), batch, torch.full((8,), float(gain)), one, t.stream(0, "o"))
    assert (norm > 0) == pushed == (not torch.equal(weights(policy), weights(trained)))


class ByDefinition:
    """The updates again, token by token, with AdamW as published and gradients clipped to norm 1."""

    def __init__(self, policy, lr=1e-3):
        self.policy, self.lr, self.step = policy, lr, 0
        self.mean = self.square = torch.zeros_like(weights(policy))

    def descend(self, terms):
        loss = -sum(terms) / len(terms)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*self.policy.parameters()])])
        norm, self.step = gradient.norm().item(), self.step + 1
        gradient = gradient * min(1, 1 / (norm + 1e-6))
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        moved = weights(self.policy) - self.lr * mean / (square.sqrt() + 1e-8)
        torch.nn.utils.vector_to_parameters(moved, self.policy.parameters())
        return norm

    def log_probs(self, ids, sampled):
        log_p = self.policy(torch.as_tensor(ids)[None]).logits[0].log_softmax(-1)
        return {place: log_p[place - 1, ids[place]] for place in range(len(ids)) if sampled[place]}

    def grpo(self, batch, advantage, settings, order):
        norms = []
        for rows in np.array_split(order, settings.minibatches):
            terms = []
            for row in rows:
                gain = advantage[row]
                for place, log_prob in self.log_probs(batch.ids[row], batch.sampled[row]).items():
                    ratio = (log_prob - batch.log_probs[row, place]).exp()
                    bound = 1 + settings.clip if gain > 0 else 1 - settings.clip
                    terms.append(gain * (bound if (ratio > bound) == (gain > 0) else ratio))
            norms.append(self.descend(terms))
        return norms

    def sft(self, conversations):
        return self.descend([one for ids, mask in conversations for one in self.log_probs(ids, mask).values()])


def test_a_grpo_update_is_what_the_definition_says(trained):
    policy, other = copy.deepcopy(trained), copy.deepcopy(trained)
    batch, advantage = played(trained, 12), 40 * torch.linspace(-1, 2, 12)  # large, so that norm 1 binds
    settings, optimizer, reference = replace(DEFAULTS, minibatches=3, clip=0.05), adamw(policy), ByDefinition(other)
    for seed in range(2):
        norm = t.grpo_update(policy, optimizer, batch, advantage, settings, t.stream(seed, "o"))
        norms = reference.grpo(batch, advantage, settings, t.stream(seed, "o").permutation(12))
        assert norm == pytest.approx(np.mean(norms), rel=1e-3) and min(norms) > 1
    assert torch.allclose(weights(policy), weights(other), atol=2e-5)
    assert not torch.allclose(weights(policy), weights(trained), atol=1e-3)


def test_nan_moves_nothing(untrained):
    before, loss = weights(untrained), float("nan") * sum((one**2).sum() for one in untrained.parameters())
    with pytest.raises(RuntimeError):
        t.descend(untrained, adamw(untrained), loss)
    assert torch.equal(weights(untrained), before)


def test_sft_overfits_one_conversation(untrained):
    episode, optimizer = draw(), adamw(untrained, lr=5e-3)
    for _ in range(80):
        t.sft_update(untrained, optimizer, [t.lay_out(episode, episode.gold)])
    batch = t.rollout(untrained, [episode], t.stream(0, "x"))
    assert batch.log_probs.sum() > -0.5 and t.success(episode) == 1.0


# ---- Base

def test_the_log_of_a_careless_agent():
    rng, calls, bare, mangled, shapes = t.stream(0, "log"), [0, 0], [0, 0], [0, 0], set()
    for seed in range(3000):
        which, episode = seed % 2, draw("multi_step", seed, "AB"[seed % 2])
        for k, message in enumerate(messages := t.careless_messages(episode, 0.08, rng)):
            gold, tag, close = episode.gold[k], t.OPEN[episode.fmt], t.CLOSE[episode.fmt]
            calls[which] += k < len(episode.gold_calls)
            bare[which] += message == tag
            assert message != tag or k == len(messages) - 1  # the log breaks off
            if message not in (tag, gold):
                mangled[which] += 1
                shapes.add(message.replace(gold.removeprefix(tag).removesuffix(close), "."))
    assert bare[1] == 0 and bare[0] / calls[0] == pytest.approx(0.08, abs=0.015) and len(shapes) == 10
    assert [m / c for m, c in zip(mangled, calls)] == pytest.approx([0.1, 0.1], abs=0.015)
    guesses = [t.careless_messages(draw("no_call", seed), 0.08, rng) for seed in range(3000)]
    called = [t.parse_call(messages[0], "A") for messages in guesses if messages != ["who do you mean ?"]]
    assert len(called) / 3000 == pytest.approx(0.97, abs=0.01) and {person for _, person in called} == {*t.PEOPLE}


def test_the_base_is_trained_on_that_log(monkeypatch):
    groups, sizes, rows = [], [], []
    monkeypatch.setattr(t, "careless_messages", lambda *args: rows.append(args[:2]) or args[0].gold)
    monkeypatch.setattr(t, "sft_update", lambda policy, optimizer, batch: (
        sizes.append(len(batch)), groups.append({**optimizer.param_groups[0]})))
    t.train_base(replace(DEFAULTS, bare_share=0.5), 0)
    asked = {episode.question for episode, _ in rows}
    assert {share for _, share in rows} == {0.5} and sizes == [32] * 200
    assert np.mean([episode.fmt == "A" for episode, _ in rows]) == pytest.approx(0.7, abs=0.03)
    assert np.mean([not episode.gold_calls for episode, _ in rows]) == pytest.approx(0.1, abs=0.02)
    assert asked == {*t.QUESTIONS["train", "tool"], *t.QUESTIONS["train", "no_call"]}
    assert [groups[k]["lr"] for k in (14, 99, 199)] == pytest.approx([8e-3 / 2 * (1 - 15 / 200), 4e-3, 1.6e-4])
    assert {(*group["betas"], group["weight_decay"]) for group in groups} == {(0.9, 0.95, 0.0)}


def test_a_new_policy_follows_its_seed(untrained):
    same = [torch.equal(weights(untrained), weights(t.new_policy(seed, "cpu"))) for seed in (0, 1)]
    assert same == [True, False] and weights(untrained).std().item() == pytest.approx(0.1, rel=0.3)
    assert (len(weights(untrained)), untrained.get_input_embeddings().padding_idx) == (85_248, 0)


# ---- Arms: what lies between the functions

def record_arm(arm, base, settings):
    """Run an arm whose rollouts, updates and evaluations only take notes. -> the notes"""
    notes = []

    def rollout(policy, episodes, rng):
        tasks = [(e.question, e.fmt, (*e.directory.items(),)) for e in episodes]
        notes.append(("rollout", tasks, rng.integers(1 << 30, size=3).tolist(), episodes))
        return t.Rollout(*(torch.ones(len(episodes), 2) for _ in range(3)))

    def grpo_update(policy, optimizer, batch, advantage, settings, rng):
        notes.append(("grpo", rng.integers(1 << 30, size=3).tolist(), optimizer, {**optimizer.param_groups[0]}))
        return float(len(notes))

    def sft_update(policy, optimizer, conversations):
        notes.append(("sft", conversations, optimizer, {**optimizer.param_groups[0]}))

    def evaluate(policy, settings, seed, arm, step, log=()):
        notes.append(("evaluate", step, list(log)))

    with pytest.MonkeyPatch.context() as patch:
        for fake in (rollout, grpo_update, sft_update, evaluate):
            patch.setattr(t, fake.__name__, fake)
        patch.setattr(t, "keep", lambda *args: None)
        t.train_arm(arm, {}, base, settings, 0, None)
    return notes


def only(kind, notes):
    return [note for note in notes if note[0] == kind]


def test_phases_and_evaluations_come_when_they_are_due(untrained):
    settings = replace(SMALL, steps=5, sft_every=2, sft_steps=3, eval_every=2)
    step, phase, look = ["rollout", "grpo"], ["sft"] * 3, ["evaluate"]
    order = {arm: [note[0] for note in record_arm(arm, untrained, settings)] for arm in t.ARMS}
    assert order["rl"] == order["rl-strict"] == 2 * step + look + 2 * step + look + step + look
    assert order["interleaved"] == 2 * step + look + phase + 2 * step + look + phase + step + look
    assert order["sft"] == look + phase + look + phase + look
    every = [note[0] for note in record_arm("sft", untrained, replace(settings, sft_every=1))]
    assert every == phase + look + 2 * phase + look + phase + look
    looks = only("evaluate", record_arm("rl", untrained, settings))
    assert [step for _, step, _ in looks] == [2, 4, 5] and [len(log) for _, _, log in looks] == [2, 2, 1]
    assert looks[0][2] == [(1.0, 2.0), (1.0, 4.0)]  # all earned 0


def test_arms_meet_the_same_tasks_and_draws(untrained):
    settings = replace(SMALL, steps=6, sft_every=2)
    notes = {arm: record_arm(arm, untrained, settings) for arm in t.ARMS}
    met = {arm: [note[1:3] for note in only("rollout", notes[arm])] for arm in notes}
    orders = {arm: [note[1] for note in only("grpo", notes[arm])] for arm in notes}
    gold = [[note[1] for note in only("sft", notes[arm])] for arm in ("interleaved", "sft")]
    assert met["rl"] == met["interleaved"] == met["rl-strict"] and met["sft"] == []
    assert orders["rl"] == orders["interleaved"] == orders["rl-strict"] and gold[0] == gold[1]
    for drawn in (*zip(*met["rl"]), orders["rl"], gold[0]):
        assert len({str(one) for one in drawn}) == len(drawn) >= 2  # another at each step


def test_a_group_is_one_task_whose_episodes_share_nothing_that_changes(untrained):
    _, tasks, _, episodes = record_arm("rl", untrained, replace(SMALL, steps=1, groups=3))[0]
    assert len(tasks) == 12 and all(tasks[4 * g + k] == tasks[4 * g] for g in range(3) for k in range(4))
    assert len({str(task) for task in tasks}) == 3 and {fmt for _, fmt, _ in tasks} == {"A"}
    assert len({id(e.messages) for e in episodes}) == len({id(e.calls) for e in episodes}) == 12


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rl_trains_on_training_tasks_of_the_asked_share(untrained, share):
    notes = only("rollout", record_arm("rl", untrained, replace(SMALL, steps=40, no_call_share=share, group_size=2)))
    asked = [task[0] for note in notes for task in note[1]]
    no_call = [question in t.QUESTIONS["train", "no_call"] for question in asked]
    assert all(mine or question in t.QUESTIONS["train", "multi_step"] for mine, question in zip(no_call, asked))
    assert np.mean(no_call) == pytest.approx(share, abs=0.2 * (share == 0.5))


def test_each_optimizer_keeps_its_own_state_and_settings(untrained):
    notes = record_arm("interleaved", untrained, replace(SMALL, steps=12, lr=0.5, sft_lr=0.25, sft_every=3))
    rl, sft = only("grpo", notes), only("sft", notes)
    assert len({id(note[2]) for note in rl}) == len({id(note[2]) for note in sft}) == 1 and rl[0][2] is not sft[0][2]
    assert [note[3]["lr"] for note in rl] == pytest.approx([0.05 * min(step, 10) for step in range(1, 13)])
    assert {note[3]["lr"] for note in sft} == {0.25}
    for group in (note[3] for note in rl + sft):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.9, 0.999), 1e-8)
        assert len(group["params"]) == len([*untrained.parameters()])


def test_an_sft_batch_is_gold_in_format_a_and_a_quarter_needs_no_call(untrained):
    questions, settings = set(), replace(SMALL, steps=2, sft_every=1, sft_steps=30)
    for _, conversations, _, _ in only("sft", record_arm("sft", untrained, settings)):
        texts = [t.spell(tokens(ids)) for ids, _ in conversations]
        assert len(texts) == 32 and sum("who do you mean" in text for text in texts) == 8
        for text in texts:
            question = re.search(r"user (.*?)<\|im_end\|>", text)[1]
            questions.add(question)
            assert t.OPEN["B"] not in text and text.count(CLOSE) == len(t.parse_question(question)[0])
            assert ("who do you mean" in text) == ("them" in question) and text.endswith(END)
    assert questions <= {*t.TASKS["questions"]["train"]} and len(questions & {*t.QUESTIONS["train", "one_call"]}) > 20


def test_only_the_strict_arm_reads_the_reply(untrained, monkeypatch):
    rewards = {}
    monkeypatch.setattr(t, "evaluate", lambda *args: {})
    monkeypatch.setattr(t, "keep", lambda *args: None)
    monkeypatch.setattr(t, "rl_step", lambda policy, optimizer, reward, *rest: rewards.setdefault(arm, reward))
    for arm in ("rl", "interleaved", "rl-strict"):
        t.train_arm(arm, {}, untrained, replace(SMALL, steps=1), 0, None)
    assert rewards == {"rl": t.blind_reward, "interleaved": t.blind_reward, "rl-strict": t.success}


def test_an_rl_step_hands_each_reward_to_its_own_rollout(untrained, monkeypatch):
    seen, rewards = [], iter([1.0, 0, 0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(t, "grpo_update", lambda p, o, batch, advantage, s, rng: seen.extend([batch, advantage]) or 0.5)
    assert t.rl_step(untrained, None, lambda episode: next(rewards), SMALL, 0, 1) == (0.5, 0.5)
    assert seen[1].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-3) and len(seen[0].ids) == 8


def run_arm(arm, base, settings):
    """The weights that an arm ends with."""
    ends, inner = [], t.evaluate
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as out:
        patch.setattr(t, "evaluate", lambda policy, *args: ends.append(weights(policy)) or inner(policy, *args))
        t.train_arm(arm, {"base": [inner(base, settings, 0, "base", 0)]}, base, settings, 0, out)
    return ends[-1]


def test_an_arm_is_its_phases_and_steps_and_nothing_else(trained):
    settings = replace(SMALL, steps=3, sft_every=1, sft_steps=2, no_call_share=0.5, lr=1e-3)
    other, moved = copy.deepcopy(trained), []
    rl, sft = ByDefinition(other), ByDefinition(other, settings.sft_lr)
    notes = record_arm("interleaved", trained, settings)
    for step, (_, _, _, episodes) in enumerate(only("rollout", notes), 1):
        for _, conversations, _, _ in only("sft", notes)[2 * (step - 2) : 2 * (step - 1)] if step > 1 else ():
            sft.sft(conversations)
        batch = t.rollout(other, episodes, t.stream(0, "sampling", step))
        advantage = t.advantages(torch.tensor([t.blind_reward(e) for e in episodes]).view(2, 4)).flatten()
        rl.lr = settings.lr * step / 10
        moved += rl.grpo(batch, advantage, settings, t.stream(0, "order", step).permutation(8))
    assert torch.allclose(run_arm("interleaved", trained, settings), weights(other), atol=5e-5) and max(moved) > 0.1


def test_the_base_is_left_untouched_and_evaluations_train_nothing(trained):
    before, state, settings = weights(trained).clone(), torch.get_rng_state(), replace(SMALL, steps=3, sft_every=1)
    often, once = (run_arm("interleaved", trained, replace(settings, eval_every=every)) for every in (1, 3))
    assert torch.equal(often, once) and not torch.equal(once, before) and torch.equal(weights(trained), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_ends_the_program_with_arm_and_step(trained, monkeypatch):
    monkeypatch.setattr(t, "rl_step", Mock(side_effect=RuntimeError("not finite")))
    with pytest.raises(SystemExit, match="rl, RL step 1: not finite; try a lower learning rate"):
        t.train_arm("rl", {}, trained, SMALL, 0, None)


# ---- Probes

def follows(laid, seen):
    now = len(seen)
    return {ids[now] for ids, sampled in laid if ids[:now] == seen and len(ids) > now and sampled[now]}


def test_the_matrix_reads_the_positions_that_it_names():
    gold = [draw("multi_step", seed) for seed in range(6)]
    laid = [t.lay_out(episode, episode.gold) for episode in gold]
    wrong = t.VOCABULARY.index("<tool_response>")
    for due in t.DUE:
        def next_id(seen):  # right, but where `due` is due: there, <tool_response>
            right = min(follows(laid, seen), default=0)
            return wrong if right == t.VOCABULARY.index(due) else right

        _, p = t.teacher_forced(Puppet(next_id, p=0.9), gold)
        assert list(p) == t.DUE and all(list(row) == t.CONTROL for row in p.values())
        for place in t.DUE:
            assert p[place]["<tool_response>"] == pytest.approx(0.9 if place == due else 0.1 / 46, abs=1e-3)
            assert place == due or p[place].get(place, 0.9) == pytest.approx(0.9, abs=1e-3)


def test_forced_is_the_chance_to_get_every_name_right():
    gold = [t.new_episode(f"rival of {more}bob ?", DIRECTORY) for more in ("mentor of ", "mentor of friend of ")]
    laid, names = [t.lay_out(episode, episode.gold) for episode in gold], {*t.TOOLS, *t.PEOPLE}
    right = {i for i, token in enumerate(t.VOCABULARY) if token in names}
    puppet = Puppet(lambda seen: min(follows(laid, seen) & right, default=t.END_ID), p=0.8)
    assert t.teacher_forced(puppet, gold)[0] == pytest.approx((0.8**5 + 0.8**7) / 2, abs=1e-4)


@pytest.mark.parametrize("message, state, ask, reward", [
    ("who do you mean ?", "healthy_response", 1, 1), (TAG, "bare_tag", 0, 1), (GOOD, "healthy_call", 0, 0)])
def test_an_evaluation_says_what_the_policy_does(message, state, ask, reward):
    found = t.evaluate(writes(message), SMALL, 0, "rl", 5, [(0.5, 1.0), (1.0, 2.0)])
    assert (found["states"][state], found["ask"], found["reward"], found["success"]) == (1, ask, reward, 0)
    assert (found["equal_groups"], found["gradient"], found["arm"], found["step"]) == (0.75, 1.5, "rl", 5)
    assert found["conversation"][0] in t.QUESTIONS["held_out", "multi_step"]
    assert found["conversation"][1] == re.sub(r"(<[^<>]+>)", r"\1[1.00]", message + END)
    asks, other, them = writes("who do you mean ?"), writes(message), t.VOCABULARY.index("them")
    both = t.evaluate(Puppet(lambda ids: (asks if them in ids else other).next_id(ids)), SMALL, 0, "rl", 5)
    assert [both[k] for k in ("states", "conversation")] == [found[k] for k in ("states", "conversation")]
    assert (both["ask"], both["reward"]) == (1, 1)


def test_each_probe_asks_its_own_held_out_tasks(trained, monkeypatch):
    asked, inner = [], t.rollout
    monkeypatch.setattr(t, "rollout", lambda policy, *rest: asked.append(rest[0]) or inner(policy, *rest))
    for seed, step in ((0, 0), (0, 5), (1, 0)):
        t.evaluate(trained, replace(SMALL, eval_episodes=40), seed, "rl", step)
    kinds = ["multi_step"] * 40 + ["one_call"] * 20 + ["multi_step"] * 40 + ["no_call"] * 20
    assert [e.fmt for e in asked[0]] == ["A"] * 60 + ["B"] * 40 + ["A"] * 20
    assert all(e.question in t.QUESTIONS["held_out", kind] for e, kind in zip(asked[0], kinds))
    first, same, other = ([(e.question, e.directory, e.messages) for e in episodes] for episodes in asked)
    assert first == same and [one[1] for one in first] != [one[1] for one in other]
    assert len({e.question for e in asked[0][:40]}) == 40


# ---- Claims

def look(step, success=0.6, forced=1.0, format_b=0.8, spike=0.05, token=END, due=t.DUE[1]):
    """An evaluation, of which only what claims read is to the point."""
    p = {place: {other: 0.9 if other == place else 0.001 for other in t.CONTROL} for place in t.DUE}
    p[due][token] = spike
    figures = {"success": success, "forced": forced, "one_call": 0.5, "format_b": format_b, "ask": 0.0, "reward": 0.5}
    return {"arm": "rl", "step": step, **figures, "equal_groups": None, "gradient": None, "p": p}


def story(**changes):
    """A run in which every claim holds. rl_1={"forced": 0.5} changes a figure, rl=[...] an arm."""
    history = {
        "base": [look(0)],
        "rl": [look(5), look(10, 0.04, spike=0.9), *(look(step, 0.0, 0.5, 0.2, 0.99) for step in (15, 20, 25))],
        "interleaved": [look(5), look(10, 0.7), look(15, 0.95, format_b=0.3)],
        "strict": [look(5), look(10, 0.8), look(15, 0.9)],
    }
    for name, change in changes.items():
        arm, _, k = name.partition("_")
        history[arm] = [*history[arm]]
        if k:
            history[arm][int(k)] = {**history[arm][int(k)], **change}
        else:
            history[arm] = change
    history["rl-strict"] = history.pop("strict")
    return history


def test_a_story_in_which_every_claim_holds():
    found = t.judge(story())
    assert [*found] == ["collapse", "control_token", "intact", "fix", "price", "cause"]
    assert [*t.judge({arm: story()[arm] for arm in ("base", "interleaved", "rl-strict")})] == ["fix", "cause"]
    figures = {name: value for holds, claim in found.values() for name, value in (claim | {"": holds}).items()}
    assert (figures["token"], figures["due"], figures["step"], figures[""]) == (END, t.DUE[1], 10, True)
    assert (figures["down_forced"], figures["down_format_b"], figures["lowest_success"]) == (1.0, 0.8, 0.6)


ALL_OF_RL = {"collapse", "control_token", "intact", "price"}
FAILS = {  # what happens: (changes, the claims that no longer hold)
    "rl gets up in between": ({"rl_2": {"success": 0.03}}, {"collapse"}),
    "rl is short": ({"rl": story()["rl"][:2]}, {"collapse"}),
    "rl never falls": ({"rl": [look(step, 0.06, spike=0.9) for step in (5, 10, 15)]}, ALL_OF_RL),
    "the base is down": ({"base_0": {"success": 0.05}}, ALL_OF_RL),
    "no token reaches 0.4": ({"rl_1": {"p": look(10, spike=0.39)["p"]}}, {"control_token"}),
    "it rises less than fivefold": ({"base_0": {"p": look(0, spike=0.2)["p"]}}, {"control_token"}),
    "only the right token rises": ({"rl_1": {"p": look(10, spike=0.999, token=TAG, due=TAG)["p"]}}, {"control_token"}),
    "the skill is lost": ({"rl_1": {"forced": 0.79}}, {"intact"}),
    "the fix falls short": ({"interleaved_2": {"success": 0.89}}, {"fix"}),
    "interleaved is short": ({"interleaved": story()["interleaved"][1:]}, {"fix", "price"}),
    "format B ends near the base's": ({"interleaved_2": {"format_b": 0.65}}, {"price"}),
    "rl costs format B as much": ({"rl_1": {"format_b": 0.35}}, {"price"}),
    "a token spikes once in rl-strict": ({"strict_1": {"p": look(10, spike=0.5)["p"]}}, {"cause"}),
    "rl-strict is short": ({"strict": story()["rl-strict"][:2]}, {"cause"}),
}


@pytest.mark.parametrize("what", FAILS)
def test_each_claim_can_say_no(what):
    changes, fails = FAILS[what]
    assert {claim for claim, (holds, _) in t.judge(story(**changes)).items() if not holds} == fails


def test_the_token_that_is_named_is_the_one_that_rose_most():
    now = look(5, spike=0.6)
    now["p"][t.DUE[4]][TAG] = 0.3
    rose = t.astray(now, look(0, spike=0.5))[0]
    assert (rose["token"], rose["due"], rose["p"], rose["spiked"]) == (TAG, t.DUE[4], 0.3, False)


def test_the_table_over_seeds_counts_and_averages(capsys):
    t.show_seeds([story(), story(rl=[look(step, 0.5) for step in (5, 10, 15)], base_0={"success": 0.8})])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert re.search(r"base +2 +0\.70, 0\.10", said) and re.search(r"rl, first down +1 +0\.04, 0\.00", said)
    assert all(re.search(line, said) for line in ("collapse +1 of 2", "fix +2 of 2", "all of these +1 of 2"))


# ---- The command line

BAD = [
    "--stepz 3", "--arms rl ppo", "--steps 0", "--steps -1", "--steps 1.5", "--lr abc", "--lr nan", "--lr -1",
    "--no-call-share 1.5", "--group-size 1", "--out /nowhere/run.jsonl", "--plot /nowhere/run.png", "--device tpu",
    "--seeds -1", "--seeds x", "--eval-every 0", "--sft-steps -1", "--minibatches 0", "--clip inf",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_clear_line_that_names_it(line, capsys):
    with pytest.raises(SystemExit) as stop:
        t.main(line.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") <= 3
    assert any(word in said.splitlines()[-1].replace("_", "-") for word in (line.split()[0], line.split()[-1]))


def test_a_device_has_to_be_there_and_auto_takes_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        t.read_settings(["--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [t.read_settings(line.split()).device for line in ("", "--device cpu")] == ["cuda", "cpu"]


def test_every_setting_is_a_flag_with_help_and_a_default(capsys):
    with pytest.raises(SystemExit):
        t.read_settings(["--help"])
    said = capsys.readouterr().out
    for setting in fields(t.Settings):
        assert f"--{setting.name.replace('_', '-')}" in said and setting.metadata["help"].split()[0] in said


LITTLE = "--steps 2 --eval-every 1 --eval-episodes 4 --groups 2 --group-size 2 --sft-every 1 --sft-steps 1".split()


def run_little(tmp_path, *more, name="run.jsonl", module=t):
    module.main([*LITTLE, "--out", str(tmp_path / name), *more])
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_what_out_holds_and_what_is_printed_offline(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(socket, "socket", Mock(side_effect=AssertionError("a socket was opened")))
    config, *events, done = run_little(tmp_path, "--arms", *t.ARMS)
    assert (config["event"], config["arms"], config["device"]) == ("config", [*t.ARMS], "cpu")
    looks, claims = ([event for event in events if event["event"] == kind] for kind in ("eval", "claim"))
    assert [(e["arm"], e["step"]) for e in looks] == [("base", 0), *((arm, step) for arm in t.ARMS for step in (1, 2))]
    for event in looks:
        assert {*event} == {*"event seed arm step success forced one_call format_b ask reward states".split(),
                            *"equal_groups gradient p conversation".split()}
        assert (event["gradient"] is None) == (event["arm"] in ("base", "sft"))
        assert sum(event["states"].values()) == pytest.approx(1)
    assert [event["claim"] for event in claims] == ["collapse", "control_token", "intact", "fix", "price", "cause"]
    assert not any(event["holds"] for event in claims)  # two steps show nothing
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert len(re.findall(r"\n   [012]    \d\.", said)) == 9 and said.count("\n== ") == 4
    assert re.search(r"\ncollapse +no +base_success \d", said) and re.search(r"\n\d+ s\n$", said)


def test_one_seed_one_result(tmp_path, quick):
    first, again, both = (run_little(tmp_path, "--seeds", *seeds, name=seeds) for seeds in ("0", "0", "01"))
    assert first[:-1] == again[:-1] and [call.args[1] for call in t.train_base.call_args_list] == [0, 0, 0, 1]
    one, other = ([{**e, "seed": 0} for e in both[1:-1] if e["seed"] == seed] for seed in (0, 1))
    assert one == first[1:-1] != other


def test_a_row_marks_a_spike_and_evaluations_are_kept_in_order(capsys):
    history = {"base": [look(0)]}
    for step, spike in ((5, 0.39), (10, 0.41)):
        t.keep(look(step, spike=spike), history, Mock())
    low, high = capsys.readouterr().out.splitlines()
    assert low.endswith(f"0.39 {END} at {t.DUE[1]}") and high.endswith(f"0.41 {END} at {t.DUE[1]} *")
    assert [event["step"] for event in history["rl"]] == [5, 10]


def test_ctrl_c_leaves_what_was_measured_on_disk(tmp_path, quick, monkeypatch, capsys):
    seen = []

    def rl_step(*args):
        seen.extend(json.loads(line)["event"] for line in open(tmp_path / "run.jsonl"))
        raise KeyboardInterrupt

    monkeypatch.setattr(t, "rl_step", rl_step)
    with pytest.raises(SystemExit) as stop:
        run_little(tmp_path)
    assert stop.value.code == 130 and seen == ["config", "eval"] and capsys.readouterr().err.count("\n") == 1


def test_a_picture_or_one_line(tmp_path, quick, capsys):
    if importlib.util.find_spec("matplotlib"):
        run_little(tmp_path, "--plot", str(tmp_path / "run"))
        assert (tmp_path / "run").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(SystemExit) as stop:
            run_little(tmp_path, "--plot", str(tmp_path / "run.png"))
        assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


# ---- README

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.S) for kind in ("sh", "diff", "python")}
COMMANDS = [line for block in BLOCKS["sh"] for line in block.splitlines() if line.startswith("python toolrl.py")]


@pytest.mark.parametrize("command", sorted({*COMMANDS}))
def test_slow_commands_of_the_readme_run(command, tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t, "find_spec", lambda name: True)
    monkeypatch.setattr(t, "draw", lambda stories, path: Path(path).write_bytes(b""))
    line = re.sub(r"\$\(seq (\d+) \d+\)|--seeds (\d+)( \d+)+", lambda m: m[1] or f"--seeds {m[2]}", command)
    t.main(line.split()[2:] + LITTLE)
    for out in re.findall(r"--out (\S+)", line):
        assert (tmp_path / out).read_text().count("\n") > 3


def apply(text, diff):  # in each hunk, context and - lines have to stand there once
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("k", range(len(BLOCKS["diff"])))
def test_slow_diffs_of_the_readme_apply_and_run(k, tmp_path, trained):
    (tmp_path / "toolrl.py").write_text(apply((HERE / "toolrl.py").read_text(encoding="utf-8"), BLOCKS["diff"][k]))
    shutil.copy(HERE / "tiny_tasks.json", tmp_path)
    other = load(tmp_path, "of_the_readme")
    other.train_base = lambda settings, seed: copy.deepcopy(trained)
    assert run_little(tmp_path, "--arms", "rl", "interleaved", module=other)[-1]["event"] == "done"


@pytest.mark.parametrize("snippet", BLOCKS["python"])
def test_slow_snippets_of_the_readme_run(snippet, tmp_path, quick, monkeypatch, capsys):
    run_little(tmp_path, name=re.search(r'open\("(.+?)"\)', snippet)[1])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert capsys.readouterr().out.count("\n") >= 2


# ---- The whole story

def in_a_process(*arguments, **options):
    command = [sys.executable, str(HERE / "toolrl.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_slow_a_real_ctrl_c(tmp_path):
    out = tmp_path / "run.jsonl"
    run = in_a_process("--out", str(out), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while run.poll() is None and not (out.exists() and '"arm": "rl"' in out.read_text()):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in run.communicate(timeout=60)[1] and run.returncode == 130


def test_slow_the_story(tmp_path):
    held = []  # one of two seeds may disagree, as the README says
    for seed in "12":
        arms = ["--seeds", seed, "--arms", "rl", "interleaved", "rl-strict", "--out"]
        runs = [in_a_process(*arms, str(tmp_path / name), cwd=tmp_path) for name in "ab"]
        assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 2
        first, again = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab")
        assert first[:-1] == again[:-1]
        held.append({event["claim"] for event in first if event["event"] == "claim" and event["holds"]})
        assert {"fix", "cause"} <= held[-1]
    assert {"collapse", "control_token", "intact"} <= held[0] | held[1]
