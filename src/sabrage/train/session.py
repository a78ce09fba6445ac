"""What a run has learned so far: weights, optimizer state, random state and the place in plan and data.

Goes to a checkpoint's tensors and plain values and back, bit for bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sabrage.optim.groups import Optimizers
from sabrage.train.step import Learner


@dataclass
class Session:
    """The state of a run after `step` updates and `block` blocks of the training stream."""

    learner: Learner
    optimizers: Optimizers
    step: int = 0
    block: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on, by a name that starts with its kind."""
        found = {f"learner/{name}": tensor for name, tensor in self.weights().items()}
        found |= {f"optimizer/{name}": tensor for name, tensor in self.optimizers.state_tensors().items()}
        return found | {f"random/{name}": state for name, state in random_states().items()}

    def weights(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, tied ones once."""
        saved = self.learner.state_dict(keep_vars=True)
        distinct = {id(tensor): name for name, tensor in reversed(saved.items())}
        return {name: saved[name].detach() for name in saved if distinct[id(saved[name])] == name}

    def values(self) -> dict[str, Any]:
        """The plain values that go with the tensors."""
        return {"step": self.step, "block": self.block}

    def is_finite(self) -> bool:
        """Whether every number that a checkpoint would hold is finite; waits for the device."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Puts back what `tensors` and `values` gave. Raises ValueError when they are of another model."""
        kinds: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = tensor
        load_in_place(self.weights(), kinds["learner"])
        self.optimizers.load_state_tensors(kinds["optimizer"])
        set_random_states(kinds["random"])
        self.step, self.block = values["step"], values["block"]


def load_in_place(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copies `values` into `targets`. Raises ValueError where names or shapes are those of another model."""
    strange = set(targets).symmetric_difference(values)
    strange |= {name for name in set(targets) & set(values) if targets[name].shape != values[name].shape}
    if strange:
        names = ", ".join(sorted(strange)[:5])
        raise ValueError(
            f"the checkpoint is of another model: {len(strange)} tensors differ in name or shape ({names}); "
            "load it with the recipe that it was saved with"
        )
    for name, target in targets.items():
        target.copy_(values[name])


def random_states() -> dict[str, Tensor]:
    """torch's random state on the CPU and, once CUDA is in use, on the current device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Puts back what `random_states` gave; a CUDA state is left out where there is no CUDA."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
