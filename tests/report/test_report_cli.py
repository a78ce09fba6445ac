import pytest

from sabrage.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_page_of_one_folder_lies_in_it(make_run, study, tmp_path, capsys):
    run = make_run("a")
    assert main(["report", "a"]) == 0
    assert "report: a/report.html" in capsys.readouterr().out
    assert main(["report", "study"]) == 0
    assert (run / "report.html").is_file()
    assert (study / "report.html").is_file()


def test_the_page_of_several_lies_here_or_where_it_is_asked_for(make_run, kernels, tmp_path):
    make_run("a")
    make_run("b")
    assert main(["report", "a", "b", "kernels.json"]) == 0
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert main(["report", "a", "b", "--out", "new/compare.html"]) == 0
    assert (tmp_path / "new" / "compare.html").is_file()


def test_what_cannot_be_reported_is_said_in_a_sentence(kernels, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no result")
    for arguments in ([], ["nothing"], ["notes.txt"]):
        assert main(["report", *arguments]) == 1
        assert "give" in (error := capsys.readouterr().err) or "allowed" in error
        assert "Traceback" not in error


def test_markdown_brings_the_tables_of_the_documents_up_to_date(kernels, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    kernels.rename(tmp_path / "results" / "kernels.json")
    (tmp_path / "README.md").write_text("<!-- table:kernels -->\n<!-- /table -->\n")
    assert main(["report", "--markdown"]) == 0
    assert "| norm | 16 |" in (tmp_path / "README.md").read_text()
    assert "README.md" in capsys.readouterr().out
    assert main(["report", "--markdown"]) == 0
    assert "are up to date" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_watch_shows_a_run_or_the_newest_one(make_run, capsys):
    make_run("runs/a", steps=30, done=False)
    assert main(["watch", "runs/a", "--once"]) == 0
    assert main(["watch", "--once"]) == 0
    assert capsys.readouterr().out.count("step 30/40") == 2


def test_watch_says_what_is_no_run(capsys):
    assert main(["watch", "nothing"]) == 1
    assert "give the folder of a run" in capsys.readouterr().err
