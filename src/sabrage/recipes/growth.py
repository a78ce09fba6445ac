"""Growing depth on the study base: few layers for the first stretch of the run, then all."""

from dataclasses import replace

from sabrage.plan import Stages
from sabrage.recipes.base import base

growth = (
    replace(
        base,
        name="grown",
        summary="base with 6 of its 12 layers for the first third of the run",
        plan=replace(base.plan, layers=Stages(values=(6, 12), starts=(0, 120))),
    ),
)
