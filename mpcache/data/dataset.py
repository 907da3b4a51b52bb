"""DATASET -> its documents, from local files or from the Hugging Face Hub."""

from mpcache.config import CollectConfig
from mpcache.data.dataset_files import find_dataset_files
from mpcache.data.documents import Documents
from mpcache.data.hub_dataset import open_hub_dataset
from mpcache.data.local_dataset import open_local_dataset
from mpcache.data.vocabulary import Vocabulary


def open_documents(config: CollectConfig, vocabulary: Vocabulary) -> Documents:
    """The documents that `config` names. Local files are read and checked as a whole first.

    Raises UsageError for data that cannot be used, ConnectionError without the Hub.
    """
    files = find_dataset_files(config)
    if files is None:
        return open_hub_dataset(config, vocabulary)
    return open_local_dataset(files, config, vocabulary)
