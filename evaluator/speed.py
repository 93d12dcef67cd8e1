"""Time per token of a candidate and of the baseline, timed in turn on one machine."""

from __future__ import annotations

DISCARD = 3


def collect(candidate, baseline, workload, b):
    def turn(e):
        return e.decode_steps(b, workload.prompt_tokens, workload.decode_steps + DISCARD, workload.seed)[DISCARD:]

    turn(candidate)
    turn(baseline)
    c, o = [], []
    for i in range(workload.turns):
        if i % 2 == 0:
            c.append(turn(candidate))
            o.append(turn(baseline))
        else:
            o.append(turn(baseline))
            c.append(turn(candidate))
    return c, o
