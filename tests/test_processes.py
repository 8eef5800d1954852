import pytest
from torch import multiprocessing

from .processes import together


def test_a_process_that_left_no_file_does_not_hide_the_error(tmp_path, monkeypatch):
    def spawn(*args, **kwargs):
        (tmp_path / "stderr-1").write_bytes(b"killed by \xff")
        raise RuntimeError("process 0 died")

    monkeypatch.setattr(multiprocessing, "spawn", spawn)
    with pytest.raises(RuntimeError, match="process 0 died") as caught:
        together(print, [1], tmp_path)
    notes = caught.value.__notes__
    assert notes == ["Process 0 ended with:\nno file of its own yet", "Process 1 ended with:\nkilled by \ufffd"]
