from sabrage.report.difference import Difference, differences, in_words, recipe_rows

BEFORE = {
    "part": "Recipe", "name": "a", "summary": "one",
    "model": {"part": "ModelSpec", "layers": 2, "mixers": [{"part": "Heads", "heads": 4, "norm": True}]},
    "budget": {"part": "Budget", "seed": 0, "target": None, "betas": [0.9, 0.95]},
}  # fmt: skip


def told(after):
    return list(differences(BEFORE, BEFORE | after))


def test_a_changed_value_is_told_by_its_path():
    assert told({"model": BEFORE["model"] | {"layers": 4}}) == [Difference("model.layers", "2", "4")]
    assert told({"budget": BEFORE["budget"] | {"target": 3.5}}) == [
        Difference("budget.target", "none", "3.5")
    ]


def test_name_summary_and_seed_are_no_differences():
    assert told({"name": "b", "summary": "two", "budget": BEFORE["budget"] | {"seed": 9}}) == []


def test_a_part_within_a_list_is_told_by_its_place():
    mixers = [{"part": "Heads", "heads": 8, "norm": True}]
    assert told({"model": BEFORE["model"] | {"mixers": mixers}}) == [
        Difference("model.mixers.0.heads", "4", "8")
    ]


def test_a_replaced_part_is_one_row():
    mixers = [{"part": "Latent", "width": 64}]
    assert told({"model": BEFORE["model"] | {"mixers": mixers}}) == [
        Difference("model.mixers.0", "Heads(heads=4, norm=true)", "Latent(width=64)")
    ]


def test_lists_of_other_lengths_and_plain_lists_are_one_row():
    two = BEFORE["model"]["mixers"] * 2
    assert [one.path for one in told({"model": BEFORE["model"] | {"mixers": two}})] == ["model.mixers"]
    assert told({"budget": BEFORE["budget"] | {"betas": [0.8, 0.95]}}) == [
        Difference("budget.betas", "[0.9, 0.95]", "[0.8, 0.95]")
    ]


def test_a_field_that_one_recipe_lacks_is_a_row():
    after = BEFORE | {"precision": {"part": "Bf16"}}
    assert list(differences(BEFORE, after)) == [Difference("precision", "-", "Bf16()")]
    assert list(differences(after, BEFORE)) == [Difference("precision", "Bf16()", "-")]


def test_values_are_told_as_they_are_typed():
    assert [in_words(value) for value in (None, True, 1e-8, "text", [1, 2])] == [
        "none", "true", "1e-08", "text", "[1, 2]"
    ]  # fmt: skip


def test_a_recipe_is_a_table_of_parts_and_values():
    rows = list(
        recipe_rows({"part": "R", "a": 1, "b": {"part": "B", "c": None}, "d": [1, 2], "e": [{"part": "E"}]})
    )
    assert rows == [
        (0, "recipe", "R"), (1, "a", "1"), (1, "b", "B"), (2, "c", "none"), (1, "d", "1, 2"), (1, "e", ""),
        (2, "0", "E"),
    ]  # fmt: skip
