"""Swagger UI from the files of an installed package. The page loads nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

ASSETS = "/docs/assets"
# The browser refuses what does not come from here. The page itself has a script and styles in line.
POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def add_page(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        html = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS[1:]}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS[1:]}/swagger-ui.css",
            swagger_favicon_url="data:,",
            swagger_ui_parameters={"validatorUrl": None},  # it would send the description elsewhere
        )
        html.headers["Content-Security-Policy"] = POLICY
        return html

    app.mount(ASSETS, StaticFiles(directory=str(files("fastapi_offline") / "static")))
