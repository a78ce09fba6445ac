import json
import subprocess
from dataclasses import replace

import pytest

from sabrage.cli import main
from sabrage.config import override, to_json
from sabrage.recipes import find
from sabrage.run.folder import write_json
from sabrage.study.plan import StudyError, Variant
from sabrage.study.race import RacePlan
from sabrage.study.submission import SubmissionError, gather, problems
from sabrage.study.submission_files import write

IDEA = override(replace(find("nocap"), name="mine", summary="Squares do it."), "plan.steps=2000")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def code(tmp_path):
    """A file of a clean checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "code.py").write_text("a = 1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "-qm", "first")
    return folder / "code.py"


@pytest.fixture
def make(tmp_path, code):
    """make(name, recipe=IDEA, loss=3.38, seed=0, **changes) -> the folder of an ended run."""
    commit = git(code.parent, "rev-parse", "HEAD")

    def run(name, recipe=IDEA, *, loss=3.38, seed=0, nocap_seconds=1000.0, ending="done", **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        recipe = replace(recipe, budget=replace(recipe.budget, seed=seed))
        manifest = {
            "started": "2026-11-24T10:00:00+00:00", "command": ["sabrage", "train", recipe.name],
            "recipe": to_json(recipe), "seed": seed, "track": "nocap", "processes": 1,
            "device": {"kind": "cuda", "name": "RTX 4090", "memory": 24 << 30},
            "versions": {"torch": "2.13.0", "driver": "570.1"},
            "code": {"commit": commit, "dirty": False, "diff": ""},
            "data": {"train": shards(26), "validation": [shard("fineweb_val_000000.bin")]},
            "legality": {"passed": True, "checks": [{"name": "causality", "passed": True, "detail": "fine"}]},
        }  # fmt: skip
        write_json(folder / "manifest.json", manifest | changes)
        result = {
            "ending": ending, "validation_loss": loss, "steps": recipe.plan.steps, "seed": seed,
            "tokens": recipe.plan.tokens(), "nocap_seconds": nocap_seconds, "wall_seconds": nocap_seconds + 9,
            "train_seconds": nocap_seconds - 9,
        }  # fmt: skip
        write_json(folder / "result.json", result)
        return folder

    return run


def shard(name):
    return {"file": name, "tokens": 100_000_000, "sha256_of_edges": f"sha of {name}"}


def shards(count):
    return [shard(f"fineweb_train_{number:06d}.bin") for number in range(1, count + 1)]


@pytest.fixture
def baseline(make):
    return make("nocap", find("nocap"), loss=3.38213, nocap_seconds=2500.0)


def test_a_submission_holds_the_results_the_rules_and_the_commands(make, baseline, code, tmp_path):
    submission = gather(make("mine"), baseline=baseline, code=code)
    assert problems(submission) == []
    write(submission, tmp_path / "out", log=tmp_path / "LOG.md")
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "**2.50 times as fast as the baseline**" in text
    assert "| mine | 0 | 2,000 | 1,048,576,000 | 3.38000 | 1,000.0 | 991.0 | 1,009.0 |" in text
    assert "| nocap | 0 | 4,768 | 2,499,805,184 | 3.38213 | 2,500.0 |" in text
    assert "One RTX 4090, 24.0 GiB. torch 2.13.0, driver 570.1." in text
    assert "26 of at most 50 training shards" in text
    assert "1,048,576,000, 0.403 epochs" in text
    assert "first 1,048,576 validation targets" in text
    assert "sabrage train mine\nsabrage train nocap\n" in text


def test_the_bundle_can_be_cloned_and_holds_the_commit_of_the_runs(make, baseline, code, tmp_path):
    write(gather(make("mine"), baseline=baseline, code=code), tmp_path / "out", log=tmp_path / "LOG.md")
    git(tmp_path, "clone", "-q", "out/code.bundle", "clone")
    assert (tmp_path / "clone" / "code.py").read_text() == "a = 1\n"


def test_the_idea_has_the_method_and_the_failures_and_stays_the_authors(make, baseline, code, tmp_path):
    (tmp_path / "LOG.md").write_text("# Log\n\n## Experts\n\nNo gain.\n\n## Muon\n\nFaster.\n")
    submission = gather(make("mine"), baseline=baseline, code=code)
    write(submission, tmp_path / "out", log=tmp_path / "LOG.md")
    path = tmp_path / "out" / "IDEA.md"
    text = path.read_text()
    assert text.startswith("# mine\n\nSquares do it.\n")
    assert "| `plan.steps` | 4768 | 2000 |" in text
    assert "### Experts\n\nNo gain." in text
    assert "Muon" not in text
    path.write_text("edited")
    write(submission, tmp_path / "out", log=tmp_path / "LOG.md")
    assert path.read_text() == "edited"


LEAK = {"passed": False, "checks": [{"name": "causality", "passed": False, "detail": "layer 3 sees ahead"}]}
OTHER_VALIDATION = [shard("fineweb_val_000000.bin") | {"sha256_of_edges": "other"}]
BROKEN = {
    "too many shards": ({"data": {"train": shards(51), "validation": []}}, "had 51 training shards, allowed"),
    "a shard beyond the cap": (
        {"data": {"train": [shard("fineweb_train_000051.bin")], "validation": []}},
        "trained on fineweb_train_000051.bin; allowed",
    ),
    "another validation text": (
        {"data": {"train": shards(1), "validation": [shard("my_val.bin")]}}, "validated on my_val.bin",
    ),
    "a changed file": (
        {"data": {"train": shards(1), "validation": OTHER_VALIDATION}},
        "fineweb_val_000000.bin is another file",
    ),
    "another data set": ({"track": "own"}, "of the track 'own', another data set"),
    "a leak": ({"legality": LEAK}, "not legal: causality (layer 3 sees ahead)"),
    "no check": ({"legality": None}, "the model was not checked"),
    "several GPUs": ({"processes": 2}, "ran on 2 x RTX 4090; the benchmark is for one GPU"),
    "a CPU": ({"device": {"kind": "cpu", "name": "CPU"}}, "ran on 1 x CPU"),
    "a baseline elsewhere": (
        {"device": {"kind": "cuda", "name": "H100"}}, "the baseline ran on RTX 4090, the submission on H100",
    ),
    "a loss above": ({"loss": 3.3822}, "the mean loss 3.38220 does not meet 3.3821"),
    "no number": ({"loss": "nan"}, "the mean loss nan does not meet"),
    "no end": ({"ending": "interrupted"}, "not come to its end (interrupted)"),
    "an early end": ({"ending": "until"}, "was to end before its plan does (budget.until)"),
    "fewer targets": (
        {"recipe": override(IDEA, "budget.evaluation_tokens=65536")}, "scored 65,536 validation targets",
    ),
    "changes": ({"code": {"commit": "c", "dirty": True, "diff": "+"}}, "changes that are in no commit"),
    "no checkout": ({"code": None}, "its code was no git checkout"),
    "an unknown commit": (
        {"code": {"commit": "c0ffee", "dirty": False}}, "c0ffee is not part of this checkout",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_the_rules_forbid_is_refused_with_the_reason(make, baseline, code, tmp_path, changes, reason):
    submission = gather(make("mine", **changes), baseline=baseline, code=code)
    assert [problem for problem in problems(submission) if reason in problem]
    with pytest.raises(SubmissionError):
        write(submission, tmp_path / "out", log=tmp_path / "LOG.md")
    assert not (tmp_path / "out").exists()


def test_all_problems_are_listed_at_once(make, baseline, code):
    run = make("mine", track="own", loss=3.5, legality=LEAK, data={"train": shards(60)})
    text = "\n".join(problems(gather(run, baseline=baseline, code=code)))
    found = [
        word for word in ("'own'", "60 training", "not legal", "3.50000", "validated on") if word in text
    ]
    assert len(found) == 5


def test_a_run_alone_lacks_its_baseline(make, code):
    [problem] = problems(gather(make("mine"), code=code))
    assert "no run of the baseline on RTX 4090" in problem
    assert "sabrage train nocap" in problem


@pytest.mark.parametrize(
    "change", ["plan.steps=100", "model.mixers.0.qk_norm=true", "optim.0.optimizer.lr=1"]
)
def test_a_changed_baseline_is_none(make, code, change):
    changed = make("changed", override(find("nocap"), change))
    text = "\n".join(problems(gather(make("mine"), baseline=changed, code=code)))
    assert f"not the baseline, it differs in {change.partition('=')[0]}" in text


def test_the_baseline_may_be_laid_out_otherwise_and_miss_the_target_by_a_hair(make, code):
    recipe = override(override(find("nocap"), "runtime.micro_batch=8"), "data.path=elsewhere")
    laid_out = make("laid-out", recipe, loss=3.3824)
    assert problems(gather(make("mine"), baseline=laid_out, code=code)) == []


def test_a_dirty_checkout_is_refused(make, baseline, code):
    code.write_text("a = 2\n")
    [problem] = problems(gather(make("mine"), baseline=baseline, code=code))
    assert "the bundle would lack them; commit them" in problem


def test_code_outside_of_any_checkout_is_refused(make, baseline, tmp_path):
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "code.py").write_text("")
    found = problems(gather(make("mine"), baseline=baseline, code=tmp_path / "installed" / "code.py"))
    assert "is no git checkout; clone the repository" in found[0]


@pytest.fixture
def study(make, tmp_path):
    """A comparison of nocap and mine over three seeds."""
    for seed, loss in enumerate((3.381, 3.382, 3.3805)):
        make(f"study/runs/nocap--seed-{seed}", find("nocap"), seed=seed, nocap_seconds=2500.0)
        make(f"study/runs/mine--seed-{seed}", seed=seed, loss=loss)
    (tmp_path / "study" / "study.json").write_text(json.dumps({"part": "StudyPlan"}))
    return tmp_path / "study"


def test_a_study_brings_its_baseline_and_all_seeds(study, code, tmp_path):
    submission = gather(study, code=code)
    assert problems(submission) == []
    assert [run.path.name for run in submission.runs] == [f"mine--seed-{seed}" for seed in range(3)]
    write(submission, tmp_path / "out", log=tmp_path / "LOG.md")
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "Validation loss 3.38117 (target 3.3821, n=3)" in text
    assert "p = 0.084 (sd 0.00076)" in text
    assert "(n=3)." in text


def test_of_several_challengers_one_must_be_named(study, make, code):
    make("study/runs/other--seed-0", override(IDEA, "plan.steps=1500"))
    with pytest.raises(StudyError, match="allowed: mine, other"):
        gather(study, code=code)
    assert [run.path.name for run in gather(study, variant="other", code=code).runs] == ["other--seed-0"]


def test_of_a_race_the_confirmation_is_submitted_without_the_seed_that_explored(
    make, baseline, code, tmp_path
):
    plan = RacePlan(variant=Variant(name="mine", recipe="nocap"), target=3.3821, grid=20, most=4000, seeds=2)
    for steps, seed in ((1800, 0), (2000, 0), (2000, 1), (2000, 2)):
        make(f"race/runs/mine@{steps}--seed-{seed}", seed=seed)
    write_json(tmp_path / "race" / "study.json", to_json(plan))
    with pytest.raises(StudyError, match="has not ended"):
        gather(tmp_path / "race", baseline=baseline, code=code)
    write_json(tmp_path / "race" / "summary.json", {"rows": [{"steps": 2000, "seeds": [1, 2]}]})
    submission = gather(tmp_path / "race", baseline=baseline, code=code)
    assert [run.path.name for run in submission.runs] == ["mine@2000--seed-1", "mine@2000--seed-2"]
    assert problems(submission) == []


def test_the_command_refuses_in_sentences_and_writes_nothing(make, baseline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make("mine", track="own")
    before = sorted(tmp_path.iterdir())
    assert main(["submit", str(run), "--baseline", str(baseline)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sabrage: this cannot be submitted:\n  - ")
    assert "another data set" in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_neither_run_nor_study_is_named(tmp_path):
    with pytest.raises(StudyError, match="neither a run"):
        gather(tmp_path)
