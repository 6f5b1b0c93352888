"""docs/results.md is what its command writes from the committed records."""

import json

from benchmarks import results_page


def test_the_page_of_results_is_what_its_command_writes():
    assert results_page.PAGE.read_bytes() == results_page.page().encode()


def test_another_figure_in_a_record_is_another_page(tmp_path):
    for path in results_page.RESULTS.iterdir():
        (tmp_path / path.name).symlink_to(path)
    changed = json.loads((tmp_path / "demo-digits.json").read_text())
    changed["rows"][2]["frechet_distance"] = 6.5
    (tmp_path / "demo-digits.json").unlink()
    (tmp_path / "demo-digits.json").write_text(json.dumps(changed))
    assert "| shaped | 6.50 |" in results_page.page(tmp_path)
