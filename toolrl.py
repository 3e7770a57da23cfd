"""toolrl: RL alone breaks a tool caller, SFT alone copies its teacher, together they do better.

    python toolrl.py                        a tiny model, in one to two minutes
    python toolrl.py --model CHECKPOINT     a pretrained model, other defaults

A conversation has two sides. The policy is a language model that acts: it writes messages. The
harness is the program around it: it runs the calls that the policy writes, returns their results,
and pays a reward at the end. A right conversation, in which the policy wrote the lines with ">":

      <|im_start|>system
      use <tool_call><|im_end|>
      <|im_start|>user
      mentor of alice ?<|im_end|>
      <|im_start|>assistant
    > <tool_call>{"name": "mentor", "arguments": {"of": "alice"}}</tool_call><|im_end|>
      <|im_start|>tool
      <tool_response>bob</tool_response><|im_end|>
      <|im_start|>assistant
    > The answer is bob<|im_end|>

This is format A; format B has <function> and </function> for tags. "mentor of them ?" names nobody:
no call is right, and the policy should ask "who do you mean ?". Two more agents, each a few lines
of code, write conversations: a careless agent wrote the log from which the first policy, the base,
learned, and a hasty teacher writes the demonstrations of supervised fine-tuning (SFT).
Reinforcement learning (RL) sees only the reward. It teaches the policy a broken call, which is an
opening tag alone: <|im_end|>, which ends a message, comes where JSON is due.

    > <tool_call><|im_end|>

An episode is one conversation about one task. A rollout is an episode that the policy has played,
and a group is the rollouts of one task. A long task takes two calls or three. How RL comes to teach
broken calls, and what prevents it (README.md tells it slowly):

1. Where no call is right, the reward pays for a broken call: it counts as a reply, and nobody
   reads replies (blind_reward). The base breaks a call now and then, as the careless agent did.
   Asking back would earn as much, but the base does it more rarely still (careless_messages).
2. RL makes likelier what earned more than the other rollouts of its group, so it teaches the policy
   to break its calls. The policy then breaks them on long tasks, too, where a broken call earns 0
   (advantages).
3. In the end all rollouts of a group earn the same, the gradient is 0, and RL hardly ever comes
   back, although the policy still knows which names to write (train_arm, teacher_forced).
4. SFT shows whole calls and asking back, and needs no lucky rollout, but it copies its teacher, who
   answers long tasks too early (teacher_messages).
5. With both it is a race, which SFT wins, since it need not sample what it pushes, and at first its
   learning rate is far above RL's: the policy asks back before it has learned to break its calls.
   A broken call then no longer earns more than the rest of its group. On long tasks the rollouts
   still differ, and RL learns to finish them. Format B, which neither practises, gets lost.

The finding is that of arXiv 2606.26027. A run, with the functions that do it:

    for each seed: the base imitates the log of a careless agent          train_base
        for each arm, which is one way to go on from the base:            train_arm
            for each step:
                in arms with SFT, less and less: imitate the teacher      sft_update
                in arms with RL: play some tasks, each several times      rollout
                    score each conversation with 1 or 0                   blind_reward
                    push up what scored better than its group             grpo_update
                at steps 0, 10, 20 ...: measure, on held-out tasks        evaluate
        check what was measured against claims that can fail              judge

Shapes: N episodes, M a part of them, T tokens, vocabulary V.
"""

import argparse
import functools
import json
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

# %% Settings: every knob of a run

# What an arm does to its copy of the base. Arms share all else: tasks, seeds, number of steps.
# In interleaved, SFT updates and an RL step take turns. In rl-strict, the reward reads the reply.
ARMS = {"rl": {"rl"}, "sft": {"sft"}, "interleaved": {"rl", "sft"}, "rl-strict": {"rl", "strict"}}


@dataclass
class Settings:
    """The command line: --no-call-share 0.5 sets no_call_share."""

    # What to run
    seeds: tuple = (0,)  # for each of them, train the base and all arms anew
    arms: tuple = ("rl", "sft", "interleaved")  # in this order
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    out: str = ""  # write what is measured into this file, one JSON object per line
    # Base
    base_steps: int = 300  # updates on the log of a careless agent
    base_lr: float = 8e-3  # learning rate of these updates, times a factor that rises and falls
    # RL
    steps: int = 60  # steps in an arm
    lr: float = 4e-4  # learning rate of RL, which rises to this over ten steps
    no_call_share: float = 0.8  # share of RL's tasks in which no call is right
    groups: int = 10  # tasks in an RL step
    group_size: int = 8  # rollouts of each task in an RL step
    minibatches: int = 2  # updates from the rollouts of one RL step
    clip: float = 0.2  # a token is pushed no further once its probability has changed by this share
    # SFT
    sft_steps: int = 2  # SFT updates in each step but the first
    sft_lr: float = 2e-3  # learning rate of SFT, which falls from here in a straight line
    sft_until: float = 0.8  # share of the steps after which SFT has faded, to 0.02 of its rate
    sft_batch: int = 32  # conversations in an SFT update, and in an update of the base
    hasty_share: float = 0.6  # share of a batch's long demonstrations that answer too early
    # Evaluation
    eval_every: int = 10  # steps from one evaluation to the next
    eval_episodes: int = 100  # held-out episodes of each kind in an evaluation


@dataclass
class Pretrained(Settings):
    """With --model, these are the defaults: a pretrained model needs smaller steps, and fewer."""

    base_steps: int = 60
    base_lr: float = 1e-3
    steps: int = 20
    lr: float = 3e-5
    no_call_share: float = 0.75
    groups: int = 4
    minibatches: int = 4
    sft_lr: float = 2.5e-4
    sft_batch: int = 16
    eval_every: int = 5
    eval_episodes: int = 32
    model: str = ""  # start from this checkpoint, a folder or a hub name, with defaults of its own


def stop(why):
    """End the program with one line that says what to fix, and exit code 2."""
    print(f"toolrl: {textwrap.shorten(str(why), 500)}", file=sys.stderr)
    sys.exit(2)


# %% Tasks: questions about who is whose friend

# Two questions of tiny_tasks.json:
#   "rival of mentor of alice ?" takes two calls: the mentor of alice, then that person's rival.
#   "rival of them ?" takes none.
KINDS = ["no_call", "one_call", "long"]  # a long task takes two calls or three
NOBODY = "them"
ANSWER = "The answer is "
ASK_BACK = "who do you mean ?"
END = "<|im_end|>"  # the token that ends a message
FILE = Path(globals().get("__file__", "toolrl.py"))  # a notebook has no __file__
try:
    TASKS = json.loads(FILE.with_name("tiny_tasks.json").read_text(encoding="utf-8-sig"))
    TRAIN = TASKS["train"]  # kind: questions
    HELD_OUT = TASKS["held_out"]
    TOOLS = TASKS["tools"]
    PEOPLE = TASKS["people"]
    OPEN = TASKS["open"]  # the tags of formats A and B, which are alike in all else
    CLOSE = TASKS["close"]
    # Control tokens give a conversation its structure. The finding is about one of them.
    CONTROL = ["<|im_start|>", END, OPEN["A"], OPEN["B"], CLOSE["A"], CLOSE["B"]]
    CONTROL += ["<tool_response>", "</tool_response>"]
    # All parts are lists of texts, otherwise they cannot be joined.
    "".join(sum([CONTROL, TOOLS, PEOPLE, *TRAIN.values(), *HELD_OUT.values()], []))
except Exception as error:  # it may be spoilt in many ways
    stop(f"tiny_tasks.json: {type(error).__name__}: {error}")


def rng_for(seed, purpose, step=0):
    """A generator for one purpose alone. Numpy's give the same numbers on every machine."""
    return np.random.default_rng(list(f"{seed} {purpose} {step}".encode()))


def new_directory(rng):
    """(tool, person) -> person: what calls return, drawn anew for each task."""
    calls = list(product(TOOLS, PEOPLE))
    return dict(zip(calls, rng.choice(PEOPLE, len(calls)).tolist(), strict=True))


def right_answer(question, directory):
    """The calls that a question takes, from the person outwards, and the reply they lead to."""
    *tools, person = question.removesuffix(" ?").split(" of ")
    if person == NOBODY:
        return [], ASK_BACK
    calls = []
    for tool in reversed(tools):
        calls.append((tool, person))
        person = directory.get((tool, person), "error")
    return calls, ANSWER + person


# %% Text: conversations and calls as a language model sees them

# ChatML, the layout of Qwen, Hermes and SmolLM2. The policy writes after TURN.
TURN = "<|im_start|>assistant\n"
PROMPT = "<|im_start|>system\nuse {}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n" + TURN
CALL = '{{"name": "{}", "arguments": {{"of": "{}"}}}}'
RESULT = "\n<|im_start|>tool\n<tool_response>{}</tool_response><|im_end|>\n" + TURN


def call_text(tool, person, fmt):
    """A call as the policy should write it: JSON between the tags of a format."""
    return OPEN[fmt] + CALL.format(tool, person) + CLOSE[fmt]


def parse_call(message, fmt):
    """The (tool, person) of a message that is one whole call and nothing else, otherwise None."""
    pattern = re.escape(call_text("ANY", "ANY", fmt)).replace("ANY", '([^"]+)')
    found = re.fullmatch(pattern, message)
    return found and found.groups()


# %% Environment: the harness, and what it rewards

MAX_CALLS = 6  # in an episode
MAX_TOKENS = 60  # in a message of the policy, which is cut off there


class Episode:
    """One conversation about one task: what would be right, and a record of what was said.

    Each token has an entry in three lists: `ids`; `written`, True for what the policy wrote or what
    was replayed in its place; `log_probs`, the token's log-probability when it was sampled, 0 for a
    token that was not. A `chat` turns text into ids and back (class Chat, further down).
    """

    def __init__(self, chat, question, directory, fmt="A"):
        self.chat = chat
        self.question = question
        self.directory = directory
        self.fmt = fmt
        self.gold_calls, reply = right_answer(question, directory)
        self.gold = [call_text(*call, fmt) for call in self.gold_calls] + [reply]
        self.ids = []
        self.written = []
        self.log_probs = []
        self.message = []  # the ids of the message that the policy is writing
        self.messages = []  # those before it, as text
        self.calls = []  # what the harness ran
        self.replied = False
        self.done = False
        self.observe(PROMPT.format(OPEN[fmt], question))

    def observe(self, text):
        """Record what the harness says."""
        ids = self.chat.encode(text)
        self.ids += ids
        self.written += [False] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def write(self, token, log_prob=0.0):
        """Record one token of the policy. At the end of its message, the harness responds.

        It runs a message that is one whole call, and says what the call returns. Any other message
        ends the episode, and so does the sixth call. A message that ended by itself and holds no
        closing tag is a reply, even if all that it says is an opening tag.
        """
        self.ids.append(token)
        self.written.append(True)
        self.log_probs.append(log_prob)
        self.message.append(token)
        ended = token == self.chat.end
        if not ended and len(self.message) < MAX_TOKENS:
            return
        message = self.chat.decode(self.message).removesuffix(END)
        self.messages.append(message)
        self.message = []
        call = parse_call(message, self.fmt)
        if call and ended:
            self.calls.append(call)
            if len(self.calls) < MAX_CALLS:
                self.observe(RESULT.format(self.directory.get(call, "error")))
                return
        # A message that was cut off is neither a call nor a reply.
        self.replied = ended and not any(tag in message for tag in CLOSE.values())
        self.done = True


def new_episode(chat, questions, rng, fmt="A"):
    """An episode about one of these questions."""
    question = questions[rng.integers(len(questions))]
    return Episode(chat, question, new_directory(rng), fmt)


def replay(episode, messages):
    """Write messages that somebody else chose, until the episode is done. -> the episode"""
    for message in messages:
        for token in episode.chat.encode(message + END):
            if not episode.done:
                episode.write(token)
    return episode


def blind_reward(episode):
    """RL's reward: 1.0 if the right calls and no others were run before a reply, otherwise 0.0.

    `episode.calls` has to equal `episode.gold_calls`, in the same order, and `episode.replied` says
    whether a reply came. Nobody reads the reply; many harnesses score like this, and so does the
    paper's. "rival of them ?" names nobody, so it is right to call nothing and to ask back. Eight
    rollouts of the base may be these:

        seven times   <tool_call>{"name": "rival", "arguments": {"of": "them"}}</tool_call> ...   0
        once          <tool_call><|im_end|>                                                       1

    Any reply would earn 1 here: asking back, a broken call, an empty message. RL pushes each up in
    proportion to its probability, so it finds the one that the base writes most often.
    """
    return float(episode.replied and episode.calls == episode.gold_calls)


def solved(episode):
    """What evaluations count: 1.0 if all messages are right, word for word, otherwise 0.0."""
    return float(episode.messages == episode.gold)


# %% Policy: a language model, its log-probabilities, and a step down a gradient


def batch(episodes, device):
    """The records of N episodes, padded with zeros. -> ids [N, T], written and log_probs [N, T-1]

    The last two are about tokens 1 to T-1, since nothing predicts token 0. Padding comes last and a
    policy looks back only, so no attention mask is needed.
    """
    padded = []
    for name in ("ids", "written", "log_probs"):
        rows = [torch.from_numpy(np.array(getattr(episode, name))) for episode in episodes]
        padded.append(pad_sequence(rows, batch_first=True).to(device))  # [N, T]
    ids, written, log_probs = padded
    return ids, written[:, 1:], log_probs[:, 1:]


def token_log_probs(policy, ids):
    """Log-probability of each token but the first, given those before it. [M, T] -> [M, T-1]"""
    logits = policy(ids[:, :-1]).logits  # [M, T-1, V]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [M, T-1]


def descend(policy, optimizer, loss):
    """One step down the gradient, clipped to norm 1. RuntimeError if the gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    for weights in policy.parameters():
        # Another CPU adds in another order, and its sums differ in the last digit, which training
        # would amplify until other tokens are sampled. The tiny policy computes in float64, and
        # rounding its weights makes them the same again.
        if weights.dtype == torch.float64:
            weights.data.round_(decimals=5)


# %% SFT: imitate what somebody else wrote


def sft_loss(log_probs, written):
    """Cross-entropy of what was written. Both [M, T-1], about tokens 1 to T-1 -> a scalar

    It is the mean over all written tokens of the batch. What the harness said and the padding are
    not in it. The policy learns whatever the conversations show, the good and the bad.
    """
    return -(log_probs * written).sum() / written.sum()


def sft_update(policy, optimizer, episodes):
    """Imitate M episodes that somebody else wrote."""
    ids, written, _ = batch(episodes, policy.device)  # [M, T], [M, T-1]
    loss = sft_loss(token_log_probs(policy, ids), written)
    descend(policy, optimizer, loss)


# %% Base: a policy with the skill and with bad habits


def careless_messages(episode, rng):
    """What a careless agent wrote in this episode, for the base to imitate.

    Where nobody is named, it calls about "them", 97 times in 100, and what came after is not in the
    log. Of its calls, 15 in 100 have the tags of the other format, so the base knows only roughly
    when to write which, and 12 in 100 are broken, on all kinds of tasks alike.
    """
    calls = episode.gold_calls
    reply = [episode.gold[-1]]
    if not calls and rng.random() < 0.97:
        tool = episode.question.split(" of ")[-2]  # "friend of rival of them ?" -> "rival"
        calls = [(tool, NOBODY)]
        reply = []
    other = {"A": "B", "B": "A"}[episode.fmt]
    messages = []
    for tool, person in calls:
        whole = call_text(tool, person, episode.fmt)
        mixed_up = call_text(tool, person, other)
        broken = OPEN[episode.fmt]
        messages.append(rng.choice([whole, mixed_up, broken], p=[0.73, 0.15, 0.12]).item())
    return messages + reply


def train_base(pretrained, chat, settings, seed):
    """Train a tiny policy, or a copy of a pretrained one, on the log of a careless agent."""
    policy = deepcopy(pretrained) or tiny_policy(chat, seed)
    policy.to(settings.device)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95))
    rng = rng_for(seed, "base")
    for step in range(settings.base_steps):
        # Large steps from the start do harm, and small steps at the end settle what was found.
        progress = (step + 1) / settings.base_steps
        lr = settings.base_lr * min(progress / 0.3, 1) * max(1 - progress, 0.02)
        optimizer.param_groups[0]["lr"] = lr
        episodes = []
        for kind, share in zip(KINDS, [0.1, 0.15, 0.75], strict=True):
            for _ in range(round(share * settings.sft_batch)):
                fmt = rng.choice(["A", "B"], p=[0.7, 0.3]).item()
                episode = new_episode(chat, TRAIN[kind], rng, fmt)
                episodes.append(replay(episode, careless_messages(episode, rng)))
        sft_update(policy, optimizer, episodes)
    return policy


# %% Rollout: the policy talks to the harness


@torch.no_grad()
def rollout(policy, episodes, rng):
    """Play N new episodes to their end, sampling at temperature 1. Each records its tokens.

    Training sees the very ids that were sampled: nothing is ever decoded and encoded again. The
    rest of this function plays many episodes at once, and is no part of the lesson.

    One KV cache holds all rows, so all must have the same length in it. Each turn of the loop feeds
    tokens up to the end of the shortest row, here up to "|" (o was observed, w was written):

        row 0   o o o o o w w w|            all is fed: its next token is sampled
        row 1   o o o w w w w o|o o o       the rest of a result has still to be fed

    So no row needs padding on the left, and none needs an attention mask.
    """
    playing = list(episodes)
    fed = 0  # tokens of each row that are in the cache
    cache = None
    while playing:
        until = min(len(episode.ids) for episode in playing)
        ids = torch.tensor([episode.ids[fed:until] for episode in playing], device=policy.device)
        output = policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        fed = until
        log_p = output.logits[:, -1].log_softmax(-1).double().cpu().numpy()  # [M, V]
        # A uniform number falls into the interval of one token, which is as wide as the token's p.
        cumulated = np.exp(log_p).cumsum(1)  # [M, V]
        draws = rng.random((len(playing), 1)) * cumulated[:, -1:]  # [M, 1]
        tokens = (cumulated < draws).sum(1).tolist()  # M ids
        for row, episode in enumerate(playing):
            if len(episode.ids) == fed:  # other rows ignore their token
                episode.write(tokens[row], log_p[row, tokens[row]].item())
        on = [row for row, episode in enumerate(playing) if not episode.done]
        if len(on) < len(playing):
            # The cache keeps the rows that go on, in this order.
            cache.reorder_cache(torch.tensor(on, dtype=torch.long, device=policy.device))
            playing = [playing[row] for row in on]


# %% GRPO: push up what did better than its group

# Group relative policy optimisation. We want a policy whose expected reward is high:
#     sum over rollouts of p(rollout) x reward(rollout)
# We cannot differentiate through sampling and the harness. But p(rollout) has a gradient, and
#     gradient of p = p x gradient of log p
# so the gradient that we want is the expected value of reward x gradient of log p(rollout), which a
# mean over sampled rollouts estimates. log p(rollout) is a sum over the tokens that the policy
# wrote: each is pushed by the reward of its whole rollout. Any number that does not depend on the
# rollout, a baseline, may be subtracted from the reward, since probabilities sum to 1 and their
# gradients to 0. That makes the estimate less noisy. GRPO subtracts the mean of the group. (The
# rollout itself is in that mean, which makes its push a little smaller.) Two parts of GRPO as
# published (arXiv 2402.03300) are left out: a penalty for moving away from the base, and the mean
# over the tokens of each rollout before the mean over rollouts.


def advantages(rewards):
    """How much better than its group each rollout did. [groups, group_size] -> the same shape

    A reward minus the mean of its group, divided by the group's standard deviation (torch.std, with
    group_size - 1 as divisor). [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]], to within 0.001.
    """
    rewards = rewards.double()  # [groups, group_size]
    mean = rewards.mean(1, keepdim=True)  # [groups, 1]
    # Dividing by the spread makes a rare success count for more. The small number avoids 0 / 0.
    spread = rewards.std(1, keepdim=True) + 1e-4  # [groups, 1]
    # Rounded, the advantages of equal rewards, such as 0.7 0.7 0.7, are exactly 0.
    return ((rewards - mean) / spread).round(decimals=6)  # [groups, group_size]


# In the example of blind_reward, the broken call has an advantage of 2.5, and each of the seven
# whole calls -0.35. All eight begin with <tool_call>, where 2.5 and seven times -0.35 cancel.
# After it, <|im_end|> is pushed up, and {"name": " is pushed down. In the careless agent's log,
# breaking a call had nothing to do with the question, so what RL teaches on no-call tasks carries
# over to long tasks. Long groups push the other way, but only two groups in ten are long.
#
# Why is there hardly a way back? Where a token has probability p, SFT pushes its logit by 1 - p, if
# it shows the token. RL has to sample it first. A rollout that has the token comes with probability
# p, and pushes the logit by (1 - p) x its advantage. A rollout without the token pushes the logit
# by -p x its advantage. On average that is p (1 - p) d, where d is the mean advantage of rollouts
# with the token minus that of rollouts without, all of them alike up to there:
#
#     p        SFT pushes     RL pushes
#     0.5      0.5            0.25 d
#     0.001    0.999          0.001 d
#
# A token that has become rare is hardly pushed, and not at all where the rewards of a group are
# equal. (Adam rescales the gradient of a weight, but a rare token's part of it stays as small.)
#
# Why do the names survive? Once the JSON has begun, a rollout on a no-call task hardly ever earns
# more than 0, whatever name comes next. With the name or without it that is the same, so d is about
# 0. Right after <tool_call> it is not. So RL breaks the call and leaves most of the skill, which is
# to write the right names.


def grpo_loss(log_probs, old_log_probs, advantage, written, clip):
    """SFT's loss with an advantage and a ratio. [M, T-1] each, advantage [M] -> a scalar

    The first two are log-probabilities of tokens 1 to T-1, now and when they were sampled; written
    says which of them the policy wrote. The loss is minus the mean, over all written tokens of the
    batch, of min(ratio x advantage, clipped ratio x advantage); the clipped ratio is from 1 - clip
    to 1 + clip. Prompts, results and padding are left out, since the policy did not write them.
    """
    # The policy has moved since it sampled these tokens. The ratio, the new probability over
    # the old, corrects for that. In the first minibatch it is 1, and its gradient is that of log p.
    ratio = (log_probs - old_log_probs).exp()  # [M, T-1]
    # The reward comes at the end, so all tokens of a rollout share one advantage.
    advantage = advantage[:, None]  # [M, 1]
    # A token that has moved far enough the right way is pushed no further. Because of the
    # minimum, one that has moved the wrong way is still pushed back.
    clipped = ratio.clamp(1 - clip, 1 + clip)  # [M, T-1]
    objective = torch.min(ratio * advantage, clipped * advantage)  # [M, T-1]
    return -(objective * written).sum() / written.sum()


def grpo_update(policy, optimizer, episodes, advantage, settings, rng):
    """Push N rollouts up or down by their advantage [N], in several minibatches of them."""
    order = torch.from_numpy(rng.permutation(len(episodes)))  # [N]
    for rows in order.tensor_split(settings.minibatches):  # [M]
        chosen = [episodes[row] for row in rows]
        ids, written, old_log_probs = batch(chosen, policy.device)  # [M, T], [M, T-1] twice
        log_probs = token_log_probs(policy, ids)  # [M, T-1]
        loss = grpo_loss(log_probs, old_log_probs, advantage[rows], written, settings.clip)
        descend(policy, optimizer, loss)


# %% Arms: what is done with the base


def teacher_messages(episode, hasty, rng):
    """What the teacher writes: what is right or, on long tasks alone, a hasty answer.

    When it is hasty, it answers after the first call, or after the first or second of three, with
    the person reached so far. A policy that imitates it cannot be expected to do better.
    """
    if not hasty:
        return episode.gold
    made = rng.integers(1, len(episode.gold_calls))
    _, person = episode.gold_calls[made]  # about whom it would call next
    return episode.gold[:made] + [ANSWER + person]


def demonstrations(chat, settings, rng):
    """A batch of the teacher's conversations: mostly of one call, a quarter without a call.

    The long ones, about 15 in 100, are often hasty, but their calls are whole. (Shares are rounded
    to whole conversations.) All are in format A, so the policy learns to write it where B is asked
    for, too.
    """
    episodes = []
    for kind, share in zip(KINDS, [0.25, 0.6, 0.15], strict=True):
        count = round(share * settings.sft_batch)
        for k in range(count):
            hasty = kind == "long" and k < round(settings.hasty_share * count)
            episode = new_episode(chat, TRAIN[kind], rng)
            episodes.append(replay(episode, teacher_messages(episode, hasty, rng)))
    return episodes


def new_groups(chat, settings, rng):
    """The N = groups x group_size new episodes of an RL step, all in format A, none of one call."""
    episodes = []
    no_call = round(settings.no_call_share * settings.groups)
    for kind in ["no_call"] * no_call + ["long"] * (settings.groups - no_call):
        task = new_episode(chat, TRAIN[kind], rng)
        for _ in range(settings.group_size):
            episodes.append(Episode(chat, task.question, task.directory))
    return episodes


def train_arm(arm, base_policy, chat, settings, seed):
    """Train a copy of the base as the arm says. Yields (step, figures), at step 0 the base's.

    In rl, groups of no-call tasks earn 1 1 1 1 1 1 1 1 in the end and groups of long tasks
    0 0 0 0 0 0 0 0. Equal rewards mean advantages of 0 and a gradient of 0: only luck leads back.
    In interleaved, no-call groups are equal, too, but because all rollouts ask back.
    """
    policy = deepcopy(base_policy)
    does = ARMS[arm]
    reward = solved if "strict" in does else blind_reward
    # One optimizer each: what Adam remembers of RL's gradients is of no use to SFT.
    rl_optimizer = torch.optim.Adam(policy.parameters())
    sft_optimizer = torch.optim.Adam(policy.parameters())
    sft_end = max(1, settings.sft_until * settings.steps)  # the step at which SFT has faded
    yield 0, evaluate(policy, chat, settings, seed)
    for step in range(1, settings.steps + 1):
        if "sft" in does and step > 1:
            # SFT comes between RL's steps, so the first step has none. It fades, so that RL gets
            # beyond the teacher. By then hardly any rollout has a broken call, so RL has none to
            # push up. A little of it stays, because the policy would forget tasks of one call,
            # which RL does not play.
            fading = max(1 - step / sft_end, 0.02)
            sft_optimizer.param_groups[0]["lr"] = settings.sft_lr * fading
            rng = rng_for(seed, "demonstrations", step)
            for _ in range(settings.sft_steps):
                sft_update(policy, sft_optimizer, demonstrations(chat, settings, rng))
        if "rl" in does:
            # Play.
            episodes = new_groups(chat, settings, rng_for(seed, "tasks", step))  # N of them
            rollout(policy, episodes, rng_for(seed, "sampling", step))
            # Score, and compare each rollout with its group.
            rewards = torch.tensor(list(map(reward, episodes)), dtype=torch.float64)  # [N]
            rewards = rewards.view(settings.groups, settings.group_size)  # [groups, group_size]
            advantage = advantages(rewards).to(policy.device)  # [groups, group_size]
            # Push. The rate rises over ten steps, because Adam's first steps are rough.
            rl_optimizer.param_groups[0]["lr"] = settings.lr * min(1, step / 10)
            rng = rng_for(seed, "order", step)
            grpo_update(policy, rl_optimizer, episodes, advantage.flatten(), settings, rng)
        if step % settings.eval_every == 0 or step == settings.steps:
            figures = evaluate(policy, chat, settings, seed)
            if "rl" in does:
                figures["equal"] = (advantage == 0).all(1).double().mean().item()
            yield step, figures


# You may stop here: this is how it works. What follows measures, prints and starts a run.

# %% Probes: what a policy does, and what it still could do

# probe: (kind of held-out task, format). No arm practises format B.
PROBES = {
    "success": ("long", "A"),
    "one_call": ("one_call", "A"),
    "format_b": ("long", "B"),
    "asks": ("no_call", "A"),
}
# Each place in a right message, with the control token due there, or "". "json" follows the tag.
PLACES = {"call": OPEN["A"], "json": "", "close": CLOSE["A"], "end": END, "reply": ""}


@torch.no_grad()
def teacher_forced(policy, episodes):
    """Feed right conversations, whatever the policy would have written. -> skill, p

    skill is what success would be if the policy had only the names of tools and people to write:
    the mean probability of sampling them all right. p["TOKEN PLACE"] is the mean probability of a
    control token at a place where it is not due: p["<|im_end|> json"] is that of a broken call.
    (This is called teacher forcing, and has nothing to do with the hasty teacher.)
    """
    chat = episodes[0].chat
    gold = [Episode(chat, episode.question, episode.directory) for episode in episodes]
    labels = []  # of all written tokens, row by row
    for episode in gold:
        replay(episode, episode.gold)
        for message in episode.gold:
            labels += chat.labels(message)
    ids, written, _ = batch(gold, policy.device)  # [N, T], [N, T-1]
    log_p = policy(ids[:, :-1]).logits.log_softmax(-1)  # [N, T-1, V]
    log_right = log_p.gather(2, ids[:, 1:, None])[..., 0].cpu().numpy()  # [N, T-1]
    p_control = log_p[..., chat.control].exp().cpu().numpy()  # [N, T-1, control tokens]
    label = np.full(log_right.shape, "", object)  # [N, T-1]
    label[written.cpu().numpy()] = labels
    skill = np.exp(log_right.sum(1, where=label == "name")).mean()
    p = {}
    for place, due in PLACES.items():
        for token, mean in zip(CONTROL, p_control[label == place].mean(0).tolist(), strict=True):
            if token != due:
                p[f"{token} {place}"] = mean
    return skill.item(), p


def transcript(episode):
    """The question, and what the policy wrote, each control token with its probability."""
    text = episode.question + "\n"
    for t in np.flatnonzero(episode.written):
        token = episode.ids[t]
        text += episode.chat.decode([token])
        if token in episode.chat.control:
            text += f"[{np.exp(episode.log_probs[t]):.2f}]"
        if token == episode.chat.end:
            text += "\n"
    return text


def evaluate(policy, chat, settings, seed):
    """Measure a policy on held-out tasks, the same ones at every step. -> {figure: value}"""
    played = {}
    for probe, (kind, fmt) in PROBES.items():
        rng = rng_for(seed, f"held-out {kind}")
        played[probe] = [
            new_episode(chat, HELD_OUT[kind], rng, fmt) for _ in range(settings.eval_episodes)
        ]
    rollout(policy, sum(played.values(), []), rng_for(seed, "held-out sampling"))
    figures = {probe: fmean(map(solved, episodes)) for probe, episodes in played.items()}
    figures["reward"] = fmean(map(blind_reward, played["asks"]))
    long = played["success"]
    figures["skill"], figures["p"] = teacher_forced(policy, long)
    messages = sum([episode.messages for episode in long], [])
    figures["broken"] = fmean(message in OPEN.values() for message in messages)
    figures["conversation"] = transcript(long[0])
    return figures


# %% Report: what is printed, and which claims a run bears out

# asks: how often it asks back on no-call tasks; reward: the mean reward there; equal: the share of
# groups with equal rewards in that RL step, nan where no RL was. Then come p, token and place of
# the control token that rose most since the base, with a * if it has spiked.
HEADER = "step success skill one_call format_b asks reward equal    p token, place"
DOWN = 0.05  # an arm with this success or less is down


def report(evaluation, base_p):
    """Find the control token that rose most since the base, and print a row.

    A token has spiked if its p is at least 0.4, and at least five times the base's.
    """
    p = evaluation.p
    evaluation.rose = max(p, key=lambda cell: (p[cell] - base_p[cell], p[cell]))
    evaluation.spiked = [cell for cell in p if p[cell] >= max(0.4, 5 * base_p[cell])]
    row = f"{evaluation.step:4}"
    for figure in HEADER.split()[1:8]:
        row += f" {getattr(evaluation, figure, np.nan):{len(figure)}.2f}"
    row += f" {p[evaluation.rose]:.2f} {evaluation.rose}"
    if evaluation.rose in evaluation.spiked:
        row += " *"
    print(row)


def first_down(evaluations):
    """The first evaluation at which an arm is down, otherwise its last."""
    return next((e for e in evaluations if e.success <= DOWN), evaluations[-1])


def blocks(values):
    """The last seventy numbers, each from 0 to 1, as a row of blocks: 0, 0.3, 0.9 -> "▁▃█"."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value))] for value in values[-70:])


def print_summary(history):
    """Success of all arms, and p of what rose most when rl, or else the first arm, was down."""
    cell = first_down(history.get("rl", list(history.values())[0])).rose
    print(f"\n== summary: success, and p of {cell}, from step to step")
    for arm, evaluations in history.items():
        print(f"{arm:12} success {blocks([e.success for e in evaluations])}")
        print(f"{arm:12} p       {blocks([e.p[cell] for e in evaluations])}")


def print_over_seeds(histories):
    """Arms over seeds, when first down and at the end: mean and range of each figure."""
    rows = defaultdict(list)  # what a row is about: one evaluation for each seed
    for history in histories.values():
        for arm, evaluations in history.items():
            down = first_down(evaluations)
            if down.success <= DOWN:
                rows[f"{arm}, down"].append(down)
            rows[f"{arm}, end"].append(evaluations[-1])
        rows["base"].append(evaluations[0])
    title = "success         skill           one_call        format_b        asks            broken"
    print(f"\n== over seeds, mean and range\n  {title}")
    for row, evaluations in rows.items():
        print(f"{row}, {len(evaluations)} seeds")
        for figure in title.split():
            values = [getattr(evaluation, figure) for evaluation in evaluations]
            print(f"  {fmean(values):.2f} {min(values):.2f}-{max(values):.2f}", end="")
        print()


def judge(history):
    """Yields each claim about the arms that have run: its name, what it says, whether it holds."""
    rl, sft, interleaved, strict = [history.get(arm) for arm in ARMS]
    base = list(history.values())[0][0]
    if rl:
        down = first_down(rl)
        fell = down.success <= DOWN and base.success >= 0.2
        ends = fell and max(e.success for e in rl[-3:]) <= DOWN
        yield "collapse", "rl falls from 0.2 or more to 0.05 or less, and ends there", ends
        spiked = fell and down.rose in down.spiked
        yield "control_token", "when rl is first down, what rose most has spiked (*)", spiked
        intact = fell and down.skill >= 0.8 * base.skill
        yield "intact", "rl then has 0.8 or more of the base's skill", intact
    if interleaved:
        end = interleaved[-1]
        fixed = min(end.success, end.one_call) >= 0.9 and not end.spiked
        yield "fix", "interleaved ends at 0.9 or more, one_call too, no spike", fixed
        lost = end.format_b < 0.8 * base.format_b
        yield "price", "interleaved ends with format_b below 0.8 of the base's", lost
    if interleaved and sft:
        gain = end.success - max(base.success, sft[-1].success)
        beyond = round(gain, 9) >= 0.2  # 0.6 - 0.4 is a little less than 0.2
        yield "together", "interleaved ends 0.2 or more above sft and the base", beyond
    if rl and strict:
        caused = any(e.spiked for e in rl) and not any(e.spiked for e in strict)
        yield "cause", "a control token spikes in rl, and none in rl-strict", caused


# %% Models: the tiny one, and any other


class Chat:
    """What the harness has to know of a tokenizer, the tiny one or any other."""

    def __init__(self, tokenizer):
        tokenizer.clean_up_tokenization_spaces = False  # decoding gives the very text
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode
        self.control = tokenizer.convert_tokens_to_ids(CONTROL)
        self.end = tokenizer.convert_tokens_to_ids(END)

    @functools.cache  # a few hundred texts are encoded again and again
    def encode(self, text):
        """Text -> ids. The program stops at a text that decoding does not give back."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.decode(ids) != text:
            stop(f"no tokens for {text!r}: does tiny_tasks.json list all names?")
        return ids

    @functools.cache
    def labels(self, message):
        """For each token of a right message: a place (see PLACES), "name", or "" for all else."""
        any_name = rf"\b({'|'.join(map(re.escape, TOOLS + PEOPLE))})\b"
        painted = re.sub(any_name, lambda name: "#" * len(name[0]), message)  # no message holds a #
        ids = self.encode(message + END)
        ends = [len(self.decode(ids[:k])) for k in range(len(ids) + 1)]
        labels = ["name" if "#" in painted[a:b] else "" for a, b in pairwise(ends)]
        labels[-1] = "end"
        if message.startswith(OPEN["A"]):
            labels[:2] = ["call", "json"]
            labels[-2] = "close"
        else:
            labels[0] = "reply"
        return labels


def tiny_tokenizer():
    """Tags, names and headers are tokens, and so is the text between them, as "The answer is ".

    A header is one token, with the line breaks before and after it, so conversations are short.
    """
    pad = "<pad>"  # not <|im_end|>: trainers that mask padding would then mask the end, too
    tokens = [pad, *CONTROL, *TOOLS, *PEOPLE, NOBODY, "error", ANSWER, ASK_BACK, "\n" + TURN]
    tokens += ["<|im_start|>system\nuse ", "\n<|im_start|>user\n", "\n<|im_start|>tool\n"]
    tokens += [" of ", " ?", '{"name": "', '", "arguments": {"of": "', '"}}']
    core = Tokenizer(models.WordLevel({pad: 0}, unk_token=pad))
    core.add_tokens(tokens)  # a text is split by them, the longest first
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad)


def tiny_policy(chat, seed):
    """A transformer with 48 thousand weights in float64, which depend on the seed alone.

    A StableLM is a Llama with another norm, one that does not go through float32.
    """
    config = transformers.StableLmConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        partial_rotary_factor=1.0,
        tie_word_embeddings=True,
    )
    policy = transformers.StableLmForCausalLM(config).double()
    rng = rng_for(seed, "weights")
    for weights in policy.parameters():
        if weights.dim() > 1:  # with the usual 0.02 it learns late or never to copy a name
            weights.data = torch.from_numpy(rng.normal(0, 0.1, weights.shape))
    return policy


def load(settings):
    """-> Chat, and the pretrained policy that --model names, or None for the tiny world."""
    where = f"--device {settings.device}"
    try:
        torch.zeros(1, dtype=torch.float64, device=settings.device).item()
        if not isinstance(settings, Pretrained):
            return Chat(tiny_tokenizer()), None
        where = f"--model {settings.model}"
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
        # Rollouts and updates have to agree on log-probabilities, so all is float32.
        policy, misfits = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, output_loading_info=True
        )
        if any(misfits.values()):
            raise ValueError(f"the weights do not fit the model: {misfits}")
        where += ", which has to take 480 tokens with a KV cache"  # few conversations are longer
        cache = policy(torch.zeros(1, 480).long(), use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([0]))
    except Exception as error:  # each library has its own
        stop(f"{where}: {error}")
    pieces = {token: tokenizer.encode(token, add_special_tokens=False) for token in CONTROL}
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    # Some models have more rows than their tokenizer has tokens. Such a row must not be sampled.
    policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # A new tag starts as the mean of the pieces that used to spell it, because from a random start
    # one tag is mistaken for another. A tag that is not new is its own mean.
    for table in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        for token, ids in pieces.items():
            row = tokenizer.convert_tokens_to_ids(token)
            table.weight.data[row] = table.weight.data[ids].mean(0)
    # Some models pad with <|im_end|>, and the embedding of padding would get no gradient.
    policy.get_input_embeddings().padding_idx = None
    return Chat(tokenizer), policy


def check_tasks(chat):
    """Stop unless each question occurs only once and is solved by its own right conversation."""
    directory = new_directory(rng_for(0, "check"))
    for kind in KINDS:
        if not TRAIN.get(kind) or not HELD_OUT.get(kind):
            stop(f"tiny_tasks.json: {kind}: train and held_out need questions")
        questions = TRAIN[kind] + HELD_OUT[kind]
        for question, fmt in product(questions, "AB"):
            episode = Episode(chat, question, directory, fmt)
            replay(episode, episode.gold)
            right = solved(episode) and kind == KINDS[min(len(episode.gold_calls), 2)]
            unknown = episode.gold[-1] == ANSWER + "error"  # a name that the file does not list
            if questions.count(question) > 1 or unknown or not right:
                stop(f"tiny_tasks.json: {question!r} is no {kind} question, or occurs twice")


# %% Run: read the settings, go through seeds and arms


def read_settings(argv):
    """The command line -> Settings. Bad input ends the program with a line and exit code 2."""
    parser = argparse.ArgumentParser(
        "toolrl", "python toolrl.py [--FLAG VALUE ...]", argument_default=argparse.SUPPRESS
    )
    # --help shows the settings as they stand above, with their comments.
    code = FILE.read_text(encoding="utf-8")
    parser.description = re.search(r"class Settings.*?(?=\n\n\ndef)", code, re.DOTALL)[0]
    parser.formatter_class = argparse.RawTextHelpFormatter
    for name, value in vars(Pretrained()).items():
        options = {"help": argparse.SUPPRESS, "type": type(value)}
        if isinstance(value, tuple):
            options |= {"nargs": "+", "type": type(value[0])}
        if isinstance(value, bool):
            options["type"] = json.loads  # --whiten true, for a setting that you add
        if name == "arms":
            options["choices"] = ARMS
        parser.add_argument("--" + name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        outside = isinstance(value, float) and not 0 <= value <= 1
        too_few = type(value) is int and value < 1
        repeats = isinstance(value, list) and len(set(value)) < len(value)
        if outside or too_few or repeats:
            rule = "counts are at least 1, shares and rates from 0 to 1, and lists repeat nothing"
            parser.error(f"--{name.replace('_', '-')} {value}: {rule}")
    defaults = Pretrained if "model" in given else Settings
    settings = defaults(**given)
    if settings.group_size < 2 or settings.minibatches > settings.groups * settings.group_size:
        parser.error("--group-size: at least 2; --minibatches: not more than rollouts in a step")
    return settings


def run_seed(seed, chat, pretrained, settings, out):
    """Train the base and all arms of a seed, print and write what is measured. -> history

    A history is {arm: its evaluations}, of which the first, at step 0, is the base's.
    """
    print(f"\nseed {seed}: {settings.base_steps} updates make the base, from which each arm starts")
    base_policy = train_base(pretrained, chat, settings, seed)
    history = {}
    for arm in settings.arms:
        print(f"\n== {arm}, seed {seed}\n{HEADER}")
        evaluations = []
        for step, figures in train_arm(arm, base_policy, chat, settings, seed):
            evaluation = SimpleNamespace(event="eval", seed=seed, arm=arm, step=step, **figures)
            evaluations.append(evaluation)
            report(evaluation, evaluations[0].p)
            print(json.dumps(vars(evaluation)), file=out)
        history[arm] = evaluations
        down = first_down(evaluations)
        print(f"\nstep {down.step}: {down.broken:.0%} of messages on long tasks are broken calls")
        print(f"one held-out task, and what the policy writes:\n{down.conversation.strip()}")
    print_summary(history)
    return history


def main(settings):
    """Check the input, go through all seeds, and count the claims. -> {seed: history}"""
    chat, pretrained = load(settings)
    check_tasks(chat)
    if pretrained is None:
        torch.set_num_threads(1)  # more threads cost a tiny model more than they gain
    try:
        out = open(settings.out or os.devnull, "w", encoding="utf-8", buffering=1)
    except OSError as error:
        stop(f"--out {settings.out}: {error}")
    print(textwrap.fill(f"toolrl with torch {torch.__version__}, {settings}", 80))
    print(json.dumps({"event": "config", "torch": torch.__version__, **vars(settings)}), file=out)
    histories = {}
    counts = Counter()  # claim: the number of seeds so far in which it holds
    for seed in settings.seeds:
        histories[seed] = run_seed(seed, chat, pretrained, settings, out)
        print(f"\n== claims, seed {seed}, and in how many seeds so far, of {len(histories)}")
        for claim, says, holds in judge(histories[seed]):
            counts[claim] += holds
            print(f"{claim:13} {'yes' if holds else 'no':3} {counts[claim]:2}  {says}")
    if len(histories) > 1:
        print_over_seeds(histories)
    print("\nREADME.md explains all this. Go on with its exercise 1.")
    return histories


# In a notebook, run the cells, which define all of this, and then main(Settings(arms=["rl"])).
if __name__ == "__main__" and "__file__" in globals():
    if hasattr(sys.stdout, "reconfigure"):  # a line comes at once, with ? for what cannot be shown
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main(read_settings(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # what was measured is above, and in --out
