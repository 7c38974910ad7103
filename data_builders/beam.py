"""The shards of a dataset as one Apache Beam pipeline: `build ... --beam="FLAGS"`, extra `beam`.

All workers must see --raw and --out under the same absolute paths: NFS, Lustre, Filestore or a
bucket that is mounted as a folder. A repeated command builds the shards that are missing. FLAGS:

    this machine, in 8 processes (DirectRunner would first try to download Beam's Prism):
      --runner=FnApiRunner --direct_running_mode=multi_processing --direct_num_workers=8
    Flink, its workers in a container image with jaxvp installed:
      --runner=FlinkRunner --flink_master=HOST:8081 --environment_type=DOCKER
      --environment_config=IMAGE --parallelism=256
    Dataflow, in an image that also mounts the folders; one shard at a time per worker:
      --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp
      --sdk_container_image=IMAGE --max_num_workers=256 --number_of_worker_harness_threads=1
"""

from collections.abc import Sequence
from pathlib import Path

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_builders import writer
from data_builders.builder import Builder
from jaxvp.errors import UserError


class _WriteShard(apache_beam.DoFn):
    def __init__(self, builder: Builder, folder: Path):
        self.builder, self.folder = builder, folder

    def process(self, shard: writer.Shard):
        writer.write_shard(self.builder, shard, self.folder)


def write_shards(
    builder: Builder, shards: Sequence[writer.Shard], folder: Path, flags: Sequence[str]
):
    """Writes each of `shards`, see `writer.write_shard`, on the runner that `flags` name.

    Raises:
      RuntimeError: a worker failed, or its files are not in `folder`.
    """
    with apache_beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        # Reshuffle: without it the runner may give all shards to one worker.
        (pipeline | apache_beam.Create(shards) | apache_beam.Reshuffle()
         | apache_beam.ParDo(_WriteShard(builder, folder.resolve())))
    missing = sum(writer.finished(shard, folder) is None for shard in shards)
    if missing:
        raise UserError(
            f"{missing} of {len(shards)} shards are not in {folder}: do the workers share it?")
