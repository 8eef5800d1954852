"""First token vectors that know already which tokens stand beside which."""

import time
import warnings

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

logger = logging.get_logger(__name__)

MOST_TOKENS = 30_000_000
"""That many tokens are counted at most."""

SMOOTHING = 0.75
"""Power of the contexts' counts, against a bias towards rare ones (Levy et al. 2015, section 3.2)."""

WEIGHTING = 0.25
"""Power of a token's share of the text by which its row and its columns count in the factorisation: else rare tokens,
whose PMI is the largest and the least certain, would take most of the directions."""


def neighbour_counts(rows, vocab_size, column="input_ids"):
    """How often each token stands before and after each other.

    Args:
        rows: datasets.Dataset with lists of ids; they are read as one text, of which the first `MOST_TOKENS` count.

    Returns:
        Sparse (vocab_size, 2 * vocab_size) float tensor: [a, b] counts b before a, [a, vocab_size + b] b after a.
    """
    found, total = [], 0
    for batch in rows.with_format("arrow").iter(10_000):
        found.append(pc.list_flatten(batch[column]).to_numpy(zero_copy_only=False).astype(np.int64))
        total += len(found[-1])
        if total >= MOST_TOKENS:
            break
    ids = np.concatenate(found)[:MOST_TOKENS]
    pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    before, after = pairs // vocab_size, pairs % vocab_size
    places = np.stack([np.concatenate([after, before]), np.concatenate([before, vocab_size + after])])
    values = torch.from_numpy(np.concatenate([counts, counts])).float()
    return _sparse(torch.from_numpy(places), values, (vocab_size, 2 * vocab_size))


def positive_pmi(counts):
    """max(0, log(p(a, b) / (p(a) p'(b)))) of a sparse matrix of counts, p' with `SMOOTHING`; sparse as they are."""
    tokens, contexts = counts.indices()
    of_token = torch.zeros(counts.shape[0]).index_add_(0, tokens, counts.values())
    of_context = torch.zeros(counts.shape[1]).index_add_(0, contexts, counts.values()) ** SMOOTHING
    ratio = counts.values() * of_context.sum() / (of_token[tokens] * of_context[contexts])
    return _sparse(counts.indices(), ratio.log().clamp(min=0), counts.shape)


def _sparse(places, values, shape):
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()


def neighbour_vectors(counts, width, seed=0):
    """(V, width) vectors: the left factor U sqrt(S) of the weighted positive PMI with neighbours, each of length 1.

    A token that was never seen, or with no neighbour that it meets more often than by chance, gets zeros.

    Source: Levy and Goldberg 2014 (PMI factorised, its symmetric split); Halko et al. 2011 (randomised SVD). The
    weights are ours.

    Raises:
        ValueError: width is larger than the number of tokens.
    """
    if width > counts.shape[0]:
        raise ValueError(
            f"{counts.shape[0]} tokens have vectors from their neighbours of at most that width, got {width}. Use a "
            "smaller hidden_size or embedding_size, or more words."
        )
    pmi, weight = positive_pmi(counts), token_weights(counts)
    tokens, contexts = pmi.indices()
    values = weight[tokens] * pmi.values() * weight[contexts % len(weight)]
    weighted = _sparse(pmi.indices(), values, pmi.shape)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        weighted = weighted.to_sparse_csr()  # svd_lowrank is 10 times slower without
        left, values, _ = torch.svd_lowrank(weighted, q=min(width + 32, counts.shape[0]), niter=2)
    vectors = (left * values.sqrt())[:, :width]  # the weight of a row is gone when its length is 1
    known = torch.zeros(len(weight)).index_fill_(0, tokens[pmi.values() > 0], 1)  # others have rounding errors
    return known[:, None] * vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)


def token_weights(counts):
    """(V,) share of each token among all, to the power of `WEIGHTING`; 1e-7 at least."""
    found = torch.zeros(counts.shape[0]).index_add_(0, counts.indices()[0], counts.values())
    return (found / found.sum()).clamp(min=1e-7) ** WEIGHTING


@torch.no_grad()
def init_token_vectors(model, rows, std, seed=0):
    """Begins a new model's token vectors with those of its training text; the first process counts for all.

    The output layer begins with them, too, where it is as wide: untied weights begin as tied ones.

    Args:
        model: a PreTrainedModel; tokens that the text has not keep their vectors.
        rows: for `neighbour_counts`.
        std: root mean square of the entries of each vector.

    Returns:
        The seconds it took: they are time in which the model learns, as those of its training.
    """
    weight, found = model.get_input_embeddings().weight, [None, 0.0]
    if PartialState().is_main_process:
        before = time.perf_counter()
        vectors = neighbour_vectors(neighbour_counts(rows, weight.shape[0]), weight.shape[1], seed)
        found = [vectors, time.perf_counter() - before]
    vectors, seconds = broadcast_object_list(found)
    seen = vectors.norm(dim=1) > 0
    head = model.get_output_embeddings()
    tables = [weight] if head is None or head.weight.shape != weight.shape else [weight, head.weight]
    for table in tables:  # one and the same where they are tied
        table[seen] = (vectors[seen] * std * weight.shape[1] ** 0.5).to(table)
    logger.info(f"Neighbours counted and factorised in {seconds:.1f} s, which are part of the training's minutes.")
    return seconds
