"""The specification: the encoder in float64, one token and one pair of tokens at a time.

Written from the papers named at each function, slow and obvious, and sharing no code with the package: every kernel is
held against it in values and, by autograd through these loops, in gradients. A vector is a tensor of one dimension, a
text is a list of vectors. SCORES, PATTERNS and POSITIONS have a row for every row of the package's tables.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

PADDING = -1


class Place(NamedTuple):
    """Where a token stands: the number of its document, its place in it, and that document's number of tokens."""

    document: int
    position: int
    length: int


# Scores: (query, key, head, parameters) -> number, for two vectors of width d_k.


def scaled_dot_product(query, key, head, parameters):
    """Vaswani et al. 2017, arXiv:1706.03762, equation 1."""
    return torch.dot(query, key) / math.sqrt(len(query))


SCORES = {"scaled_dot_product": scaled_dot_product}


# Patterns: (query, key, head, options) -> bool, for the places of two tokens of one document.


def full(query, key, head, options):
    """Vaswani et al. 2017, arXiv:1706.03762, section 3.2: everybody sees everybody."""
    return True


def sliding_window(query, key, head, options):
    """Beltagy et al. 2020, arXiv:2004.05150, section 3.1: so many tokens on either side."""
    return abs(query.position - key.position) <= options["window_radius"]


PATTERNS = {"full": full, "sliding_window": sliding_window}


# Positions: what they add to an embedding, how they turn queries and keys, what they add to a score.


class Position(NamedTuple):
    """The three places where order may enter; None: it does not enter there.

    Attributes:
        added: (position, parameters) -> vector added to the token's embedding.
        turned: (vector, position, options) -> the query or key turned.
        bias: (query, query place, key place, head, options, parameters) -> number added to the score.
    """

    added: Callable | None = None
    turned: Callable | None = None
    bias: Callable | None = None


def learned(position, parameters):
    """Devlin et al. 2018, arXiv:1810.04805, section 3: a vector for each place."""
    return parameters["embeddings.positions.weight"][position]


def rotary(vector, position, options):
    """Su et al. 2021, arXiv:2104.09864, equation 15, where features i and i + d_k / 2 are the pair number i."""
    theta = (options.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    half = len(vector) // 2
    features = vector.unbind()
    turned = list(features)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        turned[i] = features[i] * math.cos(angle) - features[i + half] * math.sin(angle)
        turned[i + half] = features[i] * math.sin(angle) + features[i + half] * math.cos(angle)
    return torch.stack(turned)


POSITIONS = {"none": Position(), "learned": Position(added=learned), "rotary": Position(turned=rotary)}


OPTIONS = {
    "sliding_window": {"window_radius": 3},
    "learned": {"max_position_embeddings": 64},
    "rotary": {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
}
"""The config fields with which tests try a row that has any."""


# Attention


def sees(query: Place, key: Place, pattern: str, causal: bool, head: int, options: dict) -> bool:
    """Whether a query may see a key: neither is padding, one document, not later if causal, and the pattern."""
    if PADDING in (query.document, key.document) or query.document != key.document:
        return False
    if causal and key.position > query.position:
        return False
    return PATTERNS[pattern](query, key, head, options)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """exp(score) / Σ exp(score), with the largest score taken off first."""
    exponentials = torch.exp(scores - scores.max().detach())
    return exponentials / exponentials.sum()


def attention(
    queries: list[list[torch.Tensor]],
    keys: list[list[torch.Tensor]],
    values: list[list[torch.Tensor]],
    places: list[Place],
    *,
    score: str,
    pattern: str,
    causal: bool,
    position: str,
    options: dict,
    parameters: dict[str, torch.Tensor],
    mask: list | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in one row of tokens: for each head and query, softmax of the scores, then the weighted sum.

    Args:
        queries: `queries[i][h]`, the vector of token i in head h.
        keys, values: `keys[j][g]`; the H heads share the G heads of keys and values in equal runs.
        places: of each token of the row.
        options: the config's fields for this layer.
        parameters: what the attention's score and position own.
        mask: `mask[h][i][j]`, whether the user lets head h's query i see key j; None: always.

    Returns:
        heads (N, H, d_v) and weights (H, N, N), both 0 for a query that sees nothing.
    """
    num_tokens, num_heads, num_groups = len(queries), len(queries[0]), len(keys[0])
    how = POSITIONS[position]
    if how.turned is not None:
        queries, keys = (
            [[how.turned(x, place.position, options) for x in token] for token, place in zip(row, places, strict=True)]
            for row in (queries, keys)
        )

    heads, all_weights = [], torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            seen, scores = [], []
            for j in range(num_tokens):
                if not sees(places[i], places[j], pattern, causal, head, options):
                    continue
                if mask is not None and not mask[head][i][j]:
                    continue
                number = SCORES[score](queries[i][head], keys[j][group], head, parameters)
                if how.bias is not None:
                    number = number + how.bias(queries[i][head], places[i], places[j], head, options, parameters)
                seen.append(j)
                scores.append(number)
            output = torch.zeros_like(values[i][group])
            if seen:
                weights = softmax(torch.stack(scores))
                all_weights[head, i, seen] = weights.detach()
                for j, weight in zip(seen, weights, strict=True):
                    output = output + weight * values[j][group]
            heads.append(output)
    return torch.stack(heads).unflatten(0, (num_tokens, num_heads)), all_weights


# Documents


def stand(
    batch_size: int,
    length: int,
    real: list | torch.Tensor | None = None,
    position_ids: list | torch.Tensor | None = None,
    cu_seq_lens: list[int] | None = None,
) -> list[list[Place]]:
    """Where each token of a batch stands, reading it row by row.

    A row begins a document. Further ones begin where `cu_seq_lens` says (after its last number all is padding), else,
    where there is no mask `real`, at each 0 of `position_ids`. A document's real tokens count from 0, holes left out,
    unless `position_ids` say what their positions are.
    """
    batch, documents = [], 0
    for row in range(batch_size):
        places = []
        for n in range(length):
            here = row * length + n
            if cu_seq_lens is not None:
                begins = here in cu_seq_lens
            else:
                begins = real is None and position_ids is not None and int(position_ids[row][n]) == 0
            if begins or n == 0:
                documents, count = documents + 1, 0
            after_the_last = cu_seq_lens is not None and here >= cu_seq_lens[-1]
            if after_the_last or (real is not None and not real[row][n]):
                places.append(Place(PADDING, 0, 0))
                continue
            places.append(Place(documents, count if position_ids is None else int(position_ids[row][n]), 0))
            count += 1
        batch.append(places)
    everybody = [place.document for places in batch for place in places]
    for places in batch:
        for n, place in enumerate(places):
            if place.document != PADDING:
                places[n] = place._replace(length=everybody.count(place.document))
    return batch


# The encoder

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: torch.where(x > 0, x, 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


class Encoded(NamedTuple):
    """hidden_states: (N, D), one more than layers, the last one after the final norm; attentions: (H, N, N)."""

    hidden_states: list[torch.Tensor]
    attentions: list[torch.Tensor]


def linear(x: torch.Tensor, parameters: dict, name: str, bias: bool) -> torch.Tensor:
    """W x + b."""
    x = parameters[f"{name}.weight"] @ x
    return x + parameters[f"{name}.bias"] if bias else x


def norm(x: torch.Tensor, parameters: dict, name: str, config) -> torch.Tensor:
    """Ba et al. 2016, arXiv:1607.06450, or Zhang & Sennrich 2019, arXiv:1910.07467 (no mean taken off, no bias)."""
    weight = parameters[f"{name}.weight"]
    if config.norm_type == "rms_norm":
        return weight * x / torch.sqrt((x * x).sum() / len(x) + config.norm_eps)
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    x = weight * (x - mean) / torch.sqrt(variance + config.norm_eps)
    return x + parameters[f"{name}.bias"] if config.norm_bias else x


def feed_forward(x: torch.Tensor, parameters: dict, name: str, config) -> torch.Tensor:
    """act(x W_up) W_down, or, gated, (act(x W_gate) * x W_up) W_down: Shazeer 2020, arXiv:2002.05202."""
    act, bias = ACTIVATIONS[config.hidden_act], config.mlp_bias
    up = linear(x, parameters, f"{name}.up_proj", bias)
    inner = act(linear(x, parameters, f"{name}.gate_proj", bias)) * up if config.mlp_type == "gated" else act(up)
    return linear(inner, parameters, f"{name}.down_proj", bias)


def layer_options(config, layer: int) -> dict:
    """The config's fields as one layer reads them: of a list with one entry per layer, its own."""
    options = {"layer": layer}
    for name, value in config.to_dict().items():
        options[name] = value[layer] if isinstance(value, list) and len(value) == config.num_hidden_layers else value
    return options


def encode(
    config,
    parameters: dict[str, torch.Tensor],
    embeds: torch.Tensor,
    token_types: list[int] | None = None,
    positions: list[int] | None = None,
) -> Encoded:
    """The hidden states and attention weights of one document alone.

    Args:
        config: a SelfAttnConfig; only its fields are read.
        parameters: a SelfAttnModel's state dict, in float64.
        embeds: (N, embedding width), the vectors of the tokens.
        token_types: of each token; None: all 0.
        positions: of each token; None: from 0.
    """
    num_tokens = len(embeds)
    positions = list(range(num_tokens)) if positions is None else positions
    places = [Place(0, position, num_tokens) for position in positions]
    added = POSITIONS[config.position_encoding].added

    text = []
    for n, x in enumerate(embeds):
        if config.type_vocab_size > 0:
            x = x + parameters["embeddings.token_types.weight"][0 if token_types is None else token_types[n]]
        if added is not None:
            x = x + added(positions[n], parameters)
        if config.embedding_norm:
            x = norm(x, parameters, "embeddings.norm", config)
        if config.embedding_size not in (None, config.hidden_size):
            x = linear(x, parameters, "embeddings.projection", bias=True)
        text.append(x)

    hidden_states, attentions = [torch.stack(text)], []
    for layer in range(config.num_hidden_layers):
        text, weights = encode_layer(config, parameters, text, places, layer)
        hidden_states.append(torch.stack(text))
        attentions.append(weights)
    if config.norm_position == "pre":
        hidden_states[-1] = torch.stack([norm(x, parameters, "norm", config) for x in text])
    return Encoded(hidden_states, attentions)


def encode_layer(
    config, parameters: dict, text: list[torch.Tensor], places: list[Place], layer: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x + attention(norm(x)), then x + feed_forward(norm(x)): Xiong et al. 2020, arXiv:2002.04745; or with the norms
    after each sum: Vaswani et al. 2017, arXiv:1706.03762."""
    name, pre = f"layers.{layer}", config.norm_position == "pre"
    options = layer_options(config, layer)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    widths = {"q_proj": head_dim, "k_proj": head_dim, "v_proj": config.value_head_dim or head_dim}

    projected = {projection: [] for projection in widths}
    for x in text:
        if pre and (layer > 0 or config.first_layer_norm):
            x = norm(x, parameters, f"{name}.attention_norm", config)
        for projection, width in widths.items():
            x_projected = linear(x, parameters, f"{name}.attention.{projection}", config.attention_bias)
            projected[projection].append(x_projected.split(width))

    prefix = f"{name}.attention."
    heads, weights = attention(
        *projected.values(),
        places,
        score=config.score_function,
        pattern=options["attention_pattern"],
        causal=config.causal,
        position=config.position_encoding,
        options=options,
        parameters={key.removeprefix(prefix): value for key, value in parameters.items() if key.startswith(prefix)},
    )

    outcome = []
    for x, attended in zip(text, heads, strict=True):
        x = x + linear(attended.flatten(), parameters, f"{name}.attention.o_proj", config.attention_bias)
        if not pre:
            x = norm(x, parameters, f"{name}.attention_post_norm", config)
        inner = norm(x, parameters, f"{name}.feed_forward_norm", config) if pre else x
        x = x + feed_forward(inner, parameters, f"{name}.feed_forward", config)
        if not pre:
            x = norm(x, parameters, f"{name}.feed_forward_post_norm", config)
        outcome.append(x)
    return outcome, weights
