"""What a run trains on: documents, their tokens, and batches of them."""

from meshwright.runtime.data.batch import IGNORED, Batch
from meshwright.runtime.data.stream import DataStream, open_stream, unigram_entropy

__all__ = ["IGNORED", "Batch", "DataStream", "open_stream", "unigram_entropy"]
