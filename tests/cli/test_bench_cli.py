"""`bench`, `report` and `compare` as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from factpatch.bench import Store
from factpatch.data import write_jsonl
from factpatch.report import table_rows
from tests.bench.test_run import TIMES, facts, plain
from tests.cli.conftest import run
from tests.endpoint import Endpoint, serving

FT = ["--method", "ft-m", "--set", "ft-m.steps=2", "--set", "ft-m.layer=1"]


@pytest.fixture
def data(tmp_path):
    write_jsonl(facts(10), tmp_path / "ten.jsonl")
    return tmp_path / "ten.jsonl"


def without_times(rows):
    return [plain({key: value for key, value in row.items() if key not in TIMES}) for row in rows]


def test_a_benchmark_from_plan_to_page(model, data, tmp_path):
    common = ["bench", "-m", model, *FT, "--method", "ice", "--data", data, "--no-fluency", "--out", tmp_path / "run"]
    code, out, _ = run(*common, "--limit", "2", "--plan")
    assert code == 0
    assert "4 patches to make" in out
    code, out, _ = run(*common, "--limit", "2", "--plan", "--json")
    assert [(cell["method"], cell["patches"], cell["done"]) for cell in json.loads(out)["cells"]] == [
        ("ft-m", 2, 0), ("ice", 2, 0),
    ]  # fmt: skip
    code, out, _ = run(*common, "--limit", "2")
    assert code == 0
    assert "own, open protocol" in out
    assert "factpatch report" in out
    code, out, _ = run(*common, "--json")
    rows = json.loads(out)
    assert {(row["method"], row["edits"]) for row in rows} == {("unedited", 10), ("ft-m", 10), ("ice", 10)}
    assert next(row for row in rows if row["method"] == "ft-m")["settings"] == {"steps": 2, "layer": 1}

    code, out, _ = run("report", tmp_path / "run")
    assert code == 0
    assert "survey protocol" in out
    for name in ("page.html", "page.md", "page.tex", "page.csv", "page.json"):
        assert run("report", tmp_path / "run", "--out", tmp_path / name)[0] == 0
        assert (tmp_path / name).stat().st_size > 500
    code, out, _ = run("report", tmp_path / "run", "--format", "json")
    assert json.loads(out) == rows
    assert json.loads(run("report", tmp_path / "run", "--json")[1]) == rows
    assert run("report", tmp_path / "run", "--json", "--format", "md")[0] == 2
    assert run("report", tmp_path / "run", "--out", tmp_path / "page.xyz")[0] == 2


def test_a_range_on_the_command_line_goes_before_a_files_own(model, data, tmp_path):
    (tmp_path / "grid.yaml").write_text(
        f"methods: [ice]\nmodel: {model}\ndata: [{{file: '{data}', start: 1, limit: 4}}]\n"
    )
    plan = ["bench", "--grid", tmp_path / "grid.yaml", "--out", tmp_path / "run", "--plan", "--json"]
    for words, edits in (([], 4), (["--limit", "2"], 2), (["--start", "9"], 1)):
        (cell,) = json.loads(run(*plan, *words)[1])["cells"]
        assert cell["edits"] == edits


def test_questions_that_must_not_change_are_listed_with_both_answers(model, data, tmp_path):
    (tmp_path / "keep.txt").write_text("Rome 0 lies in\nUlm is a\n")
    common = ["bench", "-m", model, "--method", "ft-m", "--set", "ft-m.lr=1e-2", "--data", data, "--limit", "2"]
    kept = ["--no-fluency", "--retain", tmp_path / "keep.txt", "--out", tmp_path / "run"]
    code, out, _ = run(*common, *kept)
    assert code == 0
    assert "questions to be answered as before" in out
    (row,) = [r for r in json.loads(run(*common, *kept, "--json")[1]) if r["retained"]]
    assert (row["method"], row["protocol"], row["retained"]["asked"]) == ("ft-m", "open", 4)
    assert row["retained"]["changed"] > 0
    for name in ("page.html", "page.md"):
        assert run("report", tmp_path / "run", "--out", tmp_path / name)[0] == 0
        assert "Answers that should not have changed" in (tmp_path / name).read_text()
    listed = (tmp_path / "page.md").read_text().rpartition("Answers that should not have changed")[2]
    assert listed.count("| ft-m |") == row["retained"]["changed"]
    assert run("report", tmp_path / "run", "--out", tmp_path / "page.csv")[0] == 0
    with Store(tmp_path / "run", make=False) as store:
        (number,) = store.cells()
        asked = store.card(number, "alone").retained
    assert [question.prompt for question in asked] == ["Rome 0 lies in", "Ulm is a"] * 2
    assert len({question.edits for question in asked}) == 2

    (tmp_path / "keep.txt").write_text("Rome 1 lies in\n")
    assert "2 patches to make" in run(*common, *kept, "--plan")[1], "other questions, other results"


def test_a_judge_is_asked_about_free_answers(model, data, tmp_path):
    class Mild(Endpoint):
        def say(self, text):
            return "yes"

    with serving(Mild) as (url, _):
        judged = ["--judge", "openai:mild", "--judge-url", url, "-m", model, "--data", data, "--limit", "2"]
        code, out, _ = run("bench", *judged, *FT, "--no-fluency", "--out", tmp_path / "run", "--json")
        assert code == 0
        assert [row["measures"].get("edit/judged") for row in json.loads(out)] == [None, 1.0, None, None]
        code, out, _ = run("score", *judged, "--json")
    assert code == 0
    assert json.loads(out)[0]["measures"]["edit/judged"] == 1.0


def test_runs_are_compared(model, data, tmp_path):
    for name, steps in (("a", 1), ("b", 8)):
        settings = ["--set", f"ft-m.steps={steps}", "--set", "ft-m.lr=1e-2"]
        arguments = ["-m", model, "--method", "ft-m", *settings, "--data", data, "--limit", "4", "--no-fluency"]
        assert run("bench", *arguments, "--out", tmp_path / name)[0] == 0
    code, out, _ = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0
    found = {(row["protocol"], row["score"]): row for row in json.loads(out)}
    assert found["survey", "edit_success"]["edits"] == 4
    assert found["survey", "edit_success"]["mean"] > 0
    code, out, _ = run("compare", tmp_path / "a", tmp_path / "b", "--protocol", "open")
    assert code == 0
    assert "survey" not in out
    assert run("bench", "-m", model, "--method", "ice", "--data", data, "--limit", "1", "--out", tmp_path / "c")[0] == 0
    code, out, _ = run("compare", tmp_path / "a", tmp_path / "c")
    assert code == 1
    assert "share no method" in out
    code, out, _ = run("compare", tmp_path / "a", tmp_path / "c", "--json")
    assert (code, json.loads(out)) == (1, [])


def test_a_grid_file_and_what_is_said_beside_it(model, data, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"model: {model}\nmethods: [ice]\ndata: [{data}]\nlimit: 4\nfluency: false\n")
    code, out, _ = run("bench", "--grid", grid, "--limit", "1", "--out", tmp_path / "run", "--json")
    assert code == 0
    assert {row["edits"] for row in json.loads(out)} == {1}


def test_a_method_that_fails_makes_the_exit_code_1(model, data, tmp_path):
    arguments = ["bench", "-m", model, "--method", "ice", "--method", "rome", "--set", "rome.layer=77", "--data", data]
    code, out, err = run(*arguments, "--limit", "1", "--no-fluency", "--out", tmp_path / "run")
    assert code == 1
    assert "failed: rome on own" in err
    assert "ice" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--method", "ice"], "at least one of each"),
        (["--method", "ice", "--data", "sample", "--set", "layer=3"], "METHOD.KEY=VALUE"),
        (["--method", "ice", "--data", "sample", "--set", "rome.layer=3"], "METHOD.KEY=VALUE"),
        (["--method", "ice", "--data", "sample", "--mode", "batch"], "batch:K"),
        (["--method", "ice", "--data", "sample", "--workers", "2"], "--engine ray"),
        (["--method", "ice", "--data", "no.jsonl"], "no such file"),
        (["--grid", "no.yaml"], "no such file"),
    ],
)
def test_bad_input_leaves_nothing_behind(model, tmp_path, arguments, problem):
    code, _, message = run("bench", "-m", model, *arguments, "--out", tmp_path / "run")
    assert code == 2
    assert problem in message
    assert not (tmp_path / "run").exists()


def test_reports_need_results(tmp_path):
    for command in (["report", tmp_path], ["compare", tmp_path, tmp_path]):
        code, _, message = run(*command)
        assert code == 2
        assert "holds no results" in message


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_ray_cluster_gives_the_same_and_survives_a_dead_worker(model, data, tmp_path, mode):
    pytest.importorskip("ray")
    more = ["--mode", mode, "--limit", "10"]
    common = ["bench", "-m", model, *FT, "--method", "grace", "--data", str(data), "--no-fluency", *more]
    assert run(*common, "--out", tmp_path / "local")[0] == 0
    command = [sys.executable, "-c", "from factpatch.cli import main; main()", *common]
    command += ["--engine", "ray", "--workers", "2", "--out", str(tmp_path / "ray")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        killed = kill_a_worker(driver)
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert killed
    with Store(tmp_path / "local", make=False) as local, Store(tmp_path / "ray", make=False) as ray:
        assert without_times(table_rows(ray)) == without_times(table_rows(local))


def kill_a_worker(driver):
    """Kill the first worker that is seen at work; whether one was."""
    while driver.poll() is None:
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                is_working = process.cmdline()[:1] == ["ray::_Hand.do"]
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if is_working:
                os.kill(process.pid, signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False


def test_the_guard_lists_what_changed(model, facts, tmp_path):
    strong = ["--set", "steps=40", "--set", "lr=1e-1", "--set", "layer=1"]
    code, _, _ = run("edit", "-m", model, "--method", "ft-m", *strong, "--edits", facts, "--out", tmp_path / "p")
    assert code in {0, 1}
    (tmp_path / "kept.txt").write_text("Rome lies in\n")
    command = ["guard", "-m", model, "--patch", tmp_path / "p", "--retain", tmp_path / "kept.txt"]
    code, out, _ = run(*command)
    assert code == 1
    assert "1 of 1 answers changed" in out
    code, out, _ = run(*command, "--json")
    found = json.loads(out)
    assert (code, found["asked"], found["changed"], found["lost"]) == (1, 1, 1, 0)
    code, out, _ = run("guard", "-m", model, "--patch", tmp_path / "p")
    assert code == 0, "a random model is right about nothing, so that nothing is lost"
    assert "of 36 answers changed" in out
    assert run("guard", "-m", model, "--patch", tmp_path / "p", "--retain", "none.txt")[0] == 2
