"""Tests of toolrl. The first part grades four functions that a student writes again.

    python -m pytest -q -x -k grpo_loss   one of advantages, grpo_loss, blind_reward and rollout
    python -m pytest -q -k "not slow"     all that is quick
    python -m pytest -q                   with the README's commands and blocks, and whole runs

A failure of the first part tells what should have come back, what did, and perhaps the mistake.
"""

import functools
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
from toolrl import CONTROL, END, HELD_OUT, KINDS, TRAIN, Episode, new_episode, replay, rng_for

TINY = toolrl.Chat(toolrl.tiny_tokenizer())
fail = functools.partial(pytest.fail, pytrace=False)
LEO = dict.fromkeys(toolrl.new_directory(rng_for(0, "any")), "leo")  # all calls return leo


def table(text):
    """The rows of a table in a text, whose cells are parted by "|"."""
    return [re.split(r" +\| *", line.strip()) for line in text.splitlines() if "|" in line]


def each(names, cases=None):
    """Number cases from 1, or rows of a table that begins with names, and run a test with each."""
    if cases is None:
        names, *cases = table(names)
    return pytest.mark.parametrize(names, cases, ids=iter(range(1, 99)))


def numbers(text):
    """A tensor of the numbers in a text, whose rows are parted by ";"."""
    return torch.tensor([list(map(float, row.split())) for row in text.split(";")]).double()


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
    fail(why)


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
the mean of the group is not subtracted                     | 2 0 0 0
brackets are forgotten: (rewards - mean) / spread           | 0.5 -0.5 -0.5 -0.5
the sign is wrong: what did better than its group is above  | -1.5 0.5 0.5 0.5
they are not divided by the spread                          | 0.75 -0.25 -0.25 -0.25
they are divided by the variance, not by its root           | 3 -1 -1 -1
the spread divides by N, not by N - 1 as torch.std does     | 1.732 -0.577 -0.577 -0.577
the mean of the others is subtracted, not of the group      | 2 -0.667 -0.667 -0.667
a group is a row, and these are mean and spread of columns  | nan nan nan nan

1 0 0 0; 1 1 1 0                | 1.5 -0.5 -0.5 -0.5; 0.5 0.5 0.5 -1.5
mean and spread are the batch's | 0.935 -0.935 -0.935 -0.935; 0.935 0.935 0.935 -0.935
the mean is the batch's         | 1 -1 -1 -1; 1 1 1 -1
the spread is the batch's       | 1.403 -0.468 -0.468 -0.468; 0.468 0.468 0.468 -1.403

1 1 1 1; 0 0 0 0; .7 .7 .7 .7; 20 40 60 40 | 0 0 0 0; 0 0 0 0; 0 0 0 0; -1.22 0 1.22 0
equal rewards divide 0 by 0 | nan nan nan nan; nan nan nan nan; nan nan nan nan; -1.22 0 1.22 0
equal rewards give 1, not 0 | 1 1 1 1; 1 1 1 1; 1 1 1 1; -1.22 0 1.22 0
the spread is the mean of all groups' | 0 0 0 0; 0 0 0 0; 0 0 0 0; -4.9 0 4.9 0

0 0; 1 0; 1 1 | 0 0; 0.707 -0.707; 0 0
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
the mask is shifted by a token                                                    | -3.2
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
reward | mistake | question | said
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


@each(CONVERSATIONS)
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


def draw(chat, n):
    return [new_episode(chat, TRAIN[KINDS[k % 3]], rng_for(k, "x"), "AB"[k % 2]) for k in range(n)]


def kind(episode):  # of format A, "A 0" is a no-call task and "A 2" a long one
    return f"{episode.fmt} {min(2, len(episode.gold_calls))}"


def played(policy, episodes, seed=0):
    attempt(toolrl.rollout, policy, episodes, rng_for(seed, "x"))
    return episodes


def log_probs_of(policy, episode):
    """The log-probabilities of what was written, from one pass over the whole."""
    ids = torch.tensor(episode.ids)
    log_p = policy(ids[None]).logits[0, :-1].log_softmax(-1).double()
    return log_p.gather(1, ids[1:, None])[episode.written[1:], 0]


def check_rollout(policy, chat):
    for episode in played(policy, draw(chat, 9)):
        recorded = np.array(episode.log_probs)[episode.written]
        if recorded.dtype.kind != "f":
            fail("log_probs should be numbers\nperhaps they are tensors: .item() makes numbers")
        if abs(recorded - log_probs_of(policy, episode).detach().numpy()).max() > 1e-3:
            fail("log_probs should be those that one pass over the conversation gives")


def test_rollout_records_what_one_pass_gives_and_stops_each_row_where_it_should():
    check_rollout(toolrl.tiny_policy(TINY, 0), TINY)
    records = [replay(episode, episode.gold) for episode in draw(TINY, 9)]
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
CALL = toolrl.call_text("mentor", "alice", "A")
ASK = "who do you mean ?"


def bpe_tokenizer(tags=()):
    """A tokenizer like those of real models: it knows no tag, and pads with <|im_end|>."""
    text = '{"name": "", "arguments": {"of": ""}} user system tool leo leo leo'  # " leo" is a token
    core = ByteLevelBPETokenizer()
    core.train_from_iterator([text], 290, 0, special_tokens=["<|im_start|>", END])
    core = Tokenizer.from_str(core.to_str())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=END)
    tokenizer.add_tokens(tags, special_tokens=True)
    return tokenizer


BPE = toolrl.Chat(bpe_tokenizer(CONTROL[::-1]))  # ids in another order than the tags
LITTLE = shlex.split("""--device cpu --base-steps 2 --steps 4 --eval-every 2 --eval-episodes 4
--groups 2 --group-size 4 --minibatches 2 --lr 0.05 --sft-batch 16 --no-call-share 0.5""")


def save_checkpoint(folder, config=None, **changes):
    """A small random model in bfloat16, and a tokenizer. -> the folder's name"""
    config = config or toolrl.tiny_policy(BPE, 0).config
    config.update({"vocab_size": 320, "pad_token_id": BPE.end, "dtype": "bfloat16", **changes})
    policy = transformers.AutoModelForCausalLM.from_config(config)
    policy.to(torch.bfloat16).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return str(folder)


def copied(folder, old="", new=""):
    """A copy of the project, with a change of its code. -> its folder"""
    for name in ("tiny_tasks.json", "test_toolrl.py"):
        shutil.copy(HERE / name, folder)
    assert old in CODE
    (folder / "toolrl.py").write_text(CODE.replace(old, new, 1), encoding="utf-8")
    return folder


def run_little(folder, *flags):
    """A run of a second or less, of the folder's toolrl.py if it has one. -> what --out holds"""
    out = folder / "run.jsonl"
    code = folder / "toolrl.py"
    names = runpy.run_path(str(code)) if code.exists() else vars(toolrl)
    names["main"](names["read_settings"](LITTLE + ["--out", str(out), *flags]))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, folder, *flags):
    """The last line that a little run says, which ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_little(folder, *flags)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and len(line) < 620, line
    return line


def in_shell(folder, command, **environment):
    """Run Python in a folder. -> the finished process, with its output as text"""
    environment = os.environ | {"PYTHONUTF8": "1"} | environment
    python = [sys.executable] + command
    return subprocess.run(python, cwd=folder, capture_output=True, text=True, env=environment)


# %% Tasks, text and the harness
def test_each_question_and_person_can_be_drawn_the_last_ones_too():
    rng = rng_for(0, "x")
    for questions in [*TRAIN.values(), *HELD_OUT.values()]:
        drawn = [new_episode(TINY, questions, rng) for _ in range(12 * len(questions))]
        assert {episode.question for episode in drawn} == set(questions)
    for call in LEO:
        assert {episode.directory[call] for episode in drawn} == set(toolrl.PEOPLE)


@each("chat", [TINY, BPE])
def test_a_conversation_is_the_one_that_the_docstring_shows(chat):
    shown = re.search(r" +<.im_start.>system\n.*?is bob<.*?>", toolrl.__doc__, re.S)[0]
    text = re.sub(r"^ {4}[ >] ", "", shown, flags=re.M)
    episode = Episode(chat, ONE_CALL, LEO | {("mentor", "alice"): "bob"})
    replay(episode, episode.gold)
    assert chat.encode(text) == episode.ids  # encoded whole, as elsewhere
    written = chat.decode(np.array(episode.ids)[episode.written])
    assert written == CALL + END + "The answer is bob" + END


def test_what_is_trained_on_are_the_very_tokens_that_were_sampled():
    record = Episode(BPE, ONE_CALL, LEO)
    # Tags have one token each, and all else is written letter by letter.
    for text in re.findall("<.*?>|.", f"{CALL}{END}The answer is leo{END}"):
        record.write(BPE.encode(text)[0])
    [episode] = played(Puppet(BPE, [record]), [Episode(BPE, ONE_CALL, LEO)])
    assert toolrl.batch([episode], "cpu")[0].tolist() == [record.ids]
    assert len(record.ids) > len(replay(Episode(BPE, ONE_CALL, LEO), record.messages).ids)


@each("fmt", toolrl.OPEN)
def test_what_is_solved_and_what_the_harness_says_in_both_formats(fmt, monkeypatch):
    monkeypatch.setattr(toolrl, "blind_reward", lambda episode: -10.0)  # as a reader may shape it
    for reward, _, question, said in table(CONVERSATIONS)[1:]:
        episode = told(question, said.replace("tool_call>", toolrl.OPEN[fmt][1:]), fmt)
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


# %% Training: updates, what is imitated, and what is played
@each("dtype, digits", [(torch.float32, 7), (torch.float64, 5)])
def test_a_step_goes_down_the_gradient_cut_to_norm_one(dtype, digits):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = numbers("0.1234567 0.7654321").to(dtype)
    layer.weight.grad = numbers("9 9").to(dtype)  # left over from elsewhere
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    for slope in ("30 40", "0.3 0.4"):  # the second is not stretched
        toolrl.descend(layer, sgd, (layer.weight * numbers(slope)).sum())
    due = numbers("-0.7765433 -0.4345679").round(decimals=digits)  # float64 is rounded to five
    assert torch.allclose(layer.weight.double(), due, rtol=0, atol=3e-7)
    with pytest.raises(RuntimeError, match="non-finite"):
        toolrl.descend(layer, sgd, (layer.weight * np.inf).sum())


def test_a_grpo_update_and_an_sft_update_are_what_the_definitions_say(monkeypatch):
    policy = toolrl.train_base(None, TINY, replace(SMALL, base_steps=30, sft_batch=32), 0)
    losses = []
    monkeypatch.setattr(toolrl, "descend", lambda policy, adam, loss: losses.append(loss))
    episodes = played(policy, draw(TINY, 10))
    advantage = torch.linspace(-2, 3, 10).double()
    imitation = []
    objective = []
    for gain, episode in zip(advantage, episodes, strict=True):
        log_p = log_probs_of(policy, episode)
        # As if the policy had moved since, up here and down there.
        old = np.array(episode.log_probs) + np.linspace(-0.5, 0.5, len(episode.ids))
        episode.log_probs = old.tolist()
        ratio = (log_p - torch.tensor(old)[episode.written]).exp()
        objective.append(torch.minimum(gain * ratio, gain * ratio.clamp(0.7, 1.3)))
        imitation.append(log_p)
    settings = replace(SMALL, minibatches=1, clip=0.3)
    toolrl.grpo_update(policy, None, episodes, advantage, settings, rng_for(0, "x"))
    toolrl.sft_update(policy, None, episodes)
    for loss, due in zip(losses, [objective, imitation], strict=True):
        difference = loss + torch.cat(due).mean()
        slopes = torch.autograd.grad(difference, policy.parameters(), retain_graph=True)
        assert all(zero.abs().max() < 1e-9 for zero in [difference, *slopes])
    assert TINY.tokenizer.pad_token_id == 0 != TINY.end  # who masks padding must not mask the end
    assert not toolrl.advantages(torch.full((8, 8), 0.7)).any()  # equal rewards push nothing


def test_the_log_of_a_careless_agent():
    rng = rng_for(1, "careless")
    said = Counter()
    for _ in range(5000):
        call, reply = toolrl.careless_messages(Episode(TINY, ONE_CALL, LEO), rng)
        [needless] = toolrl.careless_messages(Episode(TINY, "mentor of them ?", LEO), rng)
        said.update([call, needless])
    shares = [said[text] / 5000 for text in (CALL, CALL.replace("alice", "them"), ASK, TAG)]
    assert shares == pytest.approx([0.73, 0.7081, 0.03, 0.2364], abs=0.01)


def test_demonstrations_have_exact_shares_and_hasty_ones_answer_too_early():
    kinds = Counter()
    for episode in toolrl.demonstrations(TINY, replace(SMALL, sft_batch=400), rng_for(0, "x")):
        *calls, reply = episode.messages
        if not toolrl.solved(episode):
            got_to = episode.directory[episode.gold_calls[len(calls) - 1]]
            assert calls == episode.gold[: len(calls)] and reply == f"The answer is {got_to}"
        kinds[f"{episode.fmt}: {len(calls)} of {len(episode.gold_calls)}"] += 1
    right = {"A: 0 of 0": 100, "A: 1 of 1": 240, "A: 2 of 2": 15, "A: 3 of 3": 9}  # calls
    assert kinds == right | {"A: 1 of 2": 15, "A: 1 of 3": 11, "A: 2 of 3": 10}


def test_an_rl_step_has_exact_shares_and_all_rollouts_of_a_group_have_one_task():
    groups = toolrl.new_groups(TINY, replace(SMALL, groups=20), rng_for(0, "x"))
    assert len(set(map(id, groups))) == 80
    tasks = [f"{episode.question} {episode.directory}" for episode in groups]
    assert tasks[::4] == tasks[1::4] == tasks[3::4] and len(set(tasks)) == 20
    assert list(map(kind, groups)) == ["A 0"] * 64 + ["A 2"] * 16


@each("arm", toolrl.ARMS)
def test_an_arm_is_its_updates_in_their_order(arm, monkeypatch):
    base = toolrl.tiny_policy(TINY, 0)
    events = []
    rates = Counter()
    betas = (0.9, 0.95)  # those of the base

    def update(policy, optimizer, episodes, *rest):
        assert policy is not base and optimizer.defaults["betas"] == betas
        events.append("rl" if rest else "sft")
        rates[events[-1]] += optimizer.param_groups[0]["lr"]

    def rollout(policy, episodes, rng):
        for k, episode in enumerate(episodes):  # two of the first group are broken calls
            replay(episode, [TAG if k < 2 else ASK])

    for name in ("sft_update", "grpo_update"):
        monkeypatch.setattr(toolrl, name, update)
    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "evaluate", lambda *_: events.append("eval") or {})
    monkeypatch.setattr(toolrl, "HELD_OUT", None)  # nothing of it is trained on
    settings = replace(SMALL, steps=20, eval_every=18, sft_batch=4, no_call_share=1.0)
    assert toolrl.train_base(base, TINY, replace(settings, base_steps=1), 0) is not base
    betas = (0.9, 0.999)
    rates.clear()
    found = list(toolrl.train_arm(arm, base, TINY, settings, 0))
    schedule = "eval rl" + " sft sft rl" * 17 + " eval" + " sft sft rl" * 2 + " eval"
    assert events[1:] == re.findall("|".join(toolrl.ARMS[arm] | {"eval"}), schedule)
    # Each rate is at its height times a factor that rises or falls. These are the factors' sums.
    due = {"rl": 15.5 * settings.lr, "sft": 13.325 * settings.sft_lr}
    assert rates == pytest.approx({kind: due[kind] for kind in rates})
    # The strict reward alone tells a broken call from asking back.
    equal = {"sft": {}, "rl-strict": {"equal": 5 / 6}}.get(arm, {"equal": 1.0})
    assert found == [(0, {}), (18, equal), (20, equal)]


# %% Probes, claims and print
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
    assert len(p) == 37 and max(p.values()) < 0.01  # 5 x 8, less the three due somewhere
    # This policy knows the first tag of a broken conversation, and else it ends its message.
    broken = told(right.question, TAG, chat=chat)
    skill, p = toolrl.teacher_forced(Puppet(chat, [broken], p=0.9), [right])
    found = [p[f"{END} {place}"] for place in ("call", "json", "close", "reply")]
    assert found == pytest.approx([0.45, 0.9, 0.9, 0.9], abs=0.01) and skill < 1e-6


def test_an_evaluation_asks_held_out_tasks_and_says_what_was_done(monkeypatch):
    asked = []

    def rollout(policy, episodes, rng):
        asked.extend(episodes)
        for k, episode in enumerate(episodes):  # 2, 3, 4 and 5 in 5 are empty, or broken
            replay(episode, [TAG * (k == 0)] if k % 5 < k // 5 + 2 else episode.gold)
            episode.log_probs[-2:] = np.log([0.25, 0.5])

    monkeypatch.setattr(toolrl, "rollout", rollout)
    monkeypatch.setattr(toolrl, "TRAIN", None)
    found = toolrl.evaluate(Puppet(TINY, []), TINY, SMALL, 0)
    figures = [found[name] for name in ["success", "one_call", "format_b", "asks", "reward"]]
    assert figures == pytest.approx([0.6, 0.4, 0.2, 0.0, 1.0])
    assert found["broken"] == 1 / sum(len(episode.messages) for episode in asked[:5])
    assert found["conversation"] == f"{asked[0].question}\n{TAG}[0.25]{END}[0.50]\n"
    assert list(map(kind, asked[::5])) == ["A 2", "A 1", "B 2", "A 0"]


def look(step, success=0.6, skill=1.0, one_call=0.9, format_b=0.8, spike=0.08):
    """A made evaluation. <|im_end|> has probability `spike` where JSON is due."""
    p = dict.fromkeys(["<tool_call> reply", "</tool_call> end", "<tool_call> end"], 0.001)
    figures = {"success": success, "skill": skill, "one_call": one_call, "format_b": format_b}
    figures |= {"asks": 0.1, "reward": 0.3, "broken": 0.02, "conversation": "a question\nhm\n"}
    return SimpleNamespace(step=step, p=p | {"<|im_end|> json": spike}, **figures)


def story():
    """A history in which every claim holds, if only just."""
    low = [look(step, 0.05, 0.5) for step in (15, 20, 25)]
    return {
        "rl": [look(0), look(10, 0.05, 0.8, spike=0.4), *low],
        "sft": [look(0), look(5), look(10), look(15, 0.69)],
        "interleaved": [look(0), look(5), look(10, 0.7), look(15, 0.9, format_b=0.63)],
        "rl-strict": [look(0), look(5, 0.01), look(10, 0.8), look(15, 0.9)],
    }


# In this story: the arm, which of its evaluations, what changes there, and the claims that fail.
@each("""
arm         | k  | what              | value | fails
rl          | -3 | success           | 0.06  | collapse
rl          | -1 | success           | 0.06  | collapse
rl          | 0  | success           | 0.19  | collapse control_token intact
rl          | 0  | <|im_end|> json   | 0.081 | control_token cause
rl          | 1  | <|im_end|> json   | 0.39  | control_token cause
rl          | 1  | </tool_call> end  | 0.35  | control_token
rl          | 1  | skill             | 0.79  | intact
rl          | 0  | skill             | 1.01  | intact
rl          | 0  | success           | 0.75  | together
sft         | -1 | success           | 0.71  | together
sft         | 1  | success           | 0.8   |
interleaved | -1 | success           | 0.88  | fix together
interleaved | -1 | one_call          | 0.89  | fix
interleaved | -1 | <tool_call> end   | 0.5   | fix
interleaved | 1  | <tool_call> end   | 0.5   |
interleaved | -1 | format_b          | 0.65  | price
rl-strict   | 1  | <tool_call> reply | 0.5   | cause
""")
def test_each_claim_can_say_no(arm, k, what, value, fails):
    history = story()
    figures = vars(history[arm][int(k)])
    (figures["p"] if " " in what else figures)[what] = float(value)
    for evaluations in history.values():
        for evaluation in evaluations:
            toolrl.report(evaluation, evaluations[0].p)
    claims = list(toolrl.judge(history))
    assert len(claims) == 7
    assert [claim for claim, _, holds in claims if not holds] == fails.split()


# What is printed last, of the third of three seeds. In the first two, rl is never down.
PAGE = """
== summary: success, and p of <|im_end|> json, from step to step
rl           success ▅▁▁▁▁
rl           p       ▁▄▁▁▁

== claims, seed 0, and in how many seeds so far, of 3
collapse      yes  1  rl falls from 0.2 or more to 0.05 or less, and ends there
control_token yes  1  when rl is first down, what rose most has spiked (*)
intact        yes  1  rl then has 0.8 or more of the base's skill

== over seeds, mean and range
  success         skill           one_call        format_b        asks            broken
rl, end, 3 seeds
  0.48 0.05-0.69  0.20 0.00-0.40  0.90 0.90-0.90  0.80 0.80-0.80  0.10 0.10-0.10  0.02 0.02-0.02
base, 3 seeds
  0.60 0.60-0.60  1.00 1.00-1.00  0.90 0.90-0.90  0.80 0.80-0.80  0.10 0.10-0.10  0.02 0.02-0.02
rl, down, 1 seeds
  0.05 0.05-0.05  0.80 0.80-0.80  0.90 0.90-0.90  0.80 0.80-0.80  0.10 0.10-0.10  0.02 0.02-0.02
"""


def test_what_a_run_prints_and_that_it_is_on_disk_at_once(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    lines = []

    def train_arm(arm, base_policy, chat, settings, seed):
        lines.append(out.read_text().count("\n"))
        looks = story()[["rl", "sft", "sft"][seed]]
        looks[2].p["<tool_call> reply"] = 0.32  # rises most, but rl is down before
        looks[-1].skill = 0.2 * seed
        for figures in map(vars, looks):
            yield figures.pop("step"), figures

    monkeypatch.setattr(toolrl, "train_base", lambda *_: None)
    monkeypatch.setattr(toolrl, "train_arm", train_arm)
    settings = replace(SMALL, seeds=(2, 1, 0), arms=("rl",), out=str(out))
    assert list(toolrl.main(settings)) == [2, 1, 0] and lines == [1, 5, 9]
    said = capsys.readouterr().out
    assert PAGE in said and " nan " in said and max(map(len, said.splitlines())) <= 100, said


# %% Runs: the command line, what it changes, and --model
BAD = """--stepz 3 | --arms rl rl | --seeds 0 0 | --steps 0 | --lr nan | --no-call-share 1.5
| --arms nope | --group-size 1 | --minibatches 9 | --device nope | --device meta | --device cuda:99
| --model /nowhere/memory | --out /nowhere/memory/x"""
# Flags that have to change what is measured. With the first, none is changed.
CHANGES = """--seeds 0 | --seeds 1 | --arms sft | --steps 5 | --eval-every 1 | --eval-episodes 5
| --base-steps 3 | --base-lr 0.1 | --lr 0.01 | --groups 3 | --group-size 5 | --no-call-share 0
| --minibatches 1 | --clip 0.01 | --sft-steps 1 | --sft-lr 0.1 | --sft-until 0.6 | --sft-batch 9
| --hasty-share 0"""
SHORT = shlex.split("--sft-batch 20 --base-steps 20 --steps 6 --eval-every 6 --lr 0.01")
# Of the last evaluation of each arm of a short run: its skill, and the sum of p.
FIGURES = """{"rl": [0.000002618140, 1.042651562052], "sft": [0.000004115389, 0.347686664216],
"interleaved": [0.000000013462, 1.314638855079]}"""


@each("flags", BAD.split("|"))
def test_bad_input_gets_a_line_that_names_it_and_empties_no_file(flags, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    out.write_text("what an hour has measured")
    line = refused(capsys, tmp_path, *flags.split())
    assert all(word in line for word in flags.split() if not word.isdigit()), line
    assert out.read_text() == "what an hour has measured"


def test_the_help_tells_of_each_setting_and_flags_do_what_they_say(tmp_path, capsys):
    found = toolrl.read_settings(["--model", "x", "--steps", str(toolrl.Settings.steps)])
    assert found == toolrl.Pretrained(model="x", steps=toolrl.Settings.steps)
    added = "    # SFT\n    whiten: bool = True  # 10 %\n    kl: float = 0.0\n"
    code = copied(tmp_path, "    # SFT\n", added) / "toolrl.py"
    read_settings = runpy.run_path(str(code))["read_settings"]
    settings = read_settings(["--whiten", "false", "--kl", "0.1"])
    assert settings.whiten is False and settings.kl == 0.1
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    said = capsys.readouterr().out
    for setting in re.findall(r"^    \w+: .*  # .*", CODE, re.M) + added.splitlines():
        assert setting in said


def test_each_setting_changes_what_is_measured(monkeypatch):
    monkeypatch.setattr(toolrl, "check_tasks", lambda chat: None)  # to save time, and
    monkeypatch.setattr(toolrl, "MAX_TOKENS", 20)  # an untrained policy writes long
    found = set()
    for change in CHANGES.split("|"):
        flags = f"--arms interleaved --eval-episodes 2 {change}".split()
        settings = toolrl.read_settings(LITTLE + flags)
        found.add(str(toolrl.main(settings).popitem()[1]))
    assert len(found) == len(vars(settings)) - 1  # all but device and out, and once none is changed


def near(digits):
    return pytest.approx(float(digits), abs=1e-9)


def test_figures_are_the_same_on_every_machine_and_whatever_runs_beside(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(toolrl, "rng_for", lambda *given: seeds.append(given[0]) or rng_for(*given))
    alone = run_little(tmp_path, *SHORT, "--seeds", "1")
    assert set(seeds) == {0, 1} and seeds.count(0) == 1  # all but the check of the tasks
    beside = run_little(tmp_path, *SHORT, "--seeds", "0", "1", "--arms", "sft")
    assert beside[3:] == alone[3:5]  # the evaluations of sft, and the file starts anew
    found = {e["arm"]: [e["skill"], sum(e["p"].values())] for e in alone[2::2]}
    assert found == json.loads(FIGURES, parse_float=near)


def test_slow_all_is_the_same_without_simd_and_with_two_threads(tmp_path):
    usual = run_little(tmp_path, *SHORT)
    out = tmp_path / "run.jsonl"
    command = ["toolrl.py"] + LITTLE + SHORT + ["--out", str(out)]
    done = in_shell(HERE, command, ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    lines = out.read_text(encoding="utf-8").splitlines()
    assert usual == [json.loads(line, parse_float=near) for line in lines]


@each("name", ["sft_loss", "rollout", "blind_reward"])
def test_slow_a_mistake_of_a_student_is_a_traceback_with_its_line(name, tmp_path):
    folder = copied(tmp_path, f"def {name}(", f"def {name}(forgotten, ")
    said = in_shell(folder, ["toolrl.py"] + LITTLE).stderr
    assert 'toolrl.py", line' in said and f"{name}() missing 1" in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_slow_ctrl_c_exits_with_130_and_a_console_shows_what_it_can():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would not hear it
    command = [sys.executable, "toolrl.py"] + LITTLE + ["--seeds", "0", "1"]
    narrow = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
    run = subprocess.Popen(command, cwd=HERE, env=narrow, **pipes)
    for line in run.stdout:  # each line comes at once
        if b"rl           success ???" in line:
            run.send_signal(signal.SIGINT)
    assert run.wait() == 130 and b"Traceback" not in run.stderr.read()


@each("rows, tied", [(320, True), (292, False)])  # more than there will be tokens, or fewer
def test_a_new_tag_starts_as_the_mean_of_its_pieces(rows, tied, tmp_path):
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


# An architecture, what it takes beside sizes, and what is said of it if it cannot play.
@each("""
name        | more                             | words
Llama       | {}                               |
Lfm2        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8} |
Qwen3_5Text | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_hidden_layers": 4} |
FalconH1    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8} |
GPT2        | {"max_position_embeddings": 128} | has to take 480 tokens
""")
def test_other_architectures_agree_with_one_pass(name, more, words, tmp_path, capsys):
    sizes = """{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}"""
    config = getattr(transformers, name + "Config")(**json.loads(sizes) | json.loads(more))
    folder = save_checkpoint(tmp_path, config)
    if words:
        assert words in refused(capsys, tmp_path, "--model", folder)
    else:
        chat, policy = toolrl.load(toolrl.Pretrained(model=folder, device="cpu"))
        check_rollout(policy, chat)


# A file that a run reads: what it says, what is put there, and what is said of it, if anything.
@each("""
name            | old                 | new                    | words
tiny_tasks.json | alice               | bob zoë                |
tiny_tasks.json | "alice",            | "alice",,              | Expecting value
tiny_tasks.json | "people"            | "folk"                 | 'people'
tiny_tasks.json | "leo"               | 7                      | TypeError
tiny_tasks.json | "train": {          | "train": [], "x": {    | AttributeError
tiny_tasks.json | "one_call": [       | "one_calls": [         | train and held_out need questions
tiny_tasks.json | "friend of bob ?"   | "friend of alice ?"    | twice
tiny_tasks.json | "friend of alice ?" | "friend of zoe ?"      | friend of zoe
tiny_tasks.json | "friend of alice ?" | "friend of ann ?"      | is no one_call question
tiny_tasks.json | "friend of alice ?" | "friend of them ?"     | is no one_call question
tiny_tasks.json | of rival of a | of rival of rival of rival of rival of rival of a | is no long
config.json     | bfloat16            | float32                |
config.json     | hidden_layers": 2   | hidden_layers": 3      | the weights do not fit
config.json     | hidden_layers": 2   | hidden_layers": 1      | the weights do not fit
tokenizer.json  | {                   | [                      | --model
tokenizer.json  | normalizer": null   | normalizer": {"type": "Lowercase"} | no tokens for
""")
def test_other_files_are_accepted_or_get_one_line(name, old, new, words, tmp_path, capsys):
    flags = [] if "zo" in new else ["--model", save_checkpoint(tmp_path)]  # zoe: a tiny model
    path = copied(tmp_path) / name
    text = path.read_text(encoding="utf-8").replace(old, new)
    path.write_text(text, encoding="utf-8-sig" if "tasks" in name else "utf-8")  # as some do
    if words:
        assert words in refused(capsys, tmp_path, *flags)
    else:
        assert run_little(tmp_path, *flags)


# %% The README, and the whole story
README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""


def blocks(language, start=""):
    """The blocks of a language in the README, of which the first line starts like this."""
    return re.findall(rf"```{language}\n((?={start}).*?)```", README, re.S)


def test_the_commands_of_the_readme_are_accepted():
    for command in re.findall(r"python toolrl\.py ?([^|>#`\n]*)", README):
        toolrl.read_settings(re.sub(r"\$\(seq (\d+).*?\)", r"\1", command).split())


@each("diff", blocks("diff"))
def test_slow_the_silent_bugs_of_the_readme_run_and_a_quick_test_finds_each(diff, tmp_path):
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    given = {"cwd": copied(tmp_path), "input": diff.encode(), "env": alone}
    subprocess.run(["git", "apply", "-"], check=True, **given)
    assert run_little(tmp_path) and len(blocks("diff")) == 3
    done = in_shell(tmp_path, ["-m", "pytest", "-x", "-k", "(advantages or grpo) and not slow"])
    assert done.returncode == 1 and "FAILED test_toolrl.py::test_" in done.stdout, done.stdout


@each("snippet", blocks("python"))
def test_slow_snippets_of_the_readme_run(snippet, tmp_path):
    for library in re.findall(r"^(?:from|import) (trl|matplotlib)", snippet, re.M):
        pytest.importorskip(library, reason=f"this snippet needs {library}")
    run_little(tmp_path)
    (copied(tmp_path) / "snippet.py").write_text(snippet, encoding="utf-8")
    done = in_shell(tmp_path, ["snippet.py"] + LITTLE, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def default_run():
    """What the default run prints, of seed 0 on a CPU. All of its claims hold."""
    said = in_shell(HERE, ["toolrl.py", "--seeds", "0", "--device", "cpu"]).stdout
    assert len(re.findall(r"^\w+ +yes  1  ", said, re.M)) == 6, said
    assert max(map(len, said.splitlines())) <= 100, said
    return said


@each("block", blocks("text", "== (?!over seeds)|step (?:\\d|success)|rl  "))
def test_slow_a_block_of_the_readme_is_what_the_default_run_prints(block, default_run):
    place = 0
    for piece in re.split(r"^\.\.\.\n", block, flags=re.M):  # "..." stands for lines left out
        place = default_run.find("\n" + piece, place) + len(piece)
        assert place >= len(piece), piece
