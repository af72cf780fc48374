"""The commands by which an exported folder is served."""

from coral_core.drafter.config import DrafterConfig
from coral_core.export.run import DRAFTER_FILE, GGUF, TOKEN_MAP
from coral_core.export.wide import layout_of
from coral_core.recipe.schema import Recipe

LLAMA = (
    "llama-server -m {target} --model-draft {folder}/{file} --spec-type draft-eagle3 --spec-draft-n-max {depth} "
    "--spec-draft-p-min 0"
)


def serve_command(to: str, recipe: Recipe, config: DrafterConfig, places: tuple[str, str], *, with_map: bool) -> str:
    """The engine's own command, with the recipe's tree in its words; `places` are target and folder as it finds them.

    SGLang and EAGLE count the root among the nodes, EAGLE counts levels from 0, vLLM and llama.cpp draft a chain.
    """
    decode, (target, folder) = recipe.decode, places
    if to == GGUF:
        return LLAMA.format(
            target=target if target.endswith(".gguf") else "TARGET.gguf",
            folder=folder,
            file=DRAFTER_FILE,
            depth=decode.draft_depth,
        )
    text = layout_of(to, config).serve.format(
        target=target,
        folder=folder,
        depth=decode.draft_depth - (to == "eagle"),
        topk=decode.draft_topk,
        nodes=decode.draft_nodes + 1,
    )
    return f"{text} --speculative-token-map {folder}/{TOKEN_MAP}" if with_map else text
