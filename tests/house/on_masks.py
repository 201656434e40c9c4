"""One rule: a boolean mask is True where attention is allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.house.rules import Chapter, add, chapter_rule, runnable, where

MASK = re.compile(r"mask|causal|allowed|visible|keep|valid|\breal\b")


def mask_name(node: ast.expr) -> str:
    """The name of a mask that is used as it is, through indexing and reshaping; "" when it is inverted or no mask."""
    if isinstance(node, ast.Subscript):
        return mask_name(node.value)
    if isinstance(node, ast.BinOp):
        return mask_name(node.left) or mask_name(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return "" if node.func.attr == "logical_not" else mask_name(node.func.value)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name if MASK.search(name) else ""


def inverted_masks(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if attribute in ("masked_fill", "masked_fill_") and node.args and (name := mask_name(node.args[0])):
                yield f"masked_fill({name}, ...) fills where {name} is True; write masked_fill(~{name}, ...)"
            if (
                attribute == "where"
                and len(node.args) == 3
                and "inf" in ast.unparse(node.args[1])
                and (name := mask_name(node.args[0]))
            ):
                yield f"torch.where({name}, -inf, ...) blocks where {name} is True; swap its branches"
            for keyword in node.keywords:
                known = keyword.arg and keyword.arg.endswith("key_padding_mask")
                if known and not (
                    isinstance(keyword.value, ast.UnaryOp)
                    or ast.unparse(keyword.value) == "None"
                    or "logical_not" in ast.unparse(keyword.value)
                ):
                    yield f"{keyword.arg}= of torch.nn blocks where it is True; pass the inverse, {keyword.arg}=~real"
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            call = node.value
            method = not (isinstance(call.func.value, ast.Name) and call.func.value.id == "torch")
            shifts = [a for a in call.args[not method :] if isinstance(a, ast.Constant)] + [
                k.value for k in call.keywords if k.arg == "diagonal"
            ]
            names = [t.id for t in node.targets if isinstance(t, ast.Name) and MASK.search(t.id)]
            if call.func.attr == "triu" and names and any(isinstance(s, ast.Constant) and s.value > 0 for s in shifts):
                yield f"{names[0]} = triu(1) is True in the future; use .tril(), or name it `blocked` or `bias`"


@chapter_rule(
    "a boolean mask is True where attention is allowed, everywhere",
    add("scores = scores.masked_fill(mask[None], float('-inf'))"),
)
def one_notation_for_masks(chapter: Chapter) -> Iterator[str]:
    for cell in chapter.cells:
        sources = (
            [cell["source"]]
            if cell["cell_type"] == "code"
            else re.findall(r"```python\n(.*?)```", cell["source"], re.S)
        )
        for source in sources:
            try:
                tree = ast.parse(runnable(source))
            except SyntaxError:
                continue  # a fragment in prose
            yield from (f"{where(cell)}: {problem}" for problem in inverted_masks(tree))
