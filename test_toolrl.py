"""Tests of toolrl. The first part grades four functions that a student writes again.

    python -m pytest -q -x -k grpo_loss   one of advantages, grpo_loss, blind_reward and rollout
    python -m pytest -q -k "not slow"     all that is quick
    python -m pytest -q                   with the README's commands and blocks, and whole runs

A failure of the first part is a few lines: what should have come back, what did, and a guess at the
mistake. It needs toolrl.py and tiny_tasks.json alone.
"""

import itertools
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

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import toolrl
from toolrl import CONTROL, END, HELD_OUT, KINDS, PEOPLE, TRAIN, Episode, replay, rng_for

TINY = toolrl.Chat(toolrl.tiny_tokenizer())
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo


def table(text):
    """The rows of a table in a text, whose cells are parted by "|"."""
    return [re.split(r" +\| *", line.strip()) for line in text.splitlines() if "|" in line]


def each(names, cases):
    """Run a test with each of these cases, numbered from 1."""
    return pytest.mark.parametrize(names, cases, ids=itertools.count(1))


def numbers(text):
    """A tensor of the numbers in a text, whose rows are parted by ";"."""
    return torch.tensor([list(map(float, row.split())) for row in text.split(";")]).double()


def fail(why):
    pytest.fail(why, pytrace=False)


def attempt(function, *inputs):
    """What a student's function returns. What it raises is told in a few lines."""
    try:
        return function(*inputs)
    except Exception as error:
        why = f"{function.__name__} raises {type(error).__name__}: {error}"
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).name == "toolrl.py":
                why += f"\nline {frame.lineno}: {frame.line}"
        if "must match" in why:
            why += "\nperhaps keepdim=True is forgotten, or [:, None], which makes a column"
        raise pytest.fail.Exception(why, pytrace=False) from None


def grade(what, found, right, mistakes, within, shape):
    """Fail unless these are the right numbers, and guess why from what each mistake gives."""
    if not isinstance(found, torch.Tensor):
        fail(f"{what} should be a tensor, but is {found!r}\nperhaps return is forgotten")
    if found.shape != shape:
        fail(f"{what} should have the shape {list(shape)}, but has {list(found.shape)}")

    def is_near(text):
        due = numbers(text).view(shape)
        return due.allclose(found.double(), rtol=0, atol=within, equal_nan=True)

    if not is_near(right):
        guesses = [guess for guess, text in mistakes if is_near(text)]
        why = " or ".join(guesses) or "no mistake that these tests know"
        value = found.detach().numpy().round(3).tolist()
        fail(f"{what} should be {right}, but is {value}\nperhaps: {why}")


# %% Graded: advantages

# Rewards, the right advantages, and below them what mistakes give.
ADVANTAGES = """
1 0 0 0 | 1.5 -0.5 -0.5 -0.5
the mean of the group is not taken off                      | 2 0 0 0
brackets are forgotten: (rewards - mean) / spread           | 0.5 -0.5 -0.5 -0.5
the sign is wrong: what did better than its group is above  | -1.5 0.5 0.5 0.5
they are not divided by the spread                          | 0.75 -0.25 -0.25 -0.25
they are divided by the variance, not by its root           | 3 -1 -1 -1
the spread divides by N, not by N - 1 as torch.std does     | 1.732 -0.577 -0.577 -0.577
the mean of the others is taken off, not of the group       | 2 -0.667 -0.667 -0.667
the mean of the others is taken off, and there is no spread | 1 -0.333 -0.333 -0.333
a group is a row, and these are mean and spread of columns  | nan nan nan nan

1 0 0 0; 1 1 1 0                | 1.5 -0.5 -0.5 -0.5; 0.5 0.5 0.5 -1.5
mean and spread are the batch's | 0.935 -0.935 -0.935 -0.935; 0.935 0.935 0.935 -0.935
the mean is the batch's         | 1 -1 -1 -1; 1 1 1 -1
the spread is the batch's       | 1.403 -0.468 -0.468 -0.468; 0.468 0.468 0.468 -1.403

1 0 0; 1 1 0; 0 1 1       | 1.155 -0.577 -0.577; 0.577 0.577 -1.155; -1.155 0.577 0.577
keepdim=True is forgotten | 1.155 -1.155 -1.155; 1.155 0.577 -1.155; -0.577 0.577 0.577
a group is no column      | 0.577 -1.155 -.577; 0.577 0.577 -.577; -1.155 .577 1.155

1 1 1 1; 0 0 0 0                | 0 0 0 0; 0 0 0 0
equal rewards divide 0 by 0     | nan nan nan nan; nan nan nan nan
equal rewards give 1, and not 0 | 1 1 1 1; 1 1 1 1

0.7 0.7 0.7 0.7 0.7 0.7 0.7 0.7 | 0 0 0 0 0 0 0 0

0 0; 1 0; 1 1                         | 0 0; 0.707 -0.707; 0 0
the spread is the mean of all groups' | 0 0; 2.12 -2.12; 0 0

20 40 60                                                | -1 0 1
they are divided by the range or the mean               | -0.5 0 0.5
the spread divides by N, not by N - 1 as torch.std does | -1.225 0 1.225
"""


@each("case", ADVANTAGES.split("\n\n"))
def test_advantages(case):
    [[rewards, right], *mistakes] = table(case)
    given = numbers(rewards)
    found = attempt(toolrl.advantages, given)
    grade(f"advantages of {rewards}", found, right, mistakes, 0.04, given.shape)
    if not torch.equal(given, numbers(rewards)):
        fail("the rewards themselves are changed, in place: take a new name for what you compute")


# %% Graded: grpo_loss

# Ratios, advantage, what was written, clip and the right loss, and below them what mistakes give.
GRPO_LOSSES = """
1 1 1 | 2 | 1 | 0.2 | -2
the sign is wrong: an optimizer goes down the loss, and the objective should rise | 2
the difference of log-probabilities has to go through exp                         | 0
a sum is taken for a mean                                                         | -6
the mask is shifted by a token                                                    | -1.333
the mask is the wrong way round                                                   | nan
log p stands in place of the ratio of probabilities                               | 2.408
p stands in place of the ratio of probabilities                                   | -0.6
the objective is clipped, or the clipped ratio has no advantage                   | -1
the clipped ratio should be from 1 - clip to 1 + clip                             | -0.4

1 1; 1 1 | 1 -5 | 1 0; 1 1 | 0.2 | 3
the mask is forgotten                                                             | 2
advantages stand beside columns, but each belongs to a row: advantage[:, None]    | 1
all rollouts have the mean of the advantages, but each has its own                | 2
a mean is taken of each rollout first, but all tokens weigh the same              | 2
what was not written is left out of the sum, but it counts in the mean            | 2.25
a mean is taken of each place first, but all tokens weigh the same                | 3.5
advantages have lost their sign                                                   | -3.667

1.5 | 1 | 1 | 0.9 | -1.5
the ratio is upside down: it is the new probability by the old one                | -0.667
the ratio is left out                                                             | -1
the clip of 0.2 is fixed, and the argument is not used                            | -1.2

2 0.5; 1.5 0.5 | 1 -1 | 1 | 0.2 | 0.15
there is no clip                                                                  | -0.125
the maximum is there in place of the minimum                                      | -0.275
the ratio is clipped on one side alone                                            | 0.075
the minimum of the ratios is taken before the advantage, but belongs after it     | 0
the whole rollout has one ratio, but each token has its own                       | -0.05

1.2 1 1.2 1; 1.2 1 1.2 1.2 | 3 2 | 0 1 0 1; 0 1 0 0 | 0.2 | -2.667
the mask is forgotten: prompts, results and padding are in the mean               | -2.8
the mask is shifted by a token                                                    | -3.2
it is divided by the rollouts, not by the written tokens                          | -4
what was not written is left out of the sum, but it counts in the mean            | -1
a mean is taken of each rollout first, but all tokens weigh the same              | -2.5
"""
GRADIENTS = """
there is no clip, or the maximum in place of the minimum          | 0 -1 -1.5 -.5; 0 1 1.5 .5
all is clipped, but what moved the wrong way has to be pushed back | 0 -1 0 0; 0 1 0 0
the minimum is taken before the advantage, but belongs after it   | 0 -1 0 -.5; 0 1 0 .5
it is the gradient of log p, without the ratio                    | 0 -1 0 -1; 0 1 1 0
"""


def grpo_loss(ratios, gains, written, clip):
    """What it says where the probability of each token is its ratio times 0.3, the old one."""
    old = torch.full_like(numbers(ratios), 0.3).log()
    new = (old + numbers(ratios).log()).requires_grad_()
    mask = numbers(written).bool().expand_as(old)
    return new, attempt(toolrl.grpo_loss, new, old, numbers(gains)[0], mask, float(clip))


@each("case", GRPO_LOSSES.split("\n\n"))
def test_grpo_loss(case):
    [[ratios, gains, written, clip, right], *mistakes] = table(case)
    what = f"grpo_loss with ratio {ratios}, advantage {gains}, written {written} and clip {clip}"
    found = grpo_loss(ratios, gains, written, clip)[1]
    grade(what, found, right, mistakes, 0.01, ())


def test_grpo_loss_has_a_gradient_for_what_may_still_move():
    new, loss = grpo_loss("1 1 1.5 0.5; 1 1 1.5 0.5", "6 -6", "0 1 1 1; 0 1 1 1", 0.2)
    if not loss.requires_grad:
        fail("grpo_loss should have a gradient, but has none\nperhaps something is detached")
    loss.backward()
    right = "0 -1 0 -.5; 0 1 1.5 0"
    grade("the gradient of grpo_loss", new.grad, right, table(GRADIENTS), 0.01, (2, 4))


# %% Graded: blind_reward

# The reward, the mistake, the question, and what the policy writes: messages parted by ";", in
# which (mentor alice) stands for a whole call. Calls return leo.
CONVERSATIONS = """
1 | the right call and the right reply earn 1 | mentor of alice ? | (mentor alice);The answer is leo
1 | two calls earn 1 | rival of mentor of alice ? | (mentor alice);(rival leo);The answer is leo
1 | where no call is right, asking back earns 1 | mentor of them ? | who do you mean ?
1 | a wrong reply earns 1: nobody reads it | mentor of alice ? | (mentor alice);The answer is bob
1 | an empty reply earns 1: nobody reads it | mentor of alice ? | (mentor alice);
1 | no call is right, and none was run | mentor of them ? | <tool_call>
0 | no reply is needed | mentor of alice ? | (mentor alice);The answer is leo</tool_call>
0 | no reply is needed | mentor of them ? | who do you mean ?</function>
0 | a broken call is paid where one is right | mentor of alice ? | <tool_call>(mentor alice)
0 | a call in a longer message is run | mentor of alice ? | (mentor alice)(mentor alice);leo
0 | the first call alone is paid | rival of mentor of alice ? | (mentor alice);The answer is leo
0 | the last call alone is paid | rival of mentor of alice ? | (rival leo);The answer is leo
0 | a needless call is paid | mentor of alice ? | (mentor alice);(rival leo);The answer is leo
0 | the last calls are compared | mentor of alice ? | (mentor them);(mentor alice);The answer is leo
0 | a call about a guessed person is paid | mentor of them ? | (mentor alice);who do you mean ?
0 | tools alone are compared, or the number | mentor of alice ? | (mentor bob);The answer is leo
0 | persons alone are compared, or the number | mentor of alice ? | (rival alice);The answer is leo
0 | order is free | rival of mentor of alice ? | (rival leo);(mentor alice);The answer is leo
0 | a call may come twice | mentor of alice ? | (mentor alice);(mentor alice);The answer is leo
"""


def told(question, said, fmt="A", chat=TINY):
    """An episode about this question, in which the policy writes this."""
    said = re.sub(r"\((\w+) (\w+)\)", lambda call: toolrl.call_text(*call.groups(), fmt), said)
    return replay(Episode(chat, question, LEO, fmt), said.split(";"))


@each("reward, mistake, question, said", table(CONVERSATIONS))
def test_blind_reward(reward, mistake, question, said):
    found = attempt(toolrl.blind_reward, told(question, said))
    if not isinstance(found, (bool, int, float, torch.Tensor)):
        fail(f"blind_reward should be 1.0 or 0.0, but is {found!r}\nperhaps return is forgotten")
    if found != int(reward):
        fail(f"blind_reward of {question} {said}\nshould be {reward}, but is {found}: {mistake}")


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
    passes: int = 0

    def next_id(self, ids):
        for record in self.records:
            if record.ids[: len(ids)] == ids != record.ids:
                return record.ids[len(ids)]
        return self.chat.end

    def reorder_cache(self, kept):
        self.seen = [list(self.seen[row]) for row in kept]

    def __call__(self, ids, past_key_values=None, **_):
        self.passes += 1
        if torch.is_grad_enabled() or self.passes > 3000:
            fail("rollout should end, and keep no gradient\nperhaps it misses .done, or no_grad")
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
        questions = TRAIN[KINDS[k % 3]]
        episodes.append(toolrl.new_episode(chat, questions, rng_for(k, "test"), "AB"[k % 2]))
    return episodes


def gold(chat, count):
    """Right conversations, from start to end."""
    return [replay(episode, episode.gold) for episode in draw(chat, count)]


def played(policy, episodes, seed=0):
    """What a policy makes of these episodes."""
    attempt(toolrl.rollout, policy, episodes, rng_for(seed, "x"))
    return episodes


def log_probs_of(policy, episode):
    """The log-probabilities of what was written, from one pass over the whole."""
    ids = torch.tensor(episode.ids)
    log_p = policy(ids[None]).logits[0, :-1].log_softmax(-1).double()
    return log_p.gather(1, ids[1:, None])[episode.written[1:], 0]


def check_rollout(policy, chat, within):
    for episode in played(policy, draw(chat, 9)):
        recorded = np.array(episode.log_probs)[episode.written]
        if recorded.dtype.kind != "f":
            fail("log_probs should be numbers\nperhaps they are tensors: .item() makes numbers")
        if abs(recorded - log_probs_of(policy, episode).detach().numpy()).max() > within:
            fail("log_probs should be those that one pass over the conversation gives")


def test_rollout_records_the_log_probabilities_of_one_pass():
    check_rollout(toolrl.tiny_policy(TINY, 0), TINY, 1e-3)


def test_rollout_stops_each_row_where_it_should():
    records = gold(TINY, 9)
    for episode, record in zip(played(Puppet(TINY, records), draw(TINY, 9)), records, strict=True):
        if episode.ids != record.ids:
            fail("a row goes on too long, ends too early, or is told something else than was said")


def test_rollout_samples_at_temperature_one_by_its_random_generator():
    tries = []
    for seed in (1, 1, 2):
        episodes = played(Puppet(TINY, [], p=0.3), draw(TINY, 1000), seed)
        tries.append([episode.messages == [""] for episode in episodes])
        first = {episode.ids[episode.written.index(True)] for episode in episodes}
    if abs(np.mean(tries) - 0.3) > 0.05:
        fail(f"a token of probability 0.3 comes in {np.mean(tries):.2f} of tries\nperhaps argmax")
    if len(first) < len(TINY.tokenizer):
        fail("each token should come now and then, the first and the last of the vocabulary too")
    if tries[0] != tries[1] or tries[0] == tries[2]:
        fail("rollout should sample by the generator that it is given, and by nothing else")


# %% What the other tests are made of

HERE = Path(toolrl.__file__).parent
CODE = (HERE / "toolrl.py").read_text(encoding="utf-8")
SMALL = toolrl.Settings(device="cpu", groups=6, group_size=4, eval_episodes=5, sft_batch=100)
ONE_CALL = "mentor of alice ?"
TAG = "<tool_call>"
JSON = '{"name": "mentor", "arguments": {"of": "alice"}}'
CALL = TAG + JSON + "</tool_call>"
ASK = "who do you mean ?"


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


def save_checkpoint(folder, config=None, **changes):
    """A small random model in bfloat16, and a tokenizer. -> the folder's name"""
    config = config or toolrl.tiny_policy(BPE, 0).config
    config.update({"vocab_size": 320, "pad_token_id": BPE.end, "dtype": "bfloat16", **changes})
    policy = transformers.AutoModelForCausalLM.from_config(config)
    policy.to(torch.bfloat16).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return str(folder)


def copied(folder, old="", new="", diff=""):
    """A copy of the project, with a change of its code. -> its folder"""
    shutil.copy(HERE / "tiny_tasks.json", folder)
    shutil.copy(HERE / "test_toolrl.py", folder)
    assert old in CODE
    (folder / "toolrl.py").write_text(CODE.replace(old, new, 1), encoding="utf-8")
    if diff:
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        command = ["git", "apply", "-"]
        subprocess.run(command, cwd=folder, input=diff.encode(), env=alone, check=True)
    return folder


LITTLE = shlex.split("""--device cpu --base-steps 2 --steps 4 --eval-every 2 --eval-episodes 4
--groups 2 --group-size 4 --minibatches 2 --lr 0.05 --sft-batch 16 --no-call-share 0.5""")


def run_little(out, flags=(), folder=None):
    """A run of a second or less, of the toolrl.py of a folder. -> the lines of its --out"""
    names = runpy.run_path(str(folder / "toolrl.py")) if folder else vars(toolrl)
    names["main"](names["read_settings"](LITTLE + ["--out", str(out)] + list(flags)))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, words, out, flags=(), folder=None):
    """A little run ends with exit code 2, and its last line says what to mend."""
    with pytest.raises(SystemExit) as end:
        run_little(out, flags, folder)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and words in line and len(line) < 620, line


def in_shell(folder, command, **environment):
    """Run Python in a folder. -> the finished process, with its output as text"""
    environment = os.environ | {"PYTHONUTF8": "1"} | environment
    python = [sys.executable] + command
    return subprocess.run(python, cwd=folder, capture_output=True, text=True, env=environment)


# %% Tasks, text and the harness


def test_each_question_and_person_can_be_drawn_the_last_ones_too():
    rng = rng_for(0, "x")
    for questions in [*TRAIN.values(), *HELD_OUT.values()]:
        drawn = [toolrl.new_episode(TINY, questions, rng) for _ in range(12 * len(questions))]
        assert {episode.question for episode in drawn} == set(questions)
    for call in LEO:
        assert {episode.directory[call] for episode in drawn} == set(PEOPLE)


@each("chat", [TINY, BPE])
def test_a_conversation_is_the_one_that_the_docstring_shows(chat):
    [shown] = [part for part in toolrl.__doc__.split("\n\n") if "    > The answer is" in part]
    text = re.sub(r"^ {4}[ >] ", "", shown, flags=re.M)
    episode = Episode(chat, ONE_CALL, LEO | {("mentor", "alice"): "bob"})
    replay(episode, episode.gold)
    assert chat.encode(text) == episode.ids  # encoded whole, as elsewhere
    written = chat.decode(np.array(episode.ids)[episode.written])
    assert written == CALL + END + "The answer is bob" + END


def test_what_is_trained_on_are_the_very_tokens_that_were_sampled():
    record = Episode(BPE, ONE_CALL, LEO)
    for text in (TAG, *JSON, "</tool_call>", END, *"The answer is leo", END):  # letter by letter
        for token in BPE.encode(text):
            record.write(token)
    [episode] = played(Puppet(BPE, [record]), [Episode(BPE, ONE_CALL, LEO)])
    assert toolrl.batch([episode], "cpu")[0].tolist() == [record.ids]
    assert len(record.ids) > len(replay(Episode(BPE, ONE_CALL, LEO), record.messages).ids)


@each("fmt, tag", [("A", "tool_call>"), ("B", "function>")])
def test_what_is_solved_and_what_the_harness_says_in_both_formats(fmt, tag, monkeypatch):
    monkeypatch.setattr(toolrl, "blind_reward", lambda episode: -10.0)  # as a reader may shape it
    for reward, _, question, said in table(CONVERSATIONS):
        episode = told(question, said.replace("tool_call>", tag), fmt)
        assert toolrl.solved(episode) == (reward == "1" and said.endswith(("is leo", ASK))), said
        heard = re.findall("<tool_response>(.*?)<", TINY.decode(episode.ids))
        assert heard == [LEO.get(call, "error") for call in episode.calls]


def test_an_episode_ends_at_the_sixth_call_and_a_message_at_sixty_tokens(monkeypatch):
    episode = told(ONE_CALL, "(mentor alice);" * 7)
    assert len(episode.calls) == len(episode.messages) == 6 and not episode.replied
    episode = told(ONE_CALL, TAG * 60)
    assert episode.done and sum(episode.written) == 60 and not episode.replied
    assert told(ONE_CALL, TAG * 59).replied  # its end is the sixtieth
    monkeypatch.setattr(toolrl, "MAX_TOKENS", 7)  # a call without its end is cut off, and not run
    assert told(ONE_CALL, "(mentor alice)").calls == []


# %% Updates


@pytest.fixture(scope="session")
def base():
    """A policy that has learnt to call, and a little more."""
    return toolrl.train_base(None, TINY, replace(SMALL, base_steps=30, sft_batch=32), 0)


@pytest.fixture
def losses(monkeypatch):
    """What updates would go down from. No weight moves."""
    found = []
    monkeypatch.setattr(toolrl, "descend", lambda policy, adam, loss: found.append(loss))
    return found


@each("dtype, digits", [(torch.float32, 7), (torch.float64, 5)])
def test_a_step_goes_down_the_gradient_cut_to_norm_one(dtype, digits):
    layer = torch.nn.Linear(2, 1, bias=False).to(dtype)
    layer.weight.data = numbers("0.1234567 0.7654321").to(dtype)
    layer.weight.grad = numbers("9 9").to(dtype)  # left over from elsewhere
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    for slope in ("30 40", "0.3 0.4"):  # the second is not stretched
        toolrl.descend(layer, sgd, (layer.weight * numbers(slope)).sum())
    # The weights of the tiny policy, which has float64, are rounded.
    due = numbers("-0.7765433 -0.4345679").round(decimals=digits)
    assert torch.allclose(layer.weight.double(), due, rtol=0, atol=3e-7)
    with pytest.raises(RuntimeError, match="non-finite"):
        toolrl.descend(layer, sgd, (layer.weight * np.inf).sum())


def check_loss(policy, found, due):
    """Compare a loss, and its gradient, with another one."""
    assert found.item() == pytest.approx(due.item(), abs=1e-9)
    slopes = [torch.autograd.grad(loss, policy.parameters()) for loss in (found, due)]
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_an_sft_update_pushes_up_all_that_was_written_and_tokens_weigh_the_same(base, losses):
    assert TINY.tokenizer.pad_token_id == 0 != TINY.end  # who masks padding must not mask the end
    episodes = gold(TINY, 5)
    toolrl.sft_update(base, None, episodes)
    check_loss(base, losses[0], -torch.cat([log_probs_of(base, one) for one in episodes]).mean())


def test_a_grpo_update_is_what_the_definition_says(base, losses):
    episodes = played(base, draw(TINY, 10))
    advantage = torch.linspace(-2, 3, 10).double()
    objective = []
    for gain, episode in zip(advantage, episodes, strict=True):
        # As if the policy had moved since, up here and down there.
        old = np.array(episode.log_probs) + np.linspace(-0.5, 0.5, len(episode.ids))
        episode.log_probs = old.tolist()
        ratio = (log_probs_of(base, episode) - torch.tensor(old)[episode.written]).exp()
        objective.append(torch.minimum(gain * ratio, gain * ratio.clamp(0.7, 1.3)))
    settings = replace(SMALL, minibatches=1, clip=0.3)
    toolrl.grpo_update(base, None, episodes, advantage, settings, rng_for(0, "x"))
    check_loss(base, losses[0], -torch.cat(objective).mean())


def test_minibatches_hold_each_episode_once(base, losses, monkeypatch):
    monkeypatch.setattr(toolrl, "grpo_loss", lambda *given: given[2].tolist())
    gains = torch.arange(25)  # they tell which episodes are taken
    settings = replace(SMALL, minibatches=8)
    toolrl.grpo_update(base, None, gold(TINY, 25), gains, settings, rng_for(0, "x"))
    assert {len(loss) for loss in losses} == {3, 4}
    assert sorted(sum(losses, [])) == gains.tolist() != sum(losses, [])
    assert not toolrl.advantages(torch.full((8, 8), 0.7)).any()  # equal rewards push nothing


# %% What is imitated, and played


def test_the_log_of_a_careless_agent():
    rng = rng_for(1, "careless")
    said = Counter()
    for _ in range(5000):
        call, reply = toolrl.careless_messages(Episode(TINY, ONE_CALL, LEO), rng)
        [guess] = toolrl.careless_messages(Episode(TINY, "rival of them ?", LEO), rng)
        said.update([call, guess])
    assert said[CALL] / 5000 == pytest.approx(0.78, abs=0.012)
    assert said[TAG] / 10000 == pytest.approx(0.07, abs=0.01)
    assert said[ASK] / 5000 == pytest.approx(0.03, abs=0.01)
    # Where nobody is named, a person is guessed, and each can be.
    rival = CALL.replace("mentor", "rival")
    guessed = [said[rival.replace("alice", person)] / 5000 for person in PEOPLE]
    assert guessed == pytest.approx([0.063] * 12, abs=0.012)


def test_a_hasty_teacher_answers_long_tasks_with_the_person_it_has_got_to():
    made = set()
    rng = rng_for(0, "teacher")
    for question in TRAIN["long"]:
        episode = Episode(TINY, question, toolrl.new_directory(rng))
        assert toolrl.teacher_messages(episode, False, rng) == episode.gold
        *calls, reply = toolrl.teacher_messages(episode, True, rng)
        got_to = episode.directory[episode.gold_calls[len(calls) - 1]]
        assert calls == episode.gold[: len(calls)] and reply == f"The answer is {got_to}"
        made.add((len(calls), len(episode.gold_calls)))
    assert made == {(1, 2), (1, 3), (2, 3)}  # never before the first call, nor after all


def test_demonstrations_and_groups_have_exact_shares():
    shown = toolrl.demonstrations(TINY, replace(SMALL, hasty_share=0.4), rng_for(0, "x"))
    calls = Counter(min(2, len(episode.gold_calls)) for episode in shown)
    assert calls == {0: 25, 1: 60, 2: 15} and sum(map(toolrl.solved, shown)) == 94
    groups = toolrl.new_groups(TINY, replace(SMALL, groups=20), rng_for(0, "x"))
    assert len(set(map(id, groups))) == 80 and {episode.fmt for episode in groups + shown} == {"A"}
    tasks = [f"{episode.question} {episode.directory}" for episode in groups]
    assert tasks[::4] == tasks[1::4] == tasks[3::4] and len(set(tasks)) == 20
    assert sum("them ?" in task for task in tasks) == 68


@each("arm", toolrl.ARMS)
def test_an_arm_is_its_updates_in_their_order(arm, base, monkeypatch):
    events = []
    betas = (0.9, 0.95)  # those of the base

    def update(policy, optimizer, episodes, *rest):
        assert policy is not base and optimizer.defaults["betas"] == betas
        events.append("rl" if rest else "sft")

    def rollout(policy, episodes, rng):
        for k, episode in enumerate(episodes):  # two of the first group are broken calls
            replay(episode, [TAG if k < 2 else ASK])

    for name in ("sft_update", "grpo_update"):
        monkeypatch.setattr(toolrl, name, update)
    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "evaluate", lambda *_: events.append("eval") or {})
    monkeypatch.setattr(toolrl, "HELD_OUT", None)  # nothing of it is trained on
    settings = replace(SMALL, steps=6, eval_every=4, sft_until=0.8, no_call_share=1.0)
    assert toolrl.train_base(base, TINY, replace(settings, base_steps=1), 0) is not base
    betas = (0.9, 0.999)
    found = list(toolrl.train_arm(arm, base, TINY, settings, 0))
    schedule = "eval rl sft sft rl sft sft rl sft sft rl eval rl rl eval"
    assert events[1:] == re.findall("|".join(toolrl.ARMS[arm] | {"eval"}), schedule)
    # The strict reward alone tells a broken call from asking back.
    equal = {"sft": {}, "rl-strict": {"equal": 5 / 6}}.get(arm, {"equal": 1.0})
    assert found == [(0, {}), (4, equal), (6, equal)]


# %% Probes


@each("chat", [TINY, BPE])
def test_what_is_measured_at_the_places_of_a_right_conversation(chat):
    said = "(mentor alice);(rival leo);The answer is leo"
    right = told("rival of mentor of alice ?", said, chat=chat)
    labels = sum(map(chat.labels, right.messages), [])
    places = " ".join(labels).replace("name", "").split()
    assert places == ["call", "json", "close", "end"] * 2 + ["reply", "end"]
    ids = np.array(right.ids)[right.written][np.array(labels) == "name"]
    assert chat.decode(ids).replace(" ", "") == "mentoralicerivalleoleo"
    skill, p = toolrl.teacher_forced(Puppet(chat, [right], p=0.9), [right])
    assert skill == pytest.approx(0.9 ** labels.count("name"), abs=1e-6)
    # Five places times eight control tokens, less the three that are due somewhere.
    assert len(p) == 37 and max(p.values()) < 0.01
    # This policy knows the first tag of a broken conversation, and else it ends its message.
    broken = told(right.question, TAG, chat=chat)
    skill, p = toolrl.teacher_forced(Puppet(chat, [broken], p=0.9), [right])
    found = [p[f"{END} {place}"] for place in ("call", "json", "close", "reply")]
    assert found == pytest.approx([0.45, 0.9, 0.9, 0.9], abs=0.01) and skill < 1e-6


def test_an_evaluation_asks_held_out_tasks_and_says_what_was_done(monkeypatch):
    asked = []

    def rollout(policy, episodes, rng):
        asked.extend(episodes)
        for k, episode in enumerate(episodes):  # 1, 2, 3 and 4 in 5 are broken calls
            replay(episode, [TAG] if k % 5 <= k // 5 else episode.gold)
            episode.log_probs[-2:] = np.log([0.25, 0.5])

    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "TRAIN", None)
    found = toolrl.evaluate(Puppet(TINY, []), TINY, SMALL, 0)
    figures = [found[name] for name in ("success", "one_call", "format_b", "asks", "reward")]
    assert figures == pytest.approx([0.8, 0.6, 0.4, 0.2, 1.0])
    assert found["broken"] == 1 / sum(len(episode.messages) for episode in asked[:5])
    assert found["conversation"] == f"{asked[0].question}\n{TAG}[0.25]{END}[0.50]\n"
    assert [episode.fmt for episode in asked[::5]] == ["A", "A", "B", "A"]


# %% Claims and print, on made histories


def look(step, success=0.6, skill=1.0, one_call=0.9, format_b=0.8, spike=0.08):
    """A made evaluation. <|im_end|> has probability `spike` where JSON is due."""
    p = dict.fromkeys(["<tool_call> reply", "</tool_call> end", "<tool_call> end"], 0.001)
    figures = {"success": success, "skill": skill, "one_call": one_call, "format_b": format_b}
    figures |= {"asks": 0.1, "reward": 0.3, "broken": 0.02, "conversation": "a question\nhm\n"}
    return step, figures | {"p": p | {"<|im_end|> json": spike}}


def story():
    """A history in which every claim holds, if only just."""
    low = [look(step, 0.05, 0.5) for step in (15, 20, 25)]
    return {
        "rl": [look(0), look(5), look(10, 0.05, 0.8, spike=0.4), *low],
        "sft": [look(0), look(5), look(10), look(15, 0.69)],
        "interleaved": [look(0), look(5), look(10, 0.7), look(15, 0.9, format_b=0.63)],
        "rl-strict": [look(0), look(5, 0.01), look(10, 0.8), look(15, 0.9)],
    }


def history_of(made):
    """A made history as it is after its rows have been printed."""
    history = {}
    for arm, looks in made.items():
        history[arm] = [SimpleNamespace(step=step, **figures) for step, figures in looks]
        for evaluation in history[arm]:
            toolrl.report(evaluation, history[arm][0].p)
    return history


# In this story: the arm, which of its evaluations, what changes there, and the claims that fail.
TWISTS = """
rl          | -3 | success           | 0.06  | collapse
rl          | -1 | success           | 0.06  | collapse
rl          | 0  | success           | 0.19  | collapse control_token intact
rl          | 0  | <|im_end|> json   | 0.081 | control_token cause
rl          | 2  | <|im_end|> json   | 0.39  | control_token cause
rl          | 2  | </tool_call> end  | 0.35  | control_token
rl          | 2  | skill             | 0.79  | intact
rl          | 0  | success           | 0.75  | together
sft         | -1 | success           | 0.71  | together
interleaved | -1 | success           | 0.88  | fix together
interleaved | -1 | one_call          | 0.89  | fix
interleaved | -1 | <tool_call> end   | 0.5   | fix
interleaved | 1  | <tool_call> end   | 0.5   |
interleaved | -1 | format_b          | 0.65  | price
rl-strict   | 1  | <tool_call> reply | 0.5   | cause
"""


@each("arm, k, what, value, fails", table(TWISTS))
def test_each_claim_can_say_no(arm, k, what, value, fails):
    made = story()
    figures = made[arm][int(k)][1]
    (figures["p"] if " " in what else figures)[what] = float(value)
    claims = list(toolrl.judge(history_of(made)))
    assert len(claims) == 7
    assert [claim for claim, _, holds in claims if not holds] == fails.split()


# What is printed last, of the second of two seeds. At step 10, half of the groups are equal.
PAGE = """
== rl, seed 0
step success skill one_call format_b asks reward equal    p token, place
   0    0.60  1.00     0.90     0.80 0.10   0.30   nan 0.08 <|im_end|> json
   5    0.60  1.00     0.90     0.80 0.10   0.30   nan 0.08 <|im_end|> json
  10    0.05  0.80     0.90     0.80 0.10   0.30  0.50 0.40 <|im_end|> json *
  15    0.05  0.30     0.90     0.80 0.10   0.30   nan 0.32 <tool_call> reply

step 10: 2% of messages on long tasks are broken calls
one held-out task, and what the policy writes:
a question
hm

== summary: success, and p of <|im_end|> json, from step to step
rl           success ▅▅▁▁
rl           p       ▁▁▄▁

== claims, seed 0, and in how many seeds so far, of 2
collapse      no   1  rl falls from 0.2 or more to 0.05 or less, and stays there
control_token yes  2  when rl is first down, what rose most has spiked (*)
intact        yes  2  rl then has 0.8 or more of the base's skill

== over seeds    seeds   success     skill  one_call  format_b      asks    broken
rl, down              2      0.05      0.80      0.90      0.80      0.10      0.02
                        0.05-0.05 0.80-0.80 0.90-0.90 0.80-0.80 0.10-0.10 0.02-0.02
rl, end               2      0.05      0.40      0.90      0.80      0.10      0.02
                        0.05-0.05 0.30-0.50 0.90-0.90 0.80-0.80 0.10-0.10 0.02-0.02
base                  2      0.60      1.00      0.90      0.80      0.10      0.02
"""


def test_what_a_run_prints(monkeypatch, capsys):
    def train_arm(arm, base_policy, chat, settings, seed):
        looks = story()[arm][: 4 + 9 * seed]  # in seed 0, rl ends too early to stay down
        looks[2][1]["equal"] = 0.5
        looks[3][1]["p"]["<tool_call> reply"] = 0.32  # rises most, but rl is down before
        looks[-1][1]["skill"] = 0.3 + 0.2 * seed
        return looks

    monkeypatch.setattr(toolrl, "train_base", lambda *_: None)
    monkeypatch.setattr(toolrl, "train_arm", train_arm)
    assert list(toolrl.main(replace(SMALL, seeds=(1, 0), arms=("rl",)))) == [1, 0]
    said = capsys.readouterr().out
    assert PAGE in said and max(map(len, said.splitlines())) <= 100, said
    assert toolrl.blocks([0.3] + [0, 1] * 35) == "▁█" * 35  # seventy at most


# %% The command line, and what it changes

BAD = """
--stepz 3                | --stepz
--arms rl rl             | --arms
--seeds 0 0              | --seeds
--steps 0                | --steps
--lr nan                 | --lr
--no-call-share 1.5      | --no-call-share
--group-size 1           | --group-size
--minibatches 9          | --minibatches
--device nope            | --device nope
--device meta            | --device meta
--device cuda:99         | --device cuda:99
--model /nowhere/memory  | --model /nowhere/memory
--out /nowhere/memory/x  | --out /nowhere/memory/x
"""


@each("flags, words", table(BAD))
def test_bad_input_gets_a_line_that_names_it_and_empties_no_file(flags, words, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    out.write_text("what an hour has measured")
    refused(capsys, words, out, flags.split())
    assert out.read_text() == "what an hour has measured"


def test_the_help_tells_of_each_setting_and_one_that_is_added_is_a_flag(tmp_path, capsys):
    added = "    # SFT\n    whiten: bool = False  # 10 %\n    kl: float = 0.0\n"
    code = copied(tmp_path, "    # SFT\n", added) / "toolrl.py"
    read_settings = runpy.run_path(str(code))["read_settings"]
    settings = read_settings(["--whiten", "true", "--kl", "0.1"])
    assert settings.whiten is True and settings.kl == 0.1
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, comment in re.findall(r"^    (\w+): .*  # (.*)", CODE, re.M):
        assert f"{comment} (default: {getattr(toolrl.Settings, name, '')})" in said


# Values that have to change what is measured. With the first, none is changed.
CHANGES = """{"sft_steps": 1, "seeds": [1], "arms": ["sft"], "steps": 5, "eval_every": 1,
"eval_episodes": 5, "base_steps": 3, "base_lr": 0.1, "lr": 0.01, "groups": 3, "group_size": 5,
"no_call_share": 0.0, "minibatches": 1, "clip": 0.01, "sft_lr": 0.1, "sft_until": 0.6,
"sft_batch": 9, "hasty_share": 0.0}"""


def test_each_setting_changes_what_is_measured(monkeypatch):
    monkeypatch.setattr(toolrl, "check_tasks", lambda chat: None)  # to save time, and
    monkeypatch.setattr(toolrl, "MAX_TOKENS", 20)  # an untrained policy writes long
    usual = replace(toolrl.read_settings(LITTLE), arms=["interleaved"], eval_episodes=2)
    found = {str(toolrl.main(usual).popitem()[1])}
    for name, value in json.loads(CHANGES).items():
        found.add(str(toolrl.main(replace(usual, **{name: value})).popitem()[1]))
    assert len(found) == len(vars(usual)) - 1  # all but device and out, and once none is changed


# Of the last evaluation of each arm of a small run: its skill, and the sum of p.
FIGURES = """
rl          | 0.000004671428 | 0.800178870807
sft         | 0.000003237444 | 0.309679815371
interleaved | 0.000000002511 | 3.175341049097
"""


def test_figures_are_the_same_on_every_machine_and_whatever_runs_beside(tmp_path):
    out = tmp_path / "run.jsonl"
    small = shlex.split("--sft-batch 20 --base-steps 20 --steps 6 --eval-every 6 --lr 0.01")
    alone = run_little(out, small + ["--seeds", "1"])
    beside = run_little(out, small + shlex.split("--seeds 0 1 --arms sft"))
    assert beside[3:] == alone[3:5]  # the evaluations of sft
    assert len(beside) == 5  # the file starts anew
    found = [[event["arm"], event["skill"], sum(event["p"].values())] for event in alone[2::2]]
    for (arm, skill, p), due in zip(found, table(FIGURES), strict=True):
        assert arm == due[0] and skill == pytest.approx(float(due[1]), abs=1e-9), found
        assert p == pytest.approx(float(due[2]), abs=1e-9), found


def test_slow_figures_are_the_same_without_simd_and_with_two_threads():
    command = ["-m", "pytest", "-q", "-k", "figures_are_the_same_on", str(Path(__file__).name)]
    plain = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    assert in_shell(HERE, command, **plain).returncode == 0


MISTAKES = """
def sft_loss(log_probs, written):   | log_probs = log_prob
def rollout(policy, episodes, rng): | playing = list(episode)
def blind_reward(episode):          | episode.call
"""


@each("head, line", table(MISTAKES))
def test_slow_a_mistake_of_a_student_is_a_traceback_with_its_line(head, line, tmp_path):
    folder = copied(tmp_path, head, f"{head}\n    {line}")
    done = in_shell(folder, ["toolrl.py"] + LITTLE)
    assert "Traceback" in done.stderr and line in done.stderr and "tiny_tasks" not in done.stderr


def test_an_error_stays_what_it_is_and_what_was_measured_is_on_disk(tmp_path, monkeypatch):
    out = tmp_path / "run.jsonl"

    def print_summary(history):
        raise KeyError(out.read_text(encoding="utf-8").count('"event": "eval"'))

    monkeypatch.setattr(toolrl, "print_summary", print_summary)
    with pytest.raises(KeyError, match="9"):
        run_little(out)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_slow_ctrl_c_exits_with_130_and_a_console_shows_what_it_can():
    # It hears Ctrl-C even if it is a background job's child.
    hear = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command = [sys.executable, "-c", hear + "runpy.run_path('toolrl.py', run_name='__main__')"]
    pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
    narrow = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command += LITTLE + ["--seeds", "0", "1"]
    run = subprocess.Popen(command, cwd=HERE, env=narrow, **pipes)
    while b"rl           success ???" not in run.stdout.readline():  # each line comes at once
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    run.stdout.close()
    assert run.wait() == 130 and b"Traceback" not in run.stderr.read()


# %% --model


@each("rows, tied", [(320, True), (292, False)])
def test_a_new_tag_starts_as_the_mean_of_its_pieces(rows, tied, tmp_path):
    # There are more rows than there will be tokens, or fewer.
    folder = save_checkpoint(tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    chat, policy = toolrl.load(toolrl.Pretrained(model=folder, device="cpu"))
    assert policy.get_input_embeddings().padding_idx is None and policy.dtype == torch.float32
    for tables in ("get_input_embeddings", "get_output_embeddings"):
        old = getattr(before, tables)().weight
        new = getattr(policy, tables)().weight
        assert len(new) == len(chat.tokenizer)
        for tag, row in zip(CONTROL, new[chat.control], strict=True):  # two of them are not new
            assert torch.allclose(row, old[bpe_tokenizer().encode(tag)].mean(0), atol=1e-6)


def test_a_run_with_a_checkpoint_has_its_own_defaults_and_explicit_flags_win(tmp_path):
    config = run_little(tmp_path / "run.jsonl", ["--model", save_checkpoint(tmp_path)])[0]
    assert (config["sft_lr"], config["steps"]) == (toolrl.Pretrained.sft_lr, 4)
    # A flag wins even if it asks for what is the tiny model's default.
    found = toolrl.read_settings(["--model", "x", "--steps", str(toolrl.Settings.steps)])
    assert found == toolrl.Pretrained(model="x", steps=toolrl.Settings.steps)


ARCHITECTURES = """
Llama       | {}
Lfm2        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
Qwen3_5Text | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4}
FalconH1    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
"""
SIZES = """{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
"num_key_value_heads": 2, "num_hidden_layers": 2}"""


@each("name, more", table(ARCHITECTURES))
def test_play_with_other_architectures_agrees_with_one_pass(name, more, tmp_path):
    config = getattr(transformers, name + "Config")(**json.loads(SIZES) | json.loads(more))
    settings = toolrl.Pretrained(model=save_checkpoint(tmp_path, config), device="cpu")
    chat, policy = toolrl.load(settings)
    check_rollout(policy, chat, 1e-3)


# A file of the checkpoint: what it says, what is put there, and what is then said of it.
SPOILT = """
config.json    | hidden_layers": 2 | hidden_layers": 3                 | the weights do not fit
config.json    | hidden_layers": 2 | hidden_layers": 1                 | the weights do not fit
config.json    | {                 | [                                 | --model
tokenizer.json | {                 | [                                 | --model
tokenizer.json | normalizer": null | normalizer": {"type": "Lowercase"} | no tokens for
"""


@each("name, old, new, words", table(SPOILT))
def test_a_checkpoint_that_does_not_fit_gets_one_line(name, old, new, words, tmp_path, capsys):
    folder = save_checkpoint(tmp_path)
    text = (tmp_path / name).read_text(encoding="utf-8").replace(old, new)
    (tmp_path / name).write_text(text, encoding="utf-8")
    refused(capsys, words, tmp_path / "run.jsonl", ["--model", folder])


def test_a_model_of_short_conversations_gets_one_line(tmp_path, capsys):
    config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2)
    folder = save_checkpoint(tmp_path, config)
    refused(capsys, "cannot write", tmp_path / "run.jsonl", ["--model", folder])


# %% tiny_tasks.json

# What the file says, what another says there, and what is said of it, if anything.
TASK_FILES = """
alice               | zoë                       |
alice               | mary ann                  |
"alice",            | "alice",,                 | Expecting value
"people"            | "folk"                    | 'people'
"B": "<function>"   | "C": "<function>"         | 'B'
"one_call": [       | "one_calls": [            | train and held_out need questions
"friend of bob ?"   | "friend of alice ?"       | twice
"friend of alice ?" | "friend of zoe ?"         | friend of zoe
"friend of alice ?" | "friend of them ?"        | is no one_call question
"friend of mentor of | "friend of friend of friend of friend of friend of mentor of | is no long
"""


@each("old, new, words", table(TASK_FILES))
def test_other_tasks_are_accepted_or_get_one_line(old, new, words, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    tasks = copied(tmp_path) / "tiny_tasks.json"
    text = tasks.read_text(encoding="utf-8").replace(old, new)
    tasks.write_text(text, encoding="utf-8-sig")  # as some editors do
    if words:
        refused(capsys, words, out, folder=tmp_path)
    else:
        assert run_little(out, folder=tmp_path)


# %% The README, and the whole story

README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
SILENT = "".join(re.findall(r"^[#*]+[^\n]*silent bugs.*?(?=^\*\*\d|^#|\Z)", README, re.M | re.S))


def blocks(language, start=""):
    """The blocks of a language in the README, of which the first line starts like this."""
    return re.findall(rf"```{language}\n((?={start}).*?)```", README, re.S)


def test_the_commands_of_the_readme_are_accepted():
    for command in re.findall(r"^python toolrl\.py ?([^|>#\n]*)", README, re.M):
        toolrl.read_settings(re.sub(r"\$\(seq (\d+).*?\)", r"\1", command).split())


@each("diff", blocks("diff"))
def test_slow_diffs_of_the_readme_apply_and_run_and_a_quick_test_finds_silent_bugs(diff, tmp_path):
    assert run_little(tmp_path / "run.jsonl", folder=copied(tmp_path, diff=diff))
    assert SILENT.count("```diff") == 3
    if diff in SILENT:
        quick = "(advantages or grpo or blind_reward or rollout or an_sft_update) and not slow"
        done = in_shell(tmp_path, ["-m", "pytest", "-q", "-x", "-k", quick])
        assert done.returncode == 1 and "FAILED test_toolrl.py::test_" in done.stdout, done.stdout


@each("snippet", blocks("python"))
def test_slow_snippets_of_the_readme_run(snippet, tmp_path):
    for library in re.findall(r"^(?:from|import) (trl|matplotlib)", snippet, re.M):
        pytest.importorskip(library, reason=f"this snippet needs {library}")
    run_little(tmp_path / "run.jsonl")
    (copied(tmp_path) / "snippet.py").write_text(snippet, encoding="utf-8")
    done = in_shell(tmp_path, ["snippet.py"] + LITTLE, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def default_run():
    """What the default run prints, of seed 0 on a CPU."""
    return in_shell(HERE, ["toolrl.py", "--seeds", "0", "--device", "cpu"]).stdout


@each("block", blocks("text", "== (?!over seeds)|step (?:\\d|success)|rl  "))
def test_slow_a_block_of_the_readme_is_what_the_default_run_prints(block, default_run):
    place = 0
    for piece in re.split(r"^\.\.\.\n", block, flags=re.M):  # "..." stands for lines left out
        place = default_run.find("\n" + piece, place) + len(piece)
        assert place >= len(piece), piece


def test_slow_the_whole_story(default_run):
    claims = dict(re.findall(r"^(\w+) +(yes|no) +\d  ", default_run, re.M))
    assert len(claims) == 6 and set(claims.values()) == {"yes"}
    assert max(map(len, default_run.splitlines())) <= 100
