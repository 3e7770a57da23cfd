"""Tests of toolrl. The whole suite: python -m pytest -q. Without the full story: python -m pytest -q -k "not slow"."""

import copy
import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

import toolrl
from toolrl import END, PAD, Settings

HERE = os.path.dirname(os.path.abspath(__file__))
TASKS = os.path.join(HERE, "tiny_tasks.json")
CALL = '{"name": "rival", "arguments": {"of": "bob"}}'
SHORT = "--steps 2 --eval-every 1 --eval-episodes 8 --sft-every 1 --sft-steps 1".split()
QUESTIONS = "rival of mentor of alice ?", "friend of bob ?", "rival of them ?"
FORMAT_A = toolrl.Format("<tool_call>", "</tool_call>")


@pytest.fixture(scope="session")
def world():
    return toolrl.load_world(TASKS)


@pytest.fixture(scope="session")
def tokenizer(world):
    return toolrl.build_tokenizer(world)


@pytest.fixture(scope="session")
def base(world, tokenizer):
    """A policy that is good enough to write calls: 60 updates, a third of a base."""
    settings = Settings(base_steps=60)
    trained = []
    with pytest.raises(toolrl.NotReady):
        real = toolrl.new_policy
        toolrl.new_policy = lambda *args: trained.append(real(*args)) or trained[0]
        try:
            toolrl.train_base(world, tokenizer, settings, "cpu", lambda *_: None)
        finally:
            toolrl.new_policy = real
    return trained[0]


@pytest.fixture
def quick(monkeypatch, base, tmp_path):
    """toolrl.main with the base trained beforehand. -> function of the arguments: exit code, events of --out"""
    monkeypatch.setattr(toolrl, "train_base", lambda *_: (copy.deepcopy(base), 60))
    monkeypatch.chdir(HERE)

    def call(*arguments, out="run.jsonl"):
        path = tmp_path / out
        code = toolrl.main(
            [
                *SHORT,
                *arguments,
                "--out",
                str(path),
            ]
        )
        return code, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return call


def episode_of(world, question="rival of mentor of alice ?", fmt="A", written="nothing", seed=0):
    task = toolrl.read_task(question, "test", world.keys, world.people, world.wording)
    return toolrl.new_episode(world, task, toolrl.stream("test", seed), fmt, written)


def play(episode, *messages):
    """Feed whole messages to the environment. -> what it answered"""
    return [toolrl.respond(episode, message) for message in messages]


# %% Tasks


def test_splits_hold_what_their_names_say(world):
    everything = [task for tasks in world.splits.values() for task in tasks]
    assert len(everything) == len({task.question for task in everything})
    orders = {task.tools for split in ("train", "no_call.train") for task in world.splits[split]}
    assert not orders & {task.tools for task in world.splits["content_ood"]}
    assert {task.tools for task in world.splits["heldout"]} <= orders
    assert {len(task.tools) for task in world.splits["simple"]} == {1}
    assert all(task.person is None for task in world.splits["no_call.heldout"])
    assert {len(task.tools) for task in world.splits["heldout"]} == {2, 3}


def test_question_is_read_from_the_inside_out(world):
    task = episode_of(world).task
    assert task == toolrl.Task("rival of mentor of alice ?", ("mentor", "rival"), "alice")
    assert episode_of(world, "rival of them ?").task.person is None


def test_a_teacher_can_add_a_person_a_tool_and_a_task(world, tmp_path):
    tree = json.load(open(TASKS))
    boss = copy.deepcopy(tree["tools"][0])
    boss["function"]["name"] = "boss"
    tree["tools"].append(boss)
    tree["people"].append("zoe")
    tree["splits"]["train"].append("boss of zoe ?")
    path = tmp_path / "more.json"
    path.write_text(json.dumps(tree))
    more = toolrl.load_world(str(path))
    tokenizer = toolrl.build_tokenizer(more)
    assert len(tokenizer) == len(toolrl.build_tokenizer(world)) + 2
    episode = toolrl.new_episode(more, more.splits["train"][-1], toolrl.stream(0))
    ids, _ = toolrl.trajectory(tokenizer, episode, episode.gold)
    assert "boss" in tokenizer.decode(ids)


def without(*path):
    def change(tree):
        for key in path[:-1]:
            tree = tree[key]
        del tree[path[-1]]

    return change


def also(question, *path):
    def change(tree):
        for key in path:
            tree = tree[key]
        tree.append(question)

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (without("people"), "people is missing"),
        (without("formats", "B", "close"), "formats.B.close is missing"),
        (without("tools", 1, "function", "name"), "tools.1.function.name is missing"),
        (without("wording", "link"), "wording.link is missing"),
        (without("splits", "no_call", "heldout"), "splits.no_call.heldout is missing"),
        (also("boss of alice ?", "splits", "train"), "unknown tool 'boss'"),
        (also("rival of zoe ?", "splits", "train"), "unknown person 'zoe'"),
        (also("rival of them ?", "splits", "train"), "only the no_call splits"),
        (also("rival of alice ?", "splits", "no_call", "train"), "only the no_call splits"),
        (also("rival of alice", "splits", "simple"), "does not read"),
        (also("alice ?", "splits", "simple"), "does not read"),
        (also("rival of mentor of " * 3 + "alice ?", "splits", "simple"), "takes 6 calls"),
        (also(7, "splits", "simple"), "does not read"),
        (also("mary ann", "people"), "more than one token"),
        (also('"bob"', "people"), "more than one token"),
        (also(3, "people"), "more than one token"),
        (lambda tree: tree["splits"]["simple"].append(tree["splits"]["train"][0]), "in two splits"),
        (lambda tree: tree["splits"]["content_ood"].append(tree["splits"]["heldout"].pop()), "in this order too"),
        (also("alice", "people"), "stands twice"),
        (also("rival", "people"), "stands twice"),
        (lambda tree: tree["formats"]["B"].update(open="function:"), "angle brackets"),
        (lambda tree: tree["wording"].update(ask_back='who is "them" ?'), "more than one token"),
        (lambda tree: tree["tools"][0]["function"]["parameters"]["properties"].update(to={}), "exactly one argument"),
    ],
)
def test_a_broken_tasks_file_is_one_line_that_names_the_place(tmp_path, capsys, change, said):
    tree = json.load(open(TASKS))
    change(tree)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(tree))
    assert toolrl.main(["--tasks", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "variants, said",
    [
        ({"x": {"nowhere": "y"}}, "variants.x: 'nowhere' does not stand in the file"),
        ({"x": {"<tool_call>": "a b"}}, "variants.x: formats: a delimiter is one <word>"),
        ({"x": {"mentor": "friend"}}, "variants.x: "),
        ({"x": {"{": ""}}, "variants.x: "),
        ({"x": {"mentor": 3}}, "variants.x: "),
        ({"x": ["mentor"]}, "variants.x: "),
        (["x"], "variants is missing, empty or not a dict"),
    ],
)
def test_a_broken_variant_is_one_line_that_names_it(tmp_path, capsys, variants, said):
    with open(TASKS, encoding="utf-8") as file:
        tree = json.load(file)
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tree | {"variants": variants}))
    assert toolrl.main(["--tasks", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    path.write_text(json.dumps({key: value for key, value in tree.items() if key != "variants"}))
    assert toolrl.load_world(str(path)).variants == {}


def test_random_damage_to_the_tasks_file_is_a_world_or_one_clear_line():
    with open(TASKS, encoding="utf-8") as file:
        whole = json.load(file)
    for split, questions in whole["splits"].items():  # a few questions of each split, for speed
        whole["splits"][split] = (
            {k: q[:4] for k, q in questions.items()} if isinstance(questions, dict) else questions[:4]
        )
    rng, junk = (
        random.Random(0),
        [None, 3, -1.5, True, "", "x", "a b", "<x>", "{open}", [], {}, ["of"], {"of": 1}, "\ud800"],
    )
    broken = 0
    for _ in range(10_000):
        tree = copy.deepcopy(whole)
        for _ in range(rng.randrange(1, 3)):
            place = tree
            while True:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                    break
                place = place[key]
            if rng.random() < 0.3:
                del place[key]
            else:
                place[key] = copy.deepcopy(rng.choice(junk))
            if not tree:
                break
        try:
            toolrl.build_tokenizer(toolrl.check_world(tree))
        except toolrl.UserError as error:
            broken += 1
            assert str(error) and "\n" not in str(error)
    assert 3000 < broken < 10_000


# %% Tokenizer and messages


def test_each_control_token_is_one_id_and_padding_is_another(world, tokenizer):
    for token in toolrl.control_tokens(tokenizer):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert {"<tool_call>", "</tool_call>", "<function>", "</function>", END} <= set(toolrl.control_tokens(tokenizer))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == END and tokenizer.pad_token == PAD
    assert len(toolrl.encode_turn(tokenizer, f"<tool_call>{CALL}</tool_call>")) == 8


def test_text_and_ids_go_both_ways(world, tokenizer):
    for question in ("rival of mentor of alice ?", "rival of them ?"):
        for message in episode_of(world, question).gold:
            assert tokenizer.decode(tokenizer.encode(message, add_special_tokens=False)) == message


def test_the_chat_template_and_the_pieces_agree(world, tokenizer):
    """A conversation laid out turn by turn has the ids of the whole conversation rendered at once."""
    episode = episode_of(world)
    chat = [{"role": role, "content": text} for role, text in episode.opening]
    for k, message in enumerate(episode.gold):
        chat.append({"role": "assistant", "content": message})
        if k < len(episode.gold_calls):
            role, text = toolrl.tool_message(episode.directory[episode.gold_calls[k]])
            chat.append({"role": role, "content": text})
    whole = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)
    ids, targets = toolrl.trajectory(tokenizer, episode, episode.gold)
    assert ids == whole
    written = tokenizer.decode([token for token, target in zip(ids, targets) if target])
    assert written == "".join(message + END for message in episode.gold)


# %% Environment


@pytest.mark.parametrize(
    "message, state",
    [
        (f"<tool_call>{CALL}</tool_call>", "healthy_call"),
        ('<tool_call>{"name": "boss", "arguments": {"of": "zoe"}}</tool_call>', "healthy_call"),
        ("The answer is bob", "healthy_response"),
        ("who do you mean ?", "healthy_response"),
        ("", "collapsed"),
        ("<tool_call>", "collapsed"),
        ("<tool_call><tool_call>", "collapsed"),
        ("<tool_call></tool_call>", "collapsed"),
        (f"<tool_call>{CALL}", "text_pollution"),
        (f"{CALL}</tool_call>", "text_pollution"),
        (CALL, "text_pollution"),
        (f"<tool_call><tool_call>{CALL}</tool_call>", "text_pollution"),
        (f"<tool_call>{CALL}</tool_call></tool_call>", "text_pollution"),
        (f"I will call <tool_call>{CALL}</tool_call>", "text_pollution"),
        (f"<function>{CALL}</function>", "text_pollution"),
        ("<tool_call>rival bob</tool_call>", "text_pollution"),
        ('<tool_call>{"name": "rival"}</tool_call>', "text_pollution"),
        ("<tool_call>[1]</tool_call>", "text_pollution"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "text_pollution"),
    ],
)
def test_the_four_states(world, message, state):
    assert toolrl.classify(message, world.formats["A"])[0] == state
    assert state in toolrl.STATES


def test_the_right_conversation_succeeds(world):
    for question in ("rival of mentor of alice ?", "rival of them ?"):
        episode = episode_of(world, question)
        answers = play(episode, *episode.gold)
        assert toolrl.succeeded(episode) and toolrl.blind_score(episode) == 1.0 and episode.done
        assert answers == [episode.directory[call] for call in episode.gold_calls] + [None]


def test_a_reply_may_hold_words_alone_and_a_call_nothing_else(world):
    """A call written in the other format is no call here, and the reverse."""
    for name, fmt in world.formats.items():
        for other, tags in world.formats.items():
            state, call = toolrl.classify(f"{tags.open}{CALL}{tags.close}", fmt)
            assert (state == "healthy_call") == (call is not None) == (name == other)


def score(world, question, make):
    episode = episode_of(world, question)
    for message in make(episode):
        assert not episode.done
        toolrl.respond(episode, message)
    return toolrl.blind_score(episode), toolrl.succeeded(episode)


@pytest.mark.parametrize(
    "make, blind, strict",
    [
        (lambda e: [""], 0, False),
        (lambda e: ["<tool_call>"], 0, False),
        (lambda e: e.gold[-1:], 0, False),  # the right answer without the calls
        (lambda e: [e.gold[0], e.gold[2]], 0, False),  # a call left out
        (lambda e: [e.gold[1], e.gold[0], e.gold[2]], 0, False),  # the wrong order
        (lambda e: [e.gold[0], e.gold[0], e.gold[1], e.gold[2]], 0, False),  # a call too many
        (lambda e: [e.gold[0].replace("mentor", "boss")], 0, False),
        (lambda e: [*e.gold[:2], "The answer is nobody"], 1, False),  # the blind spot: replies are not read
        (lambda e: [*e.gold[:2], "<tool_call>"], 1, False),
        (lambda e: [*e.gold[:2], f"{e.gold[2]} {e.gold[0]}"], 0, False),  # a call behind the answer
        (lambda e: [*e.gold[:2], "<tool_call>" * 3 + "</tool_call>"], 0, False),
        (lambda e: e.gold, 1, True),
    ],
)
def test_scores_where_calls_are_due(world, make, blind, strict):
    assert score(world, "rival of mentor of alice ?", make) == (blind, strict)


@pytest.mark.parametrize(
    "make, blind, strict",
    [
        (lambda e: e.gold, 1, True),
        (lambda e: [""], 1, False),
        (lambda e: ["<tool_call>"], 1, False),  # the blind spot
        (lambda e: [f"<tool_call>{CALL}"], 1, False),
        (lambda e: [f"<tool_call>{CALL}</tool_call>", e.gold[0]], 0, False),
        (lambda e: ["<tool_call></tool_call>"], 0, False),
        (lambda e: ["The answer is bob"], 1, False),
    ],
)
def test_scores_where_no_call_is_due(world, make, blind, strict):
    assert score(world, "rival of them ?", make) == (blind, strict)


def test_a_call_is_the_same_call_in_any_order_of_its_keys(world):
    for variant in (world, world.variants["another order of keys"]):
        episode = episode_of(variant)
        for call in episode.gold[:-1]:
            turned = json.dumps(dict(reversed(json.loads(call[len("<tool_call>") : -len("</tool_call>")]).items())))
            assert turned not in call
            assert toolrl.respond(episode, f"<tool_call>{turned}</tool_call>") in world.people
        toolrl.respond(episode, episode.gold[-1])
        assert toolrl.succeeded(episode)


def test_long_messages_and_endless_calls_end_unrewarded(world):
    episode = episode_of(world, "rival of them ?")
    toolrl.respond(episode, "who do you mean ?", finished=False)
    assert episode.done and toolrl.blind_score(episode) == 0 and episode.states == ["text_pollution"]
    episode = episode_of(world)
    answers = play(episode, *[f"<tool_call>{CALL}</tool_call>"] * toolrl.MAX_CALLS)
    assert episode.done and toolrl.blind_score(episode) == 0 and answers[-1] is None and None not in answers[:-1]


def test_ten_thousand_random_messages_never_raise_and_never_earn_what_they_should_not(world):
    rng = random.Random(0)
    calls = [toolrl.call_json(world, tool, person) for tool in world.keys for person in world.people[:3]]
    pieces = ["<tool_call>", "</tool_call>", "<function>", "</function>", END, "<|im_start|>", *calls, "", " ", "\n"]
    pieces += [
        '{"name": "',
        '"}}',
        "{",
        "}",
        '"',
        "[" * 2000,
        "\\",
        "\u0000",
        "\ud800",
        "who do you mean ?",
        "null",
        "1e999",
    ]
    pieces += [
        '{"name": 1, "arguments": {}}',
        '{"name": "x", "name": "y", "arguments": []}',
        "The answer is alice",
        "<",
        ">",
    ]
    for i in range(10_000):
        message = "".join(rng.choices(pieces, k=rng.randrange(6)))
        if rng.random() < 0.3:
            message = f"<tool_call>{message}</tool_call>"
        episode = episode_of(world, QUESTIONS[i % 3], seed=i % 7)
        toolrl.respond(episode, message, finished=rng.random() < 0.9)
        state, call = toolrl.classify(message, episode.fmt)
        assert state in toolrl.STATES and (call is None) == (state != "healthy_call")
        assert 0 <= toolrl.closed_score(episode) <= toolrl.blind_score(episode)
        if episode.gold_calls:  # one message is a call or a reply, and both are needed
            assert toolrl.blind_score(episode) == 0 and not toolrl.succeeded(episode)
        else:
            assert toolrl.blind_score(episode) == (episode.replied and not episode.calls)
            assert not toolrl.succeeded(episode) or message == "who do you mean ?"


def test_an_unknown_call_is_answered_with_an_error(world):
    episode = episode_of(world)
    assert play(episode, '<tool_call>{"name": ["boss"], "arguments": 7}</tool_call>') == [toolrl.UNKNOWN]
    assert not episode.done


# %% Rollout


@pytest.fixture(scope="session")
def played(base, world, tokenizer):
    """A batch of rollouts of mixed lengths: both formats, one to four calls, no-call tasks."""
    tasks = [task for tasks in world.splits.values() for task in tasks[:3]]
    episodes = [toolrl.new_episode(world, task, toolrl.stream(i), "AB"[i % 2]) for i, task in enumerate(tasks)]
    return episodes, toolrl.rollout(base, tokenizer, episodes, toolrl.stream("sampling"))


def test_rollout_keeps_the_ids_and_log_probs_that_were_sampled(base, played, tokenizer):
    episodes, batch = played
    with torch.no_grad():
        log_p = base(batch.ids[:, :-1]).logits.log_softmax(-1)
    log_probs = toolrl.token_log_probs(base, batch.ids).detach()
    chosen = batch.sampled[:, 1:]
    assert torch.allclose(log_p[chosen], batch.log_p[:, 1:][chosen], atol=1e-3) and not batch.log_p[:, 0].any()
    assert torch.allclose(log_probs[chosen], batch.log_probs[:, 1:][chosen], atol=1e-4)
    assert (batch.log_probs[~batch.sampled] == 0).all() and (batch.log_probs[batch.sampled] < 0).all()
    for row, episode in enumerate(episodes):
        turns = tokenizer.decode(batch.ids[row][batch.sampled[row]])
        assert turns.replace(END, "") == tokenizer.decode(
            tokenizer.encode("".join(episode.messages), add_special_tokens=False)
        )


def test_the_loss_covers_sampled_end_tokens_and_no_context(played, tokenizer):
    episodes, batch = played
    ends = (batch.ids == tokenizer.eos_token_id) & batch.sampled
    for row, episode in enumerate(episodes):
        assert ends[row].sum() >= len(episode.messages) - 1
        opening = toolrl.encode_context(tokenizer, *episode.opening)
        assert not batch.sampled[row, : len(opening)].any()
        assert batch.sampled[row, len(opening)]
        last = int(batch.sampled[row].nonzero().max())
        assert (batch.ids[row, last + 1 :] == tokenizer.pad_token_id).all()
    responses = batch.ids == tokenizer.convert_tokens_to_ids("<tool_response>")
    assert responses.any() and not (responses & batch.sampled).any()


def test_a_message_without_an_end_is_cut_off_unrewarded(world, tokenizer):
    """An untrained policy rambles: no message is longer than MAX_TOKENS, and those that are as long end it all."""
    untrained = toolrl.new_policy(tokenizer, 0, "cpu")
    episodes = [episode_of(world, "rival of them ?", seed=i) for i in range(32)]
    batch = toolrl.rollout(untrained, tokenizer, episodes, toolrl.stream(0))
    written = batch.sampled.sum(1)
    cut = [
        (written[i] == toolrl.MAX_TOKENS) and END not in tokenizer.decode(batch.ids[i][batch.sampled[i]])
        for i in range(32)
    ]
    assert any(cut) and written.max() == toolrl.MAX_TOKENS
    for episode, was_cut in zip(episodes, cut):
        if was_cut:
            assert episode.done and episode.states == ["text_pollution"] and toolrl.blind_score(episode) == 0


def test_each_episode_has_a_directory_of_its_own(world):
    first, second, again = (episode_of(world, seed=seed).directory for seed in (0, 1, 0))
    assert first == again != second and len(set(first.values())) > 6


def test_rollout_is_a_function_of_its_seed(base, world, tokenizer):
    def once(seed):
        episodes = [episode_of(world, seed=i) for i in range(8)]
        return toolrl.rollout(base, tokenizer, episodes, toolrl.stream(seed)).ids

    assert torch.equal(once(1), once(1))
    assert once(1).shape != once(2).shape or not torch.equal(once(1), once(2))


def test_a_forced_episode_has_the_right_format_whatever_the_policy(world, tokenizer):
    untrained = toolrl.new_policy(tokenizer, 0, "cpu")
    episodes = [episode_of(world, written="format", fmt="AB"[i % 2], seed=i) for i in range(8)]
    batch = toolrl.rollout(untrained, tokenizer, episodes, toolrl.stream(0))
    for row, episode in enumerate(episodes):
        assert episode.messages[0].startswith(episode.fmt.open + '{"name": "')
        assert episode.messages[0].endswith('"}}' + episode.fmt.close)
        assert batch.sampled[row].sum() == 2 * len(episode.messages) - (len(episode.messages) > len(episode.gold_calls))


def test_a_prefill_is_the_start_of_each_call_and_nothing_else(base, world, tokenizer):
    episodes = [episode_of(world, question, written="prefill", seed=i) for i in range(8) for question in QUESTIONS]
    batch = toolrl.rollout(base, tokenizer, episodes, toolrl.stream(0))
    calls_due = 0
    for row, episode in enumerate(episodes):
        due = min(len(episode.messages), len(episode.gold_calls))
        given = batch.sampled[row].nonzero()[0, 0] - len(toolrl.encode_context(tokenizer, *episode.opening))
        assert given == (2 if episode.gold_calls else 0)
        assert all(message.startswith('<tool_call>{"name": "') for message in episode.messages[:due])
        written = sum(len(toolrl.encode_turn(tokenizer, message)) for message in episode.messages)
        cut = len(batch.sampled[row]) and not episode.replied and episode.states[-1] == "text_pollution"
        assert cut or batch.sampled[row].sum() == written - 2 * due
        calls_due += due
    assert calls_due > 8


# %% GRPO


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    result = toolrl.advantages(rewards)
    assert torch.allclose(result[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3)
    assert (result[1] == 0).all() and (result[2] == 0).all()
    assert torch.allclose(result[3], torch.tensor([1.0, 1, -1, -1]) * 0.5 / math.sqrt(1 / 3), atol=1e-3)


def after_update(base, batch, advantage, **settings):
    """Weights before and after one GRPO update by plain gradient descent, so that the step is the gradient."""
    policy = copy.deepcopy(base)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    toolrl.grpo_update(policy, optimizer, batch, advantage, Settings(minibatches=1, **settings), toolrl.stream(0), base)
    return policy


def moved(base, policy):
    return max((old - new).abs().max().item() for old, new in zip(base.parameters(), policy.parameters()))


def test_equal_rewards_give_no_gradient_at_all(base, played):
    episodes, batch = played
    flat = toolrl.advantages(torch.ones(1, len(episodes))).flatten()
    assert moved(base, after_update(base, batch, flat)) == 0
    assert moved(base, after_update(base, batch, torch.arange(len(episodes)) - 2.0)) > 0


def test_the_update_reports_the_norm_of_its_gradient(base, played):
    """With plain gradient descent at learning rate 1 the weights move by the gradient, clipped to norm 1."""
    episodes, batch = played
    advantage = torch.linspace(-0.2, 0.2, len(episodes))
    policy = copy.deepcopy(base)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    settings = Settings(minibatches=1)
    norm = toolrl.grpo_update(policy, optimizer, batch, advantage, settings, toolrl.stream(0), base)
    steps = [(old - new).flatten() for old, new in zip(base.parameters(), policy.parameters())]
    assert 0 < norm < 1 and torch.cat(steps).norm().item() == pytest.approx(norm, rel=1e-4)


def test_a_better_rollout_becomes_likelier_and_a_worse_one_less(base, played):
    _, batch = played
    advantage = torch.zeros(len(batch.ids))
    advantage[0], advantage[1] = 1.0, -1.0
    policy = copy.deepcopy(base)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    toolrl.grpo_update(policy, optimizer, batch, advantage, Settings(minibatches=1), toolrl.stream(0), base)
    change = (toolrl.token_log_probs(policy, batch.ids) - toolrl.token_log_probs(base, batch.ids)) * batch.sampled[
        :, 1:
    ]
    assert change[0].sum() > 0 > change[1].sum()


@pytest.mark.parametrize("where", ["prompt", "tool result", "padding", "sampled end"])
def test_the_gradient_reaches_sampled_tokens_only(base, played, tokenizer, where):
    """Replace the id that a position has to predict: only where it was sampled may the update change."""
    episodes, batch = played
    row = next(i for i, e in enumerate(episodes) if e.calls and len(e.messages) > 1 and not batch.sampled[i, -1])
    ids, sampled = batch.ids[row], batch.sampled[row]
    tool = tokenizer.convert_tokens_to_ids("<tool_response>")
    position = {
        "prompt": 3,
        "tool result": int((ids == tool).nonzero()[0]) + 1,
        "padding": len(ids) - 1,
        "sampled end": int((sampled & (ids == tokenizer.eos_token_id)).nonzero()[-1]),
    }[where]
    # The gradient at the output of the position before, which predicts this one.
    captured = []
    policy = copy.deepcopy(base)
    policy.lm_head.register_forward_hook(lambda _, __, out: (out.retain_grad(), captured.append(out))[0])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    toolrl.grpo_update(
        policy, optimizer, batch, torch.ones(len(batch.ids)), Settings(minibatches=1), toolrl.stream(0), base
    )
    order = torch.tensor(toolrl.stream(0).sample(range(len(batch.ids)), len(batch.ids)))
    gradient = captured[0].grad[(order == row).nonzero()[0, 0], position - 1]
    assert (gradient.abs().max() > 0) == (where == "sampled end")


@pytest.mark.parametrize(
    "advantage, shift, stopped",
    [
        (1.0, 0.5, True),
        (1.0, -0.5, False),
        (-1.0, -0.5, True),
        (-1.0, 0.5, False),
        (1.0, 0.1, False),
        (-1.0, -0.1, False),
    ],
)
def test_the_clip_stops_choices_that_moved_far_enough_the_right_way(base, played, advantage, shift, stopped):
    _, batch = played
    older = dataclasses.replace(batch, log_p=batch.log_p - shift * batch.sampled[..., None])  # the ratio is exp(shift)
    distance = moved(base, after_update(base, older, torch.full((len(batch.ids),), advantage)))
    assert (distance == 0) == stopped


def test_the_kl_penalty_pulls_towards_the_reference(base, world, tokenizer, played):
    _, batch = played
    policy, nothing = copy.deepcopy(base), torch.zeros(len(batch.ids))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)

    def divergence():
        gap = toolrl.token_log_probs(base, batch.ids) - toolrl.token_log_probs(policy, batch.ids)
        return ((gap.exp() - gap - 1) * batch.sampled[:, 1:]).sum().item()

    before, optimizer = divergence(), torch.optim.SGD(policy.parameters(), lr=0.02)
    for _ in range(10):
        toolrl.grpo_update(policy, optimizer, batch, nothing, Settings(kl=1.0, minibatches=1), toolrl.stream(0), base)
    assert divergence() < 0.9 * before


def test_a_loss_that_is_not_a_number_stops(base, played):
    _, batch = played
    with pytest.raises(FloatingPointError):
        after_update(base, batch, torch.full((len(batch.ids),), math.nan))


def test_a_gradient_that_is_not_a_number_stops_before_it_is_taken(base):
    policy = copy.deepcopy(base)
    first = next(policy.parameters())
    loss = (first - first.detach()).abs().sqrt().sum()  # 0, with a slope of 0/0
    with pytest.raises(FloatingPointError, match="the loss is 0.0, its gradient nan"):
        toolrl.optimise(policy, torch.optim.SGD(policy.parameters(), lr=1.0), loss)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters()))


def test_a_policy_of_no_numbers_stops(base, world, tokenizer):
    policy = copy.deepcopy(base)
    next(policy.parameters()).data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="probabilities"):
        toolrl.rollout(policy, tokenizer, [episode_of(world)], toolrl.stream(0))


def test_a_rollout_in_which_nothing_is_chosen(base, world, tokenizer):
    episode = episode_of(world, "rival of them ?", written="format")
    batch = toolrl.rollout(base, tokenizer, [episode], toolrl.stream(0))
    assert toolrl.succeeded(episode) and not batch.sampled.any() and not batch.log_p.any()


def test_each_update_has_a_gradient_of_its_own(base):
    """The same loss twice, at a learning rate of 0: nothing of the first gradient is left in the second."""
    policy = copy.deepcopy(base)
    optimizer, weight = torch.optim.SGD(policy.parameters(), lr=0.0), next(policy.parameters())
    first, second = (toolrl.optimise(policy, optimizer, weight.square().sum()) for _ in range(2))
    assert first == second > 1  # the gradient itself was clipped to 1


# %% SFT


def test_sft_overfits_one_conversation(world, tokenizer):
    policy = toolrl.new_policy(tokenizer, 0, "cpu")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    episode = episode_of(world)
    rows = toolrl.stack(policy, [toolrl.trajectory(tokenizer, episode, episode.gold)])
    first = toolrl.sft_update(policy, optimizer, *rows)
    for _ in range(40):
        last = toolrl.sft_update(policy, optimizer, *rows)
    assert first > 3 and last < 0.05


def test_sft_loss_is_the_mean_over_what_the_assistant_writes(base, world, tokenizer):
    policy = copy.deepcopy(base)
    pair = [episode_of(world), episode_of(world, "rival of them ?")]
    ids, targets = toolrl.stack(policy, [toolrl.trajectory(tokenizer, e, e.gold) for e in pair])
    assert (ids[1] == tokenizer.pad_token_id).any() and not (targets & (ids == tokenizer.pad_token_id)).any()
    by_hand = []
    for row in range(2):
        log_p = base(ids[row : row + 1]).logits[0].log_softmax(-1)
        by_hand += [-log_p[t - 1, ids[row, t]].item() for t in range(1, ids.shape[1]) if targets[row, t]]
    loss = toolrl.sft_update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), ids, targets)
    assert loss == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)


def test_the_careless_log_is_careless_to_the_degree_it_says(world):
    rng, states, asked = toolrl.stream("log"), [], 0
    for _ in range(2000):
        episode = toolrl.new_episode(world, rng.choice(world.splits["train"]), rng)
        messages = toolrl.logged_messages(world, episode, 0.08, rng)
        calls = messages[:-1] if messages[-1] == episode.gold[-1] else messages
        states += [toolrl.classify(message, episode.fmt)[0] for message in calls]
        silent = toolrl.new_episode(world, world.splits["no_call.train"][0], rng)
        asked += toolrl.logged_messages(world, silent, 0.08, rng) == silent.gold
    share = {state: states.count(state) / len(states) for state in toolrl.STATES}
    assert share["collapsed"] == pytest.approx(0.08, abs=0.015)
    assert share["text_pollution"] == pytest.approx(0.092, abs=0.015)
    assert asked / 2000 == pytest.approx(0.03, abs=0.015)


# %% Probes


def test_held_out_directories_are_those_of_the_seed(world):
    first, again, other = (toolrl.probe_episodes(world, "success", 4, seed) for seed in (0, 0, 1))
    assert first == again and all(a.directory != b.directory for a, b in zip(first, other))
    assert first[0].directory != first[1].directory


def test_probabilities_are_read_at_the_right_positions(world, tokenizer):
    """A policy that gives each id a probability that depends on the id before it: each position shows its own."""
    fmt = world.formats["A"]

    class Parrot(torch.nn.Module):
        config, device = toolrl.new_policy(tokenizer, 0, "cpu").config, torch.device("cpu")

        def forward(self, ids):
            logits = torch.nn.functional.one_hot((ids * 7 + 1) % len(tokenizer), len(tokenizer)) * 3.0
            return type("Output", (), {"logits": logits})

    found = toolrl.control_probabilities(Parrot(), world, tokenizer, 0)
    measured, due = found["p"], toolrl.due_tokens(fmt)
    for at, token in due.items():
        if token:
            assert found["p_due"][at] == pytest.approx(measured[at][token])
    after_open = Parrot()(torch.tensor([[tokenizer.convert_tokens_to_ids(fmt.open)]])).logits[0, 0].softmax(-1)
    assert found["p_due"]["after_open"] == pytest.approx(
        after_open[tokenizer.convert_tokens_to_ids('{"name": "')].item()
    )
    assert measured.keys() == due.keys()
    ids = tokenizer.convert_tokens_to_ids
    before = {
        "turn_start": {ids("assistant")},
        "after_open": {ids(fmt.open)},
        "call_close": {ids('"}}')},
        "after_close": {ids(fmt.close)},
        "answer_start": {ids("assistant")},
    }
    for at, row in measured.items():
        if at != "answer_end":
            expected = Parrot()(torch.tensor([[*before[at]]])).logits[0, 0].softmax(-1)
        else:  # behind the answer, which differs from task to task
            answers = [e.gold[-1].split()[-1] for e in toolrl.probe_episodes(world, "success", 64, 0)]
            expected = Parrot()(torch.tensor([ids(answers)])).logits[0].softmax(-1).mean(0)
        for control, value in row.items():
            assert value == pytest.approx(expected[ids(control)].item(), abs=1e-6)


def test_control_probabilities_on_a_sharp_policy(base, world, tokenizer):
    measured = toolrl.control_probabilities(base, world, tokenizer, 0)["p"]
    for at, token in toolrl.due_tokens(world.formats["A"]).items():
        if token:
            assert measured[at][token] == max(measured[at].values()) > 0.5
        assert set(measured[at]) == set(toolrl.control_tokens(tokenizer))


def test_evaluations_use_held_out_tasks_only(world):
    trained = {task.question for split in ("train", "no_call.train") for task in world.splits[split]}
    for probe in toolrl.PROBES:
        episodes = toolrl.probe_episodes(world, probe, 50, 0)
        assert not trained & {episode.task.question for episode in episodes}
        again = toolrl.probe_episodes(world, probe, 50, 0)
        assert [e.directory for e in episodes] == [e.directory for e in again]


def test_each_probe_is_what_its_name_says(world):
    def of(probe):
        return toolrl.probe_episodes(world, probe, 64, 0)

    assert {
        probe: {e.written for e in of(probe)}
        for probe in toolrl.PROBES
        if probe.endswith(("fill_success", "ed_success"))
    } == {
        "prefill_success": {"prefill"},
        "forced_success": {"format"},
    }
    assert sum(e.written != "nothing" for probe in toolrl.PROBES for e in of(probe)) == 128
    assert [p for p in toolrl.PROBES if of(p)[0].fmt == world.formats["B"]] == ["format_b_success"]
    assert all(len(e.gold_calls) == 1 for e in of("simple_success"))
    assert all(not e.gold_calls for e in of("no_call_success"))
    for probe in ("prefill_success", "forced_success", "format_b_success"):  # the same tasks, under other conditions
        assert [e.task for e in of(probe)] == [e.task for e in of("success")]


def test_a_transcript_is_what_was_said_with_the_probability_of_what_was_sampled(base, world, tokenizer, played):
    episodes, batch = played
    control = toolrl.control_tokens(tokenizer)
    for row, episode in enumerate(episodes):
        said = toolrl.transcript(tokenizer, batch, row)
        opening = len(toolrl.encode_context(tokenizer, *episode.opening))
        whole = tokenizer.decode([i for i in batch.ids[row, opening:] if i != tokenizer.pad_token_id])
        assert "".join(text for text, _ in said) == whole
        chosen = batch.sampled[row] & torch.isin(batch.ids[row], torch.tensor(tokenizer.convert_tokens_to_ids(control)))
        probs = [p for _, p in said if p is not None]
        assert probs == pytest.approx(batch.log_probs[row][chosen].exp().tolist())
        assert all(text in control for text, p in said if p is not None)
    assert any(p is None and text == "<tool_response>" for text, p in said + toolrl.transcript(tokenizer, batch, 0))


def test_training_signals_by_autograd(base, world, tokenizer):
    """RL's push is the gradient of its objective at the logit of the token due after an opening tag, by definition."""
    episodes = [episode_of(world, question, seed=i) for i in range(8) for question in QUESTIONS]
    batch = toolrl.rollout(base, tokenizer, episodes, toolrl.stream(0))
    rewards = torch.tensor([[1.0, 0, 0] * 4, [1.0] * 12])
    advantage = toolrl.advantages(rewards).flatten()
    other = toolrl.new_policy(tokenizer, 1, "cpu")
    signals = toolrl.training_signals(world, tokenizer, episodes, batch, rewards)
    assert signals["reward"] == pytest.approx(16 / 24) and signals["equal_groups"] == 0.5
    opened, right = tokenizer.convert_tokens_to_ids([FORMAT_A.open, '{"name": "'])
    logits = base(batch.ids[:, :-1]).logits.detach().requires_grad_()
    log_p = logits.log_softmax(-1)
    chosen_log_p = log_p.gather(2, batch.ids[:, 1:, None])[..., 0]
    after = batch.sampled[:, 1:] & (batch.ids[:, :-1] == opened)
    (chosen_log_p * advantage[:, None])[after].sum().backward()
    assert after.any() and signals["rl_push"] == pytest.approx(
        logits.grad[..., right].sum().item() / after.sum().item(), rel=1e-3
    )
    p = log_p.detach().exp()
    control = tokenizer.convert_tokens_to_ids(toolrl.control_tokens(tokenizer))
    assert signals["stray"] == pytest.approx(p[after][:, control].sum(1).mean().item())
    sampled = batch.sampled[:, 1:]
    entropy = torch.distributions.Categorical(probs=p).entropy()[sampled].mean()
    assert signals["entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    drift = chosen_log_p.detach() - toolrl.token_log_probs(other, batch.ids)
    assert toolrl.drift(other, batch) == pytest.approx(drift[sampled].mean().item(), rel=1e-4)
    assert toolrl.drift(other, batch) > 1 and toolrl.drift(base, batch) == pytest.approx(0, abs=1e-5)
    states = [state for episode in episodes for state in episode.states]
    assert signals["broken"] == sum(state in ("collapsed", "text_pollution") for state in states) / len(states)
    still = toolrl.training_signals(world, tokenizer, episodes, batch, 0 * rewards)
    assert still["equal_groups"] == 1 and still["rl_push"] == 0


def test_signals_exist_when_no_call_was_opened(world, tokenizer):
    episodes = [episode_of(world), episode_of(world)]
    ids, log_p = torch.ones(2, 9, dtype=torch.long), torch.zeros(2, 9, len(tokenizer))
    batch = toolrl.Rollout(ids, torch.ones(2, 9, dtype=torch.bool), log_p)
    episodes[0].states.append("collapsed")
    signals = toolrl.training_signals(world, tokenizer, episodes, batch, torch.ones(1, 2))
    assert signals["stray"] == signals["rl_push"] == 0 and not any(map(math.isnan, signals.values()))


def test_variants_are_the_same_world_under_another_schema(world, tokenizer):
    known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    said = {}
    for name, varied in world.variants.items():
        wider = toolrl.build_tokenizer(varied, known)
        assert wider.convert_ids_to_tokens(range(len(known))) == known and wider.pad_token_id == tokenizer.pad_token_id
        episode = toolrl.probe_episodes(varied, "success", 1, 0)[0]
        ids, targets = toolrl.trajectory(wider, episode, episode.gold)
        assert varied.wording["system"].split()[-1] == "{open}" and wider.unk_token_id not in ids
        turns = [toolrl.encode_turn(wider, message) for message in episode.gold]
        assert wider.decode(turns[0][:-1]) == episode.gold[0] and len(turns[0]) == 8
        said[name] = episode.gold[0]
        assert toolrl.succeeded(play_gold(episode)) and varied.variants == {}
    assert len(set(said.values())) >= 4 and said["another order of keys"].startswith('<tool_call>{"arguments"')
    assert '"person": "' in said["another argument key"] and said["unseen delimiters"].startswith("<call>")


def play_gold(episode):
    play(episode, *episode.gold)
    return episode


def test_the_stress_test_leaves_the_policy_alone_and_agrees_with_the_probes(base, world, tokenizer):
    settings, before = Settings(eval_episodes=16), copy.deepcopy(base.state_dict())
    found = toolrl.stress(base, world, tokenizer, settings)
    assert found.keys() == {"as trained", *world.variants}
    assert all(torch.equal(before[name], weight) for name, weight in base.state_dict().items())
    played, _ = toolrl.run_probes(base, world, tokenizer, settings, list(found["as trained"]))
    for probe, episodes in played.items():
        assert found["as trained"][probe] == sum(map(toolrl.succeeded, episodes)) / 16
    assert found == toolrl.stress(base, world, tokenizer, settings)
    assert "unseen delimiters" in toolrl.stress_table({"base": found})


# %% Arms


def test_arms_differ_in_sft_and_nothing_else(quick, monkeypatch):
    seen, updates, starts, knobs = {}, {}, {}, {}
    real_rollout, real_train = toolrl.rollout, toolrl.train_arm
    real = {name: getattr(toolrl, name) for name in ("sft_update", "grpo_update")}
    arm = [None]

    def spy_train(name, base, *rest):
        arm[0] = name
        starts[name] = [weight.clone() for weight in base.parameters()]
        return real_train(name, base, *rest)

    def spy_rollout(policy, tokenizer, episodes, rng):
        state = rng.getstate()
        seen.setdefault(arm[0], []).append(([(e.task, tuple(e.directory.values())) for e in episodes], state))
        return real_rollout(policy, tokenizer, episodes, rng)

    monkeypatch.setattr(toolrl, "train_arm", spy_train)
    monkeypatch.setattr(toolrl, "rollout", spy_rollout)
    for kind in real:

        def spy(*args, kind=kind):
            if kind == "grpo_update":
                knobs[arm[0]] = args[4].kl, args[1].param_groups[0]["lr"] / Settings().lr
            updates.setdefault(arm[0], []).append(kind[:-7] + ("+sft" if kind == "grpo_update" and args[-1] else ""))
            return real[kind](*args)

        monkeypatch.setattr(toolrl, kind, spy)
    batches, real_gold = {}, toolrl.gold_batch
    monkeypatch.setattr(
        toolrl, "gold_batch", lambda *a: batches.setdefault(arm[0], []).append([*a[4]]) or real_gold(*a)
    )
    code, events = quick("--arms", ",".join(toolrl.ARMS), "--steps", "3", "--eval-every", "3")
    assert code == 0
    third = pytest.approx(0.3)  # three of ten warm-up steps
    same = {name: (0.0, third) for name in toolrl.ARMS if name != "sft"}
    assert knobs == same | {"rl-kl": (0.1, third), "rl-slow": (0.0, pytest.approx(0.03))}
    scores = {name: toolrl.blind_score for name in toolrl.ARMS} | {"rl-closed": toolrl.closed_score}
    assert {name: arm.score for name, arm in toolrl.ARMS.items()} == scores
    for name, pools in batches.items():
        assert all(toolrl.blind_score(episode) == 0 for failed in pools for episode in failed)
        assert all(pools) or name == "sft-then-rl"  # there is always a failure to learn from, but before the first step
    assert {event["arm"] for event in events if event["event"] == "eval"} == {"base", *toolrl.ARMS}
    assert all(seen[name] == seen["rl"] for name in toolrl.ARMS)
    steps = [(tasks, state) for tasks, state in seen["rl"] if len(tasks) == 64]  # the others are evaluations
    assert len(steps) == 3 and steps[0][0] != steps[1][0] != steps[2][0] and len({state for _, state in steps}) == 3
    assert all(torch.equal(a, b) for start in starts.values() for a, b in zip(start, starts["rl"]))
    assert updates == {
        "rl": ["grpo"] * 3,
        "rl-closed": ["grpo"] * 3,
        "rl-kl": ["grpo"] * 3,
        "rl-slow": ["grpo"] * 3,
        "interleaved": ["grpo", "sft", "grpo", "sft", "grpo"],
        "sft": ["sft", "sft"],
        "sft-then-rl": ["sft", "sft", "grpo", "grpo", "grpo"],
        "sync": ["grpo+sft"] * 3,
    }


def test_the_closed_score_sees_what_the_blind_one_does_not(world):
    for message, blind, closed in (("<tool_call>", 1, 0), ("", 1, 0), (CALL, 1, 0), ("who do you mean ?", 1, 1)):
        episode = episode_of(world, "rival of them ?")
        toolrl.respond(episode, message)
        assert (toolrl.blind_score(episode), toolrl.closed_score(episode)) == (blind, closed)


def test_rl_tasks_come_in_groups_and_from_the_training_splits(world):
    settings = Settings(no_call_share=0.5)
    episodes = [e for step in range(20) for e in toolrl.rl_episodes(world, settings, toolrl.stream(step))]
    groups = [episodes[i : i + settings.group_size] for i in range(0, len(episodes), settings.group_size)]
    for group in groups:
        assert len({e.task for e in group}) == 1 and len({tuple(e.directory.items()) for e in group}) == 1
        assert len({id(e) for e in group}) == len(group)
        task = group[0].task
        assert task in world.splits["train" if task.person else "no_call.train"]
        assert task.person is None or len(task.tools) >= settings.min_calls
    assert 0.4 < sum(group[0].task.person is None for group in groups) / len(groups) < 0.6


def test_sft_shows_the_failed_tasks_half_of_each_kind(base, world, tokenizer, monkeypatch):
    shown, real = [], toolrl.trajectory
    monkeypatch.setattr(toolrl, "trajectory", lambda *args: shown.append(args[1:]) or real(*args))
    failed = [episode_of(world), episode_of(world, "rival of them ?")]
    toolrl.gold_batch(base, world, tokenizer, Settings(), failed, toolrl.stream(0))
    assert len(shown) == 32 and all(messages == episode.gold for episode, messages in shown)
    assert all(episode is failed[k % 2] for k, (episode, _) in enumerate(shown))
    shown.clear()
    toolrl.gold_batch(base, world, tokenizer, Settings(), [], toolrl.stream(0))
    assert {episode.task.person is None for episode, _ in shown} == {True, False}
    assert all(episode.task in world.splits["train"] + world.splits["no_call.train"] for episode, _ in shown)


# %% Report


def fake_event(arm, step, success, forced=0.95, format_b=0.6, end=0.05):
    due = toolrl.due_tokens(FORMAT_A)
    p = {at: {token: 0.9 if due[at] == token else 0.01 for token in ("<tool_call>", "</tool_call>", END)} for at in due}
    p["after_open"][END] = end
    return {
        "arm": arm,
        "step": step,
        "success": success,
        "no_call_success": 0.0,
        "no_call_blind_score": 0.1,
        "forced_success": forced,
        "format_b_success": format_b,
        "prefill_success": forced,
        "simple_success": success,
        "content_ood_success": success,
        "training": dict(equal_groups=0.5, gradient=0.1, rl_push=-0.05) if step else None,
        "p_due": dict.fromkeys(due, 0.9) | {"after_open": 1 - end},
        "transcript": [["<tool_call>", 0.9], [END, end], ["<|im_start|>", None]],
        "states": dict.fromkeys(toolrl.STATES, 0.25),
        "p": p,
    }


def fake_history(**changes):
    history = {
        "base": [fake_event("base", 0, 0.6)],
        "rl": [fake_event("rl", 1, 0.5)] + [fake_event("rl", k, 0.0, end=0.8) for k in (2, 3, 4)],
        "interleaved": [fake_event("interleaved", k, 0.5 + k / 10, format_b=0.3) for k in (1, 2, 3, 4)],
    }
    return history | changes


def verdicts(history, fmt=FORMAT_A):
    return {claim: reproduced for claim, (reproduced, _) in toolrl.judge(history, fmt).items()}


def test_every_claim_can_be_reproduced_and_every_claim_can_fail():
    assert verdicts(fake_history()) == dict.fromkeys(toolrl.CLAIMS, True)
    recovers = fake_history()["rl"][:3] + [fake_event("rl", 4, 0.4)]
    assert verdicts(fake_history(rl=recovers))["collapse"] is False
    survives = [fake_event("rl", k, 0.6) for k in (1, 2, 3)]
    assert not any(verdicts(fake_history(rl=survives))[claim] for claim in ("collapse", "control_tokens", "intact"))
    never_up = verdicts(fake_history(base=[fake_event("base", 0, 0.04)]))
    assert not any(
        never_up[claim] for claim in ("collapse", "control_tokens", "intact")
    )  # there was nothing to fall from
    quiet = [fake_event("rl", k, 0.0, end=0.3) for k in (1, 2, 3)]
    assert verdicts(fake_history(rl=quiet))["control_tokens"] is False
    high_before = fake_history(base=[fake_event("base", 0, 0.6, end=0.3)])
    assert verdicts(high_before)["control_tokens"] is False
    unskilled = [fake_event("rl", k, 0.0, forced=0.7, end=0.8) for k in (1, 2, 3)]
    assert verdicts(fake_history(rl=unskilled))["intact"] is False
    dips = [fake_event("interleaved", 1, 0.05), fake_event("interleaved", 2, 0.95, format_b=0.3)]
    assert verdicts(fake_history(interleaved=dips))["fix"] is False
    weak = [fake_event("interleaved", 1, 0.89, format_b=0.3)]
    assert verdicts(fake_history(interleaved=weak))["fix"] is False
    free = [fake_event("interleaved", 1, 0.95, format_b=0.6)]
    assert verdicts(fake_history(interleaved=free))["tradeoff"] is False
    worse_before = [fake_event("rl", 1, 0.5, format_b=0.2)] + fake_history()["rl"][1:]
    assert verdicts(fake_history(rl=worse_before))["tradeoff"] is False
    assert verdicts({k: v for k, v in fake_history().items() if k != "rl"}).keys() == {"fix"}


def test_the_verdict_table_names_every_claim():
    for history in (
        fake_history(),
        fake_history(rl=[fake_event("rl", 1, 0.6)]),
        {"base": [fake_event("base", 0, 0.6)]},
    ):
        table = toolrl.verdict_table(toolrl.judge(history, FORMAT_A))
        assert all(text in table for text, _ in toolrl.CLAIMS.values())
    assert table.count("not measured") == 5


def test_the_moments_of_a_story():
    steps = {moment: event["step"] for moment, event in toolrl.moments(fake_history()).items()}
    assert steps == {
        "base": 0,
        "rl before it falls": 1,
        "rl when it is down": 2,
        "rl at the end": 4,
        "interleaved at the end": 4,
    }
    slow = [fake_event("rl", k, success) for k, success in ((1, 0.49), (2, 0.47), (3, 0.5), (4, 0.05))]
    assert toolrl.moments(fake_history(rl=slow))["rl before it falls"]["step"] == 1
    assert "rl at the end" not in toolrl.moments(fake_history(rl=slow))  # it is the moment when rl is down
    steady = fake_history(rl=[fake_event("rl", 1, 0.6), fake_event("rl", 2, 0.5)])
    assert list(toolrl.moments(steady)) == ["base", "rl at the end", "interleaved at the end"]


def test_the_ladder_reads_format_or_skill():
    base = fake_event("base", 0, 0.6)
    for success, forced, reading in (
        (0.6, 0.95, "a shaky format"),
        (0.95, 0.98, "sound"),
        (0.05, 0.76, "format, not skill"),
        (0.0, 0.75, "the skill is damaged"),
    ):
        assert toolrl.diagnose(fake_event("rl", 1, success, forced), base) == reading
    lines = toolrl.ladder(fake_history()).splitlines()
    assert lines[4].startswith("rl when it is down") and lines[4].endswith("format, not skill")
    assert lines[4].split()[5:] == "2 0.00 0.95 0.95 0.00 0.60 0.00 0.50 0.10 -0.05 0.80 format, not skill".split()


@pytest.mark.parametrize("terminal, no_color, coloured", [(True, "", True), (True, "1", False), (False, "", False)])
def test_control_tokens_are_coloured_on_a_terminal(monkeypatch, tokenizer, terminal, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    text = toolrl.transcripts(fake_history(), tokenizer)
    assert ("\033[33m<tool_call>\033[0m[0.90]" if coloured else "<tool_call>[0.90]<|im_end|>[0.05]") in text
    assert "rl when it is down, step 2" in text


def test_the_chart_has_a_bar_for_each_evaluation():
    lines = toolrl.chart(fake_history(), FORMAT_A).splitlines()
    assert "P(<|im_end|>) at after_open" in lines[1]
    assert lines[2].split() == ["rl", "▅▄", "▄▄▄▄▄", "▆▆▆"]  # success 0.6 .5 0 0 0; half broken; .05 .05 .8 .8 .8
    assert lines[3].split()[:2] == ["interleaved", "▅▅▆▆▇"]


def test_the_seeds_table_counts_and_averages():
    other = fake_history(rl=[fake_event("rl", k, 0.4) for k in (1, 2, 3)])
    lines = [line.split() for line in toolrl.seeds_table({3: fake_history(), 5: other}).splitlines()[2:]]
    assert lines[0] == "rl 3 0.60 2 0.95 0.00 0.60 0.60 yes".split()
    assert lines[1] == "rl 5 0.60 - - 0.40 0.60 0.60 no".split()
    assert lines[2] == "rl mean 0.60 2.00 0.95 0.20 0.60 0.60 0.50".split()
    assert lines[3][:6] == "rl s.d. 0.00 - - 0.28".split()
    assert lines[4] == "rl of 2 1 1 2 2 2 1 of 2".split()


def test_the_warning_comes_when_stray_tokens_have_grown_by_half():
    assert not any(toolrl.early_warning([0.1, 0.1, 0.1, 0.14][:k]) for k in range(5))
    assert not toolrl.early_warning([0.0] * 4)
    assert toolrl.early_warning([0.1, 0.1, 0.1, 0.12, 0.16]) and not toolrl.early_warning([0.9, 0.9, 0.9, 0.9])
    assert not toolrl.early_warning([0.1, 0.1, 0.1, 0.12, 0.16, 0.18]) and not toolrl.early_warning(
        [0.1, 0.1, 0.1, 0.16, 0.12]
    )


def test_the_spike_is_marked_and_rows_are_aligned():
    fmt, base = FORMAT_A, fake_event("base", 0, 0.6)
    rows = [toolrl.table_row(event, base, fmt) for event in (base, fake_event("interleaved", 10, 1.0, end=0.8))]
    assert "*" not in rows[0] and "0.80*" in rows[1] and len({len(row) for row in rows}) == 1


# %% Command line


def test_a_run_of_one_step_reproduces_no_collapse(quick, capsys):
    code, events = quick("--steps", "1", "--eval-episodes", "64")
    assert code == 0
    assert [event["event"] for event in events] == [
        *"config eval step eval step eval".split(),
        *["verdict"] * 5,
        "done",
    ]
    found = {event["claim"]: event["reproduced"] for event in events if event["event"] == "verdict"}
    assert not any(found[claim] for claim in ("collapse", "control_tokens", "intact"))  # the others may be, by chance
    assert [(e["arm"], e["step"]) for e in events if e["event"] == "eval"] == [
        ("base", 0),
        ("rl", 1),
        ("interleaved", 1),
    ]
    for event in events:
        if event["event"] == "eval":
            assert event["p"].keys() == {
                "turn_start",
                "after_open",
                "call_close",
                "after_close",
                "answer_start",
                "answer_end",
            }
            assert sum(event["states"].values()) == pytest.approx(1) and event["seed"] == 0
            for (
                key
            ) in "success no_call_success forced_success simple_success format_b_success content_ood_success".split():
                assert 0 <= event[key] <= 1
    assert capsys.readouterr().out.count("not reproduced") >= 3


def test_an_evaluation_has_the_mean_of_the_signals_since_the_one_before(quick):
    _, events = quick("--steps", "3", "--eval-every", "2", "--arms", "rl")
    steps = [event for event in events if event["event"] == "step"]
    first, second = (event["training"] for event in events if event["event"] == "eval" and event["arm"] == "rl")
    for name in first.keys() - {"kl"}:
        assert first[name] == pytest.approx((steps[0][name] + steps[1][name]) / 2)
        assert second[name] == steps[2][name]
    assert first["gradient"] > 0 and len(first) == 8


def test_an_evaluation_has_the_divergence_of_the_last_rollouts(quick):
    """Those of step 1 are sampled from the base itself, those of step 2 after an update."""
    _, events = quick("--steps", "2", "--eval-every", "1", "--arms", "rl", "--lr", "0.003", "--warmup", "1")
    first, second = (event["training"]["kl"] for event in events if event["event"] == "eval" and event["arm"] == "rl")
    assert first == pytest.approx(0, abs=1e-5) and second > 1e-3


def test_one_seed_one_result(quick):
    first, second = (quick("--seed", "3", "--arms", "interleaved", out=name)[1][:-1] for name in ("a", "b"))
    assert first == second
    other = quick("--seed", "4", "--arms", "interleaved", "--steps", "1")[1][1:2]
    assert [event | {"seed": 3} for event in other] != first[1:2]  # they differ in more than that


def test_several_seeds_are_the_runs_of_each(quick, capsys):
    _, both = quick("--seeds", "1,3", "--steps", "1", out="both")
    table = capsys.readouterr().out.split("down-at")[1]
    assert "rl           1" in table and "interleaved  3" in table
    alone = [event for seed in "13" for event in quick("--seed", seed, "--steps", "1", out=seed)[1][1:-1]]
    assert both[1:-1] == alone and {event["seed"] for event in alone} == {1, 3}
    assert toolrl.read_seeds(Settings(seeds="0-3,7,2")) == [0, 1, 2, 3, 7] and toolrl.read_seeds(Settings(seed=4)) == [
        4
    ]


def test_the_stress_test_has_a_column_for_each_policy(quick, capsys):
    code, events = quick("--stress", "--steps", "1")
    (found,) = (event["success"] for event in events if event["event"] == "stress")
    assert code == 0 and list(found) == ["base, step 0", "rl, step 1", "interleaved, step 1"]
    assert "another order of keys" in capsys.readouterr().out


def test_the_stress_test_takes_each_arm_at_its_best(quick, monkeypatch):
    real, successes = toolrl.evaluate, iter([0.5, 0.2, 0.9, 0.1, 0.3, 0.3, 0.2])
    monkeypatch.setattr(toolrl, "evaluate", lambda *args: real(*args) | {"success": next(successes)})
    monkeypatch.setattr(toolrl, "stress", lambda *_: {"as trained": dict.fromkeys(("free", "prefill", "forced"), 0.0)})
    _, events = quick("--stress", "--steps", "3")
    (found,) = (event["success"] for event in events if event["event"] == "stress")
    assert list(found) == ["base, step 0", "rl, step 2", "interleaved, step 2"]


def test_a_warning_is_printed_once_an_arm(quick, monkeypatch, capsys):
    monkeypatch.setattr(toolrl, "early_warning", lambda strays: "stray tokens" if len(strays) == 2 else None)
    quick("--steps", "4", "--arms", "rl")
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "rl             2  early warning: in rollouts, stray tokens" in out


def test_plot_draws_or_says_what_is_missing(quick, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.png"
    pytest.importorskip("matplotlib")
    assert quick("--plot", str(path), "--seeds", "0-1", "--steps", "1")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    for bad in (os.path.join("no", "folder", "run.png"), str(tmp_path / "run.magic")):
        capsys.readouterr()
        code, events = quick("--plot", bad, out="unplotted")
        error = capsys.readouterr().err
        assert (code, events) == (2, []) and "name a file such as run.png" in error and error.count("\n") == 1


def test_plot_without_matplotlib_is_one_line(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, events = quick("--plot", str(tmp_path / "run.png"))
    assert (code, events) == (2, []) and "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "-1"], "--steps -1"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "inf"], "--lr inf"),
        (["--no-call-share", "1.5"], "from 0 to 1"),
        (["--arms", "rl,magic"], "unknown arm 'magic'"),
        (["--arms", ""], "unknown arm ''"),
        (["--arms", "rl,rl"], "repeated arm 'rl'"),
        (["--device", "tpu"], "--device tpu"),
        (["--tasks", "nowhere.json"], "nowhere.json"),
        (["--tasks", HERE], "directory"),
        (["--out", os.path.join("no", "folder", "x.jsonl")], "folder that exists"),
        (["--magic"], "--magic"),
        (["--min-calls", "9"], "--min-calls 9"),
        (["--seeds", "3-1"], "'3-1' is neither a number nor a range"),
        (["--seeds", "1,,2"], "'' is neither a number nor a range"),
        (["--seeds", "-4"], "'-4' is neither"),
        (["--seeds", "3-"], "'3-' is neither"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(HERE)
    assert toolrl.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_broken_json_is_bad_input(tmp_path, capsys):
    path = tmp_path / "tasks.json"
    path.write_text('{"tools": [')
    assert toolrl.main(["--tasks", str(path)]) == 2
    assert "not valid JSON" in capsys.readouterr().err


STORY = "config eval step eval step eval verdict stress done".split()


@pytest.mark.parametrize(
    "phase, call, left",
    [
        ("load_world", 1, 0),  # Ctrl-C during the call number `call` of `phase` leaves the first `left` events
        ("new_policy", 1, 1),
        ("evaluate", 1, 1),
        ("advance", 1500, 2),
        ("optimise", 2, 2),
        ("grpo_update", 2, 4),
        ("gold_batch", 1, 4),
        ("control_probabilities", 2, 3),
        ("early_warning", 2, 5),
        ("judge", 1, 6),
        ("ladder", 1, 7),
        ("stress", 2, 7),
        ("stress_table", 1, 8),
        ("plot", 2, 7),
    ],
)
def test_ctrl_c_in_any_phase_leaves_what_was_measured(quick, monkeypatch, capsys, tmp_path, base, phase, call, left):
    real, calls, there, out = getattr(toolrl, phase), [], [], tmp_path / "run.jsonl"

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            there.extend(out.read_text().splitlines() if out.exists() else [])
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background without it
    if phase == "plot":
        pytest.importorskip("matplotlib")
    if phase == "new_policy":  # inside the training of the base
        monkeypatch.setattr(toolrl, "train_base", lambda *_: toolrl.new_policy())
    monkeypatch.setattr(toolrl, phase, interrupted)
    plot = ["--plot", str(tmp_path / "run.png")] if phase == "plot" else []
    code, events = quick(
        "--arms", "interleaved", "--eval-episodes", "4", *["--stress"] * phase.startswith("stress"), *plot
    )
    assert code == 130 and [event["event"] for event in events] == STORY[:left]
    assert len(there) == left  # each line is on disk as soon as it is measured
    error = capsys.readouterr().err
    assert error.startswith("toolrl: stopped") and error.count("\n") == 1 and len(calls) == call


def test_a_seed_whose_base_is_not_ready_is_left_out_of_several(quick, monkeypatch, capsys, base):
    def train_base(world, tokenizer, settings, *_):
        if settings.seed == 1:
            raise toolrl.NotReady("not today")
        return copy.deepcopy(base), 60

    monkeypatch.setattr(toolrl, "train_base", train_base)
    code, events = quick("--seeds", "0-2", "--arms", "rl")
    printed = capsys.readouterr()
    assert code == 0 and printed.err == "toolrl: seed 1 is left out: not today\n"
    assert {event["seed"] for event in events if event["event"] == "eval"} == {0, 2}
    assert "rl   2     " in printed.out.split("down-at")[1] and "rl   1     " not in printed.out.split("down-at")[1]


def test_several_seeds_and_no_base_ready_is_a_failed_run(quick, monkeypatch, capsys):
    def train_base(*_):
        raise toolrl.NotReady("not today")

    monkeypatch.setattr(toolrl, "train_base", train_base)
    code, events = quick("--seeds", "0,1")
    assert code == 1 and "none of these seeds" in capsys.readouterr().err.splitlines()[-1]
    assert [event["event"] for event in events] == ["config"]


@pytest.mark.parametrize("arm, step", [("rl", 1), ("interleaved", 2)])
def test_a_loss_that_is_nan_names_arm_and_step(quick, monkeypatch, capsys, arm, step):
    real, calls = toolrl.optimise, []

    def optimise(policy, optimizer, loss):
        calls.append(1)
        return real(policy, optimizer, loss * (math.nan if len(calls) > 4 * (step - 1) else 1))

    monkeypatch.setattr(toolrl, "optimise", optimise)
    code, events = quick("--arms", arm)
    error = capsys.readouterr().err
    assert code == 1 and f"{arm}, RL step {step}: the loss is nan" in error and error.count("\n") == 1
    assert events[-1]["event"] == "eval" and events[-1]["step"] == step - 1


def test_a_closed_pipe_and_a_full_disk_are_one_line(elsewhere, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    closing = "import sys, toolrl; toolrl.train_base = lambda *_: print('x' * 100_000, flush=True); toolrl.main([])"
    filling = "import toolrl; raise SystemExit(toolrl.main(['--out', '/dev/full']))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": HERE})
    closed, full = (subprocess.Popen([sys.executable, "-c", code], **pipes) for code in (closing, filling))
    closed.stdout.readline()
    closed.stdout.close()
    assert closed.stderr.read() == "toolrl: stopped: whoever read the output has closed it\n"
    assert full.communicate()[1] == "toolrl: [Errno 28] No space left on device\n" and full.returncode == 1


def test_no_network_is_touched(quick, monkeypatch):
    import socket

    def blocked(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    assert quick("--stress", "--arms", "interleaved", "--steps", "1", "--eval-episodes", "2")[0] == 0


def test_a_base_that_is_not_ready_says_so(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    assert toolrl.main(["--base-steps", "2"]) == 1
    assert "not ready after 2 updates: forced success is 0.0" in capsys.readouterr().err


def test_every_setting_has_a_flag_and_a_help_text(capsys):
    with pytest.raises(SystemExit) as stop:
        toolrl.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for setting in dataclasses.fields(Settings):
        assert "--" + setting.name.replace("_", "-") in text and setting.metadata["unit"] in text.replace("\n", " ")


# %% README


def text_of(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def fenced(language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of("README.md"), re.DOTALL | re.MULTILINE)


def commands():
    """Every `python toolrl.py ...` of the README, in its code blocks and in its tables."""
    text = text_of("README.md")
    inline = [" ".join(found.split()) for found in re.findall(r"`(python\s+toolrl\.py[^`]*)`", text)]
    return list(
        dict.fromkeys(inline + [c for b in fenced("sh") for c in b.splitlines() if c.startswith("python toolrl.py")])
    )


def banners():
    return re.findall(r"^# %% (.*?):", text_of("toolrl.py"), re.MULTILINE)


def test_the_sections_of_file_and_readme_bear_the_same_names():
    story = text_of("README.md").split("## The story, section by section")[1].split("\n## ")[0]
    assert re.findall(r"^### (.*)$", story, re.MULTILINE) == banners() and len(banners()) == 12


def test_the_cells_run_one_after_another_in_a_notebook(elsewhere, monkeypatch, base, capsys):
    """As an editor runs them: one namespace, __name__ is __main__, and the arguments of the kernel in sys.argv."""
    source = text_of("toolrl.py").replace("= knob(40,", "= knob(2,").replace("= knob(128,", "= knob(8,")
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cells, namespace = re.split(r"^(?=# %% )", source, flags=re.MULTILINE), {"__name__": "__main__"}
    for cell in cells:
        if cell.startswith("# %% Report"):
            namespace["train_base"] = toolrl.train_base
        exec(compile(cell, cell.splitlines()[0], "exec"), namespace)
    assert len(cells) == 13 and "claim" in capsys.readouterr().out


def run_short(module, command):
    """A command of the README with fewer steps and seeds."""
    arguments = shlex.split(command)[2:]
    if "--seeds" in arguments:
        arguments += ["--seeds", "0-1"]
    return module.main(arguments + SHORT)


@pytest.fixture
def elsewhere(monkeypatch, base, tmp_path):
    """An empty folder with a copy of the tasks, and a base that is trained beforehand."""
    monkeypatch.setattr(toolrl, "train_base", lambda *_: (copy.deepcopy(base), 60))
    for name in ("tiny_tasks.json", "my_tasks.json"):
        shutil.copy(TASKS, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_slow_every_command_of_the_readme_runs(elsewhere, command):
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    if "--help" in command:
        with pytest.raises(SystemExit):
            toolrl.main(["--help"])
    else:
        assert run_short(toolrl, command) == 0


def shortened(snippet):
    for long, short in (("eval_episodes=600", "eval_episodes=20"), ("REPEATS = 12", "REPEATS = 1")):
        snippet = snippet.replace(long, short)
    return snippet


def test_slow_the_readmes_snippets_run_on_the_files_of_its_commands(elsewhere, capsys, monkeypatch):
    for command in commands():
        if "--out all.jsonl" in command or "--out warning.jsonl" in command:
            assert run_short(toolrl, command) == 0
    capsys.readouterr()
    ran = 0
    for snippet in fenced("python"):
        if not snippet.startswith("# check"):
            exec(compile(shortened(snippet), "README.md", "exec"), {})
            ran += 1
            assert len(capsys.readouterr().out) > 20
    assert ran >= 3


def patched(diff):
    """toolrl with a diff of the README applied: its context has to be found, exactly once."""
    source = text_of("toolrl.py")
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
        new = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("toolrl")
    sys.modules["toolrl"] = module  # dataclasses look their module up; the caller puts the real one back
    exec(compile(source, "patched toolrl.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("diff", fenced("diff"))
def test_slow_every_diff_of_the_readme_applies_and_runs(elsewhere, monkeypatch, base, diff):
    monkeypatch.setitem(sys.modules, "toolrl", toolrl)
    module = patched(diff)
    monkeypatch.setattr(module, "train_base", lambda *_: (copy.deepcopy(base), 60))
    assert run_short(module, "python toolrl.py --arms rl,interleaved") == 0


@pytest.mark.parametrize("check", [text for text in fenced("python") if text.startswith("# check")])
def test_slow_the_check_of_an_exercise_accepts_its_answer_and_nothing_less(elsewhere, monkeypatch, check):
    monkeypatch.setitem(sys.modules, "toolrl", toolrl)
    with pytest.raises((AssertionError, AttributeError)):
        exec(compile(check, "check", "exec"), {})
    answer = re.search(r"^```diff\n(.*?)^```", text_of("README.md").split(check)[1], re.DOTALL | re.MULTILINE)
    patched(answer[1])
    exec(compile(check, "check", "exec"), {})


def test_slow_the_full_story(tmp_path):
    """The command of the README, as a user runs it: base, collapse, fix, and the verdicts on them."""
    out = tmp_path / "run.jsonl"
    done = subprocess.run(
        [sys.executable, "toolrl.py", "--device", "cpu", "--out", str(out)], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in out.read_text().splitlines()]
    found = {event["claim"]: event["reproduced"] for event in events if event["event"] == "verdict"}
    assert [found[claim] for claim in ("collapse", "control_tokens", "intact", "fix")] == [True] * 4, done.stdout
