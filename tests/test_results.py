from chanpatch.results import table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks():
    lines = table([{"channel": 121, "label": "DOWN or LEFT"}, {"channel": 7, "label": "UP"}])
    assert lines == ["channel  label", "121      DOWN or LEFT", "7        UP"]


def test_fractions_have_four_digits_and_none_is_an_empty_cell():
    assert table([{"auc": 0.98765, "n": 12345, "note": None}]) == ["auc     n      note", "0.9877  12345"]


def test_no_records_are_no_lines():
    assert table([]) == []
