"""Run by an interpreter that has a vLLM with kernels for a CPU: decodes with an exported drafter, greedily.

Prints one JSON line: the version, the answers' ids, and vLLM's own count of drafts and of accepted tokens by depth.
"""

import json
import sys


def main(target: str, folder: str, depth: str, prompts: str) -> None:
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        sys.exit(f"{vllm.__version__} has no kernels for a CPU")
    speculative = {"method": "eagle", "model": folder, "draft_tensor_parallel_size": 1}
    engine = vllm.LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        disable_log_stats=False,
        speculative_config=speculative | {"num_speculative_tokens": int(depth)},
    )
    asked = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    answers = engine.generate(asked, vllm.SamplingParams(temperature=0, max_tokens=48))
    counts = {metric.name: metric for metric in engine.get_metrics()}
    found = {
        "version": vllm.__version__,
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "drafts": counts["vllm:spec_decode_num_drafts"].value,
        "accepted": list(counts["vllm:spec_decode_num_accepted_tokens_per_pos"].values),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
