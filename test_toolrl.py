"""Tests of toolrl. The first part grades four functions that a student writes again.

    python -m pytest -q -x -k grpo_loss   one of advantages, grpo_loss, blind_reward and rollout
    python -m pytest -q -k "not slow"     all that is quick
    python -m pytest -q                   with the README's commands and blocks, and whole runs

A failure of the first part guesses the mistake. It needs toolrl.py and tiny_tasks.json alone.
"""

import copy
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import toolrl
from toolrl import CONTROL, END, HELD_OUT, TRAIN, Episode, replay, rng_for

torch.set_num_threads(1)
TINY = toolrl.Chat(toolrl.tiny_tokenizer())
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo


def table(text):
    """The rows of a table in a text, whose cells are parted by "|"."""
    return [re.split(r" +\| *", line.strip()) for line in text.splitlines() if "|" in line]


def with_rows(names, text):
    """A test runs for each row of a table. Its ids are numbers."""
    rows = table(text)
    return pytest.mark.parametrize(names, rows, ids=map(str, range(1, len(rows) + 1)))


def numbers(text):
    """A tensor of the numbers in a text, whose rows are parted by ";"."""
    return torch.tensor([list(map(float, row.split())) for row in text.split(";")])


def told(message):
    """Fail with this message alone."""
    pytest.fail(message, pytrace=False)


def asked(function, *given):
    """What a student's function returns. If it breaks, the failure names the line."""
    try:
        return function(*given)
    except Exception as error:
        place = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
        place = next((f for f in reversed(place) if f.filename == toolrl.__file__), place[0])
        hint = ""
        if "must match the size" in str(error):
            hint = "\nIs keepdim=True forgotten, or [:, None]? Rows are groups, or rollouts."
        told(f"line {place.lineno}: {place.line}\n{type(error).__name__}: {error}{hint}")


def grade(found, right, mistakes):
    """Fail unless these numbers are right, and guess why from the numbers that a mistake gives."""
    due = numbers(right)
    if not isinstance(found, torch.Tensor):
        told(f"a tensor is due, but {found!r} came back")
    if found.shape != due.shape:
        told(f"the shape should be {list(due.shape)}, but {list(found.shape)} came back")
    guesses = []
    for guess, text in table(f"right | {right}\n{mistakes}"):
        given = numbers(text)
        if given.shape == due.shape and given.allclose(found.float(), atol=0.01, equal_nan=True):
            guesses.append(guess)
    if "right" not in guesses:
        why = " or ".join(guesses) or "no mistake that these tests know"
        told(f"{why}\nit should be   {due.tolist()}\nbut it is      {found.tolist()}")


# %% Graded: advantages


def test_advantages_of_one_success_in_four():
    mistakes = """
    the mean of the group is not taken off                           | 2 0 0 0
    the mean of the others is taken off, not that of the group       | 2 -0.667 -0.667 -0.667
    the mean of the others is taken off, and nothing is divided      | 1 -0.333 -0.333 -0.333
    the sign is wrong: what did better than its group should be > 0  | -1.5 0.5 0.5 0.5
    a group is a row, and these are of columns                       | nan nan nan nan
    the rewards come back as they were                               | 1 0 0 0
    they are not divided by the spread                               | 0.75 -0.25 -0.25 -0.25
    brackets are forgotten: (reward - mean) / spread                 | 0.5 -0.5 -0.5 -0.5
    they are divided by the variance, not by its root                | 3 -1 -1 -1
    the spread divides by N, not by N - 1 as torch.std does          | 1.732 -0.577 -0.577 -0.577
    """
    grade(asked(toolrl.advantages, numbers("1 0 0 0")), "1.5 -0.5 -0.5 -0.5", mistakes)


def test_advantages_compare_with_the_group_and_not_with_the_batch():
    mistakes = """
    mean and spread are the batch's | 0.935 -0.935 -0.935 -0.935; 0.935 0.935 0.935 -0.935
    the mean is the batch's         | 1 -1 -1 -1; 1 1 1 -1
    the spread is the batch's       | 1.403 -0.468 -0.468 -0.468; 0.468 0.468 0.468 -1.403
    a group is a row, not a column  | 0 -0.707 -0.707 0; 0 0.707 0.707 0
    """
    found = asked(toolrl.advantages, numbers("1 0 0 0; 1 1 1 0"))
    grade(found, "1.5 -0.5 -0.5 -0.5; 0.5 0.5 0.5 -1.5", mistakes)


def test_advantages_of_equal_rewards_are_zeros():
    mistakes = """
    equal rewards divide 0 by 0            | nan nan nan nan; nan nan nan nan
    the mean of the batch is taken off     | 1 1 1 1; -1 -1 -1 -1
    the mean of the group is not taken off | 10000 10000 10000 10000; 0 0 0 0
    """
    found = asked(toolrl.advantages, numbers("1 1 1 1; 0 0 0 0"))
    grade(found, "0 0 0 0; 0 0 0 0", mistakes)
    grade(asked(toolrl.advantages, numbers("0.7 0.7 0.7").double()), "0 0 0", mistakes)


def test_advantages_of_groups_of_two():
    mistakes = """
    the spread divides by N, not by N - 1 as torch.std does      | 0 0; 1 -1; 0 0
    they are not divided by the spread                           | 0 0; 0.5 -0.5; 0 0
    equal rewards divide 0 by 0                                  | nan nan; 0.707 -0.707; nan nan
    """
    found = asked(toolrl.advantages, numbers("0 0; 1 0; 1 1"))
    grade(found, "0 0; 0.707 -0.707; 0 0", mistakes)


def test_advantages_take_rewards_of_any_size():
    mistakes = """
    they are divided by the range, not by the spread        | -0.5 0 0.5
    they are divided by the variance, not by its root       | -0.05 0 0.05
    they are not divided by the spread                      | -20 0 20
    the spread divides by N, not by N - 1 as torch.std does | -1.225 0 1.225
    """
    rewards = numbers("20 40 60")
    grade(asked(toolrl.advantages, rewards), "-1 0 1", mistakes)
    if rewards.tolist() != [[20, 40, 60]]:
        told("the rewards themselves were changed, in place")


# %% Graded: grpo_loss


def loss_of(ratios, advantage, written="1", clip=0.2):
    """grpo_loss, where the probability of each token is its ratio times 0.3, the old one."""
    old = torch.full_like(numbers(ratios), 0.3).log()
    written = numbers(written).bool().expand_as(old)
    gain = numbers(advantage)[0]
    loss = asked(toolrl.grpo_loss, old + numbers(ratios).log(), old, gain, written, clip)
    if not isinstance(loss, torch.Tensor) or loss.shape != ():
        told(f"a loss is a tensor of one number, but this came back: {loss!r}")
    return loss.view(1, 1)


# The ratio of each token, the advantages, what is written, the loss; then what mistakes give.
LOSSES = [
    (
        ("1 1 1", "2", "1", "-2"),
        """
        the sign is wrong: an optimizer goes down the loss         | 2
        the difference of log-probabilities has to go through exp  | 0
        a sum for a mean                                           | -6
        log p in place of the ratio of probabilities               | 2.408
        the objective is clipped, not the ratio                    | -1.2
        """,
    ),
    (
        ("1 1; 1 1", "1 -3", "1 0; 1 1", "1.667"),
        """
        the advantages stand beside columns: each belongs to a row, advantage[:, None] | 0.333
        the mean of the advantages for all rollouts, or a mean over rollouts first     | 1
        the mask is only in the sum, but what it leaves out counts in the mean         | 1.25
        """,
    ),
    (
        ("1.2 1 1.2 1; 1.2 1 1.2 1.2", "3 2", "0 1 0 1; 0 1 0 0", "-2.667"),
        """
        the mask is forgotten: prompts, results and padding are in the mean            | -2.8
        the mask is shifted by a token                                                 | -3.2
        a sum for a mean                                                               | -8
        divided by the rollouts, not by the written tokens                             | -4
        the mask is only in the sum, but what it leaves out counts in the mean         | -1
        a mean over rollouts first, or one advantage for all                           | -2.5
        """,
    ),
    (
        ("1 1 1; 1 1 1", "1 -4", "1 1 1; 0 1 0", "0.25"),
        """
        a mean over the tokens of each place first: all tokens weigh the same          | 0.167
        divided by the rollouts, not by the written tokens                             | 0.5
        a mean over rollouts first, or one advantage for all                           | 1.5
        the mask is only in the sum, but what it leaves out counts in the mean         | 0.167
        the mask is forgotten: prompts, results and padding are in the mean            | 1.5
        """,
    ),
    (
        ("2 0.5", "1", "1", "-0.85"),
        """
        a ratio for the whole rollout: each token has its own                          | -1
        no clip, or the maximum for the minimum                                        | -1.25
        """,
    ),
]


@pytest.mark.parametrize("case, mistakes", LOSSES, ids="12345")
def test_grpo_loss_of_tokens(case, mistakes):
    ratios, advantage, written, right = case
    grade(loss_of(ratios, advantage, written), right, mistakes)


# Where a token has moved: what no clip gives, what a clip on both sides gives, the wrong sign.
CLIPS = """
1.5 | 1  | 0.9 | -1.5 | -1.5 | -1.5 | 1.5
1.5 | 1  | 0.2 | -1.2 | -1.5 | -1.2 | 1.2
0.5 | -1 | 0.2 | 0.8  | 0.5  | 0.8  | -0.8
0.5 | 1  | 0.2 | -0.5 | -0.5 | -0.8 | 0.5
1.5 | -1 | 0.2 | 1.5  | 1.5  | 1.2  | -1.5
3   | 1  | 0.5 | -1.5 | -3   | -1.5 | 1.5
0.1 | -1 | 0.5 | 0.5  | 0.1  | 0.5  | -0.5
"""


@with_rows("ratio, advantage, clip, right, unclipped, both_sides, sign", CLIPS)
def test_grpo_loss_clips_a_token(ratio, advantage, clip, right, unclipped, both_sides, sign):
    mistakes = f"""
    no clip, or the maximum, or min(ratio, clipped) * advantage               | {unclipped}
    clipped on both sides: what went the wrong way has to be pushed back      | {both_sides}
    the sign is wrong: an optimizer goes down the loss                        | {sign}
    the clip of 0.2 is fixed, and the argument is not used                    | -1.2
    the clip of 0.2 is fixed, and the argument is not used                    | 0.8
    the ratio is upside down: new by old                                      | -0.667
    the ratio is left out                                                     | -1
    log p in place of the ratio of probabilities                              | 0.799
    the difference of log-probabilities has to go through exp                 | -0.405
    """
    grade(loss_of(ratio, advantage, clip=float(clip)), right, mistakes)


def test_grpo_loss_has_a_gradient_for_what_may_still_move():
    mistakes = """
    no clip, or the maximum for the minimum                        | 0 -1 -1.5 -0.5; 0 1 1.5 0.5
    clipped on both sides                                          | 0 -1 0 0; 0 1 0 0
    the sign is wrong: an optimizer goes down the loss             | 0 1 0 0.5; 0 -1 -1.5 0
    the ratio is detached                                          | 0 0 0 0; 0 0 0 0
    the gradient of log p, without the ratio                       | 0 -1 0 -1; 0 1 1 0
    min(ratio, clipped) * advantage                                | 0 -1 0 -0.5; 0 1 0 0.5
    """
    log_probs = numbers("1 1 1.5 0.5; 1 1 1.5 0.5").log().requires_grad_()
    written = numbers("0 1 1 1; 0 1 1 1").bool()
    gain = numbers("6 -6")[0]
    loss = asked(toolrl.grpo_loss, log_probs, torch.zeros(2, 4), gain, written, 0.2)
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        told(f"no gradient comes back: what is detached? This came back: {loss!r}")
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
    (0, "no reply is needed", NOBODY, [TAG * toolrl.MAX_TOKENS]),
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
IDS = list(map(str, range(1, len(CONVERSATIONS) + 1)))


@pytest.mark.parametrize("reward, mistake, question, messages", CONVERSATIONS, ids=IDS)
def test_blind_reward_of(reward, mistake, question, messages):
    found = asked(toolrl.blind_reward, replay(Episode(TINY, question, LEO), messages))
    if not isinstance(found, (int, float)) or found != reward:
        told(
            f"{mistake}\n{question!r}, and the policy writes {messages}\n{reward} is due: {found!r}"
        )


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
        p = torch.full((*ids.shape, size), (1 - self.p) / (size - 1)).double()
        for row, seen in enumerate(self.seen):
            for column, token in enumerate(ids[row].tolist()):
                seen.append(token)
                p[row, column, self.next_id(seen)] = self.p
        return SimpleNamespace(logits=p.log(), past_key_values=self)


def draw(chat, count):
    """New episodes of all kinds and both formats, one after the other."""
    episodes = []
    for k in range(count):
        questions = TRAIN[toolrl.KINDS[k % 3]]
        episodes.append(toolrl.new_episode(chat, questions, rng_for(k, "test"), "AB"[k % 2]))
    return episodes


def gold(*which):
    """Right conversations, from start to end."""
    return [replay(episode, episode.gold) for episode in draw(*which)]


def played(policy, episodes, seed=0):
    """What a policy makes of these episodes."""
    asked(toolrl.rollout, policy, episodes, rng_for(seed, "x"))
    return episodes


def log_probs_of(policy, episode):
    """The log-probabilities of what was written, from one pass over the whole."""
    ids = torch.tensor(episode.ids)
    log_p = policy(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[episode.written[1:], 0]


def check_rollout(policy, chat, tolerance):
    for episode in played(policy, draw(chat, 9)):
        if set(map(type, episode.log_probs)) != {float}:
            told("log-probabilities should be numbers, since a tensor may keep its graph")
        found = torch.tensor(episode.log_probs).double()[episode.written]
        gap = (found - log_probs_of(policy, episode)).abs().max()
        if gap > tolerance:
            told(f"one pass over the conversation gives other log-probabilities, by {gap:.2g}")


def test_rollout_records_the_log_probabilities_of_one_pass():
    check_rollout(toolrl.tiny_policy(TINY, 0), TINY, 1e-6)


def test_rollout_stops_each_row_where_it_should():
    records = gold(TINY, 9)
    for episode, record in zip(played(Puppet(TINY, records), draw(TINY, 9)), records, strict=True):
        if episode.messages != record.messages:
            told(f"a row went on too long, or ended too early: {episode.messages}")
        if episode.ids != record.ids:
            told("the policy was told something else than was said")


def test_rollout_samples_at_temperature_one_by_its_random_generator():
    tries = []
    for seed in (1, 1, 2):
        episodes = played(Puppet(TINY, [], p=0.3), draw(TINY, 1000), seed)
        tries.append([episode.messages == [""] for episode in episodes])
    if np.mean(tries) != pytest.approx(0.3, abs=0.05):
        told("the likeliest token is taken, and not sampled, or at another temperature")
    if tries[0] != tries[1] or tries[1] == tries[2]:
        told("it samples by something else than its generator")


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
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=END)


with_tags = bpe_tokenizer()
with_tags.add_tokens(CONTROL[::-1], special_tokens=True)  # ids in another order than the tags
BPE = toolrl.Chat(with_tags)
with_both = pytest.mark.parametrize("chat", [TINY, BPE], ids=["tiny", "bpe"])


def save_checkpoint(folder, config=None, **changes):
    """A small random model in bfloat16, and a tokenizer. -> the folder's name"""
    config = config or toolrl.tiny_policy(BPE, 0).config
    config.update({"vocab_size": 320, "pad_token_id": BPE.end, "dtype": "bfloat16", **changes})
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


def replaced(path, old, new):
    """Put another text into a file."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


LITTLE = shlex.split("""--device cpu --base-steps 2 --steps 4 --eval-every 2 --eval-episodes 4
--groups 2 --group-size 4 --minibatches 2 --lr 0.05 --sft-batch 16""")


def run_little(out, *flags, folder=None):
    """A run of a second or two, of the toolrl.py of a folder. -> the lines of its --out"""
    names = runpy.run_path(str(folder / "toolrl.py")) if folder else vars(toolrl)
    names["main"](names["read_settings"]([*LITTLE, "--out", str(out), *flags]))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, words, *run, folder=None):
    """A little run ends with exit code 2, and its last line says what to mend. -> the line"""
    with pytest.raises(SystemExit) as end:
        run_little(*run, folder=folder)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and words in line and len(line) < 620
    return line


def in_shell(folder, *command, **environment):
    """Run a command of its own in a folder. -> the finished process, with its output as text"""
    environment = os.environ | {"PYTHONUTF8": "1"} | environment
    python = [sys.executable, *map(str, command)]
    return subprocess.run(python, cwd=folder, capture_output=True, text=True, env=environment)


# %% Tasks, text and tokens


def test_what_is_drawn_depends_on_its_stream_and_first_weights_on_the_seed_alone():
    draws = [rng_for(*stream).random() for stream in [(7, "x", 2), (8, "x", 1), (7, "y", 2)]]
    assert draws == pytest.approx([0.912794, 0.082939, 0.740223], abs=1e-5)
    people = list(toolrl.new_directory(rng_for(3, "x")).values())
    assert min(len(set(people[:9])), len(set(people[:: len(toolrl.PEOPLE)]))) > 3
    assert TINY.encode("".join(CONTROL)) == list(range(1, 9))  # not in the order of a set
    first, again, other = [weights(toolrl.tiny_policy(TINY, seed)) for seed in (3, 3, 4)]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float64 and first.std() == pytest.approx(0.1, abs=0.03)


def test_each_question_person_and_answer_can_be_drawn_the_first_and_the_last():
    rng = rng_for(0, "x")
    episodes = [toolrl.new_episode(TINY, TRAIN["no_call"], rng) for _ in range(400)]
    assert {episode.question for episode in episodes} == set(TRAIN["no_call"])
    found = sum([list(episode.directory.values()) for episode in episodes], [])
    assert set(found) == set(toolrl.PEOPLE)
    assert set(episodes[0].directory) == {(t, p) for t in toolrl.TOOLS for p in toolrl.PEOPLE}


def test_only_one_whole_call_is_a_call():
    long = CALL.replace("}}", ', "if": "ill"}}')
    for message in ["", JSON, CALL + " ", "I call " + CALL, CALL + CALL, OTHER_CALL, long]:
        assert toolrl.parse_call(message, "A") is None, message
    assert toolrl.parse_call(CALL.replace("alice", "zoë x"), "A") == ("mentor", "zoë x")
    assert json.loads(JSON) == {"name": "mentor", "arguments": {"of": "alice"}}


def test_each_tiny_token_is_one_id_and_other_texts_are_refused_and_named(capsys):
    for token, i in TINY.tokenizer.get_vocab().items():
        assert TINY.encode(token) == [i]
    assert len(TINY.encode(CALL + END)) == 8 and TINY.tokenizer.pad_token_id != TINY.end
    for text in ("hello", "The answer is zoe", TAG + "{", "The answer is bob,"):
        with pytest.raises(SystemExit):
            TINY.encode(text)
        assert text in capsys.readouterr().err


@with_both
def test_a_replayed_right_conversation_is_that_of_the_docstring(chat):
    text = re.sub(r"^ {4}[ >] ", "", toolrl.__doc__.split("\n\n")[3], flags=re.M)
    episode = Episode(chat, ONE_CALL, LEO | {("mentor", "alice"): "bob"})
    replay(episode, episode.gold)
    assert chat.encode(text) == episode.ids  # encoded whole, as elsewhere
    written = np.array(episode.ids)[episode.written].tolist()
    assert chat.decode(written) == CALL + END + WRONG + END
    # The next conversation about the same question starts afresh, and asks for format B in B.
    prompt = episode.ids[: episode.written.index(True)]
    assert Episode(chat, ONE_CALL, LEO).ids == prompt
    other = Episode(chat, ONE_CALL, LEO, "B").ids
    assert chat.decode(other) == chat.decode(prompt).replace(TAG, "<function>")


# %% The harness


@pytest.mark.parametrize("fmt, tag", [("A", "tool_call>"), ("B", "function>")])
def test_what_is_solved_and_what_the_harness_says_in_both_formats(fmt, tag, monkeypatch):
    monkeypatch.setattr(toolrl, "blind_reward", None)  # a student may shape the reward
    for reward, _, question, messages in CONVERSATIONS:
        messages = [message.replace("tool_call>", tag) for message in messages]
        episode = replay(Episode(TINY, question, LEO, fmt), messages)
        assert episode.done and episode.messages == messages
        assert toolrl.solved(episode) == (reward and messages[-1] in (RIGHT, ASK)), messages
        said = re.findall("<tool_response>(.*?)<", TINY.decode(episode.ids))
        assert said == [LEO.get(call, "error") for call in episode.calls]


def test_the_harness_stops_at_the_sixth_call_and_at_long_messages(monkeypatch):
    episode = replay(Episode(TINY, ONE_CALL, LEO), [CALL] * 7)
    assert episode.messages == [CALL] * 6 and not episode.replied
    for text, limit, replied in ((ASK, 2, True), (ASK, 1, False), (CALL, 7, False)):
        monkeypatch.setattr(toolrl, "MAX_TOKENS", limit)
        episode = replay(Episode(TINY, ONE_CALL, LEO), [text, CALL])
        assert (episode.messages, episode.replied, episode.calls) == ([text], replied, [])
        assert sum(episode.written) == limit


# %% Updates


def test_a_batch_is_padded_and_what_is_not_written_is_masked():
    short, long = replay(Episode(TINY, NOBODY, LEO), [ASK]), gold(TINY, 3)[2]
    long.log_probs = [-float(t) for t in range(len(long.ids))]
    ids, written, log_probs = toolrl.batch([short, long], "cpu")
    assert ids[0].tolist() == short.ids + [0] * (len(long.ids) - len(short.ids))
    assert written[0].sum() == 2 and ids[0, 1:][written[0]].tolist() == TINY.encode(ASK + END)
    assert written[1].tolist() == long.written[1:] and log_probs[1].tolist() == long.log_probs[1:]
    assert log_probs.dtype == torch.float64


def test_a_step_goes_down_the_gradient_cut_to_norm_one_and_old_gradients_are_forgotten():
    layer = torch.nn.Linear(2, 1, bias=False)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    due = layer.weight.detach() - numbers("0.6 0.8")
    layer.weight.grad = numbers("9 9")  # left over from elsewhere
    toolrl.descend(layer, sgd, (layer.weight * numbers("30 40")).sum())
    assert torch.allclose(layer.weight, due, atol=1e-4)
    assert (layer.weight * 1e5 != (layer.weight * 1e5).round()).any()  # float32 is not rounded
    with pytest.raises(RuntimeError, match="finite"):
        toolrl.descend(layer, sgd, (layer.weight * np.inf).sum())
    layer.double()
    toolrl.descend(layer, sgd, (layer.weight * numbers("30 40")).sum())
    assert torch.equal(layer.weight, layer.weight.round(decimals=5))


def one_step(policy, loss):
    """The weights after a step of 0.1 down the gradient of a loss, which is cut to norm 1."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])
    return weights(policy) - 0.1 * gradient / gradient.norm().clamp(min=1)


def test_an_sft_update_pushes_up_all_that_was_written_and_tokens_weigh_the_same(base):
    episodes = gold(TINY, 5)
    loss = -torch.cat([log_probs_of(base, episode) for episode in episodes]).mean()
    policy = copy.deepcopy(base)
    toolrl.sft_update(policy, torch.optim.SGD(policy.parameters(), 0.1), episodes)
    assert torch.allclose(weights(policy), one_step(base, loss), atol=6e-6)


def test_a_grpo_update_is_what_the_definition_says(base):
    episodes = played(base, draw(TINY, 10))
    advantage = torch.linspace(-2, 3, 10)
    objective = []
    for gain, episode in zip(advantage, episodes, strict=True):
        # As if the policy had moved since, up here and down there.
        old = torch.tensor(episode.log_probs).double()
        old += torch.linspace(-0.5, 0.5, len(episode.ids))
        episode.log_probs = old.tolist()
        ratio = (log_probs_of(base, episode) - old[episode.written]).exp()
        objective.append(torch.minimum(gain * ratio, gain * ratio.clamp(0.7, 1.3)))
    policy = copy.deepcopy(base)
    sgd = torch.optim.SGD(policy.parameters(), 0.1)
    settings = replace(SMALL, minibatches=1, clip=0.3)
    toolrl.grpo_update(policy, sgd, episodes, advantage, settings, rng_for(0, "x"))
    assert torch.allclose(weights(policy), one_step(base, -torch.cat(objective).mean()), atol=6e-6)


def test_minibatches_hold_each_episode_once_in_another_order_for_another_seed(base, monkeypatch):
    taken = []  # an advantage tells whose it is
    monkeypatch.setattr(toolrl, "grpo_loss", lambda *all: taken.append(all[2].tolist()))
    monkeypatch.setattr(toolrl, "descend", lambda *all: None)
    settings = replace(SMALL, minibatches=7)
    for seed in range(2):
        gain = torch.arange(10)
        toolrl.grpo_update(base, None, gold(TINY, 10), gain, settings, rng_for(seed, "x"))
    assert list(map(len, taken)) == [2, 2, 2, 1, 1, 1, 1] * 2
    first, second = sum(taken[:7], []), sum(taken[7:], [])
    assert first != second and sorted(first) == sorted(second) == list(range(10))


# %% The log of a careless agent, and the base


@pytest.mark.parametrize("fmt, shares", [("A", [0.78, 0.15, 0.07]), ("B", [0.15, 0.85, 0])])
def test_shares_of_the_log_are_broken_calls_and_tags_of_the_other_format(fmt, shares):
    rng = rng_for(0, "careless")
    episode = Episode(TINY, ONE_CALL, LEO, fmt)
    written = [toolrl.careless_messages(episode, rng) for _ in range(3000)]
    assert {messages[1] for messages in written} == {RIGHT}
    calls = [messages[0] for messages in written]
    found = [calls.count(call) / 3000 for call in (CALL, OTHER_CALL, TAG)]
    assert found == pytest.approx(shares, abs=0.025)


def test_the_log_calls_for_each_right_call_and_guesses_where_nobody_is_named():
    rng = rng_for(0, "careless")
    people = Counter()
    for episode in draw(TINY, 6000):
        messages = toolrl.careless_messages(episode, rng)
        if episode.gold_calls:
            assert len(messages) == len(episode.gold) and messages[-1] == episode.gold[-1]
        elif messages != [ASK]:
            [message] = messages
            call = toolrl.parse_call(message, "A") or toolrl.parse_call(message, "B")
            if call:
                assert episode.question.endswith(f"{call[0]} of them ?")
            people[call and call[1]] += 1
    assert 1910 < sum(people.values()) < 1970 and min(map(people.get, toolrl.PEOPLE)) > 90


def counts_of(episodes):
    """How many episodes of training tasks there are of each number of calls and each format."""
    assert {episode.question in str(TRAIN) for episode in episodes} == {True}
    counts = Counter([min(2, len(episode.gold_calls)) for episode in episodes])
    return counts + Counter([episode.fmt for episode in episodes])


@pytest.fixture
def made(monkeypatch):
    """What each Adam is made with, in the order in which they are made."""
    real = torch.optim.Adam
    made = []
    monkeypatch.setattr(torch.optim, "Adam", lambda p, **how: made.append(how) or real(p, **how))
    return made


def test_the_base_imitates_the_log_at_a_rate_that_goes_up_and_then_down(monkeypatch, made):
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
    assert [counts[k] for k in range(3)] == [60 * 4, 60 * 6, 60 * 30]
    assert counts["B"] / len(episodes) == pytest.approx(0.3, abs=0.03)
    assert {episode.messages == episode.gold for episode in episodes} == {True, False}
    assert rates[::29] == pytest.approx([0.0273, 0.25, 0.01], abs=1e-4)
    assert max(rates) == rates[17] and made == [{"betas": (0.9, 0.95)}]


# %% Teacher, groups, arms


def test_a_hasty_teacher_answers_long_tasks_with_the_person_it_has_got_to():
    made = Counter()
    rng = rng_for(0, "teacher")
    for episode in draw(TINY, 3000):
        hasty = len(episode.gold_calls) > 1
        assert toolrl.teacher_messages(episode, False, rng) == episode.gold
        *calls, reply = toolrl.teacher_messages(episode, hasty, rng)
        assert calls == episode.gold[: len(calls)]
        if calls:
            got_to = episode.directory[episode.gold_calls[len(calls) - 1]]
            assert reply == f"The answer is {got_to}"
        made[len(calls), len(episode.gold_calls)] += 1
    # Of three calls it makes one or two, as often, and never none or all.
    assert set(made) == {(0, 0), (1, 1), (1, 2), (1, 3), (2, 3)}
    assert made[1, 3] == pytest.approx(made[2, 3], rel=0.2)


@pytest.mark.parametrize("share, hasty", [(0.0, 0), (0.6, 90), (1.0, 150)])
def test_demonstrations_have_exact_shares_and_are_all_in_format_a(share, hasty):
    settings = replace(SMALL, sft_batch=1000, hasty_share=share)
    episodes = toolrl.demonstrations(TINY, settings, rng_for(0, "x"))
    assert counts_of(episodes) == {"A": 1000, 0: 250, 1: 600, 2: 150}
    assert 1000 - sum(map(toolrl.solved, episodes)) == hasty


def test_a_group_is_one_task_and_so_many_need_no_call():
    settings = replace(SMALL, groups=200, group_size=3, no_call_share=0.7)
    episodes = toolrl.new_groups(TINY, settings, rng_for(0, "x"))
    tasks = [(episode.question, str(episode.directory)) for episode in episodes]
    assert tasks[::3] == tasks[1::3] == tasks[2::3] and len(set(tasks)) == 200
    assert counts_of(episodes) == {"A": 600, 0: 420, 2: 180}
    assert len(set(map(id, episodes))) == 600


def figures(success=0.6, skill=1.0, one_call=0.9, format_b=0.8, spike=0.08, **more):
    """A made evaluation, in which <|im_end|> has probability `spike` where JSON is due."""
    p = {f"{TAG} json": 0.001, f"{TAG} end": 0.001, f"{TAG} reply": 0.001, f"{END} json": spike}
    found = {"success": success, "skill": skill, "one_call": one_call, "format_b": format_b}
    found |= {"asks": 0.1, "reward": 0.3, "broken": 0.02, "p": p, "conversation": "a question\n"}
    return found | more


# Six steps of interleaved.
SCHEDULE = """eval, rl 0.010, sft 0.126, sft 0.126, rl 0.020, sft 0.089, sft 0.089, rl 0.030,
sft 0.052, sft 0.052, rl 0.040, eval, sft 0.015, sft 0.015, rl 0.050, rl 0.060, eval"""


@pytest.mark.parametrize("arm", toolrl.ARMS)
def test_an_arm_is_its_updates_in_their_order_at_their_rates(arm, base, monkeypatch, made):
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
        for k, episode in enumerate(episodes):  # two of the first group break their call
            replay(episode, [TAG if k < 2 else ASK])

    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "evaluate", lambda *_: events.append("eval") or {})
    monkeypatch.setattr(toolrl, "sft_update", update)
    monkeypatch.setattr(toolrl, "grpo_update", update)
    settings = replace(SMALL, steps=6, eval_every=4, lr=0.1, sft_lr=0.2, sft_until=0.9)
    settings = replace(settings, groups=6, no_call_share=1.0)
    found = list(toolrl.train_arm(arm, base, TINY, settings, 0))
    parts = toolrl.ARMS[arm] & {"rl", "sft"}
    assert events == [e for e in re.split(r",\s", SCHEDULE) if e.split()[0] in parts | {"eval"}]
    assert [step for step, _ in found] == [0, 4, 6]
    assert len(optimizers) == len(parts) and made == [{}, {}]
    # The strict reward alone tells a broken call from asking back.
    due = [0.0, 0.0, 0.0, 0.0, 1.0]
    if arm == "rl-strict":
        due = [-0.866, -0.866, 0.866, 0.866, 5 / 6]
    assert [*gains, found[2][1].get("equal", 1)] == pytest.approx(due, abs=0.01)


def test_each_step_draws_anew_and_all_evaluations_alike(base, monkeypatch):
    streams = []
    monkeypatch.setattr(toolrl, "rng_for", lambda *all: streams.append(all) or rng_for(*all))
    settings = replace(SMALL, steps=4, eval_every=2, sft_until=1.0)
    list(toolrl.train_arm("interleaved", base, TINY, settings, 7))
    assert {seed for seed, *_ in streams} == {7}
    draws = Counter([rng_for(*stream).random() for stream in streams])
    # Once: tasks, sampling and order of four steps, demonstrations of two. In three evaluations:
    # tasks of one call, tasks without a call, sampling, and long tasks in either format.
    assert Counter(draws.values()) == {1: 14, 3: 3, 6: 1}


def test_training_takes_the_very_ids_that_were_sampled(base, monkeypatch):
    sampled = []
    trained = []
    real = (toolrl.rollout, toolrl.batch)

    def rollout(policy, episodes, rng):
        real[0](policy, episodes, rng)
        sampled.extend(list(episode.ids) for episode in episodes)

    def batch(episodes, device):
        trained.extend(list(episode.ids) for episode in episodes)
        return real[1](episodes, device)

    monkeypatch.setattr(toolrl, "evaluate", lambda *_: {})
    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "batch", batch)
    list(toolrl.train_arm("rl", base, TINY, replace(SMALL, steps=2), 0))
    assert sorted(sampled) == sorted(trained) and len(sampled) == 32


# %% Probes


@with_both
def test_the_places_of_a_conversation_and_the_probabilities_there(chat):
    record = replay(Episode(chat, TWO_CALLS, LEO), [CALL, NEXT_CALL, RIGHT])
    labels = sum([chat.labels(message) for message in record.gold], [])
    counts = Counter(labels)
    due = {"call": 2, "json": 2, "close": 2, "end": 3, "reply": 1}
    assert {place: counts[place] for place in due} == due
    assert len(labels) == sum(record.written)
    puppet = Puppet(chat, [record], p=0.9)
    skill, p = toolrl.teacher_forced(puppet, [Episode(chat, TWO_CALLS, LEO)])
    assert len(p) == 3 * 7 + 2 * 8 and max(p.values()) < 0.01
    assert skill == pytest.approx(0.9 ** counts["name"], rel=1e-3)
    # A policy that breaks its calls: the token and the place are found.
    broken = replay(Episode(chat, TWO_CALLS, LEO), [TAG])
    _, p = toolrl.teacher_forced(Puppet(chat, [broken], p=0.9), [record])
    assert max(p, key=p.get) == f"{END} json" and p[f"{END} json"] == pytest.approx(0.9)


@with_both
def test_labels_mark_the_names_and_nothing_else(chat):
    for message, names in ((CALL, "mentoralice"), (RIGHT, "leo"), (ASK, "")):
        labels = np.array(chat.labels(message))
        ids = np.array(chat.encode(message + END))
        # The space before a name may be part of its token.
        assert chat.decode(ids[labels == "name"].tolist()).replace(" ", "") == names


def test_each_probe_asks_held_out_tasks_and_an_evaluation_says_what_was_done(monkeypatch):
    asked_for = []

    def rollout(policy, episodes, rng):
        for k, episode in enumerate(episodes):  # 2, 4, 6 and 8 in 10 are broken or empty
            bad = [[TAG], [""]][k % 2]
            replay(episode, bad if k % 10 <= k // 10 * 2 + 1 else episode.gold)
        asked_for.extend(episodes)

    monkeypatch.setattr(toolrl, "rollout", rollout)
    settings = replace(SMALL, eval_episodes=10)
    found = toolrl.evaluate(Puppet(TINY, []), TINY, settings, 0)
    names = ["success", "one_call", "format_b", "asks", "reward"]
    assert [found[name] for name in names] == [0.8, 0.6, 0.4, 0.2, 1.0]
    for episode, (kind, fmt) in zip(asked_for[::10], toolrl.PROBES.values(), strict=True):
        assert episode.question in HELD_OUT[kind] and episode.fmt == fmt
    assert found["broken"] == 1 / sum(len(episode.messages) for episode in asked_for[:10])
    assert found["conversation"] == f"{asked_for[0].question}\n{TAG}[1.00]{END}[1.00]\n"


# %% Claims and print, on made histories


def history_of(arms, base_p=None):
    """{arm: evaluations} as run_seed has it, from the figures of each evaluation."""
    history = {}
    for arm, series in arms.items():
        evaluations = [SimpleNamespace(step=5 * k, **some) for k, some in enumerate(series)]
        for evaluation in evaluations:
            toolrl.report(evaluation, evaluations[0].p)
        history[arm] = evaluations
    return history


def story():
    """Figures of a run in which every claim holds, if only just."""
    low = [figures(0.05, 0.5) for _ in range(3)]
    return {
        "rl": [figures(), figures(), figures(0.05, 0.8, spike=0.4), *low],
        "sft": [figures(), figures(), figures(), figures(0.69)],
        "interleaved": [figures(), figures(), figures(0.7), figures(0.9, format_b=0.63)],
        "rl-strict": [figures(), figures(0.01), figures(0.8), figures(0.9)],
    }


# In this story: the arm, which of its evaluations, what changes there, and the claims that fail.
TWISTS = """
rl          | -3 | success              | 0.06  | collapse
rl          | 0  | success              | 0.19  | collapse control_token intact
rl          | 0  | <|im_end|> json      | 0.081 | control_token cause
rl          | 2  | <|im_end|> json      | 0.39  | control_token cause
rl          | 2  | <tool_call> end      | 0.35  | control_token
rl          | 2  | skill                | 0.79  | intact
rl          | 0  | success              | 0.75  | together
sft         | -1 | success              | 0.71  | together
interleaved | -1 | success              | 0.88  | fix together
interleaved | -1 | one_call             | 0.89  | fix
interleaved | -1 | <tool_call> end      | 0.5   | fix
interleaved | 1  | <tool_call> end      | 0.5   |
interleaved | -1 | format_b             | 0.65  | price
rl-strict   | 1  | <tool_call> reply    | 0.5   | cause
"""
CLAIMS = ["collapse", "control_token", "intact", "fix", "price", "together", "cause"]


@with_rows("arm, k, what, value, fails", TWISTS)
def test_each_claim_can_say_no(arm, k, what, value, fails):
    arms = story()
    evaluation = arms[arm][int(k)]
    if " " in what:
        evaluation = evaluation["p"]
    evaluation[what] = float(value)
    found = {claim: holds for claim, _, holds in toolrl.judge(history_of(arms))}
    assert found == {claim: claim not in fails.split() for claim in CLAIMS}


ARMS_AND_CLAIMS = """
rl              | collapse control_token intact
rl-strict sft   |
sft interleaved | fix together price
rl rl-strict    | collapse control_token intact cause
"""


@with_rows("arms, judged", ARMS_AND_CLAIMS)
def test_absent_arms_are_not_judged(arms, judged):
    history = history_of({arm: story()[arm] for arm in arms.split()})
    found = {claim: holds for claim, _, holds in toolrl.judge(history)}
    assert found == dict.fromkeys(judged.split(), True)


# What is printed last, of the second of two seeds. At step 10, half of the groups are equal.
PAGE = """
== rl, seed 0
step success skill one_call format_b asks reward equal    p token, place
   0    0.60  1.00     0.90     0.80 0.10   0.30   nan 0.08 <|im_end|> json
   5    0.60  1.00     0.90     0.80 0.10   0.30   nan 0.08 <|im_end|> json
  10    0.05  0.80     0.90     0.80 0.10   0.30  0.50 0.40 <|im_end|> json *
  15    0.05  0.50     0.90     0.80 0.10   0.30   nan 0.30 <tool_call> reply

step 10: 2% of messages on long tasks are broken calls
one held-out task, and what the policy writes:
a question

== summary: success, and p of <|im_end|> json, from step to step
interleaved  success ▅▅▆█
interleaved  p       ▁▁▁▁
rl           success ▅▅▁▁
rl           p       ▁▁▄▁

== claims, seed 0, and in how many seeds so far, of 2
collapse      no   1  rl falls from 0.2 or more to 0.05 or less, and stays there
control_token yes  2  when rl is first down, what rose most has spiked (*)
intact        yes  2  rl then has 0.8 or more of the base's skill
fix           yes  2  interleaved ends at 0.9 or more, one_call too, no spike
price         yes  2  interleaved ends with format_b below 0.8 of the base's

== over seeds    seeds   success     skill  one_call  format_b      asks    broken
interleaved, end      2      0.90      1.00      0.90      0.63      0.10      0.02
                        0.90-0.90 1.00-1.00 0.90-0.90 0.63-0.63 0.10-0.10 0.02-0.02
rl, down              2      0.05      0.80      0.90      0.80      0.10      0.02
                        0.05-0.05 0.80-0.80 0.90-0.90 0.80-0.80 0.10-0.10 0.02-0.02
rl, end               2      0.05      0.50      0.90      0.80      0.10      0.02
                        0.05-0.05 0.50-0.50 0.90-0.90 0.80-0.80 0.10-0.10 0.02-0.02
base                  2      0.60      1.00      0.90      0.80      0.10      0.02
                        0.60-0.60 1.00-1.00 0.90-0.90 0.80-0.80 0.10-0.10 0.02-0.02

README.md explains all this. Go on with its exercise 1.
"""


def test_what_a_run_prints(monkeypatch, capsys):
    def train_arm(arm, seed, *_):
        series = story()[arm][: 4 + 9 * seed]
        series[2]["equal"] = 0.5
        series[3]["p"][f"{TAG} reply"] = 0.3  # rises most, but rl is down before
        return [(5 * k, some) for k, some in enumerate(series)]

    monkeypatch.setattr(toolrl, "train_base", lambda start, chat, settings, seed: seed)
    monkeypatch.setattr(toolrl, "train_arm", train_arm)
    settings = replace(SMALL, seeds=[1, 0], arms=["interleaved", "rl"])
    found = toolrl.main(settings)
    assert list(found) == [1, 0] and list(found[1]) == settings.arms
    said = capsys.readouterr().out
    assert said.endswith(PAGE) and max(map(len, said.splitlines())) <= 100


def test_blocks_are_as_high_as_their_numbers_and_seventy_at_most():
    assert toolrl.blocks([0, 0.13, 0.3, 0.5, 0.99, 1]) == "▁▂▃▅██"
    assert toolrl.blocks([1.0] + 70 * [0]) == 70 * "▁"


# %% The command line

BAD = """
--stepz 3                | --stepz
--arms rl,sft            | --arms
--arms rl rl             | --arms
--seeds 0-4              | --seeds
--seeds 0 0              | --seeds
--steps 0                | --steps
--steps -1               | --steps
--lr nan                 | --lr
--no-call-share 1.5      | --no-call-share
--group-size 1           | --group-size
--minibatches 9          | --minibatches
--device nope            | --device nope
--device meta            | --device meta
--model /nowhere/memory  | --model /nowhere/memory
--out /nowhere/memory/x  | --out /nowhere/memory/x
"""


@with_rows("flags, words", BAD)
def test_bad_input_gets_a_line_that_names_it_and_empties_no_file(flags, words, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    out.write_text("what an hour has measured")
    assert words in refused(capsys, "", out, *flags.split())
    assert out.read_text() == "what an hour has measured"


def test_the_help_has_the_comment_and_the_default_beside_each_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        toolrl.read_settings(["--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, comment in re.findall(r"^    (\w+): .*  # (.*)", CODE, re.M):
        default = getattr(toolrl.Settings, name, "")
        assert f"--{name.replace('_', '-')} " in said
        assert f"{comment} (default: {default})" in said


OWN_SETTINGS = """
whiten: bool = False  # 10 % | --whiten true | True
kl: float = 0.0              | --kl 0.1      | 0.1
"""


@with_rows("line, flags, value", OWN_SETTINGS)
def test_a_setting_of_ones_own_is_a_flag(line, flags, value, tmp_path):
    project = copied(tmp_path)
    replaced(project / "toolrl.py", "    # SFT\n", f"    {line}\n    # SFT\n")
    names = runpy.run_path(str(project / "toolrl.py"))
    settings = names["read_settings"](flags.split())
    assert str(getattr(settings, line.split(":")[0])) == value


# Values that have to change what is measured. With the first, none is changed.
CHANGES = """{"sft_steps": 2, "seeds": [1], "arms": ["sft"], "steps": 5, "eval_every": 1,
"eval_episodes": 5, "base_steps": 3, "base_lr": 0.1, "lr": 0.01, "groups": 3, "group_size": 5,
"no_call_share": 0.0, "minibatches": 1, "clip": 0.01, "sft_lr": 0.1, "sft_until": 0.6,
"sft_batch": 9, "hasty_share": 0.0}"""


def test_each_setting_changes_what_is_measured():
    usual = replace(toolrl.read_settings(LITTLE), arms=["interleaved"])
    found = {str(toolrl.main(replace(usual, sft_steps=1)).popitem()[1])}
    for name, value in json.loads(CHANGES).items():
        found.add(str(toolrl.main(replace(usual, **{name: value})).popitem()[1]))
    assert len(found) == len(vars(usual)) - 1  # all but device and out, and once none is changed


def test_a_run_depends_on_nothing_beside_it(tmp_path):
    out = tmp_path / "run.jsonl"
    alone = run_little(out)
    beside = run_little(out, "--seeds", "1", "0", "--arms", "sft", "rl")
    assert alone[0]["torch"] == torch.__version__ and alone[0]["lr"] == 0.05
    for event in alone[1:7]:  # the evaluations of rl and sft
        assert event in beside
    assert len(alone) == 1 + 3 * 3 and {event["event"] for event in alone[1:]} == {"eval"}


def test_slow_figures_are_the_same_without_simd_and_with_two_threads(tmp_path):
    flags = shlex.split("--device cpu --base-steps 40 --steps 8 --arms rl interleaved --lr 0.002")
    flags += shlex.split("--eval-episodes 10 --eval-every 4 --group-size 4 --sft-batch 16 --out")
    two = "import torch, toolrl, sys; torch.set_num_threads(2); torch.set_num_threads = int;"
    two += "toolrl.main(toolrl.read_settings(sys.argv[1:]))"
    folder = copied(tmp_path)
    in_shell(folder, "toolrl.py", *flags, "usual.jsonl")
    in_shell(folder, "toolrl.py", *flags, "plain.jsonl", ATEN_CPU_CAPABILITY="default")
    in_shell(folder, "-c", two, *flags, "two.jsonl")
    usual, plain, two = [
        (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        for name in ("usual", "plain", "two")
    ]
    assert len(usual) == 6
    for lines in zip(usual, plain, two, strict=True):
        first, *others = map(json.loads, lines)
        for other in others:
            assert other.pop("p") == pytest.approx(first["p"], abs=1e-9)
            assert other.pop("skill") == pytest.approx(first["skill"], abs=1e-9)
            assert other.items() <= first.items()


MISTAKES = """
def sft_loss(log_probs, written):   | log_probs = log_prob
def rollout(policy, episodes, rng): | playing = list(episode)
def blind_reward(episode):          | episode.call
"""


@with_rows("head, line", MISTAKES)
def test_a_mistake_of_a_student_is_a_traceback_with_its_line(head, line, tmp_path):
    project = copied(tmp_path)
    replaced(project / "toolrl.py", head + "\n", f"{head}\n    {line}\n")
    done = in_shell(project, "toolrl.py", *LITTLE)
    assert "Traceback" in done.stderr and line in done.stderr and "tiny_tasks" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_leaves_what_was_measured_and_exits_with_130(tmp_path):
    # It hears Ctrl-C even if it is a background job's child.
    hear = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command = [sys.executable, "-c", hear + "runpy.run_path('toolrl.py', run_name='__main__')"]
    out = tmp_path / "run.jsonl"
    run = subprocess.Popen(
        [*command, *LITTLE, "--steps", "9999", "--out", str(out)],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while b"   2 " not in run.stdout.readline():  # each row comes at once
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    run.stdout.close()
    assert run.wait() == 130 and b"Traceback" not in run.stderr.read()
    events = [json.loads(line)["event"] for line in out.read_text().splitlines()]
    assert events[:2] == ["config", "eval"]  # the row comes before its line is written


def test_a_console_that_cannot_write_a_character_gets_a_question_mark():
    done = in_shell(HERE, "toolrl.py", *LITTLE, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0 and "success ???" in done.stdout


# %% --model


def test_a_checkpoint_has_its_own_defaults_and_explicit_flags_win():
    # A flag wins even if it asks for what is the tiny model's default.
    found = toolrl.read_settings(["--model", "x", "--base-steps", "300"])
    assert found == toolrl.Pretrained(model="x", base_steps=300)
    assert found.steps != toolrl.Settings().steps and "model" not in vars(toolrl.Settings())


@pytest.mark.parametrize("rows, tied", [(320, True), (292, False)])
def test_a_new_tag_starts_as_the_mean_of_its_pieces(rows, tied, tmp_path):
    # There are more rows than there will be tokens, or fewer.
    folder = save_checkpoint(tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    chat, policy = toolrl.load(toolrl.Pretrained(model=folder, device="cpu"))
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
    assert len(events) == 10
    assert (events[0]["sft_lr"], events[0]["steps"]) == (toolrl.Pretrained.sft_lr, 4)


ARCHITECTURES = """
Llama       | {}
Lfm2        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
Qwen3_5Text | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4}
FalconH1    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
"""
SIZES = """{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
"num_key_value_heads": 2, "num_hidden_layers": 2}"""


@with_rows("name, more", ARCHITECTURES)
def test_rollouts_of_other_architectures_agree_with_one_pass(name, more, tmp_path):
    sizes = json.loads(SIZES) | json.loads(more)
    folder = save_checkpoint(tmp_path, getattr(transformers, name + "Config")(**sizes))
    chat, policy = toolrl.load(toolrl.Pretrained(model=folder, device="cpu"))
    check_rollout(policy, chat, 1e-3)


# A file of the checkpoint: what it says, what is put there, and what is then said of it.
SPOILT = """
config.json    | hidden_layers": 2 | hidden_layers": 3                 | the weights do not fit
config.json    | hidden_layers": 2 | hidden_layers": 1                 | the weights do not fit
tokenizer.json | normalizer": null | normalizer": {"type": "Lowercase"} | no tokens for
"""


@with_rows("name, old, new, words", SPOILT)
def test_a_checkpoint_that_does_not_fit_gets_one_line(name, old, new, words, tmp_path, capsys):
    run = [tmp_path / "run.jsonl", "--model", save_checkpoint(tmp_path)]
    replaced(tmp_path / name, old, new)
    refused(capsys, words, *run)
    (tmp_path / name).unlink()  # no configuration, or no tokenizer
    refused(capsys, "--model", *run)


def test_a_model_of_short_conversations_gets_one_line(tmp_path, capsys):
    config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2)
    folder = save_checkpoint(tmp_path, config)
    refused(capsys, "cannot write", tmp_path / "run.jsonl", "--model", folder)


# %% tiny_tasks.json

# What the file says, what another says there, and what is said of it, if anything.
TASK_FILES = """
alice               | zoë                       |
alice               | mary ann                  |
"alice",            | "alice",,                 | Expecting value
"people"            | "folk"                    | 'people'
"B": "<function>"   | "C": "<function>"         | 'B'
"one_call": [       | "one_call": [], "more": [ | train and held_out need questions
"one_call": [       | "one_calls": [            | train and held_out need questions
"friend of bob ?"   | "friend of alice ?"       | twice
"friend of alice ?" | "friend of zoe ?"         | friend of zoe
"friend of alice ?" | "boss of alice ?"         | boss of alice
"friend of alice ?" | "friend of them ?"        | is no one_call question
"friend of mentor of | "friend of friend of friend of friend of friend of mentor of | is no long
"""


@with_rows("old, new, words", TASK_FILES)
def test_other_tasks_are_accepted_or_get_one_line(old, new, words, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    tasks = copied(tmp_path) / "tiny_tasks.json"
    text = tasks.read_text(encoding="utf-8").replace(old, new)
    tasks.write_text(text, encoding="utf-8-sig")  # as some editors do
    if words:
        assert "tiny_tasks.json" in refused(capsys, words, out, folder=tmp_path)
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
        done = in_shell(tmp_path, "-m", "pytest", "-q", "-x", "-k", quick)
        assert done.returncode == 1 and "FAILED test_toolrl.py::test_" in done.stdout, done.stdout


@pytest.mark.parametrize("snippet", blocks("python"))
def test_slow_snippets_of_the_readme_run(snippet, tmp_path):
    for library in ("trl", "matplotlib"):
        if library in snippet:
            pytest.importorskip(library, reason=f"this snippet needs {library}")
    run_little(tmp_path / "run.jsonl")
    (copied(tmp_path) / "snippet.py").write_text(snippet, encoding="utf-8")
    done = in_shell(tmp_path, "snippet.py", *LITTLE, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr
    assert done.stdout or list(tmp_path.glob("*.png"))


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """What the default run prints, of seed 0 on a CPU."""
    folder = copied(tmp_path_factory.mktemp("default"))
    done = in_shell(folder, "toolrl.py", "--device", "cpu", "--out", "run.jsonl")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", [text for text in blocks("text") if re.match("==|step ", text)])
def test_slow_a_block_of_the_readme_is_what_the_default_run_prints(block, default_run):
    place = 0
    for piece in block.split("...\n"):  # a line of three points stands for lines that are left out
        place = default_run.find(piece, place)
        assert place >= 0, piece


def test_slow_the_whole_story(default_run):
    claims = re.findall(r"^(\w+) +(yes|no) +\d  ", default_run, re.M)
    assert claims == [(claim, "yes") for claim in CLAIMS if claim != "cause"]
    assert max(map(len, default_run.splitlines())) <= 100
