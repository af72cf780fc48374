"""llama.cpp with a drafter and without: TARGET.gguf DRAFTER.gguf DEPTH NEW PROMPTS, as JSON; its answers as JSON.

Of each prompt the text that it says, alone and with the drafter, and how many drafts each round accepted; the last
round is left out, since llama.cpp drafts no further than the answer may go.
"""

import importlib.metadata
import itertools
import json
import sys
from typing import Any

import xllamacpp


def server(target: str, drafter: str | None, depth: int) -> Any:
    """One thread, greedy; the drafter proposes `depth` tokens, however unlikely."""
    params = xllamacpp.CommonParams()
    params.model.path = target
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if drafter is not None:
        draft = params.speculative.draft
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = drafter, depth, 0, 0.0
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def answer(server: Any, prompt: list[int], new: int) -> dict[str, Any]:
    """{"text", "accepted" per round but the last, "tokens_per_s"}."""
    request = {
        "prompt": prompt,
        "n_predict": new,
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "ignore_eos": True,
        "stream": True,
        "timings_per_token": True,
    }
    pieces: list[dict[str, Any]] = []

    def take(piece: Any) -> bool:
        found = json.loads(piece) if isinstance(piece, str | bytes) else piece
        pieces.extend(found if isinstance(found, list) else [found])
        return False

    server.handle_completions(request, take)
    text = ""
    accepted = {0: 0}  # total drafted so far -> total accepted so far: one entry per round
    for piece in pieces:
        text += piece["choices"][0]["text"]
        timings = piece.get("timings") or {}
        if "draft_n" in timings:
            accepted[timings["draft_n"]] = timings["draft_n_accepted"]
    per_round = [later - earlier for earlier, later in itertools.pairwise(accepted.values())]
    return {"text": text, "accepted": per_round[:-1], "tokens_per_s": pieces[-1]["timings"]["predicted_per_second"]}


def main() -> None:
    target, drafter, depth, new, prompts = sys.argv[1:]
    found: dict[str, Any] = {"version": importlib.metadata.version("xllamacpp")}
    for name, draft in (("alone", None), ("drafted", drafter)):
        engine = server(target, draft, int(depth))
        found[name] = [answer(engine, prompt, int(new)) for prompt in json.loads(prompts)]
        del engine
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
