"""Docstrings of public functions that take or return arrays state shape and dtype."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARE_MIN = 0.9  # of these functions in the package; raised when it grows
ARRAY = re.compile(r"\b(ndarray|Tensor)\b")
# A shape such as (seq, d_model), (vocab,) or (out, in / group), whose entries are sizes and not words; or the word.
SHAPE = re.compile(r"\((?:[\w.…²]+(?: ?[·*/+-] ?[\w.…²]+)*, ?)+(?:[\w.…²]+(?: ?[·*/+-] ?[\w.…²]+)*)?\)|\bshapes?\b")
DTYPE = re.compile(r"\bu?int(8|16|32|64)\b|\bb?float(16|32|64)\b|\bbool\b|\bdtypes?\b")
REFERENCE = re.compile(r"(See|Do what|Compute|Undo) `")  # to a function with the same contract

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Yield public functions of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield node


def takes_or_returns_arrays(function: Function) -> bool:
    """Return whether a parameter or the result is annotated with an array, or with a collection of them."""
    arguments = function.args
    given = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return any(ARRAY.search(ast.unparse(annotation)) for annotation in (*given, function.returns) if annotation)


def states_shape_and_dtype(docstring: str) -> bool:
    return bool(REFERENCE.match(docstring) or (SHAPE.search(docstring) and DTYPE.search(docstring)))


def test_array_functions_state_shape_and_dtype() -> None:
    silent, total = [], 0
    for file in sorted((ROOT / "cobra_edge").rglob("*.py")):
        for function in public_functions(ast.parse(file.read_text(encoding="utf-8"))):
            if takes_or_returns_arrays(function):
                total += 1
                if not states_shape_and_dtype(ast.get_docstring(function) or ""):
                    silent.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}")
    share = 1 - len(silent) / total
    assert share >= SHARE_MIN, f"{share:.1%} of {total}, expected {SHARE_MIN:.0%}; without:\n" + "\n".join(silent)


def test_the_rule() -> None:
    for good in (
        "Return x (seq, width) float32, rounded.",
        "Return logits.\n\nReturns:\n    (vocab,) float32.",
        "Pack codes (out, in) uint8 into bytes (out, in · weight_bits / 8) uint8.",
        "Return an array of the same shape and dtype.",
        "See `Decoder.step`.",
    ):
        assert states_shape_and_dtype(good), good
    for bad in (
        "Return x, rounded.",
        "Norm of float32 values (Zhang and Sennrich, 2019).",
        "Return x (seq, width).",
        "A shape.",
    ):
        assert not states_shape_and_dtype(bad), bad


def test_what_counts() -> None:
    source = """
def one(x: np.ndarray) -> int: ...
def other(x: int) -> list[Tensor]: ...
def plain(x: int) -> int: ...
def _hidden(x: Tensor) -> Tensor: ...
class Public:
    def method(self) -> np.ndarray: ...
class _Private:
    def method(self) -> np.ndarray: ...
"""
    names = [f.name for f in public_functions(ast.parse(source)) if takes_or_returns_arrays(f)]
    assert names == ["one", "other", "method"]
