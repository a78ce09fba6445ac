"""Which parameter goes to which optimizer, and all optimizers of a run as one thing.

Groups are tried in order and the first match wins; nothing is left over and no pattern is idle. Groups with
equal parts share one optimizer, so that a kernel launch serves as many parameters as it can. State is saved
by parameter name, and loading it goes on bit for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sabrage.config import ConfigError, nearest
from sabrage.parts import Knobs, Optimizer, OptimizerGroup
from sabrage.schedule import Schedule

NamedParameters = list[tuple[str, nn.Parameter]]

# The key under which a gradient that waits for its optimizer's next due step is saved.
GRADIENT = "gradient"
# The key of the fp32 copy that an optimizer moves in place of a narrower parameter.
MASTER = "master"


def assign(
    groups: Sequence[OptimizerGroup], named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[tuple[OptimizerGroup, NamedParameters]]:
    """Each group with its parameters, in the order of `groups`.

    A tied parameter goes by its first name; frozen ones (`requires_grad` False) are left out. Raises
    ConfigError naming every parameter that no pattern matches and every pattern that gets none.
    """
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            first_names.setdefault(parameter, name)
    taken: list[NamedParameters] = [[] for _ in groups]
    problems = []
    for parameter, name in first_names.items():
        first = next((index for index, group in enumerate(groups) if matches(group.pattern, name)), None)
        if first is not None:
            taken[first].append((name, parameter))
        else:
            near = nearest(name, (group.pattern for group in groups))
            problems.append(
                f"no optimizer group matches parameter {name!r} {tuple(parameter.shape)}{near}; add a group "
                "for it, or end the groups with the pattern '.*'"
            )
    for group, parameters in zip(groups, taken, strict=True):
        if not parameters:
            problems.append(_idle(group.pattern, list(first_names.values())))
    if problems:
        raise ConfigError("\n".join(problems))
    return list(zip(groups, taken, strict=True))


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression is found in the name. Raises ConfigError when it is not one."""
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def _idle(pattern: str, names: list[str]) -> str:
    if any(matches(pattern, name) for name in names):
        return f"optimizer pattern {pattern!r} is idle: earlier groups take all it matches; move or drop it"
    return f"optimizer pattern {pattern!r} matches no parameter{nearest(pattern, names)}; mend or drop it"


def master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself where it is fp32, else an fp32 copy."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


@dataclass
class Member:
    """One optimizer of the run: its part, what the part built, and its parameters.

    `moved` are what the optimizer moves: the parameters themselves, or fp32 masters of narrower ones. `lr` is
    a schedule of their own.
    """

    part: Optimizer
    lr: Schedule | None
    optimizer: torch.optim.Optimizer
    parameters: NamedParameters
    moved: list[nn.Parameter]
    # True between a step that was not due and the next that is: the gradients must stay.
    waiting: bool = False

    def own(self, knobs: Knobs) -> Knobs:
        """The knobs with the learning rate of this member's own schedule, if it has one."""
        return knobs if self.lr is None else replace(knobs, lr=self.lr.at(knobs.step, knobs.steps))

    def masters(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, parameter, fp32 master) of every parameter that has one."""
        pairs = zip(self.parameters, self.moved, strict=True)
        return [(name, parameter, moved) for (name, parameter), moved in pairs if moved is not parameter]

    @torch.no_grad()
    def step(self, found_inf: Tensor | None) -> None:
        """One step of the optimizer; masters take the gradients before and give the weights after it."""
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        masters = self.masters()
        for _, parameter, master in masters:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        for _, parameter, master in masters:
            parameter.copy_(master)
            master.grad = None


class Optimizers:
    """All optimizers of a run.

    Built once the model is on its `device`. With `masters` the optimizers move fp32 copies of parameters that
    are narrower, kept in the state as "master". Raises ConfigError as `assign` does, for a parameter that is
    on another device, and for one that its optimizer cannot take.
    """

    def __init__(
        self,
        groups: Sequence[OptimizerGroup],
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        device: torch.device | str,
        *,
        masters: bool = False,
    ) -> None:
        merged: dict[tuple[Optimizer, Schedule | None], NamedParameters] = {}
        for group, parameters in assign(groups, named_parameters):
            merged.setdefault((group.optimizer, group.lr), []).extend(parameters)
        wanted = torch.device(device)
        for name, parameter in (pair for pairs in merged.values() for pair in pairs):
            if parameter.device.type != wanted.type or wanted.index not in (None, parameter.device.index):
                raise ConfigError(
                    f"parameter {name!r} is on {parameter.device} and the run on {wanted}; "
                    "move the model before its optimizers are built"
                )
        self.members = []
        for (part, lr), pairs in merged.items():
            moved = [master(parameter) if masters else parameter for _, parameter in pairs]
            named = [(name, parameter) for (name, _), parameter in zip(pairs, moved, strict=True)]
            self.members.append(Member(part, lr, part.build(named), pairs, moved))

    def step(self, knobs: Knobs, *, found_inf: Tensor | None = None) -> None:
        """Moves the parameters of every optimizer that is due, with this step's values; no device sync.

        Where `found_inf` (0-D) holds 1 nothing moves. Raises ConfigError for an optimizer that lets gradients
        wait then: what waits has been unscaled already, and what is added to it has not.
        """
        for member in self.members:
            member.waiting = not member.part.due(knobs.step)
            if member.waiting and found_inf is not None:
                raise ConfigError(
                    f"{type(member.part).__name__} does not move at every step, and loss scaling needs that "
                    "it does; set its `every` to 1, or use --set precision=Bf16"
                )
            if member.waiting:
                continue
            values = member.part.hyperparameters(member.own(knobs))
            for group in member.optimizer.param_groups:
                assert values.keys() <= group.keys(), (member.part, values)
                group.update(values)
            member.step(found_inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, but for those that wait for their optimizer's next due step."""
        for member in self.members:
            if not member.waiting:
                member.optimizer.zero_grad(set_to_none=set_to_none)
                for _, parameter, _ in member.masters():
                    parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state by "parameter name/state name", waiting gradients included; clone to keep it."""
        tensors: dict[str, Tensor] = {}
        for member in self.members:
            tensors |= {f"{name}/{MASTER}": master.detach() for name, _, master in member.masters()}
            for (name, parameter), moved in zip(member.parameters, member.moved, strict=True):
                for key, value in member.optimizer.state[moved].items():
                    tensors[f"{name}/{key}"] = value
                if member.waiting and parameter.grad is not None:
                    tensors[f"{name}/{GRADIENT}"] = parameter.grad
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies what `state_tensors` gave into this state, in place; gradients it does not hold are dropped.

        Raises ConfigError when names, shapes or number formats differ; nothing has been changed then.
        """
        with torch.no_grad():
            own = self._matching_state(tensors)
            for key, value in own.items():
                value.copy_(tensors[key])
            for member in self.members:
                member.waiting = False
                for name, parameter in member.parameters:
                    gradient = tensors.get(f"{name}/{GRADIENT}")
                    parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
                    member.waiting |= gradient is not None

    def _matching_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gradients = {
            f"{name}/{GRADIENT}": parameter
            for member in self.members
            for name, parameter in member.parameters
        }
        own = {key: value for key, value in self.state_tensors().items() if key not in gradients}
        problems = [f"{key!r} is missing" for key in own if key not in tensors]
        for key, value in tensors.items():
            mine = own.get(key, gradients.get(key))
            if mine is None:
                problems.append(f"{key!r} is not part of this optimizer state{nearest(key, own)}")
            elif (value.shape, value.dtype) != (mine.shape, mine.dtype):
                allowed = f"{tuple(mine.shape)} {mine.dtype}"
                problems.append(f"{key!r} is {tuple(value.shape)} {value.dtype}, allowed: {allowed}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ConfigError(
                f"optimizer state does not fit: {'; '.join(problems[:5])}{more}; "
                "load it into the recipe that it was saved from"
            )
        return own
