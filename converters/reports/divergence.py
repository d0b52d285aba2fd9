"""Where two models part, as text: the modules in the order in which they ran, folded except on the way to the fault.

    conv1, bn1, layer1    16 modules agree, worst 1.1e-15
    layer2
      layer2.0
        conv1             differs by 3.1e-02 and on the reference's own input by 3.1e-02  <- the fault
        bn1 ... layer2.0  8 modules differ, and agree on the reference's own input
    layer3 ... fc         20 modules differ, and agree on the reference's own input

And the lines around it: how many agree, what was not checked and why, what is declared differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from converters.verifier.verdict import Tap, Unchecked, Verdict

__all__ = ["divergence_lines", "summary_lines"]


def summary_lines(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Labels and texts about the modules, whether they agree or not."""
    for tap in verdict.taps:
        if tap.target == verdict.culprit:
            yield "fault", f"{tap.target}, from {tap.source} by line {tap.line} of the mapping"
    if verdict.taps:
        local = [tap for tap in verdict.taps if tap.local_error is not None]
        agree = sum(tap.passed for tap in verdict.taps)
        text = f"{agree} of {len(verdict.taps)} agree, worst {max(tap.error for tap in verdict.taps):.1e}"
        if local:
            text += f"; {sum(bool(tap.local_passed) for tap in local)} of {len(local)} on the reference's own input"
        yield "modules", text
    reasons: dict[str, list[str]] = {}
    pairs: list[Tap | Unchecked] = [*verdict.unchecked, *(tap for tap in verdict.taps if tap.local_passed is None)]
    for one in pairs:
        reasons.setdefault(str(one.reason), []).append(one.target)
    for reason, targets in reasons.items():
        more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        yield "unchecked", f"{targets[0]}{more}: {reason}"
    for finding in verdict.audit:
        if verdict.culprit is None or verdict.culprit in finding.modules:
            yield "audit", str(finding)


def divergence_lines(verdict: Verdict) -> Iterator[str]:
    """The tree, down to the culprit or, where there is none, to the first module that differs."""
    divergence, culprit = verdict.first_divergence, verdict.culprit
    if fault := culprit or (divergence and divergence.target):
        yield from _lines(verdict.taps, tuple(fault.split(".")), 0, culprit)


def _lines(taps: Sequence[Tap], way: tuple[str, ...], depth: int, culprit: str | None) -> Iterator[str]:
    """The modules that share the first `depth` segments of `way`; the one that these name comes last, as `itself`."""
    children: dict[str, list[Tap]] = {}
    for tap in taps:
        children.setdefault(".".join(tap.target.split(".")[depth : depth + 1]), []).append(tap)
    step = way[depth] if depth < len(way) else ""
    for (on_way, _), group in groupby(children.items(), key=lambda child: (child[0] == step, _state(child[1]))):
        folded = dict(group)
        members = [tap for found in folded.values() for tap in found]
        indent = "  " * depth
        if on_way and len(members) > 1:
            yield indent + step
            yield from _lines(members, way, depth + 1, culprit)
            continue
        own = [name or "itself" for name in folded]
        names = ", ".join(own) if len(own) < 4 else f"{own[0]} ... {own[-1]}"
        mark = "  <- the fault" if culprit in [tap.target for tap in members] else ""
        yield f"{indent}{names}  {_told(members)}{mark}"


def _state(taps: Sequence[Tap]) -> tuple[bool, bool]:
    return all(tap.passed for tap in taps), all(tap.local_passed is not False for tap in taps)


def _told(taps: Sequence[Tap]) -> str:
    agree, innocent = _state(taps)
    if len(taps) == 1:
        (tap,) = taps
        text = f"{'agrees within' if agree else 'differs by'} {tap.error:.1e}"
        if tap.local_error is not None and not (agree and innocent):
            text += f", on the reference's own input {'within' if innocent else 'by'} {tap.local_error:.1e}"
        return f"{text} ({tap.reason})" if tap.reason else text
    worst = max(tap.error for tap in taps)
    if agree:
        return f"{len(taps)} modules agree, worst {worst:.1e}"
    differ = sum(not tap.passed for tap in taps)
    count = f"{len(taps)} modules" if differ == len(taps) else f"{differ} of {len(taps)} modules"
    alone = "and agree on the reference's own input" if innocent else "some of them on the reference's own input too"
    return f"{count} differ, by {worst:.1e} at most, {alone}"
