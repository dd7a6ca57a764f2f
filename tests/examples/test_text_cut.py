"""The text example: what the cut learns that truncation cannot, and real text that is not seen twice."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from rewriter.examples import text_cut  # after the check for the extra
from rewriter.examples.random_forest import one_thread


@pytest.fixture(scope="module")
def texts() -> text_cut.Texts:
    return text_cut.Texts.installed()


def test_it_trains_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, texts: text_cut.Texts
) -> None:
    monkeypatch.setattr(text_cut.Texts, "installed", lambda: texts)
    monkeypatch.setattr(text_cut, "POINTS", 2)
    assert text_cut.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(method) >= 2 for method in text_cut.METHODS)
    assert str(3 * text_cut.COPIES * text_cut.ROWS) in printed  # the cuts' copies of every row
    assert (tmp_path / "out" / "text_cut.png").read_bytes().startswith(b"\x89PNG")


def test_what_decides_before_the_first_cut_is_learnt(monkeypatch: pytest.MonkeyPatch, texts: text_cut.Texts) -> None:
    monkeypatch.setattr(text_cut, "LENGTH", 16)
    monkeypatch.setattr(text_cut, "POINTS", 1)
    monkeypatch.setitem(text_cut.TASKS, "the first quarter tells", 4)
    with one_thread():
        accuracy = {
            method: text_cut.train("the first quarter tells", method, texts, 0, 120).accuracy[-1]
            for method in text_cut.METHODS
        }
    assert accuracy["truncated"] < 0.41  # chance is 1/3: a cut that passes nothing is seen
    assert accuracy["back-propagation"] > 0.44
    assert accuracy["UlrCut"] > 0.44


def test_early_words_get_a_gradient_through_the_cuts(monkeypatch: pytest.MonkeyPatch, texts: text_cut.Texts) -> None:
    monkeypatch.setattr(text_cut, "COPIES", 256)
    words, sources = next(text_cut.passages(texts.seen, 10, 16, seed=0))
    words[:, :10] += text_cut.WORDS  # numbers of their own, so that their embeddings' gradient is theirs alone

    def early(truncate: int | None, cut: bool) -> torch.Tensor:
        reader = text_cut.Reader(0, truncate)
        reader.words.weight.data = reader.words.weight.data.repeat(2, 1)
        step = text_cut.cut(reader, words, seed=0) if cut else None
        loss = F.cross_entropy(reader(words), sources) if step is None else step(words, target=sources)
        (gradient,) = torch.autograd.grad(loss, reader.words.weight)
        return gradient[text_cut.WORDS :].flatten()

    exact, found = early(None, cut=False), early(None, cut=True)
    assert not early(10, cut=False).any()
    assert float(F.cosine_similarity(found, exact, dim=0)) > 0.9
    assert float(found @ exact / (exact @ exact)) == pytest.approx(1, abs=0.15)


def test_held_out_text_is_of_other_documents(texts: text_cut.Texts) -> None:
    for name in (*text_cut.SOURCES, text_cut.FOLLOWING):
        assert len(texts.seen[name]) > 3 * len(texts.unseen[name]) > 1000
        assert int(texts.seen[name].max()) < text_cut.WORDS
    words, sources = next(text_cut.passages(texts.seen, 10, 64, seed=0))
    assert words.shape == (64, text_cut.LENGTH)
    assert set(sources.tolist()) == {0, 1, 2}
