"""A target of 32,768 tokens, grown out of pico in a few minutes: a new tokenizer, and pico's weights fitted to it.

The tokenizer is trained on the corpora with pico's own pre-tokenizer and template. A new token's embedding starts as
the mean of the old pieces it is made of, its head row as that of the first; then everything is trained on the corpora's
dialogues for a given time. The softmax of a step runs over the batch's own tokens and a random sample of the others,
weighted so that the sample stands for all of them: a full one would take most of the time.
It is no good model; it is a target whose vocabulary is large beside it.
Axes: B batch, T position, D hidden, V vocabulary, C candidate token of a step.
"""

import gzip
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coral_core.target.target import Target

VOCABULARY = 32768
SEEN = ("sgd", "self_dialogue", "taskmaster4", "fairytaleqa")
"""Corpora whose prompts the drafter, the groups, the router and the frequency count learn from."""
UNSEEN = ("gsm8k_train", "flan_cot_ecqa", "medquad", "tldr", "gpteacher_codegen")
"""Corpora that the target knows, and those four do not."""
CONTEXT = 256
BATCH = 8
SAMPLE = 2048
"""Tokens of a step's softmax besides its own."""
TOKENIZER_DIALOGUES = 3000
"""Dialogues of each corpus that the tokenizer is trained on."""


def dialogues(corpora: Path, name: str, limit: int) -> list[list[dict[str, str]]]:
    """The first `limit` dialogues of a corpus."""
    with gzip.open(corpora / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in itertools.islice(lines, limit)]


def prompts(corpora: Path, names: tuple[str, ...], first: int, count: int) -> list[list[dict[str, str]]]:
    """First questions of dialogues from `first` on, the corpora in turn."""
    each = [dialogues(corpora, name, first + count)[first:] for name in names]
    mixed = [dialogue[:1] for row in zip(*each, strict=False) for dialogue in row]
    return mixed[:count]


def build(pico: Target, corpora: Path, folder: Path, minutes: float) -> dict[str, Any]:
    """Make the target and save it as a Hugging Face folder; what was done."""
    torch.manual_seed(0)
    everything = [dialogue for name in SEEN + UNSEEN for dialogue in dialogues(corpora, name, TOKENIZER_DIALOGUES)]
    random.Random(0).shuffle(everything)
    texts = (message["content"] for dialogue in everything for message in dialogue)
    tokenizer = pico.tokenizer.train_new_from_iterator(texts, VOCABULARY)
    model = widen(pico, tokenizer)
    facts = train(model, tokenizer, everything, minutes)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"vocabulary": VOCABULARY, "tokens_known": len(tokenizer), **facts}


@torch.no_grad()
def widen(pico: Target, tokenizer: Any) -> Any:
    """Pico's model with the new tokenizer's vocabulary, and a head of its own."""
    import transformers

    config = transformers.AutoConfig.for_model(**pico.model.config.to_dict())
    config.vocab_size, config.tie_word_embeddings = VOCABULARY, False
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    old = {name: weight.float() for name, weight in pico.model.state_dict().items()}
    keep = {name: weight for name, weight in old.items() if "embed_tokens" not in name and "lm_head" not in name}
    model.load_state_dict(keep, strict=False)
    embed_VD, head_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for token, index in tokenizer.get_vocab().items():
        pieces = _pieces(pico.tokenizer, token)
        if pieces:
            embed_VD[index] = pico.lent.embed_VD[pieces].float().mean(0)
            head_VD[index] = pico.lent.head_VD[pieces[0]].float()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _pieces(tokenizer: Any, token: str) -> list[int]:
    """A token in the old tokenizer's tokens."""
    whole = tokenizer.get_vocab().get(token)
    if whole is not None:
        return [whole]
    return [piece.id for piece in tokenizer.backend_tokenizer.model.tokenize(token)]


def train(model: Any, tokenizer: Any, everything: list[list[dict[str, str]]], minutes: float) -> dict[str, Any]:
    """Next-token training on whole dialogues, side by side in rows of CONTEXT tokens, until the time is over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    begun, steps, losses = time.monotonic(), 0, []
    model.train()
    for ids_BT in _batches(tokenizer, everything):
        past = (time.monotonic() - begun) / (60 * minutes)
        if past >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps + 1) / 20) * (1 - past)
        loss = _loss(model, ids_BT, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        losses.append(loss.item())
        if steps % 20 == 0:
            print(f"target: step {steps}, {past:.0%} of the time, loss {sum(losses[-20:]) / 20:.3f}", flush=True)
    last = losses[-50:]
    return {"steps": steps, "train_tokens": steps * BATCH * CONTEXT, "loss": sum(last) / max(1, len(last))}


def _loss(model: Any, ids_BT: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    hidden_BTD = model.base_model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    own_C, label_BT = ids_BT[:, 1:].unique(return_inverse=True)
    other_C = torch.randint(VOCABULARY, (SAMPLE,), generator=generator)
    other_C = other_C[~torch.isin(other_C, own_C)]
    head_CD = model.get_output_embeddings().weight[torch.cat((own_C, other_C))]
    logits_BTC = hidden_BTD @ head_CD.T
    stands_for = (VOCABULARY - len(own_C)) / max(1, len(other_C))
    weight_C = torch.cat((torch.ones(len(own_C)), torch.full((len(other_C),), stands_for))).log()
    return torch.nn.functional.cross_entropy((logits_BTC + weight_C).flatten(0, 1), label_BT.flatten())


def _batches(tokenizer: Any, everything: list[list[dict[str, str]]]) -> Iterator[torch.Tensor]:
    buffer: list[int] = []
    size = BATCH * (CONTEXT + 1)
    for dialogue in itertools.cycle(everything):
        buffer += tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
        while len(buffer) >= size:
            yield torch.tensor(buffer[:size]).view(BATCH, CONTEXT + 1)
            buffer = buffer[size:]
