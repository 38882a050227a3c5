"""Train the demo's draft model: one layer that imitates ``glm4-tiny``, whose vocabulary it has.

    python demo/train_draft.py train.txt --output demo/glm4-tiny-draft

The loss is the divergence of the teacher's distribution from the draft's (Hinton et al., "Distilling the Knowledge in
a Neural Network", 2015), at each position of the teacher's own training text. Embeddings, head, last norm and the
attention of the layer begin as the teacher's. ``demo/corpus.py`` says where the text comes from.
"""

import argparse
import os
import platform
import random
import time
from datetime import date
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from conversations import from_books, small_talk, tool_calls
from torch import Tensor
from torch.nn import functional as F
from train import (
    CONFIG,
    PREFIX,
    FusedAttention,
    batches,
    encode_conversations,
    encode_documents,
    initialise,
    optimizers_of,
    read_documents,
    schedule,
    write_weights,
)

from glm4_exporters.config import Glm4Config
from glm4_exporters.task_models import Glm4ForCausalLM
from glm4_runtime.chat_template import ChatTemplate

HERE = Path(__file__).parent
TEACHER = HERE / "glm4-tiny"
DRAFT_CONFIG = CONFIG | {"num_hidden_layers": 1, "intermediate_size": 256}
# These files are the teacher's: links, so that they stay equal.
SHARED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "heldout.txt")
WINDOW = 512


def teacher_model() -> Glm4ForCausalLM:
    model = Glm4ForCausalLM(Glm4Config.from_dict(CONFIG))
    model.load_state_dict(
        {
            name: tensor.float()
            for name, tensor in safetensors.torch.load_file(TEACHER / "model.safetensors").items()
        }
    )
    return model.eval()


def draft_model(teacher: Glm4ForCausalLM) -> Glm4ForCausalLM:
    model = Glm4ForCausalLM(Glm4Config.from_dict(DRAFT_CONFIG))
    initialise(model)
    mine, theirs = model.state_dict(), teacher.state_dict()
    model.load_state_dict(
        {name: theirs[name] if theirs[name].shape == mine[name].shape else mine[name] for name in mine}
    )
    return model


def logits_of(model: Glm4ForCausalLM, rows: Tensor) -> Tensor:
    """Logits [B, S, vocab] of rows [B, S]."""
    attend = FusedAttention(model.config, rows.shape[1])
    return model.lm_head(model.model.run(model.model.embed_tokens(rows), attend))


def loss_of(model: Glm4ForCausalLM, teacher: Glm4ForCausalLM, rows: Tensor) -> Tensor:
    """Mean divergence, in nats per token of rows [B, S]."""
    with torch.no_grad():
        wanted = logits_of(teacher, rows).flatten(0, 1).float().log_softmax(-1)
    got = logits_of(model, rows).flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(got, wanted, log_target=True, reduction="batchmean")


def train(
    model: Glm4ForCausalLM, teacher: Glm4ForCausalLM, documents: list[Tensor], options: argparse.Namespace
) -> int:
    """Until ``--minutes`` are over. Returns the number of tokens."""
    optimizers = optimizers_of(model)
    source = batches(documents, random.Random(options.seed))
    start, seen, step, progress, average = time.monotonic(), 0, 0, 0.0, None
    while progress < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * options.rate * schedule(progress)
        rows = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, teacher, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        step, seen = step + 1, seen + rows.numel()
        average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
        progress = (time.monotonic() - start) / 60 / options.minutes
        if step % 50 == 0:
            print(f"step {step}  {progress:6.1%}  divergence {average:.3f}  {seen:,} tokens", flush=True)
    return seen


@torch.no_grad()
def agreement(
    model: Glm4ForCausalLM, teacher: Glm4ForCausalLM, documents: list[Tensor]
) -> tuple[float, float]:
    """On held-out text: how often both have the same highest logit, and the mean of sum(min(p, q)), which is how often
    an ideal pair of draws can be equal."""
    same, shared, count = 0, 0.0, 0
    for document in documents:
        for window in document[len(PREFIX) :].split(WINDOW - len(PREFIX)):
            row = torch.cat((torch.tensor(PREFIX), window))[None]
            p, q = logits_of(teacher, row)[0].softmax(-1), logits_of(model, row)[0].softmax(-1)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            shared += float(torch.minimum(p, q).sum())
            count += len(p)
    return same / count, shared / count


def write(model: Glm4ForCausalLM, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder, DRAFT_CONFIG)
    for name in SHARED:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(os.path.relpath(TEACHER / name, folder))


def write_card(
    folder: Path, model: Glm4ForCausalLM, seen: int, agreed: tuple[float, float], options: argparse.Namespace
) -> None:
    text = (HERE / "card_draft.md").read_text(encoding="utf-8")
    text = text.format(
        parameters=sum(p.numel() for p in model.parameters()),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        greedy=agreed[0],
        shared=agreed[1],
        seen=seen,
        minutes=options.minutes,
        threads=options.threads,
        date=date.today(),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's draft model.")
    parser.add_argument("text", type=Path, help="train.txt of demo/corpus.py; a form feed ends a document")
    parser.add_argument("--output", type=Path, default=HERE / "glm4-tiny-draft")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--rate", type=float, default=0.5, help="factor of the teacher's learning rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    chance = random.Random(options.seed)
    books = read_documents(options.text)
    conversations = [*from_books(books, 2400, chance), *small_talk(300, chance), *tool_calls(600, chance)]
    tokenizer = tokenizers.Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    documents = encode_documents(tokenizer, books)
    documents += encode_conversations(tokenizer, ChatTemplate.from_folder(TEACHER), conversations)
    teacher = teacher_model()
    model = draft_model(teacher)
    seen = train(model, teacher, documents, options)
    model.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    held_out = encode_documents(tokenizer, read_documents(HERE / "heldout.txt"))
    agreed = agreement(model.eval(), teacher, held_out)
    write(model, options.output)
    write_card(options.output, model, seen, agreed, options)
    print(
        f"same highest logit {agreed[0]:.3f}, shared probability {agreed[1]:.3f}, written to {options.output}"
    )


if __name__ == "__main__":
    main()
