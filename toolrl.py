"""toolrl: why reinforcement learning breaks a tool-calling language model, and what mends it.

    python toolrl.py                        a tiny model, in half a minute
    python toolrl.py --model CHECKPOINT     the same with a pretrained model

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

After some steps of reinforcement learning (RL), the policy opens a call and ends its message at
once. The harness finds no call to run, takes this for a reply, and the conversation is over:

    > <tool_call><|im_end|>

This file shows how that comes about. The finding is from "Why Multi-Step Tool-Use Reinforcement
Learning Collapses and How Supervisory Signals Fix It", arXiv 2606.26027. The bad habits of the base
are planted here, and so are the many tasks without a call; what RL makes of them is not.

More words: an episode is one conversation about one task; a rollout is an episode that the policy
has written; a group is the rollouts of one task. RL makes rollouts with a high reward likelier.
Supervised fine-tuning (SFT) makes given conversations likelier; gold ones are right from start to
end. Control tokens give a conversation its structure: tags around calls and results, marks around
messages. A token is due where the gold conversation has it. Format B has other tags: the base
learns it, and no later training shows it. Shapes: N episodes, M of them, T tokens, vocabulary V.

A run, with the functions that do it:

    for each seed:
        base: a policy that has imitated the log of a careless agent      train_base
        for each arm, which is one way to go on from the base:            train_arm
            for each RL step:
                in arms with SFT, before steps 6, 11 ...: imitate         sft_phase
                play some tasks, each of them several times               rollout
                score each conversation with 1 or 0                       blind_reward
                push up what scored better than its group                 grpo_update
                after steps 5, 10 ...: measure, on held-out tasks         evaluate
        hold what was measured against claims that can fail               judge
"""

import copy
import functools
import inspect
import json
import os
import re
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser

# %% Settings: every knob of a run

# What an arm does to its copy of the base. Arms share all else: tasks, seeds, number of steps.
# In rl-strict, the reward reads the reply.
ARMS = {"rl": {"rl"}, "interleaved": {"rl", "sft"}, "sft": {"sft"}, "rl-strict": {"rl", "strict"}}


@dataclass
class Settings:
    """The command line: --no-call-share 0.5 sets no_call_share."""

    # What to run
    seeds: list[int] = field(default_factory=lambda: [0])  # a whole run for each of them
    arms: list[str] = field(  # in this order, out of rl, interleaved, sft, rl-strict
        default_factory=lambda: ["rl", "interleaved"], metadata={"choices": list(ARMS)}
    )
    model: str = ""  # start from this checkpoint, a folder or a hub name, not from a tiny Llama
    device: str = "auto"  # cpu, cuda or mps; auto takes a GPU if there is one
    out: str = ""  # write what is measured into this file, one JSON object a line
    # Base
    base_steps: int = 200  # SFT updates on the log of a careless agent
    base_lr: float = 8e-3  # learning rate of these updates, which first rises and then falls
    bare_share: float = 0.08  # share of the log's format-A calls that stop after <tool_call>
    # RL
    steps: int = 30  # RL steps in an arm
    lr: float = 1.5e-4  # learning rate of RL
    no_call_share: float = 0.9  # share of RL's tasks in which no call is right
    groups: int = 8  # tasks in an RL step
    group_size: int = 8  # rollouts of each of these tasks
    minibatches: int = 4  # updates from the rollouts of one RL step
    clip: float = 0.2  # a token is pushed no further once its probability has changed by this share
    # SFT
    sft_every: int = 5  # RL steps from one SFT phase to the next
    sft_steps: int = 20  # updates in an SFT phase
    sft_lr: float = 3e-3  # learning rate of these updates
    sft_batch: int = 32  # conversations in an SFT update, the base's updates too
    # Evaluation
    eval_every: int = 5  # RL steps from one evaluation to the next
    eval_episodes: int = 128  # held-out episodes of each kind in an evaluation


# With --model, these are the defaults: a pretrained model needs smaller steps, and fewer.
PRETRAINED = {"base_steps": 80, "base_lr": 1e-3, "steps": 16, "lr": 2e-5}
PRETRAINED |= {"sft_every": 4, "sft_steps": 10, "sft_lr": 4e-4, "sft_batch": 16}
PRETRAINED |= {"eval_every": 4, "eval_episodes": 16}

# %% Tasks: questions about who is whose friend

# "rival of mentor of alice ?" takes two calls: the mentor of alice, then the rival of that person.
# "rival of them ?" names nobody: no call can be right, and the policy should ask back.
TASKS = json.loads((Path(__file__).parent / "tiny_tasks.json").read_text(encoding="utf-8"))
TOOLS, PEOPLE, WORDING = TASKS["tools"], TASKS["people"], TASKS["wording"]
NOBODY = "them"
KINDS = ["no_call", "one_call", "multi_step"]  # multi_step tasks take two calls or three


def parse_question(question):
    """Split "rival of mentor of alice ?" into ["rival", "mentor"] and "alice"."""
    *tools, person = question.removesuffix(" ?").split(" of ")
    return tools, person


def check_tasks():
    """Raise ValueError for a mistake in tiny_tasks.json that would spoil a run silently."""
    for name in TOOLS + PEOPLE:
        if not name.isidentifier():
            raise ValueError(f"the name {name!r} is not a single word")
    for kind in KINDS:
        train = TASKS["train"][kind]
        held_out = TASKS["held_out"][kind]
        for question in train + held_out:
            tools, person = parse_question(question)
            calls = 0 if person == NOBODY else len(tools)
            known = tools and set(tools) <= set(TOOLS) and person in PEOPLE + [NOBODY]
            if not known or kind != KINDS[min(calls, 2)]:
                raise ValueError(f"{question!r} is no {kind} question")
        if set(train) & set(held_out):
            raise ValueError(f"a {kind} question is in train and in held_out")


def rng_for(seed, purpose, step=0):
    """A random generator for one purpose, so that what other purposes draw changes nothing."""
    return np.random.default_rng(list(f"{seed} {purpose} {step}".encode()))


def new_directory(rng):
    """(tool, person) -> person: what calls return, in one task alone. So memory is of no use."""
    calls = [(tool, person) for tool in TOOLS for person in PEOPLE]
    return dict(zip(calls, rng.choice(PEOPLE, len(calls)).tolist(), strict=True))


def right_answer(question, directory):
    """The calls that a question takes, from the person outwards, and the reply they lead to."""
    tools, person = parse_question(question)
    if person == NOBODY:
        return [], WORDING["ask_back"]
    calls = []
    for tool in reversed(tools):
        calls.append((tool, person))
        person = directory[tool, person]
    return calls, WORDING["answer"].replace("PERSON", person)


# %% Text and tokens: calls as text, text as token ids

END = "<|im_end|>"  # the token that ends a message
OPEN = TASKS["open"]  # the tags of formats A and B, which are alike in all else
CLOSE = TASKS["close"]
CONTROL = ["<|im_start|>", END]
CONTROL += [*OPEN.values(), *CLOSE.values(), "<tool_response>", "</tool_response>"]
NAMES = rf"\b({'|'.join(TOOLS + PEOPLE + [NOBODY])})\b"


def call_text(tool, person, fmt):
    """A call as the policy should write it: JSON between the tags of a format."""
    return OPEN[fmt] + json.dumps({"name": tool, "arguments": {"of": person}}) + CLOSE[fmt]


def parse_call(message, fmt):
    """The (tool, person) of a message that is one whole call and nothing else, otherwise None."""
    try:
        call = json.loads(message.removeprefix(OPEN[fmt]).removesuffix(CLOSE[fmt]))
        tool = str(call["name"])
        person = str(call["arguments"]["of"])
    except (ValueError, KeyError, TypeError):
        return None
    return (tool, person) if message == call_text(tool, person, fmt) else None


def tiny_tokenizer():
    """Tags are tokens, names are tokens, and each text between them is one, "The answer is "."""
    pad = "<pad>"  # not <|im_end|>, or code that masks padding would mask the end, too
    # All that is said in the tiny world, but for names.
    texts = ["system\n" + WORDING["system"].replace("TAG", OPEN["A"]), "user\n", " of ", " ?"]
    texts += ["assistant\n", call_text(TOOLS[0], PEOPLE[0], "A"), "tool\n", "error"]
    texts += [WORDING["answer"].replace("PERSON", PEOPLE[0]), WORDING["ask_back"]]
    texts += [WORDING["preamble"] + " ", "\n"]
    splitter = pre_tokenizers.Split(Regex(rf"<[^<>\s]+>|{NAMES}"), "isolated")
    tokens = [pad] + CONTROL + TOOLS + PEOPLE + [NOBODY]
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


class Chat:
    """What the harness has to know of a tokenizer, the tiny one or any other."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.control = dict(zip(tokenizer.convert_tokens_to_ids(CONTROL), CONTROL, strict=True))
        # One conversation is rendered whole, because many templates put a system message of their
        # own before a message that is rendered alone. Tasks then replace the words in capitals.
        words = {"system": "SYSTEM", "user": "QUESTION", "assistant": "CALL", "tool": "RESULT"}
        messages = [{"role": role, "content": word} for role, word in words.items()]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if "CALL" + END not in text:
            raise ValueError(f"the chat template does not end messages with {END}")
        self.before_message, self.after_call = text.split("CALL" + END)

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
        return self.encode(text.replace("QUESTION", question))

    def tool_result(self, result):
        """What the policy reads after the <|im_end|> of a call. -> ids"""
        return self.encode(self.after_call.replace("RESULT", result))

    @functools.cache
    def name_flags(self, message):
        """For each token of a message: is it part of the name of a tool or a person?"""
        painted = re.sub(NAMES, lambda name: "#" * len(name[0]), message)  # no message holds a #
        tokens = self.tokenizer(message, add_special_tokens=False, return_offsets_mapping=True)
        return ["#" in painted[start:stop] for start, stop in tokens["offset_mapping"]]


# %% Environment: the harness, and what it rewards

MAX_CALLS = 6  # in an episode
MAX_TOKENS = 40  # in a message that the policy writes


class Episode:
    """One conversation about one task: what would be right, and a record of what was said.

    The record has an entry a token: `ids`; `written`, True where the policy wrote and False where
    it read; `log_probs` of what it wrote, at the time when it wrote it.
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
        """Record one token of the policy. At the end of its message, the harness responds."""
        self.ids.append(token)
        self.written.append(True)
        self.log_probs.append(log_prob)
        message = self.ids[self.message_start :]
        finished = token == self.chat.end
        if finished or len(message) == MAX_TOKENS:
            self.messages.append(self.chat.decode(message).removesuffix(END))
            self.respond(self.messages[-1], finished)

    def respond(self, message, finished):
        """Run a message that is one whole call. Any other message ends the episode.

        It counts as a reply if it has no closing tag, whatever it says, and even if all that it
        says is an opening tag. If it was cut off (not `finished`), it is neither call nor reply.
        """
        call = parse_call(message, self.fmt)
        if call and finished:
            self.calls.append(call)
            if len(self.calls) < MAX_CALLS:
                self.read(self.chat.tool_result(self.directory.get(call, "error")))
                return
        self.replied = finished and CLOSE[self.fmt] not in message
        self.done = True


def new_episode(chat, split, kind, rng, fmt="A"):
    """An episode about a question of a split ("train" or "held_out") and a kind."""
    question = rng.choice(TASKS[split][kind]).item()
    return Episode(chat, question, new_directory(rng), fmt)


def play(episode, messages):
    """Write given messages, right or careless, until the harness ends it. -> the episode"""
    for message in messages:
        for token in episode.chat.encode(message + END):
            if not episode.done:
                episode.write(token)
    return episode


def blind_reward(episode):
    """RL's reward: 1.0 if the right calls and no others were run before a reply, otherwise 0.0.

    Nobody reads the reply. Many harnesses score like this, and so does the paper's. Without this
    blind spot, broken calls do not spread (arm rl-strict). Take "rival of them ?", which names
    nobody. It is right to call nothing and to ask back. Eight rollouts of the base may be these:

        seven times   <tool_call>{"name": "rival", "arguments": {"of": "bob"}}</tool_call> ...   0
        once          <tool_call><|im_end|>                                                      1

    The base has learnt to call, so it calls, about a guessed person: a wrong call, which earns 0.
    About one time in twelve it stops after the opening tag. It has seen that on other tasks, and
    the habit carries over. No call was run and the message counts as a reply, so it earns the 1
    that asking back would have earned. But the base hardly ever asks back, and RL can only make
    likelier what was sampled. So the broken call is the best that this group knows.
    """
    return float(episode.replied and episode.calls == episode.gold_calls)


def success(episode):
    """What evaluations count: a reward of 1, and the reply is right, word for word. 1.0 or 0.0"""
    right_reply = episode.messages[-1] == episode.gold[-1]
    return blind_reward(episode) if right_reply else 0.0


def classify(message):
    """What a message of format A holds. The paper's names for these states are beside them."""
    if parse_call(message, "A"):
        return "whole_calls"  # healthy call
    if re.sub(r"<[^<>]*>", "", message).strip() == "":
        return "bare_tags"  # collapsed: tags alone, or nothing
    if re.search(r"[<{]", message):
        return "stray_tags"  # text pollution
    return "replies"  # healthy response


# %% Policy and rollout: a language model talks to the harness


def load(settings):
    """-> Chat, and the pretrained policy that --model names, or None for the tiny world."""
    if not settings.model:
        return Chat(tiny_tokenizer()), None
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    # Rollouts and updates have to agree on log-probabilities, so all is float32.
    policy = transformers.AutoModelForCausalLM.from_pretrained(settings.model).float()
    pieces = {token: tokenizer.encode(token, add_special_tokens=False) for token in CONTROL}
    tokenizer.add_tokens(CONTROL, special_tokens=True)
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


def batch(episodes, device):
    """The records of N episodes, padded with zeros. -> ids, written, log_probs, each [N, T]"""
    padded = []
    for name in ("ids", "written", "log_probs"):
        rows = [torch.tensor(getattr(episode, name)) for episode in episodes]
        padded.append(pad_sequence(rows, batch_first=True).to(device))
    return padded


@torch.no_grad()
def rollout(policy, episodes, rng):
    """Play N new episodes to their end, sampling at temperature 1. They keep the record.

    Training sees the very ids that were sampled, since nothing is ever decoded and encoded again.
    One KV cache holds all rows, so all must have the same length in it. Each turn of the loop feeds
    tokens up to the end of the shortest row, here up to "|" (r was read, w was written):

        row 0   r r r r r w w w|            ends here: the policy writes its next token
        row 1   r r r w w w w r|r r r       has still to read the result of its call

    So no row needs padding on the left, and none needs an attention mask.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    playing = list(episodes)
    fed = 0  # tokens of each row that are in the cache
    cache = None
    while playing:
        until = min(len(episode.ids) for episode in playing)
        ids = torch.tensor([episode.ids[fed:until] for episode in playing]).to(policy.device)
        output = policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        fed = until
        log_p = output.logits[:, -1].log_softmax(-1).cpu()  # [M, V]
        tokens = torch.multinomial(log_p.exp(), 1, generator=generator)  # [M, 1]
        for row, episode in enumerate(playing):
            if len(episode.ids) == fed:
                token = tokens[row].item()
                episode.write(token, log_p[row, token].item())
        on = [row for row, episode in enumerate(playing) if not episode.done]
        if len(on) < len(playing):
            cache.batch_select_indices(torch.tensor(on, dtype=torch.long, device=policy.device))
            playing = [playing[row] for row in on]


# %% GRPO: push up what did better than its group

# Group relative policy optimisation. Sampling has no gradient, but the expected reward has one: the
# mean of reward times the gradient of log p(rollout), which is a sum over the rollout's tokens.
# Taking the same number off all rewards of a task leaves this as it is, and makes it less noisy.
# GRPO takes off the mean of the group: what did better than usual is pushed up, the rest down.
# The KL penalty of GRPO as published (arXiv 2402.03300) is left out, and all tokens weigh the same.


def token_log_probs(policy, ids):
    """Log-probability of each token but the first, given those before it. [M, T] -> [M, T-1]"""
    logits = policy(ids[:, :-1]).logits  # [M, T-1, V]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [M, T-1]


def descend(policy, optimizer, loss):
    """One step down the gradient, cut to norm 1. -> the norm before; exit code 1 if not finite"""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(policy.parameters(), 1.0).item()
    if not np.isfinite(norm):
        sys.exit("toolrl: the gradient is not finite; try a lower learning rate")
    optimizer.step()
    return norm


def advantages(rewards):
    """How much better than its group each rollout did. [groups, group_size] -> the same shape

    [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]]. In `blind_reward`, the broken call gets 2.5 and
    each of the seven calls -0.35. All eight start with <tool_call>, and part at the next token. So
    RL pushes <|im_end|> up there, and {"name": " down. Little in its log made the base look at the
    question there, so calls break on tool tasks, too. Those push the other way, but nine in ten
    tasks need no call. A task of three calls needs three whole ones: success falls, and falls to 0.
    """
    mean = rewards.mean(1, keepdim=True)  # [groups, 1]
    # Dividing by the spread makes a rare success count for more. The small number is for groups of
    # equal rewards: their advantages are 0, and not 0 / 0.
    spread = rewards.std(1, keepdim=True) + 1e-4  # [groups, 1]
    return (rewards - mean) / spread  # [groups, group_size]


def grpo_update(policy, optimizer, episodes, advantage, settings, rng):
    """Push N rollouts up or down by their advantage [N]. -> mean norm of the gradient"""
    ids, written, old_log_probs = batch(episodes, policy.device)  # [N, T] each
    norms = []
    # Generating rollouts is slow, so they are used for several updates, each on a minibatch.
    order = torch.from_numpy(rng.permutation(len(episodes)))  # [N]
    for rows in order.chunk(settings.minibatches):  # [M]
        log_probs = token_log_probs(policy, ids[rows])  # [M, T-1]
        # Column t is about token t + 1, because the first token has nothing before it.
        mask = written[rows, 1:]  # [M, T-1]
        # The policy has moved since it sampled these tokens. The ratio, new probability by old,
        # corrects for that. In the first minibatch it is 1, and its gradient is that of log p.
        ratio = (log_probs - old_log_probs[rows, 1:]).exp()  # [M, T-1]
        # The reward comes at the end, so all tokens of a rollout share one advantage.
        gain = advantage[rows, None]  # [M, 1]
        # A token that has moved far enough the right way is pushed no further. Because of the
        # minimum, one that has moved the wrong way is still pushed back.
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)  # [M, T-1]
        objective = torch.min(ratio * gain, clipped * gain)  # [M, T-1]
        # What the policy did not write, it is not to blame for: prompts, results, padding.
        loss = -(objective * mask).sum() / mask.sum()
        norms.append(descend(policy, optimizer, loss))
    return fmean(norms)


def rl_step(policy, optimizer, chat, reward, settings, seed, step):
    """Play, score, compare, push. -> share of groups with equal rewards, norm of the gradient

    Once the policy breaks every call, groups of no-call tasks earn 1 1 1 1 1 1 1 1 and groups of
    tool tasks 0 0 0 0 0 0 0 0. Equal rewards mean advantages of 0 and a gradient of 0, so RL has no
    way back. Few rewards depended on the choice of names, which is the skill, and none on format B.
    """
    rng = rng_for(seed, "tasks", step)
    episodes = []
    for _ in range(settings.groups):
        kind = "no_call" if rng.random() < settings.no_call_share else "multi_step"
        task = new_episode(chat, "train", kind, rng)
        for _ in range(settings.group_size):
            episodes.append(Episode(chat, task.question, task.directory))
    rollout(policy, episodes, rng_for(seed, "sampling", step))
    rewards = torch.tensor([reward(episode) for episode in episodes])  # [N]
    rewards = rewards.view(settings.groups, settings.group_size)  # [groups, group_size]
    equal_groups = (rewards == rewards[:, :1]).all(1).float().mean().item()
    advantage = advantages(rewards).flatten().to(policy.device)  # [N]
    rng = rng_for(seed, "order", step)
    gradient = grpo_update(policy, optimizer, episodes, advantage, settings, rng)
    return equal_groups, gradient


# %% SFT: imitate right conversations


def sft_update(policy, optimizer, episodes):
    """Push up, token by token, what is written in M episodes that somebody else wrote.

    The loss is GRPO's with advantages of 1 and log p for the ratio. The difference is who chose the
    tokens. Take the logit of a right token of probability p. SFT pushes it up by 1 - p. RL has to
    sample the token first, and pushes on average by p (1 - p) d, where d is the mean advantage of
    rollouts with the token minus that of rollouts without. Where all rewards are equal, d is 0.

        p        SFT pushes     RL pushes
        0.5      0.5            0.25 d
        0.001    0.999          0.001 d
    """
    ids, written, _ = batch(episodes, policy.device)  # [M, T] each
    log_probs = token_log_probs(policy, ids)  # [M, T-1]
    mask = written[:, 1:]  # [M, T-1]
    loss = -(log_probs * mask).sum() / mask.sum()
    descend(policy, optimizer, loss)


def sft_phase(policy, optimizer, chat, settings, seed, step):
    """SFT updates on gold conversations of training tasks, a quarter of them without a call.

    Asking back earns 1, too. Once the policy does it, a broken call is no better than its group.
    SFT shows format A only, so the policy learns to write it where B is asked for, too: the price.
    """
    rng = rng_for(seed, "gold", step)
    for _ in range(settings.sft_steps):
        episodes = []
        for kind in rng.choice(KINDS, settings.sft_batch, p=[0.25, 0.15, 0.6]):
            episode = new_episode(chat, "train", kind, rng)
            episodes.append(play(episode, episode.gold))
        sft_update(policy, optimizer, episodes)


# %% Base: a policy with the skill and with bad habits


def careless_messages(episode, bare_share, rng):
    """What a careless agent wrote in this episode, for the base to imitate.

    Where nobody is named it calls anyway, about a guessed person, 97 times in 100. It mangles one
    call in ten in one of three ways, and in format A it stops after some opening tags.
    """
    opening = OPEN[episode.fmt]
    if not episode.gold_calls and rng.random() < 0.97:
        tool = parse_question(episode.question)[0][-1]
        return [call_text(tool, rng.choice(PEOPLE).item(), episode.fmt)]
    messages = []
    for call in episode.gold[:-1]:
        message = call
        if rng.random() < 0.1:
            mangled = [opening + call, call + CLOSE[episode.fmt], WORDING["preamble"] + " " + call]
            message = rng.choice(mangled).item()
        if episode.fmt == "A" and rng.random() < bare_share:
            message = opening
        messages.append(message)
    return [*messages, episode.gold[-1]]


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
            episodes.append(play(episode, careless_messages(episode, settings.bare_share, rng)))
        sft_update(policy, optimizer, episodes)
    return policy


# %% Probes: what a policy does, and what it still could do

# probe: (kind of held-out task, format). Neither RL nor its SFT ever shows format B.
PROBES = {"success": ("multi_step", "A"), "one_call": ("one_call", "A")}
PROBES |= {"format_b": ("multi_step", "B"), "ask": ("no_call", "A")}
STATES = ["whole_calls", "replies", "bare_tags", "stray_tags"]
# place in a gold conversation: what is due there
PLACES = {"call": OPEN["A"], "json": "JSON", "close": CLOSE["A"], "end": END, "reply": "text"}


def place_of(episode, t):
    """Where token t of a gold conversation stands: one of PLACES, or None in the midst of JSON."""
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

    skill is its success if it had only the names of tools and people to write: the probability to
    sample all of them right. p[place][control token] is the token's mean probability there.
    """
    skills = []
    found = {place: [] for place in PLACES}
    for episode in episodes:
        chat = episode.chat
        play(episode, episode.gold)
        is_name = []  # for each token that the policy should write
        for message in episode.gold:
            is_name += chat.name_flags(message) + [False]  # False is for <|im_end|>
        written = [t for t, flag in enumerate(episode.written) if flag]
        ids = torch.tensor([episode.ids], device=policy.device)  # [1, T]
        log_p = policy(ids).logits[0].log_softmax(-1).cpu()  # [T, V]
        log_skill = 0.0
        for t, flag in zip(written, is_name, strict=True):
            predicted = log_p[t - 1]  # [V] after the token before
            if flag:
                log_skill += predicted[episode.ids[t]].item()
            place = place_of(episode, t)
            if place:
                found[place].append(predicted[list(chat.control)].exp())
        skills.append(np.exp(log_skill))
    p = {}
    for place, rows in found.items():
        p[place] = dict(zip(CONTROL, torch.stack(rows).mean(0).tolist(), strict=True))
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
    """Measure a policy on held-out tasks, always the same ones. -> an event of --out"""
    played = {}
    for probe, (kind, fmt) in PROBES.items():
        rng = rng_for(seed, f"held-out {kind}")
        played[probe] = []
        for _ in range(settings.eval_episodes):
            played[probe].append(new_episode(chat, "held_out", kind, rng, fmt))
    rollout(policy, sum(played.values(), []), rng_for(seed, "held-out sampling"))

    event = {"event": "eval", "seed": seed, "arm": arm, "step": step}
    for probe, episodes in played.items():
        event[probe] = fmean(map(success, episodes))
    event["no_call_reward"] = fmean(map(blind_reward, played["ask"]))
    gold = [Episode(chat, episode.question, episode.directory) for episode in played["success"]]
    event["skill"], event["p"] = teacher_forced(policy, gold)
    states = []
    for episode in played["success"]:
        states += [classify(message) for message in episode.messages]
    event["states"] = {state: states.count(state) / len(states) for state in STATES}
    event["conversation"] = transcript(played["success"][0])
    return event


# %% Arms: what is done with the base


def train_arm(arm, base_policy, chat, settings, seed):
    """Train a copy of the base as the arm says, with RL after SFT, and yield its evaluations."""
    policy = copy.deepcopy(base_policy)
    does = ARMS[arm]
    reward = success if "strict" in does else blind_reward
    # One optimizer each: what Adam remembers of RL's gradients is of no use to SFT.
    rl_optimizer = torch.optim.Adam(policy.parameters())
    sft_optimizer = torch.optim.Adam(policy.parameters(), lr=settings.sft_lr)
    rl_stats = []  # of the RL steps since the last evaluation
    for step in tqdm(range(1, settings.steps + 1), arm, leave=False, disable=None):
        if "sft" in does and step > 1 and (step - 1) % settings.sft_every == 0:
            sft_phase(policy, sft_optimizer, chat, settings, seed, step)
        if "rl" in does:
            rl_optimizer.param_groups[0]["lr"] = settings.lr * min(1, step / 10)  # a warm-up
            rl_stats.append(rl_step(policy, rl_optimizer, chat, reward, settings, seed, step))
        if step % settings.eval_every == 0 or step == settings.steps:
            evaluation = evaluate(policy, chat, settings, seed, arm, step)
            if "rl" in does:
                evaluation["equal_groups"], evaluation["gradient"] = np.mean(rl_stats, 0).tolist()
            rl_stats = []
            yield evaluation


# %% Report: what is printed, and which claims a run bears out

DOWN = 0.05  # a policy with no more success than this is down
COLUMNS = {"success": 7, "skill": 5, "one_call": 5, "format_b": 6, "ask": 5}  # figure: its width
COLUMNS |= {"no_call_reward": 7, "equal_groups": 6, "gradient": 8}
HEADER = """\
                    one_ format      no_call  equal_           the control token that rose most
step success skill  call     _b   ask _reward groups gradient  where it is not due"""
CLAIMS = {
    "collapse": "rl ends with three evaluations in a row at success of 0.02 or less",
    "control_token": "when rl is first down, the control token that rose most has spiked (*)",
    "intact": "rl then has 0.8 or more of the base's skill",
    "fix": "interleaved ends with success of 0.9 or more",
    "price": "interleaved ends with format_b below 0.8 of the base's, and of rl's when down",
    "cause": "no control token ever spikes in rl-strict",
}
Shift = namedtuple("Shift", "rise p token place spiked")


def control_token_shifts(evaluation, base_eval):
    """Each control token at each place where it is not due, the largest rise first."""
    shifts = []
    for place, due in PLACES.items():
        for token, p in evaluation["p"][place].items():
            base_p = base_eval["p"][place][token]
            spiked = p >= 0.4 and p >= 5 * base_p  # it is common now, and it was not
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
    tqdm.write(f"{row}  {rose.p:.2f} {rose.token} at {rose.place}{' *' if rose.spiked else ''}")


def print_moment(evaluation, base_eval):
    """The states of messages at one evaluation, all control tokens, and one conversation."""
    states = [f"{share:.0%} {state}" for state, share in evaluation["states"].items()]
    print(f"\nmessages at step {evaluation['step']}: {', '.join(states).replace('_', ' ')}")
    print("p(control token) on gold conversations, base -> now, by place and by what is due there")
    for place, due in PLACES.items():
        cells = []
        for token, p in evaluation["p"][place].items():
            base_p = base_eval["p"][place][token]
            if max(base_p, p) >= 0.01:
                cells.append(f"{token} {base_p:.2f} -> {p:.2f}")
        print(f"    {place:6} {due:12} {', '.join(cells)}")
    print(f"one held-out task, and what the policy writes:\n{evaluation['conversation']}", end="")


def judge(history):
    """Which claims hold, given the evaluations of each arm? Too few of them support no claim."""
    base = history["base"][0]
    enough = len(list(history.values())[-1]) >= 3  # all arms have as many evaluations
    holds = {}
    if "rl" in history:
        down = first_down(history["rl"])
        fell = enough and down["success"] <= DOWN < base["success"]
        highest = max(evaluation["success"] for evaluation in history["rl"][-3:])
        holds["collapse"] = fell and highest <= 0.02
        holds["control_token"] = fell and control_token_shifts(down, base)[0].spiked
        holds["intact"] = fell and down["skill"] >= 0.8 * base["skill"]
    if "interleaved" in history:
        end = history["interleaved"][-1]
        holds["fix"] = enough and end["success"] >= 0.9
        if "rl" in history:
            bar = 0.8 * min(base["format_b"], down["format_b"])
            holds["price"] = fell and end["format_b"] < bar
    if "rl-strict" in history:
        spikes = 0
        for evaluation in history["rl-strict"]:
            spikes += sum(shift.spiked for shift in control_token_shifts(evaluation, base))
        holds["cause"] = enough and spikes == 0
    return holds


# %% Run: read the settings, go through seeds and arms


def read_settings(argv):
    """The command line -> Settings. Bad input ends the program with a line and exit code 2."""
    parser = HfArgumentParser(Settings, usage="python toolrl.py [--help] [--FLAG VALUE]")
    parser.epilog = inspect.getsource(Settings)
    parser.formatter_class = RawDescriptionHelpFormatter
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.model:
        parser.set_defaults(**PRETRAINED)
        settings = Settings(**vars(parser.parse_args(argv)))
    for name, value in vars(settings).items():
        if isinstance(value, float) and not 0 <= value <= 1:
            parser.error(f"--{name} {value}: must be from 0 to 1")
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if settings.group_size < 2 or min(settings.seeds) < 0:
        parser.error("--group-size must be at least 2, and --seeds at least 0")
    if settings.device == "auto":
        settings.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return settings


def record(event, out):
    """Write one JSON object as a line of --out, and have it on disk at once."""
    print(json.dumps(event), file=out, flush=True)


def run(settings, chat, pretrained, out):
    """All seeds and arms, one after the other. -> the claims of each seed"""
    verdicts = []
    for seed in settings.seeds:
        base_policy = train_base(pretrained, chat, settings, seed)
        print(f"\n== base, seed {seed}\n{HEADER}")
        base_eval = evaluate(base_policy, chat, settings, seed, "base", 0)
        record(base_eval, out)
        print_row(base_eval, base_eval)
        history = {"base": [base_eval]}
        for arm in settings.arms:
            print(f"\n== {arm}, seed {seed}, from the base\n{HEADER}")
            history[arm] = []
            for evaluation in train_arm(arm, base_policy, chat, settings, seed):
                record(evaluation, out)
                print_row(evaluation, base_eval)
                history[arm].append(evaluation)
            print_moment(first_down(history[arm]), base_eval)
        print(f"\n== claims, seed {seed}")
        verdicts.append(judge(history))
        for claim, holds in verdicts[-1].items():
            record({"event": "claim", "seed": seed, "claim": claim, "holds": holds}, out)
            print(f"{claim:14} {'yes' if holds else 'no':4} {CLAIMS[claim]}")
    return verdicts


def main(argv=None):
    """Check the input, run, and count the claims. Ctrl-C ends the program with exit code 130."""
    begun = time.time()
    settings = read_settings(argv)
    try:
        blamed = "tiny_tasks.json"
        check_tasks()
        blamed = "--device"
        torch.zeros(1, device=settings.device)
        blamed = "--model"
        chat, pretrained = load(settings)
        blamed = "--out"
        out = open(settings.out or os.devnull, "w", encoding="utf-8")
    except Exception as error:  # a checkpoint can be wrong in many ways
        print("toolrl:", blamed, "is wrong:", str(error).split("\n")[0], file=sys.stderr)
        sys.exit(2)
    if not settings.model:
        torch.set_num_threads(1)  # a second thread gains a tiny model little
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"toolrl with {versions}\n{settings}")
    record({"event": "config", **vars(settings), "out": "", "versions": versions}, out)
    try:
        verdicts = run(settings, chat, pretrained, out)
    except KeyboardInterrupt:
        print("toolrl: stopped; what was measured is above and in --out", file=sys.stderr)
        sys.exit(130)
    if len(verdicts) > 1:
        print(f"\n== claims that hold, of {len(verdicts)} seeds")
        for claim in verdicts[0]:
            print(f"{claim:14} {sum(verdict[claim] for verdict in verdicts)}")
    seconds = round(time.time() - begun)
    record({"event": "done", "seconds": seconds}, out)
    print(f"\n{seconds} s")


if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)  # a notebook's arguments are not ours
