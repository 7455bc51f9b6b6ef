"""Read and write bundles.

Opening reads the manifest, refuses unknown versions and anything out of bounds, then checks every file's size and hash (cached
by hash_cache.py). Each part is checked against the model config when it is read. Writing goes to a hidden directory next to the
destination, renamed at the end: an interrupted export leaves no partial bundle. docs/bundle.md has the format on one page.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import BundleError, InputError, MachineError
from ..files.git_lfs import is_pointer, pointer_message
from ..files.parsing import ParseError, parse_json
from ..files.staging import replaceable, staged_bundle
from ..formats.finite import require_finite
from ..formats.onnx_file import require_plain_graph
from ..formats.packing import QuantizedTensor
from ..formats.recipe import matrix_names, quantized_scheme, stored_tensors
from ..formats.safetensors_file import map_tensors
from ..inputs.image import ImageTransform
from ..inputs.text import PromptTemplate, TextCodec
from .hash_cache import content_sha256, first_changed
from .manifest import SCHEMA_VERSION, FileEntry, Manifest, PromptFile, VisionGraph

MANIFEST, DECODER, VISION, TOKENIZER = "manifest.json", "decoder.safetensors", "vision.onnx", "tokenizer.json"
PROMPT, IMAGE, GOLDEN, MODEL_CARD = "prompt.json", "image.json", "golden.safetensors", "README.md"
_MANIFEST_LIMIT_BYTES = 4 << 20
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")

Tensors = dict[str, "np.ndarray | QuantizedTensor"]


@dataclass(frozen=True)
class Bundle:
    """An open, validated bundle."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path | str, *, thorough: bool = False) -> Bundle:
        """Open and check a bundle.

        Args:
            directory: the bundle's directory.
            thorough: hash every file, ignoring the hash cache.

        Raises:
            BundleError: not a bundle, incomplete, modified, of another version, or with files outside its directory.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        bundle = cls(directory, manifest)
        needed = {DECODER, TOKENIZER, PROMPT, GOLDEN} | ({VISION, IMAGE} if manifest.model.vision else set())
        absent = sorted(needed - manifest.files.keys())
        if absent:
            raise BundleError(f"{directory}: the manifest lists no {', '.join(absent)}; export the bundle again")
        unvouched = sorted(manifest.engines.keys() - manifest.files.keys())
        if unvouched:
            raise BundleError(f"{directory}: the manifest has no hash of {', '.join(unvouched)}; export the bundle again")
        for name, entry in manifest.files.items():
            _check_place_and_size(directory, name, entry)
        changed = first_changed([(directory / name, e.sha256) for name, e in manifest.files.items()], thorough=thorough)
        if changed is not None:
            raise BundleError(
                f"{changed}: its content differs from what was exported (sha256 differs); copy or export it again"
            )
        # onnxruntime would read external weights next to the graph even if the manifest does not list them.
        stray = sorted(f.name for f in directory.glob(f"{VISION}*") if f.name not in manifest.files)
        if stray:
            raise BundleError(f"{directory}: {', '.join(stray)} is not listed in the manifest; do not use this bundle")
        return bundle

    @property
    def vision_graph(self) -> VisionGraph:
        """How vision.onnx was made."""
        return self.manifest.vision or VisionGraph()

    @property
    def graph_files(self) -> dict[str, str]:
        """{file name: sha256} of the vision graph and its external data."""
        return {name: entry.sha256 for name, entry in self.manifest.files.items() if name.startswith(VISION)}

    def graph_file(self) -> Path:
        """Return the path of vision.onnx, validated for a runtime.

        Raises:
            BundleError: the graph is more than plain arithmetic on tensors that the manifest lists.
        """
        files = self.manifest.files
        require_plain_graph(self.path(VISION), {name: files[name].bytes for name in self.graph_files if name != VISION})
        return self.path(VISION)

    def path(self, name: str) -> Path:
        """Return the path of one of the bundle's files."""
        return self.directory / name

    def decoder_tensors(self, *, thorough: bool = False) -> Tensors:
        """Memory-map decoder.safetensors, read-only; each tensor is checked against the model config and the recipe.

        Args:
            thorough: look for NaN and infinity in float matrices and scales too, which reads most of the file. Norms,
                convolutions and the parameters of the recurrence are always checked.

        Raises:
            BundleError: a tensor is missing, unexpected, or of the wrong dtype or shape; a value is NaN or infinite; a clip is
                not positive.
        """
        recipe, config = self.manifest.recipe, self.manifest.model.mamba
        try:
            plan = stored_tensors(config, recipe)
        except InputError as error:
            raise BundleError(f"{self.directory}: {error}") from error
        arrays = map_tensors(self.path(DECODER), [t for entries in plan.values() for t in entries])
        small = plan.keys() - set(matrix_names(config))
        for name in arrays if thorough else small:
            require_finite(self.path(DECODER), name, arrays[name])
        tensors: Tensors = {}
        for name in plan:
            scheme = quantized_scheme(recipe, name)
            if scheme is None:
                tensors[name] = arrays[name]
            else:
                clips = arrays.get(f"{name}.clips")
                if clips is not None and not (np.isfinite(clips).all() and (clips > 0).all()):
                    raise BundleError(
                        f"{self.path(DECODER)}: {name}.clips holds values that are not positive and finite; export it again"
                    )
                tensors[name] = QuantizedTensor(arrays[f"{name}.codes"], arrays[f"{name}.scales"], scheme, clips)
        return tensors

    def text(self) -> tuple[TextCodec, PromptTemplate]:
        """Return tokenizer and prompt template. Raises InputError if they do not match the model."""
        codec = TextCodec.open(self.path(TOKENIZER), self.manifest.model.mamba.vocab)
        prompt = _decode(self.path(PROMPT), PromptFile)
        if prompt.end_id != codec.end_id or prompt.style != self.manifest.model.prompt_style:
            raise BundleError(f"{self.directory}: {PROMPT} does not match {TOKENIZER} and the manifest; export again")
        return codec, PromptTemplate(prompt.style)

    def image(self) -> ImageTransform:
        """Return the image transform. Raises BundleError if it does not match the model."""
        transform = _decode(self.path(IMAGE), ImageTransform)
        if transform != ImageTransform.of(self.manifest.model, self.vision_graph.input):
            raise BundleError(f"{self.directory}: {IMAGE} does not match the model config; export again")
        return transform


def _decode(file: Path, kind: type[Any]) -> Any:
    try:
        return parse_json(file.read_bytes(), kind)
    except (OSError, ParseError) as error:
        raise BundleError(f"{file}: {error}; export the bundle again") from error


def _read_manifest(directory: Path) -> Manifest:
    file = directory / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{directory} is not a bundle, it has no {MANIFEST}; create one with: python -m cobra_edge.export --target cpu"
        )
    if file.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{file}: {file.stat().st_size} bytes, too large for a manifest")
    data = _decode(file, dict[str, Any])
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{directory}: schema_version is {version!r}, this cobra_edge reads {SCHEMA_VERSION}; "
            "export the bundle again with this version, or install the version that made it"
        )
    try:
        return msgspec.convert(data, Manifest)
    except (msgspec.ValidationError, InputError) as error:
        raise BundleError(f"{file}: {error}") from error


def _check_place_and_size(directory: Path, name: str, entry: FileEntry) -> None:
    file = directory / name
    try:
        inside = _SAFE_NAME.fullmatch(name) and directory.resolve() in file.resolve().parents
        size = file.stat().st_size if inside and file.is_file() else None
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:  # name too long; a loop of links, which is a RuntimeError before Python 3.13
        raise BundleError(
            f"{directory}: the manifest lists {name[:80]!r}, which cannot be resolved ({type(error).__name__}); "
            "copy or export the bundle again"
        ) from error
    if not inside:
        raise BundleError(f"{directory}: the manifest lists {name!r}, which is outside the bundle; do not use this bundle")
    if size is None:
        raise BundleError(f"{directory}: {name} is missing; copy the whole directory, or export again")
    if size != entry.bytes:
        if is_pointer(file):
            raise BundleError(pointer_message(file))
        raise BundleError(f"{file}: {size} bytes, the manifest says {entry.bytes}; copy or export the bundle again")


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with file.open("rb", buffering=0) as stream:
        return content_sha256(stream)


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Return size and hash of every file in a directory except the manifest."""
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name != MANIFEST)
    return {f.relative_to(directory).as_posix(): FileEntry(f.stat().st_size, file_sha256(f)) for f in files}


@contextmanager
def staged_directory(goal: Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield a hidden directory next to `goal` that is renamed to it if the block succeeds, and removed otherwise.

    Args:
        goal: destination of the bundle.
        force: replace an existing bundle; anything else is never replaced.
        needed_bytes: compared with the free disk space first.

    Raises:
        InputError: goal exists, or its parent is not writable; or something appeared at goal in the meantime: then the bundle
            is kept under another name, which the message gives.
        MachineError: the disk is full.
    """
    try:
        check_goal(goal, force=force)
    except OSError as error:
        raise InputError(f"{goal}: cannot be written ({error.strerror}); choose another --out") from error
    with staged_bundle(goal, force=force, marker=MANIFEST) as stage:
        free = shutil.disk_usage(stage).free
        if free < needed_bytes:
            raise MachineError(
                f"{goal.parent}: {free / 1e9:.2f} GB free, about {needed_bytes / 1e9:.2f} GB needed; free some space"
            )
        yield stage


def check_goal(goal: Path, *, force: bool) -> None:
    """Raise InputError if an export must not write to `goal`: something else is there, or --force is missing."""
    if not goal.exists():
        return
    if os.path.ismount(goal) or goal.samefile(Path.cwd()):
        raise InputError(f"{goal} is a mount point or the current directory and cannot be replaced; give a path inside it")
    if not replaceable(goal, MANIFEST):
        raise InputError(f"{goal} exists and is not a bundle; it will not be overwritten, choose another --out")
    if not force and (goal / MANIFEST).is_file():
        raise InputError(f"{goal} exists; pass --force to replace it, or choose another --out")
