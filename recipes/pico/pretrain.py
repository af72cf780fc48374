"""Train pico, the embedded target, from scratch on the corpora of ../shared/data/corpora.

    python -m recipes.pico.pretrain --corpora DIR --benchmarks DIR --out runs/pico-target      # on a GPU
    # on two CPU cores, in three runs:
    ACCELERATE_USE_CPU=1 OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m recipes.pico.pretrain --corpora DIR \
        --benchmarks DIR --batch-tokens 8192 --micro-rows 8 --layers 8 --tokens 6e6 --cooldown 0 --out SHALLOW
    ... --grow-from SHALLOW --layers 24 --tokens 1.25e6 --cooldown 1 --seed 1 --out DEEP
    ... --grow-from DEEP --layers 24 --tokens 6.144e6 --cooldown 0.5 --seed 2 --compile --out runs/pico-target

A deep model costs most of its CPU time in layers that have learnt little yet. So there a shallow model is trained
first, and `--grow-from` interleaves new layers whose outputs start at zero: the deep model begins as the same function
and goes on. Run again, it goes on from its last checkpoint. Muon (Jordan 2024) moves the matrices, AdamW the embedding
and the norms.
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from coral_core.kernels.precision import mixed_precision
from coral_core.processes import processes
from recipes.pico import corpora
from recipes.pico.tokenizer import VOCABULARY, train_tokenizer

HIDDEN, MLP, HEADS, KEY_VALUE_HEADS, POSITIONS = 256, 704, 4, 2, 2048
LossOf = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
EMBEDDING_RATE = 0.2  # of the matrices' rate: 0.004 at 0.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of *.jsonl.gz")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of *.jsonl whose 10-grams are kept out")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the model, its tokenizer, log and checkpoint"
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--grow-from", type=Path, help="a finished run of fewer layers")
    parser.add_argument("--tokens", type=float, default=300e6, help="training tokens in all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--batch-tokens", type=int, default=131072, help="tokens of an optimizer step, all processes together"
    )
    parser.add_argument("--micro-rows", type=int, default=64, help="rows of one forward pass and process")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="Muon's")
    parser.add_argument(
        "--cooldown", type=float, default=0.5, help="last share of the steps, in which the rate falls to 0"
    )
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler on a CPU")
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
            print(
                f"{source}: {len(dialogues) - len(kept)} of {len(dialogues)} dialogues quote a benchmark, left out",
                flush=True,
            )
        if options.grow_from:
            tokenizer = AutoTokenizer.from_pretrained(options.grow_from)
        else:
            # Each corpus weighs in the merges as it will in training, as far as it has text: 40 M characters in all.
            budget = {source: share * 4e7 for source, share in corpora.SHARES.items()}
            tokenizer = train_tokenizer(_texts(train, budget))
        tokenizer.save_pretrained(options.out)
        np.save(
            rows_path,
            corpora.pack(train, tokenizer, int(options.tokens) // options.length, options.length + 1, options.seed),
        )
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
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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


def mean_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def main() -> None:
    options = arguments()
    accelerator = Accelerator(mixed_precision=mixed_precision(processes().device))
    set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        tokenizer, rows, held = prepared(options)
    start = (
        grown(options.grow_from, options.layers, tokenizer) if options.grow_from else fresh(options.layers, tokenizer)
    )
    loss_of = compiled_loss(start) if options.compile else mean_loss
    model, *optims = accelerator.prepare(start, *optimizers(start, options.learning_rate))
    peaks = [optim.param_groups[0]["lr"] for optim in optims]
    step_rows = options.batch_tokens // options.length
    steps, step = len(rows) // step_rows, 0
    if (options.out / "checkpoint" / "step.json").exists():
        accelerator.load_state(str(options.out / "checkpoint"))
        step = json.loads((options.out / "checkpoint" / "step.json").read_text())["step"]
    while step < steps:
        since = time.perf_counter()
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * rate_at(step, steps, options.cooldown)
        batch = rows[step * step_rows : (step + 1) * step_rows]
        own = batch[accelerator.process_index :: accelerator.num_processes]
        loss = update(accelerator, model, loss_of, optims, own, options.micro_rows)
        step += 1
        line = {"step": step, "steps": steps, "loss": round(loss, 4)}
        line["tokens_per_s"] = round(options.batch_tokens / (time.perf_counter() - since))
        if step % options.checkpoint_every == 0 or step == steps:
            line["held_loss"] = round(held_loss(accelerator, model, held), 4)
            save(accelerator, model, tokenizer, options.out, step)
        if accelerator.is_main_process and (step % 10 == 0 or "held_loss" in line):
            print(json.dumps(line), flush=True)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")


def compiled_loss(model: torch.nn.Module) -> LossOf:
    """`mean_loss`, compiled. 24 layers on one core of a Xeon with AMX, bfloat16, 8 rows: 880 tokens/s eager, 1,870
    compiled; 2,030 with the eager attention, since the fused one's backward pass took a third of the time there."""
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph into DDP's buckets; gradients here are small
    if next(model.parameters()).device.type == "cpu":
        model.set_attn_implementation("eager")
    return torch.compile(mean_loss)


def update(
    accelerator: Accelerator, model: torch.nn.Module, loss_of: LossOf, optims: list, own: np.ndarray, micro_rows: int
) -> float:
    """One optimizer step on this process's rows; the mean loss over all processes."""
    starts = range(0, len(own), micro_rows)
    total = torch.zeros((), device=accelerator.device)
    for start in starts:
        with contextlib.nullcontext() if start == starts[-1] else accelerator.no_sync(model):
            ids = torch.from_numpy(own[start : start + micro_rows].astype(np.int64)).to(accelerator.device)
            loss = loss_of(model, ids) / len(starts)
            accelerator.backward(loss)
        total += loss.detach()
    mean = accelerator.reduce(total, "mean").item()
    if not np.isfinite(mean):
        raise SystemExit(f"the loss is {mean}; go on from the last checkpoint with a lower --learning-rate")
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad()
    return mean


def held_loss(accelerator: Accelerator, model: torch.nn.Module, held: np.ndarray) -> float:
    own = torch.from_numpy(held[accelerator.process_index :: accelerator.num_processes].astype(np.int64))
    own = own.to(accelerator.device)
    with torch.no_grad():
        losses = [mean_loss(model, own[i : i + 4]) for i in range(0, len(own), 4)]
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def save(accelerator: Accelerator, model: torch.nn.Module, tokenizer, out: Path, step: int) -> None:
    """A checkpoint to resume from, whole or not there at all, and the model as transformers loads it (bfloat16)."""
    fresh_state = out / "checkpoint.partial"
    accelerator.save_state(str(fresh_state))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (fresh_state / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    fresh_state.rename(out / "checkpoint")
    plain = accelerator.unwrap_model(model)
    weights = {
        name: tensor.to(torch.bfloat16) for name, tensor in plain.state_dict().items() if name != "lm_head.weight"
    }
    plain.config.dtype = torch.bfloat16
    plain.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
