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
    """Where a token stands: the number of its document, its place in it, that document's number of tokens; and whether
    the user made it global."""

    document: int
    position: int
    length: int
    is_global: bool = False


# Scores: (query, key, head, group, options, parameters) -> number, for two vectors of width d_k.


def scaled_dot_product(query, key, head, group, options, parameters):
    """Vaswani et al. 2017, arXiv:1706.03762, equation 1."""
    return torch.dot(query, key) / math.sqrt(len(query))


def dot_product(query, key, head, group, options, parameters):
    """Luong et al. 2015, arXiv:1508.04025, section 3.1, "dot"."""
    return torch.dot(query, key)


def cosine(query, key, head, group, options, parameters):
    """Henry et al. 2020, arXiv:2010.04245, section 3: the cosine times a number, learned for each head or fixed."""
    cosine_of_angle = torch.dot(query, key) / (query.norm() * key.norm())
    if options.get("learned_temperature") is False:
        return cosine_of_angle / (options.get("temperature") or 0.1)
    return cosine_of_angle * torch.exp(parameters["score_function.log_scale"][head][0])


def additive(query, key, head, group, options, parameters):
    """Bahdanau et al. 2014, arXiv:1409.0473, appendix A.1.2: v · tanh(W_q query + W_k key)."""
    width = len(query)
    w_query = parameters["score_function.query_weight"][head].view(width, width)
    w_key = parameters["score_function.key_weight"][group].view(width, width)
    return torch.dot(parameters["score_function.v"][head], torch.tanh(w_query @ query + w_key @ key))


SCORES = {
    "scaled_dot_product": scaled_dot_product,
    "dot_product": dot_product,
    "cosine": cosine,
    "additive": additive,
}


# Patterns: (query, key, head, options) -> bool, for the places of two tokens of one document.


def full(query, key, head, options):
    """Vaswani et al. 2017, arXiv:1706.03762, section 3.2: everybody sees everybody."""
    return True


def sliding_window(query, key, head, options):
    """Beltagy et al. 2020, arXiv:2004.05150, section 3.1: so many tokens on either side, every so many-th."""
    steps, rest = divmod(abs(query.position - key.position), options.get("dilation") or 1)
    return rest == 0 and steps <= options["window_radius"]


def longformer(query, key, head, options):
    """Beltagy et al. 2020, arXiv:2004.05150, section 3.1: a window, and global tokens that see and are seen by all."""
    if is_global(query, options) or is_global(key, options):
        return True
    return abs(query.position - key.position) <= options["window_radius"]


def is_global(place, options):
    """The first few tokens of a document, and those that the user names."""
    number = options.get("num_global_tokens")
    return place.is_global or place.position < (1 if number is None else number)


def bigbird(query, key, head, options):
    """Zaheer et al. 2020, arXiv:2007.14062, section 2: a window of blocks, global blocks, and random ones.

    Global blocks are taken in turn from the beginning and the end.
    """
    defaults = {
        "block_size": 64,
        "block_radius": 1,
        "num_global_blocks": 2,
        "num_random_blocks": 3,
        "random_blocks_seed": 0,
    }
    size, radius, num_global, num_random, seed = (
        default if options.get(name) is None else options[name] for name, default in defaults.items()
    )
    num_blocks = math.ceil(query.length / size)
    own, other = query.position // size, key.position // size
    if abs(own - other) <= radius:
        return True
    in_turn = [block for i in range(num_blocks) for block in (i, num_blocks - 1 - i)]
    if own in in_turn[:num_global] or other in in_turn[:num_global]:
        return True
    return any(other == random_block(seed, options["layer"], i, head, own, num_blocks) for i in range(num_random))


def random_block(seed, layer, number, head, block, num_blocks):
    """The block seen by `block` in `head`: a hash, so that it needs no table; the one part taken from the code."""
    state = scramble(seed)
    for part in (layer, number, head, block):
        state = scramble(state + part)
    return state % num_blocks


def scramble(number):
    """32 bits to 31 bits: lowbias32 (Wellons 2018), its lowest bit dropped."""
    number %= 2**32
    number = ((number ^ (number >> 16)) * 0x7FEB352D) % 2**32
    number = ((number ^ (number >> 15)) * 0x846CA68B) % 2**32
    return (number ^ (number >> 16)) >> 1


PATTERNS = {"full": full, "sliding_window": sliding_window, "longformer": longformer, "bigbird": bigbird}


# Positions: what they add to an embedding, what they make of queries and keys, what they add to a score.


class Position(NamedTuple):
    """The places where order may enter; None: it does not enter there.

    Attributes:
        added: (position, width, options, parameters) -> vector of that width added to the token's embedding.
        query, key: (vector, position, head, options, parameters) -> the vector that is scored instead.
        bias: (query, query position, key position, head, options, parameters) -> number added to the score, from the
            query as it was projected.
    """

    added: Callable | None = None
    query: Callable | None = None
    key: Callable | None = None
    bias: Callable | None = None


def learned(position, width, options, parameters):
    """Devlin et al. 2018, arXiv:1810.04805, section 3: a vector for each place."""
    return parameters["embeddings.positions.weight"][position]


def sinusoids(position, width):
    """Vaswani et al. 2017, arXiv:1706.03762, section 3.5: sin and cos in turn, of ever slower waves."""
    waves = []
    for i in range(width):
        angle = position / 10_000 ** (2 * (i // 2) / width)
        waves.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return torch.tensor(waves, dtype=torch.float64)


def sinusoidal(position, width, options, parameters):
    """The sinusoids, as large as token vectors are at the start."""
    return sinusoids(position, width) * options["initializer_range"]


def rotary(vector, position, head, options, parameters):
    """Su et al. 2021, arXiv:2104.09864, equation 15, over the first r features, where i and i + r / 2 are a pair."""
    rope = options.get("rope_parameters") or {}
    rope = rope.get(options["attention_pattern"], rope)
    width = int(len(vector) * rope.get("partial_rotary_factor", 1))
    features = vector.unbind()
    turned = list(features)
    for i in range(width // 2):
        angle = position * rope.get("rope_theta", 10_000.0) ** (-2 * i / width)
        j = i + width // 2
        turned[i] = features[i] * math.cos(angle) - features[j] * math.sin(angle)
        turned[j] = features[i] * math.sin(angle) + features[j] * math.cos(angle)
    return torch.stack(turned)


def alibi(query, query_position, key_position, head, options, parameters):
    """Press et al. 2021, arXiv:2108.12409, section 3; symmetric, so that it serves both directions."""
    return -parameters["position.slopes"][head] * abs(query_position - key_position)


def t5(query, query_position, key_position, head, options, parameters):
    """Raffel et al. 2019, arXiv:1910.10683, section 2.1: a number for each head and bucket of distances."""
    return parameters["position.table"][head][t5_bucket(key_position - query_position, options)]


def t5_bucket(distance, options):
    """Half of a side's buckets hold one distance each; the others grow with the logarithm up to the farthest.

    Both directions have half of the buckets each; causal attention needs those of keys before the query alone.
    """
    buckets = options.get("relative_num_buckets") or 32
    farthest = options.get("relative_max_distance") or 128
    offset = 0
    if options["causal"]:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    single = buckets // 2
    if distance < single:
        return offset + distance
    along = math.log(distance / single) / math.log(farthest / single)
    return offset + min(single + int(along * (buckets - single)), buckets - 1)


def transformer_xl_query(vector, position, head, options, parameters):
    """u of Dai et al. 2019, arXiv:1901.02860, section 3.3."""
    return vector + parameters["position.content_bias"][head]


def transformer_xl_bias(query, query_position, key_position, head, options, parameters):
    """(q + v) · W_r R(i - j), scaled as scores are."""
    weight = parameters["position.r_proj.weight"]
    of_head = weight[head * len(query) : (head + 1) * len(query)]
    waves = sinusoids(query_position - key_position, weight.shape[1])
    by_position = query + parameters["position.position_bias"][head]
    return torch.dot(by_position, of_head @ waves) / math.sqrt(len(query))


POSITIONS = {
    "none": Position(),
    "learned": Position(added=learned),
    "sinusoidal": Position(added=sinusoidal),
    "rotary": Position(query=rotary, key=rotary),
    "alibi": Position(bias=alibi),
    "t5": Position(bias=t5),
    "transformer_xl": Position(query=transformer_xl_query, bias=transformer_xl_bias),
}


OPTIONS = {
    "cosine": {"temperature": 0.5},
    "sliding_window": {"window_radius": 3},
    "longformer": {"window_radius": 2, "num_global_tokens": 2},
    "bigbird": {"block_size": 3, "block_radius": 1, "num_global_blocks": 1, "num_random_blocks": 2},
    "learned": {"max_position_embeddings": 64},
    "sinusoidal": {"initializer_range": 0.5},
    "rotary": {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    "t5": {"relative_num_buckets": 8, "relative_max_distance": 12},
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
    how, cap = POSITIONS[position], options.get("logit_softcap")
    all_weights = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.float64)
    heads = [[torch.zeros_like(values[i][0])] * num_heads for i in range(num_tokens)]
    for head in range(num_heads):
        group = head // (num_heads // num_groups)
        own_queries, own_keys = [token[head] for token in queries], [token[group] for token in keys]
        own = (head, options, parameters)
        if how.query is not None:
            own_queries = [how.query(q, place.position, *own) for q, place in zip(own_queries, places, strict=True)]
        if how.key is not None:
            own_keys = [how.key(k, place.position, *own) for k, place in zip(own_keys, places, strict=True)]
        for i in range(num_tokens):
            seen, scores = [], []
            for j in range(num_tokens):
                if not sees(places[i], places[j], pattern, causal, head, options):
                    continue
                if mask is not None and not mask[head][i][j]:
                    continue
                number = SCORES[score](own_queries[i], own_keys[j], head, group, options, parameters)
                if cap is not None:
                    number = cap * torch.tanh(number / cap)
                if how.bias is not None:
                    number = number + how.bias(queries[i][head], places[i].position, places[j].position, *own)
                seen.append(j)
                scores.append(number)
            if not seen:
                continue
            if options.get("attention_sink"):
                scores.append(parameters["score_function.sink"][head])
            weights = softmax(torch.stack(scores))
            for j, weight in zip(seen, weights, strict=False):
                heads[i][head] = heads[i][head] + weight * values[j][group]
                all_weights[head, i, j] = weight.detach()
    return torch.stack([torch.stack(of_token) for of_token in heads]), all_weights


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
    is_global: list[bool] | None = None,
) -> Encoded:
    """The hidden states and attention weights of one document alone.

    Args:
        config: a SelfAttnConfig; only its fields are read.
        parameters: a SelfAttnModel's state dict, in float64.
        embeds: (N, embedding width), the vectors of the tokens.
        token_types: of each token; None: all 0.
        positions: of each token; None: from 0.
        is_global: whether the user made a token global; None: no.
    """
    num_tokens = len(embeds)
    positions = list(range(num_tokens)) if positions is None else positions
    chosen = [False] * num_tokens if is_global is None else is_global
    places = [Place(0, positions[n], num_tokens, chosen[n]) for n in range(num_tokens)]
    added = POSITIONS[config.position_encoding].added

    text = []
    for n, x in enumerate(embeds):
        if config.type_vocab_size > 0:
            x = x + parameters["embeddings.token_types.weight"][0 if token_types is None else token_types[n]]
        if added is not None:
            x = x + added(positions[n], len(x), layer_options(config, 0), parameters)
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
    normed = text
    if pre and (layer > 0 or config.first_layer_norm):
        normed = [norm(x, parameters, f"{name}.attention_norm", config) for x in text]
    heads, weights = self_attention(config, parameters, normed, places, layer, f"{name}.attention")
    if config.global_projections:
        # Beltagy et al. 2020, section 3.1: global queries, and all that they see, have projections of their own.
        other = self_attention(config, parameters, normed, places, layer, f"{name}.attention.of_global")
        for i, place in enumerate(places):
            if is_global(place, layer_options(config, layer)):
                heads[i], weights[:, i] = other[0][i], other[1][:, i]

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


def self_attention(
    config, parameters: dict, text: list[torch.Tensor], places: list[Place], layer: int, name: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Projections, the norm of query and key in each head where there is one, attention; (H, d_v) of each token."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    widths = {"q_proj": head_dim, "k_proj": head_dim, "v_proj": config.value_head_dim or head_dim}
    projected = {projection: [] for projection in widths}
    for x in text:
        for projection, width in widths.items():
            vectors = linear(x, parameters, f"{name}.{projection}", config.attention_bias).split(width)
            if config.qk_norm and projection != "v_proj":
                of_head = f"{name}.{projection[0]}_norm"
                vectors = [norm(vector, parameters, of_head, config) for vector in vectors]
            projected[projection].append(vectors)

    options, prefix = layer_options(config, layer), f"{name}."
    heads, weights = attention(
        *projected.values(),
        places,
        score=config.score_function,
        pattern=options["attention_pattern"],
        causal=config.causal,
        position=config.position_encoding,
        options=options,
        parameters={key.removeprefix(prefix): x for key, x in parameters.items() if key.startswith(prefix)},
    )
    return list(heads), weights
