"""Looking at a recording: the figure, the table, the text and the page, for small, large and strange ones."""

import base64
import html.parser
import io
import itertools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import optaxclip as oc
from optaxclip.history._thin import thin

RNG = np.random.default_rng(0)
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a$b$/_c",
    "_hidden",
    "w" * 200,
    "t\x1b[31m\n",
]


def scattered(steps, rows):
    """Ordinary norms, about 1."""
    return np.exp(0.2 * RNG.standard_normal((steps, rows)))


def spiky():
    """All norms are about 1, but for the first group's at updates 50 and 120 and a NaN at 60."""
    norms = scattered(200, 4)
    norms[[50, 120], 0] *= 100
    norms[60, 2] = np.nan
    loss = np.linspace(2, 1, 200)
    return oc.History(["embed/table", "layer/kernel", "layer/bias", "head/kernel"], norms, loss=loss)


PARAMS = {"a": jax.ShapeDtypeStruct((3,), np.float32), "b": jax.ShapeDtypeStruct((2,), np.float32)}


@jax.jit
def recorded(sizes):
    """The state of `record` after updates of these sizes."""
    tx = oc.record(capacity=32, stretches=16)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}

    def step(state, size):
        grads = {"a": size * jnp.ones(3), "b": 0.1 * size * jnp.ones(2)}
        return tx.update(grads, state, params, value=size)[1], None

    return jax.lax.scan(step, tx.init(params), sizes)[0]


def long_run(spike=100, bad=300):
    """A recording of the last 32 of 500 updates; a spike and a NaN lie before them."""
    sizes = np.ones(500, np.float32)
    sizes[spike], sizes[bad] = 50, np.nan
    return oc.History.from_state(recorded(sizes), PARAMS)


STRANGE = {
    "three updates": lambda: oc.History(["a", "b"], scattered(3, 2), loss=[3.0, 2.0, 1.0]),
    "one number": lambda: oc.History(["a"], [[1.0]]),
    "all zero": lambda: oc.History(["a", "b"], np.zeros((50, 2)), loss=np.zeros(50)),
    "all NaN": lambda: oc.History(["a", "b"], np.full((50, 2), np.nan), loss=np.full(50, np.nan)),
    "no updates": lambda: oc.History(["a"], np.zeros((0, 1))),
    "no groups": lambda: oc.History([], np.zeros((3, 0))),
    "all alike": lambda: oc.History(["a", "b"], np.ones((80, 2))),
    "huge and tiny": lambda: oc.History(["a", "b"], [[np.inf, 1], [1e-310, 1], [1e300, 1e308], [0, 0]]),
    "names": lambda: oc.History(EVIL, scattered(30, len(EVIL))),
    "maxima": lambda: oc.History(["a", "b"], scattered(90, 2), norm="linf"),
    "steps apart": lambda: oc.History(["a"], scattered(90, 1), steps=np.arange(90) ** 2),
    "before the recording": long_run,
    "400 groups": lambda: oc.History([f"p/block_{k // 4}/{k}" for k in range(400)], scattered(40, 400)),
    "400 layers": lambda: oc.History([f"layer_{k}" for k in range(400)], scattered(40, 400)),
}


def axes_of(history, **options):
    """The four panels: map, whole, shares, histogram."""
    figure = history.plot(**options)
    figure.draw_without_rendering()
    # The axes of the colour bar are the second.
    titles = [axes for axes in figure.axes if axes.get_title("left")]
    assert len(titles) == 4
    return titles


@pytest.mark.parametrize("name", STRANGE)
def test_any_recording_is_drawn(name):
    """Without a warning, and as a PNG."""
    file = io.BytesIO()
    figure = STRANGE[name]().plot(limits=0.5)
    assert isinstance(figure, Figure)
    figure.savefig(file, dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", STRANGE)
def test_any_recording_has_a_table_a_text_and_a_page(name, tmp_path):
    """Each names the groups and how many there are."""
    history = STRANGE[name]()
    console = Console(width=120, file=io.StringIO())
    console.print(history.table())
    said = f"{len(history.names)} group{'' if len(history.names) == 1 else 's'}"
    assert said in console.file.getvalue()
    assert said in str(history)
    history.to_html(tmp_path / "page.html")
    assert said in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_single_spike_in_a_hundred_thousand_updates_is_in_the_figure():
    """Columns are the largest of the updates in them."""
    norms = np.ones((100_000, 2))
    norms[77_777, 1] = 50.0
    heat, whole, *_ = axes_of(oc.History(["a", "b"], norms))
    drawn = heat.collections[0].get_array()
    assert drawn.shape[1] < 1000
    assert drawn.max() == 50
    (column,) = np.flatnonzero((drawn == 50).any(axis=0))
    assert column / drawn.shape[1] == pytest.approx(0.77777, abs=0.01)
    assert max(np.max(patch.get_data().values) for patch in whole.patches) == pytest.approx(np.hypot(50, 1))


def test_what_is_not_finite_is_masked_and_marked():
    """The map has a hole with a cross in it, and the whole's panel a cross above the update."""
    heat, whole, *_ = axes_of(spiky())
    holes = np.argwhere(heat.collections[0].get_array().mask)
    assert holes.tolist() == [[2, 60]]
    assert [line.get_xydata().tolist() for line in heat.lines] == [[[60, 2]]]
    assert [line.get_xydata().tolist() for line in whole.lines] == [[[60, 1]]]


def test_more_groups_than_have_room_are_put_together_by_layer():
    """The titles say so, and few enough names remain."""
    heat, *_ = axes_of(STRANGE["400 groups"]())
    assert heat.collections[0].get_array().shape[0] == 100
    assert "400 groups by layer" in heat.get_ylabel()
    assert len(heat.get_yticklabels()) <= 30
    boxes = [label.get_window_extent() for label in heat.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 0.5 for above, below in itertools.pairwise(boxes))


@pytest.mark.parametrize("name", ["400 layers", "names", "three updates", "before the recording"])
def test_every_panel_keeps_its_room(name):
    """Long names and many of them do not push a panel away."""
    for axes in axes_of(STRANGE[name]()):
        assert axes.get_position().width > 0.35
        assert axes.get_position().height > 0.5
        assert axes.get_window_extent().width > 350


def test_names_are_drawn_as_they_are():
    """Dollars are no mathematics, and a leading underscore hides nothing."""
    heat, _, shares, _ = axes_of(oc.History(["a$b$/_c", "_hidden"], scattered(30, 2)))
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a$b$/_c", "_hidden"]
    assert {text.get_text() for text in shares.get_legend().get_texts()} == {"a$b$/_c", "_hidden"}


def test_shares_add_up_and_name_the_culprit():
    """In a spike its group is all of the squared norm."""
    _, _, shares, _ = axes_of(spiky())
    edges = shares.patches[0].get_data().edges
    names = [text.get_text() for text in shares.get_legend().get_texts()]
    assert set(names) == {"embed/table", "layer/kernel", "layer/bias", "head/kernel"}
    levels = dict(zip(names[::-1], (patch.get_data() for patch in shares.patches), strict=False))
    at = np.searchsorted(edges, 50) - 1
    own = levels["embed/table"]
    assert own.values[at] - own.baseline[at] == pytest.approx(1, abs=0.01)
    top = shares.patches[3].get_data().values
    np.testing.assert_allclose(top[~np.isnan(top)], 1)


def test_limits_are_drawn_in_both_panels():
    """A number, several, names, and one for each update."""
    history = spiky()
    adaptive = history.replay(oc.zclip()).limit[:, 0]
    for limits, names in (
        (3, ["limit 3"]),
        ([3.0, 5.0], ["limit 3", "limit 5"]),
        ({"mine": 3.0, "zclip": adaptive}, ["mine", "zclip"]),
    ):
        _, whole, _, histogram = axes_of(history, limits=limits)
        assert [text.get_text() for text in whole.get_legend().get_texts()][: len(names)] == names
        shown = [text.get_text().removesuffix(", median") for text in histogram.get_legend().get_texts()]
        assert shown == names
        assert histogram.lines[0].get_xdata()[0] == 3


@pytest.mark.parametrize("limit", [-1.0, np.nan, np.ones(3)])
def test_a_limit_that_is_none_is_an_error(limit):
    """It is named, with what to pass."""
    with pytest.raises(ValueError, match=r"History.plot: limit 'mine' is .*\. Pass a number"):
        spiky().plot({"mine": limit})


def test_the_advised_limit_of_the_whole_is_drawn():
    """With its interval; where the advice is about groups, the histogram is of these."""
    norms = scattered(300, 3)
    norms[[50, 120, 250]] *= 100
    history = oc.History(["a/kernel", "b/kernel", "c/kernel"], norms)
    advice = history.advise()
    assert advice.policy == "global"
    _, whole, _, histogram = axes_of(history, advice=advice)
    assert f"advised limit {advice.limit:.3g}" in [text.get_text() for text in whole.get_legend().get_texts()]
    assert histogram.lines[0].get_xdata()[0] == pytest.approx(advice.limit)


def test_the_advised_limit_of_one_group_is_drawn_in_its_histogram():
    """And the whole's panel has what would be left."""
    norms = scattered(300, 12)
    norms[[50, 120, 250], 0] *= 100
    history = oc.History(["embed/table", *(f"layer_{k}/kernel" for k in range(11))], norms)
    advice = history.advise()
    assert advice.policy == "outliers"
    _, whole, _, histogram = axes_of(history, advice=advice)
    assert "after the advised clipping" in [text.get_text() for text in whole.get_legend().get_texts()]
    assert "embed/table" in histogram.get_title("left")
    assert histogram.lines[0].get_xdata()[0] == pytest.approx(advice.limit)


def test_the_advised_limit_is_drawn_in_the_norm_of_the_axis():
    """Advice is of L2 norms; a figure of root mean squares has it among these."""
    norms = scattered(300, 3)
    norms[[50, 120, 250]] *= 100
    sizes = np.full(3, 1e4)
    history = oc.History(["a/kernel", "b/kernel", "c/kernel"], norms, norm="rms", sizes=sizes)
    advice = history.advise()
    _, whole, _, histogram = axes_of(history, advice=advice)
    said = [text.get_text() for text in whole.get_legend().get_texts()]
    assert f"advised limit {advice.limit:.3g} (l2)" in said
    at = histogram.lines[0].get_xdata()[0]
    assert at == pytest.approx(advice.limit / np.sqrt(sizes.sum()))
    assert np.median(history.whole) < at < 10 * np.median(history.whole)


def test_an_infinite_limit_takes_no_room():
    """It is named in the legend, and the axis stays that of the norms."""
    _, whole, *_ = axes_of(oc.History(["a"], scattered(50, 1)), limits={"none": np.inf, "one": 1.0})
    assert whole.get_ylim()[1] < 1e3


def test_limits_that_look_alike_are_all_drawn():
    _, whole, *_ = axes_of(oc.History(["a"], scattered(50, 1)), limits=[1.0000001, 1.0000002])
    names = [text.get_text() for text in whole.get_legend().get_texts()]
    assert {"limit 1.0000001", "limit 1.0000002"} <= set(names)


def test_the_bins_of_a_histogram_are_few_however_narrow_most_norms_are():
    """Of a clipped run nearly all norms are the limit."""
    norms = np.append(1 + 1e-7 * np.random.default_rng(0).random(1000), 0.01)[:, None]
    *_, histogram = axes_of(oc.History(["a"], norms))
    assert 10 <= len(histogram.patches[0].get_data().values) <= 80


def test_what_is_kept_nowhere_is_blank():
    """Updates after the last whole stretch and before those that are kept one by one."""
    sizes = np.ones(1000, np.float32)
    sizes[964] = 50
    history = oc.History.from_state(recorded(sizes), PARAMS)
    data = thin(history)
    gap = np.flatnonzero(np.isnan(data.whole))
    assert len(gap) == 1
    assert data.edges[gap[0]] <= 964 <= data.edges[gap[0] + 1]
    assert not data.bad.any()
    heat, *_ = axes_of(history)
    assert "blank: not kept" in heat.get_title("left")


def test_never_is_said_of_what_is_known():
    """Rows that were put together know of the updates that are kept, and not of the run."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    sizes = np.ones(500, np.float32)
    sizes[3] = np.nan
    history = oc.History.from_state(recorded(sizes), params)
    assert "not finite: first at update 3" in str(history)
    assert str(history.regroup(oc.groups.whole())).endswith("not finite: never in these updates")
    assert str(oc.History(["a"], [[1.0]])).endswith("not finite: never")


def test_what_was_before_the_recording_is_drawn_too():
    """From what `record` keeps of the whole run: a spike and a NaN."""
    heat, whole, shares, _ = axes_of(long_run())
    assert heat.get_xlim()[0] < 0
    assert heat.get_xlim()[1] == pytest.approx(499.5)
    assert heat.collections[0].get_array().max() == pytest.approx(50 * np.sqrt(3), rel=1e-5)
    assert heat.collections[0].get_array().mask.any()
    assert "norm, at most" in [text.get_text() for text in whole.get_legend().get_texts()]
    assert "last 32 updates" in shares.get_title("left")


def printed(history, width=140, **options):
    console = Console(width=width, file=io.StringIO())
    console.print(history.table(**options))
    return console.file.getvalue()


def row(text, name):
    """The cells of the line that begins with a name."""
    (line,) = (line for line in text.splitlines() if line.split("  ")[0].strip() == name)
    return line.split()[1:]


def test_the_table_has_the_numbers_of_each_group():
    """Against NumPy's quantiles; sizes where they are known."""
    norms = scattered(101, 2)
    norms[7, 1] = np.inf
    history = oc.History(["a", "b"], norms, sizes=[1200, 30])
    seen = np.delete(norms[:, 1], 7)
    median, p90, p99 = np.quantile(seen, (0.5, 0.9, 0.99))
    kept = np.delete(norms, 7, axis=0) ** 2
    share = np.median(kept[:, 1] / kept.sum(axis=1))
    steps = np.where(np.isfinite(norms[:, 1]), norms[:, 1], 0)
    expected = ["30", *(f"{x:.3g}" for x in (median, p90, p99, steps.max()))]
    expected += [str(steps.argmax()), f"{share:.1%}", "1"]
    text = printed(history)
    assert row(text, "b") == expected
    assert row(text, "a")[0] == "1,200"
    assert row(text, "whole")[0] == "1,230"
    assert row(text, "whole")[-1] == "1"


def test_of_many_groups_the_largest_are_kept_in_order():
    """The one that dominates, the one that spiked, and how many are left out."""
    norms = np.ones((50, 40))
    norms[:, 30] = 9
    norms[20, 10] = 500
    text = printed(oc.History([f"g{k}" for k in range(40)], norms), most=2)
    shown = re.findall(r"^g\d+", text, re.MULTILINE)
    assert shown == ["g10", "g30"]
    assert "38 groups are left out" in text


def test_the_largest_norm_of_the_whole_run_is_in_the_table():
    """Even if it was before the updates that are kept."""
    text = printed(long_run())
    cells = row(text, "a")
    assert cells[-3] == "100"
    assert cells[-1] == "1"
    assert "all 500 updates" in " ".join(text.split())


def test_the_text_tells_the_first_update_that_is_not_finite():
    """And where the whole's norm was largest."""
    history = spiky()
    said = str(history)
    assert "not finite: first at update 60, in layer/bias; head/kernel still was finite; in 1 of" in said
    assert f"at update {np.nanargmax(history.whole)}" in said
    assert "loss: 2 at first, 1 at last, 1 at best" in said


def test_the_text_tells_a_run_that_recovered_from_one_that_did_not():
    """And that what is counted is of the last updates, where the first was before them."""
    norms = np.ones((6, 2))
    norms[2] = np.nan
    assert str(oc.History(["a", "b"], norms)).endswith(
        "first at update 2, in a and 1 more; in 1 of 6 updates"
    )
    norms[2:] = np.nan
    assert str(oc.History(["a", "b"], norms)).endswith(
        "from update 2 on, first in a and 1 more; in 4 of 6 updates"
    )
    tx = oc.record(capacity=4)
    state = tx.init({"a": jnp.ones(2)})
    for size in (1.0, np.nan, *[1.0] * 6):
        _, state = tx.update({"a": jnp.full(2, size)}, state)
    said = str(oc.History.from_state(state, {"a": jnp.ones(2)}))
    assert said.endswith("first at update 1, in a; in 0 of the last 4 updates")


def dead():
    """A run that is not finite from update 2 on, as of units that pass no gradient on: most rows are zero."""
    norms = np.full((1200, 3), 0.0)
    norms[:2] = [[3.0, 4.0, 1.0], [30.0, 40.0, 10.0]]
    norms[2:, 1] = np.nan
    return oc.History(["a", "b", "c"], norms, loss=[2.0, 3.0, *[np.nan] * 1198])


def test_what_follows_the_last_finite_update_is_not_in_the_numbers():
    """A dead network's zeros are no norms of a gradient; how often a row was not finite is counted in all."""
    text = printed(dead())
    assert row(text, "a")[1] == "16.5"
    assert row(text, "c")[1] == "5.5"
    assert row(text, "b")[-1] == "1,198"
    assert "Norms and shares are of the updates up to 1, the last finite one." in " ".join(text.split())
    assert "the last finite one" not in " ".join(printed(spiky()).split())


def test_numbers_are_of_all_updates_if_none_is_finite():
    """There is nothing else to show."""
    assert row(printed(oc.History(["a", "b"], [[3.0, np.nan]] * 3)), "a")[1] == "3"


def test_the_last_finite_loss_is_said_to_be_that():
    """With its update."""
    assert "loss: 2 at first, 3 at update 1, the last finite, 2 at best" in str(dead())


@pytest.mark.parametrize("limits", ["x.png", Path("x.png"), ["x.png"], {"mine": "high"}], ids=str)
def test_a_limit_is_no_path(limits):
    """What was meant for `savefig` is told from a limit."""
    with pytest.raises(
        TypeError, match=r"History\.plot: limits is .*, of type \w+\. Pass numbers; to write a"
    ):
        spiky().plot(limits)


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.said = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.said.append(data)


def test_names_cannot_put_anything_into_the_page(tmp_path):
    """All tags are the page's own, no attribute runs or loads anything, and names are there to read."""
    path = tmp_path / "page.html"
    norms = scattered(60, len(EVIL))
    norms[[20, 40], 0] *= 100
    history = oc.History(EVIL, norms)
    history.to_html(path, history.advise())
    page = Tags()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.tags == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "pre", "code", "div", "img", "table"),
        *("thead", "tbody", "tr", "th", "td", "p"),
    }
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("href", "action")]
    sources = [value for key, value in page.attributes if key == "src"]
    assert len(sources) == 4
    assert all(value.startswith("data:image/svg+xml;base64,") for value in sources)
    pictures = [base64.b64decode(value.split(",")[1]).decode() for value in sources]
    assert not any("<script" in picture or "onerror" in picture for picture in pictures)
    assert any(EVIL[0] in said for said in page.said)
    assert "\x1b" not in path.read_text(encoding="utf-8")


def test_the_page_has_the_advice_and_its_code(tmp_path):
    """And is the same each time."""
    history = spiky()
    advice = history.advise()
    history.to_html(tmp_path / "one.html", advice)
    history.to_html(tmp_path / "two.html", advice)
    page = Tags()
    text = (tmp_path / "one.html").read_text(encoding="utf-8")
    page.feed(text)
    assert advice.code in page.said
    assert all(reason.split()[0] in text for reason in advice.reasons)
    assert text == (tmp_path / "two.html").read_text(encoding="utf-8")


def test_the_page_draws_limits(tmp_path):
    """The same figures as `plot`; what is no limit leaves no file."""
    history, pages = spiky(), {}
    for limits in (None, 3.0, [3.0, 5.0]):
        history.to_html(tmp_path / "page.html", limits=limits)
        pages[str(limits)] = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(set(pages.values())) == 3
    with pytest.raises(ValueError, match="limit 'limit -1' is -1"):
        history.to_html(tmp_path / "none.html", limits=-1)
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize(
    ("module", "look", "package"),
    [
        ("rich", lambda history: history.table(), "rich"),
        ("matplotlib.figure", lambda history: history.plot(), "matplotlib"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, look, package):
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"Install it: pip install {package}\.$"):
        look(spiky())


def test_nothing_but_looking_needs_rich_or_matplotlib(monkeypatch):
    """The text does without both."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert str(spiky()).startswith("Norms (l2) of 4 groups, 200 updates, 0 to 199")


def test_little_of_a_dead_run_is_drawn():
    """What came before its end would be lost among updates that are not finite."""
    norms = np.concatenate([np.ones((30, 2)), np.full((2_000, 2), np.nan)])
    history = oc.History(["a", "b"], norms, loss=np.arange(len(norms)))
    limit = np.linspace(1, 2, len(norms))
    figure = history.plot({"schedule": limit, "fixed": 2.0})
    figure.draw_without_rendering()
    axes = next(axes for axes in figure.axes if axes.get_xlabel().startswith("update"))
    assert axes.get_xlim()[1] < 45
    assert "2,030 updates, 0 to 2,029; drawn are 40" in figure.get_suptitle()


def test_an_advice_relative_to_weights_is_drawn_without_their_norms():
    """By what its limits are at the start."""
    norms = np.exp(0.1 * np.random.default_rng(0).standard_normal((200, 20)))
    noisy = oc.History([f"layer_{k}/kernel" for k in range(20)], norms, start=np.ones(20))
    advice = noisy.advise(optimizer="sgd", learning_rate=0.1)
    assert "relative" in advice.code
    noisy.plot(advice=advice).draw_without_rendering()
    assert advice.replay(noisy).clipped == 1
