"""Whether an engine can serve this drafter for this target; if not, the reason in one line."""

from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, TargetError
from coral_core.export.layouts import LAYOUTS, Layout
from coral_core.export.wide import WIDE
from coral_core.lent import Lent
from coral_core.target.load import tap_layers
from coral_core.target.target import Target

OURS = "Serve it with coral, or run: coral export --to hf"
OTHERWISE = "Train one without: coral train train.preset=coral3. Or run: coral export --to hf"
"""What mends the lack of EAGLE-3.1's norms: `coral3` reads the same layers, so that the data stay."""
NARROW = (
    "It can with a drafter of EAGLE-2's shape: coral train train.preset=drawn train.shape=eagle2. "
    "Or run: coral export --to hf"
)


def refuse(layout: Layout, drafter: Drafter, target: Target) -> None:
    """Raises TargetError or ArtifactError with the first reason why the engine would not load it, or load it wrong."""
    config = target.model.config.get_text_config()
    refuse_target(layout, config.model_type, target)
    refuse_drafter(layout, drafter)
    if drafter.config.taps and layout is not WIDE["vllm"] and len(drafter.config.taps) != 3:
        raise ArtifactError(f"{layout.engine} reads three layers; this drafter {len(drafter.config.taps)}. {OURS}")
    if layout is WIDE["eagle"] and drafter.config.taps != tap_layers(config):
        raise ArtifactError(
            f"{layout.engine} reads layers {tap_layers(config)} of such a target, and this drafter "
            f"{drafter.config.taps}. {OURS}"
        )
    if misfit := drafter.config.misfit(tuple(target.lent.embed_VD.shape)):
        raise ArtifactError(f"the drafter {misfit}. Export it with its own target")


def refuse_target(layout: Layout, model_type: str, target: Target) -> None:
    """Raises TargetError when the engine cannot lend this target's embedding and head as coral does."""
    if reason := layout.why_not(model_type):
        remedy = _other_shape(layout, model_type)
        raise TargetError(f"{layout.engine} cannot draft for a target of type '{model_type}': {reason}. {remedy}")
    refuse_logits(layout.engine, target.lent, scales=layout.scales_logits)


def refuse_logits(engine: str, lent: Lent, *, scales: bool) -> None:
    """Raises TargetError for what a target does to its logits and the engine's drafter would not, a factor apart where
    it `scales` them."""
    if lent.head_bias_V is not None:
        raise TargetError(f"the target's LM head has a bias, which {engine}'s drafter leaves out. {OURS}")
    if lent.logit_scale != 1.0 and not scales:
        raise TargetError(f"the target scales its logits by {lent.logit_scale:g}; {engine} would not. {OURS}")
    if lent.logit_softcap:
        raise TargetError(f"the target caps its logits at {lent.logit_softcap:g}; {engine} would not. {OURS}")


def _other_shape(layout: Layout, model_type: str) -> str:
    """What mends it where the engine serves such a target with a drafter of EAGLE-2's shape."""
    serves = any(WIDE[name] is layout and not narrow.why_not(model_type) for name, narrow in LAYOUTS.items())
    return NARROW if serves else OURS


def refuse_drafter(layout: Layout, drafter: Drafter) -> None:
    """Raises ArtifactError when the engine would compute something else with these weights."""
    config = drafter.config
    for key in layout.unread:
        if getattr(config, key):
            raise ArtifactError(f"{layout.engine} has no {key}, which this drafter was trained with. {OTHERWISE}")
    if layout.fc_bias == "never" and config.fc_bias and drafter.fc.bias.count_nonzero():
        raise ArtifactError(f"the drafter's fc has a bias that is not zero, and {layout.engine}'s has none. {OURS}")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in layout.rope:
        raise ArtifactError(f"{layout.engine} computes RoPE of type '{kind}' otherwise than coral did. {OURS}")
    strange = sorted(set(rope) - layout.rope[kind] - {"rope_type", "type", "rope_theta"})
    if strange:
        raise ArtifactError(f"{layout.engine} does not read '{strange[0]}' of the drafter's RoPE ({kind}). {OURS}")
    if not layout.free_head_dim and config.head_dim * config.num_attention_heads != config.hidden_size:
        shape = f"{config.num_attention_heads} heads of {config.head_dim} for {config.hidden_size} hidden"
        raise ArtifactError(f"{layout.engine} needs heads of hidden / heads; the drafter has {shape}. {OURS}")
