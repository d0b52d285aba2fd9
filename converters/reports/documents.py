"""Reports as plain data: the one document that `--json` prints."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from converters.conversion import Conversion, Inspection
from converters.mapping import Mapping

if TYPE_CHECKING:
    from converters.checking import Check
    from converters.demo import Demo

__all__ = ["check_document", "conversion_document", "demo_document", "family_document", "inspection_document"]


def inspection_document(inspection: Inspection) -> dict[str, Any]:
    """Everything that `inspect` found out; shapes in elements, sizes in bytes."""
    checkpoint, plan = inspection.checkpoint, inspection.plan
    specs = checkpoint.specs.values()
    return {
        "inspection": 1,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "writer": checkpoint.writer,
        "integrity": checkpoint.integrity,
        "wrappers": list(checkpoint.wrappers),
        "bytes": sum(spec.nbytes for spec in specs),
        "dtypes": dict(Counter(spec.dtype for spec in specs)),
        "family": plan.mapping.name if plan else None,
        "target": {"architecture": plan.skeleton.architecture, "args": plan.skeleton.args} if plan else None,
        "nearest": asdict(inspection.nearest) if inspection.nearest else None,
        "caveats": [*(plan.caveats if plan else ()), *checkpoint.notes],
        "reason": inspection.reason or None,
        "set_aside": checkpoint.set_aside,
        "metadata": _plain(checkpoint.metadata),
        "tensors": [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in specs],
    }


def conversion_document(conversion: Conversion) -> dict[str, Any]:
    """conversion.json, and where it went."""
    return {**conversion.record, "directory": str(conversion.directory) if conversion.directory else None}


def demo_document(demo: Demo) -> dict[str, Any]:
    """The demo's three steps, and the accuracies as shares."""
    return {
        "demo": 1,
        "inspection": inspection_document(demo.inspection),
        "conversion": conversion_document(demo.conversion),
        "verification": json.loads(demo.verdict.to_json()),
        "accuracy_before": demo.accuracy_before,
        "accuracy_after": demo.accuracy_after,
    }


def family_document(mapping: Mapping) -> dict[str, Any]:
    """A family: its targets, what it refuses, and the references that it can be verified against."""
    return {
        "family": mapping.name,
        "title": mapping.title,
        "targets": "any" if mapping.any_target else list(mapping.targets),
        "target_args": mapping.target_args,
        "references": [reference.runner for reference in mapping.references],
        "refuses": [refusal.reason for refusal in mapping.refuse],
    }


def check_document(check: Check) -> dict[str, Any]:
    """A mapping's findings and cases; the worst error is of all outputs, the smallest margin of all mutants."""
    return {
        "check": 1,
        "family": check.mapping.name,
        "exit_code": check.exit_code,
        "findings": [asdict(finding) for finding in check.findings],
        "cases": [
            {
                **{key: value for key, value in vars(case).items() if key != "verdict"},
                "worst_error": case.worst_error,
                "smallest_margin": case.smallest_margin,
                "verification": json.loads(case.verdict.to_json()) if case.verdict else None,
            }
            for case in check.cases
        ],
    }


def _plain(value: Any) -> Any:
    """JSON's own types; anything else, and numbers that JSON lacks, as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and value - value == 0):
        return value
    return repr(value)[:200]
