"""Bundles: complete ones open, everything else is refused with a reason."""

import errno
import json
import os
import shutil

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cobra_edge import inspect
from cobra_edge.bundle.reader import DECODER, GOLDEN, MANIFEST, PROMPT, TOKENIZER, Bundle, file_sha256, staged_directory
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.errors import BundleError, InputError, MachineError
from cobra_edge.files import staging
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.recipe import StoredTensor, stored_tensors
from cobra_edge.formats.safetensors_file import SafetensorsWriter, read_tensors
from cobra_edge.terminal.output import run_command


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """Return a copy that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit_manifest(bundle, change):
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def rehash(bundle, name):
    """Make the manifest agree with an edited file, as an attacker would."""
    entry = {"bytes": (bundle / name).stat().st_size, "sha256": file_sha256(bundle / name)}
    edit_manifest(bundle, lambda m: m["files"].update({name: entry}))


def test_a_whole_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert set(opened.manifest.files) == {DECODER, TOKENIZER, PROMPT, GOLDEN, "README.md"}
    assert opened.manifest.drift is not None and opened.manifest.drift.lines == 16
    assert "Drift from the float model" in (bundle / "README.md").read_text()
    assert not any(f.name.startswith(".") for f in bundle.parent.iterdir())


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_clips_that_clip_nothing_sensible_are_refused(bundle, bad):
    name = "backbone.layers.1.mixer.out_proj.weight"
    whole = Bundle.open(bundle)
    recipe = msgspec.structs.replace(whole.manifest.recipe, activation_percentile=99.9)
    clipped = Bundle(bundle, msgspec.structs.replace(whole.manifest, recipe=recipe))
    with pytest.raises(BundleError, match=r"missing tensors \['backbone.embedding.weight.clips'"):
        clipped.decoder_tensors()
    tensors, plan = load_file(bundle / DECODER), stored_tensors(whole.manifest.model.mamba, recipe)
    for value in (1.0, bad):
        with SafetensorsWriter(bundle / DECODER, [t for entries in plan.values() for t in entries]) as writer:
            for t in (t for entries in plan.values() for t in entries):
                values = tensors.get(t.name, np.ones(t.shape, np.float32))
                if t.name == f"{name}.clips":
                    values[-1] = value
                writer.write(t.name, values)
        if value == 1.0:
            read = clipped.decoder_tensors()[name]
            assert isinstance(read, QuantizedTensor) and read.clips is not None and np.array_equal(read.clips, [1, 1])
    with pytest.raises(BundleError, match=rf"{name}.clips holds values that are not positive and finite"):
        clipped.decoder_tensors()


@pytest.mark.parametrize("name", [DECODER, GOLDEN, TOKENIZER, PROMPT, "README.md"])
def test_a_flipped_byte(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_a_missing_or_shorter_file(bundle):
    os.truncate(bundle / DECODER, 1000)
    with pytest.raises(BundleError, match=r"1000 bytes, the manifest says"):
        Bundle.open(bundle)
    (bundle / DECODER).unlink()
    with pytest.raises(BundleError, match=r"decoder\.safetensors is missing"):
        Bundle.open(bundle)


def test_a_file_the_manifest_forgot(bundle):
    edit_manifest(bundle, lambda m: m["files"].pop(GOLDEN))
    with pytest.raises(BundleError, match=r"lists no golden\.safetensors"):
        Bundle.open(bundle)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_an_unknown_version(bundle, version):
    edit_manifest(bundle, lambda m: m.update(schema_version=version))
    with pytest.raises(BundleError, match="schema_version"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", ".hidden", "a//b", "x\n"])
def test_a_path_that_leaves_the_bundle(bundle, name):
    (bundle.parent / "secret").write_text("s")
    edit_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": file_sha256(bundle.parent / "secret")}}))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle)


def test_a_symlink_that_leaves_the_bundle(bundle):
    shutil.move(bundle / TOKENIZER, bundle.parent / "elsewhere.json")
    (bundle / TOKENIZER).symlink_to(bundle.parent / "elsewhere.json")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "mamba", "d_model"), -1),
        (("model", "mamba", "d_model"), 1 << 40),
        (("model", "mamba", "n_layer"), "2"),
        (("model", "mamba", "norm_eps"), 5.0),
        (("model", "prompt_style"), "shouted"),
        (("model", "surprise"), 1),
        (("recipe", "tensors"), []),
        (("files",), {DECODER: {"bytes": "many", "sha256": ""}}),
        (("drift", "lines"), None),
    ],
)
def test_a_manifest_out_of_bounds(bundle, path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    edit_manifest(bundle, change)
    with pytest.raises(BundleError):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 1}'])
def test_a_manifest_that_is_none(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path / "nowhere")


def wrong_dtype(tensors):
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].astype(np.float16)


def wrong_shape(tensors):
    name = "backbone.layers.0.mixer.in_proj.weight.codes"
    tensors[name] = tensors[name][:-1]


def one_missing(tensors):
    del tensors["backbone.layers.1.mixer.A_log"]


def one_more(tensors):
    tensors["payload"] = np.zeros(3, np.float32)


@pytest.mark.parametrize("change", [wrong_dtype, wrong_shape, one_missing, one_more])
def test_tensors_that_do_not_fit_the_config(bundle, change):
    tensors = load_file(bundle / DECODER)
    change(tensors)
    save_file(tensors, bundle / DECODER)
    rehash(bundle, DECODER)
    with pytest.raises(BundleError):
        NumpyDecoder(Bundle.open(bundle))


def test_a_config_larger_than_its_tensors(bundle):
    edit_manifest(bundle, lambda m: m["model"]["mamba"].update(vocab=1024))
    with pytest.raises(BundleError, match="expected"):
        NumpyDecoder(Bundle.open(bundle))


def flip_a_byte(bundle):
    data = bytearray((bundle / DECODER).read_bytes())
    data[-1] ^= 1
    (bundle / DECODER).write_bytes(data)


def lose_a_file(bundle):
    (bundle / TOKENIZER).unlink()


def come_from_the_future(bundle):
    edit_manifest(bundle, lambda m: m.update(schema_version=99))


def leave(bundle):
    edit_manifest(bundle, lambda m: m["files"].update({"../secret": m["files"][DECODER]}))


def forge_golden_lines(bundle):
    (bundle / GOLDEN).write_bytes(b"junk")
    rehash(bundle, GOLDEN)


@pytest.mark.parametrize("change", [flip_a_byte, lose_a_file, come_from_the_future, leave, forge_golden_lines])
def test_the_command_says_it_in_one_line(bundle, change, capfd):
    change(bundle)
    assert run_command(inspect.command, [str(bundle)]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and captured.out == ""


def test_a_prompt_file_of_another_model(bundle):
    (bundle / PROMPT).write_bytes(msgspec.json.encode({"style": "zephyr", "end": "<|endoftext|>", "end_id": 0}))
    rehash(bundle, PROMPT)
    with pytest.raises(BundleError, match="does not match"):
        Bundle.open(bundle).text()


def test_a_tokenizer_larger_than_the_model(bundle):
    edit_manifest(bundle, lambda m: m["model"]["mamba"].update(vocab=64))
    with pytest.raises(InputError, match="of another model"):
        Bundle.open(bundle).text()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "9"}'])
def test_a_tokenizer_that_is_none(bundle, content):
    (bundle / TOKENIZER).write_bytes(content)
    rehash(bundle, TOKENIZER)
    with pytest.raises(InputError, match="unsupported tokenizer"):
        Bundle.open(bundle).text()


def test_written_piece_by_piece_reads_whole(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.codes": np.arange(5, dtype=np.uint8)}
    plan = [StoredTensor(k, v.dtype.name, v.shape) for k, v in values.items()]
    with SafetensorsWriter(tmp_path / "t.safetensors", plan) as writer:
        for name, value in values.items():
            writer.write(name, value)
    read = load_file(tmp_path / "t.safetensors")
    assert all(np.array_equal(read[k], v) for k, v in values.items())
    length = int.from_bytes((tmp_path / "t.safetensors").read_bytes()[:8], "little")
    assert (length + 8) % 64 == 0


def test_a_git_lfs_pointer_is_told(bundle):
    (bundle / DECODER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(BundleError, match=r"decoder\.safetensors: a Git LFS pointer.*git lfs pull"):
        Bundle.open(bundle)


def test_staging_keeps_what_is_not_a_bundle(tmp_path):
    goal = tmp_path / "work"
    goal.mkdir()
    (goal / "thesis.txt").write_text("years")
    for force in (False, True):
        with pytest.raises(InputError, match="will not be overwritten"), staged_directory(goal, force=force, needed_bytes=0):
            pytest.fail("reached")
    assert (goal / "thesis.txt").read_text() == "years"


def test_staging_replaces_a_bundle_only_when_told(bundle):
    with pytest.raises(InputError, match="--force"), staged_directory(bundle, force=False, needed_bytes=0):
        pytest.fail("reached")
    with staged_directory(bundle, force=True, needed_bytes=0) as stage:
        (stage / "new").write_text("new")
        assert (bundle / MANIFEST).exists()
    assert [f.name for f in bundle.iterdir()] == ["new"]
    assert [f.name for f in bundle.parent.iterdir()] == ["bundle"]


def test_a_full_disk_is_seen_before_work_begins(tmp_path):
    with (
        pytest.raises(MachineError, match="GB free, about"),
        staged_directory(tmp_path / "out", force=False, needed_bytes=1 << 60),
    ):
        pytest.fail("reached")
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_a_bundle_is_replaced_keeps_the_old_one(bundle, monkeypatch):
    real, calls = os.rename, []
    monkeypatch.setattr(staging, "exchange", lambda one, other: False)  # a file system that cannot

    def rename(source, goal):
        calls.append(goal)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, goal)

    monkeypatch.setattr(os, "rename", rename)
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt), staged_directory(bundle, force=True, needed_bytes=0) as stage:
        (stage / MANIFEST).write_text("new")
    assert (bundle / MANIFEST).read_bytes() == before
    assert [f.name for f in bundle.parent.iterdir()] == [bundle.name]


def test_weights_beside_the_graph_that_nobody_vouches_for(bundle):
    (bundle / "vision.onnx.data").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"vision\.onnx\.data is not listed in the manifest"):
        Bundle.open(bundle)


def test_a_manifest_nested_without_end(bundle):
    (bundle / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(bundle)


def test_a_tokenizer_that_would_cut_prompts_does_not(bundle):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / TOKENIZER))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(bundle / TOKENIZER))
    rehash(bundle, TOKENIZER)
    codec, _ = Bundle.open(bundle).text()
    assert len(codec.encode("one two three four five six seven")) > 4


def test_mapped_tensors_are_those_that_are_read(bundle):
    from cobra_edge.formats.safetensors_file import map_tensors, read_tensors

    read = read_tensors(bundle / DECODER)
    mapped = map_tensors(bundle / DECODER, [StoredTensor(k, v.dtype.name, v.shape) for k, v in read.items()])
    assert all(np.array_equal(mapped[k], v) and not mapped[k].flags.writeable for k, v in read.items())


def test_an_unaligned_tensor_is_copied(tmp_path):
    from cobra_edge.formats.safetensors_file import map_tensors

    file = tmp_path / "odd.safetensors"
    wanted = [StoredTensor("a", "uint8", (3,)), StoredTensor("b", "float32", (2,))]
    with SafetensorsWriter(file, wanted) as writer:
        writer.write("a", np.array([1, 2, 3], np.uint8))
        writer.write("b", np.array([4, 5], np.float32))
    mapped = map_tensors(file, wanted)
    assert mapped["b"].flags.aligned and mapped["b"].tolist() == [4, 5] and mapped["a"].tolist() == [1, 2, 3]


def test_a_safetensors_file_is_on_the_disk_when_it_is_done(tmp_path, monkeypatch):
    synced, values = [], np.arange(6, dtype=np.float32).reshape(2, 3)
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append((tmp_path / "x").stat().st_size))
    with SafetensorsWriter(tmp_path / "x", [StoredTensor("a", "float32", (2, 3))]) as writer:
        writer.write("a", values)
    assert synced == [(tmp_path / "x").stat().st_size]
    assert np.array_equal(read_tensors(tmp_path / "x")["a"], values)


def test_a_disk_that_fails_at_the_end_is_told(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        pytest.raises(MachineError, match="No space left"),
        staged_directory(tmp_path / "b", force=False, needed_bytes=0) as stage,
        SafetensorsWriter(stage / "x", []),
    ):
        pass
    assert not list(tmp_path.iterdir())
