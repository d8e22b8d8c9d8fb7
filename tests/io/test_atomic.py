"""Writing files and folders completely or not at all."""

import shutil

import pytest

from continual.io.atomic import write_folder_atomically


def test_a_folder_appears_with_all_its_files_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "sub/folder"
    for text in ("old", "new"):
        with write_folder_atomically(folder) as temporary:
            (temporary / f"{text}.txt").write_text(text)
    assert [p.name for p in folder.iterdir()] == ["new.txt"]
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "folder"
    with write_folder_atomically(folder) as temporary:
        (temporary / "old.txt").write_text("old")

    def fail():
        with write_folder_atomically(folder) as temporary:
            (temporary / "new.txt").write_text("new")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert [p.name for p in folder.iterdir()] == ["old.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_another_machine_wrote_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "folder"
    with write_folder_atomically(folder, keep_existing=True) as temporary:
        (temporary / "mine.txt").write_text("mine")
        folder.mkdir()
        (folder / "theirs.txt").write_text("theirs")
    assert [p.name for p in folder.iterdir()] == ["theirs.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with (
        pytest.raises(OSError, match=r"it takes 5.0 MB, and the disk has 0.0 MB left"),
        write_folder_atomically(tmp_path / "folder", num_bytes=5 * 10**6),
    ):
        pass
    assert not list(tmp_path.iterdir())
