"""Runs the notebooks of this folder from the top and writes their outputs into them. Needs no Jupyter.

    python examples/notebooks/render.py                             # all of them
    python examples/notebooks/render.py reading_a_run.ipynb

What a cell prints is kept as text, and what its last line is worth as text or, for a matplotlib figure, as a picture.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def outputs_of(cells: Sequence[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    """Runs the code cells in order in one namespace; the outputs of each, as a notebook stores them."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(cells, start=1):
        tree = ast.parse("".join(cell["source"]), f"{name}[{number}]")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"{name}[{number}]", "exec"), namespace)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"{name}[{number}]", "eval"), namespace)
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
        if value is not None:
            data = {"data": shown(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"}
            outputs.append(data)
        found.append(outputs)
    return found


def shown(value: Any) -> dict[str, Any]:
    """A value by MIME type: a figure as PNG, anything else by its repr."""
    if not hasattr(value, "savefig"):
        return {"text/plain": [repr(value)]}
    png = io.BytesIO()
    value.savefig(png, format="png", dpi=80)
    return {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<a figure>"]}


def render(path: Path) -> None:
    """Runs one notebook in its own folder and writes it back with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with contextlib.chdir(path.parent):
        all_outputs = outputs_of(cells, path.name)
    for number, (cell, outputs) in enumerate(zip(cells, all_outputs, strict=True), start=1):
        cell |= {"execution_count": number, "outputs": outputs}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for chosen in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        render(FOLDER / chosen)
        print(f"{chosen}: run from the top and written")
