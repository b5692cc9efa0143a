"""Write the Grafana dashboard from a list of panels: `generate.py`, or `generate.py --check` to compare only.

The dashboard is shipped as JSON because Grafana reads JSON; this file is what people edit. tests/test_deploy.py holds
the two together and every query against the metrics that the server registers.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "strace-llm.json"
COLUMNS = 24  # the width of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Panel:
    """One panel: `queries` maps a legend (Grafana's `{{label}}` templates) to PromQL; `unit` is a Grafana unit id."""

    title: str
    description: str
    queries: dict[str, str]
    unit: str
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    maximum: float | None = None


def increase_rate(metric: str, by: str = "") -> str:
    """Increase per second of a counter, summed over all labels but `by` (comma-separated)."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(strace_llm_{metric}[$__rate_interval]))"


def ratio(numerator: str, denominator: str, by: str = "") -> str:
    """Quotient of two counters' rates over the same labels; no data, rather than NaN, where nothing happened."""
    return f"{increase_rate(numerator, by)} / ({increase_rate(denominator, by)} > 0)"


def quantiles(histogram: str) -> dict[str, str]:
    """A query for each of `QUANTILES` of a histogram, over all its labels."""
    buckets = increase_rate(f"{histogram}_bucket", "le")
    return {f"p{q * 100:g}": f"histogram_quantile({q}, {buckets})" for q in QUANTILES}


SPEEDUP = ("decode_full_equivalent_seconds_total", "decode_seconds_total")
ACCEPTANCE = ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")
TOKENS = "generation_tokens_total"
HELD = 'prefix_tokens_total{outcome="hit"}'

PANELS = [
    Panel(
        "Realised speedup",
        "Time the full model would have needed for the same tokens, at its measured step cost, over the time taken.",
        {"speedup": ratio(*SPEEDUP)},
        "none",
        kind="stat",
        width=6,
        height=4,
    ),
    Panel(
        "Acceptance",
        "Accepted share of the drafted tokens.",
        {"acceptance": ratio(*ACCEPTANCE)},
        "percentunit",
        kind="stat",
        width=6,
        height=4,
    ),
    Panel(
        "Fallbacks per token",
        "Full passes caused by a draft's low confidence or rejection, per generated token.",
        {"fallbacks": ratio("fallbacks_total", TOKENS)},
        "none",
        kind="stat",
        width=6,
        height=4,
    ),
    Panel(
        "Throughput",
        "Generated tokens per second.",
        {"tokens/s": increase_rate(TOKENS)},
        "none",
        kind="stat",
        width=6,
        height=4,
    ),
    Panel(
        "Realised speedup by mode and class",
        "Below 1 the subgraph costs more than it saves.",
        {"{{mode}} {{class}}": ratio(*SPEEDUP, "mode, class")},
        "none",
    ),
    Panel(
        "Acceptance by class",
        "Accepted share of the drafted tokens.",
        {"{{class}}": ratio(*ACCEPTANCE, "class")},
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Accepted at each draft position",
        "Tokens accepted at a position, per cycle that drafted: how far down a draft is worth going.",
        {
            "position {{position}}": f"{increase_rate('spec_decode_num_accepted_tokens_per_pos_total', 'position')}"
            f" / on () group_left () ({increase_rate('spec_decode_num_drafts_total')} > 0)"
        },
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Fallbacks per second by class",
        "Full passes caused by a draft's low confidence or rejection.",
        {"{{class}}": increase_rate("fallbacks_total", "class")},
        "none",
    ),
    Panel(
        "Divergent share by class",
        "Divergent over all generated tokens; only routed tokens can diverge.",
        {"{{class}}": ratio("divergent_tokens_total", TOKENS, "class")},
        "percentunit",
    ),
    Panel(
        "Unverified share by class",
        "Tokens emitted before the full model had seen them, over all generated tokens.",
        {"{{class}}": ratio("unverified_tokens_total", TOKENS, "class")},
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Guard by mode, class and batch",
        "Realised speedup in paired blocks of drafting and plain full steps. Surely below 1, plain steps serve.",
        {"{{mode}} {{class}} {{batch}}": "avg by (mode, class, batch) (strace_llm_guard_speedup_ratio)"},
        "none",
    ),
    Panel(
        "Gate of routed by class and batch",
        "Emitting unverified over verifying all, in paired blocks. Not surely above 1, routed texts are verified.",
        {"{{class}} {{batch}}": "avg by (class, batch) (strace_llm_gate_speedup_ratio)"},
        "none",
    ),
    Panel(
        "Age of the guard's baseline",
        "Time since the last plain full step, by batch.",
        {"batch {{batch}}": "max by (batch) (strace_llm_guard_baseline_age_seconds)"},
        "s",
    ),
    Panel(
        "Auditor by class",
        "Evidence that routed text diverges by more than was promised: at 1 the class trips and is served exact. "
        "Once it tripped, evidence of its recovery.",
        {
            "{{class}}": "max by (class) (strace_llm_auditor_evidence_ratio)",
            "{{class}} tripped": "max by (class) (strace_llm_auditor_tripped)",
        },
        "none",
    ),
    Panel(
        "Tokens per second",
        "Generated tokens by mode, and prompt tokens.",
        {"{{mode}}": increase_rate(TOKENS, "mode"), "prompt": increase_rate("prompt_tokens_total")},
        "none",
    ),
    Panel(
        "Requests",
        "In the batch, and waiting for a place in it.",
        {"running": "sum (strace_llm_requests_running)", "waiting": "sum (strace_llm_requests_waiting)"},
        "none",
    ),
    Panel(
        "KV cache in use",
        "Share of the cache's blocks that hold a sequence.",
        {"{{instance}}": "strace_llm_kv_cache_usage_ratio"},
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Prompt tokens held already",
        "Share of the prompt tokens that were not read, because a text before began alike.",
        {"held": f"{increase_rate(HELD)} / ({increase_rate('prefix_tokens_total')} > 0)"},
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Preemptions per second",
        "Texts that lost their blocks of the KV cache to an older one, and were read anew.",
        {"preemptions": increase_rate("preemptions_total")},
        "none",
    ),
    Panel(
        "Time to first token",
        "From a request's submission to its first text.",
        quantiles("time_to_first_token_seconds"),
        "s",
    ),
    Panel(
        "Inter-token latency",
        "Time per token after the first of a request.",
        quantiles("inter_token_latency_seconds"),
        "s",
    ),
    Panel(
        "Requests and errors per second",
        "Finished requests by reason, refused or failed ones by type.",
        {
            "{{finish_reason}}": increase_rate("requests_total", "finish_reason"),
            "error: {{type}}": increase_rate("request_errors_total", "type"),
        },
        "reqps",
    ),
]


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Grafana's form of a panel at column `x` and row `y` of the grid."""
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard: panels fill the grid from left to right, row by row."""
    placed = []
    x = y = 0
    for number, panel in enumerate(PANELS, start=1):
        placed.append(panel_json(panel, number, x, y))
        x += panel.width
        if x >= COLUMNS:
            x, y = 0, y + panel.height
    return {
        "uid": "strace-llm",
        "title": "strace-llm",
        "schemaVersion": 41,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "panels": placed,
    }


def main() -> None:
    """Write the file, or with `--check` exit with a message where it is not what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the file is out of date")
    arguments = parser.parse_args()
    text = json.dumps(dashboard(), indent=2) + "\n"
    if arguments.check:
        if not DASHBOARD.exists() or DASHBOARD.read_text(encoding="utf-8") != text:
            parser.exit(1, f"{DASHBOARD} is out of date: run {Path(__file__).name}\n")
        return
    beside = DASHBOARD.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, DASHBOARD)


if __name__ == "__main__":
    main()
