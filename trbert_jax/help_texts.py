"""What `trbert --help` and `trbert COMMAND --help` say beside the options."""

DESCRIPTION = """\
Trains and runs BERT and DistilBERT models that read every word once and then drop the words they no
longer need (TR-BERT), so that long texts cost less: for text classification, question answering and
multiple choice. All settings of a training run are in one YAML file.
"""
EXAMPLES = """\
examples:
  trbert train --config configs/quickstart.yaml
  trbert predict --model runs/quickstart/model "some text"
  trbert COMMAND --help
"""
TRAIN_EXAMPLES = """\
The stages run in order: finetune (the whole model, no tokens dropped), score (how much each token
matters), policy (learn which tokens to drop), teacher (what the full model says), joint (train all
of it together), evaluate. Each has a folder in the work directory. The same command run again
skips finished stages and goes on with the one that was interrupted.

examples:
  trbert train --config configs/quickstart.yaml
  trbert train --config configs/imdb_bert.yaml data.path=~/imdb workdir=/tmp/imdb policy.alpha=2
  trbert train --config configs/imdb_bert.yaml --stages finetune,score
"""
EVALUATE_EXAMPLES = """\
Prints accuracy, tokens kept at each reduction, FLOPs and speed.

examples:
  trbert evaluate --model work/imdb/model --data test.jsonl --json result.json
  trbert evaluate --model work/imdb/model --data test.jsonl --rule dense
  trbert evaluate --model work/imdb/model --data test.jsonl --threshold 0.4
  trbert evaluate --config configs/imdb_bert.yaml --all-checkpoints --json checkpoints.json
"""
PREDICT_EXAMPLES = """\
Texts are arguments, lines of --file, or lines of standard input. Prints one JSON object a text, in
order: "label", "label_id", "scores" (a probability for every label), "kept" (for each reduction
the positions of the tokens that remained; 0 is the first token, [CLS]), "num_tokens" (special
tokens included), "truncated" (the text was longer than the model reads). A .jsonl file holds an object
with "text" in each line; blank lines are left out.

A model that answers questions takes a JSON object a line ("question" and "context", say; see
docs/question_answering.md) and prints "id", "answer", "num_tokens" and "num_kept".

examples:
  trbert predict --model work/imdb/model "A fine film." "A waste of time."
  trbert predict --model work/imdb/model --file reviews.jsonl --output predictions.jsonl
  cat reviews.txt | trbert predict --model work/imdb/model
  trbert predict --model work/squad/model '{"question": "Who wrote it?", "context": "Ada wrote it."}'
"""
COMPILE_EXAMPLES = """\
Compiles what predict and evaluate need with this batch size: one text, a few texts and full batches,
short and long ones; of questions full batches. The programs are kept in ~/.cache/trbert_jax (or
$JAX_COMPILATION_CACHE_DIR), so that the next process starts at once.

example:
  trbert compile --model work/imdb/model --batch-size 32
"""
CONVERT_EXAMPLES = """\
Reads a Hugging Face BERT or DistilBERT, or a checkpoint of the published TR-BERT code, and writes
it in this project's form: config.json, model.safetensors, tokenizer files.

examples:
  trbert convert --input downloads/trbert-imdb --output models/imdb
  trbert convert --input bert-base-uncased --output models/bert-1024 --max-positions 1024
  trbert convert --input distilbert-base-uncased --output models/distil3 --keep-layers 0,2,4
"""
BENCHMARK_EXAMPLES = """\
Times the variants of running a model on the same texts in the same batches: packed (computes the kept tokens
only), masked (computes all), masked_full (pads all texts to the model's longest), batch_max (the published
evaluation), dense and dense_full (drop nothing) and, if PyTorch is installed, huggingface. "realized" in the
table is the speed-up over masked_full divided by the ratio of FLOPs: 1 if each FLOP saved saves its time.

examples:
  trbert benchmark --model work/imdb/model --data test.jsonl --max-texts 256 --json speed.json
  trbert benchmark --model work/imdb/model --data test.jsonl --batch-sizes 32 --plot speed.png
  trbert benchmark --random bert-base --replay work/imdb/model --data test.jsonl --max-length 256
"""
PREPARE_EXAMPLES = """\
Tokenizes a configuration's data once and writes it in shards, a data set that TensorFlow Datasets reads too.
Training reads them with data.prepared=DIR, in the background, each process its own rows. Stopped and started
again, it goes on.

example:
  trbert prepare-data --config configs/yelp_f_bert.yaml --output prepared/yelp_f data.path=data/yelp_f
"""
SPLIT_EXAMPLES = """\
Shuffles with a fixed seed and writes train.jsonl, dev.jsonl and test.jsonl, the published split.

example:
  trbert split-hyperpartisan --input original_data.txt --output data/hyperpartisan
"""
