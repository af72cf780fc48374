"""The target that a run's data were made with: to measure by decoding, and for features that are not on disk.

Axes: B batch, T position.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from coral_core.run import Run
    from coral_core.store.store import Store, Tap
    from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True)
class Tapped:
    """Loads the target when it is first wanted."""

    run: Run
    otherwise: str
    """What a user can do without it, as the end of a message."""

    @functools.cached_property
    def store(self) -> Store:
        """The run's data."""
        from coral_core.training.stage import open_data

        return open_data(self.run.recipe, self.run.folder)

    @functools.cached_property
    def target(self) -> Target:
        """The target. Raises ArtifactError when it is another than the data's."""
        from coral_core.processes import processes
        from coral_core.target.compatibility import refuse_other_target

        processes()  # under several processes, `cuda` is then each one's own GPU
        target = self.run.target()
        remedy = f"Run: coral prepare-data{self.otherwise}"
        refuse_other_target(self.store.manifest, self.store.folder, remedy, target)
        return target

    def check(self) -> None:
        """Raises ArtifactError when the recipe names another target than the data's, and that one is no sibling."""
        made_with, named = self.store.manifest.recipe.get("target"), self.run.recipe.target
        if made_with and (made_with["model"], made_with["revision"]) != (named.model, named.revision):
            _ = self.target

    @property
    def prompts(self) -> list[list[int]]:
        """The held-out prompts. Raises ArtifactError when there is none."""
        from coral_core.errors import ArtifactError

        if not self.store.holdout_prompts:
            raise ArtifactError(
                f"{self.store.folder} holds no held-out prompt. Set data.holdout and run: coral prepare-data"
                f"{self.otherwise}"
            )
        return self.store.holdout_prompts

    @property
    def tap(self) -> Tap | None:
        """Features of a batch of tokens, where the store holds none."""
        if self.run.recipe.data.features == "stored":
            return None

        def tap(ids_BT: torch.Tensor, valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            from coral_core.target import capture

            found = capture.tap(self.target.tapping(self.store.taps), ids_BT, valid_BT)
            return found.feature_BTD, found.tap_BTI

        return tap
