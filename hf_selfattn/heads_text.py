"""Heads for text: masked language model, classifiers of texts and tokens, answers, multiple choice."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .encoder import SelfAttnModel, SelfAttnPreTrainedModel
from .losses import IGNORED, check_labels, classification_loss, cross_entropy, linear_cross_entropy, span_loss
from .norms import make_norm
from .packing import Packing, values_can_be_read


class PredictionHead(nn.Module):
    """dense, activation, norm: what stands between the encoder and an output layer.

    Args:
        config: a SelfAttnConfig.
        size: the width of what comes out.
    """

    def __init__(self, config, size: int):
        super().__init__()
        modern = config.head_type == "modernbert"
        self.dense = nn.Linear(config.hidden_size, size, bias=not modern)
        self.activation = ACT2FN["gelu" if config.head_type in ("roberta", "electra") else config.hidden_act]
        self.norm = make_norm(config, size, bias=config.norm_bias if modern else True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, size)."""
        return self.norm(self.activation(self.dense(hidden_states)))


class TextHead(nn.Module):
    """What stands between the pooled text and the classifier in BERT and RoBERTa (tanh), ELECTRA (gelu) and DistilBERT
    (relu).

    RoBERTa and ELECTRA have dropout before the dense layer too; all have it after.
    """

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout if config.head_type in ("roberta", "electra") else 0.0)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[{"electra": "gelu", "distilbert": "relu"}.get(config.head_type, "tanh")]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) to (B, D)."""
        return self.activation(self.dense(self.dropout(pooled)))


class Classifier(nn.Module):
    """What a classifier has above the encoder: the layer that `head_type` has there, dropout, and a linear layer.

    All of it is new where the task is new. It is one module, as in RoBERTa, since PEFT trains and saves what is new by
    the names `classifier` and `qa_outputs`.

    Args:
        config: a SelfAttnConfig.
        num_outputs: the width of what comes out.
        of_texts: whether it reads one vector for each text, or one for each token.
    """

    def __init__(self, config, num_outputs: int, of_texts: bool):
        super().__init__()
        if config.head_type == "modernbert":
            self.head = PredictionHead(config, config.hidden_size)
        else:
            self.head = TextHead(config) if of_texts else nn.Identity()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, num_outputs)."""
        return self.out_proj(self.dropout(self.head(hidden_states)))


def pool(hidden_states: torch.Tensor, packing: Packing, pooling: str) -> torch.Tensor:
    """One vector for each document, its first token, or the mean or maximum over its tokens: (documents, D).

    With one document in each row these are the B rows, 0 for a row without a real token; else the documents that have
    one, row by row.

    Args:
        hidden_states: (R, N, D) in the layout.
        packing: the form of the batch.
        pooling: "first", "mean" or "max".
    """
    if packing.is_packed or not packing.one_document:
        return _pool_documents(hidden_states, packing, pooling)
    real = packing.real.unsqueeze(-1)
    if pooling == "first":
        first = packing.real.long().argmax(dim=1)
        pooled = hidden_states[torch.arange(len(first), device=first.device), first]
    elif pooling == "mean":
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        pooled = (hidden_states * real).sum(1, dtype=exact) / real.sum(1).clamp(min=1)
        pooled = pooled.to(hidden_states.dtype)
    else:
        pooled = hidden_states.masked_fill(~real, torch.finfo(hidden_states.dtype).min).amax(1)
    return pooled.masked_fill(~packing.real.any(1, keepdim=True), 0)


def _pool_documents(hidden_states: torch.Tensor, packing: Packing, pooling: str) -> torch.Tensor:
    """`pool` over documents wherever they stand."""
    number, hidden = packing.tokens.document.flatten(), hidden_states.flatten(0, 1)
    if not packing.is_packed:
        real = (number >= 0).nonzero().squeeze(1)
        number, hidden = number[real], hidden[real]
    count = packing.shape[0]
    if not packing.one_document:
        documents, number = number.unique_consecutive(return_inverse=True)
        count = len(documents)
    pooled = hidden.new_zeros(count, hidden.shape[-1])
    if pooling == "first":
        first = torch.ones_like(number, dtype=torch.bool)
        first[1:] = number[1:] != number[:-1]
        first = first.nonzero().squeeze(1)
        return pooled.index_copy(0, number[first], hidden.index_select(0, first))
    if pooling == "mean":
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = pooled.to(exact).index_add(0, number, hidden.to(exact))
        return (total / number.bincount(minlength=count).clamp(min=1).unsqueeze(1)).to(hidden.dtype)
    index = number.unsqueeze(1).expand_as(hidden)
    return pooled.scatter_reduce(0, index, hidden, "amax", include_self=False)


class SelfAttnForMaskedLM(SelfAttnPreTrainedModel):
    """The encoder with a masked language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        super().__init__(config)
        self.model = SelfAttnModel(config)
        self.prediction_head = PredictionHead(config, config.embedding_width)
        self.lm_head = nn.Linear(config.embedding_width, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        """
        Args:
            input_ids, attention_mask: as in `SelfAttnModel.forward`, like all of `kwargs`.
            labels: (B, N) token ids, -100 where there is nothing to predict.
            num_items_in_batch: labelled tokens of all accumulation steps and processes, given by the Trainer.

        Returns:
            `loss` in nats and `logits` (B, N, V), 0 at padding. In training mode with labels, logits are made of
            labelled tokens alone and not kept: `logits` is None.
        """
        outputs, packing = self.model(input_ids, attention_mask, return_packing=True, **_as_dict(kwargs))
        loss = logits = None
        if labels is not None:
            check_labels(labels, packing.shape)
            labels = packing.pack(labels.to(outputs.last_hidden_state.device), fill=IGNORED)
        if labels is not None and self.training:
            loss = self.sparse_loss(outputs.last_hidden_state, labels, num_items_in_batch)
        else:
            logits = self.lm_head(self.prediction_head(outputs.last_hidden_state))
            loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
            logits = packing.unpack(logits)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def sparse_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """The loss of (R, N, D) and labels (R, N), from labelled tokens alone."""
        if not values_can_be_read(labels):
            return cross_entropy(self.lm_head(self.prediction_head(hidden_states)), labels, num_items_in_batch)
        labels = labels.flatten()
        rows = (labels != IGNORED).nonzero().squeeze(1)
        labels = labels.index_select(0, rows)
        predicted = self.prediction_head(hidden_states.flatten(0, 1).index_select(0, rows))
        head = self.lm_head
        hooks = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
        if hooks or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
            # An adapter, or a weight that is spread over devices or offloaded, knows best how to multiply itself.
            return cross_entropy(self.lm_head(predicted), labels, num_items_in_batch)
        return linear_cross_entropy(predicted, self.lm_head.weight, self.lm_head.bias, labels, num_items_in_batch)


class SelfAttnForSequenceClassification(SelfAttnPreTrainedModel):
    """The encoder with a classifier of whole texts: one label, several labels, or numbers (regression)."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfAttnModel(config)
        self.classifier = Classifier(config, config.num_labels, of_texts=True)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        """
        Args:
            input_ids, attention_mask: as in `SelfAttnModel.forward`, like all of `kwargs`.
            labels: as in `losses.classification_loss`. Where `config.problem_type` is None: regression if there is
                one output, single label if labels are integers, else multi label.
            num_items_in_batch: entries of labels of all accumulation steps and processes, given by the Trainer.

        Returns:
            `loss` and `logits` (B, num_labels); with several documents in a row, (documents, num_labels) and as many
            `labels`, row by row.
        """
        outputs, packing = self.model(input_ids, attention_mask, return_packing=True, **_as_dict(kwargs))
        pooled = pool(outputs.last_hidden_state, packing, self.config.pooling)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            problem = self.config.problem_type or _problem_type(self.num_labels, labels)
            loss = classification_loss(logits, labels, problem, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SelfAttnForTokenClassification(SelfAttnPreTrainedModel):
    """The encoder with a classifier of tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SelfAttnModel(config)
        self.classifier = Classifier(config, config.num_labels, of_texts=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        """
        Args:
            input_ids, attention_mask: as in `SelfAttnModel.forward`, like all of `kwargs`.
            labels: (B, N) class numbers, -100 for none.
            num_items_in_batch: labelled tokens of all accumulation steps and processes, given by the Trainer.

        Returns:
            `loss` and `logits` (B, N, num_labels), 0 at padding.
        """
        outputs, packing = self.model(input_ids, attention_mask, return_packing=True, **_as_dict(kwargs))
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            check_labels(labels, packing.shape)
            loss = cross_entropy(logits, packing.pack(labels.to(logits.device), fill=IGNORED), num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss,
            logits=packing.unpack(logits),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SelfAttnForQuestionAnswering(SelfAttnPreTrainedModel):
    """The encoder with two outputs for each token: where the answer starts and where it ends."""

    accepts_loss_kwargs = False  # its batches carry no `labels`, so the Trainer cannot count its items

    def __init__(self, config):
        super().__init__(config)
        self.model = SelfAttnModel(config)
        self.qa_outputs = Classifier(config, 2, of_texts=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, start_positions=None, end_positions=None, **kwargs):
        """
        Args:
            input_ids, attention_mask: as in `SelfAttnModel.forward`, like all of `kwargs`.
            start_positions, end_positions: (B,) the places of the answer's first and last token.

        Returns:
            `loss`, `start_logits` and `end_logits` (B, N), 0 at padding.
        """
        outputs, packing = self.model(input_ids, attention_mask, return_packing=True, **_as_dict(kwargs))
        logits = packing.unpack(self.qa_outputs(outputs.last_hidden_state))
        start_logits, end_logits = (side.squeeze(-1).contiguous() for side in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, packing.real)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SelfAttnForMultipleChoice(SelfAttnPreTrainedModel):
    """The encoder with one number for each choice."""

    def __init__(self, config):
        super().__init__(config)
        self.model = SelfAttnModel(config)
        self.choice_output = Classifier(config, 1, of_texts=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        position_ids=None,
        token_type_ids=None,
        inputs_embeds=None,
        global_attention_mask=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """
        Args:
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds, global_attention_mask: as in
                `SelfAttnModel.forward`, with one more dimension for the choices: (B, C, …).
            labels: (B,) the number of the right choice, or -100 for none.
            num_items_in_batch: labelled examples of all accumulation steps and processes, given by the Trainer.

        Returns:
            `loss` and `logits` (B, C).
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and given.dim() < 3:
            raise ValueError(
                "Multiple choice reads input_ids (B, C, N) or inputs_embeds (B, C, N, width), got "
                f"{tuple(given.shape)}. Add a dimension for the choices."
            )
        flat = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds, global_attention_mask)
        )
        outputs, packing = self.model(*flat, return_packing=True, **_as_dict(kwargs))
        pooled = pool(outputs.last_hidden_state, packing, self.config.pooling)
        if len(pooled) != packing.shape[0]:
            raise ValueError(
                f"Multiple choice has one text for each choice, got {len(pooled)} documents in {packing.shape[0]} "
                "rows (position_ids or cu_seq_lens_q say so). Pass one document in each row, with an attention_mask."
            )
        logits = self.choice_output(pooled).view(given.shape[:2])
        return MultipleChoiceModelOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _problem_type(num_labels: int, labels: torch.Tensor) -> str:
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _as_dict(kwargs: dict) -> dict:
    """The arguments for the encoder, which answers with a dict whatever is asked of the head."""
    return {**kwargs, "return_dict": True}
