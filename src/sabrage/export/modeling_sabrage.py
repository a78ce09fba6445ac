"""A model trained with Sabrage, for `transformers`: this file lies beside its weights and its config.json.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The model is built from the recipe that config.json holds, by the parts of the installed package `sabrage`, so
that every recipe can be loaded. Generation reads the whole text again for every token: there is no cache.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

# Its import makes the parts that recipes name known.
import sabrage.recipes  # noqa: F401
from sabrage.config import from_json, resolve
from sabrage.model.lm import LM, ModelSpec
from sabrage.run.device import probe


class SabrageConfig(PretrainedConfig):
    """`recipe` is the recipe's JSON; what the library itself asks for is beside it."""

    model_type = "sabrage"

    def __init__(self, recipe: dict[str, Any] | None = None, **rest: Any) -> None:
        self.recipe = recipe
        super().__init__(**rest)

    def model_spec(self) -> ModelSpec:
        """What the model is made of, by paths that run on any device."""
        if self.recipe is None:
            raise ValueError("config.json holds no recipe; export the run again with `sabrage export`")
        spec = from_json(self.recipe["model"], ModelSpec, path="recipe.model")
        return resolve(spec, probe("cpu"))


class SabrageForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. `labels` are the input's own tokens, shifted here; -100 is left out of the loss."""

    config_class = SabrageConfig
    base_model_prefix = "model"

    def __init__(self, config: SabrageConfig) -> None:
        super().__init__(config)
        self.model = LM(config.model_spec())
        table = self.model.embedding.weight
        name = next(name for name, weight in self.model.named_parameters() if weight is table)
        self._tied_weights_keys = {"model.head.weight": f"model.{name}"}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """The library's own, and then the tables that are not saved, which it leaves without values."""
        made = super().from_pretrained(*arguments, **options)
        model = (made[0] if isinstance(made, tuple) else made).model
        saved, fresh = model.state_dict().keys(), LM(model.spec)
        for name, buffer in model.named_buffers():
            if name not in saved:
                buffer.copy_(fresh.get_buffer(name))
        return made

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: parts draw their own weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The library looks for the name kwargs before it lets an attention mask through.
        known = ("attention_mask", "logits_to_keep")
        return {"input_ids": input_ids, **{name: kwargs[name] for name in known if name in kwargs}}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **given: Any,
    ) -> Any:
        """Logits, (B, T, V), of the last `logits_to_keep` positions (0: of all) and the mean loss in nats.

        Raises ValueError for text after padding, which would stand at the wrong positions.
        """
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise ValueError(
                "got text after padding; pad on the right to score texts, and to generate give texts of one "
                "length"
            )
        logits_BTV = self.model.head(self.model(input_ids)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            ahead_NV = logits_BTV[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(ahead_NV, labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutput(loss=loss, logits=logits_BTV)
        return output.to_tuple() if return_dict is False else output
