"""A build on a cluster of three nodes, one of which goes while it runs and another comes.

Run as `python -m tests.worlds.three_nodes DATABASE PICTURES LOG`, since a process has one Ray
session. Out: one line of JSON on stdout; in LOG a line a step: its kind and the node it ran on.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipeline.build import BuildReport, build
from pipeline.building import run_shards as ray_run
from pipeline.building.shard_worker import EncodeWorker, WorkerSettings, read_shard
from schemas.settings.resources import RayResources
from tests.pipeline.conftest import settings


def note(log: str, kind: str) -> None:
    """Add where this step runs."""
    node = ray.get_runtime_context().get_node_id()
    with Path(log).open("a") as file:
        file.write(f"{kind} {node}\n")


def main(database: str, pictures: str, log: str) -> None:
    class NotedEncoder(EncodeWorker):
        def __call__(self, table: pa.Table) -> pa.Table:
            note(log, "encode")
            return super().__call__(table)

    def noted_read(table: pa.Table, settings: WorkerSettings) -> pa.Table:
        note(log, "read")
        return read_shard(table, settings)

    changed: Any = ray_run
    changed.EncodeWorker, changed.read_shard = NotedEncoder, noted_read
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        reader = cluster.add_node(num_cpus=1, resources={"download": 1})
        encoders = [cluster.add_node(num_cpus=1, resources={"encode": 1}) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        names = {"reader": [reader.node_id], "encoders": [node.node_id for node in encoders]}

        def lose_a_node(_total: int, report: BuildReport) -> None:
            if report.shards_done >= 2 and len(encoders) == 2:
                cluster.remove_node(encoders.pop(), allow_graceful=False)
                encoders.append(cluster.add_node(num_cpus=1, resources={"encode": 1}))
                encoders.append(encoders[-1])
                names["encoders"].append(encoders[-1].node_id)

        resources = RayResources(
            workers=2, autoscale=True, read_resource="download", encode_resource="encode"
        )
        report = build(
            settings(Path(database), Path(pictures), hold_out=0.3, resources=resources),
            lose_a_node,
        )
        print(json.dumps(names | {"failed": report.failed, "done": report.shards_done}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
