"""The files that a page loads: those of every page (style, icon, Markdown view) and those of one app."""

from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

SHARED = Path(__file__).parent / "static"


def serve_files(app: FastAPI, own: Path) -> None:
    """Adds `/static/{name}`: the files of the folder `own` and the shared ones, by name alone, nothing else."""
    files = {path.name: path for folder in (SHARED, own) for path in folder.iterdir() if path.is_file()}

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, f"no file {name!r}")
        return FileResponse(files[name])
