"""The Grafana dashboard, made from a table of panels that is checked against the metrics."""

from vllm_kvpca.lab.dashboards.grafana import render
from vllm_kvpca.lab.dashboards.panels import ROWS, SELECTOR, Panel, Query, Row, panels, undefined

__all__ = ["ROWS", "SELECTOR", "Panel", "Query", "Row", "panels", "render", "undefined"]
