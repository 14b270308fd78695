"""The tool that runs the checkers: pages keep their lines, and nothing wrong goes unseen."""

import pathlib

from .__main__ import HERE, PAGES, REFUSED, Found, write_pages, wrong_in


def test_a_line_of_a_page_has_its_number_in_the_file_that_is_checked(tmp_path):
    written = write_pages(tmp_path)
    assert {"README.md", "docs/guides/wrappers.md"} <= set(written.values())
    for file, page in written.items():
        theirs = PAGES[page].read_text().splitlines()
        for number, line in enumerate(file.read_text().splitlines()):
            assert line in ("", theirs[number])


def lines_refused():
    return [
        number
        for number, line in enumerate(REFUSED.read_text().splitlines(), 1)
        if line.endswith("# refused")
    ]


def test_nothing_is_wrong_where_all_marked_lines_and_no_others_are_refused():
    marked = [Found(REFUSED, number, "") for number in lines_refused()]
    assert marked
    assert wrong_in(marked, {}) == []
    assert wrong_in(marked[1:], {}) == [f"tests/typed/refused.py:{marked[0].line}: was not refused"]
    (own,) = wrong_in([*marked, Found(REFUSED, 1, "no such name")], {})
    assert own.endswith("refused.py:1: no such name")


def test_an_error_in_a_page_is_shown_with_the_page():
    marked = [Found(REFUSED, number, "") for number in lines_refused()]
    file = pathlib.Path("page_README.py")
    other = HERE / "test_accepted.py"
    wrong = wrong_in(
        [*marked, Found(file, 3, "bad"), Found(other, 5, "worse")], {file: "README.md"}
    )
    assert wrong == ["README.md:3: bad", f"{other}:5: worse"]
