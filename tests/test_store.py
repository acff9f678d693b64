"""What is saved comes back to the bit, and nothing else is taken for a recording."""

import dataclasses
import io
import json
import os
import pickle
import random
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as npst

import optaxclip as oc

POSITIVE = st.floats(0, allow_nan=False) | st.just(np.nan)
KEYS = st.lists(st.text(max_size=5), min_size=1, max_size=3).map(tuple)


def alike(a, b):
    """Whether two parts of recordings are the same to the bit, type for type."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return all(alike(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


def recorded(groups=oc.groups.leaf(), updates=70, **options):
    """A recording of a run with a spike, a NaN, a loss and more updates than its capacity."""
    tx = oc.record(groups, capacity=8, stretches=2, **options)
    params = {"a": {"kernel": jnp.ones((3, 2)), "bias/0": jnp.ones(2)}, "é": jnp.ones((2, 2))}

    @jax.jit
    def run(scales):
        def step(state, scale):
            grads = jax.tree.map(lambda p: p * scale, params)
            return tx.update(grads, state, params, value=scale)[1], None

        return jax.lax.scan(step, tx.init(params), scales)[0]

    scales = jnp.arange(1.0, updates + 1).at[3].set(1e4).at[updates - 2].set(jnp.nan)
    with jax.numpy_dtype_promotion("standard"):
        return oc.History.from_state(run(scales), params, groups)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved recording with all there is, and its bytes."""
    path = tmp_path_factory.mktemp("store") / "run.npz"
    history = recorded(params=True)
    history.save(path)
    return history, path.read_bytes()


def rewritten(data, change=None, header=None, compression=zipfile.ZIP_DEFLATED):
    """A saved file with other members: `change` maps their bytes by name, `header` the JSON in it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if header is not None:
        old = json.loads(np.load(io.BytesIO(members["header.npy"])).tobytes())
        members["header.npy"] = npy(np.frombuffer(header(old), np.uint8))
    if change is not None:
        members = change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def npy(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


def refused(tmp_path, data, match, **options):
    """Asserts that a file is refused with one clear error that names it."""
    path = tmp_path / "strange.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        oc.History.load(path, **options)
    assert str(caught.value).startswith(f"History.load: {str(path)!r} holds no recording that can be read: ")
    assert "\n" not in str(caught.value)


GROUPS = {name: getattr(oc.groups, name)() for name in ("leaf", "layer", "whole", "unit")}
GROUPS["stacked unit"] = oc.groups.stacked(oc.groups.unit(), "kernel")


@pytest.mark.parametrize("groups", GROUPS)
def test_recordings_come_back_to_the_bit(tmp_path, groups):
    """With the rows, their leaves, shapes and indices, the norms of parameters and the whole run."""
    history = recorded(GROUPS[groups], params=True)
    assert history.run is not None
    assert history.run.first.max() == 68
    history.save(tmp_path / "run")
    assert alike(oc.History.load(tmp_path / "run"), history)


@given(data=st.data(), keys=st.lists(KEYS, min_size=0, max_size=4, unique_by="/".join))
def test_arrays_come_back_to_the_bit(tmp_path_factory, data, keys):
    """Whatever the values and names: NaN, infinity, keys with slashes, without letters, or none at all."""
    rows, steps = len(keys), data.draw(st.integers(0, 5))

    def norms(*shape):
        return data.draw(st.none() | npst.arrays(float, shape, elements=POSITIVE))

    history = oc.History(
        keys,
        data.draw(npst.arrays(float, (steps, rows), elements=POSITIVE)),
        steps=np.cumsum(data.draw(npst.arrays(int, steps, elements=st.integers(1, 2**50)))),
        loss=data.draw(st.none() | npst.arrays(float, steps)),
        params=norms(steps, rows),
        start=norms(rows),
        sizes=norms(rows),
        norm=data.draw(st.sampled_from(["l2", "l1", "linf", "spectral", "lp(3.0)"])),
    )
    path = tmp_path_factory.mktemp("store") / "run"
    history.save(path)
    assert alike(oc.History.load(path), history)


def test_rows_of_layers_come_back_as_layers(tmp_path):
    """Of which no leaves are known."""
    history = oc.History(["a/b", "(root)"], [[3.0, 4.0]], rows="layer")
    history.save(tmp_path / "run.npz")
    found = oc.History.load(tmp_path / "run.npz")
    assert found.rows == history.rows
    assert found.regroup(oc.groups.layer()).names == ("(root)", "a/b")
    with pytest.raises(ValueError, match="a layer whose leaves were not logged"):
        found.regroup(oc.groups.leaf())


def test_rows_of_many_leaves_come_back(tmp_path):
    """A regrouped recording has rows that are of several leaves each."""
    history = recorded().regroup(oc.groups.whole())
    history.save(tmp_path / "run")
    found = oc.History.load(tmp_path / "run")
    assert alike(found, history)
    assert len(found.rows[0].sources) == 3


def test_equal_recordings_make_equal_files(tmp_path, saved):
    """The file holds no date and nothing of the machine."""
    saved[0].save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved[1]


def test_numpy_reads_the_arrays(tmp_path, saved):
    """The file is what `numpy.savez` could have written."""
    with np.load(io.BytesIO(saved[1]), allow_pickle=False) as arrays:
        assert alike(arrays["norms"], saved[0].norms)
        assert json.loads(arrays["header"].tobytes())["version"] == 1


def test_arrays_of_either_byte_order_are_read(tmp_path, saved):
    """A machine that counts the other way round may have rewritten them."""

    def swap(members):
        array = np.load(io.BytesIO(members["norms.npy"]))
        return {**members, "norms.npy": npy(array.astype(">f8"))}

    path = tmp_path / "run"
    path.write_bytes(rewritten(saved[1], swap))
    assert alike(oc.History.load(path), saved[0])


def test_the_name_is_the_one_given(tmp_path, monkeypatch, saved):
    """Relative paths, names without a suffix or with any other, and symbolic links to elsewhere."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.symlink("folder/target.bin", "link")
    for name in ("run", "folder/run.v1", "link"):
        saved[0].save(name)
        assert alike(oc.History.load(name), saved[0])
    assert sorted(os.listdir()) == ["folder", "link", "run"]
    assert sorted(os.listdir("folder")) == ["run.v1", "target.bin"]


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch, saved):
    """Nothing half written is ever under the name, and nothing is left beside it."""
    path = tmp_path / "run.npz"
    saved[0].save(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        oc.History(["a"], [[1.0]]).save(path)
    assert path.read_bytes() == saved[1]
    assert os.listdir(tmp_path) == ["run.npz"]


def test_a_folder_that_is_not_there_is_named(tmp_path, saved):
    """Rather than a temporary file in it."""
    with pytest.raises(FileNotFoundError, match=r"nowhere'$"):
        saved[0].save(tmp_path / "nowhere" / "run.npz")


def test_a_missing_file_is_no_damaged_one(tmp_path):
    """It raises what opening it raises."""
    with pytest.raises(FileNotFoundError):
        oc.History.load(tmp_path / "nothing.npz")


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"step,loss\n1,2\n",
    "pickle": pickle.dumps({"norms": [1.0]}),
    "zip": zipped(readme="hello"),
    "npz": zipped(**{"norms.npy": npy(np.ones((2, 2)))}),
    "header": zipped(**{"header.npy": b"hello"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(tmp_path, kind):
    refused(tmp_path, FOREIGN[kind], "Pass a file that History.save wrote")


HEADERS = {
    "no json": (lambda h: b"{", "no JSON"),
    "no text": (lambda h: b"\xff", "no JSON"),
    "no object": (lambda h: b"[]", "does not say 'optaxclip.History'"),
    "format": (lambda h: {**h, "format": "other"}, "does not say"),
    "newer": (lambda h: {**h, "version": 2}, "it has version 2, and this optaxclip knows 1: a newer one"),
    "version": (lambda h: {**h, "version": "1"}, "its version is '1'"),
    "true": (lambda h: {**h, "version": True}, "its version is True"),
    "zero": (lambda h: {**h, "version": 0}, "its version is 0"),
    "keys": (lambda h: {**h, "more": 1}, "has not the keys"),
    "norm": (lambda h: {**h, "norm": 2}, "norm has no name"),
    "no norm": (lambda h: {**h, "norm": "l9"}, "there is no norm 'l9'"),
    "rows": (lambda h: {**h, "rows": h["rows"][1:]}, "does not fit"),
    "twice": (lambda h: {**h, "rows": [h["rows"][0]] * 3}, "name of several rows"),
    "row": (lambda h: {**h, "rows": [1, 2, 3]}, "where a list should be"),
    "name": (lambda h: {**h, "rows": [[1, [0], []]] * 3}, "where a name should be"),
    "source": (lambda h: {**h, "rows": [["a", [9], []]] * 3}, "leaves that its header has not"),
    "fraction": (lambda h: {**h, "rows": [["a", [0.5], []]] * 3}, "whole numbers"),
    "at": (lambda h: {**h, "rows": [["a", [0], [1]]] * 3}, "leaves that its header has not"),
    "shape": (lambda h: {**h, "sources": [[["a"], [-1], []]] * 3}, "whole numbers"),
    "axes": (lambda h: {**h, "sources": [[["a"], [2], [1]]] * 3}, "fewer axes"),
    "no leaf": (lambda h: {**h, "rows": [["a", [], []]] * 3}, "leaves that its header has not"),
    "index": (
        lambda h: {
            **h,
            "sources": [[["a"], [3], [0]]],
            "rows": [[f"a[{k}]", [0], [k + 1]] for k in range(3)],
        },
        r"row 'a\[2\]' is of an index that its leaf has not",
    ),
    "index again": (
        lambda h: {
            **h,
            "sources": [[["a"], [3], [0]]],
            "rows": [[f"a[{k}]", [0], [k % 2]] for k in range(3)],
        },
        r"row 'a\[2\]' is of an index that its leaf has not, or had before",
    ),
    "indices": (
        lambda h: {**h, "sources": [[["a"], [10**9], [0]]], "rows": [[f"{k}", [0], [k]] for k in range(3)]},
        "leaf 'a' has rows for 3 of its indices",
    ),
    "leaf": (lambda h: {**h, "sources": [[[7], None, []]] * 3}, "where a name should be"),
    "no run": (lambda h: {**h, "run": None}, "no part of a recording"),
    "run": (lambda h: {**h, "run": {"updates": 1}}, "how long the run was"),
    "updates": (lambda h: {**h, "run": {"updates": -1, "length": 1}}, "whole numbers"),
    "deep": (lambda h: b"[" * 10**5, "no JSON"),
    "digits": (lambda h: b"1" * 10**5, "no JSON"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_wrong_headers_are_refused(tmp_path, saved, kind):
    change, match = HEADERS[kind]

    def header(old):
        new = change(old)
        return new if isinstance(new, bytes) else json.dumps(new).encode()

    refused(tmp_path, rewritten(saved[1], header=header), match)


class _Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def declared(shape, descr="'<f8'", order="False", data=b""):
    """An array whose header says something else than what follows."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


ARRAYS = {
    "missing": (None, "'norms' is missing"),
    "text": (b"hello", "no plain array of numbers"),
    "cut": (npy(np.ones((8, 3)))[:-8], r"shape \(8, 3\) and 184 bytes"),
    "longer": (npy(np.ones((8, 3))) + b"x", r"shape \(8, 3\) and 193 bytes"),
    "rows": (npy(np.ones((8, 2))), r"shape \(8, 2\), which does not fit"),
    "steps": (npy(np.ones((7, 3))), "does not fit"),
    "axes": (npy(np.ones(24)), "should have 2 axes"),
    "scalar": (npy(np.ones(())), "no plain array"),
    "float32": (npy(np.ones((8, 3), np.float32)), "dtype float32"),
    "integers": (npy(np.ones((8, 3), int)), "dtype int64"),
    "complex": (npy(np.ones((8, 3), complex)), "no plain array"),
    "fortran": (npy(np.asfortranarray(np.ones((8, 3)))), "no plain array"),
    "version": (npy(np.ones((8, 3)), version=(2, 0)), "no plain array"),
    "negative": (npy(-np.ones((8, 3))), "norms holds -1"),
    "code": (declared("__import__('os').mkdir('x')"), "no plain array"),
    "nested": (declared("(" * 9000), "no plain array"),
    "huge": (declared("(1000000000000000, 3)"), r"shape \(1000000000000000, 3\) and 0 bytes"),
    "endless": (declared(f"({'9' * 400}, 0)"), "holds no recording"),
    "digits": (declared(f"({'9' * 9000}, 3)"), "holds no recording"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_wrong_arrays_are_refused(tmp_path, saved, kind):
    content, match = ARRAYS[kind]

    def change(members):
        members.pop("norms.npy")
        return members if content is None else {**members, "norms.npy": content}

    refused(tmp_path, rewritten(saved[1], change), match)


def test_pickled_objects_are_refused_and_not_run(tmp_path, saved):
    """Whichever array they stand in for."""
    target = tmp_path / "made"
    bomb = np.array([[_Bomb(str(target))]], object)
    for name in ("norms.npy", "header.npy", "run.edges.npy", "steps.npy"):
        data = rewritten(saved[1], lambda members: {**members, name: npy(bomb)})  # noqa: B023
        refused(tmp_path, data, "no plain array")
    assert not target.exists()
    assert np.load(io.BytesIO(npy(bomb)), allow_pickle=True).size == 1
    assert target.exists()  # so it was live


@pytest.mark.parametrize("name", ["more.npy", "norms", "../norms.npy"])
def test_members_that_do_not_belong_are_refused(tmp_path, saved, name):
    refused(tmp_path, rewritten(saved[1], lambda members: {**members, name: b"x"}), "part")


def test_a_histogram_has_one_edge_more_than_bins(tmp_path, saved):
    data = rewritten(saved[1], lambda members: {**members, "run.edges.npy": npy(np.ones(3))})
    refused(tmp_path, data, "one edge more")


def test_steps_beyond_the_integers_of_float64_are_refused(tmp_path, saved):
    """They are compared as float64; the largest that can be told from the next comes back."""
    history = oc.History(["a"], [[1.0]], steps=[2**53 - 1])
    history.save(tmp_path / "run")
    assert alike(oc.History.load(tmp_path / "run"), history)
    steps = np.arange(8) + 2**62
    refused(tmp_path, rewritten(saved[1], lambda m: {**m, "steps.npy": npy(steps)}), "steps must be")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, saved, method):
    refused(tmp_path, rewritten(saved[1], compression=method), "compressed in an unknown way")


def test_what_takes_too_much_memory_is_refused_before_it_is_read(tmp_path, saved):
    """A zip of less than a megabyte may hold gigabytes of zeros, and JSON of more objects than bytes."""
    zeros = rewritten(saved[1], lambda members: {**members, "norms.npy": npy(np.zeros((2**23, 3)))})
    names = rewritten(saved[1], header=lambda old: b"[" + b"[]," * 2**22 + b"[]]")
    tracemalloc.start()
    try:
        refused(tmp_path, zeros, "bytes of memory, and max_bytes is 100000000", max_bytes=10**8)
        refused(tmp_path, names, "bytes of memory, and max_bytes is 100000000", max_bytes=10**8)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**21


def test_arrays_and_names_are_counted_together(tmp_path, saved):
    """The least that a file can be read with is what both take, names 27 times."""
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(io.BytesIO(saved[1])).infolist()}
    least = sum(sizes.values()) + 26 * sizes["header.npy"]
    refused(tmp_path, saved[1], f"may take {least} bytes", max_bytes=least - 1)
    assert alike(oc.History.load(tmp_path / "strange.npz", max_bytes=least), saved[0])


def test_json_takes_no_more_memory_than_it_counts_for(tmp_path, saved):
    """The worst is a list of empty objects."""
    many = b"[" + b"{}," * 2**18 + b"{}]"
    data = rewritten(saved[1], header=lambda old: many)
    tracemalloc.start()
    try:
        refused(tmp_path, data, "does not say", max_bytes=28 * len(many))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 20 * len(many) < most < 27 * len(many) + 2**21


def test_a_larger_max_bytes_reads_what_is_trusted(tmp_path, saved):
    """The default is 2 GiB."""
    (tmp_path / "run").write_bytes(saved[1])
    with pytest.raises(ValueError, match="max_bytes is 100"):
        oc.History.load(tmp_path / "run", max_bytes=100)
    assert alike(oc.History.load(tmp_path / "run", max_bytes=10**6), saved[0])
    with pytest.raises(TypeError, match=r"History.load: max_bytes is 2.5, of type float\. Pass an integer"):
        oc.History.load(tmp_path / "run", max_bytes=2.5)


def mutilated(data, count=240):
    """Files that are cut off, or have bits of one byte flipped, at random places."""
    rng = random.Random(0)
    for k in range(count):
        at = rng.randrange(len(data))
        yield (
            at,
            data[:at]
            if k % 4 == 0
            else data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :],
        )


def test_damaged_files_are_refused_or_hold_the_same(tmp_path, saved):
    """Whatever byte is damaged; what does not matter, such as a date, may be."""
    small = oc.History(["a"], [[1.0], [np.nan]])
    small.save(tmp_path / "small")
    kept = refusals = 0  # a small file too, of which more bytes are what a zip adds
    for history, data in (saved, (small, (tmp_path / "small").read_bytes())):
        for at, damaged in mutilated(data):
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                found = oc.History.load(tmp_path / "damaged")
            except ValueError as error:
                refusals += "Pass a file that History.save wrote" in str(error)
            else:
                assert alike(found, history), at
                kept += 1
    assert refusals + kept == 2 * 240
    assert refusals > kept > 0
