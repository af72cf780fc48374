"""How well a pico speaks: held-out perplexity per corpus, beside another model's, and sample dialogues.

    python -m recipes.pico.evaluate MODEL [MODEL ...] --corpora DIR --benchmarks DIR

Perplexity is per token of the model's own tokenizer and does not compare across tokenizers; bits per byte do. Both
count every token of the held-out dialogues, each in the model's own chat format. A model trained with another split
may have seen some of them.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.pico import corpora

PROMPTS = [
    ["I want to book a table for two in San Jose tonight.", "An Italian place, please. Seven o'clock."],
    ["How do I list all files in a folder, also the hidden ones?"],
    ["Tom has 3 apples and buys 4 more. How many apples does he have?"],
    ["What is your favorite movie?", "Who is in it?"],
    ["Tell me a story about a king and his three daughters."],
    ["Can I get a large latte please?", "Yes, that is all."],
    ["Would a fish survive in the desert?"],
    ["I need a ride to the airport.", "For two people, please."],
    ["A train travels 60 miles in one hour. How far does it travel in 3 hours?"],
    ["What are the symptoms of asthma?"],
]
TEMPERATURE = 0.7
"""Of the sample dialogues: greedily, a model this small goes round in circles."""


@torch.no_grad()
def nats(model: torch.nn.Module, tokenizer, dialogues: list, limit: int = 1024) -> tuple[float, int, int]:
    """(summed nats, tokens, bytes of text) over dialogues, each cut to `limit` tokens."""
    total, tokens, size = 0.0, 0, 0
    for dialogue in dialogues:
        ids = torch.tensor([corpora.tokens_of(dialogue, tokenizer)[:limit]])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        size += len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    return total, tokens, size


def converse(model: torch.nn.Module, tokenizer, questions: list[str]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=96, do_sample=True, temperature=TEMPERATURE)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--benchmarks", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="held-out dialogues per corpus")
    options = parser.parse_args()
    forbidden = corpora.benchmark_ngrams(options.benchmarks)
    held = {
        s: corpora.split(corpora.clean(corpora.read(options.corpora, s), forbidden))[1][: options.limit]
        for s in corpora.SHARES
    }
    for folder in options.models:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
        )
        for source, dialogues in held.items():
            if dialogues:
                total, tokens, size = nats(model, tokenizer, dialogues)
                row = {"model": folder.name, "corpus": source, "dialogues": len(dialogues), "tokens": tokens}
                print(
                    json.dumps(
                        row
                        | {
                            "perplexity": round(math.exp(total / tokens), 2),
                            "bits_per_byte": round(total / math.log(2) / size, 3),
                        }
                    ),
                    flush=True,
                )
        torch.manual_seed(0)
        for questions in PROMPTS:
            print(
                "\n".join(f"{m['role']}: {m['content']}" for m in converse(model, tokenizer, questions)) + "\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
