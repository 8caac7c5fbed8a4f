"""Traces and records: drawn from a seed, at the load asked for, and read back as written."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError, WireError
from intentd.testbed.traffic.records import FlowRecord, as_trace, read_records, write_records
from intentd.testbed.traffic.trace import (
    TraceFlow,
    Workload,
    arrival_rate,
    merge,
    offered_load,
    poisson,
    read_trace,
    shift,
    write_trace,
)
from intentd.testbed.traffic.wire import REQUEST_BYTES, Request, decode_request, encode_request

LINEAR = Workload("linear", lambda u: 2e6 * u, 1e6, scale=0.5)


def test_poisson_offers_the_load_and_repeats_from_its_seed() -> None:
    flows = poisson(LINEAR, load=0.8, rate_bps=1e9, duration_s=200, seed=3, hosts=4, servers=2)
    again = poisson(LINEAR, load=0.8, rate_bps=1e9, duration_s=200, seed=3, hosts=4, servers=2)
    assert flows == again
    assert flows != poisson(LINEAR, load=0.8, rate_bps=1e9, duration_s=200, seed=4)
    assert offered_load(flows, 1e9) == pytest.approx(0.8, rel=0.03)
    assert {flow.host for flow in flows} == {0, 1, 2, 3}
    assert {flow.server for flow in flows} == {0, 1}
    times = [flow.arrival_s for flow in flows]
    assert times == sorted(times)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = math.fsum(gaps) / len(gaps)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation / mean == pytest.approx(1.0, abs=0.05)  # exponential gaps


def test_load_counts_payload_only() -> None:
    assert arrival_rate(0.8, 1e9, 1e6) == pytest.approx(0.8 * 1e9 * 1448 / 1514 / 8e6)


def test_min_flows_lengthens_a_run() -> None:
    flows = poisson(LINEAR, load=0.5, rate_bps=1e8, duration_s=0.1, seed=1, min_flows=50)
    assert len(flows) == 50


@pytest.mark.parametrize("load", [0.0, 1.0, -1.0])
def test_impossible_loads_are_refused(load: float) -> None:
    with pytest.raises(InputError, match="load"):
        poisson(LINEAR, load=load, rate_bps=1e9, duration_s=1, seed=1)


def test_merge_and_shift_keep_order() -> None:
    left = [TraceFlow(0.0, 1), TraceFlow(2.0, 2)]
    right = shift([TraceFlow(0.0, 3)], 1.0)
    assert [flow.size_bytes for flow in merge([left, right])] == [1, 3, 2]


def test_trace_file_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    flows = poisson(LINEAR, load=0.5, rate_bps=1e9, duration_s=0.5, seed=1)
    write_trace(path, flows)
    back = read_trace(path)
    assert [flow.size_bytes for flow in back] == [flow.size_bytes for flow in flows]
    assert back[3].arrival_s == pytest.approx(flows[3].arrival_s, abs=1e-9)
    path.write_text("arrival_s,size_bytes,host,server\n0.1,5,0,0\n0.2,-5,0,0\n")
    with pytest.raises(InputError, match=":3"):
        read_trace(path)
    path.write_text("size\n1\n")
    with pytest.raises(InputError, match=":1"):
        read_trace(path)


def test_records_round_trip_and_become_the_trace_that_happened(tmp_path: Path) -> None:
    late = FlowRecord(0, 1, 0, 100, 2, 0.5, 0.6, 0.7, 0.8, 0.9, "timeout")
    early = FlowRecord(1, 0, 1, 50, 0, 0.4, 0.41, 0.41, 0.415, 0.42)
    assert late.fct_s == pytest.approx(0.3)
    assert late.wait_s == pytest.approx(0.1)
    path = tmp_path / "records.csv"
    write_records(path, [late, early])
    assert read_records(path) == [late, early]
    assert as_trace([late, early]) == [TraceFlow(0.41, 50, 0, 1), TraceFlow(0.6, 100, 1, 0)]
    path.write_text(path.read_text() + "1,2,3\n")
    with pytest.raises(InputError, match=":4"):
        read_records(path)


@given(
    st.builds(
        Request,
        flow=st.integers(0, 2**32 - 1),
        size_bytes=st.integers(1, 1 << 40),
        priority=st.integers(0, 2**32 - 1),
        dscp=st.integers(0, 63),
        class_index=st.integers(0, 63),
    )
)
def test_request_round_trip(request: Request) -> None:
    assert decode_request(encode_request(request)) == request


@given(st.binary(max_size=2 * REQUEST_BYTES))
def test_request_decoder_survives_any_bytes(data: bytes) -> None:
    try:
        decode_request(data)
    except WireError:
        return
    assert len(data) == REQUEST_BYTES
