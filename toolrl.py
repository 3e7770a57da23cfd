"""toolrl: watch reinforcement learning break a tool-calling language model, find out why, and mend it.

    python toolrl.py

trains a tiny tool-calling policy (a policy is a model that acts), without a network, in about a minute, and prints what
happens:

- base: supervised fine-tuning (SFT) on the log of a careless agent. The skill is there, the format is shaky.
- rl: from that base, reinforcement learning alone (GRPO, group relative policy optimisation). With most seeds, success
  on tool tasks falls to zero and stays there: the token that ends a message has taken the place of the token that is
  due. Behind the broken format the skill is intact.
- interleaved: from the same base, the same RL with phases of SFT in between. It ends well above the base, and another
  call format, which the SFT never shows, pays for that.

The finding is from "Why Multi-Step Tool-Use Reinforcement Learning Collapses and How Supervisory Signals Fix It"
(arXiv 2606.26027). No outcome is written into the code: every figure is measured in the run that prints it.

The words: an episode is one conversation about a task, and a rollout is what was read and written in it. The harness is
the program around the policy: it runs the calls and, at the end, gives the reward, 1 or 0. A group is the rollouts of
one task. A gold conversation is a right one, from which SFT learns. The format of a call is its tags and its JSON, the
skill is to pick the tool and the person. Control tokens are the tags and the marks that begin and end a message; a bare
tag is an opening tag with no call behind it. In the comments, N is episodes, M rows of a batch, T tokens of the longest
row, V tokens of the vocabulary.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import groupby, takewhile
from statistics import fmean, stdev

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# %% Settings: every knob of a run, which is the whole command line


def knob(default, unit, text, low=None, high=None):
    return field(default=default, metadata=dict(unit=unit, text=text, low=low, high=high))


@dataclass(frozen=True)
class Settings:
    seed: int = knob(0, "integer", "seeds weights, tasks, directories and sampling", 0)
    arms: str = knob("rl,interleaved", "names", "what to do with the base, in this order")
    steps: int = knob(40, "RL steps", "length of each arm", 1)
    lr: float = knob(3e-4, "per update", "learning rate of RL: higher collapses earlier", 0)
    warmup: int = knob(10, "RL steps", "the RL learning rate rises to --lr over these", 1)
    no_call_share: float = knob(0.75, "fraction", "share of RL tasks where a call is wrong", 0, 1)
    min_calls: int = knob(2, "calls", "RL leaves out tool tasks with fewer: errors compound over calls", 1)
    groups: int = knob(8, "tasks", "different tasks in an RL step", 1)
    group_size: int = knob(8, "rollouts", "rollouts of each task: each is measured against their mean reward", 2)
    minibatches: int = knob(4, "updates", "RL updates from each batch of rollouts", 1)
    clip: float = knob(0.2, "ratio", "how far from 1 a token's probability ratio is still pushed", 0)
    kl: float = knob(0.0, "per nat", "weight of the penalty for moving away from the base", 0)
    sft_every: int = knob(5, "RL steps", "RL steps between two SFT phases", 1)
    sft_steps: int = knob(20, "updates", "SFT updates in a phase", 0)
    sft_lr: float = knob(1e-3, "per update", "learning rate of those", 0)
    sft_batch: int = knob(32, "trajectories", "gold conversations in each of those", 1)
    base_lr: float = knob(8e-3, "per update", "learning rate of the base, before warm-up and decay", 0)
    bare_share: float = knob(0.08, "fraction", "share of calls cut to a bare tag in the base's log", 0, 1)
    base_steps: int = knob(600, "updates", "give up if the base is not ready by then", 1)
    eval_every: int = knob(4, "RL steps", "RL steps between two evaluations", 1)
    eval_episodes: int = knob(128, "episodes", "held-out episodes for each probe", 1)
    stress: bool = knob(False, "yes or no", "then try the base, and each arm at its best, on variants of the schema")
    seeds: str = knob("", "numbers", "instead of --seed: several, such as 0-9 or 1,4,7, and a table over them")
    device: str = knob("auto", "name", "auto, cpu, cuda or mps")
    tasks: str = knob("tiny_tasks.json", "file", "tools, people, formats, wording and tasks")
    out: str = knob("", "file", "write every measurement there, one JSON object a line")
    plot: str = knob("", "file", "draw the run there, with matplotlib, as run.png")


# %% Tasks: what is asked, read from one file and checked

# At a first reading, Format, Task and World are all that matters here: the functions guard against errors in the file.

BLANKS = ("{open}", "{person}")  # filled in where the wording holds them
MAX_CALLS = 6  # in one conversation; the longest task takes 4
MAX_TOKENS = 20  # in one message; a call takes 8, its <|im_end|> included


class UserError(Exception):
    """Something that the user can mend: one line, exit code 2."""


@dataclass(frozen=True)
class Format:
    """The delimiters of a call. RL and its SFT use format A; what happens to B is part of the finding."""

    open: str
    close: str


@dataclass(frozen=True)
class Task:
    """"rival of mentor of alice ?" -> tools ("mentor", "rival"), in the order of the calls, person "alice".

    Where the question names nobody ("rival of them ?"), person is None and the right move is to ask back.
    """

    question: str
    tools: tuple
    person: str | None


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be the key of a cache
class World:
    """The tasks file. keys: tool -> the name of its argument. order: of the keys in a call. splits: name -> its tasks.

    variants: name -> the same world with other delimiters, keys or names, as an agent may meet it one day.
    """

    keys: dict
    order: list
    people: list
    formats: dict
    wording: dict
    splits: dict
    variants: dict


def look_up(tree, path, kind):
    """look_up(tree, "formats.A.open", str) -> the value at that place of the tasks file."""
    for key in path.split("."):
        try:
            tree = tree[int(key) if isinstance(tree, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            tree = None
    if not isinstance(tree, kind) or not tree:
        raise UserError(f"{path} is missing, empty or not a {kind.__name__}")
    return tree


def read_task(question, place, keys, people, wording):
    """Parse one question: the file holds the words that a person would write, and nothing else."""
    words = question.split() if isinstance(question, str) else []
    tools, links, name, end = words[:-2:2], words[1:-2:2], words[-2:-1], words[-1:]
    if not tools or len(links) != len(tools) or {*links} != {wording["link"]} or end != [wording["question_end"]]:
        pattern = f"TOOL {wording['link']} NAME {wording['question_end']}"
        raise UserError(f"{place}: {question!r} does not read {pattern!r}, with one TOOL or several")
    persons = [*people, wording["nobody"]]
    for word, known, kind in [(tool, keys, "tool") for tool in tools] + [(name[0], persons, "person")]:
        if word not in known:
            raise UserError(f"{place}: {question!r}: unknown {kind} {word!r}; known are {', '.join(known)}")
    if len(tools) >= MAX_CALLS:
        raise UserError(f"{place}: {question!r} takes {len(tools)} calls, a conversation ends with call {MAX_CALLS}")
    return Task(question, tuple(reversed(tools)), name[0] if name[0] in people else None)


def check_words(keys, people, formats, wording):
    """Raise UserError unless each delimiter, name and word can be one token (half of a character cannot)."""
    for tag in (tag for fmt in formats.values() for tag in (fmt.open, fmt.close)):
        if not re.fullmatch(r"<[^\s<>\ud800-\udfff]+>", tag):
            raise UserError(f"formats: a delimiter is one <word> in angle brackets, not {tag!r}")
    for word in (*keys, *keys.values(), *people, *(word for phrase in wording.values() for word in phrase.split())):
        if word not in BLANKS and not (isinstance(word, str) and re.fullmatch(r'[^\s"\\<>{}\ud800-\udfff]+', word)):
            raise UserError(f"{word!r} would be more than one token: use one word, no quotes, no brackets")


def read_splits(tree, keys, people, wording):
    """Parse the questions of each split. Raises UserError for one that leaks from one split into another."""
    splits, home = {}, {}
    for split in ("train", "no_call.train", "heldout", "simple", "content_ood", "no_call.heldout"):
        splits[split] = []
        for i, question in enumerate(look_up(tree, f"splits.{split}", list)):
            place = f"splits.{split}.{i}"
            task = read_task(question, place, keys, people, wording)
            if (task.person is None) != split.startswith("no_call"):
                raise UserError(f"{place}: {question!r}: only the no_call splits hold questions that name nobody")
            if home.setdefault(task, split) != split:
                raise UserError(f"{place}: {question!r} is in two splits, the other is {home[task]}")
            splits[split].append(task)
    trained = {task.tools for split in ("train", "no_call.train") for task in splits[split]}
    for task in splits["content_ood"]:
        if task.tools in trained:
            raise UserError(f"splits.content_ood: {task.question!r}: a train split has its tools in this order too")
    return splits


def vary(tree, changes):
    """The parsed tasks file with other texts in it. changes: text in the file -> text in its place"""
    text = json.dumps({key: value for key, value in tree.items() if key != "variants"}, ensure_ascii=False)
    if not isinstance(changes, dict) or not all(isinstance(new, str) for new in changes.values()):
        raise UserError("a variant is an object of texts, each with the text that takes its place")
    for old, new in changes.items():
        if old not in text:
            raise UserError(f"{old!r} does not stand in the file")
        text = text.replace(old, new)
    return json.loads(text)


def check_world(tree):
    """Turn the parsed tasks file into a World. Raises UserError naming the first place that is wrong."""
    keys = {}
    for i, _ in enumerate(look_up(tree, "tools", list)):
        arguments = look_up(tree, f"tools.{i}.function.parameters.properties", dict)
        if len(arguments) != 1:
            raise UserError(f"tools.{i}: a tool takes exactly one argument, not {len(arguments)}")
        keys[look_up(tree, f"tools.{i}.function.name", str)] = next(iter(arguments))
    people, order = look_up(tree, "people", list), look_up(tree, "call_order", list)
    if sorted(map(str, order)) != ["arguments", "name"]:
        raise UserError(f"call_order: the keys of a call are name and arguments, not {order}")
    formats = {f: Format(*(look_up(tree, f"formats.{f}.{tag}", str) for tag in ("open", "close"))) for f in "AB"}
    phrases = "system link nobody question_end answer ask_back preamble".split()
    wording = {name: look_up(tree, f"wording.{name}", str) for name in phrases}
    check_words(keys, people, formats, wording)
    if len({*keys, *people, wording["nobody"]}) < len(tree["tools"]) + len(people) + 1:
        raise UserError(f"a name stands twice among the tools, the people and {wording['nobody']!r}")
    variants = {}
    for name, changes in look_up(tree, "variants", dict).items() if "variants" in tree else ():
        try:
            variants[name] = check_world(vary(tree, changes))
        except (UserError, ValueError) as error:
            raise UserError(f"variants.{name}: {error}")
    return World(keys, order, people, formats, wording, read_splits(tree, keys, people, wording), variants)


def load_world(path):
    """Read the tasks file. Raises UserError, in one line, for whatever is wrong with it."""
    try:
        with open(path, encoding="utf-8") as file:
            return check_world(json.load(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a tasks file with --tasks FILE")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}")
    except UserError as error:
        raise UserError(f"{path}: {error}")


# %% Tokenizer and messages: one id for each control token, and a chat template as a real checkpoint has

END, PAD, UNKNOWN = "<|im_end|>", "<pad>", "error"  # UNKNOWN: the result of a call that cannot be answered

# The layout of Qwen and Hermes. The line breaks are for people: white space has no token of its own.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=None)  # the directory of each episode asks for all there are
def call_json(world, tool, person):
    """A call as the policy is shown it: {"name": "rival", "arguments": {"of": "bob"}}"""
    call = {"name": tool, "arguments": {world.keys[tool]: person}}
    return json.dumps({key: call[key] for key in world.order})


def build_tokenizer(world, known=()):
    """A word-level tokenizer: each control token, each piece of JSON and each word is one id; padding is another.

    <tool_call>{"name": "rival", "arguments": {"of": "bob"}}</tool_call> is 7 tokens: the tags, three pieces of
    JSON, `rival` and `bob`. Decoding gives the same text back. known: tokens whose ids are given, from 0 on.
    """
    tags = [tag for fmt in world.formats.values() for tag in (fmt.open, fmt.close)]
    control = ["<|im_start|>", END, *tags, "<tool_response>", "</tool_response>"]
    blank_calls = [call_json(world, tool, "<>").replace(f': "{tool}"', ': "<>"') for tool in world.keys]
    json_pieces = dict.fromkeys(piece for call in blank_calls for piece in call.split("<>"))  # no repeats, in order
    phrases = [word for phrase in world.wording.values() for word in phrase.split() if word not in BLANKS]
    words = ["system", "user", "assistant", "tool", UNKNOWN, *phrases, *world.people, *world.keys]
    vocabulary = dict.fromkeys([*known, PAD, *control, *json_pieces, *words])
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Decoding puts a space before each word, then takes it away at the start, and behind quotes and tags.
    space, unspace = decoders.Replace(Regex(r'^(?=[^<{"])'), " "), decoders.Replace(Regex(r'^ |(?<=[">]) '), "")
    core.decoder = decoders.Sequence([space, decoders.Fuse(), unspace])
    core.add_special_tokens([PAD, *control])
    core.add_tokens([AddedToken(piece, normalized=False) for piece in json_pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=control,
        chat_template=CHAT_TEMPLATE,
    )


def control_tokens(tokenizer):
    """The tokens that give a conversation its structure. Which of them goes astray is the question of this file."""
    return [token for token in tokenizer.all_special_tokens if token != PAD]


@lru_cache(maxsize=None)  # the same few hundred messages are encoded tens of thousands of times
def encode_context(tokenizer, *messages):
    """Ids of what the policy reads, up to where it has to write. messages: (role, text) pairs"""
    chat = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=None)
def encode_turn(tokenizer, message):
    """Ids of what the policy writes: its message and the token that ends it."""
    return tuple(tokenizer.encode(message + END, add_special_tokens=False))


# %% Environment: text in, text out, and the score


@dataclass
class Episode:
    """One conversation about one task. Its directory is drawn for it alone, so no answer can be memorised."""

    task: Task
    fmt: Format
    opening: tuple  # (role, text) of the messages before the policy's first
    directory: dict  # call, as read_call gives it -> its result
    gold_calls: list  # the calls that answer the question, in order
    gold: list  # the policy's messages in a perfect conversation: those calls, then the reply
    names: set  # the tools and people in them, which the policy has to find; the rest of a message is format
    written: str  # what the harness writes for the policy: "nothing", but for the tests of what broke (see Probes)
    messages: list = field(default_factory=list)
    states: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    replied: bool = False
    done: bool = False


@lru_cache(maxsize=None)  # the same few hundred calls are read tens of thousands of times
def read_call(text):
    """A call as JSON with sorted keys: in whichever order they were written, it is the same call.

    -> None if the text is not one call object and nothing else
    """
    try:
        call = json.loads(text)
        return json.dumps(call, sort_keys=True) if call.keys() == {"name", "arguments"} else None
    except (ValueError, AttributeError, RecursionError):
        return None


def new_episode(world, task, rng, fmt="A", written="nothing"):
    """Draw a directory for the task and walk it: which calls it takes, and what reply they lead to."""
    requests = [read_call(call_json(world, tool, person)) for tool in world.keys for person in world.people]
    directory = dict(zip(requests, rng.choices(world.people, k=len(requests))))
    tags, calls, people = world.formats[fmt], [], [task.person]
    for tool in task.tools if task.person else ():
        calls.append(call_json(world, tool, people[-1]))
        people.append(directory[read_call(calls[-1])])
    reply = world.wording["answer"].replace("{person}", people[-1]) if task.person else world.wording["ask_back"]
    # The system message names the format in force, as a tool description does.
    opening = ("system", world.wording["system"].replace("{open}", tags.open)), ("user", task.question)
    gold, names = [*(tags.open + call + tags.close for call in calls), reply], {*task.tools, *people}
    return Episode(task, tags, opening, directory, [*map(read_call, calls)], gold, names, written)


def tool_message(result):
    return "tool", f"<tool_response>{result}</tool_response>"


def classify(message, fmt):
    """Which of the paper's four states an assistant message is in. -> (state, its call or None)

    healthy_call       one call, nothing else    <tool_call>{"name": "rival", "arguments": {"of": "bob"}}</tool_call>
    healthy_response   words, nothing else       The answer is bob
    collapsed          tags alone, or nothing    <tool_call>
    text_pollution     anything else             <tool_call>{"name": "rival", "arguments": {"of": "bob"}}
    """
    body = message.removeprefix(fmt.open).removesuffix(fmt.close)
    call = read_call(body)
    if call and message == fmt.open + body + fmt.close:
        return "healthy_call", call
    if not re.sub(r"<[^<>]*>", "", message).strip():
        return "collapsed", None
    return ("text_pollution" if re.search(r'[<>{}"]', message) else "healthy_response"), None


def respond(episode, message, finished=True):
    """Take one assistant message. -> the result of its call, or None when the conversation is over.

    A message without a closing tag is a reply, whatever it holds, and ends the conversation. A closing tag announces
    a call: a healthy one is run, any other ends the conversation unanswered. So does a message that is cut off at
    MAX_TOKENS (finished=False), and the call number MAX_CALLS.
    """
    state, call = classify(message, episode.fmt) if finished else ("text_pollution", None)
    episode.messages.append(message)
    episode.states.append(state)
    if call:
        episode.calls.append(call)
        if len(episode.calls) < MAX_CALLS:
            return episode.directory.get(call, UNKNOWN)
    episode.replied = finished and episode.fmt.close not in message
    episode.done = True
    return None


def blind_score(episode):
    """RL's reward, 1.0 or 0.0: the conversation came to a reply, and the right calls were run before it.

    The reply itself is never looked at. Real harnesses score like this, the paper's too, and it is their blind spot:
    where no call is due, `<tool_call><|im_end|>` earns as much as asking back.
    """
    return float(episode.replied and episode.calls == episode.gold_calls)


def closed_score(episode):
    """The same, but a reply has to be words: one that holds a control token or JSON, or nothing, earns nothing."""
    return blind_score(episode) if episode.states[-1] == "healthy_response" else 0.0


def succeeded(episode):
    """What every evaluation counts: the right calls and no others, then the right reply, word for word."""
    return bool(blind_score(episode)) and episode.messages[-1] == episode.gold[-1]


# %% Policy: a two-layer Llama with random weights, nothing to download


def stream(*purpose):
    """A random generator for one purpose: the same words give the same draws, whatever was drawn before."""
    return random.Random("/".join(map(str, purpose)))


def new_policy(tokenizer, seed, device):
    """A fresh policy of some 85 thousand weights, which depend on the seed alone. It has no dropout to switch off."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # with the library's 0.02, attention learns to copy a name late or never
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


# %% Rollout: the policy talks to the environment, token in, token out


@dataclass
class Rollout:
    """All that was read and written in N episodes of up to T tokens, padded on the right."""

    ids: torch.Tensor  # [N, T]
    sampled: torch.Tensor  # [N, T] True where the policy chose the token: these carry the loss, no others
    log_p: torch.Tensor  # [N, T, V] log-probabilities of all tokens when the choice was made, 0 elsewhere

    @property
    def log_probs(self):
        """Those of the chosen tokens. [N, T]"""
        return self.log_p.gather(2, self.ids[..., None])[..., 0]


def harness_token(tokenizer, episode, position):
    """The id that the harness writes at a position of a turn, None where it leaves the choice to the policy.

    "prefill": where a call is due, the opening tag and the start of its JSON, which a hosted model can be given too.
    "format": all that a perfect turn holds but the names of tools and people. The policy is told when to call and when
    to stop, and has to find out what to call about whom.
    """
    if episode.written == "nothing":
        return None
    k = len(episode.messages)
    if episode.written == "prefill" and (position > 1 or k >= len(episode.gold_calls)):
        return None
    turn = encode_turn(tokenizer, episode.gold[min(k, len(episode.gold) - 1)])
    due = turn[position] if position < len(turn) else tokenizer.eos_token_id
    return None if tokenizer.convert_ids_to_tokens(due) in episode.names else due


def advance(tokenizer, episode, unread, turn, choice):
    """Move one episode on by one token. -> (id, True if it is the policy's choice)

    unread (ids that the policy has still to read) and turn (ids of the message that it is writing) are updated.
    """
    if unread:
        return unread.popleft(), False
    due = harness_token(tokenizer, episode, len(turn))
    token = choice if due is None else due
    turn.append(token)
    finished = token == tokenizer.eos_token_id
    if finished or len(turn) == MAX_TOKENS:
        result = respond(episode, tokenizer.decode(turn[:-1] if finished else turn), finished)
        turn.clear()
        if not episode.done:
            unread.extend(encode_context(tokenizer, tool_message(result)))
    return token, due is None


def pad(rows, value, device):
    """Lists of different lengths -> tensor [rows, longest], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)


@torch.no_grad()
def rollout(policy, tokenizer, episodes, rng):
    """Play N episodes to their end at temperature 1. They are filled in, and their tokens returned as a Rollout.

    All move on by one token a step. An episode with something left to read (its prompt, a tool result) is fed that,
    any other its own sample. So no row is padded on the left, one KV cache serves all, and nothing is tokenized
    twice: training sees the very ids that were sampled. Attention looks back only, so what is padded on the right can
    not be seen and needs no mask.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    prompts = [encode_context(tokenizer, *episode.opening) for episode in episodes]
    shared = min(map(len, prompts))  # this much of every prompt goes through the policy in one piece
    unread, turns = [deque(prompt[shared:]) for prompt in prompts], [[] for _ in episodes]
    ids = [list(prompt[:shared]) for prompt in prompts]
    sampled, offers = [[False] * shared for _ in ids], []
    rows, fed, cache = list(range(len(episodes))), ids, None  # rows: which episodes are in the batch
    while rows:
        output = policy(torch.tensor(fed, device=policy.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_p = output.logits[:, -1].float().cpu().log_softmax(-1)  # [rows, V]
        if log_p.isnan().any():
            raise FloatingPointError("the policy's probabilities are not numbers; try a lower learning rate")
        choices = torch.multinomial(log_p.exp(), 1, generator=generator)  # [rows, 1]
        choosing = []
        for k, (i, choice) in enumerate(zip(rows, choices[:, 0].tolist())):
            if not episodes[i].done:
                token, chosen = advance(tokenizer, episodes[i], unread[i], turns[i], choice)
                if chosen:
                    choosing.append(k)
                ids[i].append(token)
                sampled[i].append(chosen)
        offers.append(log_p[choosing])  # [choices, V]
        going = [k for k, i in enumerate(rows) if not episodes[i].done]
        if len(going) <= 0.8 * len(rows):  # carrying finished episodes costs more than cutting them out of the cache
            cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=policy.device))
            rows = [rows[k] for k in going]
        fed = [ids[i][-1:] for i in rows]
    ids, sampled = pad(ids, tokenizer.pad_token_id, "cpu"), pad(sampled, False, "cpu")  # [N, T]
    log_p = torch.zeros(*ids.shape, len(tokenizer))  # [N, T, V]
    log_p.transpose(0, 1)[sampled.T] = torch.cat(offers)  # position by position: all episodes are at the same one
    return Rollout(*(tensor.to(policy.device) for tensor in (ids, sampled, log_p)))


# %% GRPO: reinforce what did better than its group

# Play a task several times, and make what did better than the mean of the group likelier, token by token. Where this
# departs from GRPO as published (arXiv 2402.03300), and why:
# - The KL penalty is off unless --kl is given: it holds the policy near the base, and this file is about what happens
#   to a policy that is free to move.
# - The loss is the mean over all sampled tokens of a minibatch, not over each rollout first: a token then counts the
#   same in a short rollout as in a long one.
# - One pass over each batch of rollouts, in minibatches. The probability ratio leaves 1 after the first of them.
# - No reward model and no old policy kept in memory: a rule gives the reward, and the rollout keeps its
#   log-probabilities.


def token_log_probs(policy, ids):
    """Log-probability of each token but the first, given all before it. ids [M, T] -> [M, T-1]"""
    logits = policy(ids[:, :-1]).logits.float()  # [M, T-1, V]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [M, T-1]


def optimise(policy, optimizer, loss):
    """One step down the gradient, clipped to norm 1. -> the norm before. Raises FloatingPointError for NaN."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    if not torch.isfinite(loss + norm):
        raise FloatingPointError(f"the loss is {loss.item()}, its gradient {norm.item()}; try a lower learning rate")
    optimizer.step()
    return norm.item()


def advantages(rewards):
    """How much better than the mean of its group each rollout did. [groups, group_size] -> the same shape

    [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]]. Dividing by the spread makes one success among many failures count for
    more, +2.5 in eight. Where all rewards are equal, won or lost, all advantages are 0, and so is the gradient.
    """
    spread = rewards.std(1, keepdim=True) + 1e-4  # [groups, 1]; never 0, so equal rewards do not give 0/0
    return (rewards - rewards.mean(1, keepdim=True)) / spread  # [groups, group_size]


def grpo_update(policy, optimizer, batch, advantage, settings, rng, reference, extra_loss=None):
    """Reinforce a batch of N rollouts: one pass, in minibatches. advantage [N] -> the gradient's norm, mean of them

    reference: the policy to stay near if settings.kl > 0. extra_loss: a function whose result is added to the loss.
    """
    norms, order = [], torch.tensor(rng.sample(range(len(advantage)), len(advantage)))  # [N]
    for rows in order.chunk(settings.minibatches):  # [M]
        ids, chosen = batch.ids[rows], batch.sampled[rows, 1:]  # [M, T], [M, T-1]
        log_probs = token_log_probs(policy, ids)  # [M, T-1]
        # How much likelier each choice has become since it was made: 1 in the first minibatch, then it moves. Column t
        # is about token t + 1; where that is not the policy's choice the ratio means nothing, and `chosen` hides it.
        ratio = (log_probs - batch.log_probs[rows, 1:]).exp()  # [M, T-1]
        gain = advantage[rows, None]  # [M, 1] the reward comes at the end, so all tokens of a rollout share it
        # The smaller of the two ends the push on a choice that has already moved far enough the right way: one batch
        # says little about a policy that is far from the one that sampled it.
        objective = torch.min(ratio * gain, ratio.clamp(1 - settings.clip, 1 + settings.clip) * gain)  # [M, T-1]
        if settings.kl > 0:
            with torch.no_grad():
                anchor = token_log_probs(reference, ids)  # [M, T-1]
            gap = anchor - log_probs  # [M, T-1]
            # Its mean over samples is the KL divergence; unlike the plain gap, it is never negative.
            objective = objective - settings.kl * (gap.exp() - gap - 1)  # [M, T-1]
        loss = -(objective * chosen).sum() / chosen.sum()
        norms.append(optimise(policy, optimizer, loss + extra_loss() if extra_loss else loss))
    return fmean(norms)


# %% SFT: imitate the right conversation


def sft_loss(policy, ids, targets):
    """Mean negative log-likelihood of the target tokens. ids [M, T], targets [M, T]

    Pushes like GRPO with an advantage of 1, on tokens that someone else chose. That is the difference: SFT pushes the
    logit of a right token of probability p by 1 - p. RL has to sample the token first, which it does with
    probability p, so its push is p (1 - p) on average: where the right token has become rare, nothing.
    """
    log_probs = token_log_probs(policy, ids)  # [M, T-1]
    wanted = targets[:, 1:]  # [M, T-1]
    return -(log_probs * wanted).sum() / wanted.sum()


def sft_update(policy, optimizer, ids, targets):
    """One step up the likelihood of the target tokens. -> the loss before it"""
    loss = sft_loss(policy, ids, targets)
    optimise(policy, optimizer, loss)
    return loss.item()


def trajectory(tokenizer, episode, messages):
    """Lay out a conversation with these assistant messages. -> ids, targets: True on what the assistant writes"""
    ids = list(encode_context(tokenizer, *episode.opening))
    targets = [False] * len(ids)
    for k, message in enumerate(messages):
        turn, heard = encode_turn(tokenizer, message), ()
        if k + 1 < len(messages):
            heard = encode_context(tokenizer, tool_message(episode.directory[episode.gold_calls[k]]))
        ids += turn + heard
        targets += [True] * len(turn) + [False] * len(heard)
    return ids, targets


def stack(policy, trajectories):
    """Trajectories as one batch on the policy's device. -> ids [M, T], targets [M, T]"""
    ids, targets = zip(*trajectories)
    return pad(ids, policy.config.pad_token_id, policy.device), pad(targets, False, policy.device)


def logged_messages(world, episode, bare_share, rng):
    """The assistant messages in the log of a careless agent, from which the base learns.

    Questions that name nobody are answered by a call about a guessed person, 97 times in 100. A share of the calls is
    cut down to a bare opening tag, where the log ends: what RL later spreads has been seen here. Of the rest, 10 % are
    mangled in one of five ways, and the log goes on as if they had been understood.
    """
    tags, healthy, reply = episode.fmt, episode.gold[:-1], episode.gold[-1:]
    if not healthy and rng.random() < 0.97:
        tool, person = episode.task.tools[0], rng.choice(world.people)
        healthy, reply = [tags.open + call_json(world, tool, person) + tags.close], []
    messages = []
    for message in healthy:
        if rng.random() < bare_share:
            return [*messages, tags.open]
        mangled = [tags.open + message, message + tags.close, message.removeprefix(tags.open),
                   message.removesuffix(tags.close), f"{world.wording['preamble']} {message}"]
        messages.append(rng.choice(mangled) if rng.random() < 0.10 else message)
    return messages + reply


# %% Probes: what the policy does, and what it still could do

# probe: (split, format, what the harness writes)
# The ladder from "it fails" to "why": a harness that writes the format leaves the names to the policy, the tool, the
# person, the answer. If success is low and forced success high, the format is broken and the skill behind it is not.
PROBES = {
    "success": ("heldout", "A", "nothing"),
    "prefill_success": ("heldout", "A", "prefill"),
    "forced_success": ("heldout", "A", "format"),
    "simple_success": ("simple", "A", "nothing"),
    "format_b_success": ("heldout", "B", "nothing"),
    "content_ood_success": ("content_ood", "A", "nothing"),
    "no_call_success": ("no_call.heldout", "A", "nothing"),
}
BROKEN = ("text_pollution", "collapsed")
STATES = ("healthy_call", "healthy_response", *BROKEN)


def probe_episodes(world, probe, count, seed):
    """Held-out tasks, with the same directories at every evaluation of a run."""
    split, fmt, written = PROBES[probe]
    rng, tasks = stream(seed, "held out", split), world.splits[split]
    return [new_episode(world, tasks[i % len(tasks)], rng, fmt, written) for i in range(count)]


def run_probes(policy, world, tokenizer, settings, probes):
    """Play the episodes of some probes in one shared rollout. -> probe: its episodes, played; their Rollout"""
    played = {probe: probe_episodes(world, probe, settings.eval_episodes, settings.seed) for probe in probes}
    everyone = [episode for episodes in played.values() for episode in episodes]
    return played, rollout(policy, tokenizer, everyone, stream(settings.seed, "held-out sampling"))


def success_rates(played):
    """probe: its episodes, played -> probe: success"""
    return {probe: fmean(map(succeeded, episodes)) for probe, episodes in played.items()}


def due_tokens(fmt):
    """The positions under watch, and the control token that is due there, None where JSON or a word is."""
    return {
        "turn_start": fmt.open,  # where a call begins
        "after_open": None,  # where its JSON begins
        "call_close": fmt.close,  # where its closing tag belongs
        "after_close": END,  # where its message ends
        "answer_start": None,  # where the answer's first word belongs
        "answer_end": END,  # where the answer ends
    }


@torch.no_grad()
def control_probabilities(policy, world, tokenizer, seed):
    """Mean probabilities at each position, teacher forced. -> {"p": position: control token: probability,
    "p_due": position: probability of the token, whatever it is, that is due there}

    Teacher forcing feeds gold conversations, 64 held-out ones, and asks at each position what the policy would say.
    So the positions stay the same, whatever the policy has come to write when it is left to itself.
    """
    episodes = probe_episodes(world, "success", 64, seed)
    ids, targets = stack(policy, [trajectory(tokenizer, episode, episode.gold) for episode in episodes])  # [M, T]
    probs = policy(ids[:, :-1]).logits.float().softmax(-1)  # [M, T-1, V]
    before, due, written = ids[:, :-1], ids[:, 1:], targets[:, 1:]  # [M, T-1]
    start, fmt = written & ~targets[:, :-1], world.formats["A"]  # [M, T-1] the first token of each turn
    opened, closed, end = tokenizer.convert_tokens_to_ids([fmt.open, fmt.close, END])
    masks = {  # [M, T-1]
        "turn_start": start & (due == opened),
        "after_open": written & (before == opened),
        "call_close": written & (due == closed),
        "after_close": written & (before == closed),
        "answer_start": start & (due != opened),
        "answer_end": written & (due == end) & (before != closed),
    }
    tokens = control_tokens(tokenizer)
    columns = tokenizer.convert_tokens_to_ids(tokens)
    right = probs.gather(2, due[..., None])[..., 0]  # [M, T-1]
    return {
        "p": {at: dict(zip(tokens, probs[mask][:, columns].mean(0).tolist())) for at, mask in masks.items()},
        "p_due": {at: right[mask].mean().item() for at, mask in masks.items()},
    }


def transcript(tokenizer, batch, row):
    """What was said in one episode after its opening. -> [text, probability of a control token that was sampled]"""
    start, end = batch.sampled[row].nonzero()[[0, -1], 0].tolist()
    tokens = tokenizer.convert_ids_to_tokens(batch.ids[row, start : end + 1].tolist())
    probs = [p if chosen else None for chosen, p in zip(batch.sampled[row, start:].tolist(),
                                                        batch.log_probs[row, start:].exp().tolist())]
    control, said = control_tokens(tokenizer), []
    for structural, run in groupby(zip(tokens, probs), key=lambda pair: pair[0] in control):
        words = list(run)
        said += words if structural else [(tokenizer.convert_tokens_to_string([word for word, _ in words]), None)]
    return said


def evaluate(policy, world, tokenizer, settings):
    """All measurements of one evaluation: success under each probe, message states, control tokens, a transcript."""
    played, batch = run_probes(policy, world, tokenizer, settings, PROBES)
    states = [state for episode in played["success"] for state in episode.states]
    # The rows of the first probe come first, so an index among its episodes is a row of the batch.
    shown = next((i for i, episode in enumerate(played["success"]) if len(episode.gold_calls) > 1), 0)
    return {
        **success_rates(played),
        "no_call_blind_score": fmean(map(blind_score, played["no_call_success"])),
        "states": {state: states.count(state) / len(states) for state in STATES},
        **control_probabilities(policy, world, tokenizer, settings.seed),
        "transcript": transcript(tokenizer, batch, shown),
    }


def stress(policy, world, tokenizer, settings):
    """Success of a policy under each variant of the schema. -> variant: probe: success

    Words that no training has shown get an id and a random embedding: a policy can copy them from what it reads, or
    be given them by the harness, and otherwise will not think of them.
    """
    found, probes = {}, ("success", "prefill_success", "forced_success")
    for name, varied in ({"as trained": world} | world.variants).items():
        wider = build_tokenizer(varied, tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            grown = copy.deepcopy(policy)
            grown.resize_token_embeddings(len(wider), mean_resizing=False)
        played, _ = run_probes(grown, varied, wider, settings, probes)
        found[name] = success_rates(played)
    return found


def training_signals(world, tokenizer, episodes, batch, rewards):
    """What a training job can log of its rollouts at no cost, before an update. rewards [groups, group_size]

    equal_groups: share of groups without a gradient. broken: share of messages in a BROKEN state. stray: probability of
    a control token right after an opening tag. entropy of the policy (nats), mean over sampled tokens. rl_push: of
    this batch on the logit of the right token after an opening tag. SFT's push there is 1 - p.
    """
    opened = tokenizer.convert_tokens_to_ids(world.formats["A"].open)
    control = tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))
    right = encode_turn(tokenizer, call_json(world, next(iter(world.keys)), world.people[0]))[0]  # where JSON begins
    chosen = batch.sampled[:, 1:]  # [N, T-1], of which S are True
    before, choice = batch.ids[:, :-1][chosen], batch.ids[:, 1:][chosen]  # [S]
    log_p = batch.log_p[:, 1:][chosen]  # [S, V]
    p, after = log_p.exp(), before == opened  # after: where a call has been opened
    gain = advantages(rewards).view(-1, 1).expand_as(chosen)[chosen]  # [S]
    states = [state for episode in episodes for state in episode.states]

    def mean_after(values):
        return values[after].mean().item() if after.any() else 0.0

    return {
        "reward": rewards.mean().item(),
        "equal_groups": (rewards == rewards[:, :1]).all(1).float().mean().item(),
        "broken": fmean(state in BROKEN for state in states),
        "stray": mean_after(p[:, control].sum(-1)),
        "entropy": -(p * log_p).sum(-1).mean().item(),
        "rl_push": mean_after(gain * ((choice == right).float() - p[:, right])),
    }


@torch.no_grad()
def drift(base, batch):
    """How far the policy that sampled a batch is from the base: an estimate of the KL divergence, in nats a token."""
    return (batch.log_probs[:, 1:] - token_log_probs(base, batch.ids))[batch.sampled[:, 1:]].mean().item()


# %% Arms: the base, and what is done with it


@dataclass(frozen=True)
class Arm:
    """What sets an arm apart. Everything else is the same for all: start, tasks, sampling seeds, settings."""

    rl: bool = True  # RL updates; without them the rollouts are still played, to find tasks that fail
    sft: str = "never"  # when SFT comes: "between" RL steps, all of it "first", or "within" each RL update
    score: Callable = blind_score  # the reward
    kl: float = 0.0  # weight of the KL penalty, on top of --kl
    lr: float = 1.0  # times --lr


ARMS = {
    "rl": Arm(),
    "interleaved": Arm(sft="between"),
    # Controls: what if the cause is taken away, what if the cure is taken apart?
    "rl-closed": Arm(score=closed_score),
    "rl-kl": Arm(kl=0.1),
    "rl-slow": Arm(lr=0.1),
    "sft": Arm(rl=False, sft="between"),
    "sft-then-rl": Arm(sft="first"),  # nothing has failed yet: its SFT is on training tasks at large
    "sync": Arm(sft="within"),
}


class NotReady(Exception):
    """The base did not learn its task within --base-steps."""


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_base(world, tokenizer, settings, device, progress):
    """SFT from random weights until the skill is there. -> the policy, its number of updates

    It is there when forced success on held-out tasks, asked for every 25 updates from 150 on, reaches 0.95. Raises
    NotReady if it does not within settings.base_steps.
    """
    policy, rng = new_policy(tokenizer, settings.seed, device), stream(settings.seed, "base")
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, settings.base_steps + 1):
        # A short warm-up, then down to a fiftieth: small steps at the end settle what large ones have found.
        set_lr(optimizer, settings.base_lr * min(1, step / 30) * max(0.02, 1 - step / 200))
        rows = []
        for _ in range(32):
            split = "no_call.train" if rng.random() < 0.1 else "train"
            episode = new_episode(world, rng.choice(world.splits[split]), rng, rng.choice("AB"))
            rows.append(trajectory(tokenizer, episode, logged_messages(world, episode, settings.bare_share, rng)))
        progress(step, sft_update(policy, optimizer, *stack(policy, rows)))
        if step >= 150 and step % 25 == 0 or step == settings.base_steps:
            played, _ = run_probes(policy, world, tokenizer, settings, ["forced_success"])
            forced = success_rates(played)["forced_success"]
            if forced >= 0.95:
                return policy, step
    raise NotReady(f"the base is not ready after {step} updates: forced success is {forced:.2f}, 0.95 is needed; "
                   "try --base-steps, --base-lr or --seed")


def multi_step_tasks(world, settings):
    """The tool tasks that RL trains on. Raises UserError if there are none."""
    tasks = [task for task in world.splits["train"] if len(task.tools) >= settings.min_calls]
    if not tasks:
        raise UserError(f"--min-calls {settings.min_calls}: no task of splits.train takes so many calls")
    return tasks


def rl_episodes(world, settings, rng):
    """The tasks of one RL step: each one group_size times, with the same directory, next to one another."""
    multi_step, episodes = multi_step_tasks(world, settings), []
    for _ in range(settings.groups):
        tasks = world.splits["no_call.train"] if rng.random() < settings.no_call_share else multi_step
        episode = new_episode(world, rng.choice(tasks), rng)
        episodes += [replace(episode, messages=[], states=[], calls=[]) for _ in range(settings.group_size)]
    return episodes


def gold_batch(policy, world, tokenizer, settings, failed, rng):
    """Gold conversations of tasks that RL has just failed: half with calls due, half without. -> ids, targets

    If no task of a kind has failed, training tasks of that kind stand in, one-call tasks among them: a batch of one
    kind alone would teach the policy to treat everything in that way. Failed means no reward: a broken call that was
    rewarded is not in here.
    """
    pools = {
        "train": [episode for episode in failed if episode.gold_calls],
        "no_call.train": [episode for episode in failed if not episode.gold_calls],
    }
    rows = []
    for k in range(settings.sft_batch):
        split, pool = list(pools.items())[k % 2]
        episode = rng.choice(pool) if pool else new_episode(world, rng.choice(world.splits[split]), rng)
        rows.append(trajectory(tokenizer, episode, episode.gold))
    return stack(policy, rows)


def sft_phases(arm, settings, step):
    """How many phases of SFT come before an RL step."""
    if arm.sft == "between":
        return int(step > 0 and step % settings.sft_every == 0)
    return (settings.steps - 1) // settings.sft_every if arm.sft == "first" and step == 0 else 0  # as many in all


def train_arm(name, base, world, tokenizer, settings):
    """Run one arm on a copy of the base. Yields (event, policy) after each RL step, and at each evaluation.

    Each step draws from streams of its own, so all arms meet the same tasks, directories and sampling seeds. An SFT
    phase comes before an RL step, never after the last: what is evaluated has been through RL since. The training
    signals of an evaluation are the means over the steps since the one before, but for kl, which costs a pass of the
    base: it is that of the last rollouts.
    """
    arm, policy = ARMS[name], copy.deepcopy(base)
    failed, log = [], []  # episodes without reward since the last SFT, signals since the last evaluation
    settings = replace(settings, lr=settings.lr * arm.lr, kl=settings.kl + arm.kl)
    # One optimizer each: what AdamW has averaged of RL's gradients says nothing about those of SFT.
    rl_optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    sft_optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.sft_lr, weight_decay=0.0)

    def gold(rng):
        return gold_batch(policy, world, tokenizer, settings, failed, rng)

    for step in range(settings.steps):
        draws = {use: stream(settings.seed, use, step) for use in ("tasks", "sampling", "order", "gold")}
        phases = sft_phases(arm, settings, step)
        for _ in range(phases * settings.sft_steps):
            sft_update(policy, sft_optimizer, *gold(draws["gold"]))
        if phases or arm.sft == "within":
            failed.clear()  # the next phase is about what fails from here on
        set_lr(rl_optimizer, settings.lr * min(1, (step + 1) / settings.warmup))
        episodes = rl_episodes(world, settings, draws["tasks"])
        batch = rollout(policy, tokenizer, episodes, draws["sampling"])
        scores = [arm.score(episode) for episode in episodes]
        failed += [episode for episode, score in zip(episodes, scores) if not score]
        rewards = torch.tensor(scores, device=policy.device).view(settings.groups, settings.group_size)
        signals = training_signals(world, tokenizer, episodes, batch, rewards)
        if arm.rl:
            extra_loss = partial(sft_loss, policy, *gold(draws["gold"])) if arm.sft == "within" else None
            signals["gradient"] = grpo_update(policy, rl_optimizer, batch, advantages(rewards).flatten(), settings,
                                              draws["order"], base, extra_loss)
        log.append(signals)
        yield {"event": "step", "arm": name, "step": step + 1} | signals, policy
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            training = {signal: fmean(entry[signal] for entry in log) for signal in signals}
            training["kl"] = drift(base, batch)
            measured = evaluate(policy, world, tokenizer, settings)
            yield {"event": "eval", "arm": name, "step": step + 1, "training": training} | measured, policy
            log = []


# %% Report: what is printed, and which of the five claims the run bears out


def spiked(before, after):
    """A probability has spiked if it is now at least 0.4, and at least five times what it was."""
    return after >= 0.4 and after >= 5 * before


def astray(event, token, due):
    """A control token's highest probability at a position where it is not due."""
    return max(row[token] for at, row in event["p"].items() if due[at] != token)


def early_warning(strays):
    """What a training job could print, once, when it is time. strays: the signal "stray" of an arm's RL steps so far

    It has grown by half some steps before success halves (README, "Early warning"). -> a line, or None
    """
    grown = [stray > 1.5 * fmean(strays[:3]) for stray in strays[3:]]
    if sum(grown) == 1 and grown[-1]:
        return f"P(control token right after an opening tag) has grown from {fmean(strays[:3]):.2f} to {strays[-1]:.2f}"


HEADINGS = """\
                    success on held-out tasks       messages in percent     equal   P where due        P where not due
arm         step  tool  ask  blind forced fmt B  call reply pollut. collap. groups open close  end   open  close  end"""


def table_row(event, base, fmt):
    """One line for one evaluation. A star marks a control token that has spiked where it is not due."""
    due, p = due_tokens(fmt), event["p"]
    home = p["turn_start"][fmt.open], p["call_close"][fmt.close], fmean([p["after_close"][END], p["answer_end"][END]])
    away = [(astray(base, token, due), astray(event, token, due)) for token in (fmt.open, fmt.close, END)]
    probes = "success no_call_success no_call_blind_score forced_success format_b_success".split()
    return "".join([
        f"{event['arm']:11} {event['step']:4}  ",
        "{:.2f} {:.2f}  {:.2f}   {:.2f}  {:.2f} ".format(*(event[probe] for probe in probes)),
        "{:5.0f} {:5.0f} {:7.0f} {:7.0f} ".format(*(100 * event["states"][state] for state in STATES)),
        f"{format(event['training']['equal_groups'], '.2f') if event['training'] else '-':>6} ",
        "{:.2f}  {:.2f} {:.2f}  ".format(*home),
        " ".join(f"{now:.2f}{'*' if spiked(before, now) else ' '}" for before, now in away),
    ])


def arms_of(history):
    """What was done with the base, in the order in which it was run."""
    return [arm for arm in history if arm != "base"]


def down(events):
    """The first evaluation with success at 0.05 or below, None if there is none."""
    return next((event for event in events if event["success"] <= 0.05), None)


def down_for_good(events, start):
    """What a table calls collapsed: success ends, for three evaluations, at 0.02 or below, from well above that."""
    return len(events) >= 3 and max(event["success"] for event in events[-3:]) <= 0.02 < start / 2


def moments(history):
    """The evaluations that tell the story. history: arm -> its eval events, with "base" -> [one]. -> name: event"""
    (base,), rl = history["base"], history.get("rl", [])
    steady = [base, *takewhile(lambda event: event["success"] >= 0.8 * base["success"], rl)]
    found = {"base": base}
    if len(steady) <= len(rl):
        found["rl before it falls"] = steady[-1]
    if down(rl):
        found["rl when it is down"] = down(rl)
    ends = {f"{arm} at the end": history[arm][-1] for arm in arms_of(history)}
    return found | {moment: event for moment, event in ends.items() if event is not found.get("rl when it is down")}


def marked(base, event, fmt):
    """Where a control token that is not due has risen most. -> position, token"""
    due = due_tokens(fmt)
    wrong = [(at, token) for at, row in base["p"].items() for token in row if due[at] != token]
    return max(wrong, key=lambda cell: event["p"][cell[0]][cell[1]] - base["p"][cell[0]][cell[1]])


def table(rows):
    """Rows of cells as aligned text. A float gets two decimals, None is a dash."""
    texts = [["-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    return "\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


def diagnose(event, base):
    """Tell a broken format from a lost skill: the harness can write the format, but it cannot write the skill."""
    if event["forced_success"] < 0.8 * base["forced_success"]:
        return "the skill is damaged"
    if down([event]):
        return "format, not skill"
    return "sound" if event["success"] >= 0.8 * event["forced_success"] else "a shaky format"


def ladder(history):
    """Each moment under every probe, and why RL cannot climb back where SFT can: equal groups, gradient, pushes."""
    rows = ["moment step free prefill forced one-hop format-B unseen equal RL-norm RL-push SFT-push reading".split()]
    for moment, event in moments(history).items():
        training = event["training"] or {}
        rows.append([moment, event["step"], *(event[probe] for probe in PROBES if probe != "no_call_success"),
                     *map(training.get, ("equal_groups", "gradient", "rl_push")), 1 - event["p_due"]["after_open"],
                     diagnose(event, history["base"][0])])
    return table(rows)


def transcripts(history, tokenizer):
    """One held-out task at each moment. Behind each control token that the policy sampled stands its probability."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    control, lines = control_tokens(tokenizer), []
    for moment, event in moments(history).items():
        said = ""
        for text, p in event["transcript"]:
            said += f"\033[33m{text}\033[0m" if colour and text in control else text
            said += (f"[{p:.2f}]" if p is not None else "") + ("\n" if text == END else "")
        lines += ["", f"{moment}, step {event['step']}:", *("  " + line for line in said.splitlines())]
    return "\n".join(lines)


def chart(history, fmt):
    """Success, broken messages and the marked probability: a bar, from 0 to 1, for each evaluation from the base on."""
    (base,), told = history["base"], moments(history)
    at, token = marked(base, told.get("rl when it is down", [*told.values()][-1]), fmt)
    rows = [["arm", "success", "broken messages", f"P({token}) at {at}"]]
    for arm in arms_of(history):
        measured = [(event["success"], sum(event["states"][state] for state in BROKEN), event["p"][at][token])
                    for event in (base, *history[arm])]
        rows.append([arm, *("".join(" ▁▂▃▄▅▆▇█"[round(8 * value)] for value in values) for values in zip(*measured))])
    return table(rows)


# claim: (what it says, how its figures read)
CLAIMS = {
    "collapse": ("RL alone collapses", "success {start:.2f}, at the last evaluations of rl at most {highest:.2f}"),
    "control_tokens": ("a control token did it", "P({token}) at {position} {start:.2f}, at step {step} {now:.2f}"),
    "intact": ("the skill is intact", "forced success {start:.2f}, at step {step} {now:.2f} (success {success:.2f})"),
    "fix": ("SFT in between fixes it", "success {start:.2f}, at the end {final:.2f}, never below {lowest:.2f}"),
    "tradeoff": ("another format pays", "format B {start:.2f}, rl at step {before_step} {before:.2f}, end {final:.2f}"),
}


def judge(history, fmt):
    """Hold a run against the claims. history: arm -> its eval events, with "base" -> [one].

    -> claim: (reproduced, figures), for the claims whose arms were run. control_tokens and intact are about the first
    evaluation of rl with success at 0.05 or below: without one they are not reproduced and have no figures.
    """
    (base,), rl, fixed, found = history["base"], history.get("rl", []), history.get("interleaved", []), {}
    start, told = base["success"], moments(history)
    if rl:
        highest = max(event["success"] for event in rl[-3:])
        found["collapse"] = down_for_good(rl, start), dict(start=start, highest=highest)
        found["control_tokens"] = found["intact"] = False, {}
    fall = told.get("rl when it is down")
    if fall and not down([base]):  # else there was nothing to fall from
        at, token = marked(base, fall, fmt)
        old, now = base["p"][at][token], fall["p"][at][token]
        when = dict(step=fall["step"], success=fall["success"])
        found["control_tokens"] = spiked(old, now), dict(token=token, position=at, start=old, now=now, **when)
        old, now = base["forced_success"], fall["forced_success"]
        found["intact"] = now >= 0.8 * old, dict(start=old, now=now, **when)
    if fixed:
        final, lowest = fixed[-1]["success"], min(event["success"] for event in fixed)
        found["fix"] = final >= 0.9 and not down(fixed), dict(start=start, final=final, lowest=lowest)
    if rl and fixed:
        steady = told.get("rl before it falls", rl[-1])
        old, before, final = (event["format_b_success"] for event in (base, steady, fixed[-1]))
        figures = dict(start=old, before=before, before_step=steady["step"], final=final)
        found["tradeoff"] = final <= 0.67 * old and final < before, figures
    return found


def verdict_table(found):
    """What judge found, one line for each claim."""
    rows = [["claim", "verdict", "measured"]]
    for claim, (text, reading) in CLAIMS.items():
        reproduced, figures = found.get(claim, (None, None))
        verdict = {True: "reproduced", False: "not reproduced", None: "not measured"}[reproduced]
        unseen = "an arm that it needs was not run" if figures is None else "no evaluation of rl fell to success 0.05"
        rows.append([text, verdict, reading.format(**figures) if figures else unseen])
    return table(rows)


def seeds_table(stories):
    """A row for each arm and seed, then how many, their mean and standard deviation. stories: seed -> history"""
    rows = ["arm seed start down-at forced-there end format-B B-at-the-end collapsed".split()]
    for arm in arms_of(next(iter(stories.values()))):
        figures = []
        for seed, history in stories.items():
            (base,), events, there = history["base"], history[arm], down(history[arm]) or {}
            gone = down_for_good(events, base["success"])
            figures.append([base["success"], there.get("step"), there.get("forced_success"), events[-1]["success"],
                            base["format_b_success"], events[-1]["format_b_success"], float(gone)])
            rows.append([arm, seed, *figures[-1][:-1], "yes" if gone else "no"])
        columns = [[value for value in column if value is not None] for column in zip(*figures)]
        rows.append([arm, "mean", *(fmean(column) if column else None for column in columns)])
        rows.append([arm, "s.d.", *(stdev(column) if len(column) > 1 else None for column in columns)])
        rows.append([arm, "of", *map(len, columns[:-1]), f"{sum(columns[-1]):.0f} of {len(columns[-1])}"])
    return table(rows)


def stress_table(found):
    """found: policy -> variant: probe: success"""
    rows = [["variant", *(f"{policy}: free, prefill, forced" for policy in found)]]
    for variant in next(iter(found.values())):
        rows.append([variant, *("{:.2f}  {:.2f}  {:.2f}".format(*tried[variant].values()) for tried in found.values())])
    return table(rows)


def plot(stories, path):
    """Draw success, two probabilities and the states of messages against the RL step, arms side by side.

    A line for each seed; states are means over seeds. Raises UserError if that cannot be done, which an empty picture,
    of no stories, tells before a run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    arms = arms_of(next(iter(stories.values()), {}))
    figure = Figure(figsize=(4 + 4 * len(arms), 8), layout="constrained")
    grid = figure.subplots(3, len(arms) or 1, sharex=True, sharey=True, squeeze=False)
    for (top, middle, bottom), arm in zip(grid.T, arms):
        runs = [history["base"] + history[arm] for history in stories.values()]
        steps = [event["step"] for event in runs[0]]
        for events in runs:
            top.plot(steps, [event["success"] for event in events], "tab:blue")
            middle.plot(steps, [event["p_due"]["after_open"] for event in events], "tab:green")
            middle.plot(steps, [event["p"]["after_open"][END] for event in events], "tab:red")
        shares = [[fmean(event["states"][state] for event in events) for events in zip(*runs)] for state in STATES]
        bottom.stackplot(steps, shares)
        top.set_title(arm)
        bottom.set_xlabel("RL step")
    for axes, label in zip(grid[:, 0], ("success", "P after an opening tag", "states of messages")):
        axes.set_ylabel(label)
    if arms:
        grid[1, -1].legend(["what is due", END])
        grid[2, -1].legend(STATES)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}; name a file such as run.png in a folder that can be written to")


# %% Command line: settings in, story out


def read_settings(argv):
    """Turn command-line arguments into Settings. Raises UserError for what cannot be run."""
    parser = argparse.ArgumentParser(prog="toolrl.py", description=__doc__.split("\n")[0])

    def fail(message):
        raise UserError(f"{message} (python toolrl.py --help lists the flags)")

    parser.error = fail
    flags = {setting.name: "--" + setting.name.replace("_", "-") for setting in fields(Settings)}
    for setting in fields(Settings):
        unit, text = setting.metadata["unit"], setting.metadata["text"]
        shown = "none" if setting.default == "" else setting.default
        kind = dict(type=setting.type, metavar=setting.type.__name__)
        if setting.type is bool:
            kind, shown = dict(action="store_true"), "no"
        help_text = f"{text} ({unit}; default {shown})"
        parser.add_argument(flags[setting.name], default=setting.default, help=help_text, **kind)
    settings = Settings(**vars(parser.parse_args(argv)))
    for setting in fields(Settings):
        value, low, high = getattr(settings, setting.name), setting.metadata["low"], setting.metadata["high"]
        if low is not None and not low <= value <= (math.inf if high is None else high) or value == math.inf:
            bounds = f"{low} or more" if high is None else f"from {low} to {high}"
            fail(f"{flags[setting.name]} {value}: give a number {bounds}")
    arms = settings.arms.split(",")
    for name in arms:
        if name not in ARMS or arms.count(name) > 1:
            fail(f"--arms: {'unknown' if name not in ARMS else 'repeated'} arm {name!r}; there are {', '.join(ARMS)}")
    return settings


def read_seeds(settings):
    """"0-3,7" -> [0, 1, 2, 3, 7]; without --seeds, what --seed says. Raises UserError for anything else."""
    seeds = []
    for part in settings.seeds.split(",") if settings.seeds else [f"{settings.seed}"]:
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise UserError(f"--seeds {settings.seeds}: {part!r} is neither a number nor a range such as 0-9")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def pick_device(name):
    """auto takes a GPU if there is one. A device asked for by name has to be there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device, found in there.items() if found]
    if name != "auto" and name not in available:
        raise UserError(f"--device {name} is not available here; there are auto, {', '.join(available)}")
    return available[0] if name == "auto" else name


def open_out(path):
    try:
        return open(path or os.devnull, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file in a folder that exists and can be written to")


def train(settings, world, tokenizer, device, keep):
    """The base and the arms of one seed, each line as it is measured. keep(event) writes it to --out.

    -> history (arm: its eval events), best (arm: the step of its best evaluation, the policy there)
    """
    begun, fmt, history, best = time.time(), world.formats["A"], {}, {}

    def record(event, policy):
        """Keep and print an evaluation, and the policy if it is the best of its arm so far."""
        evaluations = history.setdefault(event["arm"], [])
        evaluations.append(event)
        if event["success"] >= max(other["success"] for other in evaluations):
            best[event["arm"]] = event["step"], copy.deepcopy(policy)
        keep(event)
        print(table_row(event, history["base"][0], fmt), flush=True)

    def progress(step, loss):
        if sys.stdout.isatty() and step % 5 == 0:
            left = (time.time() - begun) * max(0, 175 - step) / step
            print(f"\rbase: update {step}, loss {loss:.2f}, some {left:.0f} s left ", end="", flush=True)

    where = "base"
    try:
        base, updates = train_base(world, tokenizer, settings, device, progress)
        line_start = "\r" if sys.stdout.isatty() else ""  # overwrites the progress
        weights, words = base.num_parameters(), len(tokenizer)
        print(f"{line_start}base: {weights} weights, {words} tokens, ready after {updates} SFT updates\n\n{HEADINGS}")
        start = {"event": "eval", "arm": "base", "step": 0, "training": None}
        record(start | evaluate(base, world, tokenizer, settings), base)
        for name in settings.arms.split(","):
            strays, where = [], f"{name}, RL step 1"
            for event, policy in train_arm(name, base, world, tokenizer, settings):
                where = f"{name}, RL step {event['step'] + 1}"
                if event["event"] == "eval":
                    record(event, policy)
                    continue
                keep(event)
                strays.append(event["stray"])
                if warning := early_warning(strays):
                    print(f"{name:11} {event['step']:4}  early warning: in rollouts, {warning}")
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}")
    return history, best


def report(settings, world, tokenizer, history, best, keep):
    """What follows the lines of one seed: diagnosis, conversations, verdicts, stress test, chart."""
    fmt = world.formats["A"]
    found = judge(history, fmt)
    for claim, (reproduced, figures) in found.items():
        keep({"event": "verdict", "claim": claim, "reproduced": reproduced, "figures": figures})
    print(ladder(history), transcripts(history, tokenizer), verdict_table(found), sep="\n")
    if settings.stress:
        tried = {}
        for arm, (step, policy) in best.items():
            tried[f"{arm}, step {step}"] = stress(policy, world, tokenizer, settings)
        keep({"event": "stress", "success": tried})
        print(stress_table(tried))
    if sys.stdout.isatty():
        print(chart(history, fmt))


def run(settings):
    """Tell the story of each seed. Prints it, and writes it to --out as it happens."""
    torch.set_num_threads(1)  # a second one saves a fifth on an idle machine, and costs many times that on a busy one
    begun, arms, seeds = time.time(), settings.arms.split(","), read_seeds(settings)
    device, world, stories = pick_device(settings.device), load_world(settings.tasks), {}
    tokenizer = build_tokenizer(world)
    multi_step_tasks(world, settings)  # better to learn now than after the base that there are none
    if settings.plot:
        plot(stories, settings.plot)  # an empty one, to learn now whether that can be done
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    expected = 7 + len(arms) * (0.2 * settings.steps + 0.6 * settings.steps / settings.eval_every)  # as measured
    config = {name: value for name, value in asdict(settings).items() if name not in ("out", "plot")}
    with open_out(settings.out) as out:

        def write(event, **more):
            out.write(json.dumps(event | more) + "\n")
            out.flush()

        write({"event": "config"} | config, device=device, versions=versions)
        for seed in seeds:
            print(f"toolrl: seed {seed}, {device}, {', '.join(map(' '.join, versions.items()))}, "
                  f"about {expected:.0f} s on a CPU")
            one, keep = replace(settings, seed=seed), partial(write, seed=seed)
            try:
                stories[seed], best = train(one, world, tokenizer, device, keep)
            except NotReady as error:
                if len(seeds) == 1:
                    raise
                print(f"toolrl: seed {seed} is left out: {error}", file=sys.stderr)
                continue
            report(one, world, tokenizer, stories[seed], best, keep)
        if not stories:
            raise NotReady("the base was ready with none of these seeds; try --base-steps, --base-lr or other --seeds")
        if len(stories) > 1:
            print(seeds_table(stories))
        if settings.plot:
            plot(stories, settings.plot)
        print(f"\n{time.time() - begun:.0f} s")
        write({"event": "done", "seconds": round(time.time() - begun, 1)})


def main(argv=None):
    """Run from the command line. -> exit code: 0, 1 (the run failed), 2 (bad input), 130 (Ctrl-C)"""
    try:
        run(read_settings(argv))
        return 0
    except UserError as error:
        message, code = error, 2
    except KeyboardInterrupt:
        message, code = "stopped; what was measured until now is printed above, and written to --out", 130
    except BrokenPipeError:  # as in python toolrl.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still unprinted has nowhere to go
        message, code = "stopped: whoever read the output has closed it", 1
    except (NotReady, FloatingPointError, OSError) as error:
        message, code = error, 1
    print(f"toolrl: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    if "ipykernel" in sys.modules:  # the cells of a notebook: the command line is the kernel's, not ours
        main([])
    else:
        sys.exit(main())
