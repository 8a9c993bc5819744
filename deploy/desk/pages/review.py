"""Review."""

from __future__ import annotations

from fastapi import APIRouter

from aisle.deploy.desk.desk import Desk


def routes(desk: Desk) -> APIRouter:
    return APIRouter(prefix="/review")
