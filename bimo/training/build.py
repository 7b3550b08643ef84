"""The model that a recipe describes, with its first weights.

config = model_config(recipe.model, tokenizer)
model = build_model(config, seed=0)
encoder = with_classes(load_encoder(directory), ("ham", "spam"), seed=0)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bimo.errors import UsageError
from bimo.models.config import DecoderConfig, EncoderConfig, LSTMConfig, ModelConfig, Seq2SeqConfig
from bimo.models.empty import MODELS
from bimo.models.encoder import Encoder
from bimo.models.initial import init_weights
from bimo.recipe import ModelRecipe, ObjectiveRecipe
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import PAD

__all__ = ["build_model", "decoder_config", "model_config", "with_classes"]


def build_model(config: ModelConfig, seed: int) -> Any:
    """A model of `config`; the same seed gives the same weights."""
    model: Any = MODELS[type(config)](config)
    init_weights(model, seed)
    return model


def with_classes(model: Encoder, labels: tuple[str, ...], seed: int) -> Encoder:
    """An encoder with a copy of `model`'s weights and a new head for these classes, and a new pooler if it has none.
    Heads for words and sentences are left behind. A head for the very same classes stays, so that learning can go on.
    """
    config = replace(
        model.config,
        labels=labels,
        pooler=True,
        masked_head=False,
        next_sentence_head=False,
        problem_type="single_label_classification",
    )
    weight = model.embed_tokens.weight
    found: Encoder = build_model(config, seed).to(weight.device, weight.dtype)
    is_new = labels != model.config.labels
    names = {name for name, _ in found.named_parameters() if not (is_new and name.startswith("classifier."))}
    found.load_state_dict({name: value for name, value in model.state_dict().items() if name in names}, strict=False)
    return found.train(model.training)


def model_config(recipe: ModelRecipe, objective: ObjectiveRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """What is built for this tokenizer. Raises UsageError for a tokenizer without the tokens the kind needs."""
    match recipe.kind:
        case "lstm":
            return LSTMConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=recipe.hidden_size,
                num_layers=recipe.num_layers,
                dropout=recipe.dropout,
                max_positions=recipe.context_length,
            )
        case "encoder":
            return EncoderConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=recipe.hidden_size,
                num_layers=recipe.num_layers,
                num_heads=recipe.heads,
                intermediate_size=recipe.intermediate_size or 4 * recipe.hidden_size,
                max_positions=recipe.context_length,
                dropout=recipe.dropout,
                attention_dropout=recipe.dropout,
                pad_token_id=tokenizer.backend.token_to_id("[PAD]"),
                pooler=objective.next_sentence,
                masked_head=True,
                next_sentence_head=objective.next_sentence,
            )
        case "seq2seq":
            return _seq2seq_config(recipe, tokenizer)
        case _:
            return decoder_config(recipe, tokenizer.vocab_size)


def decoder_config(recipe: ModelRecipe, vocab_size: int) -> DecoderConfig:
    """A decoder of Llama's shape. An MLP that was not given is 8/3 of hidden_size wide, in whole 64s (SwiGLU)."""
    heads = recipe.heads
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=heads,
        num_kv_heads=recipe.num_kv_heads or heads,
        head_dim=recipe.hidden_size // heads,
        intermediate_size=recipe.intermediate_size or -(-recipe.hidden_size * 8 // 3 // 64) * 64,
        max_positions=recipe.context_length,
        dropout=recipe.dropout,
    )


def _seq2seq_config(recipe: ModelRecipe, tokenizer: Tokenizer) -> Seq2SeqConfig:
    """The family's own values, but for the sizes; every dropout is the recipe's where the family has one."""
    pad = tokenizer.backend.token_to_id(PAD)
    if pad is None or not tokenizer.eos_token_ids:
        raise UsageError(
            f"{tokenizer.directory} has no {PAD} token, which an encoder-decoder needs: learn a bpe or unigram "
            f"tokenizer with this recipe",
            "tokenizer",
        )
    config = Seq2SeqConfig.of_family(
        recipe.family,
        vocab_size=tokenizer.vocab_size,
        hidden_size=recipe.hidden_size,
        num_encoder_layers=recipe.num_layers,
        num_decoder_layers=recipe.num_decoder_layers or recipe.num_layers,
        num_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        intermediate_size=recipe.intermediate_size or 4 * recipe.hidden_size,
        max_positions=recipe.context_length,
        dropout=recipe.dropout,
        decoder_start_token_id=pad,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_ids[0],
    )
    rates: dict[str, Any] = {
        name: recipe.dropout for name in ("attention_dropout", "activation_dropout") if getattr(config, name)
    }
    return replace(config, **rates)
