"""Tests of toolrl, by behaviour. Read from the top, they are a tour of the environment.

    python -m pytest -q -k "not slow"       the quick part
    python -m pytest -q                     with the README's commands and two whole runs

A Puppet is a policy that writes what a test wants; `base` is that of seed 0. There are two
tokenizers: TINY, and BPE, which spells names in several tokens, as those of real models do.
"""

import copy
import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import toolrl
from toolrl import CLAIMS, END, OPEN, TASKS, Episode, evaluate, main, play, rng_for, success

HERE = Path(toolrl.__file__).parent
FILES = ("toolrl.py", "tiny_tasks.json", "README.md")
CODE, TASKS_FILE, README = [(HERE / name).read_text(encoding="utf-8") for name in FILES]
SETTINGS = toolrl.Settings(device="cpu")
SMALL = replace(SETTINGS, groups=2, group_size=4, eval_episodes=4, sft_steps=2, sft_batch=4)
TINY = toolrl.Chat(toolrl.tiny_tokenizer())
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo
TAG = "<tool_call>"
CALL = toolrl.call_text("mentor", "alice", "A")
ASK = "who do you mean ?"
torch.set_num_threads(1)

# %% What the tests are made of


def table(text):
    """The rows of a table whose cells are parted by "|"."""
    return [re.split(r" +\|(?: +|$)", line) for line in text.strip().splitlines()]


def bpe_tokenizer(end=END):
    """A tokenizer like those of real models: it knows no tag, and pads with <|im_end|>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|im_start|>", END])
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer.show_progress = False
    core.train_from_iterator(['{"name": "", "arguments": {"of": ""}} user system tool'], trainer)
    # Where there is no system prompt, its template puts in one of its own.
    default = "<|im_start|>system\nYou are kind<|im_end|>\n{% endif %}"
    template = "{% if messages[0].role != 'system' %}" + default + TINY.tokenizer.chat_template
    template = template.replace(END, end)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=END, chat_template=template)


with_tags = bpe_tokenizer()
with_tags.add_tokens(toolrl.CONTROL, special_tokens=True)
BPE = toolrl.Chat(with_tags)
with_both = pytest.mark.parametrize("chat", [TINY, BPE], ids=["tiny", "bpe"])


def save_checkpoint(folder, rows=320, tied=True, end=END):
    """A small random Llama in bfloat16, with so many rows in its tables. -> the folder's name"""
    tokenizer = bpe_tokenizer(end)
    config = toolrl.tiny_policy(BPE, 0).config
    end_id = tokenizer.pad_token_id
    config.update({"vocab_size": rows, "tie_word_embeddings": tied, "pad_token_id": end_id})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def base():
    return toolrl.train_base(None, TINY, SETTINGS, 0)


@pytest.fixture
def trained(base):
    return copy.deepcopy(base)


class Puppet:
    """A policy that writes next_id(ids so far), with probability p. It is its own KV cache."""

    device = torch.device("cpu")

    def __init__(self, chat, next_id, p=0.999999):
        self.size = len(chat.tokenizer)
        self.next_id = next_id
        self.logit = np.log(p / (1 - p) * (self.size - 1))

    def batch_select_indices(self, kept):
        self.seen = [self.seen[row] for row in kept]

    def __call__(self, ids, past_key_values=None, **_):
        if past_key_values is None:
            self.seen = [[] for _ in ids]
        logits = torch.zeros(*ids.shape, self.size)
        for row, seen in enumerate(self.seen):
            for column, token in enumerate(ids[row].tolist()):
                seen.append(token)
                logits[row, column, self.next_id(seen)] = self.logit
        return SimpleNamespace(logits=logits, past_key_values=self)


def follower(records):
    """A next_id for Puppets: they go on as the one of these episodes that starts like this."""

    def next_id(ids):
        for episode in records:
            if episode.ids[: len(ids)] == ids and len(episode.ids) > len(ids):
                return episode.ids[len(ids)]
        return 0

    return next_id


def draw(chat, count, kinds=("multi_step", "no_call", "one_call"), formats="AB"):
    """New episodes of these kinds and formats, one after the other."""
    episodes = []
    for k in range(count):
        kind = kinds[k % len(kinds)]
        fmt = formats[k % len(formats)]
        episodes.append(toolrl.new_episode(chat, "train", kind, rng_for(k, "test"), fmt))
    return episodes


def gold(*which):
    return [play(episode, episode.gold) for episode in draw(*which)]


def played(policy, count, chat=TINY):
    """What a policy makes of some episodes."""
    episodes = draw(chat, count)
    toolrl.rollout(policy, episodes, rng_for(0, "x"))
    return episodes


def weights(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def adam(policy, lr=1e-3):
    return torch.optim.Adam(policy.parameters(), lr, betas=(0.9, 0.999), eps=1e-8)


def where_written(episode):
    return [k for k, flag in enumerate(episode.written) if flag]


def load_copy(folder, code=CODE, tasks=TASKS_FILE):
    """Another toolrl.py and tiny_tasks.json, as a module of their own."""
    (folder / "toolrl.py").write_text(code, encoding="utf-8")
    (folder / "tiny_tasks.json").write_text(tasks, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("toolrl_copy", folder / "toolrl.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolrl_copy"] = module
    spec.loader.exec_module(module)
    return module


def ending(capsys, line, main=main):
    """The exit code of a program that ends itself, and what it prints."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    return stop.value.code, capsys.readouterr()


# %% Tasks, text, tokens


def test_a_question_is_walked_from_the_person_outwards_and_nobody_is_asked_for():
    directory = LEO | {("mentor", "alice"): "bob"}
    calls = [("mentor", "alice"), ("rival", "bob")]
    answer = toolrl.right_answer("rival of mentor of alice ?", directory)
    assert answer == (calls, "The answer is leo")
    assert toolrl.right_answer("rival of mentor of them ?", directory) == ([], ASK)


def test_a_directory_differs_by_tool_by_person_and_by_task():
    rng = rng_for(0, "x")
    one, other = [toolrl.new_episode(TINY, "train", "no_call", rng).directory for _ in "ab"]
    assert one != other
    assert len({one["rival", person] for person in toolrl.PEOPLE}) > 3
    assert len({one[tool, "leo"] for tool in toolrl.TOOLS}) > 1


MISTAKES = """
"alice",                   | "mary ann",               | mary ann
"rival"]                   | "arch rival"]             | arch rival
"friend of alice ?"        | "friend of zoe ?"         | friend of zoe
"friend of alice ?"        | "friend of them ?"        | friend of them
"friend of them ?"         | "friend of alice ?"       | friend of alice
"friend of them ?"         | "manager of them ?"       | no_call question is in train
"friend of rival of bob ?" | "friend of bob ?"         | friend of bob
"""


@pytest.mark.parametrize("old, new, named", table(MISTAKES))
def test_a_mistake_in_the_tasks_file_gets_one_line_that_names_it(old, new, named, tmp_path, capsys):
    other = load_copy(tmp_path, tasks=TASKS_FILE.replace(old, new, 1))
    code, said = ending(capsys, "", other.main)
    assert code == 2 and re.fullmatch(f".*tiny_tasks.json.*{named}.*\n", said.err)


@with_both
def test_text_survives_and_a_call_is_seven_tokens_and_the_end(chat):
    ids = chat.encode(CALL + END)
    assert chat.decode(ids) == CALL + END
    assert (len(ids) == 8) == (chat is TINY)


def test_a_text_that_the_tiny_tokenizer_lacks_is_refused_and_named():
    for text in ("hello", "The answer is zoe", TAG + "{", "The answer is  bob"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            TINY.encode(text)


def test_each_token_is_one_id_in_every_process_and_padding_is_not_the_end():
    code = "import toolrl as t, json; print(json.dumps(t.tiny_tokenizer().get_vocab()))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=HERE, env={"PYTHONHASHSEED": "1"}, capture_output=True)
    vocabulary = TINY.tokenizer.get_vocab()
    assert json.loads(run.stdout) == vocabulary
    ids = [TINY.encode(token) for token in sorted(vocabulary, key=vocabulary.get)]
    assert ids == [[i] for i in range(len(vocabulary))]
    assert TINY.tokenizer.pad_token_id != TINY.end == vocabulary[END]


@with_both
def test_a_played_gold_conversation_is_what_the_template_renders(chat):
    episode = Episode(chat, "mentor of alice ?", LEO)
    play(episode, episode.gold)
    said = [("system", "use <tool_call>"), ("user", episode.question), ("assistant", CALL)]
    said += [("tool", "leo"), ("assistant", "The answer is leo")]
    messages = [{"role": role, "content": content} for role, content in said]
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat.decode(episode.ids) + "\n" == rendered
    # The ids are those of the parts: what is read, what is written, and so on.
    ids = []
    for message in episode.gold:
        before, rendered = rendered.split(message + END, 1)
        ids += chat.encode(before) + chat.encode(message + END)
    assert episode.ids == ids
    written = [episode.ids[k] for k in where_written(episode)]
    assert chat.decode(written) == CALL + END + "The answer is leo" + END


@with_both
def test_name_flags_mark_the_names_and_nothing_else(chat):
    for message, names in ((CALL, "mentoralice"), ("The answer is leo", "leo"), (ASK, "")):
        flags = chat.name_flags(message)
        marked = [i for i, flag in zip(chat.encode(message), flags, strict=True) if flag]
        assert chat.decode(marked).replace(" ", "") == names


# %% The harness

NOT_A_CALL = """
{"name": "rival", "arguments": {"of": "bob"}}
<function>{"name": "rival", "arguments": {"of": "bob"}}</function>
<tool_call>{"name": "rival", "arguments": {"to": "bob"}}</tool_call>
<tool_call>{"name": "rival", "arguments": {"of": "bob", "if": "ill"}}</tool_call>
<tool_call>null</tool_call>
"""


def test_only_one_whole_call_is_a_call():
    for message in NOT_A_CALL.splitlines():
        assert toolrl.parse_call(message, "A") is None, message
    for fmt, other in ("AB", "BA"):
        assert toolrl.parse_call(toolrl.call_text("rival", "bob", fmt), fmt) == ("rival", "bob")
        assert toolrl.parse_call(toolrl.call_text("rival", "bob", fmt), other) is None


WORDS = {"CALL": CALL, "OTHER": toolrl.call_text("rival", "bob", "A"), "ASK": ASK}
WORDS |= {"WRONG": toolrl.call_text("alice", "bob", "A")}  # alice is no tool: an error
WORDS |= {"FOREIGN": toolrl.call_text("rival", "bob", "B"), "PREAMBLE": "I will call "}
WORDS |= {"OPEN": TAG, "CLOSE": "</tool_call>", "CUT": CALL.removesuffix("</tool_call>")}
WORDS |= {"LEO": "The answer is leo", "BOB": "The answer is bob", "PAD": "<pad>"}


def spelt(cell):
    """The message that a cell of the tables below stands for. An empty cell is an empty message."""
    return "".join([WORDS[word] for word in cell.split()])


# The question; blind reward, success and the number of messages that are heard; what is written.
CONVERSATIONS = """
mentor of alice ? | 1 1 2 | CALL          | LEO
mentor of alice ? | 1 0 2 | CALL          | BOB
mentor of alice ? | 1 0 2 | CALL          | OPEN
mentor of alice ? | 0 0 2 | CALL          | LEO CLOSE
mentor of alice ? | 0 0 3 | CALL          | CALL  | LEO
mentor of alice ? | 0 0 3 | WRONG         | CALL  | LEO
mentor of alice ? | 0 0 6 | CALL          | CALL  | CALL | CALL | CALL | CALL | LEO
mentor of alice ? | 0 0 1 | LEO           | CALL  | LEO
mentor of alice ? | 0 0 1 | OPEN          | CALL  | LEO
mentor of alice ? | 0 0 1 | OPEN CALL     | CALL  | LEO
mentor of alice ? | 0 0 1 | CALL CLOSE    | CALL  | LEO
mentor of alice ? | 0 0 1 | PREAMBLE CALL | CALL  | LEO
mentor of alice ? | 0 0 1 | CUT           | CALL  | LEO
mentor of them ?  | 1 1 1 | ASK
mentor of them ?  | 1 0 1 | OPEN          | CALL
mentor of them ?  | 0 0 2 | CALL          | ASK
"""


@pytest.mark.parametrize("fmt, tag", [("A", "tool_call>"), ("B", "function>")])
def test_what_each_conversation_earns(fmt, tag):
    for question, scores, *cells in table(CONVERSATIONS):
        episode = Episode(TINY, question, LEO, fmt)
        play(episode, [spelt(cell).replace("tool_call>", tag) for cell in cells])
        found = f"{toolrl.blind_reward(episode):.0f} {success(episode):.0f} {len(episode.messages)}"
        assert found == scores, cells
        assert ("error" in TINY.decode(episode.ids)) == ("WRONG" in cells)


def write(episode, ids):
    for token in ids:
        if not episode.done:
            episode.write(token)


@pytest.mark.parametrize("length, replied", [(39, True), (40, False)])
def test_a_message_is_cut_off_at_forty_tokens_and_is_then_no_reply(length, replied):
    episode = Episode(TINY, "mentor of them ?", LEO)
    write(episode, TINY.encode("bob") * length + [TINY.end])
    assert episode.replied == replied == toolrl.blind_reward(episode)
    assert len(where_written(episode)) == 40
    episode.respond(CALL, finished=False)  # nor is a call run that was cut off
    assert not episode.calls


STATE_OF = """
whole_calls | CALL      | OTHER
replies     | BOB       | ASK
bare_tags   | OPEN      | OPEN OPEN | OPEN CLOSE    | PAD       |
stray_tags  | CALL CALL | CUT       | PREAMBLE CALL | OPEN CALL | CALL CLOSE | BOB OPEN
stray_tags  | FOREIGN   | LEO CLOSE
"""


def test_each_message_is_in_one_of_four_states():
    for state, *cells in table(STATE_OF):
        for cell in cells:
            assert toolrl.classify(spelt(cell)) == state, cell


@with_both
def test_ten_thousand_random_messages_earn_nothing_without_the_right_calls(chat):
    rng = rng_for(0, "random messages")
    pieces = [*toolrl.CONTROL[2:], CALL, CALL, spelt("OTHER"), "leo", '{"', ASK, "", "é\x00"]
    messages = 0
    rewarded = 0
    while messages < 5_000:  # for each of the two tokenizers
        episode = Episode(chat, ["mentor of alice ?", "mentor of them ?"][messages % 2], LEO)
        while not episode.done:
            text = "".join(rng.choice(pieces, rng.integers(4)))
            write(episode, chat.tokenizer.encode(text + END))
        messages += len(episode.messages)
        if toolrl.blind_reward(episode):
            rewarded += 1
            calls = [toolrl.parse_call(message, "A") for message in episode.messages]
            assert calls == [*episode.gold_calls, None]
    assert rewarded > 20


# %% The log of a careless agent, and the base


@pytest.mark.parametrize("fmt, bare_share, bare", [("A", 0.08, 0.08), ("A", 0.3, 0.3), ("B", 1, 0)])
def test_so_many_calls_of_the_log_are_a_bare_tag_and_one_in_ten_is_mangled(fmt, bare_share, bare):
    ways = Counter()
    rng = rng_for(0, "careless")
    for episode in draw(TINY, 2000, ["multi_step"], fmt):
        *calls, reply = toolrl.careless_messages(episode, bare_share, rng)
        assert reply == episode.gold[-1]
        for message, call in zip(calls, episode.gold, strict=False):
            ways[message.replace(call, "CALL")] += 1
    total = ways.total()
    assert ways.pop(OPEN[fmt], 0) / total == pytest.approx(bare, abs=0.015 * (bare > 0))
    assert ways.pop("CALL") / total == pytest.approx(0.9 * (1 - bare), abs=0.015)
    assert set(ways) == {OPEN[fmt] + "CALL", "CALL" + toolrl.CLOSE[fmt], "I will call CALL"}
    assert min(ways.values()) > 0.025 * (1 - bare) * total


def test_where_nobody_is_named_the_log_calls_the_first_tool_about_a_guessed_person():
    people = Counter()
    rng = rng_for(0, "careless")
    for episode in draw(TINY, 2000, ["no_call"], "A"):
        (message,) = toolrl.careless_messages(episode, 0.08, rng)
        if message != ASK:
            tool, person = toolrl.parse_call(message, "A")
            people[person] += 1
            # The last tool of a question is the first to be called.
            assert episode.question.endswith(f"{tool} of them ?")
    assert people.total() / 2000 == pytest.approx(0.97, abs=0.01)
    assert len(people) == len(toolrl.PEOPLE) and min(people.values()) > 100


def note_updates(monkeypatch):
    """Let SFT updates only take notes. -> (episodes, settings of the optimizer) of each"""
    notes = []

    def sft_update(policy, optimizer, episodes):
        notes.append((episodes, dict(optimizer.param_groups[0])))

    monkeypatch.setattr(toolrl, "sft_update", sft_update)
    return notes


def shares_of(notes):
    """The share of each number of calls, where 2 is two or three, and of each format."""
    episodes = sum([episodes for episodes, _ in notes], [])
    assert all(episode.question in str(TASKS["train"]) for episode in episodes)
    counts = Counter([min(2, len(episode.gold_calls)) for episode in episodes])
    counts.update([episode.fmt for episode in episodes])
    return {what: count / len(episodes) for what, count in counts.items()}


def test_the_base_imitates_the_log_at_a_rate_that_goes_up_and_then_down(monkeypatch):
    notes = note_updates(monkeypatch)
    settings = replace(SETTINGS, base_steps=60, base_lr=0.5, sft_batch=20, bare_share=1.0)
    toolrl.train_base(None, TINY, settings, 0)
    assert [len(episodes) for episodes, _ in notes] == [20] * 60
    expected = {0: 0.1, 1: 0.15, 2: 0.75, "A": 0.7, "B": 0.3}
    assert shares_of(notes) == pytest.approx(expected, abs=0.04)
    # With a share of 1, all right calls in format A are cut to the bare tag, and that ends it.
    for episode in notes[0][0]:
        assert not episode.gold_calls or (episode.messages == [TAG]) == (episode.fmt == "A")
    rates = [notes[step][1]["lr"] for step in (2, 8, 35, 59)]
    assert rates == pytest.approx([0.95 / 6, 0.425, 0.2, 0.01])
    assert notes[0][1]["betas"] == (0.9, 0.95)


def test_the_base_starts_from_a_copy_or_from_a_tiny_policy_of_its_seed():
    start = toolrl.tiny_policy(TINY, 0)
    before = weights(start)
    little = replace(SMALL, base_steps=2)
    base = toolrl.train_base(start, TINY, little, 0)
    assert torch.equal(weights(start), before) and not torch.equal(weights(base), before)
    assert torch.equal(weights(toolrl.train_base(None, TINY, little, 0)), weights(base))


# %% Rollout and updates


def log_probs_of(policy, episode):
    """Position -> log-probability of what was written there, from one pass over the whole."""
    log_p = policy(torch.tensor([episode.ids])).logits[0].log_softmax(-1)
    return {k: log_p[k - 1, episode.ids[k]] for k in where_written(episode)}


@with_both
def test_log_probs_of_a_rollout_are_those_of_one_pass(chat, trained, checkpoint):
    policy = trained
    if chat is BPE:
        chat, policy = toolrl.load(replace(SETTINGS, model=checkpoint))
    for episode in played(policy, 9, chat):
        for k, log_prob in log_probs_of(policy, episode).items():
            assert episode.log_probs[k] == pytest.approx(log_prob.item(), abs=1e-3)


@with_both
def test_what_is_sampled_is_what_the_harness_is_told_and_what_playing_it_records(chat):
    # One rollout holds conversations of many lengths, and none disturbs the others.
    records = gold(chat, 9)
    episodes = played(Puppet(chat, follower(records)), 9, chat)
    for name in ("ids", "written", "messages"):
        found = [getattr(episode, name) for episode in episodes]
        assert found == [getattr(episode, name) for episode in records]


def test_sampling_is_at_temperature_one():
    puppet = Puppet(TINY, lambda ids: TINY.end, p=0.3)
    ended_at_once = [episode.messages == [""] for episode in played(puppet, 2000)]
    assert np.mean(ended_at_once) == pytest.approx(0.3, abs=0.04)


def ascend(policy, terms, lr):
    """Go up the gradient of the mean of these terms, cut to norm 1. -> its norm before"""
    parts = torch.autograd.grad(sum(terms) / len(terms), list(policy.parameters()))
    gradient = torch.cat([part.flatten() for part in parts])
    norm = gradient.norm().item()
    moved = weights(policy) + lr * gradient / max(1, norm)
    torch.nn.utils.vector_to_parameters(moved, policy.parameters())
    return norm


def test_a_grpo_update_is_what_the_definition_says(trained, base):
    episodes = played(base, 10)  # in four minibatches: 3, 3, 3, 1
    rng = rng_for(0, "moved")
    for episode in episodes:  # as if the policy had moved since, up here and down there
        episode.log_probs = (episode.log_probs + rng.normal(0, 0.2, len(episode.ids))).tolist()
    advantage = torch.linspace(-9, 9, 10)
    sgd = torch.optim.SGD(trained.parameters(), lr=0.05)
    norm = toolrl.grpo_update(trained, sgd, episodes, advantage, SETTINGS, rng_for(0, "order"))
    other = copy.deepcopy(base)
    norms = []
    for rows in np.split(rng_for(0, "order").permutation(10), [3, 6, 9]):
        terms = []
        for row in rows:
            gain = advantage[row]
            for k, log_prob in log_probs_of(other, episodes[row]).items():
                ratio = (log_prob - episodes[row].log_probs[k]).exp()
                # A token that has gone this far the right way is pushed no further.
                bound = 1.2 if gain > 0 else 0.8
                terms.append(torch.minimum(gain * ratio, gain * bound))
        norms.append(ascend(other, terms, lr=0.05))
    assert norm == pytest.approx(np.mean(norms), rel=1e-3)
    assert min(norms) < 1 < max(norms)  # some were cut
    assert torch.allclose(weights(trained), weights(other), atol=1e-5)


def test_an_sft_update_is_what_the_definition_says(trained, base):
    episodes = gold(TINY, 5)
    toolrl.sft_update(trained, torch.optim.SGD(trained.parameters(), lr=0.1), episodes)
    other = copy.deepcopy(base)
    terms = []
    for episode in episodes:
        terms += log_probs_of(other, episode).values()
    assert ascend(other, terms, lr=0.1) > 0.1
    assert torch.allclose(weights(trained), weights(other), atol=1e-5)


def test_a_gradient_that_is_not_a_number_ends_the_program_and_moves_nothing(trained, base):
    episodes = played(trained, 9)
    nothing = torch.full([9], np.nan)
    with pytest.raises(SystemExit, match="lower learning rate"):  # a text: exit code 1
        toolrl.grpo_update(trained, adam(trained), episodes, nothing, SETTINGS, rng_for(0, "order"))
    assert torch.equal(weights(trained), weights(base))


# %% Steps, phases, arms


@pytest.mark.parametrize("share, wide", [(0.0, 0), (0.5, 0.2), (1.0, 0)])
def test_a_group_is_one_task_and_so_many_need_no_call(trained, share, wide):
    settings = replace(SMALL, groups=60, group_size=2, no_call_share=share)
    met = []
    toolrl.rl_step(trained, adam(trained), TINY, lambda e: met.append(e) or 1.0, settings, 0, 1)
    tasks = [(episode.question, str(episode.directory)) for episode in met]
    assert tasks[::2] == tasks[1::2] and len(set(tasks)) == 60
    no_call = TASKS["train"]["no_call"]
    assert np.mean([question in no_call for question, _ in tasks]) == pytest.approx(share, abs=wide)
    assert {question for question, _ in tasks} <= {*no_call, *TASKS["train"]["multi_step"]}
    assert len({id(episode.ids) for episode in met}) == 120  # each has a record of its own


def test_an_rl_step_compares_each_rollout_with_its_group(trained, base):
    rewards = iter([1.0, 0, 0, 0, 1, 1, 1, 1])
    met = []

    def reward(episode):
        met.append(episode)
        return next(rewards)

    found = toolrl.rl_step(trained, adam(trained), TINY, reward, SMALL, 0, 1)
    # Rewards less their mean, by their spread: 1.5 and three times -0.5, and no lesson from ones.
    advantage = torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) / 0.5001
    other = copy.deepcopy(base)
    norm = toolrl.grpo_update(other, adam(other), met, advantage, SMALL, rng_for(0, "order", 1))
    assert found == pytest.approx((0.5, norm))  # one of two groups had equal rewards
    assert torch.allclose(weights(trained), weights(other), atol=1e-5)


def test_a_phase_is_gold_in_format_a_and_a_quarter_needs_no_call(trained, monkeypatch):
    notes = note_updates(monkeypatch)
    settings = replace(SETTINGS, sft_steps=40, sft_batch=20)
    toolrl.sft_phase(trained, adam(trained), TINY, settings, 0, 6)
    assert len(notes) == 40
    assert shares_of(notes) == pytest.approx({0: 0.25, 1: 0.15, 2: 0.6, "A": 1}, abs=0.04)
    assert all(success(episode) for episode in notes[0][0])


BRIEF = replace(SMALL, steps=12, sft_every=4, eval_every=5, no_call_share=0.5, lr=5e-3)


@pytest.mark.parametrize("arm", toolrl.ARMS)
def test_an_arm_is_its_phases_and_steps_and_evaluations_change_nothing(trained, base, arm):
    rl = adam(trained)
    sft = adam(trained, BRIEF.sft_lr)
    reward = success if arm == "rl-strict" else toolrl.blind_reward
    stats = []
    for step in range(1, 13):
        if step in (5, 9) and arm in ("sft", "interleaved"):
            toolrl.sft_phase(trained, sft, TINY, BRIEF, 0, step)
        if arm != "sft":
            rl.param_groups[0]["lr"] = min(5e-4 * step, 5e-3)  # a warm-up of ten steps
            stats.append(toolrl.rl_step(trained, rl, TINY, reward, BRIEF, 0, step))
    expected = evaluate(trained, TINY, BRIEF, 0, arm, 12)
    if stats:  # of the RL steps since the evaluation before
        expected |= zip(["equal_groups", "gradient"], np.mean(stats[10:], 0), strict=True)
    before = weights(base)
    found = list(toolrl.train_arm(arm, base, TINY, BRIEF, 0))
    assert [evaluation["step"] for evaluation in found] == [5, 10, 12]
    assert found[-1] == expected
    assert torch.equal(weights(base), before)  # the next arm starts from the same base


def test_each_step_draws_anew(base, monkeypatch):
    asked = []
    monkeypatch.setattr(toolrl, "rng_for", lambda *one: asked.append(one) or rng_for(*one))
    list(toolrl.train_arm("interleaved", base, TINY, replace(BRIEF, steps=5), 7))
    training = [stream for stream in asked if "held-out" not in stream[1]]
    training.append((8, "tasks", 4))  # 5 times tasks, sampling, order; a phase; the next seed
    assert len({rng_for(*stream).random() for stream in training}) == 17
    assert {seed for seed, *_ in training} == {7, 8}


# %% Probes


@with_both
@pytest.mark.parametrize("place", toolrl.PLACES)
def test_the_matrix_reads_the_place_that_it_names(chat, place):
    # A puppet that is right but at one place, which the text tells. There it writes </function>.
    right = follower(gold(chat, 3, ["multi_step"], "A"))
    places = {TAG: "call", "</tool_call>": "close", END: "end"}

    def next_id(ids):
        here = places.get(chat.decode([right(ids)]))
        if chat.decode(ids).endswith(TAG):
            here = "json"
        elif chat.decode(ids).endswith("assistant\n"):
            here = here or "reply"
        return chat.encode("</function>")[0] if here == place else right(ids)

    puppet = Puppet(chat, next_id, p=0.9)
    _, p = toolrl.teacher_forced(puppet, draw(chat, 3, ["multi_step"], "A"))
    for other, due in toolrl.PLACES.items():
        wrong = 0.9 if other == place else 0.0
        assert p[other]["</function>"] == pytest.approx(wrong, abs=0.01)
        assert p[other].get(due, 0.9 - wrong) == pytest.approx(0.9 - wrong, abs=0.01)


@with_both
@pytest.mark.parametrize("p", [0.8, 0.999999])
def test_skill_is_the_chance_to_write_every_name_right(chat, p):
    records = gold(chat, 6, toolrl.KINDS, "A")
    expected = []
    for episode in records:
        flags = sum([chat.name_flags(message) for message in episode.gold], [])
        expected.append(p ** sum(flags))
    puppet = Puppet(chat, follower(records), p)
    skill, _ = toolrl.teacher_forced(puppet, draw(chat, 6, toolrl.KINDS, "A"))
    assert skill == pytest.approx(np.mean(expected), rel=1e-3)


def test_each_probe_asks_held_out_tasks_and_an_evaluation_says_what_was_done():
    # A puppet that stops after the opening tag, but says "bob" where nobody is named.
    tag, bob, _, nobody = TINY.encode(TAG + "bob of them")
    asked = Counter()

    def next_id(ids):
        text = TINY.decode(ids)
        if text.count("assistant\n") == 1 and text.endswith("assistant\n"):
            question = re.search(r"user\n(.*?)<", text)[1]
            (kind,) = [kind for kind in toolrl.KINDS if question in TASKS["held_out"][kind]]
            asked[kind, "<function>" in text] += 1
        word = bob if nobody in ids else tag
        return TINY.end if ids[-1] == word else word

    found = evaluate(Puppet(TINY, next_id), TINY, SMALL, 0, "rl", 5)
    # The tasks of `success` are read once more, with their gold conversations, for the skill.
    in_a = {("multi_step", False): 8, ("one_call", False): 4, ("no_call", False): 4}
    assert asked == in_a | {("multi_step", True): 4}
    assert found["success"] == found["one_call"] == found["format_b"] == found["ask"] == 0
    assert found["no_call_reward"] == 1
    assert found["states"]["bare_tags"] == 1  # of the messages in tasks that take calls
    text = r"\w+ of \w+ of .*\n<tool_call>\[1.00\]<.*>\[1.00\]\n"
    assert re.fullmatch(text, found["conversation"])


def test_evaluations_ask_the_same_tasks_and_sample_alike_at_every_step(base):
    first = evaluate(base, TINY, SMALL, 0, "rl", 5)
    again = evaluate(base, TINY, SMALL, 0, "sft", 10)
    assert again == first | {"arm": "sft", "step": 10}
    assert first["p"] != evaluate(base, TINY, SMALL, 1, "rl", 5)["p"]


# %% Claims and print, on made histories


def look(step, success=0.6, skill=1.0, format_b=0.8, spike=0.08):
    """An evaluation in which <|im_end|> has probability `spike` where JSON is due."""
    p = {}
    for place, due in toolrl.PLACES.items():
        p[place] = dict.fromkeys(toolrl.CONTROL, 0.001)
        p[place][due] = 0.9
    del p["json"]["JSON"], p["reply"]["text"]  # these are no control tokens
    p["json"][END] = spike
    event = {"event": "eval", "step": step, "success": success, "skill": skill, "p": p}
    event |= {"format_b": format_b, "one_call": 0.5, "ask": 0.0, "no_call_reward": 0.5}
    event["states"] = {"whole_calls": 0.02, "bare_tags": 0.98}
    return event | {"conversation": "a question\nan answer\n"}


def story():
    """A history in which every claim holds, if only just."""
    return {
        "base": [look(0)],
        "rl": [look(5), look(10, 0.05, 0.8, spike=0.4)]
        + [look(k, 0.02, 0.5, 0.2) for k in (15, 20, 25)],
        "interleaved": [look(5), look(10, 0.7), look(15, 0.9, format_b=0.63)],
        "rl-strict": [look(5, 0.01), look(10, 0.8), look(15, 0.9)],
    }


# In this story: the arm, which of its evaluations, what changes there, and which claims then fail.
TWISTS = """
rl          | -3 | success 0.03              | collapse
rl          | -1 | success 0.03              | collapse
rl          | 1  | success 0.06              | control_token intact price
base        | 0  | success 0.05              | collapse control_token intact price
base        | 0  | json <|im_end|> 0.081     | control_token
rl          | 1  | call <tool_call> 1.3      |
rl          | 1  | end </tool_call> 0.35     | control_token
rl          | 1  | skill 0.79                | intact
interleaved | -1 | success 0.89              | fix
interleaved | -1 | format_b 0.65             | price
rl          | 1  | format_b 0.75             | price
rl-strict   | 0  | json <|im_end|> 0.5       | cause
rl-strict   | 1  | reply <tool_response> 0.5 | cause
"""


@pytest.mark.parametrize("arm, k, change, fails", table(TWISTS))
def test_each_claim_can_say_no(arm, k, change, fails):
    history = story()
    assert toolrl.judge(history) == dict.fromkeys(CLAIMS, True)
    *place, name, value = change.split()
    spot = history[arm][int(k)]
    for key in place:
        spot = spot["p"][key]
    spot[name] = float(value)
    assert [claim for claim, holds in toolrl.judge(history).items() if not holds] == fails.split()


def test_what_was_not_run_is_not_judged_and_a_run_that_is_too_short_claims_nothing():
    history = story()
    del history["rl"]
    assert toolrl.judge(history) == {"fix": True, "cause": True}
    history = {arm: evaluations[-2:] for arm, evaluations in story().items()}
    history["rl"][0] = look(20, 0.02, spike=0.5)
    assert toolrl.judge(history) == dict.fromkeys(CLAIMS, False)


def test_a_row_marks_a_spike_and_tells_zero_from_not_measured(capsys):
    toolrl.print_row(look(5), look(0))
    toolrl.print_row(look(5, spike=0.4) | {"equal_groups": 1.0, "gradient": 0.0}, look(0))
    now = look(5, spike=0.6)
    now["p"]["end"][TAG] = 0.3
    toolrl.print_row(now, look(0, spike=0.5))
    base, rl, other = capsys.readouterr().out.splitlines()
    figures = "5    0.60  1.00  0.50   0.80  0.00    0.50"
    assert base == f"   {figures}    nan      nan  0.08 <|im_end|> at json"
    assert rl == f"   {figures}   1.00     0.00  0.40 <|im_end|> at json *"
    assert other.endswith("  0.30 <tool_call> at end")  # what rose most is not what is likeliest


def test_a_moment_shows_states_shifts_and_a_conversation(capsys):
    now = look(10, spike=0.004)
    now["p"]["end"] |= {"</tool_call>": 0.011, TAG: 0.0099}
    toolrl.print_moment(now, look(0))
    said = capsys.readouterr().out
    assert "messages at step 10: 2% whole calls, 98% bare tags\n" in said
    assert re.search(r"json +JSON +<\|im_end\|> 0.08 -> 0.00\n", said)
    assert "<|im_end|> 0.90 -> 0.90, </tool_call> 0.00 -> 0.01\n" in said
    assert said.endswith("\na question\nan answer\n")


def test_claims_are_printed_for_each_seed_and_counted(tmp_path, monkeypatch, capsys):
    stories = [story(), story()]
    stories[1]["interleaved"] = [look(15, 0.5)] * 3  # no fix, and no price
    monkeypatch.setattr(toolrl, "train_base", lambda start, chat, settings, seed: seed)
    monkeypatch.setattr(toolrl, "evaluate", lambda seed, *_: stories[seed]["base"][0])
    monkeypatch.setattr(toolrl, "train_arm", lambda arm, seed, *_: stories[seed][arm])
    out = tmp_path / "run.jsonl"
    main(shlex.split(f"--seeds 0 1 --arms rl interleaved rl-strict --out {out}"))
    said = capsys.readouterr().out
    for claim, text in CLAIMS.items():
        answers = ["yes", "no" if claim in ("fix", "price") else "yes"]
        assert re.findall(rf"^{claim} +(\w+) +{re.escape(text)}$", said, re.M) == answers
        assert re.findall(rf"^{claim} +(\d)$", said, re.M) == [str(answers.count("yes"))]
        assert len(f"{claim:14} yes  {text}") <= 100
    holds = " ".join(re.findall(r'"holds": (\w+)', out.read_text()))
    assert holds == 9 * "true " + "false false true"
    # The moment of an arm is where it is first down, otherwise its last evaluation.
    assert re.findall(r"messages at step (\d+)", said) == 2 * ["10", "15", "5"]


# %% The command line, and --model

LITTLE = "--base-steps 2 --sft-batch 4 --steps 2 --eval-every 1 --eval-episodes 4 --groups 2 "
LITTLE += "--group-size 2 --minibatches 1 --sft-every 1 --sft-steps 1 --device cpu "


def run_little(out, flags="", main=main):
    """A run of a second or two. -> the lines of its --out"""
    main(shlex.split(f"{LITTLE} --out {out} {flags}", comments=True))
    return [json.loads(line) for line in out.read_text().splitlines()]


BAD = """
--stepz 3                | --stepz
--arms rl ppo            | ppo
--steps 0                | --steps
--lr nan                 | --lr
--no-call-share 1.5      | --no-call-share
--group-size 1           | --group-size
--seeds 0 1 -1 2         | --seeds
--device nope            | nope
--model /nowhere/model   | /nowhere/model
--out /nowhere/run.jsonl | /nowhere/run.jsonl
"""


@pytest.mark.parametrize("flags, named", table(BAD))
def test_bad_input_gets_a_line_that_names_it_and_empties_no_file(flags, named, tmp_path, capsys):
    old = tmp_path / "run.jsonl"
    old.write_text("what an hour has measured")
    code, said = ending(capsys, f"--out {old} {flags}")
    assert code == 2 and said.out == "" and said.err.count("\n") <= 2
    assert named in said.err.splitlines()[-1].replace("_", "-")
    assert old.read_text() == "what an hour has measured"


def test_every_setting_is_a_flag_and_stands_in_the_help_with_its_comment(capsys):
    _, said = ending(capsys, "--help")
    for name in vars(SETTINGS):
        assert f"--{name.replace('_', '-')}" in said.out
        assert re.search(rf"^ +{name}: .*  # \w.{{10}}", said.out, re.M)


EVAL = f"event seed arm step {' '.join(toolrl.PROBES)} no_call_reward skill p states conversation"
CONFIG = " ".join(["event", *vars(SETTINGS), "versions"])
SHAPE = [CONFIG, EVAL] + [EVAL + " equal_groups gradient"] * 4  # the base, and two arms
SHAPE += ["event seed claim holds"] * 5 + ["event seconds"]


def test_a_run_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    events = run_little(tmp_path / "run.jsonl")
    assert [" ".join(event) for event in events] == SHAPE
    assert events[0]["out"] == "" and torch.__version__ in events[0]["versions"]
    assert not any(event.get("holds") for event in events)  # two steps show nothing
    said = capsys.readouterr().out
    headings = re.findall(r"\n== (\S+), seed 0.*\n.*\n(.*)", said)
    assert [heading for heading, _ in headings] == ["base", "rl", "interleaved", "claims"]
    assert max(len(line) for _, line in headings) <= 100


def test_a_seed_gives_one_result_whatever_runs_beside_it_and_whatever_the_file_is_called(tmp_path):
    alone = run_little(tmp_path / "a.jsonl", "--seeds 2")
    beside = run_little(tmp_path / "b.jsonl", "--seeds 1 2")
    assert [event for event in beside if event.get("seed") == 2] == alone[1:-1]
    assert beside[1]["p"] != alone[1]["p"]


def test_ctrl_c_leaves_what_was_measured_on_disk(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run.jsonl"
    on_disk = []

    def rl_step(*_):
        on_disk.extend(re.findall(r'"event": "(\w+)"', out.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(toolrl, "rl_step", rl_step)
    code, said = ending(capsys, f"{LITTLE} --out {out}")
    assert code == 130 and said.err.count("\n") == 1
    assert on_disk == ["config", "eval"]


def test_a_checkpoint_has_its_own_defaults_and_explicit_flags_win():
    tiny = vars(toolrl.read_settings([]))
    assert vars(toolrl.read_settings(["--model", "x"])) == tiny | toolrl.PRETRAINED | {"model": "x"}
    # A flag wins even if it asks for what is the tiny model's default.
    found = vars(toolrl.read_settings(["--model", "x", "--base-steps", "200", "--lr", "0.5"]))
    assert found == tiny | toolrl.PRETRAINED | {"model": "x", "base_steps": 200, "lr": 0.5}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [320, 292])  # more than there will be tokens, and fewer
def test_a_new_tag_starts_as_the_mean_of_its_pieces(rows, tied, tmp_path):
    folder = save_checkpoint(tmp_path, rows, tied)
    before = AutoModelForCausalLM.from_pretrained(folder).float()
    chat, policy = toolrl.load(replace(SETTINGS, model=folder))
    assert policy.get_input_embeddings().padding_idx is None
    tokenizer = bpe_tokenizer()
    for tables in ("get_input_embeddings", "get_output_embeddings"):
        old = getattr(before, tables)().weight
        expected = list(old[: len(tokenizer)])  # a token that it had keeps its row
        for row in range(len(tokenizer), len(chat.tokenizer)):
            expected.append(old[tokenizer.encode(chat.decode([row]))].mean(0))
        # Shape and float32 have to be the same, too.
        torch.testing.assert_close(getattr(policy, tables)().weight, torch.stack(expected))


def test_a_run_with_a_checkpoint_leaves_a_file_of_the_same_shape(checkpoint, tmp_path):
    events = run_little(tmp_path / "run.jsonl", f"--model {checkpoint}")
    assert [" ".join(event) for event in events] == SHAPE
    assert (events[0]["lr"], events[0]["steps"]) == (toolrl.PRETRAINED["lr"], 2)


def test_a_template_without_the_end_token_gets_one_line(tmp_path, capsys):
    code, said = ending(capsys, f"--device cpu --model {save_checkpoint(tmp_path, end='</s>')}")
    assert code == 2 and f"template does not end messages with {END}\n" in said.err


# %% The README's commands and diffs, and the whole story


@pytest.mark.parametrize("flags", dict.fromkeys(re.findall(r"^python toolrl.py(.*)", README, re.M)))
def test_slow_commands_of_the_readme_run(flags, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = re.sub(r"--seeds (\$\(seq)? ?(\d+)[ \d]*\)?", r"--seeds \2 ", flags)
    flags = shlex.split(re.sub(r"--model \S+", f"--model {checkpoint}", flags), comments=True)
    toolrl.read_settings(flags)  # before tiny settings replace them
    main(flags + shlex.split(LITTLE))
    assert len(list(tmp_path.iterdir())) == ("--out" in flags)


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", README, re.S))
def test_slow_diffs_of_the_readme_apply_and_run(diff, tmp_path):
    code = CODE
    for hunk in diff.split("@@\n"):
        old = re.sub(r"^(\+.*\n|.)", "", hunk, flags=re.M)
        new = re.sub(r"^(-.*\n|.)", "", hunk, flags=re.M)
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    other = load_copy(tmp_path, code)
    assert run_little(tmp_path / "run.jsonl", main=other.main)[-1]["event"] == "done"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_slow_snippets_of_the_readme_read_a_run(snippet, tmp_path, monkeypatch, capsys):
    if "matplotlib" in snippet:
        pytest.importorskip("matplotlib", reason="the README's picture needs matplotlib")
    monkeypatch.chdir(tmp_path)
    run_little(tmp_path / "run.jsonl", "--seeds 0 1 --arms rl interleaved")
    before = (tmp_path / "run.jsonl").read_bytes()
    capsys.readouterr()
    exec(snippet, {})
    assert (tmp_path / "run.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert said.count("\n") > 2 or (tmp_path / "run.png").stat().st_size > 9999


def in_a_process(flags):
    """A run of its own. It hears Ctrl-C, even if it is a background job's child."""
    command = [sys.executable, HERE / "toolrl.py", *flags.split()]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, preexec_fn=hear, **pipes)


def test_slow_a_real_ctrl_c(tmp_path):
    out = tmp_path / "run.jsonl"
    run = in_a_process(f"--base-steps 20 --out {out}")
    while run.poll() is None and not (out.exists() and '"arm": "rl"' in out.read_text()):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and re.fullmatch("toolrl: stopped.*\n", said)


def test_slow_the_whole_story(tmp_path):
    held = []
    for seed in (1, 2):
        flags = f"--seeds {seed} --arms rl interleaved rl-strict --out {tmp_path}/"
        runs = [in_a_process(flags + name) for name in "ab"]
        assert [run.communicate()[1] for run in runs] == ["", ""]
        first, again = [(tmp_path / name).read_text().splitlines() for name in "ab"]
        assert first[:-1] == again[:-1]
        held.append(set(re.findall(r'"(\w+)", "holds": true', str(first))))
    # One of two seeds may disagree about what RL breaks, but not about what mends it.
    assert {"fix", "cause"} <= held[0] & held[1]
    assert held[0] | held[1] == set(CLAIMS)
