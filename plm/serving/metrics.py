"""Counts of what was served, as Prometheus reads them; those of one process, named by its number."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, defaultdict

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper ends of the histogram of times."""


class Metrics:
    """Counters, changed by the one thread that runs the server."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests that are worked on or wait for it."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._times: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self._seconds: Counter[str] = Counter()

    def count(self, route: str, status: int, seconds: float) -> None:
        """Note one request."""
        self._requests[route, status] += 1
        self._times[route][bisect_left(SECONDS, seconds)] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]

    def text(self, **counters: int) -> str:
        """All of them in Prometheus' text format.

        Args:
            **counters: Further counters.
        """
        worker = f'worker="{os.getpid()}"'
        lines = ["# TYPE plm_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            lines.append(f'plm_requests_total{{route="{route}",status="{status}",{worker}}} {count}')
        lines.append("# TYPE plm_request_seconds histogram")
        for route, counts in sorted(self._times.items()):
            labels, total = f'route="{route}",{worker}', 0
            for end, count in zip([*map(str, SECONDS), "+Inf"], counts, strict=True):
                total += count
                lines.append(f'plm_request_seconds_bucket{{le="{end}",{labels}}} {total}')
            lines.append(f"plm_request_seconds_sum{{{labels}}} {self._seconds[route]:.6f}")
            lines.append(f"plm_request_seconds_count{{{labels}}} {total}")
        for name, count in counters.items():
            lines += [f"# TYPE plm_{name}_total counter", f"plm_{name}_total{{{worker}}} {count}"]
        lines += ["# TYPE plm_requests_in_flight gauge", f"plm_requests_in_flight{{{worker}}} {self.in_flight}"]
        lines += [
            "# TYPE process_resident_memory_bytes gauge",
            f"process_resident_memory_bytes{{{worker}}} {resident()}",
        ]
        return "\n".join(lines) + "\n"


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
