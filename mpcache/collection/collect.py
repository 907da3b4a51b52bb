"""Fill a store, or what is missing of it: tokens first, then one forward pass for each part.

The calling process creates the store and writes its tokens. The model then reads the parts, in this
process or in the workers of a Dask cluster.
"""

import dataclasses
import functools
import socket
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mpcache.collection.commit_threads import PartCommitter, commit_side, write_threads
from mpcache.collection.jobs import Job, MissingPart
from mpcache.collection.producer import ActivationProducer, ModelFacts, load_for_collection
from mpcache.collection.progress import Progress
from mpcache.collection.store_side import Collection, WaitConfig
from mpcache.collection.summary import CollectSummary
from mpcache.config import CollectConfig
from mpcache.data.dataset import open_documents
from mpcache.data.documents import Documents
from mpcache.data.special_tokens import special_tokens_of
from mpcache.data.tokenization import find_chat_template
from mpcache.data.vocabulary import Tokenizer
from mpcache.errors import UsageError
from mpcache.model.cut_batches import part_input
from mpcache.model.file_snapshot import ModelFileSnapshot
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.loading import load_tokenizer
from mpcache.model.model_config import load_vocabulary
from mpcache.model.model_identity import tokenizer_digest
from mpcache.model.model_source import find_source
from mpcache.parallel.config import CollectParallelConfig
from mpcache.storage.base import Storage, open_storage
from mpcache.store.reader import open_store
from mpcache.store.store_metadata import is_store
from mpcache.store.writer import Writer


def collect(
    config: CollectConfig,
    store: str | Path | Storage,
    parallel: CollectParallelConfig = CollectParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
    waits: WaitConfig = WaitConfig(),  # noqa: B008  frozen
) -> CollectSummary:
    """Collect activations into a new store, or complete and extend an existing store.

    The call can be stopped at any time. The same call continues: it collects only what is missing.

    Args:
        config: The model, the dataset, and what to keep of them.
        store: Path, or `s3://` or `gs://` URL, of the store. It is created if nothing is there.
        parallel: Worker processes that run the model. They do not change the store's contents.
        quiet: Without progress bars.
        waits: How long to wait for what other processes write.

    Raises:
        UsageError: The settings, the model or the dataset cannot be used, or the store was made
            with other settings. Nothing was written.
        OSError: The disk or the network failed. What was committed stays.

    Example:
        ```python
        from mpcache import CollectConfig, collect

        config = CollectConfig(
            model="data/model", dataset="data/corpus/train.parquet",
            hookpoints=("layers.3",), rows=2048, ctx_len=128, part_rows=1024,
        )
        summary = collect(config, "new-store")
        print(summary.rows, "rows,", summary.bytes, "bytes")
        ```
    """
    storage = open_storage(store)
    if parallel.uses_dask:
        return _collect_with_workers(config, storage, parallel, waits, quiet)
    files = ModelFileSnapshot.take(find_source(config))
    tokenizer = load_tokenizer(config, files.source)
    documents, template = _open_checked_documents(config, tokenizer)
    loaded = load_for_collection(config, tokenizer, files)
    producer = ActivationProducer(config, loaded)
    # By these files a later collection below the same root knows the model without loading it.
    model_files = None if is_store(storage) else loaded.files_digest()
    facts = dataclasses.replace(producer.facts, model_files=model_files)
    collection = Collection(
        config, storage, facts, loaded.tokenizer, documents, template,
        parallel=parallel, waits=waits, quiet=quiet,
    )  # fmt: skip
    return collection.run(functools.partial(collect_parts_here, producer, storage))


def _open_checked_documents(
    config: CollectConfig, tokenizer: Tokenizer
) -> tuple[Documents, str | None]:
    """The dataset and its chat template, opened before the weights are loaded, which is slow.

    Mistakes in the dataset, the chat template or the special tokens are then reported at once.
    """
    documents = open_documents(config, load_vocabulary(config, tokenizer))
    template = find_chat_template(documents, tokenizer, config)
    special_tokens_of(tokenizer, config)
    return documents, template


def _collect_with_workers(
    config: CollectConfig,
    storage: Storage,
    parallel: CollectParallelConfig,
    waits: WaitConfig,
    quiet: bool,
) -> CollectSummary:
    from mpcache.collection.dask_client import DaskCollector  # Dask's scheduler is slow to import

    tokenizer = load_tokenizer(config)
    documents, template = _open_checked_documents(config, tokenizer)
    with DaskCollector(parallel, config, storage, quiet=quiet) as collector:
        facts = collector.model_facts()
        _check_same_tokenizer(tokenizer, facts)
        collection = Collection(
            config, storage, facts, tokenizer, documents, template,
            parallel=parallel, waits=waits, quiet=quiet,
        )  # fmt: skip
        return collection.run(collector.collect_parts)


def _check_same_tokenizer(tokenizer: Tokenizer, facts: ModelFacts) -> None:
    """Tokens are written by this process, and the store names the tokenizer of the workers."""
    if tokenizer_digest(tokenizer) != facts.digests.get("tokenizer_digest"):
        raise UsageError(
            "all machines must have the same tokenizer, got one on the workers and another one on "
            f"{socket.gethostname()}, where this command runs; copy the same model folder to all "
            "machines, then run the same command again"
        )


def collect_parts_here(
    producer: ActivationProducer,
    where: str | Path | Storage,
    jobs: Sequence[Job],
    progress: Progress,
) -> tuple[MissingPart, ...]:
    """Read and commit parts in this process. The first error ends the collection."""
    store = open_store(where)
    writer = Writer(store.storage, store.layout, store.fingerprint)

    def commit(part: int, side: Side, x_RW: Tensor) -> None:
        progress.add_bytes(commit_side(writer, part, side, x_RW))

    try:
        with PartCommitter(write_threads(producer.config, store.storage)) as committer:
            for job in jobs:
                tokens, advance = part_input(store, job.part), progress.row_counter(job.part)
                buffers = producer.read_part(job.part, tokens, job.sides, advance)
                commits = [functools.partial(commit, job.part, *item) for item in buffers.items()]
                del buffers  # so that an array's memory is free as soon as the array is written
                committer.submit(commits)
                del commits
    finally:
        producer.close()
    return ()
