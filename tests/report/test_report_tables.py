import json

import pytest

from sabrage.report.tables import ResultError, render_tables, stale_documents, table, write_tables

RESULT = {
    "name": "ablation",
    "track": "stand-in",
    "device": "NVIDIA H100",
    "versions": {"torch": "2.11", "driver": "580", "triton": None},
    "commit": "0123456789abcdef",
    "date": "2026-11-23",
    "recipe": {"part": "Recipe", "name": "base"},
    "seeds": [0, 1],
    "clocks": {"train_seconds": 192.0},
    "columns": [
        {"key": "idea", "title": "idea"},
        {"key": "loss", "title": "loss", "format": ".4f"},
        {"key": "steps", "title": "steps", "format": ","},
    ],
    "rows": [{"idea": "qk|norm", "loss": 3.38213, "steps": 4768}, {"idea": "none", "loss": None}],
}
TABLE = """\
| idea | loss | steps |
| --- | ---: | ---: |
| qk\\|norm | 3.3821 | 4,768 |
| none | - | - |

*track stand-in; recipe base; NVIDIA H100; torch 2.11; driver 580; seeds 0, 1; \
train_seconds 3 min 12 s; commit 0123456789; 2026-11-23*
"""
EMPTY = "<!-- table:ablation -->\n<!-- /table -->"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "results" / "ablation.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text(f"# Title\n\n{EMPTY}\n\ntail\n")
    (tmp_path / "docs" / "deep" / "more.md").write_text(f"{EMPTY}\n\nbetween\n\n{EMPTY}\n")
    (tmp_path / "docs" / "plain.md").write_text("no tables, only a word of `<!-- table:x -->`\n")
    return tmp_path


def test_a_table_has_formatted_cells_and_says_where_its_numbers_come_from():
    assert table(RESULT) == TABLE


def test_fields_that_do_not_apply_are_left_out_of_the_source():
    nulls = dict.fromkeys(("track", "recipe", "seeds", "clocks", "versions", "commit"))
    assert table(RESULT | nulls).splitlines()[-1] == "*NVIDIA H100; 2026-11-23*"


def test_every_marked_place_is_filled_and_the_rest_stays(root):
    rendered = render_tables(root)
    filled = f"<!-- table:ablation -->\n{TABLE}<!-- /table -->"
    assert rendered == {
        root / "README.md": f"# Title\n\n{filled}\n\ntail\n",
        root / "docs" / "deep" / "more.md": f"{filled}\n\nbetween\n\n{filled}\n",
    }


def test_writing_brings_stale_documents_up_to_date_and_then_rests(root):
    assert len(stale_documents(root)) == 2
    assert len(write_tables(root)) == 2
    assert stale_documents(root) == write_tables(root) == []


def test_a_number_edited_by_hand_is_noticed(root):
    write_tables(root)
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("3.3821", "3.3000"))
    assert stale_documents(root) == [readme]


def test_an_unknown_table_names_the_document_and_the_known_ones(root):
    (root / "README.md").write_text("<!-- table:missing -->\n<!-- /table -->\n")
    with pytest.raises(
        ResultError, match=r"README\.md: no result file is called 'missing'; there are: ablation"
    ):
        render_tables(root)


def test_a_mark_without_an_end_is_refused(root):
    (root / "README.md").write_text("<!-- table:ablation -->\n\ntext\n")
    with pytest.raises(ResultError, match=r"README\.md: a table mark has no"):
        render_tables(root)


def test_a_mark_that_swallows_another_is_refused(root):
    (root / "README.md").write_text(f"<!-- table:ablation -->\n\ntext\n\n{EMPTY}\n")
    with pytest.raises(ResultError, match="a table mark has no"):
        render_tables(root)


def test_a_result_without_its_provenance_is_refused(root):
    result = {key: value for key, value in RESULT.items() if key not in ("device", "seeds")}
    (root / "results" / "ablation.json").write_text(json.dumps(result))
    with pytest.raises(ResultError, match="lacks device, seeds; write null"):
        render_tables(root)


def test_two_results_of_one_name_are_refused(root):
    (root / "results" / "other.json").write_text(json.dumps(RESULT))
    with pytest.raises(ResultError, match="another result file is called 'ablation'"):
        render_tables(root)


def test_a_project_without_documents_or_results_has_no_tables(tmp_path):
    assert render_tables(tmp_path) == {}
