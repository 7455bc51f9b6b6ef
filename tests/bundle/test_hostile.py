"""Damaged bundles with matching hashes: the result is a CobraEdgeError or logits, nothing else.

The hash protects against accidents, not against the author of the manifest. Therefore files are modified and hashed again: the
header of decoder.safetensors, its data, the sizes and the recipe of the manifest.
"""

import contextlib
import gc
import json
import math
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cobra_edge import inspect, run
from cobra_edge.bundle.reader import DECODER, MANIFEST, Bundle, file_sha256
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.native.decoder import CompiledDecoder
from cobra_edge.decode.native.library import kernel_names
from cobra_edge.errors import BundleError, CobraEdgeError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.terminal.output import run_command

from ..decode.test_native import arguments_of

TRIES = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.sampled_from([
    -(2**63), -1, 0, 1, 2, 7, 15, 17, 31, 64, 96, 127, 129, 255, 256, 257, 511, 513, 1024, 4096, 65_536, 2**20, 2**31, 2**32,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 0.5, 1.0, 1e300, None, True, "128", [], {}, [2**64],
])  # fmt: skip


@contextlib.contextmanager
def copied(bundle):
    with tempfile.TemporaryDirectory() as folder:
        yield shutil.copytree(bundle, Path(folder) / "bundle")


def edit_manifest(bundle, change):
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def write_decoder(bundle, data):
    (bundle / DECODER).write_bytes(data)
    entry = {"bytes": len(data), "sha256": file_sha256(bundle / DECODER)}
    edit_manifest(bundle, lambda m: m["files"].update({DECODER: entry}))


def refused_or_runs(bundle):
    """Open a bundle and run three tokens. Returns whether it ran; anything but a CobraEdgeError propagates."""
    try:
        opened = Bundle.open(bundle)
        decoder = CpuDecoder(opened, DecoderOptions(threads=1))
    except CobraEdgeError as error:
        assert str(error)
        return False
    vocab = opened.manifest.model.mamba.vocab
    logits = decoder.prefill(decoder.embed([0, 1, vocab - 1]), decoder.new_state())
    assert logits.shape == (vocab,) and logits.dtype == np.float32
    return True


def split(data):
    """Return a file's header, as text, and its data."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header, payload):
    return len(header).to_bytes(8, "little") + header + payload


def test_an_unchanged_copy_runs(tiny_bundle):
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, (bundle / DECODER).read_bytes())
        assert refused_or_runs(bundle)


@TRIES
@given(data=st.data())
def test_flipped_bytes(tiny_bundle, data):
    whole = bytearray((tiny_bundle / DECODER).read_bytes())
    start = 8 + len(split(whole)[0])
    where = st.one_of(st.integers(0, 7), st.integers(8, start - 1), st.integers(start, len(whole) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(where)] ^= data.draw(st.integers(1, 255))
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, bytes(whole))
        refused_or_runs(bundle)


def damaged_norm(bundle, value=np.nan):
    """Put a value that is not finite into a norm's weight, and hash the file again."""
    tensors = load_file(bundle / DECODER)
    tensors["backbone.layers.1.norm.weight"][5] = value
    save_file(tensors, bundle / DECODER)
    write_decoder(bundle, (bundle / DECODER).read_bytes())


def small_and_finite(bundle):
    """Return whether all float32 tensors of this bundle are finite: norms, convolutions, parameters of the recurrence."""
    return all(np.isfinite(v).all() for v in load_file(bundle / DECODER).values() if v.dtype == np.float32)


@TRIES
@given(start=st.integers(0, 346_879), values=st.binary(min_size=1, max_size=64))
@example(start=0, values=b"\xff" * 64)
def test_overwritten_data_runs(tiny_bundle, start, values):
    """Codes and scales may have any bits, NaN and infinity too, without a crash. In small vectors both are refused."""
    header, payload = split((tiny_bundle / DECODER).read_bytes())
    start %= len(payload) - len(values)
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, joined(header, payload[:start] + values + payload[start + len(values) :]))
        assert refused_or_runs(bundle) == small_and_finite(bundle)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_small_vector_that_is_not_finite_is_found_when_the_decoder_is_opened(tiny_bundle, value, capfd):
    """Quantized activations are integers and cannot hold NaN: without a check, the answer would silently come from zeros."""
    with copied(tiny_bundle) as bundle:
        damaged_norm(bundle, value)
        assert not refused_or_runs(bundle)
        assert run_command(inspect.command, [str(bundle)]) == 2
        assert run_command(run.command, [str(bundle), "--prompt", "What is there?", "--activations", "int8"]) == 2
        assert capfd.readouterr().err.count("values of backbone.layers.1.norm.weight are NaN or infinite") == 2


@pytest.mark.parametrize(
    ("scheme", "name"), [("w8a16-g128", "backbone.embedding.weight.scales"), ("fp16", "backbone.layers.1.mixer.dt_proj.weight")]
)
def test_a_scale_or_a_float_matrix_that_is_not_finite_is_found(tiny_bundle, text_only, tmp_path, scheme, name, capfd):
    """Float matrices are not read when a decoder is opened; NaN in them is refused in the logits."""
    if scheme == "fp16":
        target = target_named("cpu")
        tiny_bundle = export_bundle(str(text_only), target, tmp_path / "b", scheme=scheme, golden_lines=16).directory
    with copied(tiny_bundle) as bundle:
        tensors = load_file(bundle / DECODER)
        assert tensors[name].dtype == np.float16
        tensors[name][-1, -1] = np.inf
        save_file(tensors, bundle / DECODER)
        write_decoder(bundle, (bundle / DECODER).read_bytes())
        assert run_command(inspect.command, [str(bundle)]) == 2
        assert f"values of {name} are NaN or infinite" in " ".join(capfd.readouterr().err.split())


@TRIES
@given(length=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 8192), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])))
def test_a_header_of_another_length(tiny_bundle, length):
    with copied(tiny_bundle) as bundle:
        data = (bundle / DECODER).read_bytes()
        write_decoder(bundle, length.to_bytes(8, "little") + data[8:])
        assert refused_or_runs(bundle) == (length == len(split(data)[0]))


@TRIES
@given(cut=st.integers(0, 400_000), tail=st.binary(max_size=70))
def test_a_file_cut_or_longer(tiny_bundle, cut, tail):
    with copied(tiny_bundle) as bundle:
        data = (bundle / DECODER).read_bytes()
        changed = data[: max(0, len(data) - cut)] + tail
        write_decoder(bundle, changed)
        assert refused_or_runs(bundle) == (len(changed) == len(data))


def damaged_header(data, header):
    """Change one tensor's entry, or the names."""
    name = data.draw(st.sampled_from(sorted(header)))
    other = data.draw(st.sampled_from(sorted(header)))
    entry = header[name]
    what = data.draw(
        st.sampled_from(["offset", "shift", "swap", "overlap", "dtype", "shape", "size", "field", "name", "gone", "meta"])
    )
    if what == "offset":
        entry["data_offsets"][data.draw(st.integers(0, 1))] = data.draw(NUMBERS)
    elif what == "shift":
        by = data.draw(st.integers(-100_000, 400_000))
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    elif what == "swap":
        entry["data_offsets"].reverse()
    elif what == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif what == "dtype":
        kinds = ["U8", "I8", "F16", "BF16", "F32", "I32", "F64", "F8_E4M3", "F4", "BOOL", "X", "", 1, None]
        entry["dtype"] = data.draw(st.sampled_from(kinds))
    elif what == "shape":
        entry["shape"] = data.draw(st.lists(NUMBERS, max_size=4))
    elif what == "size":
        entry["shape"][data.draw(st.integers(0, len(entry["shape"]) - 1))] = data.draw(NUMBERS)
    elif what == "field":
        entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(NUMBERS)
    elif what == "name":
        header[data.draw(st.sampled_from(["", "x", "../x", "\0", "ü", other]))] = header.pop(name)
    elif what == "gone":
        del header[name]
    else:
        header["__metadata__"] = data.draw(st.one_of(NUMBERS, st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)))


@TRIES
@given(data=st.data())
def test_a_header_that_says_something_else(tiny_bundle, data):
    text, payload = split((tiny_bundle / DECODER).read_bytes())
    header = json.loads(text)
    damaged_header(data, header)
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, joined(json.dumps(header).encode(), payload))
        refused_or_runs(bundle)


@TRIES
@given(data=st.data())
def test_a_name_that_is_there_twice(tiny_bundle, data):
    """The library and Python must use the same one of the two, or the file is refused."""
    text, payload = split((tiny_bundle / DECODER).read_bytes())
    pairs = list(json.loads(text).items())
    name, entry = data.draw(st.sampled_from(pairs))
    reference = dict(
        entry, data_offsets=data.draw(st.sampled_from([[0, 1], [0, 2**40], entry["data_offsets"], pairs[0][1]["data_offsets"]]))
    )
    pairs.insert(data.draw(st.integers(0, len(pairs))), (name, reference))
    doubled = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, joined(doubled.encode(), payload))
        refused_or_runs(bundle)


@pytest.mark.parametrize(
    "header",
    [b"", b" ", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b'{"a":1e999}', b"{" + b" " * 99],
)
def test_a_header_that_is_none(tiny_bundle, header):
    with copied(tiny_bundle) as bundle:
        write_decoder(bundle, joined(header, split((bundle / DECODER).read_bytes())[1]))
        assert not refused_or_runs(bundle)


def leaves(value, path=()):
    """Yield the path of every number, string and list in a manifest."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    yield path


@TRIES
@given(data=st.data())
@example(data=None)
def test_a_manifest_that_says_something_else(tiny_bundle, data):
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 2))):
            *path, last = data.draw(st.sampled_from([p for p in leaves(manifest) if p]))
            inner = manifest
            for key in path:
                inner = inner.get(key) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[last] = data.draw(st.one_of(NUMBERS, st.text(max_size=8), st.floats()))
    with copied(tiny_bundle) as bundle:
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        assert refused_or_runs(bundle) or data is not None


@TRIES
@given(
    sizes=st.dictionaries(
        st.sampled_from(["d_model", "n_layer", "vocab", "d_inner", "d_state", "d_conv", "dt_rank"]),
        st.one_of(st.integers(-2, 1 << 20), NUMBERS),
        min_size=1,
    ),
    eps=st.one_of(st.just(1e-5), st.floats(), NUMBERS),
    tied=st.one_of(st.booleans(), NUMBERS),
)
def test_sizes_that_are_not_the_tensors(tiny_bundle, sizes, eps, tied):
    with copied(tiny_bundle) as bundle:
        edit_manifest(bundle, lambda m: m["model"]["mamba"].update(sizes, norm_eps=eps, tied=tied))
        refused_or_runs(bundle)


STORAGE = st.one_of(st.sampled_from([*SCHEMES, "float16", "float32", "int8", "", "w4a16-g64", "*"]), st.text(max_size=12))


@TRIES
@given(data=st.data())
def test_a_recipe_that_says_something_else(tiny_bundle, data):
    tensors = json.loads((tiny_bundle / MANIFEST).read_text())["recipe"]["tensors"]
    names = [*tensors, "backbone.layers.0.mixer.A_log", "backbone.layers.*.mixer.D", "backbone.norm_f.weight", "*", "nobody"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), STORAGE, min_size=1, max_size=3))
    with copied(tiny_bundle) as bundle:
        edit_manifest(bundle, lambda m: m["recipe"]["tensors"].update(changes))
        edit_manifest(bundle, lambda m: m["recipe"].update(scheme=data.draw(STORAGE)))
        refused_or_runs(bundle)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "a", "b.json/c", DECODER + "/x"])
def test_a_file_name_no_file_system_takes(tiny_bundle, name):
    with copied(tiny_bundle) as bundle:
        edit_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
        with pytest.raises(BundleError):
            Bundle.open(bundle)


def test_a_file_that_links_to_itself(tiny_bundle):
    with copied(tiny_bundle) as bundle:
        (bundle / DECODER).unlink()
        (bundle / DECODER).symlink_to(DECODER)
        with pytest.raises(BundleError, match=r"decoder\.safetensors"):
            Bundle.open(bundle)


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return Bundle.open(tiny_bundle)


DTYPES = ["uint8", "int8", "uint16", "float16", "float32", "float64", "int32", "int64", "bool", "complex64", "U1", "O"]


def replaced(data, array):
    """Return a replacement for an array; contiguous if it is an array, see below."""
    what = data.draw(st.sampled_from(["dtype", "shape", "rank", "size", "empty", "none", "view"]))
    if what == "dtype":
        return np.zeros(array.shape, data.draw(st.sampled_from(DTYPES)))
    if what == "shape":
        return np.zeros([max(0, n + data.draw(st.integers(-2, 2))) for n in array.shape], array.dtype)
    if what == "rank":
        return array.reshape(data.draw(st.sampled_from([(-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1]])))
    if what == "size":
        size = data.draw(st.integers(0, 4096))
        return np.zeros((size, array.shape[-1] if size % 2 else 1), array.dtype)
    if what == "empty":
        return np.zeros([0] * array.ndim, array.dtype)
    if what == "none":
        return data.draw(st.sampled_from([None, 0, "x", b"x", [], array.tolist()[:1], object()]))
    return array.view(data.draw(st.sampled_from(["uint8", "int8"])))


@TRIES
@given(data=st.data())
def test_the_compiled_decoder_by_itself(tiny, data):
    sizes, arrays = arguments_of(tiny)
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        if data.draw(st.integers(0, 9)):
            if isinstance(arrays[name], np.ndarray):
                arrays[name] = replaced(data, arrays[name])
        else:
            del arrays[name]
    for name in data.draw(st.lists(st.sampled_from(sorted(sizes)), max_size=2)):
        sizes[name] = data.draw(st.one_of(NUMBERS, st.integers(-1, 600)))
    int8, threads = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 3, 0, -1, 1025, 2**31, 2**40]))
    kernels = data.draw(st.sampled_from([*kernel_names(), "auto", "none"]))
    try:
        decoder = CompiledDecoder(sizes, arrays, kernels, threads, int8)
    except (ValueError, TypeError, RuntimeError):
        return
    shapes = [(sizes["n_layer"], sizes["d_inner"], sizes[last]) for last in ("d_conv", "d_state")]
    assert all(math.prod(shape) < 1 << 24 for shape in shapes)
    state = [np.zeros(shape, np.float32) for shape in shapes]
    logits = decoder.forward(decoder.embed(np.array([0, 1, sizes["vocab"] - 1])), *state, False)
    assert logits.shape == (sizes["vocab"],) and logits.dtype == np.float32


@TRIES
@given(data=st.data())
def test_calls_of_the_compiled_decoder(tiny, data):
    sizes, arrays = arguments_of(tiny)
    decoder = CompiledDecoder(sizes, arrays, "auto", 1, True)
    good = {
        "embeddings": np.zeros((3, sizes["d_model"]), np.float32),
        "conv": np.zeros((sizes["n_layer"], sizes["d_inner"], sizes["d_conv"]), np.float32),
        "ssm": np.zeros((sizes["n_layer"], sizes["d_inner"], sizes["d_state"]), np.float32),
    }
    name = data.draw(st.sampled_from(sorted(good)))
    strange = data.draw(st.sampled_from([replaced(data, good[name]), np.asfortranarray(good[name]), good[name][::-1]]))
    try:
        logits = decoder.forward(*(good | {name: strange}).values(), data.draw(st.booleans()))
        assert logits.shape[-1] == sizes["vocab"]
    except (ValueError, TypeError, RuntimeError):
        pass
    tokens = data.draw(st.one_of(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3), st.just([1, 2])))
    try:
        rows = decoder.embed(np.array(tokens, np.int64))
        assert rows.shape == (len(tokens), sizes["d_model"])
    except (IndexError, TypeError):
        assert not tokens or min(tokens) < 0 or max(tokens) >= sizes["vocab"]


@pytest.mark.parametrize("name", ["backbone.embedding.weight.codes", "backbone.layers.0.mixer.dt_proj.weight"])
@pytest.mark.parametrize("order", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]])
def test_an_array_that_is_not_contiguous(tiny, name, order):
    sizes, arrays = arguments_of(tiny)
    with pytest.raises(ValueError, match=name):
        CompiledDecoder(sizes, arrays | {name: order(arrays[name])}, "auto", 1, True)


def test_arrays_live_as_long_as_the_decoder(tiny):
    sizes, arrays = arguments_of(tiny)
    codes = weakref.ref(arrays["backbone.embedding.weight.codes"])
    decoder = CompiledDecoder(sizes, arrays, "auto", 1, True)
    arrays.clear()
    gc.collect()
    assert codes() is not None
    del decoder
    gc.collect()
    assert codes() is None


@pytest.mark.parametrize("change", [np.asfortranarray, lambda a: a.astype(np.float64)])
def test_a_state_that_would_not_be_changed_is_refused(tiny, change):
    sizes, arrays = arguments_of(tiny)
    decoder = CompiledDecoder(sizes, arrays, "auto", 1, True)
    conv, ssm = (np.zeros((sizes["n_layer"], sizes["d_inner"], sizes[n]), np.float32) for n in ("d_conv", "d_state"))
    with pytest.raises((ValueError, TypeError)):
        decoder.forward(decoder.embed(np.array([1])), change(conv), ssm, False)
