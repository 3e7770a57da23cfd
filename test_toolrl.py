"""Tests of toolrl: python -m pytest -q (a few minutes; -k "not slow" takes under one).

By behaviour: what a student could break without noticing (masks, settings and state of the optimizers, order, what one
function hands to the next), on policies that do what a test tells them to, and on one that was trained.
"""

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
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toolrl as t

HERE = Path(t.__file__).parent
DEFAULTS = replace(t.Settings(), device="cpu")
SMALL = replace(DEFAULTS, eval_episodes=4, groups=2, group_size=4, sft_steps=1)
END, TAG, CLOSE = t.END, t.OPEN["A"], t.CLOSE["A"]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained():
    """A base as every run begins with. Tests that train take a copy."""
    return t.train_base(DEFAULTS, 0)


@pytest.fixture
def untrained():
    return t.new_policy(0, "cpu")


@pytest.fixture
def quick(monkeypatch, trained):
    """Runs from the command line begin with the base that is there already."""
    monkeypatch.setattr(t, "train_base", lambda settings, seed: copy.deepcopy(trained))


class Puppet:
    """Writes what next_id(ids so far) says, with the probability that it says."""

    device = torch.device("cpu")

    def __init__(self, next_id, p=1 - 1e-6):
        self.next_id, self.p = next_id, p

    def __call__(self, ids, past_key_values=None, **_):
        cache = past_key_values or SimpleNamespace(ids=ids[:, :0])
        cache.batch_select_indices = lambda kept: setattr(cache, "ids", cache.ids[kept])
        start = cache.ids.shape[1]
        cache.ids = torch.cat([cache.ids, ids], 1)
        probs = torch.full((*ids.shape, len(t.TOKENIZER)), (1 - self.p) / (len(t.TOKENIZER) - 1))
        for row, seen in enumerate(cache.ids.tolist()):
            for place in range(ids.shape[1]):
                probs[row, place, self.next_id(seen[: start + place + 1])] = self.p
        return SimpleNamespace(logits=probs.log(), past_key_values=cache)


def writes(*messages):
    """A Puppet that writes these messages, one after another, whatever it reads."""
    turns = [t.encode_message(message) for message in messages]
    start, who = t.TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "assistant"])

    def next_id(ids):
        begun = [i for i in range(len(ids) - 1) if ids[i : i + 2] == [start, who]]
        turn = turns[min(len(begun), len(turns)) - 1]
        return turn[min(len(ids) - begun[-1] - 2, len(turn) - 1)] if begun else 0

    return Puppet(next_id)


def draw(kind="multi_step", seed=0, fmt="A", split="train"):
    rng = t.stream(seed, "test")
    return t.new_episode(rng.choice(t.QUESTIONS[split, kind]).item(), t.new_directory(rng), fmt)


def some_episodes(count=12):
    kinds = ["multi_step", "no_call", "one_call"]
    return [draw(kinds[i % 3], i, "AB"[i % 2]) for i in range(count)]


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def play(episode, *messages):
    for message in messages:
        if not episode.done:
            t.respond(episode, message)
    return episode


def adamw(policy, optimizer=None, **changes):
    return torch.optim.AdamW(policy.parameters(), **{"weight_decay": 0.0, "lr": 1e-3, **changes})


# ---- Tasks and messages


def test_a_question_is_read_from_the_person_outwards():
    assert t.parse_question("rival of mentor of alice ?") == (["mentor", "rival"], "alice")
    assert t.parse_question("rival of mentor of them ?") == ([], "them")


def test_kinds_follow_from_the_calls_and_splits_share_no_question():
    for (_, kind), questions in t.QUESTIONS.items():
        assert questions and all(len(t.parse_question(q)[0]) in t.KINDS[kind] for q in questions)
    train, held_out = (
        {q for (s, _), qs in t.QUESTIONS.items() if s == split for q in qs} for split in ("train", "held_out")
    )
    assert not train & held_out and len(train | held_out) == sum(len(qs) for qs in t.TASKS["questions"].values())


def test_gold_walks_the_directory():
    directory = {(tool, person): "leo" for tool in t.TOOLS for person in t.PEOPLE} | {("mentor", "alice"): "bob"}
    episode = t.new_episode("rival of mentor of alice ?", directory)
    assert episode.gold_calls == [("mentor", "alice"), ("rival", "bob")]
    assert episode.gold == [
        t.call_text("mentor", "alice", "A"),
        t.call_text("rival", "bob", "A"),
        "The answer is leo",
    ]
    assert t.new_episode("rival of them ?", directory).gold == ["who do you mean ?"]


def test_each_control_token_is_one_id_and_padding_is_not_the_end():
    ids = [t.TOKENIZER.encode(token, add_special_tokens=False) for token in [t.PAD, *t.CONTROL, *t.JSON, *t.WORDS]]
    assert all(len(one) == 1 for one in ids) and len(t.VOCABULARY) == len(t.TOKENIZER)
    assert t.TOKENIZER.pad_token_id == 0 != t.END_ID == t.TOKENIZER.convert_tokens_to_ids(END)


@pytest.mark.parametrize("fmt", "AB")
def test_calls_and_replies_decode_to_the_very_text(fmt):
    for text in [t.call_text("rival", "bob", fmt), "The answer is bob", "who do you mean ?", t.OPEN[fmt], ""]:
        ids = t.encode_message(text)
        assert ids[-1] == t.END_ID and t.spell(t.TOKENIZER.convert_ids_to_tokens(ids)) == text + END
    assert len(t.encode_message(t.call_text("rival", "bob", fmt))) == 8


def test_a_call_is_read_in_its_own_format_only():
    for fmt, other in ("AB", "BA"):
        text = t.call_text("rival", "bob", fmt)
        assert t.parse_call(text, fmt) == ("rival", "bob") and t.parse_call(text, other) is None
    for text in (" " + text, text + "x", text + text, text[:-1], text.replace("bob", ""), "rival bob"):
        assert t.parse_call(text, "B") is None


def test_the_system_message_names_the_format():
    for fmt in "AB":
        text = t.TOKENIZER.decode(draw(fmt=fmt).opening)
        assert t.OPEN[fmt] in text and text.endswith("assistant") and t.OPEN["BA"[fmt == "B"]] not in text


def broken(tasks, *path, value):
    tasks = copy.deepcopy(tasks)
    spot = tasks
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return tasks


Q = ("questions", "train", 0)
MISTAKES = {
    "a name of two words": (("people", 0), "mary ann", "mary ann"),
    "a name that stands twice": (("people", 0), "bob", "bob"),
    "nobody as a name": (("people", 0), "them", "them"),
    "a name that is no text": (("tools", 0), 7, "7|string"),
    "an unknown person": (Q, "rival of zoe ?", "zoe"),
    "an unknown tool": (Q, "enemy of bob ?", "enemy"),
    "no question mark": (Q, "rival of bob", "rival of bob"),
    "a person in the middle": (Q, "rival of bob of bob ?", "rival of bob of bob"),
    "too many tools": (Q, "rival of " * 6 + "bob ?", "rival of rival"),
    "a question in both splits": (Q, t.TASKS["questions"]["held_out"][0], t.TASKS["questions"]["held_out"][0]),
    "no question at all": (("questions", "train"), [], "train holds no"),
    "no question of a kind": (("questions", "held_out"), ["rival of bob ?"], "no_call|both splits"),
    "a missing split": (("questions",), {"train": []}, "held_out"),
    "a format without PERSON": (("formats", "A"), "<a>{TOOL}</a>", "formats A and B"),
    "a missing format": (("formats",), {"A": t.FORMATS["A"]}, "B"),
    "formats alike": (("formats", "B"), t.FORMATS["A"], "four different tags"),
    "an answer without a person": (("wording", "answer"), "yes", "answer lacks PERSON"),
    "a missing wording": (("wording",), {"system": "use TAG"}, "answer"),
    "people missing": (("people",), None, "NoneType|people"),
}


def load(folder, name="loaded"):
    """The toolrl.py of another folder as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, folder / "toolrl.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mistake", [*MISTAKES, "broken JSON", "no file", "a list"])
def test_a_mistake_in_the_tasks_file_gets_one_line_that_names_it(mistake, tmp_path, capsys):
    shutil.copy(HERE / "toolrl.py", tmp_path)
    if mistake in MISTAKES:
        path, value, named = MISTAKES[mistake]
        text = json.dumps(broken(t.TASKS, *path, value=value))
    else:
        text, named = {
            "broken JSON": ('{"tools": [', "line 1"),
            "a list": ("[]", "indices|attribute"),
            "no file": (None, "No such file"),
        }[mistake]
    if text is not None:
        (tmp_path / "tiny_tasks.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        load(tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search(named, said)


def test_a_teacher_adds_a_person_a_tool_and_a_question_in_the_file_alone(tmp_path, capsys):
    tasks = copy.deepcopy(t.TASKS)
    tasks["people"].append("zoe")
    tasks["tools"].append("boss")
    tasks["questions"]["train"].append("boss of rival of zoe ?")
    tasks["questions"] = dict(reversed(tasks["questions"].items()))
    tasks["formats"] = dict(reversed(tasks["formats"].items())) | {"C": "whatever"}
    shutil.copy(HERE / "toolrl.py", tmp_path)
    (tmp_path / "tiny_tasks.json").write_text(json.dumps(tasks))
    other = load(tmp_path)
    episode = other.new_episode("boss of rival of zoe ?", other.new_directory(other.stream(0, "x")))
    assert play(episode, *episode.gold).replied and other.success(episode) == 1.0
    assert other.DUE == t.DUE and len(other.TOOLS) == 5


# ---- Environment


GOOD, OTHER = t.call_text("mentor", "alice", "A"), t.call_text("rival", "bob", "A")
DIRECTORY = {(tool, person): "leo" for tool in t.TOOLS for person in t.PEOPLE}
SCORES = {  # question: messages | ..., where each row earns this (blind reward, success)
    "mentor of alice ?": {
        (1, 1): [[GOOD, "The answer is leo"]],
        (1, 0): [[GOOD, "The answer is bob"], [GOOD, TAG], [GOOD, ""], [GOOD, "who do you mean ?"],
                 [GOOD, "The answer is leo" + TAG]],
        (0, 0): [["The answer is leo"], [""], [TAG], [TAG * 5], [GOOD], [], [GOOD, CLOSE],
                 *([message, "The answer is leo"] for message in (
                     OTHER, "The answer is leo", GOOD[:-1], GOOD + "x", TAG + GOOD, GOOD + CLOSE, TAG,
                     GOOD.replace('"', "'"), GOOD.replace("{", "{ "), GOOD.replace("alice", "zoe"),
                     t.call_text("mentor", "alice", "B"))),
                 [GOOD, GOOD, "The answer is leo"], [OTHER, GOOD, "The answer is leo"],
                 ["The answer is leo", GOOD]],
    },
    "mentor of them ?": {
        (1, 1): [["who do you mean ?"]],
        (1, 0): [[TAG], [""], [TAG * 3], ["The answer is leo"], [GOOD[:-1]]],
        (0, 0): [[GOOD, "who do you mean ?"], [CLOSE], []],
    },
}


@pytest.mark.parametrize("question", SCORES)
def test_scores(question):
    for scores, rows in SCORES[question].items():
        for messages in rows:
            episode = play(t.new_episode(question, DIRECTORY), *messages)
            assert (t.blind_reward(episode), t.success(episode)) == scores, messages


@pytest.mark.parametrize(
    "message, state",
    [
        (GOOD, "healthy_call"),
        ("The answer is bob", "healthy_response"),
        (TAG, "bare_tag"),
        ("", "bare_tag"),
        (TAG + CLOSE, "bare_tag"),
        (GOOD + GOOD, "text_pollution"),
        (TAG + "The answer", "text_pollution"),
        (GOOD.removesuffix(CLOSE), "text_pollution"),
        ("I will call " + GOOD, "text_pollution"),
        ("<pad>", "bare_tag"),
        (t.call_text("rival", "bob", "B"), "text_pollution"),
        ('{"name": "rival', "text_pollution"),
        ("is <pad> bob", "text_pollution"),
    ],
)
def test_states(message, state):
    assert t.classify(message, "A") == state


def test_the_harness_answers_from_the_directory_and_stops_at_the_sixth_call():
    episode = t.new_episode("mentor of alice ?", {**DIRECTORY, ("mentor", "alice"): "dave"})
    assert t.respond(episode, GOOD) == "dave" and t.respond(episode, t.call_text("bob", "zoe", "A")) == "error"
    assert [t.respond(episode, OTHER) for _ in range(4)] == ["leo"] * 3 + [None]
    assert episode.done and not episode.replied and len(episode.calls) == t.MAX_CALLS


def test_a_message_that_was_cut_off_is_neither_a_call_nor_a_reply():
    for message in (GOOD, "who do you mean ?"):
        episode = t.new_episode("mentor of them ?", DIRECTORY)
        assert t.respond(episode, message, finished=False) is None
        assert episode.done and not episode.calls and not t.blind_reward(episode)


def test_ten_thousand_random_messages_earn_nothing_without_the_right_calls():
    rng = t.stream(0, "fuzz")
    pieces = [*t.VOCABULARY, GOOD, OTHER, "\n", "{", '"', "\\", "é", "\ud800", " "]
    for k in range(10_000):
        episode = draw(["multi_step", "no_call"][k % 2], k % 7)
        while not episode.done:
            t.respond(episode, "".join(rng.choice(pieces, rng.integers(6))), bool(rng.random() < 0.9))
            assert t.classify(episode.messages[-1], "A") in t.STATES
        if t.blind_reward(episode):
            assert episode.calls == episode.gold_calls


# ---- Rollout


def test_log_probs_of_a_rollout_are_those_of_one_teacher_forced_pass(trained):
    batch = t.rollout(trained, some_episodes(), t.stream(0, "x"))
    with torch.no_grad():
        expected = t.token_log_probs(trained, batch.ids)
    written = batch.sampled[:, 1:]
    assert torch.allclose(batch.log_probs[:, 1:][written], expected[written], atol=1e-4)
    assert (batch.log_probs[~batch.sampled] == 0).all() and written.sum() > 100


def test_sampled_covers_what_the_assistant_wrote_and_nothing_else(trained):
    episodes = some_episodes()
    batch = t.rollout(trained, episodes, t.stream(1, "x"))
    for ids, sampled, episode in zip(batch.ids, batch.sampled, episodes):
        messages, writing, expected = [], False, []
        tokens = t.TOKENIZER.convert_ids_to_tokens(ids.tolist())
        for k, token in enumerate(tokens):
            expected.append(writing)
            if writing:
                messages[-1].append(token)
            if writing and (token == END or len(messages[-1]) == t.MAX_TOKENS):
                writing = False
            elif tokens[k - 1 : k + 1] == ["<|im_start|>", "assistant"] and not writing:
                writing = True
                messages.append([])
        messages = messages if messages[-1] else messages[:-1]
        assert sampled.tolist()[: sum(ids != 0)] == expected[: sum(ids != 0)]
        assert [t.spell(m[:-1] if m[-1] == END else m) for m in messages] == episode.messages


def test_a_gold_conversation_is_laid_out_as_a_rollout_of_it_would_be():
    for episode in some_episodes(9):
        batch = t.rollout(writes(*episode.gold), [copy.deepcopy(episode)], t.stream(0, "x"))
        ids, sampled = t.lay_out(episode, episode.gold)
        assert batch.ids[0].tolist() == ids and batch.sampled[0].tolist() == sampled


def test_a_message_without_an_end_is_cut_off():
    episode = draw("no_call")
    batch = t.rollout(writes(" ".join(["bob"] * 30)), [episode], t.stream(0, "x"))
    assert batch.sampled.sum() == t.MAX_TOKENS and t.blind_reward(episode) == 0.0


def test_sampling_is_at_temperature_one_and_follows_its_generator():
    puppet = Puppet(lambda ids: t.END_ID, p=0.3)
    first = [t.rollout(puppet, [draw("no_call") for _ in range(2000)], t.stream(s, "x")).ids for s in (0, 0, 1)]
    prompt = len(draw("no_call").opening)
    assert abs((first[0][:, prompt] == t.END_ID).float().mean() - 0.3) < 0.05
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0][:, : prompt + 2], first[2][:, : prompt + 2])


# ---- GRPO and SFT


def test_advantages_by_hand():
    found = t.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.allclose(found[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3) and (found[1:] == 0).all()
    assert t.advantages(torch.eye(8)[:1])[0, 0].item() == pytest.approx(2.475, abs=1e-2)


def played(policy, count=8, seed=0):
    return t.rollout(policy, some_episodes(count), t.stream(seed, "x"))


def test_the_gradient_is_where_the_policy_wrote_and_nowhere_else(trained, monkeypatch):
    policy, seen = copy.deepcopy(trained), []
    inner = t.token_log_probs

    def watched(*args):
        seen.append(inner(*args))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(t, "token_log_probs", watched)
    batch = played(policy)
    one = replace(DEFAULTS, minibatches=1)
    t.grpo_update(policy, adamw(policy), batch, torch.ones(8), one, SimpleNamespace(permutation=np.arange))
    assert torch.equal(seen[0].grad != 0, batch.sampled[:, 1:])
    assert (seen[0].grad[(batch.ids == t.END_ID)[:, 1:] & batch.sampled[:, 1:]] != 0).all()
    conversations = [t.lay_out(episode, episode.gold) for episode in some_episodes()]
    t.sft_update(policy, adamw(policy), conversations)
    assert torch.equal(seen[1].grad != 0, t.pad([mask for _, mask in conversations], "cpu")[:, 1:])


def test_equal_rewards_move_nothing(trained):
    policy = copy.deepcopy(trained)
    assert t.grpo_update(policy, adamw(policy), played(policy), torch.zeros(8), DEFAULTS, t.stream(0, "o")) == 0
    assert torch.equal(weights(policy), weights(trained))


@pytest.mark.parametrize(
    "moved, gain, pushed",
    [(0.3, 1, False), (0.3, -1, True), (-0.3, 1, True), (-0.3, -1, False), (0.1, 1, True), (-0.1, -1, True)],
)
def test_the_clip_binds_on_the_right_side(trained, moved, gain, pushed):
    policy, batch = copy.deepcopy(trained), played(trained)
    batch.log_probs -= moved * batch.sampled  # as if the policy had moved since
    norm = t.grpo_update(
        policy,
        adamw(policy),
        batch,
        torch.full((8,), float(gain)),
        replace(DEFAULTS, minibatches=1),
        t.stream(0, "o"),
    )
    assert (norm > 0) == pushed


class ByDefinition:
    """AdamW as published, without decay, on gradients clipped to norm 1."""

    def __init__(self, policy, lr):
        self.policy, self.lr, self.step = policy, lr, 0
        self.mean = self.square = torch.zeros_like(weights(policy))

    def descend(self, loss):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.policy.parameters()))])
        norm = gradient.norm().item()
        gradient, self.step = gradient * min(1, 1 / (norm + 1e-6)), self.step + 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        moved = weights(self.policy) - self.lr * mean / (square.sqrt() + 1e-8)
        torch.nn.utils.vector_to_parameters(moved, self.policy.parameters())
        return norm

    def grpo(self, batch, advantage, settings, order):
        norms = []
        for rows in np.array_split(order, settings.minibatches):
            terms = []
            for row in rows:
                log_p = self.policy(batch.ids[row : row + 1]).logits[0].log_softmax(-1)
                for place in batch.sampled[row].nonzero()[:, 0].tolist():
                    ratio = (log_p[place - 1, batch.ids[row, place]] - batch.log_probs[row, place]).exp()
                    gain = advantage[row]
                    bound = 1 + settings.clip if gain > 0 else 1 - settings.clip
                    beyond = ratio > bound if gain > 0 else ratio < bound
                    terms.append(bound * gain if beyond else ratio * gain)
            norms.append(self.descend(-sum(terms) / len(terms)))
        return norms

    def sft(self, conversations):
        terms = []
        for ids, sampled in conversations:
            log_p = self.policy(torch.tensor([ids])).logits[0].log_softmax(-1)
            terms += [log_p[place - 1, ids[place]] for place in range(len(ids)) if sampled[place]]
        return self.descend(-sum(terms) / len(terms))


def test_a_grpo_update_is_what_the_definition_says(trained):
    policy, other = copy.deepcopy(trained), copy.deepcopy(trained)
    batch, advantage = (played(trained, 12), 40 * torch.linspace(-1, 2, 12))  # large: the clip to norm 1 has to bind
    settings, optimizer, reference = (
        replace(DEFAULTS, minibatches=3, clip=0.05),
        adamw(policy),
        ByDefinition(other, 1e-3),
    )
    for seed in range(2):
        norm = t.grpo_update(policy, optimizer, batch, advantage, settings, t.stream(seed, "o"))
        norms = reference.grpo(batch, advantage, settings, t.stream(seed, "o").permutation(12))
        assert norm == pytest.approx(np.mean(norms), rel=1e-3) and min(norms) > 1
    assert torch.allclose(weights(policy), weights(other), atol=2e-5)
    assert not torch.allclose(weights(policy), weights(trained), atol=1e-3)


def test_an_sft_update_is_what_the_definition_says(trained):
    policy, other = copy.deepcopy(trained), copy.deepcopy(trained)
    optimizer, reference = adamw(policy), ByDefinition(other, 1e-3)
    for k in range(3):
        episodes = [draw("no_call", seed) if seed % 2 else draw("multi_step", seed) for seed in range(k, k + 6)]
        conversations = [t.lay_out(episode, [TAG, *episode.gold[1:]]) for episode in episodes]
        t.sft_update(policy, optimizer, conversations)
        reference.sft(conversations)
    assert torch.allclose(weights(policy), weights(other), atol=2e-5)


def test_a_step_is_down_the_gradient_and_at_most_one_long(untrained):
    before, optimizer = weights(untrained), torch.optim.SGD(untrained.parameters(), lr=1.0)
    for scale, length in ((1e3, 1.0), (1e-3, None)):
        loss = scale * sum((parameter**2).sum() for parameter in untrained.parameters())
        norm = t.descend(untrained, optimizer, loss)
        step = before - weights(untrained)
        assert step.norm().item() == pytest.approx(length or norm, rel=1e-3) and (step @ before) > 0
        before = weights(untrained)
    with pytest.raises(RuntimeError):
        t.descend(
            untrained, optimizer, loss=sum(parameter.sum() for parameter in untrained.parameters()) * float("nan")
        )
    assert torch.equal(weights(untrained), before)


def test_sft_overfits_one_conversation(untrained):
    episode, optimizer = draw("multi_step"), adamw(untrained, lr=5e-3)
    losses = [t.sft_update(untrained, optimizer, [t.lay_out(episode, episode.gold)]) for _ in range(80)]
    assert losses[0] > 2 and losses[-1] < 0.02
    t.rollout(untrained, [episode], t.stream(0, "x"))
    assert t.success(episode) == 1.0


# ---- Base


def test_the_log_of_a_careless_agent():
    rng, calls, bare, mangled = (t.stream(0, "log"), {"A": 0, "B": 0}, {"A": 0, "B": 0}, {"A": 0, "B": 0})
    shapes = set()
    for seed in range(3000):
        episode = draw("multi_step", seed, "AB"[seed % 2])
        messages = t.careless_messages(episode, 0.08, rng)
        for k, message in enumerate(messages):
            calls[episode.fmt] += k < len(episode.gold_calls)
            if message == t.OPEN[episode.fmt]:
                bare[episode.fmt] += 1
                assert k == len(messages) - 1  # the log breaks off
            elif message != episode.gold[k]:
                mangled[episode.fmt] += 1
                shapes.add(
                    message.replace(
                        episode.gold[k].removeprefix(t.OPEN[episode.fmt]).removesuffix(t.CLOSE[episode.fmt]), "."
                    )
                )
    assert bare["B"] == 0 and bare["A"] / calls["A"] == pytest.approx(0.08, abs=0.015)
    assert all(mangled[fmt] / calls[fmt] == pytest.approx(0.1, abs=0.015) for fmt in "AB") and len(shapes) == 10
    guesses = [t.careless_messages(draw("no_call", seed), 0.08, rng) for seed in range(3000)]
    called = [t.parse_call(messages[0], "A") for messages in guesses if messages != ["who do you mean ?"]]
    assert len(called) / 3000 == pytest.approx(0.97, abs=0.01) and {person for _, person in called} == set(t.PEOPLE)


def test_the_base_is_trained_on_that_log(monkeypatch):
    seen, rows = [], []
    monkeypatch.setattr(
        t, "careless_messages", lambda episode, share, rng: rows.append((episode, share)) or episode.gold
    )
    monkeypatch.setattr(
        t, "sft_update", lambda policy, optimizer, batch: seen.append((len(batch), {**optimizer.param_groups[0]}))
    )
    t.train_base(replace(DEFAULTS, bare_share=0.5), 0)
    episodes = [episode for episode, _ in rows]
    assert {share for _, share in rows} == {0.5} and [size for size, _ in seen] == [32] * 200
    assert np.mean([episode.fmt == "A" for episode in episodes]) == pytest.approx(0.7, abs=0.03)
    assert np.mean([not episode.gold_calls for episode in episodes]) == pytest.approx(0.1, abs=0.02)
    assert {episode.question for episode in episodes} <= {
        *t.QUESTIONS["train", "tool"],
        *t.QUESTIONS["train", "no_call"],
    }
    lrs = [group["lr"] for _, group in seen]
    assert (
        lrs[14] == pytest.approx(8e-3 / 2 * (1 - 15 / 200))
        and lrs[99] == pytest.approx(4e-3)
        and lrs[199] == pytest.approx(1.6e-4)
    )
    assert {(*group["betas"], group["weight_decay"]) for _, group in seen} == {(0.9, 0.95, 0.0)}


def test_the_base_has_the_skill_and_follows_its_seed(trained):
    event = t.evaluate(trained, DEFAULTS, 0, "base", 0)
    assert event["forced"] > 0.9 and 0.3 < event["success"] < 0.9 and event["ask"] < 0.1 and event["format_b"] > 0.4
    assert not torch.equal(weights(t.new_policy(0, "cpu")), weights(t.new_policy(1, "cpu")))
    assert torch.equal(weights(t.new_policy(0, "cpu")), weights(t.new_policy(0, "cpu")))


# ---- Arms: what lies between the functions


def record_arm(monkeypatch, arm, base, settings, history=None):
    """Run an arm with rollouts, updates and evaluations that only take notes. -> the notes, in order"""
    notes = []
    draws = lambda rng: rng.integers(1 << 30, size=3).tolist()

    def rollout(policy, episodes, rng):
        notes.append(
            ("rollout", [(e.question, e.fmt, tuple(e.directory.items())) for e in episodes], draws(rng), episodes)
        )
        for episode in episodes:
            episode.done = True
        return t.Rollout(*(torch.ones(len(episodes), 2) for _ in range(3)))

    def grpo_update(policy, optimizer, batch, advantage, settings, rng):
        notes.append(("grpo", optimizer, {**optimizer.param_groups[0]}, draws(rng), advantage))
        return float(len(notes))

    def sft_update(policy, optimizer, conversations):
        notes.append(("sft", optimizer, {**optimizer.param_groups[0]}, conversations))

    def evaluate(policy, settings, seed, arm, step, log=()):
        notes.append(("evaluate", step, list(log)))
        return {"arm": arm, "step": step}

    for name, fake in list(locals().items()):
        if name in ("rollout", "grpo_update", "sft_update", "evaluate"):
            monkeypatch.setattr(t, name, fake)
    monkeypatch.setattr(t, "keep", lambda event, history, out: None)
    t.train_arm(arm, {}, base, settings, 0, None)
    monkeypatch.undo()
    return notes


def kinds_of(notes):
    return [note[0] for note in notes]


def test_phases_come_when_they_are_due(monkeypatch, untrained):
    settings = replace(SMALL, steps=5, sft_every=2, sft_steps=3, eval_every=2)
    step, phase, look = ["rollout", "grpo"], ["sft"] * 3, ["evaluate"]
    order = {arm: kinds_of(record_arm(monkeypatch, arm, untrained, settings)) for arm in t.ARMS}
    assert order["rl"] == order["rl-strict"] == 2 * step + look + 2 * step + look + step + look
    assert order["interleaved"] == 2 * step + look + phase + 2 * step + look + phase + step + look
    assert order["sft"] == look + phase + look + phase + look
    every = kinds_of(record_arm(monkeypatch, "sft", untrained, replace(settings, sft_every=1)))
    assert every == phase + look + 2 * phase + look + phase + look


def test_evaluations_come_when_they_are_due_with_the_log_since_the_last(monkeypatch, untrained):
    notes = record_arm(monkeypatch, "rl", untrained, replace(SMALL, steps=5, eval_every=2))
    looks = [note[1:] for note in notes if note[0] == "evaluate"]
    assert [step for step, _ in looks] == [2, 4, 5] and [len(log) for _, log in looks] == [2, 2, 1]
    assert looks[0][1] == [(1.0, 2.0), (1.0, 4.0)]  # nobody earned anything: all groups equal


def test_arms_meet_the_same_tasks_and_draws(monkeypatch, untrained):
    settings = replace(SMALL, steps=4, sft_every=2)
    met = {
        arm: [note[:3] for note in record_arm(monkeypatch, arm, untrained, settings) if note[0] == "rollout"]
        for arm in ("rl", "interleaved", "rl-strict")
    }
    orders = {
        arm: [note[3] for note in record_arm(monkeypatch, arm, untrained, settings) if note[0] == "grpo"]
        for arm in met
    }
    gold = {
        arm: [note[3] for note in record_arm(monkeypatch, arm, untrained, settings) if note[0] == "sft"]
        for arm in ("interleaved", "sft")
    }
    assert (
        met["rl"] == met["interleaved"] == met["rl-strict"]
        and orders["rl"] == orders["interleaved"] == orders["rl-strict"]
    )
    assert gold["interleaved"] == gold["sft"] and len(gold["sft"]) == 1
    steps = [str(tasks) for _, tasks, _ in met["rl"]]
    assert len({*steps}) == 4 and len({str(draws) for _, _, draws in met["rl"]}) == 4  # another stream at each step


def test_a_group_is_one_task_and_its_episodes_share_nothing_that_changes(monkeypatch, untrained):
    notes = record_arm(monkeypatch, "rl", untrained, replace(SMALL, steps=1, groups=3, group_size=4))
    tasks, episodes = notes[0][1], notes[0][3]
    assert len(tasks) == 12 and all(tasks[4 * g] == tasks[4 * g + k] for g in range(3) for k in range(4))
    assert len({str(task) for task in tasks}) == 3 and {fmt for _, fmt, _ in tasks} == {"A"}
    assert len({id(e.messages) for e in episodes}) == len({id(e.calls) for e in episodes}) == 12


@pytest.mark.parametrize(
    "share, kinds", [(0.0, {"multi_step"}), (1.0, {"no_call"}), (0.5, {"multi_step", "no_call"})]
)
def test_rl_trains_on_training_tasks_of_the_asked_share(monkeypatch, untrained, share, kinds):
    notes = record_arm(monkeypatch, "rl", untrained, replace(SMALL, steps=40, no_call_share=share, group_size=2))
    asked = [task[0] for note in notes if note[0] == "rollout" for task in note[1]]
    found = [
        next(kind for kind in ("multi_step", "no_call") if question in t.QUESTIONS["train", kind])
        for question in asked
    ]
    assert {*found} == kinds and (share != 0.5 or 0.3 < np.mean([kind == "no_call" for kind in found]) < 0.7)


def test_each_optimizer_keeps_its_own_state_and_settings(monkeypatch, untrained):
    settings = replace(SMALL, steps=12, lr=0.5, sft_lr=0.25, sft_every=3)
    notes = record_arm(monkeypatch, "interleaved", untrained, settings)
    rl, sft = ([note for note in notes if note[0] == name] for name in ("grpo", "sft"))
    assert len({id(note[1]) for note in rl}) == len({id(note[1]) for note in sft}) == 1 and rl[0][1] is not sft[0][1]
    assert [note[2]["lr"] for note in rl] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5, 0.5]
    )
    assert {note[2]["lr"] for note in sft} == {0.25}
    for note in rl + sft:
        assert note[2]["weight_decay"] == 0 and note[2]["betas"] == (0.9, 0.999) and note[2]["eps"] == 1e-8
        assert len(note[2]["params"]) == len(list(untrained.parameters()))


def test_a_quarter_of_an_sft_batch_needs_no_call_and_all_is_gold(monkeypatch, untrained):
    notes = record_arm(monkeypatch, "sft", untrained, replace(SMALL, steps=2, sft_every=1, sft_steps=30))
    questions = []
    for _, _, _, conversations in notes[1:-1]:
        for ids, _ in conversations:
            text = t.spell(t.TOKENIZER.convert_ids_to_tokens(ids))
            questions.append(re.search(r"user (.*?)<\|im_end\|>", text)[1])
            assert (
                t.OPEN["B"] not in text
                and text.endswith(END)
                and ("who do you mean" in text) == ("them" in questions[-1])
            )
            assert text.count(CLOSE) == len(t.parse_question(questions[-1])[0])
        assert len(conversations) == 32
    found = {question: [kind for kind in t.KINDS if question in t.QUESTIONS["train", kind]] for question in questions}
    assert all(found.values()) and np.mean(["no_call" in found[q] for q in questions]) == 0.25
    assert len({*questions} & {*t.QUESTIONS["train", "one_call"]}) > 20


def test_only_the_strict_arm_reads_the_reply(monkeypatch, untrained):
    seen = {}
    monkeypatch.setattr(t, "evaluate", lambda *args: {})
    monkeypatch.setattr(t, "keep", lambda *args: None)
    monkeypatch.setattr(
        t, "rl_step", lambda policy, optimizer, reward, *rest: seen.setdefault(arm, reward) and (0, 0)
    )
    for arm in ("rl", "interleaved", "rl-strict"):
        t.train_arm(arm, {}, untrained, replace(SMALL, steps=1), 0, None)
    assert seen == {"rl": t.blind_reward, "interleaved": t.blind_reward, "rl-strict": t.success}


def test_an_rl_step_hands_each_reward_to_its_own_rollout(monkeypatch, untrained):
    rewards, seen = [1.0, 0, 0, 0, 1, 1, 1, 1], []
    monkeypatch.setattr(
        t, "grpo_update", lambda p, o, batch, advantage, s, rng: seen.append((batch, advantage)) or 0.5
    )
    found = t.rl_step(untrained, None, lambda episode, left=list(rewards): left.pop(0), SMALL, 0, 1)
    assert found == (0.5, 0.5) and torch.allclose(
        seen[0][1], torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]), atol=1e-3
    )
    assert len(seen[0][0].ids) == 8


def run_arm(arm, base, settings, monkeypatch):
    """The policy that an arm ends with."""
    ends, inner = [], t.evaluate
    monkeypatch.setattr(t, "evaluate", lambda policy, *args: ends.append(policy) or inner(policy, *args))
    with open(os.devnull, "w") as out:
        t.train_arm(arm, {"base": [inner(base, settings, 0, "base", 0)]}, base, settings, 0, out)
    monkeypatch.undo()
    return ends[-1]


def test_an_arm_is_its_phases_and_steps_and_nothing_else(trained, monkeypatch):
    settings = replace(SMALL, steps=3, sft_every=1, sft_steps=2, no_call_share=0.5, lr=1e-3, eval_every=2)
    policy = run_arm("interleaved", trained, settings, monkeypatch)
    other = copy.deepcopy(trained)
    rl, sft = ByDefinition(other, 0), ByDefinition(other, settings.sft_lr)
    for step in (1, 2, 3):
        notes = record_arm(monkeypatch, "interleaved", trained, replace(settings, steps=step, eval_every=9))
        for note in [note for note in notes if note[0] == "sft"][2 * (step - 2) :] if step > 1 else ():
            sft.sft(note[3])
        rl.lr = settings.lr * step / 10
        episodes = [note[3] for note in notes if note[0] == "rollout"][-1]
        for episode in episodes:
            episode.done = False
        batch = t.rollout(other, episodes, t.stream(0, "sampling", step))
        advantage = t.advantages(torch.tensor([t.blind_reward(e) for e in episodes]).view(2, 4)).flatten()
        if advantage.abs().sum():
            rl.grpo(batch, advantage, settings, t.stream(0, "order", step).permutation(8))
        else:
            pytest.fail("this step has no gradient; choose other settings")
    assert torch.allclose(weights(policy), weights(other), atol=5e-5)


def test_the_base_is_left_untouched_and_evaluations_train_nothing(trained, monkeypatch):
    before = weights(trained).clone()
    settings, state = replace(SMALL, steps=3, sft_every=1), torch.get_rng_state()
    ends = [
        weights(run_arm("interleaved", trained, replace(settings, eval_every=every), monkeypatch)) for every in (1, 3)
    ]
    assert (
        torch.equal(ends[0], ends[1]) and torch.equal(weights(trained), before) and not torch.equal(ends[0], before)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_ends_the_program_with_arm_and_step(trained, monkeypatch):
    monkeypatch.setattr(t, "rl_step", lambda *args: (_ for _ in ()).throw(RuntimeError("not finite")))
    with pytest.raises(SystemExit, match="rl, RL step 1: not finite; try a lower learning rate"):
        t.train_arm("rl", {}, trained, SMALL, 0, None)


@pytest.mark.parametrize("changes", [{"lr": 10.0}, {"sft_lr": 10.0}])
def test_a_learning_rate_that_is_far_too_high_ends_in_one_line_or_in_figures(trained, monkeypatch, changes):
    try:
        run_arm("interleaved", trained, replace(SMALL, steps=3, sft_every=1, **changes), monkeypatch)
    except SystemExit as stop:
        assert "try a lower learning rate" in str(stop.code)


# ---- Probes


def test_the_matrix_reads_the_positions_that_it_names():
    ids = dict(zip(t.VOCABULARY, range(len(t.VOCABULARY))))
    gold = [draw("multi_step", seed, split="held_out") for seed in range(6)]
    rows = [t.lay_out(episode, episode.gold)[0] for episode in gold]
    for due in t.DUE:

        def next_id(seen):  # right everywhere, but for the places where `due` is due: there, <tool_response>
            follow = {row[len(seen)] for row in rows if row[: len(seen)] == seen and len(row) > len(seen)}
            right = min(follow, default=0)
            return ids["<tool_response>"] if right == ids[due] else right

        _, p = t.teacher_forced(Puppet(next_id, p=0.9), gold)
        for place in t.DUE:
            assert p[place]["<tool_response>"] == pytest.approx(0.9 if place == due else 0.1 / 46, abs=1e-3)
            if place != due and place in t.CONTROL:
                assert p[place][place] == pytest.approx(0.9, abs=1e-3)
        assert list(p) == t.DUE and all(list(row) == t.CONTROL for row in p.values())


def test_forced_is_the_chance_to_get_every_name_right_whatever_the_format(trained):
    gold = [
        t.new_episode(question, DIRECTORY)
        for question in ("rival of mentor of alice ?", "rival of mentor of friend of bob ?")
    ]
    rows = [t.lay_out(episode, episode.gold)[0] for episode in gold]
    names = set(t.TOKENIZER.convert_tokens_to_ids(t.TOOLS + t.PEOPLE))

    def next_id(seen):  # names as they are due, an end for all else
        follow = {row[len(seen)] for row in rows if row[: len(seen)] == seen and len(row) > len(seen)}
        return min(follow & names, default=t.END_ID)

    forced, _ = t.teacher_forced(Puppet(next_id, p=0.8), gold)
    assert forced == pytest.approx((0.8**5 + 0.8**7) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("who do you mean ?", {"ask": 1, "reward": 1, "success": 0, "state": "healthy_response"}),
        (TAG, {"ask": 0, "reward": 1, "success": 0, "state": "bare_tag"}),
        (GOOD, {"ask": 0, "reward": 0, "success": 0, "state": "healthy_call"}),
    ],
)
def test_an_evaluation_says_what_the_policy_does(message, expected):
    event = t.evaluate(writes(message), SMALL, 0, "rl", 5, [(0.5, 1.0), (1.0, 2.0)])
    assert event["states"][expected.pop("state")] == 1 and {key: event[key] for key in expected} == expected
    assert (event["equal_groups"], event["gradient"], event["arm"], event["step"]) == (0.75, 1.5, "rl", 5)
    assert event["conversation"][0] in t.QUESTIONS["held_out", "multi_step"]
    marked = re.sub(r"(<[^<>]+>)", r"\1[1.00]", message + END)
    assert event["conversation"][1] == marked


def test_each_probe_asks_its_own_held_out_tasks(monkeypatch, trained):
    asked, inner = [], t.rollout
    monkeypatch.setattr(
        t, "rollout", lambda policy, episodes, rng: asked.append(episodes) or inner(policy, episodes, rng)
    )
    for seed, step in ((0, 0), (0, 5), (1, 0)):
        t.evaluate(trained, replace(SMALL, eval_episodes=8), seed, "rl", step)
    shapes = [
        (
            e.fmt,
            next(
                kind for kind in ("no_call", "one_call", "multi_step") if e.question in t.QUESTIONS["held_out", kind]
            ),
        )
        for e in asked[0]
    ]
    assert (
        shapes
        == [("A", "multi_step")] * 8 + [("A", "one_call")] * 4 + [("B", "multi_step")] * 8 + [("A", "no_call")] * 4
    )
    same, other = ([(e.question, e.directory) for e in episodes] for episodes in asked[1:])
    assert [(e.question, e.directory) for e in asked[0]] == same and [d for _, d in same] != [d for _, d in other]


# ---- Claims


def event(arm, step, success=0.6, forced=1.0, format_b=0.8, spike=0.05, token=END, due=None):
    p = {place: {token: 0.001 for token in t.CONTROL} for place in t.DUE}
    for place in t.DUE:
        p[place][place] = 0.9
    p[due or t.DUE[1]][token] = spike
    return {
        "event": "eval",
        "seed": 0,
        "arm": arm,
        "step": step,
        "success": success,
        "forced": forced,
        "one_call": 0.5,
        "format_b": format_b,
        "ask": 0.0,
        "reward": 0.5,
        "states": {},
        "equal_groups": None,
        "gradient": None,
        "p": p,
        "conversation": [],
    }


def story(**arms):
    """A history in which every claim holds; a keyword replaces an arm."""
    history = {
        "base": [event("base", 0)],
        "rl": [event("rl", 5), event("rl", 10, 0.04, spike=0.9)]
        + [event("rl", step, 0.0, 0.5, 0.2, 0.99) for step in (15, 20, 25)],
        "interleaved": [
            event("interleaved", 5),
            event("interleaved", 10, 0.7),
            event("interleaved", 15, 0.95, format_b=0.3),
        ],
        "rl-strict": [event("rl-strict", step, 0.8) for step in (5, 10, 15)],
    }
    return history | {name.replace("_", "-"): events for name, events in arms.items()}


def edited(arm, index, **changes):
    events = story()[arm]
    events[index] = {**events[index], **changes}
    return {arm.replace("-", "_"): events}


def test_a_story_in_which_every_claim_holds():
    found = t.judge(story())
    assert list(found) == ["collapse", "control_token", "intact", "fix", "price", "cause"] and all(
        holds for holds, _ in found.values()
    )
    figures = {name: value for _, claim in found.values() for name, value in claim.items()}
    assert (figures["token"], figures["due"], figures["step"]) == (END, t.DUE[1], 10)
    assert (figures["down_forced"], figures["down_format_b"], figures["lowest_success"]) == (1.0, 0.8, 0.6)


FAILS = {
    "rl gets up once": (edited("rl", -3, success=0.03), {"collapse"}),
    "rl ends a little up": (edited("rl", -1, success=0.03), {"collapse"}),
    "rl is short": ({"rl": story()["rl"][:2]}, {"collapse"}),
    "rl never falls": (
        {"rl": [event("rl", step, 0.06, spike=0.9) for step in (5, 10, 15)]},
        {"collapse", "control_token", "intact", "price"},
    ),
    "the base is down": ({"base": [event("base", 0, 0.05)]}, {"collapse", "control_token", "intact", "price"}),
    "no token reaches 0.4": (edited("rl", 1, p=event("rl", 10, spike=0.39)["p"]), {"control_token"}),
    "the token rose less than fivefold": ({"base": [event("base", 0, spike=0.2)]}, {"control_token"}),
    "only the right token rose": (
        edited("rl", 1, p=event("rl", 10, spike=0.999, token=t.DUE[0], due=t.DUE[0])["p"]),
        {"control_token"},
    ),
    "the skill is lost": (edited("rl", 1, forced=0.79), {"intact"}),
    "the fix falls short": (edited("interleaved", -1, success=0.89), {"fix"}),
    "interleaved is short": ({"interleaved": story()["interleaved"][-2:]}, {"fix", "price"}),
    "format B ends near the base's": (edited("interleaved", -1, format_b=0.65), {"price"}),
    "rl cost format B as much": (edited("rl", 1, format_b=0.35), {"price"}),
    "a token spikes once in rl-strict": (edited("rl-strict", 1, p=event("rl", 10, spike=0.5)["p"]), {"cause"}),
    "rl-strict is short": ({"rl_strict": story()["rl-strict"][:2]}, {"cause"}),
}


@pytest.mark.parametrize("what", FAILS)
def test_each_claim_can_say_no(what):
    arms, fails = FAILS[what]
    assert {claim for claim, (holds, _) in t.judge(story(**arms)).items() if not holds} == fails


def test_claims_of_arms_that_were_not_run_are_left_out():
    assert list(t.judge({"base": story()["base"], "sft": story()["interleaved"]})) == []
    assert list(t.judge({arm: story()[arm] for arm in ("base", "interleaved", "rl-strict")})) == ["fix", "cause"]


def test_the_cell_that_is_named_is_the_one_that_rose_most():
    base = event("base", 0, spike=0.5)
    now = event("rl", 5, spike=0.6)
    now["p"][t.DUE[4]][TAG] = 0.3
    rose = t.risen(now, base)
    assert (rose["token"], rose["due"], rose["p"], rose["spiked"]) == (TAG, t.DUE[4], 0.3, False)


def test_the_table_over_seeds_counts_and_averages(capsys):
    other = story(rl=[event("rl", step, 0.5) for step in (5, 10, 15)], base=[event("base", 0, 0.8)])
    t.show_seeds([story(), other])
    said = capsys.readouterr().out
    assert re.search(r"base +2 +0\.70, 0\.10", said) and re.search(r"rl, first down +1 +0\.04, 0\.00", said)
    assert "collapse      1 of 2" in said and "fix           2 of 2" in said and "all of these  1 of 2" in said


# ---- The command line


BAD = [
    "--stepz 3", "--arms rl ppo", "--steps 0", "--steps -1", "--steps 1.5", "--lr abc", "--lr nan",
    "--lr -1", "--no-call-share 1.5", "--group-size 1", "--out /nowhere/run.jsonl", "--device tpu",
    "--plot /nowhere/run.png", "--seeds -1", "--seeds x", "--eval-every 0", "--sft-steps -1",
    "--minibatches 0", "--clip inf",
]  # the last line of what is said names the first word or the last


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_clear_line(line, capsys):
    with pytest.raises(SystemExit) as stop:
        t.main(line.split())
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") <= 3 and not said.out
    assert any(word in said.err.splitlines()[-1].replace("_", "-") for word in line.split())


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        t.read_settings(["--device", "cuda"])
    assert "cuda: there is cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert t.read_settings([]).device == "cuda" and t.read_settings(["--device", "cpu"]).device == "cpu"


def test_every_setting_is_a_flag_with_help_and_a_default(capsys):
    with pytest.raises(SystemExit):
        t.read_settings(["--help"])
    said = capsys.readouterr().out
    for setting in fields(t.Settings):
        assert f"--{setting.name.replace('_', '-')}" in said and setting.metadata["help"].split()[0] in said
    assert t.read_settings(["--seeds", "3", "4", "--arms", "sft", "--sft-lr", "0.5"]).sft_lr == 0.5


LITTLE = "--steps 2 --eval-every 1 --eval-episodes 4 --groups 2 --group-size 2 --sft-every 1 --sft-steps 1".split()


def run_little(tmp_path, *more, name="run.jsonl"):
    t.main([*LITTLE, "--out", str(tmp_path / name), *more])
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_what_out_holds(tmp_path, quick):
    events = run_little(tmp_path, "--arms", *t.ARMS)
    config, done = events[0], events[-1]
    assert (
        config["event"] == "config"
        and config["arms"] == list(t.ARMS)
        and config["device"] == "cpu"
        and config["versions"][0] == f"torch {torch.__version__}"
    )
    assert done == {"event": "done", "seconds": done["seconds"]} and 0 < done["seconds"] < 60
    looks = [event for event in events if event["event"] == "eval"]
    assert [(event["arm"], event["step"]) for event in looks] == [("base", 0)] + [
        (arm, step) for arm in t.ARMS for step in (1, 2)
    ]
    for event in looks:
        assert {*event} == {
            "event",
            "seed",
            "arm",
            "step",
            "success",
            "forced",
            "one_call",
            "format_b",
            "ask",
            "reward",
            "states",
            "equal_groups",
            "gradient",
            "p",
            "conversation",
        }
        assert (event["gradient"] is None) == (event["arm"] in ("base", "sft")) and sum(
            event["states"].values()
        ) == pytest.approx(1)
    claims = [event for event in events if event["event"] == "claim"]
    assert [event["claim"] for event in claims] == ["collapse", "control_token", "intact", "fix", "price", "cause"]
    assert not any(event["holds"] for event in claims)  # two steps show nothing


def test_one_seed_one_result(tmp_path, quick):
    first, again = (run_little(tmp_path, name=name) for name in ("a", "b"))
    assert first[:-1] == again[:-1] and "out" not in {key for key, value in first[0].items() if value}
    other = run_little(tmp_path, "--seeds", "1", name="c")
    drop = lambda events: [{**event, "seed": 0} for event in events[1:-1]]
    assert drop(other) != drop(first)


def test_what_is_printed_fits_a_hundred_columns(tmp_path, quick, capsys):
    run_little(tmp_path, "--arms", *t.ARMS, "--seeds", "0", "1")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert (
        said.count("== interleaved") == 2 and "of 2" in said and "\n   0 " in said and re.search(r"\n\d+ s\n$", said)
    )


def test_a_row_marks_a_spike(capsys):
    history = {"base": [event("base", 0)]}
    with open(os.devnull, "w") as out:
        for spike in (0.39, 0.41):
            t.keep(event("rl", 5, spike=spike), history, out)
    low, high = capsys.readouterr().out.splitlines()
    assert low.endswith(f"0.39 {END}") and high.endswith(f"0.41 {END} *") and len(history["rl"]) == 2


def test_ctrl_c_leaves_what_was_measured(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(t, "rl_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        run_little(tmp_path)
    events = [json.loads(line)["event"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert stop.value.code == 130 and events == ["config", "eval"] and capsys.readouterr().err.count("\n") == 1


def test_no_network(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket was opened"))
    assert run_little(tmp_path)[-1]["event"] == "done"


def test_a_picture(tmp_path, quick, capsys):
    if importlib.util.find_spec("matplotlib"):
        run_little(tmp_path, "--plot", str(tmp_path / "run"))
        assert (tmp_path / "run").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(SystemExit) as stop:
            run_little(tmp_path, "--plot", str(tmp_path / "run.png"))
        assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


def in_a_process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(HERE / "toolrl.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_slow_a_real_ctrl_c(tmp_path):
    out = tmp_path / "run.jsonl"
    run = in_a_process("--out", str(out), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while run.poll() is None and not (out.exists() and '"arm": "rl"' in out.read_text()):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and all(map(json.loads, out.read_text().splitlines()))


def test_slow_the_story(tmp_path):
    """Two seeds of the default run, in two processes: one seed may disagree, as the README says; two should not."""
    arms, held = ["--arms", "rl", "interleaved", "rl-strict"], []
    for seed in "12":
        runs = [in_a_process("--seeds", seed, *arms, "--out", str(tmp_path / name), cwd=tmp_path) for name in "ab"]
        assert [run.wait() or run.stderr.read() for run in runs] == ["", ""]
        first, again = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab")
        assert first[:-1] == again[:-1]
        held.append({event["claim"] for event in first if event["event"] == "claim" and event["holds"]})
        assert {"fix", "cause"} <= held[-1]
    assert {"collapse", "control_token", "intact"} <= held[0] | held[1]
