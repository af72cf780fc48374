"""coral: lossless speculative decoding with drafters trained the CORAL way.

    from coral_core import Drafter, Generator, Target

The three are imported when they are first asked for: `import coral_core` alone stays quick and needs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coral_core.api.generator import Generator as Generator
    from coral_core.drafter.model import Drafter as Drafter
    from coral_core.target.target import Target as Target

__version__ = "0.1.0"
__all__ = ["Drafter", "Generator", "Target", "__version__"]

_HOMES = {"Drafter": "drafter.model", "Generator": "api.generator", "Target": "target.target"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'coral_core' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"coral_core.{_HOMES[name]}"), name)
