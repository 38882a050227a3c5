"""``eval``: generated items, how answers are judged, what is chance, and the command on the demo."""

import json
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from text_task import write_text_task

from glm4_runtime import Session
from glm4_runtime.errors import GateError, Glm4Error, RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

pytest.importorskip("lm_eval", reason="needs the extra eval")

from benchmarks.noise import noisy_copy
from glm4_deploy.cli import cli
from glm4_deploy.evaluate import answers
from glm4_deploy.evaluate.gates import parse_gate
from glm4_deploy.evaluate.items import ITEM_KINDS, is_held_out, items
from glm4_deploy.evaluate.items.order import PERSONS
from glm4_deploy.evaluate.statistics import detectable, mcnemar_p, paired_difference, score, sign_flip_p
from glm4_deploy.pipeline import ExportOptions, export

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
HELD_OUT = DEMO.parent / "heldout.txt"


@pytest.fixture(scope="module")
def native_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "bundle"
    export(DEMO, folder, ExportOptions(target="native", precision="fp32", parity=False))
    return folder


# ------------------------------------------------------------------------------------ items


@pytest.mark.parametrize("kind", ITEM_KINDS)
def test_items_depend_on_the_seed_alone(kind):
    one, again, other = (list(islice(items(kind, seed), 50)) for seed in (1, 1, 2))
    assert one == again
    assert len({item.prompt for item in one}) == 50
    assert not {item.prompt for item in one} & {item.prompt for item in other} or kind == "order"


@pytest.mark.parametrize("kind", ITEM_KINDS)
def test_items_for_training_are_never_asked(kind):
    assert all(is_held_out(item) for item in islice(items(kind, 0), 200))
    assert not any(is_held_out(item) for item in islice(items(kind, 0, held_out=False), 200))


@pytest.mark.parametrize("kind", ITEM_KINDS)
def test_there_are_enough_items(kind):
    assert len(list(islice(items(kind, 0), 2000))) == 2000


def test_a_needle_may_stand_anywhere_in_a_text_of_any_length():
    long = next(items("needle", 0, 20_000))
    assert 19_000 < len(long.prompt.split()) < 21_000
    assert long.prompt.count(f"{long.answer}\n") == 1
    places = [item.place for item in islice(items("needle", 0, 200), 300)]
    assert 0.4 < np.mean(places) < 0.6
    assert min(places) < 0.05
    assert max(places) > 0.95


@pytest.mark.parametrize("most", [1, 2, 5])
def test_records_have_one_to_so_many_people(most):
    counts = {
        sum(f"{name} " in f"{item.prompt} " or f"{name}," in item.prompt for name in PERSONS)
        for item in islice(items("records", 0, most), 100)
    }
    assert counts == set(range(1, most + 1))


# ---------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1 + 2 = 3. The answer is 3.", True),
        ("3", True),
        ("**The answer is: 3**", True),
        ("The answer is 3. Shall I explain 4 more?", True),
        ("The answer is 1,003.", False),
        ("3 then 4", False),
        ("", False),
        ("none", False),
    ],
)
def test_numbers(text, right):
    assert answers.same_number(text, "1 + 2 = 3. The answer is 3.") == right


def test_numbers_with_separators_are_the_same():
    assert answers.same_number("The answer is 1,234.", "1234")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"a": 1, "b": "x"}', True),
        ('{"b": "x", "a": 1} and more', True),
        ('```json\n{"a": 1, "b": "x"}\n```', True),
        ('{"a": "1", "b": "x"}', False),
        ('{"a": 1, "b": "x"', False),
        ("[" * 100_000, False),
        ("{" * 100_000, False),
        ("", False),
    ],
)
def test_records(text, right):
    assert answers.same_record(text, '{"a": 1, "b": "x"}') == right


SCHEMAS = {
    "pay": {
        "type": "object",
        "properties": {"to": {"type": "string"}, "amount": {"type": "integer"}},
        "required": ["to", "amount"],
    }
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('pay\n{"to": "Ada", "amount": 3}', True),
        ('pay\n{"amount": 3, "to": "Ada"}', True),
        ('{"name": "pay", "arguments": {"to": "Ada", "amount": 3}}', True),
        ('pay\n{"to": "Ada", "amount": "3"}', False),
        ('pay\n{"to": "Ada", "amount": true}', False),
        ('pay\n{"to": "Ada"}', False),
        ('pay\n{"to": "Ada", "amount": 3, "x": 1}', False),
        ('send\n{"to": "Ada", "amount": 3}', False),
        ("pay", False),
    ],
)
def test_calls(text, right):
    assert answers.is_call(text, 'pay\n{"to": "Ada", "amount": 3}', SCHEMAS) == right


# ------------------------------------------------------------------------------- statistics


def test_scores_have_wilsons_interval():
    """Wilson's interval of 8 of 10: 0.490 to 0.943 (Brown, Cai and DasGupta 2001 give the formula)."""
    found = score([1.0] * 8 + [0.0] * 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_mcnemar_counts_only_items_that_differ():
    """Ten lost and two won of any number: the binomial's two-sided p is 2 * (1 + 12 + 66) / 4096."""
    first = [1.0] * 10 + [0.0] * 2 + [1.0] * 500
    second = [0.0] * 10 + [1.0] * 2 + [1.0] * 500
    found = paired_difference(first, second)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert found.test == "McNemar"
    assert found.estimate.value == pytest.approx(-8 / 512)
    assert found.estimate.low < -8 / 512 < found.estimate.high <= 0


def test_equal_answers_and_rounding_are_no_difference():
    assert paired_difference([1.0, 0.0], [1.0, 0.0]).p == 1
    nats = -np.abs(np.random.default_rng(0).normal(3, 1, 200))
    found = paired_difference(nats, nats - 4e-4)
    assert (found.p, found.estimate.value) == (1, 0)


def test_chance_alone_is_called_a_difference_as_often_as_the_level_says():
    chance = np.random.default_rng(0)
    of_answers = of_nats = 0
    for _ in range(200):
        differing = int((chance.random(150) < 0.1).sum())
        lost = int((chance.random(differing) < 0.5).sum())
        of_answers += mcnemar_p(lost, differing - lost) < 0.05
        of_nats += sign_flip_p(0.2 * chance.standard_normal(60)) < 0.05
    assert of_answers <= 10
    assert of_nats <= 18  # 5 % of 200, and three standard deviations


def test_what_is_detectable_is_found_four_times_of_five():
    chance, count, differing = np.random.default_rng(1), 400, 0.1
    least, found = detectable(differing, count), 0
    for _ in range(300):
        drawn = chance.random(count)
        lost = int((drawn < (differing + least) / 2).sum())
        found += mcnemar_p(lost, int((drawn < differing).sum()) - lost) < 0.05
    assert 0.7 < found / 300 < 0.9


# ------------------------------------------------------------------------------------ gates


def test_a_gate_in_words():
    gate = parse_gate(" int8 / gsm8k : -0.5 points at p < 0.05 ", ["fp32", "int8"], ["gsm8k"])
    assert (gate.engine, gate.task, gate.loss, gate.unit, gate.p) == ("int8", "gsm8k", 0.5, "points", 0.05)
    assert parse_gate("*: -0.01 nats at p < .01", ["a", "b"], []).applies_to("b")


def test_a_gate_of_a_group_judges_each_length():
    tasks = ["glm4_needle_40", "glm4_needle_80", "glm4_order"]
    of_group, of_one, of_all = (
        parse_gate(f"b{name}: -1 points at p < 0.05", ["a", "b"], tasks)
        for name in ("/glm4_needle", "/glm4_needle_40", "")
    )
    rows = [*tasks, "all tasks"]
    assert [of_group.judges(row, "all tasks") for row in rows] == [True, True, False, False]
    assert [of_one.judges(row, "all tasks") for row in rows] == [True, False, False, False]
    assert [of_all.judges(row, "all tasks") for row in rows] == [False, False, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int8 -0.5", "has another form"),
        ("int8: 0.5 points at p < 0.05", "has another form"),
        ("int8: -0.5 points at p < 5", "has another form"),
        ("int4: -0.5 points at p < 0.05", "names 'int4'"),
        ("fp32: -0.5 points at p < 0.05", "names 'fp32'"),
        ("int8/mmlu: -0.5 points at p < 0.05", "names the task 'mmlu'"),
    ],
)
def test_gates_that_are_refused(text, said):
    with pytest.raises(RequestError, match=said):
        parse_gate(text, ["fp32", "int8"], ["gsm8k"])


# ---------------------------------------------------------------------------------- command


@pytest.fixture
def run_eval(tmp_path):
    def run(*arguments, output="out"):
        found = CliRunner().invoke(
            cli, ["eval", *map(str, arguments), "--output", str(tmp_path / output)], catch_exceptions=True
        )
        results = tmp_path / output / "results.json"
        return found, json.loads(results.read_text("utf-8")) if results.exists() else None

    return run


SMALL = ("--tasks", "glm4_order,glm4_records", "--items", "12")


def test_bundles_of_equal_quality_show_no_difference(run_eval, demo_bundle, native_bundle):
    found, results = run_eval(
        f"ort={demo_bundle}", f"native={native_bundle}", *SMALL, "--gate", "*: -0.1 points at p < 0.05"
    )
    assert found.exit_code == 0, found.output
    changes = [row for row in results["rows"] if row["engine"] == "native"]
    assert len(changes) == 3  # two tasks and both together
    for row in changes:
        assert row["nats_change"]["p"] > 0.05
        assert not row["lost"]
    assert "passed: native, all tasks" in found.output


@pytest.fixture(scope="module")
def worse_bundle(tmp_path_factory):
    """The demo with noise on the query and gate rows of one layer."""
    folder = tmp_path_factory.mktemp("worse")
    noisy = noisy_copy(DEMO, folder / "checkpoint", layer=1, size=1.0)
    export(noisy, folder / "bundle", ExportOptions(precision="fp32", parity=False))
    return folder / "bundle"


def test_a_worse_bundle_fails_the_gate(run_eval, demo_bundle, worse_bundle, tmp_path):
    task = write_text_task(tmp_path, 40)
    gates = ("--gate", "worse: -0.05 nats at p < 0.05", "--gate", "*/held_out_text: -99 points at p < 0.01")
    found, results = run_eval(demo_bundle, f"worse={worse_bundle}", "--tasks", task, *gates)
    assert isinstance(found.exception, GateError)  # exit code 3
    assert "failed: worse, held_out_text" in found.output
    assert [gate["failed"] for gate in results["gates"]] == [True, False]
    assert results["engines"][0]["where"] == str(demo_bundle)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<svg" in page
    assert "failed" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_an_interrupted_run_continues(run_eval, demo_bundle, monkeypatch):
    """The second run asks only what the first had not been answered."""
    from glm4_deploy.harness.model import BundleModel

    asked = []
    plain = BundleModel._loglikelihood_tokens

    def stopping(self, requests, **options):
        asked.append(len(requests))
        if len(asked) > 1:
            return plain(self, requests, **options)
        plain(self, requests[:10], **options)
        raise Glm4Error("stopped")

    monkeypatch.setattr(BundleModel, "_loglikelihood_tokens", stopping)
    options = ("--tasks", "glm4_order", "--items", "12")
    assert run_eval(demo_bundle, *options)[0].exit_code != 0
    found, results = run_eval(demo_bundle, *options)
    assert found.exit_code == 0, found.output
    assert asked == [60, 50]  # of five choices each
    assert results["engines"][0]["kept_requests"] == 10
    assert run_eval(demo_bundle, *options)[0].exit_code == 0
    assert len(asked) == 2


def test_other_options_do_not_use_kept_answers_of_the_template(run_eval, demo_bundle):
    plain, chat = (run_eval(demo_bundle, *SMALL, *more)[1] for more in ((), ("--chat",)))
    assert plain["items"]["glm4_records"][0]["prompt"] != chat["items"]["glm4_records"][0]["prompt"]
    assert plain["items"]["glm4_records"][0]["sha256"] == chat["items"]["glm4_records"][0]["sha256"]


@pytest.mark.parametrize("options", [(), ("--chat",)])
def test_a_server_and_the_checkpoint_answer_as_the_bundle(run_eval, demo_bundle, monkeypatch, options):
    monkeypatch.setenv("GLM4_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(Session.open(demo_bundle), ServerOptions(port=0, api_keys=("secret",))) as server:
        found, results = run_eval(
            f"bundle={demo_bundle}",
            f"server={server.url}",
            "--reference",
            DEMO,
            "--tasks",
            "glm4_order",
            "--items",
            "8",
            *options,
        )
    assert found.exit_code == 0, found.output
    rows = {row["engine"]: row for row in results["rows"]}
    assert rows["server"]["nats"] == pytest.approx(rows["bundle"]["nats"], abs=1e-3)
    assert rows["reference"]["nats"] == pytest.approx(rows["bundle"]["nats"], abs=1e-3)


def test_a_server_gives_its_own_tokenizer(run_eval, demo_bundle):
    """Without --reference: prompts with the template, answers' tokens and log-probabilities are the bundle's."""
    options = ("--tasks", "glm4_order,glm4_records", "--items", "4", "--chat")
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        found, results = run_eval(demo_bundle, f"server={server.url}", *options)
    assert found.exit_code == 0, found.output
    for task in ("glm4_order", "glm4_records"):
        rows = {row["engine"]: row for row in results["rows"] if row["task"] == task}
        assert rows["server"]["nats"] == pytest.approx(rows["fp32"]["nats"], abs=1e-3)
        assert rows["server"]["tokens"] == rows["fp32"]["tokens"]
        assert rows["server"]["changed"] == 0


def test_a_server_without_a_tokenizer_asks_for_one(run_eval, demo_bundle, monkeypatch):
    from glm4_deploy.evaluate import server_engine

    posted = server_engine.posted
    monkeypatch.setattr(
        server_engine, "posted", lambda url, *rest: posted(url.replace("/tokenize", "/nothing"), *rest)
    )
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        found, _ = run_eval(f"server={server.url}", "--tasks", "glm4_order", "--items", "2")
    assert "add --reference CHECKPOINT" in str(found.exception)


def test_a_checkpoint_that_memory_cannot_hold_is_refused_before_the_work(run_eval, demo_bundle, monkeypatch):
    monkeypatch.setattr("glm4_deploy.evaluate.engines.available_memory", lambda: 10_000_000)
    found, results = run_eval(demo_bundle, "--reference", DEMO, "--items", "2")
    assert "takes 13.0 MiB in float32, and 9.5 MiB of memory are available" in str(found.exception)
    assert results is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task: held_out_text": "task: ["}, "ParserError"),
        ({"task: held_out_text": "other: x"}, "Unknown config shape"),
        ({"{{after}}": "{{missing}}"}, "'missing' is undefined"),
        ({"{{after}}": "{{after"}, "TemplateSyntaxError"),
        ({"type: loglikelihood": "type: nonsense"}, "invalid output_type"),
        ({"text.jsonl": "nothing.jsonl"}, "data of a task cannot be read"),
    ],
)
def test_faults_of_a_task_file_are_one_line_before_the_work(run_eval, demo_bundle, tmp_path, changed, said):
    task = write_text_task(tmp_path, 4)
    for old, new in changed.items():
        assert old in task.read_text("utf-8")
        task.write_text(task.read_text("utf-8").replace(old, new), "utf-8")
    found, results = run_eval(demo_bundle, "--tasks", task)
    assert isinstance(found.exception, RequestError)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)
    assert "ask fp32" not in found.output
    assert results is None


def test_a_gate_that_cannot_be_measured_fails(run_eval, demo_bundle, native_bundle, tmp_path):
    task = write_text_task(tmp_path, 4)
    text = task.read_text("utf-8").replace("type: loglikelihood", "type: loglikelihood_rolling")
    task.write_text(text.replace("metric: acc", "metric: word_perplexity"), "utf-8")
    found, _ = run_eval(
        f"a={demo_bundle}", f"b={native_bundle}", "--tasks", task, "--gate", "*: -1 points at p < 0.05"
    )
    assert isinstance(found.exception, GateError)
    assert "points are not measured by these tasks" in found.output


def test_log_probabilities_that_are_no_numbers_are_an_error(run_eval, demo_bundle, monkeypatch):
    from glm4_deploy.harness.model import BundleModel

    monkeypatch.setattr(
        BundleModel, "_loglikelihood_tokens", lambda _, asked, **__: [(float("nan"), False)] * len(asked)
    )
    found, results = run_eval(demo_bundle, "--tasks", "glm4_order", "--items", "2")
    assert "no numbers" in str(found.exception)
    assert results is None


def test_prompts_that_do_not_fit_are_named(run_eval, demo_bundle):
    found, results = run_eval(demo_bundle, "--tasks", "glm4_needle", "--words", "3000", "--items", "2")
    assert results["warnings"] == [
        "2 of 2 prompts of glm4_needle do not fit into fp32 and lost their beginning"
    ]
    assert f"warning: {results['warnings'][0]}" in found.output


def test_damaged_answers_are_asked_again(run_eval, demo_bundle, tmp_path):
    options = ("--tasks", "glm4_order", "--items", "2")
    _, first = run_eval(demo_bundle, *options)
    (kept,) = (tmp_path / "out" / "answers").iterdir()
    kept.write_bytes(b"x" * 1000)
    found, second = run_eval(demo_bundle, *options)
    assert found.exit_code == 0, found.output
    assert second["engines"][0]["kept_requests"] == 0
    assert second["rows"] == first["rows"]
    assert run_eval(demo_bundle, *options)[1]["engines"][0]["kept_requests"] == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{demo}", "{demo}"], "two engines are called"),
        (["{demo}/nothing"], "is not a bundle"),
        (["{demo}", "--tasks", "glm4_nothing"], "there is no task glm4_nothing"),
        (["{demo}", "--tasks", "nothing.yaml"], "there is no file nothing.yaml"),
        (["{demo}", "--tasks", ","], "at least one name"),
        (["{demo}", "--gate", "x"], "has another form"),
        (["http://127.0.0.1:9"], "start the server first"),
        (["{demo}", "--words", "500,2"], "at least 14"),
        (["{demo}", "--words", "500,500"], "different whole numbers"),
        (["{demo}", "--positions", "512"], "add it to --tasks"),
        (["{demo}", "--tasks", "glm4_positions"], "give --text FILE"),
        (
            ["{demo}", "--tasks", "glm4_positions", "--positions", "4096", "--text", str(HELD_OUT)],
            "room for 2048",
        ),
    ],
)
def test_what_is_refused(run_eval, demo_bundle, arguments, said):
    found, results = run_eval(
        *(text.replace("{demo}", str(demo_bundle)) for text in arguments), "--items", "2"
    )
    assert found.exit_code in (1, 2)
    assert results is None
    words = f"{found.output} {found.exception}"
    assert said in words
    assert len(str(found.exception)) < 500


def test_needles_of_several_lengths_are_a_row_each(run_eval, demo_bundle):
    options = ("--tasks", "glm4_needle", "--words", "16,40", "--items", "3", "--seed", "1")
    found, results = run_eval(f"a={demo_bundle}", *options)
    assert found.exit_code == 0, found.output
    assert [row["task"] for row in results["rows"]] == ["glm4_needle_16", "glm4_needle_40", "all tasks"]
    words = [len(results["items"][f"glm4_needle_{n}"][0]["prompt"].split()) for n in (16, 40)]
    assert words[1] - words[0] == 24  # three lines of eight words more
    assert results["selection"]["words"] == [16, 40]
    single = run_eval(f"a={demo_bundle}", *options, "--words", "40", output="single")[1]
    assert single["items"]["glm4_needle"] == results["items"]["glm4_needle_40"]
