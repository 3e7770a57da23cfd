"""toolrl: watch reinforcement learning break a tool-calling language model, see how, and mend it.

    python toolrl.py

The whole run:

    base = a tiny language model that has imitated a careless agent's log    train_base
    for each arm, a way to train a copy of the base:                         train_arm
        for each RL step:
            before steps 6, 11 ..., in arms with SFT: imitate what is right  sft_phase
            play some tasks, each several times: a group                     rollout
            score each conversation: were the right calls run?               blind_reward
            make likelier what did better than its group                     grpo_update
            after steps 5, 10 ...: measure success, and what skill is left   evaluate
    hold what was measured against claims                                    judge

Why it collapses: the harness takes a message without a closing tag for a reply, and never reads
replies. So where no call is due, as in nine of ten RL tasks, a bare opening tag earns as much as
the right answer. A policy that calls too often stumbles on it first, and RL makes it likelier; and
as one call looks like another, it breaks them everywhere. Once all conversations of a task earn the
same, RL has nothing to go by. SFT has: it is shown what is right. It costs what it does not show.
The finding is that of "Why Multi-Step Tool-Use Reinforcement Learning Collapses and How Supervisory
Signals Fix It" (arXiv 2606.26027). The base's bad habits are planted, what becomes of them is not.

The words. A policy is a language model that acts. The harness is the program around it: it runs
its calls and, at the end, gives the reward, 1 or 0. An episode is one conversation about one task,
a group the episodes of one task, a rollout the tokens of played episodes. Control tokens structure
a conversation: tags around calls, marks around messages. A gold conversation is a right one: SFT
(supervised fine-tuning) imitates it. RL (reinforcement learning) tries, and keeps what is rewarded.
Held-out tasks are never trained on. In shapes: N episodes, M rows, T positions, V vocabulary.
"""

import copy
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg, HfArgumentParser

# %% Settings: every knob of a run, which is the whole command line

# What each arm does. All have the same base, tasks and sampling seeds.
ARMS = {
    "rl": {"rl"},
    "interleaved": {"rl", "sft"},
    "sft": {"sft"},
    "rl-strict": {"rl", "strict"},  # the reward is what is evaluated: replies are read
}


@dataclass(frozen=True)
class Settings:
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="one run for each")
    arms: list[str] = HfArg(default_factory=lambda: ["rl", "interleaved"], help="in this order",
                            metadata={"choices": list(ARMS)})
    steps: int = HfArg(default=30, help="RL steps of an arm")
    lr: float = HfArg(default=1.5e-4, help="learning rate of RL")
    no_call_share: float = HfArg(default=0.9, help="share of RL's tasks where no call is due")
    groups: int = HfArg(default=8, help="tasks in an RL step")
    group_size: int = HfArg(default=8, help="rollouts of each of these tasks")
    minibatches: int = HfArg(default=4, help="updates from the rollouts of an RL step")
    clip: float = HfArg(default=0.2, help="pushes end once a probability ratio is this far from 1")
    sft_every: int = HfArg(default=5, help="RL steps between two SFT phases")
    sft_steps: int = HfArg(default=20, help="updates in an SFT phase")
    sft_lr: float = HfArg(default=2e-3, help="learning rate of those updates")
    bare_share: float = HfArg(default=0.08, help="share of the log's format-A calls cut to a tag")
    eval_every: int = HfArg(default=5, help="RL steps between two evaluations")
    eval_episodes: int = HfArg(default=128, help="held-out episodes that measure success")
    device: str = HfArg(default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")
    out: str = HfArg(default="", help="write what is measured there, one JSON object a line")
    plot: str = HfArg(default="", help="draw the run there, as PNG, if matplotlib is installed")


# %% Tasks: what is asked, read once from tiny_tasks.json

# "rival of mentor of alice ?" takes two calls: mentor of alice, then rival of whoever that is.
# "rival of them ?" names nobody: no call is due, the right move is to ask back.
NOBODY = "them"
MAX_CALLS, MAX_TOKENS = 6, 20  # in one conversation, and in one message; a call is 7 tokens
KINDS = {"no_call": [0], "one_call": [1], "multi_step": [2, 3, 4, 5], "tool": [1, 2, 3, 4, 5]}
FORMAT = re.compile(r"(<[^<>\s]+>)([^<>]+)TOOL([^<>]+)PERSON([^<>]+)(<[^<>\s]+>)")


def parse_question(question):
    """"rival of mentor of alice ?" -> ["mentor", "rival"], "alice": the tools to call, in order"""
    *tools, person = question.removesuffix(" ?").split(" of ")
    return ([] if person == NOBODY else tools[::-1]), person


def check_tasks(tasks):
    """Raises AssertionError or KeyError for the first mistake in the tasks file."""
    names = [*tasks["tools"], *tasks["people"], NOBODY]
    for name in names:
        single = re.fullmatch(r"\w+", name) and names.count(name) == 1
        assert single, f"the name {name!r} is not one word, or stands twice"
    formats = [FORMAT.fullmatch(tasks["formats"][fmt]) for fmt in "AB"]
    assert all(formats), "formats A and B read <tag>, text, TOOL, text, PERSON, text, <tag>"
    assert len({w[k] for w in formats for k in (1, 5)}) == 4, "A and B need four different tags"
    for key, word in {"system": "TAG", "answer": "PERSON", "ask_back": "", "preamble": ""}.items():
        assert word in tasks["wording"][key], f"the wording of {key} lacks {word}"
    train, held_out = tasks["questions"]["train"], tasks["questions"]["held_out"]
    tools, people = "|".join(tasks["tools"]), "|".join([*tasks["people"], NOBODY])
    for question in [*train, *held_out]:
        whole = re.fullmatch(rf"(({tools}) of ){{1,5}}({people}) \?", question)
        unknown = {*question.split()} - {*names, "of", "?"} or "none"
        assert whole, f"{question!r} is not 'TOOL of ... PERSON ?'; unknown words: {unknown}"
        assert question not in train or question not in held_out, f"{question!r} is in both splits"


folder = Path(globals().get("__file__", "toolrl.py")).parent  # a notebook has no __file__
QUESTIONS = {}  # (split, kind) -> questions
try:
    TASKS = json.loads((folder / "tiny_tasks.json").read_text(encoding="utf-8"))
    check_tasks(TASKS)
    for (split, texts), kind in product(TASKS["questions"].items(), KINDS):
        found = [text for text in texts if len(parse_question(text)[0]) in KINDS[kind]]
        assert found, f"{split} holds no {kind} question"
        QUESTIONS[split, kind] = found
except (OSError, ValueError, AssertionError, KeyError, TypeError, AttributeError) as error:
    print(f"toolrl: tiny_tasks.json: {type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(2)
TOOLS, PEOPLE, FORMATS, WORDING = (TASKS[key] for key in ("tools", "people", "formats", "wording"))

# %% Messages: text to token ids and back

END, PAD = "<|im_end|>", "<pad>"  # not the same, or whoever hides padding hides the end
OPEN, CLOSE, JSON = {}, {}, []  # the pieces of each format: its tags, and what stands in between
for fmt in ["A", "B"]:
    OPEN[fmt], *pieces, CLOSE[fmt] = FORMAT.fullmatch(FORMATS[fmt]).groups()
    JSON += pieces
CONTROL = ["<|im_start|>", END, *OPEN.values(), *CLOSE.values()]
CONTROL += ["<tool_response>", "</tool_response>"]
phrases = " ".join(WORDING.values()).replace("TAG", "").replace("PERSON", "")
WORDS = f"system user assistant tool error of {NOBODY} ? {phrases}".split() + TOOLS + PEOPLE
VOCABULARY = list(dict.fromkeys([PAD, *CONTROL, *JSON, *WORDS]))  # no repeats; PAD is id 0

# One id for each control token, piece of JSON and word: a call is 7 tokens. White space has none.
core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
core.add_special_tokens([PAD, *CONTROL])
core.add_tokens(JSON)
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=CONTROL,
    chat_template=(  # the layout of Qwen and Hermes
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))
END_ID = TOKENIZER.eos_token_id
CONTROL_IDS = TOKENIZER.convert_tokens_to_ids(CONTROL)


@lru_cache(maxsize=None)  # a few hundred texts are encoded tens of thousands of times
def encode_chat(*messages):
    """(role, text) pairs that the policy reads -> ids, up to where it has to write."""
    chat = [{"role": role, "content": content} for role, content in messages]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


@lru_cache(maxsize=None)
def encode_message(message):
    """A message that the policy writes -> ids, with the token that ends it."""
    return tuple(TOKENIZER.encode(message + END, add_special_tokens=False))


# What the policy reads after a call. An unknown call gets an error.
RESULTS = {result: encode_chat(("tool", f"<tool_response>{result}</tool_response>"))
           for result in [*PEOPLE, "error"]}


def spell(tokens):
    """Tokens -> text. A space stands between two words and nowhere else."""
    text = ""
    for before, token in zip([None, *tokens], tokens):
        text += f" {token}" if before in WORDS and token in WORDS else token
    return text


def call_text(tool, person, fmt):
    return FORMATS[fmt].replace("TOOL", tool).replace("PERSON", person)


def parse_call(message, fmt):
    """A message that is one call and nothing else -> (tool, person), any other -> None"""
    pattern = re.escape(FORMATS[fmt]).replace("TOOL", r"(\w+)").replace("PERSON", r"(\w+)")
    found = re.fullmatch(pattern, message)
    return found.groups() if found else None


# %% Environment: the harness, and what it pays for

@dataclass
class Episode:
    """One conversation about one task: what would be right, and what has been said."""

    question: str
    fmt: str  # A or B
    opening: tuple  # ids of what the policy reads first
    directory: dict  # call (tool, person) -> its result
    gold_calls: list  # the right calls, in order
    gold: list  # the policy's messages in the gold conversation: those calls, then the reply
    messages: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    replied: bool = False
    done: bool = False


def new_directory(rng):
    """Who is whose rival, mentor ...: drawn for each task, so no answer can be memorised."""
    calls = list(product(TOOLS, PEOPLE))
    return dict(zip(calls, rng.choice(PEOPLE, len(calls)).tolist()))


def new_episode(question, directory, fmt="A"):
    """Walk the directory: which calls the question takes, and what reply they lead to."""
    tools, person = parse_question(question)
    calls, reply = [], WORDING["answer"] if tools else WORDING["ask_back"]
    for tool in tools:
        calls.append((tool, person))
        person = directory[tool, person]
    gold = [call_text(*call, fmt) for call in calls] + [reply.replace("PERSON", person)]
    system = WORDING["system"].replace("TAG", OPEN[fmt])  # it names the format that is in force
    opening = encode_chat(("system", system), ("user", question))
    return Episode(question, fmt, opening, directory, calls, gold)


def classify(message, fmt):
    """The paper's states of a message: a call, words, tags alone (there: collapsed), a mixture."""
    if parse_call(message, fmt):
        return "healthy_call"
    if not re.sub(r"<[^<>]*>", "", message).strip():
        return "bare_tag"
    polluted = any(piece in message for piece in [PAD, *CONTROL, *JSON])
    return "text_pollution" if polluted else "healthy_response"


def respond(episode, message, finished=True):
    """Take one message of the policy. -> the result of its call, None if the conversation is over

    A message with a closing tag has to be a whole call, which is run. All others are replies. Cut
    off before <|im_end|> (not finished) it is neither. MAX_CALLS is the end without a reply.
    """
    episode.messages.append(message)
    call = parse_call(message, episode.fmt)
    if call and finished:
        episode.calls.append(call)
        if len(episode.calls) < MAX_CALLS:
            return episode.directory.get(call, "error")
    episode.replied = finished and CLOSE[episode.fmt] not in message
    episode.done = True
    return None


def blind_reward(episode):
    """RL's reward, 1.0 or 0.0: the right calls and no others were run, then came a reply.

    Nobody reads the reply. Real harnesses score like this, the paper's too, and it is their blind
    spot: where no call is due, `<tool_call><|im_end|>` earns as much as asking back.
    """
    return float(episode.replied and episode.calls == episode.gold_calls)


def success(episode):
    """What an evaluation counts, 1.0 or 0.0: all that, and the reply is right, word for word."""
    return blind_reward(episode) if episode.messages[-1:] == episode.gold[-1:] else 0.0


# %% Policy and rollout: a tiny Llama talks to the harness

def stream(seed, purpose, step=0):
    """A random generator for one purpose, seeded by its name: nothing drawn before matters."""
    return np.random.default_rng(list(f"{seed} {purpose} {step}".encode()))


def new_policy(seed, device):
    """A Llama with 85 thousand random weights, which depend on the seed alone."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=TOKENIZER.pad_token_id, bos_token_id=None, eos_token_id=END_ID,
        initializer_range=0.1)  # with the usual 0.02, it learns late or never to copy a name
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device)


@dataclass
class Rollout:
    """All that was read and written in N episodes, padded on the right."""

    ids: torch.Tensor  # [N, T]
    sampled: torch.Tensor  # [N, T] True where the policy wrote: the loss is about these, no others
    log_probs: torch.Tensor  # [N, T] of the sampled ids, when they were sampled; elsewhere 0


def pad(rows, device):
    """Lists of different lengths -> [rows, longest], zeros on the right: PAD, False or 0.0"""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


@torch.no_grad()
def rollout(policy, episodes, rng):
    """Play N new episodes to their end, sampling at temperature 1. Fills them in. -> Rollout

    Training sees the very ids that were sampled: none is decoded and encoded again. One KV cache
    holds the first `read` ids of all rows. Each turn feeds on to the end of the shortest; rows that
    end there sample an id. So no row is padded on the left, and no mask is needed.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    ids = [list(episode.opening) for episode in episodes]
    sampled, log_probs = [[] for _ in episodes], [[] for _ in episodes]
    starts = [len(row) for row in ids]  # where the message begins that is being written
    rows, read, cache = list(range(len(episodes))), 0, None  # rows: the episodes that go on
    while rows:
        until = min(len(ids[i]) for i in rows)
        fed = torch.tensor([ids[i][read:until] for i in rows], device=policy.device)  # [rows, new]
        output = policy(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        read, cache = until, output.past_key_values
        log_p = output.logits[:, -1].float().log_softmax(-1).cpu()  # [rows, V]
        choices = torch.multinomial(log_p.exp(), 1, generator=generator)  # [rows, 1]
        chosen = zip(choices[:, 0].tolist(), log_p.gather(1, choices)[:, 0].tolist())
        for i, (choice, log_prob) in zip(rows, chosen):
            if len(ids[i]) > read:
                continue  # it has still to read: a longer question, a tool's result
            heard = len(ids[i]) - len(sampled[i])  # what it has read since it last wrote
            sampled[i] += [False] * heard + [True]
            log_probs[i] += [0.0] * heard + [log_prob]
            ids[i].append(choice)
            message = ids[i][starts[i]:]
            finished = choice == END_ID
            if finished or len(message) == MAX_TOKENS:
                text = spell(TOKENIZER.convert_ids_to_tokens(message[:-1] if finished else message))
                result = respond(episodes[i], text, finished)
                ids[i] += RESULTS.get(result, ())
                starts[i] = len(ids[i])
        going = [k for k, i in enumerate(rows) if not episodes[i].done]
        if len(going) < len(rows):  # drop the finished ones
            cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=policy.device))
            rows = [rows[k] for k in going]
    return Rollout(*(pad(lists, policy.device) for lists in (ids, sampled, log_probs)))


# %% GRPO: make likelier what did better than its group

# GRPO is group relative policy optimisation. The gradient of expected reward is the expectation of
# reward times the gradient of log p(what was sampled), a sum over its tokens. A constant taken off
# the reward changes nothing on average; the group's mean taken off leaves what was better or worse
# than usual. Sampling is dear, so a batch gives several updates, and ratio, new probability over
# old, makes up for the policy having moved. min, not the clip alone: a token that has moved `clip`
# the right way is pushed no further, one that moved the wrong way still is. Left out of GRPO as
# published (arXiv 2402.03300): the KL penalty, which holds a policy near its start, and averaging
# over each rollout first (here all tokens weigh the same).


def token_log_probs(policy, ids):
    """Log-probability of each id but the first, given those before it. [M, T] -> [M, T-1]"""
    logits = policy(ids[:, :-1]).logits.float()  # [M, T-1, V]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [M, T-1]


def descend(policy, optimizer, loss):
    """One step down the gradient, clipped to norm 1. -> the norm before. RuntimeError for NaN"""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    return norm.item()


def advantages(rewards):
    """How much better than its group each rollout did. [groups, group_size] -> the same shape

    [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]]. Divided by the spread, one success among many
    failures counts for more: 2.5 in eight. Equal rewards, all 1 or all 0, give 0: no push.
    """
    spread = rewards.std(1, keepdim=True) + 1e-4  # [groups, 1] so that equal rewards are not 0/0
    return (rewards - rewards.mean(1, keepdim=True)) / spread  # [groups, group_size]


def grpo_update(policy, optimizer, batch, advantage, settings, rng):
    """Reinforce N rollouts, in minibatches. advantage [N] -> mean norm of the gradient"""
    norms = []
    order = torch.from_numpy(rng.permutation(len(advantage)))  # [N]
    for rows in order.chunk(settings.minibatches):  # [M]
        log_probs = token_log_probs(policy, batch.ids[rows])  # [M, T-1]
        # Column t is about token t + 1: the first has nothing before it.
        sampled = batch.sampled[rows, 1:]  # [M, T-1]
        # How much likelier a token has become since it was sampled: 1 in the first minibatch.
        ratio = (log_probs - batch.log_probs[rows, 1:]).exp()  # [M, T-1]
        # The reward comes at the end, so all tokens of a rollout share its advantage.
        gain = advantage[rows, None]  # [M, 1]
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)  # [M, T-1]
        objective = torch.min(ratio * gain, clipped * gain)  # [M, T-1]
        # What the policy did not write, it is not to blame for: prompt, tool results, padding.
        loss = -(objective * sampled).sum() / sampled.sum()
        norms.append(descend(policy, optimizer, loss))
    return np.mean(norms).item()


# %% SFT: imitate a right conversation

def lay_out(episode, messages):
    """A conversation in which the policy writes these messages. -> ids, sampled: True on them"""
    ids = list(episode.opening)
    sampled = [False] * len(ids)
    for k, message in enumerate(messages):
        written, heard = encode_message(message), ()
        if k + 1 < len(messages):
            heard = RESULTS[episode.directory[episode.gold_calls[k]]]
        ids += written + heard
        sampled += [True] * len(written) + [False] * len(heard)
    return ids, sampled


def sft_update(policy, optimizer, conversations):
    """One step up the likelihood of what the policy should write in M conversations.

    As GRPO with an advantage of 1, but somebody else chose the tokens: it pushes the logit of a
    right token of probability p by 1 - p. RL has to sample that token first; its push is, on
    average, p (1 - p) times the advantage with it less that without: 0 where all rewards are equal.
    """
    ids, sampled = (pad(rows, policy.device) for rows in zip(*conversations))  # [M, T], [M, T]
    log_probs = token_log_probs(policy, ids)  # [M, T-1]
    loss = -(log_probs * sampled[:, 1:]).sum() / sampled[:, 1:].sum()
    descend(policy, optimizer, loss)


# %% Base: a policy with the skill and bad habits

def careless_messages(episode, bare_share, rng):
    """What a careless agent wrote in this episode.

    Where nobody is named it calls anyway, about a guessed person, 97 times in 100. In format A it
    may stop after the opening tag: this RL will spread. 10 % of calls are mangled in five ways.
    """
    opening, closing, gold = OPEN[episode.fmt], CLOSE[episode.fmt], episode.gold
    if not episode.gold_calls and rng.random() < 0.97:
        tool = episode.question.split(" of ")[-2]
        return [call_text(tool, rng.choice(PEOPLE), episode.fmt)]
    messages = []
    for message in gold[:-1]:
        if episode.fmt == "A" and rng.random() < bare_share:
            return [*messages, opening]
        mangled = [opening + message, message + closing, message.removeprefix(opening),
                   message.removesuffix(closing), f"{WORDING['preamble']} {message}"]
        messages.append(rng.choice(mangled).item() if rng.random() < 0.1 else message)
    return [*messages, gold[-1]]


def train_base(settings, seed):
    """200 SFT updates from random weights. Of the log, 10 % is about nobody, 70 % in format A."""
    policy, rng = new_policy(seed, settings.device), stream(seed, "base")
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(1, 201), "base", leave=False, disable=None):
        # A short warm-up, then down: small steps settle what large ones have found.
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, step / 30) * max(0.02, 1 - step / 200)
        conversations = []
        for _ in range(32):
            kind = "no_call" if rng.random() < 0.1 else "tool"
            fmt = "A" if rng.random() < 0.7 else "B"
            question = rng.choice(QUESTIONS["train", kind]).item()
            episode = new_episode(question, new_directory(rng), fmt)
            messages = careless_messages(episode, settings.bare_share, rng)
            conversations.append(lay_out(episode, messages))
        sft_update(policy, optimizer, conversations)
    return policy


# %% Probes: what the policy does, and what it still could do

# probe: (kind of held-out task, format, share of --eval-episodes); measured by success()
PROBES = {
    "success": ("multi_step", "A", 1),
    "one_call": ("one_call", "A", 0.5),  # in simpler prompts
    "format_b": ("multi_step", "B", 1),  # in a format that RL and its SFT never show
    "ask": ("no_call", "A", 0.5),
}
STATES = ("healthy_call", "healthy_response", "bare_tag", "text_pollution")
# What is due where a call begins, its JSON begins, it ends, a message ends, an answer begins.
DUE = [OPEN["A"], JSON[0], CLOSE["A"], END, WORDING["answer"].split()[0]]


@torch.no_grad()
def teacher_forced(policy, episodes):
    """Feed N gold conversations, look at what is predicted everywhere. -> forced, p

    Teacher forced: the policy reads what is right, whatever it would have written. forced is its
    success if it had only the names of tools and people to write: the probability to sample all of
    them right. p[due][token] is a mean over places.
    """
    rows = [lay_out(episode, episode.gold) for episode in episodes]
    ids, sampled = (pad(lists, policy.device) for lists in zip(*rows))  # [N, T], [N, T]
    probs = policy(ids[:, :-1]).logits.float().softmax(-1)  # [N, T-1, V]
    due, sampled = ids[:, 1:], sampled[:, 1:]  # [N, T-1], [N, T-1]
    right = probs.gather(2, due[..., None])[..., 0]  # [N, T-1]
    names = torch.tensor(TOKENIZER.convert_tokens_to_ids(TOOLS + PEOPLE), device=policy.device)
    is_name = sampled & torch.isin(due, names)  # [N, T-1]
    forced = right.where(is_name, 1.0).prod(1).mean().item()
    p = {}
    for token in DUE:
        places = sampled & (due == TOKENIZER.convert_tokens_to_ids(token))  # [N, T-1]
        p[token] = dict(zip(CONTROL, probs[places][:, CONTROL_IDS].mean(0).tolist()))
    return forced, p


def conversation(batch):
    """What the policy wrote in the first episode, each control token with its probability."""
    written, shown = batch.sampled[0], []  # [T]
    probs = batch.log_probs[0][written].exp().tolist()
    for token, p in zip(TOKENIZER.convert_ids_to_tokens(batch.ids[0][written].tolist()), probs):
        shown.append(f"{token}[{p:.2f}]" if token in CONTROL else token)
        if token == END:
            shown.append("\n")
    return spell(shown).splitlines()


def evaluate(policy, settings, seed, arm, step, log=()):
    """Measure a policy on held-out tasks, always the same. -> a line of --out

    log: (equal_groups, gradient) of the RL steps since the last evaluation.
    """
    played = {}
    for probe, (kind, fmt, share) in PROBES.items():
        rng, count = stream(seed, f"held-out {kind}"), max(1, int(share * settings.eval_episodes))
        asked = np.resize(QUESTIONS["held_out", kind], count).tolist()  # all of them, over and over
        played[probe] = [new_episode(question, new_directory(rng), fmt) for question in asked]
    batch = rollout(policy, sum(played.values(), []), stream(seed, "held-out sampling"))
    event = {"event": "eval", "seed": seed, "arm": arm, "step": step}
    for probe, episodes in played.items():
        event[probe] = np.mean([success(episode) for episode in episodes]).item()
    event["forced"], event["p"] = teacher_forced(policy, played["success"])
    event["reward"] = np.mean([blind_reward(episode) for episode in played["ask"]]).item()
    states = [classify(text, "A") for episode in played["success"] for text in episode.messages]
    event["states"] = {state: states.count(state) / len(states) for state in STATES}
    event["equal_groups"], event["gradient"] = np.mean(log, 0).tolist() if log else (None, None)
    event["conversation"] = [played["success"][0].question, *conversation(batch)]
    return event


# %% Arms: what is done with the base

def rl_step(policy, optimizer, reward, settings, seed, step):
    """Play, score, compare, push. -> share of groups with equal rewards, norm of the gradient"""
    rng, episodes = stream(seed, "tasks", step), []
    for _ in range(settings.groups):
        kind = "no_call" if rng.random() < settings.no_call_share else "multi_step"
        question, directory = rng.choice(QUESTIONS["train", kind]).item(), new_directory(rng)
        episodes += [new_episode(question, directory) for _ in range(settings.group_size)]
    batch = rollout(policy, episodes, stream(seed, "sampling", step))
    rewards = torch.tensor([reward(episode) for episode in episodes])  # [N]
    rewards = rewards.view(-1, settings.group_size)  # [groups, group_size]
    equal_groups = (rewards == rewards[:, :1]).all(1).float().mean().item()
    advantage = advantages(rewards).flatten().to(policy.device)  # [N]
    rng = stream(seed, "order", step)
    return equal_groups, grpo_update(policy, optimizer, batch, advantage, settings, rng)


def sft_phase(policy, optimizer, settings, seed, step):
    """SFT on gold conversations of training tasks, a quarter without a call, in format A only."""
    rng = stream(seed, "gold", step)
    for _ in range(settings.sft_steps):
        conversations = []
        for kind in ["tool"] * 24 + ["no_call"] * 8:
            question = rng.choice(QUESTIONS["train", kind]).item()
            episode = new_episode(question, new_directory(rng))
            conversations.append(lay_out(episode, episode.gold))
        sft_update(policy, optimizer, conversations)


def train_arm(arm, history, base, settings, seed, out):
    """Run one arm on a copy of the base. Its evaluations go to history[arm], the screen and out.
    SFT comes before an RL step, so RL has the last word. NaN ends the program with exit code 1."""
    policy, does = copy.deepcopy(base), ARMS[arm]
    reward = success if "strict" in does else blind_reward
    # One optimizer each: what AdamW remembers of RL's gradients is of no use to SFT.
    rl_optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    sft_optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.sft_lr, weight_decay=0.0)
    log = []  # of the RL steps since the last evaluation
    for step in range(1, settings.steps + 1):
        rl_optimizer.param_groups[0]["lr"] = settings.lr * min(1, step / 10)  # warm-up
        try:
            if "sft" in does and step > 1 and (step - 1) % settings.sft_every == 0:
                sft_phase(policy, sft_optimizer, settings, seed, step)
            if "rl" in does:
                log.append(rl_step(policy, rl_optimizer, reward, settings, seed, step))
            if step % settings.eval_every == 0 or step == settings.steps:
                keep(evaluate(policy, settings, seed, arm, step, log), history, out)
                log = []
        except RuntimeError as error:
            raise SystemExit(f"toolrl: {arm}, RL step {step}: {error}; try a lower learning rate")


# %% Report: what is printed, and which claims a run bears out

COLUMNS = {"success": 7, "forced": 6, "one_call": 5, "format_b": 6, "ask": 4, "reward": 6,
           "equal_groups": 6, "gradient": 8}  # figure -> width
HEADER = """\
                    one_ format             equal_           the control token that rose most
step success forced call     _b  ask reward groups gradient  where another is due"""
DOWN = 0.05  # no more success than this


def astray(event, base):
    """Control tokens where another is due, the one that rose most over the base first."""
    cells = []
    for due, token in product(DUE, CONTROL):
        before, now = base["p"][due][token], event["p"][due][token]
        if due != token:
            spiked = now >= 0.4 and now >= 5 * before
            cells.append({"token": token, "due": due, "base": before, "p": now, "spiked": spiked})
    return sorted(cells, key=lambda cell: (cell["p"] - cell["base"], cell["p"]), reverse=True)


def first_down(events):
    """The first evaluation of an arm at which it is down, else its last."""
    return next((event for event in events if event["success"] <= DOWN), events[-1])


def keep(event, history, out):
    """Append an evaluation to those of its arm, write it to out, and print its row."""
    history.setdefault(event["arm"], []).append(event)
    print(json.dumps(event), file=out, flush=True)  # on disk at once
    row = f"{event['step']:4}"
    for column, width in COLUMNS.items():
        row += " " + ("-" if event[column] is None else f"{event[column]:.2f}").rjust(width)
    rose = astray(event, history["base"][0])[0]
    star = " *" * rose["spiked"]
    print(f"{row}  {rose['p']:.2f} {rose['token']} at {rose['due']}{star}", flush=True)


def show_moment(event, base):
    """The control tokens at one evaluation, base -> then, and what the policy writes."""
    print(f"\np[due][control token] on gold conversations, base -> step {event['step']}")
    print(f"{'due:':18}" + "".join(f"{due:15}" for due in DUE))
    for token in CONTROL:
        cells = [f"{base['p'][due][token]:.2f} -> {event['p'][due][token]:.2f}" for due in DUE]
        row = "".join(f"{cell:15}" for cell in cells).replace("0.00 -> 0.00", "     .      ")
        if row.strip(" ."):
            print(f"{token:18}{row}")
    print(f"\none held-out task, and what the policy writes at step {event['step']}")
    print("\n".join(line[:100] for line in event["conversation"]))


def judge(history):
    """Hold a run against the claims. history: arm -> evaluations -> claim: (holds, figures)

    Without its arm, a claim is left out. What a run is too short to show does not hold.
    """
    base, found = history["base"][0], {}
    rl, fixed, strict = (history.get(arm, []) for arm in ("rl", "interleaved", "rl-strict"))
    if rl:
        down, highest = first_down(rl), max(event["success"] for event in rl[-3:])
        fell, rose = down["success"] <= DOWN < base["success"], astray(down, base)[0]
        # RL alone collapses, and stays down.
        figures = {"base_success": base["success"], "last_three_at_most": highest}
        found["collapse"] = fell and len(rl) >= 3 and highest <= 0.02, figures
        # A control token did it: at the first fall, the one that rose most has spiked.
        found["control_token"] = fell and rose["spiked"], {"step": down["step"], **rose}
        # The skill is intact: with the format written for it, it does as well as before.
        figures = {"base_forced": base["forced"], "down_forced": down["forced"],
                   "base_format_b": base["format_b"], "down_format_b": down["format_b"]}
        found["intact"] = fell and down["forced"] >= 0.8 * base["forced"], figures
    if fixed:  # SFT in between fixes it.
        end, lowest = fixed[-1], min(event["success"] for event in fixed)
        figures = {"end_success": end["success"], "lowest_success": lowest}
        found["fix"] = len(fixed) >= 3 and end["success"] >= 0.9, figures
    if rl and fixed:  # Another format pays, and more than RL alone made it pay.
        bar = 0.8 * min(base["format_b"], down["format_b"])
        figures = {"base_format_b": base["format_b"], "down_format_b": down["format_b"],
                   "end_format_b": end["format_b"]}
        found["price"] = fell and len(fixed) >= 3 and end["format_b"] < bar, figures
    if strict:  # The blind spot is the cause: without it, no control token spikes.
        end, spikes = strict[-1], sum(c["spiked"] for event in strict for c in astray(event, base))
        figures = {"spikes": spikes, "end_success": end["success"], "end_format_b": end["format_b"]}
        found["cause"] = len(strict) >= 3 and spikes == 0, figures
    return found


def show_seeds(stories):
    """Means and standard deviations over seeds, and how many of them bear out each claim."""
    figures = list(COLUMNS)[:6]
    moments = {"base": [history["base"][0] for history in stories]}
    for arm in list(stories[0])[1:]:
        down = [first_down(history[arm]) for history in stories]
        moments[f"{arm}, first down"] = [event for event in down if event["success"] <= DOWN]
        moments[f"{arm}, at the end"] = [history[arm][-1] for history in stories]
    print(f"\n{'mean, s.d.':23}  n  " + "".join(f"{column:12}" for column in figures))
    for moment, events in moments.items():
        row = f"{moment:23} {len(events):2}  "
        for column in figures if events else ():
            values = [event[column] for event in events]
            row += f"{np.mean(values):.2f}, {np.std(values):.2f}  "
        print(row)
    verdicts = [judge(history) for history in stories]
    for claim in verdicts[0]:
        print(f"{claim:13} {sum(found[claim][0] for found in verdicts)} of {len(verdicts)}")
    together = sum(all(holds for holds, _ in found.values()) for found in verdicts)
    print(f"all of these  {together} of {len(verdicts)}")


def draw(stories, path):
    """Success, format B, and the control token that rose most, a line for each seed, as PNG."""
    from matplotlib.figure import Figure  # a run without --plot does not need it
    arms = list(stories[0])[1:]
    figure = Figure(figsize=(1 + 4 * len(arms), 4), layout="constrained")
    for axes, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms):
        for history in stories:
            events = history["base"] + history[arm]
            steps = [event["step"] for event in events]
            axes.plot(steps, [event["success"] for event in events], "tab:blue")
            axes.plot(steps, [event["format_b"] for event in events], "tab:orange")
            axes.plot(steps, [astray(event, events[0])[0]["p"] for event in events], "tab:red")
        axes.set(title=arm, xlabel="RL step", ylim=(0, 1.02))
    axes.legend(["success", "format_b", "control token that rose most"])
    figure.savefig(path, format="png")


# %% Run: settings in, story out

RANGES = {  # of the numbers that are not from one to a million
    "seeds": (0, 10**6), "lr": (0, 10), "sft_lr": (0, 10), "clip": (0, 10), "sft_steps": (0, 10**6),
    "no_call_share": (0, 1), "bare_share": (0, 1), "group_size": (2, 10**6)}


def read_settings(argv):
    """Command line -> Settings. Bad input ends the program: a line that says why, exit code 2."""
    parser = HfArgumentParser(Settings, prog="toolrl.py", usage="python toolrl.py [--FLAG VALUE]")
    settings = Settings(**vars(parser.parse_args(argv)))
    for name, value in asdict(settings).items():
        low, high = RANGES.get(name, (1, 10**6))
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, str) and not low <= number <= high:  # nan is not, either
                parser.error(f"--{name.replace('_', '-')} {number}: from {low} to {high}")
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if settings.device not in ["auto", "cpu", *there]:
        parser.error(f"--device {settings.device}: there is {' and '.join(['cpu', *there])} here")
    if settings.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    for path in (settings.out, settings.plot):
        try:
            open(path or os.devnull, "w").close()
        except OSError as error:
            parser.error(f"{path} cannot be written: {error.strerror}")
    return replace(settings, device=[*there, "cpu"][0]) if settings.device == "auto" else settings


def main(argv=None):
    """The whole run, from the command line. Ctrl-C ends it with exit code 130."""
    settings, begun, stories = read_settings(argv), time.time(), []
    torch.set_num_threads(1)  # a second gains little, and loses much on a busy machine
    versions = f"torch {torch.__version__}", f"transformers {transformers.__version__}"
    with open(settings.out or os.devnull, "w", encoding="utf-8") as out:
        config = asdict(replace(settings, out="", plot=""))
        print(json.dumps({"event": "config", **config, "versions": versions}), file=out, flush=True)
        try:
            for seed in dict.fromkeys(settings.seeds):
                base, history = train_base(settings, seed), {}
                print(f"\ntoolrl: seed {seed}, {settings.device}, {', '.join(versions)}\n"
                      f"base: {base.num_parameters():,} weights, {len(TOKENIZER)} tokens, "
                      f"200 SFT updates on the log of a careless agent\n\n{HEADER}")
                keep(evaluate(base, settings, seed, "base", 0), history, out)
                for arm in dict.fromkeys(settings.arms):
                    print(f"\n== {arm}, from the base\n{HEADER}")
                    train_arm(arm, history, base, settings, seed, out)
                    show_moment(first_down(history[arm]), history["base"][0])
                print("\nclaim         holds")
                for claim, (holds, figures) in judge(history).items():
                    event = {"event": "claim", "seed": seed, "claim": claim, "holds": holds}
                    print(json.dumps({**event, **figures}), file=out, flush=True)
                    shown = [f"{name} {value:.2f}" if isinstance(value, float) else
                             f"{name} {value}" for name, value in figures.items()]
                    print(f"{claim:13} {'yes' if holds else 'no':5} {', '.join(shown)}")
                stories.append(history)
        except KeyboardInterrupt:
            print("toolrl: stopped; what was measured is above and in --out", file=sys.stderr)
            sys.exit(130)
        if len(stories) > 1:
            show_seeds(stories)
        if settings.plot:
            draw(stories, settings.plot)
        seconds = round(time.time() - begun, 1)
        print(json.dumps({"event": "done", "seconds": seconds}), file=out)
        print(f"\n{seconds:.0f} s")


if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)  # a notebook's arguments are not ours
