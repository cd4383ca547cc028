"""The report for people: its numbers are the report's, nothing in it is more than text, and it stays small."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_workspace.batch.outcomes import FAILURE_CLASSES, AttemptRecord, Policy
from hpc_workspace.batch.pages import charts, html, markdown, measures, plots, style, timeline, words
from hpc_workspace.batch.pages.markup import escape, shorten, tag, visible
from hpc_workspace.batch.report import Report, derive, make_report
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunReader

BEGAN_S = 1_760_000_000.0
LIMIT = 4 * 1024**3
SVG = "{http://www.w3.org/2000/svg}"
ERRORS = {
    "agent": ["Traceback (most recent call last):\n  File \"agent.py\", line 12, in solve\n    fix(repo)\nAssertionError: 3 tests still fail", "Traceback (most recent call last):\n  File \"agent.py\", line 40, in solve\nKeyError: 'patch'"],
    "task_timeout": ["It had 600 s."],
    "image": ["docker://registry.example/swe/astropy-7746 can't be had. 404 Not Found"],
    "start": ["The agent server did not become ready (60 s). Last lines of server.log: address in use"],
    "lost": ["The connection to n03 is gone, and can't be made again."],
    "oom": ["Its processes used 4403241984 bytes together."],
}  # fmt: skip


class Generator:
    """Writes a run's directory as pilots would: slots that work one task after the other, with failures and losses."""

    def __init__(self, path: Path, tasks: int, *, pilots: int = 6, slots: int = 4, seed: int = 7) -> None:
        self.random = random.Random(seed)  # noqa: S311 - the same run each time
        self.run = RunDir(path)
        self.run.prepare([{"id": f"astropy__astropy-{n}"} for n in range(tasks)])
        self.run.write_run(
            {
                "version": "1.2.3",
                "started_by": "swe_agents.baseline:solve",
                "started_at": BEGAN_S - 20,
                "policy": Policy.of(0).model_dump(),
                "pilots": pilots,
                "workspaces_per_pilot": slots,
                "task_timeout_s": 600.0,
                "memory_bytes": LIMIT,
                "max_infra_loss": 0.05,
            }
        )
        self.slots = slots
        self.numbers: dict[str, int] = {}

    def begin_pilot(self, name: str, began_s: float, **about: Any) -> None:
        self.run.pilot_dir(name).mkdir(mode=0o700)
        said = {"name": name, "job": name, "restarts": 0, "owner": "", "slots": self.slots, "started_at": began_s}
        self.run.write_about(name, "pilot", {**said, **about})

    def record(self, task: str, pilot: str, slot: int, at_s: float, failure: str | None, node: str) -> AttemptRecord:
        pick = self.random
        phases = {"image": pick.uniform(0.01, 0.2), "launch": pick.uniform(0.02, 0.05), "wait": pick.lognormvariate(1.2, 0.4), "connect": pick.uniform(0.02, 0.3)}  # fmt: skip
        if node == "n05":
            phases["wait"] *= 4
        agent_s: float | None = 600.0 if failure == "task_timeout" else pick.lognormvariate(4.3, 0.6)
        close_s = pick.uniform(0.4, 2.0)
        if failure in ("image", "start"):
            phases, agent_s, close_s = {"image": 0.4}, None, 45.0 if failure == "start" else 1.0
        else:
            phases["start"] = sum(phases.values()) + 0.1
        memory = LIMIT * 1.03 if failure == "oom" else min(LIMIT * 0.98, pick.lognormvariate(20.8, 0.4))
        return AttemptRecord(
            task=task,
            attempt=self.numbers[task],
            status="failed" if failure else "done",
            failure_class=failure,
            result=None if failure else {"resolved": pick.random() < 0.6, "steps": pick.randrange(5, 60)},
            error=pick.choice(ERRORS.get(failure, ["Slurm took it away."])) if failure else "",
            pilot=pilot,
            node=node,
            slot=slot,
            started_at=at_s,
            duration_s=round(phases.get("start", 0.4) + (agent_s or 0.0) + close_s, 3),
            agent_s=agent_s,
            phases_s=phases,
            peaks={"memory_bytes": int(memory), "disk_bytes": int(pick.lognormvariate(19, 0.8))},
        )

    def claim(self, task: str, pilot: str) -> None:
        self.numbers[task] = self.numbers.get(task, 0) + 1
        assert self.run.claim(task, self.numbers[task], pilot)

    def work(self, queue: list[str], name: str, node: str, began_s: float, until_s: float, failing: float) -> float:
        """Work until a moment, or until there is no task left; returns when the last slot was free."""
        free = [began_s + 0.5 + 0.3 * slot for slot in range(self.slots)]
        lines = []
        while queue and min(free) < until_s:
            slot = free.index(min(free))
            task = queue.pop(0)
            self.claim(task, name)
            failure = self.random.choices([*ERRORS], [8, 2, 1, 2, 1, 1])[0] if self.random.random() < failing else None
            record = self.record(task, name, slot, free[slot], failure, node)
            free[slot] += record.duration_s
            if free[slot] > until_s:
                continue  # its pilot ends before it does: it has no record
            lines.append(record.model_dump_json() + "\n")
            free[slot] += 0.4
        (self.run.pilot_dir(name) / "records.jsonl").write_text("".join(lines))
        return max(free)


ENDS = ("PREEMPTED", "NODE_FAIL", "TIMEOUT", "CANCELLED")
CLASSES = {"PREEMPTED": "preempted", "NODE_FAIL": "node_fail", "TIMEOUT": "time_limit", "CANCELLED": "cancelled"}


def make_run(path: Path, tasks: int = 280, *, failing: float = 0.15) -> RunDir:
    """A run of 6 pilots with every failure class: four are taken away and replaced, two are under way."""
    made = Generator(path, tasks)
    queue = [f"astropy__astropy-{n}" for n in range(tasks)]
    for index, end in enumerate(ENDS):
        name, node, began_s = f"48213_{index}", f"n{index + 1:02d}", BEGAN_S + 3.0 * index
        until_s = began_s + 500 + 260 * index
        made.begin_pilot(name, began_s, node=node)
        made.work(queue, name, node, began_s, until_s, failing)
        made.run.write_about(name, "fate", {"state": end, "failure_class": CLASSES[end], "noted_at": until_s})
    for index in range(2):
        name, node, began_s = f"48213_{index + 4}", f"n{index + 5:02d}", BEGAN_S + 40 + 90 * index
        made.begin_pilot(name, began_s, node=node)
        last_s = made.work(queue, name, node, began_s, BEGAN_S + 2400 if index else BEGAN_S + 1900, failing)
        made.run.write_about(name, "ended", {"why": "no tasks", "ended_at": last_s + 1})
    # What was lost is done again, by one that came later.
    state = RunReader(made.run).read()
    queue = [*state.open_tasks]
    made.begin_pilot("48391_0", BEGAN_S + 700, node="n02")
    last_s = made.work(queue, "48391_0", "n02", BEGAN_S + 700, BEGAN_S + 10_000_000, failing)
    made.run.write_about("48391_0", "ended", {"why": "no tasks", "ended_at": last_s + 1})
    return made.run


def make_wide_run(path: Path, attempts: int, pilots: int) -> RunDir:
    made = Generator(path, attempts, pilots=pilots)
    queue = [f"astropy__astropy-{n}" for n in range(attempts)]
    share = attempts // pilots
    for index in range(pilots):
        name, node, began_s = f"7_{index}", f"n{index:03d}", BEGAN_S + index
        made.begin_pilot(name, began_s, node=node)
        last_s = made.work(queue[index * share : (index + 1) * share], name, node, began_s, BEGAN_S + 10_000_000, 0.2)
        made.run.write_about(name, "ended", {"why": "no tasks", "ended_at": last_s})
    return made.run


def parse(page: str) -> ElementTree.Element:
    """The page as an XML parser sees it."""
    return ElementTree.fromstring(page.partition("\n")[2])  # noqa: S314 - of our own making


def pages_of(run: RunDir) -> tuple[Report, ElementTree.Element, str]:
    report = derive(run)
    return report, parse((run.path / "report.html").read_text()), (run.path / "report.md").read_text()


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def rows_of(page: ElementTree.Element) -> dict[str, list[str]]:
    """The rows of the table of results by their first cell."""
    found = {}
    for row in page.iter("tr"):
        cells = [text_of(cell) for cell in row.iter("td")]
        if len(cells) == 5:
            found.setdefault(cells[0], cells[1:])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("pages") / "run")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_wide_run(tmp_path_factory.mktemp("wide") / "run", 10_000, 100)


class TestNumbers:
    def test_the_page_says_what_report_json_says(self, run: RunDir) -> None:
        _, page, _ = pages_of(run)
        said = json.loads((run.path / "report.json").read_text())
        rows = rows_of(page)
        assert set(said["attempts"]) == {"done", *FAILURE_CLASSES}, "the run has an end of every kind"
        for name, count in said["counts"].items():
            assert rows[name][0] == f"{count:,}"
        for name, count in said["attempts"].items():
            assert rows[name][2] == f"{count:,}"
        tiles = [text_of(tile) for tile in page.iter("b")]
        assert tiles == [str(said["counts"]["done"]), str(said["agent_failures"]), str(said["infra_losses"]), str(said["missing"])]  # fmt: skip

    def test_markdown_says_it_too(self, run: RunDir) -> None:
        report, _, text = pages_of(run)
        for name, count in report.counts.items():
            assert re.search(rf"^\| {re.escape(markdown.plain(name))} \| {count:,} \|", text, re.MULTILINE)

    def test_the_agents_score_leaves_out_what_it_had_no_chance_at(self, tmp_path: Path) -> None:
        made = Generator(tmp_path / "run", 10)
        made.begin_pilot("p", BEGAN_S)
        failures = [None, None, None, "agent", *["start"] * 6]
        with (made.run.pilot_dir("p") / "records.jsonl").open("w") as file:
            for n, failure in enumerate(failures):
                task = f"astropy__astropy-{n}"
                made.claim(task, "p")
                file.write(made.record(task, "p", 0, BEGAN_S, failure, "n01").model_dump_json() + "\n")
        made.run.write_run({**made.run.read_run(), "policy": Policy.of({"start": 0}).model_dump()})
        _, page, _ = pages_of(made.run)
        rows = rows_of(page)
        assert rows["done"][:2] == ["3", "75.0 %"]
        assert rows["start"][:2] == ["6", "60.0 %"]

    def test_it_says_why_it_is_not_to_be_relied_on(self, run: RunDir, tmp_path: Path) -> None:
        report, page, text = pages_of(run)
        assert report.is_trustworthy == ("and to be relied on" in text)
        made = Generator(tmp_path / "run", 3)
        _, page, text = pages_of(made.run)
        for said in (text_of(page), text):
            assert "Not to be relied on yet" in said
            assert "3 of 3 tasks have not come to an end yet" in said

    def test_every_attempt_with_a_record_is_on_the_timeline(self, run: RunDir) -> None:
        report, page, _ = pages_of(run)
        state = RunReader(run).read()
        drawn = [link for link in page.iter(f"{SVG}a") if link.find(f"{SVG}rect") is not None]
        links = {link.get("href") for link in drawn}
        records = list(measures.every_record(state))
        assert links == {f"attempts/{one.task}/{one.attempt}/agent.log" for one in records}
        lanes = timeline.make_timeline(state).lanes
        unrecorded = sum(sum(lane.unrecorded.values()) for lane in lanes)
        assert len(records) + unrecorded == sum(report.attempts.values())

    def test_the_phases_of_an_attempt_are_no_more_than_all_of_it(self, run: RunDir) -> None:
        for record in measures.every_record(RunReader(run).read()):
            assert sum(measures.phases_of(record).values()) <= record.duration_s + 0.01

    def test_what_is_derived_is_the_same_again(self, run: RunDir) -> None:
        before = [(run.path / name).read_bytes() for name in ("report.html", "report.md") if derive(run)]
        derive(run)
        assert [(run.path / name).read_bytes() for name in ("report.html", "report.md")] == before


class TestTimeline:
    def make(self, tmp_path: Path) -> Generator:
        return Generator(tmp_path / "run", 4, slots=2)

    def add(self, made: Generator, *records: tuple[str, int, float, float]) -> None:
        with (made.run.pilot_dir("p") / "records.jsonl").open("w") as file:
            for task, slot, began_s, took_s in records:
                made.claim(task, "p")
                record = AttemptRecord(
                    task=task, attempt=1, status="done", pilot="p", slot=slot, started_at=began_s, duration_s=took_s
                )
                file.write(record.model_dump_json() + "\n")

    def read(self, made: Generator) -> timeline.Timeline:
        return timeline.make_timeline(RunReader(made.run).read())

    def test_a_slot_without_work_is_idle(self, tmp_path: Path) -> None:
        made = self.make(tmp_path)
        made.begin_pilot("p", 1000.0)
        self.add(made, ("astropy__astropy-0", 0, 1000.0, 60.0))
        made.run.write_about("p", "ended", {"why": "no tasks", "ended_at": 1100.0})
        line = self.read(made)
        assert (line.busy_s, line.idle_s) == (60.0, 140.0)

    def test_what_a_lost_attempt_took_is_neither_work_nor_idleness(self, tmp_path: Path) -> None:
        made = self.make(tmp_path)
        made.begin_pilot("p", 1000.0)
        self.add(made, ("astropy__astropy-0", 0, 1000.0, 60.0))
        made.claim("astropy__astropy-1", "p")
        made.run.write_about("p", "ended", {"ended_at": 1100.0, "failure_class": "time_limit"})
        line = self.read(made)
        assert (line.busy_s, line.idle_s) == (60.0, 0.0)
        assert line.lanes[0].unrecorded == {"time_limit": 1}

    def test_a_pilot_did_not_live_until_somebody_noted_that_it_was_gone(self, tmp_path: Path) -> None:
        made = self.make(tmp_path)
        made.begin_pilot("p", 1000.0, ends_at=1500.0)
        self.add(made, ("astropy__astropy-0", 0, 1000.0, 60.0))
        made.run.write_about("p", "fate", {"state": "TIMEOUT", "failure_class": "time_limit", "noted_at": 90_000.0})
        made.begin_pilot("q", 90_000.0)
        made.run.write_about("q", "ended", {"why": "no tasks", "ended_at": 90_010.0})
        line = self.read(made)
        assert line.lanes[0].end_s == 1500.0
        assert timeline.sessions(line) == [(1000.0, 1500.0), (90_000.0, 90_010.0)]

    def test_slots_are_counted_over_time(self, tmp_path: Path) -> None:
        made = self.make(tmp_path)
        made.begin_pilot("p", 1000.0)
        self.add(made, ("astropy__astropy-0", 0, 1000.0, 60.0), ("astropy__astropy-1", 1, 1010.0, 20.0))
        made.run.write_about("p", "ended", {"why": "no tasks", "ended_at": 1100.0})
        means = timeline.slots_over_time(self.read(made), 1000.0, 1200.0, 4)
        assert [one.busy for one in means] == pytest.approx([1.4, 0.2, 0.0, 0.0])
        assert [one.had for one in means] == pytest.approx([2.0, 2.0, 0.0, 0.0])
        assert [one.unknown for one in means] == [0.0] * 4

    def test_the_means_over_time_add_up_to_all_slot_time(self, run: RunDir) -> None:
        line = timeline.make_timeline(RunReader(run).read())
        means = timeline.slots_over_time(line, line.begin_s, line.end_s, 97)
        each_s = (line.end_s - line.begin_s) / 97
        assert sum(one.busy for one in means) * each_s == pytest.approx(line.busy_s)
        idle_s = sum(one.had - one.busy - one.unknown for one in means) * each_s
        assert idle_s == pytest.approx(line.idle_s)

    @given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1, 1e5)), min_size=1, max_size=20))
    def test_the_axis_keeps_the_order_of_time_and_stays_inside(self, lives: Sequence[tuple[float, float]]) -> None:
        lanes = [timeline.Lane("p", "n", begin, begin + life, "", [[]], {}) for begin, life in sorted(lives)]
        line = timeline.Timeline(lanes, lanes[0].begin_s, max(lane.end_s for lane in lanes))
        axis = plots.TimeAxis(timeline.sessions(line))
        moments = sorted(moment for lane in lanes for moment in (lane.begin_s, lane.end_s))
        places = [axis.x(moment) for moment in moments]
        assert places == sorted(places)
        assert places[0] + 1e-6 >= plots.LEFT
        assert places[-1] <= plots.WIDTH


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "]]></title></svg><svg onload=alert(1)>",
    "&lt;script&gt; &amp; ' \"",
    "javascript:alert(1)",
    "| [a](javascript:alert(1)) ![x](https://example.org/y) `x` | <b>",
    "\x1b]0;owned\x07\x1b[31m \x00 \x9b31m \u202e\u2066 \ud800 \ufffe",
    "</style><style>*{display:none}</style>",
)  # fmt: skip


def make_hostile_run(path: Path, words_: Sequence[str]) -> RunDir:
    """A run in which every text that comes from tasks, errors, agents and pilots is one of these."""
    made = Generator(path, len(words_))
    made.run.write_run({**made.run.read_run(), "started_by": words_[0], "version": words_[0], "pilots": words_[0]})
    name = "p<i>&\"'"
    made.begin_pilot(name, BEGAN_S, node=words_[0])
    with (made.run.pilot_dir(name) / "records.jsonl").open("w") as file:
        for n, word in enumerate(words_):
            task = f"astropy__astropy-{n}"
            made.claim(task, name)
            failed = n % 2 == 0
            record = made.record(task, name, 0, BEGAN_S + n, "agent" if failed else None, "")
            hostile = {"error": f"first line {word}\n{word}" if failed else "", "node": word.encode("utf-8", "replace").decode(), "result": None if failed else {word: True, "n": 1}}  # fmt: skip
            file.write(json.dumps({**record.model_dump(), **hostile}) + "\n")
    other = "q<i>"
    made.begin_pilot(other, BEGAN_S)
    made.run.write_about(other, "fate", {"state": words_[0], "failure_class": words_[0], "noted_at": BEGAN_S + 9})
    return made.run


KNOWN_ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "strong", "ul", "li", "dl",
    "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "span", "a", "details", "summary", "pre",
    *(SVG + name for name in ("svg", "title", "defs", "pattern", "path", "g", "rect", "line", "text", "a", "polyline")),
}  # fmt: skip


class TestHostileText:
    @pytest.mark.parametrize("word", HOSTILE)
    def test_text_from_outside_adds_no_element_no_handler_and_no_address(self, tmp_path: Path, word: str) -> None:
        _, page, _ = pages_of(make_hostile_run(tmp_path / "run", [word, "x", word, word]))
        for element in page.iter():
            assert element.tag in KNOWN_ELEMENTS
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on")
                assert name != "src"
                if name == "href":
                    assert re.fullmatch(r"attempts/[A-Za-z0-9._~%+-]+/\d+/agent\.log", value)

    def test_it_is_shown_as_it_is(self, tmp_path: Path) -> None:
        _, page, _ = pages_of(make_hostile_run(tmp_path / "run", HOSTILE[:6]))
        said = text_of(page)
        for word in HOSTILE[:6:2]:
            assert word in said

    def test_nothing_in_the_files_is_a_control_character(self, tmp_path: Path) -> None:
        run = make_hostile_run(tmp_path / "run", [HOSTILE[6]] * 4)
        derive(run)
        for name in ("report.html", "report.md"):
            text = (run.path / name).read_text()
            assert all(char.isprintable() or char == "\n" for char in text)
            assert "\u241b]0;owned\u2407" in text.replace("\\]", "]")

    @pytest.mark.parametrize("word", HOSTILE)
    def test_markdown_has_no_html_no_image_and_no_link_of_theirs(self, tmp_path: Path, word: str) -> None:
        _, _, text = pages_of(make_hostile_run(tmp_path / "run", [word, "x", word, word]))
        # Links are written with angle brackets around their destination; a backslash makes the next character text.
        bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", text)
        destinations = re.findall(r"\]\(<?([^)>]*)>?\)", bare)
        assert destinations
        assert all(one == "report.html" or one.startswith("attempts/") for one in destinations)
        without_links = re.sub(r"\]\(<[^>]*>\)", "]", bare)
        assert not set("<>`&") & set(without_links)
        assert "![" not in bare

    def test_a_line_of_a_table_stays_a_line(self, tmp_path: Path) -> None:
        _, _, text = pages_of(make_hostile_run(tmp_path / "run", ["a\n| b | c |\r\n# d", "x"]))
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows
        assert not [line for line in text.splitlines() if line.startswith("# d")]

    def test_no_script_and_nothing_from_elsewhere_would_run_even_so(self, tmp_path: Path) -> None:
        _, page, _ = pages_of(make_hostile_run(tmp_path / "run", HOSTILE))
        policy = next(one.get("content") for one in page.iter("meta") if one.get("http-equiv"))
        assert policy is not None
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        sheet = next(page.iter("style")).text or ""
        assert "url(" not in sheet
        assert "@import" not in sheet

    @given(st.text())
    def test_what_is_escaped_is_read_back_as_what_is_shown(self, text: str) -> None:
        element = ElementTree.fromstring(tag("p", text, title=text))  # noqa: S314 - of our own making
        assert (element.text or "") == visible(text) == element.get("title")

    @given(st.text(max_size=60), st.integers(1, 30))
    def test_a_shortened_text_is_no_longer_than_asked(self, text: str, length: int) -> None:
        assert len(shorten(text, length)) <= max(length, 1)
        assert shorten(text, len(text)) == text

    def test_markup_is_not_escaped_twice(self) -> None:
        assert escape(tag("b", "<")) == "<b>&lt;</b>"


class TestBounds:
    def test_ten_thousand_attempts_on_four_hundred_slots_make_a_small_page(self, wide: RunDir) -> None:
        report, page, _ = pages_of(wide)
        assert sum(report.attempts.values()) == 10_000
        assert (wide.path / "report.html").stat().st_size < 1_000_000
        assert (wide.path / "report.md").stat().st_size < 100_000
        said = text_of(page)
        assert re.search(r"6\d of 400 slots are shown", said)
        assert "where several fall into one, the one that failed is shown" in said
        assert "80 nodes that lost fewer left out" in said

    def test_a_page_of_many_attempts_has_hardly_more_elements_than_one_of_few(self, run: RunDir, wide: RunDir) -> None:
        few, many = (sum(1 for _ in pages_of(one)[1].iter()) for one in (run, wide))
        assert many < few + 1500

    def test_an_error_of_its_own_for_each_attempt_leaves_the_rest_out_and_says_so(self, tmp_path: Path) -> None:
        made = Generator(tmp_path / "run", 500)
        made.begin_pilot("p", BEGAN_S)
        with (made.run.pilot_dir("p") / "records.jsonl").open("w") as file:
            for n in range(500):
                task = f"astropy__astropy-{n}"
                made.claim(task, "p")
                record = made.record(task, "p", 0, BEGAN_S + n, "agent", "n01")
                file.write(record.model_copy(update={"error": "x" * 5000 + f"\nError {n}"}).model_dump_json() + "\n")
        _, page, _ = pages_of(made.run)
        assert "494 further kinds of error in 494 attempts" in text_of(page)
        assert (made.run.path / "report.html").stat().st_size < 300_000

    def test_a_run_without_an_attempt_has_its_pages(self, tmp_path: Path) -> None:
        _, page, text = pages_of(Generator(tmp_path / "run", 5).run)
        assert "No pilot has begun." in text_of(page)
        assert "5 waiting" in text

    def test_a_run_without_a_task_has_its_pages(self, tmp_path: Path) -> None:
        _, page, text = pages_of(Generator(tmp_path / "run", 0).run)
        assert "There are no tasks." in text_of(page)
        assert "There are no tasks." in text

    @given(
        st.lists(
            st.tuples(
                st.sampled_from([None, *FAILURE_CLASSES]),
                st.integers(0, 3),
                st.floats(0, 4e9),
                st.floats(0, 1e7),
                st.one_of(st.none(), st.floats(0, 1e6)),
                st.dictionaries(st.sampled_from(["image", "launch", "wait", "connect", "start"]), st.floats(0, 1e6)),
                st.dictionaries(st.sampled_from(["memory_bytes", "disk_bytes"]), st.integers(0, 2**50)),
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_whatever_was_measured_the_page_is_well_formed(self, measured: list[tuple]) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            made = Generator(Path(directory, "run"), len(measured))
            made.begin_pilot("p", 1.0)
            with (made.run.pilot_dir("p") / "records.jsonl").open("w") as file:
                for n, (failure, slot, began_s, took_s, agent_s, phases, peaks) in enumerate(measured):
                    made.claim(f"astropy__astropy-{n}", "p")
                    record = AttemptRecord(
                        task=f"astropy__astropy-{n}",
                        attempt=1,
                        status="failed" if failure else "done",
                        failure_class=failure,
                        pilot="p",
                        slot=slot,
                        started_at=began_s,
                        duration_s=took_s,
                        agent_s=agent_s,
                        phases_s=phases,
                        peaks=peaks,
                    )
                    file.write(record.model_dump_json() + "\n")
            state = RunReader(made.run).read()
            page = html.page(make_report(state), state, made.run.read_run())
        assert not re.search(r"\b(nan|inf)\b", page.partition("</style>")[2], re.IGNORECASE)
        for drawing in parse(page).iter(f"{SVG}svg"):
            for shape in drawing.iter(f"{SVG}rect"):
                assert float(shape.get("width", "0")) >= 0
                assert float(shape.get("height", "0")) >= 0


class TestColours:
    def test_every_outcome_and_every_phase_has_one_in_light_and_in_dark(self) -> None:
        sheet = style.sheet()
        for name in [f"o-{one}" for one in measures.OUTCOMES] + [f"p-{one}" for one in measures.PHASES]:
            assert f".{name} {{ fill: var(" in sheet
        for variable in set(re.findall(r"var\((--[a-z_-]+)\)", sheet)):
            assert sheet.count(f"{variable}:") == 2

    def test_a_class_that_nobody_knows_is_drawn_as_lost(self) -> None:
        assert charts.style_of('quux" onload=x') == "o-lost"

    @pytest.mark.parametrize("colours", [style._LIGHT, style._DARK])
    def test_text_is_legible_on_what_is_behind_it(self, colours: dict[str, str]) -> None:
        for ink in ("ink", "soft", "link", "good", "bad"):
            for paper in ("paper", "panel"):
                assert contrast(colours[ink], colours[paper]) >= 4.5

    @pytest.mark.parametrize("colours", [style._LIGHT, style._DARK])
    def test_what_is_done_is_told_from_every_failure_with_no_red_or_no_green(self, colours: dict[str, str]) -> None:
        for name in FAILURE_CLASSES:
            for lacking in (PROTANOPIA, DEUTERANOPIA):
                assert distance(colours["done"], colours[name], lacking) > 20, name

    @pytest.mark.parametrize("colours", [style._LIGHT, style._DARK])
    def test_failure_classes_are_told_from_one_another_likewise(self, colours: dict[str, str]) -> None:
        for one, other in itertools.combinations(FAILURE_CLASSES, 2):
            for lacking in (PROTANOPIA, DEUTERANOPIA):
                assert distance(colours[one], colours[other], lacking) > 10, (one, other)


# Viénot, Brettel, Mollon 1999, as one matrix on linear RGB.
PROTANOPIA = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
DEUTERANOPIA = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))


def linear(colour: str) -> list[float]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio."""
    lights = sorted(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True)) for x in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def lab(colour: str, seen: Sequence[Sequence[float]]) -> list[float]:
    """CIE L*a*b* (D65) of a colour as it is seen through this matrix."""
    rgb = [max(0.0, sum(a * b for a, b in zip(row, linear(colour), strict=True))) for row in seen]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in to_xyz]
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (one / white for one, white in zip(xyz, (0.9505, 1.0, 1.089), strict=True))
    )
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def distance(one: str, other: str, seen: Sequence[Sequence[float]]) -> float:
    return sum((a - b) ** 2 for a, b in zip(lab(one, seen), lab(other, seen), strict=True)) ** 0.5


@pytest.mark.parametrize(
    ("said", "expected"),
    [(words.seconds(0.351), "0.35 s"), (words.seconds(90), "90 s"), (words.seconds(600), "10.0 min"), (words.seconds(7560), "2.1 h"),
     (words.share(1, 3), "33.3 %"), (words.share(1, 1_000_000), "< 0.1 %"), (words.share(999_999, 1_000_000), "> 99.9 %"), (words.share(0, 0), "\u2013"),
     (words.size(4 * 1024**3), "4 GiB"), (words.size(1.5 * 1024**2), "1.5 MiB"), (words.count(1, "task"), "1 task"), (words.count(12000, "task"), "12,000 tasks")],
)  # fmt: skip
def test_quantities_are_written_for_people(said: str, expected: str) -> None:
    assert said == expected
