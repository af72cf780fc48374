"""coral inside `model.generate` of transformers: a user keeps their own streamers, stopping criteria and processors.

    speculate = Speculate.from_run(model, tokenizer, Path("runs/my-model"))
    model.generate(**inputs, custom_generate=speculate, streamer=streamer, repetition_penalty=1.2, ...)

`generate` prepares everything as always and hands over its decoding loop. The drafted path is walked one token at a
time, so that processors, draws and stopping criteria are called once per token, with what they would be given and in
the order in which they would be called: the answer is that of `generate` itself, at the same torch seed.
Axes: B batch of one, T position, M tree row, V vocabulary.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Ahead, Sampler
from coral_core.decoding.step import room
from coral_core.decoding.tree import Draft, Verdict, walk
from coral_core.errors import DataError, TargetError
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run
from coral_core.target.load import wrap

NO_TEXT = ("pixel_", "image_", "video_", "audio", "input_features", "inputs_embeds")
"""How the arguments of `generate` begin by which a model is given something else than tokens."""


@dataclasses.dataclass
class Stepper:
    """One answer of `generate`, a token at a time: what its own loop does between two forward passes."""

    ids_BT: torch.Tensor
    """One row: the prompt as the user gave it, padding included, and the answer so far."""
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sampled: bool
    streamer: BaseStreamer | None
    logits: tuple[torch.Tensor, ...] | None
    """The target's own logits per token, where asked for."""
    scores: tuple[torch.Tensor, ...] | None
    """The processed ones, where asked for."""
    end: int
    """Length of `ids_BT` at which the answer ends at the latest: a draft may reach beyond the target's context."""
    done: bool = False

    looks_back = False
    temperature = 0.0

    def pick(self, logits_1V: torch.Tensor, position: int, past_1T: torch.Tensor | None = None) -> Any:
        """The next token [1]: processed, drawn, judged by the stopping criteria, and streamed."""
        device = logits_1V.device
        logits_1V = logits_1V.to(device=self.ids_BT.device, dtype=torch.float32, copy=True)
        scores_1V = self.processors(self.ids_BT, logits_1V)
        if self.logits is not None:
            self.logits += (logits_1V,)
        if self.scores is not None:
            self.scores += (scores_1V,)
        if self.sampled:
            picked_1 = torch.multinomial(scores_1V.softmax(-1), num_samples=1).squeeze(1)
        else:
            picked_1 = scores_1V.argmax(-1)
        self.ids_BT = torch.cat((self.ids_BT, picked_1[:, None]), dim=1)
        self.done = bool(self.criteria(self.ids_BT, self.scores).all()) or self.ids_BT.shape[1] >= self.end
        if self.streamer is not None:
            self.streamer.put(picked_1.cpu())
        return picked_1.to(device)

    def judge(
        self, draft: Draft, logits_MV: torch.Tensor, position: int, past_MT: torch.Tensor | None = None
    ) -> Verdict:
        """The accepted path; it ends where a stopping criterion says so."""

        def step(row: int) -> tuple[int, bool]:
            return int(self.pick(logits_MV[row : row + 1], position)), not self.done

        return walk(draft, step)

    def ahead(self, position: int, count: int, vocab: int, device: torch.device) -> Ahead:
        """As of a greedy sampler; torch's own draws cannot be known beforehand."""
        return Ahead(None if self.sampled else Sampler(), None)


@dataclasses.dataclass(frozen=True)
class Speculate:
    """What `custom_generate` takes: the engine, as the decoding loop of its own target's `generate`."""

    engine: Engine

    @classmethod
    def from_run(cls, model: Any, tokenizer: Any, run: Path | None = None) -> "Speculate":
        """With the drafter and head of a run's folder, for a model that is already loaded; frozen from now on.

        With no run, what coral ships for pico. Raises RecipeError, ArtifactError or TargetError when the run is not
        there, or was made for another model.
        """
        recipe = load_recipe(run / "recipe.yaml" if run else None, [])
        found = Run(recipe, run or Path("runs") / recipe.name)
        return cls(found.engine(found.as_decoded(wrap(model, tokenizer))))

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Decode as `GenerationMixin._sample` does, to the same result.

        `streamer` comes from the caller's frame where transformers does not pass it. An answer ends, besides where
        `generate` would end it, at the end of the target's context. Raises DataError for what coral does not do:
        several rows, beams, images, embeddings, a cache of the user's own, attentions and hidden states; TargetError
        for another model.
        """
        streamer = streamer or _dropped_streamer()
        self._refuse(model, input_ids, generation_config, model_kwargs)
        wants = generation_config.return_dict_in_generate
        mask_BT = model_kwargs.get("attention_mask")
        prompt = (input_ids if mask_BT is None else input_ids[mask_BT.bool()]).flatten().tolist()
        most = room(self.engine.target, prompt, generation_config.max_length - input_ids.shape[1])
        stepper = Stepper(
            ids_BT=input_ids,
            processors=logits_processor,
            criteria=stopping_criteria,
            sampled=generation_config.do_sample,
            streamer=streamer,
            logits=() if wants and generation_config.output_logits else None,
            scores=() if wants and generation_config.output_scores else None,
            end=input_ids.shape[1] + most,
        )
        # The criteria decide where the answer ends, the model's stop tokens among them.
        engine = dataclasses.replace(self.engine, target=dataclasses.replace(self.engine.target, stop_ids=frozenset()))
        for _ in engine.decode(prompt, stepper, most):
            if stepper.done:
                break
        if streamer is not None:
            streamer.end()
        if not wants:
            return stepper.ids_BT
        return GenerateDecoderOnlyOutput(sequences=stepper.ids_BT, scores=stepper.scores, logits=stepper.logits)

    def _refuse(self, model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
        if model is not self.engine.target.model:
            raise TargetError(
                "this engine was made for another model object; make it with Speculate.from_run(model, …)"
            )
        if input_ids.shape[0] != 1 or (config.num_beams or 1) > 1:
            rows = input_ids.shape[0]
            raise DataError(f"generate was asked for {rows} rows or beams at once; speculate on one prompt per call")
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))  # transformers 5.24 renamed it
        if getattr(cache, "_is_user_defined", False) or (cache is not None and cache.get_seq_length() > 0):
            raise DataError("past_key_values: coral keeps a cache of its own; leave it out and give the whole prompt")
        if given := [name for name, value in model_kwargs.items() if value is not None and name.startswith(NO_TEXT)]:
            raise DataError(f"{given[0]}: coral decodes text alone; leave it out, or generate without custom_generate")
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise DataError("output_attentions and output_hidden_states: coral returns neither; leave them out")


def _dropped_streamer() -> BaseStreamer | None:
    """The `streamer` of the `generate` call under way.

    transformers 5.23 feeds the prompt to the streamer and then drops it when `custom_generate` is a function
    (`_extract_generation_mode_kwargs`): a thread that reads a TextIteratorStreamer would wait for ever. The frame that
    called us is the only place that still holds it.
    """
    caller = sys._getframe(2)
    if caller.f_globals.get("__name__") != "transformers.generation.utils":
        return None
    return caller.f_locals.get("streamer")
