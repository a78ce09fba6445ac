"""Many changes of one recipe at once: every run has half of them, and every run tells of each.

In a Plackett-Burman design (1946, Biometrika 33) of N runs, N a multiple of four, each change is on in half
of them, and any two are on together as often as they are off together. So the effect of a change is the mean
of N / 2 runs with it less that of N / 2 without, whatever the others do: N runs measure up to N - 1 changes,
each as precisely as N runs would that have nothing but this change in half of them. The price: effects are
taken to add up. Where two changes hinder or need each other, that shows in the effects of others, so the best
is to be run again.

Effects are least squares over the runs that are done, with a level for each seed. Where no run is left to
tell noise from effects, most effects are taken to be none: Lenth's pseudo standard error (1989, Technometrics
31).
"""

from collections.abc import Sequence
from math import expm1, log
from statistics import fmean
from typing import Any

import numpy as np

from sabrage.recipes import written
from sabrage.study.launch import Job
from sabrage.study.plan import StudyError, Variant, parse_variant
from sabrage.study.runner import finished
from sabrage.study.statistics import Estimate, judged, standing
from sabrage.study.summary import cautions, facts, failures, final_loss, result

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Primes one less than a multiple of four: their quadratic residues make a design of one run more.
PRIMES = (3, 7, 11, 19, 23, 31)
PLAIN = "none"


# Changes of a recipe by letter, each such as ("model.layers=6",).
Factors = dict[str, tuple[str, ...]]


def design(num_factors: int) -> np.ndarray:
    """(N, num_factors) booleans, the smallest design that takes so many; the first run has none of them on.

    Raises StudyError beyond the largest.
    """
    prime = next((prime for prime in PRIMES if prime >= num_factors), None)
    if prime is None:
        raise StudyError(f"got {num_factors} changes to screen at once, allowed: 2 to {len(LETTERS)}")
    squares = {number**2 % prime for number in range(prime)}
    on = [[(column - row) % prime in squares for column in range(num_factors)] for row in range(prime)]
    return np.array([[False] * num_factors, *on])


def lettered(changes: Sequence[str]) -> Factors:
    """The changes, each a.b=c, or several such joined by +. Raises StudyError for two of the same field."""
    if not 2 <= len(changes) <= len(LETTERS):
        raise StudyError(f"got {len(changes)} changes to screen, allowed: 2 to {len(LETTERS)}")
    factors = {}
    for letter, change in zip(LETTERS, changes, strict=False):
        name, sets = written(f"+{change}")
        if name or not sets:
            raise StudyError(f"got --change {change!r}, allowed: FIELD.FIELD=VALUE, several joined by +")
        factors[letter] = sets
    apart(factors)
    return factors


def screening(recipe: str, factors: Factors, common: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The runs that measure changes of a recipe. Raises ConfigError for one that cannot be made."""
    plain = parse_variant(recipe, common)
    variants = []
    for row in design(len(factors)):
        chosen = [letter for letter, on in zip(factors, row, strict=True) if on]
        sets = (*plain.sets, *(words for letter in chosen for words in factors[letter]))
        variants.append(Variant(name=" ".join(chosen) or PLAIN, recipe=plain.recipe, sets=sets))
        variants[-1].make()
    return tuple(variants)


def apart(factors: Factors) -> None:
    """Raises StudyError where two changes touch one field, or one a field within another's."""
    touched = [(letter, words.split("=")[0]) for letter, sets in factors.items() for words in sets]
    for one, path in touched:
        for other, place in touched:
            if one != other and f"{place}.".startswith(f"{path}."):
                raise StudyError(
                    f"changes {one} and {other} both touch {path}, so that one undoes the other; screen them "
                    "one after the other, or make one change of them"
                )


def effects(on_NF: np.ndarray, values: Sequence[float], seeds: Sequence[int]) -> list[Estimate] | None:
    """The effect of each factor on a value measured in N runs, of which `on_NF` says what factors they had.

    None where the runs do not tell the factors apart.
    """
    on_NF, values_N = np.asarray(on_NF), np.asarray(values)
    if len(values_N) == 0:
        return None
    levels_NS = np.asarray(seeds)[:, None] == sorted(set(seeds))
    # Plus and minus a half: a coefficient is the difference between on and off.
    terms_NT = np.hstack([on_NF - 0.5, levels_NS])
    if np.linalg.matrix_rank(terms_NT) < terms_NT.shape[1]:
        return None
    found_T, *_ = np.linalg.lstsq(terms_NT, values_N, rcond=None)
    means_F, freedom = found_T[: on_NF.shape[1]], float(len(values_N) - terms_NT.shape[1])
    if freedom:
        variance = float(((values_N - terms_NT @ found_T) ** 2).sum()) / freedom
        errors_F = np.sqrt(variance * np.diag(np.linalg.inv(terms_NT.T @ terms_NT)))[: len(means_F)]
    else:
        errors_F, freedom = np.full(len(means_F), lenth(means_F)), len(means_F) / 3
    return [
        judged(mean, n=len(values_N), sd=error, error=error, freedom=freedom)
        for mean, error in zip(means_F.tolist(), errors_F.tolist(), strict=True)
    ]


def lenth(means_F: np.ndarray) -> float:
    """The standard error of effects most of which are noise: 1.5 medians of those that do not stand out."""
    sizes_F = np.abs(means_F)
    first = 1.5 * float(np.median(sizes_F))
    return 1.5 * float(np.median(sizes_F[sizes_F < 2.5 * first])) if first else 0.0


def summarise_screening(recipe: str, factors: Factors, jobs: Sequence[Job], *, name: str) -> dict[str, Any]:
    """The effects of a screening, whatever part of it is done: a result file and the study's summary."""
    done = [(job, run) for job in jobs if (run := finished(job))]
    runs = [run for _, run in done]
    on_NF = np.array([[letter in job.variant.name.split() for letter in factors] for job, _ in done])
    seeds, losses = [job.seed for job, _ in done], [final_loss(run) for run in runs]
    on_loss = effects(on_NF, losses, seeds)
    on_time = effects(on_NF, [log(result(run)["train_seconds"]) for run in runs], seeds)
    rows = []
    for index, (letter, sets) in enumerate(factors.items()):
        row: dict[str, Any] = {"factor": letter, "change": "+".join(sets)}
        if on_loss and on_time:
            effect = on_loss[index]
            row |= {"effect": effect.mean, "half": effect.half, "p": effect.p}
            row["seconds"] = 100 * expm1(on_time[index].mean)
        rows.append(row)
    notes = cautions(runs)
    if on_loss is None:
        notes.append("too few runs are done to tell the changes apart; the same command goes on")
    elif len(losses) - len(factors) == len(set(seeds)):
        notes.append(
            "as many changes as runs tell apart: intervals take most to do nothing; more seeds say more"
        )
    notes.append("effects are taken to add up; where changes hinder each other, they show in others")
    shown = [
        ("factor", "", None),
        ("change", "change", None),
        ("effect", "effect on the loss", "+.4f"),
        ("half", "±95%", ".4f"),
        ("p", "p", ".2g"),
        ("seconds", "train seconds, %", "+.1f"),
    ]
    return {
        "name": name,
        **facts(runs),
        "recipe": recipe,
        "seeds": sorted(set(seeds)),
        "clocks": None,
        "columns": [{"key": key, "title": title, "format": form} for key, title, form in shown],
        "rows": rows,
        "kind": "screen",
        "runs": {f"{job.variant.name}, seed {job.seed}": final_loss(run) for job, run in done},
        "sentences": conclusions(recipe, factors, on_loss, losses),
        "notes": notes,
        "failures": failures(jobs),
        "skipped": {},
    }


def conclusions(
    recipe: str, factors: Factors, found: list[Estimate] | None, losses: Sequence[float]
) -> list[str]:
    """What each change does, and what to run next."""
    if found is None:
        return []
    said, helping = [], []
    for (letter, sets), effect in zip(factors.items(), found, strict=True):
        word = standing(effect)
        said.append(
            f"{letter} {'+'.join(sets)}: {word or 'no effect seen'}: {effect.mean:+.4f} +- {effect.half:.4f}"
        )
        if word == "better":
            helping.append((sets, effect.mean))
    if helping:
        # The mean run has half of every effect.
        plain = fmean(losses) - sum(effect.mean for effect in found) / 2
        together = "+".join([recipe, *("+".join(sets) for sets, _ in helping)])
        said.append(
            f"plain about {plain:.4f}, with what is better {plain + sum(mean for _, mean in helping):.4f} if "
            f"effects add up; run it: sabrage study compare {recipe} {together}"
        )
    return said
