"""Readers of job traces: what they understand, and one error for what they do not."""

import json

import numpy as np
import pytest

from intentd.core.errors import InputError
from intentd.core.jobs import traces
from intentd.core.jobs.workloads import WORKLOADS, resampled, synthetic

HEAD = "job_id,submit_s,service_gpu_s,gpus,model\n"
SCALING = "model,gpus,speedup\nA,1,1\nA,2,1.8\nA,3,1.5\n"


def test_our_csv_with_a_scaling_table():
    scaling = traces.read_scaling(SCALING)
    assert scaling.warnings
    jobs = traces.read_csv(HEAD + "0,0,100,4,LinearModel\n1,5,50,3,A\n", scaling)
    assert jobs.largest.tolist() == [4, 2]  # A is best at 2
    assert jobs.speeds[jobs.table[1], 2] == 1.8
    assert jobs.speeds[jobs.table[0], 4] == 4


def test_min_gpus_is_optional_and_first_cuts():
    text = HEAD.replace("\n", ",min_gpus\n") + "0,0,10,4,LinearModel,2\n1,1,10,1,LinearModel,\n"
    assert traces.read_csv(text).smallest.tolist() == [2, 0]
    assert len(traces.read_csv(text, first=1)) == 1


def test_written_csv_reads_back():
    jobs = synthetic("workload-1", jobs=20, load=0.8, gpus=64, seed=3)
    again = traces.read_csv(traces.write_csv(jobs))
    np.testing.assert_array_equal(again.submit_s, jobs.submit_s)
    np.testing.assert_array_equal(again.work_gpu_s, jobs.work_gpu_s)
    np.testing.assert_array_equal(again.largest, jobs.largest)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "jobs.columns"),
        (HEAD, "jobs"),
        (HEAD.replace("gpus", "cards"), "jobs.columns"),
        (HEAD.replace("\n", ",colour\n") + "0,0,1,1,LinearModel,red\n", "jobs.columns"),
        (HEAD + "0,5,1,1,LinearModel\n1,4,1,1,LinearModel\n", "jobs[1].submit_s"),
        (HEAD + "0,nan,1,1,LinearModel\n", "jobs[0].submit_s"),
        (HEAD + "0,0,-1,1,LinearModel\n", "jobs[0].service_gpu_s"),
        (HEAD + "0,0,nan,1,LinearModel\n", "jobs[0].service_gpu_s"),
        (HEAD + "0,0,1,0,LinearModel\n", "jobs[0].gpus"),
        (HEAD + "0,0,1,1.5,LinearModel\n", "jobs[0].gpus"),
        (HEAD + "0,0,1,1,Unknown\n", "jobs[0].model"),
        (HEAD + "0,0,1\n", "jobs[0]"),
        (HEAD + "0,0,1,1,LinearModel,7\n", "jobs[0]"),
        (HEAD.replace("\n", ",min_gpus\n") + "0,0,1,1,LinearModel,2\n", "jobs[0].min_gpus"),
    ],
)
def test_a_wrong_trace_is_one_error_with_its_place(text, field):
    with pytest.raises(InputError) as caught:
        traces.read_csv(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "text",
    ["", "model,gpus,speedup\n", "model,gpus,speedup\nA,2,2\n", "model,gpus,speedup\nA,1,x\n"],
)
def test_a_wrong_scaling_table_is_refused(text):
    with pytest.raises(InputError, match="scaling"):
        traces.read_scaling(text)


def philly(**change):
    attempt = {
        "start_time": "2017-10-01 10:00:00",
        "end_time": "2017-10-01 11:00:00",
        "detail": [{"ip": "m1", "gpus": ["gpu0", "gpu1"]}],
    }
    job = {"submitted_time": "2017-10-01 09:30:00", "attempts": [attempt | change]}
    return json.dumps([job, {"submitted_time": "2017-10-01 09:00:00", "attempts": []}])


def test_philly_counts_gpu_seconds_of_all_attempts():
    jobs = traces.read_philly(philly())
    assert jobs.work_gpu_s.tolist() == [7200]
    assert jobs.largest.tolist() == [2]


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[1]", philly(end_time="2017-10-01 09:00:00"), philly(start_time="x"), "[]"],
)
def test_a_wrong_philly_log_is_refused(text):
    with pytest.raises(InputError):
        traces.read_philly(text)


ALIBABA = "name,num_gpu,gpu_milli,creation_time,deletion_time,scheduled_time\n"


def test_alibaba_counts_shares_of_a_gpu():
    text = ALIBABA + "a,1,500,10,120,20\nb,2,1000,5,15,5\nc,0,0,1,2,1\nd,1,1000,1,,1\n"
    jobs = traces.read_alibaba(text)
    assert jobs.work_gpu_s.tolist() == [20, 50]
    assert jobs.submit_s.tolist() == [0, 5]
    with pytest.raises(InputError, match="deletion_time"):
        traces.read_alibaba(ALIBABA + "a,1,1000,0,5,20\n")


POLLUX = "name,time,application,num_replicas,batch_size\n"
MEASURED = "num_nodes,num_replicas,local_bsz,step_time,sync_time\n1,2,8,1.0,0.2\n1,4,8,1.2,0.4\n"


def test_pollux_speeds_against_one_replica_without_synchronising():
    speeds = traces.pollux_speeds(MEASURED)
    assert speeds[:3] == pytest.approx([0, 1, 1.6])
    assert speeds[4] == pytest.approx(4 * 8 / 1.2 / (8 / 0.8))
    jobs = traces.read_pollux(POLLUX + "x,7,bert,4,96\ny,3,ncf,2,1\n", {"bert": MEASURED})
    assert jobs.submit_s.tolist() == [3, 7]
    assert jobs.largest.tolist() == [2, 4]
    for text in (POLLUX, POLLUX + "x,7,chess,4,96\n"):
        with pytest.raises(InputError):
            traces.read_pollux(text)
    with pytest.raises(InputError):
        traces.pollux_speeds("num_nodes,num_replicas,local_bsz,step_time,sync_time\n")


def test_history_becomes_a_trace_in_arrival_order():
    jobs = traces.from_history([30.0, 10.0], [5.0, 7.0], [2, 1])
    assert jobs.submit_s.tolist() == [0, 20]
    assert jobs.work_gpu_s.tolist() == [7, 5]


@pytest.mark.parametrize("name", WORKLOADS)
def test_synthetic_workloads_offer_their_load(name):
    jobs = synthetic(name, jobs=4000, load=0.8, gpus=64, seed=5)
    assert jobs.load(64) == pytest.approx(0.8, rel=0.08)
    same = synthetic(name, jobs=4000, load=0.8, gpus=64, seed=5)
    np.testing.assert_array_equal(jobs.submit_s, same.submit_s)


@pytest.mark.parametrize(
    "change", [{"jobs": 0}, {"load": 0.0}, {"load": float("nan")}, {"gpus": 0}]
)
def test_wrong_synthetic_settings_are_refused(change):
    with pytest.raises(InputError):
        synthetic("workload-1", **({"jobs": 5, "load": 0.5, "gpus": 4, "seed": 1} | change))
    with pytest.raises(InputError, match="workload"):
        synthetic("workload-9", jobs=5, load=0.5, gpus=4, seed=1)


def test_resampled_history_keeps_the_rate():
    jobs = synthetic("workload-1", jobs=3000, load=0.8, gpus=64, seed=5)
    other = resampled(jobs, 2000, seed=1)
    assert len(other) == 2000
    assert other.load(64) == pytest.approx(0.8, rel=0.2)
    assert (np.diff(other.submit_s) >= 0).all()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (json.dumps([{"submitted_time": "x", "attempts": 3}]), "cluster_job_log[0].attempts"),
        (json.dumps([{"attempts": [3]}]), "cluster_job_log[0].attempts[0]"),
        (philly(detail=5), "cluster_job_log[0].attempts[0].detail"),
        (philly(detail=[5]), "cluster_job_log[0].attempts[0].detail[0]"),
        (philly(detail=[{"gpus": 5}]), "cluster_job_log[0].attempts[0].detail[0].gpus"),
        (philly(end_time=5), "cluster_job_log[0].attempts[0].end_time"),
        ("[" * 100_000, "cluster_job_log"),
        ('[{"attempts": ' * 100_000, "cluster_job_log"),
    ],
    ids=range(8),
)
def test_a_malformed_philly_log_names_the_place(text, field):
    with pytest.raises(InputError) as caught:
        traces.read_philly(text)
    assert caught.value.field == field


def test_philly_times_may_have_a_zone():
    zoned = philly(start_time="2017-10-01T12:00:00+02:00", end_time="2017-10-01T11:00:00Z")
    assert traces.read_philly(zoned).work_gpu_s.tolist() == [7200]
