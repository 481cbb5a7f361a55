"""Write a model as an ONNX graph that drops tokens itself: dynamic shapes, exact for each row.

The graph is the packed encoder (`model.packed`): the remaining tokens of a batch are one array [C, H], and
only attention sees rows. Source: docs/method.md, "Packed execution".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import spox.opset.ai.onnx.v20 as op
from onnx import ModelProto, numpy_helper
from spox import Tensor, Var, argument, build

from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.reduction.match import EPSILON, NUM_FEATURES, WINDOW

Array = npt.NDArray[Any]
Tree = Mapping[str, Any]  # a subtree of the parameters

MASKED = -1e4  # added to the score of a key that is not there; its weight is exactly 0
# Activation in config.json -> ONNX.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), op.gelu),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
        lambda x: op.gelu(x, approximate="tanh"),
    ),
    "relu": op.relu,
    **dict.fromkeys(("silu", "swish"), lambda x: op.mul(x, op.sigmoid(x))),
    "tanh": op.tanh,
}


def onnx_model(
    config: ModelConfig,
    params: Any,
    thresholds: Sequence[float] | None = None,
    stored: str = "float32",
    given: bool = False,
    padded: bool = False,
) -> ModelProto:
    """Builds the graph of a model, without token reduction if there are no `thresholds`.

    Inputs: `input_ids` and `attention_mask` int64 [rows, tokens]; `token_type_ids` alike if the backbone has
    types; `threshold` float32 [points], the keep probability from which a point keeps a token, by default
    `thresholds`; what the head reads, `candidates` int64 [rows, C] or `sentences` int64 [rows, N, 2]; for
    options that decide together on a shared passage `shared` int64 [rows, tokens] and `group` int64, the rows
    of a question.

    Outputs: `logits` float32, shaped as those of the head, or `span`, `kind` and `sentence`; for each point
    `kept_0`, ..., bool [rows, tokens].

    A graph with `given` tokens keeps those of the input `actions`, bool [points, rows, tokens], whatever the
    selectors say; for benchmarks. One that is `padded`, without reduction, computes padding too, as graphs of
    other exporters do: a little faster where there is none. Matrices are `stored` as float32, float16 or
    bfloat16 and computed with in float32; those of the selectors stay float32. Raises `UserError` for an
    activation that ONNX lacks.
    """
    graph = _Graph(config, params, stored, given, padded)
    model = build(*graph.build(thresholds is not None))
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in constants:  # quantizers look for initializers
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    if thresholds is not None:
        default = numpy_helper.from_array(np.array(thresholds, np.float32), "threshold")
        model.graph.initializer.append(default)
    model.producer_name = "trbert_jax"
    return model


def selector_products(model: ModelProto) -> list[str]:
    """Returns the names of the matrix products of the selectors: those between a state and a decision."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    pending = [node.input[0] for node in model.graph.node if node.op_type == "GreaterOrEqual"]
    found = set[str]()
    while pending:
        node = made_by.get(pending.pop())
        if node is not None and node.op_type != "LayerNormalization":
            found |= {node.name} if node.op_type == "MatMul" else set()
            pending += node.input
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the tokens of a flat array [C, H] stand in a rectangle of rows, [B, T]."""

    width: Var  # int64 [1], T
    slot: Var  # int64 [C], place of each token in the rectangle
    source: Var  # int64 [B * T], token of each place; C where there is none
    bias: Var  # float32 [B, 1, 1, T], for attention scores
    first: Var  # int64 [B], the first token of each row


def _ints(*values: int) -> Var:
    return op.const(np.array(values, np.int64))


def _floats(values: Any) -> Var:
    return op.const(np.asarray(values, np.float32))


class _Graph:
    """Builds the parts of the graph; states are flat, [C, H]."""

    def __init__(
        self, config: ModelConfig, params: Any, stored: str, given: bool, padded: bool = False
    ) -> None:
        if config.activation not in _ACTIVATIONS:
            raise UserError(f"activation {config.activation!r} cannot be exported")
        self.config, self.encoder, self.head = config, params["encoder"], params["head"]
        self.given, self.padded = given, padded
        self.stored = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[stored]

    def build(self, reduce: bool) -> tuple[dict[str, Var], dict[str, Var]]:
        """Returns inputs and outputs by name."""
        config = self.config
        rows, inputs = Tensor(np.int64, ("rows", "tokens")), dict[str, Var]()
        names = ["input_ids", "attention_mask", *["token_type_ids"] * bool(config.type_vocab_size)]
        inputs |= {name: argument(rows) for name in names}
        shape = op.shape(inputs["input_ids"])
        columns = op.gather(shape, _ints(1))
        make = self.padded_layout if self.padded else self.layout
        layout, origin = make(op.cast(inputs["attention_mask"], to=np.bool_))
        states, points = self.embed(inputs, origin, columns), config.reduction_layers if reduce else ()
        outputs, left = dict[str, Var](), list[tuple[Var, Var]]()
        if points:
            inputs["threshold"] = argument(Tensor(np.float32, (len(points),)))
            limits, passage = self.limits(inputs["threshold"]), None
            if self.given:
                inputs["actions"] = argument(Tensor(np.bool_, (len(points), "rows", "tokens")))
            if config.task == "multiple_choice" and config.inputs.choices == "shared":
                inputs["shared"], inputs["group"] = argument(rows), argument(Tensor(np.int64, ()))
                passage = _Passage.of(inputs["shared"], inputs["group"], shape)
        last = config.num_layers - 1
        for layer in range(config.num_layers):
            if layer in points:
                stage, read = points.index(layer), states
                if config.selector_match:
                    types = op.gather(op.reshape(inputs["token_type_ids"], _ints(-1)), origin)
                    match = self.match(states, types, op.mod(origin, columns), layout)
                    read = op.concat([states, match], axis=1)
                logits = self.selector_logits(read, stage)
                limit = op.gather(limits, _ints(stage))
                if passage is None:
                    keep = op.greater_or_equal(logits, limit)
                else:
                    logits, scored = passage.mean(logits, origin), op.gather(passage.shared, origin)
                    keep = op.or_(op.greater_or_equal(logits, limit), op.not_(scored))
                if self.given:
                    action = op.gather(inputs["actions"], op.const(np.int64(stage)))
                    keep = op.and_(keep, op.gather(op.reshape(action, _ints(-1)), origin))
                keep = op.or_(keep, op.equal(op.mod(layout.slot, layout.width), _ints(0)))  # [CLS]
                if config.reads_all_tokens:
                    gone = _positions(op.not_(keep))
                    left.append((op.gather(origin, gone), op.gather(states, gone)))
                kept = _positions(keep)
                states, origin = op.gather(states, kept), op.gather(origin, kept)
                layout = self.smaller(layout, keep, kept)
                outputs[f"kept_{stage}"] = _scatter(shape, origin, op.const(np.array([True])), np.bool_)
            alone = layer == last and not config.reads_all_tokens
            states = self.layer(states, layer, layout, alone)
        left.append((origin, states))
        outputs = {**self.answers(inputs, shape, left), **outputs}
        return inputs, outputs

    # Layouts

    def layout(self, present: Var) -> tuple[_Layout, Var]:
        """Lays out the tokens of bool [B, T]; returns also their places there, int64 [C]."""
        places = _positions(op.reshape(present, _ints(-1)))
        whole = op.shape(present)
        old = _Rectangle(op.gather(whole, _ints(1)), places)
        return self._packed(present, old), places

    def padded_layout(self, present: Var) -> tuple[_Layout, Var]:
        """As `layout`, but of all places."""
        shape = op.shape(present)
        rows, width = op.gather(shape, _ints(0)), op.gather(shape, _ints(1))
        zero, one = op.const(np.int64(0)), op.const(np.int64(1))
        places = op.range(zero, op.reduce_prod(shape, keepdims=0), one)
        first = op.mul(op.range(zero, op.squeeze(rows), one), width)
        bias = op.unsqueeze(op.where(present, _floats(0), _floats(MASKED)), _ints(1, 2))
        return _Layout(width, places, places, bias, first), places

    def smaller(self, layout: _Layout, keep: Var, kept: Var) -> _Layout:
        """Returns the layout of the tokens that are kept: bool [C], and their positions."""
        padded = op.concat([keep, op.const(np.array([False]))], axis=0)
        present = op.reshape(op.gather(padded, layout.source), op.concat([_ints(-1), layout.width], axis=0))
        return self._packed(present, _Rectangle(layout.width, op.gather(layout.slot, kept)))

    def _packed(self, present: Var, old: "_Rectangle") -> _Layout:
        count = op.cast(present, to=np.int64)  # [B, T]
        length = op.reduce_sum(count, _ints(1), keepdims=1)  # [B, 1]
        width = op.reshape(op.reduce_max(length, keepdims=0), _ints(1))
        first = op.cumsum(length, op.const(np.int64(0)), exclusive=1)  # [B, 1]
        column = op.unsqueeze(
            op.range(op.const(np.int64(0)), op.squeeze(width), op.const(np.int64(1))), _ints(0)
        )
        inside = op.less(column, length)  # [B, T']
        total = op.reduce_sum(length, keepdims=0)
        source = op.where(inside, op.add(first, column), total)
        place = op.cumsum(count, op.const(np.int64(1)), exclusive=1)  # [B, T], in the new row
        row = op.div(old.slot, old.width)
        slot = op.add(op.mul(row, width), op.gather(op.reshape(place, _ints(-1)), old.slot))
        bias = op.unsqueeze(op.where(inside, _floats(0), _floats(MASKED)), _ints(1, 2))
        return _Layout(width, slot, op.reshape(source, _ints(-1)), bias, op.reshape(first, _ints(-1)))

    # Encoder

    def embed(self, inputs: Mapping[str, Var], origin: Var, columns: Var) -> Var:
        tables = self.encoder["embeddings"]

        def look(name: str, index: Var) -> Var:
            return op.gather(self.matrix(tables[name]["embedding"]), index)

        def read(name: str) -> Var:
            return op.gather(op.reshape(inputs[name], _ints(-1)), origin)

        states = op.add(look("word", read("input_ids")), look("position", op.mod(origin, columns)))
        if "token_type_ids" in inputs:
            states = op.add(states, look("token_type", read("token_type_ids")))
        return self.norm(states, tables["norm"])

    def layer(self, states: Var, number: int, layout: _Layout, alone: bool) -> Var:
        """Runs a layer: [C, H] -> [C, H], or [B, H] if only the first token of each row is needed."""
        part, config = self.encoder[f"layer_{number}"], self.config
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        scale = np.float32(size**-0.5)
        query = {name: np.asarray(x) * scale for name, x in part["query"].items()}
        read = op.gather(states, layout.first) if alone else states
        if alone:
            key, value = self.rows(self.joint(states, part["key"], part["value"]), layout, 2)
            asked = op.reshape(self.linear(states := read, query), _ints(-1, heads, 1, size))
        else:
            joint = self.joint(states, query, part["key"], part["value"])
            asked, key, value = self.rows(joint, layout, 3)
            asked = op.transpose(asked, perm=[0, 2, 1, 3])
        scores = op.add(op.matmul(asked, op.transpose(key, perm=[0, 2, 3, 1])), layout.bias)
        context = op.matmul(op.softmax(scores, axis=-1), op.transpose(value, perm=[0, 2, 1, 3]))
        context = op.reshape(op.transpose(context, perm=[0, 2, 1, 3]), _ints(-1, config.hidden_size))
        if not alone and not self.padded:
            context = op.gather(context, layout.slot)
        attended = self.norm(
            op.add(states, self.linear(context, part["attention_output"])), part["attention_norm"]
        )
        inner = _ACTIVATIONS[config.activation](self.linear(attended, part["intermediate"]))
        return self.norm(op.add(attended, self.linear(inner, part["output"])), part["output_norm"])

    def joint(self, states: Var, *parts: Tree) -> Var:
        """Applies several linear layers in one product."""
        both = {name: np.concatenate([np.asarray(x[name]) for x in parts], -1) for name in ("kernel", "bias")}
        return self.linear(states, both)

    def rows(self, values: Var, layout: _Layout, count: int) -> list[Var]:
        """[C, count * H] -> `count` arrays [B, T, heads, size], 0 where there is no token."""
        config = self.config
        zero = _floats(np.zeros((1, count * config.hidden_size)))
        padded = values
        if not self.padded:
            padded = op.gather(op.concat([values, zero], axis=0), layout.source)
        sizes = _ints(count * config.num_heads, config.hidden_size // config.num_heads)
        shaped = op.reshape(padded, op.concat([_ints(-1), layout.width, sizes], axis=0))
        return [*op.split(shaped, axis=2, num_outputs=count)]

    def norm(self, states: Var, part: Tree) -> Var:
        scale, bias = _floats(part["scale"]), _floats(part["bias"])
        return op.layer_normalization(states, scale, bias, axis=-1, epsilon=self.config.layer_norm_eps)[0]

    def linear(self, states: Var, part: Tree) -> Var:
        return op.add(op.matmul(states, self.matrix(part["kernel"])), _floats(part["bias"]))

    def matrix(self, values: Any) -> Var:
        """Returns a matrix as it is stored, turned into float32."""
        stored = op.const(np.asarray(values).astype(self.stored))
        return stored if self.stored == np.float32 else op.cast(stored, to=np.float32)

    # Selection

    def limits(self, threshold: Var) -> Var:
        """Returns the smallest logit that each point keeps, computed as `selection.min_logit`."""
        exact = op.cast(threshold, to=np.float64)
        other = op.sub(op.const(np.float64(1)), exact)
        return op.cast(op.sub(op.log(exact), op.log(other)), to=np.float32)

    def match(self, states: Var, types: Var, position: Var, layout: _Layout) -> Var:
        """Computes the features of `reduction.match` of tokens with int64 types and positions [C]: [C, 2]."""

        def rows(values: Var, *size: int) -> Var:
            empty = op.const(np.zeros((1, *size), values.unwrap_tensor().dtype))
            padded = op.gather(op.concat([values, empty], axis=0), layout.source)
            return op.reshape(padded, op.concat([_ints(-1), layout.width, _ints(*size)], axis=0))

        def mean(values: Var) -> Var:  # [B, T, ...] -> [B, 1, ...]
            return op.div(op.reduce_sum(values, _ints(1), keepdims=1), count)

        places, segments = rows(position), rows(types)
        real = op.greater(places, op.const(np.int64(0)))  # [B, T]; not padding, nor [CLS]
        number = op.reduce_sum(op.cast(real, to=np.float32), _ints(1), keepdims=1)
        count = op.unsqueeze(op.max([number, _floats(1)]), _ints(2))  # [B, 1, 1]
        column, zero = op.unsqueeze(real, _ints(2)), _floats(0)
        read = op.where(column, rows(states, self.config.hidden_size), zero)
        centered = op.where(column, op.sub(read, mean(read)), zero)
        length = op.add(op.reduce_sum(op.mul(centered, centered), _ints(2)), _floats(EPSILON))
        unit = op.div(centered, op.sqrt(length))
        same = op.equal(op.unsqueeze(segments, _ints(2)), op.unsqueeze(segments, _ints(1)))
        other = op.and_(op.not_(same), op.unsqueeze(real, _ints(1)))
        cosine = op.where(other, op.matmul(unit, op.transpose(unit, perm=[0, 2, 1])), _floats(-1))
        best = op.reduce_max(cosine, _ints(2))  # [B, T, 1]
        apart = op.abs(op.sub(op.unsqueeze(places, _ints(2)), op.unsqueeze(places, _ints(1))))
        near = op.less_or_equal(apart, op.const(np.int64(WINDOW)))
        window = op.cast(op.and_(op.and_(same, near), op.unsqueeze(real, _ints(1))), to=np.float32)
        size = op.max([op.reduce_sum(window, _ints(2)), _floats(1)])
        features = op.concat([best, op.div(op.matmul(window, best), size)], axis=2)
        features = op.where(column, features, zero)
        deviation = op.where(column, op.sub(features, mean(features)), zero)
        variance = op.add(mean(op.mul(deviation, deviation)), _floats(EPSILON))
        scaled = op.reshape(op.div(deviation, op.sqrt(variance)), _ints(-1, NUM_FEATURES))
        return op.gather(scaled, layout.slot)

    def selector_logits(self, states: Var, stage: int) -> Var:
        """[C, H], or with features of a match [C, H + 2] -> [C]."""
        part = self.encoder[f"selector_{stage}"]
        kernels = [_floats(part[name]["kernel"]) for name in ("hidden", "output")]
        biases = [_floats(part[name]["bias"]) for name in ("hidden", "output")]
        hidden = op.gelu(op.add(op.matmul(states, kernels[0]), biases[0]))
        return op.reshape(op.add(op.matmul(hidden, kernels[1]), biases[1]), _ints(-1))

    # Heads

    def answers(self, inputs: dict[str, Var], shape: Var, left: list[tuple[Var, Var]]) -> dict[str, Var]:
        """Returns the outputs of the head, and adds the inputs that it reads.

        `left` are the places and states of the tokens that each point drops, and of those that stay.
        """
        if not self.config.reads_all_tokens:
            return {"logits": self.sentence_logits(left[-1][1])}
        places, states = (op.concat([*parts], axis=0) for parts in zip(*left, strict=True))
        hidden = _ints(self.config.hidden_size)
        size = op.concat([op.reduce_prod(shape, keepdims=1), hidden], axis=0)
        empty = op.constant_of_shape(size, value=np.zeros(1, np.float32))
        flat = op.scatter_nd(empty, op.unsqueeze(places, _ints(1)), states)
        return _HEADS[self.config.task](self, inputs, op.reshape(flat, op.concat([shape, hidden], axis=0)))

    def span_logits(self, inputs: dict[str, Var], states: Var) -> dict[str, Var]:
        """[B, S, H] -> [B, 2, S]."""
        return {"logits": op.transpose(self.linear(states, self.head["qa_outputs"]), perm=[0, 2, 1])}

    def candidate_logits(self, inputs: dict[str, Var], states: Var) -> dict[str, Var]:
        """[B, S, H] -> [B, C], at the markers `candidates`."""
        places = inputs["candidates"] = argument(Tensor(np.int64, ("rows", "candidates")))
        logits = self.linear(_take(states, places), self.head["qa_outputs"])
        return {"logits": op.squeeze(logits, _ints(2))}

    def multi_hop_logits(self, inputs: dict[str, Var], states: Var) -> dict[str, Var]:
        """[B, S, H] -> `span` [B, 2, S], `kind` [B, 3], `sentence` [B, N, 2]."""
        head = self.head
        ends = inputs["sentences"] = argument(Tensor(np.int64, ("rows", "sentences", 2)))
        real = op.cast(op.unsqueeze(inputs["attention_mask"], _ints(2)), to=np.bool_)
        largest = op.reduce_max(op.where(real, states, _floats(-np.inf)), _ints(1), keepdims=0)
        shape = op.shape(ends)
        pairs = op.concat([op.gather(shape, _ints(0, 1)), _ints(2 * self.config.hidden_size)], axis=0)
        taken = op.reshape(_take(states, op.reshape(ends, _ints(0, -1))), pairs)
        return {
            "span": self.span_logits(inputs, states)["logits"],
            "kind": self.linear(largest, head["qa_classifier"]),
            "sentence": self.linear(
                op.gelu(self.linear(taken, head["sent_linear"])), head["sent_classifier"]
            ),
        }

    def sentence_logits(self, first: Var) -> Var:
        """[B, H], the states of [CLS] -> [B, outputs]."""
        if self.config.backbone.pooler:
            sentence = op.tanh(self.linear(first, self.encoder["pooler"]))
        else:
            sentence = op.relu(self.linear(first, self.head["pre_classifier"]))
        return self.linear(sentence, self.head["classifier"])


@dataclasses.dataclass(frozen=True)
class _Passage:
    """Tokens that the rows of a question share and decide on together, as `selection.SharedPassage`."""

    shared: Var  # bool [B * S]
    real: Var  # float32 [questions, group, 1], 0 for rows without such tokens
    shape: Var  # int64 [2], B and S
    groups: Var  # int64 [3], for [questions, group, S]

    @classmethod
    def of(cls, shared: Var, group: Var, shape: Var) -> "_Passage":
        """Reads the inputs `shared` int64 [B, S] and `group`."""
        length = op.gather(shape, _ints(1))
        groups = op.concat([_ints(-1), op.reshape(group, _ints(1)), length], axis=0)
        some = op.reduce_max(op.reshape(shared, groups), _ints(2), keepdims=1)
        flat = op.cast(op.reshape(shared, _ints(-1)), to=np.bool_)
        return cls(flat, op.cast(some, to=np.float32), shape, groups)

    def mean(self, logits: Var, origin: Var) -> Var:
        """Averages the logits [C] of tokens at places `origin` over the rows of a question."""
        padded = op.reshape(_scatter(self.shape, origin, logits, np.float32), self.groups)
        total = op.reduce_sum(op.mul(padded, self.real), _ints(1), keepdims=1)
        count = op.max([op.reduce_sum(self.real, _ints(1), keepdims=1), _floats(1)])
        mean = op.expand(op.div(total, count), op.shape(padded))
        return op.gather(op.reshape(mean, _ints(-1)), origin)


@dataclasses.dataclass(frozen=True)
class _Rectangle:
    width: Var  # int64 [1]
    slot: Var  # int64 [C], places of tokens in it


# Head that reads all tokens -> method of `_Graph`.
_HEADS = {
    "span": _Graph.span_logits,
    "candidates": _Graph.candidate_logits,
    "multi_hop": _Graph.multi_hop_logits,
}


def _take(states: Var, places: Var) -> Var:
    """[B, S, H] at int64 [B, N] -> [B, N, H]; 0 where a place is negative."""
    taken = op.gather_nd(states, op.unsqueeze(op.max([places, _ints(0)]), _ints(2)), batch_dims=1)
    return op.where(op.unsqueeze(op.less(places, _ints(0)), _ints(2)), _floats(0), taken)


def _positions(chosen: Var) -> Var:
    """bool [n] -> int64 [k]."""
    return op.reshape(op.non_zero(chosen), _ints(-1))


def _scatter(shape: Var, places: Var, values: Var, dtype: Any) -> Var:
    """Puts values [C, ...] at places of a flat array, and shapes it as `shape`."""
    size = op.reshape(op.reduce_prod(shape, keepdims=0), _ints(1))
    empty = op.constant_of_shape(size, value=np.zeros(1, dtype))
    values = op.expand(values, op.shape(places))
    return op.reshape(op.scatter_elements(empty, places, values), shape)
