"""Which files a path of documents names."""

from __future__ import annotations

from pathlib import Path

from flame_ext.data import files


def test_links_are_followed_and_hidden_files_passed_over(tmp_path: Path) -> None:
    for name in ("a/1.txt", "elsewhere/2.txt", "a/.hidden/3.txt", "a/._1.txt", "a/deep/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/folder.txt").mkdir()
    expected = [str(tmp_path / "a" / name) for name in ("1.txt", "deep/4.txt", "link/2.txt")]
    for path in ("a", "a/", "a/**/*.txt"):
        assert files.local_files(f"{tmp_path}/{path}", "text") == expected
    assert files.local_files(f"{tmp_path}/a/.hidden", "text") == [str(tmp_path / "a/.hidden/3.txt")]


def test_files_may_be_named_through_a_link_to_one_of_their_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in ("link/a/1.txt", "link/a", "link/a/*.txt"):
        assert files.local_files(f"{tmp_path}/{path}", "text") == [f"{tmp_path}/link/a/1.txt"]
