"""The page of a study, made from small tables."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from chanpatch.statistics import Interval
from maze.analysis.cells import cells, chosen
from maze.analysis.part import SPLITS, Finding
from maze.measurements import PARTS, counterfactual, default, direction, share
from maze.report.answer import NUMBERS, PREDICTED, corrected, status
from maze.report.page import write_report
from maze.results import replace_table, write_manifest

DOCS = Path(__file__).parents[3] / "docs" / "maze_study"
N = 200
POLICIES = ["width4", "imitation", "control", "reward", "seed1", "seed2"]
FACTS = {"weights": "0" * 64, "weights_name": "mine.pth", "width": 4, "n": N, "seed": 0, "versions": {"python": "3.11"}}
CALLED = {"quantity": "precision at the base rate", "control": "channels shuffled", "role": "UP"}
NUMBER = r"\d+(?:\.\d+)*"


def estimated(value, *prefixes):
    return {"n": N} | {
        name: cell
        for prefix in prefixes
        for name, cell in cells(prefix, Interval(value, value - 0.1, value + 0.1, 0.95)).items()
    }


def splits(first, rows):
    return [{"split": split, **first, **row} for split in SPLITS for row in rows]


def tables(episodes=-0.19):
    """Tables of every part: the number that decides it, and all that a figure is drawn from."""
    found = {}
    for part, each in NUMBERS.items():
        where = {name: CALLED.get(name) if callable(cell) else cell for name, cell in each.where.items()}
        row = {**where, **estimated(0.4, each.prefix), each.n: N}
        found[part] = {each.table: [row]}
        if part in PREDICTED:
            found[part]["primary"] = [{"claim": "it is so", "p": 0.001, **estimated(0.4, "mean")}]
    found["pair"]["pictures"] = [{"first_step_0": "UP", "first_step_1": "RIGHT", "sum_0": 36.7, "sum_1": 1.9}] * 2
    found["sums"]["sums"] = splits({"direction": "UP"}, [{"sum": 4.0, "is_it": False}, {"sum": 40.0, "is_it": True}])
    found["sums"]["goals"] = splits({"direction": "UP"}, [estimated(0.9, "cheese")])
    goals = [{"leads_to": goal, "goes": True, **estimated(0.5, "share")} for goal in ("cheese", "corner")]
    found["decision"]["squares"] = [
        {"direction": name, "squares": "accepted", **row} for name in ("UP", "RIGHT") for row in splits({}, goals)
    ]
    found["dose"]["doses"] = [
        {"factor": factor, **estimated(0.1 - factor / 10, "effect")} for factor in (0.0, 1.0, 3.0)
    ]
    pictures = [{"picture": each, **estimated(-2.0, "log_odds", "to_cheese")} for each in default.PICTURES]
    found["default"]["odds"] = splits({}, pictures)
    sets = [{"set": share.BEST, **estimated(0.4, "share")}, {"set": f"{share.RANDOM} 1", **estimated(0.0, "share")}]
    found["share"]["shares"] = splits({}, sets)
    names = ("nothing", direction.OWN, f"{direction.RANDOM} 1")
    found["direction"]["choices"] = [
        {"projected": name, **estimated(0.3, "to_cheese", "log_odds_change")} for name in names
    ]
    found["direction"]["episodes"] = [{"projected": direction.OWN, **estimated(episodes, "effect")}]
    found["counterfactual"]["effects"] = splits({"channels": counterfactual.BEST}, [estimated(-0.2, "effect")])
    found["spatial"] |= {
        "pixels": [{"row": row, "grey": "x" + "80" * 64} for row in range(64)],
        "map": [{"channel": 7, "row": row} | {f"col_{col}": row * col for col in range(8)} for row in range(8)],
    }
    return found


def figure(tables):
    drawn = Figure(figsize=(1, 1))
    drawn.subplots()
    return drawn


def written(folder, policies, agrees="yes", only=None, episodes=-0.19):
    parts = {
        name: replace(part, figure=figure, finding=lambda tables: Finding("12 of 13.", agrees, "So it is."))
        for name, part in PARTS.items()
        if only is None or name in only
    }
    for policy in policies:
        for name in parts:
            for table, rows in tables(episodes)[name].items():
                replace_table(folder / policy / name / f"{table}.csv", rows)
            write_manifest(folder / policy / name, {"part": name, **FACTS, "seconds": 60.0})
    write_report(
        folder, dict.fromkeys(policies, FACTS), parts, "python examples/maze/study.py --n 200 --seed 0 --shipped"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run"), POLICIES)


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def main(page):
    return page[page.index("<main>") : page.index("</main>")]


def words(html):
    return re.sub("<[^>]*>", " ", html).split()


def test_the_first_page_has_at_most_350_words(main):
    first = main[: main.index("</section>")]
    assert 200 < len(words(first)) <= 350
    assert first.count("<a href='#part-") == 3  # the three numbers
    assert first.count("<img") == 1


def test_the_committed_first_page_has_at_most_350_words_and_states_the_result_over_whole_episodes():
    page = (DOCS / "report.html").read_text()
    first = page[page.index("<main>") : page.index("</section>")]
    assert len(words(first)) <= 350
    for text in (first, (DOCS / "report.md").read_text()):
        assert "less often without the direction “the corner is UP”: -0.19 (-0.27 to -0.11), n=100." in text


def test_the_main_part_has_at_most_4000_words_and_700_numbers(main):
    assert len(words(main)) <= 4000
    assert len(re.findall(NUMBER, " ".join(words(main)))) <= 700


def test_no_cell_of_the_main_part_has_more_than_8_numbers(main):
    assert max(len(re.findall(NUMBER, " ".join(words(cell)))) for cell in re.findall("<td.*?</td>", main, re.S)) <= 8


def test_captions_have_at_most_40_words(main):
    captions = re.findall("<figcaption>(.*?)</figcaption>", main, re.S)
    assert len(captions) == 8 and max(len(words(caption)) for caption in captions) <= 40


def test_six_figures_stand_in_the_order_of_the_argument(main, folder):
    names = ["point", "misled", "dose", "default", "direction", "policies"]
    assert re.findall("<section class='step' id='step-(.*?)'>", main) == names
    assert re.findall(r"figures/(.*?)\.png", (folder / "report.md").read_text()) == ["overview", *names]
    assert len(re.findall("<img class='chart'", main)) == 7


def test_a_line_of_the_table_has_at_most_25_words_and_begins_with_the_verdict(main):
    lines = re.findall("<tr>(<td class='badge'>.*?)</tr>", main)
    assert len(lines) == len(PARTS)
    assert max(len(words(line)) for line in lines) <= 25
    assert {words(line)[0] for line in lines} == {"agrees", "confirmed"}


def test_every_link_leads_to_a_place_on_the_page_and_no_file_is_needed(page):
    links = {
        link for link in re.findall("href='(.*?)'", page) if not link.startswith("https://www.alignmentforum.org/")
    }
    assert {f"#{name}" for name in re.findall(r"id='([\w-]+)'", page)} >= links
    assert all(source.startswith("data:image/png;base64,") for source in re.findall("src='(.*?)'", page))


def test_the_appendix_is_closed_and_holds_every_part(page):
    appendix = page[page.index("<details id='appendix'>") :]
    assert "<details open" not in page
    assert re.findall("<h2 id='part-(.*?)'>", appendix) == list(PARTS)


def test_a_maze_shows_the_channels_map_under_the_pointer(page):
    assert ".maze:hover .map, .maze:focus .map { opacity: 1; }" in page
    assert page.count("<div class='maze' tabindex='0'><img") == 1


def test_the_page_follows_the_readers_colors_and_can_be_printed(page):
    assert "@media (prefers-color-scheme: dark)" in page and "@media print" in page


def test_names_and_cells_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, "weights_name", "<i>mine")
    page = (written(tmp_path, ["<b>&"], only=("pair",)) / "report.html").read_text()
    assert "weights &lt;i&gt;mine (width 4" in page and "Confirmed predictions: &lt;b&gt;&amp; 0 of 5." in page
    assert "<b>&lt;b&gt;&amp;</b>, width 4" in page and "<i>" not in page and "<b>&" not in page.replace("<b>&lt;", "")


def test_the_answer_of_a_run_without_the_predictions_claims_nothing(tmp_path):
    page = (written(tmp_path, ["mine"], only=("pair", "sums")) / "report.html").read_text()
    assert "It was not measured whether the corner is the mouse&#39;s default" in page
    assert "Confirmed predictions: mine 0 of 5." in page
    assert re.findall("<h2>(.*?) <span class='badge'>(.*?)</span>", page)[1] == (
        "2. Out of distribution, they point to the corner",
        "not measured",
    )
    assert page.count("<img class='chart'") == 1 + 2  # one step, and two parts


@pytest.mark.parametrize(("agrees", "badge"), [("in part", "confirmed in part"), ("no", "not confirmed")])
def test_a_prediction_whose_criteria_do_not_hold_is_not_called_confirmed(agrees, badge, tmp_path):
    page = (written(tmp_path, ["mine"], agrees, ("default",)) / "report.html").read_text()
    assert f"4. The corner is the default <span class='badge'>{badge}</span>" in page
    assert "Confirmed predictions: mine 0 of 5." in page


def test_p_values_are_corrected_over_five_predictions_even_if_some_were_not_measured():
    parts = {part: tables()[part] for part in ("default", "share")}
    parts["share"] = copy.deepcopy(parts["share"])
    parts["share"]["primary"][0]["p"] = 0.02
    assert corrected(parts) == pytest.approx(
        {"default": 0.005, "share": 0.08, "direction": 1.0, "counterfactual": 1.0, "dose": 1.0}
    )


@pytest.mark.parametrize(
    ("agrees", "p", "expected"),
    [
        ("yes", 0.05, "confirmed"),
        ("yes", 0.051, "confirmed in part"),
        ("in part", 0.001, "confirmed in part"),
        ("no", 0.001, "not confirmed"),
        ("undecided", 0.001, "not confirmed"),
    ],
)
def test_a_prediction_is_confirmed_by_its_criteria_and_its_corrected_p_value(agrees, p, expected):
    assert status(Finding("", agrees, ""), p) == expected
    assert status(None, p) == "not measured"


def answer(folder, part="answer"):
    page = (folder / "report.html").read_text()
    return page[page.index(f"id='{part}'>") :].split("</p>")[0].partition(">")[2].replace("&#39;", "'")


def test_the_answer_has_three_sentences_with_the_status_of_each_prediction(folder, tmp_path):
    assert answer(folder) == (
        "The corner is the mouse's default, which the cheese corrects less out of distribution than in it. A few "
        "channels, the best of each direction, carry much of the cheese's effect; the mouse finds the cheese less "
        "often if these channels act as without the cheese. One direction of relu3, “the corner is UP”, carries much "
        "of the preference for the corner; the mouse finds the cheese less often the higher the UP channel is scaled."
    )
    assert answer(written(tmp_path, ["mine"], "in part", ("share", "direction"))) == (
        "It was not measured whether the corner is the mouse's default, which the cheese corrects less out of "
        "distribution than in it. A few channels, the best of each direction, carry much of the cheese's effect "
        "(confirmed in part); it was not measured whether the mouse finds the cheese less often if these channels act "
        "as without the cheese. One direction of relu3, “the corner is UP”, carries much of the preference for the "
        "corner (confirmed in part); it was not measured whether the mouse finds the cheese less often the higher the "
        "UP channel is scaled."
    )


@pytest.mark.parametrize(("effect", "change"), [(-0.19, "less often"), (0.19, "more often"), (0.01, "about as often")])
def test_the_first_page_states_how_the_mouse_changes_over_whole_episodes(effect, change, tmp_path):
    folder = written(tmp_path, ["mine"], only=("direction",), episodes=effect)
    found = answer(folder, "episodes")
    assert found.startswith("Over whole episodes, the mouse finds the cheese ")
    assert f"{change} without the direction “the corner is UP”: {effect:+} (" in found


def test_the_first_page_is_silent_about_whole_episodes_that_were_not_measured(tmp_path):
    assert not answer(written(tmp_path, ["mine"], only=("share",)), "episodes")


def test_the_number_that_decides_a_part_is_the_first_that_was_measured():
    odds = tables()["default"]["odds"]
    chosen(odds, **PREDICTED["default"].where)[0]["log_odds"] = None
    assert PREDICTED["default"].text({"odds": odds}) == "not measured"
    assert PREDICTED["default"].text(tables()["default"]) == "-2.0 (-2.1 to -1.9)"
