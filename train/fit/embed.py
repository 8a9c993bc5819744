"""Initial word embeddings, from counts of pieces that occur near each other.

They are a factorization of the positive pointwise mutual information, which word2vec approximates (Levy and Goldberg
2014, "Neural Word Embedding as Implicit Matrix Factorization"). The settings follow Levy, Goldberg and Dagan 2015
("Improving Distributional Similarity with Lessons Learned from Word Embeddings"): contexts to the power of 0.75, and
the square root of the singular values. Nearer neighbours count more, as in GloVe (Pennington et al. 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
import torch
from sklearn.utils.extmath import randomized_svd
from tokenizers import Tokenizer

from aisle.console import track

WINDOW = 5  # tokens to each side
SMOOTHING = 0.75
CHUNK = 10_000  # texts counted at once, which bounds the memory
LENGTH = 1.0  # of a vector: three times that of BERT's random vectors; 1/3 and 3 are not better


def embed(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Initialize a new BERT's embeddings from counts. Pieces without neighbours (special tokens) stay random."""
    words = model.get_input_embeddings().weight
    vectors = factorize(mutual_information(count_neighbours(tokenizer, texts)), words.shape[1])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    known = norms[:, 0] > 1e-6
    with torch.no_grad():
        words[torch.from_numpy(known)] = torch.from_numpy(vectors[known] / norms[known] * LENGTH).to(words)


def factorize(information: sparse.csr_array, size: int) -> npt.NDArray[np.float64]:
    """Return vectors [vocabulary, size] whose products approximate the pieces' mutual information."""
    rank = min(size, information.shape[0] - 1)
    left, singular, _ = randomized_svd(information, rank, n_iter=4, random_state=0)
    # A random rotation spreads the information evenly over the dimensions, for dropout and the heads.
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    vectors: npt.NDArray[np.float64] = left * np.sqrt(singular) @ turn[:rank]
    return vectors


def count_neighbours(tokenizer: Tokenizer, texts: Sequence[str]) -> sparse.csr_array:
    """Return how often pieces occur near each other, [vocabulary, vocabulary]; at a distance of n it counts 1/n."""
    vocabulary = tokenizer.get_vocab_size()
    counts = sparse.csr_array((vocabulary, vocabulary), dtype=np.float64)
    for start in track(range(0, len(texts), CHUNK), "counting neighbours"):
        encodings = tokenizer.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)
        tokens = np.concatenate([np.array(each.ids, np.int64) for each in encodings])
        text = np.repeat(np.arange(len(encodings)), [len(each.ids) for each in encodings])
        near = sparse.csr_array(counts.shape)
        for distance in range(1, WINDOW + 1):
            together = text[:-distance] == text[distance:]
            pair = (tokens[:-distance][together], tokens[distance:][together])
            seen = sparse.coo_array((np.full(len(pair[0]), 1 / distance), pair), shape=counts.shape)
            near = near + seen.tocsr()
        counts = counts + near  # once a chunk, because this copies all counts
    return (counts + counts.T).tocsr()


def mutual_information(counts: sparse.csr_array) -> sparse.csr_array:
    """Return log(P(piece, context) / (P(piece) P(context))) where it is positive, else 0."""
    pairs = counts.tocoo()
    pieces = np.asarray(counts.sum(axis=1)).ravel()
    contexts = pieces**SMOOTHING
    row, column = pairs.coords
    values = np.log(pairs.data * contexts.sum() / (pieces[row] * contexts[column]))
    positive = values > 0
    return sparse.csr_array((values[positive], (row[positive], column[positive])), shape=counts.shape)
