"""What messages say of numbers."""

import pytest

from plm.messages import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 users"), (1, "1 user"), (1.0, "1 user"), (2, "2 users"), (1_200, "1,200 users")]
)
def test_a_noun_agrees_with_its_number(number: float, text: str) -> None:
    assert counted(number, "user") == text
