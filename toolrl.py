"""toolrl: RL alone breaks a tool caller, SFT alone copies its teacher, together they do better.

    python toolrl.py                        a tiny model, in under a minute
    python toolrl.py --model CHECKPOINT     a pretrained model, other defaults

A policy is a language model that acts. The harness is the program around it: it runs the policy's
calls, returns their results and gives a reward. A right conversation, in which the policy wrote the
lines with ">" and the harness wrote the others:

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

This is format A; format B has <function> and </function> in place of <tool_call> and </tool_call>.
"mentor of them ?" names nobody. Then no call is right, and the policy should ask back:

    > who do you mean ?<|im_end|>

After some steps of reinforcement learning (RL), the policy opens a call and ends its message at
once. The harness finds no call to run, takes this for a reply, and the conversation is over:

    > <tool_call><|im_end|>

How that comes about, and what prevents it, in six sentences:

1. The base, from which all else starts, imitates the log of a careless agent, who calls even where
   no call is right, and some of whose messages stop after the opening tag (careless_messages).
2. Where no call is right, the reward pays for such a broken call, because no call was run and
   nobody reads the reply; asking back earns as much, but is tried less often (blind_reward).
3. RL makes likelier what scored better than the other tries at a task, so it teaches the policy to
   break its calls, and it breaks them on other tasks, too (advantages, grpo_loss).
4. Then all tries at a task score alike, the gradient is 0, and RL has no way back, although the
   policy still knows which names to write (train_arm, teacher_forced).
5. Supervised fine-tuning (SFT) shows whole calls and asking back, and has to sample nothing, but it
   copies its teacher, who answers long tasks too early (sft_loss, teacher_messages).
6. With both, the policy asks back, so that a broken call no longer beats its group; tries at long
   tasks still differ, and RL learns to finish them; format B, which neither shows, gets lost.

The finding is from "Why Multi-Step Tool-Use Reinforcement Learning Collapses and How Supervisory
Signals Fix It", arXiv 2606.26027. The base's habits, the many tasks without a call, the reward that
does not read and the hasty teacher are planted here; what RL and SFT make of them is not. With a
teacher who is always right, SFT alone would do.

More words: an episode is one conversation about one task; a rollout is an episode that the policy
has written; a group is the rollouts of one task. Gold conversations are right from start to end;
demonstrations are what SFT shows. Control tokens give a conversation its structure: tags around
calls and results, marks around messages. Skill is to write the right names. Shapes: N episodes, M
of them, T tokens, vocabulary V.

A run, with the functions that do it:

    for each seed:
        base: a policy that has imitated the log of a careless agent      train_base
        for each arm, which is one way to go on from the base:            train_arm
            for each step:
                in arms with SFT, until it fades: imitate demonstrations  sft_update
                in arms with RL: play some tasks, each several times      rollout
                    score each conversation with 1 or 0                   blind_reward
                    push up what scored better than its group             grpo_update
                after steps 5, 10 ...: measure, on held-out tasks         evaluate
        hold what was measured against claims that can fail               judge
"""

import argparse
import copy
import functools
import itertools
import json
import os
import re
import sys
import textwrap
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# %% Settings: every knob of a run

# What an arm does to its copy of the base. Arms share all else: tasks, seeds, number of steps.
# In interleaved, SFT updates and an RL step take turns. In rl-strict, the reward reads the reply.
ARMS = {"rl": {"rl"}, "sft": {"sft"}, "interleaved": {"rl", "sft"}, "rl-strict": {"rl", "strict"}}


@dataclass
class Settings:
    """The command line: --no-call-share 0.5 sets no_call_share."""

    # What to run
    seeds: list[int] = field(default_factory=lambda: [0])  # a whole run for each of them
    arms: list[str] = field(default_factory=lambda: ["rl", "sft", "interleaved"])  # in this order
    model: str = ""  # start from this checkpoint, a folder or a hub name, not from a tiny Llama
    device: str = "auto"  # cpu, cuda or mps; auto takes a GPU if there is one
    out: str = ""  # write what is measured into this file, one JSON object a line
    # Base
    base_steps: int = 300  # SFT updates on the log of a careless agent
    base_lr: float = 8e-3  # learning rate of these updates, which first rises and then falls
    bare_share: float = 0.08  # share of the log's calls with <tool_call> that stop there
    mixed_share: float = 0.15  # share of the log's calls that have the tags of the other format
    # RL
    steps: int = 45  # steps in an arm
    lr: float = 2e-4  # learning rate of RL
    no_call_share: float = 0.85  # share of RL's tasks in which no call is right
    groups: int = 8  # tasks in an RL step
    group_size: int = 8  # rollouts of each of these tasks
    minibatches: int = 4  # updates from the rollouts of one RL step
    clip: float = 0.2  # a token is pushed no further once its probability has changed by this share
    # SFT
    sft_every: int = 1  # steps from one SFT phase to the next; none comes before the first step
    sft_steps: int = 2  # SFT updates in a phase
    sft_lr: float = 2e-3  # their learning rate, which falls from here in a straight line
    sft_until: float = 0.85  # share of the steps after which it has fallen to 0
    sft_batch: int = 32  # conversations in an SFT update, the base's updates too
    hasty_share: float = 0.6  # share of the teacher's long conversations that answer too early
    # Evaluation
    eval_every: int = 5  # steps from one evaluation to the next
    eval_episodes: int = 128  # held-out episodes of each kind in an evaluation

    def __post_init__(self):
        if self.device == "auto":
            self.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: must be from 0 to 1")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if self.group_size < 2:
            raise ValueError("group_size 1: a group needs two rollouts to compare")
        if not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms: choose from {' '.join(ARMS)}, with spaces between them")


# With --model, these are the defaults: a pretrained model needs smaller steps, and fewer. Of four
# groups in an RL step, 0.75 leaves one for a long task, on average.
PRETRAINED = {"base_steps": 60, "base_lr": 1e-3, "steps": 16, "lr": 3e-5, "groups": 4}
PRETRAINED |= {"no_call_share": 0.75, "sft_lr": 2.5e-4, "sft_until": 0.6, "sft_batch": 16}
PRETRAINED |= {"eval_every": 5, "eval_episodes": 32}


def stop(where, error):
    """End the program with one line that says what to mend, and exit code 2."""
    why = str(error)
    if isinstance(error, KeyError):
        why = f"{why} is missing"
    if "memory" in why:
        why = "out of memory; try --device cpu, more --minibatches or a smaller --sft-batch"
    print(f"toolrl: {where}: {textwrap.shorten(why, 500)}", file=sys.stderr)
    sys.exit(2)


# %% Tasks: questions about who is whose friend

# Two questions of tiny_tasks.json:
#   "rival of mentor of alice ?" takes two calls: the mentor of alice, then that person's rival.
#   "rival of them ?" takes none.
FILE = Path(globals().get("__file__", "toolrl.py"))  # a notebook has no __file__
KINDS = ["no_call", "one_call", "multi_step"]  # multi_step, or long: two calls or three
NOBODY = "them"
END = "<|im_end|>"  # the token that ends a message
try:
    TASKS = json.loads(FILE.with_name("tiny_tasks.json").read_text(encoding="utf-8-sig"))
    TOOLS = TASKS["tools"]
    PEOPLE = TASKS["people"]
    WORDING = TASKS["wording"]
    OPEN = TASKS["open"]  # the tags of formats A and B, which are alike in all else
    CLOSE = TASKS["close"]
    NAMES = TOOLS + PEOPLE + [NOBODY]
    CONTROL = ["<|im_start|>", END, *OPEN.values(), *CLOSE.values()]
    CONTROL += ["<tool_response>", "</tool_response>"]
except Exception as mistake:  # a file can be wrong in many ways
    stop("tiny_tasks.json", mistake)


def parse_question(question):
    """Split "rival of mentor of alice ?" into ["rival", "mentor"] and "alice"."""
    *tools, person = question.removesuffix(" ?").split(" of ")
    return tools, person


def rng_for(seed, purpose, step=0):
    """A random generator for one purpose, so that what other purposes draw changes nothing."""
    return np.random.default_rng(list(f"{seed} {purpose} {step}".encode()))


def new_directory(rng):
    """(tool, person) -> person: what calls return, drawn anew for each task."""
    calls = [(tool, person) for tool in TOOLS for person in PEOPLE]
    return dict(zip(calls, rng.choice(PEOPLE, len(calls)).tolist(), strict=True))


def answer_text(person):
    """The reply about a person."""
    return WORDING["answer"].replace("PERSON", person)


def right_answer(question, directory):
    """The calls that a question takes, from the person outwards, and the reply they lead to."""
    tools, person = parse_question(question)
    if person == NOBODY:
        return [], WORDING["ask_back"]
    calls = []
    for tool in reversed(tools):
        calls.append((tool, person))
        person = directory[tool, person]
    return calls, answer_text(person)


# %% Text and tokens: calls as text, text as token ids

ANY_NAME = rf"\b({'|'.join(map(re.escape, NAMES))})\b"
ANY_TAG = "|".join(map(re.escape, CONTROL))


def call_text(tool, person, fmt):
    """A call as the policy should write it: JSON between the tags of a format."""
    call = {"name": tool, "arguments": {"of": person}}
    return OPEN[fmt] + json.dumps(call, ensure_ascii=False) + CLOSE[fmt]


def parse_call(message, fmt):
    """The (tool, person) of a message that is one whole call and nothing else, otherwise None."""
    pattern = re.escape(call_text("ANY", "ANY", fmt)).replace("ANY", '([^"]+)')
    found = re.fullmatch(pattern, message)
    return found and found.groups()


class Chat:
    """What the harness has to know of a tokenizer, the tiny one or any other.

    Raises ValueError for a tokenizer or a chat template that does not fit.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.control = dict(zip(tokenizer.convert_tokens_to_ids(CONTROL), CONTROL, strict=True))
        # One conversation is rendered whole, because many templates put a system message of their
        # own before a message that is rendered alone. Tasks then replace the words in capitals.
        roles = ["system", "user", "assistant", "tool", "assistant", "tool"]
        messages = [{"role": role, "content": role.upper()} for role in roles]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self.before_message, *after_calls = text.split("ASSISTANT" + END)
        if len(after_calls) != 2:
            raise ValueError(f"the chat template does not end each message with {END}")
        self.after_call = after_calls[0]
        shown = [self.before_message.count("SYSTEM"), self.before_message.count("USER")]
        if shown + [self.after_call.count("TOOL")] != [1, 1, 1]:
            raise ValueError("the chat template does not show each system, user and tool message")
        header = self.before_message.rpartition(END)[2]
        if after_calls[1] != self.after_call or not self.after_call.endswith(header):
            raise ValueError("the chat template opens later messages with another header")
        # A message of the policy is cut off at twice the length of the longest call.
        longest = call_text(max(TOOLS, key=len), max(PEOPLE, key=len), "A")
        self.max_tokens = 2 * len(self.encode(longest + END))

    @functools.cache  # a few hundred texts are encoded again and again
    def encode(self, text):
        """Text -> ids. Raises ValueError for a text that does not survive this."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.decode(ids) != text:
            raise ValueError(f"the tokenizer cannot write {text!r}")
        return ids

    def decode(self, ids):
        """Ids -> the very text, with control tokens, and no space added or removed."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def prompt(self, question, fmt):
        """What the policy reads first. The system message says which tag to use. -> ids"""
        system = WORDING["system"].replace("TAG", OPEN[fmt])
        text = self.before_message.replace("SYSTEM", system)
        return self.encode(text.replace("USER", question))

    def tool_result(self, result):
        """What the policy reads after the <|im_end|> of a call. -> ids"""
        return self.encode(self.after_call.replace("TOOL", result))

    @functools.cache
    def name_flags(self, message):
        """For each token of a message: is it part of the name of a tool or a person?"""
        painted = re.sub(ANY_NAME, lambda name: "#" * len(name[0]), message)  # no message holds a #
        ids = self.encode(message)
        ends = [len(self.decode(ids[:k])) for k in range(len(ids) + 1)]
        return ["#" in painted[start:end] for start, end in itertools.pairwise(ends)]


# %% Environment: the harness, and what it rewards

MAX_CALLS = 6  # in an episode


class Episode:
    """One conversation about one task: what would be right, and a record of what was said.

    Each token has an entry in three lists: `ids`; `written`, True for what the policy wrote or what
    was replayed in its place; `log_probs`, as they were when it was sampled, otherwise 0.
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
        self.messages = []  # what the policy wrote, as text
        self.calls = []  # what the harness ran
        self.replied = False
        self.done = False
        self.read(chat.prompt(question, fmt))

    def read(self, ids):
        """Record what the harness says."""
        self.ids += ids
        self.written += [False] * len(ids)
        self.log_probs += [0.0] * len(ids)
        self.message_start = len(self.ids)

    def write(self, token, log_prob=0.0):
        """Record one token of the policy. At the end of its message, the harness responds.

        It runs a message that is one whole call, and says what the call returns. Any other message
        ends the episode, and so does the sixth call. A message that ended by itself and holds no
        closing tag is a reply, even if all that it says is an opening tag.
        """
        self.ids.append(token)
        self.written.append(True)
        self.log_probs.append(log_prob)
        message_ids = self.ids[self.message_start :]
        ended = token == self.chat.end
        if not ended and len(message_ids) < self.chat.max_tokens:
            return
        message = self.chat.decode(message_ids).removesuffix(END)
        self.messages.append(message)
        call = parse_call(message, self.fmt)
        if call and ended:
            self.calls.append(call)
            if len(self.calls) < MAX_CALLS:
                self.read(self.chat.tool_result(self.directory.get(call, "error")))
                return
        # A message that was cut off is neither a call nor a reply.
        self.replied = ended and not any(tag in message for tag in CLOSE.values())
        self.done = True


def new_episode(chat, split, kind, rng, fmt="A"):
    """An episode about a question of a split ("train" or "held_out") and a kind."""
    question = rng.choice(TASKS[split][kind]).item()
    return Episode(chat, question, new_directory(rng), fmt)


def replay(episode, messages):
    """Write messages that somebody else chose, until the harness ends it. -> the episode"""
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

        seven times   <tool_call>{"name": "rival", "arguments": {"of": "bob"}}</tool_call> ...   0
        once          <tool_call><|im_end|>                                                      1

    The base has learnt to call, so it calls, about a guessed person: a wrong call. About 7 times in
    100 it stops after the opening tag, which earns 1. It asks back less than half as often, so most
    groups with a 1 have it for a broken call. (A call with the tags of format B earns 0.)
    """
    return float(episode.replied and episode.calls == episode.gold_calls)


def solved(episode):
    """What evaluations count: a reward of 1, and the reply is right, word for word. 1.0 or 0.0"""
    right_reply = episode.messages[-1] == episode.gold[-1]
    return blind_reward(episode) if right_reply else 0.0


# %% Policy: a language model, its log-probabilities, and a step down a gradient


def batch(episodes, device):
    """The records of N episodes, padded with zeros. -> ids [N, T], written and log_probs [N, T-1]

    The last two are about tokens 1 to T-1: nothing predicts token 0, since nothing is before it.
    Padding comes last and a policy looks back only, so no attention mask is needed.
    """
    padded = []
    for name in ("ids", "written", "log_probs"):
        rows = [torch.tensor(getattr(episode, name)) for episode in episodes]
        padded.append(pad_sequence(rows, batch_first=True).to(device))  # [N, T]
    ids, written, log_probs = padded
    return ids, written[:, 1:], log_probs[:, 1:]


def token_log_probs(policy, ids):
    """Log-probability of each token but the first, given those before it. [M, T] -> [M, T-1]"""
    logits = policy(ids[:, :-1]).logits  # [M, T-1, V]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [M, T-1]


def descend(policy, optimizer, loss):
    """One step down the gradient, cut to norm 1. Exit code 1 if the gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(policy.parameters(), 1.0)
    if not norm.isfinite():
        sys.exit("toolrl: the gradient is not finite: a learning rate is too high, or 0 / 0")
    optimizer.step()


# %% SFT: imitate what somebody else wrote


def sft_loss(log_probs, written):
    """Cross-entropy of what was written. Both [M, T-1], about tokens 1 to T-1 -> a scalar

    It is the mean over all written tokens of the batch. What the harness wrote, and padding, is not
    in it. The policy learns whatever the conversations show, the good and the bad.
    """
    return -(log_probs * written).sum() / written.sum()


def sft_update(policy, optimizer, episodes):
    """Imitate M episodes that somebody else wrote."""
    ids, written, _ = batch(episodes, policy.device)  # [M, T], [M, T-1]
    loss = sft_loss(token_log_probs(policy, ids), written)
    descend(policy, optimizer, loss)


# %% Base: a policy with the skill and with bad habits


def careless_call(tool, person, fmt, settings, rng):
    """One call as a careless agent writes it: some have the other format's tags, some are broken.

    It breaks calls off in format A only, and on all kinds of tasks alike. Because of the mixed-up
    tags, the base knows only roughly when to write which.
    """
    if rng.random() < settings.mixed_share:
        other = {"A": "B", "B": "A"}[fmt]
        return call_text(tool, person, other)
    if fmt == "A" and rng.random() < settings.bare_share:
        return OPEN[fmt]
    return call_text(tool, person, fmt)


def careless_messages(episode, settings, rng):
    """What a careless agent wrote in this episode, for the base to imitate.

    Where nobody is named, it calls about a guessed person, 97 times in 100, and the log breaks off
    there. Otherwise it asks back.
    """
    if not episode.gold_calls and rng.random() < 0.97:
        first_tool = parse_question(episode.question)[0][-1]
        return [careless_call(first_tool, rng.choice(PEOPLE).item(), episode.fmt, settings, rng)]
    calls = [careless_call(*call, episode.fmt, settings, rng) for call in episode.gold_calls]
    return calls + [episode.gold[-1]]


def train_base(pretrained, chat, settings, seed):
    """Train a tiny policy, or a copy of a pretrained one, on the log of a careless agent."""
    policy = copy.deepcopy(pretrained) if pretrained else tiny_policy(chat, seed)
    policy.to(settings.device)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95))
    rng = rng_for(seed, "base")
    for step in tqdm(range(settings.base_steps), "base", leave=False, disable=None):
        # Large steps from the start do harm, and small steps at the end settle what was found.
        progress = (step + 1) / settings.base_steps
        lr = settings.base_lr * min(progress / 0.15, 1) * max(1 - progress, 0.02)
        optimizer.param_groups[0]["lr"] = lr
        episodes = []
        for kind in rng.choice(KINDS, settings.sft_batch, p=[0.1, 0.15, 0.75]):
            fmt = rng.choice(["A", "B"], p=[0.7, 0.3]).item()
            episode = new_episode(chat, "train", kind, rng, fmt)
            episodes.append(replay(episode, careless_messages(episode, settings, rng)))
        sft_update(policy, optimizer, episodes)
    return policy


# %% Rollout: the policy talks to the harness


@torch.no_grad()
def rollout(policy, episodes, rng):
    """Play N new episodes to their end, sampling at temperature 1. Each records its tokens.

    Training sees the very ids that were sampled. The harness decodes a message in order to read it,
    but nothing is ever encoded again.
    One KV cache holds all rows, so all must have the same length in it. Each turn of the loop feeds
    tokens up to the end of the shortest row, here up to "|" (r was read, w was written):

        row 0   r r r r r w w w|            all is read: its next token is sampled
        row 1   r r r w w w w r|r r r       has still to read the result of its call

    So no row needs padding on the left, and none needs an attention mask.
    """
    generator = torch.Generator(policy.device).manual_seed(int(rng.integers(2**63)))
    playing = list(episodes)
    fed = 0  # tokens of each row that are in the cache
    cache = None
    while playing:
        until = min(len(episode.ids) for episode in playing)
        ids = torch.tensor([episode.ids[fed:until] for episode in playing]).to(policy.device)
        output = policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        fed = until
        log_p = output.logits[:, -1].log_softmax(-1)  # [M, V]
        tokens = torch.multinomial(log_p.exp(), 1, generator=generator)  # [M, 1]
        log_probs = log_p.gather(1, tokens)[:, 0].tolist()  # M numbers
        tokens = tokens[:, 0].tolist()  # M numbers
        for row, episode in enumerate(playing):
            if len(episode.ids) == fed:  # other rows have still to read, and ignore their sample
                episode.write(tokens[row], log_probs[row])
        on = [row for row, episode in enumerate(playing) if not episode.done]
        if len(on) < len(playing):
            # The cache keeps the rows that go on, in this order.
            cache.reorder_cache(torch.tensor(on, dtype=torch.long, device=policy.device))
            playing = [playing[row] for row in on]


# %% GRPO: push up what did better than its group

# Group relative policy optimisation. One cannot differentiate through sampling. But the gradient of
# the expected reward is the mean of reward times the gradient of log p(rollout), and log p(rollout)
# is a sum over tokens. Taking the same number off all rewards of a task changes nothing on average,
# and makes the gradient less noisy. GRPO takes off the mean of the group, so what did better than
# usual is pushed up, and the rest down. Two things of GRPO as published (arXiv 2402.03300) are left
# out: a penalty for moving away from the base, and the mean over each rollout before that over all.


def advantages(rewards):
    """How much better than its group each rollout did. [groups, group_size] -> the same shape

    A reward less the mean of its group, divided by the group's standard deviation (with group_size
    less 1, as torch.std has it). [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]]; equal rewards give 0.

    In the example of `blind_reward`, the broken call gets 2.5 and each of the seven calls -0.35.
    All eight start with <tool_call>, and part at the next token. So RL pushes <|im_end|> up there,
    and {"name": " down. In the careless log, breaking off had nothing to do with the question, so
    what RL teaches on no-call tasks carries over to long tasks. Those push the other way, but they
    are few.
    """
    mean = rewards.mean(1, keepdim=True)  # [groups, 1]
    # Dividing by the spread makes a rare success count for more. The small number is for groups of
    # equal rewards: their advantages are 0, and not 0 / 0.
    spread = rewards.std(1, keepdim=True) + 1e-4  # [groups, 1]
    return (rewards - mean) / spread  # [groups, group_size]


def grpo_loss(log_probs, old_log_probs, advantage, written, clip):
    """SFT's loss with an advantage and a ratio. [M, T-1] each, advantage [M] -> a scalar

    The first two are log-probabilities of tokens 1 to T-1, now and when they were sampled; written
    says which of them the policy wrote. The loss is minus the mean, over all written tokens of the
    batch, of min(ratio x advantage, clipped ratio x advantage); the clipped ratio is from 1 - clip
    to 1 + clip. What the policy did not write, it is not to blame for: prompts, results, padding.
    """
    # The policy has moved since it sampled these tokens. The ratio, new probability by old,
    # corrects for that. In the first minibatch it is 1, and its gradient is that of log p.
    ratio = (log_probs - old_log_probs).exp()  # [M, T-1]
    # The reward comes at the end, so all tokens of a rollout share one advantage.
    gain = advantage[:, None]  # [M, 1]
    # A token that has moved far enough the right way is pushed no further. Because of the
    # minimum, one that has moved the wrong way is still pushed back.
    clipped = ratio.clamp(1 - clip, 1 + clip)  # [M, T-1]
    objective = torch.min(ratio * gain, clipped * gain)  # [M, T-1]
    return -(objective * written).sum() / written.sum()


# What the two losses do to the logit of a right token of probability p. SFT is shown the token, and
# pushes by 1 - p. RL has to sample it first, and pushes on average by p (1 - p) d, where d is the
# mean advantage of rollouts with the token less that of rollouts without: 0 for equal rewards.
#
#     p        SFT pushes     RL pushes
#     0.5      0.5            0.25 d
#     0.001    0.999          0.001 d


def grpo_update(policy, optimizer, episodes, advantage, settings, rng):
    """Push N rollouts up or down by their advantage [N], in several minibatches of them."""
    order = torch.from_numpy(rng.permutation(len(episodes)))  # [N]
    for rows in order.chunk(settings.minibatches):  # [M]
        chosen = [episodes[row] for row in rows]
        ids, written, old_log_probs = batch(chosen, policy.device)  # [M, T], [M, T-1] twice
        log_probs = token_log_probs(policy, ids)  # [M, T-1]
        loss = grpo_loss(log_probs, old_log_probs, advantage[rows], written, settings.clip)
        descend(policy, optimizer, loss)


# %% Arms: what is done with the base


def teacher_messages(episode, hasty_share, rng):
    """What a hasty teacher writes: right, but many of its long conversations end too early.

    It then answers after the first call, or after the first or second of three, with the person
    that it has got to. What imitates it cannot be expected to do better than it does.
    """
    calls = len(episode.gold_calls)
    if calls < 2 or rng.random() >= hasty_share:
        return episode.gold
    made = rng.integers(1, calls)
    _, person = episode.gold_calls[made]  # about whom it would call next
    return episode.gold[:made] + [answer_text(person)]


def demonstrations(chat, settings, rng):
    """A batch of the teacher's conversations: mostly short ones, a quarter without a call.

    The latter ask back, which earns 1 as a broken call does. Once the policy asks back, too, a
    broken call is no better than its group. All demonstrations are in format A, so the policy
    learns to write it where B is asked for, too: that is the price.
    """
    episodes = []
    for kind in rng.choice(KINDS, settings.sft_batch, p=[0.25, 0.6, 0.15]):
        episode = new_episode(chat, "train", kind, rng)
        episodes.append(replay(episode, teacher_messages(episode, settings.hasty_share, rng)))
    return episodes


def new_groups(chat, settings, rng):
    """The N = groups x group_size new episodes of an RL step, none of them of one call."""
    episodes = []
    for _ in range(settings.groups):
        kind = "no_call" if rng.random() < settings.no_call_share else "multi_step"
        task = new_episode(chat, "train", kind, rng)
        for _ in range(settings.group_size):
            episodes.append(Episode(chat, task.question, task.directory))
    return episodes


def train_arm(arm, base_policy, base_eval, chat, settings, seed, out):
    """Train a copy of the base as the arm says. -> its evaluations, that of the base first

    In rl, groups of no-call tasks earn 1 1 1 1 1 1 1 1 in the end and groups of long tasks
    0 0 0 0 0 0 0 0. Equal rewards mean advantages of 0 and a gradient of 0: nothing leads back.
    In interleaved, no-call groups are equal, too, but because they ask back. The long tasks alone
    still differ, and there the whole conversation beats the hasty one. SFT fades, so that RL has
    the last steps alone and gets beyond the teacher.
    """
    policy = copy.deepcopy(base_policy)
    does = ARMS[arm]
    reward = solved if "strict" in does else blind_reward
    # One optimizer each: what Adam remembers of RL's gradients is of no use to SFT.
    rl_optimizer = torch.optim.Adam(policy.parameters())
    sft_optimizer = torch.optim.Adam(policy.parameters())
    evaluations = [base_eval]
    equal_groups = []  # their shares in RL steps since the last evaluation
    sft_end = settings.sft_until * settings.steps  # the step at which SFT's rate has fallen to 0
    for step in tqdm(range(1, settings.steps + 1), arm, leave=False, disable=None):
        sft_turn = step > 1 and (step - 1) % settings.sft_every == 0
        if "sft" in does and sft_turn and step < sft_end:
            sft_optimizer.param_groups[0]["lr"] = settings.sft_lr * (1 - step / sft_end)
            rng = rng_for(seed, "demonstrations", step)
            for _ in range(settings.sft_steps):
                sft_update(policy, sft_optimizer, demonstrations(chat, settings, rng))
        if "rl" in does:
            # Play.
            episodes = new_groups(chat, settings, rng_for(seed, "tasks", step))  # N of them
            rollout(policy, episodes, rng_for(seed, "sampling", step))
            # Score, and compare each rollout with its group.
            rewards = torch.tensor([reward(episode) for episode in episodes])  # [N]
            rewards = rewards.view(settings.groups, settings.group_size)  # [groups, group_size]
            advantage = advantages(rewards).flatten().to(policy.device)  # [N]
            # Push. The rate rises over ten steps, because Adam's first steps are rough.
            rl_optimizer.param_groups[0]["lr"] = settings.lr * min(1, step / 10)
            rng = rng_for(seed, "order", step)
            grpo_update(policy, rl_optimizer, episodes, advantage, settings, rng)
            equal_groups.append((rewards.std(1) == 0).float().mean().item())
        if step % settings.eval_every == 0 or step == settings.steps:
            evaluation = evaluate(policy, chat, settings, seed, arm, step)
            if "rl" in does:
                evaluation["equal_groups"] = fmean(equal_groups)
                equal_groups = []
            record(evaluation, out)
            print_row(evaluation, base_eval)
            evaluations.append(evaluation)
    return evaluations


# You may stop here: this is how it works. What follows measures, prints and starts a run.

# %% Probes: what a policy does, and what it still could do

# probe: (kind of held-out task, format). In the arms, neither RL nor SFT ever shows format B.
PROBES = {"success": ("multi_step", "A"), "one_call": ("one_call", "A")}
PROBES |= {"format_b": ("multi_step", "B"), "ask": ("no_call", "A")}
# place in a gold conversation: what belongs there (at json and reply, that is no control token)
PLACES = {"call": OPEN["A"], "json": "JSON", "close": CLOSE["A"], "end": END, "reply": "text"}


def place_of(episode, t):
    """Where token t of a gold conversation stands: one of PLACES, or None in between."""
    due = episode.chat.control.get(episode.ids[t])
    before = episode.chat.control.get(episode.ids[t - 1])
    for place, token in PLACES.items():
        if due == token:
            return place
    if before == OPEN["A"]:
        return "json"
    return None if episode.written[t - 1] else "reply"  # it begins a message that is no call


@torch.no_grad()
def teacher_forced(policy, episodes):
    """Feed gold conversations, whatever the policy would have written, and look what it predicts.

    p[place][control token] is the token's mean probability there. skill is the policy's success if
    it had only the names of tools and people to write: the probability to sample all of them right.
    (Teacher forcing is the usual word for this. It has nothing to do with the hasty teacher.)
    """
    for episode in episodes:
        replay(episode, episode.gold)
    control = list(episodes[0].chat.control)
    ids, _, _ = batch(episodes, policy.device)  # [N, T]
    log_p = policy(ids[:, :-1]).logits.log_softmax(-1)  # [N, T-1, V]
    log_right = log_p.gather(2, ids[:, 1:, None])[..., 0].tolist()  # N lists of T-1
    p_control = log_p[..., control].exp().cpu().numpy()  # [N, T-1, control tokens]
    skills = []
    found = {place: [] for place in PLACES}
    for row, episode in enumerate(episodes):
        is_name = []  # for each token that the policy should write
        for message in episode.gold:
            is_name += episode.chat.name_flags(message + END)
        should_write = [t for t, flag in enumerate(episode.written) if flag]
        log_skill = 0.0
        for t, flag in zip(should_write, is_name, strict=True):
            if flag:
                log_skill += log_right[row][t - 1]
            place = place_of(episode, t)
            if place:
                found[place].append(p_control[row, t - 1])
        skills.append(np.exp(log_skill))
    p = {}
    for place, rows in found.items():
        p[place] = dict(zip(CONTROL, np.mean(rows, 0).tolist(), strict=True))
    return fmean(skills), p


def transcript(episode):
    """The question, and what the policy wrote, each control token with its probability."""
    text = episode.question + "\n"
    for t, token in enumerate(episode.ids):
        if episode.written[t]:
            text += episode.chat.decode([token])
            if token in episode.chat.control:
                text += f"[{np.exp(episode.log_probs[t]):.2f}]"
            if token == episode.chat.end:
                text += "\n"
    return text


def evaluate(policy, chat, settings, seed, arm, step):
    """Measure a policy on held-out tasks, the same ones at every step. -> an event of --out"""
    played = {}
    for probe, (kind, fmt) in PROBES.items():
        rng = rng_for(seed, f"held-out {kind}")
        played[probe] = []
        for _ in range(settings.eval_episodes):
            played[probe].append(new_episode(chat, "held_out", kind, rng, fmt))
    rollout(policy, sum(played.values(), []), rng_for(seed, "held-out sampling"))

    event = {"event": "eval", "seed": seed, "arm": arm, "step": step}
    for probe, episodes in played.items():
        event[probe] = fmean(map(solved, episodes))
    event["no_call_reward"] = fmean(map(blind_reward, played["ask"]))
    gold = [Episode(chat, episode.question, episode.directory) for episode in played["success"]]
    event["skill"], event["p"] = teacher_forced(policy, gold)
    messages = sum([episode.messages for episode in played["success"]], [])
    # A message of tags alone, or an empty one, is what the paper calls collapsed.
    event["bare_tags"] = fmean(not re.sub(ANY_TAG, "", message) for message in messages)
    event["conversation"] = transcript(played["success"][0])
    return event


# %% Report: what is printed, and which claims a run bears out

# A policy is down with success of 0.05 or less. A control token has spiked with a probability, at a
# place where it is not due, of 0.4 or more and of five times the base's.
DOWN = 0.05
COLUMNS = {"success": 7, "skill": 5, "one_call": 4, "format_b": 6, "ask": 4}  # figure: its width
COLUMNS |= {"no_call_reward": 7, "equal_groups": 6}
HEADER = """\
                   one_ format      no_call equal_ control token that rose most
step success skill call     _b  ask _reward groups where it is not due"""
CLAIMS = {
    "collapse": "the base solves 0.2 or more, rl 0.02 or less at its last three evaluations",
    "control_token": "rl goes down, and the control token that rose most has then spiked (*)",
    "intact": "rl then has 0.8 or more of the base's skill",
    "fix": "interleaved ends with success and one_call of 0.9 or more, and no spike",
    "together": "interleaved ends at success 0.2 or more above both sft and the base",
    "price": "interleaved ends with format_b below 0.8 of the base's",
    "cause": "a control token spikes in rl, and none ever does in rl-strict",
}
Shift = namedtuple("Shift", "rise p token place spiked")


def say(text):
    """Print at once, with a ? for what the console cannot write, and nothing wider than 100."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in text.encode(encoding, "replace").decode(encoding).split("\n"):
        tqdm.write(textwrap.fill(line, 100, drop_whitespace=False, break_on_hyphens=False))
    sys.stdout.flush()


def record(event, out):
    """Write one JSON object as a line of --out, and have it on disk at once."""
    print(json.dumps(event), file=out, flush=True)


def control_token_shifts(evaluation, base_eval):
    """Each control token at each place where it is not due, the largest rise first."""
    shifts = []
    for place, due in PLACES.items():
        for token, p in evaluation["p"][place].items():
            base_p = base_eval["p"][place][token]
            spiked = p >= 0.4 and p >= 5 * base_p
            if token != due:
                shifts.append(Shift(p - base_p, p, token, place, spiked))
    return sorted(shifts, reverse=True)


def first_down(evaluations):
    """The first evaluation at which an arm is down, otherwise its last."""
    return next((e for e in evaluations if e["success"] <= DOWN), evaluations[-1])


def print_row(evaluation, base_eval):
    """The figures of one evaluation, and the control token that rose most. * means it spiked."""
    row = f"{evaluation['step']:4}"
    for figure, width in COLUMNS.items():
        row += f" {evaluation.get(figure, np.nan):{width}.2f}"  # nan where no RL was
    rose = control_token_shifts(evaluation, base_eval)[0]
    say(f"{row} {rose.p:.2f} {rose.token} {rose.place}{' *' if rose.spiked else ''}")


def print_moment(evaluation):
    """How often messages are broken at one evaluation, and a conversation."""
    step = evaluation["step"]
    say(f"\nstep {step}: {evaluation['bare_tags']:.0%} of messages on long tasks are bare tags")
    say(f"one held-out task, and what the policy writes:\n{evaluation['conversation'].strip()}")


def print_over_steps(title, steps, values):
    """A figure of every arm over the steps. Of many steps only some, up to the last, fit a line."""
    every = len(steps) // 14 + 1
    say(f"\n== {title}\n{'step':12}" + "".join(f"{k:6}" for k in steps[::-every][::-1]))
    for arm, series in values.items():
        say(f"{arm:12}" + "".join(f"{value:6.2f}" for value in series[::-every][::-1]))


def print_summary(history):
    """Of all arms: the probability of the control token that rose most in rl, and success."""
    evaluations = history.get("rl", list(history.values())[0])
    found = control_token_shifts(first_down(evaluations), evaluations[0])[0]
    steps = [evaluation["step"] for evaluation in evaluations]
    p = {}
    success = {}
    for arm, evaluations in history.items():
        p[arm] = [evaluation["p"][found.place][found.token] for evaluation in evaluations]
        success[arm] = [evaluation["success"] for evaluation in evaluations]
    print_over_steps(f"p({found.token}) where {PLACES[found.place]} is due", steps, p)
    print_over_steps("success", steps, success)


def any_spike(evaluations, base_eval):
    """Has any control token spiked, anywhere, in one of these evaluations?"""
    for evaluation in evaluations:
        if any(shift.spiked for shift in control_token_shifts(evaluation, base_eval)):
            return True
    return False


def judge(history):
    """Which claims hold, given the evaluations of each arm? A run too short bears out none."""
    base = list(history.values())[0][0]
    holds = {}
    if "rl" in history:
        down = first_down(history["rl"])
        highest = max(evaluation["success"] for evaluation in history["rl"][-3:])
        fell = down["success"] <= DOWN and base["success"] >= 4 * DOWN
        holds["collapse"] = fell and highest <= 0.02
        holds["control_token"] = fell and control_token_shifts(down, base)[0].spiked
        holds["intact"] = fell and down["skill"] >= 0.8 * base["skill"]
    if "interleaved" in history:
        end = history["interleaved"][-1]
        good = min(end["success"], end["one_call"]) >= 0.9
        holds["fix"] = good and not any_spike([end], base)
        if "sft" in history:
            bar = max(base["success"], history["sft"][-1]["success"]) + 0.2
            holds["together"] = end["success"] >= bar
        holds["price"] = end["format_b"] < 0.8 * base["format_b"]
    if "rl" in history and "rl-strict" in history:
        spiked = any_spike(history["rl"], base)
        holds["cause"] = spiked and not any_spike(history["rl-strict"], base)
    enough = min(map(len, history.values())) > 3  # the base's evaluation and three more
    return {claim: enough and held for claim, held in holds.items()}


# %% Models: the tiny one, and any other


def tiny_tokenizer():
    """Tags, names and roles are tokens, and each text between them is one, "The answer is "."""
    pad = "<pad>"  # not <|im_end|>: trainers that mask padding would then mask the end, too
    # All that is said in the tiny world, but for names.
    texts = ["system\n" + WORDING["system"].replace("TAG", OPEN["A"]), "user\n", " of ", " ?"]
    texts += ["assistant\n", call_text(TOOLS[0], PEOPLE[0], "A"), "tool\n", "error"]
    texts += [answer_text(PEOPLE[0]), WORDING["ask_back"], "\n"]
    # A role's header is a token of its own, so that a conversation has the same ids whether it is
    # encoded whole or message by message.
    pattern = rf"{ANY_TAG}|(system|user|assistant|tool)\n|{ANY_NAME}"
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokens = [pad] + CONTROL + NAMES
    for text in texts:
        tokens += [piece for piece, _ in splitter.pre_tokenize_str(text)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}  # each token once
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    core.pre_tokenizer = splitter
    core.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad)
    tokenizer.chat_template = (  # the layout of Hermes and Qwen
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def tiny_policy(chat, seed):
    """A Llama with 85 thousand random weights, which depend on the seed alone."""
    config = transformers.LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the usual 0.02 it learns late or never to copy a name
    )
    torch.manual_seed(int(rng_for(seed, "weights").integers(2**32)))
    return transformers.LlamaForCausalLM(config)


def load(settings):
    """-> Chat, and the pretrained policy that --model names, or None for the tiny world."""
    if not settings.model:
        return Chat(tiny_tokenizer()), None
    if not Path(settings.model).exists():
        say(f"toolrl: there is no folder {settings.model} here, so the hub is asked for it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    policy, report = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, output_loading_info=True
    )
    misfits = {problem: names for problem, names in report.items() if names}
    if misfits:
        raise ValueError(f"the weights do not fit the model: {misfits}")
    if not all(weights.requires_grad for weights in policy.parameters()):
        raise ValueError("some weights do not train; merge an adapter into its model first")
    # Rollouts and updates have to agree on log-probabilities, so all is float32.
    policy = policy.float()
    pieces = {token: tokenizer.encode(token, add_special_tokens=False) for token in CONTROL}
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        raise ValueError("the ids of the tokenizer have holes")
    # Some models have more rows than their tokenizer has tokens. Those must never be sampled.
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
    """Is a right conversation about each question a success? Raises ValueError where it is not."""
    if len(set(CONTROL)) < len(CONTROL):
        raise ValueError(f"a tag stands twice in {' '.join(CONTROL)}")
    if "TAG" not in WORDING["system"] or "PERSON" not in WORDING["answer"]:
        raise ValueError("the system message needs the word TAG, and the answer the word PERSON")
    directory = new_directory(rng_for(0, "check"))
    for kind in KINDS:
        train = TASKS["train"][kind]
        held_out = TASKS["held_out"][kind]
        if not train or not held_out or set(train) & set(held_out):
            raise ValueError(f"{kind}: train and held_out need questions, and none in common")
        for question in train + held_out:
            tools, person = parse_question(question)
            if not {*tools, person} <= set(NAMES):
                raise ValueError(f"{question!r} names a tool or a person that is not listed")
            for fmt in OPEN:
                episode = Episode(chat, question, directory, fmt)
                replay(episode, episode.gold)
                if not solved(episode) or kind != KINDS[min(len(episode.gold_calls), 2)]:
                    raise ValueError(f"{question!r} is no {kind} question, or too long to answer")
                if chat.encode(chat.decode(episode.ids)) != episode.ids:
                    raise ValueError("the tokenizer has other ids for a whole conversation")


def rehearse(pretrained, chat, settings):
    """Train and play a little, so that what cannot work shows before the base is trained.

    Raises ValueError for a policy that does not fit, and whatever the policy itself raises.
    """
    small = replace(settings, base_steps=1, groups=4, group_size=2)
    policy = train_base(pretrained, chat, small, 0)
    episodes = new_groups(chat, small, rng_for(0, "rehearsal"))
    longest = len(episodes[0].ids) + MAX_CALLS * (chat.max_tokens + len(chat.tool_result("error")))
    if getattr(policy.config, "max_position_embeddings", longest) < longest:
        raise ValueError(f"a conversation may take {longest} tokens, and the model takes fewer")
    rollout(policy, episodes, rng_for(0, "rehearsal"))
    ids, written, log_probs = batch(episodes, policy.device)
    gap = (token_log_probs(policy, ids) - log_probs)[written].abs().max()
    if gap > 0.01:
        raise ValueError("the model gives other probabilities with a cache than without")


# %% Run: read the settings, go through seeds and arms


def read_settings(argv):
    """The command line -> Settings. Bad input ends the program with a line and exit code 2."""
    usage = "python toolrl.py [--FLAG VALUE ...], where several values have spaces between them"
    parser = argparse.ArgumentParser("toolrl", usage, __doc__.partition("\n")[0])
    code = FILE.read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", code, re.MULTILINE))
    for name, value in vars(Settings()).items():
        options = {"type": type(value), "help": f"{comments[name]} (default: {value})"}
        if isinstance(value, list):
            options = options | {"type": type(value[0]), "nargs": "+"}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **options)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        if settings.model:
            parser.set_defaults(**PRETRAINED)
            settings = Settings(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error("--" + str(error).replace("_", "-"))
    return settings


def start(settings):
    """Check all that a run needs before it takes its time. -> Chat, pretrained policy, --out"""
    if not settings.model:
        torch.set_num_threads(1)  # more threads cost a tiny model more than they gain
    try:
        where = f"--device {settings.device}"
        torch.zeros(1, device=settings.device).item()
        where = f"--model {settings.model}" if settings.model else "tiny_tasks.json"
        chat, pretrained = load(settings)
        check_tasks(chat)
        rehearse(pretrained, chat, settings)
        where = f"--out {settings.out}"
        if Path(settings.out).is_file():
            say(f"toolrl: {settings.out} is overwritten")
        out = open(settings.out or os.devnull, "w", encoding="utf-8")
    except Exception as error:  # a checkpoint can be wrong in many ways
        stop(where, error)
    return chat, pretrained, out


def run(settings, chat, pretrained, out):
    """All seeds and arms, one after the other. -> {seed: {arm: evaluations}}"""
    begun = time.time()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    usual = vars(Settings())
    changed = [
        f"{name}={value!r}" for name, value in vars(settings).items() if value != usual[name]
    ]
    say(f"toolrl with {versions}\nsettings: {', '.join(changed + ['all else is default'])}")
    record({"event": "config", **vars(settings), "out": "", "versions": versions}, out)
    histories = {}
    counts = Counter()  # claim: the number of seeds so far in which it holds
    for seed in settings.seeds:
        base_policy = train_base(pretrained, chat, settings, seed)
        say(f"\n== base, seed {seed}\n{HEADER}")
        base_eval = evaluate(base_policy, chat, settings, seed, "base", 0)
        record(base_eval, out)
        print_row(base_eval, base_eval)
        history = {}
        for arm in settings.arms:
            say(f"\n== {arm}, seed {seed}, from the base\n{HEADER}")
            history[arm] = train_arm(arm, base_policy, base_eval, chat, settings, seed, out)
            print_moment(first_down(history[arm]))
        print_summary(history)
        histories[seed] = history
        say(f"\n== claims, seed {seed}, and in how many seeds so far, of {len(histories)}")
        for claim, holds in judge(history).items():
            counts[claim] += holds
            record({"event": "claim", "seed": seed, "claim": claim, "holds": holds}, out)
            say(f"{claim:14} {'yes' if holds else 'no':3} {counts[claim]:3}  {CLAIMS[claim]}")
    seconds = round(time.time() - begun)
    record({"event": "done", "seconds": seconds}, out)
    say(f"\n{seconds} s")
    return histories


def main(settings=None):
    """Check the input and run. -> {seed: {arm: evaluations}}. Ctrl-C ends with exit code 130."""
    settings = settings or Settings()
    try:
        return run(settings, *start(settings))
    except KeyboardInterrupt:
        where = "above"
        if settings.out:
            where = f"above and in {settings.out}"
        print(f"toolrl: stopped; what was measured is {where}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        stop(f"--device {settings.device}", error)


if __name__ == "__main__":
    if "kernel_launcher" in sys.argv[0]:  # a notebook, whose arguments are not ours
        main()
    else:
        main(read_settings(sys.argv[1:]))
