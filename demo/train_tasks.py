"""Train the tasks checkpoint: a Glm4 of 2.4 M parameters that answers the questions of ``glm4-deploy eval``.

    python demo/train_tasks.py --output demo/glm4-tasks

The training items are generated. Held-out items, which ``eval`` asks, are never trained on. About 2,700 steps and 30
minutes of one CPU core.

Curriculum: rows of random tokens that repeat come first, because the model learns to copy from them in a minute. The
other kinds begin with easier items: shorter texts, smaller numbers, fewer people.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional as F
from train import (
    CONFIG,
    FusedAttention,
    initialise,
    optimizers_of,
    schedule,
    special_ids,
    train_tokenizer,
    write_tokenizer,
    write_weights,
)

from glm4_deploy.evaluate.items import ITEM_KINDS, is_held_out, items, order, records, sums
from glm4_deploy.evaluate.items.item import Item
from glm4_exporters.config import Glm4Config
from glm4_exporters.task_models import Glm4ForCausalLM

HERE = Path(__file__).parent
VOCABULARY = 896
ID = special_ids(VOCABULARY)
# As the books' expression, but each digit is a token, so that sums can be learned.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TASKS_CONFIG = CONFIG | {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 5,
    "intermediate_size": 256,
    "eos_token_id": [ID[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")],
    "pad_token_id": ID["<|endoftext|>"],
}

ITEMS = 40  # per step
WIDEST = 1.5  # longest over shortest item of a part of a step; a part is padded to its longest item
PROMPT_WEIGHT = 0.005  # of a prompt's token in the loss
# Of an answer's token, else 1: in these kinds, few of the tokens need to be learned.
ANSWER_WEIGHT = {"order": 5.0, "records": 3.0}
CHAT = 0.2  # share of the items in the chat format
COPY_TOKENS = (4, 28)
GROWN = 0.4  # share of a stage, from which all items are as ``eval`` asks them
NEEDLE_WORDS = (40, 220)  # the longest text at the start and from GROWN on
# Several questions about one text are one row. Keys: kinds; values: what a question begins with, and the most questions.
QUESTIONS = {"order": (" Who is ", 2), "needle": ("\nWhat is ", 4), "records": (" Write ", 3)}
ITEMS_ASKED, SIZE_ASKED = 200, {"needle": 200, "records": 2}  # of each kind in the card: words, and people
ITEMS_KEPT = 16  # of each kind in heldout.jsonl
SAMPLE_SIZE = {"needle": 40, "records": 3}  # of the items that the tokenizer is trained on
STEPS = 6  # of arithmetic alone, in one row
LARGEST = (12, 30, 99, sums.LARGEST)  # numbers of easier sums


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        rate: factor of the learning rates in ``train.py``.
        share: of each kind of rows; "copy" is repeated random tokens, "steps" is arithmetic alone.
        decays: whether the learning rate falls to 2 % along a cosine, after the warm-up that each stage has.
        end_share: the weights become this share of those at the stage's end, and the rest of those at its beginning.
    """

    steps: int
    rate: float
    share: dict[str, float]
    decays: bool = False
    end_share: float = 1.0


# Sums and orders were not learned at the full rate, and were at 0.3 of it.
STAGES = (
    Stage(300, 1.0, {"copy": 1.0}),
    Stage(
        1200,
        1.0,
        {"order": 2.0, "sums": 1.0, "steps": 2.0, "needle": 0.8, "calls": 0.4, "records": 1.6, "copy": 0.2},
    ),
    Stage(
        600,
        0.3,
        {"order": 2.4, "sums": 1.0, "steps": 3.2, "needle": 0.5, "calls": 0.4, "records": 2.0, "copy": 0.1},
    ),
    Stage(
        200,
        0.3,
        {"order": 1.2, "sums": 1.0, "steps": 2.6, "needle": 0.3, "calls": 0.03, "records": 4.0, "copy": 0.05},
    ),
    Stage(
        150,
        0.3,
        {"order": 0.8, "sums": 2.0, "steps": 4.0, "needle": 0.3, "calls": 0.08, "records": 1.0},
    ),
    # The whole last stage brings orders and calls above 95 %, where a loss shows less.
    Stage(
        290,
        0.3,
        {"order": 0.8, "sums": 2.0, "steps": 4.0, "needle": 0.3, "calls": 0.2, "records": 1.0},
        decays=True,
        end_share=0.35,
    ),
)


@dataclass(frozen=True)
class Row:
    """Token ids of one training text, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


class Rows:
    """Draws training rows.

    Attributes:
        stage: sets the kinds of rows.
        progress: of the stage, 0 to 1; sets the difficulty.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, seed: int) -> None:
        self.tokenizer, self._chance = tokenizer, random.Random(seed)
        self.stage, self.progress = STAGES[0], 0.0

    def draw(self) -> Row:
        share = self.stage.share
        kind = self._chance.choices(list(share), list(share.values()))[0]
        if kind == "copy":
            return self._repeated()
        if kind == "steps":
            return self._steps()
        while not (asked := [each for each in self._items(kind) if not is_held_out(each)]):
            pass
        return self._of_items(kind, asked)

    def _repeated(self) -> Row:
        tokens = [self._chance.randrange(VOCABULARY) for _ in range(self._chance.randint(*COPY_TOKENS))]
        return Row(tokens * 2, [0.0] * (len(tokens) + 1) + [1.0] * (len(tokens) - 1))

    def _steps(self) -> Row:
        """Sums and differences without a story. The loss counts the results alone."""
        chance, largest = self._chance, self._chance.choice(LARGEST) if self._is_easy() else sums.LARGEST
        row = Row([ID["[gMASK]"], ID["<sop>"]], [0.0, 0.0])
        for _ in range(STEPS):
            one, other = chance.randint(1, 2 * largest), chance.randint(1, largest)
            if chance.random() < 0.5:
                task, result = f" {one} + {other} =", one + other
            else:
                task, result = f" {max(one, other)} - {min(one, other)} =", abs(one - other)
            for text, weight in ((task, 0.0), (f" {result}.", 1.0)):
                ids = _ids(self.tokenizer, text)
                row.ids.extend(ids)
                row.weights.extend([weight] * len(ids))
        return row

    def _is_easy(self) -> bool:
        return self._chance.random() < 1 - self.progress / GROWN

    def _items(self, kind: str) -> Sequence[Item]:
        """Items of one text; at the beginning, often easier ones."""
        chance, easy = self._chance, self._is_easy()
        if kind == "needle":
            return self._needles()
        if kind == "order":
            return chance.sample(
                order.of_size(chance, chance.randint(2, order.SIZE) if easy else order.SIZE), 2
            )
        if kind == "records":
            people = chance.randint(1, records.PEOPLE) if easy else SIZE_ASKED["records"]
            return list(islice(records.of_people(chance, people), QUESTIONS[kind][1]))
        if kind == "sums" and easy:
            return [sums.up_to(chance, chance.choice(LARGEST))]
        return [ITEM_KINDS[kind](chance, 0)]

    def _needles(self) -> list[Item]:
        shortest, longest = NEEDLE_WORDS
        most = shortest + (longest - shortest) * min(1.0, self.progress / GROWN)
        item = ITEM_KINDS["needle"](self._chance, self._chance.randint(14, int(most)))
        text, _, question = item.prompt.rpartition("\n")
        name = item.answer[len("The code of the ") : -len(" is 123.")]
        lines = text.split("\n")
        answers = self._chance.sample(lines, min(QUESTIONS["needle"][1], len(lines)))
        return [
            Item(
                f"{text}\n{question.replace(name, answer[len('The code of the ') : -len(' is 123.')])}",
                answer,
            )
            for answer in answers
        ]

    def _of_items(self, kind: str, asked: Sequence[Item]) -> Row:
        """The first item, then the questions alone of the others."""
        chat = self._chance.random() < CHAT
        row = Row([ID["[gMASK]"], ID["<sop>"]], [0.0, 0.0])
        for number, item in enumerate(asked):
            prompt = item.prompt if number == 0 else item.prompt[item.prompt.rindex(QUESTIONS[kind][0]) + 1 :]
            pair = encoded(self.tokenizer, prompt, item.answer, chat)
            if chat and number:  # the last answer's end begins the next question
                pair = (pair[0][1:], pair[1])
            for ids, weight in zip(pair, (PROMPT_WEIGHT, ANSWER_WEIGHT.get(kind, 1.0)), strict=True):
                row.ids.extend(ids)
                row.weights.extend([weight] * len(ids))
        return row


def encoded(
    tokenizer: tokenizers.Tokenizer, prompt: str, answer: str, chat: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt as ``eval`` writes it, and of the answer with its end."""
    if chat:
        return (
            [ID["<|user|>"], *_ids(tokenizer, f"\n{prompt}\nAnswer:"), ID["<|assistant|>"]],
            [*_ids(tokenizer, f"\n{answer}"), ID["<|user|>"]],
        )
    return _ids(tokenizer, f"{prompt}\nAnswer:"), [*_ids(tokenizer, f" {answer}"), ID["<|endoftext|>"]]


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def by_length(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Parts of rows with about the same length."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if part and len(row.ids) > WIDEST * len(part[0].ids):
            yield part
            part = []
        part.append(row)
    yield part


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Ids [B, S] and weights [B, S]; padding stands right and weighs nothing."""
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [ID["<|endoftext|>"]] * (longest - len(row.ids)) for row in rows]
    weights = [row.weights + [0.0] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(ids), torch.tensor(weights)


class ShortAttention(FusedAttention):
    """For rows of up to about 400 tokens: in bfloat16, training takes a quarter to a half of the fused kernel's time."""

    def __init__(self, config: Glm4Config, length: int) -> None:
        super().__init__(config, length)
        self.mask = torch.full((length, length), float("-inf")).triu(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).float() * self.scale + self.mask
        return scores.softmax(-1).to(value.dtype) @ value


def loss_of(model: Glm4ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the cross entropies of each next token."""
    attend = ShortAttention(model.config, ids.shape[1] - 1)
    hidden = model.model.run(model.model.embed_tokens(ids[:, :-1]), attend)
    counted = weights[:, 1:] > 0
    each = F.cross_entropy(model.lm_head(hidden[counted]).float(), ids[:, 1:][counted], reduction="none")
    return (each * weights[:, 1:][counted]).sum()


def train(model: Glm4ForCausalLM, rows: Rows, stages: Sequence[Stage], save: Path) -> None:
    optimizers, start = optimizers_of(model), time.process_time()
    for number, stage in enumerate(stages, 1):
        rows.stage, average = stage, 0.0
        begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for step in range(stage.steps):
            rows.progress = step / stage.steps
            _set_rate(optimizers, stage, rows.progress)
            average = 0.98 * average + 0.02 * _step(model, optimizers, rows)
            if step % 100 == 99:
                minutes, loss = (time.process_time() - start) / 60, average / (1 - 0.98 ** (step + 1))
                print(f"stage {number}, step {step + 1}: loss {loss:.4f}, {minutes:.1f} min", flush=True)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.lerp_(begun[name], 1 - stage.end_share)
        safetensors.torch.save_model(model, str(save))
        print({kind: right(model, rows.tokenizer, kind, 48) for kind in ITEM_KINDS}, flush=True)


def _set_rate(optimizers: Sequence[torch.optim.Optimizer], stage: Stage, progress: float) -> None:
    share = schedule(progress if stage.decays else min(progress, 0.04))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = stage.rate * group["peak"] * share


def _step(model: Glm4ForCausalLM, optimizers: Sequence[torch.optim.Optimizer], rows: Rows) -> float:
    drawn = [rows.draw() for _ in range(ITEMS)]
    total, whole = 0.0, sum(sum(row.weights[1:]) for row in drawn)
    for part in by_length(drawn):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *padded(part)) / whole
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return total


@torch.no_grad()
def right(model: Glm4ForCausalLM, tokenizer: tokenizers.Tokenizer, kind: str, count: int) -> float:
    """Share of held-out items whose whole answer has the greatest logit at each token."""
    found = 0
    for item in islice(items(kind, 0, SIZE_ASKED.get(kind)), count):
        prompt, answer = encoded(tokenizer, item.prompt, item.answer, chat=False)
        ids = torch.tensor([[ID["[gMASK]"], ID["<sop>"], *prompt, *answer]])
        attend = FusedAttention(model.config, ids.shape[1] - 1)
        hidden = model.model.run(model.model.embed_tokens(ids[:, :-1]), attend)[:, -len(answer) :]
        found += bool((model.lm_head(hidden).argmax(-1)[0] == ids[0, -len(answer) :]).all())
    return found / count


def sample_texts(seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    while True:
        for kind, make in ITEM_KINDS.items():
            item = make(chance, SAMPLE_SIZE.get(kind, 0))
            yield f"{item.prompt}\nAnswer: {item.answer}"


def write_held_out(folder: Path) -> None:
    """``heldout.jsonl``: items with their answers, which export and validate read by default."""
    asked = (item for kind in ITEM_KINDS for item in islice(items(kind, 1, SIZE_ASKED.get(kind)), ITEMS_KEPT))
    lines = (json.dumps({"text": f"{item.prompt}\nAnswer: {item.answer}"}) for item in asked)
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_card(
    model: Glm4ForCausalLM, tokenizer: tokenizers.Tokenizer, arguments: argparse.Namespace
) -> None:
    """``README.md`` from ``card_tasks.md`` and what is measured here."""
    scores = {kind: right(model, tokenizer, kind, ITEMS_ASKED) for kind in ITEM_KINDS}
    card = (
        (HERE / "card_tasks.md")
        .read_text(encoding="utf-8")
        .format(
            parameters=sum(p.numel() for p in model.parameters()),
            items=ITEMS_ASKED,
            words=SIZE_ASKED["needle"],
            people=SIZE_ASKED["records"],
            scores="\n".join(f"| `glm4_{kind}` | {100 * score:.1f} % |" for kind, score in scores.items()),
            python=platform.python_version(),
            torch=torch.__version__,
            tokenizers=tokenizers.__version__,
        )
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tasks checkpoint.")
    parser.add_argument("--output", type=Path, default=HERE / "glm4-tasks")
    parser.add_argument(
        "--first-stage",
        type=int,
        default=1,
        help="the stage to begin with; one behind the last only measures",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="weights to begin with: *.safetensors")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to keep instead of training one")
    parser.add_argument(
        "--save", type=Path, default=Path("glm4-tasks.safetensors"), help="intermediate weights"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    if arguments.tokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(arguments.tokenizer))
    else:
        tokenizer = train_tokenizer(list(islice(sample_texts(arguments.seed), 10_000)), VOCABULARY, WORDS)
    write_tokenizer(tokenizer, arguments.output, ID)
    model = Glm4ForCausalLM(Glm4Config.from_dict(TASKS_CONFIG))
    initialise(model)
    if arguments.resume:
        safetensors.torch.load_model(model, arguments.resume)
    train(model, Rows(tokenizer, arguments.seed), STAGES[arguments.first_stage - 1 :], arguments.save)
    model.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    model.eval()
    write_weights(model, arguments.output, TASKS_CONFIG)
    write_held_out(arguments.output)
    write_card(model, tokenizer, arguments)


if __name__ == "__main__":
    main()
