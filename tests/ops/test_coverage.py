"""The table of coverage.py: what runs here has gradients in float32, and only the reference has second derivatives."""

import coverage

from fastkd import backends


def test_the_coverage_table():
    rows = list(coverage.rows())
    listed = {(row[0], row[2]) for row in rows}
    assert listed == {(stem, b) for stem in backends.STEMS for b in (*backends.WRITTEN[stem], "reference")}
    for _, function, backend, dtypes, _, gradient, double_backward in rows:
        if backends.UNAVAILABLE[backend] is None:
            assert "float32" in dtypes and gradient == "yes", (function, backend)
            assert (double_backward == "yes") == (backend == "reference"), (function, backend)
