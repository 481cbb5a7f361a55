"""List the backbones: post-LN encoders that differ in names and details. To add one, register one `Backbone`.

Free of JAX, because the settings are made from this table. Source: docs/method.md, "Encoder", "Checkpoints".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Names = tuple[tuple[str, str], ...]  # (key in the parameter tree, name on disk), in order of computation

BERT_TOKENS = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A family of encoders."""

    name: str  # `model_type` in config.json, and the prefix of weight names on disk
    # Other `model_type`s with the same parameters: the published code names a model after what it does.
    aliases: tuple[str, ...] = ()
    class_name: str  # beginning of the class name in config.json
    keys: Mapping[str, str]  # `ModelConfig` field -> key in config.json
    activation_key: str  # key in config.json of `ModelConfig.activation`
    # `ModelConfig` fields for a silent config.json, where they differ from `ModelConfig`'s own.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embeddings: Names  # names below `<name>.embeddings`
    stack: str  # module that holds the layers and the selectors
    layer: Names  # names below `<name>.<stack>.layer.<number>`
    pooler: bool  # whether a tanh layer in the encoder reads [CLS]; else `pre_classifier` of the head does
    attention_output_dropout: bool = True  # whether dropout follows the output projection of attention
    span_dropout: float = 0.0  # dropout probability before the last layer of a span head
    decays_layer_norm: bool = False  # whether weight decay applies to LayerNorm scales outside the embeddings
    # Role -> token, unless the tokenizer's own files name it.
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=lambda: BERT_TOKENS)


BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> Backbone:
    """Adds a backbone to `BACKBONES`; raises `ValueError` if its name or an alias is taken."""
    taken = [name for name in (backbone.name, *backbone.aliases) if find_backbone(name)]
    if taken:
        raise ValueError(f"model type {taken[0]!r} is registered already")
    BACKBONES[backbone.name] = backbone
    return backbone


def find_backbone(model_type: Any) -> Backbone | None:
    """Returns the backbone of this name or alias, or None."""
    return next((b for b in BACKBONES.values() if model_type in (b.name, *b.aliases)), None)


def _pairs(text: str) -> Names:
    """Reads words `name=other`; a name alone is paired with itself."""
    words = (word.partition("=") for word in text.split())
    return tuple((name, other or name) for name, _, other in words)


register_backbone(
    Backbone(
        name="bert",
        aliases=("autobert", "initbert"),
        class_name="Bert",
        keys=dict(
            _pairs(
                "vocab_size hidden_size num_layers=num_hidden_layers num_heads=num_attention_heads "
                "intermediate_size max_positions=max_position_embeddings type_vocab_size layer_norm_eps "
                "hidden_dropout=hidden_dropout_prob attention_dropout=attention_probs_dropout_prob "
                "classifier_dropout initializer_range pad_token_id"
            )
        ),
        activation_key="hidden_act",
        embeddings=_pairs(
            "word=word_embeddings position=position_embeddings token_type=token_type_embeddings "
            "norm=LayerNorm"
        ),
        stack="encoder",
        layer=_pairs(
            "query=attention.self.query key=attention.self.key value=attention.self.value "
            "attention_output=attention.output.dense attention_norm=attention.output.LayerNorm "
            "intermediate=intermediate.dense output=output.dense output_norm=output.LayerNorm"
        ),
        pooler=True,
    )
)

register_backbone(
    Backbone(
        name="distilbert",
        aliases=("distilautobert", "initdistilbert"),
        class_name="DistilBert",
        keys=dict(
            _pairs(
                "vocab_size hidden_size=dim num_layers=n_layers num_heads=n_heads "
                "intermediate_size=hidden_dim max_positions=max_position_embeddings "
                "hidden_dropout=dropout attention_dropout classifier_dropout=seq_classif_dropout "
                "initializer_range pad_token_id"
            )
        ),
        activation_key="activation",
        defaults={"num_layers": 6, "type_vocab_size": 0, "classifier_dropout": 0.2},
        embeddings=_pairs("word=word_embeddings position=position_embeddings norm=LayerNorm"),
        stack="transformer",
        layer=_pairs(
            "query=attention.q_lin key=attention.k_lin value=attention.v_lin "
            "attention_output=attention.out_lin attention_norm=sa_layer_norm intermediate=ffn.lin1 "
            "output=ffn.lin2 output_norm=output_layer_norm"
        ),
        pooler=False,
        attention_output_dropout=False,
        span_dropout=0.1,
        # The published exclusion from decay goes by name, and misses DistilBERT's own LayerNorms.
        decays_layer_norm=True,
    )
)
