from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm.errors import EdadmError
from edadm.prompts import check_prompts, read_prompts

LINES = st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff", codec="utf-8"), min_size=1), min_size=1)


@settings(max_examples=30)
@given(prompts=LINES.filter(lambda lines: all(line.strip() for line in lines)), end=st.sampled_from(["", "\n", "\r\n"]))
def test_a_line_is_a_prompt_whatever_it_holds(prompts: list[str], end: str, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_bytes(("\n".join(prompts) + end).encode())
    assert read_prompts(path) == prompts


def test_windows_files_are_read_like_others(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa red car\r\na \xc3\xa9clair\r\n")
    assert read_prompts(path) == ["a red car", "a éclair"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b"a cat\n\na dog\n", r"line 2 of .*prompts\.txt is empty"),
        ("a cat\né".encode("latin-1"), r"not UTF-8 \(byte 6 is 0xe9\)"),
        (None, r"cannot read prompts from .*prompts\.txt: No such file"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_named(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(EdadmError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_prompts_must_count_as_the_images_do():
    check_prompts(["a", "b"], 2)
    check_prompts([], 0)
    with pytest.raises(EdadmError, match=r"captions\.txt: 3 prompts for 2 images"):
        check_prompts(["a", "b", "c"], 2, "captions.txt")
    with pytest.raises(EdadmError, match="the list is empty, expected one prompt for each of 2 images"):
        check_prompts([], 2)
    for no_list in ("ab", ["a", None]):
        with pytest.raises(EdadmError, match="expected a list of texts"):
            check_prompts(no_list, 2)  # type: ignore[arg-type]
