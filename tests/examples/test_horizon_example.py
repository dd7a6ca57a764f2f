"""The horizon example: what the runs learn, what they cost, and what the figure says of memory."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from rewriter.examples import horizon  # after the check for the extras


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[horizon.Training] = []
    memories: list[horizon.Memory] = []
    train, memory = horizon.train, horizon.memory

    def kept(*given: Any) -> horizon.Training:
        trainings.append(train(*given))
        return trainings[-1]

    def known(*given: Any) -> horizon.Memory:
        memories.append(memory(*given))
        return memories[-1]

    monkeypatch.setattr(horizon, "train", kept)
    monkeypatch.setattr(horizon, "memory", known)
    assert horizon.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    assert [training.horizon for training in trainings] == [24, 6, 2]
    assert [training.vjps for training in trainings] == [24, 24, 24]
    assert all(training.losses[-1] < 0.6 * training.losses[0] for training in trainings)
    assert len({training.losses[0] for training in trainings}) == 1  # the same weights and batch
    assert trainings[0].losses[1] != trainings[2].losses[1]
    (found,) = memories
    assert found.windows[2] < found.windows[8] < found.windows[24] == found.exact["ordinary tape"]
    assert found.exact["checkpointing"] < 0.5 * found.exact["ordinary tape"]
    assert (tmp_path / "out" / "horizon.png").stat().st_size > 10_000
    assert "Checkpoint('blocks')" in capsys.readouterr().out
