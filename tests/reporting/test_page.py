"""The page of a run: what it says, that it says it of any folder, and how a browser shows it."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from browser import look

from stablelm_jax import config as config_lib
from stablelm_jax import report
from stablelm_jax.planning.report import run_hours
from stablelm_jax.planning.targets import parse_target
from stablelm_jax.reporting.charts import Axis, Curve, chart, short, thinned
from stablelm_jax.reporting.compare import Comparison, Cost, Difference, Evaluated, Worth
from stablelm_jax.reporting.curves import Points
from stablelm_jax.reporting.page import write_page
from stablelm_jax.reporting.paired import Interval

ROOT = Path(__file__).parents[2]
EVIL = "<script>document.title = 'gone'</script><img src=x onerror=alert(1)>\"'&"
BEGAN = 1_764_000_000.0  # 2025-11-24T16:00:00Z


def metrics(steps, sources, every=1, start=BEGAN):
    """Lines of a run that learns; held-out text at every fifth of it."""
    rng = np.random.default_rng(0)
    for step in range(steps + 1):
        time, loss = start + 60 * step, 2 + 6 * math.exp(-5 * step / steps)
        if step % max(1, steps // 5) == 0:
            line = {"step": step * every, "time": time, "eval/loss": loss, "eval/loss_stderr": 0.1}
            for i, name in enumerate(sources):
                line |= {f"eval/loss/{name}": loss + i / 20, f"eval/loss_stderr/{name}": 0.2}
                line[f"eval/bits_per_byte/{name}"] = loss / 4
            for i, name in enumerate(("de", "en", "es")):
                line[f"eval/bits_per_byte/language/{name}"] = loss / 4 + i / 10
            yield line | {"eval/tasks/arc_challenge/acc_norm": 0.25 + step / steps / 10}
        if step:
            line = {"step": step * every, "time": time, "loss": loss + 0.1 * rng.normal()}
            for i, name in enumerate(sources):
                line |= {f"loss/{name}": loss + 0.3 * rng.normal(), f"tokens/{name}": 512.0 * step}
                line[f"epochs/{name}"] = step * (i + 1) / steps
            line |= {"grad_norm/layer0": 0.5, "grad_norm/layer1": 0.7, "seconds/step": 40.0 * step}
            line |= {"learning_rate": 1e-3 / step, "grad_norm": 1.0 + 9 / step, "param_norm": 80.0}
            line |= {"tokens_per_second": 1000.0, "mfu": None, "data_wait_seconds": 1e-3}
            yield line | {"seconds/data_wait": 2.0 * step, "tokens_seen": 4096 * step}


def write_run(folder, lines, config=None, events=(), samples=(), devices=("cpu",)):
    """A run folder as `train` leaves it, without checkpoints."""
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for step, text in dict(samples).items():
        (folder / f"samples/global_step{step}.txt").write_text(text)
    tree = {"name": "a run", "training": {"num_steps": 40}, **(config or {})}
    settings = {"config": tree, "set_by": {"name": "file", "training.num_steps": "command line"}}
    (folder / "config.json").write_text(json.dumps(settings))
    starts = [{"time": t, "host": "h", "num_devices": 8, "devices": devices} for t in STARTS]
    (folder / "environment.json").write_text(json.dumps(starts))
    return folder


STARTS = ("2025-11-24T16:00:00Z", "2025-11-24T16:30:00Z")
PROMPTS = {"samples": {"prompts": ["One,", "Two,"]}}
SAMPLES = {20: "note\n\n[One,] then two.\n\n[Two,] then\n\nthree.\n", 40: "note\n\n[One,] and\n"}
EVENT = {"time": BEGAN + 100, "event": "stopped", "text": "stopped by SIGTERM"}


class Texts(HTMLParser):
    """Every tag of a page, and its text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def shown(folders, path, **more):
    write_page(folders, path, **more)
    return Texts(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    lines = [*metrics(20, ["books", "code"]), *list(metrics(40, ["books", "code"]))[25:]]
    folder = tmp_path_factory.mktemp("runs") / "first"
    return write_run(folder, lines, PROMPTS, [EVENT], SAMPLES)


def test_a_page_says_what_the_folder_holds(run_folder, tmp_path):
    found = shown([run_folder], tmp_path / "p.html")
    for text in ("a run", "40 of 40", "stopped by SIGTERM", "bits a byte", "Norm of the gradient"):
        assert text in found.text
    assert "training.num_steps" in found.text and "command line" in found.text
    assert "and then two." not in found.text and " then two." in found.text
    assert "43.43" in found.text  # published of arc_challenge, in percent
    assert "Model FLOPs" not in found.text  # null in every line
    assert "8 x cpu" in found.text and "nothing is known" in found.text
    places = [tag for tag, attributes in found.tags if {"src", "href"} & attributes.keys()]
    assert not places  # it needs nothing from elsewhere


def test_nothing_that_a_run_wrote_becomes_part_of_the_page(tmp_path):
    source = "books" + EVIL
    folder = write_run(
        tmp_path / EVIL.replace("/", ""),
        metrics(4, [source]),
        {"name": EVIL, "samples": {"prompts": [EVIL]}, EVIL: {"x": EVIL}},
        [
            {"time": BEGAN, "event": EVIL, "text": EVIL},
            {"time": BEGAN, "event": 3, "text": ["\ud800"]},
        ],
        {4: f"{EVIL}\n\n[{EVIL}] {EVIL}\n"},
        devices=(EVIL,),
    )
    found = shown([folder], tmp_path / "p.html")
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert found.text.count(EVIL) >= 7


def damaged(folder, name, content):
    write_run(folder, metrics(6, ["books"]), PROMPTS, [EVENT], SAMPLES)
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1, 2]", b"\0" * 50, b'{"time": NaN}\n', b"\xff"]
)
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "events.jsonl",
        "config.json",
        "environment.json",
        "samples/global_step20.txt",
    ],
)
def test_a_file_that_is_missing_or_damaged_leaves_a_page_of_the_others(tmp_path, name, content):
    found = shown([damaged(tmp_path / "run", name, content)], tmp_path / "p.html")
    assert "Settings" in found.text
    assert ("Loss" in found.text) == (name != "metrics.jsonl")


def test_lines_without_numbers_still_make_a_page(tmp_path):
    nothing = {"step": 3, "time": BEGAN, "loss": None, "eval/loss": None, "loss/books": None}
    folder = write_run(tmp_path / "run", [nothing, {"step": 4, "loss": 2.0}, {"step": 5}])
    assert "a run" in shown([folder], tmp_path / "p.html").text


def test_a_folder_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"name the --workdir of a training"):
        write_page([tmp_path], tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_runs_of_preferences_show_rewards_and_no_bits(tmp_path):
    key = "rewards/accuracy"
    lines = [{"step": 1, "loss": 0.7, key: 0.4, "rewards/chosen": 0.1, "rewards/margin": 0.2}]
    lines.append({"step": 1, "eval/loss": 0.6, f"eval/{key}": 0.83, f"eval/{key}/pairs": 0.83})
    found = shown([write_run(tmp_path / "dpo", lines)], tmp_path / "p.html").text
    assert "Chosen answer preferred" in found and "0.83" in found and "nats a pair" in found
    assert "Bits a byte" not in found


def test_several_runs_lie_over_one_another(run_folder, tmp_path):
    other = write_run(tmp_path / "second", metrics(40, ["books"]), PROMPTS)
    found = shown([run_folder, other], tmp_path / "p.html")
    names = [a["data-name"] for tag, a in found.tags if tag == "polyline" and "data-name" in a]
    assert names.count("first") == names.count("second") + 1  # of one source the other has nothing
    assert "Sources of second" in found.text


def test_the_verb_writes_the_page_of_one_run_beside_it_and_of_two_with_their_comparison(
    run_folder, tmp_path, capsys
):
    folder = shutil.copytree(run_folder, tmp_path / "first")
    assert report.main([str(folder)]) == 0
    assert f"page: {folder}/report.html" in capsys.readouterr().out
    assert "Loss" in (folder / "report.html").read_text()
    other = write_run(tmp_path / "second", metrics(40, ["books"]), {"seed": 7})
    out = tmp_path / "both.html"
    assert report.main([str(folder), str(other), "--output", str(out)]) == 0
    found = Texts(out.read_text()).text
    assert f"{other} compared with {folder}" in found and "Settings that differ" in found


@pytest.mark.parametrize(
    "arguments, code, error",
    [
        (["{run}", "--json", "x"], 2, "--last, --json and --fit: name two"),
        (["{run}", "--output", "{tmp}/none/p.html"], 1, "make its folder, or name another"),
        (["{tmp}/none"], 1, "no such folder"),
        (["{tmp}"], 1, "name the --workdir of a training"),
        (["gs://bucket/run"], 1, "write --output FILE.html, of this machine"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_line(
    run_folder, tmp_path, capsys, arguments, code, error
):
    given = [text.format(run=run_folder, tmp=tmp_path) for text in arguments]
    try:
        assert report.main(given) == code
    except SystemExit as left:
        assert left.code == code
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_a_comparison_is_told_in_the_words_of_the_terminal(run_folder, tmp_path):
    row = Difference(3.0, 2.5, Interval(-0.5, -0.75, -0.25), 40)
    evaluated = Evaluated(40, 40, 1e6, 1e6, {"all": row, EVIL: row})
    worth = Worth(2e6, 1.5e6, 3e6, 1e5, 4e6, 1e7)
    cost = Cost(40, 1e6, 1e3, 1.0, 8.0, 1.0)
    notes, changes = [f"of {EVIL}"], {"schedule.peak": [1.0, EVIL]}
    found = Comparison("a", "b", notes, changes, None, evaluated, worth, (cost, cost))
    text = shown([run_folder], tmp_path / "p.html", comparisons=[found]).text
    for part in ("B is better than A, by 0.5000", "-0.7500 to -0.2500", "2e+06 tokens", "of <scri"):
        assert part in text
    assert text.count(EVIL) == 3


def test_a_known_chip_gets_energy_beside_what_plan_foretells(tmp_path):
    """8 devices for 3,600 s in all: 8 device-hours at 700 W, and 10 % for cooling."""
    config = config_lib.to_dict(config_lib.load(ROOT / "configs/recipe_150m.py:web"))
    times = [BEGAN, BEGAN + 1200, BEGAN + 1800, BEGAN + 4200]  # the second start after 1,800 s
    lines = [{"step": i, "time": time, "loss": 3.0} for i, time in enumerate(times)]
    chip = ("NVIDIA H100 80GB HBM3",)
    folder = write_run(tmp_path / "run", lines, config, devices=chip)
    found = shown([folder], tmp_path / "p.html").text
    assert re.search(r"device-hours\s*8\s", found), found
    assert "6.2 kWh" in found and "2.4 kg" in found  # 8 x 0.7 x 1.1, x 0.385
    foretold = run_hours(config_lib.from_dict(config), parse_target("h100:1x8"), 0.45)[1]
    assert short(foretold) in found


def test_curves_keep_their_mean_and_extremes_in_few_points():
    rng = np.random.default_rng(0)
    steps, values = np.arange(10, 100_010, 10.0), rng.normal(size=10_000)
    at, mean, low, high = thinned(Points(steps, values))
    assert len(at) <= 240 and low.min() == values.min() and high.max() == values.max()
    np.testing.assert_allclose(mean.mean(), values.mean(), atol=2e-3)
    np.testing.assert_allclose(at, 10 * np.round(at / 10), atol=5)


@pytest.mark.parametrize("log", [False, True])
def test_a_point_lies_where_its_numbers_say(log):
    points = Points(np.array([0.0, 50, 100]), np.array([1.0, 10.0, 100.0]))
    found = chart("t", "", [Curve("c", points, points)], log=log)
    x, y = found["x"], found["y"]
    drawn = [tuple(map(float, p.split(","))) for p in found["curves"][0]["line"].split()]
    for (across, place), step, value in zip(drawn, *points):
        assert x.low + across / 1000 * (x.high - x.low) == pytest.approx(step, abs=0.06)
        share = 1 - place / 1000
        read = y.low * (y.high / y.low) ** share if log else y.low + share * (y.high - y.low)
        assert read == pytest.approx(value, rel=2e-3, abs=0.02)
    assert x.ticks(6)[0][1] == "0" and len(found["curves"][0]["dots"]) == 3


def test_an_axis_leaves_out_the_first_steps_and_says_round_numbers():
    values = np.concatenate([[1e6], np.linspace(3, 2, 999)])
    found = chart("t", "", [Curve("c", Points(np.arange(1000.0), values))])
    assert found["y"].high < 4 and [text for _, text in found["y_ticks"]][0] == "2"
    assert [text for _, text in Axis(0.5, 2000, "log").ticks(5)] == ["1", "10", "100", "1,000"]
    assert [text for _, text in Axis(144.41, 144.56).ticks(3)] == ["144.45", "144.5", "144.55"]
    numbers = {"": None, "0.00125": 0.00125, "1,234": 1234.4, "12.34k": 12341.0, "2.5T": 2.5e12}
    assert [short(number) for number in (math.nan, *numbers.values())] == ["", *numbers]


def test_a_long_run_of_28_sources_stays_below_a_megabyte(tmp_path):
    lines = list(metrics(1500, [f"source_number_{i}" for i in range(28)], every=70))
    evaluation = {key: v for key, v in lines[0].items()}
    lines += [evaluation | {"step": step} for step in range(0, 105_000, 1000)]
    folder = write_run(tmp_path / "run", sorted(lines, key=lambda line: line["step"]))
    write_page([folder], tmp_path / "p.html")
    assert (tmp_path / "p.html").stat().st_size < 1e6


WIDE = """(() => {
  const plot = document.querySelector(".plot");
  const area = plot.querySelector("svg").getBoundingClientRect();
  const place = {clientX: area.left + area.width / 2, clientY: area.top + 5, bubbles: true};
  plot.dispatchEvent(new PointerEvent("pointermove", place));
  return {inner: innerWidth, page: document.documentElement.scrollWidth,
          says: plot.querySelector("output").textContent, title: document.title,
          dark: getComputedStyle(document.body).backgroundColor};
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(390, True), (1280, False)])
def test_a_browser_shows_a_page_without_complaint_at_the_width_of_a_phone_and_of_a_desk(
    width, dark, tmp_path
):
    """Several runs, long names, hostile text: nothing is wider than the window."""
    names = [f"source_number_{i}" for i in range(27)] + ["x" * 90 + EVIL]
    folders = [
        write_run(tmp_path / name, metrics(60, names), PROMPTS, [EVENT] * 3, SAMPLES)
        for name in ("a", "b" * 60)
    ]
    write_page(folders, tmp_path / "p.html")
    picture = tmp_path / "shot.png"
    found = look(tmp_path / "p.html", WIDE, picture, width, dark)
    assert found["inner"] == width and found["page"] <= width
    assert found["title"].startswith("a and b") and re.match(r"step \d+", found["says"])
    assert (found["dark"] == "rgb(255, 255, 255)") != dark
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    for part in np.array_split(pixels[..., :3], 3):  # there is something everywhere
        assert part.std() > 0.02
