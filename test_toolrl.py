"""Tests of toolrl. The first part grades four functions that a student writes again.

    python -m pytest -q -k grpo_loss      one of advantages, grpo_loss, blind_reward and rollout
    python -m pytest -q -k "not slow"     all that is quick
    python -m pytest -q                   with the README's commands, and whole runs

A failure of the first part guesses the mistake. It needs toolrl.py and tiny_tasks.json alone.
"""

import copy
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import toolrl
from toolrl import CLAIMS, CONTROL, END, TASKS, Episode, replay, rng_for

torch.set_num_threads(1)
TINY = toolrl.Chat(toolrl.tiny_tokenizer())
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo


def table(text):
    """The rows of a table in a text, whose cells are parted by "|"."""
    return [re.split(r" +\| *", line.strip()) for line in text.splitlines() if "|" in line]


def numbers(text):
    """A tensor of the numbers in a text, whose rows are parted by ";"."""
    return torch.tensor([list(map(float, row.split())) for row in text.split(";")])


def grade(found, right, mistakes):
    """Fail unless these numbers are right, and guess why from the numbers that a mistake gives."""
    assert found is not None, "it returns nothing"
    guesses = []
    for guess, text in table(f"right | {right}\n{mistakes}"):
        due = numbers(text)
        if found.shape == due.shape and due.allclose(found.float(), atol=0.01, equal_nan=True):
            guesses.append(guess)
    why = " or ".join(guesses) or "no mistake that these tests know"
    assert "right" in guesses, f"{why}: it should be {right}, but it is {found.tolist()}"


# %% Graded: advantages


def test_advantages_of_one_success_in_four():
    mistakes = """
    the mean of the group is not taken off                     | 2 0 0 0
    the mean of the others is taken off, not that of the group | 2 -0.667 -0.667 -0.667
    the sign is wrong: what did better than its group is above | -1.5 0.5 0.5 0.5
    a group is a row, and these are of columns                 | nan nan nan nan
    the rewards come back as they were                         | 1 0 0 0
    they are not divided by the spread                         | 0.75 -0.25 -0.25 -0.25
    they are divided by the variance, not by its root          | 3 -1 -1 -1
    the spread divides by N, not by N - 1 as torch.std does    | 1.732 -0.577 -0.577 -0.577
    """
    grade(toolrl.advantages(numbers("1 0 0 0")), "1.5 -0.5 -0.5 -0.5", mistakes)


def test_advantages_compare_with_the_group_and_not_with_the_batch():
    mistakes = """
    mean and spread are the batch's | 0.935 -0.935 -0.935 -0.935; 0.935 0.935 0.935 -0.935
    the mean is the batch's         | 1 -1 -1 -1; 1 1 1 -1
    the spread is the batch's       | 1.403 -0.468 -0.468 -0.468; 0.468 0.468 0.468 -1.403
    a group is a row, not a column  | 0 -0.707 -0.707 0; 0 0.707 0.707 0
    """
    found = toolrl.advantages(numbers("1 0 0 0; 1 1 1 0"))
    grade(found, "1.5 -0.5 -0.5 -0.5; 0.5 0.5 0.5 -1.5", mistakes)


def test_advantages_of_equal_rewards_are_zeros():
    mistakes = """
    equal rewards divide 0 by 0            | nan nan nan nan; nan nan nan nan
    the mean of the batch is taken off     | 1 1 1 1; -1 -1 -1 -1
    the mean of the group is not taken off | 10000 10000 10000 10000; 0 0 0 0
    """
    found = toolrl.advantages(numbers("1 1 1 1; 0 0 0 0"))
    grade(found, "0 0 0 0; 0 0 0 0", mistakes)


def test_advantages_of_groups_of_two():
    mistakes = """
    the spread divides by N, not by N - 1 as torch.std does | 0 0; 1 -1; 0 0
    they are not divided by the spread                      | 0 0; 0.5 -0.5; 0 0
    equal rewards divide 0 by 0                             | nan nan; 0.707 -0.707; nan nan
    """
    grade(toolrl.advantages(numbers("0 0; 1 0; 1 1")), "0 0; 0.707 -0.707; 0 0", mistakes)


def test_advantages_take_rewards_of_any_size():
    mistakes = """
    they are divided by the range, not by the spread        | -0.5 0 0.5
    they are divided by the variance, not by its root       | -0.05 0 0.05
    they are not divided by the spread                      | -20 0 20
    the spread divides by N, not by N - 1 as torch.std does | -1.225 0 1.225
    """
    rewards = numbers("20 40 60")
    grade(toolrl.advantages(rewards), "-1 0 1", mistakes)
    assert rewards.tolist() == [[20, 40, 60]], "the rewards themselves were changed, in place"


# %% Graded: grpo_loss


def loss_of(ratios, advantage, written="1", clip=0.2):
    """grpo_loss, where the probability of each token is its ratio times 0.3, the old one."""
    old = torch.full_like(numbers(ratios), 0.3).log()
    written = numbers(written).bool().expand_as(old)
    gain = numbers(advantage)[0]
    loss = toolrl.grpo_loss(old + numbers(ratios).log(), old, gain, written, clip)
    assert loss is not None and loss.shape == (), f"a loss is one number, but this is {loss}"
    return loss.view(1, 1)


def test_grpo_loss_before_the_policy_has_moved():
    mistakes = """
    the sign is wrong: an optimizer goes down the loss, and the objective should rise | 2
    the difference of log-probabilities has to go through exp                         | 0
    a sum for a mean                                                                  | -6
    log p in place of the ratio of probabilities                                      | 2.408
    the objective is clipped, not the ratio                                           | -1.2
    """
    grade(loss_of("1 1 1", "2"), "-2", mistakes)


def test_grpo_loss_gives_all_tokens_of_a_rollout_its_advantage():
    mistakes = """
    the advantages stand beside columns: each belongs to a row, advantage[:, None] | 0.333
    the mean of the advantages for all rollouts: each has its own                  | 1
    a mean over rollouts first: all tokens weigh the same                          | 1
    what was not written is left out of the sum, but it counts in the mean         | 1.25
    """
    grade(loss_of("1 1; 1 1", "1 -3", "1 0; 1 1"), "1.667", mistakes)


def test_grpo_loss_takes_the_new_probability_by_the_old():
    mistakes = """
    the ratio is upside down: new by old                      | -0.667
    log p in place of the ratio of probabilities              | 0.799
    the ratio is left out                                     | -1
    the difference of log-probabilities has to go through exp | -0.405
    the clip of 0.2 is fixed, and the argument is not used    | -1.2
    """
    grade(loss_of("1.5", "1", clip=0.9), "-1.5", mistakes)


CLIPS = """
1.5 |  1 | 0.2 | -1.2 | no clip, or the maximum for the minimum                | -1.5
0.5 | -1 | 0.2 | 0.8  | no clip, or the maximum for the minimum                | 0.5
1.5 |  1 | 0.2 | -1.2 | the sign is wrong                                      | 1.2
0.5 |  1 | 0.2 | -0.5 | clipped on the wrong side: this has to be pushed back  | -0.8
1.5 | -1 | 0.2 | 1.5  | clipped on the wrong side: this has to be pushed back  | 1.2
3   |  1 | 0.5 | -1.5 | the clip of 0.2 is fixed, and the argument is not used | -1.2
0.1 | -1 | 0.5 | 0.5  | the clip of 0.2 is fixed, and the argument is not used | 0.8
"""


@pytest.mark.parametrize("ratio, advantage, clip, right, mistake, wrong", table(CLIPS))
def test_grpo_loss_clips_a_token_that_has_moved(ratio, advantage, clip, right, mistake, wrong):
    grade(loss_of(ratio, advantage, clip=float(clip)), right, f"{mistake} | {wrong}")


def test_grpo_loss_has_a_ratio_for_each_token():
    mistakes = """
    a ratio for the whole rollout: each token has its own | -1
    no clip, or the maximum for the minimum               | -1.25
    """
    grade(loss_of("2 0.5", "1"), "-0.85", mistakes)


def test_grpo_loss_leaves_out_prompts_results_and_padding():
    mistakes = """
    padding and prompts are in the mean                                    | -2.8
    the mask is shifted by a token                                         | -3.2
    a sum for a mean                                                       | -8
    divided by the rollouts, not by the written tokens                     | -4
    what was not written is left out of the sum, but it counts in the mean | -1
    a mean over rollouts first: all tokens weigh the same                  | -2.5
    the mean of the advantages for all rollouts: each has its own          | -2.5
    """
    found = loss_of("1.2 1 1.2 1; 1.2 1 1.2 1.2", "3 2", written="0 1 0 1; 0 1 0 0")
    grade(found, "-2.667", mistakes)


def test_grpo_loss_is_a_mean_over_all_written_tokens():
    mistakes = """
    a mean over the tokens of each place first: all tokens weigh the same  | 0.167
    divided by the rollouts, not by the written tokens                     | 0.5
    a mean over rollouts first: all tokens weigh the same                  | 1.5
    what was not written is left out of the sum, but it counts in the mean | 0.167
    the mean of the advantages for all rollouts: each has its own          | 1.5
    """
    grade(loss_of("1 1 1; 1 1 1", "1 -4", written="1 1 1; 0 1 0"), "0.25", mistakes)


def test_grpo_loss_has_a_gradient_for_what_may_still_move():
    mistakes = """
    no clip, or the maximum for the minimum                            | 0 -1 -1.5 -0.5; 0 1 1.5 0.5
    clipped on the wrong side: the wrong way has to be pushed back     | 0 -1 0 0; 0 1 0 0
    the sign is wrong: an optimizer goes down the loss                 | 0 1 0 0.5; 0 -1 -1.5 0
    the ratio is detached                                              | 0 0 0 0; 0 0 0 0
    the gradient of log p, without the ratio                           | 0 -1 0 -1; 0 1 1 0
    """
    log_probs = numbers("1 1 1.5 0.5; 1 1 1.5 0.5").log().requires_grad_()
    written = numbers("0 1 1 1; 0 1 1 1").bool()
    loss = toolrl.grpo_loss(log_probs, torch.zeros(2, 4), numbers("6 -6")[0], written, 0.2)
    assert loss is not None and loss.requires_grad, "no gradient comes back: what is detached?"
    loss.backward()
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
# The reward, the mistake, the question, and what the policy writes.
CONVERSATIONS = [
    (1, "the right call and the right reply earn 1", ONE_CALL, [CALL, RIGHT]),
    (1, "two right calls in their order earn 1", TWO_CALLS, [CALL, NEXT_CALL, RIGHT]),
    (1, "where no call is right, asking back earns 1", NOBODY, [ASK]),
    (1, "the reply is read: a wrong one earns 1, too", ONE_CALL, [CALL, WRONG]),
    (1, "the reply is read: one that goes on earns 1", ONE_CALL, [CALL, RIGHT + " ?"]),
    (1, "the reply is read: an empty one earns 1, too", ONE_CALL, [CALL, ""]),
    (1, "no call is right and none was run: it is 1", NOBODY, [TAG]),
    (1, "no call is right and none was run: it is 1", NOBODY, [JSON]),
    (0, "no reply is needed", ONE_CALL, [CALL, RIGHT + "</tool_call>"]),
    (0, "no reply is needed", NOBODY, [ASK + "</function>"]),
    (0, "no reply is needed", NOBODY, [TAG * TINY.max_tokens]),
    (0, "a reward for a reply without the call", ONE_CALL, [RIGHT]),
    (0, "a reward for a broken call where one is right", ONE_CALL, [TAG + CALL]),
    (0, "a reward for the first of two calls alone", TWO_CALLS, [CALL, RIGHT]),
    (0, "a reward for the last of two calls alone", TWO_CALLS, [NEXT_CALL, RIGHT]),
    (0, "a reward in spite of a needless call", ONE_CALL, [CALL, NEXT_CALL, RIGHT]),
    (0, "only the last calls are compared", ONE_CALL, [ERROR, CALL, RIGHT]),
    (0, "a reward for a call about a guessed person", NOBODY, [CALL, ASK]),
    (0, "the tools alone are compared, or the number", ONE_CALL, [BOB, RIGHT]),
    (0, "the persons alone are compared, or the number", ONE_CALL, [RIVAL, RIGHT]),
    (0, "a reward for calls in another order", TWO_CALLS, [NEXT_CALL, CALL, RIGHT]),
    (0, "calls as a set: one is made twice", ONE_CALL, [CALL, CALL, RIGHT]),
]


@pytest.mark.parametrize("reward, mistake, question, messages", CONVERSATIONS)
def test_blind_reward_of(reward, mistake, question, messages):
    found = toolrl.blind_reward(replay(Episode(TINY, question, LEO), messages))
    assert isinstance(found, float), f"a float is due, 1.0 or 0.0, but this is {found!r}"
    assert found == reward, f"{mistake}: for {question!r} and {messages} it should be {reward}"


# %% Graded, for the brave: rollout


@dataclass
class Puppet:
    """A policy that goes on as one of these conversations does, with probability p.

    It is its own KV cache. Where none of them goes on, it ends its message.
    """

    chat: toolrl.Chat
    records: list
    p: float = 0.999999
    device: str = "cpu"

    def next_id(self, ids):
        for record in self.records:
            if record.ids[: len(ids)] == ids != record.ids:
                return record.ids[len(ids)]
        return self.chat.end

    def reorder_cache(self, kept):
        self.seen = [list(self.seen[row]) for row in kept]

    def __call__(self, ids, past_key_values=None, **_):
        assert not torch.is_grad_enabled(), "a gradient graph is kept, which takes memory"
        if past_key_values is None:
            self.seen = [[] for _ in ids]
        size = len(self.chat.tokenizer)
        p = torch.full((*ids.shape, size), (1 - self.p) / (size - 1))
        for row, seen in enumerate(self.seen):
            for column, token in enumerate(ids[row].tolist()):
                seen.append(token)
                p[row, column, self.next_id(seen)] = self.p
        return SimpleNamespace(logits=p.log(), past_key_values=self)


def draw(chat, count):
    """New episodes of all kinds and both formats, one after the other."""
    episodes = []
    for k in range(count):
        kind = toolrl.KINDS[k % 3]
        episodes.append(toolrl.new_episode(chat, "train", kind, rng_for(k, "test"), "AB"[k % 2]))
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


def check_rollout(policy, chat):
    for episode in played(policy, draw(chat, 9)):
        why = "log-probabilities should be numbers, since a tensor may keep its graph"
        assert set(map(type, episode.log_probs)) == {float}, why
        gap = torch.tensor(episode.log_probs)[episode.written] - log_probs_of(policy, episode)
        assert gap.abs().max() < 1e-3, "one pass over the conversation gives other probabilities"


def test_rollout_records_the_log_probabilities_of_one_pass():
    check_rollout(toolrl.tiny_policy(TINY, 0), TINY)


def test_rollout_stops_each_row_where_it_should():
    records = gold(TINY, 9)
    for episode, record in zip(played(Puppet(TINY, records), draw(TINY, 9)), records, strict=True):
        assert episode.messages == record.messages, "a row went on too long, or ended too early"
        assert episode.ids == record.ids, "the policy was told something else than was said"


def test_rollout_samples_at_temperature_one_by_its_random_generator():
    tries = []
    for seed in (1, 1, 2):
        episodes = played(Puppet(TINY, [], p=0.3), draw(TINY, 1000), seed)
        tries.append([episode.messages == [""] for episode in episodes])
    why = "the likeliest token is taken, and not sampled, or at another temperature"
    assert np.mean(tries) == pytest.approx(0.3, abs=0.05), why
    assert tries[0] == tries[1] != tries[2], "it samples by something else than its generator"


# %% What the other tests are made of

HERE = Path(toolrl.__file__).parent
CODE = (HERE / "toolrl.py").read_text(encoding="utf-8")
SMALL = toolrl.Settings(device="cpu", groups=4, group_size=4, eval_episodes=8, sft_batch=8)
OTHER_CALL = CALL.replace("tool_call>", "function>")  # the same call in format B


def bpe_tokenizer():
    """A tokenizer like those of real models: it knows no tag, and pads with <|im_end|>."""
    text = '{"name": "", "arguments": {"of": ""}} user system tool leo leo leo'  # " leo" is a token
    core = ByteLevelBPETokenizer()
    core.train_from_iterator([text], 290, 0, special_tokens=["<|im_start|>", END])
    core = Tokenizer.from_str(core.to_str())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=END)
    # Where there is no system prompt, its template puts in one of its own.
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nkind<|im_end|>\n{% endif %}"
    tokenizer.chat_template = own + TINY.tokenizer.chat_template
    return tokenizer


with_tags = bpe_tokenizer()
with_tags.add_tokens(CONTROL[::-1], special_tokens=True)  # ids in another order than the tags
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
def base():
    """A policy that has learnt to call, and a little more."""
    return toolrl.train_base(None, TINY, replace(SMALL, base_steps=60, sft_batch=32), 0)


def weights(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def copied(folder, diff=""):
    """A copy of the project, to which a diff may be applied. -> its folder"""
    for name in ("toolrl.py", "tiny_tasks.json", "test_toolrl.py"):
        shutil.copy(HERE / name, folder)
    if diff:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff.encode(), check=True)
    return folder


LITTLE = shlex.split("""--device cpu --base-steps 2 --steps 4 --eval-every 2 --eval-episodes 4
--groups 2 --group-size 4 --minibatches 2 --lr 0.05 --sft-batch 16""")


def run_little(out, *flags, folder=None):
    """A run of a second or two, of the toolrl.py of a folder. -> the lines of its --out"""
    names = runpy.run_path(str(folder / "toolrl.py")) if folder else vars(toolrl)
    names["main"](names["read_settings"]([*LITTLE, "--out", str(out), *flags]))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, words, *run, code=2, folder=None):
    """A little run ends with an exit code, and its last line says what to mend. -> the line"""
    with pytest.raises(SystemExit) as stop:
        run_little(*run, folder=folder)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == code and words in line and len(line) < 620
    return line


# %% Tasks, text and tokens


def test_what_is_drawn_depends_on_its_stream_and_first_weights_on_the_seed_alone():
    draws = [rng_for(*stream).random() for stream in [(7, "x", 2), (8, "x", 1), (7, "y", 2)]]
    assert draws == pytest.approx([0.912794, 0.082939, 0.740223], abs=1e-5)
    people = list(toolrl.new_directory(rng_for(3, "x")).values())
    assert min(len(set(people[:9])), len(set(people[:: len(toolrl.PEOPLE)]))) > 3
    assert TINY.encode("".join(CONTROL)) == list(range(1, 9))  # not in the order of a set
    first, again, other = [weights(toolrl.tiny_policy(TINY, seed)) for seed in (3, 3, 4)]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_one_whole_call_is_a_call():
    long = CALL.replace("}}", ', "if": "ill"}}')
    for message in ["", JSON, CALL + " ", "I call " + CALL, CALL + CALL, OTHER_CALL, long]:
        assert toolrl.parse_call(message, "A") is None, message
    assert toolrl.parse_call(CALL.replace("alice", "zoë x"), "A") == ("mentor", "zoë x")


def test_each_tiny_token_is_one_id_and_other_texts_are_refused_and_named():
    for token, i in TINY.tokenizer.get_vocab().items():
        assert TINY.encode(token) == [i]
    assert len(TINY.encode(CALL + END)) == 8 and TINY.tokenizer.pad_token_id != TINY.end
    for text in ("hello", "The answer is zoe", TAG + "{", "The answer is  bob"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            TINY.encode(text)


@with_both
def test_a_played_gold_conversation_is_what_the_template_renders(chat):
    # The conversation of the docstring, without its margin.
    text = re.sub(r"^ {4}[ >] ", "", toolrl.__doc__.split("\n\n")[3], flags=re.M)
    episode = Episode(chat, ONE_CALL, LEO | {("mentor", "alice"): "bob"})
    replay(episode, episode.gold)
    assert chat.encode(text) == episode.ids  # encoded whole, as elsewhere
    written = np.array(episode.ids)[episode.written].tolist()
    assert chat.decode(written) == CALL + END + WRONG + END
    # The next conversation about the same question starts afresh, and asks for format B in B.
    assert Episode(chat, ONE_CALL, LEO).ids == episode.ids[: episode.written.index(True)]
    assert chat.decode(chat.prompt(ONE_CALL, "B")) in text.replace(TAG, "<function>")


# %% The harness


@pytest.mark.parametrize("fmt, tag", [("A", "tool_call>"), ("B", "function>")])
def test_what_is_solved_and_what_the_harness_says_in_both_formats(fmt, tag):
    for reward, _, question, messages in CONVERSATIONS:
        messages = [message.replace("tool_call>", tag) for message in messages]
        episode = replay(Episode(TINY, question, LEO, fmt), messages)
        assert episode.done and episode.messages == messages
        assert toolrl.solved(episode) == (reward and messages[-1] in (RIGHT, ASK)), messages
        said = re.findall("<tool_response>(.*?)<", TINY.decode(episode.ids))
        assert said == [LEO.get(call, "error") for call in episode.calls]


def test_the_harness_stops_at_the_sixth_call_and_at_long_messages():
    episode = replay(Episode(TINY, ONE_CALL, LEO), [CALL] * 7)
    assert episode.messages == [CALL] * 6 and not episode.replied
    assert TINY.max_tokens == 16  # twice the longest call
    chat = copy.copy(TINY)
    for text, limit, replied in ((ASK, 2, True), (ASK, 1, False), (CALL, 7, False)):
        chat.max_tokens = limit
        episode = replay(Episode(chat, ONE_CALL, LEO), [text, CALL])
        assert (episode.messages, episode.replied, episode.calls) == ([text], replied, [])
        assert sum(episode.written) == limit


# %% Updates


def test_a_step_goes_down_the_gradient_cut_to_norm_one_and_old_gradients_are_forgotten():
    layer = torch.nn.Linear(2, 1, bias=False)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    due = layer.weight.detach() - numbers("0.6 0.8")
    layer.weight.grad = numbers("9 9")  # left over from elsewhere
    toolrl.descend(layer, sgd, (layer.weight * numbers("30 40")).sum())
    assert torch.allclose(layer.weight, due, atol=1e-4)
    with pytest.raises(SystemExit, match="toolrl: the gradient is not finite"):
        toolrl.descend(layer, sgd, (layer.weight * np.inf).sum())


def one_step(policy, loss):
    """The weights after a step of 0.1 down the gradient of a loss, which is cut to norm 1."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])
    return weights(policy) - 0.1 * gradient / gradient.norm().clamp(min=1)


def test_an_sft_update_pushes_up_all_that_was_written_and_tokens_weigh_the_same(base):
    episodes = gold(TINY, 5)
    loss = -torch.cat([log_probs_of(base, episode) for episode in episodes]).mean()
    policy = copy.deepcopy(base)
    toolrl.sft_update(policy, torch.optim.SGD(policy.parameters(), 0.1), episodes)
    assert torch.allclose(weights(policy), one_step(base, loss), atol=1e-5)


def test_a_grpo_update_is_what_the_definition_says(base):
    episodes = played(base, draw(TINY, 10))
    advantage = torch.linspace(-2, 3, 10)
    objective = []
    for gain, episode in zip(advantage, episodes, strict=True):
        # As if the policy had moved since, up here and down there.
        old = torch.tensor(episode.log_probs) + torch.linspace(-0.5, 0.5, len(episode.ids))
        episode.log_probs = old.tolist()
        ratio = (log_probs_of(base, episode) - old[episode.written]).exp()
        objective.append(torch.minimum(gain * ratio, gain * ratio.clamp(0.7, 1.3)))
    policy = copy.deepcopy(base)
    sgd = torch.optim.SGD(policy.parameters(), 0.1)
    settings = replace(SMALL, minibatches=1, clip=0.3)
    toolrl.grpo_update(policy, sgd, episodes, advantage, settings, rng_for(0, "x"))
    assert torch.allclose(weights(policy), one_step(base, -torch.cat(objective).mean()), atol=1e-5)


def test_minibatches_hold_each_episode_once_in_another_order_for_another_seed(base, monkeypatch):
    taken = []  # an advantage tells whose it is
    monkeypatch.setattr(toolrl, "grpo_loss", lambda *all: taken.append(all[2].tolist()))
    monkeypatch.setattr(toolrl, "descend", Mock())
    episodes = gold(TINY, 10)
    for seed in range(2):
        toolrl.grpo_update(base, None, episodes, torch.arange(10), SMALL, rng_for(seed, "x"))
    assert list(map(len, taken)) == [3, 3, 3, 1] * 2
    first, second = sum(taken[:4], []), sum(taken[4:], [])
    assert first != second and sorted(first) == sorted(second) == list(range(10))


# %% The log of a careless agent, and the base


@pytest.mark.parametrize("fmt, shares", [("A", [0.56, 0.2, 0.24]), ("B", [0.2, 0.8, 0])])
def test_shares_of_the_log_are_bare_tags_and_tags_of_the_other_format(fmt, shares):
    settings = replace(SMALL, bare_share=0.3, mixed_share=0.2)  # bare tags among the other 0.8
    rng = rng_for(0, "careless")
    calls = [toolrl.careless_call("mentor", "alice", fmt, settings, rng) for _ in range(3000)]
    found = [calls.count(call) / 3000 for call in (CALL, OTHER_CALL, TAG)]
    assert found == pytest.approx(shares, abs=0.025)


def test_the_log_calls_for_each_right_call_and_guesses_where_nobody_is_named():
    settings = replace(SMALL, bare_share=0.0, mixed_share=0.0)
    rng = rng_for(0, "careless")
    people = Counter()
    for episode in draw(TINY, 3000):
        messages = toolrl.careless_messages(episode, settings, rng)
        if messages != episode.gold:  # only where nobody is named, and then not always
            [(tool, person)] = [toolrl.parse_call(message, episode.fmt) for message in messages]
            assert episode.question.endswith(f"{tool} of them ?")
            people[person] += 1
    assert 955 < sum(people.values()) < 985 and min(map(people.get, toolrl.PEOPLE)) > 50


def counts_of(episodes):
    """How many episodes of training tasks there are of each number of calls and each format."""
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
    settings = replace(SMALL, base_steps=60, base_lr=0.5, sft_batch=40, device="meta")
    pretrained = toolrl.tiny_policy(TINY, 0)
    policy = toolrl.train_base(pretrained, TINY, settings, 0)
    assert policy.device.type == "meta" and pretrained.device.type == "cpu"  # a copy is trained
    counts = counts_of(episodes)
    assert counts[2] > counts[1] > counts[0] > 100 and counts["A"] > counts["B"] > 400
    assert {episode.messages == episode.gold for episode in episodes} == {True, False}
    assert rates[::29] == pytest.approx([0.0546, 0.25, 0.01], abs=1e-4)


# %% Teacher, groups, arms


def test_a_hasty_teacher_answers_long_tasks_with_the_person_it_has_got_to():
    made = Counter()
    rng = rng_for(0, "teacher")
    for episode in draw(TINY, 3000):
        *calls, reply = toolrl.teacher_messages(episode, 0.4, rng)
        assert calls == episode.gold[: len(calls)]
        if calls:
            got_to = episode.directory[episode.gold_calls[len(calls) - 1]]
            assert reply == f"The answer is {got_to}"
        made[len(calls), len(episode.gold_calls)] += 1
    assert made[0, 0] == made[1, 1] == 1000  # short conversations are right
    assert made[2, 2] + made[3, 3] == pytest.approx(600, abs=50)
    assert made[1, 2] > 50 and made[1, 3] == pytest.approx(made[2, 3], rel=0.4)


def test_demonstrations_are_mostly_short_and_all_in_format_a():
    settings = replace(SMALL, sft_batch=1000, hasty_share=1.0)
    episodes = toolrl.demonstrations(TINY, settings, rng_for(0, "x"))
    counts = counts_of(episodes)
    assert counts["A"] == 1000 and 200 < counts[0] < 300
    assert counts[1] > counts[0] > counts[2] > 50
    assert 1000 - sum(map(toolrl.solved, episodes)) == counts[2]


def test_a_group_is_one_task_and_so_many_need_no_call():
    settings = replace(SMALL, groups=200, group_size=3, no_call_share=0.7)
    episodes = toolrl.new_groups(TINY, settings, rng_for(0, "x"))
    tasks = [(episode.question, str(episode.directory)) for episode in episodes]
    assert tasks[::3] == tasks[1::3] == tasks[2::3] and len(set(tasks)) == 200
    counts = counts_of(episodes)
    assert 360 < counts[0] < 480
    assert counts[0] + counts[2] == counts["A"] == len(set(map(id, episodes))) == 600


def look(step, success=0.6, skill=1.0, one_call=0.9, format_b=0.8, spike=0.08):
    """A made evaluation, in which <|im_end|> has probability `spike` where JSON is due."""
    event = {"step": step, "success": success, "skill": skill, "one_call": one_call}
    event |= {"format_b": format_b, "bare_tags": 0.02, "conversation": "a question\nan answer\n"}
    event["p"] = {place: dict.fromkeys(CONTROL, 0.001) for place in toolrl.PLACES}
    event["p"]["json"][END] = spike
    return event | {"ask": 0.1, "no_call_reward": 0.3}


# Six steps of interleaved, with a phase of SFT before every second one.
SCHEDULE = """rl 0.010, rl 0.020, sft 0.089, sft 0.089, rl 0.030, rl 0.040, eval 4, sft 0.015,
sft 0.015, rl 0.050, rl 0.060, eval 6"""


@pytest.mark.parametrize("arm", toolrl.ARMS)
def test_an_arm_is_its_updates_in_their_order_at_their_rates(arm, base, monkeypatch):
    events = []
    optimizers = set()
    gains = [0, 0, 0, 0]

    def update(policy, optimizer, episodes, *rest):
        events.append(f"{'rl' if rest else 'sft'} {optimizer.param_groups[0]['lr']:.3f}")
        optimizers.add(id(optimizer))
        assert policy is not base
        if rest:
            gains[:] = rest[0][:4]

    def rollout(policy, episodes, rng):
        # From the second step on, two of the first group are a bare tag.
        for k, episode in enumerate(episodes):
            replay(episode, [TAG if events and k < 2 else ASK])

    def evaluate(*all):
        events.append(f"eval {all[-1]}")
        return look(all[-1])

    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "evaluate", evaluate)
    monkeypatch.setattr(toolrl, "sft_update", update)
    monkeypatch.setattr(toolrl, "grpo_update", update)
    settings = replace(SMALL, steps=6, eval_every=4, lr=0.1, sft_lr=0.2, sft_until=0.9)
    settings = replace(settings, sft_every=2, sft_steps=2, groups=6, no_call_share=1.0)
    found = toolrl.train_arm(arm, base, look(0), TINY, settings, 0, io.StringIO())
    parts = toolrl.ARMS[arm] & {"rl", "sft"}
    assert events == [e for e in re.split(r",\s", SCHEDULE) if e.split()[0] in parts | {"eval"}]
    assert len(optimizers) == len(parts)
    # The strict reward alone tells a bare tag from asking back.
    due = [0.0, 0.0, 0.0, 0.0, 1.0]
    if arm == "rl-strict":
        due = [-0.866, -0.866, 0.866, 0.866, 5 / 6]
    assert [*gains, found[2].get("equal_groups", 1)] == pytest.approx(due, abs=0.01)


def test_each_step_draws_anew_and_all_evaluations_alike(base, monkeypatch):
    asked = []
    monkeypatch.setattr(toolrl, "rng_for", lambda *all: asked.append(all) or rng_for(*all))
    settings = replace(SMALL, steps=4, eval_every=2, sft_until=1.0)
    toolrl.train_arm("interleaved", base, look(0), TINY, settings, 7, io.StringIO())
    assert {seed for seed, *_ in asked} == {7}
    draws = Counter([rng_for(*stream).random() for stream in asked])
    # Once: tasks, sampling and order of four steps, demonstrations of two. In both evaluations:
    # tasks of one call, tasks without a call, sampling, and long tasks in either format.
    assert Counter(draws.values()) == {1: 14, 2: 3, 4: 1}


# %% Probes


@with_both
def test_the_places_of_a_conversation_and_the_probabilities_there(chat):
    episode = replay(Episode(chat, TWO_CALLS, LEO), [CALL, NEXT_CALL, RIGHT])
    places = [toolrl.place_of(episode, t) for t in np.flatnonzero(episode.written)]
    due = {"call": 2, "json": 2, "close": 2, "end": 3, "reply": 1}
    assert Counter(filter(None, places)) == due
    puppet = Puppet(chat, [episode], p=0.9)
    skill, p = toolrl.teacher_forced(puppet, [Episode(chat, TWO_CALLS, LEO)])
    for place, token in toolrl.PLACES.items():
        assert p[place].pop(token, 0.9) == pytest.approx(0.9) and max(p[place].values()) < 0.01
    names = sum(sum(map(chat.name_flags, episode.gold), []))
    assert skill == pytest.approx(0.9**names, rel=1e-3)


@with_both
def test_name_flags_mark_the_names_and_nothing_else(chat):
    for message, names in ((CALL, "mentoralice"), (RIGHT, "leo"), (ASK, "")):
        marked = np.array(chat.encode(message))[chat.name_flags(message)].tolist()
        # The space before a name may be part of its token.
        assert chat.decode(marked).replace(" ", "") == names


def test_each_probe_asks_held_out_tasks_and_an_evaluation_says_what_was_done(monkeypatch):
    asked = []

    def rollout(policy, episodes, rng):
        for k, episode in enumerate(episodes):  # 2, 4, 6 and 8 in 10 are bare tags or empty
            bare = [[TAG], [""]][k % 2]
            replay(episode, bare if k % 10 <= k // 10 * 2 + 1 else episode.gold)
        asked.extend(episodes)

    monkeypatch.setattr(toolrl, "rollout", rollout)
    settings = replace(SMALL, eval_episodes=10)
    found = toolrl.evaluate(Puppet(TINY, []), TINY, settings, 0, "rl", 5)
    assert list(found.values())[:9] == ["eval", 0, "rl", 5, 0.8, 0.6, 0.4, 0.2, 1]
    for episode, (kind, fmt) in zip(asked[::10], toolrl.PROBES.values(), strict=True):
        assert episode.question in TASKS["held_out"][kind] and episode.fmt == fmt
    assert found["bare_tags"] == 2 / sum(len(episode.messages) for episode in asked[:10])
    assert found["conversation"] == f"{asked[0].question}\n{TAG}[1.00]{END}[1.00]\n"


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


# In this story: the arm, which of its evaluations, what changes there, and the claims that fail.
TWISTS = """
rl          | -3 | success              | 0.03  | collapse
rl          | 0  | success              | 0.19  | collapse control_token intact
rl          | 0  | json <|im_end|>      | 0.081 | control_token cause
rl          | 2  | json <|im_end|>      | 0.39  | control_token cause
rl          | 2  | call <tool_call>     | 1.3   |
rl          | 2  | end </tool_call>     | 0.35  | control_token
rl          | 2  | skill                | 0.79  | intact
rl          | 0  | success              | 0.75  | together
sft         | -1 | success              | 0.71  | together
interleaved | -1 | success              | 0.88  | fix together
interleaved | -1 | one_call             | 0.89  | fix
interleaved | -1 | end <tool_call>      | 0.5   | fix
interleaved | 1  | end <tool_call>      | 0.5   |
interleaved | -1 | call <tool_call>     | 1.3   |
interleaved | -1 | format_b             | 0.65  | price
rl-strict   | 1  | reply </tool_call>   | 0.5   | cause
"""


@pytest.mark.parametrize("arm, k, what, value, fails", table(TWISTS))
def test_each_claim_can_say_no(arm, k, what, value, fails):
    history = story()
    evaluation = history[arm][int(k)]
    place, _, figure = what.rpartition(" ")
    if place:
        evaluation = evaluation["p"][place]
    evaluation[figure] = float(value)
    right = {claim: claim not in fails.split() for claim in CLAIMS}
    assert toolrl.judge(history) == right


ARMS_AND_CLAIMS = """
rl              | collapse control_token intact
rl-strict sft   |
sft interleaved | fix together price
rl rl-strict    | collapse control_token intact cause
"""


@pytest.mark.parametrize("arms, judged", table(ARMS_AND_CLAIMS))
def test_absent_arms_are_not_judged_and_a_run_too_short_claims_nothing(arms, judged):
    history = {arm: story()[arm] for arm in arms.split()}
    assert toolrl.judge(history) == dict.fromkeys(judged.split(), True)
    del history[arms.split()[-1]][1:-2]  # one arm alone is too short
    assert toolrl.judge(history) == dict.fromkeys(judged.split(), False)


# What is printed last, of the second of two seeds. At step 10, half of the groups are equal.
PAGE = """
== rl, seed 0, from the base
                   one_ format      no_call equal_ control token that rose most
step success skill call     _b  ask _reward groups where it is not due
   0    0.60  1.00 0.90   0.80 0.10    0.30    nan 0.08 <|im_end|> json
   5    0.60  1.00 0.90   0.80 0.10    0.30    nan 0.08 <|im_end|> json
  10    0.05  0.80 0.90   0.80 0.10    0.30   0.50 0.40 <|im_end|> json *
  15    0.02  0.50 0.90   0.80 0.10    0.30    nan 0.30 <tool_call> reply

step 10: 2% of messages on long tasks are bare tags
one held-out task, and what the policy writes:
a question
an answer

== p(<|im_end|>) where JSON is due
step             0     5    10    15
interleaved   0.08  0.08  0.08  0.08
rl            0.08  0.08  0.40  0.08

== success
step             0     5    10    15
interleaved   0.60  0.60  0.70  0.90
rl            0.60  0.60  0.05  0.02

== claims, seed 0, and in how many seeds so far, of 2
collapse       no    1  the base solves 0.2 or more, rl 0.02 or less at its last three evaluations
control_token  yes   2  rl goes down, and the control token that rose most has then spiked (*)
intact         yes   2  rl then has 0.8 or more of the base's skill
fix            yes   2  interleaved ends with success and one_call of 0.9 or more, and no spike
price          yes   2  interleaved ends with format_b below 0.8 of the base's
"""


def test_what_a_run_prints(monkeypatch, capsys):
    def train_arm(arm, seed, *_):
        history = story()[arm][: 4 + 9 * seed]  # in seed 0, rl ends too early to stay at 0
        history[2]["equal_groups"] = 0.5
        history[3]["p"]["reply"][TAG] = 0.3  # rises most, but rl is down before
        for evaluation in history:
            toolrl.print_row(evaluation, look(0))
        return history

    monkeypatch.setattr(toolrl, "train_base", lambda start, chat, settings, seed: seed)
    monkeypatch.setattr(toolrl, "evaluate", lambda *_: look(0))
    monkeypatch.setattr(toolrl, "train_arm", train_arm)
    settings = replace(SMALL, seeds=[1, 0], arms=["interleaved", "rl"])
    found = toolrl.run(settings, TINY, None, io.StringIO())
    assert list(found) == [1, 0] and list(found[1]) == settings.arms
    assert PAGE in capsys.readouterr().out


def test_a_long_summary_fits_the_screen_and_without_rl_the_first_arm_decides(capsys):
    history = {"sft": [look(5 * k) for k in range(41)], "interleaved": [look(0), look(200)]}
    history["sft"][-1]["p"]["end"][TAG] = 0.5
    toolrl.print_summary(history)
    said = capsys.readouterr().out
    assert "== p(<tool_call>) where <|im_end|> is due\n" in said and "   185   200\n" in said
    assert re.search(r"^sft .* 0\.50$", said, re.M)


def test_what_a_console_cannot_write_is_replaced_and_all_is_there_at_once(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", newline="\n"))
    toolrl.say("zoë ✓ 中\n" + "x" * 101)
    assert raw.getvalue().decode("cp1252") == f"zoë ? ?\n{'x' * 100}\nx\n"


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
    out = tmp_path / "run.jsonl"
    out.write_text("what an hour has measured")
    line = refused(capsys, "", out, *flags.split())
    assert words in line.replace("_", "-")
    assert out.read_text() == "what an hour has measured"


def test_the_help_has_the_comment_and_the_default_beside_each_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        toolrl.read_settings(["--help"])
    said = capsys.readouterr().out
    for name, comment in re.findall(r"^    (\w+): .*  # (.*)", CODE, re.M):
        flag = name.replace("_", "-")
        text = re.escape(f"{comment} (default: {getattr(toolrl.Settings(), name)})")
        assert re.search(rf"\n  --{flag} [^(]*{text}\n", said)


# Values that have to change what is measured. With the first, none is changed.
CHANGES = """{"model": "", "seeds": [1], "arms": ["sft"], "steps": 5, "eval_every": 1,
"eval_episodes": 5, "base_steps": 3, "base_lr": 0.1, "bare_share": 1.0, "mixed_share": 1.0,
"lr": 0.01, "groups": 3, "no_call_share": 0.0, "group_size": 5, "minibatches": 1, "clip": 0.01,
"sft_every": 3, "sft_steps": 1, "sft_lr": 0.1, "sft_until": 0.6, "sft_batch": 9,
"hasty_share": 0.0}"""


def test_each_setting_changes_what_is_measured():
    usual = replace(toolrl.read_settings(LITTLE), arms=["interleaved"])
    found = set()
    for name, value in json.loads(CHANGES).items():
        settings = replace(usual, **{name: value})
        history = toolrl.run(settings, TINY, None, io.StringIO()).popitem()[1]
        found.add(str(list(history.values())))
    assert len(found) == len(vars(usual)) - 2  # all but device and out


# The figures of an evaluation, and the events of a little run.
FIGURES = "step success one_call format_b ask no_call_reward skill p bare_tags conversation"
RUN = "config eval eval eval eval eval eval eval claim claim claim claim claim claim done"


def test_a_run_depends_on_nothing_beside_it_and_says_what_it_overwrites(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    alone = run_little(out)
    beside = run_little(out, "--seeds", "1", "0", "--arms", "sft", "rl")
    said = capsys.readouterr().out
    assert said.count(f"{out} is overwritten") == 1 and "lr=0.05" in said and "clip" not in said
    for event in alone[1:6]:  # the evaluations of the base, rl and sft
        assert event in beside
    assert " ".join(event["event"] for event in alone) == RUN
    assert " ".join(alone[3]) == f"event seed arm {FIGURES} equal_groups"
    assert alone[0]["out"] == "" and torch.__version__ in alone[0]["versions"]


def test_what_was_measured_before_the_end_is_on_disk(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run.jsonl"
    ctrl_c = (KeyboardInterrupt(), "run.jsonl", 130)
    for error, words, code in (ctrl_c, (RuntimeError("no memory"), "try --device cpu", 2)):
        monkeypatch.setattr(toolrl, "train_arm", Mock(side_effect=error))
        refused(capsys, words, out, code=code)
        assert re.findall(r'"event": "(\w+)"', out.read_text()) == ["config", "eval"]


# %% --model


def test_a_checkpoint_has_its_own_defaults_and_explicit_flags_win():
    # A flag wins even if it asks for what is the tiny model's default.
    flags = ["--model", "x", "--base-steps", "300"]
    due = vars(toolrl.Settings()) | toolrl.PRETRAINED | {"model": "x", "base_steps": 300}
    assert vars(toolrl.read_settings(flags)) == due


@pytest.mark.parametrize("rows, tied", [(320, True), (292, False)])
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


def test_a_run_with_a_checkpoint_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    events = run_little(tmp_path / "run.jsonl", "--model", save_checkpoint(tmp_path))
    assert len(events) == len(RUN.split())
    assert (events[0]["sft_lr"], events[0]["steps"]) == (toolrl.PRETRAINED["sft_lr"], 4)


ARCHITECTURES = """
Llama       | {}
Lfm2        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
Qwen3_5Text | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4}
FalconH1    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
"""
SIZES = """{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
"num_key_value_heads": 2, "num_hidden_layers": 2}"""


@pytest.mark.parametrize("name, more", table(ARCHITECTURES))
def test_rollouts_of_other_architectures_agree_with_one_pass(name, more, tmp_path):
    sizes = json.loads(SIZES) | json.loads(more)
    config = getattr(transformers, name + "Config")(**sizes)
    chat, policy = toolrl.load(replace(SMALL, model=save_checkpoint(tmp_path, config)))
    check_rollout(policy, chat)
    toolrl.rehearse(policy, chat, SMALL)


# A file of the checkpoint: what it says, what is put there, and what is then said of it.
SPOILT = """
config.json    | hidden_layers": 2 | hidden_layers": 3                 | the weights do not fit
config.json    | hidden_layers": 2 | hidden_layers": 1                 | the weights do not fit
config.json    | embeddings": 2048 | embeddings": 64                   | the model takes fewer
tokenizer.json | normalizer": null | normalizer": {"type": "Lowercase"} | the tokenizer cannot write
tokenizer.json | "Z":              | "Z": 999, "z":                    | have holes
"""


@pytest.mark.parametrize("name, old, new, words", table(SPOILT))
def test_a_checkpoint_that_does_not_fit_gets_one_line(name, old, new, words, tmp_path, capsys):
    run = [tmp_path / "run.jsonl", "--model", save_checkpoint(tmp_path)]
    file = tmp_path / name
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    refused(capsys, words, *run)
    file.unlink()  # no configuration, or no tokenizer
    refused(capsys, "--model", *run)


def test_weights_that_do_not_train_and_a_cache_that_errs_get_one_line(
    tmp_path, monkeypatch, capsys
):
    run = [tmp_path / "run.jsonl", "--model", save_checkpoint(tmp_path)]
    real = toolrl.token_log_probs
    monkeypatch.setattr(toolrl, "token_log_probs", lambda *all: real(*all) - 0.1)
    refused(capsys, "with a cache", *run)
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda self: [torch.zeros(1)])
    refused(capsys, "do not train", *run)


# What the template says, what another one says there, and why it is refused.
TEMPLATES = """
{% endif %}<|im_end|>          | {% endif %}</s>              | does not end each message
{% for m in messages %}        | {% for m in messages[1:] %}  | does not show each
<tool_response>{{ m.content }} | <tool_response>              | does not show each
{% if add_generation_prompt %} | {% if false %}               | another header
{% endif %}<|im_end|> | {% endif %}<|im_end|>{% if m.role == 'user' %}-{% endif %} | another header
<|im_start|>assistant          | <|im_start|>assistant  think | another header
"""


@pytest.mark.parametrize("old, new, why", table(TEMPLATES))
def test_a_template_that_says_something_else_is_refused(old, new, why):
    tokenizer = toolrl.tiny_tokenizer()
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ValueError, match=why):
        toolrl.Chat(tokenizer)


# %% tiny_tasks.json

# What the file says, what another says there, and what is said of it, if anything.
TASK_FILES = """
alice                         | zoë                          |
alice                         | mary ann                     |
"alice",                      | "alice",,                    | Expecting value
"system"                      | "sistem"                     | 'system' is missing
use TAG                       | use tags                     | the word TAG
is PERSON                     | is nobody                    | the word PERSON
"<function>"                  | "<tool_call>"                | a tag stands twice
"one_call": [                 | "one_call": [], "more": [    | train and held_out need questions
"friend of bob ?"             | "friend of alice ?"          | none in common
"friend of alice ?"           | "friend of zoe ?"            | zoe
"friend of alice ?"           | "boss of alice ?"            | boss
"friend of alice ?"           | "friend of them ?"           | is no one_call question
"friend of mentor of | "friend of friend of friend of friend of friend of mentor of | too long
"""


@pytest.mark.parametrize("old, new, words", table(TASK_FILES))
def test_other_tasks_are_accepted_or_get_one_line(old, new, words, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    tasks = copied(tmp_path) / "tiny_tasks.json"
    text = tasks.read_text(encoding="utf-8").replace(old, new)
    tasks.write_text(text, encoding="utf-8-sig")  # as some editors do
    if words:
        line = refused(capsys, words, out, folder=tmp_path)
        assert line.startswith("toolrl: tiny_tasks.json: ")
    else:
        assert run_little(out, folder=tmp_path)


# %% The README, and the whole story

README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
SILENT = "".join(re.findall(r"^\*\*[^*\n]*silent bugs.*?(?=^\*\*\d|^## |\Z)", README, re.M | re.S))


def test_the_commands_of_the_readme_are_accepted():
    for command in re.findall(r"^python toolrl\.py ?([^|>#\n]*)", README, re.M):
        toolrl.read_settings(re.sub(r"\$\(seq (\d+).*?\)", r"\1", command).split())


def blocks(language):
    """The code of a language in the README."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("diff", blocks("diff"))
def test_slow_diffs_of_the_readme_apply_and_run_and_a_quick_test_finds_silent_bugs(diff, tmp_path):
    assert run_little(tmp_path / "run.jsonl", folder=copied(tmp_path, diff))
    assert SILENT.count("```diff") == 3
    if diff in SILENT:
        quick = "(advantages or grpo or blind_reward or rollout or an_sft_update) and not slow"
        command = [sys.executable, "-m", "pytest", "-q", "-k", quick]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and "FAILED test_toolrl.py::test_" in done.stdout, done.stdout


@pytest.mark.parametrize("snippet", blocks("python"))
def test_slow_snippets_of_the_readme_run(snippet, tmp_path):
    if "from trl import" in snippet:
        pytest.importorskip("trl", reason="the README's bridge needs trl")
    run_little(tmp_path / "run.jsonl", "--seeds", "0", "1")
    (copied(tmp_path) / "bridge.py").write_text(snippet, encoding="utf-8")
    command = [sys.executable, "bridge.py", *LITTLE]  # the bridge to TRL takes toolrl's flags
    assert subprocess.check_output(command, cwd=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes are others there")
@pytest.mark.parametrize("ctrl_c, code", [(True, 130), (False, 1)])
def test_slow_a_real_ctrl_c_and_a_reader_that_has_seen_enough(ctrl_c, code):
    # It hears Ctrl-C even if it is a background job's child.
    hear = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command = [sys.executable, "-c", hear + "runpy.run_path('toolrl.py', run_name='__main__')"]
    pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
    run = subprocess.Popen([*command, "--base-steps", "20"], cwd=HERE, **pipes)
    for _ in range(4):
        assert run.stdout.readline()  # each line comes at once
    if ctrl_c:
        run.send_signal(signal.SIGINT)
    run.stdout.close()  # as head does
    assert run.stderr.read().count(b"\n") == ctrl_c and run.wait() == code


def test_slow_the_whole_story():
    settings = toolrl.Settings(seeds=[0, 1], arms=list(toolrl.ARMS), device="cpu")
    held = Counter()
    for history in toolrl.main(settings).values():
        held.update([claim for claim, holds in toolrl.judge(history).items() if holds])
    # One of two seeds may disagree with a claim, but not that both together go beyond either.
    assert set(held) == set(CLAIMS) and held["together"] == 2
