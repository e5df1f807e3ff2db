"""The table of panels as the JSON that Grafana imports (schema of Grafana 10 and later)."""

from __future__ import annotations

import json
from typing import Any

from vllm_kvpca.lab.dashboards.panels import ROWS, Panel

UID = "vllm-kvpca"
TITLE = "vLLM: compressed KV cache"
_WIDTH, _HEIGHT = 24, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_VARIABLES = ("job", "instance", "model_name", "engine")
_UNITS = {"x": "suffix:x"}


def render() -> str:
    """The dashboard's file."""
    return json.dumps(_dashboard(), indent=2) + "\n"


def _dashboard() -> dict[str, Any]:
    return {
        "uid": UID,
        "title": TITLE,
        "description": "Made by vllm-kvpca dashboards; do not edit by hand.",
        "tags": ["vllm", "kvpca"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "title": "vLLM",
                "tags": ["vllm"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_datasource(), *_chained_variables()]},
        "panels": _place(),
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Datasource",
        "type": "datasource",
        "query": "prometheus",
    }


def _chained_variables() -> list[dict[str, Any]]:
    """Each choice narrows the next."""
    variables = []
    for index, name in enumerate(_VARIABLES):
        chosen = ",".join(f'{before}=~"${before}"' for before in _VARIABLES[:index])
        query = f"label_values(kvpca_preset_info{{{chosen}}}, {name})"
        variables.append(
            {
                "name": name,
                "type": "query",
                "datasource": _DATASOURCE,
                "query": {"query": query, "refId": name},
                "definition": query,
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return variables


def _place() -> list[dict[str, Any]]:
    """Rows below each other; panels share a row's width, at most four side by side."""
    placed: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        position = {"x": 0, "y": top, "w": _WIDTH, "h": 1}
        placed.append({"type": "row", "title": row.title, "gridPos": position, "panels": []})
        top += 1
        for first in range(0, len(row.panels), 4):
            line = row.panels[first : first + 4]
            width = _WIDTH // len(line)
            for column, panel in enumerate(line):
                position = {"x": column * width, "y": top, "w": width, "h": _HEIGHT}
                placed.append({**_panel(panel), "gridPos": position})
            top += _HEIGHT
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": _UNITS.get(panel.unit, panel.unit),
        "thresholds": {"mode": "absolute", "steps": _thresholds(panel)},
    }
    if panel.unit == "percentunit":
        defaults |= {"min": 0, "max": 1}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        style = "line" if panel.warn is not None else "off"
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 10,
            "stacking": stacking,
            "thresholdsStyle": {"mode": style},
        }
    return defaults


def _thresholds(panel: Panel) -> list[dict[str, Any]]:
    if panel.warn is None or panel.alarm is None:
        return [{"color": "green", "value": None}]
    falling = panel.alarm < panel.warn
    colours = ("red", "orange", "green") if falling else ("green", "orange", "red")
    limits = (None, *sorted((panel.warn, panel.alarm)))
    return [{"color": c, "value": v} for c, v in zip(colours, limits, strict=True)]


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
