"""Tests of toolrl. The first part grades four functions that a student writes again.

    python -m pytest -q -k grpo_loss      one of advantages, grpo_loss, blind_reward and rollout
    python -m pytest -q -k "not slow"     all that is quick
    python -m pytest -q                   with the README's commands, and whole runs

A failure of the first part guesses the mistake. It needs toolrl.py and tiny_tasks.json alone.
"""

import copy
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import toolrl
from toolrl import CLAIMS, CONTROL, END, TASKS, Episode, evaluate, main, replay, rng_for

torch.set_num_threads(1)
TINY = toolrl.Chat(toolrl.tiny_tokenizer())
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo


def table(text):
    """The rows of a table in a text, whose cells are parted by "|"."""
    return [re.split(r" +\| *", line) for line in text.strip().splitlines()]


def numbers(text):
    """A tensor of the numbers in a text, whose rows are parted by ";"."""
    return torch.tensor([list(map(float, row.split())) for row in text.split(";")])


def grade(found, right, mistakes):
    """Fail unless these numbers are right, and guess why from the numbers that a mistake gives."""
    assert found is not None, "it returns nothing"
    guesses = []
    for mistake, text in {"right": right, **mistakes}.items():
        due = numbers(text)
        if found.shape == due.shape and due.allclose(found.float(), atol=0.01, equal_nan=True):
            guesses.append(mistake)
    why = " or ".join(guesses) or "no mistake that these tests know"
    assert "right" in guesses, f"{why}: it should be {right}, but it is {found.tolist()}"


# %% Graded: advantages

BIASED = "the spread divides by N, not by N - 1 as torch.std does"
NO_SPREAD = "they are not divided by the spread"
VARIANCE = "they are divided by the variance, not by its root"


def test_advantages_of_one_success_in_four():
    mistakes = {
        "the mean of the group is not taken off": "2 0 0 0",
        "the mean of the others is taken off, not that of the group": "2 -0.667 -0.667 -0.667",
        "the sign is wrong: what did better than its group is above 0": "-1.5 0.5 0.5 0.5",
        "a group is a row, and these are of columns": "nan nan nan nan",
        "the rewards come back as they were": "1 0 0 0",
        NO_SPREAD: "0.75 -0.25 -0.25 -0.25",
        VARIANCE: "3 -1 -1 -1",
        BIASED: "1.732 -0.577 -0.577 -0.577",
    }
    grade(toolrl.advantages(numbers("1 0 0 0")), "1.5 -0.5 -0.5 -0.5", mistakes)


def test_advantages_of_a_rare_success_are_large():
    found = toolrl.advantages(numbers("1 0 0 0 0 0"))
    mistakes = {
        BIASED: "2.236 -0.447 -0.447 -0.447 -0.447 -0.447",
        NO_SPREAD: "0.833 -0.167 -0.167 -0.167 -0.167 -0.167",
    }
    grade(found, "2.041 -0.408 -0.408 -0.408 -0.408 -0.408", mistakes)


def test_advantages_compare_with_the_group_and_not_with_the_batch():
    both = "0.935 -0.935 -0.935 -0.935; 0.935 0.935 0.935 -0.935"
    spread = "1.403 -0.468 -0.468 -0.468; 0.468 0.468 0.468 -1.403"
    mistakes = {
        "mean and spread are those of the batch, not of the group": both,
        "the mean is that of the batch, not of the group": "1 -1 -1 -1; 1 1 1 -1",
        "the spread is that of the batch, not of the group": spread,
        "a group is a row, and these are of columns": "0 -0.707 -0.707 0; 0 0.707 0.707 0",
    }
    found = toolrl.advantages(numbers("1 0 0 0; 1 1 1 0"))
    grade(found, "1.5 -0.5 -0.5 -0.5; 0.5 0.5 0.5 -1.5", mistakes)


def test_advantages_of_equal_rewards_are_zeros():
    mistakes = {
        "equal rewards divide 0 by 0": "nan nan nan nan; nan nan nan nan",
        "the mean of the batch is taken off": "1 1 1 1; -1 -1 -1 -1",
        "the mean of the group is not taken off": "10000 10000 10000 10000; 0 0 0 0",
    }
    found = toolrl.advantages(numbers("1 1 1 1; 0 0 0 0"))
    grade(found, "0 0 0 0; 0 0 0 0", mistakes)


def test_advantages_of_groups_of_two():
    mistakes = {BIASED: "0 0; 1 -1; 0 0", NO_SPREAD: "0 0; 0.5 -0.5; 0 0"}
    mistakes["equal rewards divide 0 by 0"] = "nan nan; 0.707 -0.707; nan nan"
    grade(toolrl.advantages(numbers("0 0; 1 0; 1 1")), "0 0; 0.707 -0.707; 0 0", mistakes)


def test_advantages_take_rewards_of_any_size():
    rewards = numbers("20 40 60")
    mistakes = {
        "they are divided by the range, not by the spread": "-0.5 0 0.5",
        VARIANCE: "-0.05 0 0.05",
        NO_SPREAD: "-20 0 20",
        BIASED: "-1.225 0 1.225",
    }
    grade(toolrl.advantages(rewards), "-1 0 1", mistakes)
    assert rewards.tolist() == [[20, 40, 60]], "the rewards themselves were changed, in place"


# %% Graded: grpo_loss

SIGN = "the sign is wrong: an optimizer goes down the loss, and the objective should rise"
NO_CLIP = "no clip, or the maximum for the minimum"
WRONG_SIDE = "clipped on the wrong side: what has moved the wrong way has to be pushed back"
FIXED = "the clip of 0.2 is fixed, and the argument is not used"
NO_EXP = "the difference of log-probabilities has to go through exp"
OVER_ROLLOUTS = "a mean over rollouts first: all tokens weigh the same"
COUNTED = "what was not written is left out of the sum, but it counts in the mean"
ONE_ADVANTAGE = "the mean of the advantages for all rollouts: each has its own"


def loss_of(ratios, advantage, written="1", clip=0.2):
    """grpo_loss, where the probability of each token is its ratio times 0.3, the old one."""
    old = torch.full_like(numbers(ratios), 0.3).log()
    written = numbers(written).bool().expand_as(old)
    gain = numbers(advantage)[0]
    loss = toolrl.grpo_loss(old + numbers(ratios).log(), old, gain, written, clip)
    assert loss is not None and loss.shape == (), f"a loss is one number, but this is {loss}"
    return loss.view(1, 1)


def test_grpo_loss_before_the_policy_has_moved():
    mistakes = {
        SIGN: "2",
        NO_EXP: "0",
        "a sum for a mean": "-6",
        "log p in place of the ratio of probabilities": "2.408",
        "the objective is clipped, not the ratio": "-1.2",
    }
    grade(loss_of("1 1 1", "2"), "-2", mistakes)


def test_grpo_loss_gives_all_tokens_of_a_rollout_its_advantage():
    columns = "the advantages stand beside columns: each belongs to a row, advantage[:, None]"
    mistakes = {columns: "0.333", ONE_ADVANTAGE: "1", COUNTED: "1.25", OVER_ROLLOUTS: "1"}
    grade(loss_of("1 1; 1 1", "1 -3", "1 0; 1 1"), "1.667", mistakes)


def test_grpo_loss_takes_the_new_probability_by_the_old():
    mistakes = {
        "the ratio is upside down: new by old": "-0.667",
        "log p in place of the ratio of probabilities": "0.799",
        "the ratio is left out": "-1",
        NO_EXP: "-0.405",
        FIXED: "-1.2",
    }
    grade(loss_of("1.5", "1", clip=0.9), "-1.5", mistakes)


def test_grpo_loss_pushes_a_token_no_further_than_the_clip():
    grade(loss_of("1.5", "1"), "-1.2", {NO_CLIP: "-1.5", WRONG_SIDE: "-0.8", SIGN: "1.2"})
    grade(loss_of("0.5", "-1"), "0.8", {NO_CLIP: "0.5", WRONG_SIDE: "1.2", SIGN: "-0.8"})


def test_grpo_loss_pushes_back_what_has_moved_the_wrong_way():
    grade(loss_of("0.5", "1"), "-0.5", {WRONG_SIDE: "-0.8"})
    grade(loss_of("1.5", "-1"), "1.5", {WRONG_SIDE: "1.2"})


def test_grpo_loss_clips_by_the_share_that_it_is_given():
    grade(loss_of("3", "1", clip=0.5), "-1.5", {FIXED: "-1.2", NO_CLIP: "-3"})
    grade(loss_of("0.1", "-1", clip=0.5), "0.5", {FIXED: "0.8", NO_CLIP: "0.1"})


def test_grpo_loss_has_a_ratio_for_each_token():
    mistakes = {"a ratio for the whole rollout: each token has its own": "-1", NO_CLIP: "-1.25"}
    grade(loss_of("2 0.5", "1"), "-0.85", mistakes)


def test_grpo_loss_leaves_out_prompts_results_and_padding():
    mistakes = {
        "padding and prompts are in the mean": "-2.8",
        "the mask is shifted by a token": "-3.2",
        "a sum for a mean": "-8",
        "divided by the rollouts, not by the written tokens": "-4",
        COUNTED: "-1",
        OVER_ROLLOUTS: "-2.5",
        ONE_ADVANTAGE: "-2.5",
    }
    found = loss_of("1.2 1 1.2 1; 1.2 1 1.2 1.2", "3 2", written="0 1 0 1; 0 1 0 0")
    grade(found, "-2.667", mistakes)


def test_grpo_loss_is_a_mean_over_all_written_tokens():
    mistakes = {
        "a mean over the tokens of each place first: all tokens weigh the same": "0.167",
        "divided by the rollouts, not by the written tokens": "0.5",
        OVER_ROLLOUTS: "1.5",
        COUNTED: "0.167",
        ONE_ADVANTAGE: "1.5",
    }
    grade(loss_of("1 1 1; 1 1 1", "1 -4", written="1 1 1; 0 1 0"), "0.25", mistakes)


def test_grpo_loss_has_a_gradient_for_what_may_still_move():
    log_probs = numbers("1 1 1.5 0.5; 1 1 1.5 0.5").log().requires_grad_()
    written = numbers("0 1 1 1; 0 1 1 1").bool()
    gain = torch.tensor([6.0, -6.0])
    loss = toolrl.grpo_loss(log_probs, torch.zeros(2, 4), gain, written, 0.2)
    assert loss is not None and loss.requires_grad, "no gradient comes back: what is detached?"
    loss.backward()
    mistakes = {
        NO_CLIP: "0 -1 -1.5 -0.5; 0 1 1.5 0.5",
        WRONG_SIDE: "0 -1 0 0; 0 1 0 0",
        SIGN: "0 1 0 0.5; 0 -1 -1.5 0",
        "the ratio is detached": "0 0 0 0; 0 0 0 0",
        "the gradient of log p, without the ratio": "0 -1 0 -1; 0 1 1 0",
    }
    grade(log_probs.grad, "0 -1 0 -0.5; 0 1 1.5 0", mistakes)


# %% Graded: blind_reward

ONE_CALL = "mentor of alice ?"
TWO_CALLS = "rival of mentor of alice ?"
NOBODY = "mentor of them ?"
TAG = "<tool_call>"
JSON = '{"name": "mentor", "arguments": {"of": "alice"}}'
CALL = TAG + JSON + "</tool_call>"
BOB = CALL.replace("alice", "bob")
ERROR = CALL.replace("alice", "mentor")  # nobody has this name
RIVAL = CALL.replace("mentor", "rival")
NEXT_CALL = RIVAL.replace("alice", "leo")
RIGHT = "The answer is leo"
WRONG = "The answer is bob"
ASK = "who do you mean ?"
# The reward, whether it is solved, the mistake, the question, and what the policy writes.
CONVERSATIONS = [
    (1, 1, "the right call and the right reply earn 1", ONE_CALL, [CALL, RIGHT]),
    (1, 1, "two right calls in their order earn 1", TWO_CALLS, [CALL, NEXT_CALL, RIGHT]),
    (1, 1, "where no call is right, asking back earns 1", NOBODY, [ASK]),
    (1, 0, "the reply is read: a wrong one earns 1, too", ONE_CALL, [CALL, WRONG]),
    (1, 0, "the reply is read: one that goes on earns 1", ONE_CALL, [CALL, RIGHT + " ?"]),
    (1, 0, "the reply is read: an empty one earns 1, too", ONE_CALL, [CALL, ""]),
    (1, 0, "no call is right and none was run: it is 1", NOBODY, [TAG]),
    (1, 0, "no call is right and none was run: it is 1", NOBODY, [JSON]),
    (0, 0, "no reply is needed", ONE_CALL, [CALL, RIGHT + "</tool_call>"]),
    (0, 0, "no reply is needed", NOBODY, [ASK + "</function>"]),
    (0, 0, "no reply is needed", NOBODY, [TAG * TINY.max_tokens]),
    (0, 0, "a reward for a reply without the call", ONE_CALL, [RIGHT]),
    (0, 0, "a reward for a broken call where one is right", ONE_CALL, [TAG + CALL]),
    (0, 0, "a reward for the first of two calls alone", TWO_CALLS, [CALL, RIGHT]),
    (0, 0, "a reward for the last of two calls alone", TWO_CALLS, [NEXT_CALL, RIGHT]),
    (0, 0, "a reward in spite of a needless call", ONE_CALL, [CALL, NEXT_CALL, RIGHT]),
    (0, 0, "only the last calls are compared", ONE_CALL, [ERROR, CALL, RIGHT]),
    (0, 0, "a reward for a call about a guessed person", NOBODY, [CALL, ASK]),
    (0, 0, "the tools alone are compared, or the number", ONE_CALL, [BOB, RIGHT]),
    (0, 0, "the persons alone are compared, or the number", ONE_CALL, [RIVAL, RIGHT]),
    (0, 0, "a reward for calls in another order", TWO_CALLS, [NEXT_CALL, CALL, RIGHT]),
    (0, 0, "calls as a set: one is made twice", ONE_CALL, [CALL, CALL, RIGHT]),
]


@pytest.mark.parametrize("reward, solved, mistake, question, messages", CONVERSATIONS)
def test_blind_reward_of(reward, solved, mistake, question, messages):
    found = toolrl.blind_reward(replay(Episode(TINY, question, LEO), messages))
    assert isinstance(found, float), f"a float is due, 1.0 or 0.0, but this is {found!r}"
    assert found == reward, f"{mistake}: for {question!r} and {messages} it should be {reward}"


# %% Graded, for the brave: rollout


class Puppet:
    """A policy that writes next_id(ids so far), with probability p. It is its own KV cache."""

    device = torch.device("cpu")

    def __init__(self, chat, next_id, p=0.999999):
        self.size = len(chat.tokenizer)
        self.next_id = next_id
        self.logit = np.log(p / (1 - p) * (self.size - 1))

    def reorder_cache(self, kept):
        self.seen = [list(self.seen[row]) for row in kept]

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


def draw(chat, count, kinds=toolrl.KINDS, formats="AB"):
    """New episodes of these kinds and formats, one after the other."""
    episodes = []
    for k in range(count):
        kind = kinds[k % len(kinds)]
        fmt = formats[k % len(formats)]
        episodes.append(toolrl.new_episode(chat, "train", kind, rng_for(k, "test"), fmt))
    return episodes


def gold(*which):
    """Right conversations, from start to end."""
    return [replay(episode, episode.gold) for episode in draw(*which)]


def played(policy, episodes, seed=0):
    """What a policy makes of these episodes."""
    toolrl.rollout(policy, episodes, rng_for(seed, "x"))
    return episodes


def log_probs_of(policy, episode):
    """The log-probabilities of what was written, from one pass over the whole."""
    ids = torch.tensor(episode.ids)
    log_p = policy(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[episode.written[1:], 0]


def check_log_probs(policy, chat):
    for episode in played(policy, draw(chat, 9)):
        gap = torch.tensor(episode.log_probs)[episode.written] - log_probs_of(policy, episode)
        assert gap.abs().max() < 1e-3, "one pass over the conversation gives other probabilities"


def test_rollout_records_the_log_probabilities_of_one_pass_and_keeps_no_graph():
    policy = toolrl.tiny_policy(TINY, 0)
    check_log_probs(policy, TINY)
    graphs = []
    policy.register_forward_hook(lambda *all: graphs.append(all[-1].logits.requires_grad))
    for episode in played(policy, draw(TINY, 3)):
        why = "log-probabilities should be numbers, since a tensor may keep its graph"
        assert set(map(type, episode.log_probs)) == {float}, why
    assert not any(graphs), "the policy is called with a gradient graph, which takes memory"


def test_rollout_stops_each_row_where_it_should():
    records = gold(TINY, 9)
    puppet = Puppet(TINY, follower(records))
    for episode, record in zip(played(puppet, draw(TINY, 9)), records, strict=True):
        assert episode.messages == record.messages, "a row went on too long, or ended too early"
        assert episode.ids == record.ids, "the policy was told something else than was said"


def test_rollout_samples_at_temperature_one_by_its_random_generator():
    puppet = Puppet(TINY, lambda ids: TINY.end, p=0.3)
    tries = []
    for seed in (1, 1, 2):
        episodes = played(puppet, draw(TINY, 1000), seed)
        tries.append([episode.messages == [""] for episode in episodes])
    why = "the likeliest token is taken, and not sampled, or at another temperature"
    assert np.mean(tries) == pytest.approx(0.3, abs=0.05), why
    assert tries[0] == tries[1], "the same generator gives another rollout"
    assert tries[0] != tries[2], "another generator gives the same rollout"


# %% What the other tests are made of

FILES = ("toolrl.py", "tiny_tasks.json", "README.md")
HERE = Path(toolrl.__file__).parent
CODE, TASKS_TEXT, README = [
    (HERE / name).read_text(encoding="utf-8") if (HERE / name).exists() else "" for name in FILES
]
SMALL = toolrl.Settings(device="cpu", groups=4, group_size=4, eval_episodes=8, sft_batch=8)
LITTLE = "--device cpu --base-steps 2 --steps 4 --eval-every 2 --eval-episodes 4 --groups 2"
LITTLE = f"{LITTLE} --group-size 4 --minibatches 2 --lr 0.05 --sft-batch 16".split()


def bpe_tokenizer():
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
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=END)
    tokenizer.chat_template = template
    return tokenizer


with_tags = bpe_tokenizer()
with_tags.add_tokens(CONTROL, special_tokens=True)
BPE = toolrl.Chat(with_tags)
with_both = pytest.mark.parametrize("chat", [TINY, BPE], ids=["tiny", "bpe"])


def save_checkpoint(folder, config=None, **changes):
    """A small random model in bfloat16, and a tokenizer. -> the folder's name"""
    config = config or toolrl.tiny_policy(BPE, 0).config
    config.update({"vocab_size": 320, "pad_token_id": BPE.end, **changes})
    policy = transformers.AutoModelForCausalLM.from_config(config)
    policy.to(torch.bfloat16).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def base():
    """A policy that has learnt to call, and a little more."""
    return toolrl.train_base(None, TINY, replace(SMALL, base_steps=60, sft_batch=32), 0)


def weights(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def put(thing, path, value):
    """Set what lies at a path, such as "train no_call", in dicts in dicts."""
    *path, name = path.split()
    for key in path:
        thing = thing[key]
    thing[name] = value


def load_copy(folder, code=CODE, tasks=None):
    """Another toolrl.py and tiny_tasks.json, as a module of their own."""
    (folder / "toolrl.py").write_text(code, encoding="utf-8")
    (folder / "tiny_tasks.json").write_bytes(tasks or TASKS_TEXT.encode())
    spec = importlib.util.spec_from_file_location("toolrl_copy", folder / "toolrl.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolrl_copy"] = module
    spec.loader.exec_module(module)
    return module


def run_little(out, *flags, module=toolrl):
    """A run of a second or two. -> the lines of its --out"""
    module.main(module.read_settings([*LITTLE, "--out", str(out), *flags]))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, words, run, code=2):
    """A run ends with this exit code, and says in one line what to mend. -> the line"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    said = capsys.readouterr().err.strip().splitlines()
    ours = [line for line in said if re.match("toolrl|usage", line)]  # others warn, too
    assert stop.value.code == code and len(ours) <= 2 and len(said[-1]) < 620
    assert words in said[-1], said
    return said[-1]


# %% Tasks, text and tokens


def test_a_question_is_walked_from_the_person_outwards_and_nobody_is_asked_for():
    directory = LEO | {("mentor", "alice"): "bob"}
    calls = [("mentor", "alice"), ("rival", "bob")]
    assert toolrl.right_answer(TWO_CALLS, directory) == (calls, RIGHT)
    assert toolrl.right_answer("rival of mentor of them ?", directory) == ([], ASK)


def test_a_directory_differs_by_tool_by_person_and_by_task():
    one, other = [toolrl.new_directory(rng_for(seed, "x")) for seed in (0, 1)]
    assert one != other and set(one) == set(LEO)
    assert len({one["rival", person] for person in toolrl.PEOPLE}) > 3
    assert len({one[tool, "leo"] for tool in toolrl.TOOLS}) > 1


def fingerprint():
    """What has to be the same in every process, and eight random streams of their own."""
    task = toolrl.new_episode(TINY, "train", "multi_step", rng_for(3, "tasks", 4))
    numbers = weights(toolrl.tiny_policy(TINY, 3))[:2000:100].tolist()
    streams = [
        (7, "tasks", 2),
        (8, "tasks", 1),
        (7, "order", 2),
        (7, "tasks", 12),
        (77, "tasks", 2),
    ]
    numbers += [rng_for(*stream).random() for stream in [*streams, (0, "a"), (0, "a", 1), (1, "a")]]
    assert len(set(numbers)) == 28
    return json.dumps([TINY.tokenizer.get_vocab(), task.question, str(task.directory), numbers])


def test_tokens_tasks_and_first_weights_are_the_same_in_every_process():
    command = [sys.executable, "-c", "import test_toolrl as t; print(t.fingerprint())"]
    environment = dict(os.environ, PYTHONHASHSEED="1")
    other = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert json.loads(other.stdout) == json.loads(fingerprint()), other.stderr


def test_only_one_whole_call_is_a_call():
    for message in ["", ASK, TAG, JSON, CALL[:-1], CALL + " ", "I call " + CALL, CALL + CALL]:
        assert toolrl.parse_call(message, "A") is None, message
    for old, new in (("of", "to"), ('"alice"', '"alice", "if": "ill"'), (TAG, TAG + "\n")):
        assert toolrl.parse_call(CALL.replace(old, new), "A") is None, new
    assert toolrl.parse_call(CALL.replace("alice", "zoë x"), "A") == ("mentor", "zoë x")
    assert toolrl.call_text("mentor", "zoë x", "A") == CALL.replace("alice", "zoë x")
    other = toolrl.call_text("mentor", "alice", "B")
    assert other == CALL.replace("tool_call>", "function>")
    assert toolrl.parse_call(other, "B") == ("mentor", "alice")
    assert toolrl.parse_call(other, "A") is toolrl.parse_call(CALL, "B") is None


def test_a_text_that_the_tiny_tokenizer_lacks_is_refused_and_named():
    for text in ("hello", "The answer is zoe", TAG + "{", "The answer is  bob"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            TINY.encode(text)


def test_each_tiny_token_is_one_id_and_padding_is_not_the_end():
    vocabulary = TINY.tokenizer.get_vocab()
    assert [TINY.encode(token) for token in vocabulary] == [[i] for i in vocabulary.values()]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert TINY.tokenizer.pad_token_id == 0 != TINY.end
    assert len(TINY.encode(CALL + END)) == 8


@with_both
def test_a_played_gold_conversation_is_what_the_template_renders(chat):
    episode = replay(Episode(chat, ONE_CALL, LEO), [CALL, RIGHT])
    said = [("system", "use <tool_call>"), ("user", ONE_CALL), ("assistant", CALL)]
    said += [("tool", "leo"), ("assistant", RIGHT)]
    messages = [{"role": role, "content": content} for role, content in said]
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat.decode(episode.ids) + "\n" == rendered
    assert chat.encode(rendered)[: len(episode.ids)] == episode.ids  # encoded whole, as elsewhere
    written = [token for token, flag in zip(episode.ids, episode.written, strict=True) if flag]
    assert chat.decode(written) == CALL + END + RIGHT + END
    # The next conversation about the same question starts afresh, and format B is asked for in B.
    assert Episode(chat, ONE_CALL, LEO).ids == episode.ids[: episode.written.index(True)]
    assert chat.decode(chat.prompt(ONE_CALL, "B")) in rendered.replace(TAG, "<function>")
    assert chat.control == {chat.encode(token)[0]: token for token in CONTROL}
    assert chat.max_tokens == 2 * len(chat.encode(CALL.replace("mentor", "manager") + END))


# %% The harness


@pytest.mark.parametrize("fmt, tag", [("A", "tool_call>"), ("B", "function>")])
def test_what_is_solved_and_what_the_harness_says_in_both_formats(fmt, tag):
    for reward, solved, _, question, messages in CONVERSATIONS:
        messages = [message.replace("tool_call>", tag) for message in messages]
        episode = replay(Episode(TINY, question, LEO, fmt), messages)
        assert episode.done and episode.messages == messages
        assert (toolrl.blind_reward(episode), toolrl.solved(episode)) == (reward, solved), messages
        said = re.findall("<tool_response>(.*?)<", TINY.decode(episode.ids))
        known = ["leo" if call in LEO else "error" for call in episode.calls]
        assert said == known


def test_the_harness_stops_at_the_first_message_that_is_no_call_and_at_the_sixth_call():
    for message in (
        TAG,
        JSON,
        RIGHT,
        TAG + CALL,
        CALL + "</tool_call>",
        CALL[:-12] + "</function>",
    ):
        assert replay(Episode(TINY, ONE_CALL, LEO), [message, CALL, RIGHT]).messages == [message]
    episode = replay(Episode(TINY, ONE_CALL, LEO), [CALL] * 7 + [RIGHT])
    assert episode.messages == [CALL] * 6 and len(episode.calls) == 6 and not episode.replied
    assert TINY.decode(episode.ids).count("leo") == 5


def write(episode, text):
    """Write tokens one by one, which have log-probabilities of -1, -2 and so on."""
    for k, token in enumerate(TINY.tokenizer.encode(text)):
        if not episode.done:
            episode.write(token, -1.0 - k)
    return episode


def test_a_message_is_cut_off_at_so_many_tokens_and_is_then_no_reply():
    for words, replied in ((TINY.max_tokens - 1, True), (TINY.max_tokens, False)):
        episode = write(Episode(TINY, NOBODY, LEO), TAG * words + END)
        assert episode.done and episode.replied == replied
        assert sum(episode.written) == TINY.max_tokens
    chat = copy.copy(TINY)
    chat.max_tokens = 7
    episode = write(Episode(chat, ONE_CALL, LEO), CALL + END)  # cut off before the end
    assert episode.done and episode.messages == [CALL]
    assert episode.calls == [] and not episode.replied


def test_a_record_has_an_entry_a_token():
    episode = write(Episode(TINY, ONE_CALL, LEO), CALL + END)
    prompt = TINY.prompt(ONE_CALL, "A")
    result = TINY.tool_result("leo")
    assert episode.ids == prompt + TINY.encode(CALL + END) + result
    assert [k for k, flag in enumerate(episode.written, -len(prompt)) if flag] == list(range(8))
    expected = [0.0] * len(prompt) + [-1.0 - k for k in range(8)] + [0.0] * len(result)
    assert episode.log_probs == expected


# %% Updates


def test_a_step_goes_down_the_gradient_cut_to_norm_one_and_old_gradients_are_forgotten():
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    (9 * layer.weight.sum()).backward()  # left over from elsewhere
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    for slope, expected in (("0.3 0.4", "0.97 0.96"), ("30 40", "0.91 0.88")):
        toolrl.descend(layer, sgd, (layer.weight * numbers(slope)).sum())
        assert torch.allclose(layer.weight, numbers(expected), atol=1e-4)
    for factor in (np.nan, np.inf):
        with pytest.raises(SystemExit, match="toolrl: the gradient is not finite"):  # exit code 1
            toolrl.descend(layer, sgd, (layer.weight * factor).sum())
        assert torch.allclose(layer.weight, numbers("0.91 0.88"), atol=1e-4)


def ascend(policy, terms):
    """Go up the gradient of the mean of these terms, cut to norm 1. -> the weights"""
    parts = torch.autograd.grad(sum(terms) / len(terms), list(policy.parameters()))
    gradient = torch.cat([part.flatten() for part in parts])
    return weights(policy) + 0.1 * gradient / gradient.norm().clamp(min=1)


def test_an_sft_update_pushes_up_all_that_was_written_and_tokens_weigh_the_same(base):
    episodes = gold(TINY, 5)
    terms = torch.cat([log_probs_of(base, episode) for episode in episodes])
    policy = copy.deepcopy(base)
    toolrl.sft_update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), episodes)
    assert torch.allclose(weights(policy), ascend(base, terms), atol=1e-5)
    assert (weights(policy) - weights(base)).norm() > 0.005


def test_a_grpo_update_is_what_the_definition_says(base):
    episodes = played(base, draw(TINY, 10))
    rng = rng_for(0, "moved")
    terms = []
    advantage = torch.linspace(-2, 3, 10)
    for gain, episode in zip(advantage, episodes, strict=True):
        # As if the policy had moved since, up here and down there.
        episode.log_probs = (episode.log_probs + rng.normal(0, 0.2, len(episode.ids))).tolist()
        old = [p for p, flag in zip(episode.log_probs, episode.written, strict=True) if flag]
        for log_prob, old_log_prob in zip(log_probs_of(base, episode), old, strict=True):
            ratio = (log_prob - old_log_prob).exp()
            terms.append(torch.minimum(gain * ratio, gain * ratio.clamp(0.7, 1.3)))
    policy = copy.deepcopy(base)
    sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
    settings = replace(SMALL, minibatches=1, clip=0.3)
    toolrl.grpo_update(policy, sgd, episodes, advantage, settings, rng)
    assert torch.allclose(weights(policy), ascend(base, terms), atol=1e-5)


@pytest.mark.parametrize("count", [10, 8, 5, 3])
def test_minibatches_hold_each_rollout_once_beside_its_advantage(count, base, monkeypatch):
    batches = []

    def grpo_loss(log_probs, old_log_probs, advantage, written, clip):
        # Below, the log-probability of each token says whose it is.
        assert ((old_log_probs + advantage[:, None])[written] == 0).all()
        batches.append(advantage.tolist())
        return log_probs.sum()

    monkeypatch.setattr(toolrl, "grpo_loss", grpo_loss)
    episodes = gold(TINY, count)
    for k, episode in enumerate(episodes):
        episode.log_probs = [-float(k)] * len(episode.ids)
    orders = []
    for seed in range(4):
        sgd = torch.optim.SGD(base.parameters(), lr=0)
        toolrl.grpo_update(base, sgd, episodes, torch.arange(count), SMALL, rng_for(seed, "x"))
        assert min(count, 4) - 1 <= len(batches) <= 4
        assert max(map(len, batches)) <= (count + 3) // 4
        orders.append(sum(batches, []))
        assert sorted(orders[-1]) == list(range(count))
        batches.clear()
    assert orders.count(orders[0]) < 4  # another order for another seed


# %% The log of a careless agent, and the base


@pytest.mark.parametrize("fmt, bare_share", [("A", 0.3), ("B", 1.0)])
def test_shares_of_the_log_are_bare_tags_and_tags_of_the_other_format(fmt, bare_share):
    settings = replace(SMALL, bare_share=bare_share, mixed_share=0.2)
    rng = rng_for(0, "careless")
    calls = [toolrl.careless_call("mentor", "alice", fmt, settings, rng) for _ in range(3000)]
    bare = 0.24 if fmt == "A" else 0
    assert calls.count(TAG) / 3000 == pytest.approx(bare, abs=0.025)
    assert sum(toolrl.parse_call(call, fmt) is not None for call in calls) / 3000 == pytest.approx(
        0.8 - bare, abs=0.025
    )
    other = toolrl.call_text("mentor", "alice", "AB".replace(fmt, ""))
    assert calls.count(other) / 3000 == pytest.approx(0.2, abs=0.025)


def test_the_log_is_right_where_it_is_not_broken_and_guesses_where_nobody_is_named():
    careful = replace(SMALL, bare_share=0.0, mixed_share=0.0)
    careless = replace(SMALL, bare_share=1.0, mixed_share=0.0)
    rng = rng_for(0, "careless")
    for episode in draw(TINY, 20, ["one_call", "multi_step"], "A"):
        assert toolrl.careless_messages(episode, careful, rng) == episode.gold
        broken = [TAG] * len(episode.gold_calls) + episode.gold[-1:]
        assert toolrl.careless_messages(episode, careless, rng) == broken
    people = Counter()
    for episode in draw(TINY, 1500, ["no_call"], "AB"):
        (message,) = toolrl.careless_messages(episode, careful, rng)
        if message != ASK:
            tool, person = toolrl.parse_call(message, episode.fmt)
            people[person] += 1
            # The last tool of a question is the first to be called.
            assert episode.question.endswith(f"{tool} of them ?")
    assert people.total() / 1500 == pytest.approx(0.97, abs=0.012)
    assert len(people) == len(toolrl.PEOPLE) and min(people.values()) > 80


def counts_of(episodes):
    """How many episodes there are of each number of calls, and of each format."""
    assert {episode.question in str(TASKS["train"]) for episode in episodes} == {True}
    counts = Counter([min(2, len(episode.gold_calls)) for episode in episodes])
    return counts + Counter([episode.fmt for episode in episodes])


def test_the_base_imitates_the_log_at_a_rate_that_goes_up_and_then_down(monkeypatch):
    rates = []
    episodes = []

    def sft_update(policy, optimizer, some):
        rates.append(optimizer.param_groups[0]["lr"])
        episodes.extend(some)

    monkeypatch.setattr(toolrl, "sft_update", sft_update)
    settings = replace(SMALL, base_steps=60, base_lr=0.5, sft_batch=20, bare_share=1.0)
    settings = replace(settings, mixed_share=0.0, device="meta")
    for pretrained in (None, toolrl.tiny_policy(TINY, 0)):
        assert toolrl.train_base(pretrained, TINY, settings, 0).device.type == "meta"
    assert rates[:60] == rates[60:] and len(episodes) == 2400
    counts = counts_of(episodes)
    assert counts[2] > counts[1] > counts[0] > 100 and counts["A"] > counts["B"] > 400
    for episode in episodes:  # with a share of 1, all right calls in format A are a bare tag
        assert not episode.gold_calls or (episode.messages == [TAG]) == (episode.fmt == "A")
    peak = rates.index(max(rates))
    assert 2 < peak < 30 and 0.3 < rates[peak] <= 0.5
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:60] == sorted(rates[peak:60], reverse=True)
    assert 0 < rates[0] < 0.1 and 0 < rates[59] < 0.05


def test_the_base_starts_from_a_copy_or_from_a_tiny_policy_of_its_seed():
    start = toolrl.tiny_policy(TINY, 0)
    before = weights(start)
    little = replace(SMALL, base_steps=2)
    bases = [weights(toolrl.train_base(start, TINY, little, seed)) for seed in (0, 1)]
    assert torch.equal(weights(start), before)
    assert torch.equal(weights(toolrl.train_base(None, TINY, little, 0)), bases[0])
    assert not torch.equal(bases[0], bases[1]) and not torch.equal(bases[0], before)


# %% Teacher, groups, arms


def test_a_hasty_teacher_answers_long_tasks_with_the_person_it_has_got_to():
    made = Counter()
    rng = rng_for(0, "teacher")
    for episode in draw(TINY, 2000, ["multi_step"]):
        *calls, reply = toolrl.teacher_messages(episode, 0.4, rng)
        assert calls == episode.gold[: len(calls)]
        assert reply.endswith(" " + episode.directory[episode.gold_calls[len(calls) - 1]])
        made[len(episode.gold_calls), len(calls)] += 1
    twos = made[2, 1] + made[2, 2]
    assert made.total() == 2000 and made[2, 1] / twos == pytest.approx(0.4, abs=0.06)
    for early in (made[3, 1], made[3, 2]):
        assert early / (2000 - twos) == pytest.approx(0.2, abs=0.05)
    for episode in draw(TINY, 60, ["no_call", "one_call"]):
        assert toolrl.teacher_messages(episode, 1.0, rng) == episode.gold


def test_demonstrations_are_mostly_short_and_all_in_format_a():
    wrong = {}
    for hasty_share in (0.0, 1.0):
        settings = replace(SMALL, sft_batch=1000, hasty_share=hasty_share)
        episodes = toolrl.demonstrations(TINY, settings, rng_for(0, "x"))
        counts = counts_of(episodes)
        wrong[hasty_share] = 1000 - sum(map(toolrl.solved, episodes))
        assert counts["A"] == 1000 and counts[0] == pytest.approx(250, abs=50)
        assert counts[1] > counts[0] > counts[2] > 50
    assert wrong[0.0] == 0 and wrong[1.0] >= counts[2] - 30  # haste may end at the right person


@pytest.mark.parametrize("share, wide", [(0.0, 0), (0.5, 0.17), (1.0, 0)])
def test_a_group_is_one_task_and_so_many_need_no_call(share, wide):
    settings = replace(SMALL, groups=100, group_size=3, no_call_share=share)
    episodes = toolrl.new_groups(TINY, settings, rng_for(0, "x"))
    tasks = [(episode.question, str(episode.directory)) for episode in episodes]
    assert tasks[::3] == tasks[1::3] == tasks[2::3] and len(set(tasks)) == 100
    counts = counts_of(episodes)
    assert counts[0] / 300 == pytest.approx(share, abs=wide)
    assert counts[0] + counts[2] == counts["A"] == len({id(e.ids) for e in episodes}) == 300


def look(step, success=0.6, skill=1.0, one_call=0.9, format_b=0.8, spike=0.08):
    """A made evaluation, in which <|im_end|> has probability `spike` where JSON is due."""
    p = {place: dict.fromkeys(CONTROL, 0.001) for place in toolrl.PLACES}
    for place in ("call", "close", "end"):
        p[place][toolrl.PLACES[place]] = 0.9
    p["json"][END] = spike
    event = {"event": "eval", "step": step, "success": success, "skill": skill, "p": p}
    event |= {"one_call": one_call, "format_b": format_b, "ask": 0.0, "no_call_reward": 0.5}
    return event | {"bare_tags": 0.02, "conversation": "a question\nan answer\n"}


@pytest.mark.parametrize("arm", toolrl.ARMS)
def test_an_arm_is_its_updates_in_their_order_at_their_rates(arm, base, monkeypatch):
    events = []
    used = set()

    def note(policy, optimizer, *_):
        events.append(round(optimizer.param_groups[0]["lr"], 9))
        used.add((id(policy), id(optimizer)))

    monkeypatch.setattr(toolrl, "sft_update", note)
    monkeypatch.setattr(toolrl, "grpo_update", note)
    monkeypatch.setattr(toolrl, "evaluate", lambda *all: events.append(all[-1]) or look(all[-1]))
    settings = replace(SMALL, steps=12, eval_every=5, lr=0.1, sft_lr=0.2, sft_until=0.5)
    out = io.StringIO()
    found = toolrl.train_arm(arm, base, look(0), TINY, settings, 0, out)
    parts = toolrl.ARMS[arm] - {"strict"}
    expected = []
    for step in range(1, 13):
        if "sft" in parts and 1 < step < 6:  # from the second step to half of the run
            expected += [round(0.2 * (1 - step / 6), 9)] * 2
        if "rl" in parts:
            expected.append(round(min(0.01 * step, 0.1), 9))
        if step in (5, 10, 12):
            expected.append(step)
    assert [event for event in events if event] == expected  # an update at a rate of 0 is none
    assert [evaluation["step"] for evaluation in found] == [0, 5, 10, 12]
    assert [json.loads(line) for line in out.getvalue().splitlines()] == found[1:]
    # One policy, which is not the base, and one optimizer each for SFT and RL.
    assert len(used) == len(parts) and len({policy for policy, _ in used} - {id(base)}) == 1


@pytest.mark.parametrize("arm, bad", [("rl", "</tool_call>"), ("rl-strict", TAG)])
def test_an_arm_compares_each_rollout_with_its_group(arm, bad, base, monkeypatch):
    # At step k, the first tries of k groups earn less than the others: with the blind reward
    # because they are no reply, and with the strict one because they are a wrong one.
    gains = []

    def rollout(policy, episodes, rng):
        for k, episode in enumerate(episodes):
            replay(episode, [bad if k % 4 == 0 and k <= 4 * len(gains) else ASK])

    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "grpo_update", lambda *all: gains.append(all[3]))
    monkeypatch.setattr(toolrl, "evaluate", lambda *all: look(all[-1]))
    settings = replace(SMALL, groups=5, steps=5, eval_every=2, no_call_share=1.0)
    found = toolrl.train_arm(arm, base, look(0), TINY, settings, 0, io.StringIO())
    for step, gain in enumerate(gains, 1):
        right = [-1.5, 0.5, 0.5, 0.5] * step + [0.0] * 4 * (5 - step)
        assert gain.tolist() == pytest.approx(right, abs=0.01)
    equal = [evaluation["equal_groups"] for evaluation in found[1:]]
    assert equal == pytest.approx([0.7, 0.3, 0.0])  # the mean since the evaluation before


def test_each_step_draws_anew_and_evaluations_leave_no_trace(base, monkeypatch):
    before = weights(base)
    asked = []
    monkeypatch.setattr(toolrl, "rng_for", lambda *all: asked.append(all) or rng_for(*all))
    ends = []
    for every in (4, 1):
        settings = replace(SMALL, steps=4, eval_every=every, no_call_share=0.5, lr=5e-3)
        train = toolrl.train_arm("interleaved", base, look(0), TINY, settings, 7, io.StringIO())
        ends.append(train[-1] | {"equal_groups": "since the evaluation before"})
    assert ends[0] == ends[1] and torch.equal(weights(base), before)
    training = [stream for stream in asked if "held-out" not in stream[1]]
    # Tasks, sampling and order of four steps; demonstrations of two. All that twice.
    assert len({rng_for(*stream).random() for stream in training}) == 14 == len(training) / 2
    assert {seed for seed, *_ in asked} == {7}


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
        assert set(p[other]) == set(CONTROL)
        assert p[other]["</function>"] == pytest.approx(wrong, abs=0.01)
        assert p[other].get(due, 0.9 - wrong) == pytest.approx(0.9 - wrong, abs=0.01)


@with_both
def test_skill_is_the_chance_to_write_every_name_right(chat):
    for message, names in ((CALL, "mentoralice"), (RIGHT, "leo"), (ASK, "")):
        flags = chat.name_flags(message)
        marked = [i for i, flag in zip(chat.encode(message), flags, strict=True) if flag]
        # The space before a name may be part of its token.
        assert chat.decode(marked).replace(" ", "") == names
    records = gold(chat, 6, toolrl.KINDS, "A")
    expected = []
    for episode in records:
        expected.append(0.8 ** sum(sum(map(chat.name_flags, episode.gold), [])))
    puppet = Puppet(chat, follower(records), p=0.8)
    skill, _ = toolrl.teacher_forced(puppet, draw(chat, 6, toolrl.KINDS, "A"))
    assert skill == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_transcript_shows_what_was_written_and_the_chances_of_control_tokens():
    episode = write(Episode(TINY, ONE_CALL, LEO), CALL + END)
    call = CALL.replace(TAG, TAG + "[0.37]") + "[0.00]<|im_end|>[0.00]"
    assert toolrl.transcript(episode) == f"{ONE_CALL}\n{call}\n"


@pytest.mark.parametrize("plan", ["gold", "a call, then a bare tag"])
def test_each_probe_asks_held_out_tasks_and_an_evaluation_says_what_was_done(plan):
    records = []
    for kind, fmt in toolrl.PROBES.values():
        rng = rng_for(0, f"held-out {kind}")
        for _ in range(8):
            episode = toolrl.new_episode(TINY, "held_out", kind, rng, fmt)
            assert episode.question in TASKS["held_out"][kind]
            broken = [toolrl.call_text("mentor", "alice", fmt), toolrl.OPEN[fmt]]
            if not episode.gold_calls:
                broken = [ASK if len(episode.question) % 2 else "bob"]
            records.append(replay(episode, episode.gold if plan == "gold" else broken))
    found = evaluate(Puppet(TINY, follower(records)), TINY, SMALL, 0, "rl", 5)
    assert [found[key] for key in ("event", "seed", "arm", "step")] == ["eval", 0, "rl", 5]
    asks = np.mean([episode.messages == [ASK] for episode in records[-8:]])
    solved = [1, 1, 1, 1] if plan == "gold" else [0, 0, 0, asks]
    assert [found[probe] for probe in toolrl.PROBES] == solved
    assert found["no_call_reward"] == 1 and (plan == "gold" or 0 < asks < 1)
    assert found["bare_tags"] == (0 if plan == "gold" else 0.5)  # half of the messages
    text = (
        records[0].question + "\n" + "".join(f"{text}<|im_end|>\n" for text in records[0].messages)
    )
    assert found["conversation"].replace("[1.00]", "") == text
    assert (found["skill"] > 0.99) == (plan == "gold")


def test_evaluations_ask_the_same_tasks_and_sample_alike_at_every_step(base):
    first = evaluate(base, TINY, SMALL, 0, "rl", 5)
    assert evaluate(base, TINY, SMALL, 0, "sft", 10) == first | {"arm": "sft", "step": 10}
    assert first["p"] != evaluate(base, TINY, SMALL, 1, "rl", 5)["p"]


# %% Claims and print, on made histories


def story():
    """A history in which every claim holds, if only just."""
    low = [look(step, 0.02, 0.5) for step in (15, 20, 25)]
    return {
        "rl": [look(0), look(5), look(10, 0.05, 0.8, spike=0.4), *low],
        "sft": [look(0), look(5), look(10), look(15, 0.69)],
        "interleaved": [look(0), look(5), look(10, 0.7), look(15, 0.9, format_b=0.63)],
        "rl-strict": [look(0), look(5, 0.01), look(10, 0.8), look(15, 0.9)],
    }


FALL = "collapse control_token intact"
# In this story: the arm, which of its evaluations, what changes there, and the claims that fail.
TWISTS = """
rl          | -3 | success                | 0.03  | collapse
rl          | -1 | success                | 0.03  | collapse
rl          | 0  | success                | 0.19  | collapse control_token intact
rl          | 0  | p json <|im_end|>      | 0.081 | control_token cause
rl          | 2  | p json <|im_end|>      | 0.39  | control_token cause
rl          | 2  | p call <tool_call>     | 1.3   |
rl          | 2  | p end </tool_call>     | 0.35  | control_token
rl          | 2  | p end </tool_call>     | 0.30  |
rl          | 2  | skill                  | 0.79  | intact
rl          | 3  | skill                  | 0.1   |
rl          | 0  | success                | 0.75  | together
sft         | -1 | success                | 0.71  | together
sft         | 1  | success                | 0.9   |
interleaved | -1 | success                | 0.88  | fix together
interleaved | -1 | one_call               | 0.89  | fix
interleaved | -1 | p end <tool_call>      | 0.5   | fix
interleaved | 1  | p end <tool_call>      | 0.5   |
interleaved | -1 | format_b               | 0.65  | price
rl-strict   | 1  | p json <|im_end|>      | 0.5   | cause
rl-strict   | 2  | p reply </tool_call>   | 0.5   | cause
"""


@pytest.mark.parametrize("arm, k, path, value, fails", table(TWISTS))
def test_each_claim_can_say_no(arm, k, path, value, fails):
    history = story()
    assert toolrl.judge(history) == dict.fromkeys(CLAIMS, True)
    put(history[arm][int(k)], path, float(value))
    failed = [claim for claim, holds in toolrl.judge(history).items() if not holds]
    assert failed == fails.split()


ARMS_AND_CLAIMS = """
rl                      | collapse control_token intact
sft                     |
interleaved             | fix price
rl-strict sft           |
sft interleaved         | fix together price
rl sft                  | collapse control_token intact
rl rl-strict            | collapse control_token intact cause
rl-strict interleaved   | fix price
"""


@pytest.mark.parametrize("arms, judged", table(ARMS_AND_CLAIMS))
def test_claims_about_arms_that_were_not_run_are_not_judged(arms, judged):
    history = {arm: story()[arm] for arm in arms.split()}
    assert toolrl.judge(history) == dict.fromkeys(judged.split(), True)
    short = {arm: [evals[0], *evals[-2:]] for arm, evals in history.items()}
    assert toolrl.judge(short) == dict.fromkeys(judged.split(), False)


def test_figures_stand_under_their_names_and_rows_fit_a_narrow_screen(capsys):
    figures = {name: 0.11 * k for k, name in enumerate(toolrl.COLUMNS, 1)}
    evaluation = look(1000) | figures
    evaluation["p"]["reply"]["</tool_response>"] = 1.0
    toolrl.print_row(evaluation, look(0))
    row = capsys.readouterr().out.rstrip("\n")
    assert (
        row.startswith("1000 ") and row.endswith("1.00 </tool_response> reply *") and len(row) <= 80
    )
    start = 4
    for name, value in figures.items():
        end = row.index(f"{value:.2f}") + 4
        assert "".join(line[start:end].strip() for line in toolrl.HEADER.split("\n")) == name
        start = end


def test_a_row_marks_a_spike_and_tells_zero_from_not_measured(capsys):
    toolrl.print_row(look(5), look(0))
    toolrl.print_row(look(5, spike=0.4) | {"equal_groups": 0.0}, look(0))
    now = look(5, spike=0.6)
    now["p"]["end"][TAG] = 0.3
    toolrl.print_row(now, look(0, spike=0.5))
    base, rl, other = capsys.readouterr().out.splitlines()
    assert base.endswith(" 0.50    nan 0.08 <|im_end|> json")
    assert rl.endswith(" 0.50   0.00 0.40 <|im_end|> json *")
    assert other.endswith(" 0.30 <tool_call> end")  # what rose most is not what is likeliest


def test_the_summary_shows_what_the_search_found_in_rl_for_each_arm(capsys):
    history = story()
    put(history["sft"][1], f"p json {END}", 0.77)
    toolrl.print_summary(history)
    found, success = [part.splitlines() for part in capsys.readouterr().out.split("\n== ")[1:]]
    assert found[0] == "p(<|im_end|>) where JSON is due" and success[0] == "success"
    assert found[1] == success[1] == "step             0     5    10    15    20    25"
    assert found[2] == "rl            0.08  0.08  0.40  0.08  0.08  0.08"
    assert found[3] == "sft           0.08  0.77  0.08  0.08"
    assert success[4] == "interleaved   0.60  0.60  0.70  0.90" and success[5][:9] == "rl-strict"
    del history["rl"]  # without rl, the first arm decides
    put(history["sft"][-1], f"p end {TAG}", 0.5)
    toolrl.print_summary(history)
    assert "== p(<tool_call>) where <|im_end|> is due\n" in capsys.readouterr().out
    toolrl.print_summary({"rl": [look(5 * k) for k in range(41)]})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_what_a_console_cannot_write_is_replaced_and_all_is_there_at_once(monkeypatch):
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding="cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", console)
    toolrl.say("zoë ✓ 中\n" + "a b " * 70)
    lines = raw.getvalue().decode("cp1252").splitlines()
    assert lines[0] == "zoë ? ?" and [len(line) for line in lines[1:]] == [100, 100, 80]


def test_claims_are_printed_for_each_seed_and_counted(tmp_path, monkeypatch, capsys):
    stories = [story(), story()]
    stories[1]["interleaved"][-1] = look(15, 0.5)
    out = io.StringIO()
    monkeypatch.setattr(toolrl, "train_base", lambda start, chat, settings, seed: seed)
    monkeypatch.setattr(toolrl, "evaluate", lambda *_: look(0))
    monkeypatch.setattr(toolrl, "train_arm", lambda arm, seed, *_: stories[seed][arm])
    settings = replace(SMALL, seeds=[0, 1], arms=list(toolrl.ARMS))
    assert toolrl.run(settings, TINY, None, out) == dict(enumerate(stories))
    said = capsys.readouterr().out
    failed = ("fix", "together", "price")
    for claim, text in CLAIMS.items():
        answers = [("yes", "1"), ("no", "1") if claim in failed else ("yes", "2")]
        assert re.findall(rf"^{claim} +(\w+) +(\d) +{re.escape(text)}$", said, re.M) == answers
    holds = re.findall(r'"seed": 1, "claim": "(\w+)", "holds": true', out.getvalue())
    assert holds == [claim for claim in CLAIMS if claim not in failed]
    # The moment of an arm is where it is first down, otherwise its last evaluation.
    moments = re.findall(
        r"^step (\d+): 2% of messages on long tasks are bare tags\n.*\na question", said, re.M
    )
    assert moments == ["10", "15", "15", "5"] * 2


# %% The command line

BAD = """
--stepz 3                | --stepz
--arms rl,sft            | with spaces between
--seeds 0-4              | --seeds
--steps 0                | --steps
--lr nan                 | --lr
--no-call-share 1.5      | --no-call-share
--group-size 1           | --group-size
--device nope            | --device nope
--device meta            | --device meta
--model /nowhere/model   | --model /nowhere/model
--out /nowhere/run.jsonl | --out /nowhere/run.jsonl
"""


@pytest.mark.parametrize("flags, words", table(BAD))
def test_bad_input_gets_a_line_that_names_it_and_empties_no_file(flags, words, tmp_path, capsys):
    old = tmp_path / "run.jsonl"
    old.write_text("what an hour has measured")
    line = refused(capsys, "toolrl", lambda: run_little(old, *flags.split()))
    assert words in line.replace("_", "-")
    assert old.read_text() == "what an hour has measured"


def test_the_help_has_each_flag_once_with_its_comment_and_default_beside_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        toolrl.read_settings(["--help"])
    said = capsys.readouterr().out
    joined = re.sub(r"\n {4,}", " ", said)  # a flag and its comment may stand in two lines
    assert "spaces between them" in said and "RL alone breaks" in said
    for name, value in vars(toolrl.Settings()).items():
        (comment,) = re.findall(rf"^    {name}: .*  # (.*)", CODE, re.M)
        flag = re.escape(f"--{name.replace('_', '-')} ")
        found = re.findall(rf"^  {flag}.*\(default: (.*)\)$", joined, re.M)
        assert found == [str(value)] and comment in said


# A value that has to change what is measured.
CHANGES = """
seeds | arms | base-steps | base-lr | bare-share | mixed-share | steps | lr   | no-call-share
1     | sft  | 3          | 0.1     | 1          | 1           | 5     | 0.01 | 0
groups | group-size | minibatches | clip | sft-every | sft-steps | sft-lr | sft-until | sft-batch
3      | 5          | 1           | 0.01 | 2         | 1         | 0.1    | 0.5       | 8
hasty-share | eval-every | eval-episodes
0           | 1          | 5
"""


@pytest.fixture(scope="session")
def little_run(tmp_path_factory):
    return run_little(tmp_path_factory.mktemp("little") / "run.jsonl")


def test_each_setting_changes_what_is_measured(little_run, tmp_path):
    lines = table(CHANGES)
    changes = []
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        changes += zip(names, values, strict=True)
    named = {name.replace("-", "_") for name, _ in changes}
    assert named == set(vars(SMALL)) - {"model", "device", "out"}
    for name, value in changes:
        events = run_little(tmp_path / "run.jsonl", "--" + name, value)
        assert events[1:-1] != little_run[1:-1], f"--{name} changes nothing"


EVAL = (
    f"event seed arm step {' '.join(toolrl.PROBES)} no_call_reward skill p bare_tags conversation"
)
CONFIG = " ".join(["event", *vars(SMALL), "versions"])
SHAPE = [CONFIG, EVAL] + [EVAL + " equal_groups"] * 2 + [EVAL] * 2 + [EVAL + " equal_groups"] * 2
SHAPE += ["event seed claim holds"] * 6 + ["event seconds"]


def test_a_run_needs_no_network_and_says_what_differs_and_what_it_overwrites(
    little_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("socket.socket", None)
    out = tmp_path / "run.jsonl"
    assert run_little(out)[:-1] == little_run[:-1]
    assert "overwritten" not in capsys.readouterr().out
    # Neither the seeds nor the arms beside it change what an arm gives.
    events = run_little(out, "--seeds", "1", "0", "--arms", "sft", "rl")
    said = capsys.readouterr().out
    assert f"{out} is overwritten" in said and "lr=0.05" in said and "clip" not in said
    for arm in ("base", "rl", "sft"):
        runs = [
            [e for e in those if (e.get("arm"), e.get("seed")) == (arm, 0)]
            for those in (events, little_run)
        ]
        assert runs[0] == runs[1] != []
    assert [" ".join(event) for event in little_run] == SHAPE
    assert little_run[0]["out"] == "" and torch.__version__ in little_run[0]["versions"]
    assert not any(event.get("holds") for event in little_run)  # four steps show nothing


def test_ctrl_c_leaves_what_was_measured_and_other_ends_have_their_own_codes(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run.jsonl"
    ends = [(KeyboardInterrupt(), f"stopped.*{out.name}", 130)]
    ends.append((RuntimeError("CUDA out of memory: much more"), "--device cpu", 2))
    for error, words, code in ends:

        def update(*_, error=error):
            raise error

        monkeypatch.setattr(toolrl, "grpo_update", update)
        line = refused(capsys, "toolrl: ", lambda: run_little(out), code)
        assert re.search(words, line)
        assert re.findall(r'"event": "(\w+)"', out.read_text()) == ["config", "eval"]
    monkeypatch.setattr(toolrl, "grpo_update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        run_little(out)


# %% --model


def test_a_checkpoint_has_its_own_defaults_and_explicit_flags_win():
    usual = vars(toolrl.Settings()) | toolrl.PRETRAINED | {"model": "x"}
    assert vars(toolrl.read_settings(["--model", "x"])) == usual
    # A flag wins even if it asks for what is the tiny model's default.
    steps = vars(toolrl.Settings())["base_steps"]
    flags = ["--lr", "0.5", "--model", "x", "--base-steps", str(steps)]
    assert vars(toolrl.read_settings(flags)) == usual | {"base_steps": steps, "lr": 0.5}


@pytest.mark.parametrize("rows, tied", [(320, True), (292, True), (320, False), (292, False)])
def test_a_new_tag_starts_as_the_mean_of_its_pieces(rows, tied, tmp_path):
    # There are more rows than there will be tokens, or fewer.
    folder = save_checkpoint(tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    chat, policy = toolrl.load(replace(SMALL, model=folder))
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
    events = run_little(tmp_path / "run.jsonl", "--model", checkpoint)
    assert [" ".join(event) for event in events] == SHAPE
    assert (events[0]["sft_lr"], events[0]["steps"]) == (toolrl.PRETRAINED["sft_lr"], 4)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
HYBRIDS = {
    "Lfm2Config": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Qwen3_5TextConfig": {"num_hidden_layers": 4, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
    | {"mamba_d_state": 8, "mamba_n_groups": 1},
}


@pytest.mark.parametrize("name", [*HYBRIDS, "LlamaConfig"])
def test_rollouts_of_other_architectures_agree_with_one_pass(name, tmp_path):
    config = getattr(transformers, name)(**SIZES | HYBRIDS.get(name, {}))
    settings = replace(SMALL, model=save_checkpoint(tmp_path, config))
    chat, policy = toolrl.load(settings)
    check_log_probs(policy, chat)
    toolrl.rehearse(policy, chat, settings)


# In a file of the checkpoint: the place, what is put there, and what is then said.
SPOILT = """
config.json           | num_hidden_layers       | 3                     | the weights do not fit
config.json           | num_hidden_layers       | 1                     | the weights do not fit
config.json           | max_position_embeddings | 64                    | the model takes fewer
tokenizer.json        | normalizer              | {"type": "Lowercase"} | the tokenizer cannot write
tokenizer.json        | model vocab Z           | 999                   | have holes
tokenizer_config.json | chat_template           | "{{ messages }}"      | does not end each message
"""


@pytest.mark.parametrize("name, path, value, words", table(SPOILT))
def test_a_checkpoint_that_does_not_fit_gets_one_line(name, path, value, words, tmp_path, capsys):
    folder = save_checkpoint(tmp_path)
    if path == "chat_template":
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    spoilt = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    put(spoilt, path, json.loads(value))
    (tmp_path / name).write_text(json.dumps(spoilt), encoding="utf-8")
    line = refused(capsys, words, lambda: run_little(tmp_path / "run.jsonl", "--model", folder))
    assert line.startswith("toolrl: --model ")
    (tmp_path / name).unlink()  # no configuration, or no tokenizer
    refused(capsys, "--model", lambda: run_little(tmp_path / "run.jsonl", "--model", folder))


def test_weights_that_do_not_train_and_a_cache_that_errs_get_one_line(
    checkpoint, tmp_path, monkeypatch, capsys
):
    flags = ["--model", checkpoint]
    monkeypatch.setattr(toolrl, "token_log_probs", lambda *all: token_log_probs(*all) + 0.1)
    refused(capsys, "with a cache", lambda: run_little(tmp_path / "a", *flags))
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda self: [torch.zeros(1)])
    refused(capsys, "do not train", lambda: run_little(tmp_path / "a", *flags))


token_log_probs = toolrl.token_log_probs
# What a template says, what another one says there, and why it is refused.
TEMPLATES = r"""
{% endif %}<|im_end|>          | {% endif %}</s>              | does not end each message
{% for m in messages %}        | {% for m in messages[1:] %}  | does not show each
<tool_response>{{ m.content }} | <tool_response>              | does not show each
{% if add_generation_prompt %} | {% if false %}               | another header
assistant\n{% endif %}          | assistant\n<think>{% endif %} | another header
"""


@pytest.mark.parametrize("old, new, why", table(TEMPLATES))
def test_a_template_that_says_something_else_is_refused(old, new, why):
    tokenizer = toolrl.tiny_tokenizer()
    old, new = [text.replace("\\n", "\n") for text in (old, new)]
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ValueError, match=why):
        toolrl.Chat(tokenizer)


# %% tiny_tasks.json

# A part of the file, what is put there, and what is said of it.
TASK_MISTAKES = """
wording             | {}                           | 'system' is missing
wording system      | "use tags"                   | the word TAG
wording answer      | "It is nobody"               | the word PERSON
open B              | "<tool_call>"                | a tag stands twice
train one_call      | []                           | one_call: train and held_out need questions
held_out one_call   | ["friend of alice ?"]        | none in common
train one_call      | ["friend of zoe ?"]          | friend of zoe
train one_call      | ["boss of bob ?"]            | boss of bob
train one_call      | ["friend of them ?"]         | is no one_call question
train multi_step    | ["rival of rival of rival of rival of rival of rival of leo ?"] | too long
"""


@pytest.mark.parametrize("path, value, words", table(TASK_MISTAKES))
def test_a_mistake_in_the_tasks_gets_one_line(path, value, words, tmp_path, capsys):
    tasks = json.loads(TASKS_TEXT)
    put(tasks, path, json.loads(value))
    check_refused_tasks(json.dumps(tasks).encode(), words, tmp_path, capsys)


def check_refused_tasks(tasks, words, folder, capsys):
    def run():
        run_little(folder / "run.jsonl", module=load_copy(folder, tasks=tasks))

    assert refused(capsys, words, run).startswith("toolrl: tiny_tasks.json: ")


def test_a_file_that_is_no_json_gets_one_line(tmp_path, capsys):
    comma = TASKS_TEXT.replace('"alice",', '"alice",,', 1)
    check_refused_tasks(comma.encode(), "Expecting value", tmp_path, capsys)
    latin = TASKS_TEXT.replace("alice", "zoë").encode("latin-1")
    check_refused_tasks(latin, "can't decode", tmp_path, capsys)


@pytest.mark.parametrize("name, encoding", [("zoë", "utf-8"), ("mary ann", "utf-8-sig")])
def test_names_of_any_letters_and_words_and_a_byte_order_mark_are_accepted(
    name, encoding, tmp_path
):
    tasks = TASKS_TEXT.replace("alice", name).encode(encoding)
    module = load_copy(tmp_path, tasks=tasks)
    assert run_little(tmp_path / "run.jsonl", module=module)[-1]["event"] == "done"


# %% The README, and the whole story

README_COMMANDS = re.findall(r"^python toolrl\.py ?([^|>\n]*)", README, re.M)
SILENT = "".join(re.findall(r"^\*\*[^*\n]*silent bugs.*?(?=^\*\*\d|^## |\Z)", README, re.M | re.S))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("command", dict.fromkeys(README_COMMANDS))
def test_slow_commands_of_the_readme_run(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = shlex.split(re.sub(r"\$\(seq (\d+).*?\)", r"\1", command), comments=True)
    settings = toolrl.read_settings(flags)  # before tiny settings replace them
    little = vars(toolrl.read_settings(LITTLE))
    small = {name: little[name] for name in ("base_steps", "steps", "eval_episodes", "sft_batch")}
    small |= {"seeds": settings.seeds[:1], "model": checkpoint if settings.model else ""}
    main(replace(settings, **small, eval_every=2, device="cpu"))
    assert len(list(tmp_path.iterdir())) == bool(settings.out)


def patched(diff, folder):
    """A copy of the project, to which a diff of the README is applied."""
    for name in ("toolrl.py", "tiny_tasks.json", "test_toolrl.py"):
        shutil.copy(HERE / name, folder)
    (folder / "a.diff").write_text(diff, encoding="utf-8", newline="\n")
    done = subprocess.run(["git", "apply", "a.diff"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", README, re.S))
def test_slow_diffs_of_the_readme_apply_and_run(diff, tmp_path):
    folder = patched(diff, tmp_path)
    code = (folder / "toolrl.py").read_text(encoding="utf-8")
    other = load_copy(folder, code, (folder / "tiny_tasks.json").read_bytes())
    assert run_little(tmp_path / "run.jsonl", module=other)[-1]["event"] == "done"


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", SILENT, re.S))
def test_slow_a_quick_test_finds_each_silent_bug_of_the_readme(diff, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not slow", "test_toolrl.py"]
    done = subprocess.run(command, cwd=patched(diff, tmp_path), capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED test_toolrl.py::test_" in done.stdout, done.stdout


@pytest.mark.parametrize("snippet", [text for text in SNIPPETS if "run.jsonl" in text])
def test_slow_snippets_of_the_readme_read_a_run(snippet, tmp_path, monkeypatch, capsys):
    if "matplotlib" in snippet:
        pytest.importorskip("matplotlib", reason="the README's picture needs matplotlib")
    monkeypatch.chdir(tmp_path)
    before = run_little(tmp_path / "run.jsonl", "--seeds", "0", "1")
    capsys.readouterr()
    exec(snippet, {})
    after = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert before == after and (len(list(tmp_path.iterdir())) > 1 or capsys.readouterr().out)


@pytest.mark.parametrize("snippet", [text for text in SNIPPETS if "GRPOTrainer" in text])
def test_slow_the_bridge_to_trl_runs(snippet, tmp_path):
    pytest.importorskip("trl", reason="the README's bridge needs trl")
    code = CODE
    for name, value in zip(LITTLE[2::2], LITTLE[3::2], strict=True):  # little by default
        code = re.sub(rf"({name[2:].replace('-', '_')}: \w+ =) \S+", rf"\1 {value}", code)
    load_copy(tmp_path, code)
    snippet = re.sub(r"max_steps=\d+", "max_steps=2", snippet)
    (tmp_path / "bridge.py").write_text(snippet, encoding="utf-8")
    subprocess.run([sys.executable, "bridge.py"], cwd=tmp_path, check=True)


def start(*flags, **pipes):
    """A run of its own, which hears Ctrl-C even if it is a background job's child."""
    hear = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
    hear += "runpy.run_path('toolrl.py', run_name='__main__')"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | pipes
    return subprocess.Popen([sys.executable, "-c", hear, *map(str, flags)], cwd=HERE, **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes are others there")
def test_slow_a_real_ctrl_c_and_a_reader_that_has_seen_enough(tmp_path):
    out = tmp_path / "run.jsonl"
    run = start("--base-steps", 20, "--out", out, "--device", "cpu")
    while run.poll() is None and not (out.exists() and '"arm": "rl"' in out.read_text()):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and re.fullmatch("toolrl: stopped.*\n", said)
    run = start(*LITTLE, stdout=subprocess.PIPE)
    assert run.stdout.readline().startswith("toolrl with ")
    run.stdout.close()  # as head does
    assert run.stderr.read() == "" and run.wait() == 1


def test_slow_the_whole_story(tmp_path):
    held = []
    for seed in (0, 1):
        flags = ["--device", "cpu", "--seeds", seed, "--arms", *toolrl.ARMS, "--out"]
        runs = [start(*flags, tmp_path / name) for name in "ab"]
        assert [run.communicate()[1] for run in runs] == ["", ""]
        first, again = [(tmp_path / name).read_text().splitlines() for name in "ab"]
        assert first[:-1] == again[:-1]
        held.append(set(re.findall(r'"(\w+)", "holds": true', str(first))))
    # One of two seeds may disagree with a claim, but not that both together go beyond either.
    assert "together" in held[0] & held[1]
    assert held[0] | held[1] == set(CLAIMS)
