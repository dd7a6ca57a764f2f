"""Plans as text: the round trip, what is refused, and that nothing in a plan file is executed."""

import pytest
from torch import nn

from rewriter.passes.black_box import BlackBox
from rewriter.plan import Plan
from rewriter.runtime.errors import RewriteError


def test_text_round_trip(tmp_path):
    plan = Plan([BlackBox("pricing"), BlackBox("blocks[2:5].*", probes=4, step_size=0.5, clip=None)])
    assert plan.text() == "BlackBox('pricing')\nBlackBox('blocks[2:5].*', probes=4, step_size=0.5, clip=None)\n"
    assert Plan.parse("# a comment\n\n" + plan.text()) == plan
    plan.save(tmp_path / "plan.txt")
    assert Plan.load(tmp_path / "plan.txt") == plan
    assert Plan.parse(plan.text()) != Plan([BlackBox("pricing")])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("BlackBox(", "could not be read"),
        ("BlackBox(__import__('os').getcwd())", "could not be read"),
        ("__import__('os')", "unknown entry"),
        ("Nothing('pricing')", "unknown entry"),
        ("BlackBox('pricing', porbes=2)", "options it does not have"),
        ("BlackBox(**{'target': 'a'})", "could not be read"),
        ("BlackBox('pricing').target", "could not be read"),
        ("BlackBox('pricing', probes=0)", "not an option"),
        ("BlackBox('pricing', directions='spiral')", "not an option"),
    ],
)
def test_bad_lines_are_named(line, what):
    with pytest.raises(RewriteError, match=what):
        Plan.parse(line)


def test_a_bad_line_shows_its_number():
    with pytest.raises(RewriteError, match="line 3"):
        Plan.parse("BlackBox('a')\n\nBlackBox(")


def test_targets_without_text_are_refused():
    with pytest.raises(RewriteError, match="no text"):
        Plan([BlackBox(nn.Linear(2, 2))]).text()


def test_a_plan_holds_entries_only():
    with pytest.raises(RewriteError, match="holds entries"):
        Plan(["pricing"])  # type: ignore[list-item]


def test_a_huge_or_binary_file_is_refused(tmp_path):
    (tmp_path / "big").write_bytes(b"#" * (1 << 21))
    with pytest.raises(RewriteError, match="too large"):
        Plan.load(tmp_path / "big")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RewriteError, match="not text"):
        Plan.load(tmp_path / "binary")
