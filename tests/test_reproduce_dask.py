"""A sweep on a dask cluster: one of two workers killed in the middle; clusters that cannot be used."""

import os
import signal

import pytest

from noetherflow.errors import DataError
from noetherflow_paper import run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_killed_dask_worker_changes_nothing(tmp_path):
    distributed = pytest.importorskip("distributed")
    here = run(["rates"], out=tmp_path / "here", progress=None)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp://"
    ) as cluster:
        pids = [w.pid for w in cluster.workers.values()]
        killed = []

        def kill_after_first_point(text):
            if not killed and text.startswith("[1/"):
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

        there = run(["rates"], out=tmp_path / "there", dask=cluster.scheduler_address, progress=kill_after_first_point)
    assert killed, "a worker was killed while points were left"
    assert there.computed == here.computed > 2
    assert [v for _, v in there.verdicts] == [v for _, v in here.verdicts]
    for a, b in zip(here.finished[0].results.points, there.finished[0].results.points, strict=True):
        assert a == b


@pytest.mark.slow
def test_processes_give_the_same_numbers(tmp_path):
    one = run(["rates"], out=tmp_path / "one", progress=None)
    two = run(["rates"], out=tmp_path / "two", jobs=2, progress=None)
    assert one.finished[0].results.points == two.finished[0].results.points


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "told"), [(1, r"several threads: .*\(2 threads\).*"), (0, "has no workers; ")])
def test_clusters_that_would_give_other_numbers_are_refused(tmp_path, workers, told):
    """Two points in one process share torch's tracing state and global random numbers."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=workers, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp://"
    ) as cluster:
        address = cluster.scheduler_address
        remedy = f"start workers with: dask worker --nthreads 1 {address}"
        with pytest.raises(DataError, match=told + remedy):
            run(["rates"], out=tmp_path, dask=address, progress=None)


@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_cluster_is_named(tmp_path):
    config = pytest.importorskip("dask").config
    for address in ("tcp://127.0.0.1:1", "carrier-pigeon://head"):
        with (
            config.set({"distributed.comm.timeouts.connect": "1s"}),
            pytest.raises(DataError, match=f"the dask cluster at {address} cannot be reached"),
        ):
            run(["rates"], out=tmp_path, dask=address, progress=None)
