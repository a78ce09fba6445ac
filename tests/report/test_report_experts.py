"""The page of a run's experts."""

from xml.etree import ElementTree

from sabrage.report.experts import picture, verdict, write_experts
from sabrage.run.folder import read_run


def test_the_page_draws_every_share_and_says_who_takes_what(make_run, tmp_path):
    layer = {"layer": 3, "information": 0.5, "chance": 0.01, "p": 0.001, "load": [0.5, 0.3, 0.2],
             "shares": [[0.9, 0.1, 0.0], [0.1, 0.5, 0.4]]}  # fmt: skip
    kinds = [{"name": "a < b", "documents": 4}, {"name": "words", "documents": 4}]
    found = {"kinds": kinds, "most": 1.0, "shuffles": 500, "layers": [layer]}
    drawn = ElementTree.fromstring(picture(found, layer))
    assert len(drawn.findall("rect")) == 3 + 2 * 3
    assert "a < b to 0 (90% of it, 1.8 times its share of all text)" in verdict(found)
    assert "In none of 1 layers" in verdict(found | {"layers": [layer | {"p": 0.3}]})
    page = write_experts(found, read_run(make_run("one")), out=tmp_path / "page.html").read_text()
    assert "a &lt; b" in page
    assert "<script" not in page
