from __future__ import annotations

import pytest

from edadm.report.page import with_block


def test_only_the_block_of_a_page_is_replaced() -> None:
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    assert with_block(page, "x", "new\n") == page.replace("old", "new")
    assert with_block(page, "y", "new\n") == page.replace("<!-- y -->\n", "<!-- y -->\nnew\n")


@pytest.mark.parametrize("page", ["", "<!-- x -->\n", "<!-- /x -->\n<!-- x -->\n"])
def test_a_page_without_the_block_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="no block <!-- x -->"):
        with_block(page, "x", "new\n")
