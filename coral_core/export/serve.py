"""The commands by which an exported folder is served."""

from coral_core.export.layouts import LAYOUTS
from coral_core.export.run import TOKEN_MAP
from coral_core.recipe.schema import Recipe


def serve_command(to: str, recipe: Recipe, target: str, folder: str, *, with_map: bool = False) -> str:
    """The engine's own command, with the recipe's tree in its words; `target` and `folder` as the engine finds them.

    SGLang and EAGLE count the root among the nodes, EAGLE counts levels from 0, and vLLM drafts a chain.
    """
    decode = recipe.decode
    text = LAYOUTS[to].serve.format(
        target=target,
        folder=folder,
        depth=decode.draft_depth - (to == "eagle"),
        topk=decode.draft_topk,
        nodes=decode.draft_nodes + 1,
    )
    return f"{text} --speculative-token-map {folder}/{TOKEN_MAP}" if with_map else text
