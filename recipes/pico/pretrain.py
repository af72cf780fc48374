"""Train pico, the embedded target, from scratch on the corpora of ../shared/data/corpora.

    python recipes/pico/pretrain.py --corpora DIR --benchmarks DIR --out runs/pico-target          # one GPU: minutes
    accelerate launch --cpu --num_processes 2 recipes/pico/pretrain.py ... --layers 8 --tokens 5e6 --cooldown 0   # CPU: hours
    accelerate launch --cpu --num_processes 2 recipes/pico/pretrain.py ... --grow-from FIRST --tokens 2e6 --cooldown 1

A deep model costs most of its CPU time in layers that have learnt little yet. So there a shallow model is trained first, and
`--grow-from` interleaves new layers whose outputs start at zero: the deep model begins as the same function and goes on.
Run again, it goes on from its last checkpoint. Muon (Jordan 2024) moves the matrices, AdamW the embedding and the norms.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import corpora
from tokenizer import VOCABULARY, train_tokenizer

HIDDEN, MLP, HEADS, KEY_VALUE_HEADS, POSITIONS = 256, 704, 4, 2, 2048
EMBEDDING_RATE = 0.2  # of the matrices' rate: 0.004 at 0.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of *.jsonl.gz")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of *.jsonl whose 10-grams are kept out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, its tokenizer, log and checkpoint")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--grow-from", type=Path, help="a finished run of fewer layers")
    parser.add_argument("--tokens", type=float, default=300e6, help="training tokens in all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-tokens", type=int, default=131072, help="tokens of an optimizer step, all processes together")
    parser.add_argument("--micro-rows", type=int, default=64, help="rows of one forward pass and process")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="Muon's")
    parser.add_argument("--cooldown", type=float, default=0.5, help="last share of the steps, in which the rate falls to 0")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepared(options: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, np.ndarray, np.ndarray]:
    """The tokenizer, the training rows and the held-out rows [rows, length + 1]: made once, kept in `out`."""
    rows_path, held_path = options.out / "rows.npy", options.out / "held.npy"
    if not held_path.exists():
        forbidden = corpora.benchmark_ngrams(options.benchmarks)
        train, held = {}, {}
        for source in corpora.SHARES:
            dialogues = corpora.read(options.corpora, source)
            kept = corpora.clean(dialogues, forbidden)
            train[source], held[source] = corpora.split(kept)
            print(f"{source}: {len(dialogues) - len(kept)} of {len(dialogues)} dialogues share ten words with a benchmark", flush=True)
        if options.grow_from:
            tokenizer = AutoTokenizer.from_pretrained(options.grow_from)
        else:
            # Each corpus weighs in the merges as it will in training, as far as it has text: 40 M characters in all.
            budget = {source: share * 4e7 for source, share in corpora.SHARES.items()}
            tokenizer = train_tokenizer(_texts(train, budget))
        tokenizer.save_pretrained(options.out)
        np.save(rows_path, corpora.pack(train, tokenizer, int(options.tokens) // options.length, options.length + 1, options.seed))
        held = {source: dialogues for source, dialogues in held.items() if dialogues}
        np.save(held_path, corpora.pack(held, tokenizer, 64, options.length + 1, 0))
    return AutoTokenizer.from_pretrained(options.out), np.load(rows_path, mmap_mode="r"), np.load(held_path)


def _texts(train: dict[str, list], budget: dict[str, float]):
    for source, dialogues in train.items():
        for message in (message for dialogue in dialogues for message in dialogue):
            budget[source] -= len(message["content"])
            if budget[source] < 0:
                break
            yield message["content"]


def fresh(layers: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Outputs of every block start at zero, so that depth costs nothing in the first steps."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, max_position_embeddings=POSITIONS,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        _silence(layer)
    return model


def _silence(layer: torch.nn.Module) -> None:
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def grown(folder: Path, layers: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The model of `folder` with copies of each layer, silent at first, after it."""
    old = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    times, rest = divmod(layers, old.config.num_hidden_layers)
    if rest:
        raise SystemExit(f"--layers {layers} is no multiple of the {old.config.num_hidden_layers} layers in {folder}")
    model = fresh(layers, tokenizer)
    model.model.embed_tokens.load_state_dict(old.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(old.model.norm.state_dict())
    for i, layer in enumerate(model.model.layers):
        layer.load_state_dict(old.model.layers[i // times].state_dict())
        if i % times:
            _silence(layer)
    return model


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate * EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int, cooldown: float, warmup: int = 20) -> float:
    """Linear warm-up, constant, then linear to zero over the last `cooldown` share of the steps."""
    fall = 1.0 if cooldown == 0 else (steps - step) / (cooldown * steps)
    return min(1.0, (step + 1) / warmup, fall)


def mean_loss(model: torch.nn.Module, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    ids = torch.from_numpy(rows.astype(np.int64)).to(device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def main() -> None:
    options = arguments()
    accelerator = Accelerator(mixed_precision="bf16")
    set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        tokenizer, rows, held = prepared(options)
    model = grown(options.grow_from, options.layers, tokenizer) if options.grow_from else fresh(options.layers, tokenizer)
    model, *optims = accelerator.prepare(model, *optimizers(model, options.learning_rate))
    peaks = [optim.param_groups[0]["lr"] for optim in optims]

    processes, rank = accelerator.num_processes, accelerator.process_index
    step_rows = options.batch_tokens // options.length
    own_rows = step_rows // processes
    micro = min(options.micro_rows, own_rows)
    steps = len(rows) // step_rows
    state, step = options.out / "checkpoint", 0
    if (state / "step.json").exists():
        accelerator.load_state(str(state))
        step = json.loads((state / "step.json").read_text())["step"]

    since, seen = time.perf_counter(), 0
    while step < steps:
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * rate_at(step, steps, options.cooldown)
        first = step * step_rows + rank * own_rows
        chunks = range(first, first + own_rows, micro)
        total = torch.zeros((), device=accelerator.device)
        for i, start in enumerate(chunks):
            last = i == len(chunks) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = mean_loss(model, rows[start : min(start + micro, first + own_rows)], accelerator.device) / len(chunks)
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step, seen = step + 1, seen + options.batch_tokens
        mean = accelerator.reduce(total, "mean").item()
        if not np.isfinite(mean):
            raise SystemExit(f"loss is {mean} at step {step}; start again from the last checkpoint with a lower --learning-rate")
        if step % 10 == 0 or step == steps:
            tokens_per_s, since, seen = seen / (time.perf_counter() - since), time.perf_counter(), 0
            line = {"step": step, "steps": steps, "loss": round(mean, 4), "tokens_per_s": round(tokens_per_s)}
            if step % options.checkpoint_every == 0 or step == steps:
                line["held_loss"] = round(held_loss(accelerator, model, held), 4)
                save(accelerator, model, tokenizer, options.out, step)
                since = time.perf_counter()
            accelerator.print(json.dumps(line), flush=True)
            if accelerator.is_main_process:
                with (options.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")


def held_loss(accelerator: Accelerator, model: torch.nn.Module, held: np.ndarray) -> float:
    own = held[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        losses = [mean_loss(model, own[i : i + 4], accelerator.device) for i in range(0, len(own), 4)]
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def save(accelerator: Accelerator, model: torch.nn.Module, tokenizer, out: Path, step: int) -> None:
    """Checkpoint to resume from, and the model as transformers loads it, in bfloat16. Each appears whole or not at all."""
    fresh_state = out / "checkpoint.partial"
    accelerator.save_state(str(fresh_state))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (fresh_state / "step.json").write_text(json.dumps({"step": step}))
    old = out / "checkpoint.old"
    if (out / "checkpoint").exists():
        os.rename(out / "checkpoint", old)
    os.rename(fresh_state, out / "checkpoint")
    if old.exists():
        for path in sorted(old.rglob("*"), reverse=True):
            path.unlink()
        old.rmdir()
    plain = accelerator.unwrap_model(model)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in plain.state_dict().items() if name != "lm_head.weight"}
    plain.config.dtype = torch.bfloat16
    plain.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
