"""Train the demo checkpoint: a Glm4 of 3.4 M parameters with the family's structure and tokens.

    python demo/train.py train.txt --heldout demo/heldout.txt --output demo/glm4-tiny

Four stages: tokenizer, training, evaluation, writing. ``demo/corpus.py`` says where the text comes from.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from conversations import Conversation, from_books, small_talk, tool_calls
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

from glm4_exporters.config import Glm4Config
from glm4_exporters.reference import rotary_tables, rotate
from glm4_exporters.task_models import Glm4ForCausalLM
from glm4_runtime.bundle.file_names import CHAT_TEMPLATE
from glm4_runtime.chat_template import ChatTemplate

HERE = Path(__file__).parent
DOCUMENT_END = "\n\f\n"

VOCABULARY = 2048
# The family's, in its order, at the end of the vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip


def special_ids(vocabulary: int) -> dict[str, int]:
    return {token: vocabulary - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}


ID = special_ids(VOCABULARY)
PREFIX = [ID["[gMASK]"], ID["<sop>"]]
END_IDS = [ID["<|endoftext|>"], ID["<|user|>"], ID["<|observation|>"]]
# Contractions, words with what stands before them, up to three digits, punctuation, line ends, blanks.
WORDS = r"(?i:'[stmd]|'re|'ve|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Every matrix's input width is a multiple of 256, the largest block of any quantization scheme.
CONFIG: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": END_IDS,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "model_type": "glm4",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": ID["<|endoftext|>"],
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

# Rows x length of a batch and how often it is drawn: RoPE sees all positions, most tokens stay cheap.
BATCHES = {(16, 256): 0.4, (8, 512): 0.4, (4, 1024): 0.12, (2, 2048): 0.08}
EVALUATION_WINDOW = 512


def read_documents(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split(DOCUMENT_END)


# ------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(
    texts: list[str], vocabulary: int = VOCABULARY, words: str = WORDS
) -> tokenizers.Tokenizer:
    """Byte-level BPE: any text survives the round trip, whatever it was trained on.

    Args:
        words: a regular expression of the pieces of text that no token crosses.
    """
    ids = special_ids(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B",
        special_tokens=[(token, ids[token]) for token in ("[gMASK]", "<sop>")],
    )
    if any(tokenizer.token_to_id(token) != id_ for token, id_ in ids.items()):
        raise SystemExit("the text is too short for the vocabulary: the special tokens got other ids")
    return tokenizer


def tokenizer_config(ids: dict[str, int]) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "added_tokens_decoder": {
            str(id_): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, id_ in ids.items()
        },
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left",
    }


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> list[Tensor]:
    """Each as it will be prompted: [gMASK]<sop>, the text, <|endoftext|>."""
    return [
        torch.tensor([*encoding.ids, ID["<|endoftext|>"]]) for encoding in tokenizer.encode_batch(documents)
    ]


def encode_conversations(
    tokenizer: tokenizers.Tokenizer, template: ChatTemplate, conversations: list[Conversation]
) -> list[Tensor]:
    texts = [
        template.render(messages, tools, add_generation_prompt=False) + ending
        for messages, tools, ending in conversations
    ]
    return [torch.tensor(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


# ------------------------------------------------------------------------------------- training


class FusedAttention:
    """The reference's attention by the fused kernel: causal, from an empty cache."""

    def __init__(self, config: Glm4Config, length: int) -> None:
        self.head_dim, self.scale = config.head_dim, config.scale
        self.cos, self.sin = rotary_tables(config, torch.arange(length))

    def __call__(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        cos, sin = self.cos.to(q.dtype), self.sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return self.attend(q, k, v).transpose(1, 2).flatten(-2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)


def loss_of(model: Glm4ForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross entropy of rows [B, S]'s next tokens."""
    attend = FusedAttention(model.config, rows.shape[1] - 1)
    hidden = model.model.run(model.model.embed_tokens(rows[:, :-1]), attend)
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


def initialise(model: Glm4ForCausalLM) -> None:
    """Normal with 0.02, but for embeddings and output norms: the sandwich's second norm makes every layer add
    a vector of length one whatever its weights, under which embeddings of 0.02 drown. Measured after 150
    steps: loss 4.66 instead of 5.71.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if "embed_tokens" in name else CONFIG["initializer_range"]
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif "post_self_attn" in name or "post_mlp" in name:
            torch.nn.init.constant_(parameter, 0.3)


def optimizers_of(model: Glm4ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: loss 4.49 against AdamW's 4.66 after 150 steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    tables = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.98), fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def batches(documents: list[Tensor], chance: random.Random) -> Iterator[Tensor]:
    """Rows [B, S + 1] without end, each after [gMASK]<sop>: all documents in a new order per epoch."""
    shapes, weights = list(BATCHES), list(BATCHES.values())
    while True:
        order = chance.sample(documents, len(documents))
        stream = torch.cat(order)[chance.randrange(256) :]
        position = 0
        while True:
            rows, length = chance.choices(shapes, weights)[0]
            taken = rows * (length + 1 - len(PREFIX))
            if position + taken > len(stream):
                break
            body = stream[position : position + taken].view(rows, -1)
            yield torch.cat((torch.tensor(PREFIX).expand(rows, -1), body), dim=1)
            position += taken


def schedule(progress: float) -> float:
    """The learning rate's part of its peak: up in a line over the first 4 %, then a cosine down to 2 %."""
    if progress < 0.04:
        return (progress + 0.002) / 0.042
    return 0.51 + 0.49 * math.cos(math.pi * (progress - 0.04) / 0.96)


def train(
    model: Glm4ForCausalLM, documents: list[Tensor], held_out: list[Tensor], arguments: argparse.Namespace
) -> dict[str, float]:
    """Until ``--steps`` are done or ``--minutes`` are over; the schedule follows whichever is nearer."""
    optimizers = optimizers_of(model)
    source = batches(documents, random.Random(arguments.seed))
    start, seen, step, progress, average = time.monotonic(), 0, 0, 0.0, None
    while progress < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(progress)
        rows = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

        step, seen = step + 1, seen + rows[:, 1:].numel()
        average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / arguments.steps, elapsed / arguments.minutes)
        if step % 50 == 0:
            print(
                f"step {step}  {progress:6.1%}  loss {average:.3f}  {seen / elapsed / 60:.0f} tokens/s  "
                f"{elapsed:.1f} min",
                flush=True,
            )
        if step % 250 == 0:
            torch.save(model.state_dict(), arguments.save)
            print(f"held-out perplexity {math.exp(nats(model, held_out[:1], limit=16)):.2f}", flush=True)
    return {"steps": step, "seen": seen, "minutes": elapsed}


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def nats(model: Glm4ForCausalLM, documents: list[Tensor], limit: int | None = None) -> float:
    """Mean nats per token: each document in windows of 510 tokens behind [gMASK]<sop>, which is not counted."""
    total, count = 0.0, 0
    for document in documents:
        windows = document[len(PREFIX) :].split(EVALUATION_WINDOW - len(PREFIX))
        for window in windows[:limit]:
            row = torch.cat((torch.tensor(PREFIX), window))[None]
            logits = model(row).logits[0, len(PREFIX) - 1 : -1]
            total += F.cross_entropy(logits.float(), window, reduction="sum").item()
            count += len(window)
    return total / count


def unigram_nats(documents: list[Tensor], held_out: list[Tensor]) -> float:
    """The same by the training tokens' frequencies alone."""
    counts = torch.bincount(torch.cat(documents), minlength=VOCABULARY).float() + 1
    tokens = torch.cat([document[len(PREFIX) :] for document in held_out])
    return -(counts / counts.sum()).log()[tokens].mean().item()


@torch.no_grad()
def continuation(
    model: Glm4ForCausalLM, prompt: list[int], temperature: float, seed: int = 0, limit: int = 80
) -> list[int]:
    """Greedy at temperature 0, else among the 40 likeliest; ends before an end-of-sequence token."""
    chance = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = model(torch.tensor([prompt + tokens]), logits_to_keep=1).logits[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            best = (logits / temperature).topk(40)
            token = int(best.indices[torch.multinomial(best.values.softmax(-1), 1, generator=chance)])
        if token in END_IDS:
            break
        tokens.append(token)
    return tokens


def samples(
    model: Glm4ForCausalLM, tokenizer: tokenizers.Tokenizer, template: ChatTemplate
) -> Iterator[tuple[str, str]]:
    """How, and the prompt in bold with what the model made of it."""
    for prompt in ("And it came to pass", '"My dear Watson," said Holmes,', "The sea was"):
        ids = tokenizer.encode(prompt).ids
        for how, temperature in (("greedy", 0.0), ("temperature 0.8, top-k 40", 0.8)):
            yield how, f"**{prompt}**" + tokenizer.decode(continuation(model, ids, temperature))
    tool = next(tool_calls(1, random.Random(0)))[1]
    chats = (
        ("Who are you?", None),
        ("Continue: The captain stood upon the deck and looked", None),
        ("What is the weather in Paris?", tool),
    )
    for question, tools in chats:
        prompt = template.render([{"role": "user", "content": question}], tools)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        how = "chat with a function listed, greedy" if tools else "chat, greedy"
        yield how, f"**{question}**\n\n" + tokenizer.decode(continuation(model, ids, 0.0)).strip()


# -------------------------------------------------------------------------------------- writing


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, ids: dict[str, int] = ID) -> ChatTemplate:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(ids))
    template = (HERE / "glm4-tiny" / CHAT_TEMPLATE).read_text(encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return ChatTemplate.from_folder(folder)


def write_weights(model: Glm4ForCausalLM, folder: Path, config: dict[str, Any] = CONFIG) -> None:
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", generation)


def write_card(
    model: Glm4ForCausalLM,
    tokenizer: tokenizers.Tokenizer,
    documents: list[Tensor],
    figures: dict[str, float],
    arguments: argparse.Namespace,
) -> float:
    """``README.md`` from ``card.md`` and what is measured here; returns the perplexity."""
    texts = read_documents(arguments.heldout)
    held_out = encode_documents(tokenizer, texts)
    scored = sum(len(document) - len(PREFIX) for document in held_out)
    size = sum(len(text.encode()) for text in texts)
    mean = nats(model, held_out)
    training_text = b"".join(path.read_bytes() for path in arguments.text)
    shown = (
        f"{how}:\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        for how, text in samples(model, tokenizer, ChatTemplate.from_folder(arguments.output))
    )
    options = shlex.join(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])
    card = (HERE / "card.md").read_text(encoding="utf-8")
    card = card.format(
        **figures,
        parameters=sum(p.numel() for p in model.parameters()),
        perplexity=math.exp(mean),
        bits=mean * scored / size / math.log(2),
        unigram=math.exp(unigram_nats(documents, held_out)),
        documents=len(held_out),
        window=EVALUATION_WINDOW - len(PREFIX),
        scored=scored,
        samples="\n\n".join(shown),
        command=f"python demo/train.py {options}",
        characters=len(training_text.decode()),
        sha256=hashlib.sha256(training_text).hexdigest(),
        date=date.today(),
        python=platform.python_version(),
        torch=torch.__version__,
        tokenizers=tokenizers.__version__,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    return math.exp(mean)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("text", type=Path, nargs="+", help="training text; a form feed ends a document")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt")
    parser.add_argument("--output", type=Path, default=HERE / "glm4-tiny")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to keep instead of training one")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path("glm4-tiny.pt"), help="intermediate weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)
    chance = random.Random(arguments.seed)

    books = [document for path in arguments.text for document in read_documents(path)]
    conversations = [
        *from_books(books, 2400, chance),
        *small_talk(300, chance),
        *tool_calls(600, chance),
    ]

    if arguments.tokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(arguments.tokenizer))
    else:
        tokenizer = train_tokenizer(books)
    template = write_tokenizer(tokenizer, arguments.output)
    documents = encode_documents(tokenizer, books)
    chats = encode_conversations(tokenizer, template, conversations)
    held_out = encode_documents(tokenizer, read_documents(arguments.heldout))
    print(
        f"tokens: {sum(map(len, documents)):,} of books, {sum(map(len, chats)):,} of conversations, "
        f"{sum(map(len, held_out)):,} held out",
        flush=True,
    )

    model = Glm4ForCausalLM(Glm4Config.from_dict(CONFIG))
    initialise(model)
    figures = train(model, documents + chats, held_out, arguments)

    model.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    model.eval()
    write_weights(model, arguments.output)
    perplexity = write_card(model, tokenizer, documents, figures, arguments)
    print(f"held-out perplexity {perplexity:.3f}, written to {arguments.output}")


if __name__ == "__main__":
    main()
